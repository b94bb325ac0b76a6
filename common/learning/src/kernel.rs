//! The products of a dense layer, made for the vectors that the CPU has.
//!
//! Every matrix is kept as [`Panels`]: 32 columns at a time, and of these one row behind the other, as a [`Line`]. Weights have
//! a row for each input, the bias as the last one; a batch has its rows, with a column of ones behind the inputs that the bias
//! is multiplied by: its sum and its gradient need no code of their own. A tile of a product, up to 12 rows by 32
//! columns, takes numbers of one matrix one by one and lines of another. Both lie as it reads them, at distances that are known
//! when this is compiled, in strips that stay in the cache; nothing is packed for it. What the pass back wants the other
//! way round are the deltas of a batch, which are few, not the weights.
//!
//! A tile stays in registers while products are added to it, each cell's in their order, one fused multiply-add at a time.
//! So the bits of a result depend neither on the tiles, nor on how many threads share them, nor on how wide the CPU's
//! vectors are, if only it fuses.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_MM_HINT_T0;
use std::ops::Range;

use protocol::pages::Numbers;
use pulp::{Arch, Scalar512b, Simd, WithSimd};
#[cfg(target_arch = "x86_64")]
use pulp::{NullaryFnOnce, bytemuck, core_arch::x86::Sse, f32x16, x86::V4};

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

/// Columns that are computed of a panel that has no more.
const HALF: usize = PANEL / 2;

/// A row of a panel: two cache lines.
pub(crate) type Line = [f32; PANEL];

/// Panels that are multiplied before the next ones, by all rows: so 16 KiB of lines stay in the nearest cache beside
/// what is fetched ahead. The last ones of a product may be one more.
const BLOCK_PANELS: usize = 4;

/// Lines that are multiplied before a loop looks whether it is at its end: its own arithmetic takes the place of products.
const UNROLLED: usize = 4;

/// Rows from which on blocks pay: with fewer a block is used too seldom to be waited for.
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

/// A matrix, 32 columns at a time; what is missing of the last panel are zeros.
#[derive(Debug, Default)]
pub(crate) struct Panels {
    floats: Aligned,
    rows: usize,
    columns: usize,
}

/// A product's factors: the numbers of some rows of the one side, in panels side by side, and as many lines of the other side.
pub(crate) struct Factors<'a> {
    pub(crate) numbers: &'a [&'a Panels],
    pub(crate) lines: &'a Panels,
}

