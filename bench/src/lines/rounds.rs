//! Line 1: what a round of a small model takes, with the released binaries and hardly any training.
//!
//! Coordinators with two and with eight workers each, their state in memory and on the disk, make rounds without an end.
//! A fleet is stopped (SIGSTOP) while another side is measured. Beside them, in the same repetition: an append of as many
//! bytes as a round adds to the journal, with its fdatasync; the same messages between bare connections; Flower.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{SendError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use certs::IdentityKey;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::figures::{Samples, number};
use crate::lines::echo::Echo;
use crate::report::{Aim, Measure, Report};
use crate::rivals::Rival;
use crate::suite::Bench;

/// Sizes of the fleets, and the milliseconds that a round of each may take at the median.
const FLEETS: [(usize, f64); 2] = [(2, 0.35), (8, 0.8)];

/// Rounds of one repetition, after some that do not count.
const ROUNDS: usize = 300;
const WARM_ROUNDS: usize = 30;

/// Rounds of Flower in one repetition.
const FLOWER_ROUNDS: usize = 30;

/// Appends of one repetition.
const APPENDS: usize = 100;

/// Six numbers and a hidden layer of 128 make 1,154 parameters.
const HIDDEN: usize = 128;
const PARAMETERS: usize = 6 * HIDDEN + HIDDEN + 2 * HIDDEN + 2;

/// Rows of each worker: one step of training.
const ROWS: usize = 16;

/// Longer than a fleet takes to come in.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a silent fleet is looked at.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Measures it.
pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    for (workers, aim_ms) in FLEETS {
        Sides::start(bench, workers, report)?.measure(bench.repetitions, aim_ms, report)?;
    }
    Ok(())
}

/// All that is measured in turn for fleets of one size.
struct Sides {
    workers: usize,
    memory: Fleet,
    disk: Option<Fleet>,
    append: Option<PathBuf>,
    echo: Echo,
    flower: Option<Rival>,
}

/// Seconds: of single rounds, and medians of each repetition.
#[derive(Default)]
struct Taken {
    rounds: Samples,
    medians: Samples,
    processor: Processor,
}

impl Sides {
    fn start(bench: &Bench, workers: usize, report: &mut Report) -> Result<Self> {
        let memory = Fleet::start(bench, bench.tmpfs()?, workers)?;
        let on_disk = bench.disk().and_then(|disk| Ok((Fleet::start(bench, disk, workers)?, disk.to_owned())));
        let (disk, append) = match on_disk {
            Ok((fleet, disk)) => (Some(fleet), Some(disk)),
            Err(error) => {
                report.missing(1, &format!("{workers} workers, state on disk"), &format!("{error:#}"));
                (None, None)
            }
        };
        let flower = bench
            .rivals
            .as_ref()
            .map(|rivals| rivals.start("flower_rounds", &[&workers.to_string(), &PARAMETERS.to_string()]));
        let flower = flower.transpose().unwrap_or_else(|error| {
            report.missing(1, &format!("{workers} workers beside Flower"), &format!("{error:#}"));
            None
        });
        Ok(Self { workers, memory, disk, append, echo: Echo::start(workers, PARAMETERS * 4)?, flower })
    }

    /// Measures one side after another, so often, and once more before that.
    fn measure(mut self, repetitions: usize, aim_ms: f64, report: &mut Report) -> Result<()> {
        let (mut memory, mut disk) = (Taken::default(), Taken::default());
        let [mut append, mut echo, mut flower, mut rested] = [(); 4].map(|()| Samples::default());
        for repetition in 0..=repetitions {
            let counts = repetition > 0;
            self.memory.rounds(counts.then_some(&mut memory))?;
            if let (Some(fleet), Some(directory)) = (&mut self.disk, &self.append) {
                let bytes = fleet.rounds(counts.then_some(&mut disk))?;
                let seconds = append_and_sync(directory, bytes, Duration::ZERO)?;
                let later = append_and_sync(directory, bytes, Duration::from_millis(1))?;
                if counts {
                    append.add(seconds.median());
                    rested.add(later.median());
                }
            }
            let seconds = self.echo.rounds(ROUNDS)?.median();
            if counts {
                echo.add(seconds);
            }
            self.ask_flower(&mut flower, counts, report);
        }
        self.tell(&[memory, disk], &[append, echo, flower, rested], aim_ms, report);
        Ok(())
    }

    /// A rival that fails is not asked again.
    fn ask_flower(&mut self, seconds: &mut Samples, counts: bool, report: &mut Report) {
        let Some(rival) = &mut self.flower else { return };
        match flower_rounds(rival) {
            Ok(median) if counts => seconds.add(median),
            Ok(_) => {}
            Err(error) => {
                report.missing(1, &format!("{} workers beside Flower", self.workers), &format!("{error:#}"));
                (self.flower, *seconds) = (None, Samples::default());
            }
        }
    }

