//! Private keys: made from the operating system's entropy, kept as PKCS#8 in files of mode 0600.
//!
//! Two kinds, because they are used differently: [`IdentityKey`] (Ed25519) signs certificates, TLS
//! handshakes and manifests; [`SessionKey`] (X25519) is the static key of the sealed session. Both wipe
//! themselves when dropped and print as `[redacted]`. A file is written aside, synced, renamed, and its
//! directory synced, so that a crash leaves either no key or a whole one.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::signature::Ed25519KeyPair;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, EncodePrivateKey as _};
use protocol::session::{StaticKey, StaticSecret, sign};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

use crate::identity::worker_id;

/// The longest key or certificate file that is read, in bytes.
pub const FILE_BYTES_MAX: u64 = 8 * 1024;

/// The DER that stands before the 32 bytes of an X25519 private key (RFC 8410 section 7): version 0,
/// algorithm 1.3.101.110, an octet string in an octet string.
const X25519_PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x04, 0x22, 0x04, 0x20];

/// A private key that can be made, and kept as PKCS#8.
pub trait PrivateKey: Sized {
    /// A fresh key from the operating system's entropy.
    fn generate() -> Result<Self, KeyError>;
    /// Reads PKCS#8 DER.
    fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError>;
    /// Writes PKCS#8 DER, into memory that wipes itself.
    fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, KeyError>;
}

/// An Ed25519 key pair: the certificate's key, and the signature under every manifest.
#[derive(Clone)]
pub struct IdentityKey {
    key: SigningKey,
    /// The same key for aws-lc, which signs in half the time. It wipes what it frees.
    fast: Option<Arc<Ed25519KeyPair>>,
}

impl IdentityKey {
    /// A fresh key from the operating system's entropy.
    pub fn generate() -> Result<Self, KeyError> {
        let seed = random_bytes()?;
        Ok(SigningKey::from_bytes(&seed).into())
    }

    /// The public half.
    pub fn public(&self) -> [u8; 32] {
        self.key.verifying_key().to_bytes()
    }

    /// Signs `context ‖ bytes`. An Ed25519 signature is determined by key and message (RFC 8032), so it makes no
    /// difference who makes it.
    pub fn sign(&self, context: &'static [u8], bytes: &[u8]) -> [u8; 64] {
        let fast = self.fast.as_ref().and_then(|fast| fast.try_sign(&[context, bytes].concat()).ok());
        let signature = fast.and_then(|signature| signature.as_ref().try_into().ok());
        signature.unwrap_or_else(|| sign::sign(context, &self.key, bytes))
    }

    /// The worker id that belongs to this key.
    pub fn id(&self) -> [u8; 16] {
        worker_id(&self.public())
    }

    /// The key itself, for signing.
    pub fn signing_key(&self) -> &SigningKey {
        &self.key
    }

    /// The key in the form in which rustls takes it.
    pub fn tls_key(&self) -> Result<PrivateKeyDer<'static>, KeyError> {
        let der = self.to_pkcs8()?;
        Ok(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der.to_vec())))
    }
}

impl From<SigningKey> for IdentityKey {
    fn from(key: SigningKey) -> Self {
        let fast = Ed25519KeyPair::from_seed_and_public_key(key.as_bytes(), key.verifying_key().as_bytes()).ok();
        Self { key, fast: fast.map(Arc::new) }
    }
}

impl PrivateKey for IdentityKey {
    fn generate() -> Result<Self, KeyError> {
        Self::generate()
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        let key = SigningKey::from_pkcs8_der(der).map_err(|_| KeyError::NotPkcs8("Ed25519"))?;
        Ok(key.into())
    }

    fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let document = self.key.to_pkcs8_der().map_err(|_| KeyError::NotPkcs8("Ed25519"))?;
        Ok(document.to_bytes())
    }
}

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdentityKey([redacted])")
    }
}

/// An X25519 key pair: the static key of the sealed session.
#[derive(Clone)]
pub struct SessionKey(StaticKey);

impl SessionKey {
    /// A fresh key from the operating system's entropy.
    pub fn generate() -> Result<Self, KeyError> {
        let bytes = random_bytes()?;
        Ok(Self(StaticSecret::from(*bytes).into()))
    }

    /// The public half.
    pub fn public(&self) -> [u8; 32] {
        *self.0.public()
    }

