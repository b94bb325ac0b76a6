//! What a worker is told to do, and where tests may look in.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use protocol::ids::WorkerName;
use protocol::invitation::Invitation;
use protocol::messages::Manifest;
use transport::Taps;

use crate::report::Report;
use crate::state::StatePlace;

/// What a worker is told to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data file, or a directory that holds images and labels.
    pub data: PathBuf,
    /// Where the state directory is to be.
    pub state: StatePlace,
    /// Where a coordinator on this machine leaves its invitation.
    pub default_join: PathBuf,
    /// The invitation, if the user gave one.
    pub join: Option<Invitation>,
    /// The name to ask for; without it, the data file's stem.
    pub name: Option<WorkerName>,
    /// What the file calls the label column.
    pub label: Option<String>,
    /// Whether encoded training rows may leave this machine.
    pub share_rows: bool,
    /// Categories that fewer rows have are not named.
    pub min_count: u64,
    /// How many threads may share a training step.
    pub threads: usize,
    /// Who hears what happens.
    pub report: Report,
    /// Where tests look in.
    pub hooks: Hooks,
}

impl Options {
    /// The defaults of the command line for this file.
    #[must_use]
    pub fn new(data: PathBuf, state: StatePlace, default_join: PathBuf) -> Self {
        Self {
            data,
            state,
            default_join,
            join: None,
            name: None,
            label: None,
            share_rows: false,
            min_count: learning::MIN_COUNT,
            threads: 1,
            report: Report::silent(),
            hooks: Hooks::default(),
        }
    }
}

/// Changes an offer: the manifest, and the payload as it will be sent.
pub type OnOffer = Arc<dyn Fn(&mut Manifest, &mut Vec<u8>) + Send + Sync>;

/// Changes a signature.
pub type OnSignature = Arc<dyn Fn(&mut [u8; 64]) + Send + Sync>;

/// Sees bytes.
pub type OnPlain = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// Where tests look in and interfere. No flag and no variable of the environment reaches these.
#[derive(Clone, Default)]
pub struct Hooks {
    /// See what travels.
    pub taps: Taps,
    /// See everything that is sealed as it was before, and everything that came sealed as it is once it is open.
    pub on_plain: Option<OnPlain>,
    /// Change a manifest and its payload before the manifest is signed.
    pub on_offer: Option<OnOffer>,
    /// Change a manifest's signature.
    pub on_signature: Option<OnSignature>,
}

impl Hooks {
    /// Shows plaintext, which is made only if somebody wants to see it.
    pub(crate) fn see<B: AsRef<[u8]>>(&self, plaintext: impl FnOnce() -> B) {
        if let Some(see) = &self.on_plain {
            see(plaintext().as_ref());
        }
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks").field("taps", &self.taps).finish_non_exhaustive()
    }
}
