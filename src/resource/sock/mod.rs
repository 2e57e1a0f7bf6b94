//! Sockets.
//!
//! | file | sockets |
//! |---|---|
//! | [`tcp`] | TCP over IPv4 and IPv6 |
//! | [`udp`] | UDP over IPv4 and IPv6 |
//! | [`unix`] | unix sockets |
//!
//! [`options`] has what all sockets share, [`inet`] what TCP and UDP do.

pub mod inet;
pub mod names;
pub mod options;
pub mod tcp;
#[cfg(test)]
mod testing;
pub mod udp;
pub mod unix;

use std::os::fd::BorrowedFd;

use whimbrel_images::proto::FownEntry;

use crate::error::{Context, Result};
use crate::kernel::sys;
use crate::resource::fd;

/// Sets the flags (O_NONBLOCK, O_ASYNC …) and the owner of a socket's open file description.
fn file_state(socket: BorrowedFd<'_>, flags: u32, owner: &FownEntry) -> Result<()> {
    fd::restore_owner(socket, owner)?;
    sys::fcntl_int(socket, libc::F_SETFL, flags as i32).context("set the flags of a socket")?;
    Ok(())
}
