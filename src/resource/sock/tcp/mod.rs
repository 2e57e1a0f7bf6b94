//! TCP sockets: listening, closed, and connected ones with what is in their queues.
//!
//! A connection is read and built through the kernel's repair mode (TCP_REPAIR), in which a socket tells and takes its
//! sequence numbers and queues and sends nothing.
//!
//! **Source.** Repair mode belongs to the socket, not to us: a victim whose socket was left in it would be broken if we died.
//! So it is entered and left in one function, with everything that can be asked outside asked outside. It is left with
//! TCP_REPAIR_OFF_NO_WP, which sends nothing: nothing was changed, so the other end needs to know nothing.
//!
//! The network must be locked from before the first connection is read until the source's sockets are closed or go on:
//! an acknowledgement that comes in between would make the kernel send data that the image says was never sent.
//!
//! When the tree was moved and is killed, its sockets must vanish without a FIN or a reset, which the other end would take
//! for the end of the connection that now lives elsewhere: [`FileKind::abandon`] puts them in repair mode for good, in which
//! closing is silent. A lock alone is not enough: closed sockets live on in the kernel and repeat their FIN after it is gone.
//! From then until the address has moved, the lock must also keep the source's kernel from answering packets of
//! connections that it does not know any more with resets.
//!
//! **Destination.** A connection is built in repair mode and stays in it until [`FileKind::resume`], after the network lock
//! is gone: a probe goes to the other end, whose answer tells what it has, and what was never sent is sent in the ordinary
//! way.
//!
//! | state | is restored as |
//! |---|---|
//! | LISTEN | itself; connections that wait to be accepted are refused, or lost with `--skip-in-flight` and in a migration: their clients get a reset |
//! | CLOSE | itself, bound if it was, with what it had received and whether it was reset: [`ended`] |
//! | SYN_SENT | itself: asks for the connection again |
//! | ESTABLISHED | itself |
//! | FIN_WAIT1, FIN_WAIT2 | FIN_WAIT1: the FIN is repeated once if the other end knew it already |
//! | CLOSE_WAIT | ESTABLISHED, shut for reading: reads give the rest and then the end, acknowledgements include the other end's FIN |
//! | LAST_ACK, CLOSING | FIN_WAIT1, shut for reading |
//!
//! Urgent data (MSG_OOB) that the program has not read is refused: only the other end could send it again. Where it has, the byte
//! is not among the others any more, and the rest goes on without it.

mod stream;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::net::Shutdown;
use whimbrel_images::entry::{ImageReader, ImageWriter};
use whimbrel_images::proto::{FdTypes, FileEntry, InetSkEntry, SkShutdown, TcpOptsEntry};

use self::stream::Stream;
use super::ended;
use super::inet::{self, Ends, state};
use super::options::{self, RawOption, raw_options};
use crate::error::{Context, Error, Result};
use crate::kernel::nft::{Connection, Protocol};
use crate::kernel::sock_diag;
use crate::kernel::sys::{self, set_socket_option_int, socket_option, socket_option_int};
use crate::resource::fd::{FileDump, FileRestore, OpenFile};
use crate::resource::{Endpoint, FileKind};

/// TCP sockets.
pub struct Tcp;

const TCP: i32 = libc::IPPROTO_TCP;

/// Options of TCP that images have no field for.
static OPTIONS: &[RawOption] = raw_options![
    TCP, libc::TCP_SYNCNT, "TCP_SYNCNT", 4, Early;
    TCP, libc::TCP_LINGER2, "TCP_LINGER2", 4, Early;
    TCP, libc::TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT", 4, Early;
    TCP, libc::TCP_CONGESTION, "TCP_CONGESTION", 16, Preference;
    TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, "TCP_THIN_LINEAR_TIMEOUTS", 4, Preference;
    TCP, libc::TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT", 4, Early;
    TCP, libc::TCP_FASTOPEN, "TCP_FASTOPEN", 4, Early;
    TCP, libc::TCP_NOTSENT_LOWAT, "TCP_NOTSENT_LOWAT", 4, Early;
    TCP, libc::TCP_SAVE_SYN, "TCP_SAVE_SYN", 4, Early;
    TCP, libc::TCP_FASTOPEN_CONNECT, "TCP_FASTOPEN_CONNECT", 4, Early;
    TCP, 34, "TCP_FASTOPEN_NO_COOKIE", 4, Early;
    TCP, 36, "TCP_INQ", 4, Early;
    TCP, 37, "TCP_TX_DELAY", 4, Preference;
    TCP, 44, "TCP_RTO_MAX_MS", 4, Preference;
    TCP, 45, "TCP_RTO_MIN_US", 4, Preference;
    TCP, 46, "TCP_DELACK_MAX_US", 4, Preference;
];

