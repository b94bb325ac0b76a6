//! A world: one queue of happenings in simulated time, a network, and whatever fails.
//!
//! Happenings are ordered by time and then by number, and every delay is drawn from the seed, so a seed is one world and
//! no other. The two shells are beside this: [`super::coordinator`] and [`super::worker`].

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use coordinator::store::disk::Disk;
use coordinator::store::journal::{self, Scope};
use coordinator::store::run::{JOURNAL, MODELS_KEPT};
use coordinator::workshop::{Content, Done};
use protocol::draw::Draw;
use protocol::federation::{Gone, Input, Stage};
use protocol::ids::{ConnId, Hash, Instance, RunId, Time, WorkerId};
use protocol::member::{self, Ending};
use protocol::messages::{FromWorker, Manifest, Receipt, ToWorker, Upload};

use super::coordinator::Coordinator;
use super::disk::{Flip, Volume};
use super::oracle::{Broken, Oracle};
use super::planted::Planted;
use super::scenario::{Counts, End, Place, Scenario, Way, What};
use super::worker::Worker;

/// The run of every world.
pub(super) const RUN: RunId = RunId([5; 16]);

/// When a connection on which nothing is heard is given up, on either side.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// How long an attempt to connect waits for an answer.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);

/// How often somebody says something on a connection that may be dead.
const PULSE_EVERY: Duration = Duration::from_secs(1);

/// How soon a process that ended badly is started again.
const RESTART_AFTER: Duration = Duration::from_millis(500);

/// Once nothing fails any more: deadlines, their extensions, absences and the longest waits between two attempts to
/// connect, and so much again. Every round may meet some of it.
const PROGRESS_MAX: Duration = Duration::from_secs(400);

/// Where a bit turns over at the end of a journal: in its last records.
const NEWEST_BYTES: usize = 1_000;

/// Of the last so many attachments one is damaged.
const ATTACHMENTS_FLIPPED: usize = 5;

/// Lines of a trace that are kept.
const TRACE_LINES: usize = 4000;

/// What is queued.
pub(super) enum Happening {
    Fault(usize),
    Start,
    Up(ConnId, Up),
    Down(ConnId, Down),
    Content(ConnId, Arc<Content>),
    Dialled(usize, u64),
    Member(usize, u64, Box<member::Input>),
    Begun(ConnId, Upload, Arc<[u8]>),
    Half(u64, u64),
    Received(u64, u64),
    Work(u64),
    Done(u64, Vec<Done>),
    Gone(u64, ConnId),
    Alarm(u64),
    AlarmMember(usize, u64),
    ServerIdle(ConnId),
    ClientIdle(ConnId),
    Pulse(ConnId),
    Awake(usize, u64, bool),
    CoordinatorAwake(u64, Duration, bool),
    Revive(usize),
    CutLater(usize),
    SpaceBack,
    EndInOrder(u64),
}

/// What a worker says.
pub(super) enum Up {
    Join(Instance),
    Said(FromWorker),
    Offer(Box<Manifest>),
    Close,
}

/// What the coordinator says.
pub(super) enum Down {
    Said(ToWorker),
    Receipt(Receipt),
    Close(Gone),
    /// The answer of a process that knows nothing of the connection.
    Reset,
}

/// One connection, with an end on each side that may be gone.
pub(super) struct Link {
    pub(super) worker: usize,
    pub(super) life: u64,
    pub(super) client: bool,
    pub(super) server: bool,
    up_lane: Time,
    down_lane: Time,
}

/// What the world is like at the moment.
#[derive(Default)]
pub(super) struct Weather {
    pub(super) slow_until: Time,
    pub(super) slow_sync: Duration,
    full_until: Time,
    /// The coordinator comes back after so long when its disk has failed.
    down_after_error: Duration,
    /// How the coordinator ends when the fuse has burnt, and for how long.
    fuse: Option<(End, Duration)>,
    flip: Option<Flip>,
    /// Something was damaged once.
    pub(super) was_damaged: bool,
}

