//! `coordinator audit`: what the journals of a state directory say, and whether they are whole.
//!
//! It reads and takes no lock, so that it works beside a live coordinator and on a copy. One record is one line, for a
//! person or, with `--json`, for a program; behind the records of a journal stands whether its chain is whole. Damage
//! is told where it is found and again at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use protocol::federation::{Event, HeldUpdate, Withdrawal};
use protocol::ids::{Hash, RunId, TaskId, WorkerId, WorkerName};
use protocol::messages::TaskKind;
use serde::Serialize;

use crate::cli::AuditArgs;
use crate::registry::{self, Fact};
use crate::state::{StateError, check_format};
use crate::store::disk::{Disk, RealDisk};
use crate::store::journal::{End, Record, Scope, read};
use crate::store::{StoreError, current_run, run};

/// Why an audit came to nothing, or what it found.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// It is not a state directory of ours.
    #[error(transparent)]
    State(#[from] StateError),
    /// Nothing is there to read.
    #[error("{}: no coordinator has run here; give the --state that it was started with", path.display())]
    NoState {
        /// Where its state would be.
        path: PathBuf,
    },
    /// There is no such run.
    #[error("{}: no such run; its id is the name of a directory in {}", path.display(), path.parent().unwrap_or(path).display())]
    NoRun {
        /// Where it would be.
        path: PathBuf,
    },
    /// Nobody reads what is printed.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
    /// Something is damaged.
    #[error("{}", .0.join("; and "))]
    Damaged(Vec<String>),
}

/// Prints what happened.
///
/// # Errors
/// If there is nothing to read, or something is damaged.
pub fn audit(state: &Path, args: &AuditArgs, out: &mut dyn Write) -> Result<(), AuditError> {
    if !state.is_dir() {
        return Err(AuditError::NoState { path: state.to_owned() });
    }
    check_format(state)?;
    let runs = state.join("runs");
    let run = match args.run {
        Some(run) if !runs.join(run.to_string()).is_dir() => {
            return Err(AuditError::NoRun { path: runs.join(run.to_string()) });
        }
        Some(run) => Some(run),
        None => current_run(&runs)?.map(|(run, _)| run),
    };
    let mut auditor = Auditor { args, out, printed: Ok(()), damages: Vec::new() };
    auditor.registry(state)?;
    if let Some(run) = run {
        auditor.run(run, &runs.join(run.to_string()))?;
    }
    auditor.end()
}

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Told<'a> {
    Invited {
        token_hash: Hash,
        uses: u32,
        expires_unix_s: Option<u64>,
        loopback_only: bool,
    },
    Enrolled {
        worker: &'a WorkerName,
        id: WorkerId,
        token_hash: Hash,
    },
    Revoked {
        worker: Option<&'a WorkerName>,
        id: WorkerId,
    },
    Run {
        run: RunId,
    },
    Started {
        start: u32,
    },
    Surveyed {
        schema: Hash,
        model: Hash,
        parameters: u64,
    },
    Opened {
        round: u32,
        kind: TaskKind,
        wanted: u32,
    },
    Assigned(OfTask<'a>),
    Held {
        #[serde(flatten)]
        of: OfTask<'a>,
        payload: Hash,
        bytes: u64,
        examples: u64,
    },
    Late(OfTask<'a>),
    Left(OfTask<'a>),
    Failed {
        #[serde(flatten)]
        of: OfTask<'a>,
        reason: String,
    },
    Refused {
        #[serde(flatten)]
        of: OfTask<'a>,
        reason: String,
    },
    Lost(OfTask<'a>),
    Extended {
        round: u32,
        extension: u32,
    },
    Closed {
        round: u32,
    },
    Committed {
        round: u32,
        model: Hash,
        updates: Vec<Committed<'a>>,
    },
    Reverted {
        round: u32,
    },
    Redone {
        round: u32,
    },
    Voided,
    Finished,
    Aborted {
        reason: &'a str,
    },
    Chain {
        journal: &'a str,
        plan: Option<Hash>,
        records: u64,
        parts: u64,
        torn: Option<String>,
    },
    Verified {
        files: u64,
        attachments: u64,
        stripped: u64,
    },
    Damaged {
        reason: &'a str,
    },
}

/// A task, and whose it is.
#[derive(Clone, Copy, Debug, Serialize)]
struct OfTask<'a> {
    #[serde(serialize_with = "as_text")]
    task: TaskId,
    worker: Option<&'a WorkerName>,
    round: Option<u32>,
    kind: Option<TaskKind>,
}

/// An update in a model.
#[derive(Debug, Serialize)]
struct Committed<'a> {
    #[serde(serialize_with = "as_text")]
    task: TaskId,
    worker: Option<&'a WorkerName>,
    payload: Hash,
}

/// A line with the time of its record.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    unix_ms: Option<u64>,
    #[serde(flatten)]
    told: &'a Told<'a>,
}

