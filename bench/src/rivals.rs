//! Rivals: Python programs that do one repetition for each line that they are sent.
//!
//! A rival reads an object of JSON a line on its stdin and answers each with one on its stdout (`bench/rivals/serve.py`),
//! so it is set up once and then measured in turn with ours. It ends with its stdin. One that cannot start, or answers
//! something else, is an error: its figures are missing, and nothing else is.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Longer than any rival takes for one repetition, or to start.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where the rivals are: a Python environment with their packages, and their programs.
#[derive(Clone, Debug)]
pub(crate) struct Rivals {
    python: PathBuf,
    programs: PathBuf,
}

impl Rivals {
    /// The environment `venv`, if it is one, with the programs in `programs`.
    pub(crate) fn find(venv: &Path, programs: &Path) -> Option<Self> {
        let python = venv.join("bin/python");
        python.is_file().then(|| Self { python, programs: programs.to_owned() })
    }

    /// Starts `NAME.py`.
    pub(crate) fn start(&self, name: &str, arguments: &[&str]) -> Result<Rival> {
        self.start_with(name, arguments, &[])
    }

    /// Starts `NAME.py` with variables in its environment.
    pub(crate) fn start_with(&self, name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Result<Rival> {
        let program = self.programs.join(format!("{name}.py"));
        let mut command = Command::new(&self.python);
        command.arg("-u").arg(&program).args(arguments).envs(variables.iter().copied());
        let log = tempfile::NamedTempFile::new()?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log.reopen()?);
        let mut child = command.spawn().with_context(|| program.display().to_string())?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("stdout was piped")?;
        let (said, answers) = channel();
        // It ends with the process's stdout.
        thread::spawn(move || BufReader::new(stdout).lines().try_for_each(|line| said.send(line).map_err(drop)));
        Ok(Rival { name: name.to_owned(), child, stdin, answers, log })
    }
}

/// A rival at work. Dropped, it ends.
#[derive(Debug)]
pub(crate) struct Rival {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    answers: Receiver<std::io::Result<String>>,
    log: tempfile::NamedTempFile,
}

impl Rival {
    /// One repetition.
    pub(crate) fn once(&mut self, request: &Value) -> Result<Value> {
        let answer = self.ask(request);
        answer.with_context(|| format!("the rival {} gave no figure: {}", self.name, self.last_word()))
    }

    /// The last line that it said on stderr.
    fn last_word(&self) -> String {
        let log = std::fs::read_to_string(self.log.path()).unwrap_or_default();
        log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned()
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        let stdin = self.stdin.as_mut().context("its stdin is closed")?;
        writeln!(stdin, "{request}")?;
        let line = self.answers.recv_timeout(PATIENCE).context("no answer")??;
        let answer: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        match answer.get("error") {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }

    /// One repetition whose answer is `{"seconds": x}`.
    pub(crate) fn seconds(&mut self, request: &Value) -> Result<f64> {
        let answer = self.once(request)?;
        answer["seconds"].as_f64().with_context(|| format!("expected seconds, got {answer}"))
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        // Told first, so that it can let its own children go.
        drop(self.stdin.take());
        for _ in 0..50 {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
