//! The coordinator's state directory: made, known again, and held by one process.
//!
//! ```text
//! DIR/format            whose directory it is, and in which version
//! DIR/lock              held by a live coordinator, with its process id
//! DIR/ca.key ca.der     the certificate authority
//! DIR/session.key       X25519: what invitations pin
//! DIR/signing.key       Ed25519: the server certificate and the receipts
//! DIR/quic.key          stateless resets and connection ids, so that a restart ends old connections at once
//! DIR/registry-journal-* workers and invitations
//! DIR/starts            how often it was started: the high half of every task id
//! DIR/join              the invitation for this machine
//! DIR/control.sock      for `coordinator invite`, `workers`, `revoke`, `status`, `abort`
//! DIR/runs/<id>/        plan, journal, models and payloads of each run
//! DIR/model/            the newest finished model
//! ```
//!
//! A file is written aside, synced, renamed, and its directory synced: a crash leaves the old one or the new one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// The version of the directory that this build reads and writes.
pub const FORMAT_VERSION: u32 = 2;

const FORMAT_FILE: &str = "format";
const FORMAT_PREFIX: &str = "tributary coordinator ";
const LOCK_FILE: &str = "lock";

/// The longest small file that is read whole, in bytes.
const SMALL_FILE_BYTES_MAX: u64 = 64 << 20;

/// A state directory that this process holds.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Held as long as the file is open.
    _lock: File,
}

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The operating system refused.
    #[error("{}: cannot {verb}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done.
        verb: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// It may not be written.
    #[error("{}: state directory is not writable; give another with --state, or make it yours", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
    },
    /// There is no room.
    #[error("{}: the disk is full; make room and start again: what was committed is kept", path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// The operating system has room for less in the address of a socket.
    #[error("{}: too long a path for a socket ({} bytes, about 100 are possible); give a shorter --state", path.display(), path.as_os_str().len())]
    LongForSocket {
        /// The socket.
        path: PathBuf,
    },
    /// It, or what it should be in, is a file.
    #[error("{}: not a directory; give another with --state", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Something else lives there.
    #[error("{}: not a coordinator's state directory ({got}); give an empty or new one with --state", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What is there.
        got: String,
    },
    /// A newer build wrote it.
    #[error("{}: state of version {got}, this program reads version {FORMAT_VERSION}; update it, or give another --state", path.display())]
    Newer {
        /// The directory.
        path: PathBuf,
        /// Its version.
        got: u32,
    },
    /// An older build wrote it.
    #[error("{}: state of version {got}, this program reads version {FORMAT_VERSION}; go on with the program that wrote it, or give another --state", path.display())]
    Older {
        /// The directory.
        path: PathBuf,
        /// Its version.
        got: u32,
    },
    /// Another process holds it.
    #[error("{}: in use by another coordinator, process {holder}; stop that one or give another --state", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The process that holds it, as it says.
        holder: String,
    },
    /// A file in it holds something else than it should.
    #[error("{}: damaged: {reason}; restore it from a backup of the whole state directory", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl StateError {
    /// Wraps what the operating system said about `path`.
    pub(crate) fn io(path: &Path, verb: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::NotWritable { path },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path },
            _ => Self::Io { path, verb, source },
        }
    }

    pub(crate) fn damaged(path: &Path, reason: impl ToString) -> Self {
        Self::Damaged { path: path.to_owned(), reason: reason.to_string() }
    }
}

impl StateDir {
    /// Takes hold of the directory, and makes it if it is not there.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        make_private_dir(path)?;
        // Decided before anything is written there: a foreign directory stays as it is.
        let fresh = check_format(path)?;
        let lock = take_lock(path)?;
        if fresh {
            let format = format!("{FORMAT_PREFIX}{FORMAT_VERSION}\n");
            write_durably(&path.join(FORMAT_FILE), format.as_bytes())?;
        }
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Counts this start. The count is durable when this returns: no task id of it was used before.
    ///
    /// # Errors
    /// If the count cannot be read or written, or is used up.
    pub fn count_start(&self) -> Result<u32, StateError> {
        let path = self.file("starts");
        let before = match read_small(&path)? {
            None => 0,
            Some(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                text.trim().parse::<u32>().map_err(|_| StateError::damaged(&path, format!("{text:?} is no count")))?
            }
        };
        let start = before.checked_add(1).ok_or_else(|| StateError::damaged(&path, "the count is used up"))?;
        write_durably(&path, format!("{start}\n").as_bytes())?;
        Ok(start)
    }

