//! The certificate authority: makes itself once, signs workers and the coordinator.
//!
//! What the invitation pins is the SHA-256 of the CA certificate's DER, so those bytes must never
//! change. They are therefore stored beside the key and never rebuilt: another version of the DER
//! writer might order a field differently and lock a whole fleet out. [`Ca::load`] proves that key and
//! certificate belong together before it signs anything.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ed25519_dalek::Signer as _;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PKCS_ED25519, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm,
};
use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

use crate::identity::{WORKER_URI_PREFIX, hex, is_usable_ed25519, worker_id};
use crate::keys::{self, IdentityKey, KeyError, KeyFileError};

/// The DNS name in the coordinator's certificate. It is constant, so addresses may change, and lies
/// under `.invalid` (RFC 2606), so no resolver will ever answer for it.
pub const SERVER_NAME: &str = "coordinator.tributary.invalid";

/// How long a worker's or coordinator's certificate is valid, in days.
pub const CERTIFICATE_DAYS: u64 = 90;

/// How long the CA itself is valid, in days: twenty years, longer than any fleet keeps its keys.
pub const CA_DAYS: u64 = 20 * 365;

/// Certificates begin this long before they are made, in seconds, for peers whose clocks are behind.
pub const BACKDATE_S: u64 = 3_600;

/// 16 random bytes, as RFC 5280 section 4.1.2.2 allows up to 20.
const SERIAL_BYTES: usize = 16;

const DAY_S: u64 = 86_400;

/// A certificate authority: a key, and the certificate that everybody pins.
pub struct Ca {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, Signer>,
}

impl Ca {
    /// Makes a new authority with a fresh key, valid from `now` for [`CA_DAYS`].
    pub fn generate(now: SystemTime) -> Result<(Self, IdentityKey), CertError> {
        let key = IdentityKey::generate()?;
        let ca = Self::self_sign(&key, now)?;
        Ok((ca, key))
    }

    /// Rebuilds an authority from its key and the certificate that [`Ca::certificate`] gave.
    pub fn load(key: &IdentityKey, certificate: CertificateDer<'static>) -> Result<Self, CertError> {
        let issuer = Issuer::new(ca_params(), Signer::new(key));
        let parsed = webpki::anchor_from_trusted_cert(&certificate)
            .map_err(|error| CertError::NotACertificate(error.to_string()))?;
        // A certificate of our own making shows what name and key this one must have.
        let ours = Self::self_sign(key, UNIX_EPOCH)?;
        let expected = webpki::anchor_from_trusted_cert(&ours.certificate)
            .map_err(|error| CertError::NotACertificate(error.to_string()))?;
        if parsed.subject_public_key_info != expected.subject_public_key_info || parsed.subject != expected.subject {
            return Err(CertError::NotOfThisKey);
        }
        Ok(Self { certificate, issuer })
    }

    /// Loads `ca.key` and `ca.der` from `directory`, or makes them there at the first start.
    ///
    /// The key is durable before the certificate. A crash between the two leaves a key whose
    /// certificate nobody has seen, so the next start simply makes the certificate.
    pub fn load_or_create(directory: &Path, now: SystemTime) -> Result<Self, CertError> {
        let (key_path, certificate_path) = (directory.join("ca.key"), directory.join("ca.der"));
        match keys::read_bounded(&certificate_path)? {
            Some(der) => {
                let key = keys::load(&key_path)?;
                Self::load(&key, CertificateDer::from(der))
            }
            None => {
                let ca = Self::self_sign(&keys::load_or_create(&key_path)?, now)?;
                keys::write_private(&certificate_path, &ca.certificate)?;
                Ok(ca)
            }
        }
    }

