//! Two models on the same rows: the exact area under the ROC curve of each, and how sure their difference is.
//!
//! The interval is the percentile interval of a paired bootstrap (Efron and Tibshirani 1993, chapter 13): rows are
//! drawn with replacement, and both models are measured on the same drawn rows. The draws are keyed, so a table that is
//! printed twice is the same table.

use protocol::draw::Draw;

/// The share of resamples on each side of the interval: 95 % between.
const TAIL: f64 = 0.025;

/// Two models, compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// The area of the first.
    pub first: f64,
    /// The area of the second.
    pub second: f64,
    /// The 95 % interval of first less second.
    pub low: f64,
    /// See `low`.
    pub high: f64,
}

/// The chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947). `None` without a
/// row of each kind.
///
/// # Panics
/// If there are more or fewer scores than rows.
#[must_use]
pub fn auc(scores: &[f64], positives: &[bool]) -> Option<f64> {
    assert_eq!(scores.len(), positives.len(), "one score a row");
    Ranked::new(scores).auc(positives, &vec![1; scores.len()])
}

/// Compares two models by their scores of the same rows, over `resamples` draws under `seed`. `None` without a row of
/// each kind, or without resamples.
///
/// # Panics
/// If there are more or fewer scores than rows.
#[must_use]
pub fn compare(first: &[f64], second: &[f64], positives: &[bool], resamples: u32, seed: u64) -> Option<Comparison> {
    assert!(first.len() == positives.len() && second.len() == positives.len(), "one score a row");
    let (a, b) = (Ranked::new(first), Ranked::new(second));
    let rows = positives.len();
    let once = vec![1; rows];
    let (first, second) = (a.auc(positives, &once)?, b.auc(positives, &once)?);
    let mut draw = Draw::new(seed, "paired bootstrap", 0, "");
    let mut differences = Vec::new();
    for _ in 0..resamples {
        let mut times = vec![0u32; rows];
        (0..rows).for_each(|_| times[usize::try_from(draw.below(rows as u64)).unwrap_or(0)] += 1);
        // A draw without a row of each kind has no area; with rows of both kinds it is rare.
        if let (Some(x), Some(y)) = (a.auc(positives, &times), b.auc(positives, &times)) {
            differences.push(x - y);
        }
    }
    differences.sort_by(f64::total_cmp);
    Some(Comparison { first, second, low: quantile(&differences, TAIL)?, high: quantile(&differences, 1.0 - TAIL)? })
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // a place in a short list
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * (sorted.len() as f64 - 1.0);
    sorted.get(place.round().max(0.0) as usize).copied()
}

/// Rows in the order of their scores, once for all resamples.
struct Ranked {
    order: Vec<usize>,
    /// Whether the row at this place scores as the one before it.
    tied: Vec<bool>,
}

impl Ranked {
    fn new(scores: &[f64]) -> Self {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        #[allow(clippy::float_cmp)] // a tie is the same score
        let tied = (0..order.len()).map(|at| at > 0 && scores[order[at]] == scores[order[at - 1]]).collect();
        Self { order, tied }
    }

    /// The area when row `i` is there `times[i]` times.
    fn auc(&self, positives: &[bool], times: &[u32]) -> Option<f64> {
        let (mut area, mut below, mut all) = (0.0, 0.0, 0.0);
        let mut tie = (0.0, 0.0);
        for (&row, &tied) in self.order.iter().zip(&self.tied) {
            if !tied {
                area += tie.0 * (below + tie.1 / 2.0);
                (below, all, tie) = (below + tie.1, all + tie.0, (0.0, 0.0));
            }
            let side = if positives[row] { &mut tie.0 } else { &mut tie.1 };
            *side += f64::from(times[row]);
        }
        area += tie.0 * (below + tie.1 / 2.0);
        (below, all) = (below + tie.1, all + tie.0);
        (all > 0.0 && below > 0.0).then(|| area / (all * below))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_area_counts_pairs_in_order_and_half_of_ties() {
        let positives = [true, true, true, false, false];
        assert_eq!(auc(&[5.0, 5.0, 1.0, 1.0, 0.0], &positives), Some(5.5 / 6.0));
        assert_eq!(auc(&[1.0; 5], &positives), Some(0.5));
        assert_eq!(auc(&[1.0], &[true]), None);
    }

    #[test]
    fn a_better_model_is_told_from_chance_and_a_model_from_itself_is_not() {
        let mut draw = Draw::new(1, "test", 0, "");
        let positives: Vec<bool> = (0..600).map(|_| draw.uniform() < 0.3).collect();
        let noisy = |noise: f64, draw: &mut Draw| -> Vec<f64> {
            positives.iter().map(|&p| f64::from(u8::from(p)) + noise * draw.uniform()).collect()
        };
        let (good, poor) = (noisy(1.2, &mut draw), noisy(6.0, &mut draw));
        let apart = compare(&good, &poor, &positives, 400, 7).unwrap();
        assert!(apart.first > apart.second && apart.low > 0.0 && apart.low < apart.high, "{apart:?}");
        assert_eq!(compare(&good, &poor, &positives, 400, 7).unwrap(), apart);
        let same = compare(&good, &good, &positives, 400, 7).unwrap();
        assert_eq!((same.low, same.high), (0.0, 0.0));
    }
}
