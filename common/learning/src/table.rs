//! A data file in memory, column by column: numbers as `f64`, words as numbers into a dictionary, pixels as bytes.
//!
//! A column is numeric as long as every cell that is not missing reads as a finite number; the first word turns it into
//! words, and the numbers in it into their one way to be written. What a column is *used* as is not decided here: the
//! configuration and the other workers have a say in it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use crate::cell::{Cell, overflows, written};
use crate::error::{DataError, listed};
use crate::idx::{self, Images, Pixels};
use crate::records::Records;

/// The most rows of a table: rows and dictionary entries are numbered with 32 bits.
const ROWS_MAX: u64 = u32::MAX as u64 - 1;

/// A data file, read and typed.
#[derive(Debug)]
pub struct Table {
    path: String,
    columns: Vec<Column>,
    lines: Vec<u64>,
}

/// One column of a table.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) name: String,
    cells: Cells,
    /// How many cells are numbers.
    numbers: u64,
    /// How many are words.
    words: u64,
    /// The first word, and the first number that no float holds.
    first_word: Option<Odd>,
    first_overflow: Option<Odd>,
}

/// A cell that stands out, and its line.
#[derive(Clone, Debug)]
struct Odd {
    line: u64,
    text: String,
}

#[derive(Debug)]
enum Cells {
    /// Missing is NaN.
    Numbers(Vec<f64>),
    /// Missing is 0; else one more than the place in the dictionary.
    Words { codes: Vec<u32>, dictionary: Dictionary },
    /// The byte at one place of every image.
    Pixels { pixels: Pixels, at: usize },
}

#[derive(Debug, Default)]
struct Dictionary {
    words: Vec<Box<str>>,
    places: HashMap<Box<str>, u32>,
}

impl Table {
    /// Reads the file at `path`, or the images that it holds if it is a directory.
    ///
    /// # Errors
    /// If it is neither a CSV file with a header of at least two columns and at least one row, all of one width, nor
    /// images in idx format with their labels beside them.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        match idx::images_of(path) {
            Some(images) => Ok(Self::of_images(&images, &Images::read(&images)?)),
            None => Self::read_csv(path),
        }
    }

    fn read_csv(path: &Path) -> Result<Self, DataError> {
        let mut records = Records::open(path)?;
        let mut columns: Vec<Column> = records.header().iter().cloned().map(Column::new).collect();
        if let [Column { name, .. }] = columns.as_slice() {
            return Err(DataError::OneColumn { path: path.display().to_string(), column: name.clone() });
        }
        let mut lines = Vec::new();
        while records.advance()? {
            let line = records.line();
            lines.push(line);
            for (column, cell) in columns.iter_mut().zip(records.cells()) {
                column.push(line, Cell::read(cell));
            }
            if lines.len() as u64 > ROWS_MAX {
                return Err(DataError::TooManyRows { path: path.display().to_string(), max: ROWS_MAX });
            }
        }
        let path = path.display().to_string();
        if lines.is_empty() {
            return Err(DataError::HeaderOnly { path });
        }
        columns.iter_mut().for_each(Column::seal);
        Ok(Self { path, columns, lines })
    }

    /// Every pixel is a column, and the label is the last.
    fn of_images(path: &Path, images: &Images) -> Self {
        let places = (0..images.pixels.width).map(|at| (&images.pixels, at)).chain([(&images.labels, 0)]);
        let column = |(name, (pixels, at)): (String, (&Pixels, usize))| Column {
            cells: Cells::Pixels { pixels: pixels.clone(), at },
            numbers: images.count as u64,
            ..Column::new(name)
        };
        let columns = images.names().zip(places).map(column).collect();
        Self { path: path.display().to_string(), columns, lines: (1..=images.count as u64).collect() }
    }

    /// The file as the user named it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How many rows it has.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.lines.len()
    }

    /// The names of its columns, in the file's order.
    pub fn column_names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|column| column.name.as_str())
    }

    pub(crate) fn columns(&self) -> &[Column] {
        &self.columns
    }

    pub(crate) fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    pub(crate) fn rename(&mut self, from: &str, to: &str) {
        if let Some(column) = self.columns.iter_mut().find(|column| column.name == from) {
            to.clone_into(&mut column.name);
        }
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.columns.retain(|column| column.name != name);
    }

    pub(crate) fn line(&self, row: usize) -> u64 {
        self.lines[row]
    }

    /// The columns as an error names them.
    pub(crate) fn there(&self) -> String {
        listed(self.column_names())
    }
}

impl Column {
    fn new(name: String) -> Self {
        Self { name, cells: Cells::Numbers(Vec::new()), numbers: 0, words: 0, first_word: None, first_overflow: None }
    }

