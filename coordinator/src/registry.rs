//! Who belongs to the fleet: its workers, and the invitations that let new ones in.
//!
//! A [`Registry`] is a value, rebuilt by a replay of [`Fact`]s; a [`RegistryJournal`] keeps them in the state directory,
//! each of them durable before anybody hears of it. A token is kept as its hash, together with the keys that it was
//! spent on: so a worker that asks again with the same keys, after a crash on either side, gets the same answer,
//! whatever became of the invitation since.

use std::collections::{BTreeMap, BTreeSet};

use protocol::ids::{Hash, RunId, WorkerId, WorkerName};
use protocol::limits::WORKERS_MAX;
use protocol::messages::{EnrolRefusal, EnrolRequest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::store::disk::Disk;
use crate::store::journal::{FACT, Journal, Record, Scope};
use crate::store::{StoreError, unix_ms};

/// The most invitations that are remembered; over it, the oldest that have expired are forgotten first. The one for
/// workers on this machine never is.
pub const INVITATIONS_MAX: usize = 10_000;

/// Whose the registry's journal is: the whole state directory's.
pub const SCOPE: Scope = Scope { prefix: "registry-journal-", run: RunId([0; 16]), plan: Some(Hash([0; 32])) };

/// One worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// The first half of the SHA-256 of its Ed25519 key.
    pub id: WorkerId,
    /// Its name, unique in the fleet.
    pub name: WorkerName,
    /// SHA-256 of the key that its certificate must carry.
    pub certificate_key_sha256: Hash,
    /// The static key of its sessions.
    pub x25519: Hash,
    /// The key of its signatures.
    pub ed25519: Hash,
    /// The largest weight that its updates may have.
    pub weight_max: u32,
    /// Whether it was shut out.
    pub revoked: bool,
}

/// An invitation that was given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Issued {
    token_hash: Hash,
    /// 0 for as many as come.
    uses: u32,
    expires_unix_s: Option<u64>,
    loopback_only: bool,
    /// Which workers it let in.
    spent_by: Vec<WorkerId>,
}

/// The workers and the invitations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registry {
    workers: BTreeMap<WorkerId, Worker>,
    /// Theirs: whoever is enrolled next must not cost a look at everybody.
    names: BTreeSet<WorkerName>,
    /// How many of them were not shut out.
    welcome: usize,
    /// In the order of their making.
    invitations: Vec<Issued>,
}

/// What changes the registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fact {
    /// An invitation was given out.
    Invited {
        /// The hash of its token.
        token_hash: Hash,
        /// How many workers it lets in; 0 for as many as come.
        uses: u32,
        /// Until when.
        expires_unix_s: Option<u64>,
        /// Whether it is the one for workers on this machine.
        loopback_only: bool,
        /// When it was given out.
        now_unix_s: u64,
    },
    /// A worker was let in.
    Enrolled {
        /// Who, and by which keys.
        worker: Worker,
        /// The hash of the token that it spent.
        token_hash: Hash,
    },
    /// A worker was shut out, for ever.
    Revoked {
        /// Who.
        id: WorkerId,
    },
}

impl Fact {
    /// The fact of a record; none if it is of a kind that came later.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(record: &Record) -> Result<Option<Self>, String> {
        if record.kind != FACT {
            return Ok(None);
        }
        protocol::messages::decode(&record.payload).map(Some).map_err(|error| format!("a fact cannot be read: {error}"))
    }
}

/// What somebody who wants to be enrolled has shown.
#[derive(Clone, Debug)]
pub struct Applicant {
    /// What it asks.
    pub request: EnrolRequest,
    /// The X25519 key that it proved to hold.
    pub x25519: [u8; 32],
    /// Whether it comes from the coordinator's own machine.
    pub is_local: bool,
    /// When it asks, in seconds since 1970.
    pub now_unix_s: u64,
}

/// There is no such worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no worker is called {name:?}; see coordinator workers")]
pub struct NoSuchWorker {
    /// What was asked for.
    pub name: String,
}

