//! What the two sides say to each other inside the session, and how it is coded.
//!
//! Every message is a postcard enum, decoded with nothing left over. Variants and fields are only ever appended;
//! goldens in `docs/protocol.md` and [`PROTOCOL_VERSION`] guard them. Only [`Hello`] and [`HelloRefused`] travel outside
//! the session, inside TLS. Figures are checked where they are used; lengths are bounded before they are read.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::evaluation::Evaluation;
use crate::ids::{ContentId, Hash, Instance, RunId, TaskId, WorkerId, WorkerName};
use crate::limits::SENTENCE_LEN_MAX;
use crate::plan::LearningPlan;

/// The version that this build speaks.
pub const PROTOCOL_VERSION: u16 = 1;

/// The first frame of a connection, not yet sealed. Part of the session's prologue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The versions that the sender speaks, best first; at most [`crate::limits::HELLO_VERSIONS_MAX`].
    pub versions: Vec<u16>,
    /// Why it came.
    pub role: Role,
    /// How its session is to be terminated.
    pub mode: SessionMode,
}

/// Why a peer came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// To work.
    Worker,
    /// To be enrolled.
    Join,
}

/// Between whom the session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionMode {
    /// Between the two ends of the TLS connection, bound to it.
    Direct,
}

/// The answer to a [`Hello`] that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloRefused {
    /// The versions that the answerer speaks.
    pub speaks: Vec<u16>,
    /// A sentence for a person.
    pub sentence: String,
}

/// What a worker asks when it comes to be enrolled: the payload of its handshake message.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolRequest {
    /// The token of the invitation.
    pub token: [u8; 16],
    /// The name that it would like.
    pub name: WorkerName,
    /// Its Ed25519 public key.
    pub ed25519: [u8; 32],
}

impl core::fmt::Debug for EnrolRequest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("EnrolRequest").field("token", &"[redacted]").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The answer: the payload of the handshake's second message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EnrolAnswer {
    /// Enrolled; the same again for a retry with the same keys.
    Granted {
        /// The name that it has from now on.
        name: WorkerName,
        /// Its certificate, DER.
        certificate: Vec<u8>,
        /// When the certificate ends, in seconds since 1970.
        expires_unix_s: u64,
    },
    /// Not enrolled.
    Refused(EnrolRefusal),
}

/// Why a worker was not enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum EnrolRefusal {
    /// Nobody was invited with this token.
    #[error("the coordinator does not know this invitation; ask for a new one (coordinator invite)")]
    Unknown,
    /// It was for an earlier time.
    #[error("the invitation has expired; ask for a new one (coordinator invite)")]
    Expired,
    /// It was used as often as it may be.
    #[error("the invitation has been used up; ask for a new one (coordinator invite --uses N)")]
    Spent,
    /// It is for workers on the coordinator's own machine.
    #[error("the invitation is for workers on the coordinator's own machine; ask for one with --address")]
    LoopbackOnly,
    /// The key was revoked.
    #[error("this worker's key was revoked; remove its state directory and ask for a new invitation")]
    Revoked,
    /// The fleet is full.
    #[error("the fleet has as many workers as it may have")]
    Full,
    /// The keys are not keys.
    #[error("the worker's public key is not a valid one")]
    BadKey,
}

/// What kind of work a task is, and so what its payload holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TaskKind {
    /// Weight deltas after local training.
    Update,
    /// The mean gradient of one batch.
    Gradient,
    /// Encoded training rows.
    Rows,
    /// Column statistics.
    Survey,
    /// Sums over held-out rows; they are in the manifest, and the payload is empty.
    Evaluation,
    /// A merged sum of several workers' updates. Not used yet.
    Partial,
}

/// How a payload's numbers are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encoding {
    /// Little-endian `f32` in layout order; for payloads without a layout, their own bytes.
    F32,
    /// Cells of the ring. Not used yet.
    Ring64,
}

/// Figures about a payload that travel beside it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Mean loss over the training steps of this task.
    pub train_loss: Option<f64>,
    /// Seconds that the work took.
    pub seconds: f64,
    /// Evaluation of the model that the task started from, on held-out rows.
    pub evaluation: Option<Evaluation>,
}

/// What a worker offers, and signs (context `tributary manifest 1\0`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The run.
    pub run: RunId,
    /// The author.
    pub worker: WorkerId,
    /// The task.
    pub task: TaskId,
    /// What it is.
    pub kind: TaskKind,
    /// The model that it was made from; zero for a survey and for rows.
    pub base: Hash,
    /// The fingerprint of the layout; zero where there is none.
    pub layout: Hash,
    /// Runs of tensors that share a weight and a scale: today exactly 1.
    pub groups: u32,
    /// How the numbers are coded.
    pub encoding: Encoding,
    /// The payload's length.
    pub bytes: u64,
    /// The payload's BLAKE3.
    pub hash: Hash,
    /// Training rows behind it.
    pub examples: u64,
    /// Training steps behind it.
    pub steps: u64,
    /// Its weight in the mean, 1 to the worker's cap.
    pub weight: u32,
    /// Figures beside it.
    pub metrics: Metrics,
}

