//! Socket options: those of SOL_SOCKET that every socket has, and tables of options by level that a kind adds.
//!
//! Images of CRIU have fields for the common options. The others travel as raw options: each that a kind's table names and
//! whose value differs from that of a fresh socket of the same kind, so that defaults of the destination stay defaults.
//!
//! On restore, options come in two parts: [`before`] binding and connecting, and [`after`] the queues are filled, when
//! what would be in the way (small buffers, filters, exclusive addresses) is put in place.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use whimbrel_images::proto::{SkOptsEntry, SkRawOption};

use crate::error::{Context, Error, Result};
use crate::kernel::socket::{self, Identity};
use crate::kernel::sys::{set_socket_option, set_socket_option_int, socket_option, socket_option_int};

/// An option that travels raw.
#[derive(Clone, Copy, Debug)]
pub struct RawOption {
    /// Level of setsockopt(2).
    pub level: i32,
    /// Its number there.
    pub name: i32,
    /// What it is called in headers, for messages.
    pub text: &'static str,
    /// Room for its value, in bytes.
    pub length: usize,
    /// What its value means, and when it is set.
    pub kind: RawKind,
}

/// How a raw option is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawKind {
    /// As it is, before the socket is bound.
    Early,
    /// After the queues are filled, because it changes how they are filled, or forbids changes.
    Late,
    /// The value is an interface's index, which is another one elsewhere.
    Interface,
    /// A matter of speed only: where the destination lacks it, a warning will do.
    Preference,
    /// Read and set by the kind itself.
    OfItsKind,
}

/// One row: level, name, text, length, kind.
macro_rules! raw_options {
    ($($level:expr, $name:expr, $text:literal, $length:expr, $kind:ident;)*) => {
        &[$($crate::resource::sock::options::RawOption { level: $level, name: $name, text: $text, length: $length, kind: $crate::resource::sock::options::RawKind::$kind }),*]
    };
}
pub(crate) use raw_options;

const SOL: i32 = libc::SOL_SOCKET;

/// Options of every socket that images have no field for.
static COMMON: &[RawOption] = raw_options![
    SOL, 29, "SO_TIMESTAMP", 4, Early;
    SOL, 35, "SO_TIMESTAMPNS", 4, Early;
    SOL, 37, "SO_TIMESTAMPING", 4, Early;
    SOL, 40, "SO_RXQ_OVFL", 4, Early;
    SOL, 41, "SO_WIFI_STATUS", 4, Early;
    SOL, 42, "SO_PEEK_OFF", 4, Late;
    SOL, 43, "SO_NOFCS", 4, Early;
    SOL, 44, "SO_LOCK_FILTER", 4, Late;
    SOL, 45, "SO_SELECT_ERR_QUEUE", 4, Early;
    SOL, 46, "SO_BUSY_POLL", 4, Preference;
    SOL, 47, "SO_MAX_PACING_RATE", 8, Preference;
    SOL, 60, "SO_ZEROCOPY", 4, Early;
    SOL, 61, "SO_TXTIME", 8, Early;
    SOL, 69, "SO_PREFER_BUSY_POLL", 4, Preference;
    SOL, 75, "SO_RCVMARK", 4, Early;
    SOL, 76, "SO_PASSPIDFD", 4, Late;
    SOL, 82, "SO_RCVPRIORITY", 4, Early;
];

const SO_BUF_LOCK: i32 = 72;
/// Smallest buffer that is asked for: the kernel doubles what it is given, and has minima of its own.
const LARGEST_BUFFER: u64 = 1 << 30;

/// Can the socket's options be carried?
///
/// # Errors
/// An eBPF filter is attached.
pub fn check(socket: BorrowedFd<'_>) -> Result<()> {
    match socket::filter(socket) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => Err(Error::new("carry a socket's filter")
            .because("it is an eBPF program, which cannot be read back from the kernel")
            .hint("detach it before the dump (SO_DETACH_BPF)")),
        _ => Ok(()),
    }
}

