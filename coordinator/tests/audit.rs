//! `coordinator audit`, as a person types it.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

fn coordinator(state: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
    command.args(args).arg("--state").arg(state).output().unwrap()
}

#[test]
fn an_audit_prints_what_happened_and_fails_where_it_is_damaged() {
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state");
    let early = coordinator(&state, &["audit"]);
    assert_eq!(early.status.code(), Some(1));
    assert!(String::from_utf8(early.stderr).unwrap().contains("no coordinator has run here"));
    assert!(!state.exists(), "an audit makes nothing");
    for _ in 0..2 {
        assert!(coordinator(&state, &["invite", "--address", "h"]).status.success());
    }
    let whole = coordinator(&state, &["audit", "--verify"]);
    assert!(whole.status.success());
    let told = String::from_utf8(whole.stdout).unwrap();
    assert!(told.ends_with("the chain of the registry is whole: 2 records in 1 part\n"), "{told}");
    let lines = String::from_utf8(coordinator(&state, &["audit", "--json"]).stdout).unwrap();
    assert_eq!(lines.lines().filter(|line| line.contains("\"event\":\"invited\"")).count(), 2, "{lines}");

    let file = state.join("registry-journal-000001");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[130] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let damaged = coordinator(&state, &["audit"]);
    assert_eq!(damaged.status.code(), Some(1));
    let error = String::from_utf8(damaged.stderr).unwrap();
    assert!(error.contains("registry-journal-000001: damaged at offset 100: "), "{error}");
}
