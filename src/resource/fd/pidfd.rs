//! pidfds: of processes of the tree, and of processes that are gone.

use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags};
use whimbrel_images::proto::{FdTypes, FileEntry, PidfdEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};

/// Descriptors of processes.
pub struct PidFd;

/// In images and in fdinfo: the process is gone.
const GONE: i32 = -1;

impl FileKind for PidFd {
    fn name(&self) -> &'static str {
        "pidfd"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Pidfd]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        // The second name is that of Linux 6.9 and 6.10.
        file.link == b"anon_inode:[pidfd]" || file.link.starts_with(b"pidfd:[")
    }

    fn check(&self, file: &OpenFile, dump: &FileDump<'_>) -> Result<()> {
        target(file, dump).map(drop)
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let pidfd = PidfdEntry {
            id,
            ino: file.stat.st_ino as u32,
            flags: file.flags(),
            nspid: target(file, dump)?,
            fown: file.owner(),
        };
        Ok(FileEntry {
            r#type: FdTypes::Pidfd as i32,
            id,
            pidfd: Some(pidfd),
            ..FileEntry::default()
        })
    }

    /// The tree's processes exist by now, those that will be zombies included.
    fn open(&self, entry: &FileEntry, _: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = entry
            .pidfd
            .as_ref()
            .ok_or_else(|| Error::new("restore a pidfd").because("the image has no pidfd entry"))?;
        let failed = || Error::new("open a pidfd").object(format!("process {}", entry.nspid));
        let file = if entry.nspid == GONE {
            files::pidfd_of_the_dead().with(failed)?
        } else {
            let pid = Pid::from_raw(entry.nspid)
                .filter(|_| entry.nspid > 0)
                .ok_or_else(|| failed().because("that is no process id"))?;
            // O_EXCL in its flags says that it is of a thread (PIDFD_THREAD, pidfd_open(2)).
            let flags = PidfdFlags::from_bits_retain(entry.flags & libc::O_EXCL as u32);
            rustix::process::pidfd_open(pid, flags)
                .map_err(std::io::Error::from)
                .with(failed)?
        };
        fd::restore_flags(file.as_fd(), entry.flags, &entry.fown)?;
        Ok(file)
    }
}

/// The id that the process has in its own pid namespace, or -1 for one that is gone.
fn target(file: &OpenFile, dump: &FileDump<'_>) -> Result<i32> {
    let failed = || Error::new("carry a pidfd");
    let pid: i32 = file
        .info
        .field("Pid")
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| failed().because("fdinfo does not tell its process"))?;
    if pid == GONE {
        return Ok(GONE);
    }
    dump.shared.pids.get(&pid).copied().ok_or_else(|| {
        failed()
            .because(format!("process (or thread) {pid} is no process of the tree"))
            .hint("dump a tree that includes it, or close the pidfd")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::sys;
    use crate::resource::fd::fixture;

    #[test]
    fn a_pidfd_refers_to_the_same_process_again() {
        let file = sys::pidfd_open(fixture::own_pid()).unwrap();
        rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::NONBLOCK).unwrap();
        let copy = fixture::carry(&file);
        assert_eq!(fixture::info(&copy), fixture::info(&file));
    }

    #[test]
    fn a_pidfd_of_a_process_that_is_gone_stays_one() {
        let _alone = fixture::alone();
        let copy = fixture::carry(&files::pidfd_of_the_dead().unwrap());
        assert!(fixture::info(&copy).1.iter().any(|line| line == "Pid:\t-1"));
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [rustix::event::PollFd::new(&copy, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, Some(&zero)), Ok(1));
    }

    #[test]
    fn a_process_outside_of_the_tree_is_refused_by_its_id() {
        let init = sys::pidfd_open(1).unwrap();
        let error = fixture::dump_with(&[&init], &crate::dump::Options::default())
            .err()
            .unwrap();
        assert!(error.chain().contains("process (or thread) 1 "), "{}", error.chain());
    }
}
