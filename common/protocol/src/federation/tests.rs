//! Scenarios over a small fleet in memory, with simulated time: both machines as they are, and the least world
//! around them.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod faults;
mod fleet;
mod restarts;

use core::time::Duration;

use fleet::{Fleet, secs};

use super::*;
use crate::limits::{EXAMPLES_MAX, TASKS_OF_A_WORKER_MAX, UPDATES_MAX};
use crate::member::{Ending, Notice as MemberNotice};
use crate::messages::{Encoding, Failure, Manifest, Refusal, TaskKind};
use crate::plan::{Durability, LearningPlan, Mode, Plan, RoundsSpec};

fn plan(workers: u32, rounds: u32) -> Plan {
    let mut learning = LearningPlan::default();
    learning.train.rounds = rounds;
    Plan::new(learning, RoundsSpec { min_workers: Some(workers), ..RoundsSpec::default() }).unwrap()
}

fn with(mut plan: Plan, change: impl FnOnce(&mut Plan)) -> Plan {
    change(&mut plan);
    plan
}

/// Nothing is done without the whole fleet: whatever is killed, the model is the same.
fn exact(workers: u32, rounds: u32) -> Plan {
    with(plan(workers, rounds), |p| p.rounds.quorum = 1.0)
}

#[test]
fn a_fleet_joins_is_surveyed_trains_commits_and_is_let_go() {
    let mut fleet = Fleet::new(plan(3, 4), 3);
    fleet.run_to_end();
    assert_eq!(fleet.rounds(), 4);
    assert!(fleet.finished.is_some());
    for worker in &fleet.workers {
        assert!(matches!(worker.ending, Some(Ending::Finished { .. })), "{:?}", worker.ending);
        assert_eq!(worker.receipts.len(), 4, "one receipt a round");
        assert_eq!(worker.trained, 4);
    }
    fleet.check_replay();
}

#[test]
fn a_round_starts_the_moment_the_last_worker_is_in() {
    let mut fleet = Fleet::new(plan(3, 1), 2);
    fleet.run_for(secs(60));
    assert_eq!(fleet.stage(), Stage::Gathering);
    let late = fleet.add_worker();
    fleet.run_for(Duration::from_millis(20));
    assert_ne!(fleet.stage(), Stage::Gathering, "worker {late} was the third");
}

#[test]
fn too_few_workers_between_rounds_are_said_once_and_again_when_there_are_fewer() {
    let told = |fleet: &Fleet, have| fleet.noticed(|n| *n == Notice::Waiting { have, need: 3 });
    let mut fleet = Fleet::new(plan(3, 3), 3);
    fleet.run_until(|fleet| fleet.stage() == Stage::Committing);
    assert!(!told(&fleet, 2) && !told(&fleet, 1), "those who come are told of in any case");
    fleet.kill(2);
    fleet.run_for(secs(30));
    assert_eq!((fleet.stage(), fleet.status().workers_lacking), (Stage::Gathering, 1));
    assert!(told(&fleet, 2) && !told(&fleet, 1));
    fleet.kill(1);
    fleet.run_for(secs(30));
    assert_eq!(fleet.status().workers_lacking, 2);
    assert!(told(&fleet, 1));
    fleet.revive(1);
    fleet.revive(2);
    fleet.run_to_end();
    assert_eq!((fleet.rounds(), fleet.status().workers_lacking), (3, 0));
}

#[test]
fn without_min_workers_two_wait_ten_seconds_for_a_third() {
    let no_min = || with(plan(1, 1), |p| p.rounds.min_workers = None);
    let mut fleet = Fleet::new(no_min(), 2);
    fleet.run_for(secs(9));
    assert_eq!(fleet.stage(), Stage::Gathering);
    assert!(fleet.noticed(|n| matches!(n, Notice::Countdown { seconds: 10, workers: 2 })));
    fleet.run_for(secs(2));
    assert_ne!(fleet.stage(), Stage::Gathering);
    let mut fleet = Fleet::new(no_min(), 3);
    fleet.run_for(secs(1));
    assert_ne!(fleet.stage(), Stage::Gathering, "three need no countdown");
}

#[test]
fn the_model_depends_on_the_set_of_updates_and_not_on_their_order() {
    let hash = |delays: [u64; 3]| {
        let mut fleet = Fleet::new(plan(3, 3), 3);
        for (worker, delay) in fleet.workers.iter_mut().zip(delays) {
            worker.train_time = Duration::from_millis(delay);
        }
        fleet.run_to_end();
        fleet.model()
    };
    assert_eq!(hash([1, 50, 900]), hash([700, 3, 20]));
}

