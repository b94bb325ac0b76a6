//! The event loop: the real world around one [`Federation`].
//!
//! One task owns the machine, inside a [`Core`]. Whatever happens outside becomes an [`Input`]: what connections hear,
//! what the workshop made, what an operator orders, what time it is. After each input the core is drained: jobs go to
//! the workshop, events to telemetry and to whoever looks on, acts to connections. Everything heavy is elsewhere:
//! cryptography in the tasks of connections ([`crate::conn`]), payloads on the compute pool ([`crate::intake`]), tensors
//! and disk in the workshop ([`crate::workshop`]). The loop never waits for any of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use learning::Schema;
use protocol::evaluation::EvaluationSummary;
use protocol::federation::{Act, Assignment, Event, EventNo, Federation, Gone, Input, Notice};
use protocol::ids::{ConnId, ContentId, Hash, TaskId, Time, WorkerId};
use protocol::limits::RESUME_BYTES_MIN;
use protocol::messages::{Assigned, ContentRef, PROTOCOL_VERSION, ToWorker, Upload, Welcome};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use transport::{CloseCode, Connection, LinkStats, TrafficTotals};

use crate::conn::{Door, FromConn, Joined, Received, Saying, Ticket, on_compute_pool};
use crate::control::Command;
use crate::core::{Core, Effect};
use crate::crash;
use crate::intake::{Declared, Part, Spools, resume_from};
use crate::registry::Worker;
use crate::show::{Show, StatusPage};
use crate::state::StateError;
use crate::telemetry::{Direction, Kind, Metrics, WorkerState, lossy};
use crate::vigil::Vigil;
use crate::workshop::{Content, Done, Job, WorkshopError, WorkshopHandle};

/// How often figures are taken that no event brings.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Of how many peers figures are taken at once. A larger fleet's turn goes round.
const LOOKED_AT_MAX: usize = 256;

/// The page names every worker, so that a change is shown at once in a small fleet and up to 200 ms later in one of 20,000.
const PAGE_EVERY_A_WORKER: Duration = Duration::from_micros(10);

/// How long what was done by whoever gave it may wait to be written, so that a sync takes it along.
const WRITTEN_AFTER: Duration = Duration::from_millis(2);

/// Events that may wait to be told until there is nothing better to do: those of some rounds.
const UNTOLD_MAX: usize = 256;

/// How long goodbyes may take altogether.
const PARTING_MAX: Duration = Duration::from_secs(5);

/// How a run of the coordinator ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The run is over, and its model is written.
    Finished,
    /// It was told to stop, and kept everything.
    Stopped,
}

/// How it ended otherwise.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The run was given up, or cannot go on.
    #[error("{0}")]
    Failed(String),
    /// The disk is broken, or we are.
    #[error(transparent)]
    Workshop(#[from] WorkshopError),
    /// A payload could not be spooled.
    #[error("spool: {0}")]
    Spool(crate::intake::IntakeError),
    /// The workshop's thread ended, which is a bug of ours; it has said where.
    #[error("the workshop ended unexpectedly")]
    NoWorkshop,
    /// A round that was made again gave another model.
    #[error(
        "round {round} was committed as model {recorded}, and made again of the same updates it is {redone}: this machine or \
         program computes otherwise than the one that made it; {recorded} is the one that receipts were given for: bring \
         its file back from a backup, or go on with the program and the kind of machine that made it, or begin anew with --new-run"
    )]
    Conflict {
        /// The round.
        round: u32,
        /// What the journal records.
        recorded: Hash,
        /// What came of it now.
        redone: Hash,
    },
    /// A task names a content that is not there.
    #[error("content {0:?} is to be streamed and is not there")]
    NoContent(Hash),
}

/// Where inputs come from.
#[derive(Debug)]
pub struct Inbox {
    /// Connections.
    pub connections: mpsc::Receiver<FromConn>,
    /// The workshop.
    pub workshop: mpsc::UnboundedReceiver<Done>,
    /// Operators.
    pub commands: mpsc::Receiver<Command>,
}

/// Everything outside that the loop acts on.
#[derive(Debug)]
pub struct World {
    /// Where connections come in.
    pub door: Arc<Door>,
    /// Tensors and disk.
    pub workshop: WorkshopHandle,
    /// People and programs who look on.
    pub show: Show,
    /// The status page.
    pub page: watch::Sender<StatusPage>,
    /// Where workers come in.
    pub address: SocketAddr,
    /// Where large payloads are kept.
    pub spools: Arc<Spools>,
    /// The frozen schema, if there is one yet.
    pub schema: Option<Arc<Schema>>,
    /// Whether the loop ends with the run.
    pub exit_when_done: bool,
}

/// The loop's state.
#[derive(Debug)]
pub struct Fleet {
    core: Core,
    world: World,
    began: Instant,
    peers: BTreeMap<ConnId, Peer>,
    uploads: Uploads,
    /// What may be streamed: the schema, and at most two models.
    contents: BTreeMap<Hash, Arc<Content>>,
    newest: Option<Hash>,
    /// Shut out since the start: one of them may be between its handshake and its first word.
    revoked: BTreeSet<WorkerId>,
    /// Who does not read what it is told.
    deaf: Vec<ConnId>,
    /// What people and programs are told when workers have been.
    untold: VecDeque<Event>,
    course: Course,
    room: Room,
    seen: Seen,
    page: Page,
    collected: Collected,
}

/// A worker with a live session.
#[derive(Debug)]
struct Peer {
    worker: Worker,
    link: Connection,
    sayings: mpsc::Sender<Box<Saying>>,
    /// Contents that were streamed to it.
    had: BTreeSet<ContentId>,
    /// Packets lost so far, as they were last counted.
    lost: u64,
    /// Goodbye was said.
    parting: bool,
}

