//! Content sealed once and streamed to many.
//!
//! A model of a round is sealed under a content key of its own, and each worker learns that key inside
//! its own session; so what sealing costs does not grow with the fleet. Such records have a longer header:
//!
//! ```text
//! the 16 bytes of every record's header, kind 3 │ content id, 16 bytes
//! ciphertext, as long as the plaintext │ tag, 16 bytes
//! ```
//!
//! All 32 bytes are associated data, and the records of a content are counted from 0 like those of a
//! stream. Whoever has the key could also have sealed the content: it is authentic only if its BLAKE3 is
//! the one that the session named.

use super::aead::AeadKey;
use super::record::{
    Chain, Flag, Opened, RECORD_HEADER_BYTES, RECORD_TAG_BYTES, RecordError, RecordHeader, RecordKind,
    STREAM_RECORDS_MAX,
};
use crate::ids::ContentId;
use crate::limits::RECORD_BYTES_MAX;
use crate::messages::ContentKey;

/// The header of a broadcast record.
pub const BROADCAST_HEADER_BYTES: usize = RECORD_HEADER_BYTES + 16;

/// A broadcast record's header: well-formed, not yet authenticated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BroadcastHeader {
    /// What it has in common with every record.
    pub record: RecordHeader,
    /// Which content it is a piece of.
    pub content_id: ContentId,
}

impl BroadcastHeader {
    /// Reads a header, refusing those of other kinds.
    pub fn parse(bytes: &[u8; BROADCAST_HEADER_BYTES]) -> Result<Self, RecordError> {
        let mut fixed = [0; RECORD_HEADER_BYTES];
        let mut content_id = [0; 16];
        let (head, tail) = bytes.split_at(RECORD_HEADER_BYTES);
        fixed.copy_from_slice(head);
        content_id.copy_from_slice(tail);
        let record = RecordHeader::parse(&fixed)?;
        if record.kind != RecordKind::Broadcast {
            return Err(RecordError::WrongKind { got: record.kind, expected: RecordKind::Broadcast });
        }
        Ok(Self { record, content_id: ContentId(content_id) })
    }
}

/// Seals one content's records, in order.
#[derive(Debug)]
pub struct BroadcastSealer(Chain);

impl BroadcastSealer {
    /// Starts a content. The key is 32 fresh bytes from the operating system and has sealed nothing before.
    pub fn new(content_id: ContentId, key: &ContentKey) -> Self {
        Self(Chain::new(RecordKind::Broadcast, Some(content_id), AeadKey::new(&key.0)))
    }

    /// Seals `plaintext` as the next record, which is appended to `out`.
    pub fn seal(&mut self, flag: Flag, plaintext: &[u8], out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.0.seal_into(flag, plaintext, out)
    }
}

/// Opens one content's records, in order. After an error it refuses everything.
#[derive(Debug)]
pub struct BroadcastOpener(Chain);

impl BroadcastOpener {
    /// Expects the first record of this content.
    pub fn new(content_id: ContentId, key: &ContentKey) -> Self {
        Self(Chain::new(RecordKind::Broadcast, Some(content_id), AeadKey::new(&key.0)))
    }

    /// Opens the next record in place. `body` is what followed the header.
    pub fn open_in_place<'b>(
        &mut self,
        header: &[u8; BROADCAST_HEADER_BYTES],
        body: &'b mut [u8],
    ) -> Result<Opened<'b>, RecordError> {
        self.0.open(header, body)
    }

    /// Opens the next record into `plaintext`, which is as long as the body but for its [`RECORD_TAG_BYTES`], and says what
    /// ends with it. After an error nothing of this record is there.
    ///
    /// # Panics
    /// If `plaintext` has another length.
    pub fn open_into(
        &mut self,
        header: &[u8; BROADCAST_HEADER_BYTES],
        body: &[u8],
        plaintext: &mut [u8],
    ) -> Result<Flag, RecordError> {
        self.0.open_into(header, body, plaintext)
    }

    /// Whether the content's last record was opened.
    pub fn is_finished(&self) -> bool {
        self.0.finish().is_ok()
    }

    /// Says that the content has ended: an error if its last record was not opened.
    pub fn finish(self) -> Result<(), RecordError> {
        self.0.finish()
    }
}

/// Seals a whole content into records that are full but for the last, which is marked as such. An empty
/// content is one empty record.
pub fn seal_content(content_id: ContentId, key: &ContentKey, content: &[u8]) -> Result<Vec<Vec<u8>>, RecordError> {
    let parts = cut_content(content_id, key, content, 1)?;
    parts.into_iter().try_fold(Vec::new(), |mut records, part| {
        records.extend(part.seal()?);
        Ok(records)
    })
}

/// Cuts a content into up to `count` parts, which may be sealed at the same time: their records, one part after another,
/// are those of [`seal_content`].
pub fn cut_content<'a>(
    content_id: ContentId,
    key: &ContentKey,
    content: &'a [u8],
    count: usize,
) -> Result<Vec<ContentPart<'a>>, RecordError> {
    let records = content.len().div_ceil(RECORD_BYTES_MAX).max(1);
    if records as u64 > STREAM_RECORDS_MAX {
        return Err(RecordError::Exhausted);
    }
    let each = records.div_ceil(count.max(1));
    let parts = (0..records).step_by(each).map(|first| {
        let (end, is_last) = ((first + each).min(records), first + each >= records);
        let bytes = first * RECORD_BYTES_MAX..(end * RECORD_BYTES_MAX).min(content.len());
        let content = &content[bytes];
        let chain = Chain::new(RecordKind::Broadcast, Some(content_id), AeadKey::new(&key.0)).starting_at(first as u64);
        ContentPart { chain, content, records: room_for(content), is_last }
    });
    Ok(parts.collect())
}

/// Some records of a content, not yet sealed. No two parts have a record, and so a nonce, in common.
#[derive(Debug)]
pub struct ContentPart<'a> {
    chain: Chain,
    content: &'a [u8],
    /// Empty, with the room that each takes: whoever cuts a content has its memory, not whoever seals a part of it.
    records: Vec<Vec<u8>>,
    is_last: bool,
}

fn room_for(content: &[u8]) -> Vec<Vec<u8>> {
    let room = |bytes: usize| Vec::with_capacity(BROADCAST_HEADER_BYTES + bytes + RECORD_TAG_BYTES);
    match content.chunks(RECORD_BYTES_MAX) {
        chunks if chunks.len() > 0 => chunks.map(|chunk| room(chunk.len())).collect(),
        _ => vec![room(0)],
    }
}

impl ContentPart<'_> {
    /// Its records.
    pub fn seal(self) -> Result<Vec<Vec<u8>>, RecordError> {
        let Self { mut chain, content, mut records, is_last } = self;
        let (mut chunks, count) = (content.chunks(RECORD_BYTES_MAX), records.len());
        for (place, record) in (1..).zip(&mut records) {
            let flag = if is_last && place == count { Flag::Final } else { Flag::Plain };
            chain.seal_into(flag, chunks.next().unwrap_or_default(), record)?;
        }
        Ok(records)
    }
}
