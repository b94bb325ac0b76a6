//! A worker's life as a value.
//!
//! [`Member`] eats [`Input`]s and is drained of [`Output`]s, like the federation on the other side: connecting and
//! coming back, reading the plan, one task at a time, offering what was made until its receipt comes. Files,
//! sockets, tensors and keys are the shell's.
//!
//! A payload is a pure function of the plan, the schema, the base model, the round, the worker's name and its data.
//! So what was made for a task that the coordinator has forgotten is offered for its successor (the same run, round,
//! base and kind), without training again.

use core::time::Duration;
use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::draw::Draw;
use crate::federation::{EventNo, Gate};
use crate::ids::{Hash, Instance, RunId, TaskId, Time, WorkerName};
use crate::limits::{BEAT_EVERY, RECONNECT_AFTER_MAX, RECONNECT_AFTER_MIN, SESSION_AGE_MAX};
use crate::messages::{Assigned, Failure, FromWorker, Leave, Metrics, Receipt, Refusal, TaskKind, ToWorker, Welcome};
use crate::plan::LearningPlan;

/// What [`Member::poll`] gives.
pub type Output = crate::federation::Output<Event, Act>;

/// What decides a payload, beside the plan, the worker and its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkKey {
    /// The run.
    pub run: RunId,
    /// The round; 0 for a survey and for rows.
    pub round: u32,
    /// The model to start from; zero where there is none.
    pub base: Hash,
    /// What kind of work.
    pub kind: TaskKind,
    /// BLAKE3 of the schema; zero where there is none.
    pub schema: Hash,
}

impl WorkKey {
    /// Whether a receipt answers for it in the end. All else ends when it is held.
    #[must_use]
    pub fn earns_a_receipt(&self) -> bool {
        matches!(self.kind, TaskKind::Update | TaskKind::Gradient | TaskKind::Partial)
    }
}

/// A payload that was made, by its figures. The bytes are the shell's, under their hash.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// BLAKE3 of the payload.
    pub hash: Hash,
    /// Its length.
    pub bytes: u64,
    /// The fingerprint of its layout; zero where there is none.
    pub layout: Hash,
    /// Training rows behind it.
    pub examples: u64,
    /// Training steps behind it.
    pub steps: u64,
    /// Its weight in the mean.
    pub weight: u32,
    /// Figures beside it.
    pub metrics: Metrics,
}

/// A payload that waits for its receipt: what a shell writes down so that a process that is killed need not make it
/// again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// What it was made for.
    pub key: WorkKey,
    /// The task that it is offered for.
    pub task: TaskId,
    /// Its figures.
    pub made: Box<Made>,
}

/// What happened. Facts change durable state; a notice is for telemetry only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A payload was made, and is kept until its receipt.
    Made {
        /// What for.
        key: WorkKey,
        /// For which task.
        task: TaskId,
        /// Its figures.
        made: Box<Made>,
    },
    /// The kept payload is offered for another task of the same key.
    Renamed {
        /// That task.
        task: TaskId,
    },
    /// The kept payload is no longer needed.
    Dropped {
        /// Which.
        hash: Hash,
    },
    /// Something to be told.
    Notice(Notice),
}

/// Something to be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Notice {
    /// The session is up.
    Joined {
        /// The name that this worker has in the fleet.
        name: WorkerName,
        /// The run.
        run: RunId,
    },
    /// No coordinator answered; the next attempt is after so many seconds.
    Unreachable {
        /// How many attempts failed since the last session.
        attempt: u32,
        /// How long it waits now.
        seconds: f64,
    },
    /// The connection ended.
    Lost,
    /// Work begins.
    Working {
        /// The round.
        round: u32,
        /// What kind.
        kind: TaskKind,
    },
    /// A payload was made.
    Made {
        /// The round.
        round: u32,
        /// Its figures beside it.
        metrics: Box<Metrics>,
    },
    /// The coordinator holds the payload.
    Held {
        /// The task.
        task: TaskId,
    },
    /// The update is durable and in the model.
    Receipted {
        /// The round.
        round: u32,
    },
    /// The round closed without this worker's update.
    Late {
        /// The task.
        task: TaskId,
    },
    /// What was offered was refused.
    Refused {
        /// The task.
        task: TaskId,
        /// Why.
        refusal: Refusal,
    },
    /// Training gave nothing to offer.
    Failed {
        /// Why.
        failure: Failure,
    },
    /// The coordinator goes away and comes back.
    GoingAway,
}

