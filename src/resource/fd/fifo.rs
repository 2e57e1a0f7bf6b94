//! Named pipes (FIFOs), with what is in them. The path is an entry of its own, as for a regular file (`regf_id`).

use std::os::fd::{AsFd, OwnedFd};

use whimbrel_images::proto::{FdTypes, FifoEntry, FileEntry, PipeDataEntry, RegFileEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::{files, sys};
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile, pipe, regular};

/// Pipes with a path.
pub struct Fifo;

impl FileKind for Fifo {
    fn name(&self) -> &'static str {
        "fifo"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Fifo]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        // Opened as a path only, it is not the pipe.
        let path_only = file.flags() & libc::O_PATH as u32 != 0;
        file.file_type() == libc::S_IFIFO && file.link.starts_with(b"/") && !path_only
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let pipe_id = file.stat.st_ino as u32;
        if dump
            .shared
            .first(FdTypes::Fifo, file.stat.st_ino ^ (file.stat.st_dev << 40))
        {
            let pipe::Contents { data, packets } = pipe::peek(file).map_err(|error| error.object(file.describe()))?;
            let size = sys::fcntl_int(file.handle.as_fd(), libc::F_GETPIPE_SZ, 0).ok();
            let entry = PipeDataEntry {
                pipe_id,
                bytes: data.len() as u32,
                size: size.map(|size| size as u32),
                packets,
            };
            dump.append("fifo-data.img", &entry, &data)?;
        }
        let source = regular::Source {
            pid: file.pid,
            link: &file.link,
            stat: &file.stat,
        };
        let path_id = dump.shared.new_id();
        let mut path = regular::describe_path(&source, &file.handle, path_id, dump)?;
        (path.flags, path.fown) = (file.flags(), file.owner());
        let path = FileEntry {
            r#type: FdTypes::Reg as i32,
            id: path_id,
            reg: Some(path),
            ..FileEntry::default()
        };
        dump.shared.extra.insert(path_id, path);
        let fifo = FifoEntry {
            id,
            pipe_id,
            regf_id: Some(path_id),
        };
        Ok(FileEntry {
            r#type: FdTypes::Fifo as i32,
            id,
            fifo: Some(fifo),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let failed = || Error::new("restore a fifo");
        let fifo = entry
            .fifo
            .as_ref()
            .ok_or_else(|| failed().because("the image has no fifo entry"))?;
        let path = fifo
            .regf_id
            .and_then(|id| restore.entries.get(&id))
            .and_then(|entry| entry.reg.as_ref())
            .ok_or_else(|| failed().because("the image has no path for it"))?;
        let key = (FdTypes::Fifo, u64::from(fifo.pipe_id));
        if !restore.held.contains_key(&key) {
            // Open for both, it never waits for the other end, and no other open does as long as it is there (fifo(7)).
            let keeper = keep(path, restore).map_err(|error| error.object(path.name.clone()))?;
            fill(restore, fifo.pipe_id, &keeper).map_err(|error| error.object(path.name.clone()))?;
            restore.held.insert(key, keeper);
        }
        let keeper = &restore.held[&key];
        // Packet mode cannot be opened, only set.
        let file = fd::reopen(keeper.as_fd(), path.flags & !(libc::O_DIRECT as u32))
            .with(|| failed().object(path.name.clone()))?;
        fd::restore_flags(file.as_fd(), path.flags, &path.fown)?;
        Ok(file)
    }
}

fn keep(path: &RegFileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
    let place = regular::open_entry(path, libc::O_PATH as u32, restore)?;
    let stat = rustix::fs::fstat(&place)
        .map_err(std::io::Error::from)
        .context("look at a fifo")?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFIFO {
        return Err(Error::new("restore a fifo")
            .because("that name is no fifo on this host")
            .hint("make it with mkfifo(1)"));
    }
    fd::reopen(place.as_fd(), (libc::O_RDWR | libc::O_NONBLOCK) as u32).context("open a fifo")
}

fn fill(restore: &FileRestore<'_>, pipe_id: u32, keeper: &OwnedFd) -> Result<()> {
    let Some((size, contents)) = pipe::data_of(restore, "fifo-data.img", pipe_id)? else {
        return Ok(());
    };
    if let Some(size) = size {
        sys::fcntl_int(keeper.as_fd(), libc::F_SETPIPE_SZ, size as i32).context("set the size of a fifo")?;
    }
    let there = files::get_int(keeper.as_fd(), files::FIONREAD).context("ask for the amount of data")?;
    match there as usize {
        0 => pipe::write_all(keeper, &contents),
        // Somebody outside of the tree kept it open, with all that was in it.
        same if same == contents.data.len() => Ok(()),
        other => Err(Error::new("fill a fifo")
            .because(format!(
                "it holds {other} bytes already, and held {} when it was dumped",
                contents.data.len()
            ))
            .hint("another process has it open: let it read them or end it")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;
    use rustix::fs::{Mode, OFlags};

    fn make() -> (tempfile::TempDir, std::path::PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        (directory, path)
    }

    fn open(path: &std::path::Path, flags: OFlags) -> OwnedFd {
        rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn both_ends_come_back_without_waiting_with_what_was_in_the_fifo() {
        let _alone = fixture::alone();
        let (_directory, path) = make();
        let reader = open(&path, OFlags::RDONLY | OFlags::NONBLOCK);
        let writer = open(&path, OFlags::WRONLY);
        rustix::fs::fcntl_setfl(&reader, OFlags::empty()).unwrap();
        rustix::io::write(&writer, b"inside").unwrap();
        let dumped = fixture::dump(&[&writer, &reader]);
        let flags = [fixture::info(&writer).0, fixture::info(&reader).0];
        drop((reader, writer));
        let files = dumped.restore();
        assert_eq!([fixture::info(&files[0]).0, fixture::info(&files[1]).0], flags);
        rustix::io::write(&files[0], b" and more").unwrap();
        let mut bytes = [0; 32];
        let length = rustix::io::read(&files[1], &mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"inside and more");
        let (mut files, mut end) = (files, [0; 1]);
        drop(files.remove(0));
        assert_eq!(
            rustix::io::read(&files[0], &mut end),
            Ok(0),
            "nothing of ours keeps the other end open"
        );
    }

    #[test]
    fn a_deleted_fifo_is_made_again_for_a_moment() {
        let _alone = fixture::alone();
        let (_directory, path) = make();
        let both = open(&path, OFlags::RDWR);
        rustix::io::write(&both, b"kept").unwrap();
        std::fs::remove_file(&path).unwrap();
        let dumped = fixture::dump(&[&both]);
        drop(both);
        let copy = dumped.restore().remove(0);
        let mut bytes = [0; 4];
        rustix::io::read(&copy, &mut bytes).unwrap();
        assert_eq!(&bytes, b"kept");
        assert!(!path.exists());
    }

    #[test]
    fn a_fifo_that_somebody_outside_keeps_is_not_filled_twice() {
        let _alone = fixture::alone();
        let (_directory, path) = make();
        let both = open(&path, OFlags::RDWR | OFlags::NONBLOCK);
        rustix::io::write(&both, b"once").unwrap();
        let copy = fixture::carry(&both);
        let mut bytes = [0; 16];
        assert_eq!(rustix::io::read(&copy, &mut bytes), Ok(4));
        rustix::io::write(&both, b"other data").unwrap();
        let dumped = fixture::dump(&[&both]);
        rustix::io::read(&both, &mut bytes[..3]).unwrap();
        let error = dumped.try_restore().unwrap_err().chain();
        assert!(error.contains("7 bytes already"), "{error}");
    }
}
