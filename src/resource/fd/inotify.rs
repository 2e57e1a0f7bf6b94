//! inotify instances and what they watch.
//!
//! The kernel tells watched files by their handles. On this host a handle leads to the file, and so to its path; the path goes
//! with the handle in the image, because on another host only the path means anything.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::CreateFlags;
use rustix::fs::{Mode, OFlags};
use whimbrel_images::proto::{FdTypes, FhEntry, FileEntry, InotifyFileEntry, InotifyWdEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::procfs::{self, fdinfo::FdInfo, mountinfo};
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};

/// Watchers of files.
pub struct Inotify;

/// Words that readers of images expect in a handle.
const HANDLE_WORDS: usize = 16;

impl FileKind for Inotify {
    fn name(&self) -> &'static str {
        "inotify"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Inotify]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.link == b"anon_inode:inotify"
    }

    fn check(&self, file: &OpenFile, _: &FileDump<'_>) -> Result<()> {
        let waiting = files::get_int(file.handle.as_fd(), files::FIONREAD).unwrap_or(0);
        if waiting > 0 {
            return Err(Error::new("carry an inotify instance")
                .because(format!(
                    "{waiting} bytes of events have not been read and would be lost"
                ))
                .hint("try again when the program has read them"));
        }
        watches(&file.info)?
            .iter()
            .try_for_each(|watch| path_of(file.pid, watch).map(drop))
    }

    fn dump(&self, file: &OpenFile, id: u32, _: &mut FileDump<'_>) -> Result<FileEntry> {
        let mut wd = watches(&file.info)?;
        for watch in &mut wd {
            watch.f_handle.path = Some(path_of(file.pid, watch)?);
        }
        let ify = InotifyFileEntry {
            id,
            flags: file.flags(),
            fown: file.owner(),
            wd,
        };
        Ok(FileEntry {
            r#type: FdTypes::Inotify as i32,
            id,
            ify: Some(ify),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = inotify_of(entry)?;
        let file = rustix::fs::inotify::init(CreateFlags::CLOEXEC)
            .map_err(std::io::Error::from)
            .context("make an inotify instance")?;
        fd::restore_flags(file.as_fd(), entry.flags, &entry.fown)?;
        Ok(file)
    }

    /// When all files are open: what the restore itself does must not show as events.
    fn finish(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let Some(inotify) = restore.opened.get(&entry.id) else {
            return Ok(());
        };
        let mut watches: Vec<_> = inotify_of(entry)?.wd.iter().collect();
        watches.sort_unstable_by_key(|watch| watch.wd);
        for watch in watches {
            add(inotify, watch, &restore.options.root).map_err(|error| error.object(name(watch)))?;
        }
        Ok(())
    }
}

fn inotify_of(entry: &FileEntry) -> Result<&InotifyFileEntry> {
    let entry = entry.ify.as_ref();
    entry.ok_or_else(|| Error::new("restore an inotify instance").because("the image has no inotify entry"))
}

fn name(watch: &InotifyWdEntry) -> String {
    let path = watch.f_handle.path.as_deref().unwrap_or("?");
    format!("watch {} → {path}", watch.wd)
}

fn add(inotify: &OwnedFd, watch: &InotifyWdEntry, root: &Path) -> Result<()> {
    let failed = || Error::new("watch a file again");
    let path = watch.f_handle.path.as_deref().filter(|path| path.starts_with('/'));
    let path = path.ok_or_else(|| failed().because("the image does not tell its path"))?;
    let file = rustix::fs::open(
        root.join(path.trim_start_matches('/')),
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(std::io::Error::from)
    .with(|| failed().hint("the file must exist on this host as it did on the source"))?;
    // Through the link in /proc the file itself is watched, be it a symbolic link.
    let link = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).context("name a file")?;
    let wanted = watch.wd as i32;
    // Without CONFIG_CHECKPOINT_RESTORE numbers are handed out one after the other: take them until ours comes.
    let direct = files::plain(inotify.as_fd(), files::INOTIFY_IOC_SETNEXTWD, wanted).is_ok();
    let add = || files::inotify_add_watch(inotify.as_fd(), &link, watch.mask | libc::IN_MASK_CREATE).with(failed);
    loop {
        let wd = add()?;
        if wd == wanted {
            return Ok(());
        }
        if direct || wd > wanted {
            return Err(failed().because(format!("the kernel gave it the number {wd}")));
        }
        rustix::fs::inotify::remove_watch(inotify, wd)
            .map_err(std::io::Error::from)
            .with(failed)?;
        // Its removal is an event.
        rustix::io::read(inotify, &mut [0; 64])
            .map_err(std::io::Error::from)
            .with(failed)?;
    }
}

/// Parses the `inotify` lines of fdinfo.
fn watches(info: &FdInfo) -> Result<Vec<InotifyWdEntry>> {
    let lines = info.lines.iter().filter(|line| line.starts_with("inotify "));
    let mut watches = lines
        .map(|line| {
            parse(line).ok_or_else(|| {
                Error::new("dump an inotify instance")
                    .because(format!("`{line}` has no file handle, or cannot be understood"))
            })
        })
        .collect::<Result<Vec<_>>>()?;
    watches.sort_unstable_by_key(|watch| watch.wd);
    Ok(watches)
}

fn parse(line: &str) -> Option<InotifyWdEntry> {
    let hex = |name: &str| {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix(':'))
    };
    let number = |name: &str| u64::from_str_radix(hex(name)?, 16).ok();
    let bytes = number("fhandle-bytes")? as usize;
    let text = hex("f_handle")?.as_bytes();
    if text.len() != 2 * bytes || bytes > 8 * HANDLE_WORDS {
        return None;
    }
    let mut handle = [0u8; 8 * HANDLE_WORDS];
    for (byte, digits) in handle.iter_mut().zip(text.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    let words = handle
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
    Some(InotifyWdEntry {
        id: 0,
        i_ino: number("ino")?,
        mask: number("mask")? as u32,
        ignored_mask: number("ignored_mask")? as u32,
        s_dev: number("sdev")? as u32,
        wd: number("wd")? as u32,
        f_handle: FhEntry {
            bytes: bytes as u32,
            r#type: number("fhandle-type")? as u32,
            handle: words.collect(),
            path: None,
            mnt_id: None,
        },
    })
}

/// The path of a watched file, as the process sees it.
fn path_of(pid: i32, watch: &InotifyWdEntry) -> Result<String> {
    let failed = || {
        Error::new("find a watched file")
            .task(pid)
            .object(format!("watch {} (inode {})", watch.wd, watch.i_ino))
    };
    // The kernel's own device numbers have twenty bits for the minor one.
    let device = (watch.s_dev >> 20, watch.s_dev & 0xf_ffff);
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let outer = std::fs::read_link(&root).with(failed)?;
    let handle: Vec<u8> = watch
        .f_handle
        .handle
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let handle = &handle[..watch.f_handle.bytes as usize];
    let mounts = mountinfo::parse(&procfs::read(pid, "mountinfo")?);
    for mount in mounts.iter().filter(|mount| mount.device == device) {
        let point = root.join(
            Path::new(std::ffi::OsStr::from_bytes(&mount.point))
                .strip_prefix("/")
                .unwrap_or(Path::new("")),
        );
        // A handle is opened relative to any file of its file system, which must not be O_PATH.
        let Ok(place) = rustix::fs::open(
            &point,
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        ) else {
            continue;
        };
        let Ok(file) = files::open_by_handle(place.as_fd(), watch.f_handle.r#type as i32, handle) else {
            continue;
        };
        let Ok(link) = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else {
            continue;
        };
        let Ok(inside) = link.strip_prefix(&outer) else {
            continue;
        };
        // Where this is mounted twice, or only in part, the name may lead elsewhere.
        let same = std::fs::symlink_metadata(root.join(inside)).is_ok_and(|found| {
            found.ino() == watch.i_ino && (rustix::fs::major(found.dev()), rustix::fs::minor(found.dev())) == device
        });
        if same {
            let path = Path::new("/").join(inside).into_os_string().into_vec();
            return String::from_utf8(path).with(failed);
        }
    }
    Err(failed()
        .because("it has no path any more, or its file system cannot find files by handle")
        .hint("a deleted file cannot be watched again: the program must remove the watch"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;
    use rustix::fs::inotify::{self, ReadFlags, Reader, WatchFlags};

    fn events(file: &OwnedFd) -> Vec<(i32, ReadFlags)> {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let (mut reader, mut all) = (Reader::new(file, &mut buffer), Vec::new());
        while let Ok(event) = reader.next() {
            all.push((event.wd(), event.events()));
        }
        all
    }

    #[test]
    fn watches_keep_their_numbers_and_masks_and_report() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a file");
        std::fs::write(&file, "").unwrap();
        let instance = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        let gone = inotify::add_watch(&instance, "/", WatchFlags::DELETE_SELF).unwrap();
        inotify::remove_watch(&instance, gone).unwrap();
        let on_file = inotify::add_watch(&instance, &file, WatchFlags::MODIFY | WatchFlags::ONESHOT).unwrap();
        let on_directory = inotify::add_watch(&instance, directory.path(), WatchFlags::CREATE).unwrap();
        events(&instance);
        let copy = fixture::carry(&instance);
        assert_eq!(fixture::info(&copy), fixture::info(&instance));
        assert_eq!(events(&copy), []);
        std::fs::write(directory.path().join("new"), "").unwrap();
        std::fs::write(&file, "changed").unwrap();
        let seen = events(&copy);
        assert!(seen.contains(&(on_directory, ReadFlags::CREATE)), "{seen:?}");
        assert!(seen.contains(&(on_file, ReadFlags::MODIFY)), "{seen:?}");
    }

    #[test]
    fn unread_events_and_deleted_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let kept = std::fs::File::open(&file).unwrap();
        let instance = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&instance, &file, WatchFlags::DELETE_SELF).unwrap();
        std::fs::remove_file(&file).unwrap();
        let refused = |file: &OwnedFd| {
            let dumped = fixture::dump_with(&[file], &crate::dump::Options::default());
            dumped.err().map(|error| error.chain()).unwrap_or_default()
        };
        assert!(
            refused(&instance).contains("no path any more"),
            "{}",
            refused(&instance)
        );
        inotify::add_watch(&instance, directory.path(), WatchFlags::CREATE).unwrap();
        std::fs::write(directory.path().join("new"), "").unwrap();
        assert!(refused(&instance).contains("not been read"), "{}", refused(&instance));
        drop(kept);
    }
}
