//! Line 3: bulk goodput without the session, our endpoints against quinn's defaults.

use anyhow::{Result, ensure};
use bytes::{Bytes, BytesMut};

use crate::report::{Aim, Measure, Report};
use crate::sides::alternate;
use crate::suite::Bench;
use crate::wire::{Pair, Papers, RECORD_BYTES, ours, stock};

/// Bytes of a transfer: some tenths of a second.
pub(super) const RECORDS: usize = 4_000;

pub(crate) fn measure(bench: &Bench, report: &mut Report) -> Result<()> {
    let papers = Papers::new()?;
    let (our_pair, stock_pair) = (unsealed(&papers)?, stock(&papers, RECORDS)?);
    let (ours, theirs) = alternate(bench.repetitions, || goodput(&our_pair), || goodput(&stock_pair))?;
    let ratio = ours.with(&theirs, |ours, theirs| ours / theirs);
    report.add(Measure {
        line: 3,
        name: "bulk over loopback without the session".into(),
        unit: "GB/s",
        ours,
        theirs: Some(("quinn as it comes", theirs)),
        ratio,
        aim: Aim::AtLeast(1.25),
        reason:
            "the kernel and the packets' cipher are what both spend their time on; with one core, both ends share it"
                .into(),
    });
    Ok(())
}

/// Our endpoints, with records that nobody sealed.
pub(super) fn unsealed(papers: &Papers) -> Result<Pair> {
    let mut record = vec![7; RECORD_BYTES];
    // What says where it ends: a broadcast record of 64 KiB.
    record[..8].copy_from_slice(&[1, 3, 0, 0, 0, 0, 1, 0]);
    let record = Bytes::from(record);
    ours(
        papers,
        RECORDS,
        || (),
        move |(), _| Ok(record.clone()),
        || (),
        |(), record: &mut BytesMut| {
            ensure!(record.len() == RECORD_BYTES, "a record of {} bytes", record.len());
            Ok(())
        },
    )
}

/// GB/s of one transfer.
#[allow(clippy::cast_precision_loss)] // some hundred megabytes
pub(super) fn goodput(pair: &Pair) -> Result<f64> {
    Ok((RECORDS * RECORD_BYTES) as f64 / pair.transfer()? / 1e9)
}
