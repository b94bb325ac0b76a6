//! TLS 1.3 as we speak it: one provider, post-quantum key exchange first, nothing resumed.
//!
//! rustls is built without TLS 1.2. Sessions are never resumed, because a resumed one carries the old
//! certificate, so that a revoked worker would be let in; and there is no 0-RTT, which could be
//! replayed. The server offers the CA's certificate at the end of its chain: a worker that holds only
//! the CA's hash finds there what to verify the server with ([`PinnedCa`]).

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, PeerIncompatible, RootCertStore, ServerConfig,
    SignatureScheme,
};
use sha2::{Digest as _, Sha256};

use crate::limits::CHAIN_MAX;

/// The label of the TLS exporter that binds the secure session to its connection.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-tributary-session";

/// What a connection is for, as agreed in TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `tributary`: an enrolled worker, with its certificate.
    Main,
    /// `tributary-join`: somebody with an invitation, without a certificate.
    Join,
}

impl Alpn {
    /// The name in the TLS handshake.
    pub fn name(self) -> &'static [u8] {
        match self {
            Self::Main => b"tributary",
            Self::Join => b"tributary-join",
        }
    }

    pub(crate) fn from_name(name: &[u8]) -> Option<Self> {
        [Self::Main, Self::Join].into_iter().find(|alpn| alpn.name() == name)
    }
}

/// A certificate and its private key, as one side presents them.
#[derive(Debug)]
pub struct TlsIdentity {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its private key, PKCS#8.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for TlsIdentity {
    fn clone(&self) -> Self {
        Self { certificate: self.certificate.clone(), key: self.key.clone_key() }
    }
}

/// Why an endpoint could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// rustls refused a certificate or key.
    #[error("certificate or key cannot be used: {0}")]
    Tls(#[from] Error),
    /// The CA certificate cannot be a trust anchor.
    #[error("CA certificate cannot be used: {0}")]
    Verifier(#[from] VerifierBuilderError),
    /// The provider lacks the cipher suite of QUIC's first packets.
    #[error("crypto provider cannot speak QUIC: {0}")]
    Suite(#[from] NoInitialCipherSuite),
    /// The UDP socket could not be bound.
    #[error("{address}: UDP socket cannot be bound: {source}")]
    Bind {
        /// Where.
        address: std::net::SocketAddr,
        /// The operating system's answer.
        source: std::io::Error,
    },
}

/// The one place where a crypto provider is made. `strict_pq` leaves only the post-quantum hybrid, so
/// that a peer cannot talk us down to X25519 alone.
pub(crate) fn provider(strict_pq: bool) -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups =
        if strict_pq { vec![kx_group::X25519MLKEM768] } else { vec![kx_group::X25519MLKEM768, kx_group::X25519] };
    Arc::new(provider)
}

/// The server's side: certificates of workers are verified if given, and demanded by
/// [`Handshake::complete`](crate::Handshake::complete) where the ALPN needs one.
pub(crate) fn server_config(
    ca: &CertificateDer<'static>,
    identity: &TlsIdentity,
    strict_pq: bool,
) -> Result<QuicServerConfig, SetupError> {
    let provider = provider(strict_pq);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca)?, Arc::clone(&provider))
        .allow_unauthenticated()
        .clear_root_hint_subjects()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate.clone(), ca.clone()], identity.key.clone_key())?;
    config.alpn_protocols = vec![Alpn::Main.name().to_vec(), Alpn::Join.name().to_vec()];
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(QuicServerConfig::try_from(config)?)
}

