//! The UDP socket, with a meter and, for tests, a tap.
//!
//! quinn's own statistics live in connections: they miss failed handshakes, refused attempts and
//! garbage. What an operator pays for is what passes this socket, so it is counted here, exactly.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};

use crate::leisure::Leisure;
use crate::limits::{BATCH_BYTES_MAX, BATCHES_BYTES_MAX, DATAGRAM_BYTES_MAX, SOCKET_BUFFER_BYTES};
use crate::udp::{Room, Udp};

/// Which way bytes went, as seen from the endpoint whose tap it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Out to the peer.
    Sent,
    /// In from the peer.
    Received,
}

/// A function that sees bytes as they pass. For tests: it runs on the path of every packet.
#[derive(Clone)]
pub struct Tap(Arc<See>);

type See = dyn Fn(Direction, &[u8]) + Send + Sync;

impl Tap {
    /// A tap that calls `see` with each piece.
    pub fn new(see: impl Fn(Direction, &[u8]) + Send + Sync + 'static) -> Self {
        Self(Arc::new(see))
    }

    pub(crate) fn see(&self, direction: Direction, bytes: &[u8]) {
        (self.0)(direction, bytes);
    }
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tap")
    }
}

/// Where an endpoint is tapped; nowhere by default.
#[derive(Debug, Clone, Default)]
pub struct Taps {
    /// Every UDP payload at the socket: what somebody on the wire sees.
    pub datagrams: Option<Tap>,
    /// Every frame and record, before TLS seals it and after TLS opened it: what somebody sees who
    /// terminates TLS.
    pub streams: Option<Tap>,
}

/// Running totals of an endpoint's socket. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Traffic(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    sent_bytes: AtomicU64,
    sent_datagrams: AtomicU64,
    received_bytes: AtomicU64,
    received_datagrams: AtomicU64,
}

impl Traffic {
    /// The totals by now.
    pub fn totals(&self) -> TrafficTotals {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TrafficTotals {
            sent_bytes: read(&self.0.sent_bytes),
            sent_datagrams: read(&self.0.sent_datagrams),
            received_bytes: read(&self.0.received_bytes),
            received_datagrams: read(&self.0.received_datagrams),
        }
    }

    pub(crate) fn count(&self, direction: Direction, bytes: usize, datagrams: usize) {
        let (byte_counter, datagram_counter) = match direction {
            Direction::Sent => (&self.0.sent_bytes, &self.0.sent_datagrams),
            Direction::Received => (&self.0.received_bytes, &self.0.received_datagrams),
        };
        // A usize always fits.
        byte_counter.fetch_add(bytes as u64, Ordering::Relaxed);
        datagram_counter.fetch_add(datagrams as u64, Ordering::Relaxed);
    }
}

/// What passed a socket since it was bound: UDP payloads, without UDP and IP headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrafficTotals {
    /// Bytes out.
    pub sent_bytes: u64,
    /// Datagrams out.
    pub sent_datagrams: u64,
    /// Bytes in, garbage included.
    pub received_bytes: u64,
    /// Datagrams in, garbage included.
    pub received_datagrams: u64,
}

/// Who may send the longest datagrams through a socket. quinn keeps room for a connection's longest batch for as long as
/// it lives, ten datagrams: of a fleet each of whose workers had a model once, more than all the rest of a connection. So
/// the more there are, the shorter are their batches, and all together never take more than [`BATCHES_BYTES_MAX`] until
/// each has one datagram.
#[derive(Debug, Clone, Default)]
pub(crate) struct Crowd(Arc<AtomicUsize>);

/// One of a crowd.
#[derive(Debug)]
pub(crate) struct Seat(Crowd);

impl Crowd {
    pub(crate) fn seat(&self) -> Seat {
        self.0.fetch_add(1, Ordering::Relaxed);
        Seat(self.clone())
    }

    /// Datagrams in a batch of each.
    fn batch(&self) -> usize {
        let seats = self.0.load(Ordering::Relaxed).max(1);
        (BATCHES_BYTES_MAX / usize::from(DATAGRAM_BYTES_MAX) / seats).max(1)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Passes everything through to `inner`, counting.
#[derive(Debug)]
pub(crate) struct MeteredSocket {
    inner: Arc<Udp>,
    crowd: Crowd,
    traffic: Traffic,
    tap: Option<Tap>,
    leisure: Option<Leisure>,
}

impl MeteredSocket {
    /// Takes a bound socket over. Must be called within a tokio runtime.
    pub(crate) fn new(socket: UdpSocket, crowd: Crowd, traffic: Traffic, tap: Option<Tap>) -> io::Result<Self> {
        let inner = Arc::new(Udp::new(socket, SOCKET_BUFFER_BYTES)?);
        Ok(Self { inner, crowd, traffic, tap, leisure: None })
    }

    /// The same, and whoever receives from it may rest at leisure.
    pub(crate) fn at_leisure(self) -> Self {
        let leisure = Some(Leisure::new(self.traffic.clone()));
        Self { leisure, ..self }
    }

    /// `bytes` is a batch of datagrams, each `segment` long but the last.
    fn passed(&self, direction: Direction, bytes: &[u8], segment: usize) {
        let segment = segment.max(1);
        self.traffic.count(direction, bytes.len(), bytes.len().div_ceil(segment));
        if let Some(tap) = &self.tap {
            bytes.chunks(segment).for_each(|datagram| tap.see(direction, datagram));
        }
    }
}

impl AsyncUdpSocket for MeteredSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room::new(Arc::clone(&self.inner)))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)?;
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len());
        self.passed(Direction::Sent, transmit.contents, segment);
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        if let Some(leisure) = &self.leisure {
            ready!(self.inner.poll_arrived(cx))?;
            leisure.rest();
        }
        let batches = ready!(self.inner.poll_recv(cx, buffers, metas))?;
        for (buffer, meta) in buffers.iter().zip(metas.iter()).take(batches) {
            let bytes = buffer.get(..meta.len).unwrap_or(buffer);
            self.passed(Direction::Received, bytes, meta.stride);
        }
        Poll::Ready(Ok(batches))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_address()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.state().max_gso_segments().min(self.crowd.batch())
    }

    /// quinn takes so many of the longest datagrams for the most that the kernel hands over at once, and makes room for
    /// thirty-two times that. However many there are in a batch, together they are no longer than one.
    fn max_receive_segments(&self) -> usize {
        let longest = BATCH_BYTES_MAX.div_ceil(usize::from(DATAGRAM_BYTES_MAX));
        self.inner.state().gro_segments().min(longest)
    }

    fn may_fragment(&self) -> bool {
        self.inner.state().may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_batches_of_a_crowd_take_no_more_memory_than_a_few() {
        let crowd = Crowd::default();
        assert!(crowd.batch() >= 10, "one alone has as long ones as quinn makes");
        let mut seats: Vec<Seat> = (0..48).map(|_| crowd.seat()).collect();
        assert_eq!(crowd.batch(), 10);
        seats.extend((48..200).map(|_| crowd.seat()));
        assert_eq!(crowd.batch(), 2);
        seats.extend((200..20_000).map(|_| crowd.seat()));
        assert_eq!(crowd.batch(), 1);
        seats.truncate(48);
        assert_eq!(crowd.batch(), 10);
    }
}
