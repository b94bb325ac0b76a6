//! The listening side: one UDP port, two ALPNs, a bound on everything.
//!
//! [`Server::accept`] hands out handshakes as they begin, so that slow ones do not hold up others; each
//! is completed in a task of its own. Attempts over a bound are refused here and never seen by callers.
//! The keys of stateless resets are the caller's to keep: with them a restarted server's first answer
//! ends the connections that its former self had, instead of leaving workers to their idle timeout.

use std::fmt;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{
    AckFrequencyConfig, Connecting, ConnectionError, EndpointConfig, Incoming, MtuDiscoveryConfig, TokioRuntime,
    TransportConfig, ValidationTokenConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use rustls::pki_types::CertificateDer;
use sha2::Sha256;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::close::{CloseCode, Ended};
use crate::connection::Connection;
use crate::limits;
use crate::path::Path;
use crate::socket::{Crowd, MeteredSocket, Seat, Tap, Taps, Traffic, TrafficTotals};
use crate::tls::{self, Alpn, SetupError, TlsIdentity};

/// How to listen.
#[derive(Debug)]
pub struct ServerOptions {
    /// The UDP address; port 0 takes any that is free.
    pub listen: SocketAddr,
    /// The CA whose workers are let in. It is also sent to clients, which may know only its hash.
    pub ca: CertificateDer<'static>,
    /// The server's own certificate and key.
    pub identity: TlsIdentity,
    /// What restarts must not change.
    pub reset_keys: ResetKeys,
    /// Refuse clients that do not offer the post-quantum group.
    pub strict_pq: bool,
    /// Connections at once, those still in the handshake or draining included.
    pub connections_max: usize,
    /// Handshakes at once.
    pub handshakes_max: usize,
    /// Whether a thread that receives may rest for [`limits::REST`] while nothing but keep-alives come, so that they come
    /// together. Not for a runtime that has anything else to do.
    pub leisure: bool,
    /// For tests.
    pub taps: Taps,
}

impl ServerOptions {
    /// Options with the bounds of [`limits`], no strictness and no taps.
    pub fn new(listen: SocketAddr, ca: CertificateDer<'static>, identity: TlsIdentity, reset_keys: ResetKeys) -> Self {
        Self {
            listen,
            ca,
            identity,
            reset_keys,
            strict_pq: false,
            connections_max: limits::CONNECTIONS_MAX,
            handshakes_max: limits::HANDSHAKES_MAX,
            leisure: false,
            taps: Taps::default(),
        }
    }
}

/// What a restarted server needs to end its former self's connections: the key of the reset tokens, and
/// the one by which it knows its connection ids.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct ResetKeys {
    token_key: [u8; 32],
    connection_id_key: u64,
}

impl ResetKeys {
    /// The length of what [`ResetKeys::from_bytes`] takes.
    pub const BYTES: usize = 40;

    /// Keys from random bytes that the caller keeps as a secret.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let (mut token_key, mut connection_id_key) = ([0; 32], [0; 8]);
        token_key.copy_from_slice(&bytes[..32]);
        connection_id_key.copy_from_slice(&bytes[32..]);
        Self { token_key, connection_id_key: u64::from_le_bytes(connection_id_key) }
    }
}

impl fmt::Debug for ResetKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResetKeys([redacted])")
    }
}

/// A listening endpoint.
#[derive(Debug)]
pub struct Server {
    endpoint: quinn::Endpoint,
    configs: RwLock<Configs>,
    crowd: Crowd,
    ca: CertificateDer<'static>,
    strict_pq: bool,
    connections_max: usize,
    handshakes_max: usize,
    handshakes: Arc<Semaphore>,
    retried: AtomicU64,
    traffic: Traffic,
    stream_tap: Option<Tap>,
}