/// How a worker's life ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The run is over.
    Finished {
        /// The final model.
        model_hash: Hash,
    },
    /// It was told to stop.
    Stopped,
    /// A newer process with the same identity came.
    Displaced,
    /// The coordinator says that it cannot take part, and why.
    Rejected(String),
    /// It does not take part, for a reason of its own.
    Declined(String),
    /// The run was aborted.
    Aborted,
}

/// What the shell learned.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The session is up.
    Connected,
    /// The attempt to connect failed.
    Unreachable,
    /// The connection ended. Work that still waited for its contents was reported [`Input::Abandoned`] before.
    Lost,
    /// The coordinator said something other than a receipt.
    Said(ToWorker),
    /// The coordinator gave a receipt whose signature the shell has checked.
    Receipted(Receipt),
    /// The plan was read: the owner allows it, or not.
    Considered(Result<(), Leave>),
    /// The work that [`Act::Work`] asked for is done.
    Made {
        /// For which task it was begun.
        task: TaskId,
        /// What came of it.
        made: Box<Made>,
    },
    /// The work gave nothing to offer.
    Failed {
        /// For which task it was begun.
        task: TaskId,
        /// Why.
        failure: Failure,
    },
    /// The work could not begin: its contents did not come.
    Abandoned {
        /// For which task.
        task: TaskId,
    },
    /// The worker's data do not fit the schema.
    Unfit {
        /// For its owner.
        sentence: String,
    },
    /// The owner stops the process.
    Stop,
    /// The time that `Wait` named has come.
    Tick,
}

/// What the shell is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// Try to connect, and make a session.
    Connect,
    /// End the connection.
    Disconnect,
    /// Send a message.
    Send(FromWorker),
    /// Send [`FromWorker::Beat`] with the steps made so far.
    Beat {
        /// For which task.
        task: TaskId,
    },
    /// Read the plan and say [`Input::Considered`].
    Consider(Box<Welcome>),
    /// Fetch what the task needs, do it, say [`Input::Made`], `Failed`, `Abandoned` or `Unfit`. One at a time.
    Work(Box<Assigned>),
    /// Stop the work that goes on; what comes of it is not wanted.
    Cancel,
    /// Sign a manifest and send it; a payload up to [`crate::limits::PAYLOAD_AT_ONCE_BYTES_MAX`] follows at once.
    Offer {
        /// For which task.
        task: TaskId,
        /// What it was made for.
        key: WorkKey,
        /// What.
        made: Box<Made>,
    },
    /// Send the payload from a byte on.
    Upload {
        /// For which task.
        task: TaskId,
        /// Which.
        hash: Hash,
        /// From where.
        from: u64,
    },
    /// Delete a payload.
    Drop {
        /// Which.
        hash: Hash,
    },
    /// End the process, once what was sent is on its way.
    Exit(Ending),
}

/// One worker.
#[derive(Debug)]
pub struct Member {
    instance: Instance,
    durable: Durable,
    link: Link,
    work: Option<Work>,
    run: Option<RunId>,
    /// The plan that the owner allowed.
    allowed: Option<LearningPlan>,
    welcome: Option<Box<Welcome>>,
    /// Plans that the owner was asked about and has not spoken of: only the last one's verdict counts.
    considering: u32,
    now: Time,
    beat_at: Option<Time>,
    ended: bool,
    outputs: VecDeque<Output>,
    events: u64,
}

