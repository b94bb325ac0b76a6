//! The records of one CSV file, each checked before anybody sees it.
//!
//! RFC 4180 with a mandatory header; a byte-order mark, CRLF and blank lines are fine. What is not fine ends the reading
//! with the line it is on: a row of another width, a quote that is never closed, bytes that are not UTF-8, a file that
//! changed meanwhile. One record is in memory at a time, beside the buffer that it was read into.
//!
//! A line without a quote is a record, and is found eight bytes at a time ([`scan`]); a record with one is read byte by
//! byte ([`Quoting`]). Both read as the `csv` crate does, which the tests hold them against.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read as _, Take};
use std::path::Path;

use crate::cell::Cell;
use crate::error::DataError;

/// The longest name of a column, in bytes.
pub(crate) const COLUMN_NAME_LEN_MAX: usize = 256;

/// The most columns of a file.
pub(crate) const COLUMNS_MAX: usize = 65_536;

/// Read at once: fits the second-level cache. A longer record makes the buffer grow.
const BUFFER_BYTES: usize = 1 << 17;

/// What some editors put at the start of a file in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A CSV file that is being read.
#[derive(Debug)]
pub(crate) struct Records {
    path: String,
    opened: Metadata,
    /// Ends where the file ended when it was opened: a file that grows as fast as it is read would never end.
    file: Take<File>,
    /// `buffer[at..filled]` was read and is no record yet.
    buffer: Vec<u8>,
    at: usize,
    filled: usize,
    header: Vec<String>,
    text: String,
    bounds: Vec<(usize, usize)>,
    /// The line on which this record begins, and the one on which the next does.
    line: u64,
    next_line: u64,
    quoting: Quoting,
}

