//! `kill -9`, again and again, at random moments: of the coordinator, of any worker, of several before one is back.
//!
//! A soak is a number of laps. Each lap is a fleet of real binaries over the demo's flights, from its enrolment to the
//! end of its run, while processes are killed and started again with the same state. The moments are drawn from a seed;
//! what they hit is up to the machine. At its end every lap is compared with the fleet that nobody disturbed, and the
//! coordinator's own record with the workers' receipts. Panics when something broke: it is for tests only.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::fmt;
use std::time::{Duration, Instant};

use protocol::draw::Draw;
use serde_json::Value;

use crate::fleet::{Fleet, Undisturbed, ended_well};
use crate::flights::{self, AIRPORTS};
use crate::home::{Next, PATIENCE, Running};

/// Rounds of a lap.
const ROUNDS: u32 = 40;
/// Nothing is killed after this round, so that the end of the run is not cut off from those who wait for it.
const LAST_KILL_ROUND: u64 = 30;
/// Rows of each airport, five times a round: a round takes about a twentieth of a second.
const ROWS: usize = 1000;
/// The longest time between two kills, in milliseconds: short enough to hit what is still coming back, too.
const BETWEEN_KILLS_MS_MAX: u64 = 700;

/// What a soak saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// How often the coordinator was killed.
    pub coordinator_kills: u32,
    /// How often a worker was killed.
    pub worker_kills: u32,
    /// Runs that were brought to their end.
    pub laps: u32,
    /// From the start of a coordinator that was killed before until a worker was in again.
    pub recoveries: Vec<Duration>,
    /// From its start until it listened.
    pub listening: Vec<Duration>,
}

/// Kills so many processes, and brings every run to its end; prints nothing.
#[must_use]
pub fn soak(kills: u32, seed: u64) -> Seen {
    let undisturbed = flights::undisturbed(&config(), ROWS);
    let mut seen = Seen::default();
    while seen.kills() < kills {
        let mut lap = Lap::start(kills, Draw::new(seed, "soak", seen.laps.into(), ""));
        lap.run(&mut seen);
        lap.end(&undisturbed);
        seen.laps += 1;
    }
    seen
}

fn config() -> String {
    flights::config(ROUNDS, 0).replace("local_epochs = 1", "local_epochs = 5")
}

/// One run, and who is in it.
struct Lap {
    fleet: Fleet,
    coordinator: Running,
    /// When the coordinator was started, if it was killed before and nobody is in yet.
    started: Option<Instant>,
    workers: Vec<Running>,
    kills_max: u32,
    round: u64,
    draw: Draw,
    story: Story,
}

/// What was done to a run; told if it breaks.
#[derive(Debug, Default)]
struct Story(Vec<String>);

impl Drop for Story {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("what was done to this run:\n{}", self.0.join("\n"));
        }
    }
}

impl Lap {
    fn start(kills_max: u32, draw: Draw) -> Self {
        let fleet = Fleet::new(&config(), flights::shards(ROWS));
        let coordinator = fleet.coordinator(&["--exit-when-done"]);
        let workers = fleet.workers(&[]);
        Self { fleet, coordinator, started: None, workers, kills_max, round: 0, draw, story: Story::default() }
    }

    /// Kills until there were enough, or the run nears its end.
    fn run(&mut self, seen: &mut Seen) {
        while seen.kills() < self.kills_max && self.round < LAST_KILL_ROUND {
            let next_kill = Instant::now() + Duration::from_millis(self.draw.below(BETWEEN_KILLS_MS_MAX));
            while self.listen(next_kill, seen) {}
            if self.round < LAST_KILL_ROUND {
                self.kill(seen);
            }
        }
    }

