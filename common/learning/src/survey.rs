//! What one worker says of its columns before round 1, so that the fleet can share one encoding.
//!
//! Counts, means, sums of squares and category counts of the training rows: never a row. What leaves is bounded here,
//! where the data is: a category seen fewer than `min_count` times is not named, at most [`CATEGORIES_MAX`] are named a
//! column, of mostly-unique text nothing is. Classes are always named. Whoever receives a survey checks it as any
//! other peer's word ([`Survey::from_bytes`]).

use std::collections::BTreeMap;

use hashbrown::HashMap;
use protocol::limits::SURVEY_BYTES_MAX;
use protocol::messages::{DecodeError, decode, encode};
use serde::{Deserialize, Serialize};

use crate::cell::{Cell, written};
use crate::dataset::{Dataset, Note};
use crate::error::DataError;
use crate::records::{COLUMN_NAME_LEN_MAX, COLUMNS_MAX};
use crate::table::{Column, Table};

/// How often a category must be seen to be named, unless the worker's owner says otherwise.
pub const MIN_COUNT: u64 = 5;

/// The most categories of a column that are named, by one worker and in the schema.
pub const CATEGORIES_MAX: usize = 256;

/// The most classes.
pub const CLASSES_MAX: usize = 1000;

/// The longest category or class, in bytes; a longer category is not named.
pub(crate) const CATEGORY_LEN_MAX: usize = 256;

/// The brightest pixel.
const PIXEL_MAX: f64 = 255.0;

/// Text with fewer values than this is never called mostly unique.
const MOSTLY_UNIQUE_FROM: usize = 20;

/// One worker's column statistics.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Survey {
    pub(crate) label: String,
    pub(crate) training_rows: u64,
    pub(crate) held_out_rows: u64,
    pub(crate) target: TargetSurvey,
    /// Sorted by name.
    pub(crate) columns: Vec<ColumnSurvey>,
}

/// Of the label.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TargetSurvey {
    /// Present if all labels are numbers; over training rows.
    pub(crate) numbers: Option<Moments>,
    /// All labels are whole numbers.
    pub(crate) whole: bool,
    /// How many different labels there are.
    pub(crate) distinct: u64,
    /// Their names, held-out rows' too, with how many training rows have them; empty with more than [`CLASSES_MAX`].
    pub(crate) classes: Vec<(String, u64)>,
}

/// Of one column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ColumnSurvey {
    pub(crate) name: String,
    /// Training rows without a value.
    pub(crate) missing: u64,
    pub(crate) content: Content,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Content {
    /// No value in any row.
    Empty,
    /// Numbers. The categories are for the case that the column is text elsewhere, and empty with too many of them.
    Numeric { moments: Moments, named: Vec<(String, u64)> },
    /// Text, or numbers that the configuration calls names.
    Categorical { named: Vec<(String, u64)>, mostly_unique: bool },
}

/// Count, mean and the sum of squared differences from the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Moments {
    pub(crate) count: u64,
    pub(crate) mean: f64,
    pub(crate) m2: f64,
}

impl Survey {
    /// Training rows behind it.
    #[must_use]
    pub fn training_rows(&self) -> u64 {
        self.training_rows
    }

    /// Rows held out for evaluation.
    #[must_use]
    pub fn held_out_rows(&self) -> u64 {
        self.held_out_rows
    }

    /// The label column that this worker proposes.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The payload.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self)
    }

    /// The survey that a worker sent.
    ///
    /// # Errors
    /// If `bytes` are longer than [`SURVEY_BYTES_MAX`], no survey, or one that no honest worker makes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SurveyError> {
        if bytes.len() as u64 > SURVEY_BYTES_MAX {
            return Err(SurveyError::TooLong { got: bytes.len() as u64 });
        }
        let survey: Self = decode(bytes)?;
        survey.check()?;
        Ok(survey)
    }

    fn check(&self) -> Result<(), SurveyError> {
        let wrong = |what| Err(SurveyError::Contradiction { what });
        let sorted = self.columns.windows(2).all(|pair| pair[0].name < pair[1].name);
        let names = self.columns.iter().map(|column| &column.name).chain([&self.label]);
        if !sorted || self.columns.len() > COLUMNS_MAX {
            return wrong("its columns are not sorted, or too many");
        }
        if names.into_iter().any(|name| !(1..=COLUMN_NAME_LEN_MAX).contains(&name.len())) {
            return wrong("a column's name is empty or too long");
        }
        if self.training_rows == 0 || !self.target.fits(self.training_rows) {
            return wrong("its label does not fit its rows");
        }
        if !self.columns.iter().all(|column| column.fits(self.training_rows)) {
            return wrong("a column does not fit its rows");
        }
        Ok(())
    }
}

