//! Whatever comes to the port, a fleet in the middle of a run notices nothing.
//!
//! Each test attacks a real coordinator while three workers train, and then looks at the fleet: rounds go on, no worker
//! was lost, and the model of every round is that of the same fleet left alone.
//!
//! Every limit that a peer can step past has a test one past it. Here: frames, records, control messages, versions of a
//! Hello, sentences, streams at once, contents that are not read, and the times for greeting and enrolment. In
//! `updates.rs`: surveys, rows and the counts of rows. In the crates: connections, handshakes and streams
//! (`transport/tests/loopback.rs`), frames and records by their headers (`transport`), records of a stream, stream
//! numbers and messages (`protocol/tests/session.rs`), classes and bins of an evaluation (`protocol/src/evaluation.rs`),
//! updates of a sum (`protocol/src/sum.rs`), tasks of a round and of a worker (`federation/tests.rs`), tensors
//! (`protocol/src/layout.rs`), a schema (`learning/tests/data.rs`), a model at the worker (`worker/tests/loopback.rs`),
//! an invitation (`protocol/src/invitation.rs`), workers and invitations (`coordinator/src/registry.rs`).

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use certs::{Ca, CertificateDer, IdentityKey, SERVER_NAME, SessionKey};
use protocol::draw::Draw;
use protocol::ids::{Hash, Instance, TaskId, WorkerId};
use protocol::layout::{model_hasher, to_bytes};
use protocol::limits::{CONTROL_MESSAGE_BYTES_MAX, HELLO_VERSIONS_MAX, RECORD_BYTES_MAX, SENTENCE_LEN_MAX};
use protocol::messages::{
    Assigned, Encoding, EnrolAnswer, EnrolRefusal, EnrolRequest, Failure, FromWorker, Hello, HelloRefused, Leave,
    Manifest, Metrics, Receipt, Role, Signed, TaskKind, ToWorker, Upload, decode, encode,
};
use protocol::session::Flag;
use protocol::session::sign::MANIFEST_CONTEXT;
use protocol::sum::{Ring, Sum, Verifier};
use rustls::crypto::aws_lc_rs;
use transport::{Alpn, CloseCode, Direction, Ended, Frame, Tap, Taps, TlsIdentity};
use tributary_tests::live::{LiveFleet, MEMBERS, PACE, ROWS};
use tributary_tests::stranger::{Call, Papers, Stranger, Talk, hello, random};

/// Far above what the coordinator takes for anything but its own timeouts.
const SOON: Duration = Duration::from_secs(30);

// --- below TLS ---

#[test]
fn garbage_datagrams_are_ignored() {
    let mut fleet = LiveFleet::in_a_run();
    let address = fleet.stranger().address();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut draw = Draw::new(1, "garbage", 0, "");
    for _ in 0..1000 {
        let mut datagram = vec![0; usize::try_from(draw.below(1500)).unwrap()];
        datagram.iter_mut().for_each(|byte| *byte = u8::try_from(draw.below(256)).unwrap());
        socket.send_to(&datagram, address).unwrap();
    }
    fleet.assert_unharmed();
}

#[test]
fn first_packets_that_are_cut_changed_or_sent_again_open_no_door_and_close_none() {
    let mut fleet = LiveFleet::in_a_run();
    let packets = first_packets(&fleet);
    assert!(packets.iter().any(|packet| packet.len() >= 1200), "a ClientHello was captured");
    let address = fleet.stranger().address();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut draw = Draw::new(2, "garbage", 0, "");
    for packet in &packets {
        for _ in 0..100 {
            let cut = usize::try_from(draw.below(packet.len() as u64 + 1)).unwrap();
            socket.send_to(&packet[..cut], address).unwrap();
            let mut changed = packet.clone();
            let place = usize::try_from(draw.below(packet.len() as u64)).unwrap();
            changed[place] ^= 1 << draw.below(8);
            socket.send_to(&changed, address).unwrap();
            socket.send_to(packet, address).unwrap();
        }
    }
    // Half-open handshakes are bounded, and an honest newcomer proves its address and gets in beside them.
    fleet.run(async { Stranger::new(fleet.invitation()).enrol("newcomer").await });
    fleet.assert_unharmed();
}

/// The datagrams with which a connection begins.
fn first_packets(fleet: &LiveFleet) -> Vec<Vec<u8>> {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&sent);
    let tap = Tap::new(move |direction, bytes: &[u8]| {
        if direction == Direction::Sent {
            kept.lock().unwrap().push(bytes.to_vec());
        }
    });
    fleet.run(async {
        let taps = Taps { datagrams: Some(tap), streams: None };
        let call = Stranger::tapped(fleet.invitation(), taps).call_to_join().await;
        call.connection.close(CloseCode::Done, "");
    });
    sent.lock().unwrap().clone()
}

// --- TLS ---

/// Connects as no program of ours would: with any ALPNs, and any identity.
async fn foreigner(fleet: &LiveFleet, alpns: &[&[u8]], identity: Option<TlsIdentity>) -> Ended {
    let ca = std::fs::read(fleet.home.state().join("ca.der")).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(ca)).unwrap();
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match identity {
        Some(TlsIdentity { certificate, key }) => tls.with_client_auth_cert(vec![certificate], key).unwrap(),
        None => tls.with_no_client_auth(),
    };
    tls.alpn_protocols = alpns.iter().map(|alpn| alpn.to_vec()).collect();
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let address: SocketAddr = fleet.invitation().addresses[0].parse().unwrap();
    match endpoint.connect_with(config, address, SERVER_NAME).unwrap().await {
        Ok(connection) => connection.closed().await.into(),
        Err(error) => error.into(),
    }
}

