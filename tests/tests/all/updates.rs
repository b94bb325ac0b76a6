//! Updates that are not what they should be: each gets a typed answer, is counted and told, and leaves no trace in the
//! model; and what was signed can be verified offline, bit by bit.
//!
//! The cheat is a real worker whose hooks change what it offers: the manifest, the payload, the signature.

use std::sync::{Arc, Mutex};

use certs::{IdentityKey, keys};
use data_encoding::HEXLOWER;
use protocol::ids::{Hash, RunId, TaskId, WorkerId};
use protocol::layout::to_bytes;
use protocol::limits::{EXAMPLES_MAX, ROWS_BYTES_MAX, SURVEY_BYTES_MAX};
use protocol::messages::{Encoding, Manifest, Refusal, Signed, TaskKind, encode};
use protocol::session::sign::{MANIFEST_CONTEXT, PublicKey, RECEIPT_CONTEXT, verify};
use protocol::sum::Ring;
use tributary_tests::data;
use tributary_tests::live::{LiveFleet, MEMBERS, ROWS, paced};
use worker::report::Line;
use worker::{OnOffer, Options, WorkerError, receipts};

/// One way to cheat, what the worker is told of it (from the honest length and the changed manifest), and how it is
/// counted.
struct Cheat {
    change: fn(&mut Manifest, &mut Vec<u8>),
    told: fn(u64, &Manifest) -> Refusal,
    counted: &'static str,
}

const fn cheat(
    counted: &'static str,
    change: fn(&mut Manifest, &mut Vec<u8>),
    told: fn(u64, &Manifest) -> Refusal,
) -> Cheat {
    Cheat { change, told, counted }
}

const WEIGHT_MAX: u32 = Ring::weighted().weight_max;

/// Every way to cheat that a manifest or a payload has.
const CHEATS: [Cheat; 23] = [
    cheat("wrong_run", |m, _| m.run = RunId([9; 16]), |_, _| Refusal::WrongRun),
    cheat("wrong_worker", |m, _| m.worker = WorkerId([9; 16]), |_, _| Refusal::WrongWorker),
    // Tasks are given in the order of names: the one before is cleo's.
    cheat("wrong_worker", |m, _| m.task = TaskId(m.task.0 - 1), |_, _| Refusal::WrongWorker),
    cheat("wrong_kind", |m, _| m.kind = TaskKind::Gradient, |_, _| Refusal::WrongKind),
    cheat("wrong_kind", |m, _| m.kind = TaskKind::Evaluation, |_, _| Refusal::WrongKind),
    cheat("wrong_base", |m, _| m.base = Hash([9; 32]), |_, _| Refusal::WrongBase),
    cheat("wrong_layout", |m, _| m.layout = Hash([9; 32]), |_, _| Refusal::WrongLayout),
    cheat("wrong_encoding", |m, _| m.encoding = Encoding::Ring64, |_, _| Refusal::WrongEncoding),
    cheat("wrong_encoding", |m, _| m.groups = 2, |_, _| Refusal::WrongEncoding),
    cheat("wrong_length", |m, _| m.bytes += 4, |honest, m| length(m.bytes, honest)),
    cheat("wrong_length", |m, _| m.bytes = u64::MAX, |honest, m| length(m.bytes, honest)),
    cheat("wrong_length", |m, _| m.bytes = 0, |honest, m| length(m.bytes, honest)),
    cheat("wrong_length", |_, p| p.truncate(p.len() - 4), |honest, _| length(honest - 4, honest)),
    cheat("wrong_hash", |m, _| m.hash.0[31] ^= 1, |_, _| Refusal::WrongHash),
    cheat("wrong_hash", |_, p| p[0] ^= 1, |_, _| Refusal::WrongHash),
    cheat("not_finite", |m, p| fill(m, p, f32::NAN), |_, _| Refusal::NotFinite),
    cheat("not_finite", |m, p| fill(m, p, f32::NEG_INFINITY), |_, _| Refusal::NotFinite),
    cheat("norm_too_long", |m, p| fill(m, p, 1e3), |honest, _| too_long(honest)),
    cheat("wrong_weight", |m, _| m.weight = 0, |_, m| weight(m)),
    cheat("wrong_weight", |m, _| m.weight = WEIGHT_MAX + 1, |_, m| weight(m)),
    cheat("wrong_metrics", |m, _| m.metrics.train_loss = Some(f64::NAN), |_, _| Refusal::WrongMetrics),
    cheat("wrong_metrics", |m, _| m.examples = EXAMPLES_MAX + 1, |_, _| Refusal::WrongMetrics),
    // The last: what is said again and again when the list is over.
    cheat("wrong_signature", |_, _| (), |_, _| Refusal::WrongSignature),
];

