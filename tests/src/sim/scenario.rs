//! What a seed means: a plan, a fleet, a pace, and a list of faults. All of it is drawn before the world begins, so that
//! a fault can be taken out of the list and the rest stays as it was: that is how a failing seed is shrunk.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use coordinator::store::run::{LIMITS, Limits};
use protocol::draw::Draw;
use protocol::plan::{Durability, LearningPlan, Mode, ModelSpec, Plan, RoundsSpec};

use super::disk::Operation;

/// One world, before it begins.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Where all of it was drawn from.
    pub seed: u64,
    /// The run's plan.
    pub plan: Plan,
    /// Workers of the fleet.
    pub workers: usize,
    /// How long things take.
    pub pace: Pace,
    /// From which sizes on the store does things differently: runs are short, and must see them.
    pub limits: Limits,
    /// In order of time.
    pub faults: Vec<Fault>,
    /// Whether no fault may change the model: every worker's update is in every round.
    pub is_exact: bool,
}

/// How long things take when nothing is wrong.
#[derive(Clone, Debug)]
pub struct Pace {
    /// The longest way of a packet.
    pub hop_max: Duration,
    /// The longest way of a payload or a model.
    pub stream_max: Duration,
    /// A job of the workshop.
    pub job_max: Duration,
    /// A sync of the disk.
    pub sync_max: Duration,
    /// The training of each worker.
    pub train: Vec<Duration>,
}

/// Something that goes wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// When, since the beginning.
    pub at: Duration,
    /// What.
    pub what: What,
}

/// Which way packets do not get through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What the worker sends.
    Up,
    /// What the coordinator sends.
    Down,
    /// Neither.
    Both,
}

/// How a process ends that nobody asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `kill -9`.
    Kill,
    /// The machine loses power.
    PowerCut,
}

/// Where a bit turns over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Anywhere in the journal.
    Journal,
    /// In its last part's last bytes.
    JournalEnd,
    /// In what is attached to one of its last records.
    Attachment,
    /// In one of the last models that are files.
    Model,
    /// In a payload that is a file.
    Payload,
    /// In the schema.
    Schema,
}

/// What goes wrong. Whatever lasts ends by itself.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // each field is what its variant says: whom it strikes, how long it lasts
pub enum What {
    /// A worker's process dies and comes back.
    KillWorker { worker: usize, keeps_disk: bool, is_heard: bool, down: Duration },
    /// The coordinator dies and comes back.
    KillCoordinator { end: End, down: Duration },
    /// The coordinator dies within one of its next operations on the disk.
    CrashCoordinator { operations: u64, end: End, down: Duration },
    /// Somebody stops it in order, and starts it again.
    StopCoordinator { down: Duration },
    /// A connection ends.
    Cut { worker: usize, is_heard: bool },
    /// A worker's next payload, or the next model on its way to it, ends early, its connection not.
    CutStream { worker: usize, up: bool },
    /// Packets do not get through.
    Partition { worker: Option<usize>, way: Way, lasts: Duration },
    /// A worker's process sleeps.
    FreezeWorker { worker: usize, lasts: Duration },
    /// The coordinator's process sleeps; its clock may sleep with it.
    FreezeCoordinator { lasts: Duration, clock_stops: bool },
    /// The coordinator's wall clock is set.
    SetClock { seconds: i64 },
    /// The disk has no room.
    DiskFull { free: u64, lasts: Duration },
    /// The disk takes long.
    SlowDisk { sync: Duration, lasts: Duration },
    /// An operation of the disk fails; the process that saw it ends and comes back.
    Eio { operation: Operation, nth: u64, down: Duration },
    /// A bit turns over while the coordinator is down.
    Flip { place: Place, down: Duration },
    /// A second process with the identity of a worker.
    Clone { worker: usize },
    /// What a worker offered is offered again; with another hash, if `altered`.
    OfferAgain { worker: usize, altered: bool },
    /// A worker's next payload is spoiled on its way, and the worker reconnects later.
    Spoil { worker: usize },
    /// A worker's training fails once, and the worker reconnects later.
    Diverge { worker: usize },
    /// A worker leaves for good.
    Leave { worker: usize, revoked: bool },
}

