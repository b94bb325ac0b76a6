//! The control socket: how `coordinator invite`, `workers`, `revoke`, `status` and `abort` speak to the live one.
//!
//! One JSON object a line, a request and its answer, over `DIR/control.sock` (mode 0600, in a directory of mode 0700).
//! With no live coordinator the first three take the state's lock and act on the state, and the others say that
//! nothing runs.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use protocol::federation::Stage;
use protocol::ids::WorkerId;
use protocol::invitation::Invitation;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::enrol::{InvitationWish, Registrar, RegistrarError, RegistrarHandle};
use crate::registry::Worker;
use crate::show::StatusPage;
use crate::state::{StateDir, StateError, read_small};

/// The longest request, in bytes.
const REQUEST_BYTES_MAX: u64 = 64 * 1024;

/// The longest answer, in bytes: every worker that there may be.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// How long one side waits for the other.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How many are served at once.
const SERVED_MAX: usize = 8;

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// For an invitation.
    Invite {
        /// `HOST` or `HOST:PORT`; none for where it listens.
        addresses: Vec<String>,
        /// How many workers.
        uses: u32,
        /// For how long.
        expires_s: u64,
    },
    /// For the workers.
    Workers,
    /// To shut a worker out.
    Revoke {
        /// Its name.
        worker: String,
    },
    /// What it is doing.
    Status,
    /// To give the run up.
    Abort,
}

/// What is answered.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The invitation's text.
    Invitation(String),
    /// The workers, by name.
    Workers(Vec<WorkerRow>),
    /// Who is shut out now.
    Revoked(String),
    /// The status page.
    Status(serde_json::Value),
    /// The run is given up.
    Aborting,
    /// It cannot be done: a sentence for a person.
    Error(String),
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Invitation(_) => f.write_str("Invitation([redacted])"),
            Self::Workers(rows) => f.debug_tuple("Workers").field(rows).finish(),
            Self::Revoked(name) => f.debug_tuple("Revoked").field(name).finish(),
            Self::Status(page) => f.debug_tuple("Status").field(page).finish(),
            Self::Aborting => f.write_str("Aborting"),
            Self::Error(sentence) => f.debug_tuple("Error").field(sentence).finish(),
        }
    }
}

/// A worker, as a list shows it.
#[derive(Debug, Serialize, Deserialize)]
pub struct WorkerRow {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: WorkerId,
    /// `enrolled`, `connected`, `busy` or `revoked`.
    pub state: String,
}

/// What an operator asks of the event loop.
#[derive(Debug)]
pub enum Command {
    /// A worker was shut out: close its connections.
    Revoked(WorkerId),
    /// Give the run up.
    Abort,
}

/// Why a command came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nothing runs, and the command makes sense only for something that does.
    #[error("{}: no coordinator runs here", path.display())]
    NothingRuns {
        /// The state directory.
        path: std::path::PathBuf,
    },
    /// Nothing is there to act on.
    #[error("{}: no coordinator has run here; give the --state that it was started with", path.display())]
    NoState {
        /// Where its state would be.
        path: std::path::PathBuf,
    },
    /// The socket is there and does not answer.
    #[error("{}: the coordinator does not answer: {source}", path.display())]
    Silent {
        /// The socket.
        path: std::path::PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// The state cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The registrar cannot do it.
    #[error(transparent)]
    Registrar(#[from] RegistrarError),
}

/// Asks the live coordinator of `state`, or acts on the state if there is none.
///
/// # Errors
/// Why it came to nothing.
pub fn ask(state: &Path, request: &Request) -> Result<Answer, ControlError> {
    let path = state.join("control.sock");
    let answer = match StdUnixStream::connect(&path) {
        Ok(stream) => exchange(stream, request).map_err(|source| ControlError::Silent { path, source })?,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            act(state, request)?
        }
        Err(source) => return Err(ControlError::Silent { path, source }),
    };
    match answer {
        Answer::Error(sentence) => Err(ControlError::Refused(sentence)),
        answer => Ok(answer),
    }
}

