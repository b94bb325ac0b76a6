//! The coordinator's shell: what the real one does around its [`Core`], with the real workshop called in place and the
//! real store over the torn disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator::core::{Core, Effect};
use coordinator::intake::Payload;
use coordinator::store::StoreError;
use coordinator::store::disk::Disk;
use coordinator::store::run::{Loaded, RunStore};
use coordinator::telemetry::{Kind, Telemetry};
use coordinator::workshop::{Content, Done, Job, Workshop};
use protocol::federation::{Act, Assignment, Event, Federation, Input, Withdrawal};
use protocol::ids::{ConnId, Hash, TaskId, Time};
use protocol::limits::{PAYLOAD_AT_ONCE_BYTES_MAX, UPLOAD_PERMITS};
use protocol::messages::{Assigned, ContentRef, FromWorker, Manifest, TaskKind, ToWorker, Upload, Welcome};
use protocol::plan::Durability;
use protocol::sum::{Checker, Verifier};
use tokio::sync::mpsc::UnboundedReceiver;

use super::contents::open;
use super::planted::Planted;
use super::scenario::End;
use super::world::{Down, Happening, RUN, Up, World};

/// Jobs that may wait for the workshop: each held task of a fleet has a few.
const JOBS_MAX: usize = 2_000;

/// How long goodbyes take, at an end in order.
const PARTING: Duration = Duration::from_millis(20);

/// How soon a job that found the disk full is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Runs of up to so many facts have each announcement looked for on the disk.
const PROVE_ALWAYS: u64 = 100;

/// How often the whole state is compared with a replay, in inputs.
const COMPARE_EVERY: u64 = 64;

/// A process.
pub(super) struct Coordinator {
    pub(super) core: Core,
    workshop: Workshop,
    results: UnboundedReceiver<Done>,
    pub(super) born: Time,
    alarm: Option<Time>,
    jobs: VecDeque<Job>,
    is_working: bool,
    is_full: bool,
    /// A commit was appended, and no sync asked for since.
    commit_waits: bool,
    /// One was handed to the store, and not synced.
    commit_unsynced: bool,
    /// Facts in the store's hands.
    handed: usize,
    peers: BTreeMap<ConnId, BTreeSet<Hash>>,
    contents: BTreeMap<Hash, Arc<Content>>,
    newest: Option<Hash>,
    uploads: Uploads,
    inputs: u64,
    pub(super) is_parting: bool,
}

/// Payloads on their way.
#[derive(Default)]
struct Uploads {
    tickets: u64,
    expected: BTreeMap<TaskId, Expected>,
    early: BTreeMap<(ConnId, TaskId), Early>,
    told: BTreeMap<ConnId, TaskId>,
}

/// A stream that the machine has not asked for yet: the payload's hash, and its bytes.
type Early = (Hash, Arc<[u8]>);

struct Expected {
    conn: ConnId,
    kind: TaskKind,
    hash: Hash,
    bytes: u64,
    coming: Option<Coming>,
}

struct Coming {
    ticket: u64,
    body: Arc<[u8]>,
    part: Option<String>,
}

impl Coordinator {
    /// Its end of a connection is gone.
    pub(super) fn forget(&mut self, conn: ConnId) {
        self.peers.remove(&conn);
        self.uploads.told.remove(&conn);
        self.uploads.early.retain(|(of, _), _| *of != conn);
    }
}

impl World {
    // --- the process ---

