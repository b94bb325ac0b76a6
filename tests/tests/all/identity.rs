//! Who gets in, under which name, and who does not: invitations, enrolment, revocation, displaced twins.

use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use protocol::invitation::Invitation;
use tributary_tests::{Fleet, Home, Running, Said, data, ended_well, not_tested};

use crate::runs::{SMALL, copy, two};

/// A coordinator that waits for three workers and so begins nothing.
fn waiting_coordinator() -> (Home, Running) {
    let home = Home::new();
    let mut coordinator = home.coordinator(&["--min-workers", "3"]);
    coordinator.until("listening");
    (home, coordinator)
}

/// What `coordinator invite` prints in `home` for workers that reach it on its port.
fn invite(home: &Home, args: &[&str]) -> String {
    let address = home.address().to_string();
    let mut all = vec!["invite", "--address", &address];
    all.extend(args);
    let said = ended_well(home.start("coordinator", &all));
    assert!(said.stdout.starts_with("trib1."), "{}", said.stdout);
    said.stdout.trim_end().to_owned()
}

/// Another machine: nothing of the coordinator's home is there.
fn elsewhere(rows: u64) -> Home {
    let home = Home::new();
    home.write("shard.csv", data::classes(rows, 200));
    home
}

fn refused(said: &Said, sentence: &str) {
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(said.stderr.starts_with("error: ") && said.stderr.contains(sentence), "{sentence}: {}", said.stderr);
}

fn workers_of(home: &Home) -> String {
    ended_well(home.start("coordinator", &["workers"])).stdout
}

fn join_text(home: &Home) -> String {
    std::fs::read_to_string(home.state().join("join")).unwrap().trim().to_owned()
}

#[test]
fn workers_from_other_machines_join_with_what_invite_printed() {
    let fleet = Fleet::new(SMALL, []);
    // Before the coordinator ever ran, and while it runs.
    let early = invite(fleet.home(), &[]);
    let mut coordinator = fleet.home().coordinator(&["--rounds", "2", "--min-workers", "2", "--exit-when-done"]);
    coordinator.until("listening");
    let file = fleet.home().path("invitation.txt");
    let address = fleet.home().address().to_string();
    let args = ["invite", "--address", &address, "--out", file.to_str().unwrap()];
    assert_eq!(ended_well(fleet.home().start("coordinator", &args)).stdout, "");
    assert_eq!(mode(&file), 0o600);

    let (first, second) = (elsewhere(1), elsewhere(2));
    let mut workers = [
        first.worker("shard.csv", &["--join", &early]),
        second.worker("shard.csv", &["--join", &format!("@{}", file.display())]),
    ];
    let mut names = workers.each_mut().map(|worker| worker.until("enrolled")["name"].as_str().unwrap().to_owned());
    names.sort();
    assert_eq!(names, ["shard", "shard-2"], "the coordinator grants names that nobody else has");
    assert_eq!(coordinator.until("done")["rounds"], 2);
    workers.into_iter().chain([coordinator]).for_each(|process| drop(ended_well(process)));
    let listed = workers_of(fleet.home());
    assert!(names.iter().all(|name| listed.lines().any(|line| line.split_whitespace().any(|w| w == name))), "{listed}");

    // Enrolled once, a worker needs no invitation any more, and a spent one does no harm.
    let mut coordinator = fleet.home().coordinator(&["--rounds", "3", "--min-workers", "2", "--exit-when-done"]);
    coordinator.until("listening");
    let again = first.worker("shard.csv", &["--join", &early]);
    let without = second.worker("shard.csv", &[]);
    for worker in [again, without] {
        assert!(ended_well(worker).lines("enrolled").is_empty());
    }
    assert!(ended_well(coordinator).stderr.contains("done after"));
}

