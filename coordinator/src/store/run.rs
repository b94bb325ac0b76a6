//! What one run leaves on disk: its journal, its models, the payloads that are held.
//!
//! ```text
//! journal-NNNNNN              every fact, from the beginning
//! schema-<hash>               what the survey froze
//! model-<round>-<hash>        the first model, and each too large for its commit's record, with the server step's state
//! payload-<hash>-<task>       a payload too large for its record; with .part-N while it comes
//! ```
//!
//! A model is durable before the record that names it, and what it is made of before the model. What was replaced is
//! removed after the sync of what replaces it. So whatever instant the power goes, what is there opens, and holds
//! everything that was synced.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Cursor, Read};
use std::sync::Arc;

use protocol::federation::{Event, REVERT_MAX};
use protocol::ids::{Hash, RunId, TaskId};
use protocol::layout::model_hasher;
use protocol::limits::{MODEL_BYTES_MAX, PAYLOAD_AT_ONCE_BYTES_MAX, SCHEMA_BYTES_MAX};

use super::StoreError;
use super::disk::{ASIDE, Disk, put_aside, read_whole, take_place, write_aside};
use super::journal::{ATTACHMENT_BYTES_MAX, Attached, End, FACT, Journal, Record, Scope};
use crate::crash;

/// How many models of a run are kept as files.
pub const MODELS_KEPT: usize = 3;

/// What the names of a run's journal begin with.
pub const JOURNAL: &str = "journal-";

/// A model that is written before its hash, and so its name, is known.
const NEXT_MODEL: &str = "model-next.aside";

const MODEL_MAGIC: &[u8; 8] = b"tribmodl";
const MODEL_VERSION: u32 = 2;
const MODEL_HEAD_BYTES: usize = 8 + 4 + 8 + 8;

/// The server state of today's strategies has at most two numbers of eight bytes for each parameter.
const SERVER_BYTES_MAX: u64 = 4 * MODEL_BYTES_MAX;

/// A model, and what the server step remembers beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelState {
    /// Raw little-endian `f32` in layout order.
    pub model: Arc<[u8]>,
    /// The server step's state.
    pub server: Vec<u8>,
}

/// What goes beside a fact.
#[derive(Clone, Copy, Debug)]
pub enum Attachment<'a> {
    /// Nothing.
    None,
    /// A held payload of at most 128 KiB; never one of rows.
    Payload(&'a [u8]),
    /// The model that stands with a commit.
    Model(&'a ModelState),
    /// The schema and the first model, of a survey.
    First {
        /// The schema's bytes.
        schema: &'a [u8],
        /// The first model.
        state: &'a ModelState,
    },
}

/// Where a run begins.
pub struct Loaded {
    /// What it goes on with.
    pub store: RunStore,
    /// Every fact so far.
    pub events: Vec<Event>,
    /// The frozen schema's bytes; empty before the survey.
    pub schema: Arc<[u8]>,
    /// The newest model that is whole; none before the survey.
    pub state: Option<ModelState>,
    /// The round whose model `state` is, if a newer one is damaged; 0 for the first model.
    pub whole: Option<u32>,
    /// Held payloads that a power cut tore beside records that it left whole: they are to be asked for again.
    pub lost: Vec<(TaskId, Hash)>,
    /// What was found damaged or torn on the way.
    pub warnings: Vec<StoreError>,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").field("events", &self.events.len()).field("whole", &self.whole).finish_non_exhaustive()
    }
}

/// Sizes from which on something is done differently. Tests and the simulation have smaller ones.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A commit begins the next part of the journal if the last is longer.
    pub part_bytes: u64,
    /// A model up to this is in its commit's record.
    pub attached_bytes: usize,
    /// Room that is made in the journal at once.
    pub room_bytes: u64,
}

#[doc(hidden)]
pub const LIMITS: Limits = Limits { part_bytes: 64 << 20, attached_bytes: ATTACHMENT_BYTES_MAX, room_bytes: 1 << 20 };

/// What stands in [`NEXT_MODEL`], durably.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Prepared {
    Nothing,
    Unnamed,
    Model(Hash),
}

/// The store of one run.
pub struct RunStore {
    disk: Box<dyn Disk>,
    journal: Journal,
    limits: Limits,
    index: Index,
    /// Payloads that were kept, and not yet synced.
    kept: BTreeMap<TaskId, String>,
    /// A commit is appended and not yet written; or written and not yet synced.
    commit_waits: bool,
    commit_unsynced: bool,
    /// Something may be replaced by what the next sync makes durable.
    replaces: bool,
    prepared: Prepared,
    /// Models and payloads are there, or may be, in files of their own, which will be over some day.
    litter: bool,
    /// The lowest part that has attachments to be stripped.
    unstripped: u64,
    /// What the files had when they were last looked at, without the journal's last part.
    others: u64,
}

impl std::fmt::Debug for RunStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunStore").field("journal", &self.journal.file()).finish_non_exhaustive()
    }
}

impl RunStore {
    /// Reads a run from its beginning, or begins it if nothing is there. Cuts a torn tail, and removes what a crash
    /// left behind.
    ///
    /// # Errors
    /// If something is damaged that cannot be done without, or the disk is broken or read-only.
    pub fn open(disk: Box<dyn Disk>, run: RunId, plan: Hash, clock: fn() -> u64) -> Result<Loaded, StoreError> {
        Self::open_with(disk, run, Some(plan), clock, LIMITS)
    }

