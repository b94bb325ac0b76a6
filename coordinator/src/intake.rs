//! A payload on its way in: opened, hashed, checked, measured and spooled in one pass, at most a mebibyte in memory.
//!
//! An [`Intake`] is plain blocking code that a connection's task moves to the compute pool with each batch of records.
//! What comes out is a [`Payload`]: small ones stay in memory, larger ones are in a file that has no name, so that
//! nothing is left of it when the process ends, however it ends. Encoded rows are sealed again under a key of their
//! own, which lives in memory only, before they are written: no row is ever on disk in the clear.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;
use learning::{Rows, Schema, Survey};
use protocol::ids::{ContentId, Hash, TaskId};
use protocol::limits::{PAYLOAD_AT_ONCE_BYTES_MAX, RECORD_BYTES_MAX};
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
    /// Where large payloads wait.
    pub spool: Arc<Path>,
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
    finished: bool,
}

#[derive(Debug)]
enum Check {
    Update(Box<Verifier>),
    Other(Box<Checker>),
    Rows(Box<Checker>, RowCheck),
}

impl Intake {
    /// Waits for records that `opener` opens.
    ///
    /// # Errors
    /// If there is no place to spool to.
    pub fn new(opener: Opener, declared: Declared) -> Result<Self, IntakeError> {
        let checker = || Box::new(Checker::new(declared.bytes, declared.hash));
        let check = match (declared.kind, &declared.schema) {
            (TaskKind::Update | TaskKind::Gradient | TaskKind::Partial, _) => {
                Check::Update(Box::new(Verifier::new(declared.ring, declared.bytes, declared.hash)))
            }
            (TaskKind::Rows, Some(schema)) => Check::Rows(checker(), RowCheck::new(schema.clone())),
            _ => Check::Other(checker()),
        };
        let spool = Spool::new(&declared)?;
        Ok(Self { opener, check, spool, declared, finished: false })
    }

    /// Takes in some records. Whether the last one was among them.
    ///
    /// # Errors
    /// Why nothing more is taken in.
    pub fn take(&mut self, records: &mut [BytesMut]) -> Result<bool, IntakeError> {
        for record in records {
            if self.finished {
                return Err(IntakeError::AfterLast);
            }
            // Whole records are never shorter than their header.
            let (header, body) = record.split_first_chunk_mut().ok_or(IntakeError::AfterLast)?;
            let opened = self.opener.open_in_place(header, body)?;
            self.check.update(opened.plaintext)?;
            self.spool.write(opened.plaintext)?;
            self.finished = opened.flag == Flag::Final;
        }
        Ok(self.finished)
    }

    /// Whether its verdict takes no time worth speaking of.
    #[must_use]
    pub fn is_small(&self) -> bool {
        matches!(self.check, Check::Update(_)) || self.declared.bytes <= 16 * 1024
    }

    /// The verdict.
    ///
    /// # Errors
    /// If the payload is not what its manifest says, or not sound.
    pub fn finish(self) -> Result<Payload, IntakeError> {
        let verified = self.check.finish()?;
        let payload = Payload { bytes: self.declared.bytes, verified, place: self.spool.finish()? };
        if self.declared.kind == TaskKind::Survey {
            Survey::from_bytes(&payload.to_vec()?).map_err(|_| Refusal::Unreadable)?;
        }
        Ok(payload)
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
    File(File),
    Sealed { file: File, id: ContentId, key: ContentKey },
}

impl Payload {
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

    /// Hands all of it to `see`, in order, in pieces.
    ///
    /// # Errors
    /// If it cannot be read back.
    pub fn read(&self, mut see: impl FnMut(&[u8])) -> Result<(), StateError> {
        let unreadable = |error| StateError::io(Path::new("spool"), "read back from")(error);
        match &self.place {
            Place::Memory(bytes) => {
                see(bytes);
                Ok(())
            }
            Place::File(file) => read_plain(file, &mut see).map_err(unreadable),
            Place::Sealed { file, id, key } => read_sealed(file, *id, key, &mut see).map_err(unreadable),
        }
    }

