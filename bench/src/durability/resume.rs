//! An upload of more than 64 MiB that is cut goes on where it stopped, whoever of the three died: the connection, the
//! coordinator or the worker.

use std::path::Path;
use std::time::{Duration, Instant};

use protocol::ids::TaskId;
use protocol::messages::{Assigned, FromWorker, TaskKind, ToWorker};
use tokio::runtime::Handle;
use transport::CloseCode;
use tributary_tests::{Papers, Stranger};

use super::Bench;
use crate::fleet::enrol;
use crate::home::{PATIENCE, Place, config};
use crate::peer::{Peer, Script};

/// 17 million parameters, 68 MB.
const HIDDEN: &str = "[4150, 4100]";

/// So much is sent before it is cut.
const CUT_BYTES: u64 = 40_000_000;

pub(crate) fn resume(bench: &mut Bench) {
    by_the_connection_and_the_coordinator(bench);
    by_the_worker(bench);
}

/// A peer whose connection is closed in the middle, and then, in the next round, its coordinator is killed.
fn by_the_connection_and_the_coordinator(bench: &mut Bench) {
    let place = Place::new(&bench.disk, &config(HIDDEN, 1, "round"));
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let handle = bench.runtime.handle().clone();
    let (script, _told) = Script::new(Duration::from_secs(3600));
    let (stranger, papers) = handle.block_on(enrol(&place.invitation(), "peer"));
    let mut cut = Cut { handle: &handle, stranger, papers, script: &script };

    let peer = cut.half(&place);
    let there = part_bytes(&place.run());
    peer.connection.close(CloseCode::GoingAway, "");
    let from = cut.rest();
    coordinator.until_where("round", |line| line["round"] == 1);
    tell(bench, "the connection was closed", there, from);

    let peer = cut.half(&place);
    let there = part_bytes(&place.run());
    coordinator.kill();
    drop(peer);
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let from = cut.rest();
    coordinator.until_where("round", |line| line["round"] == 2);
    tell(bench, "the coordinator was killed", there, from);
}

fn tell(bench: &mut Bench, what: &str, there: u64, from: u64) {
    assert!(from > 0, "{what}: begins again, with {there} bytes there");
    let figure = format!("from byte {from}, {there} were there");
    bench.table.fact("resume", &format!("68 MB, {what} at 40 MB: goes on"), &figure, "> 0");
}

/// One worker, whose uploads are cut.
struct Cut<'a> {
    handle: &'a Handle,
    stranger: Stranger,
    papers: Papers,
    script: &'a Script,
}

impl Cut<'_> {
    /// Goes on until the first half of an update is at the coordinator.
    fn half(&mut self, place: &Place) -> Peer {
        let (mut peer, assigned) = self.assigned();
        let payload = self.script.payload(&assigned);
        let from = self.handle.block_on(allowed(&mut peer, &assigned, self.script));
        assert_eq!(from, 0);
        let _inside = self.handle.enter();
        peer.upload(assigned.task, &payload, 0, CUT_BYTES);
        let deadline = Instant::now() + PATIENCE;
        while part_bytes(&place.run()) < CUT_BYTES - (4 << 20) {
            assert!(Instant::now() < deadline, "{} bytes came", part_bytes(&place.run()));
            std::thread::sleep(Duration::from_millis(1));
        }
        peer
    }

    /// Comes back, and sends the rest; where that began.
    fn rest(&mut self) -> u64 {
        let (mut peer, assigned) = self.assigned();
        let payload = self.script.payload(&assigned);
        self.handle.block_on(async {
            let from = allowed(&mut peer, &assigned, self.script).await;
            let sent = peer.upload(assigned.task, &payload, from, u64::MAX);
            heard(&mut peer, assigned.task, |message| matches!(message, ToWorker::Receipt(_)).then_some(())).await;
            assert!(sent.await.unwrap());
            from
        })
    }

    /// A session with an update to make.
    fn assigned(&mut self) -> (Peer, Box<Assigned>) {
        self.handle.block_on(async {
            let mut peer = Peer::connect(&self.stranger, &self.papers).await;
            loop {
                match peer.hear().await.unwrap() {
                    ToWorker::Assigned(assigned) if assigned.kind == TaskKind::Update => return (peer, assigned),
                    ToWorker::Assigned(assigned) => peer.offer(&assigned, &self.script.payload(&assigned)).await,
                    _ => {}
                }
            }
        })
    }
}

/// Offers, and waits to be told from where on it may send.
async fn allowed(peer: &mut Peer, assigned: &Assigned, script: &Script) -> u64 {
    peer.offer(assigned, &script.payload(assigned)).await;
    heard(peer, assigned.task, |message| if let ToWorker::Go { from, .. } = message { Some(*from) } else { None }).await
}

/// Waits for a message, and beats.
async fn heard<T>(peer: &mut Peer, task: TaskId, wanted: impl Fn(&ToWorker) -> Option<T>) -> T {
    loop {
        let message = tokio::time::timeout(protocol::limits::BEAT_EVERY, peer.hear()).await;
        match message.map(|message| message.expect("the session lasts")) {
            Ok(message) => match wanted(&message) {
                Some(found) => return found,
                None => assert!(!matches!(message, ToWorker::Refused { .. } | ToWorker::Late { .. }), "{message:?}"),
            },
            Err(_) => peer.say(&FromWorker::Beat { task, steps: 1 }).await,
        }
    }
}

/// Bytes of payloads that are not whole yet.
fn part_bytes(run: &Path) -> u64 {
    let entries = std::fs::read_dir(run).unwrap().flatten();
    let parts = entries.filter(|entry| entry.file_name().to_string_lossy().contains(".part-"));
    parts.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

/// The released worker, killed with `kill -9` while it sends.
fn by_the_worker(bench: &mut Bench) {
    let place = Place::new(&bench.disk, &config(HIDDEN, 1, "round"));
    let mut coordinator = place.coordinator();
    coordinator.until("listening");
    let log = "tributary_worker=debug";
    let mut worker = place.worker("ada", log);
    worker.until("joined");
    let deadline = Instant::now() + PATIENCE;
    while part_bytes(&place.run()) < 16 << 20 {
        assert!(Instant::now() < deadline, "{}", worker.stderr());
        std::thread::sleep(Duration::from_millis(1));
    }
    worker.kill();
    let there = part_bytes(&place.run());
    let worker = place.worker("ada", log);
    coordinator.until_where("round", |line| line["round"] == 1);
    let said = worker.stderr();
    let line = said.lines().find(|line| line.contains("upload begins") && !line.contains(" from=0 "));
    let line = line.unwrap_or_else(|| panic!("no upload goes on, with {there} bytes there:\n{said}"));
    let from = line.split(" from=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0);
    assert!(from > 0, "{line}");
    let figure = format!("from byte {from}, {there} were there");
    bench.table.fact("resume", "68 MB, `kill -9` of the released worker in its upload: goes on", &figure, "> 0");
}
