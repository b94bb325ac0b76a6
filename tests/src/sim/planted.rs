//! Bugs that are planted to see whether the oracle finds them. Each stands as near as possible to where somebody would
//! make it.

use std::fmt;
use std::str::FromStr;

use protocol::federation::planted;

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// A receipt leaves before the sync of the commit that it rests on.
    ReceiptBeforeSync,
    /// The count of starts is not durable: a restart counts on as if it had never been.
    TaskReused,
    /// An offer of a held task is taken again.
    HeldTwice,
    /// What came after the round had closed is folded all the same.
    LateFolded,
    /// A model is announced before the checkpoint that holds it is synced.
    CheckpointBeforeSync,
    /// A record does not reach the journal.
    RecordDropped,
}

impl Planted {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::ReceiptBeforeSync,
        Self::TaskReused,
        Self::HeldTwice,
        Self::LateFolded,
        Self::CheckpointBeforeSync,
        Self::RecordDropped,
    ];

    /// As it is named on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ReceiptBeforeSync => "receipt-before-sync",
            Self::TaskReused => "task-reused",
            Self::HeldTwice => "held-twice",
            Self::LateFolded => "late-folded",
            Self::CheckpointBeforeSync => "checkpoint-before-sync",
            Self::RecordDropped => "record-dropped",
        }
    }
}

/// Switches on what stands in the machine itself; the rest stands in the simulated shell.
pub(super) fn plant(bug: Option<Planted>) {
    planted::plant(match bug {
        Some(Planted::HeldTwice) => Some(planted::Bug::HeldTwice),
        Some(Planted::LateFolded) => Some(planted::Bug::LateFolded),
        _ => None,
    });
}

impl fmt::Display for Planted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Planted {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|bug| bug.name() == name)
            .ok_or_else(|| format!("no bug {name:?}; there are {}", names()))
    }
}
