//! Packets that arrive while the network is locked: kept here, and delivered on the host where their sockets live by then.
//!
//! Without that, whoever sent one waits for its retransmission timer, 200 ms at least, however short the freeze was, and a
//! new connection waits a second. The capture is a packet(7) socket, which sees packets before nftables drops them. They
//! are delivered through a raw socket (raw(7)) to an address of this host: such a packet comes in over the loopback device
//! with the sender's own address, and finds its socket as if it had come from outside.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType};

use super::datagram::{Datagram, is_local};
use super::nft::{Connection, Protocol};
use super::socket::attach_filter;

/// Largest IP packet, as it comes out of receive offload.
const LARGEST: usize = 65_535;
/// Bytes that wait in the kernel; more is lost, as the network may lose any.
const ROOM: usize = 8 << 20;
/// Packets that are kept at most.
const MOST: usize = 4096;
/// Ports that the kernel's filter is told; with more, it passes all and we look ourselves.
const FILTERED_PORTS: usize = 1000;

const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Which packets are of interest: those of these connections, and those that begin one with these listeners.
#[derive(Clone, Debug, Default)]
pub struct Interest {
    connections: HashSet<Connection>,
    listeners: HashSet<SocketAddr>,
    datagrams: HashSet<SocketAddr>,
}

impl Interest {
    /// In connections and in listening TCP sockets.
    pub fn new(connections: &[Connection], listeners: &[SocketAddr]) -> Interest {
        let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let connections = connections.iter().map(|connection| Connection {
            protocol: connection.protocol,
            local: canonical(connection.local),
            remote: canonical(connection.remote),
        });
        Interest {
            connections: connections.collect(),
            listeners: listeners.iter().copied().map(canonical).collect(),
            datagrams: HashSet::new(),
        }
    }

    /// And in all datagrams of UDP to these addresses.
    #[must_use]
    pub fn with_datagrams(mut self, sockets: &[SocketAddr]) -> Interest {
        let canonical = |address: &SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        self.datagrams = sockets.iter().map(canonical).collect();
        self
    }

    fn ports(&self) -> Vec<u16> {
        let local = self.connections.iter().map(|connection| connection.local.port());
        let bound = self.listeners.iter().chain(&self.datagrams);
        let mut ports: Vec<u16> = local.chain(bound.map(SocketAddr::port)).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// The header of a packet that is for one of them.
    fn header_of(&self, packet: &[u8]) -> Option<Header> {
        Header::parse(packet).filter(|header| self.wants(header))
    }

    fn wants(&self, header: &Header) -> bool {
        let protocol = if header.protocol == TCP {
            Protocol::Tcp
        } else {
            Protocol::Udp
        };
        let connection = Connection {
            protocol,
            local: header.destination,
            remote: header.source,
        };
        if self.connections.contains(&connection) {
            return true;
        }
        let any = |ip: IpAddr| {
            let unspecified = match ip {
                IpAddr::V4(_) => IpAddr::from([0; 4]),
                IpAddr::V6(_) => IpAddr::from([0; 16]),
            };
            SocketAddr::new(unspecified, header.destination.port())
        };
        // A socket on :: takes what comes over IPv4 as well.
        let listens = [
            header.destination,
            any(header.destination.ip()),
            any(IpAddr::from([0; 16])),
        ];
        let has = |sockets: &HashSet<SocketAddr>| listens.iter().any(|address| sockets.contains(address));
        header.begins && has(&self.listeners) || header.protocol == UDP && has(&self.datagrams)
    }
}

/// What a packet says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) protocol: u8,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    /// Where the transport header begins.
    pub(super) transport: usize,
    /// Where the packet ends; what is behind is padding of the link.
    pub(super) end: usize,
    /// Does it ask for a new TCP connection?
    pub(super) begins: bool,
}

