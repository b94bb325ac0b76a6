//! What survives a restart: the runs, and the checkpoints of each.
//!
//! A [`Store`] takes in events and makes them durable. In this version only a commit is: the first model, each
//! round's model, the last evaluation. Its sync is one checkpoint file, written aside, synced, renamed, its directory
//! synced; the last three are kept, and a damaged newest one gives way to the one before, said loudly. A journal of
//! the facts in between would take its place behind the same calls.
//!
//! ```text
//! magic 8 │ version u32 │ four times: length u64 │ bytes   figures, schema, model, server state
//! BLAKE3 of everything before, 32
//! ```

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::evaluation::EvaluationSummary;
use protocol::federation::{Checkpoint, Event, Frozen};
use protocol::ids::{Hash, RunId};
use protocol::limits::{MODEL_BYTES_MAX, SCHEMA_BYTES_MAX};
use protocol::plan::{BatchSize, LearningPlan, ModelSpec, Plan, Strategy};
use serde_json::json;

pub mod disk;
pub mod journal;
pub mod run;
#[cfg(test)]
pub(crate) mod testing;

use self::disk::RealDisk;
use self::run::{Loaded, ModelState, RunStore};
use crate::state::{
    StateDir, StateError, make_private_dir, read_small, sync_parent, write_durably, write_durably_with,
};

/// How many checkpoints of a run are kept.
pub const CHECKPOINTS_KEPT: usize = 3;

const MAGIC: &[u8; 8] = b"tribckpt";
const VERSION: u32 = 1;
const PREFIX: &str = "checkpoint-";

/// The most that the figures may take: a million rounds of many updates.
const FIGURES_BYTES_MAX: u64 = 8 << 30;

/// The server state of today's strategies has at most two numbers of eight bytes for each parameter.
const SERVER_BYTES_MAX: u64 = 4 * MODEL_BYTES_MAX;

/// A run at one of its commits: figures, and the tensors and bytes that they name.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The machine's figures and hashes.
    pub checkpoint: Checkpoint,
    /// The frozen schema's bytes; empty before the survey.
    pub schema: Arc<[u8]>,
    /// The model, raw little-endian `f32` in layout order; empty before the survey.
    pub model: Arc<[u8]>,
    /// The server step's state.
    pub server: Vec<u8>,
}

/// Why what is on disk cannot be used, or nothing can be put there. Files are named as in their directory.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("{file}: cannot {verb}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What was being done.
        verb: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// It may not be written.
    #[error("{file}: not writable; make the state directory yours, or give another with --state")]
    NotWritable {
        /// The file.
        file: String,
    },
    /// There is no room. Nothing is lost, and the same call can be made again.
    #[error("{file}: the disk is full; make room: what was held and committed is kept")]
    Full {
        /// The file.
        file: String,
    },
    /// A sync failed: what is on disk is not known any more.
    #[error("{file}: cannot sync: {source}; look after the disk, and start again: what was synced before is kept")]
    Unsynced {
        /// The file.
        file: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Something was asked for after the disk had failed.
    #[error("{file}: the disk failed before; start again")]
    Failed {
        /// The file.
        file: String,
    },
    /// What was durable once is something else now.
    #[error("{file}: damaged at offset {offset}: {reason}; restore the whole state directory from a backup")]
    Damaged {
        /// The file.
        file: String,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A crash left half a record, which nobody was told of.
    #[error("{file}: torn at offset {offset}: {reason}; what follows was never durable, and is cut")]
    Torn {
        /// The file.
        file: String,
        /// Where in it.
        offset: u64,
        /// What is there.
        reason: String,
    },
    /// A file is not there.
    #[error("{file}: it is not there; restore the whole state directory from a backup")]
    Missing {
        /// The file.
        file: String,
    },
    /// A newer build wrote it.
    #[error("{file}: of version {got}, this program reads version {}; update it", journal::JOURNAL_VERSION)]
    Newer {
        /// The file.
        file: String,
        /// Its version.
        got: u32,
    },
    /// It belongs to another run.
    #[error("{file}: of run {got}, expected run {expected}; put back what was there")]
    AnotherRun {
        /// The file.
        file: String,
        /// Whose it is.
        got: RunId,
        /// Whose it should be.
        expected: RunId,
    },
    /// It belongs to a run with another plan.
    #[error("{file}: of another plan than the run; put back what was there")]
    AnotherPlan {
        /// The file.
        file: String,
    },
    /// A model is not what the journal says.
    #[error("the model of round {round} is damaged: {reason}")]
    Model {
        /// The round; 0 for the first model.
        round: u32,
        /// What is wrong.
        reason: String,
    },
    /// No model is whole from which the run could go on.
    #[error("no model of the run is whole; restore the whole state directory from a backup")]
    NoModel,
    /// A round that was made again gave another model than before.
    #[error(
        "round {round} was made again and gave model {redone}, before it was {kept}: trust the model of before and \
         restore what it was made of from a backup, or remove model-{round:010}-{kept} to go on with the new one"
    )]
    TwoModels {
        /// The round.
        round: u32,
        /// The model that there is.
        kept: Hash,
        /// The one that was made now.
        redone: Hash,
    },
    /// Longer than the journal takes: our own bug.
    #[error("a record part of {bytes} bytes, the most is {max}")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The most.
        max: usize,
    },
}

