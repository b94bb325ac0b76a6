//! The fleet's one encoding: which columns, how each becomes numbers, and what the label means.
//!
//! [`merge`] makes it from every worker's survey, in name order, before round 1; the coordinator freezes it in the
//! checkpoint and saves it with the model, so that `predict` needs nothing else. A numeric column is standardised,
//! `(x - mean) / deviation`, missing is the mean and, where any value was missing, a second input says so. A
//! categorical column is one input for each name in its vocabulary, one for every other value and one for missing.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::Hash;
use protocol::limits::SCHEMA_BYTES_MAX;
use protocol::messages::{DecodeError, decode, encode};
use protocol::plan::{DataSpec, LearningTask};
use serde::{Deserialize, Serialize};

use crate::error::listed;
use crate::survey::{CLASSES_MAX, Content, Moments, Survey, most_frequent};

/// Without `data.task`, whole-number labels with at most so many values in the whole fleet are classes.
const CLASSES_INFERRED_MAX: usize = 20;

/// The frozen encoding of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schema {
    /// The label column.
    pub label: String,
    /// What the label means.
    pub target: Target,
    /// The columns that are learned from, sorted by name; never none.
    pub columns: Vec<ColumnSchema>,
}

/// What the label means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// One of several classes.
    Classification {
        /// Their names, two at least: in numeric order if all are numbers, else in the order of their text.
        classes: Vec<String>,
    },
    /// A number, which is learned as `(y - mean) / deviation`.
    Regression {
        /// The mean over all training rows.
        mean: f64,
        /// The standard deviation; 1 for a constant.
        deviation: f64,
    },
}

/// One column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ColumnSchema {
    /// Its name.
    pub name: String,
    /// How it becomes numbers.
    pub encoding: Encoding,
}

/// How a column becomes numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// `(x - mean) / deviation`.
    Numeric {
        /// The mean over all training rows.
        mean: f64,
        /// The standard deviation; 1 for a constant.
        deviation: f64,
        /// Whether a second input says that the value is missing.
        missing: bool,
    },
    /// One input for each name, one for every other value, one for missing.
    Categorical {
        /// The names, sorted.
        vocabulary: Vec<String>,
    },
}

/// What [`merge`] made.
#[derive(Clone, Debug, PartialEq)]
pub struct Frozen {
    /// The schema.
    pub schema: Schema,
    /// Columns that are not in it, sorted by name.
    pub dropped: Vec<Dropped>,
}

/// A column that is not learned from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("column {column:?} is dropped: {reason}")]
pub struct Dropped {
    /// Its name.
    pub column: String,
    /// Why.
    pub reason: DropReason,
}

/// Why a column is not learned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    /// Fewer than half of the workers have it.
    #[error("{have} of {of} workers have it")]
    Rare {
        /// How many have it.
        have: usize,
        /// How many there are.
        of: usize,
    },
    /// No worker has a value in it.
    #[error("it has no value anywhere")]
    Empty,
    /// It is text that is mostly unique.
    #[error("it is text that is mostly unique")]
    MostlyUnique,
    /// It is text, and no worker named a category of it.
    #[error("no category of it is frequent enough to be named")]
    NothingNamed,
}

