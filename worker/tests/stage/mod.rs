//! A coordinator that does what a test says, and a worker beside it in the same process.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use certs::{Ca, IdentityKey, SessionKey};
use learning::{Network, Schema, Survey, merge};
use protocol::ids::{ContentId, Hash, RunId, TaskId};
use protocol::invitation::Invitation;
use protocol::layout::to_bytes;
use protocol::messages::{
    Assigned, ContentKey, ContentRef, Download, EnrolAnswer, EnrolRequest, FromWorker, Hello, Manifest, Receipt, Role,
    Signed, TaskKind, ToWorker, Upload, Welcome, decode, encode,
};
use protocol::plan::{LearningPlan, Mode};
use protocol::session::broadcast::seal_content;
use protocol::session::sign::{MANIFEST_CONTEXT, RECEIPT_CONTEXT, verify};
use protocol::session::{
    Established, Flag, MessageAssembler, Opener, Responder, Sealer, Session, StaticSecret, prologue,
};
use tokio::net::UdpSocket;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use transport::{
    Accepted, CloseCode, Connection, Frame, RecvStream, ResetKeys, SendStream, Server, ServerOptions, TlsIdentity,
};
use tributary_worker::receipts::open_line;
use tributary_worker::report::{Line, Report};
use tributary_worker::state::StatePlace;
use tributary_worker::{Options, Outcome, WorkerError, run};

/// No step of a test takes so long unless something is broken.
const STEP_MAX: Duration = Duration::from_secs(20);

/// The model that a finished run names.
pub(crate) const FINAL_MODEL: Hash = Hash([7; 32]);

pub(crate) const RUN: RunId = RunId([0x52; 16]);

/// A run of this mode with a small model.
pub(crate) fn plan(mode: Mode) -> LearningPlan {
    let mut plan = LearningPlan::default();
    plan.train.mode = mode;
    plan
}

pub(crate) fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

async fn within<T>(what: &str, step: impl Future<Output = T>) -> T {
    tokio::time::timeout(STEP_MAX, step).await.unwrap_or_else(|_| panic!("{what} took longer than {STEP_MAX:?}"))
}

