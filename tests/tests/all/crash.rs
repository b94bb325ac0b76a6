//! Crash points: the coordinator dies exactly before and exactly after each step that must be durable before the next.
//!
//! `coordinator-crashing` is the coordinator with the feature `crash-points`; `make binaries` builds it. It aborts when it
//! passes a named point for the nth time. The ordinary binary takes over, on the same state and with the same workers, and
//! the run ends as if nothing had happened: with the same model, and a receipt for every update.

use std::process::Stdio;

use coordinator::crash::POINTS;
use tributary_tests::fleet::Undisturbed;
use tributary_tests::{Fleet, Running, ended_well, flights};

const ROWS: usize = 300;

/// A model whose payloads and checkpoints are attachments of the journal's records.
fn small() -> String {
    flights::config(4, 0)
}

/// Attachments, too, but of 64 KiB and more: the workshop's thread takes them in, and writes at once. What is taken in by
/// whoever gives it is mostly written with the round's commit, and not before.
fn written_at_once() -> String {
    flights::config(4, 400)
}

/// A model whose payloads, above 128 KiB, are files.
fn medium() -> String {
    flights::config(3, 600)
}

/// A model whose checkpoints, above a mebibyte, are files too. One step a round: its steps are not what this is about.
fn large() -> String {
    flights::config(2, 3400).replace("batch_size = 32", "batch_size = 256")
}

/// Brings the coordinator down at each of `passings` of `point`, and lets the run come to its end.
fn crashes_at(point: &str, passings: &[u32], config: &str, undisturbed: &Undisturbed) {
    for passing in passings {
        let at = format!("{point}:{passing}");
        let fleet = Fleet::new(config, flights::shards(ROWS));
        let workers = fleet.workers(&[]);
        let said = crashing(&fleet, &at).end();
        assert_eq!(said.code, None, "{at} is passed, and ends the process: {}", said.stderr);
        let said = ended_well(fleet.coordinator(&["--exit-when-done"]));
        assert_eq!(said.lines("done")[0]["model_hash"], undisturbed.model(), "{at}: {}", said.stderr);
        workers.into_iter().for_each(|worker| drop(ended_well(worker)));
        undisturbed.assert_every_update_is_receipted(fleet.home());
    }
}

fn crashing(fleet: &Fleet, at: &str) -> Running {
    let home = fleet.home();
    let mut command = home.command("coordinator-crashing");
    command.arg("--config").arg(home.path("run.toml")).args(["--listen", &home.address().to_string()]);
    command.args(["--json", "--exit-when-done"]).env("TRIBUTARY_CRASH_AT", at);
    Running::start(&format!("coordinator-crashing at {at}"), &mut command, Stdio::null())
}

/// Brings it down before and after `step`, at each of `passings`.
fn crashes_around(step: &str, passings: &[u32], config: &str, undisturbed: &Undisturbed) {
    let points: Vec<_> = POINTS.into_iter().filter(|point| point.split('.').next() == Some(step)).collect();
    assert_eq!(points.len(), 2, "{step}: {points:?}");
    points.into_iter().for_each(|point| crashes_at(point, passings, config, undisturbed));
}

#[test]
fn a_crash_around_each_step_of_a_round_changes_nothing() {
    let undisturbed = flights::undisturbed(&small(), ROWS);
    for step in ["commit", "commit-sync", "answer"] {
        // The first is before there are tasks, the third in the first rounds.
        crashes_around(step, &[1, 3], &small(), &undisturbed);
    }
    crashes_around("journal", &[1, 3, 5], &written_at_once(), &flights::undisturbed(&written_at_once(), ROWS));
}

#[test]
fn a_crash_around_the_keeping_of_a_payload_changes_nothing() {
    crashes_around("payload", &[2], &medium(), &flights::undisturbed(&medium(), ROWS));
}

#[test]
fn a_crash_around_the_writing_of_a_checkpoint_changes_nothing() {
    let undisturbed = flights::undisturbed(&large(), ROWS);
    for step in ["journal-sync", "checkpoint"] {
        crashes_around(step, &[2], &large(), &undisturbed);
    }
}