/// What survives a restart.
#[derive(Clone, Debug, Default, PartialEq)]
struct Durable {
    kept: Option<Kept>,
}

/// The way to the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    /// Down: the next attempt is then.
    Down { attempt: u32, retry_at: Time },
    /// An attempt is under way.
    Connecting { attempt: u32 },
    /// The session is up, and the plan is being read.
    Joining { attempt: u32 },
    /// In.
    Up {
        since: Time,
        /// The coordinator has said of the kept payload all that it will in this session.
        answered: bool,
        attempt: u32,
    },
    /// It was told to end.
    Leaving,
}

/// The task that is being worked on.
#[derive(Clone, Debug)]
struct Work {
    /// The task as it was begun: the shell's results name it.
    begun: TaskId,
    /// The task as it is called now.
    task: TaskId,
    key: WorkKey,
}

/// A session that lasted so long, or in which an offer was answered, did not fail: the next attempt is the first again.
const STEADY_AFTER: Duration = Duration::from_secs(1);

impl Member {
    /// A worker's process, `instance` a nonce of its own. It connects at the first [`Input::Tick`].
    #[must_use]
    pub fn new(instance: Instance) -> Self {
        Self {
            instance,
            durable: Durable::default(),
            link: Link::Down { attempt: 0, retry_at: Time(0) },
            work: None,
            run: None,
            allowed: None,
            welcome: None,
            considering: 0,
            now: Time(0),
            beat_at: None,
            ended: false,
            outputs: VecDeque::new(),
            events: 0,
        }
    }

    /// A process that found what an earlier one made, and offers it as soon as it is in. What is of another run than the
    /// coordinator's is dropped then.
    #[must_use]
    pub fn restored(instance: Instance, kept: Kept) -> Self {
        Self { durable: Durable { kept: Some(kept) }, ..Self::new(instance) }
    }

