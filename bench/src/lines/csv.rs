//! Line 9: a CSV file on its way to encoded batches, on one core.
//!
//! Ours is all that a worker does with its file before it trains: the table is read and typed, prepared, split, surveyed, the
//! schema made and the rows encoded, and one epoch of batches is written, one input a number and one a category. The rival
//! reads the same file into typed columns, and that is all; of either, the columns of numbers are parsed as numbers.

use std::collections::BTreeMap;
use std::fs::File;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use learning::{Dataset, MIN_COUNT, Table, merge};
use protocol::plan::{DataSpec, LearningTask};
use serde_json::json;

use crate::figures::Samples;
use crate::report::{Aim, Measure, Report};
use crate::rivals::{Rival, Rivals};
use crate::sides::alternate;
use crate::suite::Bench;

/// Rows of a batch.
const BATCH_ROWS: usize = 64;

/// What is done with the file, in order.
const STAGES: [&str; 5] = ["read", "prepare", "survey", "encode", "batches"];

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let Some(flights) = &bench.flights else {
        report.missing(9, WHOLE, "--flights names no directory with flights.csv.gz");
        return Ok(());
    };
    let file = unpack(&flights.join("flights.csv.gz"), bench.disk()?)?;
    let polars = bench.rivals.as_ref().map(|rivals| polars(rivals, file.path())).transpose();
    let mut polars = polars.unwrap_or_else(|error| {
        report.missing(9, "polars", &format!("{error:#}"));
        None
    });
    let mut laps = Vec::new();
    let ours = || {
        laps.push(stages(file.path())?);
        Ok(laps.last().map_or(0.0, |laps| laps.iter().sum()))
    };
    let theirs = || polars.as_mut().map_or(Ok(f64::NAN), |polars| polars.seconds(&json!({})));
    let (ours, theirs) = alternate(bench.repetitions, ours, theirs)?;
    let stage = |at: usize| Samples::from(laps[1..].iter().map(|laps| laps[at]).collect::<Vec<_>>());
    let split = STAGES.iter().enumerate().map(|(at, name)| format!("{name} {:.0}", 1e3 * stage(at).median()));
    let reason = format!("of ours, in ms: {}; polars reads and does no more", split.collect::<Vec<_>>().join(", "));
    let bytes = file.path().metadata()?.len() as f64;
    let speed = |seconds: &Samples| seconds.map(|seconds| bytes / seconds / 1e6);
    for (name, ours, aim) in [(WHOLE, ours, Aim::AtLeast(0.7)), (PART, stage(0), Aim::None)] {
        report.add(Measure {
            line: 9,
            name: name.to_owned(),
            unit: "MB/s",
            ours: speed(&ours),
            theirs: polars.as_ref().map(|_| ("polars, reading", speed(&theirs))),
            ratio: polars.as_ref().map_or_else(Samples::default, |_| theirs.with(&ours, |theirs, ours| theirs / ours)),
            aim: if polars.is_some() { aim } else { Aim::None },
            reason: reason.clone(),
        });
    }
    Ok(())
}

/// What is measured.
const WHOLE: &str = "CSV to encoded batches, all of nycflights13";
const PART: &str = "of which CSV to typed columns";

/// polars on one thread, which has read the file once.
fn polars(rivals: &Rivals, path: &Path) -> Result<Rival> {
    let mut polars = rivals.start("polars_csv", &[path.to_str().context("the directory's name is not UTF-8")?])?;
    let read = polars.once(&json!({}))?;
    ensure!(read["threads"] == 1 && read["numbers"] == 14, "expected one thread and 14 columns of numbers, got {read}");
    Ok(polars)
}

fn unpack(packed: &Path, disk: &Path) -> Result<tempfile::NamedTempFile> {
    let file = tempfile::Builder::new().suffix(".csv").tempfile_in(disk)?;
    let packed_file = File::open(packed).with_context(|| packed.display().to_string())?;
    let unpacked = Command::new("gzip").arg("-dc").stdin(Stdio::from(packed_file)).stdout(file.reopen()?).status();
    ensure!(unpacked.context("gzip")?.success(), "{}: gzip cannot unpack it", packed.display());
    Ok(file)
}

/// How long each of [`STAGES`] took, in seconds.
fn stages(path: &Path) -> Result<[f64; STAGES.len()]> {
    let (mut times, mut began) = ([0.0; STAGES.len()], Instant::now());
    let mut lap = |stage: usize| {
        times[stage] = began.elapsed().as_secs_f64();
        began = Instant::now();
    };
    let (label, task) = (Some("arr_delay".to_owned()), Some(LearningTask::Regression));
    let spec = DataSpec { label, task, ..DataSpec::default() };
    let table = Table::read(path)?;
    lap(0);
    let mut data = Dataset::new(table, &spec, None, 1, "bench")?;
    lap(1);
    let survey = data.survey(MIN_COUNT)?;
    let schema = merge(&BTreeMap::from([("bench".to_owned(), survey)]), &spec)?.schema;
    lap(2);
    let rows = data.encode(&schema)?.training;
    lap(3);
    let width = schema.inputs();
    let mut batch = vec![0.0; BATCH_ROWS * width];
    for from in (0..rows.len()).step_by(BATCH_ROWS) {
        let picked = from..rows.len().min(from + BATCH_ROWS);
        picked.zip(batch.chunks_exact_mut(width)).for_each(|(row, inputs)| rows.write_features(row, inputs));
        black_box(&mut batch);
    }
    lap(4);
    Ok(times)
}
