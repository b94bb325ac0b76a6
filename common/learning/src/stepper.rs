//! A training step of dense layers without autograd: forward, loss, backward, and the weights' step, by threads that have
//! all their buffers before the first one.
//!
//! The formulas are those of [`Network`](crate::Network), which has candle's autograd for a reference. With `z` the outputs
//! of a row, the delta of the last layer is `(softmax(z) - y) / n`, or `2·(z - y) / n` for a number; that of a layer below
//! is `δ·W` where it was above zero. A gradient is never stored: the tile that sums it up applies it to its weights.
//!
//! Threads share a step by columns: each has its own of the inputs and of every layer's weights, outputs and deltas, so that its
//! weights stay in its core's cache; only the outputs of the last layer, whose rows a loss is made of, are shared by rows. They
//! meet after each layer on the way there and back, and at the end. No sum is split, so their number changes no bit.

use std::ops::{Deref, Range};
use std::panic::resume_unwind;
use std::slice::from_ref;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

use protocol::pages::Numbers;

use crate::encoding::Rows;
use crate::kernel::{Deltas, Factors, PANEL, Panels, Rule, Then, follow, keep_positive, multiply};
use crate::network::{Layer, to_f64};

/// Rows that go through the layers at once. A larger batch goes in parts, whose gradients are added, so that memory stays
/// flat and what lies between two layers in the cache.
pub(crate) const PASS_ROWS_MAX: usize = 512;

/// Rows times weights of a step from which on threads share it: below, meeting costs more than sharing gains. At 7.6 million
/// two threads gained a tenth to a fifth.
const SHARED_WORK_MIN: usize = 6_000_000;

/// Rows that are gathered side by side, a panel at a time: one row's lines lie far from each other, panel by panel.
const GATHERED: usize = 16;

/// Weights that are being trained, and what that takes.
#[derive(Debug)]
pub(crate) struct Stepper {
    layers: Vec<Layer>,
    classes: bool,
    /// One a thread. Each lock in them is free whenever it is asked for: who writes when is said by the turns of the [`Crew`].
    shares: Vec<Share>,
}

/// What a thread has of a step.
#[derive(Debug)]
struct Share {
    layers: Vec<LayerShare>,
    outputs: RwLock<Outputs>,
}

/// Some columns of one layer, with all rows of a batch.
#[derive(Debug)]
struct LayerShare {
    /// Its columns of the layer's inputs; the last share's end in ones.
    inputs: RwLock<Panels>,
    /// Its columns of the layer's outputs.
    columns: Range<usize>,
    weights: RwLock<Weights>,
    /// Of its columns of the outputs; none for the last layer.
    deltas: RwLock<Turned>,
}

/// Some columns of one layer's weights, or rows of the last one's.
#[derive(Debug)]
struct Weights {
    /// Their first row and column.
    from: (usize, usize),
    weights: Panels,
    /// Empty where nothing outlives a step.
    velocity: Panels,
}

/// Deltas, also the other way round, as the layer below makes its own of them.
#[derive(Debug, Default)]
struct Turned {
    by_rows: Panels,
    by_columns: Panels,
}

/// Some rows of the last layer's outputs.
#[derive(Debug)]
struct Outputs {
    values: Panels,
    deltas: Turned,
    losses: Vec<f32>,
}

