//! A connection: its streams, its end, its figures.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::HandshakeData;
use rustls::pki_types::CertificateDer;

use crate::close::{CloseCode, Ended};
use crate::limits::REASON_BYTES_MAX;
use crate::socket::{Seat, Tap};
use crate::stream::{RecvStream, SendStream};
use crate::tls::{Alpn, EXPORTER_LABEL};

/// One QUIC connection. Clones are the same one; when the last clone and stream are dropped, it closes.
#[derive(Debug, Clone)]
pub struct Connection {
    inner: quinn::Connection,
    tap: Option<Tap>,
    /// Held as long as the connection is.
    _seat: Option<Arc<Seat>>,
}

impl Connection {
    pub(crate) fn new(inner: quinn::Connection, tap: Option<Tap>, seat: Option<Seat>) -> Self {
        Self { inner, tap, _seat: seat.map(Arc::new) }
    }

    /// Opens the control stream. The peer learns of it with the first bytes written.
    pub async fn open_control(&self) -> Result<(SendStream, RecvStream), Ended> {
        Ok(self.control(self.inner.open_bi().await?))
    }

    /// Waits for the peer's control stream.
    pub async fn accept_control(&self) -> Result<(SendStream, RecvStream), Ended> {
        Ok(self.control(self.inner.accept_bi().await?))
    }

    /// Opens a stream in one direction, waiting while the peer has as many as it allows.
    pub async fn open_uni(&self) -> Result<SendStream, Ended> {
        Ok(SendStream::new(self.inner.open_uni().await?, self.tap.clone()))
    }

    /// Waits for the next stream that the peer opens in one direction.
    pub async fn accept_uni(&self) -> Result<RecvStream, Ended> {
        Ok(RecvStream::new(self.inner.accept_uni().await?, self.tap.clone()))
    }

    /// From now on so many bytes may be sent and not acknowledged, on all streams together.
    pub fn send_within(&self, window_bytes: u64) {
        self.inner.set_send_window(window_bytes);
    }

    /// Closes the connection at once; what was not yet delivered is lost. A reason longer than
    /// [`REASON_BYTES_MAX`] is cut.
    pub fn close(&self, code: CloseCode, reason: &str) {
        let cut = reason.floor_char_boundary(REASON_BYTES_MAX);
        self.inner.close(code.varint(), &reason.as_bytes()[..cut]);
    }

    /// Waits until the connection is over.
    pub async fn closed(&self) -> Ended {
        self.inner.closed().await.into()
    }

    /// How the connection ended, if it has.
    pub fn ended(&self) -> Option<Ended> {
        self.inner.close_reason().map(Into::into)
    }

    /// Where the peer is now; it may move.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// The connection's figures; also after its end.
    pub fn stats(&self) -> LinkStats {
        let stats = self.inner.stats();
        LinkStats {
            rtt: stats.path.rtt,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            sent_bytes: stats.udp_tx.bytes,
            sent_datagrams: stats.udp_tx.datagrams,
            received_bytes: stats.udp_rx.bytes,
            received_datagrams: stats.udp_rx.datagrams,
        }
    }

    /// 32 bytes that only the two ends of this TLS connection know.
    pub(crate) fn exporter(&self) -> Option<[u8; 32]> {
        let mut secret = [0; 32];
        self.inner.export_keying_material(&mut secret, EXPORTER_LABEL, b"").ok()?;
        Some(secret)
    }

    /// The ALPN that TLS agreed on.
    pub(crate) fn alpn(&self) -> Option<Alpn> {
        let data = self.inner.handshake_data()?.downcast::<HandshakeData>().ok()?;
        Alpn::from_name(&data.protocol?)
    }

    /// The certificate that the peer proved, verified by TLS.
    pub(crate) fn peer_certificate(&self) -> Option<CertificateDer<'static>> {
        let chain = self.inner.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        chain.into_iter().next()
    }

    /// Control messages overtake bulk data that waits to be sent.
    fn control(&self, (send, receive): (quinn::SendStream, quinn::RecvStream)) -> (SendStream, RecvStream) {
        // It fails only for a stream that is over already, which the first write will say.
        let _ = send.set_priority(1);
        (SendStream::new(send, self.tap.clone()), RecvStream::new(receive, self.tap.clone()))
    }
}

/// The figures of one connection since its handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkStats {
    /// The present estimate of a round trip.
    pub rtt: Duration,
    /// QUIC packets out.
    pub sent_packets: u64,
    /// QUIC packets held to be lost.
    pub lost_packets: u64,
    /// UDP payload bytes out.
    pub sent_bytes: u64,
    /// UDP datagrams out.
    pub sent_datagrams: u64,
    /// UDP payload bytes in.
    pub received_bytes: u64,
    /// UDP datagrams in.
    pub received_datagrams: u64,
}
