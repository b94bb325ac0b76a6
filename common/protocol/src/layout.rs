//! The layout of a model: which tensors, in which order, of which shape.
//!
//! Tensors travel as raw little-endian `f32` in layout order, names sorted. A layout has a fingerprint, and a model
//! hash is BLAKE3 over that fingerprint and the raw bytes: so two models with the same bytes but other shapes
//! differ.

use serde::{Deserialize, Serialize};

use crate::ids::Hash;
use crate::limits::{MODEL_BYTES_MAX, TENSOR_DIMENSIONS_MAX, TENSOR_NAME_LEN_MAX, TENSORS_MAX};

/// One tensor of 32-bit floats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// The parameter's name, such as `layer0.weight`.
    pub name: String,
    /// Its dimensions, outermost first.
    pub shape: Vec<u32>,
}

impl TensorSpec {
    /// How many elements it has.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| u64::from(n)).fold(1, u64::saturating_mul)
    }
}

/// The tensors of a model, sorted by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    tensors: Vec<TensorSpec>,
}

/// Why some tensors are not a layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There are none, or too many.
    #[error("{got} tensors, expected 1 to {TENSORS_MAX}")]
    Count {
        /// How many there are.
        got: usize,
    },
    /// A name is empty, too long, or there twice.
    #[error("tensor name {name:?} is empty, longer than {TENSOR_NAME_LEN_MAX} bytes, or there twice")]
    Name {
        /// The name.
        name: String,
    },
    /// A shape has too many dimensions, or an empty one.
    #[error("tensor {name:?} has an empty dimension or more than {TENSOR_DIMENSIONS_MAX}")]
    Shape {
        /// The tensor's name.
        name: String,
    },
    /// All together are too large.
    #[error("the model has {got} bytes, the most is {MODEL_BYTES_MAX}")]
    Bytes {
        /// How many bytes there are; saturates.
        got: u64,
    },
}

impl Layout {
    /// The layout of `tensors`, in any order.
    ///
    /// # Errors
    /// If a name is unfit or there twice, or a bound of [`crate::limits`] is passed.
    pub fn new(mut tensors: Vec<TensorSpec>) -> Result<Self, LayoutError> {
        if !(1..=TENSORS_MAX).contains(&tensors.len()) {
            return Err(LayoutError::Count { got: tensors.len() });
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        for (at, tensor) in tensors.iter().enumerate() {
            let name = &tensor.name;
            let twice = at > 0 && tensors[at - 1].name == *name;
            if !(1..=TENSOR_NAME_LEN_MAX).contains(&name.len()) || twice {
                return Err(LayoutError::Name { name: name.clone() });
            }
            if tensor.shape.len() > TENSOR_DIMENSIONS_MAX || tensor.shape.contains(&0) {
                return Err(LayoutError::Shape { name: name.clone() });
            }
        }
        let layout = Self { tensors };
        let got = layout.bytes();
        if got > MODEL_BYTES_MAX { Err(LayoutError::Bytes { got }) } else { Ok(layout) }
    }

    /// The tensors, sorted by name.
    #[must_use]
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// How many numbers a model of this layout has.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(TensorSpec::elements).fold(0, u64::saturating_add)
    }

    /// How many bytes it takes on the wire.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.parameters().saturating_mul(4)
    }

    /// What tells this layout from every other.
    #[must_use]
    pub fn fingerprint(&self) -> Hash {
        let mut hasher = blake3::Hasher::new_derive_key("tributary layout 1");
        for tensor in &self.tensors {
            hasher.update(&(tensor.name.len() as u64).to_le_bytes());
            hasher.update(tensor.name.as_bytes());
            hasher.update(b"f32");
            hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
            for dimension in &tensor.shape {
                hasher.update(&dimension.to_le_bytes());
            }
        }
        hasher.finalize().into()
    }

    /// The hash of a model: over the fingerprint and the raw little-endian tensors.
    #[must_use]
    pub fn model_hash(&self, raw: &[u8]) -> Hash {
        let mut hasher = model_hasher(&self.fingerprint());
        hasher.update(raw);
        hasher.finalize().into()
    }
}