#[test]
fn a_late_update_is_answered_and_not_in_the_model() {
    let mut fleet = Fleet::new(
        with(plan(3, 2), |p| {
            p.rounds.deadline = Some(secs(5));
            p.rounds.quorum = 0.6;
        }),
        3,
    );
    fleet.workers[2].train_time = secs(8);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    assert_eq!(fleet.entries(1).len(), 2);
    fleet.run_for(Duration::from_millis(50));
    assert!(fleet.workers[2].noticed(|n| matches!(n, MemberNotice::Late { .. })));
    assert!(fleet.workers[2].cancelled >= 1, "a late worker stops training for nothing");
    assert!(fleet.workers[2].receipts.is_empty());
}

#[test]
fn an_update_that_comes_after_its_round_gets_late_and_never_an_ejection() {
    let mut fleet = Fleet::new(plan(2, 3), 2);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    let stale = fleet.workers[0].manifests[0].clone();
    let stale = Manifest { task: TaskId::new(9, 9), ..stale };
    let conn = fleet.workers[0].conn.unwrap();
    fleet.inject(Input::Offered { conn, manifest: Box::new(stale), authentic: true });
    assert!(fleet.noticed(|n| matches!(n, Notice::Late { .. })));
    fleet.run_to_end();
    assert_eq!(fleet.rounds(), 3);
}

#[test]
fn the_same_offer_again_gets_the_same_answer_and_counts_once() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.workers[1].train_time = secs(2);
    fleet.run_until(|fleet| fleet.workers[0].held > 0);
    fleet.offer_again(0, |_| ());
    fleet.run_for(Duration::from_millis(20));
    assert!(fleet.workers[0].held >= 2, "held, said twice");
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 2);
    assert_eq!(fleet.folds, 2);
}

#[test]
fn another_payload_for_a_held_task_gets_already_held() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.workers[1].train_time = secs(2);
    fleet.run_until(|fleet| fleet.workers[0].held > 0);
    let hash = fleet.workers[0].manifests.last().unwrap().hash;
    fleet.offer_again(0, |manifest| manifest.hash = Hash([9; 32]));
    assert!(
        fleet.said(|m| *m == ToWorker::AlreadyHeld { task: fleet.workers[0].manifests.last().unwrap().task, hash })
    );
    fleet.run_to_end();
    assert!(fleet.entries(1).iter().any(|entry| entry.hash == hash));
}

#[test]
fn a_committed_update_offered_again_gets_its_receipt_again() {
    let mut fleet = Fleet::new(plan(2, 2), 2);
    fleet.workers[1].train_time = secs(5);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    fleet.run_for(Duration::from_millis(50));
    let before = fleet.workers[0].receipts.len();
    fleet.offer_again_of(0, 0, |_| ());
    fleet.run_for(Duration::from_millis(50));
    assert_eq!(fleet.receipts_said, before + 2, "both workers' and the one again");
}

#[test]
fn every_unfit_manifest_gets_its_typed_refusal_and_the_round_goes_on() {
    type Change = fn(&mut Manifest);
    type Expected = fn(&Refusal) -> bool;
    let cases: [(Change, Expected); 11] = [
        (|m| m.base = Hash([2; 32]), |r| *r == Refusal::WrongBase),
        (|m| m.layout = Hash([1; 32]), |r| *r == Refusal::WrongLayout),
        (|m| m.bytes += 4, |r| matches!(r, Refusal::WrongLength { .. })),
        (|m| m.weight = 0, |r| matches!(r, Refusal::WrongWeight { got: 0, .. })),
        (|m| m.weight = (1 << 20) + 1, |r| matches!(r, Refusal::WrongWeight { .. })),
        (|m| m.kind = TaskKind::Gradient, |r| *r == Refusal::WrongKind),
        (|m| m.run = RunId([9; 16]), |r| *r == Refusal::WrongRun),
        (|m| m.encoding = Encoding::Ring64, |r| *r == Refusal::WrongEncoding),
        (|m| m.groups = 2, |r| *r == Refusal::WrongEncoding),
        (|m| m.metrics.train_loss = Some(f64::NAN), |r| *r == Refusal::WrongMetrics),
        (|m| m.examples = EXAMPLES_MAX + 1, |r| *r == Refusal::WrongMetrics),
    ];
    for (number, (change, expected)) in cases.into_iter().enumerate() {
        let mut fleet = Fleet::new(with(plan(3, 2), |p| p.rounds.quorum = 0.6), 3);
        fleet.workers[0].tamper = Some(change);
        fleet.run_to_end();
        assert!(fleet.noticed(|n| matches!(n, Notice::Refused { refusal, .. } if expected(refusal))), "case {number}");
        assert_eq!((fleet.rounds(), fleet.entries(1).len()), (2, 2), "case {number}");
    }
}

