//! Line 8: a fleet that has nothing to do: what it costs the released coordinator, and how fast it is in.
//!
//! A run is under way: two peers hold its first round's tasks and never offer. Everybody else came after the round began, so
//! that they are in and idle: connected, known, kept alive by QUIC every 25 s, and given nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use protocol::session::{Acquaintance, Initiator, Responder, StaticKey, StaticSecret};
use tributary_tests::Running;
use tributary_tests::stranger::random;

use crate::bare::Bare;
use crate::figures::Samples;
use crate::fleet::{Crew, Fleet};
use crate::herd::{Enrolled, Herd};
use crate::home::{Place, config};
use crate::machine;
use crate::process;
use crate::report::{Aim, Measure, Report};
use crate::sides::alternate;
use crate::suite::Bench;

const LINE: u8 = 8;

/// Fleets, each grown out of the one before.
const FLEETS: [usize; 3] = [1_000, 5_000, 20_000];

/// What one idle worker may take on both sides together: a fleet that needs more than half of the memory is left out.
const BOTH_SIDES_BYTES: u64 = 120_000;

/// What is beyond this machine is computed from the slopes.
const ON_PAPER: usize = 100_000;

/// Handshakes under way at once, so few that none waits for a packet that was lost in a crowd: of 24 at once, stock quinn
/// makes 280 a second.
const AT_ONCE: usize = 8;

/// The same while a fleet grows: below what the coordinator takes without asking for proof of the address.
const GROWN_AT_ONCE: usize = 24;

/// Threads of the bare server while it takes connections, as it comes.
const BARE_THREADS: usize = 2;

/// Bare connections that are kept alive, on one thread as the coordinator's, as often in all as the largest fleet is.
const KEPT_ALIVE: usize = 5_000;

/// For so long the coordinator is looked at before anybody comes.
const ALONE: Duration = Duration::from_secs(20);

/// Joins and bare handshakes in one repetition.
const BATCH: usize = 300;

/// Some things are done a moment after a worker is in.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// No fleet is grown that would be grown for longer.
const GROWING_MAX: Duration = Duration::from_secs(60);

/// For so many times as long as it takes to keep every connection alive once, the coordinator is looked at.
const PERIODS: usize = 3;

/// Every connection says something once in that time.
const KEEP_ALIVE: Duration = transport::limits::KEEP_ALIVE;

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    joins(bench, report, runtime.handle())?;
    let (fits, large): (Vec<usize>, Vec<usize>) =
        FLEETS.into_iter().partition(|fleet| *fleet as u64 * BOTH_SIDES_BYTES <= machine::memory_available() / 2);
    for fleet in large {
        let needed = fleet as u64 * BOTH_SIDES_BYTES / 500_000;
        report.missing(LINE, &format!("{fleet} idle workers"), &format!("needs {needed} MB of free memory"));
    }
    if let Some(largest) = fits.last() {
        idle(bench, report, runtime.handle(), &fits, *largest)?;
    }
    Ok(())
}

// --- what they cost ---

/// A coordinator with a run under way.
struct Busy {
    coordinator: Running,
    enrolled: Enrolled,
    _fleet: Fleet,
    _place: Place,
}

fn busy(bench: &Bench, handle: &tokio::runtime::Handle, workers: usize) -> Result<Busy> {
    let connections = 2 * (workers + 100);
    let limits = format!("[limits]\nconnections = {connections}\n");
    let place = Place::new(bench.tmpfs()?, &(config("[8]", 2, "round") + &limits));
    let enrolled = Enrolled::write(&place.state(), place.listen(), workers)?;
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let mut fleet = Fleet::start(handle, &place.invitation(), Crew { peers: 2, probe: false, open_to: 0 });
    fleet.until_assigned(1, false);
    Ok(Busy { coordinator, enrolled, _fleet: fleet, _place: place })
}

/// What a fleet of one size was seen to cost.
struct Cost {
    workers: usize,
    resident: u64,
    joins_a_second: f64,
}

