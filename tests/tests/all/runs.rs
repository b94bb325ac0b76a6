//! Whole runs of the real binaries, as a user starts them, and the lines that other programs rely on.

use std::path::Path;
use std::time::Instant;

use serde_json::Value;
use tributary_tests::home::PATIENCE;
use tributary_tests::{Fleet, Home, Running, data, ended_well};

/// A model of few parameters, so that rounds are short.
pub(crate) const SMALL: &str = "[model]\nkind = \"linear\"\n[train]\nrounds = 3\nbatch_size = 16\n";

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

fn sum(lines: &[Value], field: &str) -> u64 {
    lines.iter().map(|line| line[field].as_u64().unwrap()).sum()
}

fn is_hash(value: &Value) -> bool {
    let text = value.as_str().unwrap();
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[test]
fn the_two_lines_work_exactly_as_written_even_if_the_workers_come_first() {
    let home = Home::new();
    let workers = ["a", "b"].map(|name| {
        let file = format!("{name}.csv");
        home.write(&file, data::classes(name.len() as u64, 120));
        let mut worker = home.start("worker", &["--data", &file]);
        worker.until_stderr("waiting for a coordinator on this machine");
        worker
    });
    let listen = format!("0.0.0.0:{}", home.address().port());
    let mut coordinator = home.start("coordinator", &["--listen", &listen]);
    coordinator.until_stderr("a third is waited for, 10 s at most");
    coordinator.until_stderr("done after 30 rounds");
    for worker in workers {
        let said = ended_well(worker);
        assert!(said.stderr.contains("done: 30 updates of this worker are in the model"), "{}", said.stderr);
        assert_eq!(said.stdout, "", "without --json all goes to stderr");
    }
    assert!(home.state().join("model/model.safetensors").is_file());
    assert!(home.get("/metrics").unwrap().contains("tributary_"), "it keeps serving its figures");
    assert!(coordinator.runs());
    coordinator.signal("INT");
    let said = ended_well(coordinator);
    assert_eq!(said.stdout, "");
    assert!(said.stderr.contains(&format!("listening on {listen}")), "{}", said.stderr);
}

#[test]
fn the_lines_of_a_classification_have_every_field_of_the_contract() {
    let fleet = Fleet::new(SMALL, [("a", data::classes(1, 300)), ("b", data::classes(2, 200))]);
    let coordinator = fleet.coordinator(&["--exit-when-done"]);
    let mut workers = fleet.workers(&[]);
    let joined: Vec<_> = workers.iter_mut().map(|worker| worker.until("joined")).collect();
    let said = ended_well(coordinator);
    let (rounds, done) = (said.lines("round"), &said.lines("done")[0]);
    assert_eq!(sum(&joined, "training_rows") + sum(&joined, "held_out_rows"), 500);
    for (round, number) in rounds.iter().zip(1..) {
        let fields =
            ["event", "round", "workers", "examples", "train_loss", "eval", "seconds", "model_hash"].map(str::to_owned);
        assert!(keys(round).iter().all(|key| fields.contains(&(*key).to_owned())), "{round}");
        assert_eq!(keys(round).len(), fields.len(), "{round}");
        assert_eq!((&round["round"], &round["workers"]), (&number.into(), &2.into()));
        assert_eq!(round["examples"].as_u64(), Some(sum(&joined, "training_rows")));
        assert!(round["train_loss"].as_f64().unwrap() > 0.0 && round["seconds"].as_f64().unwrap() > 0.0);
        assert!(is_hash(&round["model_hash"]), "{round}");
        is_classification(&round["eval"], sum(&joined, "held_out_rows"));
    }
    assert_eq!(rounds.len(), 3);
    assert_eq!(keys(done).len(), 5, "{done}");
    assert_eq!(done["rounds"], 3);
    assert_eq!(done["model_hash"], rounds[2]["model_hash"]);
    assert_eq!(Path::new(done["model"].as_str().unwrap()), fleet.home().state().join("model"));
    is_classification(&done["eval"], sum(&joined, "held_out_rows"));
    // A round evaluates the model that it started from, so the last model is better than any of them says.
    assert!(done["eval"]["loss"].as_f64() < rounds[0]["eval"]["loss"].as_f64());
    let last: Value = serde_json::from_str(said.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(&last, done, "done is the last line");
}

fn is_classification(eval: &Value, count: u64) {
    assert_eq!(keys(eval).len(), 4, "{eval}");
    assert_eq!(eval["count"].as_u64(), Some(count));
    assert!(eval["loss"].as_f64().unwrap() > 0.0);
    assert!((0.0..=1.0).contains(&eval["accuracy"].as_f64().unwrap()));
    assert!((0.0..=1.0).contains(&eval["auc"].as_f64().unwrap()));
}

#[test]
fn the_lines_of_a_regression_have_every_field_of_the_contract() {
    let fleet = Fleet::new(SMALL, [("a", data::numbers(1, 200)), ("b", data::numbers(2, 200))]);
    let told = fleet.train(&[]);
    for eval in told.rounds.iter().chain([&told.done]).map(|line| &line["eval"]) {
        assert_eq!(keys(eval).len(), 4, "{eval}");
        assert!(eval["loss"].as_f64().is_some() && eval["count"].as_u64().is_some(), "{eval}");
        assert!(eval["rmse"].as_f64().unwrap() > 0.0 && eval["r2"].as_f64().unwrap() <= 1.0, "{eval}");
    }
    assert!(told.done["eval"]["r2"].as_f64().unwrap() > 0.99, "{}", told.done);
}

#[test]
fn a_worker_says_what_its_own_file_calls_the_label() {
    let [(_, first), (_, second)] = two();
    let fleet = Fleet::new(
        &format!("[data]\nlabel = \"label\"\n{SMALL}"),
        [("a", first), ("b", second.replacen("label", "outcome", 1))],
    );
    let mut coordinator = fleet.coordinator(&["--exit-when-done"]);
    coordinator.until("listening");
    let said = fleet.worker("b", &[]).end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.contains("\"label\"") && said.stderr.contains("outcome"), "{}", said.stderr);
    let workers = [fleet.worker("a", &[]), fleet.worker("b", &["--label", "outcome"])];
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    assert_eq!(
        ended_well(coordinator).lines("done")[0]["model_hash"],
        Fleet::new(&format!("[data]\nlabel = \"label\"\n{SMALL}"), two()).train(&[]).done["model_hash"]
    );
}

#[test]
fn a_worker_that_finds_no_coordinator_any_more_keeps_trying_and_says_so_once() {
    let fleet = Fleet::new(SMALL, [("a", data::classes(1, 100))]);
    fleet.train(&[]);
    let mut worker = fleet.worker("a", &[]);
    let said = worker.until("unreachable");
    assert!(said["addresses"][0].as_str().unwrap().ends_with(&fleet.home().address().port().to_string()), "{said}");
    assert!(worker.runs());
    let mut coordinator = fleet.coordinator(&[]);
    assert_eq!(coordinator.until("round")["round"], 1, "after a finished run a new one begins");
    let said = ended_well(worker);
    assert_eq!(said.lines("unreachable").len(), 1, "{}", said.stdout);
}

#[test]
fn status_tells_what_is_going_on_and_abort_gives_it_up() {
    let fleet = Fleet::new(&format!("{SMALL}[rounds]\nquorum = 1.0\n"), two());
    let mut coordinator = fleet.coordinator(&["--rounds", "100000"]);
    let listening = coordinator.until("listening");
    let workers = fleet.workers(&[]);
    coordinator.until("round");
    // One is held up, so that the other's update is held and no round ends.
    workers[1].signal("STOP");
    let status = status_when(fleet.home(), |status| status["waiting_for"] == Value::from(vec!["b"]));
    assert_eq!(status["run"], listening["run"]);
    assert_eq!((&status["listening"], &status["rounds"]), (&true.into(), &100_000.into()));
    assert_eq!(status["workers"].as_array().unwrap().len(), 2, "{status}");
    let page: Value = serde_json::from_str(&fleet.home().get("/status").unwrap()).unwrap();
    assert_eq!((&page["stage"], &page["workers"]), (&status["stage"], &status["workers"]));

    ended_well(fleet.home().start("coordinator", &["abort"]));
    coordinator.until("aborted");
    workers[1].signal("CONT");
    for worker in workers {
        let said = worker.end();
        assert_eq!(said.code, Some(1), "{}", said.stderr);
        assert!(said.stderr.contains("error: the run was aborted by the coordinator's operator"), "{}", said.stderr);
    }
    let said = coordinator.end();
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.lines("done").is_empty());

    let again = fleet.coordinator(&["--exit-when-done"]);
    fleet.workers(&[]).into_iter().for_each(|worker| drop(ended_well(worker)));
    let said = ended_well(again);
    assert_ne!(said.lines("listening")[0]["run"], listening["run"], "what was given up does not come back");
    assert_eq!(said.lines("round")[0]["round"], 1);
}

