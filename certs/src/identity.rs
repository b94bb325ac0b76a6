//! Reading a worker's identity, and a date, back out of a certificate that rustls has verified.
//!
//! A worker's id is SHA-256 of its Ed25519 public key, cut to 16 bytes, so id and key name each other:
//! a certificate in which they disagree is refused, whoever signed it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ed25519_dalek::VerifyingKey;
use rustls::pki_types::{CertificateDer, UnixTime};
use sha2::{Digest as _, Sha256};

/// A worker certificate's one URI name is this, followed by the id as 32 lower-case hex digits.
pub const WORKER_URI_PREFIX: &str = "tributary://worker/";

/// The DER that stands before the 32 bytes of every Ed25519 public key (RFC 8410 section 4).
const ED25519_SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Who a worker certificate speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerIdentity {
    /// SHA-256 of `public`, cut to 16 bytes.
    pub id: [u8; 16],
    /// The Ed25519 key of certificate and signatures.
    pub public: [u8; 32],
}

/// The id that belongs to an Ed25519 public key.
pub fn worker_id(public: &[u8; 32]) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(public).into();
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    id
}

/// The identity in a certificate that TLS has already verified against our CA.
///
/// This checks names and keys only, not signatures or dates.
pub fn worker_identity(certificate: &CertificateDer<'_>) -> Result<WorkerIdentity, IdentityError> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|error| IdentityError::NotACertificate(error.to_string()))?;
    let public = ed25519_public(&parsed.subject_public_key_info())?;
    let mut names = parsed.valid_uri_names();
    let (Some(name), None) = (names.next(), names.next()) else {
        return Err(IdentityError::NotOneUriName(parsed.valid_uri_names().count()));
    };
    let id = worker_id(&public);
    match name.strip_prefix(WORKER_URI_PREFIX) {
        Some(named) if named == hex(&id) => Ok(WorkerIdentity { id, public }),
        Some(named) => Err(IdentityError::IdOfAnotherKey { got: named.to_owned(), expected: hex(&id) }),
        None => Err(IdentityError::NotAWorker(name.to_owned())),
    }
}

/// When a certificate of either side stops to be valid, so that it can be renewed in time.
pub fn not_after(certificate: &CertificateDer<'_>) -> Result<SystemTime, IdentityError> {
    let unreadable = |error: webpki::Error| IdentityError::NotACertificate(error.to_string());
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(unreadable)?;
    // webpki tells the date to nobody but those who come too late.
    let (algorithms, usage) = (webpki::ALL_VERIFICATION_ALGS, webpki::KeyUsage::client_auth());
    let verified = parsed.verify_for_usage(algorithms, &[], &[], AFTER_ALL_DATES, usage, None, None);
    match verified {
        Err(webpki::Error::CertExpired { not_after, .. }) => Ok(UNIX_EPOCH + Duration::from_secs(not_after.as_secs())),
        Err(other) => Err(unreadable(other)),
        Ok(_) => Err(unreadable(webpki::Error::BadDer)),
    }
}

/// After the last second that a certificate can name, 9999-12-31T23:59:59Z.
const AFTER_ALL_DATES: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(253_402_300_800));

/// Why a certificate names no worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The DER does not parse.
    #[error("certificate does not parse: {0}")]
    NotACertificate(String),
    /// The key in it is not Ed25519, or not a point of full order.
    #[error("certificate holds no usable Ed25519 key")]
    NotEd25519,
    /// There is not exactly one URI among its names.
    #[error("certificate has {0} URI names, expected exactly one")]
    NotOneUriName(usize),
    /// Its URI names something other than a worker.
    #[error("certificate names {0:?}, expected \"{WORKER_URI_PREFIX}<id>\"")]
    NotAWorker(String),
    /// Its id is not the hash of its key.
    #[error("certificate names worker {got:?}, but its key is that of {expected}")]
    IdOfAnotherKey {
        /// The id in the certificate.
        got: String,
        /// The id that the certificate's key has.
        expected: String,
    },
}

/// Whether these bytes are the one encoding of a point of the curve whose order is not small.
pub(crate) fn is_usable_ed25519(public: &[u8; 32]) -> bool {
    is_reduced(public) && VerifyingKey::from_bytes(public).is_ok_and(|key| !key.is_weak())
}

/// Whether the encoded y lies below p = 2^255 - 19 (RFC 8032 section 5.1.3). The decoder accepts the
/// nineteen values above it too, which would give one key two ids.
fn is_reduced(public: &[u8; 32]) -> bool {
    let [low, middle @ .., high] = public;
    *low < 0xed || high & 0x7f != 0x7f || middle.iter().any(|byte| *byte != 0xff)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn ed25519_public(spki: &[u8]) -> Result<[u8; 32], IdentityError> {
    spki.strip_prefix(&ED25519_SPKI_PREFIX)
        .and_then(|key| <[u8; 32]>::try_from(key).ok())
        .filter(is_usable_ed25519)
        .ok_or(IdentityError::NotEd25519)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SanType};

    use super::*;

    /// A self-signed certificate with these URI names, by a fresh key of rcgen's own.
    fn with_uris(uris: &[&str], algorithm: &'static rcgen::SignatureAlgorithm) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        let key = KeyPair::generate_for(algorithm).unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn exactly_one_uri_name_is_expected() {
        let none = with_uris(&[], &PKCS_ED25519);
        assert_eq!(worker_identity(&none), Err(IdentityError::NotOneUriName(0)));
        let two = with_uris(&["tributary://worker/a", "tributary://worker/b"], &PKCS_ED25519);
        assert_eq!(worker_identity(&two), Err(IdentityError::NotOneUriName(2)));
    }

    #[test]
    fn an_id_of_another_key_is_refused() {
        let id = "00112233445566778899aabbccddeeff";
        let forged = with_uris(&[&format!("{WORKER_URI_PREFIX}{id}")], &PKCS_ED25519);
        let refused = worker_identity(&forged).unwrap_err();
        assert!(matches!(&refused, IdentityError::IdOfAnotherKey { got, .. } if got == id), "{refused}");
    }

    #[test]
    fn a_uri_that_is_not_a_workers_is_refused() {
        let other = with_uris(&["spiffe://example/worker"], &PKCS_ED25519);
        assert!(matches!(worker_identity(&other), Err(IdentityError::NotAWorker(_))));
    }

    #[test]
    fn a_key_of_another_kind_is_refused() {
        let ecdsa = with_uris(&["tributary://worker/a"], &PKCS_ECDSA_P256_SHA256);
        assert_eq!(worker_identity(&ecdsa), Err(IdentityError::NotEd25519));
    }

    #[test]
    fn bytes_that_are_no_certificate_are_refused() {
        for bytes in [vec![], vec![0x30], vec![0xff; 400]] {
            let refused = worker_identity(&CertificateDer::from(bytes));
            assert!(matches!(refused, Err(IdentityError::NotACertificate(_))));
        }
    }
}
