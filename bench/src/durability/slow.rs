//! A slow disk slows rounds and nothing else: control messages and HTTP, beside a disk whose syncs take 200 ms and
//! beside one whose syncs take what they take.

use std::time::{Duration, Instant};

use coordinator::store::Disks;
use tributary_tests::process::get;

use super::Bench;
use crate::figures::Samples;
use crate::fleet::{Crew, Fleet};
use crate::home::{Coordinator, config, slow};

const WORKERS: usize = 8;

/// What a sync takes more than it does.
const SYNC: Duration = Duration::from_millis(200);

/// How long each disk is looked at in each repetition.
const TURN: Duration = Duration::from_secs(2);

/// Between two requests.
const HTTP_EVERY: Duration = Duration::from_millis(10);

/// One coordinator and its figures.
struct Side {
    coordinator: Coordinator,
    fleet: Fleet,
    _home: tempfile::TempDir,
    probed: Vec<f64>,
    http: Samples,
    rounds: Samples,
}

impl Side {
    fn start(bench: &Bench, disks: Option<Disks>) -> Self {
        let home = tempfile::TempDir::new_in(&bench.disk).unwrap();
        let config = config("[128]", WORKERS + 1, "round");
        let coordinator = Coordinator::start(home.path().join("state"), &config, disks);
        let crew = Crew { peers: WORKERS, probe: true, open_to: 0 };
        let mut fleet = Fleet::start(bench.runtime.handle(), &coordinator.bound.invitation, crew);
        fleet.until_assigned(1, false);
        let (probed, http, rounds) = (Vec::new(), Samples::default(), Samples::default());
        Self { coordinator, fleet, _home: home, probed, http, rounds }
    }

    /// Lets rounds go on for a while, and looks.
    fn turn(&mut self) {
        let first = self.coordinator.newest_round();
        self.fleet.catch_up();
        self.fleet.probed = Samples::default();
        let first = first.or_else(|| Some(self.fleet.progress[0].receipts.into())).unwrap_or(0);
        self.fleet.open(u32::MAX);
        self.fleet.open_probe(u32::MAX);
        let (began, port) = (Instant::now(), self.coordinator.bound.http.port());
        while began.elapsed() < TURN {
            for path in ["/readyz", "/metrics"] {
                let asked = Instant::now();
                assert!(get(port, path).is_some(), "{path} does not answer");
                self.http.add_time(asked.elapsed());
            }
            std::thread::sleep(HTTP_EVERY);
        }
        self.fleet.open(0);
        self.fleet.open_probe(0);
        self.fleet.catch_up();
        let probed = std::mem::take(&mut self.fleet.probed);
        self.probed.extend(probed.all());
        let rounds = self.coordinator.newest_round().unwrap_or(first).saturating_sub(first);
        #[allow(clippy::cast_precision_loss)] // some hundred
        self.rounds.add(rounds as f64 / began.elapsed().as_secs_f64());
    }
}

/// How many, and the first of them.
fn unwanted(fleet: &Fleet) -> String {
    let first = fleet.unwanted.first().map(|first| format!(", the first: `{first}`")).unwrap_or_default();
    format!("{}{first}", fleet.unwanted.len())
}

/// Both sides in turn.
pub(crate) fn slow_disk(bench: &mut Bench) {
    const SECTION: &str = "slow disk";
    let mut sides = [Side::start(bench, None), Side::start(bench, Some(slow(SYNC)))];
    for _ in 0..bench.repetitions {
        sides.iter_mut().for_each(Side::turn);
    }
    let table = &mut bench.table;
    for (side, name) in sides.iter().zip(["as it is", "each sync 200 ms longer"]) {
        let probed = Samples::from(side.probed.clone());
        table.figure(SECTION, &format!("{name}: rounds"), "rounds/s", &side.rounds, "");
        table.latency(SECTION, &format!("{name}: control message and its answer"), &probed, "the same");
        table.latency(SECTION, &format!("{name}: HTTP request and its answer"), &side.http, "the same");
        table.fact(SECTION, &format!("{name}: answers that nobody likes"), &unwanted(&side.fleet), "0");
    }
}
