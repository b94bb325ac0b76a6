//! A worker that does not train: it speaks the protocol through its own crates, takes what it is sent, and offers the
//! same numbers every time. Two hundred of them fit in one process, because they share one payload.
//!
//! What a real worker costs is not what is measured here; what the coordinator does is. A model that is streamed is
//! read to its end and not opened. A [`Peer`] is one session; [`Peer::serve`] is a worker's life in it.
#![allow(clippy::unwrap_used)] // a benchmark that cannot go on panics, and its line is then said not to be measured

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use learning::{Dataset, Table};
use protocol::ids::{Hash, Instance, TaskId, WorkerId};
use protocol::limits::{BEAT_EVERY, PAYLOAD_AT_ONCE_BYTES_MAX, RECORD_BYTES_MAX};
use protocol::messages::{
    Assigned, Encoding, FromWorker, Manifest, Metrics, Receipt, Role, Signed, TaskKind, ToWorker, Upload, Welcome,
    decode, encode,
};
use protocol::session::record::{RECORD_HEADER_BYTES, RECORD_TAG_BYTES};
use protocol::session::sign::MANIFEST_CONTEXT;
use protocol::session::{Flag, MessageAssembler, Opener, Sealer, Session};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};
use transport::{Alpn, CloseCode, Connection, Frame, RecvStream, SendStream};
use tributary_tests::stranger::{hello, random};
use tributary_tests::{Papers, Stranger, data};

/// Bytes that are offered, and their hash.
#[derive(Clone, Debug)]
pub(crate) struct Payload {
    pub(crate) bytes: Bytes,
    hash: Hash,
}

impl Payload {
    fn new(bytes: Vec<u8>) -> Self {
        Self { hash: Hash::of(&bytes), bytes: bytes.into() }
    }

    /// An update of so many bytes.
    fn update(bytes: u64) -> Self {
        let number = 1e-5_f32.to_le_bytes();
        Self::new(number.repeat(usize::try_from(bytes).unwrap() / number.len()))
    }
}

/// What the peers of a fleet have in common.
#[derive(Debug)]
pub(crate) struct Script {
    survey: Payload,
    update: OnceLock<Payload>,
    /// Where they tell what happens.
    told: mpsc::UnboundedSender<Told>,
    /// How often the one that probes does.
    probe_every: Duration,
}

/// What happened to a peer.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) peer: usize,
    pub(crate) at: Instant,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// It has an update to make in this round.
    Assigned(u32),
    /// A stream of so many bytes was read to its end.
    Downloaded(u64),
    /// Its update is held.
    Held,
    /// Its update is in the model.
    Receipt,
    /// An answer that an honest peer does not want.
    Unwanted(String),
    /// The answer to a probe came after so long.
    Probed(Duration),
    /// The session is over.
    Gone,
}

impl Script {
    pub(crate) fn new(probe_every: Duration) -> (Arc<Self>, mpsc::UnboundedReceiver<Told>) {
        let (told, events) = mpsc::unbounded_channel();
        let script = Self { survey: survey(), update: OnceLock::new(), told, probe_every };
        (Arc::new(script), events)
    }

    /// What is offered for this task.
    pub(crate) fn payload(&self, assigned: &Assigned) -> Payload {
        match assigned.kind {
            TaskKind::Survey => self.survey.clone(),
            TaskKind::Evaluation => Payload::new(Vec::new()),
            _ => {
                let bytes = assigned.model.as_ref().map_or(0, |model| model.bytes);
                self.update.get_or_init(|| Payload::update(bytes)).clone()
            }
        }
    }

    /// What was offered: the update, or the survey.
    fn wanted(&self, is_update: bool) -> Payload {
        self.update.get().filter(|_| is_update).unwrap_or(&self.survey).clone()
    }
}

/// Columns as the tests' data have them: two numbers, a colour, and a label of two classes.
fn survey() -> Payload {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), data::classes(1, 60)).unwrap();
    let table = Table::read(file.path()).unwrap();
    let spec = protocol::plan::DataSpec::default();
    let mut dataset = Dataset::new(table, &spec, None, 1, "peer").unwrap();
    Payload::new(dataset.survey(learning::MIN_COUNT).unwrap().to_bytes())
}

/// A session.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) connection: Connection,
    papers: Papers,
    welcome: Box<Welcome>,
    session: Session,
    sealer: Sealer,
    send: SendStream,
    messages: mpsc::UnboundedReceiver<ToWorker>,
    downloads: mpsc::UnboundedReceiver<u64>,
}

