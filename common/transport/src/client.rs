//! The connecting side: finds the server at one of its addresses and proves who it is.
//!
//! A worker that is enrolled trusts the CA certificate that it keeps. One that holds only an invitation
//! knows the CA's hash; it gets the CA from the server, checks it against the hash, and keeps it.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::{ConnectError as QuicConnectError, EndpointConfig, TokioRuntime, TransportConfig};
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::CertificateDer;
use tokio::task::JoinSet;

use crate::close::{CloseCode, Ended};
use crate::connection::Connection;
use crate::limits;
use crate::path::Path;
use crate::server::{acknowledgements, take_long_datagrams, transport_config};
use crate::socket::{Crowd, MeteredSocket, Tap, Taps, Traffic, TrafficTotals};
use crate::tls::{self, Alpn, PinnedCa, SetupError, TlsIdentity};

/// How to connect, whatever the server.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Offer the post-quantum group only.
    pub strict_pq: bool,
    /// How often a connection says something when it has nothing to say. quinn fixes it when a
    /// connection begins, so whoever wants to be heard more often for a while sends messages.
    pub keep_alive: Duration,
    /// For tests.
    pub taps: Taps,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self { strict_pq: false, keep_alive: limits::KEEP_ALIVE, taps: Taps::default() }
    }
}

/// What a server must prove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// A certificate of this CA.
    Ca(CertificateDer<'static>),
    /// A certificate of the CA whose DER has this SHA-256, and which the server sends along.
    Fingerprint([u8; 32]),
}

/// Whom to connect to, and as who.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where the server may be; the first [`limits::ADDRESSES_MAX`] are tried.
    pub addresses: Vec<SocketAddr>,
    /// The name in the server's certificate.
    pub server_name: String,
    /// What the server must prove.
    pub trust: Trust,
    /// What we prove; needed on [`Alpn::Main`].
    pub identity: Option<TlsIdentity>,
    /// What we come for.
    pub alpn: Alpn,
}

/// What TLS is to verify and to show, ready for use. Making it takes some forty microseconds, most of them for reading the
/// key: whoever comes back keeps it.
#[derive(Debug, Clone)]
pub struct Credentials {
    config: quinn::ClientConfig,
    verifier: Arc<Verifier>,
}

/// A connection whose TLS handshake is complete on our side. Whether the server takes our certificate
/// shows only with the first message that it sends.
#[derive(Debug)]
pub struct Connected {
    /// The connection.
    pub connection: Connection,
    /// The CA that the server was verified against, to keep.
    pub ca: CertificateDer<'static>,
    /// 32 bytes that only the two ends of this connection know.
    pub exporter: [u8; 32],
}

/// An endpoint that connects.
#[derive(Debug)]
pub struct Client {
    endpoint: quinn::Endpoint,
    strict_pq: bool,
    keep_alive: Duration,
    traffic: Traffic,
    stream_tap: Option<Tap>,
}

