//! Line 10: how time and memory grow with workers, with parameters and with rows.
//!
//! What is told is the exponent of a power that is fitted to all points (least squares in logarithms): 1 is linear, 0 is
//! flat. Points for which this machine has too little memory or disk are left out, and it is said.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use learning::{Dataset, MIN_COUNT, Table, merge};
use protocol::ids::{Hash, TaskId};
use protocol::plan::DataSpec;
use protocol::sum::{Ring, Sum, Verifier};

use crate::figures::Samples;
use crate::fleet::{Crew, Fleet};
use crate::home::{Place, config};
use crate::machine;
use crate::process;
use crate::report::{Aim, Measure, Report};
use crate::suite::Bench;

const LINE: u8 = 10;

/// A little above 1: caches end somewhere between the first and the last point.
const LINEAR: Aim = Aim::AtMost(1.1);

/// A hundred times as many workers may take half as much memory again.
const FLAT: Aim = Aim::AtMost(0.1);

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    workers(bench, report)?;
    parameters(bench, report)?;
    rows(bench, report)
}

// --- workers ---

const WORKERS: [usize; 5] = [2, 8, 32, 100, 200];

/// 1.25 million parameters: 5 MB, of which each worker sends as many back.
const HIDDEN: &str = "[700, 1770]";
const MODEL_BYTES: u64 = 5_000_000;

/// Updates whose rounds are timed, after one round that is not: many rounds of few workers, one of many.
const UPDATES: usize = 100;

fn workers(bench: &Bench, report: &mut Report) -> Result<()> {
    let (mut times, mut peaks) = (Points::default(), Points::default());
    for workers in WORKERS {
        let needed = 2 * MODEL_BYTES * workers as u64;
        if needed > machine::memory_available() / 2 {
            left_out(report, &format!("rounds of {workers} workers"), needed);
            continue;
        }
        let (seconds, peak) = rounds(bench, workers)?;
        times.add(workers, seconds);
        peaks.add(workers, peak);
    }
    times.tell(report, "a round with a 5 MB model, in workers: time", "ms", 1e3, LINEAR);
    peaks.tell(report, "a round with a 5 MB model, in workers: the coordinator's peak memory", "MB", 1e-6, FLAT);
    Ok(())
}

/// The median time of a round, and the coordinator's peak memory.
fn rounds(bench: &Bench, workers: usize) -> Result<(f64, f64)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let place = Place::new(bench.tmpfs()?, &config(HIDDEN, workers, "round"));
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let crew = Crew { peers: workers, probe: false, open_to: u32::MAX };
    let _fleet = Fleet::start(runtime.handle(), &place.invitation(), crew);
    let mut seconds = Samples::default();
    let rounds = u64::try_from((UPDATES / workers).clamp(1, 9))?;
    for round in 1..=1 + rounds {
        let line = coordinator.until_where("round", |line| line["round"] == round);
        if round > 1 {
            seconds.add(line["seconds"].as_f64().context("a round without seconds")?);
        }
    }
    Ok((seconds.median(), real(process::peak(coordinator.id())?)))
}

// --- parameters ---

const PARAMETERS: [usize; 6] = [1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000];

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 256 * 1024;

/// Small payloads are taken in again and again, for a time that a clock can tell.
const PARAMETERS_IN_ALL: usize = 10_000_000;

fn parameters(bench: &Bench, report: &mut Report) -> Result<()> {
    let path = bench.tmpfs()?.join("payload");
    let (mut times, mut beyond) = (Points::default(), Points::default());
    for parameters in PARAMETERS {
        // The file, its copy while it is hashed, and the ring.
        let needed = 16 * parameters as u64;
        if needed > machine::memory_available() / 2 {
            left_out(report, &format!("an update of {parameters} parameters"), needed);
            continue;
        }
        let (seconds, memory) = update(&path, parameters)?;
        times.add(parameters, seconds);
        beyond.add(parameters, memory);
    }
    // It goes with the directory, if not now.
    let _ = std::fs::remove_file(path);
    times.tell(report, "an update verified and folded from a file, in parameters: time", "ms", 1e3, LINEAR);
    report.add(Measure {
        line: LINE,
        name: "the same: most memory beyond the ring's own 8 bytes a parameter".to_owned(),
        unit: "MB",
        ours: vec![1e-6 * beyond.greatest()].into(),
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::AtMost(8.0),
        reason: "see the points on stderr".to_owned(),
    });
    Ok(())
}

