//! Sealed contents, opened as a worker opens them.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use coordinator::workshop::Content;
use protocol::session::broadcast::BROADCAST_HEADER_BYTES;
use protocol::session::{BroadcastHeader, BroadcastOpener};

/// What is sealed in `content`.
pub(super) fn open(content: &Content) -> Arc<[u8]> {
    let mut opener = BroadcastOpener::new(content.reference.id, &content.reference.key);
    let mut plaintext = Vec::new();
    for record in &content.records {
        let (header, body) = record.split_at(BROADCAST_HEADER_BYTES);
        BroadcastHeader::parse(header.try_into().unwrap()).unwrap();
        let mut body = body.to_vec();
        plaintext.extend_from_slice(opener.open_in_place(header.try_into().unwrap(), &mut body).unwrap().plaintext);
    }
    assert!(opener.is_finished(), "a content is cut");
    plaintext.into()
}
