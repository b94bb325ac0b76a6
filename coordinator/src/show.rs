//! What people and programs see: JSON lines on stdout, plain lines or a progress bar on stderr, the status page.
//!
//! One event becomes at most one line of each. The JSON lines are a contract: fields are only ever added. A program
//! that closed its end of stdout does not end a run.

use std::io::{self, IsTerminal as _, Write};
use std::net::SocketAddr;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use protocol::evaluation::EvaluationSummary;
use protocol::federation::{Event, Gone, Notice, RoundFigures, Stage, Status};
use protocol::ids::{Hash, RunId};
use serde::Serialize;

use crate::intake::is_full;

/// Lines that may wait for room on the disk that a program has them written to.
const PENDING_BYTES_MAX: usize = 1 << 20;

/// One line of `--json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Line<'a> {
    /// Workers can come in.
    Listening {
        /// Where (UDP).
        address: SocketAddr,
        /// Where `/metrics` is.
        http: SocketAddr,
        /// The run.
        run: RunId,
        /// Rounds that are committed already.
        round: u32,
    },
    /// A worker is in.
    Worker {
        /// Its name.
        name: &'a str,
        /// How many are in.
        workers: u32,
    },
    /// A worker is gone, until it comes back.
    Gone {
        /// Its name.
        name: &'a str,
        /// Why.
        reason: String,
    },
    /// A stretch of the run begins.
    Stage {
        /// Which.
        stage: Stage,
    },
    /// A round is committed.
    Round(Round),
    /// The run waits for something that does not come by itself.
    Paused {
        /// For what.
        reason: String,
    },
    /// It goes on.
    Resumed,
    /// Too few workers are in for anything to begin.
    Waiting {
        /// How many are in.
        workers: u32,
        /// How many it takes.
        needed: u32,
    },
    /// The run was given up.
    Aborted {
        /// Why.
        reason: &'a str,
    },
    /// The run is over.
    Done(Done<'a>),
}

/// A committed round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// From 1.
    pub round: u32,
    /// Whose updates are in it.
    pub workers: u32,
    /// Training rows behind them.
    pub examples: u64,
    /// Mean training loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<f64>,
    /// The evaluation of the model that the round started from.
    pub eval: Evaluated,
    /// From the first assignment to the new model.
    pub seconds: f64,
    /// The new model.
    pub model_hash: Hash,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Done<'a> {
    /// Committed rounds.
    pub rounds: u32,
    /// The evaluation of the last model.
    pub eval: Evaluated,
    /// The last model.
    pub model_hash: Hash,
    /// Where it is.
    pub model: &'a Path,
}

/// An evaluation; absent is what cannot be said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Evaluated {
    /// Mean loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Share classified right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Area under the ROC curve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    /// Root of the mean squared error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rmse: Option<f64>,
    /// Coefficient of determination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r2: Option<f64>,
    /// Held-out rows.
    pub count: u64,
}

impl From<&EvaluationSummary> for Evaluated {
    fn from(summary: &EvaluationSummary) -> Self {
        let EvaluationSummary { count, loss, accuracy, auc, rmse, r2 } = *summary;
        Self { loss, accuracy, auc, rmse, r2, count }
    }
}

impl From<&RoundFigures> for Round {
    fn from(figures: &RoundFigures) -> Self {
        Self {
            round: figures.round,
            workers: figures.workers,
            examples: figures.examples,
            train_loss: figures.train_loss,
            eval: (&figures.evaluation).into(),
            seconds: figures.seconds,
            model_hash: figures.model,
        }
    }
}

/// Where lines go.
pub struct Show {
    /// Where JSON lines go, if a program reads.
    json: Option<Lines>,
    look: Look,
    rounds: u32,
    /// The run is over: only its end is still to be told, and who leaves now is no news.
    is_over: bool,
}

/// How a person is told.
#[derive(Clone, Debug)]
pub enum Look {
    /// Not at all: fleets in tests.
    Silent,
    /// Plain lines on stderr.
    Plain,
    /// A progress bar on stderr, and lines above it.
    Bar(ProgressBar),
}

impl Look {
    /// A bar at a terminal, else plain lines.
    #[must_use]
    pub fn of_stderr(json: bool) -> Self {
        if json || !io::stderr().is_terminal() {
            return Self::Plain;
        }
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} rounds  {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self::Bar(bar)
    }