/// What becomes of a cell of a product.
#[derive(Clone, Copy)]
pub(crate) enum Then {
    /// It is stored.
    Store,
    /// It is stored if it is positive, else zero.
    Relu,
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
        Self::of(Numbers::zeroed(len + LINE - 1))
    }

    /// For whoever writes all of it.
    fn unset(len: usize) -> Self {
        Self::of(Numbers::unset(len + LINE - 1))
    }

    fn of(floats: Numbers<f32>) -> Self {
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

impl Panels {
    pub(crate) fn new(rows: usize, columns: usize) -> Self {
        Self { floats: Aligned::new(rows * columns.next_multiple_of(PANEL)), rows, columns }
    }

    /// For [`Panels::load`], which has to follow: zero where that writes nothing.
    pub(crate) fn to_load(rows: usize, columns: usize) -> Self {
        let floats = Aligned::unset(rows * columns.next_multiple_of(PANEL));
        let mut panels = Self { floats, rows, columns };
        if !columns.is_multiple_of(PANEL) {
            panels.lines_mut(columns / PANEL).as_flattened_mut().fill(0.0);
        }
        panels
    }

    /// With room for whole blocks of rows, as they are turned.
    pub(crate) fn of_batch(rows: usize, columns: usize) -> Self {
        Self::new(rows.next_multiple_of(BLOCK), columns)
    }

    /// Reads a row.
    pub(crate) fn copy_row(&self, row: usize, to: &mut [f32]) {
        to.chunks_mut(PANEL).enumerate().for_each(|(nth, to)| to.copy_from_slice(&self.lines(nth)[row][..to.len()]));
    }

    /// Writes a row.
    pub(crate) fn set_row(&mut self, row: usize, from: &[f32]) {
        let chunks = from.chunks(PANEL).enumerate();
        chunks.for_each(|(nth, from)| self.lines_mut(nth)[row][..from.len()].copy_from_slice(from));
    }

    /// Takes a part of a layer, this being its first row and column, from where a layout has it: the bias, then a row for each
    /// column with a number for each of `inputs`.
    pub(crate) fn load(&mut self, (row, column): (usize, usize), inputs: usize, bias: &[f32], weights: &[f32]) {
        let rows = self.rows.min(inputs - row);
        for (nth, columns) in panels(self.columns).enumerate() {
            let at = column + PANEL * nth;
            let (lines, bias_line) = self.lines_mut(nth).split_at_mut(rows);
            if let Some(bias_line) = bias_line.first_mut() {
                bias_line[..columns].copy_from_slice(&bias[at..][..columns]);
            }
            transpose(&weights[at * inputs + row..], inputs, columns, rows, lines.as_flattened_mut(), PANEL);
        }
    }

    /// The reverse of [`Panels::load`]; says whether all are finite.
    pub(crate) fn store(
        &self,
        (row, column): (usize, usize),
        inputs: usize,
        bias: &mut [f32],
        weights: &mut [f32],
    ) -> bool {
        let (rows, mut finite) = (self.rows.min(inputs - row), true);
        for (nth, columns) in panels(self.columns).enumerate() {
            let at = column + PANEL * nth;
            let (lines, bias_line) = self.lines(nth).split_at(rows);
            if let Some(bias_line) = bias_line.first() {
                bias[at..][..columns].copy_from_slice(&bias_line[..columns]);
            }
            transpose(lines.as_flattened(), PANEL, rows, columns, &mut weights[at * inputs + row..], inputs);
            finite &= all_finite(self.lines(nth).as_flattened());
        }
        finite
    }

    /// Makes the last column one of ones.
    pub(crate) fn end_in_ones(&mut self) {
        let column = self.columns - 1;
        self.lines_mut(column / PANEL).iter_mut().for_each(|line| line[column % PANEL] = 1.0);
    }

    /// Becomes the transpose of the first `rows` rows and `columns` columns of `from`, in whole blocks.
    pub(crate) fn turn(&mut self, from: &Self, rows: usize, columns: usize) {
        each_block(rows, columns, |row, column| {
            let from = &from.lines(column / PANEL)[row..];
            let to = &mut self.lines_mut(row / PANEL)[column..];
            turn_block(from, column % PANEL, to, row % PANEL);
        });
    }

    /// The rows of a panel.
    pub(crate) fn lines(&self, nth: usize) -> &[Line] {
        &self.floats.get().as_chunks().0[nth * self.rows..][..self.rows]
    }

    pub(crate) fn lines_mut(&mut self, nth: usize) -> &mut [Line] {
        &mut self.floats.get_mut().as_chunks_mut().0[nth * self.rows..][..self.rows]
    }
}

/// How many columns each panel of so many has.
pub(crate) fn panels(columns: usize) -> impl Iterator<Item = usize> {
    (0..columns).step_by(PANEL).map(move |column| PANEL.min(columns - column))
}

/// Looks at all of them, whatever it finds: looking for the first would not vectorise.
fn all_finite(values: &[f32]) -> bool {
    values.iter().fold(true, |all, x| all & x.is_finite())
}

/// How many of a panel's columns are computed.
fn width_of(columns: usize) -> usize {
    if columns <= HALF { HALF } else { PANEL }
}

/// `to[panel..][..] ← then(Σ numbers[rows] · lines[..columns])`, over all factors.
pub(crate) fn multiply(
    factors: &[Factors<'_>],
    rows: Range<usize>,
    columns: usize,
    then: Then,
    to: &mut Panels,
    panel: usize,
) {
    let (height, width) = (rows.len(), columns.div_ceil(PANEL));
    if height == 0 || width == 0 {
        return;
    }
    let strips = strips(factors, &rows);
    let mut blocks = strips.chunk_by(|strip, next| strip.block == next.block).peekable();
    let mut first = true;
    while let Some(block) = blocks.next() {
        let tiles = height.div_ceil(tile_rows_max(cpu())) * block.len();
        for (at, columns) in panels(columns).enumerate() {
            let next = match blocks.peek() {
                _ if height < MANY_ROWS => &[],
                _ if at + 1 < width => lines(block, at + 1),
                next => next.map_or(&[][..], |next| lines(next, 0)),
            };
            let product = &mut Product {
                numbers: block,
                lines: lines(block, at),
                next,
                ahead: next.len().div_ceil(tiles),
                first,
                then: if blocks.peek().is_none() { then } else { Then::Store },
                to: &mut to.lines_mut(panel + at)[..height],
            };
            make(height, width_of(columns), product);
        }
        first = false;
    }
}

/// A panel of a product's numbers, and the rows of its lines that they meet.
struct Strip<'a> {
    numbers: &'a [Line],
    lines: &'a Panels,
    rows: Range<usize>,
    /// Which block it belongs to.
    block: usize,
}

/// What is multiplied, in blocks: each by all `rows` before the next one, those of the same factors of as even a size as can be.
/// One panel alone, often but the column of ones, is not worth that all sums pass by once again: a block takes it in.
fn strips<'a>(factors: &[Factors<'a>], rows: &Range<usize>) -> Vec<Strip<'a>> {
    let count = |factors: &Factors<'_>| factors.numbers.iter().map(|side| side.columns.div_ceil(PANEL)).sum::<usize>();
    let mut strips = Vec::with_capacity(factors.iter().map(count).sum());
    let mut blocks = 0;
    for factors in factors {
        let all = count(factors);
        let own = if rows.len() < MANY_ROWS { 1 } else { all.saturating_sub(1).div_ceil(BLOCK_PANELS).max(1) };
        let mut end = 0;
        let sides = factors.numbers.iter();
        let numbers =
            sides.flat_map(|side| panels(side.columns).enumerate().map(|(nth, columns)| (side.lines(nth), columns)));
        for (nth, (numbers, columns)) in numbers.enumerate() {
            let (numbers, block) = (&numbers[rows.clone()], blocks + ((nth + 1) * own - 1) / all);
            strips.push(Strip { numbers, lines: factors.lines, rows: end..end + columns, block });
            end += columns;
        }
        blocks += own;
    }
    strips
}

