//! The durable state of a run, and [`Durable::apply`], the only way to change it. A replay of the facts calls
//! nothing else.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::evaluation::EvaluationSummary;
use crate::ids::{Hash, RunId, TaskId, WorkerId, WorkerName};
use crate::messages::TaskKind;

use super::events::{Entry, Event, Frozen, HeldUpdate, RoundFigures, Stage, Withdrawal};
use super::planted::{Bug, is_planted};

/// How many round durations the adaptive deadline looks back on.
pub const DURATIONS_KEPT: usize = 64;

/// How many rounds back a damaged model can be made again.
pub const REVERT_MAX: usize = 2;

/// What a replay restores.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Durable {
    pub(super) run: RunId,
    /// The count of starts: the high half of every task id of this process.
    pub(super) start: u32,
    /// Tasks given since this start.
    pub(super) tasks: u32,
    pub(super) frozen: Option<Frozen>,
    /// The model that the survey made.
    first: Option<Hash>,
    /// The newest model that is whole.
    pub(super) model: Option<Hash>,
    /// The model of each committed round.
    pub(super) rounds: Vec<Hash>,
    /// Where each committed task is: its round, and its entry.
    pub(super) committed: BTreeMap<TaskId, (u32, Entry)>,
    /// The newest committed task of each worker, behind the one before it.
    pub(super) latest: BTreeMap<WorkerId, [Option<TaskId>; 2]>,
    pub(super) figures: Option<RoundFigures>,
    pub(super) seconds: Vec<f64>,
    /// What was shared, in `central` mode. A restart forgets it.
    pub(super) rows: Option<SharedRows>,
    pub(super) phase: Phase,
    /// The work of the last committed rounds, at most [`REVERT_MAX`].
    recent: VecDeque<Work>,
    /// Committed rounds that are to be made again after the one in [`Self::phase`], and where the run was.
    redo: Option<Redo>,
}

/// A way back to where the run was before its models were found damaged.
#[derive(Clone, Debug, PartialEq)]
struct Redo {
    rounds: VecDeque<Work>,
    after: Box<Phase>,
}

/// Encoded rows that the coordinator has.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct SharedRows {
    /// The tasks that brought them, by the names of their workers.
    pub(super) tasks: Vec<TaskId>,
    /// How many they are.
    pub(super) examples: u64,
}

/// Where the run is. Each variant owns what only it needs.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Phase {
    Gathering,
    Surveying(Work),
    Sharing(Work),
    Training(Work),
    /// The set of updates is final.
    Committing(Work),
    Evaluating(Work),
    Finished(EvaluationSummary),
    Aborted,
}

/// Some tasks of one kind that are waited for together.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Work {
    pub(super) round: u32,
    pub(super) kind: TaskKind,
    pub(super) base: Hash,
    pub(super) tasks: BTreeMap<TaskId, Task>,
    pub(super) extensions: u32,
    /// How many payloads make it whole.
    pub(super) wanted: usize,
    /// Who was selected: a second task of one worker does not count.
    workers: BTreeSet<WorkerId>,
    open: usize,
    held: usize,
}

/// One worker's part in it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Task {
    pub(super) worker: WorkerId,
    pub(super) name: WorkerName,
    pub(super) state: TaskState,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum TaskState {
    Open,
    Held(Box<HeldUpdate>),
    /// It was held, the set of updates is final, and it cannot be read back: nothing else will do.
    Lost(Box<HeldUpdate>),
    Withdrawn(Withdrawal),
}

impl TaskState {
    /// Whether a payload is waited for.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Open | Self::Lost(_))
    }
}

impl Work {
    fn new(round: u32, kind: TaskKind, base: Hash, wanted: usize) -> Self {
        let (tasks, workers) = (BTreeMap::new(), BTreeSet::new());
        Self { round, kind, base, tasks, extensions: 0, wanted, workers, open: 0, held: 0 }
    }

    /// How many workers were selected.
    pub(super) fn selected(&self) -> usize {
        self.workers.len()
    }

    /// How many tasks are open.
    pub(super) fn open_count(&self) -> usize {
        self.open
    }

    /// How many payloads are held.
    pub(super) fn held_count(&self) -> usize {
        self.held
    }

    fn add(&mut self, id: TaskId, worker: WorkerId, name: WorkerName) {
        self.workers.insert(worker);
        self.open += 1;
        self.tasks.insert(id, Task { worker, name, state: TaskState::Open });
    }

    /// An open task ends.
    fn settle(&mut self, id: TaskId, state: TaskState) {
        let task = self.tasks.get_mut(&id).filter(|task| task.state.is_open());
        let is_planted = is_planted(Bug::HeldTwice) || is_planted(Bug::LateFolded);
        debug_assert!(task.is_some() || is_planted, "an event settles a task that is not open");
        if let Some(task) = task {
            self.open -= 1;
            self.held += usize::from(matches!(state, TaskState::Held(_)));
            task.state = state;
        }
    }

