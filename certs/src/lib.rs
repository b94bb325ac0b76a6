//! The PKI of a fleet: certificate authority, worker and coordinator certificates, keys in PKCS#8.
//!
//! The coordinator is its own certificate authority. It makes a [`Ca`] at its first start and signs
//! two kinds of certificate with it: its own, for the fixed DNS name [`SERVER_NAME`], and one for each
//! worker, whose URI name carries the worker's id. A worker's id is the hash of its Ed25519 key, so a
//! certificate cannot bind an id to somebody else's key: [`worker_identity`] checks that again.
//!
//! There are no signing requests: the CA signs a bare public key, whose possession the caller has seen
//! proved. There is no revocation list either: the coordinator's registry decides who is revoked.
//! The time is an argument everywhere; entropy comes from the operating system.

mod authority;
mod identity;
pub mod keys;

pub use authority::{BACKDATE_S, CA_DAYS, CERTIFICATE_DAYS, Ca, CertError, SERVER_NAME, fingerprint};
pub use identity::{IdentityError, WORKER_URI_PREFIX, WorkerIdentity, not_after, worker_id, worker_identity};
pub use keys::{IdentityKey, KeyError, KeyFileError, PrivateKey, SessionKey};
pub use rustls::pki_types::CertificateDer;