/// The time that one update takes, and the memory beyond the ring's.
fn update(path: &Path, parameters: usize) -> Result<(f64, f64)> {
    let (bytes, hash) = {
        let payload = 1e-5_f32.to_le_bytes().repeat(parameters);
        std::fs::write(path, &payload)?;
        (payload.len() as u64, Hash::of(&payload))
    };
    let times = (PARAMETERS_IN_ALL / parameters).max(1);
    let before = process::resident(std::process::id())?;
    process::forget_peak()?;
    let ring = Ring::weighted();
    let mut sum = Sum::new(ring, parameters);
    let mut took = Samples::default();
    // The first one touches the ring's memory.
    for turn in 0..4 {
        let began = Instant::now();
        for _ in 0..times {
            let mut verifier = Verifier::new(ring, bytes, hash);
            read(path, |chunk| Ok(verifier.update(chunk)?))?;
            let verified = verifier.finish()?;
            sum.clear();
            let mut fold = sum.begin(TaskId(1), 1, &verified)?;
            read(path, |chunk| {
                fold.add(chunk);
                Ok(())
            })?;
            fold.finish()?;
        }
        if turn > 0 {
            took.add(began.elapsed().as_secs_f64() / real(times as u64));
        }
    }
    ensure!(sum.tasks().len() == 1, "nothing was folded");
    let peak = process::peak(std::process::id())?.saturating_sub(before);
    Ok((took.median(), real(peak.saturating_sub(8 * parameters as u64))))
}

fn read(path: &Path, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let (mut file, mut chunk) = (File::open(path)?, vec![0; CHUNK_BYTES]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(()),
            length => each(&chunk[..length])?,
        }
    }
}

// --- rows ---

const ROWS: [usize; 5] = [1_000, 10_000, 100_000, 1_000_000, 10_000_000];

/// So many different rows, again and again.
const BLOCK_ROWS: usize = 1_000;

/// What is less fits into memory that the process had before.
const NOTICED_BYTES: f64 = 4e6;

/// What a row may take in memory before one was measured: far more than it does.
const ROW_BYTES_MAX: u64 = 512;

fn rows(bench: &Bench, report: &mut Report) -> Result<()> {
    let path = bench.tmpfs()?.join("rows.csv");
    let (mut times, mut memory) = (Points::default(), Points::default());
    for rows in ROWS {
        let needed = ROW_BYTES_MAX * rows as u64;
        if needed > machine::memory_available() / 2 {
            left_out(report, &format!("a file of {rows} rows"), needed);
            continue;
        }
        write_rows(&path, rows)?;
        let (seconds, bytes) = encode(&path, rows)?;
        times.add(rows, seconds);
        if bytes > NOTICED_BYTES {
            memory.add(rows, bytes);
        }
    }
    // It goes with the directory, if not now.
    let _ = std::fs::remove_file(path);
    times.tell(report, "a CSV file of six numbers a row surveyed and encoded, in rows: time", "ms", 1e3, LINEAR);
    memory.tell(report, "the same: memory", "MB", 1e-6, LINEAR);
    Ok(())
}

fn write_rows(path: &Path, rows: usize) -> Result<()> {
    let mut block = String::new();
    for row in 0..BLOCK_ROWS {
        // Whatever they are, they are numbers of one to seven digits, some with a point.
        let n = row * 7919 % 10_007;
        let line = format!("{},{}.{:02},{},0.{:05},{},{}\n", n % 13, n % 97, n % 100, n * 31, n, n % 366, n % 2);
        block.push_str(&line);
    }
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(b"month,distance,number,share,day,label\n")?;
    for _ in 0..rows / BLOCK_ROWS {
        file.write_all(block.as_bytes())?;
    }
    Ok(file.flush()?)
}

