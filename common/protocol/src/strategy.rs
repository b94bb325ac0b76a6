//! The server step: what becomes of the model when the mean of a round is known.
//!
//! - `federated` with FedAvg: `w ← w + mean` (McMahan et al. 2017, algorithm 1, on deltas instead of weights).
//! - `gradient`: SGD with momentum, `v ← m · v + mean`, `w ← w - rate · v`, as PyTorch and candle write it. The
//!   velocity `v` is the server's state and stands in the checkpoint.
//! - `central` has no mean and no step: the coordinator trains on the rows.
//!
//! All in `f64` with + − × only, rounded once to the `f32` that is kept: the same on every machine. Either the whole
//! step is taken or none of it.
//!
//! Worked example: rate 0.1, momentum 0.9, `w = 1`, and twice the mean 2 give `v = 2`, `w = 0.8`, then `v = 3.8`,
//! `w = 0.42`.

use crate::layout;
use crate::plan::{LearningPlan, Mode, Strategy};

/// What the server step keeps from round to round: for SGD with momentum the velocity, else nothing.
#[derive(Clone, PartialEq)]
pub struct ServerState {
    /// One for each parameter, or none.
    velocity: Vec<f32>,
}

/// Bytes that are not the state of this plan's step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Another length than the plan and the model ask for.
    #[error("the server's state has {got} bytes, expected {expected}")]
    Length {
        /// How many there are.
        got: usize,
        /// How many there should be.
        expected: usize,
    },
    /// No step leaves such a number.
    #[error("the server's state holds a number that is not finite")]
    NotFinite,
}

/// Why no step was taken. Model and state are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// A parameter or its velocity would leave the range of `f32`: training diverges.
    #[error("the server step gives a number that is not finite: lower train.learning_rate")]
    NotFinite,
    /// Model, mean and state are not of one size.
    #[error("the {what} has {got} numbers, the model has {expected}")]
    Length {
        /// Which of them.
        what: &'static str,
        /// How many it has.
        got: usize,
        /// How many the model has.
        expected: usize,
    },
    /// The mode is `central`.
    #[error("there is no server step in central mode")]
    NoStep,
}

impl ServerState {
    /// The state before the first round.
    #[must_use]
    pub fn new(learning: &LearningPlan, parameters: usize) -> Self {
        Self { velocity: vec![0.0; velocities(learning, parameters)] }
    }

    /// The state as it stands in a checkpoint: little-endian `f32`, in layout order.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        layout::to_bytes(&self.velocity)
    }

    /// The state that [`ServerState::to_bytes`] gave, for the same plan and model.
    ///
    /// # Errors
    /// If the length is another, or a number is not finite.
    pub fn from_bytes(learning: &LearningPlan, parameters: usize, raw: &[u8]) -> Result<Self, StateError> {
        let (got, expected) = (raw.len(), velocities(learning, parameters).saturating_mul(4));
        if got != expected {
            return Err(StateError::Length { got, expected });
        }
        let velocity = layout::from_bytes(raw).ok_or(StateError::Length { got, expected })?;
        if velocity.iter().all(|v| v.is_finite()) { Ok(Self { velocity }) } else { Err(StateError::NotFinite) }
    }
}

/// Without the numbers: they say what the model says.
impl core::fmt::Debug for ServerState {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("ServerState").field("velocities", &self.velocity.len()).finish()
    }
}

/// How many velocities the step of `learning` keeps for so many parameters.
fn velocities(learning: &LearningPlan, parameters: usize) -> usize {
    let train = &learning.train;
    if train.mode == Mode::Gradient && train.momentum != 0.0 { parameters } else { 0 }
}

