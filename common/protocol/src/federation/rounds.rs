//! How a run moves on: gathering, the survey, rounds and their ends, the last evaluation.
//!
//! [`Federation::advance`] looks at the state after each input and does the next thing that has become possible.
//! It never sleeps and never polls: work begins the moment enough workers are in, and ends the moment its last
//! answer is, or at its deadline.

use core::time::Duration;
use std::collections::BTreeSet;

use crate::draw::Draw;
use crate::evaluation::{EvaluationSummary, summarise};
use crate::ids::{ConnId, Hash, TaskId, WorkerId, WorkerName};
use crate::limits::{DEADLINE_MIN, EXTENSIONS_MAX, GATHERING_COUNTDOWN, UPDATES_MAX};
use crate::messages::{Receipt, Refusal, TaskKind, ToWorker};
use crate::plan::Mode;

use super::offers::folds;
use super::state::{Phase, TaskState, Work};
use super::{
    Act, Assignment, Deadline, Entry, Event, Federation, Gone, Notice, Pause, RoundFigures, SWEEP_EVERY, SurveyOutcome,
    Timers, Withdrawal,
};

/// How often a task is told to its worker, each time on another connection, before its coming back counts for nothing.
const ANNOUNCED_MAX: u32 = 8;

/// The base of work that starts from no model.
const NO_BASE: Hash = Hash([0; 32]);

impl Federation {
    /// Does what has become possible, until nothing more is.
    pub(super) fn advance(&mut self) {
        if self.volatile.stopping {
            return;
        }
        while self.step() {}
        self.arm_timers();
    }

    /// Whether something was done.
    fn step(&mut self) -> bool {
        match &self.durable.phase {
            Phase::Gathering => self.gather(),
            Phase::Surveying(_) | Phase::Sharing(_) | Phase::Training(_) | Phase::Evaluating(_) => self.settle(),
            Phase::Committing(_) => self.make_model(),
            Phase::Finished(_) | Phase::Aborted => false,
        }
    }

    // --- gathering ---

    fn gather(&mut self) -> bool {
        if self.volatile.blocked || !self.enough_workers() {
            self.tell_of_lack();
            return false;
        }
        self.volatile.lacking = None;
        self.volatile.timers.countdown = None;
        self.volatile.begun = true;
        let central = self.plan.learning.train.mode == Mode::Central;
        let round = self.durable.round();
        match self.durable.model {
            None => self.begin(0, TaskKind::Survey, NO_BASE, 1.0),
            Some(base) if round >= self.plan.learning.train.rounds => {
                self.begin(round, TaskKind::Evaluation, base, 1.0)
            }
            Some(_) if central && self.durable.rows.is_none() => self.begin(0, TaskKind::Rows, NO_BASE, 1.0),
            Some(base) => {
                let fraction = if central { 1.0 } else { self.plan.rounds.fraction };
                self.begin(round + 1, self.work_kind(), base, fraction);
                self.train_centrally(round + 1);
            }
        }
        true
    }

    /// With `min_workers`, so many; without, two, and at the first start no third for a while. The last evaluation of
    /// a run that this process has led takes whoever is there.
    fn enough_workers(&mut self) -> bool {
        let (ready, needed) = (self.volatile.ready, self.workers_needed());
        if ready < needed {
            self.volatile.timers.countdown = None;
            return false;
        }
        if self.plan.rounds.min_workers.is_some() || needed < 2 {
            return true;
        }
        if self.volatile.begun || ready > 2 {
            return true;
        }
        let now = self.volatile.now;
        match self.volatile.timers.countdown {
            Some(at) => at <= now,
            None => {
                self.volatile.timers.countdown = Some(now.after(GATHERING_COUNTDOWN));
                let seconds = u32::try_from(GATHERING_COUNTDOWN.as_secs()).unwrap_or(u32::MAX);
                self.notice(Notice::Countdown { seconds, workers: 2 });
                false
            }
        }
    }

    /// How many must be in for the next work to begin.
    fn workers_needed(&self) -> usize {
        let last = self.durable.round() >= self.plan.learning.train.rounds;
        match self.plan.rounds.min_workers {
            _ if self.volatile.begun && last => 1,
            Some(min) => usize::try_from(min).unwrap_or(usize::MAX),
            None => 2,
        }
    }

