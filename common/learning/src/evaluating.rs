//! Sums over held-out rows, and the probabilities behind them.
//!
//! A score is the log-odds `log(p / (1 - p))` of a class. Bins are even in `asinh` of it, between ±[`LOG_ODDS_MAX`]: a
//! bin is 0.01 wide around even odds, where weak models crowd, and still 0.2 at odds of 1 : 10⁹, where strong ones do. So the
//! merged AUC stays within 0.001 of the exact one, which a test holds against real data.

use protocol::evaluation::{ClassScores, Evaluation, Histogram};
use protocol::limits::{HISTOGRAM_BINS, HISTOGRAM_CLASSES_MAX};

use crate::encoding::Rows;
use crate::network::Network;
use crate::schema::{Schema, Target};
use crate::stepper::PASS_ROWS_MAX;

/// Log-odds beyond this share the outermost bins.
const LOG_ODDS_MAX: f64 = 64.0;

impl Network {
    /// Evaluates `weights` on `rows`. `None` if there are none, or a loss is not finite.
    ///
    /// # Panics
    /// If `weights` or `rows` are of another layout or schema.
    #[must_use]
    pub fn evaluate(&self, weights: &[f32], rows: &Rows, schema: &Schema) -> Option<Evaluation> {
        let mut sums = Sums::new(schema);
        self.each_output(weights, rows, |row, outputs| sums.add(outputs, rows.targets()[row]));
        sums.finish()
    }

    /// What `weights` say of each of `rows`: the probability of each class, or the number in the target's own unit.
    ///
    /// # Panics
    /// If `weights` or `rows` are of another layout or schema.
    #[must_use]
    pub fn predict(&self, weights: &[f32], rows: &Rows, schema: &Schema) -> Vec<Vec<f64>> {
        let mut predictions = Vec::with_capacity(rows.len());
        self.each_output(weights, rows, |_, outputs| predictions.push(prediction(outputs, &schema.target)));
        predictions
    }

    /// Calls `with` for each of `rows` and its outputs.
    fn each_output(&self, weights: &[f32], rows: &Rows, mut with: impl FnMut(usize, &[f32])) {
        let all: Vec<usize> = (0..rows.len()).collect();
        let mut stepper = self.stepper(weights, rows.len(), false, 1);
        for picked in all.chunks(PASS_ROWS_MAX) {
            let outputs = stepper.outputs(rows, picked);
            let width = outputs.len() / picked.len();
            picked.iter().zip(outputs.chunks_exact(width)).for_each(|(&row, outputs)| with(row, outputs));
        }
    }
}

fn prediction(outputs: &[f32], target: &Target) -> Vec<f64> {
    match target {
        Target::Classification { .. } => {
            let log_sum = log_sum_exp(outputs, None);
            outputs.iter().map(|&z| (f64::from(z) - log_sum).exp()).collect()
        }
        Target::Regression { mean, deviation } => outputs.iter().map(|&z| f64::from(z) * deviation + mean).collect(),
    }
}

/// `log Σ exp(z)`, over all outputs but `without`.
fn log_sum_exp(outputs: &[f32], without: Option<usize>) -> f64 {
    let kept = || outputs.iter().enumerate().filter(|(at, _)| Some(*at) != without).map(|(_, &z)| f64::from(z));
    let max = kept().fold(f64::NEG_INFINITY, f64::max);
    max + kept().map(|z| (z - max).exp()).sum::<f64>().ln()
}

/// The most probable class; the first of equals.
pub(crate) fn most_probable<T: PartialOrd + Copy>(values: &[T]) -> usize {
    let mut best = 0;
    for (at, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = at;
        }
    }
    best
}

/// The bin of a score.
fn bin(log_odds: f64) -> u16 {
    let share = log_odds.clamp(-LOG_ODDS_MAX, LOG_ODDS_MAX).asinh() / LOG_ODDS_MAX.asinh();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a share of the bins, and NaN is 0
    let bin = ((share + 1.0) / 2.0 * f64::from(HISTOGRAM_BINS)) as u16;
    bin.min(HISTOGRAM_BINS - 1)
}

struct Sums {
    count: u64,
    loss: f64,
    kind: Kind,
}

enum Kind {
    Classes { correct: u64, scored: Vec<Scored> },
    Number { mean: f64, deviation: f64, error: f64, sum: f64, squares: f64 },
}

/// The scores of one class.
struct Scored {
    class: usize,
    positives: Vec<u32>,
    negatives: Vec<u32>,
}

impl Sums {
    fn new(schema: &Schema) -> Self {
        let kind = match &schema.target {
            Target::Classification { classes } => {
                let scored = match classes.len() {
                    2 => 1..2,
                    few if few <= HISTOGRAM_CLASSES_MAX => 0..few,
                    _ => 0..0,
                };
                Kind::Classes { correct: 0, scored: scored.map(Scored::new).collect() }
            }
            Target::Regression { mean, deviation } => {
                Kind::Number { mean: *mean, deviation: *deviation, error: 0.0, sum: 0.0, squares: 0.0 }
            }
        };
        Self { count: 0, loss: 0.0, kind }
    }

    fn add(&mut self, outputs: &[f32], target: f32) {
        self.count += 1;
        match &mut self.kind {
            Kind::Classes { correct, scored } => {
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the number of a class
                let class = target as usize;
                self.loss += log_sum_exp(outputs, None) - f64::from(outputs[class]);
                *correct += u64::from(most_probable(outputs) == class);
                scored.iter_mut().for_each(|scores| scores.add(outputs, class));
            }
            Kind::Number { mean, deviation, error, sum, squares } => {
                let difference = f64::from(outputs[0]) - f64::from(target);
                let own = f64::from(target) * *deviation + *mean;
                self.loss += difference * difference;
                *error += (difference * *deviation).powi(2);
                *sum += own;
                *squares += own * own;
            }
        }
    }

    fn finish(self) -> Option<Evaluation> {
        let (count, loss_sum) = (self.count, self.loss);
        if count == 0 {
            return None;
        }
        let evaluation = match self.kind {
            Kind::Classes { correct, scored } => {
                let scores = scored.into_iter().map(Scored::finish).collect();
                Evaluation::Classification { loss_sum, count, correct, scores }
            }
            Kind::Number { error, sum, squares, .. } => Evaluation::Regression {
                loss_sum,
                count,
                squared_error: error,
                target_sum: sum,
                target_squares: squares,
            },
        };
        evaluation.check().is_ok().then_some(evaluation)
    }
}

impl Scored {
    fn new(class: usize) -> Self {
        let bins = || vec![0; usize::from(HISTOGRAM_BINS)];
        Self { class, positives: bins(), negatives: bins() }
    }

    fn add(&mut self, outputs: &[f32], class: usize) {
        let log_odds = f64::from(outputs[self.class]) - log_sum_exp(outputs, Some(self.class));
        let bins = if class == self.class { &mut self.positives } else { &mut self.negatives };
        let count = &mut bins[usize::from(bin(log_odds))];
        *count = count.saturating_add(1);
    }

    fn finish(self) -> ClassScores {
        ClassScores { positives: sparse(&self.positives), negatives: sparse(&self.negatives) }
    }
}

fn sparse(bins: &[u32]) -> Histogram {
    let filled = (0..HISTOGRAM_BINS).zip(bins).filter(|(_, count)| **count > 0);
    Histogram(filled.map(|(bin, &count)| (bin, count)).collect())
}