    /// Takes in one input. Total: whatever a coordinator can send gets an act or silence, never a panic.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.now = now.max(self.now);
        if self.ended {
            return;
        }
        match input {
            Input::Connected => self.connected(),
            Input::Unreachable => self.unreachable(),
            Input::Lost => self.lost(),
            Input::Said(message) => self.said(message),
            Input::Receipted(receipt) => self.receipted(&receipt),
            Input::Considered(verdict) => self.considered(verdict),
            Input::Made { task, made } => self.made(task, made),
            Input::Failed { task, failure } => self.failed(task, failure),
            Input::Abandoned { task } => drop(self.work.take_if(|work| work.begun == task)),
            Input::Unfit { sentence } => self.leave(Leave::DataUnfit(sentence.clone()), Ending::Declined(sentence)),
            Input::Stop => self.leave(Leave::Stopping, Ending::Stopped),
            Input::Tick => {}
        }
        self.look_at_the_clock();
    }

    /// Takes in one event: the only way that durable state changes.
    pub fn apply(&mut self, event: &Event) {
        self.durable.apply(event);
    }

    /// The next thing to do. Call until [`Output::Wait`].
    pub fn poll(&mut self) -> Output {
        self.outputs.pop_front().unwrap_or_else(|| Output::Wait(self.next_time()))
    }

    // --- outputs ---

    fn emit(&mut self, event: Event) {
        self.apply(&event);
        self.events += 1;
        self.outputs.push_back(Output::Append(event));
    }

    fn notice(&mut self, notice: Notice) {
        self.emit(Event::Notice(notice));
    }

    fn act(&mut self, act: Act) {
        self.outputs.push_back(Output::Act { after: Gate::Appended(EventNo(self.events)), act });
    }

    fn end(&mut self, ending: Ending) {
        if self.work.take().is_some() {
            self.act(Act::Cancel);
        }
        self.act(Act::Exit(ending));
        self.ended = true;
    }

    // --- the link ---

    fn connected(&mut self) {
        self.link = Link::Joining { attempt: self.attempt() };
        self.act(Act::Send(FromWorker::Join { instance: self.instance }));
    }

    fn unreachable(&mut self) {
        let attempt = self.attempt().saturating_add(1);
        let wait = self.backoff(attempt);
        self.link = Link::Down { attempt, retry_at: self.now.after(wait) };
        self.notice(Notice::Unreachable { attempt, seconds: wait.as_secs_f64() });
    }

    fn lost(&mut self) {
        self.notice(Notice::Lost);
        let steady =
            matches!(self.link, Link::Up { since, answered, .. } if answered || self.now.since(since) >= STEADY_AFTER);
        let attempt = match self.link {
            Link::Leaving => 0,
            _ if steady => 0,
            _ => self.attempt().saturating_add(1),
        };
        self.link = Link::Down { attempt, retry_at: self.now.after(self.backoff(attempt)) };
    }

    /// How many attempts came to nothing lately.
    fn attempt(&self) -> u32 {
        match self.link {
            Link::Down { attempt, .. }
            | Link::Connecting { attempt }
            | Link::Joining { attempt }
            | Link::Up { attempt, .. } => attempt,
            Link::Leaving => 0,
        }
    }

    /// Exponential, with jitter drawn from the process's nonce, so that a fleet does not come back as one.
    fn backoff(&self, attempt: u32) -> Duration {
        let longest = RECONNECT_AFTER_MIN.saturating_mul(1 << attempt.min(16)).min(RECONNECT_AFTER_MAX);
        let jitter = Draw::new(self.instance.0, "reconnect", u64::from(attempt), "").uniform();
        longest.mul_f64(0.5 + 0.5 * jitter)
    }

    fn look_at_the_clock(&mut self) {
        if self.ended {
            return;
        }
        match self.link {
            Link::Down { attempt, retry_at } if retry_at <= self.now => {
                self.link = Link::Connecting { attempt };
                self.act(Act::Connect);
            }
            Link::Up { since, .. } if self.is_idle() && self.now.since(since) >= SESSION_AGE_MAX => {
                self.link = Link::Leaving;
                self.act(Act::Disconnect);
            }
            _ => {}
        }
        self.beat();
    }

    fn beat(&mut self) {
        let up = matches!(self.link, Link::Up { .. });
        let Some(task) = self.open_task().filter(|_| up) else {
            self.beat_at = None;
            return;
        };
        let at = *self.beat_at.get_or_insert(self.now.after(BEAT_EVERY));
        if at <= self.now {
            self.act(Act::Beat { task });
            self.beat_at = Some(self.now.after(BEAT_EVERY));
        }
    }

    /// The task that the coordinator waits for.
    fn open_task(&self) -> Option<TaskId> {
        let answered = matches!(self.link, Link::Up { answered: true, .. });
        let kept = self.durable.kept.as_ref().filter(|_| !answered).map(|kept| kept.task);
        self.work.as_ref().map(|work| work.task).or(kept)
    }

    fn is_idle(&self) -> bool {
        self.open_task().is_none()
    }

    fn next_time(&self) -> Option<Time> {
        if self.ended {
            return None;
        }
        let link = match self.link {
            Link::Down { retry_at, .. } => Some(retry_at),
            Link::Up { since, .. } if self.is_idle() => Some(since.after(SESSION_AGE_MAX)),
            _ => None,
        };
        [link, self.beat_at].into_iter().flatten().min()
    }

    // --- joining ---

    fn said(&mut self, message: ToWorker) {
        match message {
            ToWorker::Welcome(welcome) => self.welcomed(welcome),
            ToWorker::Assigned(assigned) => self.assigned(assigned),
            ToWorker::Go { task, hash, from } => self.go(task, hash, from),
            ToWorker::Held { task, hash } => self.held(task, hash),
            ToWorker::AlreadyHeld { task, .. } => self.unwanted(task),
            ToWorker::Late { task } => self.late(task),
            ToWorker::Refused { task, refusal } => {
                self.notice(Notice::Refused { task, refusal });
                self.unwanted(task);
            }
            ToWorker::Displaced => self.end(Ending::Displaced),
            ToWorker::Rejected { sentence } => self.end(Ending::Rejected(sentence)),
            ToWorker::GoingAway => self.notice(Notice::GoingAway),
            ToWorker::Finished { model_hash } => {
                self.drop_kept();
                self.end(Ending::Finished { model_hash });
            }
            ToWorker::Aborted => {
                self.drop_kept();
                self.end(Ending::Aborted);
            }
            // The shell checks its signature first, and says so with `Receipted`.
            ToWorker::Receipt(_) => {}
        }
    }

    fn welcomed(&mut self, welcome: Box<Welcome>) {
        if self.run != Some(welcome.run) {
            self.run = Some(welcome.run);
            self.stop_work();
            if self.durable.kept.as_ref().is_some_and(|kept| kept.key.run != welcome.run) {
                self.drop_kept();
            }
        }
        self.notice(Notice::Joined { name: welcome.name.clone(), run: welcome.run });
        if self.allowed.as_ref() == Some(&welcome.learning) {
            self.enter();
        } else {
            self.welcome = Some(welcome.clone());
            self.considering = self.considering.saturating_add(1);
            self.act(Act::Consider(welcome));
        }
    }

    fn considered(&mut self, verdict: Result<(), Leave>) {
        self.considering = self.considering.saturating_sub(1);
        if self.considering > 0 {
            return;
        }
        match verdict {
            Ok(()) => {
                self.allowed = self.welcome.take().map(|welcome| welcome.learning);
                if matches!(self.link, Link::Joining { .. }) {
                    self.enter();
                }
            }
            Err(leave) => {
                let sentence = match &leave {
                    Leave::NotAllowed(sentence) | Leave::DataUnfit(sentence) => sentence.clone(),
                    Leave::Stopping => String::new(),
                };
                self.leave(leave, Ending::Declined(sentence));
            }
        }
    }

    /// In: says so, and offers again what still waits for its receipt.
    fn enter(&mut self) {
        self.link = Link::Up { since: self.now, answered: false, attempt: self.attempt() };
        self.act(Act::Send(FromWorker::Ready));
        self.offer();
    }

    fn leave(&mut self, leave: Leave, ending: Ending) {
        if matches!(self.link, Link::Up { .. } | Link::Joining { .. }) {
            self.act(Act::Send(FromWorker::Leaving(leave)));
        }
        self.end(ending);
    }

    // --- a task ---

    fn assigned(&mut self, assigned: Box<Assigned>) {
        let Some(run) = self.run else { return };
        let schema = assigned.schema.as_ref().map_or(Hash([0; 32]), |schema| schema.hash);
        let key = WorkKey { run, round: assigned.round, base: assigned.base(), kind: assigned.kind, schema };
        if self.durable.kept.as_ref().is_some_and(|kept| kept.key == key) {
            self.stop_work();
            self.emit(Event::Renamed { task: assigned.task });
            self.set_answered(false);
            self.offer();
        } else if let Some(work) = self.work.as_mut().filter(|work| work.key == key) {
            work.task = assigned.task;
        } else {
            self.stop_work();
            self.notice(Notice::Working { round: assigned.round, kind: assigned.kind });
            self.work = Some(Work { begun: assigned.task, task: assigned.task, key });
            self.act(Act::Work(assigned));
        }
    }

    fn stop_work(&mut self) {
        if self.work.take().is_some() {
            self.act(Act::Cancel);
        }
    }

    fn made(&mut self, task: TaskId, made: Box<Made>) {
        let hash = made.hash;
        let Some(work) = self.work.take_if(|work| work.begun == task) else {
            // What was made for nobody may be what is kept: the bytes of the same work are the same.
            if self.durable.kept.as_ref().is_none_or(|kept| kept.made.hash != hash) {
                self.act(Act::Drop { hash });
            }
            return;
        };
        if self.durable.kept.as_ref().is_some_and(|kept| kept.made.hash != hash) {
            self.drop_kept();
        }
        self.notice(Notice::Made { round: work.key.round, metrics: Box::new(made.metrics.clone()) });
        self.emit(Event::Made { key: work.key, task: work.task, made });
        self.set_answered(false);
        self.offer();
    }

    fn failed(&mut self, task: TaskId, failure: Failure) {
        let Some(work) = self.work.take_if(|work| work.begun == task) else { return };
        self.notice(Notice::Failed { failure });
        if matches!(self.link, Link::Up { .. }) {
            self.act(Act::Send(FromWorker::Failed { task: work.task, failure }));
        }
    }

    fn offer(&mut self) {
        let Some(kept) = &self.durable.kept else { return };
        if matches!(self.link, Link::Up { .. }) {
            let act = Act::Offer { task: kept.task, key: kept.key, made: kept.made.clone() };
            self.act(act);
        }
    }

    fn go(&mut self, task: TaskId, hash: Hash, from: u64) {
        let wanted = self
            .durable
            .kept
            .as_ref()
            .is_some_and(|kept| (kept.task, kept.made.hash) == (task, hash) && from <= kept.made.bytes);
        if wanted {
            self.act(Act::Upload { task, hash, from });
        }
    }

    fn set_answered(&mut self, to: bool) {
        if let Link::Up { answered, .. } = &mut self.link {
            *answered = to;
        }
    }

    /// Surveys, rows and evaluations end here; an update is kept until its receipt.
    fn held(&mut self, task: TaskId, hash: Hash) {
        let Some(kept) = self.kept_for(task).filter(|kept| kept.made.hash == hash) else { return };
        let done = !kept.key.earns_a_receipt();
        self.notice(Notice::Held { task });
        self.set_answered(true);
        if done {
            self.drop_kept();
        }
    }

    fn receipted(&mut self, receipt: &Receipt) {
        let ours = |kept: &&Kept| kept.made.hash == receipt.hash && Some(receipt.run) == self.run;
        if self.kept_for(receipt.task).filter(ours).is_some() {
            self.notice(Notice::Receipted { round: receipt.round });
            self.drop_kept();
        }
    }

    /// Not wanted for this task. The payload stays until the next task, which may be this one's successor.
    fn late(&mut self, task: TaskId) {
        let working = self.work.as_ref().is_some_and(|work| work.task == task);
        let kept = self.kept_for(task).is_some();
        if working {
            self.stop_work();
        }
        if kept {
            self.set_answered(true);
        }
        if working || kept {
            self.notice(Notice::Late { task });
        }
    }

    fn unwanted(&mut self, task: TaskId) {
        if self.kept_for(task).is_some() {
            self.drop_kept();
        }
    }

    fn kept_for(&self, task: TaskId) -> Option<&Kept> {
        self.durable.kept.as_ref().filter(|kept| kept.task == task)
    }

    fn drop_kept(&mut self) {
        if let Some(hash) = self.durable.kept.as_ref().map(|kept| kept.made.hash) {
            self.emit(Event::Dropped { hash });
            self.act(Act::Drop { hash });
        }
    }
}