/// A coded statement with its author's signature over `context ‖ bytes`. The bytes are kept as they came, so that
/// what is verified is what was signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The postcard of the statement.
    pub bytes: Vec<u8>,
    /// The Ed25519 signature, 64 bytes.
    pub signature: Vec<u8>,
}

/// The coordinator's promise, signed (context `tributary receipt 1\0`): the update is durable and in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The run.
    pub run: RunId,
    /// The author of the update.
    pub worker: WorkerId,
    /// Its task.
    pub task: TaskId,
    /// The hash of the payload.
    pub hash: Hash,
    /// The round that it is in.
    pub round: u32,
    /// The model that came of that round.
    pub model_hash: Hash,
}

/// The key of a broadcast content. Wiped when dropped, and never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, zeroize::Zeroize, zeroize::ZeroizeOnDrop)]
pub struct ContentKey(pub [u8; 32]);

impl core::fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("ContentKey([redacted])")
    }
}

/// A content that is streamed to many: how to open it and how to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentRef {
    /// Its name.
    pub id: ContentId,
    /// Its key.
    pub key: ContentKey,
    /// The hash of the plaintext: a model hash, or BLAKE3 of a schema's bytes.
    pub hash: Hash,
    /// The plaintext's length.
    pub bytes: u64,
}

/// A task as its worker is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// The task.
    pub task: TaskId,
    /// The round, from 1; 0 for a survey and for rows.
    pub round: u32,
    /// What is to be done.
    pub kind: TaskKind,
    /// The frozen schema; none for a survey.
    pub schema: Option<ContentRef>,
    /// The model to start from; none for a survey and for rows.
    pub model: Option<ContentRef>,
    /// The fingerprint of its layout; zero where there is no model.
    pub layout: Hash,
    /// By how many bits a count of rows is shifted down to be a weight.
    pub weight_shift: u32,
}

impl Assigned {
    /// The hash of the model to start from; zero where there is none.
    #[must_use]
    pub fn base(&self) -> Hash {
        self.model.as_ref().map_or(Hash([0; 32]), |model| model.hash)
    }
}

/// The coordinator's first word in a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version spoken from here on.
    pub version: u16,
    /// The run.
    pub run: RunId,
    /// The coordinator's Ed25519 key, which signs receipts.
    pub ed25519: [u8; 32],
    /// The name that the worker has in this fleet.
    pub name: WorkerName,
    /// The largest weight that this worker's updates may have.
    pub weight_max: u32,
    /// The largest norm of an update.
    pub norm_max: f64,
    /// The part of the plan that decides the model.
    pub learning: LearningPlan,
}

/// Why an offer, a payload or a message was not accepted. An answer, not an accusation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Another run's manifest.
    #[error("the manifest names another run")]
    WrongRun,
    /// Another worker's name or task.
    #[error("the manifest names another worker's task")]
    WrongWorker,
    /// The signature does not verify.
    #[error("the manifest's signature does not verify")]
    WrongSignature,
    /// Another kind than the task.
    #[error("the manifest names another kind of work than the task")]
    WrongKind,
    /// Another base than the task.
    #[error("the update was made from another model than the task names")]
    WrongBase,
    /// Another layout than the run.
    #[error("the update has another layout than the model")]
    WrongLayout,
    /// Another length than the layout has, or longer than the limit.
    #[error("the payload has {got} bytes, expected {expected}")]
    WrongLength {
        /// Declared or sent.
        got: u64,
        /// Expected, or the most there may be.
        expected: u64,
    },
    /// Another hash than the manifest.
    #[error("the payload's hash is not the manifest's")]
    WrongHash,
    /// A coding that this run does not use.
    #[error("the payload is coded in a way that this run does not use")]
    WrongEncoding,
    /// NaN or infinite.
    #[error("the update holds a number that is not finite")]
    NotFinite,
    /// Too long.
    #[error("the update's norm is {got}, the most is {max}")]
    NormTooLong {
        /// Measured.
        got: f64,
        /// The ring's.
        max: f64,
    },
    /// Zero, or over the cap.
    #[error("the update's weight is {got}, expected 1 to {max}")]
    WrongWeight {
        /// Declared.
        got: u32,
        /// The worker's cap.
        max: u32,
    },
    /// The sum is full.
    #[error("the round has as many updates as a sum may hold")]
    TooMany,
    /// The metrics contradict themselves.
    #[error("the manifest's figures contradict each other")]
    WrongMetrics,
    /// The survey cannot be read.
    #[error("the payload cannot be read as what it says it is")]
    Unreadable,
}

