//! `make demo`: three airports train one model over QUIC, and a table says what it was worth.
//!
//! Every training is done by the two binaries that stand beside this one, started as processes, exactly as a
//! person would start them: a coordinator, and a worker for each data file. First the fleet of three, shown round by
//! round; then, with the same config, one worker over all rows ("pooled") and one for each airport alone. Each
//! model predicts the held-out flights with `worker predict`, and the table compares them on the same rows.
//!
//! All state lies in a fresh temporary directory that is gone afterwards, also after Ctrl-C.
#![allow(clippy::print_stdout, reason = "printing is what this program is for")]

mod fleet;
mod score;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use learning::{Comparison, compare};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use fleet::{Fleet, Training};
use score::Predictions;

type Failure = Box<dyn Error>;

/// The airports, by the stem of their files.
const AIRPORTS: [&str; 3] = ["ewr", "jfk", "lga"];
/// How far from pooled training the federated model's AUC may lie.
const POOLED_MARGIN: f64 = 0.002;
/// The paired bootstrap of the table.
const RESAMPLES: u32 = 1_000;
const SEED: u64 = 7;
const USAGE: &str = "usage: demo [--check] FOLDER
  FOLDER   holds flights.toml, ewr.csv, jfk.csv, lga.csv and heldout.csv
  --check  end with status 1 if the comparison falls short of what it promises";

/// What was asked for on the command line.
struct Request {
    folder: PathBuf,
    check: bool,
}

fn main() -> ExitCode {
    let Some(request) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&request) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(u8::from(request.check)),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Option<Request> {
    let (flags, folders): (Vec<_>, Vec<_>) = arguments.partition(|word| word.starts_with('-'));
    let [folder] = folders.as_slice() else {
        return None;
    };
    let check = match flags.as_slice() {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => return None,
    };
    Some(Request { folder: PathBuf::from(folder), check })
}

/// Runs the whole demo; true if the comparison shows what it promises. Processes and files end with it.
fn run(request: &Request) -> Result<bool, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let scratch = tempfile::Builder::new().prefix("tributary-demo-").tempdir()?;
    let outcome = runtime.block_on(async {
        let mut fleet = Fleet::new(scratch.path())?;
        let outcome = tokio::select! {
            outcome = demonstrate(&mut fleet, &request.folder, scratch.path()) => outcome,
            signal = told_to_end() => signal.map_err(Failure::from).and(Err("interrupted".into())),
        };
        fleet.stop().await;
        outcome
    });
    scratch.close()?;
    outcome
}

/// Waits for Ctrl-C, or for the polite kill.
async fn told_to_end() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => pressed,
        _ = terminate.recv() => Ok(()),
    }
}

async fn demonstrate(fleet: &mut Fleet, folder: &Path, scratch: &Path) -> Result<bool, Failure> {
    let shards = AIRPORTS.map(|airport| folder.join(format!("{airport}.csv")));
    let pooled = scratch.join("pooled.csv");
    concatenate(&shards, &pooled)?;

    let mut trainings = vec![("federated".to_owned(), shards.to_vec()), ("pooled".to_owned(), vec![pooled])];
    for (airport, shard) in AIRPORTS.iter().zip(&shards) {
        trainings.push((format!("{} alone", airport.to_uppercase()), vec![shard.clone()]));
    }

    let mut rows = Vec::new();
    let mut predictions = Vec::new();
    for (name, data) in trainings {
        println!("{name}: {}", workers(data.len()));
        let training = Training { name: &name, config: &folder.join("flights.toml"), data: &data };
        rows.push((name.clone(), count_rows(&data)?));
        let started = Instant::now();
        let show_rounds = data.len() > 1;
        let model = fleet.train(&training, |line| show(line, show_rounds)).await?;
        println!("  done in {:.1} s\n", started.elapsed().as_secs_f64());
        predictions.push(fleet.predict(&model, &folder.join("heldout.csv")).await?);
    }
    report(&rows, &predictions)
}

