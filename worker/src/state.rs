//! A worker's state directory: whose it is, its keys, its enrolments, its receipts.
//!
//! By default it is `$XDG_STATE_HOME/tributary/worker/<name>`. A directory belongs to one data file, whose canonical
//! path it remembers, because the split in training and held-out rows and the identity in the fleet hang on it; another
//! file of the same name gets `<name>-2`. A new directory is made aside and renamed into place, so that it appears whole:
//!
//! ```text
//! format          "tributary worker state 1"
//! lock            held while a worker lives; its process id, for a person
//! data            the canonical path of the data file
//! identity.key    Ed25519, PKCS#8, 0600       session.key    X25519, the same
//! coordinators/   one enrolment a coordinator key: <hex of its X25519 key>.json
//! receipts/       one log a run: <run>.log
//! kept/           what was made and has no receipt yet: see `keeper`
//! ```

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use certs::{CertificateDer, IdentityKey, KeyFileError, SessionKey, keys};
use data_encoding::HEXLOWER;
use protocol::ids::WorkerName;
use protocol::session::{Acquaintance, HandshakeError};
use transport::{Alpn, Client, ConnectError, Credentials, TlsIdentity, Trust};

use crate::enrolments::Enrolment;
use crate::files::{self, FileError};
use crate::link::LinkError;

const FORMAT_PREFIX: &str = "tributary worker state ";
const FORMAT: u32 = 1;

/// The longest file that says something about the directory: a path of 4,096 bytes fits.
const NOTE_BYTES_MAX: u64 = 8 * 1024;

/// How many data files of one name may have a directory each.
const SAME_NAME_MAX: u32 = 1000;

/// Where the state directory is to be.
#[derive(Clone, Debug)]
pub enum StatePlace {
    /// Under this directory, in one called after the worker: `$XDG_STATE_HOME/tributary/worker`.
    Under(PathBuf),
    /// Here (`--state`).
    Here(PathBuf),
}

/// A state directory that this process holds. The lock goes with the value.
#[derive(Debug)]
pub struct State {
    root: PathBuf,
    name: WorkerName,
    _lock: File,
}

impl State {
    /// Finds or makes the directory of the worker that reads `data`, and locks it.
    ///
    /// `name` is what the user said (`--name`); without it the file's stem is asked for.
    ///
    /// # Errors
    /// If there is no such file, or the directory is not ours, of a newer version, locked, not writable, or belongs to
    /// a file that is elsewhere now.
    pub fn open(place: &StatePlace, data: &Path, name: Option<&WorkerName>) -> Result<Self, StateError> {
        let data = Owner::new(data, name)?;
        match place {
            StatePlace::Here(root) => open_here(root, &data),
            StatePlace::Under(parent) => open_under(parent, &data),
        }
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The name that this worker asks for when it enrols.
    #[must_use]
    pub fn name(&self) -> &WorkerName {
        &self.name
    }

    /// The worker's own keys. They are made at the first call, and durable when it returns.
    ///
    /// # Errors
    /// If they cannot be read or made.
    pub fn keys(&self) -> Result<Keys, StateError> {
        let identity = keys::load_or_create(&self.root.join("identity.key"))?;
        let session = keys::load_or_create(&self.root.join("session.key"))?;
        Ok(Keys { identity, session, coordinator: Mutex::default(), shown: Mutex::default() })
    }

    /// Where enrolments are kept.
    #[must_use]
    pub fn coordinators(&self) -> PathBuf {
        self.root.join("coordinators")
    }

    /// Where receipts are kept.
    #[must_use]
    pub fn receipts(&self) -> PathBuf {
        self.root.join("receipts")
    }

    /// Where what was made waits for its receipt. Made when it is needed.
    #[must_use]
    pub fn kept(&self) -> PathBuf {
        self.root.join("kept")
    }
}

/// The keys of a worker. A private one never leaves it.
#[derive(Debug)]
pub struct Keys {
    /// Of certificate and signatures.
    pub identity: IdentityKey,
    /// Of the sealed session.
    pub session: SessionKey,
    /// The coordinator that was greeted last.
    coordinator: Mutex<Option<Arc<Acquaintance>>>,
    /// What TLS was shown last, with the CA and the certificate that it is made of.
    shown: Mutex<Option<(CertificateDer<'static>, CertificateDer<'static>, Credentials)>>,
}

impl Keys {
    /// What TLS needs to connect under this enrolment.
    pub(crate) fn credentials(&self, client: &Client, enrolment: &Enrolment) -> Result<Credentials, LinkError> {
        let Enrolment { ca, certificate, .. } = enrolment;
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, _, credentials)) = shown.as_ref().filter(|shown| (&shown.0, &shown.1) == (ca, certificate)) {
            return Ok(credentials.clone());
        }
        let identity = TlsIdentity { certificate: certificate.clone(), key: self.identity.tls_key()? };
        let credentials = client.prepare(&Trust::Ca(ca.clone()), Some(&identity), Alpn::Main);
        let credentials = credentials.map_err(ConnectError::from)?;
        *shown = Some((ca.clone(), certificate.clone(), credentials.clone()));
        Ok(credentials)
    }

    /// What our session key agrees on with this key of a coordinator, which is the same whenever we come back to it.
    pub(crate) fn acquaintance(&self, coordinator: &[u8; 32]) -> Result<Arc<Acquaintance>, HandshakeError> {
        let mut kept = self.coordinator.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(kept) if kept.public() == coordinator => Ok(Arc::clone(kept)),
            _ => {
                let met = Arc::new(Acquaintance::new(self.session.session_key(), coordinator)?);
                *kept = Some(Arc::clone(&met));
                Ok(met)
            }
        }
    }
}