impl Registry {
    /// The only mutation: a replay of the facts gives the same registry.
    pub fn apply(&mut self, fact: &Fact) {
        match fact {
            Fact::Invited { token_hash, uses, expires_unix_s, loopback_only, now_unix_s } => {
                match loopback_only {
                    true => self.invitations.retain(|issued| !issued.loopback_only),
                    false => self.forget_expired(*now_unix_s),
                }
                let (uses, expires_unix_s, loopback_only) = (*uses, *expires_unix_s, *loopback_only);
                let spent_by = Vec::new();
                self.invitations.push(Issued {
                    token_hash: *token_hash,
                    uses,
                    expires_unix_s,
                    loopback_only,
                    spent_by,
                });
            }
            Fact::Enrolled { worker, token_hash } => {
                let issued = self.invitations.iter_mut().find(|issued| issued.token_hash == *token_hash);
                issued.into_iter().for_each(|issued| issued.spent_by.push(worker.id));
                self.names.insert(worker.name.clone());
                let before = self.workers.insert(worker.id, worker.clone());
                self.welcome += usize::from(!worker.revoked);
                self.welcome -= usize::from(before.is_some_and(|before| !before.revoked));
            }
            Fact::Revoked { id } => {
                let Some(worker) = self.workers.get_mut(id) else { return };
                self.welcome -= usize::from(!std::mem::replace(&mut worker.revoked, true));
            }
        }
    }

    /// The workers, by id.
    pub fn workers(&self) -> impl ExactSizeIterator<Item = &Worker> {
        self.workers.values()
    }

    /// How many workers may come: those that were not shut out.
    #[must_use]
    pub fn welcome(&self) -> usize {
        self.welcome
    }

    /// The worker with this id.
    #[must_use]
    pub fn worker(&self, id: &WorkerId) -> Option<&Worker> {
        self.workers.get(id)
    }

    /// An invitation, by its token.
    #[must_use]
    pub fn invite(&self, token: &[u8; 16], uses: u32, expires_unix_s: Option<u64>, now_unix_s: u64) -> Fact {
        let token_hash = token_hash(token);
        Fact::Invited { token_hash, uses, expires_unix_s, loopback_only: false, now_unix_s }
    }

    /// The reusable invitation for workers on this machine. One that was there before stays good, and nothing changes,
    /// if it has the same token; otherwise it ends.
    #[must_use]
    pub fn invite_locally(&self, token: &[u8; 16], now_unix_s: u64) -> Option<Fact> {
        let token_hash = token_hash(token);
        let fact = Fact::Invited { token_hash, uses: 0, expires_unix_s: None, loopback_only: true, now_unix_s };
        self.find(token).is_none().then_some(fact)
    }

    /// Decides on an applicant: the worker that it is, and the fact that makes it one, if it is new.
    ///
    /// The same keys get the same answer again: uses and expiry count only for new ones.
    ///
    /// # Errors
    /// Why it is not enrolled.
    pub fn enrol(&self, applicant: &Applicant, weight_max: u32) -> Result<(Worker, Option<Fact>), EnrolRefusal> {
        let candidate = self.candidate(applicant, weight_max);
        if let Some(known) = self.workers.get(&candidate.id) {
            return Ok((again(known, &candidate)?, None));
        }
        let at = self.find(&applicant.request.token).ok_or(EnrolRefusal::Unknown)?;
        self.invitations[at].admits(applicant)?;
        if self.workers.len() >= WORKERS_MAX {
            return Err(EnrolRefusal::Full);
        }
        let fact = Fact::Enrolled { worker: candidate.clone(), token_hash: self.invitations[at].token_hash };
        Ok((candidate, Some(fact)))
    }

    /// The worker that is to be shut out, and the fact that does it, if it is not already.
    ///
    /// # Errors
    /// If nobody has this name.
    pub fn revoke(&self, name: &str) -> Result<(Worker, Option<Fact>), NoSuchWorker> {
        let found = self.workers.values().find(|worker| worker.name.as_str() == name);
        let worker = found.ok_or_else(|| NoSuchWorker { name: name.to_owned() })?;
        let fact = (!worker.revoked).then_some(Fact::Revoked { id: worker.id });
        Ok((Worker { revoked: true, ..worker.clone() }, fact))
    }

    fn candidate(&self, applicant: &Applicant, weight_max: u32) -> Worker {
        let (id, key_hash) = identified(&applicant.request.ed25519);
        Worker {
            id,
            name: self.free_name(&applicant.request.name),
            certificate_key_sha256: key_hash,
            x25519: Hash(applicant.x25519),
            ed25519: Hash(applicant.request.ed25519),
            weight_max,
            revoked: false,
        }
    }

    /// `shard`, or `shard-2` if another has that, and so on.
    fn free_name(&self, wish: &WorkerName) -> WorkerName {
        let mut name = wish.clone();
        let mut count = 2u32;
        while self.names.contains(&name) {
            let suffix = format!("-{count}");
            let room = protocol::ids::WORKER_NAME_LEN_MAX - suffix.len();
            let stem: String = wish.as_str().chars().take(room).collect();
            name = WorkerName::nearest(&format!("{stem}{suffix}"));
            count += 1;
        }
        name
    }

