//! Line 6: one training step of a dense network, beside PyTorch at its best thread count, and its gradient beside that
//! of candle's autograd.
//!
//! Ours is `Network::train` itself: what a task costs before its first step and after its last one, the drawing of the order
//! and the gathering of a batch's rows are all in. PyTorch has its batch before the clock starts, and takes the same one in
//! each step; of its ways to follow a gradient, and of its thread counts, the rival takes what is fastest for each shape.

use std::ops::ControlFlow;
use std::thread::available_parallelism;
use std::time::Instant;

use anyhow::{Context as _, Result};
use learning::{ColumnSchema, Encoding, Network, Rows, Schema, Target, TaskKey};
use protocol::draw::Draw;
use protocol::layout::to_bytes;
use protocol::plan::{BatchSize, ModelSpec, TrainSpec};
use serde_json::json;

use crate::figures::Samples;
use crate::report::{Aim, Measure, Report};
use crate::rivals::{Rival, Rivals};
use crate::sides::alternate;
use crate::suite::Bench;

const LINE: u8 = 6;
const KEY: TaskKey<'_> = TaskKey { round: 1, name: "bench" };
/// About how long one sample of one side takes.
const SAMPLE_S: f64 = 0.25;
/// Batches of an epoch.
const BATCHES: usize = 4;

/// Inputs, hidden layers and outputs; rows of a batch; what is aimed at.
const SHAPES: [(&[usize], usize, f64); 6] = [
    (&[13, 64, 32, 2], 32, 5.0),
    (&[30, 64, 2], 16, 5.0),
    (&[784, 200, 200, 10], 10, 1.4),
    (&[784, 200, 200, 10], 64, 1.4),
    (&[784, 256, 128, 10], 256, 1.4),
    (&[784, 1024, 1024, 10], 128, 1.4),
];

/// Measures the line.
pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let peak = Samples::from((0..bench.repetitions).map(|_| peak()).collect::<Vec<_>>()).median();
    let mut sides = Sides { repetitions: bench.repetitions, rivals: bench.rivals.as_ref(), rival: None, peak };
    sides.start(report);
    for (sizes, batch, aim) in SHAPES {
        sides.measure(&Task::new(sizes, batch)?, aim, report);
    }
    report.add(gradients()?);
    Ok(())
}

/// Ours, and the rival that is measured in turn with it, if there is one.
struct Sides<'a> {
    repetitions: usize,
    rivals: Option<&'a Rivals>,
    rival: Option<Rival>,
    /// What one core can do at most, in GFLOP/s.
    peak: f64,
}

impl Sides<'_> {
    fn start(&mut self, report: &mut Report) {
        let rivals = self.rivals.context("the rivals are not installed: `make bench-rivals` does it");
        let rival = rivals.and_then(|rivals| rivals.start("torch_step", &[]));
        let missing = |error: &_| report.missing(LINE, "a training step beside PyTorch", &format!("{error:#}"));
        self.rival = rival.inspect_err(missing).ok();
    }

    /// Ours alone, if the rival breaks off. That one is not asked again, since it may still answer: the next shape has a new one.
    fn measure(&mut self, task: &Task, aim: f64, report: &mut Report) {
        match self.beside(task, aim) {
            Some(Ok(measure)) => return report.add(measure),
            Some(Err(error)) => {
                report.missing(LINE, &format!("{}, beside PyTorch", task.name()), &format!("{error:#}"));
                self.start(report);
            }
            None => {}
        }
        match alone(self.repetitions, task) {
            Ok(measure) => report.add(measure),
            Err(error) => report.missing(LINE, &task.name(), &format!("{error:#}")),
        }
    }

    fn beside(&mut self, task: &Task, aim: f64) -> Option<Result<Measure>> {
        let (repetitions, peak) = (self.repetitions, self.peak);
        self.rival.as_mut().map(|rival| beside(repetitions, task, rival, aim, peak))
    }
}

/// What one core can do at most, in GFLOP/s.
fn peak() -> f64 {
    let began = Instant::now();
    let (operations, sum) = learning::fused_multiply_adds(1_000_000);
    std::hint::black_box(sum);
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    let operations = operations as f64;
    operations / began.elapsed().as_secs_f64() / 1e9
}