    /// Tells a person one line.
    pub fn say(&self, line: &str) {
        match self {
            Self::Silent => {}
            Self::Plain => {
                // Whoever closed stderr does not want to know.
                // In one piece, since stderr has no buffer.
                let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
            }
            Self::Bar(bar) => bar.suspend(|| {
                let _ = writeln!(io::stderr().lock(), "{line}");
            }),
        }
    }
}

/// Log lines, told like everything else.
#[derive(Debug)]
pub struct LogWriter(pub Look);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        // What is merely told looks like everything else that is told; a warning shows that it is one.
        let line = line.trim();
        self.0.say(line.strip_prefix("INFO ").unwrap_or(line));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for Show {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Show").field("json", &self.json.is_some()).field("look", &self.look).finish_non_exhaustive()
    }
}

impl Show {
    /// Lines for a program go to `json`, lines for a person as `look` says; the plan has so many rounds.
    #[must_use]
    pub fn new(json: Option<Box<dyn Write + Send>>, look: Look, rounds: u32) -> Self {
        if let Look::Bar(bar) = &look {
            bar.set_length(rounds.into());
        }
        let json = json.map(|out| Lines { out, pending: Vec::new(), ripe: 0 });
        Self { json, look, rounds, is_over: false }
    }

    /// Tells a person something that no program needs.
    pub fn say(&self, line: &str) {
        self.look.say(line);
    }

    /// A line for a program; it is written by the next [`Self::flush`].
    pub fn line(&mut self, line: &Line<'_>) {
        if let Some(json) = &mut self.json {
            json.put(line);
        }
    }

    /// Whether lines for a program wait to be written.
    #[must_use]
    pub fn has_lines(&self) -> bool {
        self.json.as_ref().is_some_and(|json| json.ripe > 0)
    }

    /// Writes the lines for a program that came since the last time. Whoever reads them is woken once.
    pub fn flush(&mut self) {
        let Some(json) = self.json.as_mut().filter(|json| json.ripe > 0) else { return };
        if json.write().is_err() {
            self.json = None;
            tracing::warn!("nobody reads the JSON lines any more");
        }
    }

    /// Where workers come in, and what runs.
    pub fn listening(&mut self, address: SocketAddr, http: SocketAddr, status: &Status) {
        let (run, round) = (status.run, status.round);
        self.line(&Line::Listening { address, http, run, round });
        self.say(&format!("listening on {address} (UDP), metrics on http://{http}/metrics"));
        let from = if round > 0 { format!(", goes on after round {round} of {}", self.rounds) } else { String::new() };
        self.say(&format!("run {run}{from}"));
    }

    /// A committed round: when it commits, and again after a restart.
    pub fn round(&mut self, figures: &RoundFigures) {
        self.line(&Line::Round(figures.into()));
        let told = sentence(figures.train_loss, &figures.evaluation);
        match &self.look {
            Look::Bar(bar) => {
                bar.set_position(figures.round.into());
                bar.set_message(told);
            }
            look => look.say(&format!(
                "round {}/{}: {} workers, {} rows, {:.2} s{}{told}",
                figures.round,
                self.rounds,
                figures.workers,
                figures.examples,
                figures.seconds,
                if told.is_empty() { "" } else { ", " },
            )),
        }
    }

    /// The end of a run.
    pub fn done(&mut self, rounds: u32, evaluation: &EvaluationSummary, model_hash: Hash, model: &Path) {
        self.line(&Line::Done(Done { rounds, eval: evaluation.into(), model_hash, model }));
        if let Look::Bar(bar) = &self.look {
            bar.finish_and_clear();
        }
        let told = sentence(None, evaluation);
        let told = if told.is_empty() { told } else { format!(": {told}") };
        let plural = if rounds == 1 { "" } else { "s" };
        self.say(&format!("done after {rounds} round{plural}{told}"));
        self.say(&format!("model {model_hash} is in {}", model.display()));
    }

    /// Only the end is still to be told.
    pub fn is_ending(&mut self) {
        self.is_over = true;
    }