/// Why a worker's training gave nothing to offer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Failure {
    /// NaN or infinite.
    NotFinite,
    /// The update is too long.
    NormTooLong {
        /// Measured.
        got: f64,
        /// The ring's.
        max: f64,
    },
}

/// Why a worker does not take part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Leave {
    /// It was told to stop, and keeps its state.
    Stopping,
    /// Its owner does not allow what the plan asks; the sentence says what.
    NotAllowed(String),
    /// Its data does not fit; the sentence says why.
    DataUnfit(String),
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// The first sealed record: here I am. Changes state; everything before did not.
    Join {
        /// A nonce of this process.
        instance: Instance,
    },
    /// The plan was read, and its owner allows it: the worker is in.
    Ready,
    /// Something is ready for a task: a [`Manifest`], signed.
    Offer(Signed),
    /// Training gave nothing to offer.
    Failed {
        /// The task.
        task: TaskId,
        /// Why.
        failure: Failure,
    },
    /// Alive, and so far in the open task.
    Beat {
        /// The task.
        task: TaskId,
        /// Training steps made in it.
        steps: u64,
    },
    /// Goodbye.
    Leaving(Leave),
}

/// What the coordinator says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToWorker {
    /// The first word.
    Welcome(Box<Welcome>),
    /// Work.
    Assigned(Box<Assigned>),
    /// A large payload may come now.
    Go {
        /// The task.
        task: TaskId,
        /// The payload's hash.
        hash: Hash,
        /// From which byte on.
        from: u64,
    },
    /// Verified and counted: keep your copy.
    Held {
        /// The task.
        task: TaskId,
        /// The payload.
        hash: Hash,
    },
    /// Another payload is held for this task already.
    AlreadyHeld {
        /// The task.
        task: TaskId,
        /// What is held.
        hash: Hash,
    },
    /// The task is no longer wanted: drop it.
    Late {
        /// The task.
        task: TaskId,
    },
    /// Not accepted.
    Refused {
        /// The task.
        task: TaskId,
        /// Why.
        refusal: Refusal,
    },
    /// A [`Receipt`], signed: delete your copy.
    Receipt(Signed),
    /// Another process with your identity came after you.
    Displaced,
    /// You cannot take part: a sentence for your owner.
    Rejected {
        /// What is wrong and what to do.
        sentence: String,
    },
    /// The coordinator goes away and comes back: keep everything.
    GoingAway,
    /// The run is over.
    Finished {
        /// The final model.
        model_hash: Hash,
    },
    /// The run was aborted: held updates are void.
    Aborted,
}

/// The first message on a worker's upload stream, sealed: whose payload follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The task.
    pub task: TaskId,
    /// The payload's hash.
    pub hash: Hash,
    /// From which byte on.
    pub from: u64,
}

/// The first message on a download stream, sealed: which content follows, in records of its own key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// The content.
    pub id: ContentId,
}

/// A peer's sentence as a person may be shown it: at most [`SENTENCE_LEN_MAX`] bytes, and nothing that steers a terminal.
#[must_use]
pub fn printable(sentence: &str) -> String {
    let bounded = &sentence[..sentence.floor_char_boundary(SENTENCE_LEN_MAX)];
    bounded.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Bytes that are not the message they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They end early, or name a variant that this version does not know.
    #[error("a message cannot be read: {0}")]
    Unreadable(String),
    /// Something follows the message.
    #[error("{0} bytes are left over after a message")]
    LeftOver(usize),
}

/// The bytes of `message`.
///
/// # Panics
/// Never: messages of this module always have an encoding.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_allocvec(message).expect("every message has an encoding")
}

/// The message that `bytes` are, with nothing left over. Whoever reads bytes bounds their number first.
///
/// # Errors
/// If they are not exactly one message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let (message, rest) = postcard::take_from_bytes(bytes).map_err(|e| DecodeError::Unreadable(e.to_string()))?;
    if rest.is_empty() { Ok(message) } else { Err(DecodeError::LeftOver(rest.len())) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_token_is_not_printed() {
        let request = EnrolRequest { token: [0xab; 16], name: "shard".parse().unwrap(), ed25519: [0xcd; 32] };
        let printed = format!("{request:?}");
        assert!(printed.contains("[redacted]") && !printed.contains("171"), "{printed}");
    }

    #[test]
    fn a_peers_sentence_is_bounded_and_cannot_steer_a_terminal() {
        assert_eq!(printable("\x1b[2Jno such column\r\n\u{9b}0m"), " [2Jno such column   0m");
        assert_eq!(printable(&"x".repeat(SENTENCE_LEN_MAX + 1)), "x".repeat(SENTENCE_LEN_MAX));
        assert_eq!(printable(&"é".repeat(SENTENCE_LEN_MAX)).len(), SENTENCE_LEN_MAX);
    }
}
