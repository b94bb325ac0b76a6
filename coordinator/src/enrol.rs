//! The registrar: the one owner of the registry and the certificate authority.
//!
//! It is a thread of its own, because every change is on disk before anybody hears of it. Others hold a
//! [`RegistrarHandle`] and ask. An invitation is made here too: the registry remembers its token's hash before the
//! text leaves.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use certs::{Ca, CertError, CertificateDer, IdentityKey, KeyError, KeyFileError, SessionKey, keys};
use protocol::ids::WorkerId;
use protocol::invitation::{Invitation, InvitationError, check_addresses};
use protocol::messages::{EnrolAnswer, EnrolRefusal};
use protocol::sum::Ring;
use tokio::sync::{mpsc, oneshot};

use crate::registry::{Applicant, Fact, NoSuchWorker, Registry, RegistryJournal, Worker, identified};
use crate::state::{StateDir, StateError, read_small, write_durably};
use crate::store::StoreError;
use crate::store::disk::{Disk, RealDisk};

/// Questions that may wait for the registrar.
const QUESTIONS_MAX: usize = 256;

/// The port that workers are told where nobody said another.
const DEFAULT_PORT: u16 = 4433;

/// What the coordinator is known by.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The static key of the sealed session, which invitations pin.
    pub session: SessionKey,
    /// The key of the server's certificate and of receipts.
    pub signing: IdentityKey,
    /// SHA-256 of the certificate authority's certificate.
    pub ca_sha256: [u8; 32],
}

/// Who decides on membership.
#[derive(Debug)]
pub struct Registrar {
    ca: Ca,
    registry: Registry,
    journal: RegistryJournal,
    /// The state directory.
    path: PathBuf,
    identity: Identity,
}

