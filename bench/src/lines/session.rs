//! Line 4: goodput with the session, sealed on one side and opened on the other, against the bound that the same bytes
//! have without it; and the same seal by the other AES-GCM in the tree.
//!
//! The sender seals each record on the way from its payload, as a worker does, and the receiver opens it where it came, as
//! the coordinator does, on the one thread that each of them has. Such an end can be no faster than
//! `1 / (1/quinn + 1/seal)`.

use std::time::Instant;

use anyhow::{Result, anyhow};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use protocol::ids::ContentId;
use protocol::messages::ContentKey;
use protocol::session::broadcast::BROADCAST_HEADER_BYTES;
use protocol::session::record::RECORD_TAG_BYTES;
use protocol::session::{BroadcastOpener, BroadcastSealer, Flag};

use super::bulk::{RECORDS, goodput, unsealed};
use crate::figures::Samples;
use crate::report::{Aim, Measure, Report};
use crate::suite::Bench;
use crate::wire::{Pair, Papers, RECORD_BYTES, ours};

const ID: ContentId = ContentId([1; 16]);
const KEY: ContentKey = ContentKey([2; 32]);
const PLAINTEXT_BYTES: usize = RECORD_BYTES - BROADCAST_HEADER_BYTES - RECORD_TAG_BYTES;

/// Records that are sealed to time it: 65 MB.
const SEALED: usize = 1_000;

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let papers = Papers::new()?;
    let (bare, session) = (unsealed(&papers)?, sealed(&papers)?);
    let (mut quinn, mut seal, mut other, mut with) =
        (Samples::default(), Samples::default(), Samples::default(), Samples::default());
    for repetition in 0..=bench.repetitions {
        let taken = [goodput(&bare)?, ours_seals()?, aws_lc_seals()?, goodput(&session)?];
        // The first of each does not count.
        if repetition > 0 {
            for (samples, sample) in [&mut quinn, &mut seal, &mut other, &mut with].into_iter().zip(taken) {
                samples.add(sample);
            }
        }
    }
    let bound = quinn.with(&seal, in_turn);
    report.add(Measure {
        line: 4,
        name: "bulk over loopback with the session".into(),
        unit: "GB/s",
        ratio: with.with(&bound, |ours, bound| ours / bound),
        ours: with,
        theirs: Some(("1/(1/quinn + 1/seal)", bound.clone())),
        aim: Aim::AtLeast(0.9),
        reason: format!("without the session {:.2} GB/s, sealing alone {:.2} GB/s", quinn.median(), seal.median()),
    });
    report.add(Measure {
        line: 4,
        name: "sealing 64 KiB records, one core: aes-gcm".into(),
        unit: "GB/s",
        ratio: seal.with(&other, |ours, theirs| ours / theirs),
        ours: seal,
        theirs: Some(("aws-lc-rs", other.clone())),
        aim: Aim::None,
        reason: String::new(),
    });
    let allowed = quinn.with(&other, in_turn);
    report.add(Measure {
        line: 4,
        name: "the bound with aes-gcm, beside the one with aws-lc-rs".into(),
        unit: "GB/s",
        ratio: bound.with(&allowed, |ours, theirs| ours / theirs),
        ours: bound,
        theirs: Some(("aws-lc-rs", allowed)),
        aim: Aim::None,
        reason: String::new(),
    });
    Ok(())
}

/// What two things reach that one thread does by turns, at these speeds.
fn in_turn(one: f64, other: f64) -> f64 {
    1.0 / (1.0 / one + 1.0 / other)
}

/// Our endpoints, with records that are sealed as they are sent and opened as they come.
fn sealed(papers: &Papers) -> Result<Pair> {
    let plaintext = vec![7; PLAINTEXT_BYTES];
    ours(
        papers,
        RECORDS,
        || BroadcastSealer::new(ID, &KEY),
        move |sealer, last| {
            let mut record = Vec::with_capacity(RECORD_BYTES);
            sealer.seal(if last { Flag::Final } else { Flag::Plain }, &plaintext, &mut record)?;
            Ok(record.into())
        },
        || BroadcastOpener::new(ID, &KEY),
        |opener, record| {
            let (header, body) = record.split_first_chunk_mut().ok_or_else(|| anyhow!("a record without a header"))?;
            opener.open_in_place(header, body)?;
            Ok(())
        },
    )
}

/// GB/s of sealing on one core, from a payload into a record.
fn ours_seals() -> Result<f64> {
    let mut sealer = BroadcastSealer::new(ID, &KEY);
    let (plaintext, mut record) = (vec![7; PLAINTEXT_BYTES], Vec::with_capacity(RECORD_BYTES));
    timed(|_| {
        record.clear();
        Ok(sealer.seal(Flag::Plain, &plaintext, &mut record)?)
    })
}

/// The same by aws-lc-rs, which seals in place: the header is associated data, the tag stands behind.
fn aws_lc_seals() -> Result<f64> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &KEY.0).map_err(|_| anyhow!("a key of another length"))?);
    let mut record = vec![7; RECORD_BYTES];
    timed(|count| {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&count.to_be_bytes());
        let (header, rest) = record.split_at_mut(BROADCAST_HEADER_BYTES);
        let (text, tag) = rest.split_at_mut(PLAINTEXT_BYTES);
        let sealed = key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(header), text);
        tag.copy_from_slice(sealed.map_err(|_| anyhow!("aws-lc-rs does not seal"))?.as_ref());
        Ok(())
    })
}

#[allow(clippy::cast_precision_loss)] // some ten megabytes
fn timed(mut seal: impl FnMut(u64) -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    (0..SEALED as u64).try_for_each(&mut seal)?;
    Ok((SEALED * PLAINTEXT_BYTES) as f64 / began.elapsed().as_secs_f64() / 1e9)
}
