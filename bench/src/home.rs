//! Coordinators to measure: in this process, on any disk, or the released binary.
#![allow(clippy::unwrap_used)] // a benchmark that cannot go on panics, and its line is then said not to be measured

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use coordinator::cli::RunSettings;
use coordinator::config::{Config, Overrides};
use coordinator::store::{Disk, Disks, RealDisk};
use coordinator::{Bound, Options};
use protocol::invitation::Invitation;
use serde_json::Value;
use tokio::sync::oneshot;
use tributary_tests::Running;
use tributary_tests::process::free_port;

/// Longer than anything that does not hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// Threads of a coordinator's runtime; its binary has half as many as there are cores, at most four.
const RUNTIME_THREADS: usize = 2;

/// A config for a network with these hidden layers.
pub(crate) fn config(hidden: &str, workers: usize, durability: &str) -> String {
    format!(
        "[model]\nhidden = {hidden}\n[train]\nrounds = 1000000\n[rounds]\nmin_workers = {workers}\n\
         deadline_s = 3600\ndurability = {durability:?}\n"
    )
}

/// A coordinator in this process. It stops with the value.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) bound: Bound,
    lines: mpsc::Receiver<(Instant, Value)>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Coordinator {
    pub(crate) fn start(state: PathBuf, config: &str, disks: Option<Disks>) -> Self {
        let config = Config::parse("bench", config, |_| None, Overrides::default()).unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let (exit_when_done, new_run, json) = (false, false, true);
        let settings = RunSettings { config, listen: any, http: any, state, exit_when_done, new_run, json };
        let (told, lines) = mpsc::channel();
        let (listening, bound) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let mut options = Options::quiet(settings);
        options.json = Some(Box::new(Clocked { told, line: Vec::new() }));
        options.disks = disks;
        options.listening = Some(listening);
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(RUNTIME_THREADS).enable_all().build();
            runtime.unwrap().block_on(coordinator::run(options, async { drop(stopped.await) })).unwrap();
        });
        let bound = bound.blocking_recv().unwrap();
        Self { bound, lines, stop: Some(stop), thread: Some(thread) }
    }

    /// When this round was committed.
    pub(crate) fn committed(&self, round: u32) -> Instant {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (at, line) = self.lines.recv_timeout(deadline - Instant::now()).unwrap();
            assert!(line["event"] != "gone" && line["event"] != "paused", "{line}");
            if line["event"] == "round" && line["round"] == round {
                return at;
            }
        }
    }

    /// The newest round that is committed by now.
    pub(crate) fn newest_round(&self) -> Option<u64> {
        self.lines.try_iter().filter_map(|(_, line)| line["round"].as_u64().filter(|_| line["event"] == "round")).last()
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            // Its own message is on stderr already.
            drop(panic);
        }
    }
}

/// Takes JSON lines, and the time at which each was written.
struct Clocked {
    told: mpsc::Sender<(Instant, Value)>,
    line: Vec<u8>,
}

impl Write for Clocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = serde_json::from_slice(&self.line).map_err(io::Error::other)?;
            self.line.clear();
            drop(self.told.send((Instant::now(), line)));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// --- disks ---

/// A disk that keeps nothing. A run that begins on it, and does not end, reads nothing back: small models and payloads
/// are in memory as well.
#[derive(Debug)]
struct Nowhere;

impl Disk for Nowhere {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        Ok(Vec::new())
    }
    fn read(&self, _name: &str, _from: u64) -> io::Result<Box<dyn Read + Send>> {
        Err(io::ErrorKind::NotFound.into())
    }
    fn append(&mut self, _name: &str, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn truncate(&mut self, _name: &str, _length: u64) -> io::Result<()> {
        Ok(())
    }
    fn sync(&mut self, _name: &str) -> io::Result<()> {
        Ok(())
    }
    fn rename(&mut self, _from: &str, _to: &str) -> io::Result<()> {
        Ok(())
    }
    fn remove(&mut self, _name: &str) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) fn nowhere() -> Disks {
    Arc::new(|_| Ok(Box::new(Nowhere)))
}

