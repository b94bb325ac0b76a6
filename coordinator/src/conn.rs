//! One connection: from the handshake to its end, seen from the coordinator.
//!
//! The tasks of a connection move bytes and do its cryptography; whatever they learn goes to the event loop through one
//! bounded channel, and whatever is to be said comes from there through another. Nothing of the machine's state changes
//! before the first sealed record. Certificate, session key and registry entry must be one worker's, at every
//! connection.

use std::collections::BTreeMap;
use std::future::Future as _;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use certs::worker_identity;
use protocol::ids::{ConnId, Instance, TaskId, WorkerId};
use protocol::limits::{HELLO_VERSIONS_MAX, RECORD_BYTES_MAX, SENTENCE_LEN_MAX, SESSION_AGE_MAX};
use protocol::messages::{
    DecodeError, Download, EnrolAnswer, FromWorker, Hello, HelloRefused, Leave, Manifest, PROTOCOL_VERSION, Receipt,
    Refusal, Role, Signed, ToWorker, Upload, decode, encode, printable,
};
use protocol::session::sign::{MANIFEST_CONTEXT, PublicKey, RECEIPT_CONTEXT};
use protocol::session::{
    Acquaintance, Flag, HandshakeError, MessageAssembler, Opener, RecordError, Responder, Sealer, Session,
    StaticSecret, StreamError, prologue,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use transport::{Accepted, Alpn, CloseCode, Connection, Frame, Handshake, RecvStream, SendStream, Server};
use zeroize::Zeroizing;

use crate::enrol::{Identity, RegistrarHandle, is_local, unix_s};
use crate::intake::{Declared, Intake, IntakeError, Part, Payload};
use crate::registry::{Applicant, Worker};
use crate::telemetry::{Direction, EnrolmentOutcome, HandshakeOutcome, Kind, Telemetry};
use crate::workshop::Content;

/// From the TLS handshake to the first sealed message.
const GREETING_MAX: Duration = Duration::from_secs(10);

/// A whole enrolment.
const ENROLMENT_MAX: Duration = Duration::from_secs(5);

/// How long an upload stream may be open before it says what it is, and between two records.
const UPLOAD_SILENCE_MAX: Duration = Duration::from_secs(30);

/// How long an upload waits for the offer that it belongs to.
const UPLOAD_EARLY_MAX: Duration = Duration::from_secs(10);

/// How often an upload that found the disk full tries again.
const ROOM_ASKED_EVERY: Duration = Duration::from_secs(1);

/// How long what was said last may take to arrive.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// How long words for which nobody waits wait for something to travel with, at least; and at most twice as long.
const UNHURRIED: Duration = Duration::from_millis(2);

/// Contents that are on their way to one worker. Each keeps its model in memory, so whoever reads none of them is let
/// go; it may come back and get the newest alone.
const DOWNLOADS_MAX: usize = 8;

/// What waits to be said to one worker. Whoever lets it fill does not read.
pub const SAYINGS_MAX: usize = 256;

/// Records that are taken in at once: a mebibyte.
const BATCH_RECORDS: usize = (1 << 20) / RECORD_BYTES_MAX;

/// Up to so many bytes are taken in where they came: moving them to another thread takes as long.
const TAKEN_IN_PLACE_BYTES: usize = 16 * 1024;

/// What the event loop learns of connections.
#[derive(Debug)]
pub enum FromConn {
    /// A worker has said that it is here.
    Joined(Box<Joined>),
    /// A worker said something.
    Said(ConnId, FromWorker),
    /// A worker offered something; whether the signature is its own.
    Offered(ConnId, Box<Manifest>, bool),
    /// An upload has begun, and waits to be let in.
    Upload(ConnId, Upload, oneshot::Sender<Ticket>),
    /// What is here of a large payload was looked for, under this number.
    Looked(u64, TaskId, io::Result<Option<Part>>),
    /// An upload that was let in has ended.
    Received(u64, TaskId, Received),
    /// A peer did what no honest peer does.
    Misbehaved(ConnId, String),
    /// The connection is over.
    Gone(ConnId),
}

/// A worker that is here.
#[derive(Debug)]
pub struct Joined {
    /// Its connection.
    pub conn: ConnId,
    /// Its registry entry.
    pub worker: Worker,
    /// Its process.
    pub instance: Instance,
    /// For the figures of the link.
    pub link: Connection,
    /// What it is to be told.
    /// Boxed, because a channel reserves room for 32 at once.
    pub sayings: mpsc::Sender<Box<Saying>>,
}

/// What a connection is to say.
#[derive(Debug)]
pub enum Saying {
    /// A message.
    Message(ToWorker),
    /// A receipt that is to be said when its commit is durable: signing it takes longer than all else that is done with it.
    Foreseen(Receipt),
    /// A receipt.
    Receipt(Receipt),
    /// A content, on a stream of its own.
    Content(Arc<Content>),
    /// Goodbye, once all that was said has arrived.
    Close(CloseCode, String),
}

/// The permission to send a payload. It ends when the other end of `stop` is dropped.
#[derive(Debug)]
pub struct Ticket {
    /// Which; an ended upload names it.
    pub number: u64,
    /// What may come.
    pub declared: Declared,
    /// What is here of it already.
    pub part: Option<Part>,
    /// Nothing is ever sent here.
    pub stop: oneshot::Receiver<()>,
}

/// How an upload ended.
#[derive(Debug)]
pub enum Received {
    /// It is whole and sound.
    Whole(Payload),
    /// It is not what its manifest says.
    Spoiled(Refusal),
    /// Its stream ended early.
    Cut,
    /// It is what no honest peer sends.
    Foul(ConnId, String),
    /// The spool is broken.
    Broken(IntakeError),
}

/// Where connections come in.
#[derive(Debug)]
pub struct Door {
    /// The endpoint.
    pub server: Server,
    /// What the coordinator is known by.
    pub identity: Identity,
    /// Who decides on membership.
    pub registrar: RegistrarHandle,
    /// The event loop.
    pub events: mpsc::Sender<FromConn>,
    /// Where everything is counted.
    pub telemetry: Telemetry,
    /// The address that is listened on.
    pub listen: IpAddr,
    /// Connections so far.
    pub count: AtomicU64,
    /// How many uploads wait for room on the disk.
    pub short_of_room: watch::Sender<usize>,
    /// The workers that were here since the start.
    pub acquaintances: Acquaintances,
    /// How long words wait for company.
    pub patience: Patience,
}

/// A clock for all who wait for something to travel with: whoever hears it twice has waited long enough. A timer of each would
/// be a system call of each in every round.
#[derive(Debug, Default)]
pub struct Patience {
    asked: Notify,
    strikes: Notify,
}

impl Patience {
    /// The next stroke, within [`UNHURRIED`].
    fn stroke(&self) -> Notified<'_> {
        let stroke = self.strikes.notified();
        self.asked.notify_one();
        stroke
    }

    /// Strikes as long as anybody waits.
    pub(crate) async fn watch(&self) {
        loop {
            self.asked.notified().await;
            tokio::time::sleep(UNHURRIED).await;
            self.strikes.notify_waiters();
        }
    }
}

