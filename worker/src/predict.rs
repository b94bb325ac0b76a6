//! Predictions with a finished model. Needs the model's directory and nothing else: no state, no coordinator.

use std::fs;
use std::path::{Path, PathBuf};

use learning::{ModelError, SavedModel};

use crate::files::{self, FileError};

/// Why there are no predictions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PredictError {
    /// The model cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The rows cannot be used, or the predictions not be written.
    #[error(transparent)]
    Rows(#[from] learning::PredictError),
    /// The output cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The predictions would replace the rows that they are for.
    #[error("{}: is the input; name another file with --out", .0.display())]
    SameFile(PathBuf),
}

/// Writes the rows of `data`, each with its prediction, to `out`, and says how many there are.
///
/// The output appears whole or not at all.
///
/// # Errors
/// What of model, rows or output cannot be used.
pub fn predict(model: &Path, data: &Path, out: &Path) -> Result<u64, PredictError> {
    let model = SavedModel::read(model)?;
    if let (Ok(data), Ok(out)) = (fs::canonicalize(data), fs::canonicalize(out))
        && data == out
    {
        return Err(PredictError::SameFile(out));
    }
    files::replace(out, 0o666, |file| Ok(model.predict_file(data, file)?))
}