    /// The CA certificate, which the server sends at the end of its chain and workers keep.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// SHA-256 of the CA certificate's DER: what an invitation pins.
    pub fn fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.certificate)
    }

    /// Signs a worker's bare Ed25519 key: client authentication only, for [`CERTIFICATE_DAYS`].
    ///
    /// Calling it again with the same key is renewal. The caller has seen that the worker holds the
    /// private key.
    pub fn issue_worker(&self, public: &[u8; 32], now: SystemTime) -> Result<CertificateDer<'static>, CertError> {
        let id = hex(&worker_id(public));
        let uri = Ia5String::try_from(format!("{WORKER_URI_PREFIX}{id}"))?;
        self.issue(Leaf {
            public,
            common_name: &format!("tributary worker {id}"),
            name: SanType::URI(uri),
            usage: ExtendedKeyUsagePurpose::ClientAuth,
            now,
        })
    }

    /// Signs the coordinator's key for [`SERVER_NAME`]: server authentication only, for
    /// [`CERTIFICATE_DAYS`]. Calling it again with the same key is renewal.
    pub fn issue_coordinator(&self, public: &[u8; 32], now: SystemTime) -> Result<CertificateDer<'static>, CertError> {
        self.issue(Leaf {
            public,
            common_name: "tributary coordinator",
            name: SanType::DnsName(Ia5String::try_from(SERVER_NAME)?),
            usage: ExtendedKeyUsagePurpose::ServerAuth,
            now,
        })
    }

    fn self_sign(key: &IdentityKey, now: SystemTime) -> Result<Self, CertError> {
        let mut params = ca_params();
        (params.not_before, params.not_after) = validity(now, CA_DAYS)?;
        params.serial_number = Some(random_serial()?);
        let certificate = params.self_signed(&Signer::new(key))?.der().clone();
        let issuer = Issuer::new(params, Signer::new(key));
        Ok(Self { certificate, issuer })
    }

    fn issue(&self, leaf: Leaf<'_>) -> Result<CertificateDer<'static>, CertError> {
        if !is_usable_ed25519(leaf.public) {
            return Err(CertError::WeakKey);
        }
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = validity(leaf.now, CERTIFICATE_DAYS)?;
        params.serial_number = Some(random_serial()?);
        params.distinguished_name = common_name(leaf.common_name);
        params.subject_alt_names = vec![leaf.name];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![leaf.usage];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&BareKey(leaf.public), &self.issuer)?;
        Ok(certificate.der().clone())
    }
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").field("fingerprint", &hex(&self.fingerprint())).field("key", &"[redacted]").finish()
    }
}

/// SHA-256 of a certificate's DER.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

/// Why the authority could not be loaded, or would not sign.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertError {
    /// The public key is not the encoding of a point, or one of low order: anybody could sign for it.
    #[error("Ed25519 public key is not a usable point of the curve: no certificate is issued for it")]
    WeakKey,
    /// The stored CA certificate does not parse.
    #[error("CA certificate does not parse: {0}")]
    NotACertificate(String),
    /// The stored CA certificate and the stored CA key are of different authorities.
    #[error("CA certificate belongs to another key: restore ca.key and ca.der from one backup")]
    NotOfThisKey,
    /// A date falls outside what a certificate can hold.
    #[error("validity from {0:?} cannot be written in a certificate: check the system clock")]
    ClockOutOfRange(SystemTime),
    /// The certificate writer refused.
    #[error("certificate cannot be written: {0}")]
    Encoding(#[from] rcgen::Error),
    /// A key could not be made or read.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A file of the authority could not be read or written.
    #[error(transparent)]
    File(#[from] KeyFileError),
}

/// What differs between the two kinds of certificate.
struct Leaf<'a> {
    public: &'a [u8; 32],
    common_name: &'a str,
    name: SanType,
    usage: ExtendedKeyUsagePurpose,
    now: SystemTime,
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = common_name("tributary fleet CA");
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn random_serial() -> Result<SerialNumber, KeyError> {
    let bytes = keys::random_bytes::<SERIAL_BYTES>()?;
    Ok(SerialNumber::from_slice(bytes.as_ref()))
}

fn validity(now: SystemTime, days: u64) -> Result<(OffsetDateTime, OffsetDateTime), CertError> {
    let out_of_range = || CertError::ClockOutOfRange(now);
    let since = now.duration_since(UNIX_EPOCH).map_err(|_| out_of_range())?;
    let from = since.saturating_sub(Duration::from_secs(BACKDATE_S));
    let until = since.checked_add(Duration::from_secs(days * DAY_S)).ok_or_else(out_of_range)?;
    let date = |at: Duration| {
        let seconds = i64::try_from(at.as_secs()).map_err(|_| out_of_range())?;
        OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| out_of_range())
    };
    Ok((date(from)?, date(until)?))
}