/// The lines of a block in a panel.
fn lines<'a>(block: &[Strip<'a>], panel: usize) -> &'a [Line] {
    match (block.first(), block.last()) {
        (Some(first), Some(last)) => &first.lines.lines(panel)[first.rows.start..last.rows.end],
        _ => &[],
    }
}

/// Deltas of some rows of a batch.
pub(crate) struct Deltas<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) deltas: &'a Panels,
}

/// Follows the gradient of `weights`: the sum over the rows of a batch of the products of a layer's inputs, which lie side by side
/// and end in ones, and the deltas of its outputs.
pub(crate) fn follow(
    weights: &mut Panels,
    velocity: &mut Panels,
    inputs: &[&Panels],
    deltas: &[Deltas<'_>],
    rule: Rule,
) {
    let parts: Vec<_> = deltas.iter().filter(|part| !part.rows.is_empty()).collect();
    let gathers = matches!(rule, Rule::Gather { .. });
    let mut deltas = Vec::with_capacity(parts.len());
    for (panel, columns) in panels(weights.columns).enumerate() {
        let mut velocity = if gathers { velocity.lines_mut(panel) } else { &mut [] };
        let (mut weights, width) = (weights.lines_mut(panel), width_of(columns));
        if let [Deltas { rows, deltas }] = &parts[..]
            && rows.len() <= tile_rows_max(cpu())
        {
            let (first_row, deltas) = (rows.start, deltas.lines(panel));
            make(rows.len(), width, &mut BriefStep { inputs, first_row, deltas, weights, velocity, rule });
            continue;
        }
        deltas.clear();
        deltas.extend(parts.iter().map(|part| (part.rows.clone(), part.deltas.lines(panel))));
        for side in inputs {
            for (nth, rows) in panels(side.columns).enumerate() {
                let (inputs, deltas) = (side.lines(nth), &deltas);
                make(rows, width, &mut Step { inputs, deltas, weights, velocity, rule });
                (weights, velocity) = (&mut weights[rows..], if gathers { &mut velocity[rows..] } else { velocity });
            }
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
    let arch = cpu();
    let tiles = rows.div_ceil(tile_rows_max(arch)).max(1);
    let (low, higher) = (rows / tiles, rows % tiles);
    let higher_end = higher * (low + 1);
    for (at, tiles, height) in [(0, higher, low + 1), (higher_end, tiles - higher, low)] {
        // Of a height that nothing has there is no function.
        if tiles == 0 {
            continue;
        }
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
            _ => debug_assert_eq!(height, 0, "no tile is higher than 12 rows"),
        }
    }
}

/// The vectors that the CPU has; in tests those that it is to pretend to have.
fn cpu() -> Arch {
    #[cfg(test)]
    if let Some(arch) = *tests::PRETENDED.read().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return arch;
    }
    Arch::new()
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
        // The arrays that stand in for vectors have tiles of one row: of more they would be most of the program.
        match (S::F32_LANES, WHOLE) {
            (16, true) if ROWS == 1 || S::REGISTER_COUNT == 32 => self.make_all::<S, 2>(simd),
            (16, false) if ROWS == 1 || S::REGISTER_COUNT == 32 => self.make_all::<S, 1>(simd),
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
    cpu().dispatch(Chains { turns, factor: std::hint::black_box(0.999) })
}

struct Product<'a> {
    numbers: &'a [Strip<'a>],
    lines: &'a [Line],
    /// Lines that are wanted after these, and how many of them are asked for with each panel.
    next: &'a [Line],
    ahead: usize,
    /// Whether nothing was summed up before.
    first: bool,
    then: Then,
    to: &'a mut [Line],
}

