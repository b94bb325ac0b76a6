//! What a worker made, kept through its death, off the path of the offer.
//!
//! A thread of its own writes the one payload that waits for its receipt, and syncs the log of receipts. The loop says
//! what is wanted now, and the thread brings the disk there: what is wanted no more before its writing began is never
//! written, so rounds shorter than [`SETTLE`] cost nothing, and a disk that does not answer holds one payload and no queue.
//! Payloads are not synced. They survive the process; what a power failure tears is found by its hash and made again.
//!
//! ```text
//! kept/figures    magic, for whom it was made, `Kept`, BLAKE3 of all before
//! kept/payload    the bytes, whose hash the figures name
//! ```

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use protocol::ids::{Hash, TaskId, WorkerName};
use protocol::limits::CONTROL_MESSAGE_BYTES_MAX;
use protocol::member::Kept;
use protocol::messages::{DecodeError, decode, encode};
use serde::{Deserialize, Serialize};

use crate::error::sentence;
use crate::files::{self, FileError};
use crate::report::{Line, Report};

/// How long a payload waits for its receipt before it is written. What is made and answered faster is made again as fast.
const SETTLE: Duration = Duration::from_millis(500);

/// How long a receipt's line waits for its sync, so that many share one.
const SYNC_AFTER: Duration = Duration::from_secs(1);

/// What `figures` begins with, its version last.
const MAGIC: &[u8] = b"tribkep1";

/// The longest `figures`: what it holds travels in one control message too.
const FIGURES_BYTES_MAX: u64 = CONTROL_MESSAGE_BYTES_MAX as u64;

/// For whom and from what a payload was made, beside its key. What was kept under another origin is never offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin(Hash);

impl Origin {
    pub(crate) fn new(coordinator: &[u8; 32], name: &WorkerName, label: Option<&str>, data: &[DataMark]) -> Self {
        Self(Hash::of(&encode(&(coordinator, name, label, data))))
    }
}

/// What tells without reading it that a data file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct DataMark {
    bytes: u64,
    modified: (i64, i64),
    inode: u64,
}

impl DataMark {
    /// Must be taken before the file is read: one that changes meanwhile then has another mark at the next start.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self { bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()), inode: metadata.ino() })
    }
}

/// A payload and its figures.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Restored {
    pub(crate) kept: Kept,
    pub(crate) payload: Bytes,
}

/// Reads what an earlier process kept in `place` for this origin. What cannot be used is removed.
pub(crate) fn read(place: &Path, origin: Origin) -> Option<Restored> {
    let found = read_whole(place, origin);
    if let Err(reason) = &found {
        tracing::debug!(place = %place.display(), reason = sentence(reason), "what was kept is not used");
        let _ = clear(place);
    }
    found.ok().flatten()
}

/// Why what was kept is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("its figures are damaged, or of another version")]
    Figures,
    #[error("its figures cannot be read: {0}")]
    Unreadable(#[from] DecodeError),
    #[error("it was made for another coordinator, from other data, or under another name")]
    OtherOrigin,
    #[error("its payload is damaged, or was not wholly written")]
    Payload,
}

/// What `figures` holds between its magic and its hash.
#[derive(Serialize, Deserialize)]
struct Figures {
    origin: Origin,
    kept: Kept,
}

fn read_whole(place: &Path, origin: Origin) -> Result<Option<Restored>, Unusable> {
    let Some(bytes) = files::read(&figures_of(place), FIGURES_BYTES_MAX)? else { return Ok(None) };
    let (body, hash) = bytes.split_last_chunk::<32>().ok_or(Unusable::Figures)?;
    let figures = body.strip_prefix(MAGIC).filter(|_| Hash::of(body).0 == *hash).ok_or(Unusable::Figures)?;
    let figures: Figures = decode(figures)?;
    if figures.origin != origin {
        return Err(Unusable::OtherOrigin);
    }
    let kept = figures.kept;
    let payload = files::read(&payload_of(place), kept.made.bytes)?.filter(|bytes| Hash::of(bytes) == kept.made.hash);
    Ok(Some(Restored { kept, payload: payload.ok_or(Unusable::Payload)?.into() }))
}

fn figures_of(place: &Path) -> PathBuf {
    place.join("figures")
}

fn payload_of(place: &Path) -> PathBuf {
    place.join("payload")
}

/// The figures go first: a payload without them is nothing.
fn clear(place: &Path) -> Result<(), FileError> {
    [figures_of(place), payload_of(place)].iter().try_for_each(|path| files::remove(path))
}