impl Server {
    /// Binds the socket and begins to listen. Must be called within a tokio runtime.
    pub fn bind(options: ServerOptions) -> Result<Self, SetupError> {
        let configs = Configs::new(tls::server_config(&options.ca, &options.identity, options.strict_pq)?);
        let address = options.listen;
        let bind = |source| SetupError::Bind { address, source };
        let socket = UdpSocket::bind(address).map_err(bind)?;
        let (crowd, traffic) = (Crowd::default(), Traffic::default());
        let socket =
            MeteredSocket::new(socket, crowd.clone(), traffic.clone(), options.taps.datagrams).map_err(bind)?;
        let socket = if options.leisure { socket.at_leisure() } else { socket };
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(&options.reset_keys),
            Some(configs.any()),
            Arc::new(socket),
            Arc::new(TokioRuntime),
        )
        .map_err(bind)?;
        Ok(Self {
            endpoint,
            configs: RwLock::new(configs),
            crowd,
            ca: options.ca,
            strict_pq: options.strict_pq,
            connections_max: options.connections_max,
            handshakes_max: options.handshakes_max,
            handshakes: Arc::new(Semaphore::new(options.handshakes_max)),
            retried: AtomicU64::new(0),
            traffic,
            stream_tap: options.taps.streams,
        })
    }

    /// The next handshake that begins; `None` once the server was closed. Cancel-safe.
    pub async fn accept(&self) -> Option<Handshake> {
        loop {
            let incoming = self.endpoint.accept().await?;
            if let Some(handshake) = self.admit(incoming) {
                return Some(handshake);
            }
        }
    }

    /// The address that it listens on.
    pub fn local_address(&self) -> Result<SocketAddr, std::io::Error> {
        self.endpoint.local_addr()
    }

    /// Presents another certificate from now on: renewal. Connections that stand are left alone.
    pub fn set_identity(&self, identity: &TlsIdentity) -> Result<(), SetupError> {
        let configs = Configs::new(tls::server_config(&self.ca, identity, self.strict_pq)?);
        self.endpoint.set_server_config(Some(configs.any()));
        *self.configs.write().unwrap_or_else(PoisonError::into_inner) = configs;
        Ok(())
    }

    /// Closes every connection and accepts no more.
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

    /// How many connections there are, and what became of attempts.
    pub fn counts(&self) -> ServerCounts {
        let stats = self.endpoint.stats();
        ServerCounts {
            connections: self.endpoint.open_connections(),
            connections_max: self.connections_max,
            handshakes: self.handshakes_in_flight(),
            begun: stats.accepted_handshakes,
            refused: stats.refused_handshakes,
            retried: self.retried.load(Ordering::Relaxed),
        }
    }

    /// What one connection may have unacknowledged now, for [`Connection::send_within`]: less where there are many.
    pub fn send_window_bytes(&self) -> u64 {
        share_of_windows(self.endpoint.open_connections() as u64)
    }

    /// Lets a handshake begin if the bounds allow it.
    fn admit(&self, incoming: Incoming) -> Option<Handshake> {
        let share = self.handshakes_max / limits::HANDSHAKES_UNVALIDATED_SHARE;
        if incoming.may_retry() && self.handshakes_in_flight() >= share {
            self.retried.fetch_add(1, Ordering::Relaxed);
            // It fails only for an address that is validated already, which may_retry excludes.
            let _ = incoming.retry();
            return None;
        }
        let permit = Arc::clone(&self.handshakes).try_acquire_owned().ok();
        let full = self.endpoint.open_connections() >= self.connections_max;
        let Some(permit) = permit.filter(|_| !full) else {
            incoming.refuse();
            return None;
        };
        let remote_address = incoming.remote_address();
        let path = Path::to(remote_address);
        let config = self.configs.read().unwrap_or_else(PoisonError::into_inner).over(path);
        Some(Handshake {
            remote_address,
            connecting: incoming.accept_with(config),
            tap: self.stream_tap.clone(),
            seat: (path != Path::Ordinary).then(|| self.crowd.seat()),
            _permit: permit,
        })
    }

    fn handshakes_in_flight(&self) -> usize {
        self.handshakes_max.saturating_sub(self.handshakes.available_permits())
    }
}

/// A server's counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerCounts {
    /// Connections now, those in the handshake or draining included.
    pub connections: usize,
    /// The most that there may be.
    pub connections_max: usize,
    /// Handshakes now.
    pub handshakes: usize,
    /// Handshakes that ever began.
    pub begun: u64,
    /// Attempts that were refused because a bound was reached.
    pub refused: u64,
    /// Attempts that had to prove their address first.
    pub retried: u64,
}

