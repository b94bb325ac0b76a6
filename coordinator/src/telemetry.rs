//! Every metric of the coordinator, in one table: no other file knows a metric's name.
//!
//! A [`Telemetry`] owns its recorder, so that many fleets live in one process; its handles are made once and cost an
//! atomic each. Every family is there from the start, at zero, with all the values that its labels can have: labels
//! are closed enums, and a worker's id is never one. A gauge of which nothing is known is NaN, and left out of the page.
//! [`Telemetry::render`] sorts families, so that two renderings differ only where figures do.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use protocol::evaluation::EvaluationSummary;
use protocol::federation::{Event, Frozen, Notice, RoundFigures, Stage, Withdrawal};
use protocol::messages::{Refusal, TaskKind};

/// How often [`Telemetry::upkeep`] wants to be called.
pub const UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// A closed set of label values.
pub trait LabelValue: Copy + 'static {
    /// The label's name.
    const NAME: &'static str;
    /// Every value.
    const ALL: &'static [Self];
    /// The value as it is rendered.
    fn text(self) -> &'static str;
}

macro_rules! labels {
    ($(#[$doc:meta])* $type:ident = $name:literal { $($(#[$value_doc:meta])* $value:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $type { $($(#[$value_doc])* $value),+ }

        impl LabelValue for $type {
            const NAME: &'static str = $name;
            const ALL: &'static [Self] = &[$(Self::$value),+];
            fn text(self) -> &'static str {
                match self { $(Self::$value => $text),+ }
            }
        }
    };
}

labels!(
    /// Which way bytes go, seen from here.
    Direction = "direction" {
        /// From a worker.
        In = "in",
        /// To a worker.
        Out = "out",
    }
);
labels!(
    /// What bytes are.
    Kind = "kind" {
        /// Messages of control streams.
        Control = "control",
        /// Weight deltas.
        Update = "update",
        /// Mean gradients.
        Gradient = "gradient",
        /// Encoded rows.
        Rows = "rows",
        /// Column statistics.
        Survey = "survey",
        /// Evaluations.
        Evaluation = "evaluation",
        /// Models.
        Model = "model",
        /// Schemas.
        Schema = "schema",
    }
);
labels!(
    /// How a session's handshake ended.
    HandshakeOutcome = "outcome" {
        /// The session stands.
        Ok = "ok",
        /// The peer is not one of ours, or speaks another version.
        Refused = "refused",
        /// TLS, QUIC or the session's cryptography failed.
        Failed = "failed",
        /// The peer took too long.
        Timeout = "timeout",
    }
);
labels!(
    /// How an enrolment ended.
    EnrolmentOutcome = "outcome" {
        /// A worker is enrolled, or was already.
        Granted = "granted",
        /// The invitation or the keys were not good.
        Refused = "refused",
        /// The handshake failed, or took too long.
        Failed = "failed",
    }
);
labels!(
    /// What became of a round.
    RoundOutcome = "outcome" {
        /// Its model stands.
        Committed = "committed",
        /// It goes on past its deadline.
        Extended = "extended",
        /// It waits for something that does not come by itself.
        Paused = "paused",
        /// It was given up.
        Aborted = "aborted",
    }
);
labels!(
    /// A stretch of a run.
    Phase = "phase" {
        /// Waiting for workers.
        Gathering = "gathering",
        /// Asking for column statistics.
        Surveying = "surveying",
        /// Collecting encoded rows.
        Sharing = "sharing",
        /// Waiting for updates.
        Training = "training",
        /// Making the new model.
        Committing = "committing",
        /// Evaluating the last model.
        Evaluating = "evaluating",
    }
);
labels!(
    /// What became of an offered payload.
    UpdateOutcome = "outcome" {
        /// Verified and counted.
        Held = "held",
        /// In the sum.
        Folded = "folded",
        /// No longer wanted when it came.
        Late = "late",
        /// Offered before.
        Duplicate = "duplicate",
        /// Not accepted.
        Refused = "refused",
        /// Its task was withdrawn.
        Withdrawn = "withdrawn",
    }
);
labels!(
    /// Why a payload was not accepted.
    RefusalReason = "reason" {
        /// Another run's manifest.
        WrongRun = "wrong_run",
        /// Another worker's task.
        WrongWorker = "wrong_worker",
        /// A signature that does not verify.
        WrongSignature = "wrong_signature",
        /// Another kind than the task.
        WrongKind = "wrong_kind",
        /// Another base than the task.
        WrongBase = "wrong_base",
        /// Another layout than the run.
        WrongLayout = "wrong_layout",
        /// Another length than the layout.
        WrongLength = "wrong_length",
        /// Another hash than the manifest.
        WrongHash = "wrong_hash",
        /// A coding that the run does not use.
        WrongEncoding = "wrong_encoding",
        /// NaN or infinite.
        NotFinite = "not_finite",
        /// Too long a norm.
        NormTooLong = "norm_too_long",
        /// A weight of zero or over the cap.
        WrongWeight = "wrong_weight",
        /// More updates than a sum holds.
        TooMany = "too_many",
        /// Figures that contradict each other.
        WrongMetrics = "wrong_metrics",
        /// A payload that is not what it says it is.
        Unreadable = "unreadable",
    }
);
labels!(
    /// In what state workers are.
    WorkerState = "state" {
        /// Known to the registry, and not revoked.
        Enrolled = "enrolled",
        /// With a live session.
        Connected = "connected",
        /// With an open task.
        Busy = "busy",
    }
);

