//! eventfds.
//!
//! Images have the open flags. An eventfd is always open for reading and writing (2), so bit 0, EFD_SEMAPHORE (1), is free
//! to say in the same field that it is a semaphore.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::EventfdFlags;
use whimbrel_images::proto::{EventfdFileEntry, FdTypes, FileEntry};

use crate::error::{Context, Error, Result};
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};

/// Counters that wake.
pub struct EventFd;

impl FileKind for EventFd {
    fn name(&self) -> &'static str {
        "eventfd"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Eventfd]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.link == b"anon_inode:[eventfd]"
    }

    fn dump(&self, file: &OpenFile, id: u32, _: &mut FileDump<'_>) -> Result<FileEntry> {
        let counter = file
            .info
            .field("eventfd-count")
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .ok_or_else(|| Error::new("dump an eventfd").because("fdinfo does not tell its counter"))?;
        // Told since Linux 6.5; without it, a semaphore cannot be told from a counter.
        let semaphore = file.info.field("eventfd-semaphore") == Some("1");
        let efd = EventfdFileEntry {
            id,
            flags: file.flags() | if semaphore { libc::EFD_SEMAPHORE as u32 } else { 0 },
            fown: file.owner(),
            counter,
        };
        Ok(FileEntry {
            r#type: FdTypes::Eventfd as i32,
            id,
            efd: Some(efd),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let failed = "restore an eventfd";
        let entry = entry
            .efd
            .as_ref()
            .ok_or_else(|| Error::new(failed).because("the image has no eventfd entry"))?;
        let mut flags = EventfdFlags::CLOEXEC;
        if entry.flags & libc::EFD_SEMAPHORE as u32 != 0 {
            flags |= EventfdFlags::SEMAPHORE;
        }
        let file = rustix::event::eventfd(0, flags)
            .map_err(std::io::Error::from)
            .context("make an eventfd")?;
        // eventfd(2) takes 32 bits; a write takes all but the largest number, which only the kernel itself can reach.
        if entry.counter == u64::MAX {
            return Err(Error::new(failed).because("its counter has overflowed"));
        }
        if entry.counter != 0 {
            rustix::io::write(&file, &entry.counter.to_ne_bytes())
                .map_err(std::io::Error::from)
                .context("set the counter of an eventfd")?;
        }
        fd::restore_flags(file.as_fd(), entry.flags, &entry.fown)?;
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;

    #[test]
    fn the_counter_survives_and_goes_on_counting() {
        let file = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&file, &(u64::from(u32::MAX) + 7).to_ne_bytes()).unwrap();
        let copy = fixture::carry(&file);
        assert_eq!(fixture::info(&copy).0, fixture::info(&file).0);
        rustix::io::write(&copy, &3u64.to_ne_bytes()).unwrap();
        let mut value = [0; 8];
        rustix::io::read(&copy, &mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), u64::from(u32::MAX) + 10);
        assert_eq!(rustix::io::read(&copy, &mut value), Err(rustix::io::Errno::AGAIN));
    }

    #[test]
    fn a_semaphore_stays_one() {
        let file = rustix::event::eventfd(3, EventfdFlags::SEMAPHORE | EventfdFlags::CLOEXEC).unwrap();
        let copy = fixture::carry(&file);
        let mut value = [0; 8];
        rustix::io::read(&copy, &mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), 1);
        assert!(
            fixture::info(&copy)
                .1
                .iter()
                .any(|line| line.starts_with("eventfd-count") && line.ends_with('2'))
        );
    }
}