    fn find(&self, token: &[u8; 16]) -> Option<usize> {
        let hash = token_hash(token);
        self.invitations.iter().position(|issued| issued.token_hash == hash)
    }

    fn forget_expired(&mut self, now_unix_s: u64) {
        while self.invitations.len() >= INVITATIONS_MAX {
            let over = |issued: &Issued| issued.expires_unix_s.is_some_and(|end| end < now_unix_s);
            let oldest = self.invitations.iter().position(over);
            let given_out = || self.invitations.iter().position(|issued| !issued.loopback_only);
            let Some(oldest) = oldest.or_else(given_out) else { return };
            self.invitations.remove(oldest);
        }
    }
}

/// The registry's journal, in the state directory.
pub struct RegistryJournal {
    disk: Box<dyn Disk>,
    journal: Journal,
}

impl std::fmt::Debug for RegistryJournal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryJournal").field("journal", &self.journal).finish_non_exhaustive()
    }
}

impl RegistryJournal {
    /// Reads the journal, or begins one if there is none; and what was torn off its end by a crash.
    ///
    /// # Errors
    /// If it is damaged, or the disk is broken or read-only.
    pub fn open(mut disk: Box<dyn Disk>) -> Result<(Self, Registry, Option<StoreError>), StoreError> {
        let mut registry = Registry::default();
        let (journal, end) = Journal::open(disk.as_mut(), SCOPE, unix_ms, &mut |record| {
            Fact::of(&record)?.iter().for_each(|fact| registry.apply(fact));
            Ok(())
        })?;
        Ok((Self { disk, journal }, registry, end.and_then(|end| end.torn)))
    }

    /// Keeps a fact; it is durable when this returns.
    ///
    /// # Errors
    /// If the disk is full, and then nothing was kept; or if it is broken.
    pub fn keep(&mut self, fact: &Fact) -> Result<(), StoreError> {
        let disk = self.disk.as_mut();
        self.journal.append(disk, FACT, &protocol::messages::encode(fact), &[])?;
        let kept = self.journal.sync(disk);
        if kept.is_err() {
            // Whoever asked is refused: it may not become true later.
            self.journal.take_back();
        }
        kept.map(drop)
    }
}

impl Issued {
    fn admits(&self, applicant: &Applicant) -> Result<(), EnrolRefusal> {
        if self.loopback_only && !applicant.is_local {
            return Err(EnrolRefusal::LoopbackOnly);
        }
        if self.expires_unix_s.is_some_and(|end| applicant.now_unix_s >= end) {
            return Err(EnrolRefusal::Expired);
        }
        if self.uses != 0 && self.spent_by.len() >= self.uses as usize {
            return Err(EnrolRefusal::Spent);
        }
        Ok(())
    }
}

/// The answer to a worker that is enrolled already.
fn again(known: &Worker, candidate: &Worker) -> Result<Worker, EnrolRefusal> {
    if known.revoked {
        Err(EnrolRefusal::Revoked)
    } else if known.x25519 != candidate.x25519 {
        // Nobody who holds the one key has lost the other: they are made together.
        Err(EnrolRefusal::BadKey)
    } else {
        Ok(known.clone())
    }
}

/// The id of a worker with this Ed25519 key, and the key's SHA-256.
#[must_use]
pub fn identified(ed25519: &[u8; 32]) -> (WorkerId, Hash) {
    let hash: [u8; 32] = Sha256::digest(ed25519).into();
    let mut id = [0; 16];
    id.copy_from_slice(&hash[..16]);
    (WorkerId(id), Hash(hash))
}

