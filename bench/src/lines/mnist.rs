//! Line 7: MNIST to 97 % with McMahan's 2NN, through the released coordinator, two processes of fifty workers, QUIC.
//!
//! Each side is asked first how many rounds it needs from its own initial weights: it trains on, untimed, and after each
//! round the whole test set is looked at. Then exactly so many rounds are timed, from the first task to the last model,
//! on the same shards with the same learning rate and scaling. Ours makes them whole in each repetition, with a new
//! coordinator and new workers, whose start is not timed; a rival makes a share of its own rounds in each repetition, one
//! after another until all are made, and its seconds are those of the share scaled up.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use learning::{Dataset, Network, Rows, Schema, Table, TaskKey, merge};
use protocol::draw::Draw;
use protocol::evaluation::summarise;
use protocol::ids::Hash;
use protocol::layout::{Layout, from_bytes};
use protocol::plan::{BatchSize, DataSpec, ModelSpec, TrainSpec};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tributary_tests::home::{Next, Running};
use worker::OnPlain;
use worker::state::StatePlace;

use crate::figures::Samples;
use crate::home::{PATIENCE, Place};
use crate::report::{Aim, Measure, Report};
use crate::rivals::Rival;
use crate::suite::Bench;

const SHARDS: usize = 100;
const SHARD_ROWS: usize = 600;
const PIXELS: usize = 28 * 28;
const CHOSEN: usize = 10;
const PROCESSES: usize = 2;
const ACCURACY: f64 = 0.97;
/// McMahan et al. 2017, table 2, has 87 rounds for this network and these batches.
const ROUNDS_MAX: u32 = 150;
const LEARNING_RATE: f64 = 0.05;
const BATCH: u32 = 10;
const SEED: u64 = 7;
/// No repetition begins after so long, on a machine on which all of them would take too long.
const BUDGET: Duration = Duration::from_secs(240);
/// Rounds of training alone that are timed.
const ALONE_ROUNDS: u64 = 10;

/// Measures the line.
pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let Some(published) = &bench.mnist else {
        report.missing(7, "mnist", "MNIST's files are not given; --mnist names their directory");
        return Ok(());
    };
    let data = Data::unpack(published, bench.tmpfs()?)?;
    let rounds = data.rounds_needed(bench)?;
    let alone = data.training_alone()?;
    let mut sides = vec![Side::ours(rounds)];
    for (name, program) in [("Flower", "flower_mnist"), ("PyTorch without a network", "torch_mnist")] {
        let started = bench.rivals.as_ref().context("the rivals are not installed: `make rivals` does it");
        match started.and_then(|rivals| Side::rival(name, rivals.start(program, &[&data.path()])?)) {
            Ok(side) => sides.push(side),
            Err(error) => report.missing(7, &format!("mnist beside {name}"), &format!("{error:#}")),
        }
    }
    let began = Instant::now();
    for repetition in 0..bench.repetitions {
        if began.elapsed() > BUDGET {
            break;
        }
        for side in &mut sides {
            side.repeat(&data, bench, repetition)?;
        }
    }
    tell(report, &sides, alone);
    Ok(())
}

/// Ours beside each rival, then what ours is made of.
fn tell(report: &mut Report, sides: &[Side], alone: f64) {
    let [ours, rivals @ ..] = sides else { return };
    let per_round = ours.seconds.map(|seconds| 1e3 * seconds / f64::from(ours.rounds));
    let reason = format!(
        "a round takes {:.1} ms, of which training alone, on two threads and without a network, is {:.1} ms",
        per_round.median(),
        1e3 * alone
    );
    for (rival, aim) in rivals.iter().zip([3.0, 1.0]) {
        report.add(Measure {
            line: 7,
            name: format!("MNIST to 97 %, {} rounds beside {} of {}", ours.rounds, rival.rounds, rival.name),
            unit: "s",
            ours: ours.seconds.clone(),
            theirs: Some((rival.name, rival.seconds.clone())),
            ratio: ours.seconds.with(&rival.seconds, |ours, theirs| theirs / ours),
            aim: Aim::AtLeast(aim),
            reason: reason.clone(),
        });
    }
    report.add(Measure {
        line: 7,
        name: "a round of it, beside its training alone".to_owned(),
        unit: "ms",
        ratio: per_round.map(|ms| ms / (1e3 * alone)),
        ours: per_round,
        theirs: Some(("training on two threads", Samples::from(vec![1e3 * alone]))),
        aim: Aim::None,
        reason: String::new(),
    });
}