impl Tile for Product<'_> {
    #[inline(always)]
    fn make<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, at: usize) {
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[zero; VECTORS]; ROWS];
        let to: &mut [Line; ROWS] = self.to[at..].first_chunk_mut().expect(TILES_FIT);
        if !self.first {
            unroll!(r in ROWS {
                sums[r] = *vectors::<S, VECTORS>(&to[r]);
            });
        }
        let asked = asked(ROWS);
        let mut lines = self.lines;
        for Strip { numbers, rows, .. } in self.numbers {
            // Behind the last row is another panel, or nothing: asking for it does no harm.
            let below = numbers[at..].as_ptr().wrapping_add(ROWS).cast::<[f32; LINE]>();
            let numbers: &[Line; ROWS] = numbers[at..].first_chunk().expect(TILES_FIT);
            let (own, behind) = lines.split_at(rows.len());
            lines = behind;
            let (soon, later) = self.next.split_at(self.ahead.min(self.next.len()));
            self.next = later;
            prefetch(soon);
            let (groups, rest) = own.as_chunks::<UNROLLED>();
            for (group, lines) in (0..PANEL / UNROLLED).zip(groups) {
                unroll!(nth in asked {
                    ask_for(below.wrapping_add(asked * group + nth));
                });
                unroll!(k in UNROLLED {
                    let line = vectors::<S, VECTORS>(&lines[k]);
                    unroll!(r in ROWS {
                        let x = simd.splat_f32s(numbers[r].as_chunks::<UNROLLED>().0[group][k]);
                        unroll!(v in VECTORS {
                            sums[r][v] = simd.mul_add_e_f32s(x, line[v], sums[r][v]);
                        });
                    });
                });
            }
            for (k, line) in (own.len() - rest.len()..PANEL).zip(rest) {
                let line = vectors::<S, VECTORS>(line);
                unroll!(r in ROWS {
                    let x = simd.splat_f32s(numbers[r][k]);
                    unroll!(v in VECTORS {
                        sums[r][v] = simd.mul_add_e_f32s(x, line[v], sums[r][v]);
                    });
                });
            }
        }
        if let Then::Relu = self.then {
            unroll!(r in ROWS {
                unroll!(v in VECTORS {
                    // In this order a NaN stays one.
                    sums[r][v] = simd.max_f32s(zero, sums[r][v]);
                });
            });
        }
        unroll!(r in ROWS {
            *vectors_mut::<S, VECTORS>(&mut to[r]) = sums[r];
        });
    }
}

const TILES_FIT: &str = "a tile ends where the rows do";

/// The first vectors of a line.
#[inline(always)]
fn vectors<S: Simd, const VECTORS: usize>(line: &Line) -> &[S::f32s; VECTORS] {
    S::as_simd_f32s(line).0.first_chunk().expect("a line is no shorter than a tile is wide")
}

/// See [`vectors`].
#[inline(always)]
fn vectors_mut<S: Simd, const VECTORS: usize>(line: &mut Line) -> &mut [S::f32s; VECTORS] {
    S::as_mut_simd_f32s(line).0.first_chunk_mut().expect("a line is no shorter than a tile is wide")
}

/// Asks for lines that are wanted soon: a tile takes longer than memory does.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(lines: &[Line]) {
    let Some(sse) = Sse::try_new() else { return };
    for half in lines.as_flattened().chunks_exact(LINE) {
        sse._mm_prefetch::<_MM_HINT_T0>(half.as_ptr().cast());
    }
}

