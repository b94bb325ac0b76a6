//! Receipts: the coordinator's signed word that an update is in the model, kept so that anybody can verify them later.
//!
//! One log a run, one line a receipt, in hex: the coordinator's Ed25519 key, the signature, the postcard of the receipt.
//! A line is written at once and synced soon after, off the loop: the update is safe with the coordinator, and only a
//! power failure here can cost the last lines of its proof.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use protocol::ids::{Hash, RunId};
use protocol::messages::{DecodeError, Receipt, Signed, decode};
use protocol::session::sign::{PublicKey, RECEIPT_CONTEXT, SignatureError};

use crate::files::{self, FileError};

/// The longest line of a log, in bytes: a key, a signature and a receipt in hex have fewer than 500.
const LINE_BYTES_MAX: u64 = 1024;

/// Lines that wait for a disk that takes none, in bytes: some ten thousand receipts.
const WAITING_BYTES_MAX: usize = 4 << 20;

/// Why a receipt is worth nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiptError {
    /// The signature has another length than Ed25519's.
    #[error("the receipt's signature has {got} bytes, expected 64")]
    Length {
        /// How many.
        got: usize,
    },
    /// The signature does not verify.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// What was signed is no receipt.
    #[error(transparent)]
    Unreadable(#[from] DecodeError),
    /// A line of a log is not three hex fields.
    #[error("not a line of receipts: expected key, signature and receipt in hex")]
    Line,
}

/// Verifies a receipt and reads it.
///
/// # Errors
/// If it was not signed by the holder of `coordinator`, or is no receipt.
pub fn open(coordinator: &PublicKey, signed: &Signed) -> Result<Receipt, ReceiptError> {
    let length = |_| ReceiptError::Length { got: signed.signature.len() };
    let signature: &[u8; 64] = signed.signature.as_slice().try_into().map_err(length)?;
    coordinator.verify(RECEIPT_CONTEXT, &signed.bytes, signature)?;
    Ok(decode(&signed.bytes)?)
}

/// Verifies one line of a log, with nothing but the coordinator's key that stands in it.
///
/// # Errors
/// If it is not a line of a log, or does not verify.
pub fn open_line(line: &str) -> Result<([u8; 32], Receipt), ReceiptError> {
    let mut fields = line.split_ascii_whitespace().map(|field| HEXLOWER.decode(field.as_bytes()).ok());
    let mut next = || fields.next().flatten().ok_or(ReceiptError::Line);
    let coordinator = <[u8; 32]>::try_from(next()?).map_err(|_| ReceiptError::Line)?;
    let signed = Signed { signature: next()?, bytes: next()? };
    Ok((coordinator, open(&PublicKey::read(&coordinator)?, &signed)?))
}

/// Why a log of receipts does not stand.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// It cannot be read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The log.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// One of its lines does not verify.
    #[error("{}:{line}: the receipt does not verify", path.display())]
    Line {
        /// The log.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        source: ReceiptError,
    },
    /// Its lines are signed by different keys, or not by the one that was named.
    #[error("{}:{line}: signed by {got}, expected {expected}", path.display())]
    OtherKey {
        /// The log.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// The line's key, in hex.
        got: String,
        /// Of the line before, or the one that was named.
        expected: String,
    },
}

/// Verifies a whole log, offline, and tells each receipt to `each`.
///
/// All lines must be signed by `coordinator`, or, if it is not named, by one key; that key is what comes back.
///
/// # Errors
/// The first line that does not stand.
pub fn verify_log(
    path: &Path,
    mut coordinator: Option<[u8; 32]>,
    mut each: impl FnMut(&Receipt),
) -> Result<Option<[u8; 32]>, LogError> {
    let path = path.to_owned();
    let file = File::open(&path).map_err(|source| LogError::Read { path: path.clone(), source })?;
    for (text, line) in BufReader::new(file).lines().zip(1..) {
        let text = text.map_err(|source| LogError::Read { path: path.clone(), source })?;
        let (key, receipt) = open_line(&text).map_err(|source| LogError::Line { path: path.clone(), line, source })?;
        let expected = *coordinator.get_or_insert(key);
        if key != expected {
            let (got, expected) = (HEXLOWER.encode(&key), HEXLOWER.encode(&expected));
            return Err(LogError::OtherKey { path, line, got, expected });
        }
        each(&receipt);
    }
    Ok(coordinator)
}

