//! How good predictions are, and how sure a difference between two models is.
//!
//! AUC is exact: the share of (late, punctual) pairs in which the late flight has the higher score, ties counting one
//! half. The interval is a paired bootstrap: each replicate draws the held-out rows with replacement, the *same* draw for
//! every model, and takes the difference of the two AUCs; the 2.5th and the 97.5th percentile bound it. Pairing
//! matters: models agree on most rows, so their difference varies far less than either AUC.

use std::path::Path;

use crate::Failure;

/// The label column, the class whose probability is the score, and what `predict` calls its columns.
const LABEL: &str = "late";
const POSITIVE: &str = "1";
const PREDICTION: &str = "prediction";
const PROBABILITY: &str = "probability_1";

const REPLICATES: usize = 1_000;
const SEED: u64 = 7;

/// What one model said of each held-out row, beside the truth.
pub(crate) struct Predictions {
    positive: Vec<bool>,
    score: Vec<f64>,
    correct: usize,
}

impl Predictions {
    /// Reads what `worker predict` wrote. The demo's cells have no commas and no quotes.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        Self::parse(&std::fs::read_to_string(path)?)
            .map_err(|(line, what)| format!("{}:{line}: {what}", path.display()).into())
    }

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut lines = text.lines().zip(1..);
        let header: Vec<_> = lines.next().map_or("", |(line, _)| line).split(',').collect();
        let place = |name: &str| {
            header.iter().position(|column| *column == name).ok_or((1, format!("column \"{name}\" is missing")))
        };
        let (label, prediction, probability) = (place(LABEL)?, place(PREDICTION)?, place(PROBABILITY)?);
        let mut read = Self { positive: Vec::new(), score: Vec::new(), correct: 0 };
        for (line, number) in lines {
            let cells: Vec<_> = line.split(',').collect();
            if cells.len() != header.len() {
                return Err((number, format!("{} cells, expected {}", cells.len(), header.len())));
            }
            let score = cells[probability].parse::<f64>().ok().filter(|score| score.is_finite());
            read.score.push(score.ok_or_else(|| (number, format!("\"{}\" is not a probability", cells[probability])))?);
            read.positive.push(cells[label] == POSITIVE);
            read.correct += usize::from(cells[label] == cells[prediction]);
        }
        Ok(read)
    }
}

/// The middle 95 % of a bootstrap around the figure itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Interval {
    pub(crate) low: f64,
    pub(crate) middle: f64,
    pub(crate) high: f64,
}

/// One model's line of the table.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) auc: f64,
    pub(crate) accuracy: f64,
    /// How far this model's AUC is behind the first model's.
    pub(crate) behind: Interval,
}

/// Several models on the same rows.
#[derive(Debug)]
pub(crate) struct Comparison {
    pub(crate) rows: usize,
    pub(crate) models: Vec<Line>,
}

impl Comparison {
    /// Compares every model with the first.
    pub(crate) fn of(predictions: &[Predictions]) -> Result<Self, Failure> {
        let [first, ..] = predictions else {
            return Err("nothing to compare".into());
        };
        if predictions.iter().any(|other| other.positive != first.positive) {
            return Err("the models were not asked about the same rows".into());
        }
        let positive = &first.positive;
        if positive.iter().all(|is| *is) || !positive.iter().any(|is| *is) {
            return Err("the held-out rows are all of one class, so there is no AUC".into());
        }
        let rankings: Vec<_> = predictions.iter().map(|model| Ranking::of(&model.score)).collect();
        let behind = behind_first(&rankings, positive);
        let models = predictions.iter().zip(&rankings).zip(behind).map(|((model, ranking), behind)| Line {
            auc: ranking.auc(positive, &vec![1; positive.len()]),
            accuracy: model.correct as f64 / positive.len() as f64,
            behind,
        });
        Ok(Self { rows: positive.len(), models: models.collect() })
    }
}

/// For each model, the first one's AUC minus its own.
fn behind_first(rankings: &[Ranking], positive: &[bool]) -> Vec<Interval> {
    let differences = |times: &[u32]| -> Vec<f64> {
        let aucs: Vec<_> = rankings.iter().map(|ranking| ranking.auc(positive, times)).collect();
        aucs.iter().map(|auc| aucs[0] - auc).collect()
    };
    let middles = differences(&vec![1; positive.len()]);
    let mut draws = Draws(SEED);
    let mut replicates = vec![Vec::with_capacity(REPLICATES); rankings.len()];
    for _ in 0..REPLICATES {
        let times = draws.resample(positive.len());
        for (model, difference) in replicates.iter_mut().zip(differences(&times)) {
            model.push(difference);
        }
    }
    let interval = |(sample, middle): (&mut Vec<f64>, f64)| {
        sample.sort_by(f64::total_cmp);
        let cut = REPLICATES / 40;
        Interval { low: sample[cut], middle, high: sample[REPLICATES - 1 - cut] }
    };
    replicates.iter_mut().zip(middles).map(interval).collect()
}

