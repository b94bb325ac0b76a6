//! The session from outside: two ends over a handshake, and everything a stream can suffer on its way.

#![allow(clippy::unwrap_used, missing_docs)]

use proptest::prelude::*;
use tributary_protocol::ids::ContentId;
use tributary_protocol::limits::{CONTROL_MESSAGE_BYTES_MAX, RECORD_BYTES_MAX};
use tributary_protocol::messages::ContentKey;
use tributary_protocol::session::broadcast::{BROADCAST_HEADER_BYTES, ContentPart, cut_content, seal_content};
use tributary_protocol::session::record::{RECORD_HEADER_BYTES, RECORD_TAG_BYTES};
use tributary_protocol::session::*;

struct End {
    session: Session,
    sealer: Sealer,
    opener: Opener,
}

/// A worker's end and the coordinator's.
fn pair() -> (End, End) {
    let [worker, coordinator] = [1, 2].map(|byte| StaticKey::from(StaticSecret::from([byte; 32])));
    let said = prologue(b"hello", &[5; 32]);
    let pinned = Acquaintance::new(&worker, coordinator.public()).unwrap();
    let (initiator, first) = Initiator::start(&said, &worker, StaticSecret::from([3; 32]), &pinned, b"").unwrap();
    let (responder, _) = Responder::read(&said, &coordinator, None, &first).unwrap();
    let (second, there) = responder.reply(StaticSecret::from([4; 32]), b"").unwrap();
    let (_, here) = initiator.finish(&second).unwrap();
    (End::new(here), End::new(there))
}

impl End {
    fn new(established: Established) -> Self {
        let (session, sealer, opener) = Session::begin(established);
        Self { session, sealer, opener }
    }
}

/// A fresh uni-directional stream from the worker to the coordinator.
fn stream() -> (Sealer, Opener) {
    let (mut worker, mut coordinator) = pair();
    let (number, sealer) = worker.session.open_stream().unwrap();
    (sealer, coordinator.session.accept_stream(number).unwrap())
}

fn sealed(sealer: &mut Sealer, flag: Flag, plaintext: &[u8]) -> Vec<u8> {
    let mut record = Vec::new();
    sealer.seal(flag, plaintext, &mut record).unwrap();
    record
}

fn open(opener: &mut Opener, record: &[u8]) -> Result<Vec<u8>, RecordError> {
    let (header, body) = record.split_first_chunk().unwrap();
    opener.open_in_place(header, &mut body.to_vec()).map(|opened| opened.plaintext.to_vec())
}

/// Cuts bytes into records as a reader does, and opens them.
fn receive(opener: &mut Opener, mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut assembler = MessageAssembler::default();
    let mut messages = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk() {
        let length = RecordHeader::parse(header).unwrap().body_bytes();
        let (body, rest) = rest.split_at(length);
        let mut body = body.to_vec();
        let opened = opener.open_in_place(header, &mut body).unwrap();
        messages.extend(assembler.push(opened).unwrap());
        bytes = rest;
    }
    messages
}

#[test]
fn both_ends_know_each_other_and_the_same_hash() {
    let (worker, coordinator) = pair();
    assert_eq!(worker.session.handshake_hash(), coordinator.session.handshake_hash());
    let public = |byte| public_key(&StaticSecret::from([byte; 32]));
    assert_eq!(worker.session.remote_static(), &public(2));
    assert_eq!(coordinator.session.remote_static(), &public(1));
}

#[test]
fn control_messages_pass_in_both_directions_whatever_their_length() {
    let (mut worker, mut coordinator) = pair();
    let lengths = [0, 1, RECORD_BYTES_MAX, RECORD_BYTES_MAX + 1, CONTROL_MESSAGE_BYTES_MAX];
    let messages: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![7; length]).collect();
    let mut bytes = Vec::new();
    for message in &messages {
        worker.sealer.seal_message(message, &mut bytes).unwrap();
    }
    worker.sealer.finish(&mut bytes).unwrap();
    assert_eq!(receive(&mut coordinator.opener, &bytes), messages);
    coordinator.opener.finish().unwrap();

    let mut answer = Vec::new();
    coordinator.sealer.seal_message(b"welcome", &mut answer).unwrap();
    assert_eq!(receive(&mut worker.opener, &answer), [b"welcome"]);
}

