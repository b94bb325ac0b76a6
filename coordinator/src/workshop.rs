//! The workshop: the one thread that owns tensors, and the store that makes them durable.
//!
//! The event loop hands it [`Job`]s in the order in which the machine decided, and hears [`Done`]s in that order: what
//! a commit announces was sealed before the commit is reported synced. The model exists as raw bytes; it becomes
//! numbers only for a step, so that at most four and a half models are in memory: the bytes, the sum (two models
//! wide), the sealed copy that is streamed, and one more while a step runs.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use learning::{DESCRIPTION_FILE, MergeError, Network, Rows, SavedModel, Schema, Survey, TaskKey, WEIGHTS_FILE, merge};
use protocol::evaluation::EvaluationSummary;
use protocol::federation::{Checkpoint, Event, EventNo, Frozen, Input, SurveyOutcome};
use protocol::ids::{ContentId, Hash, TaskId, WorkerId, WorkerName};
use protocol::layout::{LayoutError, from_bytes, to_bytes};
use protocol::limits::RECORD_BYTES_MAX;
use protocol::messages::{ContentKey, ContentRef};
use protocol::plan::{ModelSpec, Plan};
use protocol::session::{BroadcastSealer, Flag, RecordError};
use protocol::strategy::{ServerState, step};
use protocol::sum::{Sum, SumError, weight_shift};
use tokio::sync::mpsc;

use crate::intake::Payload;
use crate::state::{StateError, make_private_dir, write_durably};
use crate::store::{Snapshot, Store};
use crate::telemetry::{Kind, Telemetry};

/// Something to be done. One at a time, in order.
#[derive(Debug)]
pub enum Job {
    /// Hand a fact to the store.
    Append(Event),
    /// Keep a payload that was verified.
    Keep(TaskId, Payload),
    /// Drop it.
    Forget(TaskId),
    /// Fold it into the sum, with its weight.
    Fold(TaskId, u32),
    /// Merge the surveys, by name.
    Merge(Vec<(TaskId, WorkerId, WorkerName)>),
    /// Take the server step of a round, whose updates are those of these tasks.
    Step(u32, Vec<TaskId>),
    /// Train a round on the rows of these tasks, by name.
    Train(u32, Vec<TaskId>),
    /// Make everything durable, up to this event.
    Sync(EventNo, Box<Checkpoint>),
    /// Write the model for whoever wants to use it.
    Finish(EvaluationSummary),
    /// Remember that the run was given up.
    Abort(String),
}

/// What came of it.
#[derive(Debug)]
pub enum Done {
    /// What was saved can be streamed.
    Ready,
    /// Something that the machine wants to know.
    Learned(Input),
    /// A content may be streamed.
    Sealed(Arc<Content>),
    /// What rows must fit from now on.
    Schema(Arc<Schema>),
    /// Everything up to this event is durable.
    Synced {
        /// The event.
        no: EventNo,
        /// The checkpoint's size.
        bytes: u64,
        /// How long it took.
        took: Duration,
    },
    /// How much waits in memory or on disk.
    Spooled(u64),
    /// The model is in this directory.
    Written(PathBuf),
    /// The abort is remembered, with its reason.
    Aborted(String),
    /// The disk is broken, or we are.
    Broken(WorkshopError),
}

