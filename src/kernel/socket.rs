//! System calls on sockets that the crates lack.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::sys::{set_socket_option_int, socket_option_int};

/// `SIOCOUTQ`: bytes in the send queue (TCP: not acknowledged; Unix: not read by the peer).
pub const SIOCOUTQ: u32 = 0x5411;
/// `SIOCOUTQNSD`: bytes in the send queue that were never sent.
pub const SIOCOUTQNSD: u32 = 0x894B;
/// `SIOCINQ`: bytes that can be read (sockets of messages: of the first message).
pub const SIOCINQ: u32 = 0x541B;

/// How much is in a queue of a socket: [`SIOCOUTQ`], [`SIOCOUTQNSD`] or [`SIOCINQ`].
///
/// # Errors
/// EINVAL for sockets without such a queue (one that listens).
pub fn queue_length(socket: BorrowedFd<'_>, which: u32) -> io::Result<u32> {
    debug_assert!(matches!(which, SIOCOUTQ | SIOCOUTQNSD | SIOCINQ));
    let mut length = 0i32;
    // SAFETY: all three write one int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::Ioctl::from(which), &raw mut length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(length as u32)
}

/// The classic BPF program that is attached to a socket, one instruction a word: code, jt, jf, k from the lowest bit.
///
/// # Errors
/// EACCES when an eBPF program is attached, which cannot be read.
pub fn filter(socket: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    // Lengths count instructions, not bytes. Without room, the kernel only tells how many there are.
    let mut program = Vec::new();
    let mut length = read_filter(socket, &mut program)?;
    if length > 0 {
        program.resize(length, 0);
        length = read_filter(socket, &mut program)?;
    }
    program.truncate(length);
    Ok(program.into_iter().map(u64::from_le).collect())
}

