//! The loop around [`Member`]: everything that touches the world, and no decision.
//!
//! One task owns the machine, the session and the contents. Connecting, control messages, downloads, uploads and training
//! happen in tasks and a thread of their own, which report here; what belongs to an earlier connection is known by its
//! number and dropped. Work that takes long never runs here, so that beats leave while it does.
//!
//! What the machine keeps until its receipt is written by a thread of its own, behind the offer and not before it: a
//! payload is a pure function of what a restarted worker is told anyway, so what was not written yet is made again.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use learning::{Table, data_files};
use protocol::evaluation::summarise;
use protocol::ids::{ContentId, Hash, Instance, TaskId, Time, WorkerId};
use protocol::limits::{BEAT_EVERY, PAYLOAD_AT_ONCE_BYTES_MAX};
use protocol::member::{Act, Ending, Event, Input, Kept, Made, Member, Notice, Output, WorkKey};
use protocol::messages::{
    Assigned, ContentRef, Encoding, FromWorker, Manifest, Receipt, Signed, ToWorker, Upload, Welcome, encode, printable,
};
use protocol::pages;
use protocol::session::sign::{MANIFEST_CONTEXT, PublicKey};
use tokio::sync::mpsc;
use transport::{Client, ClientOptions, CloseCode, RecvStream};

use crate::contents::{Contents, Due};
use crate::enrol::Enroller;
use crate::enrolments::{Enrolment, Enrolments};
use crate::error::{WorkerError, sentence};
use crate::keeper::{self, DataMark, Keeper, Origin, Restored};
use crate::link::{FromLink, Link, LinkEnd, LinkError, patience};
use crate::options::{Hooks, Options};
use crate::receipts::{self, ReceiptError, ReceiptLog};
use crate::report::{Line, Report};
use crate::state::{Keys, State};
use crate::trainer::{Bounds, FromTrainer, Job, Order, RowCounts, Trainer};
use crate::transfer::{self, ContentKind, TransferError};

/// What is reported to the loop and not taken in yet: a few messages of each task.
const REPORTS_MAX: usize = 256;

/// How often a worker says something while the machine does not beat, and for how long after it came or last had a task.
/// A coordinator that was killed and restarted ends the old connection with its first answer, so it must be asked for
/// one; QUIC's own keep-alive, which is all that a worker without work costs in the end, would take 25 s.
const PULSES: [(Duration, Duration); 2] =
    [(BEAT_EVERY, Duration::from_secs(10)), (Duration::from_secs(1), Duration::from_secs(60))];

/// What a pulse names before the first task.
const NO_TASK: TaskId = TaskId(0);

/// Receipts that may wait until there is nothing else to do.
const UNREAD_MAX: usize = 16;

/// How long the coordinator may take to hear that the connection is closed.
const CLOSE_MAX: Duration = Duration::from_millis(500);

/// How a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The run is over.
    Finished {
        /// The final model.
        model_hash: Hash,
    },
    /// It was told to stop.
    Stopped,
}

/// Works until the run is over, `shutdown` completes, or something is wrong that waiting does not mend.
///
/// Everything is told to [`Options::report`]. Must be called within a tokio runtime.
///
/// # Errors
/// What is wrong.
pub async fn run(options: Options, shutdown: impl Future<Output = ()>) -> Result<Outcome, WorkerError> {
    let mut shutdown = pin!(shutdown);
    let (table, marks) = tokio::select! {
        table = read_table(&options) => table?,
        () = &mut shutdown => return stopped(&options.report),
    };
    let state = State::open(&options.state, &options.data, options.name.as_ref())?;
    let client = Client::bind(ClientOptions { taps: options.hooks.taps.clone(), ..ClientOptions::default() })?;
    let enroller = Arc::new(Enroller {
        client,
        keys: state.keys()?,
        name: state.name().clone(),
        enrolments: Enrolments::new(state.coordinators()),
        default_join: options.default_join.clone(),
        invited: options.join.is_some(),
        report: options.report.clone(),
        hooks: options.hooks.clone(),
    });
    let enrolment = tokio::select! {
        enrolment = enroller.settle(options.join.as_ref()) => enrolment?,
        () = &mut shutdown => return stopped(&options.report),
    };
    let origin = Origin::new(&enrolment.coordinator, &enrolment.name, options.label.as_deref(), &marks);
    let kept = restore(state.kept(), origin, options.report.clone()).await?;
    let shell = Shell::new(options, &state, table, Arc::clone(&enroller), enrolment, kept)?;
    let outcome = shell.run(shutdown).await;
    enroller.client.close(CloseCode::Done, "");
    // So that the coordinator hears of it; one that is gone hears nothing, and the bound is for that.
    let _ = tokio::time::timeout(CLOSE_MAX, enroller.client.wait_idle()).await;
    outcome
}