    /// Reads a run that has begun, whatever its plan.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_any(disk: Box<dyn Disk>, run: RunId, clock: fn() -> u64) -> Result<Loaded, StoreError> {
        Self::open_with(disk, run, None, clock, LIMITS)
    }

    /// As [`Self::open`], with other limits.
    ///
    /// # Errors
    /// As [`Self::open`].
    #[doc(hidden)]
    pub fn open_with(
        mut disk: Box<dyn Disk>,
        run: RunId,
        plan: Option<Hash>,
        clock: fn() -> u64,
        limits: Limits,
    ) -> Result<Loaded, StoreError> {
        let scope = Scope { prefix: JOURNAL, run, plan };
        let (mut index, mut events) = (Index::default(), Vec::new());
        refuse_headless(disk.as_ref())?;
        let (mut journal, end) = Journal::open(disk.as_mut(), scope, clock, &mut |record: Record| {
            if let Some(event) = fact(&record)? {
                index.take_in(&event, record.attached);
                events.push(event);
            }
            Ok(())
        })?;
        journal.make_room_of(limits.room_bytes);
        let unstripped = end.as_ref().map_or(1, |end| end.unstripped);
        let durable = end.as_ref().map_or(0, |end| end.durable);
        let mut warnings: Vec<StoreError> = end.and_then(|end: End| end.torn).into_iter().collect();
        let mut store = Self {
            disk,
            journal,
            limits,
            index,
            kept: BTreeMap::new(),
            commit_waits: false,
            commit_unsynced: false,
            replaces: false,
            prepared: Prepared::Nothing,
            litter: true,
            unstripped,
            others: 0,
        };
        let (state, whole) = store.newest_model(&mut warnings)?;
        let schema = store.schema()?;
        store.tidy()?;
        store.find_kept()?;
        let lost = store.torn_payloads(durable)?;
        Ok(Loaded { store, events, schema, state, whole, lost, warnings })
    }

    /// Held payloads beside records of the last part, not all of which is before `durable`, that are not what they were.
    fn torn_payloads(&self, durable: u64) -> Result<Vec<(TaskId, Hash)>, StoreError> {
        let part = self.journal.part();
        let may_be_torn = |place: &Attached| place.part == part && place.offset + u64::from(place.bytes) > durable;
        let mut torn = Vec::new();
        for task in &self.index.held {
            let Some(place) = self.index.payloads.get(task).filter(|place| may_be_torn(place)) else { continue };
            let content = self.journal.attachment(self.disk.as_ref(), place)?;
            if content.is_none_or(|content| Hash::of(&content) != place.hash) {
                torn.push((*task, place.hash));
            }
        }
        Ok(torn)
    }

    /// Takes in a fact with what goes beside it. It is written at the next flush, and durable after the next sync; a
    /// large model is durable at once.
    ///
    /// # Errors
    /// If the disk is full, and then it was not taken in; if another model of the round is there; if the disk is
    /// broken.
    pub fn append(&mut self, event: &Event, attachment: Attachment<'_>) -> Result<(), StoreError> {
        match attachment {
            Attachment::None => self.record(event, &[]),
            Attachment::Payload(bytes) => self.record(event, bytes),
            Attachment::Model(state) => self.commit(event, state, self.is_large(state)),
            Attachment::First { schema, state } => {
                write_aside(self.disk.as_mut(), &schema_file(Hash::of(schema)), |file| file.put(schema))?;
                self.commit(event, state, true)
            }
        }
    }

    /// Writes the model that the next commit will come with, if it is large, so that this can be done beside what else it takes.
    /// [`Self::name_prepared`] says which one it was. A full disk is no error: the commit writes it then.
    ///
    /// # Errors
    /// If the disk is broken.
    pub fn prepare(&mut self, state: &ModelState) -> Result<(), StoreError> {
        self.prepared = Prepared::Nothing;
        if !self.is_large(state) {
            return Ok(());
        }
        match put_model(self.disk.as_mut(), NEXT_MODEL, state) {
            Err(error) if error.is_full() => return Ok(()),
            put => put?,
        }
        self.prepared = Prepared::Unnamed;
        Ok(())
    }

    /// Says that the model that was prepared is the one with this hash.
    pub fn name_prepared(&mut self, model: Hash) {
        if self.prepared == Prepared::Unnamed {
            self.prepared = Prepared::Model(model);
        }
    }

    /// Whether a fact whose model, if it makes one, goes beside its record is taken in without a file being touched.
    #[must_use]
    pub fn is_quick(&self, event: &Event) -> bool {
        let begins_a_file = matches!(event, Event::Surveyed { .. })
            || event.makes_model() && self.journal.length() > self.limits.part_bytes;
        self.journal.has_room() && !begins_a_file
    }

    /// Whether a sync neither waits for a device nor rewrites anything.
    #[must_use]
    pub fn syncs_at_once(&self) -> bool {
        self.disk.is_in_memory() && self.kept.is_empty() && self.unstripped + 2 > self.journal.part()
    }

    /// Whether something is appended and not written.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.journal.is_waiting()
    }

    /// Writes what was appended; it survives the end of the process.
    ///
    /// # Errors
    /// If the disk is full: then what was appended still waits. Or it is broken.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        if !self.journal.is_waiting() {
            return Ok(());
        }
        let commit = self.commit_waits;
        crash::point(if commit { "commit.before" } else { "journal.before" });
        self.journal.flush(self.disk.as_mut())?;
        crash::point(if commit { "commit.after" } else { "journal.after" });
        self.commit_waits = false;
        self.commit_unsynced |= commit;
        Ok(())
    }

    /// Makes everything that was appended survive a power cut, payload files first. How many bytes of the journal were made
    /// durable. What was replaced by it is still there: see [`Self::clean`].
    ///
    /// # Errors
    /// As [`Self::flush`]; and if a sync failed, after which the process must end.
    pub fn sync(&mut self) -> Result<u64, StoreError> {
        self.sync_payloads()?;
        self.flush()?;
        let commit = self.commit_unsynced;
        crash::point(if commit { "commit-sync.before" } else { "journal-sync.before" });
        let bytes = self.journal.sync(self.disk.as_mut())?;
        crash::point(if commit { "commit-sync.after" } else { "journal-sync.after" });
        self.commit_unsynced = false;
        Ok(bytes)
    }

    /// Removes what is replaced by what is durable. For after a sync, when whoever waited for it has been told.
    ///
    /// # Errors
    /// If the disk is broken.
    pub fn clean(&mut self) -> Result<(), StoreError> {
        if self.replaces {
            self.replaces = false;
            // One that is kept and not yet said to be held is still open.
            let open = &self.index.open;
            self.kept.retain(|task, _| open.contains(task));
            self.strip_old_parts()?;
            // Of a round whose model and payloads stand in the journal nothing is left: no need to look.
            if self.litter {
                self.tidy()?;
            }
        }
        Ok(())
    }

    /// Keeps a payload that was spooled to the file `part` of this directory.
    ///
    /// # Errors
    /// If the disk is broken.
    pub fn keep(&mut self, task: TaskId, hash: Hash, part: &str) -> Result<(), StoreError> {
        let name = payload_file(task, hash);
        crash::point("payload.before");
        self.disk.rename(part, &name).map_err(StoreError::io(part, "rename"))?;
        crash::point("payload.after");
        self.kept.insert(task, name);
        self.litter = true;
        Ok(())
    }

    /// A payload that was kept, by this process or an earlier one, in a file or beside its record. Its hash is not
    /// checked: whoever folds it does that. `None` if it is not there.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn payload(&self, task: TaskId, hash: Hash) -> Result<Option<Box<dyn Read + Send>>, StoreError> {
        self.payload_from(task, hash, 0)
    }

    /// The same from a byte on.
    ///
    /// # Errors
    /// As [`Self::payload`].
    pub fn payload_from(
        &self,
        task: TaskId,
        hash: Hash,
        from: u64,
    ) -> Result<Option<Box<dyn Read + Send>>, StoreError> {
        if let Some(place) = self.index.payloads.get(&task).filter(|place| place.hash == hash) {
            let content = self.journal.attachment(self.disk.as_ref(), place)?;
            let mut content = content.map(Cursor::new);
            content.iter_mut().for_each(|content| content.set_position(from));
            return Ok(content.map(|content| Box::new(content) as Box<dyn Read + Send>));
        }
        let name = payload_file(task, hash);
        match self.disk.read(&name, from) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            reader => reader.map(Some).map_err(StoreError::io(&name, "open")),
        }
    }

    /// Payloads that are half received, with what is there of each: `payload-<hash>-<task>.part-N`.
    ///
    /// # Errors
    /// If the directory cannot be listed.
    pub fn parts(&self) -> Result<Vec<(String, u64)>, StoreError> {
        let files = self.disk.list().map_err(StoreError::io("the run's directory", "list"))?;
        Ok(files.into_iter().filter(|(name, _)| PayloadName::parse(name).is_some_and(|p| p.is_part)).collect())
    }

    /// The hash of the plan that the journal names.
    #[must_use]
    pub fn plan(&self) -> Hash {
        self.journal.plan()
    }

    /// How much room the run takes.
    #[must_use]
    pub fn bytes_on_disk(&self) -> u64 {
        self.others + self.journal.length()
    }

    fn record(&mut self, event: &Event, attachment: &[u8]) -> Result<(), StoreError> {
        let payload = protocol::messages::encode(event);
        let place = self.journal.append(self.disk.as_mut(), FACT, &payload, attachment)?;
        self.replaces |= self.index.take_in(event, place);
        // A large payload came as a file, and so, before they were stopped, did those that are not held.
        self.litter |= match event {
            Event::Held { update, .. } => update.bytes > PAYLOAD_AT_ONCE_BYTES_MAX,
            Event::Assigned { .. } | Event::Opened { .. } | Event::Closed { .. } | Event::Committed { .. } => false,
            _ => true,
        };
        self.commit_waits |= event.is_commit();
        Ok(())
    }

    /// What the model is made of, the model, the record that names it: each durable before the next. Beside its record a
    /// model may be torn by a power cut; then the round is made again of the model before. So the first is a file.
    fn commit(&mut self, event: &Event, state: &ModelState, is_file: bool) -> Result<(), StoreError> {
        let (round, hash) = self.index.model_of(event).expect("only what makes a model comes with one");
        let is_part_full = self.journal.length() > self.limits.part_bytes;
        self.litter |= is_file || is_part_full;
        // Both make the journal durable, and with it facts of which these payloads are the matter.
        if is_file || is_part_full {
            self.sync_payloads()?;
        }
        // What is made of rows is made of those that are there then: a model that no record names is nobody's.
        let is_of_rows = matches!(event, Event::Committed { entries, .. } if entries.is_empty());
        if is_file {
            if !is_of_rows {
                self.refuse_second(round, hash)?;
            }
            self.flush()?;
            crash::point("journal-sync.before");
            self.journal.sync(self.disk.as_mut())?;
            crash::point("journal-sync.after");
            crash::point("checkpoint.before");
            self.write_model(&model_file(round, hash), hash, state)?;
            crash::point("checkpoint.after");
        }
        if is_part_full {
            let length = self.journal.length();
            self.journal.begin_part(self.disk.as_mut())?;
            self.others += length;
        }
        if is_file { self.record(event, &[]) } else { self.record(event, &state.to_bytes()) }
    }

    fn is_large(&self, state: &ModelState) -> bool {
        state.model.len() + state.server.len() + 8 > self.limits.attached_bytes
    }

    /// Makes a model a file, of what was prepared if that is it.
    fn write_model(&mut self, file: &str, hash: Hash, state: &ModelState) -> Result<(), StoreError> {
        let is_there = self.prepared == Prepared::Model(hash);
        self.prepared = Prepared::Nothing;
        let aside = if is_there { NEXT_MODEL.to_owned() } else { format!("{file}{ASIDE}") };
        if !is_there {
            put_model(self.disk.as_mut(), &aside, state)?;
        }
        take_place(self.disk.as_mut(), &aside, file)
    }

    /// A commit that is made again must give the same model.
    fn refuse_second(&self, round: u32, hash: Hash) -> Result<(), StoreError> {
        let files = self.disk.list().map_err(StoreError::io("the run's directory", "list"))?;
        let other =
            files.iter().filter_map(|(name, _)| parse_model_file(name)).find(|(r, h)| *r == round && *h != hash);
        match other {
            Some((_, kept)) => Err(StoreError::TwoModels { round, kept, redone: hash }),
            None => Ok(()),
        }
    }

    /// What an earlier process kept and did not sync is held all the same.
    fn find_kept(&mut self) -> Result<(), StoreError> {
        let files = self.disk.list().map_err(StoreError::io("the run's directory", "list"))?;
        for (name, _) in files {
            if let Some(PayloadName { task, is_part: false, .. }) = PayloadName::parse(&name) {
                self.kept.insert(task, name);
            }
        }
        Ok(())
    }

    /// Of what is replaced by now, nothing need be durable.
    fn sync_payloads(&mut self) -> Result<(), StoreError> {
        let held: Vec<TaskId> = self.kept.keys().filter(|task| self.index.held.contains(task)).copied().collect();
        for task in held {
            let Some(file) = self.kept.remove(&task) else { continue };
            self.disk.sync(&file).map_err(|source| StoreError::Unsynced { file, source })?;
        }
        Ok(())
    }

    /// The part before the previous one needs its attachments no longer.
    fn strip_old_parts(&mut self) -> Result<(), StoreError> {
        while self.unstripped + 2 <= self.journal.part() {
            let part = self.unstripped;
            match self.journal.strip(self.disk.as_mut(), part) {
                // That is for later: nothing needs it.
                Err(error) if error.is_full() => return Ok(()),
                stripped => stripped?,
            }
            self.index.forget_part(part);
            self.unstripped += 1;
        }
        Ok(())
    }

    /// Removes what nobody needs: older models, payloads of what is committed or withdrawn, halves of what a crash cut.
    fn tidy(&mut self) -> Result<(), StoreError> {
        let files = self.disk.list().map_err(StoreError::io("the run's directory", "list"))?;
        let journal = self.journal.file();
        let oldest = self.index.oldest_kept();
        (self.others, self.litter) = (0, false);
        for (name, bytes) in files {
            if self.is_over(&name, oldest) {
                self.disk.remove(&name).map_err(StoreError::io(&name, "remove"))?;
            } else if name != journal {
                self.others += bytes;
                self.litter |= ["model-", "payload-"].iter().any(|prefix| name.starts_with(prefix));
            }
        }
        Ok(())
    }

    fn is_over(&self, name: &str, oldest: u32) -> bool {
        let ours = ["journal-", "schema-", "model-"].iter().any(|prefix| name.starts_with(prefix));
        match PayloadName::parse(name) {
            Some(PayloadName { task, is_part: true, .. }) => !self.index.open.contains(&task),
            Some(PayloadName { task, .. }) => !self.index.held.contains(&task) && !self.kept.contains_key(&task),
            None if name == NEXT_MODEL => self.prepared == Prepared::Nothing,
            None if ours && name.ends_with(ASIDE) => true,
            None => parse_model_file(name).is_some_and(|(round, hash)| {
                let other = self.index.models.get(&round).is_some_and(|model| model.hash != hash);
                round < oldest || other
            }),
        }
    }

    fn schema(&self) -> Result<Arc<[u8]>, StoreError> {
        let Some(hash) = self.index.schema else { return Ok(Arc::from([])) };
        let file = schema_file(hash);
        let bytes = read_whole(self.disk.as_ref(), &file, SCHEMA_BYTES_MAX)?;
        let bytes = bytes.ok_or_else(|| StoreError::Missing { file: file.clone() })?;
        if Hash::of(&bytes) != hash {
            let reason = "its hash is not the one that its name says".to_owned();
            return Err(StoreError::Damaged { file, offset: 0, reason });
        }
        Ok(bytes.into())
    }

    /// The newest model that is whole; and its round, if a newer one is not. One that is too old is of no use: the rounds since
    /// could not be made again.
    fn newest_model(&self, warnings: &mut Vec<StoreError>) -> Result<(Option<ModelState>, Option<u32>), StoreError> {
        let newest = self.index.models.last_key_value().map_or(0, |(round, _)| *round);
        let is_near = |round: u32| (newest - round) as usize <= REVERT_MAX;
        let mut damaged = false;
        for (round, model) in self.index.models.iter().rev().take_while(|(round, _)| is_near(**round)) {
            match self.model(*round, model) {
                Ok(state) => return Ok((Some(state), damaged.then_some(*round))),
                Err(ModelError::Disk(error)) => return Err(error),
                Err(ModelError::Damaged(reason)) => warnings.push(StoreError::Model { round: *round, reason }),
            }
            damaged = true;
        }
        if damaged { Err(StoreError::NoModel) } else { Ok((None, None)) }
    }

    fn model(&self, round: u32, standing: &Standing) -> Result<ModelState, ModelError> {
        let layout = self.index.layout.unwrap_or(Hash([0; 32]));
        let Some(place) = &standing.place else {
            let state = read_model(self.disk.as_ref(), &model_file(round, standing.hash))?;
            return state.checked(layout, standing.hash);
        };
        let content = self.journal.attachment(self.disk.as_ref(), place)?;
        let content = content.ok_or_else(|| ModelError::damaged("it was removed"))?;
        if Hash::of(&content) != place.hash {
            return Err(ModelError::damaged("the hash of its bytes in the journal does not fit"));
        }
        let state = ModelState::from_bytes(&content).ok_or_else(|| ModelError::damaged("it is no model"))?;
        state.checked(layout, standing.hash)
    }
}