/// Why there is no state directory to work with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The data file is not there.
    #[error("{}: no such file", .0.display())]
    NoData(PathBuf),
    /// Its path cannot be resolved.
    #[error("{}: cannot be read", path.display())]
    Data {
        /// As it was named.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Something else is in the directory.
    #[error("{}: not a worker's state directory ({got}); give an empty or new one with --state", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What is there.
        got: String,
    },
    /// It, or what it should be in, is a file.
    #[error("{}: not a directory; give another with --state", .0.display())]
    NotADirectory(PathBuf),
    /// It may not be made or written.
    #[error("{}: state directory is not writable; give another with --state, or make it yours", .0.display())]
    NotWritable(PathBuf),
    /// Another user's.
    #[error("{}: belongs to user id {owner}, this process runs as {us}; name another directory with --state", path.display())]
    OtherUser {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who we are.
        us: u32,
    },
    /// A later version of this program wrote it.
    #[error("{}: state of version {got}, this program reads version {FORMAT}; update it, or give another --state", path.display())]
    Newer {
        /// The directory.
        path: PathBuf,
        /// Its format.
        got: u32,
    },
    /// A live process holds it.
    #[error("{}: in use by a live worker{}; stop it, or start this one under another --name", path.display(), process(.holder))]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The process id that the holder wrote.
        holder: Option<u32>,
    },
    /// Its data file is no longer where it was.
    #[error(
        "{}: is the state of the worker for {}, which is gone, and the file is now {}; if that is the same data, moved, \
         say --name {name} to go on as the same worker, else another --name to start a new one",
        path.display(), was.display(), is.display()
    )]
    Moved {
        /// The directory.
        path: PathBuf,
        /// Where the file was.
        was: PathBuf,
        /// What was named now.
        is: PathBuf,
        /// The worker's name.
        name: WorkerName,
    },
    /// It is another file's.
    #[error("{}: is the state of the worker for {}, not for {}; name another directory with --state", path.display(), of.display(), is.display())]
    OtherFile {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        of: PathBuf,
        /// What was named now.
        is: PathBuf,
    },
    /// All names are taken.
    #[error("{}: {SAME_NAME_MAX} workers are called {name} here already; choose another --name", path.display())]
    TooMany {
        /// The directory above.
        path: PathBuf,
        /// The name.
        name: WorkerName,
    },
    /// A key could not be read or made.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// A file of it could not be read or written.
    #[error("the state directory cannot be used; name another one with --state")]
    File(#[from] FileError),
}

impl StateError {
    fn not_ours(path: &Path, got: &str) -> Self {
        Self::NotOurs { path: path.to_owned(), got: got.to_owned() }
    }

    /// Why the directory itself, or one above it, cannot be had.
    fn of_directory(error: FileError) -> Self {
        match error.source.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => Self::NotADirectory(error.path),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::NotWritable(error.path),
            _ => Self::File(error),
        }
    }
}