fn as_text<S: serde::Serializer>(task: &TaskId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(task)
}

struct Auditor<'a> {
    args: &'a AuditArgs,
    out: &'a mut dyn Write,
    /// Nobody may be reading any more; what is wrong is found all the same.
    printed: io::Result<()>,
    damages: Vec<String>,
}

impl Auditor<'_> {
    fn registry(&mut self, state: &Path) -> Result<(), AuditError> {
        let disk = RealDisk::new(state).map_err(StateError::io(state, "open"))?;
        let mut names = BTreeMap::new();
        let mut attachments = Attachments::default();
        self.journal(state, &disk, "registry", &registry::SCOPE, &mut attachments, &mut |auditor, record| {
            let Some(fact) = Fact::of(record)? else { return Ok(()) };
            if let Fact::Enrolled { worker, .. } = &fact {
                names.insert(worker.id, worker.name.clone());
            }
            auditor.tell(Some(record.unix_ms), &membership(&fact, &names));
            Ok(())
        });
        Ok(())
    }

    fn run(&mut self, run: RunId, path: &Path) -> Result<(), AuditError> {
        let disk = RealDisk::new(path).map_err(StateError::io(path, "open"))?;
        let scope = Scope { prefix: run::JOURNAL, run, plan: None };
        let (mut tasks, mut models, mut attachments) = (Tasks::default(), Models::default(), Attachments::default());
        self.tell(None, &Told::Run { run });
        self.journal(path, &disk, "run", &scope, &mut attachments, &mut |auditor, record| {
            let Some(event) = run::fact(record)? else { return Ok(()) };
            models.see(&event, record);
            tasks.see(&event);
            auditor.tell_event(record.unix_ms, &event, &tasks);
            tasks.forget(&event);
            Ok(())
        });
        if self.args.verify {
            let files = self.verify_files(path, &disk, &models)?;
            let Attachments { checked, stripped } = attachments;
            self.tell(None, &Told::Verified { files, attachments: checked, stripped });
        }
        Ok(())
    }

    /// Reads a journal, tells each record, and then whether the chain is whole.
    fn journal(
        &mut self,
        path: &Path,
        disk: &dyn Disk,
        name: &str,
        scope: &Scope,
        attachments: &mut Attachments,
        each: &mut dyn FnMut(&mut Self, &Record) -> Result<(), String>,
    ) {
        let verify = self.args.verify;
        let end = read(disk, scope, verify, &mut |record| {
            if let Some(reason) = attachments.check(&record) {
                let (file, offset) = (scope.file(record.part), record.offset);
                self.damaged(path, &StoreError::Damaged { file, offset, reason });
            }
            each(self, &record)
        });
        match end {
            Ok(Some(End { plan, part, records, torn, .. })) => {
                let plan = (plan != Hash([0; 32])).then_some(plan);
                let torn = torn.map(|torn| torn.to_string());
                self.tell(None, &Told::Chain { journal: name, plan, records, parts: part, torn });
            }
            Ok(None) => self.tell(None, &Told::Chain { journal: name, plan: None, records: 0, parts: 0, torn: None }),
            Err(error) => self.damaged(path, &error),
        }
    }

    /// Checks the files beside the journal; how many.
    fn verify_files(&mut self, path: &Path, disk: &dyn Disk, models: &Models) -> Result<u64, AuditError> {
        let files = disk.list().map_err(StateError::io(path, "list"))?;
        let mut count = 0;
        for (name, _) in &files {
            let Some((_, whole)) = run::verify_file(disk, name, models.layout) else { continue };
            count += 1;
            if let Err(reason) = whole {
                self.damaged(path, &StoreError::Damaged { file: name.clone(), offset: 0, reason });
            }
        }
        if let Some(file) = models.missing(&files) {
            self.damaged(path, &StoreError::Missing { file });
        }
        Ok(count)
    }

    fn tell_event(&mut self, unix_ms: u64, event: &Event, tasks: &Tasks) {
        if let Some(told) = history(event, tasks) {
            self.tell(Some(unix_ms), &told);
        }
    }

    fn tell(&mut self, unix_ms: Option<u64>, told: &Told<'_>) {
        if self.printed.is_err() {
            return;
        }
        self.printed = match self.args.json {
            true => serde_json::to_writer(&mut self.out, &Line { unix_ms, told })
                .map_err(io::Error::from)
                .and_then(|()| writeln!(self.out)),
            false => match unix_ms {
                Some(unix_ms) => writeln!(self.out, "{}  {told}", Utc(unix_ms)),
                None => writeln!(self.out, "{told}"),
            },
        };
    }

    fn damaged(&mut self, path: &Path, error: &StoreError) {
        let damage = path.join(error.to_string()).display().to_string();
        self.tell(None, &Told::Damaged { reason: &damage });
        self.damages.push(damage);
    }

    fn end(self) -> Result<(), AuditError> {
        self.printed?;
        self.out.flush()?;
        if self.damages.is_empty() { Ok(()) } else { Err(AuditError::Damaged(self.damages)) }
    }
}

