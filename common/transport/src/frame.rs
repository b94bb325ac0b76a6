//! Frames: what two peers say before their secure session stands, and how they name a stream.
//!
//! ```text
//! kind u8 │ body length u32 │ body
//! ```
//!
//! Little-endian. Each kind has a longest body, which is checked before anything is allocated. A frame
//! has exactly one encoding, so a peer's Hello, encoded again, is the bytes that it sent.

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::limits::{FRAME_HEADER_BYTES, HANDSHAKE_BYTES_MAX, HELLO_BYTES_MAX, REFUSED_BYTES_MAX, STREAM_OPEN_BYTES};
use crate::stream::StreamError;

/// A frame with its body, whose meaning is somebody else's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The first frame of a connection: versions, role, mode.
    Hello(Bytes),
    /// The answer to a Hello that nobody here speaks.
    Refused(Bytes),
    /// One message of the session's handshake.
    Handshake(Bytes),
    /// The first frame of a uni-directional stream: the number that its key is derived from.
    StreamOpen(u32),
}

impl Frame {
    /// What kind of frame this is.
    pub fn kind(&self) -> FrameKind {
        match self {
            Self::Hello(_) => FrameKind::Hello,
            Self::Refused(_) => FrameKind::Refused,
            Self::Handshake(_) => FrameKind::Handshake,
            Self::StreamOpen(_) => FrameKind::StreamOpen,
        }
    }

    /// The bytes on the wire. Fails with [`FrameError::TooLong`] where a peer would refuse them.
    pub fn encode(&self) -> Result<Bytes, FrameError> {
        let number;
        let body: &[u8] = match self {
            Self::Hello(body) | Self::Refused(body) | Self::Handshake(body) => body,
            Self::StreamOpen(stream) => {
                number = stream.to_le_bytes();
                &number
            }
        };
        let kind = self.kind();
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        kind.check(length)?;
        let mut bytes = BytesMut::with_capacity(FRAME_HEADER_BYTES + body.len());
        bytes.put_u8(kind.number());
        bytes.put_u32_le(length);
        bytes.put_slice(body);
        Ok(bytes.freeze())
    }

    /// The frame of this kind and body; the length was checked with the header.
    pub(crate) fn from_body(kind: FrameKind, body: Bytes) -> Result<Self, FrameError> {
        Ok(match kind {
            FrameKind::Hello => Self::Hello(body),
            FrameKind::Refused => Self::Refused(body),
            FrameKind::Handshake => Self::Handshake(body),
            FrameKind::StreamOpen => {
                let got = body.len();
                let number = body[..].try_into().map_err(|_| wrong_length(got))?;
                Self::StreamOpen(u32::from_le_bytes(number))
            }
        })
    }
}

/// The kinds of frame, by their first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// 1.
    Hello,
    /// 2.
    Refused,
    /// 3.
    Handshake,
    /// 4.
    StreamOpen,
}

impl FrameKind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Hello, Self::Refused, Self::Handshake, Self::StreamOpen];

    /// The first byte of such a frame.
    pub fn number(self) -> u8 {
        match self {
            Self::Hello => 1,
            Self::Refused => 2,
            Self::Handshake => 3,
            Self::StreamOpen => 4,
        }
    }

    /// The longest body of such a frame, in bytes.
    pub fn body_max(self) -> usize {
        match self {
            Self::Hello => HELLO_BYTES_MAX,
            Self::Refused => REFUSED_BYTES_MAX,
            Self::Handshake => HANDSHAKE_BYTES_MAX,
            Self::StreamOpen => STREAM_OPEN_BYTES,
        }
    }

    /// Kind and body length, from a header.
    pub(crate) fn parse(header: [u8; FRAME_HEADER_BYTES]) -> Result<(Self, usize), FrameError> {
        let [number, length @ ..] = header;
        let kind = Self::ALL
            .into_iter()
            .find(|kind| kind.number() == number)
            .ok_or(FrameError::UnknownKind { got: number })?;
        let length = kind.check(u32::from_le_bytes(length))?;
        Ok((kind, length))
    }

    fn check(self, length: u32) -> Result<usize, FrameError> {
        let (kind, max) = (self, self.body_max());
        let got = u64::from(length);
        match usize::try_from(length) {
            Ok(length) if length < max && kind == Self::StreamOpen => Err(wrong_length(length)),
            Ok(length) if length <= max => Ok(length),
            _ => Err(FrameError::TooLong { kind, got, max }),
        }
    }
}

