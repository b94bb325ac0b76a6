//! What happened ([`Event`]), what is to be done ([`Act`]), what was learned ([`Input`]): the vocabulary of the
//! machine. Nothing here decides anything.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::evaluation::EvaluationSummary;
use crate::ids::{ConnId, Hash, Instance, RunId, TaskId, Time, WorkerId, WorkerName};
use crate::messages::{Failure, FromWorker, Manifest, Metrics, Receipt, Refusal, TaskKind, ToWorker};

/// The number of an [`Output::Append`], counted from 1 since the machine was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventNo(pub u64);

/// What must be true before an act may be released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// The event, and all before it, were handed to the store.
    Appended(EventNo),
    /// The event, and all before it, survive a power cut.
    Synced(EventNo),
}

/// What the `poll` of either machine gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Output<E = Event, A = Act> {
    /// Hand this to the store (a fact) and to telemetry (a fact or a notice).
    Append(E),
    /// Do this, once the gate is open.
    Act {
        /// What it rests on.
        after: Gate,
        /// What to do.
        act: A,
    },
    /// Nothing more now. Sleep until an input comes, or until this time, and then hand in a tick.
    Wait(Option<Time>),
}

/// What the survey froze: figures and hashes; the schema itself is the shell's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// BLAKE3 of the schema's bytes.
    pub schema: Hash,
    /// Their number.
    pub schema_bytes: u64,
    /// The fingerprint of the model's layout.
    pub layout: Hash,
    /// How many numbers the model has.
    pub parameters: u64,
    /// By how many bits a count of rows is shifted down to be a weight.
    pub weight_shift: u32,
}

/// How the merging of surveys ended.
#[derive(Clone, Debug, PartialEq)]
pub enum SurveyOutcome {
    /// One schema for all, and the initial model.
    Frozen {
        /// Its figures.
        frozen: Frozen,
        /// The hash of the initial model.
        model: Hash,
    },
    /// Some workers' data do not fit: each is told why, and the survey is done again without them.
    Unfit(Vec<(WorkerId, String)>),
    /// The workers contradict each other: the run pauses until one of them leaves or comes back different.
    Disagreed(String),
    /// Nothing can be learned from these data: the run fails.
    Impossible(String),
}

/// A held payload's figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldUpdate {
    /// BLAKE3 of the payload.
    pub hash: Hash,
    /// Its length.
    pub bytes: u64,
    /// Training rows behind it.
    pub examples: u64,
    /// Its weight in the mean.
    pub weight: u32,
    /// Its L2 norm; 0 for what is not folded.
    pub norm: f64,
    /// Figures beside it.
    pub metrics: Metrics,
}

/// Why a task is no longer wanted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Withdrawal {
    /// The round closed without it.
    Late,
    /// Its worker left for good, or was revoked.
    Left,
    /// Training gave nothing to offer.
    Failed(Failure),
    /// What came for it was refused.
    Refused(Refusal),
}

/// A committed update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The task.
    pub task: TaskId,
    /// Its worker.
    pub worker: WorkerId,
    /// The payload.
    pub hash: Hash,
}

/// What a committed round is told by.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundFigures {
    /// The round, from 1.
    pub round: u32,
    /// Workers whose updates are in it.
    pub workers: u32,
    /// Training rows behind them.
    pub examples: u64,
    /// Mean training loss, weighted by rows.
    pub train_loss: Option<f64>,
    /// The evaluation of the model that the round started from.
    pub evaluation: EvaluationSummary,
    /// From the first assignment to the new model.
    pub seconds: f64,
    /// The new model.
    pub model: Hash,
}

