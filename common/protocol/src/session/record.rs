//! Records: a stream cut into pieces that are sealed one by one.
//!
//! ```text
//! version u8 = 1 │ kind u8 │ flags u8 │ reserved u8 = 0 │ plaintext length u32 │ sequence u64
//! ciphertext, as long as the plaintext │ tag, 16 bytes
//! ```
//!
//! Little-endian; the 16 bytes of header are associated data, and the nonce is the sequence number.
//! Records of a stream are counted from 0 under a key that no other stream has, so a record that is
//! missing, repeated, moved or foreign shows, and a stream whose last record does not say so was cut
//! off. After any error an opener refuses everything, and the session is to be closed.
//!
//! Sealing and opening copy nothing that they do not encrypt on the way; the length is bounded before anything is allocated.

use std::fmt;

use aes_gcm::aead::inout::InOutBuf;

use super::aead::{self, AeadKey, TAG_BYTES};
use crate::ids::ContentId;
use crate::limits::{CONTROL_MESSAGE_BYTES_MAX, RECORD_BYTES_MAX};

/// Version of the record layout, the first byte of every record.
pub const RECORD_VERSION: u8 = 1;

/// The header of control and payload records, and how a broadcast record's header begins.
pub const RECORD_HEADER_BYTES: usize = 16;

/// The authentication tag that follows each ciphertext.
pub const RECORD_TAG_BYTES: usize = TAG_BYTES;

/// The most records under one key: 2^20 full ones are 2^32 cipher blocks, GCM's comfortable end.
pub const STREAM_RECORDS_MAX: u64 = 1 << 20;

const _: () = assert!(RECORD_BYTES_MAX <= u32::MAX as usize);
const _: () = assert!(RECORD_BYTES_MAX < CONTROL_MESSAGE_BYTES_MAX);

/// What a record carries, its second byte. A stream has one kind only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// Control messages, in either direction of the control stream.
    Control = 1,
    /// A download's or an upload's bytes, on a uni-directional stream.
    Payload = 2,
    /// A piece of a content that was sealed once for many readers; its header is 32 bytes long.
    Broadcast = 3,
}

impl RecordKind {
    fn parse(byte: u8) -> Result<Self, RecordError> {
        match byte {
            1 => Ok(Self::Control),
            2 => Ok(Self::Payload),
            3 => Ok(Self::Broadcast),
            got => Err(RecordError::UnknownKind { got }),
        }
    }
}

/// What ends with a record, its third byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Flag {
    /// Of control records: the message. Of others: nothing in particular.
    Plain = 0,
    /// FINAL: the stream.
    Final = 1,
    /// MORE, on control records only: nothing, the message goes on in the next record.
    More = 2,
}

impl Flag {
    fn parse(byte: u8) -> Result<Self, RecordError> {
        match byte {
            0 => Ok(Self::Plain),
            1 => Ok(Self::Final),
            2 => Ok(Self::More),
            got => Err(RecordError::Flags { got }),
        }
    }
}

/// A record's header: well-formed, not yet authenticated. It tells a reader how much to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What the record carries.
    pub kind: RecordKind,
    /// What ends with it.
    pub flag: Flag,
    /// Bytes of plaintext, at most [`RECORD_BYTES_MAX`].
    pub length: u32,
    /// Place in the stream, from 0.
    pub sequence: u64,
}

impl RecordHeader {
    /// Reads the first 16 bytes of any record.
    pub fn parse(bytes: &[u8; RECORD_HEADER_BYTES]) -> Result<Self, RecordError> {
        let &[version, kind, flags, reserved, l0, l1, l2, l3, ref sequence @ ..] = bytes;
        if version != RECORD_VERSION {
            return Err(RecordError::Version { got: version });
        }
        if reserved != 0 {
            return Err(RecordError::Reserved { got: reserved });
        }
        let header = Self {
            kind: RecordKind::parse(kind)?,
            flag: Flag::parse(flags)?,
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            sequence: u64::from_le_bytes(*sequence),
        };
        header.check()?;
        Ok(header)
    }

