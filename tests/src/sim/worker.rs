//! A worker's shell: what the real one does around [`Member`], without training and without a socket.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coordinator::telemetry::Kind;
use coordinator::workshop::Content;
use protocol::federation::Output;
use protocol::ids::{ConnId, ContentId, Hash, Instance, TaskId, Time, WorkerId, WorkerName};
use protocol::layout::to_bytes;
use protocol::limits::PAYLOAD_AT_ONCE_BYTES_MAX;
use protocol::member::{self, Act, Ending, Input, Kept, Made, Member, WorkKey};
use protocol::messages::{
    Assigned, ContentRef, Encoding, Failure, FromWorker, Manifest, Metrics, Receipt, TaskKind, ToWorker, Upload,
};
use protocol::sum::weight;

use super::contents::open;
use super::data::material;
use super::oracle::place_of;
use super::world::{Happening, Up, World};

/// How long after something that only a new connection mends the connection is made anew.
const RECONNECT_AFTER: Duration = Duration::from_millis(800);

/// Contents that a worker keeps: the schema, and the models of this round and the last.
const CONTENTS_KEPT: usize = 4;

/// One worker.
pub(super) struct Worker {
    pub(super) id: WorkerId,
    name: WorkerName,
    /// Whose data it has: a second process of one identity has the same.
    identity: usize,
    member: Option<Member>,
    pub(super) life: u64,
    born: Time,
    pub(super) ending: Option<Ending>,
    pub(super) conn: Option<ConnId>,
    pub(super) asleep_until: Time,
    pub(super) blocked_up: Time,
    pub(super) blocked_down: Time,
    alarm: Option<Time>,
    waiting: Option<Box<Assigned>>,
    going: Option<TaskId>,
    contents: Vec<(ContentId, Hash, Arc<[u8]>)>,
    /// What its connection brought and it no longer has: only another one brings that again.
    gone: Vec<ContentId>,
    /// What it will have made when the time for it is over, and the task.
    making: Option<(TaskId, Arc<[u8]>)>,
    payloads: BTreeMap<Hash, Arc<[u8]>>,
    /// What is on its disk.
    kept: Option<Kept>,
    steps: u64,
    manifests: Vec<Manifest>,
    pub(super) spoils: bool,
    pub(super) cuts_upload: bool,
    pub(super) cuts_download: bool,
    pub(super) diverges: bool,
    pub(super) leaves: bool,
}

impl Worker {
    pub(super) fn is_alive(&self) -> bool {
        self.member.is_some() && self.ending.is_none()
    }

    pub(super) fn name(&self) -> &WorkerName {
        &self.name
    }

    /// It ends, and does not come back.
    pub(super) fn end(&mut self, ending: Ending) {
        self.ending = Some(ending);
        self.member = None;
        self.conn = None;
        self.life += 1;
    }
}