/// Why the registrar cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistrarError {
    /// The state cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The registry cannot be read, or nothing can be kept in it.
    #[error("{}: {source}", path.display())]
    Registry {
        /// The state directory.
        path: PathBuf,
        /// Why.
        source: StoreError,
    },
    /// A key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// The server's key cannot be given to TLS.
    #[error("the signing key cannot be used: {0}")]
    TlsKey(KeyError),
    /// The authority cannot be used.
    #[error(transparent)]
    Authority(#[from] CertError),
    /// What should be told to workers is no address.
    #[error(transparent)]
    Address(#[from] InvitationError),
    /// Nobody said where workers reach the coordinator.
    #[error("the coordinator listens on {listen}, which says nothing to others; give --address HOST")]
    NoAddress {
        /// Where it listens.
        listen: String,
    },
    /// No such worker.
    #[error(transparent)]
    NoSuchWorker(#[from] NoSuchWorker),
    /// The operating system gave no entropy.
    #[error("cannot draw a token: {0}")]
    Entropy(#[from] getrandom::Error),
    /// The registrar is gone.
    #[error("the coordinator is ending")]
    Ending,
}

/// What an invitation is to say.
#[derive(Clone, Debug)]
pub struct InvitationWish {
    /// `HOST:PORT` or `HOST`; none for where the coordinator listens.
    pub addresses: Vec<String>,
    /// How many workers; 0 for as many as come.
    pub uses: u32,
    /// For how long.
    pub expires: Option<Duration>,
}

impl Registrar {
    /// Loads the authority, the keys and the registry of a state directory, or makes them at the first start.
    ///
    /// # Errors
    /// If something there cannot be used.
    pub fn open(state: &StateDir) -> Result<Self, RegistrarError> {
        let disk = RealDisk::new(state.path()).map_err(StateError::io(state.path(), "open"))?;
        Self::open_on(state, Box::new(disk))
    }

    fn open_on(state: &StateDir, disk: Box<dyn Disk>) -> Result<Self, RegistrarError> {
        let ca = Ca::load_or_create(state.path(), SystemTime::now())?;
        let identity = Identity {
            session: keys::load_or_create(&state.file("session.key"))?,
            signing: keys::load_or_create(&state.file("signing.key"))?,
            ca_sha256: ca.fingerprint(),
        };
        let path = state.path().to_owned();
        let unusable = |source| RegistrarError::Registry { path: path.clone(), source };
        let (journal, registry, torn) = RegistryJournal::open(disk).map_err(unusable)?;
        if let Some(torn) = torn {
            tracing::warn!("{}: {torn}", path.display());
        }
        Ok(Self { ca, registry, journal, path, identity })
    }

    /// What the coordinator is known by.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The authority.
    #[must_use]
    pub fn authority(&self) -> &Ca {
        &self.ca
    }

    /// The workers, by name.
    #[must_use]
    pub fn workers(&self) -> Vec<Worker> {
        let mut workers: Vec<Worker> = self.registry.workers().cloned().collect();
        workers.sort_by(|a, b| a.name.cmp(&b.name));
        workers
    }

    /// Decides on an applicant. The decision is durable when it is returned.
    ///
    /// # Errors
    /// If it cannot be kept or no certificate can be made: then nothing was decided.
    pub fn enrol(&mut self, applicant: &Applicant) -> Result<EnrolAnswer, RegistrarError> {
        let now = SystemTime::now();
        let (worker, fact) = match self.registry.enrol(applicant, Ring::weighted().weight_max) {
            Ok(decided) => decided,
            Err(refusal) => return Ok(EnrolAnswer::Refused(refusal)),
        };
        let certificate = match self.ca.issue_worker(&applicant.request.ed25519, now) {
            Ok(certificate) => certificate,
            Err(CertError::WeakKey) => return Ok(EnrolAnswer::Refused(EnrolRefusal::BadKey)),
            Err(error) => return Err(error.into()),
        };
        self.keep(fact)?;
        let expires_unix_s = unix_s(now) + certs::CERTIFICATE_DAYS * 86_400;
        Ok(EnrolAnswer::Granted { name: worker.name, certificate: certificate.to_vec(), expires_unix_s })
    }

    /// Makes an invitation that others may use; its token is remembered when this returns.
    ///
    /// # Errors
    /// If there is no address to tell, or it cannot be kept.
    pub fn invite(&mut self, wish: &InvitationWish, listen: Option<SocketAddr>) -> Result<Invitation, RegistrarError> {
        let addresses = told_addresses(&wish.addresses, listen)?;
        let mut token = [0; 16];
        getrandom::fill(&mut token)?;
        let now = unix_s(SystemTime::now());
        let expires_unix_s = wish.expires.map(|length| now.saturating_add(length.as_secs()));
        self.keep(Some(self.registry.invite(&token, wish.uses, expires_unix_s, now)))?;
        Ok(self.invitation(addresses, token, wish.uses, expires_unix_s, false))
    }

    /// The reusable invitation for workers on this machine, with the token that `path` had before if it is ours.
    ///
    /// # Errors
    /// If it cannot be kept.
    pub fn invite_locally(&mut self, path: &Path, listen: SocketAddr) -> Result<Invitation, RegistrarError> {
        let token = match self.former_token(path)? {
            Some(token) => token,
            None => {
                let mut token = [0; 16];
                getrandom::fill(&mut token)?;
                token
            }
        };
        self.keep(self.registry.invite_locally(&token, unix_s(SystemTime::now())))?;
        Ok(self.invitation(local_addresses(listen), token, 0, None, true))
    }

    /// Shuts a worker out; it is durable when this returns.
    ///
    /// # Errors
    /// If there is no such worker, or it cannot be kept.
    pub fn revoke(&mut self, name: &str) -> Result<Worker, RegistrarError> {
        let (worker, fact) = self.registry.revoke(name)?;
        self.keep(fact)?;
        Ok(worker)
    }

    /// The coordinator's own certificate, made anew.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn certificate(&self) -> Result<CertificateDer<'static>, RegistrarError> {
        Ok(self.ca.issue_coordinator(&self.identity.signing.public(), SystemTime::now())?)
    }

    /// What is not durable has not happened.
    fn keep(&mut self, fact: Option<Fact>) -> Result<(), RegistrarError> {
        if let Some(fact) = fact {
            let unkept = |source| RegistrarError::Registry { path: self.path.clone(), source };
            self.journal.keep(&fact).map_err(unkept)?;
            self.registry.apply(&fact);
        }
        Ok(())
    }

    fn former_token(&self, path: &Path) -> Result<Option<[u8; 16]>, StateError> {
        let Some(bytes) = read_small(path)? else { return Ok(None) };
        let former = String::from_utf8_lossy(&bytes).parse::<Invitation>().ok();
        Ok(former.filter(|former| former.ca_sha256 == self.identity.ca_sha256).map(|former| former.token))
    }

    fn invitation(
        &self,
        addresses: Vec<String>,
        token: [u8; 16],
        uses: u32,
        expires_unix_s: Option<u64>,
        loopback_only: bool,
    ) -> Invitation {
        Invitation {
            addresses,
            ca_sha256: self.identity.ca_sha256,
            coordinator_x25519: self.identity.session.public(),
            token,
            uses,
            expires_unix_s,
            loopback_only,
        }
    }

    /// Moves the registrar to a thread of its own.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    pub fn spawn(mut self) -> std::io::Result<RegistrarHandle> {
        let (questions, mut queue) = mpsc::channel::<Question>(QUESTIONS_MAX);
        let enrolled = Arc::new(AtomicUsize::new(self.registry.welcome()));
        let known = Known::default();
        self.registry.workers().for_each(|worker| known.note(worker));
        let (count, notes) = (Arc::clone(&enrolled), known.clone());
        std::thread::Builder::new().name("registrar".to_owned()).spawn(move || {
            while let Some(question) = queue.blocking_recv() {
                self.answer(question, &notes);
                count.store(self.registry.welcome(), Ordering::Relaxed);
            }
        })?;
        Ok(RegistrarHandle { questions, enrolled, known })
    }

    /// Whoever asked may be gone by now; what was decided stays.
    fn answer(&mut self, question: Question, known: &Known) {
        match question {
            Question::Enrol(applicant, reply) => {
                let answer = self.enrol(&applicant);
                // Whoever is told that it is enrolled comes at once.
                let (id, _) = identified(&applicant.request.ed25519);
                self.registry.worker(&id).into_iter().for_each(|worker| known.note(worker));
                drop(reply.send(answer));
            }
            Question::Workers(reply) => drop(reply.send(self.workers())),
            Question::Invite(wish, listen, reply) => drop(reply.send(self.invite(&wish, Some(listen)))),
            Question::Revoke(name, reply) => {
                let revoked = self.revoke(&name);
                revoked.iter().for_each(|worker| known.note(worker));
                drop(reply.send(revoked));
            }
            Question::Certificate(reply) => drop(reply.send(self.certificate())),
        }
    }
}

#[derive(Debug)]
enum Question {
    Enrol(Box<Applicant>, oneshot::Sender<Result<EnrolAnswer, RegistrarError>>),
    Workers(oneshot::Sender<Vec<Worker>>),
    Invite(InvitationWish, SocketAddr, oneshot::Sender<Result<Invitation, RegistrarError>>),
    Revoke(String, oneshot::Sender<Result<Worker, RegistrarError>>),
    Certificate(oneshot::Sender<Result<CertificateDer<'static>, RegistrarError>>),
}

/// The workers as they were last made durable, to be looked up while the registrar waits for the disk.
#[derive(Clone, Debug, Default)]
struct Known(Arc<RwLock<BTreeMap<WorkerId, Worker>>>);

impl Known {
    fn note(&self, worker: &Worker) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(worker.id, worker.clone());
    }
}

/// How others ask the registrar. It ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct RegistrarHandle {
    questions: mpsc::Sender<Question>,
    enrolled: Arc<AtomicUsize>,
    known: Known,
}

