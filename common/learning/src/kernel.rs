//! The three products of a dense layer, made for the vectors that the CPU has.
//!
//! Weights are kept as [`Panels`]: 32 columns (outputs) at a time, and of these one row (input) behind the other, the bias
//! as the last row. So a product reads them as they lie, in strips that stay in the cache, and nothing is packed for
//! it. Rows of a batch are a [`Matrix`] with a 1 behind each row, which the bias is multiplied by: its sum and its
//! gradient need no code of their own.
//!
//! A tile of the result, up to 12 rows by 32 columns, stays in registers while products are added to it, each cell's in
//! their order, one fused multiply-add at a time. So the bits of a result depend neither on the tiles, nor on how many
//! threads share them, nor on how wide the CPU's vectors are, if only it fuses.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_MM_HINT_T0;
use std::ops::Range;

use protocol::pages::Numbers;
use pulp::{Arch, Scalar512b, Simd, WithSimd, bytemuck};
#[cfg(target_arch = "x86_64")]
use pulp::{NullaryFnOnce, core_arch::x86::Sse, x86::V4};

/// Columns of a panel; the last one of a matrix has half of them if they are enough.
pub(crate) const PANEL: usize = 32;

const HALF: usize = PANEL / 2;

/// Rows of a panel that all rows of a batch are multiplied by before the next ones: 16 KiB, so that they stay in the nearest
/// cache beside the rows of the batch and what is fetched ahead.
const BLOCK_ROWS_MAX: usize = 128;

/// Rows of a batch from which on blocks pay: with fewer a block is used too seldom to be waited for.
const MANY_ROWS: usize = 32;

/// Floats of a cache line, which a vector of 16 should not straddle.
const LINE: usize = 16;

/// Repeats a body for each index below a bound of at most 12. The compiler would unroll the loop as well, but late: only
/// places that are constants from the beginning are sure to become registers.
macro_rules! unroll {
    ($index:ident in $end:ident $body:block) => {
        unroll!($index $end $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($index:ident $end:ident $body:block $($at:literal)*) => {
        $(if $at < $end {
            let $index = $at;
            $body
        })*
    };
}

/// Zeros at first, and at the start of a cache line.
#[derive(Debug)]
struct Aligned {
    floats: Numbers<f32>,
    from: usize,
}

/// Rows, each at the start of a cache line, and behind each a 1.
#[derive(Debug)]
pub(crate) struct Matrix {
    floats: Aligned,
    columns: usize,
    stride: usize,
}

/// Rows of a batch, cut into strips of as many columns as a tile of their gradient is high. Each strip lies row behind row, so
/// that a tile reads it from one end to the other; in a [`Matrix`] each row of it would be on another page.
#[derive(Debug)]
pub(crate) struct Strips {
    floats: Aligned,
    rows: usize,
}

/// A matrix, 32 columns at a time.
#[derive(Debug, Default)]
pub(crate) struct Panels {
    floats: Aligned,
    rows: usize,
    columns: usize,
}

/// Some columns of a matrix.
#[derive(Clone, Copy)]
struct Panel {
    /// Where they begin in the matrix.
    column: usize,
    /// How many there are.
    columns: usize,
    /// How many there is room for: a whole panel, or half of one.
    width: usize,
}

/// What becomes of a cell of a product.
#[derive(Clone, Copy)]
pub(crate) enum Then<'a> {
    /// It is stored.
    Store,
    /// It is stored if it is positive, else zero.
    Relu,
    /// It is stored where this matrix is positive, else zero.
    Where(&'a Matrix),
}

/// What becomes of a gradient `g`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// `w ← w - rate·g`
    Descend {
        /// The learning rate.
        rate: f32,
    },
    /// `v ← kept·v + g`, then `w ← w - rate·v`, if there is a rate.
    Gather {
        /// What is kept of what was gathered.
        kept: f32,
        /// The learning rate.
        rate: Option<f32>,
    },
}

impl Default for Aligned {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Aligned {
    fn new(len: usize) -> Self {
        let floats = Numbers::<f32>::zeroed(len + LINE - 1);
        let from = floats.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE - 1);
        Self { floats, from }
    }

    fn get(&self) -> &[f32] {
        &self.floats[self.from..]
    }

    fn get_mut(&mut self) -> &mut [f32] {
        &mut self.floats[self.from..]
    }
}

impl Matrix {
    pub(crate) fn new(rows: usize, columns: usize) -> Self {
        // An odd number of cache lines: rows a power of two apart would share a few places of the cache.
        let stride = LINE * ((columns + 1).div_ceil(LINE) | 1);
        let mut floats = Aligned::new(rows * stride);
        floats.get_mut().chunks_exact_mut(stride).for_each(|row| row[columns] = 1.0);
        Self { floats, columns, stride }
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.floats.get().chunks_exact(self.stride).map(|row| &row[..self.columns])
    }

    /// The rows with the 1 behind each, and what pads them.
    pub(crate) fn padded_rows(&self) -> impl Iterator<Item = &[f32]> {
        self.floats.get().chunks_exact(self.stride)
    }

    pub(crate) fn rows_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let columns = self.columns;
        self.floats.get_mut().chunks_exact_mut(self.stride).map(move |row| &mut row[..columns])
    }
}

