//! What TCP and UDP sockets share: addresses, options of IPv4 and IPv6, the entry in images.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};

use whimbrel_images::proto::{FdTypes, FileEntry, InetSkEntry, IpOptsEntry, SkOptsEntry, SkShutdown};

use super::options::{self, Defaults, RawOption, raw_options};
use crate::error::{Context, Error, Result};
use crate::kernel::socket::{Identity, with_option};
use crate::kernel::sys::{set_socket_option_int, socket_option_int};
use crate::resource::fd::OpenFile;

/// States as the kernel and images number them; UDP sockets use two of them.
pub mod state {
    /// Connected.
    pub const ESTABLISHED: u32 = 1;
    /// A connection is being asked for.
    pub const SYN_SENT: u32 = 2;
    /// A connection was asked for by the other end.
    pub const SYN_RECV: u32 = 3;
    /// We closed; the other end did not confirm it yet.
    pub const FIN_WAIT1: u32 = 4;
    /// We closed, and the other end knows.
    pub const FIN_WAIT2: u32 = 5;
    /// Not connected.
    pub const CLOSE: u32 = 7;
    /// The other end closed.
    pub const CLOSE_WAIT: u32 = 8;
    /// The other end closed, then we did, which it did not confirm yet.
    pub const LAST_ACK: u32 = 9;
    /// Waiting for connections.
    pub const LISTEN: u32 = 10;
    /// Both closed at the same time; the other end did not confirm ours yet.
    pub const CLOSING: u32 = 11;
}

/// The network namespace's id in images: trees with several are refused when they are collected.
pub const NETWORK_NAMESPACE: u32 = 2;

const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;

/// Options of IPv4 that images have no field for.
static IPV4: &[RawOption] = raw_options![
    IP, libc::IP_OPTIONS, "IP_OPTIONS", 40, Early;
    IP, libc::IP_RECVOPTS, "IP_RECVOPTS", 4, Early;
    IP, libc::IP_RETOPTS, "IP_RETOPTS", 4, Early;
    IP, libc::IP_MTU_DISCOVER, "IP_MTU_DISCOVER", 4, Early;
    IP, libc::IP_RECVERR, "IP_RECVERR", 4, Early;
    IP, libc::IP_RECVTTL, "IP_RECVTTL", 4, Early;
    IP, libc::IP_RECVTOS, "IP_RECVTOS", 4, Early;
    IP, libc::IP_PASSSEC, "IP_PASSSEC", 4, Early;
    IP, libc::IP_TRANSPARENT, "IP_TRANSPARENT", 4, Early;
    IP, libc::IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR", 4, Early;
    IP, libc::IP_MINTTL, "IP_MINTTL", 4, Early;
    IP, libc::IP_BIND_ADDRESS_NO_PORT, "IP_BIND_ADDRESS_NO_PORT", 4, Early;
    IP, 25, "IP_RECVFRAGSIZE", 4, Early;
    IP, 50, "IP_UNICAST_IF", 4, Interface;
    IP, 51, "IP_LOCAL_PORT_RANGE", 4, Early;
];

/// Options of IPv6 that images have no field for.
static IPV6: &[RawOption] = raw_options![
    IP6, libc::IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS", 4, Early;
    IP6, libc::IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER", 4, Early;
    IP6, libc::IPV6_RECVERR, "IPV6_RECVERR", 4, Early;
    IP6, libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO", 4, Early;
    IP6, libc::IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT", 4, Early;
    IP6, libc::IPV6_RECVHOPOPTS, "IPV6_RECVHOPOPTS", 4, Early;
    IP6, libc::IPV6_RECVRTHDR, "IPV6_RECVRTHDR", 4, Early;
    IP6, libc::IPV6_RECVDSTOPTS, "IPV6_RECVDSTOPTS", 4, Early;
    IP6, 60, "IPV6_RECVPATHMTU", 4, Early;
    IP6, libc::IPV6_DONTFRAG, "IPV6_DONTFRAG", 4, Early;
    IP6, libc::IPV6_RECVTCLASS, "IPV6_RECVTCLASS", 4, Early;
    IP6, libc::IPV6_TCLASS, "IPV6_TCLASS", 4, Early;
    IP6, 70, "IPV6_AUTOFLOWLABEL", 4, Early;
    IP6, libc::IPV6_ADDR_PREFERENCES, "IPV6_ADDR_PREFERENCES", 4, Early;
    IP6, libc::IPV6_MINHOPCOUNT, "IPV6_MINHOPCOUNT", 4, Early;
    IP6, 74, "IPV6_RECVORIGDSTADDR", 4, Early;
    IP6, libc::IPV6_TRANSPARENT, "IPV6_TRANSPARENT", 4, Early;
    IP6, 76, "IPV6_UNICAST_IF", 4, Interface;
    IP6, libc::IPV6_FREEBIND, "IPV6_FREEBIND", 4, Early;
];