/// Why the workshop cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkshopError {
    /// The disk.
    #[error(transparent)]
    State(#[from] StateError),
    /// A verified payload did not go into the sum.
    #[error("task {0}: a verified update cannot be folded: {1}")]
    Fold(TaskId, SumError),
    /// A payload that should be kept is not.
    #[error("task {0}: its payload is not kept")]
    Missing(TaskId),
    /// What a checkpoint holds does not make a model.
    #[error("the run's schema or model cannot be used: {0}")]
    Unusable(String),
    /// The checkpoint names another model than there is.
    #[error("the checkpoint names model {named:?}, there is {present:?}")]
    OtherModel {
        /// What it names.
        named: Option<Hash>,
        /// What there is.
        present: Option<Hash>,
    },
    /// A content cannot be sealed.
    #[error("a content cannot be sealed: {0}")]
    Seal(#[from] RecordError),
    /// The operating system gave no entropy.
    #[error("cannot draw a content key: {0}")]
    Entropy(#[from] getrandom::Error),
}

/// A content that was sealed once and is streamed to many.
#[derive(Debug)]
pub struct Content {
    /// What a worker is told of it, inside its own session.
    pub reference: ContentRef,
    /// A model or a schema.
    pub kind: Kind,
    /// Its sealed records.
    pub records: Vec<Bytes>,
}

impl Content {
    /// Seals `plaintext` under a fresh key.
    fn seal(kind: Kind, hash: Hash, plaintext: &[u8]) -> Result<Self, WorkshopError> {
        let (mut id, mut key) = (ContentId([0; 16]), ContentKey([0; 32]));
        getrandom::fill(&mut id.0)?;
        getrandom::fill(&mut key.0)?;
        let mut sealer = BroadcastSealer::new(id, &key);
        let count = plaintext.len().div_ceil(RECORD_BYTES_MAX).max(1);
        let mut chunks = plaintext.chunks(RECORD_BYTES_MAX);
        let mut records = Vec::with_capacity(count);
        for place in 1..=count {
            let flag = if place == count { Flag::Final } else { Flag::Plain };
            let mut record = Vec::new();
            sealer.seal(flag, chunks.next().unwrap_or_default(), &mut record)?;
            records.push(record.into());
        }
        let reference = ContentRef { id, key, hash, bytes: plaintext.len() as u64 };
        Ok(Self { reference, kind, records })
    }
}

/// What the survey made.
#[derive(Debug)]
struct Frame {
    schema: Arc<Schema>,
    network: Network,
}

/// The thread's state.
pub struct Workshop {
    plan: Plan,
    store: Box<dyn Store>,
    run_dir: PathBuf,
    model_dir: PathBuf,
    telemetry: Telemetry,
    done: mpsc::UnboundedSender<Done>,

    frame: Option<Frame>,
    schema: Arc<[u8]>,
    /// The newest model, raw, and its hash. In `central` mode it may be ahead of the newest commit.
    model: Arc<[u8]>,
    model_hash: Option<Hash>,
    server: Option<ServerState>,
    sum: Option<Sum>,
    payloads: BTreeMap<TaskId, Payload>,
    /// In `central` mode: the union of the shared rows, once it was needed.
    rows: Option<Rows>,
}

impl std::fmt::Debug for Workshop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workshop").field("model", &self.model_hash).finish_non_exhaustive()
    }
}

/// Where the workshop keeps things.
#[derive(Clone, Debug)]
pub struct Places {
    /// The run's directory.
    pub run: PathBuf,
    /// Where the finished model goes.
    pub model: PathBuf,
}

/// How the event loop speaks to the workshop.
#[derive(Debug)]
pub struct WorkshopHandle {
    /// Jobs. Unbounded in type only: the machine asks for one fold a held task, one step a round.
    pub jobs: mpsc::UnboundedSender<Job>,
    /// What came of them.
    pub done: mpsc::UnboundedReceiver<Done>,
}

impl Workshop {
    /// Goes on from `from`.
    ///
    /// # Errors
    /// If what it holds makes no model.
    pub fn new(
        plan: Plan,
        store: Box<dyn Store>,
        places: Places,
        from: &Snapshot,
        telemetry: Telemetry,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Done>), WorkshopError> {
        let (done, results) = mpsc::unbounded_channel();
        let mut workshop = Self {
            plan,
            store,
            run_dir: places.run,
            model_dir: places.model,
            telemetry,
            done,
            frame: None,
            schema: from.schema.clone(),
            model: from.model.clone(),
            model_hash: from.checkpoint.model,
            server: None,
            sum: None,
            payloads: BTreeMap::new(),
            rows: None,
        };
        if from.checkpoint.frozen.is_some() {
            workshop.restore(&from.server)?;
        }
        Ok((workshop, results))
    }