impl Records {
    /// Opens the file at `path` and reads its header.
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let shown = path.display().to_string();
        let (file, opened) = open(path, &shown)?;
        let mut records = Self::over(shown, file, opened, BUFFER_BYTES);
        while records.filled < BYTE_ORDER_MARK.len() && records.fill()? {}
        if records.buffer.starts_with(BYTE_ORDER_MARK) {
            records.at = BYTE_ORDER_MARK.len();
        }
        records.read_header()?;
        Ok(records)
    }

    /// Before anything was read, with a buffer of so many bytes.
    fn over(path: String, file: File, opened: Metadata, buffer: usize) -> Self {
        Self {
            path,
            file: file.take(opened.len()),
            opened,
            buffer: vec![0; buffer],
            at: 0,
            filled: 0,
            header: Vec::new(),
            text: String::new(),
            bounds: Vec::new(),
            line: 0,
            next_line: 1,
            quoting: Quoting::default(),
        }
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
            self.check_end()?;
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

    /// Reads one record that is not a blank line into `text` and `bounds`; false if there is none.
    fn take(&mut self) -> Result<bool, DataError> {
        loop {
            self.bounds.clear();
            let rest = &self.buffer[self.at..self.filled];
            let (length, newline) = match scan(rest, &mut self.bounds) {
                Scan::Line(length) => (length, 1),
                Scan::Quote => {
                    if self.take_quoted()? {
                        return Ok(true);
                    }
                    continue;
                }
                Scan::Cut if self.fill()? => continue,
                Scan::Cut if self.at == self.filled => return Ok(false),
                // The last line need not end with a newline.
                Scan::Cut => (self.filled - self.at, 0),
            };
            let from = self.at;
            self.at += length + newline;
            self.line = self.next_line;
            self.next_line += newline as u64;
            if !matches!(&self.buffer[from..from + length], b"" | b"\r") {
                return self.set_line(from, length).map(|()| true);
            }
        }
    }

    /// Makes the line at `from`, whose commas are in `bounds`, the record.
    fn set_line(&mut self, from: usize, length: usize) -> Result<(), DataError> {
        let line = &self.buffer[from..from + length];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Ok(line) = std::str::from_utf8(line) else { return Err(self.not_utf8()) };
        self.text.clear();
        self.text.push_str(line);
        let last = self.bounds.last().map_or(0, |&(_, comma)| comma + 1);
        self.bounds.push((last, line.len()));
        Ok(())
    }

    /// Reads a record in which there is a quote; false if it is a blank line all the same.
    fn take_quoted(&mut self) -> Result<bool, DataError> {
        (self.quoting, self.line) = (self.quoting.emptied(), self.next_line);
        let mut length = 0;
        loop {
            let rest = &self.buffer[self.at + length..self.filled];
            let end = rest.iter().position(|byte| self.quoting.take(*byte));
            length += end.map_or(rest.len(), |end| end + 1);
            if end.is_some() || !self.fill()? {
                break;
            }
        }
        self.quoting.end_cell();
        let newlines = self.buffer[self.at..self.at + length].iter().filter(|byte| **byte == b'\n').count();
        self.next_line += newlines as u64;
        self.at += length;
        if self.quoting.is_blank() {
            return Ok(false);
        }
        self.text.clear();
        self.bounds.clear();
        for cell in self.quoting.cells() {
            let Ok(cell) = std::str::from_utf8(cell) else { return Err(self.not_utf8()) };
            let from = self.text.len();
            self.text.push_str(cell);
            self.bounds.push((from, self.text.len()));
        }
        Ok(true)
    }

    /// Reads more behind what is not taken yet; false at the end of the file.
    fn fill(&mut self) -> Result<bool, DataError> {
        self.buffer.copy_within(self.at..self.filled, 0);
        (self.at, self.filled) = (0, self.filled - self.at);
        if self.filled == self.buffer.len() {
            self.buffer.resize(2 * self.filled, 0);
        }
        loop {
            match self.file.read(&mut self.buffer[self.filled..]) {
                Ok(read) => {
                    self.filled += read;
                    return Ok(read > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read_error(&self.path, error)),
            }
        }
    }

    fn not_utf8(&self) -> DataError {
        DataError::NotUtf8 { path: self.path.clone(), line: self.line }
    }

    fn check_end(&self) -> Result<(), DataError> {
        self.check_unchanged()?;
        self.check_quotes()
    }

    fn check_unchanged(&self) -> Result<(), DataError> {
        let now = self.file.get_ref().metadata().map_err(|error| read_error(&self.path, error))?;
        let same = now.len() == self.opened.len() && now.modified().ok() == self.opened.modified().ok();
        if same { Ok(()) } else { Err(DataError::Changed { path: self.path.clone() }) }
    }

    /// Whether the record read last ended because its quote closed, or because the file did.
    fn check_quotes(&self) -> Result<(), DataError> {
        if matches!(self.quoting.place, Place::Quoted) {
            return Err(DataError::QuoteNeverClosed { path: self.path.clone(), line: self.line });
        }
        Ok(())
    }
}

/// What comes first.
enum Scan {
    /// A newline, behind so many bytes without a quote.
    Line(usize),
    /// A quote.
    Quote,
    /// The end of what was read.
    Cut,
}

/// Looks for the end of a line without quotes, and adds its cells to `bounds`, but for the last.
fn scan(bytes: &[u8], bounds: &mut Vec<(usize, usize)>) -> Scan {
    let mut from = 0;
    let mut see = |place: usize| match bytes[place] {
        b',' => {
            bounds.push((from, place));
            from = place + 1;
            None
        }
        b'\n' => Some(Scan::Line(place)),
        b'"' => Some(Scan::Quote),
        _ => None,
    };
    let (words, rest) = bytes.as_chunks::<8>();
    for (at, word) in words.iter().enumerate() {
        let mut found = marked(u64::from_le_bytes(*word));
        while found != 0 {
            if let Some(end) = see(8 * at + found.trailing_zeros() as usize / 8) {
                return end;
            }
            found &= found - 1;
        }
    }
    (bytes.len() - rest.len()..bytes.len()).find_map(see).unwrap_or(Scan::Cut)
}

/// The highest bit of each byte of `word` that is a comma, a newline or a quote, and no other bit.
fn marked(word: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    // Of a byte that is 0, and only of that, neither the sum's highest bit is set, nor its own.
    let plain = |byte: u8| {
        let other = word ^ u64::from_le_bytes([byte; 8]);
        ((other & LOW) + LOW) | other
    };
    !(plain(b',') & plain(b'\n') & plain(b'"')) & !LOW
}

/// A record with quotes, byte by byte, as the `csv` crate reads it.
#[derive(Debug, Default)]
struct Quoting {
    place: Place,
    /// The cells without what quotes them, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

/// Where in a record with quotes the next byte is.
#[derive(Clone, Copy, Debug, Default)]
enum Place {
    #[default]
    CellStart,
    Bare,
    Quoted,
    QuoteInQuoted,
}

impl Quoting {
    fn emptied(&mut self) -> Self {
        let Self { mut bytes, mut ends, .. } = std::mem::take(self);
        bytes.clear();
        ends.clear();
        Self { place: Place::CellStart, bytes, ends }
    }

    /// Whether `byte` ends the record.
    fn take(&mut self, byte: u8) -> bool {
        self.place = match (self.place, byte) {
            (Place::CellStart, b'"') => Place::Quoted,
            (Place::Quoted, b'"') => Place::QuoteInQuoted,
            (Place::Quoted, _) | (Place::QuoteInQuoted, b'"') => {
                self.bytes.push(byte);
                Place::Quoted
            }
            (_, b',') => {
                self.end_cell();
                Place::CellStart
            }
            (_, b'\n') => return true,
            _ => {
                self.bytes.push(byte);
                Place::Bare
            }
        };
        false
    }

    fn end_cell(&mut self) {
        self.ends.push(self.bytes.len());
    }

    fn is_blank(&self) -> bool {
        self.ends.len() == 1 && self.bytes == b"\r"
    }

    /// The cells, without the carriage return before the newline.
    fn cells(&self) -> impl Iterator<Item = &[u8]> {
        let last = self.ends.len() - 1;
        let from = [0].into_iter().chain(self.ends.iter().copied());
        from.zip(&self.ends).enumerate().map(move |(at, (from, &to))| {
            let cell = &self.bytes[from..to];
            if at == last { cell.strip_suffix(b"\r").unwrap_or(cell) } else { cell }
        })
    }
}

fn open(path: &Path, shown: &str) -> Result<(File, Metadata), DataError> {
    let failed = |error| read_error(shown, error);
    // Before opening: to open a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(DataError::NotAFile { path: shown.to_owned() });
    }
    let file = File::open(path).map_err(failed)?;
    let opened = file.metadata().map_err(failed)?;
    if opened.len() == 0 {
        return Err(DataError::Empty { path: shown.to_owned() });
    }
    Ok((file, opened))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use csv::Terminator;

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

    /// What the `csv` crate reads, as this module used it before it read by itself.
    fn as_csv_reads(bytes: &[u8]) -> Option<Vec<Vec<String>>> {
        let mut reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .terminator(Terminator::Any(b'\n'))
            .from_reader(bytes);
        let mut records = Vec::new();
        for record in
            reader.byte_records().map(Result::unwrap).filter(|record| record.len() != 1 || &record[0] != b"\r")
        {
            let last = record.len() - 1;
            let cell = |(at, cell): (usize, &[u8])| {
                let cell = if at == last { cell.strip_suffix(b"\r").unwrap_or(cell) } else { cell };
                String::from_utf8(cell.to_vec()).ok()
            };
            records.push(record.iter().enumerate().map(cell).collect::<Option<_>>()?);
        }
        Some(records)
    }

    /// What this module reads of the same, without what it asks of a header and of the width of rows.
    fn as_we_read(bytes: &[u8], buffer: usize) -> Option<Vec<Vec<String>>> {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, bytes).unwrap();
        io::Seek::rewind(&mut file).unwrap();
        let opened = file.metadata().unwrap();
        let mut records = Records::over(String::new(), file, opened, buffer);
        let mut rows = Vec::new();
        loop {
            match records.take() {
                Ok(true) => rows.push(records.cells().map(str::to_owned).collect()),
                Ok(false) => return Some(rows),
                Err(DataError::NotUtf8 { .. }) => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn eight_bytes_are_marked_as_one_by_one() {
        for byte in 0..=255u8 {
            for place in 0..8 {
                for other in [b',', b'\n', b'"', 0, 0x7f, 0x80, 0xff, byte ^ 0x80, byte ^ 1] {
                    let mut bytes = [other; 8];
                    bytes[place] = byte;
                    let expected = bytes.map(|b| if matches!(b, b',' | b'\n' | b'"') { 0x80 } else { 0 });
                    assert_eq!(marked(u64::from_le_bytes(bytes)).to_le_bytes(), expected, "{bytes:?}");
                }
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn anything_is_read_as_the_csv_crate_reads_it(
            bytes in proptest::collection::vec(proptest::sample::select(b"aaaaab,,,,\"\"\"\n\n\r \xc3\xa9\xff\0".to_vec()), 0..120),
            buffer in 1usize..40,
        ) {
            proptest::prop_assert_eq!(as_we_read(&bytes, buffer), as_csv_reads(&bytes));
        }

        #[test]
        fn text_is_read_as_the_csv_crate_reads_it(text in "[ab1.,\"\n\r é]{0,200}", buffer in 1usize..300) {
            proptest::prop_assert_eq!(as_we_read(text.as_bytes(), buffer), as_csv_reads(text.as_bytes()));
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