impl From<TaskKind> for Kind {
    fn from(kind: TaskKind) -> Self {
        match kind {
            TaskKind::Update | TaskKind::Partial => Self::Update,
            TaskKind::Gradient => Self::Gradient,
            TaskKind::Rows => Self::Rows,
            TaskKind::Survey => Self::Survey,
            TaskKind::Evaluation => Self::Evaluation,
        }
    }
}

impl From<Refusal> for RefusalReason {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::WrongRun => Self::WrongRun,
            Refusal::WrongWorker => Self::WrongWorker,
            Refusal::WrongSignature => Self::WrongSignature,
            Refusal::WrongKind => Self::WrongKind,
            Refusal::WrongBase => Self::WrongBase,
            Refusal::WrongLayout => Self::WrongLayout,
            Refusal::WrongLength { .. } => Self::WrongLength,
            Refusal::WrongHash => Self::WrongHash,
            Refusal::WrongEncoding => Self::WrongEncoding,
            Refusal::NotFinite => Self::NotFinite,
            Refusal::NormTooLong { .. } => Self::NormTooLong,
            Refusal::WrongWeight { .. } => Self::WrongWeight,
            Refusal::TooMany => Self::TooMany,
            Refusal::WrongMetrics => Self::WrongMetrics,
            Refusal::Unreadable => Self::Unreadable,
        }
    }
}

impl Phase {
    /// The phase of a stage that has a duration.
    #[must_use]
    pub fn of(stage: Stage) -> Option<Self> {
        match stage {
            Stage::Gathering => Some(Self::Gathering),
            Stage::Surveying => Some(Self::Surveying),
            Stage::Sharing => Some(Self::Sharing),
            Stage::Training => Some(Self::Training),
            Stage::Committing => Some(Self::Committing),
            Stage::Evaluating => Some(Self::Evaluating),
            Stage::Finished | Stage::Aborted => None,
        }
    }
}

/// The handles of a family with one label.
#[derive(Clone, Debug)]
pub struct By<L, H> {
    handles: Vec<H>,
    label: std::marker::PhantomData<L>,
}

impl<L: LabelValue + PartialEq, H> By<L, H> {
    fn make(mut make: impl FnMut(L) -> H) -> Self {
        Self { handles: L::ALL.iter().map(|value| make(*value)).collect(), label: std::marker::PhantomData }
    }

    /// The handle of one value.
    ///
    /// # Panics
    /// Never: `ALL` has every value.
    #[must_use]
    pub fn with(&self, value: L) -> &H {
        let at = L::ALL.iter().position(|each| *each == value).expect("ALL has every value");
        &self.handles[at]
    }
}

/// Two labels: a direction, and what.
pub type ByDirectionAndKind<H> = By<Direction, By<Kind, H>>;