/// A handle to the thread. When it is dropped, what is wanted is on disk, or was said not to be.
#[derive(Debug)]
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

/// What is wanted now.
#[derive(Debug, Default)]
struct Wishes {
    keep: Option<Wanted>,
    /// A log that has lines which are not synced, and when that is due.
    sync: Option<(Arc<File>, Instant)>,
    /// When the thread looks again by itself, while it sleeps so; it need not be woken for what is due later.
    looks_at: Option<Instant>,
    ending: bool,
}

#[derive(Clone, Debug)]
struct Wanted {
    kept: Kept,
    payload: Bytes,
    due: Instant,
}

impl Wanted {
    fn id(&self) -> KeptId {
        (self.kept.made.hash, self.kept.task)
    }
}

/// One payload for one task.
type KeptId = (Hash, TaskId);

impl Keeper {
    /// Starts the thread, which keeps in `place` what is of this origin. `restored` is what is there already.
    pub(crate) fn start(
        place: PathBuf,
        origin: Origin,
        restored: Option<&Restored>,
        report: Report,
    ) -> io::Result<Self> {
        let keep = restored.map(|Restored { kept, payload }| Wanted {
            kept: kept.clone(),
            payload: payload.clone(),
            due: Instant::now(),
        });
        let on_disk = keep.as_ref().map(Wanted::id);
        let wishes = Mutex::new(Wishes { keep, ..Wishes::default() });
        let shared = Arc::new(Shared { wishes, changed: Condvar::new() });
        let desk = Desk { place, origin, report, on_disk, failed: None };
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new().name("keeper".to_owned()).spawn(move || desk.run(&theirs))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// This payload waits for its receipt now, and no other.
    pub(crate) fn keep(&self, kept: Kept, payload: Bytes) {
        let due = Instant::now() + SETTLE;
        self.wish(due, |wishes| wishes.keep = Some(Wanted { kept, payload, due }));
    }

    /// The payload is offered for another task.
    pub(crate) fn rename(&self, task: TaskId) {
        self.wish(Instant::now(), |wishes| {
            if let Some(wanted) = &mut wishes.keep {
                wanted.kept.task = task;
            }
        });
    }

    /// This payload is no longer needed.
    pub(crate) fn forget(&self, hash: Hash) {
        self.wish(Instant::now() + SETTLE, |wishes| {
            wishes.keep.take_if(|wanted| wanted.kept.made.hash == hash);
        });
    }

    /// Lines were written to this log.
    pub(crate) fn sync_soon(&self, log: Arc<File>) {
        let now = Instant::now();
        self.wish(now + SYNC_AFTER, |wishes| {
            let due = wishes.sync.as_ref().map_or(now + SYNC_AFTER, |(_, due)| *due);
            wishes.sync = Some((log, due));
        });
    }

    /// Changes what is wanted, which the thread is to look at by then. Waking it costs a round of some microseconds more
    /// than it takes, so it is left alone if it looks early enough by itself.
    fn wish(&self, by: Instant, change: impl FnOnce(&mut Wishes)) {
        let mut wishes = self.shared.lock();
        change(&mut wishes);
        if wishes.looks_at.is_none_or(|at| by < at) {
            drop(wishes);
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.wish(Instant::now(), |wishes| (wishes.ending, wishes.looks_at) = (true, None));
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wishes> {
        // Every change to it is whole.
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to do.
    fn next(&self, desk: &Desk) -> Step {
        let mut wishes = self.lock();
        loop {
            let due = match desk.step(&mut wishes, Instant::now()) {
                Ok(step) => return step,
                Err(due) => due,
            };
            let wait = due.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
            wishes.looks_at = due;
            wishes = self.changed.wait_timeout(wishes, wait).unwrap_or_else(PoisonError::into_inner).0;
            wishes.looks_at = None;
        }
    }
}

/// What the thread works with.
struct Desk {
    place: PathBuf,
    origin: Origin,
    report: Report,
    on_disk: Option<KeptId>,
    /// What could not be written last: it is not tried again before something else is wanted.
    failed: Option<KeptId>,
}

/// What the thread does next.
enum Step {
    Remove,
    Write(Wanted),
    Sync(Arc<File>),
    End,
}

impl Desk {
    fn run(mut self, shared: &Shared) {
        loop {
            match shared.next(&self) {
                Step::Remove => self.remove(),
                Step::Write(wanted) => self.write(&wanted),
                Step::Sync(log) => self.sync(&log),
                Step::End => return,
            }
        }
    }

    /// What is to be done now, or when there will be something.
    fn step(&self, wishes: &mut Wishes, now: Instant) -> Result<Step, Option<Instant>> {
        let wanted = wishes.keep.as_ref();
        if self.on_disk.is_some_and(|(hash, _)| wanted.is_none_or(|wanted| wanted.kept.made.hash != hash)) {
            return Ok(Step::Remove);
        }
        let is_due = |due: Instant| wishes.ending || due <= now;
        let missing = wanted.filter(|wanted| ![self.on_disk, self.failed].contains(&Some(wanted.id())));
        if let Some(wanted) = missing.filter(|wanted| is_due(wanted.due)) {
            return Ok(Step::Write(wanted.clone()));
        }
        let times = [missing.map(|wanted| wanted.due), wishes.sync.as_ref().map(|(_, due)| *due)];
        if let Some((log, _)) = wishes.sync.take_if(|(_, due)| wishes.ending || *due <= now) {
            return Ok(Step::Sync(log));
        }
        if wishes.ending { Ok(Step::End) } else { Err(times.into_iter().flatten().min()) }
    }

    fn remove(&mut self) {
        self.on_disk = None;
        if let Err(error) = clear(&self.place) {
            // It would be offered again after a restart, and the coordinator would say that it is late.
            tracing::debug!(error = sentence(&error), "what was kept cannot be removed");
        }
    }

    fn write(&mut self, wanted: &Wanted) {
        match self.try_write(wanted) {
            Ok(()) => (self.on_disk, self.failed) = (Some(wanted.id()), None),
            Err(error) => {
                if self.failed.replace(wanted.id()).is_none() {
                    let text = format!(
                        "what is made cannot be kept on disk, and is made again if this process is killed: {}",
                        sentence(&error)
                    );
                    self.report.say(&Line::Note { text });
                }
                self.remove();
            }
        }
    }

    /// The payload first, so that figures always find theirs.
    fn try_write(&self, wanted: &Wanted) -> Result<(), FileError> {
        let renamed = self.on_disk.is_some_and(|(hash, _)| hash == wanted.kept.made.hash);
        if !renamed {
            files::make_directory(&self.place)?;
            files::write_unsynced(&payload_of(&self.place), &wanted.payload)?;
        }
        let mut figures = MAGIC.to_vec();
        figures.extend(encode(&Figures { origin: self.origin, kept: wanted.kept.clone() }));
        figures.extend(Hash::of(&figures).0);
        files::write_unsynced(&figures_of(&self.place), &figures)
    }

    fn sync(&self, log: &File) {
        if let Err(error) = log.sync_data() {
            let text = format!("receipts may not survive a power failure: their log cannot be synced: {error}");
            self.report.say(&Line::Note { text });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::FileExt as _;

    use protocol::ids::RunId;
    use protocol::member::{Made, WorkKey};
    use protocol::messages::{Metrics, TaskKind};

    use super::*;

    const ORIGIN: Origin = Origin(Hash([1; 32]));
    const TASK: TaskId = TaskId(1 << 32 | 1);

    struct Home {
        directory: tempfile::TempDir,
    }

    impl Home {
        fn new() -> Self {
            Self { directory: tempfile::tempdir().unwrap() }
        }

        fn place(&self) -> PathBuf {
            self.directory.path().join("kept")
        }

        fn keeper(&self) -> Keeper {
            Keeper::start(self.place(), ORIGIN, self.read().as_ref(), Report::silent()).unwrap()
        }

        fn read(&self) -> Option<Restored> {
            read(&self.place(), ORIGIN)
        }

        fn is_empty(&self) -> bool {
            fs::read_dir(self.place()).is_ok_and(|mut entries| entries.next().is_none())
        }
    }

    fn payload(fill: u8) -> Bytes {
        Bytes::from(vec![fill; 1000])
    }

    fn kept(fill: u8) -> Kept {
        let (hash, zero) = (Hash::of(&payload(fill)), Hash([0; 32]));
        let key = WorkKey { run: RunId([5; 16]), round: 3, base: zero, kind: TaskKind::Update, schema: zero };
        let made =
            Made { hash, bytes: 1000, layout: zero, examples: 1, steps: 1, weight: 1, metrics: Metrics::default() };
        Kept { key, task: TASK, made: Box::new(made) }
    }

    #[test]
    fn what_was_made_is_found_again_under_the_task_that_it_was_last_offered_for() {
        let home = Home::new();
        home.keeper().keep(kept(1), payload(1));
        assert_eq!(home.read(), Some(Restored { kept: kept(1), payload: payload(1) }));
        let renamed = TaskId(2 << 32 | 9);
        home.keeper().rename(renamed);
        assert_eq!(home.read(), Some(Restored { kept: Kept { task: renamed, ..kept(1) }, payload: payload(1) }));
        home.keeper().forget(kept(2).made.hash);
        assert!(home.read().is_some());
        home.keeper().forget(kept(1).made.hash);
        assert_eq!(home.read(), None);
        assert!(home.is_empty());
    }

    #[test]
    fn what_has_its_receipt_before_it_was_written_is_never_written() {
        let home = Home::new();
        let keeper = home.keeper();
        for fill in 0..100 {
            keeper.keep(kept(fill), payload(fill));
            keeper.forget(kept(fill).made.hash);
        }
        drop(keeper);
        assert!(!home.place().exists());
    }

    #[test]
    fn the_newest_takes_the_place_of_what_was_kept_before() {
        let home = Home::new();
        home.keeper().keep(kept(1), payload(1));
        home.keeper().keep(kept(2), payload(2));
        assert_eq!(home.read().unwrap().kept, kept(2));
    }

    #[test]
    fn what_is_damaged_anywhere_is_removed_and_not_used() {
        let home = Home::new();
        for path in [figures_of(&home.place()), payload_of(&home.place())] {
            home.keeper().keep(kept(1), payload(1));
            for at in 0..fs::metadata(&path).unwrap().len() {
                home.keeper().keep(kept(1), payload(1));
                let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1], at).unwrap();
                assert_eq!(home.read(), None, "{} at {at}", path.display());
                assert!(home.is_empty());
            }
        }
    }

    #[test]
    fn what_was_half_written_is_not_used() {
        let home = Home::new();
        for path in [figures_of(&home.place()), payload_of(&home.place())] {
            home.keeper().keep(kept(1), payload(1));
            let length = fs::metadata(&path).unwrap().len();
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
            assert_eq!(home.read(), None, "{}", path.display());
            home.keeper().keep(kept(1), payload(1));
            fs::remove_file(&path).unwrap();
            assert_eq!(home.read(), None, "{}", path.display());
        }
    }

    #[test]
    fn what_was_made_from_other_data_or_for_another_coordinator_is_removed() {
        let home = Home::new();
        let data = home.directory.path().join("shard.csv");
        fs::write(&data, "a,b\n1,2\n").unwrap();
        let (name, mark) = ("shard".parse().unwrap(), DataMark::of(&data).ok());
        let mark = mark.as_slice();
        let origin = Origin::new(&[1; 32], &name, None, mark);
        assert_eq!(origin, Origin::new(&[1; 32], &name, None, DataMark::of(&data).ok().as_slice()));
        fs::write(&data, "a,b\n1,2\n3,4\n").unwrap();
        let others = [
            Origin::new(&[2; 32], &name, None, mark),
            Origin::new(&[1; 32], &"other".parse().unwrap(), None, mark),
            Origin::new(&[1; 32], &name, Some("late"), mark),
            Origin::new(&[1; 32], &name, None, DataMark::of(&data).ok().as_slice()),
        ];
        for other in others {
            drop(Keeper::start(home.place(), origin, None, Report::silent()).map(|k| k.keep(kept(1), payload(1))));
            assert!(read_whole(&home.place(), origin).unwrap().is_some());
            assert_eq!(read(&home.place(), other), None);
            assert!(home.is_empty());
        }
    }

    #[test]
    fn a_disk_that_takes_nothing_is_told_of_once() {
        let home = Home::new();
        fs::write(home.place(), "in the way").unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let report = Report::new(Arc::new(move |line: &Line| tell.send(line.clone()).unwrap()));
        let keeper = Keeper::start(home.place(), ORIGIN, None, report).unwrap();
        keeper.keep(kept(1), payload(1));
        let said = told.recv().unwrap();
        assert!(matches!(&said, Line::Note { text } if text.contains("made again")), "{said:?}");
        keeper.keep(kept(2), payload(2));
        drop(keeper);
        assert!(told.recv().is_err());
        assert_eq!(fs::read_to_string(home.place()).unwrap(), "in the way");
    }
}
