//! What the tests of whole programs share: where things lie, processes that end with their test, what is not tested.

pub mod data;
pub mod fleet;
pub mod flights;
pub mod home;
pub mod live;
pub mod mount;
pub mod netns;
pub mod process;
pub mod sim;
pub mod soak;
pub mod stranger;

use std::io::Write as _;
use std::path::{Path, PathBuf};

pub use fleet::{Fleet, ended_well};
pub use home::{Home, Running, Said};
pub use live::LiveFleet;
pub use stranger::{Papers, Stranger};

/// The root of the repository.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A program that `tests/setup.sh` provides under the name of an environment variable. Without it the test has nothing
/// to test with: `purpose` goes on the list of what was not tested, and the test returns.
#[must_use]
pub fn tool(variable: &str, purpose: &str) -> Option<PathBuf> {
    let found = std::env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        not_tested(&format!("{purpose}: {variable} is not set; `make test` sets it"));
    }
    found
}

/// Puts a line on the list that `make test` shows at its end, and that fails it in CI.
///
/// # Panics
/// If the list cannot be written: then nobody would learn of it.
pub fn not_tested(what: &str) {
    eprintln!("NOT TESTED: {what}");
    if let Some(list) = std::env::var_os("TRIBUTARY_NOT_TESTED") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&list);
        let written = file.and_then(|mut file| writeln!(file, "{what}"));
        written.unwrap_or_else(|error| panic!("{}: {error}", list.display()));
    }
}
