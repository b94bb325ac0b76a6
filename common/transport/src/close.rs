//! Why connections end: the codes that we send, and what we learn when one is over.

use std::fmt;

use quinn::{ConnectionError, VarInt};

use crate::limits::REASON_BYTES_MAX;

/// Why one side closed a connection. The number is the QUIC application error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CloseCode {
    /// Everything was said.
    Done,
    /// A worker came without a certificate.
    CertificateRequired,
    /// The certificate is good, but not that of a worker we know; or its keys disagree.
    IdentityRefused,
    /// No common protocol version, role or mode; a Refused frame said more.
    Refused,
    /// The handshake of the secure session failed, or one of its records did not open.
    SessionFailed,
    /// The worker's entry was revoked.
    Revoked,
    /// A newer process with the same identity took this one's place.
    Displaced,
    /// This side is being shut down; come back.
    GoingAway,
    /// The peer did what no honest peer does.
    Misbehaved,
    /// The peer was silent for too long at a point where it should speak.
    TimedOut,
    /// This side is broken: a full disk, a bug.
    Internal,
}

impl CloseCode {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Done,
        Self::CertificateRequired,
        Self::IdentityRefused,
        Self::Refused,
        Self::SessionFailed,
        Self::Revoked,
        Self::Displaced,
        Self::GoingAway,
        Self::Misbehaved,
        Self::TimedOut,
        Self::Internal,
    ];

    /// The number on the wire.
    pub fn number(self) -> u32 {
        match self {
            Self::Done => 0,
            Self::CertificateRequired => 1,
            Self::IdentityRefused => 2,
            Self::Refused => 3,
            Self::SessionFailed => 4,
            Self::Revoked => 5,
            Self::Displaced => 6,
            Self::GoingAway => 7,
            Self::Misbehaved => 8,
            Self::TimedOut => 9,
            Self::Internal => 10,
        }
    }

    /// The code of this number, if it is one of ours.
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|code| u64::from(code.number()) == number)
    }

    pub(crate) fn varint(self) -> VarInt {
        VarInt::from_u32(self.number())
    }
}

impl fmt::Display for CloseCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Done => "done",
            Self::CertificateRequired => "certificate required",
            Self::IdentityRefused => "identity refused",
            Self::Refused => "refused",
            Self::SessionFailed => "secure session failed",
            Self::Revoked => "revoked",
            Self::Displaced => "displaced by a newer process",
            Self::GoingAway => "going away",
            Self::Misbehaved => "misbehaved",
            Self::TimedOut => "timed out",
            Self::Internal => "internal error",
        })
    }
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Ended {
    /// The peer closed it. `code` is none if the number is not one of ours.
    #[error("peer closed the connection: {}", said(*.code, .reason))]
    ByPeer {
        /// Why, as a code.
        code: Option<CloseCode>,
        /// Why, in the peer's words: not to be trusted, at most [`REASON_BYTES_MAX`] bytes.
        reason: String,
    },
    /// The peer does not know this connection any more: it was restarted.
    #[error("peer was restarted")]
    Reset,
    /// Nothing came from the peer for too long.
    #[error("peer was silent for too long")]
    TimedOut,
    /// We closed it.
    #[error("closed by this side")]
    Locally,
    /// The peer closed it below us: TLS or QUIC went wrong in its eyes, or it is full.
    #[error("peer ended the connection: {reason} (QUIC error {number:#x})")]
    ByPeersTransport {
        /// The QUIC transport error code; 0x100 plus the alert if it comes from TLS.
        number: u64,
        /// In the peer's words.
        reason: String,
    },
    /// TLS or QUIC went wrong in our eyes.
    #[error("connection failed: {reason} (QUIC error {number:#x})")]
    Transport {
        /// The QUIC transport error code; 0x100 plus the alert if it comes from TLS.
        number: u64,
        /// What went wrong.
        reason: String,
    },
}

impl Ended {
    /// The code with which the peer closed the connection, if it did and the code is known.
    pub fn code(&self) -> Option<CloseCode> {
        match self {
            Self::ByPeer { code, .. } => *code,
            _ => None,
        }
    }
}

impl From<ConnectionError> for Ended {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => Self::ByPeer {
                code: CloseCode::from_number(close.error_code.into_inner()),
                reason: readable(&close.reason),
            },
            ConnectionError::ConnectionClosed(close) => {
                Self::ByPeersTransport { number: close.error_code.into(), reason: readable(&close.reason) }
            }
            ConnectionError::Reset => Self::Reset,
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::LocallyClosed => Self::Locally,
            ConnectionError::TransportError(error) => {
                Self::Transport { number: error.code.into(), reason: error.reason }
            }
            other => Self::Transport { number: 0, reason: other.to_string() },
        }
    }
}

/// What a peer wrote, bounded and fit for a terminal.
fn readable(reason: &[u8]) -> String {
    let bounded = reason.get(..REASON_BYTES_MAX).unwrap_or(reason);
    String::from_utf8_lossy(bounded)
        .chars()
        .map(|character| if character.is_control() { '\u{fffd}' } else { character })
        .collect()
}

fn said(code: Option<CloseCode>, reason: &str) -> String {
    match (code, reason) {
        (Some(code), "") => code.to_string(),
        (Some(code), reason) => format!("{code}: {reason}"),
        (None, reason) => format!("unknown code: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_number_of_its_own() {
        for (at, code) in CloseCode::ALL.into_iter().enumerate() {
            assert_eq!(code.number() as usize, at);
            assert_eq!(CloseCode::from_number(at as u64), Some(code));
        }
        assert_eq!(CloseCode::from_number(11), None);
        assert_eq!(CloseCode::from_number(u64::MAX), None);
    }

    #[test]
    fn a_peers_reason_is_bounded_and_cannot_steer_a_terminal() {
        assert_eq!(readable(b"\x1b[2Jhello\r\n"), "\u{fffd}[2Jhello\u{fffd}\u{fffd}");
        assert_eq!(readable(&[b'a'; 9_000]).len(), REASON_BYTES_MAX);
        assert_eq!(readable(&[0xff, 0xfe]), "\u{fffd}\u{fffd}");
    }
}