impl StoreError {
    /// Wraps what the operating system said about `file`.
    pub(crate) fn io(file: &str, verb: &'static str) -> impl FnOnce(io::Error) -> Self {
        let file = file.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::NotWritable { file },
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge
            | io::ErrorKind::WriteZero => Self::Full { file },
            _ => Self::Io { file, verb, source },
        }
    }

    /// Whether the same call can be made again when there is room.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}

/// Where a run's events go.
pub trait Store: Send {
    /// The newest state that is whole, if anything was ever made durable; and what was found damaged on the way.
    ///
    /// # Errors
    /// If there is something, and nothing whole.
    fn load(&mut self) -> Result<(Option<Snapshot>, Vec<StateError>), StateError>;

    /// Takes in a fact. It is durable after the next [`Self::sync`], as far as the run's durability asks.
    ///
    /// # Errors
    /// If the disk is broken.
    fn append(&mut self, event: &Event) -> Result<(), StateError>;

    /// Makes everything that was appended durable. `snapshot` is the state after a commit. The number of bytes written.
    ///
    /// # Errors
    /// If the disk is broken.
    fn sync(&mut self, snapshot: &Snapshot) -> Result<u64, StateError>;
}

/// The directory of one run.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// The number of the next checkpoint.
    next: u64,
}

impl RunDir {
    fn new(path: PathBuf) -> Result<Self, StateError> {
        let next = checkpoints(&path)?.last().map_or(0, |(number, _)| number + 1);
        Ok(Self { path, next })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Remembers that the run was given up, and why.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn mark_aborted(&self, sentence: &str) -> Result<(), StateError> {
        write_durably(&self.path.join("aborted"), format!("{sentence}\n").as_bytes())
    }

    fn remove_old(&self) -> Result<(), StateError> {
        let all = checkpoints(&self.path)?;
        for (_, path) in all.iter().take(all.len().saturating_sub(CHECKPOINTS_KEPT)) {
            fs::remove_file(path).map_err(StateError::io(path, "remove"))?;
        }
        Ok(())
    }
}

impl Store for RunDir {
    fn load(&mut self) -> Result<(Option<Snapshot>, Vec<StateError>), StateError> {
        let mut damaged = Vec::new();
        for (_, path) in checkpoints(&self.path)?.iter().rev() {
            match read_snapshot(path) {
                Ok(snapshot) => return Ok((Some(snapshot), damaged)),
                Err(error) => damaged.push(error),
            }
        }
        match damaged.pop() {
            Some(error) => Err(error),
            None => Ok((None, damaged)),
        }
    }

    fn append(&mut self, _event: &Event) -> Result<(), StateError> {
        Ok(())
    }

    fn sync(&mut self, snapshot: &Snapshot) -> Result<u64, StateError> {
        let path = self.path.join(format!("{PREFIX}{:010}", self.next));
        let mut written = 0;
        write_durably_with(&path, |file| {
            written = write_snapshot(file, snapshot)?;
            Ok(())
        })?;
        self.next += 1;
        self.remove_old()?;
        Ok(written)
    }
}

/// A store that forgets when it is dropped: for fleets in tests and benchmarks.
#[derive(Debug, Default)]
pub struct Memory {
    events: Vec<Event>,
    snapshot: Option<Snapshot>,
}

impl Store for Memory {
    fn load(&mut self) -> Result<(Option<Snapshot>, Vec<StateError>), StateError> {
        Ok((self.snapshot.clone(), Vec::new()))
    }

    fn append(&mut self, event: &Event) -> Result<(), StateError> {
        self.events.push(event.clone());
        Ok(())
    }