/// The coordinator's side of the stage.
pub(crate) struct Stage {
    directory: tempfile::TempDir,
    server: Server,
    ca: Ca,
    session: SessionKey,
    signing: IdentityKey,
    lines: Arc<Mutex<Vec<Line>>>,
    told: Arc<Notify>,
    stop: Arc<Notify>,
    worker_keys: Mutex<Option<[u8; 32]>>,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let now = SystemTime::now();
        let (ca, _) = Ca::generate(now).unwrap();
        let signing = IdentityKey::generate().unwrap();
        let certificate = ca.issue_coordinator(&signing.public(), now).unwrap();
        let identity = TlsIdentity { certificate, key: signing.tls_key().unwrap() };
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let keys = ResetKeys::from_bytes(&[3; ResetKeys::BYTES]);
        let server = Server::bind(ServerOptions::new(listen, ca.certificate().clone(), identity, keys)).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("shard.csv"), rows()).unwrap();
        Self {
            directory,
            server,
            ca,
            session: SessionKey::generate().unwrap(),
            signing,
            lines: Arc::default(),
            told: Arc::default(),
            stop: Arc::default(),
            worker_keys: Mutex::new(None),
        }
    }

    pub(crate) fn invitation(&self) -> Invitation {
        Invitation {
            addresses: vec![self.server.local_address().unwrap().to_string()],
            ca_sha256: self.ca.fingerprint(),
            coordinator_x25519: self.session.public(),
            token: [8; 16],
            uses: 1,
            expires_unix_s: None,
            loopback_only: false,
        }
    }

    /// Shuts the coordinator down in order: its connections are told, and nobody is let in any more.
    pub(crate) fn go_away(&self) {
        self.server.close(CloseCode::GoingAway, "");
    }

    /// An address of its own that leads to the coordinator, until it is cut.
    pub(crate) async fn relay(&self) -> Relay {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let back = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        back.connect(self.server.local_address().unwrap()).await.unwrap();
        Relay { address: front.local_addr().unwrap().to_string(), task: tokio::spawn(pass_on(front, back)) }
    }

    pub(crate) fn default_join(&self) -> PathBuf {
        self.directory.path().join("join")
    }

    /// Replaces the worker's data file.
    pub(crate) fn write_data(&self, text: &str) {
        std::fs::write(self.directory.path().join("shard.csv"), text).unwrap();
    }

    /// The worker's state directory.
    pub(crate) fn state(&self) -> PathBuf {
        self.directory.path().join("worker").join("shard")
    }

    /// Copies the worker's state directory, as it was when it was killed.
    pub(crate) fn back_up(&self) {
        copy(&self.state(), &self.directory.path().join("backup"));
    }

    /// Puts the copy back in its place.
    pub(crate) fn restore_backup(&self) {
        std::fs::remove_dir_all(self.state()).unwrap();
        copy(&self.directory.path().join("backup"), &self.state());
    }

    /// Starts the worker, with an invitation unless `change` says otherwise.
    pub(crate) fn start(&self, change: impl FnOnce(&mut Options)) -> JoinHandle<Result<Outcome, WorkerError>> {
        let (lines, told, stop) = (Arc::clone(&self.lines), Arc::clone(&self.told), Arc::clone(&self.stop));
        let place = StatePlace::Under(self.directory.path().join("worker"));
        let mut options = Options::new(self.directory.path().join("shard.csv"), place, self.default_join());
        options.join = Some(self.invitation());
        options.report = Report::new(Arc::new(move |line: &Line| {
            lines.lock().unwrap().push(line.clone());
            told.notify_one();
        }));
        change(&mut options);
        tokio::spawn(async move { run(options, async move { stop.notified().await }).await })
    }

    /// Ctrl-C.
    pub(crate) fn stop(&self) {
        self.stop.notify_one();
    }

    pub(crate) fn lines(&self) -> Vec<Line> {
        self.lines.lock().unwrap().clone()
    }

    /// How often the worker trained.
    pub(crate) fn trainings(&self) -> usize {
        let is_training = |line: &&Line| matches!(line, Line::Round { kind: TaskKind::Update, .. });
        self.lines().iter().filter(is_training).count()
    }

    /// The receipts that the worker keeps.
    pub(crate) fn receipts(&self) -> Vec<Receipt> {
        let Ok(log) = std::fs::read_to_string(self.state().join(format!("receipts/{RUN}.log"))) else {
            return Vec::new();
        };
        log.lines().map(|line| open_line(line).unwrap().1).collect()
    }

    /// Waits until what the worker made is on its disk, and ends the worker where it stands.
    pub(crate) async fn kill(&self, worker: JoinHandle<Result<Outcome, WorkerError>>) {
        let figures = self.state().join("kept").join("figures");
        within("keeping", async {
            while !figures.exists() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        worker.abort();
        assert!(worker.await.unwrap_err().is_cancelled());
    }

    /// Waits until the worker has said such a line.
    pub(crate) async fn wait_for(&self, wanted: impl Fn(&Line) -> bool) {
        within("a line", async {
            while !self.lines().iter().any(&wanted) {
                self.told.notified().await;
            }
        })
        .await;
    }

    async fn accept(&self) -> Accepted {
        within("a connection", async { self.server.accept().await.unwrap().complete().await.unwrap() }).await
    }

    /// Lets a handshake begin that the worker ends.
    pub(crate) async fn refuse_handshake(&self) {
        let ended = within("a connection", async { self.server.accept().await.unwrap().complete().await }).await;
        if let Ok(accepted) = ended {
            accepted.connection.closed().await;
        }
    }

    /// Enrols the worker as `shard`.
    pub(crate) async fn enrol(&self) {
        self.enrol_until(u64::MAX).await;
    }

    /// Enrols it with a certificate that is said to end then.
    pub(crate) async fn enrol_until(&self, expires_unix_s: u64) {
        self.answer_enrolment(|request| {
            let certificate = self.ca.issue_worker(&request.ed25519, SystemTime::now()).unwrap().to_vec();
            EnrolAnswer::Granted { name: request.name.clone(), certificate, expires_unix_s }
        })
        .await;
    }

    pub(crate) async fn answer_enrolment(&self, answer: impl FnOnce(&EnrolRequest) -> EnrolAnswer) {
        let accepted = self.accept().await;
        let connection = accepted.connection.clone();
        let shaken = self.shake(accepted, Role::Join, |payload| {
            let request: EnrolRequest = decode(payload).unwrap();
            assert_eq!(request.token, [8; 16]);
            *self.worker_keys.lock().unwrap() = Some(request.ed25519);
            encode(&answer(&request))
        });
        let _streams = shaken.await;
        within("the end of enrolment", connection.closed()).await;
    }

    async fn shake(
        &self,
        accepted: Accepted,
        role: Role,
        answer: impl FnOnce(&[u8]) -> Vec<u8>,
    ) -> (SendStream, RecvStream, Established) {
        let (mut send, mut receive) = within("the control stream", accepted.connection.accept_control()).await.unwrap();
        let hello = receive.read_frame().await.unwrap().unwrap();
        let Frame::Hello(body) = &hello else { panic!("{hello:?}") };
        assert_eq!(decode::<Hello>(body).unwrap().role, role);
        let Some(Frame::Handshake(message)) = receive.read_frame().await.unwrap() else { panic!("no handshake") };
        let prologue = prologue(&hello.encode().unwrap(), &accepted.exporter);
        let (responder, payload) = Responder::read(&prologue, self.session.session_key(), None, &message).unwrap();
        let mut ephemeral = [0; 32];
        getrandom::fill(&mut ephemeral).unwrap();
        let (message, established) = responder.reply(StaticSecret::from(ephemeral), &answer(&payload)).unwrap();
        send.write_frame(&Frame::Handshake(message.into())).await.unwrap();
        (send, receive, established)
    }

    /// A session up to `Welcome`.
    pub(crate) async fn welcome(&self, learning: LearningPlan) -> Peer<'_> {
        let accepted = self.accept().await;
        let connection = accepted.connection.clone();
        let (send, receive, established) = self.shake(accepted, Role::Worker, |_| Vec::new()).await;
        let (session, sealer, opener) = Session::begin(established);
        let welcome = Welcome {
            version: 1,
            run: RUN,
            ed25519: self.signing.public(),
            name: "shard".parse().unwrap(),
            weight_max: 1 << 20,
            norm_max: 256.0,
            learning: learning.clone(),
        };
        let assembler = MessageAssembler::default();
        let mut peer =
            Peer { stage: self, connection, session, send, sealer, receive, opener, assembler, learning, contents: 0 };
        assert!(matches!(peer.hear().await, Some(FromWorker::Join { .. })));
        peer.say(ToWorker::Welcome(Box::new(welcome))).await;
        peer
    }

    /// A session whose worker is in.
    pub(crate) async fn join(&self, learning: LearningPlan) -> Peer<'_> {
        let mut peer = self.welcome(learning).await;
        assert_eq!(peer.hear().await, Some(FromWorker::Ready));
        peer
    }
}