fn process(holder: &Option<u32>) -> String {
    holder.map(|id| format!(" (process {id})")).unwrap_or_default()
}

/// Whose state is looked for.
struct Owner<'a> {
    path: PathBuf,
    name: WorkerName,
    said: Option<&'a WorkerName>,
}

impl<'a> Owner<'a> {
    fn new(data: &Path, said: Option<&'a WorkerName>) -> Result<Self, StateError> {
        let path = fs::canonicalize(data).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StateError::NoData(data.to_owned()),
            _ => StateError::Data { path: data.to_owned(), source },
        })?;
        let stem = path.file_stem().map(OsStr::to_string_lossy).unwrap_or_default();
        let name = said.cloned().unwrap_or_else(|| WorkerName::nearest(&stem));
        Ok(Self { path, name, said })
    }

    /// The name of the `count`th worker of this name, or nothing if it would be too long.
    fn numbered(&self, count: u32) -> Option<WorkerName> {
        if count == 1 { Some(self.name.clone()) } else { format!("{}-{count}", self.name).parse().ok() }
    }
}

/// What the `data` file of a directory says about the file that we were given.
enum Belongs {
    Ours,
    Others(PathBuf),
    Orphaned(PathBuf),
}

impl Belongs {
    fn read(root: &Path, owner: &Owner<'_>) -> Result<Self, StateError> {
        let Some(remembered) = files::read(&root.join("data"), NOTE_BYTES_MAX)? else {
            return Err(StateError::not_ours(root, "it holds no file \"data\""));
        };
        let remembered = PathBuf::from(OsString::from_vec(remembered));
        Ok(match remembered {
            path if path == owner.path => Self::Ours,
            path if path.exists() => Self::Others(path),
            path => Self::Orphaned(path),
        })
    }
}

fn open_here(root: &Path, owner: &Owner<'_>) -> Result<State, StateError> {
    if is_vacant(root)? {
        files::make_directory(root).map_err(StateError::of_directory)?;
        let lock = fill(root, owner)?;
        return Ok(State { root: root.to_owned(), name: owner.name.clone(), _lock: lock });
    }
    check_format(root)?;
    match Belongs::read(root, owner)? {
        Belongs::Ours => {}
        Belongs::Others(of) => {
            return Err(StateError::OtherFile { path: root.to_owned(), of, is: owner.path.clone() });
        }
        Belongs::Orphaned(was) => return adopt(root, owner, owner.name.clone(), was),
    }
    hold(root, owner.name.clone())
}

/// Looks at `<name>`, `<name>-2`, … until one is this file's or free. A file that is gone may be the one that we were
/// given, moved, so nothing is made behind its back.
fn open_under(parent: &Path, owner: &Owner<'_>) -> Result<State, StateError> {
    files::make_directory(parent).map_err(StateError::of_directory)?;
    let mut gone: Option<(PathBuf, WorkerName, PathBuf)> = None;
    for name in (1..=SAME_NAME_MAX).map_while(|count| owner.numbered(count)) {
        let root = parent.join(name.as_str());
        if !root.exists() {
            if let Some((root, name, was)) = gone {
                return adopt(&root, owner, name, was);
            }
            if let Some(state) = make(parent, &root, owner, &name)? {
                return Ok(state);
            }
        }
        check_format(&root)?;
        match Belongs::read(&root, owner)? {
            Belongs::Ours => return hold(&root, name),
            Belongs::Others(_) => {}
            Belongs::Orphaned(was) => gone = gone.or(Some((root, name, was))),
        }
    }
    Err(StateError::TooMany { path: parent.to_owned(), name: owner.name.clone() })
}

/// Takes over the directory of a file that is gone, if the user said by name that it is the same worker.
fn adopt(root: &Path, owner: &Owner<'_>, name: WorkerName, was: PathBuf) -> Result<State, StateError> {
    if owner.said.is_none() {
        return Err(StateError::Moved { path: root.to_owned(), was, is: owner.path.clone(), name });
    }
    let state = hold(root, name)?;
    files::write(&root.join("data"), owner.path.as_os_str().as_bytes())?;
    Ok(state)
}

fn hold(root: &Path, name: WorkerName) -> Result<State, StateError> {
    let lock = lock(root)?;
    Ok(State { root: root.to_owned(), name, _lock: lock })
}

