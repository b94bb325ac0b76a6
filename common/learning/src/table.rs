//! A data file in memory, column by column: numbers as floats, words as numbers into a dictionary, pixels as bytes.
//!
//! A column is numeric as long as every cell that is not missing reads as a finite number; the first word turns it into
//! words, and the numbers in it into their one way to be written. What a column is *used* as is not decided here: the
//! configuration and the other workers have a say in it.

use std::borrow::Cow;
use std::hash::BuildHasher as _;
use std::path::Path;

use hashbrown::{DefaultHashBuilder, HashTable};

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
    lines: Lines,
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
    /// Missing is NaN. As long as an `f32` holds every number exactly.
    Singles(Vec<f32>),
    /// Missing is NaN.
    Doubles(Vec<f64>),
    /// Missing is 0; else one more than the place in the dictionary.
    Words { codes: Vec<u32>, dictionary: Dictionary },
    /// The byte at one place of every image.
    Pixels { pixels: Pixels, at: usize },
}

#[derive(Debug, Default)]
struct Dictionary {
    words: Vec<Box<str>>,
    /// The codes, by their words.
    codes: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

/// The line of each row: of the first one, and of each that is not on the line after its predecessor's.
#[derive(Debug, Default)]
struct Lines {
    rows: usize,
    jumps: Vec<(usize, u64)>,
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
        let mut lines = Lines::default();
        while records.advance()? {
            let line = records.line();
            lines.push(line);
            for (column, cell) in columns.iter_mut().zip(records.cells()) {
                column.push(line, Cell::read(cell));
            }
            if lines.rows as u64 > ROWS_MAX {
                return Err(DataError::TooManyRows { path: path.display().to_string(), max: ROWS_MAX });
            }
        }
        let path = path.display().to_string();
        if lines.rows == 0 {
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
        Self { path: path.display().to_string(), columns, lines: Lines::from_first(images.count) }
    }

    /// The file as the user named it.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How many rows it has.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.lines.rows
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
        self.lines.line(row)
    }

    /// The columns as an error names them.
    pub(crate) fn there(&self) -> String {
        listed(self.column_names())
    }
}

impl Column {
    fn new(name: String) -> Self {
        Self { name, cells: Cells::Singles(Vec::new()), numbers: 0, words: 0, first_word: None, first_overflow: None }
    }

    pub(crate) fn cell(&self, row: usize) -> Cell<'_> {
        match &self.cells {
            Cells::Singles(numbers) => Cell::of(numbers[row].into()),
            Cells::Doubles(numbers) => Cell::of(numbers[row]),
            Cells::Pixels { pixels, at } => Cell::Number(f64::from(pixels.bytes[row * pixels.width + at])),
            Cells::Words { codes, dictionary } => match codes[row] {
                0 => Cell::Missing,
                code => Cell::Word(dictionary.word(code)),
            },
        }
    }

    /// Shows the cells of `rows`, in that order: as [`Self::cell`] does, without asking each time what the column holds.
    pub(crate) fn each(&self, rows: impl IntoIterator<Item = usize>, mut see: impl FnMut(Cell<'_>)) {
        let rows = rows.into_iter();
        match &self.cells {
            Cells::Singles(numbers) => rows.for_each(|row| see(Cell::of(numbers[row].into()))),
            Cells::Doubles(numbers) => rows.for_each(|row| see(Cell::of(numbers[row]))),
            Cells::Words { .. } | Cells::Pixels { .. } => rows.for_each(|row| see(self.cell(row))),
        }
    }

    /// If it holds words: for each row 0 where the cell is missing, else one more than the place of its word, and the words.
    pub(crate) fn words(&self) -> Option<(&[u32], &[Box<str>])> {
        if let Cells::Words { codes, dictionary } = &self.cells { Some((codes, &dictionary.words)) } else { None }
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
            Cell::Missing => self.push_missing(),
            Cell::Number(number) => self.push_number(number),
            Cell::Word(word) => self.push_word(line, word),
        }
    }

    fn push_missing(&mut self) {
        match &mut self.cells {
            Cells::Singles(numbers) => numbers.push(f32::NAN),
            Cells::Doubles(numbers) => numbers.push(f64::NAN),
            Cells::Words { codes, .. } => codes.push(0),
            Cells::Pixels { .. } => unreachable!("images are read whole"),
        }
    }

    fn push_number(&mut self, number: f64) {
        self.numbers += 1;
        #[allow(clippy::cast_possible_truncation)] // compared with what it was
        let single = number as f32;
        match &mut self.cells {
            Cells::Singles(numbers) if f64::from(single) == number => numbers.push(single),
            Cells::Singles(numbers) => {
                let widened = numbers.iter().copied().map(f64::from).chain([number]);
                self.cells = Cells::Doubles(widened.collect());
            }
            Cells::Doubles(numbers) => numbers.push(number),
            Cells::Words { codes, dictionary } => codes.push(dictionary.code(&written(number)).0),
            Cells::Pixels { .. } => unreachable!("images are read whole"),
        }
    }

    fn push_word(&mut self, line: u64, word: &str) {
        self.words += 1;
        if self.first_word.is_none() {
            self.first_word = Some(Odd { line, text: word.to_owned() });
            self.cells = self.numbers_to_words();
        }
        let Cells::Words { codes, dictionary } = &mut self.cells else {
            unreachable!("a column with a word holds words")
        };
        let (code, is_new) = dictionary.code(word);
        codes.push(code);
        if is_new && self.first_overflow.is_none() && overflows(word) {
            self.first_overflow = Some(Odd { line, text: word.to_owned() });
        }
    }

    /// How many cells there are by now.
    fn rows(&self) -> usize {
        match &self.cells {
            Cells::Singles(numbers) => numbers.len(),
            Cells::Doubles(numbers) => numbers.len(),
            Cells::Words { codes, .. } => codes.len(),
            Cells::Pixels { pixels, .. } => pixels.bytes.len() / pixels.width,
        }
    }

    fn numbers_to_words(&self) -> Cells {
        let mut dictionary = Dictionary::default();
        let mut codes = Vec::new();
        self.each(0..self.rows(), |cell| {
            codes.push(if let Cell::Number(number) = cell { dictionary.code(&written(number)).0 } else { 0 });
        });
        Cells::Words { codes, dictionary }
    }

    /// Nothing more comes: what only served the reading goes.
    fn seal(&mut self) {
        match &mut self.cells {
            Cells::Singles(numbers) => numbers.shrink_to_fit(),
            Cells::Doubles(numbers) => numbers.shrink_to_fit(),
            Cells::Words { codes, dictionary } => {
                codes.shrink_to_fit();
                dictionary.codes = HashTable::new();
            }
            Cells::Pixels { .. } => {}
        }
    }
}