impl What {
    /// Its name, for counting.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::KillWorker { keeps_disk: true, .. } => "worker killed",
            Self::KillWorker { .. } => "worker killed, disk lost",
            Self::KillCoordinator { end: End::Kill, .. } => "coordinator killed",
            Self::KillCoordinator { .. } => "power cut",
            Self::CrashCoordinator { end: End::Kill, .. } => "crash within a disk operation",
            Self::CrashCoordinator { .. } => "power cut within a disk operation",
            Self::StopCoordinator { .. } => "coordinator stopped",
            Self::Cut { .. } => "connection cut",
            Self::CutStream { .. } => "stream cut",
            Self::Partition { way: Way::Both, .. } => "partition",
            Self::Partition { .. } => "one-way partition",
            Self::FreezeWorker { .. } => "worker asleep",
            Self::FreezeCoordinator { .. } => "coordinator asleep",
            Self::SetClock { .. } => "clock set",
            Self::DiskFull { .. } => "disk full",
            Self::SlowDisk { .. } => "disk slow",
            Self::Eio { .. } => "disk error",
            Self::Flip { place: Place::Journal | Place::JournalEnd, .. } => "bit flipped in the journal",
            Self::Flip { place: Place::Attachment, .. } => "bit flipped in an attachment",
            Self::Flip { .. } => "bit flipped in a file",
            Self::Clone { .. } => "identity twice",
            Self::OfferAgain { altered: false, .. } => "offered again",
            Self::OfferAgain { .. } => "offered again, altered",
            Self::Spoil { .. } => "payload spoiled",
            Self::Diverge { .. } => "training failed",
            Self::Leave { .. } => "left for good",
        }
    }

    /// How long it lasts.
    #[must_use]
    pub fn lasts(&self) -> Duration {
        match self {
            Self::KillWorker { down, .. }
            | Self::KillCoordinator { down, .. }
            | Self::CrashCoordinator { down, .. }
            | Self::StopCoordinator { down }
            | Self::Eio { down, .. }
            | Self::Flip { down, .. } => *down,
            Self::Partition { lasts, .. }
            | Self::FreezeWorker { lasts, .. }
            | Self::FreezeCoordinator { lasts, .. }
            | Self::DiskFull { lasts, .. }
            | Self::SlowDisk { lasts, .. } => *lasts,
            _ => Duration::ZERO,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.at, self.what)
    }
}

/// Faults by name.
pub type Counts = BTreeMap<&'static str, u64>;

impl Scenario {
    /// What `seed` means.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        let mut draw = Drawn(Draw::new(seed, "scenario", 0, ""));
        let size = Size::draw(&mut draw);
        let is_exact = draw.one_in(2);
        let bears_a_loss = !is_exact && size.workers > 3 && draw.one_in(2);
        let plan = draw_plan(&mut draw, &size, is_exact, bears_a_loss);
        let pace = Pace::draw(&mut draw, &size);
        let limits = draw_limits(&mut draw);
        let mut scenario = Self { seed, plan, workers: size.workers, pace, limits, faults: Vec::new(), is_exact };
        scenario.faults = draw_faults(&mut draw, &scenario, &size, bears_a_loss);
        scenario
    }

    /// The same run with nothing wrong.
    #[must_use]
    pub fn undisturbed(&self) -> Self {
        Self { faults: Vec::new(), ..self.clone() }
    }

    /// When the last fault is over.
    #[must_use]
    pub fn quiet_from(&self) -> Duration {
        self.faults.iter().map(|fault| fault.at + fault.what.lasts()).max().unwrap_or_default()
    }
}

/// Draws of things that are not numbers.
struct Drawn(Draw);

