//! Work on large things that is shared between some threads for as long as it takes.
//!
//! Whoever asks works too, and the others are started for it: that costs some tens of microseconds, and the other cores may
//! have work of their own. So what is small is not shared, and what is large is cut into more parts than there are threads:
//! each takes the next when it has done one, and whoever comes late holds nobody up.

use std::num::NonZero;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;

/// Threads that share one thing. More than a few do not make memory faster, for which such work waits.
static THREADS: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, NonZero::get).min(4));

/// Parts for each thread.
const PARTS_A_THREAD: usize = 4;

/// Below this a part is not worth a thread: folding one takes 0.6 ms, in which a second thread has hardly begun.
const PART_BYTES_MIN: u64 = 4 << 20;

/// How many threads share what is large.
#[must_use]
pub fn threads() -> usize {
    *THREADS
}

/// Into how many parts so many bytes of numbers are best cut; 1 if they are not worth it.
#[must_use]
pub fn parts(bytes: u64) -> usize {
    let worth = usize::try_from(bytes / PART_BYTES_MIN).unwrap_or(usize::MAX);
    if *THREADS > 1 { worth.clamp(1, PARTS_A_THREAD * *THREADS) } else { 1 }
}

/// Does `work` with each of `items`, which are begun in their order and are of so many `bytes` in all, on as many threads as
/// pay.
///
/// # Errors
/// One of those that `work` gave. Items that were not begun by then may be left.
pub fn share<T: Send, E: Send>(
    bytes: u64,
    items: impl ExactSizeIterator<Item = T> + Send,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let helpers = if parts(bytes) > 1 { items.len().min(*THREADS).saturating_sub(1) } else { 0 };
    let items = Mutex::new(items);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(item) = next() {
            work(item)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        // Where there is no thread to be had, who is here does it all.
        let start = |_| thread::Builder::new().name("crew".to_owned()).spawn_scoped(scope, work).ok();
        let helpers: Vec<_> = (0..helpers).filter_map(start).collect();
        let ours = work();
        let theirs =
            helpers.into_iter().map(|helper| helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        theirs.fold(ours, Result::and)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_once_and_an_error_comes_back() {
        for bytes in [0, 1 << 30] {
            let mut seen = [0; 100];
            let done: Result<(), ()> = share(bytes, seen.iter_mut().enumerate(), |(at, slot)| {
                *slot += at;
                Ok(())
            });
            assert_eq!((done, seen), (Ok(()), std::array::from_fn(|at| at)));
            assert_eq!(share(bytes, 0..100, |at| if at == 77 { Err(at) } else { Ok(()) }), Err(77));
            assert_eq!(share(bytes, 0..0, |_: i32| Err(())), Ok(()));
        }
    }

    #[test]
    fn what_is_small_is_not_cut_and_what_is_large_has_more_parts_than_threads() {
        assert_eq!((parts(0), parts(PART_BYTES_MIN * 2 - 1)), (1, 1));
        assert_eq!(parts(1 << 40), if threads() > 1 { PARTS_A_THREAD * threads() } else { 1 });
    }
}
