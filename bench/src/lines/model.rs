//! Line 2: a round with a model of 40 MB and two workers, the released binaries, and next to no training.
//!
//! The fleet is stopped (`SIGSTOP`) while another side has its turn, and its first round after that does not count. Beside
//! it stand Flower's round of as many parameters, stock quinn moving the same bytes in one process (one endpoint to two
//! others and back), and the time in which the disk takes 40 MB durably.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use certs::SERVER_NAME;
use serde_json::json;
use tokio::sync::mpsc;
use tributary_tests::Running;
use tributary_tests::home::Next;

use crate::figures::Samples;
use crate::home::Place;
use crate::report::{Aim, Measure, Report};
use crate::rivals::Rival;
use crate::suite::Bench;
use crate::wire::{Papers, spawn, stock_client, stock_server};

/// Two inputs, two hidden layers, two classes: 10,004,562 parameters.
const HIDDEN: &str = "[3160, 3160]";
const PARAMETERS: usize = 2 * 3_160 + 3_160 + 3_160 * 3_160 + 3_160 + 3_160 * 2 + 2;
const MODEL_BYTES: usize = 4 * PARAMETERS;
const WORKERS: usize = 2;

/// Rows of each worker: one step of a small batch.
const ROWS: usize = 8;

/// Rounds of a repetition, behind the one that does not count.
const ROUNDS: usize = 2;

/// Longer than any transfer takes that goes on at all.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let mut flower = flower(bench, report);
    match bench.tmpfs() {
        Ok(dir) => beside(bench, report, dir, Aims { flower: 7.0, place: "tmpfs" }, flower.as_mut())?,
        Err(why) => report.missing(2, "round of 40 MB, state on tmpfs", &why.to_string()),
    }
    match bench.disk() {
        Ok(dir) => {
            beside(bench, report, dir, Aims { flower: 5.0, place: "disk" }, flower.as_mut())?;
            report.add(disk_alone(bench, dir)?);
        }
        Err(why) => report.missing(2, "round of 40 MB, state on disk", &why.to_string()),
    }
    Ok(())
}

/// Flower's fastest arrangement, if it is there.
fn flower(bench: &Bench, report: &mut Report) -> Option<Rival> {
    let rivals = bench.rivals.as_ref()?;
    let arguments = [WORKERS.to_string(), PARAMETERS.to_string()];
    match rivals.start("flower_rounds", &[&arguments[0], &arguments[1]]) {
        Ok(rival) => Some(rival),
        Err(error) => {
            report.missing(2, "round of 40 MB beside Flower", &format!("{error:#}"));
            None
        }
    }
}

#[derive(Clone, Copy)]
struct Aims {
    /// Times faster than Flower.
    flower: f64,
    place: &'static str,
}

/// The fleet with its state in `dir`, in turn with quinn and Flower.
fn beside(bench: &Bench, report: &mut Report, dir: &Path, aims: Aims, mut flower: Option<&mut Rival>) -> Result<()> {
    let (mut fleet, quinn) = (Fleet::start(dir)?, Raw::connect()?);
    let (mut ours, mut raw, mut theirs) = (Samples::default(), Samples::default(), Samples::default());
    for repetition in 0..=bench.repetitions {
        let taken =
            (fleet.rounds()?, quinn.exchange()?, flower.as_mut().map(|flower| flower_round(flower)).transpose());
        let (round, exchange, flowers) = taken;
        // The first of each does not count.
        if repetition == 0 {
            continue;
        }
        ours.add(round);
        raw.add(exchange);
        match flowers {
            Ok(Some(seconds)) => theirs.add(seconds),
            Ok(None) => {}
            Err(error) => {
                report.missing(2, "round of 40 MB beside Flower", &format!("{error:#}"));
                (flower, theirs) = (None, Samples::default());
            }
        }
    }
    let training = fleet.training();
    let said = format!(
        "of a round's {:.0} ms a worker's own step takes {:.0}; stock quinn moves the bytes in {:.0}",
        1e3 * ours.median(),
        1e3 * training.median(),
        1e3 * raw.median()
    );
    let name = |what: &str| format!("round of 40 MB, 2 workers, state on {}{what}", aims.place);
    if theirs.len() == ours.len() {
        report.add(Measure {
            line: 2,
            name: name(""),
            unit: "s",
            ratio: theirs.with(&ours, |theirs, ours| theirs / ours),
            ours: ours.clone(),
            theirs: Some(("Flower's fastest", theirs)),
            aim: Aim::AtLeast(aims.flower),
            reason: said.clone(),
        });
    }
    report.add(Measure {
        line: 2,
        name: name(", of raw quinn's speed"),
        unit: "s",
        ratio: raw.with(&ours, |raw, ours| raw / ours),
        ours: ours.clone(),
        theirs: Some(("stock quinn, 2 x 40 MB down and up", raw)),
        aim: if aims.place == "tmpfs" { Aim::AtLeast(0.6) } else { Aim::None },
        reason: said,
    });
    report.add(Measure {
        line: 2,
        name: name(": evaluation and training in a worker"),
        unit: "s",
        ours: training,
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::None,
        reason: String::new(),
    });
    report.add(memory(&fleet, aims)?);
    Ok(())
}

