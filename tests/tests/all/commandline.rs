//! Command lines that cannot be done: what is said about each, with which exit status, and that nothing is lost.

use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use learning::{ColumnSchema, Encoding, SavedModel, Schema, Target};
use protocol::evaluation::EvaluationSummary;
use protocol::invitation::Invitation;
use protocol::plan::ModelSpec;
use tributary_tests::{Home, Running, Said, data, ended_well};

/// The sentence with which a process ended that could not do what was asked: the one after `error: `, which is the last
/// line on stderr. Neither a panic nor the insides of an error are a sentence.
pub(crate) fn refusal(said: &Said, code: i32) -> String {
    assert_eq!(said.code, Some(code), "{}", said.stderr);
    assert!(!said.stdout.contains("\"done\""), "{}", said.stdout);
    for insides in ["panicked", "backtrace", "Error {", "Error(", "Some(", "Os {", "kind:", "null"] {
        assert!(!said.stderr.contains(insides), "{insides:?} is in {}", said.stderr);
    }
    let last = said.stderr.lines().last().unwrap_or_default();
    let sentence = last.strip_prefix("error: ").unwrap_or_else(|| panic!("no error ends {:?}", said.stderr));
    let parts: Vec<&str> = sentence.split(": ").collect();
    assert!(parts.windows(2).all(|pair| pair[0] != pair[1]), "said twice: {sentence}");
    sentence.to_owned()
}

/// What a command line is told that is misused.
fn misuse(home: &Home, binary: &str, args: &[&str]) -> String {
    let said = home.run(binary, args);
    assert_eq!((said.code, said.stdout.as_str()), (Some(2), ""), "{binary} {args:?}: {}", said.stderr);
    assert!(said.stderr.starts_with("error: ") && said.stderr.contains("try '--help'"), "{}", said.stderr);
    said.stderr
}

// --- the words ---

#[test]
fn a_command_line_that_is_misused_is_status_2_with_help() {
    let home = Home::new();
    for (binary, args, sentence) in [
        ("coordinator", &["--lisen", "0.0.0.0:1"][..], "unexpected argument '--lisen' found"),
        (
            "coordinator",
            &["--listen", "here"],
            "invalid value 'here' for '--listen <ADDRESS>': expected IP:PORT, such as 0.0.0.0:4433",
        ),
        ("coordinator", &["--rounds", "many"], "invalid value 'many' for '--rounds <N>'"),
        ("coordinator", &["invit"], "unrecognized subcommand 'invit'"),
        ("coordinator", &["revoke"], "the following required arguments were not provided"),
        ("coordinator", &["invite", "--uses", "0"], "invalid value '0' for '--uses <N>'"),
        ("coordinator", &["invite", "--expires", "soon"], "\"soon\" is not a time such as 90s, 15m, 12h or 7d"),
        ("worker", &[], "--data <FILE>"),
        ("worker", &["--dat", "a.csv"], "a similar argument exists: '--data'"),
        ("worker", &["predct"], "a similar subcommand exists: 'predict'"),
        ("worker", &["--data", "a.csv", "--threads", "0"], "invalid value '0' for '--threads <N>'"),
        ("worker", &["--data", "a.csv", "--name", "a/b"], "'--name <NAME>'"),
        ("worker", &["predict", "--model", "m"], "--data <FILE>"),
    ] {
        let told = misuse(&home, binary, args);
        assert!(told.contains(sentence), "{sentence:?} is not in {told}");
    }
    assert!(!home.state().exists(), "what is misused leaves nothing");
}