/// Takes one step: `model`, raw little-endian `f32` in layout order, becomes the next one, in place. No mean is larger than
/// `mean_max`, which may be infinite.
///
/// # Errors
/// If a result is not finite, sizes differ, or the mode has no step. Nothing is changed then.
pub fn step(
    learning: &LearningPlan,
    state: &mut ServerState,
    model: &mut [[u8; 4]],
    mean: impl ExactSizeIterator<Item = f64> + Clone,
    mean_max: f64,
) -> Result<(), StepError> {
    let train = &learning.train;
    check_length("mean", mean.len(), model.len())?;
    match (train.mode, learning.strategy) {
        (Mode::Federated, Strategy::FedAvg) => apply(model, mean, mean_max, |w, mean| w + mean),
        (Mode::Gradient, _) if train.momentum == 0.0 => {
            apply(model, mean, train.learning_rate * mean_max, |w, mean| w - train.learning_rate * mean)
        }
        (Mode::Gradient, _) => descend(train.learning_rate, train.momentum, &mut state.velocity, model, mean),
        (Mode::Central, _) => Err(StepError::NoStep),
    }
}

/// `w ← next(w, mean)`, which is at most `reach` away from `w`. Where that cannot leave the range of `f32`, no result is looked
/// at before it is taken.
fn apply(
    model: &mut [[u8; 4]],
    mean: impl Iterator<Item = f64> + Clone,
    reach: f64,
    next: impl Fn(f64, f64) -> f64,
) -> Result<(), StepError> {
    let stepped = |w: [u8; 4], mean: f64| to_f32(next(f64::from(f32::from_le_bytes(w)), mean));
    let in_range = largest(model) + reach < f64::from(f32::MAX / 2.0);
    if !in_range {
        check_finite(model.iter().zip(mean.clone()).map(|(&w, mean)| stepped(w, mean)))?;
    }
    for (w, mean) in model.iter_mut().zip(mean) {
        *w = stepped(*w, mean).to_le_bytes();
    }
    Ok(())
}

/// SGD with momentum: `v ← momentum · v + mean`, `w ← w - rate · v`.
fn descend(
    rate: f64,
    momentum: f64,
    velocity: &mut [f32],
    model: &mut [[u8; 4]],
    mean: impl Iterator<Item = f64> + Clone,
) -> Result<(), StepError> {
    check_length("server's state", velocity.len(), model.len())?;
    let stepped = |w: [u8; 4], v: f32, mean: f64| {
        let v = momentum * f64::from(v) + mean;
        (to_f32(f64::from(f32::from_le_bytes(w)) - rate * v), to_f32(v))
    };
    let before = model.iter().zip(velocity.iter()).zip(mean.clone());
    check_finite(before.flat_map(|((&w, &v), mean)| <[f32; 2]>::from(stepped(w, v, mean))))?;
    for ((w, v), mean) in model.iter_mut().zip(velocity).zip(mean) {
        let next;
        (next, *v) = stepped(*w, *v, mean);
        *w = next.to_le_bytes();
    }
    Ok(())
}

/// The largest magnitude; infinite or NaN if a number is.
fn largest(model: &[[u8; 4]]) -> f64 {
    // Bits of magnitudes are in the order of what they mean, NaN last.
    let bits = model.iter().fold(0, |most: u32, w| most.max(f32::from_le_bytes(*w).abs().to_bits()));
    f64::from(f32::from_bits(bits))
}

fn check_length(what: &'static str, got: usize, expected: usize) -> Result<(), StepError> {
    if got == expected { Ok(()) } else { Err(StepError::Length { what, got, expected }) }
}

/// Looks at all of them, whatever it finds: looking for the first would not vectorise.
fn check_finite(numbers: impl Iterator<Item = f32>) -> Result<(), StepError> {
    if numbers.fold(true, |all, x| all & x.is_finite()) { Ok(()) } else { Err(StepError::NotFinite) }
}