impl Dictionary {
    /// The code of `word`, and whether it is a new one.
    fn code(&mut self, word: &str) -> (u32, bool) {
        // At most one new word a row, and `ROWS_MAX` bounds those.
        let next = u32::try_from(self.words.len() + 1).expect("a table has fewer than 2^32 rows");
        let Self { words, codes, hasher } = self;
        let hash = |code: &u32| hasher.hash_one(&*words[*code as usize - 1]);
        let entry = codes.entry(hasher.hash_one(word), |code| *words[*code as usize - 1] == *word, hash);
        let code = *entry.or_insert(next).get();
        if code == next {
            words.push(word.into());
        }
        (code, code == next)
    }

    fn word(&self, code: u32) -> &str {
        &self.words[code as usize - 1]
    }
}

impl Lines {
    /// Of `rows` rows that begin on the first line.
    fn from_first(rows: usize) -> Self {
        Self { rows, jumps: vec![(0, 1)] }
    }

    fn push(&mut self, line: u64) {
        let next = self.jumps.last().map(|(from, first)| first + (self.rows - from) as u64);
        if next != Some(line) {
            self.jumps.push((self.rows, line));
        }
        self.rows += 1;
    }

    fn line(&self, row: usize) -> u64 {
        let (from, line) = self.jumps[self.jumps.partition_point(|(from, _)| *from <= row) - 1];
        line + (row - from) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_each_row_is_kept_where_lines_are_left_out() {
        let mut lines = Lines::default();
        let expected = [2, 3, 4, 7, 8, 20, 21, 23];
        expected.iter().for_each(|line| lines.push(*line));
        assert_eq!((0..expected.len()).map(|row| lines.line(row)).collect::<Vec<_>>(), expected);
        assert_eq!((lines.rows, lines.jumps.len()), (8, 4));
        assert_eq!((0..3).map(|row| Lines::from_first(3).line(row)).collect::<Vec<_>>(), [1, 2, 3]);
    }

    /// All cells of a column, read from `texts`.
    fn column(texts: &[&str]) -> Column {
        let mut column = Column::new("x".to_owned());
        texts.iter().zip(2..).for_each(|(text, line)| column.push(line, Cell::read(text)));
        column.seal();
        column
    }

    #[test]
    fn numbers_are_kept_exactly_whatever_it_takes() {
        let exact = ["-0", "16777216", "NA", "0.5", "3.4028234663852886e38"];
        let singles = column(&exact);
        assert!(matches!(singles.cells, Cells::Singles(_)));
        let doubles = column(&[&exact[..], &["0.1", "", "16777217", "1e-300"]].concat());
        assert!(matches!(doubles.cells, Cells::Doubles(_)));
        for column in [singles, doubles] {
            for (row, text) in exact.iter().chain(&["0.1", "", "16777217", "1e-300"]).enumerate().take(column.rows()) {
                assert_eq!(column.cell(row), Cell::read(text), "{text}");
            }
        }
    }

    #[test]
    fn numbers_before_the_first_word_become_words() {
        let mixed = column(&["4.0", "", "0.1", "red", "4", "red", "1e400"]);
        let (codes, words) = mixed.words().expect("it holds words");
        assert_eq!(
            (codes, words),
            (&[1, 0, 2, 3, 1, 3, 4][..], &["4".into(), "0.1".into(), "red".into(), "1e400".into()][..])
        );
        assert_eq!((mixed.numbers, mixed.words), (3, 3));
        assert_eq!(mixed.first_overflow.map(|odd| odd.line), Some(8));
    }
}
