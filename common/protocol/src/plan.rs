//! The plan of a run: what was typed, parsed into what is possible.
//!
//! [`LearningPlan`] is what every worker reads in `Welcome` before it takes part, and what may not change within a
//! run; [`RoundsSpec`] is the coordinator's own and may change between starts. After a [`Plan`] exists nobody
//! checks its values again. The plan's hash covers all that decides the model, the ring included, except the number
//! of rounds, which may grow.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::Hash;
use crate::limits::{ROUNDS_MAX, UPDATES_MAX};
use crate::sum::Ring;

/// What is to be learned from the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LearningTask {
    /// One of several classes.
    Classification,
    /// A number.
    Regression,
}

/// The `[data]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// The label column; without it the column called `label`, `target` or `y`, else the last one.
    pub label: Option<String>,
    /// Classification or regression; without it, text or at most 20 whole-number values are classes.
    pub task: Option<LearningTask>,
    /// Columns to leave out.
    pub drop: Vec<String>,
    /// Columns whose numbers are names.
    pub categorical: Vec<String>,
    /// The share of rows held out for evaluation, in 0 ..= 0.9.
    pub validation_fraction: f64,
}

impl Default for DataSpec {
    fn default() -> Self {
        Self { label: None, task: None, drop: Vec::new(), categorical: Vec::new(), validation_fraction: 0.2 }
    }
}

/// The `[model]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelSpec {
    /// Logistic, softmax or linear regression, as the task asks.
    Linear,
    /// Dense layers with ReLU between them.
    Mlp {
        /// The widths of the hidden layers, 1 to 16 of them, each 1 to 65,536.
        hidden: Vec<u32>,
    },
}

impl Default for ModelSpec {
    fn default() -> Self {
        Self::Mlp { hidden: vec![64, 32] }
    }
}

/// Who computes what, and what travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Workers train for some epochs and send weight deltas.
    Federated,
    /// Workers send the mean gradient of one batch; the coordinator applies the optimizer.
    Gradient,
    /// Workers send their encoded training rows once, if their owners allow it; the coordinator trains.
    Central,
}

/// How many rows make a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BatchSize {
    /// So many, at least 1.
    Rows(u32),
    /// All training rows of the worker.
    Full,
}

/// The `[train]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// Who computes what.
    pub mode: Mode,
    /// How many rounds, 1 to [`ROUNDS_MAX`].
    pub rounds: u32,
    /// Passes over the training rows in one round, at least 1.
    pub local_epochs: u32,
    /// Rows of a batch.
    pub batch_size: BatchSize,
    /// The step size of SGD, positive and finite.
    pub learning_rate: f64,
    /// The momentum of SGD, in 0 .. 1.
    pub momentum: f64,
    /// The key of all draws: initial weights, shuffles, selection, held-out rows.
    pub seed: u64,
}

impl Default for TrainSpec {
    fn default() -> Self {
        Self {
            mode: Mode::Federated,
            rounds: 30,
            local_epochs: 1,
            batch_size: BatchSize::Rows(32),
            learning_rate: 0.05,
            momentum: 0.0,
            seed: 7,
        }
    }
}

/// The `[strategy]` section: what the server does with the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Strategy {
    /// Adds the mean of the weight deltas (McMahan et al. 2017, algorithm 1).
    #[default]
    FedAvg,
}

/// The part of the plan that decides the model. Every worker reads it before it takes part.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LearningPlan {
    /// What is learned from.
    pub data: DataSpec,
    /// What is trained.
    pub model: ModelSpec,
    /// How.
    pub train: TrainSpec,
    /// What the server does with the mean.
    pub strategy: Strategy,
}

/// What is durable when an update is said to be held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// One sync a round; `Held` promises only that the update counts while the coordinator lives.
    #[default]
    Round,
    /// The payload is synced before `Held`.
    Update,
}

