//! The workshop: the one thread that owns tensors, and the store that makes them durable.
//!
//! The event loop hands it [`Job`]s in the order in which the machine decided, and hears [`Done`]s in that order: what
//! a commit announces was sealed before the commit is reported synced. The model exists as raw bytes, and a step changes
//! them where they stand: so at most four models are in memory, the bytes, the sum (two models wide) and the sealed copy
//! that is streamed. With what is large a [`crew`] helps it: each has cells, parameters and records that nobody else has.
//!
//! To wake a thread and to be woken by it takes longer than all that a small round asks for. So a [`Job`] that is over in
//! some microseconds and cannot wait for a device is done by whoever gives it ([`WorkshopHandle::give`]), if nothing is
//! before it; the order stays the same.
//!
//! A full disk holds up this thread and nothing else: a [`Job`] that found no room comes back from [`Workshop::work`],
//! and is done again until there is some.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use learning::{DESCRIPTION_FILE, MergeError, Network, Rows, SavedModel, Schema, Survey, TaskKey, WEIGHTS_FILE, merge};
use protocol::evaluation::EvaluationSummary;
use protocol::federation::{Event, EventNo, Frozen, Input, SurveyOutcome};
use protocol::ids::{ContentId, Hash, TaskId, WorkerId, WorkerName};
use protocol::layout::{LayoutError, from_bytes, to_bytes};
use protocol::messages::{ContentKey, ContentRef};
use protocol::plan::{ModelSpec, Plan};
use protocol::session::RecordError;
use protocol::session::broadcast::{ContentPart, cut_content};
use protocol::strategy::{ServerState, StepPart, step_in_parts};
use protocol::sum::{Sum, SumError, Verified, Verifier, weight_shift};
use tokio::sync::mpsc;

use crate::crew;
use crate::folding;
use crate::intake::Payload;
use crate::state::{StateError, make_private_dir, write_durably};
use crate::store::{Attachment, ModelState, RunStore, StoreError};
use crate::telemetry::{Kind, Telemetry};

/// How long a job waits for room on a full disk before it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// How much of a held payload is in memory while it is verified again.
const PIECE_BYTES: usize = 256 * 1024;

/// Up to so many bytes of a model or payload are worked on by whoever gives the job: some tens of microseconds.
const QUICK_BYTES_MAX: u64 = 64 << 10;

/// Something to be done. One at a time, in order.
#[derive(Debug)]
pub enum Job {
    /// Hand a fact to the store, with what belongs to it.
    Append(Event),
    /// Keep a payload that was verified.
    Keep(TaskId, Hash, Payload),
    /// Drop it.
    Forget(TaskId, Hash),
    /// Fold it into the sum, with its weight.
    Fold(TaskId, Hash, u32),
    /// Merge the surveys, by name.
    Merge(Vec<(TaskId, Hash, WorkerId, WorkerName)>),
    /// Take the server step of a round, whose updates are those of these tasks.
    Step(u32, Vec<TaskId>),
    /// Train a round on the rows of these tasks, by name.
    Train(u32, Vec<TaskId>),
    /// Make everything durable, up to this event.
    Sync(EventNo),
    /// Write the model for whoever wants to use it.
    Finish(EvaluationSummary),
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
        /// How much was made durable.
        bytes: u64,
        /// How long it took.
        took: Duration,
    },
    /// How much the run takes on the disk.
    OnDisk(u64),
    /// How much waits in memory or on disk.
    Spooled(u64),
    /// The model is in this directory.
    Written(PathBuf),
    /// The disk is full: jobs wait.
    DiskFull,
    /// There is room again.
    DiskBack,
    /// The disk is broken, or we are.
    Broken(WorkshopError),
}

