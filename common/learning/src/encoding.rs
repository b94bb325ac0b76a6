//! Encoded rows: one number a cell, and the wider row that a model takes, made when a batch needs it.
//!
//! A numeric cell is its standardised value, a categorical one the place of its value; so a million rows take what a
//! million rows of the table take, and not what a vocabulary takes a million times. The same function encodes a training
//! row at a worker, a row that joins later, and a row that is predicted. Blocks of encoded rows also travel in `central`
//! mode, as raw little-endian `f32`: the cells of a row, then its target.

use std::borrow::Cow;
use std::sync::Arc;

use hashbrown::HashMap;
use protocol::plan::LearningTask;

use crate::cell::{Cell, written};
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::schema::{ColumnSchema, Encoding, Schema, Target};
use crate::table::{Column, Table};

/// Standardised values end here on both sides. A row that was surveyed never gets there, since |z| ≤ √n of n rows; a
/// later one is held where `f32` arithmetic is still at ease.
const STANDARDISED_MAX: f32 = 1e6;

/// A number that is missing. Beyond every standardised value, and finite, so that it equals itself.
const MISSING: f32 = f32::MAX;

/// Encoded rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    slots: Arc<[Slot]>,
    /// Whether each cell is one input, as it is.
    plain: bool,
    /// One a column and row.
    cells: Vec<f32>,
    targets: Vec<f32>,
}

/// Where the inputs of one column are in a row that a model takes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Slot {
    Number {
        from: usize,
        /// Whether the input behind it says that it is missing.
        missing: bool,
    },
    Category {
        from: usize,
        places: usize,
    },
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
    /// No rows yet, of `schema`.
    #[must_use]
    pub fn new(schema: &Schema) -> Self {
        let mut from = 0;
        let slot = |column: &ColumnSchema| {
            let at = from;
            from += column.encoding.inputs();
            match &column.encoding {
                Encoding::Numeric { missing, .. } => Slot::Number { from: at, missing: *missing },
                Encoding::Categorical { .. } => Slot::Category { from: at, places: column.encoding.inputs() },
            }
        };
        let slots: Arc<[Slot]> = schema.columns.iter().map(slot).collect();
        let plain = slots.iter().all(|slot| matches!(slot, Slot::Number { missing: false, .. }));
        Self { slots, plain, cells: Vec::new(), targets: Vec::new() }
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

    /// The inputs of row `at`, as a model takes them.
    ///
    /// # Panics
    /// If there are not so many rows.
    #[must_use]
    pub fn features(&self, at: usize) -> Vec<f32> {
        let mut inputs = vec![0.0; self.slots.last().map_or(0, |slot| slot.end())];
        self.write_features(at, &mut inputs);
        inputs
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
            self.cells(row).iter().chain([&self.targets[row]]).for_each(|x| bytes.extend(x.to_le_bytes()));
        }
        bytes
    }

    /// How many bytes a row has when it travels.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        (self.slots.len() + 1) * 4
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
        let before = self.len();
        for (row, bytes) in bytes.chunks_exact(row_bytes).enumerate() {
            self.cells.extend(bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)));
            let target = self.cells.pop().unwrap_or(f32::NAN);
            self.targets.push(target);
            let cells_fit = self.slots.iter().zip(self.cells(before + row)).all(|(slot, cell)| slot.fits(*cell));
            if !cells_fit || !target_fits(target, schema) {
                self.cells.truncate(before * self.slots.len());
                self.targets.truncate(before);
                return Err(RowsError::Value { row });
            }
        }
        Ok(())
    }

    /// Writes the inputs of row `at` into `inputs`, whatever they were.
    ///
    /// # Panics
    /// If there are not so many rows, or `inputs` are fewer than the row has.
    pub fn write_features(&self, at: usize, inputs: &mut [f32]) {
        let width = self.slots.last().map_or(0, |slot| slot.end());
        self.write_inputs(at, 0, &mut inputs[..width]);
    }

    /// Writes the inputs of row `at` from input `from` on, as many as `inputs` takes.
    pub(crate) fn write_inputs(&self, at: usize, from: usize, inputs: &mut [f32]) {
        if self.plain {
            for (input, &cell) in inputs.iter_mut().zip(&self.cells(at)[from..]) {
                *input = if cell == MISSING { 0.0 } else { cell };
            }
            return;
        }
        inputs.fill(0.0);
        let (first, end) = (self.slots.partition_point(|slot| slot.end() <= from), from + inputs.len());
        let cells = self.slots.iter().zip(self.cells(at)).skip(first);
        for (slot, &cell) in cells.take_while(|(slot, _)| slot.start() < end) {
            if let Some((place, value)) = slot.input(cell)
                && let Some(input) = place.checked_sub(from).and_then(|place| inputs.get_mut(place))
            {
                *input = value;
            }
        }
    }

    /// Adds a row whose cells follow, by [`Rows::push_cell`] for each column.
    pub(crate) fn push_target(&mut self, target: f32) {
        self.targets.push(target);
    }

    pub(crate) fn push_cell(&mut self, cell: f32) {
        self.cells.push(cell);
    }

    pub(crate) fn clear(&mut self) {
        self.cells.clear();
        self.targets.clear();
    }

    fn cells(&self, at: usize) -> &[f32] {
        &self.cells[at * self.slots.len()..][..self.slots.len()]
    }
}