/// The fact of a record; none if it is of a kind that came later.
pub(crate) fn fact(record: &Record) -> Result<Option<Event>, String> {
    if record.kind != FACT {
        return Ok(None);
    }
    protocol::messages::decode(&record.payload).map(Some).map_err(|error| format!("a fact cannot be read: {error}"))
}

/// A run that has files and no journal has lost it.
fn refuse_headless(disk: &dyn Disk) -> Result<(), StoreError> {
    let files = disk.list().map_err(StoreError::io("the run's directory", "list"))?;
    let has = |prefix: &str| files.iter().any(|(name, _)| name.starts_with(prefix) && !name.ends_with(ASIDE));
    match has(JOURNAL) {
        false if has("model-") || has("schema-") => Err(StoreError::Missing { file: format!("{JOURNAL}000001") }),
        _ => Ok(()),
    }
}

/// Whether a run has a journal.
pub(crate) fn has_begun(disk: &dyn Disk) -> Result<bool, StoreError> {
    let files = disk.list().map_err(StoreError::io("the run's directory", "list"))?;
    Ok(files.iter().any(|(name, _)| name.starts_with(JOURNAL) && !name.ends_with(ASIDE)))
}

/// What the facts say about files.
#[derive(Debug, Default)]
struct Index {
    schema: Option<Hash>,
    layout: Option<Hash>,
    /// The model of each committed round, the first model at 0.
    hashes: Vec<Hash>,
    /// The models that stand, by round.
    models: BTreeMap<u32, Standing>,
    /// Payloads that are beside their record, until the record's part is stripped: also committed ones, which a
    /// reverted round is made of again.
    payloads: BTreeMap<TaskId, Attached>,
    /// Tasks whose payload is held and not yet in a model.
    held: BTreeSet<TaskId>,
    /// Tasks for which a payload may come.
    open: BTreeSet<TaskId>,
    /// Tasks that were given since the last commit: those of the work that is open.
    given: BTreeSet<TaskId>,
    /// Rounds are made of no updates: one that is made again is another.
    is_anew: bool,
}

#[derive(Clone, Copy, Debug)]
struct Standing {
    hash: Hash,
    /// Beside its commit's record; else it is a file.
    place: Option<Attached>,
}

impl Index {
    /// Takes in a fact and where its attachment is. Whether files are no longer needed once it is durable.
    fn take_in(&mut self, event: &Event, place: Option<Attached>) -> bool {
        if let Some((round, hash)) = self.model_of(event)
            && !place.is_some_and(|place| place.stripped)
        {
            self.models.insert(round, Standing { hash, place });
            let oldest = self.oldest_kept();
            // Those before were looked at when they were the oldest.
            while let Some((&round, Standing { place: None, .. })) = self.models.range(..oldest).next_back() {
                self.models.remove(&round);
            }
        }
        match event {
            Event::Assigned { task, .. } => {
                self.given.insert(*task);
                self.open.insert(*task);
                false
            }
            Event::Held { task, update } => {
                self.open.remove(task);
                self.held.insert(*task);
                match place.filter(|place| place.hash == update.hash && !place.stripped) {
                    Some(place) => self.payloads.insert(*task, place),
                    None => self.payloads.remove(task),
                };
                false
            }
            Event::Lost { task } => {
                self.held.remove(task);
                self.payloads.remove(task);
                self.open.insert(*task);
                true
            }
            Event::Withdrawn { task, .. } => {
                self.open.remove(task);
                self.held.remove(task);
                true
            }
            Event::Voided => self.forget_tasks(),
            Event::Surveyed { frozen, model } => {
                (self.schema, self.layout) = (Some(frozen.schema), Some(frozen.layout));
                self.hashes = vec![*model];
                self.forget_tasks()
            }
            Event::Committed { entries, figures } => {
                self.hashes.truncate(figures.round as usize);
                self.hashes.push(figures.model);
                self.is_anew = entries.is_empty();
                self.forget_tasks()
            }
            // Until the last of them, a round that is still to be made again needs what was asked for again. What is held
            // for the round that is open stays.
            Event::Redone { round } if *round as usize + 1 == self.hashes.len() => {
                self.held.retain(|task| self.given.contains(task));
                self.open.retain(|task| self.given.contains(task));
                true
            }
            // What is made again of the same updates is the same: a file that is whole by then, of whomever, stands.
            Event::Reverted { round } if self.is_anew => {
                self.models.split_off(&(round + 1));
                false
            }
            _ => false,
        }
    }

