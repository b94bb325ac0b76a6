//! What the journal costs: rounds with it and without it, and bytes that are durable before they are held, each beside
//! what the same disk does in the same minute for somebody who writes and syncs and does nothing else.

use std::any::Any;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use coordinator::store::Disks;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tributary_tests::data;
use worker::Options;
use worker::state::StatePlace;

use super::Bench;
use crate::figures::Samples;
use crate::fleet::{Crew, Fleet};
use crate::home::{Coordinator, Place, bytes_below, config, nowhere};

/// Rounds that pass before the clock starts.
const WARM_ROUNDS: u32 = 20;

/// Workers of these fleets.
const WORKERS: usize = 8;

/// About a thousand parameters: six inputs, one hidden layer.
const SMALL: &str = "[128]";

/// Who trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// The library's workers, each with sixty rows.
    Workers,
    /// Peers that do not train at all.
    Peers,
}

/// Seconds for a round, and bytes of journal for one.
struct Rounds {
    seconds: f64,
    bytes: f64,
}

/// Rounds of a fresh run with its state below `dir`.
fn rounds(bench: &Bench, who: Who, dir: &Path, disks: Option<Disks>, count: u32) -> Rounds {
    let home = tempfile::TempDir::new_in(dir).unwrap();
    let coordinator = Coordinator::start(home.path().join("state"), &config(SMALL, WORKERS, "round"), disks);
    let invitation = &coordinator.bound.invitation;
    let crew = Crew { peers: WORKERS, probe: false, open_to: u32::MAX };
    let handle = bench.runtime.handle();
    let crew: Box<dyn Any> = match who {
        Who::Peers => Box::new(Fleet::start(handle, invitation, crew)),
        Who::Workers => Box::new(Workers::start(handle, &bench.tmpfs, invitation)),
    };
    let began = coordinator.committed(WARM_ROUNDS);
    let at_first = bytes_below(&home.path().join("state/runs"));
    let ended = coordinator.committed(WARM_ROUNDS + count);
    let bytes = bytes_below(&home.path().join("state/runs")).saturating_sub(at_first);
    #[allow(clippy::cast_precision_loss)] // some mebibytes
    let rounds =
        Rounds { seconds: (ended - began).as_secs_f64() / f64::from(count), bytes: bytes as f64 / f64::from(count) };
    drop(coordinator);
    drop(crew);
    rounds
}

/// The library's workers, in this process.
struct Workers {
    _home: tempfile::TempDir,
    stop: Vec<oneshot::Sender<()>>,
}

impl Workers {
    fn start(handle: &Handle, tmpfs: &Path, invitation: &protocol::invitation::Invitation) -> Self {
        let home = tempfile::TempDir::new_in(tmpfs).unwrap();
        let stop = (0..WORKERS).map(|number| {
            let path = home.path().join(format!("worker-{number}.csv"));
            std::fs::write(&path, data::classes(number as u64, 60)).unwrap();
            let state = StatePlace::Here(home.path().join(format!("state-{number}")));
            let mut options = Options::new(path, state, home.path().join("join"));
            options.join = Some(invitation.clone());
            let (stop, stopped) = oneshot::channel::<()>();
            handle.spawn(worker::run(options, async { drop(stopped.await) }));
            stop
        });
        Self { stop: stop.collect(), _home: home }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.clear();
    }
}

/// Seconds for one append of so many bytes and its sync.
fn append_and_sync(dir: &Path, bytes: usize, count: u32) -> f64 {
    let file = tempfile::NamedTempFile::new_in(dir).unwrap();
    let mut file = OpenOptions::new().append(true).open(file.path()).unwrap();
    let record = vec![7; bytes];
    let began = Instant::now();
    for _ in 0..count {
        file.write_all(&record).unwrap();
        file.sync_data().unwrap();
    }
    began.elapsed().as_secs_f64() / f64::from(count)
}

/// `durability = "round"`.
pub(crate) fn round(bench: &mut Bench) {
    for (who, name, count) in [(Who::Workers, "8 workers", 200), (Who::Peers, "8 peers that do not train", 500)] {
        round_of(bench, who, name, count);
    }
}

