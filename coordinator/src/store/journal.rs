//! An append-only chain of records, in numbered files of one directory. It knows bytes and kinds, not events.
//!
//! ```text
//! part     magic 8 │ version u32 │ run 16 │ plan 32 │ part u64 │ chain of the part before 32, from the second on
//!          BLAKE3 of everything before, 32: the chain's value at the beginning of this part
//! record   payload length u32 │ attachment length u32 │ kind u8 │ stripped u8 │ unix ms u64 │ durable u64 │ payload
//!          hash of the attachment 32, if there is one │ the attachment, unless it is stripped │ chain 32
//! chain    BLAKE3 of the chain before, both lengths, kind, unix ms, durable, payload, hash of the attachment
//! room     zeros up to the end of the file, or nothing
//! ```
//!
//! Integers are little-endian. An attachment is in the chain by its hash alone: one that is damaged leaves the journal
//! whole, and an old part can be stripped of them. `durable` is how far the part had been synced when a record was
//! appended, and tells damage from a torn tail: if any whole record after a broken one claims that the broken one was
//! durable, then what was synced is damaged, and the journal is refused. Otherwise the tail is cut. Behind the last
//! `durable` an attachment may be torn beside a record that is whole: whoever opens the journal looks. A part gets its name
//! only when its head is durable, and the part before it is durable by then; so only the last one has a tail.
//!
//! Where little is synced at a time, most of what a sync takes is that the file has become longer. So room is made behind the last
//! record long before it is needed. What is cut off with a torn tail is the room, too; a part that is no longer the last keeps its.

use std::io::{self, BufReader, Read};

use protocol::ids::{Hash, RunId};

use super::StoreError;
use super::disk::{Disk, write_aside};

/// The version that this build reads and writes.
pub const JOURNAL_VERSION: u32 = 1;

/// The longest payload of a record, in bytes.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 20;

/// The longest attachment of a record, in bytes.
pub const ATTACHMENT_BYTES_MAX: usize = 1 << 20;

/// The kind of a record that holds a fact.
pub const FACT: u8 = 1;

const MAGIC: &[u8; 8] = b"tribjrnl";
const HEAD_BYTES: usize = 26;

/// How many syncs the room that is made at once has to be for, at least. For fewer, writing it takes longer than it saves.
const SYNCS_PER_ROOM: u64 = 32;

/// What was appended is written when it has so many bytes, also if nobody asks.
const BUFFER_BYTES: usize = 1 << 20;

const READ_BYTES: usize = 1 << 20;

/// Whose journal it is.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// What the names of its parts begin with.
    pub prefix: &'static str,
    /// Its run; zero if it is of none.
    pub run: RunId,
    /// The hash of the run's plan; zero if it is of none. A reader that is without takes any.
    pub plan: Option<Hash>,
}

impl Scope {
    /// The name of a part.
    pub(crate) fn file(&self, part: u64) -> String {
        format!("{}{part:06}", self.prefix)
    }

    /// The number of the last part that is there, from 1; 0 for none. All before it must be there.
    fn parts(&self, disk: &dyn Disk) -> Result<u64, StoreError> {
        let files = disk.list().map_err(StoreError::io(self.prefix, "list"))?;
        let number = |name: &str| {
            let digits = name.strip_prefix(self.prefix)?;
            digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse::<u64>().ok()).flatten()
        };
        let mut parts: Vec<u64> = files.iter().filter_map(|(name, _)| number(name)).collect();
        parts.sort_unstable();
        match (1..).zip(&parts).find(|(expected, got)| expected != *got) {
            Some((missing, _)) => Err(StoreError::Missing { file: self.file(missing) }),
            None => Ok(parts.len() as u64),
        }
    }
}

type Chain = [u8; 32];

/// Where an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// In which part.
    pub part: u64,
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub bytes: u32,
    /// Its BLAKE3.
    pub hash: Hash,
    /// It is no longer there.
    pub stripped: bool,
}

