//! A worker against a coordinator that does what each test says, over loopback: enrolment, the loop, what it stores.
#![allow(clippy::unwrap_used)]

mod stage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::ids::{Hash, TaskId};
use protocol::invitation::Invitation;
use protocol::limits::{MODEL_BYTES_MAX, SILENCE_MAX};
use protocol::messages::{EnrolAnswer, EnrolRefusal, FromWorker, Leave, Manifest, Refusal, TaskKind, ToWorker, Upload};
use protocol::plan::Mode;
use stage::{Stage, plan};
use transport::CloseCode;
use tributary_worker::report::Line;
use tributary_worker::{EnrolError, Hooks, Outcome, WorkerError};

const SURVEY: TaskId = TaskId(1 << 32 | 1);
const UPDATE: TaskId = TaskId(1 << 32 | 2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_enrols_joins_trains_and_keeps_its_receipt() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    let base = peer.assign_update(UPDATE, &frozen).await;
    let (manifest, payload) = peer.take_offer().await;
    assert_eq!((manifest.task, manifest.kind, manifest.base), (UPDATE, TaskKind::Update, base));
    assert_eq!((manifest.hash, manifest.bytes), (Hash::of(&payload), payload.len() as u64));
    assert_eq!(manifest.weight, 32);
    assert!(manifest.metrics.evaluation.is_some() && manifest.metrics.train_loss.is_some());
    peer.say(ToWorker::Held { task: UPDATE, hash: manifest.hash }).await;
    peer.give_receipt(&manifest).await;
    peer.finish().await;
    assert_eq!(worker.await.unwrap().unwrap(), Outcome::Finished { model_hash: stage::FINAL_MODEL });

    let receipts = stage.receipts();
    assert_eq!((receipts[0].task, receipts[0].hash, receipts.len()), (UPDATE, manifest.hash, 1));
    let lines = stage.lines();
    assert!(matches!(lines[0], Line::Enrolled { .. }), "{lines:?}");
    assert!(matches!(lines[1], Line::Joined { training_rows: 32, held_out_rows: 8, .. }), "{lines:?}");
    assert!(matches!(lines.last(), Some(Line::Done { receipts: 1, .. })), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enrolled_worker_needs_no_invitation_and_is_not_enrolled_again() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    stage.join(plan(Mode::Federated)).await.finish().await;
    worker.await.unwrap().unwrap();
    let worker = stage.start(|options| options.join = None);
    stage.join(plan(Mode::Federated)).await.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_cannot_be_used_leaves_no_state_behind() {
    let stage = Stage::new();
    stage.write_data("a,b\n");
    let worker = stage.start(|_| ());
    assert!(matches!(worker.await.unwrap(), Err(WorkerError::Data(_))));
    assert!(!stage.state().exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_is_not_read_again_for_the_same_plan() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    stage.join(plan(Mode::Federated)).await.close(CloseCode::Internal);
    stage.write_data("a,b\n");
    stage.join(plan(Mode::Federated)).await.close(CloseCode::Internal);
    let mut other = plan(Mode::Federated);
    other.train.seed += 1;
    stage.welcome(other).await.hear().await;
    assert!(matches!(worker.await.unwrap(), Err(WorkerError::Declined(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_invitation_a_worker_waits_for_the_one_on_this_machine() {
    let stage = Stage::new();
    let worker = stage.start(|options| options.join = None);
    stage.wait_for(|line| matches!(line, Line::Waiting { enrolments: 0, .. })).await;
    std::fs::write(stage.default_join(), stage.invitation().to_string()).unwrap();
    stage.enrol().await;
    stage.join(plan(Mode::Federated)).await.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_ends_soon_is_renewed_with_the_token_that_is_remembered() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol_until(stage::unix_s() + 24 * 3600).await;
    stage.enrol().await;
    stage.join(plan(Mode::Federated)).await.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_waits_for_a_coordinator_that_is_not_there_yet() {
    let stage = Stage::new();
    let mut invitation = stage.invitation();
    // Port 9 is discard's; nobody speaks QUIC there.
    invitation.addresses = vec!["127.0.0.1:9".to_owned()];
    let worker = stage.start(|options| options.join = Some(invitation));
    stage.wait_for(|line| matches!(line, Line::Unreachable { .. })).await;
    stage.stop();
    assert_eq!(worker.await.unwrap().unwrap(), Outcome::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_moved_is_found_once_the_old_place_was_silent_for_ten_seconds() {
    let stage = Stage::new();
    let old = stage.relay().await;
    let invite = |address: &str| {
        let invitation = Invitation { addresses: vec![address.to_owned()], ..stage.invitation() };
        std::fs::write(stage.default_join(), invitation.to_string()).unwrap();
    };
    invite(&old.address);
    let worker = stage.start(|options| options.join = None);
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    let (first, _) = peer.take_offer().await;
    let new = stage.relay().await;
    invite(&new.address);
    old.cut().await;
    let cut = Instant::now();
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let took = cut.elapsed();
    assert!(SILENCE_MAX <= took && took < SILENCE_MAX + Duration::from_secs(2), "{took:?}");
    let (second, _) = peer.take_offer().await;
    assert_eq!(second, first);
    let is_silent = |line: &Line| matches!(line, Line::Disconnected { error } if error.contains("nothing was heard"));
    assert!(stage.lines().iter().any(is_silent), "{:?}", stage.lines());
    peer.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_is_being_shut_down_is_not_taken_for_a_full_one() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let _peer = stage.join(plan(Mode::Federated)).await;
    stage.go_away();
    stage.wait_for(|line| matches!(line, Line::Unreachable { .. })).await;
    let said: Vec<String> = stage.lines().iter().map(ToString::to_string).collect();
    assert!(
        said.last().is_some_and(|line| line.ends_with("(it is going away); trying again until there is")),
        "{said:?}"
    );
    stage.stop();
    assert_eq!(worker.await.unwrap().unwrap(), Outcome::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_and_foreign_invitations_each_have_their_sentence() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.answer_enrolment(|_| EnrolAnswer::Refused(EnrolRefusal::Spent)).await;
    let error = worker.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Enrol(EnrolError::Refused(EnrolRefusal::Spent))), "{error:?}");

    let other = Stage::new().invitation();
    let mut foreign = stage.invitation();
    foreign.ca_sha256 = other.ca_sha256;
    let worker = stage.start(|options| options.join = Some(foreign));
    stage.refuse_handshake().await;
    let error = worker.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Enrol(EnrolError::Foreign { .. })), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_not_shared_unless_their_owner_says_so() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.welcome(plan(Mode::Central)).await;
    let said = peer.hear().await.unwrap();
    assert!(matches!(&said, FromWorker::Leaving(Leave::NotAllowed(s)) if s.contains("--share-rows")), "{said:?}");
    let error = worker.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("--share-rows"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_not_shared_with_a_coordinator_whose_plan_did_not_say_so() {
    let stage = Stage::new();
    let worker = stage.start(|options| options.share_rows = true);
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign(UPDATE, TaskKind::Rows, &frozen, None).await;
    assert!(matches!(peer.hear().await, Some(FromWorker::Leaving(Leave::DataUnfit(_)))));
    assert!(matches!(worker.await.unwrap(), Err(WorkerError::Declined(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_update_that_takes_long_holds_up_no_beat_however_short_the_survey_was() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut long = plan(Mode::Federated);
    long.train.local_epochs = 1_000_000;
    let mut peer = stage.join(long).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    peer.hear_training().await;
    peer.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_is_offered_again_after_a_reconnect_without_training_again() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    let (first, _) = peer.take_offer().await;
    peer.close(CloseCode::Internal);
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let (second, payload) = peer.take_offer().await;
    assert_eq!(second, first);
    assert_eq!(Hash::of(&payload), first.hash);
    peer.give_receipt(&second).await;
    peer.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_worker_offers_what_it_had_made_without_training_again() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    let (first, _) = peer.take_offer().await;
    stage.kill(worker).await;

    let worker = stage.start(|_| ());
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let (second, payload) = peer.take_offer().await;
    assert_eq!((&second, Hash::of(&payload)), (&first, first.hash));
    // The coordinator was restarted too, and asks for the same work under another name.
    peer.say(ToWorker::Late { task: UPDATE }).await;
    let successor = TaskId(2 << 32 | 1);
    peer.assign_update(successor, &frozen).await;
    let (third, _) = peer.take_offer().await;
    assert_eq!((third.task, third.hash), (successor, first.hash));
    peer.give_receipt(&third).await;
    peer.finish().await;
    worker.await.unwrap().unwrap();
    assert_eq!(stage.trainings(), 1);
    assert_eq!(stage.receipts().len(), 1);
    assert_eq!(std::fs::read_dir(stage.state().join("kept")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_kept_is_not_offered_when_it_is_damaged_or_its_data_changed() {
    let damage = |stage: &Stage| std::fs::write(stage.state().join("kept/payload"), "torn").unwrap();
    let change = |stage: &Stage| stage.write_data(&(stage::rows() + "1,1,yes\n"));
    for (spoil, same) in [(&damage as &dyn Fn(&Stage), true), (&change, false)] {
        let stage = Stage::new();
        let worker = stage.start(|_| ());
        stage.enrol().await;
        let mut peer = stage.join(plan(Mode::Federated)).await;
        let frozen = peer.survey(SURVEY).await;
        peer.assign_update(UPDATE, &frozen).await;
        let (first, _) = peer.take_offer().await;
        stage.kill(worker).await;
        spoil(&stage);

        let worker = stage.start(|_| ());
        let mut peer = stage.join(plan(Mode::Federated)).await;
        peer.assign_update(UPDATE, &frozen).await;
        let (second, _) = peer.take_offer().await;
        assert_eq!(second.hash == first.hash, same);
        peer.finish().await;
        worker.await.unwrap().unwrap();
        assert_eq!(stage.trainings(), 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_disk_takes_nothing_says_so_once_and_works_from_memory() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    stage.join(plan(Mode::Federated)).await.finish().await;
    worker.await.unwrap().unwrap();
    std::fs::write(stage.state().join("kept"), "in the way").unwrap();
    std::fs::remove_dir(stage.state().join("receipts")).unwrap();

    let worker = stage.start(|_| ());
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    for task in [UPDATE, TaskId(UPDATE.0 + 1)] {
        peer.assign_update(task, &frozen).await;
        let (manifest, _) = peer.take_offer().await;
        assert_eq!(manifest.task, task);
        stage.wait_for(|line| matches!(line, Line::Note { text } if text.contains("made again"))).await;
        peer.give_receipt(&manifest).await;
    }
    peer.finish().await;
    worker.await.unwrap().unwrap();
    let notes = stage.lines().into_iter().filter(|line| matches!(line, Line::Note { .. })).count();
    assert_eq!(notes, 2, "{:?}", stage.lines());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_that_comes_again_is_kept_and_told_once() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    let (manifest, _) = peer.take_offer().await;
    peer.give_receipt(&manifest).await;
    peer.give_receipt(&manifest).await;
    peer.close(CloseCode::Internal);
    let mut peer = stage.join(plan(Mode::Federated)).await;
    peer.give_receipt(&manifest).await;
    peer.finish().await;
    worker.await.unwrap().unwrap();
    assert_eq!(stage.receipts().len(), 1);
    assert!(matches!(stage.lines().last(), Some(Line::Done { receipts: 1, .. })), "{:?}", stage.lines());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_restored_from_an_old_backup_is_given_its_receipt_and_goes_on() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    peer.take_offer().await;
    stage.kill(worker).await;
    stage.back_up();

    let later = TaskId(UPDATE.0 + 1);
    for _ in 0..2 {
        let worker = stage.start(|_| ());
        let mut peer = stage.join(plan(Mode::Federated)).await;
        let (old, _) = peer.take_offer().await;
        assert_eq!(old.task, UPDATE);
        peer.give_receipt(&old).await;
        peer.assign_update(later, &frozen).await;
        let (new, _) = peer.take_offer().await;
        assert_eq!(new.task, later);
        peer.give_receipt(&new).await;
        peer.give_receipt(&old).await;
        peer.finish().await;
        worker.await.unwrap().unwrap();
        assert_eq!(stage.receipts().iter().map(|receipt| receipt.task).collect::<Vec<_>>(), [UPDATE, later]);
        assert!(matches!(stage.lines().last(), Some(Line::Done { receipts: 2, .. })));
        stage.restore_backup();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_from_the_byte_that_the_coordinator_names() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    let (Manifest { hash, bytes, .. }, payload) = peer.take_offer().await;
    for from in [1, bytes / 2, bytes] {
        peer.say(ToWorker::Go { task: UPDATE, hash, from }).await;
        let (upload, rest) = peer.take_upload().await;
        assert_eq!(upload, Upload { task: UPDATE, hash, from });
        assert_eq!(rest, payload[usize::try_from(from).unwrap()..]);
    }
    peer.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_is_not_the_announced_one_is_never_used() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    let mut model = frozen.weights.clone();
    model[0] ^= 1;
    peer.assign_as(UPDATE, TaskKind::Update, &frozen, Some((&model, frozen.model_hash()))).await;
    assert_eq!(peer.closed().await, Some(CloseCode::SessionFailed));
    let mut peer = stage.join(plan(Mode::Federated)).await;
    peer.assign_update(UPDATE, &frozen).await;
    peer.take_offer().await;
    peer.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_longer_than_announced_or_than_any_is_given_up() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    let honest = frozen.weights.len() as u64;
    for announced in [honest - 1, honest + 1, MODEL_BYTES_MAX + 1] {
        peer.assign_announced(UPDATE, &frozen, announced).await;
        assert_eq!(peer.closed().await, Some(CloseCode::SessionFailed), "{announced} bytes announced");
        peer = stage.join(plan(Mode::Federated)).await;
    }
    peer.assign_update(UPDATE, &frozen).await;
    peer.take_offer().await;
    peer.finish().await;
    worker.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_told_to_stop_says_so() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    stage.stop();
    assert!(matches!(peer.hear().await, Some(FromWorker::Leaving(Leave::Stopping))));
    assert_eq!(worker.await.unwrap().unwrap(), Outcome::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_coordinator_says_for_good_ends_the_worker() {
    for (code, want) in [(CloseCode::Revoked, "revoked"), (CloseCode::Displaced, "another process")] {
        let stage = Stage::new();
        let worker = stage.start(|_| ());
        stage.enrol().await;
        stage.join(plan(Mode::Federated)).await.close(code);
        let error = worker.await.unwrap().unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    }
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let sentence = "no column \"bmi\"".to_owned();
    let mut peer = stage.join(plan(Mode::Federated)).await;
    peer.say(ToWorker::Rejected { sentence }).await;
    assert_eq!(worker.await.unwrap().unwrap_err().to_string(), "the coordinator says: no column \"bmi\"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_that_does_not_verify_is_not_kept() {
    let stage = Stage::new();
    let worker = stage.start(|_| ());
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    let frozen = peer.survey(SURVEY).await;
    peer.assign_update(UPDATE, &frozen).await;
    let (manifest, _) = peer.take_offer().await;
    peer.give_forged_receipt(&manifest).await;
    assert!(matches!(worker.await.unwrap(), Err(WorkerError::Receipt(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_change_what_is_offered_for_the_tests_of_the_other_side() {
    let stage = Stage::new();
    let hook = |manifest: &mut Manifest, payload: &mut Vec<u8>| {
        manifest.weight = 0;
        payload.push(0);
    };
    let worker = stage.start(|options| {
        options.hooks = Hooks { on_offer: Some(Arc::new(hook)), ..Hooks::default() };
    });
    stage.enrol().await;
    let mut peer = stage.join(plan(Mode::Federated)).await;
    peer.assign_survey(SURVEY).await;
    let (manifest, payload) = peer.take_offer().await;
    assert_eq!((manifest.weight, payload.len() as u64), (0, manifest.bytes + 1));
    peer.say(ToWorker::Refused { task: SURVEY, refusal: Refusal::WrongHash }).await;
    stage.wait_for(|line| matches!(line, Line::Refused { .. })).await;
    peer.finish().await;
    worker.await.unwrap().unwrap();
}