impl Peer {
    /// Connects with these papers, and is in.
    pub(crate) async fn connect(stranger: &Stranger, papers: &Papers) -> Self {
        let mut call = stranger.try_call(Alpn::Main, Some(papers.tls())).await.unwrap();
        let (message, initiator) = call.begin(&stranger.invitation, &hello(Role::Worker), &papers.session, &[]).await;
        call.frame(Frame::Handshake(message.into())).await;
        let Ok(Some(Frame::Handshake(answer))) = call.hear().await else { panic!("no answer to the handshake") };
        let (session, sealer, opener) = Session::begin(initiator.finish(&answer).unwrap().1);
        let (said, mut messages) = mpsc::unbounded_channel();
        tokio::spawn(listen(call.receive, opener, said));
        let (ended, downloads) = mpsc::unbounded_channel();
        tokio::spawn(take_downloads(call.connection.clone(), ended));
        let mut send = call.send;
        let mut sealer = sealer;
        say(&mut send, &mut sealer, &FromWorker::Join { instance: Instance(u64::from_le_bytes(random())) }).await;
        let Some(ToWorker::Welcome(welcome)) = messages.recv().await else { panic!("no welcome") };
        let papers = papers.clone();
        let mut peer =
            Self { connection: call.connection, papers, welcome, session, sealer, send, messages, downloads };
        peer.say(&FromWorker::Ready).await;
        peer
    }

    pub(crate) async fn say(&mut self, message: &FromWorker) {
        say(&mut self.send, &mut self.sealer, message).await;
    }

    /// The next message; none where nothing more comes.
    pub(crate) async fn hear(&mut self) -> Option<ToWorker> {
        self.messages.recv().await
    }

    /// Offers a payload; a small one follows at once.
    pub(crate) async fn offer(&mut self, assigned: &Assigned, payload: &Payload) {
        let manifest = self.manifest(assigned, payload);
        let bytes = encode(&manifest);
        let signature = self.papers.identity.sign(MANIFEST_CONTEXT, &bytes).to_vec();
        self.say(&FromWorker::Offer(Signed { bytes, signature })).await;
        if (1..=PAYLOAD_AT_ONCE_BYTES_MAX).contains(&manifest.bytes) {
            self.upload(assigned.task, payload, 0, u64::MAX);
        }
    }

    fn manifest(&self, assigned: &Assigned, payload: &Payload) -> Manifest {
        Manifest {
            run: self.welcome.run,
            worker: WorkerId(self.papers.identity.id()),
            task: assigned.task,
            kind: assigned.kind,
            base: assigned.base(),
            layout: assigned.layout,
            groups: 1,
            encoding: Encoding::F32,
            bytes: payload.bytes.len() as u64,
            hash: payload.hash,
            examples: 100,
            steps: 1,
            weight: 1,
            metrics: Metrics { train_loss: Some(0.5), seconds: 0.0, evaluation: None },
        }
    }

    /// Streams a payload from a byte on, and stops behind at most `most` bytes without ending the stream. Ends when
    /// the other side has all of it; false if it did not want it.
    pub(crate) fn upload(&mut self, task: TaskId, payload: &Payload, from: u64, most: u64) -> JoinHandle<bool> {
        let (number, sealer) = self.session.open_stream().unwrap();
        let upload = Upload { task, hash: payload.hash, from };
        let rest = payload.bytes.slice(usize::try_from(from).unwrap()..);
        tokio::spawn(send_payload(self.connection.clone(), number, sealer, upload, rest, most))
    }

    /// A worker's life: surveys at once, updates of the rounds that the gate lets through, until the session ends.
    pub(crate) async fn serve(
        mut self,
        number: usize,
        script: Arc<Script>,
        mut gate: watch::Receiver<u32>,
        probes: bool,
    ) {
        // Nobody minds once the fleet is gone.
        let tell = |what| _ = script.told.send(Told { peer: number, at: Instant::now(), what });
        let mut beat = interval(BEAT_EVERY);
        let mut probe = interval(script.probe_every);
        probe.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut task, mut waits) = (None::<Box<Assigned>>, None::<Box<Assigned>>);
        let (mut surveyed, mut probed) = (None::<Box<Assigned>>, None::<Instant>);
        loop {
            let round = waits.as_ref().map_or(0, |assigned| assigned.round);
            let past = surveyed.as_ref().map(|assigned| assigned.task);
            tokio::select! {
                message = self.messages.recv() => match message {
                    None => return tell(What::Gone),
                    // The first of them says that the survey is held, which no probe asked for.
                    Some(answer) if past.is_some() && answered(&answer) == past => {
                        if let Some(asked) = probed.take() {
                            tell(What::Probed(asked.elapsed()));
                        }
                    }
                    Some(ToWorker::Assigned(assigned)) if assigned.kind == TaskKind::Update => {
                        tell(What::Assigned(assigned.round));
                        waits = Some(assigned.clone());
                        task = Some(assigned);
                    }
                    Some(ToWorker::Assigned(assigned)) => {
                        self.offer(&assigned, &script.payload(&assigned)).await;
                        surveyed = Some(assigned);
                    }
                    Some(ToWorker::Go { task: named, from, .. }) => {
                        let is_update = task.as_ref().is_some_and(|task| task.task == named);
                        self.upload(named, &script.wanted(is_update), from, u64::MAX);
                    }
                    Some(ToWorker::Held { task: held, .. }) if task.as_ref().is_some_and(|task| task.task == held) => {
                        task = None;
                        tell(What::Held);
                    }
                    Some(ToWorker::Receipt(_)) => tell(What::Receipt),
                    Some(ToWorker::Held { .. } | ToWorker::GoingAway) => {}
                    Some(other) => tell(What::Unwanted(format!("{other:?}"))),
                },
                Some(bytes) = self.downloads.recv() => tell(What::Downloaded(bytes)),
                open = async { gate.wait_for(|open| *open >= round).await.is_ok() }, if waits.is_some() => {
                    if !open {
                        return;
                    }
                    if let Some(assigned) = waits.take() {
                        self.offer(&assigned, &script.payload(&assigned)).await;
                    }
                }
                _ = beat.tick(), if task.is_some() => {
                    let task = task.as_ref().map_or(TaskId(0), |task| task.task);
                    self.say(&FromWorker::Beat { task, steps: 1 }).await;
                }
                _ = probe.tick(), if probes && probed.is_none() && surveyed.is_some() => {
                    if let Some(assigned) = surveyed.clone() {
                        probed = Some(Instant::now());
                        let manifest = self.manifest(&assigned, &script.survey);
                        self.offer_again(&manifest).await;
                    }
                }
            }
        }
    }

    /// Only the offer: what it is for is over, and all that is wanted is the answer.
    async fn offer_again(&mut self, manifest: &Manifest) {
        let bytes = encode(manifest);
        let signature = self.papers.identity.sign(MANIFEST_CONTEXT, &bytes).to_vec();
        self.say(&FromWorker::Offer(Signed { bytes, signature })).await;
    }
}