fn token_hash(token: &[u8; 16]) -> Hash {
    Hash(blake3::derive_key("tributary invitation token 1", token))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::store::testing::TestDisk;

    const TOKEN: [u8; 16] = [7; 16];

    impl Registry {
        /// Does what would be durable first.
        fn make(&mut self, fact: impl Into<Option<Fact>>) {
            fact.into().iter().for_each(|fact| self.apply(fact));
        }

        fn enrolled(&mut self, applicant: &Applicant) -> Result<Worker, EnrolRefusal> {
            let (worker, fact) = self.enrol(applicant, 9)?;
            self.make(fact);
            Ok(worker)
        }
    }

    fn applicant(key: u8, name: &str) -> Applicant {
        let request = EnrolRequest { token: TOKEN, name: name.parse().unwrap(), ed25519: [key; 32] };
        Applicant { request, x25519: [key; 32], is_local: false, now_unix_s: 1000 }
    }

    fn invited(uses: u32, expires: Option<u64>) -> Registry {
        let mut registry = Registry::default();
        registry.make(registry.invite(&TOKEN, uses, expires, 1000));
        registry
    }

    #[test]
    fn a_token_is_good_for_its_uses_and_the_same_keys_get_the_same_answer() {
        let mut registry = invited(1, Some(1001));
        let first = registry.enrolled(&applicant(1, "shard")).unwrap();
        assert_eq!(registry.enrolled(&applicant(2, "shard")), Err(EnrolRefusal::Spent));
        let late = Applicant { now_unix_s: 9999, ..applicant(1, "other") };
        assert_eq!(registry.enrolled(&late).unwrap(), first);
        assert_eq!(registry.workers().len(), 1);
    }

    #[test]
    fn the_same_keys_get_the_same_answer_when_the_invitation_is_forgotten() {
        let mut registry = Registry::default();
        registry.make(registry.invite_locally(&[8; 16], 1000));
        registry.make(registry.invite(&TOKEN, 1, None, 1000));
        let first = registry.enrolled(&applicant(1, "shard")).unwrap();
        for at in 0..INVITATIONS_MAX as u128 {
            registry.make(registry.invite(&at.to_le_bytes(), 1, None, 1000));
        }
        assert_eq!(registry.invitations.len(), INVITATIONS_MAX);
        assert_eq!(registry.enrolled(&applicant(1, "shard")), Ok(first));
        assert_eq!(registry.enrolled(&applicant(2, "other")), Err(EnrolRefusal::Unknown));
        assert!(registry.find(&[8; 16]).is_some(), "workers on this machine still find their invitation");
    }

    #[test]
    fn each_refusal_has_its_reason_and_changes_nothing() {
        let mut registry = invited(0, Some(1000));
        let before = registry.clone();
        let unknown =
            Applicant { request: EnrolRequest { token: [8; 16], ..applicant(1, "a").request }, ..applicant(1, "a") };
        assert_eq!(registry.enrolled(&unknown), Err(EnrolRefusal::Unknown));
        assert_eq!(registry.enrolled(&applicant(1, "a")), Err(EnrolRefusal::Expired));
        assert_eq!(registry, before);
    }

    #[test]
    fn a_local_invitation_is_for_this_machine_and_never_used_up() {
        let mut registry = Registry::default();
        registry.make(registry.invite_locally(&TOKEN, 1000));
        assert_eq!(registry.enrolled(&applicant(1, "a")), Err(EnrolRefusal::LoopbackOnly));
        for key in 1..20 {
            let here = Applicant { is_local: true, ..applicant(key, "a") };
            registry.enrolled(&here).unwrap();
        }
        let before = registry.clone();
        registry.make(registry.invite_locally(&TOKEN, 1000));
        assert_eq!(registry, before);
        registry.make(registry.invite_locally(&[9; 16], 1000));
        let late = Applicant { is_local: true, ..applicant(99, "a") };
        assert_eq!(registry.enrolled(&late), Err(EnrolRefusal::Unknown));
    }

    #[test]
    fn names_are_unique() {
        let mut registry = invited(0, None);
        let name = |registry: &mut Registry, key, wish: &str| registry.enrolled(&applicant(key, wish)).unwrap().name;
        assert_eq!(name(&mut registry, 1, "shard").as_str(), "shard");
        assert_eq!(name(&mut registry, 2, "shard").as_str(), "shard-2");
        assert_eq!(name(&mut registry, 3, "shard").as_str(), "shard-3");
        let long = "x".repeat(64);
        name(&mut registry, 4, &long);
        assert_eq!(name(&mut registry, 5, &long).as_str(), format!("{}-2", "x".repeat(62)));
    }

    #[test]
    fn a_revoked_worker_stays_out() {
        let mut registry = invited(0, None);
        registry.enrolled(&applicant(1, "shard")).unwrap();
        let (worker, fact) = registry.revoke("shard").unwrap();
        registry.make(fact);
        assert!(worker.revoked && registry.revoke("shard").unwrap().1.is_none());
        assert_eq!(registry.enrolled(&applicant(1, "shard")), Err(EnrolRefusal::Revoked));
        assert!(registry.revoke("nobody").is_err());
    }

    #[test]
    fn those_who_may_come_are_counted_as_they_are_enrolled_and_shut_out() {
        let mut registry = invited(0, None);
        registry.enrolled(&applicant(1, "one")).unwrap();
        let two = registry.enrolled(&applicant(2, "two")).unwrap();
        registry.make(Fact::Enrolled { worker: two.clone(), token_hash: token_hash(&TOKEN) });
        assert_eq!(registry.welcome(), 2);
        for _ in 0..2 {
            registry.make(Fact::Revoked { id: two.id });
            assert_eq!(registry.welcome(), 1);
        }
    }

    #[test]
    fn one_identity_has_one_session_key() {
        let mut registry = invited(0, None);
        registry.enrolled(&applicant(1, "shard")).unwrap();
        let thief = Applicant { x25519: [9; 32], ..applicant(1, "shard") };
        assert_eq!(registry.enrolled(&thief), Err(EnrolRefusal::BadKey));
    }

    #[test]
    fn a_full_fleet_takes_nobody_and_keeps_who_is_in() {
        let mut registry = invited(0, None);
        let first = registry.enrolled(&applicant(1, "shard")).unwrap();
        for n in registry.workers.len()..WORKERS_MAX {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(n as u64).to_le_bytes());
            let name = format!("w{n}").parse().unwrap();
            let worker = Worker { id: WorkerId(id), name, ..first.clone() };
            registry.make(Fact::Enrolled { worker, token_hash: token_hash(&TOKEN) });
        }
        assert_eq!(registry.workers.len(), WORKERS_MAX);
        assert_eq!(registry.enrolled(&applicant(2, "other")), Err(EnrolRefusal::Full));
        assert_eq!(registry.enrolled(&applicant(1, "shard")).unwrap(), first);
    }

    #[test]
    fn invitations_are_bounded_and_the_expired_go_first() {
        let mut registry = invited(1, None);
        for n in 0..INVITATIONS_MAX {
            let mut token = [0; 16];
            token[..8].copy_from_slice(&(n as u64).to_le_bytes());
            registry.make(registry.invite(&token, 1, Some(n as u64), 500));
        }
        assert_eq!(registry.invitations.len(), INVITATIONS_MAX);
        assert!(registry.find(&TOKEN).is_some());
    }

    fn opened(disk: &TestDisk) -> (RegistryJournal, Registry) {
        let (journal, registry, _) = RegistryJournal::open(Box::new(disk.clone())).unwrap();
        (journal, registry)
    }

    /// What a registry went through, kept one by one.
    fn kept(disk: &TestDisk) -> Registry {
        let (mut journal, mut registry) = opened(disk);
        let mut keep = |registry: &mut Registry, fact: Fact| {
            journal.keep(&fact).unwrap();
            registry.apply(&fact);
        };
        let fact = registry.invite(&TOKEN, 2, Some(5000), 1000);
        keep(&mut registry, fact);
        for key in 1..3 {
            let fact = registry.enrol(&applicant(key, "shard"), 9).unwrap().1.unwrap();
            keep(&mut registry, fact);
        }
        let fact = registry.revoke("shard-2").unwrap().1.unwrap();
        keep(&mut registry, fact);
        registry
    }

    #[test]
    fn a_registry_survives_a_power_cut_and_a_damaged_one_is_refused() {
        let disk = TestDisk::default();
        let registry = kept(&disk);
        disk.crash(0);
        assert_eq!(opened(&disk).1, registry);
        let text = disk.content("registry-journal-000001");
        assert!(!text.windows(16).any(|bytes| bytes == TOKEN), "the token itself is not kept");
        let mut damaged = disk.copy();
        damaged.flip("registry-journal-000001", 140, 1);
        assert!(matches!(RegistryJournal::open(Box::new(damaged)), Err(StoreError::Damaged { offset: 100, .. })));
    }

    #[test]
    fn what_a_full_disk_refused_does_not_become_true_later() {
        let disk = TestDisk::default();
        let registry = kept(&disk);
        let (mut journal, _) = opened(&disk);
        disk.room(10);
        let refused = registry.invite(&[1; 16], 1, None, 1000);
        assert!(journal.keep(&refused).unwrap_err().is_full());
        disk.room(u64::MAX);
        let mut expected = registry.clone();
        let next = registry.invite(&[2; 16], 1, None, 1000);
        journal.keep(&next).unwrap();
        expected.apply(&next);
        drop(journal);
        assert_eq!(opened(&disk).1, expected);
    }
}
