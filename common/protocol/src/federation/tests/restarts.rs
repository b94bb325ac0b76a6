//! A run that goes on after its coordinator died, its disk was damaged or full, and rounds that want fewer than they
//! ask.

use core::time::Duration;

use super::fleet::{Fleet, secs};
use super::{exact, plan, with};
use crate::federation::{Event, Input, Notice, Pause, Stage, Withdrawal};
use crate::ids::{Hash, TaskId};
use crate::member::Ending;
use crate::messages::{TaskKind, ToWorker};

/// A fleet of three of which the last trains so long that the others' updates are held meanwhile.
fn two_of_three_held(rounds: u32) -> Fleet {
    let mut fleet = Fleet::new(exact(3, rounds), 3);
    fleet.workers[2].train_time = secs(2);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training && (0..2).all(|w| fleet.workers[w].held > 0));
    fleet
}

fn model_of(rounds: u32) -> Hash {
    let mut undisturbed = Fleet::new(exact(3, rounds), 3);
    undisturbed.run_to_end();
    undisturbed.model()
}

#[test]
fn a_restart_takes_up_the_open_round_with_what_is_held() {
    let mut fleet = two_of_three_held(2);
    let tasks: Vec<TaskId> = (0..3).map(|worker| fleet.open_task_of(worker)).collect();
    fleet.kill_coordinator();
    fleet.run_for(Duration::from_millis(100));
    fleet.start_coordinator();
    assert!(fleet.noticed(|n| *n == Notice::TakenUp { round: 1, held: 2, open: 1 }));
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).iter().map(|entry| entry.task).collect::<Vec<_>>(), tasks, "the same tasks");
    assert!(fleet.workers.iter().all(|worker| worker.trained == 2), "nobody trained again");
    assert_eq!(fleet.facts(|event| matches!(event, Event::Held { .. })), 3 + 3 + 3 + 3, "nothing was sent again");
    assert_eq!(fleet.model(), model_of(2));
    fleet.check_replay();
}

#[test]
fn of_what_was_held_only_what_is_damaged_is_asked_for_again() {
    let mut fleet = two_of_three_held(1);
    let (damaged, whole) = (fleet.open_task_of(0), fleet.open_task_of(1));
    fleet.kill_coordinator();
    fleet.damage_payload(damaged);
    fleet.start_coordinator();
    fleet.run_to_end();
    let held = |task| fleet.facts(|event| matches!(event, Event::Held { task: of, .. } if *of == task));
    assert_eq!((held(damaged), held(whole)), (2, 1));
    assert_eq!(fleet.workers[0].trained, 1, "it had kept its copy");
    assert_eq!(fleet.model(), model_of(1));
}

#[test]
fn who_is_asked_again_after_the_deadline_is_waited_for_and_named() {
    let mut fleet = Fleet::new(with(plan(3, 1), |p| (p.rounds.quorum, p.rounds.deadline) = (0.6, Some(secs(2)))), 3);
    fleet.workers[2].train_time = secs(100);
    fleet.run_until(|fleet| fleet.facts(|event| matches!(event, Event::Held { .. })) == 2);
    assert_eq!(fleet.stage(), Stage::Surveying);
    let damaged = fleet.open_task_of(0);
    fleet.kill(0);
    fleet.kill_coordinator();
    fleet.damage_payload(damaged);
    fleet.start_coordinator();
    fleet.run_for(secs(30));
    let paused = Notice::Paused(Pause::Waiting(vec![fleet.workers[0].name.clone()]));
    assert!(fleet.noticed(|notice| *notice == paused), "{:?}", fleet.status());
    fleet.revive(0);
    fleet.workers[2].train_time = secs(1);
    fleet.run_to_end();
}

#[test]
fn a_closed_round_is_finished_after_a_restart_also_if_a_payload_must_come_again() {
    for damaged in [false, true] {
        let mut fleet = Fleet::new(exact(3, 2), 3);
        fleet.step_time = secs(1);
        fleet.run_until(|fleet| fleet.stage() == Stage::Committing);
        let task = fleet.open_task_of(1);
        fleet.kill_coordinator();
        if damaged {
            fleet.damage_payload(task);
        }
        fleet.start_coordinator();
        assert_eq!(fleet.stage(), Stage::Committing);
        fleet.run_to_end();
        assert_eq!(fleet.facts(|event| matches!(event, Event::Lost { .. })), usize::from(damaged));
        assert_eq!(fleet.model(), model_of(2));
        fleet.check_receipts();
    }
}

#[test]
fn work_that_was_not_wholly_given_out_when_the_power_went_begins_anew() {
    let mut fleet = Fleet::new(exact(3, 2), 3);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.restore_backup(|event| matches!(event, Event::Assigned { round: 1, .. }));
    fleet.start_coordinator();
    fleet.run_to_end();
    assert_eq!(fleet.facts(|event| *event == Event::Voided), 1);
    assert_eq!(fleet.model(), model_of(2));
}

