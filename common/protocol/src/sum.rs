//! The exact sum: updates folded into a ring of 64-bit integers.
//!
//! A parameter `x` of an update with weight `w` enters its cell as `round_ties_even(x · w · 2^s)`, added modulo
//! 2^64. Integer addition commutes, so the sum depends on the *set* of updates and never on their order, and
//! partial sums merge exactly. Before rounding to `f32`, each cell of the mean is within
//! `n · 2^-(s+1) / Σw + 2^-50 · max|x|` of the exact mean of `n` updates.
//!
//! An update is verified first and folded after the verdict: [`Verifier`] reads the payload once, in chunks of any
//! size, and is the only maker of [`Verified`], without which [`Sum::begin`] opens no [`Fold`]. Everything that can
//! be refused is refused there, before a cell changes. What remains is a payload that cannot be read back in the
//! middle of its fold; the sum is then torn, says so to whoever asks, and is made again from the held payloads.
//!
//! Worked example: with `s = 23`, the updates `[0.5]` of weight 3 and `[-0.25]` of weight 1 make the cell
//! `(1.5 - 0.25) · 2^23 = 10_485_760`, and the mean `10_485_760 / 2^23 / 4 = 0.3125`.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::ids::{Hash, TaskId};
use crate::limits::UPDATES_MAX;
use crate::messages::Refusal;
use crate::pages::Numbers;

/// The arithmetic of a sum. Part of the plan's hash. [`Ring::new`] checks it, and so does reading one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawRing")]
pub struct Ring {
    /// `s`: a unit of a cell is 2^-s. At most 51.
    pub scale_log2: u32,
    /// The largest weight of an update, 1 to 2^29.
    pub weight_max: u32,
    /// The largest L2 norm of an update, over its whole payload; finite and above 0.
    pub norm_max: f64,
    /// The most updates in one sum, 1 to [`UPDATES_MAX`].
    pub updates_max: u32,
}

/// Why some figures are not a ring.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum RingError {
    /// The unit is too small.
    #[error("the ring's scale is 2^{got}, the most is 2^{SCALE_LOG2_MAX}")]
    Scale {
        /// Its exponent.
        got: u32,
    },
    /// Zero, or too large to multiply without rounding.
    #[error("the ring's largest weight is {got}, expected 1 to {WEIGHT_MAX}")]
    Weight {
        /// The weight.
        got: u32,
    },
    /// Not a length.
    #[error("the ring's largest norm is {got}, expected a finite number above 0")]
    Norm {
        /// The norm.
        got: f64,
    },
    /// Zero, or more than cells have room for.
    #[error("the ring's most updates are {got}, expected 1 to {UPDATES_MAX}")]
    Updates {
        /// How many.
        got: u32,
    },
    /// One update could leave the range in which it is rounded exactly.
    #[error("the ring's scale times weight times norm is {got}, the most is 2^51: lower one of them")]
    Range {
        /// The product.
        got: f64,
    },
}

/// Beyond this a unit is smaller than any cell can count.
const SCALE_LOG2_MAX: u32 = 51;

/// An `f32` has 24 bits: times a weight of at most 2^29 it is still exact in the 53 bits of an `f64`, and so is the
/// sum of [`UPDATES_MAX`] such weights.
const WEIGHT_MAX: u32 = 1 << 29;

/// The largest magnitude with which a parameter may enter: see [`ROUNDER`].
const ENTRY_MAX: f64 = (1u64 << 51) as f64;

/// `1.5 · 2^52`. Between 2^52 and 2^53 doubles are the integers, so adding this to a number of magnitude at most 2^51
/// rounds it to an integer, ties to even because this is even, and the integer stands in the low bits of the result.
/// It is `round_ties_even` at five times the speed, since every step of it vectorises.
const ROUNDER: f64 = 6_755_399_441_055_744.0;

// A full sum of the largest entries stays within an `i64`.
const _: () = assert!(ENTRY_MAX * UPDATES_MAX as f64 <= (1u64 << 62) as f64);
const _: () = assert!(UPDATES_MAX <= 1 << 11);
const _: () = assert!((WEIGHT_MAX as u64) * (UPDATES_MAX as u64) <= 1 << 53);
const _: () = assert!(Ring::weighted().check().is_ok());
const _: () = assert!(Ring::unweighted().check().is_ok());

impl Ring {
    /// A ring of these figures.
    ///
    /// # Errors
    /// If one is out of its range, or `2^scale_log2 · weight_max · norm_max` is above 2^51.
    pub const fn new(scale_log2: u32, weight_max: u32, norm_max: f64, updates_max: u32) -> Result<Self, RingError> {
        let ring = Self { scale_log2, weight_max, norm_max, updates_max };
        match ring.check() {
            Ok(()) => Ok(ring),
            Err(error) => Err(error),
        }
    }

    /// The default: weights up to 2^20, norms up to 2^8, s = 23.
    #[must_use]
    pub const fn weighted() -> Self {
        Self { scale_log2: 23, weight_max: 1 << 20, norm_max: 256.0, updates_max: UPDATES_MAX }
    }

    /// For updates that all weigh 1: norms up to 2^8, s = 43.
    #[must_use]
    pub const fn unweighted() -> Self {
        Self { scale_log2: 43, weight_max: 1, norm_max: 256.0, updates_max: UPDATES_MAX }
    }

    const fn check(&self) -> Result<(), RingError> {
        if self.scale_log2 > SCALE_LOG2_MAX {
            return Err(RingError::Scale { got: self.scale_log2 });
        }
        if self.weight_max < 1 || self.weight_max > WEIGHT_MAX {
            return Err(RingError::Weight { got: self.weight_max });
        }
        if !(self.norm_max.is_finite() && self.norm_max > 0.0) {
            return Err(RingError::Norm { got: self.norm_max });
        }
        if self.updates_max < 1 || self.updates_max > UPDATES_MAX {
            return Err(RingError::Updates { got: self.updates_max });
        }
        let got = self.unit() * self.weight_max as f64 * self.norm_max;
        if got > ENTRY_MAX { Err(RingError::Range { got }) } else { Ok(()) }
    }

    /// 2^s, exactly.
    const fn unit(&self) -> f64 {
        (1u64 << self.scale_log2) as f64
    }

    /// Refuses a weight of zero or over the cap.
    fn check_weight(&self, weight: u32) -> Result<(), Refusal> {
        let max = self.weight_max;
        if (1..=max).contains(&weight) { Ok(()) } else { Err(Refusal::WrongWeight { got: weight, max }) }
    }

    /// Refuses a norm past the bound, and one that is not a number.
    fn check_norm(&self, norm: f64) -> Result<(), Refusal> {
        let max = self.norm_max;
        if norm <= max { Ok(()) } else { Err(Refusal::NormTooLong { got: norm, max }) }
    }
}

/// What is read before it is a [`Ring`].
#[derive(Deserialize)]
struct RawRing {
    scale_log2: u32,
    weight_max: u32,
    norm_max: f64,
    updates_max: u32,
}

impl TryFrom<RawRing> for Ring {
    type Error = RingError;