impl RegistrarHandle {
    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> Question) -> Result<T, RegistrarError> {
        let (reply, answer) = oneshot::channel();
        self.questions.send(question(reply)).await.map_err(|_| RegistrarError::Ending)?;
        answer.await.map_err(|_| RegistrarError::Ending)
    }

    /// How many workers may come.
    #[must_use]
    pub fn enrolled(&self) -> usize {
        self.enrolled.load(Ordering::Relaxed)
    }

    /// The coordinator's certificate, made anew.
    ///
    /// # Errors
    /// If it cannot be made.
    pub async fn certificate(&self) -> Result<CertificateDer<'static>, RegistrarError> {
        self.ask(Question::Certificate).await?
    }

    /// See [`Registrar::enrol`].
    ///
    /// # Errors
    /// As there.
    pub async fn enrol(&self, applicant: Applicant) -> Result<EnrolAnswer, RegistrarError> {
        self.ask(|reply| Question::Enrol(Box::new(applicant), reply)).await?
    }

    /// The worker with this id. A worker that comes back does not wait for another's enrolment to be durable.
    #[must_use]
    pub fn worker(&self, id: WorkerId) -> Option<Worker> {
        self.known.0.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// The workers, by name.
    ///
    /// # Errors
    /// If the registrar is gone.
    pub async fn workers(&self) -> Result<Vec<Worker>, RegistrarError> {
        self.ask(Question::Workers).await
    }

    /// See [`Registrar::invite`].
    ///
    /// # Errors
    /// As there.
    pub async fn invite(&self, wish: InvitationWish, listen: SocketAddr) -> Result<Invitation, RegistrarError> {
        self.ask(|reply| Question::Invite(wish, listen, reply)).await?
    }

    /// See [`Registrar::revoke`].
    ///
    /// # Errors
    /// As there.
    pub async fn revoke(&self, name: String) -> Result<Worker, RegistrarError> {
        self.ask(|reply| Question::Revoke(name, reply)).await?
    }
}

