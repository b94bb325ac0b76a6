//! A coordinator and its workers as processes, seen from outside.
//!
//! They get a state home of their own, so that they find each other through the invitation that the coordinator leaves
//! there, and so that nothing of the user's is touched. What they print is kept in files; when one of them
//! fails, the end of its file is the error message.

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{ChildStdout, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::Failure;
use crate::score::Predictions;

/// With no round and no exit for this long, something hangs.
const SILENCE_S_MAX: u64 = 120;
/// So much of a failed process's output is shown.
const TAIL_LINES: usize = 20;

/// One training: a config, and a worker for each data file.
pub(crate) struct Training<'a> {
    pub(crate) name: &'a str,
    pub(crate) config: &'a Path,
    pub(crate) data: &'a [PathBuf],
}

/// A process that ended.
struct Ended {
    name: String,
    log: PathBuf,
    status: ExitStatus,
}

/// The processes that run now. Dropping it kills them.
pub(crate) struct Fleet {
    binaries: PathBuf,
    scratch: PathBuf,
    processes: JoinSet<std::io::Result<Ended>>,
}

impl Fleet {
    /// A fleet of the binaries beside this one, whose files go below `scratch`.
    pub(crate) fn new(scratch: &Path) -> Result<Self, Failure> {
        let own = std::env::current_exe()?;
        let binaries = own.parent().ok_or("this program has no folder")?.to_owned();
        for name in ["coordinator", "worker"] {
            if !binaries.join(name).is_file() {
                return Err(format!("{}: no such binary: `make demo` builds it", binaries.join(name).display()).into());
            }
        }
        Ok(Self { binaries, scratch: scratch.to_owned(), processes: JoinSet::new() })
    }

    /// Trains until the coordinator and all workers have ended, and returns the folder of the model.
    pub(crate) async fn train(
        &mut self,
        training: &Training<'_>,
        mut each_line: impl FnMut(&Value),
    ) -> Result<PathBuf, Failure> {
        let home = self.scratch.join(training.name.replace(' ', "-"));
        std::fs::create_dir(&home)?;
        let mut lines = self.start_coordinator(training, &home)?;
        for data in training.data {
            self.start_worker(data, &home)?;
        }

        let mut done = false;
        let mut printing = true;
        while printing || !self.processes.is_empty() {
            let step = async {
                tokio::select! {
                    line = lines.next_line(), if printing => Step::Line(line),
                    Some(ended) = self.processes.join_next() => Step::Ended(ended),
                }
            };
            match timeout(Duration::from_secs(SILENCE_S_MAX), step).await {
                Ok(Step::Line(Ok(Some(line)))) => {
                    let line: Value = serde_json::from_str(&line)
                        .map_err(|error| format!("coordinator: \"{line}\" is not a JSON line: {error}"))?;
                    done |= line["event"] == "done";
                    each_line(&line);
                }
                Ok(Step::Line(Ok(None))) => printing = false,
                Ok(Step::Line(Err(error))) => return Err(error.into()),
                Ok(Step::Ended(ended)) => ended??.check()?,
                Err(_) => return Err(hang(&home).into()),
            }
        }
        if !done {
            return Err(format!("the coordinator ended without a \"done\" line\n{}", logs(&home)).into());
        }
        Ok(home.join("tributary/coordinator/model"))
    }

    /// Has a trained model predict every row of a file.
    pub(crate) async fn predict(&mut self, model: &Path, data: &Path) -> Result<Predictions, Failure> {
        let out = self.scratch.join("predictions.csv");
        let mut command = self.command("worker", &self.scratch);
        command.arg("predict").arg("--model").arg(model).arg("--data").arg(data).arg("--out").arg(&out);
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("worker predict: {}\n{}", output.status, tail(&said)).into());
        }
        Predictions::read(&out)
    }

    /// Kills what still runs and waits until it is gone.
    pub(crate) async fn stop(&mut self) {
        self.processes.shutdown().await;
    }

    fn start_coordinator(
        &mut self,
        training: &Training<'_>,
        home: &Path,
    ) -> Result<Lines<BufReader<ChildStdout>>, Failure> {
        let mut command = self.command("coordinator", home);
        command.arg("--config").arg(training.config);
        command.args(["--listen", &format!("127.0.0.1:{}", free_udp_port()?)]);
        command.args(["--http", &format!("127.0.0.1:{}", free_tcp_port()?)]);
        command.args(["--min-workers", &training.data.len().to_string()]);
        command.args(["--exit-when-done", "--json"]).stdout(Stdio::piped());
        let stdout = self.start("coordinator".to_owned(), command, home)?;
        Ok(BufReader::new(stdout.ok_or("the coordinator has no standard output")?).lines())
    }

    fn start_worker(&mut self, data: &Path, home: &Path) -> Result<(), Failure> {
        let stem = data.file_stem().unwrap_or_default().to_string_lossy();
        let mut command = self.command("worker", home);
        command.arg("--data").arg(data).stdout(Stdio::null());
        self.start(format!("worker-{stem}"), command, home).map(|_| ())
    }

    /// A command on one of the binaries, in a world that knows nothing of this user's settings.
    fn command(&self, binary: &str, home: &Path) -> Command {
        let mut command = Command::new(self.binaries.join(binary));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TRIBUTARY_") {
                command.env_remove(name);
            }
        }
        command.env("HOME", home).env("XDG_STATE_HOME", home).env_remove("XDG_RUNTIME_DIR");
        command
    }

    fn start(&mut self, name: String, mut command: Command, home: &Path) -> Result<Option<ChildStdout>, Failure> {
        let log = home.join(format!("{name}.log"));
        command.stdin(Stdio::null()).stderr(File::create(&log)?).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| format!("{name}: cannot be started: {error}"))?;
        let stdout = child.stdout.take();
        self.processes.spawn(async move {
            let status = child.wait().await?;
            Ok(Ended { name, log, status })
        });
        Ok(stdout)
    }
}

/// What the fleet's processes did next.
enum Step {
    Line(std::io::Result<Option<String>>),
    Ended(Result<std::io::Result<Ended>, tokio::task::JoinError>),
}

impl Ended {
    fn check(self) -> Result<(), Failure> {
        if self.status.success() {
            return Ok(());
        }
        let said = std::fs::read_to_string(&self.log)?;
        Err(format!("{}: {}\n{}", self.name, self.status, tail(&said)).into())
    }
}

fn hang(home: &Path) -> String {
    format!("no round and no exit for {SILENCE_S_MAX} s\n{}", logs(home))
}

/// The end of every log below `home`, by name.
fn logs(home: &Path) -> String {
    let entries = std::fs::read_dir(home).into_iter().flatten().flatten();
    let mut paths: Vec<_> =
        entries.map(|entry| entry.path()).filter(|path| path.extension() == Some("log".as_ref())).collect();
    paths.sort();
    let read = |path: &PathBuf| std::fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
    let name = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    paths.iter().map(|path| format!("{}:\n{}\n", name(path), tail(&read(path)))).collect()
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let kept = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    kept.iter().map(|line| format!("  | {line}")).collect::<Vec<_>>().join("\n")
}

fn free_udp_port() -> std::io::Result<u16> {
    Ok(UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn free_tcp_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