/// With those that a connected socket answers with something else than what was set.
static UNCONNECTED: &[RawOption] = raw_options![
    TCP, libc::TCP_MAXSEG, "TCP_MAXSEG", 4, Preference;
];

const TCP_ULP: i32 = 31;
const TCP_REPAIR: i32 = 19;

const REPAIR_ON: i32 = 1;
const REPAIR_OFF: i32 = 0;
const REPAIR_OFF_NO_WP: i32 = -1;

impl FileKind for Tcp {
    fn name(&self) -> &'static str {
        "TCP socket"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Inetsk]
    }

    fn restores(&self, entry: &FileEntry) -> bool {
        inet::entry_is(entry, libc::SOCK_STREAM, libc::IPPROTO_TCP)
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        inet::is(file, libc::SOCK_STREAM, libc::IPPROTO_TCP)
    }

    fn check(&self, file: &OpenFile, dump: &FileDump<'_>) -> Result<()> {
        let socket = file.handle.as_fd();
        options::check(socket)?;
        let ends = Ends::of(socket)?;
        let refused = |what: &str, why: String| Err(Error::new(what).object(ends.describe()).because(why));
        if socket_option(socket, TCP, TCP_ULP, 16).is_ok_and(|name| name.first().is_some_and(|&first| first != 0)) {
            return refused(
                "carry a TCP socket",
                "its data passes through an upper layer in the kernel (TLS), whose state cannot be read".into(),
            );
        }
        let info = Info::of(socket)?;
        match info.state {
            state::LISTEN if info.unacked > 0 && !dump.options.skip_in_flight => {
                Err(Error::new("carry a listening TCP socket")
                    .object(ends.describe())
                    .because(format!("{} connections wait to be accepted", info.unacked))
                    .hint("try again in a moment, or use --skip-in-flight to lose them"))
            }
            state::LISTEN | state::SYN_SENT => Ok(()),
            _ if super::poll(socket, PollFlags::PRI)?.contains(PollFlags::PRI) => refused(
                "carry a TCP socket",
                "it has urgent data (MSG_OOB) that the program has not read".into(),
            ),
            state::CLOSE => Ok(()),
            state::SYN_RECV => refused(
                "carry a TCP socket",
                "its connection is being made right now; try again in a moment".into(),
            ),
            _ if dump.options.tcp_close => Ok(()),
            _ if !dump.options.tcp_established => Err(Error::new("carry a connected TCP socket")
                .object(ends.describe())
                .hint("use --tcp-established")),
            known if is_connected(known) => Ok(()),
            other => refused("carry a TCP socket", format!("it is in state {other}")),
        }
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let socket = file.handle.as_fd();
        let info = Info::of(socket)?;
        let closes = is_connected(info.state) && dump.options.tcp_close;
        let connected = is_connected(info.state) && !closes;
        let ended = closes || info.state != state::LISTEN && !got_fin(info.state) && shut_for_reading(socket)?;
        let own = if connected || ended {
            OPTIONS.to_vec()
        } else {
            [OPTIONS, UNCONNECTED].concat()
        };
        let mut entry = inet::dump(file, id, info.state, &own, &mut dump.shared.socket_defaults)?;
        let int = |name| socket_option_int(socket, TCP, name).ok();
        let flag = |name| int(name).filter(|&value| value != 0).map(|_| true);
        let word = |name| int(name).map(|value| value as u32);
        let tcp_opts = TcpOptsEntry {
            cork: flag(libc::TCP_CORK),
            nodelay: flag(libc::TCP_NODELAY),
            keepcnt: word(libc::TCP_KEEPCNT),
            keepidle: word(libc::TCP_KEEPIDLE),
            keepintvl: word(libc::TCP_KEEPINTVL),
        };
        if info.state == state::LISTEN {
            entry.backlog = info.sacked;
            if info.unacked > 0 {
                tracing::warn!(
                    socket = file.describe(),
                    count = info.unacked,
                    "connections that wait to be accepted are not carried; their clients must connect again"
                );
            }
        } else if ended {
            // A closed socket that can be read to its end was connected once: it is shut both ways.
            let shutdown = if connected { SkShutdown::Read } else { SkShutdown::Both };
            entry.shutdown = Some(shutdown as i32);
        }
        match info.state {
            _ if closes => entry.state = state::CLOSE,
            state::CLOSE => ended::dump(socket, id, dump)?,
            state::SYN_SENT => {
                let remote = asked(file)?;
                (entry.dst_addr, entry.dst_port) = (inet::words(remote.ip()), u32::from(remote.port()));
            }
            _ => {}
        }
        if connected {
            let mut stream = Stream::read(socket, &info).map_err(|error| {
                let ends = Ends::of(socket).map(|ends| ends.describe()).unwrap_or_default();
                Error::new("read a TCP connection").object(ends).because(error)
            })?;
            (stream.entry.cork, stream.entry.nodelay) = (tcp_opts.cork, tcp_opts.nodelay);
            let mut image = ImageWriter::create(dump.store, &image_name(entry.ino)).context("create an image")?;
            image
                .write(&stream.entry)
                .and_then(|()| image.extra(&stream.inq))
                .and_then(|()| image.extra(&stream.outq))
                .and_then(|()| image.finish())
                .context("write a TCP connection")?;
        }
        entry.tcp_opts = Some(tcp_opts);
        Ok(FileEntry {
            r#type: FdTypes::Inetsk as i32,
            id,
            isk: Some(entry),
            ..FileEntry::default()
        })
    }

    fn endpoint(&self, file: &OpenFile) -> Result<Option<Endpoint>> {
        let ends = Ends::of(file.handle.as_fd())?;
        let listens = || Ok::<_, Error>(Info::of(file.handle.as_fd())?.state == state::LISTEN);
        Ok(match ends.remote.port() {
            0 if listens()? => Some(Endpoint::Listener(ends.local)),
            0 => None,
            _ => Some(endpoint(&ends)),
        })
    }

    fn endpoint_of(&self, entry: &FileEntry) -> Result<Option<Endpoint>> {
        let entry = inet::entry_of(entry)?;
        if entry.dst_port == 0 && entry.state != state::LISTEN {
            return Ok(None);
        }
        let any = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
        let ends = Ends::of_entry(entry, any.map_err(io::Error::from).context("open a socket")?)?;
        Ok(Some(match entry.dst_port {
            0 => Endpoint::Listener(ends.local),
            _ => endpoint(&ends),
        }))
    }

    fn abandon(&self, file: &OpenFile) -> Result<()> {
        let socket = file.handle.as_fd();
        // A listening socket refuses repair mode. When it is closed, those who wait for it get a reset, and that is right.
        if is_connected(Info::of(socket)?.state) {
            set_socket_option_int(socket, TCP, TCP_REPAIR, REPAIR_ON).context("silence a TCP connection")?;
        }
        Ok(())
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = inet::entry_of(entry)?;
        let own = [OPTIONS, UNCONNECTED].concat();
        let closes = is_connected(entry.state) && restore.options.tcp_close;
        let left = match entry.state {
            state::CLOSE => ended::restore(entry, restore)?,
            _ => None,
        };
        let bound = left.is_some();
        let socket = left.map_or_else(|| inet::fresh(entry), Ok)?;
        let fd = socket.as_fd();
        // A socket that has an address has said by then whether it is of IPv6 only, and the kernel may have said it for it.
        let told = InetSkEntry {
            v6only: entry.v6only.filter(|_| !bound),
            ..entry.clone()
        };
        inet::prepare(fd, &told, &own)?;
        set_keepalive(fd, entry)?;
        let ends = Ends::of_entry(entry, fd)?;
        match entry.state {
            _ if closes => {}
            state::LISTEN => {
                inet::bind(fd, &ends)?;
                rustix::net::listen(fd, i32::try_from(entry.backlog).unwrap_or(i32::MAX))
                    .map_err(io::Error::from)
                    .with(|| Error::new("listen").object(ends.describe()))?;
            }
            state::CLOSE | state::SYN_SENT => {
                let named = ends.local.port() != 0 || !ends.local.ip().is_unspecified();
                let bind = if named && !bound { inet::bind(fd, &ends) } else { Ok(()) };
                match bind {
                    // After a connection the port may be held by what the kernel remembers of it (TIME_WAIT).
                    Err(error) if entry.shutdown.is_some() && error.errno() == Some(libc::EADDRINUSE) => {
                        tracing::debug!(
                            error = error.chain(),
                            "a socket whose connection is over has lost its address"
                        );
                    }
                    other => other?,
                }
            }
            known if is_connected(known) => {
                let mut image = open_stream(restore, entry.ino)?;
                let stream = Stream::load(&mut image)?;
                stream
                    .build(fd, entry.state, &ends)
                    .map_err(|error| error.object(ends.describe()))?;
            }
            other => {
                return Err(Error::new("restore a TCP socket").because(format!("the image has state {other}")));
            }
        }
        if let Some(how) = inet::shutdown_of(entry.shutdown).or(closes.then_some(Shutdown::Both)) {
            shut(fd, how)?;
        }
        set_flags(fd, entry)?;
        inet::complete(fd, entry, &own)?;
        Ok(socket)
    }

    fn resume(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let isk = inet::entry_of(entry)?;
        let Some(socket) = restore.opened.get(&entry.id) else {
            return Ok(());
        };
        let fd = socket.as_fd();
        if isk.state == state::SYN_SENT {
            ask_again(fd, &Ends::of_entry(isk, fd)?)?;
        }
        if is_connected(isk.state) && !restore.options.tcp_close {
            // After the other end's FIN there is nothing to be learned from it, and if it is gone, it would answer with a reset.
            let off = if got_fin(isk.state) {
                REPAIR_OFF_NO_WP
            } else {
                REPAIR_OFF
            };
            set_socket_option_int(fd, TCP, TCP_REPAIR, off).context("let a TCP connection go on")?;
            let stream = Stream::load(&mut open_stream(restore, isk.ino)?)?;
            stream.send_rest(fd, isk)?;
        }
        options::reuse(fd, &isk.opts)
    }
}

