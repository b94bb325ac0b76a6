//! The thread that computes: it owns the data, and does one thing after another.
//!
//! It reads the plan against the data file, surveys, encodes, evaluates and trains. It never waits for the network, and
//! the loop never waits for it: orders go in by a channel, and what comes of them is told through a function. A job that
//! is no longer wanted is cancelled by a flag that training looks at between steps; its steps are counted beside it, for
//! the beats.
//!
//! Waking a thread and being woken by it costs more than the smallest tasks do. So a task is done at once, where it is
//! ordered, if the thread has nothing to do and the task before it was of its kind and took less than [`BRIEF`].

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use learning::{DataError, Dataset, Network, Note, RawNumbers, Schema, Shard, Stopped, Table, TaskKey, norm, numbers};
use protocol::evaluation::Evaluation;
use protocol::ids::{Hash, TaskId};
use protocol::limits::ROWS_BYTES_MAX;
use protocol::member::Made;
use protocol::messages::{Assigned, Failure, Leave, Metrics, TaskKind, Welcome};
use protocol::pages::Numbers;
use protocol::plan::{LearningPlan, Mode};

use crate::contents::Needs;
use crate::error::sentence;
use crate::options::Options;

/// A task is done where it is ordered if the last of its kind took less: some wake-ups of a thread, and far less than a beat.
const BRIEF: Duration = Duration::from_micros(300);

/// One order of work: whether it is still wanted, and how far it is.
#[derive(Debug, Default)]
pub(crate) struct Job {
    cancelled: AtomicBool,
    steps: AtomicU64,
}

impl Job {
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Training steps made so far.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    fn set_steps(&self, steps: u64) {
        self.steps.store(steps, Ordering::Relaxed);
    }
}

/// How many rows there are to learn from, and to evaluate on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowCounts {
    pub(crate) training: usize,
    pub(crate) held_out: usize,
}

/// What comes of orders.
#[derive(Debug)]
pub(crate) enum FromTrainer {
    /// Something that the data's owner should know.
    Noted(String),
    /// What about the data does not fit, in full, for their owner alone. What the coordinator is told follows.
    Misfit(String),
    /// The plan was read.
    Considered(Result<RowCounts, Leave>),
    /// A task is done.
    Made { task: TaskId, made: Box<Made>, payload: Bytes },
    /// It gave nothing to offer.
    Failed { task: TaskId, failure: Failure },
    /// The data do not fit what the fleet agreed on.
    Unfit { sentence: String },
    /// The thread is gone without having been told to go.
    Died,
}

/// A task to be done.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) assigned: Box<Assigned>,
    pub(crate) needs: Needs,
    pub(crate) bounds: Bounds,
    pub(crate) job: Arc<Job>,
}

/// What an update must keep to, as the session's `Welcome` says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bounds {
    pub(crate) weight_max: u32,
    pub(crate) norm_max: f64,
}

enum Errand {
    Consider(Box<Welcome>),
    Work(Order),
}

/// A handle to the thread. When it is dropped, the thread ends after what it is doing.
#[derive(Debug)]
pub(crate) struct Trainer {
    errands: mpsc::Sender<Errand>,
    /// Errands that the thread was given and has not done.
    given: Arc<AtomicUsize>,
    /// Held by the thread while it does one.
    desk: Arc<Mutex<Desk>>,
    last: Option<Arc<Job>>,
}

impl Trainer {
    /// Starts the thread, with the data file already read.
    pub(crate) fn start(
        options: Options,
        table: Table,
        say: impl Fn(FromTrainer) + Send + 'static,
    ) -> io::Result<Self> {
        let (errands, queue) = mpsc::channel();
        let desk = Desk {
            path: options.data,
            own_label: options.label,
            min_count: options.min_count,
            threads: options.threads,
            share_rows: options.share_rows,
            table: Some(table),
            read: None,
            encoded: None,
            told: Vec::new(),
            brief: None,
        };
        let (desk, given) = (Arc::new(Mutex::new(desk)), Arc::new(AtomicUsize::new(0)));
        let (theirs, done) = (Arc::clone(&desk), Arc::clone(&given));
        let train = move || {
            let _last_words = LastWords(&say);
            while let Ok(errand) = queue.recv() {
                // Whoever else held it while it panicked ended the process.
                let Ok(mut desk) = theirs.lock() else { return };
                desk.run(errand, &say);
                done.fetch_sub(1, Ordering::Release);
            }
        };
        thread::Builder::new().name("training".to_owned()).spawn(train)?;
        Ok(Self { errands, given, desk, last: None })
    }

    /// Reads the plan against the data.
    pub(crate) fn consider(&self, welcome: Box<Welcome>) {
        self.give(Errand::Consider(welcome));
    }

