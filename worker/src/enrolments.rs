//! What a worker remembers of the coordinators that it is enrolled with: one file for each coordinator's key.
//!
//! The token is kept too: spent on our keys it is good for the same keys again, which is how a certificate is renewed.

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use certs::CertificateDer;
use data_encoding::{BASE64, HEXLOWER};
use protocol::ids::WorkerName;
use protocol::invitation::{Invitation, check_addresses};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::files::{self, FileError};

/// The longest file of an enrolment: two certificates of at most 8 KiB in base64, and addresses.
const ENROLMENT_BYTES_MAX: u64 = 64 * 1024;

/// The most coordinators that a worker remembers.
const ENROLMENTS_MAX: usize = 1000;

/// A certificate is renewed when so little of its 90 days is left, in seconds.
const RENEW_BEFORE_S: u64 = 30 * 24 * 3600;

/// What one coordinator gave us, and where it is.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Where it listens, as the latest invitation said.
    pub addresses: Vec<String>,
    /// Its certificate authority.
    pub ca: CertificateDer<'static>,
    /// Its X25519 key, which is what it is known by.
    pub coordinator: [u8; 32],
    /// Our certificate.
    pub certificate: CertificateDer<'static>,
    /// The name that it granted.
    pub name: WorkerName,
    /// When our certificate ends, in seconds since 1970.
    pub expires_unix_s: u64,
    /// What we were enrolled with.
    pub token: Token,
}

impl Enrolment {
    /// Whether this is the coordinator that `invitation` speaks of: the same key and the same authority.
    #[must_use]
    pub fn is_of(&self, invitation: &Invitation) -> bool {
        self.coordinator == invitation.coordinator_x25519 && certs::fingerprint(&self.ca) == invitation.ca_sha256
    }

    /// Whether it was only ever looked for on this machine.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.addresses.iter().all(|address| is_loopback(address))
    }

    /// Whether the certificate should be renewed.
    #[must_use]
    pub fn is_due(&self, now_unix_s: u64) -> bool {
        self.expires_unix_s < now_unix_s.saturating_add(RENEW_BEFORE_S)
    }

    /// The invitation that would give this enrolment again.
    #[must_use]
    pub fn as_invitation(&self) -> Invitation {
        Invitation {
            addresses: self.addresses.clone(),
            ca_sha256: certs::fingerprint(&self.ca),
            coordinator_x25519: self.coordinator,
            token: self.token.0,
            uses: 0,
            expires_unix_s: None,
            loopback_only: self.is_local(),
        }
    }
}

/// An invitation's token. Wiped when dropped, and never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Token(pub [u8; 16]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token([redacted])")
    }
}

fn is_loopback(address: &str) -> bool {
    let Some((host, _)) = address.rsplit_once(':') else { return false };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The enrolments of one state directory.
#[derive(Debug)]
pub struct Enrolments {
    directory: PathBuf,
}

impl Enrolments {
    /// Those in this directory.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// All of them.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn all(&self) -> Result<Vec<Enrolment>, EnrolmentError> {
        let entries = fs::read_dir(&self.directory).map_err(|e| FileError::new(&self.directory, "read", e))?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| FileError::new(&self.directory, "read", e))?.path();
            if path.extension().is_some_and(|ending| ending == "json") {
                paths.push(path);
            }
        }
        if paths.len() > ENROLMENTS_MAX {
            return Err(EnrolmentError::TooMany { path: self.directory.clone(), got: paths.len() });
        }
        paths.sort();
        paths.iter().filter_map(|path| read(path).transpose()).collect()
    }

    /// The one with the coordinator that `invitation` speaks of, if there is one.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(&self, invitation: &Invitation) -> Result<Option<Enrolment>, EnrolmentError> {
        let found = read(&self.path(&invitation.coordinator_x25519))?;
        Ok(found.filter(|enrolment| enrolment.is_of(invitation)))
    }

    /// Keeps one; durable on return.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&self, enrolment: &Enrolment) -> Result<(), EnrolmentError> {
        let stored = Stored::from(enrolment);
        let text = serde_json::to_vec_pretty(&stored).map_err(|source| EnrolmentError::Unreadable {
            path: self.path(&enrolment.coordinator),
            reason: source.to_string(),
        })?;
        Ok(files::write(&self.path(&enrolment.coordinator), &text)?)
    }

    fn path(&self, coordinator: &[u8; 32]) -> PathBuf {
        self.directory.join(format!("{}.json", HEXLOWER.encode(coordinator)))
    }
}

/// Why enrolments cannot be read or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolmentError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file is not what it should be.
    #[error("{}: not an enrolment: {reason}; remove it and enrol again with --join", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There are more than anybody has.
    #[error("{}: {got} enrolments, the most is {ENROLMENTS_MAX}; remove those that are not needed", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
        /// How many.
        got: usize,
    },
}

