//! Nobody on the wire reads a byte: canaries in data, model, names and keys are in no UDP payload of a whole run.
//!
//! Coordinator and workers run in this process with taps on their sockets: every datagram of the run is searched, from
//! the first byte of the first enrolment, in both directions. The same search over what the workers seal, as it was
//! before, and over what TLS carries, as it was before, finds every canary: so the search itself is proved.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use certs::{IdentityKey, keys};
use coordinator::cli::RunSettings;
use coordinator::config::{Config, Overrides};
use protocol::messages::{TaskKind, ToWorker, decode};
use tempfile::TempDir;
use tokio::sync::oneshot;
use transport::{Tap, Taps};
use worker::state::StatePlace;

/// Category names that at least five rows have, at both workers.
const ANIMALS: [&str; 3] = ["quagga-of-zanzibar", "thylacine-of-hobart", "huia-of-wellington"];

/// One that four rows have: it does not even leave the worker.
const RARE: &str = "dodo-of-mauritius";

/// The classes of the label.
const CLASSES: [&str; 2] = ["class-of-grebes", "class-of-storks"];

/// A number that a whole column has at one worker: the column's mean there, exactly.
const PECULIAR: [f64; 2] = [98_765.432_1, -0.001_234_567_8];

const NAMES: [&str; 2] = ["albatross-hospital", "cormorant-hospital"];

/// No shorter run of bytes is looked for: shorter ones are found by chance.
const NEEDLE_BYTES_MIN: usize = 8;

const SAMPLE_BYTES: usize = 16;

/// 120 rows of one worker.
fn rows(shard: usize) -> String {
    let mut text = "wingspan_of_egrets,peculiar_column,animal,verdict\n".to_owned();
    for row in 0..120 {
        let animal = if row < 4 { RARE } else { ANIMALS[row % 3] };
        let x = (f64::from(u32::try_from(row * 37 % 120).unwrap()) - 60.0) / 30.0 + PECULIAR[shard] / 1e6;
        let class = CLASSES[usize::from(x > 0.0)];
        let _ = writeln!(text, "{x},{},{animal},{class}", PECULIAR[shard]);
    }
    text
}

/// Pieces of bytes as they passed.
#[derive(Clone, Debug, Default)]
struct Capture(Arc<Mutex<Vec<Vec<u8>>>>);

impl Capture {
    fn tap(&self) -> Tap {
        let kept = self.clone();
        Tap::new(move |_, bytes: &[u8]| kept.keep(bytes))
    }

    fn keep(&self, bytes: &[u8]) {
        self.0.lock().unwrap().push(bytes.to_vec());
    }

    fn pieces(&self) -> Vec<Vec<u8>> {
        self.0.lock().unwrap().clone()
    }
}

type Payloads = Arc<Mutex<Vec<(TaskKind, Vec<u8>)>>>;

/// What passed in a whole run.
struct Seen {
    home: TempDir,
    token: [u8; 16],
    /// Every UDP payload, at every socket.
    datagrams: Capture,
    /// What TLS carries.
    streams: Capture,
    /// What the session seals.
    plain: Capture,
    /// The payloads that workers offered.
    payloads: Payloads,
}

/// A whole run of two workers in this mode.
fn run(mode: &str) -> Seen {
    let seen = Seen {
        home: TempDir::new().unwrap(),
        token: [0; 16],
        datagrams: Capture::default(),
        streams: Capture::default(),
        plain: Capture::default(),
        payloads: Arc::default(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        let bounded = tokio::time::timeout(tributary_tests::home::PATIENCE, seen.fill(mode)).await;
        bounded.expect("a run of two rounds ends")
    })
}

impl Seen {
    fn taps(&self) -> Taps {
        Taps { datagrams: Some(self.datagrams.tap()), streams: Some(self.streams.tap()) }
    }

    async fn fill(mut self, mode: &str) -> Self {
        let text = format!(
            "[model]\nkind = \"linear\"\n[train]\nmode = \"{mode}\"\nrounds = 2\n[rounds]\nmin_workers = 2\n[data]\nlabel = \"verdict\""
        );
        let any = "127.0.0.1:0".parse().unwrap();
        let settings = RunSettings {
            config: Config::parse("canary.toml", &text, |_| None, Overrides::default()).unwrap(),
            listen: any,
            http: any,
            state: self.home.path().join("coordinator"),
            exit_when_done: true,
            new_run: false,
            json: false,
        };
        let (listening, bound) = oneshot::channel();
        let (taps, listening) = (self.taps(), Some(listening));
        let options = coordinator::Options { taps, listening, ..coordinator::Options::quiet(settings) };
        let workers = async {
            let bound = bound.await.unwrap();
            let run = |name| tokio::spawn(worker::run(self.worker(name, &bound.invitation), std::future::pending()));
            for worker in NAMES.map(run) {
                worker.await.unwrap().unwrap();
            }
            bound.invitation.token
        };
        let (ended, token) = tokio::join!(coordinator::run(options, std::future::pending()), workers);
        ended.unwrap();
        self.token = token;
        self
    }

