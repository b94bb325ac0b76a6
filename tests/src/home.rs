//! A user's world, and the processes in it.
//!
//! A test waits for a line, an exit or an answer, with a deadline that only a hang can reach. Everything here panics
//! when it cannot go on: it is for tests only.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{free_port, get, ours};

/// Nothing that a test waits for takes longer, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A home of its own: `HOME` and `XDG_STATE_HOME` of the processes in it, and a place for files.
#[derive(Debug)]
pub struct Home {
    dir: TempDir,
    port: u16,
    http: u16,
}

/// A running coordinator or worker. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    stdout: Receiver<String>,
    seen: VecDeque<String>,
    stderr: Arc<Mutex<String>>,
    /// Ends when all of stderr is in `stderr`.
    listening: Option<JoinHandle<()>>,
}

/// What a process said next.
#[derive(Debug)]
pub enum Next {
    /// This JSON line.
    Line(Value),
    /// Nothing for as long as it was listened to.
    Silence,
    /// Nothing any more.
    End,
}

/// What a process that has ended said.
#[derive(Debug)]
pub struct Said {
    /// Its exit status: a number, or nothing if a signal ended it.
    pub code: Option<i32>,
    /// What went to stdout.
    pub stdout: String,
    /// What went to stderr.
    pub stderr: String,
}

impl Said {
    /// The JSON lines on stdout whose `event` is `event`.
    #[must_use]
    pub fn lines(&self, event: &str) -> Vec<Value> {
        let lines = self.stdout.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.filter(|value: &Value| value["event"] == event).collect()
    }
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Home {
    /// An empty one, with a free port for QUIC and one for HTTP.
    #[must_use]
    pub fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), port: free_port(), http: free_port() }
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The coordinator's state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.path("tributary/coordinator")
    }

    /// Where the coordinator listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Writes a file and gives its path.
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Starts a coordinator on this home's ports with `--json`; it lies beside the test's own executable.
    pub fn coordinator(&self, args: &[&str]) -> Running {
        let listen = self.address().to_string();
        let mut all = vec!["--listen", &listen, "--json"];
        all.extend(args);
        self.start("coordinator", &all)
    }

    /// Starts a worker on a data file of this home with `--json`.
    pub fn worker(&self, data: &str, args: &[&str]) -> Running {
        let data = self.path(data).display().to_string();
        let mut all = vec!["--data", &data, "--json"];
        all.extend(args);
        self.start("worker", &all)
    }

    /// Starts a binary.
    pub fn start(&self, binary: &str, args: &[&str]) -> Running {
        Running::start(&format!("{binary} {}", args.join(" ")), self.command(binary).args(args), Stdio::null())
    }

    /// Runs a binary to its end.
    pub fn run(&self, binary: &str, args: &[&str]) -> Said {
        self.start(binary, args).end()
    }

    /// A command in this home that knows nothing of the user's settings. Its `/metrics` are on this home's port, which
    /// the environment says, so that a command line can be just what a user types.
    #[must_use]
    pub fn command(&self, binary: &str) -> Command {
        let mut command = ours(binary, self.dir.path());
        let http = format!("127.0.0.1:{}", self.http);
        command.env("TRIBUTARY_HTTP", http).env("RUST_BACKTRACE", "0").current_dir(self.dir.path());
        command
    }

    /// What the coordinator's HTTP server answers with, if it is there and says 200.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<String> {
        get(self.http, path)
    }

    /// The port of `/metrics`.
    #[must_use]
    pub fn http_port(&self) -> u16 {
        self.http
    }
}

impl Running {
    /// Starts a command; `name` is how failures call it.
    pub fn start(name: &str, command: &mut Command, stdin: Stdio) -> Self {
        let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (send, stdout) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let stderr = Arc::new(Mutex::new(String::new()));
        let (err, kept) = (BufReader::new(child.stderr.take().unwrap()), Arc::clone(&stderr));
        let listening = std::thread::spawn(move || {
            for line in err.lines().map_while(Result::ok) {
                let mut kept = kept.lock().unwrap();
                kept.push_str(&line);
                kept.push('\n');
            }
        });
        Self { name: name.to_owned(), child, stdout, seen: VecDeque::new(), stderr, listening: Some(listening) }
    }

    /// The next JSON line whose `event` is `event`; what comes before it is passed over.
    pub fn until(&mut self, event: &str) -> Value {
        self.until_where(event, |_| true)
    }

    /// The next JSON line with that `event` which `fits`.
    pub fn until_where(&mut self, event: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next(deadline.saturating_duration_since(Instant::now())) {
                Next::Line(line) if line["event"] == event && fits(&line) => return line,
                Next::Line(_) => {}
                Next::Silence => panic!("no {event:?} line from {}", self.told()),
                Next::End => panic!("ended without a {event:?} line: {}", self.told()),
            }
        }
    }

    /// The next JSON line, if it comes in time.
    pub fn next(&mut self, within: Duration) -> Next {
        match self.stdout.recv_timeout(within) {
            Ok(line) => {
                let value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"));
                self.seen.push_back(line);
                Next::Line(value)
            }
            Err(RecvTimeoutError::Timeout) => Next::Silence,
            Err(RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    /// The JSON lines that were read so far.
    pub fn lines(&self) -> impl Iterator<Item = Value> {
        self.seen.iter().map(|line| serde_json::from_str(line).unwrap())
    }

    /// Waits until stderr has `text`.
    pub fn until_stderr(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.stderr().contains(text) {
            let ended = self.listening.as_ref().is_none_or(JoinHandle::is_finished);
            assert!(!ended || self.stderr().contains(text), "ended without {text:?}: {}", self.told());
            assert!(Instant::now() < deadline, "no {text:?} on stderr of {}", self.told());
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// What it said on stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Reads no more of its stdout: the pipe is closed at its next line.
    pub fn close_stdout(&mut self) {
        self.stdout = channel().1;
    }

    /// `kill -9`, and its end.
    pub fn kill(&mut self) {
        self.kill_alive();
    }

    /// `kill -9`, and its end; whether it lived until then.
    pub fn kill_alive(&mut self) -> bool {
        self.child.kill().unwrap();
        self.child.wait().unwrap().code().is_none()
    }

    /// Sends a signal by its name, such as `INT`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// The process's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, and gives all that it said.
    pub fn end(mut self) -> Said {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.stdout.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.seen.push_back(line),
                Err(RecvTimeoutError::Timeout) => panic!("does not end: {}", self.told()),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = self.wait_until(deadline);
        self.listening.take().into_iter().for_each(|listening| listening.join().unwrap());
        let lines: Vec<_> = std::mem::take(&mut self.seen).into();
        Said { code: status.code(), stdout: lines.join("\n"), stderr: self.stderr() }
    }

    fn wait_until(&mut self, deadline: Instant) -> ExitStatus {
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "does not end: {}", self.told());
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// All that it said so far, for a failure's message.
    #[must_use]
    pub fn told(&self) -> String {
        let lines: Vec<_> = self.seen.iter().cloned().collect();
        format!("{}\nstdout:\n{}\nstderr:\n{}", self.name, lines.join("\n"), self.stderr())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already gone is what we want.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