/// Payloads on their way. An upload's stream and the act that lets it in may come in either order.
#[derive(Debug, Default)]
struct Uploads {
    tickets: u64,
    /// What the machine waits for.
    expected: BTreeMap<TaskId, Expected>,
    /// Streams that wait for the machine: one for a connection.
    early: BTreeMap<(ConnId, TaskId), Early>,
    /// The task that each connection was told of last.
    told: BTreeMap<ConnId, TaskId>,
}

#[derive(Debug)]
struct Expected {
    conn: ConnId,
    declared: Declared,
    begins: Begins,
    /// What is here of it already.
    part: Option<Part>,
    /// The stream that was let in; dropped, it ends.
    under_way: Option<(u64, oneshot::Sender<()>)>,
}

/// Where a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begins {
    /// Behind so many bytes.
    At(u64),
    /// Behind what is being looked for under this number.
    LookedFor(u64),
}

#[derive(Debug)]
struct Early {
    hash: Hash,
    from: u64,
    ticket: oneshot::Sender<Ticket>,
}

/// Where the loop is going.
#[derive(Debug)]
enum Course {
    Running,
    /// The run is over, and the model is being written.
    Finishing(EvaluationSummary),
    /// The run is over, and people may still look at it.
    Lingering,
    /// Goodbyes are on their way.
    Parting {
        until: Instant,
        outcome: Result<Outcome, FleetError>,
    },
}

/// Who waits for room on the disk.
#[derive(Debug, Default)]
struct Room {
    uploads_wait: bool,
    workshop_waits: bool,
    /// What the machine and people were told.
    told: bool,
}

/// What was last counted of figures that only grow.
#[derive(Debug, Default)]
struct Seen {
    traffic: Option<TrafficTotals>,
    commit: Option<Instant>,
    /// The connection of the peer that was looked at last.
    peer: u64,
    /// No more connections are taken, and people know it.
    full: bool,
}

/// What the workshop has collected, to be written if no sync takes it along soon.
#[derive(Debug, Default)]
struct Collected {
    /// Since when something is.
    since: Option<Instant>,
    /// When that is looked at next. A sync does not change it: a timer that is set anew in every round is a system call in
    /// every round.
    looked_at: Option<Instant>,
}

/// How the status page stands to what it shows.
#[derive(Debug, Default)]
struct Page {
    /// Something happened since it was made.
    is_stale: bool,
    /// When it is to be made, if it is to be before figures are next taken.
    due: Option<Instant>,
    /// Before then it may not be made again.
    rests_until: Option<Instant>,
}

impl Fleet {
    /// A loop around `machine`.
    #[must_use]
    pub fn new(machine: Federation, world: World) -> Self {
        Self {
            core: Core::new(machine),
            world,
            began: Instant::now(),
            peers: BTreeMap::new(),
            uploads: Uploads::default(),
            contents: BTreeMap::new(),
            newest: None,
            revoked: BTreeSet::new(),
            deaf: Vec::new(),
            untold: VecDeque::new(),
            course: Course::Running,
            room: Room::default(),
            seen: Seen::default(),
            page: Page::default(),
            collected: Collected::default(),
        }
    }

    /// Runs until the run is over or `shutdown` says so.
    ///
    /// # Errors
    /// Why the run cannot go on.
    pub async fn run(mut self, mut inbox: Inbox, shutdown: impl Future<Output = ()>) -> Result<Outcome, FleetError> {
        let mut shutdown = pin!(shutdown);
        let (mut stopped, mut workshop_lives) = (false, true);
        let mut short_of_room = self.world.door.short_of_room.subscribe();
        let mut look = tokio::time::interval(LOOK_EVERY);
        let (leisure, mut vigil) = (Leisure::default(), Vigil::new());
        self.await_workshop(&mut inbox).await;
        self.drain_all(&leisure).await;
        while !self.has_parted() {
            let mut answers = false;
            vigil.wait();
            tokio::select! {
                Some(event) = inbox.connections.recv(), if !self.core.is_full() => {
                    vigil.answered();
                    self.hear(event);
                }
                done = inbox.workshop.recv(), if workshop_lives => match done {
                    Some(done) => {
                        vigil.answered();
                        answers = matches!(done, Done::Synced { .. });
                        self.take_in(done);
                    }
                    None => {
                        workshop_lives = false;
                        self.part(CloseCode::Internal, Err(FleetError::NoWorkshop));
                    }
                },
                Some(command) = inbox.commands.recv() => self.obey(command),
                () = sleep_until(self.began, self.core.alarm()) => self.input(Input::Tick),
                // The door that counts them is ours.
                Ok(()) = short_of_room.changed() => self.uploads_wait(*short_of_room.borrow_and_update() > 0),
                _ = look.tick() => self.look_around(),
                () = sleep_till(self.page.due) => self.make_page(),
                // Nobody is held up: what was said to workers goes first.
                () = leisure.come() => self.show().flush(),
                () = sleep_till(self.collected.looked_at) => {
                    if self.collected.is_ripe() {
                        self.world.workshop.write();
                    }
                }
                () = &mut shutdown, if !stopped => {
                    stopped = true;
                    self.show().say("going away; everything is kept");
                    self.input(Input::Stop);
                }
            }
            self.drain_all(&leisure).await;
            if answers {
                crash::point("answer.after");
            }
        }
        self.show().flush();
        self.close_workshop(inbox.workshop).await
    }

