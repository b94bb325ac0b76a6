//! Folding on several threads: parts of one update into their own cells, so that the sum does not depend on who was first.
//!
//! A fold waits for memory, and one core does not keep all of it busy: two fold 1.8 times as fast.

use std::io::{self, Read};

use protocol::sum::{Fold, Part};

use crate::crew;

/// How much of a payload is in memory at once on each thread: it stays in the second-level cache beside the cells that it is
/// added to.
const PIECE_BYTES: usize = 256 * 1024;

/// Cuts a fold of so many bytes as it is folded fastest.
pub fn cut(fold: &mut Fold<'_>, bytes: u64) {
    let parts = crew::parts(bytes);
    if parts > 1 {
        fold.cut(parts);
    }
}

/// Folds each part with what `add` does with its source, on as many threads as pay.
///
/// # Errors
/// One of `add`. The sum is torn then.
pub fn fold<S: Send, E: Send>(
    fold: &mut Fold<'_>,
    sources: Vec<S>,
    add: impl Fn(S, &mut Part<'_>) -> Result<(), E> + Sync,
) -> Result<(), E> {
    assert_eq!(sources.len(), fold.parts().len(), "each part has its own source");
    let bytes = fold.parts().last().map_or(0, |last| last.bytes().end);
    crew::share(bytes, sources.into_iter().zip(fold.parts_mut()), |(source, part)| add(source, part))
}

/// Adds the bytes of a part, and no others, from where `source` stands.
///
/// # Errors
/// If it cannot be read.
pub fn add_from(source: impl Read, part: &mut Part<'_>) -> io::Result<()> {
    let bytes = part.bytes();
    let mut source = source.take(bytes.end - bytes.start);
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match source.read(&mut piece)? {
            0 => return Ok(()),
            read => part.add(&piece[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    use protocol::ids::{Hash, TaskId};
    use protocol::sum::{Ring, Sum, SumError, Verified, Verifier};

    /// Enough for several parts, and some bytes.
    const NUMBERS: u32 = (3 << 20) + 77;

    fn update() -> (Vec<u8>, Verified) {
        let raw: Vec<u8> = (0..NUMBERS).flat_map(|at| (f32::from(at.to_le_bytes()[0]) * 1e-4).to_le_bytes()).collect();
        let mut verifier = Verifier::new(Ring::weighted(), raw.len() as u64, Hash::of(&raw));
        verifier.update(&raw).unwrap();
        let verified = verifier.finish().unwrap();
        (raw, verified)
    }

    fn tail<'a>(raw: &'a [u8], part: &Part<'_>) -> &'a [u8] {
        &raw[usize::try_from(part.bytes().start).unwrap()..]
    }

    #[test]
    fn many_threads_make_the_same_sum_as_one() {
        let (raw, verified) = update();
        let mut expected = Sum::new(Ring::weighted(), NUMBERS as usize);
        let mut one = expected.begin(TaskId(1), 3, &verified).unwrap();
        one.add(&raw);
        one.finish().unwrap();
        let mut sum = Sum::new(Ring::weighted(), NUMBERS as usize);
        let mut many = sum.begin(TaskId(1), 3, &verified).unwrap();
        cut(&mut many, verified.bytes());
        assert_eq!(many.parts().len() > 1, crew::threads() > 1);
        let sources = many.parts().iter().map(|part| tail(&raw, part)).collect();
        fold(&mut many, sources, add_from).unwrap();
        many.finish().unwrap();
        assert!(sum == expected);
    }

    #[test]
    fn a_part_that_cannot_be_read_is_an_error_and_one_that_is_short_tears_the_sum() {
        let (raw, verified) = update();
        let mut sum = Sum::new(Ring::weighted(), NUMBERS as usize);
        let mut begun = sum.begin(TaskId(1), 3, &verified).unwrap();
        begun.cut(3);
        let broken = |at: usize, _: &mut Part<'_>| if at == 1 { Err("broken") } else { Ok(()) };
        assert_eq!(fold(&mut begun, vec![0, 1, 2], broken), Err("broken"));
        drop(begun);
        assert!(sum.is_torn());
        sum.clear();
        let mut begun = sum.begin(TaskId(1), 3, &verified).unwrap();
        begun.cut(3);
        let sources = begun.parts().iter().map(|part| tail(&raw[..raw.len() - 1], part)).collect();
        fold(&mut begun, sources, add_from).unwrap();
        assert_eq!(begun.finish(), Err(SumError::Torn));
    }
}
