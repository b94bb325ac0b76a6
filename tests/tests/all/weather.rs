//! Networks that are bad for real: in namespaces of the kernel, whatever becomes of the datagrams, the model is the same.
//!
//! A coordinator and three workers, the real binaries over the demo's flights, with all of the fleet needed in every
//! round. Each case has its own network; all run at once, because most of their time is spent waiting.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Stdio;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use tributary_tests::fleet::Undisturbed;
use tributary_tests::netns::{IMPAIRED, Network, SERVICE};
use tributary_tests::process::ours;
use tributary_tests::{Home, Running, ended_well, flights, not_tested};

/// Enough for something to happen in the middle, and a payload too long to be sent without being asked for.
const ROUNDS: u32 = 8;
const HIDDEN: u32 = 256;
const ROWS: usize = 400;
/// Far longer than the ten seconds of silence after which a worker counts as gone.
const PARTITION: Duration = Duration::from_secs(20);
/// A fleet that takes longer than this hangs. The narrowest network needs about twenty seconds.
const CASE_MAX: Duration = Duration::from_secs(80);

/// What happens, and when.
struct Case {
    name: &'static str,
    /// What `impair` does, if the fleet stands behind it.
    impair: Option<&'static str>,
    /// Once the network is laid.
    before: fn(&Network),
    /// When this round is committed, so that the next one is under way.
    during: fn(&Scene, u64),
    /// Whether the workers' connections live through it.
    stays: bool,
}

/// Where it happens.
struct Scene {
    network: Network,
    impair: Option<Running>,
}

const CASES: &[Case] = &[
    Case {
        name: "5 % loss",
        impair: None,
        before: |network| (0..3).for_each(|worker| network.lose(worker, 5)),
        during: nothing,
        stays: true,
    },
    Case { name: "100 ms delay each way", impair: Some("--delay-ms 100"), before: calm, during: nothing, stays: true },
    Case { name: "reordering", impair: Some("--delay-ms 5 --reorder 20"), before: calm, during: nothing, stays: true },
    Case {
        name: "1 Mbit/s",
        impair: None,
        before: |network| (0..3).for_each(|worker| network.narrow(worker, 1000)),
        during: nothing,
        stays: true,
    },
    Case {
        name: "one worker cut off for 20 s",
        impair: None,
        before: calm,
        during: |scene, round| cut_in_round_2(&scene.network, round, 0..1),
        stays: false,
    },
    Case {
        name: "the coordinator cut off from all for 20 s",
        impair: None,
        before: calm,
        during: |scene, round| cut_in_round_2(&scene.network, round, 0..3),
        stays: false,
    },
    Case {
        name: "a worker's address changes in every round",
        impair: None,
        before: calm,
        during: |scene, round| scene.network.readdress(0, u8::try_from(round).unwrap() + 10),
        stays: true,
    },
    Case {
        name: "a NAT forgets in every round",
        impair: Some("--delay-ms 5"),
        before: calm,
        during: |scene, _| scene.impair.as_ref().unwrap().signal("HUP"),
        stays: true,
    },
];

fn calm(_: &Network) {}

fn nothing(_: &Scene, _: u64) {}

fn cut_in_round_2(network: &Network, round: u64, workers: std::ops::Range<usize>) {
    if round != 1 {
        return;
    }
    workers.clone().for_each(|worker| network.cut(worker));
    // The fault is its length.
    thread::sleep(PARTITION);
    workers.for_each(|worker| network.mend(worker));
}

fn undisturbed() -> &'static Undisturbed {
    static MADE: OnceLock<Undisturbed> = OnceLock::new();
    MADE.get_or_init(|| flights::undisturbed(&flights::config(ROUNDS, HIDDEN), ROWS))
}

#[test]
fn in_any_weather_the_model_is_the_same_and_no_receipt_is_lost() {
    if let Err(missing) = Network::lay(1) {
        return not_tested(&format!("networks that lose, delay, cut and renumber: {missing}"));
    }
    undisturbed();
    let failed: Vec<_> = thread::scope(|scope| {
        let running: Vec<_> = CASES.iter().map(|case| (case.name, scope.spawn(|| weathered(case)))).collect();
        running.into_iter().filter_map(|(name, case)| case.join().unwrap().err().map(|why| (name, why))).collect()
    });
    for (name, why) in &failed {
        eprintln!("--- {name}:\n{why}");
    }
    assert!(failed.is_empty(), "{:?}", failed.iter().map(|(name, _)| name).collect::<Vec<_>>());
}

/// Runs one case; what went wrong, if something did.
fn weathered(case: &Case) -> Result<(), String> {
    let begun = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| weather(case)));
    let took = begun.elapsed();
    eprintln!("{}: {:.1} s", case.name, took.as_secs_f64());
    let said = |panic: Box<dyn std::any::Any + Send>| {
        let text = panic.downcast_ref::<String>().cloned();
        text.unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap_or(&"it panicked").to_string())
    };
    outcome.map_err(said)?;
    if took > CASE_MAX { Err(format!("it took {took:?}")) } else { Ok(()) }
}

fn weather(case: &Case) {
    let (home, network) = (Home::new(), Network::lay(flights::AIRPORTS.len()).unwrap());
    (case.before)(&network);
    let impair = case.impair.map(|flags| {
        let mut command = ours("impair", &home.path(""));
        command.args(["--listen", IMPAIRED, "--to", SERVICE]).args(flags.split(' '));
        Running::start("impair", &mut network.at_coordinator(&command), Stdio::null())
    });
    let scene = Scene { network, impair };
    let mut coordinator = coordinator(&home, &scene.network);
    let workers = workers(&home, &scene.network, if case.impair.is_some() { IMPAIRED } else { SERVICE });
    for round in 1..u64::from(ROUNDS) {
        coordinator.until_where("round", |line| line["round"] == round);
        (case.during)(&scene, round);
    }
    let said = ended_well(coordinator);
    assert_eq!(said.lines("done")[0]["model_hash"], undisturbed().model());
    for worker in workers {
        let said = ended_well(worker);
        assert!(!case.stays || said.lines("disconnected").is_empty(), "{}", said.stdout);
    }
    undisturbed().assert_every_update_is_receipted(&home);
}

fn coordinator(home: &Home, network: &Network) -> Running {
    let config = home.write("run.toml", flights::config(ROUNDS, HIDDEN));
    let mut command = home.command("coordinator");
    command.arg("--config").arg(config).args(["--listen", SERVICE, "--json", "--exit-when-done"]);
    let mut coordinator = Running::start("coordinator", &mut network.at_coordinator(&command), Stdio::null());
    coordinator.until("listening");
    coordinator
}

fn workers(home: &Home, network: &Network, address: &str) -> Vec<Running> {
    let uses = flights::AIRPORTS.len().to_string();
    let invite = ["invite", "--address", address, "--uses", &uses, "--out", "invitation"];
    ended_well(home.start("coordinator", &invite));
    let start = |(worker, (name, rows)): (usize, (&str, String))| {
        let data = home.write(&format!("{name}.csv"), rows);
        let mut command = home.command("worker");
        command.arg("--data").arg(data).args(["--join", "@invitation", "--json"]);
        Running::start(name, &mut network.at_worker(worker, &command), Stdio::null())
    };
    flights::shards(ROWS).into_iter().enumerate().map(start).collect()
}
