//! `Noise_IK_25519_AESGCM_SHA256`, revision 34 of the Noise specification.
//!
//! ```text
//! <- s                      the initiator knows the responder's static key beforehand
//! -> e, es, s, ss, payload  32 + 48 + 16 bytes and the payload
//! <- e, ee, se, payload     32 + 16 bytes and the payload
//! ```
//!
//! Each message is one method that takes the old state by value, so a handshake that failed or is over
//! cannot be used again. [`Symmetric`] follows §5.2 of the specification name by name. Beyond it, a key
//! agreement that the peer did not contribute to aborts: a low-order point would give a secret that
//! anyone knows. The payload of the first message can be replayed by whoever recorded it, so nothing may
//! change state before the first record has been opened.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use x25519_dalek::{PublicKey, SharedSecret, StaticSecret};

use super::aead::{self, AeadKey, TAG_BYTES};
use super::secret::Secret;

const PROTOCOL_NAME: &[u8; 28] = b"Noise_IK_25519_AESGCM_SHA256";

const KEY_BYTES: usize = 32;

/// The specification's limit on a handshake message (§3).
pub const HANDSHAKE_MESSAGE_MAX: usize = 65_535;

/// What the first message adds to its payload: ephemeral key, sealed static key, tag.
pub const INITIATOR_OVERHEAD_BYTES: usize = KEY_BYTES + KEY_BYTES + TAG_BYTES + TAG_BYTES;

/// What the second message adds to its payload: ephemeral key, tag.
pub const RESPONDER_OVERHEAD_BYTES: usize = KEY_BYTES + TAG_BYTES;

/// What both sides mix into the handshake first: the Hello frame as it was sent, and this TLS
/// connection's exporter, so that a handshake cannot be relayed into another connection.
///
/// # Panics
/// If the frame is 4 GiB or longer.
pub fn prologue(hello_frame: &[u8], exporter: &[u8; 32]) -> Vec<u8> {
    let length = u32::try_from(hello_frame.len()).expect("a Hello frame is a few dozen bytes");
    [b"tributary session 1", &length.to_le_bytes()[..], hello_frame, exporter].concat()
}

/// The public half of an X25519 secret.
pub fn public_key(secret: &StaticSecret) -> [u8; 32] {
    PublicKey::from(secret).to_bytes()
}

/// A secret that is there for longer than a handshake, with its public half: every message of a handshake begins with
/// it, and computing it takes a third of a key agreement.
#[derive(Clone)]
pub struct StaticKey {
    secret: StaticSecret,
    public: [u8; 32],
}

impl StaticKey {
    /// The public half.
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// The secret itself, to be kept in a file.
    pub fn secret(&self) -> &StaticSecret {
        &self.secret
    }
}

impl From<StaticSecret> for StaticKey {
    fn from(secret: StaticSecret) -> Self {
        let public = public_key(&secret);
        Self { secret, public }
    }
}

impl fmt::Debug for StaticKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StaticKey([redacted])")
    }
}

/// A peer's static key, and what ours agrees on with it: the same in each of their handshakes, so that whoever meets the
/// peer again may keep it. It is worth as much as either secret for these two, and like them wiped when dropped.
pub struct Acquaintance {
    public: [u8; 32],
    agreed: SharedSecret,
}

impl Acquaintance {
    /// What `local` and the holder of this public key agree on.
    pub fn new(local: &StaticKey, public: &[u8; 32]) -> Result<Self, HandshakeError> {
        Ok(Self { public: *public, agreed: agree(&local.secret, public)? })
    }

    /// The peer's public key.
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }
}

impl fmt::Debug for Acquaintance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Acquaintance([redacted])")
    }
}

/// The side that knows the other's key (a worker), between its message and the answer.
pub struct Initiator<'k> {
    symmetric: Symmetric,
    local_static: &'k StaticKey,
    local_ephemeral: StaticSecret,
    remote_static: [u8; 32],
}

impl<'k> Initiator<'k> {
    /// Writes the first message. `ephemeral` must be fresh; the payload is sealed for the holder of the key of `remote`,
    /// which `local_static` is acquainted with, without forward secrecy.
    pub fn start(
        prologue: &[u8],
        local_static: &'k StaticKey,
        ephemeral: StaticSecret,
        remote: &Acquaintance,
        payload: &[u8],
    ) -> Result<(Self, Vec<u8>), HandshakeError> {
        check_longest(payload.len().saturating_add(INITIATOR_OVERHEAD_BYTES))?;
        let mut symmetric = Symmetric::for_ik(prologue, &remote.public);
        let mut message = Vec::with_capacity(INITIATOR_OVERHEAD_BYTES + payload.len());
        symmetric.send_ephemeral(&ephemeral, &mut message);
        symmetric.mix_agreement(&ephemeral, &remote.public)?;
        symmetric.encrypt_and_hash(&local_static.public, &mut message);
        symmetric.mix_key(remote.agreed.as_bytes());
        symmetric.encrypt_and_hash(payload, &mut message);
        let remote_static = remote.public;
        Ok((Self { symmetric, local_static, local_ephemeral: ephemeral, remote_static }, message))
    }

