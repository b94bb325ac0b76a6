//! What survives a restart: which run a start goes on with, and that run's store.
//!
//! A run is its journal ([`journal`]) and the files beside it ([`run`]), on a [`disk`] that a test may replace. Here is
//! decided which run it is: an unfinished one of the same plan goes on, one of another plan is refused with what differs, and
//! after a finished or aborted one a new one begins.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::federation::{Federation, Summary};
use protocol::ids::{Hash, RunId};
use protocol::plan::{BatchSize, LearningPlan, ModelSpec, Plan, Strategy};
use serde_json::json;

pub mod disk;
pub mod journal;
pub mod run;
#[cfg(test)]
pub(crate) mod testing;

pub use disk::{Disk, RealDisk};
pub use run::{Attachment, Loaded, ModelState, RunStore};

use crate::state::{StateDir, StateError, make_private_dir, read_small, sync_parent, write_durably};

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

/// Opens the directory of a run. A test has its own, which fails as it likes.
pub type Disks = Arc<dyn Fn(&Path) -> io::Result<Box<dyn Disk>> + Send + Sync>;

/// The disks that there are.
#[must_use]
pub fn real_disks() -> Disks {
    Arc::new(|path| Ok(Box::new(RealDisk::new(path)?)))
}

/// The run that a start goes on with or begins.
#[derive(Debug)]
pub struct OpenedRun {
    /// Which.
    pub run: RunId,
    /// Its directory.
    pub path: PathBuf,
    /// Where it begins.
    pub loaded: Loaded,
    /// The finished run that was there before, if there was one.
    pub finished: Option<FinishedRun>,
}

