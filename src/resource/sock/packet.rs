//! Packet sockets: what they are bound to, memberships, options, fanout groups.
//!
//! Rings are refused: their memory belongs to the socket, and the packets in it, with the places where the kernel and the program
//! are in them, cannot be set. Packets that wait to be read are lost, with a warning: others on the network saw them as well.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::PollFlags;
use whimbrel_images::proto::{FdTypes, FileEntry, PacketMclist, PacketSockEntry};

use super::inet::NETWORK_NAMESPACE;
use super::options::{self, RawOption, raw_options};
use crate::error::{Context, Error, Result};
use crate::kernel::sock_diag::{self, PacketSocket};
use crate::kernel::socket::{Identity, bind_raw, raw_address};
use crate::kernel::sys::{set_socket_option, set_socket_option_int, socket_option_int};
use crate::resource::FileKind;
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

/// Packet sockets.
pub struct Packet;

const PACKET: i32 = 263;
const ADD_MEMBERSHIP: i32 = 1;
const COPY_THRESH: i32 = 7;
const AUXDATA: i32 = 8;
const ORIGDEV: i32 = 9;
const VERSION: i32 = 10;
const RESERVE: i32 = 12;
const LOSS: i32 = 14;
const VNET_HDR: i32 = 15;
const TIMESTAMP: i32 = 17;
const FANOUT: i32 = 18;
/// Kinds of fanout whose choice is made by a program, which cannot be read back.
const FANOUT_PROGRAMS: [u32; 2] = [6, 7];
const FANOUT_NONE: u32 = u32::MAX;

/// Options that images have no field for.
static OPTIONS: &[RawOption] = raw_options![
    PACKET, 19, "PACKET_TX_HAS_OFF", 4, Early;
    PACKET, 20, "PACKET_QDISC_BYPASS", 4, Early;
    PACKET, 23, "PACKET_IGNORE_OUTGOING", 4, Early;
    PACKET, 24, "PACKET_VNET_HDR_SZ", 4, Early;
];

fn diagnose(file: &OpenFile) -> Result<PacketSocket> {
    let all = sock_diag::packet_sockets().context("list packet sockets")?;
    all.into_iter()
        .find(|socket| socket.inode == file.stat.st_ino as u32)
        .ok_or_else(|| {
            Error::new("look at a packet socket")
                .because("the kernel does not list it: it is in another network namespace")
        })
}

fn fanout_of(socket: std::os::fd::BorrowedFd<'_>) -> u32 {
    // 0 is told by sockets without; the first group of the first kind is told so, too, and not known apart.
    match socket_option_int(socket, PACKET, FANOUT) {
        Ok(0) | Err(_) => FANOUT_NONE,
        Ok(fanout) => fanout as u32,
    }
}