fn stopped(report: &Report) -> Result<Outcome, WorkerError> {
    report.say(&Line::Stopped);
    Ok(Outcome::Stopped)
}

/// A file that cannot be used is an error before anybody is asked anything, and leaves no state directory behind.
async fn read_table(options: &Options) -> Result<(Table, Vec<DataMark>), WorkerError> {
    let path = options.data.clone();
    let read = tokio::task::spawn_blocking(move || {
        let marks = data_files(&path).iter().filter_map(|file| DataMark::of(file).ok()).collect();
        Ok((Table::read(&path)?, marks))
    });
    read.await.map_err(|error| WorkerError::Runtime(error.into()))?
}

/// What an earlier process kept, and the thread that keeps from now on.
async fn restore(place: PathBuf, origin: Origin, report: Report) -> Result<(Keeper, Option<Restored>), WorkerError> {
    let read = tokio::task::spawn_blocking(move || {
        let restored = keeper::read(&place, origin);
        Ok((Keeper::start(place, origin, restored.as_ref(), report)?, restored))
    });
    read.await.map_err(io::Error::from).flatten().map_err(WorkerError::Runtime)
}

/// What is reported to the loop.
enum Happening {
    /// An attempt to connect succeeded.
    Connected(Box<Link>, Box<Enrolment>),
    /// It failed.
    Unreachable(LinkError),
    /// Something came of the link of this number.
    Link(u64, FromLink),
    /// A stream of that link says which content it carries.
    Announced(u64, ContentId, RecvStream),
    /// A content is here, whole and as announced.
    Downloaded(u64, ContentRef, ContentKind, Bytes),
    /// A stream of that link did not bring what it should, of a content if that much is known.
    Spoiled(u64, Option<ContentId>, TransferError),
    /// Something came of the training thread.
    Trainer(FromTrainer),
    /// The time that the machine waits for has come.
    Tick,
    /// Nothing was said for a while.
    Pulse,
    /// There is time to look at receipts.
    Leisure,
    /// The owner stops the process.
    Stop,
}

/// The machine and what is around it.
struct Shell {
    member: Member,
    born: Instant,
    enroller: Arc<Enroller>,
    enrolment: Enrolment,
    report: Report,
    hooks: Hooks,
    reports: mpsc::Sender<Happening>,
    inbox: mpsc::Receiver<Happening>,
    link: Option<Link>,
    /// Counts connections; what an earlier one still says is dropped.
    link_number: u64,
    /// Attempts to connect that came to nothing since the last that did not.
    unanswered: u32,
    /// When there last was something to beat for.
    busy_at: Instant,
    /// The coordinator said that it goes away and comes back.
    going_away: bool,
    /// What was last said about a coordinator that cannot be reached, or that lets nobody in.
    said_unreachable: Option<String>,
    welcome: Option<Box<Welcome>>,
    rows: Option<RowCounts>,
    trainer: Trainer,
    /// What about the data does not fit, as only their owner is told.
    misfit: Option<String>,
    contents: Contents<RecvStream>,
    work: Work,
    /// A task that was just named: the machine may want no work for it.
    assigned: Option<Box<Assigned>>,
    /// What was made and has no receipt yet, by its hash.
    payloads: BTreeMap<Hash, Bytes>,
    /// The task for which one was offered last: what a pulse names.
    offered: TaskId,
    keeper: Keeper,
    receipt_directory: PathBuf,
    receipts: Option<ReceiptLog>,
    /// The coordinator's key as `welcome` names it, once a receipt came.
    signer: Option<PublicKey>,
    /// Receipts that came and were not looked at: nobody waits for that, and the next task goes first.
    unread: VecDeque<Signed>,
    /// What came of something that was done at once.
    done: VecDeque<Happening>,
    receipt_count: u64,
    /// The disk does not take receipts, which was said.
    said_unwritten: bool,
}