/// A seed's world.
pub(super) struct World {
    pub(super) scenario: Scenario,
    pub(super) planted: Option<Planted>,
    pub(super) now: Time,
    sequence: u64,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    bodies: BTreeMap<u64, Happening>,
    luck: Draw,
    pub(super) volume: Volume,
    pub(super) weather: Weather,
    pub(super) coordinator: Option<Coordinator>,
    pub(super) coordinator_asleep_until: Time,
    /// The durable count of starts.
    pub(super) starts: u32,
    pub(super) life: u64,
    pub(super) links: BTreeMap<ConnId, Link>,
    connections: u64,
    pub(super) workers: Vec<Worker>,
    pub(super) oracle: Oracle,
    pub(super) revoked: Vec<WorkerId>,
    pub(super) counts: Counts,
    pub(super) facts: Counts,
    pub(super) failure: Option<Broken>,
    trace: Option<Trace>,
    steps: u64,
    quiet: bool,
}

/// The last lines of what happened. Shared with whoever looks after a panic.
pub(super) type Trace = Rc<RefCell<VecDeque<String>>>;

/// How a world ended.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// What was broken, if anything was.
    pub failure: Option<Broken>,
    /// The last model.
    pub model: Option<Hash>,
    /// Faults that struck, by name.
    pub counts: Counts,
    /// Facts, by name.
    pub facts: Counts,
    /// Receipts given.
    pub receipts: usize,
    /// Rounds committed.
    pub rounds: usize,
    /// Happenings.
    pub steps: u64,
    /// Operations of the disk.
    pub operations: u64,
    /// When it ended.
    pub at: Duration,
    /// The last lines of its trace.
    pub trace: Vec<String>,
}

impl World {
    /// The world of `scenario`.
    pub(super) fn new(scenario: Scenario, planted: Option<Planted>, trace: Option<Trace>) -> Self {
        let oracle = Oracle::new(scenario.plan.clone(), RUN, scenario.workers);
        let mut world = Self {
            planted,
            now: Time(0),
            sequence: 0,
            queue: BinaryHeap::new(),
            bodies: BTreeMap::new(),
            luck: Draw::new(scenario.seed, "luck", 0, ""),
            volume: Volume::new(scenario.seed),
            weather: Weather::default(),
            coordinator: None,
            coordinator_asleep_until: Time(0),
            starts: 0,
            life: 0,
            links: BTreeMap::new(),
            connections: 0,
            workers: Vec::new(),
            oracle,
            revoked: Vec::new(),
            counts: Counts::new(),
            facts: Counts::new(),
            failure: None,
            trace,
            steps: 0,
            quiet: false,
            scenario,
        };
        super::clock::set(1_800_000_000_000);
        world.after(Duration::ZERO, Happening::Start);
        for worker in 0..world.scenario.workers {
            world.add_worker(worker);
        }
        for (number, fault) in world.scenario.faults.clone().iter().enumerate() {
            world.after(fault.at, Happening::Fault(number));
        }
        world
    }

    /// Runs until the run is over, something is broken, or nothing comes of it.
    pub(super) fn run(mut self) -> Verdict {
        let last = Time(0).after(self.scenario.quiet_from() + RESTART_AFTER);
        let rounds = Duration::from_secs(4) * self.scenario.plan.learning.train.rounds;
        let until = last.after(PROGRESS_MAX + rounds);
        while self.failure.is_none() && !self.is_over() {
            if !self.quiet && self.now > last {
                self.quiet = true;
                self.note(|_| "--- nothing fails any more ---".to_owned());
            }
            if self.now > until {
                if self.waits_for_ever() {
                    self.count("waits for who left");
                    return self.verdict();
                }
                let status = self.coordinator.as_ref().map(|coordinator| coordinator.core.machine().status());
                self.fail(format!("no progress in {PROGRESS_MAX:?} after the last fault: {status:?}"));
                break;
            }
            self.step();
        }
        if self.failure.is_none() {
            self.finish();
        }
        self.verdict()
    }

    /// What somebody who has left for good, or was told that the run is over, had handed in was damaged: the run waits for
    /// it, and says so.
    fn waits_for_ever(&self) -> bool {
        let Some(status) = self.coordinator.as_ref().map(|coordinator| coordinator.core.machine().status()) else {
            return false;
        };
        let is_gone = |worker: &Worker| worker.leaves || worker.ending.is_some();
        let mut gone = self.workers.iter().filter(|worker| is_gone(worker));
        status.paused.is_some() && self.weather.was_damaged && gone.any(|gone| status.waiting_for.contains(gone.name()))
    }

