//! From an offer to a held update: what is checked before a byte of payload is read, permits, and the answers.
//!
//! Late, stale, duplicate and refused are answers. Redelivery is idempotent: the first payload held for a task
//! wins, the same hash again gets the same answer, and a committed task gets its receipt again.

use crate::ids::{ConnId, Hash, RunId, TaskId, WorkerId, WorkerName};
use crate::limits::{EXAMPLES_MAX, PAYLOAD_AT_ONCE_BYTES_MAX, ROWS_BYTES_MAX, SURVEY_BYTES_MAX, TASKS_OF_A_WORKER_MAX};
use crate::messages::{Encoding, Failure, Manifest, Receipt, Refusal, TaskKind, ToWorker};
use crate::plan::{Durability, Mode};

use super::planted::{Bug, is_planted};
use super::state::{Task, TaskState, Work};
use super::{Act, Entry, Event, EventNo, Federation, Gate, Gone, HeldUpdate, Notice, Output, Withdrawal};

/// An accepted offer whose payload is not held yet.
#[derive(Clone, Debug)]
pub(super) struct Receiving {
    conn: ConnId,
    kind: TaskKind,
    update: Box<HeldUpdate>,
    /// Its place in the line for permits.
    turn: Turn,
}

impl Receiving {
    pub(super) fn is_from(&self, conn: ConnId) -> bool {
        self.conn == conn
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Small: needs none.
    AtOnce,
    /// Has one.
    Granted,
    /// Waits for one.
    Queued,
}

/// What an offer gets, decided before anything changes.
enum Answer {
    Take,
    /// Said twice: the payload is on its way, or its turn will come.
    Nothing,
    Again(ToWorker),
    Receipt(Box<Receipt>),
    Late,
    Refuse(Refusal),
}

impl Federation {
    pub(super) fn offered(&mut self, conn: ConnId, manifest: &Manifest, authentic: bool) {
        let now = self.volatile.now;
        let Some(session) = self.volatile.sessions.get_mut(&conn) else { return };
        session.heard = now;
        let (worker, name, weight_max) = (session.worker, session.name.clone(), session.weight_max);
        let task = manifest.task;
        match self.answer(conn, worker, weight_max, manifest, authentic) {
            Answer::Take => self.take(conn, manifest),
            Answer::Nothing => self.notice(Notice::Duplicate { name, task }),
            Answer::Again(message) => {
                self.notice(Notice::Duplicate { name, task });
                self.promise(Act::Send { conn, message });
            }
            Answer::Receipt(receipt) => {
                self.notice(Notice::Duplicate { name, task });
                self.act_on_commit(Act::Receipt { conn, receipt: *receipt });
            }
            Answer::Late => {
                self.notice(Notice::Late { name, task });
                self.send(conn, ToWorker::Late { task });
            }
            Answer::Refuse(refusal) => self.refuse(conn, &name, worker, task, refusal),
        }
    }

    fn answer(&self, conn: ConnId, worker: WorkerId, weight_max: u32, manifest: &Manifest, authentic: bool) -> Answer {
        if manifest.worker != worker {
            return Answer::Refuse(Refusal::WrongWorker);
        }
        if !authentic {
            return Answer::Refuse(Refusal::WrongSignature);
        }
        if manifest.run != self.durable.run {
            return Answer::Refuse(Refusal::WrongRun);
        }
        let lost = self.find(manifest.task).is_some_and(|(_, task)| matches!(task.state, TaskState::Lost(_)));
        if let Some((round, entry)) = self.durable.committed.get(&manifest.task).filter(|_| !lost) {
            return self.answer_committed(worker, manifest, *round, entry.worker, entry.hash);
        }
        let Some((work, task)) = self.find(manifest.task) else { return Answer::Late };
        if task.worker != worker {
            return Answer::Refuse(Refusal::WrongWorker);
        }
        match &task.state {
            TaskState::Held(_) if is_planted(Bug::HeldTwice) => self.answer_open(conn, work, weight_max, manifest),
            TaskState::Withdrawn(_) => Answer::Late,
            TaskState::Held(update) if update.hash == manifest.hash => {
                Answer::Again(ToWorker::Held { task: manifest.task, hash: manifest.hash })
            }
            TaskState::Held(update) => Answer::Again(ToWorker::AlreadyHeld { task: manifest.task, hash: update.hash }),
            TaskState::Lost(update) if update.hash != manifest.hash => {
                Answer::Again(ToWorker::AlreadyHeld { task: manifest.task, hash: update.hash })
            }
            TaskState::Open | TaskState::Lost(_) => self.answer_open(conn, work, weight_max, manifest),
        }
    }