    /// Reads the answer: its payload, and the secrets that both sides now share.
    pub fn finish(mut self, message: &[u8]) -> Result<(Vec<u8>, Established), HandshakeError> {
        check_length(message, RESPONDER_OVERHEAD_BYTES)?;
        let (remote_ephemeral, sealed) = split_key(message)?;
        self.symmetric.mix_hash(remote_ephemeral);
        self.symmetric.mix_agreement(&self.local_ephemeral, remote_ephemeral)?;
        self.symmetric.mix_agreement(&self.local_static.secret, remote_ephemeral)?;
        let payload = self.symmetric.decrypt_and_hash(sealed)?;
        let (sending, receiving, handshake_hash) = self.symmetric.split();
        let remote_static = self.remote_static;
        Ok((payload, Established { handshake_hash, remote_static, sending, receiving }))
    }
}

/// The side whose key is known (the coordinator), between the first message and its answer.
pub struct Responder {
    symmetric: Symmetric,
    remote: Arc<Acquaintance>,
    remote_ephemeral: [u8; 32],
}

impl Responder {
    /// Reads the first message: who sent it ([`Self::remote`]), and its payload. If the one whom it is expected from is an
    /// acquaintance of `local_static`, that saves an agreement; if another sent it, that is found out as ever.
    pub fn read(
        prologue: &[u8],
        local_static: &StaticKey,
        expected: Option<Arc<Acquaintance>>,
        message: &[u8],
    ) -> Result<(Self, Vec<u8>), HandshakeError> {
        check_length(message, INITIATOR_OVERHEAD_BYTES)?;
        let mut symmetric = Symmetric::for_ik(prologue, &local_static.public);
        let (remote_ephemeral, rest) = split_key(message)?;
        symmetric.mix_hash(remote_ephemeral);
        symmetric.mix_agreement(&local_static.secret, remote_ephemeral)?;
        let (sealed_static, sealed_payload) =
            rest.split_at_checked(KEY_BYTES + TAG_BYTES).ok_or(HandshakeError::BadTag)?;
        let remote_static = symmetric.decrypt_and_hash(sealed_static)?;
        let (remote_static, _) = split_key(&remote_static)?;
        let remote = match expected.filter(|expected| expected.public == *remote_static) {
            Some(expected) => expected,
            None => Arc::new(Acquaintance::new(local_static, remote_static)?),
        };
        symmetric.mix_key(remote.agreed.as_bytes());
        let payload = symmetric.decrypt_and_hash(sealed_payload)?;
        Ok((Self { symmetric, remote, remote_ephemeral: *remote_ephemeral }, payload))
    }

    /// The X25519 public key that the initiator proved to hold: look it up before answering.
    pub fn remote_static(&self) -> &[u8; 32] {
        &self.remote.public
    }

    /// The initiator, to be expected another time. Only who was looked up is worth keeping: anybody has a key.
    pub fn remote(&self) -> &Arc<Acquaintance> {
        &self.remote
    }

    /// Writes the answer. `ephemeral` must be fresh.
    pub fn reply(mut self, ephemeral: StaticSecret, payload: &[u8]) -> Result<(Vec<u8>, Established), HandshakeError> {
        check_longest(payload.len().saturating_add(RESPONDER_OVERHEAD_BYTES))?;
        let mut message = Vec::with_capacity(RESPONDER_OVERHEAD_BYTES + payload.len());
        self.symmetric.send_ephemeral(&ephemeral, &mut message);
        self.symmetric.mix_agreement(&ephemeral, &self.remote_ephemeral)?;
        self.symmetric.mix_agreement(&ephemeral, &self.remote.public)?;
        self.symmetric.encrypt_and_hash(payload, &mut message);
        let (receiving, sending, handshake_hash) = self.symmetric.split();
        let remote_static = self.remote.public;
        Ok((message, Established { handshake_hash, remote_static, sending, receiving }))
    }
}

/// What a finished handshake leaves: see [`Session::begin`](super::Session::begin).
#[derive(Debug)]
pub struct Established {
    pub(super) handshake_hash: [u8; 32],
    pub(super) remote_static: [u8; 32],
    pub(super) sending: Secret,
    pub(super) receiving: Secret,
}

impl Established {
    /// The hash of everything that the handshake said: the same on both sides, and on no other session.
    pub fn handshake_hash(&self) -> &[u8; 32] {
        &self.handshake_hash
    }

    /// The X25519 public key that the peer proved to hold.
    pub fn remote_static(&self) -> &[u8; 32] {
        &self.remote_static
    }
}

impl fmt::Debug for Initiator<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Initiator([redacted])")
    }
}

impl fmt::Debug for Responder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Responder([redacted])")
    }
}

