//! What rustls' own verifiers say about the certificates that we issue.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, Error, RootCertStore};
use tributary_certs::{BACKDATE_S, CERTIFICATE_DAYS, Ca, IdentityKey, SERVER_NAME, not_after, worker_identity};

const DAY: Duration = Duration::from_secs(86_400);

fn now() -> SystemTime {
    // Certificates carry whole seconds.
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn unix(at: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap())
}

fn roots(ca: &Ca) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.certificate().clone()).unwrap();
    Arc::new(roots)
}

fn as_client(ca: &Ca, certificate: &CertificateDer<'_>, at: SystemTime) -> Result<(), Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca), provider).build().unwrap();
    verifier.verify_client_cert(certificate, &[], unix(at)).map(|_| ())
}

fn as_server(ca: &Ca, certificate: &CertificateDer<'_>, name: &str, at: SystemTime) -> Result<(), Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(ca), provider).build().unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    verifier.verify_server_cert(certificate, &[], &name, &[], unix(at)).map(|_| ())
}

struct Fleet {
    ca: Ca,
    worker: CertificateDer<'static>,
    worker_key: IdentityKey,
    coordinator: CertificateDer<'static>,
}

fn fleet() -> Fleet {
    let (ca, _) = Ca::generate(now()).unwrap();
    let worker_key = IdentityKey::generate().unwrap();
    let coordinator_key = IdentityKey::generate().unwrap();
    Fleet {
        worker: ca.issue_worker(&worker_key.public(), now()).unwrap(),
        coordinator: ca.issue_coordinator(&coordinator_key.public(), now()).unwrap(),
        ca,
        worker_key,
    }
}

#[test]
fn each_certificate_is_good_for_its_own_side_only() {
    let fleet = fleet();
    as_client(&fleet.ca, &fleet.worker, now()).unwrap();
    as_server(&fleet.ca, &fleet.coordinator, SERVER_NAME, now()).unwrap();
    as_client(&fleet.ca, &fleet.coordinator, now()).unwrap_err();
    as_server(&fleet.ca, &fleet.worker, SERVER_NAME, now()).unwrap_err();
}

#[test]
fn the_coordinator_is_verified_by_its_one_name() {
    let fleet = fleet();
    let refused = as_server(&fleet.ca, &fleet.coordinator, "coordinator.example", now());
    assert!(matches!(refused, Err(Error::InvalidCertificate(_))), "{refused:?}");
}

#[test]
fn a_workers_identity_reads_back() {
    let fleet = fleet();
    let identity = worker_identity(&fleet.worker).unwrap();
    assert_eq!(identity.public, fleet.worker_key.public());
    assert_eq!(identity.id, fleet.worker_key.id());
    assert!(worker_identity(&fleet.coordinator).is_err());
}

#[test]
fn another_authoritys_certificates_are_refused() {
    let (ours, other) = (fleet(), fleet());
    let refused = as_client(&ours.ca, &other.worker, now()).unwrap_err();
    assert!(matches!(refused, Error::InvalidCertificate(_)), "{refused:?}");
    as_server(&ours.ca, &other.coordinator, SERVER_NAME, now()).unwrap_err();
}

#[test]
fn certificates_hold_for_ninety_days_and_an_hour_of_clock_skew() {
    let fleet = fleet();
    let skew = Duration::from_secs(BACKDATE_S);
    let days = DAY * u32::try_from(CERTIFICATE_DAYS).unwrap();
    let second = Duration::from_secs(1);
    as_client(&fleet.ca, &fleet.worker, now() - skew).unwrap();
    as_client(&fleet.ca, &fleet.worker, now() + days - second).unwrap();
    let early = as_client(&fleet.ca, &fleet.worker, now() - skew - second).unwrap_err();
    assert!(matches!(early, Error::InvalidCertificate(CertificateError::NotValidYetContext { .. })), "{early:?}");
    let late = as_client(&fleet.ca, &fleet.worker, now() + days + second).unwrap_err();
    assert!(matches!(late, Error::InvalidCertificate(CertificateError::ExpiredContext { .. })), "{late:?}");
}

#[test]
fn the_last_second_reads_back() {
    let fleet = fleet();
    let days = DAY * u32::try_from(CERTIFICATE_DAYS).unwrap();
    assert_eq!(not_after(&fleet.worker).unwrap(), now() + days);
    assert_eq!(not_after(&fleet.coordinator).unwrap(), now() + days);
    assert!(not_after(&CertificateDer::from(vec![0x30, 0])).is_err());
}

#[test]
fn renewal_is_issuing_again_for_the_same_key() {
    let fleet = fleet();
    let later = now() + 80 * DAY;
    let renewed = fleet.ca.issue_worker(&fleet.worker_key.public(), later).unwrap();
    assert_ne!(renewed, fleet.worker, "a serial is never used twice");
    assert_eq!(worker_identity(&renewed).unwrap(), worker_identity(&fleet.worker).unwrap());
    as_client(&fleet.ca, &renewed, later + 80 * DAY).unwrap();
}

#[test]
fn a_loaded_authority_verifies_and_issues_as_before() {
    let directory = tempfile::tempdir().unwrap();
    let ca = Ca::load_or_create(directory.path(), now()).unwrap();
    let key = IdentityKey::generate().unwrap();
    let before = ca.issue_worker(&key.public(), now()).unwrap();
    let loaded = Ca::load_or_create(directory.path(), now() + DAY).unwrap();
    assert_eq!(loaded.fingerprint(), ca.fingerprint());
    as_client(&loaded, &before, now()).unwrap();
    let after = loaded.issue_worker(&key.public(), now()).unwrap();
    as_client(&ca, &after, now()).unwrap();
}

#[test]
fn keys_load_into_rustls() {
    let key = IdentityKey::generate().unwrap();
    let tls = key.tls_key().unwrap();
    let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&tls).unwrap();
    let signature = signer.choose_scheme(&[rustls::SignatureScheme::ED25519]).unwrap().sign(b"hello").unwrap();
    use ed25519_dalek::Signer as _;
    assert_eq!(signature, key.signing_key().sign(b"hello").to_bytes());
}
