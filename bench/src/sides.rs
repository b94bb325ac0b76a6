//! Two sides of one comparison, taken in turn, so that what the machine does meanwhile falls on both.

use anyhow::Result;

use crate::figures::Samples;

/// Takes `count` samples of each side, ours first, after one of each that does not count.
pub(crate) fn alternate(
    count: usize,
    mut ours: impl FnMut() -> Result<f64>,
    mut theirs: impl FnMut() -> Result<f64>,
) -> Result<(Samples, Samples)> {
    ours()?;
    theirs()?;
    let (mut our_samples, mut their_samples) = (Samples::default(), Samples::default());
    for _ in 0..count {
        our_samples.add(ours()?);
        their_samples.add(theirs()?);
    }
    Ok((our_samples, their_samples))
}