#[test]
fn another_workers_task_is_refused_and_stays_its_owners() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.workers[1].train_time = secs(2);
    fleet.run_until(|fleet| fleet.workers[0].held > 0);
    let task = fleet.open_task_of(1);
    fleet.offer_again(0, |manifest| manifest.task = task);
    assert!(fleet.noticed(|n| matches!(n, Notice::Refused { refusal: Refusal::WrongWorker, .. })));
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn a_wrong_signature_is_refused() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 0.6), 3);
    fleet.workers[0].forged = true;
    fleet.run_to_end();
    assert!(fleet.noticed(|n| matches!(n, Notice::Refused { refusal: Refusal::WrongSignature, .. })));
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn a_payload_that_is_not_what_it_says_is_refused_before_it_is_folded() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 0.6), 3);
    fleet.workers[0].spoil = Some(Refusal::NotFinite);
    fleet.run_to_end();
    assert!(fleet.noticed(|n| matches!(n, Notice::Refused { refusal: Refusal::NotFinite, .. })));
    assert_eq!(fleet.folds, 2);
}

#[test]
fn a_worker_gone_while_gathering_is_waited_for() {
    let mut fleet = Fleet::new(plan(3, 1), 3);
    fleet.run_until(|fleet| fleet.workers[0].conn.is_some());
    fleet.kill(0);
    fleet.run_for(secs(30));
    assert_eq!(fleet.stage(), Stage::Gathering);
    fleet.revive(0);
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 3);
}

#[test]
fn a_worker_gone_in_the_survey_comes_back_and_is_in_it() {
    let mut fleet = Fleet::new(plan(3, 1), 3);
    fleet.workers[0].train_time = secs(1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Surveying);
    fleet.kill(0);
    fleet.run_for(secs(5));
    assert_eq!(fleet.stage(), Stage::Surveying);
    fleet.revive(0);
    fleet.run_to_end();
    assert_eq!(fleet.surveyed, 3);
}

#[test]
fn a_worker_gone_in_the_survey_for_good_does_not_hold_it_up_for_ever() {
    let mut fleet = Fleet::new(with(plan(2, 1), |p| p.rounds.quorum = 0.5), 3);
    fleet.workers[0].train_time = secs(1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Surveying);
    fleet.kill(0);
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn a_worker_gone_in_a_round_gets_its_open_task_again() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 1.0), 3);
    fleet.workers[0].train_time = secs(3);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    let task = fleet.open_task_of(0);
    fleet.kill(0);
    fleet.run_for(secs(2));
    fleet.revive(0);
    fleet.run_to_end();
    assert!(fleet.entries(1).iter().any(|entry| entry.task == task), "the same task, not another");
    assert_eq!(fleet.entries(1).len(), 3);
}

#[test]
fn a_connection_lost_in_training_costs_no_training() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 1.0), 3);
    fleet.workers[0].train_time = secs(3);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.cut(0);
    fleet.run_to_end();
    assert_eq!(fleet.workers[0].trained, 1, "it went on while the connection was down");
    assert_eq!(fleet.entries(1).len(), 3);
}

#[test]
fn a_connection_lost_in_committing_still_gets_its_receipt() {
    let mut fleet = Fleet::new(plan(2, 2), 2);
    fleet.step_time = secs(1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Committing);
    fleet.cut(0);
    fleet.run_to_end();
    assert_eq!(fleet.workers[0].receipts.len(), 2);
    assert_eq!(fleet.workers[0].trained, 2);
}

#[test]
fn a_worker_gone_in_the_last_evaluation_does_not_hold_the_end_up() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    fleet.workers[0].train_time = secs(1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Evaluating);
    fleet.kill(0);
    fleet.run_until(|fleet| fleet.finished.is_some());
}

#[test]
fn at_the_deadline_a_quorum_makes_the_round() {
    let mut fleet = Fleet::new(
        with(plan(4, 1), |p| {
            p.rounds.deadline = Some(secs(10));
            p.rounds.quorum = 0.5;
        }),
        4,
    );
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    for slow in [0, 1] {
        fleet.workers[slow].train_time = secs(3600);
    }
    fleet.run_until(|fleet| fleet.rounds() == 1);
    assert_eq!(fleet.entries(1).len(), 2);
    assert!((10..12).contains(&fleet.now().as_secs()), "at {:?}", fleet.now());
}