impl Header {
    /// Reads the headers of an IP packet; `None` for fragments, other protocols, IPv6 with extension headers, and nonsense.
    fn parse(packet: &[u8]) -> Option<Header> {
        let word = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
        let (source, destination, protocol, transport, end): (IpAddr, IpAddr, u8, usize, usize) =
            match packet.first()? >> 4 {
                4 => {
                    let ip = |at: usize| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
                    // More fragments, or not the first one.
                    if word(6)? & 0x3fff != 0 {
                        return None;
                    }
                    let header = usize::from(packet[0] & 0xf) * 4;
                    (ip(12)?, ip(16)?, *packet.get(9)?, header, usize::from(word(2)?))
                }
                6 => {
                    let ip = |at: usize| Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into());
                    (ip(8)?, ip(24)?, *packet.get(6)?, 40, 40 + usize::from(word(4)?))
                }
                _ => return None,
            };
        let needed = match protocol {
            TCP => 20,
            UDP => 8,
            _ => return None,
        };
        if transport < 20 || end > packet.len() || end < transport + needed {
            return None;
        }
        let flags = packet[transport + 13.min(needed - 1)];
        Some(Header {
            protocol,
            source: SocketAddr::new(source, word(transport)?),
            destination: SocketAddr::new(destination, word(transport + 2)?),
            transport,
            end,
            begins: protocol == TCP && flags & (FIN | SYN | RST | ACK) == SYN,
        })
    }
}

/// A capture that runs.
#[derive(Debug)]
pub struct Capture {
    sockets: [OwnedFd; 2],
    interest: Interest,
}

impl Capture {
    /// Begins to keep packets that arrive in the network namespace of the calling thread.
    ///
    /// Closing it waits for a grace period of the kernel, some milliseconds: not to be dropped while anybody waits.
    ///
    /// # Errors
    /// EPERM without CAP_NET_RAW.
    pub fn start(interest: Interest) -> io::Result<Capture> {
        let ports = interest.ports();
        let open = |ethernet: i32, ip: u32| {
            // Without a protocol it sees nothing until it has its filter.
            let socket = rustix::net::socket_with(
                AddressFamily::PACKET,
                SocketType::DGRAM,
                rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
                None,
            )?;
            attach_filter(socket.as_fd(), &program(ip, &ports))?;
            // Beyond the limit of net.core.rmem_max where that is allowed.
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, ROOM);
            listen_on_all_devices(&socket, ethernet)?;
            io::Result::Ok(socket)
        };
        Ok(Capture {
            sockets: [open(libc::ETH_P_IP, 4)?, open(libc::ETH_P_IPV6, 6)?],
            interest,
        })
    }

    /// What is of interest.
    pub fn interest(&self) -> &Interest {
        &self.interest
    }

    /// Changes what is of interest; what was not, and arrived before, is lost.
    ///
    /// # Errors
    /// When the kernel does not take the new filter; the old one stays.
    pub fn set_interest(&mut self, interest: Interest) -> io::Result<()> {
        let ports = interest.ports();
        if ports != self.interest.ports() {
            for (socket, ip) in self.sockets.iter().zip([4, 6]) {
                attach_filter(socket.as_fd(), &program(ip, &ports))?;
            }
        }
        self.interest = interest;
        Ok(())
    }

    /// What has arrived since it was last asked: whole IP packets, oldest first.
    pub fn take(&self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut bytes = 0;
        let mut buffer = vec![0; LARGEST];
        for socket in &self.sockets {
            while packets.len() < MOST
                && bytes < ROOM
                && let Ok((length, _)) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty())
            {
                let packet = &buffer[..length];
                if let Some(header) = self.interest.header_of(packet) {
                    packets.push(packet[..header.end].to_vec());
                    bytes += header.end;
                }
            }
        }
        packets
    }
}

/// One instruction of classic BPF, as `attach_filter` takes it.
pub(super) fn instruction(code: u32, jump_true: u8, jump_false: u8, value: u32) -> u64 {
    u64::from(code) | u64::from(jump_true) << 16 | u64::from(jump_false) << 24 | u64::from(value) << 32
}

