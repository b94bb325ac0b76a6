//! Line 11: how fast a coordinator is there, how large the binaries are, and what they take while nothing happens.

use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::figures::Samples;
use crate::home::Place;
use crate::process;
use crate::report::{Aim, Measure, Report};
use crate::suite::Bench;

const LINE: u8 = 11;

/// A process that has begun goes on to allocate for a little while.
const SETTLED_AFTER: Duration = Duration::from_millis(200);

/// What one start of both binaries gave.
#[derive(Debug, Default)]
struct Starts {
    seconds: Samples,
    coordinator: Samples,
    worker: Samples,
}

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    for binary in ["coordinator", "worker"] {
        size(bench, report, binary)?;
    }
    let mut starts = Starts::default();
    for _ in 0..bench.repetitions {
        start(bench, &mut starts)?;
    }
    let mut add = |name: &str, unit, ours, most| {
        let (theirs, ratio, aim) = (None, Samples::default(), Aim::AtMost(most));
        let reason = "see the spread: what else ran took the machine's time or memory".to_owned();
        report.add(Measure { line: LINE, name: name.to_owned(), unit, ours, theirs, ratio, aim, reason });
    };
    add("cold start to `listening`, with a new CA on the disk", "s", starts.seconds, 0.5);
    add("coordinator, listening: memory", "MB", starts.coordinator, 15.0);
    add("worker, in and idle: memory", "MB", starts.worker, 15.0);
    Ok(())
}

#[allow(clippy::cast_precision_loss)] // bytes of a file
fn size(bench: &Bench, report: &mut Report, binary: &str) -> Result<()> {
    let path = bench.binaries.join(binary);
    let bytes = std::fs::metadata(&path).with_context(|| path.display().to_string())?.size();
    report.add(Measure {
        line: LINE,
        name: format!("size of `{binary}`"),
        unit: "MB",
        ours: vec![bytes as f64 / 1e6].into(),
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::AtMost(25.0),
        reason: "built otherwise than released: with symbols, or without LTO".to_owned(),
    });
    Ok(())
}

/// A coordinator in a new home, and a worker that waits there for a second one.
fn start(bench: &Bench, starts: &mut Starts) -> Result<()> {
    let place = Place::new(bench.disk()?, "[rounds]\nmin_workers = 2\n");
    let began = Instant::now();
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    starts.seconds.add_time(began.elapsed());
    std::thread::sleep(SETTLED_AFTER);
    starts.coordinator.add(megabytes(process::resident(coordinator.id())?));
    let mut worker = place.worker("worker", "warn");
    worker.until("joined");
    std::thread::sleep(SETTLED_AFTER);
    starts.worker.add(megabytes(process::resident(worker.id())?));
    Ok(())
}

#[allow(clippy::cast_precision_loss)] // bytes of memory
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