#[test]
fn under_quorum_the_round_is_extended_three_times_then_paused_by_name_and_goes_on() {
    let mut fleet = Fleet::new(
        with(plan(3, 1), |p| {
            p.rounds.deadline = Some(secs(10));
            p.rounds.quorum = 1.0;
        }),
        3,
    );
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.kill(2);
    fleet.run_for(secs(35));
    assert_eq!(fleet.facts(|e| matches!(e, Event::Extended { .. })), 3);
    assert_eq!(fleet.status().paused, None);
    fleet.run_for(secs(10));
    assert_eq!(fleet.status().paused.as_deref(), Some("waiting for worker-2"));
    fleet.revive(2);
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 3, "held updates were kept over the pause");
    assert_eq!(fleet.workers[0].trained, 1);
}

#[test]
fn an_abort_voids_held_updates_and_tells_their_holders() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.workers[1].train_time = secs(60);
    fleet.run_until(|fleet| fleet.workers[0].held > 0);
    fleet.inject(Input::Abort);
    fleet.run_for(secs(1));
    assert!(fleet.workers.iter().all(|worker| worker.ending == Some(Ending::Aborted)));
    assert_eq!(fleet.failed.as_deref(), Some("aborted by the operator"));
    assert_eq!(fleet.rounds(), 0);
}

#[test]
fn of_two_processes_with_one_identity_the_newer_wins() {
    let mut fleet = Fleet::new(plan(2, 2), 2);
    fleet.workers[0].train_time = secs(2);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    let newer = fleet.clone_worker(0);
    fleet.run_for(secs(1));
    assert_eq!(fleet.workers[0].ending, Some(Ending::Displaced));
    fleet.run_to_end();
    assert!(matches!(fleet.workers[newer].ending, Some(Ending::Finished { .. })));
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn diverging_training_is_said_and_pauses_by_name_when_quorum_needs_it() {
    let mut fleet = Fleet::new(with(plan(2, 1), |p| p.rounds.quorum = 1.0), 2);
    fleet.workers[1].diverge = Some(Failure::NotFinite);
    fleet.run_for(secs(5));
    let expected = "training diverges at worker-1: lower train.learning_rate";
    assert_eq!(fleet.status().paused.as_deref(), Some(expected));
}

#[test]
fn diverging_training_of_a_minority_does_not_stop_the_round() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 0.6), 3);
    fleet.workers[1].diverge = Some(Failure::NormTooLong { got: 300.0, max: 256.0 });
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn a_silent_worker_is_gone_after_ten_seconds_and_a_beating_one_is_not() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.workers[0].train_time = secs(45);
    fleet.workers[1].train_time = secs(45);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.freeze(1);
    fleet.run_for(secs(12));
    assert!(fleet.noticed(|n| matches!(n, Notice::Gone { name, why: Gone::Silent } if name.as_str() == "worker-1")));
    assert!(!fleet.noticed(|n| matches!(n, Notice::Gone { name, .. } if name.as_str() == "worker-0")));
}