    fn try_from(raw: RawRing) -> Result<Self, RingError> {
        Self::new(raw.scale_log2, raw.weight_max, raw.norm_max, raw.updates_max)
    }
}

/// By how many bits row counts up to `examples_max` are shifted down to be weights up to `weight_max`.
#[must_use]
pub const fn weight_shift(examples_max: u64, weight_max: u32) -> u32 {
    let mut shift = 0;
    while shift < u64::BITS && examples_max >> shift > weight_max as u64 {
        shift += 1;
    }
    shift
}

/// The weight of an update made from `examples` rows: shifted down, then clamped to 1 ..= `weight_max`.
#[must_use]
pub fn weight(examples: u64, shift: u32, weight_max: u32) -> u32 {
    let shifted = examples.checked_shr(shift).unwrap_or(0);
    u32::try_from(shifted).unwrap_or(u32::MAX).clamp(1, weight_max.max(1))
}

/// Compares a payload of any kind with what its manifest says of it, while it is read: length and hash.
#[derive(Clone, Debug)]
pub struct Checker {
    hasher: blake3::Hasher,
    taken: u64,
    expected: u64,
    hash: Hash,
}

impl Checker {
    /// Waits for `bytes` bytes of BLAKE3 `hash`.
    #[must_use]
    pub fn new(bytes: u64, hash: Hash) -> Self {
        Self { hasher: blake3::Hasher::new(), taken: 0, expected: bytes, hash }
    }

    /// Takes in the next bytes.
    ///
    /// # Errors
    /// At the first byte past the length; nothing of `chunk` is taken in then.
    pub fn update(&mut self, chunk: &[u8]) -> Result<(), Refusal> {
        self.admit(chunk)?;
        self.hasher.update(chunk);
        Ok(())
    }

    /// Counts `chunk`, which the hasher takes next.
    fn admit(&mut self, chunk: &[u8]) -> Result<(), Refusal> {
        let got = self.taken.saturating_add(chunk.len() as u64);
        if got > self.expected {
            return Err(Refusal::WrongLength { got, expected: self.expected });
        }
        self.taken = got;
        Ok(())
    }

    /// How many bytes were taken in.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.taken
    }

    /// The verdict.
    ///
    /// # Errors
    /// If bytes are missing, or their hash is another.
    pub fn finish(self) -> Result<(), Refusal> {
        if self.taken != self.expected {
            return Err(Refusal::WrongLength { got: self.taken, expected: self.expected });
        }
        if Hash::from(self.hasher.finalize()) == self.hash { Ok(()) } else { Err(Refusal::WrongHash) }
    }
}

/// An update whose length, hash, numbers and norm were found good. Only a [`Verifier`] makes one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verified {
    hash: Hash,
    norm: f64,
    bytes: u64,
}

impl Verified {
    /// The BLAKE3 of the payload.
    #[must_use]
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// The L2 norm over the whole payload.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// The length of the payload.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Verifies an update of little-endian `f32` in one pass: length, hash, finite numbers, norm.
///
/// The norm adds squares in an order that the payload alone decides (sixteen running sums, one for each position in
/// a block of sixteen numbers, added up at the end), so it does not depend on how the payload is cut. Squares of
/// `f32` are exact in `f64` and never overflow there, so their sum is finite exactly if every number is; and since
/// rounding is monotone, no single number is longer than the norm that comes out.
#[derive(Clone)]
pub struct Verifier {
    checker: Checker,
    ring: Ring,
    blocks: Blocks<{ 4 * LANES }>,
    squares: [f64; LANES],
}

/// What is hashed is squared next, while it is in the cache. Less would not do: BLAKE3 is slower in pieces below 64 KiB.
const PIECE_BYTES: usize = 64 * 1024;

/// Enough running sums that none waits for its last addition.
const LANES: usize = 16;

impl Verifier {
    /// Waits for `bytes` bytes of BLAKE3 `hash`, within the bounds of `ring`.
    #[must_use]
    pub fn new(ring: Ring, bytes: u64, hash: Hash) -> Self {
        let checker = Checker::new(bytes, hash);
        Self { checker, ring, blocks: Blocks::new(), squares: [0.0; LANES] }
    }

    /// Takes in the next bytes; a number may be cut between two calls.
    ///
    /// # Errors
    /// At the first byte past the length; nothing of `chunk` is taken in then.
    pub fn update(&mut self, chunk: &[u8]) -> Result<(), Refusal> {
        self.checker.admit(chunk)?;
        let Self { checker, blocks, squares, .. } = self;
        for piece in chunk.chunks(PIECE_BYTES) {
            checker.hasher.update(piece);
            blocks.feed(piece, |whole| add_squares(squares, whole));
        }
        Ok(())
    }

    /// How many bytes were taken in.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.checker.bytes()
    }

    /// The verdict.
    ///
    /// # Errors
    /// In this order: bytes are missing, or cut a number; their hash is another; a number is NaN or infinite; the
    /// norm is too long.
    pub fn finish(mut self) -> Result<Verified, Refusal> {
        let (hash, bytes) = (self.checker.hash, self.checker.expected);
        self.checker.finish()?;
        if bytes % 4 != 0 {
            return Err(Refusal::WrongLength { got: bytes, expected: bytes - bytes % 4 });
        }
        add_squares(&mut self.squares, &[self.blocks.padded()]);
        let squared: f64 = self.squares.iter().sum();
        if !squared.is_finite() {
            return Err(Refusal::NotFinite);
        }
        let norm = squared.sqrt();
        self.ring.check_norm(norm)?;
        Ok(Verified { hash, norm, bytes })
    }
}

/// Without the sums: they are of parameters.
impl core::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Verifier").field("checker", &self.checker).field("ring", &self.ring).finish_non_exhaustive()
    }
}

/// By AVX2 where there is one: the baseline of x86-64 takes a quarter of the hash's own time here, this an eighth.
/// Each lane takes the same steps either way, so the sums are the same bits.
fn add_squares(squares: &mut [f64; LANES], blocks: &[[u8; 4 * LANES]]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: all that it asks for is a processor with AVX2, and this is one.
        #[allow(unsafe_code)]
        return unsafe { add_squares_avx2(squares, blocks) };
    }
    add_squares_plain(squares, blocks);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_squares_avx2(squares: &mut [f64; LANES], blocks: &[[u8; 4 * LANES]]) {
    add_squares_plain(squares, blocks);
}

#[inline(always)]
fn add_squares_plain(squares: &mut [f64; LANES], blocks: &[[u8; 4 * LANES]]) {
    // In a local, so that the compiler keeps the sums in registers.
    let mut sums = *squares;
    for block in blocks {
        let (numbers, _) = block.as_chunks::<4>();
        for (sum, number) in sums.iter_mut().zip(numbers) {
            let x = f64::from(f32::from_le_bytes(*number));
            *sum += x * x;
        }
    }
    *squares = sums;
}

/// Chunks of any size, passed on as whole blocks of `N` bytes.
#[derive(Clone)]
struct Blocks<const N: usize> {
    held: [u8; N],
    /// How many of `held` are filled: less than `N` between two calls.
    filled: usize,
}