/// Whom a socket has asked for a connection: getpeername(2) tells only when there is one.
fn asked(file: &OpenFile) -> Result<std::net::SocketAddr> {
    let sockets = sock_diag::inet_sockets(libc::IPPROTO_TCP as u8).context("list TCP sockets")?;
    let found = sockets
        .iter()
        .find(|socket| u64::from(socket.inode) == file.stat.st_ino && u32::from(socket.state) == state::SYN_SENT);
    found.map(|socket| socket.remote).ok_or_else(|| {
        Error::new("carry a TCP socket").because("its connection is being made right now; try again in a moment")
    })
}

/// Asks for a connection, without waiting for it.
fn ask_again(socket: BorrowedFd<'_>, ends: &Ends) -> Result<()> {
    let flags = sys::fcntl_int(socket, libc::F_GETFL, 0).context("read the flags of a socket")?;
    let set = |flags| sys::fcntl_int(socket, libc::F_SETFL, flags).context("set the flags of a socket");
    set(flags | libc::O_NONBLOCK)?;
    match rustix::net::connect(socket, &ends.remote) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
        Err(error) => tracing::warn!(connection = ends.describe(), %error, "a connection cannot be asked for here"),
    }
    set(flags).map(drop)
}

fn endpoint(ends: &Ends) -> Endpoint {
    Endpoint::Connection(Connection {
        protocol: Protocol::Tcp,
        local: ends.local,
        remote: ends.remote,
    })
}