/// The task that the machine wants done.
enum Work {
    None,
    /// Its contents are on their way.
    Waiting(Box<Assigned>),
    /// It is on the training thread.
    Going(TaskId, Arc<Job>),
}

impl Shell {
    fn new(
        options: Options,
        state: &State,
        table: Table,
        enroller: Arc<Enroller>,
        enrolment: Enrolment,
        (keeper, restored): (Keeper, Option<Restored>),
    ) -> Result<Self, WorkerError> {
        let (reports, inbox) = mpsc::channel(REPORTS_MAX);
        let report = options.report.clone();
        let hooks = options.hooks.clone();
        let trainer_reports = reports.clone();
        let say = move |report| drop(trainer_reports.blocking_send(Happening::Trainer(report)));
        let payloads = restored.iter().map(|restored| (restored.kept.made.hash, restored.payload.clone())).collect();
        let member = match restored {
            Some(Restored { kept, .. }) => Member::restored(instance()?, kept),
            None => Member::new(instance()?),
        };
        Ok(Self {
            member,
            born: Instant::now(),
            enroller,
            enrolment,
            report,
            hooks,
            reports,
            inbox,
            link: None,
            link_number: 0,
            unanswered: 0,
            busy_at: Instant::now(),
            going_away: false,
            said_unreachable: None,
            welcome: None,
            rows: None,
            trainer: Trainer::start(options, table, say).map_err(WorkerError::Runtime)?,
            misfit: None,
            contents: Contents::new(),
            work: Work::None,
            assigned: None,
            payloads,
            offered: NO_TASK,
            keeper,
            receipt_directory: state.receipts(),
            receipts: None,
            signer: None,
            unread: VecDeque::new(),
            done: VecDeque::new(),
            receipt_count: 0,
            said_unwritten: false,
        })
    }

    async fn run(mut self, mut shutdown: Pin<&mut impl Future<Output = ()>>) -> Result<Outcome, WorkerError> {
        let mut stopping = false;
        self.tell(Input::Tick);
        loop {
            let wait = match self.drain() {
                Next::Wait(wait) => wait,
                Next::Exit(ending) => return self.exit(ending).await,
            };
            if let Some(assigned) = self.assigned.take()
                && let Some(due) = self.contents.settle(&assigned)
            {
                self.download(due);
            }
            if let Some(happening) = self.done.pop_front() {
                self.take_in(happening)?;
                continue;
            }
            let pulse = self.pulse();
            let happening = tokio::select! {
                biased;
                () = &mut shutdown, if !stopping => Happening::Stop,
                // The loop holds a sender itself, so the channel never closes.
                Some(happening) = self.inbox.recv() => happening,
                // What was said goes out first.
                () = tokio::task::yield_now(), if !self.unread.is_empty() => Happening::Leisure,
                () = tokio::time::sleep(wait.unwrap_or_default()), if wait.is_some() => Happening::Tick,
                () = tokio::time::sleep(pulse.unwrap_or_default()), if pulse.is_some() => Happening::Pulse,
            };
            stopping |= matches!(happening, Happening::Stop);
            self.take_in(happening)?;
        }
    }

    fn now(&self) -> Time {
        Time(0).after(self.born.elapsed())
    }

    fn tell(&mut self, input: Input) {
        let now = self.now();
        self.member.handle(now, input);
    }

    /// Does what the machine wants until it waits.
    fn drain(&mut self) -> Next {
        loop {
            match self.member.poll() {
                Output::Append(event) => self.hear(&event),
                Output::Act { act: Act::Exit(ending), .. } => return Next::Exit(ending),
                // No act waits for the disk, so its gate is open once its event was polled, which is before it.
                Output::Act { act, .. } => self.act(act),
                Output::Wait(at) => return Next::Wait(at.map(|at| at.since(self.now()))),
            }
        }
    }