/// Those of IPv4 about multicast, which sockets of streams do not have.
static MULTICAST_V4: &[RawOption] = raw_options![
    IP, libc::IP_MULTICAST_IF, "IP_MULTICAST_IF", 4, Early;
    IP, libc::IP_MULTICAST_TTL, "IP_MULTICAST_TTL", 4, Early;
    IP, libc::IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP", 4, Early;
    IP, libc::IP_MULTICAST_ALL, "IP_MULTICAST_ALL", 4, Early;
];

/// Those of IPv6 about multicast.
static MULTICAST_V6: &[RawOption] = raw_options![
    IP6, libc::IPV6_MULTICAST_IF, "IPV6_MULTICAST_IF", 4, Interface;
    IP6, libc::IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS", 4, Early;
    IP6, libc::IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP", 4, Early;
    IP6, 29, "IPV6_MULTICAST_ALL", 4, Early;
];

/// The tables of a socket, and those of its kind. A socket of IPv6 talks IPv4 too, so it has both.
fn tables(identity: Identity, own: &[RawOption]) -> Vec<&[RawOption]> {
    let six = identity.family == libc::AF_INET6;
    let multicast = identity.kind != libc::SOCK_STREAM;
    let all = [
        (own, true),
        (IPV4, true),
        (IPV6, six),
        (MULTICAST_V4, multicast),
        (MULTICAST_V6, multicast && six),
    ];
    all.into_iter()
        .filter_map(|(table, wanted)| wanted.then_some(table))
        .collect()
}

/// Is the file a socket of IPv4 or IPv6, of this type and protocol?
pub fn is(file: &OpenFile, kind: i32, protocol: i32) -> bool {
    file.file_type() == libc::S_IFSOCK
        && Identity::of(file.handle.as_fd()).is_ok_and(|identity| {
            matches!(identity.family, libc::AF_INET | libc::AF_INET6)
                && (identity.kind, identity.protocol) == (kind, protocol)
        })
}

/// Is the entry of such a socket?
pub fn entry_is(entry: &FileEntry, kind: i32, protocol: i32) -> bool {
    let of = |isk: &InetSkEntry| (isk.r#type, isk.proto) == (kind as u32, protocol as u32);
    entry.r#type() == FdTypes::Inetsk && entry.isk.as_ref().is_some_and(of)
}

/// The entry of a file.
///
/// # Errors
/// When it has none.
pub fn entry_of(entry: &FileEntry) -> Result<&InetSkEntry> {
    entry
        .isk
        .as_ref()
        .ok_or_else(|| Error::new("restore a socket").because("the image has no entry of an inet socket"))
}

/// The two addresses of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Its own.
    pub local: SocketAddr,
    /// The other end's; the unspecified address with port 0 when it has none.
    pub remote: SocketAddr,
}