    /// How many more workers it takes while the run gathers.
    pub(super) fn workers_lacking(&self) -> u32 {
        if !matches!(self.durable.phase, Phase::Gathering) {
            return 0;
        }
        u32::try_from(self.workers_needed().saturating_sub(self.volatile.ready)).unwrap_or(u32::MAX)
    }

    /// Says that too few are in: once, and again when there are fewer. Those who come are told of in any case.
    fn tell_of_lack(&mut self) {
        let lacking = self.workers_lacking();
        if self.volatile.blocked || lacking == 0 {
            return;
        }
        let have = u32::try_from(self.volatile.ready).unwrap_or(u32::MAX);
        if self.volatile.lacking.replace(have).is_none_or(|before| have < before) {
            self.notice(Notice::Waiting { have, need: have.saturating_add(lacking) });
        }
    }

    /// Gives work of one kind to a share of the fleet.
    fn begin(&mut self, round: u32, kind: TaskKind, base: Hash, fraction: f64) {
        self.volatile.folded.clear();
        self.volatile.announced.clear();
        self.volatile.work_began = self.volatile.now;
        self.volatile.timers.deadline = None;
        self.volatile.overdue = false;
        self.volatile.fleet_changed = true;
        self.volatile.trained = None;
        self.resume();
        self.volatile.paused_for = Duration::ZERO;
        let wanted = share(self.volatile.ready, fraction).min(usize::try_from(UPDATES_MAX).unwrap_or(usize::MAX));
        let selected = self.select(round, if folds(kind) { self.over_selected(wanted) } else { wanted });
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        self.emit(Event::Opened { round, kind, base, wanted });
        for (conn, worker, name) in selected {
            let task = self.assign(round, kind, base, worker, name);
            self.announce(conn, task);
        }
    }

    /// How many are selected so that `wanted` of them are in time.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most 2,048
    fn over_selected(&self, wanted: usize) -> usize {
        let more = (wanted as f64 * self.plan.rounds.over_select - 1e-9).ceil().max(0.0) as usize;
        (wanted + more).min(usize::try_from(UPDATES_MAX).unwrap_or(usize::MAX))
    }

    /// The `count` workers that draw lowest, by name. Who was late before draws like everybody else.
    fn select(&self, round: u32, count: usize) -> Vec<(ConnId, WorkerId, WorkerName)> {
        let seed = self.plan.learning.train.seed;
        let fleet = self.ready_workers().map(|(conn, s)| (conn, s.worker, s.name.clone()));
        let mut drawn: Vec<_> = fleet
            .map(|member| (Draw::new(seed, "select", u64::from(round), member.2.as_str()).next_u64(), member))
            .collect();
        drawn.sort_by(|a, b| (a.0, &a.1.2).cmp(&(b.0, &b.1.2)));
        drawn.truncate(count);
        let mut selected: Vec<_> = drawn.into_iter().map(|(_, member)| member).collect();
        selected.sort_by(|a, b| a.2.cmp(&b.2));
        selected
    }

    pub(super) fn assign(
        &mut self,
        round: u32,
        kind: TaskKind,
        base: Hash,
        worker: WorkerId,
        name: WorkerName,
    ) -> TaskId {
        let task = TaskId::new(self.durable.start, self.durable.tasks);
        self.emit(Event::Assigned { task, round, kind, worker, name, base });
        task
    }

    /// Tells a worker of its task.
    pub(super) fn announce(&mut self, conn: ConnId, task: TaskId) {
        let now = self.volatile.now;
        let Some(work) = self.durable.phase.work() else { return };
        let with_model = !matches!(work.kind, TaskKind::Survey | TaskKind::Rows);
        let frozen = self.durable.frozen;
        let assignment = Assignment {
            task,
            round: work.round,
            kind: work.kind,
            schema: frozen.map(|frozen| frozen.schema).filter(|_| work.kind != TaskKind::Survey),
            model: with_model.then_some(work.base),
            layout: frozen.filter(|_| with_model).map_or(NO_BASE, |frozen| frozen.layout),
            weight_shift: frozen.map_or(0, |frozen| frozen.weight_shift),
        };
        if let Some(session) = self.volatile.sessions.get_mut(&conn) {
            (session.heard, session.steps, session.stepped) = (now, 0, now);
        }
        let times = self.volatile.announced.entry(task).or_default();
        *times = times.saturating_add(1);
        self.act_on_commit(Act::Assign { conn, assignment });
    }