/// The way of one worker to the coordinator.
pub(crate) struct Relay {
    pub(crate) address: String,
    task: JoinHandle<()>,
}

impl Relay {
    /// From now on nothing passes, and nobody is told.
    pub(crate) async fn cut(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

async fn pass_on(front: UdpSocket, back: UdpSocket) {
    let (mut there, mut here) = ([0; 65_536], [0; 65_536]);
    let mut worker = None;
    loop {
        tokio::select! {
            Ok((length, from)) = front.recv_from(&mut there) => {
                worker = Some(from);
                back.send(&there[..length]).await.unwrap();
            }
            Ok(length) = back.recv(&mut here) => {
                front.send_to(&here[..length], worker.unwrap()).await.unwrap();
            }
        }
    }
}

/// What the survey froze.
pub(crate) struct Frozen {
    pub(crate) schema: Schema,
    pub(crate) network: Network,
    pub(crate) weights: Vec<u8>,
}

impl Frozen {
    pub(crate) fn model_hash(&self) -> Hash {
        self.network.layout().model_hash(&self.weights)
    }
}

/// One session with the worker.
pub(crate) struct Peer<'a> {
    stage: &'a Stage,
    connection: Connection,
    session: Session,
    send: SendStream,
    sealer: Sealer,
    receive: RecvStream,
    opener: Opener,
    assembler: MessageAssembler,
    learning: LearningPlan,
    contents: u8,
}

impl Peer<'_> {
    pub(crate) async fn say(&mut self, message: ToWorker) {
        let mut out = Vec::new();
        self.sealer.seal_message(&encode(&message), &mut out).unwrap();
        self.send.write_record(out.into()).await.unwrap();
    }