impl Drawn {
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.0.below(n as u64)).unwrap_or(0)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.0.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    fn millis(&mut self, below: u64) -> Duration {
        Duration::from_micros(self.0.below(below * 1000) + 1)
    }

    /// Short mostly, long at times.
    fn down(&mut self) -> Duration {
        let longest = self.pick(&[5, 200, 200, 3_000, 20_000]);
        self.millis(longest)
    }

    fn end(&mut self) -> End {
        self.pick(&[End::Kill, End::PowerCut])
    }
}

/// How large a world is.
struct Size {
    workers: usize,
    rounds: u32,
    faults: usize,
    model: ModelSpec,
}

impl Size {
    fn draw(draw: &mut Drawn) -> Self {
        let small = |draw: &mut Drawn| (2 + draw.below(5), 3 + u32::try_from(draw.below(6)).unwrap_or(0), 32);
        let (workers, rounds, faults) = match draw.below(50) {
            0 => (20 + draw.below(21), 4, 16),
            1 => (3 + draw.below(2), 100 + u32::try_from(draw.below(150)).unwrap_or(0), 60),
            _ => small(draw),
        };
        let wide = draw.below(60);
        let model = match wide {
            _ if workers > 8 || rounds > 8 => ModelSpec::Linear,
            // A model and payloads that are files of their own.
            0 => ModelSpec::Mlp { hidden: vec![11_000] },
            // Payloads that wait for a permit.
            1..=6 => ModelSpec::Mlp { hidden: vec![1_400] },
            _ => ModelSpec::Linear,
        };
        Self { workers, rounds, faults: draw.below(faults + 1), model }
    }
}

fn draw_limits(draw: &mut Drawn) -> Limits {
    let part_bytes = draw.pick(&[LIMITS.part_bytes, 3_000, 30_000]);
    Limits { part_bytes, attached_bytes: draw.pick(&[LIMITS.attached_bytes, 50, 5_000]), room_bytes: 1 << 16 }
}

fn draw_plan(draw: &mut Drawn, size: &Size, is_exact: bool, bears_a_loss: bool) -> Plan {
    let mut learning = LearningPlan { model: size.model.clone(), ..LearningPlan::default() };
    learning.data.validation_fraction = 0.0;
    learning.train.rounds = size.rounds;
    learning.train.learning_rate = 1.0;
    learning.train.mode = match draw.below(8) {
        0 if size.model == ModelSpec::Linear && size.rounds < 8 => Mode::Central,
        1 | 2 => Mode::Gradient,
        _ => Mode::Federated,
    };
    learning.train.momentum = if learning.train.mode == Mode::Gradient { draw.pick(&[0.0, 0.5]) } else { 0.0 };
    if learning.train.mode == Mode::Central {
        learning.train.learning_rate = 0.05;
    }
    let all = u32::try_from(size.workers).unwrap_or(u32::MAX);
    let durability = draw.pick(&[Durability::Round, Durability::Update]);
    let mut rounds =
        RoundsSpec { min_workers: Some(all), fraction: 1.0, quorum: 1.0, durability, ..RoundsSpec::default() };
    if !is_exact {
        rounds.quorum = if bears_a_loss { 0.5 } else { draw.pick(&[0.6, 1.0]) };
        rounds.fraction = draw.pick(&[1.0, 0.7, 0.4]);
        rounds.deadline = draw.pick(&[None, Some(2), Some(20)]).map(Duration::from_secs);
        rounds.over_select = draw.pick(&[0.0, 0.0, 0.3]);
        // Of a round of one, none can be lost.
        let any = draw.one_in(4) && !bears_a_loss;
        rounds.min_workers = if any { None } else { Some(all - u32::from(bears_a_loss)) };
    }
    Plan::new(learning, rounds).expect("what is drawn is in range")
}

