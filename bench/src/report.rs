//! What was measured: one table at the end, and the same as JSON.
//!
//! A measure is ours, what it is compared with, and the ratio of the two in each repetition; what counts is the ratio's
//! median. Its spread is the distance between its quartiles in parts of the median: above a tenth, the table says so.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::figures::{Samples, number};

/// What is aimed at: of the ratio, or of ours where nothing is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Aim {
    /// At least so much.
    AtLeast(f64),
    /// At most so much.
    AtMost(f64),
    /// Nothing: the figure is there to be read.
    None,
}

impl Aim {
    fn is_met(self, figure: f64) -> Option<bool> {
        match self {
            Self::AtLeast(least) => Some(figure >= least),
            Self::AtMost(most) => Some(figure <= most),
            Self::None => None,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(least) => format!("≥ {least}"),
            Self::AtMost(most) => format!("≤ {most}"),
            Self::None => String::new(),
        }
    }
}

/// One figure and what it is compared with.
#[derive(Clone, Debug)]
pub(crate) struct Measure {
    /// The line of the table, 1 to 11.
    pub(crate) line: u8,
    /// What was measured.
    pub(crate) name: String,
    /// Of `ours` and `theirs`.
    pub(crate) unit: &'static str,
    pub(crate) ours: Samples,
    /// A rival or a limit, by name.
    pub(crate) theirs: Option<(&'static str, Samples)>,
    /// Of each repetition; empty where nothing is compared.
    pub(crate) ratio: Samples,
    pub(crate) aim: Aim,
    /// Why the aim is missed, as far as figures show it; told only if it is.
    pub(crate) reason: String,
}

impl Measure {
    /// What the aim is held against.
    fn figure(&self) -> &Samples {
        if self.ratio.len() > 0 { &self.ratio } else { &self.ours }
    }

    fn is_met(&self) -> Option<bool> {
        self.aim.is_met(self.figure().median())
    }

    /// The quartiles' distance in parts of the median.
    fn spread(&self) -> f64 {
        let figure = self.figure();
        (figure.quantile(0.75) - figure.quantile(0.25)) / figure.median().abs()
    }

    fn json(&self) -> Value {
        let missed = self.is_met() == Some(false);
        let (rival, theirs) = self.theirs.as_ref().map(|(name, samples)| (*name, samples.median())).unzip();
        json!({
            "line": self.line, "name": self.name, "unit": self.unit, "ours": finite(self.ours.median()),
            "rival": rival, "theirs": theirs.and_then(finite),
            "ratio": if self.ratio.len() > 0 { finite(self.ratio.median()) } else { None },
            "spread": finite(self.spread()), "n": self.figure().len(),
            "aim": self.aim.text(), "met": self.is_met(), "reason": if missed { &self.reason } else { "" },
        })
    }

    fn row(&self) -> String {
        let Self { line, name, unit, ours, .. } = self;
        let of = |samples: &Samples| format!("{} {unit}", number(samples.median()));
        let theirs = self.theirs.as_ref().map_or_else(String::new, |(name, theirs)| format!("{name}: {}", of(theirs)));
        let ratio = if self.ratio.len() > 0 { number(self.ratio.median()) } else { String::new() };
        let met = match self.is_met() {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        format!(
            "| {line} | {name} | {} | {theirs} | {ratio} | {} | {} | {met} |\n",
            of(ours),
            self.spread_text(),
            self.aim.text()
        )
    }

    fn spread_text(&self) -> String {
        if self.figure().len() < 2 {
            return "once".to_owned();
        }
        let spread = self.spread();
        let wide = if spread > WIDE { ", wide" } else { "" };
        format!("{:.0} %, n = {}{wide}", 100.0 * spread, self.figure().len())
    }
}

/// A spread from here on is told.
const WIDE: f64 = 0.1;

/// NaN and the infinities are not JSON.
fn finite(figure: f64) -> Option<f64> {
    figure.is_finite().then_some(figure)
}

/// All that was measured, in order, and what was not. Clones are the same one, so that there is something to tell when a
/// line is interrupted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    measures: Vec<Measure>,
    missing: Vec<Missing>,
}

#[derive(Debug)]
struct Missing {
    line: u8,
    name: String,
    why: String,
}

impl Report {
    /// Tells a figure at once, and keeps it for the table.
    pub(crate) fn add(&mut self, measure: Measure) {
        eprint!("{}", measure.row());
        self.entries().measures.push(measure);
    }