#[test]
fn help_and_version_are_told_on_stdout() {
    let home = Home::new();
    let told = |binary: &str, args: &[&str]| ended_well(home.start(binary, args)).stdout;
    for binary in ["coordinator", "worker"] {
        assert_eq!(told(binary, &["--version"]).trim_end(), format!("{binary} {}", env!("CARGO_PKG_VERSION")));
    }
    for (binary, args, sentences) in [
        (
            "coordinator",
            &["--help"][..],
            &[
                "Trains one model with a fleet of workers that keep their data",
                "--listen <ADDRESS>",
                "--http <ADDRESS>",
                "--config <FILE>",
                "--state <DIR>",
                "--min-workers <N>",
                "--exit-when-done",
                "--new-run",
                "[env: TRIBUTARY_LISTEN",
                "invite ",
                "revoke ",
            ][..],
        ),
        (
            "coordinator",
            &["invite", "--help"],
            &["--address <ADDRESS>", "--uses <N>", "--expires <TIME>", "--out <FILE>"],
        ),
        (
            "worker",
            &["--help"],
            &[
                "--data <FILE>",
                "--join <STRING|@FILE|->",
                "--label <COLUMN>",
                "--share-rows",
                "--min-count <N>",
                "TRIBUTARY_JOIN",
                "predict ",
            ],
        ),
        ("worker", &["predict", "--help"], &["--model <DIR>", "--data <FILE>", "--out <FILE>"]),
    ] {
        let told = told(binary, args);
        for sentence in sentences {
            assert!(told.contains(sentence), "{sentence:?} is not in {told}");
        }
    }
}

// --- ports ---

#[test]
fn a_port_that_is_taken_is_named_with_what_to_do() {
    let home = Home::new();
    let (udp, http) = (home.address(), format!("127.0.0.1:{}", home.http_port()));
    let start = || home.run("coordinator", &["--listen", &udp.to_string(), "--http", &http]);
    let taken = UdpSocket::bind(udp).unwrap();
    let sentence = refusal(&start(), 1);
    let expected = format!("--listen {udp}: cannot listen there; give another address with --listen: ");
    assert!(sentence.starts_with(&expected) && sentence.contains("Address already in use"), "{sentence}");
    drop(taken);
    let taken = TcpListener::bind(&http).unwrap();
    let sentence = refusal(&start(), 1);
    let expected =
        format!("--http {http}: cannot listen there; give another address with --http: Address already in use");
    assert!(sentence.starts_with(&expected), "{sentence}");
    drop(taken);
    // An address of RFC 5737, which no machine has.
    let sentence = refusal(&home.run("coordinator", &["--listen", "192.0.2.7:4433", "--http", &http]), 1);
    let expected = "--listen 192.0.2.7:4433: cannot listen there; give another address with --listen: ";
    assert!(sentence.starts_with(expected) && sentence.contains("Cannot assign requested address"), "{sentence}");
}

// --- state directories ---

#[test]
fn without_a_home_a_place_must_be_said() {
    let home = Home::new();
    home.write("shard.csv", data::classes(1, 20));
    let start = |binary: &str, args: &[&str]| {
        let mut command = home.command(binary);
        let homeless = command.env_remove("HOME").env_remove("XDG_STATE_HOME").args(args);
        Running::start(binary, homeless, Stdio::null())
    };
    let sentence = "neither XDG_STATE_HOME nor HOME is set, so there is no default state directory: give --state DIR";
    assert_eq!(refusal(&start("coordinator", &["workers"]).end(), 2), sentence);
    let sentence = "neither XDG_STATE_HOME nor HOME is an absolute path; say --state DIR and --join INVITATION";
    assert_eq!(refusal(&start("worker", &["--data", "shard.csv"]).end(), 1), sentence);

    let listen = home.address().to_string();
    let mut coordinator = start("coordinator", &["--listen", &listen, "--state", "c"]);
    coordinator.until_stderr("listening on");
    start("worker", &["--data", "shard.csv", "--state", "w", "--join", "@c/join", "--json"]).until("joined");
}