    /// A held payload is gone. While the set of updates may still change, any other will do in its place.
    fn lose(&mut self, id: TaskId, is_final: bool) {
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if let TaskState::Held(update) = &task.state {
            task.state = if is_final { TaskState::Lost(update.clone()) } else { TaskState::Open };
            self.open += 1;
            self.held -= 1;
        }
    }

    /// The held payloads, in task order.
    pub(super) fn held(&self) -> impl Iterator<Item = (TaskId, &Task, &HeldUpdate)> {
        self.tasks.iter().filter_map(|(id, task)| match &task.state {
            TaskState::Held(update) => Some((*id, task, &**update)),
            _ => None,
        })
    }

    /// The open tasks, in task order.
    pub(super) fn open(&self) -> impl Iterator<Item = (TaskId, &Task)> {
        self.tasks.iter().filter(|(_, task)| task.state.is_open()).map(|(id, task)| (*id, task))
    }

    /// What was last asked of a worker.
    pub(super) fn latest_of(&self, worker: WorkerId) -> Option<(TaskId, &Task)> {
        self.tasks.iter().rev().find(|(_, task)| task.worker == worker).map(|(id, task)| (*id, task))
    }

    /// The held payloads, by name.
    pub(super) fn held_by_name(&self) -> Vec<(TaskId, &Task, &HeldUpdate)> {
        let mut held: Vec<_> = self.held().collect();
        held.sort_by(|a, b| a.1.name.cmp(&b.1.name));
        held
    }
}

impl Phase {
    pub(super) fn stage(&self) -> Stage {
        match self {
            Self::Gathering => Stage::Gathering,
            Self::Surveying(_) => Stage::Surveying,
            Self::Sharing(_) => Stage::Sharing,
            Self::Training(_) => Stage::Training,
            Self::Committing(_) => Stage::Committing,
            Self::Evaluating(_) => Stage::Evaluating,
            Self::Finished(_) => Stage::Finished,
            Self::Aborted => Stage::Aborted,
        }
    }

    pub(super) fn work(&self) -> Option<&Work> {
        match self {
            Self::Surveying(w) | Self::Sharing(w) | Self::Training(w) | Self::Committing(w) | Self::Evaluating(w) => {
                Some(w)
            }
            Self::Gathering | Self::Finished(_) | Self::Aborted => None,
        }
    }

    fn work_mut(&mut self) -> Option<&mut Work> {
        match self {
            Self::Surveying(w) | Self::Sharing(w) | Self::Training(w) | Self::Committing(w) | Self::Evaluating(w) => {
                Some(w)
            }
            Self::Gathering | Self::Finished(_) | Self::Aborted => None,
        }
    }
}

impl Durable {
    pub(super) fn new(run: RunId) -> Self {
        Self {
            run,
            start: 0,
            tasks: 0,
            frozen: None,
            first: None,
            model: None,
            rounds: Vec::new(),
            committed: BTreeMap::new(),
            latest: BTreeMap::new(),
            figures: None,
            seconds: Vec::new(),
            rows: None,
            phase: Phase::Gathering,
            recent: VecDeque::new(),
            redo: None,
        }
    }