/// A filter for packets of TCP and UDP to this host and these ports.
fn program(version: u32, ports: &[u16]) -> Vec<u64> {
    use libc::{BPF_ABS, BPF_B, BPF_H, BPF_IND, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET};
    /// SKF_AD_OFF + SKF_AD_PKTTYPE: is it to us, from us, or just passing?
    const PACKET_TYPE: u32 = 0xffff_f000 + 4;
    let load_byte = |at| instruction(BPF_LD | BPF_B | BPF_ABS, 0, 0, at);
    let unless = |value| [instruction(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, value), DROP];
    const DROP: u64 = 0x06;
    const PASS: u64 = 0x06 | 0x3_ffff << 32;
    let mut list = vec![load_byte(PACKET_TYPE)];
    list.extend(unless(u32::from(libc::PACKET_HOST)));
    if version == 4 {
        list.extend([
            instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, 6),
            instruction(BPF_JMP | BPF_JSET | BPF_K, 0, 1, 0x3fff),
            DROP,
        ]);
    }
    list.extend([
        load_byte(if version == 4 { 9 } else { 6 }),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 2, 0, u32::from(TCP)),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 1, 0, u32::from(UDP)),
        DROP,
    ]);
    if ports.len() <= FILTERED_PORTS {
        if version == 4 {
            list.push(instruction(BPF_LDX | BPF_B | BPF_MSH, 0, 0, 0));
            list.push(instruction(BPF_LD | BPF_H | BPF_IND, 0, 0, 2));
        } else {
            list.push(instruction(BPF_LD | BPF_H | BPF_ABS, 0, 0, 42));
        }
        for &port in ports {
            list.extend([instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, u32::from(port)), PASS]);
        }
        list.push(DROP);
    } else {
        list.push(instruction(BPF_RET | BPF_K, 0, 0, 0x3_ffff));
    }
    list
}

