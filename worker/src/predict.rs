//! Predictions with a finished model. Needs the model's directory and nothing else: no state, no coordinator.

use std::fs::{self, File};
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
/// The output appears whole or not at all, unless it is a device or a pipe.
///
/// # Errors
/// What of model, rows or output cannot be used.
pub fn predict(model: &Path, data: &Path, out: &Path) -> Result<u64, PredictError> {
    let model = SavedModel::read(model)?;
    if let (Ok(input), Ok(output)) = (fs::canonicalize(data), fs::canonicalize(out))
        && input == output
    {
        return Err(PredictError::SameFile(out.to_owned()));
    }
    // A device or a pipe, such as /dev/stdout, is written to: put in its place, a file would do harm.
    if fs::metadata(out).is_ok_and(|there| !there.is_file() && !there.is_dir()) {
        let stream = File::options().write(true).open(out).map_err(|e| FileError::new(out, "write", e))?;
        return Ok(model.predict_file(data, stream)?);
    }
    // A link stays one, and what it leads to is replaced.
    let is_link = fs::symlink_metadata(out).is_ok_and(|there| there.is_symlink());
    let target = fs::canonicalize(out).ok().filter(|_| is_link);
    files::replace(target.as_deref().unwrap_or(out), 0o666, |file| Ok(model.predict_file(data, file)?))
}