impl Panels {
    pub(crate) fn new(rows: usize, columns: usize) -> Self {
        Self { floats: Aligned::new(rows * columns.next_multiple_of(HALF)), rows, columns }
    }

    /// Takes columns `from..` of a layer from where a layout has them: the bias, then a row for each column.
    pub(crate) fn load(&mut self, from: usize, bias: &[f32], weights: &[f32]) {
        let inputs = self.rows - 1;
        for panel in self.panels() {
            let at = from + panel.column;
            let panel_floats = self.of_mut(panel);
            panel_floats[inputs * panel.width..][..panel.columns].copy_from_slice(&bias[at..][..panel.columns]);
            transpose(&weights[at * inputs..][..panel.columns * inputs], inputs, inputs, panel_floats, panel.width);
        }
    }

    /// The reverse of [`Panels::load`].
    pub(crate) fn store(&self, from: usize, bias: &mut [f32], weights: &mut [f32]) {
        let inputs = self.rows - 1;
        for panel in self.panels() {
            let at = from + panel.column;
            let (rows, bias_row) = self.of(panel).split_at(inputs * panel.width);
            bias[at..][..panel.columns].copy_from_slice(&bias_row[..panel.columns]);
            transpose(rows, panel.width, panel.columns, &mut weights[at * inputs..], inputs);
        }
    }

    /// Becomes the transpose of `weights` without their last row.
    pub(crate) fn transpose_of(&mut self, weights: &Self) {
        for source in weights.panels() {
            for panel in self.panels() {
                let from = &weights.of(source)[panel.column * source.width..][..panel.columns * source.width];
                let to = &mut self.of_mut(panel)[source.column * panel.width..];
                transpose(from, source.width, source.columns, to, panel.width);
            }
        }
    }

    fn panels(&self) -> impl Iterator<Item = Panel> + use<> {
        let all = self.columns;
        (0..all).step_by(PANEL).map(move |column| {
            let columns = PANEL.min(all - column);
            Panel { column, columns, width: if columns <= HALF { HALF } else { PANEL } }
        })
    }

    /// All rows, in blocks of as even a height as can be; in one where few rows of a batch are multiplied by them.
    fn blocks(&self, few: bool) -> impl Iterator<Item = Range<usize>> + use<> {
        let (rows, blocks) = (self.rows, if few { 1 } else { self.rows.div_ceil(BLOCK_ROWS_MAX) });
        (0..blocks).map(move |nth| rows * nth / blocks..rows * (nth + 1) / blocks)
    }

    /// These rows of a panel, and what lies behind them, at most as much.
    fn block(&self, panel: Panel, rows: &Range<usize>) -> (&[f32], &[f32]) {
        let from = &self.floats.get()[panel.column * self.rows + panel.width * rows.start..];
        let (block, behind) = from.split_at(panel.width * rows.len());
        (block, &behind[..behind.len().min(block.len())])
    }

    fn of(&self, panel: Panel) -> &[f32] {
        &self.floats.get()[panel.column * self.rows..][..panel.width * self.rows]
    }

    fn of_mut(&mut self, panel: Panel) -> &mut [f32] {
        &mut self.floats.get_mut()[panel.column * self.rows..][..panel.width * self.rows]
    }
}

