//! A coordinator that is killed again and again: how long until it listens, and until its first worker is back.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use super::Bench;
use crate::figures::Samples;
use crate::home::{Place, config, when};

/// Real workers, which train.
const WORKERS: [&str; 2] = ["ada", "bobby"];

/// So many milliseconds after its first worker is in, a coordinator is killed. A worker whose session lasted less than a
/// second backs off as from one that could not be reached; [`CRASH_LOOP_MS`] is what that costs.
const STEADY_MS: Range<u64> = 1100..2600;
const CRASH_LOOP_MS: Range<u64> = 0..600;

/// Both models: a small one, and one of 40 MB.
pub(crate) fn recovery(bench: &mut Bench) {
    const SMALL: &str = "[128]";
    killed(bench, "small model", SMALL, STEADY_MS);
    killed(bench, "40 MB", "[3160, 3155]", STEADY_MS);
    killed(bench, "small model, killed within 0.6 s each time", SMALL, CRASH_LOOP_MS);
}

fn killed(bench: &mut Bench, name: &str, hidden: &str, after_ms: Range<u64>) {
    const SECTION: &str = "recovery";
    let place = Place::new(&bench.disk, &config(hidden, WORKERS.len(), "round"));
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let _workers = WORKERS.map(|name| place.worker(name, "warn"));
    coordinator.until("round");
    let (mut ready, mut back) = (Samples::default(), Samples::default());
    let mut round = 0;
    for _ in 0..bench.kills {
        // A moment that nobody chose.
        let random = u64::from_le_bytes(tributary_tests::stranger::random());
        thread::sleep(Duration::from_millis(after_ms.start + random % (after_ms.end - after_ms.start)));
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
