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
//! | LISTEN | itself; connections that wait to be accepted are lost, their clients get a reset |
//! | CLOSE | itself, bound if it was |
//! | ESTABLISHED | itself |
//! | FIN_WAIT1, FIN_WAIT2 | FIN_WAIT1: the FIN is repeated once if the other end knew it already |
//! | CLOSE_WAIT | ESTABLISHED, shut for reading: reads give the rest and then the end, acknowledgements include the other end's FIN |
//! | LAST_ACK, CLOSING | FIN_WAIT1, shut for reading |

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use whimbrel_images::entry::{ImageReader, ImageWriter};
use whimbrel_images::proto::{FdTypes, FileEntry, InetSkEntry, SkShutdown, TcpOptsEntry, TcpStreamEntry};

use super::inet::{self, Ends, state};
use super::options::{self, RawOption, raw_options};
use crate::error::{Context, Error, Result};
use crate::kernel::nft::{Connection, Protocol};
use crate::kernel::socket::{SIOCINQ, SIOCOUTQ, SIOCOUTQNSD, queue_length};
use crate::kernel::sys::{set_socket_option, set_socket_option_int, socket_option, socket_option_int};
use crate::resource::FileKind;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

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
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

const REPAIR_ON: i32 = 1;
const REPAIR_OFF: i32 = 0;
const REPAIR_OFF_NO_WP: i32 = -1;

const NO_QUEUE: i32 = 0;
const RECEIVE_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;

/// Bits of `tcp_stream_entry.opt_mask`, those of TCP_INFO.
const OPT_TIMESTAMPS: u32 = 1;
const OPT_SACK: u32 = 2;
const OPT_WSCALE: u32 = 4;

/// Codes of TCP_REPAIR_OPTIONS, those of the options in a SYN.
const CODE_MSS: u32 = 2;
const CODE_WINDOW: u32 = 3;
const CODE_SACK: u32 = 4;
const CODE_TIMESTAMP: u32 = 8;