fn is_connected(state: u32) -> bool {
    state == state::ESTABLISHED || sent_fin(state) || got_fin(state)
}

/// Did we say that we will send no more?
fn sent_fin(state: u32) -> bool {
    matches!(
        state,
        state::FIN_WAIT1 | state::FIN_WAIT2 | state::LAST_ACK | state::CLOSING
    )
}

/// Is our FIN in the send queue, as it is until the other end confirms it? It counts as one byte there.
fn fin_queued(state: u32) -> bool {
    sent_fin(state) && state != state::FIN_WAIT2
}

/// Did the other end say that it will send no more?
fn got_fin(state: u32) -> bool {
    matches!(state, state::CLOSE_WAIT | state::LAST_ACK | state::CLOSING)
}

fn image_name(ino: u32) -> String {
    format!("tcp-stream-{ino:x}.img")
}

fn open_stream(restore: &FileRestore<'_>, ino: u32) -> Result<ImageReader> {
    let name = image_name(ino);
    restore.image(&name)?.ok_or_else(|| {
        Error::new("restore a TCP connection")
            .object(name)
            .because("the image is missing")
    })
}

fn shut_for_reading(socket: BorrowedFd<'_>) -> Result<bool> {
    let mut poll = [PollFd::new(&socket, PollFlags::RDHUP)];
    rustix::event::poll(&mut poll, Some(&rustix::time::Timespec::default()))
        .map_err(io::Error::from)
        .context("poll a socket")?;
    Ok(poll[0].revents().contains(PollFlags::RDHUP))
}

