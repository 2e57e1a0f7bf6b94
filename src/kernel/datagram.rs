//! Datagrams that wait in the queue of a UDP socket: looked at without taking them, and put into the queue of another.
//!
//! The kernel has no call for the second. But a datagram that is sent through a raw socket (raw(7)) to an address of this host
//! comes in over the loopback device with the sender that its header names; and a UDP socket keeps its queue when it is
//! disconnected, which also gives back a port that the kernel had chosen (udp(7), connect(2): AF_UNSPEC). So a socket that is not
//! bound yet gets any port, takes its datagrams there, where nobody but us sends, and is as new afterwards, but for its queue.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;

use super::capture::{Header, complete_checksum, instruction, raw_socket};
use super::message::receive_with;
use super::netlink::{Messages, NLM_F_REQUEST, NLMSG_ERROR, Socket, Writer, truncated};
use super::section;
use super::socket::{Identity, attach_filter, connect_raw};
use super::sys::{set_socket_option_int, socket_option, socket_option_int};

/// No datagram is larger.
const LARGEST: usize = 65_535;
/// The most bytes of a datagram of IPv6 that the loopback device takes in one piece.
pub const LARGEST_V6: usize = 65_536 - 40 - 8;
/// How long a datagram may take from the raw socket to the queue: other work of the same processor goes first.
const ARRIVAL: Duration = Duration::from_secs(1);
/// `SO_MEMINFO`; its first word is the memory of what is in the receive queue.
const SO_MEMINFO: i32 = 55;

const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
/// `IP_ORIGDSTADDR`, `IP_RECVORIGDSTADDR`.
const IP_RECVORIGDSTADDR: i32 = 20;
/// `IPV6_ORIGDSTADDR`, `IPV6_RECVORIGDSTADDR`.
const IPV6_RECVORIGDSTADDR: i32 = 74;
const UDP_GRO: i32 = 104;

/// What the kernel is asked to tell with each datagram.
const ASK_V4: [(i32, i32); 3] = [(IP, IP_RECVORIGDSTADDR), (IP, libc::IP_RECVTTL), (IP, libc::IP_RECVTOS)];
const ASK_V6: [(i32, i32); 3] = [
    (IP6, IPV6_RECVORIGDSTADDR),
    (IP6, libc::IPV6_RECVHOPLIMIT),
    (IP6, libc::IPV6_RECVTCLASS),
];

/// A datagram in a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// Where it was sent to, where that is known.
    pub to: Option<SocketAddr>,
    /// Its time to live, or hop limit.
    pub hops: u8,
    /// Its type of service, or traffic class.
    pub class: u8,
    /// What it says.
    pub bytes: Vec<u8>,
}

/// A queue.
#[derive(Debug, Default)]
pub struct Queue {
    /// Oldest first.
    pub datagrams: Vec<Datagram>,
    /// An error that waited for the program (SO_ERROR). To look is to take it.
    pub error: Option<io::Error>,
}

/// Bytes of memory that the receive queue of a socket takes.
pub fn queue_memory(socket: BorrowedFd<'_>) -> u32 {
    let words = socket_option(socket, libc::SOL_SOCKET, SO_MEMINFO, 4).unwrap_or_default();
    words.first_chunk().map_or(0, |word| u32::from_ne_bytes(*word))
}