/// Seconds of cryptography: from 10 µs to a second.
const SECONDS_SHORT: &[f64] = &[1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0];
/// Seconds of networks and disks: from 100 µs to ten seconds.
const SECONDS_MIDDLE: &[f64] = &[1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];
/// Seconds of training: from a millisecond to an hour.
const SECONDS_LONG: &[f64] = &[1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];
/// L2 norms, up to the ring's bound.
const NORMS: &[f64] = &[1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 256.0];

macro_rules! table {
    ($($field:ident: $make:ident $(<$($label:ident),+>)? $(($buckets:ident))? = $name:literal, $help:literal;)+) => {
        /// The handles of every family.
        #[derive(Clone, Debug)]
        pub struct Metrics {
            $(#[doc = $help] pub $field: table!(@type $make $(<$($label),+>)?),)+
        }

        impl Metrics {
            fn make(recorder: &PrometheusRecorder) -> Self {
                $(table!(@describe recorder $make $name $help);)+
                Self { $($field: table!(@make recorder $make $(<$($label),+>)? $name),)+ }
            }
        }

        /// The families that are histograms, with their buckets.
        const BUCKETS: &[(&str, &[f64])] = &[$($(($name, $buckets),)?)+];
    };
    (@type counter) => { Counter };
    (@type gauge) => { Gauge };
    (@type histogram) => { Histogram };
    (@type $make:ident <$label:ident>) => { By<$label, table!(@type $make)> };
    (@type $make:ident <$outer:ident, $inner:ident>) => { By<$outer, By<$inner, table!(@type $make)>> };
    (@describe $recorder:ident counter $name:literal $help:literal) => {
        $recorder.describe_counter($name.into(), None::<Unit>, $help.into())
    };
    (@describe $recorder:ident gauge $name:literal $help:literal) => {
        $recorder.describe_gauge($name.into(), None::<Unit>, $help.into())
    };
    (@describe $recorder:ident histogram $name:literal $help:literal) => {
        $recorder.describe_histogram($name.into(), None::<Unit>, $help.into())
    };
    (@make $recorder:ident $make:ident $name:literal) => { $make($recorder, $name, Vec::new()) };
    (@make $recorder:ident $make:ident <$label:ident> $name:literal) => {
        By::make(|value: $label| $make($recorder, $name, vec![label(value)]))
    };
    (@make $recorder:ident $make:ident <$outer:ident, $inner:ident> $name:literal) => {
        By::make(|a: $outer| By::make(|b: $inner| $make($recorder, $name, vec![label(a), label(b)])))
    };
}

table! {
    quic_bytes: counter<Direction> = "tributary_quic_bytes_total", "UDP payload bytes at the socket, garbage included.";
    quic_datagrams: counter<Direction> = "tributary_quic_datagrams_total", "UDP datagrams at the socket, garbage included.";
    sealed_bytes: counter<Direction, Kind> = "tributary_sealed_bytes_total", "Bytes of sealed records, headers and tags included.";
    sealed_records: counter<Direction, Kind> = "tributary_sealed_records_total", "Sealed records.";
    payload_bytes: counter<Direction, Kind> = "tributary_payload_bytes_total", "Bytes of plaintext in sealed records.";
    connections: gauge = "tributary_connections", "QUIC connections now.";
    connections_total: counter = "tributary_connections_total", "QUIC connections whose TLS handshake was complete.";
    handshakes: counter<HandshakeOutcome> = "tributary_handshakes_total", "Handshakes of workers by outcome.";
    enrolments: counter<EnrolmentOutcome> = "tributary_enrolments_total", "Attempts to be enrolled by outcome.";
    rtt: histogram(SECONDS_MIDDLE) = "tributary_rtt_seconds", "Round-trip times of live connections, sampled.";
    lost_packets: counter = "tributary_lost_packets_total", "QUIC packets held to be lost.";
    seal_seconds: histogram(SECONDS_SHORT) = "tributary_seal_seconds", "Time to seal a message or a whole content.";
    open_seconds: histogram(SECONDS_SHORT) = "tributary_open_seconds", "Time to open, hash, check and spool up to 1 MiB of payload.";
    permits_in_use: gauge = "tributary_permits_in_use", "Large uploads that are on their way.";
    spool_bytes: gauge = "tributary_spool_bytes", "Bytes of payloads that wait in memory or on disk.";
    rounds: counter<RoundOutcome> = "tributary_rounds_total", "Rounds by outcome; one may be extended or paused and committed later.";
    phase_seconds: histogram<Phase>(SECONDS_LONG) = "tributary_phase_seconds", "Durations of phases.";
    updates: counter<UpdateOutcome> = "tributary_updates_total", "Offered payloads by what became of them.";
    updates_refused: counter<RefusalReason> = "tributary_updates_refused_total", "Payloads that were not accepted, by reason.";
    examples: counter = "tributary_examples_total", "Training rows behind committed updates.";
    train_loss: gauge = "tributary_train_loss", "Mean training loss of the last round.";
    eval_loss: gauge = "tributary_eval_loss", "Loss on held-out rows of the last evaluated model.";
    eval_accuracy: gauge = "tributary_eval_accuracy", "Accuracy on held-out rows of the last evaluated model.";
    eval_auc: gauge = "tributary_eval_auc", "Area under the ROC curve on held-out rows of the last evaluated model.";
    eval_rmse: gauge = "tributary_eval_rmse", "Root mean squared error on held-out rows of the last evaluated model.";
    eval_r2: gauge = "tributary_eval_r2", "Coefficient of determination on held-out rows of the last evaluated model.";
    update_norm: histogram(NORMS) = "tributary_update_norm", "L2 norms of accepted updates.";
    model_parameters: gauge = "tributary_model_parameters", "Numbers in the model.";
    round: gauge = "tributary_round", "Committed rounds of the present run.";
    round_seconds: histogram(SECONDS_LONG) = "tributary_round_seconds", "Time from a round's first assignment to its model.";
    workers: gauge<WorkerState> = "tributary_workers", "Workers by state.";
    state_bytes: gauge = "tributary_state_bytes", "Bytes of the run's journal, models and payloads on disk.";
    disk_full: gauge = "tributary_disk_full", "1 while there is no room on the disk, and the run waits for it; else 0.";
    journal_records: counter = "tributary_journal_records_total", "Facts that were handed to the journal.";
    journal_bytes: counter = "tributary_journal_bytes_total", "Bytes of the journal that were made durable, models and small payloads in it included.";
    journal_sync_seconds: histogram(SECONDS_MIDDLE) = "tributary_journal_sync_seconds", "Time to make durable all that waits for it.";
    last_commit_age: gauge = "tributary_last_commit_age_seconds", "Time since the last commit of this process; absent before the first.";
    commits: counter = "tributary_commits_total", "Commits: the first model, each round's, the last evaluation.";
    starts: counter = "tributary_starts_total", "Starts of this coordinator, ever.";
}

/// The static parts of every registration.
const METADATA: Metadata<'static> = Metadata::new("tributary", Level::INFO, None);

fn label<L: LabelValue>(value: L) -> Label {
    Label::from_static_parts(L::NAME, value.text())
}

fn counter(recorder: &PrometheusRecorder, name: &'static str, labels: Vec<Label>) -> Counter {
    let counter = recorder.register_counter(&Key::from_parts(name, labels), &METADATA);
    counter.increment(0);
    counter
}

fn gauge(recorder: &PrometheusRecorder, name: &'static str, labels: Vec<Label>) -> Gauge {
    let gauge = recorder.register_gauge(&Key::from_parts(name, labels), &METADATA);
    gauge.set(0.0);
    gauge
}

fn histogram(recorder: &PrometheusRecorder, name: &'static str, labels: Vec<Label>) -> Histogram {
    recorder.register_histogram(&Key::from_parts(name, labels), &METADATA)
}

/// The recorder and its handles. Clones share them.
#[derive(Clone)]
pub struct Telemetry {
    handle: PrometheusHandle,
    /// Every family.
    pub metrics: Metrics,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new()
    }
}