/// The client's side, which verifies the server with `verifier`.
pub(crate) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    identity: Option<&TlsIdentity>,
    alpn: Alpn,
    provider: Arc<CryptoProvider>,
) -> Result<QuicClientConfig, SetupError> {
    // rustls calls every verifier of one's own dangerous. Ours delegates to webpki.
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(TlsIdentity { certificate, key }) => {
            builder.with_client_auth_cert(vec![certificate.clone()], key.clone_key())?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.name().to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(QuicClientConfig::try_from(config)?)
}

/// webpki's verifier with one root.
pub(crate) fn webpki_verifier(
    ca: &CertificateDer<'_>,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, SetupError> {
    Ok(WebPkiServerVerifier::builder_with_provider(roots(ca)?, provider).build()?)
}

/// Trusts whatever chain ends in the CA whose DER has this SHA-256, and remembers that CA.
///
/// The pin only selects the root; webpki then verifies name, dates, usage and signatures against it.
#[derive(Debug)]
pub(crate) struct PinnedCa {
    pin: [u8; 32],
    provider: Arc<CryptoProvider>,
    seen: OnceLock<CertificateDer<'static>>,
}

impl PinnedCa {
    pub(crate) fn new(pin: [u8; 32], provider: Arc<CryptoProvider>) -> Self {
        Self { pin, provider, seen: OnceLock::new() }
    }

    /// The CA, once a chain was verified. It means something only after the handshake succeeded.
    pub(crate) fn seen(&self) -> Option<&CertificateDer<'static>> {
        self.seen.get()
    }

    fn pinned<'a, 'b>(&self, chain: &'a [CertificateDer<'b>]) -> Result<&'a CertificateDer<'b>, Error> {
        chain
            .iter()
            .take(CHAIN_MAX)
            .find(|certificate| Sha256::digest(certificate)[..] == self.pin)
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = self.pinned(intermediates)?;
        let verifier =
            webpki_verifier(ca, Arc::clone(&self.provider)).map_err(|error| Error::General(error.to_string()))?;
        let verified = verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)?;
        self.seen.get_or_init(|| ca.clone().into_owned());
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn roots(ca: &CertificateDer<'_>) -> Result<Arc<RootCertStore>, SetupError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone().into_owned())?;
    Ok(Arc::new(roots))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use certs::{Ca, IdentityKey, SERVER_NAME};
    use rustls::NamedGroup;

    use super::*;

    struct Chain {
        ca: Ca,
        server: CertificateDer<'static>,
    }

    fn chain() -> Chain {
        let (ca, _) = Ca::generate(SystemTime::now()).unwrap();
        let key = IdentityKey::generate().unwrap();
        let server = ca.issue_coordinator(&key.public(), SystemTime::now()).unwrap();
        Chain { ca, server }
    }

    fn verify(
        pin: [u8; 32],
        server: &CertificateDer<'static>,
        intermediates: &[CertificateDer<'static>],
        at: SystemTime,
    ) -> Result<Option<CertificateDer<'static>>, Error> {
        let verifier = PinnedCa::new(pin, provider(false));
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        let now = UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap());
        let verified = verifier.verify_server_cert(server, intermediates, &name, &[], now);
        assert_eq!(verified.is_ok(), verifier.seen().is_some());
        verified.map(|_| verifier.seen().cloned())
    }

    #[test]
    fn the_pinned_ca_is_found_in_the_chain_and_kept() {
        let Chain { ca, server } = chain();
        let sent = [ca.certificate().clone()];
        let seen = verify(ca.fingerprint(), &server, &sent, SystemTime::now()).unwrap();
        assert_eq!(seen.as_ref(), Some(ca.certificate()));
    }

    #[test]
    fn another_ca_or_none_is_refused() {
        let (ours, other) = (chain(), chain());
        let now = SystemTime::now();
        let pin = ours.ca.fingerprint();
        let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let foreign = verify(pin, &other.server, &[other.ca.certificate().clone()], now);
        assert_eq!(foreign, Err(unknown.clone()));
        assert_eq!(verify(pin, &ours.server, &[], now), Err(unknown.clone()));
        let too_long = vec![other.ca.certificate().clone(); CHAIN_MAX];
        let hidden = [too_long, vec![ours.ca.certificate().clone()]].concat();
        assert_eq!(verify(pin, &ours.server, &hidden, now), Err(unknown));
    }

    #[test]
    fn the_pinned_ca_beside_another_ones_server_certificate_is_refused() {
        let (ours, other) = (chain(), chain());
        let sent = [ours.ca.certificate().clone()];
        let pin = ours.ca.fingerprint();
        let refused = verify(pin, &other.server, &sent, SystemTime::now()).unwrap_err();
        assert!(matches!(refused, Error::InvalidCertificate(_)), "{refused:?}");
    }

    #[test]
    fn a_worker_cannot_pose_as_the_coordinator() {
        let Chain { ca, .. } = chain();
        let key = IdentityKey::generate().unwrap();
        let worker = ca.issue_worker(&key.public(), SystemTime::now()).unwrap();
        let sent = [ca.certificate().clone()];
        let refused = verify(ca.fingerprint(), &worker, &sent, SystemTime::now()).unwrap_err();
        assert!(matches!(refused, Error::InvalidCertificate(_)), "{refused:?}");
    }

    #[test]
    fn an_expired_server_is_refused_though_its_ca_is_pinned() {
        let Chain { ca, server } = chain();
        let later = SystemTime::now() + Duration::from_secs(91 * 86_400);
        let sent = [ca.certificate().clone()];
        let refused = verify(ca.fingerprint(), &server, &sent, later).unwrap_err();
        assert!(matches!(refused, Error::InvalidCertificate(CertificateError::ExpiredContext { .. })), "{refused:?}");
    }

    #[test]
    fn the_post_quantum_group_comes_first_and_strictly_alone() {
        let groups =
            |strict| -> Vec<NamedGroup> { provider(strict).kx_groups.iter().map(|group| group.name()).collect() };
        assert_eq!(groups(false), [NamedGroup::X25519MLKEM768, NamedGroup::X25519]);
        assert_eq!(groups(true), [NamedGroup::X25519MLKEM768]);
    }

    #[test]
    fn there_is_no_cipher_suite_below_tls_1_3() {
        let suites = provider(false).cipher_suites.clone();
        assert!(!suites.is_empty());
        assert!(suites.iter().all(|suite| suite.tls13().is_some()));
    }
}
