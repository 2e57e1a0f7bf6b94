//! signalfds.

use std::os::fd::{AsFd, OwnedFd};

use whimbrel_images::proto::{FdTypes, FileEntry, SignalfdEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};

/// Signals that are read. The signals themselves wait with the task: whoever reads gets its own.
pub struct SignalFd;

impl FileKind for SignalFd {
    fn name(&self) -> &'static str {
        "signalfd"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Signalfd]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.link == b"anon_inode:[signalfd]"
    }

    fn dump(&self, file: &OpenFile, id: u32, _: &mut FileDump<'_>) -> Result<FileEntry> {
        let sigmask = file
            .info
            .field("sigmask")
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .ok_or_else(|| Error::new("dump a signalfd").because("fdinfo does not tell its mask"))?;
        let sgfd = SignalfdEntry {
            id,
            flags: file.flags(),
            fown: file.owner(),
            sigmask,
        };
        Ok(FileEntry {
            r#type: FdTypes::Signalfd as i32,
            id,
            sgfd: Some(sgfd),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = entry
            .sgfd
            .as_ref()
            .ok_or_else(|| Error::new("restore a signalfd").because("the image has no signalfd entry"))?;
        let file = files::signalfd(entry.sigmask).context("make a signalfd")?;
        fd::restore_flags(file.as_fd(), entry.flags, &entry.fown)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;

    #[test]
    fn the_mask_and_the_flags_survive_and_nothing_else_is_read() {
        let mask = 1 << (libc::SIGUSR2 - 1) | 1 << (libc::SIGRTMIN() + 3 - 1);
        let file = files::signalfd(mask).unwrap();
        rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::NONBLOCK).unwrap();
        let copy = fixture::carry(&file);
        assert_eq!(fixture::info(&copy), fixture::info(&file));
        let mut buffer = [0; 128];
        assert_eq!(rustix::io::read(&copy, &mut buffer), Err(rustix::io::Errno::AGAIN));
    }
}