#[test]
fn damaged_models_are_made_again_of_the_same_updates() {
    for (rounds_back, payloads_too) in [(1, false), (2, false), (1, true), (2, true)] {
        let mut fleet = Fleet::new(exact(3, 5), 3);
        fleet.run_until(|fleet| fleet.rounds() == 3 && fleet.stage() == Stage::Training);
        if payloads_too {
            fleet.cut_power(100);
        } else {
            fleet.kill_coordinator();
        }
        fleet.damaged = rounds_back;
        fleet.start_coordinator();
        fleet.run_to_end();
        assert_eq!(fleet.facts(|event| matches!(event, Event::Redone { .. })), rounds_back as usize);
        assert_eq!(fleet.model(), model_of(5), "{rounds_back} back");
        assert_eq!(fleet.rounds(), 5);
        fleet.check_receipts();
        fleet.check_replay();
    }
}

#[test]
fn while_a_round_is_made_again_nobody_is_told_to_delete_what_it_may_be_asked_for() {
    let mut fleet = Fleet::new(exact(3, 4), 3);
    fleet.sync_time = secs(1);
    fleet.run_until(|fleet| fleet.rounds() == 2);
    fleet.run_for(Duration::from_millis(1000));
    let receipts = fleet.receipts_said;
    fleet.kill_coordinator();
    (fleet.damaged, fleet.step_time) = (1, secs(5));
    fleet.start_coordinator();
    fleet.run_for(secs(3));
    assert_eq!((fleet.stage(), fleet.receipts_said), (Stage::Committing, receipts));
    fleet.run_to_end();
    assert_eq!(fleet.model(), model_of(4));
}

#[test]
fn a_coordinator_that_dies_while_it_makes_models_again_goes_on_with_that() {
    let mut fleet = Fleet::new(exact(3, 4), 3);
    fleet.run_until(|fleet| fleet.rounds() == 3 && fleet.stage() == Stage::Training);
    fleet.kill_coordinator();
    fleet.damaged = 2;
    fleet.step_time = Duration::from_millis(200);
    fleet.start_coordinator();
    fleet.run_until(|fleet| fleet.facts(|event| matches!(event, Event::Redone { round: 2 })) == 1);
    fleet.run_for(Duration::from_millis(50));
    fleet.kill_coordinator();
    fleet.damaged = 1;
    fleet.start_coordinator();
    fleet.run_to_end();
    assert_eq!(fleet.facts(|event| matches!(event, Event::Reverted { .. })), 1, "it knew");
    assert_eq!(fleet.facts(|event| matches!(event, Event::Redone { round: 2 })), 1);
    assert_eq!(fleet.model(), model_of(4));
}

#[test]
fn who_is_revoked_while_models_are_made_again_is_not_waited_for_afterwards() {
    let mut fleet = Fleet::new(with(plan(3, 4), |p| p.rounds.quorum = 0.6), 3);
    let worker = fleet.workers[0].id;
    fleet.run_until(|fleet| fleet.rounds() == 1 && fleet.stage() == Stage::Training);
    fleet.kill_coordinator();
    (fleet.damaged, fleet.step_time) = (1, secs(5));
    fleet.start_coordinator();
    fleet.run_for(secs(3));
    assert_eq!(fleet.stage(), Stage::Committing);
    fleet.inject(Input::Revoked { worker });
    let withdrawn = |e: &Event| matches!(e, Event::Withdrawn { why: Withdrawal::Left, .. });
    let before = fleet.facts(withdrawn);
    fleet.kill(0);
    fleet.run_until(|fleet| fleet.facts(|e| matches!(e, Event::Redone { .. })) == 1);
    assert_eq!(fleet.facts(withdrawn), before + 1);
    let began = fleet.now();
    fleet.run_until(|fleet| fleet.rounds() == 2);
    assert!(fleet.now() - began < secs(100), "{:?}", fleet.now() - began);
}

#[test]
fn who_came_back_while_models_were_made_again_is_then_given_its_open_task() {
    let mut fleet = Fleet::new(exact(3, 4), 3);
    fleet.run_until(|fleet| fleet.rounds() == 2 && fleet.stage() == Stage::Training);
    (0..3).for_each(|worker| fleet.kill(worker));
    fleet.kill_coordinator();
    (fleet.damaged, fleet.step_time) = (1, secs(1));
    fleet.start_coordinator();
    (0..3).for_each(|worker| fleet.revive(worker));
    fleet.run_for(secs(5));
    assert_eq!(fleet.facts(|event| matches!(event, Event::Redone { .. })), 1);
    fleet.run_to_end();
    assert!(fleet.now() < secs(20), "nothing had to time out");
    assert_eq!(fleet.model(), model_of(4));
}

#[test]
fn who_comes_while_the_last_model_of_a_run_that_is_over_is_made_again_is_let_go_then() {
    let mut fleet = Fleet::new(exact(3, 2), 3);
    fleet.run_to_end();
    fleet.kill_coordinator();
    (fleet.damaged, fleet.step_time) = (1, secs(1));
    fleet.start_coordinator();
    let late = fleet.add_worker();
    fleet.run_for(secs(5));
    assert_eq!(fleet.workers[late].ending, Some(Ending::Finished { model_hash: fleet.model() }));
}

