//! The names of things: hashes, runs, workers, tasks, and our own clock.
//!
//! Every identifier is a newtype, so that a task can never be mistaken for a round. Byte identifiers print as
//! lower-case hex, travel as raw bytes in postcard, and as hex strings in JSON and TOML.

use core::fmt;
use core::str::FromStr;
use core::time::Duration;

use data_encoding::HEXLOWER;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// The raw bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), HEXLOWER.encode(&self.0[..6]))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let bytes = HEXLOWER.decode(text.as_bytes()).map_err(|_| IdError::NotHex)?;
                let got = bytes.len();
                let bytes = bytes.try_into().map_err(|_| IdError::Length { got, expected: $len })?;
                Ok(Self(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

byte_id!(
    /// A BLAKE3 hash.
    Hash,
    32
);
byte_id!(
    /// A training run: 16 random bytes, drawn by the coordinator when the run begins.
    RunId,
    16
);
byte_id!(
    /// A worker: the first 16 bytes of the SHA-256 of its Ed25519 public key.
    WorkerId,
    16
);
byte_id!(
    /// A content that is sealed once and streamed to many: 16 random bytes.
    ContentId,
    16
);

impl Hash {
    /// The hash of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl From<blake3::Hash> for Hash {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

/// Why a text is not an identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Some character is not a lower-case hex digit, or their number is odd.
    #[error("not lower-case hex digits")]
    NotHex,
    /// The number of bytes is wrong.
    #[error("{got} bytes, expected {expected}")]
    Length {
        /// How many bytes the text has.
        got: usize,
        /// How many the identifier has.
        expected: usize,
    },
    /// The name has a character that names may not have, or the wrong length.
    #[error("a name has 1 to {max} characters from a-z, A-Z, 0-9, '-', '_' and '.', and starts with a letter or digit", max = WORKER_NAME_LEN_MAX)]
    Name,
}

/// A unit of work. Never used again within a run: the high half counts the starts of the coordinator (durable at
/// each start), the low half the tasks since.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskId(pub u64);

impl TaskId {
    /// The `count`th task since the `start`th start.
    #[must_use]
    pub fn new(start: u32, count: u32) -> Self {
        Self(u64::from(start) << 32 | u64::from(count))
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TaskId({self})")
    }
}

/// A nonce per worker process: of two live processes with one identity the newer wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Instance(pub u64);

/// One connection of one worker, as the coordinator's shell counts them, in the order in which their peers have proved who
/// they are. Never used again within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// Nanoseconds since the process started. The machines never read a clock: whoever calls them says what time it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// The instant `duration` later; saturates at the end of time, 584 years on.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(nanos))
    }

    /// How long it is since `earlier`; zero if that lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// The longest worker name, in bytes.
pub const WORKER_NAME_LEN_MAX: usize = 64;

/// A worker's name, unique in its fleet: 1 to 64 of `a-z A-Z 0-9 - _ .`, the first a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct WorkerName(String);

impl WorkerName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name nearest to `text`: what is not allowed becomes `-`, and an empty one becomes `worker`.
    #[must_use]
    pub fn nearest(text: &str) -> Self {
        let kept: String = text
            .chars()
            .map(|c| if is_name_char(c) { c } else { '-' })
            .skip_while(|c| !c.is_ascii_alphanumeric())
            .take(WORKER_NAME_LEN_MAX)
            .collect();
        Self(if kept.is_empty() { "worker".to_owned() } else { kept })
    }
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

impl FromStr for WorkerName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let fits = (1..=WORKER_NAME_LEN_MAX).contains(&text.len())
            && text.chars().all(is_name_char)
            && text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if fits { Ok(Self(text.to_owned())) } else { Err(IdError::Name) }
    }
}

impl fmt::Display for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl<'de> Deserialize<'de> for WorkerName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn identifiers_survive_text_and_json() {
        let id = WorkerId([7; 16]);
        assert_eq!(id.to_string().parse::<WorkerId>().unwrap(), id);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<WorkerId>(&json).unwrap(), id);
        assert_eq!("07".parse::<WorkerId>(), Err(IdError::Length { got: 1, expected: 16 }));
        assert_eq!("xy".parse::<WorkerId>(), Err(IdError::NotHex));
    }

    #[test]
    fn a_task_of_a_later_start_is_never_one_of_an_earlier() {
        assert!(TaskId::new(2, 0) > TaskId::new(1, u32::MAX));
        assert_eq!(TaskId::new(3, 9).to_string(), "3.9");
    }

    #[test]
    fn names_are_bounded_and_printable() {
        assert!("shard-2.csv".parse::<WorkerName>().is_ok());
        for bad in ["", "-a", "a b", "naïve", &"x".repeat(65)] {
            assert_eq!(bad.parse::<WorkerName>(), Err(IdError::Name), "{bad:?}");
        }
        assert_eq!(WorkerName::nearest("  my file (1)").as_str(), "my-file--1-");
        assert_eq!(WorkerName::nearest("日本").as_str(), "worker");
    }

    #[test]
    fn time_saturates() {
        assert_eq!(Time(5).after(Duration::MAX), Time(u64::MAX));
        assert_eq!(Time(5).since(Time(9)), Duration::ZERO);
    }
}