    fn tell(&self, [memory, disk]: &[Taken; 2], rest: &[Samples; 4], aim_ms: f64, report: &mut Report) {
        let [append, echo, flower, rested] = rest;
        let reason = self.reason(memory, echo, rested);
        let mut add =
            |name: &str, ours: &Samples, theirs: Option<(&'static str, &Samples)>, ratio: Samples, aim: Aim| {
                let theirs = theirs.map(|(name, samples)| (name, ms(samples)));
                let name = format!("{} workers: {name}", self.workers);
                let reason = reason.clone();
                report.add(Measure { line: 1, name, unit: "ms", ours: ms(ours), theirs, ratio, aim, reason });
            };
        let none = Samples::default;
        let p99 = |taken: &Taken| Samples::from(vec![taken.rounds.quantile(0.99)]);
        add("a round, state in memory, p50", &memory.medians, None, none(), Aim::AtMost(aim_ms));
        add("the same, p99", &p99(memory), None, none(), Aim::None);
        if append.len() > 0 {
            add("a round, state on disk, p50", &disk.medians, None, none(), Aim::None);
            add("the same, p99", &p99(disk), None, none(), Aim::None);
            let more = disk.medians.with(&memory.medians, |disk, memory| disk - memory);
            let ratio = more.with(append, |more, append| more / append);
            add("what the disk adds to it", &more, Some(("append + fdatasync", append)), ratio, Aim::AtMost(1.3));
        }
        let ratio = memory.medians.with(echo, |ours, echo| ours / echo);
        add("a round beside bare QUIC", &memory.medians, Some(("the same messages", echo)), ratio, Aim::AtMost(3.0));
        if flower.len() > 0 {
            let ratio = memory.medians.with(flower, |ours, flower| flower / ours);
            let aim = if self.workers == 8 { Aim::AtLeast(10.0) } else { Aim::None };
            add("a round beside Flower's", &memory.medians, Some(("Flower", flower)), ratio, aim);
        }
    }

    /// What a round costs that no arrangement spares.
    #[allow(clippy::cast_precision_loss)] // a handful
    fn reason(&self, memory: &Taken, echo: &Samples, rested: &Samples) -> String {
        let us = |seconds: f64| number(seconds * 1e6);
        let Processor { coordinator, workers, rounds } = memory.processor;
        let all = (coordinator + workers) / rounds.max(1.0);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let at_once = cores.min(self.workers + 1) as f64;
        let (sign, verify) = signature_seconds();
        let signatures = 2.0 * self.workers as f64 * (sign + verify);
        format!(
            "a round takes {} µs of processor time in {} processes ({} the coordinator, {} each worker), on {cores} cores \
             no less than {} µs of a clock's; {} µs of them are the {} Ed25519 signatures of manifests and receipts, \
             made and verified, as timed alone; the same messages with bare QUIC take {} µs; to wake a sleeping thread takes \
             {} µs, which a datagram does to its receiver, and a sync on disk twice; an append with its fdatasync takes {} µs \
             if the disk had nothing to do for 1 ms before, as between two commits",
            us(all),
            self.workers + 1,
            us(coordinator / rounds.max(1.0)),
            us(workers / rounds.max(1.0) / self.workers as f64),
            us(all / at_once),
            us(signatures),
            2 * self.workers,
            us(echo.median()),
            us(wake_seconds()),
            if rested.len() > 0 { us(rested.median()) } else { "an unknown number of".to_owned() },
        )
    }
}

fn ms(seconds: &Samples) -> Samples {
    seconds.map(|seconds| seconds * 1e3)
}

/// The median of some rounds of Flower's.
fn flower_rounds(rival: &mut Rival) -> Result<f64> {
    let answer = rival.once(&json!({ "rounds": FLOWER_ROUNDS }))?;
    let seconds = answer["seconds"].as_array().with_context(|| format!("expected seconds, got {answer}"))?;
    Ok(Samples::from(seconds.iter().filter_map(serde_json::Value::as_f64).collect::<Vec<f64>>()).median())
}

/// Seconds of single appends of so many bytes to a growing file, each with its fdatasync, and each after a pause.
fn append_and_sync(directory: &Path, bytes: usize, pause: Duration) -> Result<Samples> {
    let file = tempfile::NamedTempFile::new_in(directory)?;
    let mut file = OpenOptions::new().append(true).open(file.path())?;
    let (record, mut seconds) = (vec![7; bytes], Samples::default());
    for _ in 0..APPENDS {
        thread::sleep(pause);
        let began = Instant::now();
        file.write_all(&record)?;
        file.sync_data()?;
        seconds.add_time(began.elapsed());
    }
    Ok(seconds)
}