    /// What follows the header: ciphertext and tag.
    pub fn body_bytes(&self) -> usize {
        self.length as usize + TAG_BYTES
    }

    fn check(&self) -> Result<(), RecordError> {
        if self.length as usize > RECORD_BYTES_MAX {
            return Err(RecordError::TooLong { got: u64::from(self.length) });
        }
        if self.flag == Flag::More && self.kind != RecordKind::Control {
            return Err(RecordError::Flags { got: self.flag as u8 });
        }
        if self.sequence >= STREAM_RECORDS_MAX {
            return Err(RecordError::Exhausted);
        }
        Ok(())
    }

    fn encode(&self) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [RECORD_VERSION, self.kind as u8, self.flag as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }
}

/// Seals one stream's records, in order.
#[derive(Debug)]
pub struct Sealer(Chain);

impl Sealer {
    pub(super) fn new(kind: RecordKind, key: AeadKey) -> Self {
        Self(Chain::new(kind, None, key))
    }

    /// Seals `plaintext` as the next record, which is appended to `out`.
    pub fn seal(&mut self, flag: Flag, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.0.seal_into(flag, plaintext, out)
    }

    /// Seals a control message into as many records as it needs and appends them to `out`.
    pub fn seal_message(&mut self, message: &[u8], out: &mut Vec<u8>) -> Result<(), RecordError> {
        if message.len() > CONTROL_MESSAGE_BYTES_MAX {
            return Err(RecordError::MessageTooLong { got: message.len() });
        }
        let start = out.len();
        let sealed = self.seal_parts(message, out);
        if sealed.is_err() {
            out.truncate(start);
        }
        sealed
    }

    /// Ends the stream with an empty last record, appended to `out`.
    pub fn finish(mut self, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.seal(Flag::Final, &[], out)
    }

    fn seal_parts(&mut self, mut rest: &[u8], out: &mut Vec<u8>) -> Result<(), RecordError> {
        while let Some((part, more)) = rest.split_at_checked(RECORD_BYTES_MAX)
            && !more.is_empty()
        {
            self.seal(Flag::More, part, out)?;
            rest = more;
        }
        self.seal(Flag::Plain, rest, out)
    }
}

/// Opens one stream's records, in order. After an error it refuses everything.
#[derive(Debug)]
pub struct Opener(Chain);

impl Opener {
    pub(super) fn new(kind: RecordKind, key: AeadKey) -> Self {
        Self(Chain::new(kind, None, key))
    }

    /// Opens the next record in place. `body` is what followed the header,
    /// [`body_bytes`](RecordHeader::body_bytes) long.
    pub fn open_in_place<'b>(
        &mut self,
        header: &[u8; RECORD_HEADER_BYTES],
        body: &'b mut [u8],
    ) -> Result<Opened<'b>, RecordError> {
        self.0.open(header, body)
    }

    /// Whether the stream's last record was opened.
    pub fn is_finished(&self) -> bool {
        self.0.finish().is_ok()
    }

    /// Says that the stream has ended: an error if its last record was not opened.
    pub fn finish(self) -> Result<(), RecordError> {
        self.0.finish()
    }
}

/// An authentic record. Its `Debug` shows the plaintext's length only.
#[derive(PartialEq, Eq)]
pub struct Opened<'b> {
    /// What ends with it.
    pub flag: Flag,
    /// What it carries, where the ciphertext stood.
    pub plaintext: &'b mut [u8],
}

impl fmt::Debug for Opened<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = self.plaintext.len();
        write!(f, "Opened {{ flag: {:?}, plaintext: {length} bytes }}", self.flag)
    }
}

/// Puts control messages together again; at most [`CONTROL_MESSAGE_BYTES_MAX`] bytes wait in it.
#[derive(Default)]
pub struct MessageAssembler {
    partial: Vec<u8>,
}