/// What happened. Facts change durable state and go to the journal; a notice is for telemetry only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A process of the coordinator took the run up: the first fact of each start.
    Started {
        /// The durable count of starts, this one included: the high half of the task ids to come.
        start: u32,
    },
    /// The survey froze a schema, and the initial model stands.
    Surveyed {
        /// Its figures.
        frozen: Frozen,
        /// The initial model.
        model: Hash,
    },
    /// Work of one kind begins, for as many workers as it is given to next.
    Opened {
        /// The round; 0 for a survey and for rows.
        round: u32,
        /// What kind of work.
        kind: TaskKind,
        /// The model to start from; zero where there is none.
        base: Hash,
        /// How many payloads make it whole. More workers may be given it.
        wanted: u32,
    },
    /// A worker was given work.
    Assigned {
        /// The task.
        task: TaskId,
        /// The round; 0 for a survey and for rows.
        round: u32,
        /// What kind of work.
        kind: TaskKind,
        /// Who.
        worker: WorkerId,
        /// Its name.
        name: WorkerName,
        /// The model to start from; zero where there is none.
        base: Hash,
    },
    /// A payload was verified and counts.
    Held {
        /// The task.
        task: TaskId,
        /// The payload's figures.
        update: Box<HeldUpdate>,
    },
    /// A task is no longer wanted.
    Withdrawn {
        /// The task.
        task: TaskId,
        /// Why.
        why: Withdrawal,
    },
    /// A held payload cannot be read back: its worker, who keeps a copy, is asked for it again.
    Lost {
        /// The task.
        task: TaskId,
    },
    /// A round goes on past its deadline, under quorum.
    Extended {
        /// The round.
        round: u32,
        /// How often by now.
        extension: u32,
    },
    /// The set of a round's updates is final, and the new model is being made.
    Closed {
        /// The round.
        round: u32,
    },
    /// The new model stands.
    Committed {
        /// The updates in it.
        entries: Vec<Entry>,
        /// The round's figures.
        figures: Box<RoundFigures>,
    },
    /// The models after this round's are damaged: the rounds since are made again, of the same updates.
    Reverted {
        /// The round whose model is whole; 0 for the first model.
        round: u32,
    },
    /// A reverted round's model was made again, bit for bit.
    Redone {
        /// The round.
        round: u32,
    },
    /// A survey came to nothing, or work was not wholly given out when the process ended: it will begin anew.
    Voided,
    /// The run is over, and its last model was evaluated.
    Finished {
        /// That evaluation.
        evaluation: EvaluationSummary,
    },
    /// The run was given up.
    Aborted {
        /// Why, for a person.
        sentence: String,
    },
    /// Something to be told, which changes nothing durable.
    Notice(Notice),
}

impl Event {
    /// Whether this goes to the journal.
    #[must_use]
    pub fn is_fact(&self) -> bool {
        !matches!(self, Self::Notice(_))
    }

    /// Whether what people and workers are told rests on this being durable: the store syncs for it.
    #[must_use]
    pub fn is_commit(&self) -> bool {
        self.makes_model() || matches!(self, Self::Finished { .. } | Self::Aborted { .. })
    }

    /// Whether a model stands with this, which the store keeps beside it.
    #[must_use]
    pub fn makes_model(&self) -> bool {
        matches!(self, Self::Surveyed { .. } | Self::Committed { .. } | Self::Redone { .. })
    }
}

/// Why a run waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Pause {
    /// Too few updates after all extensions: for whom it waits.
    Waiting(Vec<WorkerName>),
    /// Training diverged at these workers, and without them there is no quorum.
    Diverged(Vec<WorkerName>),
    /// The updates of these workers were refused, and without them there is no quorum.
    Refused(Vec<(WorkerName, Refusal)>),
    /// The workers contradict each other.
    Disagreed(String),
    /// The coordinator's disk is full. What is held stays held.
    DiskFull,
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |names: &[WorkerName]| names.iter().map(WorkerName::as_str).collect::<Vec<_>>().join(", ");
        match self {
            Self::Waiting(names) => write!(f, "waiting for {}", list(names)),
            Self::Diverged(names) => write!(f, "training diverges at {}: lower train.learning_rate", list(names)),
            Self::Refused(refused) => {
                let each = refused.iter().map(|(name, why)| format!("{name} ({why})"));
                write!(f, "the updates of {} were refused", each.collect::<Vec<_>>().join(", "))
            }
            Self::Disagreed(sentence) => f.write_str(sentence),
            Self::DiskFull => f.write_str("the coordinator's disk is full: make room, and it goes on by itself"),
        }
    }
}

/// A stretch of a run, as people are told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Waiting for workers.
    Gathering,
    /// Asking for column statistics.
    Surveying,
    /// Collecting encoded rows, in `central` mode.
    Sharing,
    /// Waiting for updates.
    Training,
    /// Making the new model.
    Committing,
    /// Evaluating the last model.
    Evaluating,
    /// Over.
    Finished,
    /// Given up.
    Aborted,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Self; 8] = [
        Self::Gathering,
        Self::Surveying,
        Self::Sharing,
        Self::Training,
        Self::Committing,
        Self::Evaluating,
        Self::Finished,
        Self::Aborted,
    ];

    /// Its name, as in metrics and the status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gathering => "gathering",
            Self::Surveying => "surveying",
            Self::Sharing => "sharing",
            Self::Training => "training",
            Self::Committing => "committing",
            Self::Evaluating => "evaluating",
            Self::Finished => "finished",
            Self::Aborted => "aborted",
        }
    }
}