    fn train_centrally(&mut self, round: u32) {
        let central = self.plan.learning.train.mode == Mode::Central;
        if let Some(rows) = self.durable.rows.as_ref().filter(|_| central).map(|rows| rows.tasks.clone()) {
            self.act_on_commit(Act::Train { round, rows });
        }
    }

    // --- the end of a work ---

    /// Ends the open work if it is complete, or if its time is over and there is quorum.
    fn settle(&mut self) -> bool {
        let Some(work) = self.durable.phase.work() else { return false };
        if self.volatile.merging || self.awaits_own_training() {
            return false;
        }
        let (open, held, quorum, wanted) = (work.open_count(), work.held_count(), self.quorum(work), work.wanted);
        if held < quorum {
            if open == 0 {
                self.pause();
            }
            return false;
        }
        if open > 0 && held < wanted && !self.volatile.overdue {
            return false;
        }
        if open > 0 {
            self.withdraw_late();
        }
        if !self.all_folded() {
            return false;
        }
        self.close()
    }

    /// A round of `central` mode is not over before the coordinator's own training is.
    fn awaits_own_training(&self) -> bool {
        let central = self.plan.learning.train.mode == Mode::Central;
        central && matches!(self.durable.phase, Phase::Training(_)) && self.volatile.trained.is_none()
    }

    /// How many payloads make this work whole. Evaluations do not hold a run up.
    fn quorum(&self, work: &Work) -> usize {
        if work.kind == TaskKind::Evaluation { 0 } else { share(work.wanted, self.plan.rounds.quorum) }
    }

    fn all_folded(&self) -> bool {
        let work = self.durable.phase.work();
        work.is_some_and(|work| !folds(work.kind) || work.held_count() == self.volatile.folded.len())
    }

    pub(super) fn fold_done(&mut self, task: TaskId) {
        let held = self.durable.phase.work().and_then(|work| work.tasks.get(&task));
        if held.is_some_and(|task| matches!(task.state, TaskState::Held(_))) && self.volatile.folded.insert(task) {
            self.notice(Notice::Folded { task });
        }
    }

    fn withdraw_late(&mut self) {
        let open: Vec<(TaskId, WorkerId)> = self.open_tasks().map(|(id, task)| (id, task.worker)).collect();
        for (task, worker) in open {
            self.withdraw(task, Withdrawal::Late);
            if let Some(&conn) = self.volatile.by_worker.get(&worker) {
                self.send(conn, ToWorker::Late { task });
            }
        }
    }

    fn close(&mut self) -> bool {
        self.volatile.timers.deadline = None;
        self.resume();
        match &self.durable.phase {
            Phase::Surveying(work) => {
                let held = work.held_by_name().into_iter();
                let surveys =
                    held.map(|(id, task, update)| (id, update.hash, task.worker, task.name.clone())).collect();
                self.volatile.merging = true;
                self.act(Act::Merge { surveys });
                false
            }
            Phase::Sharing(work) => {
                let round = work.round;
                self.emit(Event::Closed { round });
                true
            }
            Phase::Training(_) => self.close_round(),
            Phase::Evaluating(work) => {
                let evaluation = evaluation_of(work);
                self.finish(evaluation);
                true
            }
            Phase::Gathering | Phase::Committing(_) | Phase::Finished(_) | Phase::Aborted => false,
        }
    }

    fn close_round(&mut self) -> bool {
        let Some(round) = self.durable.phase.work().map(|work| work.round) else { return false };
        self.emit(Event::Closed { round });
        self.volatile.stepping = false;
        if let Some((model, loss)) = self.volatile.trained.take() {
            self.commit(model, loss);
        }
        true
    }

    /// Makes the model of a closed round once all of its updates are in the sum: at once, but after a restart.
    fn make_model(&mut self) -> bool {
        let Some(work) = self.durable.phase.work() else { return false };
        if self.volatile.stepping || work.open_count() > 0 || !self.all_folded() {
            return false;
        }
        let (round, tasks) = (work.round, work.held().map(|(task, ..)| task).collect());
        self.volatile.stepping = true;
        self.volatile.timers.deadline = None;
        self.resume();
        self.act(Act::Step { round, tasks });
        true
    }

    // --- the survey ---

