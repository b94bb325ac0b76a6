//! The training run as a value.
//!
//! [`Federation`] owns one run: who is in, which task is whose, which updates count, when a round ends. It eats
//! [`Input`]s and is drained of [`Output`]s; sockets, disks, tensors and clocks are the shell's. The calling
//! contract: hand in one input with [`Federation::handle`], then call [`Federation::poll`] until it gives
//! [`Output::Wait`]; then, and only then, sleep.
//!
//! `handle` checks everything first and then emits events, each of which changes durable state through
//! [`Federation::apply`] and nothing else. Acts name the event they rest on: a shell that appends, syncs and only
//! then releases cannot announce what is not durable. Whatever is not durable (sessions, timers, payloads on their
//! way) is one volatile struct that starts empty.
//!
//! A restart is a replay: [`Federation::new`], [`Federation::apply`] of every fact that the store has, in order, and
//! then [`Input::Start`] as the first input, which takes up the open work.

mod events;
mod offers;
#[doc(hidden)]
pub mod planted;
mod rounds;
mod state;
#[cfg(test)]
mod tests;

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use events::{
    Act, Assignment, Entry, Event, EventNo, Frozen, Gate, Gone, HeldUpdate, Input, Notice, Output, Pause, RoundFigures,
    Stage, Summary, SurveyOutcome, Withdrawal,
};
pub use state::{DURATIONS_KEPT, REVERT_MAX};

use crate::ids::{ConnId, Hash, Instance, RunId, TaskId, Time, WorkerId, WorkerName};
use crate::limits::{NO_STEP_MAX, SILENCE_MAX, UPLOAD_PERMITS};
use crate::messages::{FromWorker, Leave, ToWorker};
use crate::plan::Plan;
use offers::Receiving;
use state::{Durable, Phase};

/// One training run.
#[derive(Debug)]
pub struct Federation {
    plan: Plan,
    durable: Durable,
    volatile: Volatile,
}

/// What a restart forgets.
#[derive(Debug, Default)]
struct Volatile {
    now: Time,
    sessions: BTreeMap<ConnId, Session>,
    /// The live connection of each worker that has one.
    by_worker: BTreeMap<WorkerId, ConnId>,
    /// Those who parted while a round was made again: what they have open of the round after it is withdrawn then.
    parted: BTreeSet<WorkerId>,
    /// How many sessions are ready: whoever comes is told of, and must not cost a look at everybody.
    ready: usize,
    outputs: VecDeque<Output>,
    /// How many events were emitted since the start.
    events: u64,
    /// The last commit: what tells of a model rests on it.
    commit: Option<EventNo>,
    timers: Timers,
    /// Offers that were accepted and whose payload is not held yet.
    receiving: BTreeMap<TaskId, Receiving>,
    /// Large payloads that wait for a permit, in order of arrival.
    queue: VecDeque<TaskId>,
    permits_used: u32,
    folded: BTreeSet<TaskId>,
    /// How often each open task was told to its worker.
    announced: BTreeMap<TaskId, u32>,
    stage_began: Time,
    work_began: Time,
    /// Whether the first work of this process has begun: later rounds do not count down.
    begun: bool,
    /// The deadline has passed and the last extension with it, or nobody is left to wait for.
    overdue: bool,
    paused: Option<Pause>,
    /// Too few are in, and so many were when it was last looked: more are told of as they come, fewer are said.
    lacking: Option<u32>,
    /// The surveys contradict each other: nothing is asked again until the fleet changes.
    blocked: bool,
    /// Somebody came or went since absence was last looked for.
    fleet_changed: bool,
    /// Surveys are being merged.
    merging: bool,
    /// The new model of the closed round is being made.
    stepping: bool,
    /// When the run paused, if it is paused; and how long the open work has been paused altogether.
    paused_at: Option<Time>,
    paused_for: Duration,
    /// There is no room on the disk: nobody is late meanwhile.
    disk_full: bool,
    /// In `central` mode: the model that the coordinator made of the open round.
    trained: Option<(Hash, Option<f64>)>,
    /// `GoingAway` was said: nothing new begins.
    stopping: bool,
}

