//! A disk that keeps apart what was synced and what was not, and forgets the rest as badly as it may.
//!
//! [`Volume`] is the platter: it outlives processes. [`TornDisk`] is what one process has of it. A killed process loses
//! its handle and nothing else; a power cut takes what was not synced: all of it, its end, single sectors, an earlier
//! write but not a later one, a name but not its content, the content but not the name. Beside that a volume can be full,
//! fail an operation, crash the process within any single operation, and lose a bit of what lies still.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use coordinator::store::disk::Disk;
use protocol::draw::Draw;

/// What a disk tears: a power cut leaves a sector whole or not at all.
const SECTOR: usize = 512;

/// An operation that changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// `append`.
    Append,
    /// `truncate`.
    Truncate,
    /// `sync`.
    Sync,
    /// `rename`.
    Rename,
    /// `remove`.
    Remove,
}

/// One bit that was turned over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flip {
    /// In which file.
    pub name: String,
    /// At which byte.
    pub at: usize,
    /// Which bit.
    pub bit: u8,
}

/// The platter.
#[derive(Clone, Debug)]
pub struct Volume(Arc<Mutex<State>>);

/// What one process has of a [`Volume`].
#[derive(Debug)]
pub struct TornDisk {
    volume: Volume,
    life: u64,
}

#[derive(Debug)]
struct State {
    draw: Draw,
    /// Handles of earlier lives are dead.
    life: u64,
    nodes: BTreeMap<u64, Node>,
    next_node: u64,
    /// Names as a process sees them, and as a power cut would surely leave them.
    live: BTreeMap<String, u64>,
    stable: BTreeMap<String, u64>,
    /// What lies between the two, in order.
    pending: Vec<NameChange>,
    /// Operations until the process crashes within one.
    fuse: Option<u64>,
    crashed: bool,
    free: Option<u64>,
    failing: Option<(Operation, u64)>,
    is_lazy: bool,
    operations: u64,
    syncs: u64,
    full: u64,
    failed: u64,
}

/// A file without its names.
#[derive(Clone, Debug, Default)]
struct Node {
    stable: Vec<u8>,
    changes: Vec<Change>,
    /// How many of the changes the last sync should have made durable, where syncs lie.
    owed: usize,
    length: usize,
    /// Where it ends for who appends to it: behind that, zeros are reserved.
    end: usize,
}

#[derive(Clone, Debug)]
enum Change {
    Append(usize, Vec<u8>),
    Truncate(usize),
}

#[derive(Clone, Debug)]
enum NameChange {
    Create(String, u64),
    Rename(String, String, u64),
    Remove(String, u64),
}

/// How much of what was not synced survives.
#[derive(Clone, Copy, Debug)]
enum Luck {
    Nothing,
    Everything,
    /// So many changes, and some of the next.
    Prefix(usize),
    /// Each for itself.
    Scattered,
}

impl Volume {
    /// An empty one, whose luck is drawn from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            draw: Draw::new(seed, "torn disk", 0, ""),
            life: 0,
            nodes: BTreeMap::new(),
            next_node: 0,
            live: BTreeMap::new(),
            stable: BTreeMap::new(),
            pending: Vec::new(),
            fuse: None,
            crashed: false,
            free: None,
            failing: None,
            is_lazy: false,
            operations: 0,
            syncs: 0,
            full: 0,
            failed: 0,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of the one thread that there is fails the test anyway.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The disk of the next process; those of earlier ones are dead.
    #[must_use]
    pub fn mount(&self) -> TornDisk {
        let mut state = self.state();
        state.life += 1;
        (state.fuse, state.crashed, state.failing) = (None, false, None);
        state.nodes.values_mut().for_each(|node| node.end = node.length);
        TornDisk { volume: self.clone(), life: state.life }
    }

    /// Another handle of the process that there is: the intake writes beside the store.
    #[must_use]
    pub fn beside(&self) -> TornDisk {
        TornDisk { volume: self.clone(), life: self.state().life }
    }

    /// Whether syncs lie: each makes durable only what the one before it should have.
    pub fn set_lazy(&self, is_lazy: bool) {
        self.state().is_lazy = is_lazy;
    }

    /// Ends the process and nothing else: what it wrote is in the page cache, what it had not written is gone.
    pub fn kill(&self) {
        self.state().life += 1;
    }