/// A record, as it was read.
#[derive(Clone, Debug)]
pub struct Record {
    /// In which part.
    pub part: u64,
    /// Where it begins.
    pub offset: u64,
    /// What its payload is.
    pub kind: u8,
    /// When it was appended.
    pub unix_ms: u64,
    /// How far the part was durable then.
    pub durable: u64,
    /// What it says.
    pub payload: Vec<u8>,
    /// What is attached.
    pub attached: Option<Attached>,
    /// The attachment itself, if it was asked for and is there. Nobody looked yet whether its hash is right.
    pub content: Option<Vec<u8>>,
    chain: Chain,
}

/// Where a journal ends.
#[derive(Debug)]
pub struct End {
    /// The hash of the plan that its parts name.
    pub plan: Hash,
    /// The last part.
    pub part: u64,
    /// The length of what is whole of it.
    pub length: u64,
    /// How much of that was durable, as far as its records know. An attachment behind it may be torn.
    pub durable: u64,
    /// What stands after it, torn by a crash.
    pub torn: Option<StoreError>,
    /// The lowest part from which nothing was stripped.
    pub unstripped: u64,
    /// How many records there are.
    pub records: u64,
    chain: Chain,
}

/// A journal that is written.
#[derive(Debug)]
pub struct Journal {
    scope: Scope,
    plan: Hash,
    clock: fn() -> u64,
    part: u64,
    /// What the part's file has, all of it whole records.
    written: u64,
    /// How much of it is durable.
    durable: u64,
    /// As far as the file has room, and how much is made at once; none is made where that is 0.
    room: u64,
    room_bytes: u64,
    /// The last sync was of so little that room pays.
    syncs_little: bool,
    /// After what was appended, and after what was written.
    chain: Chain,
    written_chain: Chain,
    /// What waits to be written.
    buffer: Vec<u8>,
    /// The disk failed in a way after which nobody knows what it holds.
    failed: bool,
}

impl Journal {
    /// Reads a journal from its beginning, or begins it if there is none; cuts a torn tail. Everything that `each` was
    /// shown is durable when this returns. What was cut, and which parts are not stripped, is in the [`End`].
    ///
    /// # Errors
    /// If it is damaged, of somebody else, or the disk is broken; or what `each` finds wrong with a record.
    pub fn open(
        disk: &mut dyn Disk,
        scope: Scope,
        clock: fn() -> u64,
        each: &mut dyn FnMut(Record) -> Result<(), String>,
    ) -> Result<(Self, Option<End>), StoreError> {
        let end = read(disk, &scope, false, each)?;
        let plan = scope.plan.or(end.as_ref().map(|end| end.plan)).unwrap_or(Hash([0; 32]));
        let mut journal = Self {
            scope,
            plan,
            clock,
            part: 0,
            written: 0,
            durable: 0,
            room: 0,
            room_bytes: 0,
            syncs_little: false,
            chain: [0; 32],
            written_chain: [0; 32],
            buffer: Vec::new(),
            failed: false,
        };
        match &end {
            None => journal.begin_part(disk)?,
            Some(end) => journal.go_on(disk, end)?,
        }
        Ok((journal, end))
    }

    fn go_on(&mut self, disk: &mut dyn Disk, end: &End) -> Result<(), StoreError> {
        let file = self.scope.file(end.part);
        // Nothing is put there; but a file that may not be written is refused now.
        disk.append(&file, &[]).map_err(StoreError::io(&file, "write"))?;
        disk.truncate(&file, end.length).map_err(StoreError::io(&file, "cut"))?;
        disk.sync(&file).map_err(StoreError::io(&file, "sync"))?;
        (self.part, self.written, self.durable, self.room) = (end.part, end.length, end.length, end.length);
        (self.chain, self.written_chain) = (end.chain, end.chain);
        Ok(())
    }

    /// From now on room is made for so many bytes at once, if syncs are of little.
    pub(crate) fn make_room_of(&mut self, bytes: u64) {
        self.room_bytes = bytes;
    }