/// Reads all options. `tables` are those that the kind adds.
///
/// # Errors
/// When a common option cannot be read.
pub fn dump(socket: BorrowedFd<'_>, tables: &[&[RawOption]], defaults: &mut Defaults) -> Result<SkOptsEntry> {
    let required = |name: i32| {
        socket_option_int(socket, SOL, name).with(|| Error::new(format!("read socket option {name} of SOL_SOCKET")))
    };
    let int = |name: i32| socket_option_int(socket, SOL, name).ok();
    let flag = |name: i32| int(name).map(|value| value != 0);
    let (snd_sec, snd_usec) = timeout(socket, libc::SO_SNDTIMEO)?;
    let (rcv_sec, rcv_usec) = timeout(socket, libc::SO_RCVTIMEO)?;
    let linger = socket_option(socket, SOL, libc::SO_LINGER, 8).context("read SO_LINGER")?;
    let linger_on = linger.get(..4).is_some_and(|on| on != [0; 4]);
    let linger_time = linger
        .get(4..8)
        .map(|time| u32::from_ne_bytes(time.try_into().unwrap_or_default()));
    let device = socket_option(socket, SOL, libc::SO_BINDTODEVICE, libc::IF_NAMESIZE).unwrap_or_default();
    let device = device.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(SkOptsEntry {
        so_sndbuf: required(libc::SO_SNDBUF)? as u32,
        so_rcvbuf: required(libc::SO_RCVBUF)? as u32,
        so_snd_tmo_sec: snd_sec,
        so_snd_tmo_usec: snd_usec,
        so_rcv_tmo_sec: rcv_sec,
        so_rcv_tmo_usec: rcv_usec,
        reuseaddr: flag(libc::SO_REUSEADDR),
        so_priority: int(libc::SO_PRIORITY).map(|value| value as u32),
        so_rcvlowat: int(libc::SO_RCVLOWAT).map(|value| value as u32),
        so_mark: int(libc::SO_MARK).filter(|&mark| mark != 0).map(|mark| mark as u32),
        so_passcred: flag(libc::SO_PASSCRED),
        so_passsec: flag(libc::SO_PASSSEC),
        so_dontroute: flag(libc::SO_DONTROUTE),
        so_no_check: flag(libc::SO_NO_CHECK),
        so_bound_dev: (!device.is_empty()).then(|| String::from_utf8_lossy(device).into_owned()),
        so_filter: socket::filter(socket).unwrap_or_default(),
        so_reuseport: flag(libc::SO_REUSEPORT),
        so_broadcast: flag(libc::SO_BROADCAST),
        so_keepalive: flag(libc::SO_KEEPALIVE),
        so_oobinline: int(libc::SO_OOBINLINE).map(|value| value as u32),
        so_linger: linger_time.filter(|_| linger_on),
        so_buf_lock: int(SO_BUF_LOCK).map(|value| value as u32),
        raw: raw(socket, tables, defaults)?,
        ..SkOptsEntry::default()
    })
}

/// Values of options that fresh sockets have, read once for each kind of socket: dumps happen while programs stand still.
#[derive(Default)]
pub struct Defaults(HashMap<Identity, Fresh>);

struct Fresh {
    socket: OwnedFd,
    values: HashMap<(i32, i32), Option<Vec<u8>>>,
}

impl Defaults {
    fn of(&mut self, identity: Identity) -> io::Result<&mut Fresh> {
        Ok(match self.0.entry(identity) {
            Entry::Occupied(fresh) => fresh.into_mut(),
            Entry::Vacant(empty) => empty.insert(Fresh {
                socket: identity.make()?,
                values: HashMap::new(),
            }),
        })
    }
}

fn read(socket: BorrowedFd<'_>, option: &RawOption) -> Option<Vec<u8>> {
    socket_option(socket, option.level, option.name, option.length).ok()
}

/// The options of `tables`, and the common ones, whose values are not those of a fresh socket.
fn raw(socket: BorrowedFd<'_>, tables: &[&[RawOption]], defaults: &mut Defaults) -> Result<Vec<SkRawOption>> {
    let Fresh { socket: fresh, values } = Identity::of(socket)
        .and_then(|identity| defaults.of(identity))
        .context("make a socket to compare with")?;
    let mut found = Vec::new();
    for option in std::iter::once(&COMMON).chain(tables).copied().flatten() {
        if option.kind == RawKind::OfItsKind {
            continue;
        }
        let default = values
            .entry((option.level, option.name))
            .or_insert_with(|| read(fresh.as_fd(), option));
        // What a fresh socket does not have, none has.
        let Some(value) = default.as_ref().and_then(|_| read(socket, option)) else {
            continue;
        };
        if default.as_ref() == Some(&value) {
            continue;
        }
        let mut entry = SkRawOption {
            level: option.level,
            name: option.name,
            value,
            device: None,
        };
        if option.kind == RawKind::Interface {
            let index = entry.value.get(..4).map(|index| index.try_into().unwrap_or_default());
            // IP_UNICAST_IF and IPV6_UNICAST_IF are in network byte order, IPV6_MULTICAST_IF is not.
            let index = index.map_or(0, |word| {
                if option.text.ends_with("UNICAST_IF") {
                    u32::from_be_bytes(word)
                } else {
                    u32::from_ne_bytes(word)
                }
            });
            entry.device = Some(interface_name(socket, index)?);
        }
        found.push(entry);
    }
    Ok(found)
}

