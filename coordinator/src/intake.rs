//! A payload on its way in: opened, hashed, checked, measured and spooled in one pass, at most a mebibyte in memory.
//!
//! An [`Intake`] is plain blocking code that a connection's task moves to the compute pool with each batch of records.
//! What comes out is a [`Payload`]: small ones stay in memory, larger ones are in a file of the run's directory, named
//! after their hash and task, which the store takes over. Of an upload that was cut a large part stays, and the next
//! stream of the same payload goes on behind it ([`resume_from`]). Encoded rows are sealed again under a key of their
//! own, which lives in memory only, before they are written to a file without a name: no row is ever on disk in the
//! clear, and nothing is left of them when the process ends, however it ends.
//!
//! A full disk loses nothing: what could not be written waits in memory, and [`Intake::retry`] writes it again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use learning::{Rows, Schema, Survey};
use protocol::ids::{ContentId, Hash, TaskId};
use protocol::limits::{PAYLOAD_AT_ONCE_BYTES_MAX, RECORD_BYTES_MAX, RESUME_BYTES_MIN};
use protocol::messages::{ContentKey, Refusal, TaskKind};
use protocol::session::broadcast::BROADCAST_HEADER_BYTES;
use protocol::session::record::RECORD_TAG_BYTES;
use protocol::session::{BroadcastHeader, BroadcastOpener, BroadcastSealer, Flag, Opener, RecordError};
use protocol::sum::{Checker, Ring, Verified, Verifier};

use crate::state::StateError;

/// What is to be taken in, as its manifest declares it.
#[derive(Clone, Debug)]
pub struct Declared {
    /// For which task.
    pub task: TaskId,
    /// What it is.
    pub kind: TaskKind,
    /// Its BLAKE3.
    pub hash: Hash,
    /// Its length.
    pub bytes: u64,
    /// The arithmetic that an update must fit.
    pub ring: Ring,
    /// The schema that rows must fit.
    pub schema: Option<Arc<Schema>>,
    /// Where it is kept if it is large.
    pub spools: Arc<Spools>,
}

/// Where large payloads are kept.
#[derive(Clone, Debug)]
pub struct Spools {
    /// The run's directory: they have names there.
    pub run: PathBuf,
    /// Where rows are, sealed and nameless.
    pub rows: PathBuf,
    /// Whether a payload is durable before its verdict is told.
    pub durable: bool,
}

