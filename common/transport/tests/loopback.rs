//! Servers and clients over real QUIC on the loopback interface.
#![allow(clippy::unwrap_used)]

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use certs::{Ca, IdentityKey, SERVER_NAME, worker_identity};
use rustls::NamedGroup;
use rustls::crypto::aws_lc_rs::kx_group;
use tributary_transport::{
    Accepted, Alpn, Client, ClientOptions, CloseCode, ConnectError, ConnectFailure, Connected, Connection, Direction,
    Ended, Frame, FrameError, FrameKind, HandshakeError, RecordError, RecvStream, ResetKeys, SendStream, Server,
    ServerOptions, StreamError, Tap, Taps, Target, TlsIdentity, Trust, limits,
};

/// Far above what anything here takes, far below the idle timeout.
const SOON: Duration = Duration::from_secs(10);

/// Long enough for something that would happen at all on loopback.
const A_MOMENT: Duration = Duration::from_millis(300);

struct Fleet {
    ca: Ca,
    server_key: IdentityKey,
    worker_key: IdentityKey,
}

impl Fleet {
    fn new() -> Self {
        let (ca, _) = Ca::generate(SystemTime::now()).unwrap();
        let server_key = IdentityKey::generate().unwrap();
        let worker_key = IdentityKey::generate().unwrap();
        Self { ca, server_key, worker_key }
    }

    fn coordinator(&self) -> TlsIdentity {
        let certificate = self.ca.issue_coordinator(&self.server_key.public(), SystemTime::now()).unwrap();
        TlsIdentity { certificate, key: self.server_key.tls_key().unwrap() }
    }

    fn worker(&self) -> TlsIdentity {
        let certificate = self.ca.issue_worker(&self.worker_key.public(), SystemTime::now()).unwrap();
        TlsIdentity { certificate, key: self.worker_key.tls_key().unwrap() }
    }

    fn options(&self) -> ServerOptions {
        ServerOptions::new(
            "127.0.0.1:0".parse().unwrap(),
            self.ca.certificate().clone(),
            self.coordinator(),
            ResetKeys::from_bytes(&[7; ResetKeys::BYTES]),
        )
    }

    fn serve(&self) -> Server {
        Server::bind(self.options()).unwrap()
    }

    /// A worker's target: its certificate on the main ALPN.
    fn main(&self, address: SocketAddr) -> Target {
        Target {
            addresses: vec![address],
            server_name: SERVER_NAME.to_owned(),
            trust: Trust::Ca(self.ca.certificate().clone()),
            identity: Some(self.worker()),
            alpn: Alpn::Main,
        }
    }

    /// A newcomer's target: nothing but the hash of the CA.
    fn join(&self, address: SocketAddr) -> Target {
        Target {
            trust: Trust::Fingerprint(self.ca.fingerprint()),
            identity: None,
            alpn: Alpn::Join,
            ..self.main(address)
        }
    }
}

fn client() -> Client {
    Client::bind(ClientOptions::default()).unwrap()
}

fn address(server: &Server) -> SocketAddr {
    server.local_address().unwrap()
}

async fn accepted(server: &Server) -> Result<Accepted, HandshakeError> {
    server.accept().await.unwrap().complete().await
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("it happens soon")
}

/// Both ends of a connection on the main ALPN, and what keeps it alive.
struct Pair {
    near: Connected,
    far: Accepted,
    client: Client,
    server: Server,
    fleet: Fleet,
}

async fn pair() -> Pair {
    pair_with(Taps::default()).await
}

/// The client's taps are `taps`.
async fn pair_with(taps: Taps) -> Pair {
    let fleet = Fleet::new();
    let server = fleet.serve();
    let client = Client::bind(ClientOptions { taps, ..ClientOptions::default() }).unwrap();
    let target = fleet.main(address(&server));
    let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
    Pair { near: near.unwrap(), far: far.unwrap(), client, server, fleet }
}

impl Pair {
    /// A stream from client to server.
    async fn stream(&self) -> (SendStream, RecvStream) {
        let mut send = self.near.connection.open_uni().await.unwrap();
        send.write_frame(&Frame::StreamOpen(1)).await.unwrap();
        let mut receive = self.far.connection.accept_uni().await.unwrap();
        assert_eq!(receive.read_frame().await, Ok(Some(Frame::StreamOpen(1))));
        (send, receive)
    }

