//! Queues of unix sockets: read by peeking, filled by sending again.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, UCred};
use whimbrel_images::proto::{ScmEntry, SkPacketEntry, SkSender, UnixSkEntry};

use super::{Held, address_of, describe, key};
use crate::error::{Context, Error, Result};
use crate::kernel::message;
use crate::kernel::socket::{Identity, SIOCINQ, queue_length};
use crate::kernel::sys::{self, Kcmp, set_socket_option_int, socket_option_int};
use crate::resource::fd::{FileDump, FileRestore, OpenFile};
use crate::resource::sock::{names, options};

pub(super) const QUEUES: &str = "sk-queues.img";
const SO_PASSPIDFD: i32 = 76;
/// Room for a message at first; larger ones get more.
const PIECE: usize = 64 << 10;
/// Largest message in an image that is believed.
const LARGEST_MESSAGE: u32 = 1 << 28;

/// Writes what is in the receive queue.
pub(super) fn dump(file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let socket = file.handle.as_fd();
    let before = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF).context("read SO_PEEK_OFF")?;
    // Who sent a message is told as numbers only where these were asked for; the kernel knows them also for SO_PASSPIDFD.
    let pidfds = socket_option_int(socket, libc::SOL_SOCKET, SO_PASSPIDFD).unwrap_or(0) != 0;
    let numbers = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PASSCRED).unwrap_or(0) != 0;
    let ask = |on: bool| match pidfds && !numbers {
        true => {
            set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PASSCRED, i32::from(on)).context("set SO_PASSCRED")
        }
        false => Ok(()),
    };
    let result = ask(true).and_then(|()| read_queue(file, id, dump)).and(ask(false));
    let back = set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, before).context("set SO_PEEK_OFF");
    result.and(back)
}

fn read_queue(file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let socket = file.handle.as_fd();
    let kind = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_TYPE).context("read SO_TYPE")?;
    seek(socket, 0)?;
    if kind == libc::SOCK_STREAM {
        read_stream(file, id, dump)
    } else {
        read_messages(file, id, dump)
    }
}

/// Moves the place from where is peeked.
fn seek(socket: BorrowedFd<'_>, offset: usize) -> Result<()> {
    set_socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset as i32).context("set SO_PEEK_OFF")
}

/// The next piece, `None` at the end.
fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Option<message::Message>> {
    match message::peek(socket, buffer) {
        Ok(found) => Ok(Some(found)),
        // Nothing more; never connected; or the other end closed without reading all, which is told in place of nothing.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EAGAIN | libc::ENOTCONN | libc::ECONNRESET | libc::EINVAL)
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error).context("read a unix socket's queue"),
    }
}

fn read_stream(file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let socket = file.handle.as_fd();
    let queued = queue_length(socket, SIOCINQ).unwrap_or(0) as usize;
    // A piece ends with a write that has descriptors, or with the queue, since there is room for all of it.
    let mut buffer = vec![0u8; queued + 1];
    let mut offset = 0usize;
    while offset < queued {
        let Some(found) = peek(socket, &mut buffer)?.filter(|found| found.length > 0) else {
            break;
        };
        let bytes = &buffer[..found.length];
        let start = if found.rights.is_empty() {
            0
        } else {
            // Descriptors belong to the first byte of the write that they came with.
            seek(socket, offset)?;
            let start = message::start_of_last(socket, &mut vec![0; found.length]);
            seek(socket, offset + found.length)?;
            start.context("read a unix socket's queue")?
        };
        if start > 0 {
            let before = message::Message {
                sender: found.sender,
                ..message::Message::default()
            };
            write_message(file, id, &before, &bytes[..start], dump)?;
        }
        write_message(file, id, &found, &bytes[start..], dump)?;
        offset += found.length;
    }
    if offset != queued {
        return Err(Error::new("read a unix socket's queue").because(format!(
            "{offset} of {queued} bytes could be read: it has urgent data (MSG_OOB)"
        )));
    }
    Ok(())
}

