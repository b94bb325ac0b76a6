//! A fleet in the middle of a run: a real coordinator, and workers in this process whose hooks a test holds.
//!
//! The workers make a short pause before each offer, as if training took long: so an attack falls between rounds, and
//! the machine is left to it. What the fleet is compared with is the same fleet undisturbed: the same names, data and
//! seed give the same model after each round, whatever else comes to the port. Everything here panics when it cannot
//! go on: it is for tests only.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use protocol::ids::WorkerName;
use protocol::invitation::Invitation;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use worker::report::{Line, Report};
use worker::state::StatePlace;
use worker::{OnOffer, Options, Outcome, WorkerError};

use crate::home::{Home, PATIENCE, Running};
use crate::{Stranger, data};

/// What every member trains: linear, so that a round costs next to nothing.
pub const CONFIG: &str = r#"
[model]
kind = "linear"
[train]
rounds = 100000
[rounds]
min_workers = 3
quorum = 0.5
deadline_s = 5
"#;

/// The members of every fleet here; the first has the first shard, and so on.
pub const MEMBERS: [&str; 3] = ["ada", "bob", "cleo"];

/// How long a member takes before it offers.
pub const PACE: Duration = Duration::from_millis(60);

/// Rows of each member.
pub const ROWS: usize = 120;

/// So many rounds of the undisturbed fleet are known: more than any test here lets pass.
const ROUNDS_KNOWN: usize = 300;

/// How often something outside is looked at that cannot be waited for.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A coordinator and its workers. They end with the value.
#[derive(Debug)]
pub struct LiveFleet {
    /// Where everything lies.
    pub home: Home,
    /// The coordinator's process.
    pub coordinator: Running,
    members: BTreeMap<String, Member>,
    runtime: Runtime,
}

/// A worker in this process.
#[derive(Debug)]
struct Member {
    lines: Arc<Mutex<Vec<Line>>>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<Outcome, WorkerError>>,
}

impl LiveFleet {
    /// A coordinator with this config, that listens.
    #[must_use]
    pub fn start(config: &str, args: &[&str]) -> Self {
        let home = Home::new();
        let path = home.write("run.toml", config).display().to_string();
        let mut all = vec!["--config", &path];
        all.extend(args);
        let mut coordinator = home.coordinator(&all);
        coordinator.until("listening");
        let runtime = Builder::new_multi_thread().worker_threads(8).enable_all().build().unwrap();
        Self { home, coordinator, members: BTreeMap::new(), runtime }
    }

    /// The three members, and two rounds behind them.
    #[must_use]
    pub fn in_a_run() -> Self {
        let mut fleet = Self::start(CONFIG, &[]);
        for shard in 0..MEMBERS.len() {
            fleet.add_member(shard, paced());
        }
        fleet.coordinator.until_where("round", |line| line["round"] == 2);
        fleet
    }

    /// Adds one of [`MEMBERS`].
    pub fn add_member(&mut self, shard: usize, on_offer: OnOffer) {
        let rows = data::classes(shard as u64 + 1, ROWS);
        self.add(MEMBERS[shard], &rows, |options| options.hooks.on_offer = Some(on_offer));
    }

    /// Adds a worker with these rows.
    pub fn add(&mut self, name: &str, rows: &str, change: impl FnOnce(&mut Options)) {
        let data = self.home.write(&format!("{name}.csv"), rows);
        let state = StatePlace::Here(self.home.path(format!("worker-{name}")));
        let mut options = Options::new(data, state, self.home.path("tributary/join"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        options.report = Report::new(Arc::new(move |line: &Line| kept.lock().unwrap().push(line.clone())));
        options.name = Some(name.parse::<WorkerName>().unwrap());
        change(&mut options);
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            // Dropped or sent: both mean the end.
            let _ = stopped.await;
        };
        let task = self.runtime.spawn(worker::run(options, shutdown));
        self.members.insert(name.to_owned(), Member { lines, stop: Some(stop), task });
    }

    /// Runs something on the fleet's own runtime; nothing takes longer than [`PATIENCE`] unless it hangs.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let bounded = async { tokio::time::timeout(PATIENCE, future).await };
        self.runtime.block_on(bounded).expect("it ends")
    }

    /// What the coordinator left for workers on this machine.
    #[must_use]
    pub fn invitation(&self) -> Invitation {
        std::fs::read_to_string(self.home.path("tributary/join")).unwrap().parse().unwrap()
    }

    /// An invitation as the command line gives it.
    #[must_use]
    pub fn invite(&self, args: &[&str]) -> Invitation {
        let mut all = vec!["invite", "--address", "127.0.0.1"];
        all.extend(args);
        let said = self.home.run("coordinator", &all);
        assert_eq!(said.code, Some(0), "{}", said.stderr);
        said.stdout.parse().unwrap()
    }

    /// Somebody who holds the local invitation.
    #[must_use]
    pub fn stranger(&self) -> Stranger {
        let _inside = self.runtime.enter();
        Stranger::new(self.invitation())
    }

