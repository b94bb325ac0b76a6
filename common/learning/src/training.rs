//! What is computed in one task: some epochs of SGD, or the gradient of one batch.
//!
//! SGD is `v ← μ·v + g`, `w ← w - η·v` (Sutskever et al. 2013 without dampening, as PyTorch has it), with `v` zero at the
//! start of every task: nothing outlives one. Order and batches are drawn under seed, round and name, so a task done
//! twice gives the same bits.

use std::ops::ControlFlow;

use protocol::draw::Draw;
use protocol::plan::{BatchSize, TrainSpec};

use crate::encoding::Rows;
use crate::network::{Network, PASS_ROWS_MAX, to_f64};

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
    pub weights: Vec<f32>,
    /// Steps of the optimizer.
    pub steps: u64,
    /// Mean loss over the rows of all steps, each with the weights before its step.
    pub loss: f64,
}

/// The mean gradient of one batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradient {
    /// In layout order.
    pub values: Vec<f32>,
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
    /// How far the weights went from `start`.
    #[must_use]
    pub fn delta(&self, start: &[f32]) -> Vec<f32> {
        self.weights.iter().zip(start).map(|(after, before)| after - before).collect()
    }
}

/// The L2 norm of `values`, in f64.
#[must_use]
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
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
        let mut sgd = Sgd::new(start.to_vec(), spec);
        let (mut passes, mut loss_sum) = (0, 0.0);
        for _ in 0..spec.local_epochs {
            draw.shuffle(&mut order);
            for batch in order.chunks(batch_rows(spec, rows)) {
                let gradient = self.mean_gradient(&sgd.weights, rows, batch, &mut passes, on_pass)?;
                if !gradient.loss.is_finite() {
                    return Err(Stopped::NotFinite { steps: sgd.steps });
                }
                loss_sum += gradient.loss * to_f64(batch.len());
                sgd.step(&gradient.values);
            }
        }
        if !sgd.weights.iter().all(|x| x.is_finite()) {
            return Err(Stopped::NotFinite { steps: sgd.steps.saturating_sub(1) });
        }
        let seen = to_f64(rows.len()) * f64::from(spec.local_epochs);
        Ok(Trained { weights: sgd.weights, steps: sgd.steps, loss: if seen > 0.0 { loss_sum / seen } else { 0.0 } })
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
        let gradient = self.mean_gradient(weights, rows, &batch, &mut 0, on_pass)?;
        let finite = gradient.loss.is_finite() && gradient.values.iter().all(|x| x.is_finite());
        if finite { Ok(gradient) } else { Err(Stopped::NotFinite { steps: 0 }) }
    }

    /// The gradient of the mean loss over `batch`, in parts that fit.
    fn mean_gradient(
        &self,
        weights: &[f32],
        rows: &Rows,
        batch: &[usize],
        passes: &mut u64,
        on_pass: OnPass<'_>,
    ) -> Result<Gradient, Stopped> {
        let mut pass = |part: &[usize]| {
            let result = self.gradient_of(weights, rows, part);
            *passes += 1;
            match on_pass(*passes) {
                ControlFlow::Continue(()) => Ok(result),
                ControlFlow::Break(()) => Err(Stopped::Cancelled),
            }
        };
        if batch.is_empty() {
            return Ok(Gradient { values: vec![0.0; weights.len()], loss: 0.0 });
        }
        if batch.len() <= PASS_ROWS_MAX {
            let (values, loss) = pass(batch)?;
            return Ok(Gradient { values, loss });
        }
        let (mut sums, mut loss) = (vec![0.0f64; weights.len()], 0.0);
        for part in batch.chunks(PASS_ROWS_MAX) {
            let share = to_f64(part.len()) / to_f64(batch.len());
            let (values, part_loss) = pass(part)?;
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += share * f64::from(value));
            loss += share * part_loss;
        }
        #[allow(clippy::cast_possible_truncation)] // rounds to the nearest f32
        Ok(Gradient { values: sums.into_iter().map(|sum| sum as f32).collect(), loss })
    }
}

/// How many rows a step of `spec` takes from `rows`; at least 1.
fn batch_rows(spec: &TrainSpec, rows: &Rows) -> usize {
    match spec.batch_size {
        BatchSize::Rows(size) => (size as usize).max(1),
        BatchSize::Full => rows.len().max(1),
    }
}

struct Sgd {
    weights: Vec<f32>,
    velocity: Vec<f32>,
    learning_rate: f32,
    momentum: f32,
    steps: u64,
}

impl Sgd {
    #[allow(clippy::cast_possible_truncation)] // rounds to the nearest f32
    fn new(weights: Vec<f32>, spec: &TrainSpec) -> Self {
        let momentum = spec.momentum as f32;
        let velocity = if momentum > 0.0 { vec![0.0; weights.len()] } else { Vec::new() };
        Self { weights, velocity, learning_rate: spec.learning_rate as f32, momentum, steps: 0 }
    }

    fn step(&mut self, gradient: &[f32]) {
        self.steps += 1;
        if self.velocity.is_empty() {
            self.weights.iter_mut().zip(gradient).for_each(|(w, g)| *w -= self.learning_rate * g);
            return;
        }
        for ((w, v), g) in self.weights.iter_mut().zip(&mut self.velocity).zip(gradient) {
            *v = self.momentum * *v + g;
            *w -= self.learning_rate * *v;
        }
    }
}
