//! One worker's data as the plan wants it: label found, columns dropped, rows split in training and held-out.
//!
//! The split is drawn under the plan's seed and the worker's name, so that the same file is split in the same way in
//! every process. What is left out on the way is told in [`Note`]s; nothing vanishes in silence.

use protocol::draw::Draw;
use protocol::plan::{DataSpec, LearningTask};

use crate::cell::Cell;
use crate::error::DataError;
use crate::table::{Column, Table};

/// The label column when nobody names one: the first of these that is there, else the last column.
const LABEL_NAMES: [&str; 3] = ["label", "target", "y"];

/// A table that is ready to be surveyed and encoded.
#[derive(Debug)]
pub struct Dataset {
    pub(crate) table: Table,
    pub(crate) label: String,
    pub(crate) spec: DataSpec,
    pub(crate) training: Vec<usize>,
    pub(crate) held_out: Vec<usize>,
    notes: Vec<Note>,
}

/// Something that was left out, or that is worth a line to the file's owner.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Note {
    /// Rows whose label is missing.
    #[error("{path}: {count} of {of} rows have no label and are left out")]
    Unlabelled {
        /// The file.
        path: String,
        /// Rows without a label.
        count: usize,
        /// Rows of the file.
        of: usize,
    },
    /// A column that the configuration names and the file does not have.
    #[error("{path}: no column {column:?}, which {key} names")]
    NotThere {
        /// The file.
        path: String,
        /// The key, such as `data.drop`.
        key: &'static str,
        /// The column.
        column: String,
    },
    /// A column without a single value.
    #[error("{path}: column {column:?} has no value in any row")]
    AllMissing {
        /// The file.
        path: String,
        /// The column.
        column: String,
    },
    /// A column with numbers and so many words that they are no mistakes.
    #[error(
        "{path}: column {column:?} has {words} words among {numbers} numbers, the first on line {line}, and is taken as \
         text; if they mean that a value is missing, leave those cells empty"
    )]
    Mixed {
        /// The file.
        path: String,
        /// The column.
        column: String,
        /// Cells that are words.
        words: u64,
        /// Cells that are numbers.
        numbers: u64,
        /// Where the first word is.
        line: u64,
    },
    /// Text of which nearly every cell is another one: it says who a row is about, so none of it is sent.
    #[error(
        "{path}: column {column:?} is text that is mostly unique ({distinct} values in {rows} rows); nothing of it is sent"
    )]
    MostlyUnique {
        /// The file.
        path: String,
        /// The column.
        column: String,
        /// Different values.
        distinct: usize,
        /// Rows that have one.
        rows: u64,
    },
}

impl Dataset {
    /// Prepares `table` as `spec` says.
    ///
    /// `own_label` is what this file calls the label (`--label`); `name` is the worker's.
    ///
    /// # Errors
    /// If there is no label column, no row has a label, a label cannot be what the task asks for, or a column of
    /// numbers has stray words.
    pub fn new(
        mut table: Table,
        spec: &DataSpec,
        own_label: Option<&str>,
        seed: u64,
        name: &str,
    ) -> Result<Self, DataError> {
        let mut notes = absent(&table, spec);
        let label = settle_label(&mut table, spec, own_label)?;
        for column in spec.drop.iter().filter(|column| **column != label) {
            table.remove(column);
        }
        refuse_stray_words(&table, spec, &label)?;
        let labelled = labelled_rows(&table, &label);
        if labelled.is_empty() {
            return Err(DataError::NoLabels { path: table.path().to_owned(), label });
        }
        notes.extend(left_out(&table, labelled.len()));
        notes.extend(mixed(&table, spec, &label));
        let (training, held_out) = split(labelled, spec.validation_fraction, seed, name);
        let dataset = Self { table, label, spec: spec.clone(), training, held_out, notes };
        dataset.check_label()?;
        Ok(dataset)
    }

    /// The label column.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Rows to learn from.
    #[must_use]
    pub fn training_rows(&self) -> usize {
        self.training.len()
    }

    /// Rows held out for evaluation.
    #[must_use]
    pub fn held_out_rows(&self) -> usize {
        self.held_out.len()
    }

    /// What the file's owner should know.
    #[must_use]
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    pub(crate) fn label_column(&self) -> &Column {
        self.table.column(&self.label).expect("`new` found the label column")
    }

    /// The columns to learn from, in the file's order.
    pub(crate) fn features(&self) -> impl Iterator<Item = &Column> {
        self.table.columns().iter().filter(|column| column.name != self.label)
    }

    /// Rows with a label, training rows first.
    pub(crate) fn labelled(&self) -> impl Iterator<Item = usize> {
        self.training.iter().chain(&self.held_out).copied()
    }