/// Copies what is in the queue of a UDP socket. An empty datagram that somebody has looked at before is not seen: the kernel
/// takes it for one that is behind the place to look at (SO_PEEK_OFF).
///
/// # Errors
/// When the queue cannot be read.
pub fn peek_all(socket: BorrowedFd<'_>) -> io::Result<Queue> {
    let memory = queue_memory(socket) as usize;
    if memory == 0 {
        return Ok(Queue::default());
    }
    let six = Identity::of(socket)?.family == libc::AF_INET6;
    let ask: Vec<(i32, i32)> = if six {
        [ASK_V6, ASK_V4].concat()
    } else {
        ASK_V4.to_vec()
    };
    let before: Vec<i32> = ask
        .iter()
        .map(|&(level, name)| socket_option_int(socket, level, name))
        .collect::<io::Result<_>>()?;
    let offset = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
    let mut buffer = vec![0u8; memory + 2 * LARGEST];
    let mut found: Vec<(usize, Attached)> = Vec::with_capacity(memory / 256 + 64);
    // The program's options must be what they were, whatever becomes of this process.
    let error = section::unstoppable(|| -> io::Result<Option<io::Error>> {
        let set = || -> io::Result<()> {
            set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
            ask.iter()
                .try_for_each(|&(level, name)| set_socket_option_int(socket, level, name, 1))
        };
        let result = set().and_then(|()| read_all(socket, &mut buffer, &mut found));
        let mut back = set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset);
        for (&(level, name), &value) in ask.iter().zip(&before).filter(|&(_, &value)| value == 0) {
            back = back.and(set_socket_option_int(socket, level, name, value));
        }
        let error = result?;
        back.map(|()| error)
    })?;
    let (mut datagrams, mut at) = (Vec::new(), 0);
    for (length, attached) in found {
        let bytes = &buffer[at..at + length];
        at += length;
        // Datagrams that the kernel joined (UDP_GRO) are told apart by their size.
        let size = attached.segment.filter(|&size| size > 0).unwrap_or(length.max(1));
        let datagram = |bytes: &[u8]| Datagram {
            from: attached.from,
            to: attached.to,
            hops: attached.hops,
            class: attached.class,
            bytes: bytes.to_vec(),
        };
        match bytes {
            [] => datagrams.push(datagram(bytes)),
            _ => datagrams.extend(bytes.chunks(size).map(datagram)),
        }
    }
    Ok(Queue { datagrams, error })
}

/// What comes with a datagram.
#[derive(Clone, Copy, Debug)]
struct Attached {
    from: SocketAddr,
    to: Option<SocketAddr>,
    hops: u8,
    class: u8,
    segment: Option<usize>,
}

/// Reads until the end of the queue, one behind the other. Gives the error that waited, if one did.
fn read_all(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    found: &mut Vec<(usize, Attached)>,
) -> io::Result<Option<io::Error>> {
    let (mut at, mut waited) = (0, None);
    while let Some(room) = buffer.get_mut(at..at + LARGEST) {
        match peek(socket, room) {
            Ok(Some((length, attached))) => {
                found.push((length, attached));
                at += length;
            }
            Ok(None) => break,
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
            // It is told once, before what is in the queue.
            Err(error) if waited.is_none() => waited = Some(error),
            Err(error) => return Err(error),
        }
    }
    Ok(waited)
}

/// The datagram at the peek offset; `None` where there is only an end.
fn peek(socket: BorrowedFd<'_>, room: &mut [u8]) -> io::Result<Option<(usize, Attached)>> {
    let (mut to, mut hops, mut class, mut segment) = (None, 64, 0, None);
    let received = receive_with(socket, room, libc::MSG_PEEK, |(level, kind), data| {
        let int = data.first_chunk().map(|word| i32::from_ne_bytes(*word));
        match (level, kind, int) {
            (IP, IP_RECVORIGDSTADDR, _) | (IP6, IPV6_RECVORIGDSTADDR, _) => to = address(data),
            (IP, libc::IP_TTL, Some(value)) | (IP6, libc::IPV6_HOPLIMIT, Some(value)) => hops = value as u8,
            (IP, libc::IP_TOS, _) => class = data.first().copied().unwrap_or(0),
            (IP6, libc::IPV6_TCLASS, Some(value)) => class = value as u8,
            (libc::IPPROTO_UDP, UDP_GRO, Some(value)) => segment = usize::try_from(value).ok(),
            _ => {}
        }
    })?;
    let attached = |from| Attached {
        from,
        to,
        hops,
        class,
        segment,
    };
    Ok(address(received.name()).map(|from| (received.length, attached(from))))
}