fn read_messages(file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let socket = file.handle.as_fd();
    let mut buffer = vec![0u8; PIECE];
    let mut offset = 0usize;
    while let Some(found) = peek(socket, &mut buffer)? {
        if found.length > buffer.len() {
            buffer.resize(found.length, 0);
            seek(socket, offset)?;
            continue;
        }
        // The end of a connection looks like a message without bytes, again and again.
        if found.length == 0 && message::is_end(socket).context("poll a socket")? {
            break;
        }
        write_message(file, id, &found, &buffer[..found.length], dump)?;
        offset += found.length;
    }
    Ok(())
}

fn write_message(
    file: &OpenFile,
    id: u32,
    found: &message::Message,
    bytes: &[u8],
    dump: &mut FileDump<'_>,
) -> Result<()> {
    let rights = found
        .rights
        .iter()
        .map(|fd| description_of(fd, dump))
        .collect::<Result<Vec<u32>>>()
        .map_err(|error| error.object(file.describe()))?;
    let sender = SkSender {
        name: (!found.from.is_empty()).then(|| found.from.clone()),
        pid: found.sender.map(|(pid, _, _)| pid),
        uid: found.sender.map(|(_, uid, _)| uid),
        gid: found.sender.map(|(_, _, gid)| gid),
    };
    let entry = SkPacketEntry {
        id_for: id,
        length: bytes.len() as u32,
        scm: if rights.is_empty() {
            vec![]
        } else {
            vec![ScmEntry {
                r#type: libc::SCM_RIGHTS as u32,
                rights,
            }]
        },
        sender: (sender != SkSender::default()).then_some(sender),
        ..SkPacketEntry::default()
    };
    dump.append(QUEUES, &entry, bytes)
}

/// The image id of an open file description of which we have a duplicate.
fn description_of(fd: &OwnedFd, dump: &FileDump<'_>) -> Result<u32> {
    use std::os::fd::AsRawFd;
    let stat = rustix::fs::fstat(fd)
        .map_err(io::Error::from)
        .context("look at a descriptor in flight")?;
    let us = std::process::id() as i32;
    let same = |file: &OpenFile| {
        (file.stat.st_dev, file.stat.st_ino) == (stat.st_dev, stat.st_ino)
            && sys::kcmp(
                us,
                us,
                Kcmp::File,
                fd.as_raw_fd() as u64,
                file.handle.as_raw_fd() as u64,
            )
            .is_ok_and(std::cmp::Ordering::is_eq)
    };
    let found = dump.files.iter().find(|(_, file)| same(file));
    found.map(|(&id, _)| id).ok_or_else(|| {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default();
        Error::new("carry a descriptor in flight").because(format!(
            "no process of the tree has {} open: it is only in the socket's queue",
            link.display()
        ))
    })
}

/// Puts queued messages back: sends them again, from the peer where there is one.
pub(super) fn fill(restore: &FileRestore<'_>) -> Result<()> {
    let Some(mut image) = restore.image(QUEUES)? else {
        return Ok(());
    };
    let entries: BTreeMap<u32, &UnixSkEntry> = restore
        .entries
        .iter()
        .filter_map(|(&id, entry)| Some((id, entry.usk.as_ref()?)))
        .collect();
    while let Some(packet) = image.next::<SkPacketEntry>().context("read a queue")? {
        if packet.length > LARGEST_MESSAGE {
            return Err(Error::new("read a queue").because(format!("a message of {} bytes", packet.length)));
        }
        let data = image.extra(u64::from(packet.length)).context("read a queue")?;
        let Some(entry) = entries.get(&packet.id_for) else {
            continue;
        };
        send(entry, &packet, &data, &entries, restore).map_err(|error| error.object(describe(entry)))?;
    }
    Ok(())
}

