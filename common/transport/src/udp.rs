//! A UDP socket that wakes its thread for what arrives, and for room to send only if there was none.
//!
//! The kernel tells whoever asked that a socket has room again each time that a datagram has left, whether or not there was ever
//! too little. A runtime's own UDP socket always asks, so that each datagram sent is one wake-up more, as dear as one that
//! arrives. Here the socket asks for what arrives alone; if a datagram finds no room, a copy of it asks for that, until there is
//! some. And where fewer datagrams came than were asked for there are no more, so that nobody need ask again to find none.

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use quinn::UdpPoller;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A socket that is registered for what arrives.
#[derive(Debug)]
pub(crate) struct Udp {
    socket: AsyncFd<UdpSocket>,
    state: UdpSocketState,
    /// The same socket, registered for room, while somebody waits for some.
    full: Mutex<Option<Arc<AsyncFd<UdpSocket>>>>,
}

impl Udp {
    /// Takes a bound socket over, with as large buffers as the operating system grants. Must be called within a tokio runtime.
    pub(crate) fn new(socket: UdpSocket, buffer_bytes: usize) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        // It may grant less, or nothing beyond its default: that costs speed only.
        let _ = state.set_recv_buffer_size((&socket).into(), buffer_bytes);
        let _ = state.set_send_buffer_size((&socket).into(), buffer_bytes);
        socket.set_nonblocking(true)?;
        Ok(Self { socket: registered(socket, Interest::READABLE)?, state, full: Mutex::default() })
    }

    pub(crate) fn socket(&self) -> &UdpSocket {
        self.socket.get_ref()
    }

    pub(crate) fn state(&self) -> &UdpSocketState {
        &self.state
    }

    /// Sends a batch, or says that there is no room: then [`Room`] waits for some.
    pub(crate) fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.send(self.socket().into(), transmit);
        if sent.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            self.ask_for_room()?;
        }
        sent
    }

    /// Waits until something is there to be received.
    pub(crate) fn poll_arrived(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_read_ready(cx).map_ok(|mut guard| guard.retain_ready())
    }

    pub(crate) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let asked = buffers.len();
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            let Ok(received) = guard.try_io(|socket| self.state.recv(socket.get_ref().into(), buffers, metas)) else {
                continue;
            };
            // What arrives from here on is told by the kernel again.
            if received.as_ref().is_ok_and(|batches| *batches < asked) {
                guard.clear_ready();
            }
            return Poll::Ready(received);
        }
    }

    pub(crate) fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket().local_addr()
    }

    fn ask_for_room(&self) -> io::Result<()> {
        let mut full = self.full();
        if full.is_none() {
            *full = Some(Arc::new(registered(self.socket().try_clone()?, Interest::WRITABLE)?));
        }
        Ok(())
    }

    fn full(&self) -> MutexGuard<'_, Option<Arc<AsyncFd<UdpSocket>>>> {
        self.full.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is room: nobody needs to be told any more. Whoever finds none again asks again.
    fn has_room(&self, told: &Arc<AsyncFd<UdpSocket>>) {
        let mut full = self.full();
        if full.as_ref().is_some_and(|asked| Arc::ptr_eq(asked, told)) {
            *full = None;
        }
    }
}

/// Deprecated, because a type could give another descriptor later than when it was registered. A standard socket does not.
#[allow(deprecated)]
fn registered(socket: UdpSocket, interest: Interest) -> io::Result<AsyncFd<UdpSocket>> {
    AsyncFd::with_interest(socket, interest)
}

/// Waits for room in a socket, for one connection.
pub(crate) struct Room {
    socket: Arc<Udp>,
    waiting: Option<Pin<Box<Waiting>>>,
}

type Waiting = dyn Future<Output = io::Result<()>> + Send + Sync;

impl Room {
    pub(crate) fn new(socket: Arc<Udp>) -> Self {
        Self { socket, waiting: None }
    }
}

impl std::fmt::Debug for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Room").field("waits", &self.waiting.is_some()).finish_non_exhaustive()
    }
}

impl UdpPoller for Room {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.waiting.is_none() {
            let Some(full) = this.socket.full().clone() else { return Poll::Ready(Ok(())) };
            let socket = Arc::clone(&this.socket);
            this.waiting = Some(Box::pin(async move {
                full.writable().await?.retain_ready();
                socket.has_room(&full);
                Ok(())
            }));
        }
        let Some(waiting) = &mut this.waiting else { return Poll::Ready(Ok(())) };
        let waited = ready!(waiting.as_mut().poll(cx));
        this.waiting = None;
        Poll::Ready(waited)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    use std::future::poll_fn;
    use std::net::Ipv4Addr;

    fn socket() -> Arc<Udp> {
        Arc::new(Udp::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap(), 1 << 16).unwrap())
    }

    /// Sends a datagram of each of these lengths.
    fn send(from: &Udp, to: &Udp, lengths: &[usize]) {
        let destination = to.local_address().unwrap();
        for length in lengths {
            let contents = vec![7; *length];
            let transmit = Transmit { destination, ecn: None, contents: &contents, segment_size: None, src_ip: None };
            from.try_send(&transmit).unwrap();
        }
    }

    /// The lengths of what arrives next, asked for `at_once` at a time.
    async fn receive(socket: &Udp, at_once: usize) -> Vec<usize> {
        let mut memory = vec![[0; 2048]; at_once];
        let mut buffers: Vec<IoSliceMut<'_>> = memory.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
        let mut metas = vec![RecvMeta::default(); at_once];
        let count = poll_fn(|cx| socket.poll_recv(cx, &mut buffers, &mut metas)).await.unwrap();
        metas[..count].iter().map(|meta| meta.len).collect()
    }

    #[tokio::test]
    async fn whatever_arrives_is_told_whether_all_of_it_was_taken_or_not() {
        let (near, far) = (socket(), socket());
        for at_once in [1, 2, 8] {
            for round in 0..20 {
                send(&near, &far, &[10, 20, 30]);
                let mut got = Vec::new();
                while got.len() < 3 {
                    got.extend(receive(&far, at_once).await);
                }
                assert_eq!(got, [10, 20, 30], "round {round}, {at_once} at once");
                if round % 2 == 0 {
                    // Whoever asks when nothing is there is woken by what comes.
                    let (got, ()) = tokio::join!(receive(&far, at_once), async { send(&near, &far, &[40]) });
                    assert_eq!(got, [40]);
                }
            }
        }
    }

    #[tokio::test]
    async fn whoever_found_no_room_is_told_of_some_and_the_socket_asks_for_no_more() {
        let socket = socket();
        let (mut one, mut other) = (Room::new(Arc::clone(&socket)), Room::new(Arc::clone(&socket)));
        let room = |room: &mut Room, cx: &mut Context<'_>| Pin::new(room).poll_writable(cx);
        poll_fn(|cx| room(&mut one, cx)).await.unwrap();
        assert!(one.waiting.is_none() && socket.full().is_none(), "nobody found too little");
        for _ in 0..3 {
            socket.ask_for_room().unwrap();
            let both = async { tokio::join!(poll_fn(|cx| room(&mut one, cx)), poll_fn(|cx| room(&mut other, cx))) };
            let (first, second) = both.await;
            first.and(second).unwrap();
            assert!(socket.full().is_none());
        }
    }
}