    /// The hash of the plan that it names.
    #[must_use]
    pub fn plan(&self) -> Hash {
        self.plan
    }

    /// The part that is written to.
    #[must_use]
    pub fn part(&self) -> u64 {
        self.part
    }

    /// Its name.
    #[must_use]
    pub fn file(&self) -> String {
        self.scope.file(self.part)
    }

    /// Its length, with what waits to be written.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Whether something is appended and not written.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Whether a record can be taken in before anything is written.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.buffer.len() < BUFFER_BYTES
    }

    /// Takes in a record. It is written at the next flush, and durable after the next sync. Where the attachment is,
    /// if there is one.
    ///
    /// # Errors
    /// If it is too long, or the disk is full or broken: then it was not taken in.
    pub fn append(
        &mut self,
        disk: &mut dyn Disk,
        kind: u8,
        payload: &[u8],
        attachment: &[u8],
    ) -> Result<Option<Attached>, StoreError> {
        let payload_bytes = bounded(payload, PAYLOAD_BYTES_MAX)?;
        let bytes = bounded(attachment, ATTACHMENT_BYTES_MAX)?;
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush(disk)?;
        }
        self.check()?;
        let head = Head { payload_bytes, bytes, kind, stripped: false, unix_ms: (self.clock)(), durable: self.durable };
        let hash = (bytes > 0).then(|| Hash::of(attachment));
        self.chain = head.chain(&self.chain, payload, hash);
        let before = self.length();
        head.put(&mut self.buffer, payload, hash, attachment, &self.chain);
        let offset = before + HEAD_BYTES as u64 + payload.len() as u64 + 32;
        Ok(hash.map(|hash| Attached { part: self.part, offset, bytes, hash, stripped: false }))
    }

    /// Writes what was appended; it survives the end of the process. How many bytes.
    ///
    /// # Errors
    /// If the disk is full: then what was appended still waits, and nothing of it is in the file. Or it is broken.
    pub fn flush(&mut self, disk: &mut dyn Disk) -> Result<u64, StoreError> {
        self.check()?;
        if self.buffer.is_empty() {
            return Ok(0);
        }
        let file = self.file();
        if self.syncs_little && self.length() > self.room {
            match disk.reserve(&file, self.room_bytes) {
                Ok(()) => self.room = self.written + self.room_bytes,
                Err(error) => match self.undo(disk, &file, error) {
                    // What is to be written may fit where its room does not.
                    StoreError::Full { .. } => {}
                    broken => return Err(broken),
                },
            }
        }
        if let Err(error) = disk.append(&file, &self.buffer) {
            return Err(self.undo(disk, &file, error));
        }
        let bytes = self.buffer.len() as u64;
        self.written += bytes;
        self.written_chain = self.chain;
        self.buffer.clear();
        Ok(bytes)
    }

    /// Cuts the file to what it had before a write that failed.
    fn undo(&mut self, disk: &mut dyn Disk, file: &str, error: io::Error) -> StoreError {
        let error = StoreError::io(file, "write")(error);
        let cut = disk.truncate(file, self.written);
        (self.room, self.syncs_little) = (self.written, false);
        self.failed = cut.is_err() || !matches!(error, StoreError::Full { .. });
        cut.err().map_or(error, StoreError::io(file, "cut"))
    }

    /// Forgets what was appended and not written.
    pub fn take_back(&mut self) {
        self.buffer.clear();
        self.chain = self.written_chain;
    }

    /// Makes what was appended survive a power cut. How many bytes that are.
    ///
    /// # Errors
    /// As [`Self::flush`]; and if the sync failed, after which nothing more can be done with this journal.
    pub fn sync(&mut self, disk: &mut dyn Disk) -> Result<u64, StoreError> {
        self.flush(disk)?;
        let bytes = self.written - self.durable;
        if bytes > 0 {
            let file = self.file();
            // No second try: the operating system may have forgotten what it could not write.
            self.failed = true;
            disk.sync(&file).map_err(|source| StoreError::Unsynced { file, source })?;
            self.failed = false;
            self.durable = self.written;
            self.syncs_little = bytes <= self.room_bytes / SYNCS_PER_ROOM;
        }
        Ok(bytes)
    }

    /// Begins the next part. Everything before it is durable when this returns.
    ///
    /// # Errors
    /// As [`Self::sync`]; on a full disk the part that was, is still written to.
    pub fn begin_part(&mut self, disk: &mut dyn Disk) -> Result<(), StoreError> {
        if self.part > 0 {
            self.sync(disk)?;
        }
        let part = self.part + 1;
        let head = part_head(&self.scope, self.plan, part, &self.chain);
        let file = self.scope.file(part);
        let written = write_aside(disk, &file, |aside| aside.put(&head));
        // If it may be there, nothing may be put before it any more.
        self.failed = matches!(&written, Err(error) if !error.is_full());
        let written = written?;
        // From here on the disk holds it open: whoever removes it cannot have it made anew, without a head.
        self.failed = true;
        disk.append(&file, &[]).map_err(|source| StoreError::Io { file, verb: "write", source })?;
        self.failed = false;
        self.chain.copy_from_slice(&head[head.len() - 32..]);
        self.written_chain = self.chain;
        (self.part, self.written, self.durable, self.room) = (part, written, written, written);
        Ok(())
    }

    /// Rewrites an earlier part without its attachments.
    ///
    /// # Errors
    /// If the part is damaged, or the disk is full or broken: then it stays as it was.
    pub fn strip(&self, disk: &mut dyn Disk, part: u64) -> Result<(), StoreError> {
        assert!(part < self.part, "the part that is written to has no copy");
        let file = self.scope.file(part);
        let mut reader = PartReader::open(disk, &self.scope, part, false)?;
        write_aside(disk, &file, |aside| {
            aside.put(&reader.head)?;
            while let Some(record) = reader.next().map_err(|broken| broken.damage(&file))? {
                let mut bytes = Vec::new();
                record.put_stripped(&mut bytes);
                aside.put(&bytes)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// The bytes of an attachment, which nobody has checked; `None` if it was stripped.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn attachment(&self, disk: &dyn Disk, place: &Attached) -> Result<Option<Vec<u8>>, StoreError> {
        let bytes = place.bytes as usize;
        if place.part == self.part && place.offset >= self.written {
            let from = usize::try_from(place.offset - self.written).unwrap_or(usize::MAX);
            return Ok(self.buffer.get(from..).and_then(|rest| rest.get(..bytes)).map(<[u8]>::to_vec));
        }
        attachment(disk, &self.scope, place)
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.failed { Err(StoreError::Failed { file: self.file() }) } else { Ok(()) }
    }
}

fn attachment(disk: &dyn Disk, scope: &Scope, place: &Attached) -> Result<Option<Vec<u8>>, StoreError> {
    if place.stripped {
        return Ok(None);
    }
    let file = scope.file(place.part);
    let reader = disk.read(&file, place.offset).map_err(StoreError::io(&file, "open"))?;
    let mut content = Vec::new();
    reader.take(u64::from(place.bytes)).read_to_end(&mut content).map_err(StoreError::io(&file, "read"))?;
    Ok(Some(content))
}

fn bounded(bytes: &[u8], max: usize) -> Result<u32, StoreError> {
    match u32::try_from(bytes.len()) {
        Ok(length) if bytes.len() <= max => Ok(length),
        _ => Err(StoreError::TooLong { bytes: bytes.len(), max }),
    }
}

/// Shows `each` every record, in order, and says where the journal ends; `None` if there is none. Changes nothing, and
/// needs no lock: beside a process that appends, what it is just writing is a torn tail. With `load` the attachments
/// are read too.
///
/// # Errors
/// As [`Journal::open`].
pub fn read(
    disk: &dyn Disk,
    scope: &Scope,
    load: bool,
    each: &mut dyn FnMut(Record) -> Result<(), String>,
) -> Result<Option<End>, StoreError> {
    let parts = scope.parts(disk)?;
    let mut before: Option<(String, Chain)> = None;
    let mut end = None;
    let (mut unstripped, mut records) = (None, 0);
    for part in 1..=parts {
        let mut reader = PartReader::open(disk, scope, part, load)?;
        if let Some((file, _)) = before.filter(|(_, chain)| *chain != reader.before) {
            let reason = format!("it does not end where part {part} begins");
            return Err(StoreError::Damaged { file, offset: 0, reason });
        }
        let mut durable = 0;
        let torn = loop {
            match reader.next() {
                Ok(None) => break None,
                Ok(Some(record)) => {
                    durable = record.durable;
                    if record.attached.is_some_and(|attached| !attached.stripped) {
                        unstripped.get_or_insert(part);
                    }
                    let offset = record.offset;
                    records += 1;
                    each(record).map_err(|reason| reader.damaged(offset, reason))?;
                }
                Err(broken) if part < parts => return Err(broken.damage(&reader.file)),
                Err(broken) => break Some(tail(disk, &reader, broken)?),
            }
        };
        before = Some((reader.file, reader.chain));
        end = Some(End {
            plan: reader.plan,
            part,
            length: reader.offset,
            durable,
            torn,
            unstripped: unstripped.unwrap_or(part),
            records,
            chain: reader.chain,
        });
    }
    Ok(end)
}

/// Whether what does not verify is a torn tail: the warning that says so, or the error that says that it is damage.
fn tail(disk: &dyn Disk, reader: &PartReader, broken: Broken) -> Result<StoreError, StoreError> {
    let Broken::Record { offset, reason, computed } = broken else { return Err(broken.damage(&reader.file)) };
    let torn = StoreError::Torn { file: reader.file.clone(), offset, reason: reason.clone() };
    if is_record(disk, &reader.file, offset, Some(reader.chain)).map_err(StoreError::io(&reader.file, "read"))? {
        // A live process was writing it just then.
        return Ok(torn);
    }
    let witness = later_witness(disk, &reader.file, offset, computed).map_err(StoreError::io(&reader.file, "read"))?;
    if let Some(at) = witness {
        let reason = format!("{reason}; it was durable when the record at offset {at} was written");
        return Err(StoreError::Damaged { file: reader.file.clone(), offset, reason });
    }
    Ok(torn)
}

/// The first whole record after `broken` that claims that more than everything before `broken` was durable. `computed`
/// is where the broken record ends and the chain that it should have there, if it has its length.
fn later_witness(disk: &dyn Disk, file: &str, broken: u64, computed: Option<(u64, Chain)>) -> io::Result<Option<u64>> {
    let mut input = disk.read(file, broken)?;
    let mut window = Vec::new();
    let mut at = broken;
    loop {
        let read = (&mut input).take(READ_BYTES as u64).read_to_end(&mut window)?;
        if read == 0 {
            return Ok(None);
        }
        let heads = window.windows(HEAD_BYTES).map(|head| Head::parse(head.try_into().expect("26 bytes")));
        for (place, head) in (at..).zip(heads) {
            // No record claims to be durable itself; and this leaves next to nothing of what is no record.
            let claims = head.durable > broken && head.durable <= place;
            let computed = computed.filter(|(end, _)| *end == place).map(|(_, chain)| chain);
            if claims && place >= broken + 32 && is_record(disk, file, place, computed)? {
                return Ok(Some(place));
            }
        }
        let done = window.len().saturating_sub(HEAD_BYTES - 1);
        window.drain(..done);
        at += done as u64;
    }
}

/// Whether a record begins at an offset: the 32 bytes before it are then the chain before it, or were to be `computed`.
fn is_record(disk: &dyn Disk, file: &str, at: u64, computed: Option<Chain>) -> io::Result<bool> {
    let mut stored = [0; 32];
    disk.read(file, at - 32)?.read_exact(&mut stored)?;
    for chain in [Some(stored), computed].into_iter().flatten() {
        let mut input = BufReader::new(disk.read(file, at)?);
        match read_record(&mut input, &chain, 0, at, false) {
            Ok(record) if record.is_some() => return Ok(true),
            Err(Broken::Disk(error)) => return Err(error),
            _ => {}
        }
    }
    Ok(false)
}

/// Why there is no record where one should be.
#[derive(Debug)]
enum Broken {
    Disk(io::Error),
    Record { offset: u64, reason: String, computed: Option<(u64, Chain)> },
}

impl Broken {
    fn record(offset: u64, reason: &str) -> Self {
        Self::Record { offset, reason: reason.to_owned(), computed: None }
    }

    fn damage(self, file: &str) -> StoreError {
        match self {
            Self::Disk(error) => StoreError::io(file, "read")(error),
            Self::Record { offset, reason, .. } => StoreError::Damaged { file: file.to_owned(), offset, reason },
        }
    }
}

/// One part, as it is read.
struct PartReader {
    input: BufReader<Box<dyn Read + Send>>,
    file: String,
    part: u64,
    /// Its head, as it is in the file.
    head: Vec<u8>,
    plan: Hash,
    /// The chain of the part before, as it is named here.
    before: Chain,
    load: bool,
    /// Where the next record begins, and the chain before it.
    offset: u64,
    chain: Chain,
}

impl PartReader {
    fn open(disk: &dyn Disk, scope: &Scope, part: u64, load: bool) -> Result<Self, StoreError> {
        let file = scope.file(part);
        let input = disk.read(&file, 0).map_err(StoreError::io(&file, "open"))?;
        let mut input = BufReader::with_capacity(READ_BYTES, input);
        let mut head = vec![0; part_head_bytes(part)];
        let damaged = |reason: &str| StoreError::Damaged { file: file.clone(), offset: 0, reason: reason.to_owned() };
        input.read_exact(&mut head).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged("its head ends early"),
            _ => StoreError::io(&file, "read")(error),
        })?;
        let plan = check_part_head(&head, scope, &file, part)?;
        let (mut before, mut chain) = ([0; 32], [0; 32]);
        chain.copy_from_slice(&head[head.len() - 32..]);
        if part > 1 {
            before.copy_from_slice(&head[FIRST_PART_BYTES..FIRST_PART_BYTES + 32]);
        }
        let offset = head.len() as u64;
        Ok(Self { input, file, part, head, plan, before, load, offset, chain })
    }

    fn next(&mut self) -> Result<Option<Record>, Broken> {
        let record = read_record(&mut self.input, &self.chain, self.part, self.offset, self.load)?;
        if let Some(record) = &record {
            self.chain = record.chain;
            self.offset += record.bytes();
        }
        Ok(record)
    }

    fn damaged(&self, offset: u64, reason: String) -> StoreError {
        StoreError::Damaged { file: self.file.clone(), offset, reason }
    }
}