    /// The workshop ends when it has done what it was given. If the disk does not let it, it ends with the process: what
    /// anybody was told of is durable already.
    async fn close_workshop(self, mut workshop: mpsc::UnboundedReceiver<Done>) -> Result<Outcome, FleetError> {
        let Course::Parting { until, mut outcome } = self.course else { return Ok(Outcome::Stopped) };
        drop(self.world);
        let rest = async {
            while let Some(done) = workshop.recv().await {
                if let (Done::Broken(error), true) = (done, outcome.is_ok()) {
                    outcome = Err(error.into());
                }
            }
        };
        let _ = tokio::time::timeout_at(until.into(), rest).await;
        outcome
    }

    /// Before the first worker is given anything, what was saved must be ready to be streamed.
    async fn await_workshop(&mut self, inbox: &mut Inbox) {
        while let Some(done) = inbox.workshop.recv().await {
            match done {
                Done::Ready => return,
                done => self.take_in(done),
            }
        }
    }

    fn now(&self) -> Time {
        Time(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn input(&mut self, input: Input) {
        self.core.input(self.now(), input);
    }

    // --- outputs ---

    /// Does all that is to be done now. Whoever is told of a task begins while the next one is told.
    async fn drain_all(&mut self, leisure: &Leisure) {
        while self.drain() {
            turn().await;
        }
        if self.untold.len() > UNTOLD_MAX {
            self.show().flush();
        } else if !self.untold.is_empty() || self.world.show.has_lines() {
            leisure.ask();
        }
        self.collected.look(self.world.workshop.has_collected());
    }

    /// Does what is to be done now, up to a task that a worker is told of. Whether there may be more.
    fn drain(&mut self) -> bool {
        loop {
            while let Some(effect) = self.core.next() {
                self.page.is_stale = true;
                match effect {
                    Effect::Job(job) => self.job(job),
                    Effect::Tell(event) => self.untold.push_back(event),
                    Effect::Act(act) => {
                        let assigns = matches!(act, Act::Assign { .. });
                        self.act(act);
                        if assigns {
                            return true;
                        }
                    }
                    Effect::Foresee(conn, receipt) => self.say(conn, Saying::Foreseen(receipt)),
                }
            }
            let Some(conn) = self.deaf.pop() else { return false };
            self.input(Input::Misbehaved { conn, what: "it does not read".to_owned() });
        }
    }

    /// What people and programs see, by now.
    fn show(&mut self) -> &mut Show {
        while let Some(event) = self.untold.pop_front() {
            self.tell(event);
        }
        &mut self.world.show
    }

    /// Tells people and programs what happened.
    fn tell(&mut self, event: Event) {
        if event.is_commit() {
            self.seen.commit = Some(Instant::now());
        }
        self.world.door.telemetry.saw(&event);
        self.world.show.saw(&event);
        match event {
            Event::Committed { figures, .. } => self.world.page.send_modify(|page| page.figures = Some(*figures)),
            Event::Notice(
                Notice::Stage { .. }
                | Notice::Ready { .. }
                | Notice::Gone { .. }
                | Notice::Paused(_)
                | Notice::Waiting { .. },
            ) => self.show_page(),
            _ => {}
        }
    }

    fn job(&self, job: Job) {
        if matches!(job, Job::Append(_)) {
            self.world.door.telemetry.metrics.journal_records.increment(1);
        }
        self.world.workshop.give(job);
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Welcome { conn } => self.welcome(conn),
            Act::Assign { conn, assignment } => self.assign(conn, assignment),
            Act::Send { conn, message } => {
                self.uploads.answered(conn, &message);
                self.say(conn, Saying::Message(message));
            }
            Act::Receipt { conn, receipt } => {
                self.uploads.early.remove(&(conn, receipt.task));
                self.say(conn, Saying::Receipt(receipt));
            }
            Act::Receive { conn, task, kind, hash, bytes, go } => {
                let (ring, schema, spools) =
                    (self.core.machine().plan().ring, self.world.schema.clone(), self.world.spools.clone());
                self.receive(conn, Declared { task, kind, hash, bytes, ring, schema, spools }, go);
            }
            Act::Forget { task, .. } => {
                self.uploads.expected.remove(&task);
            }
            // Nobody begins from this model any more; the step needs the memory.
            Act::Step { .. } => self.contents.retain(|_, content| content.kind != Kind::Model),
            Act::Close { conn, why } => self.close(conn, &why),
            Act::Finish { evaluation } => self.course = Course::Finishing(evaluation),
            // The workshop's alone.
            Act::Fold { .. } | Act::Merge { .. } | Act::Train { .. } => {}
            Act::Fail { sentence } => self.part(CloseCode::Done, Err(FleetError::Failed(sentence))),
            Act::Conflict { round, recorded, redone } => {
                self.part(CloseCode::Internal, Err(FleetError::Conflict { round, recorded, redone }));
            }
            Act::End => self.part(CloseCode::GoingAway, Ok(Outcome::Stopped)),
        }
    }

    // --- what is said to workers ---

    fn say(&mut self, conn: ConnId, saying: Saying) {
        let Some(peer) = self.peers.get(&conn).filter(|peer| !peer.parting) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = peer.sayings.try_send(Box::new(saying)) {
            self.deaf.push(conn);
        }
    }

    fn welcome(&mut self, conn: ConnId) {
        let Some(peer) = self.peers.get(&conn) else { return };
        let plan = self.core.machine().plan();
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            run: self.core.machine().run(),
            ed25519: self.world.door.identity.signing.public(),
            name: peer.worker.name.clone(),
            weight_max: peer.worker.weight_max,
            norm_max: plan.ring.norm_max,
            learning: plan.learning.clone(),
        };
        self.say(conn, Saying::Message(ToWorker::Welcome(Box::new(welcome))));
    }