    fn worker(&self, name: &str, invitation: &protocol::invitation::Invitation) -> worker::Options {
        let shard = NAMES.iter().position(|known| *known == name).unwrap();
        let data = self.home.path().join(format!("{name}.csv"));
        std::fs::write(&data, rows(shard)).unwrap();
        let state = StatePlace::Here(self.home.path().join(name));
        let mut options = worker::Options::new(data, state, self.home.path().join("nowhere"));
        options.join = Some(invitation.clone());
        options.share_rows = true;
        options.hooks.taps = self.taps();
        let plain = self.plain.clone();
        options.hooks.on_plain = Some(Arc::new(move |bytes| plain.keep(bytes)));
        let payloads = Arc::clone(&self.payloads);
        options.hooks.on_offer =
            Some(Arc::new(move |manifest, payload| payloads.lock().unwrap().push((manifest.kind, payload.clone()))));
        options
    }

    fn file(&self, path: impl AsRef<Path>) -> Vec<u8> {
        std::fs::read(self.home.path().join(path)).unwrap()
    }

    /// Everything that nobody may find, and that passed: by its name, in each form in which it could have.
    fn canaries(&self, mode: &str) -> BTreeMap<String, Vec<Vec<u8>>> {
        let mut canaries = BTreeMap::new();
        let texts = ANIMALS.iter().chain(&CLASSES).chain(&NAMES).chain(&["wingspan_of_egrets", "peculiar_column"]);
        for text in texts {
            canaries.insert((*text).to_owned(), vec![text.as_bytes().to_vec()]);
        }
        for number in PECULIAR {
            #[allow(clippy::cast_possible_truncation)] // the form that an f32 column would have
            let twice = [(number as f32).to_le_bytes(); 2].concat();
            let forms = vec![number.to_le_bytes().to_vec(), number.to_string().into_bytes(), twice];
            canaries.insert(format!("the number {number}"), forms);
        }
        canaries.insert("the token".to_owned(), vec![self.token.to_vec()]);
        for name in NAMES {
            let key: IdentityKey = keys::load(&self.home.path().join(name).join("identity.key")).unwrap();
            canaries.insert(format!("the key of {name}"), vec![key.public().to_vec()]);
        }
        for (place, key) in self.content_keys().into_iter().enumerate() {
            canaries.insert(format!("content key {place}"), vec![key.to_vec()]);
        }
        let model = self.file("coordinator/model/model.safetensors");
        let header = usize::try_from(u64::from_le_bytes(*model.first_chunk().unwrap())).unwrap();
        for (place, run) in samples(&model[8 + header..]).into_iter().enumerate() {
            canaries.insert(format!("run {place} of the final model"), vec![run]);
        }
        let expected = [("federated", TaskKind::Update), ("gradient", TaskKind::Gradient), ("central", TaskKind::Rows)];
        let (_, kind) = expected.into_iter().find(|(name, _)| *name == mode).unwrap();
        let payloads = self.payloads.lock().unwrap();
        let payloads: Vec<_> = payloads.iter().filter(|(of, _)| *of == kind).collect();
        assert!(!payloads.is_empty(), "{mode}: no {kind:?} was offered");
        for (place, run) in payloads.iter().flat_map(|(_, payload)| samples(payload)).enumerate() {
            canaries.insert(format!("run {place} of a payload"), vec![run]);
        }
        canaries
    }

    /// The keys of all contents, as the workers were told them.
    fn content_keys(&self) -> BTreeSet<[u8; 32]> {
        let told = self.plain.pieces().into_iter().filter_map(|piece| match decode::<ToWorker>(&piece) {
            Ok(ToWorker::Assigned(assigned)) => Some([assigned.schema.clone(), assigned.model.clone()]),
            _ => None,
        });
        told.flatten().flatten().map(|content| content.key.0).collect()
    }