    fn verdict(self) -> Verdict {
        Verdict {
            model: self.oracle.last_model(),
            receipts: self.oracle.receipts(),
            rounds: self.oracle.rounds(),
            steps: self.steps,
            operations: self.volume.counts()[0],
            at: Duration::from_nanos(self.now.0),
            failure: self.failure,
            counts: self.counts,
            facts: self.facts,
            trace: Vec::new(),
        }
    }

    fn is_over(&self) -> bool {
        let finished = self.coordinator.as_ref().is_some_and(|c| c.core.machine().status().stage == Stage::Finished);
        finished && self.workers.iter().all(|worker| worker.ending.is_some())
    }

    fn step(&mut self) {
        let Some(Reverse((at, number))) = self.queue.pop() else {
            return self.fail("nothing will ever happen again".to_owned());
        };
        self.now = at.max(self.now);
        self.steps += 1;
        if let Some(happening) = self.bodies.remove(&number) {
            self.happen(happening);
        }
    }

    fn happen(&mut self, happening: Happening) {
        if self.is_asleep(&happening) {
            let until = self.wakes_at(&happening);
            return self.at(until, happening);
        }
        match happening {
            Happening::Fault(number) => self.strike(number),
            Happening::Start => self.start_coordinator(),
            Happening::Up(conn, up) => self.arrive_up(conn, up),
            Happening::Down(conn, down) => self.arrive_down(conn, down),
            Happening::Content(conn, content) => self.content_arrived(conn, &content),
            Happening::Dialled(worker, life) => self.dialled(worker, life),
            Happening::Member(worker, life, input) => self.member_input(worker, life, *input),
            Happening::Begun(conn, upload, body) => self.upload_begun(conn, upload, body),
            Happening::Half(life, ticket) => self.upload_half(life, ticket),
            Happening::Received(life, ticket) => self.upload_received(life, ticket),
            Happening::Work(life) => self.work(life),
            Happening::Done(life, done) => self.jobs_done(life, done),
            Happening::Gone(life, conn) => self.tell_core(life, Input::Gone { conn }),
            Happening::Alarm(life) => self.alarm(life),
            Happening::AlarmMember(worker, life) => self.member_input(worker, life, member::Input::Tick),
            Happening::ServerIdle(conn) => self.server_lost(conn),
            Happening::ClientIdle(conn) => self.client_lost(conn),
            Happening::Pulse(conn) => self.pulse(conn),
            Happening::Awake(worker, life, lost) => self.awake(worker, life, lost),
            Happening::CoordinatorAwake(life, lasts, clock_stops) => self.coordinator_awake(life, lasts, clock_stops),
            Happening::Revive(worker) => self.revive(worker),
            Happening::CutLater(worker) => self.cut(worker, true),
            Happening::SpaceBack => self.space_back(),
            Happening::EndInOrder(life) => self.ended_in_order(life),
        }
    }

    /// Whom it would happen to is asleep: it happens when they wake.
    fn is_asleep(&self, happening: &Happening) -> bool {
        self.wakes_at(happening) > self.now
    }

    fn wakes_at(&self, happening: &Happening) -> Time {
        let client = |conn| self.links.get(conn).map_or(Time(0), |link: &Link| self.workers[link.worker].asleep_until);
        match happening {
            Happening::Up(..)
            | Happening::Begun(..)
            | Happening::Half(..)
            | Happening::Received(..)
            | Happening::Work(_)
            | Happening::Done(..)
            | Happening::Gone(..)
            | Happening::EndInOrder(_)
            | Happening::Alarm(_)
            | Happening::SpaceBack => self.coordinator_asleep_until,
            Happening::Down(conn, _) | Happening::Content(conn, _) | Happening::Pulse(conn) => client(conn),
            Happening::Member(worker, ..) | Happening::AlarmMember(worker, _) | Happening::Dialled(worker, _) => {
                self.workers[*worker].asleep_until
            }
            _ => Time(0),
        }
    }

    // --- time ---