/// The task that an offer was answered for.
fn answered(message: &ToWorker) -> Option<TaskId> {
    match message {
        ToWorker::Held { task, .. } | ToWorker::AlreadyHeld { task, .. } | ToWorker::Late { task } => Some(*task),
        ToWorker::Receipt(signed) => decode::<Receipt>(&signed.bytes).ok().map(|receipt| receipt.task),
        _ => None,
    }
}

async fn say(send: &mut SendStream, sealer: &mut Sealer, message: &FromWorker) {
    let mut out = Vec::new();
    sealer.seal_message(&encode(message), &mut out).unwrap();
    // The end of the session is heard by whoever listens.
    let _ = send.write_record(out.into()).await;
}

async fn listen(mut receive: RecvStream, mut opener: Opener, said: mpsc::UnboundedSender<ToWorker>) {
    let (mut record, mut assembler) = (BytesMut::new(), MessageAssembler::default());
    while let Ok(true) = receive.read_record(&mut record).await {
        let (header, body) = record.split_first_chunk_mut().unwrap();
        let opened = opener.open_in_place(header, body).unwrap();
        let Some(message) = assembler.push(opened).unwrap() else { continue };
        if said.send(decode(&message).unwrap()).is_err() {
            return;
        }
    }
}

/// Reads what is streamed to its end, and forgets it.
async fn take_downloads(connection: Connection, ended: mpsc::UnboundedSender<u64>) {
    while let Ok(mut stream) = connection.accept_uni().await {
        let ended = ended.clone();
        tokio::spawn(async move {
            let (mut record, mut bytes) = (BytesMut::new(), 0);
            let Ok(Some(Frame::StreamOpen(_))) = stream.read_frame().await else { return };
            while let Ok(true) = stream.read_record(&mut record).await {
                bytes += record.len() as u64;
            }
            // Nobody minds once the peer is gone.
            let _ = ended.send(bytes);
        });
    }
}

async fn send_payload(
    connection: Connection,
    number: u32,
    mut sealer: Sealer,
    upload: Upload,
    mut rest: Bytes,
    most: u64,
) -> bool {
    let Ok(mut stream) = connection.open_uni().await else { return false };
    let mut first = Vec::new();
    sealer.seal(Flag::Plain, &encode(&upload), &mut first).unwrap();
    if stream.write_frame(&Frame::StreamOpen(number)).await.is_err() || stream.write_record(first.into()).await.is_err()
    {
        return false;
    }
    let mut sent = 0;
    while !rest.is_empty() {
        if sent >= most {
            // Long enough for whatever the caller does to the connection meanwhile.
            sleep(Duration::from_secs(60)).await;
            stream.reset(CloseCode::GoingAway);
            return false;
        }
        let chunk = rest.split_to(rest.len().min(RECORD_BYTES_MAX));
        let flag = if rest.is_empty() { Flag::Final } else { Flag::Plain };
        let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + chunk.len() + RECORD_TAG_BYTES);
        sealer.seal(flag, &chunk, &mut record).unwrap();
        if stream.write_record(record.into()).await.is_err() {
            return false;
        }
        sent += chunk.len() as u64;
    }
    stream.finish().is_ok() && stream.delivered().await.is_ok()
}