/// Something to be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Notice {
    /// A worker's session is up.
    Joined {
        /// Who.
        name: WorkerName,
    },
    /// A worker read the plan and is in; so many are now.
    Ready {
        /// Who.
        name: WorkerName,
        /// How many are in.
        workers: u32,
    },
    /// A worker is gone, until it comes back.
    Gone {
        /// Who.
        name: WorkerName,
        /// Why.
        why: Gone,
    },
    /// A stretch of the run begins, after so many seconds of the one before.
    Stage {
        /// Which.
        stage: Stage,
        /// Which was before.
        before: Stage,
        /// How long that took.
        seconds: f64,
    },
    /// Two workers are in, and a third is waited for.
    Countdown {
        /// For so many seconds.
        seconds: u32,
        /// How many are in.
        workers: u32,
    },
    /// An offer or a payload was refused.
    Refused {
        /// Whose.
        name: WorkerName,
        /// For which task.
        task: TaskId,
        /// Why.
        refusal: Refusal,
    },
    /// An offer came for a task that is no longer wanted.
    Late {
        /// Whose.
        name: WorkerName,
        /// For which task.
        task: TaskId,
    },
    /// An offer came again, or another for the same task.
    Duplicate {
        /// Whose.
        name: WorkerName,
        /// For which task.
        task: TaskId,
    },
    /// A held update is in the sum.
    Folded {
        /// The task.
        task: TaskId,
    },
    /// The run waits for something that does not come by itself.
    Paused(Pause),
    /// It goes on.
    Resumed,
    /// Work that an earlier process of the coordinator began goes on.
    TakenUp {
        /// The round; 0 for a survey.
        round: u32,
        /// How many payloads are held.
        held: u32,
        /// How many are waited for.
        open: u32,
    },
    /// Too few workers are in for anything to begin.
    Waiting {
        /// How many are in.
        have: u32,
        /// How many it takes.
        need: u32,
    },
}

/// Why a worker is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gone {
    /// Its connection ended.
    Disconnected,
    /// It had a task and said nothing for too long.
    Silent,
    /// It had a task and made no training step for too long.
    Stuck,
    /// A newer process with the same identity came.
    Displaced,
    /// It said goodbye.
    Left,
    /// It does not take part; the sentence is its own.
    Declined(String),
    /// It did what no honest peer does.
    Misbehaved(String),
    /// Its key was revoked.
    Revoked,
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected => f.write_str("its connection ended"),
            Self::Silent => f.write_str("it was silent for 10 s"),
            Self::Stuck => f.write_str("it made no training step for ten minutes"),
            Self::Displaced => f.write_str("a newer process with its identity came"),
            Self::Left => f.write_str("it said goodbye"),
            Self::Declined(sentence) => write!(f, "it does not take part: {sentence}"),
            Self::Misbehaved(what) => write!(f, "it was ejected: {what}"),
            Self::Revoked => f.write_str("its key was revoked"),
        }
    }
}

/// What the shell learned.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// The process has started and every event of the journal was applied: the first input.
    Start {
        /// The durable count of starts, this one included.
        start: u32,
        /// The round whose model is whole, if a newer one is damaged; 0 for the first model. At most
        /// [`super::REVERT_MAX`] rounds back.
        whole: Option<u32>,
    },
    /// A session is up and its worker has said [`FromWorker::Join`].
    Joined {
        /// The connection.
        conn: ConnId,
        /// Who: certificate, session key and registry agree.
        worker: WorkerId,
        /// Its name.
        name: WorkerName,
        /// The largest weight of its updates.
        weight_max: u32,
        /// Its process.
        instance: Instance,
    },
    /// A worker said something other than `Join` and `Offer`.
    Said {
        /// The connection.
        conn: ConnId,
        /// What.
        message: FromWorker,
    },
    /// A worker offered something.
    Offered {
        /// The connection.
        conn: ConnId,
        /// What.
        manifest: Box<Manifest>,
        /// Whether the signature is that of the connection's worker.
        authentic: bool,
    },
    /// A connection ended.
    Gone {
        /// Which.
        conn: ConnId,
    },
    /// A peer did what no honest peer does; its connection is to be closed.
    Misbehaved {
        /// The connection.
        conn: ConnId,
        /// What it did.
        what: String,
    },
    /// A payload that was to be received is whole and sound.
    Verified {
        /// For which task.
        task: TaskId,
        /// Its hash, measured.
        hash: Hash,
        /// Its norm, measured; 0 for what is not folded.
        norm: f64,
    },
    /// A payload is not what its manifest says, or not sound.
    Spoiled {
        /// For which task.
        task: TaskId,
        /// The hash that the manifest names.
        hash: Hash,
        /// What is wrong.
        refusal: Refusal,
    },
    /// A payload's stream ended early.
    Cut {
        /// For which task.
        task: TaskId,
        /// The hash that the manifest names.
        hash: Hash,
    },
    /// A held update is in the sum.
    Folded {
        /// Its task.
        task: TaskId,
    },
    /// A held payload cannot be read back, or is not what was held.
    Lost {
        /// Its task.
        task: TaskId,
        /// The hash of what was held.
        hash: Hash,
    },
    /// The surveys were merged.
    Surveyed(SurveyOutcome),
    /// The new model of a round is made.
    Stepped {
        /// The round.
        round: u32,
        /// The new model.
        model: Hash,
        /// Mean training loss, where the coordinator trains itself.
        train_loss: Option<f64>,
    },
    /// No new model can be made of a round: the sentence says why.
    StepFailed {
        /// The round.
        round: u32,
        /// Why.
        sentence: String,
    },
    /// A worker's key was revoked.
    Revoked {
        /// Whose.
        worker: WorkerId,
    },
    /// There is no room on the disk. What is to be written waits.
    DiskFull,
    /// There is room again.
    DiskBack,
    /// An operator gives the run up.
    Abort,
    /// An operator stops the process; the run goes on at the next start.
    Stop,
    /// The time that `Wait` named has come.
    Tick,
}