#[test]
fn each_direction_and_each_stream_has_its_own_key() {
    let (mut worker, mut coordinator) = pair();
    let (one, mut near) = worker.session.open_stream().unwrap();
    let (two, mut next) = worker.session.open_stream().unwrap();
    let (back, mut far) = coordinator.session.open_stream().unwrap();
    assert_eq!((one, two, back), (1, 2, 1));
    let records = [&mut near, &mut next, &mut far].map(|sealer| sealed(sealer, Flag::Final, b"x"));
    assert_ne!(records[0], records[1]);
    assert_ne!(records[0], records[2]);
    let mut opener = coordinator.session.accept_stream(two).unwrap();
    assert_eq!(open(&mut opener, &records[0]), Err(RecordError::BadTag { sequence: 0 }));
}

#[test]
fn streams_are_accepted_out_of_order_and_once() {
    let (mut worker, mut coordinator) = pair();
    let (one, mut first) = worker.session.open_stream().unwrap();
    let (two, mut second) = worker.session.open_stream().unwrap();
    let mut opener = coordinator.session.accept_stream(two).unwrap();
    assert_eq!(open(&mut opener, &sealed(&mut second, Flag::Final, b"two")).unwrap(), b"two");
    let mut opener = coordinator.session.accept_stream(one).unwrap();
    assert_eq!(open(&mut opener, &sealed(&mut first, Flag::Final, b"one")).unwrap(), b"one");
    let repeated = StreamError::Repeated { got: one };
    assert_eq!(coordinator.session.accept_stream(one).unwrap_err(), repeated);
}

#[test]
fn every_changed_bit_of_a_record_is_refused() {
    let record = sealed(&mut stream().0, Flag::Plain, b"five tensors");
    for bit in 0..record.len() * 8 {
        let mut changed = record.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let (_, mut opener) = stream();
        assert!(open(&mut opener, &changed).is_err(), "bit {bit}");
        assert_eq!(open(&mut opener, &record), Err(RecordError::Failed), "bit {bit}");
    }
}

#[test]
fn a_gap_closes_the_stream() {
    let (mut sealer, mut opener) = stream();
    let records = [b"a", b"b", b"c"].map(|text| sealed(&mut sealer, Flag::Plain, text));
    open(&mut opener, &records[0]).unwrap();
    let gap = RecordError::OutOfOrder { got: 2, expected: 1 };
    assert_eq!(open(&mut opener, &records[2]), Err(gap));
    assert_eq!(open(&mut opener, &records[1]), Err(RecordError::Failed));
    assert_eq!(opener.finish(), Err(RecordError::Failed));
}

#[test]
fn a_repeat_closes_the_stream() {
    let (mut sealer, mut opener) = stream();
    let record = sealed(&mut sealer, Flag::Plain, b"a");
    open(&mut opener, &record).unwrap();
    let repeat = RecordError::OutOfOrder { got: 0, expected: 1 };
    assert_eq!(open(&mut opener, &record), Err(repeat));
    let next = sealed(&mut sealer, Flag::Plain, b"b");
    assert_eq!(open(&mut opener, &next), Err(RecordError::Failed));
}

#[test]
fn a_stream_without_its_last_record_was_truncated() {
    let (mut sealer, mut opener) = stream();
    open(&mut opener, &sealed(&mut sealer, Flag::Plain, b"a")).unwrap();
    open(&mut opener, &sealed(&mut sealer, Flag::Plain, b"b")).unwrap();
    assert!(!opener.is_finished());
    assert_eq!(opener.finish(), Err(RecordError::Truncated { records: 2 }));
}

#[test]
fn nothing_follows_the_last_record() {
    let (mut sealer, mut opener) = stream();
    let last = sealed(&mut sealer, Flag::Final, b"a");
    let mut more = b"kept".to_vec();
    assert_eq!(sealer.seal(Flag::Plain, b"b", &mut more), Err(RecordError::AfterFinal));
    assert_eq!(more, b"kept");
    open(&mut opener, &last).unwrap();
    assert!(opener.is_finished());
    assert_eq!(open(&mut opener, &last), Err(RecordError::AfterFinal));
    assert_eq!(open(&mut opener, &last), Err(RecordError::Failed));
}

