//! TCP sockets whose connection has ended while there was still something for the program to learn: data that it did not read,
//! or that the other end has reset the connection.
//!
//! Such a socket cannot be built in repair mode, which knows connected ones only. So a connection is made on the loopback
//! device, the data sent through it, and it is ended like the one before.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use whimbrel_images::entry::ImageReader;
use whimbrel_images::proto::{InetSkEntry, SkPacketEntry};

use super::datagrams::QUEUES;
use super::inet::{self, Ends};
use super::options;
use crate::error::{Context, Error, Result};
use crate::kernel::socket::{Identity, SIOCINQ, queue_length};
use crate::kernel::sys::{set_socket_option, set_socket_option_int, socket_option};
use crate::resource::fd::{FileDump, FileRestore};

/// How long the kernel may take for what happens on the loopback device.
const PATIENCE: Duration = Duration::from_secs(1);
/// Largest receive queue in an image that is believed.
const LARGEST: u32 = 1 << 30;
/// TCP_CLOSE.
const CLOSED: u8 = 7;

/// Writes what a closed socket has for its program, if anything.
///
/// # Errors
/// When its queue cannot be read.
pub fn dump(socket: BorrowedFd<'_>, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let unread = queue_length(socket, SIOCINQ).unwrap_or(0);
    // Why it ended (SO_ERROR) cannot be asked for without taking it; a reset is the usual reason.
    let reset = super::poll(socket, PollFlags::ERR)?.contains(PollFlags::ERR);
    if unread == 0 && !reset {
        return Ok(());
    }
    let mut data = vec![0; unread as usize];
    if unread > 0 {
        let (copied, _) = rustix::net::recv(socket, &mut data[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)
            .map_err(io::Error::from)
            .context("read what a closed TCP socket has received")?;
        if copied != data.len() {
            return Err(Error::new("read what a closed TCP socket has received")
                .because(format!("{copied} of {unread} bytes could be read: it has urgent data")));
        }
    }
    let entry = SkPacketEntry {
        id_for: id,
        length: unread,
        reset: Some(reset),
        ..SkPacketEntry::default()
    };
    dump.append(QUEUES, &entry, &data)
}

/// What a closed socket has for its program.
struct Left {
    data: Vec<u8>,
    reset: bool,
}

fn load(entry: &InetSkEntry, restore: &FileRestore<'_>) -> Result<Option<Left>> {
    let Some(mut image): Option<ImageReader> = restore.image(QUEUES)? else {
        return Ok(None);
    };
    while let Some(packet) = image.next::<SkPacketEntry>().context("read a queue")? {
        let length = u64::from(packet.length);
        match packet.reset.filter(|_| packet.id_for == entry.id) {
            Some(_) if packet.length > LARGEST => {
                return Err(Error::new("read a queue").because("the image has one that is larger than any can be"));
            }
            Some(reset) => {
                let data = image.extra(length).context("read a queue")?;
                return Ok(Some(Left { data, reset }));
            }
            None => image.skip(length).context("read a queue")?,
        }
    }
    Ok(None)
}

/// Makes the socket of an entry as one whose connection has ended, if its program is to learn anything from it.
///
/// # Errors
/// When the connection cannot be made.
pub fn restore(entry: &InetSkEntry, restore: &FileRestore<'_>) -> Result<Option<OwnedFd>> {
    let Some(left) = load(entry, restore)? else {
        return Ok(None);
    };
    let socket = inet::fresh(entry)?;
    if let Some(v6only) = entry.v6only.filter(|_| entry.family as i32 == libc::AF_INET6) {
        // Not to be changed when it has an address.
        set_socket_option_int(socket.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, i32::from(v6only))
            .context("set IPV6_V6ONLY")?;
    }
    let ends = Ends::of_entry(entry, &socket)?;
    left.put(socket.as_fd(), &ends)
        .with(|| Error::new("make a TCP connection that has ended").object(ends.describe()))?;
    Ok(Some(socket))
}

impl Left {
    fn put(&self, socket: BorrowedFd<'_>, ends: &Ends) -> io::Result<()> {
        // Its own address, where it is to be had: nobody can reach it there any more.
        if ends.local.port() != 0 && rustix::net::bind(socket, &ends.local).is_err() {
            tracing::debug!(address = %ends.local, "a closed TCP socket gets another address");
        }
        let (loopback, target) = match ends.local.ip() {
            IpAddr::V4(_) => (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv4Addr::LOCALHOST)),
            IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => {
                (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.to_ipv6_mapped().into())
            }
            IpAddr::V6(_) => (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
        };
        let listener = Identity {
            family: if loopback.is_ipv4() {
                libc::AF_INET
            } else {
                libc::AF_INET6
            },
            kind: libc::SOCK_STREAM,
            protocol: libc::IPPROTO_TCP,
        };
        let listener = listener.make()?;
        rustix::net::bind(&listener, &SocketAddr::new(loopback, 0))?;
        rustix::net::listen(&listener, 1)?;
        let port = SocketAddr::try_from(rustix::net::getsockname(&listener)?)?.port();
        let enough = self.data.len() as u64;
        options::make_room(socket, 0, enough).map_err(io::Error::other)?;
        rustix::net::connect(socket, &SocketAddr::new(target, port))?;
        let peer = rustix::net::accept_with(&listener, rustix::net::SocketFlags::CLOEXEC)?;
        options::make_room(peer.as_fd(), enough, 0).map_err(io::Error::other)?;
        let mut rest = &self.data[..];
        while !rest.is_empty() {
            let sent = rustix::net::send(&peer, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
            rest = &rest[sent..];
        }
        wait(|| queue_length(socket, SIOCINQ).is_ok_and(|there| there as usize == self.data.len()))?;
        if self.reset {
            let linger = [1u32.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
            set_socket_option(peer.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger)?;
            drop(peer);
        } else {
            drop(peer);
            rustix::net::shutdown(socket, Shutdown::Write)?;
        }
        let state = || socket_option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, 1);
        wait(|| state().is_ok_and(|info| info == [CLOSED]))
    }
}

fn wait(condition: impl Fn() -> bool) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            return Err(io::Error::other(
                "something on this host keeps packets from the loopback device",
            ));
        }
        std::thread::sleep(Duration::from_micros(20));
    }
    Ok(())
}