    /// The key itself, for the session's handshake.
    pub fn session_key(&self) -> &StaticKey {
        &self.0
    }
}

impl PrivateKey for SessionKey {
    fn generate() -> Result<Self, KeyError> {
        Self::generate()
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        let bytes = der
            .strip_prefix(&X25519_PKCS8_PREFIX)
            .and_then(|key| <[u8; 32]>::try_from(key).ok())
            .map(Zeroizing::new)
            .ok_or(KeyError::NotPkcs8("X25519"))?;
        Ok(Self(StaticSecret::from(*bytes).into()))
    }

    fn to_pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        let mut der = Zeroizing::new(Vec::with_capacity(X25519_PKCS8_PREFIX.len() + 32));
        der.extend_from_slice(&X25519_PKCS8_PREFIX);
        der.extend_from_slice(self.0.secret().as_bytes());
        Ok(der)
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey([redacted])")
    }
}

/// Reads the key in `path`, or makes one and keeps it there.
pub fn load_or_create<K: PrivateKey>(path: &Path) -> Result<K, KeyFileError> {
    match read_private(path)? {
        Some(der) => parse(path, &der),
        None => {
            let key = K::generate().map_err(|source| key_error(path, source))?;
            save(path, &key)?;
            Ok(key)
        }
    }
}

/// Reads the key in `path`, which must be there and readable by its owner only.
pub fn load<K: PrivateKey>(path: &Path) -> Result<K, KeyFileError> {
    match read_private(path)? {
        Some(der) => parse(path, &der),
        None => Err(KeyFileError::Missing(path.to_owned())),
    }
}

/// Keeps the key in `path`, mode 0600; it is durable when this returns.
pub fn save<K: PrivateKey>(path: &Path, key: &K) -> Result<(), KeyFileError> {
    let der = key.to_pkcs8().map_err(|source| key_error(path, source))?;
    write_private(path, &der)
}

/// Reads the `N` secret bytes in `path`, or draws them and keeps them there: for secrets that are not
/// key pairs, such as the keys of stateless resets.
pub fn load_or_create_secret<const N: usize>(path: &Path) -> Result<Zeroizing<[u8; N]>, KeyFileError> {
    let Some(kept) = read_private(path)? else {
        let secret = random_bytes().map_err(|source| key_error(path, source))?;
        write_private(path, secret.as_ref())?;
        return Ok(secret);
    };
    let got = kept.len();
    let secret =
        <[u8; N]>::try_from(&kept[..]).map_err(|_| key_error(path, KeyError::WrongLength { got, expected: N }))?;
    Ok(Zeroizing::new(secret))
}

/// Why a key could not be made, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The operating system gave no entropy.
    #[error("operating system gave no entropy: {0}")]
    Entropy(#[from] getrandom::Error),
    /// The bytes are not a PKCS#8 key of the named kind.
    #[error("not a PKCS#8 {0} private key in DER")]
    NotPkcs8(&'static str),
    /// The bytes are not a secret of the expected length.
    #[error("secret has {got} bytes, expected {expected}")]
    WrongLength {
        /// The length found.
        got: usize,
        /// The length of such a secret.
        expected: usize,
    },
}

/// Why a key file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// There is no such file.
    #[error("{}: no such key file: restore it from a backup of the whole state directory", .0.display())]
    Missing(PathBuf),
    /// Others than the owner may read it.
    #[error("{}: private key has mode {mode:04o}, expected 0600: chmod 600 {}", path.display(), path.display())]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is a directory, a device or the like.
    #[error("{}: not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// It is longer than any key or certificate.
    #[error("{}: longer than {FILE_BYTES_MAX} bytes, so no key or certificate", .0.display())]
    TooLong(PathBuf),
    /// Its content is not such a key.
    #[error("{}: {source}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with its content.
        source: KeyError,
    },
    /// The operating system refused.
    #[error("{}: cannot {verb}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        verb: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// Random bytes in memory that wipes itself.
pub(crate) fn random_bytes<const N: usize>() -> Result<Zeroizing<[u8; N]>, KeyError> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(bytes.as_mut())?;
    Ok(bytes)
}

/// The whole of a small file of any mode, such as a certificate; `None` if there is none.
pub fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>, KeyFileError> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    read_open(path, &file).map(|bytes| Some(bytes.to_vec()))
}