impl Ends {
    /// Of a socket.
    ///
    /// # Errors
    /// ENOTSOCK.
    pub fn of(socket: BorrowedFd<'_>) -> Result<Ends> {
        let local = rustix::net::getsockname(socket)
            .map_err(io::Error::from)
            .context("ask for a socket's address")?;
        let local = SocketAddr::try_from(local)
            .map_err(io::Error::from)
            .context("ask for a socket's address")?;
        let unspecified = match local {
            SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        // ENOTCONN says that there is none, or none any more.
        let remote = rustix::net::getpeername(socket)
            .ok()
            .and_then(|any| SocketAddr::try_from(any?).ok())
            .unwrap_or(SocketAddr::new(unspecified, 0));
        Ok(Ends { local, remote })
    }

    /// Of an entry; `socket` is any, to look up interfaces.
    ///
    /// # Errors
    /// When the entry is damaged, or an interface is missing here.
    pub fn of_entry(entry: &InetSkEntry, socket: impl AsFd) -> Result<Ends> {
        let damaged = || Error::new("restore a socket").because("the image has a damaged address");
        let scope = match &entry.ifname {
            Some(name) => options::interface_index(socket, name)?,
            None => 0,
        };
        let address = |words: &[u32], port: u32| -> Result<SocketAddr> {
            let port = u16::try_from(port).map_err(|_| damaged())?;
            let octets: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            match entry.family as i32 {
                libc::AF_INET => {
                    let octets: [u8; 4] = octets[..].try_into().map_err(|_| damaged())?;
                    Ok((octets, port).into())
                }
                libc::AF_INET6 => {
                    let octets: [u8; 16] = octets[..].try_into().map_err(|_| damaged())?;
                    let ip = Ipv6Addr::from(octets);
                    Ok(SocketAddrV6::new(ip, port, 0, if needs_scope(ip) { scope } else { 0 }).into())
                }
                _ => Err(damaged()),
            }
        };
        Ok(Ends {
            local: address(&entry.src_addr, entry.src_port)?,
            remote: address(&entry.dst_addr, entry.dst_port)?,
        })
    }

    /// `10.0.0.2:6379 ↔ 10.0.0.3:40000`, for messages.
    pub fn describe(&self) -> String {
        if self.remote.port() == 0 {
            return self.local.to_string();
        }
        format!("{} ↔ {}", self.local, self.remote)
    }
}

/// Link-local addresses mean nothing without an interface.
fn needs_scope(ip: Ipv6Addr) -> bool {
    ip.is_unicast_link_local() || (ip.is_multicast() && ip.octets()[1] & 0x0f <= 2)
}

/// The words of an address as images have them: in network byte order in memory.
pub fn words(ip: IpAddr) -> Vec<u32> {
    let octets = match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    octets
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()))
        .collect()
}

/// The address of such words.
pub fn ip_of(words: &[u32]) -> Option<IpAddr> {
    let octets: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let v4 = <[u8; 4]>::try_from(&octets[..]).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(&octets[..]).map(IpAddr::from)).ok()
}

/// Describes a socket: addresses, and the options of all levels. The kind adds what is its own.
///
/// # Errors
/// When an option cannot be read.
pub fn dump(file: &OpenFile, id: u32, state: u32, own: &[RawOption], defaults: &mut Defaults) -> Result<InetSkEntry> {
    let socket = file.handle.as_fd();
    let identity = Identity::of(socket).context("ask for a socket's type")?;
    let ends = Ends::of(socket)?;
    let mut opts = options::dump(socket, &tables(identity, own), defaults)?;
    resolve_multicast_interface(&mut opts, identity.family);
    let int = |level, name| socket_option_int(socket, level, name).ok();
    let scope = match (ends.local, ends.remote) {
        (SocketAddr::V6(local), SocketAddr::V6(remote)) => local.scope_id().max(remote.scope_id()),
        _ => 0,
    };
    let ifname = match scope {
        0 => None,
        index => Some(options::interface_name(socket, index)?),
    };
    let on = |value: Option<i32>| value.filter(|&value| value != 0).map(|_| true);
    Ok(InetSkEntry {
        id,
        ino: file.stat.st_ino as u32,
        family: identity.family as u32,
        r#type: identity.kind as u32,
        proto: identity.protocol as u32,
        state,
        src_port: u32::from(ends.local.port()),
        dst_port: u32::from(ends.remote.port()),
        flags: file.flags(),
        backlog: 0,
        src_addr: words(ends.local.ip()),
        dst_addr: words(ends.remote.ip()),
        fown: file.owner(),
        opts,
        v6only: (identity.family == libc::AF_INET6)
            .then(|| int(IP6, libc::IPV6_V6ONLY).map(|value| value != 0))
            .flatten(),
        ip_opts: Some(IpOptsEntry {
            freebind: on(int(IP, libc::IP_FREEBIND)),
            raw: None,
            pktinfo: on(int(IP, libc::IP_PKTINFO)),
            tos: int(IP, libc::IP_TOS).filter(|&tos| tos != 0).map(|tos| tos as u32),
            ttl: int(IP, libc::IP_TTL).map(|ttl| ttl as u32),
        }),
        ifname,
        ns_id: Some(NETWORK_NAMESPACE),
        shutdown: None,
        tcp_opts: None,
    })
}