/// A task as the shell is to announce it. The shell adds content keys, and streams what the worker lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The task.
    pub task: TaskId,
    /// The round; 0 for a survey and for rows.
    pub round: u32,
    /// What kind of work.
    pub kind: TaskKind,
    /// The frozen schema, if the work needs one.
    pub schema: Option<Hash>,
    /// The model to start from, if the work needs one.
    pub model: Option<Hash>,
    /// The fingerprint of its layout; zero where there is none.
    pub layout: Hash,
    /// By how many bits a count of rows is shifted down to be a weight.
    pub weight_shift: u32,
}

/// What the shell is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// Send [`ToWorker::Welcome`].
    Welcome {
        /// To whom.
        conn: ConnId,
    },
    /// Stream the schema and the model if the connection has not had them, and send [`ToWorker::Assigned`].
    Assign {
        /// To whom.
        conn: ConnId,
        /// What.
        assignment: Assignment,
    },
    /// Send a message that is whole.
    Send {
        /// To whom.
        conn: ConnId,
        /// What.
        message: ToWorker,
    },
    /// Sign a receipt and send it.
    Receipt {
        /// To whom.
        conn: ConnId,
        /// What it says.
        receipt: Receipt,
    },
    /// Take in the payload of this manifest: open, hash, check, measure and spool it, then say `Verified`,
    /// `Spoiled` or `Cut`. Replaces an earlier `Receive` of the same task.
    Receive {
        /// From whom.
        conn: ConnId,
        /// For which task.
        task: TaskId,
        /// What it holds.
        kind: TaskKind,
        /// Its hash.
        hash: Hash,
        /// Its length.
        bytes: u64,
        /// Whether its worker waits for [`ToWorker::Go`], which names how much of it is here already.
        go: bool,
    },
    /// Drop what was spooled or is being received for a task.
    Forget {
        /// Which.
        task: TaskId,
        /// The payload's hash.
        hash: Hash,
    },
    /// Fold a held update into the round's sum, then say `Folded`, or `Lost` if it cannot be read back as it was held.
    Fold {
        /// Whose.
        task: TaskId,
        /// The payload's hash.
        hash: Hash,
        /// With which weight.
        weight: u32,
    },
    /// Merge the held surveys, in the order given, then say `Surveyed`, or `Lost`.
    Merge {
        /// By name.
        surveys: Vec<(TaskId, Hash, WorkerId, WorkerName)>,
    },
    /// Take the mean of the round's sum, apply the server step, then say `Stepped`.
    Step {
        /// The round.
        round: u32,
        /// Whose updates the sum holds.
        tasks: Vec<TaskId>,
    },
    /// Train on the collected rows from the model `base`, then say `Stepped`.
    Train {
        /// The round.
        round: u32,
        /// Whose rows, by name.
        rows: Vec<TaskId>,
    },
    /// Close a connection.
    Close {
        /// Which.
        conn: ConnId,
        /// Why.
        why: Gone,
    },
    /// The run is over: write the model, say so.
    Finish {
        /// The last model's evaluation.
        evaluation: EvaluationSummary,
    },
    /// A round was made again and gave another model than the one that was told of: say both, and end.
    Conflict {
        /// The round.
        round: u32,
        /// The model that the journal records.
        recorded: Hash,
        /// The model that came of the same updates now.
        redone: Hash,
    },
    /// The run was given up, or cannot go on: say why and end.
    Fail {
        /// For a person.
        sentence: String,
    },
    /// End the process in order, once what was sent is on its way.
    End,
}

/// Where a run is, in figures and hashes.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The run.
    pub run: RunId,
    /// What the survey froze; none before.
    pub frozen: Option<Frozen>,
    /// The newest model; none before the survey.
    pub model: Option<Hash>,
    /// Committed rounds.
    pub round: u32,
    /// The last committed round's figures.
    pub figures: Option<RoundFigures>,
    /// The last model's evaluation, once the run is over.
    pub finished: Option<EvaluationSummary>,
    /// Whether the run was given up.
    pub aborted: bool,
}
