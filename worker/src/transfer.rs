//! Payloads up, contents down: what travels on streams of their own.
//!
//! An upload is a sealed [`Upload`] and then the payload in records, each sealed on its way there, the last marked as such.
//! A download is a sealed [`Download`] and then records of the content's own key; it is used only if its hash is the one
//! that the session named, and never held longer than the session said that it is.

use bytes::{Bytes, BytesMut};
use protocol::ids::{ContentId, Hash};
use protocol::layout::model_hasher;
use protocol::limits::{MODEL_BYTES_MAX, RECORD_BYTES_MAX, SCHEMA_BYTES_MAX};
use protocol::messages::{ContentRef, DecodeError, Download, Upload, decode, encode};
use protocol::pages::Numbers;
use protocol::session::record::{RECORD_HEADER_BYTES, RECORD_TAG_BYTES};
use protocol::session::{BroadcastOpener, Flag, Opener, Sealer};
use transport::{Connection, Ended, Frame, FrameError, RecvStream, SendStream, StreamError};

/// Why a payload or a content did not come through.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum TransferError {
    #[error(transparent)]
    Ended(#[from] Ended),
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Read(#[from] transport::RecordError),
    #[error(transparent)]
    Record(#[from] protocol::session::RecordError),
    #[error("the first message of a download cannot be read: {0}")]
    Message(#[from] DecodeError),
    #[error("the stream ended before its last record")]
    Cut,
    #[error("the content has more than the {expected} bytes that were announced")]
    TooLong { expected: u64 },
    #[error("the content is announced with {got} bytes, at most {max} are allowed")]
    TooLarge { got: u64, max: u64 },
    #[error("the content has {got} bytes, {expected} were announced")]
    TooShort { got: u64, expected: u64 },
    #[error("the content's hash is {got}, expected {expected}")]
    WrongHash { got: Hash, expected: Hash },
}

impl TransferError {
    /// Whether the peer did what no honest peer does, rather than the connection ending.
    pub(crate) fn is_fault(&self) -> bool {
        !matches!(
            self,
            Self::Ended(_)
                | Self::Stream(_)
                | Self::Frame(_)
                | Self::Cut
                | Self::Read(transport::RecordError::Stream(_))
        )
    }
}

/// Streams `payload` from the byte that `upload` names.
pub(crate) async fn upload(
    connection: Connection,
    number: u32,
    mut sealer: Sealer,
    upload: Upload,
    payload: Bytes,
) -> Result<(), TransferError> {
    let mut stream = connection.open_uni().await?;
    stream.write_frame(&Frame::StreamOpen(number)).await?;
    write_record(&mut stream, &mut sealer, Flag::Plain, &encode(&upload)).await?;
    let from = usize::try_from(upload.from).unwrap_or(usize::MAX).min(payload.len());
    let mut rest = &payload[from..];
    loop {
        let (chunk, more) = rest.split_at(rest.len().min(RECORD_BYTES_MAX));
        let flag = if more.is_empty() { Flag::Final } else { Flag::Plain };
        write_record(&mut stream, &mut sealer, flag, chunk).await?;
        if more.is_empty() {
            break;
        }
        rest = more;
    }
    stream.finish()?;
    Ok(stream.delivered().await?)
}

/// Sealed on the way from the payload into the record.
async fn write_record(
    stream: &mut SendStream,
    sealer: &mut Sealer,
    flag: Flag,
    plaintext: &[u8],
) -> Result<(), TransferError> {
    let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + plaintext.len() + RECORD_TAG_BYTES);
    sealer.seal(flag, plaintext, &mut record)?;
    Ok(stream.write_record(record.into()).await?)
}

/// Reads which content a download stream carries.
pub(crate) async fn announced(stream: &mut RecvStream, opener: &mut Opener) -> Result<ContentId, TransferError> {
    let mut record = BytesMut::new();
    if !stream.read_record(&mut record).await? {
        return Err(TransferError::Cut);
    }
    let (header, body) = record.split_first_chunk_mut().ok_or(TransferError::Cut)?;
    let opened = opener.open_in_place(header, body)?;
    let Download { id } = decode(opened.plaintext)?;
    Ok(id)
}

/// What a content is, which decides how it is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentKind {
    /// Bytes with their BLAKE3.
    Schema,
    /// Tensors of the layout with this fingerprint.
    Model(Hash),
}

impl ContentKind {
    fn bytes_max(self) -> u64 {
        match self {
            Self::Schema => SCHEMA_BYTES_MAX,
            Self::Model(_) => MODEL_BYTES_MAX,
        }
    }

    fn hasher(self) -> blake3::Hasher {
        match self {
            Self::Schema => blake3::Hasher::new(),
            Self::Model(layout) => model_hasher(&layout),
        }
    }
}

/// Reads the content behind its announcement, and gives it out only if it is what was announced.
pub(crate) async fn download(
    mut stream: RecvStream,
    content: &ContentRef,
    kind: ContentKind,
) -> Result<Bytes, TransferError> {
    let max = kind.bytes_max();
    if content.bytes > max {
        return Err(TransferError::TooLarge { got: content.bytes, max });
    }
    let mut opener = BroadcastOpener::new(content.id, &content.key);
    let mut hasher = kind.hasher();
    // The announcement is the coordinator's word inside the session, and bounded above; a large page is there once it is written.
    let mut bytes = Numbers::<u8>::unset(usize::try_from(content.bytes).unwrap_or(0));
    let mut got = 0;
    let mut record = BytesMut::new();
    while !opener.is_finished() {
        if !stream.read_record(&mut record).await? {
            return Err(TransferError::Cut);
        }
        let (header, body) = record.split_first_chunk().ok_or(TransferError::Cut)?;
        let end = got + body.len().saturating_sub(RECORD_TAG_BYTES);
        let place = bytes.get_mut(got..end).ok_or(TransferError::TooLong { expected: content.bytes })?;
        opener.open_into(header, body, place)?;
        hasher.update(place);
        got = end;
    }
    stream.close();
    check(content, got as u64, hasher.finalize().into())?;
    Ok(Bytes::from_owner(bytes))
}

fn check(content: &ContentRef, got: u64, hash: Hash) -> Result<(), TransferError> {
    if got != content.bytes {
        return Err(TransferError::TooShort { got, expected: content.bytes });
    }
    if hash != content.hash {
        return Err(TransferError::WrongHash { got: hash, expected: content.hash });
    }
    Ok(())
}