impl<const N: usize> Blocks<N> {
    fn new() -> Self {
        Self { held: [0; N], filled: 0 }
    }

    fn feed(&mut self, mut chunk: &[u8], mut each: impl FnMut(&[[u8; N]])) {
        if self.filled > 0 {
            let (head, rest) = chunk.split_at(chunk.len().min(N - self.filled));
            self.held[self.filled..][..head.len()].copy_from_slice(head);
            (self.filled, chunk) = (self.filled + head.len(), rest);
            if self.filled < N {
                return;
            }
            each(&[self.held]);
        }
        let (whole, rest) = chunk.as_chunks::<N>();
        each(whole);
        self.held[..rest.len()].copy_from_slice(rest);
        self.filled = rest.len();
    }

    /// What is held, with zeros behind it.
    fn padded(&self) -> [u8; N] {
        let mut block = [0; N];
        block[..self.filled].copy_from_slice(&self.held[..self.filled]);
        block
    }
}

/// Updates, added up. Owned by the shell's compute thread; the machines never see a cell.
#[derive(Clone, PartialEq)]
pub struct Sum {
    ring: Ring,
    tasks: BTreeSet<TaskId>,
    group: Group,
    torn: bool,
}

/// A run of tensors that share a weight and a scale: today there is exactly one, the whole model, as every manifest
/// says.
#[derive(Clone, PartialEq)]
struct Group {
    cells: Numbers<u64>,
    weight: u64,
}

/// Why something was not added, or nothing can be had. The sum is as it was, unless it is [`SumError::Torn`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum SumError {
    /// The update is out of bounds: the answer to its worker.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The task's update is in already.
    #[error("task {0} is in the sum already")]
    AlreadyIn(TaskId),
    /// The sum to be merged was made in another ring.
    #[error("the two sums are of different rings")]
    OtherRing,
    /// The sum to be merged is of another model.
    #[error("the other sum has {got} cells, expected {expected}")]
    OtherShape {
        /// Its cells.
        got: usize,
        /// Ours.
        expected: usize,
    },
    /// A payload could not be read back to its end, or had another length then: part of it is in.
    #[error("the sum is torn: a payload could not be read back whole; clear it and fold the held payloads again")]
    Torn,
    /// There is nothing to take the mean of.
    #[error("the sum is empty")]
    Empty,
}

impl Sum {
    /// Nothing yet, for updates of `parameters` numbers.
    ///
    /// # Panics
    /// If `ring` did not come from [`Ring`]'s constructors.
    #[must_use]
    pub fn new(ring: Ring, parameters: usize) -> Self {
        assert_eq!(ring.check(), Ok(()), "a ring is made by its constructors");
        let group = Group { cells: Numbers::zeroed(parameters), weight: 0 };
        Self { ring, tasks: BTreeSet::new(), group, torn: false }
    }

    /// Begins to add the update that was found good. Nothing is added before the first [`Fold::add`] or
    /// [`Fold::parts_mut`].
    ///
    /// # Errors
    /// If the task is in already, the sum is full or torn, or weight, length or norm are out of bounds.
    pub fn begin(&mut self, task: TaskId, weight: u32, verified: &Verified) -> Result<Fold<'_>, SumError> {
        self.whole()?;
        if self.tasks.contains(&task) {
            return Err(SumError::AlreadyIn(task));
        }
        self.check_room(1)?;
        self.ring.check_weight(weight)?;
        let expected = self.parameters() as u64 * 4;
        if verified.bytes != expected {
            return Err(Refusal::WrongLength { got: verified.bytes, expected }.into());
        }
        // The verifier may have been given another ring.
        self.ring.check_norm(verified.norm)?;
        // Exact: an integer of at most 29 bits times a power of two.
        let scale = self.ring.unit() * f64::from(weight);
        let Self { tasks, group: Group { cells, weight: total }, torn, .. } = self;
        Ok(Fold { tasks, total, torn, task, weight, parts: vec![Part::new(cells, 0, scale)] })
    }

    /// Adds all of `other`, as if its updates had been added here.
    ///
    /// # Errors
    /// If they share a task, differ in ring or shape, hold too many together, or one is torn.
    pub fn merge(&mut self, other: &Self) -> Result<(), SumError> {
        self.whole()?;
        other.whole()?;
        if self.ring != other.ring {
            return Err(SumError::OtherRing);
        }
        let (got, expected) = (other.parameters(), self.parameters());
        if got != expected {
            return Err(SumError::OtherShape { got, expected });
        }
        if let Some(&shared) = self.tasks.intersection(&other.tasks).next() {
            return Err(SumError::AlreadyIn(shared));
        }
        self.check_room(other.tasks.len())?;
        self.tasks.extend(&other.tasks);
        self.group.merge(&other.group);
        Ok(())
    }

    /// The mean of the updates, by their weights, cell by cell.
    ///
    /// # Errors
    /// If there are none, or the sum is torn.
    pub fn mean(&self) -> Result<impl ExactSizeIterator<Item = f64> + Clone + '_, SumError> {
        let divisor = self.divisor()?;
        Ok(means(&self.group.cells, divisor))
    }

    /// The mean, to be taken out in up to `count` parts of about the same length. Until [`Sum::drained`] the sum is torn.
    ///
    /// # Errors
    /// As [`Sum::mean`].
    pub fn drain(&mut self, count: usize) -> Result<impl ExactSizeIterator<Item = MeanPart<'_>>, SumError> {
        let divisor = self.divisor()?;
        self.torn = true;
        let each = self.parameters().div_ceil(count.max(1)).next_multiple_of(CUT_CELLS).max(CUT_CELLS);
        Ok(self.group.cells.chunks_mut(each).map(move |cells| MeanPart { cells, divisor }))
    }

    /// Says that all parts of [`Sum::drain`] were cleared: the sum is empty.
    pub fn drained(&mut self) {
        debug_assert!(self.group.cells.iter().all(|cell| *cell == 0), "each part was cleared");
        self.tasks.clear();
        self.torn = false;
        self.group.weight = 0;
    }

    fn divisor(&self) -> Result<f64, SumError> {
        self.whole()?;
        if self.group.weight == 0 {
            return Err(SumError::Empty);
        }
        // Exact: at most 40 bits of weight times a power of two. A cell's cast and the division round once each,
        // which the second term of the bound allows.
        Ok(self.ring.unit() * self.group.weight as f64)
    }

    /// What no number of [`Sum::mean`] is larger than, whatever was added.
    #[must_use]
    pub fn mean_max(&self) -> f64 {
        -(i64::MIN as f64) / self.ring.unit()
    }

    /// Empties it, keeping its memory for the next round. Also mends a torn one.
    pub fn clear(&mut self) {
        self.tasks.clear();
        self.torn = false;
        self.group.cells.fill(0);
        self.group.weight = 0;
    }

    /// The tasks whose updates are in.
    #[must_use]
    pub fn tasks(&self) -> &BTreeSet<TaskId> {
        &self.tasks
    }

    /// The sum of the weights.
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.group.weight
    }

    /// How many numbers an update has.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.group.cells.len()
    }

    /// Whether a fold was not ended, so that nothing can be had from it.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    fn whole(&self) -> Result<(), SumError> {
        if self.torn { Err(SumError::Torn) } else { Ok(()) }
    }

    fn check_room(&self, more: usize) -> Result<(), Refusal> {
        let fits = (self.tasks.len() + more) as u64 <= u64::from(self.ring.updates_max);
        if fits { Ok(()) } else { Err(Refusal::TooMany) }
    }
}