#[test]
fn an_invitation_says_an_address_that_others_can_use() {
    let home = Home::new();
    let said = home.run("coordinator", &["invite"]);
    refused(&said, "give --address");
    let listen = format!("0.0.0.0:{}", home.address().port());
    let mut coordinator = home.start("coordinator", &["--listen", &listen, "--json"]);
    coordinator.until("listening");
    refused(&home.run("coordinator", &["invite"]), &format!("listens on {listen}, which says nothing to others"));
    let told: Invitation = ended_well(home.start("coordinator", &["invite", "--address", "fleet.example.org"]))
        .stdout
        .trim()
        .parse()
        .unwrap();
    assert_eq!(told.addresses, [format!("fleet.example.org:{}", home.address().port())]);
    assert!(!told.loopback_only && told.uses == 1);
}

#[test]
fn an_invitation_for_one_lets_one_in() {
    let (home, _coordinator) = waiting_coordinator();
    let invitation = invite(&home, &["--uses", "1"]);
    let (first, second) = (elsewhere(1), elsewhere(2));
    let mut welcome = first.worker("shard.csv", &["--join", &invitation]);
    welcome.until("joined");
    refused(&second.worker("shard.csv", &["--join", &invitation]).end(), "the invitation has been used up");
    // The one that it was spent on may come again, even if it has forgotten all but its keys.
    welcome.kill();
    let kept = first.path("tributary/worker/shard/coordinators");
    std::fs::remove_dir_all(&kept).unwrap();
    std::fs::create_dir(&kept).unwrap();
    let mut again = first.worker("shard.csv", &["--join", &invitation]);
    assert_eq!(again.until("enrolled")["name"], "shard");
    again.until("joined");
}

#[test]
fn an_expired_invitation_lets_nobody_in() {
    let (home, _coordinator) = waiting_coordinator();
    let invitation = invite(&home, &["--expires", "1s", "--uses", "5"]);
    let told: Invitation = invitation.parse().unwrap();
    let (end, deadline) = (told.expires_unix_s.unwrap(), Instant::now() + Duration::from_secs(10));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    while now() <= end {
        assert!(Instant::now() < deadline, "it expires at {end}, and it is {}", now());
        std::thread::park_timeout(Duration::from_millis(20));
    }
    refused(&elsewhere(1).worker("shard.csv", &["--join", &invitation]).end(), "the invitation has expired");
}

#[test]
fn a_mangled_invitation_is_refused_before_anybody_is_asked() {
    let home = Home::new();
    let good = invite(&home, &[]);
    let other = elsewhere(1);
    let join = |text: &str| other.worker("shard.csv", &["--join", text]).end();
    let changed = |at: usize| {
        let mut text = good.clone().into_bytes();
        text[at] = if text[at] == b'A' { b'B' } else { b'A' };
        String::from_utf8(text).unwrap()
    };
    refused(&join(&changed(good.len() / 2)), "checksum does not fit");
    refused(&join(&changed(good.len() - 2)), "checksum does not fit");
    refused(&join(&good[..good.len() / 2]), "the invitation ");
    refused(&join("hello"), "starts with \"hello\"");
    refused(&join(""), "the invitation is empty");
    refused(&join(&good.replacen("trib1.", "trib2.", 1)), "version");
    refused(&join("@nowhere.txt"), "nowhere.txt: the invitation cannot be read");
    other.write("cut.txt", &good[..30]);
    refused(&join("@cut.txt"), "cut.txt");
}

#[test]
fn the_invitation_of_another_coordinator_is_foreign_here() {
    let (home, _coordinator) = waiting_coordinator();
    let another = Home::new();
    let address = home.address().to_string();
    let foreign = ended_well(another.start("coordinator", &["invite", "--address", &address])).stdout;
    let said = elsewhere(1).worker("shard.csv", &["--join", foreign.trim()]).end();
    refused(&said, &format!("the invitation is of another coordinator than the one at {address}"));
    assert!(workers_of(&home).lines().all(|line| !line.contains("shard")));
}

#[test]
fn an_unknown_token_is_refused() {
    let (home, _coordinator) = waiting_coordinator();
    let mut invitation: Invitation = invite(&home, &[]).parse().unwrap();
    invitation.token[3] ^= 1;
    let said = elsewhere(1).worker("shard.csv", &["--join", &invitation.to_string()]).end();
    refused(&said, "the coordinator does not know this invitation");
}