/// Why some bytes are no survey.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SurveyError {
    /// Longer than may be.
    #[error("a survey of {got} bytes, the most is {SURVEY_BYTES_MAX}")]
    TooLong {
        /// How long.
        got: u64,
    },
    /// Not one.
    #[error("not a survey")]
    Unreadable(#[from] DecodeError),
    /// One that no honest worker makes.
    #[error("a survey contradicts itself: {what}")]
    Contradiction {
        /// Where.
        what: &'static str,
    },
}

impl TargetSurvey {
    fn fits(&self, rows: u64) -> bool {
        let named: Option<u64> = self.classes.iter().try_fold(0u64, |sum, (_, count)| sum.checked_add(*count));
        let complete = self.classes.is_empty() || named == Some(rows) && self.distinct == self.classes.len() as u64;
        self.distinct > 0
            && complete
            && names_fit(&self.classes, CLASSES_MAX)
            && self.numbers.is_none_or(|moments| moments.fits(rows) && moments.count == rows)
    }
}

impl ColumnSurvey {
    fn fits(&self, rows: u64) -> bool {
        let moments_fit = match &self.content {
            Content::Numeric { moments, .. } => {
                moments.fits(rows) && moments.count.checked_add(self.missing) == Some(rows)
            }
            _ => true,
        };
        self.missing <= rows && moments_fit && names_fit(self.content.named(), CATEGORIES_MAX)
    }
}

impl Content {
    pub(crate) fn named(&self) -> &[(String, u64)] {
        match self {
            Self::Empty => &[],
            Self::Numeric { named, .. } | Self::Categorical { named, .. } => named,
        }
    }
}

fn names_fit(named: &[(String, u64)], max: usize) -> bool {
    named.len() <= max
        && named.windows(2).all(|pair| pair[0].0 < pair[1].0)
        && named.iter().all(|(name, _)| (1..=CATEGORY_LEN_MAX).contains(&name.len()))
}

impl Moments {
    /// Of a few numbers: their mean, as the first and what the others differ from it, then the differences from the mean. So
    /// a constant's mean is the constant.
    #[allow(clippy::cast_precision_loss)] // counts of rows stay below 2^53
    fn of(numbers: &[f64]) -> Self {
        let Some(first) = numbers.first() else { return Self::default() };
        let mean = first + sum(numbers, |x| x - first) / numbers.len() as f64;
        Self { count: numbers.len() as u64, mean, m2: sum(numbers, |x| (x - mean) * (x - mean)) }
    }

    /// Both together (Chan, Golub and LeVeque 1979, formula 2.1).
    #[allow(clippy::cast_precision_loss)] // counts of rows stay below 2^53
    pub(crate) fn merge(self, other: Self) -> Self {
        if self.count == 0 || other.count == 0 {
            return if self.count == 0 { other } else { self };
        }
        let count = self.count.saturating_add(other.count);
        let delta = other.mean - self.mean;
        let share = other.count as f64 / count as f64;
        Self {
            count,
            mean: self.mean + delta * share,
            m2: self.m2 + other.m2 + delta * delta * self.count as f64 * share,
        }
    }

    /// The standard deviation of the rows themselves; 1 for a constant, which then encodes to 0.
    #[allow(clippy::cast_precision_loss)] // counts of rows stay below 2^53
    pub(crate) fn deviation(&self) -> f64 {
        let deviation = (self.m2 / self.count as f64).sqrt();
        // Below this the differences are the rounding of the mean, not the data's.
        if deviation > self.mean.abs() * 1e-12 { deviation } else { 1.0 }
    }

    /// Those that make a pixel's value `x / 255`, whatever the images are. A deviation for each pixel would make much of
    /// the few that hardly any image sets, and says more of the images than a fleet needs to know.
    #[allow(clippy::cast_precision_loss)] // counts of rows stay below 2^53
    fn of_pixels(count: u64) -> Self {
        Self { count, mean: 0.0, m2: PIXEL_MAX * PIXEL_MAX * count as f64 }
    }