    /// How many rounds are committed.
    pub(super) fn round(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    /// The round whose model is the newest that is whole.
    pub(super) fn whole(&self) -> u32 {
        match (&self.redo, &self.phase) {
            (Some(_), Phase::Committing(work)) => work.round - 1,
            _ => self.round(),
        }
    }

    /// The model that a round made, or the survey before the first.
    pub(super) fn model_of(&self, round: u32) -> Option<Hash> {
        let before = usize::try_from(round).unwrap_or(usize::MAX).checked_sub(1);
        before.map_or(self.first, |index| self.rounds.get(index).copied())
    }

    /// Whether the round that is being made was committed before.
    pub(super) fn is_redoing(&self) -> bool {
        self.redo.is_some()
    }

    /// Takes in one event. An event that does not fit the state is our bug, or a journal of another run.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Started { start } => self.begin_anew(*start),
            Event::Surveyed { frozen, model } => {
                (self.frozen, self.first, self.model) = (Some(*frozen), Some(*model), Some(*model));
                self.phase = Phase::Gathering;
            }
            Event::Opened { round, kind, base, wanted } => {
                self.open(Work::new(*round, *kind, *base, usize::try_from(*wanted).unwrap_or(usize::MAX)));
            }
            Event::Assigned { task, worker, name, .. } => {
                self.tasks += 1;
                if let Some(work) = self.phase.work_mut() {
                    work.add(*task, *worker, name.clone());
                }
            }
            Event::Held { task, update } => self.settle(*task, TaskState::Held(update.clone())),
            Event::Withdrawn { task, why } => self.settle(*task, TaskState::Withdrawn(*why)),
            Event::Lost { task } => {
                let is_final = matches!(self.phase, Phase::Committing(_));
                if let Some(work) = self.phase.work_mut() {
                    work.lose(*task, is_final);
                }
            }
            Event::Extended { extension, .. } => {
                if let Some(work) = self.phase.work_mut() {
                    work.extensions = *extension;
                }
            }
            Event::Closed { .. } => self.close(),
            Event::Committed { entries, figures } => self.commit(entries, figures),
            Event::Reverted { round } => self.revert(*round),
            Event::Redone { round } => self.redone(*round),
            Event::Voided => self.phase = Phase::Gathering,
            Event::Finished { evaluation } => self.phase = Phase::Finished(*evaluation),
            Event::Aborted { .. } => (self.phase, self.redo) = (Phase::Aborted, None),
            Event::Notice(_) => {}
        }
    }

    /// A new process: its task ids are its own, and shared rows, whose key was in memory, are gone with what rests on
    /// them.
    fn begin_anew(&mut self, start: u32) {
        (self.start, self.tasks, self.rows) = (start, 0, None);
        let rests_on_rows = match &self.phase {
            Phase::Sharing(_) => true,
            Phase::Training(work) | Phase::Committing(work) => work.kind == TaskKind::Evaluation,
            _ => false,
        };
        if rests_on_rows {
            self.phase = Phase::Gathering;
        }
    }

    fn open(&mut self, work: Work) {
        self.phase = match work.kind {
            TaskKind::Survey => Phase::Surveying(work),
            TaskKind::Rows => Phase::Sharing(work),
            // A round of `central` mode evaluates for the round to come, the last evaluation for the one that was.
            TaskKind::Evaluation if work.round == self.round() => Phase::Evaluating(work),
            _ => Phase::Training(work),
        };
    }

    fn settle(&mut self, task: TaskId, state: TaskState) {
        if let Some(work) = self.phase.work_mut() {
            work.settle(task, state);
        }
    }

    fn close(&mut self) {
        self.phase = match core::mem::replace(&mut self.phase, Phase::Gathering) {
            Phase::Training(work) => Phase::Committing(work),
            Phase::Sharing(work) => {
                let some = work.held_by_name().into_iter().filter(|(_, _, update)| update.bytes > 0);
                let mut rows = SharedRows::default();
                for (task, _, update) in some {
                    rows.tasks.push(task);
                    rows.examples = rows.examples.saturating_add(update.examples);
                }
                self.rows = Some(rows);
                Phase::Gathering
            }
            other => other,
        };
    }

    fn commit(&mut self, entries: &[Entry], figures: &RoundFigures) {
        self.rounds.push(figures.model);
        let round = self.round();
        self.committed.extend(entries.iter().map(|entry| (entry.task, (round, *entry))));
        for entry in entries {
            let latest = self.latest.entry(entry.worker).or_default();
            *latest = [latest[1], Some(entry.task)];
        }
        self.model = Some(figures.model);
        self.figures = Some(*figures);
        if self.seconds.len() == DURATIONS_KEPT {
            self.seconds.remove(0);
        }
        self.seconds.push(figures.seconds);
        if let Phase::Committing(work) = core::mem::replace(&mut self.phase, Phase::Gathering) {
            self.remember(work);
        }
    }

    fn remember(&mut self, work: Work) {
        self.recent.push_back(work);
        if self.recent.len() > REVERT_MAX {
            self.recent.pop_front();
        }
    }

    /// Back to the model of `round`: the rounds after it are made again, each of the same updates. What nobody has a
    /// receipt for, as in `central` mode, is not made again but done anew.
    fn revert(&mut self, round: u32) {
        let before = core::mem::replace(&mut self.phase, Phase::Gathering);
        let (mut rounds, after) = match (self.redo.take(), before) {
            (Some(mut redo), Phase::Committing(work)) => {
                redo.rounds.push_front(work);
                (redo.rounds, *redo.after)
            }
            (_, phase) => (VecDeque::new(), phase),
        };
        while let Some(work) = self.recent.pop_back_if(|work| work.round > round) {
            rounds.push_front(work);
        }
        // Made again by somebody else: the way is shorter than it was.
        while let Some(work) = rounds.pop_front_if(|work| work.round <= round) {
            self.remember(work);
        }
        self.model = self.model_of(round);
        let anew = rounds.front().is_some_and(|work| work.kind == TaskKind::Evaluation);
        if anew {
            self.rounds.truncate(usize::try_from(round).unwrap_or(usize::MAX));
            return;
        }
        self.go_on(Redo { rounds, after: Box::new(after) });
    }

    fn go_on(&mut self, mut redo: Redo) {
        match redo.rounds.pop_front() {
            Some(work) => (self.phase, self.redo) = (Phase::Committing(work), Some(redo)),
            None => self.phase = *redo.after,
        }
    }

    fn redone(&mut self, round: u32) {
        self.model = self.model_of(round);
        let (Some(redo), Phase::Committing(_)) = (self.redo.take(), &self.phase) else { return };
        if let Phase::Committing(work) = core::mem::replace(&mut self.phase, Phase::Gathering) {
            self.remember(work);
        }
        self.go_on(redo);
    }
}
