//! States that are not what the programs left: of another run, of a later version, torn, copied, or met with another clock.
//!
//! Two coordinators on one state are in `state.rs`, a worker restored from an old backup in `worker/tests/loopback.rs`, and a
//! flipped bit anywhere in a journal in the coordinator's store.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tributary_tests::{Fleet, Home, Running, ended_well, flights, tool};

use crate::runs::{SMALL, copy, two};

const END: &[&str] = &["--exit-when-done"];
const ROWS: usize = 300;
/// So many rounds that nothing is over before it is stopped.
const MANY: &str = "100000";

/// A run that was killed in its middle, and its workers, who wait.
fn killed_in_its_middle(config: &str) -> (Fleet, Vec<Running>) {
    let fleet = Fleet::new(config, flights::shards(ROWS));
    let workers = fleet.workers(&[]);
    let mut coordinator = fleet.coordinator(END);
    coordinator.until_where("round", |line| line["round"] == 3);
    coordinator.kill();
    (fleet, workers)
}

fn journal(fleet: &Fleet) -> PathBuf {
    fleet.runs()[0].join("journal-000001")
}

fn refused(fleet: &Fleet, expected: &str) {
    let before = fs::read(journal(fleet)).unwrap();
    let said = fleet.coordinator(END).end();
    assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""), "{}", said.stderr);
    assert!(said.stderr.contains("journal-000001") && said.stderr.contains(expected), "{}", said.stderr);
    assert_eq!(fs::read(journal(fleet)).unwrap(), before, "nothing was changed");
}

#[test]
fn a_journal_of_a_later_version_and_one_of_another_run_are_refused_by_name() {
    let config = flights::config(100_000, 0);
    let ((fleet, _workers), (other, _others)) = (killed_in_its_middle(&config), killed_in_its_middle(&config));
    let whole = fs::read(journal(&fleet)).unwrap();
    let mut later = whole.clone();
    later[8] += 1;
    fs::write(journal(&fleet), later).unwrap();
    refused(&fleet, "this program reads version");
    fs::copy(journal(&other), journal(&fleet)).unwrap();
    refused(&fleet, "expected run");
}

#[test]
fn a_journal_whose_last_record_is_torn_is_cut_and_the_model_is_the_same() {
    let config = flights::config(12, 0);
    let undisturbed = flights::undisturbed(&config, ROWS);
    let (fleet, workers) = killed_in_its_middle(&config);
    let file = fs::OpenOptions::new().append(true).open(journal(&fleet)).unwrap();
    std::io::Write::write_all(&mut &file, &[0x5a; 70]).unwrap();
    let said = ended_well(fleet.coordinator(END));
    assert!(said.stderr.contains("torn at offset"), "{}", said.stderr);
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed.model());
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    undisturbed.assert_every_update_is_receipted(fleet.home());
}

#[test]
fn of_a_worker_and_its_copy_on_a_second_machine_the_later_one_stays() {
    let fleet = Fleet::new(SMALL, two());
    let mut coordinator = fleet.coordinator(&["--rounds", MANY]);
    let mut workers = fleet.workers(&[]);
    coordinator.until("round");
    let second = Home::new();
    copy(&fleet.home().path("tributary/worker"), &second.path("tributary/worker"));
    fs::copy(fleet.home().path("tributary/join"), second.path("tributary/join")).unwrap();
    // A state belongs to one data file, by its path.
    let data = fleet.home().path("a.csv").display().to_string();
    let mut copied = second.start("worker", &["--data", &data, "--json"]);
    copied.until("joined");
    let said = workers.remove(0).end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("another process with this worker's identity has joined"), "{}", said.stderr);
    assert_eq!(coordinator.until("gone")["reason"], "a newer process with its identity came");
    let next = coordinator.until("round")["round"].as_u64().unwrap();
    coordinator.until_where("round", |line| line["round"].as_u64() > Some(next + 1) && line["workers"] == 2);
    assert!(copied.runs());
}

/// A worker of the fleet whose clock is elsewhere.
fn worker_at(fleet: &Fleet, library: &Path, offset: &str) -> Running {
    let mut command = fleet.home().command("worker");
    command.arg("--data").arg(fleet.home().path("a.csv")).arg("--json");
    command.env("LD_PRELOAD", library).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    Running::start(&format!("worker at {offset}"), &mut command, Stdio::null())
}

#[test]
fn a_worker_whose_clock_is_set_back_a_year_says_what_is_wrong_and_is_in_when_it_is_right() {
    let Some(library) = tool("TRIBUTARY_FAKETIME", "a clock set back a year") else { return };
    let fleet = Fleet::new(SMALL, two());
    let mut coordinator = fleet.coordinator(&["--rounds", MANY]);
    let mut workers = fleet.workers(&[]);
    coordinator.until("round");
    workers.remove(0).kill();
    let mut back = worker_at(&fleet, &library, "-365d");
    let said = back.until("unreachable");
    assert!(said["error"].as_str().unwrap().contains("certificate not valid yet"), "{said}");
    back.kill();
    let mut right = fleet.worker("a", &[]);
    right.until("joined");
    coordinator.until_where("round", |line| line["workers"] == 2);
}
