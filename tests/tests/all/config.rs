//! Config files, variables and flags that make no run, and which of them wins.

use std::process::Stdio;

use serde_json::Value;
use tributary_tests::{Home, Running, data, repository};

use crate::commandline::refusal;

/// Config files, and the whole sentence about each.
const REFUSED: &[(&str, &str)] = &[
    ("[train]\nrounds = = 3\n", "run.toml:2: not TOML: extra `=`, expected nothing"),
    (
        "[train]\nrounds = 3\nlearning_rat = 0.1\n",
        "run.toml:3: unknown key train.learning_rat; did you mean train.learning_rate?",
    ),
    ("[train]\nquorum = 0.5\n", "run.toml:2: unknown key train.quorum; did you mean rounds.quorum?"),
    ("train = 3\n", "run.toml:1: train is 3, expected a section: [train] in a line of its own"),
    ("rounds = 3\n", "run.toml:1: unknown key rounds; did you mean train.rounds?"),
    ("batch_size = 3\n", "run.toml:1: unknown key batch_size; did you mean train.batch_size?"),
    ("[trian]\nrounds = 3\n", "run.toml:2: unknown key trian.rounds; did you mean train.rounds?"),
    (
        "[train]\nrounds = \"many\"\n",
        "run.toml:2: train.rounds is \"many\", expected a whole number from 0 to 4294967295",
    ),
    ("[train]\nrounds = -3\n", "run.toml:2: train.rounds is -3, expected a whole number from 0 to 4294967295"),
    ("[train]\nrounds = 0\n", "run.toml:2: train.rounds is 0, expected 1 to 1000000"),
    (
        "[data]\ndrop = \"tailnum\"\n",
        "run.toml:2: data.drop is \"tailnum\", expected a list of strings, such as [\"tailnum\"]",
    ),
    (
        "[train]\nmode = \"federate\"\n",
        "run.toml:2: train.mode is \"federate\", expected \"federated\" or \"gradient\" or \"central\"",
    ),
    ("[rounds]\nquorum = 1.5\n", "run.toml:2: rounds.quorum is 1.5, expected above 0 and at most 1"),
    ("[rounds]\nfraction = 0\n", "run.toml:2: rounds.fraction is 0, expected above 0 and at most 1"),
    ("[rounds]\nmin_workers = 0\n", "run.toml:2: rounds.min_workers is 0, expected 1 to 2048"),
    ("[rounds]\ndeadline_s = 0.5\n", "run.toml:2: rounds.deadline_s is 0.5, expected 1 to 604800 seconds"),
    (
        "[train]\nbatch_size = 0\n",
        "run.toml:2: train.batch_size is 0, expected \"full\" or a whole number of at least 1",
    ),
    ("[train]\nlearning_rate = 0.0\n", "run.toml:2: train.learning_rate is 0.0, expected a number above 0"),
    ("[train]\nlearning_rate = nan\n", "run.toml:2: train.learning_rate is nan, expected a number above 0"),
    ("[train]\nmomentum = 1.0\n", "run.toml:2: train.momentum is 1.0, expected at least 0 and below 1"),
    ("[data]\nvalidation_fraction = 1\n", "run.toml:2: data.validation_fraction is 1, expected a number from 0 to 0.9"),
    ("[model]\nhidden = []\n", "run.toml:2: model.hidden is [], expected 1 to 16 widths, each 1 to 65536"),
    (
        "[model]\nkind = \"linear\"\nhidden = [8]\n",
        "run.toml:3: model.hidden is [8], expected no such key beside kind = \"linear\"",
    ),
    (
        "[train]\nmode = \"gradient\"\nlocal_epochs = 2\n",
        "run.toml:3: train.local_epochs is 2, expected 1: in mode \"gradient\" a round is one batch",
    ),
    (
        "[data]\nlabel = \"late\"\ndrop = [\"late\"]\n",
        "run.toml:3: data.drop is [\"late\"], expected a list without the label \"late\"",
    ),
];

#[test]
fn a_config_that_makes_no_run_is_refused_where_it_is_wrong() {
    let home = Home::new();
    let refused = |config: &str| refusal(&home.run("coordinator", &["--config", config]), 2);
    for (text, sentence) in REFUSED {
        home.write("run.toml", text);
        assert_eq!(refused("run.toml"), *sentence);
    }
    assert_eq!(refused("nowhere.toml"), "nowhere.toml: cannot read the config: No such file or directory (os error 2)");
    std::fs::create_dir(home.path("runs")).unwrap();
    assert_eq!(refused("runs"), "runs: cannot read the config: Is a directory (os error 21)");
    home.write("latin.toml", b"[data]\nlabel = \"Versp\xe4tung\"\n");
    assert!(
        refused("latin.toml").starts_with("latin.toml: cannot read the config: stream did not contain valid UTF-8")
    );
    assert!(!home.state().exists(), "what cannot start leaves nothing");
}