/// rcgen's view of a public key whose private half is elsewhere.
struct BareKey<'a>(&'a [u8; 32]);

impl PublicKeyData for BareKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

/// rcgen's view of our key. It signs through ed25519-dalek, so that the private key lives in one
/// place, which wipes it.
struct Signer {
    key: ed25519_dalek::SigningKey,
    public: [u8; 32],
}

impl Signer {
    fn new(key: &IdentityKey) -> Self {
        Self { key: key.signing_key().clone(), public: key.public() }
    }
}

impl PublicKeyData for Signer {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ED25519
    }
}

impl rcgen::SigningKey for Signer {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Ok(self.key.sign(message).to_bytes().to_vec())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_loaded_authority_is_the_same_authority() {
        let (ca, key) = Ca::generate(SystemTime::now()).unwrap();
        let again = Ca::load(&key, ca.certificate().clone()).unwrap();
        assert_eq!(again.fingerprint(), ca.fingerprint());
    }

    #[test]
    fn a_certificate_of_another_authority_is_not_loaded_with_this_key() {
        let (_, key) = Ca::generate(SystemTime::now()).unwrap();
        let (other, _) = Ca::generate(SystemTime::now()).unwrap();
        let refused = Ca::load(&key, other.certificate().clone());
        assert!(matches!(refused, Err(CertError::NotOfThisKey)));
        let garbage = Ca::load(&key, CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]));
        assert!(matches!(garbage, Err(CertError::NotACertificate(_))));
    }

    #[test]
    fn a_directory_makes_one_authority_and_keeps_it() {
        let directory = tempfile::tempdir().unwrap();
        let first = Ca::load_or_create(directory.path(), SystemTime::now()).unwrap();
        let later = SystemTime::now() + Duration::from_secs(86_400);
        let second = Ca::load_or_create(directory.path(), later).unwrap();
        assert_eq!(first.certificate(), second.certificate());
    }

    #[test]
    fn a_crash_between_key_and_certificate_is_mended_at_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let key: IdentityKey = keys::load_or_create(&directory.path().join("ca.key")).unwrap();
        let ca = Ca::load_or_create(directory.path(), SystemTime::now()).unwrap();
        assert!(Ca::load(&key, ca.certificate().clone()).is_ok());
    }

    #[test]
    fn a_certificate_without_its_key_is_refused_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        Ca::load_or_create(directory.path(), SystemTime::now()).unwrap();
        std::fs::remove_file(directory.path().join("ca.key")).unwrap();
        let refused = Ca::load_or_create(directory.path(), SystemTime::now());
        assert!(matches!(refused, Err(CertError::File(_))), "{refused:?}");
        assert!(!directory.path().join("ca.key").exists());
    }

    #[test]
    fn keys_of_low_order_or_off_the_curve_get_no_certificate() {
        let (ca, _) = Ca::generate(SystemTime::now()).unwrap();
        let mut identity_point = [0; 32];
        identity_point[0] = 1;
        let mut off_the_curve = [0; 32];
        off_the_curve[0] = 2;
        for public in [[0; 32], [0xff; 32], identity_point, off_the_curve] {
            let refused = ca.issue_worker(&public, SystemTime::now());
            assert!(matches!(refused, Err(CertError::WeakKey)), "{public:?}");
            let refused = ca.issue_coordinator(&public, SystemTime::now());
            assert!(matches!(refused, Err(CertError::WeakKey)), "{public:?}");
        }
    }

    #[test]
    fn a_clock_outside_the_calendar_is_refused() {
        let (ca, key) = Ca::generate(SystemTime::now()).unwrap();
        let before = UNIX_EPOCH - Duration::from_secs(1);
        let far = UNIX_EPOCH + Duration::from_secs(1 << 40);
        for now in [before, far] {
            let refused = ca.issue_worker(&key.public(), now);
            assert!(matches!(refused, Err(CertError::ClockOutOfRange(_))), "{now:?}");
        }
    }

    #[test]
    fn nothing_secret_is_printed() {
        let (ca, key) = Ca::generate(SystemTime::now()).unwrap();
        assert!(format!("{ca:?}").contains("[redacted]"));
        assert!(!format!("{ca:?} {key:?}").contains(&hex(key.signing_key().as_bytes())));
    }
}