#[test]
fn headers_that_are_not_ours_are_refused_with_their_reason() {
    let good = [1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let with = |place: usize, byte: u8| {
        let mut header = good;
        header[place] = byte;
        RecordHeader::parse(&header)
    };
    assert_eq!(with(0, 1).unwrap().body_bytes(), RECORD_BYTES_MAX + RECORD_TAG_BYTES);
    assert_eq!(with(0, 2), Err(RecordError::Version { got: 2 }));
    assert_eq!(with(1, 0), Err(RecordError::UnknownKind { got: 0 }));
    assert_eq!(with(1, 4), Err(RecordError::UnknownKind { got: 4 }));
    assert_eq!(with(2, 3), Err(RecordError::Flags { got: 3 }));
    assert_eq!(with(2, 4), Err(RecordError::Flags { got: 4 }));
    assert_eq!(with(3, 1), Err(RecordError::Reserved { got: 1 }));
    assert_eq!(with(4, 1), Err(RecordError::TooLong { got: RECORD_BYTES_MAX as u64 + 1 }));
    assert_eq!(with(7, 255), Err(RecordError::TooLong { got: 0xff01_0000 }));
    assert_eq!(with(10, 0x10), Err(RecordError::Exhausted));
}

#[test]
fn more_is_for_control_records_alone() {
    let (mut sealer, _) = stream();
    let refused = RecordError::Flags { got: 2 };
    assert_eq!(sealer.seal(Flag::More, b"a", &mut Vec::new()), Err(refused));
    let header = [1, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(RecordHeader::parse(&header), Err(refused));
}

#[test]
fn a_record_of_another_kind_than_its_stream_is_refused() {
    let (mut worker, mut coordinator) = pair();
    let (_, mut sealer) = worker.session.open_stream().unwrap();
    let record = sealed(&mut sealer, Flag::Plain, b"a");
    let wrong = RecordError::WrongKind { got: RecordKind::Payload, expected: RecordKind::Control };
    assert_eq!(open(&mut coordinator.opener, &record), Err(wrong));
}

#[test]
fn a_body_of_another_length_than_promised_is_refused() {
    for change in [-17, -1, 1] {
        let (mut sealer, mut opener) = stream();
        let mut record = sealed(&mut sealer, Flag::Plain, b"a");
        record.resize(record.len().checked_add_signed(change).unwrap(), 0);
        let got = record.len() - RECORD_HEADER_BYTES;
        let length = RecordError::BodyLength { got, expected: 17 };
        assert_eq!(open(&mut opener, &record), Err(length));
    }
}

#[test]
fn plaintext_past_the_limit_is_not_sealed() {
    let (mut sealer, mut opener) = stream();
    let too_long = vec![0; RECORD_BYTES_MAX + 1];
    let refused = RecordError::TooLong { got: RECORD_BYTES_MAX as u64 + 1 };
    assert_eq!(sealer.seal(Flag::Plain, &too_long, &mut Vec::new()), Err(refused));
    let full = sealed(&mut sealer, Flag::Final, &too_long[1..]);
    assert_eq!(open(&mut opener, &full).unwrap(), too_long[1..]);
}

#[test]
fn control_messages_past_the_limit_are_refused_on_both_sides() {
    let (mut worker, mut coordinator) = pair();
    let refused = RecordError::MessageTooLong { got: CONTROL_MESSAGE_BYTES_MAX + 1 };
    let mut out = Vec::new();
    let too_long = vec![0; CONTROL_MESSAGE_BYTES_MAX + 1];
    assert_eq!(worker.sealer.seal_message(&too_long, &mut out), Err(refused));
    assert!(out.is_empty());

    let mut assembler = MessageAssembler::default();
    let mut push = |flag, part: &[u8]| {
        let mut record = sealed(&mut worker.sealer, flag, part);
        let (header, body) = record.split_first_chunk_mut().unwrap();
        assembler.push(coordinator.opener.open_in_place(header, body).unwrap())
    };
    for part in too_long[1..].chunks(RECORD_BYTES_MAX) {
        assert_eq!(push(Flag::More, part), Ok(None));
    }
    assert_eq!(push(Flag::Plain, &[0]), Err(refused));
}

#[test]
fn a_part_that_adds_nothing_is_refused() {
    let (mut worker, mut coordinator) = pair();
    let mut record = sealed(&mut worker.sealer, Flag::More, b"");
    let (header, body) = record.split_first_chunk_mut().unwrap();
    let opened = coordinator.opener.open_in_place(header, body).unwrap();
    assert_eq!(MessageAssembler::default().push(opened), Err(RecordError::EmptyPart));
}

#[test]
fn nothing_secret_is_printed() {
    let (mut sealer, mut opener) = stream();
    let mut record = sealed(&mut sealer, Flag::Plain, b"patient 4711");
    let (header, body) = record.split_first_chunk_mut().unwrap();
    assert!(format!("{sealer:?}").contains("key: [redacted]"));
    assert!(format!("{opener:?}").contains("key: [redacted]"));
    let opened = opener.open_in_place(header, body).unwrap();
    assert_eq!(format!("{opened:?}"), "Opened { flag: Plain, plaintext: 12 bytes }");
    let key = ContentKey([7; 32]);
    assert_eq!(format!("{key:?}"), "ContentKey([redacted])");
    assert!(format!("{:?}", BroadcastSealer::new(CONTENT, &key)).contains("key: [redacted]"));
}

const CONTENT: ContentId = ContentId([0xc0; 16]);

fn content_key() -> ContentKey {
    ContentKey([0x0c; 32])
}

/// Where it stands; [`open_into_place`] does the same to another place.
fn open_broadcast(opener: &mut BroadcastOpener, record: &[u8]) -> Result<Vec<u8>, RecordError> {
    let (header, body) = record.split_first_chunk().unwrap();
    opener.open_in_place(header, &mut body.to_vec()).map(|opened| opened.plaintext.to_vec())
}

fn open_into_place(opener: &mut BroadcastOpener, record: &[u8]) -> Result<Vec<u8>, RecordError> {
    let (header, body) = record.split_first_chunk().unwrap();
    let mut plaintext = vec![0; body.len().saturating_sub(16)];
    opener.open_into(header, body, &mut plaintext)?;
    Ok(plaintext)
}

#[test]
fn a_content_that_is_opened_into_its_place_is_the_same_and_refused_for_the_same_reasons() {
    let records = seal_content(CONTENT, &content_key(), &[7; RECORD_BYTES_MAX + 9]).unwrap();
    let (mut tampered, mut short, foreign) = (records[1].clone(), records[1].clone(), ContentId([9; 16]));
    tampered[BROADCAST_HEADER_BYTES] ^= 1;
    short.pop();
    let cases = [vec![&records[0], &records[1]], vec![&records[1]], vec![&records[0], &tampered], vec![&short]];
    for id in [CONTENT, foreign] {
        for case in &cases {
            let mut openers = [(); 2].map(|()| BroadcastOpener::new(id, &content_key()));
            for record in case {
                let [here, there] = &mut openers;
                assert_eq!(open_into_place(there, record), open_broadcast(here, record));
            }
            let [here, there] = openers;
            assert_eq!(there.finish(), here.finish());
        }
    }
}

#[test]
fn one_sealed_content_opens_for_everyone_who_has_its_key() {
    for length in [0, 1, RECORD_BYTES_MAX, 2 * RECORD_BYTES_MAX + 1] {
        let content: Vec<u8> = (0..=250).cycle().take(length).collect();
        let records = seal_content(CONTENT, &content_key(), &content).unwrap();
        for _worker in 0..2 {
            let mut opener = BroadcastOpener::new(CONTENT, &content_key());
            let mut read = Vec::new();
            for record in &records {
                assert!(!opener.is_finished());
                read.extend(open_broadcast(&mut opener, record).unwrap());
            }
            assert_eq!(read, content);
            opener.finish().unwrap();
        }
    }
}

#[test]
fn a_content_that_is_sealed_in_parts_has_the_same_records_in_whatever_order_the_parts_are_sealed() {
    for bytes in [0, 1, RECORD_BYTES_MAX, RECORD_BYTES_MAX + 1, 7 * RECORD_BYTES_MAX, 7 * RECORD_BYTES_MAX + 5] {
        let content: Vec<u8> = (0..bytes).map(|at| at.to_le_bytes()[0]).collect();
        let expected = seal_content(CONTENT, &content_key(), &content).unwrap();
        for count in [0, 1, 2, 3, 7, 100] {
            let parts = cut_content(CONTENT, &content_key(), &content, count).unwrap();
            assert!(parts.len() <= count.max(1) && (count < 2 || expected.len() < 2 || parts.len() > 1));
            let mut sealed: Vec<_> = parts.into_iter().rev().map(ContentPart::seal).collect();
            sealed.reverse();
            assert_eq!(sealed.into_iter().flat_map(Result::unwrap).collect::<Vec<_>>(), expected, "{count} of {bytes}");
        }
    }
}

#[test]
fn a_reader_learns_kind_content_and_length_from_the_header() {
    let records = seal_content(CONTENT, &content_key(), b"model").unwrap();
    let header = BroadcastHeader::parse(records[0].first_chunk().unwrap()).unwrap();
    assert_eq!(header.content_id, CONTENT);
    assert_eq!(header.record.flag, Flag::Final);
    assert_eq!(BROADCAST_HEADER_BYTES + header.record.body_bytes(), records[0].len());
    let start = RecordHeader::parse(records[0].first_chunk().unwrap()).unwrap();
    assert_eq!(start.kind, RecordKind::Broadcast);

    let payload = sealed(&mut stream().0, Flag::Plain, &[0; 32]);
    let wrong = RecordError::WrongKind { got: RecordKind::Payload, expected: RecordKind::Broadcast };
    assert_eq!(BroadcastHeader::parse(payload.first_chunk().unwrap()), Err(wrong));
}

/// Made by `tests/data/session_golden.py` with Python's `cryptography`.
#[test]
fn a_broadcast_record_has_these_bytes() {
    let content_id = ContentId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    let records = seal_content(content_id, &content_key(), b"model").unwrap();
    assert_eq!(
        data_encoding::HEXLOWER.encode(&records.concat()),
        "01030100050000000000000000000000000102030405060708090a0b0c0d0e0f76c2d2d5af17224a2052b0f1d6d7936bd2603642e0"
    );
}

#[test]
fn every_changed_bit_of_a_broadcast_record_is_refused() {
    let record = seal_content(CONTENT, &content_key(), b"model").unwrap().concat();
    for bit in 0..record.len() * 8 {
        let mut changed = record.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let mut opener = BroadcastOpener::new(CONTENT, &content_key());
        assert!(open_broadcast(&mut opener, &changed).is_err(), "bit {bit}");
        assert_eq!(open_broadcast(&mut opener, &record), Err(RecordError::Failed), "bit {bit}");
    }
}

#[test]
fn a_broadcast_that_is_cut_reordered_repeated_or_foreign_is_refused() {
    let content = vec![7; 2 * RECORD_BYTES_MAX];
    let records = seal_content(CONTENT, &content_key(), &content).unwrap();
    let opener = || BroadcastOpener::new(CONTENT, &content_key());

    let mut cut = opener();
    open_broadcast(&mut cut, &records[0]).unwrap();
    assert_eq!(cut.finish(), Err(RecordError::Truncated { records: 1 }));

    let reordered = RecordError::OutOfOrder { got: 1, expected: 0 };
    assert_eq!(open_broadcast(&mut opener(), &records[1]), Err(reordered));

    let mut repeated = opener();
    open_broadcast(&mut repeated, &records[0]).unwrap();
    let repeat = RecordError::OutOfOrder { got: 0, expected: 1 };
    assert_eq!(open_broadcast(&mut repeated, &records[0]), Err(repeat));

    let mut foreign = BroadcastOpener::new(ContentId([0xc1; 16]), &content_key());
    assert_eq!(open_broadcast(&mut foreign, &records[0]), Err(RecordError::ForeignContent));
    assert_eq!(foreign.finish(), Err(RecordError::Failed));

    let mut other_key = BroadcastOpener::new(CONTENT, &ContentKey([0x0d; 32]));
    let bad_tag = RecordError::BadTag { sequence: 0 };
    assert_eq!(open_broadcast(&mut other_key, &records[0]), Err(bad_tag));
}

proptest! {
    #[test]
    fn any_split_of_a_message_into_records_reassembles(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..2000), 1..20),
    ) {
        let (mut worker, mut coordinator) = pair();
        let mut bytes = Vec::new();
        for (place, part) in parts.iter().enumerate() {
            let flag = if place + 1 == parts.len() { Flag::Plain } else { Flag::More };
            worker.sealer.seal(flag, part, &mut bytes).unwrap();
        }
        prop_assert_eq!(receive(&mut coordinator.opener, &bytes), [parts.concat()]);
    }

    #[test]
    fn any_split_of_a_payload_into_records_comes_out_whole(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 0..20),
    ) {
        let (mut sealer, mut opener) = stream();
        let mut bytes = Vec::new();
        for part in &parts {
            sealer.seal(Flag::Plain, part, &mut bytes).unwrap();
        }
        sealer.finish(&mut bytes).unwrap();
        prop_assert_eq!(receive(&mut opener, &bytes).concat(), parts.concat());
        prop_assert_eq!(opener.finish(), Ok(()));
    }

    #[test]
    fn no_bytes_make_the_header_parser_or_an_opener_panic(
        header in any::<[u8; 16]>(),
        body in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let (_, mut opener) = stream();
        prop_assert!(opener.open_in_place(&header, &mut body.clone()).is_err());
        if let Ok(parsed) = RecordHeader::parse(&header) {
            prop_assert!(parsed.body_bytes() <= RECORD_BYTES_MAX + RECORD_TAG_BYTES);
        }
    }
}