/// The tasks of the rounds that are not committed yet, and whose they are.
#[derive(Default)]
struct Tasks(BTreeMap<TaskId, (WorkerName, u32, TaskKind)>);

impl Tasks {
    fn see(&mut self, event: &Event) {
        if let Event::Assigned { task, round, kind, name, .. } = event {
            self.0.insert(*task, (name.clone(), *round, *kind));
        }
    }

    /// Of an earlier round nothing more is told.
    fn forget(&mut self, event: &Event) {
        if let Event::Committed { figures, .. } = event {
            self.0.retain(|_, (_, round, _)| *round >= figures.round || *round == 0);
        }
    }

    fn of(&self, task: TaskId) -> OfTask<'_> {
        let (worker, round, kind) = match self.0.get(&task) {
            Some((name, round, kind)) => (Some(name), Some(*round), Some(*kind)),
            None => (None, None, None),
        };
        OfTask { task, worker, round, kind }
    }
}

/// What has to be true of the models beside the journal.
struct Models {
    layout: Hash,
    /// The files of the last models, if they are files.
    files: BTreeMap<u32, String>,
    hashes: BTreeMap<u32, Hash>,
}

impl Default for Models {
    fn default() -> Self {
        Self { layout: Hash([0; 32]), files: BTreeMap::new(), hashes: BTreeMap::new() }
    }
}

impl Models {
    fn see(&mut self, event: &Event, record: &Record) {
        let (round, hash) = match event {
            Event::Surveyed { frozen, model } => {
                self.layout = frozen.layout;
                (0, *model)
            }
            Event::Committed { figures, .. } => (figures.round, figures.model),
            Event::Redone { round } => match self.hashes.get(round) {
                Some(hash) => (*round, *hash),
                None => return,
            },
            _ => return,
        };
        self.hashes.insert(round, hash);
        match record.attached {
            Some(_) => self.files.remove(&round),
            None => self.files.insert(round, run::model_file(round, hash)),
        };
    }

    /// Of the newest model, if it is a file that is not there. A live coordinator may have made a newer one since, and
    /// removed it.
    fn missing(&self, files: &[(String, u64)]) -> Option<String> {
        let (round, _) = self.hashes.last_key_value()?;
        let file = self.files.get(round)?;
        let there: BTreeSet<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        let is_newer = |name: &&str| run::parse_model_file(name).is_some_and(|(newer, _)| newer > *round);
        (!there.contains(file.as_str()) && !there.iter().any(is_newer)).then(|| file.clone())
    }
}