/// Why surveys make no schema.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// There are none.
    #[error("no worker has sent a survey")]
    NoSurvey,
    /// Workers propose different label columns: who, and which.
    #[error("workers differ on the label column: {}; set data.label, and on each worker whose file calls it otherwise --label", pairs(.0))]
    Labels(Vec<(String, String)>),
    /// Workers that lack a column which at least half of the fleet have: who, and which.
    #[error("columns that most of the fleet have are missing: {}", pairs(.0))]
    Lacking(Vec<(String, String)>),
    /// All rows of the fleet are of one class.
    #[error(
        "every label of the whole fleet, in column {label:?}, is {class:?}, expected at least two classes; is it the \
         right column (data.label)?"
    )]
    OneClass {
        /// The label column.
        label: String,
        /// The class.
        class: String,
    },
    /// The label is text at one worker, and the task is regression.
    #[error("the label is text at {worker}, and data.task is \"regression\"")]
    TextLabel {
        /// Who.
        worker: String,
    },
    /// Classification with a label that is not whole numbers at one worker.
    #[error("the label at {worker} has numbers that are not whole, or more than {CLASSES_MAX} values: no classes")]
    NotClasses {
        /// Who.
        worker: String,
    },
    /// More classes than a model may have.
    #[error("the fleet has {got} classes, the most is {CLASSES_MAX}")]
    TooManyClasses {
        /// How many.
        got: usize,
    },
    /// A statistic of all workers together overflows.
    #[error("column {column:?}: the values of all workers together are too large; rescale or drop it")]
    TooLarge {
        /// Which.
        column: String,
    },
    /// Nothing is left to learn from.
    #[error(
        "no column is left to learn from: the files have none beside the label, or none that may be used; see data.drop"
    )]
    NoColumns,
    /// The schema would not fit its message.
    #[error("the schema has {got} bytes, the most is {SCHEMA_BYTES_MAX}; drop columns under data.drop")]
    TooLong {
        /// How long.
        got: u64,
    },
}

/// `pairs` of a worker and a column as a sentence has them: at most eight.
fn pairs(pairs: &[(String, String)]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<String> =
        pairs.iter().take(SHOWN).map(|(worker, column)| format!("{column:?} at {worker}")).collect();
    let more = pairs.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

/// Why some bytes are no schema.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// Longer than may be.
    #[error("a schema of {got} bytes, the most is {SCHEMA_BYTES_MAX}")]
    TooLong {
        /// How long.
        got: u64,
    },
    /// Not one.
    #[error("not a schema")]
    Unreadable(#[from] DecodeError),
    /// One that [`merge`] does not make.
    #[error("a schema contradicts itself: {what}")]
    Contradiction {
        /// Where.
        what: &'static str,
    },
}

/// Makes one schema of all surveys, by worker name.
///
/// # Errors
/// If the surveys do not fit together; [`MergeError::Lacking`] names the workers without which they would.
pub fn merge(surveys: &BTreeMap<String, Survey>, spec: &DataSpec) -> Result<Frozen, MergeError> {
    let label = merge_label(surveys)?;
    let target = merge_target(surveys, spec, &label)?;
    let mut columns = Vec::new();
    let mut dropped = Vec::new();
    let mut lacking = Vec::new();
    for name in column_names(surveys, spec, &label) {
        let having: Vec<&Survey> = surveys.values().filter(|survey| content(survey, &name).is_some()).collect();
        if having.len() * 2 < surveys.len() {
            let reason = DropReason::Rare { have: having.len(), of: surveys.len() };
            dropped.push(Dropped { column: name, reason });
            continue;
        }
        let without = surveys.iter().filter(|(_, survey)| content(survey, &name).is_none());
        lacking.extend(without.map(|(worker, _)| (worker.clone(), name.clone())));
        match merge_column(&having, &name)? {
            Ok(encoding) => columns.push(ColumnSchema { name, encoding }),
            Err(reason) => dropped.push(Dropped { column: name, reason }),
        }
    }
    if !lacking.is_empty() {
        return Err(MergeError::Lacking(lacking));
    }
    if columns.is_empty() {
        return Err(MergeError::NoColumns);
    }
    let schema = Schema { label, target, columns };
    let got = schema.to_bytes().len() as u64;
    if got > SCHEMA_BYTES_MAX { Err(MergeError::TooLong { got }) } else { Ok(Frozen { schema, dropped }) }
}

fn merge_label(surveys: &BTreeMap<String, Survey>) -> Result<String, MergeError> {
    let first = surveys.values().next().ok_or(MergeError::NoSurvey)?;
    if surveys.values().all(|survey| survey.label == first.label) {
        return Ok(first.label.clone());
    }
    // One worker for each proposal is enough to say who differs.
    let mut seen = BTreeSet::new();
    let one_each = surveys.iter().filter(|(_, survey)| seen.insert(&survey.label));
    Err(MergeError::Labels(one_each.map(|(worker, survey)| (worker.clone(), survey.label.clone())).collect()))
}

fn column_names(surveys: &BTreeMap<String, Survey>, spec: &DataSpec, label: &str) -> BTreeSet<String> {
    let all = surveys.values().flat_map(|survey| &survey.columns).map(|column| &column.name);
    all.filter(|name| *name != label && !spec.drop.contains(name)).cloned().collect()
}

fn content<'a>(survey: &'a Survey, name: &str) -> Option<&'a Content> {
    let at = survey.columns.binary_search_by(|column| column.name.as_str().cmp(name)).ok()?;
    Some(&survey.columns[at].content)
}