fn length(got: u64, expected: u64) -> Refusal {
    Refusal::WrongLength { got, expected }
}

fn weight(manifest: &Manifest) -> Refusal {
    Refusal::WrongWeight { got: manifest.weight, max: WEIGHT_MAX }
}

/// The same number everywhere, declared as it is.
fn fill(manifest: &mut Manifest, payload: &mut Vec<u8>, number: f32) {
    *payload = to_bytes(&vec![number; payload.len() / 4]);
    manifest.hash = Hash::of(payload);
}

#[allow(clippy::cast_precision_loss)] // some dozen numbers
fn too_long(bytes: u64) -> Refusal {
    Refusal::NormTooLong { got: ((bytes / 4) as f64 * 1e6).sqrt(), max: Ring::weighted().norm_max }
}

/// What was offered: the honest payload's length, and the manifest as it went out.
type Offered = Arc<Mutex<Vec<(u64, Manifest)>>>;

/// One cheat after another, in every update.
fn cheating(options: &mut Options, offered: &Offered) {
    let kept = Arc::clone(offered);
    options.hooks.on_offer = Some(Arc::new(move |manifest, payload| {
        let mut kept = kept.lock().unwrap();
        let honest = payload.len() as u64;
        (CHEATS[kept.len().min(CHEATS.len() - 1)].change)(manifest, payload);
        kept.push((honest, manifest.clone()));
    }));
    let kept = Arc::clone(offered);
    options.hooks.on_signature = Some(Arc::new(move |signature| {
        if kept.lock().unwrap().len() >= CHEATS.len() {
            signature[63] ^= 0x10;
        }
    }));
}

fn refusals(lines: &[Line]) -> Vec<&str> {
    let told = |line: &'_ Line| matches!(line, Line::Refused { .. });
    let told = lines.iter().filter(|line| told(line));
    told.filter_map(|line| if let Line::Refused { reason, .. } = line { Some(reason.as_str()) } else { None }).collect()
}

#[test]
fn every_cheat_is_refused_counted_and_told_and_is_not_in_the_model() {
    let mut fleet = LiveFleet::in_a_run();
    let offered = Offered::default();
    fleet.add("dora", &data::classes(9, ROWS), |options| cheating(options, &offered));
    let lines = fleet.until_lines("dora", |lines| refusals(lines).len() >= CHEATS.len());
    let offered = offered.lock().unwrap().clone();
    for ((cheat, (honest, manifest)), told) in CHEATS.iter().zip(&offered).zip(refusals(&lines)) {
        let expected = (cheat.told)(*honest, manifest);
        assert_eq!(told, expected.to_string(), "{}", cheat.counted);
        fleet.coordinator.until_stderr(&format!("refused task {} of dora: {expected}", manifest.task));
    }
    for Cheat { counted, .. } in &CHEATS {
        let at_least = CHEATS.iter().filter(|cheat| cheat.counted == *counted).count();
        let series = format!("tributary_updates_refused_total{{reason=\"{counted}\"}}");
        assert!(fleet.metric(&series) >= f64::from(u32::try_from(at_least).unwrap()), "{series}");
    }
    fleet.assert_unharmed();
}

#[test]
fn a_worker_that_sends_more_than_it_declares_is_thrown_out_and_ends() {
    let mut fleet = LiveFleet::in_a_run();
    fleet.add("dora", &data::classes(9, ROWS), |options| {
        options.hooks.on_offer = Some(Arc::new(|_, payload| payload.extend([0; 4])));
    });
    let ended = fleet.end_of("dora");
    assert!(matches!(&ended, Err(WorkerError::Misbehaved(told)) if told.contains("declares")), "{ended:?}");
    fleet.coordinator.until_stderr("dora is gone: it was ejected: ");
    fleet.assert_unharmed();
}

/// Whose offers of one kind are changed, and whose updates are worth nothing: so that it leaves no trace at all.
fn spoiling(kind: TaskKind, change: fn(&mut Manifest, &mut Vec<u8>)) -> OnOffer {
    Arc::new(move |manifest, payload| {
        if manifest.kind == kind {
            change(manifest, payload);
        } else {
            manifest.run = RunId([9; 16]);
        }
    })
}