/// Seconds to make a signature and to verify it, of as many bytes as a manifest has.
fn signature_seconds() -> (f64, f64) {
    use protocol::session::sign::{MANIFEST_CONTEXT, PublicKey, SigningKey};
    let (key, bytes) = (SigningKey::from_bytes(&[7; 32]), [3; 300]);
    let public = PublicKey::read(key.verifying_key().as_bytes()).expect("it was made from a key");
    let key = IdentityKey::from(key);
    let signature = key.sign(MANIFEST_CONTEXT, &bytes);
    let median = |work: &dyn Fn() -> bool| {
        let mut seconds = Samples::default();
        for _ in 0..500 {
            let began = Instant::now();
            assert!(work());
            seconds.add_time(began.elapsed());
        }
        seconds.median()
    };
    let made = median(&|| key.sign(MANIFEST_CONTEXT, &bytes) == signature);
    (made, median(&|| public.verify(MANIFEST_CONTEXT, &bytes, &signature).is_ok()))
}

/// Seconds from a message to a thread that sleeps until it has it: half of what it takes there and back.
fn wake_seconds() -> f64 {
    let (ask, asked) = channel::<()>();
    let (answer, answers) = channel();
    thread::spawn(move || asked.iter().try_for_each(|()| answer.send(())));
    let mut seconds = Samples::default();
    for _ in 0..500 {
        let began = Instant::now();
        if ask.send(()).and_then(|()| answers.recv().map_err(|_| SendError(()))).is_err() {
            break;
        }
        seconds.add_time(began.elapsed() / 2);
    }
    seconds.median()
}

/// Seconds of processor time.
#[derive(Clone, Copy, Default)]
struct Processor {
    coordinator: f64,
    workers: f64,
    rounds: f64,
}

/// A coordinator and its workers, the released binaries. They are stopped while nobody measures them.
struct Fleet {
    _home: tempfile::TempDir,
    state: PathBuf,
    /// The coordinator, and then the workers.
    processes: Vec<Process>,
    out: ChildStdout,
}