impl Client {
    /// Binds a socket of its own, on any port. Must be called within a tokio runtime.
    pub fn bind(options: ClientOptions) -> Result<Self, SetupError> {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let bind = |source| SetupError::Bind { address: any, source };
        // An IPv6 socket reaches IPv4 addresses too; there may be no IPv6 here.
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).or_else(|_| UdpSocket::bind(any)).map_err(bind)?;
        let traffic = Traffic::default();
        let socket =
            MeteredSocket::new(socket, Crowd::default(), traffic.clone(), options.taps.datagrams).map_err(bind)?;
        let mut config = EndpointConfig::default();
        take_long_datagrams(&mut config);
        let endpoint =
            quinn::Endpoint::new_with_abstract_socket(config, None, Arc::new(socket), Arc::new(TokioRuntime))
                .map_err(bind)?;
        Ok(Self {
            endpoint,
            strict_pq: options.strict_pq,
            keep_alive: options.keep_alive,
            traffic,
            stream_tap: options.taps.streams,
        })
    }

    /// As [`Self::connect_as`], with credentials that are used once.
    pub async fn connect(&self, target: &Target) -> Result<Connected, ConnectError> {
        let credentials = self.prepare(&target.trust, target.identity.as_ref(), target.alpn)?;
        self.connect_as(&credentials, &target.addresses, &target.server_name).await
    }

    /// Connects to the first address that answers, of the first [`limits::ADDRESSES_MAX`], giving each a head start over
    /// the next. The server's certificate must have this name.
    pub async fn connect_as(
        &self,
        credentials: &Credentials,
        addresses: &[SocketAddr],
        server_name: &str,
    ) -> Result<Connected, ConnectError> {
        let mut attempts = JoinSet::new();
        for (address, place) in addresses.iter().take(limits::ADDRESSES_MAX).zip(0..) {
            let mut config = credentials.config.clone();
            config.transport_config(Arc::new(self.transport(Path::to(*address))));
            let attempt = Attempt {
                endpoint: self.endpoint.clone(),
                config,
                address: *address,
                server_name: server_name.to_owned(),
            };
            attempts.spawn(attempt.run(limits::ADDRESS_STAGGER * place));
        }
        let mut failures = Vec::new();
        while let Some(ended) = attempts.join_next().await {
            // Nobody cancels an attempt while this loop runs.
            match ended.expect("an attempt does not panic") {
                Ok(connection) => return self.connected(connection, &credentials.verifier),
                Err(failure) => failures.push(failure),
            }
        }
        Err(ConnectError::NowhereThere(failures))
    }

    /// Closes every connection.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.endpoint.close(code.varint(), reason.as_bytes());
    }

    /// Waits until the peers of all closed connections have been told.
    pub async fn wait_idle(&self) {
        self.endpoint.wait_idle().await;
    }

    /// What passed the socket since it was bound.
    pub fn traffic(&self) -> TrafficTotals {
        self.traffic.totals()
    }

    /// Makes what TLS needs of what the server must prove, of what we prove, and of what we come for.
    pub fn prepare(
        &self,
        trust: &Trust,
        identity: Option<&TlsIdentity>,
        alpn: Alpn,
    ) -> Result<Credentials, SetupError> {
        let provider = tls::provider(self.strict_pq);
        let (verifier, check): (_, Arc<dyn ServerCertVerifier>) = match trust {
            Trust::Ca(ca) => {
                let check = tls::webpki_verifier(ca, Arc::clone(&provider))?;
                (Verifier::Known(ca.clone()), check)
            }
            Trust::Fingerprint(pin) => {
                let check = Arc::new(PinnedCa::new(*pin, Arc::clone(&provider)));
                (Verifier::Pinned(Arc::clone(&check)), check)
            }
        };
        let crypto = tls::client_config(check, identity, alpn, provider)?;
        Ok(Credentials { config: quinn::ClientConfig::new(Arc::new(crypto)), verifier: Arc::new(verifier) })
    }

    fn transport(&self, path: Path) -> TransportConfig {
        let mut transport = transport_config(0, path);
        transport.keep_alive_interval(Some(self.keep_alive)).initial_rtt(limits::FIRST_RTT);
        // A server at leisure has rested for so long when it looks at a keep-alive, and acknowledges it there and then.
        transport.ack_frequency_config(Some(acknowledgements(Some(limits::REST))));
        transport
    }

    fn connected(&self, connection: quinn::Connection, verifier: &Verifier) -> Result<Connected, ConnectError> {
        let connection = Connection::new(connection, self.stream_tap.clone(), None);
        let (Some(exporter), Some(ca)) = (connection.exporter(), verifier.ca()) else {
            connection.close(CloseCode::Internal, "TLS gave no exporter");
            return Err(ConnectError::Incomplete);
        };
        Ok(Connected { connection, ca, exporter })
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Our own certificate, key or CA cannot be used.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// No address led to the server; an empty list if there was none to try.
    #[error("{}", listed(.0))]
    NowhereThere(Vec<(SocketAddr, ConnectFailure)>),
    /// TLS completed without what it must yield, which rustls should not let happen.
    #[error("TLS handshake yielded no keys")]
    Incomplete,
}