    /// Streams what the worker lacks, and tells it of its task.
    fn assign(&mut self, conn: ConnId, assignment: Assignment) {
        let Assignment { task, round, kind, schema, model, layout, weight_shift } = assignment;
        if self.peers.contains_key(&conn) {
            self.uploads.told.insert(conn, task);
        }
        let (schema, model) = (self.supply(conn, schema), self.supply(conn, model));
        let assigned = Assigned { task, round, kind, schema, model, layout, weight_shift };
        self.say(conn, Saying::Message(ToWorker::Assigned(Box::new(assigned))));
    }

    fn supply(&mut self, conn: ConnId, hash: Option<Hash>) -> Option<ContentRef> {
        let hash = hash?;
        let Some(content) = self.contents.get(&hash).cloned() else {
            self.part(CloseCode::Internal, Err(FleetError::NoContent(hash)));
            return None;
        };
        let reference = content.reference.clone();
        let peer = self.peers.get_mut(&conn)?;
        // What cannot be streamed any more need not be remembered.
        peer.had.retain(|id| self.contents.values().any(|content| content.reference.id == *id));
        if peer.had.insert(reference.id) {
            self.say(conn, Saying::Content(content));
        }
        Some(reference)
    }

    fn close(&mut self, conn: ConnId, why: &Gone) {
        let (code, reason) = match why {
            Gone::Disconnected | Gone::Left => (CloseCode::Done, String::new()),
            Gone::Silent | Gone::Stuck => (CloseCode::TimedOut, why.to_string()),
            Gone::Displaced => (CloseCode::Displaced, String::new()),
            // The sentence went ahead, sealed.
            Gone::Declined(_) => (CloseCode::Done, String::new()),
            Gone::Misbehaved(what) => (CloseCode::Misbehaved, what.clone()),
            Gone::Revoked => (CloseCode::Revoked, String::new()),
        };
        self.dismiss(conn, code, reason);
    }

    /// Says goodbye; the connection's end is heard later.
    fn dismiss(&mut self, conn: ConnId, code: CloseCode, reason: String) {
        self.uploads.leave(conn);
        let Some(peer) = self.peers.get_mut(&conn) else { return };
        if !std::mem::replace(&mut peer.parting, true) {
            // Who does not read is not waited for.
            if peer.sayings.try_send(Box::new(Saying::Close(code, reason.clone()))).is_err() {
                peer.link.close(code, &reason);
            }
        }
    }

    /// Says goodbye to everybody, and ends when they have heard it.
    fn part(&mut self, code: CloseCode, outcome: Result<Outcome, FleetError>) {
        if matches!(self.course, Course::Parting { .. }) {
            return;
        }
        self.course = Course::Parting { until: Instant::now() + PARTING_MAX, outcome };
        self.show().is_ending();
        let everybody: Vec<ConnId> = self.peers.keys().copied().collect();
        for conn in everybody {
            self.dismiss(conn, code, String::new());
        }
    }

    /// Whether everybody has heard the goodbye, and everything that was to be durable is.
    fn has_parted(&self) -> bool {
        let Course::Parting { until, outcome } = &self.course else { return false };
        let done = self.peers.is_empty() && (self.core.is_durable() || outcome.is_err());
        done || Instant::now() >= *until
    }

    // --- what connections hear ---

    fn hear(&mut self, event: FromConn) {
        match event {
            FromConn::Joined(joined) => self.join(*joined),
            FromConn::Said(conn, message) => self.input(Input::Said { conn, message }),
            FromConn::Offered(conn, manifest, authentic) => self.input(Input::Offered { conn, manifest, authentic }),
            FromConn::Upload(conn, upload, ticket) => self.uploads.begun(conn, upload, ticket),
            FromConn::Looked(number, task, found) => self.looked(number, task, found),
            FromConn::Received(ticket, task, received) => self.received(ticket, task, received),
            FromConn::Misbehaved(conn, what) => self.input(Input::Misbehaved { conn, what }),
            FromConn::Gone(conn) => {
                self.uploads.leave(conn);
                if let Some(mut peer) = self.peers.remove(&conn) {
                    peer.count_lost(&peer.link.stats(), &self.world.door.telemetry.metrics);
                }
                self.input(Input::Gone { conn });
            }
        }
    }

    fn join(&mut self, joined: Joined) {
        let Joined { conn, worker, instance, link, sayings } = joined;
        let (id, name, weight_max) = (worker.id, worker.name.clone(), worker.weight_max);
        let peer = Peer { worker, link, sayings, had: BTreeSet::new(), lost: 0, parting: false };
        self.peers.insert(conn, peer);
        if self.revoked.contains(&id) {
            return self.dismiss(conn, CloseCode::Revoked, String::new());
        }
        // Who comes while the others are let go after the run is let go, too; nothing else begins any more.
        let is_over = matches!(self.course, Course::Parting { outcome: Ok(Outcome::Finished), .. });
        if matches!(self.course, Course::Parting { .. }) && !is_over {
            return self.dismiss(conn, CloseCode::GoingAway, String::new());
        }
        self.input(Input::Joined { conn, worker: id, name, weight_max, instance });
    }

    fn receive(&mut self, conn: ConnId, declared: Declared, go: bool) {
        let (task, hash) = (declared.task, declared.hash);
        if go && declared.bytes > RESUME_BYTES_MIN {
            return self.look_for_part(conn, declared);
        }
        self.uploads.expect(conn, declared);
        if go {
            self.say(conn, Saying::Message(ToWorker::Go { task, hash, from: 0 }));
        }
    }