    fn is_finite(&self) -> bool {
        self.mean.is_finite() && self.m2.is_finite()
    }

    fn fits(&self, rows: u64) -> bool {
        self.is_finite() && self.m2 >= 0.0 && self.count <= rows
    }
}

impl Dataset {
    /// The survey of the training rows; a category is named from `min_count` on.
    ///
    /// # Errors
    /// If a column's squares overflow, a label has too many classes or too long ones, or the whole is too large.
    pub fn survey(&mut self, min_count: u64) -> Result<Survey, DataError> {
        let surveyed = self.features().map(|column| self.survey_column(column, min_count));
        let (mut columns, notes): (Vec<_>, Vec<_>) = surveyed.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        columns.sort_by(|a: &ColumnSurvey, b| a.name.cmp(&b.name));
        let survey = Survey {
            label: self.label.clone(),
            training_rows: self.training.len() as u64,
            held_out_rows: self.held_out.len() as u64,
            target: self.survey_target()?,
            columns,
        };
        notes.into_iter().flatten().for_each(|note| self.note(note));
        let got = survey.to_bytes().len() as u64;
        if got > SURVEY_BYTES_MAX {
            return Err(DataError::SurveyTooLarge { path: self.table.path().to_owned(), got, max: SURVEY_BYTES_MAX });
        }
        Ok(survey)
    }

    fn survey_column(&self, column: &Column, min_count: u64) -> Result<(ColumnSurvey, Option<Note>), DataError> {
        let name = column.name.clone();
        if column.is_pixels() && !self.spec.categorical.contains(&name) {
            let moments = Moments::of_pixels(self.training.len() as u64);
            return Ok((
                ColumnSurvey { name, missing: 0, content: Content::Numeric { moments, named: Vec::new() } },
                None,
            ));
        }
        let rows = self.training.len() as u64;
        if column.is_all_missing() {
            return Ok((ColumnSurvey { name, missing: rows, content: Content::Empty }, None));
        }
        if column.is_numeric() && !self.spec.categorical.contains(&name) {
            let moments = moments(&self.table, column, &self.training)?;
            let seen = count_categories(column, &self.training, CATEGORIES_MAX);
            let named = seen.map_or_else(Vec::new, |seen| named(seen, min_count));
            let missing = rows - moments.count;
            return Ok((ColumnSurvey { name, missing, content: Content::Numeric { moments, named } }, None));
        }
        let seen = count_categories(column, &self.training, usize::MAX).unwrap_or_default();
        let having = seen.values().sum();
        let mostly_unique = seen.len() >= MOSTLY_UNIQUE_FROM && seen.len() as u64 * 2 > having;
        let note = mostly_unique.then(|| Note::MostlyUnique {
            path: self.table.path().to_owned(),
            column: name.clone(),
            distinct: seen.len(),
            rows: having,
        });
        let named = if mostly_unique { Vec::new() } else { named(seen, min_count) };
        let content = Content::Categorical { named, mostly_unique };
        Ok((ColumnSurvey { name, missing: rows - having, content }, note))
    }

    fn survey_target(&self) -> Result<TargetSurvey, DataError> {
        let label = self.label_column();
        let numbers = match label.is_numeric() {
            true => Some(moments(&self.table, label, &self.training)?),
            false => None,
        };
        let whole = self.labelled().all(|row| matches!(label.cell(row), Cell::Number(x) if x.fract() == 0.0));
        let mut classes = count_categories(label, &self.training, usize::MAX).unwrap_or_default();
        for row in &self.held_out {
            if let Some(key) = key(label.cell(*row)) {
                classes.entry(key).or_default();
            }
        }
        let distinct = classes.len() as u64;
        let may_be_classes = distinct <= CLASSES_MAX as u64 && (whole || numbers.is_none());
        self.check_classes(numbers.is_none(), classes.len())?;
        let classes = if may_be_classes { all_named(classes) } else { Vec::new() };
        Ok(TargetSurvey { numbers, whole, distinct, classes })
    }