/// `to[..][column..] ← then(Σ from[..][at..] · panels)` over the parts `(at, panels)`, for the first `rows` rows.
pub(crate) fn multiply(
    from: &Matrix,
    rows: usize,
    parts: &[(usize, &Panels)],
    then: Then<'_>,
    to: &mut Matrix,
    column: usize,
) {
    let few = rows < MANY_ROWS;
    let blocks = parts.iter().flat_map(|(at, panels)| panels.blocks(few).map(move |rows| (*at, *panels, rows)));
    let blocks: Vec<_> = blocks.collect();
    for panel in parts.first().into_iter().flat_map(|(_, panels)| panels.panels()) {
        for (nth, (at, panels, block)) in blocks.iter().enumerate() {
            let (weights, next) = panels.block(panel, block);
            let (first, then) = (nth == 0, if nth + 1 == blocks.len() { then } else { Then::Store });
            let (start, column) = (at + block.start, column + panel.column);
            let ahead = if few { 0 } else { next.len().div_ceil(rows) };
            make(rows, panel.width, &mut Product { from, start, weights, next, ahead, panel, first, then, to, column });
        }
    }
}

/// Follows the gradient of `weights`, whose columns are at `column..` of their layer: the sum over the rows of all batches of
/// the products of a layer's inputs, with the 1 behind them, and the deltas of its outputs.
pub(crate) fn follow(
    weights: &mut Panels,
    velocity: &mut Panels,
    column: usize,
    batches: &[(&Strips, &Matrix)],
    rule: Rule,
) {
    for panel in weights.panels() {
        let (rows, column) = (weights.rows, column + panel.column);
        let velocity = if matches!(rule, Rule::Descend { .. }) { &mut [][..] } else { velocity.of_mut(panel) };
        make(rows, panel.width, &mut Step { batches, column, panel, weights: weights.of_mut(panel), velocity, rule });
    }
}

impl Strips {
    /// Room for rows of so many columns, and a 1 behind each.
    pub(crate) fn new(rows: usize, columns: usize) -> Self {
        Self { floats: Aligned::new(rows * (columns + 1)), rows: 0 }
    }

    /// Takes the first `rows` rows of a matrix, with the 1 behind each.
    pub(crate) fn take(&mut self, from: &Matrix, rows: usize) {
        self.rows = rows;
        make(from.columns + 1, PANEL, &mut Cut { from, rows, to: self.floats.get_mut() });
    }
}

/// Cuts a matrix into strips.
struct Cut<'a> {
    from: &'a Matrix,
    rows: usize,
    to: &'a mut [f32],
}

impl Tile for Cut<'_> {
    #[inline(always)]
    fn make<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, _: S, at: usize) {
        let to = self.to[at * self.rows..][..ROWS * self.rows].as_chunks_mut::<ROWS>().0;
        for (to, from) in to.iter_mut().zip(self.from.padded_rows()) {
            *to = *from[at..].first_chunk().expect("a tile ends where the rows do");
        }
    }
}

/// What is made tile by tile.
trait Tile {
    /// Makes `ROWS` rows from `at`, which are `VECTORS` wide.
    fn make<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, at: usize);
}

/// Makes `rows` rows of `width` in tiles of as even a height as can be.
fn make(rows: usize, width: usize, tile: &mut impl Tile) {
    let arch = Arch::new();
    let tiles = rows.div_ceil(tile_rows_max(arch)).max(1);
    let (low, higher) = (rows / tiles, rows % tiles);
    let higher_end = higher * (low + 1);
    for (at, tiles, height) in [(0, higher, low + 1), (higher_end, tiles - higher, low)] {
        match (height, width) {
            (1, PANEL) => dispatch(arch, Run::<_, 1, true> { tile, at, tiles }),
            (2, PANEL) => dispatch(arch, Run::<_, 2, true> { tile, at, tiles }),
            (3, PANEL) => dispatch(arch, Run::<_, 3, true> { tile, at, tiles }),
            (4, PANEL) => dispatch(arch, Run::<_, 4, true> { tile, at, tiles }),
            (5, PANEL) => dispatch(arch, Run::<_, 5, true> { tile, at, tiles }),
            (6, PANEL) => dispatch(arch, Run::<_, 6, true> { tile, at, tiles }),
            (7, PANEL) => dispatch(arch, Run::<_, 7, true> { tile, at, tiles }),
            (8, PANEL) => dispatch(arch, Run::<_, 8, true> { tile, at, tiles }),
            (9, PANEL) => dispatch(arch, Run::<_, 9, true> { tile, at, tiles }),
            (10, PANEL) => dispatch(arch, Run::<_, 10, true> { tile, at, tiles }),
            (11, PANEL) => dispatch(arch, Run::<_, 11, true> { tile, at, tiles }),
            (12, PANEL) => dispatch(arch, Run::<_, 12, true> { tile, at, tiles }),
            (1, _) => dispatch(arch, Run::<_, 1, false> { tile, at, tiles }),
            (2, _) => dispatch(arch, Run::<_, 2, false> { tile, at, tiles }),
            (3, _) => dispatch(arch, Run::<_, 3, false> { tile, at, tiles }),
            (4, _) => dispatch(arch, Run::<_, 4, false> { tile, at, tiles }),
            (5, _) => dispatch(arch, Run::<_, 5, false> { tile, at, tiles }),
            (6, _) => dispatch(arch, Run::<_, 6, false> { tile, at, tiles }),
            (7, _) => dispatch(arch, Run::<_, 7, false> { tile, at, tiles }),
            (8, _) => dispatch(arch, Run::<_, 8, false> { tile, at, tiles }),
            (9, _) => dispatch(arch, Run::<_, 9, false> { tile, at, tiles }),
            (10, _) => dispatch(arch, Run::<_, 10, false> { tile, at, tiles }),
            (11, _) => dispatch(arch, Run::<_, 11, false> { tile, at, tiles }),
            (12, _) => dispatch(arch, Run::<_, 12, false> { tile, at, tiles }),
            _ => debug_assert_eq!(height * tiles, 0, "no tile is higher than 12 rows"),
        }
    }
}

