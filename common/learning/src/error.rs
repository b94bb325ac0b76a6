//! What can be wrong with a data file, told so that its owner can put it right: the place, what was found there,
//! what was expected, and the remedy.

use std::io;

use crate::idx::IdxFault;

/// Why a data file cannot be used.
///
/// `path` is the file as the user named it; lines count from 1 and include the header's.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the sentence of each variant says what its fields are
#[non_exhaustive]
pub enum DataError {
    /// Nothing of that name is there.
    #[error("{path}: no such file")]
    Missing { path: String },
    /// The operating system would not read it.
    #[error("{path}: cannot be read")]
    Read { path: String, source: io::Error },
    /// It is a directory, a socket or the like.
    #[error("{path}: not a file; name one CSV file, or images in idx format")]
    NotAFile { path: String },
    /// Nothing is in it.
    #[error("{path}: is empty, expected a header line and at least one row")]
    Empty { path: String },
    /// It ends after its header.
    #[error("{path}: has a header and no rows, expected at least one")]
    HeaderOnly { path: String },
    /// Its first line is data.
    #[error("{path}:1: the first line is all numbers ({first}), expected the names of the columns; add a header line")]
    NoHeader { path: String, first: String },
    /// Only one column, as in a file whose cells are separated by something else.
    #[error(
        "{path}:1: only one column, {column:?}, expected the label and at least one to learn from; cells are separated \
         by commas"
    )]
    OneColumn { path: String, column: String },
    /// A column has no name.
    #[error("{path}:1: column {number} has no name; give it one")]
    NoColumnName { path: String, number: usize },
    /// A column has a name that is too long.
    #[error("{path}:1: the name of column {number} has {got} bytes, the most is {max}; shorten it")]
    ColumnName { path: String, number: usize, got: usize, max: usize },
    /// Too many columns.
    #[error("{path}:1: {got} columns, the most is {max}")]
    TooManyColumns { path: String, got: usize, max: usize },
    /// Two columns have one name.
    #[error("{path}:1: columns {first} and {second} are both called {column:?}; rename one")]
    DuplicateColumn { path: String, column: String, first: usize, second: usize },
    /// A row with more or fewer cells than the header.
    #[error("{path}:{line}: {got} cells, the header has {expected}; put cells that hold a comma between quotes")]
    Ragged { path: String, line: u64, got: usize, expected: usize },
    /// A quote that runs to the end of the file.
    #[error(
        "{path}:{line}: a quote that opens in this row is never closed; close it, or write a quote that is part of a \
         cell twice"
    )]
    QuoteNeverClosed { path: String, line: u64 },
    /// Bytes that are not UTF-8.
    #[error("{path}:{line}: not UTF-8; save the file as UTF-8")]
    NotUtf8 { path: String, line: u64 },
    /// More rows than row numbers.
    #[error("{path}: more than {max} rows; split the file")]
    TooManyRows { path: String, max: u64 },
    /// Images or labels in idx format that cannot be used.
    #[error("{path}: {fault}")]
    Idx { path: String, fault: Box<IdxFault> },
    /// Somebody wrote to it while it was read.
    #[error("{path}: changed while it was read; try again when nothing writes to it")]
    Changed { path: String },
    /// The label column is not there.
    #[error("{path}: no column {label:?} for the label; there are {there}; name this file's own with --label")]
    NoLabel { path: String, label: String, there: String },
    /// A column that the schema needs is not there.
    #[error("{path}: no column {column:?}, which the fleet's schema has; there are {there}")]
    NoColumn { path: String, column: String, there: String },
    /// No row can be learned from.
    #[error("{path}: no row has a label in column {label:?}")]
    NoLabels { path: String, label: String },
    /// A cell that is no number among numbers.
    #[error(
        "{path}:{line}: column {column:?}: {cell:?} is not a number; correct the cell, leave it empty if the value is \
         missing, or list the column under data.categorical"
    )]
    NotANumber { path: String, line: u64, column: String, cell: String },
    /// Text in a column that the schema has as numbers.
    #[error(
        "{path}:{line}: column {column:?}: {cell:?} is not a number, and the fleet's schema has the column as numbers; \
         correct the cell, or leave it empty if the value is missing"
    )]
    NoNumber { path: String, line: u64, column: String, cell: String },
    /// A number that no 64-bit float holds.
    #[error("{path}:{line}: column {column:?}: {cell:?} is not a finite number; correct the cell, or leave it empty")]
    NotFinite { path: String, line: u64, column: String, cell: String },
    /// Numbers whose squares overflow.
    #[error("{path}: column {column:?}: its values are too large for a mean and a deviation; rescale or drop it")]
    TooLarge { path: String, column: String },
    /// A fraction where classes are expected.
    #[error(
        "{path}:{line}: label {column:?}: {cell} is not a whole number, and data.task is \"classification\"; correct \
         the cell, or set data.task to \"regression\""
    )]
    LabelNotWhole { path: String, line: u64, column: String, cell: String },
    /// Text where a number is expected.
    #[error(
        "{path}:{line}: label {column:?}: {cell:?} is not a number, and the task is regression; correct the cell, or \
         set data.task to \"classification\""
    )]
    LabelNotANumber { path: String, line: u64, column: String, cell: String },
    /// A word among labels that are numbers, where nobody said what the labels are.
    #[error(
        "{path}:{line}: label {column:?}: {cell:?} is not a number, and other labels are; correct the cell, leave it \
         empty to leave the row out, or set data.task to \"classification\""
    )]
    StrayLabel { path: String, line: u64, column: String, cell: String },
    /// A class that the schema does not know.
    #[error("{path}:{line}: label {column:?}: the class {cell:?} is unknown; the fleet's classes are {classes}")]
    UnknownClass { path: String, line: u64, column: String, cell: String, classes: String },
    /// More classes than a model may have.
    #[error("{path}: label {column:?} has {got} classes, the most is {max}")]
    TooManyClasses { path: String, column: String, got: usize, max: usize },
    /// A class whose name is too long.
    #[error("{path}:{line}: label {column:?}: the class has {got} bytes, the most is {max}")]
    ClassName { path: String, line: u64, column: String, got: usize, max: usize },
    /// The survey would not fit its payload.
    #[error("{path}: its survey has {got} bytes, the most is {max}; drop columns under data.drop")]
    SurveyTooLarge { path: String, got: u64, max: u64 },
}

impl DataError {
    /// The same for somebody who may not see the data: what stands in a cell is left out.
    #[must_use]
    pub fn without_cells(mut self) -> Self {
        if let Self::NoHeader { first: cell, .. }
        | Self::NotANumber { cell, .. }
        | Self::NoNumber { cell, .. }
        | Self::NotFinite { cell, .. }
        | Self::LabelNotWhole { cell, .. }
        | Self::LabelNotANumber { cell, .. }
        | Self::StrayLabel { cell, .. }
        | Self::UnknownClass { cell, .. } = &mut self
        {
            "…".clone_into(cell);
        }
        self
    }
}

/// `names` as a sentence has them: quoted, at most twelve.
pub(crate) fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const SHOWN: usize = 12;
    let names: Vec<&str> = names.collect();
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("{name:?}")).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
