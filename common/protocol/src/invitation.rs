//! The invitation: one line of text that lets a worker find a coordinator, know it, and be enrolled by it.
//!
//! ```text
//! trib1.  base64url(  u16 LE length ‖ postcard(Invitation) ‖ first 4 bytes of BLAKE3 of all before  )
//! ```
//!
//! The length tells a text that was cut short from one that was mistyped, so that each gets its own sentence. The
//! checksum is against accidents; against forgery stands what the text pins: the hash of the certificate authority
//! and the coordinator's X25519 key. The token is a secret: an [`Invitation`] prints without it.

use core::fmt;
use core::net::SocketAddr;
use core::str::FromStr;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};

/// What every invitation of this version starts with.
pub const INVITATION_PREFIX: &str = "trib1.";

/// The most addresses that an invitation names.
pub const INVITATION_ADDRESSES_MAX: usize = 4;

/// The longest address, in bytes: a DNS name (RFC 1035 section 2.3.4) and a port.
pub const INVITATION_ADDRESS_LEN_MAX: usize = 253 + 6;

/// The longest text of an invitation, in bytes.
pub const INVITATION_LEN_MAX: usize = 2048;

const LENGTH_BYTES: usize = 2;
const CHECKSUM_BYTES: usize = 4;

// Four of the longest addresses and 128 bytes of keys and figures fit, at four characters for three bytes.
const _: () = assert!((INVITATION_ADDRESSES_MAX * (INVITATION_ADDRESS_LEN_MAX + 2) + 128) * 4 / 3 < INVITATION_LEN_MAX);

/// Where a coordinator is, what it is known by, and what lets a worker in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// Where it listens: 1 to [`INVITATION_ADDRESSES_MAX`] times `host:port`, to be tried in this order.
    pub addresses: Vec<String>,
    /// SHA-256 of its certificate authority's certificate, DER.
    pub ca_sha256: [u8; 32],
    /// Its X25519 public key.
    pub coordinator_x25519: [u8; 32],
    /// What it knows the invitation by.
    pub token: [u8; 16],
    /// How many workers may be enrolled with it; 0 for as many as come.
    pub uses: u32,
    /// Until when, in seconds since 1970; without it, as long as the coordinator's state lives.
    pub expires_unix_s: Option<u64>,
    /// Whether only workers on the coordinator's own machine may use it.
    pub loopback_only: bool,
}

impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invitation")
            .field("addresses", &self.addresses)
            .field("token", &"[redacted]")
            .field("uses", &self.uses)
            .field("expires_unix_s", &self.expires_unix_s)
            .field("loopback_only", &self.loopback_only)
            .finish_non_exhaustive()
    }
}

/// The text of the invitation, token and all.
impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = postcard::to_allocvec(self).map_err(|_| fmt::Error)?;
        let length = u16::try_from(body.len()).map_err(|_| fmt::Error)?;
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        let checksum = checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        write!(f, "{INVITATION_PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }
}

impl FromStr for Invitation {
    type Err = InvitationError;

    /// Space around the text is not looked at, so that a file's last line break does no harm.
    fn from_str(text: &str) -> Result<Self, InvitationError> {
        let text = text.trim();
        if text.len() > INVITATION_LEN_MAX {
            return Err(InvitationError::TooLong { got: text.len() });
        }
        let bytes = decode(strip_prefix(text)?)?;
        let invitation: Self = crate::messages::decode(body(&bytes)?).map_err(|_| InvitationError::Mangled)?;
        check_addresses(&invitation.addresses)?;
        Ok(invitation)
    }
}