    pub(super) fn surveyed(&mut self, outcome: SurveyOutcome) {
        if !core::mem::replace(&mut self.volatile.merging, false) {
            return;
        }
        match outcome {
            SurveyOutcome::Frozen { frozen, model } => {
                self.emit(Event::Surveyed { frozen, model });
            }
            SurveyOutcome::Unfit(workers) => {
                self.emit(Event::Voided);
                for (worker, sentence) in workers {
                    self.reject(worker, sentence);
                }
            }
            SurveyOutcome::Disagreed(sentence) => {
                self.emit(Event::Voided);
                self.volatile.blocked = true;
                self.set_paused(Pause::Disagreed(sentence));
            }
            SurveyOutcome::Impossible(sentence) => self.fail(sentence),
        }
    }

    fn reject(&mut self, worker: WorkerId, sentence: String) {
        if let Some(&conn) = self.volatile.by_worker.get(&worker) {
            self.send(conn, ToWorker::Rejected { sentence: sentence.clone() });
            self.eject(conn, Gone::Declined(sentence));
        }
    }

    // --- the commit ---

    pub(super) fn stepped(&mut self, round: u32, model: Hash, train_loss: Option<f64>) {
        match &self.durable.phase {
            Phase::Committing(work) if work.round == round && self.durable.is_redoing() => self.redone(round, model),
            Phase::Committing(work) if work.round == round => self.commit(model, train_loss),
            Phase::Training(work) if work.round == round && self.awaits_own_training() => {
                self.volatile.trained = Some((model, train_loss));
            }
            _ => {}
        }
    }

    pub(super) fn step_failed(&mut self, round: u32, sentence: String) {
        if self.durable.phase.work().is_some_and(|work| work.round == round) {
            self.fail(sentence);
        }
    }

    /// The same updates must have given the same model.
    fn redone(&mut self, round: u32, redone: Hash) {
        match self.durable.model_of(round) {
            Some(recorded) if recorded != redone => {
                self.volatile.stopping = true;
                self.act(Act::Conflict { round, recorded, redone });
            }
            _ => {
                self.emit(Event::Redone { round });
                self.volatile.stepping = false;
                self.volatile.folded.clear();
                self.receipt_again(round);
                for worker in core::mem::take(&mut self.volatile.parted) {
                    self.withdraw_of(worker);
                }
                if let Phase::Finished(evaluation) = self.durable.phase {
                    self.tell_of_the_end(evaluation);
                }
                self.fold_all();
                self.give_all_again();
            }
        }
    }

    /// Who was asked again for what it has a receipt for waits for a receipt again.
    fn receipt_again(&mut self, round: u32) {
        let Some(model_hash) = self.durable.model_of(round) else { return };
        let asked = core::mem::take(&mut self.volatile.announced);
        let entries: Vec<Entry> =
            asked.keys().filter_map(|task| self.durable.committed.get(task)).map(|(_, e)| *e).collect();
        for Entry { task, worker, hash } in entries {
            let Some(&conn) = self.volatile.by_worker.get(&worker) else { continue };
            let receipt = Receipt { run: self.durable.run, worker, task, hash, round, model_hash };
            self.act_on_commit(Act::Receipt { conn, receipt });
        }
    }

    fn commit(&mut self, model: Hash, train_loss: Option<f64>) {
        let Phase::Committing(work) = &self.durable.phase else { return };
        let round = work.round;
        let figures = self.figures(work, model, train_loss);
        let held = work.held().filter(|_| folds(work.kind));
        let entries: Vec<Entry> =
            held.map(|(task, t, update)| Entry { task, worker: t.worker, hash: update.hash }).collect();
        self.emit(Event::Committed { entries: entries.clone(), figures: Box::new(figures) });
        self.volatile.parted.clear();
        for entry in entries {
            let Some(&conn) = self.volatile.by_worker.get(&entry.worker) else { continue };
            let Entry { task, worker, hash } = entry;
            let receipt = Receipt { run: self.durable.run, worker, task, hash, round, model_hash: model };
            self.act_on_commit(Act::Receipt { conn, receipt });
        }
    }