    /// Has what there is of a payload looked for, where nobody waits for the disk.
    fn look_for_part(&mut self, conn: ConnId, declared: Declared) {
        let Declared { task, hash, bytes, .. } = declared;
        let (spools, events) = (declared.spools.clone(), self.world.door.events.clone());
        let number = self.uploads.look(conn, declared);
        tokio::spawn(async move {
            let found = on_compute_pool(move || resume_from(&spools.run, task, hash, bytes)).await;
            // A loop that has ended wants to know nothing more.
            let _ = events.send(FromConn::Looked(number, task, found)).await;
        });
    }

    fn looked(&mut self, number: u64, task: TaskId, found: io::Result<Option<Part>>) {
        let part = found.unwrap_or_else(|error| {
            tracing::warn!("task {task}: what came before cannot be found, so that it comes again: {error}");
            None
        });
        if let Some((conn, hash, from)) = self.uploads.looked(number, task, part) {
            self.say(conn, Saying::Message(ToWorker::Go { task, hash, from }));
        }
    }

    fn received(&mut self, ticket: u64, task: TaskId, received: Received) {
        // What the machine no longer waits for, or waits for from another stream by now, is dropped here.
        let Some(hash) = self.uploads.ended(ticket, task) else { return };
        match received {
            Received::Whole(payload) => {
                let norm = payload.norm();
                self.job(Job::Keep(task, hash, payload));
                self.input(Input::Verified { task, hash, norm });
            }
            Received::Spoiled(refusal) => self.input(Input::Spoiled { task, hash, refusal }),
            Received::Cut => self.input(Input::Cut { task, hash }),
            Received::Foul(conn, what) => self.input(Input::Misbehaved { conn, what }),
            Received::Broken(error) => self.part(CloseCode::Internal, Err(FleetError::Spool(error))),
        }
    }

    // --- what the workshop made ---

    fn take_in(&mut self, done: Done) {
        match done {
            Done::Ready => {}
            Done::Learned(input) => self.input(input),
            Done::Sealed(content) => self.offer(content),
            Done::Schema(schema) => self.world.schema = Some(schema),
            Done::Synced { no, bytes, took } => self.synced(no, bytes, took),
            Done::OnDisk(bytes) => self.world.door.telemetry.metrics.state_bytes.set(lossy(bytes)),
            Done::DiskFull => self.workshop_waits(true),
            Done::DiskBack => self.workshop_waits(false),
            Done::Spooled(bytes) => self.world.door.telemetry.metrics.spool_bytes.set(lossy(bytes)),
            Done::Written(path) => self.written(&path),
            Done::Broken(error) => self.part(CloseCode::Internal, Err(error.into())),
        }
    }

    /// A content may be streamed from now on. In `central` mode the newest model is ahead of the newest commit, so the
    /// one before it stays, too.
    fn offer(&mut self, content: Arc<Content>) {
        if content.kind == Kind::Model {
            let former = self.newest.replace(content.reference.hash);
            self.contents.retain(|hash, content| content.kind != Kind::Model || Some(*hash) == former);
        }
        self.contents.insert(content.reference.hash, content);
    }

    /// Opens the gates of all that waited for this event or an earlier one.
    fn synced(&mut self, no: EventNo, bytes: u64, took: Duration) {
        let metrics = &self.world.door.telemetry.metrics;
        metrics.journal_sync_seconds.record(took.as_secs_f64());
        metrics.journal_bytes.increment(bytes);
        crash::point("answer.before");
        self.core.synced(no);
    }

    fn written(&mut self, path: &Path) {
        let Course::Finishing(evaluation) = self.course else { return };
        self.course = Course::Lingering;
        let status = self.core.machine().status();
        if let Some(model) = status.model {
            self.show().done(status.round, &evaluation, model, path);
        }
        if self.world.exit_when_done {
            self.part(CloseCode::Done, Ok(Outcome::Finished));
        } else {
            self.show().say("workers may come for the result; /metrics is served until Ctrl-C");
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Revoked(worker) => {
                self.revoked.insert(worker);
                self.input(Input::Revoked { worker });
            }
            Command::Abort => self.input(Input::Abort),
        }
    }

    // --- room on the disk ---

    fn uploads_wait(&mut self, wait: bool) {
        self.room.uploads_wait = wait;
        self.look_for_room();
    }

    fn workshop_waits(&mut self, waits: bool) {
        self.room.workshop_waits = waits;
        self.look_for_room();
    }

    /// Tells of a full disk once, whoever found it, and of room when nobody waits for any.
    fn look_for_room(&mut self) {
        let full = self.room.uploads_wait || self.room.workshop_waits;
        if std::mem::replace(&mut self.room.told, full) == full {
            return;
        }
        self.world.door.telemetry.metrics.disk_full.set(f64::from(u8::from(full)));
        self.input(if full { Input::DiskFull } else { Input::DiskBack });
        self.show_page();
    }

    // --- figures ---

    /// Takes the figures that no event brings.
    fn look_around(&mut self) {
        self.look_at_peers();
        if self.page.is_stale {
            self.show_page();
        }
        let metrics = &self.world.door.telemetry.metrics;
        if let Some(commit) = self.seen.commit {
            metrics.last_commit_age.set(commit.elapsed().as_secs_f64());
        }
        let counts = self.world.door.server.counts();
        metrics.connections.set(lossy(counts.connections as u64));
        if !std::mem::replace(&mut self.seen.full, counts.is_full()) && counts.is_full() {
            let most = counts.connections_max;
            self.world
                .show
                .say(&format!("{most} connections, and no more are taken; [limits] connections says how many"));
        }
        self.count_traffic();
        self.world.door.telemetry.upkeep();
    }

