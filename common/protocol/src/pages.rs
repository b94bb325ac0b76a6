//! Memory for long runs of numbers, on pages of 2 MiB where the kernel has them.
//!
//! The sum of a large model is walked from end to end once for each update. On pages of 4 KiB the walk waits for the page
//! table as often as for the numbers, and the first walk for a fault in each page.
//!
//! A fresh page costs more than its first use: the kernel clears it, and a hypervisor may have to find it first. A round needs
//! the same few runs as the one before it, so some that are dropped are kept for whoever needs one next.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use memmap2::MmapMut;

/// From here on a run has pages of its own: some large ones. Less would waste most of the last one.
const LARGE_BYTES: usize = 8 << 20;

/// The length of a large page, of which maps have a whole number: so lengths that differ by little have one map.
const PAGE_BYTES: usize = 2 << 20;

/// What is kept at most, of all that was dropped.
const SPARE_BYTES_MAX: usize = 256 << 20;

static SPARES: Spares = Spares(Mutex::new(Vec::new()));

/// Gives all that is kept back to the system: for whoever needs none for a while.
pub fn give_back() {
    SPARES.give_back();
}

/// Numbers whose count does not change.
pub struct Numbers<T>(Place<T>);

enum Place<T> {
    Small(Vec<T>),
    Large(Map, usize),
}

/// A map that is kept when it is dropped.
struct Map(Option<MmapMut>);

/// Maps that nobody has, with what was in them.
struct Spares(Mutex<Vec<MmapMut>>);

impl Spares {
    /// One that is long enough, and not much longer.
    fn take(&self, bytes: usize) -> Option<MmapMut> {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = bytes.saturating_add(bytes / 8).max(in_pages(bytes)?);
        let fits = |spare: &MmapMut| (bytes..=longest).contains(&spare.len());
        let at = spares.iter().position(fits)?;
        Some(spares.remove(at))
    }

    fn give_back(&self) {
        let spares = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        // As below: unlocked by now.
        drop(spares);
    }

    /// Keeps the newest.
    fn keep(&self, map: MmapMut) {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spares.push(map);
        let mut total: usize = spares.iter().map(|spare| spare.len()).sum();
        let over = spares.iter().take_while(|spare| {
            let is_over = total > SPARE_BYTES_MAX;
            total -= spare.len();
            is_over
        });
        let over = over.count();
        let over: Vec<MmapMut> = spares.drain(..over).collect();
        drop(spares);
        // Which takes a while, and nobody need wait for it.
        drop(over);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if let Some(map) = self.0.take() {
            SPARES.keep(map);
        }
    }
}

impl<T: Pod> Numbers<T> {
    /// `count` zeros.
    #[must_use]
    pub fn zeroed(count: usize) -> Self {
        Self::with(count, |numbers| numbers.fill(T::zeroed()))
    }

    /// `count` numbers for whoever writes all of them: until then they are anything, such as what was here before.
    #[must_use]
    pub fn unset(count: usize) -> Self {
        Self::with(count, |_| ())
    }

    /// Fresh ones are zero; those that were used are shown to `reset`.
    fn with(count: usize, reset: impl FnOnce(&mut [T])) -> Self {
        let bytes = count.saturating_mul(size_of::<T>());
        if bytes >= LARGE_BYTES {
            if let Some(spare) = SPARES.take(bytes) {
                let mut used = Self(Place::Large(Map(Some(spare)), bytes));
                reset(&mut used);
                return used;
            }
            if let Some(map) = in_pages(bytes).and_then(|bytes| MmapMut::map_anon(bytes).ok()) {
                advise(&map);
                return Self(Place::Large(Map(Some(map)), bytes));
            }
        }
        // If there is no memory at all, this says so as any other vector does.
        Self(Place::Small(vec![T::zeroed(); count]))
    }
}

/// The length of a map for so many bytes.
fn in_pages(bytes: usize) -> Option<usize> {
    bytes.checked_next_multiple_of(PAGE_BYTES)
}

