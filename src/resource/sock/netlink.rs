//! Netlink sockets: their port, groups, peer and options.
//!
//! What is in a queue came from the kernel, and nobody else can send it again: a socket with something in it is refused. So is
//! one to which a queue or a log of netfilter is bound, for these belong to the port and go with the socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use whimbrel_images::proto::{FdTypes, FileEntry, NetlinkSkEntry};

use super::inet::NETWORK_NAMESPACE;
use super::options::{self, RawOption, raw_options};
use crate::error::{Context, Error, Result};
use crate::kernel::socket::{Identity, bind_raw, connect_raw, raw_address};
use crate::kernel::sys::{set_socket_option_int, socket_option};
use crate::resource::FileKind;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

/// Netlink sockets.
pub struct Netlink;

const NETLINK: i32 = 270;
const ADD_MEMBERSHIP: i32 = 1;
const LIST_MEMBERSHIPS: i32 = 9;
/// Words of a list of groups that are asked for; no protocol of the kernel has as many.
const GROUP_WORDS: usize = 64;

static OPTIONS: &[RawOption] = raw_options![
    NETLINK, 3, "NETLINK_PKTINFO", 4, Early;
    NETLINK, 4, "NETLINK_BROADCAST_ERROR", 4, Early;
    NETLINK, 5, "NETLINK_NO_ENOBUFS", 4, Early;
    NETLINK, 8, "NETLINK_LISTEN_ALL_NSID", 4, Early;
    NETLINK, 10, "NETLINK_CAP_ACK", 4, Early;
    NETLINK, 11, "NETLINK_EXT_ACK", 4, Early;
    NETLINK, 12, "NETLINK_GET_STRICT_CHK", 4, Early;
];

/// Port and groups of a `sockaddr_nl`.
fn port_and_groups(address: &[u8]) -> (u32, u32) {
    let word = |at: usize| {
        let bytes = address.get(at..at + 4).and_then(|word| word.try_into().ok());
        bytes.map_or(0, u32::from_ne_bytes)
    };
    (word(4), word(8))
}

fn address(port: u32, groups: u32) -> Vec<u8> {
    let family = (libc::AF_NETLINK as u16).to_ne_bytes();
    [&family[..], &[0, 0], &port.to_ne_bytes(), &groups.to_ne_bytes()].concat()
}

fn describe(protocol: u32, port: u32) -> String {
    format!("netlink socket of protocol {protocol}, port {port}")
}