    fn look_at_peers(&mut self) {
        let last = ConnId(self.seen.peer);
        let turn = self.peers.range((Bound::Excluded(last), Bound::Unbounded)).chain(self.peers.range(..=last));
        let turn: Vec<ConnId> = turn.map(|(conn, _)| *conn).take(LOOKED_AT_MAX).collect();
        for conn in turn {
            self.seen.peer = conn.0;
            let Some(peer) = self.peers.get_mut(&conn) else { continue };
            let stats = peer.link.stats();
            let metrics = &self.world.door.telemetry.metrics;
            metrics.rtt.record(stats.rtt.as_secs_f64());
            peer.count_lost(&stats, metrics);
        }
    }

    fn count_traffic(&mut self) {
        let now = self.world.door.server.traffic();
        let before = self.seen.traffic.replace(now).unwrap_or_default();
        let metrics = &self.world.door.telemetry.metrics;
        metrics.quic_bytes.with(Direction::Out).increment(now.sent_bytes - before.sent_bytes);
        metrics.quic_bytes.with(Direction::In).increment(now.received_bytes - before.received_bytes);
        metrics.quic_datagrams.with(Direction::Out).increment(now.sent_datagrams - before.sent_datagrams);
        metrics.quic_datagrams.with(Direction::In).increment(now.received_datagrams - before.received_datagrams);
    }

    /// Sees to it that the page shows what is now: at once, or a little later if it was made just before.
    fn show_page(&mut self) {
        match self.page.rests_until.filter(|until| Instant::now() < *until) {
            Some(until) => self.page.due = Some(until),
            None => self.make_page(),
        }
    }

    fn make_page(&mut self) {
        let status = self.core.machine().status();
        let workers = u32::try_from(status.workers.len()).unwrap_or(u32::MAX);
        let rests_until = Some(Instant::now() + PAGE_EVERY_A_WORKER.saturating_mul(workers));
        self.page = Page { is_stale: false, due: None, rests_until };
        let metrics = &self.world.door.telemetry.metrics;
        let busy = status.workers.iter().filter(|(_, busy)| *busy).count();
        metrics.permits_in_use.set(f64::from(status.permits_in_use));
        metrics.workers.with(WorkerState::Connected).set(lossy(status.workers.len() as u64));
        metrics.workers.with(WorkerState::Busy).set(lossy(busy as u64));
        metrics.workers.with(WorkerState::Enrolled).set(lossy(self.world.door.registrar.enrolled() as u64));
        self.world.page.send_modify(|page| {
            page.listening = true;
            page.address = Some(self.world.address);
            page.status = Some(status);
            page.disk_full = self.room.told;
        });
    }
}

impl Collected {
    /// Something is collected now, or nothing.
    fn look(&mut self, something: bool) {
        self.since = if something { self.since.or_else(|| Some(Instant::now())) } else { None };
        self.looked_at = self.looked_at.or_else(|| self.since.map(|since| since + WRITTEN_AFTER));
    }

    /// Whether it has waited long enough, and is written now.
    fn is_ripe(&mut self) -> bool {
        let ripe = self.since.take_if(|since| since.elapsed() >= WRITTEN_AFTER).is_some();
        self.looked_at = self.since.map(|since| since + WRITTEN_AFTER);
        ripe
    }
}

impl Peer {
    fn count_lost(&mut self, stats: &LinkStats, metrics: &Metrics) {
        metrics.lost_packets.increment(stats.lost_packets.saturating_sub(self.lost));
        self.lost = stats.lost_packets;
    }
}

impl Expected {
    fn new(conn: ConnId, declared: Declared, begins: Begins) -> Self {
        Self { conn, declared, begins, part: None, under_way: None }
    }

    /// Whether a stream is the one that is waited for.
    fn is(&self, conn: ConnId, hash: Hash, from: u64) -> bool {
        (self.conn, self.declared.hash, self.begins) == (conn, hash, Begins::At(from))
    }
}

impl Uploads {
    /// The machine waits for all of this from now on, and for nothing else for the same task.
    fn expect(&mut self, conn: ConnId, declared: Declared) {
        let task = declared.task;
        self.expected.insert(task, Expected::new(conn, declared, Begins::At(0)));
        self.meet(task);
    }

    /// As [`Self::expect`], once it is known how much of it is here: what is found is told under this number.
    fn look(&mut self, conn: ConnId, declared: Declared) -> u64 {
        self.tickets += 1;
        self.expected.insert(declared.task, Expected::new(conn, declared, Begins::LookedFor(self.tickets)));
        self.tickets
    }

    /// What is here was looked for: whose payload may come from where on, if it is still waited for.
    fn looked(&mut self, number: u64, task: TaskId, part: Option<Part>) -> Option<(ConnId, Hash, u64)> {
        let expected = self.expected.get_mut(&task).filter(|e| e.begins == Begins::LookedFor(number))?;
        let from = part.as_ref().map_or(0, Part::from);
        (expected.begins, expected.part) = (Begins::At(from), part);
        let told = (expected.conn, expected.declared.hash, from);
        self.meet(task);
        Some(told)
    }

    /// Lets in a stream that came before what it is for.
    fn meet(&mut self, task: TaskId) {
        let Some(expected) = self.expected.get(&task) else { return };
        let Some(early) = self.early.remove(&(expected.conn, task)) else { return };
        if expected.is(expected.conn, early.hash, early.from) {
            self.let_in(task, early.ticket);
        }
    }

    /// A stream has begun.
    fn begun(&mut self, conn: ConnId, upload: Upload, ticket: oneshot::Sender<Ticket>) {
        let Upload { task, hash, from } = upload;
        let expected = self.expected.get(&task).filter(|expected| expected.is(conn, hash, from));
        match expected.map(|expected| expected.under_way.is_some()) {
            Some(false) => self.let_in(task, ticket),
            // Said twice: one of them is on its way.
            Some(true) => drop(ticket),
            None => self.wait(conn, task, Early { hash, from, ticket }),
        }
    }