/// How many attachments were looked at.
#[derive(Default)]
struct Attachments {
    checked: u64,
    stripped: u64,
}

impl Attachments {
    /// What is wrong with a record's attachment.
    fn check(&mut self, record: &Record) -> Option<String> {
        let attached = record.attached?;
        let Some(content) = &record.content else {
            self.stripped += u64::from(attached.stripped);
            return None;
        };
        self.checked += 1;
        (Hash::of(content) != attached.hash).then(|| "the hash of its attachment does not fit".to_owned())
    }
}

fn membership<'a>(fact: &'a Fact, names: &'a BTreeMap<WorkerId, WorkerName>) -> Told<'a> {
    match fact {
        Fact::Invited { token_hash, uses, expires_unix_s, loopback_only, .. } => Told::Invited {
            token_hash: *token_hash,
            uses: *uses,
            expires_unix_s: *expires_unix_s,
            loopback_only: *loopback_only,
        },
        Fact::Enrolled { worker, token_hash } => {
            Told::Enrolled { worker: &worker.name, id: worker.id, token_hash: *token_hash }
        }
        Fact::Revoked { id } => Told::Revoked { worker: names.get(id), id: *id },
    }
}

fn history<'a>(event: &'a Event, tasks: &'a Tasks) -> Option<Told<'a>> {
    Some(match event {
        Event::Started { start } => Told::Started { start: *start },
        Event::Surveyed { frozen, model } => {
            Told::Surveyed { schema: frozen.schema, model: *model, parameters: frozen.parameters }
        }
        Event::Opened { round, kind, wanted, .. } => Told::Opened { round: *round, kind: *kind, wanted: *wanted },
        Event::Assigned { task, .. } => Told::Assigned(tasks.of(*task)),
        Event::Held { task, update } => {
            let HeldUpdate { hash: payload, bytes, examples, .. } = **update;
            Told::Held { of: tasks.of(*task), payload, bytes, examples }
        }
        Event::Withdrawn { task, why } => withdrawn(tasks.of(*task), why),
        Event::Lost { task } => Told::Lost(tasks.of(*task)),
        Event::Extended { round, extension } => Told::Extended { round: *round, extension: *extension },
        Event::Closed { round } => Told::Closed { round: *round },
        Event::Committed { entries, figures } => {
            let update = |entry: &protocol::federation::Entry| {
                let OfTask { task, worker, .. } = tasks.of(entry.task);
                Committed { task, worker, payload: entry.hash }
            };
            let updates = entries.iter().map(update).collect();
            Told::Committed { round: figures.round, model: figures.model, updates }
        }
        Event::Reverted { round } => Told::Reverted { round: *round },
        Event::Redone { round } => Told::Redone { round: *round },
        Event::Voided => Told::Voided,
        Event::Finished { .. } => Told::Finished,
        Event::Aborted { sentence } => Told::Aborted { reason: sentence },
        Event::Notice(_) => return None,
    })
}

fn withdrawn<'a>(of: OfTask<'a>, why: &Withdrawal) -> Told<'a> {
    match why {
        Withdrawal::Late => Told::Late(of),
        Withdrawal::Left => Told::Left(of),
        Withdrawal::Failed(failure) => Told::Failed { of, reason: format!("{failure:?}") },
        Withdrawal::Refused(refusal) => Told::Refused { of, reason: refusal.to_string() },
    }
}

