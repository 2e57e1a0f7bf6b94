//! UDP sockets: bound or connected, with their memberships of multicast groups.
//!
//! Datagrams that wait to be read are lost, with a warning, as the network may lose any: their senders' addresses have no
//! place in images, and only the network could deliver them again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use whimbrel_images::proto::{FdTypes, FileEntry, InetSkEntry, SkRawOption, SkShutdown};

use super::inet::{self, Ends, state};
use super::options::{self, RawOption, raw_options};
use crate::error::{Context, Error, Result};
use crate::kernel::socket::{
    GROUP_AT, MCAST_JOIN_GROUP, MCAST_MSFILTER, MODE_AT, SIOCOUTQ, STORAGE, multicast_filter, queue_length,
};
use crate::kernel::sys::{set_socket_option, socket_option, socket_option_int};
use crate::procfs::multicast;
use crate::resource::FileKind;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

/// UDP sockets.
pub struct Udp;

const UDP: i32 = libc::IPPROTO_UDP;
const UDP_CORK: i32 = 1;

/// Options of UDP. Memberships are ours alone: see [`memberships`].
static OPTIONS: &[RawOption] = raw_options![
    UDP, UDP_CORK, "UDP_CORK", 4, Late;
    UDP, 100, "UDP_ENCAP", 4, Early;
    UDP, 101, "UDP_NO_CHECK6_TX", 4, Early;
    UDP, 102, "UDP_NO_CHECK6_RX", 4, Early;
    UDP, 103, "UDP_SEGMENT", 4, Early;
    UDP, 104, "UDP_GRO", 4, Early;
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
        inet::entry_is(entry, libc::SOCK_DGRAM, UDP)
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        inet::is(file, libc::SOCK_DGRAM, UDP)
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

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let socket = file.handle.as_fd();
        let connected = rustix::net::getpeername(socket).is_ok_and(|peer| peer.is_some());
        let state = if connected { state::ESTABLISHED } else { state::CLOSE };
        let mut entry = inet::dump(file, id, state, OPTIONS, &mut dump.shared.socket_defaults)?;
        entry.shutdown = shutdown(socket)?.map(|how| how as i32);
        entry.opts.raw.extend(memberships(socket, entry.family as i32)?);
        // SO_MEMINFO: the first word is the memory of what is in the receive queue.
        let queued = socket_option(socket, libc::SOL_SOCKET, 55, 4).unwrap_or_default();
        if queued.iter().any(|&byte| byte != 0) {
            tracing::warn!(
                socket = Ends::of(socket)?.describe(),
                "datagrams that wait to be read are not carried"
            );
        }
        Ok(FileEntry {
            r#type: FdTypes::Inetsk as i32,
            id,
            isk: Some(entry),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = inet::entry_of(entry)?;
        let socket = inet::make(entry, OPTIONS)?;
        let fd = socket.as_fd();
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
fn memberships(socket: BorrowedFd<'_>, family: i32) -> Result<Vec<SkRawOption>> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    let mut found = Vec::new();
    let mut ask = |level: i32, groups: Vec<multicast::Group>| -> Result<()> {
        for group in groups {
            let filter = multicast_filter(socket, level, group.interface, group.address)
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
fn join(socket: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
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
    fn waiting_datagrams_are_lost_and_later_ones_arrive() {
        let victim = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = victim.local_addr().unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        peer.send_to(b"early", address).unwrap();
        let victim = carry(vec![victim]).0.remove(0);
        peer.send_to(b"late", address).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(victim.recv(&mut buffer).unwrap(), 4);
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