fn workers(count: usize) -> String {
    match count {
        1 => "1 worker".to_owned(),
        _ => format!("{count} workers"),
    }
}

/// One line of the coordinator's `--json`, for a person. A comparison shows only its last.
fn show(line: &Value, show_rounds: bool) {
    let number = |value: &Value| value.as_f64().map_or_else(|| "-".to_owned(), |figure| format!("{figure:.4}"));
    let (event, eval) = (line["event"].as_str().unwrap_or_default(), &line["eval"]);
    let figures =
        format!("loss {}  accuracy {}  AUC {}", number(&eval["loss"]), number(&eval["accuracy"]), number(&eval["auc"]));
    match event {
        "round" if show_rounds => println!(
            "  round {:>3}  {}  train loss {}  validation {figures}  {} s",
            line["round"],
            workers(line["workers"].as_u64().and_then(|count| usize::try_from(count).ok()).unwrap_or_default()),
            number(&line["train_loss"]),
            number(&line["seconds"]),
        ),
        "done" => println!("  final model           validation {figures}"),
        _ => {}
    }
}

/// Prints the table and what it shows; true if federated training kept both of its promises.
fn report(rows: &[(String, usize)], predictions: &[Predictions]) -> Result<bool, Failure> {
    let comparisons = compare_with_first(predictions)?;
    println!("On {} held-out flights, none of which any model was trained on:\n", predictions[0].positive.len());
    println!("  model        rows     AUC  accuracy  federated minus this, AUC (95 % of a paired bootstrap)");
    for (((name, rows), model), auc) in rows.iter().zip(predictions).zip(&comparisons) {
        let difference = match name.as_str() {
            "federated" => String::new(),
            _ => format!("{:+.4}  [{:+.4}, {:+.4}]", auc.first - auc.second, auc.low, auc.high),
        };
        println!("  {name:<10} {rows:>6}  {:.4}  {:>8.4}  {difference}", auc.second, model.accuracy());
    }
    println!();
    let [_, pooled, alone @ ..] = comparisons.as_slice() else {
        return Err("the comparison lacks pooled training".into());
    };
    let near = (pooled.first - pooled.second).abs() <= POOLED_MARGIN;
    println!("  {} federated is within {POOLED_MARGIN} AUC of pooled", verdict(near));
    let above = alone.iter().all(|model| model.low > 0.0);
    println!("  {} federated is above every airport alone, with an interval that excludes 0", verdict(above));
    Ok(near && above)
}

fn compare_with_first(predictions: &[Predictions]) -> Result<Vec<Comparison>, Failure> {
    let first = predictions.first().ok_or("nothing to compare")?;
    let compare = |model: &Predictions| {
        if model.positive != first.positive {
            return Err("the models were not asked about the same rows".into());
        }
        compare(&first.score, &model.score, &first.positive, RESAMPLES, SEED)
            .ok_or_else(|| "the held-out rows are all of one class, so there is no AUC".into())
    };
    predictions.iter().map(compare).collect()
}

fn verdict(holds: bool) -> &'static str {
    if holds { "yes:" } else { "NO: " }
}

/// Joins CSV files that share a header.
fn concatenate(parts: &[PathBuf], whole: &Path) -> Result<(), Failure> {
    let mut text = String::new();
    for part in parts {
        let content = read(part)?;
        let (header, rows) = content.split_once('\n').ok_or_else(|| format!("{}: has no header", part.display()))?;
        if text.is_empty() {
            text = format!("{header}\n");
        }
        if text.lines().next() != Some(header) {
            return Err(format!("{}: header \"{header}\" differs from the first file's", part.display()).into());
        }
        text.push_str(rows);
    }
    Ok(std::fs::write(whole, text)?)
}

fn count_rows(files: &[PathBuf]) -> Result<usize, Failure> {
    let mut rows = 0;
    for file in files {
        rows += read(file)?.lines().count().saturating_sub(1);
    }
    Ok(rows)
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()).into())
}