    pub(super) fn at(&mut self, at: Time, happening: Happening) {
        self.sequence += 1;
        self.queue.push(Reverse((at, self.sequence)));
        self.bodies.insert(self.sequence, happening);
    }

    pub(super) fn after(&mut self, delay: Duration, happening: Happening) {
        self.at(self.now.after(delay), happening);
    }

    pub(super) fn up_to(&mut self, most: Duration) -> Duration {
        let nanos = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX).max(1);
        Duration::from_nanos(self.luck.below(nanos) + 1)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.luck.below(n as u64)).unwrap_or(0)
    }

    pub(super) fn one_in(&mut self, n: u64) -> bool {
        self.luck.below(n) == 0
    }

    // --- what is seen ---

    pub(super) fn fail(&mut self, what: Broken) {
        self.note(|_| format!("BROKEN: {what}"));
        self.failure.get_or_insert(what);
    }

    pub(super) fn check(&mut self, result: Result<(), Broken>) {
        if let Err(broken) = result {
            self.fail(broken);
        }
    }

    pub(super) fn note(&mut self, line: impl FnOnce(&Self) -> String) {
        let Some(trace) = &self.trace else { return };
        let line = format!("{:>14.6} {}", Duration::from_nanos(self.now.0).as_secs_f64(), line(self));
        let mut trace = trace.borrow_mut();
        if trace.len() == TRACE_LINES {
            trace.pop_front();
        }
        trace.push_back(line);
    }

    pub(super) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    // --- the network ---

    /// Both ends see the connection, unless somebody does not answer.
    pub(super) fn dial(&mut self, worker: usize) {
        let life = self.workers[worker].life;
        let hop = self.scenario.pace.hop_max;
        let delay = if self.answers(worker) { self.up_to(hop * 3) } else { self.up_to(HANDSHAKE_MAX) };
        self.after(delay, Happening::Dialled(worker, life));
    }

    fn answers(&self, worker: usize) -> bool {
        let worker = &self.workers[worker];
        let awake = self.coordinator_asleep_until <= self.now && worker.blocked_up.max(worker.blocked_down) <= self.now;
        awake && self.coordinator.as_ref().is_some_and(|coordinator| !coordinator.is_parting)
    }

    fn dialled(&mut self, worker: usize, life: u64) {
        if self.workers[worker].life != life || !self.workers[worker].is_alive() {
            return;
        }
        if !self.answers(worker) {
            return self.member_input(worker, life, member::Input::Unreachable);
        }
        // The handshake is refused, for good.
        if self.revoked.contains(&self.workers[worker].id) {
            return self.workers[worker].end(Ending::Stopped);
        }
        self.connections += 1;
        let conn = ConnId(self.connections);
        let link = Link { worker, life, client: true, server: true, up_lane: self.now, down_lane: self.now };
        self.links.insert(conn, link);
        self.workers[worker].conn = Some(conn);
        self.note(|_| format!("worker {worker} is connected as {conn:?}"));
        self.member_input(worker, life, member::Input::Connected);
    }

    /// Puts something on its way to the coordinator. Nothing overtakes on a connection.
    pub(super) fn send_up(&mut self, conn: ConnId, up: Up) {
        let hop = self.up_to(self.scenario.pace.hop_max);
        let Some(link) = self.links.get(&conn).filter(|link| link.client) else { return };
        let at = self.now.max(self.workers[link.worker].blocked_up).after(hop).max(link.up_lane);
        if let Some(link) = self.links.get_mut(&conn) {
            link.up_lane = at;
        }
        self.at(at, Happening::Up(conn, up));
    }

    pub(super) fn send_down(&mut self, conn: ConnId, down: Down) {
        let hop = self.up_to(self.scenario.pace.hop_max);
        let Some(link) = self.links.get(&conn) else { return };
        let at = self.now.max(self.workers[link.worker].blocked_down).after(hop).max(link.down_lane);
        if let Some(link) = self.links.get_mut(&conn) {
            link.down_lane = at;
        }
        self.at(at, Happening::Down(conn, down));
    }

    /// A stream of its own: it takes time, and may be overtaken.
    pub(super) fn stream_time(&mut self, conn: ConnId, up: bool) -> Time {
        let takes = self.up_to(self.scenario.pace.stream_max);
        let Some(link) = self.links.get(&conn) else { return self.now };
        let worker = &self.workers[link.worker];
        self.now.max(if up { worker.blocked_up } else { worker.blocked_down }).after(takes)
    }

    fn arrive_up(&mut self, conn: ConnId, up: Up) {
        let Some(link) = self.links.get(&conn) else { return };
        if !link.server || self.coordinator.is_none() {
            // A process that is there and knows nothing of the connection says so.
            if self.coordinator.is_some() && link.client {
                self.send_down(conn, Down::Reset);
            }
            return;
        }
        self.hear(conn, up);
    }

    fn arrive_down(&mut self, conn: ConnId, down: Down) {
        let Some(link) = self.links.get(&conn) else { return };
        let (worker, life) = (link.worker, link.life);
        if !link.client || self.workers[worker].life != life {
            return;
        }
        match down {
            Down::Said(message) => self.member_input(worker, life, member::Input::Said(message)),
            Down::Receipt(receipt) => self.receipt_arrived(worker, life, receipt),
            Down::Reset => self.client_lost(conn),
            Down::Close(why) => self.closed_by_coordinator(conn, worker, &why),
        }
    }

    fn closed_by_coordinator(&mut self, conn: ConnId, worker: usize, why: &Gone) {
        match why {
            Gone::Displaced | Gone::Revoked | Gone::Misbehaved(_) => {
                if let Gone::Misbehaved(what) = why {
                    self.fail(format!("an honest worker was ejected: {what}"));
                }
                self.note(|_| format!("worker {worker} ends: {why}"));
                if let Some(link) = self.links.get_mut(&conn) {
                    link.client = false;
                }
                let ending = if *why == Gone::Displaced { Ending::Displaced } else { Ending::Stopped };
                self.workers[worker].end(ending);
            }
            _ => self.client_lost(conn),
        }
    }

    /// The worker's end is gone, and the worker knows.
    pub(super) fn client_lost(&mut self, conn: ConnId) {
        let Some(link) = self.links.get_mut(&conn).filter(|link| link.client) else { return };
        link.client = false;
        let (worker, life) = (link.worker, link.life);
        if self.workers[worker].conn == Some(conn) && self.workers[worker].life == life {
            self.workers[worker].conn = None;
            self.note(|_| format!("worker {worker} has lost {conn:?}"));
            self.abandon(worker);
            self.member_input(worker, life, member::Input::Lost);
        }
    }

    /// The coordinator's end is gone, and the coordinator knows.
    fn server_lost(&mut self, conn: ConnId) {
        let Some(link) = self.links.get_mut(&conn).filter(|link| link.server) else { return };
        link.server = false;
        self.after(PULSE_EVERY, Happening::Pulse(conn));
        self.after(Duration::ZERO, Happening::Gone(self.life, conn));
        if let Some(coordinator) = &mut self.coordinator {
            coordinator.forget(conn);
        }
    }

    /// On a connection that is dead on the other side something is said now and then, until it is noticed.
    fn pulse(&mut self, conn: ConnId) {
        let Some(link) = self.links.get(&conn).filter(|link| link.client && !link.server) else { return };
        if self.workers[link.worker].conn != Some(conn) {
            return;
        }
        let blocked = self.workers[link.worker].blocked_up.max(self.workers[link.worker].blocked_down) > self.now;
        if self.coordinator.is_some() && self.coordinator_asleep_until <= self.now && !blocked {
            self.send_down(conn, Down::Reset);
        } else {
            self.after(PULSE_EVERY, Happening::Pulse(conn));
        }
    }

    /// The coordinator's process is gone: its ends of all connections with it. Who says something hears so when there is
    /// a process again; who does not, gives up.
    pub(super) fn drop_server_ends(&mut self) {
        let conns: Vec<ConnId> = self.links.iter().filter(|(_, link)| link.server).map(|(conn, _)| *conn).collect();
        for conn in conns {
            if let Some(link) = self.links.get_mut(&conn) {
                link.server = false;
            }
            let pulse = self.up_to(PULSE_EVERY);
            self.after(pulse, Happening::Pulse(conn));
            self.after(IDLE_MAX, Happening::ClientIdle(conn));
        }
    }

    pub(super) fn cut(&mut self, worker: usize, is_heard: bool) {
        let Some(conn) = self.workers[worker].conn else { return };
        let delay = if is_heard { self.up_to(self.scenario.pace.hop_max) } else { IDLE_MAX };
        self.after(delay, Happening::ServerIdle(conn));
        self.client_lost(conn);
    }

    // --- faults ---

    fn strike(&mut self, number: usize) {
        let fault = self.scenario.faults[number].clone();
        self.note(|_| format!("FAULT {number}: {:?}", fault.what));
        if self.strike_with(&fault.what) {
            self.count(fault.what.name());
        }
    }

    /// Whether it struck anything.
    fn strike_with(&mut self, what: &What) -> bool {
        match *what {
            What::KillWorker { worker, keeps_disk, is_heard, down } => {
                self.kill_worker(worker, keeps_disk, is_heard, down)
            }
            What::KillCoordinator { end, down } => self.kill_coordinator(end, down),
            What::CrashCoordinator { operations, end, down } => self.light_fuse(operations, end, down),
            What::StopCoordinator { down } => self.stop_coordinator(down),
            What::Cut { worker, is_heard } => {
                let had = self.workers[worker].conn.is_some();
                self.cut(worker, is_heard);
                had
            }
            What::CutStream { worker, up } => {
                let w = &mut self.workers[worker];
                (w.cuts_upload, w.cuts_download) = (w.cuts_upload || up, w.cuts_download || !up);
                false
            }
            What::Partition { worker, way, lasts } => self.part(worker, way, lasts),
            What::FreezeWorker { worker, lasts } => self.freeze_worker(worker, lasts),
            What::FreezeCoordinator { lasts, clock_stops } => self.freeze_coordinator(lasts, clock_stops),
            What::SetClock { seconds } => {
                super::clock::turn(seconds);
                true
            }
            What::DiskFull { free, lasts } => {
                self.volume.set_free(Some(free));
                self.weather.full_until = self.weather.full_until.max(self.now.after(lasts));
                self.after(lasts, Happening::SpaceBack);
                true
            }
            What::SlowDisk { sync, lasts } => {
                (self.weather.slow_until, self.weather.slow_sync) = (self.now.after(lasts), sync);
                true
            }
            What::Eio { operation, nth, down } => {
                self.volume.fail(operation, nth);
                self.weather.down_after_error = down;
                self.coordinator.is_some()
            }
            What::Flip { place, down } => self.flip(place, down),
            What::Clone { worker } => self.clone_worker(worker),
            What::OfferAgain { worker, altered } => self.offer_again(worker, altered),
            What::Spoil { worker } => {
                self.workers[worker].spoils = true;
                true
            }
            What::Diverge { worker } => {
                self.workers[worker].diverges = true;
                true
            }
            What::Leave { worker, revoked } => self.leave(worker, revoked),
        }
    }

    fn part(&mut self, worker: Option<usize>, way: Way, lasts: Duration) -> bool {
        let until = self.now.after(lasts);
        let whom: Vec<usize> = worker.map_or_else(|| (0..self.workers.len()).collect(), |worker| vec![worker]);
        for worker in whom {
            let w = &mut self.workers[worker];
            if way != Way::Down {
                w.blocked_up = w.blocked_up.max(until);
            }
            if way != Way::Up {
                w.blocked_down = w.blocked_down.max(until);
            }
            let Some(conn) = w.conn else { continue };
            // Whoever hears nothing gives up; whoever is not answered then, too.
            let (server, client) = match way {
                Way::Up => (IDLE_MAX, IDLE_MAX + IDLE_MAX / 3),
                Way::Down => (IDLE_MAX * 2, IDLE_MAX),
                Way::Both => (IDLE_MAX, IDLE_MAX),
            };
            if lasts >= server {
                self.after(server, Happening::ServerIdle(conn));
            }
            if lasts >= client {
                self.after(client, Happening::ClientIdle(conn));
            }
        }
        true
    }

    fn freeze_worker(&mut self, worker: usize, lasts: Duration) -> bool {
        let w = &mut self.workers[worker];
        if !w.is_alive() {
            return false;
        }
        w.asleep_until = w.asleep_until.max(self.now.after(lasts));
        let (life, conn) = (w.life, w.conn);
        self.after(lasts, Happening::Awake(worker, life, lasts >= IDLE_MAX));
        if let Some(conn) = conn.filter(|_| lasts >= IDLE_MAX) {
            self.after(IDLE_MAX, Happening::ServerIdle(conn));
        }
        true
    }

    fn awake(&mut self, worker: usize, life: u64, lost: bool) {
        if self.workers[worker].life != life || self.workers[worker].asleep_until > self.now {
            return;
        }
        self.note(|_| format!("worker {worker} wakes"));
        if let Some(conn) = self.workers[worker].conn.filter(|_| lost) {
            self.client_lost(conn);
        }
    }

    fn freeze_coordinator(&mut self, lasts: Duration, clock_stops: bool) -> bool {
        if self.coordinator.is_none() || self.coordinator_asleep_until > self.now {
            return false;
        }
        self.coordinator_asleep_until = self.now.after(lasts);
        self.after(lasts, Happening::CoordinatorAwake(self.life, lasts, clock_stops));
        if lasts >= IDLE_MAX {
            let conns: Vec<ConnId> =
                self.links.iter().filter(|(_, link)| link.server && link.client).map(|(c, _)| *c).collect();
            for conn in conns {
                self.after(IDLE_MAX, Happening::ClientIdle(conn));
            }
        }
        true
    }

    fn coordinator_awake(&mut self, life: u64, lasts: Duration, clock_stops: bool) {
        let Some(coordinator) = self.coordinator.as_mut().filter(|_| life == self.life) else { return };
        if clock_stops {
            coordinator.born = coordinator.born.after(lasts);
        }
        self.note(|_| "the coordinator wakes".to_owned());
        if lasts >= IDLE_MAX {
            let conns: Vec<ConnId> = self.links.iter().filter(|(_, link)| link.server).map(|(conn, _)| *conn).collect();
            for conn in conns {
                self.server_lost(conn);
            }
        }
        self.after(Duration::ZERO, Happening::Alarm(life));
    }

    fn space_back(&mut self) {
        if self.weather.full_until <= self.now {
            self.volume.set_free(None);
            self.note(|_| "there is room on the disk again".to_owned());
        }
    }

    fn kill_coordinator(&mut self, end: End, down: Duration) -> bool {
        if self.coordinator.is_none() {
            return false;
        }
        self.end_coordinator(end);
        self.after(down, Happening::Start);
        true
    }

    /// The process is gone, and with it all that only it knew.
    pub(super) fn end_coordinator(&mut self, end: End) {
        self.coordinator = None;
        self.life += 1;
        self.coordinator_asleep_until = Time(0);
        match end {
            End::Kill => self.volume.kill(),
            End::PowerCut => self.volume.cut_power(),
        }
        self.note(|world| format!("the coordinator is dead ({end:?}); on the disk: {}", world.volume.listing()));
        self.drop_server_ends();
    }

    fn light_fuse(&mut self, operations: u64, end: End, down: Duration) -> bool {
        if self.coordinator.is_none() {
            return false;
        }
        self.volume.light_fuse(operations);
        self.weather.fuse = Some((end, down));
        true
    }

    /// The process has crashed within an operation of its disk.
    pub(super) fn crash(&mut self) {
        let (end, down) = self.weather.fuse.take().unwrap_or((End::Kill, RESTART_AFTER));
        self.note(|_| "the coordinator crashes within an operation of its disk".to_owned());
        self.end_coordinator(end);
        self.after(down, Happening::Start);
    }

    /// The disk has failed, and the process ends.
    pub(super) fn end_of_error(&mut self, error: &str) {
        self.note(|_| format!("the coordinator ends: {error}"));
        self.end_coordinator(End::Kill);
        self.after(self.weather.down_after_error + RESTART_AFTER, Happening::Start);
    }

    fn flip(&mut self, place: Place, down: Duration) -> bool {
        if self.coordinator.is_none() || self.weather.flip.is_some() {
            return false;
        }
        self.end_coordinator(End::Kill);
        self.after(down, Happening::Start);
        self.weather.flip = self.place_of_flip(place).and_then(|(name, range)| self.volume.flip(&name, range));
        let flip = self.weather.flip.clone();
        self.weather.was_damaged |= flip.is_some();
        self.note(|_| format!("a bit turns over: {flip:?}"));
        flip.is_some()
    }

    fn place_of_flip(&mut self, place: Place) -> Option<(String, Range<usize>)> {
        if place == Place::Attachment {
            return self.some_attachment();
        }
        let prefix = match place {
            Place::Model => "model-",
            Place::Payload => "payload-",
            Place::Schema => "schema-",
            Place::Journal | Place::JournalEnd | Place::Attachment => "journal-",
        };
        let files = self.volume.seen().mount().list().ok()?;
        let files: Vec<_> = files.into_iter().filter(|(name, _)| name.starts_with(prefix)).collect();
        let last = files.len().checked_sub(1)?;
        let pick = if place == Place::JournalEnd { last } else { self.below(files.len()) };
        let name = files[pick].0.clone();
        let length = self.volume.length_without_room(&name);
        let from = if place == Place::JournalEnd { length.saturating_sub(NEWEST_BYTES) } else { 0 };
        Some((name, from..length))
    }

    /// Where one of the last attachments is: a model, or a payload that is held.
    fn some_attachment(&mut self) -> Option<(String, Range<usize>)> {
        let disk = self.volume.seen().mount();
        let scope = Scope { prefix: JOURNAL, run: RUN, plan: None };
        let mut attached = Vec::new();
        journal::read(&disk, &scope, false, &mut |record| {
            attached.extend(record.attached);
            Ok(())
        })
        .ok()?;
        attached.retain(|place| !place.stripped);
        let place = attached.len().checked_sub(1 + self.below(ATTACHMENTS_FLIPPED)).map(|at| attached[at])?;
        let from = usize::try_from(place.offset).ok()?;
        Some((format!("{JOURNAL}{:06}", place.part), from..from + place.bytes as usize))
    }

    /// A refusal is right if something is damaged; then a person mends it.
    pub(super) fn mend(&mut self) -> bool {
        let Some(flip) = self.weather.flip.take() else { return false };
        self.volume.flip_back(&flip);
        self.count("damage refused");
        true
    }

    /// Whether something was damaged and nobody mended it.
    pub(super) fn is_damaged(&self) -> bool {
        self.weather.flip.is_some()
    }

    /// What was damaged was read, and gone around.
    pub(super) fn forget_damage(&mut self) {
        self.weather.flip = None;
    }

    fn leave(&mut self, worker: usize, revoked: bool) -> bool {
        let id = self.workers[worker].id;
        self.workers[worker].leaves = true;
        if revoked {
            self.revoked.push(id);
            self.tell_core(self.life, Input::Revoked { worker: id });
            self.workers[worker].end(Ending::Stopped);
        } else if self.workers[worker].is_alive() {
            let life = self.workers[worker].life;
            self.member_input(worker, life, member::Input::Stop);
        }
        if self.workers[worker].ending.is_none() {
            self.workers[worker].end(Ending::Stopped);
        }
        true
    }

    // --- the end ---

    /// The run is over: it must be so after a power cut, too.
    fn finish(&mut self) {
        self.note(|_| "the run is over; a last look at the disk".to_owned());
        self.prove();
        if !self.oracle.is_over() {
            self.fail("the run is over, and its end is not durable".to_owned());
        }
        let receipts = self.oracle.check_receipts();
        self.check(receipts);
        self.compare();
        self.look_for_remains();
        let rounds = self.scenario.plan.learning.train.rounds as usize;
        if self.oracle.rounds() != rounds {
            self.fail(format!("the run has {rounds} rounds, {} were announced", self.oracle.rounds()));
        }
    }

    /// What the next start leaves on the disk is bounded.
    fn look_for_remains(&mut self) {
        let copy = self.volume.seen();
        let opened = self.open(Box::new(copy.mount())).map(drop);
        let files = copy.mount().list().unwrap_or_default();
        let models = files.iter().filter(|(name, _)| name.starts_with("model-")).count();
        let other = files.iter().find(|(name, _)| name.starts_with("payload-") || name.ends_with(".aside"));
        if opened.is_ok() && (models > MODELS_KEPT || other.is_some()) {
            self.fail(format!("a run that is over leaves {models} models and {other:?}"));
        }
    }
}