fn idle(
    bench: &Bench,
    report: &mut Report,
    handle: &tokio::runtime::Handle,
    fleets: &[usize],
    largest: usize,
) -> Result<()> {
    let busy = busy(bench, handle, largest)?;
    let process = busy.coordinator.id();
    let alone = Alone { resident: process::resident(process)?, share: share(process, ALONE)? };
    let mut herd = Herd::new(handle, busy.enrolled.clone())?;
    let mut costs: Vec<Cost> = Vec::new();
    for fleet in fleets {
        let before = herd.len();
        let rate = costs.last().map_or(f64::INFINITY, |cost| cost.joins_a_second);
        let expected = real(*fleet - before) / rate;
        if expected > GROWING_MAX.as_secs_f64() {
            report.missing(LINE, &format!("{fleet} idle workers"), &format!("they would need {expected:.0} s to join"));
            continue;
        }
        let took = herd.grow(*fleet, GROWN_AT_ONCE)?;
        std::thread::sleep(SETTLED_AFTER);
        let joins_a_second = real(*fleet - before) / took.as_secs_f64();
        let resident = process::resident(process)?;
        eprintln!("  {fleet} are in: {:.1} MB, {joins_a_second:.0} joins/s", kilobytes(resident) / 1e3);
        costs.push(Cost { workers: *fleet, resident, joins_a_second });
    }
    // In each period every connection is kept alive once.
    let shares = (0..PERIODS).map(|_| share(process, KEEP_ALIVE)).collect::<Result<Vec<_>>>()?;
    herd.check()?;
    drop((herd, busy));
    let bare = costs.last().map(|cost| KEEP_ALIVE.mul_f64(real(KEPT_ALIVE) / real(cost.workers)));
    let bare = bare.map(|every| Bare::start(1)?.keep_alive(KEPT_ALIVE, AT_ONCE, every)).transpose()?;
    tell(report, &alone, shares.into(), bare.unwrap_or_default(), &costs);
    Ok(())
}

/// The coordinator with its run, before anybody idle comes.
struct Alone {
    resident: u64,
    share: f64,
}

/// How much of one core a process takes, in hundredths.
fn share(process: u32, meanwhile: Duration) -> Result<f64> {
    let (began, before) = (Instant::now(), process::cpu(process)?);
    std::thread::sleep(meanwhile);
    Ok(100.0 * (process::cpu(process)? - before).as_secs_f64() / began.elapsed().as_secs_f64())
}

fn tell(report: &mut Report, alone: &Alone, shares: Samples, bare: Duration, costs: &[Cost]) {
    let Some(last) = costs.last() else { return };
    let from = std::iter::once((0, alone.resident)).chain(costs.iter().map(|cost| (cost.workers, cost.resident)));
    let slopes = from.zip(costs).map(|((workers, resident), cost)| {
        (kilobytes(cost.resident) - kilobytes(resident)) / real(cost.workers - workers)
    });
    let slopes = Samples::from(slopes.collect::<Vec<_>>());
    let memory = format!(
        "{:.1} MB were resident before the first came, {:.1} MB with all",
        kilobytes(alone.resident) / 1e3,
        kilobytes(last.resident) / 1e3
    );
    let share = shares.median();
    let each_us = 1e4 * (share - alone.share) * KEEP_ALIVE.as_secs_f64() / real(last.workers);
    let cpu = format!(
        "{:.2} % were taken before the first came, for two workers with a task; an idle one is heard every {} s, which takes \
         {each_us:.0} µs; quinn by itself takes {:.0} µs for one keep-alive, of {KEPT_ALIVE} connections kept alive as often in all",
        alone.share,
        KEEP_ALIVE.as_secs(),
        1e6 * bare.as_secs_f64()
    );
    let mut add = |name: String, unit, ours: Samples, aim, reason: &str| {
        let (theirs, ratio, reason) = (None, Samples::default(), reason.to_owned());
        report.add(Measure { line: LINE, name, unit, ours, theirs, ratio, aim, reason });
    };
    let each = slopes.median();
    add(format!("memory for each idle worker, up to {}", last.workers), "kB", slopes, Aim::AtMost(45.0), &memory);
    add(format!("{} idle workers: of one core", last.workers), "%", shares, Aim::AtMost(3.0), &cpu);
    add("the same before they came".to_owned(), "%", vec![alone.share].into(), Aim::None, "");
    add("a keep-alive of one of them, all in all".to_owned(), "µs", vec![each_us].into(), Aim::None, "");
    let bare = vec![1e6 * bare.as_secs_f64()].into();
    add("a keep-alive of bare quinn, the server's side".to_owned(), "µs", bare, Aim::None, "");
    for cost in costs {
        let rate = vec![cost.joins_a_second].into();
        add(format!("joins up to {} workers", cost.workers), "joins/s", rate, Aim::None, "");
    }
    let paper = (kilobytes(alone.resident) + each * real(ON_PAPER)) / 1e6;
    add(format!("{ON_PAPER} idle workers on paper: memory"), "GB", vec![paper].into(), Aim::None, "");
    let paper = alone.share + (share - alone.share) * real(ON_PAPER) / real(last.workers);
    add(format!("{ON_PAPER} idle workers on paper: of one core"), "%", vec![paper].into(), Aim::None, "");
}

