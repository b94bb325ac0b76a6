//! What survives: killed and stopped processes, restarts with the same and with other settings, damaged checkpoints.

use std::path::Path;

use serde_json::Value;
use tributary_tests::{Fleet, Running, Said, data, ended_well};

use crate::runs::{SMALL, two};

/// Rounds long enough to be killed in: a few dozen milliseconds each.
const SLOW: &str =
    "[model]\nkind = \"linear\"\n[train]\nrounds = 8\nlocal_epochs = 20\nbatch_size = 16\n[rounds]\nquorum = 1.0\n";

const END: &[&str] = &["--exit-when-done"];

fn slow() -> Fleet {
    Fleet::new(SLOW, two())
}

/// The model that nobody disturbed.
fn undisturbed() -> Value {
    slow().train(&[]).done["model_hash"].clone()
}

fn round_of(line: &Value) -> u64 {
    line["round"].as_u64().unwrap()
}

/// A coordinator that was stopped after `before` goes on there: the last committed line again, then the next ones.
fn goes_on(before: &Value, said: &Said) {
    let rounds = said.lines("round");
    let first = round_of(&rounds[0]);
    assert_eq!(round_of(&said.lines("listening")[0]), first, "{}", said.stdout);
    assert!(first >= round_of(before), "{before} was committed, and then {}", said.stdout);
    if first == round_of(before) {
        assert_eq!(&rounds[0], before, "the last committed line is repeated as it was");
    }
    for (line, round) in rounds.iter().zip(first..) {
        assert_eq!(round_of(line), round, "{}", said.stdout);
    }
}

/// Starts, waits until the line of `round`, and brings it down.
fn down_after(fleet: &Fleet, round: u64, how: impl FnOnce(&mut Running)) -> Value {
    let mut coordinator = fleet.coordinator(END);
    let line = coordinator.until_where("round", |line| round_of(line) >= round);
    how(&mut coordinator);
    line
}

fn model_after_kills_at(rounds: &[u64]) -> Value {
    let fleet = slow();
    let workers = fleet.workers(&[]);
    let mut last = None;
    for round in rounds {
        last = Some(down_after(&fleet, *round, Running::kill));
    }
    let said = ended_well(fleet.coordinator(END));
    goes_on(&last.unwrap(), &said);
    for worker in workers {
        let said = ended_well(worker);
        assert!(said.lines("receipt").len() >= 2, "{}", said.stdout);
    }
    said.lines("done")[0]["model_hash"].clone()
}

#[test]
fn a_killed_coordinator_goes_on_and_ends_with_the_same_model() {
    assert_eq!(model_after_kills_at(&[1]), undisturbed());
}

#[test]
fn a_coordinator_that_is_killed_again_and_again_ends_with_the_same_model() {
    assert_eq!(model_after_kills_at(&[1, 2, 3, 5, 6]), undisturbed());
}

#[test]
fn a_coordinator_killed_before_the_first_round_ends_with_the_same_model() {
    let fleet = slow();
    let workers = fleet.workers(&[]);
    for stage in ["surveying", "training"] {
        let mut coordinator = fleet.coordinator(END);
        coordinator.until_where("stage", |line| line["stage"] == stage);
        coordinator.kill();
    }
    let said = ended_well(fleet.coordinator(END));
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed());
}

#[test]
fn a_killed_worker_comes_back_and_the_model_is_the_same() {
    let fleet = slow();
    let mut coordinator = fleet.coordinator(END);
    let steady = fleet.worker("a", &[]);
    let mut killed = fleet.worker("b", &[]);
    for round in [1, 3, 4] {
        coordinator.until_where("round", |line| round_of(line) >= round);
        killed.kill();
        killed = fleet.worker("b", &[]);
    }
    let done = coordinator.until("done");
    assert_eq!(done["model_hash"], undisturbed());
    [steady, killed, coordinator].into_iter().for_each(|process| drop(ended_well(process)));
}