/// IP_MULTICAST_IF of an IPv6 socket is no option that can be set to what it tells: leave out what says nothing.
fn resolve_multicast_interface(opts: &mut SkOptsEntry, family: i32) {
    if family == libc::AF_INET6 {
        opts.raw
            .retain(|option| (option.level, option.name) != (IP, libc::IP_MULTICAST_IF));
    }
}

fn identity_of(entry: &InetSkEntry) -> Identity {
    Identity {
        family: entry.family as i32,
        kind: entry.r#type as i32,
        protocol: entry.proto as i32,
    }
}

/// Makes the socket of an entry and sets what must be set before it is bound.
///
/// # Errors
/// When the socket cannot be made, or an option not be set.
pub fn make(entry: &InetSkEntry, own: &[RawOption]) -> Result<std::os::fd::OwnedFd> {
    let socket = fresh(entry)?;
    prepare(socket.as_fd(), entry, own)?;
    Ok(socket)
}

/// Makes the socket of an entry, and no more.
///
/// # Errors
/// When it cannot be made.
pub fn fresh(entry: &InetSkEntry) -> Result<std::os::fd::OwnedFd> {
    identity_of(entry).make().context("make a socket")
}

/// Sets what must be set before a socket is bound.
///
/// # Errors
/// When an option cannot be set.
pub fn prepare(fd: BorrowedFd<'_>, entry: &InetSkEntry, own: &[RawOption]) -> Result<()> {
    let identity = identity_of(entry);
    let set = |level, name, text: &str, value: i32| {
        set_socket_option_int(fd, level, name, value).with(|| Error::new("set a socket option").object(text))
    };
    if let Some(v6only) = entry.v6only.filter(|_| identity.family == libc::AF_INET6) {
        // Raw sockets cannot be told, nor need they be.
        if socket_option_int(fd, IP6, libc::IPV6_V6ONLY).ok() != Some(i32::from(v6only)) {
            set(IP6, libc::IPV6_V6ONLY, "IPV6_V6ONLY", i32::from(v6only))?;
        }
    }
    if let Some(ip) = &entry.ip_opts {
        if let Some(tos) = ip.tos {
            set(IP, libc::IP_TOS, "IP_TOS", tos as i32)?;
        }
        // 0 is told by no kernel, and refused by all.
        if let Some(ttl) = ip.ttl.filter(|&ttl| ttl != 0) {
            set(IP, libc::IP_TTL, "IP_TTL", ttl as i32)?;
        }
        if ip.pktinfo == Some(true) {
            set(IP, libc::IP_PKTINFO, "IP_PKTINFO", 1)?;
        }
        if ip.freebind == Some(true) {
            set(IP, libc::IP_FREEBIND, "IP_FREEBIND", 1)?;
        }
    }
    options::before(fd, &entry.opts, &tables(identity, own))
}

/// Sets what is set last but SO_REUSEADDR, and the file's flags and owner.
///
/// # Errors
/// When it cannot be set.
pub fn complete(socket: BorrowedFd<'_>, entry: &InetSkEntry, own: &[RawOption]) -> Result<()> {
    options::after(socket, &entry.opts, &tables(identity_of(entry), own))?;
    super::file_state(socket, entry.flags, &entry.fown)
}