// --- how fast they are in ---

fn joins(bench: &Bench, report: &mut Report, handle: &tokio::runtime::Handle) -> Result<()> {
    let busy = busy(bench, handle, BATCH)?;
    let (mut herd, bare) = (Herd::new(handle, busy.enrolled.clone())?, Bare::start(BARE_THREADS)?);
    let (mut our_datagrams, mut their_datagrams) = (Samples::default(), Samples::default());
    let (mut coordinators, mut workers) = (Samples::default(), Samples::default());
    let both = || anyhow::Ok((process::cpu(busy.coordinator.id())?, process::cpu(std::process::id())?));
    let each_us = |took: Duration| 1e6 * took.as_secs_f64() / real(BATCH);
    // Whoever comes back after an outage of the network was here before; this is how it is after one of the coordinator.
    let first = real(BATCH) / herd.grow(BATCH, AT_ONCE)?.as_secs_f64();
    herd.disperse();
    let ours = || {
        let before = both()?;
        let took = herd.grow(BATCH, AT_ONCE)?;
        let after = both()?;
        coordinators.add(each_us(after.0 - before.0));
        workers.add(each_us(after.1 - before.1));
        our_datagrams.add(herd.datagrams());
        herd.disperse();
        Ok(real(BATCH) / took.as_secs_f64())
    };
    let theirs = || {
        let (took, datagrams) = bare.connect(BATCH, AT_ONCE)?;
        their_datagrams.add(datagrams);
        Ok(real(BATCH) / took.as_secs_f64())
    };
    let (ours, theirs) = alternate(bench.repetitions, ours, theirs)?;
    let ratio = ours.with(&theirs, |ours, theirs| ours / theirs);
    let session = session_handshake()?.as_secs_f64();
    let reason = format!(
        "a handshake of quinn takes {:.0} µs of the machine and {:.0} datagrams, a join {:.0} µs and {:.0}: {:.0} µs of a core in \
         the coordinator and {:.0} µs in the worker; {:.0} µs of them are the session's handshake, both ends together, which leaves \
         {:.2} of quinn's rate if nothing else took time on {} cores",
        1e6 / theirs.median(),
        their_datagrams.median(),
        1e6 / ours.median(),
        our_datagrams.median(),
        coordinators.median(),
        workers.median(),
        1e6 * session,
        1.0 / (1.0 + session * theirs.median() / real(machine::cores())),
        machine::cores()
    );
    report.add(Measure {
        line: LINE,
        name: "joins of enrolled workers that were in before, to `Welcome`".to_owned(),
        unit: "/s",
        ours,
        theirs: Some(("bare quinn", theirs)),
        ratio,
        aim: Aim::AtLeast(0.8),
        reason,
    });
    report.add(Measure {
        line: LINE,
        name: "the same when they come for the first time since the start".to_owned(),
        unit: "/s",
        ours: vec![first].into(),
        theirs: None,
        ratio: Samples::default(),
        aim: Aim::None,
        reason: String::new(),
    });
    Ok(())
}

/// What the session's handshake of two that met before takes on one core, both ends together.
fn session_handshake() -> Result<Duration> {
    const COUNT: u32 = 200;
    let secret = || StaticSecret::from(random::<32>());
    let (worker, coordinator): (StaticKey, StaticKey) = (secret().into(), secret().into());
    let here = Acquaintance::new(&worker, coordinator.public())?;
    let there = Arc::new(Acquaintance::new(&coordinator, worker.public())?);
    let began = Instant::now();
    for _ in 0..COUNT {
        let (initiator, message) = Initiator::start(b"bench", &worker, secret(), &here, &[])?;
        let (responder, _) = Responder::read(b"bench", &coordinator, Some(Arc::clone(&there)), &message)?;
        let (answer, _) = responder.reply(secret(), &[])?;
        initiator.finish(&answer)?;
    }
    Ok(began.elapsed() / COUNT)
}

#[allow(clippy::cast_precision_loss)] // workers
fn real(count: usize) -> f64 {
    count as f64
}

#[allow(clippy::cast_precision_loss)] // bytes of memory
fn kilobytes(bytes: u64) -> f64 {
    bytes as f64 / 1e3
}