    /// The value of a series on `/metrics`, labels and all.
    #[must_use]
    pub fn metric(&self, series: &str) -> f64 {
        let page = self.home.get("/metrics").unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{page}")).trim().parse().unwrap()
    }

    /// Waits until the series is at least `least`.
    pub fn until_metric(&self, series: &str, least: f64) {
        let deadline = Instant::now() + PATIENCE;
        while self.metric(series) < least {
            assert!(Instant::now() < deadline, "{series} stays at {}, expected {least}", self.metric(series));
            std::thread::park_timeout(LOOK_EVERY);
        }
    }

    /// Waits until the series is at least `exactly`, which it then is: figures follow what they tell of.
    pub fn assert_metric(&self, series: &str, exactly: f64) {
        self.until_metric(series, exactly);
        assert_eq!(self.metric(series), exactly, "{series}");
    }

    /// What a worker of this process reported so far.
    #[must_use]
    pub fn lines(&self, name: &str) -> Vec<Line> {
        self.members[name].lines.lock().unwrap().clone()
    }

    /// Waits until a worker has reported enough.
    pub fn until_lines(&self, name: &str, enough: impl Fn(&[Line]) -> bool) -> Vec<Line> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let lines = self.lines(name);
            if enough(&lines) {
                return lines;
            }
            assert!(Instant::now() < deadline, "{name} reported only {lines:#?}\n{}", self.coordinator.stderr());
            std::thread::park_timeout(LOOK_EVERY);
        }
    }

    /// Stops a worker, and says how it ended.
    pub fn stop(&mut self, name: &str) -> Result<Outcome, WorkerError> {
        let mut member = self.members.remove(name).unwrap();
        drop(member.stop.take());
        self.run(member.task).unwrap()
    }

    /// Waits for a worker's own end.
    pub fn end_of(&mut self, name: &str) -> Result<Outcome, WorkerError> {
        let mut member = self.members.remove(name).unwrap();
        let ended = self.run(&mut member.task).unwrap();
        drop(member.stop);
        ended
    }

    /// Two more rounds from now on.
    pub fn goes_on(&mut self) -> Value {
        let now = self.metric("tributary_round");
        self.coordinator.until_where("round", |line| line["round"].as_f64().unwrap() >= now + 2.0)
    }

    /// The fleet has noticed nothing: rounds go on, no member was ever lost, and the model is the one that the same
    /// fleet has when it is left alone.
    pub fn assert_unharmed(&mut self) {
        let last = self.goes_on();
        self.assert_nobody_lost();
        self.assert_undisturbed(&last);
    }

    /// No member was ever lost, in its own eyes or in the coordinator's.
    pub fn assert_nobody_lost(&self) {
        for line in self.coordinator.lines() {
            let name = line["name"].as_str().unwrap_or_default();
            assert!(line["event"] != "gone" || !MEMBERS.contains(&name), "{line}\n{}", self.coordinator.stderr());
        }
        for name in MEMBERS {
            let lines = self.lines(name);
            let joined = lines.iter().filter(|line| matches!(line, Line::Joined { .. })).count();
            let lost = lines.iter().find(|line| matches!(line, Line::Disconnected { .. } | Line::Unreachable { .. }));
            assert_eq!((joined, lost), (1, None), "{name}");
        }
    }

    /// The model of every round up to `last` is the undisturbed fleet's.
    pub fn assert_undisturbed(&self, last: &Value) {
        let round = usize::try_from(last["round"].as_u64().unwrap()).unwrap();
        let expected = undisturbed();
        assert!(round <= expected.len(), "the test took {round} rounds, {} are known", expected.len());
        for line in self.coordinator.lines().filter(|line| line["event"] == "round") {
            let round = usize::try_from(line["round"].as_u64().unwrap()).unwrap();
            assert_eq!(line["model_hash"], *expected[round - 1], "the model of round {round}");
        }
    }
}

impl Drop for LiveFleet {
    fn drop(&mut self) {
        // Workers that lose their coordinator would look for it as long as the runtime lives.
        for member in self.members.values_mut() {
            drop(member.stop.take());
            member.task.abort();
        }
    }
}

/// A member that takes its time.
#[must_use]
pub fn paced() -> OnOffer {
    Arc::new(|_, _| std::thread::sleep(PACE))
}

/// The models of a fleet that nobody attacks, by round.
pub fn undisturbed() -> &'static [String] {
    static MODELS: OnceLock<Vec<String>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let mut fleet = LiveFleet::start(CONFIG, &["--rounds", &ROUNDS_KNOWN.to_string()]);
        for shard in 0..MEMBERS.len() {
            fleet.add_member(shard, Arc::new(|_, _| ()));
        }
        fleet.coordinator.until("done");
        let rounds = fleet.coordinator.lines().filter(|line| line["event"] == "round");
        rounds.map(|line| line["model_hash"].as_str().unwrap().to_owned()).collect()
    })
}
