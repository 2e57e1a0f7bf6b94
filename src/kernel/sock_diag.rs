//! The sockets of a network namespace as NETLINK_SOCK_DIAG lists them.
//!
//! The kernel lists sockets that are in its tables: for TCP those that listen or are connected (or were, and are not quite
//! closed), for UDP those that are bound. A socket that nothing was done with yet is in no list.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::netlink::{Attributes, NLM_F_DUMP, NLM_F_REQUEST, Socket, Writer, truncated};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UNIX_SHOW_ALL: u32 = 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x40;
const INET_DIAG_SHUTDOWN: u8 = 8;
const INET_DIAG_V6ONLY: u16 = 11;
/// How often a dump is repeated when sockets came and went meanwhile.
const ATTEMPTS: usize = 5;

/// A unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode number, as in `socket:[N]`.
    pub inode: u32,
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: u8,
    /// State, in TCP's numbers: 1 connected, 7 unconnected, 10 listening.
    pub state: u8,
    /// The kernel's unique number for the socket (SO_COOKIE).
    pub cookie: u64,
    /// The bound name: a path without its closing zero, or a zero byte and an abstract name.
    pub name: Option<Vec<u8>>,
    /// Device and inode of the socket file, if bound to one.
    pub file: Option<(u32, u32)>,
    /// Inode number of the peer.
    pub peer: Option<u32>,
    /// Inode numbers of peers that wait to be accepted; 0 stands for one that was closed.
    pub pending: Vec<u32>,
    /// Bytes to be received; for a listening socket the number of waiting peers.
    pub receive_queue: u32,
    /// Bytes of buffer in use for sending; for a listening socket the backlog.
    pub send_queue: u32,
    /// Bit 0: nothing more is received; bit 1: nothing more is sent.
    pub shutdown: u8,
    /// Owner.
    pub uid: u32,
}

/// A TCP or UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetSocket {
    /// IPPROTO_TCP or IPPROTO_UDP.
    pub protocol: u8,
    /// Inode number, as in `socket:[N]`; 0 when no process has it any more.
    pub inode: u32,
    /// The kernel's unique number for the socket (SO_COOKIE).
    pub cookie: u64,
    /// State, in TCP's numbers: 1 established, 10 listening, ...
    pub state: u8,
    /// This end.
    pub local: SocketAddr,
    /// The other end; unspecified when there is none.
    pub remote: SocketAddr,
    /// Interface that it is bound to; 0 for none.
    pub interface: u32,
    /// Bytes to be received; for a listening socket the number of connections to be accepted.
    pub receive_queue: u32,
    /// Bytes sent and not acknowledged; for a listening socket the backlog.
    pub send_queue: u32,
    /// Owner.
    pub uid: u32,
    /// Kind of the timer that runs (0: none), its retransmissions, and milliseconds until it expires.
    pub timer: (u8, u8, u32),
    /// Bit 0: nothing more is received; bit 1: nothing more is sent.
    pub shutdown: u8,
    /// IPV6_V6ONLY, where the kernel tells.
    pub v6_only: bool,
}

/// A packet socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PacketSocket {
    /// Inode number, as in `socket:[N]`.
    pub inode: u32,
    /// What PACKET_COPY_THRESH is set to.
    pub copy_thresh: u32,
    /// Memberships: interface, kind (PACKET_MR_…), address.
    pub memberships: Vec<(u32, u16, Vec<u8>)>,
    /// Has it rings to receive or to send?
    pub rings: bool,
}

/// Why sockets could not be listed.
#[derive(Debug, thiserror::Error)]
#[error("cannot list {what} sockets of the network namespace")]
pub struct DiagError {
    what: &'static str,
    source: io::Error,
}

/// All unix sockets of the network namespace that the calling thread is in.
///
/// # Errors
/// When the kernel lacks CONFIG_UNIX_DIAG or answers nonsense.
pub fn unix_sockets() -> Result<Vec<UnixSocket>, DiagError> {
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    for word in [u32::MAX, 0, UNIX_SHOW_ALL, u32::MAX, u32::MAX] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    dump(&request, parse_unix).map_err(|source| DiagError { what: "unix", source })
}

/// All packet sockets of the network namespace that the calling thread is in.
///
/// # Errors
/// When the kernel lacks CONFIG_PACKET_DIAG or answers nonsense.
pub fn packet_sockets() -> Result<Vec<PacketSocket>, DiagError> {
    const SHOW_INFO_MEMBERSHIPS_RINGS: u32 = 1 | 2 | 4;
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0];
    for word in [0, SHOW_INFO_MEMBERSHIPS_RINGS, u32::MAX, u32::MAX] {
        request.extend_from_slice(&word.to_ne_bytes());
    }
    dump(&request, parse_packet).map_err(|source| DiagError { what: "packet", source })
}

