//! Every bound on what a peer can make us hold. A length is compared with its limit before anything is allocated.
//!
//! Each constant has its unit last. Those that rest on one another are tied by an assertion at compile time.

use core::time::Duration;

/// The largest control message, in bytes of postcard: an offer whose evaluation has full histograms for
/// [`HISTOGRAM_CLASSES_MAX`] classes fits.
pub const CONTROL_MESSAGE_BYTES_MAX: usize = 256 * 1024;

/// The largest plaintext of one record, in bytes.
pub const RECORD_BYTES_MAX: usize = 64 * 1024;

/// A payload up to this follows its manifest at once; a larger one waits for `Go`.
pub const PAYLOAD_AT_ONCE_BYTES_MAX: u64 = 128 * 1024;

/// A payload larger than this, in bytes, resumes where its stream was cut; a smaller one comes again from its beginning.
pub const RESUME_BYTES_MIN: u64 = 64 << 20;

/// The largest model, in bytes of `f32`: four gibibytes.
pub const MODEL_BYTES_MAX: u64 = 4 << 30;

/// The largest survey, in bytes of postcard.
pub const SURVEY_BYTES_MAX: u64 = 16 << 20;

/// The largest schema, in bytes of postcard.
pub const SCHEMA_BYTES_MAX: u64 = 16 << 20;

/// The most that one worker may share in `central` mode, in bytes of encoded rows.
pub const ROWS_BYTES_MAX: u64 = 16 << 30;

/// The most tensors of a model.
pub const TENSORS_MAX: usize = 4096;

/// The longest name of a tensor, in bytes.
pub const TENSOR_NAME_LEN_MAX: usize = 128;

/// The most dimensions of a tensor.
pub const TENSOR_DIMENSIONS_MAX: usize = 8;

/// The most workers that one coordinator knows.
pub const WORKERS_MAX: usize = 100_000;

/// The most tasks that one round assigns, which is also the most updates that one sum holds.
pub const UPDATES_MAX: u32 = 2048;

/// The most tasks that one worker is given in one round. It gets another one only when it comes back after it left, or
/// after what it offered was refused.
pub const TASKS_OF_A_WORKER_MAX: usize = 8;

/// The most rows behind one update or one evaluation: a sum over [`UPDATES_MAX`] of them is exact as `f64`.
pub const EXAMPLES_MAX: u64 = 1 << 40;

/// The most rounds of a run.
pub const ROUNDS_MAX: u32 = 1_000_000;

/// The longest sentence that one side says to a person at the other, in bytes.
pub const SENTENCE_LEN_MAX: usize = 1024;

/// The most classes for which score histograms are sent; with more, accuracy is still exact and AUC is left out.
pub const HISTOGRAM_CLASSES_MAX: usize = 16;

/// The bins of a score histogram.
pub const HISTOGRAM_BINS: u16 = 1024;

/// The most versions that a Hello names.
pub const HELLO_VERSIONS_MAX: usize = 16;

/// Upload permits: how many large payloads may be on their way at once, whatever the size of the fleet.
pub const UPLOAD_PERMITS: u32 = 4;

/// How often a worker with an open task beats. Far below [`SILENCE_MAX`], because the beat is also what meets a
/// restarted coordinator's stateless reset: QUIC's own keep-alive cannot change while a connection lives.
pub const BEAT_EVERY: Duration = Duration::from_millis(250);

/// A worker with an open task that was silent for so long is gone, until it comes back.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);

/// A worker with an open task that made no training step for so long is gone.
pub const NO_STEP_MAX: Duration = Duration::from_secs(600);

/// The shortest deadline that the coordinator sets by itself.
pub const DEADLINE_MIN: Duration = Duration::from_secs(30);

/// How often a round is extended under quorum before the run pauses.
pub const EXTENSIONS_MAX: u32 = 3;

/// Without `min_workers`: how long two workers wait for a third.
pub const GATHERING_COUNTDOWN: Duration = Duration::from_secs(10);

/// The first and the longest wait between two attempts to connect.
pub const RECONNECT_AFTER_MIN: Duration = Duration::from_millis(50);
/// See [`RECONNECT_AFTER_MIN`].
pub const RECONNECT_AFTER_MAX: Duration = Duration::from_secs(15);

/// A session lives so long; then its worker reconnects, which makes new keys.
pub const SESSION_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

const _: () = assert!(SILENCE_MAX.as_millis() > 3 * BEAT_EVERY.as_millis());
const _: () = assert!(EXAMPLES_MAX * UPDATES_MAX as u64 <= 1 << 53);
const _: () = assert!(PAYLOAD_AT_ONCE_BYTES_MAX <= 2 * RECORD_BYTES_MAX as u64);
const _: () = assert!(PAYLOAD_AT_ONCE_BYTES_MAX < RESUME_BYTES_MIN);
// Two histograms a class, a bin number and a count of at most three and five bytes each.
const _: () = assert!(HISTOGRAM_CLASSES_MAX * 2 * HISTOGRAM_BINS as usize * 8 <= CONTROL_MESSAGE_BYTES_MAX);
