//! A training step of dense layers without autograd: forward, loss, backward, and the weights' step, by threads that have
//! all their buffers before the first one.
//!
//! The formulas are those of [`Network`](crate::Network), which has candle's autograd for a reference. With `z` the outputs
//! of a row, the delta of the last layer is `(softmax(z) - y) / n`, or `2·(z - y) / n` for a number; that of a layer below
//! is `δ·W` where it was above zero. A gradient is never stored: the tile that sums it up applies it to its weights.
//!
//! Threads share a step thrice: each has its own columns of every layer's weights to transpose, then its own rows of the batch
//! until the deltas are there, then its own columns to follow. They meet in between and at the end. No sum is split, so their
//! number changes no bit.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

use crate::encoding::Rows;
use crate::kernel::{Matrix, PANEL, Panels, Rule, Strips, Then, follow, multiply};
use crate::network::{Layer, to_f64};

/// Rows that go through the layers at once. A larger batch goes in parts, whose gradients are added, so that memory stays
/// flat and what lies between two layers in the cache.
pub(crate) const PASS_ROWS_MAX: usize = 512;

/// Rows times weights of a step from which on threads share it: below, meeting costs more than sharing gains. At 7.6 million
/// two threads gained a tenth to a fifth.
const SHARED_WORK_MIN: usize = 6_000_000;

/// Rows of a step that a thread has at least.
const THREAD_ROWS_MIN: usize = 16;

/// Weights that are being trained, and what that takes.
#[derive(Debug)]
pub(crate) struct Stepper {
    layers: Vec<Layer>,
    classes: bool,
    /// One a thread; so are the batches. Each lock is free whenever it is asked for: who writes when is said by the turns
    /// of the [`Crew`].
    shares: Vec<RwLock<Share>>,
    batches: Vec<RwLock<Batch>>,
}

/// Some columns of every layer's weights.
#[derive(Debug)]
struct Share(Vec<Weights>);

/// Some columns of one layer's weights.
#[derive(Debug)]
struct Weights {
    /// The first of them.
    column: usize,
    weights: Panels,
    /// Empty where nothing outlives a step.
    velocity: Panels,
    /// The weights without the bias, as the deltas of the layer below need them, once a step was begun: none for the first
    /// layer.
    transposed: Option<Panels>,
}

/// Some rows of a batch on their way through the layers.
#[derive(Debug)]
struct Batch {
    /// How many there are this time.
    rows: usize,
    /// The inputs, then the outputs of each layer.
    values: Vec<Matrix>,
    /// The inputs of each layer, in strips.
    strips: Vec<Strips>,
    /// The derivatives of the loss by the outputs of each layer.
    deltas: Vec<Matrix>,
    losses: Vec<f32>,
}

impl Stepper {
    /// To train `weights`, in layout order, on batches of at most `rows`, by up to `threads` threads; to `gather` gradients
    /// or only to descend.
    pub(crate) fn new(
        layers: &[Layer],
        classes: bool,
        weights: &[f32],
        rows: usize,
        gather: bool,
        threads: usize,
    ) -> Self {
        let all: usize = layers.iter().map(|layer| layer.weights()).sum();
        assert_eq!(weights.len(), all, "the weights are of another layout");
        let rows = rows.min(PASS_ROWS_MAX);
        let threads = if rows * all < SHARED_WORK_MIN { 1 } else { threads.clamp(1, (rows / THREAD_ROWS_MIN).max(1)) };
        let shares = (0..threads).map(|nth| RwLock::new(Share::new(layers, weights, gather, nth, threads)));
        let batches = (0..threads).map(|_| RwLock::new(Batch::new(layers, rows.div_ceil(threads))));
        Self { layers: layers.to_vec(), classes, shares: shares.collect(), batches: batches.collect() }
    }

    /// Lets `work` take steps with `rows`, with as many threads as there are shares.
    pub(crate) fn with_crew<T>(&self, rows: &Rows, work: impl FnOnce(&Crew<'_>) -> T) -> T {
        let crew = Crew {
            stepper: self,
            rows,
            order: RwLock::new(Order { picked: Vec::new(), of: 0, rule: Rule::Descend { rate: 0.0 } }),
            turns: AtomicUsize::new(0),
            met: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        };
        thread::scope(|scope| {
            let crew = &crew;
            let _over = Over(crew);
            for nth in 1..self.shares.len() {
                scope.spawn(move || crew.help(nth));
            }
            work(crew)
        })
    }

    /// The outputs of the `picked` rows, at most [`PASS_ROWS_MAX`]. By one thread.
    pub(crate) fn outputs(&mut self, rows: &Rows, picked: &[usize]) -> Vec<f32> {
        let (mut batch, shares) = (write(&self.batches[0]), self.shares());
        batch.forward(&shares, rows, picked);
        batch.values[self.layers.len()].rows().take(picked.len()).flatten().copied().collect()
    }

    /// The weights in layout order.
    pub(crate) fn weights(&self) -> Vec<f32> {
        self.in_layout_order(|layer| &layer.weights)
    }

    /// The gradient that was gathered, in layout order.
    pub(crate) fn gradient(&self) -> Vec<f32> {
        self.in_layout_order(|layer| &layer.velocity)
    }

    fn in_layout_order(&self, of: impl Fn(&Weights) -> &Panels) -> Vec<f32> {
        let mut all = vec![0.0; self.layers.iter().map(|layer| layer.weights()).sum()];
        let shares = self.shares();
        let mut rest = all.as_mut_slice();
        for (at, layer) in self.layers.iter().enumerate() {
            let (own, behind) = rest.split_at_mut(layer.weights());
            let (bias, rows) = own.split_at_mut(layer.outputs);
            shares.iter().map(|share| &share.0[at]).for_each(|part| of(part).store(part.column, bias, rows));
            rest = behind;
        }
        all
    }

    fn shares(&self) -> Vec<RwLockReadGuard<'_, Share>> {
        self.shares.iter().map(read).collect()
    }
}

