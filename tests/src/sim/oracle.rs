//! What must hold, whatever fails. It is told of every fact, every model and every word that leaves the coordinator, and
//! knows nothing of how they come about.

use std::collections::{BTreeMap, BTreeSet};

use protocol::federation::{Entry, Event, Federation};
use protocol::ids::{Hash, RunId, TaskId, WorkerId};
use protocol::messages::{Receipt, TaskKind};
use protocol::plan::{Mode, Plan};

/// A broken promise.
pub type Broken = String;

/// What was promised, and what is known of how it was kept.
#[derive(Debug)]
pub struct Oracle {
    plan: Plan,
    run: RunId,
    /// Every fact of the run as it is now, in order, and what is looked up in them.
    facts: Vec<Event>,
    index: Index,
    /// So many of them are durable for sure.
    synced: usize,
    /// A replay of the facts.
    shadow: Federation,
    /// What each task was when it was first told of, for ever.
    told: BTreeMap<TaskId, Told>,
    /// Each model that was ever made, as numbers.
    models: BTreeMap<Hash, Vec<f32>>,
    /// The server's velocity after each model.
    velocities: BTreeMap<Hash, Vec<f64>>,
    /// The model of each round that anybody was told of, for ever; 0 is the first model.
    announced: BTreeMap<u32, Hash>,
    /// Commits that a power cut cannot take any more, with their entries.
    durable: BTreeMap<u32, (Hash, Vec<Entry>)>,
    is_over: bool,
    receipts: BTreeSet<(WorkerId, TaskId, Hash, u32)>,
    places: usize,
}