impl Slot {
    fn start(self) -> usize {
        match self {
            Self::Number { from, .. } | Self::Category { from, .. } => from,
        }
    }

    /// The one input that is not zero, and its value.
    fn input(self, cell: f32) -> Option<(usize, f32)> {
        match self {
            Self::Number { from, missing } if cell == MISSING => missing.then_some((from + 1, 1.0)),
            Self::Number { from, .. } => Some((from, cell)),
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the number of a place
            Self::Category { from, .. } => Some((from + cell as usize, 1.0)),
        }
    }

    fn end(self) -> usize {
        match self {
            Self::Number { from, missing } => from + 1 + usize::from(missing),
            Self::Category { from, places } => from + places,
        }
    }

    fn fits(self, cell: f32) -> bool {
        match self {
            Self::Number { .. } => cell.abs() <= STANDARDISED_MAX || cell == MISSING,
            #[allow(clippy::cast_precision_loss)] // at most a few hundred places
            Self::Category { places, .. } => cell.fract() == 0.0 && (0.0..places as f32).contains(&cell),
        }
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
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(schema: &'a Schema) -> Self {
        let encoder = |column: &'a ColumnSchema| {
            let names = match &column.encoding {
                Encoding::Categorical { vocabulary } => vocabulary.as_slice(),
                Encoding::Numeric { .. } => &[],
            };
            let places = names.iter().enumerate().map(|(at, name)| (name.as_str(), at)).collect();
            ColumnEncoder { schema: column, places }
        };
        Self { columns: schema.columns.iter().map(encoder).collect() }
    }

    /// What `cell` of column `at` becomes. `None` if a number was expected.
    pub(crate) fn encode(&self, at: usize, cell: Cell<'_>) -> Option<f32> {
        let column = &self.columns[at];
        match (&column.schema.encoding, cell) {
            (Encoding::Numeric { .. }, Cell::Missing) => Some(MISSING),
            (Encoding::Numeric { mean, deviation, .. }, Cell::Number(x)) => Some(standardised(x, *mean, *deviation)),
            (Encoding::Numeric { .. }, Cell::Word(_)) => None,
            (Encoding::Categorical { vocabulary }, cell) => {
                let place = match category(cell) {
                    None => vocabulary.len() + 1,
                    Some(name) => column.places.get(name.as_ref()).copied().unwrap_or(vocabulary.len()),
                };
                #[allow(clippy::cast_precision_loss)] // at most a few hundred places
                Some(place as f32)
            }
        }
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
    let max = f64::from(STANDARDISED_MAX);
    ((x - mean) / deviation).clamp(-max, max) as f32
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
    label: &'a Column,
    columns: Vec<&'a Column>,
    schema: &'a Schema,
    encoder: Encoder<'a>,
    classes: HashMap<&'a str, f32>,
}

/// What the values of one column become, as far as it is known.
struct Coded {
    /// By code; `None` if a number was expected.
    words: Vec<Option<f32>>,
    /// Places of numbers that are categories, by their bits.
    numbers: HashMap<u64, f32>,
}

/// Rows that are encoded at once.
const BLOCK_ROWS: usize = 256;

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