/// An address of this machine that is not loopback, if it has one.
fn outer_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    // Nothing is sent: this asks which address packets to a documentation network would leave from.
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
}

#[test]
fn the_invitation_for_this_machine_is_no_use_elsewhere() {
    let Some(outer) = outer_address() else {
        return not_tested("that the loopback-only invitation is refused: this machine has loopback alone");
    };
    let home = Home::new();
    let listen = format!("0.0.0.0:{}", home.address().port());
    let mut coordinator = home.start("coordinator", &["--listen", &listen, "--json", "--min-workers", "3"]);
    coordinator.until("listening");
    let mut invitation: Invitation = join_text(&home).parse().unwrap();
    assert!(invitation.loopback_only);
    assert_eq!(invitation.addresses, [home.address().to_string()]);
    invitation.addresses = vec![format!("{outer}:{}", home.address().port())];
    let said = elsewhere(1).worker("shard.csv", &["--join", &invitation.to_string()]).end();
    refused(&said, "the invitation is for workers on the coordinator's own machine");
    invitation.loopback_only = false;
    let said = elsewhere(1).worker("shard.csv", &["--join", &invitation.to_string()]).end();
    refused(&said, "the invitation is for workers on the coordinator's own machine");
}

#[test]
fn two_files_of_one_name_are_two_workers() {
    let fleet = Fleet::new(SMALL, []);
    for (directory, shard) in [("east", 1), ("west", 2)] {
        std::fs::create_dir(fleet.home().path(directory)).unwrap();
        fleet.home().write(&format!("{directory}/shard.csv"), data::classes(shard, 200));
    }
    for rounds in ["2", "3"] {
        let mut coordinator = fleet.home().coordinator(&["--rounds", rounds, "--min-workers", "2", "--exit-when-done"]);
        coordinator.until("listening");
        let mut east = fleet.home().worker("east/shard.csv", &[]);
        assert_eq!(east.until("joined")["name"], "shard");
        let mut west = fleet.home().worker("west/shard.csv", &[]);
        assert_eq!(west.until("joined")["name"], "shard-2");
        [east, west, coordinator].into_iter().for_each(|process| drop(ended_well(process)));
    }
    let state = fleet.home().path("tributary/worker");
    assert!(state.join("shard").is_dir() && state.join("shard-2").is_dir());
}

#[test]
fn a_revoked_worker_is_shut_out_at_once_and_for_ever() {
    let (home, mut coordinator) = waiting_coordinator();
    home.write("a.csv", data::classes(1, 100));
    home.write("b.csv", data::classes(2, 100));
    let mut workers = ["a.csv", "b.csv"].map(|file| home.worker(file, &[]));
    workers.iter_mut().for_each(|worker| drop(worker.until("joined")));
    coordinator.until_where("worker", |line| line["workers"] == 2);
    assert!(row(&home, "a").contains("connected"), "{}", row(&home, "a"));

    ended_well(home.start("coordinator", &["revoke", "a"]));
    let [revoked, mut other] = workers;
    refused(&revoked.end(), "this worker's key was revoked");
    assert_eq!(coordinator.until("gone")["name"], "a");
    assert!(row(&home, "a").contains("revoked"), "{}", row(&home, "a"));
    assert!(row(&home, "b").contains("connected"));
    refused(&home.worker("a.csv", &[]).end(), "this worker's key was revoked");
    refused(&home.run("coordinator", &["revoke", "nobody"]), "no worker is called \"nobody\"");

    // It stays so over a restart, and the name is not given to somebody else.
    coordinator.kill();
    other.kill();
    ended_well(home.start("coordinator", &["revoke", "b"]));
    let mut coordinator = home.coordinator(&["--min-workers", "3"]);
    coordinator.until("listening");
    refused(&home.worker("b.csv", &[]).end(), "this worker's key was revoked");
    refused(&home.worker("a.csv", &[]).end(), "this worker's key was revoked");
    std::fs::remove_dir_all(home.path("tributary/worker/a")).unwrap();
    assert_eq!(home.worker("a.csv", &[]).until("joined")["name"], "a-2");
}