impl Durable {
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Made { key, task, made } => {
                self.kept = Some(Kept { key: *key, task: *task, made: made.clone() });
            }
            Event::Renamed { task } => {
                if let Some(kept) = &mut self.kept {
                    kept.task = *task;
                }
            }
            Event::Dropped { .. } => self.kept = None,
            Event::Notice(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ids::{ContentId, WorkerId};
    use crate::messages::{ContentKey, ContentRef};

    use super::*;

    const UPDATE: TaskId = TaskId(1 << 32 | 7);

    fn kept() -> Kept {
        let hash = Hash([3; 32]);
        let key = WorkKey {
            run: RunId([1; 16]),
            round: 4,
            base: Hash([2; 32]),
            kind: TaskKind::Update,
            schema: Hash([0; 32]),
        };
        let made =
            Made { hash, bytes: 400, layout: hash, examples: 32, steps: 8, weight: 32, metrics: Metrics::default() };
        Kept { key, task: UPDATE, made: Box::new(made) }
    }

    fn offer(task: TaskId) -> Act {
        Act::Offer { task, key: kept().key, made: kept().made }
    }

    /// In, with what it still had to say about `acts`.
    fn join(member: &mut Member, now: Time) -> Vec<Act> {
        member.handle(now, Input::Tick);
        connect(member, now, 1);
        member.handle(now, Input::Considered(Ok(())));
        acts(member)
    }

    fn said(member: &mut Member, message: ToWorker) -> Vec<Act> {
        member.handle(Time(2), Input::Said(message));
        acts(member)
    }

    fn assignment(task: TaskId) -> ToWorker {
        let content = |hash| ContentRef { id: ContentId([0; 16]), key: ContentKey([0; 32]), hash, bytes: 400 };
        ToWorker::Assigned(Box::new(Assigned {
            task,
            round: 4,
            kind: TaskKind::Update,
            schema: None,
            model: Some(content(Hash([2; 32]))),
            layout: Hash([3; 32]),
            weight_shift: 0,
        }))
    }

    #[test]
    fn what_an_earlier_process_made_is_offered_as_soon_as_this_one_is_in() {
        let mut member = Member::restored(Instance(1), kept());
        assert!(join(&mut member, Time(1)).ends_with(&[Act::Send(FromWorker::Ready), offer(UPDATE)]));
        let Output::Wait(Some(beat)) = member.poll() else { unreachable!("it beats") };
        member.handle(beat, Input::Tick);
        assert_eq!(acts(&mut member), [Act::Beat { task: UPDATE }]);
        let receipt = Receipt {
            run: RunId([1; 16]),
            worker: WorkerId([0; 16]),
            task: UPDATE,
            hash: Hash([3; 32]),
            round: 4,
            model_hash: Hash([9; 32]),
        };
        member.handle(beat, Input::Receipted(receipt));
        assert_eq!(acts(&mut member), [Act::Drop { hash: Hash([3; 32]) }]);
    }

    #[test]
    fn what_an_earlier_process_made_is_offered_for_the_successor_of_a_task_that_is_late() {
        let mut member = Member::restored(Instance(1), kept());
        join(&mut member, Time(1));
        assert_eq!(said(&mut member, ToWorker::Late { task: UPDATE }), []);
        let successor = TaskId(2 << 32 | 1);
        assert_eq!(said(&mut member, assignment(successor)), [offer(successor)]);
        assert_eq!(said(&mut member, ToWorker::Late { task: successor }), []);
        member.handle(Time(3), Input::Lost);
        assert!(join(&mut member, Time(u64::MAX / 2)).ends_with(&[offer(successor)]), "it is offered until a receipt");
    }

    #[test]
    fn what_was_made_in_another_run_is_dropped_and_not_offered() {
        let mut old = kept();
        old.key.run = RunId([2; 16]);
        let mut member = Member::restored(Instance(1), old);
        let acts = join(&mut member, Time(1));
        assert!(acts.contains(&Act::Drop { hash: Hash([3; 32]) }), "{acts:?}");
        assert!(!acts.iter().any(|act| matches!(act, Act::Offer { .. })), "{acts:?}");
    }

    #[test]
    fn a_worker_that_slept_for_an_hour_tries_again_at_once() {
        let mut member = Member::restored(Instance(1), kept());
        join(&mut member, Time(1));
        let woken = Time(1).after(Duration::from_secs(3600));
        member.handle(woken, Input::Tick);
        assert_eq!(acts(&mut member), [Act::Beat { task: UPDATE }], "one beat, not an hour of them");
        member.handle(woken, Input::Lost);
        assert_eq!(acts(&mut member), []);
        let Output::Wait(Some(at)) = member.poll() else { unreachable!("it waits for its next attempt") };
        assert!(at.since(woken) <= Duration::from_millis(100), "{:?}", at.since(woken));
        let rejoined = join(&mut member, at);
        assert!(rejoined.starts_with(&[Act::Connect]) && rejoined.ends_with(&[offer(UPDATE)]), "{rejoined:?}");
    }

    fn acts(member: &mut Member) -> Vec<Act> {
        let outputs = core::iter::from_fn(|| match member.poll() {
            Output::Wait(_) => None,
            output => Some(output),
        });
        let acts = outputs.filter_map(|output| if let Output::Act { act, .. } = output { Some(act) } else { None });
        acts.collect()
    }

    fn connect(member: &mut Member, now: Time, rounds: u32) {
        let mut learning = LearningPlan::default();
        learning.train.rounds = rounds;
        let name = WorkerName::nearest("a");
        let welcome =
            Welcome { version: 1, run: RunId([1; 16]), ed25519: [0; 32], name, weight_max: 1, norm_max: 1.0, learning };
        member.handle(now, Input::Connected);
        member.handle(now, Input::Said(ToWorker::Welcome(Box::new(welcome))));
    }

    #[test]
    fn a_verdict_about_an_earlier_plan_does_not_let_a_later_one_in() {
        let mut member = Member::new(Instance(1));
        connect(&mut member, Time(1), 1);
        member.handle(Time(2), Input::Lost);
        connect(&mut member, Time(3), 2);
        let _ = acts(&mut member);
        member.handle(Time(4), Input::Considered(Ok(())));
        assert_eq!(acts(&mut member), []);
        member.handle(Time(5), Input::Considered(Ok(())));
        assert_eq!(acts(&mut member), [Act::Send(FromWorker::Ready)]);
    }

    #[test]
    fn a_coordinator_that_is_killed_again_and_again_while_it_makes_progress_is_asked_again_at_once() {
        let mut member = Member::new(Instance(1));
        let mut now = Time(0);
        for round in 1..=12 {
            member.handle(now, Input::Tick);
            connect(&mut member, now, 1);
            member.handle(now, Input::Considered(Ok(())));
            let task = TaskId::new(round, 0);
            let assigned = Assigned {
                task,
                round,
                kind: TaskKind::Update,
                schema: None,
                model: None,
                layout: Hash([0; 32]),
                weight_shift: 0,
            };
            member.handle(now, Input::Said(ToWorker::Assigned(Box::new(assigned))));
            let hash = Hash::of(&round.to_le_bytes());
            let metrics = Metrics::default();
            let made = Made { hash, bytes: 4, layout: Hash([0; 32]), examples: 1, steps: 1, weight: 1, metrics };
            member.handle(now, Input::Made { task, made: Box::new(made) });
            member.handle(now, Input::Said(ToWorker::Held { task, hash }));
            member.handle(now, Input::Lost);
            let _ = acts(&mut member);
            let Output::Wait(Some(at)) = member.poll() else { unreachable!("it waits for its next attempt") };
            assert!(at.since(now) <= RECONNECT_AFTER_MIN);
            now = at;
        }
    }

    #[test]
    fn a_coordinator_that_ends_every_session_at_once_is_asked_more_and_more_rarely() {
        let mut member = Member::new(Instance(1));
        let mut now = Time(0);
        for _ in 0..12 {
            member.handle(now, Input::Tick);
            connect(&mut member, now, 1);
            member.handle(now, Input::Considered(Ok(())));
            member.handle(now, Input::Lost);
            let _ = acts(&mut member);
            let Output::Wait(Some(at)) = member.poll() else { unreachable!("it waits for its next attempt") };
            now = at;
        }
        assert!(now.since(Time(0)) > RECONNECT_AFTER_MAX);
    }
}
