//! Federated evaluation: sums over held-out rows that merge, and the figures that follow from them.
//!
//! A worker sends sums, never rows or scores: loss, count, correct, and for each class two histograms of scores
//! ([`HISTOGRAM_BINS`] bins): of rows that are of the class and of rows that are not. Merged over the fleet in task
//! order, they give loss and accuracy exactly and the area under the ROC curve up to ties inside a bin, which count
//! half (Fawcett 2006, section 7). With more than two classes the AUC is the mean of one-against-rest.

use serde::{Deserialize, Serialize};

use crate::limits::{EXAMPLES_MAX, HISTOGRAM_BINS, HISTOGRAM_CLASSES_MAX};

/// Counts by bin, sparse: pairs of a bin and its count, bins ascending, counts at least 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram(pub Vec<(u16, u32)>);

/// The scores of one class.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassScores {
    /// Of the rows that are of the class.
    pub positives: Histogram,
    /// Of the rows that are not.
    pub negatives: Histogram,
}

/// Sums over some held-out rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Evaluation {
    /// Of a classifier.
    Classification {
        /// Sum of the cross-entropy, in nats.
        loss_sum: f64,
        /// Rows.
        count: u64,
        /// Rows whose most probable class was the right one.
        correct: u64,
        /// By class; for two classes only the second one; empty with more than [`HISTOGRAM_CLASSES_MAX`].
        scores: Vec<ClassScores>,
    },
    /// Of a regressor.
    Regression {
        /// Sum of the training loss (mean squared error of standardised targets), over rows.
        loss_sum: f64,
        /// Rows.
        count: u64,
        /// Sum of squared errors, in the target's unit squared.
        squared_error: f64,
        /// Sum of the targets.
        target_sum: f64,
        /// Sum of their squares.
        target_squares: f64,
    },
}

/// What the sums say. Absent is what cannot be said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvaluationSummary {
    /// Held-out rows.
    pub count: u64,
    /// Mean loss.
    pub loss: Option<f64>,
    /// Share of rows classified right.
    pub accuracy: Option<f64>,
    /// Area under the ROC curve.
    pub auc: Option<f64>,
    /// Root of the mean squared error, in the target's unit.
    pub rmse: Option<f64>,
    /// Coefficient of determination.
    pub r2: Option<f64>,
}

/// Why some sums are no evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvaluationError {
    /// A sum is not finite, or negative where it cannot be.
    #[error("an evaluation's sum is not a finite number")]
    NotFinite,
    /// A histogram has a bin out of range or out of order, or an empty one.
    #[error("a histogram's bins are not ascending, below {HISTOGRAM_BINS} and filled")]
    Bins,
    /// More classes have histograms than may.
    #[error("histograms for {got} classes, the most is {HISTOGRAM_CLASSES_MAX}")]
    Classes {
        /// How many.
        got: usize,
    },
    /// Counts do not fit together.
    #[error("an evaluation's counts contradict each other")]
    Counts,
}

impl Histogram {
    fn check(&self) -> Result<u64, EvaluationError> {
        let ascending = self.0.windows(2).all(|pair| pair[0].0 < pair[1].0);
        if !ascending || self.0.iter().any(|&(bin, count)| bin >= HISTOGRAM_BINS || count == 0) {
            return Err(EvaluationError::Bins);
        }
        Ok(self.0.iter().map(|&(_, count)| u64::from(count)).sum())
    }

    fn add_to(&self, bins: &mut [u64]) {
        for &(bin, count) in &self.0 {
            if let Some(cell) = bins.get_mut(usize::from(bin)) {
                *cell = cell.saturating_add(u64::from(count));
            }
        }
    }
}