/// One live connection.
#[derive(Debug)]
struct Session {
    worker: WorkerId,
    name: WorkerName,
    instance: Instance,
    weight_max: u32,
    /// It read the plan, and its owner allows it.
    ready: bool,
    heard: Time,
    /// Training steps in the open task, and when they last grew.
    steps: u64,
    stepped: Time,
}

/// What time does to a run. A table, not spawned tasks.
#[derive(Debug, Default)]
struct Timers {
    /// Two are in, and a third is waited for until then.
    countdown: Option<Time>,
    /// The open work's deadline, and whether only somebody's absence set it.
    deadline: Option<Deadline>,
    /// When silence is next looked for.
    sweep: Option<Time>,
}

#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Time,
    length: Duration,
    for_absence: bool,
}

/// How often silence is looked for while tasks are open.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What the status page and the operator's commands are told.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The run.
    pub run: RunId,
    /// Where it is.
    pub stage: Stage,
    /// Committed rounds.
    pub round: u32,
    /// Rounds in the plan.
    pub rounds: u32,
    /// The newest model.
    pub model: Option<Hash>,
    /// Live workers by name, and whether each has an open task.
    pub workers: Vec<(WorkerName, bool)>,
    /// Workers that the open round waits for.
    pub waiting_for: Vec<WorkerName>,
    /// Large payloads on their way.
    pub permits_in_use: u32,
    /// Why the run is paused, if it is.
    pub paused: Option<String>,
    /// How many more workers it takes for anything to begin; 0 while something is under way.
    pub workers_lacking: u32,
}

impl Federation {
    /// A run before its first event. Next: every fact that the store has, and [`Input::Start`].
    #[must_use]
    pub fn new(plan: Plan, run: RunId) -> Self {
        Self { plan, durable: Durable::new(run), volatile: Volatile::default() }
    }