/// One of those that are compared.
struct Side {
    name: &'static str,
    /// How many it needs.
    rounds: u32,
    seconds: Samples,
    rival: Option<Rival>,
}

impl Side {
    fn ours(rounds: u32) -> Self {
        Self { name: "ours", rounds, seconds: Samples::default(), rival: None }
    }

    /// A rival at the beginning of its rounds, of which it was asked how many it needs.
    fn rival(name: &'static str, mut rival: Rival) -> Result<Self> {
        let answer = rival.once(&json!({ "until": ACCURACY, "most": ROUNDS_MAX }))?;
        let rounds = answer["rounds"].as_u64().with_context(|| format!("expected rounds, got {answer}"))?;
        rival.once(&json!({ "begin": true }))?;
        Ok(Self { name, rounds: u32::try_from(rounds)?, seconds: Samples::default(), rival: Some(rival) })
    }

    fn repeat(&mut self, data: &Data, bench: &Bench, repetition: usize) -> Result<()> {
        let seconds = match &mut self.rival {
            None => Fleet::start(data, bench, self.rounds, None)?.train()?,
            Some(rival) => {
                let until = |repetition: usize| repetition * self.rounds as usize / bench.repetitions;
                let share = until(repetition + 1) - until(repetition);
                let seconds = rival.seconds(&json!({ "rounds": share }))?;
                #[allow(clippy::cast_precision_loss)] // some hundred rounds at most
                let scale = f64::from(self.rounds) / share as f64;
                seconds * scale
            }
        };
        eprintln!("mnist: {}: {} rounds in {seconds:.2} s", self.name, self.rounds);
        self.seconds.add(seconds);
        Ok(())
    }
}

// --- the data ---

/// The shards and the test set, unpacked, and what our own code makes of them.
struct Data {
    dir: tempfile::TempDir,
    schema: Schema,
    network: Network,
    test: Rows,
}

impl Data {
    /// Unpacks what lies in `published`, and deals the images to the shards.
    fn unpack(published: &Path, under: &Path) -> Result<Self> {
        let dir = tempfile::TempDir::new_in(under)?;
        for name in ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"] {
            fs::write(dir.path().join(name), unpacked(published, name)?)?;
        }
        let images = unpacked(published, "train-images-idx3-ubyte")?;
        let labels = unpacked(published, "train-labels-idx1-ubyte")?;
        deal(&images, &labels, dir.path())?;
        let (schema, test) = encoded(&test_images(dir.path()), None)?;
        let network = network(&schema)?;
        Ok(Self { dir, schema, network, test })
    }

    fn path(&self) -> String {
        self.dir.path().display().to_string()
    }

    /// How many rounds ours needs, by the models that its workers are sent.
    fn rounds_needed(&self, bench: &Bench) -> Result<u32> {
        let seen = tempfile::TempDir::new_in(bench.tmpfs()?)?;
        let mut fleet = Fleet::start(self, bench, ROUNDS_MAX, Some(seen.path()))?;
        let mut model = fleet.committed(1)?;
        for round in 1..ROUNDS_MAX {
            // The workers of the next round were sent this one's model, and the next round is over.
            let next = fleet.committed(round + 1)?;
            let path = seen.path().join(&model);
            let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
            if self.accuracy(&from_bytes(&bytes).context("a model is numbers")?) >= ACCURACY {
                return Ok(round);
            }
            model = next;
        }
        bail!("no accuracy of {ACCURACY} within {ROUNDS_MAX} rounds")
    }

    fn accuracy(&self, weights: &[f32]) -> f64 {
        let evaluation = self.network.evaluate(weights, &self.test, &self.schema);
        summarise(&evaluation).accuracy.unwrap_or(0.0)
    }

    /// Seconds that the training of a round takes on a thread for each process, the shards being read.
    fn training_alone(&self) -> Result<f64> {
        let shards = (0..CHOSEN).map(|shard| {
            let images = shard_directory(self.dir.path(), shard);
            Ok(encoded(&images, Some(&self.schema))?.1)
        });
        let shards: Vec<Rows> = shards.collect::<Result<_>>()?;
        let weights = self.network.initial(SEED);
        let spec =
            TrainSpec { batch_size: BatchSize::Rows(BATCH), learning_rate: LEARNING_RATE, ..TrainSpec::default() };
        let train = |rows: &[Rows]| -> Result<()> {
            for (round, rows) in (0..ALONE_ROUNDS).flat_map(|round| rows.iter().map(move |rows| (round, rows))) {
                let key = TaskKey { round, name: "" };
                self.network.train(&weights, rows, &spec, key, &mut |_| ControlFlow::Continue(()))?;
            }
            Ok(())
        };
        let began = Instant::now();
        thread::scope(|scope| {
            let halves = shards.chunks(CHOSEN / PROCESSES).map(|half| scope.spawn(|| train(half)));
            let halves: Vec<_> = halves.collect();
            halves.into_iter().try_for_each(|half| half.join().map_err(|_| anyhow!("training panicked"))?)
        })?;
        #[allow(clippy::cast_precision_loss)] // a handful
        let rounds = ALONE_ROUNDS as f64;
        Ok(began.elapsed().as_secs_f64() / rounds)
    }
}