/// The name of an interface.
///
/// # Errors
/// ENODEV when there is none of that index.
pub fn interface_name(socket: impl AsFd, index: u32) -> Result<String> {
    rustix::net::netdevice::index_to_name(socket, index)
        .map_err(io::Error::from)
        .with(|| Error::new("look up a network interface").object(format!("index {index}")))
}

/// The index of an interface.
///
/// # Errors
/// ENODEV when there is none of that name here.
pub fn interface_index(socket: impl AsFd, name: &str) -> Result<u32> {
    rustix::net::netdevice::name_to_index(socket, name)
        .map_err(io::Error::from)
        .with(|| {
            Error::new("look up a network interface")
                .object(name)
                .hint("a socket is bound to it: this host needs an interface of that name")
        })
}

fn timeout(socket: BorrowedFd<'_>, name: i32) -> Result<(u64, u64)> {
    let bytes = socket_option(socket, SOL, name, 16).context("read a socket's timeouts")?;
    let word = |at: usize| {
        bytes
            .get(at..at + 8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()))
    };
    Ok((word(0).unwrap_or(0), word(8).unwrap_or(0)))
}

fn set(socket: BorrowedFd<'_>, name: i32, text: &str, value: i32) -> Result<()> {
    set_socket_option_int(socket, SOL, name, value).with(|| Error::new("set a socket option").object(text))
}

/// Sets `name` where the image has a value that is not the socket's already: kinds lack options of others.
fn set_changed(socket: BorrowedFd<'_>, name: i32, text: &str, value: Option<i32>) -> Result<()> {
    match value {
        Some(value) if socket_option_int(socket, SOL, name).ok() != Some(value) => set(socket, name, text, value),
        _ => Ok(()),
    }
}

/// Sets what must be set before binding. Addresses are shared meanwhile: [`reuse`] makes them exclusive again.
///
/// # Errors
/// When an option cannot be set, named.
pub fn before(socket: BorrowedFd<'_>, opts: &SkOptsEntry, tables: &[&[RawOption]]) -> Result<()> {
    let flag = |value: Option<bool>| value.map(i32::from);
    let word = |value: Option<u32>| value.map(|value| value as i32);
    set_changed(socket, libc::SO_REUSEPORT, "SO_REUSEPORT", flag(opts.so_reuseport))?;
    // Sockets of one tree share ports in ways that only their history allows: a listener and what it accepted.
    set_changed(socket, libc::SO_REUSEADDR, "SO_REUSEADDR", opts.reuseaddr.map(|_| 1))?;
    if let Some(device) = &opts.so_bound_dev {
        set_socket_option(socket, SOL, libc::SO_BINDTODEVICE, device.as_bytes()).with(|| {
            Error::new("bind a socket to an interface")
                .object(device.clone())
                .hint("this host needs an interface of that name")
        })?;
    }
    set_changed(socket, libc::SO_MARK, "SO_MARK", word(opts.so_mark))?;
    set_changed(socket, libc::SO_DONTROUTE, "SO_DONTROUTE", flag(opts.so_dontroute))?;
    set_changed(socket, libc::SO_NO_CHECK, "SO_NO_CHECK", flag(opts.so_no_check))?;
    set_changed(socket, libc::SO_BROADCAST, "SO_BROADCAST", flag(opts.so_broadcast))?;
    set_changed(socket, libc::SO_OOBINLINE, "SO_OOBINLINE", word(opts.so_oobinline))?;
    set_timeout(socket, libc::SO_SNDTIMEO, opts.so_snd_tmo_sec, opts.so_snd_tmo_usec)?;
    set_timeout(socket, libc::SO_RCVTIMEO, opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec)?;
    set_raw(socket, opts, tables, false)
}