    /// Opens what is on the disk, and goes on where it ends.
    pub(super) fn start_coordinator(&mut self) {
        if self.coordinator.is_some() {
            return;
        }
        self.life += 1;
        let disk = Box::new(self.volume.mount());
        let plan = self.scenario.plan.clone();
        self.look_at_damage();
        let loaded = match self.open(disk) {
            Ok(loaded) => loaded,
            Err(error) => return self.cannot_open(&error),
        };
        let whole = loaded.whole;
        for warning in &loaded.warnings {
            let warning = warning.to_string();
            self.note(|_| format!("the store says: {warning}"));
        }
        if whole.is_some() {
            self.count("fell back to an older model");
            if !self.weather.was_damaged {
                self.fail(format!("a model is damaged that nobody has touched: {:?}", loaded.warnings));
            }
        }
        self.forget_damage();
        let read = self.oracle.loaded(&loaded.events);
        self.check(read);
        // What an earlier process wrote and did not sync is durable only if the store made it so when it opened.
        self.see_synced();
        if self.planted != Some(Planted::TaskReused) || self.starts == 0 {
            self.starts += 1;
        }
        let mut machine = Federation::new(plan, RUN);
        for event in &loaded.events {
            machine.apply(event);
        }
        let (start, facts) = (self.starts, loaded.events.len());
        self.note(|_| format!("the coordinator starts, number {start}, with {facts} facts"));
        let Loaded { store, schema, state, lost, .. } = loaded;
        let nowhere = PathBuf::new();
        let made = Workshop::new(self.scenario.plan.clone(), store, nowhere, schema, state, telemetry());
        let (workshop, results) =
            match made.and_then(|(mut workshop, done)| workshop.begin().map(|()| (workshop, done))) {
                Ok(made) => made,
                Err(error) => return self.fail(format!("what was loaded makes no workshop: {error}")),
            };
        self.coordinator = Some(Coordinator {
            core: Core::new(machine),
            workshop,
            results,
            born: self.now,
            alarm: None,
            jobs: VecDeque::new(),
            is_working: false,
            is_full: false,
            commit_waits: false,
            commit_unsynced: false,
            handed: facts,
            peers: BTreeMap::new(),
            contents: BTreeMap::new(),
            newest: None,
            uploads: Uploads::default(),
            inputs: 0,
            is_parting: false,
        });
        let done = self.results();
        self.take_in(done);
        self.tell_core(self.life, Input::Start { start, whole });
        for (task, hash) in lost {
            self.tell_core(self.life, Input::Lost { task, hash });
        }
        for worker in self.revoked.clone() {
            self.tell_core(self.life, Input::Revoked { worker });
        }
        let Some(coordinator) = &self.coordinator else { return };
        let (named, present) = (coordinator.core.machine().summary().model, coordinator.workshop.model());
        if named != present {
            self.fail(format!("the journal names model {named:?}, there is {present:?}"));
        }
    }

    /// The live machine against a replay of its facts.
    pub(super) fn compare(&mut self) {
        let Some(coordinator) = &self.coordinator else { return };
        let same = self.oracle.compare(coordinator.core.machine());
        self.check(same);
    }

    pub(super) fn open(&self, disk: Box<dyn Disk>) -> Result<Loaded, StoreError> {
        RunStore::open_with(disk, RUN, Some(self.scenario.plan.hash()), super::clock::read, self.scenario.limits)
    }

    /// A bit that turns over in the last records looks like a torn tail, and what it is in is cut, synced or not. That is
    /// said, and a person who reads it may mend it; here somebody does. But what is left must be what was written.
    fn look_at_damage(&mut self) {
        if !self.is_damaged() {
            return;
        }
        let Ok(loaded) = self.open(Box::new(self.volume.seen().mount())) else { return };
        if loaded.events.len() >= self.oracle.durable_facts() {
            return;
        }
        let (told, misread) = (!loaded.warnings.is_empty(), !self.oracle.begins_with(&loaded.events));
        self.mend();
        self.count("damaged tail cut");
        if misread || !told {
            self.fail("a damaged tail is misread, or cut in silence".to_owned());
        }
    }

    fn see_synced(&mut self) {
        let copy = Box::new(self.volume.synced().mount());
        if let Ok(loaded) = self.open(copy) {
            self.oracle.synced(loaded.events.len());
        }
    }

    fn cannot_open(&mut self, error: &StoreError) {
        self.note(|_| format!("the coordinator cannot start: {error}"));
        if self.volume.has_crashed() {
            return self.crash();
        }
        // A disk that fails or is full is tried again; what is damaged is for a person to mend.
        if !is_io(error) && !self.mend() {
            return self.fail(format!("the store refuses what nobody has damaged: {error}"));
        }
        self.end_coordinator(End::Kill);
        self.after(Duration::from_secs(1), Happening::Start);
    }

    pub(super) fn stop_coordinator(&mut self, down: Duration) -> bool {
        if self.coordinator.is_none() {
            return false;
        }
        self.tell_core(self.life, Input::Stop);
        if let Some(coordinator) = &mut self.coordinator {
            coordinator.is_parting = true;
            self.after(PARTING, Happening::EndInOrder(self.life));
            self.after(PARTING + down, Happening::Start);
        }
        true
    }

    /// Goodbyes were said, and everything that was to be durable is.
    pub(super) fn ended_in_order(&mut self, life: u64) {
        if life != self.life {
            return;
        }
        let busy = self.coordinator.as_ref().is_some_and(|c| c.is_working || !c.jobs.is_empty());
        if busy {
            return self.after(PARTING, Happening::EndInOrder(life));
        }
        if self.coordinator.is_some() {
            self.end_coordinator(End::Kill);
            self.after(PARTING, Happening::Start);
        }
    }