/// Rows of a tile whose sums fit into the registers beside what they are made of.
fn tile_rows_max(arch: Arch) -> usize {
    match arch {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => 12,
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => 3,
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => 3,
        _ => 1,
    }
}

/// Runs `op` with the widest vectors there are. Without any, arrays stand in for them.
fn dispatch(arch: Arch, op: impl WithSimd<Output = ()>) {
    match arch {
        Arch::Scalar => op.with_simd(Scalar512b),
        arch => arch.dispatch(op),
    }
}

/// Tiles of the same height, one below the other. It is a type for each height, and so a function for each, because the
/// compiler allots registers well in a function that has one such loop.
struct Run<'a, T, const ROWS: usize, const WHOLE: bool> {
    tile: &'a mut T,
    at: usize,
    tiles: usize,
}

impl<T: Tile, const ROWS: usize, const WHOLE: bool> WithSimd for Run<'_, T, ROWS, WHOLE> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (S::F32_LANES, WHOLE) {
            (16, true) => self.make_all::<S, 2>(simd),
            (16, false) => self.make_all::<S, 1>(simd),
            (8, true) if ROWS <= 3 => self.make_all::<S, 4>(simd),
            (8, false) if ROWS <= 3 => self.make_all::<S, 2>(simd),
            (4, true) if ROWS <= 3 => self.make_all::<S, 8>(simd),
            (4, false) if ROWS <= 3 => self.make_all::<S, 4>(simd),
            (lanes, _) => unreachable!("tiles of {ROWS} rows and vectors of {lanes}"),
        }
    }
}

impl<T: Tile, const ROWS: usize, const WHOLE: bool> Run<'_, T, ROWS, WHOLE> {
    #[inline(always)]
    fn make_all<S: Simd, const VECTORS: usize>(self, simd: S) {
        for nth in 0..self.tiles {
            self.tile.make::<S, ROWS, VECTORS>(simd, self.at + nth * ROWS);
        }
    }
}

/// Does nothing but fused multiply-adds in registers, in 16 chains, each `turns` long: what products of matrices cannot
/// be faster than. Says how many multiplications and additions that were, and something that rests on all of them.
#[must_use]
pub fn fused_multiply_adds(turns: u64) -> (u64, f32) {
    struct Chains {
        turns: u64,
        factor: f32,
    }
    impl WithSimd for Chains {
        type Output = (u64, f32);

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> (u64, f32) {
            let mut sums = [simd.splat_f32s(1.0); 16];
            let (factor, term) = (simd.splat_f32s(self.factor), simd.splat_f32s(1.0 - self.factor));
            for _ in 0..self.turns {
                for sum in &mut sums {
                    *sum = simd.mul_add_e_f32s(*sum, factor, term);
                }
            }
            let sum = sums.into_iter().fold(simd.splat_f32s(0.0), |all, sum| simd.add_f32s(all, sum));
            (self.turns * 32 * S::F32_LANES as u64, simd.reduce_sum_f32s(sum))
        }
    }
    Arch::new().dispatch(Chains { turns, factor: std::hint::black_box(0.999) })
}

