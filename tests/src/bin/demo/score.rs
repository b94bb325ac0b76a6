//! What a model said of the held-out rows, beside the truth, as `worker predict` writes it.

use std::path::Path;

use crate::Failure;

/// The label column, the class whose probability is the score, and what `predict` calls its columns.
const LABEL: &str = "late";
const POSITIVE: &str = "1";
const PREDICTION: &str = "prediction";
const PROBABILITY: &str = "probability_1";

/// What one model said of each held-out row.
pub(crate) struct Predictions {
    /// Whether the row is of the positive class.
    pub(crate) positive: Vec<bool>,
    /// The probability that the model gave that class.
    pub(crate) score: Vec<f64>,
    correct: usize,
}

impl Predictions {
    /// Reads what `worker predict` wrote. The demo's cells have no commas and no quotes.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        Self::parse(&std::fs::read_to_string(path)?)
            .map_err(|(line, what)| format!("{}:{line}: {what}", path.display()).into())
    }

    /// The share of rows whose class it said.
    pub(crate) fn accuracy(&self) -> f64 {
        self.correct as f64 / self.positive.len() as f64
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_prediction_is_a_class_and_a_probability() {
        let text = "dest,late,prediction,probability_0,probability_1\nMIA,0,0,0.9,0.1\nCLE,1,0,0.6,0.4\n";
        let read = Predictions::parse(text).ok().unwrap();
        assert_eq!(
            (read.positive.as_slice(), read.score.as_slice()),
            ([false, true].as_slice(), [0.1, 0.4].as_slice())
        );
        assert_eq!(read.accuracy(), 0.5);
    }

    #[test]
    fn a_cell_that_is_no_probability_is_named() {
        let text = "late,prediction,probability_1\n0,0,0.1\n1,1,nan\n";
        assert_eq!(Predictions::parse(text).err(), Some((3, "\"nan\" is not a probability".to_owned())));
    }
}