    /// Ends the process, and takes what was not synced as the seed wants it.
    pub fn cut_power(&self) {
        let mut state = self.state();
        state.life += 1;
        state.lose_names();
        state.lose_content();
    }

    /// The process crashes within one of the next operations.
    pub fn light_fuse(&self, operations: u64) {
        self.state().fuse = Some(operations);
    }

    /// Whether it has.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        self.state().crashed
    }

    /// So many bytes more may be appended; any number with `None`.
    pub fn set_free(&self, free: Option<u64>) {
        self.state().free = free;
    }

    /// The `nth` operation of this kind from now on fails with EIO.
    pub fn fail(&self, operation: Operation, nth: u64) {
        self.state().failing = Some((operation, nth));
    }

    /// How many operations changed something, how many syncs returned, how often it was full, and how many failed.
    #[must_use]
    pub fn counts(&self) -> [u64; 4] {
        let state = self.state();
        [state.operations, state.syncs, state.full, state.failed]
    }

    /// Bytes in files that have a name.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let state = self.state();
        state.live.values().map(|node| state.nodes[node].length as u64).sum()
    }

    /// Names and lengths, for a trace.
    #[must_use]
    pub fn listing(&self) -> String {
        let state = self.state();
        let files = state.live.iter().map(|(name, node)| {
            format!("{name} {} ({} synced)", state.nodes[node].length, state.nodes[node].stable.len())
        });
        files.collect::<Vec<_>>().join(", ")
    }

    /// Turns over one bit of what was synced, within `range` of a file.
    pub fn flip(&self, name: &str, range: Range<usize>) -> Option<Flip> {
        let mut state = self.state();
        let node = *state.live.get(name)?;
        let end = range.end.min(state.nodes[&node].stable.len());
        if range.start >= end {
            return None;
        }
        let at = range.start + state.below(end - range.start);
        let bit = u8::try_from(state.below(8)).unwrap_or(0);
        state.nodes.get_mut(&node)?.stable[at] ^= 1 << bit;
        Some(Flip { name: name.to_owned(), at, bit })
    }

    /// How much of a file is more than zeros that were reserved.
    #[must_use]
    pub fn length_without_room(&self, name: &str) -> usize {
        let state = self.state();
        let content = state.live.get(name).map(|node| state.nodes[node].content()).unwrap_or_default();
        content.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
    }

    /// Turns it back, if what it was in is still there.
    pub fn flip_back(&self, flip: &Flip) {
        let mut state = self.state();
        let node = state.live.get(&flip.name).copied();
        let byte = node.and_then(|node| state.nodes.get_mut(&node)).and_then(|node| node.stable.get_mut(flip.at));
        if let Some(byte) = byte {
            *byte ^= 1 << flip.bit;
        }
    }

    /// A copy of what the worst of all power cuts would leave.
    #[must_use]
    pub fn synced(&self) -> Self {
        self.copy(|state| &state.stable, |node| node.stable.clone())
    }

    /// A copy of what a process sees.
    #[must_use]
    pub fn seen(&self) -> Self {
        self.copy(|state| &state.live, Node::content)
    }

    fn copy(&self, names: fn(&State) -> &BTreeMap<String, u64>, content: fn(&Node) -> Vec<u8>) -> Self {
        let copy = Self::new(0);
        {
            let (from, mut to) = (self.state(), copy.state());
            to.next_node = from.next_node;
            (to.live, to.stable) = (names(&from).clone(), names(&from).clone());
            to.nodes = names(&from).values().map(|node| (*node, Node::of(content(&from.nodes[node])))).collect();
        }
        copy
    }
}

impl Node {
    fn of(stable: Vec<u8>) -> Self {
        Self { length: stable.len(), end: stable.len(), stable, changes: Vec::new(), owed: 0 }
    }

    /// As a process sees it.
    fn content(&self) -> Vec<u8> {
        let mut content = self.stable.clone();
        for change in &self.changes {
            change.apply(&mut content);
        }
        content
    }

    fn append(&mut self, bytes: &[u8]) {
        self.changes.push(Change::Append(self.end, bytes.to_vec()));
        self.end += bytes.len();
        self.length = self.length.max(self.end);
    }

    fn reserve(&mut self, bytes: usize) {
        self.changes.push(Change::Append(self.length, vec![0; bytes]));
        self.length += bytes;
    }