    // --- the core ---

    fn local(&self) -> Time {
        let born = self.coordinator.as_ref().map_or(Time(0), |coordinator| coordinator.born);
        Time(u64::try_from(self.now.since(born).as_nanos()).unwrap_or(u64::MAX))
    }

    pub(super) fn tell_core(&mut self, life: u64, input: Input) {
        if life != self.life {
            return;
        }
        let now = self.local();
        if self.coordinator.is_some() && input != Input::Tick {
            self.note(|_| format!("coordinator < {}", in_short(&input)));
        }
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.core.input(now, input);
        self.drain_core();
    }

    /// Does all that is to be done now, and looks at what became of it.
    fn drain_core(&mut self) {
        while let Some(effect) = self.coordinator.as_mut().and_then(|coordinator| coordinator.core.next()) {
            match effect {
                Effect::Job(job) => self.job(job),
                Effect::Tell(event) => self.told(&event),
                Effect::Act(act) => self.act(act),
                // Connections here sign nothing.
                Effect::Foresee(..) => {}
            }
            if self.failure.is_some() {
                return;
            }
        }
        let (life, now) = (self.life, self.now);
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.inputs += 1;
        let compare = coordinator.inputs.is_multiple_of(COMPARE_EVERY);
        let alarm = coordinator.core.alarm().map(|at| coordinator.born.after(Duration::from_nanos(at.0)));
        if alarm != coordinator.alarm {
            coordinator.alarm = alarm;
            if let Some(at) = alarm {
                self.at(at.max(Time(now.0 + 1)), Happening::Alarm(life));
            }
        }
        self.look(compare);
    }

    pub(super) fn alarm(&mut self, life: u64) {
        if life == self.life {
            if let Some(coordinator) = &mut self.coordinator {
                coordinator.alarm = None;
            }
            self.tell_core(life, Input::Tick);
        }
    }

    /// What holds after every input.
    fn look(&mut self, compare: bool) {
        let Some(coordinator) = &self.coordinator else { return };
        let status = coordinator.core.machine().status();
        let (jobs, expected) = (coordinator.jobs.len(), coordinator.uploads.expected.len());
        if status.permits_in_use > UPLOAD_PERMITS {
            self.fail(format!("{} permits are out", status.permits_in_use));
        }
        if jobs > JOBS_MAX || expected > self.workers.len() {
            self.fail(format!("{jobs} jobs and {expected} payloads wait"));
        }
        if compare {
            self.compare();
        }
    }

    /// People and programs are told: what made a model must be durable.
    fn told(&mut self, event: &Event) {
        let told = match event {
            Event::Surveyed { model, .. } => self.oracle.announce(0, *model),
            Event::Committed { figures, .. } => self.oracle.announce(figures.round, figures.model),
            _ => Ok(()),
        };
        self.check(told);
        if event.is_commit() {
            self.note(|_| format!("TOLD {}", in_short(event)));
            self.prove_if_new();
        }
    }

    /// Looks for everything that was announced in what a power cut would leave.
    pub(super) fn prove(&mut self) {
        match self.open(Box::new(self.volume.synced().mount())) {
            Ok(loaded) => {
                let proved = self.oracle.prove(&loaded.events);
                self.check(proved);
            }
            Err(error) if !self.is_damaged() => self.fail(format!("what is durable cannot be opened: {error}")),
            Err(_) => {}
        }
    }

    /// In a long run not every commit is looked for on its own: looking costs as much as the run is long.
    fn prove_if_new(&mut self) {
        let seldom = (self.oracle.facts() as u64 / PROVE_ALWAYS).pow(2) + 1;
        if self.oracle.is_unproved() && self.one_in(seldom) {
            self.prove();
        }
    }

    // --- the workshop ---

