//! A fleet in memory: real machines, and around them the least that a shell does, in simulated time.
//!
//! What a shell computes is faked by hashes: a payload is the hash of what decides it, and a model the hash of its
//! base and the set of payloads. So the model itself says which updates it holds.

use core::cmp::Reverse;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};

use crate::draw::Draw;
use crate::federation::state::{Durable, Phase};
use crate::federation::{
    Act, Entry, Event, EventNo, Federation, Frozen, Gate, Input, Notice, Output, Stage, Status, SurveyOutcome,
};
use crate::ids::{ConnId, ContentId, Hash, Instance, RunId, TaskId, Time, WorkerId, WorkerName};
use crate::limits::PAYLOAD_AT_ONCE_BYTES_MAX;
use crate::member::{self, Ending, Made, Member, WorkKey};
use crate::messages::{
    Assigned, ContentKey, ContentRef, Encoding, Failure, FromWorker, Leave, Manifest, Metrics, Receipt, Refusal,
    TaskKind, ToWorker, Welcome,
};
use crate::plan::{Durability, Plan};

pub(super) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const HOP: Duration = Duration::from_millis(1);
const RUN: RunId = RunId([5; 16]);

/// Something on its way.
enum Parcel {
    ToCoordinator(Box<Input>),
    ToMember(usize, u64, Box<member::Input>),
    Payload(ConnId, TaskId, Hash),
    /// A payload's stream came to its end: whole, or cut.
    Received(u64, TaskId, bool),
    Fold(u64, TaskId, Hash),
    Synced(u64, u64, usize),
    TickCoordinator(u64),
    TickMember(usize, u64),
}

pub(super) struct Worker {
    pub(super) id: WorkerId,
    pub(super) name: WorkerName,
    member: Member,
    life: u64,
    alive: bool,
    frozen: bool,
    pub(super) conn: Option<ConnId>,
    pub(super) train_time: Duration,
    pub(super) tamper: Option<fn(&mut Manifest)>,
    pub(super) forged: bool,
    pub(super) spoil: Option<Refusal>,
    pub(super) diverge: Option<Failure>,
    pub(super) refuse_plan: bool,
    pub(super) stuck: bool,
    pub(super) banned: bool,
    pub(super) uploading: bool,
    /// How often an update of this worker was said to be held.
    pub(super) held: u32,
    pub(super) trained: u32,
    pub(super) cancelled: u32,
    pub(super) receipts: Vec<Receipt>,
    pub(super) manifests: Vec<Manifest>,
    pub(super) ending: Option<Ending>,
    notices: Vec<member::Notice>,
    steps: u64,
    /// Nothing overtakes on its way to a worker.
    lane: Time,
    /// What came while it was frozen.
    stalled: Vec<member::Input>,
}

/// A payload that the machine waits for. What is replaced or forgotten is never reported, by its ticket.
struct Expected {
    conn: ConnId,
    hash: Hash,
    ticket: u64,
    coming: bool,
}

impl Worker {
    pub(super) fn is_alive(&self) -> bool {
        self.alive
    }

    pub(super) fn noticed(&self, wanted: impl Fn(&member::Notice) -> bool) -> bool {
        self.notices.iter().any(wanted)
    }
}

pub(super) struct Fleet {
    now: Time,
    sequence: u64,
    parcels: BinaryHeap<Reverse<(Time, u64)>>,
    bodies: BTreeMap<u64, Parcel>,
    plan: Plan,
    federation: Option<Federation>,
    life: u64,
    start: u32,
    /// The facts, of all starts, and how many of them were synced.
    journal: Vec<Event>,
    durable: usize,
    /// The state that a power cut would leave.
    disk: Durable,
    /// How many facts there were when an event was appended that was not synced yet.
    unsynced: VecDeque<(EventNo, usize)>,
    /// The last rounds whose models are damaged.
    pub(super) damaged: u32,
    /// The same updates give another model from now on.
    pub(super) warped: bool,
    appended: u64,
    synced: u64,
    syncing: bool,
    gated: Vec<(Gate, Act)>,
    events: Vec<Event>,
    messages: Vec<ToWorker>,
    connections: u64,
    conns: BTreeMap<ConnId, usize>,
    wanted: BTreeMap<TaskId, Expected>,
    arrived: BTreeSet<(ConnId, TaskId, Hash)>,
    /// The open round's sum: what was folded.
    sum: BTreeMap<TaskId, Hash>,
    held: BTreeMap<TaskId, Hash>,
    /// Draws delays, where a test wants them.
    pub(super) jitter: Option<Draw>,
    /// Nothing overtakes on a connection.
    lanes: BTreeMap<ConnId, Time>,
    oracle: Oracle,
    pub(super) workers: Vec<Worker>,
    pub(super) step_time: Duration,
    pub(super) sync_time: Duration,
    pub(super) upload_time: Duration,
    pub(super) parameters: u64,
    pub(super) unfit: Vec<usize>,
    pub(super) disagree: bool,
    pub(super) impossible: bool,
    pub(super) surveyed: usize,
    pub(super) merges: u32,
    pub(super) folds: u32,
    pub(super) receipts_said: usize,
    pub(super) finished: Option<crate::evaluation::EvaluationSummary>,
    pub(super) failed: Option<String>,
    pub(super) conflict: Option<u32>,
    pub(super) ended: bool,
}