#[test]
fn an_http_3_client_and_one_without_any_protocol_are_turned_away() {
    let mut fleet = LiveFleet::in_a_run();
    let papers = fleet.run(async { Stranger::new(fleet.invitation()).enrol("mallory").await });
    for alpns in [&[&b"h3"[..]][..], &[b"h3-29", b"http/1.1"], &[b"tributary2"], &[]] {
        for identity in [None, Some(papers.tls())] {
            let ended = fleet.run(foreigner(&fleet, alpns, identity));
            // The TLS alert no_application_protocol, as a QUIC error.
            assert!(matches!(ended, Ended::ByPeersTransport { number: 0x178, .. }), "{alpns:?}: {ended:?}");
        }
    }
    fleet.until_metric("tributary_handshakes_total{outcome=\"failed\"}", 8.0);
    fleet.assert_unharmed();
}

#[test]
fn nobody_works_without_a_certificate_of_this_fleet() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let ended = fleet.run(async {
        match stranger.try_call(Alpn::Main, None).await {
            Ok(call) => call.ended().await,
            Err(ended) => ended,
        }
    });
    assert_eq!(ended.code(), Some(CloseCode::CertificateRequired), "{ended:?}");
    assert!(ended.to_string().contains("join first"), "{ended}");

    let key = IdentityKey::generate().unwrap();
    let (other, _) = Ca::generate(std::time::SystemTime::now()).unwrap();
    let foreign = other.issue_worker(&key.public(), std::time::SystemTime::now()).unwrap();
    // One of this fleet's authority that is no worker's: the coordinator's own.
    let own_key: IdentityKey = certs::keys::load(&fleet.home.state().join("signing.key")).unwrap();
    let ca_key: IdentityKey = certs::keys::load(&fleet.home.state().join("ca.key")).unwrap();
    let ca_der = CertificateDer::from(std::fs::read(fleet.home.state().join("ca.der")).unwrap());
    let ca = Ca::load(&ca_key, ca_der).unwrap();
    let servers = ca.issue_coordinator(&own_key.public(), std::time::SystemTime::now()).unwrap();
    for (certificate, key) in [(foreign, &key), (servers, &own_key)] {
        let identity = TlsIdentity { certificate, key: key.tls_key().unwrap() };
        let ended = fleet.run(foreigner(&fleet, &[b"tributary"], Some(identity)));
        assert!(matches!(ended, Ended::ByPeersTransport { number: 0x100..=0x1ff, .. }), "{ended:?}");
    }
    // One that the authority would sign, of a worker whom the registry does not know.
    let key = IdentityKey::generate().unwrap();
    let certificate = ca.issue_worker(&key.public(), std::time::SystemTime::now()).unwrap();
    let session = SessionKey::generate().unwrap();
    let unknown = Papers { identity: key, session, certificate, name: String::new() };
    assert_refused(&fleet, &unknown, CloseCode::IdentityRefused);
    fleet.assert_unharmed();
}

/// TLS succeeds with these papers, and the session's handshake does not.
fn assert_refused(fleet: &LiveFleet, papers: &Papers, code: CloseCode) {
    let stranger = fleet.stranger();
    let ended = fleet.run(async {
        let mut call = stranger.call(papers).await;
        let (message, _) = call.begin(&stranger.invitation, &hello(Role::Worker), &papers.session, &[]).await;
        call.frame(Frame::Handshake(message.into())).await;
        assert!(!matches!(call.hear().await, Ok(Some(_))), "an answer");
        call.ended().await
    });
    assert_eq!(ended.code(), Some(code), "{ended:?}");
}

// --- identity ---

#[test]
fn a_stolen_certificate_or_session_key_is_worth_nothing_alone() {
    let mut fleet = LiveFleet::in_a_run();
    let (ann, ben) = fleet.run(async {
        let stranger = Stranger::new(fleet.invitation());
        (stranger.enrol("ann").await, stranger.enrol("ben").await)
    });
    let fresh = SessionKey::generate().unwrap();
    assert_refused(&fleet, &Papers { session: fresh, ..ann.clone() }, CloseCode::IdentityRefused);
    assert_refused(&fleet, &Papers { session: ben.session.clone(), ..ann.clone() }, CloseCode::IdentityRefused);
    // Whole, they are good.
    fleet.run(async { Stranger::new(fleet.invitation()).join(&ann).await });
    fleet.assert_metric("tributary_handshakes_total{outcome=\"refused\"}", 2.0);
    fleet.assert_unharmed();
}

