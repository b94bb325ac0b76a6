//! Figures and the table of them: a median with the smallest and the largest beside it, and what was aimed at.

use std::time::Duration;

use serde_json::{Value, json};

/// What one figure was in each repetition.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn add(&mut self, sample: f64) {
        self.0.push(sample);
    }

    pub(crate) fn add_time(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64());
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = f64> {
        self.0.iter().copied()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The smallest sample that at least this share of them is not above.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // some thousands
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn min(&self) -> f64 {
        self.quantile(0.0)
    }

    pub(crate) fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// Each sample of `self` with the one of `other` from the same repetition.
    pub(crate) fn with(&self, other: &Self, combine: impl Fn(f64, f64) -> f64) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(a, b)| combine(*a, *b)).collect())
    }

    pub(crate) fn map(&self, change: impl Fn(f64) -> f64) -> Self {
        Self(self.0.iter().copied().map(change).collect())
    }
}

impl From<Vec<f64>> for Samples {
    fn from(samples: Vec<f64>) -> Self {
        Self(samples)
    }
}

/// All that was measured, in order.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    section: &'static str,
    what: String,
    figure: String,
    spread: String,
    aim: String,
    json: Value,
}

impl Table {
    /// A figure that was taken in several repetitions.
    pub(crate) fn figure(&mut self, section: &'static str, what: &str, unit: &str, samples: &Samples, aim: &str) {
        let (median, min, max) = (samples.median(), samples.min(), samples.max());
        let spread = format!("{} to {}, n = {}", number(min), number(max), samples.len());
        let json = json!({ "section": section, "what": what, "unit": unit, "median": median, "min": min, "max": max,
            "p99": samples.quantile(0.99), "samples": samples.0, "aim": aim });
        self.push(section, what, format!("{} {unit}", number(median)), spread, aim, json);
    }

    /// A latency: its median and its 99th percentile.
    pub(crate) fn latency(&mut self, section: &'static str, what: &str, samples: &Samples, aim: &str) {
        let ms = samples.map(|seconds| seconds * 1e3);
        let figure = format!("{} ms, p99 {} ms", number(ms.median()), number(ms.quantile(0.99)));
        let spread = format!("{} to {}, n = {}", number(ms.min()), number(ms.max()), ms.len());
        let json = json!({ "section": section, "what": what, "unit": "ms", "median": ms.median(), "min": ms.min(),
            "max": ms.max(), "p99": ms.quantile(0.99), "n": ms.len(), "aim": aim });
        self.push(section, what, figure, spread, aim, json);
    }

    /// What was seen once.
    pub(crate) fn fact(&mut self, section: &'static str, what: &str, figure: &str, aim: &str) {
        let json = json!({ "section": section, "what": what, "value": figure, "aim": aim });
        self.push(section, what, figure.to_owned(), String::new(), aim, json);
    }

    fn push(&mut self, section: &'static str, what: &str, figure: String, spread: String, aim: &str, json: Value) {
        eprintln!("{section}: {what}: {figure} ({spread})");
        let (what, aim) = (what.to_owned(), aim.to_owned());
        self.rows.push(Row { section, what, figure, spread, aim, json });
    }

    pub(crate) fn json(&self) -> Value {
        self.rows.iter().map(|row| row.json.clone()).collect()
    }

    /// In Markdown.
    pub(crate) fn markdown(&self) -> String {
        let head = "| | What | Median | Spread | Aim |\n|---|---|---|---|---|\n".to_owned();
        self.rows.iter().fold(head, |text, Row { section, what, figure, spread, aim, .. }| {
            format!("{text}| {section} | {what} | {figure} | {spread} | {aim} |\n")
        })
    }
}

/// Three digits are enough for anybody who reads a table.
pub(crate) fn number(x: f64) -> String {
    let digits = match x.abs() {
        x if x >= 100.0 => 0,
        x if x >= 10.0 => 1,
        x if x >= 1.0 => 2,
        _ => 3,
    };
    format!("{x:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_smallest_sample_that_so_many_are_not_above() {
        let samples = Samples::from(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((samples.min(), samples.median(), samples.max()), (1.0, 2.0, 4.0));
        let hundred = Samples::from((1..=200).map(f64::from).collect::<Vec<_>>());
        assert_eq!(hundred.quantile(0.99), 198.0);
    }
}
