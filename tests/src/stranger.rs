//! Peers that are not our programs: they speak the protocol through its own crates, and break it where a test says so.
//!
//! A [`Stranger`] holds an invitation. Its [`Call`] is a TLS connection on which nothing was said yet, a [`Talk`] a
//! sealed session. Whatever is sent comes from the test, byte by byte if need be. Everything here panics when it
//! cannot go on: it is for tests only.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use certs::{CertificateDer, IdentityKey, SERVER_NAME, SessionKey};
use protocol::invitation::Invitation;
use protocol::messages::{
    ContentRef, Download, EnrolAnswer, EnrolRequest, FromWorker, Hello, PROTOCOL_VERSION, Role, SessionMode, ToWorker,
    Upload, decode, encode,
};
use protocol::session::{
    Acquaintance, BroadcastOpener, Established, Flag, Initiator, MessageAssembler, Opener, Sealer, Session,
    StaticSecret, prologue,
};
use transport::{
    Alpn, Client, ClientOptions, Connection, Ended, Frame, FrameError, RecvStream, SendStream, Taps, Target,
    TlsIdentity, Trust,
};

/// Somebody with an invitation.
#[derive(Debug)]
pub struct Stranger {
    /// Its socket.
    pub client: Client,
    /// What it was invited with.
    pub invitation: Invitation,
}

/// What an enrolled worker has: its keys, its certificate, its name.
#[derive(Clone, Debug)]
pub struct Papers {
    /// Of certificate and signatures.
    pub identity: IdentityKey,
    /// Of the sealed session.
    pub session: SessionKey,
    /// What the coordinator gave it.
    pub certificate: CertificateDer<'static>,
    /// The name that was granted.
    pub name: String,
}

/// The Hello of an honest worker.
#[must_use]
pub fn hello(role: Role) -> Hello {
    Hello { versions: vec![PROTOCOL_VERSION], role, mode: SessionMode::Direct }
}

/// Random bytes.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

impl Stranger {
    /// Binds a socket of its own. Must be called within a tokio runtime.
    #[must_use]
    pub fn new(invitation: Invitation) -> Self {
        Self::tapped(invitation, Taps::default())
    }

    /// The same, with somebody who listens.
    #[must_use]
    pub fn tapped(invitation: Invitation, taps: Taps) -> Self {
        let client = Client::bind(ClientOptions { taps, ..ClientOptions::default() }).unwrap();
        Self { client, invitation }
    }

    /// Where the coordinator listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.invitation.addresses[0].parse().unwrap()
    }

    /// Connects. TLS must succeed; what comes of the connection is told if it is over already.
    pub async fn try_call(&self, alpn: Alpn, identity: Option<TlsIdentity>) -> Result<Call, Ended> {
        let target = Target {
            addresses: vec![self.address()],
            server_name: SERVER_NAME.to_owned(),
            trust: Trust::Fingerprint(self.invitation.ca_sha256),
            identity,
            alpn,
        };
        let connected = self.client.connect(&target).await.unwrap();
        let (send, receive) = connected.connection.open_control().await?;
        Ok(Call { connection: connected.connection, exporter: connected.exporter, send, receive })
    }

    /// Connects to be enrolled.
    pub async fn call_to_join(&self) -> Call {
        self.try_call(Alpn::Join, None).await.unwrap()
    }

    /// Connects with a worker's certificate.
    pub async fn call(&self, papers: &Papers) -> Call {
        self.try_call(Alpn::Main, Some(papers.tls())).await.unwrap()
    }

    /// The whole handshake of an enrolled worker.
    pub async fn talk(&self, papers: &Papers) -> Talk {
        let mut call = self.call(papers).await;
        let (message, initiator) = call.begin(&self.invitation, &hello(Role::Worker), &papers.session, &[]).await;
        call.frame(Frame::Handshake(message.into())).await;
        call.talk(initiator).await
    }

    /// As [`Self::talk`], and the first sealed word.
    pub async fn join(&self, papers: &Papers) -> Talk {
        let mut talk = self.talk(papers).await;
        talk.say(&FromWorker::Join { instance: protocol::ids::Instance(u64::from_le_bytes(random())) }).await;
        talk.until(|message| matches!(message, ToWorker::Welcome(_)).then_some(())).await;
        talk
    }

    /// Asks to be enrolled with these keys and this token.
    pub async fn ask(&self, identity: &IdentityKey, session: &SessionKey, name: &str, token: [u8; 16]) -> EnrolAnswer {
        let request = EnrolRequest { token, name: name.parse().unwrap(), ed25519: identity.public() };
        self.ask_with(session, &request).await
    }

    /// Asks to be enrolled in exactly these words.
    pub async fn ask_with(&self, session: &SessionKey, request: &EnrolRequest) -> EnrolAnswer {
        let mut call = self.call_to_join().await;
        let payload = encode(request);
        let (message, initiator) = call.begin(&self.invitation, &hello(Role::Join), session, &payload).await;
        call.frame(Frame::Handshake(message.into())).await;
        let Some(Frame::Handshake(answer)) = call.hear().await.unwrap() else { panic!("no answer") };
        decode(&initiator.finish(&answer).unwrap().0).unwrap()
    }

    /// Is enrolled with fresh keys.
    pub async fn enrol(&self, name: &str) -> Papers {
        let (identity, session) = (IdentityKey::generate().unwrap(), SessionKey::generate().unwrap());
        match self.ask(&identity, &session, name, self.invitation.token).await {
            EnrolAnswer::Granted { name, certificate, .. } => {
                Papers { identity, session, certificate: certificate.into(), name: name.to_string() }
            }
            EnrolAnswer::Refused(refusal) => panic!("{name}: {refusal}"),
        }
    }
}