#[test]
fn a_revoked_worker_is_thrown_out_and_stays_out() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let (papers, talk) = fleet.run(async {
        let papers = stranger.enrol("mallory").await;
        let talk = stranger.join(&papers).await;
        (papers, talk)
    });
    let said = fleet.home.run("coordinator", &["revoke", "mallory"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    let ended = fleet.run(async { talk.connection.closed().await });
    assert_eq!(ended.code(), Some(CloseCode::Revoked), "{ended:?}");
    assert_refused(&fleet, &papers, CloseCode::Revoked);
    let token = stranger.invitation.token;
    let answer = fleet.run(stranger.ask(&papers.identity, &papers.session, "mallory", token));
    assert_eq!(answer, EnrolAnswer::Refused(EnrolRefusal::Revoked));
    fleet.assert_unharmed();
}

// --- Hello and handshake ---

#[test]
fn a_hello_that_nobody_here_speaks_gets_an_answer_and_a_sentence() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let other = |versions: Vec<u16>, role| Hello { versions, ..hello(role) };
    let versions = |count: usize| (1..=u16::try_from(count).unwrap()).collect::<Vec<_>>();
    let refused = [
        (encode(&other(vec![99], Role::Worker)), Alpn::Main),
        (encode(&other(vec![], Role::Worker)), Alpn::Main),
        (encode(&other(versions(HELLO_VERSIONS_MAX + 1), Role::Worker)), Alpn::Main),
        (encode(&hello(Role::Join)), Alpn::Main),
        (encode(&hello(Role::Worker)), Alpn::Join),
        (encode(&other(vec![99], Role::Join)), Alpn::Join),
        // A mode that only a later version knows, and one byte too many.
        ([encode(&hello(Role::Worker)).split_last().unwrap().1, &[7]].concat(), Alpn::Main),
        ([&encode(&hello(Role::Worker))[..], &[0]].concat(), Alpn::Main),
    ];
    for (body, alpn) in refused {
        let answer = fleet.run(async {
            let identity = (alpn == Alpn::Main).then(|| papers.tls());
            let mut call = stranger.try_call(alpn, identity).await.unwrap();
            call.frame(Frame::Hello(body.clone().into())).await;
            let Ok(Some(Frame::Refused(answer))) = call.hear().await else { panic!("no answer to {body:?}") };
            assert_eq!(call.ended().await.code(), Some(CloseCode::Refused));
            decode::<HelloRefused>(&answer).unwrap()
        });
        assert_eq!(answer.speaks, [1]);
        assert!(answer.sentence.contains("version 1"), "{}", answer.sentence);
    }
    let most = other(versions(HELLO_VERSIONS_MAX), Role::Worker);
    fleet.run(async {
        let mut call = stranger.call(&papers).await;
        let (message, initiator) = call.begin(&stranger.invitation, &most, &papers.session, &[]).await;
        call.frame(Frame::Handshake(message.into())).await;
        call.talk(initiator).await
    });
    fleet.assert_unharmed();
}

/// A frame of any kind and length, whatever follows.
fn frame(kind: u8, length: u32, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &length.to_le_bytes(), body].concat()
}

/// Says these bytes on a fresh connection of an enrolled worker, and tells how it ends.
async fn after(stranger: &Stranger, papers: &Papers, bytes: Vec<u8>) -> Option<CloseCode> {
    let mut call = stranger.call(papers).await;
    call.bytes(bytes).await;
    soon(call.ended()).await.code()
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("it happens soon")
}

#[test]
fn garbage_in_place_of_a_frame_ends_the_connection_that_it_came_on() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let mut hello_frame = Frame::Hello(encode(&hello(Role::Worker)).into()).encode().unwrap().to_vec();
    let handshake = |body: &[u8]| [&hello_frame[..], &frame(3, u32::try_from(body.len()).unwrap(), body)].concat();
    let cases = [
        (b"GET / HTTP/1.1\r\nHost: tributary\r\n\r\n".to_vec(), CloseCode::Misbehaved),
        (random::<64>().map(|byte| byte | 0x80).to_vec(), CloseCode::Misbehaved),
        (frame(1, u32::MAX, &[]), CloseCode::Misbehaved),
        (frame(1, 1025, &[0; 1025]), CloseCode::Misbehaved),
        (frame(2, 2049, &[0; 2049]), CloseCode::Misbehaved),
        (frame(3, 4097, &[0; 4097]), CloseCode::Misbehaved),
        (frame(4, 5, &[0; 5]), CloseCode::Misbehaved),
        // Frames that are good, at the wrong time.
        (frame(3, 4, b"none"), CloseCode::Misbehaved),
        (frame(4, 4, &[1, 0, 0, 0]), CloseCode::Misbehaved),
        ([&hello_frame[..], &hello_frame].concat(), CloseCode::Misbehaved),
        ([&hello_frame[..], &frame(2, 0, &[])].concat(), CloseCode::Misbehaved),
        ([&hello_frame[..], &frame(3, 4097, &[0; 4097])].concat(), CloseCode::Misbehaved),
        // Handshakes that are none.
        (handshake(&[]), CloseCode::SessionFailed),
        (handshake(&random::<96>()), CloseCode::SessionFailed),
        (handshake(&[0; 4096]), CloseCode::SessionFailed),
    ];
    for (place, (bytes, expected)) in cases.into_iter().enumerate() {
        let code = fleet.run(after(&stranger, &papers, bytes));
        assert_eq!(code, Some(expected), "case {place}");
    }
    hello_frame.truncate(3);
    let cut = fleet.run(async {
        let mut call = stranger.call(&papers).await;
        call.bytes(hello_frame).await;
        call.send.finish().unwrap();
        call.ended().await
    });
    assert_eq!(cut.code(), Some(CloseCode::Misbehaved));
    fleet.assert_unharmed();
}