    fn answer_committed(
        &self,
        worker: WorkerId,
        manifest: &Manifest,
        round: u32,
        owner: WorkerId,
        hash: Hash,
    ) -> Answer {
        let task = manifest.task;
        if owner != worker {
            return Answer::Refuse(Refusal::WrongWorker);
        }
        if hash != manifest.hash {
            return Answer::Again(ToWorker::AlreadyHeld { task, hash });
        }
        let Some(model_hash) = self.durable.model_of(round) else { return Answer::Late };
        let run = self.durable.run;
        Answer::Receipt(Box::new(Receipt { run, worker, task, hash, round, model_hash }))
    }

    fn answer_open(&self, conn: ConnId, work: &Work, weight_max: u32, manifest: &Manifest) -> Answer {
        if let Err(refusal) = self.check_manifest(work, weight_max, manifest) {
            return Answer::Refuse(refusal);
        }
        let coming = self.volatile.receiving.get(&manifest.task);
        let twice = coming.is_some_and(|coming| coming.conn == conn && coming.update.hash == manifest.hash);
        if twice { Answer::Nothing } else { Answer::Take }
    }

    /// Everything that can be said against an offer without its payload.
    fn check_manifest(&self, work: &Work, weight_max: u32, manifest: &Manifest) -> Result<(), Refusal> {
        let frozen = self.durable.frozen.as_ref();
        let model_bytes = frozen.map_or(0, |frozen| frozen.parameters * 4);
        let (fits, expected) = match work.kind {
            TaskKind::Update | TaskKind::Gradient | TaskKind::Partial => (manifest.bytes == model_bytes, model_bytes),
            TaskKind::Survey => ((1..=SURVEY_BYTES_MAX).contains(&manifest.bytes), SURVEY_BYTES_MAX),
            TaskKind::Rows => (manifest.bytes <= ROWS_BYTES_MAX, ROWS_BYTES_MAX),
            TaskKind::Evaluation => (manifest.bytes == 0, 0),
        };
        let folds = folds(work.kind);
        let layout = if folds { frozen.map(|frozen| frozen.layout) } else { Some(manifest.layout) };
        let count_fits = manifest.examples <= EXAMPLES_MAX;
        let loss_fits = manifest.metrics.train_loss.is_none_or(f64::is_finite) && manifest.metrics.seconds.is_finite();
        let evaluation_fits = manifest.metrics.evaluation.as_ref().is_none_or(|e| e.check().is_ok());
        let refuse = |holds: bool, refusal: Refusal| if holds { Ok(()) } else { Err(refusal) };
        refuse(manifest.kind == work.kind, Refusal::WrongKind)?;
        refuse(manifest.base == work.base, Refusal::WrongBase)?;
        refuse(layout == Some(manifest.layout), Refusal::WrongLayout)?;
        refuse(manifest.encoding == Encoding::F32 && manifest.groups == 1, Refusal::WrongEncoding)?;
        refuse(fits, Refusal::WrongLength { got: manifest.bytes, expected })?;
        let weight = Refusal::WrongWeight { got: manifest.weight, max: weight_max };
        refuse(!folds || (1..=weight_max).contains(&manifest.weight), weight)?;
        refuse(count_fits && loss_fits && evaluation_fits, Refusal::WrongMetrics)
    }

    fn find(&self, task: TaskId) -> Option<(&Work, &Task)> {
        let work = self.durable.phase.work()?;
        Some((work, work.tasks.get(&task)?))
    }

