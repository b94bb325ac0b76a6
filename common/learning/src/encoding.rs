//! Rows as the numbers a model takes: one dense matrix of `f32`, row after row, and one target a row.
//!
//! The same function encodes a training row at a worker, a row that joins later, and a row that is predicted. Blocks
//! of encoded rows also travel in `central` mode, as raw little-endian `f32`: the inputs of a row, then its target.

use std::borrow::Cow;
use std::collections::HashMap;

use protocol::plan::LearningTask;

use crate::cell::{Cell, written};
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::schema::{ColumnSchema, Encoding, Schema, Target};
use crate::table::Table;

/// Standardised values end here on both sides. A row that was surveyed never gets there, since |z| ≤ √n of n rows; a
/// later one is held where `f32` arithmetic is still at ease.
const STANDARDISED_MAX: f64 = 1e6;

/// Encoded rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    inputs: usize,
    features: Vec<f32>,
    targets: Vec<f32>,
}

/// One worker's encoded rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// What it learns from.
    pub training: Rows,
    /// What it is evaluated on.
    pub held_out: Rows,
}

/// Bytes that are not whole encoded rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowsError {
    /// Their number is not a multiple of a row's.
    #[error("{got} bytes of rows, expected a multiple of {row}")]
    Length {
        /// How many there are.
        got: usize,
        /// How many a row has.
        row: usize,
    },
    /// A number that no honest encoding has: not finite, or a target that is no class.
    #[error("encoded row {row} of the block holds a number that no encoding makes")]
    Value {
        /// Which, from 0.
        row: usize,
    },
}

impl Rows {
    /// No rows yet, of `inputs` numbers each.
    #[must_use]
    pub fn new(inputs: usize) -> Self {
        Self { inputs, features: Vec::new(), targets: Vec::new() }
    }

    /// How many rows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.targets.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// How many numbers a row has.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The inputs of row `at`.
    ///
    /// # Panics
    /// If there are not so many rows.
    #[must_use]
    pub fn features(&self, at: usize) -> &[f32] {
        &self.features[at * self.inputs..][..self.inputs]
    }

    /// The targets: the number of a class, or the standardised value.
    #[must_use]
    pub fn targets(&self) -> &[f32] {
        &self.targets
    }

    /// Rows `from..to` as they travel.
    ///
    /// # Panics
    /// If there are not so many rows.
    #[must_use]
    pub fn to_bytes(&self, from: usize, to: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity((to - from) * self.row_bytes());
        for row in from..to {
            self.features(row).iter().chain([&self.targets[row]]).for_each(|x| bytes.extend(x.to_le_bytes()));
        }
        bytes
    }

    /// How many bytes a row has when it travels.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        (self.inputs + 1) * 4
    }

    /// Adds the rows that travelled as `bytes`, all or none.
    ///
    /// # Errors
    /// If they are not whole rows of `schema`.
    pub fn append(&mut self, bytes: &[u8], schema: &Schema) -> Result<(), RowsError> {
        let row_bytes = self.row_bytes();
        if !bytes.len().is_multiple_of(row_bytes) {
            return Err(RowsError::Length { got: bytes.len(), row: row_bytes });
        }
        let values = |row: &[u8]| row.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect::<Vec<_>>();
        for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
            let (features, target) = (&values(bytes)[..self.inputs], values(bytes)[self.inputs]);
            if !features.iter().all(|x| x.is_finite()) || !target_fits(target, schema) {
                self.truncate(self.len() - row);
                return Err(RowsError::Value { row });
            }
            self.features.extend_from_slice(features);
            self.targets.push(target);
        }
        Ok(())
    }

    fn truncate(&mut self, rows: usize) {
        self.features.truncate(rows * self.inputs);
        self.targets.truncate(rows);
    }

    pub(crate) fn push(&mut self, target: f32) -> &mut [f32] {
        self.targets.push(target);
        let from = self.features.len();
        self.features.resize(from + self.inputs, 0.0);
        &mut self.features[from..]
    }
}

fn target_fits(target: f32, schema: &Schema) -> bool {
    match schema.classes() {
        #[allow(clippy::cast_precision_loss)] // at most a thousand classes
        Some(classes) => target.fract() == 0.0 && (0.0..classes.len() as f32).contains(&target),
        None => target.is_finite(),
    }
}

/// A schema made ready to encode cell after cell.
pub(crate) struct Encoder<'a> {
    columns: Vec<ColumnEncoder<'a>>,
}

struct ColumnEncoder<'a> {
    schema: &'a ColumnSchema,
    places: HashMap<&'a str, usize>,
    from: usize,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(schema: &'a Schema) -> Self {
        let mut from = 0;
        let mut columns = Vec::with_capacity(schema.columns.len());
        for column in &schema.columns {
            let names = match &column.encoding {
                Encoding::Categorical { vocabulary } => vocabulary.as_slice(),
                Encoding::Numeric { .. } => &[],
            };
            let places = names.iter().enumerate().map(|(at, name)| (name.as_str(), at)).collect();
            columns.push(ColumnEncoder { schema: column, places, from });
            from += column.encoding.inputs();
        }
        Self { columns }
    }

    /// Writes what `cell` of column `at` is into `row`, which is zero so far. `None` if a number was expected.
    pub(crate) fn encode(&self, at: usize, cell: Cell<'_>, row: &mut [f32]) -> Option<()> {
        let column = &self.columns[at];
        match &column.schema.encoding {
            Encoding::Numeric { mean, deviation, missing } => match cell {
                Cell::Missing if *missing => row[column.from + 1] = 1.0,
                Cell::Missing => {}
                Cell::Number(number) => row[column.from] = standardised(number, *mean, *deviation),
                Cell::Word(_) => return None,
            },
            Encoding::Categorical { vocabulary } => {
                let place = match category(cell) {
                    None => vocabulary.len() + 1,
                    Some(name) => column.places.get(name.as_ref()).copied().unwrap_or(vocabulary.len()),
                };
                row[column.from + place] = 1.0;
            }
        }
        Some(())
    }
}