#[test]
fn a_variable_or_a_flag_is_named_where_it_is_what_is_wrong() {
    let home = Home::new();
    let refused = |variable: &str, value: &str| {
        let mut command = home.command("coordinator");
        refusal(&Running::start(variable, command.env(variable, value), Stdio::null()).end(), 2)
    };
    assert_eq!(
        refused("TRIBUTARY_TRAIN_SEED", "seven"),
        "TRIBUTARY_TRAIN_SEED: train.seed is seven, expected a whole number from 0 to 18446744073709551615"
    );
    assert_eq!(
        refused("TRIBUTARY_ROUNDS_QUORUM", "1.5"),
        "TRIBUTARY_ROUNDS_QUORUM: rounds.quorum is 1.5, expected above 0 and at most 1"
    );
    let flag = refusal(&home.run("coordinator", &["--rounds", "0"]), 2);
    assert_eq!(flag, "--rounds: train.rounds is 0, expected 1 to 1000000");
}

#[test]
fn flags_win_over_variables_which_win_over_the_file() {
    let home = Home::new();
    home.write("run.toml", "[train]\nrounds = 11\n");
    let rounds = |variable: Option<&str>, flags: &[&str]| {
        let mut command = home.command("coordinator");
        let (listen, http) = (home.address().to_string(), format!("127.0.0.1:{}", home.http_port()));
        command.args(["--config", "run.toml", "--listen", &listen, "--http", &http, "--json", "--new-run"]).args(flags);
        variable.map(|value| command.env("TRIBUTARY_TRAIN_ROUNDS", value));
        let mut coordinator = Running::start("coordinator", &mut command, Stdio::null());
        coordinator.until("listening");
        let page: Value = serde_json::from_str(&home.get("/status").unwrap()).unwrap();
        page["rounds"].as_u64().unwrap()
    };
    assert_eq!(rounds(None, &[]), 11);
    assert_eq!(rounds(Some("12"), &[]), 12);
    assert_eq!(rounds(Some("12"), &["--rounds", "13"]), 13);
}

#[test]
fn the_configs_that_we_ship_make_runs() {
    for name in ["coordinator.toml", "demo/flights.toml"] {
        let home = Home::new();
        let path = repository().join("deploy").join(name);
        home.coordinator(&["--config", path.to_str().unwrap()]).until("listening");
    }
}

#[test]
fn a_label_that_no_worker_has_is_said_on_both_sides_with_what_there_is() {
    let home = Home::new();
    home.write("run.toml", "[data]\nlabel = \"delayed\"\n");
    let mut coordinator = home.coordinator(&["--config", "run.toml"]);
    coordinator.until("listening");
    let sentence = "no column \"delayed\" for the label; there are \"x0\", \"x1\", \"colour\", \"label\"; name this file's own \
                    with --label";
    for name in ["a", "b"] {
        home.write(&format!("{name}.csv"), data::classes(1, 20));
        let said = home.run("worker", &["--data", &format!("{name}.csv")]);
        assert_eq!(refusal(&said, 1), format!("{name}.csv: {sentence}"));
        coordinator.until_stderr(&format!("{name} is gone: it does not take part: {name}.csv: {sentence}"));
    }
    assert!(coordinator.runs(), "a worker that has it may still come");
}

#[test]
fn another_plan_in_a_used_state_directory_is_refused_with_what_differs_and_nothing_is_lost() {
    let home = Home::new();
    let start = |config: &str, args: &[&str]| {
        home.write("run.toml", config);
        let mut all = vec!["--config", "run.toml"];
        all.extend(args);
        home.coordinator(&all)
    };
    let first = start("", &[]).until("listening")["run"].clone();
    for (config, difference) in [
        ("[train]\nlearning_rate = 0.1\n", "train.learning_rate was 0.05, is 0.1"),
        ("[data]\nlabel = \"late\"\n", "data.label was not given, is \"late\""),
        ("[model]\nkind = \"linear\"\n", "model.kind was \"mlp\", is \"linear\""),
        ("[train]\nrounds = 3\n", "train.rounds was 30, is 3"),
    ] {
        let sentence = refusal(&start(config, &[]).end(), 2);
        assert!(
            sentence.contains(&format!("{}: ", home.state().join("runs").join(first.as_str().unwrap()).display())),
            "{sentence}"
        );
        assert!(sentence.contains(difference) && sentence.contains("--new-run"), "{difference:?} is not in {sentence}");
    }
    assert_eq!(start("[rounds]\nquorum = 0.5\n[train]\nrounds = 31\n", &[]).until("listening")["run"], first);
    let second = start("[train]\nlearning_rate = 0.1\n", &["--new-run"]).until("listening")["run"].clone();
    assert_ne!(second, first);
    assert!(home.state().join("runs").join(first.as_str().unwrap()).is_dir(), "the old run is kept");
}
