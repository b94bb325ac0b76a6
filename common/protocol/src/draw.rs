//! Keyed randomness: the same key gives the same draws, on every machine, in every order of asking.
//!
//! Selection, initial weights, shuffles and splits are drawn from here, so that a run is a function of its plan and
//! data. A generator is the extendable output of BLAKE3 over `seed ‖ purpose ‖ round ‖ name`; there is no state
//! that could be advanced by somebody else. Keys, nonces and tokens never come from here: they come from the
//! operating system, in the shells.

/// A stream of draws under one key.
#[derive(Debug)]
pub struct Draw {
    reader: blake3::OutputReader,
    block: [u8; BLOCK],
    used: usize,
}

const BLOCK: usize = 64;
const CONTEXT: &str = "tributary draw 1";

impl Draw {
    /// The draws for `purpose` (a constant of the caller), `round` (0 where there is none) and `name` (of a worker,
    /// a tensor, a file; empty where there is none).
    #[must_use]
    pub fn new(seed: u64, purpose: &'static str, round: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(&(purpose.len() as u64).to_le_bytes());
        hasher.update(purpose.as_bytes());
        hasher.update(&round.to_le_bytes());
        hasher.update(name.as_bytes());
        Self { reader: hasher.finalize_xof(), block: [0; BLOCK], used: BLOCK }
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        if self.used == BLOCK {
            self.reader.fill(&mut self.block);
            self.used = 0;
        }
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.block[self.used..self.used + 8]);
        self.used += 8;
        u64::from_le_bytes(bytes)
    }

    /// Uniform in [0, 1), a multiple of 2^-53.
    #[allow(clippy::cast_precision_loss)] // 53 bits fit an f64 exactly
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0..`n`, without bias (Lemire 2019, "Fast Random Integer Generation in an Interval").
    ///
    /// # Panics
    /// If `n` is 0: there is nothing to draw.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "a draw below 0");
        let threshold = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            #[allow(clippy::cast_possible_truncation)] // the low and the high half are what is wanted
            let (low, high) = (wide as u64, (wide >> 64) as u64);
            if low >= threshold {
                return high;
            }
        }
    }

    /// Puts `items` in a uniformly drawn order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = usize::try_from(self.below(last as u64 + 1)).unwrap_or(last);
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_is_a_function_of_its_key() {
        let take = |seed, purpose, round, name| {
            let mut draw = Draw::new(seed, purpose, round, name);
            [draw.next_u64(), draw.next_u64()]
        };
        assert_eq!(take(7, "select", 1, "a"), take(7, "select", 1, "a"));
        for other in
            [take(8, "select", 1, "a"), take(7, "init", 1, "a"), take(7, "select", 2, "a"), take(7, "select", 1, "b")]
        {
            assert_ne!(take(7, "select", 1, "a"), other);
        }
    }

    #[test]
    fn draws_are_uniform_and_in_range() {
        let mut draw = Draw::new(1, "test", 0, "");
        let mut counts = [0u32; 5];
        for _ in 0..50_000 {
            counts[usize::try_from(draw.below(5)).unwrap_or(9)] += 1;
            assert!((0.0..1.0).contains(&draw.uniform()));
        }
        // Five standard deviations of a binomial with p = 1/5 are 447.
        assert!(counts.iter().all(|c| (9_553..=10_447).contains(c)), "{counts:?}");
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..1000).collect();
        Draw::new(1, "shuffle", 0, "").shuffle(&mut items);
        assert_ne!(items, (0..1000).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..1000).collect::<Vec<_>>());
    }
}
