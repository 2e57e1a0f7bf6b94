//! Unix sockets: pairs, listening ones and what they accepted, datagrams; with what is in their queues, descriptors in flight
//! included.
//!
//! All sockets of a tree are made together, when the first is asked for, since they need each other: listeners first, then
//! connections through them (so that both ends have the names that they had), then those that still wait to be accepted.
//! Queues are filled when all files of the tree exist, then datagram sockets are connected, directions shut and options
//! set that would have been in the way.
//!
//! A name in a file system is bound where it was, replacing a socket file that nobody listens on any more. A name whose file was
//! deleted, or belongs to a socket outside of the tree, is bound in an empty directory that plays the root meanwhile.
//!
//! | refused | because |
//! |---|---|
//! | a peer outside of the tree | it cannot be connected again; sockets of datagrams with a named peer can: `--ext-unix-sk` |
//! | data sent into a connection that was not accepted yet | nobody but the acceptor can read it |
//! | descriptors in flight that no process of the tree has open | they would have to be carried without a process |
//!
//! Connections that wait to be accepted and come from outside are lost. SO_PEERCRED of what is restored names the restorer.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, UCred};
use whimbrel_images::proto::{
    FdTypes, FileEntry, FilePermsEntry, ScmEntry, SkPacketEntry, SkSender, SkShutdown, UnixSkEntry,
};

use super::inet::{NETWORK_NAMESPACE, state};
use super::{inet, names, options};
use crate::error::{Context, Error, Result};
use crate::kernel::message;
use crate::kernel::sock_diag::{self, UnixSocket};
use crate::kernel::socket::{Identity, SIOCINQ, SIOCOUTQ, queue_length};
use crate::kernel::sys::{self, Kcmp, set_socket_option_int, socket_option_int};
use crate::resource::FileKind;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

/// Unix sockets.
pub struct Unix;

const QUEUES: &str = "sk-queues.img";
/// Room for a message at first; larger ones get more.
const PIECE: usize = 64 << 10;
/// Largest message in an image that is believed.
const LARGEST_MESSAGE: u32 = 1 << 28;

/// What else is held for a socket, beside it, until all are complete.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Held {
    /// The socket.
    Socket = 0,
    /// Its file, by which others reach it whatever its path.
    Reach = 1 << 32,
    /// The end that nobody has any more of a connection that it has.
    DeadEnd = 2 << 32,
}

fn key(what: Held, ino: u32) -> (FdTypes, u64) {
    (FdTypes::Unixsk, what as u64 | u64::from(ino))
}

/// The unix sockets of the network namespace, and which of them the tree has.
pub struct Facts {
    sockets: HashMap<u32, UnixSocket>,
    ids: HashMap<u32, u32>,
}

impl Facts {
    fn of<'a>(dump: &'a FileDump<'_>) -> Result<&'a Facts> {
        let cell: &OnceCell<Facts> = &dump.shared.unix;
        if let Some(facts) = cell.get() {
            return Ok(facts);
        }
        let sockets = sock_diag::unix_sockets().context("list unix sockets")?;
        let facts = Facts {
            sockets: sockets.into_iter().map(|socket| (socket.inode, socket)).collect(),
            ids: dump
                .files
                .iter()
                .filter(|(_, file)| file.file_type() == libc::S_IFSOCK)
                .map(|(&id, file)| (file.stat.st_ino as u32, id))
                .collect(),
        };
        Ok(cell.get_or_init(|| facts))
    }

    fn socket(&self, file: &OpenFile) -> Result<&UnixSocket> {
        self.sockets.get(&(file.stat.st_ino as u32)).ok_or_else(|| {
            Error::new("look at a unix socket")
                .because("the kernel does not list it: it is in another network namespace")
        })
    }

    /// The listening socket that a socket waits to be accepted by.
    fn waits_for(&self, socket: &UnixSocket) -> Option<&UnixSocket> {
        self.sockets
            .values()
            .find(|listener| listener.pending.contains(&socket.inode))
    }