/// Why a text is not an invitation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvitationError {
    /// There is no text.
    #[error("the invitation is empty, expected a text that starts with {INVITATION_PREFIX:?}; for a file write @FILE")]
    Empty,
    /// It starts with something else.
    #[error("the invitation starts with {got:?}, expected {INVITATION_PREFIX:?}; for a file write @FILE")]
    WrongPrefix {
        /// Its first characters.
        got: String,
    },
    /// It is of a version that this build does not know.
    #[error("the invitation is of version {got}, this program knows version 1; update it")]
    UnknownVersion {
        /// The version.
        got: String,
    },
    /// A character that base64url does not have.
    #[error("the invitation has {got:?} as character {at}, where none may stand; copy it again, whole and in one line")]
    BadCharacter {
        /// The character.
        got: char,
        /// Its place, from 1.
        at: usize,
    },
    /// Its end is missing.
    #[error("the invitation is cut short; copy it again, whole and in one line")]
    CutShort,
    /// Something in it was changed, or follows it.
    #[error("the invitation's checksum does not fit, so some character was changed or added; copy it again")]
    Mangled,
    /// It is longer than any invitation.
    #[error("the invitation has {got} characters, the most is {INVITATION_LEN_MAX}; copy it again, alone")]
    TooLong {
        /// How many.
        got: usize,
    },
    /// It names no address, or too many.
    #[error("the invitation names {got} addresses, expected 1 to {INVITATION_ADDRESSES_MAX}")]
    Addresses {
        /// How many.
        got: usize,
    },
    /// What it names is not an address.
    #[error("address {got:?} is not HOST:PORT, such as 192.0.2.7:4433 or fleet.example.org:4433")]
    Address {
        /// What stands there.
        got: String,
    },
}

/// Refuses what is not a list of 1 to [`INVITATION_ADDRESSES_MAX`] times `host:port`.
///
/// # Errors
/// Their number, or the first that is no address.
pub fn check_addresses(addresses: &[String]) -> Result<(), InvitationError> {
    if !(1..=INVITATION_ADDRESSES_MAX).contains(&addresses.len()) {
        return Err(InvitationError::Addresses { got: addresses.len() });
    }
    match addresses.iter().find(|address| !is_address(address)) {
        Some(address) => Err(InvitationError::Address { got: address.clone() }),
        None => Ok(()),
    }
}

/// `host:port`: a literal address, or a DNS name of letters, digits, `-`, `_` and `.`; the port is not 0.
fn is_address(text: &str) -> bool {
    if text.len() > INVITATION_ADDRESS_LEN_MAX {
        return false;
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return address.port() != 0;
    }
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let named = !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    named && port.parse::<u16>().is_ok_and(|port| port != 0)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let [a, b, c, d, ..] = *blake3::hash(bytes).as_bytes();
    [a, b, c, d]
}

fn strip_prefix(text: &str) -> Result<&str, InvitationError> {
    if text.is_empty() {
        return Err(InvitationError::Empty);
    }
    if let Some(rest) = text.strip_prefix(INVITATION_PREFIX) {
        return Ok(rest);
    }
    if INVITATION_PREFIX.starts_with(text) {
        return Err(InvitationError::CutShort);
    }
    let version = text.strip_prefix("trib").and_then(|rest| rest.split_once('.')).map(|(version, _)| version);
    match version.filter(|v| !v.is_empty() && v.len() < 8 && v.bytes().all(|b| b.is_ascii_digit())) {
        Some(version) => Err(InvitationError::UnknownVersion { got: version.to_owned() }),
        None => Err(InvitationError::WrongPrefix { got: text.chars().take(INVITATION_PREFIX.len()).collect() }),
    }
}

fn decode(text: &str) -> Result<Vec<u8>, InvitationError> {
    let mut characters = text.chars().zip(INVITATION_PREFIX.len() + 1..);
    if let Some((got, at)) = characters.find(|(c, _)| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))) {
        return Err(InvitationError::BadCharacter { got, at });
    }
    // Four characters are three bytes: one that is left over, or half a byte, is what a cut leaves.
    BASE64URL_NOPAD.decode(text.as_bytes()).map_err(|_| InvitationError::CutShort)
}