/// A published file without its compression. gzip is wherever such files are.
fn unpacked(published: &Path, name: &str) -> Result<Vec<u8>> {
    let path = published.join(format!("{name}.gz"));
    let out = Command::new("gzip").arg("-dc").arg(&path).output().context("gzip")?;
    ensure!(out.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&out.stderr).trim());
    Ok(out.stdout)
}

/// Deals images and labels to the shards in an order drawn once.
fn deal(images: &[u8], labels: &[u8], to: &Path) -> Result<()> {
    let (images, labels) = images.split_at_checked(16).zip(labels.split_at_checked(8)).context("no idx header")?;
    let (pixels, labels) = (images.1.chunks_exact(PIXELS), labels.1);
    ensure!(pixels.len() == labels.len() && labels.len() == SHARDS * SHARD_ROWS, "{} images", labels.len());
    let pixels: Vec<&[u8]> = pixels.collect();
    let mut order: Vec<usize> = (0..labels.len()).collect();
    Draw::new(SEED, "shards of MNIST", 0, "").shuffle(&mut order);
    for (shard, rows) in order.chunks(SHARD_ROWS).enumerate() {
        let directory = shard_directory(to, shard);
        fs::create_dir(&directory)?;
        let count = u32::try_from(rows.len())?;
        let images = rows.iter().flat_map(|&row| pixels[row]).copied();
        write_idx(&directory.join("train-images-idx3-ubyte"), &[0x803, count, 28, 28], images)?;
        write_idx(&directory.join("train-labels-idx1-ubyte"), &[0x801, count], rows.iter().map(|&row| labels[row]))?;
    }
    Ok(())
}

fn write_idx(path: &Path, header: &[u32], bytes: impl Iterator<Item = u8>) -> Result<()> {
    let file: Vec<u8> = header.iter().flat_map(|word| word.to_be_bytes()).chain(bytes).collect();
    fs::write(path, file).with_context(|| path.display().to_string())
}

fn shard_directory(under: &Path, shard: usize) -> PathBuf {
    under.join(format!("{shard:03}"))
}

fn test_images(under: &Path) -> PathBuf {
    under.join("t10k-images-idx3-ubyte")
}

/// McMahan's 2NN.
fn network(schema: &Schema) -> Result<Network> {
    Ok(Network::new(&ModelSpec::Mlp { hidden: vec![200, 200] }, schema)?)
}

/// Images encoded by `schema`, or by the one that they make themselves.
fn encoded(images: &Path, schema: Option<&Schema>) -> Result<(Schema, Rows)> {
    let spec = DataSpec { validation_fraction: 0.0, ..DataSpec::default() };
    let mut data = Dataset::new(Table::read(images)?, &spec, None, SEED, "")?;
    let schema = match schema {
        Some(schema) => schema.clone(),
        None => merge(&BTreeMap::from([(String::new(), data.survey(learning::MIN_COUNT)?)]), &spec)?.schema,
    };
    let rows = data.encode(&schema)?.training;
    Ok((schema, rows))
}

// --- ours ---

/// The released coordinator, and two processes with fifty workers each. All of it ends with the value.
struct Fleet {
    coordinator: Running,
    _hosts: Vec<Running>,
    rounds: u32,
    // Last: its directory goes when they are gone.
    _place: Place,
}