/// Share `nth` of `all` of so many columns or rows: whole panels.
fn share(of: usize, nth: usize, all: usize) -> Range<usize> {
    let panels = of.div_ceil(PANEL);
    let start = |nth: usize| (panels * nth / all * PANEL).min(of);
    start(nth)..start(nth + 1)
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
        // What is shared by columns, and the rows of the last layer's weights.
        let hidden = layers.iter().skip(1).map(|layer| layer.inputs);
        let widest = hidden.max().or(layers.first().map(|layer| layer.inputs)).unwrap_or(0);
        let threads = if rows * all < SHARED_WORK_MIN { 1 } else { threads.clamp(1, widest.div_ceil(PANEL).max(1)) };
        let shares = together(0..threads, |nth| Share::new(layers, weights, rows, gather, nth, threads));
        Self { layers: layers.to_vec(), classes, shares }
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
        assert_eq!(self.shares.len(), 1, "one thread has all columns");
        self.gather(0, rows, picked);
        for at in 0..self.layers.len() - 1 {
            self.forward(0, at, picked.len());
        }
        self.output(0, picked.len());
        let width = self.layers[self.layers.len() - 1].outputs;
        let (outputs, mut all) = (read(&self.shares[0].outputs), vec![0.0; picked.len() * width]);
        all.chunks_exact_mut(width).enumerate().for_each(|(row, to)| outputs.values.copy_row(row, to));
        all
    }

    /// The weights in layout order, if all are finite.
    pub(crate) fn weights(&self) -> Option<Numbers<f32>> {
        self.in_layout_order(|layer| &layer.weights)
    }

    /// The gradient that was gathered, in layout order, if all of it is finite.
    pub(crate) fn gradient(&self) -> Option<Numbers<f32>> {
        self.in_layout_order(|layer| &layer.velocity)
    }

    /// Each thread gives what it has in its core's cache, and all is given; of the last layer, where that is not in one piece, the caller's.
    fn in_layout_order(&self, of: impl Fn(&Weights) -> &Panels + Sync) -> Option<Numbers<f32>> {
        let mut all = Numbers::unset(self.layers.iter().map(|layer| layer.weights()).sum());
        let (last, hidden) = self.layers.split_last()?;
        let mut rest = &mut all[..];
        let mut places: Vec<_> = self.shares.iter().map(|_| Vec::new()).collect();
        for (at, layer) in hidden.iter().enumerate() {
            let (mut bias, mut rows) =
                (rest.split_off_mut(..layer.outputs)?, rest.split_off_mut(..layer.inputs * layer.outputs)?);
            for (share, places) in self.shares.iter().zip(&mut places) {
                let columns = share.layers[at].columns.len();
                places.push((bias.split_off_mut(..columns)?, rows.split_off_mut(..columns * layer.inputs)?));
            }
        }
        let finite = together(self.shares.iter().zip(places), |(share, places)| {
            let parts = share.layers.iter().zip(hidden).zip(places);
            parts.fold(true, |finite, ((part, layer), (bias, rows))| {
                of(&read(&part.weights)).store((0, 0), layer.inputs, bias, rows) && finite
            })
        });
        let (bias, rows) = rest.split_at_mut(last.outputs);
        let finite = self.shares.iter().zip(finite).fold(true, |all_finite, (share, finite)| {
            let part = read(&share.layers[hidden.len()].weights);
            of(&part).store(part.from, last.inputs, bias, rows) && finite && all_finite
        });
        finite.then_some(all)
    }

    /// Takes a share's columns of the `picked` rows' inputs.
    fn gather(&self, nth: usize, rows: &Rows, picked: &[usize]) {
        let columns = share(self.layers[0].inputs, nth, self.shares.len());
        let mut inputs = write(&self.shares[nth].layers[0].inputs);
        for (first, picked) in (0..).step_by(GATHERED).zip(picked.chunks(GATHERED)) {
            for (panel, from) in columns.clone().step_by(PANEL).enumerate() {
                let width = PANEL.min(columns.end - from);
                let lines = inputs.lines_mut(panel)[first..].iter_mut().zip(picked);
                lines.for_each(|(line, &row)| rows.write_inputs(row, from, &mut line[..width]));
            }
        }
    }

    /// Makes a share's outputs of layer `at`, which is not the last one.
    fn forward(&self, nth: usize, at: usize, rows: usize) {
        let own = &self.shares[nth].layers[at];
        let (inputs, weights) = (self.inputs(at), read(&own.weights));
        let factors = [Factors { numbers: &panels(&inputs), lines: &weights.weights }];
        let mut outputs = write(&self.shares[nth].layers[at + 1].inputs);
        multiply(&factors, 0..rows, own.columns.len(), Then::Relu, &mut outputs, 0);
        if nth + 1 == self.shares.len() {
            outputs.end_in_ones();
        }
    }

    /// Makes a share's rows of the last layer's outputs.
    fn output(&self, nth: usize, rows: usize) {
        let last = self.layers.len() - 1;
        let (inputs, mut outputs) = (self.inputs(last), write(&self.shares[nth].outputs));
        let weights: Vec<_> = self.shares.iter().map(|share| read(&share.layers[last].weights)).collect();
        let inputs = panels(&inputs);
        let factors = inputs.iter().zip(&weights);
        let factors = factors.map(|(inputs, weights)| Factors { numbers: from_ref(inputs), lines: &weights.weights });
        let (rows, columns) = (share(rows, nth, self.shares.len()), self.layers[last].outputs);
        multiply(&factors.collect::<Vec<_>>(), rows, columns, Then::Store, &mut outputs.values, 0);
    }

    /// The losses of a share's rows, and the deltas of their outputs.
    fn lose(&self, nth: usize, rows: &Rows, order: &Order) {
        let own = share(order.picked.len(), nth, self.shares.len());
        #[allow(clippy::cast_possible_truncation)] // rounds to the nearest f32
        let scale = (1.0 / to_f64(order.of)) as f32;
        let width = self.layers[self.layers.len() - 1].outputs;
        let Outputs { values, deltas, losses } = &mut *write(&self.shares[nth].outputs);
        let (mut z, mut delta) = (vec![0.0; width], vec![0.0; width]);
        losses.clear();
        for (at, &row) in order.picked[own.clone()].iter().enumerate() {
            values.copy_row(at, &mut z);
            let target = rows.targets()[row];
            losses.push(if self.classes {
                cross_entropy(&z, target, &mut delta)
            } else {
                squared(&z, target, &mut delta)
            });
            delta.iter_mut().for_each(|delta| *delta *= scale);
            deltas.by_rows.set_row(at, &delta);
        }
        if self.layers.len() > 1 {
            deltas.by_columns.turn(&deltas.by_rows, own.len(), width);
        }
    }

    /// Makes a share's deltas of layer `at`, which is not the last one, of those of the layer above.
    fn backward(&self, nth: usize, at: usize, rows: usize) {
        let LayerShare { columns, deltas, .. } = &self.shares[nth].layers[at];
        let Turned { by_rows, by_columns } = &mut *write(deltas);
        if at + 2 == self.layers.len() {
            let weights = read(&self.shares[nth].layers[at + 1].weights);
            for (part, above) in self.shares.iter().enumerate() {
                let (rows, above) = (share(rows, part, self.shares.len()), read(&above.outputs));
                let factors = [Factors { numbers: &[&weights.weights], lines: &above.deltas.by_columns }];
                multiply(&factors, 0..columns.len(), rows.len(), Then::Store, by_columns, rows.start / PANEL);
            }
        } else {
            let above = self.shares.iter().map(|share| &share.layers[at + 1]);
            let above: Vec<_> = above.map(|layer| (read(&layer.weights), read(&layer.deltas))).collect();
            let weights: Vec<_> = above.iter().map(|(weights, _)| &weights.weights).collect();
            let factors = weights.iter().zip(&above);
            let factors =
                factors.map(|(weights, (_, deltas))| Factors { numbers: from_ref(weights), lines: &deltas.by_columns });
            multiply(&factors.collect::<Vec<_>>(), columns.clone(), rows, Then::Store, by_columns, 0);
        }
        let values = read(&self.shares[nth].layers[at + 1].inputs);
        keep_positive(by_columns, by_rows, &values, (rows, columns.len()), at > 0);
    }

    /// Follows the gradient of a share's weights of layer `at`.
    fn follow(&self, nth: usize, at: usize, rows: usize, rule: Rule) {
        let LayerShare { inputs, weights, deltas, .. } = &self.shares[nth].layers[at];
        let Weights { weights, velocity, .. } = &mut *write(weights);
        if at + 1 < self.layers.len() {
            let deltas = read(deltas);
            let deltas = [Deltas { rows: 0..rows, deltas: &deltas.by_rows }];
            follow(weights, velocity, &panels(&self.inputs(at)), &deltas, rule);
        } else {
            let outputs: Vec<_> = self.shares.iter().map(|share| read(&share.outputs)).collect();
            let rows = |part| share(rows, part, self.shares.len());
            let deltas = outputs.iter().enumerate();
            let deltas = deltas.map(|(part, outputs)| Deltas { rows: rows(part), deltas: &outputs.deltas.by_rows });
            follow(weights, velocity, &[&read(inputs)], &deltas.collect::<Vec<_>>(), rule);
        }
    }

    /// The inputs of layer `at`, side by side.
    fn inputs(&self, at: usize) -> Vec<RwLockReadGuard<'_, Panels>> {
        self.shares.iter().map(|share| read(&share.layers[at].inputs)).collect()
    }
}