    // --- what the machine wants ---

    fn act(&mut self, act: Act) {
        match act {
            Act::Connect => self.connect(),
            Act::Disconnect => self.disconnect(),
            Act::Send(message) => self.send(message),
            Act::Beat { task } => {
                self.busy_at = Instant::now();
                self.beat(task);
            }
            Act::Consider(welcome) => self.trainer.consider(welcome),
            Act::Work(assigned) => self.begin(assigned),
            Act::Cancel => self.cancel(),
            Act::Offer { task, key, made } => self.offer(task, key, &made),
            Act::Upload { task, hash, from } => self.upload(Upload { task, hash, from }, hash),
            Act::Drop { hash } => drop(self.payloads.remove(&hash)),
            Act::Exit(_) => {}
        }
    }

    fn connect(&mut self) {
        self.link_number += 1;
        let (enroller, mut enrolment) = (Arc::clone(&self.enroller), self.enrolment.clone());
        let (reports, number, patience) = (self.reports.clone(), self.link_number, patience(self.unanswered));
        tokio::spawn(async move {
            enroller.refresh(&mut enrolment).await;
            let Enroller { client, keys, .. } = &*enroller;
            let link = Link::connect(client, keys, &enrolment, patience, reports.clone(), Happening::Link, number);
            let happening = match link.await {
                Ok(link) => Happening::Connected(Box::new(link), Box::new(enrolment)),
                Err(error) => Happening::Unreachable(error),
            };
            // Nobody listens once the worker has ended.
            let _ = reports.send(happening).await;
        });
    }

    fn disconnect(&mut self) {
        if let Some(link) = self.link.take() {
            tokio::spawn(link.close(CloseCode::Done));
            self.lost();
        }
    }

    fn send(&mut self, message: FromWorker) {
        if message == FromWorker::Ready {
            self.say_joined();
        }
        if let Some(link) = &self.link {
            self.hooks.see(|| encode(&message));
            link.send(message);
        }
    }

    fn beat(&mut self, task: TaskId) {
        let steps = match &self.work {
            Work::Going(_, job) => job.steps(),
            Work::None | Work::Waiting(_) => 0,
        };
        self.send(FromWorker::Beat { task, steps });
        if self.link.as_mut().is_some_and(Link::is_silent) {
            self.hang_up();
        }
    }

    /// Gives up a connection over which nothing comes: the coordinator may be found elsewhere.
    fn hang_up(&mut self) {
        let Some(link) = self.link.take() else { return };
        link.connection.close(CloseCode::TimedOut, &LinkEnd::Silent.to_string());
        self.say_disconnected(&LinkEnd::Silent);
        self.lost();
    }

    fn begin(&mut self, assigned: Box<Assigned>) {
        let is_gone = self.contents.is_gone(&assigned);
        for due in self.contents.expect(&assigned) {
            self.download(due);
        }
        self.work = Work::Waiting(assigned);
        if let Some(link) = self.link.as_ref().filter(|_| is_gone) {
            // A connection streams nothing twice; on the next one the task is given again.
            return link.connection.close(CloseCode::Done, "a content that was not needed is");
        }
        self.begin_if_whole();
    }

    fn begin_if_whole(&mut self) {
        let Work::Waiting(assigned) = &self.work else { return };
        let (Some(needs), Some(welcome)) = (self.contents.needs(assigned), &self.welcome) else { return };
        let bounds = Bounds { weight_max: welcome.weight_max, norm_max: welcome.norm_max };
        let job = Arc::new(Job::default());
        let task = assigned.task;
        let done = self.trainer.work(Order { assigned: assigned.clone(), needs, bounds, job: Arc::clone(&job) });
        self.work = Work::Going(task, job);
        self.done.extend(done.into_iter().map(Happening::Trainer));
    }

    fn cancel(&mut self) {
        if let Work::Going(_, job) = std::mem::replace(&mut self.work, Work::None) {
            job.cancel();
        }
    }