    /// Tells what an event tells.
    pub fn saw(&mut self, event: &Event) {
        // A commit may become durable while goodbyes are said.
        if self.is_over && !matches!(event, Event::Committed { .. }) {
            return;
        }
        match event {
            Event::Committed { figures, .. } => self.round(figures),
            Event::Extended { round, extension } => {
                self.say(&format!("round {round} goes on past its deadline, under quorum ({extension} of 3)"));
            }
            Event::Aborted { sentence } => {
                self.line(&Line::Aborted { reason: sentence });
            }
            Event::Notice(notice) => self.saw_notice(notice),
            Event::Surveyed { frozen, .. } => {
                self.say(&format!("schema frozen, the model has {} parameters", frozen.parameters));
            }
            Event::Finished { .. } => self.is_over = true,
            Event::Lost { task } => {
                self.say(&format!("the held payload of task {task} is damaged; its worker is asked for it again"));
            }
            Event::Reverted { round } => {
                self.say(&format!("the models after round {round} are damaged; the rounds since are made again"));
            }
            Event::Redone { round } => self.say(&format!("round {round} is made again, with the same model")),
            Event::Started { .. }
            | Event::Opened { .. }
            | Event::Assigned { .. }
            | Event::Held { .. }
            | Event::Withdrawn { .. }
            | Event::Closed { .. }
            | Event::Voided => {}
        }
    }

    fn saw_notice(&mut self, notice: &Notice) {
        match notice {
            Notice::Ready { name, workers } => {
                self.line(&Line::Worker { name: name.as_str(), workers: *workers });
                self.say(&format!("{name} is in ({workers} now)"));
            }
            Notice::Gone { name, why } => {
                self.line(&Line::Gone { name: name.as_str(), reason: why.to_string() });
                if *why != Gone::Left {
                    self.say(&format!("{name} is gone: {why}"));
                }
            }
            Notice::Stage { stage, .. } => self.line(&Line::Stage { stage: *stage }),
            Notice::Countdown { seconds, workers } => {
                self.say(&format!("{workers} workers are in; a third is waited for, {seconds} s at most"));
            }
            Notice::Refused { name, task, refusal } => {
                self.say(&format!("refused task {task} of {name}: {refusal}"));
            }
            Notice::Paused(pause) => {
                self.line(&Line::Paused { reason: pause.to_string() });
                self.say(&format!("paused: {pause}"));
            }
            Notice::Resumed => {
                self.line(&Line::Resumed);
                self.say("goes on");
            }
            Notice::TakenUp { round: 0, held, open } => {
                self.say(&format!("the survey goes on: {held} of {} answers are here", held + open));
            }
            Notice::TakenUp { round, held, open } => {
                self.say(&format!("round {round} goes on: {held} of {} updates are held", held + open));
            }
            Notice::Waiting { have, need } => {
                self.line(&Line::Waiting { workers: *have, needed: *need });
                let lacking = need.saturating_sub(*have);
                let noun = if lacking == 1 { "worker" } else { "workers" };
                self.say(&format!("waiting for {lacking} more {noun}: {have} of {need} are in"));
            }
            Notice::Joined { name } => tracing::debug!(%name, "session is up"),
            Notice::Late { name, task } => tracing::debug!(%name, %task, "late offer"),
            Notice::Duplicate { name, task } => tracing::debug!(%name, %task, "repeated offer"),
            Notice::Folded { task } => tracing::debug!(%task, "folded"),
        }
    }
}

/// Lines on their way to a program.
struct Lines {
    out: Box<dyn Write + Send>,
    /// What is to be written; more than the newest lines if a file on a full disk had no room for them.
    pending: Vec<u8>,
    /// Lines that came since it was tried last.
    ripe: u32,
}

impl Lines {
    fn put(&mut self, line: &Line<'_>) {
        serde_json::to_writer(&mut self.pending, line).expect("a line is JSON, and memory takes it");
        self.pending.push(b'\n');
        self.ripe += 1;
    }

