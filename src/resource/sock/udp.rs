//! UDP sockets, and UDP-Lite's: bound or connected, with their memberships of multicast groups.
//!
//! Datagrams that wait to be read are carried with their senders, and put into the queue of the new socket before it is bound
//! ([`datagrams`]). What is not: the time at which they came, the interface that they came in by, errors that wait to be told
//! (SO_ERROR, MSG_ERRQUEUE), and an empty datagram that somebody has looked at (MSG_PEEK) before.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use whimbrel_images::proto::{FdTypes, FileEntry, InetSkEntry, SkRawOption, SkShutdown};

use super::datagrams;
use super::inet::{self, Ends, state};
use super::options::{self, RawOption, raw_options};
use crate::error::{Context, Error, Result};
use crate::kernel::nft::{Connection, Protocol};
use crate::kernel::socket::{
    GROUP_AT, Identity, MCAST_JOIN_GROUP, MCAST_MSFILTER, MODE_AT, SIOCOUTQ, STORAGE, multicast_filter, queue_length,
};
use crate::kernel::sys::{set_socket_option, socket_option_int};
use crate::procfs::multicast;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};
use crate::resource::{Endpoint, FileKind};

/// UDP sockets.
pub struct Udp;

const UDP: i32 = libc::IPPROTO_UDP;
const UDP_LITE: i32 = libc::IPPROTO_UDPLITE;
const UDP_CORK: i32 = 1;

/// Options of UDP. Memberships are ours alone: see [`memberships`].
static OPTIONS: &[RawOption] = raw_options![
    UDP, UDP_CORK, "UDP_CORK", 4, Late;
    UDP, 100, "UDP_ENCAP", 4, Early;
    UDP, 101, "UDP_NO_CHECK6_TX", 4, Early;
    UDP, 102, "UDP_NO_CHECK6_RX", 4, Early;
    UDP, 103, "UDP_SEGMENT", 4, Early;
    UDP, 104, "UDP_GRO", 4, Early;
    UDP_LITE, 10, "UDPLITE_SEND_CSCOV", 4, Early;
    UDP_LITE, 11, "UDPLITE_RECV_CSCOV", 4, Early;
    libc::IPPROTO_IP, MCAST_MSFILTER, "MCAST_MSFILTER", 0, OfItsKind;
    libc::IPPROTO_IPV6, MCAST_MSFILTER, "MCAST_MSFILTER", 0, OfItsKind;
];