    fn offer(&mut self, task: TaskId, key: WorkKey, made: &Made) {
        let manifest = manifest(WorkerId(self.enroller.keys.identity.id()), task, key, made);
        let Some(payload) = self.payloads.get_mut(&made.hash) else { return };
        let (manifest, signed) = sign_offer(&self.enroller.keys, &self.hooks, manifest, payload);
        self.offered = task;
        self.send(FromWorker::Offer(signed));
        if made.bytes > 0 && made.bytes <= PAYLOAD_AT_ONCE_BYTES_MAX {
            self.upload(Upload { task: manifest.task, hash: manifest.hash, from: 0 }, made.hash);
        }
    }

    fn upload(&mut self, upload: Upload, hash: Hash) {
        let (Some(payload), Some(link)) = (self.payloads.get(&hash), self.link.as_mut()) else { return };
        let (number, sealer) = match link.session.open_stream() {
            Ok(stream) => stream,
            Err(error) => return link.connection.close(CloseCode::Internal, &error.to_string()),
        };
        tracing::debug!(task = %upload.task, from = upload.from, bytes = payload.len(), "upload begins");
        self.hooks.see(|| encode(&upload));
        self.hooks.see(|| payload);
        let sending = transfer::upload(link.connection.clone(), number, sealer, upload, payload.clone());
        tokio::spawn(async move {
            // The coordinator stops what it no longer wants, and the end of the connection is reported elsewhere.
            if let Err(error) = sending.await {
                tracing::debug!(task = %upload.task, %error, "upload ended early");
            }
        });
    }

    fn download(&mut self, due: Due<RecvStream>) {
        let number = self.link_number;
        self.read(async move {
            let Due { stream, content, kind } = due;
            match transfer::download(stream, &content, kind).await {
                Ok(bytes) => Happening::Downloaded(number, content, kind, bytes),
                Err(error) => Happening::Spoiled(number, Some(content.id), error),
            }
        });
    }