    /// Takes in one input. Total: whatever a peer can send gets an answer, a refusal or silence, never a panic.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.volatile.now = now.max(self.volatile.now);
        match input {
            Input::Start { start, whole } => self.start(start, whole),
            Input::Joined { conn, worker, name, weight_max, instance } => {
                self.joined(conn, Session::new(worker, name, weight_max, instance, self.volatile.now));
            }
            Input::Said { conn, message } => self.said(conn, message),
            Input::Offered { conn, manifest, authentic } => self.offered(conn, &manifest, authentic),
            Input::Gone { conn } => self.gone(conn, Gone::Disconnected),
            Input::Misbehaved { conn, what } => self.misbehaved(conn, what),
            Input::Verified { task, hash, norm } => self.verified(task, hash, norm),
            Input::Spoiled { task, hash, refusal } => self.spoiled(task, hash, refusal),
            Input::Cut { task, hash } => self.cut(task, hash),
            Input::Folded { task } => self.fold_done(task),
            Input::Lost { task, hash } => self.lost(task, hash),
            Input::Surveyed(outcome) => self.surveyed(outcome),
            Input::Stepped { round, model, train_loss } => self.stepped(round, model, train_loss),
            Input::StepFailed { round, sentence } => self.step_failed(round, sentence),
            Input::Revoked { worker } => self.revoked(worker),
            Input::DiskFull => self.disk_full(),
            Input::DiskBack => self.disk_back(),
            Input::Abort => self.abort("aborted by the operator".to_owned(), &ToWorker::Aborted),
            Input::Stop => self.stop(),
            Input::Tick => self.tick(),
        }
        self.advance();
    }

    /// Takes in one event: the only way that durable state changes. A replay calls this and nothing else.
    pub fn apply(&mut self, event: &Event) {
        self.durable.apply(event);
    }

    /// The next thing to do. Call until [`Output::Wait`].
    pub fn poll(&mut self) -> Output {
        self.volatile.outputs.pop_front().unwrap_or_else(|| Output::Wait(self.next_time()))
    }

    /// Where the run is, in figures and hashes.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let durable = &self.durable;
        Summary {
            run: durable.run,
            frozen: durable.frozen,
            model: durable.model,
            round: durable.round(),
            figures: durable.figures,
            finished: match &durable.phase {
                Phase::Finished(evaluation) => Some(*evaluation),
                _ => None,
            },
            aborted: matches!(durable.phase, Phase::Aborted),
        }
    }

    /// Whether both have the same durable state, as a run and a replay of its facts must.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        self.durable == other.durable
    }

    /// The committed update of a task, and the round that it is in.
    #[must_use]
    pub fn committed(&self, task: TaskId) -> Option<(u32, Entry)> {
        self.durable.committed.get(&task).copied()
    }

    /// What an operator is told.
    #[must_use]
    pub fn status(&self) -> Status {
        let open: BTreeSet<WorkerId> = self.open_tasks().map(|(_, task)| task.worker).collect();
        let live = self.volatile.sessions.values();
        Status {
            run: self.durable.run,
            stage: self.durable.phase.stage(),
            round: self.durable.round(),
            rounds: self.plan.learning.train.rounds,
            model: self.durable.model,
            workers: live.map(|session| (session.name.clone(), open.contains(&session.worker))).collect(),
            waiting_for: self.open_tasks().map(|(_, task)| task.name.clone()).collect(),
            permits_in_use: self.volatile.permits_used,
            paused: self.pause_told().map(|pause| pause.to_string()),
            workers_lacking: self.workers_lacking(),
        }
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    fn open_tasks(&self) -> impl Iterator<Item = (TaskId, &state::Task)> {
        self.durable.phase.work().into_iter().flat_map(state::Work::open)
    }

    // --- outputs ---

    /// Applies a fact and hands it out.
    fn emit(&mut self, event: Event) -> EventNo {
        let before = self.durable.phase.stage();
        self.apply(&event);
        let number = self.append(event);
        let stage = self.durable.phase.stage();
        if stage != before {
            let seconds = self.volatile.now.since(self.volatile.stage_began).as_secs_f64();
            self.volatile.stage_began = self.volatile.now;
            self.notice(Notice::Stage { stage, before, seconds });
        }
        number
    }

    fn append(&mut self, event: Event) -> EventNo {
        self.volatile.events += 1;
        let number = EventNo(self.volatile.events);
        if event.is_commit() {
            self.volatile.commit = Some(number);
        }
        self.volatile.outputs.push_back(Output::Append(event));
        number
    }

    fn notice(&mut self, notice: Notice) {
        self.append(Event::Notice(notice));
    }

    /// An act that rests on what was emitted so far.
    fn act(&mut self, act: Act) {
        let after = Gate::Appended(EventNo(self.volatile.events));
        self.volatile.outputs.push_back(Output::Act { after, act });
    }

    /// An act that tells of a model, and so rests on the commit that made it.
    fn act_on_commit(&mut self, act: Act) {
        let after = self.volatile.commit.map_or(Gate::Appended(EventNo(self.volatile.events)), Gate::Synced);
        self.volatile.outputs.push_back(Output::Act { after, act });
    }

    fn send(&mut self, conn: ConnId, message: ToWorker) {
        self.act(Act::Send { conn, message });
    }

    // --- the start ---

    /// Takes the run up where its journal ends.
    fn start(&mut self, start: u32, whole: Option<u32>) {
        let (before, stage) = (Stage::Gathering, self.durable.phase.stage());
        if stage != before {
            self.notice(Notice::Stage { stage, before, seconds: 0.0 });
        }
        self.emit(Event::Started { start });
        let whole = whole.unwrap_or_else(|| self.durable.round());
        if self.durable.whole() != whole {
            self.emit(Event::Reverted { round: whole });
        }
        // The end of the journal was lost while work was given out: nobody has done any of it yet.
        if self.durable.phase.work().is_some_and(|work| work.selected() < work.wanted) {
            self.emit(Event::Voided);
        }
        self.volatile.work_began = self.volatile.now;
        self.take_up();
    }

    fn take_up(&mut self) {
        let Some(work) = self.durable.phase.work() else { return };
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (round, held, open) = (work.round, count(work.held_count()), count(work.open_count()));
        (self.volatile.begun, self.volatile.fleet_changed) = (true, true);
        self.notice(Notice::TakenUp { round, held, open });
        self.fold_all();
    }

    // --- sessions ---

    fn joined(&mut self, conn: ConnId, session: Session) {
        if self.volatile.sessions.contains_key(&conn) {
            return self.misbehaved(conn, "it joined twice".to_owned());
        }
        if let Some(&other) = self.volatile.by_worker.get(&session.worker) {
            // What was said on the older connection may come after all that was said on the newer one.
            let older = other.min(conn);
            // The same process on a new connection has not been displaced, and must not be told so on the old one.
            let is_same = self.volatile.sessions.get(&other).is_some_and(|there| there.instance == session.instance);
            let why = if is_same { Gone::Disconnected } else { Gone::Displaced };
            if !is_same {
                self.send(older, ToWorker::Displaced);
            }
            if older == conn {
                return self.act(Act::Close { conn, why });
            }
            self.eject(older, why);
        }
        self.volatile.by_worker.insert(session.worker, conn);
        self.volatile.parted.remove(&session.worker);
        self.volatile.fleet_changed = true;
        self.notice(Notice::Joined { name: session.name.clone() });
        self.volatile.sessions.insert(conn, session);
        self.act(Act::Welcome { conn });
    }

    fn said(&mut self, conn: ConnId, message: FromWorker) {
        let now = self.volatile.now;
        let Some(session) = self.volatile.sessions.get_mut(&conn) else { return };
        session.heard = now;
        match message {
            FromWorker::Ready => self.ready(conn),
            FromWorker::Failed { task, failure } => self.failed(conn, task, failure),
            FromWorker::Beat { steps, .. } => {
                if steps != session.steps {
                    (session.steps, session.stepped) = (steps, now);
                }
            }
            FromWorker::Leaving(leave) => self.leaving(conn, leave),
            FromWorker::Join { .. } | FromWorker::Offer(_) => {
                self.misbehaved(conn, "a message out of turn".to_owned());
            }
        }
    }

    fn ready(&mut self, conn: ConnId) {
        let Some(session) = self.volatile.sessions.get_mut(&conn) else { return };
        if core::mem::replace(&mut session.ready, true) {
            return;
        }
        let (name, worker) = (session.name.clone(), session.worker);
        self.volatile.ready += 1;
        (self.volatile.blocked, self.volatile.fleet_changed) = (false, true);
        let workers = u32::try_from(self.volatile.ready).unwrap_or(u32::MAX);
        self.notice(Notice::Ready { name, workers });
        self.receipts_of_last(conn, worker);
        match &self.durable.phase {
            Phase::Finished(_) => self.let_go(conn),
            Phase::Aborted => self.send(conn, ToWorker::Aborted),
            _ => self.give_again(conn, worker),
        }
    }

    fn ready_workers(&self) -> impl Iterator<Item = (ConnId, &Session)> {
        self.volatile.sessions.iter().filter(|(_, session)| session.ready).map(|(conn, session)| (*conn, session))
    }

    fn leaving(&mut self, conn: ConnId, leave: Leave) {
        let Some(worker) = self.volatile.sessions.get(&conn).map(|session| session.worker) else { return };
        let why = match leave {
            Leave::Stopping => Gone::Left,
            Leave::NotAllowed(sentence) | Leave::DataUnfit(sentence) => {
                self.withdraw_of(worker);
                Gone::Declined(sentence)
            }
        };
        self.eject(conn, why);
    }

    /// Its task is withdrawn also if it is away: it will not come back for it.
    fn revoked(&mut self, worker: WorkerId) {
        self.withdraw_of(worker);
        if let Some(&conn) = self.volatile.by_worker.get(&worker) {
            self.eject(conn, Gone::Revoked);
        }
    }

    /// Whoever is thrown out is not waited for.
    fn misbehaved(&mut self, conn: ConnId, what: String) {
        if let Some(worker) = self.volatile.sessions.get(&conn).map(|session| session.worker) {
            self.withdraw_of(worker);
        }
        self.eject(conn, Gone::Misbehaved(what));
    }

    fn eject(&mut self, conn: ConnId, why: Gone) {
        if self.volatile.sessions.contains_key(&conn) {
            self.act(Act::Close { conn, why: why.clone() });
            self.gone(conn, why);
        }
    }

    fn gone(&mut self, conn: ConnId, why: Gone) {
        let Some(session) = self.volatile.sessions.remove(&conn) else { return };
        self.volatile.ready -= usize::from(session.ready);
        if self.volatile.by_worker.get(&session.worker) == Some(&conn) {
            self.volatile.by_worker.remove(&session.worker);
        }
        (self.volatile.blocked, self.volatile.fleet_changed) = (false, true);
        self.stop_receiving_from(conn);
        self.notice(Notice::Gone { name: session.name, why });
    }

    fn stop(&mut self) {
        self.volatile.stopping = true;
        self.volatile.timers = Timers::default();
        let conns: Vec<ConnId> = self.volatile.sessions.keys().copied().collect();
        for conn in conns {
            self.send(conn, ToWorker::GoingAway);
        }
        self.act(Act::End);
    }

    // --- time ---

    /// When something is due. While the disk is full, no deadline is.
    fn next_time(&self) -> Option<Time> {
        let timers = &self.volatile.timers;
        let deadline = timers.deadline.filter(|_| !self.volatile.disk_full).map(|deadline| deadline.at);
        [timers.countdown, deadline, timers.sweep].into_iter().flatten().min()
    }

    fn tick(&mut self) {
        if self.volatile.stopping {
            return;
        }
        let now = self.volatile.now;
        if self.volatile.timers.sweep.is_some_and(|at| at <= now) {
            self.volatile.timers.sweep = None;
            self.sweep();
        }
        let due = |deadline: &Deadline| deadline.at <= now && !self.volatile.disk_full;
        if let Some(deadline) = self.volatile.timers.deadline.filter(due) {
            self.volatile.timers.deadline = None;
            self.deadline_passed(deadline);
        }
    }

    /// Lets go of workers with an open task that are silent or stuck.
    fn sweep(&mut self) {
        let now = self.volatile.now;
        let with_tasks: BTreeSet<WorkerId> = self.open_tasks().map(|(_, task)| task.worker).collect();
        let live = with_tasks.iter().filter_map(|worker| self.volatile.by_worker.get(worker));
        let sessions = live.filter_map(|conn| Some((conn, self.volatile.sessions.get(conn)?)));
        let gone: Vec<(ConnId, Gone)> = sessions
            .filter_map(|(conn, session)| {
                let silent = now.since(session.heard) >= SILENCE_MAX;
                let uploading = self.volatile.receiving.values().any(|r| r.is_from(*conn));
                let stuck = now.since(session.stepped) >= NO_STEP_MAX && !uploading;
                let why = if silent { Gone::Silent } else { Gone::Stuck };
                (silent || stuck).then_some((*conn, why))
            })
            .collect();
        for (conn, why) in gone {
            self.eject(conn, why);
        }
    }

    /// The permits of [`UPLOAD_PERMITS`] that are free.
    fn permits_free(&self) -> u32 {
        UPLOAD_PERMITS.saturating_sub(self.volatile.permits_used)
    }

    fn task_is_open(&self, task: TaskId) -> bool {
        let task = self.durable.phase.work().and_then(|work| work.tasks.get(&task));
        task.is_some_and(|task| task.state.is_open())
    }
}

impl Session {
    fn new(worker: WorkerId, name: WorkerName, weight_max: u32, instance: Instance, now: Time) -> Self {
        Self { worker, name, instance, weight_max, ready: false, heard: now, steps: 0, stepped: now }
    }
}