    /// Has a task done. What came of it, if it was done at once.
    pub(crate) fn work(&mut self, order: Order) -> Vec<FromTrainer> {
        self.last = Some(Arc::clone(&order.job));
        if self.given.load(Ordering::Acquire) == 0
            && let Ok(mut desk) = self.desk.try_lock()
            && desk.brief == Some(order.assigned.kind)
        {
            let told = RefCell::new(Vec::new());
            desk.work(&order, &|report| told.borrow_mut().push(report));
            return told.into_inner();
        }
        self.give(Errand::Work(order));
        Vec::new()
    }

    fn give(&self, errand: Errand) {
        self.given.fetch_add(1, Ordering::Relaxed);
        // A thread that is gone has said so.
        let _ = self.errands.send(errand);
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        if let Some(job) = &self.last {
            job.cancel();
        }
    }
}

/// What the thread works with.
struct Desk {
    path: PathBuf,
    own_label: Option<String>,
    min_count: u64,
    threads: usize,
    share_rows: bool,
    /// The file as it was read first; another plan reads it anew.
    table: Option<Table>,
    read: Option<Read>,
    /// The rows as the schema of this hash encodes them.
    encoded: Option<Encoded>,
    /// Notes are told once.
    told: Vec<Note>,
    /// What the last task was, if it was brief. Another of its kind, of the same plan, has the same work to do.
    brief: Option<TaskKind>,
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The rows as a schema encodes them, and the model that the plan has for them.
struct Encoded {
    hash: Hash,
    schema: Schema,
    shard: Shard,
    network: Network,
}

/// The data as the last plan wants them.
struct Read {
    welcome: Box<Welcome>,
    data: Dataset,
}

/// Says that the thread died, unless it was told to end.
struct LastWords<'a>(&'a dyn Fn(FromTrainer));

impl Drop for LastWords<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            (self.0)(FromTrainer::Died);
        }
    }
}

/// How a task went, when it did not go well.
enum Undone {
    Cancelled,
    Failed(Failure),
    Unfit(String),
    Data(DataError),
}

impl From<DataError> for Undone {
    fn from(error: DataError) -> Self {
        Self::Data(error)
    }
}

impl Desk {
    fn run(&mut self, errand: Errand, say: &dyn Fn(FromTrainer)) {
        match errand {
            Errand::Consider(welcome) => {
                let verdict = self.consider(welcome, say);
                self.tell_notes(say);
                say(FromTrainer::Considered(verdict));
            }
            Errand::Work(order) => self.work(&order, say),
        }
    }

    // --- the plan ---

    fn consider(&mut self, welcome: Box<Welcome>, say: &dyn Fn(FromTrainer)) -> Result<RowCounts, Leave> {
        self.brief = None;
        if welcome.learning.train.mode == Mode::Central && !self.share_rows {
            return Err(Leave::NotAllowed(
                "the run is of mode \"central\", which sends encoded training rows to the coordinator, and their owner \
                 did not allow it; start with --share-rows to allow it, or ask for a run of mode \"federated\""
                    .to_owned(),
            ));
        }
        let data = match self.read.take() {
            Some(Read { welcome: last, data }) if same_reading(&last, &welcome) => data,
            earlier => {
                // Before the file is read anew: two readings of it need not fit in memory.
                drop((earlier, self.encoded.take()));
                self.open_data(&welcome).map_err(|error| Leave::DataUnfit(tell_owner(error, say)))?
            }
        };
        let counts = RowCounts { training: data.training_rows(), held_out: data.held_out_rows() };
        self.read = Some(Read { welcome, data });
        Ok(counts)
    }

    fn open_data(&mut self, welcome: &Welcome) -> Result<Dataset, DataError> {
        let table = match self.table.take() {
            Some(table) => table,
            None => Table::read(&self.path)?,
        };
        let LearningPlan { data, train, .. } = &welcome.learning;
        Dataset::new(table, data, self.own_label.as_deref(), train.seed, welcome.name.as_str())
    }

    fn tell_notes(&mut self, say: &dyn Fn(FromTrainer)) {
        let Some(read) = &self.read else { return };
        for note in read.data.notes() {
            if !self.told.contains(note) {
                self.told.push(note.clone());
                say(FromTrainer::Noted(note.to_string()));
            }
        }
    }

    // --- a task ---

    fn work(&mut self, order: &Order, say: &dyn Fn(FromTrainer)) {
        let began = Instant::now();
        let Assigned { task, kind, .. } = *order.assigned;
        let done = if order.job.is_cancelled() { Err(Undone::Cancelled) } else { self.work_of(order) };
        self.tell_notes(say);
        let took = began.elapsed();
        self.brief = (done.is_ok() && took < BRIEF).then_some(kind);
        match done {
            Ok((mut made, payload)) => {
                made.metrics.seconds = took.as_secs_f64();
                say(FromTrainer::Made { task, made: Box::new(made), payload });
            }
            Err(Undone::Cancelled) => {}
            Err(Undone::Failed(failure)) => say(FromTrainer::Failed { task, failure }),
            Err(Undone::Unfit(sentence)) => say(FromTrainer::Unfit { sentence }),
            Err(Undone::Data(error)) => say(FromTrainer::Unfit { sentence: tell_owner(error, say) }),
        }
    }