    /// A worker has one task at a time: of its streams only that of the task it was told of last waits, or else the newest
    /// task's; a round that is made again has older tasks. One that was answered before it came would only take the place,
    /// of which QUIC has few, that the next payload needs.
    fn wait(&mut self, conn: ConnId, task: TaskId, early: Early) {
        let told = self.told.get(&conn).copied();
        let rank = |task: TaskId| (Some(task) == told, task);
        if self.early.keys().any(|(of, other)| *of == conn && rank(*other) > rank(task)) {
            return;
        }
        // Those who gave up waiting make room, too.
        self.early.retain(|(of, _), early| *of != conn && !early.ticket.is_closed());
        self.early.insert((conn, task), early);
    }

    fn let_in(&mut self, task: TaskId, ticket: oneshot::Sender<Ticket>) {
        let Some(expected) = self.expected.get_mut(&task) else { return };
        self.tickets += 1;
        let (hold, stop) = oneshot::channel();
        expected.under_way = Some((self.tickets, hold));
        let (declared, part) = (expected.declared.clone(), expected.part.take());
        // A stream that is gone by now has its connection end, which is heard, too.
        let _ = ticket.send(Ticket { number: self.tickets, declared, part, stop });
    }

    /// A stream has ended: the hash that was waited for, if it was this one.
    fn ended(&mut self, ticket: u64, task: TaskId) -> Option<Hash> {
        let expected = self.expected.get(&task)?;
        if expected.under_way.as_ref()?.0 != ticket {
            return None;
        }
        self.expected.remove(&task).map(|expected| expected.declared.hash)
    }

    /// An answer to an offer also answers the stream that came with it.
    fn answered(&mut self, conn: ConnId, message: &ToWorker) {
        if let ToWorker::Held { task, .. }
        | ToWorker::AlreadyHeld { task, .. }
        | ToWorker::Late { task }
        | ToWorker::Refused { task, .. } = message
        {
            self.early.remove(&(conn, *task));
        }
    }

    fn leave(&mut self, conn: ConnId) {
        self.told.remove(&conn);
        self.early.retain(|(of, _), _| *of != conn);
    }
}

