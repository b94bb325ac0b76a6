//! Vigil: a loop that is answered at once does not fall asleep before the answer.
//!
//! To wake a thread takes 30 µs and more where its core sleeps too and the machine is a virtual one: as long as to verify the
//! signature that it is woken for. Rounds of less than a millisecond wait several times for what comes within some hundred
//! microseconds. So while all that the loop waited for lately came soon, its thread looks again instead of falling asleep, for
//! [`SOON`] at most, and only until somebody else wants its core. Where anything takes longer, as in any round that trains for
//! a while, it sleeps as always.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// What comes within so long is worth staying awake for. With 100 µs a round of two workers was no shorter, with 300 a fifth,
/// with 500 no more than that.
const SOON: Duration = Duration::from_micros(300);

/// So many answers in a row came soon before the next is waited for awake.
const OFTEN: u32 = 8;

/// A turn that was given away and took longer than this to come back was taken by somebody.
const TAKEN: Duration = Duration::from_micros(10);

/// Keeps the thread of the loop that waits awake, while that pays.
#[derive(Debug)]
pub(crate) struct Vigil {
    kept: Arc<Kept>,
    /// Since when the loop waits.
    since: Option<Instant>,
    /// Answers in a row that came soon.
    soon: u32,
    _watch: JoinSet<()>,
}

#[derive(Debug)]
struct Kept {
    asked: Notify,
    began: Instant,
    /// Until when, in nanoseconds since `began`.
    until: AtomicU64,
}

impl Vigil {
    /// For a loop of this runtime. Where that has several threads, another one than the loop's is woken by what comes, and
    /// nobody stays awake.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub(crate) fn new() -> Self {
        let kept = Arc::new(Kept { asked: Notify::new(), began: Instant::now(), until: AtomicU64::new(0) });
        let mut watch = JoinSet::new();
        if Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
            let kept = Arc::clone(&kept);
            watch.spawn(async move {
                loop {
                    kept.asked.notified().await;
                    kept.keep().await;
                }
            });
        }
        Self { kept, since: None, soon: 0, _watch: watch }
    }

    /// The loop has done all that it can. To say so again before an answer has come changes nothing.
    pub(crate) fn wait(&mut self) {
        if self.since.is_none() {
            self.wait_from(Instant::now());
        }
    }

    /// What the loop waited for has come.
    pub(crate) fn answered(&mut self) {
        self.answered_at(Instant::now());
    }

    fn wait_from(&mut self, now: Instant) {
        self.since = Some(now);
        if self.soon >= OFTEN {
            self.kept.until.store(self.kept.nanos(now + SOON), Ordering::Relaxed);
            self.kept.asked.notify_one();
        }
    }

    fn answered_at(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.kept.until.store(0, Ordering::Relaxed);
            self.soon = if now - since <= SOON { (self.soon + 1).min(OFTEN) } else { 0 };
        }
    }
}

impl Kept {
    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from((at - self.began).as_nanos()).unwrap_or(u64::MAX)
    }

    fn lasts(&self, now: Instant) -> bool {
        self.nanos(now) < self.until.load(Ordering::Relaxed)
    }

    /// Has the runtime look whether something has come, again and again.
    async fn keep(&self) {
        let mut now = Instant::now();
        while self.lasts(now) {
            tokio::task::yield_now().await;
            let before = Instant::now();
            thread::yield_now();
            now = Instant::now();
            if now - before > TAKEN {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    use std::sync::atomic::AtomicUsize;

    use tokio::runtime::Builder;

    /// Waits until this much later. Whether it would have been awake a moment before.
    fn after(vigil: &mut Vigil, now: &mut Instant, wait: Duration) -> bool {
        vigil.wait_from(*now);
        let awake = vigil.kept.lasts(*now + wait - Duration::from_nanos(1));
        *now += wait;
        vigil.answered_at(*now);
        assert!(!vigil.kept.lasts(*now), "it ends with the answer");
        awake
    }

    #[tokio::test]
    async fn a_vigil_is_kept_after_answers_that_came_soon_and_given_up_after_one_that_did_not() {
        let (mut vigil, mut now) = (Vigil::new(), Instant::now());
        for _ in 0..3 {
            for _ in 0..OFTEN {
                assert!(!after(&mut vigil, &mut now, SOON), "not often enough yet");
            }
            assert!(after(&mut vigil, &mut now, SOON / 2));
            assert!(after(&mut vigil, &mut now, SOON));
            assert!(!after(&mut vigil, &mut now, 2 * SOON), "no longer than that");
        }
    }

    #[test]
    fn a_thread_that_keeps_a_vigil_sleeps_again_when_nothing_comes() {
        let sleeps = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&sleeps);
        let mut builder = Builder::new_current_thread();
        builder.enable_time().on_thread_park(move || _ = count.fetch_add(1, Ordering::Relaxed));
        builder.build().unwrap().block_on(async {
            let mut vigil = Vigil::new();
            for _ in 0..OFTEN {
                vigil.wait_from(Instant::now());
                vigil.answered_at(vigil.since.unwrap());
            }
            vigil.wait();
            let before = sleeps.load(Ordering::Relaxed);
            tokio::time::sleep(20 * SOON).await;
            assert!(!vigil.kept.lasts(Instant::now()));
            assert!(sleeps.load(Ordering::Relaxed) > before, "it looked again for all of the time");
        });
    }
}