/// Rounds to the nearest; beyond the range of `f32` is infinite.
#[allow(clippy::cast_possible_truncation, reason = "the one rounding of a step")]
fn to_f32(x: f64) -> f32 {
    x as f32
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;
    use crate::ids::TaskId;
    use crate::sum::{Ring, Sum, Verifier};

    fn plan(mode: Mode, rate: f64, momentum: f64) -> LearningPlan {
        let mut learning = LearningPlan::default();
        (learning.train.mode, learning.train.learning_rate, learning.train.momentum) = (mode, rate, momentum);
        learning
    }

    fn stepped(learning: &LearningPlan, model: &[f32], means: &[&[f64]]) -> Result<Vec<f32>, StepError> {
        let (mut state, mut model) = (ServerState::new(learning, model.len()), raw(model));
        means
            .iter()
            .try_for_each(|mean| step(learning, &mut state, &mut model, mean.iter().copied(), f64::INFINITY))?;
        Ok(model.into_iter().map(f32::from_le_bytes).collect())
    }

    fn raw(numbers: &[f32]) -> Vec<[u8; 4]> {
        numbers.iter().map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn fedavg_adds_the_mean() {
        let learning = plan(Mode::Federated, 0.5, 0.9);
        assert_eq!(stepped(&learning, &[1.0, -2.0], &[&[0.25, 0.5], &[1.0, 0.0]]), Ok(vec![2.25, -1.5]));
        assert!(ServerState::new(&learning, 2).to_bytes().is_empty());
    }

    #[test]
    fn a_gradient_step_without_momentum_goes_downhill_and_keeps_nothing() {
        let learning = plan(Mode::Gradient, 0.5, 0.0);
        assert_eq!(stepped(&learning, &[1.0, -2.0], &[&[2.0, -1.0], &[0.0, -1.0]]), Ok(vec![0.0, -1.0]));
        assert!(ServerState::new(&learning, 2).to_bytes().is_empty());
    }

    #[test]
    fn the_worked_example_of_momentum_holds() {
        let learning = plan(Mode::Gradient, 0.1, 0.9);
        let model = stepped(&learning, &[1.0], &[&[2.0], &[2.0]]).unwrap();
        assert!((model[0] - 0.42).abs() < 1e-7, "{model:?}");
    }

    #[test]
    fn a_step_is_taken_on_the_mean_of_a_sum() {
        let mut sum = Sum::new(Ring::weighted(), 1);
        for (task, weight, x) in [(1, 3, 0.5f32), (2, 1, -0.25)] {
            let raw = layout::to_bytes(&[x]);
            let mut verifier = Verifier::new(Ring::weighted(), 4, crate::ids::Hash::of(&raw));
            verifier.update(&raw).unwrap();
            let mut fold = sum.begin(TaskId(task), weight, &verifier.finish().unwrap()).unwrap();
            fold.add(&raw);
            fold.finish().unwrap();
        }
        let learning = plan(Mode::Federated, 0.5, 0.0);
        let (mut state, mut model) = (ServerState::new(&learning, 1), raw(&[1.0]));
        step(&learning, &mut state, &mut model, sum.mean().unwrap(), sum.mean_max()).unwrap();
        assert_eq!(model, raw(&[1.3125]));
    }

    #[test]
    fn a_step_out_of_range_is_refused_whole() {
        let learning = plan(Mode::Gradient, 1e30, 0.5);
        let mut state = ServerState::new(&learning, 2);
        let mut model = raw(&[1.0, 1.0]);
        step(&learning, &mut state, &mut model, [1.0, 1.0].into_iter(), f64::INFINITY).unwrap();
        let before = (state.clone(), model.clone());
        for bad in [[0.0, 1e30], [f64::NAN, 0.0], [0.0, f64::INFINITY], [0.0, -1e39]] {
            assert_eq!(
                step(&learning, &mut state, &mut model, bad.into_iter(), f64::INFINITY),
                Err(StepError::NotFinite)
            );
            assert_eq!((state.clone(), model.clone()), before);
        }
        let fedavg = plan(Mode::Federated, 0.5, 0.0);
        for first in [f32::MAX, f32::NEG_INFINITY, f32::NAN] {
            for mean_max in [1e38, f64::INFINITY] {
                let mut model = raw(&[first, 0.0]);
                let stepped = step(&fedavg, &mut state, &mut model, [1e38, 1.0].into_iter(), mean_max);
                assert_eq!((stepped, model), (Err(StepError::NotFinite), raw(&[first, 0.0])));
            }
        }
    }

    #[test]
    fn a_bound_of_the_means_changes_no_bit() {
        let fedavg = plan(Mode::Federated, 0.5, 0.0);
        let (start, mean) = (raw(&[1.5, -0.0, -3e38, 1e-45]), [0.1, 0.0, 1e30, -0.1]);
        let next = |mean_max: f64| {
            let (mut state, mut model) = (ServerState::new(&fedavg, 4), start.clone());
            step(&fedavg, &mut state, &mut model, mean.into_iter(), mean_max).map(|()| model)
        };
        assert_eq!(next(1e30), next(f64::INFINITY));
        assert!(next(1e30).is_ok());
    }

    #[test]
    fn a_velocity_out_of_range_is_refused_although_the_parameter_is_not() {
        let learning = plan(Mode::Gradient, 1e-30, 0.5);
        assert_eq!(stepped(&learning, &[1.0], &[&[1e39]]), Err(StepError::NotFinite));
    }

    #[test]
    fn sizes_that_differ_are_refused_by_name() {
        let learning = plan(Mode::Gradient, 0.1, 0.9);
        let wrong = |what, got| Err(StepError::Length { what, got, expected: 2 });
        let mut model = raw(&[0.0, 0.0]);
        let mut state = ServerState::new(&learning, 3);
        assert_eq!(step(&learning, &mut state, &mut model, [0.0].into_iter(), f64::INFINITY), wrong("mean", 1));
        assert_eq!(
            step(&learning, &mut state, &mut model, [0.0; 2].into_iter(), f64::INFINITY),
            wrong("server's state", 3)
        );
        assert_eq!(stepped(&plan(Mode::Central, 0.1, 0.0), &[0.0], &[&[0.0]]), Err(StepError::NoStep));
    }

    #[test]
    fn a_state_of_another_size_or_with_a_hole_is_refused() {
        let learning = plan(Mode::Gradient, 0.1, 0.9);
        let read = |raw: &[u8]| ServerState::from_bytes(&learning, 2, raw).unwrap_err();
        assert_eq!(read(&[0; 7]), StateError::Length { got: 7, expected: 8 });
        assert_eq!(read(&[0; 12]), StateError::Length { got: 12, expected: 8 });
        assert_eq!(read(&layout::to_bytes(&[0.0, f32::NAN])), StateError::NotFinite);
        let fedavg = plan(Mode::Federated, 0.1, 0.9);
        assert!(ServerState::from_bytes(&fedavg, 2, &[0; 8]).is_err());
        assert_eq!(ServerState::from_bytes(&fedavg, 2, &[]), Ok(ServerState::new(&fedavg, 2)));
    }

    proptest! {
        #[test]
        fn a_restart_between_any_two_steps_changes_no_bit(
            means in prop::collection::vec(prop::collection::vec(-100.0f64..100.0, 3), 1..8),
            momentum in 0.0f64..1.0,
        ) {
            let learning = plan(Mode::Gradient, 0.1, momentum);
            let (mut model, mut again) = (raw(&[1.0, -0.5, 0.0]), raw(&[1.0, -0.5, 0.0]));
            let mut state = ServerState::new(&learning, 3);
            let mut checkpoint = state.to_bytes();
            for mean in &means {
                step(&learning, &mut state, &mut model, mean.iter().copied(), f64::INFINITY).unwrap();
                let mut restored = ServerState::from_bytes(&learning, 3, &checkpoint).unwrap();
                step(&learning, &mut restored, &mut again, mean.iter().copied(), f64::INFINITY).unwrap();
                checkpoint = restored.to_bytes();
                prop_assert_eq!(&model, &again);
                prop_assert_eq!(state.to_bytes(), checkpoint.clone());
            }
        }
    }
}
