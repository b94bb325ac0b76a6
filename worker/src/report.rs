//! What a worker tells its owner: one line each for a person, one JSON object each for a program.
//!
//! Only what the owner would tell a colleague is here; the rest goes to the log. No line holds a key, a parameter or a
//! row.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use protocol::evaluation::EvaluationSummary;
use protocol::ids::{Hash, RunId, TaskId, WorkerName};
use protocol::messages::TaskKind;
use protocol::plan::Mode;
use serde::Serialize;

/// Something worth a line.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Line {
    /// Nobody invited us yet.
    Waiting {
        /// Where the invitation of a coordinator on this machine would be.
        join: PathBuf,
        /// How many coordinators we are enrolled with, if that is the question.
        enrolments: usize,
    },
    /// We are known from now on.
    Enrolled {
        /// Under this name.
        name: WorkerName,
        /// When our certificate ends, in seconds since 1970.
        expires_unix_s: u64,
    },
    /// The coordinator cannot be reached; said once, until it could be again.
    Unreachable {
        /// Where it was looked for.
        addresses: Vec<String>,
        /// What happened.
        error: String,
    },
    /// The connection ended; we come back.
    Disconnected {
        /// Why.
        error: String,
    },
    /// We are in.
    Joined {
        /// Our name in the fleet.
        name: WorkerName,
        /// The run.
        run: RunId,
        /// Who computes what.
        mode: Mode,
        /// Rows to learn from.
        training_rows: usize,
        /// Rows held out.
        held_out_rows: usize,
    },
    /// Something about the data, or about the disk, that the owner should know.
    Note {
        /// What.
        text: String,
    },
    /// A task is done and offered.
    Round {
        /// Its round; 0 for what comes before the first.
        round: u32,
        /// What was done.
        #[serde(serialize_with = "kind_in_words")]
        kind: TaskKind,
        /// Training rows behind it.
        examples: u64,
        /// Training steps behind it.
        steps: u64,
        /// Mean loss over the training steps.
        #[serde(skip_serializing_if = "Option::is_none")]
        train_loss: Option<f64>,
        /// What the model that the task started from scores on our held-out rows.
        #[serde(skip_serializing_if = "Option::is_none")]
        eval: Option<Figures>,
        /// How long the work took.
        seconds: f64,
        /// The payload's length.
        bytes: u64,
    },
    /// An update is in the model, and the coordinator signed for it.
    Receipt {
        /// The round that it is in.
        round: u32,
        /// Its task.
        task: TaskId,
        /// The payload.
        hash: Hash,
        /// The model that came of the round.
        model_hash: Hash,
    },
    /// Something we offered was not accepted.
    Refused {
        /// Its task.
        task: TaskId,
        /// Why.
        reason: String,
    },
    /// We were told to stop.
    Stopped,
    /// The run is over.
    Done {
        /// The final model.
        model_hash: Hash,
        /// Receipts that we got in this process.
        receipts: u64,
    },
}

/// Evaluation figures of one worker's held-out rows; absent is what cannot be said.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs)] // the names are the coordinator's own
pub struct Figures {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rmse: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r2: Option<f64>,
}

impl From<EvaluationSummary> for Figures {
    fn from(summary: EvaluationSummary) -> Self {
        let EvaluationSummary { count: _, loss, accuracy, auc, rmse, r2 } = summary;
        Self { loss, accuracy, auc, rmse, r2 }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named =
            [("loss", self.loss), ("accuracy", self.accuracy), ("AUC", self.auc), ("RMSE", self.rmse), ("R²", self.r2)];
        let said: Vec<String> =
            named.iter().filter_map(|(name, figure)| Some(format!("{name} {:.4}", (*figure)?))).collect();
        f.write_str(&said.join(", "))
    }
}