#[test]
fn a_worker_that_beats_but_does_not_step_is_gone_after_ten_minutes() {
    let mut fleet = Fleet::new(plan(1, 1), 1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.workers[0].train_time = secs(100_000);
    fleet.workers[0].stuck = true;
    fleet.run_for(secs(590));
    assert!(!fleet.noticed(|n| matches!(n, Notice::Gone { .. })));
    fleet.run_for(secs(20));
    assert!(fleet.noticed(|n| matches!(n, Notice::Gone { why: Gone::Stuck, .. })));
}

#[test]
fn a_coordinator_killed_anywhere_ends_with_the_same_model() {
    let exact = || with(plan(3, 4), |p| p.rounds.quorum = 1.0);
    let mut undisturbed = Fleet::new(exact(), 3);
    undisturbed.run_to_end();
    for millis in (1..400).step_by(7) {
        let mut fleet = Fleet::new(exact(), 3);
        fleet.run_for(Duration::from_millis(millis));
        fleet.kill_coordinator();
        fleet.run_for(Duration::from_millis(30));
        fleet.start_coordinator();
        fleet.run_to_end();
        assert_eq!(fleet.model(), undisturbed.model(), "killed at {millis} ms");
        assert_eq!(fleet.rounds(), 4);
        fleet.check_receipts();
    }
}

#[test]
fn what_was_made_for_a_forgotten_task_is_offered_for_its_successor() {
    let mut fleet = Fleet::new(with(plan(2, 1), |p| p.rounds.quorum = 1.0), 2);
    fleet.workers[1].train_time = secs(5);
    fleet.run_until(|fleet| fleet.workers[0].held > 0 && fleet.stage() == Stage::Training);
    fleet.restore_backup(|event| matches!(event, Event::Surveyed { .. }));
    fleet.run_for(Duration::from_millis(500));
    fleet.start_coordinator();
    fleet.run_to_end();
    assert_eq!(fleet.workers[0].trained, 1, "not trained again");
    assert_eq!(fleet.workers[1].trained, 1, "went on while nobody was there");
    assert!(fleet.entries(1).iter().all(|entry| entry.task.0 >> 32 == 2), "tasks of the second start");
}

#[test]
fn a_worker_killed_anywhere_does_not_change_the_model() {
    let exact = || with(plan(3, 3), |p| p.rounds.quorum = 1.0);
    let mut undisturbed = Fleet::new(exact(), 3);
    undisturbed.run_to_end();
    for millis in (1..300).step_by(7) {
        let mut fleet = Fleet::new(exact(), 3);
        fleet.run_for(Duration::from_millis(millis));
        fleet.kill(1);
        fleet.run_for(Duration::from_millis(40));
        fleet.revive(1);
        fleet.run_to_end();
        assert_eq!(fleet.model(), undisturbed.model(), "killed at {millis} ms");
        fleet.check_receipts();
    }
}

#[test]
fn nothing_is_announced_before_what_it_rests_on_is_durable() {
    let mut fleet = Fleet::new(plan(2, 3), 2);
    fleet.sync_time = secs(2);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    assert_eq!(fleet.receipts_said, 0, "the commit is not synced yet");
    fleet.run_for(Duration::from_millis(1900));
    assert_eq!(fleet.receipts_said, 0);
    fleet.run_for(Duration::from_millis(200));
    assert_eq!(fleet.receipts_said, 2);
}

#[test]
fn with_durability_update_a_payload_is_synced_before_it_is_held() {
    let mut fleet = Fleet::new(with(plan(1, 1), |p| p.rounds.durability = Durability::Update), 1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.sync_time = secs(3);
    fleet.run_until(|fleet| fleet.facts(|e| matches!(e, Event::Held { .. })) == 2);
    let held = fleet.workers[0].held;
    fleet.run_for(secs(2));
    assert_eq!(fleet.workers[0].held, held);
    fleet.run_for(secs(2));
    assert_eq!(fleet.workers[0].held, held + 1);
}

#[test]
fn with_durability_update_who_offers_again_is_not_told_earlier_that_it_is_held() {
    let mut fleet = Fleet::new(with(plan(1, 1), |p| p.rounds.durability = Durability::Update), 1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.sync_time = secs(3);
    fleet.run_until(|fleet| fleet.facts(|e| matches!(e, Event::Held { .. })) == 2);
    let held = fleet.workers[0].held;
    fleet.offer_again(0, |_| ());
    fleet.run_for(secs(2));
    assert_eq!(fleet.workers[0].held, held);
}

#[test]
fn a_survey_of_no_bytes_is_refused_and_not_held_without_a_payload() {
    let mut fleet = Fleet::new(with(plan(2, 1), |p| p.rounds.quorum = 0.5), 2);
    fleet.workers[0].train_time = secs(1);
    fleet.run_until(|fleet| fleet.stage() == Stage::Surveying);
    let (conn, task) = (fleet.workers[0].conn.unwrap(), fleet.open_task_of(0));
    let manifest = fleet.survey_of_no_bytes(0, task);
    fleet.inject(Input::Offered { conn, manifest: Box::new(manifest), authentic: true });
    assert!(fleet.noticed(|n| matches!(n, Notice::Refused { refusal: Refusal::WrongLength { got: 0, .. }, .. })));
    fleet.run_to_end();
    assert_eq!(fleet.surveyed, 1);
}

#[test]
fn a_stream_that_ends_early_on_a_living_connection_is_soon_sent_again() {
    let mut fleet = Fleet::new(with(plan(2, 1), |p| p.rounds.quorum = 1.0), 2);
    fleet.parameters = 100_000;
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.upload_time = secs(2);
    fleet.run_until(|fleet| fleet.status().permits_in_use == 2);
    fleet.cut_a_stream();
    fleet.run_until(|fleet| fleet.rounds() == 1);
    assert!(fleet.now() < secs(10), "at {:?}", fleet.now());
    assert!(fleet.workers.iter().all(|worker| worker.trained == 1));
}

#[test]
fn a_worker_that_dies_again_and_again_does_not_hold_the_first_round_up_for_ever() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 0.6), 3);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    for _ in 0..30 {
        fleet.workers[0].train_time = secs(3600);
        fleet.run_for(secs(5));
        fleet.kill(0);
        fleet.revive(0);
    }
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn a_worker_refused_again_and_again_is_given_no_more_than_some_tasks() {
    let mut fleet = Fleet::new(with(plan(2, 1), |p| p.rounds.quorum = 1.0), 2);
    fleet.workers[0].tamper = Some(|manifest| manifest.weight = 0);
    for _ in 0..20 {
        fleet.run_for(secs(3));
        fleet.cut(0);
    }
    let id = fleet.workers[0].id;
    let given = |e: &Event| matches!(e, Event::Assigned { round: 1, worker, .. } if *worker == id);
    assert_eq!(fleet.facts(given), TASKS_OF_A_WORKER_MAX);
}

#[test]
fn a_worker_revoked_while_it_is_away_is_not_waited_for() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 0.6), 3);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.kill(0);
    fleet.run_for(Duration::from_millis(5));
    let worker = fleet.workers[0].id;
    fleet.inject(Input::Revoked { worker });
    fleet.run_to_end();
    assert!(fleet.now() < secs(5), "at {:?}", fleet.now());
}