    /// What the server reads where the client wrote these bytes and finished.
    async fn frame_from(&self, bytes: &'static [u8]) -> Result<Option<Frame>, FrameError> {
        let (mut send, mut receive) = self.stream().await;
        send.write_record(Bytes::from_static(bytes)).await.unwrap();
        send.finish().unwrap();
        soon(receive.read_frame()).await
    }

    async fn assert_alive(&self) {
        assert_alive(&self.near.connection, &self.far.connection).await;
    }
}

async fn assert_alive(near: &Connection, far: &Connection) {
    let mut send = near.open_uni().await.unwrap();
    send.write_frame(&Frame::Hello(Bytes::from_static(b"still there"))).await.unwrap();
    let frame = soon(async { far.accept_uni().await.unwrap().read_frame().await }).await;
    assert_eq!(frame, Ok(Some(Frame::Hello(Bytes::from_static(b"still there")))));
}

/// A record as the session would make it: kind and length are true, the rest is filling.
fn record(kind: u8, plaintext: u32, filling: u8) -> Bytes {
    let header = if kind == 3 { limits::BROADCAST_HEADER_BYTES } else { limits::RECORD_HEADER_BYTES };
    let mut bytes = vec![filling; header + plaintext as usize + 16];
    bytes[0] = 1;
    bytes[1] = kind;
    bytes[4..8].copy_from_slice(&plaintext.to_le_bytes());
    Bytes::from(bytes)
}