/// Of a head: everything before the chain of the part before.
const FIRST_PART_BYTES: usize = 8 + 4 + 16 + 32 + 8;

fn part_head_bytes(part: u64) -> usize {
    FIRST_PART_BYTES + 32 + if part > 1 { 32 } else { 0 }
}

fn part_head(scope: &Scope, plan: Hash, part: u64, before: &Chain) -> Vec<u8> {
    let mut head = Vec::new();
    head.extend(MAGIC);
    head.extend(JOURNAL_VERSION.to_le_bytes());
    head.extend(scope.run.0);
    head.extend(plan.0);
    head.extend(part.to_le_bytes());
    if part > 1 {
        head.extend(before);
    }
    let hash = Hash::of(&head);
    head.extend(hash.0);
    head
}

/// Whether it is the head of this part of this journal; its plan.
fn check_part_head(head: &[u8], scope: &Scope, file: &str, part: u64) -> Result<Hash, StoreError> {
    let damaged = |reason: &str| StoreError::Damaged { file: file.to_owned(), offset: 0, reason: reason.to_owned() };
    if !head.starts_with(MAGIC) {
        return Err(damaged("it is not a journal"));
    }
    let version = u32_at(head, 8);
    if version > JOURNAL_VERSION {
        return Err(StoreError::Newer { file: file.to_owned(), got: version });
    }
    let (content, hash) = head.split_at(head.len() - 32);
    if Hash::of(content).as_bytes() != hash {
        return Err(damaged("the hash of its head does not fit"));
    }
    let run = RunId(head[12..28].try_into().expect("16 bytes"));
    let plan = Hash(head[28..60].try_into().expect("32 bytes"));
    if run != scope.run {
        return Err(StoreError::AnotherRun { file: file.to_owned(), got: run, expected: scope.run });
    }
    if scope.plan.is_some_and(|expected| expected != plan) {
        return Err(StoreError::AnotherPlan { file: file.to_owned() });
    }
    if u64_at(head, 60) != part {
        return Err(damaged("it is another part than its name says"));
    }
    Ok(plan)
}