/// The `[rounds]` section. May change between starts.
#[derive(Clone, Debug, PartialEq)]
pub struct RoundsSpec {
    /// Start the moment so many workers are in; without it, when two are in and no third came for 10 s.
    pub min_workers: Option<u32>,
    /// The share of the fleet whose updates a round wants, in (0, 1].
    pub fraction: f64,
    /// How many more than wanted are selected, as a share of them, in 0 ..= 1: the slowest are told that they are late.
    pub over_select: f64,
    /// The share of the wanted updates that make a round when its deadline has passed, in (0, 1].
    pub quorum: f64,
    /// How long a round waits for its last update; without it, three times the p95 of what rounds took.
    pub deadline: Option<Duration>,
    /// When an answer is given.
    pub durability: Durability,
}

impl Default for RoundsSpec {
    fn default() -> Self {
        Self {
            min_workers: None,
            fraction: 1.0,
            over_select: 0.0,
            quorum: 0.8,
            deadline: None,
            durability: Durability::Round,
        }
    }
}

/// A checked plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What decides the model.
    pub learning: LearningPlan,
    /// What decides when.
    pub rounds: RoundsSpec,
    /// The arithmetic of the sum.
    pub ring: Ring,
}

/// A value out of its range, by its name in the config.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {got}, expected {expected}")]
pub struct PlanError {
    /// The key, such as `rounds.quorum`.
    pub key: &'static str,
    /// The value.
    pub got: String,
    /// What would be accepted.
    pub expected: String,
}

fn check(holds: bool, key: &'static str, got: impl ToString, expected: impl Into<String>) -> Result<(), PlanError> {
    if holds { Ok(()) } else { Err(PlanError { key, got: got.to_string(), expected: expected.into() }) }
}

impl Plan {
    /// Checks every value once.
    ///
    /// # Errors
    /// The first value that is out of its range, by name.
    pub fn new(learning: LearningPlan, rounds: RoundsSpec) -> Result<Self, PlanError> {
        check_data(&learning.data)?;
        check_model(&learning.model)?;
        check_train(&learning.train)?;
        check_rounds(&rounds)?;
        Ok(Self { learning, rounds, ring: Ring::weighted() })
    }

    /// The hash of what may not change within a run.
    ///
    /// # Panics
    /// Never: a plan of bounded strings and numbers always has an encoding.
    #[must_use]
    pub fn hash(&self) -> Hash {
        let mut learning = self.learning.clone();
        learning.train.rounds = 0;
        let bytes = postcard::to_allocvec(&(&learning, &self.ring)).expect("a plan always has an encoding");
        let mut hasher = blake3::Hasher::new_derive_key("tributary plan 1");
        hasher.update(&bytes);
        hasher.finalize().into()
    }
}

fn check_data(data: &DataSpec) -> Result<(), PlanError> {
    let share = data.validation_fraction;
    check((0.0..=0.9).contains(&share), "data.validation_fraction", share, "a number from 0 to 0.9")?;
    let Some(label) = &data.label else { return Ok(()) };
    check(!label.is_empty(), "data.label", "empty", "the name of a column")?;
    check(
        !data.drop.contains(label),
        "data.drop",
        format!("{:?}", data.drop),
        format!("a list without the label {label:?}"),
    )
}

fn check_model(model: &ModelSpec) -> Result<(), PlanError> {
    let ModelSpec::Mlp { hidden } = model else { return Ok(()) };
    let fits = (1..=16).contains(&hidden.len()) && hidden.iter().all(|w| (1..=65_536).contains(w));
    check(fits, "model.hidden", format!("{hidden:?}"), "1 to 16 widths, each 1 to 65536")
}