impl MessageAssembler {
    /// Takes the control stream's next record; a message, if it ends with this one.
    ///
    /// A last record that is empty and ends no message ends the stream only.
    pub fn push(&mut self, record: Opened<'_>) -> Result<Option<Vec<u8>>, RecordError> {
        let got = self.partial.len() + record.plaintext.len();
        if got > CONTROL_MESSAGE_BYTES_MAX {
            return Err(RecordError::MessageTooLong { got });
        }
        if record.flag == Flag::More && record.plaintext.is_empty() {
            return Err(RecordError::EmptyPart);
        }
        if record.flag == Flag::Final && got == 0 {
            return Ok(None);
        }
        self.partial.extend_from_slice(record.plaintext);
        if record.flag == Flag::More {
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut self.partial)))
    }
}

impl fmt::Debug for MessageAssembler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageAssembler({} bytes wait)", self.partial.len())
    }
}

/// One key and the count of its records: what sealing and opening have in common, in every kind.
#[derive(Debug)]
pub(super) struct Chain {
    kind: RecordKind,
    /// Of broadcast records: how their header goes on.
    content_id: Option<ContentId>,
    state: State,
}

/// The key goes with the state that needs it.
#[derive(Debug)]
enum State {
    Live { key: AeadKey, next: u64 },
    Finished,
    Failed,
}

impl Chain {
    pub(super) fn new(kind: RecordKind, content_id: Option<ContentId>, key: AeadKey) -> Self {
        Self { kind, content_id, state: State::Live { key, next: 0 } }
    }

    /// The same, beginning at another record than the first.
    pub(super) fn starting_at(mut self, first: u64) -> Self {
        if let State::Live { next, .. } = &mut self.state {
            *next = first;
        }
        self
    }

    /// Seals `plaintext` into a record that is appended to `out`.
    pub(super) fn seal_into(&mut self, flag: Flag, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), RecordError> {
        let start = out.len();
        let header_bytes = RECORD_HEADER_BYTES + self.content_id.map_or(0, |id| id.as_bytes().len());
        out.resize(start + header_bytes + plaintext.len() + TAG_BYTES, 0);
        let sealed = self.seal_to(flag, plaintext, &mut out[start..]);
        if sealed.is_err() {
            out.truncate(start);
        }
        sealed
    }

    /// `record` is as long as header, plaintext and tag.
    fn seal_to(&mut self, flag: Flag, plaintext: &[u8], record: &mut [u8]) -> Result<(), RecordError> {
        let content_id = self.content_id.as_ref().map_or(&[][..], |id| id.as_bytes());
        let too_long = RecordError::TooLong { got: plaintext.len() as u64 };
        let length = u32::try_from(plaintext.len()).map_err(|_| too_long)?;
        let (key, next) = self.state.live()?;
        let header = RecordHeader { kind: self.kind, flag, length, sequence: *next };
        header.check()?;

        let (head, rest) = record.split_at_mut(RECORD_HEADER_BYTES + content_id.len());
        head[..RECORD_HEADER_BYTES].copy_from_slice(&header.encode());
        head[RECORD_HEADER_BYTES..].copy_from_slice(content_id);
        let (text, tag) = rest.split_at_mut(plaintext.len());
        let text = InOutBuf::new(plaintext, text).expect("a record has room for its plaintext");
        tag.copy_from_slice(&key.seal(aead::nonce(*next), head, text));
        self.state.advance(flag);
        Ok(())
    }