#[test]
fn a_task_given_again_after_a_pause_has_a_deadline() {
    let mut fleet = Fleet::new(
        with(plan(3, 1), |p| {
            p.rounds.deadline = Some(secs(20));
            p.rounds.quorum = 0.6;
        }),
        3,
    );
    for worker in [0, 1] {
        fleet.workers[worker].tamper = Some(|manifest| manifest.weight = 0);
    }
    fleet.run_for(secs(1));
    assert!(fleet.status().paused.is_some(), "nobody is left to wait for");
    fleet.workers[1].train_time = secs(3600);
    for worker in [1, 0] {
        fleet.workers[worker].tamper = None;
        fleet.cut(worker);
        fleet.run_for(secs(1));
    }
    fleet.run_for(secs(15));
    assert_eq!((fleet.rounds(), fleet.status().paused), (0, None));
    fleet.run_for(secs(10));
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn who_joins_twice_on_one_connection_is_ejected() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    let (conn, worker, name) = (fleet.workers[0].conn.unwrap(), fleet.workers[0].id, fleet.workers[0].name.clone());
    fleet.inject(Input::Joined { conn, worker, name, weight_max: 1, instance: Instance(77) });
    assert!(fleet.noticed(|n| matches!(n, Notice::Gone { why: Gone::Misbehaved(_), .. })));
    assert_eq!(fleet.status().workers.len(), 1);
    fleet.run_to_end();
}

#[test]
fn a_process_that_comes_back_before_its_old_connection_ends_is_not_displaced() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    let (worker, name) = (fleet.workers[0].id, fleet.workers[0].name.clone());
    fleet.inject(Input::Joined { conn: ConnId(900), worker, name, weight_max: 1 << 20, instance: Instance(1) });
    assert!(!fleet.said(|m| *m == ToWorker::Displaced));
    assert!(!fleet.noticed(|n| matches!(n, Notice::Gone { why: Gone::Displaced, .. })));
    fleet.run_to_end();
}

#[test]
fn what_a_dead_process_said_before_does_not_displace_the_one_that_came_after_it() {
    for (instance, displaced) in [(Instance(900), true), (Instance(1), false)] {
        let mut fleet = Fleet::new(plan(2, 1), 2);
        fleet.run_until(|fleet| fleet.stage() == Stage::Training);
        let (worker, name) = (fleet.workers[0].id, fleet.workers[0].name.clone());
        // Older than any that is there.
        fleet.inject(Input::Joined { conn: ConnId(0), worker, name, weight_max: 1 << 20, instance });
        assert_eq!(fleet.said(|m| *m == ToWorker::Displaced), displaced, "on its own connection");
        assert!(!fleet.noticed(|n| matches!(n, Notice::Gone { .. })), "nobody who was in is gone");
        fleet.run_to_end();
    }
}

#[test]
fn an_idle_session_of_a_day_ends_once_and_begins_anew() {
    let mut fleet = Fleet::new(plan(2, 1), 1);
    fleet.run_for(secs(25 * 3600));
    assert_eq!(fleet.status().workers.len(), 1);
    assert_eq!(fleet.facts(|e| matches!(e, Event::Notice(Notice::Gone { .. }))), 1);
}