impl FileKind for Udp {
    fn name(&self) -> &'static str {
        "UDP socket"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Inetsk]
    }

    fn restores(&self, entry: &FileEntry) -> bool {
        [UDP, UDP_LITE]
            .iter()
            .any(|&protocol| inet::entry_is(entry, libc::SOCK_DGRAM, protocol))
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        [UDP, UDP_LITE]
            .iter()
            .any(|&protocol| inet::is(file, libc::SOCK_DGRAM, protocol))
    }

    fn check(&self, file: &OpenFile, _dump: &FileDump<'_>) -> Result<()> {
        let socket = file.handle.as_fd();
        options::check(socket)?;
        let corked = socket_option_int(socket, UDP, UDP_CORK).unwrap_or(0) != 0;
        if corked && queue_length(socket, SIOCOUTQ).unwrap_or(0) > 0 {
            return Err(Error::new("carry a UDP socket")
                .object(Ends::of(socket)?.describe())
                .because("it is corked (UDP_CORK) with a datagram begun, which cannot be read")
                .hint("try again when the program has sent it"));
        }
        Ok(())
    }

    fn endpoint(&self, file: &OpenFile) -> Result<Option<Endpoint>> {
        let socket = file.handle.as_fd();
        let identity = Identity::of(socket).context("ask for a socket's type")?;
        Ok(endpoint(identity.protocol, &Ends::of(socket)?))
    }

    fn endpoint_of(&self, entry: &FileEntry) -> Result<Option<Endpoint>> {
        let entry = inet::entry_of(entry)?;
        let any = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
        let any = any.map_err(std::io::Error::from).context("open a socket")?;
        Ok(endpoint(entry.proto as i32, &Ends::of_entry(entry, any)?))
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let socket = file.handle.as_fd();
        let connected = rustix::net::getpeername(socket).is_ok_and(|peer| peer.is_some());
        let state = if connected { state::ESTABLISHED } else { state::CLOSE };
        let mut entry = inet::dump(file, id, state, OPTIONS, &mut dump.shared.socket_defaults)?;
        entry.shutdown = shutdown(socket)?.map(|how| how as i32);
        entry.opts.raw.extend(memberships(socket, entry.family as i32)?);
        datagrams::dump(file, socket, id, dump)?;
        Ok(FileEntry {
            r#type: FdTypes::Inetsk as i32,
            id,
            isk: Some(entry),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = inet::entry_of(entry)?;
        let socket = inet::fresh(entry)?;
        let fd = socket.as_fd();
        datagrams::fill(fd, entry, restore)?;
        inet::prepare(fd, entry, OPTIONS)?;
        let ends = Ends::of_entry(entry, fd)?;
        join(fd, entry)?;
        if ends.local.port() != 0 || !ends.local.ip().is_unspecified() {
            inet::bind(fd, &ends)?;
        }
        if entry.state == state::ESTABLISHED {
            inet::connect(fd, &ends)?;
        }
        if let Some(how) = inet::shutdown_of(entry.shutdown) {
            match rustix::net::shutdown(fd, how) {
                Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
                Err(error) => return Err(std::io::Error::from(error)).context("shut a socket down"),
            }
        }
        inet::complete(fd, entry, OPTIONS)?;
        Ok(socket)
    }

    fn finish(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let isk = inet::entry_of(entry)?;
        match restore.opened.get(&entry.id) {
            // All sockets of the tree are bound by now: those that share a port needed it until here.
            Some(socket) => options::reuse(socket.as_fd(), &isk.opts),
            None => Ok(()),
        }
    }
}

/// Where datagrams come in. The network lock knows none of UDP-Lite.
fn endpoint(protocol: i32, ends: &Ends) -> Option<Endpoint> {
    match (ends.local.port(), ends.remote.port()) {
        _ if protocol != UDP => None,
        (0, _) => None,
        (_, 0) => Some(Endpoint::Datagrams(ends.local)),
        _ => Some(Endpoint::Connection(Connection {
            protocol: Protocol::Udp,
            local: ends.local,
            remote: ends.remote,
        })),
    }
}

/// What can be seen of shutdown(2): that nothing more is received, and that nothing goes in either direction.
fn shutdown(socket: BorrowedFd<'_>) -> Result<Option<SkShutdown>> {
    let mut poll = [PollFd::new(&socket, PollFlags::RDHUP)];
    rustix::event::poll(&mut poll, Some(&rustix::time::Timespec::default()))
        .map_err(std::io::Error::from)
        .context("poll a socket")?;
    let seen = poll[0].revents();
    Ok(if seen.contains(PollFlags::HUP) {
        Some(SkShutdown::Both)
    } else if seen.contains(PollFlags::RDHUP) {
        Some(SkShutdown::Read)
    } else {
        None
    })
}

/// The multicast groups that the socket is a member of. The kernel does not list a socket's groups, but tells of each
/// group whether the socket is in it: so those that anyone in the namespace joined are asked for.
pub(super) fn memberships(socket: BorrowedFd<'_>, family: i32) -> Result<Vec<SkRawOption>> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    let mut found = Vec::new();
    let mut ask = |level: i32, groups: Vec<multicast::Group>| -> Result<()> {
        for group in groups {
            let filter = match multicast_filter(socket, level, group.interface, group.address) {
                // A raw socket of IPv6 knows nothing of IPv4.
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => return Ok(()),
                other => other,
            };
            let filter = filter
                .with(|| Error::new("ask for the membership of a multicast group").object(group.address.to_string()))?;
            found.extend(filter.map(|value| SkRawOption {
                level,
                name: MCAST_MSFILTER,
                value,
                device: Some(group.device),
            }));
        }
        Ok(())
    };
    if family == libc::AF_INET6 {
        ask(libc::IPPROTO_IPV6, multicast::parse_v6(&read("igmp6")))?;
    }
    ask(libc::IPPROTO_IP, multicast::parse_v4(&read("igmp")))?;
    Ok(found)
}

/// Joins the groups of an entry.
pub(super) fn join(socket: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
    for option in entry.opts.raw.iter().filter(|option| option.name == MCAST_MSFILTER) {
        let damaged = || Error::new("join a multicast group").because("the image is damaged");
        let device = option.device.as_deref().ok_or_else(damaged)?;
        let index = options::interface_index(socket, device)?;
        let (head, sources) = option.value.split_at_checked(MODE_AT + 8).ok_or_else(damaged)?;
        let mut request = head[..GROUP_AT + STORAGE].to_vec();
        request[..4].copy_from_slice(&index.to_ne_bytes());
        let failed = || Error::new("join a multicast group").object(format!("on {device}"));
        set_socket_option(socket, option.level, MCAST_JOIN_GROUP, &request).with(failed)?;
        // A membership of all sources has mode 0 and no list; anything else is a filter.
        let plain = head[MODE_AT..MODE_AT + 4] == [0; 4] && sources.is_empty();
        if !plain {
            let mut filter = option.value.clone();
            filter[..4].copy_from_slice(&index.to_ne_bytes());
            set_socket_option(socket, option.level, MCAST_MSFILTER, &filter).with(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
    use std::time::Duration;

    use super::super::testing;
    use super::*;
    use crate::kernel::sys::set_socket_option_int;

    fn carry(sockets: Vec<UdpSocket>) -> (Vec<UdpSocket>, testing::Image) {
        for socket in &sockets {
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        }
        let files = testing::tree(sockets.iter().map(testing::look).collect());
        let image = testing::dump(&files);
        testing::abandon(files, sockets.into_iter().map(OwnedFd::from).collect());
        let moved = testing::resume(testing::open(&image));
        (moved.into_values().map(UdpSocket::from).collect(), image)
    }

    #[test]
    fn a_bound_socket_receives_and_answers() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            let victim = UdpSocket::bind(address).unwrap();
            let address = victim.local_addr().unwrap();
            let victim = carry(vec![victim]).0.remove(0);
            assert_eq!(victim.local_addr().unwrap(), address);
            let peer = UdpSocket::bind((address.ip(), 0)).unwrap();
            peer.send_to(b"hello", address).unwrap();
            let mut buffer = [0; 16];
            let (length, from) = victim.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&b"hello"[..], peer.local_addr().unwrap()));
        }
    }

    #[test]
    fn connected_sockets_stay_connected_and_share_their_port() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        set_socket_option_int(server.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEPORT, 1).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let (mut moved, _) = carry(vec![server, client]);
        let (client, server) = (moved.pop().unwrap(), moved.pop().unwrap());
        assert_eq!(client.peer_addr().unwrap(), server.local_addr().unwrap());
        assert_eq!(
            socket_option_int(client.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(),
            0
        );
        client.send(b"ping").unwrap();
        let mut buffer = [0; 16];
        assert_eq!(server.recv_from(&mut buffer).unwrap().1, client.local_addr().unwrap());
        server.send_to(b"pong", client.local_addr().unwrap()).unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap(), 4);
    }

    #[test]
    fn memberships_and_options_are_carried() {
        let victim = UdpSocket::bind("0.0.0.0:0").unwrap();
        let joined = victim.join_multicast_v4(&"239.1.2.3".parse().unwrap(), &Ipv4Addr::LOCALHOST);
        joined.unwrap();
        victim.set_multicast_ttl_v4(9).unwrap();
        victim.set_broadcast(true).unwrap();
        set_socket_option_int(victim.as_fd(), UDP, 104, 1).unwrap();
        let six = UdpSocket::bind("[::]:0").unwrap();
        six.join_multicast_v6(&"ff02::77".parse::<Ipv6Addr>().unwrap(), 1)
            .unwrap();
        set_socket_option_int(six.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1).unwrap();
        set_socket_option_int(six.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, 1).unwrap();
        let (moved, image) = carry(vec![victim, six]);
        let again = testing::dump(&testing::tree(moved.iter().map(testing::look).collect()));
        for id in [1, 2] {
            let opts = |image: &testing::Image| image.entries[&id].isk.clone().unwrap().opts;
            let raw = |image: &testing::Image| {
                opts(image)
                    .raw
                    .into_iter()
                    .map(|raw| (raw.level, raw.name))
                    .collect::<Vec<_>>()
            };
            assert!(raw(&image).iter().any(|&(_, name)| name == MCAST_MSFILTER));
            assert_eq!(raw(&image), raw(&again));
            assert_eq!(opts(&image), opts(&again));
        }
        assert_eq!(moved[0].multicast_ttl_v4().unwrap(), 9);
    }

    #[test]
    fn a_socket_corked_with_a_datagram_begun_is_refused() {
        let victim = UdpSocket::bind("127.0.0.1:0").unwrap();
        victim.connect(victim.local_addr().unwrap()).unwrap();
        set_socket_option_int(victim.as_fd(), UDP, UDP_CORK, 1).unwrap();
        let dump = || testing::try_dump(&testing::tree(vec![testing::look(&victim)]), &testing::everything());
        assert!(dump().is_ok());
        victim.send(b"begun").unwrap();
        assert!(dump().err().unwrap().chain().contains("UDP_CORK"));
    }

    #[test]
    fn waiting_datagrams_are_carried_with_their_senders_and_later_ones_come_after_them() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let victim = UdpSocket::bind(address).unwrap();
            let address = victim.local_addr().unwrap();
            let peers = [0; 2].map(|_| UdpSocket::bind((address.ip(), 0)).unwrap());
            let mut expected = Vec::new();
            for round in 0..50usize {
                let peer = &peers[round % 2];
                let text = vec![round as u8; 1 + round * 40];
                peer.send_to(&text, address).unwrap();
                expected.push((text, peer.local_addr().unwrap()));
            }
            let mut victim = victim;
            for _ in 0..2 {
                victim = carry(vec![victim]).0.remove(0);
            }
            peers[0].send_to(b"late", address).unwrap();
            expected.push((b"late".to_vec(), peers[0].local_addr().unwrap()));
            let mut buffer = [0; 4096];
            for (text, from) in expected {
                let (length, found) = victim.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], found), (&text[..], from));
            }
            victim.set_nonblocking(true).unwrap();
            assert!(victim.recv(&mut buffer).is_err(), "nothing comes twice");
        }
    }

    #[test]
    fn a_connected_socket_keeps_what_waits_and_its_options() {
        let victim = UdpSocket::bind("127.0.0.1:0").unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        victim.connect(peer.local_addr().unwrap()).unwrap();
        set_socket_option_int(victim.as_fd(), libc::IPPROTO_IP, libc::IP_RECVTTL, 1).unwrap();
        set_socket_option(victim.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo").unwrap();
        peer.send_to(b"early", victim.local_addr().unwrap()).unwrap();
        let (mut moved, image) = carry(vec![victim]);
        let again = testing::dump(&testing::tree(vec![testing::look(&moved[0])]));
        let described = |image: &testing::Image| InetSkEntry {
            ino: 0,
            ..image.entries[&1].isk.clone().unwrap()
        };
        assert_eq!(described(&image), described(&again));
        let victim = moved.remove(0);
        let mut buffer = [0; 16];
        assert_eq!(victim.recv_from(&mut buffer).unwrap(), (5, peer.local_addr().unwrap()));
        assert_eq!(victim.peer_addr().unwrap(), peer.local_addr().unwrap());
    }

    #[test]
    fn a_socket_of_udp_lite_keeps_its_coverage_and_what_waits() {
        let make = || {
            let identity = crate::kernel::socket::Identity {
                family: libc::AF_INET,
                kind: libc::SOCK_DGRAM,
                protocol: UDP_LITE,
            };
            let socket = UdpSocket::from(identity.make().unwrap());
            let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
            rustix::net::bind(&socket, &any).unwrap();
            socket
        };
        let (victim, peer) = (make(), make());
        set_socket_option_int(victim.as_fd(), UDP_LITE, 10, 12).unwrap();
        set_socket_option_int(victim.as_fd(), UDP_LITE, 11, 8).unwrap();
        let address = victim.local_addr().unwrap();
        peer.send_to(b"early", address).unwrap();
        let victim = carry(vec![victim]).0.remove(0);
        let coverage = |name| socket_option_int(victim.as_fd(), UDP_LITE, name).unwrap();
        assert_eq!((coverage(10), coverage(11)), (12, 8));
        peer.send_to(b"late!", address).unwrap();
        let mut buffer = [0; 16];
        for text in [b"early", b"late!"] {
            let found = victim.recv_from(&mut buffer).unwrap();
            assert_eq!(found, (5, peer.local_addr().unwrap()));
            assert_eq!(&buffer[..5], text);
        }
    }

    #[test]
    fn a_socket_shut_for_reading_stays_so() {
        let victim = UdpSocket::bind("127.0.0.1:0").unwrap();
        victim.connect(victim.local_addr().unwrap()).unwrap();
        rustix::net::shutdown(&victim, rustix::net::Shutdown::Both).unwrap();
        let victim = carry(vec![victim]).0.remove(0);
        assert_eq!(victim.recv(&mut [0; 4]).unwrap(), 0);
        assert!(victim.send(b"x").is_err());
    }
}
