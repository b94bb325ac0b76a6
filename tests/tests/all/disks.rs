//! Disks that are full, locked, damaged or gone under a coordinator.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::draw::Draw;
use tributary_tests::home::PATIENCE;
use tributary_tests::mount::Mount;
use tributary_tests::{Fleet, Home, Running, ended_well, flights, not_tested};

use crate::runs::copy;

const END: &[&str] = &["--exit-when-done"];
const ROWS: usize = 300;
/// Enough that the disk is full long before the run is over.
const ROUNDS: u32 = 60;
/// Enough for the whole run, unless something else takes the room.
const ROOM_KIB: u32 = 4096;
/// Places of a checkpoint at which a bit is flipped.
const FLIPS: u64 = 50;

/// A fleet whose coordinator's state is on a small disk.
fn on_a_small_disk(config: &str, what: &str) -> Option<(Fleet, Mount)> {
    let fleet = Fleet::new(config, flights::shards(ROWS));
    match Mount::tmpfs(&fleet.home().state(), ROOM_KIB) {
        Ok(mount) => Some((fleet, mount)),
        Err(missing) => {
            not_tested(&format!("{what}: {missing}"));
            None
        }
    }
}

/// Takes all the room that there is.
fn fill(state: &Path) -> PathBuf {
    let filler = state.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[1; 512]).is_ok() {}
    filler
}

#[test]
fn a_full_disk_pauses_the_run_which_goes_on_to_the_same_model_when_there_is_room() {
    let config = flights::config(ROUNDS, 0);
    let Some((fleet, _mount)) = on_a_small_disk(&config, "a full disk") else { return };
    let undisturbed = flights::undisturbed(&config, ROWS);
    let home = fleet.home();
    let mut coordinator = fleet.coordinator(END);
    let workers = fleet.workers(&[]);
    coordinator.until_where("round", |line| line["round"] == 3);
    assert!(home.get("/readyz").is_some(), "it is ready while there is room");

    let filler = fill(&home.state());
    let paused = coordinator.until("paused");
    assert!(paused["reason"].as_str().unwrap().contains("disk is full"), "{paused}");
    until(|| home.get("/metrics").is_some_and(|text| text.contains("\ntributary_disk_full 1\n")));
    assert!(home.get("/readyz").is_none() && home.get("/healthz").is_some(), "it lives and is not ready");
    assert!(coordinator.runs());

    fs::remove_file(filler).unwrap();
    coordinator.until("resumed");
    assert!(home.get("/readyz").is_some());
    let said = ended_well(coordinator);
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed.model());
    assert_eq!(said.stderr.matches("disk is full").count(), 1, "{}", said.stderr);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    undisturbed.assert_every_update_is_receipted(home);
}

/// Looks again and again at something outside that cannot be waited for.
fn until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

#[test]
fn a_coordinator_killed_on_a_full_disk_goes_on_when_there_is_room() {
    let config = flights::config(ROUNDS, 0);
    let Some((fleet, _mount)) = on_a_small_disk(&config, "a restart on a full disk") else { return };
    let undisturbed = flights::undisturbed(&config, ROWS);
    let mut coordinator = fleet.coordinator(END);
    let workers = fleet.workers(&[]);
    coordinator.until_where("round", |line| line["round"] == 3);
    let filler = fill(&fleet.home().state());
    coordinator.until("paused");
    coordinator.kill();
    let said = fleet.coordinator(END).end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("disk is full"), "{}", said.stderr);
    fs::remove_file(filler).unwrap();
    let said = ended_well(fleet.coordinator(END));
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed.model());
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
}

#[test]
fn a_state_directory_that_cannot_be_written_is_refused_and_left_as_it_is() {
    let Some((fleet, mount)) = on_a_small_disk(&flights::config(2, 0), "a read-only disk") else { return };
    let refused = |when: &str| {
        let said = fleet.coordinator(END).end();
        assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{when}: {}", said.stderr);
        assert!(said.stderr.contains("not writable"), "{when}: {}", said.stderr);
    };
    mount.lock();
    refused("new");
    drop(mount);
    let mount = Mount::tmpfs(&fleet.home().state(), ROOM_KIB).unwrap();
    fleet.train(&[]);
    mount.lock();
    refused("with a run in it");
}

#[test]
fn a_state_directory_removed_under_a_live_coordinator_ends_it_with_a_clear_error() {
    let fleet = Fleet::new(&flights::config(100_000, 0), flights::shards(ROWS));
    let mut coordinator = fleet.coordinator(END);
    let mut workers = fleet.workers(&[]);
    coordinator.until_where("round", |line| line["round"] == 3);
    // What the process makes meanwhile may keep a folder from being removed.
    until(|| fs::remove_dir_all(fleet.home().state()).is_ok() || !fleet.home().state().exists());
    let said = coordinator.end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("state directory was removed"), "{}", said.stderr);
    assert!(workers.iter_mut().all(Running::runs), "workers stay");
}

/// The checkpoint of the newest round that is a file.
fn newest_checkpoint(state: &Path) -> PathBuf {
    let runs = fs::read_dir(state.join("runs")).unwrap().map(|entry| entry.unwrap().path());
    let files = runs.filter(|path| path.is_dir()).flat_map(|run| fs::read_dir(run).unwrap());
    let is_model = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("model-");
    files.map(|entry| entry.unwrap().path()).filter(is_model).max().unwrap()
}

#[test]
fn a_flipped_bit_anywhere_in_a_checkpoint_is_found_and_the_model_never_used() {
    let config = flights::config(3, 3400).replace("batch_size = 32", "batch_size = 256");
    let undisturbed = flights::undisturbed(&config, ROWS);
    let fleet = Fleet::new(&config, flights::shards(ROWS));
    let workers = fleet.workers(&[]);
    let mut coordinator = fleet.coordinator(END);
    coordinator.until_where("round", |line| line["round"] == 2);
    coordinator.kill();

    let mut draw = Draw::new(1, "flipped bits", 0, "");
    let newest = newest_checkpoint(&fleet.home().state());
    let bits = fs::metadata(&newest).unwrap().len() * 8;
    for _ in 1..FLIPS {
        let elsewhere = Home::new();
        copy(&fleet.home().state(), &elsewhere.state());
        flip(&newest_checkpoint(&elsewhere.state()), draw.below(bits));
        let config = fleet.home().path("run.toml").display().to_string();
        let mut coordinator = elsewhere.coordinator(&["--config", &config]);
        coordinator.until("listening");
        coordinator.until_stderr("damaged");
        coordinator.kill();
    }
    flip(&newest, draw.below(bits));
    let said = ended_well(fleet.coordinator(END));
    assert!(said.stderr.contains("damaged"), "{}", said.stderr);
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed.model());
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    undisturbed.assert_every_update_is_receipted(fleet.home());
}

fn flip(path: &Path, bit: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[usize::try_from(bit / 8).unwrap()] ^= 1 << (bit % 8);
    fs::write(path, bytes).unwrap();
}