/// Why the workshop cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkshopError {
    /// The disk.
    #[error(transparent)]
    State(#[from] StateError),
    /// The run's store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A verified payload did not go into the sum.
    #[error("task {0}: a verified update cannot be folded: {1}")]
    Fold(TaskId, SumError),
    /// A payload that should be kept is not.
    #[error("task {0}: its payload is not kept")]
    Missing(TaskId),
    /// What a checkpoint holds does not make a model.
    #[error("the run's schema or model cannot be used: {0}")]
    Unusable(String),
    /// A commit names another model than there is.
    #[error("the journal names model {named:?}, there is {present:?}")]
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
    /// Seals `plaintext` under a fresh key, asks `hash` for its hash and does what is to be done `beside` meanwhile.
    fn seal(
        telemetry: &Telemetry,
        kind: Kind,
        hash: impl Fn(&[u8]) -> Hash + Sync,
        plaintext: &[u8],
        beside: impl FnOnce() -> Result<(), StoreError> + Send,
    ) -> Result<Self, WorkshopError> {
        let (mut id, mut key) = (ContentId([0; 16]), ContentKey([0; 32]));
        getrandom::fill(&mut id.0)?;
        getrandom::fill(&mut key.0)?;
        let bytes = plaintext.len() as u64;
        let parts = cut_content(id, &key, plaintext, crew::parts(bytes))?;
        let (mut of_all, mut sealed) = (Hash([0; 32]), vec![Vec::new(); parts.len()]);
        let took = AtomicU64::new(0);
        let sealing = parts.into_iter().zip(&mut sealed).map(|(part, records)| Share::Seal(part, records));
        let mut shares = vec![Share::Beside(beside), Share::Hash(&mut of_all)];
        shares.extend(sealing);
        crew::share(bytes, shares.into_iter(), |share| -> Result<(), WorkshopError> {
            match share {
                Share::Beside(beside) => beside()?,
                Share::Hash(place) => *place = hash(plaintext),
                Share::Seal(part, place) => {
                    let began = Instant::now();
                    *place = part.seal()?;
                    took.fetch_add(u64::try_from(began.elapsed().as_nanos()).unwrap_or(0), Ordering::Relaxed);
                }
            }
            Ok(())
        })?;
        telemetry.metrics.seal_seconds.record(Duration::from_nanos(took.into_inner()).as_secs_f64());
        let reference = ContentRef { id, key, hash: of_all, bytes };
        Ok(Self { reference, kind, records: sealed.into_iter().flatten().map(Bytes::from).collect() })
    }
}

/// What there is to be done for a content.
enum Share<'a, B> {
    Beside(B),
    Hash(&'a mut Hash),
    Seal(ContentPart<'a>, &'a mut Vec<Vec<u8>>),
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
    store: RunStore,
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
    payloads: BTreeMap<TaskId, Kept>,
    /// In `central` mode: the union of the shared rows, once it was needed.
    rows: Option<Rows>,
}

impl std::fmt::Debug for Workshop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workshop").field("model", &self.model_hash).finish_non_exhaustive()
    }
}

/// How the event loop speaks to the workshop.
#[derive(Debug)]
pub struct WorkshopHandle {
    /// Jobs for its thread. Unbounded in type only: the machine asks for one fold a held task, one step a round.
    jobs: Sender<Errand>,
    queue: Arc<Queue>,
}

/// What the thread and whoever gives it jobs share.
#[derive(Debug)]
struct Queue {
    /// Held by the thread while it works.
    workshop: Mutex<Workshop>,
    /// Jobs that the thread was given and has not done.
    given: AtomicUsize,
    /// Something was collected by who gave it, and is not written.
    collected: AtomicBool,
}

/// What the thread is asked for.
#[derive(Debug)]
enum Errand {
    Do(Job),
    /// Write what is collected.
    Write,
}

impl WorkshopHandle {
    /// Has a job done, after all that were given before. [`Done`] says what came of it.
    pub fn give(&self, job: Job) {
        let Some(job) = self.do_here(job) else { return };
        self.queue.given.fetch_add(1, Ordering::Relaxed);
        // The workshop says so itself if it is broken; if its thread is gone, the loop is ending.
        let _ = self.jobs.send(Errand::Do(job));
    }

    /// Does a quick job that nothing is before; else it comes back.
    fn do_here(&self, job: Job) -> Option<Job> {
        if self.queue.given.load(Ordering::Acquire) > 0 {
            return Some(job);
        }
        let Ok(mut workshop) = self.queue.workshop.try_lock() else { return Some(job) };
        if !workshop.is_quick(&job) {
            return Some(job);
        }
        let again = workshop.work(job).unwrap_or_else(|error| {
            workshop.say(Done::Broken(error));
            None
        });
        self.queue.collected.store(workshop.store.is_waiting(), Ordering::Relaxed);
        again
    }

    /// Whether something was collected and waits to be written. Whoever gives the jobs sees to it that it does not wait long.
    #[must_use]
    pub fn has_collected(&self) -> bool {
        self.queue.collected.load(Ordering::Relaxed)
    }

    /// Has what is collected written.
    pub fn write(&self) {
        self.queue.collected.store(false, Ordering::Relaxed);
        // As in `give`.
        let _ = self.jobs.send(Errand::Write);
    }
}

impl Workshop {
    /// Goes on from `schema` and `state`, as the store has them; `model_dir` is where the finished model goes.
    ///
    /// # Errors
    /// If they make no model.
    pub fn new(
        plan: Plan,
        store: RunStore,
        model_dir: PathBuf,
        schema: Arc<[u8]>,
        state: Option<ModelState>,
        telemetry: Telemetry,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Done>), WorkshopError> {
        let (done, results) = mpsc::unbounded_channel();
        let mut workshop = Self {
            plan,
            store,
            model_dir,
            telemetry,
            done,
            frame: None,
            schema,
            model: Arc::from([]),
            model_hash: None,
            server: None,
            sum: None,
            payloads: BTreeMap::new(),
            rows: None,
        };
        if let Some(state) = state {
            workshop.restore(state)?;
        }
        Ok((workshop, results))
    }

