//! A coordinator that is killed again and again: how long until it listens, and until its first worker is back.

use std::thread;
use std::time::{Duration, Instant};

use crate::Bench;
use crate::figures::Samples;
use crate::home::{Place, config, when};

/// Real workers, which train.
const WORKERS: [&str; 2] = ["ada", "bobby"];

/// Both models: a small one, and one of 40 MB.
pub(crate) fn recovery(bench: &mut Bench) {
    for (name, hidden, pause_ms) in [("small model", "[128]", 600), ("40 MB", "[3160, 3155]", 2500)] {
        killed(bench, name, hidden, pause_ms);
    }
}

fn killed(bench: &mut Bench, name: &str, hidden: &str, pause_ms: u64) {
    const SECTION: &str = "recovery";
    let place = Place::new(&bench.disk, &config(hidden, WORKERS.len(), "round"));
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let _workers = WORKERS.map(|name| place.worker(name, "warn"));
    coordinator.until("round");
    let (mut ready, mut back) = (Samples::default(), Samples::default());
    let mut round = 0;
    for _ in 0..bench.kills {
        // A moment that nobody chose: up to `pause_ms` after the first worker is back.
        let random = u64::from_le_bytes(tributary_tests::stranger::random());
        thread::sleep(Duration::from_millis(random % pause_ms));
        coordinator.kill();
        let began = Instant::now();
        coordinator = place.coordinator();
        let listening = coordinator.until("listening");
        ready.add_time(began.elapsed());
        back.add_time(when(&mut coordinator, "worker") - began);
        let committed = listening["round"].as_u64().unwrap();
        assert!(committed >= round, "round {committed} after round {round}");
        round = committed;
    }
    let table = &mut bench.table;
    table.latency(SECTION, &format!("{name}: from exec to `listening`"), &ready, "≤ 1 s");
    table.latency(SECTION, &format!("{name}: from exec to the first worker that is in"), &back, "");
    table.fact(SECTION, &format!("{name}: rounds committed meanwhile"), &round.to_string(), "");
}
