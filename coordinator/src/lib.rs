//! The coordinator: the shell around the [`Federation`] machine.
//!
//! [`run`] takes a state directory and a plan and trains one run, until it is over or somebody says stop. The event
//! loop is [`fleet`] around [`mod@core`]; beside it: who may come ([`enrol`], [`registry`]), what connections do
//! ([`conn`], [`intake`]), tensors and disk ([`workshop`], [`store`], [`state`]), what people type ([`cli`], [`config`],
//! [`control`]) and see ([`show`], [`telemetry`], [`http`]). Many coordinators can live in one process: nothing here is
//! global.

pub mod audit;
pub mod cli;
pub mod config;
pub mod conn;
pub mod control;
pub mod core;
pub mod crash;
pub mod crew;
pub mod enrol;
pub mod fleet;
pub mod folding;
pub mod http;
pub mod intake;
pub mod orders;
pub mod registry;
pub mod show;
pub mod state;
pub mod store;
pub mod telemetry;
mod vigil;
pub mod workshop;

use std::future::Future;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use learning::{DESCRIPTION_FILE, Schema};
use protocol::federation::{Federation, Input, Summary};
use protocol::ids::{Hash, RunId, Time};
use protocol::invitation::Invitation;
use protocol::layout::from_bytes;
use protocol::plan::{Durability, LearningPlan, Plan};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use transport::{CloseCode, ResetKeys, Server, ServerOptions, SetupError, Taps, TlsIdentity};

use crate::cli::RunSettings;
use crate::conn::{Acquaintances, Door, FromConn, Patience};
use crate::control::{Command, Desk};
use crate::enrol::{Registrar, RegistrarError, write_invitation};
pub use crate::fleet::Outcome;
use crate::fleet::{Fleet, FleetError, Inbox, World, fresh_spool};
use crate::intake::Spools;
use crate::show::{Look, Show, StatusPage};
use crate::state::{StateDir, StateError};
use crate::store::{Disks, Loaded, ModelState, OpenedRun, RunError, open_run, real_disks};
use crate::telemetry::{Telemetry, lossy};
use crate::workshop::{Done, Workshop, WorkshopError, write_model};

/// Events of connections that may wait for the loop.
const EVENTS_MAX: usize = 1024;

/// Orders that may wait for the loop.
const ORDERS_MAX: usize = 16;

/// How often the server's certificate, which is good for 90 days, is made anew.
const RENEW_EVERY: Duration = Duration::from_secs(24 * 3600);

/// How long the endpoint may take to tell its peers that it is gone.
const IDLE_MAX: Duration = Duration::from_secs(2);