const FIVE: &str = r#"
[model]
kind = "linear"
[train]
rounds = 100000
[rounds]
min_workers = 5
quorum = 0.5
deadline_s = 5
"#;

#[test]
fn a_survey_that_is_too_long_or_none_is_refused_and_the_schema_is_the_others() {
    let mut fleet = LiveFleet::start(FIVE, &[]);
    for shard in 0..MEMBERS.len() {
        fleet.add_member(shard, paced());
    }
    // Were they taken in, the schema would have two more categories.
    let rows = data::classes(9, ROWS).replace("red", "violet").replace("blue", "orange");
    let too_long = spoiling(TaskKind::Survey, |manifest, _| manifest.bytes = SURVEY_BYTES_MAX + 1);
    fleet.add("dora", &rows, |options| options.hooks.on_offer = Some(too_long));
    let garbage = spoiling(TaskKind::Survey, |manifest, payload| {
        payload.iter_mut().for_each(|byte| *byte ^= 0x55);
        manifest.hash = Hash::of(payload);
    });
    fleet.add("eve", &rows, |options| options.hooks.on_offer = Some(garbage));
    let refused = |name| fleet.until_lines(name, |lines| !refusals(lines).is_empty());
    let too_long = length(SURVEY_BYTES_MAX + 1, SURVEY_BYTES_MAX);
    assert_eq!(refusals(&refused("dora"))[0], too_long.to_string());
    assert_eq!(refusals(&refused("eve"))[0], Refusal::Unreadable.to_string());
    fleet.assert_unharmed();
}

const CENTRAL: &str = r#"
[model]
kind = "linear"
[train]
mode = "central"
rounds = 3
[rounds]
min_workers = WORKERS
quorum = 0.5
deadline_s = 5
"#;

/// The last model of a central run of the members and these others, which is told with its refusals.
fn central(others: &[(&str, OnOffer)]) -> (String, Vec<String>) {
    let config = CENTRAL.replace("WORKERS", &(MEMBERS.len() + others.len()).to_string());
    let mut fleet = LiveFleet::start(&config, &[]);
    for (shard, name) in MEMBERS.into_iter().enumerate() {
        fleet.add(name, &data::classes(shard as u64 + 1, ROWS), |options| options.share_rows = true);
    }
    for (name, on_offer) in others {
        fleet.add(name, &data::classes(9, ROWS), |options| {
            options.share_rows = true;
            options.hooks.on_offer = Some(Arc::clone(on_offer));
        });
    }
    let done = fleet.coordinator.until("done");
    let told = others.iter().flat_map(|(name, _)| {
        let lines = fleet.until_lines(name, |lines| lines.iter().any(|line| matches!(line, Line::Done { .. })));
        refusals(&lines).into_iter().map(str::to_owned).collect::<Vec<_>>()
    });
    let told = told.collect();
    (done["model_hash"].as_str().unwrap().to_owned(), told)
}