/// Writes a small file of mode 0600 aside, syncs it, renames it into its place, and syncs the
/// directory: it is durable when this returns, and never half there.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), KeyFileError> {
    let io = |verb| move |source| KeyFileError::Io { path: path.to_owned(), verb, source };
    let mut aside = path.as_os_str().to_owned();
    aside.push(".aside");
    let aside = PathBuf::from(aside);
    // What a crash left behind may have any mode: it is made anew, never reused.
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("replace")(error)),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&aside).map_err(io("create"))?;
    file.write_all(bytes).map_err(io("write"))?;
    file.sync_all().map_err(io("sync"))?;
    fs::rename(&aside, path).map_err(io("rename"))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory).map_err(io("open the directory of"))?;
    directory.sync_all().map_err(io("sync the directory of"))
}

fn read_private(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, KeyFileError> {
    let Some(file) = open(path)? else {
        return Ok(None);
    };
    let mode = metadata(path, &file)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::TooOpen { path: path.to_owned(), mode });
    }
    read_open(path, &file).map(Some)
}

fn open(path: &Path) -> Result<Option<File>, KeyFileError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(KeyFileError::Io { path: path.to_owned(), verb: "open", source }),
    }
}

fn metadata(path: &Path, file: &File) -> Result<fs::Metadata, KeyFileError> {
    let metadata =
        file.metadata().map_err(|source| KeyFileError::Io { path: path.to_owned(), verb: "inspect", source })?;
    if !metadata.is_file() {
        return Err(KeyFileError::NotAFile(path.to_owned()));
    }
    Ok(metadata)
}

fn read_open(path: &Path, file: &File) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let length = metadata(path, file)?.len();
    if length > FILE_BYTES_MAX {
        return Err(KeyFileError::TooLong(path.to_owned()));
    }
    // Room for all of it at once: a buffer that grows leaves copies behind that nobody wipes.
    let capacity = usize::try_from(FILE_BYTES_MAX).unwrap_or(usize::MAX);
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(|source| KeyFileError::Io {
        path: path.to_owned(),
        verb: "read",
        source,
    })?;
    Ok(bytes)
}

fn parse<K: PrivateKey>(path: &Path, der: &[u8]) -> Result<K, KeyFileError> {
    K::from_pkcs8(der).map_err(|source| key_error(path, source))
}

