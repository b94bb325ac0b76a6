//! One connection to the coordinator: found, proved, and its control stream sealed.
//!
//! [`greet`] is what enrolment and work have in common: Hello and the first handshake message leave together, and the
//! answer to both is one frame. Nothing that the coordinator does changes before our first sealed record. A [`Link`] is
//! what stands then. Two tasks of its own move the control messages; the loop owns the session and gives out stream keys.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use certs::{CertificateDer, KeyError, SERVER_NAME};
use protocol::limits::SILENCE_MAX;
use protocol::messages::{
    DecodeError, FromWorker, Hello, HelloRefused, PROTOCOL_VERSION, Role, SessionMode, ToWorker, decode, encode,
    printable,
};
use protocol::session::{
    Established, HandshakeError, Initiator, MessageAssembler, Opener, Sealer, Session, StaticSecret, prologue,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use transport::{
    Client, CloseCode, ConnectError, ConnectFailure, Connected, Connection, Credentials, Ended, Frame, FrameError,
    RecvStream, SendStream, StreamError,
};
use zeroize::Zeroizing;

use crate::enrolments::Enrolment;
use crate::state::Keys;

/// How long the coordinator may take to answer the handshake, at first and in the end. One that was killed after it
/// acknowledged the question never answers, and nothing leaves that its successor could refuse; a busy one needs longer.
const ANSWER_MIN: Duration = Duration::from_secs(2);
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long an answer is waited for after so many attempts that came to nothing.
pub(crate) fn patience(attempts: u32) -> Duration {
    ANSWER_MIN.saturating_mul(1 << attempts.min(8)).min(ANSWER_MAX)
}

/// How long what we said last may take to arrive.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// Control messages that wait to be written. Beats are the most of them, four a second.
const OUTGOING_MAX: usize = 64;

/// The longest time between two beats that counts as listening: somewhat more than the slowest pulse.
const LISTENED_MAX: Duration = Duration::from_secs(2);

/// The addresses that these names have now.
///
/// The first of each name come first, so that a name with many does not hide the others.
pub(crate) async fn resolve(addresses: &[String]) -> Vec<SocketAddr> {
    let mut found: Vec<(usize, SocketAddr)> = Vec::new();
    for address in addresses {
        match address.parse() {
            Ok(literal) => found.push((0, literal)),
            Err(_) => match tokio::net::lookup_host(address).await {
                Ok(resolved) => found.extend(resolved.enumerate()),
                Err(error) => tracing::debug!(%address, %error, "name cannot be resolved"),
            },
        }
    }
    found.sort_by_key(|(place, _)| *place);
    found.into_iter().map(|(_, address)| address).collect()
}

/// A sealed session whose control stream nobody has used yet.
pub(crate) struct Greeted {
    pub(crate) connection: Connection,
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) send: SendStream,
    pub(crate) receive: RecvStream,
    /// What the coordinator's handshake message carried.
    pub(crate) payload: Vec<u8>,
    pub(crate) established: Established,
}