impl ServerCounts {
    /// Whether whoever comes now is refused.
    pub fn is_full(&self) -> bool {
        self.connections >= self.connections_max
    }
}

/// A handshake that has begun. Dropped, it ends the connection.
#[derive(Debug)]
pub struct Handshake {
    remote_address: SocketAddr,
    connecting: Result<Connecting, ConnectionError>,
    tap: Option<Tap>,
    seat: Option<Seat>,
    _permit: OwnedSemaphorePermit,
}

impl Handshake {
    /// Where the attempt comes from.
    pub fn remote_address(&self) -> SocketAddr {
        self.remote_address
    }

    /// Finishes the handshake, within [`limits::HANDSHAKE_TIMEOUT`]. Who comes on [`Alpn::Main`]
    /// without a certificate is closed before any of its streams is accepted.
    pub async fn complete(self) -> Result<Accepted, HandshakeError> {
        let connecting = self.connecting.map_err(failed)?;
        let connection = tokio::time::timeout(limits::HANDSHAKE_TIMEOUT, connecting)
            .await
            .map_err(|_| HandshakeError::TimedOut(limits::HANDSHAKE_TIMEOUT))?
            .map_err(failed)?;
        let connection = Connection::new(connection, self.tap, self.seat);
        let (Some(alpn), Some(exporter)) = (connection.alpn(), connection.exporter()) else {
            connection.close(CloseCode::Internal, "TLS agreed on no protocol");
            return Err(HandshakeError::NoProtocol);
        };
        let certificate = connection.peer_certificate();
        if alpn == Alpn::Main && certificate.is_none() {
            let reason = "a worker needs a certificate: join first, with an invitation";
            connection.close(CloseCode::CertificateRequired, reason);
            return Err(HandshakeError::CertificateRequired);
        }
        Ok(Accepted { connection, alpn, certificate, exporter })
    }
}

/// A connection whose TLS handshake is complete.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub connection: Connection,
    /// What the peer came for.
    pub alpn: Alpn,
    /// The peer's certificate, verified against our CA; always there on [`Alpn::Main`].
    pub certificate: Option<CertificateDer<'static>>,
    /// 32 bytes that only the two ends of this connection know.
    pub exporter: [u8; 32],
}

/// Why a handshake led to no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// It took too long.
    #[error("handshake took longer than {0:?}")]
    TimedOut(Duration),
    /// A worker came without a certificate.
    #[error("peer came without a certificate")]
    CertificateRequired,
    /// TLS completed without an ALPN, which rustls should not let happen.
    #[error("peer agreed on no protocol")]
    NoProtocol,
    /// TLS or QUIC failed: another CA's certificate, an unknown ALPN, no common group.
    #[error("handshake failed: {0}")]
    Failed(Ended),
}

fn failed(error: ConnectionError) -> HandshakeError {
    HandshakeError::Failed(error.into())
}

/// What connections begin with, by the path that they come over.
#[derive(Debug)]
struct Configs {
    kernel: Arc<quinn::ServerConfig>,
    ordinary: Arc<quinn::ServerConfig>,
    wide: Arc<quinn::ServerConfig>,
}

impl Configs {
    fn new(crypto: QuicServerConfig) -> Self {
        let mut tokens = ValidationTokenConfig::default();
        tokens.sent(0);
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config
            .validation_token_config(tokens)
            .max_incoming(limits::INCOMING_MAX)
            .incoming_buffer_size(limits::INCOMING_BUFFER_BYTES)
            .incoming_buffer_size_total(limits::INCOMING_BUFFER_BYTES_TOTAL);
        let over = |path| {
            let mut config = config.clone();
            config.transport_config(Arc::new(transport_config(limits::BIDI_STREAMS_MAX, path)));
            Arc::new(config)
        };
        Self { kernel: over(Path::Kernel), ordinary: over(Path::Ordinary), wide: over(Path::Wide) }
    }

