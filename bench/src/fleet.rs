//! A fleet of [`Peer`]s around one coordinator, and somebody who says when they may offer.
#![allow(clippy::unwrap_used)] // a benchmark that cannot go on panics, and its line is then said not to be measured

use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::invitation::Invitation;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tributary_tests::{Papers, Stranger};

use crate::figures::Samples;
use crate::home::PATIENCE;
use crate::peer::{Peer, Script, Told, What};

/// The peers, and what they tell.
#[derive(Debug)]
pub(crate) struct Fleet {
    handle: Handle,
    gate: watch::Sender<u32>,
    /// Of the one that probes.
    probe_gate: watch::Sender<u32>,
    told: mpsc::UnboundedReceiver<Told>,
    tasks: Vec<JoinHandle<()>>,
    /// How far each of them is.
    pub(crate) progress: Vec<Progress>,
    /// Answers to probes since they were last taken.
    pub(crate) probed: Samples,
    /// What no honest peer likes to hear.
    pub(crate) unwanted: Vec<String>,
}

/// How a fleet is made up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Crew {
    /// How many offer when the gate opens.
    pub(crate) peers: usize,
    /// Whether there is one more, which probes.
    pub(crate) probe: bool,
    /// Until which round the gate is open at first.
    pub(crate) open_to: u32,
}

/// How far a peer is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    /// The newest round that it has an update to make in.
    pub(crate) round: u32,
    /// Large models that it has read.
    pub(crate) models: u32,
    /// Updates of it that are held.
    pub(crate) held: u32,
    /// When the last of them was.
    pub(crate) held_at: Option<Instant>,
    /// Updates of it that are in a model.
    pub(crate) receipts: u32,
}

/// From so many bytes on, a download is a model of the large kind and not the schema.
const LARGE_BYTES: u64 = 1 << 20;

/// Time between two probes, at least.
const PROBE_EVERY: Duration = Duration::from_millis(5);

impl Fleet {
    /// Enrols and connects everybody.
    pub(crate) fn start(handle: &Handle, invitation: &Invitation, crew: Crew) -> Self {
        let (script, told) = Script::new(PROBE_EVERY);
        let (gate, open) = watch::channel(crew.open_to);
        let (probe_gate, probe_open) = watch::channel(crew.open_to);
        let count = crew.peers + usize::from(crew.probe);
        let tasks = handle.block_on(async {
            let mut tasks = Vec::new();
            for number in 0..count {
                let (stranger, papers) = enrol(invitation, &format!("peer-{number:03}")).await;
                let probes = number == crew.peers;
                let (script, open) = (Arc::clone(&script), if probes { probe_open.clone() } else { open.clone() });
                tasks.push(tokio::spawn(async move {
                    let peer = Peer::connect(&stranger, &papers).await;
                    peer.serve(number, script, open, probes).await;
                }));
            }
            tasks
        });
        let progress = vec![Progress::default(); count];
        Self {
            handle: handle.clone(),
            gate,
            probe_gate,
            told,
            tasks,
            progress,
            probed: Samples::default(),
            unwanted: Vec::new(),
        }
    }

    /// Lets everybody but the one that probes offer updates of rounds up to this.
    pub(crate) fn open(&self, round: u32) {
        self.gate.send_replace(round);
    }

    /// Lets the one that probes do so.
    pub(crate) fn open_probe(&self, round: u32) {
        self.probe_gate.send_replace(round);
    }

    /// Waits until all of the first `count` peers are so far.
    pub(crate) fn until(&mut self, count: usize, far: impl Fn(&Progress) -> bool) {
        while !self.progress[..count].iter().all(&far) {
            let told = self.handle.block_on(async { timeout(PATIENCE, self.told.recv()).await });
            let missing = self.progress[..count].iter().filter(|progress| !far(progress)).count();
            let told = told.unwrap_or_else(|_| panic!("{missing} of {count} are not so far: {:?}", self.unwanted));
            self.note(&told.expect("the script lives"));
        }
    }

    /// Everybody has this round's task, and its model if it is large.
    pub(crate) fn until_assigned(&mut self, round: u32, large: bool) {
        let all = self.progress.len();
        self.until(all, |peer| peer.round >= round && (!large || peer.models >= round));
    }

    /// Takes in what was told so far.
    pub(crate) fn catch_up(&mut self) {
        while let Ok(told) = self.told.try_recv() {
            self.note(&told);
        }
    }

    fn note(&mut self, told: &Told) {
        let peer = &mut self.progress[told.peer];
        match &told.what {
            What::Assigned(round) => peer.round = *round,
            What::Downloaded(bytes) if *bytes >= LARGE_BYTES => peer.models += 1,
            What::Downloaded(_) => {}
            What::Held => (peer.held, peer.held_at) = (peer.held + 1, Some(told.at)),
            What::Receipt => peer.receipts += 1,
            What::Probed(time) => self.probed.add_time(*time),
            What::Unwanted(told) => self.unwanted.push(told.clone()),
            What::Gone => panic!("peer {} is gone", told.peer),
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Somebody new, with papers.
pub(crate) async fn enrol(invitation: &Invitation, name: &str) -> (Stranger, Papers) {
    let stranger = Stranger::new(invitation.clone());
    let papers = stranger.enrol(name).await;
    (stranger, papers)
}