    /// Says what was not measured, and why.
    pub(crate) fn missing(&mut self, line: u8, name: &str, why: &str) {
        eprintln!("line {line}: not measured: {name}: {why}");
        self.entries().missing.push(Missing { line, name: name.to_owned(), why: why.to_owned() });
    }

    /// Nothing is half done when a line panics: entries are pushed whole.
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table in Markdown; below it, the reasons of the aims that were missed, and what was not measured.
    pub(crate) fn markdown(&self) -> String {
        let mut text = "| # | measure | ours | rival or limit | ratio | spread | aim | met |\n\
                        |---|---|---|---|---|---|---|---|\n"
            .to_owned();
        let Entries { measures, missing } = &*self.entries();
        text.extend(measures.iter().map(Measure::row));
        let missed = |measure: &&Measure| measure.is_met() == Some(false);
        for Measure { line, name, reason, .. } in measures.iter().filter(missed) {
            text += &format!("\nmissed: {line}, {name}: {reason}");
        }
        for Missing { line, name, why } in missing {
            text += &format!("\nnot measured: {line}, {name}: {why}");
        }
        text + "\n"
    }

    /// One object a measure, and one with no figures for each that is missing.
    pub(crate) fn json(&self) -> Value {
        let missing = |Missing { line, name, why }: &Missing| {
            json!({ "line": line, "name": name, "ours": null, "theirs": null, "ratio": null, "aim": null, "met": null,
                "reason": format!("not measured: {why}") })
        };
        let entries = self.entries();
        entries.measures.iter().map(Measure::json).chain(entries.missing.iter().map(missing)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure(ratio: &[f64], aim: Aim) -> Measure {
        let theirs = Some(("numpy", Samples::from(vec![2.0])));
        let (ours, ratio) = (Samples::from(vec![4.0]), Samples::from(ratio.to_vec()));
        let (name, reason) = ("fold".to_owned(), "the memory is slow".to_owned());
        Measure { line: 5, name, unit: "GB/s", ours, theirs, ratio, aim, reason }
    }

    #[test]
    fn a_missed_aim_has_its_reason_in_table_and_json() {
        let mut report = Report::default();
        report.add(measure(&[1.9, 2.0, 2.1], Aim::AtLeast(2.5)));
        assert_eq!(report.json()[0]["met"], false);
        assert_eq!(report.json()[0]["reason"], "the memory is slow");
        assert!(report.markdown().contains("missed: 5, fold: the memory is slow"), "{}", report.markdown());
    }

    #[test]
    fn a_met_aim_needs_no_reason() {
        let mut report = Report::default();
        report.add(measure(&[2.0], Aim::AtMost(2.0)));
        assert_eq!((&report.json()[0]["met"], &report.json()[0]["reason"]), (&json!(true), &json!("")));
        assert!(!report.markdown().contains("slow"));
    }

    #[test]
    fn a_spread_above_a_tenth_is_told() {
        assert!(measure(&[1.0, 1.0, 2.0, 2.0], Aim::None).row().contains("wide"));
        assert!(!measure(&[1.0, 1.0, 1.01, 1.02], Aim::None).row().contains("wide"));
    }

    #[test]
    fn what_is_not_measured_is_said_and_has_no_figures() {
        let mut report = Report::default();
        report.missing(9, "csv", "no flights were given");
        assert!(report.markdown().contains("not measured: 9, csv: no flights were given"));
        assert!(report.json()[0]["met"].is_null() && report.json()[0]["ours"].is_null());
    }
}