    /// How much of what is reserved so many bytes take.
    fn replaced(&self, bytes: usize) -> usize {
        bytes.min(self.length - self.end)
    }

    fn truncate(&mut self, length: usize) {
        if length < self.length {
            self.changes.push(Change::Truncate(length));
            self.length = length;
        }
        self.end = self.length;
    }

    fn sync(&mut self, is_lazy: bool) {
        let now = if is_lazy { self.owed } else { self.changes.len() };
        for change in self.changes.drain(..now) {
            change.apply(&mut self.stable);
        }
        self.owed = self.changes.len();
    }
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Append(at, bytes) => overlay(content, *at, bytes),
            Self::Truncate(length) => content.truncate(*length),
        }
    }
}

impl NameChange {
    fn touches(&self, name: &str, node: u64) -> bool {
        match self {
            Self::Create(of, id) | Self::Remove(of, id) => of == name || *id == node,
            Self::Rename(from, to, id) => from == name || to == name || *id == node,
        }
    }

    fn apply(&self, names: &mut BTreeMap<String, u64>) {
        match self {
            Self::Create(name, node) => {
                names.insert(name.clone(), *node);
            }
            Self::Rename(from, to, node) => {
                if names.get(from) == Some(node) {
                    names.remove(from);
                }
                names.insert(to.clone(), *node);
            }
            Self::Remove(name, node) => {
                if names.get(name) == Some(node) {
                    names.remove(name);
                }
            }
        }
    }
}