    /// Whom a socket is connected to.
    fn peer(&self, socket: &UnixSocket, options: &crate::dump::Options) -> Result<Peer> {
        let datagrams = i32::from(socket.kind) == libc::SOCK_DGRAM;
        let connected = u32::from(socket.state) == state::ESTABLISHED;
        match socket.peer {
            _ if u32::from(socket.state) == state::LISTEN => Ok(Peer::None),
            Some(ino) if ino != 0 && self.ids.contains_key(&ino) => {
                let other = self.sockets.get(&ino);
                let mutual = other.is_some_and(|other| other.peer == Some(socket.inode));
                if datagrams && !mutual && other.is_none_or(|other| other.name.is_none()) {
                    return Err(Error::new("carry a unix socket").because(
                        "its peer has no name and is not connected to it, so nothing can connect to it again",
                    ));
                }
                Ok(Peer::Inside(ino))
            }
            Some(ino) if ino != 0 => {
                let name = self.sockets.get(&ino).and_then(|peer| peer.name.clone());
                let path = name.as_deref().map(names::describe);
                let who = names::holders(ino).unwrap_or_else(|| "no process that can be seen".into());
                match name {
                    Some(name) if datagrams && options.ext_unix_sk => Ok(Peer::Outside { ino, name }),
                    name => {
                        let what = path.map_or(String::new(), |path| format!(" ({path})"));
                        let error = Error::new("carry a unix socket").because(format!(
                            "its peer, socket:[{ino}]{what}, is outside of the tree: {who} has it"
                        ));
                        Err(match name {
                            Some(_) if datagrams => error.hint("use --ext-unix-sk"),
                            _ => error.hint("dump the tree that has both, or close the connection"),
                        })
                    }
                }
            }
            _ if !connected => Ok(Peer::None),
            None if datagrams => Ok(Peer::None),
            _ => match self.waits_for(socket) {
                Some(listener) if self.ids.contains_key(&listener.inode) => Ok(Peer::Waiting(listener.inode)),
                Some(listener) => {
                    let name = listener.name.as_deref().map(names::describe).unwrap_or_default();
                    let who = names::holders(listener.inode).unwrap_or_default();
                    Err(Error::new("carry a unix socket")
                        .because(format!("it waits to be accepted by {name} outside of the tree: {who}")))
                }
                None => Ok(Peer::Gone),
            },
        }
    }
}

/// Whom a socket is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Peer {
    /// Nobody.
    None,
    /// A socket of the tree.
    Inside(u32),
    /// A listening socket of the tree did not accept it yet.
    Waiting(u32),
    /// A named socket of somebody else.
    Outside { ino: u32, name: Vec<u8> },
    /// One that was closed.
    Gone,
}

