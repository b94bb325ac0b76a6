//! Leisure: what an idle fleet says is heard together.
//!
//! A connection without work sends a keep-alive now and then, and is acknowledged after a while. Of a thousand connections each
//! of the two wakes a sleeping thread for itself, and waking takes as long as answering. Nobody waits for either. So a thread
//! that found nothing else for a while sleeps for a moment before it looks again, and finds several at once. The first thing
//! that is longer than a keep-alive ends this; it has waited for a moment at most.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use crate::limits::{KEEP_ALIVE_BYTES_MAX, LEISURE_AFTER, REST};
use crate::socket::{Traffic, TrafficTotals};

/// Whether a server is at leisure. Clones tell of the same server: the one that it was given to.
#[derive(Debug, Clone, Default)]
pub struct Leisure {
    pub(crate) traffic: Traffic,
    seen: Arc<Mutex<Option<Seen>>>,
}

#[derive(Debug)]
struct Seen {
    totals: TrafficTotals,
    /// When more than keep-alives passed, at the latest.
    busy: Instant,
}

impl Leisure {
    /// Blocks the thread for [`REST`] if nothing but keep-alives passed since the last call, and for some time before. For a
    /// runtime to call before each of its threads goes to sleep.
    pub fn rest(&self) {
        if self.is_now(Instant::now()) {
            thread::sleep(REST);
        }
    }

    fn is_now(&self, now: Instant) -> bool {
        // If another thread is asking, one of the two rests at most.
        let Ok(mut seen) = self.seen.try_lock() else { return false };
        let totals = self.traffic.totals();
        let seen = seen.get_or_insert(Seen { totals, busy: now });
        let (bytes, datagrams) = (totals.bytes() - seen.totals.bytes(), totals.datagrams() - seen.totals.datagrams());
        seen.totals = totals;
        if bytes > datagrams * KEEP_ALIVE_BYTES_MAX {
            seen.busy = now;
        }
        datagrams > 0 && now.duration_since(seen.busy) >= LEISURE_AFTER
    }
}

impl TrafficTotals {
    fn bytes(&self) -> u64 {
        self.sent_bytes + self.received_bytes
    }

    fn datagrams(&self) -> u64 {
        self.sent_datagrams + self.received_datagrams
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Direction;

    /// A ping and its acknowledgement.
    fn keep_alive(leisure: &Leisure) {
        leisure.traffic.count(Direction::Received, 31, 1);
        leisure.traffic.count(Direction::Sent, 43, 1);
    }

    #[test]
    fn a_server_that_hears_nothing_but_keep_alives_for_a_while_is_at_leisure() {
        let (leisure, began) = (Leisure::default(), Instant::now());
        keep_alive(&leisure);
        assert!(!leisure.is_now(began), "it has just begun");
        keep_alive(&leisure);
        assert!(!leisure.is_now(began + LEISURE_AFTER / 2));
        keep_alive(&leisure);
        assert!(leisure.is_now(began + LEISURE_AFTER));
        assert!(!leisure.is_now(began + 2 * LEISURE_AFTER), "nothing passed: what comes next is heard at once");
        keep_alive(&leisure);
        assert!(leisure.is_now(began + 3 * LEISURE_AFTER));
    }

    #[test]
    fn one_handshake_or_message_among_keep_alives_ends_the_leisure() {
        let (leisure, began) = (Leisure::default(), Instant::now());
        assert!(!leisure.is_now(began));
        for (bytes, at) in [(1_200, 1), (75, 2)] {
            let at = began + 10 * at * LEISURE_AFTER;
            keep_alive(&leisure);
            assert!(leisure.is_now(at));
            keep_alive(&leisure);
            leisure.traffic.count(Direction::Received, bytes, 1);
            assert!(!leisure.is_now(at + LEISURE_AFTER));
            keep_alive(&leisure);
            assert!(!leisure.is_now(at + LEISURE_AFTER + LEISURE_AFTER / 2));
            keep_alive(&leisure);
            assert!(leisure.is_now(at + 2 * LEISURE_AFTER));
        }
    }
}