    fn job(&mut self, job: Job) {
        if let Job::Append(event) = &job {
            let appended = self.oracle.appended(event);
            self.check(appended);
            if let Event::Committed { entries, figures } = event {
                self.oracle.committed(figures.round, figures.model, entries);
            }
            *self.facts.entry(fact_name(event)).or_default() += 1;
            self.note(|_| format!("fact {}", in_short(event)));
        }
        let drops = self.planted == Some(Planted::RecordDropped) && matches!(job, Job::Append(Event::Held { .. }));
        if drops && self.one_in(40) {
            return;
        }
        let life = self.life;
        let early = self.planted == Some(Planted::ReceiptBeforeSync);
        let Some(coordinator) = &mut self.coordinator else { return };
        if let Job::Append(event) = &job {
            coordinator.commit_waits |= event.is_commit();
        }
        // The gates of a commit are opened when its sync is asked for.
        if let Job::Sync(no) = &job {
            let commit = std::mem::take(&mut coordinator.commit_waits);
            if early && commit {
                coordinator.core.synced(*no);
            }
        }
        coordinator.jobs.push_back(job);
        if !std::mem::replace(&mut coordinator.is_working, true) {
            self.after(Duration::from_micros(20), Happening::Work(life));
        }
    }

    /// The workshop takes its next job.
    pub(super) fn work(&mut self, life: u64) {
        if life != self.life {
            return;
        }
        let [_, syncs, _, failed] = self.volume.counts();
        let is_traced = self.is_traced();
        let Some(coordinator) = &mut self.coordinator else { return };
        let Some(job) = coordinator.jobs.pop_front() else {
            coordinator.is_working = false;
            return;
        };
        let told = if is_traced { in_short(&job).chars().take(60).collect() } else { String::new() };
        let quick = matches!(job, Job::Append(_) | Job::Keep(..) | Job::Forget(..));
        let is_fact = matches!(job, Job::Append(_));
        if let Job::Append(event) = &job {
            coordinator.commit_unsynced |= event.is_commit();
        }
        // The sync of a commit is forgotten.
        let syncs_commit = matches!(job, Job::Sync(_)) && std::mem::take(&mut coordinator.commit_unsynced);
        self.volume.set_lazy(self.planted == Some(Planted::CheckpointBeforeSync) && syncs_commit);
        let mut worked = if matches!(job, Job::Finish(_)) { Ok(None) } else { coordinator.workshop.work(job) };
        if let (Ok(None), true) = (&worked, coordinator.jobs.is_empty()) {
            worked = coordinator.workshop.flush().map(|()| None);
        }
        if self.volume.has_crashed() {
            return self.crash();
        }
        let [_, synced, _, failures] = self.volume.counts();
        self.note(|world| format!("job: {told}; on the disk: {}", world.volume.listing()));
        match worked {
            Ok(None) => {
                self.handed(is_fact);
                let takes = self.job_takes(quick, synced - syncs);
                let done = self.results();
                self.after(takes, Happening::Done(life, done));
            }
            Ok(Some(job)) => self.disk_is_full(job),
            Err(error) if failures > failed => self.end_of_error(&error.to_string()),
            Err(error) => self.fail(format!("the workshop broke: {error}")),
        }
    }

    /// A job was done; if there was no room before, there is now.
    fn handed(&mut self, is_fact: bool) {
        let life = self.life;
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.handed += usize::from(is_fact);
        if std::mem::take(&mut coordinator.is_full) {
            self.tell_core(life, Input::DiskBack);
        }
    }

    /// The job is done again, before any other, until there is room.
    fn disk_is_full(&mut self, job: Job) {
        let life = self.life;
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.jobs.push_front(job);
        let is_new = !std::mem::replace(&mut coordinator.is_full, true);
        self.after(RETRY_AFTER, Happening::Work(life));
        if is_new {
            self.count("job found the disk full");
            self.tell_core(life, Input::DiskFull);
        }
    }

    fn results(&mut self) -> Vec<Done> {
        let Some(coordinator) = &mut self.coordinator else { return Vec::new() };
        std::iter::from_fn(|| coordinator.results.try_recv().ok()).collect()
    }

    fn job_takes(&mut self, quick: bool, syncs: u64) -> Duration {
        let slow = self.now < self.weather.slow_until;
        let sync_max = if slow { self.weather.slow_sync } else { self.scenario.pace.sync_max };
        let job_max = if quick { Duration::from_micros(50) } else { self.scenario.pace.job_max };
        let mut takes = self.up_to(job_max);
        for _ in 0..syncs {
            takes += self.up_to(sync_max);
        }
        takes
    }

    pub(super) fn jobs_done(&mut self, life: u64, done: Vec<Done>) {
        if life == self.life {
            self.take_in(done);
            self.drain_core();
            self.after(Duration::from_micros(5), Happening::Work(life));
        }
    }

    fn take_in(&mut self, done: Vec<Done>) {
        // A model is reported before it is sealed; the oracle wants to have seen it.
        for done in &done {
            if let Done::Sealed(content) = done {
                self.see_model(content);
            }
        }
        for done in done {
            self.job_done(done);
        }
    }

