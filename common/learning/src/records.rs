//! The records of one CSV file, each checked before anybody sees it.
//!
//! RFC 4180 with a mandatory header; a byte-order mark, CRLF and blank lines are fine. What is not fine ends the reading
//! with the line it is on: a row of another width, a quote that is never closed, bytes that are not UTF-8, a file that
//! changed meanwhile. One record is in memory at a time.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, BufReader, Read, Seek as _, SeekFrom, Take};
use std::path::Path;

use csv::{ByteRecord, Reader, ReaderBuilder, Terminator};

use crate::cell::Cell;
use crate::error::DataError;

/// The longest name of a column, in bytes.
pub(crate) const COLUMN_NAME_LEN_MAX: usize = 256;

/// The most columns of a file.
pub(crate) const COLUMNS_MAX: usize = 65_536;

/// A CSV file that is being read.
#[derive(Debug)]
pub(crate) struct Records {
    path: String,
    opened: Metadata,
    ends_with_newline: bool,
    /// Ends where the file ended when it was opened: a file that grows as fast as it is read would never end.
    reader: Reader<Take<File>>,
    header: Vec<String>,
    record: ByteRecord,
    text: String,
    bounds: Vec<(usize, usize)>,
    line: u64,
    /// The byte at which the record begins, blank lines before it included.
    start: u64,
}

impl Records {
    /// Opens the file at `path` and reads its header.
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let shown = path.display().to_string();
        let (file, opened, ends_with_newline) = open(path, &shown)?;
        // The terminator is a bare newline, so that the line of a record can be told exactly; `read_text`
        // drops the carriage return.
        let reader = ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .terminator(Terminator::Any(b'\n'))
            .buffer_capacity(1 << 17)
            .from_reader(file.take(opened.len()));
        let mut records = Self {
            path: shown,
            opened,
            ends_with_newline,
            reader,
            header: Vec::new(),
            record: ByteRecord::new(),
            text: String::new(),
            bounds: Vec::new(),
            line: 0,
            start: 0,
        };
        records.read_header()?;
        Ok(records)
    }

    /// The names of the columns, in the file's order.
    pub(crate) fn header(&self) -> &[String] {
        &self.header
    }

    /// Moves to the next row; false at the end of a file that was whole and did not change.
    pub(crate) fn advance(&mut self) -> Result<bool, DataError> {
        if !self.take()? {
            self.check_end()?;
            return Ok(false);
        }
        let (got, expected) = (self.bounds.len(), self.header.len());
        if got != expected {
            self.check_unchanged()?;
            self.check_quotes()?;
            return Err(DataError::Ragged { path: self.path.clone(), line: self.line, got, expected });
        }
        Ok(true)
    }

    /// The line on which this row begins.
    pub(crate) fn line(&self) -> u64 {
        self.line
    }

    /// The cells of this row, as they are written in the file.
    pub(crate) fn cells(&self) -> impl ExactSizeIterator<Item = &str> {
        self.bounds.iter().map(|&(from, to)| &self.text[from..to])
    }

    fn read_header(&mut self) -> Result<(), DataError> {
        if !self.take()? {
            return Err(DataError::Empty { path: self.path.clone() });
        }
        let names: Vec<String> = self.cells().map(|name| name.trim().to_owned()).collect();
        check_names(&self.path, &names).or_else(|error| self.check_quotes().and(Err(error)))?;
        self.header = names;
        Ok(())
    }

    /// Reads one record that is not a blank line into `text` and `bounds`.
    fn take(&mut self) -> Result<bool, DataError> {
        loop {
            let more = self.reader.read_byte_record(&mut self.record);
            if !more.map_err(|error| read_error(&self.path, error.into()))? {
                return Ok(false);
            }
            self.line = self.line_of_record();
            self.start = self.record.position().map_or(0, csv::Position::byte);
            // The CSV reader skips a bare newline by itself.
            if self.record.len() != 1 || &self.record[0] != b"\r" {
                break;
            }
        }
        self.read_text().map(|()| true)
    }

    fn read_text(&mut self) -> Result<(), DataError> {
        self.text.clear();
        self.bounds.clear();
        let last = self.record.len().wrapping_sub(1);
        for (at, cell) in self.record.iter().enumerate() {
            let cell = if at == last { cell.strip_suffix(b"\r").unwrap_or(cell) } else { cell };
            let Ok(cell) = std::str::from_utf8(cell) else {
                return Err(DataError::NotUtf8 { path: self.path.clone(), line: self.line });
            };
            let from = self.text.len();
            self.text.push_str(cell);
            self.bounds.push((from, self.text.len()));
        }
        Ok(())
    }

    /// The reader counts newlines, those inside of quotes too, and stands behind the record's own if it has one.
    fn line_of_record(&self) -> u64 {
        let inside: u64 = self.record.as_slice().iter().map(|&b| u64::from(b == b'\n')).sum();
        let at = self.reader.position();
        let ended = at.byte() < self.opened.len() || self.ends_with_newline;
        at.line().saturating_sub(inside + u64::from(ended))
    }

    fn check_end(&mut self) -> Result<(), DataError> {
        self.check_unchanged()?;
        self.check_quotes()
    }

    fn check_unchanged(&self) -> Result<(), DataError> {
        let now = self.reader.get_ref().get_ref().metadata().map_err(|error| read_error(&self.path, error))?;
        let same = now.len() == self.opened.len() && now.modified().ok() == self.opened.modified().ok();
        if same { Ok(()) } else { Err(DataError::Changed { path: self.path.clone() }) }
    }

    /// Whether the record read last ended because its quote closed, or because the file did.
    fn check_quotes(&self) -> Result<(), DataError> {
        let open = ends_inside_quotes(self.reader.get_ref().get_ref(), self.start)
            .map_err(|error| read_error(&self.path, error))?;
        if !open {
            return Ok(());
        }
        // The last newline of the file is inside of the quote, and `line_of_record` took it for the record's end.
        let line = self.line + u64::from(self.ends_with_newline);
        Err(DataError::QuoteNeverClosed { path: self.path.clone(), line })
    }
}