fn listen_on_all_devices(socket: &OwnedFd, ethernet: i32) -> io::Result<()> {
    // SAFETY: an address is plain data, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (ethernet as u16).to_be();
    // SAFETY: the address is of the size that is given, and lives until the call returns.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Delivers packets to sockets of the network namespace that the calling thread is in. Packets of no interest are left out:
/// they come from another host, which must not be able to speak to anything but its own tree. Tells how many were delivered.
///
/// # Errors
/// EPERM without CAP_NET_RAW.
pub fn deliver(packets: &[Vec<u8>], interest: &Interest) -> io::Result<usize> {
    let mut delivered = 0;
    let mut sockets: [Option<OwnedFd>; 2] = [None, None];
    let mut local = HashMap::new();
    for packet in packets {
        let Some(header) = interest.header_of(packet) else {
            continue;
        };
        let (index, family) = match header.destination {
            SocketAddr::V4(_) => (0, libc::AF_INET),
            SocketAddr::V6(_) => (1, libc::AF_INET6),
        };
        let socket = match &sockets[index] {
            Some(socket) => socket,
            None => sockets[index].insert(raw_socket(family)?),
        };
        let mut packet = packet[..header.end].to_vec();
        let here = *local
            .entry(header.destination.ip())
            .or_insert_with_key(|&ip| is_local(ip));
        let header = match here {
            true => header,
            // It would go out to the network again, to where it was kept. A socket on any address takes it at another.
            false if header.protocol == UDP && !interest.datagrams.contains(&header.destination) => {
                readdress(&mut packet, header)
            }
            false => {
                tracing::debug!(
                    ?header,
                    "a packet that had been kept is for an address that is not here"
                );
                continue;
            }
        };
        complete_checksum(&mut packet, &header);
        let to = SocketAddr::new(header.destination.ip(), 0);
        // One that cannot be delivered is sent again by its sender in time.
        match rustix::net::sendto(socket, &packet, SendFlags::empty(), &to) {
            Ok(_) => delivered += 1,
            Err(error) => tracing::debug!(%error, ?header, "a packet that had been kept is lost"),
        }
    }
    Ok(delivered)
}

/// Sends a packet to the loopback address instead.
fn readdress(packet: &mut [u8], header: Header) -> Header {
    let ip = match header.destination {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
    };
    match ip {
        // The kernel computes the checksum of the header anew.
        IpAddr::V4(ip) => packet[16..20].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => packet[24..40].copy_from_slice(&ip.octets()),
    }
    Header {
        destination: SocketAddr::new(ip, header.destination.port()),
        ..header
    }
}

/// Is it a datagram of UDP?
pub fn is_datagram(packet: &[u8]) -> bool {
    Header::parse(packet).is_some_and(|header| header.protocol == UDP)
}

/// Of packets that were kept, those that their sockets did not receive as well, in the moment before these were locked:
/// `queues` is what the sockets of datagrams have. TCP does not mind to receive a packet twice.
///
/// Datagrams have no numbers. But of those from one sender to one socket the first were received, and the last were not; so
/// the longest beginning of what was kept that is an end of what was received is the same datagrams.
pub fn not_received(packets: Vec<Vec<u8>>, queues: &[Datagram]) -> Vec<Vec<u8>> {
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let mut received: HashMap<(SocketAddr, SocketAddr), Vec<&[u8]>> = HashMap::new();
    for datagram in queues {
        if let Some(to) = datagram.to {
            let flow = received.entry((canonical(datagram.from), canonical(to)));
            flow.or_default().push(&datagram.bytes);
        }
    }
    let text = |packet: &'_ Vec<u8>| {
        let header = Header::parse(packet).filter(|header| header.protocol == UDP)?;
        let bytes = packet[header.transport + 8..header.end].to_vec();
        Some(((header.source, header.destination), bytes))
    };
    let mut kept: HashMap<(SocketAddr, SocketAddr), Vec<Vec<u8>>> = HashMap::new();
    for (flow, bytes) in packets.iter().filter_map(text) {
        kept.entry(flow).or_default().push(bytes);
    }
    let mut twice: HashMap<(SocketAddr, SocketAddr), usize> = HashMap::new();
    for (flow, kept) in &kept {
        let received = received.get(flow).map_or(&[][..], Vec::as_slice);
        let same = |&count: &usize| received[received.len() - count..].iter().eq(kept[..count].iter());
        let most = kept.len().min(received.len());
        twice.insert(*flow, (0..=most).rev().find(same).unwrap_or(0));
    }
    let mut packets = packets;
    packets.retain(|packet| {
        let count = text(packet).and_then(|(flow, _)| twice.get_mut(&flow));
        match count {
            Some(count) if *count > 0 => {
                *count -= 1;
                false
            }
            _ => true,
        }
    });
    packets
}

/// IPPROTO_RAW: packets are given with their IP header (raw(7)).
pub(super) fn raw_socket(family: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Fills the transport checksum in: with checksum offload it is only begun when a packet is seen here.
pub(super) fn complete_checksum(packet: &mut [u8], header: &Header) {
    let field = header.transport + if header.protocol == TCP { 16 } else { 6 };
    packet[field..field + 2].fill(0);
    let body = &packet[header.transport..];
    let mut sum = u32::from(header.protocol) + body.len() as u32;
    let mut add = |bytes: &[u8]| {
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    };
    for address in [header.source.ip(), header.destination.ip()] {
        match address {
            IpAddr::V4(ip) => add(&ip.octets()),
            IpAddr::V6(ip) => add(&ip.octets()),
        }
    }
    add(body);
    sum = (sum & 0xffff) + (sum >> 16);
    let sum = match !(sum as u16) {
        // Zero stands for "none" in UDP (RFC 768), and for nonsense in UDP-Lite (RFC 3828).
        0 if header.protocol != TCP => 0xffff,
        sum => sum,
    };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
#[path = "capture_tests.rs"]
mod tests;