    fn job_done(&mut self, done: Done) {
        let life = self.life;
        match done {
            Done::Learned(input) => self.tell_core(life, input),
            Done::Sealed(content) => self.sealed(content),
            Done::Synced { no, .. } => {
                let Some(coordinator) = &mut self.coordinator else { return };
                coordinator.core.synced(no);
                self.oracle.synced(coordinator.handed);
                self.note(|_| format!("synced up to {no:?}"));
                self.drain_core();
            }
            Done::Broken(error) => self.fail(format!("the workshop broke: {error}")),
            // The shell that calls the workshop says these itself.
            Done::DiskFull | Done::DiskBack => {}
            Done::Ready | Done::Schema(_) | Done::OnDisk(_) | Done::Spooled(_) | Done::Written(_) => {}
        }
    }

    fn see_model(&mut self, content: &Content) {
        if content.kind == Kind::Model {
            let numbers = protocol::layout::from_bytes(&open(content)).unwrap_or_default();
            let made = self.oracle.made(content.reference.hash, numbers);
            self.check(made);
        }
    }

    fn sealed(&mut self, content: Arc<Content>) {
        let (kind, hash) = (content.kind, content.reference.hash);
        let Some(coordinator) = &mut self.coordinator else { return };
        if kind == Kind::Model {
            let former = coordinator.newest.replace(hash);
            coordinator.contents.retain(|of, content| content.kind != Kind::Model || Some(*of) == former);
        }
        coordinator.contents.insert(hash, content);
    }

    // --- acts ---