/// Why a payload is not taken in.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// It is not what its manifest says, or not sound: an answer.
    #[error(transparent)]
    Spoiled(#[from] Refusal),
    /// It is longer than its manifest says, which no honest peer's is.
    #[error("payload of {got} bytes and more, its manifest declares {declared}")]
    TooLong {
        /// What the manifest says.
        declared: u64,
        /// What came.
        got: u64,
    },
    /// A record does not open.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Something follows the last record.
    #[error("a record follows the last one")]
    AfterLast,
    /// What an earlier stream left is not the beginning of what came now. It is gone; the payload may come again, whole.
    #[error("what an earlier stream left is not the beginning of this payload")]
    Remains,
    /// There is no room on the disk. What came is in memory, for [`Intake::retry`].
    #[error("{}: the disk is full", .0.display())]
    Full(PathBuf),
    /// The spool is broken: ours to answer for.
    #[error(transparent)]
    Disk(#[from] StateError),
}

/// A payload that is being taken in.
#[derive(Debug)]
pub struct Intake {
    opener: Opener,
    check: Check,
    spool: Spool,
    declared: Declared,
    /// It goes on behind what an earlier stream left.
    resumed: bool,
    finished: bool,
}

#[derive(Debug)]
enum Check {
    Update(Box<Verifier>),
    Other(Box<Checker>),
    Rows(Box<Checker>, RowCheck),
}

impl Intake {
    /// Waits for records that `opener` opens, behind what `part` holds already, which is read back: blocking work, if
    /// there is any.
    ///
    /// # Errors
    /// If what is there cannot be read back.
    pub fn new(opener: Opener, declared: Declared, part: Option<Part>) -> Result<Self, IntakeError> {
        let checker = || Box::new(Checker::new(declared.bytes, declared.hash));
        let mut check = match (declared.kind, &declared.schema) {
            (TaskKind::Update | TaskKind::Gradient | TaskKind::Partial, _) => {
                Check::Update(Box::new(Verifier::new(declared.ring, declared.bytes, declared.hash)))
            }
            (TaskKind::Rows, Some(schema)) => Check::Rows(checker(), RowCheck::new(schema.clone())),
            _ => Check::Other(checker()),
        };
        let spool = match part {
            None => Spool::new(&declared)?,
            Some(part) => Spool::resume(&declared, part, |chunk| check.update(chunk))?,
        };
        let resumed = spool.written > 0;
        Ok(Self { opener, check, spool, declared, resumed, finished: false })
    }

    /// Takes in some records. Whether the last one was among them.
    ///
    /// # Errors
    /// Why nothing more is taken in. If the disk is full, all of them were, and are to be written by [`Self::retry`].
    pub fn take(&mut self, records: &mut [BytesMut]) -> Result<bool, IntakeError> {
        for record in records {
            if self.finished {
                return Err(IntakeError::AfterLast);
            }
            // Whole records are never shorter than their header.
            let (header, body) = record.split_first_chunk_mut().ok_or(IntakeError::AfterLast)?;
            let opened = self.opener.open_in_place(header, body)?;
            self.check.update(opened.plaintext)?;
            self.spool.push(opened.plaintext, &self.declared)?;
            self.finished = opened.flag == Flag::Final;
        }
        if self.finished {
            self.spool.end()?;
        }
        self.retry()
    }

    /// Writes what could not be written. Whether the last record was taken in.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn retry(&mut self) -> Result<bool, IntakeError> {
        self.spool.flush(&self.declared)?;
        Ok(self.finished)
    }

    /// Whether nothing of it goes to the disk.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        matches!(self.spool.place, SpoolPlace::Memory)
    }

    /// Whether its verdict takes no time worth speaking of.
    #[must_use]
    pub fn is_small(&self) -> bool {
        self.is_in_memory() && (matches!(self.check, Check::Update(_)) || self.declared.bytes <= 16 * 1024)
    }

    /// The verdict. Of what is refused nothing stays on disk.
    ///
    /// # Errors
    /// If the payload is not what its manifest says, or not sound.
    pub fn finish(self) -> Result<Payload, IntakeError> {
        let Self { check, spool, declared, resumed, .. } = self;
        let is_survey = declared.kind == TaskKind::Survey;
        let verified = check.finish().map_err(IntakeError::from).and_then(|verified| {
            if is_survey { spool.check_survey(&declared).map(|()| verified) } else { Ok(verified) }
        });
        match verified {
            Ok(verified) => Ok(Payload { bytes: declared.bytes, verified, place: spool.finish(&declared)? }),
            Err(IntakeError::Spoiled(refusal)) => {
                spool.remove(&declared)?;
                // What was left may have lost bytes in a power cut, for which this worker is not to blame.
                Err(if resumed { IntakeError::Remains } else { refusal.into() })
            }
            Err(error) => Err(error),
        }
    }
}

impl Check {
    fn update(&mut self, chunk: &[u8]) -> Result<(), IntakeError> {
        let checked = match self {
            Self::Update(verifier) => verifier.update(chunk),
            Self::Other(checker) => checker.update(chunk),
            Self::Rows(checker, rows) => checker.update(chunk).and_then(|()| rows.update(chunk)),
        };
        checked.map_err(|refusal| match refusal {
            Refusal::WrongLength { got, expected } => IntakeError::TooLong { declared: expected, got },
            other => IntakeError::Spoiled(other),
        })
    }

    fn finish(self) -> Result<Option<Verified>, Refusal> {
        match self {
            Self::Update(verifier) => verifier.finish().map(Some),
            Self::Other(checker) => checker.finish().map(|()| None),
            Self::Rows(checker, rows) => checker.finish().and_then(|()| rows.finish()).map(|()| None),
        }
    }
}

/// Reads encoded rows as the schema has them, and forgets them.
#[derive(Debug)]
struct RowCheck {
    schema: Arc<Schema>,
    row_bytes: usize,
    /// The beginning of a row whose rest has not come yet, and rows that wait to be looked at.
    pending: Vec<u8>,
}

impl RowCheck {
    fn new(schema: Arc<Schema>) -> Self {
        let row_bytes = Rows::new(&schema).row_bytes();
        Self { schema, row_bytes, pending: Vec::new() }
    }

    fn update(&mut self, chunk: &[u8]) -> Result<(), Refusal> {
        self.pending.extend_from_slice(chunk);
        let whole = self.pending.len() - self.pending.len() % self.row_bytes;
        let mut rows = Rows::new(&self.schema);
        rows.append(&self.pending[..whole], &self.schema).map_err(|_| Refusal::Unreadable)?;
        self.pending.drain(..whole);
        Ok(())
    }

    fn finish(self) -> Result<(), Refusal> {
        if self.pending.is_empty() { Ok(()) } else { Err(Refusal::Unreadable) }
    }
}