#[test]
fn large_payloads_wait_for_their_permit() {
    let mut fleet = Fleet::new(plan(12, 1), 12);
    fleet.parameters = 10 << 20;
    fleet.upload_time = secs(2);
    let mut most = 0;
    fleet.run_until(|fleet| {
        most = most.max(fleet.status().permits_in_use);
        fleet.rounds() == 1
    });
    assert_eq!(most, UPLOAD_PERMITS);
    assert_eq!(fleet.status().permits_in_use, 0);
    assert_eq!(fleet.entries(1).len(), 12);
}

#[test]
fn a_permit_comes_back_when_its_holder_dies_in_the_upload() {
    let mut fleet = Fleet::new(with(plan(8, 1), |p| p.rounds.quorum = 0.5), 8);
    fleet.parameters = 10 << 20;
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.upload_time = secs(5);
    fleet.run_until(|fleet| fleet.workers.iter().filter(|w| w.uploading).count() == 4);
    for holder in 0..8 {
        if fleet.workers[holder].uploading {
            fleet.kill(holder);
        }
    }
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 4);
}

#[test]
fn the_workers_that_lack_a_column_are_rejected_by_name_and_the_rest_go_on() {
    let mut fleet = Fleet::new(plan(2, 1), 3);
    fleet.unfit = vec![1];
    fleet.run_to_end();
    assert_eq!(fleet.workers[1].ending, Some(Ending::Rejected("column \"x\" is missing".into())));
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn contradicting_label_columns_pause_the_run_until_the_fleet_changes() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.disagree = true;
    fleet.run_for(secs(5));
    assert_eq!(fleet.status().paused.as_deref(), Some("worker-0 says \"a\", worker-1 says \"b\""));
    assert_eq!(fleet.merges, 1, "not asked again and again");
    fleet.disagree = false;
    fleet.kill(1);
    fleet.revive(1);
    fleet.run_to_end();
    assert_eq!(fleet.rounds(), 1);
}

#[test]
fn data_that_nothing_can_be_learned_from_end_the_run_with_a_sentence() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.impossible = true;
    fleet.run_for(secs(5));
    assert_eq!(fleet.failed.as_deref(), Some("one class in the whole fleet"));
}

#[test]
fn an_owner_who_does_not_allow_the_plan_ends_the_worker_and_not_the_fleet() {
    let mut fleet = Fleet::new(plan(2, 1), 3);
    fleet.workers[0].refuse_plan = true;
    fleet.run_to_end();
    assert_eq!(fleet.workers[0].ending, Some(Ending::Declined("start it with --share-rows".into())));
    assert_eq!(fleet.entries(1).len(), 2);
}

#[test]
fn central_training_collects_rows_once_and_evaluates_every_round() {
    let mut fleet = Fleet::new(with(plan(3, 3), |p| p.learning.train.mode = Mode::Central), 3);
    fleet.run_to_end();
    assert_eq!(fleet.rounds(), 3);
    assert_eq!(fleet.facts(|e| matches!(e, Event::Assigned { kind: TaskKind::Rows, .. })), 3);
    assert_eq!(fleet.facts(|e| matches!(e, Event::Assigned { kind: TaskKind::Evaluation, .. })), 12);
    assert!(fleet.workers.iter().all(|worker| worker.receipts.is_empty()), "rows end at held");
    assert_eq!(fleet.examples(), 300, "the rows of all are behind each round");
    fleet.check_replay();
}

#[test]
fn a_coordinator_restarted_in_central_mode_asks_for_the_rows_again() {
    let central = || with(plan(3, 3), |p| p.learning.train.mode = Mode::Central);
    let mut fleet = Fleet::new(central(), 3);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    fleet.run_for(Duration::from_millis(50));
    fleet.kill_coordinator();
    fleet.start_coordinator();
    fleet.run_to_end();
    let mut undisturbed = Fleet::new(central(), 3);
    undisturbed.run_to_end();
    assert_eq!(fleet.model(), undisturbed.model());
}

#[test]
fn a_stop_says_going_away_and_the_next_start_goes_on() {
    let mut fleet = Fleet::new(plan(2, 3), 2);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    fleet.inject(Input::Stop);
    fleet.run_for(Duration::from_millis(20));
    assert!(fleet.ended);
    assert!(fleet.workers.iter().all(|w| w.noticed(|n| matches!(n, MemberNotice::GoingAway))));
    fleet.kill_coordinator();
    fleet.run_for(secs(2));
    fleet.start_coordinator();
    fleet.run_to_end();
    assert_eq!(fleet.rounds(), 3);
}