#[test]
fn a_handshake_message_is_good_for_its_connection_only() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let ended = fleet.run(async {
        let mut first = stranger.call(&papers).await;
        let (message, initiator) = first.begin(&stranger.invitation, &hello(Role::Worker), &papers.session, &[]).await;
        // Recorded, and said word for word on a connection of the same worker, whose exporter is another.
        let mut second = stranger.call(&papers).await;
        second.frame(Frame::Hello(encode(&hello(Role::Worker)).into())).await;
        second.frame(Frame::Handshake(message.clone().into())).await;
        let ended = second.ended().await;
        first.frame(Frame::Handshake(message.into())).await;
        first.talk(initiator).await;
        ended
    });
    assert_eq!(ended.code(), Some(CloseCode::SessionFailed), "{ended:?}");
    assert!(ended.to_string().contains("does not authenticate"), "{ended}");
    fleet.assert_unharmed();
}

#[test]
fn a_low_order_ephemeral_key_is_refused() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let hello_frame = Frame::Hello(encode(&hello(Role::Worker)).into()).encode().unwrap();
    for point in [[0; 32], {
        let mut one = [0; 32];
        one[0] = 1;
        one
    }] {
        let message = [&point[..], &[0; 64]].concat();
        let bytes = [&hello_frame[..], &frame(3, 96, &message)].concat();
        assert_eq!(fleet.run(after(&stranger, &papers, bytes)), Some(CloseCode::SessionFailed));
    }
    fleet.assert_unharmed();
}

// --- inside a session ---

#[test]
fn what_is_no_record_ends_the_session() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let header = |kind: u8, flags: u8, length: u32, sequence: u64| {
        [&[1, kind, flags, 0][..], &length.to_le_bytes(), &sequence.to_le_bytes()].concat()
    };
    let records = [
        random::<200>().to_vec(),
        // One byte past the longest, and as long as a header can say.
        [header(1, 0, 65_537, 0), vec![0; 65_537 + 16]].concat(),
        header(1, 0, u32::MAX, 0),
        // Not sealed; of another kind; past the last sequence; of another version.
        [header(1, 0, 5, 0), vec![0; 21]].concat(),
        [header(2, 0, 5, 0), vec![0; 21]].concat(),
        [header(3, 0, 5, 0), vec![0; 37]].concat(),
        [header(1, 0, 5, 1 << 20), vec![0; 21]].concat(),
        [vec![2], vec![0; 31]].concat(),
    ];
    for before_join in [true, false] {
        for (place, record) in records.iter().enumerate() {
            let ended = fleet.run(async {
                let mut talk = if before_join { stranger.talk(&papers).await } else { stranger.join(&papers).await };
                talk.raw(record.clone()).await;
                soon(talk.connection.closed()).await
            });
            assert_eq!(ended.code(), Some(CloseCode::SessionFailed), "record {place}: {ended:?}");
        }
    }
    fleet.assert_unharmed();
}

#[test]
fn a_record_that_is_repeated_or_left_out_ends_the_session() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    for repeated in [true, false] {
        let ended = fleet.run(async {
            let mut talk = stranger.join(&papers).await;
            let mut record = Vec::new();
            talk.sealer.seal_message(&encode(&beat()), &mut record).unwrap();
            if repeated {
                talk.raw(record.clone()).await;
                talk.raw(record).await;
            } else {
                talk.say(&beat()).await;
            }
            soon(talk.connection.closed()).await
        });
        assert_eq!(ended.code(), Some(CloseCode::SessionFailed), "{ended:?}");
    }
    fleet.assert_unharmed();
}

fn beat() -> FromWorker {
    FromWorker::Beat { task: TaskId(7), steps: 3 }
}

#[test]
fn words_that_are_none_too_long_or_out_of_turn_eject_their_speaker_by_name() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let join = FromWorker::Join { instance: Instance(1) };
    let long = || "x".repeat(SENTENCE_LEN_MAX + 1);
    let words: [(Vec<u8>, &str); 7] = [
        (vec![0xff; 40], "cannot be read"),
        ([&encode(&beat())[..], &[0]].concat(), "left over"),
        (encode(&join), "out of turn"),
        (encode(&FromWorker::Offer(Signed { bytes: vec![1, 2, 3], signature: vec![0; 64] })), "cannot be read"),
        (encode(&FromWorker::Leaving(Leave::NotAllowed(long()))), "1025 bytes"),
        (encode(&FromWorker::Leaving(Leave::DataUnfit(long()))), "1025 bytes"),
        (Vec::new(), "cannot be read"),
    ];
    for (bytes, reason) in words {
        let ended = fleet.run(async {
            let mut talk = stranger.join(&papers).await;
            talk.say_bytes(&bytes).await;
            soon(talk.connection.closed()).await
        });
        assert_eq!(ended.code(), Some(CloseCode::Misbehaved), "{bytes:?}: {ended:?}");
        assert!(ended.to_string().contains(reason), "{ended}");
        fleet.coordinator.until_where("gone", |line| line["reason"].as_str().is_some_and(|told| told.contains(reason)));
    }
    // Before the first word: nothing was said that could be told by name.
    let ended = fleet.run(async {
        let mut talk = stranger.talk(&papers).await;
        talk.say(&FromWorker::Ready).await;
        soon(talk.connection.closed()).await
    });
    assert_eq!(ended.code(), Some(CloseCode::Misbehaved), "{ended:?}");
    fleet.assert_unharmed();
}