/// The receipts of one run. A disk that takes no line now is asked again with the next.
#[derive(Debug)]
pub(crate) struct ReceiptLog {
    directory: PathBuf,
    run: RunId,
    open: Option<OpenLog>,
    /// Those that were said in this run, by the hash of what was signed.
    known: BTreeSet<Hash>,
    /// Lines that are not in the file.
    waiting: String,
}

/// The file behind a log.
#[derive(Debug)]
struct OpenLog {
    path: PathBuf,
    file: Arc<File>,
    /// The length of its whole lines.
    bytes: u64,
    /// Something stands behind them that could not be cut off.
    is_torn: bool,
}

impl ReceiptLog {
    /// The run's log in `directory`, which is begun with the first receipt.
    pub(crate) fn new(directory: PathBuf, run: RunId) -> Self {
        let known = known(&path_of(&directory, run));
        Self { directory, run, open: None, known, waiting: String::new() }
    }

    /// Whether it is of this run.
    pub(crate) fn is_of(&self, run: RunId) -> bool {
        self.run == run
    }

    /// Takes in one receipt; whether it is new. Many come again after a reconnect.
    pub(crate) fn add(&mut self, coordinator: &[u8; 32], signed: &Signed) -> bool {
        let new = self.known.insert(Hash::of(&signed.bytes));
        if new && self.waiting.len() < WAITING_BYTES_MAX {
            let hex = |bytes: &[u8]| HEXLOWER.encode(bytes);
            self.waiting += &format!("{} {} {}\n", hex(coordinator), hex(&signed.signature), hex(&signed.bytes));
        }
        new
    }

    /// Writes what is not in the file yet; gives the file if there was something.
    pub(crate) fn write(&mut self) -> Result<Option<Arc<File>>, FileError> {
        if self.waiting.is_empty() {
            return Ok(None);
        }
        let log = match &mut self.open {
            Some(log) => log,
            none => none.insert(OpenLog::open(&self.directory, self.run)?),
        };
        log.append(self.waiting.as_bytes())?;
        self.waiting.clear();
        Ok(Some(Arc::clone(&log.file)))
    }
}

impl OpenLog {
    fn open(directory: &Path, run: RunId) -> Result<Self, FileError> {
        let path = path_of(directory, run);
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600);
        let file = options.open(&path).map_err(|e| FileError::new(&path, "open", e))?;
        let bytes = mend(&file).map_err(|e| FileError::new(&path, "mend", e))?;
        files::sync_directory(directory)?;
        Ok(Self { path, file: Arc::new(file), bytes, is_torn: true })
    }

    /// Appends all of it or nothing.
    fn append(&mut self, lines: &[u8]) -> Result<(), FileError> {
        let mut file = &*self.file;
        let cut = if self.is_torn { file.set_len(self.bytes) } else { Ok(()) };
        if let Err(error) = cut.and_then(|()| file.write_all(lines)) {
            // What a full disk took of it; if even that fails, the next line cuts it off.
            self.is_torn = file.set_len(self.bytes).is_err();
            return Err(FileError::new(&self.path, "write", error));
        }
        self.is_torn = false;
        self.bytes += lines.len() as u64;
        Ok(())
    }
}

fn path_of(directory: &Path, run: RunId) -> PathBuf {
    directory.join(format!("{run}.log"))
}

/// The receipts that a log holds, by the hash of what was signed. A log that cannot be read holds none.
fn known(path: &Path) -> BTreeSet<Hash> {
    let Ok(file) = File::open(path) else { return BTreeSet::new() };
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    lines.filter_map(|line| Some(Hash::of(&HEXLOWER.decode(line.rsplit(' ').next()?.as_bytes()).ok()?))).collect()
}