    /// Accepts an offer: its payload may come.
    fn take(&mut self, conn: ConnId, manifest: &Manifest) {
        let task = manifest.task;
        let update = Box::new(HeldUpdate {
            hash: manifest.hash,
            bytes: manifest.bytes,
            examples: manifest.examples,
            weight: manifest.weight,
            norm: 0.0,
            metrics: manifest.metrics.clone(),
        });
        self.stop_receiving(task);
        // An evaluation is in its manifest, and so are no rows: neither sends a payload.
        if manifest.bytes == 0 {
            self.hold(conn, task, manifest.kind, update);
            return;
        }
        let turn = if manifest.bytes <= PAYLOAD_AT_ONCE_BYTES_MAX { Turn::AtOnce } else { Turn::Queued };
        self.volatile.receiving.insert(task, Receiving { conn, kind: manifest.kind, update, turn });
        if turn == Turn::AtOnce {
            self.receive(task);
        } else {
            self.volatile.queue.push_back(task);
            self.grant();
        }
    }

    /// Gives free permits to those who wait longest.
    fn grant(&mut self) {
        while self.permits_free() > 0 {
            let Some(task) = self.volatile.queue.pop_front() else { return };
            let waiting = self.volatile.receiving.get_mut(&task).filter(|receiving| receiving.turn == Turn::Queued);
            let Some(receiving) = waiting else { continue };
            receiving.turn = Turn::Granted;
            self.volatile.permits_used += 1;
            self.receive(task);
        }
    }

    fn receive(&mut self, task: TaskId) {
        if let Some(receiving) = self.volatile.receiving.get(&task) {
            let (conn, kind, go) = (receiving.conn, receiving.kind, receiving.turn == Turn::Granted);
            let (hash, bytes) = (receiving.update.hash, receiving.update.bytes);
            self.act(Act::Receive { conn, task, kind, hash, bytes, go });
        }
    }

    pub(super) fn verified(&mut self, task: TaskId, hash: Hash, norm: f64) {
        // A result of what was replaced or forgotten says nothing of what is held or coming now.
        let Some(mut receiving) = self.received(task, hash) else { return };
        if !self.task_is_open(task) && !is_planted(Bug::HeldTwice) && !is_planted(Bug::LateFolded) {
            return self.act(Act::Forget { task, hash });
        }
        receiving.update.norm = norm;
        self.hold(receiving.conn, task, receiving.kind, receiving.update);
    }

    fn hold(&mut self, conn: ConnId, task: TaskId, kind: TaskKind, update: Box<HeldUpdate>) {
        let (hash, weight) = (update.hash, update.weight);
        self.emit(Event::Held { task, update });
        self.promise(Act::Send { conn, message: ToWorker::Held { task, hash } });
        if folds(kind) {
            self.act(Act::Fold { task, hash, weight });
        }
    }

    /// A held payload is not what it was: its worker, who keeps a copy until the receipt, is asked again.
    pub(super) fn lost(&mut self, task: TaskId, hash: Hash) {
        let Some((_, t)) = self.find(task) else { return };
        let is_it = matches!(&t.state, TaskState::Held(update) if update.hash == hash);
        if !is_it || self.volatile.folded.contains(&task) {
            return;
        }
        let worker = t.worker;
        (self.volatile.merging, self.volatile.fleet_changed) = (false, true);
        // Who is asked again has its time, also if the others' is over; and if it does not come, that is said.
        self.volatile.overdue = false;
        self.emit(Event::Lost { task });
        let conn = self.volatile.by_worker.get(&worker).copied();
        if let Some(conn) = conn.filter(|conn| self.volatile.sessions.get(conn).is_some_and(|session| session.ready)) {
            self.announce(conn, task);
        }
    }

    /// Asks for all that is held and not in the sum.
    pub(super) fn fold_all(&mut self) {
        let work = self.durable.phase.work().filter(|work| folds(work.kind));
        let held: Vec<(TaskId, Hash, u32)> =
            work.into_iter().flat_map(Work::held).map(|(task, _, update)| (task, update.hash, update.weight)).collect();
        for (task, hash, weight) in held {
            self.act(Act::Fold { task, hash, weight });
        }
    }

    /// An act that says of a payload that it is held, for the first time or again.
    fn promise(&mut self, act: Act) {
        let last = EventNo(self.volatile.events);
        let after = match self.plan.rounds.durability {
            Durability::Round => Gate::Appended(last),
            Durability::Update => Gate::Synced(last),
        };
        self.volatile.outputs.push_back(Output::Act { after, act });
    }

