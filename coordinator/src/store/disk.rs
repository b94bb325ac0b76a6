//! The files of one directory, as the store sees them: eight calls, and what each of them promises.
//!
//! [`RealDisk`] is a directory. The simulator has another one, which loses, tears and reorders what was not synced;
//! so whatever the store rests on is said here, at [`Disk`], and nowhere else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::StoreError;

/// What is written, and not yet renamed to its place, ends in this.
pub const ASIDE: &str = ".aside";

/// The files of one directory, without subdirectories. Names are ours: `[a-z0-9.-]+`.
pub trait Disk: Send {
    /// Names and lengths, by name.
    ///
    /// # Errors
    /// What the operating system says.
    fn list(&self) -> io::Result<Vec<(String, u64)>>;

    /// The bytes of a file from an offset on.
    ///
    /// # Errors
    /// What the operating system says; `NotFound` if there is no such file.
    fn read(&self, name: &str, from: u64) -> io::Result<Box<dyn Read + Send>>;

    /// Puts bytes at the end of a file, which is made if it is not there. Not durable; after an error any prefix of
    /// them may be there.
    ///
    /// # Errors
    /// What the operating system says.
    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Puts zeros behind the end of a file that is there, which ends where it did for who appends to it: what is appended
    /// replaces them. A sync of what replaces zeros that are on the disk writes no metadata, and so takes half as long. Who
    /// reads the file finds them, and who opens it anew has them before its end. Not durable; after an error some may be there.
    ///
    /// # Errors
    /// What the operating system says.
    fn reserve(&mut self, _name: &str, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    /// Cuts a file, with what was reserved behind its end. Not durable.
    ///
    /// # Errors
    /// What the operating system says.
    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()>;

    /// Content and name of a file are durable when this returns.
    ///
    /// # Errors
    /// What the operating system says. What the file holds on disk is then unknown, and another try tells nothing.
    fn sync(&mut self, name: &str) -> io::Result<()>;

    /// Gives a file another name, and replaces what had it. Atomic; durable after a sync of `to`.
    ///
    /// # Errors
    /// What the operating system says.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;

    /// Whether there is no device to wait for: a sync returns at once.
    fn is_in_memory(&self) -> bool {
        false
    }

    /// Removes a file. After a crash it may be there again.
    ///
    /// # Errors
    /// What the operating system says; `NotFound` if there is no such file.
    fn remove(&mut self, name: &str) -> io::Result<()>;
}

/// A directory of the operating system.
#[derive(Debug)]
pub struct RealDisk {
    path: PathBuf,
    directory: File,
    /// What was appended to and neither renamed nor removed since: the journal's last parts.
    handles: BTreeMap<String, Handle>,
    /// Names that came since the directory was last synced.
    fresh: BTreeSet<String>,
    /// The directory was synced by this process: before, a name may be one that a killed process never made durable.
    is_known: bool,
    in_memory: bool,
}

/// A file that is appended to.
#[derive(Debug)]
struct Handle {
    file: File,
    /// Where the next bytes go.
    end: u64,
    /// As far as there are zeros.
    reserved: u64,
}

impl Handle {
    fn new(file: File) -> io::Result<Self> {
        let end = file.metadata()?.len();
        Ok(Self { file, end, reserved: end })
    }
}

impl RealDisk {
    /// The directory at `path`, which is there.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn new(path: &Path) -> io::Result<Self> {
        let directory = File::open(path)?;
        let (handles, fresh, in_memory) = (BTreeMap::new(), BTreeSet::new(), is_in_memory(&directory));
        Ok(Self { path: path.to_owned(), directory, handles, fresh, is_known: false, in_memory })
    }

    fn handle(&mut self, name: &str) -> io::Result<&mut Handle> {
        if !self.handles.contains_key(name) {
            let handle = Handle::new(self.open_to_append(name)?)?;
            self.handles.insert(name.to_owned(), handle);
        }
        Ok(self.handles.get_mut(name).expect("it was put there"))
    }

    fn open_to_append(&mut self, name: &str) -> io::Result<File> {
        let path = self.path.join(name);
        match OpenOptions::new().write(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
                self.fresh.insert(name.to_owned());
                Ok(file)
            }
            opened => opened,
        }
    }

    /// Whoever removes or moves a directory under a live process removes what that process will write.
    fn check_place(&self, file: &File) -> io::Result<()> {
        let ours = self.directory.metadata()?;
        let is_there =
            fs::metadata(&self.path).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
        if is_there && ours.nlink() > 0 && file.metadata()?.nlink() > 0 {
            return Ok(());
        }
        Err(io::Error::other("the state directory was removed under the running coordinator"))
    }
}

