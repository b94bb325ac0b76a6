//! Data files that are not what a user thinks they are: what the worker says, and that nobody else notices.
//!
//! What is wrong with the file alone is said before anybody is called. What does not fit the plan is said after the
//! coordinator showed it, and what does not fit the other workers' data after the survey.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use protocol::invitation::Invitation;
use serde_json::Value;
use tributary_tests::{Home, Running, data, ended_well};

use crate::commandline::refusal;

/// A round of a model that trains in no time.
const SHORT: &str = "[model]\nkind = \"linear\"\n[train]\nrounds = 1\nbatch_size = \"full\"\n";

/// A coordinator with `config` that ends when the run does, once it listens.
fn coordinator(home: &Home, config: &str, workers: &str) -> Running {
    home.write("run.toml", config);
    let mut coordinator = home.coordinator(&["--config", "run.toml", "--min-workers", workers, "--exit-when-done"]);
    coordinator.until("listening");
    coordinator
}

/// An invitation that leads to `ear`, and nowhere further.
fn invitation_to(ear: &UdpSocket) -> String {
    let invitation = Invitation {
        addresses: vec![ear.local_addr().unwrap().to_string()],
        ca_sha256: [1; 32],
        coordinator_x25519: [9; 32],
        token: [3; 16],
        uses: 1,
        expires_unix_s: None,
        loopback_only: false,
    };
    invitation.to_string()
}

/// Files that are no table, and the whole sentence about each.
const NO_TABLES: &[(&str, &[u8], &str)] = &[
    ("empty.csv", b"", "empty.csv: is empty, expected a header line and at least one row"),
    ("blank.csv", b"\r\n\n\n", "blank.csv: is empty, expected a header line and at least one row"),
    ("mark.csv", b"\xef\xbb\xbf", "mark.csv: is empty, expected a header line and at least one row"),
    ("header.csv", b"x,y,late\n", "header.csv: has a header and no rows, expected at least one"),
    (
        "numbers.csv",
        b"1,2.5,0\n3,4.5,1\n",
        "numbers.csv:1: the first line is all numbers (1, 2.5, 0), expected the names of the columns; add a header line",
    ),
    (
        "ragged.csv",
        b"x,y,late\n1,2,0\n1,2\n",
        "ragged.csv:3: 2 cells, the header has 3; put cells that hold a comma between quotes",
    ),
    (
        "comma.csv",
        b"x,city,late\n1,Paris,0\n1,Paris, France,0\n",
        "comma.csv:3: 4 cells, the header has 3; put cells that hold a comma between quotes",
    ),
    (
        "quote.csv",
        b"x,city,late\n1,Paris,0\n2,\"Rome,1\n3,Oslo,0\n",
        "quote.csv:3: a quote that opens in this row is never closed; close it, or write a quote that is part of a cell \
         twice",
    ),
    ("latin.csv", b"x,city,late\n1,Malm\xf6,0\n", "latin.csv:2: not UTF-8; save the file as UTF-8"),
    ("wide.csv", b"\xff\xfex\0,\0y\0\n\0", "wide.csv:1: not UTF-8; save the file as UTF-8"),
    ("twins.csv", b"x,late,x\n1,0,1\n", "twins.csv:1: columns 1 and 3 are both called \"x\"; rename one"),
    ("noname.csv", b"x,,late\n1,2,0\n", "noname.csv:1: column 2 has no name; give it one"),
    (
        "semicolons.csv",
        b"x;y;late\n1;2;0\n",
        "semicolons.csv:1: only one column, \"x;y;late\", expected the label and at least one to learn from; cells are \
         separated by commas",
    ),
];

