//! Line 5: an update verified, and folded into the ring.
//!
//! A fold reads a number (4 bytes) and a cell (8), and writes the cell (8); its limit is a loop that moves the same 20 bytes
//! and does nothing with them. From memory and from the page cache, by pieces that stay in the second-level cache; on one
//! thread, and on as many as the coordinator folds a large update on, by the coordinator's code. The limit of verifying is
//! BLAKE3 alone, fed with the same records.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result};
use coordinator::{crew, folding};
use protocol::ids::{Hash, TaskId};
use protocol::limits::RECORD_BYTES_MAX;
use protocol::pages::Numbers;
use protocol::sum::{Checker, Part, Ring, Sum, Verified, Verifier};
use serde_json::json;

use crate::figures::Samples;
use crate::machine;
use crate::report::{Aim, Measure, Report};
use crate::rivals::{Rival, Rivals};
use crate::sides::alternate;
use crate::suite::Bench;

/// Numbers of an update, where there is memory for them: with their cells 604 MB, more than any cache.
const NUMBERS_MAX: u64 = 48 << 20;

/// Beside the 12 bytes a number that are measured there is a rival with as many, and the page cache.
const BYTES_A_NUMBER: u64 = 64;

/// What the coordinator reads of a held payload at once.
const PIECE_BYTES: usize = 256 * 1024;

/// What a number costs in traffic with memory, and what it has itself.
const MOVED_BYTES: f64 = 20.0;
const NUMBER_BYTES: f64 = 4.0;

/// With their cells these fit the second-level cache.
const CACHED_NUMBERS: usize = 1 << 14;

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let numbers = usize::try_from((machine::memory_available() / BYTES_A_NUMBER).min(NUMBERS_MAX))?;
    let mut update = Update::new(bench.disk()?, numbers)?;
    let repetitions = bench.repetitions;
    let mut line = Table { report, numbers };
    let cached = Update::new(bench.disk()?, CACHED_NUMBERS)?.fold_often()?;
    let reason = format!("the arithmetic alone, in the cache, is worth {:.0} GB/s", MOVED_BYTES / cached / 1e9);
    let sides = update.alternate(repetitions, Update::fold_stored, Update::move_stored)?;
    line.add("fold from the page cache, one thread", MOVED_BYTES, "moving them", &sides, Some(0.85), &reason);
    let sides = update.alternate(repetitions, Update::fold, Update::moves)?;
    line.add("fold from memory, one thread", MOVED_BYTES, "moving them", &sides, Some(0.85), &reason);
    let mut moved = sides;
    let threads = crew::threads();
    if threads > 1 {
        let sides = update.alternate(repetitions, Update::fold_stored_apart, Update::move_stored_apart)?;
        let name = format!("fold from the page cache, {threads} threads");
        line.add(&name, MOVED_BYTES, "moving them", &sides, Some(0.85), &reason);
        moved = update.alternate(repetitions, Update::fold_apart, Update::move_apart)?;
        let name = format!("fold from memory, {threads} threads");
        line.add(&name, MOVED_BYTES, "moving them", &moved, Some(0.85), &reason);
    }
    let sides = update.alternate(repetitions, Update::verify, Update::hash)?;
    let squares = NUMBER_BYTES * numbers as f64 / (sides.0.median() - sides.1.median()) / 1e9;
    let reason = format!("beside the hash, the sum of squares runs at {squares:.0} GB/s");
    line.add("verify: hash, finite, norm", NUMBER_BYTES, "BLAKE3 alone", &sides, Some(0.85), &reason);
    match bench.rivals.as_ref().map(|rivals| Numpy::start(rivals, &update)).transpose() {
        Ok(None) => {}
        Err(error) => line.report.missing(5, "fold beside numpy", &format!("{error:#}")),
        Ok(Some(mut numpy)) => {
            for (ways, name) in WAYS {
                let sides = alternate(repetitions, || update.fold_apart(), || numpy.fold(ways))?;
                let most = sides.1.median() / moved.1.median();
                let reason = format!(
                    "{}; moving the bytes, and nothing else, is {most:.2} times as fast, on {threads} threads",
                    numpy.arrangement
                );
                line.add("fold from memory", MOVED_BYTES, name, &sides, Some(2.5), &reason);
            }
        }
    }
    Ok(())
}

/// How numpy rounds, and what that is called.
const WAYS: [(&str, &str); 2] = [("rint", "numpy"), ("bits", "numpy, with our rounding")];

/// numpy in a process of its own.
struct Numpy {
    rival: Rival,
    /// In how many threads, and by what blocks, it folded last.
    arrangement: String,
}