fn open(path: &Path, shown: &str) -> Result<(File, Metadata, bool), DataError> {
    let failed = |error| read_error(shown, error);
    // Before opening: to open a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(DataError::NotAFile { path: shown.to_owned() });
    }
    let mut file = File::open(path).map_err(failed)?;
    let opened = file.metadata().map_err(failed)?;
    if opened.len() == 0 {
        return Err(DataError::Empty { path: shown.to_owned() });
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut last)).map_err(failed)?;
    file.rewind().map_err(failed)?;
    Ok((file, opened, last == *b"\n"))
}

pub(crate) fn read_error(path: &str, source: io::Error) -> DataError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => DataError::Missing { path },
        io::ErrorKind::UnexpectedEof => DataError::Changed { path },
        _ => DataError::Read { path, source },
    }
}

fn check_names(path: &str, names: &[String]) -> Result<(), DataError> {
    let path = path.to_owned();
    if names.len() > COLUMNS_MAX {
        return Err(DataError::TooManyColumns { path, got: names.len(), max: COLUMNS_MAX });
    }
    if names.iter().all(|name| matches!(Cell::read(name), Cell::Number(_))) {
        return Err(DataError::NoHeader { path, first: names.iter().take(3).cloned().collect::<Vec<_>>().join(", ") });
    }
    let mut seen = BTreeMap::new();
    for (at, name) in names.iter().enumerate() {
        if name.is_empty() {
            return Err(DataError::NoColumnName { path, number: at + 1 });
        }
        if name.len() > COLUMN_NAME_LEN_MAX {
            return Err(DataError::ColumnName { path, number: at + 1, got: name.len(), max: COLUMN_NAME_LEN_MAX });
        }
        if let Some(first) = seen.insert(name, at) {
            return Err(DataError::DuplicateColumn { path, column: name.clone(), first: first + 1, second: at + 1 });
        }
    }
    Ok(())
}