fn merge_target(surveys: &BTreeMap<String, Survey>, spec: &DataSpec, label: &str) -> Result<Target, MergeError> {
    let text = surveys.iter().find(|(_, survey)| survey.target.numbers.is_none());
    let whole = surveys.values().all(|survey| survey.target.whole && !survey.target.classes.is_empty());
    let names: BTreeSet<&String> = surveys.values().flat_map(|s| &s.target.classes).map(|(name, _)| name).collect();
    let task = spec.task.unwrap_or({
        let classes = text.is_some() || whole && names.len() <= CLASSES_INFERRED_MAX;
        if classes { LearningTask::Classification } else { LearningTask::Regression }
    });
    match (task, text) {
        (LearningTask::Regression, Some((worker, _))) => Err(MergeError::TextLabel { worker: worker.clone() }),
        (LearningTask::Regression, None) => regression(surveys, label),
        (LearningTask::Classification, _) => classification(surveys, names, label),
    }
}

fn regression(surveys: &BTreeMap<String, Survey>, label: &str) -> Result<Target, MergeError> {
    let all = surveys.values().filter_map(|survey| survey.target.numbers).fold(Moments::default(), Moments::merge);
    finite(&all, label)?;
    Ok(Target::Regression { mean: all.mean, deviation: all.deviation() })
}

fn classification(
    surveys: &BTreeMap<String, Survey>,
    names: BTreeSet<&String>,
    label: &str,
) -> Result<Target, MergeError> {
    if let Some((worker, _)) = surveys.iter().find(|(_, survey)| survey.target.classes.is_empty()) {
        return Err(MergeError::NotClasses { worker: worker.clone() });
    }
    let mut classes: Vec<String> = names.into_iter().cloned().collect();
    match classes.len() {
        1 => return Err(MergeError::OneClass { label: label.to_owned(), class: classes.remove(0) }),
        got if got > CLASSES_MAX => return Err(MergeError::TooManyClasses { got }),
        _ => {}
    }
    let numbers: Option<Vec<f64>> = classes.iter().map(|class| class.parse().ok()).collect();
    if let Some(numbers) = numbers.filter(|numbers| numbers.iter().all(|x| x.is_finite())) {
        let mut pairs: Vec<(f64, String)> = numbers.into_iter().zip(classes).collect();
        pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
        classes = pairs.into_iter().map(|(_, class)| class).collect();
    }
    Ok(Target::Classification { classes })
}

fn finite(moments: &Moments, column: &str) -> Result<(), MergeError> {
    let finite = moments.mean.is_finite() && moments.m2.is_finite();
    if finite { Ok(()) } else { Err(MergeError::TooLarge { column: column.to_owned() }) }
}

/// The encoding of one column, or why it has none; `surveys` are those of the workers that have it, in name order.
fn merge_column(surveys: &[&Survey], name: &str) -> Result<Result<Encoding, DropReason>, MergeError> {
    let contents: Vec<&Content> = surveys.iter().filter_map(|survey| content(survey, name)).collect();
    if contents.iter().any(|content| matches!(content, Content::Categorical { .. })) {
        return Ok(merge_categories(&contents));
    }
    let mut all = Moments::default();
    for content in contents {
        if let Content::Numeric { moments, .. } = content {
            all = all.merge(*moments);
        }
    }
    finite(&all, name)?;
    if all.count == 0 {
        return Ok(Err(DropReason::Empty));
    }
    let rows: u64 = surveys.iter().map(|survey| survey.training_rows).fold(0, u64::saturating_add);
    Ok(Ok(Encoding::Numeric { mean: all.mean, deviation: all.deviation(), missing: all.count < rows }))
}

