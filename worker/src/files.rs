//! Small files that must be whole: read up to a bound, written aside, synced, renamed, their directory synced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// A file or directory that the operating system would not give us.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot {verb}", path.display())]
pub struct FileError {
    /// Which.
    pub path: PathBuf,
    /// What was tried.
    pub verb: &'static str,
    /// The operating system's answer.
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn new(path: &Path, verb: &'static str, source: io::Error) -> Self {
        Self { path: path.to_owned(), verb, source }
    }
}

/// The whole of a file of at most `bytes_max` bytes, or nothing if there is none.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, FileError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(|e| FileError::new(path, "open", e))?,
    };
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|e| FileError::new(path, "read", e))?;
    if bytes.len() as u64 > bytes_max {
        let long = io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {bytes_max} bytes"));
        return Err(FileError::new(path, "read", long));
    }
    Ok(Some(bytes))
}

/// Writes a file of mode 0600 that is either as it was or as it shall be, whatever happens; durable on return.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    replace(path, 0o600, |file| file.write_all(bytes).map_err(|e| FileError::new(path, "write", e)))
}

/// Writes a file of this mode aside with `fill`, syncs it, renames it over `path`, and syncs the directory. If `fill`
/// fails, nothing is left aside.
pub(crate) fn replace<T, E: From<FileError>>(
    path: &Path,
    mode: u32,
    fill: impl FnOnce(&mut File) -> Result<T, E>,
) -> Result<T, E> {
    let aside = Aside::of(path)?;
    let (file, filled) = aside.fill(mode, fill)?;
    file.sync_all().map_err(|e| FileError::new(path, "write", e))?;
    aside.rename()?;
    sync_directory(parent(path))?;
    Ok(filled)
}

/// Writes a file of mode 0600 that is whole even if this process is killed meanwhile. Nothing is synced: after a power
/// failure anything may stand there, so whoever reads it must be able to tell.
pub(crate) fn write_unsynced(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let aside = Aside::of(path)?;
    aside.fill(0o600, |file| file.write_all(bytes).map_err(|e| FileError::new(path, "write", e)))?;
    aside.rename()
}

/// Where a file is written before it takes its name.
struct Aside<'a> {
    path: &'a Path,
    aside: PathBuf,
}

impl<'a> Aside<'a> {
    /// What an earlier process left there is removed.
    fn of(path: &'a Path) -> Result<Self, FileError> {
        let mut aside = path.as_os_str().to_owned();
        aside.push(".aside");
        let aside = PathBuf::from(aside);
        remove(&aside)?;
        Ok(Self { path, aside })
    }

    fn fill<T, E: From<FileError>>(
        &self,
        mode: u32,
        fill: impl FnOnce(&mut File) -> Result<T, E>,
    ) -> Result<(File, T), E> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&self.aside)
            .map_err(|e| FileError::new(self.path, "write", e))?;
        match fill(&mut file) {
            Ok(filled) => Ok((file, filled)),
            Err(error) => {
                remove(&self.aside)?;
                Err(error)
            }
        }
    }

    fn rename(&self) -> Result<(), FileError> {
        fs::rename(&self.aside, self.path).map_err(|e| FileError::new(self.path, "replace", e))
    }
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::new(path, "remove", error)),
        _ => Ok(()),
    }
}

/// Makes a directory of mode 0700 and those above it; durable on return, so that what is synced in it is found again.
pub(crate) fn make_directory(path: &Path) -> Result<(), FileError> {
    let missing: Vec<&Path> = path.ancestors().take_while(|above| !above.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| FileError::new(path, "create", e))?;
    missing.into_iter().try_for_each(|made| sync_directory(parent(made)))
}

/// Makes the entries of a directory durable.
pub(crate) fn sync_directory(path: &Path) -> Result<(), FileError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|e| FileError::new(path, "sync", e))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
