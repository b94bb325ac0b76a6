//! What is computed in one task: some epochs of SGD, or the gradient of one batch.
//!
//! SGD is `v ← μ·v + g`, `w ← w - η·v` (Sutskever et al. 2013 without dampening, as PyTorch has it), with `v` zero at the
//! start of every task: nothing outlives one. Order and batches are drawn under seed, round and name, so a task done
//! twice gives the same bits.

use std::ops::ControlFlow;

use protocol::draw::Draw;
use protocol::pages::Numbers;
use protocol::plan::{BatchSize, TrainSpec};

use crate::encoding::Rows;
use crate::kernel::Rule;
use crate::network::{Network, to_f64};
use crate::stepper::{Crew, PASS_ROWS_MAX};

/// Whose task it is: the key of its draws.
#[derive(Clone, Copy, Debug)]
pub struct TaskKey<'a> {
    /// The round, from 1.
    pub round: u64,
    /// The worker's name; empty for the coordinator's own training in `central`.
    pub name: &'a str,
}

/// Told after each pass how many there were; stops the task by breaking.
pub type OnPass<'a> = &'a mut dyn FnMut(u64) -> ControlFlow<()>;

/// What training made.
#[derive(Clone, Debug, PartialEq)]
pub struct Trained {
    /// The weights.
    pub weights: Numbers<f32>,
    /// Steps of the optimizer.
    pub steps: u64,
    /// Mean loss over the rows of all steps, each with the weights before its step.
    pub loss: f64,
}

/// The mean gradient of one batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradient {
    /// In layout order.
    pub values: Numbers<f32>,
    /// Mean loss over the batch.
    pub loss: f64,
}

/// Why a task made nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// A loss or a weight became NaN or infinite.
    #[error("training diverges: a number is not finite after {steps} steps; lower train.learning_rate")]
    NotFinite {
        /// Steps that had gone well.
        steps: u64,
    },
    /// The caller broke it off.
    #[error("training was stopped")]
    Cancelled,
}

impl Trained {
    /// How far the weights went from `start`, and its [`norm`].
    #[must_use]
    pub fn into_delta(mut self, start: &[f32]) -> (Numbers<f32>, f64) {
        let mut squares = Squares::default();
        for (weights, before) in self.weights.chunks_mut(IN_CACHE).zip(start.chunks(IN_CACHE)) {
            weights.iter_mut().zip(before).for_each(|(weight, before)| *weight -= before);
            squares.add(weights);
        }
        (self.weights, squares.norm())
    }
}

/// The L2 norm of `values`, in f64. It is finite if all of them are, and else is not.
#[must_use]
pub fn norm(values: &[f32]) -> f64 {
    let mut squares = Squares::default();
    squares.add(values);
    squares.norm()
}

/// Numbers that stay in the cache between two looks at them: a multiple of [`LANES`].
const IN_CACHE: usize = 4096;

/// Sums of squares that are made side by side: one alone waits for itself at each addition.
const LANES: usize = 16;

#[derive(Default)]
struct Squares {
    lanes: [f64; LANES],
    rest: f64,
}

impl Squares {
    fn add(&mut self, values: &[f32]) {
        let (chunks, rest) = values.as_chunks::<LANES>();
        for chunk in chunks {
            self.lanes.iter_mut().zip(chunk).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
        self.rest += rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    }

    fn norm(&self) -> f64 {
        (self.lanes.iter().sum::<f64>() + self.rest).sqrt()
    }
}

impl Network {
    /// Trains from `start` for `local_epochs` passes over `rows`, in an order drawn for `key`.
    ///
    /// # Errors
    /// If it diverges, or `on_pass` breaks.
    ///
    /// # Panics
    /// If `start` or `rows` are of another layout or schema.
    pub fn train(
        &self,
        start: &[f32],
        rows: &Rows,
        spec: &TrainSpec,
        key: TaskKey<'_>,
        on_pass: OnPass<'_>,
    ) -> Result<Trained, Stopped> {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        let mut draw = Draw::new(spec.seed, "order of training rows", key.round, key.name);
        let batch_rows = batch_rows(spec, rows);
        let sgd = Sgd::new(spec, batch_rows);
        let stepper = self.stepper(start, batch_rows, sgd.gathers, self.threads);
        let (mut steps, mut passes, mut loss_sum) = (0, 0, 0.0);
        stepper.with_crew(rows, |crew| {
            for _ in 0..spec.local_epochs {
                draw.shuffle(&mut order);
                for batch in order.chunks(batch_rows) {
                    let loss = over_parts(crew, batch, |part| sgd.rule(part), &mut passes, on_pass)?;
                    if !loss.is_finite() {
                        return Err(Stopped::NotFinite { steps });
                    }
                    loss_sum += loss;
                    steps += 1;
                }
            }
            Ok(())
        })?;
        let weights = stepper.weights().ok_or(Stopped::NotFinite { steps: steps.saturating_sub(1) })?;
        let seen = to_f64(rows.len()) * f64::from(spec.local_epochs);
        Ok(Trained { weights, steps, loss: if seen > 0.0 { loss_sum / seen } else { 0.0 } })
    }