#[test]
fn half_the_fleet_is_selected_and_the_choice_is_a_function_of_the_seed() {
    let half = || with(plan(6, 3), |p| p.rounds.fraction = 0.5);
    let selected = || {
        let mut fleet = Fleet::new(half(), 6);
        fleet.run_to_end();
        (1..=3).map(|round| fleet.entries(round).iter().map(|e| e.worker).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    let rounds = selected();
    assert!(rounds.iter().all(|round| round.len() == 3));
    assert_ne!(rounds[0], rounds[1], "another three (for this seed)");
    assert_eq!(rounds, selected());
}

#[test]
fn a_revoked_worker_is_closed_and_the_round_goes_on_without_it() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 0.6), 3);
    fleet.workers[0].train_time = secs(60);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    let worker = fleet.workers[0].id;
    fleet.inject(Input::Revoked { worker });
    fleet.workers[0].banned = true;
    fleet.run_until(|fleet| fleet.finished.is_some());
    assert_eq!(fleet.entries(1).len(), 2);
    assert!(fleet.noticed(|n| matches!(n, Notice::Gone { why: Gone::Revoked, .. })));
}

#[test]
fn a_worker_that_was_thrown_out_is_not_waited_for() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| p.rounds.quorum = 0.6), 3);
    fleet.workers[0].train_time = secs(60);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    let (conn, began) = (fleet.workers[0].conn.unwrap(), fleet.now());
    fleet.workers[0].banned = true;
    fleet.inject(Input::Misbehaved { conn, what: "a payload longer than its manifest".to_owned() });
    fleet.run_until(|fleet| fleet.finished.is_some());
    assert_eq!(fleet.entries(1).len(), 2);
    assert!(fleet.now() - began < secs(10), "the deadline of somebody's absence is 30 s");
}

#[test]
fn a_round_never_assigns_more_tasks_than_a_sum_may_hold() {
    let many = UPDATES_MAX as usize + 5;
    let mut fleet = Fleet::new(with(plan(UPDATES_MAX, 1), |p| p.rounds.quorum = 1.0), many);
    fleet.run_until(|fleet| fleet.rounds() == 1);
    assert_eq!(fleet.entries(1).len(), UPDATES_MAX as usize);
}

#[test]
fn whatever_a_peer_says_out_of_turn_is_survived() {
    let mut fleet = Fleet::new(plan(2, 1), 2);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    let conn = fleet.workers[0].conn.unwrap();
    let task = TaskId(u64::MAX);
    let nobody = ConnId(u64::MAX);
    for message in [
        FromWorker::Ready,
        FromWorker::Failed { task, failure: Failure::NotFinite },
        FromWorker::Beat { task, steps: u64::MAX },
    ] {
        fleet.inject(Input::Said { conn, message: message.clone() });
        fleet.inject(Input::Said { conn: nobody, message });
    }
    for input in [
        Input::Verified { task, hash: Hash([0; 32]), norm: 0.0 },
        Input::Spoiled { task, hash: Hash([0; 32]), refusal: Refusal::WrongHash },
        Input::Cut { task, hash: Hash([0; 32]) },
        Input::Folded { task },
        Input::Gone { conn: nobody },
        Input::Surveyed(SurveyOutcome::Disagreed(String::new())),
        Input::Stepped { round: 77, model: Hash([0; 32]), train_loss: None },
        Input::StepFailed { round: 77, sentence: String::new() },
    ] {
        fleet.inject(input);
    }
    fleet.run_to_end();
    assert_eq!(fleet.rounds(), 1);
    fleet.check_replay();
}

#[test]
fn random_kills_and_cuts_of_anything_end_with_the_same_model_and_no_broken_receipt() {
    let exact = || with(plan(4, 5), |p| p.rounds.quorum = 1.0);
    let mut undisturbed = Fleet::new(exact(), 4);
    undisturbed.run_to_end();
    for seed in 0..300 {
        let mut fleet = Fleet::new(exact(), 4);
        let mut draw = crate::draw::Draw::new(seed, "faults", 0, "");
        for worker in &mut fleet.workers {
            worker.train_time = Duration::from_millis(1 + draw.below(40));
        }
        for _ in 0..draw.below(12) {
            fleet.run_for(Duration::from_millis(draw.below(80)));
            let worker = draw.below(4) as usize;
            match draw.below(3) {
                0 => {
                    fleet.kill(worker);
                    fleet.run_for(Duration::from_millis(draw.below(100)));
                    fleet.revive(worker);
                }
                1 => fleet.cut(worker),
                _ => {
                    fleet.kill_coordinator();
                    fleet.run_for(Duration::from_millis(draw.below(300)));
                    fleet.start_coordinator();
                }
            }
        }
        fleet.run_to_end();
        assert_eq!(fleet.model(), undisturbed.model(), "seed {seed}");
        fleet.check_receipts();
    }
}