fn shut(socket: BorrowedFd<'_>, how: Shutdown) -> Result<()> {
    match rustix::net::shutdown(socket, how) {
        // A socket without a connection says so, and is shut all the same.
        Ok(()) | Err(rustix::io::Errno::NOTCONN) => Ok(()),
        Err(error) => Err(io::Error::from(error)).context("shut a socket down"),
    }
}

fn set_keepalive(socket: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
    let tcp = entry.tcp_opts.unwrap_or_default();
    // Older images have these among the options of the socket.
    for (name, text, value) in [
        (libc::TCP_KEEPCNT, "TCP_KEEPCNT", tcp.keepcnt.or(entry.opts.tcp_keepcnt)),
        (
            libc::TCP_KEEPIDLE,
            "TCP_KEEPIDLE",
            tcp.keepidle.or(entry.opts.tcp_keepidle),
        ),
        (
            libc::TCP_KEEPINTVL,
            "TCP_KEEPINTVL",
            tcp.keepintvl.or(entry.opts.tcp_keepintvl),
        ),
    ] {
        if let Some(value) = value {
            set_socket_option_int(socket, TCP, name, value as i32)
                .with(|| Error::new("set a socket option").object(text))?;
        }
    }
    Ok(())
}

fn set_flags(socket: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
    let tcp = entry.tcp_opts.unwrap_or_default();
    for (name, text, value) in [
        (libc::TCP_NODELAY, "TCP_NODELAY", tcp.nodelay),
        (libc::TCP_CORK, "TCP_CORK", tcp.cork),
    ] {
        if value == Some(true) {
            set_socket_option_int(socket, TCP, name, 1).with(|| Error::new("set a socket option").object(text))?;
        }
    }
    Ok(())
}

/// What TCP_INFO tells.
#[derive(Clone, Copy, Debug)]
struct Info {
    state: u32,
    options: u32,
    snd_wscale: u32,
    rcv_wscale: u32,
    /// Segments under way; for a listening socket, connections that wait to be accepted.
    unacked: u32,
    /// Segments acknowledged out of order; for a listening socket, its backlog.
    sacked: u32,
}

impl Info {
    fn of(socket: BorrowedFd<'_>) -> Result<Info> {
        let bytes = socket_option(socket, TCP, libc::TCP_INFO, 104).context("read TCP_INFO")?;
        let byte = |at: usize| u32::from(bytes.get(at).copied().unwrap_or_default());
        let word = |at: usize| {
            bytes
                .get(at..at + 4)
                .map_or(0, |word| u32::from_ne_bytes(word.try_into().unwrap_or_default()))
        };
        // Two bit fields of four bits: the first is in the low half on little-endian machines only.
        let (low, high) = (byte(6) & 0xf, byte(6) >> 4);
        let (snd_wscale, rcv_wscale) = if cfg!(target_endian = "little") {
            (low, high)
        } else {
            (high, low)
        };
        Ok(Info {
            state: byte(0),
            options: byte(5),
            snd_wscale,
            rcv_wscale,
            unacked: word(24),
            sacked: word(28),
        })
    }
}

#[cfg(test)]
mod tests;