fn panels(guards: &[impl Deref<Target = Panels>]) -> Vec<&Panels> {
    guards.iter().map(|guard| &**guard).collect()
}

/// The threads of a stepper at work, each by its number; the caller's is 0.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    stepper: &'a Stepper,
    rows: &'a Rows,
    order: RwLock<Order>,
    /// Steps that were begun.
    turns: AtomicUsize,
    /// How often a thread came to a meeting; they do after each part of a step.
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
        let outputs = self.stepper.shares.iter().map(|share| read(&share.outputs));
        outputs.fold(0.0, |sum, outputs| outputs.losses.iter().fold(sum, |sum, loss| sum + f64::from(*loss)))
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
        let (stepper, rows, last) = (self.stepper, order.picked.len(), self.stepper.layers.len() - 1);
        let mut meetings = (turn - 1) * (2 * last + 3)..;
        let mut meet = || self.meet(meetings.next().unwrap_or_default());
        stepper.gather(nth, self.rows, &order.picked);
        meet();
        for at in 0..last {
            stepper.forward(nth, at, rows);
            meet();
        }
        stepper.output(nth, rows);
        stepper.lose(nth, self.rows, &order);
        meet();
        for at in (0..last).rev() {
            stepper.backward(nth, at, rows);
            meet();
        }
        for at in (0..=last).rev() {
            stepper.follow(nth, at, rows, order.rule);
        }
        drop(order);
        meet();
    }

    /// Waits until all threads came to the meeting of this number, from 0.
    fn meet(&self, number: usize) {
        let threads = self.stepper.shares.len();
        if threads > 1 {
            self.met.fetch_add(1, Ordering::AcqRel);
            assert!(
                self.wait(|| self.met.load(Ordering::Acquire) >= (number + 1) * threads),
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
    fn new(layers: &[Layer], weights: &[f32], rows: usize, gather: bool, nth: usize, all: usize) -> Self {
        let mut rest = weights;
        let parts = layers.iter().enumerate().map(|(at, layer)| {
            let (own, behind) = rest.split_at(layer.weights());
            rest = behind;
            LayerShare::new(*layer, own, rows, gather, at + 1 == layers.len(), (nth, all))
        });
        let outputs = layers.last().map_or(0, |layer| layer.outputs);
        let own_rows = (rows.div_ceil(PANEL).div_ceil(all) * PANEL).min(rows);
        Self { layers: parts.collect(), outputs: RwLock::new(Outputs::new(own_rows, outputs)) }
    }
}

impl LayerShare {
    /// Of the `last` layer it has the weights of its inputs, not those of its outputs.
    fn new(layer: Layer, weights: &[f32], rows: usize, gather: bool, last: bool, (nth, all): (usize, usize)) -> Self {
        let (inputs, columns) = (share(layer.inputs, nth, all), share(layer.outputs, nth, all));
        let with_ones = inputs.len() + usize::from(nth + 1 == all);
        let mut own_inputs = Panels::of_batch(rows, with_ones);
        if with_ones > inputs.len() {
            own_inputs.end_in_ones();
        }
        let own = if last {
            Weights::new(layer, weights, inputs.start..inputs.start + with_ones, 0..layer.outputs, gather)
        } else {
            Weights::new(layer, weights, 0..layer.inputs + 1, columns.clone(), gather)
        };
        Self {
            inputs: RwLock::new(own_inputs),
            weights: RwLock::new(own),
            deltas: RwLock::new(if last { Turned::default() } else { Turned::new(rows, columns.len()) }),
            columns,
        }
    }
}

impl Weights {
    fn new(layer: Layer, weights: &[f32], rows: Range<usize>, columns: Range<usize>, gather: bool) -> Self {
        let (from, mut own) = ((rows.start, columns.start), Panels::to_load(rows.len(), columns.len()));
        let (bias, of_inputs) = weights.split_at(layer.outputs);
        own.load(from, layer.inputs, bias, of_inputs);
        let velocity = if gather { Panels::new(rows.len(), columns.len()) } else { Panels::default() };
        Self { from, weights: own, velocity }
    }
}

impl Turned {
    fn new(rows: usize, columns: usize) -> Self {
        Self { by_rows: Panels::of_batch(rows, columns), by_columns: Panels::of_batch(columns, rows) }
    }
}

impl Outputs {
    fn new(rows: usize, columns: usize) -> Self {
        Self { values: Panels::of_batch(rows, columns), deltas: Turned::new(rows, columns), losses: Vec::new() }
    }
}

/// Does something with each of `all`, the first in this thread and each other in one of its own.
fn together<T: Send, R: Send>(all: impl IntoIterator<Item = T>, with: impl Fn(T) -> R + Sync) -> Vec<R> {
    let (mut all, with) = (all.into_iter(), &with);
    let first = all.next();
    thread::scope(|scope| {
        let others: Vec<_> = all.map(|one| scope.spawn(move || with(one))).collect();
        let first = first.map(with);
        let others = others.into_iter().map(|other| other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        first.into_iter().chain(others).collect()
    })
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