/// Cuts off a last line that a crash left half written; the length of what is left.
fn mend(mut file: &File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(LINE_BYTES_MAX);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(from))?;
    file.read_to_end(&mut tail)?;
    let half = tail.iter().rev().take_while(|&&byte| byte != b'\n').count() as u64;
    if half > 0 {
        file.set_len(length - half)?;
    }
    Ok(length - half)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use ed25519_dalek::SigningKey;
    use protocol::ids::{TaskId, WorkerId};
    use protocol::messages::encode;
    use protocol::session::sign::sign;

    use super::*;

    const RUN: RunId = RunId([5; 16]);

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[7; 32])
    }

    fn receipt(round: u32) -> Receipt {
        let (worker, hash) = (WorkerId([1; 16]), Hash([2; 32]));
        Receipt { run: RUN, worker, task: TaskId::new(1, round), hash, round, model_hash: Hash([3; 32]) }
    }

    fn signed(round: u32) -> Signed {
        let bytes = encode(&receipt(round));
        let signature = sign(RECEIPT_CONTEXT, &key(), &bytes).to_vec();
        Signed { bytes, signature }
    }

    /// A process gets a receipt; whether it is new.
    fn add(directory: &Path, round: u32) -> bool {
        let mut log = ReceiptLog::new(directory.to_owned(), RUN);
        let new = log.add(&key().verifying_key().to_bytes(), &signed(round));
        assert_eq!(log.write().unwrap().is_some(), new);
        new
    }

    #[test]
    fn a_receipt_that_comes_again_stands_in_the_log_once() {
        let directory = tempfile::tempdir().unwrap();
        let rounds = [1, 2, 1, 2, 3, 3].map(|round| add(directory.path(), round));
        assert_eq!(rounds, [true, true, false, false, true, false]);
        let log = fs::read_to_string(directory.path().join(format!("{RUN}.log"))).unwrap();
        assert_eq!(log.lines().count(), 3);
    }

    #[test]
    fn what_the_disk_did_not_take_is_written_with_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let (there, path) = (directory.path().join("receipts"), directory.path().join(format!("receipts/{RUN}.log")));
        let public = key().verifying_key().to_bytes();
        let mut log = ReceiptLog::new(there.clone(), RUN);
        log.add(&public, &signed(1));
        assert!(log.write().is_err());
        fs::create_dir(&there).unwrap();
        log.add(&public, &signed(2));
        log.write().unwrap();
        // A full disk takes half a line, and lets nobody cut it off.
        log.open.as_mut().unwrap().is_torn = true;
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"0123").unwrap();
        log.add(&public, &signed(3));
        log.write().unwrap();
        let mut rounds = Vec::new();
        verify_log(&path, None, |receipt| rounds.push(receipt.round)).unwrap();
        assert_eq!(rounds, [1, 2, 3]);
    }

    #[test]
    fn a_log_can_be_verified_offline_line_by_line() {
        let directory = tempfile::tempdir().unwrap();
        let public = key().verifying_key().to_bytes();
        for round in 1..=3 {
            add(directory.path(), round);
        }
        let path = directory.path().join(format!("{RUN}.log"));
        let mut read = Vec::new();
        assert_eq!(verify_log(&path, None, |receipt| read.push(*receipt)).unwrap(), Some(public));
        assert_eq!(read, [1, 2, 3].map(receipt));
        let other = verify_log(&path, Some([1; 32]), |_| ()).unwrap_err();
        assert!(matches!(other, LogError::OtherKey { line: 1, .. }), "{other}");
        let log = fs::read_to_string(&path).unwrap();
        let last = if log.trim_end().ends_with('0') { "1\n" } else { "0\n" };
        fs::write(&path, format!("{}{last}", &log[..log.len() - 2])).unwrap();
        let forged = verify_log(&path, None, |_| ()).unwrap_err();
        assert!(matches!(forged, LogError::Line { line: 3, .. }), "{forged}");
    }

    #[test]
    fn a_half_written_line_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(format!("{RUN}.log"));
        fs::write(&path, "0123").unwrap();
        add(directory.path(), 1);
        assert!(open_line(fs::read_to_string(&path).unwrap().trim()).is_ok());
    }

    #[test]
    fn a_changed_or_foreign_receipt_is_refused() {
        let public = |key: SigningKey| PublicKey::read(key.verifying_key().as_bytes()).unwrap();
        let mut changed = signed(1);
        changed.bytes[0] ^= 1;
        assert_eq!(open(&public(key()), &changed), Err(ReceiptError::Signature(SignatureError::Mismatch)));
        assert!(open(&public(SigningKey::from_bytes(&[8; 32])), &signed(1)).is_err());
        let short = Signed { signature: vec![0; 63], ..signed(1) };
        assert_eq!(open(&public(key()), &short), Err(ReceiptError::Length { got: 63 }));
        assert_eq!(open_line("zz 00"), Err(ReceiptError::Line));
    }
}
