//! The training kernel against candle's autograd, on every shape that it has a path of its own for.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, clippy::cast_possible_truncation)]

use std::ops::ControlFlow;

use protocol::draw::Draw;
use protocol::layout::to_bytes;
use protocol::pages::Numbers;
use protocol::plan::{BatchSize, ModelSpec, TrainSpec};
use tributary_learning::{ColumnSchema, Encoding, Gradient, Network, Rows, Schema, Target, TaskKey};

const KEY: TaskKey<'_> = TaskKey { round: 1, name: "w" };

/// A network between made-up rows and targets.
struct Case {
    network: Network,
    rows: Rows,
    weights: Vec<f32>,
}

impl Case {
    /// `sizes` are the widths from inputs to outputs; one output is a number.
    fn new(sizes: &[usize], rows: usize) -> Self {
        let (inputs, outputs) = (sizes[0], sizes[sizes.len() - 1]);
        let numeric = Encoding::Numeric { mean: 0.0, deviation: 1.0, missing: false };
        let columns = (0..inputs).map(|i| ColumnSchema { name: format!("x{i}"), encoding: numeric.clone() }).collect();
        let target = match outputs {
            1 => Target::Regression { mean: 0.0, deviation: 1.0 },
            classes => Target::Classification { classes: (0..classes).map(|c| c.to_string()).collect() },
        };
        let schema = Schema { label: "y".into(), target, columns };
        let hidden: Vec<u32> = sizes[1..sizes.len() - 1].iter().map(|&width| width.try_into().unwrap()).collect();
        let network = Network::new(&ModelSpec::Mlp { hidden }, &schema).unwrap();
        let mut draw = Draw::new(5, "test rows", 0, "");
        let mut values = Vec::new();
        for row in 0..rows {
            values.extend((0..inputs).map(|_| (2.0 * draw.uniform() - 1.0) as f32));
            values.push(if outputs == 1 { draw.uniform() as f32 } else { (row * 7 % outputs) as f32 });
        }
        let mut encoded = Rows::new(&schema);
        encoded.append(&to_bytes(&values), &schema).unwrap();
        // Biases too are not zero.
        let weights = network.initial(7).iter().map(|w| w + (0.2 * draw.uniform() - 0.1) as f32).collect();
        Self { network, rows: encoded, weights }
    }

    fn gradient(&self) -> Gradient {
        let spec = TrainSpec { batch_size: BatchSize::Full, ..TrainSpec::default() };
        self.network.gradient(&self.weights, &self.rows, &spec, KEY, &mut go_on).unwrap()
    }

    fn by_autograd(&self, weights: &[f32], picked: &[usize]) -> Gradient {
        self.network.gradient_by_autograd(weights, &self.rows, picked)
    }

    fn all(&self) -> Vec<usize> {
        (0..self.rows.len()).collect()
    }
}

fn go_on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The L2 norm of the difference, relative to that of what was expected, tensor by tensor; the largest.
fn apart(network: &Network, got: &[f32], expected: &[f32]) -> f64 {
    let mut from = 0;
    let mut largest = 0.0f64;
    for tensor in network.layout().tensors() {
        let len = tensor.shape.iter().map(|&n| n as usize).product::<usize>();
        let (got, expected) = (&got[from..from + len], &expected[from..from + len]);
        let difference: f64 = got.iter().zip(expected).map(|(g, e)| (f64::from(*g) - f64::from(*e)).powi(2)).sum();
        let size: f64 = expected.iter().map(|e| f64::from(*e).powi(2)).sum();
        largest = largest.max((difference / size).sqrt());
        from += len;
    }
    largest
}

#[test]
fn gradients_are_autograds_whatever_the_shape() {
    let shapes: &[(&[usize], usize)] = &[
        (&[13, 64, 32, 2], 32),
        (&[30, 64, 2], 16),
        (&[784, 200, 200, 10], 10),
        (&[784, 200, 200, 10], 64),
        (&[784, 256, 128, 10], 256),
        (&[784, 1024, 1024, 10], 128),
        (&[1, 1], 1),
        (&[1, 2], 3),
        (&[5, 3], 7),
        (&[7, 1, 1], 13),
        (&[31, 33, 17, 16, 15, 1], 11),
        (&[32, 48, 49, 47, 3], 97),
        (&[17, 16, 32, 100], 511),
        (&[17, 16, 32, 1], 513),
        (&[9, 40, 5], 1300),
    ];
    for &(sizes, rows) in shapes {
        let case = Case::new(sizes, rows);
        let (got, expected) = (case.gradient(), case.by_autograd(&case.weights, &case.all()));
        let apart = apart(&case.network, &got.values, &expected.values);
        assert!(apart <= 1e-5, "{sizes:?}, {rows} rows: {apart:e} apart");
        assert!(
            (got.loss - expected.loss).abs() <= 1e-5 * expected.loss.abs(),
            "{} is not {}",
            got.loss,
            expected.loss
        );
    }
}