    /// The next message that is no beat; none if the connection ended.
    pub(crate) async fn hear(&mut self) -> Option<FromWorker> {
        within("a message", async {
            loop {
                match self.hear_any().await? {
                    FromWorker::Beat { .. } => {}
                    message => return Some(message),
                }
            }
        })
        .await
    }

    /// A beat that tells of training that is under way.
    pub(crate) async fn hear_training(&mut self) {
        within("a beat beside training", async {
            loop {
                let message = self.hear_any().await.expect("the worker is connected");
                assert!(matches!(message, FromWorker::Beat { .. }), "{message:?}");
                if matches!(message, FromWorker::Beat { steps: 1.., .. }) {
                    return;
                }
            }
        })
        .await;
    }

    /// The next message; none if the connection ended.
    async fn hear_any(&mut self) -> Option<FromWorker> {
        loop {
            let mut record = BytesMut::new();
            if !self.receive.read_record(&mut record).await.ok()? {
                return None;
            }
            let (header, body) = record.split_first_chunk_mut().unwrap();
            let opened = self.opener.open_in_place(header, body).unwrap();
            if let Some(message) = self.assembler.push(opened).unwrap() {
                return Some(decode(&message).unwrap());
            }
        }
    }

    /// Says that the run is over, and waits until the worker has gone.
    pub(crate) async fn finish(mut self) {
        self.say(ToWorker::Finished { model_hash: FINAL_MODEL }).await;
        self.closed().await;
    }

    pub(crate) fn close(&self, code: CloseCode) {
        self.connection.close(code, "the test says so");
    }

    /// The code with which the worker closed the connection.
    pub(crate) async fn closed(&self) -> Option<CloseCode> {
        within("the end", self.connection.closed()).await.code()
    }

    pub(crate) async fn assign_survey(&mut self, task: TaskId) {
        let (kind, layout) = (TaskKind::Survey, Hash([0; 32]));
        let assigned = Assigned { task, round: 0, kind, schema: None, model: None, layout, weight_shift: 0 };
        self.say(ToWorker::Assigned(Box::new(assigned))).await;
    }

    /// Asks for a survey and freezes it.
    pub(crate) async fn survey(&mut self, task: TaskId) -> Frozen {
        self.assign_survey(task).await;
        let (manifest, payload) = self.take_offer().await;
        self.say(ToWorker::Held { task, hash: manifest.hash }).await;
        let surveys = BTreeMap::from([("shard".to_owned(), Survey::from_bytes(&payload).unwrap())]);
        let schema = merge(&surveys, &self.learning.data).unwrap().schema;
        let network = Network::new(&self.learning.model, &schema).unwrap();
        let weights = to_bytes(&network.initial(self.learning.train.seed));
        Frozen { schema, network, weights }
    }

    /// Assigns an update from the initial weights; the model's hash.
    pub(crate) async fn assign_update(&mut self, task: TaskId, frozen: &Frozen) -> Hash {
        self.assign(task, TaskKind::Update, frozen, Some(&frozen.weights)).await;
        frozen.model_hash()
    }

    pub(crate) async fn assign(&mut self, task: TaskId, kind: TaskKind, frozen: &Frozen, model: Option<&[u8]>) {
        let model = model.map(|model| (model, frozen.network.layout().model_hash(model)));
        self.assign_as(task, kind, frozen, model).await;
    }

    /// Assigns a task whose model is announced under this hash.
    pub(crate) async fn assign_as(
        &mut self,
        task: TaskId,
        kind: TaskKind,
        frozen: &Frozen,
        model: Option<(&[u8], Hash)>,
    ) {
        let schema = frozen.schema.to_bytes();
        let layout = model.map_or(Hash([0; 32]), |_| frozen.network.layout().fingerprint());
        let assigned = Assigned {
            task,
            round: 1,
            kind,
            schema: Some(self.stream(&schema, Hash::of(&schema)).await),
            model: match model {
                Some((model, hash)) => Some(self.stream(model, hash).await),
                None => None,
            },
            layout,
            weight_shift: 0,
        };
        self.say(ToWorker::Assigned(Box::new(assigned))).await;
    }

