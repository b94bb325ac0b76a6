//! What a person types beside running: `invite`, `workers`, `revoke`, `status`, `abort`, `audit`; and Ctrl-C.

use std::future::Future;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};

use crate::audit::{AuditError, audit};
use crate::cli::{Command, InviteArgs};
use crate::control::{Answer, ControlError, Request, WorkerRow, ask};
use crate::state::{StateError, write_durably};

/// The exit status of who was ended by a signal is this and the signal's number, as shells have it.
const KILLED_BY: i32 = 128;

/// Why a command came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Nobody can do it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The invitation cannot be written.
    #[error(transparent)]
    Write(#[from] StateError),
    /// The invitation may not be written there.
    #[error("{}: not writable; give another file with --out", path.display())]
    Out {
        /// The file.
        path: PathBuf,
    },
    /// Nobody reads what is printed.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
    /// The audit came to nothing, or found something.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The answer is to another question.
    #[error("the coordinator answers something else than was asked; is it of another version?")]
    Confused,
}

/// Does what a command says, and prints what came of it.
///
/// # Errors
/// Why it came to nothing.
pub fn execute(state: &Path, command: &Command) -> Result<(), OrderError> {
    if let Command::Audit(args) = command {
        return Ok(audit(state, args, &mut BufWriter::new(io::stdout().lock()))?);
    }
    let answer = ask(state, &request(command).ok_or(OrderError::Confused)?)?;
    let mut out = io::stdout().lock();
    match (command, answer) {
        (Command::Invite(InviteArgs { out: Some(path), .. }), Answer::Invitation(text)) => write_out(path, &text)?,
        (Command::Invite(_), Answer::Invitation(text)) => writeln!(out, "{text}")?,
        (Command::Workers, Answer::Workers(workers)) => out.write_all(table(&workers).as_bytes())?,
        (Command::Revoke { .. }, Answer::Revoked(name)) => writeln!(out, "{name} is shut out")?,
        (Command::Status, Answer::Status(page)) => writeln!(out, "{page}")?,
        (Command::Abort, Answer::Aborting) => writeln!(out, "the run is given up")?,
        _ => return Err(OrderError::Confused),
    }
    Ok(())
}

/// What the live coordinator is asked; nothing for what needs none.
fn request(command: &Command) -> Option<Request> {
    Some(match command {
        Command::Invite(invite) => Request::Invite {
            addresses: invite.addresses.clone(),
            uses: invite.uses,
            expires_s: invite.expires.as_secs(),
        },
        Command::Workers => Request::Workers,
        Command::Revoke { worker } => Request::Revoke { worker: worker.clone() },
        Command::Status => Request::Status,
        Command::Abort => Request::Abort,
        Command::Audit(_) => return None,
    })
}

fn write_out(path: &Path, text: &str) -> Result<(), OrderError> {
    write_durably(path, format!("{text}\n").as_bytes()).map_err(|error| match error {
        StateError::NotWritable { .. } => OrderError::Out { path: path.to_owned() },
        other => other.into(),
    })?;
    let mut err = io::stderr().lock();
    Ok(writeln!(err, "the invitation is in {0}; give it to the worker with --join @{0}", path.display())?)
}

fn table(workers: &[WorkerRow]) -> String {
    if workers.is_empty() {
        return "no worker is enrolled\n".to_owned();
    }
    let width = workers.iter().map(|worker| worker.name.len()).max().unwrap_or(0);
    let line = |worker: &WorkerRow| format!("{:width$}  {:9}  {}\n", worker.name, worker.state, worker.id);
    workers.iter().map(line).collect()
}

/// Resolves at the first Ctrl-C, SIGTERM, or SIGHUP of a terminal that was closed; a second one ends the process at
/// once. Who started it with `nohup` wants it to outlive its terminal.
///
/// # Errors
/// If the operating system does not tell of signals.
pub fn interrupted() -> io::Result<impl Future<Output = ()>> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut hang_up = if ignores_hang_up() { None } else { Some(signal(SignalKind::hangup())?) };
    let (first, told) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            let hung_up = async {
                match &mut hang_up {
                    Some(signal) => signal.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = interrupt.recv() => SignalKind::interrupt(),
                _ = terminate.recv() => SignalKind::terminate(),
                _ = hung_up => SignalKind::hangup(),
            }
        };
        next().await;
        // The coordinator may be ending by itself.
        let _ = first.send(());
        std::process::exit(KILLED_BY + next().await.as_raw_value());
    });
    Ok(async {
        if told.await.is_err() {
            std::future::pending().await
        }
    })
}

/// Whether whoever started this process told it not to mind SIGHUP. Where nothing says so, nobody did.
fn ignores_hang_up() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| is_ignored(&status, SignalKind::hangup()))
}

/// Whether a signal is in the mask of those that are ignored.
fn is_ignored(status: &str, signal: SignalKind) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal.as_raw_value() - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::ids::WorkerId;

    #[test]
    fn who_is_started_with_nohup_does_not_mind_its_terminal() {
        let status = |mask: &str| format!("Name:\tcoordinator\nSigBlk:\tffffffffffffffff\nSigIgn:\t{mask}\n");
        assert!(is_ignored(&status("0000000000001001"), SignalKind::hangup()));
        assert!(!is_ignored(&status("0000000000001000"), SignalKind::hangup()));
        assert!(!is_ignored("", SignalKind::hangup()));
    }

    #[test]
    fn workers_are_listed_in_columns() {
        let row = |name: &str, state: &str| WorkerRow { name: name.into(), id: WorkerId([1; 16]), state: state.into() };
        let id = "01".repeat(16);
        let expected = format!("a        busy       {id}\nshard-2  revoked    {id}\n");
        assert_eq!(table(&[row("a", "busy"), row("shard-2", "revoked")]), expected);
        assert_eq!(table(&[]), "no worker is enrolled\n");
    }
}