impl FileKind for Netlink {
    fn name(&self) -> &'static str {
        "netlink socket"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Netlinksk]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.file_type() == libc::S_IFSOCK
            && Identity::of(file.handle.as_fd()).is_ok_and(|identity| identity.family == libc::AF_NETLINK)
    }

    fn check(&self, file: &OpenFile, _dump: &FileDump<'_>) -> Result<()> {
        let socket = file.handle.as_fd();
        options::check(socket)?;
        let identity = Identity::of(socket).context("ask for a socket's type")?;
        let (port, _) = port_and_groups(&raw_address(socket, false).context("ask for a socket's address")?);
        let refused = |why: &str| {
            Error::new("carry a socket")
                .object(describe(identity.protocol as u32, port))
                .because(why)
        };
        if super::poll(socket, PollFlags::IN | PollFlags::ERR)?.intersects(PollFlags::IN | PollFlags::ERR) {
            return Err(
                refused("messages of the kernel wait in it, which nobody else can send again")
                    .hint("try again when the program has read them"),
            );
        }
        let bound = |name: &str| {
            let list = std::fs::read_to_string(format!("/proc/thread-self/net/netfilter/{name}")).unwrap_or_default();
            list.lines()
                .any(|line| line.split_ascii_whitespace().nth(1).and_then(|word| word.parse().ok()) == Some(port))
        };
        if identity.protocol == libc::NETLINK_NETFILTER && (bound("nfnetlink_queue") || bound("nfnetlink_log")) {
            return Err(refused(
                "a queue or a log of netfilter is bound to it, which the kernel removes with it",
            ));
        }
        Ok(())
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let socket = file.handle.as_fd();
        let identity = Identity::of(socket).context("ask for a socket's type")?;
        let (portid, _) = port_and_groups(&raw_address(socket, false).context("ask for a socket's address")?);
        let (dst_portid, dst_group) = port_and_groups(&raw_address(socket, true).unwrap_or_default());
        let entry = NetlinkSkEntry {
            id,
            ino: file.stat.st_ino as u32,
            protocol: identity.protocol as u32,
            state: u32::from((dst_portid, dst_group) != (0, 0)),
            flags: file.flags(),
            portid,
            groups: groups_of(socket),
            dst_portid,
            dst_group,
            fown: file.owner(),
            opts: options::dump(socket, &[OPTIONS], &mut dump.shared.socket_defaults)?,
            ns_id: Some(NETWORK_NAMESPACE),
            r#type: Some(identity.kind as u32),
        };
        Ok(FileEntry {
            r#type: FdTypes::Netlinksk as i32,
            id,
            nlsk: Some(entry),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let missing = || Error::new("restore a netlink socket").because("the image has no entry of one");
        let entry = entry.nlsk.as_ref().ok_or_else(missing)?;
        let named = || describe(entry.protocol, entry.portid);
        let identity = Identity {
            family: libc::AF_NETLINK,
            // CRIU does not tell; both behave the same.
            kind: entry.r#type.map_or(libc::SOCK_RAW, |kind| kind as i32),
            protocol: entry.protocol as i32,
        };
        let socket = identity.make().with(|| {
            Error::new("make a socket")
                .object(named())
                .hint("this host's kernel must have the protocol")
        })?;
        let fd = socket.as_fd();
        options::before(fd, &entry.opts, &[OPTIONS])?;
        if entry.portid != 0 {
            bind_raw(fd, &address(entry.portid, 0)).with(|| {
                let error = Error::new("bind a socket").object(named());
                error.hint("another socket of this network namespace may have the port")
            })?;
        }
        for (word, groups) in (0..).zip(&entry.groups) {
            for bit in (0..32).filter(|bit| groups & 1 << bit != 0) {
                let group = word * 32 + bit + 1;
                set_socket_option_int(fd, NETLINK, ADD_MEMBERSHIP, group)
                    .with(|| Error::new("join a netlink group").object(format!("{group} of {}", named())))?;
            }
        }
        if (entry.dst_portid, entry.dst_group) != (0, 0) {
            connect_raw(fd, &address(entry.dst_portid, entry.dst_group))
                .with(|| Error::new("connect a socket").object(named()))?;
        }
        options::after(fd, &entry.opts, &[OPTIONS])?;
        options::reuse(fd, &entry.opts)?;
        super::file_state(fd, entry.flags, &entry.fown)?;
        Ok(socket)
    }
}

/// Words of bits, the lowest of which is group 1.
fn groups_of(socket: BorrowedFd<'_>) -> Vec<u32> {
    let bytes = socket_option(socket, NETLINK, LIST_MEMBERSHIPS, GROUP_WORDS * 4).unwrap_or_default();
    let words = bytes
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()));
    let mut words: Vec<u32> = words.collect();
    while words.last() == Some(&0) {
        words.pop();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    fn make(protocol: i32) -> OwnedFd {
        let (family, kind) = (libc::AF_NETLINK, libc::SOCK_RAW);
        Identity { family, kind, protocol }.make().unwrap()
    }

    /// Asks for all links, and tells how much came.
    fn ask(socket: &OwnedFd) -> usize {
        let mut request = [32u32.to_ne_bytes(), [18, 0, 1, 3], [1, 0, 0, 0], [0; 4]].concat();
        request.resize(32, 0);
        rustix::net::send(socket, &request, rustix::net::SendFlags::empty()).unwrap();
        let mut buffer = vec![0; 65536];
        rustix::net::recv(socket, &mut buffer[..], rustix::net::RecvFlags::empty())
            .unwrap()
            .0
    }

    #[test]
    fn port_groups_and_options_come_back_and_the_kernel_answers() {
        let socket = make(libc::NETLINK_ROUTE);
        bind_raw(socket.as_fd(), &address(0, 0x11)).unwrap();
        set_socket_option_int(socket.as_fd(), NETLINK, ADD_MEMBERSHIP, 33).unwrap();
        set_socket_option_int(socket.as_fd(), NETLINK, 11, 1).unwrap();
        let unbound = make(libc::NETLINK_ROUTE);
        let facts = |socket: &OwnedFd| {
            let option = |name| socket_option(socket.as_fd(), NETLINK, name, 4).unwrap();
            (
                raw_address(socket.as_fd(), false).unwrap(),
                groups_of(socket.as_fd()),
                option(11),
                option(3),
            )
        };
        let before = [facts(&socket), facts(&unbound)];
        assert_eq!(before[0].1, [0x11, 1]);
        let files = testing::tree(vec![testing::look(&socket), testing::look(&unbound)]);
        let image = testing::dump(&files);
        testing::abandon(files, vec![socket, unbound]);
        let moved = testing::resume(testing::open(&image));
        assert_eq!([facts(&moved[&1]), facts(&moved[&2])], before);
        assert!(ask(&moved[&1]) > 100 && ask(&moved[&2]) > 100);
    }

    #[test]
    fn a_socket_with_messages_of_the_kernel_is_refused() {
        let socket = make(libc::NETLINK_ROUTE);
        let dump = || testing::try_dump(&testing::tree(vec![testing::look(&socket)]), &testing::everything());
        assert!(dump().is_ok());
        let mut request = [32u32.to_ne_bytes(), [18, 0, 1, 3], [1, 0, 0, 0], [0; 4]].concat();
        request.resize(32, 0);
        rustix::net::send(&socket, &request, rustix::net::SendFlags::empty()).unwrap();
        assert!(dump().err().unwrap().chain().contains("messages of the kernel wait"));
    }
}