#[test]
fn rows_that_are_too_many_or_none_are_refused_and_nobody_learns_from_them() {
    let too_many = spoiling(TaskKind::Rows, |manifest, _| manifest.bytes = ROWS_BYTES_MAX + 1);
    let cut = spoiling(TaskKind::Rows, |manifest, payload| {
        payload.pop();
        (manifest.hash, manifest.bytes) = (Hash::of(payload), payload.len() as u64);
    });
    let nan = spoiling(TaskKind::Rows, |manifest, payload| {
        payload[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        manifest.hash = Hash::of(payload);
    });
    let (model, told) = central(&[("dora", too_many), ("eve", cut), ("fay", nan)]);
    let (expected, _) = central(&[]);
    assert_eq!(model, expected);
    for refusal in [length(ROWS_BYTES_MAX + 1, ROWS_BYTES_MAX), Refusal::Unreadable] {
        assert!(told.contains(&refusal.to_string()), "{refusal}: {told:?}");
    }
    assert_eq!(told.iter().filter(|told| **told == Refusal::Unreadable.to_string()).count(), 2, "{told:?}");
}

// --- what stays when everybody has gone home ---

#[test]
fn receipts_verify_offline_with_the_coordinators_public_key_and_no_flipped_bit_does() {
    let mut fleet = LiveFleet::start(&tributary_tests::live::CONFIG.replace("100000", "3"), &["--exit-when-done"]);
    for shard in 0..MEMBERS.len() {
        fleet.add_member(shard, paced());
    }
    fleet.coordinator.until("done");
    for name in MEMBERS {
        fleet.end_of(name).unwrap();
    }
    let models: Vec<_> = fleet.coordinator.lines().filter(|line| line["event"] == "round").collect();
    assert_eq!(models.len(), 3);

    let coordinator: IdentityKey = keys::load(&fleet.home.state().join("signing.key")).unwrap();
    let coordinator = coordinator.public();
    for name in MEMBERS {
        let state = fleet.home.path(format!("worker-{name}"));
        let worker: IdentityKey = keys::load(&state.join("identity.key")).unwrap();
        let log = std::fs::read_dir(state.join("receipts")).unwrap().next().unwrap().unwrap().path();
        let log = std::fs::read_to_string(log).unwrap();
        assert_eq!(log.lines().count(), 3);
        for (line, round) in log.lines().zip(&models) {
            let (key, receipt) = receipts::open_line(line).unwrap();
            assert_eq!((key, receipt.worker.0), (coordinator, worker.id()));
            assert_eq!(
                (receipt.round.into(), receipt.model_hash.to_string().into()),
                (round["round"].clone(), round["model_hash"].clone())
            );
        }
        assert_no_flipped_bit_verifies(&coordinator, log.lines().next().unwrap());
    }
}

fn assert_no_flipped_bit_verifies(coordinator: &[u8; 32], line: &str) {
    let field = |place: usize| HEXLOWER.decode(line.split(' ').nth(place).unwrap().as_bytes()).unwrap();
    let signed = Signed { signature: field(1), bytes: field(2) };
    let signature: [u8; 64] = signed.signature.clone().try_into().unwrap();
    assert_eq!(verify(RECEIPT_CONTEXT, coordinator, &signed.bytes, &signature), Ok(()));
    assert!(verify(MANIFEST_CONTEXT, coordinator, &signed.bytes, &signature).is_err(), "for another purpose");
    for bit in 0..8 * (signed.bytes.len() + 64) {
        let mut changed = signed.clone();
        let place = bit / 8;
        let byte = match place.checked_sub(64) {
            None => &mut changed.signature[place],
            Some(place) => &mut changed.bytes[place],
        };
        *byte ^= 1 << (bit % 8);
        assert!(receipts::open(&PublicKey::read(coordinator).unwrap(), &changed).is_err(), "bit {bit}");
    }
}

#[test]
fn a_manifest_verifies_offline_with_its_workers_public_key() {
    let mut fleet = LiveFleet::in_a_run();
    let (manifests, signatures) = (Offered::default(), Arc::new(Mutex::new(Vec::new())));
    fleet.add("dora", &data::classes(9, ROWS), |options| {
        let kept = Arc::clone(&manifests);
        options.hooks.on_offer =
            Some(Arc::new(move |manifest, _| kept.lock().unwrap().push((manifest.bytes, manifest.clone()))));
        let kept = Arc::clone(&signatures);
        options.hooks.on_signature =
            Some(Arc::new(move |signature: &mut [u8; 64]| kept.lock().unwrap().push(*signature)));
    });
    let receipted = |line: &Line| matches!(line, Line::Receipt { .. });
    let lines = fleet.until_lines("dora", |lines| lines.iter().any(receipted));
    let Some(Line::Receipt { task, hash, .. }) = lines.into_iter().find(receipted) else { unreachable!() };
    let place = manifests.lock().unwrap().iter().position(|(_, manifest)| manifest.task == task).unwrap();
    let (manifest, signature) = (manifests.lock().unwrap()[place].1.clone(), signatures.lock().unwrap()[place]);
    assert_eq!(manifest.hash, hash);
    let key: IdentityKey = keys::load(&fleet.home.path("worker-dora/identity.key")).unwrap();
    let bytes = encode(&manifest);
    assert_eq!(verify(MANIFEST_CONTEXT, &key.public(), &bytes, &signature), Ok(()));
    for bit in 0..8 * bytes.len() {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(verify(MANIFEST_CONTEXT, &key.public(), &changed, &signature).is_err(), "bit {bit}");
    }
    fleet.goes_on();
    fleet.assert_nobody_lost();
}