/// Ends with the value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // A process that has ended needs neither.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Fleet {
    fn start(bench: &Bench, under: &Path, workers: usize) -> Result<Self> {
        let home = tempfile::TempDir::new_in(under)?;
        let (state, config) = (home.path().join("state"), home.path().join("run.toml"));
        std::fs::write(&config, run_config(workers))?;
        let mut coordinator = command(bench, "coordinator", home.path());
        coordinator.arg("--config").arg(config).arg("--state").arg(&state);
        coordinator.args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--json"]).stdout(Stdio::piped());
        let mut coordinator = Process(coordinator.spawn().context("the coordinator cannot be started")?);
        let out = coordinator.0.stdout.take().context("stdout was piped")?;
        let mut fleet = Self { _home: home, state, processes: vec![coordinator], out };
        fleet.read_until("listening", 1, Instant::now() + PATIENCE, &mut |_| ())?;
        for number in 0..workers {
            fleet.processes.push(fleet.worker(bench, number)?);
        }
        fleet.read_until("round", WARM_ROUNDS, Instant::now() + PATIENCE, &mut |_| ())?;
        fleet.signal(Signal::STOP)?;
        Ok(fleet)
    }

    fn worker(&self, bench: &Bench, number: usize) -> Result<Process> {
        let home = self._home.path();
        let data = home.join(format!("worker-{number}.csv"));
        std::fs::write(&data, rows(number))?;
        let mut worker = command(bench, "worker", home);
        worker.arg("--data").arg(&data).arg("--state").arg(home.join(format!("worker-{number}")));
        worker.arg("--join").arg(format!("@{}", self.state.join("join").display()));
        worker.args(["--min-count", "1"]).stdout(Stdio::null());
        Ok(Process(worker.spawn().context("a worker cannot be started")?))
    }

    /// Lets it make rounds, and takes their times. The bytes that a round adds to the journal.
    fn rounds(&mut self, taken: Option<&mut Taken>) -> Result<usize> {
        self.signal(Signal::CONT)?;
        let deadline = Instant::now() + PATIENCE;
        self.read_until("round", WARM_ROUNDS, deadline, &mut |_| ())?;
        let (bytes, spent, mut seconds) = (self.journal_bytes(), self.processor(), Samples::default());
        let mut last = Instant::now();
        self.read_until("round", ROUNDS + 1, deadline, &mut |at| {
            seconds.add_time(at - last);
            last = at;
        })?;
        let (more, now) = (self.journal_bytes().saturating_sub(bytes), self.processor());
        self.signal(Signal::STOP)?;
        // The first is of the time before, too.
        let seconds: Vec<f64> = seconds.all().skip(1).collect();
        if let Some(taken) = taken {
            seconds.iter().for_each(|second| taken.rounds.add(*second));
            taken.medians.add(Samples::from(seconds).median());
            taken.processor.coordinator += now.coordinator - spent.coordinator;
            taken.processor.workers += now.workers - spent.workers;
            #[allow(clippy::cast_precision_loss)] // some hundreds
            {
                taken.processor.rounds += (ROUNDS + 1) as f64;
            }
        }
        Ok(usize::try_from(more)? / (ROUNDS + 1))
    }

    /// Reads what the coordinator says until it has named an event so often; `each` is told when.
    fn read_until(
        &mut self,
        event: &str,
        count: usize,
        deadline: Instant,
        each: &mut dyn FnMut(Instant),
    ) -> Result<()> {
        let wanted = format!("{{\"event\":\"{event}\"");
        let (mut buffer, mut line, mut seen) = (vec![0; 1 << 16], Vec::new(), 0);
        while seen < count {
            self.await_output(deadline)?;
            let read = self.out.read(&mut buffer)?;
            let now = Instant::now();
            ensure!(read > 0, "the coordinator ended: started by hand, it says why on stderr");
            for byte in &buffer[..read] {
                line.push(*byte);
                if *byte == b'\n' {
                    if line.starts_with(wanted.as_bytes()) && seen < count {
                        seen += 1;
                        each(now);
                    }
                    line.clear();
                }
            }
            if now > deadline {
                bail!("only {seen} of {count} times {event:?} within {PATIENCE:?}");
            }
        }
        Ok(())
    }

    /// Waits until the coordinator has said something, as long as all are there who are to make rounds.
    fn await_output(&mut self, deadline: Instant) -> Result<()> {
        while poll(&mut [PollFd::new(&self.out, PollFlags::IN)], Some(&LOOK_EVERY))? == 0 {
            for (place, Process(child)) in self.processes.iter_mut().enumerate() {
                if let Some(status) = child.try_wait()? {
                    let who = if place == 0 { "the coordinator".to_owned() } else { format!("worker {}", place - 1) };
                    bail!("{who} ended, {status}: started by hand, it says why on stderr");
                }
            }
            ensure!(Instant::now() < deadline, "nothing happened within {PATIENCE:?}");
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        for process in &self.processes {
            let pid = i32::try_from(process.0.id()).ok().and_then(Pid::from_raw).context("a process has a number")?;
            kill_process(pid, signal)?;
        }
        Ok(())
    }

    fn journal_bytes(&self) -> u64 {
        let runs = std::fs::read_dir(self.state.join("runs")).into_iter().flatten().flatten();
        let files = runs.filter_map(|run| std::fs::read_dir(run.path()).ok()).flatten().flatten();
        files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
    }

    /// Processor time so far.
    fn processor(&self) -> Processor {
        let seconds: Vec<f64> = self.processes.iter().map(|process| processor_seconds(process.0.id())).collect();
        Processor { coordinator: seconds[0], workers: seconds[1..].iter().sum(), rounds: 0.0 }
    }
}

/// What a process has used, in user mode and in the kernel, in nanoseconds of the scheduler; 0 where nobody tells.
fn processor_seconds(process: u32) -> f64 {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else { return 0.0 };
    let of = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    };
    tasks.flatten().filter_map(of).sum::<f64>() / 1e9
}

fn command(bench: &Bench, binary: &str, home: &Path) -> Command {
    let mut command = Command::new(bench.binaries.join(binary));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TRIBUTARY_")) {
        command.env_remove(name);
    }
    command.env("HOME", home).env("XDG_STATE_HOME", home).env_remove("XDG_RUNTIME_DIR");
    command.stdin(Stdio::null()).stderr(Stdio::null());
    command
}

fn run_config(workers: usize) -> String {
    format!(
        "[data]\nlabel = \"y\"\nvalidation_fraction = 0.0\n[model]\nhidden = [{HIDDEN}]\n[train]\nrounds = 1000000\n\
         [rounds]\nmin_workers = {workers}\ndeadline_s = 3600\n"
    )
}

/// Six columns of numbers and a label of two classes.
fn rows(worker: usize) -> String {
    let row = |at: usize| {
        let numbers = [7, 5, 3, 11, 2, 13].map(|of| ((at + worker) * 7 % of).to_string());
        format!("{},{}\n", numbers.join(","), at % 2)
    };
    "a,b,c,d,e,f,y\n".to_owned() + &(0..ROWS).map(row).collect::<String>()
}