    fn work_of(&mut self, order: &Order) -> Result<(Made, Bytes), Undone> {
        match order.assigned.kind {
            TaskKind::Survey => self.survey(),
            TaskKind::Rows => self.rows(&order.needs),
            TaskKind::Update | TaskKind::Gradient | TaskKind::Evaluation => self.train(order),
            TaskKind::Partial => {
                Err(Undone::Unfit("the coordinator asks for partial sums, which a worker does not make".to_owned()))
            }
        }
    }

    fn current(&mut self) -> Result<&mut Read, Undone> {
        self.read
            .as_mut()
            .ok_or_else(|| Undone::Unfit("the coordinator asks for work before it showed its plan".to_owned()))
    }

    /// The schema, and the rows as it encodes them; done once a schema.
    fn encode(&mut self, needs: &Needs) -> Result<&Encoded, Undone> {
        let bytes = needs.schema.as_deref().unwrap_or_default();
        let (hash, threads) = (Hash::of(bytes), self.threads);
        if self.encoded.as_ref().is_none_or(|encoded| encoded.hash != hash) {
            let schema = Schema::from_bytes(bytes).map_err(|error| Undone::Unfit(sentence(&error)))?;
            let Read { welcome, data } = self.current()?;
            let shard = data.encode(&schema)?;
            let network = Network::new(&welcome.learning.model, &schema);
            let network = network.map_err(|error| Undone::Unfit(sentence(&error)))?.with_threads(threads);
            self.encoded = Some(Encoded { hash, schema, shard, network });
        }
        self.encoded.as_ref().ok_or(Undone::Cancelled)
    }

    fn survey(&mut self) -> Result<(Made, Bytes), Undone> {
        let min_count = self.min_count;
        let survey = self.current()?.data.survey(min_count)?;
        let made = made(survey.training_rows());
        Ok(filled(made, survey.to_bytes().into()))
    }

    /// Asks the owner's word once more: whatever the coordinator says, rows leave only with it.
    fn rows(&mut self, needs: &Needs) -> Result<(Made, Bytes), Undone> {
        let central = self.current()?.welcome.learning.train.mode == Mode::Central;
        if !(central && self.share_rows) {
            return Err(Undone::Unfit(
                "the coordinator asks for rows, which the plan and their owner do not allow".to_owned(),
            ));
        }
        let rows = &self.encode(needs)?.shard.training;
        let bytes = rows.row_bytes().saturating_mul(rows.len()) as u64;
        if bytes > ROWS_BYTES_MAX {
            return Err(Undone::Unfit(format!("the training rows have {bytes} bytes, the most is {ROWS_BYTES_MAX}")));
        }
        Ok(filled(made(rows.len() as u64), rows.to_bytes(0, rows.len()).into()))
    }
}

/// What a task that starts from a model works with.
struct Start<'a> {
    welcome: &'a Welcome,
    bounds: Bounds,
    encoded: &'a Encoded,
    weights: Cow<'a, [f32]>,
}

impl Desk {
    /// Evaluates the model as it came, then trains from it.
    fn train(&mut self, order: &Order) -> Result<(Made, Bytes), Undone> {
        let Order { assigned, needs, bounds, job } = order;
        self.encode(needs)?;
        let (Some(read), Some(encoded)) = (&self.read, &self.encoded) else { return Err(Undone::Cancelled) };
        let weights = weights(&encoded.network, assigned, needs)?;
        let start = Start { welcome: &read.welcome, bounds: *bounds, encoded, weights };
        let evaluation = start.evaluation();
        if job.is_cancelled() {
            return Err(Undone::Cancelled);
        }
        let (mut made, payload) = match assigned.kind {
            TaskKind::Update => start.update(assigned, job)?,
            TaskKind::Gradient => start.gradient(assigned, job)?,
            _ => filled(made(0), Bytes::new()),
        };
        made.metrics.evaluation = evaluation;
        Ok((made, payload))
    }
}

/// The numbers of the model that a task starts from, if it is the model that this build makes of the plan.
fn weights<'a>(network: &Network, assigned: &Assigned, needs: &'a Needs) -> Result<Cow<'a, [f32]>, Undone> {
    let layout = network.layout();
    let bytes = needs.model.as_deref().unwrap_or_default();
    let fits = layout.fingerprint() == assigned.layout && layout.bytes() == bytes.len() as u64;
    let weights = numbers(bytes).filter(|_| fits);
    weights.ok_or_else(|| {
        Undone::Unfit(
            "the coordinator's model has other tensors than this worker makes of the same plan; run the same version \
             on both sides"
                .to_owned(),
        )
    })
}