/// The threads of a stepper at work, each by its number; the caller's is 0.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    stepper: &'a Stepper,
    rows: &'a Rows,
    order: RwLock<Order>,
    /// Steps that were begun.
    turns: AtomicUsize,
    /// How often a thread came to a meeting; there are three a step.
    met: AtomicUsize,
    /// Whether the caller has gone, or a thread panicked.
    over: AtomicBool,
}

/// What is to be done in a step.
#[derive(Debug)]
struct Order {
    picked: Vec<usize>,
    of: usize,
    rule: Rule,
}

/// Dropped, it lets all threads of a crew go.
struct Over<'a>(&'a Crew<'a>);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
    }
}

impl Crew<'_> {
    /// Takes the `picked` rows of a batch of `of` through the layers, does with their part of its gradient as `rule` says, and
    /// says the sum of their losses.
    pub(crate) fn step(&self, picked: &[usize], of: usize, rule: Rule) -> f64 {
        {
            let mut order = write(&self.order);
            order.picked.clear();
            order.picked.extend_from_slice(picked);
            (order.of, order.rule) = (of, rule);
        }
        let turn = self.turns.fetch_add(1, Ordering::AcqRel) + 1;
        self.take_part(0, turn);
        let batches = self.stepper.batches.iter().map(read);
        batches.fold(0.0, |sum, batch| batch.losses[..batch.rows].iter().fold(sum, |sum, loss| sum + f64::from(*loss)))
    }

    /// What another thread than the caller's does: its part of each step, until it is over.
    fn help(&self, nth: usize) {
        let over = Over(self);
        for turn in 1.. {
            if !self.wait(|| self.turns.load(Ordering::Acquire) >= turn) {
                break;
            }
            self.take_part(nth, turn);
        }
        // It is over already; only a panic ends it from here.
        std::mem::forget(over);
    }

    fn take_part(&self, nth: usize, turn: usize) {
        let order = read(&self.order);
        write(&self.stepper.shares[nth]).transpose();
        self.meet(3 * turn - 2);
        self.pass(nth, &order);
        self.meet(3 * turn - 1);
        let batches: Vec<_> = self.stepper.batches.iter().map(read).collect();
        write(&self.stepper.shares[nth]).follow(&batches, order.rule);
        drop((batches, order));
        self.meet(3 * turn);
    }

    /// Takes this thread's rows forward and back.
    fn pass(&self, nth: usize, order: &Order) {
        let Stepper { classes, shares, batches, .. } = self.stepper;
        let (rows, threads) = (order.picked.len(), shares.len());
        let picked = &order.picked[rows * nth / threads..rows * (nth + 1) / threads];
        let mut batch = write(&batches[nth]);
        let shares = self.stepper.shares();
        batch.forward(&shares, self.rows, picked);
        batch.lose(*classes, self.rows, picked, order.of);
        batch.backward(&shares);
        batch.cut();
    }

    /// Waits until all threads came to the meeting of this number.
    fn meet(&self, number: usize) {
        let threads = self.stepper.shares.len();
        if threads > 1 {
            self.met.fetch_add(1, Ordering::AcqRel);
            assert!(
                self.wait(|| self.met.load(Ordering::Acquire) >= number * threads),
                "another thread of the crew died"
            );
        }
    }

    /// Waits for `what`; false if it is over before. A meeting is microseconds away, so it does not sleep; but it lets others
    /// run, who may be who it waits for.
    fn wait(&self, what: impl Fn() -> bool) -> bool {
        for turn in 0.. {
            if what() {
                return true;
            }
            if self.over.load(Ordering::Acquire) {
                return what();
            }
            if turn < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
        }
        false
    }
}

/// Looks at what is waited for before other threads are let run.
const SPINS: u64 = 2_000;

impl Share {
    /// Share `nth` of `all`: whole panels of each layer.
    fn new(layers: &[Layer], weights: &[f32], gather: bool, nth: usize, all: usize) -> Self {
        let mut rest = weights;
        let parts = layers.iter().enumerate().map(|(at, layer)| {
            let (own, behind) = rest.split_at(layer.weights());
            rest = behind;
            let panels = layer.outputs.div_ceil(PANEL);
            let column = |nth: usize| (panels * nth / all * PANEL).min(layer.outputs);
            Weights::new(*layer, own, column(nth)..column(nth + 1), gather, at == 0)
        });
        Self(parts.collect())
    }