    /// Everything so far is in a model, or void.
    fn forget_tasks(&mut self) -> bool {
        self.held.clear();
        self.open.clear();
        self.given.clear();
        true
    }

    /// The round whose model stands with this event, and the model.
    fn model_of(&self, event: &Event) -> Option<(u32, Hash)> {
        match event {
            Event::Surveyed { model, .. } => Some((0, *model)),
            Event::Committed { figures, .. } => Some((figures.round, figures.model)),
            Event::Redone { round } => Some((*round, *self.hashes.get(*round as usize)?)),
            _ => None,
        }
    }

    /// The round of the oldest model that is kept as a file.
    fn oldest_kept(&self) -> u32 {
        self.models.keys().rev().nth(MODELS_KEPT - 1).copied().unwrap_or(0)
    }

    /// A part was stripped.
    fn forget_part(&mut self, part: u64) {
        self.payloads.retain(|_, place| place.part != part);
        self.models.retain(|_, model| model.place.is_none_or(|place| place.part != part));
    }
}

// --- names ---

fn schema_file(hash: Hash) -> String {
    format!("schema-{hash}")
}

/// The file of a model.
pub(crate) fn model_file(round: u32, hash: Hash) -> String {
    format!("model-{round:010}-{hash}")
}

/// The round and the hash in the name of a model's file.
pub(crate) fn parse_model_file(name: &str) -> Option<(u32, Hash)> {
    let (round, hash) = name.strip_prefix("model-")?.split_once('-')?;
    Some((round.parse().ok()?, hash.parse().ok()?))
}

fn payload_file(task: TaskId, hash: Hash) -> String {
    format!("payload-{hash}-{task}")
}

struct PayloadName {
    task: TaskId,
    hash: Hash,
    is_part: bool,
}

impl PayloadName {
    fn parse(name: &str) -> Option<Self> {
        let (hash, rest) = name.strip_prefix("payload-")?.split_once('-')?;
        let hash = hash.parse().ok()?;
        let (task, part) = rest.split_once(".part-").map_or((rest, None), |(task, part)| (task, Some(part)));
        let (start, count) = task.split_once('.')?;
        let task = TaskId::new(start.parse().ok()?, count.parse().ok()?);
        Some(Self { task, hash, is_part: part.is_some() })
    }
}

/// What a file beside the journal is, and whether its bytes are those that its name says. `None` if it is none of
/// ours, half received, or was removed since it was listed.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn verify_file(disk: &dyn Disk, name: &str, layout: Hash) -> Option<(&'static str, Result<(), String>)> {
    if let Some((_, hash)) = parse_model_file(name) {
        let checked = read_model(disk, name).and_then(|state| state.checked(layout, hash));
        return match checked {
            Err(ModelError::Damaged(reason)) if reason == GONE => None,
            checked => Some(("model", checked.map(drop).map_err(|error| error.to_string()))),
        };
    }
    let payload = PayloadName::parse(name).filter(|payload| !payload.is_part).map(|payload| ("payload", payload.hash));
    let schema = || Some(("schema", name.strip_prefix("schema-")?.parse().ok()?));
    let (what, expected) = payload.or_else(schema)?;
    match disk.read(name, 0).and_then(hash_of) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some((what, Err(error.to_string()))),
        Ok(got) if got != expected => Some((what, Err(format!("its hash is {got}")))),
        Ok(_) => Some((what, Ok(()))),
    }
}

fn hash_of(reader: Box<dyn Read + Send>) -> io::Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    io::copy(&mut io::BufReader::with_capacity(1 << 20, reader), &mut hasher)?;
    Ok(hasher.finalize().into())
}

// --- models ---

/// What is wrong with a model's file that is not there.
const GONE: &str = "it is not there";

#[derive(Debug, thiserror::Error)]
enum ModelError {
    #[error(transparent)]
    Disk(StoreError),
    #[error("{0}")]
    Damaged(String),
}

impl ModelError {
    fn damaged(reason: &str) -> Self {
        Self::Damaged(reason.to_owned())
    }
}

impl From<StoreError> for ModelError {
    fn from(error: StoreError) -> Self {
        Self::Disk(error)
    }
}

impl ModelState {
    /// As it stands beside a record: the model's length, the model, the server state.
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + self.model.len() + self.server.len());
        bytes.extend((self.model.len() as u64).to_le_bytes());
        bytes.extend(&*self.model);
        bytes.extend(&self.server);
        bytes
    }

    /// Itself, if it is the model that it should be.
    fn checked(self, layout: Hash, expected: Hash) -> Result<Self, ModelError> {
        let mut hasher = model_hasher(&layout);
        hasher.update(&self.model);
        let got = Hash::from(hasher.finalize());
        let other = || ModelError::Damaged(format!("the model in it is {got}, expected {expected}"));
        if got == expected { Ok(self) } else { Err(other()) }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (model, server) = rest.split_at_checked(length)?;
        Some(Self { model: model.into(), server: server.to_vec() })
    }
}

/// Magic, version, both lengths, both contents, BLAKE3 of all that but the model: that has its hash in the file's name, and
/// in the record that makes it one.
fn put_model(disk: &mut dyn Disk, name: &str, state: &ModelState) -> Result<(), StoreError> {
    let mut head = Vec::with_capacity(MODEL_HEAD_BYTES);
    head.extend(MODEL_MAGIC);
    head.extend(MODEL_VERSION.to_le_bytes());
    head.extend((state.model.len() as u64).to_le_bytes());
    head.extend((state.server.len() as u64).to_le_bytes());
    let hash = blake3::Hasher::new().update(&head).update(&state.server).finalize();
    let pieces = [&head[..], &state.model, &state.server, hash.as_bytes()];
    put_aside(disk, name, |file| pieces.into_iter().try_for_each(|piece| file.put(piece)))?;
    Ok(())
}

/// What the file of a model holds. Whether it is the model that it should be is for [`ModelState::checked`] to say.
fn read_model(disk: &dyn Disk, name: &str) -> Result<ModelState, ModelError> {
    let mut input = match disk.read(name, 0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ModelError::damaged(GONE)),
        input => input.map_err(StoreError::io(name, "open"))?,
    };
    let head = read_exactly(&mut input, name, MODEL_HEAD_BYTES as u64)?;
    let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    let version = u32::from_le_bytes(head[8..12].try_into().expect("4 bytes"));
    if !head.starts_with(MODEL_MAGIC) || !(1..=MODEL_VERSION).contains(&version) {
        return Err(ModelError::damaged("it is not a model of this version"));
    }
    let (model_bytes, server_bytes) = (number(12), number(20));
    if model_bytes > MODEL_BYTES_MAX || server_bytes > SERVER_BYTES_MAX {
        return Err(ModelError::Damaged(format!("it says that it has {model_bytes} and {server_bytes} bytes")));
    }
    let model = read_exactly(&mut input, name, model_bytes)?;
    let server = read_exactly(&mut input, name, server_bytes)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head);
    // The first version hashed the model a second time.
    if version == 1 {
        hasher.update(&model);
    }
    hasher.update(&server);
    if read_exactly(&mut input, name, 32)? != hasher.finalize().as_bytes() {
        return Err(ModelError::damaged("its hash does not fit its content"));
    }
    Ok(ModelState { model: model.into(), server })
}