#[test]
fn a_file_that_is_no_table_is_refused_before_anybody_is_called() {
    let home = Home::new();
    let ear = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    ear.set_nonblocking(true).unwrap();
    let invitation = invitation_to(&ear);
    let refused = |name: &str| refusal(&home.run("worker", &["--data", name, "--join", &invitation]), 1);
    for (name, bytes, sentence) in NO_TABLES {
        home.write(name, bytes);
        assert_eq!(refused(name), *sentence);
    }
    assert_eq!(refused("nowhere.csv"), "nowhere.csv: no such file");
    std::fs::create_dir(home.path("flights")).unwrap();
    assert_eq!(refused("flights"), "flights: not a file; name one CSV file, or images in idx format");
    assert_eq!(ear.recv(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "somebody was called");

    // The ear does hear: a sound file is read, and then there is a call.
    home.write("sound.csv", data::classes(1, 20));
    let worker = home.worker("sound.csv", &["--join", &invitation]);
    ear.set_nonblocking(false).unwrap();
    ear.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    ear.recv(&mut [0]).unwrap();
    drop(worker);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_refused() {
    let home = Home::new();
    let path = home.write("growing.csv", data::classes(1, 200_000));
    let mut file = File::options().append(true).open(path).unwrap();
    let mut worker = home.start("worker", &["--data", "growing.csv"]);
    // Somebody writes to it all the time, so also between its opening and its end.
    while worker.runs() {
        file.write_all(b"1,1,red,1\n").unwrap();
    }
    let sentence = "growing.csv: changed while it was read; try again when nothing writes to it";
    assert_eq!(refusal(&worker.end(), 1), sentence);
}

/// Whether the process has a file of that name open now.
fn has_open(process: &Running, name: &str) -> bool {
    let links = std::fs::read_dir(format!("/proc/{}/fd", process.id())).into_iter().flatten().flatten();
    links.filter_map(|link| std::fs::read_link(link.path()).ok()).any(|path| path.ends_with(name))
}

#[test]
fn reading_a_long_file_can_be_stopped() {
    let home = Home::new();
    home.write("long.csv", "x,y,label\n".to_owned() + &"1,2,0\n3,4,1\n".repeat(1_000_000));
    let mut worker = home.start("worker", &["--data", "long.csv"]);
    // Signals are listened to before the file is opened.
    while !has_open(&worker, "long.csv") {
        assert!(worker.runs(), "{}", worker.stderr());
        std::thread::park_timeout(Duration::from_millis(1));
    }
    worker.signal("INT");
    assert_eq!(ended_well(worker).stderr, "stopped; everything is kept\n");
}

/// Files that the plan below has no use for, and the whole sentence about each.
const UNFIT: &[(&str, &str, &str)] = &[
    (
        "nolabel",
        "x,delay,delayed\n1,2,0\n",
        "nolabel.csv: no column \"late\" for the label; there are \"x\", \"delay\", \"delayed\"; name this file's own with \
         --label",
    ),
    (
        "stray",
        "x,bmi,late\n1,20.5,0\n2,n/a?,1\n3,22,0\n4,23.25,1\n",
        "stray.csv:3: column \"bmi\": \"n/a?\" is not a number; correct the cell, leave it empty if the value is missing, \
         or list the column under data.categorical",
    ),
    (
        "huge",
        "x,bmi,late\n1,20.5,0\n2,1e400,1\n3,22,0\n4,23.25,1\n",
        "huge.csv:3: column \"bmi\": \"1e400\" is not a finite number; correct the cell, or leave it empty",
    ),
    ("unlabelled", "x,late\n1,\n2,?\n3,NA\n", "unlabelled.csv: no row has a label in column \"late\""),
    (
        "fraction",
        "x,late\n1,0\n2,0.5\n3,1\n",
        "fraction.csv:3: label \"late\": 0.5 is not a whole number, and data.task is \"classification\"; correct the cell, \
         or set data.task to \"regression\"",
    ),
];

#[test]
fn data_that_do_not_fit_the_plan_are_refused_where_they_are_and_the_rest_trains() {
    let home = Home::new();
    let config = format!("{SHORT}[data]\nlabel = \"late\"\ntask = \"classification\"\n");
    let coordinator = coordinator(&home, &config, "2");
    for (name, text, sentence) in UNFIT {
        home.write(&format!("{name}.csv"), text);
        assert_eq!(refusal(&home.run("worker", &["--data", &format!("{name}.csv")]), 1), *sentence);
    }
    let sound = data::classes(1, 60).replace("label", "late");
    let workers = ["a", "b"].map(|name| {
        home.write(&format!("{name}.csv"), &sound);
        home.worker(&format!("{name}.csv"), &[])
    });
    let said = ended_well(coordinator);
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
    for (name, ..) in UNFIT {
        let told = format!("{name} is gone: it does not take part: {name}.csv");
        assert!(said.stderr.contains(&told), "no {told:?} in {}", said.stderr);
    }
}

#[test]
fn no_cell_of_a_refused_file_is_told_to_the_coordinator() {
    let home = Home::new();
    let mut coordinator = coordinator(&home, SHORT, "1");
    home.write("people.csv", "weight,late\n70,0\n71,1\nJane Doe,0\n80,1\n");
    let said = home.run("worker", &["--data", "people.csv"]);
    assert!(refusal(&said, 1).starts_with("people.csv:4: column \"weight\": \"Jane Doe\" is not a number"));
    coordinator.until_stderr("people is gone: it does not take part: people.csv:4: column \"weight\": ");
    assert!(!coordinator.stderr().contains("Jane Doe"), "{}", coordinator.stderr());
}

/// Five files that look different, and in which a round's worth of oddities is fine.
fn odd_files(home: &Home) -> [&'static str; 5] {
    let mut many = "x,grade,city,nothing,late\n".to_owned();
    for row in 0..30_000 {
        let _ = writeln!(many, "{},{},city {},,{}", row % 7, 4 + row % 2, row % 10_000, row % 2);
    }
    home.write("many.csv", many);
    home.write("mark.csv", "\u{feff}x,grade,city,nothing,late\n1,4,\"Paris, France\",,0\n2,5,Oslo,,1\n");
    home.write("crlf.csv", "x,grade,city,nothing,late\r\n1,4.0,Oslo,,1.0\r\n\r\n2,5e0,\"two\r\nlines\",,0\r\n");
    home.write("order.csv", "late,nothing,city,x,grade\n1,,Oslo,1.5,5\n1,NA,?,,4\n,?,Oslo,1,5\n?,,Oslo,1,5\n");
    home.write("single.csv", "x,grade,city,nothing,late\n3,5,Oslo,,0");
    ["many", "mark", "crlf", "order", "single"]
}

#[test]
fn odd_but_sound_files_train_together() {
    let home = Home::new();
    let config = format!("{SHORT}[data]\nlabel = \"late\"\ncategorical = [\"grade\"]\n");
    let coordinator = coordinator(&home, &config, "5");
    let workers = odd_files(&home).map(|name| (name, home.worker(&format!("{name}.csv"), &["--min-count", "1"])));
    let told = ended_well(coordinator);
    let said = workers.map(|(name, worker)| (name, ended_well(worker)));

    let order = &said[3].1.stdout;
    assert!(order.contains("order.csv: 2 of 4 rows have no label and are left out"), "{order}");
    assert!(order.contains("column \\\"nothing\\\" has no value in any row"), "{order}");
    assert!(told.stderr.contains("column \"nothing\" is dropped: it has no value anywhere"), "{}", told.stderr);

    let model = std::fs::read_to_string(home.state().join("model/model.json")).unwrap();
    let schema = serde_json::from_str::<Value>(&model).unwrap()["schema"].clone();
    let column = |name: &str| schema["columns"].as_array().unwrap().iter().find(|c| c["name"] == name).cloned();
    assert_eq!(schema["target"]["classification"]["classes"], Value::from(vec!["0", "1"]), "{schema}");
    let vocabulary = |name: &str| column(name).unwrap()["encoding"]["categorical"]["vocabulary"].clone();
    assert_eq!(vocabulary("grade"), Value::from(vec!["4", "5"]), "4, 4.0 and 5e0 are numbers, not spellings");
    assert_eq!(vocabulary("city").as_array().unwrap().len(), 256, "of 10,000 the most frequent are told apart");
    assert_eq!(column("nothing"), None);
}

#[test]
fn one_class_at_one_worker_is_fine_and_in_the_whole_fleet_ends_the_run() {
    let train = |other: &str| {
        let home = Home::new();
        home.write("never.csv", "x,late\n1,0\n2,0\n3,0\n4,0\n");
        home.write("other.csv", other);
        let coordinator = coordinator(&home, SHORT, "2");
        let workers = ["never.csv", "other.csv"].map(|name| home.worker(name, &[]));
        (coordinator.end(), workers.map(Running::end))
    };
    let (fine, workers) = train("x,late\n1,1\n2,1\n3,1\n4,1\n");
    assert_eq!((fine.code, workers.map(|said| said.code)), (Some(0), [Some(0); 2]), "{}", fine.stderr);

    let (refused, workers) = train("x,late\n5,0\n6,0.0\n7,0\n");
    let sentence = "every label of the whole fleet, in column \"late\", is \"0\", expected at least two classes; is it the \
                    right column (data.label)?";
    assert_eq!(refusal(&refused, 1), sentence);
    for said in workers {
        assert_eq!(refusal(&said, 1), format!("the coordinator says: {sentence}"));
    }
}

#[test]
fn who_lacks_what_most_have_is_refused_and_what_few_have_is_dropped() {
    let home = Home::new();
    home.write("a.csv", "x,wind,rare,late\n1,5,1,0\n2,6,2,1\n3,7,3,0\n");
    home.write("b.csv", "x,wind,late\n2,5,1\n3,6,0\n4,7,1\n");
    home.write("c.csv", "x,late\n2,1\n3,0\n4,1\n");
    let mut coordinator = coordinator(&home, SHORT, "3");
    let others = [home.worker("a.csv", &[]), home.worker("b.csv", &[])];
    let lacking = home.worker("c.csv", &[]).end();
    let sentence = "the coordinator says: the data lack column \"wind\", which most of the fleet have; add it, or drop it \
                    for all with data.drop";
    assert_eq!(refusal(&lacking, 1), sentence);
    coordinator.until_stderr("c is gone: it does not take part: the data lack column \"wind\"");

    // The others wait for whoever mends it.
    home.write("c.csv", "wind,x,late\n1,2,1\n2,3,0\n3,4,1\n");
    let mended = home.worker("c.csv", &[]);
    let told = ended_well(coordinator);
    others.into_iter().chain([mended]).for_each(|worker| drop(ended_well(worker)));
    assert!(told.stderr.contains("column \"rare\" is dropped: 1 of 3 workers have it"), "{}", told.stderr);
}