    /// The frozen schema, if there is one yet.
    #[must_use]
    pub fn schema(&self) -> Option<Arc<Schema>> {
        self.frame.as_ref().map(|frame| frame.schema.clone())
    }

    /// The newest model, if there is one yet.
    #[must_use]
    pub fn model(&self) -> Option<Hash> {
        self.model_hash
    }

    /// Gives the workshop a thread of its own. It ends when the handle is dropped, and all is done.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub fn spawn(self) -> io::Result<WorkshopHandle> {
        let (jobs, errands) = channel();
        // The first thing to be done is to begin.
        let (workshop, given, collected) = (Mutex::new(self), AtomicUsize::new(1), AtomicBool::new(false));
        let queue = Arc::new(Queue { workshop, given, collected });
        let theirs = Arc::clone(&queue);
        thread::Builder::new().name("workshop".to_owned()).spawn(move || theirs.serve(&errands))?;
        Ok(WorkshopHandle { jobs, queue })
    }

    /// Seals what was saved, so that it can be streamed.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn begin(&mut self) -> Result<(), WorkshopError> {
        self.seal_all()?;
        self.say(Done::Ready);
        Ok(())
    }

    /// Whether a job is over in some microseconds, and neither syncs nor reads nor writes a file.
    fn is_quick(&self, job: &Job) -> bool {
        let is_small = self.model.len() as u64 <= QUICK_BYTES_MAX;
        match job {
            Job::Append(event) => is_small && self.store.is_quick(event),
            Job::Keep(_, _, payload) => payload.part().is_none(),
            Job::Fold(task, ..) => is_small && matches!(self.payloads.get(task), Some(Kept::Here(_))),
            Job::Step(..) => is_small,
            Job::Sync(_) => is_small && self.store.syncs_at_once(),
            Job::Forget(..) => true,
            Job::Merge(_) | Job::Train(..) | Job::Finish(_) => false,
        }
    }

    /// Does a job, however long there is no room for it. Once the loop has ended nobody waits for room any more, and
    /// nothing that comes after this job may be done: nobody was told of either.
    fn persist(&mut self, job: Job) -> ControlFlow<()> {
        let mut next = Some(job);
        let mut told = false;
        while let Some(job) = next.take() {
            match self.work(job) {
                Ok(again) => next = again,
                Err(error) => self.say(Done::Broken(error)),
            }
            if next.is_some() {
                if self.done.is_closed() {
                    return ControlFlow::Break(());
                }
                if !std::mem::replace(&mut told, true) {
                    self.say(Done::DiskFull);
                }
                thread::sleep(RETRY_AFTER);
            }
        }
        if told {
            self.say(Done::DiskBack);
        }
        ControlFlow::Continue(())
    }

    fn restore(&mut self, state: ModelState) -> Result<(), WorkshopError> {
        let unusable = |error: &dyn std::fmt::Display| WorkshopError::Unusable(error.to_string());
        let schema = Schema::from_bytes(&self.schema).map_err(|error| unusable(&error))?;
        let frame = Frame::new(&self.plan, schema).map_err(|error| unusable(&error))?;
        let (got, expected) = (state.model.len() as u64, frame.network.layout().bytes());
        if got != expected {
            return Err(unusable(&format!("the model has {got} bytes, expected {expected}")));
        }
        self.model_hash = Some(frame.network.layout().model_hash(&state.model));
        self.model = state.model;
        let server = ServerState::from_bytes(&self.plan.learning, frame.parameters(), &state.server);
        self.server = Some(server.map_err(|error| unusable(&error))?);
        self.frame = Some(frame);
        Ok(())
    }

    /// The event loop may be gone, and then nobody wants to know.
    fn say(&self, done: Done) {
        let _ = self.done.send(done);
    }

    /// Does a job. It comes back if the disk is full: nothing is lost, and it is to be done again, before any other.
    ///
    /// # Errors
    /// If the disk is broken, or we are.
    pub fn work(&mut self, job: Job) -> Result<Option<Job>, WorkshopError> {
        let stored = match job {
            Job::Append(event) => self.append(&event).map_err(|error| (error, Job::Append(event))),
            Job::Keep(task, hash, payload) => match self.take_over(task, hash, &payload) {
                Ok(()) => {
                    self.keep(task, payload);
                    Ok(())
                }
                Err(error) => Err((error, Job::Keep(task, hash, payload))),
            },
            Job::Sync(no) => self.sync(no).map_err(|error| (error, Job::Sync(no))),
            Job::Finish(evaluation) => self.finish(evaluation).map_err(|error| (error, Job::Finish(evaluation))),
            Job::Forget(task, _) => {
                self.forget(task);
                Ok(())
            }
            Job::Fold(task, hash, weight) => return self.fold(task, hash, weight).map(|()| None),
            Job::Merge(surveys) => return self.merge(surveys).map(|()| None),
            Job::Step(round, tasks) => return self.step(round, &tasks).map(|()| None),
            Job::Train(round, rows) => return self.train(round, rows).map(|()| None),
        };
        match stored {
            Ok(()) => Ok(None),
            Err((error, job)) if error.is_full() => Ok(Some(job)),
            Err((error, _)) => Err(error),
        }
    }

    /// Writes what was collected.
    ///
    /// # Errors
    /// If the disk is broken. One that is full is no error: it is written with the next job, or the one after.
    pub fn flush(&mut self) -> Result<(), WorkshopError> {
        match self.store.flush() {
            Err(error) if !error.is_full() => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn write(&mut self) {
        self.flush().unwrap_or_else(|error| self.say(Done::Broken(error)));
    }

    // --- payloads ---

    /// Gives a payload that is in a file of the run's directory to the store.
    fn take_over(&mut self, task: TaskId, hash: Hash, payload: &Payload) -> Result<(), WorkshopError> {
        Ok(payload.part().map_or(Ok(()), |part| self.store.keep(task, hash, part))?)
    }

    fn keep(&mut self, task: TaskId, payload: Payload) {
        let kept = match payload.part() {
            None => Kept::Here(payload),
            Some(_) => Kept::Stored { verified: payload.verified().copied(), bytes: payload.bytes() },
        };
        self.payloads.insert(task, kept);
        self.say_spooled();
    }

    fn forget(&mut self, task: TaskId) {
        if self.payloads.remove(&task).is_some() {
            self.say_spooled();
        }
    }

    fn say_spooled(&self) {
        self.say(Done::Spooled(self.payloads.values().map(Kept::bytes).sum()));
    }

    /// A held update, to be read from its beginning, and what lets it into the sum; none if it is not what was held. One
    /// that an earlier process took in is verified again.
    fn update(&mut self, task: TaskId, hash: Hash) -> Result<Option<(Verified, Source)>, WorkshopError> {
        match self.payloads.remove(&task) {
            Some(Kept::Here(payload)) => {
                let verified = *payload.verified().ok_or(WorkshopError::Missing(task))?;
                Ok(Some((verified, Source::Here(payload))))
            }
            Some(Kept::Stored { verified: Some(verified), .. }) => {
                Ok(self.store.payload(task, hash)?.map(|stored| (verified, Source::Stored(stored))))
            }
            Some(Kept::Stored { verified: None, .. }) => Err(WorkshopError::Missing(task)),
            None => {
                let Some(verified) = self.verify_again(task, hash)? else { return Ok(None) };
                Ok(self.store.payload(task, hash)?.map(|stored| (verified, Source::Stored(stored))))
            }
        }
    }

    fn verify_again(&self, task: TaskId, hash: Hash) -> Result<Option<Verified>, WorkshopError> {
        let Some(stored) = self.store.payload(task, hash)? else { return Ok(None) };
        let bytes = self.frame()?.network.layout().bytes();
        let mut verifier = Verifier::new(self.plan.ring, bytes, hash);
        let mut sound = true;
        let read = Source::Stored(stored).read(|chunk| sound = sound && verifier.update(chunk).is_ok());
        if let Err(error) = read {
            tracing::warn!("the held payload of task {task} cannot be read back: {error}");
            return Ok(None);
        }
        Ok(if sound { verifier.finish().ok() } else { None })
    }

    /// A held survey; none if it is not what was held.
    fn survey(&self, task: TaskId, hash: Hash) -> Result<Option<Survey>, WorkshopError> {
        let mut bytes = Vec::new();
        match self.payloads.get(&task) {
            Some(Kept::Here(payload)) => payload.read(not_here, |chunk| bytes.extend_from_slice(chunk))?,
            _ => match self.store.payload(task, hash)? {
                Some(stored) => Source::Stored(stored).read(|chunk| bytes.extend_from_slice(chunk))?,
                None => return Ok(None),
            },
        }
        // It was read once already, when it came.
        let survey = || Survey::from_bytes(&bytes).map_err(|error| WorkshopError::Unusable(error.to_string()));
        (Hash::of(&bytes) == hash).then(survey).transpose()
    }

    // --- the survey ---

    fn merge(&mut self, surveys: Vec<(TaskId, Hash, WorkerId, WorkerName)>) -> Result<(), WorkshopError> {
        let mut by_name = BTreeMap::new();
        let mut ids = BTreeMap::new();
        let tasks: Vec<TaskId> = surveys.iter().map(|(task, ..)| *task).collect();
        for (task, hash, worker, name) in surveys {
            let Some(survey) = self.survey(task, hash)? else {
                self.say(Done::Learned(Input::Lost { task, hash }));
                return Ok(());
            };
            ids.insert(name.to_string(), worker);
            by_name.insert(name.to_string(), survey);
        }
        tasks.iter().for_each(|task| drop(self.payloads.remove(task)));
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
    fn take_model(&mut self, weights: impl AsRef<[f32]>) -> Result<Hash, WorkshopError> {
        self.model = Arc::from([]);
        let raw = to_bytes(weights.as_ref());
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
            let schema = self.seal(Kind::Schema, Hash::of, &self.schema)?;
            self.say(Done::Sealed(Arc::new(schema)));
            self.seal_model()?;
        }
        Ok(())
    }

    fn seal_model(&self) -> Result<(), WorkshopError> {
        if let Some(hash) = self.model_hash {
            let model = self.seal(Kind::Model, |_| hash, &self.model)?;
            self.say(Done::Sealed(Arc::new(model)));
        }
        Ok(())
    }

    fn seal(
        &self,
        kind: Kind,
        hash: impl Fn(&[u8]) -> Hash + Sync,
        plaintext: &[u8],
    ) -> Result<Content, WorkshopError> {
        Content::seal(&self.telemetry, kind, hash, plaintext, || Ok(()))
    }

    // --- rounds ---

    fn fold(&mut self, task: TaskId, hash: Hash, weight: u32) -> Result<(), WorkshopError> {
        let Some((verified, source)) = self.update(task, hash)? else {
            self.say(Done::Learned(Input::Lost { task, hash }));
            return Ok(());
        };
        let parameters = self.frame()?.parameters();
        let ring = self.plan.ring;
        let sum = self.sum.get_or_insert_with(|| Sum::new(ring, parameters));
        let broken = |error| WorkshopError::Fold(task, error);
        let mut fold = sum.begin(task, weight, &verified).map_err(broken)?;
        match source {
            Source::Here(payload) => payload.read(not_here, |chunk| fold.add(chunk))?,
            Source::Stored(first) => {
                folding::cut(&mut fold, verified.bytes());
                let mut readers = vec![first];
                for part in fold.parts().iter().skip(1) {
                    let missing = WorkshopError::Missing(task);
                    readers.push(self.store.payload_from(task, hash, part.bytes().start)?.ok_or(missing)?);
                }
                folding::fold(&mut fold, readers, folding::add_from).map_err(not_read_back)?;
            }
        }
        fold.finish().map_err(broken)?;
        self.say_spooled();
        self.say(Done::Learned(Input::Folded { task }));
        Ok(())
    }

    fn step(&mut self, round: u32, tasks: &[TaskId]) -> Result<(), WorkshopError> {
        let (Some(frame), Some(sum), Some(server)) = (&self.frame, &mut self.sum, &mut self.server) else {
            return Err(WorkshopError::Unusable("there is nothing to step with".to_owned()));
        };
        let folded: Vec<TaskId> = sum.tasks().iter().copied().collect();
        assert_eq!(folded, tasks, "the sum holds the updates of the round and no other");
        let mean_max = sum.mean_max();
        let bytes = self.model.len() as u64;
        let means = sum.drain(crew::parts(bytes));
        let means = means.map_err(|error| WorkshopError::Unusable(error.to_string()))?;
        // Nobody else has it by now: the store has written it, and what is streamed is the sealed copy.
        let (model, _) = Arc::make_mut(&mut self.model).as_chunks_mut();
        let stepped = step_in_parts(&self.plan.learning, server, model, means, mean_max).and_then(|parts| {
            crew::share(bytes, parts.iter(), StepPart::check)?;
            crew::share(bytes, parts.into_iter(), |part| {
                part.take();
                Ok(())
            })
        });
        if let Err(error) = stepped {
            sum.clear();
            self.say(Done::Learned(Input::StepFailed { round, sentence: error.to_string() }));
            return self.seal_model();
        }
        sum.drained();
        let state = ModelState { model: self.model.clone(), server: server.to_bytes() };
        let (layout, store) = (frame.network.layout(), &mut self.store);
        let hash_of = |model: &[u8]| layout.model_hash(model);
        let sealed = Content::seal(&self.telemetry, Kind::Model, hash_of, &state.model, || store.prepare(&state))?;
        let hash = sealed.reference.hash;
        self.store.name_prepared(hash);
        self.model_hash = Some(hash);
        self.say(Done::Learned(Input::Stepped { round, model: hash, train_loss: None }));
        self.say(Done::Sealed(Arc::new(sealed)));
        Ok(())
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
            let Some(Kept::Here(payload)) = self.payloads.remove(&task) else {
                return Err(WorkshopError::Missing(task));
            };
            append_rows(&mut rows, &payload, &schema)?;
        }
        self.rows = Some(rows);
        self.say_spooled();
        Ok(())
    }

    // --- what survives ---

    fn append(&mut self, event: &Event) -> Result<(), WorkshopError> {
        let state = if event.makes_model() { Some(self.state(event)?) } else { None };
        let attachment = match (event, &state) {
            (Event::Surveyed { .. }, Some(state)) => Attachment::First { schema: &self.schema, state },
            (_, Some(state)) => Attachment::Model(state),
            (Event::Held { task, .. }, None) => {
                let attached = self.payloads.get(task).and_then(Kept::attachment);
                attached.map_or(Attachment::None, Attachment::Payload)
            }
            _ => Attachment::None,
        };
        Ok(self.store.append(event, attachment)?)
    }

    /// What a commit stands for.
    fn state(&self, event: &Event) -> Result<ModelState, WorkshopError> {
        let named = match event {
            Event::Surveyed { model, .. } => Some(*model),
            Event::Committed { figures, .. } => Some(figures.model),
            // The machine has compared it with the one that it was.
            _ => self.model_hash,
        };
        if named != self.model_hash {
            return Err(WorkshopError::OtherModel { named, present: self.model_hash });
        }
        let server = self.server.as_ref().map(ServerState::to_bytes).unwrap_or_default();
        Ok(ModelState { model: self.model.clone(), server })
    }

    fn sync(&mut self, no: EventNo) -> Result<(), WorkshopError> {
        let began = Instant::now();
        let bytes = self.store.sync()?;
        self.say(Done::Synced { no, bytes, took: began.elapsed() });
        self.store.clean()?;
        self.say(Done::OnDisk(self.store.bytes_on_disk()));
        Ok(())
    }

    fn finish(&mut self, evaluation: EvaluationSummary) -> Result<(), WorkshopError> {
        let schema = (*self.frame()?.schema).clone();
        write_model(&self.model_dir, &self.plan.learning.model, schema, evaluation, self.weights()?)?;
        self.say(Done::Written(self.model_dir.clone()));
        Ok(())
    }
}