/// A payload that is whole and sound.
#[derive(Debug)]
pub struct Payload {
    bytes: u64,
    verified: Option<Verified>,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Memory(Vec<u8>),
    /// Rows, which are never on disk in the clear.
    Secret(Vec<u8>),
    Spooled(String),
    Sealed {
        file: Nameless,
        id: ContentId,
        key: ContentKey,
    },
}

impl Payload {
    /// A payload that is in memory.
    #[must_use]
    pub fn in_memory(bytes: Vec<u8>, verified: Option<Verified>) -> Self {
        Self { bytes: bytes.len() as u64, verified, place: Place::Memory(bytes) }
    }

    /// Rows that are in memory, and never on disk in the clear.
    #[must_use]
    pub fn secret(rows: Vec<u8>) -> Self {
        Self { bytes: rows.len() as u64, verified: None, place: Place::Secret(rows) }
    }

    /// A payload of so many bytes that is in a file of the run's directory.
    #[must_use]
    pub fn spooled(part: String, bytes: u64, verified: Option<Verified>) -> Self {
        Self { bytes, verified, place: Place::Spooled(part) }
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What lets it into the sum; none for what is not folded.
    #[must_use]
    pub fn verified(&self) -> Option<&Verified> {
        self.verified.as_ref()
    }

    /// Its norm; 0 for what is not folded.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.verified.map_or(0.0, |verified| verified.norm())
    }

    /// The file of the run's directory that it came to, if it is in one: the store gives it its name.
    #[must_use]
    pub fn part(&self) -> Option<&str> {
        if let Place::Spooled(part) = &self.place { Some(part) } else { None }
    }

    /// What is in memory of it, if all of it is and may be written down.
    #[must_use]
    pub fn memory(&self) -> Option<&[u8]> {
        if let Place::Memory(bytes) = &self.place { Some(bytes) } else { None }
    }

    /// Hands all of it to `see`, in order, in pieces. `open` finds a file of the run's directory, by the name of
    /// [`Self::part`].
    ///
    /// # Errors
    /// If it cannot be read back.
    pub fn read<R: Read>(
        &self,
        open: impl FnOnce(&str) -> io::Result<R>,
        mut see: impl FnMut(&[u8]),
    ) -> Result<(), StateError> {
        let unreadable = |error| StateError::io(Path::new("spool"), "read back from")(error);
        match &self.place {
            Place::Memory(bytes) | Place::Secret(bytes) => {
                see(bytes);
                Ok(())
            }
            Place::Spooled(part) => open(part)
                .and_then(|file| read_plain(file, &mut see))
                .map_err(|error| StateError::io(Path::new(part), "read back")(error)),
            Place::Sealed { file, id, key } => {
                file.file().and_then(|file| read_sealed(file, *id, key, &mut see)).map_err(unreadable)
            }
        }
    }

    /// All of it at once: for what is bounded to some mebibytes.
    ///
    /// # Errors
    /// If it cannot be read back.
    pub fn to_vec<R: Read>(&self, open: impl FnOnce(&str) -> io::Result<R>) -> Result<Vec<u8>, StateError> {
        let mut all = Vec::with_capacity(usize::try_from(self.bytes).unwrap_or(0));
        self.read(open, |piece| all.extend_from_slice(piece))?;
        Ok(all)
    }
}

fn read_plain(mut file: impl Read, see: &mut impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            read => see(&buffer[..read]),
        }
    }
}

fn read_sealed(mut file: &File, id: ContentId, key: &ContentKey, see: &mut impl FnMut(&[u8])) -> io::Result<()> {
    file.seek(io::SeekFrom::Start(0))?;
    let mut input = io::BufReader::with_capacity(1 << 20, file);
    let mut opener = BroadcastOpener::new(id, key);
    while !opener.is_finished() {
        let mut header = [0; BROADCAST_HEADER_BYTES];
        input.read_exact(&mut header)?;
        let parsed = BroadcastHeader::parse(&header).map_err(io::Error::other)?;
        let mut body = vec![0; parsed.record.body_bytes()];
        input.read_exact(&mut body)?;
        see(opener.open_in_place(&header, &mut body).map_err(io::Error::other)?.plaintext);
    }
    Ok(())
}

/// Where a payload is kept while it comes. Its file is made when the first bytes are written.
#[derive(Debug)]
struct Spool {
    place: SpoolPlace,
    /// What is not on disk yet: what found no room there, a sealed batch of records at most, or all of what stays in memory.
    buffer: Vec<u8>,
    /// What is.
    written: u64,
}