/// A network and rows made up for it.
struct Task {
    sizes: &'static [usize],
    batch: usize,
    network: Network,
    rows: Rows,
    start: Vec<f32>,
}

impl Task {
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // numbers around 1, and ten classes
    fn new(sizes: &'static [usize], batch: usize) -> Result<Self> {
        let schema = schema(sizes);
        let hidden = sizes[1..sizes.len() - 1].iter().map(|&width| u32::try_from(width)).collect::<Result<_, _>>()?;
        let network = Network::new(&ModelSpec::Mlp { hidden }, &schema)?;
        let mut draw = Draw::new(7, "bench rows", 0, "");
        let mut values = Vec::new();
        for row in 0..batch * BATCHES {
            values.extend((0..sizes[0]).map(|_| (2.0 * draw.uniform() - 1.0) as f32));
            values.push((row % sizes[sizes.len() - 1]) as f32);
        }
        let mut rows = Rows::new(&schema);
        rows.append(&to_bytes(&values), &schema)?;
        let start = network.initial(7);
        let threads = available_parallelism().map_or(1, usize::from);
        Ok(Self { sizes, batch, network: network.with_threads(threads), rows, start })
    }

    fn name(&self) -> String {
        format!("a training step, {:?} / {}", self.sizes, self.batch)
    }

    /// The seconds of one step of a task with so many epochs.
    fn seconds_a_step(&self, epochs: u32) -> Result<f64> {
        let spec = TrainSpec {
            batch_size: BatchSize::Rows(u32::try_from(self.batch)?),
            local_epochs: epochs,
            learning_rate: 0.01,
            ..TrainSpec::default()
        };
        let began = Instant::now();
        let trained = self.network.train(&self.start, &self.rows, &spec, KEY, &mut |_| ControlFlow::Continue(()))?;
        #[allow(clippy::cast_precision_loss)] // some thousands
        Ok(began.elapsed().as_secs_f64() / trained.steps as f64)
    }

    /// Epochs that take about a sample's time.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // some thousands
    fn epochs(&self) -> Result<u32> {
        let step = self.seconds_a_step(1)?.min(self.seconds_a_step(4)?);
        Ok((SAMPLE_S / step / BATCHES as f64).ceil().max(1.0) as u32)
    }

    /// Multiplications and additions of a step; the first layer has no deltas to make.
    #[allow(clippy::cast_precision_loss)] // far below 2^53
    fn operations(&self) -> f64 {
        let layers = self.sizes.windows(2).enumerate();
        let a_row: usize = layers.map(|(at, widths)| if at == 0 { 4 } else { 6 } * widths[0] * widths[1]).sum();
        (self.batch * a_row) as f64
    }
}

fn schema(sizes: &[usize]) -> Schema {
    let encoding = Encoding::Numeric { mean: 0.0, deviation: 1.0, missing: false };
    let columns = (0..sizes[0]).map(|at| ColumnSchema { name: format!("x{at}"), encoding: encoding.clone() });
    let classes = (0..sizes[sizes.len() - 1]).map(|class| class.to_string()).collect();
    Schema { label: "y".to_owned(), target: Target::Classification { classes }, columns: columns.collect() }
}

fn beside(repetitions: usize, task: &Task, rival: &mut Rival, aim: f64, peak: f64) -> Result<Measure> {
    let epochs = task.epochs()?;
    let request = json!({ "sizes": task.sizes, "batch": task.batch, "seconds": SAMPLE_S });
    let mut how = String::new();
    let (ours, theirs) = alternate(
        repetitions,
        || task.seconds_a_step(epochs),
        || {
            let answer = rival.once(&request)?;
            how = format!("{} threads, {}", answer["threads"], answer["way"]);
            answer["seconds"].as_f64().with_context(|| format!("expected seconds, got {answer}"))
        },
    )?;
    let share = |samples: &Samples| 100.0 * task.operations() / samples.median() / 1e9 / peak;
    let reason = format!(
        "ours does {:.0} % and PyTorch ({how}) {:.0} % of the {peak:.0} GFLOP/s that one core does with nothing but fused \
         multiply-adds in registers",
        share(&ours),
        share(&theirs)
    );
    let ratio = theirs.with(&ours, |theirs, ours| theirs / ours);
    let micros = |samples: Samples| samples.map(|seconds| seconds * 1e6);
    Ok(Measure {
        line: LINE,
        name: task.name(),
        unit: "µs",
        ours: micros(ours),
        theirs: Some(("PyTorch", micros(theirs))),
        ratio,
        aim: Aim::AtLeast(aim),
        reason,
    })
}