/// What stands at the front of a record.
#[derive(Clone, Copy)]
struct Head {
    payload_bytes: u32,
    bytes: u32,
    kind: u8,
    stripped: bool,
    unix_ms: u64,
    durable: u64,
}

impl Head {
    fn parse(head: &[u8; HEAD_BYTES]) -> Self {
        Self {
            payload_bytes: u32_at(head, 0),
            bytes: u32_at(head, 4),
            kind: head[8],
            stripped: head[9] != 0,
            unix_ms: u64_at(head, 10),
            durable: u64_at(head, 18),
        }
    }

    /// A length is compared with its limit before anything is allocated.
    fn check(head: &[u8; HEAD_BYTES]) -> Result<Self, String> {
        let parsed = Self::parse(head);
        if parsed.payload_bytes as usize > PAYLOAD_BYTES_MAX {
            return Err(format!("a payload of {} bytes, the most is {PAYLOAD_BYTES_MAX}", parsed.payload_bytes));
        }
        if parsed.bytes as usize > ATTACHMENT_BYTES_MAX {
            return Err(format!("an attachment of {} bytes, the most is {ATTACHMENT_BYTES_MAX}", parsed.bytes));
        }
        // The one byte that the chain does not cover has exactly the values that we write.
        if head[9] > u8::from(parsed.bytes > 0) {
            return Err("it is stripped of more than it had".to_owned());
        }
        Ok(parsed)
    }

