//! The secure session: what two keys that know each other say once TLS stands.
//!
//! A Noise IK handshake ([`Initiator`], [`Responder`]) gives [`Established`]: who the peer is, a hash
//! of everything both said, and one secret for each direction. [`Session::begin`] turns that into the
//! control stream's two halves and a source of further stream keys:
//!
//! ```text
//! stream key = HKDF-Expand(direction secret, "tributary stream 1" ‖ u32 LE number ‖ handshake hash)
//! ```
//!
//! Every stream is a chain of [records](record) under its own key, counted from 0. A model is sealed
//! once for a whole fleet under a key of its own: [broadcast]. [Signatures](sign) outlive all of this.
//!
//! Nothing here performs IO, reads a clock or draws entropy: ephemeral and content keys come in as
//! arguments, and must be fresh. Any error of an opener means that the session is to be closed.

mod aead;
pub mod broadcast;
mod noise;
pub mod record;
mod secret;
pub mod sign;

use std::collections::BTreeSet;

pub use broadcast::{BroadcastHeader, BroadcastOpener, BroadcastSealer};
pub use noise::{
    Acquaintance, Established, HANDSHAKE_MESSAGE_MAX, HandshakeError, INITIATOR_OVERHEAD_BYTES, Initiator,
    RESPONDER_OVERHEAD_BYTES, Responder, StaticKey, prologue, public_key,
};
pub use record::{Flag, MessageAssembler, Opened, Opener, RecordError, RecordHeader, RecordKind, Sealer};

/// X25519 secrets, as the handshake takes them: wiped when dropped.
pub use x25519_dalek::StaticSecret;

use aead::AeadKey;
use secret::Secret;

/// How far a stream's number may lie below the highest one accepted: streams overtake each other, but
/// not by more than a peer may have open at once.
pub const STREAM_WINDOW: u32 = 1024;

const STREAM_CONTEXT: &[u8] = b"tributary stream 1";

/// Number 0 in both directions.
const CONTROL_STREAM: u32 = 0;

/// An established session: the key of each further stream, and who the peer is.
///
/// One task owns it; the [`Sealer`]s and [`Opener`]s that it gives out travel to whoever moves the
/// bytes. The number of a uni-directional stream travels outside of its records; one that was changed
/// on the way gives another key, so that the first tag fails.
#[derive(Debug)]
pub struct Session {
    handshake_hash: [u8; 32],
    remote_static: [u8; 32],
    sending: Secret,
    receiving: Secret,
    last_opened: u32,
    accepted: Accepted,
}

impl Session {
    /// The session and its control stream: what we seal for the peer, what it seals for us.
    pub fn begin(established: Established) -> (Self, Sealer, Opener) {
        let Established { handshake_hash, remote_static, sending, receiving } = established;
        let session = Self {
            handshake_hash,
            remote_static,
            sending,
            receiving,
            last_opened: CONTROL_STREAM,
            accepted: Accepted::default(),
        };
        let sealer = Sealer::new(RecordKind::Control, session.sending_key(CONTROL_STREAM));
        let opener = Opener::new(RecordKind::Control, session.receiving_key(CONTROL_STREAM));
        (session, sealer, opener)
    }

    /// The hash of everything that the handshake said: the same on both sides, and on no other session.
    pub fn handshake_hash(&self) -> &[u8; 32] {
        &self.handshake_hash
    }

    /// The X25519 public key that the peer proved to hold.
    pub fn remote_static(&self) -> &[u8; 32] {
        &self.remote_static
    }

    /// The next uni-directional stream that we open: its number, which the peer must learn, and its sealer.
    pub fn open_stream(&mut self) -> Result<(u32, Sealer), StreamError> {
        let number = self.last_opened.checked_add(1).ok_or(StreamError::Exhausted)?;
        self.last_opened = number;
        Ok((number, Sealer::new(RecordKind::Payload, self.sending_key(number))))
    }

    /// The opener of a uni-directional stream that the peer opened with this number.
    ///
    /// Every number is accepted once. Streams may arrive out of order, by less than [`STREAM_WINDOW`].
    pub fn accept_stream(&mut self, number: u32) -> Result<Opener, StreamError> {
        self.accepted.insert(number)?;
        Ok(Opener::new(RecordKind::Payload, self.receiving_key(number)))
    }

    fn sending_key(&self, number: u32) -> AeadKey {
        stream_key(&self.sending, number, &self.handshake_hash)
    }

    fn receiving_key(&self, number: u32) -> AeadKey {
        stream_key(&self.receiving, number, &self.handshake_hash)
    }
}

fn stream_key(direction: &Secret, number: u32, handshake_hash: &[u8; 32]) -> AeadKey {
    let key = direction.expand(&[STREAM_CONTEXT, &number.to_le_bytes(), handshake_hash]);
    AeadKey::new(key.bytes())
}

/// The numbers of the peer's streams, as far back as one may still arrive.
#[derive(Debug, Default)]
struct Accepted {
    highest: u32,
    /// At most [`STREAM_WINDOW`] numbers: those above `floor()`.
    recent: BTreeSet<u32>,
}