impl World {
    pub(super) fn add_worker(&mut self, identity: usize) {
        let number = self.workers.len();
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(identity as u64).to_le_bytes());
        self.workers.push(Worker {
            id: WorkerId(id),
            name: WorkerName::nearest(&format!("worker-{identity}")),
            identity,
            member: Some(Member::new(Instance(number as u64 + 1))),
            life: 0,
            born: self.now,
            ending: None,
            conn: None,
            asleep_until: Time(0),
            blocked_up: Time(0),
            blocked_down: Time(0),
            alarm: None,
            waiting: None,
            going: None,
            contents: Vec::new(),
            gone: Vec::new(),
            making: None,
            payloads: BTreeMap::new(),
            kept: None,
            steps: 0,
            manifests: Vec::new(),
            spoils: false,
            cuts_upload: false,
            cuts_download: false,
            diverges: false,
            leaves: false,
        });
        let delay = self.up_to(Duration::from_millis(50));
        self.after(delay, Happening::Member(number, 0, Box::new(Input::Tick)));
    }

    // --- faults ---

    pub(super) fn kill_worker(&mut self, worker: usize, keeps_disk: bool, is_heard: bool, down: Duration) -> bool {
        if !self.workers[worker].is_alive() {
            return false;
        }
        self.cut(worker, is_heard);
        let w = &mut self.workers[worker];
        w.member = None;
        w.life += 1;
        w.conn = None;
        w.asleep_until = Time(0);
        if !keeps_disk {
            w.kept = None;
        }
        let kept = w.kept.as_ref().map(|kept| kept.made.hash);
        w.payloads.retain(|hash, _| Some(*hash) == kept);
        (w.waiting, w.going, w.making) = (None, None, None);
        w.contents.clear();
        self.note(|_| format!("worker {worker} is dead, and keeps {kept:?}"));
        self.after(down, Happening::Revive(worker));
        true
    }

    pub(super) fn revive(&mut self, worker: usize) {
        let instance = Instance(1_000 + self.now.0);
        let now = self.now;
        let w = &mut self.workers[worker];
        if w.member.is_some() || w.ending.is_some() {
            return;
        }
        w.member = Some(w.kept.clone().map_or_else(|| Member::new(instance), |kept| Member::restored(instance, kept)));
        (w.born, w.alarm, w.steps) = (now, None, 0);
        let life = w.life;
        self.note(|_| format!("worker {worker} is back"));
        self.member_input(worker, life, Input::Tick);
    }

    /// A second process with the same state directory, copied.
    pub(super) fn clone_worker(&mut self, of: usize) -> bool {
        if self.workers.len() > self.scenario.workers + 2 || !self.workers[of].is_alive() || self.workers[of].leaves {
            return false;
        }
        self.add_worker(self.workers[of].identity);
        let (kept, payloads) = (self.workers[of].kept.clone(), self.workers[of].payloads.clone());
        if let Some(clone) = self.workers.last_mut() {
            if let Some(kept) = kept.clone() {
                clone.member = Some(Member::restored(Instance(500 + clone.life), kept));
            }
            (clone.kept, clone.payloads) = (kept, payloads);
        }
        true
    }

    pub(super) fn offer_again(&mut self, worker: usize, altered: bool) -> bool {
        let w = &self.workers[worker];
        let (Some(conn), Some(manifest)) = (w.conn.filter(|_| w.is_alive()), w.manifests.last()) else { return false };
        let mut manifest = manifest.clone();
        if altered {
            manifest.hash = Hash([9; 32]);
            self.after(RECONNECT_AFTER, Happening::CutLater(worker));
        }
        self.send_up(conn, Up::Offer(Box::new(manifest)));
        true
    }

    // --- the machine ---

    pub(super) fn member_input(&mut self, worker: usize, life: u64, input: Input) {
        let local = Time(self.now.since(self.workers[worker].born).as_nanos().try_into().unwrap_or(u64::MAX));
        let w = &mut self.workers[worker];
        if w.life != life || !w.is_alive() {
            return;
        }
        match &input {
            Input::Connected => w.gone.clear(),
            Input::Said(ToWorker::Assigned(assigned)) => w.keep_contents(assigned),
            Input::Made { task, .. } => w.put_away(*task),
            _ => {}
        }
        if input != Input::Tick {
            self.note(|_| format!("worker {worker} < {}", in_short(&input)));
        }
        if let Some(member) = &mut self.workers[worker].member {
            member.handle(local, input);
        }
        self.drain_member(worker, life);
    }

    fn drain_member(&mut self, worker: usize, life: u64) {
        loop {
            let w = &mut self.workers[worker];
            let Some(member) = w.member.as_mut().filter(|_| w.life == life) else { return };
            match member.poll() {
                Output::Append(event) => self.member_fact(worker, event),
                Output::Act { act, .. } => self.member_act(worker, act),
                Output::Wait(at) => {
                    let at = at.map(|at| w.born.after(Duration::from_nanos(at.0)));
                    if at.is_some() && (w.alarm != at || at <= Some(self.now)) {
                        w.alarm = at;
                        let at = at.unwrap_or_default().max(Time(self.now.0 + 1));
                        self.at(at, Happening::AlarmMember(worker, life));
                    }
                    return;
                }
            }
        }
    }

    /// Facts are on the worker's disk before anything follows from them.
    fn member_fact(&mut self, worker: usize, event: member::Event) {
        let w = &mut self.workers[worker];
        match event {
            member::Event::Made { key, task, made } => w.kept = Some(Kept { key, task, made }),
            member::Event::Renamed { task } => {
                if let Some(kept) = &mut w.kept {
                    kept.task = task;
                }
            }
            member::Event::Dropped { .. } => w.kept = None,
            member::Event::Notice(_) => {}
        }
    }

    fn member_act(&mut self, worker: usize, act: Act) {
        let life = self.workers[worker].life;
        match act {
            Act::Connect => self.dial(worker),
            Act::Disconnect => {
                if let Some(conn) = self.workers[worker].conn {
                    self.send_up(conn, Up::Close);
                    self.client_lost(conn);
                }
            }
            Act::Send(message) => self.member_says(worker, message),
            Act::Beat { task } => {
                let w = &mut self.workers[worker];
                w.steps += 1;
                let steps = w.steps;
                self.member_says(worker, FromWorker::Beat { task, steps });
            }
            Act::Consider(_) => {
                self.after(
                    Duration::from_micros(300),
                    Happening::Member(worker, life, Box::new(Input::Considered(Ok(())))),
                );
            }
            Act::Work(assigned) => {
                let w = &mut self.workers[worker];
                let is_gone = needs(&assigned).any(|content| w.gone.contains(&content.id) && !w.has(content.hash));
                w.waiting = Some(assigned);
                if is_gone {
                    return self.cut(worker, true);
                }
                self.begin_if_whole(worker);
            }
            Act::Cancel => (self.workers[worker].waiting, self.workers[worker].going) = (None, None),
            Act::Offer { task, key, made } => self.offer(worker, task, &key, &made),
            Act::Upload { task, hash, from } => self.upload(worker, Upload { task, hash, from }),
            Act::Drop { hash } => drop(self.workers[worker].payloads.remove(&hash)),
            Act::Exit(ending) => self.exit(worker, ending),
        }
    }

    fn exit(&mut self, worker: usize, ending: Ending) {
        self.note(|_| format!("worker {worker} ends: {ending:?}"));
        let leaves = self.workers[worker].leaves;
        let expected = matches!(ending, Ending::Finished { .. } | Ending::Displaced) || leaves;
        if let Ending::Finished { model_hash } = ending {
            let round = self.scenario.plan.learning.train.rounds;
            let announced = self.oracle.announce(round, model_hash);
            self.check(announced);
        }
        if !expected {
            self.fail(format!("worker {worker} ended: {ending:?}"));
        }
        if let Some(conn) = self.workers[worker].conn {
            self.send_up(conn, Up::Close);
            if let Some(link) = self.links.get_mut(&conn) {
                link.client = false;
            }
        }
        self.workers[worker].end(ending);
    }

    fn member_says(&mut self, worker: usize, message: FromWorker) {
        let Some(conn) = self.workers[worker].conn else { return };
        let up = match message {
            FromWorker::Join { instance } => Up::Join(instance),
            message => Up::Said(message),
        };
        self.send_up(conn, up);
    }

    // --- work ---

    /// What still waited for its contents will not come.
    pub(super) fn abandon(&mut self, worker: usize) {
        let w = &mut self.workers[worker];
        let life = w.life;
        if let Some(assigned) = w.waiting.take() {
            self.member_input(worker, life, Input::Abandoned { task: assigned.task });
        }
    }

    pub(super) fn content_arrived(&mut self, conn: ConnId, content: &Arc<Content>) {
        let Some(link) = self.links.get(&conn).filter(|link| link.client) else { return };
        let worker = link.worker;
        if self.workers[worker].life != link.life {
            return;
        }
        // Who lacks a content for its work makes the connection anew.
        if std::mem::take(&mut self.workers[worker].cuts_download) {
            self.count("download cut");
            return self.cut(worker, true);
        }
        let plaintext = open(content);
        let reference = &content.reference;
        let w = &mut self.workers[worker];
        w.contents.retain(|(_, hash, _)| *hash != reference.hash);
        w.contents.push((reference.id, reference.hash, plaintext));
        let is_schema = content.kind == Kind::Schema;
        self.note(|_| {
            format!("worker {worker} has {} {}", if is_schema { "schema" } else { "model" }, content.reference.hash)
        });
        self.begin_if_whole(worker);
    }

    fn begin_if_whole(&mut self, worker: usize) {
        let w = &mut self.workers[worker];
        if !w.waiting.as_ref().is_some_and(|assigned| needs(assigned).all(|content| w.has(content.hash))) {
            return;
        }
        let Some(assigned) = w.waiting.take() else { return };
        w.going = Some(assigned.task);
        let takes = self.scenario.pace.train[w.identity];
        let life = w.life;
        let input = self.result(worker, &assigned);
        self.after(takes, Happening::Member(worker, life, Box::new(input)));
    }

    /// What comes of a task. The bytes are put away when the machine hears of them.
    fn result(&mut self, worker: usize, assigned: &Assigned) -> Input {
        let task = assigned.task;
        let folds = matches!(assigned.kind, TaskKind::Update | TaskKind::Gradient);
        if folds && std::mem::take(&mut self.workers[worker].diverges) {
            return Input::Failed { task, failure: Failure::NotFinite };
        }
        let Some(payload) = self.payload(worker, assigned) else { return Input::Abandoned { task } };
        let rows = material(self.scenario.workers).rows;
        let identity = self.workers[worker].identity as u64;
        let cap = self.scenario.plan.ring.weight_max;
        let (hash, bytes) = (Hash::of(&payload), payload.len() as u64);
        self.workers[worker].making = Some((task, payload));
        let none = Hash([0; 32]);
        let made = Made {
            hash,
            bytes,
            layout: if folds { assigned.layout } else { none },
            examples: if assigned.kind == TaskKind::Evaluation { 0 } else { rows },
            steps: if folds { 4 } else { 0 },
            weight: if folds { weight(rows + identity % 4, assigned.weight_shift, cap) } else { 1 },
            metrics: Metrics { train_loss: folds.then_some(0.5), seconds: 0.1, evaluation: None },
        };
        Input::Made { task, made: Box::new(made) }
    }

    fn payload(&mut self, worker: usize, assigned: &Assigned) -> Option<Arc<[u8]>> {
        let w = &self.workers[worker];
        let material = material(self.scenario.workers);
        Some(match assigned.kind {
            TaskKind::Survey => material.survey.as_slice().into(),
            TaskKind::Rows => material.encoded(w.content(assigned.schema.as_ref()?.hash)?).into(),
            TaskKind::Evaluation => Arc::from([]),
            TaskKind::Update | TaskKind::Gradient | TaskKind::Partial => {
                let parameters = w.content(assigned.model.as_ref()?.hash)?.len() / 4;
                let mut numbers = vec![0.0f32; parameters];
                numbers[place_of(w.id, assigned.round, self.scenario.workers, parameters)] = 1.0;
                to_bytes(&numbers).into()
            }
        })
    }

    // --- offers ---

    fn offer(&mut self, worker: usize, task: TaskId, key: &WorkKey, made: &Made) {
        let w = &mut self.workers[worker];
        let Some(conn) = w.conn else { return };
        let manifest = Manifest {
            run: key.run,
            worker: w.id,
            task,
            kind: key.kind,
            base: key.base,
            layout: made.layout,
            groups: 1,
            encoding: Encoding::F32,
            bytes: made.bytes,
            hash: made.hash,
            examples: made.examples,
            steps: made.steps,
            weight: made.weight,
            metrics: made.metrics.clone(),
        };
        w.manifests.push(manifest.clone());
        self.send_up(conn, Up::Offer(Box::new(manifest)));
        if made.bytes > 0 && made.bytes <= PAYLOAD_AT_ONCE_BYTES_MAX {
            self.upload(worker, Upload { task, hash: made.hash, from: 0 });
        }
    }

    fn upload(&mut self, worker: usize, upload: Upload) {
        let w = &mut self.workers[worker];
        let Some(conn) = w.conn else { return };
        let Some(mut body) = w.payloads.get(&upload.hash).cloned() else {
            let hash = upload.hash;
            return self.fail(format!("worker {worker} has lost the payload {hash} that it offers"));
        };
        if std::mem::take(&mut w.spoils) {
            let mut spoiled = body.to_vec();
            let middle = spoiled.len() / 2;
            spoiled[middle] ^= 1;
            body = spoiled.into();
            self.after(RECONNECT_AFTER, Happening::CutLater(worker));
        }
        let at = self.stream_time(conn, true);
        self.at(at, Happening::Begun(conn, upload, body));
    }

    pub(super) fn receipt_arrived(&mut self, worker: usize, life: u64, receipt: Receipt) {
        let w = &self.workers[worker];
        let ours = receipt.worker == w.id;
        if !ours {
            self.fail(format!("worker {worker} is given the receipt of {}", receipt.worker));
        }
        self.member_input(worker, life, Input::Receipted(receipt));
    }

    pub(super) fn name_of(&self, worker: usize) -> WorkerName {
        self.workers[worker].name.clone()
    }
}