impl FileKind for Packet {
    fn name(&self) -> &'static str {
        "packet socket"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Packetsk]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.file_type() == libc::S_IFSOCK
            && Identity::of(file.handle.as_fd()).is_ok_and(|identity| identity.family == libc::AF_PACKET)
    }

    fn check(&self, file: &OpenFile, _dump: &FileDump<'_>) -> Result<()> {
        let socket = file.handle.as_fd();
        options::check(socket)?;
        let refused = |why: &str| Err(Error::new("carry a packet socket").because(why));
        if diagnose(file)?.rings {
            return refused(
                "it has a ring (PACKET_RX_RING, PACKET_TX_RING), whose packets and places cannot be set again",
            );
        }
        let fanout = fanout_of(socket);
        if fanout != FANOUT_NONE && FANOUT_PROGRAMS.contains(&(fanout >> 16 & 0xff)) {
            return refused("a program chooses in its fanout group (PACKET_FANOUT), which cannot be read back");
        }
        Ok(())
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let socket = file.handle.as_fd();
        let found = diagnose(file)?;
        let kind = Identity::of(socket).context("ask for a socket's type")?.kind;
        let address = raw_address(socket, false).context("ask for a socket's address")?;
        let protocol = address
            .get(2..4)
            .map_or(0, |half| u16::from_ne_bytes([half[0], half[1]]));
        let ifindex = address
            .get(4..8)
            .and_then(|word| word.try_into().ok())
            .map_or(0, i32::from_ne_bytes);
        let int = |name| socket_option_int(socket, PACKET, name).unwrap_or(0);
        let name = |index: u32| options::interface_name(socket, index);
        let memberships = found.memberships.iter().map(|(index, kind, addr)| {
            Ok(PacketMclist {
                index: *index,
                r#type: u32::from(*kind),
                addr: addr.clone(),
                device: Some(name(*index)?),
            })
        });
        if super::poll(socket, PollFlags::IN)?.contains(PollFlags::IN) {
            tracing::warn!(
                socket = file.describe(),
                "packets that wait in a packet socket are not carried"
            );
        }
        let entry = PacketSockEntry {
            id,
            r#type: kind as u32,
            protocol: u32::from(protocol),
            flags: file.flags(),
            ifindex: ifindex as u32,
            fown: file.owner(),
            opts: options::dump(socket, &[OPTIONS], &mut dump.shared.socket_defaults)?,
            version: int(VERSION) as u32,
            reserve: int(RESERVE) as u32,
            aux_data: int(AUXDATA) != 0,
            orig_dev: int(ORIGDEV) != 0,
            vnet_hdr: int(VNET_HDR) != 0,
            loss: int(LOSS) != 0,
            timestamp: int(TIMESTAMP) as u32,
            copy_thresh: found.copy_thresh,
            mclist: memberships.collect::<Result<_>>()?,
            fanout: Some(fanout_of(socket)),
            rx_ring: None,
            tx_ring: None,
            ns_id: Some(NETWORK_NAMESPACE),
            device: (ifindex > 0).then(|| name(ifindex as u32)).transpose()?,
        };
        Ok(FileEntry {
            r#type: FdTypes::Packetsk as i32,
            id,
            psk: Some(entry),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let refused = |why: &str| Error::new("restore a packet socket").because(why);
        let entry = entry
            .psk
            .as_ref()
            .ok_or_else(|| refused("the image has no entry of one"))?;
        if entry.rx_ring.is_some() || entry.tx_ring.is_some() {
            return Err(refused("it has a ring"));
        }
        // Without a protocol it sees nothing until it has all its options.
        let identity = Identity {
            family: libc::AF_PACKET,
            kind: entry.r#type as i32,
            protocol: 0,
        };
        let socket = identity
            .make()
            .with(|| Error::new("make a packet socket").hint("this needs CAP_NET_RAW"))?;
        let fd = socket.as_fd();
        options::before(fd, &entry.opts, &[OPTIONS])?;
        for (name, text, value) in [
            (VERSION, "PACKET_VERSION", entry.version),
            (RESERVE, "PACKET_RESERVE", entry.reserve),
            (AUXDATA, "PACKET_AUXDATA", u32::from(entry.aux_data)),
            (ORIGDEV, "PACKET_ORIGDEV", u32::from(entry.orig_dev)),
            (VNET_HDR, "PACKET_VNET_HDR", u32::from(entry.vnet_hdr)),
            (LOSS, "PACKET_LOSS", u32::from(entry.loss)),
            (TIMESTAMP, "PACKET_TIMESTAMP", entry.timestamp),
            (COPY_THRESH, "PACKET_COPY_THRESH", entry.copy_thresh),
        ] {
            if value != 0 && socket_option_int(fd, PACKET, name).ok() != Some(value as i32) {
                set_socket_option_int(fd, PACKET, name, value as i32)
                    .with(|| Error::new("set a socket option").object(text))?;
            }
        }
        options::after(fd, &entry.opts, &[OPTIONS])?;
        let index = |device: &Option<String>, index: u32| match device {
            Some(name) => options::interface_index(fd, name),
            None => Ok(index),
        };
        for membership in &entry.mclist {
            let damaged = || refused("the image has a damaged membership");
            let index = index(&membership.device, membership.index)?;
            let length = u16::try_from(membership.addr.len()).map_err(|_| damaged())?;
            let kind = u16::try_from(membership.r#type).map_err(|_| damaged())?;
            // struct packet_mreq, whose address has room for 8 bytes and may be longer.
            let mut request = [&index.to_ne_bytes()[..], &kind.to_ne_bytes(), &length.to_ne_bytes()].concat();
            request.extend(&membership.addr);
            request.resize(request.len().max(16), 0);
            set_socket_option(fd, PACKET, ADD_MEMBERSHIP, &request).context("join a group of a packet socket")?;
        }
        let protocol = u16::try_from(entry.protocol).map_err(|_| refused("the image has a damaged protocol"))?;
        let index = index(&entry.device, entry.ifindex)?;
        if (protocol, index) != (0, 0) {
            let family = (libc::AF_PACKET as u16).to_ne_bytes();
            let mut address = [&family[..], &protocol.to_ne_bytes(), &index.to_ne_bytes()].concat();
            address.resize(20, 0);
            bind_raw(fd, &address).context("bind a packet socket")?;
        }
        if entry.fanout() != FANOUT_NONE {
            set_socket_option_int(fd, PACKET, FANOUT, entry.fanout() as i32).with(|| {
                Error::new("join a fanout group")
                    .object(format!("{}", entry.fanout() & 0xffff))
                    .hint("another program of this network namespace may have a group of that number")
            })?;
        }
        options::reuse(fd, &entry.opts)?;
        super::file_state(fd, entry.flags, &entry.fown)?;
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::kernel::nft::tests::in_fresh_netns;

    /// ETH_P_IP on the loopback device.
    fn make() -> OwnedFd {
        let (family, kind) = (libc::AF_PACKET, libc::SOCK_DGRAM);
        let socket = Identity {
            family,
            kind,
            protocol: 0,
        }
        .make()
        .unwrap();
        let mut address = [17u8, 0, 8, 0, 1, 0, 0, 0].to_vec();
        address.resize(20, 0);
        bind_raw(socket.as_fd(), &address).unwrap();
        socket
    }

    #[test]
    fn a_packet_socket_still_sees_packets_with_its_options_memberships_and_group() {
        in_fresh_netns(|| {
            let sockets = [make(), make()];
            for socket in &sockets {
                set_socket_option_int(socket.as_fd(), PACKET, AUXDATA, 1).unwrap();
                set_socket_option_int(socket.as_fd(), PACKET, FANOUT, 7 | 1 << 16).unwrap();
                // PACKET_MR_PROMISC on the first device.
                let request = [1u32.to_ne_bytes(), [1, 0, 0, 0], [0; 4], [0; 4]].concat();
                set_socket_option(socket.as_fd(), PACKET, ADD_MEMBERSHIP, &request).unwrap();
            }
            let facts = |socket: &OwnedFd| {
                let found = diagnose(&testing::look(socket)).unwrap();
                let int = |name| socket_option_int(socket.as_fd(), PACKET, name).unwrap();
                let address = raw_address(socket.as_fd(), false).unwrap();
                (address, found.memberships, int(AUXDATA), int(FANOUT))
            };
            let before: Vec<_> = sockets.iter().map(facts).collect();
            assert_eq!((before[0].1.len(), before[0].3), (1, 7 | 1 << 16));
            let files = testing::tree(sockets.iter().map(testing::look).collect());
            let image = testing::dump(&files);
            testing::abandon(files, sockets.into());
            let moved = testing::resume(testing::open(&image));
            assert_eq!(moved.values().map(facts).collect::<Vec<_>>(), before);
            let sender = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            for text in [b"find me 1", b"find me 2"] {
                sender.send_to(text, "127.0.0.1:9").unwrap();
            }
            let mut buffer = [0; 2000];
            let mut read = || {
                let flags = rustix::net::RecvFlags::DONTWAIT;
                let all = moved
                    .values()
                    .find_map(|socket| rustix::net::recv(socket, &mut buffer[..], flags).ok());
                all.map(|(length, _)| buffer[..length].to_vec())
            };
            let packets: Vec<Vec<u8>> = std::iter::from_fn(&mut read).collect();
            // Shared between the two of the group: each goes to one of them, whether sent or received.
            assert!(packets.iter().any(|packet| packet.ends_with(b"find me 1")));
            assert!(packets.iter().any(|packet| packet.ends_with(b"find me 2")));
        });
    }

    #[test]
    fn rings_are_refused() {
        let socket = make();
        let dump = || testing::try_dump(&testing::tree(vec![testing::look(&socket)]), &testing::everything());
        assert!(dump().is_ok());
        let ring: Vec<u8> = [4096u32, 4, 2048, 8].into_iter().flat_map(u32::to_ne_bytes).collect();
        set_socket_option(socket.as_fd(), PACKET, 5, &ring).unwrap();
        assert!(dump().err().unwrap().chain().contains("PACKET_RX_RING"));
    }
}