    fn over(&self, path: Path) -> Arc<quinn::ServerConfig> {
        Arc::clone(match path {
            Path::Kernel => &self.kernel,
            Path::Ordinary => &self.ordinary,
            Path::Wide => &self.wide,
        })
    }

    /// What an endpoint holds for connections that nobody looked at.
    fn any(&self) -> quinn::ServerConfig {
        (*self.wide).clone()
    }
}

/// The bounds of a connection on either side; only the client keeps it alive, and only it opens the
/// control stream.
pub(crate) fn transport_config(bidi_streams_max: u32, path: Path) -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle = VarInt::from_u32(limits::IDLE_TIMEOUT_MS).into();
    let mut congestion = CubicConfig::default();
    congestion.initial_window(limits::INITIAL_WINDOW_BYTES);
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(bidi_streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(limits::UNI_STREAMS_MAX))
        .stream_receive_window(VarInt::from_u32(limits::STREAM_RECEIVE_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(limits::RECEIVE_WINDOW_BYTES))
        .send_window(limits::SEND_WINDOW_BYTES)
        .crypto_buffer_size(limits::CRYPTO_BUFFER_BYTES)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(None)
        .mtu_discovery_config(Some(path_search(path)))
        .ack_frequency_config(Some(acknowledgements(None)))
        .congestion_controller_factory(Arc::new(congestion))
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0);
    if let Some(bytes) = path.first_bytes() {
        config.initial_mtu(bytes);
    }
    config
}

fn share_of_windows(connections: u64) -> u64 {
    let share = limits::SEND_WINDOWS_BYTES / connections.max(1);
    share.clamp(limits::SEND_WINDOW_BYTES_MIN, limits::SEND_WINDOW_BYTES)
}

/// What the peer is asked for: half of what has to be acknowledged in a small round goes back with the next message, or
/// by itself after 25 ms, or `within` less.
pub(crate) fn acknowledgements(within: Option<Duration>) -> AckFrequencyConfig {
    let mut config = AckFrequencyConfig::default();
    config.ack_eliciting_threshold(VarInt::from_u32(limits::UNACKNOWLEDGED_MAX)).max_ack_delay(within);
    config
}

/// A network is begun with datagrams that all of them carry, and searched for how long they may be, as far as its link goes.
/// What was taken for none, and loses long datagrams, is searched at once.
fn path_search(path: Path) -> MtuDiscoveryConfig {
    let mut search = MtuDiscoveryConfig::default();
    search.upper_bound(path.longest_bytes()).interval(limits::PATH_SEARCH_INTERVAL);
    if path == Path::Kernel {
        search.black_hole_cooldown(Duration::ZERO);
    }
    search
}

/// Takes datagrams as long as the other side tries.
pub(crate) fn take_long_datagrams(config: &mut EndpointConfig) -> &mut EndpointConfig {
    config.max_udp_payload_size(limits::DATAGRAM_BYTES_MAX).expect("it is above the 1,200 bytes that QUIC needs")
}

fn endpoint_config(keys: &ResetKeys) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(ResetTokenKey::new(&keys.token_key)));
    let connection_id_key = keys.connection_id_key;
    take_long_datagrams(&mut config)
        .cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(connection_id_key)))
        .min_reset_interval(limits::RESET_INTERVAL);
    config
}

/// HMAC-SHA256, as quinn derives reset tokens with it.
struct ResetTokenKey(Hmac<Sha256>);

impl ResetTokenKey {
    fn new(key: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(key).expect("HMAC takes a key of any length"))
    }

    fn absorb(&self, data: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(data);
        mac
    }
}

impl HmacKey for ResetTokenKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(&self.absorb(data).finalize().into_bytes());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        self.absorb(data).verify_slice(signature).map_err(|_| CryptoError)
    }
}

#[cfg(test)]
mod tests {
    use super::share_of_windows;

    #[test]
    fn the_send_windows_of_a_crowd_add_up_to_those_of_a_few_until_they_would_be_too_small() {
        let shares = [0, 1, 32, 64, 200, 256, 20_000].map(|connections| share_of_windows(connections) >> 10);
        assert_eq!(shares, [2048, 2048, 2048, 1024, 327, 256, 256]);
    }
}