#[test]
fn a_worker_killed_while_it_surveys_or_trains_comes_back_and_the_model_is_the_same() {
    let fleet = slow();
    let coordinator = fleet.coordinator(END);
    let steady = fleet.worker("a", &[]);
    let mut killed = fleet.worker("b", &[]);
    killed.until("joined");
    killed.kill();
    killed = fleet.worker("b", &[]);
    killed.until_where("round", |line| line["kind"] == "survey");
    killed.kill();
    killed = fleet.worker("b", &[]);
    killed.until_where("round", |line| line["kind"] == "update");
    killed.kill();
    killed = fleet.worker("b", &[]);
    assert_eq!(ended_well(coordinator).lines("done")[0]["model_hash"], undisturbed());
    [steady, killed].into_iter().for_each(|process| drop(ended_well(process)));
}

fn stopped_by(signal: &str) {
    let fleet = slow();
    let mut workers = fleet.workers(&[]);
    let mut coordinator = fleet.coordinator(END);
    let line = coordinator.until_where("round", |line| round_of(line) >= 2);
    coordinator.signal(signal);
    let said = ended_well(coordinator);
    assert!(said.stderr.contains("going away"), "{}", said.stderr);
    assert!(said.lines("done").is_empty());
    let last = said.lines("round").pop().unwrap_or(line);
    for worker in &mut workers {
        worker.until("disconnected");
        assert!(worker.runs(), "workers stay");
    }
    let said = ended_well(fleet.coordinator(END));
    goes_on(&last, &said);
    assert_eq!(round_of(&said.lines("listening")[0]), round_of(&last), "nothing was lost and nothing came after");
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed());
}

#[test]
fn ctrl_c_says_goodbye_keeps_everything_and_the_workers_stay() {
    stopped_by("INT");
}

#[test]
fn so_does_sigterm() {
    stopped_by("TERM");
}

#[test]
fn a_worker_that_is_told_to_stop_says_goodbye_and_ends_with_0() {
    let fleet = Fleet::new(SMALL, two());
    let mut coordinator = fleet.coordinator(END);
    let mut worker = fleet.worker("a", &[]);
    worker.until("joined");
    worker.signal("INT");
    assert_eq!(ended_well(worker).lines("stopped").len(), 1);
    assert_eq!(coordinator.until("gone")["name"], "a");
}

#[test]
fn the_last_three_checkpoints_are_kept() {
    let fleet = Fleet::new(SMALL, two());
    fleet.train(&[]);
    let names = fleet.checkpoints();
    assert_eq!(names.len(), 3, "{names:?}");
    let left: Vec<_> = std::fs::read_dir(&fleet.runs()[0]).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".aside")), "{left:?}");
}

fn flip_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_flipped_bit_in_the_newest_checkpoint_is_found_and_the_one_before_is_used() {
    let fleet = slow();
    let workers = fleet.workers(&[]);
    down_after(&fleet, 3, Running::kill);
    let newest = fleet.checkpoints().pop().unwrap();
    let mut whole = fleet.coordinator(END);
    let committed = round_of(&whole.until("listening"));
    whole.kill();
    assert_eq!(fleet.checkpoints().pop().unwrap(), newest, "it was killed before it could commit another");

    flip_a_bit(&newest);
    let said = ended_well(fleet.coordinator(END));
    assert_eq!(round_of(&said.lines("listening")[0]), committed - 1);
    let name = newest.file_name().unwrap().to_string_lossy().into_owned();
    let loud = said.stderr.lines().find(|line| line.contains(&name)).unwrap_or_else(|| panic!("{}", said.stderr));
    assert!(loud.contains("damaged"), "{loud}");
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed());
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
}

#[test]
fn a_run_of_which_no_checkpoint_is_whole_is_not_silently_begun_anew() {
    let fleet = slow();
    let _workers = fleet.workers(&[]);
    down_after(&fleet, 3, Running::kill);
    let checkpoints = fleet.checkpoints();
    checkpoints.iter().for_each(|path| flip_a_bit(path));
    let said = fleet.coordinator(END).end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("damaged") && said.stderr.contains("--new-run"), "{}", said.stderr);
    assert_eq!(fleet.checkpoints(), checkpoints, "nothing was removed");
}

