//! Two hundred workers that offer a large update at once: memory, latency of control messages, disk, and nobody lost.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tributary_tests::Running;

use super::Bench;
use crate::figures::Samples;
use crate::fleet::{Crew, Fleet};
use crate::home::{Place, Shared, bytes_below, config};

/// How often memory and disk are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The most that was seen.
#[derive(Clone, Copy, Debug, Default)]
struct Peak {
    resident: u64,
    disk: u64,
}

/// Looks at a process and its state until it is told to stop.
struct Watch {
    peak: Shared<Peak>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    fn start(process: u32, state: &Path) -> Self {
        let (peak, stop) = (Shared::<Peak>::default(), Arc::new(AtomicBool::new(false)));
        let (kept, told, state) = (Arc::clone(&peak), Arc::clone(&stop), state.to_owned());
        let thread = thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let now = Peak { resident: memory(process, "VmRSS:"), disk: bytes_below(&state) };
                let mut kept = kept.lock().unwrap();
                *kept = Peak { resident: kept.resident.max(now.resident), disk: kept.disk.max(now.disk) };
                drop(kept);
                thread::sleep(LOOK_EVERY);
            }
        });
        Self { peak, stop, thread: Some(thread) }
    }

    fn end(mut self) -> Peak {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        *Mutex::lock(&self.peak).unwrap()
    }
}

/// A line of the process's status, in bytes.
fn memory(process: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

#[allow(clippy::cast_precision_loss)] // some gibibytes
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// A round of `crowd` uploads of a model of about 40 MB, on the disk.
pub(crate) fn crowd(bench: &mut Bench) {
    const SECTION: &str = "200 workers";
    const MODEL_BYTES: u64 = 40_000_000;
    let crowd = bench.crowd;
    let place = Place::new(&bench.disk, &config("[3160, 3155]", crowd + 1, "round"));
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let process = coordinator.id();
    let crew = Crew { peers: crowd, probe: true, open_to: 0 };
    let mut fleet = Fleet::start(bench.runtime.handle(), &place.invitation(), crew);
    fleet.until_assigned(1, true);
    let idle = probed_for(&mut fleet, Duration::from_secs(3));
    let before = memory(process, "VmHWM:");

    let watch = Watch::start(process, &place.state());
    let began = Instant::now();
    fleet.open(1);
    fleet.until(crowd, |peer| peer.held == 1);
    let took = began.elapsed();
    let busy = std::mem::take(&mut fleet.probed);
    // The one that probes comes last, so that its connection has nothing but control messages until then.
    fleet.open_probe(1);
    fleet.until(crowd + 1, |peer| peer.receipts == 1);
    let round = committed(&mut coordinator);
    fleet.until_assigned(2, true);
    let after = bytes_below(&place.state());
    let peak = watch.end();
    let high = memory(process, "VmHWM:");

    let table = &mut bench.table;
    let bound = 4.5 * megabytes(MODEL_BYTES) + 64.0 * 1.048_576;
    table.fact(SECTION, "offered at once", &format!("{crowd} x {:.0} MB", megabytes(MODEL_BYTES)), "200 x 40 MB");
    table.fact(SECTION, "in the model", &format!("{} of {}", round, crowd + 1), "all");
    table.fact(SECTION, "answers that nobody likes", &fleet.unwanted.len().to_string(), "0");
    let bound = format!("≤ {bound:.0} MB (4.5 x model + 64 MiB)");
    table.fact(SECTION, "peak memory (VmHWM)", &format!("{:.0} MB", megabytes(high)), &bound);
    table.fact(SECTION, "of it before the offers (model and downloads)", &format!("{:.0} MB", megabytes(before)), "");
    table.fact(SECTION, "peak resident while they came", &format!("{:.0} MB", megabytes(peak.resident)), "");
    table.fact(SECTION, "disk, at the peak", &format!("{:.0} MB", megabytes(peak.disk)), "");
    table.fact(SECTION, "disk, after the commit", &format!("{:.0} MB", megabytes(after)), "");
    #[allow(clippy::cast_precision_loss)] // some hundred
    let rate = crowd as f64 * megabytes(MODEL_BYTES) / took.as_secs_f64();
    table.fact(SECTION, "all held", &format!("{:.1} s, {rate:.0} MB/s", took.as_secs_f64()), "");
    table.latency(SECTION, "control message and its answer, before", &idle, "");
    table.latency(SECTION, "control message and its answer, while they came", &busy, "p99 < 100 ms");
}

/// Answers to probes for so long.
fn probed_for(fleet: &mut Fleet, time: Duration) -> Samples {
    fleet.catch_up();
    fleet.probed = Samples::default();
    thread::sleep(time);
    fleet.catch_up();
    std::mem::take(&mut fleet.probed)
}

/// How many updates the first round has.
fn committed(coordinator: &mut Running) -> u64 {
    let line = coordinator.until_where("round", |line| line["round"] == 1);
    line["workers"].as_u64().unwrap()
}