    pub(super) fn spoiled(&mut self, task: TaskId, hash: Hash, refusal: Refusal) {
        let Some(receiving) = self.received(task, hash) else { return };
        self.act(Act::Forget { task, hash });
        let Some(session) = self.volatile.sessions.get(&receiving.conn) else { return };
        let (worker, name) = (session.worker, session.name.clone());
        self.refuse(receiving.conn, &name, worker, task, refusal);
    }

    /// The stream ended early: the task stays open, and its worker offers again when it is back. It is made to come
    /// back, since one that believes its payload sent would wait for ever.
    pub(super) fn cut(&mut self, task: TaskId, hash: Hash) {
        if let Some(receiving) = self.received(task, hash) {
            self.act(Act::Forget { task, hash });
            self.eject(receiving.conn, Gone::Disconnected);
        }
    }

    fn refuse(&mut self, conn: ConnId, name: &WorkerName, worker: WorkerId, task: TaskId, refusal: Refusal) {
        self.notice(Notice::Refused { name: name.clone(), task, refusal });
        let own = self.find(task).is_some_and(|(_, t)| t.worker == worker && t.state == TaskState::Open);
        if own {
            self.stop_receiving(task);
            self.emit(Event::Withdrawn { task, why: Withdrawal::Refused(refusal) });
        }
        self.send(conn, ToWorker::Refused { task, refusal });
    }

    pub(super) fn failed(&mut self, conn: ConnId, task: TaskId, failure: Failure) {
        let Some(session) = self.volatile.sessions.get(&conn) else { return };
        let worker = session.worker;
        let own = self.find(task).is_some_and(|(_, t)| t.worker == worker && t.state == TaskState::Open);
        if own {
            self.stop_receiving(task);
            self.emit(Event::Withdrawn { task, why: Withdrawal::Failed(failure) });
        }
    }

    /// Withdraws the open task of a worker that left for good. What a final set of updates needs cannot be withdrawn.
    pub(super) fn withdraw_of(&mut self, worker: WorkerId) {
        if matches!(self.durable.phase, super::Phase::Committing(_)) {
            self.volatile.parted.insert(worker);
            return;
        }
        let open: Vec<TaskId> =
            self.open_tasks().filter(|(_, task)| task.worker == worker).map(|(task, _)| task).collect();
        for task in open {
            self.withdraw(task, Withdrawal::Left);
        }
    }

    pub(super) fn withdraw(&mut self, task: TaskId, why: Withdrawal) {
        if !is_planted(Bug::LateFolded) {
            self.stop_receiving(task);
        }
        self.volatile.fleet_changed = true;
        self.emit(Event::Withdrawn { task, why });
    }

    /// Takes an offer whose payload has come to its end out of the table; nothing if another replaced it.
    fn received(&mut self, task: TaskId, hash: Hash) -> Option<Receiving> {
        if self.volatile.receiving.get(&task)?.update.hash != hash {
            return None;
        }
        let receiving = self.volatile.receiving.remove(&task)?;
        self.release(receiving.turn);
        Some(receiving)
    }

    fn release(&mut self, turn: Turn) {
        if turn == Turn::Granted {
            self.volatile.permits_used -= 1;
            self.grant();
        }
    }

    /// Takes an offer out of the table, wherever it is; the shell forgets what it was told of.
    pub(super) fn stop_receiving(&mut self, task: TaskId) {
        let Some(receiving) = self.volatile.receiving.remove(&task) else { return };
        if receiving.turn == Turn::Queued {
            self.volatile.queue.retain(|queued| *queued != task);
        } else {
            self.act(Act::Forget { task, hash: receiving.update.hash });
        }
        self.release(receiving.turn);
    }

    pub(super) fn stop_receiving_all(&mut self) {
        // Those who wait go first, so that no permit is given to one of them on the way.
        self.volatile.queue.clear();
        self.volatile.receiving.retain(|_, receiving| receiving.turn != Turn::Queued);
        while let Some(&task) = self.volatile.receiving.keys().next() {
            self.stop_receiving(task);
        }
    }

    pub(super) fn stop_receiving_from(&mut self, conn: ConnId) {
        let receiving = self.volatile.receiving.iter();
        let tasks: Vec<TaskId> = receiving.filter(|(_, r)| r.is_from(conn)).map(|(task, _)| *task).collect();
        for task in tasks {
            self.stop_receiving(task);
        }
    }

