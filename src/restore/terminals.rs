//! Controlling terminals.
//!
//! A task has the terminal of its session from its parent: what a session leader takes later, its children do not see
//! (tty_ioctl(4), TIOCSCTTY: only a leader takes one, and only for itself). So the pair is made before the tasks are, and
//! the leader takes it before it has children.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use whimbrel_images::proto::FdTypes;

use super::{Build, Skeleton};
use crate::error::{Error, Result};
use crate::kernel::files;
use crate::remote::Program;
use crate::resource::fd::{FileRestore, tty};

/// Masters of the pairs that sessions of the tree have as their terminals, by number. While one is open, its slave is
/// nobody else's.
pub(super) type Masters = BTreeMap<u32, OwnedFd>;

impl Build {
    /// Gives the leader of a session its terminal, if it has one in the tree.
    pub(super) fn take_terminal(&mut self, skeleton: &Skeleton, session: u32) -> Result<()> {
        let Some(&index) = skeleton.terminals.get(&session) else {
            return Ok(());
        };
        let master = tty::make_master(&self.options.root, index)?;
        let slave = tty::open_slave(master.as_fd(), libc::O_RDWR)?;
        self.masters.insert(index, master);
        let mut program = Program::new();
        let fd = self.hand(&mut program, &[slave.as_fd()])?[0];
        let take = files::TIOCSCTTY.number();
        program.call(
            "take the controlling terminal",
            libc::SYS_ioctl,
            &[fd, take.into(), 0.into()],
        );
        program.call("close a descriptor", libc::SYS_close, &[fd]);
        self.run(session, &program).map(drop)
    }

    /// Files are made at these masters.
    pub(super) fn lend_masters(&mut self, files: &mut FileRestore<'_>) {
        for (index, master) in std::mem::take(&mut self.masters) {
            files.hold(FdTypes::Tty, u64::from(index), master);
        }
    }

    /// Puts the process groups in the foreground that were there. All groups must be there by now, and all terminals.
    pub(super) fn settle_terminals(&mut self, files: &FileRestore<'_>) -> Result<()> {
        for terminal in tty::controlling(files.store)? {
            if terminal.group == 0 || terminal.group == terminal.session || !self.has(terminal.session) {
                continue;
            }
            let master = files.held.get(&(FdTypes::Tty, u64::from(terminal.index)));
            let master = master.ok_or_else(|| Error::new("set the foreground").because("its terminal was not made"))?;
            let slave = tty::open_slave(master.as_fd(), libc::O_RDWR)?;
            let mut program = Program::new();
            let fd = self.hand(&mut program, &[slave.as_fd()])?[0];
            let group = program.data(&terminal.group.to_ne_bytes());
            let set = files::TIOCSPGRP.number();
            // A group that is gone by now was in the foreground of nothing.
            program.try_call(libc::SYS_ioctl, &[fd, set.into(), group.into()]);
            program.call("close a descriptor", libc::SYS_close, &[fd]);
            self.run(terminal.session, &program)?;
        }
        Ok(())
    }
}