fn key_error(path: &Path, source: KeyError) -> KeyFileError {
    KeyFileError::Key { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// `openssl genpkey -algorithm X25519 -outform DER`, and its `-pubout`.
    const X25519_OPENSSL: (&str, &str) = (
        "302e020100300506032b656e04220420686b9b6d8fa03ffea73bedad7c1af67faefa317974a8655b12defd5617747253",
        "ab259fba8964accdbb2f23323fa2fc3abeda799e26c81852f0564eae42076b18",
    );
    /// RFC 8410 section 10.3, without and with its public key (section 10.1).
    const ED25519_RFC8410: (&str, &str) = (
        "302e020100300506032b657004220420d4ee72dbf913584ad5b6d8f1f769f8ad3afe7c28cbf1d4fbe097a88f44755842",
        "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1",
    );

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn both_kinds_survive_pkcs8_and_back() {
        let identity = IdentityKey::generate().unwrap();
        let back = IdentityKey::from_pkcs8(&identity.to_pkcs8().unwrap()).unwrap();
        assert_eq!(back.signing_key().to_bytes(), identity.signing_key().to_bytes());
        let session = SessionKey::generate().unwrap();
        let back = SessionKey::from_pkcs8(&session.to_pkcs8().unwrap()).unwrap();
        assert_eq!(back.public(), session.public());
    }

    #[test]
    fn whoever_signs_with_a_key_makes_the_same_signature() {
        for seed in 0..32 {
            let key = SigningKey::from_bytes(&[seed; 32]);
            let identity = IdentityKey::from(key.clone());
            assert!(identity.fast.is_some());
            let slow = IdentityKey { fast: None, ..identity.clone() };
            for context in [sign::MANIFEST_CONTEXT, sign::RECEIPT_CONTEXT] {
                let bytes = vec![seed; usize::from(seed) * 20];
                let signature = identity.sign(context, &bytes);
                assert_eq!(signature, sign::sign(context, &key, &bytes));
                assert_eq!(signature, slow.sign(context, &bytes));
                assert_eq!(sign::verify(context, &identity.public(), &bytes, &signature), Ok(()));
            }
        }
    }

    #[test]
    fn keys_that_others_wrote_are_read() {
        let identity = IdentityKey::from_pkcs8(&unhex(ED25519_RFC8410.0)).unwrap();
        assert_eq!(identity.public().to_vec(), unhex(ED25519_RFC8410.1));
        let session = SessionKey::from_pkcs8(&unhex(X25519_OPENSSL.0)).unwrap();
        assert_eq!(session.public().to_vec(), unhex(X25519_OPENSSL.1));
        assert_eq!(session.to_pkcs8().unwrap().to_vec(), unhex(X25519_OPENSSL.0));
    }

    #[test]
    fn one_kind_is_not_read_as_the_other() {
        let identity = IdentityKey::generate().unwrap().to_pkcs8().unwrap();
        let session = SessionKey::generate().unwrap().to_pkcs8().unwrap();
        assert!(matches!(SessionKey::from_pkcs8(&identity), Err(KeyError::NotPkcs8("X25519"))));
        assert!(matches!(IdentityKey::from_pkcs8(&session), Err(KeyError::NotPkcs8("Ed25519"))));
    }

    #[test]
    fn truncated_or_lengthened_keys_are_refused() {
        let mut session = SessionKey::generate().unwrap().to_pkcs8().unwrap().to_vec();
        session.push(0);
        for der in [&session[..], &session[..47], &session[..16], &[]] {
            assert!(SessionKey::from_pkcs8(der).is_err());
        }
    }

    #[test]
    fn a_key_file_is_private_and_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity.key");
        let made: IdentityKey = load_or_create(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600);
        let read: IdentityKey = load_or_create(&path).unwrap();
        assert_eq!(read.public(), made.public());
        let names: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing is left aside: {names:?}");
    }

    #[test]
    fn a_key_file_that_others_can_read_is_refused_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("session.key");
        load_or_create::<SessionKey>(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = load_or_create::<SessionKey>(&path).unwrap_err();
        assert!(matches!(refused, KeyFileError::TooOpen { mode: 0o640, .. }));
        let remedy = format!("chmod 600 {}", path.display());
        assert!(refused.to_string().ends_with(&remedy), "{refused}");
    }

    #[test]
    fn a_key_file_that_is_none_is_refused_by_name_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("session.key");
        write_private(&path, b"not a key").unwrap();
        let refused = load_or_create::<SessionKey>(&path).unwrap_err();
        assert!(matches!(refused, KeyFileError::Key { .. }));
        assert_eq!(fs::read(&path).unwrap(), b"not a key");
        write_private(&path, &[0; 8 * 1024 + 1]).unwrap();
        assert!(matches!(load::<SessionKey>(&path), Err(KeyFileError::TooLong(_))));
        let missing = load::<SessionKey>(&directory.path().join("nowhere.key"));
        assert!(matches!(missing, Err(KeyFileError::Missing(_))));
    }

    #[test]
    fn a_secret_is_drawn_once_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("reset.key");
        let drawn = load_or_create_secret::<40>(&path).unwrap();
        assert_ne!(*drawn, [0; 40]);
        assert_eq!(*load_or_create_secret::<40>(&path).unwrap(), *drawn);
        let refused = load_or_create_secret::<16>(&path).unwrap_err();
        assert!(refused.to_string().ends_with("secret has 40 bytes, expected 16"), "{refused}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).unwrap();
        let refused = load_or_create_secret::<40>(&path);
        assert!(matches!(refused, Err(KeyFileError::TooOpen { mode: 0o604, .. })));
    }

    #[test]
    fn what_a_crash_left_aside_is_not_reused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity.key");
        let aside = directory.path().join("identity.key.aside");
        fs::write(&aside, b"half a key").unwrap();
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o666)).unwrap();
        load_or_create::<IdentityKey>(&path).unwrap();
        assert!(load::<IdentityKey>(&path).is_ok());
        assert!(!aside.exists());
    }

    #[test]
    fn keys_print_as_redacted() {
        let identity = IdentityKey::generate().unwrap();
        let session = SessionKey::generate().unwrap();
        assert_eq!(format!("{identity:?}"), "IdentityKey([redacted])");
        assert_eq!(format!("{session:?}"), "SessionKey([redacted])");
    }
}
