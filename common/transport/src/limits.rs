//! Every bound that a peer can push against, and why it has the value that it has.
//!
//! quinn's own defaults suit a client on the open internet: 250 MB could be held for one hostile peer,
//! 65,536 connection attempts could wait, and nothing counts connections. So all of them are set here.

use std::time::Duration;

/// Connections that a server holds by default, those still in the handshake or draining included: twice
/// the updates of the largest round. An idle one costs 45 kB.
pub const CONNECTIONS_MAX: usize = 4_096;

/// TLS handshakes that a server has in flight by default. A core does about 2,000 a second.
pub const HANDSHAKES_MAX: usize = 64;

/// When this share of the handshakes is in flight, a newcomer must first prove that it receives at its
/// address (one more round trip), so that forged addresses cannot fill the table: one in so many.
pub const HANDSHAKES_UNVALIDATED_SHARE: usize = 2;

/// How long a handshake may take. Without it, only the idle timeout would end one.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connection attempts that wait for [`Server::accept`](crate::Server::accept) at once.
pub const INCOMING_MAX: usize = 256;

/// Bytes that are kept for one such attempt beyond its first packet: a ClientHello with a
/// post-quantum share and a certificate's flight fit well.
pub const INCOMING_BUFFER_BYTES: u64 = 16 * 1024;

/// The same for all attempts together.
pub const INCOMING_BUFFER_BYTES_TOTAL: u64 = INCOMING_MAX as u64 * INCOMING_BUFFER_BYTES;

/// Handshake bytes that may arrive out of order, in bytes.
pub const CRYPTO_BUFFER_BYTES: usize = 16 * 1024;

/// Streams that a worker may have open in both directions: its control stream.
pub const BIDI_STREAMS_MAX: u32 = 1;

/// Streams that a peer may have open in one direction: downloads or uploads. It needs a few; but once an eighth of them
/// has ended, a packet tells it that it may open others, and with few of them every small round is two such packets more.
pub const UNI_STREAMS_MAX: u32 = 32;

/// Received bytes that a stream may have unread: 60 ms of a 100 Mbit/s line. quinn keeps the longest list of unread pieces that a
/// stream ever had; of the longest datagrams this is 121 of them, which is below a power of two.
pub const STREAM_RECEIVE_WINDOW_BYTES: u32 = 768 << 10;

/// Received bytes that a connection may have unread, over all its streams. A hostile peer can make us
/// hold this much.
pub const RECEIVE_WINDOW_BYTES: u32 = 2 << 20;

/// Sent bytes that a connection may have unacknowledged. Broadcast records are shared between
/// connections, so this is not memory for each of them.
pub const SEND_WINDOW_BYTES: u64 = 2 << 20;

/// The same for all of a server's connections together, until each has [`SEND_WINDOW_BYTES_MIN`]: what is kept of each packet
/// under way adds up. Over 50 ms it is more than 1 GB/s.
pub const SEND_WINDOWS_BYTES: u64 = 64 << 20;

/// No connection's share of them is less: over 50 ms it is 5 MB/s.
pub const SEND_WINDOW_BYTES_MIN: u64 = 256 << 10;

/// The longest UDP payload that we take, and that is tried on a path: quinn hands ten datagrams at most to the kernel at
/// once, and ten of these are the longest payload that a packet of the kernel may have. So a batch on loopback or on a
/// network of jumbo frames is four times as large as with 1,452 bytes, quinn's own bound, and so is what each system
/// call, each acknowledgement and each packet's keys are spent on. Longer ones would not leave at all.
pub const DATAGRAM_BYTES_MAX: u16 = 6_550;

/// The longest UDP payload that is tried where the link carries 1,500 bytes or less: what is left of them beside the headers of
/// IPv6 and UDP. Trying longer ones would be two dozen datagrams that do not arrive.
pub const ORDINARY_DATAGRAM_BYTES: u16 = 1_500 - 40 - 8;

/// When a path is searched for longer datagrams again, after it was found how long they may be.
pub const PATH_SEARCH_INTERVAL: Duration = Duration::from_secs(3_600);

/// The longest UDP payload over IPv4: what a batch of datagrams must fit in, sent or received.
pub const BATCH_BYTES_MAX: usize = 65_507;

/// Datagrams in a batch that quinn hands to the kernel.
const BATCH_DATAGRAMS: usize = 10;

/// Bytes that the batches of all of a server's connections may take that have long datagrams: as much as 48 of the longest.
pub const BATCHES_BYTES_MAX: usize = 48 * BATCH_DATAGRAMS * DATAGRAM_BYTES_MAX as usize;

/// Sent on a new connection before anything is acknowledged: five of the longest datagrams, or twenty-three ordinary
/// ones, where Google's QUIC sends thirty-two. With the 12,000 bytes of RFC 9002 one probe of a search under way holds up
/// what comes behind it, the end of the connection included.
pub const INITIAL_WINDOW_BYTES: u64 = 5 * DATAGRAM_BYTES_MAX as u64;

/// What the operating system is asked to buffer for a socket, in each direction. All connections of an
/// endpoint share it; with the usual 208 KiB, bursts lose datagrams even on loopback.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// A connection on which nothing arrives for so long is dead.
pub const IDLE_TIMEOUT: Duration = Duration::from_millis(IDLE_TIMEOUT_MS as u64);

pub(crate) const IDLE_TIMEOUT_MS: u32 = 30_000;