    /// The mean gradient at `weights` over one batch drawn for `key`, or over all `rows` with `batch_size = "full"`.
    ///
    /// # Errors
    /// If a number is not finite, or `on_pass` breaks.
    ///
    /// # Panics
    /// If `weights` or `rows` are of another layout or schema.
    pub fn gradient(
        &self,
        weights: &[f32],
        rows: &Rows,
        spec: &TrainSpec,
        key: TaskKey<'_>,
        on_pass: OnPass<'_>,
    ) -> Result<Gradient, Stopped> {
        let mut batch: Vec<usize> = (0..rows.len()).collect();
        let size = batch_rows(spec, rows);
        if size < batch.len() {
            Draw::new(spec.seed, "gradient batch", key.round, key.name).shuffle(&mut batch);
            batch.truncate(size);
            batch.sort_unstable();
        }
        let stepper = self.stepper(weights, batch.len(), true, self.threads);
        let gather = |_| Rule::Gather { kept: 1.0, rate: None };
        let loss = stepper.with_crew(rows, |crew| over_parts(crew, &batch, gather, &mut 0, on_pass))?;
        let loss = if batch.is_empty() { 0.0 } else { loss / to_f64(batch.len()) };
        let values = stepper.gradient().filter(|_| loss.is_finite());
        values.map(|values| Gradient { values, loss }).ok_or(Stopped::NotFinite { steps: 0 })
    }
}

/// Where a part of a batch is in it.
#[derive(Clone, Copy)]
struct Part {
    first: bool,
    last: bool,
}

/// Lets `crew` take `batch` in parts that fit, each under its rule; the sum of their losses.
fn over_parts(
    crew: &Crew<'_>,
    batch: &[usize],
    rule: impl Fn(Part) -> Rule,
    passes: &mut u64,
    on_pass: OnPass<'_>,
) -> Result<f64, Stopped> {
    let mut loss = 0.0;
    let parts = batch.len().div_ceil(PASS_ROWS_MAX);
    for (nth, picked) in batch.chunks(PASS_ROWS_MAX).enumerate() {
        loss += crew.step(picked, batch.len(), rule(Part { first: nth == 0, last: nth + 1 == parts }));
        *passes += 1;
        if on_pass(*passes).is_break() {
            return Err(Stopped::Cancelled);
        }
    }
    Ok(loss)
}

/// How many rows a step of `spec` takes from `rows`; at least 1.
fn batch_rows(spec: &TrainSpec, rows: &Rows) -> usize {
    match spec.batch_size {
        BatchSize::Rows(size) => (size as usize).max(1),
        BatchSize::Full => rows.len().max(1),
    }
}

/// The optimizer's numbers.
struct Sgd {
    learning_rate: f32,
    momentum: f32,
    /// Whether gradients are gathered before they are followed: with momentum, and where a batch has parts.
    gathers: bool,
}

impl Sgd {
    #[allow(clippy::cast_possible_truncation)] // rounds to the nearest f32
    fn new(spec: &TrainSpec, batch_rows: usize) -> Self {
        let momentum = spec.momentum as f32;
        let gathers = momentum > 0.0 || batch_rows > PASS_ROWS_MAX;
        Self { learning_rate: spec.learning_rate as f32, momentum, gathers }
    }

    fn rule(&self, part: Part) -> Rule {
        if !self.gathers {
            return Rule::Descend { rate: self.learning_rate };
        }
        let kept = if part.first { self.momentum } else { 1.0 };
        Rule::Gather { kept, rate: part.last.then_some(self.learning_rate) }
    }
}
