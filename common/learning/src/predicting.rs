//! Predictions for a file: every input column unchanged, then `prediction`, then `probability_<class>` for each class.
//!
//! One line for each input row, in order; a few thousand rows are in memory at a time. The label column may be there
//! or not. The file goes the way of a training file, except that a row without a label is a row as any other.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use csv::{StringRecord, Writer};

use crate::cell::{Cell, overflows, written};
use crate::encoding::{Encoder, Rows};
use crate::error::{DataError, listed};
use crate::evaluating::most_probable;
use crate::records::Records;
use crate::saved::SavedModel;

/// Rows that are predicted at once.
const BLOCK_ROWS: usize = 4096;

/// The name of the predicted column.
const PREDICTION: &str = "prediction";

/// Why there are no predictions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PredictError {
    /// The input cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The input has a column that the output adds.
    #[error("{path}:1: column {column:?} is what predictions are written to; rename or remove it")]
    Taken {
        /// The input file.
        path: String,
        /// The column.
        column: String,
    },
    /// The output cannot be written.
    #[error("the predictions cannot be written")]
    Write(#[from] csv::Error),
}

impl SavedModel {
    /// Writes predictions for the CSV file at `data` to `out`, and says for how many rows.
    ///
    /// # Errors
    /// If the file cannot be read, lacks a column of the model's schema, or has text where the schema has numbers; if
    /// `out` cannot be written to. What was written by then stands.
    pub fn predict_file(&self, data: &Path, out: impl Write) -> Result<u64, PredictError> {
        let mut records = Records::open(data)?;
        let path = data.display().to_string();
        let places = self.places(&path, records.header())?;
        let mut writer = Writer::from_writer(out);
        writer.write_record(records.header().iter().chain(&self.added(&path, records.header())?))?;
        let mut block = Block::new(self);
        let mut count = 0;
        while records.advance()? {
            block.push(&path, &records, &places)?;
            count += 1;
            if block.rows.len() == BLOCK_ROWS {
                block.write(&mut writer)?;
            }
        }
        if count == 0 {
            return Err(DataError::HeaderOnly { path }.into());
        }
        block.write(&mut writer)?;
        writer.flush().map_err(csv::Error::from)?;
        Ok(count)
    }

    /// Where in the file each column of the schema is.
    fn places(&self, path: &str, header: &[String]) -> Result<Vec<usize>, DataError> {
        let found: HashMap<&str, usize> = header.iter().enumerate().map(|(at, name)| (name.as_str(), at)).collect();
        let place = |name: &String| {
            found.get(name.as_str()).copied().ok_or_else(|| DataError::NoColumn {
                path: path.to_owned(),
                column: name.clone(),
                there: listed(header.iter().map(String::as_str)),
            })
        };
        self.schema().columns.iter().map(|column| place(&column.name)).collect()
    }

    fn added(&self, path: &str, header: &[String]) -> Result<Vec<String>, PredictError> {
        let classes = self.schema().classes().unwrap_or_default().iter();
        let added: Vec<String> =
            [PREDICTION.to_owned()].into_iter().chain(classes.map(|class| format!("probability_{class}"))).collect();
        match added.iter().find(|name| header.contains(name)) {
            Some(column) => Err(PredictError::Taken { path: path.to_owned(), column: column.clone() }),
            None => Ok(added),
        }
    }
}

/// Rows that wait to be predicted.
struct Block<'a> {
    model: &'a SavedModel,
    encoder: Encoder<'a>,
    rows: Rows,
    records: Vec<StringRecord>,
}

impl<'a> Block<'a> {
    fn new(model: &'a SavedModel) -> Self {
        let schema = model.schema();
        Self { model, encoder: Encoder::new(schema), rows: Rows::new(schema), records: Vec::new() }
    }

    fn push(&mut self, path: &str, records: &Records, places: &[usize]) -> Result<(), DataError> {
        let record: StringRecord = records.cells().collect();
        self.rows.push_target(0.0);
        for (at, &place) in places.iter().enumerate() {
            let cell = Cell::read(&record[place]);
            match self.encoder.encode(at, cell) {
                Some(encoded) => self.rows.push_cell(encoded),
                None => return Err(not_a_number(path, records, place, record[place].trim())),
            }
        }
        self.records.push(record);
        Ok(())
    }

    fn write<W: Write>(&mut self, writer: &mut Writer<W>) -> Result<(), csv::Error> {
        let predictions = self.model.network().predict(self.model.weights(), &self.rows, self.model.schema());
        for (record, values) in self.records.drain(..).zip(predictions) {
            let added = match self.model.schema().classes() {
                Some(classes) => {
                    let class = classes[most_probable(&values)].clone();
                    [class].into_iter().chain(values.into_iter().map(probability)).collect()
                }
                None => vec![written(values[0])],
            };
            writer.write_record(record.iter().chain(added.iter().map(String::as_str)))?;
        }
        self.rows.clear();
        Ok(())
    }
}

fn not_a_number(path: &str, records: &Records, place: usize, cell: &str) -> DataError {
    let (path, line, column) = (path.to_owned(), records.line(), records.header()[place].clone());
    let cell = cell.to_owned();
    if overflows(&cell) {
        DataError::NotFinite { path, line, column, cell }
    } else {
        DataError::NoNumber { path, line, column, cell }
    }
}

/// A probability with the digits that the model's 32-bit arithmetic has.
#[allow(clippy::cast_possible_truncation)] // rounds to the nearest f32
fn probability(p: f64) -> String {
    let p = p as f32;
    if p == 0.0 || p >= 1e-5 { p.to_string() } else { format!("{p:e}") }
}