    fn sync(&mut self, snapshot: &Snapshot) -> Result<u64, StateError> {
        self.events.clear();
        self.snapshot = Some(snapshot.clone());
        Ok(0)
    }
}

/// The run that a start goes on with or begins.
#[derive(Debug)]
pub struct OpenedRun {
    /// Its directory.
    pub dir: RunDir,
    /// Where it begins.
    pub from: Snapshot,
    /// What was found damaged on the way.
    pub damaged: Vec<StateError>,
    /// The finished run that was there before, if there was one, with its plan.
    pub finished: Option<(Snapshot, LearningPlan)>,
}

/// Why a start has no run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The state cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// An unfinished run has another plan.
    #[error(
        "{}: an unfinished run has another plan: {difference}; change it back, or begin anew with --new-run",
        path.display()
    )]
    AnotherPlan {
        /// The run's directory.
        path: PathBuf,
        /// The first difference, by its key.
        difference: String,
    },
    /// No checkpoint of an unfinished run is whole.
    #[error("the unfinished run has no checkpoint that is whole; begin anew with --new-run: {0}")]
    Lost(StateError),
    /// The journal of the unfinished run, or what it cannot do without, is damaged.
    #[error("{}: {source}; or begin anew with --new-run", path.display())]
    LostJournal {
        /// The run's directory.
        path: PathBuf,
        /// What is damaged.
        source: StoreError,
    },
    /// A run's directory cannot be used.
    #[error("{}: {source}", path.display())]
    Store {
        /// The run's directory.
        path: PathBuf,
        /// Why.
        source: StoreError,
    },
    /// The operating system gave no entropy for the run's id.
    #[error("cannot draw a run id: {0}")]
    Entropy(#[from] getrandom::Error),
}

/// Goes on with the unfinished run, or begins one, by the rules of a second start.
///
/// `keep_finished` is for `--exit-when-done`: a finished run of the same plan is opened again.
///
/// # Errors
/// Why there is no run to go on with.
pub fn open_run(state: &StateDir, plan: &Plan, new_run: bool, keep_finished: bool) -> Result<OpenedRun, RunError> {
    let runs = state.file("runs");
    match current_run(&runs)? {
        Some((run, path)) if !new_run => go_on(&runs, run, path, plan, keep_finished),
        _ => begin(&runs, plan),
    }
}

fn go_on(runs: &Path, run: RunId, path: PathBuf, plan: &Plan, keep_finished: bool) -> Result<OpenedRun, RunError> {
    if path.join("aborted").exists() {
        return begin(runs, plan);
    }
    let mut dir = RunDir::new(path)?;
    let (snapshot, damaged) = dir.load().map_err(RunError::Lost)?;
    let from = snapshot.unwrap_or_else(|| unbegun(run, plan));
    let before = read_plan(&dir.path)?;
    let difference = difference(&before, &plan.learning);
    let same = from.checkpoint.plan == plan.hash() && before.train.rounds <= plan.learning.train.rounds;
    if from.checkpoint.finished.is_some() {
        let rounds_too = before.train.rounds == plan.learning.train.rounds;
        let finished = Some((from.clone(), before));
        if same && rounds_too && keep_finished {
            return Ok(OpenedRun { dir, from, damaged, finished });
        }
        return Ok(OpenedRun { finished, ..begin(runs, plan)? });
    }
    if !same || difference.as_ref().is_some_and(|(key, _)| key != "train.rounds") {
        let difference = difference.map_or_else(|| "the arithmetic of the sum".to_owned(), |(_, sentence)| sentence);
        return Err(RunError::AnotherPlan { path: dir.path, difference });
    }
    write_plan(&dir.path, &plan.learning)?;
    Ok(OpenedRun { dir, from, damaged, finished: None })
}

/// The run that a start goes on with or begins, with its journal.
#[derive(Debug)]
pub struct JournaledRun {
    /// Its id.
    pub run: RunId,
    /// Its directory.
    pub path: PathBuf,
    /// What it goes on with.
    pub loaded: Loaded,
    /// The finished run that was there before, or that this is, if there is one.
    pub finished: Option<FinishedRun>,
}

/// A run that is over, and what its model file is made of.
#[derive(Clone, Debug)]
pub struct FinishedRun {
    /// What was to be learned.
    pub learning: LearningPlan,
    /// Committed rounds.
    pub rounds: u32,
    /// What the survey froze.
    pub frozen: Frozen,
    /// The schema's bytes.
    pub schema: Arc<[u8]>,
    /// The last model's hash.
    pub model: Hash,
    /// The last model.
    pub state: ModelState,
    /// Its evaluation.
    pub evaluation: EvaluationSummary,
}

impl FinishedRun {
    /// None if the run is not over, or if its last model must be made again.
    fn of(loaded: &Loaded, learning: LearningPlan) -> Option<Self> {
        let (mut rounds, mut frozen, mut model, mut evaluation) = (0, None, None, None);
        for event in &loaded.events {
            match event {
                Event::Surveyed { frozen: figures, model: first } => (frozen, model) = (Some(*figures), Some(*first)),
                Event::Committed { figures, .. } => (rounds, model) = (figures.round, Some(figures.model)),
                Event::Reverted { .. } => evaluation = None,
                Event::Finished { evaluation: last } => evaluation = Some(*last),
                _ => {}
            }
        }
        let state = loaded.state.clone().filter(|_| loaded.whole.is_none())?;
        let schema = loaded.schema.clone();
        let (frozen, model, evaluation) = (frozen?, model?, evaluation?);
        Some(Self { learning, rounds, frozen, schema, model, state, evaluation })
    }
}

