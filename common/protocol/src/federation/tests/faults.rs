//! Faults drawn from a seed, over every kind of plan. The fleet checks its invariants after every input; what is
//! checked here is that the run ends once the faults have stopped. A failure names its seed, which repeats it.

use core::time::Duration;

use super::fleet::{Fleet, secs};
use super::{plan, with};
use crate::draw::Draw;
use crate::federation::{Gone, Input, Notice, Stage};
use crate::ids::{Hash, Instance};
use crate::member::Ending;
use crate::messages::FromWorker;
use crate::plan::{Durability, Mode, Plan};

const SEEDS: u64 = 1000;

/// Once the faults have stopped: three extensions of the default absence, the longest backoff, and some to spare.
/// Far below the ten minutes after which a stuck worker is let go, so that no wake-up may rest on that.
const PROGRESS_MAX: Duration = secs(300);

#[test]
fn whatever_fails_the_run_ends_once_it_stops() {
    for seed in 0..SEEDS {
        let result = std::panic::catch_unwind(|| Chaos::new(seed).run());
        assert!(result.is_ok(), "seed {seed}");
    }
}

struct Chaos {
    draw: Draw,
    fleet: Fleet,
    /// Quorum bears that one of the fleet leaves for good.
    bears_a_loss: bool,
    lost: Option<usize>,
}

impl Chaos {
    fn new(seed: u64) -> Self {
        let mut draw = Draw::new(seed, "faults", 0, "");
        let bears_a_loss = draw.below(2) == 0;
        let workers = 2 + bears_a_loss as usize * 2 + draw.below(3) as usize;
        let plan = draw_plan(&mut draw, workers, bears_a_loss);
        let mut fleet = Fleet::new(plan, workers);
        fleet.parameters = [1000, 100_000][draw.below(2) as usize];
        fleet.upload_time = Duration::from_millis(1 + draw.below(60));
        fleet.sync_time = Duration::from_millis(1 + draw.below(40));
        fleet.step_time = Duration::from_millis(1 + draw.below(40));
        fleet.jitter = Some(Draw::new(seed, "jitter", 0, ""));
        for worker in &mut fleet.workers {
            let longest = [60, 2500][draw.below(2) as usize];
            worker.train_time = Duration::from_millis(1 + draw.below(longest));
        }
        Self { draw, fleet, bears_a_loss, lost: None }
    }

    fn run(mut self) {
        for _ in 0..self.draw.below(25) {
            let pause = [5, 60, 60, 400, 15_000][self.draw.below(5) as usize];
            self.fleet.run_for(Duration::from_millis(self.draw.below(pause)));
            self.fault();
        }
        self.heal();
        let until = self.fleet.now() + PROGRESS_MAX;
        self.fleet.run_until(|fleet| {
            assert!(fleet.now() < until, "no progress: {:?}", fleet.status());
            fleet.finished.is_some() && fleet.workers.iter().all(|w| !w.is_alive() || w.ending.is_some())
        });
        assert_eq!(self.fleet.rounds(), 3);
        assert_eq!(self.fleet.status().permits_in_use, 0);
        self.fleet.check_receipts();
    }

    fn fault(&mut self) {
        let worker = self.draw.below(self.fleet.workers.len() as u64) as usize;
        let up = self.fleet.has_coordinator();
        match self.draw.below(16) {
            0 | 1 => self.fleet.kill(worker),
            2 | 3 if !self.fleet.workers[worker].is_alive() => self.revive(worker),
            2..=4 => self.fleet.cut(worker),
            5 if up => self.fleet.kill_coordinator(),
            6 if up => self.cut_power(),
            5..=7 if !up => self.fleet.start_coordinator(),
            7 => self.fleet.freeze(worker),
            8 => self.fleet.thaw(worker),
            9 | 10 => self.offer_again(worker),
            11 | 12 => self.fleet.cut_a_stream(),
            13 if self.fleet.workers.len() < 9 => drop(self.fleet.add_worker()),
            14 if self.fleet.workers.len() < 9 => drop(self.fleet.clone_worker(worker)),
            14 => self.babble(worker),
            15 if self.bears_a_loss && self.lost.is_none() => self.lose(worker),
            _ => self.babble(worker),
        }
    }

    /// With the payloads gone, a damaged model can be made again only by those who are still there.
    fn cut_power(&mut self) {
        let everybody = !self.bears_a_loss && self.fleet.workers.iter().all(|worker| worker.ending.is_none());
        let (facts, damaged) = (self.draw.below(6), [0, 0, 1, 2][self.draw.below(4) as usize]);
        self.fleet.cut_power(facts);
        self.fleet.damaged = if everybody { damaged } else { 0 };
    }