/// Sets the rest but SO_REUSEADDR, when the queues are filled. IP_TOS must be set before, since it changes the priority.
///
/// # Errors
/// When an option cannot be set, named.
pub fn after(socket: BorrowedFd<'_>, opts: &SkOptsEntry, tables: &[&[RawOption]]) -> Result<()> {
    let word = |value: Option<u32>| value.map(|value| value as i32);
    // A unix socket that wants credentials gets a name of its own as soon as it sends or connects: unix(7), autobind.
    set_changed(
        socket,
        libc::SO_PASSCRED,
        "SO_PASSCRED",
        opts.so_passcred.map(i32::from),
    )?;
    set_changed(socket, libc::SO_PASSSEC, "SO_PASSSEC", opts.so_passsec.map(i32::from))?;
    set_changed(socket, libc::SO_PRIORITY, "SO_PRIORITY", word(opts.so_priority))?;
    set_changed(
        socket,
        libc::SO_KEEPALIVE,
        "SO_KEEPALIVE",
        opts.so_keepalive.map(i32::from),
    )?;
    set_changed(socket, libc::SO_RCVLOWAT, "SO_RCVLOWAT", word(opts.so_rcvlowat))?;
    if let Some(seconds) = opts.so_linger {
        let value = [1u32.to_ne_bytes(), seconds.to_ne_bytes()].concat();
        set_socket_option(socket, SOL, libc::SO_LINGER, &value).context("set SO_LINGER")?;
    }
    if !opts.so_filter.is_empty() {
        socket::attach_filter(socket, &opts.so_filter).context("attach a socket's filter")?;
    }
    set_raw(socket, opts, tables, true)?;
    buffers(socket, opts)
}

/// Sets SO_REUSEADDR to its final value: when all sockets of the tree are bound. Leaving TCP's repair mode clears it.
///
/// # Errors
/// When it cannot be set.
pub fn reuse(socket: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    set_changed(
        socket,
        libc::SO_REUSEADDR,
        "SO_REUSEADDR",
        opts.reuseaddr.map(i32::from),
    )
}

/// Gives the buffers their final sizes, and lets the kernel go on resizing them where it did.
///
/// # Errors
/// When they cannot be set.
pub fn buffers(socket: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    // setsockopt(2) doubles the value that it is given, getsockopt(2) tells the doubled one: socket(7).
    set_buffers(socket, u64::from(opts.so_sndbuf) / 2, u64::from(opts.so_rcvbuf) / 2)?;
    if let Some(lock) = opts.so_buf_lock {
        // Kernels before 5.14 do not have it; there, buffers stay as they are, which is what they do since CRIU.
        let _ = set_socket_option_int(socket, SOL, SO_BUF_LOCK, lock as i32);
    }
    Ok(())
}

/// Makes buffers large enough for `send` and `receive` bytes of data, whatever the pieces that it comes in.
///
/// # Errors
/// When they cannot be set.
pub fn make_room(socket: BorrowedFd<'_>, send: u64, receive: u64) -> Result<()> {
    set_buffers(socket, send * 4 + (256 << 10), receive * 4 + (256 << 10))
}

fn set_buffers(socket: BorrowedFd<'_>, send: u64, receive: u64) -> Result<()> {
    for (name, force, text, size) in [
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, "SO_SNDBUF", send),
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, "SO_RCVBUF", receive),
    ] {
        let size = size.min(LARGEST_BUFFER - 1) as i32;
        // Without CAP_NET_ADMIN, the size is limited by net.core.*mem_max.
        set_socket_option_int(socket, SOL, force, size).or_else(|_| set(socket, name, text, size))?;
    }
    Ok(())
}

fn set_timeout(socket: BorrowedFd<'_>, name: i32, seconds: u64, micros: u64) -> Result<()> {
    if (seconds, micros) == (0, 0) {
        return Ok(());
    }
    let value = [seconds.to_ne_bytes(), micros.to_ne_bytes()].concat();
    set_socket_option(socket, SOL, name, &value).context("set a socket's timeouts")
}