/// The contents that a task is made with.
fn needs(assigned: &Assigned) -> impl Iterator<Item = &ContentRef> {
    [&assigned.schema, &assigned.model].into_iter().flatten()
}

/// For a trace. The ids and keys of contents are not the seed's.
fn in_short(input: &Input) -> String {
    match input {
        Input::Said(ToWorker::Assigned(a)) => format!("Assigned {} round {} {:?}", a.task, a.round, a.kind),
        Input::Said(ToWorker::Welcome(_)) => "Welcome".to_owned(),
        input => format!("{input:?}").chars().take(160).collect(),
    }
}

impl Worker {
    fn content(&self, hash: Hash) -> Option<&[u8]> {
        self.contents.iter().find(|(_, of, _)| *of == hash).map(|(.., bytes)| &**bytes)
    }

    fn has(&self, hash: Hash) -> bool {
        self.content(hash).is_some()
    }

    /// What no task names any more goes.
    fn keep_contents(&mut self, assigned: &Assigned) {
        while self.contents.len() > CONTENTS_KEPT {
            let is_wanted = |hash: &Hash| needs(assigned).any(|content| content.hash == *hash);
            let Some(at) = self.contents.iter().position(|(_, hash, _)| !is_wanted(hash)) else { return };
            let (id, ..) = self.contents.remove(at);
            self.gone.push(id);
        }
    }

    /// What it was to make of a task is on its disk.
    fn put_away(&mut self, task: TaskId) {
        if let Some((_, payload)) = self.making.take_if(|(of, _)| *of == task) {
            self.payloads.insert(Hash::of(&payload), payload);
        }
    }
}