    /// The frozen schema, if there is one yet.
    #[must_use]
    pub fn schema(&self) -> Option<Arc<Schema>> {
        self.frame.as_ref().map(|frame| frame.schema.clone())
    }

    /// Moves the workshop to a thread of its own. It ends when the last job's sender is dropped.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub fn spawn(mut self, done: mpsc::UnboundedReceiver<Done>) -> io::Result<WorkshopHandle> {
        let (jobs, mut queue) = mpsc::unbounded_channel();
        std::thread::Builder::new().name("workshop".to_owned()).spawn(move || {
            self.seal_all().unwrap_or_else(|error| self.say(Done::Broken(error)));
            self.say(Done::Ready);
            while let Some(job) = queue.blocking_recv() {
                if let Err(error) = self.work(job) {
                    self.say(Done::Broken(error));
                }
            }
        })?;
        Ok(WorkshopHandle { jobs, done })
    }

    fn restore(&mut self, server: &[u8]) -> Result<(), WorkshopError> {
        let unusable = |error: &dyn std::fmt::Display| WorkshopError::Unusable(error.to_string());
        let schema = Schema::from_bytes(&self.schema).map_err(|error| unusable(&error))?;
        let frame = Frame::new(&self.plan, schema).map_err(|error| unusable(&error))?;
        let present = frame.network.layout().model_hash(&self.model);
        if self.model.len() as u64 != frame.network.layout().bytes() || Some(present) != self.model_hash {
            return Err(WorkshopError::OtherModel { named: self.model_hash, present: Some(present) });
        }
        let server = ServerState::from_bytes(&self.plan.learning, frame.parameters(), server);
        self.server = Some(server.map_err(|error| unusable(&error))?);
        self.frame = Some(frame);
        Ok(())
    }

    /// The event loop may be gone, and then nobody wants to know.
    fn say(&self, done: Done) {
        let _ = self.done.send(done);
    }

    fn work(&mut self, job: Job) -> Result<(), WorkshopError> {
        match job {
            Job::Append(event) => self.store.append(&event)?,
            Job::Keep(task, payload) => {
                self.payloads.insert(task, payload);
                self.say_spooled();
            }
            Job::Forget(task) => {
                if let Some(payload) = self.payloads.remove(&task) {
                    self.discard(&payload);
                    self.say_spooled();
                }
            }
            Job::Fold(task, weight) => self.fold(task, weight)?,
            Job::Merge(surveys) => self.merge(surveys)?,
            Job::Step(round, tasks) => self.step(round, &tasks)?,
            Job::Train(round, rows) => self.train(round, rows)?,
            Job::Sync(no, checkpoint) => self.sync(no, *checkpoint)?,
            Job::Finish(evaluation) => self.finish(evaluation)?,
            Job::Abort(sentence) => {
                write_durably(&self.run_dir.join("aborted"), format!("{sentence}\n").as_bytes())?;
                self.say(Done::Aborted(sentence));
            }
        }
        Ok(())
    }

    fn open(&self, part: &str) -> io::Result<fs::File> {
        fs::File::open(self.run_dir.join(part))
    }

    /// Of what was used nothing stays; nor would it be used again if it could not be removed.
    fn discard(&self, payload: &Payload) {
        if let Some(part) = payload.part() {
            let _ = fs::remove_file(self.run_dir.join(part));
        }
    }

    fn say_spooled(&self) {
        self.say(Done::Spooled(self.payloads.values().map(Payload::bytes).sum()));
    }

    // --- the survey ---

    fn merge(&mut self, surveys: Vec<(TaskId, WorkerId, WorkerName)>) -> Result<(), WorkshopError> {
        let mut by_name = BTreeMap::new();
        let mut ids = BTreeMap::new();
        for (task, worker, name) in surveys {
            let payload = self.payloads.remove(&task).ok_or(WorkshopError::Missing(task))?;
            let survey = Survey::from_bytes(&payload.to_vec(|part| self.open(part))?);
            // It was read once already, when it came.
            let survey = survey.map_err(|error| WorkshopError::Unusable(error.to_string()))?;
            self.discard(&payload);
            ids.insert(name.to_string(), worker);
            by_name.insert(name.to_string(), survey);
        }
        self.say_spooled();
        let outcome = match merge(&by_name, &self.plan.learning.data) {
            Ok(frozen) => self.freeze(frozen, &by_name)?,
            Err(error) => outcome_of(&error, &ids),
        };
        self.say(Done::Learned(Input::Surveyed(outcome)));
        Ok(())
    }

    fn freeze(
        &mut self,
        frozen: learning::Frozen,
        surveys: &BTreeMap<String, Survey>,
    ) -> Result<SurveyOutcome, WorkshopError> {
        for dropped in &frozen.dropped {
            tracing::info!("{dropped}");
        }
        let frame = match Frame::new(&self.plan, frozen.schema) {
            Ok(frame) => frame,
            Err(error) => return Ok(SurveyOutcome::Impossible(error.to_string())),
        };
        let examples = surveys.values().map(Survey::training_rows).max().unwrap_or(0);
        self.schema = frame.schema.to_bytes().into();
        let layout = frame.network.layout();
        let figures = Frozen {
            schema: Hash::of(&self.schema),
            schema_bytes: self.schema.len() as u64,
            layout: layout.fingerprint(),
            parameters: layout.parameters(),
            weight_shift: weight_shift(examples, self.plan.ring.weight_max),
        };
        let weights = frame.network.initial(self.plan.learning.train.seed);
        self.server = Some(ServerState::new(&self.plan.learning, frame.parameters()));
        self.frame = Some(frame);
        let model = self.take_model(weights)?;
        self.seal_all()?;
        Ok(SurveyOutcome::Frozen { frozen: figures, model })
    }

    /// Makes `weights` the newest model. Each form of it goes before the next one but one is made: a step has room for
    /// two beside the sum.
    fn take_model(&mut self, weights: Vec<f32>) -> Result<Hash, WorkshopError> {
        self.model = Arc::from([]);
        let raw = to_bytes(&weights);
        drop(weights);
        let hash = self.frame()?.network.layout().model_hash(&raw);
        (self.model, self.model_hash) = (raw.into(), Some(hash));
        Ok(hash)
    }

    fn frame(&self) -> Result<&Frame, WorkshopError> {
        self.frame.as_ref().ok_or_else(|| WorkshopError::Unusable("there is no schema yet".to_owned()))
    }

    // --- contents ---

    fn seal_all(&mut self) -> Result<(), WorkshopError> {
        if self.frame.is_some() {
            self.say(Done::Schema(self.frame()?.schema.clone()));
            self.seal(Kind::Schema, Hash::of(&self.schema), self.schema.clone())?;
            self.seal_model()?;
        }
        Ok(())
    }

    fn seal_model(&self) -> Result<(), WorkshopError> {
        match self.model_hash {
            Some(hash) => self.seal(Kind::Model, hash, self.model.clone()),
            None => Ok(()),
        }
    }

    fn seal(&self, kind: Kind, hash: Hash, plaintext: Arc<[u8]>) -> Result<(), WorkshopError> {
        let began = Instant::now();
        let content = Content::seal(kind, hash, &plaintext)?;
        self.telemetry.metrics.seal_seconds.record(began.elapsed().as_secs_f64());
        self.say(Done::Sealed(Arc::new(content)));
        Ok(())
    }

    // --- rounds ---

    fn fold(&mut self, task: TaskId, weight: u32) -> Result<(), WorkshopError> {
        let payload = self.payloads.remove(&task).ok_or(WorkshopError::Missing(task))?;
        let verified = *payload.verified().ok_or(WorkshopError::Missing(task))?;
        let parameters = self.frame()?.parameters();
        let ring = self.plan.ring;
        let sum = self.sum.get_or_insert_with(|| Sum::new(ring, parameters));
        let broken = |error| WorkshopError::Fold(task, error);
        let run = &self.run_dir;
        let mut fold = sum.begin(task, weight, &verified).map_err(broken)?;
        payload.read(|part| fs::File::open(run.join(part)), |chunk| fold.add(chunk))?;
        fold.finish().map_err(broken)?;
        self.discard(&payload);
        self.say_spooled();
        self.say(Done::Learned(Input::Folded { task }));
        Ok(())
    }

    fn step(&mut self, round: u32, tasks: &[TaskId]) -> Result<(), WorkshopError> {
        let mut weights = self.weights()?;
        let (Some(sum), Some(server)) = (&mut self.sum, &mut self.server) else {
            return Err(WorkshopError::Unusable("there is nothing to step with".to_owned()));
        };
        let folded: Vec<TaskId> = sum.tasks().iter().copied().collect();
        assert_eq!(folded, tasks, "the sum holds the updates of the round and no other");
        let mean = sum.mean().map_err(|error| WorkshopError::Unusable(error.to_string()))?;
        let stepped = step(&self.plan.learning, server, &mut weights, mean);
        sum.clear();
        let input = match stepped {
            Ok(()) => Input::Stepped { round, model: self.take_model(weights)?, train_loss: None },
            Err(error) => Input::StepFailed { round, sentence: error.to_string() },
        };
        self.say(Done::Learned(input));
        self.seal_model()
    }

    fn weights(&self) -> Result<Vec<f32>, WorkshopError> {
        from_bytes(&self.model).ok_or_else(|| WorkshopError::Unusable("the model is cut".to_owned()))
    }

    fn train(&mut self, round: u32, tasks: Vec<TaskId>) -> Result<(), WorkshopError> {
        self.collect(tasks)?;
        let start = self.weights()?;
        let (frame, rows) = (self.frame()?, self.rows.as_ref());
        let rows = rows.ok_or_else(|| WorkshopError::Unusable("there are no rows".to_owned()))?;
        let key = TaskKey { round: round.into(), name: "" };
        let trained =
            frame.network.train(&start, rows, &self.plan.learning.train, key, &mut |_| ControlFlow::Continue(()));
        let input = match trained {
            Ok(trained) => {
                Input::Stepped { round, model: self.take_model(trained.weights)?, train_loss: Some(trained.loss) }
            }
            Err(error) => Input::StepFailed { round, sentence: error.to_string() },
        };
        // Sealed first: with nobody left to evaluate, the commit follows at once.
        self.seal_model()?;
        self.say(Done::Learned(input));
        Ok(())
    }

    /// Brings the shared rows into memory, in the order given, the first time that they are needed.
    fn collect(&mut self, tasks: Vec<TaskId>) -> Result<(), WorkshopError> {
        if self.rows.is_some() {
            return Ok(());
        }
        let schema = self.frame()?.schema.clone();
        let mut rows = Rows::new(&schema);
        for task in tasks {
            let payload = self.payloads.remove(&task).ok_or(WorkshopError::Missing(task))?;
            append_rows(&mut rows, &payload, &schema, |part| self.open(part))?;
        }
        self.rows = Some(rows);
        self.say_spooled();
        Ok(())
    }

    // --- what survives ---

    fn sync(&mut self, no: EventNo, checkpoint: Checkpoint) -> Result<(), WorkshopError> {
        if checkpoint.model != self.model_hash {
            return Err(WorkshopError::OtherModel { named: checkpoint.model, present: self.model_hash });
        }
        let began = Instant::now();
        let server = self.server.as_ref().map(ServerState::to_bytes).unwrap_or_default();
        let snapshot = Snapshot { checkpoint, schema: self.schema.clone(), model: self.model.clone(), server };
        let bytes = self.store.sync(&snapshot)?;
        self.say(Done::Synced { no, bytes, took: began.elapsed() });
        Ok(())
    }

    fn finish(&mut self, evaluation: EvaluationSummary) -> Result<(), WorkshopError> {
        let schema = (*self.frame()?.schema).clone();
        write_model(&self.model_dir, &self.plan.learning.model, schema, evaluation, self.weights()?)?;
        self.say(Done::Written(self.model_dir.clone()));
        Ok(())
    }
}

