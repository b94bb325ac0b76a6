//! What is learned, and from what: data files, the encoding that a fleet shares, models, training, evaluation.
//!
//! candle lives in this crate and nowhere else, and none of its types leave it: weights come and go as slices of
//! `f32` in layout order. There is no network, no clock and no entropy here; whatever is random is drawn under a key
//! ([`protocol::draw`]). A row's way is: [`Table`] → [`Dataset`] → [`Survey`] → [`merge`] → [`Schema`] → [`Rows`] →
//! model.

mod cell;
mod comparing;
mod dataset;
mod encoding;
mod error;
mod evaluating;
mod idx;
mod kernel;
mod network;
mod numbers;
mod predicting;
mod records;
mod saved;
mod schema;
mod stepper;
mod survey;
mod table;
mod training;

pub use comparing::{Comparison, auc, compare};
pub use dataset::{Dataset, Note};
pub use encoding::{Rows, RowsError, Shard};
pub use error::DataError;
pub use idx::{IdxFault, data_files};
pub use kernel::fused_multiply_adds;
pub use network::Network;
pub use numbers::{RawNumbers, numbers};
pub use predicting::PredictError;
pub use saved::{DESCRIPTION_FILE, ModelError, SavedModel, WEIGHTS_FILE};
pub use schema::{ColumnSchema, DropReason, Dropped, Encoding, Frozen, MergeError, Schema, SchemaError, Target, merge};
pub use survey::{CATEGORIES_MAX, CLASSES_MAX, MIN_COUNT, Survey, SurveyError};
pub use table::Table;
pub use training::{Gradient, OnPass, Stopped, TaskKey, Trained, norm};
