//! Memory for long runs of numbers, on pages of 2 MiB where the kernel has them.
//!
//! The sum of a large model is walked from end to end once for each update. On pages of 4 KiB the walk waits for the page
//! table as often as for the numbers, and the first walk for a fault in each page.

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use memmap2::MmapMut;

/// From here on a run has pages of its own: some large ones. Less would waste most of the last one.
const LARGE_BYTES: usize = 8 << 20;

/// Numbers, zero at first, whose count does not change.
pub struct Numbers<T>(Place<T>);

enum Place<T> {
    Small(Vec<T>),
    Large(MmapMut),
}

impl<T: Pod> Numbers<T> {
    /// `count` zeros.
    #[must_use]
    pub fn zeroed(count: usize) -> Self {
        let bytes = count.saturating_mul(size_of::<T>());
        let large = (bytes >= LARGE_BYTES).then(|| MmapMut::map_anon(bytes).ok()).flatten();
        Self(match large {
            Some(map) => {
                advise(&map);
                Place::Large(map)
            }
            // If there is no memory at all, this says so as any other vector does.
            None => Place::Small(vec![T::zeroed(); count]),
        })
    }
}

/// Asks for large pages. A kernel that has none refuses, and nothing else changes.
#[cfg(target_os = "linux")]
fn advise(map: &MmapMut) {
    let _ = map.advise(memmap2::Advice::HugePage);
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &MmapMut) {}

impl<T: Pod> Deref for Numbers<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Place::Small(numbers) => numbers,
            Place::Large(map) => cast_slice(map),
        }
    }
}

impl<T: Pod> DerefMut for Numbers<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Place::Small(numbers) => numbers,
            Place::Large(map) => cast_slice_mut(map),
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
        let mut copy = Self::zeroed(self.len());
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
}