/// A real disk whose syncs take longer.
#[derive(Debug)]
struct Slow {
    real: RealDisk,
    wait: Duration,
}

impl Disk for Slow {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        self.real.list()
    }
    fn read(&self, name: &str, from: u64) -> io::Result<Box<dyn Read + Send>> {
        self.real.read(name, from)
    }
    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.real.append(name, bytes)
    }
    fn reserve(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        self.real.reserve(name, bytes)
    }
    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        self.real.truncate(name, length)
    }
    fn sync(&mut self, name: &str) -> io::Result<()> {
        thread::sleep(self.wait);
        self.real.sync(name)
    }
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.real.rename(from, to)
    }
    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.real.remove(name)
    }
}

pub(crate) fn slow(wait: Duration) -> Disks {
    Arc::new(move |path| Ok(Box::new(Slow { real: RealDisk::new(path)?, wait })))
}

// --- the released binary ---

/// A place for one coordinator process, which may be killed and started again, and for workers that look for it.
#[derive(Debug)]
pub(crate) struct Place {
    dir: tempfile::TempDir,
    port: u16,
    http: u16,
}

impl Place {
    pub(crate) fn new(under: &Path, config: &str) -> Self {
        let dir = tempfile::TempDir::new_in(under).unwrap();
        std::fs::write(dir.path().join("run.toml"), config).unwrap();
        Self { dir, port: free_port(), http: free_port() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.path("tributary/coordinator")
    }

    /// Where its coordinator listens.
    pub(crate) fn listen(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub(crate) fn coordinator(&self) -> Running {
        let (listen, http) = (format!("127.0.0.1:{}", self.port), format!("127.0.0.1:{}", self.http));
        let config = self.path("run.toml").display().to_string();
        let mut command = self.command("coordinator");
        command.args(["--config", &config, "--listen", &listen, "--http", &http, "--json"]);
        Running::start("coordinator", &mut command, Stdio::null())
    }

    /// A worker with its own data; `log` is its filter of log lines.
    pub(crate) fn worker(&self, name: &str, log: &str) -> Running {
        let data = self.path(&format!("{name}.csv"));
        if !data.exists() {
            std::fs::write(&data, tributary_tests::data::classes(name.len() as u64, 60)).unwrap();
        }
        let mut command = self.command("worker");
        command.args(["--data", &data.display().to_string(), "--json"]).env("TRIBUTARY_LOG", log);
        Running::start(name, &mut command, Stdio::null())
    }

    pub(crate) fn invitation(&self) -> Invitation {
        std::fs::read_to_string(self.path("tributary/join")).unwrap().parse().unwrap()
    }

    /// The directory of the only run.
    pub(crate) fn run(&self) -> PathBuf {
        let mut runs = std::fs::read_dir(self.state().join("runs")).unwrap().map(|entry| entry.unwrap().path());
        runs.find(|path| path.is_dir()).unwrap()
    }

    fn command(&self, binary: &str) -> Command {
        let mut command = Command::new(binary_path(binary));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TRIBUTARY_")) {
            command.env_remove(name);
        }
        command.env("HOME", self.dir.path()).env("XDG_STATE_HOME", self.dir.path()).env_remove("XDG_RUNTIME_DIR");
        command
    }
}

/// Beside this program.
fn binary_path(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name(name);
    assert!(path.is_file(), "{} is not built: `make bench-durability` does it", path.display());
    path
}

/// Lines of a process, when one of them came.
pub(crate) fn when(running: &mut Running, event: &str) -> Instant {
    running.until(event);
    Instant::now()
}

/// Bytes of all files below a directory; what goes away meanwhile is passed over.
pub(crate) fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

/// A value that several threads fill.
pub(crate) type Shared<T> = Arc<Mutex<T>>;