impl Frame {
    fn new(plan: &Plan, schema: Schema) -> Result<Self, LayoutError> {
        let network = Network::new(&plan.learning.model, &schema)?;
        Ok(Self { schema: Arc::new(schema), network })
    }

    fn parameters(&self) -> usize {
        // A model that fits in memory has fewer parameters than there are addresses.
        usize::try_from(self.network.layout().parameters()).unwrap_or(usize::MAX)
    }
}

/// Adds a payload's rows; its pieces end anywhere.
fn append_rows(
    rows: &mut Rows,
    payload: &Payload,
    schema: &Schema,
    open: impl FnOnce(&str) -> io::Result<fs::File>,
) -> Result<(), WorkshopError> {
    let row_bytes = rows.row_bytes();
    let mut pending = Vec::new();
    let mut refused = None;
    payload.read(open, |piece| {
        pending.extend_from_slice(piece);
        let whole = pending.len() - pending.len() % row_bytes;
        if refused.is_none() {
            refused = rows.append(&pending[..whole], schema).err();
        }
        pending.drain(..whole);
    })?;
    // They were looked at when they came.
    refused.map_or(Ok(()), |error| Err(WorkshopError::Unusable(error.to_string())))
}

/// Who is told what when surveys make no schema.
fn outcome_of(error: &MergeError, ids: &BTreeMap<String, WorkerId>) -> SurveyOutcome {
    let sentence = error.to_string();
    let unfit = |names: Vec<(&String, String)>| {
        let told = names.into_iter().filter_map(|(name, sentence)| Some((*ids.get(name)?, sentence)));
        SurveyOutcome::Unfit(told.collect())
    };
    match error {
        MergeError::Labels(_) => SurveyOutcome::Disagreed(sentence),
        MergeError::Lacking(pairs) => {
            let mut lacking: BTreeMap<&String, Vec<String>> = BTreeMap::new();
            for (name, column) in pairs {
                lacking.entry(name).or_default().push(format!("{column:?}"));
            }
            let told = |columns: Vec<String>| {
                let (noun, it) = if columns.len() == 1 { ("column", "it") } else { ("columns", "them") };
                format!(
                    "the data lack {noun} {}, which most of the fleet have; add {it}, or drop {it} for all with data.drop",
                    columns.join(", ")
                )
            };
            unfit(lacking.into_iter().map(|(name, columns)| (name, told(columns))).collect())
        }
        MergeError::TextLabel { worker } | MergeError::NotClasses { worker } => unfit(vec![(worker, sentence)]),
        MergeError::NoSurvey
        | MergeError::OneClass { .. }
        | MergeError::TooManyClasses { .. }
        | MergeError::TooLarge { .. }
        | MergeError::NoColumns
        | MergeError::TooLong { .. } => SurveyOutcome::Impossible(sentence),
    }
}