/// Wraps what is wrong with a key.
pub(crate) fn key_error(error: KeyError) -> RegistrarError {
    RegistrarError::TlsKey(error)
}

/// Writes the invitation for this machine (mode 0600, by rename).
///
/// # Errors
/// If it cannot be written.
pub fn write_invitation(path: &Path, invitation: &Invitation) -> Result<(), StateError> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(StateError::io(parent, "create"))?;
    }
    write_durably(path, format!("{invitation}\n").as_bytes())
}

/// Seconds since 1970; 0 before.
#[must_use]
pub fn unix_s(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What others are told: what was given, with the port if that was left out; else where the coordinator listens.
fn told_addresses(given: &[String], listen: Option<SocketAddr>) -> Result<Vec<String>, RegistrarError> {
    let port = listen.map_or(DEFAULT_PORT, |address| address.port());
    let told: Vec<String> = match (given.is_empty(), listen) {
        (false, _) => given.iter().map(|address| with_port(address, port)).collect(),
        (true, Some(listen)) if !listen.ip().is_unspecified() => vec![listen.to_string()],
        (true, listen) => {
            let listen = listen.map_or_else(|| "no address yet".to_owned(), |address| address.to_string());
            return Err(RegistrarError::NoAddress { listen });
        }
    };
    check_addresses(&told)?;
    Ok(told)
}

fn with_port(address: &str, port: u16) -> String {
    match address.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port).to_string(),
        Err(_) if !address.contains(':') => format!("{address}:{port}"),
        Err(_) => address.to_owned(),
    }
}

/// How workers on this machine reach the coordinator.
fn local_addresses(listen: SocketAddr) -> Vec<String> {
    let at = |ip: IpAddr| SocketAddr::new(ip, listen.port()).to_string();
    match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => vec![at(Ipv4Addr::LOCALHOST.into())],
        IpAddr::V6(ip) if ip.is_unspecified() => vec![at(Ipv6Addr::LOCALHOST.into()), at(Ipv4Addr::LOCALHOST.into())],
        ip => vec![at(ip)],
    }
}

