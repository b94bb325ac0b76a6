//! Two ends of a QUIC connection over loopback, one thread each: ours, or quinn as its authors set it up.
//!
//! Both have the same provider of TLS and the same kind of certificate, and neither does anything but to move bytes. The
//! ends stay connected, so that transfers of the two kinds can be taken in turn.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use bytes::{Bytes, BytesMut};
use certs::{Ca, IdentityKey, SERVER_NAME};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{EndpointConfig, TokioRuntime};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use transport::{
    Alpn, CertificateDer, Client, ClientOptions, ResetKeys, Server, ServerOptions, Target, TlsIdentity, Trust,
};

/// Longer than any transfer takes that goes on at all.
const PATIENCE: Duration = Duration::from_secs(60);

/// A full record of the session, header and tag included: the pieces in which all of these transfers are written.
pub(crate) const RECORD_BYTES: usize = 65_536 + 32 + 16;

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// What the ends of a connection prove to each other.
#[derive(Clone, Debug)]
pub(crate) struct Papers {
    ca: CertificateDer<'static>,
    server: TlsIdentity,
    client: TlsIdentity,
}

impl Papers {
    pub(crate) fn new() -> Result<Self> {
        let now = SystemTime::now();
        let (ca, _) = Ca::generate(now)?;
        let (server_key, client_key) = (IdentityKey::generate()?, IdentityKey::generate()?);
        let server = ca.issue_coordinator(&server_key.public(), now)?;
        let client = ca.issue_worker(&client_key.public(), now)?;
        Ok(Self {
            ca: ca.certificate().clone(),
            server: TlsIdentity { certificate: server, key: server_key.tls_key()? },
            client: TlsIdentity { certificate: client, key: client_key.tls_key()? },
        })
    }
}

/// A connection whose client sends when it is asked to.
#[derive(Debug)]
pub(crate) struct Pair {
    asked: mpsc::UnboundedSender<()>,
    /// One for each transfer that has arrived; an error if one of the ends failed.
    arrived: Receiver<Result<()>>,
}

impl Pair {
    /// Seconds from asking the sender until the receiver has all of it.
    pub(crate) fn transfer(&self) -> Result<f64> {
        let began = Instant::now();
        self.asked.send(())?;
        self.arrived.recv_timeout(PATIENCE).context("no transfer arrived in a minute")??;
        Ok(began.elapsed().as_secs_f64())
    }
}

/// Our endpoints. `write` makes each record that is sent, `read` takes each in that comes, in a state of their own that
/// is made anew for each transfer.
pub(crate) fn ours<W: Send, R: Send>(
    papers: &Papers,
    records: usize,
    writer: impl Fn() -> W + Send + 'static,
    write: impl Fn(&mut W, bool) -> Result<Bytes> + Send + 'static,
    reader: impl Fn() -> R + Send + 'static,
    read: impl Fn(&mut R, &mut BytesMut) -> Result<()> + Send + 'static,
) -> Result<Pair> {
    let (told, arrived) = channel();
    let (listening, address) = channel();
    let failed = told.clone();
    let (server, client) = (papers.clone(), papers.clone());
    let receive = async move {
        let options = ServerOptions::new(LOOPBACK, server.ca, server.server, ResetKeys::from_bytes(&[7; 40]));
        let server = Server::bind(options)?;
        listening.send(server.local_address()?)?;
        let accepted = server.accept().await.context("the endpoint was closed")?.complete().await?;
        let mut record = BytesMut::new();
        while let Ok(mut stream) = accepted.connection.accept_uni().await {
            let mut state = reader();
            while stream.read_record(&mut record).await? {
                read(&mut state, &mut record)?;
            }
            told.send(Ok(()))?;
        }
        Ok(())
    };
    spawn("receiving", failed.clone(), receive)?;
    let address = address.recv_timeout(PATIENCE).context("our server does not listen")?;
    let (asked, mut asks) = mpsc::unbounded_channel();
    let send = async move {
        let endpoint = Client::bind(ClientOptions::default())?;
        let target = Target {
            addresses: vec![address],
            server_name: SERVER_NAME.to_owned(),
            trust: Trust::Ca(client.ca),
            identity: Some(client.client),
            alpn: Alpn::Main,
        };
        let connected = endpoint.connect(&target).await?;
        while let Some(()) = asks.recv().await {
            let (mut stream, mut state) = (connected.connection.open_uni().await?, writer());
            for place in 1..=records {
                stream.write_record(write(&mut state, place == records)?).await?;
            }
            stream.finish()?;
            stream.delivered().await?;
        }
        Ok(())
    };
    spawn("sending", failed, send)?;
    Ok(Pair { asked, arrived })
}

/// quinn with nothing set: its windows, its datagrams, its sockets; and read as it is read fastest, in chunks.
pub(crate) fn stock(papers: &Papers, records: usize) -> Result<Pair> {
    let (told, arrived) = channel();
    let (listening, address) = channel();
    let failed = told.clone();
    let server = papers.clone();
    let receive = async move {
        let endpoint = stock_server(&server)?;
        listening.send(endpoint.local_addr()?)?;
        let connection = endpoint.accept().await.context("the endpoint was closed")?.await?;
        while let Ok(mut stream) = connection.accept_uni().await {
            while stream.read_chunk(usize::MAX, true).await?.is_some() {}
            told.send(Ok(()))?;
        }
        Ok(())
    };
    spawn("receiving", failed.clone(), receive)?;
    let address = address.recv_timeout(PATIENCE).context("quinn's server does not listen")?;
    let (asked, mut asks) = mpsc::unbounded_channel();
    let client = papers.clone();
    let send = async move {
        let connection = stock_client(&client)?.connect(address, SERVER_NAME)?.await?;
        let record = Bytes::from(vec![7; RECORD_BYTES]);
        while let Some(()) = asks.recv().await {
            let mut stream = connection.open_uni().await?;
            for _ in 0..records {
                stream.write_chunk(record.clone()).await?;
            }
            stream.finish()?;
            stream.stopped().await?;
        }
        Ok(())
    };
    spawn("sending", failed, send)?;
    Ok(Pair { asked, arrived })
}

/// A listening endpoint of stock quinn.
pub(crate) fn stock_server(papers: &Papers) -> Result<quinn::Endpoint> {
    let Papers { ca, server, .. } = papers.clone();
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![server.certificate, ca], server.key)?;
    tls.alpn_protocols = vec![b"bench".to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let socket = UdpSocket::bind(LOOPBACK)?;
    Ok(quinn::Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime))?)
}

/// A connecting endpoint of stock quinn.
pub(crate) fn stock_client(papers: &Papers) -> Result<quinn::Endpoint> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(papers.ca.clone())?;
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"bench".to_vec()];
    let socket = UdpSocket::bind(LOOPBACK)?;
    let mut endpoint = quinn::Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)));
    Ok(endpoint)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Has `work` done on a thread of its own, whose end by an error is told.
pub(crate) fn spawn(
    name: &str,
    told: std::sync::mpsc::Sender<Result<()>>,
    work: impl Future<Output = Result<()>> + Send + 'static,
) -> Result<()> {
    let runtime = single()?;
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        if let Err(error) = runtime.block_on(work) {
            // Nobody asks any more if nobody hears it.
            let _ = told.send(Err(error));
        }
    })?;
    Ok(())
}

fn single() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}
