//! Sockets.
//!
//! | file | sockets |
//! |---|---|
//! | [`tcp`] | TCP over IPv4 and IPv6 |
//! | [`udp`] | UDP over IPv4 and IPv6 |
//! | [`raw`] | raw sockets and ping sockets of IPv4 and IPv6 |
//! | [`packet`] | packet sockets |
//! | [`netlink`] | netlink sockets |
//! | [`unix`] | unix sockets |
//!
//! [`options`] has what all sockets share, [`inet`] what TCP and UDP do, [`datagrams`] the queues of UDP, [`ended`] TCP's connections that
//! are over.

pub mod datagrams;
pub mod ended;
pub mod inet;
pub mod names;
pub mod netlink;
pub mod options;
pub mod packet;
pub mod raw;
pub mod tcp;
#[cfg(test)]
mod testing;
pub mod udp;
pub mod unix;

use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags};

use whimbrel_images::proto::FownEntry;

use crate::error::{Context, Result};
use crate::kernel::sys;
use crate::resource::fd;

/// What poll(2) tells of a socket, of what is asked for.
fn poll(socket: BorrowedFd<'_>, what: PollFlags) -> Result<PollFlags> {
    let mut fds = [PollFd::new(&socket, what)];
    rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default()))
        .map_err(std::io::Error::from)
        .context("poll a socket")?;
    Ok(fds[0].revents())
}

/// Sets the flags (O_NONBLOCK, O_ASYNC …) and the owner of a socket's open file description.
fn file_state(socket: BorrowedFd<'_>, flags: u32, owner: &FownEntry) -> Result<()> {
    fd::restore_owner(socket, owner)?;
    sys::fcntl_int(socket, libc::F_SETFL, flags as i32).context("set the flags of a socket")?;
    Ok(())
}