fn exchange(mut stream: StdUnixStream, request: &Request) -> io::Result<Answer> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream).take(ANSWER_BYTES_MAX).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// Does what can be done without a live coordinator.
fn act(state: &Path, request: &Request) -> Result<Answer, ControlError> {
    if matches!(request, Request::Status | Request::Abort) {
        return Err(ControlError::NothingRuns { path: state.to_owned() });
    }
    // An invitation may be written before the first start; there is nobody to list or to shut out yet.
    if !matches!(request, Request::Invite { .. }) && !state.exists() {
        return Err(ControlError::NoState { path: state.to_owned() });
    }
    let state = StateDir::open(state)?;
    let mut registrar = Registrar::open(&state)?;
    match request {
        Request::Invite { addresses, uses, expires_s } => {
            let wish = wish(addresses, *uses, *expires_s);
            Ok(Answer::Invitation(registrar.invite(&wish, former_address(&state)?)?.to_string()))
        }
        Request::Revoke { worker } => Ok(Answer::Revoked(registrar.revoke(worker)?.name.to_string())),
        _ => Ok(Answer::Workers(rows(&registrar.workers(), &StatusPage::default()))),
    }
}

/// Where the coordinator listened last, as far as workers on this machine were told: its port counts.
fn former_address(state: &StateDir) -> Result<Option<SocketAddr>, StateError> {
    let Some(bytes) = read_small(&state.file("join"))? else { return Ok(None) };
    let former = String::from_utf8_lossy(&bytes).parse::<Invitation>().ok();
    let address = former.and_then(|former| former.addresses.first()?.parse::<SocketAddr>().ok());
    // Loopback is where this machine was told to look; it says nothing to others.
    Ok(address.map(|address| if address.ip().is_loopback() { unspecified(address) } else { address }))
}

fn unspecified(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(std::net::Ipv4Addr::UNSPECIFIED.into(), address.port())
}

fn wish(addresses: &[String], uses: u32, expires_s: u64) -> InvitationWish {
    InvitationWish { addresses: addresses.to_vec(), uses, expires: Some(Duration::from_secs(expires_s)) }
}

fn rows(workers: &[Worker], status: &StatusPage) -> Vec<WorkerRow> {
    let live = status.status.as_ref().map(|status| &status.workers[..]).unwrap_or_default();
    let state = |worker: &Worker| match live.iter().find(|(name, _)| *name == worker.name) {
        _ if worker.revoked => "revoked",
        Some((_, true)) => "busy",
        Some((_, false)) => "connected",
        None => "enrolled",
    };
    let row =
        |worker: &Worker| WorkerRow { name: worker.name.to_string(), id: worker.id, state: state(worker).to_owned() };
    workers.iter().map(row).collect()
}

/// What the socket's side of the coordinator needs.
#[derive(Clone, Debug)]
pub struct Desk {
    /// Who decides on membership.
    pub registrar: RegistrarHandle,
    /// What the event loop is doing.
    pub status: watch::Receiver<StatusPage>,
    /// Where it is asked.
    pub commands: mpsc::Sender<Command>,
    /// Where workers come in.
    pub listen: SocketAddr,
}

/// Takes the socket's place. Who holds the state's lock may remove what a former coordinator left there.
///
/// # Errors
/// If the operating system refuses.
pub fn bind(state: &StateDir) -> Result<UnixListener, StateError> {
    let path = state.file("control.sock");
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(StateError::io(&path, "replace")(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => StateError::LongForSocket { path: path.clone() },
        _ => StateError::io(&path, "listen on")(error),
    })?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&path, private).map_err(StateError::io(&path, "make private"))?;
    Ok(listener)
}

/// Serves for as long as it is polled.
pub async fn serve(listener: UnixListener, desk: Desk) {
    let permits = std::sync::Arc::new(Semaphore::new(SERVED_MAX));
    loop {
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the control socket does not accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let desk = desk.clone();
        tokio::spawn(async move {
            let served = tokio::time::timeout(TIMEOUT, desk.serve(stream)).await;
            if let Ok(Err(error)) = served {
                tracing::debug!(%error, "a control request was cut off");
            }
            drop(permit);
        });
    }
}

impl Desk {
    async fn serve(&self, stream: UnixStream) -> io::Result<()> {
        let (read, mut write) = stream.into_split();
        let mut line = String::new();
        let mut read = tokio::io::BufReader::new(read.take(REQUEST_BYTES_MAX));
        read.read_line(&mut line).await?;
        let answer = match serde_json::from_str(&line) {
            Ok(request) => self.answer(request).await,
            Err(error) => Answer::Error(format!("not a request: {error}")),
        };
        let mut bytes = serde_json::to_vec(&answer)?;
        bytes.push(b'\n');
        write.write_all(&bytes).await
    }

