//! The wall clock of a world: what the store's records are stamped with. It is set by faults, and nothing may rest on it.

use std::cell::Cell;

thread_local! {
    static UNIX_MS: Cell<u64> = const { Cell::new(0) };
}

/// What the store is given.
#[must_use]
pub fn read() -> u64 {
    UNIX_MS.get()
}

pub(super) fn set(unix_ms: u64) {
    UNIX_MS.set(unix_ms);
}

pub(super) fn turn(seconds: i64) {
    UNIX_MS.set(UNIX_MS.get().saturating_add_signed(seconds.saturating_mul(1000)));
}