/// What the facts say of tasks and rounds.
#[derive(Debug, Default)]
struct Index {
    given: BTreeSet<TaskId>,
    withdrawn: BTreeSet<TaskId>,
    /// Weights of what is held, or was committed.
    held: BTreeMap<TaskId, u32>,
    committed: BTreeSet<TaskId>,
    /// The model of each round, and where in the facts it stands.
    models: BTreeMap<u32, (Hash, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Told {
    round: u32,
    kind: TaskKind,
    worker: WorkerId,
    base: Hash,
}

impl Oracle {
    /// Of a run that has not begun; each round takes `places` places.
    #[must_use]
    pub fn new(plan: Plan, run: RunId, places: usize) -> Self {
        Self {
            shadow: Federation::new(plan.clone(), run),
            plan,
            run,
            facts: Vec::new(),
            index: Index::default(),
            synced: 0,
            told: BTreeMap::new(),
            models: BTreeMap::new(),
            velocities: BTreeMap::new(),
            announced: BTreeMap::new(),
            durable: BTreeMap::new(),
            is_over: false,
            receipts: BTreeSet::new(),
            places,
        }
    }

    /// How many facts there are.
    #[must_use]
    pub fn facts(&self) -> usize {
        self.facts.len()
    }

    /// How many of them are durable, as far as the store said.
    #[must_use]
    pub fn durable_facts(&self) -> usize {
        self.synced
    }

    /// Whether `events` are the first of the facts.
    #[must_use]
    pub fn begins_with(&self, events: &[Event]) -> bool {
        self.facts.starts_with(events)
    }

    /// How many rounds were announced.
    #[must_use]
    pub fn rounds(&self) -> usize {
        self.announced.len().saturating_sub(1)
    }

    /// The model of the last round that was announced.
    #[must_use]
    pub fn last_model(&self) -> Option<Hash> {
        self.announced.last_key_value().map(|(_, model)| *model)
    }

    /// How many receipts were given.
    #[must_use]
    pub fn receipts(&self) -> usize {
        self.receipts.len()
    }

    /// A process has read the journal: what it found must be what was written, up to what may be lost.
    ///
    /// # Errors
    /// What is missing or other.
    pub fn loaded(&mut self, events: &[Event]) -> Result<(), Broken> {
        if events.len() < self.synced {
            return Err(format!("{} facts were durable, {} are left", self.synced, events.len()));
        }
        let same = self.facts.iter().zip(events).take_while(|(written, read)| written == read).count();
        if same < events.len() {
            let written = self.facts.get(same);
            return Err(format!("fact {same} was written as {written:?} and is read as {:?}", events[same]));
        }
        self.facts.truncate(events.len());
        self.shadow = Federation::new(self.plan.clone(), self.run);
        self.index = Index::default();
        for (at, event) in events.iter().enumerate() {
            self.shadow.apply(event);
            self.index.add(at, event);
        }
        Ok(())
    }

    /// A fact was handed to the store.
    ///
    /// # Errors
    /// Why it cannot be one.
    pub fn appended(&mut self, event: &Event) -> Result<(), Broken> {
        match event {
            Event::Assigned { task, .. } if self.index.given.contains(task) => {
                return Err(format!("task {task} is given twice"));
            }
            Event::Held { task, .. } => self.check_held(*task)?,
            Event::Withdrawn { task, why } if self.index.held.contains_key(task) => {
                return Err(format!("task {task} is held and is withdrawn: {why:?}"));
            }
            Event::Committed { entries, figures } => self.check_commit(figures.round, figures.model, entries)?,
            _ => {}
        }
        if let (Event::Reverted { round }, Mode::Central) = (event, self.plan.learning.train.mode) {
            // Rows are shared anew, by whoever is there then: what is made of them is another model.
            self.announced.retain(|of, _| of <= round);
            self.durable.retain(|of, _| of <= round);
        }
        self.shadow.apply(event);
        self.index.add(self.facts.len(), event);
        self.facts.push(event.clone());
        Ok(())
    }

    /// So many facts are durable now, as far as the store says.
    pub fn synced(&mut self, facts: usize) {
        self.synced = self.synced.max(facts);
    }

    fn check_held(&self, task: TaskId) -> Result<(), Broken> {
        if self.index.held.contains_key(&task) {
            return Err(format!("task {task} is held twice"));
        }
        if self.index.withdrawn.contains(&task) {
            return Err(format!("task {task} was withdrawn and is held"));
        }
        Ok(())
    }

    fn check_commit(&self, round: u32, model: Hash, entries: &[Entry]) -> Result<(), Broken> {
        let mut workers = BTreeSet::new();
        for entry in entries {
            if self.index.committed.contains(&entry.task) {
                return Err(format!("round {round}: task {} counts twice", entry.task));
            }
            if !workers.insert(entry.worker) {
                return Err(format!("round {round}: worker {} counts twice", entry.worker));
            }
            if !self.index.held.contains_key(&entry.task) {
                return Err(format!("round {round}: task {} counts and was never held", entry.task));
            }
        }
        if self.announced.get(&round).is_some_and(|told| *told != model) {
            return Err(format!("round {round}: model {model} is committed, another was announced"));
        }
        if self.plan.learning.train.mode == Mode::Central { Ok(()) } else { self.check_model(round, model, entries) }
    }

    /// The model holds each of the entries once, and nothing else.
    fn check_model(&self, round: u32, model: Hash, entries: &[Entry]) -> Result<(), Broken> {
        let base = self.model_before(round).ok_or_else(|| format!("round {round} has no base"))?;
        let (Some(before), Some(after)) = (self.models.get(&base), self.models.get(&model)) else {
            return Err(format!("round {round}: a model is committed that was never made"));
        };
        let mean = self.expected_mean(round, entries, before.len())?;
        let velocity = self.next_velocity(base, &mean);
        let step =
            if self.plan.learning.train.mode == Mode::Gradient { -self.plan.learning.train.learning_rate } else { 1.0 };
        for (place, ((before, after), velocity)) in before.iter().zip(after).zip(&velocity).enumerate() {
            let (got, expected) = (f64::from(*after) - f64::from(*before), step * velocity);
            if (got - expected).abs() > 1e-5 {
                return Err(format!("round {round}: place {place} moved by {got}, its updates move it by {expected}"));
            }
        }
        Ok(())
    }

    fn model_before(&self, round: u32) -> Option<Hash> {
        self.index.models.get(&(round.checked_sub(1)?)).map(|(model, _)| *model)
    }

    fn expected_mean(&self, round: u32, entries: &[Entry], parameters: usize) -> Result<Vec<f64>, Broken> {
        let mut mean = vec![0.0; parameters];
        let mut sum = 0.0;
        for entry in entries {
            let weight = self.index.held.get(&entry.task).copied();
            let weight = f64::from(weight.ok_or_else(|| format!("task {} is not held", entry.task))?);
            mean[place_of(entry.worker, round, self.places, parameters)] += weight;
            sum += weight;
        }
        mean.iter_mut().for_each(|cell| *cell /= sum);
        Ok(mean)
    }

    /// What the server step moves the model by, times its rate.
    fn next_velocity(&self, base: Hash, mean: &[f64]) -> Vec<f64> {
        let momentum = self.plan.learning.train.momentum;
        match self.velocities.get(&base) {
            Some(before) if momentum != 0.0 => before.iter().zip(mean).map(|(v, mean)| momentum * v + mean).collect(),
            _ => mean.to_vec(),
        }
    }

    /// A model was made.
    ///
    /// # Errors
    /// If another one has its hash.
    pub fn made(&mut self, hash: Hash, numbers: Vec<f32>) -> Result<(), Broken> {
        match self.models.get(&hash) {
            Some(known) if *known != numbers => Err(format!("two models have the hash {hash}")),
            Some(_) => Ok(()),
            None => {
                self.models.insert(hash, numbers);
                Ok(())
            }
        }
    }

    /// Remembers what the server keeps beside a model that was committed.
    pub fn committed(&mut self, round: u32, model: Hash, entries: &[Entry]) {
        let parameters = self.models.get(&model).map_or(0, Vec::len);
        let Some(base) = self.model_before(round).filter(|_| self.plan.learning.train.momentum != 0.0) else { return };
        if let Ok(mean) = self.expected_mean(round, entries, parameters) {
            let velocity = self.next_velocity(base, &mean);
            self.velocities.insert(model, velocity);
        }
    }

    /// A worker is told of a task.
    ///
    /// # Errors
    /// If its number was another task's, or its model is not durable.
    pub fn assigned(
        &mut self,
        worker: WorkerId,
        task: TaskId,
        round: u32,
        kind: TaskKind,
        base: Option<Hash>,
    ) -> Result<(), Broken> {
        let told = Told { round, kind, worker, base: base.unwrap_or(Hash([0; 32])) };
        let known = *self.told.entry(task).or_insert(told);
        if known != told {
            return Err(format!("task {task} was {known:?} and is {told:?}"));
        }
        let Some(model) = base else { return Ok(()) };
        // The last evaluation names the round that was; every other task the round that comes.
        let is_last = kind == TaskKind::Evaluation && self.model_before(round + 1) == Some(model);
        self.announce(if is_last { round } else { round - 1 }, model)
    }

    /// Somebody is told that `model` is the one of `round`.
    ///
    /// # Errors
    /// If another one was told of, or the store has not said that it is durable.
    pub fn announce(&mut self, round: u32, model: Hash) -> Result<(), Broken> {
        let known = *self.announced.entry(round).or_insert(model);
        if known != model {
            return Err(format!("round {round} has two models: {known} and {model}"));
        }
        match self.index.models.get(&round) {
            Some((committed, at)) if *committed == model && *at < self.synced => Ok(()),
            Some((committed, _)) if *committed == model => {
                Err(format!("round {round}: {model} is announced before its commit is synced"))
            }
            _ => Err(format!("round {round}: {model} is announced and was never committed")),
        }
    }

    /// Commits that nobody has looked for on the disk, among those that were announced.
    #[must_use]
    pub fn is_unproved(&self) -> bool {
        self.announced.keys().any(|round| !self.durable.contains_key(round))
    }

    /// What the worst power cut would leave now: everything that was announced must be in it.
    ///
    /// # Errors
    /// What is not.
    pub fn prove(&mut self, events: &[Event]) -> Result<(), Broken> {
        for event in events {
            match event {
                Event::Surveyed { model, .. } => drop(self.durable.insert(0, (*model, Vec::new()))),
                Event::Committed { entries, figures } => {
                    self.durable.insert(figures.round, (figures.model, entries.clone()));
                }
                Event::Finished { .. } => self.is_over = true,
                _ => {}
            }
        }
        for (round, model) in &self.announced {
            match self.durable.get(round) {
                Some((durable, _)) if durable == model => {}
                Some((durable, _)) => {
                    return Err(format!("round {round}: {model} was announced, {durable} is durable"));
                }
                None => return Err(format!("round {round}: {model} was announced and is not durable")),
            }
        }
        Ok(())
    }

    /// Whether the end is durable, as far as was looked.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// What kind of work a task is, if a worker was told of it.
    #[must_use]
    pub fn kind_of(&self, task: TaskId) -> Option<TaskKind> {
        self.told.get(&task).map(|told| told.kind)
    }

    /// Whether a task's update is in a committed round.
    #[must_use]
    pub fn is_committed(&self, task: TaskId) -> bool {
        self.index.committed.contains(&task)
    }

    /// Whether a held payload's record is among `events`.
    ///
    /// # Errors
    /// If not.
    pub fn check_promise(&self, events: &[Event], task: TaskId, hash: Hash) -> Result<(), Broken> {
        let holds =
            |event: &Event| matches!(event, Event::Held { task: of, update } if *of == task && update.hash == hash);
        if events.iter().any(holds) { Ok(()) } else { Err(format!("task {task}: held is said, and is not durable")) }
    }

    /// A receipt was given.
    ///
    /// # Errors
    /// If it says what is not so.
    pub fn receipted(&mut self, receipt: &Receipt) -> Result<(), Broken> {
        self.announce(receipt.round, receipt.model_hash)?;
        self.receipts.insert((receipt.worker, receipt.task, receipt.hash, receipt.round));
        Ok(())
    }

    /// Every receipt's update is in the round that it names, and in no other. Called when everything announced was proved.
    ///
    /// # Errors
    /// Which is not.
    pub fn check_receipts(&self) -> Result<(), Broken> {
        for (worker, task, hash, round) in &self.receipts {
            let entry = Entry { task: *task, worker: *worker, hash: *hash };
            let rounds = self.durable.iter().filter(|(_, (_, entries))| entries.contains(&entry));
            let rounds: Vec<u32> = rounds.map(|(round, _)| *round).collect();
            if rounds != [*round] {
                return Err(format!("the receipt of task {task} names round {round}, its update is in {rounds:?}"));
            }
            let twice =
                self.durable.values().flat_map(|(_, entries)| entries).filter(|entry| entry.task == *task).count();
            if twice != 1 {
                return Err(format!("task {task} counts {twice} times"));
            }
        }
        Ok(())
    }

    /// The live machine must be what its facts make of one.
    ///
    /// # Errors
    /// If it is not.
    pub fn compare(&self, live: &Federation) -> Result<(), Broken> {
        if self.shadow.agrees_with(live) {
            return Ok(());
        }
        Err(format!(
            "a replay of the facts is not the live state: {:?} is live, {:?} replayed",
            live.summary(),
            self.shadow.summary()
        ))
    }
}

impl Index {
    fn add(&mut self, at: usize, fact: &Event) {
        match fact {
            Event::Assigned { task, .. } => drop(self.given.insert(*task)),
            Event::Withdrawn { task, .. } => drop(self.withdrawn.insert(*task)),
            Event::Held { task, update } => drop(self.held.insert(*task, update.weight)),
            Event::Lost { task } => drop(self.held.remove(task)),
            Event::Surveyed { model, .. } => drop(self.models.insert(0, (*model, at))),
            Event::Committed { entries, figures } => {
                self.committed.extend(entries.iter().map(|entry| entry.task));
                self.models.insert(figures.round, (figures.model, at));
            }
            _ => {}
        }
    }
}

/// Where a worker's update of a round is one. No two of a round, nor of two rounds that follow each other, share a place.
#[must_use]
pub fn place_of(worker: WorkerId, round: u32, workers: usize, parameters: usize) -> usize {
    (index_of(worker) + usize::try_from(round).unwrap_or(0) * workers) % parameters
}

/// Which worker this is.
#[must_use]
pub fn index_of(worker: WorkerId) -> usize {
    let [low, high, ..] = worker.0;
    usize::from(low) | usize::from(high) << 8
}
