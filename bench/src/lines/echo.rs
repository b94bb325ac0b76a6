//! The messages of a round between bare connections: no session, no machine, no journal, no training.
//!
//! One thread is the server, and each client has its own, with the endpoints, the settings and the TLS of the released
//! programs. The server sends each client what a worker is told, on its control stream, and a model on a stream of its
//! own; when both have come, the client answers with as much as an offer has, and an update on a stream of its own.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result};
use bytes::{Bytes, BytesMut};
use certs::{Ca, IdentityKey, SERVER_NAME};
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use transport::limits::RECORD_HEADER_BYTES;
use transport::{
    Alpn, Client, ClientOptions, Connection, RecvStream, ResetKeys, SendStream, Server, ServerOptions, Target,
    TlsIdentity, Trust,
};

use crate::figures::Samples;

/// Sealed, a task, what is held and a receipt have so many bytes, in one record here.
const TOLD_BYTES: usize = 560;

/// A signed offer.
const OFFER_BYTES: usize = 330;

/// What goes before a model or an update on its stream: the stream's number, and what follows.
const BEFORE_BYTES: usize = 64;

/// A record's header and tag.
const RECORD_BYTES: usize = RECORD_HEADER_BYTES + 16;

/// Clients and a server that make rounds when they are told to.
pub(crate) struct Echo {
    orders: Sender<usize>,
    answers: Receiver<Result<Samples>>,
}

impl Echo {
    /// Starts them; models and updates have so many bytes.
    pub(crate) fn start(clients: usize, bytes: usize) -> Result<Self> {
        let (orders, ordered) = channel::<usize>();
        let (answer, answers) = channel();
        let (bound, address) = channel();
        let pki = Pki::new()?;
        let server = pki.server()?;
        thread::spawn(move || {
            let served = serve(server, clients, bytes, &bound, &ordered, &answer);
            served.unwrap_or_else(|error| drop(answer.send(Err(error))));
        });
        let address: SocketAddr = address.recv().context("the server did not start")?;
        for _ in 0..clients {
            let target = pki.target(address)?;
            thread::spawn(move || attend(&target, bytes));
        }
        Ok(Self { orders, answers })
    }

    /// Makes so many rounds; seconds of each.
    pub(crate) fn rounds(&self, count: usize) -> Result<Samples> {
        self.orders.send(count)?;
        self.answers.recv()?
    }
}

struct Pki {
    ca: Ca,
    key: IdentityKey,
}

impl Pki {
    fn new() -> Result<Self> {
        Ok(Self { ca: Ca::generate(SystemTime::now())?.0, key: IdentityKey::generate()? })
    }

    fn server(&self) -> Result<ServerOptions> {
        let certificate = self.ca.issue_coordinator(&self.key.public(), SystemTime::now())?;
        let identity = TlsIdentity { certificate, key: self.key.tls_key()? };
        let keys = ResetKeys::from_bytes(&[7; ResetKeys::BYTES]);
        Ok(ServerOptions::new("127.0.0.1:0".parse()?, self.ca.certificate().clone(), identity, keys))
    }

    fn target(&self, address: SocketAddr) -> Result<Target> {
        let key = IdentityKey::generate()?;
        let certificate = self.ca.issue_worker(&key.public(), SystemTime::now())?;
        Ok(Target {
            addresses: vec![address],
            server_name: SERVER_NAME.to_owned(),
            trust: Trust::Ca(self.ca.certificate().clone()),
            identity: Some(TlsIdentity { certificate, key: key.tls_key()? }),
            alpn: Alpn::Main,
        })
    }
}

/// One side of a connection.
struct End {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    record: BytesMut,
}

impl End {
    async fn say(&mut self, control: &Bytes, content: &[Bytes; 2]) -> Result<()> {
        let mut stream = self.connection.open_uni().await?;
        for piece in content {
            stream.write_record(piece.clone()).await?;
        }
        stream.finish()?;
        Ok(self.send.write_record(control.clone()).await?)
    }

    async fn hear(&mut self) -> Result<()> {
        self.receive.read_record(&mut self.record).await?;
        let mut stream = self.connection.accept_uni().await?;
        while stream.read_record(&mut self.record).await? {}
        Ok(())
    }
}

/// A record of so many bytes in the clear.
fn record(bytes: usize) -> Result<Bytes> {
    let mut record = vec![1; bytes.max(RECORD_BYTES)];
    let length = u32::try_from(record.len() - RECORD_BYTES)?;
    record[4..8].copy_from_slice(&length.to_le_bytes());
    Ok(record.into())
}

fn serve(
    options: ServerOptions,
    clients: usize,
    bytes: usize,
    bound: &Sender<SocketAddr>,
    ordered: &Receiver<usize>,
    answer: &Sender<Result<Samples>>,
) -> Result<()> {
    let (told, content) = (record(TOLD_BYTES)?, [record(BEFORE_BYTES)?, record(bytes + RECORD_BYTES)?]);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (server, mut ends) = runtime.block_on(async {
        let server = Server::bind(options)?;
        bound.send(server.local_address()?)?;
        let mut ends = Vec::new();
        while ends.len() < clients {
            let handshake = server.accept().await.context("the endpoint ended")?;
            let connection = handshake.complete().await?.connection;
            let (send, mut receive) = connection.accept_control().await?;
            let mut record = BytesMut::new();
            receive.read_record(&mut record).await?;
            ends.push(End { connection, send, receive, record });
        }
        anyhow::Ok((server, ends))
    })?;
    while let Ok(count) = ordered.recv() {
        let mut seconds = Samples::default();
        for _ in 0..count {
            let began = Instant::now();
            ends = runtime.block_on(round(ends, &told, &content))?;
            seconds.add_time(began.elapsed());
        }
        answer.send(Ok(seconds))?;
    }
    drop(server);
    Ok(())
}

async fn round(ends: Vec<End>, told: &Bytes, content: &[Bytes; 2]) -> Result<Vec<End>> {
    let mut tasks = JoinSet::new();
    for mut end in ends {
        let (told, content) = (told.clone(), content.clone());
        tasks.spawn(async move {
            end.say(&told, &content).await?;
            end.hear().await?;
            anyhow::Ok(end)
        });
    }
    let mut ends = Vec::new();
    while let Some(end) = tasks.join_next().await {
        ends.push(end??);
    }
    Ok(ends)
}

/// Answers until the connection ends.
fn attend(target: &Target, bytes: usize) -> Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (offer, content) = (record(OFFER_BYTES)?, [record(BEFORE_BYTES)?, record(bytes + RECORD_BYTES)?]);
    runtime.block_on(async {
        let client = Client::bind(ClientOptions::default())?;
        let connection = client.connect(target).await?.connection;
        let (mut send, receive) = connection.open_control().await?;
        send.write_record(record(RECORD_BYTES)?).await?;
        let mut end = End { connection, send, receive, record: BytesMut::new() };
        loop {
            end.hear().await?;
            end.say(&offer, &content).await?;
        }
    })
}