impl FileKind for Unix {
    fn name(&self) -> &'static str {
        "unix socket"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Unixsk]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.file_type() == libc::S_IFSOCK
            && Identity::of(file.handle.as_fd()).is_ok_and(|identity| identity.family == libc::AF_UNIX)
    }

    fn check(&self, file: &OpenFile, dump: &FileDump<'_>) -> Result<()> {
        options::check(file.handle.as_fd())?;
        let facts = Facts::of(dump)?;
        let socket = facts.socket(file)?;
        let peer = facts.peer(socket, dump.options)?;
        if matches!(peer, Peer::Waiting(_)) && queue_length(file.handle.as_fd(), SIOCOUTQ).unwrap_or(0) > 0 {
            return Err(Error::new("carry a unix socket")
                .because("data was sent through it, and its peer did not accept the connection yet")
                .hint("try again in a moment"));
        }
        place(file, socket, facts).map(drop)
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let opts = options::dump(file.handle.as_fd(), &[], &mut dump.shared.socket_defaults)?;
        let facts = Facts::of(dump)?;
        let socket = facts.socket(file)?;
        let peer = facts.peer(socket, dump.options)?;
        let place = place(file, socket, facts)?;
        let mut name = socket.name.clone().unwrap_or_default();
        if name.first().is_some_and(|&first| first != 0) {
            // As the kernel tells and CRIU keeps it.
            name.push(0);
        }
        let mut entry = UnixSkEntry {
            id,
            ino: socket.inode,
            r#type: u32::from(socket.kind),
            state: u32::from(socket.state),
            flags: file.flags(),
            uflags: 0,
            backlog: 0,
            peer: 0,
            fown: file.owner(),
            opts,
            name,
            shutdown: SkShutdown::try_from(i32::from(socket.shutdown & 3))
                .ok()
                .filter(|&how| how != SkShutdown::None)
                .map(|how| how as i32),
            file_perms: place.perms,
            name_dir: place.directory,
            deleted: place.elsewhere.then_some(true),
            ns_id: Some(NETWORK_NAMESPACE),
            mnt_id: None,
            peer_name: None,
        };
        if entry.state == state::LISTEN {
            entry.backlog = socket.send_queue;
            let lost = socket.pending.iter().filter(|ino| !facts.ids.contains_key(ino)).count();
            if lost > 0 {
                tracing::warn!(
                    socket = names::describe(&entry.name),
                    count = lost,
                    "connections that wait to be accepted and come from outside of the tree are not carried"
                );
            }
        } else if i32::from(socket.kind) == libc::SOCK_DGRAM {
            // The kernel also calls the target of a connection connected, which it is not.
            entry.state = if peer == Peer::None {
                state::CLOSE
            } else {
                state::ESTABLISHED
            };
        }
        match peer {
            Peer::None | Peer::Gone => {}
            Peer::Inside(ino) | Peer::Waiting(ino) => entry.peer = ino,
            Peer::Outside { ino, name } => (entry.peer, entry.peer_name) = (ino, Some(name)),
        }
        if entry.state != state::LISTEN {
            dump_queue(file, id, dump)?;
        }
        Ok(FileEntry {
            r#type: FdTypes::Unixsk as i32,
            id,
            usk: Some(entry),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let ino = entry_of(entry)?.ino;
        if !restore.held.contains_key(&key(Held::Socket, ino)) {
            Builder::new(restore)?.build()?;
        }
        restore
            .held
            .remove(&key(Held::Socket, ino))
            .ok_or_else(|| Error::new("restore a unix socket").because("the image has two entries of one socket"))
    }

    fn finish(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let first = restore.entries.values().find(|entry| entry.usk.is_some());
        if first.is_none_or(|first| first.id != entry.id) {
            return Ok(());
        }
        // Everything at once, in this order for all sockets.
        fill_queues(restore)?;
        let entries: Vec<&UnixSkEntry> = restore
            .entries
            .values()
            .filter_map(|entry| entry.usk.as_ref())
            .collect();
        for entry in &entries {
            connect_datagrams(entry, restore).map_err(|error| error.object(describe(entry)))?;
        }
        restore
            .held
            .retain(|&(kind, key), _| kind != FdTypes::Unixsk || key >> 32 == 0);
        for entry in entries {
            let Some(socket) = restore.opened.get(&entry.id) else {
                continue;
            };
            let complete = || -> Result<()> {
                if let Some(how) = inet::shutdown_of(entry.shutdown) {
                    match rustix::net::shutdown(socket, how) {
                        Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
                        Err(error) => return Err(io::Error::from(error)).context("shut a socket down"),
                    }
                }
                options::after(socket.as_fd(), &entry.opts, &[])?;
                options::reuse(socket.as_fd(), &entry.opts)?;
                super::file_state(socket.as_fd(), entry.flags, &entry.fown)
            };
            complete().map_err(|error| error.object(describe(entry)))?;
        }
        Ok(())
    }
}

fn entry_of(entry: &FileEntry) -> Result<&UnixSkEntry> {
    entry
        .usk
        .as_ref()
        .ok_or_else(|| Error::new("restore a unix socket").because("the image has no entry of a unix socket"))
}

fn describe(entry: &UnixSkEntry) -> String {
    format!("unix socket {} {}", entry.ino, names::describe(&entry.name))
}

/// Where a socket's name is found.
#[derive(Default)]
struct Place {
    perms: Option<FilePermsEntry>,
    directory: Option<String>,
    /// Its file is gone, or is somebody else's.
    elsewhere: bool,
}

fn place(file: &OpenFile, socket: &UnixSocket, facts: &Facts) -> Result<Place> {
    let Some(name) = socket
        .name
        .as_deref()
        .filter(|name| name.first().is_some_and(|&first| first != 0))
    else {
        return Ok(Place::default());
    };
    let bound = socket.file;
    let found = names::find(file.pid, name, bound);
    // What a listener accepted has its name, and not its file.
    let shared = i32::from(socket.kind) != libc::SOCK_DGRAM
        && u32::from(socket.state) == state::ESTABLISHED
        && facts
            .sockets
            .values()
            .any(|other| other.inode != socket.inode && other.file == bound && u32::from(other.state) == state::LISTEN);
    match found {
        Some(found) => Ok(Place {
            perms: (!shared).then_some(found.perms),
            directory: found.directory,
            elsewhere: shared,
        }),
        None if name[0] != b'/' && u32::from(socket.state) != state::ESTABLISHED => {
            Err(Error::new("carry a unix socket")
                .object(names::describe(name))
                .because("its name is relative, and leads nowhere from its process's working directory"))
        }
        None => Ok(Place {
            elsewhere: true,
            ..Place::default()
        }),
    }
}

/// Writes what is in the receive queue.
fn dump_queue(file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let socket = file.handle.as_fd();
    let before = socket_option_int(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF).context("read SO_PEEK_OFF")?;
    let result = read_queue(file, id, dump);
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

/// Makes all unix sockets of a tree.
struct Builder<'a, 'r> {
    restore: &'a mut FileRestore<'r>,
    entries: BTreeMap<u32, UnixSkEntry>,
    made: BTreeMap<u32, OwnedFd>,
}

impl<'a, 'r> Builder<'a, 'r> {
    fn new(restore: &'a mut FileRestore<'r>) -> Result<Self> {
        let all: Vec<&UnixSkEntry> = restore
            .entries
            .values()
            .filter_map(|entry| entry.usk.as_ref())
            .collect();
        let entries: BTreeMap<u32, UnixSkEntry> = all.iter().map(|&entry| (entry.ino, entry.clone())).collect();
        if entries.len() != all.len() {
            return Err(Error::new("restore unix sockets").because("the image has two entries of one socket"));
        }
        Ok(Builder {
            restore,
            entries,
            made: BTreeMap::new(),
        })
    }

    fn build(mut self) -> Result<()> {
        let entries: Vec<UnixSkEntry> = self.entries.values().cloned().collect();
        let is_connection =
            |entry: &UnixSkEntry| entry.state == state::ESTABLISHED && (entry.r#type as i32 != libc::SOCK_DGRAM);
        let named = |error: Error, entry: &UnixSkEntry| error.object(describe(entry));
        for entry in entries.iter().filter(|entry| !is_connection(entry)) {
            self.alone(entry).map_err(|error| named(error, entry))?;
        }
        for entry in entries.iter().filter(|entry| is_connection(entry)) {
            self.connection(entry).map_err(|error| named(error, entry))?;
        }
        for entry in entries.iter().filter(|entry| is_connection(entry)) {
            self.waiting(entry).map_err(|error| named(error, entry))?;
        }
        for (ino, socket) in self.made {
            let (kind, key) = key(Held::Socket, ino);
            self.restore.hold(kind, key, socket);
        }
        Ok(())
    }

    fn make(&self, entry: &UnixSkEntry) -> Result<OwnedFd> {
        let identity = Identity {
            family: libc::AF_UNIX,
            kind: entry.r#type as i32,
            protocol: 0,
        };
        identity.make().context("make a socket")
    }

    fn pair(&self, entry: &UnixSkEntry) -> Result<(OwnedFd, OwnedFd)> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let kind = SocketType::from_raw(entry.r#type);
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)
            .context("make a pair of sockets")
    }

    /// Sets what must be set first, and gives the socket its name.
    fn prepare(&mut self, entry: &UnixSkEntry, socket: &OwnedFd) -> Result<()> {
        options::before(socket.as_fd(), &entry.opts, &[])?;
        if let Some(reach) = names::bind(socket.as_fd(), entry, &self.restore.options.root)? {
            let (kind, key) = key(Held::Reach, entry.ino);
            self.restore.hold(kind, key, reach);
        }
        Ok(())
    }

    /// A socket that is not one end of a connection; datagram sockets that can only be connected as a pair are made as one.
    fn alone(&mut self, entry: &UnixSkEntry) -> Result<()> {
        if self.made.contains_key(&entry.ino) {
            return Ok(());
        }
        let datagrams = entry.r#type as i32 == libc::SOCK_DGRAM;
        let peer = self.entries.get(&entry.peer).filter(|_| entry.peer != 0).cloned();
        let gone = datagrams && entry.state == state::ESTABLISHED && entry.peer == 0;
        let pair = peer.filter(|peer| {
            datagrams
                && peer.peer == entry.ino
                && peer.ino != entry.ino
                && (peer.name.is_empty() || entry.name.is_empty())
        });
        if gone || pair.is_some() {
            let (one, other) = self.pair(entry)?;
            self.prepare(entry, &one)?;
            match pair {
                Some(peer) => {
                    self.prepare(&peer, &other)?;
                    self.made.insert(peer.ino, other);
                }
                None => {
                    let (kind, key) = key(Held::DeadEnd, entry.ino);
                    self.restore.hold(kind, key, other);
                }
            }
            self.made.insert(entry.ino, one);
            return Ok(());
        }
        let socket = self.make(entry)?;
        self.prepare(entry, &socket)?;
        if entry.state == state::LISTEN {
            rustix::net::listen(&socket, i32::try_from(entry.backlog).unwrap_or(i32::MAX))
                .map_err(io::Error::from)
                .context("listen")?;
        }
        self.made.insert(entry.ino, socket);
        Ok(())
    }

    /// Both ends of a connection.
    fn connection(&mut self, entry: &UnixSkEntry) -> Result<()> {
        if self.made.contains_key(&entry.ino) {
            return Ok(());
        }
        let peer = match self.entries.get(&entry.peer).filter(|_| entry.peer != 0) {
            Some(peer) if peer.state == state::LISTEN => return Ok(()),
            Some(peer) if peer.peer == entry.ino && peer.r#type == entry.r#type => Some(peer.clone()),
            Some(_) => return Err(Error::new("restore a connection").because("its peer has another peer")),
            None if entry.peer != 0 => {
                return Err(Error::new("restore a connection").because("its peer is not in the images"));
            }
            None => None,
        };
        let accepted = |entry: &UnixSkEntry| self.listener(entry);
        let (one, other) = if let Some(listener) = accepted(entry) {
            let client = self.make(entry)?;
            if let Some(peer) = &peer {
                self.prepare(peer, &client)?;
            }
            let server = self.accept(listener, &client)?;
            options::before(server.as_fd(), &entry.opts, &[])?;
            (server, client)
        } else if let Some(listener) = peer.as_ref().and_then(accepted) {
            let client = self.make(entry)?;
            self.prepare(entry, &client)?;
            let server = self.accept(listener, &client)?;
            if let Some(peer) = &peer {
                options::before(server.as_fd(), &peer.opts, &[])?;
            }
            (client, server)
        } else {
            let (one, other) = self.pair(entry)?;
            self.prepare(entry, &one)?;
            if let Some(peer) = &peer {
                self.prepare(peer, &other)?;
            }
            (one, other)
        };
        self.made.insert(entry.ino, one);
        match peer {
            Some(peer) => drop(self.made.insert(peer.ino, other)),
            None => {
                let (kind, key) = key(Held::DeadEnd, entry.ino);
                self.restore.hold(kind, key, other);
            }
        }
        Ok(())
    }

    /// The listening socket that accepted `entry`, which has its name from it.
    fn listener(&self, entry: &UnixSkEntry) -> Option<u32> {
        let matches = |other: &&UnixSkEntry| {
            other.state == state::LISTEN && other.r#type == entry.r#type && other.name == entry.name
        };
        // Of several with one name, whose files were deleted one after the other, any will do.
        let found = self.entries.values().find(matches).filter(|_| !entry.name.is_empty());
        found.map(|listener| listener.ino)
    }

    fn accept(&self, listener: u32, client: &OwnedFd) -> Result<OwnedFd> {
        self.reach(listener, client)?;
        rustix::net::accept_with(&self.made[&listener], rustix::net::SocketFlags::CLOEXEC)
            .map_err(io::Error::from)
            .context("accept a connection")
    }

    fn reach(&self, listener: u32, client: &OwnedFd) -> Result<()> {
        let address = address_of(&self.entries[&listener], self.restore)?;
        rustix::net::connect(client, &address)
            .map_err(io::Error::from)
            .context("connect to a listening socket of the tree")
    }

    /// A connection that its listener did not accept yet.
    fn waiting(&mut self, entry: &UnixSkEntry) -> Result<()> {
        if self.made.contains_key(&entry.ino) {
            return Ok(());
        }
        let socket = self.make(entry)?;
        self.prepare(entry, &socket)?;
        self.reach(entry.peer, &socket)?;
        self.made.insert(entry.ino, socket);
        Ok(())
    }
}

/// An address by which a named socket is reached from here, whatever became of its path.
fn address_of(entry: &UnixSkEntry, restore: &FileRestore<'_>) -> Result<SocketAddrUnix> {
    use std::os::fd::AsRawFd;
    if let Some(reach) = restore.held.get(&key(Held::Reach, entry.ino)) {
        return SocketAddrUnix::new(format!("/proc/self/fd/{}", reach.as_raw_fd()))
            .map_err(io::Error::from)
            .context("name a socket");
    }
    names::address(&entry.name)
}

/// Connects a datagram socket to a peer with a name; pairs are connected already.
fn connect_datagrams(entry: &UnixSkEntry, restore: &FileRestore<'_>) -> Result<()> {
    if entry.r#type as i32 != libc::SOCK_DGRAM || entry.state != state::ESTABLISHED || entry.peer == 0 {
        return Ok(());
    }
    let peer = restore
        .entries
        .values()
        .filter_map(|entry| entry.usk.as_ref())
        .find(|peer| peer.ino == entry.peer);
    let address = match (peer, &entry.peer_name) {
        // A pair.
        (Some(peer), _) if peer.name.is_empty() => return Ok(()),
        (Some(peer), _) if peer.peer == entry.ino && entry.name.is_empty() => return Ok(()),
        (Some(peer), _) => address_of(peer, restore)?,
        (None, Some(name)) => names::address(name)?,
        (None, None) => return Err(Error::new("connect a unix socket").because("its peer is not in the images")),
    };
    let Some(socket) = restore.opened.get(&entry.id) else {
        return Ok(());
    };
    rustix::net::connect(socket, &address)
        .map_err(io::Error::from)
        .with(|| {
            let name = entry.peer_name.as_deref().map(names::describe).unwrap_or_default();
            Error::new("connect a unix socket")
                .object(name)
                .hint("a socket of that name must be there on this host")
        })
}

/// Puts queued messages back: sends them again, from the peer where there is one.
fn fill_queues(restore: &FileRestore<'_>) -> Result<()> {
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
struct Outgoing<'a> {
    socket: BorrowedFd<'a>,
    address: Option<SocketAddrUnix>,
    rights: &'a [BorrowedFd<'a>],
}

impl Outgoing<'_> {
    fn send(&self, data: &[u8], credentials: Option<UCred>) -> io::Result<()> {
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

#[cfg(test)]
#[path = "unix_tests.rs"]
mod tests;
