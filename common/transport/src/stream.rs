//! The two halves of a stream: frames and sealed records in, frames and sealed records out.
//!
//! Of a record only two fields are read here, because they say where it ends: the kind (a broadcast
//! record has a longer header) and the length. Whether they are true is for the session to find out;
//! until then they are bounded. Reading is cancel-safe: what has come stays in the half until the rest
//! of the frame or record is there too.

use std::pin::pin;
use std::task::{Context, Waker};

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, StoppedError, VarInt, WriteError};

use crate::close::{CloseCode, Ended};
use crate::frame::{Frame, FrameError, FrameKind};
use crate::limits::{BROADCAST_HEADER_BYTES, FRAME_HEADER_BYTES, RECORD_BODY_BYTES_MAX, RECORD_HEADER_BYTES};
use crate::socket::{Direction, Tap};

/// The second byte of a broadcast record.
const KIND_BROADCAST: u8 = 3;

/// What follows the ciphertext of every record, in bytes.
const TAG_BYTES: usize = 16;

/// The half of a stream that we write. Dropped, it finishes the stream.
#[derive(Debug)]
pub struct SendStream {
    inner: quinn::SendStream,
    tap: Option<Tap>,
}

impl SendStream {
    pub(crate) fn new(inner: quinn::SendStream, tap: Option<Tap>) -> Self {
        Self { inner, tap }
    }

    /// Sends one frame. Not cancel-safe: half a frame may be out.
    pub async fn write_frame(&mut self, frame: &Frame) -> Result<(), FrameError> {
        Ok(self.write(frame.encode()?).await?)
    }

    /// Sends one sealed record, header and body. The bytes are shared, not copied, until the peer has
    /// acknowledged them. Not cancel-safe: half a record may be out.
    pub async fn write_record(&mut self, record: Bytes) -> Result<(), StreamError> {
        self.write(record).await
    }

    /// Says that nothing more comes.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        self.inner.finish().map_err(|_| StreamError::Closed)
    }

    /// Waits until the peer has acknowledged everything, or has said that it will not read it.
    pub async fn delivered(&mut self) -> Result<(), StreamError> {
        match self.inner.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(StreamError::Stopped(code.into_inner())),
            Err(StoppedError::ConnectionLost(error)) => Err(StreamError::Lost(error.into())),
            Err(StoppedError::ZeroRttRejected) => Err(StreamError::Closed),
        }
    }

    /// Gives the stream up: the peer's reads fail.
    pub fn reset(&mut self, code: CloseCode) {
        // It may have been finished or reset already, which is as good.
        let _ = self.inner.reset(code.varint());
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        if let Some(tap) = &self.tap {
            tap.see(Direction::Sent, &bytes);
        }
        Ok(self.inner.write_chunk(bytes).await?)
    }
}

/// The half of a stream that we read. Dropped before its end was seen, it tells the peer to stop.
#[derive(Debug)]
pub struct RecvStream {
    inner: quinn::RecvStream,
    tap: Option<Tap>,
    /// The beginning of a frame or record whose rest has not come yet.
    pending: BytesMut,
}

impl RecvStream {
    pub(crate) fn new(inner: quinn::RecvStream, tap: Option<Tap>) -> Self {
        Self { inner, tap, pending: BytesMut::new() }
    }

    /// The next frame, or `None` where the stream ended after one. Cancel-safe.
    pub async fn read_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(header) = self.fill(FRAME_HEADER_BYTES).await? else {
            return Ok(None);
        };
        let header = header.first_chunk().copied().unwrap_or_default();
        let (kind, length) = FrameKind::parse(header)?;
        self.fill(FRAME_HEADER_BYTES + length).await?;
        let mut bytes = self.take().freeze();
        let body = bytes.split_off(FRAME_HEADER_BYTES);
        Frame::from_body(kind, body).map(Some)
    }

    /// Puts the next record, header and body, in place of what is in `record`. False where the stream
    /// ended after one; whether it may end there is for the session to say. Cancel-safe.
    pub async fn read_record(&mut self, record: &mut BytesMut) -> Result<bool, RecordError> {
        let Some(header) = self.fill(RECORD_HEADER_BYTES).await? else {
            return Ok(false);
        };
        let header = header.first_chunk().copied().unwrap_or_default();
        let length = record_bytes(&header)?;
        self.fill(length).await?;
        // The two buffers change places, so that a stream of records allocates nothing.
        std::mem::swap(&mut self.pending, record);
        self.pending.clear();
        self.tapped(record);
        Ok(true)
    }

    /// Says that nothing more is waited for. The end of a stream mostly comes with its last bytes: once it was seen, the peer
    /// need not be told to stop, which takes a packet and a wake-up of its own.
    pub fn close(mut self) {
        let mut rest = pin!(self.inner.read_chunk(1, true));
        // Whether it is the end, more, or nothing yet: what is dropped now is the same.
        let _ = rest.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    }

    /// Tells the peer that nothing more will be read.
    pub fn stop(&mut self, code: CloseCode) {
        // It may have ended already, which is as good.
        let _ = self.inner.stop(code.varint());
    }

    /// Reads on until `expected` bytes are there. `None` where the stream ended before the first.
    async fn fill(&mut self, expected: usize) -> Result<Option<&[u8]>, Cut> {
        // At once, and not by doubling while it comes: callers have bounded it.
        self.pending.reserve(expected.saturating_sub(self.pending.len()));
        while self.pending.len() < expected {
            let missing = expected - self.pending.len();
            match self.inner.read_chunk(missing, true).await? {
                Some(chunk) => self.pending.extend_from_slice(&chunk.bytes),
                None if self.pending.is_empty() => return Ok(None),
                None => {
                    return Err(Cut::Short { got: self.pending.len(), expected });
                }
            }
        }
        Ok(Some(&self.pending))
    }

    fn take(&mut self) -> BytesMut {
        let whole = self.pending.split();
        self.tapped(&whole);
        whole
    }

    fn tapped(&self, bytes: &[u8]) {
        if let Some(tap) = &self.tap {
            tap.see(Direction::Received, bytes);
        }
    }
}