    /// Opens a record where it stands.
    pub(super) fn open<'b>(&mut self, head: &[u8], body: &'b mut [u8]) -> Result<Opened<'b>, RecordError> {
        let opened = self.expect(head, body.len()).and_then(|record| {
            let (text, tag) = body.split_last_chunk_mut().expect("a body of its length has a tag");
            record.open(head, &mut *text, tag)?;
            Ok(Opened { flag: record.header.flag, plaintext: text })
        });
        self.state.follow(opened.as_ref().ok().map(|opened| opened.flag));
        opened
    }

    /// Opens a record into `plaintext`, which is as long as the body but for the tag.
    pub(super) fn open_into(&mut self, head: &[u8], body: &[u8], plaintext: &mut [u8]) -> Result<Flag, RecordError> {
        let opened = self.expect(head, body.len()).and_then(|record| {
            let (text, tag) = body.split_last_chunk().expect("a body of its length has a tag");
            let text = InOutBuf::new(text, plaintext).expect("there is as much room as text");
            record.open(head, text, tag)?;
            Ok(record.header.flag)
        });
        self.state.follow(opened.ok());
        opened
    }

    /// The next record, if this is its header and its body is as long as that says.
    fn expect(&mut self, head: &[u8], body: usize) -> Result<Expected<'_>, RecordError> {
        let (key, next) = self.state.live()?;
        let (fixed, content_id) = head.split_first_chunk().expect("openers take whole headers");
        let header = RecordHeader::parse(fixed)?;
        if header.kind != self.kind {
            return Err(RecordError::WrongKind { got: header.kind, expected: self.kind });
        }
        if content_id != self.content_id.as_ref().map_or(&[][..], |id| id.as_bytes()) {
            return Err(RecordError::ForeignContent);
        }
        if header.sequence != *next {
            return Err(RecordError::OutOfOrder { got: header.sequence, expected: *next });
        }
        if body != header.body_bytes() {
            return Err(RecordError::BodyLength { got: body, expected: header.body_bytes() });
        }
        Ok(Expected { key, header })
    }

    pub(super) fn finish(&self) -> Result<(), RecordError> {
        match self.state {
            State::Finished => Ok(()),
            State::Live { next, .. } => Err(RecordError::Truncated { records: next }),
            State::Failed => Err(RecordError::Failed),
        }
    }
}

/// A record that is the next one, as far as its header says.
struct Expected<'k> {
    key: &'k AeadKey,
    header: RecordHeader,
}

impl Expected<'_> {
    fn open<'i, 'o>(
        &self,
        head: &[u8],
        text: impl Into<InOutBuf<'i, 'o, u8>>,
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), RecordError> {
        let sequence = self.header.sequence;
        self.key.open(aead::nonce(sequence), head, text, tag).map_err(|_| RecordError::BadTag { sequence })
    }
}

impl State {
    fn live(&mut self) -> Result<(&AeadKey, &mut u64), RecordError> {
        match self {
            Self::Live { key, next } => Ok((key, next)),
            Self::Finished => Err(RecordError::AfterFinal),
            Self::Failed => Err(RecordError::Failed),
        }
    }

    /// After a record was opened, or was not.
    fn follow(&mut self, opened: Option<Flag>) {
        match opened {
            Some(flag) => self.advance(flag),
            None => *self = Self::Failed,
        }
    }

    fn advance(&mut self, flag: Flag) {
        match self {
            Self::Live { .. } if flag == Flag::Final => *self = Self::Finished,
            Self::Live { next, .. } => *next += 1,
            Self::Finished | Self::Failed => {}
        }
    }
}

