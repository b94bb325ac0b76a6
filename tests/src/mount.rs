//! A small file system in memory, to be filled and locked. It takes root; whoever lacks that is told by [`Mount::tmpfs`].

use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system; gone with the value.
#[derive(Debug)]
pub struct Mount {
    place: PathBuf,
}

impl Mount {
    /// Mounts so many kibibytes on a folder, which is made.
    ///
    /// # Errors
    /// Why it cannot be, if this machine or its kernel does not let us.
    pub fn tmpfs(place: &Path, kibibytes: u32) -> Result<Self, String> {
        std::fs::create_dir_all(place).map_err(|error| error.to_string())?;
        let size = format!("size={kibibytes}k,mode=700");
        mount(&["-t", "tmpfs", "-o", &size, "tributary-test"], place)?;
        Ok(Self { place: place.to_owned() })
    }

    /// Lets nobody write to it from now on.
    ///
    /// # Panics
    /// If it cannot be mounted so.
    pub fn lock(&self) {
        mount(&["-o", "remount,ro"], &self.place).unwrap_or_else(|error| panic!("{error}"));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a process of a test that failed may still be in it.
        let _ = Command::new("umount").arg("-l").arg(&self.place).status();
    }
}

fn mount(words: &[&str], place: &Path) -> Result<(), String> {
    let told = |error| format!("mount: {error}");
    let output = Command::new("mount").args(words).arg(place).output().map_err(told)?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}