/// Why a frame could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The first byte is no frame's.
    #[error("frame kind {got} is unknown, expected 1 to 4")]
    UnknownKind {
        /// The byte.
        got: u8,
    },
    /// The body is longer than such a frame's may be. It was not read.
    #[error("{kind:?} frame has {got} bytes, at most {max} allowed")]
    TooLong {
        /// The frame's kind.
        kind: FrameKind,
        /// The length that it names.
        got: u64,
        /// The most that is allowed.
        max: usize,
    },
    /// The body of a StreamOpen frame is not a number.
    #[error("StreamOpen frame has {got} bytes, expected {STREAM_OPEN_BYTES}")]
    WrongLength {
        /// The length that it names.
        got: usize,
    },
    /// The stream ended within a frame.
    #[error("stream ended after {got} bytes of a frame, expected {expected}")]
    Truncated {
        /// Bytes of the frame that came.
        got: usize,
        /// Bytes that the part begun has.
        expected: usize,
    },
    /// The stream failed.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

fn wrong_length(got: usize) -> FrameError {
    FrameError::WrongLength { got }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn header(kind: u8, length: u32) -> [u8; FRAME_HEADER_BYTES] {
        let [a, b, c, d] = length.to_le_bytes();
        [kind, a, b, c, d]
    }

    #[test]
    fn frames_have_these_bytes() {
        let hello = Frame::Hello(Bytes::from_static(b"hi")).encode().unwrap();
        assert_eq!(hello[..], [1, 2, 0, 0, 0, b'h', b'i']);
        let open = Frame::StreamOpen(0x0102_0304).encode().unwrap();
        assert_eq!(open[..], [4, 4, 0, 0, 0, 4, 3, 2, 1]);
        let empty = Frame::Handshake(Bytes::new()).encode().unwrap();
        assert_eq!(empty[..], [3, 0, 0, 0, 0]);
    }

    #[test]
    fn one_byte_past_each_limit_is_refused_on_both_sides() {
        for kind in [FrameKind::Hello, FrameKind::Refused, FrameKind::Handshake] {
            let max = kind.body_max();
            let length = u32::try_from(max).unwrap();
            assert_eq!(FrameKind::parse(header(kind.number(), length)), Ok((kind, max)));
            let got = u64::from(length) + 1;
            let refused = Err(FrameError::TooLong { kind, got, max });
            assert_eq!(FrameKind::parse(header(kind.number(), length + 1)), refused);
            let frame = Frame::from_body(kind, Bytes::from(vec![0; max + 1])).unwrap();
            assert_eq!(frame.encode().map(|_| (kind, max)), refused);
        }
    }

    #[test]
    fn a_length_of_four_gigabytes_is_refused_before_anything_is_allocated() {
        let refused = FrameKind::parse(header(1, u32::MAX)).unwrap_err();
        let expected = FrameError::TooLong { kind: FrameKind::Hello, got: u64::from(u32::MAX), max: HELLO_BYTES_MAX };
        assert_eq!(refused, expected);
    }

    #[test]
    fn a_stream_number_is_four_bytes_long() {
        for got in [0, 3] {
            let length = u32::try_from(got).unwrap();
            assert_eq!(FrameKind::parse(header(4, length)), Err(FrameError::WrongLength { got }));
        }
        let long = FrameKind::parse(header(4, 5)).unwrap_err();
        assert!(matches!(long, FrameError::TooLong { kind: FrameKind::StreamOpen, got: 5, max: 4 }));
    }

    #[test]
    fn no_other_kind_is_a_frame() {
        for got in (0..=u8::MAX).filter(|number| !(1..=4).contains(number)) {
            assert_eq!(FrameKind::parse(header(got, 0)), Err(FrameError::UnknownKind { got }));
        }
    }
}
