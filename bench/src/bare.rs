//! quinn as it comes, with the TLS that Tributary speaks: how fast connections are made when nothing follows.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use certs::{Ca, CertificateDer, IdentityKey, SERVER_NAME};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, Incoming, ServerConfig, TransportConfig};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;

use crate::process;

/// As many as a herd has.
const SOCKETS: usize = 4;

/// The name of a server's only thread, by which its processor time is known.
const SERVER_THREAD: &str = "bare-server";

/// A server that takes connections and does nothing with them, and its clients.
#[derive(Debug)]
pub(crate) struct Bare {
    address: SocketAddr,
    clients: Vec<Endpoint>,
    config: ClientConfig,
    /// A permit for each connection that the server has completed.
    made: Arc<Semaphore>,
    client: Runtime,
    /// Dropped, it ends the server.
    _server: Runtime,
}

impl Bare {
    /// With so many threads on the server's side.
    pub(crate) fn start(server_threads: usize) -> Result<Self> {
        let now = SystemTime::now();
        let (ca, _) = Ca::generate(now)?;
        let mut server = Builder::new_multi_thread();
        let server = server.worker_threads(server_threads).thread_name(SERVER_THREAD).enable_all().build()?;
        let client = runtime()?;
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let made = Arc::new(Semaphore::new(0));
        let endpoint = {
            let _inside = server.enter();
            Endpoint::server(server_config(&ca, now)?, any)?
        };
        let address = endpoint.local_addr()?;
        server.spawn(accept(endpoint, Arc::clone(&made)));
        let clients = {
            let _inside = client.enter();
            (0..SOCKETS).map(|_| Endpoint::client(any)).collect::<Result<_, _>>()?
        };
        Ok(Self { address, clients, config: client_config(&ca, now)?, made, client, _server: server })
    }

    /// Makes so many connections, so many at a time, until the server has them all; and tells how long it took, and how many
    /// datagrams one of them had by then.
    pub(crate) fn connect(&self, count: usize, at_once: usize) -> Result<(Duration, f64)> {
        self.client.block_on(async {
            let began = Instant::now();
            let connections = self.connections(count, at_once, &self.config).await?;
            let took = began.elapsed();
            let stats = connections.iter().map(Connection::stats);
            let datagrams: u64 = stats.map(|stats| stats.udp_tx.datagrams + stats.udp_rx.datagrams).sum();
            self.part(&connections).await;
            Ok((took, each(datagrams, count)))
        })
    }

    /// What the server's threads take for one keep-alive of one of so many connections, each of which has one every so often.
    pub(crate) fn keep_alive(&self, count: usize, at_once: usize, every: Duration) -> Result<Duration> {
        const TURNS: u32 = 2;
        let mut config = self.config.clone();
        let mut transport = TransportConfig::default();
        transport.keep_alive_interval(Some(every));
        config.transport_config(Arc::new(transport));
        self.client.block_on(async {
            let connections = self.connections(count, at_once, &config).await?;
            tokio::time::sleep(every).await;
            let before = process::threads_cpu(SERVER_THREAD)?;
            tokio::time::sleep(TURNS * every).await;
            let took = process::threads_cpu(SERVER_THREAD)? - before;
            self.part(&connections).await;
            Ok(took / TURNS / u32::try_from(count)?)
        })
    }

    async fn connections(&self, count: usize, at_once: usize, config: &ClientConfig) -> Result<Vec<Connection>> {
        let permits = Arc::new(Semaphore::new(at_once));
        let mut tasks = Vec::new();
        for number in 0..count {
            let permit = Arc::clone(&permits).acquire_owned().await?;
            let connecting = self.clients[number % SOCKETS].connect_with(config.clone(), self.address, SERVER_NAME)?;
            tasks.push(tokio::spawn(async move {
                let connected = connecting.await;
                drop(permit);
                connected
            }));
        }
        let mut connections: Vec<Connection> = Vec::with_capacity(count);
        for task in tasks {
            connections.push(task.await??);
        }
        self.made.acquire_many(u32::try_from(count)?).await?.forget();
        Ok(connections)
    }

    async fn part(&self, connections: &[Connection]) {
        connections.iter().for_each(|connection| connection.close(0u32.into(), b""));
        for client in &self.clients {
            client.wait_idle().await;
        }
    }
}

/// Of a total.
#[allow(clippy::cast_precision_loss)] // datagrams and connections
pub(crate) fn each(total: u64, count: usize) -> f64 {
    total as f64 / count as f64
}

fn runtime() -> Result<Runtime> {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().context("no runtime")
}

async fn accept(endpoint: Endpoint, made: Arc<Semaphore>) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(hold(incoming, Arc::clone(&made)));
    }
}

/// A connection that fails is missed by whoever waits for all of them.
async fn hold(incoming: Incoming, made: Arc<Semaphore>) {
    if let Ok(connection) = incoming.await {
        made.add_permits(1);
        connection.closed().await;
    }
}

/// The groups that Tributary offers, in its order.
fn provider() -> Arc<CryptoProvider> {
    let kx_groups = vec![kx_group::X25519MLKEM768, kx_group::X25519];
    Arc::new(CryptoProvider { kx_groups, ..default_provider() })
}

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(Arc::new(roots))
}

fn server_config(ca: &Ca, now: SystemTime) -> Result<ServerConfig> {
    let key = IdentityKey::generate()?;
    let chain = vec![ca.issue_coordinator(&key.public(), now)?, ca.certificate().clone()];
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(ca.certificate())?, provider())
        .clear_root_hint_subjects()
        .build()?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key.tls_key()?)?;
    tls.alpn_protocols = vec![b"tributary".to_vec()];
    tls.send_tls13_tickets = 0;
    Ok(ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?)))
}

fn client_config(ca: &Ca, now: SystemTime) -> Result<ClientConfig> {
    let key = IdentityKey::generate()?;
    let chain = vec![ca.issue_worker(&key.public(), now)?];
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots(ca.certificate())?)
        .with_client_auth_cert(chain, key.tls_key()?)?;
    tls.alpn_protocols = vec![b"tributary".to_vec()];
    tls.resumption = Resumption::disabled();
    Ok(ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)))
}