impl Telemetry {
    /// A recorder with every family at zero.
    ///
    /// # Panics
    /// Never: no list of buckets is empty.
    #[must_use]
    pub fn new() -> Self {
        let builder = BUCKETS.iter().fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
            builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets).expect("buckets are given")
        });
        let recorder = builder.build_recorder();
        let metrics = Metrics::make(&recorder);
        let help = "Always 1; the version is its label.";
        recorder.describe_gauge("tributary_build_info".into(), None::<Unit>, help.into());
        let version = Label::from_static_parts("version", env!("CARGO_PKG_VERSION"));
        gauge(&recorder, "tributary_build_info", vec![version]).set(1.0);
        metrics.last_commit_age.set(f64::NAN);
        Self { handle: recorder.handle(), metrics }
    }

    /// The page that Prometheus reads, families in order of their names.
    #[must_use]
    pub fn render(&self) -> String {
        let page = self.handle.render();
        let mut families: Vec<&str> = page.split("\n\n").filter(|family| !family.trim().is_empty()).collect();
        families.sort_by_key(|family| family_name(family));
        let families: Vec<String> = families.iter().map(|family| sort_lines(family)).collect();
        families.join("\n")
    }

    /// Keeps the histograms' samples from piling up. To be called every [`UPKEEP_EVERY`].
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Counts what an event tells.
    pub fn saw(&self, event: &Event) {
        let m = &self.metrics;
        match event {
            Event::Surveyed { frozen, .. } => {
                m.commits.increment(1);
                m.model_parameters.set(lossy(frozen.parameters));
            }
            Event::Held { update, .. } => {
                m.updates.with(UpdateOutcome::Held).increment(1);
                if update.norm > 0.0 {
                    m.update_norm.record(update.norm);
                }
            }
            Event::Withdrawn { why, .. } => self.saw_withdrawal(*why),
            Event::Extended { .. } => m.rounds.with(RoundOutcome::Extended).increment(1),
            Event::Committed { figures, .. } => {
                m.commits.increment(1);
                m.rounds.with(RoundOutcome::Committed).increment(1);
                m.examples.increment(figures.examples);
                m.round_seconds.record(figures.seconds);
                self.set_round(figures);
            }
            Event::Finished { evaluation } => {
                m.commits.increment(1);
                self.set_evaluation(evaluation);
            }
            Event::Aborted { .. } => m.rounds.with(RoundOutcome::Aborted).increment(1),
            Event::Started { .. }
            | Event::Opened { .. }
            | Event::Assigned { .. }
            | Event::Lost { .. }
            | Event::Closed { .. }
            | Event::Reverted { .. }
            | Event::Redone { .. }
            | Event::Voided => {}
            Event::Notice(notice) => self.saw_notice(notice),
        }
    }

    fn saw_withdrawal(&self, why: Withdrawal) {
        // What was refused is counted there, with its reason.
        if !matches!(why, Withdrawal::Refused(_)) {
            self.metrics.updates.with(UpdateOutcome::Withdrawn).increment(1);
        }
    }

    fn saw_notice(&self, notice: &Notice) {
        let m = &self.metrics;
        match notice {
            Notice::Stage { before, seconds, .. } => {
                if let Some(phase) = Phase::of(*before) {
                    m.phase_seconds.with(phase).record(*seconds);
                }
            }
            Notice::Refused { refusal, .. } => {
                m.updates.with(UpdateOutcome::Refused).increment(1);
                m.updates_refused.with((*refusal).into()).increment(1);
            }
            Notice::Late { .. } => m.updates.with(UpdateOutcome::Late).increment(1),
            Notice::Duplicate { .. } => m.updates.with(UpdateOutcome::Duplicate).increment(1),
            Notice::Folded { .. } => m.updates.with(UpdateOutcome::Folded).increment(1),
            Notice::Paused(_) => m.rounds.with(RoundOutcome::Paused).increment(1),
            Notice::Joined { .. }
            | Notice::Ready { .. }
            | Notice::Gone { .. }
            | Notice::Countdown { .. }
            | Notice::Waiting { .. }
            | Notice::TakenUp { .. }
            | Notice::Resumed => {}
        }
    }

    /// Shows what a run had come to before this start.
    pub fn restore(&self, frozen: Option<&Frozen>, figures: Option<&RoundFigures>) {
        if let Some(frozen) = frozen {
            self.metrics.model_parameters.set(lossy(frozen.parameters));
        }
        if let Some(figures) = figures {
            self.set_round(figures);
        }
    }

    /// Shows a committed round.
    fn set_round(&self, figures: &RoundFigures) {
        self.metrics.round.set(f64::from(figures.round));
        set_if(&self.metrics.train_loss, figures.train_loss);
        self.set_evaluation(&figures.evaluation);
    }

    fn set_evaluation(&self, evaluation: &EvaluationSummary) {
        set_if(&self.metrics.eval_loss, evaluation.loss);
        set_if(&self.metrics.eval_accuracy, evaluation.accuracy);
        set_if(&self.metrics.eval_auc, evaluation.auc);
        set_if(&self.metrics.eval_rmse, evaluation.rmse);
        set_if(&self.metrics.eval_r2, evaluation.r2);
    }

    /// Counts a sealed record or several of one kind that passed.
    pub fn passed(&self, direction: Direction, kind: Kind, records: u64, sealed: u64, payload: u64) {
        let m = &self.metrics;
        m.sealed_records.with(direction).with(kind).increment(records);
        m.sealed_bytes.with(direction).with(kind).increment(sealed);
        m.payload_bytes.with(direction).with(kind).increment(payload);
    }
}