#[test]
fn more_rounds_go_on_and_give_the_model_of_a_run_that_had_them_from_the_start() {
    let fleet = slow();
    let workers = fleet.workers(&[]);
    let line = down_after(&fleet, 2, Running::kill);
    let said = ended_well(fleet.coordinator(&["--exit-when-done", "--rounds", "10"]));
    goes_on(&line, &said);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    let done = &said.lines("done")[0];
    assert_eq!(done["rounds"], 10);
    let from_the_start = Fleet::new(&SLOW.replace("rounds = 8", "rounds = 10"), two()).train(&[]);
    assert_eq!(done["model_hash"], from_the_start.done["model_hash"]);
}

#[test]
fn another_plan_is_refused_by_name_until_a_new_run_is_asked_for() {
    let fleet = slow();
    let workers = fleet.workers(&[]);
    let mut coordinator = fleet.coordinator(END);
    let former = coordinator.until("listening")["run"].clone();
    coordinator.until("round");
    coordinator.kill();
    fleet.home().write("run.toml", SLOW.replace("[rounds]", "learning_rate = 0.125\n[rounds]"));
    let said = fleet.coordinator(END).end();
    assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""));
    assert!(said.stderr.contains("train.learning_rate was 0.05, is 0.125"), "{}", said.stderr);
    assert!(said.stderr.contains("--new-run"), "{}", said.stderr);

    let said = ended_well(fleet.coordinator(&["--exit-when-done", "--new-run"]));
    assert_ne!(said.lines("listening")[0]["run"], former);
    assert_eq!(round_of(&said.lines("round")[0]), 1);
    assert_eq!(said.lines("done")[0]["rounds"], 8);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    assert_eq!(fleet.runs().len(), 2, "the former run is kept");
}

#[test]
fn fewer_rounds_than_before_are_another_plan() {
    let fleet = slow();
    let _workers = fleet.workers(&[]);
    down_after(&fleet, 1, Running::kill);
    let said = fleet.coordinator(&["--exit-when-done", "--rounds", "7"]).end();
    assert_eq!(said.code, Some(2), "{}", said.stderr);
    assert!(said.stderr.contains("train.rounds was 8, is 7"), "{}", said.stderr);
}

#[test]
fn a_finished_run_is_told_again_at_once_or_followed_by_a_new_one() {
    let fleet = Fleet::new(SMALL, two());
    let told = fleet.train(&[]);
    let model = fleet.home().state().join("model/model.safetensors");
    let before = std::fs::read(&model).unwrap();
    let said = ended_well(fleet.coordinator(END));
    assert_eq!(said.lines("done")[0], told.done, "nobody is there, and nobody is needed");
    assert_eq!(said.lines("round")[0], told.rounds[2], "the last committed line, again");
    assert_eq!(std::fs::read(&model).unwrap(), before);

    let mut coordinator = fleet.coordinator(&[]);
    assert_eq!(coordinator.until("listening")["round"], 0, "without --exit-when-done a new run begins");
    let workers = fleet.workers(&[]);
    assert_eq!(coordinator.until("done")["model_hash"], told.done["model_hash"], "the same plan and data");
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    assert!(coordinator.runs(), "it keeps serving");
    assert_eq!(fleet.runs().len(), 2);
}

#[test]
fn a_worker_that_joins_later_takes_part() {
    let fleet = Fleet::new(&SLOW.replace("quorum = 1.0", "quorum = 0.5"), two());
    fleet.home().write("late.csv", data::classes(3, 200));
    let mut coordinator = fleet.coordinator(END);
    let workers = fleet.workers(&[]);
    coordinator.until("round");
    let late = fleet.worker("late", &[]);
    coordinator.until_where("round", |line| line["workers"] == 3);
    workers.into_iter().chain([late, coordinator]).for_each(|process| drop(ended_well(process)));
}

#[test]
fn a_state_directory_has_one_live_owner() {
    let fleet = Fleet::new(SMALL, two());
    let mut coordinator = fleet.coordinator(END);
    coordinator.until("listening");
    let mut worker = fleet.worker("a", &[]);
    worker.until("joined");
    let said = fleet.coordinator(END).end();
    assert_eq!((said.code, said.stdout.as_str()), (Some(1), ""));
    let holder = format!("in use by another coordinator, process {}", coordinator.id());
    assert!(said.stderr.contains(&holder), "{}", said.stderr);
    let said = fleet.worker("a", &[]).end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains(&format!("in use by a live worker (process {})", worker.id())), "{}", said.stderr);
    assert!(worker.runs() && coordinator.runs());
}