/// How to run.
pub struct Options {
    /// What was typed, checked.
    pub settings: RunSettings,
    /// Where workers on this machine look for an invitation, beside the state directory.
    pub default_join: Option<PathBuf>,
    /// Where JSON lines go, if a program reads.
    pub json: Option<Box<dyn Write + Send>>,
    /// How a person is told.
    pub look: Look,
    /// Whether the runtime's threads are the coordinator's own, and may rest a moment while nothing but keep-alives come.
    pub leisure: bool,
    /// For tests: no flag and no variable sets it.
    pub taps: Taps,
    /// For tests and benchmarks: the disk that a run's store is on, if not the real one.
    pub disks: Option<Disks>,
    /// Told once workers can come in.
    pub listening: Option<oneshot::Sender<Bound>>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Options {
    /// Options without an audience, taps or a default place: for fleets in tests.
    #[must_use]
    pub fn quiet(settings: RunSettings) -> Self {
        let (default_join, json, disks, listening) = (None, None, None, None);
        let (look, leisure, taps) = (Look::Silent, false, Taps::default());
        Self { settings, default_join, json, look, leisure, taps, disks, listening }
    }
}

/// Where a coordinator can be found.
#[derive(Clone, Debug)]
pub struct Bound {
    /// Where workers come in.
    pub address: SocketAddr,
    /// Where `/metrics` is.
    pub http: SocketAddr,
    /// The invitation for workers on this machine.
    pub invitation: Invitation,
}

/// Why a coordinator ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is no run to go on with.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Keys, registry or authority cannot be used.
    #[error(transparent)]
    Registrar(#[from] RegistrarError),
    /// The UDP address cannot be had.
    #[error("--listen {address}: cannot listen there; give another address with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: SetupError,
    },
    /// The HTTP address cannot be had.
    #[error(transparent)]
    Http(#[from] http::BindError),
    /// What was saved makes no model, or a model cannot be written.
    #[error(transparent)]
    Workshop(#[from] WorkshopError),
    /// The operating system gives no thread or address.
    #[error("the operating system refuses: {0}")]
    System(#[from] std::io::Error),
    /// The run failed.
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

impl Error {
    /// 2 for misuse, 1 for everything else.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        if matches!(self, Self::Run(RunError::AnotherPlan { .. })) { 2 } else { 1 }
    }
}

/// Trains one run, until it is over or `shutdown` says so.
///
/// # Errors
/// Why it ended otherwise.
pub async fn run(mut options: Options, shutdown: impl Future<Output = ()>) -> Result<Outcome, Error> {
    let settings = options.settings.clone();
    let plan = settings.config.plan.clone();
    let state = StateDir::open(&settings.state)?;
    let registrar = Registrar::open(&state)?;
    let start = state.count_start()?;
    let disks = options.disks.take().unwrap_or_else(real_disks);
    let mut opened = open_run(&state, &plan, settings.new_run, settings.exit_when_done, &disks)?;
    let rounds = plan.learning.train.rounds;
    let mut show = Show::new(options.json.take(), options.look.clone(), rounds);
    for warning in &opened.loaded.warnings {
        show.say(&format!("warning: {warning}"));
    }
    let model_dir = state.file("model");
    if let Some(finished) = opened.finished.take() {
        write_if_missing(&model_dir, &finished.learning, &finished.summary, &finished.schema, finished.state.as_ref())?;
    }
    let machine = replay(plan.clone(), opened.run, &opened.loaded);
    if opened.loaded.whole.is_none() && machine.summary().finished.is_some() {
        tell_again(&mut show, &machine.summary(), &model_dir);
        return Ok(Outcome::Finished);
    }
    let telemetry = Telemetry::new();
    telemetry.metrics.starts.increment(start.into());
    let began = Began { state, registrar, opened, machine, start, show, telemetry, model_dir };
    began.run(options, plan, shutdown).await
}

/// The run as its journal has it.
fn replay(plan: Plan, run: RunId, loaded: &Loaded) -> Federation {
    let mut machine = Federation::new(plan, run);
    loaded.events.iter().for_each(|event| machine.apply(event));
    machine
}

/// A coordinator that has its state and does not listen yet.
struct Began {
    state: StateDir,
    registrar: Registrar,
    opened: OpenedRun,
    machine: Federation,
    start: u32,
    show: Show,
    telemetry: Telemetry,
    model_dir: PathBuf,
}

/// Everything that is listened on.
struct Sockets {
    server: Server,
    address: SocketAddr,
    http: TcpListener,
    http_address: SocketAddr,
    control: UnixListener,
}

impl Sockets {
    async fn bind(options: &Options, state: &StateDir, registrar: &Registrar) -> Result<Self, Error> {
        let http = http::bind(options.settings.http).await?;
        let server = bind(options, state, registrar)?;
        let (address, http_address) = (server.local_address()?, http.local_addr()?);
        Ok(Self { server, address, http, http_address, control: control::bind(state)? })
    }
}

impl Began {
    async fn run(mut self, options: Options, plan: Plan, shutdown: impl Future<Output = ()>) -> Result<Outcome, Error> {
        // What the store has loaded ends here: held on to, it would keep a model in memory that nobody needs.
        let OpenedRun { path, loaded, .. } = self.opened;
        let Loaded { store, schema, state, whole, lost, .. } = loaded;
        let mut machine = self.machine;
        machine.handle(Time(0), Input::Start { start: self.start, whole });
        for (task, hash) in lost {
            machine.handle(Time(0), Input::Lost { task, hash });
        }
        // Without a live coordinator, or by one that died before it wrote that down.
        for worker in self.registrar.workers().into_iter().filter(|worker| worker.revoked) {
            machine.handle(Time(0), Input::Revoked { worker: worker.id });
        }
        self.telemetry.metrics.state_bytes.set(lossy(store.bytes_on_disk()));
        let durable = plan.rounds.durability == Durability::Update;
        let (workshop, done) = Workshop::new(plan, store, self.model_dir, schema, state, self.telemetry.clone())?;
        check_model(machine.summary().model, workshop.model())?;
        let schema = workshop.schema();
        let workshop = workshop.spawn()?;
        let spools = Arc::new(Spools { run: path, rows: fresh_spool(self.state.file("spool"))?, durable });
        let sockets = Sockets::bind(&options, &self.state, &self.registrar).await?;
        let Sockets { address, http_address, .. } = sockets;
        let invitation = invite_locally(&mut self.registrar, &self.state, address)?;
        if let Some(place) = &options.default_join {
            invite_by_default(place, &invitation, &self.state).unwrap_or_else(|warning| self.show.say(&warning));
        }

        let Summary { figures, frozen, .. } = machine.summary();
        self.telemetry.restore(frozen.as_ref(), figures.as_ref());
        if let Some(figures) = &figures {
            self.show.round(figures);
        }
        self.show.listening(address, http_address, &machine.status());
        self.show.flush();
        if let Some(listening) = options.listening {
            // A caller that does not wait for it does not mind.
            let _ = listening.send(Bound { address, http: http_address, invitation });
        }
        let status = Some(machine.status());
        let (page, status) =
            watch::channel(StatusPage { address: Some(address), status, figures, ..StatusPage::default() });
        let helpers = Helpers::spawn(sockets, self.registrar, self.telemetry, status)?;
        let exit_when_done = options.settings.exit_when_done;
        let (door, show) = (Arc::clone(&helpers.door), self.show);
        let world = World { door, workshop, show, page, address, spools, schema, exit_when_done };
        let (inbox, helpers) = helpers.inbox(done);
        let outcome = lead(Fleet::new(machine, world), inbox, shutdown).await?;
        helpers.end().await;
        // The next start replaces it; a stale one only costs a failed connection.
        let _ = std::fs::remove_file(self.state.file("control.sock"));
        Ok(outcome?)
    }
}

/// Runs the event loop as a task among the others: one that is awaited in `block_on` is woken by a system call each time.
async fn lead(
    fleet: Fleet,
    inbox: Inbox,
    shutdown: impl Future<Output = ()>,
) -> Result<Result<Outcome, FleetError>, Error> {
    let (stop, stopped) = oneshot::channel::<()>();
    let mut tasks = JoinSet::new();
    tasks.spawn(fleet.run(inbox, async {
        if stopped.await.is_err() {
            std::future::pending().await
        }
    }));
    let ended = tokio::select! {
        ended = tasks.join_next() => ended,
        () = shutdown => {
            // A loop that has ended by itself is told nothing.
            let _ = stop.send(());
            tasks.join_next().await
        }
    };
    match ended {
        Some(Ok(outcome)) => Ok(outcome),
        Some(Err(error)) => Err(std::io::Error::from(error).into()),
        None => std::future::pending().await,
    }
}

/// The model that the journal names is the one that is there.
fn check_model(named: Option<Hash>, present: Option<Hash>) -> Result<(), WorkshopError> {
    if named == present { Ok(()) } else { Err(WorkshopError::OtherModel { named, present }) }
}

/// What runs beside the event loop.
struct Helpers {
    door: Arc<Door>,
    connections: mpsc::Receiver<FromConn>,
    commands: mpsc::Receiver<Command>,
    running: Running,
}

/// Ends what runs beside the event loop.
struct Running {
    door: Arc<Door>,
    /// Dropped, it ends HTTP in order.
    http: oneshot::Sender<()>,
    tasks: [JoinHandle<()>; 5],
}

impl Helpers {
    fn spawn(
        sockets: Sockets,
        registrar: Registrar,
        telemetry: Telemetry,
        status: watch::Receiver<StatusPage>,
    ) -> Result<Self, Error> {
        let Sockets { server, address, http, control, .. } = sockets;
        let identity = registrar.identity().clone();
        let registrar = registrar.spawn()?;
        let (events, connections) = mpsc::channel(EVENTS_MAX);
        let (orders, commands) = mpsc::channel(ORDERS_MAX);
        let desk = Desk { registrar: registrar.clone(), status: status.clone(), commands: orders, listen: address };
        let (listen, count) = (address.ip(), AtomicU64::new(0));
        let pages = telemetry.clone();
        let short_of_room = watch::Sender::new(0);
        let acquaintances = Acquaintances::default();
        let patience = Patience::default();
        let door = Door {
            server,
            identity,
            registrar,
            events,
            telemetry,
            listen,
            count,
            short_of_room,
            acquaintances,
            patience,
        };
        let door = Arc::new(door);
        let clock = Arc::clone(&door);
        let (end, ended) = oneshot::channel::<()>();
        let tasks = [
            tokio::spawn(Arc::clone(&door).open()),
            tokio::spawn(control::serve(control, desk)),
            tokio::spawn(renew(Arc::clone(&door))),
            tokio::spawn(async move { clock.patience.watch().await }),
            tokio::spawn(async move {
                // Sent or dropped: both mean the end.
                let ended = async { drop(ended.await) };
                if let Err(error) = http::serve(http, pages, status, ended).await {
                    tracing::warn!("metrics are not served any more: {error}");
                }
            }),
        ];
        let running = Running { door: Arc::clone(&door), http: end, tasks };
        Ok(Self { door, connections, commands, running })
    }

    fn inbox(self, workshop: mpsc::UnboundedReceiver<Done>) -> (Inbox, Running) {
        let Self { connections, commands, running, .. } = self;
        (Inbox { connections, workshop, commands }, running)
    }
}

impl Running {
    async fn end(self) {
        let Self { door, http, tasks } = self;
        drop(http);
        door.server.close(CloseCode::GoingAway, "");
        // Whoever has not heard it by then learns it from the silence.
        let _ = tokio::time::timeout(IDLE_MAX, door.server.wait_idle()).await;
        tasks.iter().for_each(JoinHandle::abort);
    }
}

// Else the keys below would be zeros, which anybody knows.
const _: () = assert!(ResetKeys::BYTES <= 64);

fn bind(options: &Options, state: &StateDir, registrar: &Registrar) -> Result<Server, Error> {
    let address = options.settings.listen;
    let secret = state.secret_64("quic.key")?;
    let (keys, _) = secret.split_first_chunk::<{ ResetKeys::BYTES }>().unwrap_or((&[0; ResetKeys::BYTES], &[]));
    let ca = registrar.authority().certificate().clone();
    let mut server = ServerOptions::new(address, ca, tls_identity(registrar)?, ResetKeys::from_bytes(keys));
    server.connections_max = options.settings.config.connections_max;
    server.strict_pq = options.settings.config.strict_pq;
    server.leisure = options.leisure;
    server.taps = options.taps.clone();
    Server::bind(server).map_err(|source| Error::Listen { address, source })
}

fn tls_identity(registrar: &Registrar) -> Result<TlsIdentity, RegistrarError> {
    let key = registrar.identity().signing.tls_key().map_err(enrol::key_error)?;
    Ok(TlsIdentity { certificate: registrar.certificate()?, key })
}

/// Writes the invitation for this machine to the state directory.
fn invite_locally(registrar: &mut Registrar, state: &StateDir, address: SocketAddr) -> Result<Invitation, Error> {
    let path = state.file("join");
    let invitation = registrar.invite_locally(&path, address)?;
    write_invitation(&path, &invitation)?;
    Ok(invitation)
}

/// Writes it to the user's default place, too. A service's user may have no home: that ends nothing, and is said.
fn invite_by_default(place: &Path, invitation: &Invitation, state: &StateDir) -> Result<(), String> {
    write_invitation(place, invitation).map_err(|error| {
        let why = match error {
            StateError::NotWritable { path } => format!("{}: not writable", path.display()),
            other => other.to_string(),
        };
        let join = state.file("join");
        let remedy = format!("start them with --join @{}", join.display());
        format!("warning: workers on this machine do not find this coordinator by themselves: {why}; {remedy}")
    })
}

/// Presents a fresh certificate every day.
async fn renew(door: Arc<Door>) {
    loop {
        tokio::time::sleep(RENEW_EVERY).await;
        let renewed = async {
            let certificate = door.registrar.certificate().await?;
            let key = door.identity.signing.tls_key().map_err(enrol::key_error)?;
            Ok::<_, RegistrarError>(TlsIdentity { certificate, key })
        };
        match renewed.await.map(|identity| door.server.set_identity(&identity)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("the server's certificate cannot be renewed: {error}"),
            Err(error) => tracing::warn!("the server's certificate cannot be renewed: {error}"),
        }
    }
}

/// Tells the result of a finished run again.
fn tell_again(show: &mut Show, last: &Summary, model_dir: &Path) {
    if let Some(figures) = &last.figures {
        show.round(figures);
    }
    if let (Some(evaluation), Some(model)) = (&last.finished, last.model) {
        show.done(last.round, evaluation, model, model_dir);
    }
    show.flush();
}

/// Writes the model of a finished run whose process ended between the last commit and the writing.
fn write_if_missing(
    directory: &Path,
    learning: &LearningPlan,
    last: &Summary,
    schema: &[u8],
    state: Option<&ModelState>,
) -> Result<(), Error> {
    let (Some(evaluation), Some(hash), Some(state)) = (last.finished, last.model, state) else { return Ok(()) };
    let description = state::read_small(&directory.join(DESCRIPTION_FILE))?.unwrap_or_default();
    if String::from_utf8_lossy(&description).contains(&hash.to_string()) {
        return Ok(());
    }
    let unusable = |error: String| Error::Workshop(WorkshopError::Unusable(error));
    let schema = Schema::from_bytes(schema).map_err(|error| unusable(error.to_string()))?;
    let weights = from_bytes(&state.model).ok_or_else(|| unusable("the model is cut".to_owned()))?;
    Ok(write_model(directory, &learning.model, schema, evaluation, weights)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_user_without_a_home_is_told_how_workers_are_started() {
        let home = tempfile::tempdir().unwrap();
        let state = StateDir::open(&home.path().join("state")).unwrap();
        let mut registrar = Registrar::open(&state).unwrap();
        let invitation = invite_locally(&mut registrar, &state, "127.0.0.1:4433".parse().unwrap()).unwrap();
        std::fs::write(home.path().join("file"), "").unwrap();
        let told = invite_by_default(&home.path().join("file/tributary/join"), &invitation, &state).unwrap_err();
        assert!(told.starts_with("warning: workers on this machine do not find"), "{told}");
        assert!(told.ends_with(&format!("; start them with --join @{}", state.file("join").display())), "{told}");
        let place = home.path().join("home/tributary/join");
        invite_by_default(&place, &invitation, &state).unwrap();
        assert_eq!(std::fs::read(place).unwrap(), std::fs::read(state.file("join")).unwrap());
    }
}
