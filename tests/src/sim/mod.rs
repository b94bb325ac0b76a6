//! Deterministic simulation: the real machines, the real core of the event loop, the real workshop and the real store,
//! over a disk that tears and a network that fails, in simulated time, from one seed.
//!
//! [`Scenario`] says what a seed means, `World` lets it happen, [`Oracle`] says whether every promise was kept. A seed
//! that fails is shrunk: faults are taken out of its list while it still fails. `simulate --seed N --trace` shows one.
//! Seeds that ever failed stand in `seeds.txt` and run first.

pub mod clock;
mod contents;
mod coordinator;
pub mod data;
pub mod disk;
pub mod oracle;
pub mod planted;
pub mod scenario;
mod worker;
mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

pub use disk::{TornDisk, Volume};
pub use oracle::Oracle;
pub use planted::Planted;
pub use scenario::{Counts, Fault, Scenario, What};
pub use world::Verdict;
use world::{Trace, World};

/// Runs that shrinking may take.
const SHRINK_RUNS_MAX: usize = 400;

/// Threads that run seeds.
const THREADS: u64 = 2;

/// Seeds that failed once. They run first, for ever.
#[must_use]
pub fn kept_seeds() -> Vec<u64> {
    let lines = include_str!("seeds.txt").lines().filter_map(|line| line.split('#').next());
    lines.filter_map(|line| line.trim().parse().ok()).collect()
}

/// What a seed comes to, compared with the same run undisturbed where no fault may change the model.
#[must_use]
pub fn run(seed: u64, planted: Option<Planted>) -> Verdict {
    judge(&Scenario::draw(seed), planted, false)
}

fn judge(scenario: &Scenario, planted: Option<Planted>, traced: bool) -> Verdict {
    let mut verdict = live(scenario.clone(), planted, traced);
    if verdict.failure.is_none() && scenario.is_exact && !scenario.faults.is_empty() {
        let calm = live(scenario.undisturbed(), None, false);
        if let Some(failure) = calm.failure {
            verdict.failure = Some(format!("undisturbed: {failure}"));
        } else if calm.model != verdict.model {
            let (got, expected) = (verdict.model, calm.model);
            verdict.failure = Some(format!("the last model is {got:?}, of the undisturbed run {expected:?}"));
        }
    }
    verdict
}

thread_local! {
    /// Where the simulation of this thread panicked, while one runs.
    static LAST_WORDS: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A panic in a simulation is a verdict, not a line on the terminal.
fn listen_to_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let heard = LAST_WORDS.with(|words| words.borrow_mut().as_mut().map(|words| *words = info.to_string()));
            if heard.is_none() {
                before(info);
            }
        }));
    });
}

/// Runs a world, and takes a panic for a failure.
fn live(scenario: Scenario, planted: Option<Planted>, traced: bool) -> Verdict {
    listen_to_panics();
    planted::plant(planted);
    LAST_WORDS.set(Some(String::new()));
    let trace = Trace::default();
    let shared = traced.then(|| trace.clone());
    let lived = catch_unwind(AssertUnwindSafe(|| World::new(scenario, planted, shared).run()));
    planted::plant(None);
    let words = LAST_WORDS.take().unwrap_or_default();
    let mut verdict = lived.unwrap_or_else(|_| Verdict { failure: Some(words), ..Verdict::default() });
    verdict.trace = trace.take().into();
    verdict
}

/// A seed that fails, with as few faults as it still fails with.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// What is left of it.
    pub scenario: Scenario,
    /// How many faults it had.
    pub from: usize,
    /// How it fails.
    pub verdict: Verdict,
}

/// Takes out faults, halves of them first and then one by one, while the seed still fails.
#[must_use]
pub fn shrink(seed: u64, planted: Option<Planted>) -> Shrunk {
    let mut scenario = Scenario::draw(seed);
    let from = scenario.faults.len();
    let mut runs = 0;
    let mut step = from.div_ceil(2);
    while step > 0 && runs < SHRINK_RUNS_MAX {
        let mut at = 0;
        while at < scenario.faults.len() && runs < SHRINK_RUNS_MAX {
            let mut fewer = scenario.clone();
            fewer.faults.drain(at..scenario.faults.len().min(at + step));
            runs += 1;
            if judge(&fewer, planted, false).failure.is_some() {
                scenario = fewer;
            } else {
                at += step;
            }
        }
        step /= 2;
    }
    let verdict = judge(&scenario, planted, true);
    Shrunk { scenario, from, verdict }
}