    /// Reads what is here already at once, and what is not in a task of its own: the streams of a small task came with it.
    fn read(&mut self, reading: impl Future<Output = Happening> + Send + 'static) {
        let mut reading = Box::pin(reading);
        match reading.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(happening) => self.done.push_back(happening),
            Poll::Pending => {
                let reports = self.reports.clone();
                // It is polled again there, by who wakes it. Nobody listens once the worker has ended.
                tokio::spawn(async move { drop(reports.send(reading.await).await) });
            }
        }
    }

    // --- what happens ---

    fn take_in(&mut self, happening: Happening) -> Result<(), WorkerError> {
        match happening {
            Happening::Connected(link, enrolment) => self.connected(*link, *enrolment),
            Happening::Unreachable(error) => self.unreachable(error)?,
            Happening::Link(number, event) if number == self.link_number => self.take_in_link(event)?,
            Happening::Announced(number, id, stream) if number == self.link_number => {
                if let Some(due) = self.contents.arrived(id, stream) {
                    self.download(due);
                }
            }
            Happening::Downloaded(number, content, kind, bytes) if number == self.link_number => {
                self.hooks.see(|| &bytes);
                self.contents.keep(&content, kind, bytes);
                self.begin_if_whole();
            }
            Happening::Spoiled(number, id, error) if number == self.link_number => self.spoiled(id, &error),
            Happening::Link(..) | Happening::Announced(..) | Happening::Downloaded(..) | Happening::Spoiled(..) => {}
            Happening::Trainer(report) => self.take_in_trainer(report)?,
            Happening::Tick => self.tell(Input::Tick),
            Happening::Pulse => {
                if self.busy_at.elapsed() >= PULSES[0].1 {
                    // The next round is not near.
                    pages::give_back();
                }
                self.beat(self.offered);
            }
            Happening::Leisure => {
                // Nor does anybody wait for it who shares this core: another worker's offer goes first.
                thread::yield_now();
                self.read_receipts()?;
            }
            Happening::Stop => {
                self.read_receipts()?;
                self.tell(Input::Stop);
            }
        }
        Ok(())
    }

    fn connected(&mut self, link: Link, enrolment: Enrolment) {
        self.enrolment = enrolment;
        self.link = Some(link);
        (self.unanswered, self.busy_at) = (0, Instant::now());
        self.tell(Input::Connected);
    }

    fn unreachable(&mut self, error: LinkError) -> Result<(), WorkerError> {
        if let Some(error) = for_good(error.code(), || error.to_string()) {
            return Err(error);
        }
        if let LinkError::Refused(_) = error {
            return Err(WorkerError::Link(error));
        }
        let told = match self.going_away && error.is_refusal() {
            true => "it is going away".to_owned(),
            false => error.to_string(),
        };
        if self.said_unreachable.as_ref() != Some(&told) {
            let addresses = self.enrolment.addresses.clone();
            self.report.say(&Line::Unreachable { addresses, error: told.clone() });
            self.said_unreachable = Some(told);
        }
        self.unanswered = self.unanswered.saturating_add(1);
        self.tell(Input::Unreachable);
        Ok(())
    }

    fn take_in_link(&mut self, event: FromLink) -> Result<(), WorkerError> {
        match event {
            FromLink::Said(message) => self.said(*message)?,
            FromLink::Opened(number, stream) => self.opened(number, stream),
            FromLink::Ended(end) => self.ended(&end)?,
        }
        Ok(())
    }

    fn said(&mut self, message: ToWorker) -> Result<(), WorkerError> {
        self.hooks.see(|| encode(&message));
        if let ToWorker::Receipt(signed) = message {
            self.unread.push_back(signed);
            return if self.unread.len() > UNREAD_MAX { self.read_receipts() } else { Ok(()) };
        }
        if !matches!(message, ToWorker::Assigned(_) | ToWorker::Held { .. } | ToWorker::Go { .. }) {
            self.read_receipts()?;
        }
        match &message {
            ToWorker::Welcome(welcome) => {
                self.receipts.take_if(|log| !log.is_of(welcome.run));
                self.receipts.get_or_insert_with(|| ReceiptLog::new(self.receipt_directory.clone(), welcome.run));
                (self.welcome, self.signer) = (Some(welcome.clone()), None);
            }
            ToWorker::Assigned(assigned) => self.assigned = Some(assigned.clone()),
            ToWorker::GoingAway => self.going_away = true,
            ToWorker::Refused { task, refusal } => {
                self.report.say(&Line::Refused { task: *task, reason: refusal.to_string() });
            }
            _ => {}
        }
        self.tell(Input::Said(message));
        Ok(())
    }

    fn read_receipts(&mut self) -> Result<(), WorkerError> {
        while let Some(signed) = self.unread.pop_front() {
            self.receipted(&signed)?;
        }
        Ok(())
    }

    /// Checks a receipt and keeps it. One that does not verify is worth an end: the coordinator is not who it was.
    fn receipted(&mut self, signed: &Signed) -> Result<(), WorkerError> {
        let Some(welcome) = &self.welcome else { return Ok(()) };
        let signer = match &mut self.signer {
            Some(signer) => signer,
            none => none.insert(PublicKey::read(&welcome.ed25519).map_err(ReceiptError::from)?),
        };
        let receipt = receipts::open(signer, signed)?;
        if self.receipts.as_mut().is_some_and(|log| log.add(&welcome.ed25519, signed)) {
            self.write_receipts();
            self.receipt_count += 1;
            let Receipt { round, task, hash, model_hash, .. } = receipt;
            self.report.say(&Line::Receipt { round, task, hash, model_hash });
        }
        self.tell(Input::Receipted(receipt));
        Ok(())
    }

    /// The updates are safe with the coordinator, so a disk that does not take the proof of it is not worth an end.
    fn write_receipts(&mut self) {
        let Some(log) = &mut self.receipts else { return };
        match log.write() {
            Ok(written) => {
                self.said_unwritten = false;
                written.into_iter().for_each(|file| self.keeper.sync_soon(file));
            }
            Err(error) if !self.said_unwritten => {
                self.said_unwritten = true;
                let text =
                    format!("receipts cannot be written, and wait in memory until they can: {}", sentence(&error));
                self.report.say(&Line::Note { text });
            }
            Err(_) => {}
        }
    }

    fn opened(&mut self, number: u32, mut stream: RecvStream) {
        let Some(link) = &mut self.link else { return };
        let mut opener = match link.session.accept_stream(number) {
            Ok(opener) => opener,
            Err(error) => return link.connection.close(CloseCode::SessionFailed, &error.to_string()),
        };
        let link = self.link_number;
        self.read(async move {
            match transfer::announced(&mut stream, &mut opener).await {
                Ok(id) => Happening::Announced(link, id, stream),
                Err(error) => Happening::Spoiled(link, None, error),
            }
        });
    }

    /// A stream that broke leaves a task without its contents, so the connection is made anew. What the coordinator
    /// gave up because nobody wants it any more does no harm.
    fn spoiled(&mut self, id: Option<ContentId>, error: &TransferError) {
        let wanted = id.is_none_or(|id| self.contents.gave_up(id)) && matches!(self.work, Work::Waiting(_));
        tracing::debug!(%error, wanted, "a download failed");
        if !wanted && !error.is_fault() {
            return;
        }
        let code = if error.is_fault() { CloseCode::SessionFailed } else { CloseCode::Done };
        if let Some(link) = &self.link {
            link.connection.close(code, &error.to_string());
        }
    }

    fn ended(&mut self, end: &LinkEnd) -> Result<(), WorkerError> {
        let code = match end {
            LinkEnd::Connection(ended) => ended.code(),
            _ => None,
        };
        if let Some(error) = for_good(code, || end.to_string()) {
            return Err(error);
        }
        self.going_away |= code == Some(CloseCode::GoingAway);
        if self.link.take().is_some() {
            self.say_disconnected(end);
            self.lost();
        }
        Ok(())
    }

    fn lost(&mut self) {
        self.link_number += 1;
        self.contents.disconnected();
        if let Work::Waiting(assigned) = &self.work {
            let task = assigned.task;
            self.work = Work::None;
            self.tell(Input::Abandoned { task });
        }
        self.tell(Input::Lost);
    }

    fn take_in_trainer(&mut self, report: FromTrainer) -> Result<(), WorkerError> {
        match report {
            FromTrainer::Noted(text) => self.report.say(&Line::Note { text }),
            FromTrainer::Misfit(sentence) => self.misfit = Some(sentence),
            FromTrainer::Considered(Ok(rows)) => {
                self.rows = Some(rows);
                self.tell(Input::Considered(Ok(())));
            }
            FromTrainer::Considered(Err(leave)) => self.tell(Input::Considered(Err(leave))),
            FromTrainer::Made { task, made, payload } => {
                self.free_trainer(task);
                self.payloads.insert(made.hash, payload);
                self.tell(Input::Made { task, made });
            }
            FromTrainer::Failed { task, failure } => {
                self.free_trainer(task);
                self.tell(Input::Failed { task, failure });
            }
            FromTrainer::Unfit { sentence } => self.tell(Input::Unfit { sentence }),
            FromTrainer::Died => return Err(WorkerError::TrainingDied),
        }
        Ok(())
    }

    fn free_trainer(&mut self, task: TaskId) {
        if matches!(self.work, Work::Going(going, _) if going == task) {
            self.work = Work::None;
        }
    }

    // --- what is told ---

    fn hear(&mut self, event: &Event) {
        match event {
            Event::Made { key, task, made } => {
                self.say_made(*key, made);
                if let Some(payload) = self.payloads.get(&made.hash).filter(|_| key.earns_a_receipt()) {
                    self.keeper.keep(Kept { key: *key, task: *task, made: made.clone() }, payload.clone());
                }
            }
            Event::Renamed { task } => self.keeper.rename(*task),
            Event::Dropped { hash } => self.keeper.forget(*hash),
            Event::Notice(Notice::Failed { failure }) => tracing::warn!(?failure, "training gave nothing to offer"),
            Event::Notice(notice) => tracing::debug!(?notice),
        }
    }

    /// Said once, until it is in again: a coordinator that is being shut down may end many connections.
    fn say_disconnected(&mut self, end: &LinkEnd) {
        let error = end.to_string();
        if self.said_unreachable.replace(error.clone()).as_ref() != Some(&error) {
            self.report.say(&Line::Disconnected { error });
        }
    }

    fn say_joined(&mut self) {
        (self.said_unreachable, self.going_away) = (None, false);
        let (Some(welcome), Some(rows)) = (&self.welcome, self.rows) else { return };
        self.report.say(&Line::Joined {
            name: welcome.name.clone(),
            run: welcome.run,
            mode: welcome.learning.train.mode,
            training_rows: rows.training,
            held_out_rows: rows.held_out,
        });
    }

    fn say_made(&self, key: WorkKey, made: &Made) {
        let metrics = &made.metrics;
        self.report.say(&Line::Round {
            round: key.round,
            kind: key.kind,
            examples: made.examples,
            steps: made.steps,
            train_loss: metrics.train_loss,
            eval: metrics.evaluation.as_ref().map(|evaluation| summarise([evaluation]).into()),
            seconds: metrics.seconds,
            bytes: made.bytes,
        });
    }

    /// After how long it says something though the machine has nothing to beat for.
    fn pulse(&self) -> Option<Duration> {
        let idle = self.link.is_some() && matches!(self.work, Work::None);
        let since = self.busy_at.elapsed();
        PULSES.iter().find(|(_, until)| idle && since < *until).map(|(every, _)| *every)
    }

    // --- the end ---

    async fn exit(mut self, ending: Ending) -> Result<Outcome, WorkerError> {
        if let Some(link) = self.link.take() {
            link.close(CloseCode::Done).await;
        }
        self.write_receipts();
        let Self { keeper, report, receipt_count, misfit, .. } = self;
        // It waits for the disk, and the connection's last words must not.
        tokio::task::spawn_blocking(move || drop(keeper)).await.map_err(|error| WorkerError::Runtime(error.into()))?;
        match ending {
            Ending::Finished { model_hash } => {
                report.say(&Line::Done { model_hash, receipts: receipt_count });
                Ok(Outcome::Finished { model_hash })
            }
            Ending::Stopped => stopped(&report),
            Ending::Displaced => Err(WorkerError::Displaced),
            Ending::Rejected(sentence) => Err(WorkerError::Rejected(printable(&sentence))),
            Ending::Declined(sentence) => Err(WorkerError::Declined(misfit.unwrap_or(sentence))),
            Ending::Aborted => Err(WorkerError::Aborted),
        }
    }
}