    pub(crate) fn note(&mut self, note: Note) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Whether the label can be what the configured task asks for.
    fn check_label(&self) -> Result<(), DataError> {
        let (path, column) = (self.table.path().to_owned(), self.label.clone());
        let label = self.label_column();
        match (self.spec.task, label.first_word()) {
            (Some(LearningTask::Regression), Some((line, cell))) => {
                Err(DataError::LabelNotANumber { path, line, column, cell: cell.to_owned() })
            }
            (Some(LearningTask::Classification), None) => match self.first_fraction() {
                Some((line, cell)) => Err(DataError::LabelNotWhole { path, line, column, cell }),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn first_fraction(&self) -> Option<(u64, String)> {
        let label = self.label_column();
        let fraction = |&row: &usize| matches!(label.cell(row), Cell::Number(x) if x.fract() != 0.0);
        let row = (0..self.table.rows()).find(fraction)?;
        Some((self.table.line(row), label.category(row)?.into_owned()))
    }
}

/// Finds the label column and gives it the name that the fleet has for it.
fn settle_label(table: &mut Table, spec: &DataSpec, own: Option<&str>) -> Result<String, DataError> {
    let wanted = own.or(spec.label.as_deref());
    let found = match wanted {
        Some(name) => table.column(name).map(|column| column.name.clone()),
        None => proposed_label(table, spec),
    };
    let Some(found) = found else {
        let label = wanted.unwrap_or(LABEL_NAMES[0]).to_owned();
        return Err(DataError::NoLabel { path: table.path().to_owned(), label, there: table.there() });
    };
    match &spec.label {
        Some(label) if *label != found => {
            table.remove(label);
            table.rename(&found, label);
            Ok(label.clone())
        }
        _ => Ok(found),
    }
}

fn proposed_label(table: &Table, spec: &DataSpec) -> Option<String> {
    let kept = || table.column_names().filter(|name| !spec.drop.iter().any(|dropped| dropped == name));
    let known = LABEL_NAMES.iter().find_map(|label| kept().find(|name| name == label));
    known.or_else(|| kept().last()).map(str::to_owned)
}

fn refuse_stray_words(table: &Table, spec: &DataSpec, label: &str) -> Result<(), DataError> {
    for column in table.columns() {
        let is_label = column.name == label;
        let words_are_fine = spec.categorical.contains(&column.name) || is_label && spec.task.is_some();
        if !words_are_fine {
            column.refuse_stray_words(table.path()).map_err(|error| if is_label { of_label(error) } else { error })?;
        }
    }
    Ok(())
}

/// What is wrong with a column is wrong with the label, and has another remedy.
fn of_label(error: DataError) -> DataError {
    match error {
        DataError::NotANumber { path, line, column, cell } => DataError::StrayLabel { path, line, column, cell },
        other => other,
    }
}

fn labelled_rows(table: &Table, label: &str) -> Vec<usize> {
    let (mut labelled, mut row) = (Vec::new(), 0);
    if let Some(column) = table.column(label) {
        column.each(0..table.rows(), |cell| {
            labelled.extend((cell != Cell::Missing).then_some(row));
            row += 1;
        });
    }
    labelled
}

/// Columns that `spec` names in vain.
fn absent(table: &Table, spec: &DataSpec) -> Vec<Note> {
    let named = [("data.drop", &spec.drop), ("data.categorical", &spec.categorical)];
    let named = named.into_iter().flat_map(|(key, columns)| columns.iter().map(move |column| (key, column)));
    let absent = named.filter(|(_, column)| table.column(column).is_none());
    absent.map(|(key, column)| Note::NotThere { path: table.path().to_owned(), key, column: column.clone() }).collect()
}

/// Columns that are mostly numbers and are taken as text all the same, where nobody asked for it.
fn mixed(table: &Table, spec: &DataSpec, label: &str) -> Vec<Note> {
    let asked = |column: &&Column| column.name == label || spec.categorical.contains(&column.name);
    let features = table.columns().iter().filter(|column| !asked(column));
    let mixed = features.filter_map(|column| {
        let (words, numbers, line) = column.mostly_numbers()?;
        let (path, column) = (table.path().to_owned(), column.name.clone());
        Some(Note::Mixed { path, column, words, numbers, line })
    });
    mixed.collect()
}

fn left_out(table: &Table, labelled: usize) -> Vec<Note> {
    let path = table.path();
    let count = table.rows() - labelled;
    let unlabelled = (count > 0).then(|| Note::Unlabelled { path: path.to_owned(), count, of: table.rows() });
    let empty = table.columns().iter().filter(|column| column.is_all_missing());
    let empty = empty.map(|column| Note::AllMissing { path: path.to_owned(), column: column.name.clone() });
    unlabelled.into_iter().chain(empty).collect()
}

/// Draws the held-out rows. At least one row stays to learn from; with two or more, a fraction above 0 holds out at
/// least one. Both parts keep the file's order.
fn split(rows: Vec<usize>, fraction: f64, seed: u64, name: &str) -> (Vec<usize>, Vec<usize>) {
    if fraction <= 0.0 || rows.len() < 2 {
        return (rows, Vec::new());
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let wanted = (rows.len() as f64 * fraction).round() as usize; // a share of a count below 2^32
    let count = wanted.clamp(1, rows.len() - 1);
    let mut drawn = rows.clone();
    Draw::new(seed, "held-out rows", 0, name).shuffle(&mut drawn);
    let mut is_held_out = vec![false; rows.last().map_or(0, |last| last + 1)];
    drawn[..count].iter().for_each(|row| is_held_out[*row] = true);
    rows.into_iter().partition(|row| !is_held_out[*row])
}