/// Lets everybody have a turn who is to have one now.
async fn turn() {
    let mut had = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut had, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Says when nobody has anything to do, to who asked for it. A task of its own finds out: one that is woken for other
/// reasons, too, cannot tell why.
#[derive(Debug)]
struct Leisure {
    asked: Arc<Notify>,
    come: Arc<Notify>,
    _watch: JoinSet<()>,
}

impl Default for Leisure {
    fn default() -> Self {
        let (asked, come) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (ask, say) = (Arc::clone(&asked), Arc::clone(&come));
        let mut watch = JoinSet::new();
        watch.spawn(async move {
            loop {
                ask.notified().await;
                tokio::task::yield_now().await;
                say.notify_one();
            }
        });
        Self { asked, come, _watch: watch }
    }
}

impl Leisure {
    fn ask(&self) {
        self.asked.notify_one();
    }

    async fn come(&self) {
        self.come.notified().await;
    }
}

/// Sleeps until `alarm`, which counts from `began`; for ever without one.
async fn sleep_until(began: Instant, alarm: Option<Time>) {
    sleep_till(alarm.map(|Time(nanos)| began + Duration::from_nanos(nanos))).await;
}

/// Sleeps until `due`; for ever without one.
async fn sleep_till(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// The directory of large payloads that have no name: made anew, empty.
///
/// # Errors
/// If it cannot be.
pub fn fresh_spool(path: PathBuf) -> Result<PathBuf, StateError> {
    match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(StateError::io(&path, "empty")(error));
        }
        _ => {}
    }
    crate::state::make_private_dir(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use protocol::messages::TaskKind;
    use protocol::sum::Ring;

    const ALICE: ConnId = ConnId(1);
    const BOB: ConnId = ConnId(2);
    const TASK: TaskId = TaskId(7);

    fn declared(hash: u8) -> Declared {
        Declared {
            task: TASK,
            kind: TaskKind::Update,
            hash: Hash([hash; 32]),
            bytes: 4,
            ring: Ring::weighted(),
            schema: None,
            spools: Arc::new(Spools { run: PathBuf::new(), rows: PathBuf::new(), durable: false }),
        }
    }

    fn upload(hash: u8) -> Upload {
        Upload { task: TASK, hash: Hash([hash; 32]), from: 0 }
    }

    #[test]
    fn a_stream_and_its_act_meet_in_either_order() {
        for stream_first in [true, false] {
            let mut uploads = Uploads::default();
            let (ticket, mut granted) = oneshot::channel();
            if stream_first {
                uploads.begun(ALICE, upload(1), ticket);
                assert!(granted.try_recv().is_err());
                uploads.expect(ALICE, declared(1));
            } else {
                uploads.expect(ALICE, declared(1));
                uploads.begun(ALICE, upload(1), ticket);
            }
            let ticket = granted.try_recv().unwrap();
            assert_eq!(uploads.ended(ticket.number, TASK), Some(Hash([1; 32])));
            assert_eq!(uploads.ended(ticket.number, TASK), None);
        }
    }

    #[test]
    fn what_is_collected_is_written_only_if_no_sync_takes_it_along() {
        let mut collected = Collected::default();
        let long_ago = Instant::now() - WRITTEN_AFTER;
        collected.look(false);
        assert_eq!(collected.looked_at, None, "there is nothing to look at");

        collected = Collected { since: Some(long_ago), looked_at: Some(long_ago + WRITTEN_AFTER) };
        assert!(collected.is_ripe());
        assert_eq!(collected.looked_at, None);

        collected = Collected { since: Some(long_ago), looked_at: Some(long_ago + WRITTEN_AFTER) };
        collected.look(false); // a sync has taken it
        collected.look(true);
        assert!(!collected.is_ripe(), "it has not waited long");
        assert!(collected.looked_at > Some(Instant::now()), "it is looked at again");
    }

    #[test]
    fn what_was_not_offered_is_not_let_in() {
        let mut uploads = Uploads::default();
        uploads.expect(ALICE, declared(1));
        for (conn, hash) in [(ALICE, 2), (BOB, 1)] {
            let (ticket, mut granted) = oneshot::channel();
            uploads.begun(conn, upload(hash), ticket);
            assert!(matches!(granted.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        }
        uploads.answered(ALICE, &ToWorker::Late { task: TASK });
        uploads.leave(BOB);
        assert!(uploads.early.is_empty());
    }

    #[test]
    fn a_stream_that_begins_elsewhere_than_was_granted_is_not_let_in() {
        let mut uploads = Uploads::default();
        uploads.expect(ALICE, declared(1));
        let (ticket, mut granted) = oneshot::channel();
        uploads.begun(ALICE, Upload { from: 65_536, ..upload(1) }, ticket);
        assert!(matches!(granted.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        let (ticket, mut granted) = oneshot::channel();
        uploads.begun(ALICE, upload(1), ticket);
        assert!(granted.try_recv().is_ok());
    }

    #[test]
    fn a_stream_is_let_in_once_it_is_known_how_much_of_its_payload_is_here() {
        let mut uploads = Uploads::default();
        let (ticket, mut granted) = oneshot::channel();
        let first = uploads.look(ALICE, declared(1));
        let second = uploads.look(ALICE, declared(1));
        uploads.begun(ALICE, upload(1), ticket);
        assert_eq!(uploads.looked(first, TASK, None), None, "it is looked for again");
        assert!(granted.try_recv().is_err());
        assert_eq!(uploads.looked(second, TASK, None), Some((ALICE, Hash([1; 32]), 0)));
        assert!(granted.try_recv().is_ok());
        assert_eq!(uploads.looked(second, TASK, None), None);

        let number = uploads.look(ALICE, declared(1));
        uploads.expected.remove(&TASK);
        assert_eq!(uploads.looked(number, TASK, None), None, "nobody waits for it any more");
    }

    #[test]
    fn a_second_stream_for_the_same_payload_is_turned_away() {
        let mut uploads = Uploads::default();
        uploads.expect(ALICE, declared(1));
        let (first, _granted) = oneshot::channel();
        uploads.begun(ALICE, upload(1), first);
        let (second, mut granted) = oneshot::channel();
        uploads.begun(ALICE, upload(1), second);
        assert!(matches!(granted.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    }

    #[test]
    fn a_newer_offer_stops_the_stream_of_the_older_one_and_its_end_does_not_count() {
        let mut uploads = Uploads::default();
        uploads.expect(ALICE, declared(1));
        let (first, mut granted) = oneshot::channel();
        uploads.begun(ALICE, upload(1), first);
        let mut old = granted.try_recv().unwrap();
        uploads.expect(ALICE, declared(2));
        assert!(matches!(old.stop.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert_eq!(uploads.ended(old.number, TASK), None);
        assert!(uploads.expected.contains_key(&TASK));
    }

    #[test]
    fn of_a_workers_early_streams_only_the_newest_tasks_waits() {
        let mut uploads = Uploads::default();
        let mut waiting = |task, conn| {
            let (ticket, granted) = oneshot::channel();
            uploads.begun(conn, Upload { task: TaskId(task), ..upload(1) }, ticket);
            granted
        };
        let (mut older, mut bobs, mut newest, mut oldest) =
            (waiting(3, ALICE), waiting(1, BOB), waiting(u64::MAX, ALICE), waiting(2, ALICE));
        let turned_away = |granted: &mut oneshot::Receiver<Ticket>| {
            matches!(granted.try_recv(), Err(oneshot::error::TryRecvError::Closed))
        };
        assert!(turned_away(&mut older) && turned_away(&mut oldest));
        assert!(!turned_away(&mut newest) && !turned_away(&mut bobs));
    }

    #[test]
    fn the_stream_of_the_task_that_a_worker_was_told_of_waits_before_a_newer_one() {
        let mut uploads = Uploads::default();
        uploads.told.insert(ALICE, TaskId(2));
        let mut waiting = |task| {
            let (ticket, granted) = oneshot::channel();
            uploads.begun(ALICE, Upload { task: TaskId(task), ..upload(1) }, ticket);
            granted
        };
        // The first was answered before it came.
        let (mut late, mut told, mut later) = (waiting(3), waiting(2), waiting(4));
        let turned_away = |granted: &mut oneshot::Receiver<Ticket>| {
            matches!(granted.try_recv(), Err(oneshot::error::TryRecvError::Closed))
        };
        assert!(turned_away(&mut late) && turned_away(&mut later) && !turned_away(&mut told));
        uploads.leave(ALICE);
        assert!(turned_away(&mut told) && uploads.told.is_empty());
    }

    #[test]
    fn streams_that_gave_up_waiting_are_forgotten() {
        let mut uploads = Uploads::default();
        for task in 0..100 {
            let (ticket, granted) = oneshot::channel();
            drop(granted);
            uploads.begun(ALICE, Upload { task: TaskId(task), ..upload(1) }, ticket);
        }
        assert_eq!(uploads.early.len(), 1);
    }
}
