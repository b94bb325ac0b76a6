//! The exact sum: updates folded into a ring of 64-bit integers.
//!
//! A parameter `x` of an update with weight `w` enters its cell as `round_ties_even(x · w · 2^s)`, added modulo
//! 2^64. Integer addition commutes, so the sum depends on the *set* of updates and never on their order, and
//! partial sums merge exactly.

use serde::{Deserialize, Serialize};

/// The arithmetic of a sum. Part of the plan's hash.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ring {
    /// `s`: a unit of a cell is 2^-s.
    pub scale_log2: u32,
    /// The largest weight of an update.
    pub weight_max: u32,
    /// The largest L2 norm of an update, over its whole payload.
    pub norm_max: f64,
    /// The most updates in one sum.
    pub updates_max: u32,
}

impl Ring {
    /// The default: weights up to 2^20, norms up to 2^8, s = 23.
    #[must_use]
    pub const fn weighted() -> Self {
        Self { scale_log2: 23, weight_max: 1 << 20, norm_max: 256.0, updates_max: crate::limits::UPDATES_MAX }
    }
}
