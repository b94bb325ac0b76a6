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
use crate::rivals::Rival;
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
    let started = bench.rivals.as_ref().context("the rivals are not installed: `make bench-rivals` does it");
    let mut rival = started.and_then(|rivals| rivals.start("torch_step", &[]));
    if let Err(error) = &rival {
        report.missing(LINE, "a training step beside PyTorch", &format!("{error:#}"));
    }
    let peak = Samples::from((0..bench.repetitions).map(|_| peak()).collect::<Vec<_>>());
    for (sizes, batch, aim) in SHAPES {
        let task = Task::new(sizes, batch)?;
        let measured = match &mut rival {
            Ok(rival) => beside(bench, &task, rival, aim, peak.median()),
            Err(_) => alone(bench, &task),
        };
        match measured {
            Ok(measure) => report.add(measure),
            Err(error) => report.missing(LINE, &task.name(), &format!("{error:#}")),
        }
    }
    report.add(gradients()?);
    Ok(())
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

fn beside(bench: &Bench, task: &Task, rival: &mut Rival, aim: f64, peak: f64) -> Result<Measure> {
    let epochs = task.epochs()?;
    let request = json!({ "sizes": task.sizes, "batch": task.batch, "seconds": SAMPLE_S });
    let mut how = String::new();
    let (ours, theirs) = alternate(
        bench.repetitions,
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

fn alone(bench: &Bench, task: &Task) -> Result<Measure> {
    let epochs = task.epochs()?;
    let samples: Vec<f64> = (0..bench.repetitions).map(|_| task.seconds_a_step(epochs)).collect::<Result<_>>()?;
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
