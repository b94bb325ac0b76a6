//! Named points between which a power cut makes a difference, and a way to end the process exactly there.
//!
//! [`point`] does nothing, unless this is built with the feature `crash-points`: then the process aborts when it comes
//! by the point named in `TRIBUTARY_CRASH_AT="name:n"` for the `n`th time. No release has that feature.

/// Every point, in the order in which a round passes them.
pub const POINTS: [&str; 14] = [
    "payload.before",
    "payload.after",
    "journal.before",
    "journal.after",
    "journal-sync.before",
    "journal-sync.after",
    "checkpoint.before",
    "checkpoint.after",
    "commit.before",
    "commit.after",
    "commit-sync.before",
    "commit-sync.after",
    "answer.before",
    "answer.after",
];

/// The process passes the point `name`.
#[cfg(not(feature = "crash-points"))]
#[inline]
pub fn point(_name: &'static str) {}

/// The process passes the point `name`, and may end here.
#[cfg(feature = "crash-points")]
pub fn point(name: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WHERE: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    debug_assert!(POINTS.contains(&name), "{name} is not among POINTS");
    let wanted = WHERE.get_or_init(|| std::env::var("TRIBUTARY_CRASH_AT").ok().map(|text| parse(&text)));
    if let Some((_, n)) = wanted.as_ref().filter(|(wanted, _)| wanted == name)
        && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *n
    {
        std::process::abort();
    }
}

/// A test that names a point which is not there would prove nothing.
#[cfg(feature = "crash-points")]
fn parse(text: &str) -> (String, u64) {
    let parsed = text.split_once(':').and_then(|(name, n)| Some((name.to_owned(), n.parse().ok()?)));
    match parsed.filter(|(name, n)| POINTS.contains(&name.as_str()) && *n > 0) {
        Some(wanted) => wanted,
        None => panic!("TRIBUTARY_CRASH_AT={text:?}: expected one of {POINTS:?}, a colon, and a count from 1"),
    }
}
