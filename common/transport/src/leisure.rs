//! Leisure: what an idle fleet says is heard together.
//!
//! A connection without work sends a keep-alive now and then, and is acknowledged after a while. Of a thousand connections each
//! of the two wakes a sleeping thread for itself, and finds a connection that has left the caches since; that takes longer than
//! answering. Nobody waits for either. So while nothing else passed for a while, a thread to which something has come sleeps
//! for a moment before it receives it, and finds several at once, each so late already that it is acknowledged together with
//! being heard: quinn takes them for arrived when it began to look. The first thing that is longer than a keep-alive ends this;
//! it has waited for a moment at most.

use std::sync::Mutex;
use std::thread;
use std::time::Instant;

use crate::limits::{KEEP_ALIVE_BYTES_MAX, LEISURE_AFTER, OFTEN, REST};
use crate::socket::{Traffic, TrafficTotals};

/// Whether a server is at leisure.
#[derive(Debug)]
pub(crate) struct Leisure {
    traffic: Traffic,
    seen: Mutex<Option<Seen>>,
}

#[derive(Debug)]
struct Seen {
    totals: TrafficTotals,
    /// When more than keep-alives passed, at the latest.
    busy: Instant,
    /// When something came, at the latest.
    came: Instant,
}

impl Leisure {
    pub(crate) fn new(traffic: Traffic) -> Self {
        Self { traffic, seen: Mutex::default() }
    }

    /// Blocks the thread for [`REST`] if nothing but keep-alives passed since the last call, and for some time before. For a
    /// socket to call when something has come.
    pub(crate) fn rest(&self) {
        if self.is_now(Instant::now()) {
            thread::sleep(REST);
        }
    }

    fn is_now(&self, now: Instant) -> bool {
        // If another thread is asking, one of the two rests at most.
        let Ok(mut seen) = self.seen.try_lock() else { return false };
        let totals = self.traffic.totals();
        let seen = seen.get_or_insert(Seen { totals, busy: now, came: now });
        let (bytes, datagrams) = (totals.bytes() - seen.totals.bytes(), totals.datagrams() - seen.totals.datagrams());
        seen.totals = totals;
        if bytes > datagrams * KEEP_ALIVE_BYTES_MAX {
            seen.busy = now;
        }
        let often = now.duration_since(seen.came) < OFTEN;
        seen.came = now;
        datagrams > 0 && often && now.duration_since(seen.busy) >= LEISURE_AFTER
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
    use std::time::Duration;

    use super::*;
    use crate::socket::Direction;

    /// A ping and its acknowledgement.
    fn keep_alive(leisure: &Leisure) {
        leisure.traffic.count(Direction::Received, 31, 1);
        leisure.traffic.count(Direction::Sent, 43, 1);
    }

    /// Asks after a keep-alive.
    fn asked(leisure: &Leisure, at: Instant) -> bool {
        keep_alive(leisure);
        leisure.is_now(at)
    }

    fn leisure() -> Leisure {
        Leisure::new(Traffic::default())
    }

    #[test]
    fn a_server_that_hears_nothing_but_keep_alives_for_a_while_is_at_leisure() {
        let (leisure, began) = (leisure(), Instant::now());
        assert!(!asked(&leisure, began), "it has just begun");
        assert!(!asked(&leisure, began + LEISURE_AFTER / 2));
        assert!(asked(&leisure, began + LEISURE_AFTER));
        assert!(!leisure.is_now(began + 2 * LEISURE_AFTER), "nothing passed: what comes next is heard at once");
        assert!(asked(&leisure, began + 3 * LEISURE_AFTER));
    }

    #[test]
    fn keep_alives_that_come_one_by_one_are_heard_at_once() {
        let (leisure, began) = (leisure(), Instant::now());
        for count in 0..5 {
            assert!(!asked(&leisure, began + count * OFTEN));
        }
        assert!(asked(&leisure, began + 5 * OFTEN - REST));
    }

    #[test]
    fn one_handshake_or_message_among_keep_alives_ends_the_leisure() {
        let (leisure, mut now) = (leisure(), Instant::now());
        let mut after = |step: Duration| {
            now += step;
            now
        };
        assert!(!asked(&leisure, after(REST)));
        for bytes in [1_200, 75] {
            assert!(!asked(&leisure, after(REST / 2)));
            assert!(asked(&leisure, after(LEISURE_AFTER)));
            leisure.traffic.count(Direction::Received, bytes, 1);
            assert!(!asked(&leisure, after(REST)));
            assert!(!asked(&leisure, after(REST)));
            assert!(asked(&leisure, after(LEISURE_AFTER)));
            leisure.traffic.count(Direction::Received, bytes, 1);
            assert!(!asked(&leisure, after(REST)));
        }
    }
}