fn merge_categories(contents: &[&Content]) -> Result<Encoding, DropReason> {
    let mut counts: BTreeMap<&String, u64> = BTreeMap::new();
    for (name, count) in contents.iter().flat_map(|content| content.named()) {
        let sum = counts.entry(name).or_default();
        *sum = sum.saturating_add(*count);
    }
    if counts.is_empty() {
        let unique = |content: &&Content| matches!(content, Content::Categorical { mostly_unique: true, .. });
        return Err(if contents.iter().any(unique) { DropReason::MostlyUnique } else { DropReason::NothingNamed });
    }
    let named = most_frequent(counts.into_iter().map(|(name, count)| (name.clone(), count)).collect());
    Ok(Encoding::Categorical { vocabulary: named.into_iter().map(|(name, _)| name).collect() })
}

impl Schema {
    /// How many numbers a row becomes.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.columns.iter().map(|column| column.encoding.inputs()).sum()
    }

    /// How many numbers a model gives for a row: one for each class, or the one that is predicted.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.classes().map_or(1, <[String]>::len)
    }

    /// The classes, if it is about classes.
    #[must_use]
    pub fn classes(&self) -> Option<&[String]> {
        match &self.target {
            Target::Classification { classes } => Some(classes),
            Target::Regression { .. } => None,
        }
    }

    /// The schema as it travels.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self)
    }

    /// BLAKE3 of [`Schema::to_bytes`].
    #[must_use]
    pub fn hash(&self) -> Hash {
        Hash::of(&self.to_bytes())
    }

    /// The schema that travelled as `bytes`.
    ///
    /// # Errors
    /// If they are longer than [`SCHEMA_BYTES_MAX`], or no schema that [`merge`] makes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SchemaError> {
        if bytes.len() as u64 > SCHEMA_BYTES_MAX {
            return Err(SchemaError::TooLong { got: bytes.len() as u64 });
        }
        let schema: Self = decode(bytes)?;
        schema.check()?;
        Ok(schema)
    }

    /// Refuses what [`merge`] never makes.
    pub(crate) fn check(&self) -> Result<(), SchemaError> {
        let wrong = |what| Err(SchemaError::Contradiction { what });
        let sorted = self.columns.windows(2).all(|pair| pair[0].name < pair[1].name);
        if self.columns.is_empty() || !sorted || self.columns.iter().any(|column| column.name == self.label) {
            return wrong("its columns are none, not sorted, or the label is one of them");
        }
        let target_fits = match &self.target {
            Target::Classification { classes } => {
                let different: BTreeSet<&String> = classes.iter().collect();
                (2..=CLASSES_MAX).contains(&classes.len()) && different.len() == classes.len()
            }
            Target::Regression { mean, deviation } => scale_fits(*mean, *deviation),
        };
        if !target_fits {
            return wrong("its target is no target");
        }
        if !self.columns.iter().all(|column| column.encoding.fits()) {
            return wrong("the encoding of a column is no encoding");
        }
        Ok(())
    }

    pub(crate) fn classes_listed(&self) -> String {
        listed(self.classes().unwrap_or_default().iter().map(String::as_str))
    }
}

impl Encoding {
    /// How many numbers a cell becomes.
    #[must_use]
    pub fn inputs(&self) -> usize {
        match self {
            Self::Numeric { missing, .. } => 1 + usize::from(*missing),
            Self::Categorical { vocabulary } => vocabulary.len() + 2,
        }
    }

    fn fits(&self) -> bool {
        match self {
            Self::Numeric { mean, deviation, .. } => scale_fits(*mean, *deviation),
            Self::Categorical { vocabulary } => {
                !vocabulary.is_empty() && vocabulary.windows(2).all(|pair| pair[0] < pair[1])
            }
        }
    }
}

fn scale_fits(mean: f64, deviation: f64) -> bool {
    mean.is_finite() && deviation.is_finite() && deviation > 0.0
}