/// What a connection is for and whom it is to.
pub(crate) struct Call<'a> {
    pub(crate) addresses: &'a [String],
    /// For TLS.
    pub(crate) credentials: &'a Credentials,
    pub(crate) role: Role,
    /// The coordinator's X25519 key.
    pub(crate) coordinator: &'a [u8; 32],
    /// What our handshake message carries.
    pub(crate) payload: &'a [u8],
    /// How long the answer may take.
    pub(crate) patience: Duration,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// None of the names leads to an address.
    #[error("no address is known for {0}")]
    NoAddress(String),
    /// Nobody there, or nobody whom we trust.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The coordinator speaks another version.
    #[error("the coordinator refuses: {}", printable(&.0.sentence))]
    Refused(HelloRefused),
    /// It ended the connection.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// A stream failed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A frame could not be read.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The handshake failed.
    #[error("secure session failed: {0}")]
    Handshake(#[from] HandshakeError),
    /// It says what it should not.
    #[error("the coordinator sent {0} where its handshake message was expected")]
    OutOfTurn(&'static str),
    /// Its words cannot be read.
    #[error("the coordinator's answer cannot be read: {0}")]
    Unreadable(#[from] DecodeError),
    /// It does not answer.
    #[error("the coordinator did not answer within {0:?}")]
    Silent(Duration),
    /// Our own keys cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The operating system gave no entropy.
    #[error("operating system gave no entropy: {0}")]
    Entropy(getrandom::Error),
}

impl LinkError {
    /// Whether somebody answered who is not the coordinator that we look for.
    pub(crate) fn is_foreign(&self) -> bool {
        matches!(self, Self::Connect(error) if error.is_untrusted())
    }

    /// Whether somebody answered who takes nobody in: a coordinator that is full, or that is being shut down.
    pub(crate) fn is_refusal(&self) -> bool {
        let Self::Connect(ConnectError::NowhereThere(failures)) = self else { return false };
        failures.iter().any(|(_, failure)| *failure == ConnectFailure::Full)
    }

    /// The code with which the coordinator closed the connection.
    pub(crate) fn code(&self) -> Option<CloseCode> {
        match self {
            Self::Ended(ended)
            | Self::Stream(StreamError::Lost(ended))
            | Self::Frame(FrameError::Stream(StreamError::Lost(ended))) => ended.code(),
            _ => None,
        }
    }
}

/// Connects and completes the handshake.
pub(crate) async fn greet(client: &Client, keys: &Keys, call: Call<'_>) -> Result<Greeted, LinkError> {
    let addresses = resolve(call.addresses).await;
    if addresses.is_empty() {
        return Err(LinkError::NoAddress(call.addresses.join(", ")));
    }
    let Connected { connection, ca, exporter } = client.connect_as(call.credentials, &addresses, SERVER_NAME).await?;
    let shaken = handshake(&connection, &exporter, keys, call.role, call.coordinator, call.payload);
    let silent = Err(LinkError::Silent(call.patience));
    let shaken = tokio::time::timeout(call.patience, shaken).await.unwrap_or(silent);
    let (send, receive, payload, established) = match shaken {
        Ok(shaken) => shaken,
        Err(error) => {
            let error = better_told(&connection, error);
            connection.close(CloseCode::SessionFailed, "");
            return Err(error);
        }
    };
    Ok(Greeted { connection, ca, send, receive, payload, established })
}

type Shaken = (SendStream, RecvStream, Vec<u8>, Established);

async fn handshake(
    connection: &Connection,
    exporter: &[u8; 32],
    keys: &Keys,
    role: Role,
    coordinator: &[u8; 32],
    payload: &[u8],
) -> Result<Shaken, LinkError> {
    let hello = Hello { versions: vec![PROTOCOL_VERSION], role, mode: SessionMode::Direct };
    let hello = Frame::Hello(encode(&hello).into());
    let prologue = prologue(&hello.encode()?, exporter);
    let coordinator = keys.acquaintance(coordinator)?;
    let local = keys.session.session_key();
    let (initiator, message) = Initiator::start(&prologue, local, ephemeral()?, &coordinator, payload)?;
    let (mut send, mut receive) = connection.open_control().await?;
    send.write_frame(&hello).await?;
    send.write_frame(&Frame::Handshake(message.into())).await?;
    let (payload, established) = match receive.read_frame().await? {
        Some(Frame::Handshake(answer)) => initiator.finish(&answer)?,
        Some(Frame::Refused(body)) => return Err(LinkError::Refused(decode(&body)?)),
        Some(Frame::Hello(_)) => return Err(LinkError::OutOfTurn("a Hello")),
        Some(Frame::StreamOpen(_)) => return Err(LinkError::OutOfTurn("a stream number")),
        None => return Err(LinkError::OutOfTurn("nothing")),
    };
    Ok((send, receive, payload, established))
}

/// A connection that ended says why better than the stream that ended with it.
fn better_told(connection: &Connection, error: LinkError) -> LinkError {
    match (&error, connection.ended()) {
        (LinkError::Refused(_) | LinkError::Silent(_), _) | (_, None) => error,
        (_, Some(ended)) => LinkError::Ended(ended),
    }
}

fn ephemeral() -> Result<StaticSecret, LinkError> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(bytes.as_mut()).map_err(LinkError::Entropy)?;
    Ok(StaticSecret::from(*bytes))
}

/// What comes of a link.
#[derive(Debug)]
pub(crate) enum FromLink {
    /// The coordinator said something.
    Said(Box<ToWorker>),
    /// It opened a stream of this number.
    Opened(u32, RecvStream),
    /// The connection is over.
    Ended(LinkEnd),
}

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkEnd {
    #[error(transparent)]
    Connection(#[from] Ended),
    #[error("control stream: {0}")]
    Stream(#[from] transport::RecordError),
    #[error("control stream: {0}")]
    Record(#[from] protocol::session::RecordError),
    #[error("control stream: {0}")]
    Message(#[from] DecodeError),
    #[error("control stream ended")]
    ControlEnded,
    #[error("nothing was heard of the coordinator for {SILENCE_MAX:?}")]
    Silent,
}

/// A live connection with its session.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) connection: Connection,
    pub(crate) session: Session,
    ear: Ear,
    outgoing: mpsc::Sender<FromWorker>,
    writer: JoinHandle<()>,
    readers: [JoinHandle<()>; 2],
}

/// Whether a connection is dead, as its beats find out: each is answered by a datagram at least, if only to acknowledge
/// it. QUIC's own idle timeout is three times as long.
#[derive(Debug)]
struct Ear {
    /// Datagrams that have come.
    heard: u64,
    looked: Instant,
    silent_for: Duration,
}

impl Ear {
    fn new(now: Instant) -> Self {
        Self { heard: 0, looked: now, silent_for: Duration::ZERO }
    }

    /// Whether, looking after each beat, nothing has come for [`SILENCE_MAX`]. Only time in which this process listened
    /// counts: one that was stopped for a minute has not heard what waits for it yet.
    fn is_silent(&mut self, now: Instant, heard: u64) -> bool {
        let since = now.duration_since(self.looked).min(LISTENED_MAX);
        self.looked = now;
        self.silent_for = if heard == self.heard { self.silent_for + since } else { Duration::ZERO };
        self.heard = heard;
        self.silent_for >= SILENCE_MAX
    }
}

impl Link {
    /// Connects as an enrolled worker. What comes of the link goes to `events`, wrapped by `wrap`.
    pub(crate) async fn connect<E: Send + 'static>(
        client: &Client,
        keys: &Keys,
        enrolment: &Enrolment,
        patience: Duration,
        events: mpsc::Sender<E>,
        wrap: fn(u64, FromLink) -> E,
        number: u64,
    ) -> Result<Self, LinkError> {
        let call = Call {
            addresses: &enrolment.addresses,
            credentials: &keys.credentials(client, enrolment)?,
            role: Role::Worker,
            coordinator: &enrolment.coordinator,
            payload: &[],
            patience,
        };
        let Greeted { connection, send, receive, established, .. } = greet(client, keys, call).await?;
        let (session, sealer, opener) = Session::begin(established);
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let events = Events { events, wrap, number };
        let readers = [
            tokio::spawn(read_control(connection.clone(), receive, opener, events.clone())),
            tokio::spawn(accept_streams(connection.clone(), events)),
        ];
        let writer = tokio::spawn(write_control(send, sealer, queue));
        Ok(Self { connection, session, ear: Ear::new(Instant::now()), outgoing, writer, readers })
    }

    /// Whether beats have met nothing but silence for [`SILENCE_MAX`]. To be asked after each.
    pub(crate) fn is_silent(&mut self) -> bool {
        self.ear.is_silent(Instant::now(), self.connection.stats().received_datagrams)
    }

    /// Queues a control message. A coordinator that does not read ends the connection.
    pub(crate) fn send(&self, message: FromWorker) {
        if self.outgoing.try_send(message).is_err() {
            self.connection.close(CloseCode::TimedOut, "control messages are not read");
        }
    }

    /// Closes once all that was said has arrived, or after two seconds.
    pub(crate) async fn close(self, code: CloseCode) {
        let Self { connection, outgoing, writer, readers, .. } = self;
        drop(outgoing);
        // A peer that is gone hears nothing; that is what the bound is for.
        let _ = tokio::time::timeout(GOODBYE_MAX, writer).await;
        readers.iter().for_each(JoinHandle::abort);
        connection.close(code, "");
    }
}

/// Where the tasks of one link report to.
struct Events<E> {
    events: mpsc::Sender<E>,
    wrap: fn(u64, FromLink) -> E,
    number: u64,
}

impl<E> Clone for Events<E> {
    fn clone(&self) -> Self {
        Self { events: self.events.clone(), wrap: self.wrap, number: self.number }
    }
}

impl<E> Events<E> {
    /// False once nobody listens any more.
    async fn say(&self, event: FromLink) -> bool {
        self.events.send((self.wrap)(self.number, event)).await.is_ok()
    }
}

async fn read_control<E: Send>(connection: Connection, receive: RecvStream, opener: Opener, events: Events<E>) {
    let mut end = read_messages(receive, opener, &events).await;
    if matches!(end, LinkEnd::ControlEnded) {
        // Whoever ends the control stream closes the connection next, and says why. One that does not is closed below.
        let _ = tokio::time::timeout(GOODBYE_MAX, connection.closed()).await;
    }
    if let Some(ended) = connection.ended() {
        end = ended.into();
    } else {
        connection.close(CloseCode::SessionFailed, &end.to_string());
    }
    events.say(FromLink::Ended(end)).await;
}

async fn read_messages<E>(mut receive: RecvStream, mut opener: Opener, events: &Events<E>) -> LinkEnd {
    let mut record = BytesMut::new();
    let mut assembler = MessageAssembler::default();
    loop {
        match receive.read_record(&mut record).await {
            Ok(true) => {}
            Ok(false) => return LinkEnd::ControlEnded,
            Err(error) => return error.into(),
        }
        let message = match open_message(&mut opener, &mut assembler, &mut record) {
            Ok(None) => continue,
            Ok(Some(message)) => message,
            Err(end) => return end,
        };
        if !events.say(FromLink::Said(Box::new(message))).await {
            return LinkEnd::ControlEnded;
        }
    }
}

fn open_message(
    opener: &mut Opener,
    assembler: &mut MessageAssembler,
    record: &mut BytesMut,
) -> Result<Option<ToWorker>, LinkEnd> {
    // `read_record` gives whole records, which are never shorter than their header.
    let Some((header, body)) = record.split_first_chunk_mut() else { return Err(LinkEnd::ControlEnded) };
    let opened = opener.open_in_place(header, body)?;
    match assembler.push(opened)? {
        Some(message) => Ok(Some(decode(&message)?)),
        None => Ok(None),
    }
}

async fn accept_streams<E>(connection: Connection, events: Events<E>) {
    while let Ok(mut stream) = connection.accept_uni().await {
        match stream.read_frame().await {
            Ok(Some(Frame::StreamOpen(number))) => {
                if !events.say(FromLink::Opened(number, stream)).await {
                    return;
                }
            }
            Ok(_) => return connection.close(CloseCode::Misbehaved, "a stream without a number"),
            Err(error) => tracing::debug!(%error, "a stream ended before it began"),
        }
    }
}

async fn write_control(mut send: SendStream, mut sealer: Sealer, mut queue: mpsc::Receiver<FromWorker>) {
    while let Some(message) = queue.recv().await {
        let mut out = Vec::new();
        let sealed = sealer.seal_message(&encode(&message), &mut out);
        if let Err(error) = sealed {
            tracing::warn!(%error, "a control message cannot be sealed");
            return;
        }
        if let Err(error) = send.write_record(Bytes::from(out)).await {
            tracing::debug!(%error, "control stream cannot be written");
            return;
        }
    }
    let mut out = Vec::new();
    if sealer.finish(&mut out).is_ok() && send.write_record(out.into()).await.is_ok() && send.finish().is_ok() {
        // Whether it arrived makes no difference any more.
        let _ = send.delivered().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: Duration = Duration::from_millis(250);

    /// How long it takes until a connection is found dead over which nothing comes, with a look every so often.
    fn found_after(ear: &mut Ear, from: Instant, every: Duration, heard: u64) -> Duration {
        let mut now = from;
        while !ear.is_silent(now, heard) {
            now += every;
        }
        now.duration_since(from)
    }

    #[test]
    fn a_connection_is_dead_when_nothing_came_for_ten_seconds_of_beating() {
        let now = Instant::now();
        assert_eq!(found_after(&mut Ear::new(now), now, BEAT, 1), SILENCE_MAX);
        assert_eq!(found_after(&mut Ear::new(now), now, Duration::from_secs(1), 1), SILENCE_MAX);
    }

    #[test]
    fn an_answer_is_waited_for_ever_longer_up_to_a_bound() {
        assert_eq!([0, 1, 2, 3, u32::MAX].map(|attempts| patience(attempts).as_secs()), [2, 4, 8, 10, 10]);
    }

    #[test]
    fn any_datagram_is_a_sign_of_life() {
        let mut now = Instant::now();
        let mut ear = Ear::new(now);
        for heard in 0..1000 {
            now += BEAT;
            assert!(!ear.is_silent(now, heard / 30));
        }
        assert_eq!(found_after(&mut ear, now, BEAT, 1000), SILENCE_MAX);
    }

    #[test]
    fn a_process_that_was_stopped_for_a_minute_listens_again_before_it_judges() {
        let now = Instant::now();
        let mut ear = Ear::new(now);
        assert!(!ear.is_silent(now, 1));
        let woken = now + Duration::from_secs(60);
        assert!(found_after(&mut ear, woken, BEAT, 1) >= SILENCE_MAX - LISTENED_MAX);
        assert!(!ear.is_silent(woken + Duration::from_secs(20), 2));
    }
}