/// Asks for a cache line, if there is one.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask_for(line: *const [f32; LINE]) {
    if let Some(sse) = Sse::try_new() {
        sse._mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: &[Line]) {}

#[cfg(not(target_arch = "x86_64"))]
fn ask_for(_: *const [f32; LINE]) {}

/// Cache lines that are asked for with each group of lines, so that what the next tile takes of a panel is there when it begins; all
/// at once would keep others waiting. A tile of fewer rows is mostly all that there is.
const fn asked(rows: usize) -> usize {
    if rows > 10 { (PANEL / LINE * rows * UNROLLED).div_ceil(PANEL) } else { 0 }
}

struct Step<'a> {
    inputs: &'a [Line],
    deltas: &'a [(Range<usize>, &'a [Line])],
    weights: &'a mut [Line],
    velocity: &'a mut [Line],
    rule: Rule,
}

impl Tile for Step<'_> {
    #[inline(always)]
    fn make<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, at: usize) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        // What the next tile takes of the weights; as with a product's numbers, to ask for more than there is does no harm.
        let mut below = self.weights[at..].as_ptr().wrapping_add(ROWS).cast::<[f32; LINE]>();
        for (rows, deltas) in self.deltas {
            let (inputs, inputs_rest) = self.inputs[rows.clone()].as_chunks::<UNROLLED>();
            let (deltas, deltas_rest) = deltas[..rows.len()].as_chunks::<UNROLLED>();
            for (inputs, deltas) in inputs.iter().zip(deltas) {
                ask_for(below);
                below = below.wrapping_add(1);
                unroll!(k in UNROLLED {
                    let inputs: &[f32; ROWS] = inputs[k][at..].first_chunk().expect(TILES_FIT);
                    let deltas = vectors::<S, VECTORS>(&deltas[k]);
                    unroll!(r in ROWS {
                        let x = simd.splat_f32s(inputs[r]);
                        unroll!(v in VECTORS {
                            sums[r][v] = simd.mul_add_e_f32s(x, deltas[v], sums[r][v]);
                        });
                    });
                });
            }
            for (inputs, deltas) in inputs_rest.iter().zip(deltas_rest) {
                let inputs: &[f32; ROWS] = inputs[at..].first_chunk().expect(TILES_FIT);
                let deltas = vectors::<S, VECTORS>(deltas);
                unroll!(r in ROWS {
                    let x = simd.splat_f32s(inputs[r]);
                    unroll!(v in VECTORS {
                        sums[r][v] = simd.mul_add_e_f32s(x, deltas[v], sums[r][v]);
                    });
                });
            }
        }
        let weights: &mut [Line; ROWS] = self.weights[at..].first_chunk_mut().expect(TILES_FIT);
        match self.rule {
            Rule::Descend { rate } => {
                unroll!(r in ROWS {
                    descend::<S, VECTORS>(simd, rate, &sums[r], &mut weights[r]);
                });
            }
            Rule::Gather { kept, rate } => {
                let velocity: &mut [Line; ROWS] = self.velocity[at..].first_chunk_mut().expect(TILES_FIT);
                unroll!(r in ROWS {
                    gather::<S, VECTORS>(simd, kept, &mut sums[r], &mut velocity[r]);
                    if let Some(rate) = rate {
                        descend::<S, VECTORS>(simd, rate, &sums[r], &mut weights[r]);
                    }
                });
            }
        }
    }
}

/// `w ← w - rate·g`
#[inline(always)]
fn descend<S: Simd, const VECTORS: usize>(simd: S, rate: f32, gradient: &[S::f32s; VECTORS], weights: &mut Line) {
    let (rate, weights) = (simd.splat_f32s(-rate), vectors_mut::<S, VECTORS>(weights));
    unroll!(v in VECTORS {
        weights[v] = simd.mul_add_e_f32s(rate, gradient[v], weights[v]);
    });
}

/// `v ← kept·v + g`, and `g` becomes `v`.
#[inline(always)]
fn gather<S: Simd, const VECTORS: usize>(simd: S, kept: f32, gradient: &mut [S::f32s; VECTORS], velocity: &mut Line) {
    let (kept, velocity) = (simd.splat_f32s(kept), vectors_mut::<S, VECTORS>(velocity));
    unroll!(v in VECTORS {
        gradient[v] = simd.mul_add_e_f32s(kept, velocity[v], gradient[v]);
        velocity[v] = gradient[v];
    });
}