/// A `sockaddr_in` or `sockaddr_in6`.
fn address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*bytes.first_chunk()?);
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = bytes.get(4..8)?.try_into().ok()?;
            Some(SocketAddr::new(Ipv4Addr::from(octets).into(), port))
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            let scope = u32::from_ne_bytes(bytes.get(24..28)?.try_into().ok()?);
            Some(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope).into())
        }
        _ => None,
    }
}

/// What became of datagrams that were put into a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Put {
    /// They did not arrive.
    pub lost: usize,
    /// They arrived, but say that they were sent to the loopback address: theirs is not one of this host's.
    pub readdressed: usize,
}

/// Puts datagrams into the queue of `socket`, which must be new and not bound, and have room for them.
///
/// # Errors
/// EPERM without CAP_NET_RAW, ENODEV without a loopback device.
pub fn put_all(socket: BorrowedFd<'_>, datagrams: &[Datagram]) -> io::Result<Put> {
    let mut put = Put::default();
    if datagrams.is_empty() {
        return Ok(put);
    }
    let identity = Identity::of(socket)?;
    // Nothing comes to it from other hosts meanwhile. To bind it to the device would not do: what is sent to an address of
    // another one comes in over the loopback device, and is taken for the other's.
    let loopback = rustix::net::netdevice::name_to_index(socket, "lo")?;
    attach_filter(socket, &only_from(loopback))?;
    let any = match identity.family {
        libc::AF_INET6 => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
        _ => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
    };
    rustix::net::bind(socket, &any)?;
    let port = SocketAddr::try_from(rustix::net::getsockname(socket)?)?.port();
    let mut raw: [Option<OwnedFd>; 2] = [None, None];
    for datagram in datagrams {
        let from = SocketAddr::new(datagram.from.ip().to_canonical(), datagram.from.port());
        let wanted = datagram.to.map(|to| to.ip().to_canonical());
        let to = match wanted.filter(|&ip| ip.is_ipv4() == from.is_ipv4() && is_local(ip)) {
            Some(ip) => ip,
            None => {
                put.readdressed += 1;
                match from.ip() {
                    IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                    IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
                }
            }
        };
        let (index, family) = match from.ip() {
            IpAddr::V4(_) => (0, libc::AF_INET),
            IpAddr::V6(_) => (1, libc::AF_INET6),
        };
        let through = match &raw[index] {
            Some(socket) => socket,
            None => raw[index].insert(raw_socket(family)?),
        };
        let packet = packet_of(datagram, from, SocketAddr::new(to, port), identity.protocol as u8);
        let before = queue_memory(socket);
        let sent = rustix::net::sendto(through, &packet, SendFlags::empty(), &SocketAddr::new(to, 0));
        // Where one got lost (to a packet filter), so will others: they are not waited for.
        let patience = if put.lost == 0 { ARRIVAL } else { Duration::ZERO };
        if sent.is_err() || !arrives(socket, before, patience) {
            put.lost += 1;
        }
    }
    // connect(2) to nowhere (AF_UNSPEC) gives back a port that was not asked for.
    connect_raw(socket, &[0; 16])?;
    set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0)?;
    Ok(put)
}

/// A filter for packets of one device.
fn only_from(device: u32) -> [u64; 4] {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    /// SKF_AD_OFF + SKF_AD_IFINDEX.
    const INDEX: u32 = 0xffff_f000 + 8;
    [
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, INDEX),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, device),
        instruction(BPF_RET | BPF_K, 0, 0, u32::MAX),
        instruction(BPF_RET | BPF_K, 0, 0, 0),
    ]
}