/// The line for a person.
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting { join, enrolments: 0 } => {
                write!(
                    f,
                    "waiting for a coordinator on this machine ({}); to join another one, say --join",
                    join.display()
                )
            }
            Self::Waiting { join, enrolments } => write!(
                f,
                "enrolled with {enrolments} coordinators and waiting for one of them on this machine ({}); to choose \
                 another one, say --join",
                join.display()
            ),
            Self::Enrolled { name, .. } => write!(f, "enrolled as {name}"),
            Self::Unreachable { addresses, error } => {
                write!(f, "no coordinator at {} ({error}); trying again until there is", addresses.join(", "))
            }
            Self::Disconnected { error } => write!(f, "disconnected ({error}); coming back"),
            Self::Joined { name, mode, training_rows, held_out_rows, .. } => {
                write!(f, "joined as {name}: {training_rows} rows to learn from, {held_out_rows} held out, ")?;
                f.write_str(mode_in_words(*mode))
            }
            Self::Note { text } => write!(f, "note: {text}"),
            Self::Round { round, kind: TaskKind::Evaluation, eval, .. } => match eval {
                Some(eval) => write!(f, "round {round}: the model on held-out rows: {eval}"),
                None => write!(f, "round {round}: no held-out rows to evaluate the model on"),
            },
            Self::Round { round, kind, train_loss, eval, seconds, examples, .. } => {
                match kind {
                    TaskKind::Survey => f.write_str("survey: ")?,
                    TaskKind::Rows => f.write_str("rows shared: ")?,
                    _ => write!(f, "round {round}: ")?,
                }
                if let Some(loss) = train_loss {
                    write!(f, "trained to loss {loss:.4}, ")?;
                }
                if let Some(eval) = eval {
                    write!(f, "model before: {eval}, ")?;
                }
                write!(f, "{examples} rows, {seconds:.2} s")
            }
            Self::Receipt { round, .. } => write!(f, "round {round}: receipt, the update is in the model"),
            Self::Refused { task, reason } => write!(f, "task {task}: not accepted: {reason}"),
            Self::Stopped => f.write_str("stopped; everything is kept"),
            // Of a run of mode "central", or one that was over when we came.
            Self::Done { receipts: 0, .. } => f.write_str("done: the run is over"),
            Self::Done { receipts, .. } => write!(f, "done: {receipts} updates of this worker are in the model"),
        }
    }
}

fn mode_in_words(mode: Mode) -> &'static str {
    match mode {
        Mode::Federated => "only weight changes leave this machine",
        Mode::Gradient => "only gradients leave this machine",
        Mode::Central => "encoded training rows leave this machine",
    }
}

fn kind_in_words<S: serde::Serializer>(kind: &TaskKind, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match kind {
        TaskKind::Update => "update",
        TaskKind::Gradient => "gradient",
        TaskKind::Rows => "rows",
        TaskKind::Survey => "survey",
        TaskKind::Evaluation => "evaluation",
        TaskKind::Partial => "partial",
    })
}

/// Who hears the lines. Clones share one listener.
#[derive(Clone)]
pub struct Report(Arc<dyn Fn(&Line) + Send + Sync>);

impl Report {
    /// A report to `listener`, which must not block for long: it is called from the event loop.
    #[must_use]
    pub fn new(listener: Arc<dyn Fn(&Line) + Send + Sync>) -> Self {
        Self(listener)
    }

    /// A report to nobody.
    #[must_use]
    pub fn silent() -> Self {
        Self(Arc::new(|_| ()))
    }

    pub(crate) fn say(&self, line: &Line) {
        (self.0)(line);
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Report")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn round(train_loss: Option<f64>) -> Line {
        let eval = Figures { loss: Some(0.5), accuracy: Some(0.75), auc: None, rmse: None, r2: None };
        Line::Round {
            round: 3,
            kind: TaskKind::Update,
            examples: 80,
            steps: 10,
            train_loss,
            eval: Some(eval),
            seconds: 0.25,
            bytes: 400,
        }
    }

    #[test]
    fn a_round_is_one_line_for_a_person_and_one_object_for_a_program() {
        let line = round(Some(0.4));
        assert_eq!(
            line.to_string(),
            "round 3: trained to loss 0.4000, model before: loss 0.5000, accuracy 0.7500, 80 rows, 0.25 s"
        );
        assert_eq!(
            serde_json::to_string(&line).unwrap(),
            "{\"event\":\"round\",\"round\":3,\"kind\":\"update\",\"examples\":80,\"steps\":10,\"train_loss\":0.4,\
             \"eval\":{\"loss\":0.5,\"accuracy\":0.75},\"seconds\":0.25,\"bytes\":400}"
        );
    }

    #[test]
    fn figures_that_do_not_exist_are_absent() {
        assert!(!serde_json::to_string(&round(None)).unwrap().contains("null"));
    }

    #[test]
    fn the_last_line_of_a_program_is_done() {
        let line = Line::Done { model_hash: Hash([0; 32]), receipts: 2 };
        assert!(serde_json::to_string(&line).unwrap().starts_with("{\"event\":\"done\",\"model_hash\":\"0000"));
        assert_eq!(line.to_string(), "done: 2 updates of this worker are in the model");
    }

    #[test]
    fn who_came_too_late_for_an_update_is_not_told_that_none_is_in_the_model() {
        assert_eq!(Line::Done { model_hash: Hash([0; 32]), receipts: 0 }.to_string(), "done: the run is over");
    }
}