impl Queue {
    fn begin(&self) {
        if let Ok(mut workshop) = self.workshop.lock() {
            workshop.begin().unwrap_or_else(|error| workshop.say(Done::Broken(error)));
        }
        self.given.fetch_sub(1, Ordering::Release);
    }

    /// Does what is asked for until nobody can ask any more.
    fn serve(&self, errands: &Receiver<Errand>) {
        self.begin();
        loop {
            let next = errands.recv();
            // Whoever held it while it panicked ended the process.
            let Ok(mut workshop) = self.workshop.lock() else { return };
            match next {
                Ok(Errand::Write) => workshop.write(),
                Ok(Errand::Do(job)) => {
                    if workshop.persist(job).is_break() {
                        return;
                    }
                    // More may be given by now, which is written with it.
                    if self.given.fetch_sub(1, Ordering::Release) == 1 {
                        workshop.write();
                        self.collected.store(false, Ordering::Relaxed);
                    }
                }
                Err(_) => return workshop.write(),
            }
        }
    }
}

/// A payload that is waited with.
#[derive(Debug)]
enum Kept {
    /// It is in memory, or in a file that only this process can read.
    Here(Payload),
    /// The store has it.
    Stored { verified: Option<Verified>, bytes: u64 },
}

impl Kept {
    fn bytes(&self) -> u64 {
        match self {
            Self::Here(payload) => payload.bytes(),
            Self::Stored { bytes, .. } => *bytes,
        }
    }

