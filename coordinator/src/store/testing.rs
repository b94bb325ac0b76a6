//! For tests: a directory in memory, which loses what was not synced, stops, fails and is full when told to; and facts.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::sync::{Arc, Mutex, MutexGuard};

use protocol::federation::{Entry, Event, Frozen, HeldUpdate, RoundFigures};
use protocol::ids::{Hash, TaskId, WorkerId, WorkerName};
use protocol::layout::model_hasher;
use protocol::messages::{Metrics, TaskKind};

use super::disk::Disk;
use super::run::ModelState;

const LAYOUT: Hash = Hash([9; 32]);

/// The schema of every run here.
pub(crate) const SCHEMA: &[u8] = b"the schema";

/// Clones are the same directory.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestDisk(Arc<Mutex<Files>>);

#[derive(Clone, Debug, Default)]
struct Files {
    /// By a number that is never used again.
    contents: BTreeMap<u64, Content>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    count: u64,
    /// So many more operations, then nothing works; or one does not.
    operations: Option<u64>,
    once: Option<io::ErrorKind>,
    room: Option<u64>,
    fails: (String, Option<io::ErrorKind>),
}

/// What a file has, where it ends for who appends to it, and what a crash leaves.
#[derive(Clone, Debug, Default)]
struct Content {
    live: Vec<u8>,
    end: usize,
    durable: Vec<u8>,
}

impl Content {
    fn of(bytes: Vec<u8>) -> Self {
        Self { end: bytes.len(), live: bytes.clone(), durable: bytes }
    }

    /// Half of what was not synced is there.
    fn torn(&self) -> Vec<u8> {
        let Self { live, end, durable } = self;
        let same = live.iter().zip(durable).take_while(|(live, durable)| live == durable).count();
        let half = same + end.saturating_sub(same) / 2;
        let behind = durable.get(half..).unwrap_or_default();
        [&live[..half], behind].concat()
    }
}

impl TestDisk {
    fn files(&self) -> MutexGuard<'_, Files> {
        self.0.lock().unwrap()
    }

    /// Nothing works after so many operations.
    pub(crate) fn stop_after(&self, operations: u64) {
        self.files().operations = Some(operations);
    }

    /// After so many operations one fails.
    pub(crate) fn fail_once(&self, operations: u64, kind: io::ErrorKind) {
        let mut files = self.files();
        (files.operations, files.once) = (Some(operations), Some(kind));
    }

    /// Whether every failure that was ordered has come.
    pub(crate) fn has_failed(&self) -> bool {
        self.files().once.is_none()
    }

    /// The disk has room for so many bytes more.
    pub(crate) fn room(&self, bytes: u64) {
        self.files().room = Some(bytes);
    }

    /// One kind of operation fails from now on.
    pub(crate) fn fail(&self, what: &str) {
        self.files().fails = (what.to_owned(), None);
    }

    /// One kind of operation is refused from now on.
    pub(crate) fn fail_with(&self, what: &str, kind: io::ErrorKind) {
        self.files().fails = (what.to_owned(), Some(kind));
    }

    /// The power goes and comes. What was not synced is lost (0), torn (1), or there (2).
    pub(crate) fn crash(&self, keep: u8) {
        let mut files = self.files();
        let before = std::mem::take(&mut *files);
        files.count = before.count;
        files.names = if keep == 2 { before.names } else { before.durable_names };
        for (number, content) in before.contents {
            let left = match keep {
                0 => content.durable,
                1 => content.torn(),
                _ => content.live,
            };
            files.contents.insert(number, Content::of(left));
        }
        files.durable_names = files.names.clone();
    }

    /// Another directory with the same files.
    pub(crate) fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.files().clone())))
    }

    pub(crate) fn content(&self, name: &str) -> Vec<u8> {
        let files = self.files();
        files.contents[&files.names[name]].live.clone()
    }

    pub(crate) fn put(&mut self, name: &str, bytes: &[u8]) {
        let mut files = self.files();
        let number = files.names[name];
        files.contents.insert(number, Content::of(bytes.to_vec()));
    }

    pub(crate) fn flip(&mut self, name: &str, at: usize, bits: u8) {
        let mut bytes = self.content(name);
        bytes[at] ^= bits;
        self.put(name, &bytes);
    }
}

impl Files {
    fn operation(&mut self, what: &str) -> io::Result<()> {
        let stopped = self.operations == Some(0);
        if stopped && let Some(kind) = self.once.take() {
            self.operations = None;
            return Err(kind.into());
        }
        self.operations = self.operations.map(|left| left.saturating_sub(1));
        match self.fails.1.filter(|_| self.fails.0 == what) {
            Some(kind) => Err(kind.into()),
            None if stopped || self.fails.0 == what => Err(io::Error::other("the disk is broken")),
            None => Ok(()),
        }
    }