/// Whether a directory is on a file system that has no device; where nobody can tell, it has one.
fn is_in_memory(directory: &File) -> bool {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC` of statfs(2).
    #[cfg(target_os = "linux")]
    const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];
    #[cfg(target_os = "linux")]
    return rustix::fs::fstatfs(directory).is_ok_and(|system| IN_MEMORY.contains(&system.f_type));
    #[cfg(not(target_os = "linux"))]
    return false;
}

impl Disk for RealDisk {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            let metadata = match entry.metadata() {
                // It went away while we looked: others read beside a live coordinator.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata?,
            };
            if metadata.is_file() {
                files.push((entry.file_name().to_string_lossy().into_owned(), metadata.len()));
            }
        }
        files.sort();
        Ok(files)
    }

    fn read(&self, name: &str, from: u64) -> io::Result<Box<dyn Read + Send>> {
        let mut file = File::open(self.path.join(name))?;
        file.seek(SeekFrom::Start(from))?;
        Ok(Box::new(file))
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let handle = self.handle(name)?;
        handle.file.write_all_at(bytes, handle.end)?;
        handle.end += bytes.len() as u64;
        Ok(())
    }

    fn reserve(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        if self.in_memory {
            return Ok(());
        }
        let handle = self.handle(name)?;
        let to = handle.end + bytes;
        let mut from = handle.reserved.max(handle.end);
        while from < to {
            let count = (to - from).min(ZEROS.len() as u64);
            handle.file.write_all_at(&ZEROS[..usize::try_from(count).unwrap_or(ZEROS.len())], from)?;
            from += count;
            handle.reserved = from;
        }
        Ok(())
    }

    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        let handle = self.handle(name)?;
        handle.file.set_len(length)?;
        (handle.end, handle.reserved) = (length, length);
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        match self.handles.get(name) {
            Some(Handle { file, .. }) => {
                file.sync_data()?;
                self.check_place(file)?;
            }
            None => {
                let file = File::open(self.path.join(name))?;
                file.sync_data()?;
                self.check_place(&file)?;
            }
        }
        if !self.is_known || self.fresh.contains(name) {
            self.directory.sync_all()?;
            self.fresh.clear();
            self.is_known = true;
        }
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))?;
        self.handles.remove(from);
        self.handles.remove(to);
        self.fresh.remove(from);
        self.fresh.insert(to.to_owned());
        Ok(())
    }

    fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.handles.remove(name);
        self.fresh.remove(name);
        fs::remove_file(self.path.join(name))
    }
}

/// A file on its way to its place.
pub(crate) struct Aside<'a> {
    disk: &'a mut dyn Disk,
    name: &'a str,
    /// What it is called before whoever reads an error.
    told: &'a str,
    bytes: u64,
}

impl Aside<'_> {
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.disk.append(self.name, bytes).map_err(StoreError::io(self.told, "write"))?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// Writes a file that is durable, and whole or not there, when this returns. The number of its bytes.
pub(crate) fn write_aside(
    disk: &mut dyn Disk,
    name: &str,
    write: impl FnOnce(&mut Aside<'_>) -> Result<(), StoreError>,
) -> Result<u64, StoreError> {
    let aside = format!("{name}{ASIDE}");
    let bytes = put_aside(disk, &aside, write)?;
    take_place(disk, &aside, name)?;
    Ok(bytes)
}

/// Writes what is to be a file, durably. The number of its bytes.
pub(crate) fn put_aside(
    disk: &mut dyn Disk,
    aside: &str,
    write: impl FnOnce(&mut Aside<'_>) -> Result<(), StoreError>,
) -> Result<u64, StoreError> {
    let told = aside.strip_suffix(ASIDE).unwrap_or(aside);
    match disk.remove(aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(StoreError::io(told, "replace")(error)),
        _ => {}
    }
    let mut file = Aside { disk: &mut *disk, name: aside, told, bytes: 0 };
    let written = write(&mut file).map(|()| file.bytes);
    let written = written.and_then(|bytes| {
        disk.sync(aside).map_err(StoreError::io(told, "sync"))?;
        Ok(bytes)
    });
    if written.is_err() {
        // Half a file only takes room, of which there may be none; the error that matters is the one before.
        let _ = disk.remove(aside);
    }
    written
}

/// Makes what was put aside the file that it is to be, durably.
pub(crate) fn take_place(disk: &mut dyn Disk, aside: &str, name: &str) -> Result<(), StoreError> {
    disk.rename(aside, name).map_err(StoreError::io(name, "rename to"))?;
    // It has its name now, and whether that lasts is not known: there is no way back to what was.
    disk.sync(name).map_err(|source| StoreError::Unsynced { file: name.to_owned(), source })
}

/// The whole of a file that has at most `max` bytes; `None` if there is none.
pub(crate) fn read_whole(disk: &dyn Disk, name: &str, max: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let reader = match disk.read(name, 0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        reader => reader.map_err(StoreError::io(name, "open"))?,
    };
    let mut bytes = Vec::new();
    reader.take(max + 1).read_to_end(&mut bytes).map_err(StoreError::io(name, "read"))?;
    if bytes.len() as u64 > max {
        return Err(StoreError::Damaged {
            file: name.to_owned(),
            offset: max,
            reason: format!("longer than {max} bytes"),
        });
    }
    Ok(Some(bytes))
}
