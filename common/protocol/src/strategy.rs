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
use crate::sum::MeanPart;

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
    let rule = Rule::of(learning)?;
    check_length("mean", mean.len(), model.len())?;
    rule.check_state(state, model.len())?;
    rule.check(model, &state.velocity, mean.clone(), mean_max)?;
    rule.take(model, &mut state.velocity, mean);
    Ok(())
}

/// One step in parts that may be looked at, and then taken, at the same time: `means` are those of [`Sum::drain`], in order,
/// and `mean_max` is [`Sum::mean_max`]. It is a step if all parts are taken, and none before all were found good.
///
/// # Errors
/// If sizes differ, or the mode has no step.
///
/// [`Sum::drain`]: crate::sum::Sum::drain
/// [`Sum::mean_max`]: crate::sum::Sum::mean_max
pub fn step_in_parts<'a>(
    learning: &LearningPlan,
    state: &'a mut ServerState,
    model: &'a mut [[u8; 4]],
    means: impl Iterator<Item = MeanPart<'a>>,
    mean_max: f64,
) -> Result<Vec<StepPart<'a>>, StepError> {
    let rule = Rule::of(learning)?;
    let means: Vec<MeanPart<'a>> = means.collect();
    check_length("mean", means.iter().map(MeanPart::parameters).sum(), model.len())?;
    rule.check_state(state, model.len())?;
    let (mut model, mut velocity) = (model, state.velocity.as_mut_slice());
    let parts = means.into_iter().map(|mean| {
        let (model, velocity) = (first(&mut model, mean.parameters()), first(&mut velocity, mean.parameters()));
        StepPart { rule, model, velocity, mean, mean_max }
    });
    Ok(parts.collect())
}

/// Takes the first `count` off, or all that there are.
fn first<'a, T>(rest: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    let all = std::mem::take(rest);
    let (first, behind) = all.split_at_mut(count.min(all.len()));
    *rest = behind;
    first
}

/// Some parameters of a step.
pub struct StepPart<'a> {
    rule: Rule,
    model: &'a mut [[u8; 4]],
    velocity: &'a mut [f32],
    mean: MeanPart<'a>,
    mean_max: f64,
}

/// Without the numbers.
impl core::fmt::Debug for StepPart<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("StepPart").field("parameters", &self.model.len()).finish_non_exhaustive()
    }
}

/// Numbers that are in the cache while they are stepped and their cells cleared.
const IN_CACHE: usize = 4096;

impl StepPart<'_> {
    /// Looks whether it can be taken.
    ///
    /// # Errors
    /// If a result is not finite.
    pub fn check(&self) -> Result<(), StepError> {
        self.rule.check(self.model, self.velocity, self.mean.means(), self.mean_max)
    }

    /// Takes it, and clears its cells of the sum.
    pub fn take(self) {
        let Self { rule, model, velocity, mut mean, .. } = self;
        let mut velocity = velocity.chunks_mut(IN_CACHE);
        for (model, mut mean) in model.chunks_mut(IN_CACHE).zip(mean.blocks(IN_CACHE)) {
            rule.take(model, velocity.next().unwrap_or_default(), mean.means());
            mean.clear();
        }
    }
}

/// What becomes of a parameter.
#[derive(Clone, Copy, Debug)]
enum Rule {
    /// `w ← w + mean`.
    Add,
    /// `w ← w - rate · mean`.
    Descend { rate: f64 },
    /// `v ← momentum · v + mean`, `w ← w - rate · v`.
    Momentum { rate: f64, momentum: f64 },
}

impl Rule {
    fn of(learning: &LearningPlan) -> Result<Self, StepError> {
        let (rate, momentum) = (learning.train.learning_rate, learning.train.momentum);
        match (learning.train.mode, learning.strategy) {
            (Mode::Federated, Strategy::FedAvg) => Ok(Self::Add),
            (Mode::Gradient, _) if momentum == 0.0 => Ok(Self::Descend { rate }),
            (Mode::Gradient, _) => Ok(Self::Momentum { rate, momentum }),
            (Mode::Central, _) => Err(StepError::NoStep),
        }
    }

    fn check_state(self, state: &ServerState, parameters: usize) -> Result<(), StepError> {
        match self {
            Self::Momentum { .. } => check_length("server's state", state.velocity.len(), parameters),
            Self::Add | Self::Descend { .. } => Ok(()),
        }
    }

    /// Whether all results are finite. Where the model is so far within the range of `f32` that none can leave it, they are not
    /// made for that.
    fn check(
        self,
        model: &[[u8; 4]],
        velocity: &[f32],
        mean: impl Iterator<Item = f64>,
        mean_max: f64,
    ) -> Result<(), StepError> {
        let in_range = |reach: f64| largest(model) + reach < f64::from(f32::MAX / 2.0);
        match self {
            Self::Add if in_range(mean_max) => Ok(()),
            Self::Descend { rate } if in_range(rate * mean_max) => Ok(()),
            Self::Add => check_finite(model.iter().zip(mean).map(|(&w, mean)| add(w, mean))),
            Self::Descend { rate } => check_finite(model.iter().zip(mean).map(|(&w, mean)| descend(w, rate, mean))),
            Self::Momentum { rate, momentum } => {
                let all = model.iter().zip(velocity).zip(mean);
                check_finite(all.flat_map(|((&w, &v), mean)| <[f32; 2]>::from(roll(w, v, rate, momentum, mean))))
            }
        }
    }