fn set_if(gauge: &Gauge, value: Option<f64>) {
    if let Some(value) = value {
        gauge.set(value);
    }
}

/// A count as a gauge shows it: exact up to 2^53.
#[allow(clippy::cast_precision_loss)]
#[must_use]
pub fn lossy(count: u64) -> f64 {
    count as f64
}

fn family_name(family: &str) -> &str {
    let line = family.lines().find(|line| line.starts_with("# TYPE ")).unwrap_or_default();
    line.split(' ').nth(2).unwrap_or_default()
}

/// Puts the label sets of a family in order; the lines of one histogram stay as they are.
fn sort_lines(family: &str) -> String {
    let known = family.trim().lines().filter(|line| !line.ends_with(" NaN"));
    let (head, mut lines): (Vec<&str>, Vec<&str>) = known.partition(|line| line.starts_with('#'));
    if !head.iter().any(|line| line.ends_with(" histogram")) {
        lines.sort_unstable();
    } else {
        lines.sort_by_key(|line| series(line));
    }
    head.into_iter().chain(lines).map(|line| format!("{line}\n")).collect()
}

/// The label of a histogram's line that is not a bucket's bound.
fn series(line: &str) -> &str {
    let labels = line.split_once('{').map_or("", |(_, rest)| rest);
    labels.split([',', '}']).next().filter(|label| !label.starts_with("le=")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_page_has_these_families_from_the_start() {
        let page = Telemetry::new().render();
        let version = format!("version=\"{}\"", env!("CARGO_PKG_VERSION"));
        insta::assert_snapshot!("metrics", page.replace(&version, "version=\"[version]\""));
    }

    #[test]
    fn two_renderings_are_the_same() {
        let telemetry = Telemetry::new();
        assert_eq!(telemetry.render(), telemetry.render());
        assert_eq!(telemetry.render(), Telemetry::new().render());
    }

    #[test]
    fn the_size_of_the_model_is_shown_again_after_a_restart() {
        let hash = protocol::ids::Hash([0; 32]);
        let frozen = Frozen { schema: hash, schema_bytes: 9, layout: hash, parameters: 1234, weight_shift: 0 };
        let telemetry = Telemetry::new();
        telemetry.restore(Some(&frozen), None);
        assert!(telemetry.render().contains("\ntributary_model_parameters 1234\n"));
    }

    #[test]
    fn what_is_not_known_is_not_shown_as_zero() {
        let telemetry = Telemetry::new();
        let samples = |page: String| page.lines().filter(|line| line.starts_with("tributary_last_commit_age")).count();
        assert_eq!(samples(telemetry.render()), 0);
        telemetry.metrics.last_commit_age.set(0.5);
        assert_eq!(samples(telemetry.render()), 1);
    }

    #[test]
    fn two_recorders_count_apart() {
        let (one, other) = (Telemetry::new(), Telemetry::new());
        one.metrics.starts.increment(3);
        assert!(one.render().contains("\ntributary_starts_total 3\n"));
        assert!(other.render().contains("\ntributary_starts_total 0\n"));
    }

    #[test]
    fn every_line_is_one_of_a_described_family() {
        let page = Telemetry::new().render();
        for family in page.split("\n\n") {
            let name = family_name(family);
            assert!(name.starts_with("tributary_"), "{family}");
            assert!(family.starts_with(&format!("# HELP {name} ")), "{family}");
        }
    }
}