/// Whether a peer is on the coordinator's own machine: it comes over loopback, or from the very address that is
/// listened on, which only this machine has.
#[must_use]
pub fn is_local(peer: IpAddr, listen: IpAddr) -> bool {
    let (peer, listen) = (peer.to_canonical(), listen.to_canonical());
    peer.is_loopback() || (!listen.is_unspecified() && peer == listen)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::store::testing::TestDisk;
    use protocol::messages::EnrolRequest;

    fn registrar() -> (tempfile::TempDir, StateDir, Registrar) {
        let home = tempfile::tempdir().unwrap();
        let state = StateDir::open(home.path()).unwrap();
        let registrar = Registrar::open(&state).unwrap();
        (home, state, registrar)
    }

    fn applicant(token: [u8; 16], ed25519: [u8; 32]) -> Applicant {
        let request = EnrolRequest { token, name: "shard".parse().unwrap(), ed25519 };
        Applicant { request, x25519: [5; 32], is_local: true, now_unix_s: unix_s(SystemTime::now()) }
    }

    #[test]
    fn an_enrolment_is_durable_and_its_certificate_is_the_workers() {
        let (_home, state, mut registrar) = registrar();
        let wish = InvitationWish { addresses: vec!["h".into()], uses: 1, expires: Some(Duration::from_secs(60)) };
        let invitation = registrar.invite(&wish, None).unwrap();
        assert_eq!(invitation.addresses, ["h:4433"]);
        let key = IdentityKey::generate().unwrap();
        let EnrolAnswer::Granted { certificate, .. } =
            registrar.enrol(&applicant(invitation.token, key.public())).unwrap()
        else {
            panic!("refused")
        };
        let identity = certs::worker_identity(&certificate.into()).unwrap();
        assert_eq!(identity.id, key.id());
        drop(registrar);
        let registrar = Registrar::open(&state).unwrap();
        assert_eq!(registrar.workers().len(), 1);
        assert_eq!(registrar.workers()[0].id.0, key.id());
    }

    #[tokio::test]
    async fn a_worker_can_be_looked_up_as_soon_as_it_is_told_of_its_enrolment_or_its_revocation() {
        let (_home, state, mut registrar) = registrar();
        let wish = InvitationWish { addresses: vec!["h".into()], uses: 0, expires: None };
        let token = registrar.invite(&wish, None).unwrap().token;
        let (earlier, later) = (IdentityKey::generate().unwrap(), IdentityKey::generate().unwrap());
        registrar.enrol(&applicant(token, earlier.public())).unwrap();
        drop(registrar);
        let handle = Registrar::open(&state).unwrap().spawn().unwrap();
        assert!(handle.worker(WorkerId(earlier.id())).is_some_and(|worker| !worker.revoked));
        assert_eq!(handle.worker(WorkerId(later.id())), None);
        let EnrolAnswer::Granted { name, .. } = handle.enrol(applicant(token, later.public())).await.unwrap() else {
            panic!("refused")
        };
        assert!(handle.worker(WorkerId(later.id())).is_some_and(|worker| worker.name == name));
        handle.revoke(name.to_string()).await.unwrap();
        assert!(handle.worker(WorkerId(later.id())).unwrap().revoked);
    }

    #[test]
    fn a_full_disk_refuses_an_enrolment_and_takes_it_when_there_is_room() {
        let (_home, state, registrar) = registrar();
        drop(registrar);
        let disk = TestDisk::default();
        let mut registrar = Registrar::open_on(&state, Box::new(disk.clone())).unwrap();
        let wish = InvitationWish { addresses: vec!["h".into()], uses: 1, expires: None };
        let token = registrar.invite(&wish, None).unwrap().token;
        let key = IdentityKey::generate().unwrap();
        disk.room(50);
        let refused = registrar.enrol(&applicant(token, key.public())).unwrap_err().to_string();
        assert!(refused.contains("registry-journal-000001: the disk is full; make room"), "{refused}");
        assert_eq!(registrar.workers().len(), 0);
        disk.room(u64::MAX);
        assert!(matches!(registrar.enrol(&applicant(token, key.public())).unwrap(), EnrolAnswer::Granted { .. }));
        drop(registrar);
        assert_eq!(Registrar::open_on(&state, Box::new(disk)).unwrap().workers().len(), 1);
    }

    #[test]
    fn a_key_that_is_none_spends_no_token() {
        let (_home, _state, mut registrar) = registrar();
        let wish = InvitationWish { addresses: vec!["h".into()], uses: 1, expires: None };
        let token = registrar.invite(&wish, None).unwrap().token;
        let answer = registrar.enrol(&applicant(token, [0; 32])).unwrap();
        assert_eq!(answer, EnrolAnswer::Refused(EnrolRefusal::BadKey));
        let key = IdentityKey::generate().unwrap();
        assert!(matches!(registrar.enrol(&applicant(token, key.public())).unwrap(), EnrolAnswer::Granted { .. }));
    }

    #[test]
    fn the_local_token_survives_restarts() {
        let (_home, state, mut registrar) = registrar();
        let path = state.file("join");
        let listen = "0.0.0.0:7".parse().unwrap();
        let first = registrar.invite_locally(&path, listen).unwrap();
        assert_eq!(first.addresses, ["127.0.0.1:7"]);
        write_invitation(&path, &first).unwrap();
        let mut registrar = Registrar::open(&state).unwrap();
        let second = registrar.invite_locally(&path, "127.0.0.1:8".parse().unwrap()).unwrap();
        assert_eq!((second.token, &second.addresses[..]), (first.token, &["127.0.0.1:8".to_owned()][..]));
    }

    #[test]
    fn an_unspecified_address_is_refused_with_the_remedy() {
        let (_home, _state, mut registrar) = registrar();
        let wish = InvitationWish { addresses: vec![], uses: 1, expires: None };
        let refused = registrar.invite(&wish, Some("0.0.0.0:4433".parse().unwrap())).unwrap_err();
        assert!(refused.to_string().ends_with("give --address HOST"), "{refused}");
        let told = registrar.invite(&wish, Some("192.0.2.7:4433".parse().unwrap())).unwrap();
        assert_eq!(told.addresses, ["192.0.2.7:4433"]);
        let wish = InvitationWish { addresses: vec!["2001:db8::1".into(), "a:9".into()], ..wish };
        assert_eq!(registrar.invite(&wish, None).unwrap().addresses, ["[2001:db8::1]:4433", "a:9"]);
    }

    #[test]
    fn only_this_machine_is_local() {
        let local = |peer: &str, listen: &str| is_local(peer.parse().unwrap(), listen.parse().unwrap());
        assert!(local("127.0.0.1", "0.0.0.0"));
        assert!(local("::ffff:127.0.0.1", "::"));
        assert!(local("192.0.2.7", "192.0.2.7"));
        assert!(!local("192.0.2.8", "192.0.2.7"));
        assert!(!local("192.0.2.8", "0.0.0.0"));
    }
}
