//! What the kernel knows of a path before the first datagram leaves.
//!
//! QUIC finds out by trying how long datagrams may be, one probe after another in each direction, and a probe is full of
//! padding that its receiver reads byte by byte: a search from 1,200 to 6,550 bytes takes as long as a TLS handshake. But
//! the kernel has chosen the link over which the first datagram goes, and what that does not carry need not be tried. What
//! lies behind the link it does not know, so that the search goes on, up to there.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::limits::{DATAGRAM_BYTES_MAX, ORDINARY_DATAGRAM_BYTES};

/// What no network carries, and loopback does: the longest packet that IPv4 knows, beyond which the kernel does not count.
const NO_NETWORK_BYTES: u32 = 65_535;

/// How a path's search for long datagrams begins, and where it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// There is no network: the kernel hands over datagrams of any length. Nothing is searched for unless they get lost.
    Kernel,
    /// The link carries frames of Ethernet's size, or shorter ones.
    Ordinary,
    /// The link carries more, or the kernel does not say.
    Wide,
}

impl Path {
    /// The path to a peer.
    pub(crate) fn to(peer: SocketAddr) -> Self {
        // Without sockets to spare, say: nothing is known, and all is tried.
        link_bytes(peer).map_or(Self::Wide, Self::over)
    }

    /// The path over a link of so many bytes, IP headers included.
    fn over(link: u32) -> Self {
        match link {
            NO_NETWORK_BYTES.. => Self::Kernel,
            link if link < u32::from(DATAGRAM_BYTES_MAX) => Self::Ordinary,
            _ => Self::Wide,
        }
    }

    /// The longest UDP payload that is tried before anything is known.
    pub(crate) fn first_bytes(self) -> Option<u16> {
        (self == Self::Kernel).then_some(DATAGRAM_BYTES_MAX)
    }

    /// The longest that is tried at all.
    pub(crate) fn longest_bytes(self) -> u16 {
        if self == Self::Ordinary { ORDINARY_DATAGRAM_BYTES } else { DATAGRAM_BYTES_MAX }
    }
}

/// What the link carries over which the kernel would send to `peer`.
#[cfg(target_os = "linux")]
fn link_bytes(peer: SocketAddr) -> io::Result<u32> {
    use rustix::net::sockopt::{ip_mtu, ipv6_mtu};

    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    // Connecting a UDP socket sends nothing: it only finds the way.
    if peer.is_ipv4() {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(peer)?;
        return Ok(ip_mtu(socket)?);
    }
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    socket.connect(peer)?;
    Ok(ipv6_mtu(socket)?)
}

#[cfg(not(target_os = "linux"))]
fn link_bytes(_: SocketAddr) -> io::Result<u32> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_link_bounds_what_is_tried() {
        let tried = |link| (Path::over(link).first_bytes(), Path::over(link).longest_bytes());
        assert_eq!(tried(65_536), (Some(6_550), 6_550), "loopback by IPv6");
        assert_eq!(tried(65_535), (Some(6_550), 6_550), "loopback by IPv4");
        assert_eq!(tried(65_520), (None, 6_550), "a virtual machine's own network");
        assert_eq!(tried(9_000), (None, 6_550), "jumbo frames");
        assert_eq!(tried(1_500), (None, 1_452), "Ethernet");
        assert_eq!(tried(1_420), (None, 1_452), "a tunnel");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_kernel_knows_that_loopback_is_no_network() {
        let loopback: [std::net::IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()];
        for address in loopback {
            assert_eq!(Path::to(SocketAddr::new(address, 9)), Path::Kernel);
        }
        // There may be no IPv6 here.
        let ipv6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 9));
        let expected = if UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() { Path::Kernel } else { Path::Wide };
        assert_eq!(Path::to(ipv6), expected);
    }
}
