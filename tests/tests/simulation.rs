//! The simulation in CI: seeds that ever failed, two thousand others, and bugs that are planted to be found.
#![allow(missing_docs)]

use tributary_tests::sim::{Planted, Volume, kept_seeds, run, run_all, shrink, trace};

/// Seeds of every run of the tests.
const SEEDS: u64 = 2_000;

/// A planted bug is found within so many.
const PLANTED_SEEDS: u64 = 500;

#[test]
fn no_promise_is_broken_in_two_thousand_worlds() {
    let seeds = kept_seeds().into_iter().chain(0..SEEDS).collect();
    let summary = run_all(seeds, None, |summary| summary.failed.is_empty());
    summary.lines().iter().for_each(|line| eprintln!("{line}"));
    let Some((seed, failure)) = summary.failed.first() else { return };
    let shrunk = shrink(*seed, None);
    shrunk.scenario.faults.iter().for_each(|fault| eprintln!("{fault}"));
    shrunk.verdict.trace.iter().rev().take(60).rev().for_each(|line| eprintln!("{line}"));
    panic!("seed {seed}: {failure}; `simulate --seed {seed}` shows it; once it is mended, it goes into seeds.txt");
}

#[test]
fn every_planted_bug_is_found() {
    for bug in Planted::ALL {
        let caught = (0..PLANTED_SEEDS).find_map(|seed| Some((seed, run(seed, Some(bug)).failure?)));
        let Some((seed, failure)) = caught else { panic!("{bug} is not found in {PLANTED_SEEDS} seeds") };
        eprintln!("{bug} is caught by seed {seed}: {failure}");
    }
}

#[test]
fn a_seed_is_one_world_and_no_other() {
    for seed in 0..20 {
        let (first, second) = (trace(seed, None), trace(seed, None));
        let differ = first.trace.iter().zip(&second.trace).find(|(first, second)| first != second);
        assert_eq!(differ, None, "seed {seed}");
        assert_eq!((first.steps, first.model), (second.steps, second.model), "seed {seed}");
    }
}

#[test]
fn a_volume_outlives_its_processes() {
    let volume = Volume::new(1);
    drop(volume.mount());
    assert_eq!(volume.bytes(), 0);
}