fn alone(repetitions: usize, task: &Task) -> Result<Measure> {
    let epochs = task.epochs()?;
    let samples: Vec<f64> = (0..repetitions).map(|_| task.seconds_a_step(epochs)).collect::<Result<_>>()?;
    Ok(Measure {
        line: LINE,
        name: task.name(),
        unit: "µs",
        ours: Samples::from(samples).map(|seconds| seconds * 1e6),
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::None,
        reason: String::new(),
    })
}

/// The largest difference of a gradient and autograd's over all shapes, tensor by tensor, in parts of its size.
fn gradients() -> Result<Measure> {
    let mut largest = 0.0f64;
    for (sizes, batch, _) in SHAPES {
        let task = Task::new(sizes, batch)?;
        let spec = TrainSpec { batch_size: BatchSize::Full, ..TrainSpec::default() };
        let go_on = &mut |_| ControlFlow::Continue(());
        let ours = task.network.gradient(&task.start, &task.rows, &spec, KEY, go_on)?.values;
        let all: Vec<usize> = (0..task.rows.len()).collect();
        let theirs = task.network.gradient_by_autograd(&task.start, &task.rows, &all).values;
        let mut from = 0;
        for tensor in task.network.layout().tensors() {
            let len = tensor.shape.iter().map(|&width| width as usize).product::<usize>();
            let size = learning::norm(&theirs[from..from + len]);
            let pairs = ours[from..from + len].iter().zip(&theirs[from..from + len]);
            let difference: Vec<f32> = pairs.map(|(ours, theirs)| ours - theirs).collect();
            largest = largest.max(learning::norm(&difference) / size);
            from += len;
        }
    }
    Ok(Measure {
        line: LINE,
        name: "gradients against autograd's, largest difference, in millionths of a tensor's norm".to_owned(),
        unit: "ppm",
        ours: Samples::from(vec![largest * 1e6]),
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::AtMost(10.0),
        reason: "sums of another order".to_owned(),
    })
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_rival_that_breaks_off_leaves_ours_and_is_asked_again_for_the_next_shape() {
        let directory = tempfile::tempdir().unwrap();
        let python = directory.path().join("bin/python");
        fs::create_dir(directory.path().join("bin")).unwrap();
        // It answers twice, whatever it is asked, and then dies.
        let answer = r#"{"seconds": 0.5, "threads": 1, "way": "sgd"}"#;
        let program =
            format!("#!/bin/sh\nfor _ in 1 2; do read -r _; echo '{answer}'; done\necho 'out of memory' >&2\n");
        fs::write(&python, program).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        let rivals = Rivals::find(directory.path(), directory.path()).unwrap();
        let mut sides = Sides { repetitions: 2, rivals: Some(&rivals), rival: None, peak: 1.0 };
        let (task, mut report) = (Task::new(&[3, 2], 4).unwrap(), Report::default());

        sides.start(&mut report);
        sides.measure(&task, 1.0, &mut report);
        sides.repetitions = 1;
        sides.measure(&task, 1.0, &mut report);

        let (table, json) = (report.markdown(), report.json());
        assert!(table.contains("not measured: 6, a training step, [3, 2] / 4, beside PyTorch: "), "{table}");
        assert!(table.contains("out of memory"), "{table}");
        assert!(json[0]["ours"].is_f64() && json[0]["theirs"].is_null(), "{json}");
        assert!(json[1]["ours"].is_f64() && json[1]["theirs"] == 500_000.0, "{json}");
    }
}
