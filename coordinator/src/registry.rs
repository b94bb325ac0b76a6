//! Who belongs to the fleet: its workers, and the invitations that let new ones in.
//!
//! A [`Registry`] is a value; whoever changed it [saves](Registry::save) it before anybody hears of the change. A
//! token is kept as its hash, together with the keys that it was spent on: so a worker that asks again with the same
//! keys, after a crash on either side, gets the same answer, whatever became of the invitation since.

use std::collections::BTreeMap;
use std::path::Path;

use protocol::ids::{Hash, WorkerId, WorkerName};
use protocol::limits::WORKERS_MAX;
use protocol::messages::{EnrolRefusal, EnrolRequest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::state::{StateError, read_small, write_durably};

/// The most invitations that are remembered; over it, the oldest that have expired are forgotten first. The one for
/// workers on this machine never is.
pub const INVITATIONS_MAX: usize = 10_000;

/// The version of the file.
const VERSION: u32 = 1;

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
    /// In the order of their making.
    invitations: Vec<Issued>,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    workers: Vec<Worker>,
    invitations: Vec<Issued>,
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
    /// Reads the file, or starts empty if there is none.
    ///
    /// # Errors
    /// If it cannot be read, or is not a registry.
    pub fn load(path: &Path) -> Result<Self, StateError> {
        let Some(bytes) = read_small(path)? else { return Ok(Self::default()) };
        let stored: Stored = serde_json::from_slice(&bytes).map_err(|error| StateError::damaged(path, error))?;
        if stored.version != VERSION {
            return Err(StateError::damaged(path, format!("version {}, expected {VERSION}", stored.version)));
        }
        let workers = stored.workers.into_iter().map(|worker| (worker.id, worker)).collect();
        Ok(Self { workers, invitations: stored.invitations })
    }

    /// Writes the file; it is durable when this returns.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), StateError> {
        let workers = self.workers.values().cloned().collect();
        let stored = Stored { version: VERSION, workers, invitations: self.invitations.clone() };
        let mut bytes = serde_json::to_vec_pretty(&stored).map_err(|error| StateError::damaged(path, error))?;
        bytes.push(b'\n');
        write_durably(path, &bytes)
    }

    /// The workers, by id.
    pub fn workers(&self) -> impl ExactSizeIterator<Item = &Worker> {
        self.workers.values()
    }

    /// The worker with this id.
    #[must_use]
    pub fn worker(&self, id: &WorkerId) -> Option<&Worker> {
        self.workers.get(id)
    }

    /// Remembers an invitation by its token.
    pub fn invite(&mut self, token: &[u8; 16], uses: u32, expires_unix_s: Option<u64>, now_unix_s: u64) {
        self.forget_expired(now_unix_s);
        let token_hash = token_hash(token);
        self.invitations.push(Issued { token_hash, uses, expires_unix_s, loopback_only: false, spent_by: Vec::new() });
    }

    /// Remembers the reusable invitation for workers on this machine. One that was there before stays good, if it
    /// has the same token, and ends otherwise.
    pub fn invite_locally(&mut self, token: &[u8; 16]) {
        let token_hash = token_hash(token);
        self.invitations.retain(|issued| !issued.loopback_only || issued.token_hash == token_hash);
        if self.find(token).is_none() {
            let unbounded = Issued { token_hash, uses: 0, expires_unix_s: None, loopback_only: true, spent_by: vec![] };
            self.invitations.push(unbounded);
        }
    }

    /// Decides on an applicant, and remembers the worker and the use of the token. Nothing is changed by a refusal.
    ///
    /// The same keys get the same answer again: uses and expiry count only for new ones.
    ///
    /// # Errors
    /// Why it is not enrolled.
    pub fn enrol(&mut self, applicant: &Applicant, weight_max: u32) -> Result<Worker, EnrolRefusal> {
        let candidate = self.candidate(applicant, weight_max);
        if let Some(known) = self.workers.get(&candidate.id) {
            return again(known, &candidate);
        }
        let at = self.find(&applicant.request.token).ok_or(EnrolRefusal::Unknown)?;
        self.invitations[at].admits(applicant)?;
        if self.workers.len() >= WORKERS_MAX {
            return Err(EnrolRefusal::Full);
        }
        self.invitations[at].spent_by.push(candidate.id);
        self.workers.insert(candidate.id, candidate.clone());
        Ok(candidate)
    }

    /// Shuts a worker out, for ever.
    ///
    /// # Errors
    /// If nobody has this name.
    pub fn revoke(&mut self, name: &str) -> Result<Worker, NoSuchWorker> {
        let found = self.workers.values_mut().find(|worker| worker.name.as_str() == name);
        let worker = found.ok_or_else(|| NoSuchWorker { name: name.to_owned() })?;
        worker.revoked = true;
        Ok(worker.clone())
    }

    fn candidate(&self, applicant: &Applicant, weight_max: u32) -> Worker {
        let key_hash: [u8; 32] = Sha256::digest(applicant.request.ed25519).into();
        let mut id = [0; 16];
        id.copy_from_slice(&key_hash[..16]);
        Worker {
            id: WorkerId(id),
            name: self.free_name(&applicant.request.name),
            certificate_key_sha256: Hash(key_hash),
            x25519: Hash(applicant.x25519),
            ed25519: Hash(applicant.request.ed25519),
            weight_max,
            revoked: false,
        }
    }

    /// `shard`, or `shard-2` if another has that, and so on.
    fn free_name(&self, wish: &WorkerName) -> WorkerName {
        let taken = |name: &WorkerName| self.workers.values().any(|worker| worker.name == *name);
        let mut name = wish.clone();
        let mut count = 2u32;
        while taken(&name) {
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

fn token_hash(token: &[u8; 16]) -> Hash {
    Hash(blake3::derive_key("tributary invitation token 1", token))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TOKEN: [u8; 16] = [7; 16];

    fn applicant(key: u8, name: &str) -> Applicant {
        let request = EnrolRequest { token: TOKEN, name: name.parse().unwrap(), ed25519: [key; 32] };
        Applicant { request, x25519: [key; 32], is_local: false, now_unix_s: 1000 }
    }

    fn invited(uses: u32, expires: Option<u64>) -> Registry {
        let mut registry = Registry::default();
        registry.invite(&TOKEN, uses, expires, 1000);
        registry
    }

    #[test]
    fn a_token_is_good_for_its_uses_and_the_same_keys_get_the_same_answer() {
        let mut registry = invited(1, Some(1001));
        let first = registry.enrol(&applicant(1, "shard"), 9).unwrap();
        assert_eq!(registry.enrol(&applicant(2, "shard"), 9), Err(EnrolRefusal::Spent));
        let late = Applicant { now_unix_s: 9999, ..applicant(1, "other") };
        assert_eq!(registry.enrol(&late, 9).unwrap(), first);
        assert_eq!(registry.workers().len(), 1);
    }

    #[test]
    fn the_same_keys_get_the_same_answer_when_the_invitation_is_forgotten() {
        let mut registry = Registry::default();
        registry.invite_locally(&[8; 16]);
        registry.invite(&TOKEN, 1, None, 1000);
        let first = registry.enrol(&applicant(1, "shard"), 9).unwrap();
        for at in 0..INVITATIONS_MAX as u128 {
            registry.invite(&at.to_le_bytes(), 1, None, 1000);
        }
        assert_eq!(registry.invitations.len(), INVITATIONS_MAX);
        assert_eq!(registry.enrol(&applicant(1, "shard"), 9), Ok(first));
        assert_eq!(registry.enrol(&applicant(2, "other"), 9), Err(EnrolRefusal::Unknown));
        assert!(registry.find(&[8; 16]).is_some(), "workers on this machine still find their invitation");
    }

    #[test]
    fn each_refusal_has_its_reason_and_changes_nothing() {
        let mut registry = invited(0, Some(1000));
        let before = registry.clone();
        let unknown =
            Applicant { request: EnrolRequest { token: [8; 16], ..applicant(1, "a").request }, ..applicant(1, "a") };
        assert_eq!(registry.enrol(&unknown, 9), Err(EnrolRefusal::Unknown));
        assert_eq!(registry.enrol(&applicant(1, "a"), 9), Err(EnrolRefusal::Expired));
        assert_eq!(registry, before);
    }

    #[test]
    fn a_local_invitation_is_for_this_machine_and_never_used_up() {
        let mut registry = Registry::default();
        registry.invite_locally(&TOKEN);
        assert_eq!(registry.enrol(&applicant(1, "a"), 9), Err(EnrolRefusal::LoopbackOnly));
        for key in 1..20 {
            let here = Applicant { is_local: true, ..applicant(key, "a") };
            registry.enrol(&here, 9).unwrap();
        }
        let before = registry.clone();
        registry.invite_locally(&TOKEN);
        assert_eq!(registry, before);
        registry.invite_locally(&[9; 16]);
        let late = Applicant { is_local: true, ..applicant(99, "a") };
        assert_eq!(registry.enrol(&late, 9), Err(EnrolRefusal::Unknown));
    }

    #[test]
    fn names_are_unique() {
        let mut registry = invited(0, None);
        let name = |registry: &mut Registry, key, wish: &str| registry.enrol(&applicant(key, wish), 9).unwrap().name;
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
        registry.enrol(&applicant(1, "shard"), 9).unwrap();
        assert!(registry.revoke("shard").unwrap().revoked);
        assert_eq!(registry.enrol(&applicant(1, "shard"), 9), Err(EnrolRefusal::Revoked));
        assert!(registry.revoke("nobody").is_err());
    }

    #[test]
    fn one_identity_has_one_session_key() {
        let mut registry = invited(0, None);
        registry.enrol(&applicant(1, "shard"), 9).unwrap();
        let thief = Applicant { x25519: [9; 32], ..applicant(1, "shard") };
        assert_eq!(registry.enrol(&thief, 9), Err(EnrolRefusal::BadKey));
    }

    #[test]
    fn a_full_fleet_takes_nobody_and_keeps_who_is_in() {
        let mut registry = invited(0, None);
        let first = registry.enrol(&applicant(1, "shard"), 9).unwrap();
        for n in registry.workers.len()..WORKERS_MAX {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(n as u64).to_le_bytes());
            let name = format!("w{n}").parse().unwrap();
            registry.workers.insert(WorkerId(id), Worker { id: WorkerId(id), name, ..first.clone() });
        }
        assert_eq!(registry.workers.len(), WORKERS_MAX);
        assert_eq!(registry.enrol(&applicant(2, "other"), 9), Err(EnrolRefusal::Full));
        assert_eq!(registry.enrol(&applicant(1, "shard"), 9).unwrap(), first);
    }

    #[test]
    fn invitations_are_bounded_and_the_expired_go_first() {
        let mut registry = invited(1, None);
        for n in 0..INVITATIONS_MAX {
            let mut token = [0; 16];
            token[..8].copy_from_slice(&(n as u64).to_le_bytes());
            registry.invite(&token, 1, Some(n as u64), 500);
        }
        assert_eq!(registry.invitations.len(), INVITATIONS_MAX);
        assert!(registry.find(&TOKEN).is_some());
    }

    #[test]
    fn a_registry_survives_its_file_and_a_damaged_one_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("registry");
        let mut registry = invited(2, Some(5000));
        registry.enrol(&applicant(1, "shard"), 9).unwrap();
        registry.save(&path).unwrap();
        assert_eq!(Registry::load(&path).unwrap(), registry);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&data_encoding::HEXLOWER.encode(&TOKEN)), "the token itself is not kept");
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(Registry::load(&path), Err(StateError::Damaged { .. })));
        assert_eq!(Registry::load(&home.path().join("none")).unwrap(), Registry::default());
    }
}