#[test]
fn a_message_one_byte_too_long_ends_the_session_and_the_longest_does_not() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    for over in [0, 1] {
        let code = fleet.run(async {
            let mut talk = stranger.join(&papers).await;
            let mut rest = CONTROL_MESSAGE_BYTES_MAX + over;
            while rest > 0 {
                let part = rest.min(RECORD_BYTES_MAX);
                rest -= part;
                let mut record = Vec::new();
                let flag = if rest == 0 { Flag::Plain } else { Flag::More };
                talk.sealer.seal(flag, &vec![0xff; part], &mut record).unwrap();
                talk.raw(record).await;
            }
            soon(talk.connection.closed()).await.code()
        });
        // As long as it may be, it is read, and found to be no message.
        let expected = if over == 0 { CloseCode::Misbehaved } else { CloseCode::SessionFailed };
        assert_eq!(code, Some(expected), "{over} over");
    }
    fleet.assert_unharmed();
}

#[test]
fn a_sentence_of_a_peer_cannot_steer_the_operators_terminal() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let _talk = fleet.run(async {
        let papers = stranger.enrol("mallory").await;
        let mut talk = stranger.join(&papers).await;
        let sentence = "\x1b[2J\x1b]0;owned\x07 and\nerror: a second line".to_owned();
        talk.say(&FromWorker::Leaving(Leave::DataUnfit(sentence))).await;
        talk
    });
    let gone = fleet.coordinator.until_where("gone", |line| line["name"] == "mallory");
    let reason = gone["reason"].as_str().unwrap();
    assert!(!reason.chars().any(char::is_control) && reason.contains("owned"), "{reason:?}");
    assert!(!fleet.coordinator.stderr().contains('\x1b'));
    fleet.assert_unharmed();
}

// --- inside a round ---

/// Mallory is in, and has a task.
async fn at_work(stranger: &Stranger, papers: &Papers) -> (Talk, Box<Assigned>) {
    let mut talk = stranger.join(papers).await;
    talk.say(&FromWorker::Ready).await;
    let assigned = next_task(&mut talk).await;
    (talk, assigned)
}

async fn next_task(talk: &mut Talk) -> Box<Assigned> {
    talk.until(|message| match message {
        ToWorker::Assigned(assigned) if assigned.kind == TaskKind::Update => Some(assigned.clone()),
        _ => None,
    })
    .await
}

/// An honest manifest for this payload.
fn manifest(run: protocol::ids::RunId, papers: &Papers, assigned: &Assigned, payload: &[u8]) -> Manifest {
    Manifest {
        run,
        worker: WorkerId(papers.identity.id()),
        task: assigned.task,
        kind: assigned.kind,
        base: assigned.base(),
        layout: assigned.layout,
        groups: 1,
        encoding: Encoding::F32,
        bytes: payload.len() as u64,
        hash: Hash::of(payload),
        examples: 1000,
        steps: 1,
        weight: 1,
        metrics: Metrics { train_loss: Some(0.5), seconds: 0.1, evaluation: None },
    }
}

fn offer(papers: &Papers, manifest: &Manifest) -> FromWorker {
    let bytes = encode(manifest);
    let signature = papers.identity.sign(MANIFEST_CONTEXT, &bytes).to_vec();
    FromWorker::Offer(Signed { bytes, signature })
}

/// The bytes of the model that a task starts from.
fn model_bytes(assigned: &Assigned) -> usize {
    usize::try_from(assigned.model.as_ref().unwrap().bytes).unwrap()
}

