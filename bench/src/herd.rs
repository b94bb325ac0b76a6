//! Workers that are in and have nothing to do: thousands of them in this process, on a few sockets.
//!
//! They are enrolled by the registry's own code before the coordinator starts, which is as if they had come with its local
//! invitation on another day. Each has keys, a certificate and a session of its own; what it does not have is a task.
#![allow(clippy::unwrap_used)] // a benchmark that cannot go on panics, and its line is then said not to be measured

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use certs::{CertificateDer, IdentityKey, SERVER_NAME, SessionKey};
use coordinator::enrol::{Registrar, write_invitation};
use coordinator::registry::Applicant;
use coordinator::state::StateDir;
use protocol::ids::Instance;
use protocol::invitation::Invitation;
use protocol::messages::{EnrolAnswer, EnrolRequest, FromWorker, Role, ToWorker};
use protocol::session::Acquaintance;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use transport::{Alpn, Client, ClientOptions, CloseCode, Connected, Credentials, Frame, Trust};
use tributary_tests::Papers;
use tributary_tests::stranger::{Call, Talk, hello, random};

use crate::bare::each;

/// Sockets of a herd. Each connection is known by its ids, so that the number of files is no limit here.
const SOCKETS: usize = 4;

/// Who has papers for one coordinator.
#[derive(Clone, Debug)]
pub(crate) struct Enrolled {
    pub(crate) invitation: Invitation,
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) papers: Arc<Vec<Papers>>,
    /// What each agreed on with the coordinator when it first came, and showed TLS: a worker keeps it for as long as it lives.
    met: Arc<Vec<OnceLock<(Credentials, Acquaintance)>>>,
}

impl Enrolled {
    /// Enrols so many in a state directory whose coordinator does not run, and will listen there.
    pub(crate) fn write(state: &Path, listen: SocketAddr, count: usize) -> Result<Self> {
        let state = StateDir::open(state)?;
        let mut registrar = Registrar::open(&state)?;
        let path = state.file("join");
        let invitation = registrar.invite_locally(&path, listen)?;
        write_invitation(&path, &invitation)?;
        let now_unix_s = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let papers = (0..count).map(|number| papers(&mut registrar, &invitation, number, now_unix_s));
        let papers = Arc::new(papers.collect::<Result<Vec<_>>>()?);
        let met = Arc::new(papers.iter().map(|_| OnceLock::new()).collect());
        Ok(Self { invitation, ca: registrar.authority().certificate().clone(), papers, met })
    }

    fn coordinator(&self, client: &Client, number: usize, papers: &Papers) -> Result<&(Credentials, Acquaintance)> {
        let met = self.met.get(number).context("nobody of that number is enrolled")?;
        if let Some(met) = met.get() {
            return Ok(met);
        }
        let credentials = client.prepare(&Trust::Ca(self.ca.clone()), Some(&papers.tls()), Alpn::Main)?;
        let first = Acquaintance::new(papers.session.session_key(), &self.invitation.coordinator_x25519)?;
        Ok(met.get_or_init(|| (credentials, first)))
    }

    fn addresses(&self) -> Result<Vec<SocketAddr>> {
        let addresses = self.invitation.addresses.iter().map(|address| address.parse());
        Ok(addresses.collect::<Result<_, _>>()?)
    }
}

fn papers(registrar: &mut Registrar, invitation: &Invitation, number: usize, now_unix_s: u64) -> Result<Papers> {
    let (identity, session) = (IdentityKey::generate()?, SessionKey::generate()?);
    let request = EnrolRequest {
        token: invitation.token,
        name: format!("idle-{number:05}").parse()?,
        ed25519: identity.public(),
    };
    let applicant = Applicant { request, x25519: session.public(), is_local: true, now_unix_s };
    match registrar.enrol(&applicant)? {
        EnrolAnswer::Granted { name, certificate, .. } => {
            Ok(Papers { identity, session, certificate: certificate.into(), name: name.to_string() })
        }
        EnrolAnswer::Refused(refusal) => bail!("idle-{number:05}: {refusal}"),
    }
}

/// Those who are in.
#[derive(Debug)]
pub(crate) struct Herd {
    handle: Handle,
    enrolled: Enrolled,
    clients: Vec<Arc<Client>>,
    members: Vec<Talk>,
}

impl Herd {
    pub(crate) fn new(handle: &Handle, enrolled: Enrolled) -> Result<Self> {
        let _inside = handle.enter();
        let clients = (0..SOCKETS).map(|_| Ok(Arc::new(Client::bind(ClientOptions::default())?)));
        let clients = clients.collect::<Result<_>>()?;
        Ok(Self { handle: handle.clone(), enrolled, clients, members: Vec::new() })
    }

    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Has more of them join, so many at a time, until there are `count`, and tells how long it took.
    pub(crate) fn grow(&mut self, count: usize, at_once: usize) -> Result<Duration> {
        let began = Instant::now();
        let joined = self.handle.block_on(async {
            let mut tasks = Vec::new();
            let permits = Arc::new(Semaphore::new(at_once));
            for number in self.members.len()..count {
                let permit = Arc::clone(&permits).acquire_owned().await?;
                let (client, enrolled) = (Arc::clone(&self.clients[number % SOCKETS]), self.enrolled.clone());
                tasks.push(tokio::spawn(async move {
                    let joined = join(&client, &enrolled, number).await;
                    drop(permit);
                    joined
                }));
            }
            let mut joined = Vec::with_capacity(tasks.len());
            for task in tasks {
                joined.push(task.await??);
            }
            anyhow::Ok(joined)
        })?;
        let took = began.elapsed();
        self.members.extend(joined);
        Ok(took)
    }

    /// How many datagrams one of them has had by now, in both directions.
    pub(crate) fn datagrams(&self) -> f64 {
        let stats = self.members.iter().map(|member| member.connection.stats());
        each(stats.map(|stats| stats.sent_datagrams + stats.received_datagrams).sum(), self.members.len())
    }

    /// Whether each of them is still in.
    pub(crate) fn check(&self) -> Result<()> {
        let ended = self.members.iter().find_map(|member| member.connection.ended());
        ensure!(ended.is_none(), "an idle worker's connection ended: {}", ended.context("ended")?);
        Ok(())
    }

    /// Lets everybody go, and waits until both sides have forgotten them.
    pub(crate) fn disperse(&mut self) {
        self.members.drain(..).for_each(|member| member.connection.close(CloseCode::Done, ""));
        self.handle.block_on(async {
            for client in &self.clients {
                client.wait_idle().await;
            }
        });
    }
}

/// TLS, the session, the first word, its answer, and the word that makes a worker one that may be given work.
async fn join(client: &Client, enrolled: &Enrolled, number: usize) -> Result<Talk> {
    let papers = enrolled.papers.get(number).context("nobody of that number is enrolled")?;
    let (credentials, coordinator) = enrolled.coordinator(client, number, papers)?;
    let Connected { connection, exporter, .. } =
        client.connect_as(credentials, &enrolled.addresses()?, SERVER_NAME).await?;
    let (send, receive) = connection.open_control().await?;
    let mut call = Call { connection, exporter, send, receive };
    let (message, initiator) = call.begin_again(coordinator, &hello(Role::Worker), &papers.session, &[]).await;
    call.frame(Frame::Handshake(message.into())).await;
    let mut talk = call.talk(initiator).await;
    talk.say(&FromWorker::Join { instance: Instance(u64::from_le_bytes(random())) }).await;
    talk.until(|message| matches!(message, ToWorker::Welcome(_)).then_some(())).await;
    talk.say(&FromWorker::Ready).await;
    Ok(talk)
}