fn read_filter(socket: BorrowedFd<'_>, program: &mut [u64]) -> io::Result<usize> {
    let mut length = program.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` instructions of 8 bytes, for which there is room.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            program.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(length as usize)
}

/// Attaches a classic BPF program.
///
/// # Errors
/// EINVAL for a program that the kernel's checker refuses, EPERM when the filter is locked.
pub fn attach_filter(socket: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let mut words: Vec<u64> = program.iter().map(|word| word.to_le()).collect();
    let header = libc::sock_fprog {
        len: length,
        filter: words.as_mut_ptr().cast(),
    };
    // SAFETY: the kernel reads the header and `len` instructions of 8 bytes, all of which live until it returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const header).cast(),
            size_of_val(&header) as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the calling thread a root and working directory of its own, for names that only make sense from elsewhere.
///
/// # Errors
/// When the kernel is out of memory.
pub fn unshare_directories() -> io::Result<()> {
    // SAFETY: no pointers; other threads keep theirs.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Address family, type and protocol of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// AF_…
    pub family: i32,
    /// SOCK_…
    pub kind: i32,
    /// IPPROTO_… or what the family has.
    pub protocol: i32,
}

impl Identity {
    /// Of `socket`.
    ///
    /// # Errors
    /// ENOTSOCK.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Identity> {
        let ask = |name| socket_option_int(socket, libc::SOL_SOCKET, name);
        Ok(Identity {
            family: ask(libc::SO_DOMAIN)?,
            kind: ask(libc::SO_TYPE)?,
            protocol: ask(libc::SO_PROTOCOL)?,
        })
    }

    /// A new socket like this.
    ///
    /// # Errors
    /// When the family is not supported here, EPERM.
    pub fn make(self) -> io::Result<std::os::fd::OwnedFd> {
        use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, socket_with};
        let protocol = std::num::NonZeroU32::new(self.protocol as u32).map(Protocol::from_raw);
        let family = AddressFamily::from_raw(self.family as u16);
        let kind = SocketType::from_raw(self.kind as u32);
        Ok(socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?)
    }
}

/// Sets the option while `work` runs, and back to what it was after.
///
/// # Errors
/// Those of the option and of `work`.
pub fn with_option<T>(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: i32,
    work: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let before = socket_option_int(socket, level, name)?;
    set_socket_option_int(socket, level, name, value)?;
    let result = work();
    set_socket_option_int(socket, level, name, before)?;
    result
}

/// `MCAST_MSFILTER` of `IPPROTO_IP` and `IPPROTO_IPV6`.
pub const MCAST_MSFILTER: i32 = 48;
/// `MCAST_JOIN_GROUP`.
pub const MCAST_JOIN_GROUP: i32 = 42;
/// Bytes of a `sockaddr_storage`.
pub const STORAGE: usize = 128;
/// Where a `group_filter` has its group's address, after the interface.
pub const GROUP_AT: usize = 8;
/// Where it has its mode (0: all but the sources, 1: only the sources), and the number of sources.
pub const MODE_AT: usize = GROUP_AT + STORAGE;
const SOURCES_AT: usize = MODE_AT + 8;
/// Sources of one group that are asked for; the kernel's own limits are 10 (IPv4) and 64 (IPv6) unless changed.
const MOST_SOURCES: usize = 256;
const _: () = assert!(size_of::<libc::sockaddr_storage>() == STORAGE && align_of::<libc::sockaddr_storage>() == 8);

/// An address as a `sockaddr_storage` has it.
pub fn storage(ip: std::net::IpAddr) -> [u8; STORAGE] {
    let mut bytes = [0u8; STORAGE];
    let (family, at, octets) = match ip {
        std::net::IpAddr::V4(ip) => (libc::AF_INET, 4, ip.octets().to_vec()),
        std::net::IpAddr::V6(ip) => (libc::AF_INET6, 8, ip.octets().to_vec()),
    };
    bytes[..2].copy_from_slice(&(family as u16).to_ne_bytes());
    bytes[at..at + octets.len()].copy_from_slice(&octets);
    bytes
}

/// The socket's membership of a multicast group on an interface, as a `group_filter`; `None` when it is no member.
///
/// # Errors
/// ENOBUFS when it has more sources than anyone may have; ENOPROTOOPT for sockets of streams.
pub fn multicast_filter(
    socket: BorrowedFd<'_>,
    level: i32,
    interface: u32,
    group: std::net::IpAddr,
) -> io::Result<Option<Vec<u8>>> {
    let mut filter = vec![0u8; SOURCES_AT + MOST_SOURCES * STORAGE];
    filter[..4].copy_from_slice(&interface.to_ne_bytes());
    filter[GROUP_AT..MODE_AT].copy_from_slice(&storage(group));
    filter[MODE_AT + 4..SOURCES_AT].copy_from_slice(&(MOST_SOURCES as u32).to_ne_bytes());
    let mut length = filter.len() as libc::socklen_t;
    // SAFETY: the kernel reads the head of `filter`, and writes at most as many sources as that says there is room for.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            MCAST_MSFILTER,
            filter.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::EADDRNOTAVAIL) => Ok(None),
            _ => Err(error),
        };
    }
    let count = filter[MODE_AT + 4..]
        .first_chunk()
        .map_or(0, |count| u32::from_ne_bytes(*count) as usize);
    if count > MOST_SOURCES {
        return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
    }
    filter.truncate(SOURCES_AT + count * STORAGE);
    Ok(Some(filter))
}

/// A `sockaddr` of any family, as bytes.
pub type RawAddress = Vec<u8>;

/// `getsockname(2)` and `getpeername(2)`, for families that have no type of their own here.
///
/// # Errors
/// ENOTCONN for the peer of a socket without one.
pub fn raw_address(socket: BorrowedFd<'_>, peer: bool) -> io::Result<RawAddress> {
    let mut bytes = vec![0u8; STORAGE];
    let mut length = STORAGE as libc::socklen_t;
    let ask = if peer { libc::getpeername } else { libc::getsockname };
    // SAFETY: the kernel writes at most `length` bytes, for which there is room.
    if unsafe { ask(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    bytes.truncate(length as usize);
    Ok(bytes)
}

/// `bind(2)` to an address of any family.
///
/// # Errors
/// Those of the family.
pub fn bind_raw(socket: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as there are.
    done(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    })
}

/// `connect(2)` to an address of any family.
///
/// # Errors
/// Those of the family.
pub fn connect_raw(socket: BorrowedFd<'_>, address: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as there are.
    done(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    })
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
