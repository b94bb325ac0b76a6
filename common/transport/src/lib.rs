//! QUIC endpoints, TLS and frames: bytes, not their meaning.
//!
//! A [`Server`] listens with two ALPNs on one UDP port: [`Alpn::Main`] for workers, who prove who they
//! are with a certificate, and [`Alpn::Join`] for enrolment, where nobody has one yet. A [`Client`]
//! connects to it, trusting either a CA certificate or only its hash. Both hand out a [`Connection`],
//! whose streams carry [`Frame`]s before the secure session stands and sealed records after it.
//!
//! No other crate sees quinn or rustls. Every limit that a peer could push against is named in
//! [`limits`]. [`Tap`]s let tests read what travels, at the UDP socket and before TLS; only library
//! code can set them, no flag and no environment variable does.

mod client;
mod close;
mod connection;
mod frame;
mod leisure;
pub mod limits;
mod path;
mod server;
mod socket;
mod stream;
mod tls;
mod udp;

pub use client::{Client, ClientOptions, ConnectError, ConnectFailure, Connected, Credentials, Target, Trust};
pub use close::{CloseCode, Ended};
pub use connection::{Connection, LinkStats};
pub use frame::{Frame, FrameError, FrameKind};
pub use rustls::pki_types::{CertificateDer, PrivateKeyDer};
pub use server::{Accepted, Handshake, HandshakeError, ResetKeys, Server, ServerCounts, ServerOptions};
pub use socket::{Direction, Tap, Taps, Traffic, TrafficTotals};
pub use stream::{RecordError, RecvStream, SendStream, StreamError};
pub use tls::{Alpn, EXPORTER_LABEL, SetupError, TlsIdentity};