/// A [`Step`] of a batch that is no more than a tile is high: its deltas stay in registers, and the weights pass by. Tiles of
/// weights would begin and end more often than they multiply.
struct BriefStep<'a> {
    inputs: &'a [&'a Panels],
    /// The first row of the inputs.
    first_row: usize,
    deltas: &'a [Line],
    weights: &'a mut [Line],
    velocity: &'a mut [Line],
    rule: Rule,
}

impl Tile for BriefStep<'_> {
    #[inline(always)]
    fn make<S: Simd, const ROWS: usize, const VECTORS: usize>(&mut self, simd: S, _: usize) {
        let lines: &[Line; ROWS] = self.deltas.first_chunk().expect(TILES_FIT);
        let mut deltas = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        unroll!(r in ROWS {
            deltas[r] = *vectors::<S, VECTORS>(&lines[r]);
        });
        let mut from = 0;
        for side in self.inputs {
            for (nth, rows) in panels(side.columns).enumerate() {
                let inputs: &[Line; ROWS] = side.lines(nth)[self.first_row..].first_chunk().expect(TILES_FIT);
                let whole = rows / GROUP * GROUP;
                for k in (0..whole).step_by(GROUP) {
                    self.group::<S, ROWS, VECTORS, GROUP>(simd, inputs, (k, from + k), &deltas);
                }
                for k in whole..rows {
                    self.group::<S, ROWS, VECTORS, 1>(simd, inputs, (k, from + k), &deltas);
                }
                from += rows;
            }
        }
    }
}

/// Rows of weights whose sums are made side by side: one alone waits for itself at each addition.
const GROUP: usize = 4;

impl BriefStep<'_> {
    /// Does `GROUP` rows of weights from `row`, where the inputs are in columns from `k`.
    #[inline(always)]
    fn group<S: Simd, const ROWS: usize, const VECTORS: usize, const GROUP: usize>(
        &mut self,
        simd: S,
        inputs: &[Line; ROWS],
        (k, row): (usize, usize),
        deltas: &[[S::f32s; VECTORS]; ROWS],
    ) {
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; GROUP];
        unroll!(r in ROWS {
            let inputs: &[f32; GROUP] = inputs[r][k..].first_chunk().expect(TILES_FIT);
            unroll!(at in GROUP {
                let x = simd.splat_f32s(inputs[at]);
                unroll!(v in VECTORS {
                    sums[at][v] = simd.mul_add_e_f32s(x, deltas[r][v], sums[at][v]);
                });
            });
        });
        let weights: &mut [Line; GROUP] = self.weights[row..].first_chunk_mut().expect(TILES_FIT);
        match self.rule {
            Rule::Descend { rate } => {
                unroll!(at in GROUP {
                    descend::<S, VECTORS>(simd, rate, &sums[at], &mut weights[at]);
                });
            }
            Rule::Gather { kept, rate } => {
                let velocity: &mut [Line; GROUP] = self.velocity[row..].first_chunk_mut().expect(TILES_FIT);
                unroll!(at in GROUP {
                    gather::<S, VECTORS>(simd, kept, &mut sums[at], &mut velocity[at]);
                    if let Some(rate) = rate {
                        descend::<S, VECTORS>(simd, rate, &sums[at], &mut weights[at]);
                    }
                });
            }
        }
    }
}

/// Of the transpose of `by_columns`, which has so many rows and columns, `by_rows` takes what stands where `values` are positive,
/// and zeros for the rest; `by_columns` becomes its transpose if that is wanted.
pub(crate) fn keep_positive(
    by_columns: &mut Panels,
    by_rows: &mut Panels,
    values: &Panels,
    (rows, columns): (usize, usize),
    turned_back: bool,
) {
    let arch = cpu();
    each_block(rows, columns, |row, column| {
        let turned = &mut by_columns.lines_mut(row / PANEL)[column..];
        let to = &mut by_rows.lines_mut(column / PANEL)[row..];
        let values = &values.lines(column / PANEL)[row..];
        match arch {
            #[cfg(target_arch = "x86_64")]
            Arch::V4(simd) => simd.vectorize(KeepPositive {
                simd,
                by_columns: (turned, row % PANEL),
                by_rows: (to, column % PANEL),
                values,
                turned_back,
            }),
            _ => keep_positive_block((turned, row % PANEL), (to, column % PANEL), values, turned_back),
        }
    });
}

