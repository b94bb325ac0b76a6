//! Receipts: the coordinator's signed word that an update is in the model, kept so that anybody can verify them later.
//!
//! One log a run, one line a receipt, in hex: the coordinator's Ed25519 key, the signature, the postcard of the receipt.
//! A line is written at once and synced when the worker ends: the update is safe with the coordinator, and only a power
//! failure here can cost the last lines of its proof.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use protocol::ids::RunId;
use protocol::messages::{DecodeError, Receipt, Signed, decode};
use protocol::session::sign::{RECEIPT_CONTEXT, SignatureError, verify};

use crate::files::{self, FileError};

/// The longest line of a log, in bytes: a key, a signature and a receipt in hex have fewer than 500.
const LINE_BYTES_MAX: u64 = 1024;

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
pub fn open(coordinator: &[u8; 32], signed: &Signed) -> Result<Receipt, ReceiptError> {
    let length = |_| ReceiptError::Length { got: signed.signature.len() };
    let signature: &[u8; 64] = signed.signature.as_slice().try_into().map_err(length)?;
    verify(RECEIPT_CONTEXT, coordinator, &signed.bytes, signature)?;
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
    Ok((coordinator, open(&coordinator, &signed)?))
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

/// The receipts of one run.
#[derive(Debug)]
pub(crate) struct ReceiptLog {
    path: PathBuf,
    file: File,
}

impl ReceiptLog {
    /// Opens the run's log in `directory`, or begins it.
    pub(crate) fn open(directory: &Path, run: RunId) -> Result<Self, FileError> {
        let path = directory.join(format!("{run}.log"));
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| FileError::new(&path, "open", e))?;
        mend(&path).map_err(|e| FileError::new(&path, "mend", e))?;
        files::sync_directory(directory)?;
        Ok(Self { path, file })
    }

    /// Keeps one receipt.
    pub(crate) fn keep(&mut self, coordinator: &[u8; 32], signed: &Signed) -> Result<(), FileError> {
        let hex = |bytes: &[u8]| HEXLOWER.encode(bytes);
        let line = format!("{} {} {}\n", hex(coordinator), hex(&signed.signature), hex(&signed.bytes));
        self.file.write_all(line.as_bytes()).map_err(|e| FileError::new(&self.path, "write", e))
    }

    /// Makes what was kept durable.
    pub(crate) fn sync(&self) -> Result<(), FileError> {
        self.file.sync_data().map_err(|e| FileError::new(&self.path, "sync", e))
    }
}

/// Cuts off a last line that a crash left half written.
fn mend(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    let from = length.saturating_sub(LINE_BYTES_MAX);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(from))?;
    file.read_to_end(&mut tail)?;
    let half = tail.iter().rev().take_while(|&&byte| byte != b'\n').count();
    if half > 0 { file.set_len(length - half as u64) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use ed25519_dalek::SigningKey;
    use protocol::ids::{Hash, TaskId, WorkerId};
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

    #[test]
    fn a_log_can_be_verified_offline_line_by_line() {
        let directory = tempfile::tempdir().unwrap();
        let public = key().verifying_key().to_bytes();
        for round in 1..=3 {
            ReceiptLog::open(directory.path(), RUN).unwrap().keep(&public, &signed(round)).unwrap();
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
        ReceiptLog::open(directory.path(), RUN).unwrap().keep(&key().verifying_key().to_bytes(), &signed(1)).unwrap();
        assert!(open_line(fs::read_to_string(&path).unwrap().trim()).is_ok());
    }

    #[test]
    fn a_changed_or_foreign_receipt_is_refused() {
        let public = key().verifying_key().to_bytes();
        let mut changed = signed(1);
        changed.bytes[0] ^= 1;
        assert_eq!(open(&public, &changed), Err(ReceiptError::Signature(SignatureError::Mismatch)));
        let other = SigningKey::from_bytes(&[8; 32]).verifying_key().to_bytes();
        assert!(open(&other, &signed(1)).is_err());
        let short = Signed { signature: vec![0; 63], ..signed(1) };
        assert_eq!(open(&public, &short), Err(ReceiptError::Length { got: 63 }));
        assert_eq!(open_line("zz 00"), Err(ReceiptError::Line));
    }
}