    fn check_classes(&self, text: bool, got: usize) -> Result<(), DataError> {
        let (path, column) = (self.table.path().to_owned(), self.label.clone());
        let classes = text || self.spec.task == Some(protocol::plan::LearningTask::Classification);
        if classes && got > CLASSES_MAX {
            return Err(DataError::TooManyClasses { path, column, got, max: CLASSES_MAX });
        }
        let label = self.label_column();
        let length = |row: usize| if let Cell::Word(word) = label.cell(row) { word.len() } else { 0 };
        match self.labelled().find(|&row| length(row) > CATEGORY_LEN_MAX) {
            Some(row) => {
                let (line, got) = (self.table.line(row), length(row));
                Err(DataError::ClassName { path, line, column, got, max: CATEGORY_LEN_MAX })
            }
            None => Ok(()),
        }
    }
}

/// A category before it is written out: numbers by their bits, which are one for each value but zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key<'a> {
    Number(u64),
    Word(&'a str),
}

fn key(cell: Cell<'_>) -> Option<Key<'_>> {
    match cell {
        Cell::Missing => None,
        Cell::Number(0.0) => Some(Key::Number(0)),
        Cell::Number(number) => Some(Key::Number(number.to_bits())),
        Cell::Word(word) => Some(Key::Word(word)),
    }
}

/// How many of `rows` are of each category. `None` as soon as there are more than `max`.
fn count_categories<'a>(column: &'a Column, rows: &[usize], max: usize) -> Option<HashMap<Key<'a>, u64>> {
    if let Some((codes, words)) = column.words() {
        let mut counts = vec![0; words.len() + 1];
        rows.iter().for_each(|row| counts[codes[*row] as usize] += 1);
        let counted = words.iter().zip(&counts[1..]).filter(|(_, count)| **count > 0);
        let counts: HashMap<_, _> = counted.map(|(word, count)| (Key::Word(word), *count)).collect();
        return (counts.len() <= max).then_some(counts);
    }
    let mut counts = HashMap::new();
    for row in rows {
        if let Some(key) = key(column.cell(*row)) {
            *counts.entry(key).or_default() += 1;
        }
        if counts.len() > max {
            return None;
        }
    }
    Some(counts)
}

fn all_named(counts: HashMap<Key<'_>, u64>) -> Vec<(String, u64)> {
    let written = counts.into_iter().map(|(key, count)| match key {
        Key::Number(bits) => (written(f64::from_bits(bits)), count),
        Key::Word(word) => (word.to_owned(), count),
    });
    written.collect::<BTreeMap<_, _>>().into_iter().collect()
}

/// The categories that may be named, sorted.
fn named(counts: HashMap<Key<'_>, u64>, min_count: u64) -> Vec<(String, u64)> {
    let mut named = all_named(counts);
    named.retain(|(name, count)| *count >= min_count && name.len() <= CATEGORY_LEN_MAX);
    most_frequent(named)
}

/// At most [`CATEGORIES_MAX`] of `named`, the most frequent, sorted by name.
pub(crate) fn most_frequent(mut named: Vec<(String, u64)>) -> Vec<(String, u64)> {
    named.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    named.truncate(CATEGORIES_MAX);
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

/// The sum of what `of` makes of them: eight sums side by side, then those.
fn sum(numbers: &[f64], of: impl Fn(f64) -> f64) -> f64 {
    let (eights, rest) = numbers.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for eight in eights {
        sums.iter_mut().zip(eight).for_each(|(sum, x)| *sum += of(*x));
    }
    sums.iter().sum::<f64>() + rest.iter().map(|x| of(*x)).sum::<f64>()
}

/// Numbers whose moments are taken at once: they stay in the first-level cache.
const MOMENTS_BLOCK: usize = 1024;

fn moments(table: &Table, column: &Column, rows: &[usize]) -> Result<Moments, DataError> {
    let mut moments = Moments::default();
    let mut block = Vec::with_capacity(MOMENTS_BLOCK);
    for rows in rows.chunks(MOMENTS_BLOCK) {
        block.clear();
        column.each(rows.iter().copied(), |cell| block.extend(if let Cell::Number(x) = cell { Some(x) } else { None }));
        moments = moments.merge(Moments::of(&block));
    }
    if moments.is_finite() {
        Ok(moments)
    } else {
        Err(DataError::TooLarge { path: table.path().to_owned(), column: column.name.clone() })
    }
}
