//! The queues of UDP sockets, as images have them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use whimbrel_images::entry::ImageReader;
use whimbrel_images::proto::{InetSkEntry, SkDatagram, SkPacketEntry};

use whimbrel_images::store::ImageStore;

use super::inet::{self, Ends};
use super::options;
use crate::error::{Context, Error, Result};
use crate::kernel::datagram::{self, Datagram, LARGEST_V6};
use crate::resource::fd::{FileDump, FileRestore, OpenFile};

/// The image that has them, with those of unix sockets.
pub const QUEUES: &str = "sk-queues.img";
/// Largest datagram of an image that is believed.
const LARGEST: u32 = 65_535;

/// Queues by the image id of their sockets.
pub type Queues = HashMap<u32, Vec<Datagram>>;

/// Writes what is in the receive queue of a socket.
///
/// # Errors
/// When it cannot be read, or a datagram not be delivered again.
pub fn dump(file: &OpenFile, socket: BorrowedFd<'_>, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let queue = datagram::peek_all(socket).context("read the queue of a UDP socket")?;
    let ends = || Ends::of(socket).map_or_else(|_| file.describe(), |ends| ends.describe());
    if let Some(error) = queue.error {
        tracing::warn!(socket = ends(), %error, "an error that waited for the program is not carried");
    }
    for datagram in queue.datagrams {
        if datagram.from.ip().to_canonical().is_ipv6() && datagram.bytes.len() > LARGEST_V6 {
            return Err(Error::new("carry a datagram in a queue")
                .object(ends())
                .because(format!(
                    "it has {} bytes, and no more than {LARGEST_V6} can be delivered again over the loopback device",
                    datagram.bytes.len()
                ))
                .hint("try again when the program has read it"));
        }
        let entry = SkPacketEntry {
            id_for: id,
            length: datagram.bytes.len() as u32,
            datagram: Some(SkDatagram {
                src_addr: inet::words(datagram.from.ip()),
                src_port: u32::from(datagram.from.port()),
                dst_addr: datagram.to.map(|to| inet::words(to.ip())).unwrap_or_default(),
                dst_port: datagram.to.map_or(0, |to| u32::from(to.port())),
                hops: u32::from(datagram.hops),
                class: u32::from(datagram.class),
            }),
            ..SkPacketEntry::default()
        };
        dump.append(QUEUES, &entry, &datagram.bytes)?;
    }
    Ok(())
}

/// Reads the queues of all UDP sockets of an image set.
///
/// # Errors
/// When the image is damaged.
pub fn load(store: &dyn ImageStore) -> Result<Queues> {
    let mut queues = Queues::new();
    let mut image = match ImageReader::open(store, QUEUES) {
        Ok(image) => image,
        Err(error) if error.is_not_found() => return Ok(queues),
        Err(error) => return Err(error).context("open an image"),
    };
    while let Some(packet) = image.next::<SkPacketEntry>().context("read a queue")? {
        let length = packet.length;
        let Some(headers) = packet.datagram else {
            image.skip(u64::from(length)).context("read a queue")?;
            continue;
        };
        let damaged = || Error::new("read a queue").because("the image has a damaged datagram");
        if length > LARGEST {
            return Err(damaged());
        }
        let address = |words: &[u32], port: u32| -> Option<SocketAddr> {
            Some(SocketAddr::new(inet::ip_of(words)?, u16::try_from(port).ok()?))
        };
        queues.entry(packet.id_for).or_default().push(Datagram {
            from: address(&headers.src_addr, headers.src_port).ok_or_else(damaged)?,
            to: address(&headers.dst_addr, headers.dst_port),
            hops: u8::try_from(headers.hops).map_err(|_| damaged())?,
            class: u8::try_from(headers.class).map_err(|_| damaged())?,
            bytes: image.extra(u64::from(length)).context("read a queue")?,
        });
    }
    Ok(queues)
}

/// Fills the queue of a socket that is new, and is given its own options and buffers later.
///
/// # Errors
/// When it cannot be filled at all. Single datagrams may get lost (to packet filters), as they may in any network; a warning
/// says so.
pub fn fill(socket: BorrowedFd<'_>, entry: &InetSkEntry, restore: &mut FileRestore<'_>) -> Result<()> {
    let mut queues = match restore.datagrams.take() {
        Some(queues) => queues,
        None => load(restore.store)?,
    };
    let queue = queues.remove(&entry.id);
    restore.datagrams = Some(queues);
    let Some(queue) = queue else {
        return Ok(());
    };
    // Each takes more room than its bytes: socket(7) counts what the kernel spends on them.
    let room = queue.iter().map(|datagram| datagram.bytes.len() as u64 + 1024).sum();
    options::make_room(socket, 0, room)?;
    let put = datagram::put_all(socket, &queue).with(|| Error::new("fill the queue of a UDP socket"))?;
    let socket = || Ends::of_entry(entry, socket).map_or_else(|_| String::new(), |ends| ends.describe());
    if put.lost > 0 {
        tracing::warn!(
            socket = socket(),
            lost = put.lost,
            "datagrams that waited to be read are lost: something on this host keeps them from the loopback device"
        );
    }
    if put.readdressed > 0 {
        tracing::warn!(
            socket = socket(),
            count = put.readdressed,
            "datagrams that waited to be read were sent to an address that is not this host's; they say that it was the loopback address"
        );
    }
    Ok(())
}