fn category(cell: Cell<'_>) -> Option<Cow<'_, str>> {
    match cell {
        Cell::Missing => None,
        Cell::Number(number) => Some(Cow::Owned(written(number))),
        Cell::Word(word) => Some(Cow::Borrowed(word)),
    }
}

#[allow(clippy::cast_possible_truncation)] // a bounded f64 rounds to the nearest f32
fn standardised(x: f64, mean: f64, deviation: f64) -> f32 {
    ((x - mean) / deviation).clamp(-STANDARDISED_MAX, STANDARDISED_MAX) as f32
}

impl Dataset {
    /// Encodes all rows that have a label.
    ///
    /// # Errors
    /// If the file lacks a column of `schema`, has text in a numeric one, or a class that `schema` does not know:
    /// none of which happens to a file whose survey went into the schema.
    pub fn encode(&self, schema: &Schema) -> Result<Shard, DataError> {
        let plan = EncodingPlan::new(self, schema)?;
        Ok(Shard { training: plan.rows(&self.training)?, held_out: plan.rows(&self.held_out)? })
    }
}

/// A dataset beside the schema that it is to be encoded by.
struct EncodingPlan<'a> {
    table: &'a Table,
    label: &'a crate::table::Column,
    columns: Vec<&'a crate::table::Column>,
    schema: &'a Schema,
    encoder: Encoder<'a>,
    classes: HashMap<&'a str, f32>,
}

impl<'a> EncodingPlan<'a> {
    fn new(data: &'a Dataset, schema: &'a Schema) -> Result<Self, DataError> {
        let table = &data.table;
        let missing = |column: &str| DataError::NoColumn {
            path: table.path().to_owned(),
            column: column.to_owned(),
            there: table.there(),
        };
        let find = |column: &ColumnSchema| table.column(&column.name).ok_or_else(|| missing(&column.name));
        let columns = schema.columns.iter().map(find).collect::<Result<Vec<_>, _>>()?;
        let label = table.column(&schema.label).ok_or_else(|| missing(&schema.label))?;
        #[allow(clippy::cast_precision_loss)] // at most a thousand classes
        let number = |(at, class): (usize, &'a String)| (class.as_str(), at as f32);
        let classes = schema.classes().unwrap_or_default().iter().enumerate().map(number).collect();
        Ok(Self { table, label, columns, schema, encoder: Encoder::new(schema), classes })
    }

    fn rows(&self, rows: &[usize]) -> Result<Rows, DataError> {
        let mut encoded = Rows::new(self.schema.inputs());
        encoded.features.reserve_exact(rows.len() * encoded.inputs);
        encoded.targets.reserve_exact(rows.len());
        for &row in rows {
            let target = self.target(row)?;
            let inputs = encoded.push(target);
            for (at, column) in self.columns.iter().enumerate() {
                let written = self.encoder.encode(at, column.cell(row), inputs);
                written.ok_or_else(|| self.not_a_number(column))?;
            }
        }
        Ok(encoded)
    }

    fn target(&self, row: usize) -> Result<f32, DataError> {
        match (&self.schema.target, self.label.cell(row)) {
            (Target::Regression { mean, deviation }, Cell::Number(y)) => Ok(standardised(y, *mean, *deviation)),
            (Target::Regression { .. }, cell) => Err(DataError::LabelNotANumber {
                path: self.table.path().to_owned(),
                line: self.table.line(row),
                column: self.label.name.clone(),
                cell: category(cell).unwrap_or_default().into_owned(),
            }),
            (Target::Classification { .. }, cell) => {
                let class = category(cell).unwrap_or_default();
                self.classes.get(class.as_ref()).copied().ok_or_else(|| self.unknown_class(row, &class))
            }
        }
    }

    fn not_a_number(&self, column: &crate::table::Column) -> DataError {
        let (line, cell) = column.first_word().unwrap_or_default();
        let (path, column, cell) = (self.table.path().to_owned(), column.name.clone(), cell.to_owned());
        DataError::NoNumber { path, line, column, cell }
    }

    fn unknown_class(&self, row: usize, class: &str) -> DataError {
        DataError::UnknownClass {
            path: self.table.path().to_owned(),
            line: self.table.line(row),
            column: self.label.name.clone(),
            cell: class.to_owned(),
            classes: self.schema.classes_listed(),
        }
    }
}

impl Schema {
    /// Whether it is about classes or a number.
    #[must_use]
    pub fn task(&self) -> LearningTask {
        match self.target {
            Target::Classification { .. } => LearningTask::Classification,
            Target::Regression { .. } => LearningTask::Regression,
        }
    }
}