/// Makes the directory aside and renames it into place; nothing if another process was faster.
fn make(parent: &Path, root: &Path, owner: &Owner<'_>, name: &WorkerName) -> Result<Option<State>, StateError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|e| FileError::new(parent, "draw a name in", io::Error::other(e)))?;
    let aside = parent.join(format!(".new-{}", HEXLOWER.encode(&random)));
    DirBuilder::new().mode(0o700).create(&aside).map_err(|e| FileError::new(&aside, "create", e))?;
    let lock = fill(&aside, owner)?;
    match fs::rename(&aside, root) {
        Ok(()) => {}
        Err(error) if is_taken(&error) => {
            fs::remove_dir_all(&aside).map_err(|e| FileError::new(&aside, "remove", e))?;
            return Ok(None);
        }
        Err(error) => return Err(FileError::new(root, "create", error).into()),
    }
    files::sync_directory(parent)?;
    Ok(Some(State { root: root.to_owned(), name: name.clone(), _lock: lock }))
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists)
}

/// Writes what a new directory holds. The format comes last: without it the directory is nobody's.
fn fill(root: &Path, owner: &Owner<'_>) -> Result<File, StateError> {
    let lock = lock(root)?;
    files::write(&root.join("data"), owner.path.as_os_str().as_bytes())?;
    files::make_directory(&root.join("coordinators"))?;
    files::make_directory(&root.join("receipts"))?;
    files::write(&root.join("format"), format!("{FORMAT_PREFIX}{FORMAT}\n").as_bytes())?;
    Ok(lock)
}

/// Whether there is nothing at `root`, or an empty directory, or one whose making was interrupted.
fn is_vacant(root: &Path) -> Result<bool, StateError> {
    if foreign_entry(root)?.is_some() {
        return Ok(false);
    }
    if root.exists() {
        check_user(root)?;
    }
    Ok(true)
}