    /// A payload that is in memory already: for tests of whoever uses payloads.
    #[cfg(test)]
    pub(crate) fn of(bytes: Vec<u8>, verified: Option<Verified>) -> Self {
        Self { bytes: bytes.len() as u64, verified, place: Place::Memory(bytes) }
    }

    /// All of it at once: for what is bounded to some mebibytes.
    ///
    /// # Errors
    /// If it cannot be read back.
    pub fn to_vec(&self) -> Result<Vec<u8>, StateError> {
        let mut all = Vec::with_capacity(usize::try_from(self.bytes).unwrap_or(0));
        self.read(|piece| all.extend_from_slice(piece))?;
        Ok(all)
    }
}

fn read_plain(mut file: &File, see: &mut impl FnMut(&[u8])) -> io::Result<()> {
    file.seek(io::SeekFrom::Start(0))?;
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

/// Where a payload is kept while it comes.
#[derive(Debug)]
enum Spool {
    Memory(Vec<u8>),
    File(File),
    Sealed { file: File, id: ContentId, key: ContentKey, sealer: Box<BroadcastSealer>, buffer: Vec<u8> },
}

impl Spool {
    fn new(declared: &Declared) -> Result<Self, IntakeError> {
        if declared.bytes <= PAYLOAD_AT_ONCE_BYTES_MAX {
            return Ok(Self::Memory(Vec::new()));
        }
        let file = nameless_file(&declared.spool, declared.task)?;
        if declared.kind != TaskKind::Rows {
            return Ok(Self::File(file));
        }
        let entropy = |error: getrandom::Error| StateError::io(&declared.spool, "draw a key for")(error.into());
        let (mut id, mut key) = (ContentId([0; 16]), ContentKey([0; 32]));
        getrandom::fill(&mut id.0).map_err(entropy)?;
        getrandom::fill(&mut key.0).map_err(entropy)?;
        let sealer = Box::new(BroadcastSealer::new(id, &key));
        Ok(Self::Sealed { file, id, key, sealer, buffer: Vec::new() })
    }

    fn write(&mut self, plaintext: &[u8]) -> Result<(), IntakeError> {
        let broken = || StateError::io(Path::new("spool"), "write to");
        match self {
            Self::Memory(bytes) => bytes.extend_from_slice(plaintext),
            Self::File(file) => file.write_all(plaintext).map_err(broken())?,
            Self::Sealed { file, sealer, buffer, .. } => {
                buffer.clear();
                sealer.seal(Flag::Plain, plaintext, buffer)?;
                file.write_all(buffer).map_err(broken())?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Place, IntakeError> {
        Ok(match self {
            Self::Memory(bytes) => Place::Memory(bytes),
            Self::File(file) => Place::File(file),
            Self::Sealed { mut file, id, key, mut sealer, mut buffer } => {
                buffer.clear();
                sealer.seal(Flag::Final, &[], &mut buffer)?;
                file.write_all(&buffer).map_err(StateError::io(Path::new("spool"), "write to"))?;
                Place::Sealed { file, id, key }
            }
        })
    }
}

/// A file that is gone when the last handle is.
fn nameless_file(spool: &Path, task: TaskId) -> Result<File, StateError> {
    let mut salt = [0; 8];
    getrandom::fill(&mut salt).map_err(|error| StateError::io(spool, "draw a name in")(error.into()))?;
    let path = spool.join(format!("{task}-{}", data_encoding::HEXLOWER.encode(&salt)));
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(&path).map_err(StateError::io(&path, "create"))?;
    std::fs::remove_file(&path).map_err(StateError::io(&path, "unlink"))?;
    Ok(file)
}

const _: () = assert!(RECORD_BYTES_MAX + RECORD_TAG_BYTES + BROADCAST_HEADER_BYTES < 1 << 20);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use protocol::layout::to_bytes;
    use protocol::session::{Initiator, Responder, Sealer, Session, StaticSecret, public_key};

    /// Both ends of one upload stream.
    fn stream() -> (Sealer, Opener) {
        let key = |byte: u8| StaticSecret::from([byte; 32]);
        let (worker, coordinator) = (key(1), key(2));
        let (initiator, first) = Initiator::start(b"", &worker, key(3), &public_key(&coordinator), b"").unwrap();
        let (responder, _) = Responder::read(b"", &coordinator, &first).unwrap();
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

    struct Taken {
        _spool: tempfile::TempDir,
        payload: Result<Payload, IntakeError>,
    }

    fn take(kind: TaskKind, sent: &[u8], change: impl FnOnce(&mut Declared)) -> Taken {
        let spool = tempfile::tempdir().unwrap();
        let (mut sealer, opener) = stream();
        let mut declared = Declared {
            task: TaskId(1),
            kind,
            hash: Hash::of(sent),
            bytes: sent.len() as u64,
            ring: Ring::weighted(),
            schema: None,
            spool: spool.path().into(),
        };
        change(&mut declared);
        let mut intake = Intake::new(opener, declared).unwrap();
        assert_eq!(std::fs::read_dir(spool.path()).unwrap().count(), 0, "a spooled file has no name");
        let taken = intake.take(&mut records(&mut sealer, sent));
        let payload = taken.and_then(|last| {
            assert!(last);
            intake.finish()
        });
        Taken { _spool: spool, payload }
    }

    fn update(count: usize) -> Vec<u8> {
        to_bytes(&vec![0.25; count])
    }

    #[test]
    fn a_sound_update_comes_out_as_it_went_in_small_or_large() {
        for count in [1, 1000, 100_000] {
            let sent = update(count);
            let payload = take(TaskKind::Update, &sent, |_| ()).payload.unwrap();
            assert_eq!(payload.to_vec().unwrap(), sent);
            #[allow(clippy::cast_precision_loss)]
            let norm = (count as f64).sqrt() / 4.0;
            assert!((payload.norm() - norm).abs() < 1e-9 * norm);
            assert_eq!(matches!(payload.place, Place::Memory(_)), sent.len() <= 128 * 1024);
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
        let spool = tempfile::tempdir().unwrap();
        let declared = Declared {
            task: TaskId(1),
            kind: TaskKind::Update,
            hash: Hash::of(&sent),
            bytes: 64,
            ring: Ring::weighted(),
            schema: None,
            spool: spool.path().into(),
        };
        let mut intake = Intake::new(opener, declared).unwrap();
        assert!(matches!(intake.take(&mut all), Err(IntakeError::AfterLast)));
    }

    #[test]
    fn a_changed_record_does_not_open() {
        let (mut sealer, opener) = stream();
        let sent = update(8);
        let mut all = records(&mut sealer, &sent);
        all[0][20] ^= 1;
        let spool = tempfile::tempdir().unwrap();
        let (hash, bytes) = (Hash::of(&sent), sent.len() as u64);
        let ring = Ring::weighted();
        let spool = spool.path().into();
        let declared = Declared { task: TaskId(1), kind: TaskKind::Update, hash, bytes, ring, schema: None, spool };
        let mut intake = Intake::new(opener, declared).unwrap();
        assert!(matches!(intake.take(&mut all), Err(IntakeError::Record(_))));
    }

    #[test]
    fn rows_are_never_on_disk_in_the_clear() {
        let canary = b"the canary of row number seven";
        let sent: Vec<u8> = canary.iter().copied().cycle().take(300_000).collect();
        for kind in [TaskKind::Rows, TaskKind::Evaluation] {
            let payload = take(kind, &sent, |_| ()).payload.unwrap();
            assert_eq!(payload.to_vec().unwrap(), sent);
            let (Place::Sealed { file, .. } | Place::File(file)) = &payload.place else { panic!("not spooled") };
            let mut stored = Vec::new();
            let mut file: &File = file;
            file.seek(io::SeekFrom::Start(0)).unwrap();
            file.read_to_end(&mut stored).unwrap();
            let seen = stored.windows(canary.len()).any(|window| window == canary);
            assert_eq!(seen, kind != TaskKind::Rows, "the search finds what is not sealed");
        }
    }

    #[test]
    fn a_survey_that_is_none_is_refused_when_it_comes() {
        let refused = take(TaskKind::Survey, b"not a survey", |_| ()).payload.unwrap_err();
        assert!(matches!(refused, IntakeError::Spoiled(Refusal::Unreadable)));
    }
}