/// What the loop does next.
enum Next {
    Wait(Option<Duration>),
    Exit(Ending),
}

/// A nonce of this process.
fn instance() -> Result<Instance, WorkerError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| WorkerError::Runtime(io::Error::other(error)))?;
    Ok(Instance(u64::from_le_bytes(bytes)))
}

fn manifest(worker: WorkerId, task: TaskId, key: WorkKey, made: &Made) -> Manifest {
    Manifest {
        run: key.run,
        worker,
        task,
        kind: key.kind,
        base: key.base,
        layout: made.layout,
        groups: 1,
        encoding: Encoding::F32,
        bytes: made.bytes,
        hash: made.hash,
        examples: made.examples,
        steps: made.steps,
        weight: made.weight,
        metrics: made.metrics.clone(),
    }
}

/// Signs a manifest. A test's hook may change it and its payload first.
fn sign_offer(keys: &Keys, hooks: &Hooks, mut manifest: Manifest, payload: &mut Bytes) -> (Manifest, Signed) {
    if let Some(hook) = &hooks.on_offer {
        let mut bytes = payload.to_vec();
        hook(&mut manifest, &mut bytes);
        *payload = bytes.into();
    }
    let bytes = encode(&manifest);
    let mut signature = keys.identity.sign(MANIFEST_CONTEXT, &bytes);
    if let Some(hook) = &hooks.on_signature {
        hook(&mut signature);
    }
    (manifest, Signed { bytes, signature: signature.to_vec() })
}

/// The error that a close code means, where coming back would not help.
fn for_good(code: Option<CloseCode>, told: impl FnOnce() -> String) -> Option<WorkerError> {
    match code? {
        CloseCode::Revoked => Some(WorkerError::Revoked),
        CloseCode::Displaced => Some(WorkerError::Displaced),
        CloseCode::IdentityRefused => Some(WorkerError::Unknown(told())),
        CloseCode::Misbehaved => Some(WorkerError::Misbehaved(told())),
        _ => None,
    }
}