/// Goes on with the unfinished run, or begins one, by the rules of a second start.
///
/// `keep_finished` is for `--exit-when-done`: a finished run of the same plan is opened again.
///
/// # Errors
/// Why there is no run to go on with.
pub fn open_journaled_run(
    state: &StateDir,
    plan: &Plan,
    new_run: bool,
    keep_finished: bool,
) -> Result<JournaledRun, RunError> {
    let runs = state.file("runs");
    match current_run(&runs)? {
        Some((run, path)) if !new_run => go_on_journaled(&runs, run, path, plan, keep_finished),
        _ => begin_journaled(&runs, plan),
    }
}

fn go_on_journaled(
    runs: &Path,
    run: RunId,
    path: PathBuf,
    plan: &Plan,
    keep_finished: bool,
) -> Result<JournaledRun, RunError> {
    let before = read_plan(&path)?;
    let difference = difference(&before, &plan.learning);
    let more_rounds = before.train.rounds <= plan.learning.train.rounds;
    let is_other = difference.as_ref().is_some_and(|(key, _)| key != "train.rounds") || !more_rounds;
    let sentence = || difference.map_or_else(|| "the arithmetic of the sum".to_owned(), |(_, sentence)| sentence);
    let Some(loaded) = load(run, &path)? else {
        // It was interrupted before its first fact.
        if is_other {
            return Err(RunError::AnotherPlan { path, difference: sentence() });
        }
        write_plan(&path, &plan.learning)?;
        return load_new(run, path, plan);
    };
    let is_same = !is_other && loaded.store.plan() == plan.hash();
    let same_rounds = before.train.rounds == plan.learning.train.rounds;
    if let Some(last) = FinishedRun::of(&loaded, before) {
        let finished = Some(last);
        if is_same && same_rounds && keep_finished {
            return Ok(JournaledRun { run, path, loaded, finished });
        }
        return Ok(JournaledRun { finished, ..begin_journaled(runs, plan)? });
    }
    if loaded.events.iter().any(|event| matches!(event, Event::Aborted { .. })) {
        return begin_journaled(runs, plan);
    }
    if !is_same {
        return Err(RunError::AnotherPlan { path, difference: sentence() });
    }
    write_plan(&path, &plan.learning)?;
    Ok(JournaledRun { run, path, loaded, finished: None })
}

fn begin_journaled(runs: &Path, plan: &Plan) -> Result<JournaledRun, RunError> {
    let (run, path) = begin_dir(runs, plan)?;
    load_new(run, path, plan)
}

fn load_new(run: RunId, path: PathBuf, plan: &Plan) -> Result<JournaledRun, RunError> {
    let disk = Box::new(RealDisk::new(&path).map_err(StateError::io(&path, "open"))?);
    let loaded = RunStore::open(disk, run, plan.hash(), unix_ms).map_err(unusable(&path))?;
    Ok(JournaledRun { run, path, loaded, finished: None })
}

/// `None` if there is no journal yet.
fn load(run: RunId, path: &Path) -> Result<Option<Loaded>, RunError> {
    let disk = Box::new(RealDisk::new(path).map_err(StateError::io(path, "open"))?);
    if !run::has_begun(disk.as_ref()).map_err(unusable(path))? {
        return Ok(None);
    }
    RunStore::open_any(disk, run, unix_ms).map(Some).map_err(unusable(path))
}

/// What is damaged can be given up; what is full or not writable cannot be worked around by a new run.
fn unusable(path: &Path) -> impl FnOnce(StoreError) -> RunError {
    let path = path.to_owned();
    move |source| match source {
        StoreError::Io { .. } | StoreError::NotWritable { .. } | StoreError::Full { .. } | StoreError::Newer { .. } => {
            RunError::Store { path, source }
        }
        source => RunError::LostJournal { path, source },
    }
}

/// Milliseconds since 1970; 0 before.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn begin(runs: &Path, plan: &Plan) -> Result<OpenedRun, RunError> {
    let (run, path) = begin_dir(runs, plan)?;
    Ok(OpenedRun { dir: RunDir::new(path)?, from: unbegun(run, plan), damaged: Vec::new(), finished: None })
}

fn begin_dir(runs: &Path, plan: &Plan) -> Result<(RunId, PathBuf), RunError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)?;
    let run = RunId(id);
    let path = runs.join(run.to_string());
    make_private_dir(&path)?;
    sync_parent(runs)?;
    sync_parent(&path)?;
    write_plan(&path, &plan.learning)?;
    // From here on a restart finds it.
    write_durably(&runs.join("current"), format!("{run}\n").as_bytes())?;
    Ok((run, path))
}

