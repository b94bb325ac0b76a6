//! Runs seeds of the simulation: `simulate --seeds 2000`, `simulate --seed 17 --trace`, `simulate --planted held-twice`.
#![allow(clippy::print_stdout)] // it is what this program is for

use std::process::ExitCode;

use tributary_tests::sim::{Planted, kept_seeds, run_all, shrink, trace};

/// Lines of a shrunk trace that are shown.
const TRACE_SHOWN: usize = 80;

/// What was asked for.
struct Arguments {
    from: u64,
    seeds: u64,
    seed: Option<u64>,
    trace: bool,
    planted: Option<Planted>,
}

fn main() -> ExitCode {
    match Arguments::parse(std::env::args().skip(1)) {
        Ok(Arguments { seed: Some(seed), trace: true, planted, .. }) => show(seed, planted),
        Ok(Arguments { seed: Some(seed), planted, .. }) => many(vec![seed], planted),
        Ok(Arguments { from, seeds, planted, .. }) => {
            let kept = if planted.is_none() { kept_seeds() } else { Vec::new() };
            many(kept.into_iter().chain(from..from + seeds).collect(), planted)
        }
        Err(error) => {
            eprintln!("error: {error}\nusage: simulate [--seeds N] [--from S] [--seed X [--trace]] [--planted BUG]");
            ExitCode::from(2)
        }
    }
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self { from: 0, seeds: 100, seed: None, trace: false, planted: None };
        while let Some(word) = words.next() {
            let mut number = || words.next().and_then(|n| n.parse().ok()).ok_or(format!("{word} wants a number"));
            match word.as_str() {
                "--seeds" => arguments.seeds = number()?,
                "--from" => arguments.from = number()?,
                "--seed" => arguments.seed = Some(number()?),
                "--trace" => arguments.trace = true,
                "--planted" => arguments.planted = Some(words.next().unwrap_or_default().parse()?),
                other => return Err(format!("{other:?} is not an option")),
            }
        }
        Ok(arguments)
    }
}

/// One seed, as it is, with its whole trace.
fn show(seed: u64, planted: Option<Planted>) -> ExitCode {
    let verdict = trace(seed, planted);
    for line in &verdict.trace {
        println!("{line}");
    }
    match verdict.failure {
        Some(failure) => {
            println!("seed {seed} fails: {failure}");
            ExitCode::FAILURE
        }
        None => {
            println!(
                "seed {seed} is well: {} rounds, {} receipts, after {:?}",
                verdict.rounds, verdict.receipts, verdict.at
            );
            ExitCode::SUCCESS
        }
    }
}

/// Many seeds; the first that fails is shrunk.
fn many(seeds: Vec<u64>, planted: Option<Planted>) -> ExitCode {
    let all = seeds.len() as u64;
    let (mut told, mut failed) = (0, 0);
    let summary = run_all(seeds, planted, |summary| {
        for (seed, failure) in &summary.failed[failed..] {
            println!("seed {seed} fails: {failure}");
        }
        failed = summary.failed.len();
        if summary.seeds >= told + 100 {
            told = summary.seeds;
            println!("{told} of {all} seeds, {} failed", summary.failed.len());
        }
        summary.failed.len() < 20 && (planted.is_none() || summary.failed.is_empty())
    });
    for line in summary.lines() {
        println!("{line}");
    }
    let Some((seed, _)) = summary.failed.first() else { return ExitCode::SUCCESS };
    tell_shrunk(*seed, planted);
    ExitCode::FAILURE
}

fn tell_shrunk(seed: u64, planted: Option<Planted>) {
    let shrunk = shrink(seed, planted);
    let (faults, workers) = (&shrunk.scenario.faults, shrunk.scenario.workers);
    println!("\nseed {seed}, shrunk from {} faults to {}, with {workers} workers:", shrunk.from, faults.len());
    for fault in faults {
        println!("  {fault}");
    }
    let trace = &shrunk.verdict.trace;
    for line in &trace[trace.len().saturating_sub(TRACE_SHOWN)..] {
        println!("{line}");
    }
    println!("fails: {}", shrunk.verdict.failure.as_deref().unwrap_or("no more"));
    println!("\nonce it is mended, for tests/src/sim/seeds.txt:\n{seed}  # what it was");
}