fn run_of(fleet: &mut LiveFleet) -> protocol::ids::RunId {
    let listening = fleet.coordinator.lines().find(|line| line["event"] == "listening").unwrap();
    listening["run"].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_payload_longer_than_its_manifest_ejects_its_sender_by_name() {
    let mut fleet = LiveFleet::in_a_run();
    let run = run_of(&mut fleet);
    let stranger = fleet.stranger();
    let began = Instant::now();
    let ended = fleet.run(async {
        let papers = stranger.enrol("mallory").await;
        let (mut talk, assigned) = at_work(&stranger, &papers).await;
        let payload = vec![0; model_bytes(&assigned)];
        let declared = manifest(run, &papers, &assigned, &payload);
        talk.say(&offer(&papers, &declared)).await;
        let upload = Upload { task: declared.task, hash: declared.hash, from: 0 };
        let _stream = talk.upload(upload, &[&payload[..], &[0; 4]].concat()).await;
        soon(talk.connection.closed()).await
    });
    assert_eq!(ended.code(), Some(CloseCode::Misbehaved), "{ended:?}");
    let gone = fleet.coordinator.until_where("gone", |line| line["name"] == "mallory");
    assert!(gone["reason"].as_str().unwrap().contains("its manifest declares"), "{gone}");
    fleet.assert_unharmed();
    // Nobody waits for whom it has thrown out: far below the deadline of five seconds.
    let longest = fleet.coordinator.lines().filter_map(|line| line["seconds"].as_f64()).fold(0.0, f64::max);
    assert!(longest < 4.0, "a round took {longest} s of {:?}", began.elapsed());
}

#[test]
fn uploads_that_nobody_asked_for_are_stopped_and_a_stream_number_is_good_once() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let nobodys = Upload { task: TaskId::new(9, 9), hash: Hash([9; 32]), from: 0 };
    fleet.run(async {
        let mut talk = stranger.join(&papers).await;
        let (number, mut sealer) = talk.session.open_stream().unwrap();
        let mut stream = talk.open_upload(number, &mut sealer, nobodys).await;
        let stopped = soon(stream.delivered()).await;
        assert!(matches!(stopped, Err(transport::StreamError::Stopped(0))), "{stopped:?}");
        // The session is as good as before.
        talk.say(&offer(&papers, &foreign_manifest(&papers))).await;
        talk.until(|message| matches!(message, ToWorker::Refused { .. } | ToWorker::Late { .. }).then_some(())).await;
    });
    let middle = Upload { from: 1, ..nobodys };
    let ended = fleet.run(async {
        let mut talk = stranger.join(&papers).await;
        let _stream = talk.upload(middle, &[0; 100]).await;
        soon(talk.connection.closed()).await
    });
    assert_eq!(ended.code(), Some(CloseCode::Misbehaved), "{ended:?}");
    for number in [0, 1] {
        let ended = fleet.run(async {
            let mut talk = stranger.join(&papers).await;
            let (first, mut sealer) = talk.session.open_stream().unwrap();
            let (_, mut other) = talk.session.open_stream().unwrap();
            let _one = talk.open_upload(first, &mut sealer, nobodys).await;
            // The control stream's number, and one that was used before.
            let _two = talk.open_upload(number, &mut other, nobodys).await;
            soon(talk.connection.closed()).await
        });
        assert_eq!(ended.code(), Some(CloseCode::SessionFailed), "{number}: {ended:?}");
    }
    fleet.assert_unharmed();
}

/// A manifest for a task that there never was.
fn foreign_manifest(papers: &Papers) -> Manifest {
    let zero = Hash([0; 32]);
    let assigned = Assigned {
        task: TaskId::new(9, 9),
        round: 1,
        kind: TaskKind::Update,
        schema: None,
        model: None,
        layout: zero,
        weight_shift: 0,
    };
    manifest(protocol::ids::RunId([0; 16]), papers, &assigned, &[0; 8])
}

/// The members' last offers: base, task, weight and payload.
type Offers = Arc<Mutex<BTreeMap<(Hash, TaskId), (u32, Vec<u8>)>>>;

/// Three members whose offers are kept.
fn watched_fleet() -> (LiveFleet, Offers) {
    let offers = Offers::default();
    let mut fleet = LiveFleet::start(tributary_tests::live::CONFIG, &[]);
    for shard in 0..MEMBERS.len() {
        let kept = Arc::clone(&offers);
        fleet.add_member(
            shard,
            Arc::new(move |manifest, payload| {
                std::thread::sleep(PACE);
                let key = (manifest.base, manifest.task);
                kept.lock().unwrap().insert(key, (manifest.weight, payload.clone()));
            }),
        );
    }
    fleet.coordinator.until_where("round", |line| line["round"] == 2);
    (fleet, offers)
}

#[test]
fn a_worker_that_says_everything_twice_counts_once() {
    let (mut fleet, offers) = watched_fleet();
    let run = run_of(&mut fleet);
    let stranger = fleet.stranger();
    let (receipt, weights, assigned, payload) = fleet.run(async {
        let papers = stranger.enrol("mallory").await;
        let mut talk = stranger.join(&papers).await;
        talk.say(&FromWorker::Ready).await;
        talk.say(&FromWorker::Ready).await;
        let assigned = next_task(&mut talk).await;
        let weights = talk.download(assigned.model.as_ref().unwrap()).await;
        let payload = to_bytes(&vec![0.25; model_bytes(&assigned) / 4]);
        let declared = manifest(run, &papers, &assigned, &payload);
        let upload = Upload { task: declared.task, hash: declared.hash, from: 0 };
        for _ in 0..2 {
            talk.say(&FromWorker::Beat { task: assigned.task, steps: 1 }).await;
            talk.say(&offer(&papers, &declared)).await;
            let _stream = talk.upload(upload, &payload).await;
        }
        let signed = receipt_of(&mut talk, assigned.task).await;
        // Asked again after the commit, the coordinator says the same again.
        talk.say(&offer(&papers, &declared)).await;
        assert_eq!(receipt_of(&mut talk, assigned.task).await, signed);
        talk.say(&FromWorker::Join { instance: Instance(1) }).await;
        assert_eq!(soon(talk.connection.closed()).await.code(), Some(CloseCode::Misbehaved));
        (decode::<Receipt>(&signed.bytes).unwrap(), weights, assigned, payload)
    });
    let round = fleet.coordinator.until_where("round", |line| line["round"] == receipt.round);
    assert_eq!(
        (&round["workers"], round["model_hash"].as_str().unwrap()),
        (&4.into(), &*receipt.model_hash.to_string())
    );
    let own = 3 * (ROWS as u64 - ROWS as u64 / 5);
    assert_eq!(round["examples"], own + 1000, "the rows of three members, and mallory's once");

    let mut updates = updates_on(&offers, assigned.base());
    assert_eq!(updates.len(), MEMBERS.len());
    updates.push((assigned.task, 1, payload));
    assert_eq!(fedavg(&assigned, &weights, &updates), receipt.model_hash);
    assert!(fleet.metric("tributary_updates_total{outcome=\"duplicate\"}") >= 2.0);
    fleet.goes_on();
    fleet.assert_nobody_lost();
}