/// Why a record, or the stream that it is in, is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A layout that this program does not speak.
    #[error("record has version {got}, expected {RECORD_VERSION}")]
    Version {
        /// The first byte.
        got: u8,
    },
    /// A kind that does not exist.
    #[error("record has kind {got}, expected 1 (control), 2 (payload) or 3 (broadcast)")]
    UnknownKind {
        /// The second byte.
        got: u8,
    },
    /// A kind that does not belong on this stream.
    #[error("record is of kind {got:?}, but its stream carries {expected:?}")]
    WrongKind {
        /// The record's.
        got: RecordKind,
        /// The stream's.
        expected: RecordKind,
    },
    /// Flags that do not exist, contradict each other or do not belong to the record's kind.
    #[error("record has flags {got:#04x}, expected none, 0x01 (final) or on control records 0x02 (more)")]
    Flags {
        /// The third byte.
        got: u8,
    },
    /// The reserved byte is not zero.
    #[error("record has {got:#04x} in its reserved byte, expected 0")]
    Reserved {
        /// The fourth byte.
        got: u8,
    },
    /// More plaintext than a record may have.
    #[error("record has {got} bytes of plaintext, at most {RECORD_BYTES_MAX} allowed")]
    TooLong {
        /// The plaintext's length.
        got: u64,
    },
    /// A gap or a repeat.
    #[error("record {got} came where record {expected} was expected")]
    OutOfOrder {
        /// Its sequence number.
        got: u64,
        /// The next one's.
        expected: u64,
    },
    /// A broadcast record of another content.
    #[error("record belongs to another content")]
    ForeignContent,
    /// The header promises another length.
    #[error("record has {got} bytes after its header, which promises {expected}")]
    BodyLength {
        /// Bytes of ciphertext and tag.
        got: usize,
        /// What the header says.
        expected: usize,
    },
    /// Changed on the way, or sealed under another key.
    #[error("record {sequence} does not authenticate: it was changed or sealed under another key")]
    BadTag {
        /// Its sequence number.
        sequence: u64,
    },
    /// The key has sealed all that it may.
    #[error("stream has had its {STREAM_RECORDS_MAX} records; open another")]
    Exhausted,
    /// A record after the one that called itself the last.
    #[error("stream goes on after its last record")]
    AfterFinal,
    /// The stream ended without a last record.
    #[error("stream was cut off after {records} records, before its last one")]
    Truncated {
        /// How many came.
        records: u64,
    },
    /// An earlier record was refused.
    #[error("stream is closed since one of its records was refused")]
    Failed,
    /// More than a control message may have.
    #[error("control message has {got} bytes or more, at most {CONTROL_MESSAGE_BYTES_MAX} allowed")]
    MessageTooLong {
        /// Its bytes so far.
        got: usize,
    },
    /// A part that says nothing and announces another.
    #[error("control message goes on after an empty record")]
    EmptyPart,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A chain that has had so many records.
    fn worn(records: u64) -> Chain {
        let mut chain = Chain::new(RecordKind::Payload, None, AeadKey::new(&[7; 32]));
        *chain.state.live().unwrap().1 = records;
        chain
    }

    #[test]
    fn a_stream_ends_at_its_record_limit_and_never_wraps() {
        let (mut sealer, mut opener) = (worn(STREAM_RECORDS_MAX - 1), worn(STREAM_RECORDS_MAX - 1));
        let mut record = Vec::new();
        sealer.seal_into(Flag::Plain, b"last", &mut record).unwrap();
        let (header, body) = record.split_at_mut(RECORD_HEADER_BYTES);
        assert_eq!(opener.open(header, body).unwrap().plaintext, b"last");
        assert_eq!(sealer.seal_into(Flag::Final, b"", &mut record), Err(RecordError::Exhausted));
        record[8..16].copy_from_slice(&STREAM_RECORDS_MAX.to_le_bytes());
        let (header, body) = record.split_at_mut(RECORD_HEADER_BYTES);
        assert_eq!(opener.open(header, body), Err(RecordError::Exhausted));
    }

    #[test]
    fn a_message_that_the_stream_has_no_room_for_leaves_no_half() {
        let mut sealer = Sealer(worn(STREAM_RECORDS_MAX - 1));
        sealer.0.kind = RecordKind::Control;
        let mut out = b"kept".to_vec();
        let message = vec![0; RECORD_BYTES_MAX + 1];
        assert_eq!(sealer.seal_message(&message, &mut out), Err(RecordError::Exhausted));
        assert_eq!(out, b"kept");
    }
}