    pub(crate) fn cell(&self, row: usize) -> Cell<'_> {
        match &self.cells {
            Cells::Numbers(numbers) if numbers[row].is_nan() => Cell::Missing,
            Cells::Numbers(numbers) => Cell::Number(numbers[row]),
            Cells::Pixels { pixels, at } => Cell::Number(f64::from(pixels.bytes[row * pixels.width + at])),
            Cells::Words { codes, dictionary } => match codes[row] {
                0 => Cell::Missing,
                code => Cell::Word(dictionary.word(code)),
            },
        }
    }

    /// The cell as a category or class; `None` if it is missing.
    pub(crate) fn category(&self, row: usize) -> Option<Cow<'_, str>> {
        match self.cell(row) {
            Cell::Missing => None,
            Cell::Number(number) => Some(Cow::Owned(written(number))),
            Cell::Word(word) => Some(Cow::Borrowed(word)),
        }
    }

    /// Whether every cell that is not missing is a number, and there is one.
    pub(crate) fn is_numeric(&self) -> bool {
        self.words == 0 && self.numbers > 0
    }

    /// Whether its numbers are bytes of an image, of which the scale is known.
    pub(crate) fn is_pixels(&self) -> bool {
        matches!(self.cells, Cells::Pixels { .. })
    }

    pub(crate) fn is_all_missing(&self) -> bool {
        self.words == 0 && self.numbers == 0
    }

    /// Refuses a column of numbers in which a few cells are none: those are mistakes, and a category for each would
    /// hide them. Few is one word among three numbers or more, or at most one cell in twenty.
    pub(crate) fn refuse_stray_words(&self, path: &str) -> Result<(), DataError> {
        let (path, column) = (path.to_owned(), self.name.clone());
        if let Some(Odd { line, text: cell }) = self.first_overflow.clone()
            && self.numbers + 1 >= self.words
        {
            return Err(DataError::NotFinite { path, line, column, cell });
        }
        let few = self.words == 1 && self.numbers >= 3 || self.words * 20 <= self.numbers + self.words;
        match self.first_word.clone() {
            Some(Odd { line, text: cell }) if few => Err(DataError::NotANumber { path, line, column, cell }),
            _ => Ok(()),
        }
    }

    /// How many words and how many numbers, and the first word's line, if there are both and fewer words.
    pub(crate) fn mostly_numbers(&self) -> Option<(u64, u64, u64)> {
        let first = self.first_word.as_ref().filter(|_| self.words < self.numbers)?;
        Some((self.words, self.numbers, first.line))
    }

    /// The first cell that is a word, and its line.
    pub(crate) fn first_word(&self) -> Option<(u64, &str)> {
        self.first_word.as_ref().map(|odd| (odd.line, odd.text.as_str()))
    }

    fn push(&mut self, line: u64, cell: Cell<'_>) {
        match cell {
            Cell::Missing => {}
            Cell::Number(_) => self.numbers += 1,
            Cell::Word(word) => self.note_word(line, word),
        }
        match (&mut self.cells, cell) {
            (Cells::Numbers(numbers), Cell::Number(number)) => numbers.push(number),
            (Cells::Numbers(numbers), _) => numbers.push(f64::NAN),
            (Cells::Words { codes, .. }, Cell::Missing) => codes.push(0),
            (Cells::Words { codes, dictionary }, Cell::Number(number)) => codes.push(dictionary.code(&written(number))),
            (Cells::Words { codes, dictionary }, Cell::Word(word)) => codes.push(dictionary.code(word)),
            (Cells::Pixels { .. }, _) => unreachable!("images are read whole"),
        }
    }

    fn note_word(&mut self, line: u64, word: &str) {
        self.words += 1;
        if self.first_word.is_none() {
            self.first_word = Some(Odd { line, text: word.to_owned() });
            self.numbers_to_words();
        }
        if self.first_overflow.is_none() && overflows(word) {
            self.first_overflow = Some(Odd { line, text: word.to_owned() });
        }
    }

    fn numbers_to_words(&mut self) {
        let Cells::Numbers(numbers) = &self.cells else { return };
        let mut dictionary = Dictionary::default();
        let codes = numbers.iter().map(|&n| if n.is_nan() { 0 } else { dictionary.code(&written(n)) }).collect();
        self.cells = Cells::Words { codes, dictionary };
    }

    /// Nothing more comes: what only served the reading goes.
    fn seal(&mut self) {
        match &mut self.cells {
            Cells::Numbers(numbers) => numbers.shrink_to_fit(),
            Cells::Words { codes, dictionary } => {
                codes.shrink_to_fit();
                dictionary.places = HashMap::new();
            }
            Cells::Pixels { .. } => {}
        }
    }
}

impl Dictionary {
    fn code(&mut self, word: &str) -> u32 {
        if let Some(&code) = self.places.get(word) {
            return code;
        }
        let word: Box<str> = word.into();
        self.words.push(word.clone());
        // At most one new word a row, and `ROWS_MAX` bounds those.
        let code = u32::try_from(self.words.len()).expect("a table has fewer than 2^32 rows");
        self.places.insert(word, code);
        code
    }

    fn word(&self, code: u32) -> &str {
        &self.words[code as usize - 1]
    }
}