#[derive(Debug)]
enum SpoolPlace {
    Memory,
    Named(Option<Part>),
    Sealed { file: Option<Nameless>, id: ContentId, key: ContentKey, sealer: Box<BroadcastSealer> },
}

impl Spool {
    fn new(declared: &Declared) -> Result<Self, IntakeError> {
        let place = if declared.bytes <= PAYLOAD_AT_ONCE_BYTES_MAX {
            SpoolPlace::Memory
        } else if declared.kind == TaskKind::Rows {
            let entropy =
                |error: getrandom::Error| StateError::io(&declared.spools.rows, "draw a key for")(error.into());
            let (mut id, mut key) = (ContentId([0; 16]), ContentKey([0; 32]));
            getrandom::fill(&mut id.0).map_err(entropy)?;
            getrandom::fill(&mut key.0).map_err(entropy)?;
            let sealer = Box::new(BroadcastSealer::new(id, &key));
            SpoolPlace::Sealed { file: None, id, key, sealer }
        } else {
            SpoolPlace::Named(None)
        };
        Ok(Self { place, buffer: Vec::new(), written: 0 })
    }

    /// Goes on behind what `part` holds, which goes through `see` again.
    fn resume(
        declared: &Declared,
        part: Part,
        mut see: impl FnMut(&[u8]) -> Result<(), IntakeError>,
    ) -> Result<Self, IntakeError> {
        let path = declared.spools.run.join(&part.name);
        let read = |error| StateError::io(&path, "read back")(error);
        part.file.set_len(part.from).map_err(StateError::io(&path, "cut"))?;
        let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
        while at < part.from {
            let count = usize::try_from(part.from - at).unwrap_or(usize::MAX).min(buffer.len());
            part.file.read_exact_at(&mut buffer[..count], at).map_err(read)?;
            see(&buffer[..count])?;
            at += count as u64;
        }
        Ok(Self { written: part.from, place: SpoolPlace::Named(Some(part)), buffer: Vec::new() })
    }

    /// Takes in the next bytes. A large payload's go to its file as they are; what cannot be written waits for
    /// [`Self::flush`], which says why.
    fn push(&mut self, plaintext: &[u8], declared: &Declared) -> Result<(), IntakeError> {
        match &mut self.place {
            SpoolPlace::Named(part) if self.buffer.is_empty() => {
                let written =
                    made(part, || new_part(declared)).and_then(|part| part.file.write_all_at(plaintext, self.written));
                match written {
                    Ok(()) => self.written += plaintext.len() as u64,
                    Err(_) => self.buffer.extend_from_slice(plaintext),
                }
            }
            SpoolPlace::Memory | SpoolPlace::Named(_) => self.buffer.extend_from_slice(plaintext),
            SpoolPlace::Sealed { sealer, .. } => sealer.seal(Flag::Plain, plaintext, &mut self.buffer)?,
        }
        Ok(())
    }

    /// Nothing more comes.
    fn end(&mut self) -> Result<(), IntakeError> {
        if let SpoolPlace::Sealed { sealer, .. } = &mut self.place {
            sealer.seal(Flag::Final, &[], &mut self.buffer)?;
        }
        Ok(())
    }