/// All sockets of one protocol (IPPROTO_TCP, IPPROTO_UDP) and both address families, in the network namespace that the
/// calling thread is in.
///
/// # Errors
/// When the kernel lacks CONFIG_INET_DIAG (or its part for UDP) or answers nonsense.
pub fn inet_sockets(protocol: u8) -> Result<Vec<InetSocket>, DiagError> {
    let mut sockets = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut request = vec![family as u8, protocol, 1 << (INET_DIAG_SHUTDOWN - 1), 0];
        request.extend_from_slice(&u32::MAX.to_ne_bytes());
        request.extend_from_slice(&[0; 40]);
        // The cookie that fits every socket.
        request.extend_from_slice(&[0xFF; 8]);
        let found = dump(&request, |payload| parse_inet(payload, protocol));
        let what = if i32::from(protocol) == libc::IPPROTO_UDP {
            "udp"
        } else {
            "tcp"
        };
        sockets.extend(found.map_err(|source| DiagError { what, source })?);
    }
    Ok(sockets)
}

fn dump<T>(request: &[u8], parse: impl Fn(&[u8]) -> io::Result<T>) -> io::Result<Vec<T>> {
    let mut writer = Writer::default();
    writer.message(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, request, |_| {});
    let request = writer.finish();
    let mut sockets = Vec::new();
    for _ in 0..ATTEMPTS {
        sockets.clear();
        let socket = Socket::new(libc::NETLINK_SOCK_DIAG)?;
        let interrupted = socket.dump(&request, |payload| {
            sockets.push(parse(payload)?);
            Ok(())
        })?;
        if !interrupted {
            break;
        }
    }
    Ok(sockets)
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    let word = bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .map(|word| u32::from_ne_bytes(*word));
    word.ok_or_else(|| truncated("socket"))
}

fn cookie(bytes: &[u8], at: usize) -> io::Result<u64> {
    Ok(u64::from(word(bytes, at)?) | u64::from(word(bytes, at + 4)?) << 32)
}

fn parse_unix(payload: &[u8]) -> io::Result<UnixSocket> {
    let (fixed, rest) = payload.split_at_checked(16).ok_or_else(|| truncated("unix socket"))?;
    let mut socket = UnixSocket {
        inode: word(fixed, 4)?,
        kind: fixed[1],
        state: fixed[2],
        cookie: cookie(fixed, 8)?,
        ..UnixSocket::default()
    };
    for attribute in Attributes(rest) {
        let (kind, value) = attribute?;
        match kind {
            0 => {
                // A path may or may not come with its closing zero; an abstract name starts with one and may end so.
                let path = value.first().is_some_and(|&first| first != 0);
                let name = if path {
                    value.split(|&byte| byte == 0).next().unwrap_or(value)
                } else {
                    value
                };
                socket.name = Some(name.to_vec());
            }
            1 => socket.file = Some((word(value, 4)?, word(value, 0)?)),
            2 => socket.peer = Some(word(value, 0)?),
            3 => {
                socket.pending = value
                    .chunks_exact(4)
                    .map(|inode| word(inode, 0))
                    .collect::<io::Result<_>>()?
            }
            4 => (socket.receive_queue, socket.send_queue) = (word(value, 0)?, word(value, 4)?),
            6 => socket.shutdown = *value.first().ok_or_else(|| truncated("unix socket"))?,
            7 => socket.uid = word(value, 0)?,
            _ => {}
        }
    }
    Ok(socket)
}

fn parse_packet(payload: &[u8]) -> io::Result<PacketSocket> {
    /// `struct packet_diag_mclist`, whose address has room for 32 bytes.
    const MEMBERSHIP: usize = 44;
    let (fixed, rest) = payload.split_at_checked(16).ok_or_else(|| truncated("packet socket"))?;
    let mut socket = PacketSocket {
        inode: word(fixed, 4)?,
        ..PacketSocket::default()
    };
    for attribute in Attributes(rest) {
        let (kind, value) = attribute?;
        match kind {
            0 => socket.copy_thresh = word(value, 12)?,
            1 => {
                for one in value.chunks_exact(MEMBERSHIP) {
                    let half = |at: usize| u16::from_ne_bytes([one[at], one[at + 1]]);
                    let address = one[12..].get(..usize::from(half(10))).unwrap_or(&[]).to_vec();
                    // One that was asked for several times is counted.
                    for _ in 0..word(one, 4)?.clamp(1, 1024) {
                        socket.memberships.push((word(one, 0)?, half(8), address.clone()));
                    }
                }
            }
            2 | 3 => socket.rings = true,
            _ => {}
        }
    }
    Ok(socket)
}