/// What a worker does with its file before it trains: the time, and the memory at the most. In a process of its own, whose memory
/// nobody has used before.
fn encode(path: &Path, rows: usize) -> Result<(f64, f64)> {
    let child = Command::new(std::env::current_exe()?).arg("--encode-rows").arg(path).output()?;
    ensure!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr).trim());
    let (seconds, bytes, encoded): (f64, f64, usize) = serde_json::from_slice(&child.stdout)?;
    ensure!(encoded == rows, "rows were left out");
    Ok((seconds, bytes))
}

/// What this program does as that process: `--encode-rows FILE`.
pub(crate) fn host(path: &Path) -> Result<()> {
    let before = process::resident(std::process::id())?;
    let began = Instant::now();
    let spec = DataSpec::default();
    let mut dataset = Dataset::new(Table::read(path)?, &spec, None, 1, "rows")?;
    let surveys = BTreeMap::from([("rows".to_owned(), dataset.survey(MIN_COUNT)?)]);
    let shard = dataset.encode(&merge(&surveys, &spec)?.schema)?;
    let seconds = began.elapsed().as_secs_f64();
    let bytes = real(process::peak(std::process::id())?.saturating_sub(before));
    let encoded = shard.training.len() + shard.held_out.len();
    Ok(serde_json::to_writer(std::io::stdout(), &(seconds, bytes, encoded))?)
}

// --- what comes of it ---

/// A quantity at several sizes.
#[derive(Debug, Default)]
struct Points(Vec<(f64, f64)>);

impl Points {
    #[allow(clippy::cast_precision_loss)] // sizes
    fn add(&mut self, size: usize, quantity: f64) {
        eprintln!("  {size}: {quantity:.6}");
        self.0.push((size as f64, quantity));
    }

    fn greatest(&self) -> f64 {
        self.0.iter().fold(0.0, |greatest, (_, quantity)| quantity.max(greatest))
    }

    /// Of the power that fits best.
    fn exponent(&self) -> f64 {
        let logarithms: Vec<(f64, f64)> = self.0.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
        #[allow(clippy::cast_precision_loss)] // a handful
        let mean = |of: fn(&(f64, f64)) -> f64| logarithms.iter().map(of).sum::<f64>() / logarithms.len() as f64;
        let (mean_x, mean_y) = (mean(|point| point.0), mean(|point| point.1));
        let (over, under) = logarithms.iter().fold((0.0, 0.0), |(over, under), (x, y)| {
            (over + (x - mean_x) * (y - mean_y), under + (x - mean_x) * (x - mean_x))
        });
        over / under
    }

    /// The quantity at both ends, and the exponent between.
    fn tell(&self, report: &mut Report, name: &str, unit: &'static str, scale: f64, aim: Aim) {
        let (Some(first), Some(last)) = (self.0.first(), self.0.last()) else { return };
        let mut add = |name, unit, figure, aim| {
            let each = self.0.iter().map(|(x, y)| format!("{x}: {:.4}", scale * y)).collect::<Vec<_>>().join(", ");
            let (theirs, ratio, reason) = (None, Samples::default(), each);
            report.add(Measure { line: LINE, name, unit, ours: vec![figure].into(), theirs, ratio, aim, reason });
        };
        add(format!("{name}, at {}", first.0), unit, scale * first.1, Aim::None);
        if self.0.len() > 1 {
            add(format!("{name}, at {}", last.0), unit, scale * last.1, Aim::None);
        }
        if self.0.len() > 2 {
            add(format!("{name}: exponent"), "", self.exponent(), aim);
        }
    }
}

fn left_out(report: &mut Report, name: &str, needed: u64) {
    report.missing(LINE, name, &format!("needs {} MB of free memory", needed / 500_000));
}

#[allow(clippy::cast_precision_loss)] // bytes
fn real(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exponent(of: fn(f64) -> f64) -> f64 {
        Points([1.0, 10.0, 1e3, 1e7].iter().map(|x| (*x, of(*x))).collect()).exponent()
    }

    #[test]
    fn what_grows_as_a_power_has_its_exponent() {
        for (of, expected) in [(exponent(|_| 7.0), 0.0), (exponent(|x| 3.0 * x), 1.0), (exponent(|x| x * x), 2.0)] {
            assert!((of - expected).abs() < 1e-9, "{of} is not {expected}");
        }
    }
}