/// What `coordinator status` says as soon as it is so.
fn status_when(home: &Home, is_so: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = serde_json::from_str(&ended_well(home.start("coordinator", &["status"])).stdout).unwrap();
        if is_so(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status}");
    }
}

pub(crate) fn two() -> [(&'static str, String); 2] {
    [("a", data::classes(1, 300)), ("b", data::classes(2, 200))]
}

#[test]
fn status_and_abort_say_that_nothing_runs() {
    let home = Home::new();
    for command in ["status", "abort"] {
        let said = home.run("coordinator", &[command]);
        assert_eq!(said.code, Some(1), "{}", said.stderr);
        assert!(
            said.stderr.starts_with("error: ") && said.stderr.contains("no coordinator runs here"),
            "{}",
            said.stderr
        );
    }
}

#[test]
fn misuse_is_2_and_failure_is_1() {
    let home = Home::new();
    for args in [&["--rounds", "many"][..], &["--listen", "here"], &["--frobnicate"], &["invite", "--uses", "0"]] {
        assert_eq!(home.run("coordinator", args).code, Some(2), "coordinator {args:?}");
    }
    for args in [&[][..], &["--data", "a.csv", "--threads", "0"], &["predict", "--model", "m"]] {
        assert_eq!(home.run("worker", args).code, Some(2), "worker {args:?}");
    }
    let said = home.run("worker", &["--data", "nowhere.csv"]);
    assert_eq!((said.code, said.stderr.as_str()), (Some(1), "error: nowhere.csv: no such file\n"));
    let said = home.run("coordinator", &["--config", "nowhere.toml"]);
    assert_eq!(said.code, Some(2), "{}", said.stderr);
    assert!(said.stderr.starts_with("error: nowhere.toml: cannot read the config: "), "{}", said.stderr);
    assert!(!home.state().exists(), "what cannot start leaves nothing");
}

#[test]
fn predictions_need_the_model_directory_alone() {
    let fleet = Fleet::new(SMALL, two());
    fleet.train(&[]);
    let elsewhere = Home::new();
    let model = elsewhere.path("some/where");
    copy(&fleet.home().state().join("model"), &model);
    drop(fleet);
    let rows =
        ["1.5,-1,red,k1", "-1.5,1,blue,\"k2, \"\"quoted\"\"\"", "0.1,,green,k3", "2,-2,never seen,", "7,7,NA,k5"];
    elsewhere.write("new.csv", format!("x0,x1,colour,key\n{}\n", rows.join("\n")));
    let args = ["predict", "--model", model.to_str().unwrap(), "--data", "new.csv", "--out", "p.csv"];
    ended_well(elsewhere.start("worker", &args));
    let text = std::fs::read_to_string(elsewhere.path("p.csv")).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("x0,x1,colour,key,prediction,probability_0,probability_1"));
    for (row, line) in rows.iter().zip(lines.by_ref()) {
        let added = line.strip_prefix(&format!("{row},")).unwrap_or_else(|| panic!("{row:?} became {line:?}"));
        let added: Vec<f64> = added.split(',').map(|cell| cell.parse().unwrap()).collect();
        assert!((added[1] + added[2] - 1.0).abs() < 1e-6, "{line}");
        assert_eq!(added[0], if added[1] > added[2] { 0.0 } else { 1.0 }, "{line}");
    }
    assert_eq!(lines.next(), None, "one line for each row");
    assert!(text.lines().nth(1).unwrap().starts_with("1.5,-1,red,k1,1,"), "{text}");
    assert!(text.lines().nth(2).unwrap().contains(",0,"), "{text}");

    elsewhere.write("new.csv", "x0,key\n1,2\n");
    let said = elsewhere.run("worker", &args);
    assert_eq!(said.code, Some(1));
    assert!(said.stderr.contains("\"x1\"") || said.stderr.contains("\"colour\""), "{}", said.stderr);
    assert!(said.stderr.starts_with("error: new.csv"), "{}", said.stderr);
}

pub(crate) fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else if entry.path().is_file() {
            // A socket that a killed process left is none.
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

#[test]
fn a_program_that_stops_reading_does_not_stop_the_run() {
    let fleet = Fleet::new(SMALL, two());
    let mut coordinator = fleet.coordinator(&["--exit-when-done"]);
    coordinator.until("listening");
    coordinator.close_stdout();
    let workers: Vec<Running> = fleet.workers(&[]);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    let said = ended_well(coordinator);
    assert!(said.stderr.contains("done after 3 rounds"), "{}", said.stderr);
}