    fn write(&mut self) -> io::Result<()> {
        self.ripe = 0;
        match self.drain() {
            Err(error) if is_full(&error) && self.pending.len() <= PENDING_BYTES_MAX => Ok(()),
            drained => drained,
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            match self.out.write(&self.pending) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.pending.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.flush()
    }
}

/// The figures that there are.
fn sentence(train_loss: Option<f64>, evaluation: &EvaluationSummary) -> String {
    let figures = [
        ("train loss", train_loss),
        ("loss", evaluation.loss),
        ("accuracy", evaluation.accuracy),
        ("AUC", evaluation.auc),
        ("RMSE", evaluation.rmse),
        ("R²", evaluation.r2),
    ];
    let told = figures.iter().filter_map(|(name, value)| value.map(|value| format!("{name} {value:.4}")));
    told.collect::<Vec<_>>().join(", ")
}

/// What `/status` and `coordinator status` say.
#[derive(Clone, Debug, Default)]
pub struct StatusPage {
    /// Whether workers can come in.
    pub listening: bool,
    /// Whether the run waits for room on the disk.
    pub disk_full: bool,
    /// Where they come in.
    pub address: Option<SocketAddr>,
    /// What the machine says.
    pub status: Option<Status>,
    /// The last committed round.
    pub figures: Option<RoundFigures>,
}

impl StatusPage {
    /// The page as one JSON object.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let status = self.status.as_ref();
        let names = |names: &[protocol::ids::WorkerName]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "listening": self.listening,
            "disk_full": self.disk_full,
            "address": self.address,
            "run": status.map(|s| s.run),
            "stage": status.map(|s| s.stage),
            "round": status.map(|s| s.round),
            "rounds": status.map(|s| s.rounds),
            "model_hash": status.and_then(|s| s.model),
            "workers": status.map(|s| {
                s.workers.iter().map(|(name, busy)| serde_json::json!({"name": name, "busy": busy})).collect::<Vec<_>>()
            }),
            "waiting_for": status.map(|s| names(&s.waiting_for)),
            "paused": status.and_then(|s| s.paused.clone()),
            "workers_lacking": status.map(|s| s.workers_lacking),
            "last": self.figures.as_ref().map(Round::from),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn figures() -> RoundFigures {
        let evaluation =
            EvaluationSummary { count: 7, loss: Some(0.5), accuracy: Some(0.75), auc: None, rmse: None, r2: None };
        let model = Hash([1; 32]);
        RoundFigures { round: 3, workers: 2, examples: 90, train_loss: Some(0.25), evaluation, seconds: 1.5, model }
    }

    #[test]
    fn json_lines_are_the_contract() {
        let captured = Captured::default();
        let mut show = Show::new(Some(Box::new(captured.clone())), Look::Silent, 30);
        show.round(&figures());
        show.done(3, &figures().evaluation, Hash([1; 32]), Path::new("state/model"));
        assert!(captured.0.lock().unwrap().is_empty(), "they are written together");
        show.flush();
        let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        let hash = "01".repeat(32);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[0],
            format!(
                "{{\"event\":\"round\",\"round\":3,\"workers\":2,\"examples\":90,\"train_loss\":0.25,\
                 \"eval\":{{\"loss\":0.5,\"accuracy\":0.75,\"count\":7}},\"seconds\":1.5,\"model_hash\":\"{hash}\"}}"
            )
        );
        assert_eq!(
            lines[1],
            format!(
                "{{\"event\":\"done\",\"rounds\":3,\"eval\":{{\"loss\":0.5,\"accuracy\":0.75,\"count\":7}},\
                 \"model_hash\":\"{hash}\",\"model\":\"state/model\"}}"
            )
        );
    }

    #[test]
    fn a_run_that_waits_for_workers_says_so() {
        let captured = Captured::default();
        let mut show = Show::new(Some(Box::new(captured.clone())), Look::Silent, 30);
        show.saw(&Event::Notice(Notice::Waiting { have: 2, need: 3 }));
        show.flush();
        let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "{\"event\":\"waiting\",\"workers\":2,\"needed\":3}\n");
    }

    #[test]
    fn a_reader_that_goes_away_does_not_matter() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut show = Show::new(Some(Box::new(Closed)), Look::Silent, 30);
        show.round(&figures());
        show.flush();
        assert!(show.json.is_none());
        show.round(&figures());
        show.flush();
    }

    #[test]
    fn lines_that_a_full_disk_has_no_room_for_come_whole_when_it_has() {
        #[derive(Clone, Default)]
        struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);
        impl Write for Disk {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let (written, room) = &mut *self.0.lock().unwrap();
                let count = bytes.len().min(*room);
                if count == 0 {
                    return Err(io::ErrorKind::StorageFull.into());
                }
                written.extend_from_slice(&bytes[..count]);
                *room -= count;
                Ok(count)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let disk = Disk::default();
        let mut show = Show::new(Some(Box::new(disk.clone())), Look::Silent, 30);
        for room in [7, 0, 1 << 20] {
            disk.0.lock().unwrap().1 = room;
            show.line(&Line::Resumed);
            show.flush();
        }
        let text = String::from_utf8(disk.0.lock().unwrap().0.clone()).unwrap();
        assert_eq!(text, "{\"event\":\"resumed\"}\n".repeat(3));
        disk.0.lock().unwrap().1 = 0;
        (0..PENDING_BYTES_MAX / 10).for_each(|_| show.line(&Line::Resumed));
        show.flush();
        assert!(show.json.is_none(), "what waits is bounded");
    }

    #[test]
    fn the_status_page_is_complete_before_anything_runs() {
        let page = StatusPage::default().to_json();
        assert_eq!(page["listening"], false);
        assert!(page["run"].is_null());
    }
}
