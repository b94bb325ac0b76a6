//! Holds `docs/protocol.md` against the code: every example of the page is read out of it, decoded, compared with
//! what it says that it is, and coded again.
//!
//! The page's bytes come from `data/protocol_examples.py`, which shares no code with the crate. The values below are
//! written out once more, so neither the page nor the code can change alone. Each `variants!` is an exhaustive match:
//! a new variant does not compile here until it has a value, and then fails until the page has its example.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use proptest::prelude::{any, prop, proptest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tributary_protocol::evaluation::{ClassScores, Evaluation, Histogram};
use tributary_protocol::ids::{ContentId, Hash, Instance, RunId, TaskId, WORKER_NAME_LEN_MAX, WorkerId};
use tributary_protocol::limits;
use tributary_protocol::messages::*;
use tributary_protocol::plan::*;
use tributary_protocol::session::record::{RECORD_HEADER_BYTES, STREAM_RECORDS_MAX};
use tributary_protocol::session::sign::{MANIFEST_CONTEXT, RECEIPT_CONTEXT, SigningKey, key_id, sign, verify};
use tributary_protocol::session::{
    Acquaintance, BroadcastOpener, BroadcastSealer, Flag, Initiator, Opener, Responder, STREAM_WINDOW, Sealer, Session,
    StaticKey, StaticSecret, prologue,
};

const PAGE: &str = include_str!("../../../docs/protocol.md");