#[test]
fn a_model_that_was_restored_ends_the_making_of_it() {
    let mut fleet = Fleet::new(exact(3, 4), 3);
    fleet.run_until(|fleet| fleet.rounds() == 2 && fleet.stage() == Stage::Training);
    fleet.kill_coordinator();
    (fleet.damaged, fleet.step_time) = (1, secs(100));
    fleet.start_coordinator();
    fleet.run_for(secs(1));
    assert_eq!(fleet.stage(), Stage::Committing);
    fleet.kill_coordinator();
    fleet.step_time = Duration::from_millis(2);
    fleet.start_coordinator();
    assert_eq!(fleet.stage(), Stage::Training, "round 3 was open before");
    fleet.run_to_end();
    assert_eq!(fleet.model(), model_of(4));
}

#[test]
fn the_same_updates_that_give_another_model_stop_the_coordinator() {
    let mut fleet = Fleet::new(exact(3, 4), 3);
    fleet.run_until(|fleet| fleet.rounds() == 2 && fleet.stage() == Stage::Training);
    fleet.kill_coordinator();
    (fleet.damaged, fleet.warped) = (1, true);
    fleet.start_coordinator();
    fleet.run_for(secs(30));
    assert_eq!(fleet.conflict, Some(2));
    assert_eq!(fleet.facts(|event| matches!(event, Event::Redone { .. } | Event::Committed { .. })), 2);
}

#[test]
fn an_aborted_run_is_still_aborted_after_a_restart() {
    let mut fleet = two_of_three_held(2);
    fleet.inject(Input::Abort);
    fleet.run_for(secs(1));
    fleet.kill_coordinator();
    fleet.start_coordinator();
    assert_eq!(fleet.stage(), Stage::Aborted);
    fleet.run_for(secs(30));
    assert!(fleet.workers.iter().all(|worker| worker.ending == Some(Ending::Aborted)));
}

fn over_selecting() -> crate::plan::Plan {
    with(exact(10, 12), |p| (p.rounds.fraction, p.rounds.over_select) = (0.5, 0.3))
}

#[test]
fn an_over_selected_round_ends_with_the_updates_it_wants_and_tells_the_rest_that_they_are_late() {
    let mut fleet = Fleet::new(over_selecting(), 10);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.workers[4].train_time = secs(600);
    let began = fleet.now();
    fleet.run_until(|fleet| fleet.rounds() == 12);
    assert!(fleet.now() - began < secs(20), "nobody waited for the slow one");
    for round in 1..=12 {
        assert!((5..=7).contains(&fleet.entries(round).len()));
        let given = |event: &Event| matches!(event, Event::Assigned { round: of, kind: TaskKind::Update, .. } if *of as usize == round);
        assert_eq!(fleet.facts(given), 7, "ceil(5 x 1.3) are selected");
    }
    assert!(fleet.facts(|event| matches!(event, Event::Withdrawn { why: Withdrawal::Late, .. })) > 0);
    assert!(fleet.said(|message| matches!(message, ToWorker::Late { .. })));
    assert!(fleet.workers[4].cancelled > 0 && fleet.workers[4].is_alive(), "it is told, and costs nothing more");
}

#[test]
fn who_was_late_is_not_passed_over_the_next_time() {
    let rounds = 400;
    let mut fleet = Fleet::new(with(over_selecting(), |p| p.learning.train.rounds = rounds), 10);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.workers[4].train_time = secs(600);
    fleet.run_until(|fleet| fleet.rounds() == rounds);
    let selected = |worker: usize| {
        let id = fleet.workers[worker].id;
        fleet.facts(|e| matches!(e, Event::Assigned { round: 1.., worker, .. } if *worker == id))
    };
    // Seven of ten each time: 280 of 400, with a standard deviation of 9.2.
    assert!(selected(4).abs_diff(280) < 37, "the slow one was selected {} times", selected(4));
}

#[test]
fn while_the_disk_is_full_nobody_is_late() {
    let plan = || with(plan(3, 1), |p| (p.rounds.quorum, p.rounds.deadline) = (0.5, Some(secs(10))));
    let mut fleet = Fleet::new(plan(), 3);
    fleet.workers[2].train_time = secs(25);
    fleet.run_until(|fleet| fleet.stage() == Stage::Training);
    fleet.run_for(secs(5));
    fleet.inject(Input::DiskFull);
    assert_eq!(fleet.status().paused, Some(Pause::DiskFull.to_string()));
    fleet.run_for(secs(15));
    fleet.inject(Input::DiskBack);
    assert_eq!(fleet.status().paused, None);
    fleet.run_to_end();
    assert_eq!(fleet.entries(1).len(), 3);
    let seconds = fleet.seconds();
    assert!((9.0..13.0).contains(&seconds), "the pause is not counted: {seconds}");
}