fn means(cells: &[u64], divisor: f64) -> impl ExactSizeIterator<Item = f64> + Clone + '_ {
    cells.iter().map(move |cell| cell.cast_signed() as f64 / divisor)
}

/// Some cells of a [`Sum`], whose mean is taken out.
pub struct MeanPart<'a> {
    cells: &'a mut [u64],
    divisor: f64,
}

/// Without the cells: they are parameters.
impl core::fmt::Debug for MeanPart<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MeanPart").field("cells", &self.cells.len()).finish_non_exhaustive()
    }
}

impl MeanPart<'_> {
    /// How many there are.
    #[must_use]
    pub fn parameters(&self) -> usize {
        self.cells.len()
    }

    /// Their means.
    pub fn means(&self) -> impl ExactSizeIterator<Item = f64> + Clone + '_ {
        means(self.cells, self.divisor)
    }

    /// The same in blocks of up to `each` cells.
    pub(crate) fn blocks(&mut self, each: usize) -> impl Iterator<Item = MeanPart<'_>> {
        let divisor = self.divisor;
        self.cells.chunks_mut(each).map(move |cells| MeanPart { cells, divisor })
    }

    /// Leaves zeros.
    pub(crate) fn clear(&mut self) {
        self.cells.fill(0);
    }
}

/// Without the cells: they are parameters.
impl core::fmt::Debug for Sum {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Sum")
            .field("ring", &self.ring)
            .field("tasks", &self.tasks)
            .field("weight", &self.weight())
            .field("parameters", &self.parameters())
            .field("torn", &self.torn)
            .finish()
    }
}

impl Group {
    fn merge(&mut self, other: &Self) {
        self.weight += other.weight;
        for (cell, theirs) in self.cells.iter_mut().zip(other.cells.iter()) {
            *cell = cell.wrapping_add(*theirs);
        }
    }
}

/// An update on its way into a [`Sum`]. Dropped after its first byte and before [`Fold::finish`], it leaves the sum
/// torn: part of the payload is in, and only the payload could say which.
#[must_use = "a fold that is not finished leaves its sum torn"]
pub struct Fold<'a> {
    tasks: &'a mut BTreeSet<TaskId>,
    /// The sum of the weights.
    total: &'a mut u64,
    torn: &'a mut bool,
    task: TaskId,
    weight: u32,
    parts: Vec<Part<'a>>,
}

/// Without the bytes that it holds: they are of parameters.
impl core::fmt::Debug for Fold<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Fold").field("task", &self.task).field("weight", &self.weight).finish_non_exhaustive()
    }
}

impl<'a> Fold<'a> {
    /// Cuts it into up to `count` parts of about the same length. Each has cells of its own, so they may be folded at the
    /// same time, and in any order.
    ///
    /// # Panics
    /// If something was added already.
    pub fn cut(&mut self, count: usize) {
        assert!(!*self.torn, "a fold is cut before anything is added");
        let cells: usize = self.parts.iter().map(|part| part.cells.len()).sum();
        let each = cells.div_ceil(count.max(1)).next_multiple_of(CUT_CELLS);
        self.parts = std::mem::take(&mut self.parts).into_iter().flat_map(|part| part.cut(each)).collect();
    }

    /// Its parts, in the order of the payload; one, if it was not cut.
    #[must_use]
    pub fn parts(&self) -> &[Part<'a>] {
        &self.parts
    }

    /// Its parts, to be added to: the sum is torn until all are whole.
    pub fn parts_mut(&mut self) -> &mut [Part<'a>] {
        *self.torn = true;
        &mut self.parts
    }

    /// Adds the next bytes of the payload that was verified, if it was not cut into parts; a number may be cut between two
    /// calls.
    pub fn add(&mut self, chunk: &[u8]) {
        assert_eq!(self.parts.len(), 1, "of a fold in parts, each is added to by itself");
        self.parts_mut()[0].add(chunk);
    }

    /// Counts the update.
    ///
    /// # Errors
    /// If what was read back has not the length that was verified. The sum is torn then.
    pub fn finish(self) -> Result<(), SumError> {
        let Self { tasks, total, torn, task, weight, parts } = self;
        *torn = !parts.iter().all(Part::is_whole);
        if *torn {
            return Err(SumError::Torn);
        }
        tasks.insert(task);
        *total += u64::from(weight);
        Ok(())
    }
}

/// A part of a [`Fold`]: some cells, and the bytes of the payload that are added to them.
pub struct Part<'a> {
    cells: &'a mut [u64],
    /// How many cells of the sum are before these.
    before: usize,
    scale: f64,
    blocks: Blocks<4>,
    /// The next cell; past the last one if there was too much.
    at: usize,
}

/// Without the bytes that it holds: they are of parameters.
impl core::fmt::Debug for Part<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Part").field("bytes", &self.bytes()).field("at", &self.at).finish_non_exhaustive()
    }
}

impl<'a> Part<'a> {
    fn new(cells: &'a mut [u64], before: usize, scale: f64) -> Self {
        Self { cells, before, scale, blocks: Blocks::new(), at: 0 }
    }

    /// Parts of `each` cells; the last one may have fewer.
    fn cut(self, each: usize) -> impl Iterator<Item = Self> {
        let Self { cells, before, scale, .. } = self;
        let parts = cells.chunks_mut(each.max(1)).enumerate();
        parts.map(move |(at, cells)| Self::new(cells, before + at * each, scale))
    }

    /// Which bytes of the payload are its own.
    #[must_use]
    pub fn bytes(&self) -> Range<u64> {
        let first = self.before as u64 * 4;
        first..first + self.cells.len() as u64 * 4
    }

    /// Adds the next of them; a number may be cut between two calls.
    pub fn add(&mut self, chunk: &[u8]) {
        let Self { cells, scale, blocks, at, .. } = self;
        blocks.feed(chunk, |numbers| {
            fold(cells.get_mut(*at..).unwrap_or_default(), numbers, *scale);
            *at = at.saturating_add(numbers.len());
        });
    }

    fn is_whole(&self) -> bool {
        self.at == self.cells.len() && self.blocks.filled == 0
    }
}

/// Parts begin at a multiple of so many cells: where a page of the payload does, and no cache line is in two.
const CUT_CELLS: usize = 1024;

/// Adds `round_ties_even(x · scale)` to each cell, for products of magnitude at most 2^51. Everything but the
/// addition of [`ROUNDER`] is exact.
///
/// The numbers come from a block that is in the cache already; the cells come from memory, which is what it waits for.
fn fold(cells: &mut [u64], numbers: &[[u8; 4]], scale: f64) {
    let both = cells.len().min(numbers.len());
    let (steps, last_cells) = cells[..both].as_chunks_mut::<FOLD_STEP>();
    let (numbers, last_numbers) = numbers[..both].as_chunks::<FOLD_STEP>();
    for (cells, numbers) in steps.iter_mut().zip(numbers) {
        prefetch(cells);
        add_rounded(cells, numbers, scale);
    }
    add_rounded(last_cells, last_numbers, scale);
}

