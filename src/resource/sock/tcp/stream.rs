//! A TCP connection: read from a socket in repair mode, and built on another.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::net::{RecvFlags, SendFlags, Shutdown};
use whimbrel_images::entry::ImageReader;
use whimbrel_images::proto::{InetSkEntry, TcpStreamEntry};

use super::{Info, REPAIR_OFF_NO_WP, REPAIR_ON, TCP, TCP_REPAIR, fin_queued, got_fin, sent_fin, shut};
use crate::error::{Context, Error, Result};
use crate::kernel::section;
use crate::kernel::socket::{SIOCINQ, SIOCOUTQ, SIOCOUTQNSD, queue_length};
use crate::kernel::sys::{set_socket_option, set_socket_option_int, socket_option, socket_option_int};
use crate::resource::sock::inet::{self, Ends};
use crate::resource::sock::options;

const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
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
pub(super) struct Stream {
    pub(super) entry: TcpStreamEntry,
    pub(super) inq: Vec<u8>,
    pub(super) outq: Vec<u8>,
}

impl Stream {
    /// Reads the connection of a socket, which is in repair mode for just that time.
    pub(super) fn read(socket: BorrowedFd<'_>, info: &Info) -> io::Result<Stream> {
        match Stream::read_with(socket, info, 0)? {
            Ok(stream) => Ok(stream),
            Err(behind) => {
                Stream::read_with(socket, info, behind)?.map_err(|_| io::Error::other("the connection is in use"))
            }
        }
    }

    /// As [`Stream::read`], with room for bytes behind the place of urgent data that was read; tells how many there are when
    /// there are more.
    fn read_with(socket: BorrowedFd<'_>, info: &Info, behind: usize) -> io::Result<Result<Stream, usize>> {
        let select = |queue: i32| set_socket_option_int(socket, TCP, TCP_REPAIR_QUEUE, queue);
        let word = |name: i32| socket_option_int(socket, TCP, name).map(|value| value as u32);
        let fin = u32::from(fin_queued(info.state));
        let inq_len = queue_length(socket, SIOCINQ)?;
        let outq_len = queue_length(socket, SIOCOUTQ)?.saturating_sub(fin);
        let unsq_len = queue_length(socket, SIOCOUTQNSD)?.saturating_sub(fin);
        let (mut inq, mut outq) = (vec![0; inq_len as usize], vec![0; outq_len as usize]);
        let inline = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_OOBINLINE)?;
        let mut behind = vec![0; behind];
        let peek_off = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
        if peek_off >= 0 {
            set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
        }

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
            let whole = if inline == 0 { whole_queue(socket)? } else { after.0 };
            let more = behind_urgent(socket, &mut behind, received)?;
            Ok((
                inq_seq,
                received,
                outq_seq,
                sent,
                window,
                clamp,
                timestamp,
                after,
                (whole, more),
            ))
        };
        // A connection must not stay in repair mode, whatever becomes of this process: the program could not use it any more.
        let result = section::unstoppable(|| -> io::Result<_> {
            let repair = Repair::enter(socket)?;
            let result = queues();
            if result.is_err() {
                // Even if that was what failed.
                let _ = select(NO_QUEUE);
            }
            drop(repair);
            result
        });

        if peek_off >= 0 {
            set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, peek_off)?;
        }
        let (inq_seq, received, outq_seq, sent, window, mss_clamp, timestamp, after, (whole, more)) = result?;
        let left = whole.saturating_sub(inq_len) as usize;
        if left > behind.len() {
            return Ok(Err(left));
        }
        if (received, sent) != (inq.len(), outq.len()) || after != (inq_len, outq_len + fin) {
            return Err(io::Error::other(format!(
                "{received} of {inq_len} received and {sent} of {outq_len} sent bytes could be read: the connection is in use, or has urgent data"
            )));
        }
        inq.extend(&behind[..more]);
        let inq_len = inq.len() as u32;
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
        Ok(Ok(Stream { entry, inq, outq }))
    }

    pub(super) fn load(image: &mut ImageReader) -> Result<Stream> {
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
    pub(super) fn build(&self, socket: BorrowedFd<'_>, state: u32, ends: &Ends) -> Result<()> {
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
    pub(super) fn send_rest(&self, socket: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
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

/// Bytes in the receive queue with those behind the place of urgent data, of which the kernel tells only where that is inline.
/// Not to be stopped half-way.
fn whole_queue(socket: BorrowedFd<'_>) -> io::Result<u32> {
    set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
    let length = queue_length(socket, SIOCINQ);
    set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_OOBINLINE, 0)?;
    length
}

/// Copies what is behind an urgent byte that was read, which `room` is as long as, with that byte. In repair mode.
fn behind_urgent(socket: BorrowedFd<'_>, room: &mut [u8], before: usize) -> io::Result<usize> {
    if room.len() < 2 {
        return Ok(0);
    }
    set_socket_option_int(socket, TCP, TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
    // Peeking from a place is known to TCP since Linux 6.9.
    set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before as i32)?;
    let copied = peek(socket, room);
    set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    set_socket_option_int(socket, TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    match copied? {
        copied if copied == room.len() - 1 => Ok(copied),
        copied => Err(io::Error::other(format!(
            "{copied} of {} bytes behind urgent data could be read",
            room.len() - 1
        ))),
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