impl Fleet {
    pub(super) fn new(plan: Plan, workers: usize) -> Self {
        let mut fleet = Self {
            now: Time(0),
            sequence: 0,
            parcels: BinaryHeap::new(),
            bodies: BTreeMap::new(),
            plan,
            federation: None,
            life: 0,
            start: 0,
            journal: Vec::new(),
            durable: 0,
            disk: Durable::new(RUN),
            unsynced: VecDeque::new(),
            damaged: 0,
            warped: false,
            appended: 0,
            synced: 0,
            syncing: false,
            gated: Vec::new(),
            events: Vec::new(),
            messages: Vec::new(),
            connections: 0,
            conns: BTreeMap::new(),
            wanted: BTreeMap::new(),
            arrived: BTreeSet::new(),
            sum: BTreeMap::new(),
            held: BTreeMap::new(),
            jitter: None,
            lanes: BTreeMap::new(),
            oracle: Oracle::default(),
            workers: Vec::new(),
            step_time: Duration::from_millis(2),
            sync_time: Duration::from_millis(3),
            upload_time: Duration::from_millis(2),
            parameters: 1000,
            unfit: Vec::new(),
            disagree: false,
            impossible: false,
            surveyed: 0,
            merges: 0,
            folds: 0,
            receipts_said: 0,
            finished: None,
            failed: None,
            conflict: None,
            ended: false,
        };
        fleet.start_coordinator();
        for _ in 0..workers {
            fleet.add_worker();
        }
        fleet
    }

    // --- verbs of a test ---

    pub(super) fn add_worker(&mut self) -> usize {
        let number = self.workers.len();
        self.push_worker(&format!("worker-{number}"), number)
    }

    /// A second process with the identity of `of`.
    pub(super) fn clone_worker(&mut self, of: usize) -> usize {
        let name = self.workers[of].name.to_string();
        self.push_worker(&name, of)
    }