/// A hasher that has taken in `fingerprint` and waits for the raw tensors.
#[must_use]
pub fn model_hasher(fingerprint: &Hash) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(fingerprint.as_bytes());
    hasher
}

impl<'de> Deserialize<'de> for Layout {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            tensors: Vec<TensorSpec>,
        }
        Self::new(Raw::deserialize(deserializer)?.tensors).map_err(serde::de::Error::custom)
    }
}

/// The bytes of `values`, little-endian.
#[must_use]
pub fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut raw = vec![0; values.len() * 4];
    for (bytes, value) in raw.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
    raw
}

/// The values of `raw`, or nothing if its length is not a multiple of four.
#[must_use]
pub fn from_bytes(raw: &[u8]) -> Option<Vec<f32>> {
    let (chunks, rest) = raw.as_chunks::<4>();
    rest.is_empty().then(|| chunks.iter().map(|c| f32::from_le_bytes(*c)).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tensor(name: &str, shape: &[u32]) -> TensorSpec {
        TensorSpec { name: name.to_owned(), shape: shape.to_vec() }
    }

    #[test]
    fn order_of_declaration_does_not_matter_but_shape_does() {
        let a = Layout::new(vec![tensor("w", &[2, 3]), tensor("b", &[3])]).unwrap();
        let b = Layout::new(vec![tensor("b", &[3]), tensor("w", &[2, 3])]).unwrap();
        let c = Layout::new(vec![tensor("b", &[3]), tensor("w", &[3, 2])]).unwrap();
        assert_eq!(a, b);
        assert_eq!((a.parameters(), a.bytes()), (9, 36));
        assert_ne!(a.fingerprint(), c.fingerprint());
        assert_ne!(a.model_hash(&[0; 36]), c.model_hash(&[0; 36]));
    }

    #[test]
    fn unfit_tensors_are_refused_by_name() {
        let twice = Layout::new(vec![tensor("w", &[1]), tensor("w", &[2])]);
        assert_eq!(twice, Err(LayoutError::Name { name: "w".into() }));
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Count { got: 0 }));
        assert_eq!(Layout::new(vec![tensor("w", &[0])]), Err(LayoutError::Shape { name: "w".into() }));
        let huge = Layout::new(vec![tensor("w", &[u32::MAX, u32::MAX, u32::MAX])]);
        assert_eq!(huge, Err(LayoutError::Bytes { got: u64::MAX }));
    }

    #[test]
    fn each_limit_may_be_reached_and_not_passed() {
        let many = |count: usize| Layout::new((0..count).map(|n| tensor(&n.to_string(), &[1])).collect());
        assert!(many(TENSORS_MAX).is_ok());
        assert_eq!(many(TENSORS_MAX + 1), Err(LayoutError::Count { got: TENSORS_MAX + 1 }));
        let named = |length: usize| Layout::new(vec![tensor(&"n".repeat(length), &[1])]);
        assert!(named(TENSOR_NAME_LEN_MAX).is_ok());
        assert!(matches!(named(TENSOR_NAME_LEN_MAX + 1), Err(LayoutError::Name { .. })));
        let deep = |dimensions: usize| Layout::new(vec![tensor("w", &vec![1; dimensions])]);
        assert!(deep(TENSOR_DIMENSIONS_MAX).is_ok());
        assert_eq!(deep(TENSOR_DIMENSIONS_MAX + 1), Err(LayoutError::Shape { name: "w".into() }));
        let most = u32::try_from(MODEL_BYTES_MAX / 4).unwrap();
        assert!(Layout::new(vec![tensor("w", &[most])]).is_ok());
        let over = Layout::new(vec![tensor("w", &[most]), tensor("b", &[1])]);
        assert_eq!(over, Err(LayoutError::Bytes { got: MODEL_BYTES_MAX + 4 }));
    }

    #[test]
    fn floats_survive_the_wire() {
        let values = [0.0, -1.5, f32::MIN_POSITIVE, f32::MAX];
        assert_eq!(from_bytes(&to_bytes(&values)).unwrap(), values);
        assert_eq!(from_bytes(&[0; 5]), None);
    }
}