impl ConnectError {
    /// Whether somebody answered and could not prove to be the server: trying again will not help.
    pub fn is_untrusted(&self) -> bool {
        matches!(self, Self::NowhereThere(failures)
            if failures.iter().any(|(_, failure)| matches!(failure, ConnectFailure::Untrusted(_))))
    }
}

/// Why one address led nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectFailure {
    /// Nobody answered in time.
    #[error("nobody answered within {0:?}")]
    Silent(Duration),
    /// Whoever answered did not prove to be the server: another CA, another name, an expired certificate.
    #[error("whoever answers there is not our coordinator: {0}")]
    Untrusted(String),
    /// The server has as many connections as it takes.
    #[error("coordinator takes no more connections now")]
    Full,
    /// The server speaks none of our ALPNs, or none of our key exchanges.
    #[error("whoever answers there speaks another protocol: {0}")]
    OtherProtocol(String),
    /// The address cannot be connected to from here.
    #[error("cannot be reached from here: {0}")]
    Unreachable(String),
    /// The handshake failed otherwise.
    #[error("{0}")]
    Failed(Ended),
}

/// QUIC error codes (RFC 9000 section 20.1): refused, and the range of TLS alerts.
const CONNECTION_REFUSED: u64 = 0x2;
const CRYPTO_ERROR: std::ops::RangeInclusive<u64> = 0x100..=0x1ff;

/// TLS alerts (RFC 8446 section 6): handshake_failure and no_application_protocol, as QUIC errors.
const NO_COMMON_PROTOCOL: [u64; 2] = [0x100 + 40, 0x100 + 120];

impl From<Ended> for ConnectFailure {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::TimedOut => Self::Silent(limits::IDLE_TIMEOUT),
            Ended::ByPeersTransport { number: CONNECTION_REFUSED, .. } => Self::Full,
            Ended::ByPeersTransport { number, reason } | Ended::Transport { number, reason }
                if NO_COMMON_PROTOCOL.contains(&number) =>
            {
                Self::OtherProtocol(reason)
            }
            Ended::Transport { number, reason } if CRYPTO_ERROR.contains(&number) => Self::Untrusted(reason),
            other => Self::Failed(other),
        }
    }
}

/// Where the CA comes from that a connection was verified against.
#[derive(Debug)]
enum Verifier {
    Known(CertificateDer<'static>),
    Pinned(Arc<PinnedCa>),
}

impl Verifier {
    fn ca(&self) -> Option<CertificateDer<'static>> {
        match self {
            Self::Known(ca) => Some(ca.clone()),
            Self::Pinned(check) => check.seen().cloned(),
        }
    }
}

/// One address being tried.
struct Attempt {
    endpoint: quinn::Endpoint,
    config: quinn::ClientConfig,
    address: SocketAddr,
    server_name: String,
}

impl Attempt {
    async fn run(self, wait: Duration) -> Result<quinn::Connection, (SocketAddr, ConnectFailure)> {
        // A sleep of no time ends with the timer's next millisecond, or the one after it.
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let address = self.address;
        self.connect().await.map_err(|failure| (address, failure))
    }

    async fn connect(self) -> Result<quinn::Connection, ConnectFailure> {
        let connecting = self
            .endpoint
            .connect_with(self.config, self.address, &self.server_name)
            .map_err(|error: QuicConnectError| ConnectFailure::Unreachable(error.to_string()))?;
        match tokio::time::timeout(limits::CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(Ended::from(error).into()),
            Err(_) => Err(ConnectFailure::Silent(limits::CONNECT_TIMEOUT)),
        }
    }
}

fn listed(failures: &[(SocketAddr, ConnectFailure)]) -> String {
    if failures.is_empty() {
        return "no address to connect to".to_owned();
    }
    let each = failures.iter().map(|(address, failure)| format!("{address}: {failure}"));
    each.collect::<Vec<_>>().join("; ")
}