    fn chain(&self, before: &Chain, payload: &[u8], hash: Option<Hash>) -> Chain {
        let mut hasher = blake3::Hasher::new();
        hasher.update(before);
        hasher.update(&self.payload_bytes.to_le_bytes());
        hasher.update(&self.bytes.to_le_bytes());
        hasher.update(&[self.kind]);
        hasher.update(&self.unix_ms.to_le_bytes());
        hasher.update(&self.durable.to_le_bytes());
        hasher.update(payload);
        if let Some(hash) = hash {
            hasher.update(hash.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    fn put(&self, out: &mut Vec<u8>, payload: &[u8], hash: Option<Hash>, attachment: &[u8], chain: &Chain) {
        out.extend(self.payload_bytes.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        out.extend([self.kind, u8::from(self.stripped)]);
        out.extend(self.unix_ms.to_le_bytes());
        out.extend(self.durable.to_le_bytes());
        out.extend(payload);
        if let Some(hash) = hash {
            out.extend(hash.0);
        }
        out.extend(attachment);
        out.extend(chain);
    }
}

impl Record {
    /// How many bytes it takes.
    fn bytes(&self) -> u64 {
        let attached = self.attached.map_or(0, |a| 32 + if a.stripped { 0 } else { u64::from(a.bytes) });
        HEAD_BYTES as u64 + self.payload.len() as u64 + attached + 32
    }

    /// As it was, without its attachment.
    fn put_stripped(&self, out: &mut Vec<u8>) {
        let bytes = self.attached.map_or(0, |attached| attached.bytes);
        let head = Head {
            payload_bytes: u32::try_from(self.payload.len()).expect("it was read with its length in 32 bits"),
            bytes,
            kind: self.kind,
            stripped: bytes > 0,
            unix_ms: self.unix_ms,
            durable: self.durable,
        };
        head.put(out, &self.payload, self.attached.map(|attached| attached.hash), &[], &self.chain);
    }
}

/// The next record; `None` where the bytes end, or nothing but room is left.
fn read_record(
    input: &mut impl Read,
    before: &Chain,
    part: u64,
    offset: u64,
    load: bool,
) -> Result<Option<Record>, Broken> {
    let mut head = [0; HEAD_BYTES];
    let filled = fill(input, &mut head).map_err(Broken::Disk)?;
    if is_zero(&head[..filled]) {
        let is_room = rest_is_zero(input).map_err(Broken::Disk)?;
        return if is_room { Ok(None) } else { Err(Broken::record(offset, "zeros stand in its place")) };
    }
    if filled < HEAD_BYTES {
        return Err(Broken::record(offset, "it ends early"));
    }
    let head = Head::check(&head).map_err(|reason| Broken::record(offset, &reason))?;
    let payload = take(input, head.payload_bytes, offset)?;
    let mut attached = None;
    let mut content = None;
    if head.bytes > 0 {
        let hash: Chain = take(input, 32, offset)?.try_into().expect("32 bytes");
        let begins = offset + HEAD_BYTES as u64 + payload.len() as u64 + 32;
        let hash = Hash(hash);
        attached = Some(Attached { part, offset: begins, bytes: head.bytes, hash, stripped: head.stripped });
        if !head.stripped && load {
            content = Some(take(input, head.bytes, offset)?);
        } else if !head.stripped {
            skip(input, head.bytes, offset)?;
        }
    }
    let chain = head.chain(before, &payload, attached.map(|attached| attached.hash));
    let fits = take(input, 32, offset)? == chain;
    let Head { kind, unix_ms, durable, .. } = head;
    let record = Record { part, offset, kind, unix_ms, durable, payload, attached, content, chain };
    if fits {
        return Ok(Some(record));
    }
    let computed = Some((offset + record.bytes(), chain));
    Err(Broken::Record { offset, reason: "its hash does not fit its content".to_owned(), computed })
}

/// Grows as bytes come: a damaged length must not allocate what is not there.
fn take(input: &mut impl Read, bytes: u32, offset: u64) -> Result<Vec<u8>, Broken> {
    let mut taken = Vec::with_capacity(bytes.min(1 << 16) as usize);
    input.take(u64::from(bytes)).read_to_end(&mut taken).map_err(Broken::Disk)?;
    let whole = taken.len() == bytes as usize;
    if whole { Ok(taken) } else { Err(Broken::record(offset, "it ends early")) }
}

fn skip(input: &mut impl Read, bytes: u32, offset: u64) -> Result<(), Broken> {
    let skipped = io::copy(&mut input.take(u64::from(bytes)), &mut io::sink()).map_err(Broken::Disk)?;
    let whole = skipped == u64::from(bytes);
    if whole { Ok(()) } else { Err(Broken::record(offset, "it ends early")) }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn rest_is_zero(input: &mut impl Read) -> io::Result<bool> {
    let mut piece = [0; 4096];
    loop {
        match fill(input, &mut piece)? {
            0 => return Ok(true),
            filled if !is_zero(&piece[..filled]) => return Ok(false),
            _ => {}
        }
    }
}

/// Fills `bytes` as far as there is something.
fn fill(input: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        match input.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}