impl Evaluation {
    /// Refuses what no honest evaluation holds.
    ///
    /// # Errors
    /// The first thing that does not hold.
    pub fn check(&self) -> Result<(), EvaluationError> {
        match self {
            Self::Classification { loss_sum, count, correct, scores } => {
                finite(&[*loss_sum])?;
                bounded(*count)?;
                if scores.len() > HISTOGRAM_CLASSES_MAX {
                    return Err(EvaluationError::Classes { got: scores.len() });
                }
                let whole = |s: &ClassScores| Ok(s.positives.check()? + s.negatives.check()? == *count);
                let all = scores.iter().map(whole).collect::<Result<Vec<_>, _>>()?;
                if correct <= count && all.iter().all(|fits| *fits) { Ok(()) } else { Err(EvaluationError::Counts) }
            }
            Self::Regression { loss_sum, count, squared_error, target_sum, target_squares } => {
                bounded(*count)?;
                finite(&[*loss_sum, *squared_error, *target_sum, *target_squares])
            }
        }
    }
}

fn bounded(count: u64) -> Result<(), EvaluationError> {
    if count <= EXAMPLES_MAX { Ok(()) } else { Err(EvaluationError::Counts) }
}

fn finite(sums: &[f64]) -> Result<(), EvaluationError> {
    if sums.iter().all(|x| x.is_finite()) { Ok(()) } else { Err(EvaluationError::NotFinite) }
}

/// The figures of all `parts` together, added in the order given; parts of another kind than the first are left out.
pub fn summarise<'a>(parts: impl IntoIterator<Item = &'a Evaluation>) -> EvaluationSummary {
    let mut total = Totals::default();
    for part in parts {
        total.add(part);
    }
    total.summary()
}

#[derive(Default)]
struct Totals {
    count: u64,
    loss_sum: f64,
    correct: Option<u64>,
    scores: Vec<(Vec<u64>, Vec<u64>)>,
    squares: Option<(f64, f64, f64)>,
}

impl Totals {
    fn add(&mut self, part: &Evaluation) {
        match part {
            Evaluation::Classification { loss_sum, count, correct, scores } if self.squares.is_none() => {
                self.count += count;
                self.loss_sum += loss_sum;
                self.correct = Some(self.correct.unwrap_or(0) + correct);
                let bins = || vec![0; usize::from(HISTOGRAM_BINS)];
                let classes = self.scores.len().max(scores.len());
                self.scores.resize_with(classes, || (bins(), bins()));
                for ((positives, negatives), class) in self.scores.iter_mut().zip(scores) {
                    class.positives.add_to(positives);
                    class.negatives.add_to(negatives);
                }
            }
            Evaluation::Regression { loss_sum, count, squared_error, target_sum, target_squares }
                if self.correct.is_none() =>
            {
                self.count += count;
                self.loss_sum += loss_sum;
                let (e, s, q) = self.squares.unwrap_or_default();
                self.squares = Some((e + squared_error, s + target_sum, q + target_squares));
            }
            _ => {}
        }
    }

    #[allow(clippy::cast_precision_loss)] // counts of rows stay far below 2^53
    fn summary(&self) -> EvaluationSummary {
        if self.count == 0 {
            return EvaluationSummary::default();
        }
        let count = self.count as f64;
        let mut summary =
            EvaluationSummary { count: self.count, loss: Some(self.loss_sum / count), ..Default::default() };
        summary.accuracy = self.correct.map(|correct| correct as f64 / count);
        summary.auc = mean_auc(&self.scores);
        if let Some((error, sum, squares)) = self.squares {
            let spread = squares - sum * sum / count;
            summary.rmse = Some((error / count).sqrt());
            summary.r2 = (spread > 0.0).then(|| 1.0 - error / spread);
        }
        summary
    }
}

#[allow(clippy::cast_precision_loss)] // a handful of classes
fn mean_auc(scores: &[(Vec<u64>, Vec<u64>)]) -> Option<f64> {
    let areas: Vec<f64> = scores.iter().filter_map(|(positives, negatives)| auc(positives, negatives)).collect();
    (!areas.is_empty()).then(|| areas.iter().sum::<f64>() / areas.len() as f64)
}