fn check_train(train: &TrainSpec) -> Result<(), PlanError> {
    let rate = train.learning_rate;
    check((1..=ROUNDS_MAX).contains(&train.rounds), "train.rounds", train.rounds, format!("1 to {ROUNDS_MAX}"))?;
    check((1..=1000).contains(&train.local_epochs), "train.local_epochs", train.local_epochs, "1 to 1000")?;
    check(train.batch_size != BatchSize::Rows(0), "train.batch_size", 0, "\"full\" or a whole number of at least 1")?;
    check(rate.is_finite() && rate > 0.0, "train.learning_rate", rate, "a number above 0")?;
    check((0.0..1.0).contains(&train.momentum), "train.momentum", train.momentum, "at least 0 and below 1")
}

fn check_rounds(rounds: &RoundsSpec) -> Result<(), PlanError> {
    let share = |value: f64| value > 0.0 && value <= 1.0;
    let workers = rounds.min_workers.unwrap_or(1);
    check((1..=UPDATES_MAX).contains(&workers), "rounds.min_workers", workers, format!("1 to {UPDATES_MAX}"))?;
    check(share(rounds.fraction), "rounds.fraction", rounds.fraction, "above 0 and at most 1")?;
    let over = rounds.over_select;
    check((0.0..=1.0).contains(&over), "rounds.over_select", over, "a number from 0 to 1")?;
    check(share(rounds.quorum), "rounds.quorum", rounds.quorum, "above 0 and at most 1")?;
    let deadline = rounds.deadline.unwrap_or(Duration::from_secs(60));
    let fits = (Duration::from_secs(1)..=Duration::from_secs(7 * 24 * 3600)).contains(&deadline);
    check(fits, "rounds.deadline_s", deadline.as_secs_f64(), "1 to 604800 seconds")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn plan(change: impl FnOnce(&mut LearningPlan, &mut RoundsSpec)) -> Result<Plan, PlanError> {
        let (mut learning, mut rounds) = (LearningPlan::default(), RoundsSpec::default());
        change(&mut learning, &mut rounds);
        Plan::new(learning, rounds)
    }

    #[test]
    fn more_rounds_are_the_same_plan_and_another_rate_is_not() {
        let hash = plan(|_, _| ()).unwrap().hash();
        assert_eq!(plan(|l, r| (l.train.rounds, r.quorum) = (99, 1.0)).unwrap().hash(), hash);
        assert_ne!(plan(|l, _| l.train.learning_rate = 0.1).unwrap().hash(), hash);
        assert_ne!(plan(|l, _| l.model = ModelSpec::Linear).unwrap().hash(), hash);
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let key = |change: fn(&mut LearningPlan, &mut RoundsSpec)| plan(change).unwrap_err().key;
        assert_eq!(key(|_, r| r.quorum = 1.5), "rounds.quorum");
        assert_eq!(key(|_, r| r.fraction = 0.0), "rounds.fraction");
        assert_eq!(key(|_, r| r.fraction = f64::NAN), "rounds.fraction");
        assert_eq!(key(|_, r| r.over_select = -0.1), "rounds.over_select");
        assert_eq!(key(|_, r| r.over_select = f64::NAN), "rounds.over_select");
        assert_eq!(key(|_, r| r.min_workers = Some(0)), "rounds.min_workers");
        assert_eq!(key(|_, r| r.deadline = Some(Duration::ZERO)), "rounds.deadline_s");
        assert_eq!(key(|l, _| l.train.batch_size = BatchSize::Rows(0)), "train.batch_size");
        assert_eq!(key(|l, _| l.train.learning_rate = f64::INFINITY), "train.learning_rate");
        assert_eq!(key(|l, _| l.train.momentum = 1.0), "train.momentum");
        assert_eq!(key(|l, _| l.model = ModelSpec::Mlp { hidden: vec![] }), "model.hidden");
        assert_eq!(key(|l, _| l.data.validation_fraction = 1.0), "data.validation_fraction");
        assert_eq!(key(|l, _| (l.data.label, l.data.drop) = (Some("y".into()), vec!["y".into()])), "data.drop");
    }
}