    /// The 64 bytes of `name`, made from the operating system's entropy at the first start.
    ///
    /// # Errors
    /// If they cannot be read, made or written.
    pub fn secret_64(&self, name: &str) -> Result<zeroize::Zeroizing<[u8; 64]>, StateError> {
        let path = self.file(name);
        let mut secret = zeroize::Zeroizing::new([0; 64]);
        if let Some(bytes) = read_small(&path)? {
            let bytes = zeroize::Zeroizing::new(bytes);
            if bytes.len() != secret.len() {
                return Err(StateError::damaged(&path, format!("{} bytes, expected 64", bytes.len())));
            }
            secret.copy_from_slice(&bytes);
            return Ok(secret);
        }
        getrandom::fill(secret.as_mut()).map_err(|e| StateError::io(&path, "draw entropy for")(e.into()))?;
        write_durably(&path, secret.as_ref())?;
        Ok(secret)
    }
}

/// Makes the directory (mode 0700), its parents too, unless it is there.
pub(crate) fn make_private_dir(path: &Path) -> Result<(), StateError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            StateError::NotADirectory { path: path.to_owned() }
        }
        _ => StateError::io(path, "create")(error),
    })
}

/// Whether the directory is fresh; an error if it is not ours.
pub(crate) fn check_format(path: &Path) -> Result<bool, StateError> {
    let not_ours = |got: String| StateError::NotOurs { path: path.to_owned(), got };
    let Some(format) = read_small(&path.join(FORMAT_FILE))? else {
        return match first_foreign_entry(path)? {
            Some(name) => Err(not_ours(format!("it holds {name:?} and no file \"format\""))),
            None => Ok(true),
        };
    };
    let text = String::from_utf8_lossy(&format);
    let version = text.trim().strip_prefix(FORMAT_PREFIX).and_then(|version| version.parse::<u32>().ok());
    match version {
        Some(FORMAT_VERSION) => Ok(false),
        Some(got) if got > FORMAT_VERSION => Err(StateError::Newer { path: path.to_owned(), got }),
        Some(got) if got > 0 => Err(StateError::Older { path: path.to_owned(), got }),
        _ => Err(not_ours(format!("its format is {:?}", text.trim().chars().take(60).collect::<String>()))),
    }
}

/// The first entry that an interrupted first start of ours does not leave.
fn first_foreign_entry(path: &Path) -> Result<Option<String>, StateError> {
    for entry in fs::read_dir(path).map_err(StateError::io(path, "list"))? {
        let name = entry.map_err(StateError::io(path, "list"))?.file_name().to_string_lossy().into_owned();
        if name != LOCK_FILE && name != format!("{FORMAT_FILE}.aside") {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn take_lock(path: &Path) -> Result<File, StateError> {
    let lock_path = path.join(LOCK_FILE);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut lock = options.open(&lock_path).map_err(StateError::io(path, "write to"))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Another holds it in any case; its number is a courtesy.
            let _ = lock.take(32).read_to_string(&mut holder);
            let holder = if holder.trim().is_empty() { "unknown" } else { holder.trim() }.to_owned();
            return Err(StateError::Locked { path: path.to_owned(), holder });
        }
        Err(fs::TryLockError::Error(source)) => return Err(StateError::io(&lock_path, "lock")(source)),
    }
    lock.set_len(0).map_err(StateError::io(&lock_path, "write"))?;
    lock.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(StateError::io(&lock_path, "write"))?;
    Ok(lock)
}

/// The whole of a small file, or `None` if there is none.
pub(crate) fn read_small(path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StateError::Io { path: path.to_owned(), verb: "open", source }),
    };
    let mut bytes = Vec::new();
    file.take(SMALL_FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(StateError::io(path, "read"))?;
    if bytes.len() as u64 > SMALL_FILE_BYTES_MAX {
        return Err(StateError::damaged(path, format!("longer than {SMALL_FILE_BYTES_MAX} bytes")));
    }
    Ok(Some(bytes))
}