impl Papers {
    /// What TLS is shown.
    #[must_use]
    pub fn tls(&self) -> TlsIdentity {
        TlsIdentity { certificate: self.certificate.clone(), key: self.identity.tls_key().unwrap() }
    }
}

/// A connection whose TLS stands.
#[derive(Debug)]
pub struct Call {
    /// The connection.
    pub connection: Connection,
    /// What only its two ends know.
    pub exporter: [u8; 32],
    /// The control stream, out.
    pub send: SendStream,
    /// The control stream, in.
    pub receive: RecvStream,
}

impl Call {
    /// Sends bytes, whatever they are.
    pub async fn bytes(&mut self, bytes: impl Into<Bytes>) {
        // A peer that has hung up already is what some of these tests are after.
        let _ = self.send.write_record(bytes.into()).await;
    }

    /// Sends a frame.
    pub async fn frame(&mut self, frame: Frame) {
        let bytes = frame.encode().unwrap();
        self.bytes(bytes).await;
    }

    /// Sends a Hello, and makes the handshake message that would follow it.
    pub async fn begin<'k>(
        &mut self,
        invitation: &Invitation,
        hello: &Hello,
        session: &'k SessionKey,
        payload: &[u8],
    ) -> (Vec<u8>, Initiator<'k>) {
        let coordinator = Acquaintance::new(session.session_key(), &invitation.coordinator_x25519).unwrap();
        self.begin_again(&coordinator, hello, session, payload).await
    }

    /// The same to a coordinator that was met before.
    pub async fn begin_again<'k>(
        &mut self,
        coordinator: &Acquaintance,
        hello: &Hello,
        session: &'k SessionKey,
        payload: &[u8],
    ) -> (Vec<u8>, Initiator<'k>) {
        let frame = Frame::Hello(encode(hello).into());
        let prologue = prologue(&frame.encode().unwrap(), &self.exporter);
        self.frame(frame).await;
        let ephemeral = StaticSecret::from(random::<32>());
        let (initiator, message) =
            Initiator::start(&prologue, session.session_key(), ephemeral, coordinator, payload).unwrap();
        (message, initiator)
    }

    /// The next frame.
    pub async fn hear(&mut self) -> Result<Option<Frame>, FrameError> {
        self.receive.read_frame().await
    }

    /// The session, once the coordinator has answered.
    pub async fn talk(mut self, initiator: Initiator<'_>) -> Talk {
        let answer = match self.hear().await {
            Ok(Some(Frame::Handshake(answer))) => answer,
            other => panic!("no answer to the handshake: {other:?}"),
        };
        let (_, established) = initiator.finish(&answer).unwrap();
        Talk::new(self, established)
    }

    /// How the coordinator ends it.
    pub async fn ended(self) -> Ended {
        self.connection.closed().await
    }
}

/// A sealed session.
#[derive(Debug)]
pub struct Talk {
    /// The connection.
    pub connection: Connection,
    /// The keys of further streams.
    pub session: Session,
    /// Seals the control stream.
    pub sealer: Sealer,
    /// The control stream, out.
    pub send: SendStream,
    opener: Opener,
    receive: RecvStream,
    assembler: MessageAssembler,
}