impl Start<'_> {
    /// Sums over the held-out rows; none where there are none, or a sum is not finite.
    fn evaluation(&self) -> Option<Evaluation> {
        let Encoded { network, shard, schema, .. } = self.encoded;
        network.evaluate(&self.weights, &shard.held_out, schema).filter(|evaluation| evaluation.check().is_ok())
    }

    fn update(&self, assigned: &Assigned, job: &Job) -> Result<(Made, Bytes), Undone> {
        let Encoded { network, shard, .. } = self.encoded;
        let spec = &self.welcome.learning.train;
        let mut on_pass = counted(job);
        let trained = network.train(&self.weights, &shard.training, spec, self.key(assigned), &mut on_pass)?;
        let (steps, loss) = (trained.steps, trained.loss);
        let (delta, length) = trained.into_delta(&self.weights);
        self.folded(assigned, delta, length, steps, loss)
    }

    fn gradient(&self, assigned: &Assigned, job: &Job) -> Result<(Made, Bytes), Undone> {
        let Encoded { network, shard, .. } = self.encoded;
        let spec = &self.welcome.learning.train;
        let mut on_pass = counted(job);
        let gradient = network.gradient(&self.weights, &shard.training, spec, self.key(assigned), &mut on_pass)?;
        let length = norm(&gradient.values);
        self.folded(assigned, gradient.values, length, 1, gradient.loss)
    }

    fn key(&self, assigned: &Assigned) -> TaskKey<'_> {
        TaskKey { round: u64::from(assigned.round), name: self.welcome.name.as_str() }
    }

    /// A payload that goes into the sum: finite, with this norm, which is not too long, and its weight.
    fn folded(
        &self,
        assigned: &Assigned,
        values: Numbers<f32>,
        got: f64,
        steps: u64,
        loss: f64,
    ) -> Result<(Made, Bytes), Undone> {
        let max = self.bounds.norm_max;
        if !got.is_finite() || !loss.is_finite() {
            return Err(Undone::Failed(Failure::NotFinite));
        }
        if got > max {
            return Err(Undone::Failed(Failure::NormTooLong { got, max }));
        }
        let rows = self.encoded.shard.training.len() as u64;
        let (mut made, payload) = filled(made(rows), Bytes::from_owner(RawNumbers::from(values)));
        made.layout = assigned.layout;
        made.steps = steps;
        made.weight = weight(rows, assigned.weight_shift, self.bounds.weight_max);
        made.metrics.train_loss = Some(loss);
        Ok((made, payload))
    }
}

/// Whether the data are read for both in the same way: the same plan, under the same name.
fn same_reading(last: &Welcome, now: &Welcome) -> bool {
    (&last.learning, &last.name) == (&now.learning, &now.name)
}

/// A count of rows as a weight: shifted as the plan has it, and held between 1 and this worker's cap.
fn weight(rows: u64, shift: u32, max: u32) -> u32 {
    let shifted = rows.checked_shr(shift).unwrap_or(0);
    u32::try_from(shifted).unwrap_or(u32::MAX).clamp(1, max.max(1))
}

/// Counts passes for the beats, and stops where the job was cancelled.
fn counted(job: &Job) -> impl FnMut(u64) -> ControlFlow<()> {
    |passes| {
        job.set_steps(passes);
        if job.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl From<Stopped> for Undone {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::NotFinite { .. } => Self::Failed(Failure::NotFinite),
            Stopped::Cancelled => Self::Cancelled,
        }
    }
}

/// The figures of a payload that is not folded: its weight says nothing.
fn made(examples: u64) -> Made {
    let zero = Hash([0; 32]);
    Made { hash: zero, bytes: 0, layout: zero, examples, steps: 0, weight: 1, metrics: Metrics::default() }
}

fn filled(made: Made, payload: Bytes) -> (Made, Bytes) {
    (Made { hash: Hash::of(&payload), bytes: payload.len() as u64, ..made }, payload)
}

/// Tells the data's owner what is wrong with them, and gives the sentence for the coordinator: cells stay here.
fn tell_owner(error: DataError, say: &dyn Fn(FromTrainer)) -> String {
    say(FromTrainer::Misfit(sentence(&error)));
    sentence(&error.without_cells())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_the_shifted_count_held_in_its_bounds() {
        assert_eq!(weight(1000, 0, 1 << 20), 1000);
        assert_eq!(weight(1000, 3, 1 << 20), 125);
        assert_eq!(weight(3, 5, 1 << 20), 1);
        assert_eq!(weight(u64::MAX, 0, 77), 77);
        assert_eq!(weight(5, 64, 10), 1);
        assert_eq!(weight(5, 0, 0), 1);
    }
}