async fn receipt_of(talk: &mut Talk, task: TaskId) -> Signed {
    talk.until(|message| match message {
        ToWorker::Receipt(signed) if decode::<Receipt>(&signed.bytes).unwrap().task == task => Some(signed.clone()),
        _ => None,
    })
    .await
}

/// What the members offered for the round that started from `base`.
fn updates_on(offers: &Offers, base: Hash) -> Vec<(TaskId, u32, Vec<u8>)> {
    let offers = offers.lock().unwrap();
    let of_round = offers.iter().filter(|((on, _), _)| *on == base);
    of_round.map(|((_, task), (weight, payload))| (*task, *weight, payload.clone())).collect()
}

/// The hash of the model that comes of these updates, each counted once.
fn fedavg(assigned: &Assigned, base: &[u8], updates: &[(TaskId, u32, Vec<u8>)]) -> Hash {
    let mut model = base.as_chunks::<4>().0.to_vec();
    let mut sum = Sum::new(Ring::weighted(), model.len());
    for (task, weight, payload) in updates {
        let mut verifier = Verifier::new(Ring::weighted(), payload.len() as u64, Hash::of(payload));
        verifier.update(payload).unwrap();
        let mut fold = sum.begin(*task, *weight, &verifier.finish().unwrap()).unwrap();
        fold.add(payload);
        fold.finish().unwrap();
    }
    let mean: Vec<f64> = sum.mean().unwrap().collect();
    let learning = protocol::plan::LearningPlan::default();
    let mut state = protocol::strategy::ServerState::new(&learning, model.len());
    protocol::strategy::step(&learning, &mut state, &mut model, mean.into_iter(), f64::INFINITY).unwrap();
    model_hasher(&assigned.layout).update(model.as_flattened()).finalize().into()
}

#[test]
fn a_worker_that_reads_no_model_is_let_go_instead_of_hoarding_them() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let ended = fleet.run(async {
        let mut talk = stranger.join(&papers).await;
        talk.say(&FromWorker::Ready).await;
        // It takes every task, gives each back at once, and never reads what is streamed to it.
        loop {
            match talk.hear().await {
                Some(ToWorker::Assigned(assigned)) => {
                    let failure = Failure::NotFinite;
                    talk.say(&FromWorker::Failed { task: assigned.task, failure }).await;
                }
                Some(_) => {}
                None => return soon(talk.connection.closed()).await,
            }
        }
    });
    assert_eq!(ended.code(), Some(CloseCode::TimedOut), "{ended:?}");
    fleet.assert_unharmed();
}

#[test]
fn a_flood_of_words_and_streams_drowns_nobody() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    fleet.run(async {
        let mut talk = stranger.join(&papers).await;
        for task in 0..5_000 {
            talk.say(&FromWorker::Beat { task: TaskId(task), steps: task }).await;
            talk.say(&FromWorker::Failed { task: TaskId(task), failure: Failure::NotFinite }).await;
        }
        talk.say(&offer(&papers, &foreign_manifest(&papers))).await;
        talk.until(|message| matches!(message, ToWorker::Refused { .. }).then_some(())).await;
        // As many streams as QUIC lets it open, each with one byte; one more is not to be had.
        let mut streams = Vec::new();
        for _ in 0..transport::limits::UNI_STREAMS_MAX {
            let mut stream = talk.connection.open_uni().await.unwrap();
            stream.write_record(Bytes::from_static(&[4])).await.unwrap();
            streams.push(stream);
        }
        let more = tokio::time::timeout(10 * PACE, talk.connection.open_uni()).await;
        assert!(more.is_err(), "one more stream");
    });
    fleet.assert_unharmed();
}

// --- silence ---

#[test]
fn those_who_say_nothing_are_not_waited_for() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let papers = fleet.run(stranger.enrol("mallory"));
    let began = Instant::now();
    fleet.run(async {
        let invitation = &stranger.invitation;
        let silent = || async { stranger.call(&papers).await };
        // Nothing at all; half a Hello; a Hello and nothing more; a handshake and no first word.
        let nothing = silent().await;
        let mut half = silent().await;
        half.bytes(vec![1, 200]).await;
        let mut greeted = silent().await;
        let _ = greeted.begin(invitation, &hello(Role::Worker), &papers.session, &[]).await;
        let shaken = stranger.talk(&papers).await;
        let joining = stranger.call_to_join().await;
        let mut slow = stranger.call_to_join().await;
        let _ = slow.begin(invitation, &hello(Role::Join), &papers.session, &[]).await;
        for (call, most_s) in [(joining, 5), (slow, 5), (nothing, 10), (half, 10), (greeted, 10)] {
            assert_timed_out(&call, began, most_s).await;
        }
        assert_eq!(shaken.connection.closed().await.code(), Some(CloseCode::TimedOut));
    });
    fleet.assert_metric("tributary_handshakes_total{outcome=\"timeout\"}", 4.0);
    fleet.assert_unharmed();
}

