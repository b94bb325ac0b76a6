//! What survives: killed and stopped processes, restarts with the same and with other settings, damaged models.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;
use tributary_tests::{Fleet, Running, Said, data, ended_well};

use crate::runs::{SMALL, two};

/// Rounds long enough to be killed in, and so many that no run is over before it is killed.
const SLOW: &str =
    "[model]\nkind = \"linear\"\n[train]\nrounds = 50\nlocal_epochs = 10\nbatch_size = 16\n[rounds]\nquorum = 1.0\n";
const ROUNDS: usize = 50;
const MORE_ROUNDS: usize = 55;

const END: &[&str] = &["--exit-when-done"];

fn slow() -> Fleet {
    Fleet::new(SLOW, two())
}

/// The model after this round if nobody disturbs the fleet.
fn undisturbed_after(round: usize) -> &'static Value {
    static LINES: OnceLock<Vec<Value>> = OnceLock::new();
    let run = || Fleet::new(&SLOW.replace("rounds = 50", "rounds = 55"), two()).train(&[]).rounds;
    let lines = LINES.get_or_init(run);
    assert_eq!(lines.len(), MORE_ROUNDS);
    &lines[round - 1]["model_hash"]
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
    assert_eq!(&model_after_kills_at(&[1]), undisturbed_after(ROUNDS));
}

#[test]
fn a_coordinator_that_is_killed_again_and_again_ends_with_the_same_model() {
    assert_eq!(&model_after_kills_at(&[1, 2, 3, 5, 8]), undisturbed_after(ROUNDS));
}

#[test]
fn a_coordinator_killed_while_it_commits_ends_with_the_same_model() {
    let fleet = slow();
    let workers = fleet.workers(&[]);
    for _ in 0..4 {
        let mut coordinator = fleet.coordinator(END);
        coordinator.until_where("stage", |line| line["stage"] == "committing");
        coordinator.kill();
    }
    let said = ended_well(fleet.coordinator(END));
    assert_eq!(&said.lines("done")[0]["model_hash"], undisturbed_after(ROUNDS));
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
}

#[test]
fn a_coordinator_that_comes_back_elsewhere_is_found_by_the_workers_of_its_machine() {
    let fleet = slow();
    let mut workers = fleet.workers(&[]);
    let line = down_after(&fleet, 2, Running::kill);
    workers.iter_mut().for_each(Running::kill);
    let workers = fleet.workers(&[]);
    let config = fleet.home().path("run.toml").display().to_string();
    let args = ["--config", &config, "--listen", "127.0.0.1:0", "--min-workers", "2", "--json", "--exit-when-done"];
    let said = ended_well(fleet.home().start("coordinator", &args));
    goes_on(&line, &said);
    assert_ne!(said.lines("listening")[0]["address"], fleet.home().address().to_string());
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
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
    assert_eq!(&said.lines("done")[0]["model_hash"], undisturbed_after(ROUNDS));
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
    assert_eq!(&done["model_hash"], undisturbed_after(ROUNDS));
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
    assert_eq!(&ended_well(coordinator).lines("done")[0]["model_hash"], undisturbed_after(ROUNDS));
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
    assert_eq!(&said.lines("done")[0]["model_hash"], undisturbed_after(ROUNDS));
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

/// A model above a mebibyte, which is a file of its own.
fn large() -> String {
    let config = SLOW.replace("kind = \"linear\"", "kind = \"mlp\"\nhidden = [600, 450]");
    config
        .replace("epochs = 10", "epochs = 1")
        .replace("batch_size = 16", "batch_size = 64")
        .replace("rounds = 50", "rounds = 4")
}

#[test]
fn the_last_three_models_are_kept() {
    let fleet = Fleet::new(&large(), two());
    fleet.train(&[]);
    let names = fleet.models();
    assert_eq!(names.len(), 3, "{names:?}");
    let left: Vec<_> = std::fs::read_dir(&fleet.runs()[0]).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let is_left = |name: &str| name.ends_with(".aside") || name.starts_with("payload-");
    assert!(!left.iter().any(|name| is_left(&name.to_string_lossy())), "{left:?}");
}

fn flip_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_flipped_bit_in_the_newest_model_is_found_and_its_round_is_made_again() {
    let undisturbed = Fleet::new(&large(), two()).train(&[]);
    let fleet = Fleet::new(&large(), two());
    let workers = fleet.workers(&[]);
    down_after(&fleet, 3, Running::kill);
    let newest = fleet.models().pop().unwrap();
    flip_a_bit(&newest);
    let said = ended_well(fleet.coordinator(END));
    assert!(said.stderr.contains("warning: the model of round 3 is damaged"), "{}", said.stderr);
    assert!(said.stderr.contains("is made again, with the same model"), "{}", said.stderr);
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed.done["model_hash"]);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
}

#[test]
fn a_run_whose_journal_is_damaged_is_not_silently_begun_anew() {
    let fleet = slow();
    let _workers = fleet.workers(&[]);
    down_after(&fleet, 3, Running::kill);
    let journal = fleet.runs()[0].join("journal-000001");
    let mut bytes = std::fs::read(&journal).unwrap();
    // In the first record, which says who started.
    bytes[150] ^= 0x10;
    std::fs::write(&journal, &bytes).unwrap();
    let said = fleet.coordinator(END).end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("journal-000001") && said.stderr.contains("--new-run"), "{}", said.stderr);
    assert_eq!(std::fs::read(&journal).unwrap(), bytes, "nothing was changed");
}