impl State {
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.draw.below(n as u64)).unwrap_or(0)
    }

    fn luck(&mut self, changes: usize) -> Luck {
        match self.draw.below(6) {
            0 | 1 => Luck::Nothing,
            2 => Luck::Everything,
            3 | 4 => Luck::Prefix(self.below(changes + 1)),
            _ => Luck::Scattered,
        }
    }

    fn lose_names(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let luck = self.luck(pending.len());
        for (at, change) in pending.iter().enumerate() {
            let happened = match luck {
                Luck::Nothing => false,
                Luck::Everything => true,
                Luck::Prefix(length) => at < length,
                Luck::Scattered => self.draw.below(2) == 0,
            };
            if happened {
                change.apply(&mut self.stable);
            }
        }
        self.live = self.stable.clone();
        let named: Vec<u64> = self.live.values().copied().collect();
        self.nodes.retain(|node, _| named.contains(node));
    }

    fn lose_content(&mut self) {
        let ids: Vec<u64> = self.nodes.keys().copied().collect();
        for id in ids {
            let Some(mut node) = self.nodes.remove(&id) else { continue };
            let changes = std::mem::take(&mut node.changes);
            let luck = self.luck(changes.len());
            for (at, change) in changes.iter().enumerate() {
                let (whole, torn) = match luck {
                    Luck::Nothing => (false, false),
                    Luck::Everything => (true, false),
                    Luck::Prefix(length) => (at < length, at == length),
                    Luck::Scattered => (self.draw.below(3) == 0, self.draw.below(3) == 0),
                };
                self.survive(&mut node.stable, change, whole, torn);
            }
            self.nodes.insert(id, Node::of(node.stable));
        }
    }

    /// What a change leaves: all of it, some sectors of it, or nothing.
    fn survive(&mut self, content: &mut Vec<u8>, change: &Change, whole: bool, torn: bool) {
        match change {
            Change::Truncate(length) if whole => content.truncate(*length),
            Change::Truncate(_) => {}
            Change::Append(at, bytes) if whole => overlay(content, *at, bytes),
            Change::Append(at, bytes) if torn => {
                let kept = if self.draw.below(2) == 0 { bytes.len() } else { self.below(bytes.len() + 1) };
                let mut bytes = bytes[..kept].to_vec();
                let mut from = 0;
                while from < bytes.len() {
                    let to = bytes.len().min((at + from) / SECTOR * SECTOR + SECTOR - at);
                    match self.draw.below(4) {
                        0 => bytes[from..to].fill(0),
                        1 => bytes[from..to].iter_mut().for_each(|byte| *byte ^= self.draw.next_u64().to_le_bytes()[0]),
                        _ => {}
                    }
                    from = to;
                }
                overlay(content, *at, &bytes);
            }
            Change::Append(..) => {}
        }
    }

    /// Before each operation: whether it may happen at all.
    fn check(&mut self, life: u64, operation: Operation) -> io::Result<()> {
        if life != self.life || self.crashed {
            return Err(io::Error::other("the process is dead"));
        }
        self.operations += 1;
        if let Some((_, nth)) = self.failing.as_mut().filter(|(kind, _)| *kind == operation) {
            if *nth > 0 {
                *nth -= 1;
            } else {
                self.failing = None;
                self.failed += 1;
                return Err(io::Error::from_raw_os_error(5));
            }
        }
        Ok(())
    }

    /// After each operation: whether the process saw its end.
    fn burn(&mut self) -> io::Result<()> {
        match self.fuse.as_mut() {
            Some(0) => {
                self.crashed = true;
                Err(io::Error::other("the process crashed"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Whether the crash comes with the operation half done, or not done.
    fn is_cut_short(&mut self) -> bool {
        self.fuse == Some(0) && self.draw.below(2) == 0
    }

    fn node(&self, name: &str) -> io::Result<u64> {
        self.live.get(name).copied().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, name.to_owned()))
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let node = match self.live.get(name) {
            Some(node) => *node,
            None => {
                self.next_node += 1;
                let node = self.next_node;
                self.nodes.insert(node, Node::default());
                self.live.insert(name.to_owned(), node);
                self.pending.push(NameChange::Create(name.to_owned(), node));
                node
            }
        };
        let replaced = self.nodes.get(&node).map_or(0, |node| node.replaced(bytes.len()));
        let room = replaced + self.room(bytes.len() - replaced);
        let written = if self.is_cut_short() { self.below(room + 1) } else { room };
        self.use_up(written.saturating_sub(replaced));
        if let Some(node) = self.nodes.get_mut(&node) {
            node.append(&bytes[..written]);
        }
        self.burn()?;
        if written < bytes.len() {
            self.full += 1;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    /// How many of so many bytes there is room for.
    fn room(&self, bytes: usize) -> usize {
        self.free.map_or(bytes, |free| bytes.min(usize::try_from(free).unwrap_or(usize::MAX)))
    }

    fn use_up(&mut self, bytes: usize) {
        self.free = self.free.map(|free| free - bytes as u64);
    }

    fn reserve(&mut self, name: &str, bytes: usize) -> io::Result<()> {
        let id = self.node(name)?;
        let wanted = bytes - self.nodes.get(&id).map_or(0, |node| node.replaced(bytes));
        let room = self.room(wanted);
        let written = if self.is_cut_short() { self.below(room + 1) } else { room };
        self.use_up(written);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.reserve(written);
        }
        self.burn()?;
        if written < wanted {
            self.full += 1;
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        let id = self.node(name)?;
        if !self.is_cut_short() {
            let node = self.nodes.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
            let before = node.length;
            node.truncate(usize::try_from(length).unwrap_or(usize::MAX));
            let gained = (before - node.length) as u64;
            self.free = self.free.map(|free| free + gained);
        }
        self.burn()
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let id = self.node(name)?;
        if !self.is_cut_short() {
            let is_lazy = self.is_lazy;
            self.nodes.get_mut(&id).ok_or(io::ErrorKind::NotFound)?.sync(is_lazy);
            let (mut stable, pending) = (std::mem::take(&mut self.stable), std::mem::take(&mut self.pending));
            for change in pending {
                if change.touches(name, id) {
                    change.apply(&mut stable);
                } else {
                    self.pending.push(change);
                }
            }
            self.stable = stable;
            self.syncs += 1;
        }
        self.burn()
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let id = self.node(from)?;
        if !self.is_cut_short() {
            let change = NameChange::Rename(from.to_owned(), to.to_owned(), id);
            change.apply(&mut self.live);
            self.pending.push(change);
        }
        self.burn()
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let id = self.node(name)?;
        if !self.is_cut_short() {
            let gained = self.nodes.get(&id).map_or(0, |node| node.length as u64);
            self.free = self.free.map(|free| free + gained);
            let change = NameChange::Remove(name.to_owned(), id);
            change.apply(&mut self.live);
            self.pending.push(change);
        }
        self.burn()
    }
}

/// Writes `bytes` at a place that may lie behind the end, where a hole is zeros.
fn overlay(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    let end = at + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[at..end].copy_from_slice(bytes);
}

impl Disk for TornDisk {
    fn list(&self) -> io::Result<Vec<(String, u64)>> {
        let state = self.volume.state();
        let files = state.live.iter().map(|(name, node)| (name.clone(), state.nodes[node].length as u64));
        Ok(files.collect())
    }

    fn read(&self, name: &str, from: u64) -> io::Result<Box<dyn Read + Send>> {
        let state = self.volume.state();
        if self.life != state.life || state.crashed {
            return Err(io::Error::other("the process is dead"));
        }
        let mut content = Cursor::new(state.nodes[&state.node(name)?].content());
        content.set_position(from);
        Ok(Box::new(content))
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.volume.state();
        if let Err(error) = state.check(self.life, Operation::Append) {
            // A failed write leaves any part of what was to be written, in a file that is there.
            if error.raw_os_error() == Some(5) && state.live.contains_key(name) {
                let some = state.below(bytes.len() + 1);
                state.append(name, &bytes[..some])?;
            }
            return Err(error);
        }
        state.append(name, bytes)
    }

    fn reserve(&mut self, name: &str, bytes: u64) -> io::Result<()> {
        let mut state = self.volume.state();
        state.check(self.life, Operation::Append)?;
        state.reserve(name, usize::try_from(bytes).unwrap_or(usize::MAX))
    }

    fn truncate(&mut self, name: &str, length: u64) -> io::Result<()> {
        let mut state = self.volume.state();
        state.check(self.life, Operation::Truncate)?;
        state.truncate(name, length)
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.volume.state();
        state.check(self.life, Operation::Sync)?;
        state.sync(name)
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.volume.state();
        state.check(self.life, Operation::Rename)?;
        state.rename(from, to)
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.volume.state();
        state.check(self.life, Operation::Remove)?;
        state.remove(name)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn content(volume: &Volume, name: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        volume.mount().read(name, 0).ok()?.read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }

    #[test]
    fn what_was_synced_survives_every_power_cut() {
        for seed in 0..500 {
            let volume = Volume::new(seed);
            let mut disk = volume.mount();
            disk.append("journal", b"first").unwrap();
            disk.sync("journal").unwrap();
            disk.append("journal", b" second").unwrap();
            volume.cut_power();
            assert!(content(&volume, "journal").unwrap().starts_with(b"first"), "seed {seed}");
        }
    }

    #[test]
    fn what_was_not_synced_is_lost_torn_and_reordered_but_not_always() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..2000 {
            let volume = Volume::new(seed);
            let mut disk = volume.mount();
            disk.append("journal", b"0").unwrap();
            disk.sync("journal").unwrap();
            disk.append("journal", &[b'a'; 511]).unwrap();
            disk.append("journal", &[b'b'; 512]).unwrap();
            volume.cut_power();
            let left = content(&volume, "journal").unwrap();
            let half = |from: usize, to: usize, byte| left.get(from..to).map(|part| part.iter().all(|b| *b == byte));
            seen.insert((half(1, 512, b'a'), half(512, 1024, b'b')));
        }
        for expected in [
            (None, None),
            (Some(true), None),
            (Some(true), Some(true)),
            (Some(false), Some(true)),
            (Some(true), Some(false)),
            (Some(false), None),
        ] {
            assert!(seen.contains(&expected), "{expected:?} never came: {seen:?}");
        }
    }

    #[test]
    fn a_rename_without_a_sync_may_or_may_not_have_happened_and_with_one_has() {
        let outcome = |seed, synced| {
            let volume = Volume::new(seed);
            let mut disk = volume.mount();
            disk.append("aside", b"new").unwrap();
            disk.sync("aside").unwrap();
            disk.rename("aside", "model").unwrap();
            if synced {
                disk.sync("model").unwrap();
            }
            volume.cut_power();
            (content(&volume, "aside"), content(&volume, "model"))
        };
        let new = || Some(b"new".to_vec());
        let outcomes: Vec<_> = (0..100).map(|seed| outcome(seed, false)).collect();
        assert!(outcomes.contains(&(new(), None)) && outcomes.contains(&(None, new())));
        assert!((0..100).all(|seed| outcome(seed, true) == (None, new())));
    }

    #[test]
    fn a_removal_without_a_sync_may_come_back() {
        let left = |seed| {
            let volume = Volume::new(seed);
            let mut disk = volume.mount();
            disk.append("old", b"old").unwrap();
            disk.sync("old").unwrap();
            disk.remove("old").unwrap();
            volume.cut_power();
            content(&volume, "old").is_some()
        };
        assert!((0..100).any(left) && !(0..100).all(left));
    }

    #[test]
    fn a_killed_process_loses_its_handle_and_nothing_that_it_wrote() {
        let volume = Volume::new(1);
        let mut disk = volume.mount();
        disk.append("journal", b"unsynced").unwrap();
        volume.kill();
        assert!(disk.append("journal", b"!").is_err());
        assert_eq!(content(&volume, "journal").unwrap(), b"unsynced");
    }

    #[test]
    fn a_fuse_ends_every_call_and_leaves_any_part_of_the_last() {
        let mut lengths = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let volume = Volume::new(seed);
            let mut disk = volume.mount();
            volume.light_fuse(1);
            disk.append("journal", b"one").unwrap();
            assert!(disk.append("journal", b"two").is_err() && disk.sync("journal").is_err());
            assert!(volume.has_crashed());
            lengths.insert(content(&volume, "journal").unwrap().len());
        }
        assert_eq!(lengths, [3, 4, 5, 6].into());
    }

    #[test]
    fn a_full_disk_takes_what_fits_and_all_again_when_there_is_space() {
        let volume = Volume::new(1);
        let mut disk = volume.mount();
        volume.set_free(Some(2));
        assert_eq!(disk.append("journal", b"abc").unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.truncate("journal", 0).unwrap();
        assert!(disk.append("journal", b"abc").is_err());
        volume.set_free(None);
        disk.truncate("journal", 0).unwrap();
        disk.append("journal", b"abc").unwrap();
        assert_eq!(content(&volume, "journal").unwrap(), b"abc");
    }

    #[test]
    fn an_operation_fails_once_where_it_is_told_to() {
        let volume = Volume::new(1);
        let mut disk = volume.mount();
        disk.append("journal", b"abc").unwrap();
        volume.fail(Operation::Sync, 1);
        disk.sync("journal").unwrap();
        assert_eq!(disk.sync("journal").unwrap_err().raw_os_error(), Some(5));
        disk.sync("journal").unwrap();
    }

    #[test]
    fn what_is_appended_replaces_what_was_reserved_for_who_reserved_it() {
        let volume = Volume::new(1);
        let mut disk = volume.mount();
        volume.set_free(Some(6));
        disk.append("journal", b"ab").unwrap();
        disk.reserve("journal", 3).unwrap();
        assert_eq!(disk.append("journal", b"cdefgh").unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.truncate("journal", 2).unwrap();
        disk.reserve("journal", 3).unwrap();
        disk.append("journal", b"c").unwrap();
        disk.sync("journal").unwrap();
        volume.kill();
        assert_eq!(
            (volume.length_without_room("journal"), content(&volume, "journal").unwrap().as_slice()),
            (3, &b"abc\0\0"[..])
        );
        let mut next = volume.mount();
        next.append("journal", b"!").unwrap();
        assert_eq!(content(&volume, "journal").unwrap(), b"abc\0\0!");
    }

    #[test]
    fn a_bit_turns_over_and_back() {
        let volume = Volume::new(1);
        let mut disk = volume.mount();
        disk.append("model", &[0; 64]).unwrap();
        disk.sync("model").unwrap();
        let flip = volume.flip("model", 0..64).unwrap();
        assert_eq!(content(&volume, "model").unwrap().iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
        volume.flip_back(&flip);
        assert_eq!(content(&volume, "model").unwrap(), [0; 64]);
    }

    #[test]
    fn the_synced_copy_has_what_was_synced_and_nothing_else() {
        let volume = Volume::new(1);
        let mut disk = volume.mount();
        disk.append("journal", b"first").unwrap();
        disk.sync("journal").unwrap();
        disk.append("journal", b"second").unwrap();
        disk.append("payload", b"third").unwrap();
        let copy = volume.synced();
        assert_eq!(content(&copy, "journal").unwrap(), b"first");
        assert_eq!(content(&copy, "payload"), None);
        disk.append("journal", b"!").unwrap();
    }
}