/// What was agreed with workers that were here before: at most one for each that is enrolled.
#[derive(Debug, Default)]
pub struct Acquaintances(Mutex<BTreeMap<WorkerId, Arc<Acquaintance>>>);

impl Acquaintances {
    fn with(&self, id: WorkerId) -> Option<Arc<Acquaintance>> {
        self.known().get(&id).cloned()
    }

    fn keep(&self, id: WorkerId, met: &Arc<Acquaintance>) {
        self.known().insert(id, Arc::clone(met));
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<WorkerId, Arc<Acquaintance>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a connection came to no session.
#[derive(Debug, thiserror::Error)]
enum GreetingError {
    #[error(transparent)]
    Frame(#[from] transport::FrameError),
    #[error(transparent)]
    Ended(#[from] transport::Ended),
    #[error(transparent)]
    Record(#[from] ReadError),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("expected {expected}, got {got}")]
    OutOfTurn { expected: &'static str, got: String },
    #[error("it speaks another version or wants another role")]
    Hello,
    #[error("{0}")]
    Identity(&'static str),
    #[error("its key was revoked")]
    Revoked,
    #[error("ours: {0}")]
    Ours(String),
}

/// Why nothing more can be read from a stream.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Stream(#[from] transport::RecordError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Number(#[from] StreamError),
    #[error(transparent)]
    Message(#[from] DecodeError),
    #[error("the stream ended before its last record")]
    Ended,
}

impl Door {
    /// Lets connections in until the endpoint is closed.
    pub async fn open(self: Arc<Self>) {
        while let Some(handshake) = self.server.accept().await {
            tokio::spawn(Arc::clone(&self).welcome(handshake));
        }
    }

    async fn welcome(self: Arc<Self>, handshake: Handshake) {
        let peer = handshake.remote_address();
        let accepted = match handshake.complete().await {
            Ok(accepted) => accepted,
            Err(error) => {
                let late = matches!(error, transport::HandshakeError::TimedOut(_));
                self.count_handshake(if late { HandshakeOutcome::Timeout } else { HandshakeOutcome::Failed });
                tracing::debug!(%peer, %error, "no connection");
                return;
            }
        };
        self.telemetry.metrics.connections_total.increment(1);
        match accepted.alpn {
            Alpn::Main => self.serve(accepted).await,
            Alpn::Join => self.enrol(accepted).await,
        }
    }

    fn count_handshake(&self, outcome: HandshakeOutcome) {
        self.telemetry.metrics.handshakes.with(outcome).increment(1);
    }

    // --- workers ---

    async fn serve(self: Arc<Self>, accepted: Accepted) {
        let connection = accepted.connection.clone();
        let peer = connection.remote_address();
        let greeted = timeout(GREETING_MAX, self.greet(accepted)).await;
        let (outcome, close) = match greeted {
            Ok(Ok(greeted)) => {
                self.count_handshake(HandshakeOutcome::Ok);
                return self.keep(connection, greeted).await;
            }
            Ok(Err(error)) => {
                tracing::info!(%peer, "a peer was not let in: {error}");
                error.verdict()
            }
            Err(_) => {
                tracing::info!(%peer, "a peer was not let in: it took longer than {GREETING_MAX:?}");
                (HandshakeOutcome::Timeout, (CloseCode::TimedOut, String::new()))
            }
        };
        self.count_handshake(outcome);
        connection.close(close.0, &close.1);
    }

    /// Hello, the handshake, who it is, and its first sealed word.
    async fn greet(self: &Arc<Self>, accepted: Accepted) -> Result<Greeted, GreetingError> {
        let certificate = accepted.certificate.as_ref().ok_or(GreetingError::Identity("no certificate"))?;
        let certified =
            worker_identity(certificate).map_err(|_| GreetingError::Identity("its certificate is no worker's"))?;
        let (mut send, mut receive) = accepted.connection.accept_control().await?;
        let prologue = read_hello(&mut send, &mut receive, Role::Worker, &accepted.exporter).await?;
        let message = read_handshake(&mut receive).await?;
        let (id, local) = (WorkerId(certified.id), self.identity.session.session_key());
        let (responder, _) = Responder::read(&prologue, local, self.acquaintances.with(id), &message)?;
        let worker = self.entry(id, &certified.public, responder.remote_static())?;
        self.acquaintances.keep(id, responder.remote());
        let (answer, established) = responder.reply(ephemeral()?, &[])?;
        send.write_frame(&Frame::Handshake(answer.into())).await?;
        let (session, sealer, opener) = Session::begin(established);
        let conn = ConnId(self.count.fetch_add(1, Ordering::Relaxed));
        let mut control = ControlReader::new(receive, opener, Arc::clone(self));
        let instance = match control.next().await? {
            Some(FromWorker::Join { instance }) => instance,
            Some(_) => return Err(GreetingError::OutOfTurn { expected: "Join", got: "another message".to_owned() }),
            None => return Err(ReadError::Ended.into()),
        };
        Ok(Greeted { conn, worker, instance, session, send, sealer, control })
    }

    /// The registry entry that certificate and session key belong to, both.
    fn entry(&self, id: WorkerId, public: &[u8; 32], x25519: &[u8; 32]) -> Result<Worker, GreetingError> {
        let worker = self
            .registrar
            .worker(id)
            .ok_or(GreetingError::Identity("it is not in the registry; join with an invitation"))?;
        let key_hash: [u8; 32] = Sha256::digest(public).into();
        if worker.revoked {
            return Err(GreetingError::Revoked);
        }
        if worker.certificate_key_sha256.0 != key_hash || worker.ed25519.0 != *public || worker.x25519.0 != *x25519 {
            return Err(GreetingError::Identity("its certificate and its session key are not one worker's"));
        }
        Ok(worker)
    }

    /// Everything after the first sealed word, in tasks of its own: the one that shook hands is large, and ends here.
    async fn keep(self: Arc<Self>, connection: Connection, greeted: Greeted) {
        let Greeted { conn, worker, instance, session, send, sealer, control } = greeted;
        let session = Arc::new(Mutex::new(session));
        let (sayings, queue) = mpsc::channel(SAYINGS_MAX);
        let link = connection.clone();
        let peer = Peer { conn, door: Arc::clone(&self), connection: connection.clone(), session };
        let key = worker.ed25519.0;
        let joined = Joined { conn, worker, instance, link, sayings };
        if self.events.send(FromConn::Joined(Box::new(joined))).await.is_err() {
            return connection.close(CloseCode::GoingAway, "");
        }
        let mut tasks = JoinSet::new();
        tasks.spawn(peer.clone().read(control, key));
        tasks.spawn(peer.clone().accept_uploads());
        let speaking = tokio::spawn(Voice::new(peer.clone(), send, sealer).speak(queue));
        tokio::spawn(peer.watch(tasks, speaking));
    }

    // --- enrolment ---

    async fn enrol(&self, accepted: Accepted) {
        let connection = accepted.connection.clone();
        let peer = connection.remote_address();
        let count = |outcome| self.telemetry.metrics.enrolments.with(outcome).increment(1);
        match timeout(ENROLMENT_MAX, self.enrol_one(accepted)).await {
            Ok(Ok(EnrolAnswer::Granted { name, .. })) => {
                count(EnrolmentOutcome::Granted);
                tracing::info!("{name} is enrolled from {peer}");
                connection.close(CloseCode::Done, "");
            }
            Ok(Ok(EnrolAnswer::Refused(refusal))) => {
                count(EnrolmentOutcome::Refused);
                tracing::info!(%peer, "an enrolment was refused: {refusal}");
                connection.close(CloseCode::Done, "");
            }
            Ok(Err(error)) => {
                count(EnrolmentOutcome::Failed);
                tracing::info!(%peer, "an enrolment failed: {error}");
                let (code, reason) = error.verdict().1;
                connection.close(code, &reason);
            }
            Err(_) => {
                count(EnrolmentOutcome::Failed);
                tracing::info!(%peer, "an enrolment took longer than {ENROLMENT_MAX:?}");
                connection.close(CloseCode::TimedOut, "");
            }
        }
    }

    async fn enrol_one(&self, accepted: Accepted) -> Result<EnrolAnswer, GreetingError> {
        let peer = accepted.connection.remote_address();
        let (mut send, mut receive) = accepted.connection.accept_control().await?;
        let prologue = read_hello(&mut send, &mut receive, Role::Join, &accepted.exporter).await?;
        let message = read_handshake(&mut receive).await?;
        let local = self.identity.session.session_key();
        let (responder, payload) = Responder::read(&prologue, local, None, &message)?;
        let request = decode(&payload).map_err(ReadError::from)?;
        let applicant = Applicant {
            request,
            x25519: *responder.remote_static(),
            is_local: is_local(peer.ip(), self.listen),
            now_unix_s: unix_s(SystemTime::now()),
        };
        let answer = self.registrar.enrol(applicant).await.map_err(|error| GreetingError::Ours(error.to_string()))?;
        let (message, _) = responder.reply(ephemeral()?, &encode(&answer))?;
        send.write_frame(&Frame::Handshake(message.into())).await?;
        // A peer that goes before it has acknowledged everything asks again.
        if send.finish().is_ok() {
            let _ = send.delivered().await;
        }
        Ok(answer)
    }
}

impl GreetingError {
    /// How it is counted, and what the peer is told.
    fn verdict(&self) -> (HandshakeOutcome, (CloseCode, String)) {
        use HandshakeOutcome::{Failed, Refused};
        match self {
            Self::Hello => (Refused, (CloseCode::Refused, String::new())),
            Self::Identity(why) => (Refused, (CloseCode::IdentityRefused, (*why).to_owned())),
            Self::Revoked => (Refused, (CloseCode::Revoked, self.to_string())),
            Self::OutOfTurn { .. } => (Failed, (CloseCode::Misbehaved, self.to_string())),
            Self::Handshake(_) | Self::Record(_) => (Failed, (CloseCode::SessionFailed, self.to_string())),
            Self::Frame(_) => (Failed, (CloseCode::Misbehaved, self.to_string())),
            Self::Ended(_) => (Failed, (CloseCode::Done, String::new())),
            Self::Ours(_) => (Failed, (CloseCode::Internal, String::new())),
        }
    }
}

/// A worker that has said its first sealed word.
struct Greeted {
    conn: ConnId,
    worker: Worker,
    instance: Instance,
    session: Session,
    send: SendStream,
    sealer: Sealer,
    control: ControlReader,
}

/// The prologue of the handshake that follows this Hello; one that cannot be served is answered and refused.
async fn read_hello(
    send: &mut SendStream,
    receive: &mut RecvStream,
    role: Role,
    exporter: &[u8; 32],
) -> Result<Vec<u8>, GreetingError> {
    let frame = receive.read_frame().await?;
    let Some(Frame::Hello(body)) = &frame else { return Err(out_of_turn("Hello", frame.as_ref())) };
    // What cannot be read as a Hello is of a version that nobody here knows.
    let hello = decode::<Hello>(body).ok().filter(|hello| hello.versions.len() <= HELLO_VERSIONS_MAX);
    if hello.is_some_and(|hello| hello.versions.contains(&PROTOCOL_VERSION) && hello.role == role) {
        let hello = Frame::Hello(body.clone()).encode()?;
        return Ok(prologue(&hello, exporter));
    }
    let sentence = format!("this coordinator speaks version {PROTOCOL_VERSION}; update whichever of the two is older");
    let refused = HelloRefused { speaks: vec![PROTOCOL_VERSION], sentence };
    send.write_frame(&Frame::Refused(encode(&refused).into())).await?;
    if send.finish().is_ok() {
        let _ = timeout(GOODBYE_MAX, send.delivered()).await;
    }
    Err(GreetingError::Hello)
}

async fn read_handshake(receive: &mut RecvStream) -> Result<Bytes, GreetingError> {
    match receive.read_frame().await? {
        Some(Frame::Handshake(message)) => Ok(message),
        other => Err(out_of_turn("a handshake message", other.as_ref())),
    }
}

fn out_of_turn(expected: &'static str, got: Option<&Frame>) -> GreetingError {
    let got = got.map_or_else(|| "the stream's end".to_owned(), |frame| format!("{:?}", frame.kind()));
    GreetingError::OutOfTurn { expected, got }
}

fn ephemeral() -> Result<StaticSecret, GreetingError> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(bytes.as_mut()).map_err(|error| GreetingError::Ours(error.to_string()))?;
    Ok(StaticSecret::from(*bytes))
}

/// The worker's half of the control stream.
struct ControlReader {
    stream: RecvStream,
    opener: Opener,
    assembler: MessageAssembler,
    record: BytesMut,
    door: Arc<Door>,
}

impl ControlReader {
    fn new(stream: RecvStream, opener: Opener, door: Arc<Door>) -> Self {
        Self { stream, opener, assembler: MessageAssembler::default(), record: BytesMut::new(), door }
    }

    /// The next message; none where the worker ended the stream in order.
    async fn next(&mut self) -> Result<Option<FromWorker>, ReadError> {
        loop {
            if !self.stream.read_record(&mut self.record).await? {
                return if self.opener.is_finished() { Ok(None) } else { Err(ReadError::Ended) };
            }
            let sealed = self.record.len() as u64;
            let (header, body) = self.record.split_first_chunk_mut().ok_or(ReadError::Ended)?;
            let opened = self.opener.open_in_place(header, body)?;
            self.door.telemetry.passed(Direction::In, Kind::Control, 1, sealed, opened.plaintext.len() as u64);
            if let Some(message) = self.assembler.push(opened)? {
                return Ok(Some(decode(&message)?));
            }
        }
    }
}

/// Who signs what a worker offers.
struct Signer {
    key: [u8; 32],
    /// The point that it stands for, five times as large, once there was something to verify.
    read: Option<Box<PublicKey>>,
}

impl Signer {
    fn has_signed(&mut self, manifest: &Signed) -> bool {
        if self.read.is_none() {
            self.read = PublicKey::read(&self.key).ok().map(Box::new);
        }
        let (Some(key), Ok(signature)) = (&self.read, manifest.signature[..].try_into()) else { return false };
        key.verify(MANIFEST_CONTEXT, &manifest.bytes, signature).is_ok()
    }
}

/// What the tasks of one connection share.
#[derive(Clone)]
struct Peer {
    conn: ConnId,
    door: Arc<Door>,
    connection: Connection,
    /// Held for the derivation of one key.
    session: Arc<Mutex<Session>>,
}

impl Peer {
    async fn say(&self, event: FromConn) {
        // A loop that has ended closes the connection, too.
        let _ = self.door.events.send(event).await;
    }

    /// Waits for the connection's end, and ends what reads and speaks on it.
    async fn watch(self, mut tasks: JoinSet<()>, speaking: JoinHandle<()>) {
        // New keys once a day: the worker comes back at once.
        if timeout(SESSION_AGE_MAX, self.connection.closed()).await.is_err() {
            self.connection.close(CloseCode::GoingAway, "the session is a day old");
        }
        tasks.shutdown().await;
        speaking.abort();
        // The loop may have ended first.
        let _ = self.door.events.send(FromConn::Gone(self.conn)).await;
    }

    // --- in ---

    async fn read(self, mut control: ControlReader, key: [u8; 32]) {
        let mut signer = Signer { key, read: None };
        loop {
            let (event, is_last) = match control.next().await {
                Ok(Some(message)) => (self.heard(message, &mut signer), false),
                Err(ReadError::Message(error)) => (self.misbehaved(&error), true),
                // The worker has said its last word; what it is told may still be on its way.
                Ok(None) => return,
                Err(ReadError::Stream(transport::RecordError::Stream(error))) => {
                    tracing::debug!(%error, "control stream ended");
                    return self.connection.close(CloseCode::Done, "");
                }
                Err(error) => {
                    tracing::warn!(peer = %self.connection.remote_address(), "session failed: {error}");
                    return self.connection.close(CloseCode::SessionFailed, &error.to_string());
                }
            };
            self.say(event).await;
            if is_last {
                return;
            }
        }
    }

    /// What the event loop learns of a message.
    fn heard(&self, message: FromWorker, signer: &mut Signer) -> FromConn {
        match message {
            FromWorker::Offer(signed) => self.offered(&signed, signer),
            FromWorker::Leaving(leave) => self.leaving(leave),
            message => FromConn::Said(self.conn, message),
        }
    }

    fn misbehaved(&self, what: &dyn std::fmt::Display) -> FromConn {
        FromConn::Misbehaved(self.conn, what.to_string())
    }

    /// A worker's own sentence goes to the operator's terminal.
    fn leaving(&self, leave: Leave) -> FromConn {
        let leave = match leave {
            Leave::NotAllowed(sentence) | Leave::DataUnfit(sentence) if sentence.len() > SENTENCE_LEN_MAX => {
                let got = sentence.len();
                return self.misbehaved(&format!("a sentence of {got} bytes, at most {SENTENCE_LEN_MAX} allowed"));
            }
            Leave::NotAllowed(sentence) => Leave::NotAllowed(printable(&sentence)),
            Leave::DataUnfit(sentence) => Leave::DataUnfit(printable(&sentence)),
            Leave::Stopping => Leave::Stopping,
        };
        FromConn::Said(self.conn, FromWorker::Leaving(leave))
    }

    fn offered(&self, signed: &Signed, signer: &mut Signer) -> FromConn {
        let manifest = match decode::<Manifest>(&signed.bytes) {
            Ok(manifest) => Box::new(manifest),
            Err(error) => return self.misbehaved(&error),
        };
        FromConn::Offered(self.conn, manifest, signer.has_signed(signed))
    }

    /// QUIC bounds how many there are at once.
    async fn accept_uploads(self) {
        let mut uploads = JoinSet::new();
        while let Ok(stream) = self.connection.accept_uni().await {
            while uploads.try_join_next().is_some() {}
            uploads.spawn(self.clone().upload(stream));
        }
    }

    async fn upload(self, mut stream: RecvStream) {
        let begun = timeout(UPLOAD_SILENCE_MAX, self.begin_upload(&mut stream)).await;
        let (opener, upload) = match begun {
            Ok(Ok(begun)) => begun,
            Ok(Err(error)) => return self.upload_failed(&error).await,
            Err(_) => return stream.stop(CloseCode::TimedOut),
        };
        if !upload.from.is_multiple_of(RECORD_BYTES_MAX as u64) {
            return self.say(self.misbehaved(&"an upload that begins in the middle of a record")).await;
        }
        let (ticket, granted) = oneshot::channel();
        self.say(FromConn::Upload(self.conn, upload, ticket)).await;
        let Ok(Ok(Ticket { number, declared, part, stop })) = timeout(UPLOAD_EARLY_MAX, granted).await else {
            return stream.stop(CloseCode::Done);
        };
        let task = declared.task;
        let received = tokio::select! {
            received = self.receive(&mut stream, opener, declared, part) => received,
            _ = stop => return stream.stop(CloseCode::Done),
        };
        stream.close();
        self.say(FromConn::Received(number, task, received)).await;
    }

    async fn upload_failed(&self, error: &ReadError) {
        match error {
            ReadError::Stream(transport::RecordError::Stream(_)) | ReadError::Ended => {}
            ReadError::Message(_) => self.say(self.misbehaved(error)).await,
            error => self.connection.close(CloseCode::SessionFailed, &error.to_string()),
        }
    }

    /// The stream's number, and whose payload follows.
    async fn begin_upload(&self, stream: &mut RecvStream) -> Result<(Opener, Upload), ReadError> {
        let Ok(Some(Frame::StreamOpen(number))) = stream.read_frame().await else { return Err(ReadError::Ended) };
        let session = self.session.lock();
        let opener = session.unwrap_or_else(PoisonError::into_inner).accept_stream(number);
        let mut opener = opener?;
        let mut record = BytesMut::new();
        if !stream.read_record(&mut record).await? {
            return Err(ReadError::Ended);
        }
        let sealed = record.len() as u64;
        let (header, body) = record.split_first_chunk_mut().ok_or(ReadError::Ended)?;
        let opened = opener.open_in_place(header, body)?;
        self.door.telemetry.passed(Direction::In, Kind::Control, 1, sealed, opened.plaintext.len() as u64);
        let upload = decode(opened.plaintext)?;
        Ok((opener, upload))
    }

    async fn receive(
        &self,
        stream: &mut RecvStream,
        opener: Opener,
        declared: Declared,
        part: Option<Part>,
    ) -> Received {
        let kind = Kind::from(declared.kind);
        let is_behind = part.is_some();
        let begin = move || Intake::new(opener, declared, part);
        let mut intake = match if is_behind { on_compute_pool(begin).await } else { begin() } {
            Ok(intake) => intake,
            Err(error) => return self.verdict(Err(error)),
        };
        loop {
            let mut batch = Vec::new();
            if read_batch(stream, &mut batch).await.is_none() || batch.is_empty() {
                return Received::Cut;
            }
            let (returned, mut taken) = self.take(intake, batch, kind).await;
            intake = returned;
            if let Err(IntakeError::Full(_)) = taken {
                (intake, taken) = self.await_room(intake).await;
            }
            match taken {
                Ok(false) => {}
                Ok(true) => return self.verdict(self.finish(intake).await),
                Err(error) => return self.verdict(Err(error)),
            }
        }
    }

    /// While the disk is full, what came last waits in memory, and its sender with it.
    async fn await_room(&self, mut intake: Intake) -> (Intake, Result<bool, IntakeError>) {
        let _waiting = ShortOfRoom::new(&self.door.short_of_room);
        loop {
            tokio::time::sleep(ROOM_ASKED_EVERY).await;
            let taken;
            (intake, taken) = on_compute_pool(move || {
                let taken = intake.retry();
                (intake, taken)
            })
            .await;
            if !matches!(taken, Err(IntakeError::Full(_))) {
                return (intake, taken);
            }
        }
    }

    /// Opening, hashing, checking and spooling, on the compute pool if there is enough of it.
    async fn take(
        &self,
        mut intake: Intake,
        mut batch: Vec<BytesMut>,
        kind: Kind,
    ) -> (Intake, Result<bool, IntakeError>) {
        let sealed: usize = batch.iter().map(BytesMut::len).sum();
        let records = batch.len();
        let overhead = records * (transport::limits::RECORD_HEADER_BYTES + 16);
        let plaintext = sealed.saturating_sub(overhead) as u64;
        self.door.telemetry.passed(Direction::In, kind, records as u64, sealed as u64, plaintext);
        let seconds = self.door.telemetry.metrics.open_seconds.clone();
        let in_place = sealed <= TAKEN_IN_PLACE_BYTES && intake.is_in_memory();
        let work = move || {
            let began = Instant::now();
            let taken = intake.take(&mut batch);
            seconds.record(began.elapsed().as_secs_f64());
            (intake, taken)
        };
        if in_place { work() } else { on_compute_pool(work).await }
    }

    /// The verdict of a survey or of rows is more than a comparison.
    async fn finish(&self, intake: Intake) -> Result<Payload, IntakeError> {
        if intake.is_small() { intake.finish() } else { on_compute_pool(move || intake.finish()).await }
    }

    fn verdict(&self, finished: Result<Payload, IntakeError>) -> Received {
        match finished {
            Ok(payload) => Received::Whole(payload),
            Err(IntakeError::Spoiled(refusal)) => Received::Spoiled(refusal),
            Err(IntakeError::Remains) => Received::Cut,
            Err(error @ (IntakeError::Disk(_) | IntakeError::Full(_))) => Received::Broken(error),
            Err(error) => Received::Foul(self.conn, error.to_string()),
        }
    }

    // --- out ---

    fn signed(&self, receipt: &Receipt) -> ToWorker {
        let bytes = encode(receipt);
        let signature = self.door.identity.signing.sign(RECEIPT_CONTEXT, &bytes).to_vec();
        ToWorker::Receipt(Signed { bytes, signature })
    }

    async fn download(self, content: Arc<Content>) {
        if let Err(error) = self.stream(&content).await {
            tracing::debug!(%error, "a download ended early");
        }
    }

    async fn stream(&self, content: &Content) -> Result<(), DownloadError> {
        let (number, mut sealer) = self.session.lock().unwrap_or_else(PoisonError::into_inner).open_stream()?;
        if content.reference.bytes > transport::limits::SEND_WINDOW_BYTES_MIN {
            self.connection.send_within(self.door.server.send_window_bytes());
        }
        let mut stream = self.connection.open_uni().await?;
        stream.write_frame(&Frame::StreamOpen(number)).await?;
        let mut first = Vec::new();
        let named = encode(&Download { id: content.reference.id });
        sealer.seal(Flag::Final, &named, &mut first)?;
        let telemetry = &self.door.telemetry;
        telemetry.passed(Direction::Out, Kind::Control, 1, first.len() as u64, named.len() as u64);
        stream.write_record(first.into()).await?;
        for record in &content.records {
            let plaintext = record.len().saturating_sub(transport::limits::BROADCAST_HEADER_BYTES + 16) as u64;
            stream.write_record(record.clone()).await?;
            telemetry.passed(Direction::Out, content.kind, 1, record.len() as u64, plaintext);
        }
        stream.finish()?;
        Ok(stream.delivered().await?)
    }
}

/// What speaks to one worker.
///
/// Whatever is to be said at the same time leaves together. That something is held, and a receipt, are what nobody waits
/// for: they wait for the next thing to be said, [`UNHURRIED`] at least. A receipt is signed when nobody else has
/// anything to do, and the next task does not wait for it.
struct Voice {
    peer: Peer,
    send: SendStream,
    sealer: Sealer,
    downloads: JoinSet<()>,
    unhurried: Vec<ToWorker>,
    /// Receipts that may be said, and are not signed.
    owed: Vec<Receipt>,
    /// A receipt that may be signed ahead of its commit, and not said before.
    foreseen: Option<Box<(Receipt, Option<ToWorker>)>>,
    /// The clock struck since something waits.
    has_waited: bool,
    /// What is sealed and not written.
    out: Vec<u8>,
}

/// That nothing more can or is to be said.
struct Mute(CloseCode, String);

impl Voice {
    fn new(peer: Peer, send: SendStream, sealer: Sealer) -> Self {
        let (unhurried, out) = (Vec::new(), Vec::new());
        let downloads = JoinSet::new();
        Self { peer, send, sealer, downloads, unhurried, owed: Vec::new(), foreseen: None, has_waited: false, out }
    }

    /// Says what is to be said, in order, and then goodbye.
    async fn speak(mut self, mut queue: mpsc::Receiver<Box<Saying>>) {
        let goodbye = loop {
            if let Err(goodbye) = self.turn(&mut queue).await {
                break goodbye;
            }
            if self.write().await.is_none() {
                return;
            }
        };
        let Self { peer, mut send, mut out, sealer, .. } = self;
        let last_words = async {
            if sealer.finish(&mut out).is_ok() && send.write_record(out.into()).await.is_ok() && send.finish().is_ok() {
                // Whether it arrived makes no difference any more.
                let _ = send.delivered().await;
            }
        };
        let _ = timeout(GOODBYE_MAX, last_words).await;
        peer.connection.close(goodbye.0, &goodbye.1);
    }

    /// Seals all that is to be said by now.
    async fn turn(&mut self, queue: &mut mpsc::Receiver<Box<Saying>>) -> Result<(), Mute> {
        let mut next = if self.has_to_sign() {
            tokio::select! {
                biased;
                next = queue.recv() => next,
                // What others are to be told goes first, too.
                () = tokio::task::yield_now() => {
                    self.sign();
                    return Ok(());
                }
            }
        } else if self.is_patient() {
            queue.recv().await
        } else {
            tokio::select! {
                biased;
                next = queue.recv() => next,
                () = self.peer.door.patience.stroke() => match std::mem::replace(&mut self.has_waited, true) {
                    true => return self.hurry(),
                    false => return Ok(()),
                },
            }
        };
        loop {
            let Some(saying) = next else {
                self.hurry()?;
                return Err(Mute(CloseCode::GoingAway, String::new()));
            };
            self.take(*saying)?;
            match queue.try_recv() {
                Ok(saying) => next = Some(saying),
                Err(mpsc::error::TryRecvError::Empty) => return Ok(()),
                Err(mpsc::error::TryRecvError::Disconnected) => next = None,
            }
        }
    }

    /// Whether nothing waits to be said.
    fn is_patient(&self) -> bool {
        self.unhurried.is_empty() && self.owed.is_empty()
    }

    fn has_to_sign(&self) -> bool {
        !self.owed.is_empty() || self.foreseen.as_ref().is_some_and(|foreseen| foreseen.1.is_none())
    }

    fn sign(&mut self) {
        let Self { peer, owed, unhurried, foreseen, .. } = self;
        unhurried.extend(owed.drain(..).map(|receipt| peer.signed(&receipt)));
        if let Some((receipt, signed)) = foreseen.as_deref_mut() {
            signed.get_or_insert_with(|| peer.signed(receipt));
        }
    }

    fn take(&mut self, saying: Saying) -> Result<(), Mute> {
        match saying {
            Saying::Message(message @ ToWorker::Held { .. }) => {
                self.unhurried.push(message);
                Ok(())
            }
            // It leaves with the task after the next one at the latest: were two lost in a crash, both are given again.
            Saying::Receipt(receipt) => {
                match self.foreseen.take().filter(|foreseen| foreseen.0 == receipt).and_then(|foreseen| foreseen.1) {
                    Some(signed) => self.unhurried.push(signed),
                    None => self.owed.push(receipt),
                }
                Ok(())
            }
            Saying::Foreseen(receipt) => {
                self.foreseen = Some(Box::new((receipt, None)));
                Ok(())
            }
            Saying::Message(message @ ToWorker::Assigned(_)) => {
                // The last one may follow the task; there was no moment for the one before.
                if self.owed.len() > 1 {
                    self.sign();
                }
                self.seal_unhurried()?;
                self.seal(&message)
            }
            Saying::Message(message) => {
                self.hurry()?;
                self.seal(&message)
            }
            Saying::Content(content) => self.begin(content),
            Saying::Close(code, reason) => {
                self.hurry()?;
                Err(Mute(code, reason))
            }
        }
    }

    /// Seals what waited, and what is still to be signed, too.
    fn hurry(&mut self) -> Result<(), Mute> {
        self.sign();
        self.seal_unhurried()
    }

    fn seal_unhurried(&mut self) -> Result<(), Mute> {
        self.has_waited = false;
        let unhurried = std::mem::take(&mut self.unhurried);
        unhurried.iter().try_for_each(|message| self.seal(message))
    }

    fn seal(&mut self, message: &ToWorker) -> Result<(), Mute> {
        let began = Instant::now();
        let (plaintext, before) = (encode(message), self.out.len());
        if let Err(error) = self.sealer.seal_message(&plaintext, &mut self.out) {
            tracing::warn!(%error, "a control message cannot be sealed");
            return Err(self.end(CloseCode::Internal, ""));
        }
        let telemetry = &self.peer.door.telemetry;
        telemetry.metrics.seal_seconds.record(began.elapsed().as_secs_f64());
        let records = plaintext.len().div_ceil(RECORD_BYTES_MAX).max(1) as u64;
        let sealed = (self.out.len() - before) as u64;
        telemetry.passed(Direction::Out, Kind::Control, records, sealed, plaintext.len() as u64);
        Ok(())
    }

    /// Ends the connection without a goodbye.
    fn end(&self, code: CloseCode, reason: &str) -> Mute {
        self.peer.connection.close(code, reason);
        Mute(code, reason.to_owned())
    }

    /// None once nothing more can be said.
    async fn write(&mut self) -> Option<()> {
        if self.out.is_empty() {
            return Some(());
        }
        self.send.write_record(std::mem::take(&mut self.out).into()).await.ok()
    }

    /// Streams a content: what the connection takes at once leaves with what is said next.
    fn begin(&mut self, content: Arc<Content>) -> Result<(), Mute> {
        while self.downloads.try_join_next().is_some() {}
        if self.downloads.len() >= DOWNLOADS_MAX {
            return Err(self.end(CloseCode::TimedOut, "contents are not read"));
        }
        let mut download = Box::pin(self.peer.clone().download(content));
        if download.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            // It is polled again there, by who wakes it.
            self.downloads.spawn(download);
        }
        Ok(())
    }
}

/// Counts an upload that waits for room, as long as it does.
struct ShortOfRoom<'a>(&'a watch::Sender<usize>);

impl<'a> ShortOfRoom<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for ShortOfRoom<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Why a content did not go out.
#[derive(Debug, thiserror::Error)]
enum DownloadError {
    #[error(transparent)]
    Number(#[from] StreamError),
    #[error(transparent)]
    Ended(#[from] transport::Ended),
    #[error(transparent)]
    Frame(#[from] transport::FrameError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Stream(#[from] transport::StreamError),
}

/// Some records: up to a mebibyte, or up to the one that says that it is the last. None where the stream breaks off.
async fn read_batch(stream: &mut RecvStream, batch: &mut Vec<BytesMut>) -> Option<()> {
    while batch.len() < BATCH_RECORDS {
        let mut record = BytesMut::new();
        if !timeout(UPLOAD_SILENCE_MAX, stream.read_record(&mut record)).await.ok()?.ok()? {
            return Some(());
        }
        // Not authenticated yet: a flag that lies makes a smaller batch, or a longer wait that ends in silence.
        let last = record.get(2) == Some(&(Flag::Final as u8));
        batch.push(record);
        if last {
            return Some(());
        }
    }
    Some(())
}

/// Runs blocking work beside the event loop.
pub(crate) async fn on_compute_pool<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The pool ends only with the runtime, which ends this task, too: what is left is a panic of our own.
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the future that an async method of one to four arguments gives.
    macro_rules! size {
        ($method:path, $($argument:ident),+) => {{
            fn of<$($argument,)+ F>(_: impl Fn($($argument),+) -> F) -> usize {
                size_of::<F>()
            }
            of($method)
        }};
    }

    /// A fleet of 20,000 that has nothing to do waits in these.
    #[test]
    fn what_waits_for_an_idle_worker_is_small() {
        let read = size!(Peer::read, A, B, C);
        let uploads = size!(Peer::accept_uploads, A);
        let speak = size!(Voice::speak, A, B);
        let watch = size!(Peer::watch, A, B, C);
        let all = read + uploads + speak + watch;
        assert!(all <= 3_200, "{all} bytes: read {read}, uploads {uploads}, speak {speak}, watch {watch}");
    }
}