/// A run that is over, as far as its model is to be written.
#[derive(Debug)]
pub struct FinishedRun {
    /// Its figures.
    pub summary: Summary,
    /// Its plan.
    pub learning: LearningPlan,
    /// The frozen schema's bytes.
    pub schema: Arc<[u8]>,
    /// The last model.
    pub state: Option<ModelState>,
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
    /// The journal of the unfinished run, or what it cannot do without, is damaged.
    #[error("{}: {what}; or begin anew with --new-run", path.display())]
    LostJournal {
        /// The run's directory.
        path: PathBuf,
        /// What is damaged.
        what: StoreError,
    },
    /// A run's directory cannot be used.
    #[error("{}: {what}", path.display())]
    Store {
        /// The run's directory.
        path: PathBuf,
        /// Why.
        what: StoreError,
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
pub fn open_run(
    state: &StateDir,
    plan: &Plan,
    new_run: bool,
    keep_finished: bool,
    disks: &Disks,
) -> Result<OpenedRun, RunError> {
    let runs = state.file("runs");
    match current_run(&runs)? {
        Some((run, path)) if !new_run => go_on(&runs, run, path, plan, keep_finished, disks),
        _ => begin(&runs, plan, disks),
    }
}

fn go_on(
    runs: &Path,
    run: RunId,
    path: PathBuf,
    plan: &Plan,
    keep_finished: bool,
    disks: &Disks,
) -> Result<OpenedRun, RunError> {
    let before = read_plan(&path)?;
    let difference = difference(&before, &plan.learning);
    let fewer_rounds = before.train.rounds > plan.learning.train.rounds;
    let is_other = difference.as_ref().is_some_and(|(key, _)| key != "train.rounds") || fewer_rounds;
    let sentence = || difference.map_or_else(|| "the arithmetic of the sum".to_owned(), |(_, sentence)| sentence);
    let Some(loaded) = load(run, &path, disks)? else {
        // It was interrupted before its first fact.
        if is_other {
            return Err(RunError::AnotherPlan { path, difference: sentence() });
        }
        write_plan(&path, &plan.learning)?;
        return load_new(run, path, plan, disks);
    };
    let mut machine = Federation::new(plan.clone(), run);
    loaded.events.iter().for_each(|event| machine.apply(event));
    let summary = machine.summary();
    let is_same = !is_other && loaded.store.plan() == plan.hash();
    let same_rounds = before.train.rounds == plan.learning.train.rounds;
    if summary.aborted {
        return begin(runs, plan, disks);
    }
    // A last model that is damaged must be made again first.
    if summary.finished.is_some() && loaded.whole.is_none() {
        let (schema, state) = (loaded.schema.clone(), loaded.state.clone());
        let finished = Some(FinishedRun { summary, learning: before, schema, state });
        if is_same && same_rounds && keep_finished {
            return Ok(OpenedRun { run, path, loaded, finished });
        }
        return Ok(OpenedRun { finished, ..begin(runs, plan, disks)? });
    }
    if !is_same {
        return Err(RunError::AnotherPlan { path, difference: sentence() });
    }
    write_plan(&path, &plan.learning)?;
    Ok(OpenedRun { run, path, loaded, finished: None })
}

fn begin(runs: &Path, plan: &Plan, disks: &Disks) -> Result<OpenedRun, RunError> {
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
    load_new(run, path, plan, disks)
}

fn load_new(run: RunId, path: PathBuf, plan: &Plan, disks: &Disks) -> Result<OpenedRun, RunError> {
    let disk = disks(&path).map_err(StateError::io(&path, "open"))?;
    let loaded = RunStore::open(disk, run, plan.hash(), unix_ms).map_err(unusable(&path))?;
    Ok(OpenedRun { run, path, loaded, finished: None })
}

/// `None` if there is no journal yet.
fn load(run: RunId, path: &Path, disks: &Disks) -> Result<Option<Loaded>, RunError> {
    let disk = disks(path).map_err(StateError::io(path, "open"))?;
    if !run::has_begun(disk.as_ref()).map_err(unusable(path))? {
        return Ok(None);
    }
    RunStore::open_any(disk, run, unix_ms).map(Some).map_err(unusable(path))
}

/// What is damaged can be given up; what is full or not writable cannot be worked around by a new run.
fn unusable(path: &Path) -> impl FnOnce(StoreError) -> RunError {
    let path = path.to_owned();
    move |what| match what {
        StoreError::Io { .. } | StoreError::NotWritable { .. } | StoreError::Full { .. } | StoreError::Newer { .. } => {
            RunError::Store { path, what }
        }
        what => RunError::LostJournal { path, what },
    }
}

/// Milliseconds since 1970; 0 before.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::testing::{SCHEMA, committed, model, started, surveyed};
    use super::*;
    use protocol::evaluation::EvaluationSummary;
    use protocol::federation::Event;
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

    #[test]
    fn a_run_is_for_its_owners_eyes_also_where_others_may_look_into_the_state() {
        use std::os::unix::fs::PermissionsExt as _;
        let (home, state) = state();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let run = open(&state, &plan(|_| ()), false, false).unwrap();
        for path in [state.file("runs"), run.path] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }

    #[test]
    fn another_plan_is_refused_by_the_key_that_differs() {
        let (_home, state) = state();
        open(&state, &plan(|_| ()), false, false).unwrap();
        let refused = |change: fn(&mut LearningPlan)| {
            let RunError::AnotherPlan { difference, .. } = open(&state, &plan(change), false, false).unwrap_err()
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

    fn open(state: &StateDir, plan: &Plan, new_run: bool, keep_finished: bool) -> Result<OpenedRun, RunError> {
        open_run(state, plan, new_run, keep_finished, &real_disks())
    }

    fn journaled(state: &StateDir, change: impl FnOnce(&mut LearningPlan)) -> Result<OpenedRun, RunError> {
        open_run(state, &plan(change), false, false, &real_disks())
    }

    fn survey(opened: &mut OpenedRun) {
        let (store, first) = (&mut opened.loaded.store, model(0, 100));
        store.append(&started(1), Attachment::None).unwrap();
        store.append(&surveyed(&first), Attachment::First { schema: SCHEMA, state: &first }).unwrap();
        store.sync().unwrap();
    }

    fn round(opened: &mut OpenedRun, round: u32) {
        let (store, made) = (&mut opened.loaded.store, model(round, 100));
        let event = committed(round, TaskId(1), b"payload", &made);
        store.append(&event, Attachment::Model(&made)).unwrap();
        store.sync().unwrap();
    }

    fn fact(opened: &mut OpenedRun, event: &Event) {
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
        let anew = open(&state, &plan(|_| ()), true, false).unwrap();
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
        let again = open(&state, &plan(|_| ()), false, true).unwrap();
        let last = again.finished.unwrap();
        assert_eq!((again.run, last.summary.round, last.state), (first.run, 1, Some(model(1, 100))));
        assert_eq!(&*last.schema, SCHEMA);
        let mut other = open(&state, &plan(|l| l.train.seed = 8), false, true).unwrap();
        assert!(other.run != first.run && other.finished.is_some() && other.loaded.events.is_empty());
        fact(&mut other, &Event::Aborted { sentence: "aborted by the operator".into() });
        let next = open(&state, &plan(|_| ()), false, true).unwrap();
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
        assert!(open(&state, &plan(|_| ()), true, false).is_ok());
    }
}