impl fmt::Display for OfTask<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.task, self.worker.map_or("a worker that is not told", WorkerName::as_str))?;
        match (self.round, self.kind) {
            (Some(round), Some(kind)) => write!(f, " ({}, round {round})", name_of(kind)),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invited { token_hash, uses, expires_unix_s, loopback_only } => {
                let uses =
                    if *uses == 0 { "any number of workers".to_owned() } else { counted((*uses).into(), "worker") };
                let place = if *loopback_only { " on this machine" } else { "" };
                write!(f, "invited    {uses}{place}, token {token_hash}")?;
                expires_unix_s.map_or(Ok(()), |end| write!(f, ", until {}", Utc(end.saturating_mul(1000))))
            }
            Self::Enrolled { worker, id, token_hash } => {
                write!(f, "enrolled   {worker}, id {id}, with token {token_hash}")
            }
            Self::Revoked { worker: Some(worker), id } => write!(f, "revoked    {worker}, id {id}"),
            Self::Revoked { worker: None, id } => write!(f, "revoked    id {id}"),
            Self::Run { run } => write!(f, "run {run}"),
            Self::Started { start } => write!(f, "started    with the {start}. start of the coordinator"),
            Self::Surveyed { schema, model, parameters } => {
                write!(f, "surveyed   schema {schema}, model {model} of {parameters} parameters")
            }
            Self::Opened { round, kind, wanted } => {
                write!(f, "opened     round {round}: {wanted} wanted ({})", name_of(*kind))
            }
            Self::Assigned(of) => write!(f, "assigned   {of}"),
            Self::Held { of, payload, bytes, examples } => {
                write!(f, "held       {of}: payload {payload}, {bytes} bytes, {examples} rows")
            }
            Self::Late(of) => write!(f, "late       {of}"),
            Self::Left(of) => write!(f, "left       {of}"),
            Self::Failed { of, reason } => write!(f, "failed     {of}: {reason}"),
            Self::Refused { of, reason } => write!(f, "refused    {of}: {reason}"),
            Self::Lost(of) => write!(f, "lost       {of}: its payload was asked for again"),
            Self::Extended { round, extension } => write!(f, "extended   round {round}, {extension} times by now"),
            Self::Closed { round } => write!(f, "closed     round {round}"),
            Self::Committed { round, model, updates } => {
                write!(f, "committed  round {round}: model {model} of {}", counted(updates.len() as u64, "update"))?;
                updates.iter().try_for_each(|update| {
                    let worker = update.worker.map_or("a worker that is not told", WorkerName::as_str);
                    write!(f, "\n    {} of {worker}: payload {}", update.task, update.payload)
                })
            }
            Self::Reverted { round } => write!(f, "reverted   to the model of round {round}: what is newer is damaged"),
            Self::Redone { round } => write!(f, "redone     round {round}: the same model again"),
            Self::Voided => f.write_str("voided     what was given out begins anew"),
            Self::Finished => f.write_str("finished"),
            Self::Aborted { reason } => write!(f, "aborted    {reason}"),
            Self::Chain { journal, records, parts, torn, .. } => {
                let (records, parts) = (counted(*records, "record"), counted(*parts, "part"));
                write!(f, "the chain of the {journal} is whole: {records} in {parts}")?;
                torn.as_ref().map_or(Ok(()), |torn| write!(f, "; {torn}"))
            }
            Self::Verified { files, attachments, stripped } => {
                let (files, attachments) = (counted(*files, "file"), counted(*attachments, "attachment"));
                write!(f, "verified {files} and {attachments}; {stripped} older ones were removed")
            }
            Self::Damaged { reason } => write!(f, "DAMAGED {reason}"),
        }
    }
}

fn counted(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn name_of(kind: TaskKind) -> &'static str {
    match kind {
        TaskKind::Update => "update",
        TaskKind::Gradient => "gradient",
        TaskKind::Rows => "rows",
        TaskKind::Survey => "survey",
        TaskKind::Evaluation => "evaluation",
        TaskKind::Partial => "partial",
    }
}

