//! A trained model on disk: `model.safetensors`, which other tools read too, and `model.json`, which says all the rest.
//!
//! Both files are made as bytes; whoever has a store writes them. [`SavedModel::read`] takes them from a directory and
//! refuses a pair that does not belong together: the JSON names the hash of the weights.

use std::fs;
use std::path::Path;

use protocol::evaluation::EvaluationSummary;
use protocol::ids::Hash;
use protocol::layout::{Layout, LayoutError, from_bytes, to_bytes};
use protocol::plan::ModelSpec;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::network::Network;
use crate::schema::{Schema, SchemaError};

/// The file of the weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// The file of everything else.
pub const DESCRIPTION_FILE: &str = "model.json";

/// What the description says of itself.
const FORMAT: &str = "tributary model 1";

/// A model with its weights, and all that is needed to use it.
#[derive(Clone, Debug)]
pub struct SavedModel {
    spec: ModelSpec,
    schema: Schema,
    metrics: EvaluationSummary,
    network: Network,
    weights: Vec<f32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    format: String,
    model: ModelSpec,
    schema: Schema,
    metrics: EvaluationSummary,
    layout: Layout,
    model_hash: Hash,
}

/// Why a directory holds no model.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the sentence of each variant says what its fields are
#[non_exhaustive]
pub enum ModelError {
    /// A file is missing or cannot be read.
    #[error("{path}: cannot be read; --model names a directory with {WEIGHTS_FILE} and {DESCRIPTION_FILE}")]
    Read { path: String, source: std::io::Error },
    /// The description is not one.
    #[error("{path}: not the description of a model")]
    Description { path: String, source: serde_json::Error },
    /// Of another version.
    #[error(
        "{path}: format {got:?}, this program reads {FORMAT:?}; use the worker that came with the model's coordinator"
    )]
    Format { path: String, got: String },
    /// Its schema contradicts itself.
    #[error("{path}: its schema cannot be used")]
    Schema { path: String, source: SchemaError },
    /// Its model is too large.
    #[error("{path}: its model cannot be made")]
    Layout { path: String, source: LayoutError },
    /// The weights are not a safetensors file.
    #[error("{path}: not a safetensors file")]
    Weights { path: String, source: safetensors::SafeTensorError },
    /// The weights are not those that the description is of.
    #[error("{path}: not the weights that {DESCRIPTION_FILE} describes: {what}")]
    Foreign { path: String, what: String },
}

impl SavedModel {
    /// A model as training left it.
    ///
    /// # Errors
    /// If `spec` and `schema` make no model.
    ///
    /// # Panics
    /// If `weights` has another length than the layout.
    pub fn new(
        spec: ModelSpec,
        schema: Schema,
        metrics: EvaluationSummary,
        weights: Vec<f32>,
    ) -> Result<Self, LayoutError> {
        let network = Network::new(&spec, &schema)?;
        assert_eq!(network.layout().parameters(), weights.len() as u64, "as many weights as the layout has");
        Ok(Self { spec, schema, metrics, network, weights })
    }

    /// The schema that rows are encoded by.
    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The evaluation that was saved with it.
    #[must_use]
    pub fn metrics(&self) -> &EvaluationSummary {
        &self.metrics
    }

    /// The hash of the model.
    #[must_use]
    pub fn hash(&self) -> Hash {
        self.network.layout().model_hash(&to_bytes(&self.weights))
    }

    /// The weights, in layout order.
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The bytes of [`WEIGHTS_FILE`].
    ///
    /// # Panics
    /// Never: a layout's tensors always make a safetensors file.
    #[must_use]
    pub fn weights_file(&self) -> Vec<u8> {
        let raw = to_bytes(&self.weights);
        let mut rest = raw.as_slice();
        let tensors = self.network.layout().tensors().iter().map(|tensor| {
            let shape: Vec<usize> = tensor.shape.iter().map(|&n| n as usize).collect();
            let (data, behind) = rest.split_at(shape.iter().product::<usize>() * 4);
            rest = behind;
            (tensor.name.as_str(), TensorView::new(Dtype::F32, shape, data).expect("as many bytes as the shape has"))
        });
        safetensors::serialize(tensors, None).expect("tensors of a layout have names of their own")
    }

    /// The bytes of [`DESCRIPTION_FILE`], for a person to read too.
    ///
    /// # Panics
    /// Never: a description is finite numbers and text.
    #[must_use]
    pub fn description_file(&self) -> Vec<u8> {
        let description = Description {
            format: FORMAT.to_owned(),
            model: self.spec.clone(),
            schema: self.schema.clone(),
            metrics: self.metrics,
            layout: self.network.layout().clone(),
            model_hash: self.hash(),
        };
        let mut bytes = serde_json::to_vec_pretty(&description).expect("a description always has a JSON");
        bytes.push(b'\n');
        bytes
    }

    /// The model in `directory`.
    ///
    /// # Errors
    /// If a file is missing, not what it should be, or the two do not belong together.
    pub fn read(directory: &Path) -> Result<Self, ModelError> {
        let path = directory.join(DESCRIPTION_FILE);
        let shown = path.display().to_string();
        let description = describe(&read(&path)?, &shown)?;
        let network = Network::new(&description.model, &description.schema)
            .map_err(|source| ModelError::Layout { path: shown.clone(), source })?;
        let path = directory.join(WEIGHTS_FILE);
        let weights = weights(&read(&path)?, network.layout(), &path.display().to_string())?;
        let Description { model: spec, schema, metrics, model_hash, .. } = description;
        let model = Self { spec, schema, metrics, network, weights };
        if model.hash() != model_hash {
            let what = format!("their hash is {}, expected {model_hash}", model.hash());
            return Err(ModelError::Foreign { path: path.display().to_string(), what });
        }
        Ok(model)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    fs::read(path).map_err(|source| ModelError::Read { path: path.display().to_string(), source })
}

fn describe(bytes: &[u8], path: &str) -> Result<Description, ModelError> {
    #[derive(Deserialize)]
    struct Versioned {
        format: String,
    }
    let unreadable = |source| ModelError::Description { path: path.to_owned(), source };
    // The format first: of another one, no other field can be relied on.
    let Versioned { format: got } = serde_json::from_slice(bytes).map_err(unreadable)?;
    if got != FORMAT {
        return Err(ModelError::Format { path: path.to_owned(), got });
    }
    let description: Description = serde_json::from_slice(bytes).map_err(unreadable)?;
    description.schema.check().map_err(|source| ModelError::Schema { path: path.to_owned(), source })?;
    Ok(description)
}

fn weights(bytes: &[u8], layout: &Layout, path: &str) -> Result<Vec<f32>, ModelError> {
    let file =
        SafeTensors::deserialize(bytes).map_err(|source| ModelError::Weights { path: path.to_owned(), source })?;
    let foreign = |what: String| ModelError::Foreign { path: path.to_owned(), what };
    let mut weights = Vec::new();
    for expected in layout.tensors() {
        let name = &expected.name;
        let tensor = file.tensor(name).map_err(|_| foreign(format!("no tensor {name:?}")))?;
        let same_shape = tensor.shape().iter().map(|&n| n as u64).eq(expected.shape.iter().map(|&n| u64::from(n)));
        if tensor.dtype() != Dtype::F32 || !same_shape {
            return Err(foreign(format!("tensor {name:?} is {:?} {:?}", tensor.dtype(), tensor.shape())));
        }
        weights.extend(from_bytes(tensor.data()).unwrap_or_default());
    }
    Ok(weights)
}