/// A client that nobody here would write: any ALPNs, any groups.
async fn stranger(
    fleet: &Fleet,
    server: SocketAddr,
    alpns: &[&[u8]],
    groups: Vec<&'static dyn rustls::crypto::SupportedKxGroup>,
) -> Result<quinn::Connection, Ended> {
    let provider =
        rustls::crypto::CryptoProvider { kx_groups: groups, ..rustls::crypto::aws_lc_rs::default_provider() };
    let mut roots = rustls::RootCertStore::empty();
    roots.add(fleet.ca.certificate().clone()).unwrap();
    let TlsIdentity { certificate, key } = fleet.worker();
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    tls.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    Ok(endpoint.connect_with(config, server, SERVER_NAME).unwrap().await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_accepted_with_its_certificate_and_both_sides_hold_one_exporter() {
    let Pair { near, far, fleet, .. } = pair().await;
    assert_eq!(far.alpn, Alpn::Main);
    let identity = worker_identity(&far.certificate.unwrap()).unwrap();
    assert_eq!(identity.public, fleet.worker_key.public());
    assert_eq!(near.exporter, far.exporter);
    assert_ne!(near.exporter, [0; 32]);
    assert_eq!(&near.ca, fleet.ca.certificate());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_connections_never_share_an_exporter() {
    let (one, other) = (pair().await, pair().await);
    assert_ne!(one.near.exporter, other.near.exporter);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_joins_with_the_hash_of_the_ca_and_takes_the_ca_home() {
    let fleet = Fleet::new();
    let (server, client) = (fleet.serve(), client());
    let target = fleet.join(address(&server));
    let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!((far.alpn, far.certificate), (Alpn::Join, None));
    assert_eq!(&near.ca, fleet.ca.certificate());
    assert_alive(&near.connection, &far.connection).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_a_certificate_is_closed_before_any_stream_is_accepted() {
    let fleet = Fleet::new();
    let (server, client) = (fleet.serve(), client());
    let target = Target { identity: None, ..fleet.main(address(&server)) };
    let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
    assert_eq!(far.unwrap_err(), HandshakeError::CertificateRequired);
    let ended = soon(near.unwrap().connection.closed()).await;
    assert_eq!(ended.code(), Some(CloseCode::CertificateRequired));
    assert!(ended.to_string().contains("join first"), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_authoritys_worker_is_refused() {
    let (ours, other) = (Fleet::new(), Fleet::new());
    let (server, client) = (ours.serve(), client());
    let target = Target { identity: Some(other.worker()), ..ours.main(address(&server)) };
    let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
    assert!(matches!(far, Err(HandshakeError::Failed(_))), "{far:?}");
    // TLS lets the client finish first; it learns of the refusal with the connection's end.
    if let Ok(near) = near {
        let ended = soon(near.connection.closed()).await;
        assert!(matches!(ended, Ended::ByPeersTransport { .. }), "{ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_another_authority_is_not_trusted() {
    let (ours, other) = (Fleet::new(), Fleet::new());
    let (server, client) = (other.serve(), client());
    for target in [ours.main(address(&server)), ours.join(address(&server))] {
        let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
        let refused = near.unwrap_err();
        assert!(refused.is_untrusted(), "{refused}");
        assert!(refused.to_string().contains("not our coordinator"), "{refused}");
        assert!(matches!(far, Err(HandshakeError::Failed(_))), "{far:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_one_of_our_alpns() {
    let fleet = Fleet::new();
    let server = fleet.serve();
    for alpns in [&[&b"h3"[..]][..], &[]] {
        let groups = vec![kx_group::X25519MLKEM768];
        let (near, far) = tokio::join!(stranger(&fleet, address(&server), alpns, groups), accepted(&server));
        assert!(matches!(far, Err(HandshakeError::Failed(_))), "{far:?}");
        let failure = ConnectFailure::from(near.unwrap_err());
        assert!(matches!(failure, ConnectFailure::OtherProtocol(_)), "{failure:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_only_the_post_quantum_group_is_served() {
    let fleet = Fleet::new();
    let groups = vec![kx_group::X25519MLKEM768];
    assert_eq!(groups[0].name(), NamedGroup::X25519MLKEM768);
    for strict_pq in [false, true] {
        let server = Server::bind(ServerOptions { strict_pq, ..fleet.options() }).unwrap();
        let attempt = stranger(&fleet, address(&server), &[b"tributary"], groups.clone());
        let (near, far) = tokio::join!(attempt, accepted(&server));
        assert!(near.is_ok() && far.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_without_the_post_quantum_group_is_refused_under_strict_pq_only() {
    let fleet = Fleet::new();
    let groups = vec![kx_group::X25519];
    let lenient = fleet.serve();
    let attempt = stranger(&fleet, address(&lenient), &[b"tributary"], groups.clone());
    let (near, far) = tokio::join!(attempt, accepted(&lenient));
    assert!(near.is_ok() && far.is_ok());

    let strict = Server::bind(ServerOptions { strict_pq: true, ..fleet.options() }).unwrap();
    let attempt = stranger(&fleet, address(&strict), &[b"tributary"], groups);
    let (near, far) = tokio::join!(attempt, accepted(&strict));
    assert!(matches!(far, Err(HandshakeError::Failed(_))), "{far:?}");
    let failure = ConnectFailure::from(near.unwrap_err());
    assert!(matches!(failure, ConnectFailure::OtherProtocol(_)), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_is_content_with_a_strict_server() {
    let fleet = Fleet::new();
    let server = Server::bind(ServerOptions { strict_pq: true, ..fleet.options() }).unwrap();
    let options = ClientOptions { strict_pq: true, ..ClientOptions::default() };
    for client in [client(), Client::bind(options).unwrap()] {
        let target = fleet.main(address(&server));
        let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
        assert!(near.is_ok() && far.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_at_the_port_leaves_a_live_connection_undisturbed() {
    let pair = pair().await;
    let before = pair.server.traffic();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut sent = 0;
    for length in [0_usize, 1, 5, 21, 100, 1_200, 1_400] {
        for first in [0x00, 0x40, 0x7f, 0xc0, 0xff] {
            let mut datagram = vec![0xa5; length];
            datagram.iter_mut().take(1).for_each(|byte| *byte = first);
            sent += socket.send_to(&datagram, address(&pair.server)).unwrap();
        }
    }
    pair.assert_alive().await;
    let received = pair.server.traffic().received_bytes - before.received_bytes;
    assert!(received > u64::try_from(sent).unwrap(), "{received} bytes, {sent} of them garbage");
    assert_eq!(pair.server.counts().connections, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_pass_in_both_directions_and_end_cleanly() {
    let pair = pair().await;
    let (mut send, mut receive) = pair.near.connection.open_control().await.unwrap();
    let hello = Frame::Hello(Bytes::from(vec![1; limits::HELLO_BYTES_MAX]));
    let handshake = Frame::Handshake(Bytes::from(vec![3; limits::HANDSHAKE_BYTES_MAX]));
    send.write_frame(&hello).await.unwrap();
    send.write_frame(&handshake).await.unwrap();
    send.finish().unwrap();
    let (mut answer, mut control) = pair.far.connection.accept_control().await.unwrap();
    assert_eq!(control.read_frame().await, Ok(Some(hello)));
    assert_eq!(control.read_frame().await, Ok(Some(handshake)));
    assert_eq!(control.read_frame().await, Ok(None));
    let refused = Frame::Refused(Bytes::from_static(b"speak 1"));
    answer.write_frame(&refused).await.unwrap();
    assert_eq!(receive.read_frame().await, Ok(Some(refused)));
    soon(send.delivered()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_frames_are_typed_errors() {
    let pair = pair().await;
    let unknown = pair.frame_from(b"GET / HTTP/1.1\r\n\r\n").await;
    assert_eq!(unknown, Err(FrameError::UnknownKind { got: b'G' }));
    let long = pair.frame_from(&[1, 0xff, 0xff, 0xff, 0xff]).await;
    let expected =
        FrameError::TooLong { kind: FrameKind::Hello, got: u64::from(u32::MAX), max: limits::HELLO_BYTES_MAX };
    assert_eq!(long, Err(expected));
    let in_header = pair.frame_from(&[1, 9]).await;
    assert_eq!(in_header, Err(FrameError::Truncated { got: 2, expected: 5 }));
    let in_body = pair.frame_from(&[1, 9, 0, 0, 0, 1, 2, 3]).await;
    assert_eq!(in_body, Err(FrameError::Truncated { got: 8, expected: 14 }));
    let no_body = pair.frame_from(&[3, 1, 0, 0, 0]).await;
    assert_eq!(no_body, Err(FrameError::Truncated { got: 5, expected: 6 }));
    assert_eq!(pair.frame_from(&[]).await, Ok(None));
    pair.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_every_size_arrive_whole_in_one_buffer() {
    let pair = pair().await;
    let (mut send, mut receive) = pair.stream().await;
    let records =
        [record(1, 0, 10), record(2, 65_536, 11), record(3, 1, 12), record(3, 65_536, 13), record(1, 900, 14)];
    let sent = records.clone();
    let sending = tokio::spawn(async move {
        for record in sent {
            send.write_record(record).await.unwrap();
        }
        send.finish().unwrap();
        send.delivered().await
    });
    let mut buffer = BytesMut::new();
    for expected in records {
        assert_eq!(soon(receive.read_record(&mut buffer)).await, Ok(true));
        assert!(buffer == expected, "a record of {} bytes differs", expected.len());
    }
    assert_eq!(soon(receive.read_record(&mut buffer)).await, Ok(false));
    soon(sending).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_over_long_or_cut_record_is_a_typed_error() {
    let pair = pair().await;
    let mut buffer = BytesMut::new();
    let (mut send, mut receive) = pair.stream().await;
    send.write_record(record(2, 65_537, 0)).await.unwrap();
    let refused = soon(receive.read_record(&mut buffer)).await;
    assert_eq!(refused, Err(RecordError::TooLong { got: 65_537 + 16 }));

    let (mut send, mut receive) = pair.stream().await;
    send.write_record(record(2, 100, 0).slice(..50)).await.unwrap();
    send.finish().unwrap();
    let cut = soon(receive.read_record(&mut buffer)).await;
    assert_eq!(cut, Err(RecordError::Truncated { got: 50, expected: 132 }));

    let (mut send, mut receive) = pair.stream().await;
    send.write_record(record(2, 100, 0).slice(..50)).await.unwrap();
    send.reset(CloseCode::TimedOut);
    let reset = soon(receive.read_record(&mut buffer)).await;
    let code = u64::from(CloseCode::TimedOut.number());
    assert_eq!(reset, Err(RecordError::Stream(StreamError::Reset(code))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_was_given_up_halfway_loses_nothing() {
    let pair = pair().await;
    let (mut send, mut receive) = pair.stream().await;
    let whole = record(3, 1_000, 5);
    let mut buffer = BytesMut::new();
    for part in [0..7, 7..40, 40..1_000] {
        send.write_record(whole.slice(part)).await.unwrap();
        let halfway = tokio::time::timeout(A_MOMENT, receive.read_record(&mut buffer)).await;
        assert!(halfway.is_err(), "there is no whole record yet: {halfway:?}");
    }
    send.write_record(whole.slice(1_000..)).await.unwrap();
    assert_eq!(soon(receive.read_record(&mut buffer)).await, Ok(true));
    assert_eq!(buffer, whole);
}

/// On one thread what is written and ended in one go leaves in one datagram.
#[tokio::test]
async fn a_stream_whose_end_came_with_its_last_record_is_read_to_its_end() {
    let pair = pair().await;
    for ends in [true, false] {
        let mut send = pair.near.connection.open_uni().await.unwrap();
        send.write_record(record(2, 100, 0)).await.unwrap();
        if ends {
            send.finish().unwrap();
        }
        let mut receive = soon(pair.far.connection.accept_uni()).await.unwrap();
        let mut buffer = BytesMut::new();
        assert_eq!(soon(receive.read_record(&mut buffer)).await, Ok(true));
        receive.close();
        let told = soon(send.delivered()).await;
        assert_eq!(told, if ends { Ok(()) } else { Err(StreamError::Stopped(0)) });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_stops_reading_or_closes_is_named() {
    let pair = pair().await;
    let (mut send, mut receive) = pair.stream().await;
    receive.stop(CloseCode::Refused);
    let stopped = soon(send.delivered()).await;
    assert_eq!(stopped, Err(StreamError::Stopped(u64::from(CloseCode::Refused.number()))));

    let (_send, mut receive) = pair.stream().await;
    pair.near.connection.close(CloseCode::GoingAway, &"é".repeat(1_000));
    let ended = soon(pair.far.connection.closed()).await;
    let Ended::ByPeer { code, reason } = &ended else { panic!("{ended:?}") };
    assert_eq!(*code, Some(CloseCode::GoingAway));
    assert_eq!(reason, &"é".repeat(limits::REASON_BYTES_MAX / 2));
    assert_eq!(receive.read_frame().await, Err(FrameError::Stream(StreamError::Lost(ended))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_opens_no_more_streams_than_it_may() {
    let pair = pair().await;
    let mut held = Vec::new();
    for _ in 0..limits::UNI_STREAMS_MAX {
        held.push(soon(pair.near.connection.open_uni()).await.unwrap());
    }
    let more = tokio::time::timeout(A_MOMENT, pair.near.connection.open_uni()).await;
    assert!(more.is_err(), "one more must wait");
    let _control = soon(pair.near.connection.open_control()).await.unwrap();
    let second = tokio::time::timeout(A_MOMENT, pair.near.connection.open_control()).await;
    assert!(second.is_err(), "there is one control stream");
    let servers = tokio::time::timeout(A_MOMENT, pair.far.connection.open_control()).await;
    assert!(servers.is_err(), "the server opens none");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_refuses_newcomers_and_keeps_who_is_there() {
    let fleet = Fleet::new();
    let server = Server::bind(ServerOptions { connections_max: 1, ..fleet.options() }).unwrap();
    let client = client();
    let target = fleet.main(address(&server));
    let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
    let (near, far) = (near.unwrap(), far.unwrap());
    let refused = tokio::select! {
        refused = client.connect(&target) => refused.unwrap_err(),
        _ = server.accept() => panic!("a second one was admitted"),
    };
    let ConnectError::NowhereThere(failures) = &refused else { panic!("{refused}") };
    assert_eq!(failures[..], [(address(&server), ConnectFailure::Full)]);
    assert_eq!(server.counts().refused, 1);
    assert_alive(&near.connection, &far.connection).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_are_counted_and_newcomers_prove_their_address_when_there_are_many() {
    let fleet = Fleet::new();
    let server = Server::bind(ServerOptions { handshakes_max: 2, ..fleet.options() }).unwrap();
    let client = client();
    let target = fleet.main(address(&server));
    // One handshake hangs: it has begun, and nobody completes it.
    let (first, (hanging, (near, far))) = tokio::join!(client.connect(&target), async {
        let hanging = server.accept().await.unwrap();
        assert_eq!(server.counts().handshakes, 1);
        let second = async { tokio::join!(client.connect(&target), accepted(&server)) };
        (hanging, second.await)
    });
    assert!(near.is_ok() && far.is_ok());
    assert_eq!((server.counts().retried, server.counts().handshakes), (1, 1));
    assert!(first.is_ok());
    drop(hanging);
    assert_eq!(server.counts().handshakes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_address_answers_where_the_first_is_silent() {
    let fleet = Fleet::new();
    let (server, client) = (fleet.serve(), client());
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut target = fleet.main(silent.local_addr().unwrap());
    target.addresses.push(address(&server));
    let (near, far) = soon(async { tokio::join!(client.connect(&target), accepted(&server)) }).await;
    assert_alive(&near.unwrap().connection, &far.unwrap().connection).await;
    let nowhere = client.connect(&Target { addresses: vec![], ..target }).await;
    assert_eq!(nowhere.unwrap_err().to_string(), "no address to connect to");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_serves_new_connections_and_disturbs_no_old_one() {
    let pair = pair().await;
    let renewed = pair.fleet.coordinator();
    pair.server.set_identity(&renewed).unwrap();
    let target = pair.fleet.main(address(&pair.server));
    let (near, far) = tokio::join!(pair.client.connect(&target), accepted(&pair.server));
    assert_alive(&near.unwrap().connection, &far.unwrap().connection).await;
    pair.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_server_says_so_to_everybody() {
    let pair = pair().await;
    pair.server.close(CloseCode::GoingAway, "restarting");
    assert!(pair.server.accept().await.is_none());
    let ended = soon(pair.near.connection.closed()).await;
    assert_eq!(ended.to_string(), "peer closed the connection: going away: restarting");
    soon(pair.server.wait_idle()).await;
}

/// What a tap saw, piece by piece.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Piece>>>);

type Piece = (Direction, Vec<u8>);

impl Seen {
    fn tap(&self) -> Option<Tap> {
        let seen = self.clone();
        Some(Tap::new(move |direction, bytes: &[u8]| {
            seen.0.lock().unwrap().push((direction, bytes.to_vec()));
        }))
    }

    fn contains(&self, direction: Direction, needle: &[u8]) -> bool {
        let pieces = self.0.lock().unwrap();
        let mut there = pieces.iter().filter(|(way, _)| *way == direction);
        there.any(|(_, bytes)| bytes.windows(needle.len()).any(|window| window == needle))
    }

    /// Datagrams and bytes that went this way.
    fn totals(&self, direction: Direction) -> (u64, u64) {
        let pieces = self.0.lock().unwrap();
        let lengths = pieces.iter().filter(|(way, _)| *way == direction).map(|(_, b)| b.len());
        lengths.fold((0, 0), |(count, sum), len| (count + 1, sum + u64::try_from(len).unwrap()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn taps_see_plaintext_before_tls_and_none_of_it_on_the_wire() {
    let (datagrams, streams) = (Seen::default(), Seen::default());
    let taps = Taps { datagrams: datagrams.tap(), streams: streams.tap() };
    let pair = pair_with(taps).await;
    let canary = b"the canary sings at dawn";
    let echo = b"and the echo at dusk";
    let (mut send, mut receive) = pair.near.connection.open_control().await.unwrap();
    send.write_frame(&Frame::Hello(Bytes::from_static(canary))).await.unwrap();
    let (mut answer, mut control) = pair.far.connection.accept_control().await.unwrap();
    control.read_frame().await.unwrap().unwrap();
    answer.write_record(record(1, 0, 0)).await.unwrap();
    answer.write_frame(&Frame::Refused(Bytes::from_static(echo))).await.unwrap();
    receive.read_record(&mut BytesMut::new()).await.unwrap();
    receive.read_frame().await.unwrap().unwrap();

    assert!(streams.contains(Direction::Sent, canary));
    assert!(streams.contains(Direction::Received, echo));
    assert!(streams.contains(Direction::Received, &record(1, 0, 0)));
    for direction in [Direction::Sent, Direction::Received] {
        assert!(datagrams.totals(direction).1 > 1_000);
        assert!(!datagrams.contains(direction, canary));
        assert!(!datagrams.contains(direction, echo));
    }
    // The search itself is proved: a client's first flight is a long header of QUIC version 1.
    assert!(datagrams.contains(Direction::Sent, &[0, 0, 0, 1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_meter_counts_every_byte_and_datagram() {
    let seen = Seen::default();
    let fleet = Fleet::new();
    let taps = Taps { datagrams: seen.tap(), streams: None };
    let server = Server::bind(ServerOptions { taps, ..fleet.options() }).unwrap();
    let client = client();
    let target = fleet.main(address(&server));
    let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
    let (near, far) = (near.unwrap(), far.unwrap());
    let mut send = near.connection.open_uni().await.unwrap();
    let sending = async {
        for _ in 0..20 {
            send.write_record(record(2, 65_536, 1)).await.unwrap();
        }
        send.finish().unwrap();
    };
    let reading = async {
        let mut stream = far.connection.accept_uni().await.unwrap();
        let mut buffer = BytesMut::new();
        while stream.read_record(&mut buffer).await.unwrap() {}
    };
    soon(async { tokio::join!(sending, reading) }).await;
    client.close(CloseCode::Done, "");
    soon(far.connection.closed()).await;
    server.close(CloseCode::Done, "");
    soon(client.wait_idle()).await;
    soon(server.wait_idle()).await;

    let totals = server.traffic();
    assert_eq!(seen.totals(Direction::Sent), (totals.sent_datagrams, totals.sent_bytes));
    assert_eq!(seen.totals(Direction::Received), (totals.received_datagrams, totals.received_bytes));
    assert!(totals.received_bytes > 20 * 65_536, "{totals:?}");
    // Datagrams can be lost even on loopback, where a socket's buffer is full.
    assert!(client.traffic().sent_bytes >= totals.received_bytes);
    let stats = far.connection.stats();
    assert!(stats.received_bytes <= totals.received_bytes && stats.received_bytes > 20 * 65_536);
    assert!(stats.rtt > Duration::ZERO && stats.sent_packets > 0, "{stats:?}");
}

/// A client whose server dies without a word, and one that takes its place with these keys. The
/// client's connection then, after its end or a moment.
fn after_a_crash(keys_then: [u8; ResetKeys::BYTES]) -> Option<Ended> {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (alive, doomed) = (runtime(), runtime());
    let fleet = Fleet::new();
    let server = doomed.block_on(async { Arc::new(fleet.serve()) });
    let address = address(&server);
    let accepting = doomed.spawn({
        let server = Arc::clone(&server);
        async move { accepted(&server).await.unwrap() }
    });
    // What a worker's beats do while it has a task: it speaks soon after the restart.
    let keep_alive = Duration::from_millis(50);
    let options = ClientOptions { keep_alive, ..ClientOptions::default() };
    let (_client, near) = alive.block_on(async {
        let client = Client::bind(options).unwrap();
        let near = client.connect(&fleet.main(address)).await.unwrap();
        (client, near)
    });
    let far = doomed.block_on(accepting).unwrap();
    // The runtime goes first, so that nothing is left that could still say goodbye.
    doomed.shutdown_timeout(SOON);
    drop((far, server));
    alive.block_on(async {
        let options =
            ServerOptions { listen: address, reset_keys: ResetKeys::from_bytes(&keys_then), ..fleet.options() };
        let _restarted = Server::bind(options).unwrap();
        tokio::time::timeout(Duration::from_secs(2), near.connection.closed()).await.ok()
    })
}

#[test]
fn a_restarted_server_with_its_keys_ends_the_old_connections_at_once() {
    assert_eq!(after_a_crash([7; ResetKeys::BYTES]), Some(Ended::Reset));
}

#[test]
fn a_server_with_other_keys_leaves_them_to_the_idle_timeout() {
    assert_eq!(after_a_crash([8; ResetKeys::BYTES]), None);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let fleet = Fleet::new();
        let server = fleet.serve();
        let options = ServerOptions { listen: address(&server), ..fleet.options() };
        let taken = Server::bind(options).unwrap_err().to_string();
        assert!(taken.starts_with(&address(&server).to_string()), "{taken}");
    });
}

// --- how long datagrams may be ---

/// The longest UDP payload on a path of 1,500 bytes.
const ORDINARY_BYTES: usize = 1_472;

/// A path that loses whatever is longer than it carries.
struct Strait {
    address: SocketAddr,
    carries: Arc<AtomicUsize>,
    /// The longest that passed.
    passed: Arc<AtomicUsize>,
}

impl Strait {
    /// A path to `server` that ends with the runtime.
    async fn to(server: SocketAddr, carries: usize) -> Self {
        let near = Arc::new(tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let far = Arc::new(tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap());
        far.connect(server).await.unwrap();
        let strait =
            Self { address: near.local_addr().unwrap(), carries: Arc::new(carries.into()), passed: Arc::default() };
        let (carries, passed) = (Arc::clone(&strait.carries), Arc::clone(&strait.passed));
        tokio::spawn(async move {
            let (mut there, mut back, mut client) = ([0; 65_536], [0; 65_536], None);
            let carried = |bytes: usize| {
                let carried = bytes <= carries.load(Ordering::Relaxed);
                if carried {
                    passed.fetch_max(bytes, Ordering::Relaxed);
                }
                carried
            };
            // A full or closed socket is a loss like any other.
            loop {
                tokio::select! {
                    Ok((bytes, from)) = near.recv_from(&mut there) => {
                        client = Some(from);
                        if carried(bytes) {
                            let _ = far.send(&there[..bytes]).await;
                        }
                    }
                    Ok(bytes) = far.recv(&mut back) => if let Some(client) = client.filter(|_| carried(bytes)) {
                        let _ = near.send_to(&back[..bytes], client).await;
                    }
                }
            }
        });
        strait
    }

    fn now_carries(&self, bytes: usize) {
        self.carries.store(bytes, Ordering::Relaxed);
        self.passed.store(0, Ordering::Relaxed);
    }

    fn passed(&self) -> usize {
        self.passed.load(Ordering::Relaxed)
    }
}

/// A connection over a path that carries so much.
async fn across(carries: usize) -> (Pair, Strait) {
    let fleet = Fleet::new();
    let server = fleet.serve();
    let strait = Strait::to(address(&server), carries).await;
    let client = client();
    let target = fleet.main(strait.address);
    let (near, far) = tokio::join!(client.connect(&target), accepted(&server));
    (Pair { near: near.unwrap(), far: far.unwrap(), client, server, fleet }, strait)
}

impl Pair {
    /// Four mebibytes from the client to the server.
    async fn transfer(&self) {
        let (mut send, mut receive) = self.stream().await;
        let body = u32::try_from(RECORD_BYTES).unwrap().to_le_bytes();
        let mut record = vec![0; limits::RECORD_HEADER_BYTES + RECORD_BYTES + 16];
        record[4..8].copy_from_slice(&body);
        let record = Bytes::from(record);
        let sending = async {
            for _ in 0..64 {
                send.write_record(record.clone()).await.unwrap();
            }
            send.finish().unwrap();
        };
        let receiving = async {
            let (mut got, mut records) = (BytesMut::new(), 0);
            while receive.read_record(&mut got).await.unwrap() {
                assert_eq!(got, record);
                records += 1;
            }
            records
        };
        assert_eq!(soon(async { tokio::join!(sending, receiving) }).await.1, 64);
    }
}

const RECORD_BYTES: usize = 65_536;

#[tokio::test]
async fn a_path_that_carries_long_datagrams_is_used_for_them() {
    let (pair, strait) = across(usize::MAX).await;
    pair.transfer().await;
    assert_eq!(strait.passed(), usize::from(limits::DATAGRAM_BYTES_MAX));
}

#[tokio::test]
async fn an_ordinary_path_is_found_to_be_one() {
    let (pair, strait) = across(ORDINARY_BYTES).await;
    pair.transfer().await;
    pair.transfer().await;
    assert!((1_400..=ORDINARY_BYTES).contains(&strait.passed()), "{}", strait.passed());
    pair.assert_alive().await;
}

#[tokio::test]
async fn a_path_that_narrows_under_a_connection_is_noticed() {
    let (pair, strait) = across(usize::MAX).await;
    pair.transfer().await;
    strait.now_carries(ORDINARY_BYTES);
    pair.transfer().await;
    assert!(strait.passed() <= ORDINARY_BYTES);
    pair.assert_alive().await;
}