/// Milliseconds since 1970 as a person reads them: `2026-11-21 12:00:00.123Z`.
struct Utc(u64);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, ms) = (self.0 / 86_400_000, self.0 % 86_400_000);
        // Days to a date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days. Its years
        // begin in March, so that a leap day is the last.
        let days = days + 719_468;
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = era * 400 + year + u64::from(month <= 2);
        let (hours, minutes, seconds) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
        write!(f, "{year}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}.{:03}Z", ms % 1000)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::enrol::{InvitationWish, Registrar};
    use crate::registry::Applicant;
    use crate::state::StateDir;
    use crate::store::run::Attachment;
    use crate::store::testing::{SCHEMA, assigned, committed, held, model, started, surveyed};
    use crate::store::{OpenedRun, open_run, real_disks};
    use certs::IdentityKey;
    use protocol::messages::{EnrolRequest, Refusal};
    use protocol::plan::{LearningPlan, Plan, RoundsSpec};

    /// A fleet of one, of which one round is committed; the model of the next is as large as `bytes`.
    fn history(state: &StateDir, bytes: usize) -> OpenedRun {
        let mut registrar = Registrar::open(state).unwrap();
        let wish = InvitationWish { addresses: vec!["h".into()], uses: 2, expires: None };
        let token = registrar.invite(&wish, None).unwrap().token;
        let ed25519 = IdentityKey::generate().unwrap().public();
        let request = EnrolRequest { token, name: "shard".parse().unwrap(), ed25519 };
        registrar.enrol(&Applicant { request, x25519: [5; 32], is_local: false, now_unix_s: 0 }).unwrap();
        registrar.revoke("shard").unwrap();

        let plan = Plan::new(LearningPlan::default(), RoundsSpec::default()).unwrap();
        let mut opened = open_run(state, &plan, false, false, &real_disks()).unwrap();
        let store = &mut opened.loaded.store;
        let first = model(0, 100);
        let (task, late, bad) = (TaskId::new(1, 1), TaskId::new(1, 2), TaskId::new(1, 3));
        store.append(&started(1), Attachment::None).unwrap();
        store.append(&surveyed(&first), Attachment::First { schema: SCHEMA, state: &first }).unwrap();
        for task in [task, late, bad] {
            store.append(&assigned(task, 1), Attachment::None).unwrap();
        }
        store.append(&held(task, b"payload"), Attachment::Payload(b"payload")).unwrap();
        let refused = Withdrawal::Refused(Refusal::NotFinite);
        for (task, why) in [(late, Withdrawal::Late), (bad, refused)] {
            store.append(&Event::Withdrawn { task, why }, Attachment::None).unwrap();
        }
        let made = model(1, bytes);
        store.append(&committed(1, task, b"payload", &made), Attachment::Model(&made)).unwrap();
        store.sync().unwrap();
        opened
    }

    fn state() -> (tempfile::TempDir, StateDir) {
        let home = tempfile::tempdir().unwrap();
        let state = StateDir::open(home.path()).unwrap();
        (home, state)
    }

    fn audited(state: &StateDir, verify: bool, json: bool) -> (String, Result<(), AuditError>) {
        let mut out = Vec::new();
        let result = audit(state.path(), &AuditArgs { verify, run: None, json }, &mut out);
        (String::from_utf8(out).unwrap(), result)
    }

    #[test]
    fn an_audit_tells_what_became_of_everybody_beside_a_live_coordinator() {
        let (_home, state) = state();
        let _live = history(&state, 100);
        let (told, result) = audited(&state, true, false);
        result.unwrap();
        for said in [
            "invited    2 workers, token ",
            "enrolled   shard, id ",
            "revoked    shard, id ",
            "the chain of the registry is whole: 3 records in 1 part\nrun ",
            "started    with the 1. start of the coordinator\n",
            "assigned   1.1 of shard (update, round 1)\n",
            &format!("held       1.1 of shard (update, round 1): payload {}, 7 bytes, 9 rows\n", Hash::of(b"payload")),
            "late       1.2 of shard (update, round 1)\n",
            "refused    1.3 of shard (update, round 1): the update holds a number that is not finite\n",
            "of 1 update\n    1.1 of shard: payload ",
            "the chain of the run is whole: 9 records in 1 part\n",
            "verified 2 files and 2 attachments; 0 older ones were removed\n",
        ] {
            assert!(told.contains(said), "{said:?} is not in {told}");
        }
    }

    #[test]
    fn an_audit_for_a_program_is_one_object_a_line() {
        let (_home, state) = state();
        let _live = history(&state, 100);
        let (told, result) = audited(&state, false, true);
        result.unwrap();
        let lines: Vec<serde_json::Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let of = |event: &str| lines.iter().find(|line| line["event"] == event).unwrap();
        assert_eq!((&of("held")["task"], &of("held")["worker"]), (&"1.1".into(), &"shard".into()));
        assert_eq!(of("held")["payload"], Hash::of(b"payload").to_string());
        assert_eq!(of("committed")["updates"][0]["payload"], of("held")["payload"]);
        assert_eq!((&of("late")["task"], &of("late")["round"]), (&"1.2".into(), &1.into()));
        assert!(of("enrolled")["unix_ms"].as_u64().unwrap() > 1_700_000_000_000);
        assert_eq!(lines.last().unwrap()["torn"], serde_json::Value::Null);
    }

    #[test]
    fn a_torn_tail_is_told_and_damage_is_an_error_with_file_and_offset() {
        let (_home, state) = state();
        let mut run = history(&state, 100);
        let file = run.path.join("journal-000001");
        let whole = std::fs::read(&file).unwrap();
        // What is behind it is room.
        let end = whole.iter().rposition(|byte| *byte != 0).unwrap();
        std::fs::write(&file, &whole[..end]).unwrap();
        let (told, result) = audited(&state, true, false);
        result.unwrap();
        assert!(told.contains("; journal-000001: torn at offset "), "{told}");
        std::fs::write(&file, &whole).unwrap();
        run.loaded.store.append(&started(2), Attachment::None).unwrap();
        run.loaded.store.sync().unwrap();
        let mut damaged = std::fs::read(&file).unwrap();
        damaged[130] ^= 1;
        std::fs::write(&file, damaged).unwrap();
        let (told, result) = audited(&state, false, false);
        let error = result.unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: damaged at offset 100: ", file.display())), "{error}");
        assert!(told.contains(&format!("DAMAGED {}", file.display())), "{told}");
    }

    #[test]
    fn what_is_beside_the_records_is_checked_only_when_asked() {
        let (_home, state) = state();
        let run = history(&state, 2 << 20);
        let flip = |file: &Path, at: usize| {
            let mut bytes = std::fs::read(file).unwrap();
            bytes[at] ^= 1;
            std::fs::write(file, bytes).unwrap();
        };
        let file = run.path.join(run::model_file(1, {
            let mut hasher = protocol::layout::model_hasher(&Hash([9; 32]));
            hasher.update(&model(1, 2 << 20).model);
            hasher.finalize().into()
        }));
        flip(&file, 5000);
        audited(&state, false, false).1.unwrap();
        let error = audited(&state, true, false).1.unwrap_err().to_string();
        assert!(error.contains(&*file.to_string_lossy()) && error.contains("the model in it is"), "{error}");
        std::fs::remove_file(&file).unwrap();
        let error = audited(&state, true, false).1.unwrap_err().to_string();
        assert!(error.contains(&*file.to_string_lossy()) && error.contains("it is not there"), "{error}");
        let journal = run.path.join("journal-000001");
        let at = std::fs::read(&journal).unwrap().windows(7).position(|bytes| bytes == b"payload").unwrap();
        flip(&journal, at);
        let error = audited(&state, true, false).1.unwrap_err().to_string();
        assert!(error.contains("the hash of its attachment does not fit"), "{error}");
    }

    #[test]
    fn nothing_is_told_of_what_is_not_there() {
        let home = tempfile::tempdir().unwrap();
        let args = AuditArgs { verify: false, run: None, json: false };
        let none = audit(&home.path().join("none"), &args, &mut Vec::new());
        assert!(matches!(none, Err(AuditError::NoState { .. })));
        let state = StateDir::open(home.path()).unwrap();
        let (told, result) = audited(&state, true, false);
        result.unwrap();
        assert_eq!(told, "the chain of the registry is whole: 0 records in 0 parts\n");
        let args = AuditArgs { run: Some(RunId([1; 16])), ..args };
        assert!(matches!(audit(state.path(), &args, &mut Vec::new()), Err(AuditError::NoRun { .. })));
    }

    #[test]
    fn times_are_told_in_utc() {
        assert_eq!(Utc(0).to_string(), "1970-01-01 00:00:00.000Z");
        assert_eq!(Utc(951_782_400_000).to_string(), "2000-02-29 00:00:00.000Z");
        assert_eq!(Utc(1_795_000_000_123).to_string(), "2026-11-18 11:06:40.123Z");
    }
}