/// Reads one record from `start` as the CSV reader does, and says whether the file ended between quotes.
fn ends_inside_quotes(mut file: &File, start: u64) -> io::Result<bool> {
    enum At {
        CellStart,
        Bare,
        Quoted,
        QuoteInQuoted,
    }
    file.seek(SeekFrom::Start(start))?;
    let mut at = At::CellStart;
    let mut leading = true;
    for byte in BufReader::new(file).bytes() {
        let byte = byte?;
        leading &= matches!(byte, b'\n' | b'\r' | 0xef | 0xbb | 0xbf);
        at = match (at, byte) {
            _ if leading => At::CellStart,
            (At::CellStart, b'"') | (At::QuoteInQuoted, b'"') => At::Quoted,
            (At::Quoted, b'"') => At::QuoteInQuoted,
            (At::Quoted, _) => At::Quoted,
            (_, b',') => At::CellStart,
            (_, b'\n') => return Ok(false),
            _ => At::Bare,
        };
    }
    Ok(matches!(at, At::Quoted))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Reads to the end, with `meanwhile` done to the file after its first row.
    fn read(text: &str, meanwhile: impl FnOnce(&Path)) -> Result<u64, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f.csv");
        std::fs::write(&path, text).unwrap();
        let mut records = Records::open(&path)?;
        let mut rows = u64::from(records.advance()?);
        meanwhile(&path);
        while records.advance()? {
            rows += 1;
        }
        Ok(rows)
    }

    fn append(path: &Path, text: &str) {
        use std::io::Write as _;
        File::options().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_refused() {
        let long = "a,y\n".to_owned() + &"1,2\n".repeat(100_000);
        assert_eq!(read(&long, |_| ()).unwrap(), 100_000);
        for change in [|path: &Path| append(path, "3,4\n"), |path: &Path| append(path, "3,4,5\n")] {
            assert!(matches!(read(&long, change), Err(DataError::Changed { .. })));
        }
        let shorter = |path: &Path| File::options().write(true).open(path).unwrap().set_len(2_002).unwrap();
        assert!(matches!(read(&long, shorter), Err(DataError::Changed { .. })));
        let replaced = |path: &Path| {
            let other = path.with_extension("new");
            std::fs::write(&other, "b\n").unwrap();
            std::fs::rename(&other, path).unwrap();
        };
        assert_eq!(read(&long, replaced).unwrap(), 100_000, "the file that was opened is whole");
    }

    proptest::proptest! {
        #[test]
        fn what_a_csv_writer_wrote_is_read_back(
            rows in proptest::collection::vec(proptest::array::uniform3("[ab\",; \n\u{e9}]{0,5}"), 1..9),
            crlf: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f.csv");
            let terminator = if crlf { Terminator::CRLF } else { Terminator::Any(b'\n') };
            let mut writer = csv::WriterBuilder::new().terminator(terminator).from_path(&path).unwrap();
            writer.write_record(["x", "y", "z"]).unwrap();
            rows.iter().for_each(|row| writer.write_record(row).unwrap());
            drop(writer);
            let mut records = Records::open(&path).unwrap();
            let mut line = 2;
            for row in &rows {
                proptest::prop_assert!(records.advance().unwrap());
                proptest::prop_assert!(records.cells().eq(row.iter().map(String::as_str)));
                proptest::prop_assert_eq!(records.line(), line);
                line += 1 + row.iter().map(|cell| cell.matches('\n').count() as u64).sum::<u64>();
            }
            proptest::prop_assert!(!records.advance().unwrap());
        }
    }

    #[test]
    fn the_line_of_a_row_is_the_one_it_begins_on() {
        for text in ["a,y\n1,2\n\n\"x\ny\",3\n4,5", "a,y\r\n1,2\r\n\r\n\"x\r\ny\",3\r\n4,5\r\n"] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f.csv");
            std::fs::write(&path, text).unwrap();
            let mut records = Records::open(&path).unwrap();
            let mut lines = Vec::new();
            while records.advance().unwrap() {
                lines.push(records.line());
            }
            assert_eq!(lines, [2, 4, 6], "{text:?}");
        }
    }
}
