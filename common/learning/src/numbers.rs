//! Numbers as the bytes that models and payloads are made of, little-endian f32, read and given without a copy.
//!
//! A model of 40 MB that is copied costs more in fresh pages than a step of training over it.

use std::borrow::Cow;

use protocol::layout::from_bytes;
use protocol::pages::Numbers;
use pulp::bytemuck;

/// The numbers of `raw`: where they lie, if this machine can read them there. `None` if `raw` does not end with a number.
#[must_use]
pub fn numbers(raw: &[u8]) -> Option<Cow<'_, [f32]>> {
    match bytemuck::try_cast_slice(raw) {
        Ok(numbers) if cfg!(target_endian = "little") => Some(Cow::Borrowed(numbers)),
        _ => from_bytes(raw).map(Cow::Owned),
    }
}

/// Numbers that are read as their bytes.
#[derive(Debug)]
pub struct RawNumbers(Numbers<f32>);

impl From<Numbers<f32>> for RawNumbers {
    fn from(mut numbers: Numbers<f32>) -> Self {
        if cfg!(target_endian = "big") {
            numbers.iter_mut().for_each(|number| *number = f32::from_bits(number.to_bits().swap_bytes()));
        }
        Self(numbers)
    }
}

impl AsRef<[u8]> for RawNumbers {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use protocol::layout::to_bytes;

    use super::*;

    #[test]
    fn numbers_are_the_same_wherever_they_lie_and_however_they_are_given() {
        let values = vec![1.5, -0.0, f32::MIN_POSITIVE, f32::INFINITY, 3e-41];
        let raw = to_bytes(&values);
        assert_eq!(RawNumbers::from(Numbers::from(values.clone())).as_ref(), raw);
        for shift in 0..4 {
            let mut shifted = vec![0; shift];
            shifted.extend(&raw);
            assert_eq!(numbers(&shifted[shift..]).as_deref(), Some(&values[..]));
        }
        assert_eq!(numbers(&raw[1..]), None);
        assert_eq!(numbers(&[]).as_deref(), Some(&[][..]));
    }
}
