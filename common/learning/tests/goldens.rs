//! Loss, gradient and SGD steps of both kinds of model against PyTorch's numbers (`goldens/gradients.py` made them).

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use protocol::layout::to_bytes;
use protocol::plan::{BatchSize, ModelSpec, TrainSpec};
use serde::Deserialize;
use tributary_learning::{ColumnSchema, Encoding, Network, Rows, Schema, Target, TaskKey};

#[derive(Deserialize)]
struct Goldens {
    learning_rate: f64,
    momentum: f64,
    steps: u32,
    cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    inputs: usize,
    hidden: Vec<u32>,
    outputs: usize,
    x: Vec<f32>,
    y: Vec<f32>,
    weights: Vec<f32>,
    loss: f64,
    gradient: Vec<f64>,
    stepped: Vec<f64>,
}

impl Case {
    fn schema(&self) -> Schema {
        let numeric = Encoding::Numeric { mean: 0.0, deviation: 1.0, missing: false };
        let target = match self.outputs {
            1 => Target::Regression { mean: 0.0, deviation: 1.0 },
            classes => Target::Classification { classes: (0..classes).map(|c| c.to_string()).collect() },
        };
        let columns = (0..self.inputs).map(|i| ColumnSchema { name: format!("x{i}"), encoding: numeric.clone() });
        Schema { label: "y".into(), target, columns: columns.collect() }
    }

    fn rows(&self) -> Rows {
        let rows = self.x.chunks_exact(self.inputs).zip(&self.y);
        let values: Vec<f32> = rows.flat_map(|(x, y)| x.iter().chain([y]).copied()).collect();
        let mut rows = Rows::new(&self.schema());
        rows.append(&to_bytes(&values), &self.schema()).unwrap();
        rows
    }

    fn network(&self) -> Network {
        let spec = match self.hidden.as_slice() {
            [] => ModelSpec::Linear,
            hidden => ModelSpec::Mlp { hidden: hidden.to_vec() },
        };
        Network::new(&spec, &self.schema()).unwrap()
    }
}

fn assert_near(name: &str, got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (at, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let difference = (f64::from(got) - expected).abs();
        assert!(difference <= 1e-6 + 1e-5 * expected.abs(), "{name}[{at}]: {got}, PyTorch has {expected}");
    }
}

#[test]
fn loss_gradient_and_steps_are_pytorchs() {
    let goldens: Goldens = serde_json::from_str(include_str!("../goldens/gradients.json")).unwrap();
    let spec = TrainSpec {
        local_epochs: goldens.steps,
        batch_size: BatchSize::Full,
        learning_rate: goldens.learning_rate,
        momentum: goldens.momentum,
        ..TrainSpec::default()
    };
    let key = TaskKey { round: 1, name: "w" };
    assert_eq!(goldens.cases.len(), 6);
    for (name, case) in goldens.cases {
        let (network, rows) = (case.network(), case.rows());
        let on = &mut |_| ControlFlow::Continue(());
        let gradient = network.gradient(&case.weights, &rows, &spec, key, on).unwrap();
        assert!((gradient.loss - case.loss).abs() < 1e-6, "{name}: loss {}, PyTorch has {}", gradient.loss, case.loss);
        assert_near(&format!("{name}.gradient"), &gradient.values, &case.gradient);
        let trained = network.train(&case.weights, &rows, &spec, key, on).unwrap();
        assert_near(&format!("{name}.stepped"), &trained.weights, &case.stepped);
    }
}
