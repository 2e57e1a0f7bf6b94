//! Raw sockets, and the sockets that ping uses, of IPv4 and IPv6.
//!
//! Packets that wait to be read are lost, with a warning, as the network may lose any: raw sockets of others would get what is
//! delivered again, too.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::PollFlags;
use whimbrel_images::proto::{FdTypes, FileEntry, IpOptsRawEntry};

use super::inet::{self, Ends, state};
use super::options::{self, RawOption, raw_options};
use super::udp::{join, memberships};
use crate::error::{Context, Error, Result};
use crate::kernel::socket::{Identity, MCAST_MSFILTER};
use crate::kernel::sys::{set_socket_option, set_socket_option_int, socket_option, socket_option_int};
use crate::resource::FileKind;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

/// Raw sockets and ping sockets.
pub struct Raw;

const IP: i32 = libc::IPPROTO_IP;
const IP6: i32 = libc::IPPROTO_IPV6;
const ICMP6: i32 = libc::IPPROTO_ICMPV6;
const SOL_RAW: i32 = 255;
const ICMP_FILTER: i32 = 1;
const ICMPV6_FILTER: i32 = 1;
const IPV6_CHECKSUM: i32 = 7;
const IPV6_HDRINCL: i32 = 36;
const IP_NODEFRAG: i32 = 22;

static OPTIONS: &[RawOption] = raw_options![
    IP, libc::IP_HDRINCL, "IP_HDRINCL", 4, Early;
    IP, IP_NODEFRAG, "IP_NODEFRAG", 4, Early;
    IP6, IPV6_HDRINCL, "IPV6_HDRINCL", 4, Early;
    IP6, IPV6_CHECKSUM, "IPV6_CHECKSUM", 4, Early;
    SOL_RAW, ICMP_FILTER, "ICMP_FILTER", 4, Early;
    ICMP6, ICMPV6_FILTER, "ICMPV6_FILTER", 32, Early;
    IP, MCAST_MSFILTER, "MCAST_MSFILTER", 0, OfItsKind;
    IP6, MCAST_MSFILTER, "MCAST_MSFILTER", 0, OfItsKind;
];

fn is_ours(kind: i32, protocol: i32) -> bool {
    kind == libc::SOCK_RAW || (kind == libc::SOCK_DGRAM && matches!(protocol, libc::IPPROTO_ICMP | ICMP6))
}