#[test]
fn steps_follow_the_gradient_with_and_without_momentum_in_batches_that_do_not_divide_the_rows() {
    // One batch that fits a pass and a last one of 3 rows; one that takes two passes and a last one of 1.
    for (rows, batch) in [(23, 10), (1201, 600)] {
        for momentum in [0.0, 0.9] {
            let case = Case::new(&[12, 40, 18, 4], rows);
            let spec = TrainSpec {
                batch_size: BatchSize::Rows(batch),
                momentum,
                learning_rate: 0.1,
                local_epochs: 2,
                ..TrainSpec::default()
            };
            let trained = case.network.train(&case.weights, &case.rows, &spec, KEY, &mut go_on).unwrap();
            let (mut weights, mut velocity) = (case.weights.clone(), vec![0.0; case.weights.len()]);
            let (mut order, mut steps, mut loss) = (case.all(), 0, 0.0);
            let mut draw = Draw::new(spec.seed, "order of training rows", KEY.round, KEY.name);
            for _ in 0..2 {
                draw.shuffle(&mut order);
                for picked in order.chunks(batch as usize) {
                    let gradient = case.by_autograd(&weights, picked);
                    for ((w, v), g) in weights.iter_mut().zip(&mut velocity).zip(&*gradient.values) {
                        *v = momentum as f32 * *v + g;
                        *w -= 0.1 * *v;
                    }
                    steps += 1;
                    loss += gradient.loss * picked.len() as f64 / (2 * rows) as f64;
                }
            }
            assert_eq!(trained.steps, steps);
            assert!((trained.loss - loss).abs() <= 1e-5 * loss, "{} is not {loss}", trained.loss);
            let apart = apart(&case.network, &trained.weights, &weights);
            assert!(apart <= 1e-5, "batches of {batch}, momentum {momentum}: {apart:e} apart");
        }
    }
}

#[test]
fn the_bits_do_not_depend_on_the_number_of_threads() {
    // The last batch has 5 rows; of the last layer's one panel one thread has all.
    let case = Case::new(&[300, 200, 90, 3], 405);
    for (batch, momentum) in [(200, 0.0), (200, 0.9), (405, 0.0)] {
        let spec = TrainSpec { batch_size: BatchSize::Rows(batch), momentum, local_epochs: 3, ..TrainSpec::default() };
        let on = |threads| {
            let network = case.network.clone().with_threads(threads);
            (
                network.train(&case.weights, &case.rows, &spec, KEY, &mut go_on).unwrap(),
                network.gradient(&case.weights, &case.rows, &spec, KEY, &mut go_on).unwrap(),
            )
        };
        let one = on(1);
        for threads in [2, 3, 7] {
            assert!(on(threads) == one, "{threads} threads, batches of {batch}, momentum {momentum}");
        }
    }
}

#[test]
fn what_memory_held_before_is_in_no_bit_of_what_is_trained() {
    // Rows and columns that fill no panel, in runs that are long enough to be kept for the next.
    let case = Case::new(&[1001, 4510, 3], 8);
    let spec = TrainSpec { batch_size: BatchSize::Rows(4), ..TrainSpec::default() };
    let train = || case.network.train(&case.weights, &case.rows, &spec, KEY, &mut go_on).unwrap();
    let expected: Vec<u32> = train().weights.iter().map(|weight| weight.to_bits()).collect();
    for length in [1 << 20, 9 << 18, 18 << 18] {
        let mut held: Vec<_> = (0..4).map(|_| Numbers::<f32>::unset(length)).collect();
        held.iter_mut().for_each(|numbers| numbers.fill(f32::NAN));
    }
    assert!(train().weights.iter().map(|weight| weight.to_bits()).eq(expected));
}