impl Numpy {
    fn start(rivals: &Rivals, update: &Update) -> Result<Self> {
        let scale = f64::from(1 << 23).to_string();
        Ok(Self { rival: rivals.start("numpy_fold", &[&update.path()?, &scale])?, arrangement: String::new() })
    }

    fn fold(&mut self, way: &str) -> Result<f64> {
        let answer = self.rival.once(&json!({ "by": way }))?;
        self.arrangement = answer["arrangement"].as_str().unwrap_or_default().to_owned();
        answer["seconds"].as_f64().with_context(|| format!("expected seconds, got {answer}"))
    }
}

/// What is measured, in bytes a second of so many numbers.
struct Table<'a> {
    report: &'a mut Report,
    numbers: usize,
}

impl Table<'_> {
    /// Adds a comparison of ours and theirs, in seconds; `bytes` are those of one number.
    fn add(
        &mut self,
        name: &str,
        bytes: f64,
        rival: &'static str,
        (ours, theirs): &(Samples, Samples),
        least: Option<f64>,
        reason: &str,
    ) {
        let speed = |seconds: &Samples| seconds.map(|seconds| bytes * self.numbers as f64 / seconds / 1e9);
        self.report.add(Measure {
            line: 5,
            name: name.to_owned(),
            unit: "GB/s",
            ratio: theirs.with(ours, |theirs, ours| theirs / ours),
            ours: speed(ours),
            theirs: Some((rival, speed(theirs))),
            aim: least.map_or(Aim::None, Aim::AtLeast),
            reason: reason.to_owned(),
        });
    }
}

/// An update in memory and in the page cache, and what it is folded into.
struct Update {
    /// On large pages, as numpy's.
    raw: Numbers<u8>,
    stored: tempfile::NamedTempFile,
    verified: Verified,
    sum: Sum,
    tasks: u64,
    /// What the limit moves, on pages like the sum's.
    cells: Numbers<u64>,
}

impl Update {
    #[allow(clippy::cast_precision_loss)] // any numbers will do
    fn new(disk: &Path, numbers: usize) -> Result<Self> {
        let mut raw = Numbers::<u8>::zeroed(4 * numbers);
        let (each, _) = raw.as_chunks_mut();
        each.iter_mut().enumerate().for_each(|(at, number)| *number = ((at as f32).sin() * 1e-3).to_le_bytes());
        let mut stored = tempfile::NamedTempFile::new_in(disk)?;
        stored.write_all(&raw)?;
        let ring = Ring::weighted();
        let verified = verified(&raw, Hash::of(&raw))?;
        let mut cells = Numbers::zeroed(numbers);
        cells.fill(1);
        Ok(Self { raw, stored, verified, sum: Sum::new(ring, numbers), tasks: 0, cells })
    }

    fn path(&self) -> Result<String> {
        Ok(self.stored.path().to_str().context("the temporary directory's name is not UTF-8")?.to_owned())
    }

    fn alternate(
        &mut self,
        repetitions: usize,
        ours: impl Fn(&mut Self) -> Result<f64>,
        theirs: impl Fn(&mut Self) -> Result<f64>,
    ) -> Result<(Samples, Samples)> {
        let update = std::cell::RefCell::new(self);
        alternate(repetitions, || ours(&mut update.borrow_mut()), || theirs(&mut update.borrow_mut()))
    }