struct Product<'a> {
    from: &'a Matrix,
    /// The column of `from` that meets the first row of the weights.
    start: usize,
    weights: &'a [f32],
    /// The weights of the next block, and how many of them are fetched for each row of this one's tiles.
    next: &'a [f32],
    ahead: usize,
    panel: Panel,
    /// Whether nothing was summed up before.
    first: bool,
    then: Then<'a>,
    to: &'a mut Matrix,
    column: usize,
}

impl Tile for Product<'_> {
    #[inline(always)]
    fn make<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, at: usize) {
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[zero; VECTORS]; ROWS];
        prefetch(self.next, at * self.ahead, ROWS * self.ahead);
        if !self.first {
            unroll!(r in ROWS {
                sums[r] = *vectors::<S, VECTORS>(&self.to.floats.get()[(at + r) * self.to.stride + self.column..]);
            });
        }
        add_rows(simd, &mut sums, &self.from.floats.get()[self.start..], self.from.stride, at, self.weights);
        let (stride, to) = (self.to.stride, self.to.floats.get_mut());
        unroll!(r in ROWS {
            let place = (at + r) * stride + self.column;
            match self.then {
                Then::Store => {}
                Then::Relu => {
                    unroll!(v in VECTORS {
                        // In this order a NaN stays one.
                        sums[r][v] = simd.max_f32s(zero, sums[r][v]);
                    });
                }
                Then::Where(matrix) => {
                    let mask = vectors::<S, VECTORS>(&matrix.floats.get()[place..]);
                    unroll!(v in VECTORS {
                        sums[r][v] = simd.select_f32s(simd.greater_than_f32s(mask[v], zero), sums[r][v], zero);
                    });
                }
            }
            let to = &mut to[place..];
            if self.panel.columns == self.panel.width {
                *vectors_mut::<S, VECTORS>(to) = sums[r];
            } else {
                // A copy: what is read at a place that is known only now cannot stay in registers.
                let row = sums[r];
                to[..self.panel.columns].copy_from_slice(&bytemuck::cast_slice(&row)[..self.panel.columns]);
            }
        });
    }
}

/// The first vectors of `floats`.
#[inline(always)]
fn vectors<S: Simd, const VECTORS: usize>(floats: &[f32]) -> &[S::f32s; VECTORS] {
    S::as_simd_f32s(floats).0.first_chunk().expect("rows are padded to whole vectors")
}

/// See [`vectors`].
#[inline(always)]
fn vectors_mut<S: Simd, const VECTORS: usize>(floats: &mut [f32]) -> &mut [S::f32s; VECTORS] {
    S::as_mut_simd_f32s(floats).0.first_chunk_mut().expect("rows are padded to whole vectors")
}

/// `sums[r] += Σ from[at + r][j]·panel[j]`
#[inline(always)]
fn add_rows<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    sums: &mut [[S::f32s; VECTORS]; ROWS],
    from: &[f32],
    stride: usize,
    at: usize,
    panel: &[f32],
) {
    let panel = S::as_simd_f32s(panel).0.as_chunks::<VECTORS>().0;
    let mut rows = [&[][..]; ROWS];
    unroll!(r in ROWS {
        rows[r] = &from[(at + r) * stride..][..panel.len()];
    });
    for j in 0..panel.len() {
        unroll!(r in ROWS {
            let x = simd.splat_f32s(rows[r][j]);
            unroll!(v in VECTORS {
                sums[r][v] = simd.mul_add_e_f32s(x, panel[j][v], sums[r][v]);
            });
        });
    }
}

/// Asks for up to `len` floats from `from`, which are wanted soon: a tile takes longer than memory does.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(floats: &[f32], from: usize, len: usize) {
    let Some(sse) = Sse::try_new() else { return };
    let floats = &floats[from.min(floats.len())..];
    for line in floats[..len.min(floats.len())].chunks(LINE) {
        sse._mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: &[f32], _: usize, _: usize) {}

struct Step<'a> {
    batches: &'a [(&'a Strips, &'a Matrix)],
    column: usize,
    panel: Panel,
    weights: &'a mut [f32],
    velocity: &'a mut [f32],
    rule: Rule,
}