    /// Takes a line of the coordinator; false once it is time for the next kill, or too late for one.
    fn listen(&mut self, next_kill: Instant, seen: &mut Seen) -> bool {
        let line = match self.coordinator.next(next_kill.saturating_duration_since(Instant::now())) {
            Next::Line(line) => line,
            Next::Silence => return false,
            Next::End => self.broke("the coordinator ended by itself"),
        };
        match line["event"].as_str() {
            Some("round") => self.round = self.round.max(line["round"].as_u64().unwrap()),
            Some("listening") => seen.listening.extend(self.started.map(|started| started.elapsed())),
            Some("worker") => seen.recoveries.extend(self.started.take().map(|started| started.elapsed())),
            _ => {}
        }
        self.round < LAST_KILL_ROUND
    }

    fn kill(&mut self, seen: &mut Seen) {
        let round = self.round;
        // As often the coordinator as a worker.
        if self.draw.below(2) == 0 {
            assert!(self.coordinator.kill_alive(), "it had ended by itself: {}", self.coordinator.told());
            self.story.0.push(format!("after round {round}: the coordinator was killed"));
            self.coordinator = self.fleet.coordinator(&["--exit-when-done"]);
            self.started = Some(Instant::now());
            seen.coordinator_kills += 1;
        } else {
            let which = usize::try_from(self.draw.below(AIRPORTS.len() as u64)).unwrap();
            let worker = &mut self.workers[which];
            assert!(worker.kill_alive(), "it had ended by itself: {}", worker.told());
            while let Next::Line(_) = worker.next(PATIENCE) {}
            self.story.0.push(format!("after round {round}: {} was killed\n{}", AIRPORTS[which], worker.told()));
            *worker = self.fleet.worker(AIRPORTS[which], &[]);
            seen.worker_kills += 1;
        }
    }

    /// The last line of a coordinator that nobody kills any more.
    fn done(&mut self) -> Value {
        loop {
            match self.coordinator.next(PATIENCE) {
                Next::Line(line) if line["event"] == "done" => return line,
                Next::Line(_) => {}
                Next::Silence => self.broke("the run does not go on"),
                Next::End => self.broke("the coordinator ended by itself"),
            }
        }
    }

    /// Ends the test with all that everybody said.
    fn broke(&mut self, what: &str) -> ! {
        let told = self.workers.iter_mut().map(|worker| {
            while let Next::Line(_) = worker.next(Duration::ZERO) {}
            worker.told()
        });
        let told: Vec<_> = told.collect();
        panic!("{what}: {}\n{}", self.coordinator.told(), told.join("\n"));
    }

    /// Lets the run come to its end, and compares.
    fn end(mut self, undisturbed: &Undisturbed) {
        let done = self.done();
        assert_eq!(done["model_hash"], undisturbed.model(), "{}", self.coordinator.told());
        assert_eq!(ended_well(self.coordinator).lines("done").len(), 1);
        for worker in self.workers {
            self.story.0.push(ended_well(worker).stdout);
        }
        undisturbed.assert_every_update_is_receipted(self.fleet.home());
    }
}

impl Seen {
    /// How often something was killed.
    #[must_use]
    pub fn kills(&self) -> u32 {
        self.coordinator_kills + self.worker_kills
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { coordinator_kills, worker_kills, laps, recoveries, listening } = self;
        writeln!(
            f,
            "{} kills ({coordinator_kills} of the coordinator, {worker_kills} of workers) in {laps} runs",
            self.kills()
        )?;
        writeln!(f, "  every run ended with the model of the undisturbed one, and every update has its receipt")?;
        writeln!(f, "  restart to listening:        {}", Quantiles(listening))?;
        write!(f, "  restart to the first worker: {}", Quantiles(recoveries))
    }
}

/// How times are told.
struct Quantiles<'a>(&'a [Duration]);

impl fmt::Display for Quantiles<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(worst) = self.0.iter().max() else { return f.write_str("never seen") };
        let ms = |time: Duration| time.as_millis();
        let (p50, p99) = (quantile(self.0, 50), quantile(self.0, 99));
        write!(f, "p50 {} ms, p99 {} ms, worst {} ms, of {}", ms(p50), ms(p99), ms(*worst), self.0.len())
    }
}

/// The smallest of `times` that so many percent of them do not exceed.
#[must_use]
pub fn quantile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let place = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[place - 1]
}