    fn revive(&mut self, worker: usize) {
        if self.lost != Some(worker) && self.fleet.workers[worker].ending.is_none() {
            self.fleet.revive(worker);
        }
    }

    /// One of the last offers once more, or another payload for its task.
    fn offer_again(&mut self, worker: usize) {
        let (count, other) = (self.fleet.workers[worker].manifests.len() as u64, self.draw.below(4) == 0);
        if count > 0 && self.fleet.workers[worker].conn.is_some() {
            let number = self.draw.below(count) as usize;
            self.fleet.offer_again_of(worker, number, |manifest| {
                if other {
                    manifest.hash = Hash([9; 32]);
                }
            });
        }
    }

    /// What an honest worker says once is said twice.
    fn babble(&mut self, worker: usize) {
        let Some(conn) = self.fleet.workers[worker].conn else { return };
        let message = match self.draw.below(3) {
            0 => FromWorker::Ready,
            1 => FromWorker::Beat { task: crate::ids::TaskId(3), steps: u64::MAX },
            _ => FromWorker::Join { instance: Instance(1) },
        };
        self.fleet.inject(Input::Said { conn, message });
    }

    /// One leaves for good, in one of three ways.
    fn lose(&mut self, worker: usize) {
        self.lost = Some(worker);
        match self.draw.below(3) {
            0 => self.fleet.kill(worker),
            1 => self.fleet.stop_worker(worker),
            _ => {
                self.fleet.workers[worker].banned = true;
                let id = self.fleet.workers[worker].id;
                self.fleet.inject(Input::Revoked { worker: id });
                self.fleet.kill(worker);
            }
        }
    }

    fn heal(&mut self) {
        if !self.fleet.has_coordinator() {
            self.fleet.start_coordinator();
        }
        for worker in 0..self.fleet.workers.len() {
            self.fleet.thaw(worker);
            if !self.fleet.workers[worker].is_alive() {
                self.revive(worker);
            }
        }
    }
}

fn draw_plan(draw: &mut Draw, workers: usize, bears_a_loss: bool) -> Plan {
    with(plan(workers as u32 - u32::from(bears_a_loss), 3), |p| {
        p.learning.train.mode = [Mode::Federated, Mode::Gradient, Mode::Central][draw.below(3) as usize];
        p.rounds.quorum = if bears_a_loss { 0.5 } else { [0.6, 1.0][draw.below(2) as usize] };
        p.rounds.fraction = [1.0, 0.7][draw.below(2) as usize];
        p.rounds.deadline = [None, Some(secs(2)), Some(secs(20))][draw.below(3) as usize];
        p.rounds.durability = [Durability::Round, Durability::Update][draw.below(2) as usize];
        if draw.below(4) == 0 {
            p.rounds.min_workers = None;
        }
    })
}

#[test]
fn an_abort_is_the_end_whenever_it_comes() {
    for mode in [Mode::Federated, Mode::Central] {
        for half_millis in 0..160 {
            let mut fleet = Fleet::new(with(plan(3, 3), |p| p.learning.train.mode = mode), 3);
            fleet.parameters = 100_000;
            fleet.run_for(Duration::from_micros(half_millis * 500));
            let over = fleet.finished.is_some();
            fleet.inject(Input::Abort);
            fleet.run_for(secs(30));
            assert_eq!(fleet.stage(), if over { Stage::Finished } else { Stage::Aborted });
            assert_eq!(fleet.status().permits_in_use, 0);
            assert!(fleet.workers.iter().all(|w| over || w.ending == Some(Ending::Aborted)));
        }
    }
}

#[test]
fn a_stop_leaves_nothing_ticking_whenever_it_comes() {
    let no_min = || with(plan(2, 2), |p| p.rounds.min_workers = None);
    for tens_of_millis in 0..40 {
        let mut fleet = Fleet::new(no_min(), 2);
        fleet.run_for(Duration::from_millis(tens_of_millis * 10));
        fleet.inject(Input::Stop);
        fleet.run_for(secs(30));
        assert!(fleet.ended);
    }
    let mut fleet = Fleet::new(no_min(), 2);
    fleet.run_for(secs(5));
    fleet.inject(Input::Abort);
    fleet.run_for(secs(30));
    assert!(!fleet.noticed(|n| matches!(n, Notice::Gone { why: Gone::Silent, .. })));
}