/// Rows by ascending score, and whether each is the last of those with its score.
struct Ranking(Vec<(usize, bool)>);

impl Ranking {
    fn of(score: &[f64]) -> Self {
        let mut order: Vec<_> = (0..score.len()).collect();
        order.sort_by(|a, b| score[*a].total_cmp(&score[*b]));
        let ends = |(place, row): (usize, &usize)| {
            let last = order.get(place + 1).is_none_or(|next| score[*next] > score[*row]);
            (*row, last)
        };
        Self(order.iter().enumerate().map(ends).collect())
    }

    /// The AUC of a sample in which each row stands so many times.
    fn auc(&self, positive: &[bool], times: &[u32]) -> f64 {
        let (mut pairs, mut below, mut above) = (0.0, 0.0, 0.0);
        let (mut negatives, mut positives) = (0.0, 0.0);
        for (row, last) in &self.0 {
            match positive[*row] {
                true => positives += f64::from(times[*row]),
                false => negatives += f64::from(times[*row]),
            }
            if *last {
                pairs += positives * (below + negatives / 2.0);
                below += negatives;
                above += positives;
                (negatives, positives) = (0.0, 0.0);
            }
        }
        pairs / (below * above)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): the table is the same at every run.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// How many times each of so many rows comes up in a draw of as many, with replacement.
    fn resample(&mut self, rows: usize) -> Vec<u32> {
        let mut times = vec![0; rows];
        for _ in 0..rows {
            // The high half of a 128-bit product: uniform below `rows` up to a bias of rows / 2^64.
            let row = (u128::from(self.next()) * rows as u128) >> 64;
            times[usize::try_from(row).unwrap_or_default()] += 1;
        }
        times
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn predictions(rows: &[(u8, f64)]) -> Predictions {
        let line =
            |(label, score): &(u8, f64)| format!("x,{label},{},{},{score}\n", u8::from(*score > 0.5), 1.0 - score);
        let rows: String = rows.iter().map(line).collect();
        Predictions::parse(&format!("dest,late,prediction,probability_0,probability_1\n{rows}")).ok().unwrap()
    }

    #[test]
    fn auc_counts_pairs_and_halves_ties() {
        // Of the four pairs (late, punctual) two are right, one is a tie, one is wrong.
        let model = predictions(&[(0, 0.1), (1, 0.3), (0, 0.3), (1, 0.2)]);
        let comparison = Comparison::of(&[model]).unwrap();
        assert_eq!(comparison.models[0].auc, 2.5 / 4.0);
        assert_eq!(comparison.models[0].accuracy, 0.5);
    }

    #[test]
    fn a_row_drawn_twice_counts_like_two_rows() {
        let scores = [0.1, 0.4, 0.35, 0.8];
        let drawn = Ranking::of(&scores).auc(&[false, false, true, true], &[1, 0, 2, 1]);
        let spelled = Ranking::of(&[0.1, 0.35, 0.35, 0.8]).auc(&[false, true, true, true], &[1; 4]);
        assert_eq!(drawn, spelled);
    }

    #[test]
    fn equal_models_do_not_differ_and_a_better_one_is_surely_better() {
        let rows: Vec<_> = (0..400).map(|row| (u8::from(row % 4 == 0), f64::from(row % 7) / 7.0)).collect();
        let good: Vec<_> = rows.iter().map(|(label, noise)| (*label, (noise + f64::from(*label)) / 2.0)).collect();
        let comparison = Comparison::of(&[&good, &good, &rows].map(|rows| predictions(rows))).unwrap();
        assert_eq!(comparison.models[1].behind, Interval { low: 0.0, middle: 0.0, high: 0.0 });
        let worse = comparison.models[2].behind;
        assert!(0.0 < worse.low && worse.low < worse.middle && worse.middle < worse.high, "{worse:?}");
    }

    #[test]
    fn unlike_or_one_sided_rows_are_refused() {
        assert!(Comparison::of(&[predictions(&[(0, 0.1), (1, 0.2)]), predictions(&[(1, 0.1), (0, 0.2)])]).is_err());
        assert!(Comparison::of(&[predictions(&[(1, 0.1), (1, 0.2)])]).is_err());
    }

    #[test]
    fn a_cell_that_is_no_probability_is_named() {
        let text = "late,prediction,probability_1\n0,0,0.1\n1,1,nan\n";
        assert_eq!(Predictions::parse(text).err(), Some((3, "\"nan\" is not a probability".to_owned())));
    }
}
