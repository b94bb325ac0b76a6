//! Why a worker ends without having done what it was asked to.

use std::io;

use learning::DataError;
use protocol::invitation::InvitationError;
use protocol::limits::SENTENCE_LEN_MAX;
use transport::SetupError;

use crate::enrol::EnrolError;
use crate::files::FileError;
use crate::link::LinkError;
use crate::predict::PredictError;
use crate::receipts::{LogError, ReceiptError};
use crate::state::StateError;

/// Why a worker failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The data file cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is no home directory to keep the state under.
    #[error("neither XDG_STATE_HOME nor HOME is an absolute path; say --state DIR and --join INVITATION")]
    NoHome,
    /// What `--join` names cannot be read.
    #[error("{place}: the invitation cannot be read")]
    InvitationFile {
        /// The file.
        place: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// What `--join` names is no invitation.
    #[error("{place}")]
    Invitation {
        /// Where it stood.
        place: String,
        /// What is wrong with it.
        source: InvitationError,
    },
    /// The coordinator does not enrol this worker.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// The coordinator will not speak with this worker, now or later.
    #[error(transparent)]
    Link(LinkError),
    /// The worker's key was revoked.
    #[error("this worker's key was revoked; remove its state directory and ask for a new invitation")]
    Revoked,
    /// The coordinator has forgotten this worker.
    #[error("{0}: the coordinator does not know this worker; remove its state directory and ask for a new invitation")]
    Unknown(String),
    /// The coordinator accuses this worker of what no honest one does: a bug, or a hand in between.
    #[error("the coordinator ended the connection for good: {0}")]
    Misbehaved(String),
    /// Another process has this worker's identity.
    #[error("another process with this worker's identity has joined; only one may run")]
    Displaced,
    /// The coordinator says why this worker cannot take part.
    #[error("the coordinator says: {0}")]
    Rejected(String),
    /// This worker cannot or may not take part.
    #[error("{0}")]
    Declined(String),
    /// The run was given up.
    #[error("the run was aborted by the coordinator's operator")]
    Aborted,
    /// A receipt does not hold what it promises.
    #[error("the coordinator gave a receipt that does not verify")]
    Receipt(#[from] ReceiptError),
    /// A log of receipts does not stand.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Predictions could not be made.
    #[error(transparent)]
    Predict(#[from] PredictError),
    /// The network cannot be used at all.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The operating system gave no threads, signals or entropy.
    #[error("the process cannot be set up")]
    Runtime(#[source] io::Error),
    /// A bug: the training thread is gone.
    #[error("training ended unexpectedly; this is a bug")]
    TrainingDied,
}

/// An error and what it rests on, as one sentence of bounded length.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text.truncate(text.floor_char_boundary(SENTENCE_LEN_MAX));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_bounded() {
        let error = io::Error::other("ä".repeat(SENTENCE_LEN_MAX));
        assert_eq!(sentence(&error).len(), SENTENCE_LEN_MAX);
    }
}