/// It is over when its time is, and not long before or after.
async fn assert_timed_out(call: &Call, began: Instant, most_s: u64) {
    let ended = call.connection.closed().await;
    assert_eq!(ended.code(), Some(CloseCode::TimedOut), "{ended:?}");
    let took = began.elapsed().as_secs();
    assert!((most_s - 1..most_s + 9).contains(&took), "{took} s of {most_s}");
}

// --- enrolment ---

#[test]
fn an_invitation_is_worth_what_it_says_and_no_more() {
    let mut fleet = LiveFleet::in_a_run();
    let once = fleet.invite(&["--uses", "1"]);
    let short = fleet.invite(&["--expires", "1s"]);
    let stranger = fleet.stranger();
    let keys = || (IdentityKey::generate().unwrap(), SessionKey::generate().unwrap());
    let ((one, one_session), (two, two_session)) = (keys(), keys());
    fleet.run(async {
        let ask = |identity, session, token| stranger.ask(identity, session, "guest", token);
        let refused = |refusal| EnrolAnswer::Refused(refusal);
        assert_eq!(ask(&one, &one_session, [0; 16]).await, refused(EnrolRefusal::Unknown));
        let first = ask(&one, &one_session, once.token).await;
        let EnrolAnswer::Granted { name, .. } = &first else { panic!("{first:?}") };
        assert_eq!(name.as_str(), "guest");
        // The same keys get the same name again; other keys, or a mixture, get nothing.
        assert!(matches!(&ask(&one, &one_session, once.token).await, EnrolAnswer::Granted { name: again, .. } if again == name));
        assert_eq!(ask(&two, &two_session, once.token).await, refused(EnrolRefusal::Spent));
        assert_eq!(ask(&one, &two_session, once.token).await, refused(EnrolRefusal::BadKey));
        // Keys that are none.
        let local = stranger.invitation.token;
        for ed25519 in [[0; 32], [0xff; 32]] {
            let request = EnrolRequest { token: local, name: "guest".parse().unwrap(), ed25519 };
            assert_eq!(stranger.ask_with(&two_session, &request).await, refused(EnrolRefusal::BadKey));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(ask(&two, &two_session, short.token).await, refused(EnrolRefusal::Expired));
    });
    fleet.assert_metric("tributary_enrolments_total{outcome=\"refused\"}", 6.0);
    fleet.assert_unharmed();
}

#[test]
fn an_enrolment_is_one_short_exchange_and_nothing_else() {
    let mut fleet = LiveFleet::in_a_run();
    let stranger = fleet.stranger();
    let session = SessionKey::generate().unwrap();
    let token = stranger.invitation.token;
    let request = |name: &str| {
        let ed25519 = IdentityKey::generate().unwrap().public();
        // As postcard writes it, with a name that no WorkerName would be.
        [&token[..], &[u8::try_from(name.len()).unwrap()], name.as_bytes(), &ed25519].concat()
    };
    let join = encode(&hello(Role::Join));
    let payloads = [
        (Vec::new(), CloseCode::SessionFailed),
        (vec![0; 5], CloseCode::SessionFailed),
        ([request("guest"), vec![0]].concat(), CloseCode::SessionFailed),
        (request(""), CloseCode::SessionFailed),
        (request("../../etc"), CloseCode::SessionFailed),
        (request("a\u{1b}[2J"), CloseCode::SessionFailed),
        (request(&"x".repeat(65)), CloseCode::SessionFailed),
    ];
    for (payload, expected) in payloads {
        let code = fleet.run(async {
            let mut call = stranger.call_to_join().await;
            let (message, _) = call.begin(&stranger.invitation, &hello(Role::Join), &session, &payload).await;
            call.frame(Frame::Handshake(message.into())).await;
            soon(call.ended()).await.code()
        });
        assert_eq!(code, Some(expected), "{payload:?}");
    }
    let over = [&frame(1, u32::try_from(join.len()).unwrap(), &join)[..], &frame(3, 4097, &[0; 4097])].concat();
    let code = fleet.run(async {
        let mut call = stranger.call_to_join().await;
        call.bytes(over).await;
        soon(call.ended()).await.code()
    });
    assert_eq!(code, Some(CloseCode::Misbehaved));
    // Made for another coordinator's key.
    let code = fleet.run(async {
        let mut call = stranger.call_to_join().await;
        let coordinator_x25519 = SessionKey::generate().unwrap().public();
        let other = protocol::invitation::Invitation { coordinator_x25519, ..stranger.invitation.clone() };
        let (message, _) = call.begin(&other, &hello(Role::Join), &session, &request("guest")).await;
        call.frame(Frame::Handshake(message.into())).await;
        soon(call.ended()).await.code()
    });
    assert_eq!(code, Some(CloseCode::SessionFailed));
    // Nobody came in.
    let said = fleet.home.run("coordinator", &["workers"]);
    assert_eq!(said.stdout.lines().count(), MEMBERS.len(), "{}", said.stdout);
    fleet.assert_unharmed();
}