    fn push_worker(&mut self, name: &str, identity: usize) -> usize {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(identity as u64).to_le_bytes());
        let number = self.workers.len();
        self.workers.push(Worker {
            id: WorkerId(id),
            name: name.parse().unwrap(),
            member: Member::new(Instance(number as u64 + 1)),
            life: 0,
            alive: true,
            frozen: false,
            conn: None,
            train_time: Duration::from_millis(10),
            tamper: None,
            forged: false,
            spoil: None,
            diverge: None,
            refuse_plan: false,
            stuck: false,
            banned: false,
            uploading: false,
            held: 0,
            trained: 0,
            cancelled: 0,
            receipts: Vec::new(),
            manifests: Vec::new(),
            ending: None,
            notices: Vec::new(),
            steps: 0,
            lane: Time(0),
            stalled: Vec::new(),
        });
        self.tell_member(number, member::Input::Tick);
        number
    }

    pub(super) fn kill(&mut self, worker: usize) {
        self.workers[worker].alive = false;
        self.workers[worker].life += 1;
        self.workers[worker].uploading = false;
        self.workers[worker].stalled.clear();
        self.workers[worker].frozen = false;
        self.disconnect(worker);
    }

    /// The same identity, a new process. It has forgotten what it made.
    pub(super) fn revive(&mut self, worker: usize) {
        let instance = Instance(1000 + self.sequence);
        let w = &mut self.workers[worker];
        (w.alive, w.member) = (true, Member::new(instance));
        self.tell_member(worker, member::Input::Tick);
    }

    /// Ends the connection, and nothing else.
    pub(super) fn cut(&mut self, worker: usize) {
        self.disconnect(worker);
        self.tell_member(worker, member::Input::Lost);
    }

    /// The worker is there, and does nothing.
    pub(super) fn freeze(&mut self, worker: usize) {
        self.workers[worker].frozen = true;
    }

    /// It goes on, with what came meanwhile.
    pub(super) fn thaw(&mut self, worker: usize) {
        self.workers[worker].frozen = false;
        for input in core::mem::take(&mut self.workers[worker].stalled) {
            self.member_input(worker, self.workers[worker].life, input);
        }
        self.tell_member(worker, member::Input::Tick);
    }

    pub(super) fn has_coordinator(&self) -> bool {
        self.federation.is_some()
    }

    /// The owner stops the worker.
    pub(super) fn stop_worker(&mut self, worker: usize) {
        self.tell_member(worker, member::Input::Stop);
    }

    /// The stream of some payload that is on its way ends early, its connection not.
    pub(super) fn cut_a_stream(&mut self) {
        let coming = self.wanted.iter().find(|(_, expected)| !expected.coming);
        if let Some((task, ticket)) = coming.map(|(task, expected)| (*task, expected.ticket)) {
            self.wanted.get_mut(&task).unwrap().coming = true;
            self.reply(HOP, Parcel::Received(ticket, task, false));
        }
    }

    fn disconnect(&mut self, worker: usize) {
        if let Some(conn) = self.workers[worker].conn.take() {
            self.conns.remove(&conn);
            self.arrived.retain(|(from, ..)| *from != conn);
            self.tell_coordinator(conn, Input::Gone { conn });
        }
    }

    /// The process dies; what it handed to the operating system stays.
    pub(super) fn kill_coordinator(&mut self) {
        self.federation = None;
        self.life += 1;
        self.gated.clear();
        self.unsynced.clear();
        self.syncing = false;
        (self.wanted, self.arrived, self.sum) = Default::default();
        self.bodies.retain(|_, parcel| {
            !matches!(parcel, Parcel::ToCoordinator(_) | Parcel::Payload(..) | Parcel::Received(..))
        });
        for worker in 0..self.workers.len() {
            if self.workers[worker].conn.take().is_some() {
                self.tell_member(worker, member::Input::Lost);
            }
        }
        self.conns.clear();
    }

    /// The machine dies under it: of what was not synced, `facts` facts stay, and no payload.
    pub(super) fn cut_power(&mut self, facts: u64) {
        self.kill_coordinator();
        let kept = usize::try_from(facts).unwrap().min(self.journal.len() - self.durable);
        self.journal.truncate(self.durable + kept);
        self.held.clear();
    }

    /// The process dies, and its state is replaced by a backup from just after an event.
    pub(super) fn restore_backup(&mut self, of: impl Fn(&Event) -> bool) {
        self.kill_coordinator();
        let at = self.journal.iter().position(of).unwrap();
        self.journal.truncate(at + 1);
        self.held.clear();
    }

    /// A held payload is damaged on the disk.
    pub(super) fn damage_payload(&mut self, task: TaskId) {
        self.held.remove(&task).unwrap();
    }

    pub(super) fn start_coordinator(&mut self) {
        self.start += 1;
        self.life += 1;
        (self.appended, self.synced) = (0, 0);
        self.durable = self.journal.len();
        let mut federation = Federation::new(self.plan.clone(), RUN);
        self.journal.iter().for_each(|event| federation.apply(event));
        self.disk = federation.durable.clone();
        self.oracle.start(&self.journal);
        let round = self.disk.round();
        let whole = (self.damaged > 0).then(|| round - core::mem::take(&mut self.damaged).min(round));
        if let Phase::Finished(evaluation) = self.disk.phase {
            self.finished = Some(evaluation);
        }
        self.federation = Some(federation);
        self.inject(Input::Start { start: self.start, whole });
    }

    pub(super) fn inject(&mut self, input: Input) {
        if let Some(federation) = &mut self.federation {
            let ticked = input == Input::Tick;
            federation.handle(self.now, input);
            let wait = self.drain();
            assert!(!ticked || wait.is_none_or(|at| at > self.now), "a timer that fires for ever");
            self.check();
        }
    }

    /// What holds after every input.
    fn check(&self) {
        // What costs as much as the fleet is large is checked in small ones.
        let Some(federation) = self.federation.as_ref().filter(|_| self.workers.len() < 32) else { return };
        assert_eq!(self.oracle.replayed, federation.durable, "replay equals live");
        let expected = self.wanted.iter().map(|(task, expected)| (*task, (expected.conn, expected.hash))).collect();
        federation.check_receiving(&expected);
        let work = federation.durable.phase.work();
        assert!(work.is_none_or(|work| work.tasks.len() <= work.selected() * 8), "tasks grow without bound");
    }

    /// The worker's last manifest once more, changed.
    pub(super) fn offer_again(&mut self, worker: usize, change: impl FnOnce(&mut Manifest)) {
        let last = self.workers[worker].manifests.len() - 1;
        self.offer_again_of(worker, last, change);
    }

    pub(super) fn offer_again_of(&mut self, worker: usize, number: usize, change: impl FnOnce(&mut Manifest)) {
        let mut manifest = self.workers[worker].manifests[number].clone();
        change(&mut manifest);
        let conn = self.workers[worker].conn.unwrap();
        self.inject(Input::Offered { conn, manifest: Box::new(manifest), authentic: true });
    }

    /// What no honest worker offers: a survey that is empty.
    pub(super) fn survey_of_no_bytes(&self, worker: usize, task: TaskId) -> Manifest {
        Manifest {
            run: RUN,
            worker: self.workers[worker].id,
            task,
            kind: TaskKind::Survey,
            base: Hash([0; 32]),
            layout: Hash([0; 32]),
            groups: 1,
            encoding: Encoding::F32,
            bytes: 0,
            hash: Hash::of(&[]),
            examples: 1,
            steps: 0,
            weight: 0,
            metrics: Metrics::default(),
        }
    }

    // --- what a test looks at ---

    pub(super) fn now(&self) -> Duration {
        Duration::from_nanos(self.now.0)
    }

    pub(super) fn status(&self) -> Status {
        self.federation.as_ref().unwrap().status()
    }

    pub(super) fn stage(&self) -> Stage {
        self.federation.as_ref().unwrap().durable.phase.stage()
    }

    pub(super) fn rounds(&self) -> u32 {
        self.federation.as_ref().map_or(0, |federation| federation.durable.round())
    }

    pub(super) fn model(&self) -> Hash {
        self.federation.as_ref().unwrap().durable.model.unwrap()
    }

    /// The rows behind the last round.
    pub(super) fn examples(&self) -> u64 {
        self.federation.as_ref().unwrap().summary().figures.unwrap().examples
    }

    /// How long the last round took.
    pub(super) fn seconds(&self) -> f64 {
        self.federation.as_ref().unwrap().summary().figures.unwrap().seconds
    }

    pub(super) fn entries(&self, round: usize) -> Vec<Entry> {
        let committed = self.federation.as_ref().unwrap().durable.committed.values();
        committed.filter(|(of, _)| *of as usize == round).map(|(_, entry)| *entry).collect()
    }

    pub(super) fn facts(&self, wanted: impl Fn(&Event) -> bool) -> usize {
        self.events.iter().filter(|event| wanted(event)).count()
    }

    pub(super) fn noticed(&self, wanted: impl Fn(&Notice) -> bool) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Notice(notice) if wanted(notice)))
    }

    pub(super) fn said(&self, wanted: impl Fn(&ToWorker) -> bool) -> bool {
        self.messages.iter().any(wanted)
    }

    pub(super) fn open_task_of(&self, worker: usize) -> TaskId {
        let id = self.workers[worker].id;
        let assigned = self.events.iter().rev().find_map(|event| match event {
            Event::Assigned { task, worker, .. } if *worker == id => Some(*task),
            _ => None,
        });
        assigned.unwrap()
    }

    /// The facts alone give the same durable state.
    pub(super) fn check_replay(&self) {
        let live = self.federation.as_ref().unwrap();
        let mut replayed = Federation::new(self.plan.clone(), RUN);
        self.journal.iter().for_each(|event| replayed.apply(event));
        assert!(replayed.agrees_with(live));
    }

    /// Every receipt's update is in the round that it names, once.
    pub(super) fn check_receipts(&self) {
        for receipt in self.workers.iter().flat_map(|worker| &worker.receipts) {
            let round = self.entries(receipt.round as usize);
            let found = round.iter().filter(|e| (e.worker, e.hash) == (receipt.worker, receipt.hash)).count();
            assert_eq!(found, 1, "{receipt:?}");
        }
    }

    // --- time ---

    pub(super) fn run_for(&mut self, duration: Duration) {
        let until = self.now.after(duration);
        while self.parcels.peek().is_some_and(|Reverse((at, _))| *at <= until) {
            self.deliver_next();
        }
        self.now = until;
    }

    pub(super) fn run_until(&mut self, done: impl FnMut(&Self) -> bool) {
        let mut done = done;
        for _ in 0..2_000_000 {
            if done(self) {
                return;
            }
            self.deliver_next();
        }
        panic!("nothing came of it: {:?}", self.federation.as_ref().map(Federation::status));
    }

    /// Until the run is finished and every living worker was let go.
    pub(super) fn run_to_end(&mut self) {
        self.run_until(|fleet| {
            fleet.finished.is_some() && fleet.workers.iter().all(|w| !w.alive || w.ending.is_some())
        });
    }

    fn send_after(&mut self, delay: Duration, parcel: Parcel) {
        self.sequence += 1;
        self.parcels.push(Reverse((self.now.after(delay), self.sequence)));
        self.bodies.insert(self.sequence, parcel);
    }

    /// On its way to a worker, behind all that is on its way to it already.
    fn tell_member(&mut self, worker: usize, input: member::Input) {
        let at = self.now.after(self.hop()).max(self.workers[worker].lane);
        let life = self.workers[worker].life;
        self.workers[worker].lane = at;
        self.send_after(at.since(self.now), Parcel::ToMember(worker, life, Box::new(input)));
    }

    /// On its way to the coordinator, behind all that is on its way on the same connection already.
    fn tell_coordinator(&mut self, conn: ConnId, input: Input) {
        let at = self.now.after(self.hop()).max(self.lanes.get(&conn).copied().unwrap_or_default());
        self.lanes.insert(conn, at);
        self.send_after(at.since(self.now), Parcel::ToCoordinator(Box::new(input)));
    }

    fn hop(&mut self) -> Duration {
        self.jitter.as_mut().map_or(HOP, |draw| Duration::from_micros(200 + draw.below(12_000)))
    }

    fn deliver_next(&mut self) {
        let Reverse((at, sequence)) = self.parcels.pop().expect("nothing is on its way any more");
        self.now = at.max(self.now);
        let Some(parcel) = self.bodies.remove(&sequence) else { return };
        match parcel {
            Parcel::ToCoordinator(input) => self.inject(*input),
            Parcel::ToMember(worker, life, input) => self.member_input(worker, life, *input),
            Parcel::Payload(conn, task, hash) => {
                if self.conns.contains_key(&conn) {
                    self.arrived.insert((conn, task, hash));
                    self.match_payload(task);
                }
            }
            Parcel::Received(ticket, task, whole) => self.received(ticket, task, whole),
            Parcel::Fold(life, task, hash) if life == self.life => self.fold(task, hash),
            Parcel::Fold(..) => {}
            Parcel::Synced(life, number, facts) => self.sync_done(life, number, facts),
            Parcel::TickCoordinator(life) if life == self.life => self.inject(Input::Tick),
            Parcel::TickMember(worker, life) => self.member_input(worker, life, member::Input::Tick),
            Parcel::TickCoordinator(_) => {}
        }
    }

    // --- the coordinator's shell ---

    fn drain(&mut self) -> Option<Time> {
        let mut wait = None;
        while let Some(federation) = &mut self.federation {
            match federation.poll() {
                Output::Append(event) => {
                    self.appended += 1;
                    self.oracle.saw(&event, EventNo(self.appended));
                    if event.is_fact() {
                        self.journal.push(event.clone());
                    }
                    if event.is_commit() {
                        self.unsynced.push_back((EventNo(self.appended), self.journal.len()));
                    }
                    self.events.push(event);
                }
                Output::Act { after, act } => self.gated.push((after, act)),
                Output::Wait(at) => {
                    if let Some(at) = at {
                        let delay = at.since(self.now);
                        self.send_after(delay, Parcel::TickCoordinator(self.life));
                    }
                    wait = at;
                    break;
                }
            }
        }
        self.release();
        wait
    }

    /// Releases the acts whose gate is open, in order, and syncs for the rest.
    fn release(&mut self) {
        let (appended, synced) = (self.appended, self.synced);
        let open = |gate: &Gate| match gate {
            Gate::Appended(EventNo(number)) => *number <= appended,
            Gate::Synced(EventNo(number)) => *number <= synced,
        };
        let gated = core::mem::take(&mut self.gated);
        let (ready, waiting): (Vec<_>, Vec<_>) = gated.into_iter().partition(|(gate, _)| open(gate));
        self.gated = waiting;
        if (!self.gated.is_empty() || !self.unsynced.is_empty()) && !self.syncing {
            self.syncing = true;
            self.send_after(self.sync_time, Parcel::Synced(self.life, self.appended, self.journal.len()));
        }
        for (_, act) in ready {
            self.coordinator_act(act);
        }
    }

    fn fold(&mut self, task: TaskId, hash: Hash) {
        if self.held.get(&task) != Some(&hash) {
            return self.learned(Duration::ZERO, Input::Lost { task, hash });
        }
        self.folds += 1;
        assert!(self.sum.insert(task, hash).is_none(), "folded twice");
        self.learned(Duration::ZERO, Input::Folded { task });
    }

    fn sync_done(&mut self, life: u64, number: u64, facts: usize) {
        if life != self.life || self.federation.is_none() {
            return;
        }
        self.syncing = false;
        self.synced = number;
        self.unsynced.retain(|(no, _)| no.0 > number);
        for event in &self.journal[self.durable..facts] {
            self.disk.apply(event);
        }
        self.durable = facts;
        self.oracle.durable(&self.disk);
        self.release();
    }

    fn reply(&mut self, delay: Duration, parcel: Parcel) {
        let jitter = self.hop().saturating_sub(HOP);
        self.send_after(delay + jitter, parcel);
    }

    fn learned(&mut self, delay: Duration, input: Input) {
        self.reply(delay, Parcel::ToCoordinator(Box::new(input)));
    }

    fn say(&mut self, conn: ConnId, message: ToWorker) {
        if let (ToWorker::Held { task, .. }, Durability::Update) = (&message, self.plan.rounds.durability) {
            assert!(self.oracle.held[task].0.0 <= self.synced, "held, said before it is durable");
        }
        self.messages.push(message.clone());
        if let Some(&worker) = self.conns.get(&conn) {
            self.tell_member(worker, member::Input::Said(message));
        }
    }

    fn coordinator_act(&mut self, act: Act) {
        match act {
            Act::Welcome { conn } => self.welcome(conn),
            Act::Assign { conn, assignment } => {
                let base = assignment.model;
                let is_durable = |base| (0..=self.disk.round()).any(|round| self.disk.model_of(round) == Some(base));
                assert!(base.is_none_or(is_durable), "a model is announced before its commit");
                let content = |hash| ContentRef { id: ContentId([0; 16]), key: ContentKey([0; 32]), hash, bytes: 0 };
                let assigned = Assigned {
                    task: assignment.task,
                    round: assignment.round,
                    kind: assignment.kind,
                    schema: assignment.schema.map(content),
                    model: assignment.model.map(content),
                    layout: assignment.layout,
                    weight_shift: assignment.weight_shift,
                };
                self.say(conn, ToWorker::Assigned(Box::new(assigned)));
            }
            Act::Send { conn, message } => self.say(conn, message),
            Act::Receipt { conn, receipt } => {
                self.receipts_said += 1;
                check_receipt(&self.disk, &receipt);
                if let Some(&worker) = self.conns.get(&conn) {
                    self.tell_member(worker, member::Input::Receipted(receipt));
                }
            }
            Act::Receive { conn, task, hash, go, .. } => {
                if go {
                    self.say(conn, ToWorker::Go { task, hash, from: 0 });
                }
                self.connections += 1;
                let expected = Expected { conn, hash, ticket: self.connections, coming: false };
                self.wanted.insert(task, expected);
                self.match_payload(task);
            }
            Act::Forget { task, .. } => {
                self.wanted.remove(&task);
                self.held.remove(&task);
            }
            Act::Fold { task, hash, .. } => {
                let hop = self.hop();
                self.send_after(hop, Parcel::Fold(self.life, task, hash));
            }
            Act::Merge { surveys } => match surveys.iter().find(|(task, ..)| !self.held.contains_key(task)) {
                Some(&(task, hash, ..)) => self.learned(HOP, Input::Lost { task, hash }),
                None => self.merge(surveys.len()),
            },
            Act::Step { round, tasks } => self.step(round, &tasks),
            Act::Train { round, rows } => {
                assert!(rows.iter().all(|task| self.held.contains_key(task)), "rows without a payload");
                let base = self.model();
                let model = Hash::of(&[base.0.as_slice(), b"central"].concat());
                self.learned(self.step_time, Input::Stepped { round, model, train_loss: Some(0.5) });
            }
            Act::Close { conn, .. } => {
                if let Some(worker) = self.conns.remove(&conn) {
                    self.workers[worker].conn = None;
                    self.tell_member(worker, member::Input::Lost);
                }
            }
            Act::Finish { evaluation } => self.finished = Some(evaluation),
            Act::Fail { sentence } => self.failed = Some(sentence),
            Act::Conflict { round, .. } => self.conflict = Some(round),
            Act::End => self.ended = true,
        }
    }

    fn welcome(&mut self, conn: ConnId) {
        let Some(&worker) = self.conns.get(&conn) else { return };
        let welcome = Welcome {
            version: 1,
            run: RUN,
            ed25519: [0; 32],
            name: self.workers[worker].name.clone(),
            weight_max: 1 << 20,
            norm_max: 256.0,
            learning: self.plan.learning.clone(),
        };
        self.say(conn, ToWorker::Welcome(Box::new(welcome)));
    }

    fn merge(&mut self, surveys: usize) {
        (self.surveyed, self.merges) = (surveys, self.merges + 1);
        let outcome = if self.impossible {
            SurveyOutcome::Impossible("one class in the whole fleet".into())
        } else if self.disagree {
            SurveyOutcome::Disagreed("worker-0 says \"a\", worker-1 says \"b\"".into())
        } else if self.unfit.is_empty() {
            let frozen = Frozen {
                schema: Hash([7; 32]),
                schema_bytes: 100,
                layout: Hash([8; 32]),
                parameters: self.parameters,
                weight_shift: 0,
            };
            SurveyOutcome::Frozen { frozen, model: Hash([1; 32]) }
        } else {
            let unfit = core::mem::take(&mut self.unfit);
            let sentence = "column \"x\" is missing".to_owned();
            SurveyOutcome::Unfit(unfit.into_iter().map(|w| (self.workers[w].id, sentence.clone())).collect())
        };
        self.learned(HOP, Input::Surveyed(outcome));
    }

    fn step(&mut self, round: u32, tasks: &[TaskId]) {
        let sum = core::mem::take(&mut self.sum);
        assert_eq!(sum.keys().copied().collect::<Vec<_>>(), tasks, "the sum holds what the round says");
        let hashes: BTreeSet<Hash> = sum.into_values().collect();
        let mut bytes = self.model().0.to_vec();
        bytes.extend(hashes.iter().flat_map(|hash| hash.0));
        bytes.push(self.warped.into());
        self.learned(self.step_time, Input::Stepped { round, model: Hash::of(&bytes), train_loss: None });
    }

    /// A payload is verified once it was asked for and is there.
    fn match_payload(&mut self, task: TaskId) {
        let Some(expected) = self.wanted.get_mut(&task).filter(|expected| !expected.coming) else { return };
        if self.arrived.remove(&(expected.conn, task, expected.hash)) {
            expected.coming = true;
            let ticket = expected.ticket;
            self.reply(HOP, Parcel::Received(ticket, task, true));
        }
    }

    fn received(&mut self, ticket: u64, task: TaskId, whole: bool) {
        let Some(Expected { conn, hash, .. }) = self.wanted.get(&task).filter(|e| e.ticket == ticket) else { return };
        let (conn, hash) = (*conn, *hash);
        self.wanted.remove(&task);
        if !whole {
            return self.inject(Input::Cut { task, hash });
        }
        self.held.insert(task, hash);
        let spoil = self.conns.get(&conn).and_then(|&worker| {
            self.workers[worker].uploading = false;
            self.workers[worker].spoil
        });
        self.inject(match spoil {
            Some(refusal) => Input::Spoiled { task, hash, refusal },
            None => Input::Verified { task, hash, norm: 1.0 },
        });
    }

    // --- a worker's shell ---

    fn member_input(&mut self, worker: usize, life: u64, input: member::Input) {
        let w = &mut self.workers[worker];
        if !w.alive || w.life != life || w.ending.is_some() {
            return;
        }
        if w.frozen {
            return w.stalled.push(input);
        }
        let ticked = input == member::Input::Tick;
        match &input {
            member::Input::Said(ToWorker::Held { task, .. }) if w.manifests.iter().any(|m| m.task == *task) => {
                w.held += 1
            }
            member::Input::Receipted(receipt) => w.receipts.push(*receipt),
            _ => {}
        }
        w.member.handle(self.now, input);
        loop {
            match self.workers[worker].member.poll() {
                Output::Append(member::Event::Notice(notice)) => self.workers[worker].notices.push(notice),
                Output::Append(_) => {}
                Output::Act { act, .. } => self.member_act(worker, act),
                Output::Wait(at) => {
                    assert!(!ticked || at.is_none_or(|at| at > self.now), "a timer that fires for ever");
                    if let Some(at) = at {
                        let delay = at.since(self.now);
                        self.send_after(delay, Parcel::TickMember(worker, life));
                    }
                    return;
                }
            }
        }
    }

    fn member_act(&mut self, worker: usize, act: member::Act) {
        match act {
            member::Act::Connect => self.connect(worker),
            member::Act::Disconnect => self.cut(worker),
            member::Act::Send(message) => self.member_says(worker, message),
            member::Act::Beat { task } => {
                let w = &mut self.workers[worker];
                w.steps += u64::from(!w.stuck);
                let steps = w.steps;
                self.member_says(worker, FromWorker::Beat { task, steps });
            }
            member::Act::Consider(_) => {
                let refused = self.workers[worker].refuse_plan;
                let no = Leave::NotAllowed("start it with --share-rows".into());
                self.tell_member(worker, member::Input::Considered(if refused { Err(no) } else { Ok(()) }));
            }
            member::Act::Work(assigned) => self.work(worker, &assigned),
            member::Act::Cancel => self.workers[worker].cancelled += 1,
            member::Act::Offer { task, key, made } => self.offer(worker, task, &key, &made),
            member::Act::Upload { task, hash, .. } => self.upload(worker, task, hash),
            member::Act::Drop { .. } => {}
            member::Act::Exit(ending) => {
                self.workers[worker].ending = Some(ending);
                self.disconnect(worker);
            }
        }
    }

    fn connect(&mut self, worker: usize) {
        if self.federation.is_none() || self.workers[worker].banned {
            self.tell_member(worker, member::Input::Unreachable);
            return;
        }
        self.connections += 1;
        let conn = ConnId(self.connections);
        self.workers[worker].conn = Some(conn);
        self.conns.insert(conn, worker);
        self.tell_member(worker, member::Input::Connected);
    }

    fn member_says(&mut self, worker: usize, message: FromWorker) {
        let w = &self.workers[worker];
        let Some(conn) = w.conn else { return };
        let input = match message {
            FromWorker::Join { instance } => {
                Input::Joined { conn, worker: w.id, name: w.name.clone(), weight_max: 1 << 20, instance }
            }
            message => Input::Said { conn, message },
        };
        self.tell_coordinator(conn, input);
    }

    fn work(&mut self, worker: usize, assigned: &Assigned) {
        let w = &mut self.workers[worker];
        let task = assigned.task;
        if assigned.kind == TaskKind::Update {
            w.trained += 1;
            if let Some(failure) = w.diverge {
                let (life, delay) = (w.life, w.train_time);
                let input = member::Input::Failed { task, failure };
                self.send_after(delay, Parcel::ToMember(worker, life, Box::new(input)));
                return;
            }
        }
        let base = assigned.base();
        let seed = postcard::to_allocvec(&(assigned.round, assigned.kind, base, &w.name)).unwrap();
        let tensors = matches!(assigned.kind, TaskKind::Update | TaskKind::Gradient);
        let bytes = match assigned.kind {
            TaskKind::Evaluation => 0,
            _ if tensors => self.parameters * 4,
            _ => 1000,
        };
        let made = Made {
            hash: Hash::of(&seed),
            bytes,
            layout: assigned.layout,
            examples: if assigned.kind == TaskKind::Evaluation { 0 } else { 100 },
            steps: 4,
            weight: 100,
            metrics: Metrics { train_loss: Some(0.5), seconds: 0.1, evaluation: None },
        };
        let input = member::Input::Made { task, made: Box::new(made) };
        let (life, delay) = (self.workers[worker].life, self.workers[worker].train_time);
        self.send_after(delay, Parcel::ToMember(worker, life, Box::new(input)));
    }

    fn offer(&mut self, worker: usize, task: TaskId, key: &WorkKey, made: &Made) {
        let w = &mut self.workers[worker];
        let Some(conn) = w.conn else { return };
        let mut manifest = Manifest {
            run: key.run,
            worker: w.id,
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
        };
        let update = matches!(key.kind, TaskKind::Update | TaskKind::Gradient);
        if let Some(tamper) = w.tamper.filter(|_| update) {
            tamper(&mut manifest);
        }
        if update {
            w.manifests.push(manifest.clone());
        }
        let authentic = !(w.forged && update);
        let at_once = manifest.bytes <= PAYLOAD_AT_ONCE_BYTES_MAX && manifest.bytes > 0;
        self.tell_coordinator(conn, Input::Offered { conn, manifest: Box::new(manifest), authentic });
        if at_once {
            self.upload(worker, task, made.hash);
        }
    }

    fn upload(&mut self, worker: usize, task: TaskId, hash: Hash) {
        self.workers[worker].uploading = true;
        if let Some(conn) = self.workers[worker].conn {
            self.reply(self.upload_time, Parcel::Payload(conn, task, hash));
        }
    }
}