    fn act(&mut self, act: Act) {
        match act {
            Act::Welcome { conn } => self.welcome(conn),
            Act::Assign { conn, assignment } => self.assign(conn, &assignment),
            Act::Send { conn, message } => self.say(conn, message),
            Act::Receipt { conn, receipt } => {
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.uploads.early.remove(&(conn, receipt.task));
                }
                let given = self.oracle.receipted(&receipt);
                self.check(given);
                self.prove_if_new();
                self.send_down(conn, Down::Receipt(receipt));
            }
            Act::Receive { conn, task, kind, hash, bytes, go } => {
                self.expect(conn, task, kind, hash, bytes);
                if go {
                    self.say(conn, ToWorker::Go { task, hash, from: 0 });
                }
            }
            Act::Forget { task, .. } => {
                if let Some(coordinator) = &mut self.coordinator {
                    coordinator.uploads.expected.remove(&task);
                }
            }
            Act::Close { conn, why } => self.close(conn, why),
            Act::Conflict { round, recorded, redone } => {
                self.fail(format!("round {round} was redone: {recorded} became {redone}"));
            }
            Act::Fail { sentence } => self.fail(format!("the run was given up: {sentence}")),
            Act::Fold { .. }
            | Act::Merge { .. }
            | Act::Step { .. }
            | Act::Train { .. }
            | Act::Finish { .. }
            | Act::End => {}
        }
    }

    fn say(&mut self, conn: ConnId, message: ToWorker) {
        let Some(coordinator) = &mut self.coordinator else { return };
        if let ToWorker::Held { task, .. }
        | ToWorker::AlreadyHeld { task, .. }
        | ToWorker::Late { task }
        | ToWorker::Refused { task, .. } = &message
        {
            coordinator.uploads.early.remove(&(conn, *task));
        }
        match &message {
            ToWorker::Held { task, hash } if self.scenario.plan.rounds.durability == Durability::Update => {
                self.prove_held(*task, *hash);
            }
            ToWorker::Finished { model_hash } => {
                let rounds = self.scenario.plan.learning.train.rounds;
                let announced = self.oracle.announce(rounds, *model_hash);
                self.check(announced);
                self.prove_if_new();
            }
            _ => {}
        }
        self.send_down(conn, Down::Said(message));
    }

    /// With durability "update", what is said to be held survives a power cut.
    fn prove_held(&mut self, task: TaskId, hash: Hash) {
        let seldom = (self.oracle.facts() as u64 / PROVE_ALWAYS).pow(2) + 1;
        if !self.one_in(seldom * 2) {
            return;
        }
        let copy = self.volume.synced();
        match self.open(Box::new(copy.mount())) {
            Ok(loaded) => {
                let kept = self.oracle.check_promise(&loaded.events, task, hash);
                self.check(kept);
                let mut bytes = Vec::new();
                let held = loaded.store.payload(task, hash).ok().flatten().map(|mut held| held.read_to_end(&mut bytes));
                // Rows are never on disk in the clear, and an evaluation is in its record.
                let kind = self.oracle.kind_of(task);
                let is_kept = !matches!(kind, Some(TaskKind::Rows | TaskKind::Evaluation));
                // What was damaged is found when it is folded, and asked for again then.
                let is_kept = is_kept && !self.weather.was_damaged;
                if is_kept && !(held.is_some() && Hash::of(&bytes) == hash || self.oracle.is_committed(task)) {
                    self.fail(format!("task {task}: held is said, and its payload is not durable"));
                }
            }
            Err(error) if !self.is_damaged() => self.fail(format!("what is durable cannot be opened: {error}")),
            Err(_) => {}
        }
    }

    fn welcome(&mut self, conn: ConnId) {
        let Some(link) = self.links.get(&conn) else { return };
        let plan = &self.scenario.plan;
        let welcome = Welcome {
            version: 1,
            run: RUN,
            ed25519: [0; 32],
            name: self.name_of(link.worker),
            weight_max: plan.ring.weight_max,
            norm_max: plan.ring.norm_max,
            learning: plan.learning.clone(),
        };
        self.say(conn, ToWorker::Welcome(Box::new(welcome)));
    }

    fn assign(&mut self, conn: ConnId, assignment: &Assignment) {
        let Assignment { task, round, kind, schema, model, layout, weight_shift } = *assignment;
        if let Some(link) = self.links.get(&conn) {
            let id = self.workers[link.worker].id;
            let given = self.oracle.assigned(id, task, round, kind, model);
            self.check(given);
            self.prove_if_new();
        }
        if let Some(coordinator) = &mut self.coordinator {
            coordinator.uploads.told.insert(conn, task);
        }
        let (schema, model) = (self.supply(conn, schema), self.supply(conn, model));
        let assigned = Assigned { task, round, kind, schema, model, layout, weight_shift };
        self.say(conn, ToWorker::Assigned(Box::new(assigned)));
    }

    /// Streams a content that the connection has not had.
    fn supply(&mut self, conn: ConnId, hash: Option<Hash>) -> Option<ContentRef> {
        let hash = hash?;
        let coordinator = self.coordinator.as_mut()?;
        let Some(content) = coordinator.contents.get(&hash).cloned() else {
            self.fail(format!("content {hash} is to be streamed and is not there"));
            return None;
        };
        let reference = content.reference.clone();
        let new = coordinator.peers.get_mut(&conn).is_some_and(|had| had.insert(hash));
        if new {
            let at = self.stream_time(conn, false);
            self.at(at, Happening::Content(conn, content));
        }
        Some(reference)
    }

    fn close(&mut self, conn: ConnId, why: protocol::federation::Gone) {
        self.note(|_| format!("the coordinator closes {conn:?}: {why}"));
        self.send_down(conn, Down::Close(why));
        if let Some(link) = self.links.get_mut(&conn) {
            link.server = false;
        }
        if let Some(coordinator) = &mut self.coordinator {
            coordinator.forget(conn);
        }
        let (life, hop) = (self.life, self.scenario.pace.hop_max);
        self.after(hop, Happening::Gone(life, conn));
    }

    // --- what connections hear ---

    pub(super) fn hear(&mut self, conn: ConnId, up: Up) {
        let life = self.life;
        let Some(coordinator) = &mut self.coordinator else { return };
        if coordinator.core.is_full() {
            return self.after(Duration::from_millis(10), Happening::Up(conn, up));
        }
        match up {
            Up::Join(instance) => {
                coordinator.peers.insert(conn, BTreeSet::new());
                let Some(link) = self.links.get(&conn) else { return };
                let worker = &self.workers[link.worker];
                let (id, name) = (worker.id, self.name_of(link.worker));
                if self.revoked.contains(&id) {
                    return self.close(conn, protocol::federation::Gone::Revoked);
                }
                let weight_max = self.scenario.plan.ring.weight_max;
                self.tell_core(life, Input::Joined { conn, worker: id, name, weight_max, instance });
            }
            Up::Said(message) => self.heard(conn, message),
            Up::Offer(manifest) => self.offered(conn, manifest),
            Up::Close => {
                coordinator.forget(conn);
                if let Some(link) = self.links.get_mut(&conn) {
                    link.server = false;
                }
                self.tell_core(life, Input::Gone { conn });
            }
        }
    }

    fn heard(&mut self, conn: ConnId, message: FromWorker) {
        self.tell_core(self.life, Input::Said { conn, message });
    }

    fn offered(&mut self, conn: ConnId, manifest: Box<Manifest>) {
        self.tell_core(self.life, Input::Offered { conn, manifest, authentic: true });
    }

    // --- payloads ---

    /// The machine waits for this from now on, and for nothing else for the same task.
    fn expect(&mut self, conn: ConnId, task: TaskId, kind: TaskKind, hash: Hash, bytes: u64) {
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.uploads.expected.insert(task, Expected { conn, kind, hash, bytes, coming: None });
        if let Some((_, body)) = coordinator.uploads.early.remove(&(conn, task)).filter(|(early, _)| *early == hash) {
            self.let_in(task, body);
        }
    }

    /// A stream has begun.
    pub(super) fn upload_begun(&mut self, conn: ConnId, upload: Upload, body: Arc<[u8]>) {
        let is_open = self.links.get(&conn).is_some_and(|link| link.server && link.client);
        let Some(coordinator) = self.coordinator.as_mut().filter(|_| is_open) else { return };
        let Upload { task, hash, .. } = upload;
        let expected = coordinator.uploads.expected.get(&task).filter(|e| e.conn == conn && e.hash == hash);
        match expected.map(|expected| expected.coming.is_some()) {
            Some(false) => self.let_in(task, body),
            Some(true) => {}
            None => {
                let Uploads { early, told, .. } = &mut coordinator.uploads;
                let told = told.get(&conn).copied();
                let rank = |task: TaskId| (Some(task) == told, task);
                if !early.keys().any(|(of, other)| *of == conn && rank(*other) > rank(task)) {
                    early.retain(|(of, _), _| *of != conn);
                    early.insert((conn, task), (hash, body));
                }
            }
        }
    }

    fn let_in(&mut self, task: TaskId, body: Arc<[u8]>) {
        let life = self.life;
        let (half, whole) = (self.up_to(self.scenario.pace.stream_max), self.up_to(self.scenario.pace.stream_max));
        let Some(coordinator) = &mut self.coordinator else { return };
        coordinator.uploads.tickets += 1;
        let ticket = coordinator.uploads.tickets;
        let Some(expected) = coordinator.uploads.expected.get_mut(&task) else { return };
        expected.coming = Some(Coming { ticket, body, part: None });
        if expected.bytes > PAYLOAD_AT_ONCE_BYTES_MAX {
            self.after(half, Happening::Half(life, ticket));
        } else {
            self.after(whole / 4, Happening::Received(life, ticket));
        }
    }

    fn coming(&mut self, life: u64, ticket: u64) -> Option<(TaskId, &mut Expected)> {
        let coordinator = self.coordinator.as_mut().filter(|_| life == self.life)?;
        let mut all = coordinator.uploads.expected.iter_mut();
        let (task, expected) =
            all.find(|(_, expected)| expected.coming.as_ref().is_some_and(|coming| coming.ticket == ticket))?;
        Some((*task, expected))
    }

    /// Half of a large payload is here: it goes to a file.
    pub(super) fn upload_half(&mut self, life: u64, ticket: u64) {
        let Some((task, expected)) = self.coming(life, ticket) else { return };
        let (hash, is_secret) = (expected.hash, expected.kind == TaskKind::Rows);
        let Some(coming) = &mut expected.coming else { return };
        // Numbers of parts are those that are free, also of what an earlier process left.
        let part = format!("payload-{hash}-{task}.part-{}", life * 100_000 + ticket);
        let half = coming.body[..coming.body.len() / 2].to_vec();
        if !is_secret {
            coming.part = Some(part.clone());
        }
        if is_secret || self.spool(&part, &half, Happening::Half(life, ticket)) {
            let takes = self.up_to(self.scenario.pace.stream_max);
            self.after(takes, Happening::Received(life, ticket));
        }
    }

    /// Whether `bytes` are in the file; if there is no room, `again` happens later.
    fn spool(&mut self, part: &str, bytes: &[u8], again: Happening) -> bool {
        let mut disk = self.volume.beside();
        let before = disk.list().ok().and_then(|files| files.into_iter().find(|(name, _)| name == part));
        let written = disk.append(part, bytes);
        if self.volume.has_crashed() {
            self.crash();
            return false;
        }
        match written {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                // What went there goes again, behind what was there.
                let cut = disk.truncate(part, before.map_or(0, |(_, bytes)| bytes));
                if cut.is_err() {
                    self.crash();
                } else {
                    self.after(RETRY_AFTER, again);
                }
                false
            }
            Err(error) => {
                self.end_of_error(&error.to_string());
                false
            }
        }
    }

    /// A payload's stream has come to its end.
    pub(super) fn upload_received(&mut self, life: u64, ticket: u64) {
        let ring = self.scenario.plan.ring;
        let Some((task, expected)) = self.coming(life, ticket) else { return };
        let (conn, kind, hash, bytes) = (expected.conn, expected.kind, expected.hash, expected.bytes);
        let Some(Coming { body, part, .. }) = &expected.coming else { return };
        let (body, part) = (body.clone(), part.clone());
        if let Some(part) = &part {
            let rest = &body[body.len() / 2..];
            if !self.spool(part, rest, Happening::Received(life, ticket)) || !self.sync_part(part) {
                return;
            }
        }
        if let Some(coordinator) = &mut self.coordinator {
            coordinator.uploads.expected.remove(&task);
        }
        if self.is_cut(conn) {
            return self.tell_core(life, Input::Cut { task, hash });
        }
        let verdict = if matches!(kind, TaskKind::Update | TaskKind::Gradient) {
            let mut verifier = Verifier::new(ring, bytes, hash);
            verifier.update(&body).and_then(|()| verifier.finish()).map(Some)
        } else {
            let mut checker = Checker::new(bytes, hash);
            checker.update(&body).and_then(|()| checker.finish()).map(|()| None)
        };
        match verdict {
            Ok(verified) => {
                let norm = verified.map_or(0.0, |verified| verified.norm());
                let payload = match part {
                    Some(part) => Payload::spooled(part, bytes, verified),
                    None if kind == TaskKind::Rows => Payload::secret(body.to_vec()),
                    None => Payload::in_memory(body.to_vec(), verified),
                };
                self.job(Job::Keep(task, hash, payload));
                self.tell_core(life, Input::Verified { task, hash, norm });
            }
            Err(refusal) => self.tell_core(life, Input::Spoiled { task, hash, refusal }),
        }
    }

    /// With durability "update", a payload is durable before it is kept.
    fn sync_part(&mut self, part: &str) -> bool {
        if self.scenario.plan.rounds.durability != Durability::Update {
            return true;
        }
        let synced = self.volume.beside().sync(part);
        if self.volume.has_crashed() {
            self.crash();
        } else if let Err(error) = &synced {
            self.end_of_error(&error.to_string());
        }
        synced.is_ok()
    }

    /// The next payload of a worker is cut on its way.
    fn is_cut(&mut self, conn: ConnId) -> bool {
        let Some(link) = self.links.get(&conn) else { return true };
        let worker = link.worker;
        let is_open = link.server && link.client;
        let cut = std::mem::take(&mut self.workers[worker].cuts_upload);
        if cut {
            self.count("upload cut");
        }
        !is_open || cut
    }
}