/// Writes a file (mode 0600) that is durable, and whole or not there, when this returns.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    write_durably_with(path, |file| file.write_all(bytes))
}

/// As [`write_durably`], with the content streamed by `write`.
pub(crate) fn write_durably_with(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), StateError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".aside");
    let aside = PathBuf::from(aside);
    // What a crash left behind may have any mode: it is made anew, never reused.
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(StateError::io(&aside, "replace")(error)),
        _ => {}
    }
    let moved = write_aside(&aside, path, write);
    if moved.is_err() {
        // Half a file only takes room, of which there may be none; the error that matters is the one before.
        let _ = fs::remove_file(&aside);
    }
    moved?;
    sync_parent(path)
}

fn write_aside(aside: &Path, path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), StateError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(aside).map_err(StateError::io(path, "create"))?;
    write(&mut file).map_err(StateError::io(path, "write"))?;
    file.sync_all().map_err(StateError::io(path, "sync"))?;
    fs::rename(aside, path).map_err(StateError::io(path, "rename to"))
}

/// Makes what was created in, renamed in or removed from the directory of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> Result<(), StateError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(parent).map_err(StateError::io(parent, "open"))?;
    directory.sync_all().map_err(StateError::io(parent, "sync"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_new_directory_is_private_and_known_again() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a/b/state");
        drop(StateDir::open(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let state = StateDir::open(&path).unwrap();
        assert_eq!((state.count_start().unwrap(), state.count_start().unwrap()), (1, 2));
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused_and_left_as_it_was() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("thesis.tex"), "x").unwrap();
        let refused = StateDir::open(home.path()).unwrap_err();
        assert!(matches!(&refused, StateError::NotOurs { got, .. } if got.contains("thesis.tex")), "{refused}");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);

        let worker = tempfile::tempdir().unwrap();
        fs::write(worker.path().join("format"), "tributary worker 1\n").unwrap();
        assert!(matches!(StateDir::open(worker.path()), Err(StateError::NotOurs { .. })));
    }

    #[test]
    fn another_version_is_refused() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("format"), "tributary coordinator 7\n").unwrap();
        assert!(matches!(StateDir::open(home.path()), Err(StateError::Newer { got: 7, .. })));
        fs::write(home.path().join("format"), "tributary coordinator 1\n").unwrap();
        assert!(matches!(StateDir::open(home.path()), Err(StateError::Older { got: 1, .. })));
    }

    #[test]
    fn a_held_directory_names_its_holder() {
        let home = tempfile::tempdir().unwrap();
        let held = StateDir::open(home.path()).unwrap();
        let refused = StateDir::open(home.path()).unwrap_err();
        let StateError::Locked { holder, .. } = &refused else { panic!("{refused}") };
        assert_eq!(*holder, std::process::id().to_string());
        drop(held);
        assert!(StateDir::open(home.path()).is_ok());
    }

    #[test]
    fn a_file_where_the_directory_should_be_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        fs::write(&path, "x").unwrap();
        assert!(StateDir::open(&path).is_err());
    }

    #[test]
    fn on_a_full_disk_the_former_file_stays_and_no_half_one() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("checkpoint");
        write_durably(&path, b"former").unwrap();
        let full = write_durably_with(&path, |file| {
            file.write_all(b"half")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        let told = full.unwrap_err().to_string();
        assert!(told.ends_with("the disk is full; make room and start again: what was committed is kept"), "{told}");
        assert_eq!(fs::read(&path).unwrap(), b"former");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn secrets_are_made_once() {
        let home = tempfile::tempdir().unwrap();
        let state = StateDir::open(home.path()).unwrap();
        let made = state.secret_64("quic.key").unwrap();
        assert_eq!(state.secret_64("quic.key").unwrap(), made);
        assert_ne!(made.as_ref(), &[0; 64]);
        fs::write(state.file("quic.key"), "short").unwrap();
        assert!(matches!(state.secret_64("quic.key"), Err(StateError::Damaged { .. })));
    }
}