    /// Assigns an update whose model is announced with this length.
    pub(crate) async fn assign_announced(&mut self, task: TaskId, frozen: &Frozen, bytes: u64) {
        let schema = frozen.schema.to_bytes();
        let schema = Some(self.stream(&schema, Hash::of(&schema)).await);
        let model = self.stream(&frozen.weights, frozen.model_hash()).await;
        let model = Some(ContentRef { bytes, ..model });
        let layout = frozen.network.layout().fingerprint();
        let assigned = Assigned { task, round: 1, kind: TaskKind::Update, schema, model, layout, weight_shift: 0 };
        self.say(ToWorker::Assigned(Box::new(assigned))).await;
    }

    /// Streams a content, before the control message that names it.
    async fn stream(&mut self, content: &[u8], hash: Hash) -> ContentRef {
        self.contents += 1;
        let (id, key) = (ContentId([self.contents; 16]), ContentKey([self.contents; 32]));
        let (number, mut sealer) = self.session.open_stream().unwrap();
        let mut stream = self.connection.open_uni().await.unwrap();
        stream.write_frame(&Frame::StreamOpen(number)).await.unwrap();
        let mut record = Vec::new();
        sealer.seal(Flag::Final, &encode(&Download { id }), &mut record).unwrap();
        stream.write_record(record.into()).await.unwrap();
        for record in seal_content(id, &key, content).unwrap() {
            // A worker that has refused an earlier record reads no more.
            if stream.write_record(Bytes::from(record)).await.is_err() {
                break;
            }
        }
        let _ = stream.finish();
        ContentRef { id, key, hash, bytes: content.len() as u64 }
    }

    /// The next offer, its signature verified, and its payload.
    pub(crate) async fn take_offer(&mut self) -> (Manifest, Vec<u8>) {
        let said = self.hear().await;
        let Some(FromWorker::Offer(Signed { bytes, signature })) = said else { panic!("{said:?}") };
        let key = self.stage.worker_keys.lock().unwrap().unwrap();
        verify(MANIFEST_CONTEXT, &key, &bytes, signature[..].try_into().unwrap()).unwrap();
        let manifest: Manifest = decode(&bytes).unwrap();
        let (upload, payload) = self.take_upload().await;
        assert_eq!(upload, Upload { task: manifest.task, hash: manifest.hash, from: 0 });
        (manifest, payload)
    }

    /// The next upload: what it says that it is, and the bytes that follow.
    pub(crate) async fn take_upload(&mut self) -> (Upload, Vec<u8>) {
        let mut stream = within("an upload", self.connection.accept_uni()).await.unwrap();
        let Some(Frame::StreamOpen(number)) = stream.read_frame().await.unwrap() else { panic!("no stream number") };
        let mut opener = self.session.accept_stream(number).unwrap();
        let (mut upload, mut payload, mut record) = (None, Vec::new(), BytesMut::new());
        while !opener.is_finished() {
            assert!(stream.read_record(&mut record).await.unwrap());
            let (header, body) = record.split_first_chunk_mut().unwrap();
            let plaintext = opener.open_in_place(header, body).unwrap().plaintext;
            match &upload {
                None => upload = Some(decode::<Upload>(plaintext).unwrap()),
                Some(_) => payload.extend_from_slice(plaintext),
            }
        }
        (upload.unwrap(), payload)
    }

    pub(crate) async fn give_receipt(&mut self, manifest: &Manifest) {
        self.give_receipt_by(&self.stage.signing.clone(), manifest).await;
    }

    pub(crate) async fn give_forged_receipt(&mut self, manifest: &Manifest) {
        self.give_receipt_by(&IdentityKey::generate().unwrap(), manifest).await;
    }

    async fn give_receipt_by(&mut self, key: &IdentityKey, manifest: &Manifest) {
        let Manifest { run, worker, task, hash, .. } = *manifest;
        let bytes = encode(&Receipt { run, worker, task, hash, round: 1, model_hash: Hash([5; 32]) });
        let signature = key.sign(RECEIPT_CONTEXT, &bytes).to_vec();
        self.say(ToWorker::Receipt(Signed { bytes, signature })).await;
    }
}

/// Forty rows with two classes that a line divides.
pub(crate) fn rows() -> String {
    let mut text = "a,b,late\n".to_owned();
    for n in 0..40 {
        let label = if n % 3 == 0 { "yes" } else { "no" };
        text.push_str(&format!("{},{},{label}\n", n % 7, (n * 13) % 11));
    }
    text
}