/// The page's blocks, by what stands behind their fence: the bytes and the note of each line.
struct Page(BTreeMap<String, Vec<(Vec<u8>, &'static str)>>);

impl Page {
    fn read() -> Self {
        let mut blocks = BTreeMap::new();
        let mut lines = PAGE.lines();
        while let Some(line) = lines.next() {
            let Some(name) = line.strip_prefix("```") else { continue };
            let body = lines.by_ref().take_while(|line| *line != "```");
            if name == "text" {
                body.for_each(drop);
            } else {
                assert!(
                    blocks.insert(name.to_owned(), body.map(read_line).collect()).is_none(),
                    "{name} is there twice"
                );
            }
        }
        Self(blocks)
    }

    fn block(&self, name: &str) -> &[(Vec<u8>, &'static str)] {
        self.0.get(name).unwrap_or_else(|| panic!("docs/protocol.md has no block ```{name}"))
    }

    fn hex(&self, name: &str) -> Vec<u8> {
        self.block(&format!("hex {name}")).iter().flat_map(|(bytes, _)| bytes.clone()).collect()
    }
}

fn read_line(line: &'static str) -> (Vec<u8>, &'static str) {
    let (hex, note) = line.split_once('#').unwrap_or((line, ""));
    let bytes = hex
        .split_whitespace()
        .map(|byte| u8::from_str_radix(byte, 16).unwrap_or_else(|_| panic!("not hex: {line}")))
        .collect();
    (bytes, note.trim())
}

/// One value of every variant, in the order of their numbers.
macro_rules! variants {
    ($type:ident { $($variant:ident $(($($tuple:tt)*))? $({$($fields:tt)*})?),* $(,)? }) => {{
        let _exhaustive = |value: &$type| match value { $($type::$variant { .. } => (),)* };
        vec![$((stringify!($variant), $type::$variant $(($($tuple)*))? $({$($fields)*})?)),*]
    }};
}

/// Everything that the page says of bytes, and which of its blocks were asked for.
struct Check {
    page: Page,
    seen: BTreeSet<String>,
}

impl Check {
    /// The block ```hex NAME is `value`.
    fn example<T: Serialize + DeserializeOwned + PartialEq + Debug>(&mut self, name: &str, value: &T) {
        assert_is(name, &self.page.hex(name), value);
        self.seen.insert(format!("hex {name}"));
    }

    /// Each variant of a message has a block of its own.
    fn message<T>(&mut self, name: &str, variants: &[(&str, T)])
    where
        T: Serialize + DeserializeOwned + PartialEq + Debug,
    {
        for (number, (variant, value)) in variants.iter().enumerate() {
            let name = format!("{name}::{variant}");
            assert_eq!(usize::from(self.page.hex(&name)[0]), number, "{name}: the number of a variant never changes");
            self.example(&name, value);
        }
        assert_no_variant::<T>(name, variants.len());
    }

    /// Each variant of an enum within messages has a line of its own in the block ```each NAME.
    fn each<T: Serialize + DeserializeOwned + PartialEq + Debug>(&mut self, name: &str, variants: &[(&str, T)]) {
        let block = format!("each {name}");
        let lines = self.page.block(&block);
        assert_eq!(lines.len(), variants.len(), "{block}: a line for each variant");
        for (number, ((bytes, note), (variant, value))) in lines.iter().zip(variants).enumerate() {
            assert_eq!(note.split(' ').next(), Some(*variant), "{block}");
            assert_eq!(usize::from(bytes[0]), number, "{block}: the number of a variant never changes");
            assert_is(&block, bytes, value);
        }
        assert_no_variant::<T>(name, variants.len());
        self.seen.insert(block);
    }
}

/// `bytes` are `value` and nothing else, and no beginning of them is a message.
fn assert_is<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, bytes: &[u8], value: &T) {
    assert_eq!(decode::<T>(bytes).as_ref(), Ok(value), "{name}");
    assert_eq!(encode(value), bytes, "{name}");
    let longer = [bytes, &[0]].concat();
    assert_eq!(decode::<T>(&longer), Err(DecodeError::LeftOver(1)), "{name}");
    for end in 0..bytes.len() {
        let cut = decode::<T>(&bytes[..end]);
        assert!(matches!(cut, Err(DecodeError::Unreadable(_))), "{name}: {end} bytes of it are {cut:?}");
    }
}

/// The numbers from `first` on are no variants, whatever follows them.
fn assert_no_variant<T: DeserializeOwned + Debug>(name: &str, first: usize) {
    for number in first..=255 {
        let unknown = [postcard::to_allocvec(&number).unwrap(), vec![0; 512]].concat();
        let read = decode::<T>(&unknown);
        assert!(matches!(read, Err(DecodeError::Unreadable(_))), "{name}: variant {number} is {read:?}");
    }
}

// The values of the page, in the order of its program.

/// `start`, `start + 1`, and so on.
fn run_of<const N: usize>(start: u8) -> [u8; N] {
    std::array::from_fn(|at| start.wrapping_add(u8::try_from(at).unwrap()))
}

fn worker_key() -> SigningKey {
    SigningKey::from_bytes(&run_of(0xa0))
}

fn coordinator_key() -> SigningKey {
    SigningKey::from_bytes(&run_of(0xc0))
}

fn public(key: &SigningKey) -> [u8; 32] {
    key.verifying_key().to_bytes()
}

fn task() -> TaskId {
    TaskId::new(1, 7)
}

fn payload_hash() -> Hash {
    Hash(run_of(0x30))
}

fn author() -> WorkerId {
    WorkerId(key_id(&public(&worker_key())))
}

fn classification() -> Evaluation {
    let positives = Histogram(vec![(3, 2), (1023, 18)]);
    let scores = vec![ClassScores { positives, negatives: Histogram(vec![(0, 20)]) }];
    Evaluation::Classification { loss_sum: 12.5, count: 40, correct: 35, scores }
}

fn manifest() -> Manifest {
    Manifest {
        run: RunId(run_of(0x10)),
        worker: author(),
        task: task(),
        kind: TaskKind::Update,
        base: Hash(run_of(0x50)),
        layout: Hash(run_of(0x70)),
        groups: 1,
        encoding: Encoding::F32,
        bytes: 4000,
        hash: payload_hash(),
        examples: 160,
        steps: 5,
        weight: 160,
        metrics: Metrics { train_loss: Some(0.5), seconds: 1.25, evaluation: Some(classification()) },
    }
}

fn receipt() -> Receipt {
    Receipt {
        run: RunId(run_of(0x10)),
        worker: author(),
        task: task(),
        hash: payload_hash(),
        round: 3,
        model_hash: Hash(run_of(0x90)),
    }
}

fn signed(bytes: Vec<u8>, context: &'static [u8], key: &SigningKey) -> Signed {
    let signature = sign(context, key, &bytes).to_vec();
    Signed { bytes, signature }
}

fn signed_manifest() -> Signed {
    signed(encode(&manifest()), MANIFEST_CONTEXT, &worker_key())
}

fn signed_receipt() -> Signed {
    signed(encode(&receipt()), RECEIPT_CONTEXT, &coordinator_key())
}

fn learning() -> LearningPlan {
    LearningPlan {
        data: DataSpec {
            label: Some("late".into()),
            task: Some(LearningTask::Classification),
            drop: vec!["tailnum".into()],
            categorical: vec!["dest".into()],
            validation_fraction: 0.2,
        },
        model: ModelSpec::Mlp { hidden: vec![64, 32] },
        train: TrainSpec {
            mode: Mode::Federated,
            rounds: 30,
            local_epochs: 1,
            batch_size: BatchSize::Rows(32),
            learning_rate: 0.05,
            momentum: 0.0,
            seed: 7,
        },
        strategy: Strategy::FedAvg,
    }
}

fn welcome() -> Box<Welcome> {
    Box::new(Welcome {
        version: PROTOCOL_VERSION,
        run: RunId(run_of(0x10)),
        ed25519: public(&coordinator_key()),
        name: "shard-2".parse().unwrap(),
        weight_max: 1 << 20,
        norm_max: 256.0,
        learning: learning(),
    })
}

fn content(id: u8, hash: u8, bytes: u64) -> Option<ContentRef> {
    Some(ContentRef { id: ContentId(run_of(id)), key: ContentKey(run_of(0x77)), hash: Hash(run_of(hash)), bytes })
}

fn assigned() -> Box<Assigned> {
    Box::new(Assigned {
        task: task(),
        round: 3,
        kind: TaskKind::Update,
        schema: content(0x20, 0x88, 512),
        model: content(0x66, 0x50, 4000),
        layout: Hash(run_of(0x70)),
        weight_shift: 0,
    })
}

fn hello() -> Hello {
    Hello { versions: vec![PROTOCOL_VERSION], role: Role::Worker, mode: SessionMode::Direct }
}

fn hello_refused() -> HelloRefused {
    HelloRefused { speaks: vec![PROTOCOL_VERSION], sentence: "speak version 1".into() }
}

fn join() -> FromWorker {
    FromWorker::Join { instance: Instance(1_234_567_890) }
}

fn upload() -> Upload {
    Upload { task: task(), hash: payload_hash(), from: 65_536 }
}

/// Every check of a message, on one page: what it leaves unseen belongs to the worked connection.
fn check_messages() -> Check {
    let mut check = Check { page: Page::read(), seen: BTreeSet::new() };
    check_outside_the_session(&mut check);
    check_statements(&mut check);
    check_from_worker(&mut check);
    check_to_worker(&mut check);
    check_enums_of_the_plan(&mut check);
    check.example("Upload", &upload());
    check.example("Download", &Download { id: ContentId(run_of(0x66)) });
    check
}

fn check_outside_the_session(check: &mut Check) {
    check.example("Hello", &hello());
    check.each("Role", &variants!(Role { Worker, Join }));
    check.each("SessionMode", &variants!(SessionMode { Direct }));
    check.example("HelloRefused", &hello_refused());
    let name = "shard".parse().unwrap();
    check.example("EnrolRequest", &EnrolRequest { token: run_of(0xe0), name, ed25519: public(&worker_key()) });
    let certificate = vec![0x30, 0x82, 0x01, 0x0a];
    let answers = variants!(EnrolAnswer {
        Granted { name: "shard-2".parse().unwrap(), certificate, expires_unix_s: 1_800_000_000 },
        Refused(EnrolRefusal::Expired),
    });
    check.message("EnrolAnswer", &answers);
    let refusals = variants!(EnrolRefusal { Unknown, Expired, Spent, LoopbackOnly, Revoked, Full, BadKey });
    check.each("EnrolRefusal", &refusals);
}

fn check_statements(check: &mut Check) {
    check.example("Signed", &signed_receipt());
    check.example("Manifest", &manifest());
    check.example("Receipt", &receipt());
    check.each("TaskKind", &variants!(TaskKind { Update, Gradient, Rows, Survey, Evaluation, Partial }));
    check.each("Encoding", &variants!(Encoding { F32, Ring64 }));
    let Evaluation::Classification { loss_sum, count, correct, scores } = classification() else { unreachable!() };
    let (squared_error, target_sum, target_squares) = (90.0, -8.0, 256.0);
    let evaluations = variants!(Evaluation {
        Classification { loss_sum, count, correct, scores },
        Regression { loss_sum, count, squared_error, target_sum, target_squares },
    });
    check.each("Evaluation", &evaluations);
}

fn check_from_worker(check: &mut Check) {
    let messages = variants!(FromWorker {
        Join { instance: Instance(1_234_567_890) },
        Ready,
        Offer(signed_manifest()),
        Failed { task: task(), failure: Failure::NormTooLong { got: 300.0, max: 256.0 } },
        Beat { task: task(), steps: 1000 },
        Leaving(Leave::NotAllowed("rows are not shared".into())),
    });
    check.message("FromWorker", &messages);
    check.each("Failure", &variants!(Failure { NotFinite, NormTooLong { got: 300.0, max: 256.0 } }));
    let leaves = variants!(Leave { Stopping, NotAllowed("no".into()), DataUnfit("empty".into()) });
    check.each("Leave", &leaves);
}

fn check_to_worker(check: &mut Check) {
    let (task, hash) = (task(), payload_hash());
    let messages = variants!(ToWorker {
        Welcome(welcome()),
        Assigned(assigned()),
        Go { task, hash, from: 65_536 },
        Held { task, hash },
        AlreadyHeld { task, hash },
        Late { task },
        Refused { task, refusal: Refusal::WrongLength { got: 4000, expected: 4100 } },
        Receipt(signed_receipt()),
        Displaced,
        Rejected { sentence: "column \"dest\" is missing: add it".into() },
        GoingAway,
        Finished { model_hash: Hash(run_of(0x90)) },
        Aborted,
    });
    check.message("ToWorker", &messages);
    let refusals = variants!(Refusal {
        WrongRun,
        WrongWorker,
        WrongSignature,
        WrongKind,
        WrongBase,
        WrongLayout,
        WrongLength { got: 4000, expected: 4100 },
        WrongHash,
        WrongEncoding,
        NotFinite,
        NormTooLong { got: 300.0, max: 256.0 },
        WrongWeight { got: 0, max: 160 },
        TooMany,
        WrongMetrics,
        Unreadable,
    });
    check.each("Refusal", &refusals);
}

fn check_enums_of_the_plan(check: &mut Check) {
    check.each("LearningTask", &variants!(LearningTask { Classification, Regression }));
    check.each("ModelSpec", &variants!(ModelSpec { Linear, Mlp { hidden: vec![64] } }));
    check.each("Mode", &variants!(Mode { Federated, Gradient, Central }));
    check.each("BatchSize", &variants!(BatchSize { Rows(32), Full }));
    check.each("Strategy", &variants!(Strategy { FedAvg }));
}

/// The blocks of the page that `the_worked_connection_is_what_the_code_says` holds.
const CONNECTION: [&str; 11] = [
    "hello frame",
    "refused frame",
    "prologue",
    "first handshake frame",
    "second handshake frame",
    "handshake hash",
    "control record",
    "answer record",
    "stream frame",
    "payload record",
    "broadcast record",
];

#[test]
fn every_message_and_every_variant_has_its_example_and_no_example_is_left_over() {
    let mut check = check_messages();
    check.seen.extend(CONNECTION.map(|name| format!("hex {name}")));
    let there: BTreeSet<_> = check.page.0.into_keys().collect();
    assert_eq!(there, check.seen);
}

#[test]
fn the_signatures_of_the_page_verify_and_none_is_good_for_another_purpose() {
    let page = Page::read();
    let Signed { bytes, signature } = decode(&page.hex("Signed")).unwrap();
    let (signature, coordinator) = (signature.try_into().unwrap(), public(&coordinator_key()));
    assert_eq!(decode(&bytes), Ok(receipt()));
    assert_eq!(verify(RECEIPT_CONTEXT, &coordinator, &bytes, &signature), Ok(()));
    assert!(verify(MANIFEST_CONTEXT, &coordinator, &bytes, &signature).is_err());
    let FromWorker::Offer(Signed { bytes, signature }) = decode(&page.hex("FromWorker::Offer")).unwrap() else {
        panic!("not an offer")
    };
    let signature = signature.try_into().unwrap();
    assert_eq!(verify(MANIFEST_CONTEXT, &public(&worker_key()), &bytes, &signature), Ok(()));
    assert!(verify(MANIFEST_CONTEXT, &coordinator, &bytes, &signature).is_err());
}

#[test]
fn the_longest_offer_fits_into_a_control_message() {
    let bins = |count| Histogram((0..limits::HISTOGRAM_BINS).map(|bin| (bin, count)).collect());
    let scores = ClassScores { positives: bins(u32::MAX), negatives: bins(u32::MAX) };
    let scores = vec![scores; limits::HISTOGRAM_CLASSES_MAX];
    let evaluation = Evaluation::Classification { loss_sum: 0.0, count: u64::MAX, correct: u64::MAX, scores };
    let metrics = Metrics { evaluation: Some(evaluation), ..manifest().metrics };
    let bytes = encode(&Manifest { metrics, ..manifest() });
    let offer = FromWorker::Offer(signed(bytes, MANIFEST_CONTEXT, &worker_key()));
    assert!(encode(&offer).len() <= limits::CONTROL_MESSAGE_BYTES_MAX);
}

/// A frame as the page describes it; the transport, which reads them, has its own tests.
fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_le_bytes();
    [&[kind], &length[..], body].concat()
}

struct Worked {
    prologue: Vec<u8>,
    first: Vec<u8>,
    second: Vec<u8>,
    hash: [u8; 32],
    worker: (Session, Sealer, Opener),
    coordinator: (Session, Sealer, Opener),
}

/// The handshake with the page's keys.
fn worked() -> Worked {
    let [worker, coordinator] = [0x01, 0x21].map(|start| StaticKey::from(StaticSecret::from(run_of(start))));
    let [worker_once, coordinator_once] = [0x41, 0x61].map(|start| StaticSecret::from(run_of(start)));
    let said = prologue(&frame(1, &encode(&hello())), &run_of(0x81));
    let pinned = Acquaintance::new(&worker, coordinator.public()).unwrap();
    let (initiator, first) = Initiator::start(&said, &worker, worker_once, &pinned, b"").unwrap();
    let (responder, payload) = Responder::read(&said, &coordinator, None, &first).unwrap();
    assert!(payload.is_empty());
    assert_eq!(responder.remote_static(), worker.public());
    let (second, there) = responder.reply(coordinator_once, b"").unwrap();
    let (_, here) = initiator.finish(&second).unwrap();
    assert_eq!(here.handshake_hash(), there.handshake_hash());
    let hash = *here.handshake_hash();
    let (worker, coordinator) = (Session::begin(here), Session::begin(there));
    Worked { prologue: said, first, second, hash, worker, coordinator }
}

#[test]
fn the_worked_connection_is_what_the_code_says() {
    let page = Page::read();
    let Worked { prologue, first, second, hash, mut worker, mut coordinator } = worked();
    assert_eq!(page.hex("hello frame"), frame(1, &encode(&hello())));
    assert_eq!(page.hex("refused frame"), frame(2, &encode(&hello_refused())));
    assert_eq!(page.hex("prologue"), prologue);
    assert_eq!(page.hex("first handshake frame"), frame(3, &first));
    assert_eq!(page.hex("second handshake frame"), frame(3, &second));
    assert_eq!(page.hex("handshake hash"), hash);
    assert_eq!(page.hex("control record"), message(&mut worker.1, &join()));
    assert_eq!(page.hex("answer record"), message(&mut coordinator.1, &ToWorker::GoingAway));
    let (number, mut sealer) = worker.0.open_stream().unwrap();
    assert_eq!(page.hex("stream frame"), frame(4, &number.to_le_bytes()));
    assert_eq!(page.hex("payload record"), message(&mut sealer, &upload()));
    let mut broadcast = Vec::new();
    BroadcastSealer::new(ContentId(run_of(0x66)), &ContentKey(run_of(0x77)))
        .seal(Flag::Final, b"model", &mut broadcast)
        .unwrap();
    assert_eq!(page.hex("broadcast record"), broadcast);
}

#[test]
fn the_records_of_the_page_open() {
    let page = Page::read();
    let Worked { mut worker, mut coordinator, .. } = worked();
    assert_eq!(open(&mut coordinator.2, &page.hex("control record")), encode(&join()));
    assert_eq!(open(&mut worker.2, &page.hex("answer record")), encode(&ToWorker::GoingAway));
    let mut stream = coordinator.0.accept_stream(1).unwrap();
    assert_eq!(open(&mut stream, &page.hex("payload record")), encode(&upload()));
    let mut broadcast = BroadcastOpener::new(ContentId(run_of(0x66)), &ContentKey(run_of(0x77)));
    let mut record = page.hex("broadcast record");
    let (header, body) = record.split_first_chunk_mut().unwrap();
    assert_eq!(broadcast.open_in_place(header, body).unwrap().plaintext, b"model");
    assert!(broadcast.is_finished());
}

fn message<T: Serialize>(sealer: &mut Sealer, message: &T) -> Vec<u8> {
    let mut out = Vec::new();
    sealer.seal_message(&encode(message), &mut out).unwrap();
    out
}

fn open(opener: &mut Opener, record: &[u8]) -> Vec<u8> {
    let (header, body) = record.split_first_chunk::<RECORD_HEADER_BYTES>().unwrap();
    opener.open_in_place(header, &mut body.to_vec()).unwrap().plaintext.to_vec()
}

#[test]
fn the_limits_of_the_page_are_those_of_the_code() {
    let limits = [
        ("CONTROL_MESSAGE_BYTES_MAX", limits::CONTROL_MESSAGE_BYTES_MAX as u64),
        ("RECORD_BYTES_MAX", limits::RECORD_BYTES_MAX as u64),
        ("PAYLOAD_AT_ONCE_BYTES_MAX", limits::PAYLOAD_AT_ONCE_BYTES_MAX),
        ("MODEL_BYTES_MAX", limits::MODEL_BYTES_MAX),
        ("SURVEY_BYTES_MAX", limits::SURVEY_BYTES_MAX),
        ("SCHEMA_BYTES_MAX", limits::SCHEMA_BYTES_MAX),
        ("ROWS_BYTES_MAX", limits::ROWS_BYTES_MAX),
        ("UPDATES_MAX", u64::from(limits::UPDATES_MAX)),
        ("SENTENCE_LEN_MAX", limits::SENTENCE_LEN_MAX as u64),
        ("HELLO_VERSIONS_MAX", limits::HELLO_VERSIONS_MAX as u64),
        ("WORKER_NAME_LEN_MAX", WORKER_NAME_LEN_MAX as u64),
        ("STREAM_WINDOW", u64::from(STREAM_WINDOW)),
        ("STREAM_RECORDS_MAX", STREAM_RECORDS_MAX),
    ];
    let rows: Vec<_> = PAGE.lines().filter_map(limit_row).collect();
    assert_eq!(rows, limits);
}

/// A line such as ``| `UPDATES_MAX` | 2,048 |``.
fn limit_row(line: &str) -> Option<(&str, u64)> {
    let (name, value) = line.strip_prefix("| `")?.split_once("` | ")?;
    Some((name, value.strip_suffix(" |")?.replace(',', "").parse().ok()?))
}

#[test]
fn the_page_is_of_the_version_that_is_spoken() {
    assert!(PAGE.contains(&format!(". Version {PROTOCOL_VERSION}.\n")));
}

proptest! {
    #[test]
    fn no_bytes_make_decoding_panic(number in 0u8..16, rest in prop::collection::vec(any::<u8>(), 0..300)) {
        let bytes = [&[number], &rest[..]].concat();
        // Whether they happen to be a message makes no difference here.
        let _ = (decode::<FromWorker>(&bytes), decode::<ToWorker>(&bytes), decode::<EnrolAnswer>(&bytes));
        let _ = (decode::<Manifest>(&rest), decode::<Hello>(&rest), decode::<EnrolRequest>(&rest));
    }
}