/// Writes a model for whoever wants to use it: the weights first, then the description that names their hash.
///
/// # Errors
/// If it cannot be written.
pub fn write_model(
    directory: &Path,
    spec: &ModelSpec,
    schema: Schema,
    evaluation: EvaluationSummary,
    weights: Vec<f32>,
) -> Result<(), WorkshopError> {
    make_private_dir(directory)?;
    let model = SavedModel::new(spec.clone(), schema, evaluation, weights)
        .map_err(|error| WorkshopError::Unusable(error.to_string()))?;
    write_durably(&directory.join(WEIGHTS_FILE), &model.weights_file())?;
    Ok(write_durably(&directory.join(DESCRIPTION_FILE), &model.description_file())?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    use learning::{Dataset, MIN_COUNT, Table};
    use protocol::federation::CommittedRound;
    use protocol::ids::RunId;
    use protocol::plan::{LearningPlan, RoundsSpec};
    use protocol::sum::Verifier;

    use crate::store::Memory;

    fn plan() -> Plan {
        Plan::new(LearningPlan::default(), RoundsSpec::default()).unwrap()
    }

    /// A survey of 40 rows whose label is whether `x` is above `centre`.
    fn survey(home: &Path, name: &str, label: &str, centre: i32) -> Vec<u8> {
        let path = home.join(format!("{name}.csv"));
        let rows: String = (0..40).map(|x| format!("{x},{}\n", i32::from(x > centre))).collect();
        fs::write(&path, format!("x,{label}\n{rows}")).unwrap();
        let table = Table::read(&path).unwrap();
        let data = plan().learning.data;
        Dataset::new(table, &data, None, 7, name).unwrap().survey(MIN_COUNT).unwrap().to_bytes()
    }

    struct Bench {
        home: tempfile::TempDir,
        workshop: Workshop,
        done: mpsc::UnboundedReceiver<Done>,
    }

    fn bench(from: &Snapshot) -> Bench {
        let home = tempfile::tempdir().unwrap();
        let places = Places { run: home.path().to_owned(), model: home.path().join("model") };
        let store = Box::new(Memory::default());
        let (workshop, done) = Workshop::new(plan(), store, places, from, Telemetry::new()).unwrap();
        Bench { home, workshop, done }
    }

    fn unbegun() -> Snapshot {
        let checkpoint = Checkpoint::new(RunId([1; 16]), plan().hash());
        Snapshot { checkpoint, schema: Arc::from([]), model: Arc::from([]), server: Vec::new() }
    }

    impl Bench {
        fn work(&mut self, job: Job) -> Vec<Done> {
            self.workshop.work(job).unwrap();
            std::iter::from_fn(|| self.done.try_recv().ok()).collect()
        }

        fn merge(&mut self, surveys: &[(&str, Vec<u8>)]) -> (SurveyOutcome, Vec<Done>) {
            let mut named = Vec::new();
            for (at, (name, bytes)) in (0u8..).zip(surveys) {
                let task = TaskId(at.into());
                self.work(Job::Keep(task, Payload::in_memory(bytes.clone(), None)));
                named.push((task, WorkerId([at; 16]), name.parse().unwrap()));
            }
            let mut done = self.work(Job::Merge(named));
            let Some(Done::Learned(Input::Surveyed(outcome))) = done.pop() else { panic!("no outcome") };
            (outcome, done)
        }

        fn freeze(&mut self) -> (Frozen, Hash) {
            let home = self.home.path().to_owned();
            let surveys = [("a", survey(&home, "a", "y", 10)), ("b", survey(&home, "b", "y", 20))];
            let (SurveyOutcome::Frozen { frozen, model }, _) = self.merge(&surveys) else { panic!("not frozen") };
            (frozen, model)
        }

        fn fold(&mut self, task: u64, value: f32, weight: u32) {
            let numbers = vec![value; self.workshop.frame().unwrap().parameters()];
            let bytes = to_bytes(&numbers);
            let mut verifier = Verifier::new(plan().ring, bytes.len() as u64, Hash::of(&bytes));
            verifier.update(&bytes).unwrap();
            let payload = Payload::in_memory(bytes, Some(verifier.finish().unwrap()));
            self.work(Job::Keep(TaskId(task), payload));
            let done = self.work(Job::Fold(TaskId(task), weight));
            assert!(matches!(done.last(), Some(Done::Learned(Input::Folded { task: t })) if t.0 == task), "{done:?}");
        }

        fn step(&mut self, tasks: &[u64]) -> Hash {
            let done = self.work(Job::Step(1, tasks.iter().copied().map(TaskId).collect()));
            let Some(Done::Learned(Input::Stepped { model, .. })) = done.first() else { panic!("{done:?}") };
            assert!(matches!(&done[1], Done::Sealed(content) if content.reference.hash == *model));
            *model
        }
    }

    #[test]
    fn a_survey_becomes_a_schema_a_model_and_two_sealed_contents() {
        let mut bench = bench(&unbegun());
        let home = bench.home.path().to_owned();
        let surveys = [("a", survey(&home, "a", "y", 10)), ("b", survey(&home, "b", "y", 20))];
        let (outcome, done) = bench.merge(&surveys);
        let SurveyOutcome::Frozen { frozen, model } = outcome else { panic!("{outcome:?}") };
        let sealed: Vec<(Kind, Hash)> = done
            .iter()
            .filter_map(|done| match done {
                Done::Sealed(content) => Some((content.kind, content.reference.hash)),
                _ => None,
            })
            .collect();
        assert_eq!(sealed, [(Kind::Schema, frozen.schema), (Kind::Model, model)]);
        assert_eq!(frozen.parameters * 4, bench.workshop.model.len() as u64);
    }

    #[test]
    fn workers_that_contradict_each_other_are_named() {
        let mut bench = bench(&unbegun());
        let home = bench.home.path().to_owned();
        let surveys = [("a", survey(&home, "a", "y", 10)), ("b", survey(&home, "b", "target", 10))];
        let (SurveyOutcome::Disagreed(sentence), _) = bench.merge(&surveys) else { panic!("they agree") };
        assert!(sentence.contains("\"y\" at a") && sentence.contains("\"target\" at b"), "{sentence}");
    }

    #[test]
    fn a_fleet_of_one_class_cannot_learn() {
        let mut bench = bench(&unbegun());
        let surveys = [("a", survey(bench.home.path(), "a", "y", 99))];
        assert!(matches!(bench.merge(&surveys).0, SurveyOutcome::Impossible(_)));
    }

    #[test]
    fn the_order_of_folds_does_not_change_the_model_and_the_next_round_starts_empty() {
        let updates = [(1, 0.5, 3), (2, -0.25, 5), (3, 1e-3, 7)];
        let model = |order: [usize; 3]| {
            let mut bench = bench(&unbegun());
            bench.freeze();
            for at in order {
                let (task, value, weight) = updates[at];
                bench.fold(task, value, weight);
            }
            let first = bench.step(&[1, 2, 3]);
            bench.fold(4, 0.125, 1);
            (first, bench.step(&[4]))
        };
        assert_eq!(model([0, 1, 2]), model([2, 0, 1]));
    }

    #[test]
    fn a_snapshot_is_where_the_next_start_goes_on() {
        let mut before = bench(&unbegun());
        let (frozen, _) = before.freeze();
        before.fold(1, 0.5, 3);
        let model = before.step(&[1]);
        let rounds = vec![CommittedRound { model, entries: Vec::new() }];
        let checkpoint = Checkpoint {
            frozen: Some(frozen),
            model: Some(model),
            rounds,
            ..Checkpoint::new(RunId([1; 16]), plan().hash())
        };
        let done = before.work(Job::Sync(EventNo(9), Box::new(checkpoint)));
        assert!(matches!(done[..], [Done::Synced { no: EventNo(9), .. }]), "{done:?}");
        let (Some(snapshot), _) = before.workshop.store.load().unwrap() else { panic!("nothing was kept") };

        let mut after = bench(&snapshot);
        before.fold(2, 0.25, 1);
        after.fold(2, 0.25, 1);
        assert_eq!(before.step(&[2]), after.step(&[2]));

        let mut damaged = snapshot;
        damaged.model = vec![0; damaged.model.len()].into();
        let places = Places { run: after.home.path().to_owned(), model: after.home.path().to_owned() };
        let refused = Workshop::new(plan(), Box::new(Memory::default()), places, &damaged, Telemetry::new());
        assert!(matches!(refused, Err(WorkshopError::OtherModel { .. })));
    }

    #[test]
    fn a_finished_model_can_be_used_by_whoever_reads_the_directory() {
        let mut bench = bench(&unbegun());
        let (_, model) = bench.freeze();
        let done = bench.work(Job::Finish(EvaluationSummary::default()));
        let [Done::Written(path)] = &done[..] else { panic!("{done:?}") };
        assert_eq!(SavedModel::read(path).unwrap().hash(), model);
    }
}