fn arrives(socket: BorrowedFd<'_>, before: u32, patience: Duration) -> bool {
    let started = Instant::now();
    loop {
        if queue_memory(socket) != before {
            return true;
        }
        if started.elapsed() >= patience {
            return false;
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// Is it an address of this host? Only the routing table knows: a program may bind to others (net.ipv4.ip_nonlocal_bind), and
/// what is sent to an address may come from another one.
pub(super) fn is_local(ip: IpAddr) -> bool {
    const GET_ROUTE: u16 = 26;
    const DESTINATION: u16 = 1;
    /// Where `struct rtmsg` has the type of a route, and the type of those to this host.
    const TYPE: usize = 7;
    let (family, octets) = match ip {
        IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
    };
    let kind = || -> io::Result<u8> {
        let socket = Socket::new(libc::NETLINK_ROUTE)?;
        let mut request = Writer::default();
        let fixed = [family as u8, octets.len() as u8 * 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        request.message(GET_ROUTE, NLM_F_REQUEST, 1, &fixed, |message| {
            message.bytes(DESTINATION, &octets)
        });
        socket.send(&request.finish())?;
        let mut buffer = Vec::new();
        let answer = Messages(socket.receive(&mut buffer)?)
            .next()
            .ok_or_else(|| truncated("answer"))??;
        match answer.kind {
            NLMSG_ERROR => Err(answer.error().unwrap_or_else(|| truncated("answer"))),
            _ => answer.payload.get(TYPE).copied().ok_or_else(|| truncated("route")),
        }
    };
    kind().is_ok_and(|kind| kind == libc::RTN_LOCAL)
}

/// The IP packet of a datagram.
fn packet_of(datagram: &Datagram, from: SocketAddr, to: SocketAddr, protocol: u8) -> Vec<u8> {
    let length = datagram.bytes.len() + 8;
    let mut packet = match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let whole = ((20 + length) as u16).to_be_bytes();
            let mut header = vec![0x45, datagram.class, whole[0], whole[1], 0, 0, 0, 0];
            header.extend([datagram.hops, protocol, 0, 0]);
            header.extend([source.octets(), destination.octets()].concat());
            header
        }
        (source, destination) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            let part = (length as u16).to_be_bytes();
            let mut header = vec![0x60 | datagram.class >> 4, datagram.class << 4, 0, 0];
            header.extend([part[0], part[1], protocol, datagram.hops]);
            header.extend([octets(source), octets(destination)].concat());
            header
        }
    };
    let header = Header {
        protocol,
        source: from,
        destination: to,
        transport: packet.len(),
        end: packet.len() + length,
        begins: false,
    };
    packet.extend(from.port().to_be_bytes());
    packet.extend(to.port().to_be_bytes());
    // In UDP-Lite this is how much the checksum covers, all of which 0 says as well (RFC 3828).
    packet.extend((length as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(&datagram.bytes);
    complete_checksum(&mut packet, &header);
    packet
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::super::nft::tests::in_fresh_netns;
    use super::*;

    fn queue_of(socket: &impl AsFd) -> Vec<Datagram> {
        peek_all(socket.as_fd()).unwrap().datagrams
    }

    fn fresh(family: i32, protocol: i32) -> OwnedFd {
        let kind = libc::SOCK_DGRAM;
        Identity { family, kind, protocol }.make().unwrap()
    }

    #[test]
    fn a_queue_is_put_into_another_socket_with_senders_boundaries_and_order() {
        in_fresh_netns(|| {
            // A port each: a child that another test has just forked may still hold the socket before.
            for (family, from, to, ours) in [
                (libc::AF_INET, "10.9.8.7:1234", "127.0.0.5:53", "127.0.0.1:99"),
                (libc::AF_INET6, "[2001:db8::7]:1234", "[::1]:53", "[::1]:98"),
                (libc::AF_INET6, "10.9.8.7:1234", "127.0.0.1:53", "[::1]:97"),
            ] {
                for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE] {
                    let datagram = |bytes: Vec<u8>| Datagram {
                        from: from.parse().unwrap(),
                        to: Some(to.parse().unwrap()),
                        hops: 7,
                        class: 0x20,
                        bytes,
                    };
                    let texts = [b"one".to_vec(), vec![], vec![7; 65_000], b"odd".to_vec()];
                    let sent: Vec<Datagram> = texts.into_iter().map(datagram).collect();
                    let socket = fresh(family, protocol);
                    set_socket_option_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 1 << 20).unwrap();
                    assert_eq!(
                        put_all(socket.as_fd(), &sent).unwrap(),
                        Put::default(),
                        "{from} {protocol}"
                    );
                    // It can be bound like a new one, and nobody has its port any more.
                    rustix::net::bind(&socket, &ours.parse::<SocketAddr>().unwrap()).unwrap();
                    let found = queue_of(&socket);
                    assert_eq!(found.len(), 4);
                    for (found, sent) in found.iter().zip(&sent) {
                        assert_eq!(
                            (&found.bytes, found.hops, found.class, found.from.port()),
                            (&sent.bytes, 7, 0x20, 1234)
                        );
                        assert_eq!(found.from.ip().to_canonical(), sent.from.ip());
                        assert_eq!(found.to.unwrap().ip().to_canonical(), sent.to.unwrap().ip());
                    }
                }
            }
        });
    }

    #[test]
    fn looking_takes_nothing_and_changes_no_option() {
        let victim = UdpSocket::bind("127.0.0.1:0").unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        set_socket_option_int(victim.as_fd(), IP, libc::IP_RECVTTL, 1).unwrap();
        set_socket_option_int(victim.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, 2).unwrap();
        peer.send_to(b"first", victim.local_addr().unwrap()).unwrap();
        peer.send_to(b"second", victim.local_addr().unwrap()).unwrap();
        for _ in 0..2 {
            let found = queue_of(&victim);
            assert_eq!(found[0].from, peer.local_addr().unwrap());
            assert_eq!(found[0].to, Some(victim.local_addr().unwrap()));
            assert_eq!(
                (&found[0].bytes[..], &found[1].bytes[..]),
                (&b"first"[..], &b"second"[..])
            );
        }
        let option = |level, name| socket_option_int(victim.as_fd(), level, name).unwrap();
        assert_eq!((option(IP, libc::IP_RECVTTL), option(IP, libc::IP_RECVTOS)), (1, 0));
        assert_eq!(option(libc::SOL_SOCKET, libc::SO_PEEK_OFF), 2);
        let mut buffer = [0; 16];
        assert_eq!(victim.recv(&mut buffer).unwrap(), 5);
    }

    #[test]
    fn an_error_that_waits_is_told_and_the_queue_read_all_the_same() {
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let victim = UdpSocket::bind("127.0.0.1:0").unwrap();
        victim.connect(peer.local_addr().unwrap()).unwrap();
        peer.send_to(b"said", victim.local_addr().unwrap()).unwrap();
        drop(peer);
        victim.send(b"nobody there").unwrap();
        let queue = peek_all(victim.as_fd()).unwrap();
        assert_eq!(queue.error.unwrap().raw_os_error(), Some(libc::ECONNREFUSED));
        assert_eq!(queue.datagrams[0].bytes, b"said");
    }

    #[test]
    fn a_datagram_to_an_address_that_is_not_here_is_readdressed_and_does_not_leave_the_host() {
        in_fresh_netns(|| {
            let datagram = Datagram {
                from: "10.9.8.7:1234".parse().unwrap(),
                to: Some("239.1.2.3:53".parse().unwrap()),
                hops: 1,
                class: 0,
                bytes: b"to all".to_vec(),
            };
            let socket = fresh(libc::AF_INET, libc::IPPROTO_UDP);
            let put = put_all(socket.as_fd(), std::slice::from_ref(&datagram)).unwrap();
            assert_eq!(
                put,
                Put {
                    lost: 0,
                    readdressed: 1
                }
            );
            assert_eq!(queue_of(&socket)[0].bytes, datagram.bytes);
            assert!(is_local("127.0.0.9".parse().unwrap()) && !is_local("10.9.8.7".parse().unwrap()));
        });
    }
}