fn flower_round(flower: &mut Rival) -> Result<f64> {
    let answer = flower.once(&json!({ "rounds": 1 }))?;
    answer["seconds"][0].as_f64().with_context(|| format!("expected seconds, got {answer}"))
}

#[allow(clippy::cast_precision_loss)] // some hundred megabytes
fn memory(fleet: &Fleet, aims: Aims) -> Result<Measure> {
    let peak = peak_kb(fleet.coordinator.id())? as f64 / 1e3 * 1.024;
    Ok(Measure {
        line: 2,
        name: format!("peak memory of the coordinator, state on {}", aims.place),
        unit: "MB",
        ours: vec![peak].into(),
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::AtMost(4.5 * MODEL_BYTES as f64 / 1e6 + 64.0),
        reason: "the model, the sum of twice its width, and the sealed copy are four models".into(),
    })
}

fn peak_kb(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("/proc tells no peak")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Writes as much as a model, and has it durable, again and again.
fn disk_alone(bench: &Bench, dir: &Path) -> Result<Measure> {
    let (bytes, mut samples) = (vec![7; MODEL_BYTES], Samples::default());
    for _ in 0..bench.repetitions {
        let path = dir.join("forty-megabytes");
        let began = Instant::now();
        let mut file = File::create_new(&path)?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        samples.add(began.elapsed().as_secs_f64());
        std::fs::remove_file(path)?;
    }
    Ok(Measure {
        line: 2,
        name: "write + fdatasync of a new file of 40 MB".into(),
        unit: "s",
        ours: samples,
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::None,
        reason: String::new(),
    })
}

/// Two inputs and a class, so few of them that a step is a pass over the weights.
fn rows() -> String {
    let rows = (0..ROWS).map(|row| format!("{row},{},{}\n", ROWS - row, row % 2));
    ["x0,x1,label\n".to_owned()].into_iter().chain(rows).collect()
}

/// The released binaries. They are stopped between repetitions.
struct Fleet {
    coordinator: Running,
    workers: Vec<Running>,
    /// Last, so that its files go when nobody writes them any more.
    _place: Place,
}

impl Fleet {
    fn start(dir: &Path) -> Result<Self> {
        let config = format!(
            "[data]\nvalidation_fraction = 0.0\n[model]\nhidden = {HIDDEN}\n[train]\nrounds = 1000000\n\
             batch_size = {ROWS}\nlearning_rate = 0.0001\n[rounds]\nmin_workers = {WORKERS}\ndeadline_s = 3600\n"
        );
        let place = Place::new(dir, &config);
        let mut coordinator = place.coordinator();
        coordinator.until("listening");
        let workers = ["alice", "bob"].map(|name| {
            std::fs::write(place.path(&format!("{name}.csv")), rows())?;
            Ok(place.worker(name, "warn"))
        });
        let workers = workers.into_iter().collect::<Result<_>>()?;
        coordinator.until("round");
        let fleet = Self { coordinator, workers, _place: place };
        fleet.signal("STOP");
        Ok(fleet)
    }

    /// Seconds of a round.
    #[allow(clippy::cast_precision_loss)] // two
    fn rounds(&mut self) -> Result<f64> {
        self.signal("CONT");
        self.coordinator.until("round");
        let began = Instant::now();
        for _ in 0..ROUNDS {
            self.coordinator.until("round");
        }
        let took = began.elapsed();
        self.signal("STOP");
        ensure!(self.coordinator.runs(), "the coordinator ended: {}", self.coordinator.told());
        Ok(took.as_secs_f64() / ROUNDS as f64)
    }

    fn signal(&self, name: &str) {
        self.workers.iter().chain([&self.coordinator]).for_each(|process| process.signal(name));
    }

    /// What evaluation and training took, by the workers' own account.
    fn training(&mut self) -> Samples {
        let mut samples = Samples::default();
        for worker in &mut self.workers {
            while let Next::Line(line) = worker.next(Duration::ZERO) {
                line["seconds"].as_f64().filter(|_| line["event"] == "round").into_iter().for_each(|s| samples.add(s));
            }
        }
        samples
    }
}

/// Stock quinn: a model down to two ends at once, and one up from each.
struct Raw {
    asked: mpsc::UnboundedSender<()>,
    arrived: Receiver<Result<()>>,
}

impl Raw {
    fn connect() -> Result<Self> {
        let papers = Papers::new()?;
        let (told, arrived) = channel();
        let (listening, address) = channel();
        let (asked, mut asks) = mpsc::unbounded_channel();
        let (failed, served) = (told.clone(), papers.clone());
        let serve = async move {
            let endpoint = stock_server(&served)?;
            listening.send(endpoint.local_addr()?)?;
            let mut connections = Vec::new();
            for _ in 0..WORKERS {
                connections.push(endpoint.accept().await.context("the endpoint was closed")?.await?);
            }
            let model = Bytes::from(vec![7; MODEL_BYTES]);
            while let Some(()) = asks.recv().await {
                let mut both = tokio::task::JoinSet::new();
                for connection in &connections {
                    both.spawn(there_and_back(connection.clone(), model.clone()));
                }
                while let Some(done) = both.join_next().await {
                    done??;
                }
                told.send(Ok(()))?;
            }
            Ok(())
        };
        spawn("server", failed.clone(), serve)?;
        let address = address.recv_timeout(PATIENCE).context("quinn's server does not listen")?;
        for _ in 0..WORKERS {
            let papers = papers.clone();
            let echo = async move {
                let connection = stock_client(&papers)?.connect(address, SERVER_NAME)?.await?;
                while let Ok(stream) = connection.accept_uni().await {
                    take(stream).await?;
                    send(&connection, Bytes::from(vec![7; MODEL_BYTES])).await?;
                }
                Ok(())
            };
            spawn("client", failed.clone(), echo)?;
        }
        Ok(Self { asked, arrived })
    }

    /// Seconds from asking until all is back.
    fn exchange(&self) -> Result<f64> {
        let began = Instant::now();
        self.asked.send(())?;
        self.arrived.recv_timeout(PATIENCE).context("no exchange was done in a minute")??;
        Ok(began.elapsed().as_secs_f64())
    }
}

async fn there_and_back(connection: quinn::Connection, model: Bytes) -> Result<()> {
    send(&connection, model).await?;
    take(connection.accept_uni().await?).await
}

async fn send(connection: &quinn::Connection, model: Bytes) -> Result<()> {
    let mut stream = connection.open_uni().await?;
    stream.write_chunk(model).await?;
    Ok(stream.finish()?)
}

async fn take(mut stream: quinn::RecvStream) -> Result<()> {
    while stream.read_chunk(usize::MAX, true).await?.is_some() {}
    Ok(())
}