impl Fleet {
    /// Starts everybody; the models that workers are sent are kept in `seen`.
    fn start(data: &Data, bench: &Bench, rounds: u32, seen: Option<&Path>) -> Result<Self> {
        let place = Place::new(bench.tmpfs()?, &config(rounds));
        let mut coordinator = place.coordinator();
        coordinator.until("listening");
        let host = |number: usize| {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("--mnist-workers").arg(data.path()).arg(place.path("")).arg(number.to_string());
            // One training thread each, as the worker's own main has it.
            command.args(seen).env("RAYON_NUM_THREADS", "1").env("CANDLE_NUM_THREADS", "1");
            Ok(Running::start("workers", &mut command, Stdio::null()))
        };
        let hosts = (0..PROCESSES).map(host).collect::<Result<_>>()?;
        Ok(Self { coordinator, _hosts: hosts, rounds, _place: place })
    }

    /// Seconds from the first task to the last model.
    fn train(mut self) -> Result<f64> {
        self.until("stage", |line| line["stage"] == "training")?;
        let began = Instant::now();
        self.committed(self.rounds)?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// The model of this round.
    fn committed(&mut self, round: u32) -> Result<String> {
        let line = self.until("round", |line| line["round"] == round)?;
        Ok(line["model_hash"].as_str().context("a round has a model")?.to_owned())
    }

    /// The next line of the coordinator with this event that fits. A fleet that loses a worker is not what is measured.
    fn until(&mut self, event: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        loop {
            match self.coordinator.next(PATIENCE) {
                Next::Line(line) if line["event"] == event && fits(&line) => return Ok(line),
                Next::Line(line) if line["event"] == "gone" => bail!("a worker is gone: {}", line["reason"]),
                Next::Line(_) => {}
                Next::Silence => bail!("the coordinator said nothing for {PATIENCE:?}"),
                Next::End => {
                    bail!("the coordinator ended: {}", self.coordinator.stderr().lines().last().unwrap_or_default())
                }
            }
        }
    }
}

fn config(rounds: u32) -> String {
    #[allow(clippy::cast_precision_loss)] // ten and a hundred
    let fraction = CHOSEN as f64 / SHARDS as f64;
    format!(
        "[data]\nvalidation_fraction = 0.0\n[model]\nhidden = [200, 200]\n[train]\nrounds = {rounds}\nseed = {SEED}\n\
         batch_size = {BATCH}\nlearning_rate = {LEARNING_RATE}\n[rounds]\nmin_workers = {SHARDS}\n\
         fraction = {fraction}\ndeadline_s = 600\n"
    )
}

/// What this program does as a process of workers: `--mnist-workers DATA PLACE NUMBER [SEEN]`.
pub(crate) fn host(arguments: &[String]) -> Result<()> {
    let [data, place, number, seen @ ..] = arguments else { bail!("expected DATA PLACE NUMBER [SEEN]") };
    let (data, place, number) = (Path::new(data), Path::new(place), number.parse::<usize>()?);
    let seen = seen.first().map(|directory| Seen::new(directory.into(), data)).transpose()?.map(Seen::hook);
    let each = SHARDS / PROCESSES;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let mut workers = JoinSet::new();
        for shard in number * each..(number + 1) * each {
            let state = StatePlace::Here(place.join(format!("worker-{shard:03}")));
            let mut options = worker::Options::new(shard_directory(data, shard), state, place.join("tributary/join"));
            options.hooks.on_plain.clone_from(&seen);
            workers.spawn(worker::run(options, std::future::pending()));
        }
        while let Some(ended) = workers.join_next().await {
            ended??;
        }
        Ok(())
    })
}

/// Keeps the models among what workers see.
struct Seen {
    directory: PathBuf,
    layout: Layout,
    counts: Mutex<HashMap<Hash, u32>>,
}

impl Seen {
    fn new(directory: PathBuf, data: &Path) -> Result<Self> {
        let (schema, _) = encoded(&test_images(data), None)?;
        Ok(Self { directory, layout: network(&schema)?.layout().clone(), counts: Mutex::default() })
    }

    fn hook(self) -> OnPlain {
        Arc::new(move |bytes: &[u8]| {
            if bytes.len() as u64 == self.layout.bytes() && self.is_second(Hash::of(bytes)) {
                let path = self.directory.join(self.layout.model_hash(bytes).to_string());
                // Whoever misses it says so; both processes may have it.
                let unfinished = path.with_extension(std::process::id().to_string());
                let _ = fs::write(&unfinished, bytes).and_then(|()| fs::rename(unfinished, path));
            }
        })
    }

    /// An update has a model's length and is seen once; a model is seen by several workers of one of the processes.
    fn is_second(&self, hash: Hash) -> bool {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(hash).or_default();
        *count += 1;
        *count == 2
    }
}