    /// By blocks of rows and in each column by column: what a column needs is looked up once a block, and the block's cells,
    /// which lie row by row, stay in the first-level cache.
    fn rows(&self, rows: &[usize]) -> Result<Rows, DataError> {
        let width = self.columns.len();
        let mut encoded = Rows::new(self.schema);
        encoded.targets = rows.iter().map(|&row| self.target(row)).collect::<Result<_, _>>()?;
        encoded.cells = vec![0.0; rows.len() * width];
        let mut coded: Vec<Coded> = (0..width).map(|at| self.coded(at)).collect();
        for (rows, cells) in rows.chunks(BLOCK_ROWS).zip(encoded.cells.chunks_mut(BLOCK_ROWS * width)) {
            for (at, coded) in coded.iter_mut().enumerate() {
                let cells = cells[at..].iter_mut().step_by(width);
                self.encode_column(at, coded, rows, cells)?;
            }
        }
        Ok(encoded)
    }

    /// What each word of column `at` becomes.
    fn coded(&self, at: usize) -> Coded {
        let encode = |cell| self.encoder.encode(at, cell);
        let words = self.columns[at].words().map_or(&[][..], |(_, words)| words);
        let words = [Cell::Missing].into_iter().chain(words.iter().map(|word| Cell::Word(word)));
        Coded { words: words.map(encode).collect(), numbers: HashMap::new() }
    }

    fn encode_column<'c>(
        &self,
        at: usize,
        coded: &mut Coded,
        rows: &[usize],
        mut cells: impl Iterator<Item = &'c mut f32>,
    ) -> Result<(), DataError> {
        let column = self.columns[at];
        if let Some((codes, _)) = column.words() {
            for (&row, to) in rows.iter().zip(cells) {
                *to = coded.words[codes[row] as usize].ok_or_else(|| self.not_a_number(column))?;
            }
            return Ok(());
        }
        let mut put = |encoded: f32| cells.next().into_iter().for_each(|to| *to = encoded);
        let rows = rows.iter().copied();
        match &self.schema.columns[at].encoding {
            Encoding::Numeric { mean, deviation, .. } => column.each(rows, |cell| {
                put(if let Cell::Number(x) = cell { standardised(x, *mean, *deviation) } else { MISSING });
            }),
            Encoding::Categorical { .. } => column.each(rows, |cell| {
                let bits = if let Cell::Number(x) = cell { x.to_bits() } else { f64::NAN.to_bits() };
                let encode = || self.encoder.encode(at, cell).expect("a category has a place");
                put(*coded.numbers.entry(bits).or_insert_with(encode));
            }),
        }
        Ok(())
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

    fn not_a_number(&self, column: &Column) -> DataError {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_of_a_rows_inputs_is_what_the_whole_has_there() {
        let number = |missing| Encoding::Numeric { mean: 0.0, deviation: 1.0, missing };
        let words = Encoding::Categorical { vocabulary: ["a", "b", "c"].map(str::to_owned).to_vec() };
        let encodings = [number(false), number(true), words, number(true)];
        let columns = encodings.into_iter().enumerate();
        let columns = columns.map(|(at, encoding)| ColumnSchema { name: at.to_string(), encoding }).collect();
        let schema =
            Schema { label: "y".to_owned(), target: Target::Regression { mean: 0.0, deviation: 1.0 }, columns };
        let mut rows = Rows::new(&schema);
        for cells in [[0.5, MISSING, 2.0, 1.5], [MISSING, -1.0, 0.0, MISSING]] {
            cells.into_iter().for_each(|cell| rows.push_cell(cell));
            rows.push_target(0.0);
        }
        for row in 0..2 {
            let whole = rows.features(row);
            for from in 0..=whole.len() {
                for end in from..=whole.len() {
                    let mut part = vec![f32::NAN; end - from];
                    rows.write_inputs(row, from, &mut part);
                    assert_eq!(part, whole[from..end], "row {row}, inputs {from}..{end}");
                }
            }
        }
    }
}