    /// What goes into the journal with the record that says that it is held.
    fn attachment(&self) -> Option<&[u8]> {
        match self {
            Self::Here(payload) => payload.memory(),
            Self::Stored { .. } => None,
        }
    }
}

/// What is in a file of the run's directory is read through the store.
fn not_here(part: &str) -> io::Result<File> {
    Err(io::Error::new(io::ErrorKind::NotFound, format!("{part} is the store's")))
}

fn not_read_back(error: io::Error) -> StateError {
    StateError::io(Path::new("a held payload"), "read back")(error)
}

/// Where a payload is read from.
enum Source {
    Here(Payload),
    Stored(Box<dyn Read + Send>),
}

impl Source {
    /// Hands all of it to `see`, in order, in pieces.
    fn read(self, mut see: impl FnMut(&[u8])) -> Result<(), StateError> {
        let mut stored = match self {
            Self::Here(payload) => return payload.read(not_here, see),
            Self::Stored(stored) => stored,
        };
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            match stored.read(&mut buffer).map_err(not_read_back)? {
                0 => return Ok(()),
                read => see(&buffer[..read]),
            }
        }
    }
}

impl WorkshopError {
    /// Whether all that it takes is room on the disk.
    fn is_full(&self) -> bool {
        match self {
            Self::Store(error) => error.is_full(),
            Self::State(error) => matches!(error, StateError::Full { .. }),
            _ => false,
        }
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
fn append_rows(rows: &mut Rows, payload: &Payload, schema: &Schema) -> Result<(), WorkshopError> {
    let row_bytes = rows.row_bytes();
    let mut pending = Vec::new();
    let mut refused = None;
    payload.read(not_here, |piece| {
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
    use std::fs;

    use learning::{Dataset, MIN_COUNT, Table};
    use protocol::federation::{HeldUpdate, RoundFigures};
    use protocol::ids::RunId;
    use protocol::messages::Metrics;
    use protocol::plan::{LearningPlan, RoundsSpec};

    use crate::store::{Loaded, RealDisk};

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

    fn load(home: &Path) -> Loaded {
        let path = home.join("run");
        fs::create_dir_all(&path).unwrap();
        RunStore::open(Box::new(RealDisk::new(&path).unwrap()), RunId([1; 16]), plan().hash(), || 0).unwrap()
    }

    fn bench_in(home: tempfile::TempDir) -> Bench {
        let Loaded { store, schema, state, .. } = load(home.path());
        let model_dir = home.path().join("model");
        let (workshop, done) = Workshop::new(plan(), store, model_dir, schema, state, Telemetry::new()).unwrap();
        Bench { home, workshop, done }
    }

    fn bench() -> Bench {
        bench_in(tempfile::tempdir().unwrap())
    }

    impl Bench {
        fn work(&mut self, job: Job) -> Vec<Done> {
            assert!(self.workshop.work(job).unwrap().is_none(), "there is room");
            std::iter::from_fn(|| self.done.try_recv().ok()).collect()
        }

        fn merge(&mut self, surveys: &[(&str, Vec<u8>)]) -> (SurveyOutcome, Vec<Done>) {
            let mut named = Vec::new();
            for (at, (name, bytes)) in (0u8..).zip(surveys) {
                let task = TaskId(at.into());
                self.work(Job::Keep(task, Hash::of(bytes), Payload::in_memory(bytes.clone(), None)));
                named.push((task, Hash::of(bytes), WorkerId([at; 16]), name.parse().unwrap()));
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

        /// Keeps an update of one value, and says that it is held.
        fn hold(&mut self, task: u64, value: f32, weight: u32) -> Hash {
            let numbers = vec![value; self.workshop.frame().unwrap().parameters()];
            let bytes = to_bytes(&numbers);
            let (task, hash, length) = (TaskId(task), Hash::of(&bytes), bytes.len() as u64);
            let mut verifier = Verifier::new(plan().ring, length, hash);
            verifier.update(&bytes).unwrap();
            let payload = Payload::in_memory(bytes, Some(verifier.finish().unwrap()));
            self.work(Job::Keep(task, hash, payload));
            let metrics = Metrics::default();
            let update = HeldUpdate { hash, bytes: length, examples: 1, weight, norm: 1.0, metrics };
            self.work(Job::Append(Event::Held { task, update: Box::new(update) }));
            hash
        }

        fn fold(&mut self, task: u64, value: f32, weight: u32) {
            let hash = self.hold(task, value, weight);
            self.fold_held(task, hash, weight);
        }

        fn fold_held(&mut self, task: u64, hash: Hash, weight: u32) {
            let done = self.work(Job::Fold(TaskId(task), hash, weight));
            assert!(matches!(done.last(), Some(Done::Learned(Input::Folded { task: t })) if t.0 == task), "{done:?}");
        }

        fn commit(&mut self, event: Event) {
            self.work(Job::Append(event));
            let done = self.work(Job::Sync(EventNo(9)));
            assert!(matches!(done[..], [Done::Synced { no: EventNo(9), .. }, Done::OnDisk(_)]), "{done:?}");
        }

        /// The process dies, and another begins.
        fn restart(self) -> Self {
            bench_in(self.home)
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
        let mut bench = bench();
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
        let mut bench = bench();
        let home = bench.home.path().to_owned();
        let surveys = [("a", survey(&home, "a", "y", 10)), ("b", survey(&home, "b", "target", 10))];
        let (SurveyOutcome::Disagreed(sentence), _) = bench.merge(&surveys) else { panic!("they agree") };
        assert!(sentence.contains("\"y\" at a") && sentence.contains("\"target\" at b"), "{sentence}");
    }

    #[test]
    fn a_fleet_of_one_class_cannot_learn() {
        let mut bench = bench();
        let surveys = [("a", survey(bench.home.path(), "a", "y", 99))];
        assert!(matches!(bench.merge(&surveys).0, SurveyOutcome::Impossible(_)));
    }

    #[test]
    fn the_order_of_folds_does_not_change_the_model_and_the_next_round_starts_empty() {
        let updates = [(1, 0.5, 3), (2, -0.25, 5), (3, 1e-3, 7)];
        let model = |order: [usize; 3]| {
            let mut bench = bench();
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
    fn a_quick_job_is_done_where_it_is_given_and_after_what_was_given_before_it() {
        let mut bench = bench();
        bench.freeze();
        let (first, second) = (bench.hold(1, 0.5, 3), bench.hold(2, 0.25, 3));
        let Bench { home: _home, workshop, mut done } = bench;
        let handle = workshop.spawn().unwrap();
        while !matches!(done.blocking_recv().unwrap(), Done::Ready) {}
        while handle.queue.given.load(Ordering::Acquire) > 0 {
            thread::yield_now();
        }
        let is_folded =
            |done: &Done, task| matches!(done, Done::Learned(Input::Folded { task: t }) if *t == TaskId(task));
        handle.give(Job::Fold(TaskId(1), first, 3));
        assert!(std::iter::from_fn(|| done.try_recv().ok()).any(|done| is_folded(&done, 1)), "it is done by now");
        // Writing the model takes the disk, and what is given meanwhile waits for it.
        handle.give(Job::Finish(EvaluationSummary::default()));
        handle.give(Job::Fold(TaskId(2), second, 3));
        let mut written = false;
        while let Some(told) = done.blocking_recv() {
            written |= matches!(told, Done::Written(_));
            if is_folded(&told, 2) {
                break;
            }
        }
        assert!(written, "what was given first is done first");
    }

    #[test]
    fn the_next_start_goes_on_from_the_last_commit_with_what_was_held() {
        let mut before = bench();
        let (frozen, first) = before.freeze();
        before.commit(Event::Surveyed { frozen, model: first });
        before.fold(1, 0.5, 3);
        let model = before.step(&[1]);
        let figures = RoundFigures {
            round: 1,
            workers: 1,
            examples: 1,
            train_loss: None,
            evaluation: EvaluationSummary::default(),
            seconds: 0.0,
            model,
        };
        before.commit(Event::Committed { entries: Vec::new(), figures: Box::new(figures) });
        let hash = before.hold(2, 0.25, 1);
        before.workshop.flush().unwrap();

        let mut after = before.restart();
        assert_eq!(after.workshop.model(), Some(model));
        after.fold_held(2, hash, 1);
        let mut undisturbed = bench();
        undisturbed.freeze();
        undisturbed.fold(1, 0.5, 3);
        undisturbed.step(&[1]);
        undisturbed.fold(2, 0.25, 1);
        assert_eq!(after.step(&[2]), undisturbed.step(&[2]));
    }

    #[test]
    fn what_was_held_and_is_not_there_any_more_or_is_something_else_is_lost_and_not_folded() {
        let mut bench = bench();
        let (frozen, model) = bench.freeze();
        bench.commit(Event::Surveyed { frozen, model });
        let hash = bench.hold(1, 0.5, 3);
        let mut after = bench.restart();
        for (task, hash) in [(TaskId(1), Hash([9; 32])), (TaskId(7), hash)] {
            let done = after.work(Job::Fold(task, hash, 3));
            let [Done::Learned(Input::Lost { task: lost, hash: named })] = done[..] else { panic!("{done:?}") };
            assert_eq!((lost, named), (task, hash));
        }
    }

    #[test]
    fn a_commit_of_another_model_than_there_is_is_not_written() {
        let mut bench = bench();
        let (frozen, _) = bench.freeze();
        let refused = bench.workshop.work(Job::Append(Event::Surveyed { frozen, model: Hash([9; 32]) }));
        assert!(matches!(refused, Err(WorkshopError::OtherModel { .. })));
    }

    #[test]
    fn a_finished_model_can_be_used_by_whoever_reads_the_directory() {
        let mut bench = bench();
        let (_, model) = bench.freeze();
        let done = bench.work(Job::Finish(EvaluationSummary::default()));
        let [Done::Written(path)] = &done[..] else { panic!("{done:?}") };
        assert_eq!(SavedModel::read(path).unwrap().hash(), model);
    }
}