fn unbegun(run: RunId, plan: &Plan) -> Snapshot {
    let checkpoint = Checkpoint::new(run, plan.hash());
    Snapshot { checkpoint, schema: Arc::from([]), model: Arc::from([]), server: Vec::new() }
}

/// The run that the next start goes on with, and its directory.
pub(crate) fn current_run(runs: &Path) -> Result<Option<(RunId, PathBuf)>, StateError> {
    let pointer = runs.join("current");
    let Some(bytes) = read_small(&pointer)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&bytes);
    let run: RunId = text.trim().parse().map_err(|error| StateError::damaged(&pointer, error))?;
    Ok(Some((run, runs.join(run.to_string()))))
}

fn plan_file(run: &Path) -> PathBuf {
    run.join("plan.json")
}

fn write_plan(run: &Path, learning: &LearningPlan) -> Result<(), StateError> {
    let path = plan_file(run);
    let mut text = serde_json::to_vec_pretty(learning).map_err(|error| StateError::damaged(&path, error))?;
    text.push(b'\n');
    write_durably(&path, &text)
}

fn read_plan(run: &Path) -> Result<LearningPlan, StateError> {
    let path = plan_file(run);
    let bytes = read_small(&path)?.ok_or_else(|| StateError::damaged(&path, "it is not there"))?;
    serde_json::from_slice(&bytes).map_err(|error| StateError::damaged(&path, error))
}

/// What an operator wrote who left a key out.
const NOT_GIVEN: &str = "not given";

/// What is not the same: the first key, and a sentence with both values of each.
fn difference(before: &LearningPlan, now: &LearningPlan) -> Option<(String, String)> {
    let (before, now) = (leaves("", &as_config(before)), leaves("", &as_config(now)));
    let other = |key: &String, all: &[(String, String)]| {
        all.iter().find(|(k, _)| k == key).map_or_else(|| NOT_GIVEN.to_owned(), |(_, value)| value.clone())
    };
    let keys = before.iter().chain(&now).map(|(key, _)| key);
    let changed = keys.filter(|key| other(key, &before) != other(key, &now));
    let mut changed: Vec<&String> = changed.collect();
    // Another kind decides which other keys its section has. More rounds alone are no other plan, and are named alone.
    let section = |key: &str| key.split('.').next().unwrap_or_default().to_owned();
    let kinds: Vec<String> = changed.iter().filter(|key| key.ends_with(".kind")).map(|key| section(key)).collect();
    changed.retain(|key| key.ends_with(".kind") || !kinds.contains(&section(key)));
    changed.sort_by_key(|key| (*key == "train.rounds", !key.ends_with(".kind"), *key));
    changed.dedup();
    if changed.len() > 1 {
        changed.retain(|key| *key != "train.rounds");
    }
    let first = (*changed.first()?).clone();
    let each = changed.iter().map(|key| format!("{key} was {}, is {}", other(key, &before), other(key, &now)));
    Some((first, each.collect::<Vec<_>>().join("; ")))
}

/// The plan as a config file says it.
fn as_config(plan: &LearningPlan) -> serde_json::Value {
    let mut value = serde_json::to_value(plan).unwrap_or_default();
    value["model"] = match &plan.model {
        ModelSpec::Linear => json!({ "kind": "linear" }),
        ModelSpec::Mlp { hidden } => json!({ "kind": "mlp", "hidden": hidden }),
    };
    value["train"]["batch_size"] = match plan.train.batch_size {
        BatchSize::Rows(rows) => json!(rows),
        BatchSize::Full => json!("full"),
    };
    value["strategy"] = match plan.strategy {
        Strategy::FedAvg => json!({ "kind": "fedavg" }),
    };
    value
}

fn leaves(prefix: &str, value: &serde_json::Value) -> Vec<(String, String)> {
    match value {
        serde_json::Value::Object(fields) => fields
            .iter()
            .flat_map(|(name, value)| {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                leaves(&key, value)
            })
            .collect(),
        serde_json::Value::Null => vec![(prefix.to_owned(), NOT_GIVEN.to_owned())],
        other => vec![(prefix.to_owned(), other.to_string())],
    }
}

/// The checkpoints of a run, the oldest first.
fn checkpoints(run: &Path) -> Result<Vec<(u64, PathBuf)>, StateError> {
    let entries = fs::read_dir(run).map_err(StateError::io(run, "list"))?;
    let mut all = Vec::new();
    for entry in entries {
        let path = entry.map_err(StateError::io(run, "list"))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(number) = name.strip_prefix(PREFIX).and_then(|number| number.parse::<u64>().ok()) {
            all.push((number, path));
        }
    }
    all.sort();
    Ok(all)
}