/// The chance that a positive scores above a negative; ties inside a bin count half.
#[allow(clippy::cast_precision_loss)] // counts of rows stay far below 2^53
fn auc(positives: &[u64], negatives: &[u64]) -> Option<f64> {
    let (mut below, mut area, mut all) = (0.0, 0.0, 0.0);
    for (&p, &n) in positives.iter().zip(negatives) {
        let (p, n) = (p as f64, n as f64);
        area += p * (below + n / 2.0);
        below += n;
        all += p;
    }
    (all > 0.0 && below > 0.0).then(|| area / (all * below))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn classification(correct: u64, positives: &[(u16, u32)], negatives: &[(u16, u32)]) -> Evaluation {
        let count = positives.iter().chain(negatives).map(|&(_, n)| u64::from(n)).sum();
        let scores = ClassScores { positives: Histogram(positives.to_vec()), negatives: Histogram(negatives.to_vec()) };
        #[allow(clippy::cast_precision_loss)]
        Evaluation::Classification { loss_sum: 0.5 * count as f64, count, correct, scores: vec![scores] }
    }

    #[test]
    fn two_shards_merge_to_the_figures_of_the_whole() {
        // Positives score 5, 5, 1; negatives 1, 0: of six pairs, five are in order and one is tied.
        let parts = [classification(1, &[(5, 2)], &[(0, 1)]), classification(2, &[(1, 1)], &[(1, 1)])];
        let all = summarise(&parts);
        assert_eq!((all.count, all.loss, all.accuracy), (5, Some(0.5), Some(0.6)));
        assert!((all.auc.unwrap() - 5.5 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn one_class_alone_has_no_auc_and_no_rows_have_no_figures() {
        assert_eq!(summarise(&[classification(3, &[(5, 3)], &[])]).auc, None);
        assert_eq!(summarise(&[]), EvaluationSummary::default());
    }

    #[test]
    fn regression_has_rmse_and_r2() {
        // Targets 1, 2, 3 predicted as 1, 2, 5.
        let part = Evaluation::Regression {
            loss_sum: 4.0,
            count: 3,
            squared_error: 4.0,
            target_sum: 6.0,
            target_squares: 14.0,
        };
        let all = summarise(&[part]);
        assert!((all.rmse.unwrap() - (4.0f64 / 3.0).sqrt()).abs() < 1e-12);
        assert!((all.r2.unwrap() - (1.0 - 4.0 / 2.0)).abs() < 1e-12);
        assert_eq!(all.accuracy, None);
    }

    #[test]
    fn dishonest_sums_are_refused() {
        let with = |h: &[(u16, u32)]| classification(0, h, &[]).check();
        assert_eq!(with(&[(3, 1), (3, 1)]), Err(EvaluationError::Bins));
        assert_eq!(with(&[(1024, 1)]), Err(EvaluationError::Bins));
        assert_eq!(with(&[(1, 0)]), Err(EvaluationError::Bins));
        assert_eq!(classification(9, &[(1, 1)], &[]).check(), Err(EvaluationError::Counts));
        let nan = Evaluation::Regression {
            loss_sum: f64::NAN,
            count: 1,
            squared_error: 0.0,
            target_sum: 0.0,
            target_squares: 0.0,
        };
        assert_eq!(nan.check(), Err(EvaluationError::NotFinite));
    }

    #[test]
    fn scores_of_one_class_too_many_are_refused() {
        let of = |classes: usize| {
            let none = ClassScores { positives: Histogram(Vec::new()), negatives: Histogram(Vec::new()) };
            Evaluation::Classification { loss_sum: 0.0, count: 0, correct: 0, scores: vec![none; classes] }.check()
        };
        assert_eq!(of(HISTOGRAM_CLASSES_MAX), Ok(()));
        assert_eq!(of(HISTOGRAM_CLASSES_MAX + 1), Err(EvaluationError::Classes { got: HISTOGRAM_CLASSES_MAX + 1 }));
    }
}