fn parse_inet(payload: &[u8], protocol: u8) -> io::Result<InetSocket> {
    let (fixed, rest) = payload.split_at_checked(72).ok_or_else(|| truncated("inet socket"))?;
    let address = |at: usize, port: usize| {
        let octets: [u8; 16] = fixed[at..at + 16].try_into().expect("sixteen bytes of seventy-two");
        let ip = if i32::from(fixed[0]) == libc::AF_INET {
            IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]))
        } else {
            IpAddr::V6(Ipv6Addr::from(octets))
        };
        SocketAddr::new(ip, u16::from_be_bytes([fixed[port], fixed[port + 1]]))
    };
    let mut socket = InetSocket {
        protocol,
        state: fixed[1],
        timer: (fixed[2], fixed[3], word(fixed, 52)?),
        local: address(8, 4),
        remote: address(24, 6),
        interface: word(fixed, 40)?,
        cookie: cookie(fixed, 44)?,
        receive_queue: word(fixed, 56)?,
        send_queue: word(fixed, 60)?,
        uid: word(fixed, 64)?,
        inode: word(fixed, 68)?,
        shutdown: 0,
        v6_only: false,
    };
    for attribute in Attributes(rest) {
        let (kind, value) = attribute?;
        match (kind, value.first()) {
            (kind, Some(&bits)) if kind == u16::from(INET_DIAG_SHUTDOWN) => socket.shutdown = bits,
            (INET_DIAG_V6ONLY, Some(&on)) => socket.v6_only = on != 0,
            _ => {}
        }
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn inode(fd: &impl AsRawFd) -> u32 {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        let link = link.to_str().unwrap();
        link.trim_start_matches("socket:[")
            .trim_end_matches(']')
            .parse()
            .unwrap()
    }

    #[test]
    fn unix_sockets_are_listed_with_names_peers_and_queues() {
        let directory = std::env::temp_dir().join(format!("diag-{}", std::process::id()));
        let _ = std::fs::remove_file(&directory);
        let listener = UnixListener::bind(&directory).unwrap();
        let client = UnixStream::connect(&directory).unwrap();
        let (one, two) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut &one, b"twelve bytes").unwrap();
        one.shutdown(std::net::Shutdown::Write).unwrap();
        let name = format!("diag {}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
        let abstract_listener = UnixListener::bind_addr(&address).unwrap();

        let sockets = unix_sockets().unwrap();
        let find = |inode: u32| sockets.iter().find(|socket| socket.inode == inode).unwrap();
        let found = find(inode(&listener));
        assert_eq!(
            (found.state, i32::from(found.kind), found.pending.len()),
            (10, libc::SOCK_STREAM, 1)
        );
        assert_eq!(found.name.as_deref(), Some(directory.as_os_str().as_encoded_bytes()));
        assert!(found.file.is_some() && found.receive_queue == 1);
        assert_eq!(find(inode(&client)).state, 1);
        let (found_one, found_two) = (find(inode(&one)), find(inode(&two)));
        assert_eq!(
            (found_one.peer, found_two.peer),
            (Some(found_two.inode), Some(found_one.inode))
        );
        assert_eq!(
            (found_two.receive_queue, found_one.shutdown, found_two.shutdown),
            (12, 2, 1)
        );
        let found = find(inode(&abstract_listener));
        assert_eq!(
            found.name.as_deref().map(|name| (name[0], &name[1..])),
            Some((0, name.as_bytes()))
        );
        std::fs::remove_file(&directory).unwrap();
    }

    #[test]
    fn inet_sockets_are_listed_with_both_ends_and_queues() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            std::io::Write::write_all(&mut &client, b"hello").unwrap();
            let sockets = inet_sockets(libc::IPPROTO_TCP as u8).unwrap();
            let find = |inode: u32| sockets.iter().find(|socket| socket.inode == inode).unwrap();
            let found = find(inode(&listener));
            assert_eq!(
                (found.state, found.local, found.receive_queue),
                (10, listener.local_addr().unwrap(), 1)
            );
            let found = find(inode(&client));
            assert_eq!((found.state, found.local), (1, client.local_addr().unwrap()));
            assert_eq!(found.remote, client.peer_addr().unwrap());
            let other = sockets
                .iter()
                .find(|socket| socket.local == found.remote && socket.state == 1)
                .unwrap();
            assert_eq!((other.receive_queue, other.remote), (5, found.local));
            assert_ne!(other.cookie, found.cookie);

            let udp = UdpSocket::bind(address).unwrap();
            let sockets = inet_sockets(libc::IPPROTO_UDP as u8).unwrap();
            let found = sockets.iter().find(|socket| socket.inode == inode(&udp)).unwrap();
            assert_eq!(found.local, udp.local_addr().unwrap());
        }
    }

    #[test]
    fn answers_cut_short_are_errors() {
        for len in 0..72 {
            assert!(parse_inet(&vec![0; len], 6).is_err());
        }
        for len in 0..16 {
            assert!(parse_unix(&vec![0; len]).is_err());
        }
        let mut message = vec![0; 16];
        message.extend_from_slice(&[6, 0, 4, 0, 1, 1, 0, 0]);
        assert!(parse_unix(&message).is_err(), "a queue attribute of two bytes");
    }
}