/// Asks for large pages. A kernel that has none refuses, and nothing else changes.
#[cfg(target_os = "linux")]
fn advise(map: &MmapMut) {
    let _ = map.advise(memmap2::Advice::HugePage);
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &MmapMut) {}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl DerefMut for Map {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }
}

impl<T: Pod> Deref for Numbers<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Place::Small(numbers) => numbers,
            Place::Large(map, bytes) => cast_slice(&map[..*bytes]),
        }
    }
}

impl<T: Pod> DerefMut for Numbers<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Place::Small(numbers) => numbers,
            Place::Large(map, bytes) => cast_slice_mut(&mut map[..*bytes]),
        }
    }
}

/// Numbers that are there already, where they are.
impl<T> From<Vec<T>> for Numbers<T> {
    fn from(numbers: Vec<T>) -> Self {
        Self(Place::Small(numbers))
    }
}

impl<T: Pod> AsRef<[T]> for Numbers<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T: Pod> Clone for Numbers<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::unset(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Pod + PartialEq> PartialEq for Numbers<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

/// Without the numbers: they may be parameters.
impl<T: Pod> core::fmt::Debug for Numbers<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Numbers").field("count", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_are_zero_and_kept_and_copied_on_both_kinds_of_pages() {
        for count in [0, 3, LARGE_BYTES / 8, LARGE_BYTES / 8 + 5] {
            let mut numbers = Numbers::<u64>::zeroed(count);
            assert_eq!((numbers.len(), numbers.iter().max().copied()), (count, (count > 0).then_some(0)));
            let earlier = numbers.clone();
            assert_eq!(numbers, earlier);
            for (at, number) in numbers.iter_mut().enumerate() {
                *number = at as u64 + 1;
            }
            assert_eq!(numbers.clone(), numbers);
            assert_eq!(numbers.last().copied().unwrap_or_default(), count as u64);
            assert_eq!(numbers == earlier, count == 0);
        }
    }

    #[test]
    fn what_was_used_before_is_zero_again_and_has_its_own_length() {
        for count in [LARGE_BYTES, LARGE_BYTES + 1, LARGE_BYTES + PAGE_BYTES / 2] {
            Numbers::<u8>::unset(LARGE_BYTES + PAGE_BYTES / 2).fill(7);
            let numbers = Numbers::<u8>::zeroed(count);
            assert_eq!((numbers.len(), numbers.iter().max()), (count, Some(&0)));
        }
    }

    #[test]
    fn a_map_fits_whatever_it_was_made_for() {
        for bytes in [LARGE_BYTES, LARGE_BYTES + 1, LARGE_BYTES + PAGE_BYTES + 1] {
            let spares = Spares(Mutex::new(Vec::new()));
            spares.keep(MmapMut::map_anon(in_pages(bytes).unwrap()).unwrap());
            assert!(spares.take(bytes).is_some(), "{bytes} bytes");
        }
    }

    #[test]
    fn as_much_is_kept_as_may_be_and_what_fits_is_given_out() {
        let spares = Spares(Mutex::new(Vec::new()));
        let map = |pages: usize| MmapMut::map_anon(pages * PAGE_BYTES).unwrap();
        for pages in [100, 8, 9, 20] {
            spares.keep(map(pages));
        }
        let lengths =
            |spares: &Spares| spares.0.lock().unwrap().iter().map(|map| map.len() / PAGE_BYTES).collect::<Vec<_>>();
        assert_eq!(lengths(&spares), [8, 9, 20], "137 pages are more than may be kept: the oldest goes");
        assert!(spares.take(21 * PAGE_BYTES).is_none() && spares.take(10 * PAGE_BYTES).is_none());
        assert_eq!(spares.take(8 * PAGE_BYTES + 1).map(|map| map.len()), Some(9 * PAGE_BYTES));
        assert_eq!(spares.take(8 * PAGE_BYTES).map(|map| map.len()), Some(8 * PAGE_BYTES));
        assert_eq!(lengths(&spares), [20]);
        spares.give_back();
        assert!(lengths(&spares).is_empty());
        spares.keep(map(200));
        assert!(lengths(&spares).is_empty(), "one that is longer than all that may be kept is not kept");
    }
}