/// A seed with its trace.
#[must_use]
pub fn trace(seed: u64, planted: Option<Planted>) -> Verdict {
    judge(&Scenario::draw(seed), planted, true)
}

/// What many seeds came to.
#[derive(Debug, Default)]
pub struct Summary {
    /// Seeds that were run.
    pub seeds: u64,
    /// Faults that struck, by name.
    pub counts: Counts,
    /// Facts, by name.
    pub facts: Counts,
    /// Seeds that failed, and how.
    pub failed: Vec<(u64, String)>,
    /// Receipts given.
    pub receipts: u64,
    /// Rounds committed.
    pub rounds: u64,
    /// Happenings.
    pub steps: u64,
    /// Operations of disks.
    pub operations: u64,
    /// Simulated time.
    pub simulated: Duration,
    /// Real time.
    pub took: Duration,
    /// The seed that took longest, and how long.
    pub slowest: (u64, Duration),
}

impl Summary {
    fn add(&mut self, seed: u64, verdict: Verdict, took: Duration) {
        self.seeds += 1;
        for (name, count) in verdict.counts {
            *self.counts.entry(name).or_default() += count;
        }
        for (name, count) in verdict.facts {
            *self.facts.entry(name).or_default() += count;
        }
        self.receipts += verdict.receipts as u64;
        self.rounds += verdict.rounds as u64;
        self.steps += verdict.steps;
        self.operations += verdict.operations;
        self.simulated += verdict.at;
        if took > self.slowest.1 {
            self.slowest = (seed, took);
        }
        self.failed.extend(verdict.failure.map(|failure| (seed, failure)));
    }

    /// Figures, a line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let faults: u64 = self.counts.values().sum();
        let mut lines = vec![
            format!(
                "{} seeds in {:.1?} (slowest: {} in {:.1?}), {} failed",
                self.seeds,
                self.took,
                self.slowest.0,
                self.slowest.1,
                self.failed.len()
            ),
            format!(
                "{} rounds, {} receipts, {} happenings, {} disk operations, {:.1} simulated hours",
                self.rounds,
                self.receipts,
                self.steps,
                self.operations,
                self.simulated.as_secs_f64() / 3600.0
            ),
            format!("{faults} faults:"),
        ];
        lines.extend(self.counts.iter().map(|(name, count)| format!("  {count:>6} {name}")));
        lines.push("facts:".to_owned());
        lines.extend(self.facts.iter().map(|(name, count)| format!("  {count:>6} {name}")));
        lines
    }
}

/// Runs `seeds` on two threads; `see` hears of each, in the order in which they end. It may end the whole with `false`.
pub fn run_all(seeds: Vec<u64>, planted: Option<Planted>, mut see: impl FnMut(&Summary) -> bool) -> Summary {
    let began = Instant::now();
    let mut summary = Summary::default();
    let next = AtomicU64::new(0);
    let (sender, verdicts) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            let (sender, next, seeds) = (sender.clone(), &next, &seeds);
            scope.spawn(move || {
                loop {
                    let at = usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap_or(usize::MAX);
                    let Some(&seed) = seeds.get(at) else { return };
                    let began = Instant::now();
                    let verdict = run(seed, planted);
                    if sender.send((seed, verdict, began.elapsed())).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        while let Ok((seed, verdict, took)) = verdicts.recv() {
            summary.add(seed, verdict, took);
            summary.took = began.elapsed();
            if !see(&summary) {
                next.store(u64::MAX / 2, Ordering::Relaxed);
                break;
            }
        }
        drop(verdicts);
    });
    summary.took = began.elapsed();
    summary.failed.sort();
    summary
}