    async fn answer(&self, request: Request) -> Answer {
        let answer = match request {
            Request::Invite { addresses, uses, expires_s } => {
                let wish = wish(&addresses, uses, expires_s);
                let made = self.registrar.invite(wish, self.listen).await;
                made.map(|invitation| Answer::Invitation(invitation.to_string()))
            }
            Request::Workers => {
                let workers = self.registrar.workers().await;
                workers.map(|workers| Answer::Workers(rows(&workers, &self.status.borrow())))
            }
            Request::Revoke { worker } => self.revoke(worker).await,
            Request::Status => Ok(Answer::Status(self.status.borrow().to_json())),
            Request::Abort if self.is_over() => Ok(Answer::Error("the run is over already".to_owned())),
            Request::Abort => self.command(Command::Abort).await.map(|()| Answer::Aborting),
        };
        answer.unwrap_or_else(|error| Answer::Error(error.to_string()))
    }

    fn is_over(&self) -> bool {
        let page = self.status.borrow();
        page.status.as_ref().is_some_and(|status| matches!(status.stage, Stage::Finished | Stage::Aborted))
    }

    async fn revoke(&self, name: String) -> Result<Answer, RegistrarError> {
        let worker = self.registrar.revoke(name).await?;
        self.command(Command::Revoked(worker.id)).await?;
        Ok(Answer::Revoked(worker.name.to_string()))
    }

    async fn command(&self, command: Command) -> Result<(), RegistrarError> {
        self.commands.send(command).await.map_err(|_| RegistrarError::Ending)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn without_a_live_coordinator_the_state_is_acted_on() {
        let home = tempfile::tempdir().unwrap();
        let invite = Request::Invite { addresses: vec!["192.0.2.7".into()], uses: 1, expires_s: 60 };
        let Answer::Invitation(text) = ask(home.path(), &invite).unwrap() else { panic!("no invitation") };
        assert_eq!(text.parse::<Invitation>().unwrap().addresses, ["192.0.2.7:4433"]);
        let Answer::Workers(workers) = ask(home.path(), &Request::Workers).unwrap() else { panic!("no list") };
        assert!(workers.is_empty());
        let revoke = Request::Revoke { worker: "nobody".into() };
        assert!(ask(home.path(), &revoke).unwrap_err().to_string().contains("no worker is called \"nobody\""));
        for request in [Request::Status, Request::Abort] {
            assert!(matches!(ask(home.path(), &request), Err(ControlError::NothingRuns { .. })));
        }
    }

    #[tokio::test]
    async fn a_state_directory_too_deep_for_a_socket_is_told_so() {
        let home = tempfile::tempdir().unwrap();
        let state = StateDir::open(&home.path().join("x".repeat(120))).unwrap();
        let refused = bind(&state).unwrap_err().to_string();
        assert!(refused.ends_with("give a shorter --state"), "{refused}");
    }

    #[tokio::test]
    async fn a_live_coordinator_answers_and_bad_requests_get_a_sentence() {
        let home = tempfile::tempdir().unwrap();
        let state = StateDir::open(home.path()).unwrap();
        let registrar = Registrar::open(&state).unwrap().spawn().unwrap();
        let (_page, status) = watch::channel(StatusPage::default());
        let (commands, mut orders) = mpsc::channel(4);
        let desk = Desk { registrar, status, commands, listen: "0.0.0.0:9".parse().unwrap() };
        let server = tokio::spawn(serve(bind(&state).unwrap(), desk));
        let path = home.path().to_owned();
        let (status, abort, invite) = tokio::task::spawn_blocking(move || {
            let invite = Request::Invite { addresses: vec![], uses: 1, expires_s: 60 };
            (ask(&path, &Request::Status), ask(&path, &Request::Abort), ask(&path, &invite))
        })
        .await
        .unwrap();
        assert!(matches!(status.unwrap(), Answer::Status(page) if page["listening"] == false));
        assert!(matches!(abort.unwrap(), Answer::Aborting));
        assert!(matches!(orders.recv().await, Some(Command::Abort)));
        assert!(invite.unwrap_err().to_string().contains("give --address HOST"));

        let mut stream = UnixStream::connect(home.path().join("control.sock")).await.unwrap();
        stream.write_all(b"{\"command\":\"dance\"}\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("{\"error\":\"not a request"), "{answer}");
        server.abort();
    }
}
