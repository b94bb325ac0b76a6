//! The durable state of a run, and [`Durable::apply`], the only way to change it. A replay of the facts calls
//! nothing else.

use std::collections::{BTreeMap, BTreeSet};

use crate::evaluation::EvaluationSummary;
use crate::ids::{Hash, RunId, TaskId, WorkerId, WorkerName};
use crate::messages::TaskKind;

use super::events::{Checkpoint, CommittedRound, Entry, Event, Frozen, HeldUpdate, RoundFigures, Stage, Withdrawal};

/// How many round durations the adaptive deadline looks back on.
pub const DURATIONS_KEPT: usize = 64;

/// What a replay restores.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Durable {
    pub(super) run: RunId,
    pub(super) plan: Hash,
    /// The count of starts: the high half of every task id of this process.
    pub(super) start: u32,
    /// Tasks given since this start.
    pub(super) tasks: u32,
    pub(super) frozen: Option<Frozen>,
    pub(super) model: Option<Hash>,
    pub(super) rounds: Vec<CommittedRound>,
    /// Where each committed task is: its round, and its entry.
    pub(super) committed: BTreeMap<TaskId, (u32, Entry)>,
    pub(super) figures: Option<RoundFigures>,
    pub(super) seconds: Vec<f64>,
    /// What was shared, in `central` mode. A restart forgets it.
    pub(super) rows: Option<SharedRows>,
    pub(super) phase: Phase,
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
    Withdrawn(Withdrawal),
}

impl Work {
    fn new(round: u32, kind: TaskKind, base: Hash) -> Self {
        Self { round, kind, base, tasks: BTreeMap::new(), extensions: 0, workers: BTreeSet::new(), open: 0, held: 0 }
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
        let task = self.tasks.get_mut(&id).filter(|task| task.state == TaskState::Open);
        debug_assert!(task.is_some(), "an event settles a task that is not open");
        if let Some(task) = task {
            self.open -= 1;
            self.held += usize::from(matches!(state, TaskState::Held(_)));
            task.state = state;
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
        self.tasks.iter().filter(|(_, task)| task.state == TaskState::Open).map(|(id, task)| (*id, task))
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
    pub(super) fn new(start: u32, from: Checkpoint) -> Self {
        let phase = from.finished.map_or(Phase::Gathering, Phase::Finished);
        let mut durable = Self {
            run: from.run,
            plan: from.plan,
            start,
            tasks: 0,
            frozen: from.frozen,
            model: from.model,
            rounds: Vec::new(),
            committed: BTreeMap::new(),
            figures: from.figures,
            seconds: from.seconds,
            rows: None,
            phase,
        };
        for round in from.rounds {
            durable.add_round(round);
        }
        durable
    }

    /// How many rounds are committed.
    pub(super) fn round(&self) -> u32 {
        u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            run: self.run,
            plan: self.plan,
            frozen: self.frozen,
            model: self.model,
            rounds: self.rounds.clone(),
            figures: self.figures,
            seconds: self.seconds.clone(),
            finished: match &self.phase {
                Phase::Finished(evaluation) => Some(*evaluation),
                _ => None,
            },
        }
    }

    /// Takes in one event. An event that does not fit the state is our bug, or a journal of another run.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Surveyed { frozen, model } => {
                (self.frozen, self.model) = (Some(*frozen), Some(*model));
                self.phase = Phase::Gathering;
            }
            Event::Assigned { .. } => self.assign(event),
            Event::Held { task, update } => self.settle(*task, TaskState::Held(update.clone())),
            Event::Withdrawn { task, why } => self.settle(*task, TaskState::Withdrawn(*why)),
            Event::Extended { extension, .. } => {
                if let Some(work) = self.phase.work_mut() {
                    work.extensions = *extension;
                }
            }
            Event::Closed { .. } => self.close(),
            Event::Committed { entries, figures } => self.commit(entries, figures),
            Event::Voided => self.phase = Phase::Gathering,
            Event::Finished { evaluation } => self.phase = Phase::Finished(*evaluation),
            Event::Aborted { .. } => self.phase = Phase::Aborted,
            Event::Started { .. }
            | Event::Opened { .. }
            | Event::Lost { .. }
            | Event::Reverted { .. }
            | Event::Redone { .. }
            | Event::Notice(_) => {}
        }
    }

    /// The first assignment of a kind opens its phase.
    fn assign(&mut self, event: &Event) {
        let Event::Assigned { task, round, kind, worker, name, base } = event else { return };
        if matches!(self.phase, Phase::Gathering) {
            let work = Work::new(*round, *kind, *base);
            self.phase = match kind {
                TaskKind::Survey => Phase::Surveying(work),
                TaskKind::Rows => Phase::Sharing(work),
                // A round of `central` mode evaluates for the round to come, the last evaluation for the one that was.
                TaskKind::Evaluation if *round == self.round() => Phase::Evaluating(work),
                _ => Phase::Training(work),
            };
        }
        self.tasks += 1;
        if let Some(work) = self.phase.work_mut() {
            work.add(*task, *worker, name.clone());
        }
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
        self.add_round(CommittedRound { model: figures.model, entries: entries.to_vec() });
        self.model = Some(figures.model);
        self.figures = Some(*figures);
        if self.seconds.len() == DURATIONS_KEPT {
            self.seconds.remove(0);
        }
        self.seconds.push(figures.seconds);
        self.phase = Phase::Gathering;
    }

    fn add_round(&mut self, round: CommittedRound) {
        let number = self.round() + 1;
        self.committed.extend(round.entries.iter().map(|entry| (entry.task, (number, *entry))));
        self.rounds.push(round);
    }
}