impl Pace {
    fn draw(draw: &mut Drawn, size: &Size) -> Self {
        let longest = draw.pick(&[20, 60, 60, 2500]);
        Self {
            hop_max: draw.millis(12),
            stream_max: draw.millis(60),
            job_max: draw.millis(8),
            sync_max: draw.millis(20),
            train: (0..size.workers).map(|_| draw.millis(longest)).collect(),
        }
    }
}

fn draw_faults(draw: &mut Drawn, scenario: &Scenario, size: &Size, bears_a_loss: bool) -> Vec<Fault> {
    let mut at = Duration::ZERO;
    let mut faults = Vec::new();
    let mut lost = !bears_a_loss;
    for _ in 0..size.faults {
        let pause = draw.pick(&[5, 60, 60, 300, 300, 2_000]);
        at += draw.millis(pause);
        let what = draw_fault(draw, scenario, &mut lost);
        faults.push(Fault { at, what });
    }
    faults
}

fn draw_fault(draw: &mut Drawn, scenario: &Scenario, lost: &mut bool) -> What {
    let worker = draw.below(scenario.workers);
    match draw.below(30) {
        0..=2 => What::KillWorker { worker, keeps_disk: !draw.one_in(4), is_heard: draw.one_in(2), down: draw.down() },
        3..=5 => What::KillCoordinator { end: draw.end(), down: draw.down() },
        6..=9 => What::CrashCoordinator { operations: draw.0.below(24), end: draw.end(), down: draw.down() },
        10 => What::StopCoordinator { down: draw.down() },
        11 | 12 => What::Cut { worker, is_heard: draw.one_in(2) },
        13 => What::CutStream { worker, up: draw.one_in(2) },
        14 | 15 => draw_partition(draw, worker),
        16 => What::FreezeWorker { worker, lasts: draw_sleep(draw) },
        17 => What::FreezeCoordinator { lasts: draw_sleep(draw), clock_stops: draw.one_in(2) },
        18 => What::SetClock { seconds: draw.pick(&[-31_536_000, -3600, -1, 60, 31_536_000]) },
        19 | 20 => {
            let lasts = draw.pick(&[100, 2_000, 20_000]);
            What::DiskFull { free: draw.0.below(4_000), lasts: draw.millis(lasts) }
        }
        21 => What::SlowDisk { sync: draw.millis(4_000), lasts: draw.millis(20_000) },
        22 => draw_eio(draw),
        23 | 24 => {
            let place = draw.pick(&[
                Place::Journal,
                Place::JournalEnd,
                Place::Attachment,
                Place::Attachment,
                Place::Model,
                Place::Model,
                Place::Payload,
                Place::Schema,
            ]);
            What::Flip { place, down: draw.down() }
        }
        25 if !scenario.is_exact => What::Clone { worker },
        26 => What::OfferAgain { worker, altered: draw.one_in(3) },
        27 if !scenario.is_exact => What::Spoil { worker },
        28 if !*lost => {
            *lost = true;
            What::Diverge { worker }
        }
        29 if !*lost => {
            *lost = true;
            What::Leave { worker, revoked: draw.one_in(2) }
        }
        _ => What::OfferAgain { worker, altered: false },
    }
}

fn draw_partition(draw: &mut Drawn, worker: usize) -> What {
    let longest = draw.pick(&[200, 5_000, 70_000]);
    let worker = if draw.one_in(4) { None } else { Some(worker) };
    What::Partition { worker, way: draw.pick(&[Way::Up, Way::Down, Way::Both]), lasts: draw.millis(longest) }
}

fn draw_sleep(draw: &mut Drawn) -> Duration {
    let longest = draw.pick(&[300, 300, 15_000, 60_000, 3_600_000]);
    draw.millis(longest)
}

fn draw_eio(draw: &mut Drawn) -> What {
    let operation = draw.pick(&[Operation::Append, Operation::Append, Operation::Sync, Operation::Rename]);
    What::Eio { operation, nth: draw.0.below(6), down: draw.down() }
}