    fn fold(&mut self) -> Result<f64> {
        self.tasks += 1;
        let began = Instant::now();
        let mut fold = self.sum.begin(TaskId(self.tasks), 1, &self.verified)?;
        fold.add(&self.raw);
        fold.finish()?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// The seconds that a number takes if it is folded again and again.
    fn fold_often(&mut self) -> Result<f64> {
        self.fold()?;
        let times = (1..1000).map(|_| self.fold()).collect::<Result<Vec<f64>>>()?;
        Ok(Samples::from(times).median() / self.cells.len() as f64)
    }

    fn fold_stored(&mut self) -> Result<f64> {
        self.tasks += 1;
        let began = Instant::now();
        let mut fold = self.sum.begin(TaskId(self.tasks), 1, &self.verified)?;
        folding::fold(&mut fold, vec![open_at(self.stored.path(), 0)?], folding::add_from)?;
        fold.finish()?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// By the coordinator's code, from memory.
    fn fold_apart(&mut self) -> Result<f64> {
        self.tasks += 1;
        let began = Instant::now();
        let mut fold = self.sum.begin(TaskId(self.tasks), 1, &self.verified)?;
        folding::cut(&mut fold, self.verified.bytes());
        let mut rest = &self.raw[..];
        let mut slices = Vec::new();
        for part in fold.parts() {
            let slice;
            (slice, rest) = rest.split_at(usize::try_from(part.bytes().end - part.bytes().start)?);
            slices.push(slice);
        }
        folding::fold(&mut fold, slices, |slice, part| {
            part.add(slice);
            anyhow::Ok(())
        })?;
        fold.finish()?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// As the coordinator does it.
    fn fold_stored_apart(&mut self) -> Result<f64> {
        self.tasks += 1;
        let began = Instant::now();
        let mut fold = self.sum.begin(TaskId(self.tasks), 1, &self.verified)?;
        folding::cut(&mut fold, self.verified.bytes());
        let open = |part: &Part<'_>| open_at(self.stored.path(), part.bytes().start);
        let files = fold.parts().iter().map(open).collect::<Result<Vec<File>>>()?;
        folding::fold(&mut fold, files, folding::add_from)?;
        fold.finish()?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn moves(&mut self) -> Result<f64> {
        let began = Instant::now();
        let (numbers, _) = self.raw.as_chunks();
        move_through(&mut self.cells, numbers);
        Ok(began.elapsed().as_secs_f64())
    }

    fn move_stored(&mut self) -> Result<f64> {
        let began = Instant::now();
        move_from(open_at(self.stored.path(), 0)?, &mut self.cells)?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// On as many threads as the coordinator folds on.
    fn move_apart(&mut self) -> Result<f64> {
        let began = Instant::now();
        let (numbers, _) = self.raw.as_chunks();
        let each = numbers.len().div_ceil(crew::threads());
        thread::scope(|scope| {
            for (cells, numbers) in self.cells.chunks_mut(each).zip(numbers.chunks(each)) {
                scope.spawn(|| move_through(cells, numbers));
            }
        });
        Ok(began.elapsed().as_secs_f64())
    }

    fn move_stored_apart(&mut self) -> Result<f64> {
        let began = Instant::now();
        let each = self.cells.len().div_ceil(crew::threads());
        let path = self.stored.path();
        let moved: Result<()> = thread::scope(|scope| {
            let start = |(at, cells)| scope.spawn(move || move_from(open_at(path, 4 * (at * each) as u64)?, cells));
            let threads: Vec<_> = self.cells.chunks_mut(each).enumerate().map(start).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        moved.map(|()| began.elapsed().as_secs_f64())
    }

    fn verify(&mut self) -> Result<f64> {
        let began = Instant::now();
        verified(&self.raw, self.verified.hash())?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn hash(&mut self) -> Result<f64> {
        let began = Instant::now();
        let mut checker = Checker::new(self.raw.len() as u64, self.verified.hash());
        self.raw.chunks(RECORD_BYTES_MAX).try_for_each(|record| checker.update(record))?;
        checker.finish()?;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// By records, as a payload comes.
fn verified(raw: &[u8], hash: Hash) -> Result<Verified> {
    let mut verifier = Verifier::new(Ring::weighted(), raw.len() as u64, hash);
    raw.chunks(RECORD_BYTES_MAX).try_for_each(|record| verifier.update(record))?;
    Ok(verifier.finish()?)
}

fn open_at(path: &Path, from: u64) -> Result<File> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    Ok(file)
}

/// Moves the numbers of as many cells as there are, by pieces.
fn move_from(mut file: File, mut cells: &mut [u64]) -> Result<()> {
    let mut piece = vec![0; PIECE_BYTES.min(4 * cells.len())];
    while !cells.is_empty() {
        let bytes = piece.len().min(4 * cells.len());
        file.read_exact(&mut piece[..bytes])?;
        let (numbers, _) = piece[..bytes].as_chunks();
        let (to, rest) = cells.split_at_mut(numbers.len());
        move_through(to, numbers);
        cells = rest;
    }
    Ok(())
}

/// Reads each number and each cell, and writes the cell: the least that a fold could do.
fn move_through(cells: &mut [u64], numbers: &[[u8; 4]]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: all that it asks for is a processor with AVX2, and this is one.
        #[allow(unsafe_code)]
        return unsafe { move_by_avx2(cells, numbers) };
    }
    move_plainly(cells, numbers);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn move_by_avx2(cells: &mut [u64], numbers: &[[u8; 4]]) {
    move_plainly(cells, numbers);
}

#[inline(always)]
fn move_plainly(cells: &mut [u64], numbers: &[[u8; 4]]) {
    for (cell, number) in cells.iter_mut().zip(numbers) {
        *cell = cell.wrapping_add(u64::from(u32::from_le_bytes(*number)));
    }
}