/// The line of a worker in `coordinator workers`.
fn row(home: &Home, name: &str) -> String {
    let listed = workers_of(home);
    let is_its = |line: &&str| line.split_whitespace().next() == Some(name);
    listed.lines().find(is_its).unwrap_or_else(|| panic!("no {name} in {listed}")).to_owned()
}

#[test]
fn of_two_processes_with_one_identity_the_newer_wins() {
    let (home, mut coordinator) = waiting_coordinator();
    home.write("a.csv", data::classes(1, 100));
    let mut older = home.worker("a.csv", &[]);
    older.until("joined");
    let twin = home.path("twin");
    copy(&home.path("tributary/worker/a"), &twin);
    let mut newer = home.worker("a.csv", &["--state", twin.to_str().unwrap()]);
    assert_eq!(newer.until("joined")["name"], "a");
    refused(&older.end(), "another process with this worker's identity has joined");
    coordinator.until_where("worker", |line| line["name"] == "a");
    coordinator.until_where("gone", |line| line["name"] == "a");
    assert_eq!(coordinator.until("worker")["workers"], 1, "the two count as one");
    assert!(newer.runs());
}

#[test]
fn a_data_file_that_was_moved_is_not_silently_another_worker() {
    let (home, _coordinator) = waiting_coordinator();
    home.write("a.csv", data::classes(1, 100));
    let mut worker = home.worker("a.csv", &[]);
    worker.until("joined");
    worker.kill();
    std::fs::create_dir(home.path("moved")).unwrap();
    std::fs::rename(home.path("a.csv"), home.path("moved/a.csv")).unwrap();
    let said = home.worker("moved/a.csv", &[]).end();
    refused(&said, "which is gone, and the file is now ");
    assert!(said.stderr.contains("say --name a to go on as the same worker"), "{}", said.stderr);
    let mut adopted = home.worker("moved/a.csv", &["--name", "a"]);
    assert_eq!(adopted.until("joined")["name"], "a");
    adopted.kill();
    assert_eq!(home.worker("moved/a.csv", &[]).until("joined")["name"], "a", "from now on it is known where it is");
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

fn everything_below(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { everything_below(&path) } else { vec![path] }).collect()
}

#[test]
fn what_is_secret_is_its_owners_alone() {
    let fleet = Fleet::new(SMALL, two());
    let mut coordinator = fleet.coordinator(&[]);
    let workers = fleet.workers(&[]);
    coordinator.until("done");
    let state = fleet.home().state();
    assert_eq!(mode(&state), 0o700);
    for name in ["ca.key", "session.key", "signing.key", "quic.key", "registry-journal-000001", "join", "control.sock"]
    {
        assert_eq!(mode(&state.join(name)), 0o600, "{name}");
    }
    assert_eq!(mode(&fleet.home().path("tributary/join")), 0o600);
    let worker = fleet.home().path("tributary/worker/a");
    assert_eq!(mode(&worker), 0o700);
    for path in everything_below(&worker) {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    for name in ["identity.key", "session.key"] {
        let text = std::fs::read(worker.join(name)).unwrap();
        assert!(!text.is_empty(), "{name}");
    }
    workers.into_iter().for_each(|worker| drop(ended_well(worker)));
}

#[test]
fn an_invitation_comes_from_the_environment_and_from_standard_input_too() {
    let (home, mut coordinator) = waiting_coordinator();
    let invitation = invite(&home, &["--uses", "2"]);
    for (shard, name) in [(1, "env"), (2, "stdin")] {
        let other = elsewhere(shard);
        other.write("invitation.txt", format!("{invitation}\n"));
        let mut command = other.command("worker");
        command.args(["--data", "shard.csv", "--json", "--name", name]);
        if name == "env" {
            command.env("TRIBUTARY_JOIN", &invitation);
        } else {
            command.args(["--join", "-"]);
        }
        let stdin = std::fs::File::open(other.path("invitation.txt")).unwrap();
        let mut worker = Running::start(name, &mut command, stdin.into());
        assert_eq!(worker.until("joined")["name"], name);
        coordinator.until_where("worker", |line| line["name"] == name);
    }
}