/// For a trace.
fn in_short(what: &impl std::fmt::Debug) -> String {
    format!("{what:?}").chars().take(200).collect()
}

fn fact_name(event: &Event) -> &'static str {
    match event {
        Event::Started { .. } => "started",
        Event::Surveyed { .. } => "surveyed",
        Event::Opened { .. } => "opened",
        Event::Assigned { .. } => "assigned",
        Event::Held { .. } => "held",
        Event::Withdrawn { why: Withdrawal::Late, .. } => "withdrawn, late",
        Event::Withdrawn { why: Withdrawal::Left, .. } => "withdrawn, left",
        Event::Withdrawn { why: Withdrawal::Failed(_), .. } => "withdrawn, failed",
        Event::Withdrawn { why: Withdrawal::Refused(_), .. } => "withdrawn, refused",
        Event::Lost { .. } => "lost",
        Event::Extended { .. } => "extended",
        Event::Closed { .. } => "closed",
        Event::Committed { .. } => "committed",
        Event::Reverted { .. } => "reverted",
        Event::Redone { .. } => "redone",
        Event::Voided => "voided",
        Event::Finished { .. } => "finished",
        Event::Aborted { .. } => "aborted",
        Event::Notice(_) => "noticed",
    }
}

fn is_io(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Full { .. } | StoreError::Io { .. } | StoreError::Unsynced { .. } | StoreError::Failed { .. }
    )
}

thread_local! {
    static TELEMETRY: Telemetry = Telemetry::new();
}

/// One for all worlds of a thread: nobody looks at it.
fn telemetry() -> Telemetry {
    TELEMETRY.with(Clone::clone)
}