    fn number(&self, name: &str) -> io::Result<u64> {
        self.names.get(name).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Disk for TestDisk {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let files = self.files();
        Ok(files.names.iter().map(|(name, number)| (name.clone(), files.contents[number].live.len() as u64)).collect())
    }

    fn read(&self, name: &str, from: u64) -> io::Result<Box<dyn Read + Send>> {
        let files = self.files();
        let content = files.contents[&files.number(name)?].live.clone();
        let from = usize::try_from(from).unwrap().min(content.len());
        Ok(Box::new(Cursor::new(content[from..].to_vec())))
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut files = self.files();
        let broken = files.operation("append");
        let number = match files.names.get(name) {
            Some(number) => *number,
            None => {
                files.count += 1;
                let number = files.count;
                files.names.insert(name.to_owned(), number);
                number
            }
        };
        let reserved = files.contents.get(&number).map_or(0, |content| content.live.len() - content.end);
        let free = files.room.map_or(usize::MAX, |room| usize::try_from(room).unwrap_or(usize::MAX));
        let fits = bytes.len().min(free.saturating_add(reserved));
        // What fails may have done half of it.
        let fits = if broken.is_err() { fits / 2 } else { fits };
        let content = files.contents.entry(number).or_default();
        let replaced = fits.min(reserved);
        content.live[content.end..][..replaced].copy_from_slice(&bytes[..replaced]);
        content.live.extend(&bytes[replaced..fits]);
        content.end += fits;
        files.room = files.room.map(|left| left - (fits - replaced) as u64);
        broken?;
        if fits < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn reserve(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        let mut files = self.files();
        files.operation("append")?;
        let number = files.number(name)?;
        let left = files.room;
        let content = files.contents.entry(number).or_default();
        let wanted = content.end + usize::try_from(bytes).unwrap();
        let more = wanted.saturating_sub(content.live.len());
        let fits = left.map_or(more, |left| more.min(usize::try_from(left).unwrap()));
        content.live.resize(content.live.len() + fits, 0);
        files.room = left.map(|left| left - fits as u64);
        if fits < more { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        let mut files = self.files();
        files.operation("truncate")?;
        let number = files.number(name)?;
        let content = files.contents.entry(number).or_default();
        content.live.truncate(usize::try_from(length).unwrap());
        content.end = content.live.len();
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let mut files = self.files();
        files.operation("sync")?;
        let number = files.number(name)?;
        let content = files.contents.entry(number).or_default();
        content.durable = content.live.clone();
        files.durable_names.retain(|_, there| *there != number);
        files.durable_names.insert(name.to_owned(), number);
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files();
        files.operation("rename")?;
        let number = files.number(from)?;
        files.names.remove(from);
        files.names.insert(to.to_owned(), number);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut files = self.files();
        files.number(name)?;
        files.operation("remove")?;
        files.names.remove(name);
        Ok(())
    }
}

// --- facts ---

pub(crate) fn model(round: u32, bytes: usize) -> ModelState {
    ModelState { model: vec![u8::try_from(round % 251).unwrap(); bytes].into(), server: vec![3; 8] }
}

pub(crate) fn hash_of(state: &ModelState) -> Hash {
    let mut hasher = model_hasher(&LAYOUT);
    hasher.update(&state.model);
    hasher.finalize().into()
}

pub(crate) fn started(start: u32) -> Event {
    Event::Started { start }
}

pub(crate) fn surveyed(state: &ModelState) -> Event {
    let schema = Hash::of(SCHEMA);
    let frozen = Frozen { schema, schema_bytes: 10, layout: LAYOUT, parameters: 4, weight_shift: 0 };
    Event::Surveyed { frozen, model: hash_of(state) }
}

pub(crate) fn assigned(task: TaskId, round: u32) -> Event {
    let name: WorkerName = "shard".parse().unwrap();
    Event::Assigned { task, round, kind: TaskKind::Update, worker: WorkerId([1; 16]), name, base: Hash([0; 32]) }
}

pub(crate) fn held(task: TaskId, payload: &[u8]) -> Event {
    let (hash, bytes) = (Hash::of(payload), payload.len() as u64);
    let update = HeldUpdate { hash, bytes, examples: 9, weight: 9, norm: 1.0, metrics: Metrics::default() };
    Event::Held { task, update: Box::new(update) }
}

pub(crate) fn committed(round: u32, task: TaskId, payload: &[u8], state: &ModelState) -> Event {
    let entries = vec![Entry { task, worker: WorkerId([1; 16]), hash: Hash::of(payload) }];
    let figures = RoundFigures {
        round,
        workers: 1,
        examples: 9,
        train_loss: None,
        evaluation: Default::default(),
        seconds: 0.5,
        model: hash_of(state),
    };
    Event::Committed { entries, figures: Box::new(figures) }
}