#[inline(always)]
fn add_rounded(cells: &mut [u64], numbers: &[[u8; 4]], scale: f64) {
    for (cell, number) in cells.iter_mut().zip(numbers) {
        let rounded = f64::from(f32::from_le_bytes(*number)) * scale + ROUNDER;
        *cell = cell.wrapping_add(rounded.to_bits().wrapping_sub(ROUNDER.to_bits()));
    }
}

/// Cells between two calls of [`prefetch`]: four cache lines of 64 bytes.
const FOLD_STEP: usize = 32;

/// How far ahead, in cells. A processor's own prefetcher ends at each page of 4 KiB; this crosses it.
#[cfg(target_arch = "x86_64")]
const PREFETCH_AHEAD: usize = 256;

/// Asks for the cache lines [`PREFETCH_AHEAD`] cells on from `cells`: without it a fold takes a fifth longer.
#[cfg(target_arch = "x86_64")]
fn prefetch(cells: &[u64]) {
    use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    let ahead = cells.as_ptr().wrapping_add(PREFETCH_AHEAD);
    for line in 0..FOLD_STEP / 8 {
        // SAFETY: a hint is not an access. It reads nothing that the program can see, it faults at no address, and the
        // pointer, which may lie behind the last cell, is made without claiming that anything is there.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(8 * line).cast());
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: &[u64]) {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use proptest::prelude::*;

    use super::*;
    use crate::layout::to_bytes;

    /// A ring that is small enough to step past.
    fn small() -> Ring {
        Ring::new(23, 8, 256.0, 2).unwrap()
    }

    fn verify(ring: Ring, raw: &[u8]) -> Result<Verified, Refusal> {
        let mut verifier = Verifier::new(ring, raw.len() as u64, Hash::of(raw));
        verifier.update(raw)?;
        verifier.finish()
    }

    fn add(sum: &mut Sum, task: u64, weight: u32, values: &[f32]) -> Result<(), SumError> {
        let raw = to_bytes(values);
        let verified = verify(sum.ring, &raw)?;
        let mut fold = sum.begin(TaskId(task), weight, &verified)?;
        fold.add(&raw);
        fold.finish()
    }

    fn sum_of(ring: Ring, updates: &[(u64, u32, Vec<f32>)]) -> Sum {
        let mut sum = Sum::new(ring, updates[0].2.len());
        updates.iter().for_each(|(task, weight, values)| add(&mut sum, *task, *weight, values).unwrap());
        sum
    }

    fn bits(sum: &Sum) -> Vec<u64> {
        sum.mean().unwrap().map(f64::to_bits).collect()
    }

    #[test]
    fn the_worked_example_holds() {
        let sum = sum_of(Ring::weighted(), &[(1, 3, vec![0.5]), (2, 1, vec![-0.25])]);
        assert_eq!(*sum.group.cells, [10_485_760]);
        assert_eq!(sum.mean().unwrap().collect::<Vec<_>>(), [0.3125]);
        assert_eq!((sum.weight(), sum.parameters(), sum.tasks().len()), (4, 1, 2));
    }

    #[test]
    fn a_ring_one_past_each_of_its_limits_is_refused() {
        let ring = |s, w, n, u| Ring::new(s, w, n, u).map(|_| ());
        assert_eq!(Ring::new(23, 1 << 20, 256.0, 2048), Ok(Ring::weighted()));
        assert_eq!(Ring::new(43, 1, 256.0, 2048), Ok(Ring::unweighted()));
        assert_eq!(ring(24, 1 << 20, 256.0, 2048), Err(RingError::Range { got: (1u64 << 52) as f64 }));
        assert!(matches!(ring(23, (1 << 20) + 1, 256.0, 2048), Err(RingError::Range { .. })));
        assert!(matches!(ring(23, 1 << 20, 256.0f64.next_up(), 2048), Err(RingError::Range { .. })));
        assert_eq!(ring(51, 1, 1.0, 1), Ok(()));
        assert_eq!(ring(52, 1, 0.5, 1), Err(RingError::Scale { got: 52 }));
        assert_eq!(ring(0, 1 << 29, 1.0, 1), Ok(()));
        assert_eq!(ring(0, (1 << 29) + 1, 1.0, 1), Err(RingError::Weight { got: (1 << 29) + 1 }));
        assert_eq!(ring(0, 0, 1.0, 1), Err(RingError::Weight { got: 0 }));
        assert_eq!(ring(0, 1, 1.0, 2049), Err(RingError::Updates { got: 2049 }));
        assert_eq!(ring(0, 1, 1.0, 0), Err(RingError::Updates { got: 0 }));
        for norm in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            assert!(matches!(ring(0, 1, norm, 1), Err(RingError::Norm { .. })), "{norm}");
        }
    }

    #[test]
    fn a_ring_out_of_bounds_cannot_be_read() {
        let json = serde_json::to_string(&Ring::weighted()).unwrap();
        assert_eq!(serde_json::from_str::<Ring>(&json).unwrap(), Ring::weighted());
        let error = serde_json::from_str::<Ring>(&json.replace("23", "24")).unwrap_err();
        assert!(error.to_string().contains("the most is 2^51"), "{error}");
    }

    #[test]
    fn row_counts_are_shifted_until_the_largest_fits() {
        assert_eq!(weight_shift(1 << 20, 1 << 20), 0);
        assert_eq!(weight_shift((1 << 20) + 1, 1 << 20), 1);
        assert_eq!(weight_shift(u64::MAX, 1), 63);
        assert_eq!(weight(1 << 21, 1, 1 << 20), 1 << 20);
        assert_eq!(weight(u64::MAX, 1, 1 << 20), 1 << 20);
        assert_eq!((weight(0, 0, 9), weight(5, 64, 9), weight(5, 0, 9)), (1, 1, 5));
    }

    #[test]
    fn a_payload_that_is_not_its_manifest_is_refused() {
        let raw = to_bytes(&[1.0, 2.0]);
        let checked = |bytes, hash, raw: &[u8]| {
            let mut checker = Checker::new(bytes, hash);
            checker.update(raw).and_then(|()| checker.finish())
        };
        let hash = Hash::of(&raw);
        assert_eq!(checked(8, hash, &raw), Ok(()));
        assert_eq!(checked(9, hash, &raw), Err(Refusal::WrongLength { got: 8, expected: 9 }));
        assert_eq!(checked(7, hash, &raw), Err(Refusal::WrongLength { got: 8, expected: 7 }));
        assert_eq!(checked(8, Hash([0; 32]), &raw), Err(Refusal::WrongHash));
        assert_eq!(verify(small(), &raw[..7]), Err(Refusal::WrongLength { got: 7, expected: 4 }));
    }

    #[test]
    fn nothing_is_taken_in_past_the_length() {
        let mut verifier = Verifier::new(small(), 8, Hash::of(&[0; 8]));
        verifier.update(&[0; 8]).unwrap();
        assert_eq!(verifier.update(&[1]), Err(Refusal::WrongLength { got: 9, expected: 8 }));
        assert_eq!(verifier.bytes(), 8);
        assert_eq!(verifier.finish().unwrap().bytes(), 8);
    }

    #[test]
    fn a_number_that_is_not_finite_is_found_at_any_place() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in 0..35 {
                let mut values = [f32::MAX; 35];
                values[at] = bad;
                assert_eq!(verify(small(), &to_bytes(&values)), Err(Refusal::NotFinite), "{bad} at {at}");
            }
        }
    }

    #[test]
    fn the_norm_bound_is_refused_one_past() {
        let norm = |values: &[f32]| verify(small(), &to_bytes(values)).map(|verified| verified.norm());
        assert_eq!(norm(&[-256.0]), Ok(256.0));
        assert_eq!(norm(&[3.0, 0.0, -4.0]), Ok(5.0));
        assert_eq!(norm(&[]), Ok(0.0));
        let got = f64::from(256.0f32.next_up());
        assert_eq!(norm(&[256.0f32.next_up()]), Err(Refusal::NormTooLong { got, max: 256.0 }));
        assert!(matches!(norm(&[f32::MAX; 40]), Err(Refusal::NormTooLong { .. })));
        assert!(matches!(norm(&[256.0, 0.01]), Err(Refusal::NormTooLong { .. })));
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_before_anything_is_added() {
        let mut sum = sum_of(small(), &[(1, 8, vec![1.0, 2.0])]);
        let before = sum.clone();
        let refused = |sum: &mut Sum, task, weight, values: &[f32]| {
            let error = add(sum, task, weight, values).unwrap_err();
            assert_eq!(*sum, before);
            error
        };
        let wrong_weight = |got| SumError::Refused(Refusal::WrongWeight { got, max: 8 });
        let wrong_length = |got| SumError::Refused(Refusal::WrongLength { got, expected: 8 });
        assert_eq!(refused(&mut sum, 2, 0, &[1.0, 2.0]), wrong_weight(0));
        assert_eq!(refused(&mut sum, 2, 9, &[1.0, 2.0]), wrong_weight(9));
        assert_eq!(refused(&mut sum, 2, 1, &[1.0]), wrong_length(4));
        assert_eq!(refused(&mut sum, 2, 1, &[1.0; 3]), wrong_length(12));
        assert_eq!(refused(&mut sum, 2, 1, &[1.0, f32::NAN]), SumError::Refused(Refusal::NotFinite));
        assert_eq!(refused(&mut sum, 1, 1, &[1.0, 2.0]), SumError::AlreadyIn(TaskId(1)));
        assert!(matches!(refused(&mut sum, 2, 1, &[256.0; 2]), SumError::Refused(Refusal::NormTooLong { .. })));
    }

    #[test]
    fn a_norm_that_only_another_ring_allows_is_refused() {
        let raw = to_bytes(&[300.0]);
        let verified = verify(Ring::new(0, 1, 1000.0, 1).unwrap(), &raw).unwrap();
        let mut sum = Sum::new(small(), 1);
        let refused = SumError::Refused(Refusal::NormTooLong { got: 300.0, max: 256.0 });
        assert_eq!(sum.begin(TaskId(1), 1, &verified).unwrap_err(), refused);
        assert_eq!(sum, Sum::new(small(), 1));
    }

    #[test]
    fn a_full_sum_of_the_largest_updates_is_exact_and_takes_no_more() {
        let ring = Ring::weighted();
        for x in [256.0, -256.0] {
            let updates: Vec<_> = (0..u64::from(UPDATES_MAX)).map(|task| (task, ring.weight_max, vec![x])).collect();
            let mut sum = sum_of(ring, &updates);
            assert_eq!(sum.mean().unwrap().collect::<Vec<_>>(), [f64::from(x)]);
            let before = sum.clone();
            assert_eq!(add(&mut sum, 9999, 1, &[0.0]), Err(SumError::Refused(Refusal::TooMany)));
            assert_eq!(sum, before);
            let one = sum_of(ring, &[(9999, 1, vec![0.0])]);
            assert_eq!(sum.merge(&one), Err(SumError::Refused(Refusal::TooMany)));
            assert_eq!(sum, before);
        }
    }

    #[test]
    fn sums_that_do_not_belong_together_are_not_merged() {
        let mut sum = sum_of(small(), &[(1, 1, vec![1.0])]);
        let before = sum.clone();
        let other_ring = sum_of(Ring::weighted(), &[(2, 1, vec![1.0])]);
        let other_shape = sum_of(small(), &[(2, 1, vec![1.0, 2.0])]);
        let shared = sum_of(small(), &[(2, 1, vec![1.0]), (1, 1, vec![1.0])]);
        assert_eq!(sum.merge(&other_ring), Err(SumError::OtherRing));
        assert_eq!(sum.merge(&other_shape), Err(SumError::OtherShape { got: 2, expected: 1 }));
        assert_eq!(sum.merge(&shared), Err(SumError::AlreadyIn(TaskId(1))));
        assert_eq!(sum, before);
    }

    #[test]
    fn an_empty_sum_has_no_mean() {
        assert_eq!(Sum::new(small(), 3).mean().err(), Some(SumError::Empty));
    }

    #[test]
    fn a_payload_that_is_not_read_back_whole_tears_the_sum_until_it_is_cleared() {
        let raw = to_bytes(&[1.0, 2.0]);
        let verified = verify(small(), &raw).unwrap();
        let too_long = [raw.clone(), vec![0]].concat();
        for read_back in [&raw[..4], &raw[..7], &too_long] {
            let mut sum = Sum::new(small(), 2);
            let mut fold = sum.begin(TaskId(1), 1, &verified).unwrap();
            fold.add(read_back);
            assert_eq!(fold.finish(), Err(SumError::Torn));
            assert!(sum.is_torn());
            assert_eq!(sum.begin(TaskId(2), 1, &verified).unwrap_err(), SumError::Torn);
            assert_eq!(sum.mean().err(), Some(SumError::Torn));
            assert_eq!(Sum::new(small(), 2).merge(&sum), Err(SumError::Torn));
            sum.clear();
            assert_eq!(sum, Sum::new(small(), 2));
        }
    }

    #[test]
    fn a_fold_that_is_given_up_tears_the_sum_only_after_its_first_byte() {
        let raw = to_bytes(&[1.0, 2.0]);
        let verified = verify(small(), &raw).unwrap();
        let mut sum = Sum::new(small(), 2);
        drop(sum.begin(TaskId(1), 1, &verified).unwrap());
        assert_eq!(sum, Sum::new(small(), 2));
        sum.begin(TaskId(1), 1, &verified).unwrap().add(&raw[..1]);
        assert!(sum.is_torn());
    }

    #[test]
    fn parts_are_the_whole_payload_each_byte_once_and_begin_at_whole_pages() {
        for (cells, count) in [(0, 3), (1, 3), (1024, 3), (5000, 1), (5000, 3), (5000, 100)] {
            let raw = to_bytes(&vec![0.5; cells]);
            let mut sum = Sum::new(small(), cells);
            let mut fold = sum.begin(TaskId(1), 1, &verify(small(), &raw).unwrap()).unwrap();
            fold.cut(count);
            let parts: Vec<Range<u64>> = fold.parts().iter().map(Part::bytes).collect();
            assert!(parts.len() <= count && parts.iter().all(|part| part.start % 4096 == 0), "{parts:?}");
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start), "{parts:?}");
            assert_eq!(parts.last().map_or(0, |last| last.end), raw.len() as u64);
        }
    }

    #[test]
    fn parts_folded_in_any_order_and_at_the_same_time_are_the_same_sum() {
        let values: Vec<f32> = (0..10_000u32).map(|at| ((at as f32) * 0.37 - 1800.0) / 5000.0).collect();
        let raw = to_bytes(&values);
        let verified = verify(small(), &raw).unwrap();
        let whole = sum_of(small(), &[(1, 7, values)]);
        let slice = |part: &Part<'_>| &raw[part.bytes().start as usize..part.bytes().end as usize];
        for count in [1, 2, 3, 10, 100] {
            let mut backwards = Sum::new(small(), 10_000);
            let mut fold = backwards.begin(TaskId(1), 7, &verified).unwrap();
            fold.cut(count);
            fold.parts_mut()
                .iter_mut()
                .rev()
                .for_each(|part| slice(part).chunks(777).for_each(|piece| part.add(piece)));
            fold.finish().unwrap();
            let mut at_once = Sum::new(small(), 10_000);
            let mut fold = at_once.begin(TaskId(1), 7, &verified).unwrap();
            fold.cut(count);
            std::thread::scope(|scope| {
                for part in fold.parts_mut() {
                    scope.spawn(|| part.add(slice(part)));
                }
            });
            fold.finish().unwrap();
            assert!(backwards == whole && at_once == whole, "{count}");
        }
    }

    #[test]
    fn a_part_that_is_not_read_back_whole_tears_the_sum() {
        let raw = to_bytes(&[0.01; 3000]);
        let verified = verify(small(), &raw).unwrap();
        for (spoiled, bytes) in [(0, 0), (0, 4095), (0, 4097), (1, 4092), (2, 3900), (2, 3812)] {
            let mut sum = Sum::new(small(), 3000);
            let mut fold = sum.begin(TaskId(1), 1, &verified).unwrap();
            fold.cut(3);
            for (at, part) in fold.parts_mut().iter_mut().enumerate() {
                let own = part.bytes().end - part.bytes().start;
                part.add(&[0; 4100][..if at == spoiled { bytes } else { own as usize }]);
            }
            assert_eq!(fold.finish(), Err(SumError::Torn), "part {spoiled} of {bytes} bytes");
            assert!(sum.is_torn());
        }
    }

    #[test]
    fn neither_numbers_nor_cells_are_printed() {
        let sum = sum_of(small(), &[(1, 1, vec![0.125])]);
        assert!(!format!("{sum:?}").contains(&sum.group.cells[0].to_string()));
    }

    /// Products that lie on, just below and just above every kind of tie.
    #[test]
    fn ties_are_rounded_to_even() {
        let (unit, halves) = ((1u64 << 23) as f64, (0..50u32).map(|bit| (1u64 << bit) as f64 - 0.5));
        for product in halves.flat_map(|y| [y, y + 1.0, y + 0.5, -y, -y - 1.0]) {
            let x = (product / unit) as f32;
            for x in [x.next_down(), x, x.next_up()].into_iter().filter(|x| x.abs() <= 256.0) {
                assert_entry(Ring::weighted(), x, 1);
            }
        }
    }

    fn assert_entry(ring: Ring, x: f32, weight: u32) {
        let sum = sum_of(ring, &[(1, weight, vec![x])]);
        let expected = (f64::from(x) * f64::from(weight) * ring.unit()).round_ties_even();
        assert_eq!(sum.group.cells[0].cast_signed() as f64, expected, "{x:e} of weight {weight}");
    }

    /// Steps, what is left behind the last one, and numbers without a cell.
    #[test]
    fn a_fold_of_any_length_adds_each_number_to_its_own_cell() {
        let raw: Vec<f32> = (0..200u32).map(|at| ((at as f32) * 0.37 - 30.0) / 3.0).collect();
        let numbers: Vec<[u8; 4]> = raw.iter().map(|x| x.to_le_bytes()).collect();
        let scale = Ring::weighted().unit() * 5.0;
        let entry = |at: usize| ((f64::from(raw[at]) * scale).round_ties_even() as i64).cast_unsigned();
        for length in 0..=numbers.len() {
            let mut cells: Vec<u64> = (0..150).map(|at| u64::MAX - at).collect();
            fold(&mut cells, &numbers[..length], scale);
            let added = |at: usize| if at < length { entry(at) } else { 0 };
            assert!((0..150).all(|at| cells[at] == (u64::MAX - at as u64).wrapping_add(added(at))), "{length}");
        }
    }

    fn rings() -> impl Strategy<Value = Ring> {
        let fine = Ring::new(51, 1, 1.0, 64).unwrap();
        prop::sample::select(vec![Ring::weighted(), Ring::unweighted(), small(), fine])
    }

    /// Any finite number up to `max`, of any magnitude.
    fn number(max: f64) -> impl Strategy<Value = f32> {
        let exponents = prop_oneof![-150i32..=8, -30i32..=8];
        (-1.0f64..=1.0, exponents).prop_map(move |(x, e)| (x.abs().min(1.0).copysign(x) * 2f64.powi(e).min(max)) as f32)
    }

    /// Two to twelve updates of four numbers, each within the bound with its norm.
    fn updates(ring: Ring) -> impl Strategy<Value = Vec<(u64, u32, Vec<f32>)>> {
        let one = (1..=ring.weight_max, prop::collection::vec(number(ring.norm_max / 2.0), 4));
        prop::collection::vec(one, 2..=12.min(ring.updates_max as usize)).prop_map(|updates| {
            updates.into_iter().zip(1..).map(|((weight, values), task)| (task, weight, values)).collect()
        })
    }

    fn ring_and_updates() -> impl Strategy<Value = (Ring, Vec<(u64, u32, Vec<f32>)>)> {
        rings().prop_flat_map(|ring| (Just(ring), updates(ring)))
    }

    proptest! {
        #[test]
        fn the_squares_are_the_same_bits_by_any_instructions(
            bits in prop::collection::vec(any::<u32>(), 160),
            numbers in prop::collection::vec(number(256.0), 160),
        ) {
            for raw in [to_bytes(&numbers), bits.into_iter().flat_map(u32::to_le_bytes).collect()] {
                let (blocks, _) = raw.as_chunks();
                let (mut squares, mut plain) = ([0.0; LANES], [0.0; LANES]);
                add_squares(&mut squares, blocks);
                add_squares_plain(&mut plain, blocks);
                // A NaN is refused whichever it is.
                let bits = |x: f64| if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() };
                prop_assert_eq!(squares.map(bits), plain.map(bits));
            }
        }

        #[test]
        fn an_entry_is_exactly_the_rounded_product(
            (ring, weight, x) in rings().prop_flat_map(|r| (Just(r), 1..=r.weight_max, number(r.norm_max)))
        ) {
            assert_entry(ring, x, weight);
        }

        #[test]
        fn any_order_gives_the_same_bits((ring, mut updates) in ring_and_updates(), seed in any::<u64>()) {
            let expected = sum_of(ring, &updates);
            updates.sort_by_key(|(task, ..)| blake3::hash(&(task ^ seed).to_le_bytes()).as_bytes()[0]);
            let shuffled = sum_of(ring, &updates);
            prop_assert_eq!(bits(&shuffled), bits(&expected));
            prop_assert_eq!(shuffled, expected);
        }

        #[test]
        fn any_split_into_partial_sums_gives_the_same_bits(
            (ring, updates) in ring_and_updates(),
            parts in prop::collection::vec(0usize..4, 12),
        ) {
            let expected = sum_of(ring, &updates);
            let mut sums = vec![Sum::new(ring, 4); 4];
            for ((task, weight, values), part) in updates.iter().zip(parts) {
                add(&mut sums[part], *task, *weight, values).unwrap();
            }
            let mut merged = sums.pop().unwrap();
            sums.iter().try_for_each(|sum| merged.merge(sum)).unwrap();
            prop_assert_eq!(bits(&merged), bits(&expected));
            prop_assert_eq!(merged, expected);
        }

        #[test]
        fn any_cut_into_chunks_gives_the_same_verdict_and_the_same_sum(
            values in prop::collection::vec(number(16.0), 1..80),
            cuts in prop::collection::vec(0usize..320, 0..12),
        ) {
            let raw = to_bytes(&values);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(raw.len())).chain([0, raw.len()]).collect();
            cuts.sort_unstable();
            let chunks: Vec<_> = cuts.windows(2).map(|pair| &raw[pair[0]..pair[1]]).collect();
            let mut verifier = Verifier::new(small(), raw.len() as u64, Hash::of(&raw));
            chunks.iter().try_for_each(|chunk| verifier.update(chunk)).unwrap();
            let verified = verifier.finish().unwrap();
            prop_assert_eq!(verified, verify(small(), &raw).unwrap());
            let mut sum = Sum::new(small(), values.len());
            let mut fold = sum.begin(TaskId(1), 7, &verified).unwrap();
            chunks.iter().for_each(|chunk| fold.add(chunk));
            fold.finish().unwrap();
            prop_assert_eq!(sum, sum_of(small(), &[(1, 7, values)]));
        }

        #[test]
        fn no_number_is_longer_than_the_norm(values in prop::collection::vec(number(16.0), 1..40)) {
            let norm = verify(Ring::weighted(), &to_bytes(&values)).unwrap().norm();
            prop_assert!(values.iter().all(|x| f64::from(x.abs()) <= norm));
        }

        /// `|mean - Σwx / Σw| ≤ n · 2^-(s+1) / Σw + 2^-50 · max|x|`, times Σw, without a single rounding.
        #[test]
        fn the_mean_is_within_its_bound_of_the_exact_mean((ring, updates) in ring_and_updates()) {
            let sum = sum_of(ring, &updates);
            let (total, n) = (sum.weight(), updates.len() as u64);
            for (at, mean) in sum.mean().unwrap().enumerate() {
                let mut distance = Exact::times(mean, total);
                let mut largest = 0f64;
                for (_, weight, values) in &updates {
                    let x = f64::from(values[at]);
                    distance = distance.plus(Exact::times(-x, u64::from(*weight)));
                    largest = largest.max(x.abs());
                }
                let roundings = Exact::times(0.5 / ring.unit(), n);
                let bound = roundings.plus(Exact::times(largest / (1u64 << 50) as f64, total));
                prop_assert!(distance.abs() <= bound, "cell {at}: {distance:?} past {bound:?}");
            }
        }
    }

    /// A multiple of 2^-200 below 2^55 in magnitude, as 256 bits of two's complement, lowest limb first: room for
    /// every number of these tests (the smallest bit is that of 2^-149 · 2^-50, the largest sum 2^8 · 2^31).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Exact([u64; 4]);

    impl Exact {
        /// `x · factor`.
        fn times(x: f64, factor: u64) -> Self {
            let (bits, exponent) = (x.abs().to_bits(), (x.abs().to_bits() >> 52) as i32);
            if x == 0.0 {
                return Self([0; 4]);
            }
            assert!(exponent > 0, "subnormal doubles do not occur here");
            let mantissa = u128::from(bits & ((1 << 52) - 1) | 1 << 52) * u128::from(factor);
            // x = mantissa · 2^(exponent - 1075).
            let shift = exponent - 1075 + 200;
            let magnitude = match u32::try_from(shift) {
                Ok(left) => Self::shifted(mantissa, left),
                Err(_) => {
                    assert!(mantissa.trailing_zeros() >= shift.unsigned_abs(), "{x:e} has bits below 2^-200");
                    Self::shifted(mantissa >> -shift, 0)
                }
            };
            if x < 0.0 { magnitude.negated() } else { magnitude }
        }

        fn shifted(mantissa: u128, left: u32) -> Self {
            let mut limbs = [0u64; 6];
            let (limb, bit) = ((left / 64) as usize, left % 64);
            let (low, high) = (mantissa << bit, if bit == 0 { 0 } else { mantissa >> (128 - bit) });
            limbs[limb] = low as u64;
            limbs[limb + 1] = (low >> 64) as u64;
            limbs[limb + 2] = high as u64;
            assert_eq!(limbs[3] >> 63 | limbs[4] | limbs[5], 0, "out of range");
            Self([limbs[0], limbs[1], limbs[2], limbs[3]])
        }

        fn plus(self, other: Self) -> Self {
            let mut carry = false;
            Self(core::array::from_fn(|at| {
                let (sum, first) = self.0[at].overflowing_add(other.0[at]);
                let (sum, second) = sum.overflowing_add(u64::from(carry));
                carry = first || second;
                sum
            }))
        }

        fn negated(self) -> Self {
            Self(self.0.map(|limb| !limb)).plus(Self([1, 0, 0, 0]))
        }

        fn abs(self) -> Self {
            if self.0[3] >> 63 == 1 { self.negated() } else { self }
        }
    }

    /// Of magnitudes.
    impl PartialOrd for Exact {
        fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
            Some(self.0.iter().rev().cmp(other.0.iter().rev()))
        }
    }

    #[test]
    fn the_exact_arithmetic_of_these_tests_is_arithmetic() {
        let exact = |x| Exact::times(x, 1);
        assert_eq!(exact(1.5).plus(exact(-0.25)), exact(1.25));
        assert_eq!(exact(-1.5).plus(exact(1.5)), Exact([0; 4]));
        assert_eq!(Exact::times(-0.125, 24), exact(-3.0));
        assert_eq!(exact(-3.0).abs(), exact(3.0));
        assert!(exact(2f64.powi(-199)) < exact(2f64.powi(-140)) && exact(2f64.powi(54)) > exact(1.0));
        assert_eq!(exact(2f64.powi(-200)), Exact([1, 0, 0, 0]));
    }
}