impl Tile for Step<'_> {
    #[inline(always)]
    fn make<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, at: usize) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        let width = self.panel.width;
        prefetch(self.weights, (at + ROWS) * width, ROWS * width);
        for (inputs, deltas) in self.batches {
            let rows = inputs.floats.get()[at * inputs.rows..][..ROWS * inputs.rows].as_chunks::<ROWS>().0;
            for (inputs, deltas) in rows.iter().zip(deltas.padded_rows()) {
                let deltas = vectors::<S, VECTORS>(&deltas[self.column..]);
                unroll!(r in ROWS {
                    let x = simd.splat_f32s(inputs[r]);
                    unroll!(v in VECTORS {
                        sums[r][v] = simd.mul_add_e_f32s(x, deltas[v], sums[r][v]);
                    });
                });
            }
        }
        let rate = match self.rule {
            Rule::Descend { rate } => Some(rate),
            Rule::Gather { kept, rate } => {
                let kept = simd.splat_f32s(kept);
                unroll!(r in ROWS {
                    let velocity = vectors_mut::<S, VECTORS>(&mut self.velocity[(at + r) * width..]);
                    unroll!(v in VECTORS {
                        sums[r][v] = simd.mul_add_e_f32s(kept, velocity[v], sums[r][v]);
                        velocity[v] = sums[r][v];
                    });
                });
                rate
            }
        };
        let Some(rate) = rate else { return };
        let rate = simd.splat_f32s(-rate);
        unroll!(r in ROWS {
            let weights = vectors_mut::<S, VECTORS>(&mut self.weights[(at + r) * width..]);
            unroll!(v in VECTORS {
                weights[v] = simd.mul_add_e_f32s(rate, sums[r][v], weights[v]);
            });
        });
    }
}

/// `to[column][row] ← from[row][column]`: the rows of `from` are `stride` apart, those of `to` are `to_stride` apart, and
/// `from` has as many as it is long.
fn transpose(from: &[f32], stride: usize, columns: usize, to: &mut [f32], to_stride: usize) {
    if stride == 0 {
        return;
    }
    let (arch, rows) = (Arch::new(), from.len() / stride);
    for row in (0..rows).step_by(BLOCK) {
        for column in (0..columns).step_by(BLOCK) {
            let (height, width) = (BLOCK.min(rows - row), BLOCK.min(columns - column));
            let (from, to) = (&from[row * stride + column..], &mut to[column * to_stride + row..]);
            match arch {
                #[cfg(target_arch = "x86_64")]
                Arch::V4(simd) if height == BLOCK && width == BLOCK => {
                    simd.vectorize(Transpose { simd, from, stride, to, to_stride });
                }
                _ => transpose_block(from, stride, height, width, to, to_stride),
            }
        }
    }
}

/// Rows and columns that are transposed at once: a cache line each.
const BLOCK: usize = LINE;

fn transpose_block(from: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [f32], to_stride: usize) {
    for column in 0..columns {
        for (row, to) in to[column * to_stride..][..rows].iter_mut().enumerate() {
            *to = from[row * stride + column];
        }
    }
}

/// A whole block. To shuffle row `i` with row `i + 8` so that their cells alternate, four times over, transposes 16 rows.
#[cfg(target_arch = "x86_64")]
struct Transpose<'a> {
    simd: V4,
    from: &'a [f32],
    stride: usize,
    to: &'a mut [f32],
    to_stride: usize,
}

#[cfg(target_arch = "x86_64")]
impl NullaryFnOnce for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        const LOW: [u32; BLOCK] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
        const HIGH: [u32; BLOCK] = [8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31];
        let avx512 = self.simd.avx512f;
        let (low, high) = (bytemuck::cast(LOW), bytemuck::cast(HIGH));
        let mut rows = [self.simd.splat_f32x16(0.0); BLOCK];
        for (row, from) in rows.iter_mut().zip(self.from.chunks(self.stride)) {
            *row = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&from[..BLOCK]));
        }
        for _ in 0..4 {
            let before = rows;
            for at in 0..BLOCK / 2 {
                let (upper, lower) = (bytemuck::cast(before[at]), bytemuck::cast(before[at + BLOCK / 2]));
                rows[2 * at] = bytemuck::cast(avx512._mm512_permutex2var_ps(upper, low, lower));
                rows[2 * at + 1] = bytemuck::cast(avx512._mm512_permutex2var_ps(upper, high, lower));
            }
        }
        for (row, to) in rows.iter().zip(self.to.chunks_mut(self.to_stride)) {
            to[..BLOCK].copy_from_slice(bytemuck::cast_slice(std::slice::from_ref(row)));
        }
    }
}