/// Binds to the local address.
///
/// An address that this host does not have (yet: it may move after the program, and IPv6 takes a while to take a new one into
/// use) is bound all the same, with a warning.
///
/// # Errors
/// EADDRINUSE, EACCES.
pub fn bind(socket: BorrowedFd<'_>, ends: &Ends) -> Result<()> {
    let failed = |what: &str| Error::new(what).object(ends.local.to_string());
    let result = rustix::net::bind(socket, &ends.local).map_err(io::Error::from);
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            tracing::warn!(address = %ends.local, "a socket is bound to an address that this host does not have");
            with_option(socket, IP, libc::IP_FREEBIND, 1, || {
                Ok(rustix::net::bind(socket, &ends.local)?)
            })
            .with(|| failed("bind a socket").hint("give this host the address before the restore"))
        }
        Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => Err(failed("bind a socket")
            .because(error)
            .hint("another program uses the port; stop it, or restore in a network namespace of its own")),
        other => other.with(|| failed("bind a socket")),
    }
}

/// Connects to the remote address.
///
/// # Errors
/// Names both ends.
pub fn connect(socket: BorrowedFd<'_>, ends: &Ends) -> Result<()> {
    rustix::net::connect(socket, &ends.remote)
        .map_err(io::Error::from)
        .with(|| {
            Error::new("connect a socket").object(ends.describe()).hint(
                "this host needs the local address and a route to the other end; where the original still runs, they conflict",
            )
        })
}

/// What shutdown(2) is told for a mask in images.
pub fn shutdown_of(shutdown: Option<i32>) -> Option<rustix::net::Shutdown> {
    match SkShutdown::try_from(shutdown?).ok()? {
        SkShutdown::None => None,
        SkShutdown::Read => Some(rustix::net::Shutdown::Read),
        SkShutdown::Write => Some(rustix::net::Shutdown::Write),
        SkShutdown::Both => Some(rustix::net::Shutdown::Both),
    }
}

#[cfg(test)]
mod tests {
    use super::options::RawKind;
    use super::*;

    #[test]
    fn addresses_survive_a_round_trip() {
        let socket = std::net::UdpSocket::bind("[::1]:0").unwrap();
        for (local, remote) in [
            ("10.0.0.2:6379", "10.0.0.3:40000"),
            ("[::1]:1", "[2001:db8::1]:65535"),
            ("[::ffff:1.2.3.4]:7", "[::]:0"),
        ] {
            let ends = Ends {
                local: local.parse().unwrap(),
                remote: remote.parse().unwrap(),
            };
            let family = if ends.local.is_ipv4() {
                libc::AF_INET
            } else {
                libc::AF_INET6
            };
            let entry = InetSkEntry {
                family: family as u32,
                src_port: u32::from(ends.local.port()),
                dst_port: u32::from(ends.remote.port()),
                src_addr: words(ends.local.ip()),
                dst_addr: words(ends.remote.ip()),
                ..InetSkEntry::default()
            };
            assert_eq!(Ends::of_entry(&entry, &socket).unwrap(), ends);
        }
        assert_eq!(
            words("127.0.0.1".parse().unwrap()),
            [u32::from_ne_bytes([127, 0, 0, 1])]
        );
    }

    #[test]
    fn damaged_addresses_are_refused() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut entry = InetSkEntry {
            family: libc::AF_INET as u32,
            src_addr: vec![1, 2],
            dst_addr: vec![0],
            ..InetSkEntry::default()
        };
        assert!(Ends::of_entry(&entry, &socket).is_err());
        (entry.src_addr, entry.src_port) = (vec![1], 70_000);
        assert!(Ends::of_entry(&entry, &socket).is_err());
        (entry.family, entry.src_port) = (77, 7);
        assert!(Ends::of_entry(&entry, &socket).is_err());
    }

    #[test]
    fn options_that_name_an_interface_are_known_as_such() {
        for option in [IPV4, IPV6, MULTICAST_V4, MULTICAST_V6].into_iter().flatten() {
            let interface = option.text.ends_with("_IF") && option.text != "IP_MULTICAST_IF";
            assert_eq!(option.kind == RawKind::Interface, interface, "{}", option.text);
        }
    }
}