fn keep_positive_block(
    (turned, row): (&mut [Line], usize),
    (to, column): (&mut [Line], usize),
    values: &[Line],
    turned_back: bool,
) {
    turn_block(turned, row, to, column);
    for (to, values) in to[..BLOCK].iter_mut().zip(values) {
        let (to, values) = (&mut to[column..][..BLOCK], &values[column..][..BLOCK]);
        to.iter_mut().zip(values).for_each(|(to, value)| *to = if *value > 0.0 { *to } else { 0.0 });
    }
    if turned_back {
        turn_block(to, column, turned, row);
    }
}

/// Rows and columns that are transposed at once: a cache line each.
const BLOCK: usize = LINE;

/// Does something with each block by its first row and column, those that are one below the other in turn.
fn each_block(rows: usize, columns: usize, mut with: impl FnMut(usize, usize)) {
    for column in (0..columns).step_by(BLOCK) {
        (0..rows).step_by(BLOCK).for_each(|row| with(row, column));
    }
}

/// Writes the transpose of the block at the start of `from` and a column to the start of `to` and a column.
fn turn_block(from: &[Line], column: usize, to: &mut [Line], to_column: usize) {
    let (from, to) = (&from.as_flattened()[column..], &mut to.as_flattened_mut()[to_column..]);
    transpose(from, PANEL, BLOCK, BLOCK, to, PANEL);
}

/// `to[column][row] ← from[row][column]`: the rows of `from` are `stride` apart, those of `to` are `to_stride` apart.
fn transpose(from: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [f32], to_stride: usize) {
    let arch = cpu();
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
        let mut rows = [self.simd.splat_f32x16(0.0); BLOCK];
        for (at, row) in rows.iter_mut().enumerate() {
            *row = bytemuck::cast(*sixteen(self.from, at * self.stride));
        }
        for (at, row) in turned(self.simd, rows).iter().enumerate() {
            *sixteen_mut(self.to, at * self.to_stride) = bytemuck::cast(*row);
        }
    }
}

/// The transpose of 16 rows.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn turned(simd: V4, mut rows: [f32x16; BLOCK]) -> [f32x16; BLOCK] {
    const LOW: [u32; BLOCK] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
    const HIGH: [u32; BLOCK] = [8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31];
    let (low, high) = (bytemuck::cast(LOW), bytemuck::cast(HIGH));
    for _ in 0..4 {
        let before = rows;
        for at in 0..BLOCK / 2 {
            let (upper, lower) = (bytemuck::cast(before[at]), bytemuck::cast(before[at + BLOCK / 2]));
            rows[2 * at] = bytemuck::cast(simd.avx512f._mm512_permutex2var_ps(upper, low, lower));
            rows[2 * at + 1] = bytemuck::cast(simd.avx512f._mm512_permutex2var_ps(upper, high, lower));
        }
    }
    rows
}