/// Why a handshake is over without a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// No room for the keys and tags.
    #[error("handshake message has {got} bytes, at least {least} expected")]
    TooShort {
        /// The message's length.
        got: usize,
        /// The least that this message has.
        least: usize,
    },
    /// Longer than any Noise message.
    #[error("handshake message has {got} bytes, at most {HANDSHAKE_MESSAGE_MAX} allowed")]
    TooLong {
        /// The message's length.
        got: usize,
    },
    /// A public key of low order: the agreed secret would be known to anyone.
    #[error("the peer's X25519 key is of low order, so the agreed secret would be no secret")]
    LowOrderKey,
    /// Changed on the way, or made for another key, another Hello or another TLS connection.
    #[error(
        "handshake message does not authenticate: \
         it was changed, or made for another key, Hello or connection"
    )]
    BadTag,
}

fn check_length(message: &[u8], least: usize) -> Result<(), HandshakeError> {
    let got = message.len();
    if got < least {
        return Err(HandshakeError::TooShort { got, least });
    }
    check_longest(got)
}

fn check_longest(got: usize) -> Result<(), HandshakeError> {
    if got > HANDSHAKE_MESSAGE_MAX {
        return Err(HandshakeError::TooLong { got });
    }
    Ok(())
}

fn split_key(message: &[u8]) -> Result<(&[u8; KEY_BYTES], &[u8]), HandshakeError> {
    let short = HandshakeError::TooShort { got: message.len(), least: KEY_BYTES };
    message.split_first_chunk().ok_or(short)
}

/// X25519, refusing a result that the peer did not contribute to.
fn agree(secret: &StaticSecret, public: &[u8; 32]) -> Result<SharedSecret, HandshakeError> {
    let shared = secret.diffie_hellman(&PublicKey::from(*public));
    if !shared.was_contributory() {
        return Err(HandshakeError::LowOrderKey);
    }
    Ok(shared)
}

/// §5.2, SymmetricState: chaining key, transcript hash, and the cipher of the moment.
struct Symmetric {
    chaining_key: Secret,
    hash: [u8; 32],
    cipher: Cipher,
}

/// §5.1, CipherState.
enum Cipher {
    /// No key agreed yet: what is "encrypted" travels as it is. IK never comes to that.
    Plain,
    Keyed {
        key: AeadKey,
        nonce: u64,
    },
}

impl Symmetric {
    /// IK's start: protocol name, prologue, and the pre-message `<- s`.
    fn for_ik(prologue: &[u8], responder_static: &[u8; 32]) -> Self {
        let mut name = [0; 32];
        name[..PROTOCOL_NAME.len()].copy_from_slice(PROTOCOL_NAME); // shorter than a hash: padded
        let mut symmetric = Self::new(name);
        symmetric.mix_hash(prologue);
        symmetric.mix_hash(responder_static);
        symmetric
    }

    fn new(name: [u8; 32]) -> Self {
        Self { chaining_key: Secret::from(name), hash: name, cipher: Cipher::Plain }
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.hash = Sha256::new().chain_update(self.hash).chain_update(data).finalize().into();
    }

    fn mix_key(&mut self, input: &[u8]) {
        let (chaining_key, key) = self.chaining_key.ratchet(input);
        self.chaining_key = chaining_key;
        self.cipher = Cipher::Keyed { key: AeadKey::new(key.bytes()), nonce: 0 };
    }

    /// The tokens `ee`, `es`, `se`, `ss`.
    fn mix_agreement(&mut self, secret: &StaticSecret, public: &[u8; 32]) -> Result<(), HandshakeError> {
        self.mix_key(agree(secret, public)?.as_bytes());
        Ok(())
    }

    /// The token `e`, outgoing.
    fn send_ephemeral(&mut self, ephemeral: &StaticSecret, message: &mut Vec<u8>) {
        let public = public_key(ephemeral);
        self.mix_hash(&public);
        message.extend_from_slice(&public);
    }

    fn encrypt_and_hash(&mut self, plaintext: &[u8], message: &mut Vec<u8>) {
        let start = message.len();
        message.extend_from_slice(plaintext);
        if let Cipher::Keyed { key, nonce } = &mut self.cipher {
            let tag = key.seal(aead::nonce(*nonce), &self.hash, &mut message[start..]);
            message.extend_from_slice(&tag);
            *nonce += 1;
        }
        self.mix_hash(&message[start..]);
    }

    fn decrypt_and_hash(&mut self, sealed: &[u8]) -> Result<Vec<u8>, HandshakeError> {
        let mut text = sealed.to_vec();
        if let Cipher::Keyed { key, nonce } = &mut self.cipher {
            let (ciphertext, tag) = sealed.split_last_chunk().ok_or(HandshakeError::BadTag)?;
            text.truncate(ciphertext.len());
            key.open(aead::nonce(*nonce), &self.hash, text.as_mut_slice(), tag).map_err(|_| HandshakeError::BadTag)?;
            *nonce += 1;
        }
        self.mix_hash(sealed);
        Ok(text)
    }

    /// The initiator's sending secret, the responder's, and the hash of the whole handshake.
    fn split(self) -> (Secret, Secret, [u8; 32]) {
        let (initiator, responder) = self.chaining_key.ratchet(&[]);
        (initiator, responder, self.hash)
    }
}

#[cfg(test)]
mod tests;