impl Accepted {
    fn insert(&mut self, number: u32) -> Result<(), StreamError> {
        if number == CONTROL_STREAM {
            return Err(StreamError::Control);
        }
        if number <= self.floor() {
            return Err(StreamError::TooOld { got: number, floor: self.floor() });
        }
        if !self.recent.insert(number) {
            return Err(StreamError::Repeated { got: number });
        }
        self.highest = self.highest.max(number);
        let floor = self.floor();
        while self.recent.first().is_some_and(|&oldest| oldest <= floor) {
            self.recent.pop_first();
        }
        Ok(())
    }

    /// Every number up to this one is refused, seen or not.
    fn floor(&self) -> u32 {
        self.highest.saturating_sub(STREAM_WINDOW)
    }
}

/// Why a stream's number is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// All 2^32 - 1 numbers are used.
    #[error("stream numbers of this session are used up; reconnect for new keys")]
    Exhausted,
    /// The control stream's number on another stream.
    #[error("stream number 0 belongs to the control stream")]
    Control,
    /// A number that was accepted before.
    #[error("stream {got} was opened before; each number is good for one stream")]
    Repeated {
        /// The number.
        got: u32,
    },
    /// A number so far below the highest that nobody can tell whether it was used.
    #[error("stream {got} is too old; numbers up to {floor} are past")]
    TooOld {
        /// The number.
        got: u32,
        /// The highest number that is refused unseen.
        floor: u32,
    },
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pair() -> (Session, Session) {
        let end = |sending, receiving| Established {
            handshake_hash: [0x68; 32],
            remote_static: [0; 32],
            sending: Secret::from([sending; 32]),
            receiving: Secret::from([receiving; 32]),
        };
        let (near, ..) = Session::begin(end(1, 2));
        let (far, ..) = Session::begin(end(2, 1));
        (near, far)
    }

    #[test]
    fn a_stream_number_is_accepted_once() {
        let (_, mut far) = pair();
        far.accept_stream(7).unwrap();
        assert_eq!(far.accept_stream(7).unwrap_err(), StreamError::Repeated { got: 7 });
        assert_eq!(far.accept_stream(0).unwrap_err(), StreamError::Control);
    }

    #[test]
    fn streams_may_overtake_each_other_within_the_window_only() {
        let (_, mut far) = pair();
        far.accept_stream(STREAM_WINDOW + 5).unwrap();
        assert_eq!(far.accept_stream(5).unwrap_err(), StreamError::TooOld { got: 5, floor: 5 });
        far.accept_stream(6).unwrap();
        assert_eq!(far.accept_stream(6).unwrap_err(), StreamError::Repeated { got: 6 });
    }

    #[test]
    fn the_window_never_holds_more_than_its_size() {
        let mut accepted = Accepted::default();
        for number in (1..5000).chain([u32::MAX - 1, u32::MAX]) {
            accepted.insert(number).unwrap();
            assert!(accepted.recent.len() <= STREAM_WINDOW as usize);
        }
        assert_eq!(accepted.recent.len(), 2);
    }

    #[test]
    fn stream_numbers_run_out_instead_of_wrapping() {
        let (mut near, _) = pair();
        assert_eq!(near.open_stream().unwrap().0, 1);
        near.last_opened = u32::MAX - 1;
        assert_eq!(near.open_stream().unwrap().0, u32::MAX);
        assert_eq!(near.open_stream().unwrap_err(), StreamError::Exhausted);
    }

    /// Made by `tests/data/session_golden.py` with Python's `cryptography`.
    #[test]
    fn the_key_schedule_and_a_record_have_these_bytes() {
        let (mut near, mut far) = pair();
        let (number, mut sealer) = near.open_stream().unwrap();
        let mut record = Vec::new();
        sealer.seal(Flag::Plain, b"first", &mut record).unwrap();
        let first = record.len();
        sealer.seal(Flag::Final, b"second and last", &mut record).unwrap();
        let hex = data_encoding::HEXLOWER;
        assert_eq!(hex.encode(&record[..first]), GOLDEN_FIRST);
        assert_eq!(hex.encode(&record[first..]), GOLDEN_LAST);

        let mut opener = far.accept_stream(number).unwrap();
        let (header, body) = record.split_first_chunk_mut().unwrap();
        let opened = opener.open_in_place(header, &mut body[..5 + 16]).unwrap();
        assert_eq!(opened.plaintext, b"first");
    }

    const GOLDEN_FIRST: &str = "01020000050000000000000000000000fbfcaf97a7133e6b904c51556cd9f661da5641c5cd";
    const GOLDEN_LAST: &str =
        "010201000f00000001000000000000001f3486439d03b664c88a99859eadce8e598b503155e41ac4922133aa5b2bad";

    #[test]
    fn everything_that_holds_a_key_is_wiped_when_dropped() {
        fn wiped<T: zeroize::ZeroizeOnDrop>() {}
        wiped::<Secret>();
        wiped::<StaticSecret>();
        wiped::<x25519_dalek::SharedSecret>();
        wiped::<sign::SigningKey>();
        wiped::<crate::messages::ContentKey>();
        wiped::<aes_gcm::Aes256Gcm>(); // only with its feature `zeroize`
        wiped::<sha2::Sha256>(); // likewise: HMAC's halves of a key live in it
    }

    #[test]
    fn a_session_prints_no_secret() {
        let (near, _) = pair();
        let shown = format!("{near:?}");
        assert_eq!(shown.matches("[redacted]").count(), 2);
        assert!(!shown.contains("1, 1, 1"), "{shown}");
    }
}