fn write_snapshot(file: &mut File, snapshot: &Snapshot) -> io::Result<u64> {
    let figures = protocol::messages::encode(&snapshot.checkpoint);
    let mut out = Hashing::new(BufWriter::with_capacity(1 << 20, file));
    out.write_all(MAGIC)?;
    out.write_all(&VERSION.to_le_bytes())?;
    for section in [&figures[..], &snapshot.schema, &snapshot.model, &snapshot.server] {
        out.write_all(&(section.len() as u64).to_le_bytes())?;
        out.write_all(section)?;
    }
    let hash = out.hasher.finalize();
    out.inner.write_all(hash.as_bytes())?;
    out.inner.flush()?;
    Ok(out.bytes + 32)
}

fn read_snapshot(path: &Path) -> Result<Snapshot, StateError> {
    let file = File::open(path).map_err(StateError::io(path, "open"))?;
    let mut input = Hashing::new(BufReader::with_capacity(1 << 20, file));
    parse_snapshot(&mut input).map_err(|reason| StateError::damaged(path, reason))
}

fn parse_snapshot(input: &mut Hashing<impl Read>) -> Result<Snapshot, String> {
    let short = |error: io::Error| format!("it ends early: {error}");
    let mut magic = [0; 8];
    input.read_exact(&mut magic).map_err(short)?;
    let mut version = [0; 4];
    input.read_exact(&mut version).map_err(short)?;
    if &magic != MAGIC || u32::from_le_bytes(version) != VERSION {
        return Err("it is not a checkpoint of this version".to_owned());
    }
    let figures = read_section(input, FIGURES_BYTES_MAX)?;
    let schema = read_section(input, SCHEMA_BYTES_MAX)?;
    let model = read_section(input, MODEL_BYTES_MAX)?;
    let server = read_section(input, SERVER_BYTES_MAX)?;
    let hash = input.hasher.finalize();
    let mut stored = [0; 32];
    input.inner.read_exact(&mut stored).map_err(short)?;
    if hash != blake3::Hash::from_bytes(stored) {
        return Err("its hash does not fit its content".to_owned());
    }
    let checkpoint = protocol::messages::decode(&figures).map_err(|error| error.to_string())?;
    Ok(Snapshot { checkpoint, schema: schema.into(), model: model.into(), server })
}

fn read_section(input: &mut Hashing<impl Read>, max: u64) -> Result<Vec<u8>, String> {
    let mut length = [0; 8];
    input.read_exact(&mut length).map_err(|error| format!("it ends early: {error}"))?;
    let length = u64::from_le_bytes(length);
    if length > max {
        return Err(format!("a section has {length} bytes, the most is {max}"));
    }
    // Grows as bytes come: a damaged length must not allocate what is not there.
    let mut bytes = Vec::new();
    input.take(length).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err("it ends early".to_owned()) }
}