    fn follow(&mut self, batches: &[impl Deref<Target = Batch>], rule: Rule) {
        for (at, layer) in self.0.iter_mut().enumerate() {
            let batch: Vec<_> = batches.iter().map(|batch| (&batch.strips[at], &batch.deltas[at])).collect();
            follow(&mut layer.weights, &mut layer.velocity, layer.column, &batch, rule);
        }
    }

    /// Brings the transposes up to date with the weights.
    fn transpose(&mut self) {
        for layer in &mut self.0 {
            if let Some(transposed) = &mut layer.transposed {
                transposed.transpose_of(&layer.weights);
            }
        }
    }
}

impl Weights {
    fn new(layer: Layer, weights: &[f32], columns: std::ops::Range<usize>, gather: bool, first: bool) -> Self {
        let (width, height) = (columns.len(), layer.inputs + 1);
        let mut own = Panels::new(height, width);
        let (bias, rows) = weights.split_at(layer.outputs);
        own.load(columns.start, bias, rows);
        Self {
            column: columns.start,
            weights: own,
            velocity: if gather { Panels::new(height, width) } else { Panels::default() },
            transposed: (!first).then(|| Panels::new(width, layer.inputs)),
        }
    }
}

impl Batch {
    fn new(layers: &[Layer], rows: usize) -> Self {
        let matrix = |width: usize| Matrix::new(rows, width);
        let inputs = layers.first().map(|layer| layer.inputs);
        Self {
            rows: 0,
            values: inputs.into_iter().chain(layers.iter().map(|layer| layer.outputs)).map(matrix).collect(),
            strips: layers.iter().map(|layer| Strips::new(rows, layer.inputs)).collect(),
            deltas: layers.iter().map(|layer| matrix(layer.outputs)).collect(),
            losses: vec![0.0; rows],
        }
    }

    /// Takes the `picked` rows through all layers.
    fn forward(&mut self, shares: &[impl Deref<Target = Share>], rows: &Rows, picked: &[usize]) {
        self.rows = picked.len();
        for (to, &row) in self.values[0].rows_mut().zip(picked) {
            rows.write_features(row, to);
        }
        let last = self.deltas.len() - 1;
        for at in 0..=last {
            let then = if at < last { Then::Relu } else { Then::Store };
            let (from, to) = self.values.split_at_mut(at + 1);
            for Weights { column, weights, .. } in shares.iter().map(|share| &share.0[at]) {
                multiply(&from[at], picked.len(), &[(0, weights)], then, &mut to[0], *column);
            }
        }
    }

    /// The losses, and the deltas of the outputs.
    fn lose(&mut self, classes: bool, rows: &Rows, picked: &[usize], of: usize) {
        let last = self.deltas.len();
        #[allow(clippy::cast_possible_truncation)] // rounds to the nearest f32
        let share = (1.0 / to_f64(of)) as f32;
        let deltas = self.deltas[last - 1].rows_mut().zip(&mut self.losses);
        for ((z, (delta, loss)), &row) in self.values[last].rows().zip(deltas).zip(picked) {
            let target = rows.targets()[row];
            *loss = if classes { cross_entropy(z, target, delta) } else { squared(z, target, delta) };
            delta.iter_mut().for_each(|delta| *delta *= share);
        }
    }

    /// The deltas of all layers but the last, which has its own.
    fn backward(&mut self, shares: &[impl Deref<Target = Share>]) {
        for at in (1..self.deltas.len()).rev() {
            let weights = shares.iter().map(|share| &share.0[at]);
            let parts: Vec<_> = weights.filter_map(|part| Some((part.column, part.transposed.as_ref()?))).collect();
            let (to, from) = self.deltas.split_at_mut(at);
            multiply(&from[0], self.rows, &parts, Then::Where(&self.values[at]), &mut to[at - 1], 0);
        }
    }

    /// Lays the inputs of each layer as its gradient needs them.
    fn cut(&mut self) {
        for (strips, values) in self.strips.iter_mut().zip(&self.values) {
            strips.take(values, self.rows);
        }
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// `log Σ exp(z) - z[class]`, with the largest `z` taken out first, and its derivative.
fn cross_entropy(z: &[f32], class: f32, delta: &mut [f32]) -> f32 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the number of a class
    let class = class as usize;
    let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (delta, z) in delta.iter_mut().zip(z) {
        *delta = (z - max).exp();
        sum += *delta;
    }
    delta.iter_mut().for_each(|delta| *delta /= sum);
    delta[class] -= 1.0;
    sum.ln() - (z[class] - max)
}

/// `(z - y)²` and its derivative.
fn squared(z: &[f32], y: f32, delta: &mut [f32]) -> f32 {
    let error = z[0] - y;
    delta[0] = 2.0 * error;
    error * error
}
