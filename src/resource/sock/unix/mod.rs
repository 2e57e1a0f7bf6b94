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
//! | an urgent byte (MSG_OOB) that was not read | its place among the others is not told |
//! | data sent into a connection that was not accepted yet | nobody but the acceptor can read it |
//! | descriptors in flight that no process of the tree has open | they would have to be carried without a process |
//!
//! Connections that wait to be accepted and come from outside are lost. SO_PEERCRED of what is restored names the restorer.

mod queue;

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::net::SocketAddrUnix;
use whimbrel_images::proto::{FdTypes, FileEntry, FilePermsEntry, SkShutdown, UnixSkEntry};

use super::inet::{NETWORK_NAMESPACE, state};
use super::{inet, names, options};
use crate::error::{Context, Error, Result};
use crate::kernel::sock_diag::{self, UnixSocket};
use crate::kernel::socket::{Identity, SIOCOUTQ, queue_length};
use crate::resource::FileKind;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

/// Unix sockets.
pub struct Unix;

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
        if i32::from(Facts::of(dump)?.socket(file)?.kind) == libc::SOCK_STREAM
            && super::poll(file.handle.as_fd(), PollFlags::PRI)?.contains(PollFlags::PRI)
        {
            return Err(Error::new("carry a unix socket")
                .because("it has an urgent byte (MSG_OOB) that the program has not read, whose place is not told")
                .hint("try again when the program has read it"));
        }
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
            queue::dump(file, id, dump)?;
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
        queue::fill(restore)?;
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

#[cfg(test)]
mod tests;