/// Hashes and counts what passes.
struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<T> Hashing<T> {
    fn new(inner: T) -> Self {
        Self { inner, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    fn saw(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
    }
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.saw(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(bytes)?;
        self.saw(&bytes[..read]);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::run::Attachment;
    use super::testing::{SCHEMA, committed, model, started, surveyed};
    use super::*;
    use protocol::ids::TaskId;
    use protocol::plan::RoundsSpec;

    fn plan(change: impl FnOnce(&mut LearningPlan)) -> Plan {
        let mut learning = LearningPlan::default();
        change(&mut learning);
        Plan::new(learning, RoundsSpec::default()).unwrap()
    }

    fn state() -> (tempfile::TempDir, StateDir) {
        let home = tempfile::tempdir().unwrap();
        let state = StateDir::open(home.path()).unwrap();
        (home, state)
    }

    fn commit(run: &mut OpenedRun, model: &[u8], finished: bool) {
        run.from.model = model.into();
        run.from.checkpoint.model = Some(Hash::of(model));
        run.from.checkpoint.finished = finished.then(EvaluationSummary::default);
        run.dir.sync(&run.from).unwrap();
    }

    #[test]
    fn an_unfinished_run_goes_on_from_its_last_commit() {
        let (_home, state) = state();
        let mut first = open_run(&state, &plan(|_| ()), false, false).unwrap();
        let run = first.from.checkpoint.run;
        let again = open_run(&state, &plan(|_| ()), false, false).unwrap();
        assert_eq!(again.from, first.from, "before the first commit too");
        commit(&mut first, b"one", false);
        commit(&mut first, b"two", false);
        let again = open_run(&state, &plan(|l| l.train.rounds = 99), false, false).unwrap();
        assert_eq!((again.from.checkpoint.run, &again.from.model[..]), (run, &b"two"[..]));
        let anew = open_run(&state, &plan(|_| ()), true, false).unwrap();
        assert_ne!(anew.from.checkpoint.run, run);
    }

    #[test]
    fn a_run_is_for_its_owners_eyes_also_where_others_may_look_into_the_state() {
        use std::os::unix::fs::PermissionsExt as _;
        let (home, state) = state();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let run = open_run(&state, &plan(|_| ()), false, false).unwrap();
        for path in [state.file("runs"), run.dir.path().to_owned()] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }

    #[test]
    fn another_plan_is_refused_by_the_key_that_differs() {
        let (_home, state) = state();
        open_run(&state, &plan(|_| ()), false, false).unwrap();
        let refused = |change: fn(&mut LearningPlan)| {
            let RunError::AnotherPlan { difference, .. } = open_run(&state, &plan(change), false, false).unwrap_err()
            else {
                panic!("not refused")
            };
            difference
        };
        assert_eq!(refused(|l| l.train.learning_rate = 0.1), "train.learning_rate was 0.05, is 0.1");
        assert_eq!(refused(|l| l.data.label = Some("y".into())), "data.label was not given, is \"y\"");
        assert_eq!(refused(|l| l.train.rounds = 3), "train.rounds was 30, is 3");
        assert_eq!(refused(|l| l.model = ModelSpec::Linear), "model.kind was \"mlp\", is \"linear\"");
        assert_eq!(refused(|l| l.train.batch_size = BatchSize::Full), "train.batch_size was 32, is \"full\"");
        let both = refused(|l| (l.train.rounds, l.train.seed) = (31, 8));
        assert_eq!(both, "train.seed was 7, is 8");
        let two = refused(|l| (l.train.seed, l.train.momentum) = (8, 0.5));
        assert_eq!(two, "train.momentum was 0.0, is 0.5; train.seed was 7, is 8");
    }

    #[test]
    fn after_a_finished_run_a_new_one_begins_unless_the_result_is_wanted_again() {
        let (_home, state) = state();
        let mut first = open_run(&state, &plan(|_| ()), false, false).unwrap();
        commit(&mut first, b"last", true);
        let run = first.from.checkpoint.run;
        let again = open_run(&state, &plan(|_| ()), false, true).unwrap();
        assert_eq!(again.from.checkpoint.run, run);
        let other = open_run(&state, &plan(|l| l.train.seed = 8), false, true).unwrap();
        assert_ne!(other.from.checkpoint.run, run);
    }

    #[test]
    fn after_an_aborted_run_a_new_one_begins() {
        let (_home, state) = state();
        let first = open_run(&state, &plan(|_| ()), false, false).unwrap();
        first.dir.mark_aborted("aborted by the operator").unwrap();
        let next = open_run(&state, &plan(|l| l.train.seed = 8), false, true).unwrap();
        assert_ne!(next.from.checkpoint.run, first.from.checkpoint.run);
    }

    #[test]
    fn the_last_three_checkpoints_are_kept_and_a_damaged_one_gives_way() {
        let (_home, state) = state();
        let mut run = open_run(&state, &plan(|_| ()), false, false).unwrap();
        for round in 0..5u8 {
            commit(&mut run, &[round; 1000], false);
        }
        let all = checkpoints(run.dir.path()).unwrap();
        assert_eq!(all.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [2, 3, 4]);
        let newest = &all[2].1;
        let whole = fs::read(newest).unwrap();
        for at in [0, 9, 12, 40, whole.len() / 2, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(newest, damaged).unwrap();
            let opened = open_run(&state, &plan(|_| ()), false, false).unwrap();
            assert_eq!(opened.from.model[0], 3, "a bit flipped at {at}");
            assert_eq!(opened.damaged.len(), 1);
        }
        fs::write(newest, &whole[..whole.len() - 7]).unwrap();
        assert_eq!(open_run(&state, &plan(|_| ()), false, false).unwrap().damaged.len(), 1);
    }

    #[test]
    fn a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew_silently() {
        let (_home, state) = state();
        let mut run = open_run(&state, &plan(|_| ()), false, false).unwrap();
        commit(&mut run, b"model", false);
        fs::write(&checkpoints(run.dir.path()).unwrap()[0].1, b"junk").unwrap();
        assert!(matches!(open_run(&state, &plan(|_| ()), false, false), Err(RunError::Lost(_))));
        assert!(open_run(&state, &plan(|_| ()), true, false).is_ok());
    }

    #[test]
    fn what_was_left_aside_is_no_checkpoint() {
        let (_home, state) = state();
        let mut run = open_run(&state, &plan(|_| ()), false, false).unwrap();
        commit(&mut run, b"model", false);
        fs::write(run.dir.path().join("checkpoint-0000000001.aside"), b"half").unwrap();
        assert_eq!(&open_run(&state, &plan(|_| ()), false, false).unwrap().from.model[..], b"model");
        commit(&mut run, b"next", false);
        assert_eq!(&open_run(&state, &plan(|_| ()), false, false).unwrap().from.model[..], b"next");
    }

    // --- with a journal ---

    fn journaled(state: &StateDir, change: impl FnOnce(&mut LearningPlan)) -> Result<JournaledRun, RunError> {
        open_journaled_run(state, &plan(change), false, false)
    }

    fn survey(opened: &mut JournaledRun) {
        let (store, first) = (&mut opened.loaded.store, model(0, 100));
        store.append(&started(1), Attachment::None).unwrap();
        store.append(&surveyed(&first), Attachment::First { schema: SCHEMA, state: &first }).unwrap();
        store.sync().unwrap();
    }

    fn round(opened: &mut JournaledRun, round: u32) {
        let (store, made) = (&mut opened.loaded.store, model(round, 100));
        let event = committed(round, TaskId(1), b"payload", &made);
        store.append(&event, Attachment::Model(&made)).unwrap();
        store.sync().unwrap();
    }

    fn fact(opened: &mut JournaledRun, event: &Event) {
        opened.loaded.store.append(event, Attachment::None).unwrap();
        opened.loaded.store.sync().unwrap();
    }

    fn finished() -> Event {
        Event::Finished { evaluation: EvaluationSummary::default() }
    }

    #[test]
    fn an_unfinished_run_goes_on_from_its_last_fact() {
        let (_home, state) = state();
        let mut first = journaled(&state, |_| ()).unwrap();
        let run = first.run;
        assert_eq!(journaled(&state, |_| ()).unwrap().run, run, "before the first fact too");
        survey(&mut first);
        round(&mut first, 1);
        fact(&mut first, &started(2));
        let again = journaled(&state, |l| l.train.rounds = 99).unwrap();
        assert_eq!((again.run, again.loaded.state, again.loaded.events.len()), (run, Some(model(1, 100)), 4));
        assert_eq!(read_plan(&again.path).unwrap().train.rounds, 99);
        let anew = open_journaled_run(&state, &plan(|_| ()), true, false).unwrap();
        assert_ne!(anew.run, run);
        assert!(anew.loaded.events.is_empty());
    }

    #[test]
    fn another_plan_is_refused_by_its_key_before_and_after_the_first_fact() {
        let (_home, state) = state();
        let mut first = journaled(&state, |_| ()).unwrap();
        for _ in 0..2 {
            let refused = |change: fn(&mut LearningPlan)| {
                let RunError::AnotherPlan { difference, .. } = journaled(&state, change).unwrap_err() else {
                    panic!("not refused")
                };
                difference
            };
            assert_eq!(refused(|l| l.train.learning_rate = 0.1), "train.learning_rate was 0.05, is 0.1");
            assert_eq!(refused(|l| l.train.rounds = 3), "train.rounds was 30, is 3");
            assert_eq!(refused(|l| l.model = ModelSpec::Linear), "model.kind was \"mlp\", is \"linear\"");
            fact(&mut first, &started(1));
        }
    }

    #[test]
    fn after_a_finished_or_aborted_run_a_new_one_begins_unless_the_result_is_wanted_again() {
        let (_home, state) = state();
        let mut first = journaled(&state, |_| ()).unwrap();
        survey(&mut first);
        round(&mut first, 1);
        fact(&mut first, &finished());
        let again = open_journaled_run(&state, &plan(|_| ()), false, true).unwrap();
        let last = again.finished.unwrap();
        assert_eq!((again.run, last.rounds, last.state), (first.run, 1, model(1, 100)));
        assert_eq!(&*last.schema, SCHEMA);
        let mut other = open_journaled_run(&state, &plan(|l| l.train.seed = 8), false, true).unwrap();
        assert!(other.run != first.run && other.finished.is_some() && other.loaded.events.is_empty());
        fact(&mut other, &Event::Aborted { sentence: "aborted by the operator".into() });
        let next = open_journaled_run(&state, &plan(|_| ()), false, true).unwrap();
        assert!(next.run != other.run && next.finished.is_none());
    }

    #[test]
    fn a_run_that_cannot_be_read_is_not_begun_anew_silently() {
        let (_home, state) = state();
        let mut first = journaled(&state, |_| ()).unwrap();
        survey(&mut first);
        fact(&mut first, &started(2));
        drop(first.loaded);
        let file = first.path.join("journal-000001");
        let whole = fs::read(&file).unwrap();
        let mut damaged = whole.clone();
        damaged[130] ^= 1;
        fs::write(&file, damaged).unwrap();
        let refused = journaled(&state, |_| ()).unwrap_err();
        assert!(matches!(refused, RunError::LostJournal { .. }));
        assert!(refused.to_string().contains("journal-000001: damaged at offset 100"), "{refused}");
        assert!(refused.to_string().ends_with("; or begin anew with --new-run"), "{refused}");
        fs::remove_file(&file).unwrap();
        assert!(matches!(journaled(&state, |_| ()), Err(RunError::LostJournal { .. })));
        assert!(open_journaled_run(&state, &plan(|_| ()), true, false).is_ok());
    }
}