/// A client says something this often by default: below the idle timeout, and below the 30 s after which NATs
/// forget a UDP flow. quinn fixes the interval when a connection begins.
pub const KEEP_ALIVE: Duration = Duration::from_secs(25);

/// On average no longer is what idle connections send: a ping of some 30 bytes and its acknowledgement of some 40. The shortest
/// sealed record makes 66 of both.
pub const KEEP_ALIVE_BYTES_MAX: u64 = 48;

/// For so long nothing else must have passed before a server is at leisure: longer than most small rounds take.
pub const LEISURE_AFTER: Duration = Duration::from_millis(10);

/// Less often than this, keep-alives come one by one, and waiting for a second one is in vain.
pub const OFTEN: Duration = Duration::from_millis(25);

/// For how long a server at leisure lets things come together: what 20,000 connections say is then heard six at a time. What
/// came has then waited for so long that it is to be acknowledged at once: a client asks for no more.
pub const REST: Duration = Duration::from_millis(8);

/// What a client takes a round trip for until it has measured one: a first packet without answer is repeated after three
/// times as long. The 333 ms of RFC 9002 would make it wait a second, and then two, for a server that was just restarted.
pub const FIRST_RTT: Duration = Duration::from_millis(100);

/// The shortest time between two stateless resets. A reset is always smaller than what provoked it, so
/// it amplifies nothing; a restarted server owes one to each of its workers, soon.
pub const RESET_INTERVAL: Duration = Duration::from_millis(1);

/// Addresses that are tried for one server: as many as an invitation holds.
pub const ADDRESSES_MAX: usize = 4;

/// The head start of each address over the next one (RFC 8305 section 5).
pub const ADDRESS_STAGGER: Duration = Duration::from_millis(250);

/// How long one address is tried.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Certificates in a chain: the server's own, and the CA's.
pub const CHAIN_MAX: usize = 2;

/// The longest reason that is sent with a close, and kept of a peer's.
pub const REASON_BYTES_MAX: usize = 512;

/// A frame's kind and length, in bytes.
pub const FRAME_HEADER_BYTES: usize = 5;

/// The longest body of a Hello frame, in bytes: a list of versions, a role, a mode.
pub const HELLO_BYTES_MAX: usize = 1_024;

/// The longest body of a Refused frame, in bytes: a list of versions and a sentence for a person.
pub const REFUSED_BYTES_MAX: usize = 2_048;

/// The longest body of a Handshake frame, in bytes: a Noise message with its payload. Enrolment, whose
/// whole stream is bounded by as much, travels in one.
pub const HANDSHAKE_BYTES_MAX: usize = 4_096;

/// The body of a StreamOpen frame, in bytes: always a `u32`.
pub const STREAM_OPEN_BYTES: usize = 4;

/// The header of a sealed record, in bytes.
pub const RECORD_HEADER_BYTES: usize = 16;

/// The header of a broadcast record, in bytes; it names the content too.
pub const BROADCAST_HEADER_BYTES: usize = 32;

/// The longest sealed body of a record, in bytes: 64 KiB and the tag.
pub const RECORD_BODY_BYTES_MAX: usize = 65_536 + 16;

/// Packets that may come before they are acknowledged at once, and not with the next message or after 25 ms. Fewer than
/// the congestion window has at the beginning, or its sender would wait for nothing.
pub const UNACKNOWLEDGED_MAX: u32 = 3;

const _: () = assert!(UNACKNOWLEDGED_MAX as u64 * (DATAGRAM_BYTES_MAX as u64) < INITIAL_WINDOW_BYTES);
const _: () = assert!(BATCH_DATAGRAMS * DATAGRAM_BYTES_MAX as usize <= BATCH_BYTES_MAX);
const _: () = assert!(SEND_WINDOW_BYTES_MIN < SEND_WINDOW_BYTES && SEND_WINDOW_BYTES < SEND_WINDOWS_BYTES);
const _: () = assert!(REST.as_millis() < LEISURE_AFTER.as_millis() && REST.as_millis() < OFTEN.as_millis());
const _: () = assert!(KEEP_ALIVE.as_secs() < IDLE_TIMEOUT.as_secs());
const _: () = assert!(HANDSHAKE_TIMEOUT.as_secs() < IDLE_TIMEOUT.as_secs());
const _: () = assert!(STREAM_RECEIVE_WINDOW_BYTES <= RECEIVE_WINDOW_BYTES);
const _: () = assert!(RECORD_BODY_BYTES_MAX < STREAM_RECEIVE_WINDOW_BYTES as usize);

#[cfg(test)]
mod tests {
    use protocol::limits::{HELLO_VERSIONS_MAX, RECORD_BYTES_MAX, SENTENCE_LEN_MAX, UPDATES_MAX};
    use protocol::session::{broadcast, record};

    use super::*;

    #[test]
    fn what_the_protocol_says_fits() {
        assert_eq!(RECORD_HEADER_BYTES, record::RECORD_HEADER_BYTES);
        assert_eq!(BROADCAST_HEADER_BYTES, broadcast::BROADCAST_HEADER_BYTES);
        assert_eq!(RECORD_BODY_BYTES_MAX, RECORD_BYTES_MAX + record::RECORD_TAG_BYTES);
        // postcard spends at most three bytes on a version, and on the length of a sentence.
        let versions = 3 * HELLO_VERSIONS_MAX + 3;
        assert!(versions < HELLO_BYTES_MAX && versions + SENTENCE_LEN_MAX + 3 < REFUSED_BYTES_MAX);
        assert!(CONNECTIONS_MAX >= UPDATES_MAX as usize);
    }
}