/// What stands between the length and the checksum, if both fit.
fn body(bytes: &[u8]) -> Result<&[u8], InvitationError> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or(InvitationError::CutShort)?;
    let length = usize::from(u16::from_le_bytes(*length));
    let whole = length + CHECKSUM_BYTES;
    if rest.len() < whole && length <= INVITATION_LEN_MAX {
        return Err(InvitationError::CutShort);
    }
    if rest.len() != whole {
        return Err(InvitationError::Mangled);
    }
    let (content, sum) = bytes.split_at(LENGTH_BYTES + length);
    if sum == checksum(content) { Ok(&content[LENGTH_BYTES..]) } else { Err(InvitationError::Mangled) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn invitation() -> Invitation {
        Invitation {
            addresses: vec!["192.0.2.7:4433".into(), "fleet.example.org:4433".into(), "[2001:db8::1]:4433".into()],
            ca_sha256: [1; 32],
            coordinator_x25519: [2; 32],
            token: [3; 16],
            uses: 1,
            expires_unix_s: Some(1_900_000_000),
            loopback_only: false,
        }
    }

    fn refused(text: &str) -> InvitationError {
        text.parse::<Invitation>().unwrap_err()
    }

    #[test]
    fn an_invitation_survives_its_text() {
        let text = invitation().to_string();
        assert!(text.starts_with("trib1."), "{text}");
        assert_eq!(text.parse::<Invitation>().unwrap(), invitation());
        assert_eq!(format!("  {text}\r\n").parse::<Invitation>().unwrap(), invitation());
    }

    #[test]
    fn every_cut_is_called_a_cut() {
        let text = invitation().to_string();
        for end in 1..text.len() {
            assert_eq!(refused(&text[..end]), InvitationError::CutShort, "cut at {end}");
        }
    }

    #[test]
    fn every_changed_character_is_noticed() {
        let text = invitation().to_string();
        for at in INVITATION_PREFIX.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert!(String::from_utf8(changed).unwrap().parse::<Invitation>().is_err(), "changed at {at}");
        }
        assert_eq!(refused(&format!("{text}AAAA")), InvitationError::Mangled);
    }

    #[test]
    fn each_way_of_being_wrong_has_its_own_sentence() {
        let text = invitation().to_string();
        assert_eq!(refused(" \n"), InvitationError::Empty);
        assert_eq!(refused("hello, world"), InvitationError::WrongPrefix { got: "hello,".into() });
        assert_eq!(refused(&text.replacen("trib1", "trib2", 1)), InvitationError::UnknownVersion { got: "2".into() });
        let broken = format!("{} {}", &text[..20], &text[20..]);
        assert_eq!(refused(&broken), InvitationError::BadCharacter { got: ' ', at: 21 });
        assert_eq!(refused("trib1.é"), InvitationError::BadCharacter { got: 'é', at: 7 });
        assert_eq!(refused(&"x".repeat(5000)), InvitationError::TooLong { got: 5000 });
    }

    #[test]
    fn addresses_are_checked_and_counted() {
        let with = |addresses: &[&str]| {
            let addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
            Invitation { addresses, ..invitation() }.to_string().parse::<Invitation>()
        };
        assert!(with(&["127.0.0.1:1"]).is_ok());
        assert_eq!(with(&[]), Err(InvitationError::Addresses { got: 0 }));
        assert_eq!(with(&["a:1"; 5]), Err(InvitationError::Addresses { got: 5 }));
        for bad in ["", "host", "host:", "host:0", "127.0.0.1:0", ":4433", "ho st:1", "host:70000", "::1:x"] {
            assert_eq!(with(&[bad]), Err(InvitationError::Address { got: bad.into() }), "{bad:?}");
        }
        let longest = format!("{}:65535", "h".repeat(253));
        assert!(with(&[longest.as_str(); 4]).is_ok());
        assert!(with(&[&format!("{}:65535", "h".repeat(254))]).is_err());
    }

    #[test]
    fn the_token_is_not_printed() {
        assert!(!format!("{:?}", invitation()).contains("3, 3"));
    }
}