fn read(path: &Path) -> Result<Option<Enrolment>, EnrolmentError> {
    let Some(text) = files::read(path, ENROLMENT_BYTES_MAX)? else { return Ok(None) };
    let unreadable = |reason: String| EnrolmentError::Unreadable { path: path.to_owned(), reason };
    let stored: Stored = serde_json::from_slice(&text).map_err(|e| unreadable(e.to_string()))?;
    stored.parse().map(Some).map_err(unreadable)
}

/// An enrolment as its file has it.
#[derive(Serialize, Deserialize)]
struct Stored {
    name: WorkerName,
    addresses: Vec<String>,
    coordinator_x25519: String,
    ca: String,
    certificate: String,
    expires_unix_s: u64,
    token: String,
}

impl From<&Enrolment> for Stored {
    fn from(enrolment: &Enrolment) -> Self {
        Self {
            name: enrolment.name.clone(),
            addresses: enrolment.addresses.clone(),
            coordinator_x25519: HEXLOWER.encode(&enrolment.coordinator),
            ca: BASE64.encode(&enrolment.ca),
            certificate: BASE64.encode(&enrolment.certificate),
            expires_unix_s: enrolment.expires_unix_s,
            token: HEXLOWER.encode(&enrolment.token.0),
        }
    }
}

impl Stored {
    fn parse(self) -> Result<Enrolment, String> {
        check_addresses(&self.addresses).map_err(|e| e.to_string())?;
        let certificate =
            |text: &str| BASE64.decode(text.as_bytes()).map(CertificateDer::from).map_err(|e| e.to_string());
        Ok(Enrolment {
            addresses: self.addresses,
            ca: certificate(&self.ca)?,
            coordinator: bytes(&self.coordinator_x25519)?,
            certificate: certificate(&self.certificate)?,
            name: self.name,
            expires_unix_s: self.expires_unix_s,
            token: Token(bytes(&self.token)?),
        })
    }
}

fn bytes<const N: usize>(text: &str) -> Result<[u8; N], String> {
    let bytes = HEXLOWER.decode(text.as_bytes()).map_err(|e| e.to_string())?;
    bytes.try_into().map_err(|bytes: Vec<u8>| format!("{} bytes, expected {N}", bytes.len()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn enrolment(coordinator: u8, address: &str) -> Enrolment {
        Enrolment {
            addresses: vec![address.to_owned()],
            ca: CertificateDer::from(vec![1, 2, 3]),
            coordinator: [coordinator; 32],
            certificate: CertificateDer::from(vec![4, 5, 6]),
            name: "shard".parse().unwrap(),
            expires_unix_s: 100 * 24 * 3600,
            token: Token([9; 16]),
        }
    }

    #[test]
    fn enrolments_are_kept_by_the_coordinators_key() {
        let directory = tempfile::tempdir().unwrap();
        let enrolments = Enrolments::new(directory.path().to_owned());
        let (one, two) = (enrolment(1, "127.0.0.1:4433"), enrolment(2, "192.0.2.7:4433"));
        enrolments.keep(&one).unwrap();
        enrolments.keep(&two).unwrap();
        assert_eq!(enrolments.all().unwrap().len(), 2);
        let found = enrolments.of(&two.as_invitation()).unwrap().unwrap();
        assert_eq!((found.addresses, found.token.0), (two.addresses.clone(), [9; 16]));
        assert!(enrolments.of(&enrolment(3, "a:1").as_invitation()).unwrap().is_none());
    }

    #[test]
    fn the_same_key_under_another_authority_is_another_coordinator() {
        let directory = tempfile::tempdir().unwrap();
        let enrolments = Enrolments::new(directory.path().to_owned());
        let one = enrolment(1, "127.0.0.1:4433");
        enrolments.keep(&one).unwrap();
        let invitation = Invitation { ca_sha256: [0; 32], ..one.as_invitation() };
        assert!(enrolments.of(&invitation).unwrap().is_none());
    }

    #[test]
    fn a_broken_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("x.json"), "{").unwrap();
        let refused = Enrolments::new(directory.path().to_owned()).all().unwrap_err();
        assert!(refused.to_string().contains("x.json"), "{refused}");
    }

    #[test]
    fn local_is_loopback_only() {
        for (address, local) in [("127.0.0.1:1", true), ("[::1]:1", true), ("localhost:1", true), ("10.0.0.1:1", false)]
        {
            assert_eq!(enrolment(1, address).is_local(), local, "{address}");
        }
    }

    #[test]
    fn a_certificate_is_renewed_before_it_ends() {
        let enrolment = enrolment(1, "127.0.0.1:1");
        assert!(!enrolment.is_due(60 * 24 * 3600));
        assert!(enrolment.is_due(71 * 24 * 3600));
        assert!(enrolment.is_due(200 * 24 * 3600));
    }
}