    #[allow(clippy::cast_precision_loss)] // counts of rows stay far below 2^53
    fn figures(&self, work: &Work, model: Hash, train_loss: Option<f64>) -> RoundFigures {
        let held = work.held_by_name();
        let examples = match &self.durable.rows {
            Some(shared) => shared.examples,
            None => held.iter().fold(0u64, |sum, (_, _, update)| sum.saturating_add(update.examples)),
        };
        let losses = held.iter().filter_map(|(_, _, u)| Some((u.metrics.train_loss?, u.examples as f64)));
        let (sum, weight) = losses.fold((0.0, 0.0), |(sum, all), (loss, n)| (sum + loss * n, all + n));
        RoundFigures {
            round: work.round,
            workers: u32::try_from(held.len()).unwrap_or(u32::MAX),
            examples,
            train_loss: train_loss.or_else(|| Some(sum / weight)).filter(|loss| loss.is_finite()),
            evaluation: evaluation_of(work),
            seconds: self
                .volatile
                .now
                .since(self.volatile.work_began)
                .saturating_sub(self.volatile.paused_for)
                .as_secs_f64(),
            model,
        }
    }

    fn finish(&mut self, evaluation: EvaluationSummary) {
        self.emit(Event::Finished { evaluation });
        self.tell_of_the_end(evaluation);
    }

    fn tell_of_the_end(&mut self, evaluation: EvaluationSummary) {
        self.act_on_commit(Act::Finish { evaluation });
        let conns: Vec<ConnId> = self.ready_workers().map(|(conn, _)| conn).collect();
        for conn in conns {
            self.let_go(conn);
        }
    }

    /// Tells a worker that the run is over.
    pub(super) fn let_go(&mut self, conn: ConnId) {
        if let Some(model_hash) = self.durable.model {
            self.act_on_commit(Act::Send { conn, message: ToWorker::Finished { model_hash } });
        }
    }

    /// Gives the run up because it cannot go on; every worker is told why.
    fn fail(&mut self, sentence: String) {
        let word = ToWorker::Rejected { sentence: sentence.clone() };
        self.abort(sentence, &word);
    }

    /// Gives the run up, with `word` to every worker.
    pub(super) fn abort(&mut self, sentence: String, word: &ToWorker) {
        if matches!(self.durable.phase, Phase::Finished(_) | Phase::Aborted) {
            return;
        }
        self.stop_receiving_all();
        (self.volatile.merging, self.volatile.stepping) = (false, false);
        self.volatile.timers = Timers::default();
        self.emit(Event::Aborted { sentence: sentence.clone() });
        let conns: Vec<ConnId> = self.volatile.sessions.keys().copied().collect();
        for conn in conns {
            self.send(conn, word.clone());
        }
        self.act_on_commit(Act::Fail { sentence });
    }

    // --- deadlines and pauses ---

    /// The configured deadline; else three times the 95th percentile of what rounds took; else none.
    fn deadline_length(&self) -> Option<Duration> {
        if let Some(length) = self.plan.rounds.deadline {
            return Some(length);
        }
        let mut seconds = self.durable.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        let p95 = seconds.get((seconds.len() * 95).div_ceil(100).saturating_sub(1))?;
        Some(DEADLINE_MIN.max(Duration::try_from_secs_f64(3.0 * p95).unwrap_or(DEADLINE_MIN)))
    }

    pub(super) fn deadline_passed(&mut self, deadline: Deadline) {
        let Some(work) = self.durable.phase.work() else { return };
        let (round, extensions) = (work.round, work.extensions);
        if matches!(self.durable.phase, Phase::Committing(_)) {
            // The set of updates is final: nobody in it can be late.
            self.pause();
        } else if work.held_count() >= self.quorum(work) {
            self.volatile.overdue = true;
        } else if extensions < EXTENSIONS_MAX {
            self.emit(Event::Extended { round, extension: extensions + 1 });
            let at = self.volatile.now.after(deadline.length);
            self.volatile.timers.deadline = Some(Deadline { at, ..deadline });
        } else {
            self.volatile.overdue = true;
            self.pause();
        }
    }

    /// Says why the open work does not go on.
    fn pause(&mut self) {
        let Some(work) = self.durable.phase.work() else { return };
        let by_state = |wanted: fn(&TaskState) -> bool| {
            let tasks = work.tasks.values().filter(|task| wanted(&task.state));
            tasks.map(|task| task.name.clone()).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        };
        let diverged = by_state(|state| matches!(state, TaskState::Withdrawn(Withdrawal::Failed(_))));
        let waiting = by_state(|state| state.is_open() || matches!(state, TaskState::Withdrawn(Withdrawal::Left)));
        let refused: Vec<(WorkerName, Refusal)> = work
            .tasks
            .values()
            .filter_map(|task| match task.state {
                TaskState::Withdrawn(Withdrawal::Refused(refusal)) => Some((task.name.clone(), refusal)),
                _ => None,
            })
            .collect();
        let pause = match (diverged.is_empty(), refused.is_empty()) {
            (false, _) => Pause::Diverged(diverged),
            (true, false) => Pause::Refused(refused),
            (true, true) => Pause::Waiting(waiting),
        };
        self.set_paused(pause);
    }