/// Data is put into queues in pieces of this size.
const PIECE: usize = 64 << 10;
/// Largest send buffer that the kernel gives, so no queue in an image can be larger.
const LARGEST_QUEUE: u32 = 1 << 30;

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
            state::LISTEN => Ok(()),
            state::CLOSE => match queue_length(socket, SIOCINQ).unwrap_or(0) {
                0 => Ok(()),
                unread => refused(
                    "carry a closed TCP socket",
                    format!("{unread} bytes were received before it was closed and are not read yet"),
                ),
            },
            state::SYN_SENT | state::SYN_RECV => refused(
                "carry a TCP socket",
                "its connection is being made right now; try again in a moment".into(),
            ),
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
        let connected = is_connected(info.state);
        let ended = info.state != state::LISTEN && !got_fin(info.state) && shut_for_reading(socket)?;
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

    fn connection(&self, file: &OpenFile) -> Result<Option<Connection>> {
        let ends = Ends::of(file.handle.as_fd())?;
        let connected = ends.remote.port() != 0;
        Ok(connected.then_some(Connection {
            protocol: Protocol::Tcp,
            local: ends.local,
            remote: ends.remote,
        }))
    }

    fn connection_of(&self, entry: &FileEntry) -> Result<Option<Connection>> {
        let entry = inet::entry_of(entry)?;
        if entry.dst_port == 0 {
            return Ok(None);
        }
        let any = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
        let ends = Ends::of_entry(entry, any.map_err(io::Error::from).context("open a socket")?)?;
        Ok(Some(Connection {
            protocol: Protocol::Tcp,
            local: ends.local,
            remote: ends.remote,
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
        let socket = inet::make(entry, &own)?;
        let fd = socket.as_fd();
        set_keepalive(fd, entry)?;
        let ends = Ends::of_entry(entry, fd)?;
        match entry.state {
            state::LISTEN => {
                inet::bind(fd, &ends)?;
                rustix::net::listen(fd, i32::try_from(entry.backlog).unwrap_or(i32::MAX))
                    .map_err(io::Error::from)
                    .with(|| Error::new("listen").object(ends.describe()))?;
            }
            state::CLOSE => {
                if ends.local.port() != 0 || !ends.local.ip().is_unspecified() {
                    inet::bind(fd, &ends)?;
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
        if let Some(how) = inet::shutdown_of(entry.shutdown) {
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
        if is_connected(isk.state) {
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

/// A socket in repair mode, which it leaves when this is dropped, as if nothing had been.
struct Repair<'a> {
    socket: BorrowedFd<'a>,
    reuse: i32,
}

impl<'a> Repair<'a> {
    fn enter(socket: BorrowedFd<'a>) -> io::Result<Repair<'a>> {
        // Repair mode uses this option for itself and clears it in the end.
        let reuse = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?.min(1);
        set_socket_option_int(socket, TCP, TCP_REPAIR, REPAIR_ON)?;
        Ok(Repair { socket, reuse })
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        let left = set_socket_option_int(self.socket, TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
            .and_then(|()| set_socket_option_int(self.socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, self.reuse));
        if let Err(error) = left {
            tracing::error!(%error, "a TCP connection could not be taken out of repair mode");
        }
    }
}

/// A connection: sequence numbers, options, windows, queues.
struct Stream {
    entry: TcpStreamEntry,
    inq: Vec<u8>,
    outq: Vec<u8>,
}

impl Stream {
    /// Reads the connection of a socket, which is in repair mode for just that time.
    fn read(socket: BorrowedFd<'_>, info: &Info) -> io::Result<Stream> {
        let select = |queue: i32| set_socket_option_int(socket, TCP, TCP_REPAIR_QUEUE, queue);
        let word = |name: i32| socket_option_int(socket, TCP, name).map(|value| value as u32);
        let fin = u32::from(fin_queued(info.state));
        let inq_len = queue_length(socket, SIOCINQ)?;
        let outq_len = queue_length(socket, SIOCOUTQ)?.saturating_sub(fin);
        let unsq_len = queue_length(socket, SIOCOUTQNSD)?.saturating_sub(fin);
        let (mut inq, mut outq) = (vec![0; inq_len as usize], vec![0; outq_len as usize]);
        let peek_off = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
        if peek_off >= 0 {
            set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
        }

        let repair = Repair::enter(socket)?;
        let mut queues = || -> io::Result<_> {
            select(RECEIVE_QUEUE)?;
            let inq_seq = word(TCP_QUEUE_SEQ)?;
            let received = peek(socket, &mut inq)?;
            // With the send queue selected, the kernel takes data for sent that it was asked to send: be short.
            select(SEND_QUEUE)?;
            let outq_seq = word(TCP_QUEUE_SEQ)?;
            let sent = peek(socket, &mut outq)?;
            select(NO_QUEUE)?;
            let window = socket_option(socket, TCP, TCP_REPAIR_WINDOW, 20)?;
            let clamp = word(libc::TCP_MAXSEG)?;
            let timestamp = word(TCP_TIMESTAMP)?;
            let after = (queue_length(socket, SIOCINQ)?, queue_length(socket, SIOCOUTQ)?);
            Ok((inq_seq, received, outq_seq, sent, window, clamp, timestamp, after))
        };
        let result = queues();
        if result.is_err() {
            // Even if that was what failed.
            let _ = select(NO_QUEUE);
        }
        drop(repair);

        if peek_off >= 0 {
            set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, peek_off)?;
        }
        let (inq_seq, received, outq_seq, sent, window, mss_clamp, timestamp, after) = result?;
        if (received, sent) != (inq.len(), outq.len()) || after != (inq_len, outq_len + fin) {
            return Err(io::Error::other(format!(
                "{received} of {inq_len} received and {sent} of {outq_len} sent bytes could be read: the connection is in use, or has urgent data"
            )));
        }
        let window_word = |at: usize| {
            window
                .get(at * 4..at * 4 + 4)
                .map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()))
        };
        let entry = TcpStreamEntry {
            inq_len,
            inq_seq,
            outq_len,
            outq_seq,
            opt_mask: info.options & (OPT_TIMESTAMPS | OPT_SACK | OPT_WSCALE),
            snd_wscale: info.snd_wscale,
            mss_clamp,
            rcv_wscale: (info.options & OPT_WSCALE != 0).then_some(info.rcv_wscale),
            timestamp: (info.options & OPT_TIMESTAMPS != 0).then_some(timestamp),
            cork: None,
            nodelay: None,
            unsq_len: Some(unsq_len),
            snd_wl1: window_word(0),
            snd_wnd: window_word(1),
            max_window: window_word(2),
            rcv_wnd: window_word(3),
            rcv_wup: window_word(4),
        };
        Ok(Stream { entry, inq, outq })
    }

    fn load(image: &mut ImageReader) -> Result<Stream> {
        let damaged = |why: &str| Error::new("restore a TCP connection").because(why);
        let entry: TcpStreamEntry = image.required().context("read a TCP connection")?;
        if entry.inq_len > LARGEST_QUEUE || entry.outq_len > LARGEST_QUEUE {
            return Err(damaged("the image has a queue that is larger than any can be"));
        }
        if entry.unsq_len.unwrap_or(0) > entry.outq_len {
            return Err(damaged(
                "the image has more data that was not sent than data in the send queue",
            ));
        }
        let inq = image.extra(u64::from(entry.inq_len)).context("read a TCP connection")?;
        let outq = image
            .extra(u64::from(entry.outq_len))
            .context("read a TCP connection")?;
        Ok(Stream { entry, inq, outq })
    }

    /// The part of the send queue that was sent, and the rest.
    fn sent_and_rest(&self) -> (&[u8], &[u8]) {
        let rest = self.entry.unsq_len.unwrap_or(0).min(self.entry.outq_len) as usize;
        self.outq.split_at(self.outq.len() - rest)
    }

    /// Makes the connection on a new socket, which stays in repair mode.
    fn build(&self, socket: BorrowedFd<'_>, state: u32, ends: &Ends) -> Result<()> {
        let entry = &self.entry;
        let set = |name: i32, text: &str, value: u32| {
            set_socket_option_int(socket, TCP, name, value as i32)
                .with(|| Error::new("repair a TCP connection").object(text))
        };
        let select = |queue: i32| set(TCP_REPAIR_QUEUE, "TCP_REPAIR_QUEUE", queue as u32);
        set_socket_option_int(socket, TCP, TCP_REPAIR, REPAIR_ON)
            .with(|| Error::new("repair a TCP connection").hint("this needs CAP_NET_ADMIN in the network namespace"))?;
        inet::bind(socket, ends)?;
        options::make_room(socket, u64::from(entry.outq_len), u64::from(entry.inq_len))?;
        // Sequence numbers are set where the queues begin, and move on as these are filled. A FIN of the other end counts as
        // received from the start: it is not made again, only acknowledged. Ours is made again, so it is not counted.
        select(RECEIVE_QUEUE)?;
        set(
            TCP_QUEUE_SEQ,
            "TCP_QUEUE_SEQ",
            entry.inq_seq.wrapping_sub(entry.inq_len),
        )?;
        select(SEND_QUEUE)?;
        let data_end = entry.outq_seq.wrapping_sub(u32::from(sent_fin(state)));
        set(TCP_QUEUE_SEQ, "TCP_QUEUE_SEQ", data_end.wrapping_sub(entry.outq_len))?;
        inet::connect(socket, ends)?;
        self.set_options(socket)?;
        if let Some(timestamp) = entry.timestamp {
            set(TCP_TIMESTAMP, "TCP_TIMESTAMP", timestamp)?;
        }
        select(RECEIVE_QUEUE)?;
        fill(socket, &self.inq, "fill the receive queue")?;
        select(SEND_QUEUE)?;
        let (sent, rest) = self.sent_and_rest();
        fill(socket, sent, "fill the send queue")?;
        if sent_fin(state) && rest.is_empty() {
            // In repair mode the FIN goes to the queue as sent.
            shut(socket, Shutdown::Write)?;
        }
        if got_fin(state) {
            shut(socket, Shutdown::Read)?;
        }
        select(NO_QUEUE)?;
        self.set_window(socket)
    }

    fn set_options(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let entry = &self.entry;
        let mut pairs = vec![[CODE_MSS, entry.mss_clamp]];
        if entry.opt_mask & OPT_WSCALE != 0 {
            pairs.push([
                CODE_WINDOW,
                entry.snd_wscale & 0xffff | entry.rcv_wscale.unwrap_or(0) << 16,
            ]);
        }
        if entry.opt_mask & OPT_SACK != 0 {
            pairs.push([CODE_SACK, 0]);
        }
        if entry.opt_mask & OPT_TIMESTAMPS != 0 {
            pairs.push([CODE_TIMESTAMP, 0]);
        }
        let bytes: Vec<u8> = pairs.into_iter().flatten().flat_map(u32::to_ne_bytes).collect();
        set_socket_option(socket, TCP, TCP_REPAIR_OPTIONS, &bytes)
            .with(|| Error::new("repair a TCP connection").object("TCP_REPAIR_OPTIONS"))?;
        // The segment size was computed while connecting, from the smallest that all hosts take. Setting the IP options, to
        // what they are, has it computed again.
        let ip_options = socket_option(socket, libc::IPPROTO_IP, libc::IP_OPTIONS, 40).unwrap_or_default();
        if let Err(error) = set_socket_option(socket, libc::IPPROTO_IP, libc::IP_OPTIONS, &ip_options) {
            tracing::debug!(%error, "a TCP connection goes on with small segments");
        }
        Ok(())
    }

    fn set_window(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let entry = &self.entry;
        let words = [
            entry.snd_wl1,
            entry.snd_wnd,
            entry.max_window,
            entry.rcv_wnd,
            entry.rcv_wup,
        ];
        // Old images lack them; the probe at the end asks the other end for its window.
        let Some(words) = words.into_iter().collect::<Option<Vec<u32>>>() else {
            return Ok(());
        };
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        set_socket_option(socket, TCP, TCP_REPAIR_WINDOW, &bytes)
            .with(|| Error::new("repair a TCP connection").object("TCP_REPAIR_WINDOW"))
    }

    /// Sends what was never sent, the ordinary way, then makes the buffers what they were.
    fn send_rest(&self, socket: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
        let (_, rest) = self.sent_and_rest();
        if !rest.is_empty() {
            options::make_room(socket, self.outq.len() as u64, self.inq.len() as u64)?;
            if let Err(error) = fill(socket, rest, "send the rest") {
                match error.errno() {
                    // The other end is gone; the program will learn it when it uses the socket.
                    Some(libc::ECONNRESET | libc::EPIPE | libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH) => {
                        tracing::warn!(error = error.chain(), "a connection was lost before it could go on");
                    }
                    _ => return Err(error),
                }
            }
            if sent_fin(entry.state) {
                shut(socket, Shutdown::Write)?;
            }
            options::buffers(socket, &entry.opts)?;
        }
        Ok(())
    }
}

/// Copies the selected queue; the amount that was there.
fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    if buffer.is_empty() {
        return Ok(0);
    }
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let (copied, _) = rustix::net::recv(socket, buffer, flags)?;
    Ok(copied)
}

/// Puts all of `data` into the selected queue, or sends it.
fn fill(socket: BorrowedFd<'_>, data: &[u8], what: &str) -> Result<()> {
    let mut rest = data;
    while !rest.is_empty() {
        let piece = &rest[..rest.len().min(PIECE)];
        let done = rustix::net::send(socket, piece, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
            .map_err(io::Error::from)
            .with(|| Error::new(format!("{what} of a TCP connection")))?;
        rest = &rest[done..];
    }
    Ok(())
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