/// The two binaries, each with what its state's format file says, and a command line that needs the state.
const STATES: [(&str, &str, &[&str]); 2] = [
    ("coordinator", "tributary coordinator", &["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]),
    ("worker", "tributary worker state", &["--data", "shard.csv"]),
];

#[test]
fn a_state_directory_that_cannot_be_ours_is_refused_and_left_as_it_was() {
    for (binary, format, args) in STATES {
        let home = Home::new();
        home.write("shard.csv", data::classes(1, 20));
        let refused = |state: &str| {
            let mut all = args.to_vec();
            all.extend(["--state", state]);
            refusal(&home.run(binary, &all), 1)
        };
        home.write("file", "a file");
        for (state, culprit) in [("file", "file: "), ("file/below", "file/below: ")] {
            let sentence = refused(state);
            assert!(sentence.starts_with(culprit) && sentence.contains("not a directory"), "{binary}: {sentence}");
            assert!(sentence.contains("--state"), "{binary}: {sentence}");
        }
        assert_eq!(fs::read_to_string(home.path("file")).unwrap(), "a file");

        // Nobody may write there, not even root.
        let sentence = refused("/sys/tributary");
        assert!(sentence.starts_with("/sys/tributary: ") && sentence.contains("--state"), "{binary}: {sentence}");

        fs::create_dir(home.path("thesis")).unwrap();
        home.write("thesis/chapter.tex", "years of work");
        let sentence = refused("thesis");
        let expected = format!(
            "thesis: not a {binary}'s state directory (it holds \"chapter.tex\" and no file \"format\"); \
             give an empty or new one with --state"
        );
        assert_eq!(sentence, expected);
        assert_eq!(fs::read_dir(home.path("thesis")).unwrap().count(), 1, "nothing was added");

        fs::create_dir(home.path("tomorrow")).unwrap();
        home.write("tomorrow/format", format!("{format} 7\n"));
        let sentence = refused("tomorrow");
        let ours = if binary == "coordinator" { 2 } else { 1 };
        let expected = format!(
            "tomorrow: state of version 7, this program reads version {ours}; update it, or give another --state"
        );
        assert_eq!(sentence, expected, "{binary}");
    }
}

#[test]
fn the_state_of_the_other_program_is_not_ours() {
    let home = Home::new();
    home.write("shard.csv", data::classes(1, 20));
    home.coordinator(&["--state", "s"]).until("listening");
    let sentence = refusal(&home.run("worker", &["--data", "shard.csv", "--state", "s"]), 1);
    assert!(
        sentence.starts_with("s: not a worker's state directory (its format is \"tributary coordinator 2\")"),
        "{sentence}"
    );
    // The coordinator left its invitation here, and the worker is to wait for one.
    let home = Home::new();
    home.write("shard.csv", data::classes(1, 20));
    let mut worker = home.start("worker", &["--data", "shard.csv", "--state", "w"]);
    worker.until_stderr("waiting for a coordinator");
    let sentence =
        refusal(&home.run("coordinator", &["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--state", "w"]), 1);
    assert!(
        sentence.starts_with("w: not a coordinator's state directory (its format is \"tributary worker state 1\")"),
        "{sentence}"
    );
}

#[test]
fn a_state_directory_that_a_live_process_holds_is_refused_with_its_number() {
    let home = Home::new();
    home.write("shard.csv", data::classes(1, 20));
    let mut coordinator = home.coordinator(&[]);
    coordinator.until("listening");
    let second = home.run("coordinator", &["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
    let sentence = format!(
        "{}: in use by another coordinator, process {}; stop that one or give another --state",
        home.state().display(),
        coordinator.id()
    );
    assert_eq!(refusal(&second, 1), sentence);

    let mut worker = home.worker("shard.csv", &[]);
    worker.until("joined");
    let sentence = format!(
        "{}: in use by a live worker (process {}); stop it, or start this one under another --name",
        home.path("tributary/worker/shard").display(),
        worker.id()
    );
    assert_eq!(refusal(&home.run("worker", &["--data", "shard.csv"]), 1), sentence);
    assert!(worker.runs() && coordinator.runs());
}

#[test]
fn a_data_file_that_was_moved_is_asked_about_and_goes_on_by_name() {
    let home = Home::new();
    let mut coordinator = home.coordinator(&[]);
    coordinator.until("listening");
    home.write("shard.csv", data::classes(1, 20));
    home.worker("shard.csv", &[]).until("joined");
    fs::create_dir(home.path("new")).unwrap();
    fs::rename(home.path("shard.csv"), home.path("new/shard.csv")).unwrap();
    let sentence = refusal(&home.run("worker", &["--data", "new/shard.csv"]), 1);
    let canonical = |name: &str| fs::canonicalize(home.path("new")).unwrap().parent().unwrap().join(name);
    let expected = format!(
        "{}: is the state of the worker for {}, which is gone, and the file is now {}; if that is the same data, moved, \
         say --name shard to go on as the same worker, else another --name to start a new one",
        home.path("tributary/worker/shard").display(),
        canonical("shard.csv").display(),
        canonical("new/shard.csv").display(),
    );
    assert_eq!(sentence, expected);
    assert_eq!(home.worker("new/shard.csv", &["--name", "shard"]).until("joined")["name"], "shard");
}

// --- joining ---

/// An invitation of a coordinator that listens in `home`.
fn invitation(home: &Home) -> String {
    let said =
        ended_well(home.start("coordinator", &["invite", "--address", &home.address().to_string(), "--uses", "9"]));
    said.stdout.trim().to_owned()
}

#[test]
fn an_invitation_that_was_mangled_says_how() {
    let home = Home::new();
    home.write("shard.csv", data::classes(1, 20));
    let mut coordinator = home.coordinator(&[]);
    coordinator.until("listening");
    let good = invitation(&home);
    let (head, tail) = good.split_at(40);
    let changed = if tail.starts_with('A') { 'B' } else { 'A' };
    for (mangled, sentence) in [
        (String::new(), "the invitation is empty, expected a text that starts with \"trib1.\"; for a file write @FILE"),
        ("shard.csv".to_owned(), "the invitation starts with \"shard.\", expected \"trib1.\"; for a file write @FILE"),
        (good.replace("trib1.", "trib2."), "the invitation is of version 2, this program knows version 1; update it"),
        (good[..good.len() - 7].to_owned(), "the invitation is cut short; copy it again, whole and in one line"),
        ("trib1.".to_owned(), "the invitation is cut short; copy it again, whole and in one line"),
        (
            format!("{head}{changed}{}", &tail[1..]),
            "the invitation's checksum does not fit, so some character was changed or added; copy it again",
        ),
        (
            format!("{head}!{}", &tail[1..]),
            "the invitation has '!' as character 41, where none may stand; copy it again, whole and in one line",
        ),
        (
            format!("{head} {tail}"),
            "the invitation has ' ' as character 41, where none may stand; copy it again, whole and in one line",
        ),
        (
            "trib1.".to_owned() + &"A".repeat(3000),
            "the invitation has 3006 characters, the most is 2048; copy it again, alone",
        ),
    ] {
        let said = home.run("worker", &["--data", "shard.csv", "--join", &mangled]);
        assert_eq!(refusal(&said, 1), format!("--join: {sentence}"));
        home.write("invitation.txt", &mangled);
        let said = home.run("worker", &["--data", "shard.csv", "--join", "@invitation.txt"]);
        assert_eq!(refusal(&said, 1), format!("invitation.txt: {sentence}"));
    }
    let said = home.run("worker", &["--data", "shard.csv", "--join", "@nowhere.txt"]);
    let sentence = "nowhere.txt: the invitation cannot be read: No such file or directory (os error 2)";
    assert_eq!(refusal(&said, 1), sentence);
}

#[test]
fn an_invitation_that_is_good_no_more_says_why() {
    let home = Home::new();
    let mut coordinator = home.coordinator(&[]);
    coordinator.until("listening");
    let address = home.address().to_string();
    let invite = |args: &[&str]| {
        let mut all = vec!["invite", "--address", &address];
        all.extend(args);
        ended_well(home.start("coordinator", &all)).stdout.trim().to_owned()
    };
    for name in ["first", "second"] {
        home.write(&format!("{name}.csv"), data::classes(1, 20));
    }
    let refused = |join: &str| refusal(&home.run("worker", &["--data", "second.csv", "--join", join]), 1);

    let once = invite(&["--uses", "1"]);
    home.worker("first.csv", &["--join", &once]).until("joined");
    assert_eq!(refused(&once), "the invitation has been used up; ask for a new one (coordinator invite --uses N)");
    home.worker("first.csv", &["--join", &once]).until("joined");

    let brief = invite(&["--expires", "1s"]);
    let until = brief.parse::<Invitation>().unwrap().expires_unix_s.unwrap();
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    while now() <= until {
        std::thread::park_timeout(Duration::from_millis(50));
    }
    assert_eq!(refused(&brief), "the invitation has expired; ask for a new one (coordinator invite)");

    let forged = Invitation { token: [7; 16], ..once.parse().unwrap() }.to_string();
    let sentence = "the coordinator does not know this invitation; ask for a new one (coordinator invite)";
    assert_eq!(refused(&forged), sentence);

    drop(coordinator);
    let mut other = home.coordinator(&["--state", "anew"]);
    other.until("listening");
    let foreign = refused(&once);
    let sentence = format!(
        "the invitation is of another coordinator than the one at {address}; ask that one's operator for an invitation \
         (coordinator invite): "
    );
    assert!(foreign.starts_with(&sentence), "{foreign}");
}

#[test]
fn a_worker_that_is_shut_out_ends_and_stays_out() {
    let home = Home::new();
    let mut coordinator = home.coordinator(&[]);
    coordinator.until("listening");
    home.write("shard.csv", data::classes(1, 20));
    let mut worker = home.worker("shard.csv", &[]);
    worker.until("joined");
    let sentence = refusal(&home.run("coordinator", &["revoke", "shrad"]), 1);
    assert_eq!(sentence, "no worker is called \"shrad\"; see coordinator workers");
    ended_well(home.start("coordinator", &["revoke", "shard"]));
    let sentence = "this worker's key was revoked; remove its state directory and ask for a new invitation";
    assert_eq!(refusal(&worker.end(), 1), sentence);
    assert_eq!(refusal(&home.run("worker", &["--data", "shard.csv"]), 1), sentence);
    assert!(coordinator.runs());
}

#[test]
fn an_invitation_comes_as_text_from_a_file_from_stdin_or_from_the_environment() {
    let home = Home::new();
    let mut coordinator = home.coordinator(&["--min-workers", "4", "--rounds", "1", "--exit-when-done"]);
    coordinator.until("listening");
    let text = invitation(&home);
    let file = home.write("invitation.txt", format!("{text}\n"));
    // What the coordinator leaves for its own machine is taken away: only what is given can lead there.
    fs::remove_file(home.path("tributary/join")).unwrap();
    let joins = |name: &str, join: &[&str], stdin: Option<&Path>, variable: Option<&str>| {
        home.write(&format!("{name}.csv"), data::classes(1, 40));
        let mut command = home.command("worker");
        command.args(["--data", &format!("{name}.csv"), "--json"]).args(join);
        variable.map(|text| command.env("TRIBUTARY_JOIN", text));
        let stdin = stdin.map_or_else(Stdio::null, |path| File::open(path).unwrap().into());
        Running::start(name, &mut command, stdin)
    };
    let workers = [
        joins("text", &["--join", &text], None, None),
        joins("file", &["--join", "@invitation.txt"], None, None),
        joins("stdin", &["--join", "-"], Some(&file), None),
        joins("variable", &[], None, Some(&text)),
    ];
    let told = ended_well(coordinator);
    for worker in workers {
        let said = ended_well(worker);
        assert!(!said.stdout.contains(&text) && !said.stderr.contains(&text), "an invitation is a secret");
    }
    assert!(!told.stderr.contains(&text));
}

#[test]
fn without_a_coordinator_a_worker_says_so_once_and_joins_when_it_comes() {
    let home = Home::new();
    home.write("early.csv", data::classes(1, 40));
    home.write("invited.csv", data::classes(2, 40));
    // Its invitation is made while nothing runs, for a coordinator that is not there yet.
    let text = invitation(&home);
    let mut invited = home.worker("invited.csv", &["--join", &text]);
    let mut early = home.worker("early.csv", &[]);
    let waiting = early.until("waiting");
    assert_eq!(waiting["join"], home.path("tributary/join").to_str().unwrap());
    let unreachable = invited.until("unreachable");
    assert_eq!(unreachable["addresses"][0], home.address().to_string());
    let coordinator = home.coordinator(&["--min-workers", "2", "--rounds", "1", "--exit-when-done"]);
    ended_well(coordinator);
    for (worker, event) in [(early, "waiting"), (invited, "unreachable")] {
        let said = ended_well(worker);
        let event = format!("{{\"event\":\"{event}\"");
        assert_eq!(said.stdout.lines().filter(|line| line.starts_with(&event)).count(), 1, "again: {}", said.stdout);
    }
}

#[test]
fn an_invitation_that_leads_nobody_here_is_not_made() {
    let home = Home::new();
    let listen = format!("0.0.0.0:{}", home.address().port());
    let http = format!("127.0.0.1:{}", home.http_port());
    let mut coordinator = home.start("coordinator", &["--listen", &listen, "--http", &http]);
    coordinator.until_stderr("listening on");
    let refused = |args: &[&str]| {
        let mut all = vec!["invite"];
        all.extend(args);
        refusal(&home.run("coordinator", &all), 1)
    };
    let sentence = format!("the coordinator listens on {listen}, which says nothing to others; give --address HOST");
    assert_eq!(refused(&[]), sentence);
    assert_eq!(
        refused(&["--address", "fleet example"]),
        format!(
            "address \"fleet example:{}\" is not HOST:PORT, such as 192.0.2.7:4433 or fleet.example.org:4433",
            home.address().port()
        )
    );
    let five: Vec<&str> = ["--address", "a"].repeat(5);
    assert_eq!(refused(&five), "the invitation names 5 addresses, expected 1 to 4");
    let sentence = refused(&["--address", "localhost", "--out", "nowhere/invitation.txt"]);
    assert!(sentence.starts_with("nowhere/invitation.txt: "), "{sentence}");
}

// --- predictions ---

/// A model of two columns, finished and saved in `home`.
fn model(home: &Home) -> PathBuf {
    let column = |name: &str, encoding| ColumnSchema { name: name.to_owned(), encoding };
    let schema = Schema {
        label: "late".to_owned(),
        target: Target::Regression { mean: 1.0, deviation: 2.0 },
        columns: vec![
            column("colour", Encoding::Categorical { vocabulary: vec!["red".to_owned()] }),
            column("x", Encoding::Numeric { mean: 0.0, deviation: 1.0, missing: false }),
        ],
    };
    let weights = vec![0.5; schema.inputs() + 1];
    let model = SavedModel::new(ModelSpec::Linear, schema, EvaluationSummary::default(), weights).unwrap();
    let directory = home.path("model");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("model.safetensors"), model.weights_file()).unwrap();
    fs::write(directory.join("model.json"), model.description_file()).unwrap();
    directory
}

/// What happened to a model's directory.
type Damage = fn(&Path);

/// The beginning of what is said about each damage.
const DAMAGES: &[(&str, Damage)] = &[
    (
        "model/model.json: cannot be read; --model names a directory with model.safetensors and model.json: No such file or \
         directory (os error 2)",
        |model| fs::remove_dir_all(model).unwrap(),
    ),
    (
        "model/model.safetensors: cannot be read; --model names a directory with model.safetensors and model.json: No such \
         file or directory (os error 2)",
        |model| fs::remove_file(model.join("model.safetensors")).unwrap(),
    ),
    ("model/model.json: not the description of a model: ", |model| {
        fs::write(model.join("model.json"), "nothing").unwrap()
    }),
    (
        "model/model.json: format \"tributary model 2\", this program reads \"tributary model 1\"; use the worker that came \
         with the model's coordinator",
        |model| fs::write(model.join("model.json"), "{\"format\":\"tributary model 2\"}").unwrap(),
    ),
    ("model/model.safetensors: not a safetensors file: ", |model| {
        fs::write(model.join("model.safetensors"), "PK\u{3}\u{4}").unwrap();
    }),
    ("model/model.safetensors: not the weights that model.json describes: their hash is ", |model| {
        let path = model.join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    }),
];

#[test]
fn a_model_that_cannot_be_used_is_refused_and_nothing_is_written() {
    for (sentence, damage) in DAMAGES {
        let home = Home::new();
        home.write("new.csv", "x,colour\n1,red\n");
        damage(&model(&home));
        let said = home.run("worker", &["predict", "--model", "model", "--data", "new.csv", "--out", "p.csv"]);
        let told = refusal(&said, 1);
        assert!(told.starts_with(sentence), "{told:?} is not {sentence:?}");
        nothing_is_left_of(&home, "p.csv");
    }
}

/// Neither the output nor anything beside it.
fn nothing_is_left_of(home: &Home, out: &str) {
    let path = home.path(out);
    let names = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
    let stem = path.file_name().unwrap().to_string_lossy().into_owned();
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().contains(&stem)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn rows_that_cannot_be_predicted_are_refused_where_they_are_and_nothing_half_written_is_left() {
    let home = Home::new();
    model(&home);
    let predict =
        |data: &str, out: &str| home.run("worker", &["predict", "--model", "model", "--data", data, "--out", out]);
    let many = "x,colour\n".to_owned() + &"1,red\n".repeat(10_000);
    for (text, sentence) in [
        ("", "new.csv: is empty, expected a header line and at least one row"),
        ("x,colour\n", "new.csv: has a header and no rows, expected at least one"),
        ("x\n1\n", "new.csv: no column \"colour\", which the fleet's schema has; there are \"x\""),
        (
            "x,colour,prediction\n1,red,2\n",
            "new.csv:1: column \"prediction\" is what predictions are written to; rename or remove it",
        ),
        (
            &format!("{many}two,red\n"),
            "new.csv:10002: column \"x\": \"two\" is not a number, and the fleet's schema has the column as numbers; correct \
             the cell, or leave it empty if the value is missing",
        ),
        (&format!("{many}1\n"), "new.csv:10002: 1 cells, the header has 2; put cells that hold a comma between quotes"),
    ] {
        home.write("new.csv", text);
        assert_eq!(refusal(&predict("new.csv", "p.csv"), 1), sentence);
        nothing_is_left_of(&home, "p.csv");
    }
    assert_eq!(refusal(&predict("nowhere.csv", "p.csv"), 1), "nowhere.csv: no such file");

    home.write("new.csv", &many);
    assert_eq!(
        refusal(&predict("new.csv", "nowhere/p.csv"), 1),
        "nowhere/p.csv: cannot write: No such file or directory (os error 2)"
    );
    fs::create_dir(home.path("folder")).unwrap();
    let sentence = refusal(&predict("new.csv", "folder"), 1);
    assert!(sentence.starts_with("folder: ") && sentence.contains("directory"), "{sentence}");
    let sentence = refusal(&predict("new.csv", "./new.csv"), 1);
    assert_eq!(sentence, "./new.csv: is the input; name another file with --out");
    assert_eq!(fs::read_to_string(home.path("new.csv")).unwrap(), many);

    home.write("p.csv", "of yesterday");
    home.write("bad.csv", format!("{many}two,red\n"));
    refusal(&predict("bad.csv", "p.csv"), 1);
    assert_eq!(fs::read_to_string(home.path("p.csv")).unwrap(), "of yesterday", "what was there is kept");
    let said = predict("new.csv", "p.csv");
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), "p.csv: 10000 rows\n"));

    // What is no file is written to, and a link stays one.
    let said = predict("new.csv", "/dev/stdout");
    assert_eq!((said.code, said.stdout.lines().count()), (Some(0), 10_001), "{}", said.stderr);
    std::os::unix::fs::symlink("p.csv", home.path("link.csv")).unwrap();
    assert_eq!(predict("new.csv", "link.csv").code, Some(0));
    assert!(fs::symlink_metadata(home.path("link.csv")).unwrap().is_symlink());
}