/// How long a record is that begins like this.
fn record_bytes(header: &[u8; RECORD_HEADER_BYTES]) -> Result<usize, RecordError> {
    let &[_, kind, _, _, l0, l1, l2, l3, ..] = header;
    let plaintext = u32::from_le_bytes([l0, l1, l2, l3]);
    let too_long = || RecordError::TooLong { got: u64::from(plaintext) + TAG_BYTES as u64 };
    let body = usize::try_from(plaintext)
        .ok()
        .and_then(|length| length.checked_add(TAG_BYTES))
        .filter(|length| *length <= RECORD_BODY_BYTES_MAX)
        .ok_or_else(too_long)?;
    let header = match kind {
        KIND_BROADCAST => BROADCAST_HEADER_BYTES,
        _ => RECORD_HEADER_BYTES,
    };
    Ok(header + body)
}

/// Why a stream carries nothing more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The connection ended.
    #[error(transparent)]
    Lost(#[from] Ended),
    /// The peer gave up writing it.
    #[error("peer reset the stream with code {0}")]
    Reset(u64),
    /// The peer gave up reading it.
    #[error("peer stopped the stream with code {0}")]
    Stopped(u64),
    /// We had ended it ourselves.
    #[error("stream was ended by this side")]
    Closed,
}

/// Why a record could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Longer than any record. The body was not read.
    #[error("record body has {got} bytes, at most {RECORD_BODY_BYTES_MAX} allowed")]
    TooLong {
        /// The length of the body that its header names, tag included.
        got: u64,
    },
    /// The stream ended within a record.
    #[error("stream ended after {got} bytes of a record, expected {expected}")]
    Truncated {
        /// Bytes of the record that came.
        got: usize,
        /// Bytes that the part begun has.
        expected: usize,
    },
    /// The stream failed.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Why `fill` has less than it should.
enum Cut {
    Short { got: usize, expected: usize },
    Stream(StreamError),
}

impl From<ReadError> for Cut {
    fn from(error: ReadError) -> Self {
        Self::Stream(match error {
            ReadError::Reset(code) => StreamError::Reset(code.into_inner()),
            ReadError::ConnectionLost(error) => StreamError::Lost(error.into()),
            ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => StreamError::Closed,
        })
    }
}

impl From<Cut> for FrameError {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Short { got, expected } => Self::Truncated { got, expected },
            Cut::Stream(error) => Self::Stream(error),
        }
    }
}

impl From<Cut> for RecordError {
    fn from(cut: Cut) -> Self {
        match cut {
            Cut::Short { got, expected } => Self::Truncated { got, expected },
            Cut::Stream(error) => Self::Stream(error),
        }
    }
}

impl From<WriteError> for StreamError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Stopped(VarInt::into_inner(code)),
            WriteError::ConnectionLost(error) => Self::Lost(error.into()),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::Closed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u8, length: u32) -> [u8; RECORD_HEADER_BYTES] {
        let mut header = [0; RECORD_HEADER_BYTES];
        header[0] = 1;
        header[1] = kind;
        header[4..8].copy_from_slice(&length.to_le_bytes());
        header
    }

    #[test]
    fn a_broadcast_record_has_the_longer_header() {
        assert_eq!(record_bytes(&header(1, 5)), Ok(16 + 5 + 16));
        assert_eq!(record_bytes(&header(2, 0)), Ok(16 + 16));
        assert_eq!(record_bytes(&header(3, 5)), Ok(32 + 5 + 16));
    }

    #[test]
    fn one_byte_past_the_longest_record_is_refused() {
        assert_eq!(record_bytes(&header(2, 65_536)), Ok(16 + 65_536 + 16));
        let refused = Err(RecordError::TooLong { got: 65_537 + 16 });
        assert_eq!(record_bytes(&header(2, 65_537)), refused);
        let refused = Err(RecordError::TooLong { got: u64::from(u32::MAX) + 16 });
        assert_eq!(record_bytes(&header(3, u32::MAX)), refused);
    }
}
