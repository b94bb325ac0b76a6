//! A training step of dense layers without autograd: forward, loss, backward, and the weights' step in one value that
//! has all its buffers before the first of them.
//!
//! The formulas are those of [`Network`](crate::Network), which has candle's autograd for a reference. With `z` the outputs
//! of a row, the delta of the last layer is `(softmax(z) - y) / n`, or `2·(z - y) / n` for a number; that of a layer below
//! is `δ·W` where it was above zero. A gradient is never stored: the tile that sums it up applies it to its weights.

use crate::encoding::Rows;
use crate::kernel::{Matrix, Panels, Rule, Then, follow, multiply};
use crate::network::{Layer, to_f64};

/// Rows that go through the layers at once. A larger batch goes in parts, whose gradients are added, so that memory stays
/// flat and what lies between two layers in the cache.
pub(crate) const PASS_ROWS_MAX: usize = 512;

/// Weights that are being trained, and what that takes.
#[derive(Debug)]
pub(crate) struct Stepper {
    layers: Vec<Layer>,
    classes: bool,
    weights: Vec<Weights>,
    batch: Batch,
}

/// The weights of one layer.
#[derive(Debug)]
struct Weights {
    weights: Panels,
    /// Empty where nothing outlives a step.
    velocity: Panels,
    /// The weights without the bias, as the deltas of the layer below need them: none for the first layer.
    transposed: Panels,
}

/// What goes through the layers.
#[derive(Debug)]
struct Batch {
    /// The inputs, then the outputs of each layer.
    values: Vec<Matrix>,
    /// The derivatives of the loss by them; of the inputs there are none.
    deltas: Vec<Matrix>,
}

impl Stepper {
    /// To train `weights`, in layout order, on batches of at most `rows`, and to `gather` gradients or only to descend.
    pub(crate) fn new(layers: &[Layer], classes: bool, weights: &[f32], rows: usize, gather: bool) -> Self {
        let rows = rows.min(PASS_ROWS_MAX);
        let widths: Vec<usize> = layers.iter().map(|layer| layer.outputs).collect();
        let values = layers.first().map(|layer| layer.inputs).into_iter().chain(widths.iter().copied());
        let mut rest = weights;
        let weights = layers.iter().enumerate().map(|(at, layer)| {
            let (own, behind) = rest.split_at(layer.outputs * (layer.inputs + 1));
            rest = behind;
            Weights::new(*layer, own, at == 0, gather)
        });
        let weights = weights.collect();
        assert!(rest.is_empty(), "{} weights too many for the layout", rest.len());
        let batch = Batch {
            values: values.map(|width| Matrix::new(rows, width)).collect(),
            deltas: widths.iter().map(|&width| Matrix::new(rows, width)).collect(),
        };
        Self { layers: layers.to_vec(), classes, weights, batch }
    }

    /// Takes the `picked` rows of a batch of `of` through the layers, does with their part of its gradient as `rule` says, and
    /// says the sum of their losses.
    pub(crate) fn step(&mut self, rows: &Rows, picked: &[usize], of: usize, rule: Rule) -> f64 {
        self.forward(rows, picked);
        let loss = self.loss(rows, picked, of);
        self.backward(picked.len());
        let Batch { values, deltas } = &self.batch;
        for (at, layer) in self.weights.iter_mut().enumerate() {
            let batch = values[at].padded_rows().zip(deltas[at].padded_rows()).take(picked.len());
            follow(&mut layer.weights, &mut layer.velocity, 0, &batch.collect::<Vec<_>>(), rule);
        }
        loss
    }

    /// The outputs of the `picked` rows.
    pub(crate) fn outputs(&mut self, rows: &Rows, picked: &[usize]) -> impl Iterator<Item = &[f32]> {
        self.forward(rows, picked);
        self.batch.values[self.layers.len()].rows().take(picked.len())
    }

    fn forward(&mut self, rows: &Rows, picked: &[usize]) {
        let Batch { values, .. } = &mut self.batch;
        for (to, &row) in values[0].rows_mut().zip(picked) {
            rows.write_features(row, to);
        }
        for (at, layer) in self.weights.iter().enumerate() {
            let then = if at + 1 < self.layers.len() { Then::Relu } else { Then::Store };
            let (from, to) = values.split_at_mut(at + 1);
            multiply(&from[at], picked.len(), &[(0, &layer.weights)], then, &mut to[0], 0);
        }
    }

    /// The sum of the losses, and the deltas of the outputs.
    fn loss(&mut self, rows: &Rows, picked: &[usize], of: usize) -> f64 {
        let Batch { values, deltas } = &mut self.batch;
        let last = self.layers.len();
        #[allow(clippy::cast_possible_truncation)] // rounds to the nearest f32
        let share = (1.0 / to_f64(of)) as f32;
        let mut loss = 0.0;
        for ((z, delta), &row) in values[last].rows().zip(deltas[last - 1].rows_mut()).zip(picked) {
            let target = rows.targets()[row];
            loss += f64::from(if self.classes { cross_entropy(z, target, delta) } else { squared(z, target, delta) });
            delta.iter_mut().for_each(|delta| *delta *= share);
        }
        loss
    }

    /// The deltas of all layers but the last, which has its own.
    fn backward(&mut self, rows: usize) {
        for (at, layer) in self.weights.iter_mut().enumerate().skip(1).rev() {
            layer.transposed.transpose_of(&layer.weights);
            let (to, from) = self.batch.deltas.split_at_mut(at);
            let then = Then::Where(&self.batch.values[at]);
            multiply(&from[0], rows, &[(0, &layer.transposed)], then, &mut to[at - 1], 0);
        }
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
        let len = self.layers.iter().map(|layer| layer.outputs * (layer.inputs + 1)).sum();
        let mut all = vec![0.0; len];
        let mut rest = all.as_mut_slice();
        for (layer, weights) in self.layers.iter().zip(&self.weights) {
            let (own, behind) = rest.split_at_mut(layer.outputs * (layer.inputs + 1));
            let (bias, rows) = own.split_at_mut(layer.outputs);
            of(weights).store(0, bias, rows);
            rest = behind;
        }
        all
    }
}

impl Weights {
    fn new(layer: Layer, weights: &[f32], first: bool, gather: bool) -> Self {
        let mut own = Panels::new(layer.inputs + 1, layer.outputs);
        let (bias, rows) = weights.split_at(layer.outputs);
        own.load(0, bias, rows);
        Self {
            weights: own,
            velocity: if gather { Panels::new(layer.inputs + 1, layer.outputs) } else { Panels::default() },
            transposed: if first { Panels::default() } else { Panels::new(layer.outputs, layer.inputs) },
        }
    }
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