    /// Writes what waits, if anything does. Where that fails for want of room, it waits on, and the same can be done again.
    fn flush(&mut self, declared: &Declared) -> Result<(), IntakeError> {
        let spools = &declared.spools;
        let (path, written) = match &mut self.place {
            SpoolPlace::Memory => return Ok(()),
            SpoolPlace::Named(Some(_)) if self.buffer.is_empty() => return Ok(()),
            SpoolPlace::Named(part) => {
                let path = spools.run.join(part.as_ref().map_or_else(|| parts_of(declared), |part| part.name.clone()));
                (
                    path,
                    made(part, || new_part(declared))
                        .and_then(|part| part.file.write_all_at(&self.buffer, self.written)),
                )
            }
            SpoolPlace::Sealed { file, .. } => {
                let written = made(file, || nameless_file(&spools.rows, declared.task))
                    .and_then(|nameless| nameless.file()?.write_all_at(&self.buffer, self.written));
                (spools.rows.clone(), written)
            }
        };
        written.map_err(|error| {
            if is_full(&error) { IntakeError::Full(path) } else { StateError::io(&path, "write to")(error).into() }
        })?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Whether what came is a survey.
    fn check_survey(&self, declared: &Declared) -> Result<(), IntakeError> {
        let mut bytes = self.buffer.clone();
        if let SpoolPlace::Named(Some(part)) = &self.place {
            let mut file = &part.file;
            let read = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
            read.map_err(StateError::io(&declared.spools.run.join(&part.name), "read back"))?;
        }
        Survey::from_bytes(&bytes).map(|_| ()).map_err(|_| Refusal::Unreadable.into())
    }

    fn finish(self, declared: &Declared) -> Result<Place, IntakeError> {
        Ok(match self.place {
            SpoolPlace::Named(Some(part)) => {
                if declared.spools.durable {
                    let path = declared.spools.run.join(&part.name);
                    part.file.sync_data().map_err(StateError::io(&path, "sync"))?;
                }
                Place::Spooled(part.name)
            }
            SpoolPlace::Sealed { file: Some(file), id, key, .. } => Place::Sealed { file, id, key },
            _ if declared.kind == TaskKind::Rows => Place::Secret(self.buffer),
            SpoolPlace::Memory | SpoolPlace::Named(None) | SpoolPlace::Sealed { file: None, .. } => {
                Place::Memory(self.buffer)
            }
        })
    }

    fn remove(self, declared: &Declared) -> Result<(), IntakeError> {
        if let SpoolPlace::Named(Some(part)) = self.place {
            let path = declared.spools.run.join(&part.name);
            match fs::remove_file(&path) {
                // The store removes what belongs to no open task.
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StateError::io(&path, "remove")(error).into());
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// What is there, or is made now.
fn made<T>(there: &mut Option<T>, make: impl FnOnce() -> io::Result<T>) -> io::Result<&mut T> {
    match there {
        Some(there) => Ok(there),
        None => Ok(there.insert(make()?)),
    }
}

/// Whether a write failed because there is no room, and may do better later.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::WriteZero)
}

// --- files ---

/// A payload's file while it comes. Whoever has it has it alone: the file is locked as long as it is open.
#[derive(Debug)]
pub struct Part {
    name: String,
    file: File,
    from: u64,
}

impl Part {
    /// Its name in the run's directory.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How much of the payload it has, in bytes: the next stream begins there.
    #[must_use]
    pub fn from(&self) -> u64 {
        self.from
    }
}

/// How the name of every part of a payload begins. Behind it stands a number.
fn part_prefix(task: TaskId, hash: Hash) -> String {
    format!("payload-{hash}-{task}.part-")
}

fn parts_of(declared: &Declared) -> String {
    part_prefix(declared.task, declared.hash) + "0"
}

/// The longest part of a payload that streams which were cut have left in `dir`, if it is worth going on behind. Parts
/// that another stream still holds are not looked at.
///
/// # Errors
/// If the directory cannot be read.
pub fn resume_from(dir: &Path, task: TaskId, hash: Hash, bytes: u64) -> io::Result<Option<Part>> {
    if bytes <= RESUME_BYTES_MIN { Ok(None) } else { longest_part(dir, &part_prefix(task, hash), bytes) }
}

fn longest_part(dir: &Path, prefix: &str, bytes: u64) -> io::Result<Option<Part>> {
    let mut longest: Option<Part> = None;
    for entry in fs::read_dir(dir)? {
        let Some(name) = entry?.file_name().to_str().filter(|name| name.starts_with(prefix)).map(str::to_owned) else {
            continue;
        };
        // One that is gone by now was not to be gone on with.
        let Ok(file) = OpenOptions::new().read(true).write(true).open(dir.join(&name)) else { continue };
        let from = whole_records(file.metadata()?.len().min(bytes - 1));
        if from > longest.as_ref().map_or(0, Part::from) && is_ours(&file)? {
            longest = Some(Part { name, file, from });
        }
    }
    Ok(longest)
}

/// So much of it as whole records fill. The last one is always sent again: a stream has one.
fn whole_records(bytes: u64) -> u64 {
    bytes - bytes % RECORD_BYTES_MAX as u64
}

/// Takes the file's lock, if nobody has it.
fn is_ours(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// A part under the first number that is free.
fn new_part(declared: &Declared) -> io::Result<Part> {
    let prefix = part_prefix(declared.task, declared.hash);
    for number in 0_u64.. {
        let name = format!("{prefix}{number}");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        match options.open(declared.spools.run.join(&name)) {
            Ok(file) if is_ours(&file)? => return Ok(Part { name, file, from: 0 }),
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// A file that is gone when its handle is. Giving back the room of a large one takes the operating system a while, for
/// which no task of the runtime waits.
#[derive(Debug)]
struct Nameless(Option<File>);

impl Nameless {
    fn file(&self) -> io::Result<&File> {
        self.0.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Drop for Nameless {
    fn drop(&mut self) {
        if let (Some(file), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn_blocking(move || drop(file));
        }
    }
}

fn nameless_file(spool: &Path, task: TaskId) -> io::Result<Nameless> {
    let mut salt = [0; 8];
    getrandom::fill(&mut salt)?;
    let path = spool.join(format!("{task}-{}", data_encoding::HEXLOWER.encode(&salt)));
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(&path)?;
    fs::remove_file(&path)?;
    Ok(Nameless(Some(file)))
}

const _: () = assert!(RECORD_BYTES_MAX + RECORD_TAG_BYTES + BROADCAST_HEADER_BYTES < 1 << 20);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use protocol::layout::to_bytes;
    use protocol::session::{Acquaintance, Initiator, Responder, Sealer, Session, StaticKey, StaticSecret};
    use std::io::Write as _;

    /// Both ends of one upload stream.
    fn stream() -> (Sealer, Opener) {
        let key = |byte: u8| StaticSecret::from([byte; 32]);
        let (worker, coordinator): (StaticKey, StaticKey) = (key(1).into(), key(2).into());
        let pinned = Acquaintance::new(&worker, coordinator.public()).unwrap();
        let (initiator, first) = Initiator::start(b"", &worker, key(3), &pinned, b"").unwrap();
        let (responder, _) = Responder::read(b"", &coordinator, None, &first).unwrap();
        let (second, ours) = responder.reply(key(4), b"").unwrap();
        let (_, theirs) = initiator.finish(&second).unwrap();
        let (mut near, ..) = Session::begin(theirs);
        let (mut far, ..) = Session::begin(ours);
        let (number, sealer) = near.open_stream().unwrap();
        (sealer, far.accept_stream(number).unwrap())
    }

    fn records(sealer: &mut Sealer, payload: &[u8]) -> Vec<BytesMut> {
        let mut chunks = payload.chunks(RECORD_BYTES_MAX).peekable();
        let mut records = Vec::new();
        while let Some(chunk) = chunks.next() {
            let flag = if chunks.peek().is_none() { Flag::Final } else { Flag::Plain };
            let mut record = Vec::new();
            sealer.seal(flag, chunk, &mut record).unwrap();
            records.push(BytesMut::from(&record[..]));
        }
        records
    }

    /// A run's directory, and one for rows.
    struct Home {
        _directory: tempfile::TempDir,
        spools: Arc<Spools>,
    }

    impl Home {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let place = |name: &str| {
                let path = directory.path().join(name);
                fs::create_dir(&path).unwrap();
                path
            };
            let spools = Arc::new(Spools { run: place("run"), rows: place("rows"), durable: true });
            Self { _directory: directory, spools }
        }

        fn declared(&self, kind: TaskKind, sent: &[u8]) -> Declared {
            let (hash, bytes) = (Hash::of(sent), sent.len() as u64);
            let (ring, spools) = (Ring::weighted(), self.spools.clone());
            Declared { task: TaskId(1), kind, hash, bytes, ring, schema: None, spools }
        }

        /// The names in the directory of the run, and in that of rows.
        fn names(&self) -> Vec<String> {
            let of = |path: &Path| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name());
            let names = of(&self.spools.run).chain(of(&self.spools.rows));
            names.map(|name| name.into_string().unwrap()).collect()
        }

        fn read(&self, payload: &Payload) -> Vec<u8> {
            payload.to_vec(|part| File::open(self.spools.run.join(part))).unwrap()
        }
    }

    struct Taken {
        home: Home,
        payload: Result<Payload, IntakeError>,
    }

    fn take(kind: TaskKind, sent: &[u8], change: impl FnOnce(&mut Declared)) -> Taken {
        let home = Home::new();
        let (mut sealer, opener) = stream();
        let mut declared = home.declared(kind, sent);
        change(&mut declared);
        let mut intake = Intake::new(opener, declared, None).unwrap();
        let taken = intake.take(&mut records(&mut sealer, sent));
        let payload = taken.and_then(|last| {
            assert!(last);
            intake.finish()
        });
        Taken { home, payload }
    }

    fn update(count: usize) -> Vec<u8> {
        to_bytes(&vec![0.25; count])
    }

    #[test]
    fn a_sound_update_comes_out_as_it_went_in_small_or_large() {
        for count in [1, 1000, 100_000] {
            let sent = update(count);
            let Taken { home, payload } = take(TaskKind::Update, &sent, |_| ());
            let payload = payload.unwrap();
            assert_eq!(home.read(&payload), sent);
            #[allow(clippy::cast_precision_loss)]
            let norm = (count as f64).sqrt() / 4.0;
            assert!((payload.norm() - norm).abs() < 1e-9 * norm);
            assert_eq!(payload.memory().is_some(), sent.len() <= 128 * 1024);
            assert_eq!(home.names(), payload.part().into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_not_sound_is_an_answer() {
        let spoiled =
            |sent: &[u8], change: fn(&mut Declared)| match take(TaskKind::Update, sent, change).payload.unwrap_err() {
                IntakeError::Spoiled(refusal) => refusal,
                other => panic!("{other}"),
            };
        assert_eq!(spoiled(&update(8), |d| d.hash = Hash([0; 32])), Refusal::WrongHash);
        assert_eq!(spoiled(&to_bytes(&[1.0, f32::NAN]), |_| ()), Refusal::NotFinite);
        assert!(matches!(spoiled(&to_bytes(&[300.0]), |_| ()), Refusal::NormTooLong { .. }));
        assert_eq!(spoiled(&update(8), |d| d.bytes = 36), Refusal::WrongLength { got: 32, expected: 36 });
    }

    #[test]
    fn what_no_honest_peer_does_is_not() {
        let longer = take(TaskKind::Update, &update(8), |d| d.bytes = 28).payload.unwrap_err();
        assert!(matches!(longer, IntakeError::TooLong { declared: 28, .. }));

        let (mut sealer, opener) = stream();
        let sent = update(8);
        let mut all = records(&mut sealer, &sent);
        all.push(all[0].clone());
        let home = Home::new();
        let declared = Declared { bytes: 64, ..home.declared(TaskKind::Update, &sent) };
        let mut intake = Intake::new(opener, declared, None).unwrap();
        assert!(matches!(intake.take(&mut all), Err(IntakeError::AfterLast)));
    }

    #[test]
    fn a_changed_record_does_not_open() {
        let (mut sealer, opener) = stream();
        let sent = update(8);
        let mut all = records(&mut sealer, &sent);
        all[0][20] ^= 1;
        let declared = Home::new().declared(TaskKind::Update, &sent);
        let mut intake = Intake::new(opener, declared, None).unwrap();
        assert!(matches!(intake.take(&mut all), Err(IntakeError::Record(_))));
    }

    #[test]
    fn rows_are_never_on_disk_in_the_clear() {
        let canary = b"the canary of row number seven";
        let sent: Vec<u8> = canary.iter().copied().cycle().take(300_000).collect();
        for kind in [TaskKind::Rows, TaskKind::Evaluation] {
            let Taken { home, payload } = take(kind, &sent, |_| ());
            let payload = payload.unwrap();
            assert_eq!(home.read(&payload), sent);
            let mut file = match &payload.place {
                Place::Sealed { file, .. } => file.file().unwrap().try_clone().unwrap(),
                Place::Spooled(part) => File::open(home.spools.run.join(part)).unwrap(),
                Place::Memory(_) | Place::Secret(_) => panic!("not spooled"),
            };
            let mut stored = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut stored).unwrap();
            let seen = stored.windows(canary.len()).any(|window| window == canary);
            assert_eq!(seen, kind != TaskKind::Rows, "the search finds what is not sealed");
            assert_eq!(home.names().is_empty(), kind == TaskKind::Rows, "of rows not even a name is there");
        }
    }

    #[test]
    fn a_survey_that_is_none_is_refused_when_it_comes() {
        for sent in [&b"not a survey"[..], &[7; 200_000]] {
            let Taken { home, payload } = take(TaskKind::Survey, sent, |_| ());
            assert!(matches!(payload.unwrap_err(), IntakeError::Spoiled(Refusal::Unreadable)));
            assert!(home.names().is_empty());
        }
    }

    #[test]
    fn a_large_payload_is_in_a_file_of_its_owners_until_it_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let sent = update(100_000);
        let Taken { home, payload } = take(TaskKind::Update, &sent, |_| ());
        let part = payload.unwrap().part().unwrap().to_owned();
        assert_eq!(part, format!("payload-{}-0.1.part-0", Hash::of(&sent)));
        let mode = fs::metadata(home.spools.run.join(&part)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let refused = take(TaskKind::Update, &sent, |declared| declared.hash = Hash([0; 32]));
        assert!(matches!(refused.payload, Err(IntakeError::Spoiled(Refusal::WrongHash))));
        assert!(refused.home.names().is_empty());
    }

    #[test]
    fn a_cut_upload_goes_on_where_it_stopped() {
        let home = Home::new();
        let sent = update(100_000);
        let declared = home.declared(TaskKind::Update, &sent);
        let (mut sealer, opener) = stream();
        let mut cut = Intake::new(opener, declared.clone(), None).unwrap();
        assert!(!cut.take(&mut records(&mut sealer, &sent)[..3]).unwrap());
        let prefix = part_prefix(declared.task, declared.hash);
        assert!(longest_part(&home.spools.run, &prefix, declared.bytes).unwrap().is_none(), "its stream lives");
        drop(cut);
        let path = home.spools.run.join(home.names().pop().unwrap());
        // A write that the end of the process cut in two.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(&[1, 2, 3]).unwrap();

        let part = longest_part(&home.spools.run, &prefix, declared.bytes).unwrap().unwrap();
        let from = usize::try_from(part.from()).unwrap();
        assert_eq!(from, 3 * RECORD_BYTES_MAX);
        let (mut sealer, opener) = stream();
        let mut intake = Intake::new(opener, declared, Some(part)).unwrap();
        assert!(intake.take(&mut records(&mut sealer, &sent[from..])).unwrap());
        let payload = intake.finish().unwrap();
        assert_eq!(payload.verified().unwrap().hash(), Hash::of(&sent));
        assert_eq!(home.read(&payload), sent);
    }

    #[test]
    fn what_was_left_of_an_upload_and_is_damaged_is_not_held_against_its_worker() {
        let home = Home::new();
        let sent = update(100_000);
        let declared = home.declared(TaskKind::Update, &sent);
        let name = parts_of(&declared);
        fs::write(home.spools.run.join(&name), vec![0; RECORD_BYTES_MAX]).unwrap();
        let prefix = part_prefix(declared.task, declared.hash);
        let part = longest_part(&home.spools.run, &prefix, declared.bytes).unwrap().unwrap();
        let (mut sealer, opener) = stream();
        let mut intake = Intake::new(opener, declared, Some(part)).unwrap();
        intake.take(&mut records(&mut sealer, &sent[RECORD_BYTES_MAX..])).unwrap();
        assert!(matches!(intake.finish(), Err(IntakeError::Remains)));
        assert!(home.names().is_empty(), "the next stream begins anew");
    }

    #[test]
    fn only_a_large_payload_resumes_and_only_from_a_part_that_no_stream_holds() {
        let home = Home::new();
        let (task, hash, bytes) = (TaskId(1), Hash([1; 32]), RESUME_BYTES_MIN + 8);
        let run = &home.spools.run;
        let make = |name: String, bytes: u64| File::create(run.join(name)).unwrap().set_len(bytes).unwrap();
        make(part_prefix(task, hash) + "0", 70_000);
        make(part_prefix(task, hash) + "4", 200_000);
        make(part_prefix(TaskId(2), hash) + "0", 400_000);
        let find = |bytes| resume_from(run, task, hash, bytes).unwrap();
        assert!(find(RESUME_BYTES_MIN).is_none());
        let longest = find(bytes).unwrap();
        assert_eq!((longest.name(), longest.from()), (&*(part_prefix(task, hash) + "4"), 196_608));
        let second = find(bytes).unwrap();
        assert_eq!((second.name(), second.from()), (&*(part_prefix(task, hash) + "0"), 65_536));
        assert!(find(bytes).is_none());
        let declared = Declared { hash, bytes, ..home.declared(TaskKind::Update, &[]) };
        assert_eq!(new_part(&declared).unwrap().name(), part_prefix(task, hash) + "1");
        drop(longest);
        // All of it is there, and no verdict: the last record comes again.
        make(part_prefix(task, hash) + "4", bytes);
        assert_eq!(find(bytes).unwrap().from(), RESUME_BYTES_MIN);
        make(part_prefix(task, hash) + "4", bytes - 8);
        assert_eq!(find(bytes).unwrap().from(), RESUME_BYTES_MIN);
    }

    #[test]
    fn a_full_disk_loses_nothing_of_what_came() {
        let home = Home::new();
        let sent = update(100_000);
        let (mut sealer, opener) = stream();
        let mut intake = Intake::new(opener, home.declared(TaskKind::Update, &sent), None).unwrap();
        let mut sent_records = records(&mut sealer, &sent);
        let (first, rest) = sent_records.split_at_mut(2);
        assert!(!intake.take(first).unwrap());
        let SpoolPlace::Named(Some(part)) = &mut intake.spool.place else { panic!("not spooled") };
        let full = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let file = std::mem::replace(&mut part.file, full);
        assert!(matches!(intake.take(rest), Err(IntakeError::Full(_))));
        assert!(matches!(intake.retry(), Err(IntakeError::Full(_))));
        let SpoolPlace::Named(Some(part)) = &mut intake.spool.place else { panic!("not spooled") };
        part.file = file;
        assert!(intake.retry().unwrap());
        assert_eq!(home.read(&intake.finish().unwrap()), sent);
    }
}