    fn set_paused(&mut self, pause: Pause) {
        if self.volatile.paused.as_ref() != Some(&pause) {
            self.volatile.paused = Some(pause.clone());
            self.volatile.paused_at.get_or_insert(self.volatile.now);
            self.notice(Notice::Paused(pause));
        }
    }

    pub(super) fn resume(&mut self) {
        if self.volatile.paused.take().is_some() && !self.volatile.disk_full {
            self.go_on();
        }
    }

    /// Hours of a pause are not counted among those that a round takes.
    fn go_on(&mut self) {
        if let Some(since) = self.volatile.paused_at.take() {
            self.volatile.paused_for += self.volatile.now.since(since);
        }
        self.notice(Notice::Resumed);
    }

    /// Why the run is paused, as people are told.
    pub(super) fn pause_told(&self) -> Option<&Pause> {
        if self.volatile.disk_full { Some(&Pause::DiskFull) } else { self.volatile.paused.as_ref() }
    }

    pub(super) fn disk_full(&mut self) {
        if !core::mem::replace(&mut self.volatile.disk_full, true) {
            self.volatile.paused_at.get_or_insert(self.volatile.now);
            self.notice(Notice::Paused(Pause::DiskFull));
        }
    }

    /// Who could not hand in an update for want of room gets the whole time again.
    pub(super) fn disk_back(&mut self) {
        if !core::mem::take(&mut self.volatile.disk_full) {
            return;
        }
        if let Some(deadline) = &mut self.volatile.timers.deadline {
            deadline.at = self.volatile.now.after(deadline.length);
        }
        match self.volatile.paused.clone() {
            Some(pause) => self.notice(Notice::Paused(pause)),
            None => self.go_on(),
        }
    }

    /// While tasks are open, silence is looked for, and there is a deadline: the plan's or the rounds' own, else one
    /// that somebody's absence sets.
    fn arm_timers(&mut self) {
        let now = self.volatile.now;
        if self.durable.phase.work().is_none_or(|work| work.open_count() == 0) {
            (self.volatile.timers.sweep, self.volatile.timers.deadline) = (None, None);
            return;
        }
        self.volatile.timers.sweep.get_or_insert(now.after(SWEEP_EVERY));
        if !core::mem::take(&mut self.volatile.fleet_changed) {
            return;
        }
        let absent = self.open_tasks().any(|(id, task)| self.is_absent(id, task.worker));
        match self.volatile.timers.deadline {
            None if !self.volatile.overdue => {
                let (own, absence) = (self.deadline_length(), absent.then_some(DEADLINE_MIN));
                let deadline = |length| Deadline { at: now.after(length), length, for_absence: own.is_none() };
                self.volatile.timers.deadline = own.or(absence).map(deadline);
            }
            Some(deadline) if deadline.for_absence && !absent => self.volatile.timers.deadline = None,
            _ => {}
        }
    }

    /// Whether a task is not being worked on, as far as anyone can tell: its worker is not in, or is in for the umpteenth
    /// time. Who comes back only to die again must not hold a round up for ever.
    fn is_absent(&self, task: TaskId, worker: WorkerId) -> bool {
        let conn = self.volatile.by_worker.get(&worker);
        let is_in = conn.and_then(|conn| self.volatile.sessions.get(conn)).is_some_and(|session| session.ready);
        !is_in || self.volatile.announced.get(&task).is_some_and(|times| *times > ANNOUNCED_MAX)
    }
}

fn evaluation_of(work: &Work) -> EvaluationSummary {
    let held = work.held_by_name();
    summarise(held.iter().filter_map(|(_, _, update)| update.metrics.evaluation.as_ref()))
}

/// `ceil(fraction · count)`, at least 1 while there is anyone.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // at most 100,000 workers
fn share(count: usize, fraction: f64) -> usize {
    // A fraction such as 0.7 of 10 must not become 8 by the rounding of 0.7: 2^-40 is far above that, and far below 1.
    let exact = count as f64 * fraction;
    ((exact - 1e-12 * exact.max(1.0)).ceil() as usize).clamp(count.min(1), count)
}