impl Talk {
    fn new(call: Call, established: Established) -> Self {
        let (session, sealer, opener) = Session::begin(established);
        let Call { connection, send, receive, .. } = call;
        Self { connection, session, sealer, send, opener, receive, assembler: MessageAssembler::default() }
    }

    /// Seals and says a message.
    pub async fn say(&mut self, message: &FromWorker) {
        self.say_bytes(&encode(message)).await;
    }

    /// Seals and says bytes that may be no message.
    pub async fn say_bytes(&mut self, bytes: &[u8]) {
        let mut out = Vec::new();
        self.sealer.seal_message(bytes, &mut out).unwrap();
        self.raw(out).await;
    }

    /// Sends bytes on the control stream as they are.
    pub async fn raw(&mut self, bytes: impl Into<Bytes>) {
        // As in [`Call::bytes`].
        let _ = self.send.write_record(bytes.into()).await;
    }

    /// The next message; none where nothing more comes.
    pub async fn hear(&mut self) -> Option<ToWorker> {
        let mut record = BytesMut::new();
        loop {
            if !self.receive.read_record(&mut record).await.ok()? {
                return None;
            }
            let (header, body) = record.split_first_chunk_mut().unwrap();
            let opened = self.opener.open_in_place(header, body).unwrap();
            if let Some(message) = self.assembler.push(opened).unwrap() {
                return Some(decode(&message).unwrap());
            }
            if self.opener.is_finished() {
                return None;
            }
        }
    }

    /// Waits for a message that `wanted` takes; others are passed over.
    pub async fn until<T>(&mut self, mut wanted: impl FnMut(&ToWorker) -> Option<T>) -> T {
        loop {
            let message = self.hear().await;
            let message = message.unwrap_or_else(|| panic!("the session ended: {:?}", self.connection.ended()));
            if let Some(found) = wanted(&message) {
                return found;
            }
        }
    }

    /// Reads streams until the one of this content has come, whole.
    pub async fn download(&mut self, content: &ContentRef) -> Vec<u8> {
        loop {
            let mut stream = self.connection.accept_uni().await.unwrap();
            let Ok(Some(Frame::StreamOpen(number))) = stream.read_frame().await else { panic!("no number") };
            let mut opener = self.session.accept_stream(number).unwrap();
            let mut record = BytesMut::new();
            assert!(stream.read_record(&mut record).await.unwrap());
            let (header, body) = record.split_first_chunk_mut().unwrap();
            let Download { id } = decode(opener.open_in_place(header, body).unwrap().plaintext).unwrap();
            if id != content.id {
                continue;
            }
            let mut opener = BroadcastOpener::new(content.id, &content.key);
            let mut whole = Vec::new();
            while !opener.is_finished() {
                assert!(stream.read_record(&mut record).await.unwrap());
                let (header, body) = record.split_first_chunk_mut().unwrap();
                whole.extend_from_slice(opener.open_in_place(header, body).unwrap().plaintext);
            }
            return whole;
        }
    }

    /// Opens an upload stream under a number of the caller's: the number and the first record, sealed by `sealer`.
    pub async fn open_upload(&self, number: u32, sealer: &mut Sealer, upload: Upload) -> SendStream {
        let mut stream = self.connection.open_uni().await.unwrap();
        let mut record = Vec::new();
        sealer.seal(Flag::Plain, &encode(&upload), &mut record).unwrap();
        // The number alone may be the end of it.
        let _ = stream.write_frame(&Frame::StreamOpen(number)).await;
        let _ = stream.write_record(record.into()).await;
        stream
    }

    /// Uploads a payload as an honest worker does.
    pub async fn upload(&mut self, upload: Upload, payload: &[u8]) -> SendStream {
        let (number, mut sealer) = self.session.open_stream().unwrap();
        let mut stream = self.open_upload(number, &mut sealer, upload).await;
        let mut out = Vec::new();
        let chunks: Vec<_> = payload.chunks(protocol::limits::RECORD_BYTES_MAX).collect();
        for (place, chunk) in chunks.iter().enumerate() {
            let flag = if place + 1 == chunks.len() { Flag::Final } else { Flag::Plain };
            sealer.seal(flag, chunk, &mut out).unwrap();
        }
        // It may be stopped in the middle.
        let _ = stream.write_record(out.into()).await;
        let _ = stream.finish();
        stream
    }
}