    /// A worker that died between the commit and its receipt may have nothing left to ask with; and a receipt may follow the
    /// next task, so that two are on their way. Of a round that is made again nobody is told to delete anything.
    pub(super) fn receipts_of_last(&mut self, conn: ConnId, worker: WorkerId) {
        if self.durable.is_redoing() {
            return;
        }
        for task in self.durable.latest.get(&worker).copied().unwrap_or_default().into_iter().flatten() {
            let Some(&(round, Entry { hash, .. })) = self.durable.committed.get(&task) else { continue };
            let Some(model_hash) = self.durable.model_of(round) else { continue };
            let receipt = Receipt { run: self.durable.run, worker, task, hash, round, model_hash };
            self.act_on_commit(Act::Receipt { conn, receipt });
        }
    }

    /// Everybody who is in gets its open task, as if it had come back now.
    pub(super) fn give_all_again(&mut self) {
        let fleet: Vec<(ConnId, WorkerId)> =
            self.ready_workers().map(|(conn, session)| (conn, session.worker)).collect();
        for (conn, worker) in fleet {
            self.give_again(conn, worker);
        }
    }

    /// A returning worker gets its open task again, or a new one with the same base.
    pub(super) fn give_again(&mut self, conn: ConnId, worker: WorkerId) {
        let Some(work) = self.durable.phase.work() else { return };
        let Some((task, last)) = work.latest_of(worker) else { return };
        let is_final = matches!(self.durable.phase, super::Phase::Committing(_)) && !last.state.is_open();
        if is_final || self.volatile.merging || self.volatile.stopping {
            return;
        }
        let (round, kind, base) = (work.round, work.kind, work.base);
        let given = work.tasks.values().filter(|task| task.worker == worker).count();
        match last.state {
            TaskState::Open | TaskState::Lost(_) => self.announce(conn, task),
            TaskState::Withdrawn(Withdrawal::Left | Withdrawal::Refused(_)) if given < TASKS_OF_A_WORKER_MAX => {
                let name = last.name.clone();
                let task = self.assign(round, kind, base, worker, name);
                self.announce(conn, task);
                if !self.volatile.overdue {
                    self.resume();
                }
            }
            TaskState::Held(_) | TaskState::Withdrawn(_) => {}
        }
    }

    /// The permits are those of the payloads that have one, the line those that wait, and the shell receives what
    /// neither waits nor is forgotten.
    #[cfg(test)]
    pub(super) fn check_receiving(&self, expected: &std::collections::BTreeMap<TaskId, (ConnId, Hash)>) {
        let volatile = &self.volatile;
        let with = |turn| volatile.receiving.iter().filter(move |(_, r)| r.turn == turn);
        assert_eq!(with(Turn::Granted).count(), volatile.permits_used as usize, "permits leak");
        let queued: Vec<TaskId> = with(Turn::Queued).map(|(task, _)| *task).collect();
        let mut queue: Vec<TaskId> = volatile.queue.iter().copied().collect();
        queue.sort();
        assert_eq!(queue, queued, "the line is who waits");
        let receiving = volatile.receiving.iter().filter(|(_, r)| r.turn != Turn::Queued);
        let receiving = receiving.map(|(task, r)| (*task, (r.conn, r.update.hash))).collect();
        assert_eq!(*expected, receiving, "the shell receives what the machine waits for");
        assert!(
            volatile
                .receiving
                .iter()
                .all(|(task, r)| { self.task_is_open(*task) && volatile.sessions.contains_key(&r.conn) })
        );
    }

    /// The run as the tests' and the shell's manifests name it.
    #[must_use]
    pub fn run(&self) -> RunId {
        self.durable.run
    }

    /// Whether workers of this run send what the coordinator folds.
    pub(super) fn work_kind(&self) -> TaskKind {
        match self.plan.learning.train.mode {
            Mode::Federated => TaskKind::Update,
            Mode::Gradient => TaskKind::Gradient,
            Mode::Central => TaskKind::Evaluation,
        }
    }
}

pub(super) fn folds(kind: TaskKind) -> bool {
    matches!(kind, TaskKind::Update | TaskKind::Gradient)
}