impl FileKind for Raw {
    fn name(&self) -> &'static str {
        "raw socket"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Inetsk]
    }

    fn restores(&self, entry: &FileEntry) -> bool {
        let of = |isk: &whimbrel_images::proto::InetSkEntry| is_ours(isk.r#type as i32, isk.proto as i32);
        entry.r#type() == FdTypes::Inetsk && entry.isk.as_ref().is_some_and(of)
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.file_type() == libc::S_IFSOCK
            && Identity::of(file.handle.as_fd()).is_ok_and(|identity| {
                matches!(identity.family, libc::AF_INET | libc::AF_INET6) && is_ours(identity.kind, identity.protocol)
            })
    }

    fn check(&self, file: &OpenFile, _dump: &FileDump<'_>) -> Result<()> {
        let socket = file.handle.as_fd();
        options::check(socket)?;
        let identity = Identity::of(socket).context("ask for a socket's type")?;
        identity.make().map(drop).with(|| explain(identity))
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let socket = file.handle.as_fd();
        let connected = rustix::net::getpeername(socket).is_ok_and(|peer| peer.is_some());
        let state = if connected { state::ESTABLISHED } else { state::CLOSE };
        let mut entry = inet::dump(file, id, state, OPTIONS, &mut dump.shared.socket_defaults)?;
        entry.opts.raw.extend(memberships(socket, entry.family as i32)?);
        let flag = |level, name| socket_option_int(socket, level, name).ok().filter(|&value| value != 0);
        let words = |level, name, length| {
            let bytes = socket_option(socket, level, name, length).unwrap_or_default();
            bytes
                .chunks_exact(4)
                .map(|word| u32::from_ne_bytes(word.try_into().unwrap_or_default()))
                .collect::<Vec<u32>>()
        };
        // Where CRIU looks for them.
        entry.ip_opts.get_or_insert_default().raw = (entry.r#type as i32 == libc::SOCK_RAW).then(|| IpOptsRawEntry {
            hdrincl: flag(IP, libc::IP_HDRINCL).map(|_| true),
            nodefrag: flag(IP, IP_NODEFRAG).map(|_| true),
            checksum: None,
            icmpv_filter: match entry.proto as i32 {
                libc::IPPROTO_ICMP => words(SOL_RAW, ICMP_FILTER, 4),
                ICMP6 => words(ICMP6, ICMPV6_FILTER, 32),
                _ => vec![],
            },
        });
        if super::poll(socket, PollFlags::IN)?.contains(PollFlags::IN) {
            tracing::warn!(
                socket = Ends::of(socket)?.describe(),
                "packets that wait in a raw socket are not carried"
            );
        }
        Ok(FileEntry {
            r#type: FdTypes::Inetsk as i32,
            id,
            isk: Some(entry),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = inet::entry_of(entry)?;
        let identity = Identity {
            family: entry.family as i32,
            kind: entry.r#type as i32,
            protocol: entry.proto as i32,
        };
        let socket = identity.make().with(|| explain(identity))?;
        let fd = socket.as_fd();
        restore_fields(fd, entry)?;
        inet::prepare(fd, entry, OPTIONS)?;
        join(fd, entry)?;
        let ends = Ends::of_entry(entry, fd)?;
        // The port of a raw socket is its protocol; that of ping is what its echoes are known by.
        let named = identity.kind == libc::SOCK_DGRAM && ends.local.port() != 0;
        if named || !ends.local.ip().is_unspecified() {
            inet::bind(fd, &ends)?;
        }
        if entry.state == state::ESTABLISHED {
            inet::connect(fd, &ends)?;
        }
        inet::complete(fd, entry, OPTIONS)?;
        Ok(socket)
    }

    fn finish(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let isk = inet::entry_of(entry)?;
        match restore.opened.get(&entry.id) {
            Some(socket) => options::reuse(socket.as_fd(), &isk.opts),
            None => Ok(()),
        }
    }
}

fn explain(identity: Identity) -> Error {
    let error = Error::new("make a socket");
    match identity.kind {
        libc::SOCK_RAW => error.object("raw socket").hint("this needs CAP_NET_RAW"),
        _ => error
            .object("ping socket")
            .hint("net.ipv4.ping_group_range must have a group of this process"),
    }
}

/// What CRIU has told in fields. Raw options of ours come after, and say the same.
fn restore_fields(socket: std::os::fd::BorrowedFd<'_>, entry: &whimbrel_images::proto::InetSkEntry) -> Result<()> {
    let Some(raw) = entry.ip_opts.as_ref().and_then(|ip| ip.raw.as_ref()) else {
        return Ok(());
    };
    let set = |level, name, text: &str, value: &[u8]| {
        set_socket_option(socket, level, name, value).with(|| Error::new("set a socket option").object(text))
    };
    for (name, text, on) in [
        (libc::IP_HDRINCL, "IP_HDRINCL", raw.hdrincl),
        (IP_NODEFRAG, "IP_NODEFRAG", raw.nodefrag),
    ] {
        if on == Some(true) {
            set_socket_option_int(socket, IP, name, 1).with(|| Error::new("set a socket option").object(text))?;
        }
    }
    let filter: Vec<u8> = raw.icmpv_filter.iter().flat_map(|word| word.to_ne_bytes()).collect();
    match (entry.proto as i32, filter.len()) {
        (libc::IPPROTO_ICMP, 4) => set(SOL_RAW, ICMP_FILTER, "ICMP_FILTER", &filter),
        (ICMP6, 32) => set(ICMP6, ICMPV6_FILTER, "ICMPV6_FILTER", &filter),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    fn carry(socket: OwnedFd) -> OwnedFd {
        let files = testing::tree(vec![testing::look(&socket)]);
        let image = testing::dump(&files);
        testing::abandon(files, vec![socket]);
        testing::resume(testing::open(&image)).remove(&1).unwrap()
    }

    fn make(family: i32, protocol: i32) -> OwnedFd {
        let kind = libc::SOCK_RAW;
        Identity { family, kind, protocol }.make().unwrap()
    }

    #[test]
    fn a_raw_socket_keeps_its_filter_and_gets_the_answer_to_an_echo() {
        let socket = make(libc::AF_INET, libc::IPPROTO_ICMP);
        // All but echo replies are kept away.
        let filter = (!1u32).to_ne_bytes();
        set_socket_option(socket.as_fd(), SOL_RAW, ICMP_FILTER, &filter).unwrap();
        let socket = carry(socket);
        assert_eq!(socket_option(socket.as_fd(), SOL_RAW, ICMP_FILTER, 4).unwrap(), filter);
        let echo = [8u8, 0, 0xf7, 0xf8, 0, 6, 0, 1];
        let to: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
        rustix::net::sendto(&socket, &echo, rustix::net::SendFlags::empty(), &to).unwrap();
        let mut buffer = [0u8; 100];
        let reply = std::iter::repeat_with(|| {
            let (length, _) = rustix::net::recv(&socket, &mut buffer[..], rustix::net::RecvFlags::empty()).unwrap();
            buffer[20..length].to_vec()
        });
        // Others of this machine may ping as well.
        assert!(reply.take(50).any(|reply| reply[0] == 0 && reply[4..6] == [0, 6]));
    }

    #[test]
    fn headers_checksums_and_addresses_of_raw_sockets_are_carried() {
        let socket = make(libc::AF_INET, 200);
        set_socket_option_int(socket.as_fd(), IP, libc::IP_HDRINCL, 1).unwrap();
        let to: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
        rustix::net::bind(&socket, &to).unwrap();
        rustix::net::connect(&socket, &to).unwrap();
        let before = Ends::of(socket.as_fd()).unwrap();
        let socket = carry(socket);
        assert_eq!(Ends::of(socket.as_fd()).unwrap(), before);
        assert_eq!(socket_option_int(socket.as_fd(), IP, libc::IP_HDRINCL).unwrap(), 1);

        let socket = make(libc::AF_INET6, 200);
        set_socket_option_int(socket.as_fd(), IP6, IPV6_CHECKSUM, 2).unwrap();
        assert_eq!(socket_option_int(carry(socket).as_fd(), IP6, IPV6_CHECKSUM).unwrap(), 2);
        let socket = make(libc::AF_INET6, ICMP6);
        let filter = [[0xffu8; 16], [0; 16]].concat();
        set_socket_option(socket.as_fd(), ICMP6, ICMPV6_FILTER, &filter).unwrap();
        assert_eq!(
            socket_option(carry(socket).as_fd(), ICMP6, ICMPV6_FILTER, 32).unwrap(),
            filter
        );
    }
}