/// Sets those raw options that are of the early or the late part.
fn set_raw(socket: BorrowedFd<'_>, opts: &SkOptsEntry, tables: &[&[RawOption]], late: bool) -> Result<()> {
    for entry in &opts.raw {
        let row = std::iter::once(&COMMON)
            .chain(tables)
            .copied()
            .flatten()
            .find(|option| (option.level, option.name) == (entry.level, entry.name));
        let Some(option) = row else {
            if !late {
                tracing::warn!(
                    level = entry.level,
                    name = entry.name,
                    "the image has a socket option that is not known here; left out"
                );
            }
            continue;
        };
        if late != (option.kind == RawKind::Late) || option.kind == RawKind::OfItsKind {
            continue;
        }
        let mut value = entry.value.clone();
        if let Some(device) = &entry.device {
            let index = interface_index(socket, device)?;
            value = if option.text.ends_with("UNICAST_IF") {
                index.to_be_bytes().to_vec()
            } else {
                index.to_ne_bytes().to_vec()
            };
        }
        match set_socket_option(socket, entry.level, entry.name, &value) {
            Ok(()) => {}
            Err(error) if option.kind == RawKind::Preference => {
                tracing::warn!(option = option.text, %error, "a socket option is not available here");
            }
            Err(error) => {
                return Err(Error::new("set a socket option").object(option.text).because(error));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn udp() -> std::os::fd::OwnedFd {
        let identity = Identity {
            family: libc::AF_INET,
            kind: libc::SOCK_DGRAM,
            protocol: libc::IPPROTO_UDP,
        };
        identity.make().unwrap()
    }

    #[test]
    fn options_survive_a_round_trip() {
        let source = udp();
        let fd = source.as_fd();
        for (name, value) in [
            (libc::SO_SNDBUF, 70_000),
            (libc::SO_RCVBUFFORCE, 9 << 20),
            (libc::SO_BROADCAST, 1),
            (libc::SO_MARK, 77),
            (libc::SO_PRIORITY, 5),
            (libc::SO_RCVLOWAT, 9),
            (libc::SO_REUSEADDR, 1),
            (libc::SO_NO_CHECK, 1),
            (35, 1),
        ] {
            set_socket_option_int(fd, SOL, name, value).unwrap();
        }
        set_timeout(fd, libc::SO_RCVTIMEO, 3, 250_000).unwrap();
        // return 65535; a filter that takes all.
        socket::attach_filter(fd, &[0x06 | 0xffff << 32]).unwrap();
        let linger = [1u32.to_ne_bytes(), 5u32.to_ne_bytes()].concat();
        set_socket_option(fd, SOL, libc::SO_LINGER, &linger).unwrap();
        check(fd).unwrap();
        let opts = dump(fd, &[], &mut Defaults::default()).unwrap();
        assert_eq!(opts.so_filter, [0x06 | 0xffff << 32]);
        assert_eq!((opts.so_linger, opts.so_rcvbuf), (Some(5), 18 << 20));

        let target = udp();
        before(target.as_fd(), &opts, &[]).unwrap();
        after(target.as_fd(), &opts, &[]).unwrap();
        reuse(target.as_fd(), &opts).unwrap();
        assert_eq!(dump(target.as_fd(), &[], &mut Defaults::default()).unwrap(), opts);
    }

    #[test]
    fn a_fresh_socket_has_no_raw_options_and_its_buffers_stay_automatic() {
        let opts = dump(udp().as_fd(), &[], &mut Defaults::default()).unwrap();
        assert_eq!(opts.raw, []);
        assert_eq!(opts.so_buf_lock, Some(0));
        let target = udp();
        after(target.as_fd(), &opts, &[]).unwrap();
        reuse(target.as_fd(), &opts).unwrap();
        assert_eq!(
            dump(target.as_fd(), &[], &mut Defaults::default()).unwrap().so_buf_lock,
            Some(0)
        );
    }

    #[test]
    fn a_locked_filter_is_attached_and_locked_again() {
        let source = udp();
        socket::attach_filter(source.as_fd(), &[0x06 | 0xffff << 32]).unwrap();
        set_socket_option_int(source.as_fd(), SOL, 44, 1).unwrap();
        let opts = dump(source.as_fd(), &[], &mut Defaults::default()).unwrap();
        let target = udp();
        before(target.as_fd(), &opts, &[]).unwrap();
        after(target.as_fd(), &opts, &[]).unwrap();
        reuse(target.as_fd(), &opts).unwrap();
        assert_eq!(dump(target.as_fd(), &[], &mut Defaults::default()).unwrap(), opts);
        assert!(socket::attach_filter(target.as_fd(), &[0x06]).is_err());
    }
}