fn round_of(bench: &mut Bench, who: Who, name: &str, count: u32) {
    const SECTION: &str = "journal, `round`";
    let [mut with, mut without, mut on_disk, mut beside, mut plain] = [(); 5].map(|()| Samples::default());
    let mut bytes = 0.0;
    for _ in 0..bench.repetitions {
        with.add(rounds(bench, who, &bench.tmpfs, None, count).seconds);
        without.add(rounds(bench, who, &bench.tmpfs, Some(nowhere()), count).seconds);
        let real = rounds(bench, who, &bench.disk, None, count);
        on_disk.add(real.seconds);
        bytes = real.bytes;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // some kibibytes
        plain.add(append_and_sync(&bench.disk, bytes as usize, count));
        beside.add(rounds(bench, who, &bench.disk, Some(nowhere()), count).seconds);
    }
    let per_second = |samples: &Samples| samples.map(|seconds| 1.0 / seconds);
    let table = &mut bench.table;
    table.figure(SECTION, &format!("{name}, tmpfs, with the journal"), "rounds/s", &per_second(&with), "");
    table.figure(SECTION, &format!("{name}, tmpfs, without it"), "rounds/s", &per_second(&without), "");
    let loss = with.with(&without, |with, without| (1.0 - without / with) * 100.0);
    table.figure(SECTION, &format!("{name}, tmpfs: rounds per second lost"), "%", &loss, "< 5 %");
    let medians = (1.0 - without.median() / with.median()) * 100.0;
    table.fact(SECTION, &format!("{name}, tmpfs: lost, of the medians"), &format!("{medians:.1} %"), "< 5 %");
    let ms = |samples: &Samples| samples.map(|seconds| seconds * 1e3);
    let added = on_disk.with(&beside, |with, without| with - without);
    table.figure(SECTION, &format!("{name}, disk: added to a round"), "ms", &ms(&added), "");
    let what = format!("{name}, disk: one append of {bytes:.0} bytes + fdatasync");
    table.figure(SECTION, &what, "ms", &ms(&plain), "");
    let ratio = added.with(&plain, |added, plain| added / plain);
    table.figure(SECTION, &format!("{name}, disk: added, in appends"), "x", &ratio, "≤ 1.3");
}

/// Seconds to write so many files of so many bytes, each synced, one after another.
fn write_and_sync(dir: &Path, bytes: usize, files: usize) -> f64 {
    let dir = tempfile::TempDir::new_in(dir).unwrap();
    let piece = vec![7; 1 << 20];
    let began = Instant::now();
    for number in 0..files {
        let mut file = File::create(dir.path().join(number.to_string())).unwrap();
        let mut rest = bytes;
        while rest > 0 {
            let now = rest.min(piece.len());
            file.write_all(&piece[..now]).unwrap();
            rest -= now;
        }
        file.sync_data().unwrap();
    }
    began.elapsed().as_secs_f64()
}

/// `durability = "update"`: the coordinator is the released binary.
pub(crate) fn update(bench: &mut Bench) {
    for (name, hidden, bytes) in [("4 MB", "[1000, 990]", 4_000_000), ("40 MB", "[3160, 3155]", 40_000_000)] {
        update_of(bench, name, hidden, bytes);
    }
}

fn update_of(bench: &mut Bench, name: &str, hidden: &str, bytes: usize) {
    const SECTION: &str = "journal, `update`";
    let mut fleets = ["update", "round"].map(|durability| {
        let place = Place::new(&bench.disk, &config(hidden, WORKERS, durability));
        let mut coordinator = place.coordinator();
        coordinator.until("listening");
        let crew = Crew { peers: WORKERS, probe: false, open_to: 0 };
        (Fleet::start(bench.runtime.handle(), &place.invitation(), crew), coordinator, place)
    });
    let mut plain = Samples::default();
    let mut held = [(); 2].map(|()| Samples::default());
    #[allow(clippy::cast_precision_loss)] // some hundred mebibytes
    let megabytes = (bytes * WORKERS) as f64 / 1e6;
    for round in 1..=bench.repetitions + 1 {
        for ((fleet, _, _), held) in fleets.iter_mut().zip(&mut held) {
            let seconds = held_seconds(fleet, round);
            // The first round is for caches to fill.
            if round > 1 {
                held.add(megabytes / seconds);
            }
        }
        let seconds = write_and_sync(&bench.disk, bytes, WORKERS);
        if round > 1 {
            plain.add(megabytes / seconds);
        }
    }
    let [update, round] = held;
    let table = &mut bench.table;
    table.figure(SECTION, &format!("8 x {name} held, durable"), "MB/s", &update, "");
    table.figure(SECTION, &format!("8 x {name} held, `durability = \"round\"`"), "MB/s", &round, "");
    table.figure(SECTION, &format!("8 x {name} written, each fdatasynced"), "MB/s", &plain, "");
    table.figure(SECTION, &format!("{name}: durable over written"), "x", &update.with(&plain, |a, b| a / b), "≥ 0.8");
    table.figure(SECTION, &format!("{name}: durable over `round`"), "x", &update.with(&round, |a, b| a / b), "");
}

/// Seconds from everybody's offer to the last `Held`. What the round before left to be written is written first.
fn held_seconds(fleet: &mut Fleet, round: u32) -> f64 {
    fleet.until_assigned(round, true);
    rustix::fs::sync();
    std::thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    fleet.open(round);
    fleet.until(WORKERS, |peer| peer.held >= round);
    let last = fleet.progress.iter().filter_map(|peer| peer.held_at).max().unwrap();
    // Receipts, so that the next measurement begins with a quiet coordinator.
    fleet.until(WORKERS, |peer| peer.receipts >= round);
    fleet.until_assigned(round + 1, true);
    (last - began).as_secs_f64()
}