/// Grows as bytes come: a damaged length must not allocate what is not there.
fn read_exactly(input: &mut dyn Read, name: &str, bytes: u64) -> Result<Vec<u8>, ModelError> {
    let mut read = Vec::new();
    input.take(bytes).read_to_end(&mut read).map_err(StoreError::io(name, "read"))?;
    if read.len() as u64 == bytes { Ok(read) } else { Err(ModelError::damaged("it ends early")) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::disk::RealDisk;
    use super::super::testing::{self, SCHEMA, TestDisk, assigned, committed, held, model, started, surveyed};
    use super::*;

    const RUN: RunId = RunId([7; 16]);
    const PLAN: Hash = Hash([8; 32]);
    const SMALL: Limits = Limits { part_bytes: 2000, attached_bytes: 600, room_bytes: 32_000 };

    fn clock() -> u64 {
        1_700_000_000_000
    }

    fn open(disk: &TestDisk) -> Result<Loaded, StoreError> {
        RunStore::open_with(Box::new(disk.clone()), RUN, Some(PLAN), clock, SMALL)
    }

    fn task(round: u32) -> TaskId {
        TaskId::new(1, round)
    }

    fn payload(round: u32, bytes: usize) -> Vec<u8> {
        vec![u8::try_from(round).unwrap() ^ 0x55; bytes]
    }

    /// Does all that `run` does, over and over while the disk is full; what was synced, and what was appended.
    struct Script {
        store: RunStore,
        appended: Vec<Event>,
        synced: usize,
    }

    impl Script {
        fn new(disk: &TestDisk) -> Result<Self, StoreError> {
            let loaded = open(disk)?;
            let appended = loaded.events;
            Ok(Self { store: loaded.store, synced: appended.len(), appended })
        }

        fn append(&mut self, event: Event, attachment: Attachment<'_>) -> Result<(), StoreError> {
            self.appended.push(event.clone());
            self.store.append(&event, attachment)
        }

        fn sync(&mut self) -> Result<(), StoreError> {
            self.store.sync()?;
            self.synced = self.appended.len();
            self.store.clean()
        }

        fn begin(&mut self, bytes: usize) -> Result<(), StoreError> {
            self.append(started(1), Attachment::None)?;
            let state = model(0, bytes);
            self.append(surveyed(&state), Attachment::First { schema: SCHEMA, state: &state })?;
            self.sync()
        }

        fn round(&mut self, disk: &mut TestDisk, round: u32, bytes: usize) -> Result<(), StoreError> {
            self.append(assigned(task(round), round), Attachment::None)?;
            let payload = payload(round, bytes);
            if bytes > SMALL.attached_bytes {
                let part = format!("payload-{}-{}.part-1", Hash::of(&payload), task(round));
                disk.append(&part, &payload).map_err(StoreError::io(&part, "write"))?;
                self.store.keep(task(round), Hash::of(&payload), &part)?;
                self.append(held(task(round), &payload), Attachment::None)?;
            } else {
                self.append(held(task(round), &payload), Attachment::Payload(&payload))?;
            }
            self.store.flush()?;
            let state = model(round, bytes);
            if round.is_multiple_of(2) {
                self.store.prepare(&state)?;
                self.store.name_prepared(testing::hash_of(&state));
            }
            self.append(committed(round, task(round), &payload, &state), Attachment::Model(&state))?;
            self.sync()
        }

        fn rounds(&mut self, disk: &mut TestDisk, rounds: u32, bytes: usize) -> Result<(), StoreError> {
            self.begin(bytes)?;
            (1..=rounds).try_for_each(|round| self.round(disk, round, bytes))
        }
    }

    /// A run of so many rounds, closed in order.
    fn run_of(rounds: u32, bytes: usize) -> (TestDisk, Vec<Event>) {
        let (mut disk, events) = run_with_room(rounds, bytes);
        for file in names(&disk, JOURNAL) {
            let whole = disk.content(&file);
            disk.put(&file, &whole[..whole.len() - room_of(&whole)]);
        }
        (disk, events)
    }

    /// The same, with the room that is left behind the last record of each part.
    fn run_with_room(rounds: u32, bytes: usize) -> (TestDisk, Vec<Event>) {
        let mut disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.rounds(&mut disk, rounds, bytes).unwrap();
        (disk, script.appended)
    }

    fn room_of(file: &[u8]) -> usize {
        file.iter().rev().take_while(|byte| **byte == 0).count()
    }

    fn names(disk: &TestDisk, prefix: &str) -> Vec<String> {
        disk.list().unwrap().into_iter().map(|(name, _)| name).filter(|name| name.starts_with(prefix)).collect()
    }

    fn content(reader: Option<Box<dyn Read + Send>>) -> Option<Vec<u8>> {
        reader.map(|mut reader| {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            bytes
        })
    }

    #[test]
    fn what_was_appended_is_there_after_a_restart_with_its_model() {
        for bytes in [100, 1000] {
            let (disk, events) = run_of(7, bytes);
            let loaded = open(&disk).unwrap();
            assert_eq!(loaded.events, events);
            assert_eq!(loaded.state, Some(model(7, bytes)));
            assert_eq!((&*loaded.schema, loaded.whole), (SCHEMA, None));
            assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
            assert_eq!(names(&disk, "model-").len(), if bytes == 1000 { MODELS_KEPT } else { 0 });
            assert_eq!(names(&disk, "payload-").len(), 0, "what is committed is not kept");
            let on_disk: u64 = disk.list().unwrap().iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(loaded.store.bytes_on_disk(), on_disk);
        }
    }

    #[test]
    fn a_real_directory_holds_a_run_too() {
        let home = tempfile::tempdir().unwrap();
        let disk = || Box::new(RealDisk::new(home.path()).unwrap());
        let loaded = RunStore::open(disk(), RUN, PLAN, clock).unwrap();
        assert!(loaded.events.is_empty() && loaded.state.is_none() && loaded.schema.is_empty());
        let mut store = loaded.store;
        let small = model(0, 100);
        store.append(&started(1), Attachment::None).unwrap();
        store.append(&surveyed(&small), Attachment::First { schema: SCHEMA, state: &small }).unwrap();
        assert!(store.sync().unwrap() > 0);
        assert_eq!(store.sync().unwrap(), 0, "nothing is synced twice");
        let large = model(1, ATTACHMENT_BYTES_MAX);
        store.append(&assigned(task(1), 1), Attachment::None).unwrap();
        store.append(&held(task(1), b"payload"), Attachment::Payload(b"payload")).unwrap();
        let waiting = store.payload(task(1), Hash::of(b"payload")).unwrap();
        assert_eq!(content(waiting).unwrap(), b"payload", "before it is written too");
        store.append(&committed(1, task(1), b"payload", &large), Attachment::Model(&large)).unwrap();
        store.sync().unwrap();
        drop(store);
        let loaded = RunStore::open(disk(), RUN, PLAN, clock).unwrap();
        assert_eq!((loaded.events.len(), loaded.state), (5, Some(large)));
        let again = loaded.store.payload(task(1), Hash::of(b"payload")).unwrap();
        assert_eq!(content(again).unwrap(), b"payload", "of an earlier process");
        assert!(loaded.store.payload(task(1), Hash::of(b"other")).unwrap().is_none());
    }

    #[test]
    fn a_directory_that_is_removed_under_a_live_process_is_said() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("run");
        std::fs::create_dir(&path).unwrap();
        let disk = Box::new(RealDisk::new(&path).unwrap());
        let mut store = RunStore::open(disk, RUN, PLAN, clock).unwrap().store;
        std::fs::remove_dir_all(&path).unwrap();
        store.append(&started(1), Attachment::None).unwrap();
        let told = store.sync().unwrap_err().to_string();
        assert!(told.contains("the state directory was removed under the running coordinator"), "{told}");
        assert!(matches!(store.append(&started(2), Attachment::None), Err(StoreError::Failed { .. })));
    }

    #[test]
    fn large_payloads_are_files_that_outlive_the_process_and_halves_of_open_tasks_stay() {
        let mut disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.begin(100).unwrap();
        let (open_task, over) = (task(2), task(3));
        let payload = payload(1, 5000);
        let hash = Hash::of(&payload);
        let part = format!("payload-{hash}-{}.part-7", task(1));
        disk.append(&part, &payload).unwrap();
        script.append(assigned(task(1), 1), Attachment::None).unwrap();
        script.append(assigned(open_task, 1), Attachment::None).unwrap();
        script.store.keep(task(1), hash, &part).unwrap();
        script.append(held(task(1), &payload), Attachment::None).unwrap();
        let half = format!("payload-{hash}-{open_task}.part-1");
        disk.append(&half, b"half").unwrap();
        disk.append(&format!("payload-{hash}-{over}.part-1"), b"half").unwrap();
        assert_eq!(script.store.parts().unwrap().len(), 2);
        script.sync().unwrap();
        disk.crash(0);
        disk.append(&half, b"half").unwrap();
        let loaded = open(&disk).unwrap();
        assert_eq!(content(loaded.store.payload(task(1), hash).unwrap()), Some(payload.clone()));
        assert_eq!(loaded.store.parts().unwrap(), [(half, 4)], "of a task that nobody has, nothing stays");
        let mut store = loaded.store;
        let state = model(1, 100);
        store.append(&committed(1, task(1), &payload, &state), Attachment::Model(&state)).unwrap();
        assert!(store.payload(task(1), hash).unwrap().is_some(), "until the commit is durable");
        store.sync().unwrap();
        store.clean().unwrap();
        assert!(store.payload(task(1), hash).unwrap().is_none());
        assert!(store.parts().unwrap().is_empty());
    }

    #[test]
    fn a_payload_that_is_torn_beside_its_whole_record_is_told_as_lost() {
        let mut disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.begin(100).unwrap();
        let payload = payload(1, 500);
        let lost = (task(1), Hash::of(&payload));
        script.append(assigned(task(1), 1), Attachment::None).unwrap();
        script.append(held(task(1), &payload), Attachment::Payload(&payload)).unwrap();
        script.store.flush().unwrap();
        disk.crash(2);
        let journal = names(&disk, JOURNAL).pop().unwrap();
        let at = disk.content(&journal).windows(500).position(|bytes| bytes == payload).unwrap();
        assert!(open(&disk.copy()).unwrap().lost.is_empty(), "what is whole is not");
        let mut later = disk.copy();
        disk.flip(&journal, at + 250, 1);
        let loaded = open(&disk).unwrap();
        assert_eq!((&loaded.events, loaded.lost), (&script.appended, vec![lost]));

        let mut store = open(&later).unwrap().store;
        store.append(&started(2), Attachment::None).unwrap();
        store.sync().unwrap();
        later.flip(&journal, at + 250, 1);
        assert!(
            open(&later).unwrap().lost.is_empty(),
            "what a later record knows to be durable is looked at when it is folded"
        );
    }

    #[test]
    fn what_a_model_is_made_of_is_durable_before_the_facts_that_rest_on_it() {
        let mut disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.begin(1000).unwrap();
        let payload = payload(1, 5000);
        let hash = Hash::of(&payload);
        let part = format!("payload-{hash}-{}.part-1", task(1));
        script.append(assigned(task(1), 1), Attachment::None).unwrap();
        disk.append(&part, &payload).unwrap();
        script.store.keep(task(1), hash, &part).unwrap();
        script.append(held(task(1), &payload), Attachment::None).unwrap();
        script.append(Event::Closed { round: 1 }, Attachment::None).unwrap();
        let state = model(1, 1000);
        script.append(committed(1, task(1), &payload, &state), Attachment::Model(&state)).unwrap();
        disk.crash(0);
        let loaded = open(&disk).unwrap();
        assert_eq!(loaded.events.last(), Some(&Event::Closed { round: 1 }), "the commit was not synced");
        assert_eq!(content(loaded.store.payload(task(1), hash).unwrap()), Some(payload));
    }

    #[test]
    fn what_is_held_for_the_open_round_outlives_the_making_again_of_an_earlier_one() {
        let mut disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.begin(1000).unwrap();
        script.round(&mut disk, 1, 1000).unwrap();
        let payload = payload(2, 5000);
        let (hash, coming) = (Hash::of(&payload), TaskId::new(1, 9));
        let part = |task: TaskId| format!("payload-{hash}-{task}.part-1");
        script.append(assigned(task(2), 2), Attachment::None).unwrap();
        script.append(assigned(coming, 2), Attachment::None).unwrap();
        disk.append(&part(task(2)), &payload).unwrap();
        script.store.keep(task(2), hash, &part(task(2))).unwrap();
        script.append(held(task(2), &payload), Attachment::None).unwrap();
        script.append(Event::Reverted { round: 0 }, Attachment::None).unwrap();
        disk.append(&part(coming), b"half").unwrap();
        let state = model(1, 1000);
        script.append(Event::Redone { round: 1 }, Attachment::Model(&state)).unwrap();
        script.sync().unwrap();
        assert_eq!(content(script.store.payload(task(2), hash).unwrap()), Some(payload));
        assert_eq!(script.store.parts().unwrap(), [(part(coming), 4)]);
    }

    #[test]
    fn what_an_earlier_process_kept_is_durable_after_the_next_sync() {
        let mut disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.begin(100).unwrap();
        let payload = payload(1, 5000);
        let hash = Hash::of(&payload);
        let part = format!("payload-{hash}-{}.part-1", task(1));
        script.append(assigned(task(1), 1), Attachment::None).unwrap();
        disk.append(&part, &payload).unwrap();
        script.store.keep(task(1), hash, &part).unwrap();
        script.append(held(task(1), &payload), Attachment::None).unwrap();
        script.store.flush().unwrap();
        drop(script);
        // The process was killed; what it wrote is in the page cache.
        open(&disk).unwrap().store.sync().unwrap();
        disk.crash(0);
        assert_eq!(content(open(&disk).unwrap().store.payload(task(1), hash).unwrap()), Some(payload));
    }

    #[test]
    fn old_parts_are_stripped_and_the_facts_stay() {
        let (disk, events) = run_of(30, 500);
        let parts = names(&disk, JOURNAL);
        assert!(parts.len() > 5, "{parts:?}");
        let length = |name: &String| disk.list().unwrap().iter().find(|(n, _)| n == name).unwrap().1;
        assert!(length(&parts[1]) < length(&parts[parts.len() - 2]) - 1000);
        let loaded = open(&disk).unwrap();
        assert_eq!(loaded.events, events);
        assert_eq!((loaded.state, loaded.whole), (Some(model(30, 500)), None));
    }

    #[test]
    fn a_first_model_that_is_torn_by_a_power_cut_was_never_named() {
        let disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.append(started(1), Attachment::None).unwrap();
        script.sync().unwrap();
        let end = || disk.content("journal-000001").len() - room_of(&disk.content("journal-000001"));
        let synced = end();
        let first = model(0, 300);
        script.append(surveyed(&first), Attachment::First { schema: SCHEMA, state: &first }).unwrap();
        script.store.flush().unwrap();
        drop(script);
        let written = end();
        assert!(written > synced);
        // Whichever sector of what was not synced is lost, the run goes on, with the survey or before it.
        for at in synced..written {
            let mut torn = disk.content("journal-000001");
            torn[at] ^= 0xff;
            let mut beside = disk.copy();
            beside.put("journal-000001", &torn);
            let loaded = open(&beside).unwrap_or_else(|error| panic!("torn at {at}: {error}"));
            assert_eq!((loaded.state.is_some(), loaded.whole), (loaded.events.len() == 2, None), "torn at {at}");
        }
    }

    #[test]
    fn a_model_that_is_too_old_to_go_on_with_is_none() {
        // A part for each commit: besides the first model's file only two models stay.
        let limits = Limits { part_bytes: 100, ..SMALL };
        let open = |disk: &TestDisk| RunStore::open_with(Box::new(disk.clone()), RUN, Some(PLAN), clock, limits);
        for rounds in 1..6 {
            let mut disk = TestDisk::default();
            let mut script = Script { store: open(&disk).unwrap().store, appended: Vec::new(), synced: 0 };
            script.rounds(&mut disk, rounds, 500).unwrap();
            for name in names(&disk, JOURNAL) {
                let bytes = disk.content(&name);
                let is_model = |at: &usize| bytes[*at] != 0 && bytes[*at..at + 100].windows(2).all(|w| w[0] == w[1]);
                (0..bytes.len().saturating_sub(100)).filter(is_model).for_each(|at| disk.flip(&name, at + 50, 1));
            }
            match open(&disk) {
                Ok(loaded) => {
                    assert_eq!((loaded.whole, loaded.state), (Some(0), Some(model(0, 500))), "{rounds} rounds")
                }
                Err(error) => assert!(matches!(error, StoreError::NoModel) && rounds > 2, "{rounds} rounds: {error}"),
            }
            assert_eq!(open(&disk).is_ok(), rounds <= 2, "{rounds} rounds");
        }
    }

    /// Stops after the `k`th disk operation, for all `k`, and looks at what a power cut then leaves.
    fn every_crash(rounds: u32, bytes: usize) {
        let whole = run_of(rounds, bytes).1;
        for keep in 0..3 {
            for k in 0.. {
                let mut disk = TestDisk::default();
                disk.stop_after(k);
                let script = Script::new(&disk).map(|mut script| {
                    let result = script.rounds(&mut disk, rounds, bytes);
                    (script.synced, result.is_ok())
                });
                let (synced, done) = script.unwrap_or((0, false));
                disk.crash(keep);
                let loaded = open(&disk).unwrap_or_else(|error| panic!("stopped after {k}, kept {keep}: {error}"));
                let there = loaded.events.len();
                assert!(there >= synced, "stopped after {k}, kept {keep}: {there} of {synced} synced facts");
                assert_eq!(loaded.events, whole[..there]);
                assert_eq!(loaded.whole, None, "stopped after {k}, kept {keep}");
                let round = whole[..there].iter().filter(|event| event.makes_model()).count();
                let expected = round.checked_sub(1).map(|round| model(u32::try_from(round).unwrap(), bytes));
                assert_eq!(loaded.state, expected, "stopped after {k}, kept {keep}");
                go_on(loaded, &mut disk, bytes);
                if done {
                    break;
                }
            }
        }
    }

    /// What opens after a crash takes another round.
    fn go_on(loaded: Loaded, disk: &mut TestDisk, bytes: usize) {
        let commits = loaded.events.iter().filter(|event| event.makes_model()).count();
        let appended = loaded.events;
        let mut script = Script { store: loaded.store, synced: 0, appended };
        if commits == 0 {
            script.begin(bytes).unwrap();
        }
        let round = u32::try_from(commits.max(1)).unwrap();
        script.round(disk, round, bytes).unwrap();
        let again = open(disk).unwrap();
        assert_eq!((again.events, again.state), (script.appended, Some(model(round, bytes))));
    }

    #[test]
    fn a_power_cut_after_any_operation_loses_nothing_that_was_synced_with_models_in_the_journal() {
        every_crash(12, 500);
    }

    #[test]
    fn a_power_cut_after_any_operation_loses_nothing_that_was_synced_with_models_in_files() {
        every_crash(8, 1000);
    }

    #[test]
    fn a_full_disk_loses_nothing_and_the_same_call_succeeds_later() {
        for bytes in [500, 1000] {
            let expected = run_of(8, bytes).1;
            for room in (0..12_000).step_by(97) {
                let mut disk = TestDisk::default();
                let mut script = Script::new(&disk).unwrap();
                disk.room(room);
                let again = |done: Result<(), StoreError>, disk: &mut TestDisk| match done {
                    Err(StoreError::Full { .. }) => {
                        disk.room(u64::MAX);
                        false
                    }
                    done => {
                        done.unwrap();
                        true
                    }
                };
                // The script appends to its list once a call; so a call that is made again must not be doubled.
                let state = model(0, bytes);
                let first = Attachment::First { schema: SCHEMA, state: &state };
                while !again(script.store.append(&started(1), Attachment::None), &mut disk) {}
                while !again(script.store.append(&surveyed(&state), first), &mut disk) {}
                while !again(script.store.sync().map(drop), &mut disk) {}
                for round in 1..=8 {
                    let payload = payload(round, 500);
                    let hold = Attachment::Payload(&payload);
                    while !again(script.store.append(&assigned(task(round), round), Attachment::None), &mut disk) {}
                    while !again(script.store.append(&held(task(round), &payload), hold), &mut disk) {}
                    while !again(script.store.flush(), &mut disk) {}
                    let state = model(round, bytes);
                    let commit = committed(round, task(round), &payload, &state);
                    while !again(script.store.append(&commit, Attachment::Model(&state)), &mut disk) {}
                    while !again(script.store.sync().map(drop), &mut disk) {}
                }
                disk.crash(0);
                let loaded = open(&disk).unwrap();
                assert_eq!(loaded.events.len(), expected.len(), "room for {room}");
                assert_eq!((loaded.state, loaded.warnings.len()), (Some(model(8, bytes)), 0));
            }
        }
    }

    /// The whole script again and again, on a disk of which one operation fails once: a full disk is tried again, and
    /// for everything else the process ends and another one goes on. In the end all is there, once.
    fn every_failure(bytes: usize, kind: io::ErrorKind, power_cut: bool) {
        let rounds = 8;
        let expected = run_of(rounds, bytes).1;
        for k in 0.. {
            let mut disk = TestDisk::default();
            disk.fail_once(k, kind);
            let mut script: Option<RunStore> = None;
            let (mut done, mut restarts) = (0, 0);
            while done < expected.len() {
                let Some(store) = &mut script else {
                    let had_failed = disk.has_failed();
                    let loaded = match open(&disk) {
                        Ok(loaded) => loaded,
                        Err(error) => {
                            assert!(!had_failed, "failed at {k}, and never opens again: {error}");
                            continue;
                        }
                    };
                    assert!(loaded.warnings.is_empty() || power_cut, "{k}: {:?}", loaded.warnings);
                    done = loaded.events.len();
                    script = Some(loaded.store);
                    continue;
                };
                match step(store, &mut disk, &expected[done], bytes) {
                    Ok(()) => done += 1,
                    Err(error) if error.is_full() => {}
                    Err(error) => {
                        assert!(restarts < 2, "failed at {k}, and again: {error}");
                        restarts += 1;
                        script = None;
                        disk.crash(if power_cut { 0 } else { 2 });
                    }
                }
            }
            while let Some(Err(error)) = script.as_mut().map(RunStore::sync) {
                script = if error.is_full() { script } else { Some(open(&disk).unwrap().store) };
            }
            let has_failed = disk.has_failed();
            disk.crash(0);
            let loaded = open(&disk).unwrap();
            assert_eq!(loaded.events.len(), expected.len(), "failed at {k}");
            assert_eq!((loaded.events == expected, loaded.state), (true, Some(model(rounds, bytes))), "failed at {k}");
            if !has_failed {
                return;
            }
        }
    }

    /// One fact of the script, with all that belongs to it.
    fn step(store: &mut RunStore, disk: &mut TestDisk, event: &Event, bytes: usize) -> Result<(), StoreError> {
        match event {
            Event::Surveyed { .. } => {
                let state = model(0, bytes);
                store.append(event, Attachment::First { schema: SCHEMA, state: &state })?;
            }
            Event::Held { task, .. } if bytes > SMALL.attached_bytes => {
                let content = payload(u32::try_from(task.0 & 0xff).unwrap(), bytes);
                let part = format!("payload-{}-{task}.part-1", Hash::of(&content));
                if store.payload(*task, Hash::of(&content))?.is_none() {
                    // What another attempt left half.
                    let _ = disk.remove(&part);
                    disk.append(&part, &content).map_err(StoreError::io(&part, "write"))?;
                    store.keep(*task, Hash::of(&content), &part)?;
                }
                store.append(event, Attachment::None)?;
            }
            Event::Held { task, .. } => {
                let content = payload(u32::try_from(task.0 & 0xff).unwrap(), bytes);
                store.append(event, Attachment::Payload(&content))?;
            }
            Event::Committed { figures, .. } => {
                let state = model(figures.round, bytes);
                store.append(event, Attachment::Model(&state))?;
            }
            other => store.append(other, Attachment::None)?,
        }
        if event.is_commit() {
            loop {
                match store.sync() {
                    Err(error) if error.is_full() => {}
                    synced => break synced.map(drop),
                }
            }
        } else {
            loop {
                match store.flush() {
                    Err(error) if error.is_full() => {}
                    flushed => break flushed,
                }
            }
        }
    }

    #[test]
    fn any_operation_may_fail_once_and_all_is_there_in_the_end() {
        for bytes in [500, 1000] {
            for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
                every_failure(bytes, kind, false);
                every_failure(bytes, kind, true);
            }
        }
    }

    #[test]
    fn a_directory_that_may_not_be_written_is_refused_with_the_remedy() {
        let (disk, _) = run_of(1, 100);
        disk.fail_with("append", io::ErrorKind::ReadOnlyFilesystem);
        let told = open(&disk).unwrap_err().to_string();
        assert!(told.ends_with("not writable; make the state directory yours, or give another with --state"), "{told}");
    }

    #[test]
    fn a_disk_that_fails_ends_the_store() {
        for (what, verb) in [("append", "write"), ("sync", "sync"), ("rename", "rename")] {
            let mut disk = TestDisk::default();
            let mut script = Script::new(&disk).unwrap();
            script.begin(1000).unwrap();
            disk.fail(what);
            let error = script.round(&mut disk, 1, 1000).unwrap_err();
            assert!(error.to_string().contains(verb) && !error.is_full(), "{error}");
            disk.crash(2);
            assert_eq!(open(&disk).unwrap().state, Some(model(0, 1000)));
        }
        let disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        disk.fail("sync");
        script.append(started(1), Attachment::None).unwrap();
        assert!(matches!(script.sync(), Err(StoreError::Unsynced { .. })));
        disk.fail("");
        assert!(matches!(script.sync(), Err(StoreError::Failed { .. })), "a failed sync is not tried again");
    }

    #[test]
    fn a_flipped_bit_is_refused_or_cut_or_told_and_never_misread() {
        let (disk, events) = run_of(14, 500);
        let files: Vec<(String, u64)> = disk.list().unwrap();
        let total: u64 = files.iter().map(|(_, bytes)| bytes).sum();
        assert!(names(&disk, JOURNAL).len() > 3);
        let (mut refused, mut cut, mut damaged) = (0, 0, 0);
        for n in 0..1000u64 {
            let mut at = n * total / 1000;
            let (name, _) = files
                .iter()
                .find(|(_, bytes)| {
                    if at < *bytes {
                        true
                    } else {
                        at -= bytes;
                        false
                    }
                })
                .unwrap();
            let mut copy = disk.copy();
            copy.flip(name, usize::try_from(at).unwrap(), 1 << (n % 8));
            let loaded = match open(&copy) {
                Err(error) => {
                    assert!(error.to_string().starts_with(name.as_str()), "{name} at {at}: {error}");
                    refused += 1;
                    continue;
                }
                Ok(loaded) => loaded,
            };
            let there = loaded.events.len();
            assert_eq!(loaded.events, events[..there], "{name} at {at}");
            cut += usize::from(there < events.len());
            let round = events[..there].iter().filter(|event| event.makes_model()).count() - 1;
            let round = u32::try_from(round).unwrap();
            damaged += usize::from(loaded.whole.is_some());
            assert_eq!(loaded.state, Some(model(loaded.whole.unwrap_or(round), 500)), "{name} at {at}");
            for n in 1..=14 {
                let held = payload(n, 500);
                let read = content(loaded.store.payload(task(n), Hash::of(&held)).unwrap());
                let is_told = read.as_ref().is_some_and(|read| Hash::of(read) != Hash::of(&held));
                assert!(is_told || read.is_none_or(|read| read == held));
            }
        }
        assert!(refused > 100 && cut > 0 && damaged > 0, "{refused} refused, {cut} cut, {damaged} models told");
    }

    #[test]
    fn what_tears_at_the_end_is_cut_and_what_breaks_in_the_middle_is_refused_by_file_and_offset() {
        let (disk, events) = run_of(2, 100);
        let file = "journal-000001";
        let whole = disk.content(file);
        let mut torn = disk.copy();
        torn.put(file, &whole[..whole.len() - 5]);
        let loaded = open(&torn).unwrap();
        assert_eq!(loaded.events, events[..events.len() - 1]);
        assert!(loaded.warnings[0].to_string().starts_with("journal-000001: torn at offset"), "{:?}", loaded.warnings);
        assert!(open(&torn).unwrap().warnings.is_empty(), "it is cut once");
        let mut middle = disk.copy();
        middle.flip(file, 130, 1);
        let told = open(&middle).unwrap_err().to_string();
        assert!(told.starts_with("journal-000001: damaged at offset 100: its hash does not fit"), "{told}");
        let mut chain = disk.copy();
        // The last byte of the first record: the next record is the only one that knows better.
        chain.flip(file, 100 + 26 + 2 + 31, 1);
        assert!(matches!(open(&chain), Err(StoreError::Damaged { offset: 100, .. })));
    }

    #[test]
    fn the_room_behind_the_last_record_is_no_damage_and_what_tears_in_it_is_cut() {
        let (mut disk, events) = run_with_room(14, 500);
        let parts = names(&disk, JOURNAL);
        let last = parts.last().unwrap();
        let whole = disk.content(last);
        let (room, file) = (room_of(&whole), disk.copy());
        assert!(room > 10_000 && parts.len() > 3 && room_of(&disk.content(&parts[parts.len() - 2])) > 10_000);
        let loaded = open(&disk).unwrap();
        assert_eq!((&loaded.events, loaded.warnings.len()), (&events, 0));
        assert_eq!(disk.content(last), whole[..whole.len() - room], "the next process begins without");

        let mut torn = whole.clone();
        torn[whole.len() - room + 700..][..100].fill(7);
        disk = file;
        disk.put(last, &torn);
        let loaded = open(&disk).unwrap();
        assert_eq!(loaded.events, events);
        assert!(loaded.warnings[0].to_string().contains("zeros stand in its place"), "{:?}", loaded.warnings);
        assert_eq!(disk.content(last), whole[..whole.len() - room]);
    }

    #[test]
    fn a_journal_of_somebody_else_is_refused_by_name() {
        let (disk, _) = run_of(1, 100);
        let refused =
            |run, plan| RunStore::open_with(Box::new(disk.copy()), run, Some(plan), clock, SMALL).unwrap_err();
        assert!(matches!(refused(RunId([1; 16]), PLAN), StoreError::AnotherRun { got: RUN, .. }));
        assert!(matches!(refused(RUN, Hash([1; 32])), StoreError::AnotherPlan { .. }));
        let mut newer = disk.copy();
        newer.flip("journal-000001", 8, 2);
        let told = open(&newer).unwrap_err().to_string();
        assert_eq!(told, "journal-000001: of version 3, this program reads version 1; update it");
    }

    #[test]
    fn a_part_that_is_gone_is_missed() {
        let (disk, _) = run_of(14, 500);
        let mut headless = disk.copy();
        headless.remove("journal-000001").unwrap();
        assert!(matches!(open(&headless), Err(StoreError::Missing { file }) if file == "journal-000001"));
        let (mut lost, _) = run_of(3, 1000);
        names(&lost, JOURNAL).iter().for_each(|name| lost.remove(name).unwrap());
        assert!(matches!(open(&lost), Err(StoreError::Missing { .. })));
    }

    #[test]
    fn a_damaged_model_gives_way_to_the_one_before_and_is_made_again() {
        let (mut disk, events) = run_of(5, 1000);
        let newest = names(&disk, "model-").pop().unwrap();
        for at in 0..50 {
            let mut disk = disk.copy();
            disk.flip(&newest, at * disk.content(&newest).len() / 50, 1);
            let loaded = open(&disk).unwrap();
            assert_eq!((loaded.state, loaded.whole), (Some(model(4, 1000)), Some(4)), "a bit flipped at {at}/50");
            assert!(loaded.warnings[0].to_string().starts_with("the model of round 5 is damaged"));
            assert_eq!(loaded.events, events);
        }
        disk.flip(&newest, 500, 1);
        let mut store = open(&disk).unwrap().store;
        store.append(&started(2), Attachment::None).unwrap();
        store.append(&Event::Reverted { round: 4 }, Attachment::None).unwrap();
        store.sync().unwrap();
        let loaded = open(&disk).unwrap();
        assert_eq!(
            (loaded.state, loaded.whole),
            (Some(model(4, 1000)), Some(4)),
            "it is damaged until the redo is done"
        );
        let (mut store, redone) = (loaded.store, model(5, 1000));
        store.append(&Event::Redone { round: 5 }, Attachment::Model(&redone)).unwrap();
        store.sync().unwrap();
        assert_eq!(open(&disk).unwrap().state, Some(redone));
        names(&disk, "model-").iter().for_each(|name| disk.flip(name, 500, 1));
        assert!(matches!(open(&disk), Err(StoreError::NoModel)));
    }

    #[test]
    fn a_model_of_the_first_version_is_read_and_its_own_hash_counts() {
        let (mut disk, _) = run_of(3, 1000);
        let newest = names(&disk, "model-").pop().unwrap();
        let mut file = disk.content(&newest).to_vec();
        file.truncate(file.len() - 32);
        file[8..12].copy_from_slice(&1_u32.to_le_bytes());
        let hash = *blake3::hash(&file).as_bytes();
        disk.remove(&newest).unwrap();
        disk.append(&newest, &[&file[..], &hash].concat()).unwrap();
        assert_eq!(open(&disk).unwrap().state, Some(model(3, 1000)));
        // A byte of the server's state, which no other hash covers.
        disk.flip(&newest, file.len() - 1, 1);
        assert_eq!(open(&disk).unwrap().state, Some(model(2, 1000)));
    }

    #[test]
    fn a_damaged_schema_is_refused() {
        let (mut disk, _) = run_of(1, 100);
        disk.flip(&schema_file(Hash::of(SCHEMA)), 3, 1);
        assert!(matches!(open(&disk), Err(StoreError::Damaged { file, .. }) if file.starts_with("schema-")));
    }

    #[test]
    fn a_model_of_rows_that_was_never_committed_gives_way_to_the_one_that_is() {
        let disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.begin(1000).unwrap();
        let of_rows = |state: &ModelState| match committed(1, task(1), b"", state) {
            Event::Committed { figures, .. } => Event::Committed { entries: Vec::new(), figures },
            other => other,
        };
        let (lost, kept) = (model(1, 1000), model(2, 1000));
        script.append(of_rows(&lost), Attachment::Model(&lost)).unwrap();
        // The record was never written; the model is durable.
        disk.crash(0);
        let mut store = open(&disk).unwrap().store;
        store.append(&of_rows(&kept), Attachment::Model(&kept)).unwrap();
        store.sync().unwrap();
        drop(store);
        assert_eq!(open(&disk).unwrap().state, Some(kept));
        assert_eq!(names(&disk, "model-0000000001").len(), 1);
    }

    #[test]
    fn a_round_made_again_may_not_give_another_model() {
        let disk = TestDisk::default();
        let mut script = Script::new(&disk).unwrap();
        script.begin(1000).unwrap();
        let (kept, redone) = (model(1, 1000), model(2, 1000));
        script.append(committed(1, task(1), b"x", &kept), Attachment::Model(&kept)).unwrap();
        // The record was never written; the model is durable.
        disk.crash(0);
        let mut store = open(&disk).unwrap().store;
        let conflict = store.append(&committed(1, task(1), b"x", &redone), Attachment::Model(&redone)).unwrap_err();
        assert!(matches!(conflict, StoreError::TwoModels { round: 1, .. }), "{conflict}");
        store.append(&committed(1, task(1), b"x", &kept), Attachment::Model(&kept)).unwrap();
    }
}