    /// What TLS hides though the session does not: Hello, stream numbers, record headers, and the sealed bytes.
    fn carried(&self) -> BTreeMap<String, Vec<Vec<u8>>> {
        let pieces = self.streams.pieces();
        let sampled = pieces.iter().enumerate().flat_map(|(place, piece)| {
            let runs = if piece.len() <= SAMPLE_BYTES { vec![piece.clone()] } else { samples(piece) };
            runs.into_iter().enumerate().map(move |(run, bytes)| (format!("run {run} of piece {place}"), vec![bytes]))
        });
        sampled.collect()
    }
}

/// Peculiar runs of bytes in a block of numbers: from its beginning, its middle and its end.
fn samples(block: &[u8]) -> Vec<Vec<u8>> {
    let runs: BTreeSet<Vec<u8>> = [0, block.len() / 8 * 4, block.len().saturating_sub(SAMPLE_BYTES)]
        .into_iter()
        .filter_map(|from| Some(block.get(from..from + SAMPLE_BYTES)?.to_vec()))
        .collect();
    // A run of few different bytes, such as zeros, is no canary.
    runs.into_iter().filter(|run| run.iter().collect::<BTreeSet<_>>().len() >= SAMPLE_BYTES / 2).collect()
}

/// Which of these forms are in which pieces: the names of what was found.
fn found(canaries: &BTreeMap<String, Vec<Vec<u8>>>, pieces: &[Vec<u8>]) -> BTreeSet<String> {
    let mut by_start: BTreeMap<[u8; NEEDLE_BYTES_MIN], Vec<(&String, &Vec<u8>)>> = BTreeMap::new();
    for (name, form) in canaries.iter().flat_map(|(name, forms)| forms.iter().map(move |form| (name, form))) {
        let start = form.first_chunk().unwrap_or_else(|| panic!("{name}: {form:?} is too short to be looked for"));
        by_start.entry(*start).or_default().push((name, form));
    }
    let mut names = BTreeSet::new();
    for piece in pieces {
        for (at, window) in piece.windows(NEEDLE_BYTES_MIN).enumerate() {
            let Some(candidates) = by_start.get(window) else { continue };
            let here = candidates.iter().filter(|(_, form)| piece[at..].starts_with(form));
            names.extend(here.map(|(name, _)| (*name).clone()));
        }
    }
    names
}

fn assert_nothing_is_seen_on_the_wire(mode: &str) {
    let seen = run(mode);
    let (canaries, datagrams) = (seen.canaries(mode), seen.datagrams.pieces());
    let plain = seen.plain.pieces();
    let all: BTreeSet<_> = canaries.keys().cloned().collect();
    assert_eq!(found(&canaries, &plain), all, "{mode}: with sealing off, everything is found");
    assert_eq!(found(&canaries, &datagrams), BTreeSet::new(), "{mode}: on the wire, nothing is");
    assert_eq!(found(&canaries, &seen.streams.pieces()), BTreeSet::new(), "{mode}: to who terminates TLS, nothing is");

    let carried = seen.carried();
    assert_eq!(found(&carried, &seen.streams.pieces()), carried.keys().cloned().collect(), "{mode}: with TLS off");
    assert_eq!(found(&carried, &datagrams), BTreeSet::new(), "{mode}: TLS hides what it carries");

    let rare = BTreeMap::from([(RARE.to_owned(), vec![RARE.as_bytes().to_vec()])]);
    assert_eq!(found(&rare, &plain), BTreeSet::new(), "{mode}: what few rows have is not even told to the coordinator");
    // Nothing passed beside the taps: both ends saw each datagram, and all that TLS carries is in them.
    let bytes = |pieces: &[Vec<u8>]| pieces.iter().map(Vec::len).sum::<usize>();
    assert!(bytes(&datagrams) > bytes(&seen.streams.pieces()), "{mode}");
    assert!(datagrams.iter().filter(|datagram| datagram.len() >= 1200).count() >= 4 * NAMES.len(), "{mode}");
}

#[test]
fn nobody_on_the_wire_reads_a_byte_of_a_federated_run() {
    assert_nothing_is_seen_on_the_wire("federated");
}

#[test]
fn nobody_on_the_wire_reads_a_byte_of_a_gradient_run() {
    assert_nothing_is_seen_on_the_wire("gradient");
}

#[test]
fn nobody_on_the_wire_reads_a_byte_of_a_central_run() {
    assert_nothing_is_seen_on_the_wire("central");
}