fn send(
    entry: &UnixSkEntry,
    packet: &SkPacketEntry,
    data: &[u8],
    entries: &BTreeMap<u32, &UnixSkEntry>,
    restore: &FileRestore<'_>,
) -> Result<()> {
    let sender = packet.sender.as_ref();
    let by_ino = |ino: u32| {
        let (id, peer) = entries.iter().find(|(_, peer)| peer.ino == ino)?;
        Some((restore.opened.get(id)?, *peer))
    };
    let datagrams = entry.r#type as i32 == libc::SOCK_DGRAM;
    let dead_end = restore.held.get(&key(Held::DeadEnd, entry.ino));
    // The peer's own socket, and an address where it is not connected yet.
    let peer = by_ino(entry.peer).filter(|_| entry.peer != 0);
    let stranger;
    let (from, address) = if !datagrams {
        match (peer, dead_end) {
            (Some((socket, _)), _) => (socket, None),
            (None, Some(socket)) => (socket, None),
            (None, None) => return Err(Error::new("fill a queue").because("the socket has no peer")),
        }
    } else {
        let is_pair =
            peer.is_some_and(|(_, peer)| peer.peer == entry.ino && (peer.name.is_empty() || entry.name.is_empty()));
        let name = sender.and_then(|sender| sender.name.as_deref());
        let by_name = name.and_then(|name| {
            let same = |other: &&UnixSkEntry| {
                other.r#type == entry.r#type && other.name.strip_suffix(b"\0").unwrap_or(&other.name) == name
                    || other.name == name
            };
            let (id, _) = entries.iter().find(|(_, other)| same(other))?;
            restore.opened.get(id)
        });
        match (peer.filter(|_| is_pair), dead_end, by_name) {
            (Some((socket, _)), _, _) => (socket, None),
            (None, Some(socket), _) => (socket, None),
            (None, None, Some(socket)) => (socket, Some(address_of(entry, restore)?)),
            (None, None, None) => {
                if let Some(name) = name {
                    tracing::warn!(
                        sender = names::describe(name),
                        "a message in a queue is from a socket outside of the tree; it comes from a nameless one now"
                    );
                }
                let identity = Identity {
                    family: libc::AF_UNIX,
                    kind: entry.r#type as i32,
                    protocol: 0,
                };
                stranger = identity.make().context("make a socket")?;
                (&stranger, Some(address_of(entry, restore)?))
            }
        }
    };
    options::make_room(from.as_fd(), 64 << 20, 0)?;
    let missing = || Error::new("fill a queue").because("a descriptor in flight is not in the images");
    let rights = packet
        .scm
        .iter()
        .filter(|scm| scm.r#type as i32 == libc::SCM_RIGHTS)
        .flat_map(|scm| &scm.rights)
        .map(|id| restore.opened.get(id).map(AsFd::as_fd).ok_or_else(missing))
        .collect::<Result<Vec<BorrowedFd<'_>>>>()?;
    let credentials = sender.and_then(|sender| {
        Some(UCred {
            pid: rustix::process::Pid::from_raw(sender.pid?)?,
            uid: rustix::process::Uid::from_raw(sender.uid?),
            gid: rustix::process::Gid::from_raw(sender.gid?),
        })
    });
    let outgoing = Outgoing {
        socket: from.as_fd(),
        address,
        rights: &rights,
    };
    let mut sent = outgoing.send(data, credentials);
    if credentials.is_some() && sent.is_err() {
        tracing::warn!("a message in a queue lost its sender's credentials: there is no such process here");
        sent = outgoing.send(data, None);
    }
    sent.context("fill a queue")
}

/// A message's way.
pub(super) struct Outgoing<'a> {
    pub(super) socket: BorrowedFd<'a>,
    pub(super) address: Option<SocketAddrUnix>,
    pub(super) rights: &'a [BorrowedFd<'a>],
}

impl Outgoing<'_> {
    pub(super) fn send(&self, data: &[u8], credentials: Option<UCred>) -> io::Result<()> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253), ScmCredentials(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let mut fits = true;
        if !self.rights.is_empty() {
            fits &= control.push(SendAncillaryMessage::ScmRights(self.rights));
        }
        if let Some(credentials) = credentials {
            fits &= control.push(SendAncillaryMessage::ScmCredentials(credentials));
        }
        if !fits {
            return Err(io::Error::other("more descriptors than a message can have"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let pieces = [io::IoSlice::new(data)];
        let sent = match &self.address {
            Some(address) => rustix::net::sendmsg_addr(self.socket, address, &pieces, &mut control, flags)?,
            None => rustix::net::sendmsg(self.socket, &pieces, &mut control, flags)?,
        };
        if sent != data.len() {
            return Err(io::Error::other(format!("{sent} of {} bytes fit", data.len())));
        }
        Ok(())
    }
}