/// What must hold over the whole of a run, deaths included.
struct Oracle {
    /// The state as the facts alone make it.
    replayed: Durable,
    /// Of each round whose commit became durable, the model.
    models: Vec<Hash>,
    held: BTreeMap<TaskId, (EventNo, Hash)>,
    withdrawn: BTreeSet<TaskId>,
}

impl Default for Oracle {
    fn default() -> Self {
        let (models, held, withdrawn) = Default::default();
        Self { replayed: Durable::new(RUN), models, held, withdrawn }
    }
}

impl Oracle {
    fn start(&mut self, journal: &[Event]) {
        (self.replayed, self.held, self.withdrawn) = (Durable::new(RUN), BTreeMap::new(), BTreeSet::new());
        journal.iter().for_each(|event| self.saw(event, EventNo(0)));
    }

    fn saw(&mut self, event: &Event, number: EventNo) {
        match event {
            Event::Held { task, update } => {
                assert!(self.held.insert(*task, (number, update.hash)).is_none(), "{task} is held twice");
                assert!(!self.withdrawn.contains(task), "{task} was withdrawn and is held");
            }
            Event::Lost { task } => assert!(self.held.remove(task).is_some(), "{task} is lost and was not held"),
            Event::Withdrawn { task, .. } => {
                assert!(!self.held.contains_key(task), "{task} was held and is withdrawn");
                self.withdrawn.insert(*task);
            }
            Event::Committed { entries, .. } => {
                assert!(entries.iter().all(|entry| self.held.contains_key(&entry.task)));
                assert!(entries.iter().all(|entry| !self.replayed.committed.contains_key(&entry.task)), "counts twice");
                let workers: BTreeSet<WorkerId> = entries.iter().map(|entry| entry.worker).collect();
                assert_eq!(workers.len(), entries.len(), "a worker counts twice");
            }
            _ => {}
        }
        let over = matches!(self.replayed.phase, Phase::Finished(_) | Phase::Aborted);
        let again = matches!(event, Event::Started { .. } | Event::Reverted { .. });
        assert!(!over || again || !event.is_fact(), "{event:?} after the end");
        if event.is_fact() {
            self.replayed.apply(event);
        }
    }

    fn durable(&mut self, disk: &Durable) {
        let same = disk.rounds.iter().zip(&self.models).all(|(now, before)| now == before);
        assert!(same, "a durable round has another model now");
        if disk.rounds.len() > self.models.len() {
            self.models.clone_from(&disk.rounds);
        }
    }
}

/// A receipt's update is durable, in one round, once.
fn check_receipt(disk: &Durable, receipt: &Receipt) {
    let entry = Entry { task: receipt.task, worker: receipt.worker, hash: receipt.hash };
    assert_eq!(disk.committed.get(&receipt.task), Some(&(receipt.round, entry)), "{receipt:?} is not durable");
    assert_eq!(disk.model_of(receipt.round), Some(receipt.model_hash), "{receipt:?} names another model");
    assert_eq!(disk.committed.values().filter(|(_, e)| *e == entry).count(), 1, "{receipt:?} counts twice");
}