#[test]
fn more_rounds_go_on_and_give_the_model_of_a_run_that_had_them_from_the_start() {
    let fleet = slow();
    let workers = fleet.workers(&[]);
    let line = down_after(&fleet, 2, Running::kill);
    let said = ended_well(fleet.coordinator(&["--exit-when-done", "--rounds", "55"]));
    goes_on(&line, &said);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    let done = &said.lines("done")[0];
    assert_eq!(done["rounds"], MORE_ROUNDS);
    assert_eq!(&done["model_hash"], undisturbed_after(MORE_ROUNDS));
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
    assert_eq!(said.lines("done")[0]["rounds"], ROUNDS);
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
    assert!(said.stderr.contains("train.rounds was 50, is 7"), "{}", said.stderr);
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
    let fleet = Fleet::new(SMALL, two());
    fleet.home().write("late.csv", data::classes(3, 200));
    let mut coordinator = fleet.coordinator(&["--rounds", "100000"]);
    let _workers = fleet.workers(&[]);
    coordinator.until("round");
    let _late = fleet.worker("late", &[]);
    coordinator.until_where("round", |line| line["workers"] == 3);
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

/// Rounds that go on without a worker that takes too long: it is held up, not gone.
fn impatient(quorum: f64) -> (Fleet, Running, Vec<Running>) {
    let fleet = Fleet::new(&format!("{SMALL}[rounds]\nquorum = {quorum:?}\ndeadline_s = 1\n"), two());
    let mut coordinator = fleet.coordinator(&["--rounds", "100000"]);
    let workers = fleet.workers(&[]);
    coordinator.until("round");
    workers[1].signal("STOP");
    (fleet, coordinator, workers)
}

#[test]
fn a_late_worker_is_not_waited_for_past_the_deadline_and_may_come_back() {
    let (_fleet, mut coordinator, workers) = impatient(0.5);
    let alone = coordinator.until_where("round", |line| line["workers"] == 1);
    assert!(alone["seconds"].as_f64().unwrap() >= 1.0, "it was given its time: {alone}");
    workers[1].signal("CONT");
    coordinator.until_where("round", |line| line["workers"] == 2);
}

#[test]
fn under_quorum_the_run_pauses_and_says_for_whom_it_waits() {
    let (_fleet, mut coordinator, workers) = impatient(1.0);
    assert_eq!(coordinator.until("paused")["reason"], "waiting for b");
    assert!(coordinator.stderr().contains("goes on past its deadline, under quorum (3 of 3)"));
    workers[1].signal("CONT");
    coordinator.until("resumed");
    coordinator.until_where("round", |line| line["workers"] == 2);
}

#[test]
fn updates_too_large_for_one_message_survive_kills_too() {
    let config =
        SLOW.replace("kind = \"linear\"", "kind = \"mlp\"\nhidden = [300, 200]").replace("epochs = 10", "epochs = 1");
    let config = config.replace("rounds = 50", "rounds = 10");
    let undisturbed = Fleet::new(&config, two()).train(&[]);
    let fleet = Fleet::new(&config, two());
    let workers = fleet.workers(&[]);
    let mut last = None;
    for round in [1, 2] {
        last = Some(down_after(&fleet, round, Running::kill));
    }
    let said = ended_well(fleet.coordinator(END));
    goes_on(&last.unwrap(), &said);
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed.done["model_hash"]);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
}

#[test]
fn a_coordinator_killed_in_the_last_evaluation_or_after_it_leaves_the_same_model() {
    for (event, field, value) in [("stage", "stage", "evaluating"), ("done", "event", "done")] {
        let fleet = Fleet::new(SMALL, two());
        let mut coordinator = fleet.coordinator(END);
        let mut workers = fleet.workers(&[]);
        coordinator.until_where(event, |line| line[field] == value);
        coordinator.kill();
        workers.iter_mut().for_each(Running::kill);
        let told = Fleet::new(SMALL, two()).train(&[]);
        let again = fleet.coordinator(END);
        let workers = fleet.workers(&[]);
        let said = ended_well(again);
        assert_eq!(said.lines("done")[0]["model_hash"], told.done["model_hash"], "{value}: {}", said.stdout);
        assert_eq!(said.lines("done")[0]["eval"], told.done["eval"]);
        assert!(fleet.home().state().join("model/model.json").is_file());
        drop(workers);
    }
}

#[test]
fn a_worker_that_waits_for_a_coordinator_ends_when_it_is_told_to() {
    let fleet = Fleet::new(SMALL, two());
    let mut worker = fleet.worker("a", &[]);
    worker.until("waiting");
    worker.signal("TERM");
    assert_eq!(ended_well(worker).lines("stopped").len(), 1);
}

#[test]
fn a_worker_killed_in_the_last_evaluation_and_started_again_is_let_go_like_the_others() {
    let fleet = Fleet::new(SMALL, two());
    // It stays when the run is over: one that ends may be gone before the worker is back, and then nobody lets it go.
    let coordinator = fleet.coordinator(&[]);
    let steady = fleet.worker("a", &[]);
    let mut killed = fleet.worker("b", &[]);
    // Its task is open or held, and its connection is not known to be dead for a while.
    killed.until_where("round", |line| line["kind"] == "evaluation");
    killed.kill();
    let again = fleet.worker("b", &[]);
    [steady, again].into_iter().for_each(|process| drop(ended_well(process)));
    coordinator.signal("TERM");
    assert_eq!(ended_well(coordinator).lines("done").len(), 1);
}