    fn take(self, model: &mut [[u8; 4]], velocity: &mut [f32], mean: impl Iterator<Item = f64>) {
        match self {
            Self::Add => model.iter_mut().zip(mean).for_each(|(w, mean)| *w = add(*w, mean).to_le_bytes()),
            Self::Descend { rate } => {
                model.iter_mut().zip(mean).for_each(|(w, mean)| *w = descend(*w, rate, mean).to_le_bytes());
            }
            Self::Momentum { rate, momentum } => {
                for ((w, v), mean) in model.iter_mut().zip(velocity).zip(mean) {
                    let next;
                    (next, *v) = roll(*w, *v, rate, momentum, mean);
                    *w = next.to_le_bytes();
                }
            }
        }
    }
}

fn add(w: [u8; 4], mean: f64) -> f32 {
    to_f32(f64::from(f32::from_le_bytes(w)) + mean)
}

fn descend(w: [u8; 4], rate: f64, mean: f64) -> f32 {
    to_f32(f64::from(f32::from_le_bytes(w)) - rate * mean)
}

/// A weight and its velocity.
fn roll(w: [u8; 4], v: f32, rate: f64, momentum: f64, mean: f64) -> (f32, f32) {
    let v = momentum * f64::from(v) + mean;
    (to_f32(f64::from(f32::from_le_bytes(w)) - rate * v), to_f32(v))
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
    fn a_step_in_parts_is_the_same_step_and_leaves_the_sum_empty() {
        const COUNT: usize = 10_000;
        let numbers: Vec<f32> = (0..COUNT).map(|at| at as f32 * 0.01 - 40.0).collect();
        let update = layout::to_bytes(&numbers.iter().map(|x| x * 1e-3).collect::<Vec<_>>());
        let mut verifier = Verifier::new(Ring::weighted(), update.len() as u64, crate::ids::Hash::of(&update));
        verifier.update(&update).unwrap();
        let verified = verifier.finish().unwrap();
        for learning in
            [plan(Mode::Federated, 0.0, 0.0), plan(Mode::Gradient, 0.1, 0.0), plan(Mode::Gradient, 0.1, 0.9)]
        {
            for count in [1, 2, 3, 100] {
                let mut sum = Sum::new(Ring::weighted(), COUNT);
                let empty = sum.clone();
                let mut fold = sum.begin(TaskId(1), 3, &verified).unwrap();
                fold.add(&update);
                fold.finish().unwrap();
                let (mut state, mut model) = (ServerState::new(&learning, COUNT), raw(&numbers));
                let (mut expected_state, mut expected) = (state.clone(), model.clone());
                step(&learning, &mut expected_state, &mut expected, sum.mean().unwrap(), sum.mean_max()).unwrap();

                let (mean_max, means) = (sum.mean_max(), sum.drain(count).unwrap());
                let parts = step_in_parts(&learning, &mut state, &mut model, means, mean_max).unwrap();
                assert!(parts.len() <= count && (count == 1 || parts.len() > 1));
                assert!(parts.iter().all(|part| part.check().is_ok()));
                parts.into_iter().rev().for_each(StepPart::take);
                sum.drained();
                assert!(model == expected && state == expected_state && sum == empty, "{count} parts, {learning:?}");
            }
        }
    }

    #[test]
    fn a_part_that_cannot_be_taken_says_so_before_any_is() {
        let learning = plan(Mode::Gradient, 1e38, 0.0);
        let mut sum = Sum::new(Ring::weighted(), 3000);
        let update = layout::to_bytes(&[vec![0.0; 2500], vec![10.0; 500]].concat());
        let mut verifier = Verifier::new(Ring::weighted(), update.len() as u64, crate::ids::Hash::of(&update));
        verifier.update(&update).unwrap();
        let mut fold = sum.begin(TaskId(1), 1, &verifier.finish().unwrap()).unwrap();
        fold.add(&update);
        fold.finish().unwrap();
        let (mut state, mut model) = (ServerState::new(&learning, 3000), raw(&[1.0; 3000]));
        let (mean_max, means) = (sum.mean_max(), sum.drain(3).unwrap());
        let parts = step_in_parts(&learning, &mut state, &mut model, means, mean_max).unwrap();
        let checked: Vec<_> = parts.iter().map(StepPart::check).collect();
        assert_eq!(checked, [Ok(()), Ok(()), Err(StepError::NotFinite)]);
        assert!(sum.is_torn(), "nobody takes a mean of it until it is cleared");
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