/// A block of [`keep_positive`], which stays in registers between the one way and the other.
#[cfg(target_arch = "x86_64")]
struct KeepPositive<'a> {
    simd: V4,
    /// At the block's first line, and its column there; so the others.
    by_columns: (&'a mut [Line], usize),
    by_rows: (&'a mut [Line], usize),
    values: &'a [Line],
    turned_back: bool,
}

#[cfg(target_arch = "x86_64")]
impl NullaryFnOnce for KeepPositive<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { simd, by_columns: (by_columns, from), by_rows: (by_rows, column), values, turned_back } = self;
        // Of a length that is known, or they would not stay in registers.
        let by_columns: &mut [Line; BLOCK] = by_columns.first_chunk_mut().expect(BLOCKS_FIT);
        let by_rows: &mut [Line; BLOCK] = by_rows.first_chunk_mut().expect(BLOCKS_FIT);
        let values: &[Line; BLOCK] = values.first_chunk().expect(BLOCKS_FIT);
        let zero = simd.splat_f32x16(0.0);
        let mut rows = [zero; BLOCK];
        for at in 0..BLOCK {
            rows[at] = bytemuck::cast(*sixteen(&by_columns[at], from));
        }
        rows = turned(simd, rows);
        for at in 0..BLOCK {
            let positive = simd.cmp_gt_f32x16(bytemuck::cast(*sixteen(&values[at], column)), zero);
            rows[at] = simd.select_f32x16(positive, rows[at], zero);
            *sixteen_mut(&mut by_rows[at], column) = bytemuck::cast(rows[at]);
        }
        if turned_back {
            rows = turned(simd, rows);
            for at in 0..BLOCK {
                *sixteen_mut(&mut by_columns[at], from) = bytemuck::cast(rows[at]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
const BLOCKS_FIT: &str = "whatever is turned has room for whole blocks";

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn sixteen(floats: &[f32], from: usize) -> &[f32; BLOCK] {
    floats[from..].first_chunk().expect(BLOCKS_FIT)
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn sixteen_mut(floats: &mut [f32], from: usize) -> &mut [f32; BLOCK] {
    floats[from..].first_chunk_mut().expect(BLOCKS_FIT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    use super::*;

    use std::ops::ControlFlow;
    use std::sync::{PoisonError, RwLock};

    use protocol::draw::Draw;
    use protocol::layout::to_bytes;
    use protocol::plan::{BatchSize, ModelSpec, TrainSpec};

    use crate::encoding::Rows;
    use crate::network::Network;
    use crate::schema::{ColumnSchema, Encoding, Schema, Target};
    use crate::training::TaskKey;

    /// Whoever trains meanwhile gives the same bits.
    pub(super) static PRETENDED: RwLock<Option<Arch>> = RwLock::new(None);

    /// What this CPU may pretend to have, besides what it has.
    fn lesser() -> impl Iterator<Item = Arch> {
        #[cfg(target_arch = "x86_64")]
        let with_avx2 = pulp::x86::V3::try_new().map(Arch::V3);
        #[cfg(not(target_arch = "x86_64"))]
        let with_avx2 = None;
        [Some(Arch::Scalar), with_avx2].into_iter().flatten()
    }

    /// The bits of the weights after some steps between made-up rows and targets.
    fn trained(sizes: &[usize], rows: usize, batch: u32, momentum: f64) -> Vec<u32> {
        let (inputs, outputs) = (sizes[0], sizes[sizes.len() - 1]);
        let numeric = Encoding::Numeric { mean: 0.0, deviation: 1.0, missing: false };
        let columns = (0..inputs).map(|i| ColumnSchema { name: format!("x{i}"), encoding: numeric.clone() }).collect();
        let target = Target::Classification { classes: (0..outputs).map(|c| c.to_string()).collect() };
        let schema = Schema { label: "y".into(), target, columns };
        let hidden = sizes[1..sizes.len() - 1].iter().map(|&width| width as u32).collect();
        let network = Network::new(&ModelSpec::Mlp { hidden }, &schema).unwrap().with_threads(2);
        let mut draw = Draw::new(5, "test rows", 0, "");
        let mut values = Vec::new();
        for row in 0..rows {
            values.extend((0..inputs).map(|_| (2.0 * draw.uniform() - 1.0) as f32));
            values.push((row * 7 % outputs) as f32);
        }
        let mut encoded = Rows::new(&schema);
        encoded.append(&to_bytes(&values), &schema).unwrap();
        let spec = TrainSpec { batch_size: BatchSize::Rows(batch), momentum, ..TrainSpec::default() };
        let key = TaskKey { round: 1, name: "w" };
        let mut go_on = |_| ControlFlow::Continue(());
        let trained = network.train(&network.initial(7), &encoded, &spec, key, &mut go_on).unwrap();
        trained.weights.iter().map(|weight| weight.to_bits()).collect()
    }

    #[test]
    fn every_width_of_vectors_gives_the_same_bits() {
        let shapes: &[(&[usize], usize, u32)] = &[
            (&[13, 64, 32, 2], 96, 32),
            (&[1, 2], 5, 3),
            (&[31, 33, 17, 16, 15, 3], 23, 11),
            (&[17, 16, 32, 100], 130, 64),
            (&[70, 96, 130, 10], 60, 60),
            (&[300, 256, 200, 10], 128, 128),
        ];
        for &(sizes, rows, batch) in shapes {
            for momentum in [0.0, 0.9] {
                let expected = trained(sizes, rows, batch, momentum);
                for arch in lesser() {
                    *PRETENDED.write().unwrap() = Some(arch);
                    let got = trained(sizes, rows, batch, momentum);
                    *PRETENDED.write().unwrap_or_else(PoisonError::into_inner) = None;
                    assert!(got == expected, "{sizes:?}, {rows} rows, {arch:?}");
                }
            }
        }
    }
}