/// The first entry of `root`, if it is there, that an interrupted making of ours does not leave.
fn foreign_entry(root: &Path) -> Result<Option<OsString>, StateError> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(|e| StateError::of_directory(FileError::new(root, "read", e)))?,
    };
    let ours = ["lock", "data", "data.aside", "coordinators", "receipts", "format.aside"];
    for entry in entries {
        let name = entry.map_err(|e| FileError::new(root, "read", e))?.file_name();
        if !ours.iter().any(|ours| name == *ours) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn check_user(root: &Path) -> Result<(), StateError> {
    let metadata = fs::metadata(root).map_err(|e| FileError::new(root, "inspect", e))?;
    let (owner, us) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner == us { Ok(()) } else { Err(StateError::OtherUser { path: root.to_owned(), owner, us }) }
}

fn check_format(root: &Path) -> Result<(), StateError> {
    check_user(root)?;
    let Some(format) = files::read(&root.join("format"), NOTE_BYTES_MAX)? else {
        let name = foreign_entry(root)?.unwrap_or_default();
        return Err(StateError::not_ours(root, &format!("it holds {name:?} and no file \"format\"")));
    };
    let text = String::from_utf8_lossy(&format);
    match text.trim_end().strip_prefix(FORMAT_PREFIX).and_then(|number| number.parse().ok()) {
        Some(FORMAT) => Ok(()),
        Some(got) if got > FORMAT => Err(StateError::Newer { path: root.to_owned(), got }),
        _ => {
            let got: String = text.trim_end().chars().take(60).collect();
            Err(StateError::not_ours(root, &format!("its format is {got:?}")))
        }
    }
}

fn lock(root: &Path) -> Result<File, StateError> {
    let path = root.join("lock");
    let failed = |verb| {
        let path = path.clone();
        move |error| FileError::new(&path, verb, error)
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed("open"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(StateError::Locked { path: root.to_owned(), holder: holder(&mut file) });
        }
        Err(TryLockError::Error(error)) => return Err(failed("lock")(error).into()),
    }
    // For a person who is told that it is locked: a full disk is no reason to stop here.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Desk {
        directory: tempfile::TempDir,
    }

    impl Desk {
        fn new() -> Self {
            Self { directory: tempfile::tempdir().unwrap() }
        }

        fn file(&self, name: &str) -> PathBuf {
            let path = self.directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "a,b\n1,2\n").unwrap();
            path
        }

        fn place(&self) -> StatePlace {
            StatePlace::Under(self.directory.path().join("state"))
        }

        fn open(&self, data: &Path, name: Option<&str>) -> Result<State, StateError> {
            State::open(&self.place(), data, name.map(|name| name.parse().unwrap()).as_ref())
        }
    }

    #[test]
    fn a_directory_is_private_and_found_again() {
        let desk = Desk::new();
        let data = desk.file("shard.csv");
        let state = desk.open(&data, None).unwrap();
        let (root, key) = (state.root().to_owned(), state.keys().unwrap().identity.public());
        assert_eq!(state.name().as_str(), "shard");
        assert_eq!(fs::metadata(&root).unwrap().permissions().mode() & 0o7777, 0o700);
        drop(state);
        let again = desk.open(&data, None).unwrap();
        assert_eq!((again.root(), again.keys().unwrap().identity.public()), (&*root, key));
    }

    #[test]
    fn another_file_of_the_same_name_gets_a_directory_of_its_own() {
        let desk = Desk::new();
        let (near, far) = (desk.file("near/shard.csv"), desk.file("far/shard.csv"));
        let _first = desk.open(&near, None).unwrap();
        let second = desk.open(&far, None).unwrap();
        assert_eq!(second.name().as_str(), "shard-2");
        drop(second);
        assert_eq!(desk.open(&far, None).unwrap().name().as_str(), "shard-2");
    }

    #[test]
    fn a_live_worker_keeps_its_directory() {
        let desk = Desk::new();
        let data = desk.file("shard.csv");
        let _first = desk.open(&data, None).unwrap();
        let refused = desk.open(&data, None).unwrap_err();
        assert!(
            matches!(refused, StateError::Locked { holder: Some(id), .. } if id == std::process::id()),
            "{refused}"
        );
    }

    #[test]
    fn a_moved_file_is_asked_about_and_goes_on_by_name() {
        let desk = Desk::new();
        let (old, new) = (desk.file("old/shard.csv"), desk.file("new/shard.csv"));
        let key = desk.open(&old, None).unwrap().keys().unwrap().identity.public();
        fs::remove_file(&old).unwrap();
        let refused = desk.open(&new, None).unwrap_err();
        assert!(
            matches!(refused, StateError::Moved { .. }) && refused.to_string().contains("--name shard"),
            "{refused}"
        );
        assert_eq!(desk.open(&new, Some("shard")).unwrap().keys().unwrap().identity.public(), key);
        assert_eq!(desk.open(&new, None).unwrap().keys().unwrap().identity.public(), key);
    }

    #[test]
    fn what_is_not_ours_is_refused_and_left_alone() {
        let desk = Desk::new();
        let data = desk.file("shard.csv");
        let here = desk.directory.path().join("here");
        let open = || State::open(&StatePlace::Here(here.clone()), &data, None);
        fs::create_dir(&here).unwrap();
        fs::write(here.join("thesis.tex"), "years of work").unwrap();
        assert!(matches!(open().unwrap_err(), StateError::NotOurs { .. }));
        fs::remove_file(here.join("thesis.tex")).unwrap();
        drop(open().unwrap());
        fs::write(here.join("format"), "tributary worker state 2\n").unwrap();
        assert!(matches!(open().unwrap_err(), StateError::Newer { got: 2, .. }));
        fs::write(here.join("format"), "something else\n").unwrap();
        assert!(matches!(open().unwrap_err(), StateError::NotOurs { .. }));
    }

    #[test]
    fn a_directory_whose_making_was_interrupted_is_made_anew() {
        let desk = Desk::new();
        let data = desk.file("shard.csv");
        let here = desk.directory.path().join("here");
        fs::create_dir(&here).unwrap();
        fs::write(here.join("data"), "half a pa").unwrap();
        assert!(State::open(&StatePlace::Here(here), &data, None).is_ok());
    }

    #[test]
    fn a_state_directory_of_another_file_is_refused() {
        let desk = Desk::new();
        let (one, other) = (desk.file("one.csv"), desk.file("other.csv"));
        let here = StatePlace::Here(desk.directory.path().join("here"));
        drop(State::open(&here, &one, None).unwrap());
        assert!(matches!(State::open(&here, &other, None).unwrap_err(), StateError::OtherFile { .. }));
        assert!(matches!(desk.open(Path::new("nowhere.csv"), None).unwrap_err(), StateError::NoData(_)));
    }
}
