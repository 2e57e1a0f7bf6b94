//! Regular files, directories, symbolic links opened themselves, and the simple character devices.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use whimbrel_images::entry::{ImageReader, ImageWriter};
use whimbrel_images::proto::{
    FdTypes, FileEntry, GhostChunkEntry, GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval,
};

use crate::error::{Context, Error, Result};
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};
use crate::resource::mem::shared;

/// Files that are found again by their path.
pub struct Regular;

/// Character devices whose open files hold nothing: mem devices except /dev/mem and /dev/kmsg, and /dev/tty's master.
const STATELESS_MEMORY_DEVICES: &[u32] = &[3, 5, 7, 8, 9];
const DELETED: &[u8] = b" (deleted)";

impl FileKind for Regular {
    fn name(&self) -> &'static str {
        "file"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Reg]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        let memfd = file.link.starts_with(b"/memfd:");
        let device = file.file_type() == libc::S_IFCHR && {
            let (major, minor) = (
                rustix::fs::major(file.stat.st_rdev),
                rustix::fs::minor(file.stat.st_rdev),
            );
            major == 1 && STATELESS_MEMORY_DEVICES.contains(&minor)
        };
        let plain = matches!(file.file_type(), libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK);
        file.link.starts_with(b"/") && !memfd && (device || plain || file.flags() & libc::O_PATH as u32 != 0)
    }

    fn check(&self, file: &OpenFile, dump: &FileDump<'_>) -> Result<()> {
        let deleted = file.stat.st_nlink == 0;
        let size = file.stat.st_blocks as u64 * 512;
        if deleted && file.file_type() == libc::S_IFREG && size > dump.options.ghost_limit {
            return Err(Error::new("carry a deleted file")
                .because(format!(
                    "it has {size} bytes, more than the limit of {}",
                    dump.options.ghost_limit
                ))
                .hint(format!("use --ghost-limit {size}")));
        }
        if deleted && file.file_type() == libc::S_IFDIR {
            return Err(Error::new("carry a deleted directory").because("this is not supported yet"));
        }
        Ok(())
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let source = Source {
            pid: file.pid,
            link: &file.link,
            stat: &file.stat,
        };
        let mut entry = describe_path(&source, &file.handle, id, dump)?;
        (entry.flags, entry.pos, entry.fown) = (file.flags(), file.info.pos, file.owner());
        Ok(FileEntry {
            r#type: FdTypes::Reg as i32,
            id,
            reg: Some(entry),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = entry
            .reg
            .as_ref()
            .ok_or_else(|| Error::new("restore a file").because("the image has no file entry"))?;
        let file = open_entry(entry, entry.flags, restore)?;
        if entry.pos != 0 && entry.flags & libc::O_PATH as u32 == 0 {
            let seek = rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(entry.pos));
            seek.map_err(std::io::Error::from)
                .context("set the position of a file")?;
        }
        fd::restore_owner(file.as_fd(), &entry.fown)?;
        Ok(file)
    }
}

/// A file that is reached through a task: an open one, or one that is mapped, executed, or a working directory.
pub struct Source<'a> {
    /// A process that has it.
    pub pid: i32,
    /// What its link in /proc says.
    pub link: &'a [u8],
    /// Its `fstat(2)`.
    pub stat: &'a rustix::fs::Stat,
}

/// Describes a file by its path, and carries its contents along when it has none any more.
///
/// # Errors
/// When the path leads to another file, or a deleted one cannot be read.
pub fn describe_path(source: &Source<'_>, handle: &OwnedFd, id: u32, dump: &mut FileDump<'_>) -> Result<RegFileEntry> {
    let stat = source.stat;
    let kind = stat.st_mode & libc::S_IFMT;
    let mut name = source
        .link
        .strip_suffix(DELETED)
        .filter(|_| stat.st_nlink == 0)
        .unwrap_or(source.link)
        .to_vec();
    if name.is_empty() {
        name = b"/".to_vec();
    }
    let name_text = String::from_utf8_lossy(&name).into_owned();
    let object = || name_text.clone();
    if stat.st_nlink == 0 && matches!(kind, libc::S_IFREG | libc::S_IFIFO) {
        if dump.shared.first(FdTypes::Reg, stat.st_ino ^ stat.st_dev << 40) {
            write_ghost(source, handle, id, dump).map_err(|error| error.object(object()))?;
        } else {
            // The same deleted file, opened again: it shares the ghost.
            let ghost = dump
                .shared
                .ghosts
                .get(&(stat.st_dev, stat.st_ino))
                .copied()
                .unwrap_or_default();
            write_remap(id, ghost, dump)?;
        }
    } else {
        // The same file must be found by that name where the task's root is.
        let path = format!("/proc/{}/root{}", source.pid, name_text);
        let found = std::fs::symlink_metadata(&path).ok();
        if found.is_none_or(|found| (found.dev(), found.ino()) != (stat.st_dev, stat.st_ino)) {
            return Err(Error::new("find a file by its name")
                .task(source.pid)
                .object(object())
                .because("another file, or none, has that name now")
                .hint("put the file back under its name, or use --link-remap when that is supported"));
        }
    }
    let build_id = if kind == libc::S_IFREG {
        build_id(handle)
    } else {
        Vec::new()
    };
    Ok(RegFileEntry {
        id,
        flags: 0,
        pos: 0,
        fown: Default::default(),
        name: name_text,
        mnt_id: None,
        size: (kind == libc::S_IFREG).then_some(stat.st_size as u64),
        mode: Some(stat.st_mode),
        build_id,
        ..RegFileEntry::default()
    })
}

fn write_remap(id: u32, ghost: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let entry = RemapFilePathEntry {
        orig_id: id,
        remap_id: ghost,
        remap_type: Some(RemapType::Ghost as i32),
    };
    dump.append("remap-fpath.img", &entry, &[])
}

fn write_ghost(source: &Source<'_>, handle: &OwnedFd, id: u32, dump: &mut FileDump<'_>) -> Result<()> {
    let stat = source.stat;
    let ghost = dump.shared.ghost_id();
    dump.shared.ghosts.insert((stat.st_dev, stat.st_ino), ghost);
    let time = |sec: i64, nsec: u64| {
        Some(Timeval {
            tv_sec: sec as u64,
            tv_usec: nsec / 1000,
        })
    };
    // The device number in the kernel's own encoding, as images have it.
    let dev = |dev: u64| (rustix::fs::major(dev) << 20) | rustix::fs::minor(dev);
    let entry = GhostFileEntry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode,
        dev: Some(dev(stat.st_dev)),
        ino: Some(stat.st_ino),
        atim: time(stat.st_atime, stat.st_atime_nsec),
        mtim: time(stat.st_mtime, stat.st_mtime_nsec),
        atim_rest: Some((stat.st_atime_nsec % 1000) as u32),
        mtim_rest: Some((stat.st_mtime_nsec % 1000) as u32),
        size: Some(stat.st_size as u64),
        ..GhostFileEntry::default()
    };
    let mut image = ImageWriter::create(dump.store, &format!("ghost-file-{ghost:x}.img")).context("create an image")?;
    // What is in a FIFO is in an image of its own.
    if stat.st_mode & libc::S_IFMT == libc::S_IFREG {
        let contents = fd::reopen(handle.as_fd(), libc::O_RDONLY as u32).context("open a deleted file")?;
        write_contents(&mut image, entry, File::from(contents)).context("write a deleted file")?;
    } else {
        image.write(&entry).context("write a deleted file")?;
    }
    image.finish().context("write a deleted file")?;
    write_remap(id, ghost, dump)
}

/// Writes a deleted file with its contents: as they are, or where it has holes, in chunks.
fn write_contents(image: &mut ImageWriter, mut entry: GhostFileEntry, mut contents: File) -> std::io::Result<()> {
    let size = entry.size.unwrap_or(0);
    let runs = shared::populated(&contents)?;
    let covered: u64 = runs.iter().map(|run| run.bytes()).sum();
    contents.rewind()?;
    if covered >= size {
        image.write(&entry)?;
        image.extra_from(&mut contents)?;
        return Ok(());
    }
    entry.chunks = Some(true);
    image.write(&entry)?;
    for run in runs {
        let len = run.end().min(size).saturating_sub(run.start);
        image.write(&GhostChunkEntry { len, off: run.start })?;
        contents.seek(SeekFrom::Start(run.start))?;
        if image.extra_from(&mut (&contents).take(len))? != len {
            return Err(std::io::Error::other("it has become shorter"));
        }
    }
    Ok(())
}

/// Fills a deleted file from its image.
fn read_contents(image: &mut ImageReader, meta: &GhostFileEntry, file: &mut File) -> Result<()> {
    let failed = "fill a deleted file";
    if meta.chunks != Some(true) {
        image.copy_rest(file).context(failed)?;
    }
    while meta.chunks == Some(true)
        && let Some(chunk) = image.next::<GhostChunkEntry>().context(failed)?
    {
        let end = chunk.off.checked_add(chunk.len);
        if end.is_none_or(|end| meta.size.is_some_and(|size| end > size)) {
            return Err(Error::new(failed).because("a chunk lies behind the end of the file"));
        }
        file.seek(SeekFrom::Start(chunk.off)).context(failed)?;
        image.copy_extra(chunk.len, file).context(failed)?;
    }
    match meta.size {
        Some(size) => file.set_len(size).context("size a deleted file"),
        None => Ok(()),
    }
}

/// Opens the file of an entry with `flags`, after checking that it is the one.
///
/// # Errors
/// When it is missing, has another size or build id, or cannot be opened.
pub fn open_entry(entry: &RegFileEntry, flags: u32, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
    if let Some(ghost) = ghost_of(entry.id, restore)? {
        return open_ghost(entry, ghost, flags, restore);
    }
    let object = || entry.name.clone();
    let bits = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY) as u32;
    let oflags = rustix::fs::OFlags::from_bits_retain(bits) | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let path = restore.options.root.join(entry.name.trim_start_matches('/'));
    let file = rustix::fs::open(&path, oflags, rustix::fs::Mode::empty())
        .map_err(std::io::Error::from)
        .with(|| {
            Error::new("open a file")
                .object(object())
                .hint("the file must exist on this host as it did on the source")
        })?;
    let stat = rustix::fs::fstat(&file)
        .map_err(std::io::Error::from)
        .context("look at a file")?;
    let mismatch = |what: String| {
        Error::new("validate a file")
            .object(object())
            .because(what)
            .hint("install the same version of it on this host")
    };
    if let Some(mode) = entry.mode.filter(|&mode| mode != stat.st_mode)
        && !restore.options.skip_file_modes
    {
        return Err(Error::new("validate a file")
            .object(object())
            .because(format!(
                "its mode is {:o} here and was {mode:o} at the dump",
                stat.st_mode
            ))
            .hint("use --skip-file-rwx-check if that is as it should be"));
    }
    if stat.st_mode & libc::S_IFMT == libc::S_IFREG {
        if let Some(size) = entry.size.filter(|&size| size != stat.st_size as u64) {
            return Err(mismatch(format!(
                "it has {} bytes here and had {size} at the source",
                stat.st_size
            )));
        }
        if !restore.options.skip_build_ids && !entry.build_id.is_empty() && build_id(&file) != entry.build_id {
            return Err(mismatch("its build id differs from the one at the source".into()));
        }
    }
    Ok(file)
}

fn ghost_of(id: u32, restore: &FileRestore<'_>) -> Result<Option<u32>> {
    let Some(mut image) = restore.image("remap-fpath.img")? else {
        return Ok(None);
    };
    while let Some(entry) = image.next::<RemapFilePathEntry>().context("read remaps")? {
        if entry.orig_id == id && entry.remap_type() == RemapType::Ghost {
            return Ok(Some(entry.remap_id));
        }
    }
    Ok(None)
}

fn open_ghost(entry: &RegFileEntry, ghost: u32, flags: u32, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
    let key = (FdTypes::Reg, u64::from(ghost));
    if !restore.held.contains_key(&key) {
        let file = make_ghost(entry, ghost, restore)?;
        restore.held.insert(key, file);
    }
    let open_flags = flags & !(libc::O_TMPFILE | libc::O_NOFOLLOW) as u32;
    fd::reopen(restore.held[&key].as_fd(), open_flags).context("open a deleted file")
}

/// Makes the deleted file again: under its old name for a moment, so that links in /proc read as they did.
fn make_ghost(entry: &RegFileEntry, ghost: u32, restore: &FileRestore<'_>) -> Result<OwnedFd> {
    let name = format!("ghost-file-{ghost:x}.img");
    let mut image = restore
        .image(&name)?
        .ok_or_else(|| Error::new("restore a deleted file").because(format!("{name} is missing")))?;
    let meta = image.required::<GhostFileEntry>().context("read a deleted file")?;
    let path: PathBuf = restore.options.root.join(entry.name.trim_start_matches('/'));
    let parent = path.parent().unwrap_or(&path);
    let unique = parent.join(path.file_name().unwrap_or_default());
    let oflags =
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CREATE | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
    let mode = rustix::fs::Mode::from_raw_mode(meta.mode & 0o7777);
    let fifo = meta.mode & libc::S_IFMT == libc::S_IFIFO;
    // A file that has the name by now stays; the deleted one then gets a name beside it.
    let open = |path: &PathBuf| {
        let oflags = if fifo {
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0)?;
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC
        } else {
            oflags
        };
        rustix::fs::open(path, oflags, mode).map(|file| (file, path.clone()))
    };
    let beside = parent.join(format!(".whimbrel-ghost-{}-{ghost}", std::process::id()));
    let (file, made) = open(&unique)
        .or_else(|_| open(&beside))
        .map_err(std::io::Error::from)
        .context("make a deleted file again")?;
    let filled = (|| -> Result<()> {
        let mut file = File::from(file.try_clone().context("duplicate a descriptor")?);
        if !fifo {
            read_contents(&mut image, &meta, &mut file)?;
        }
        rustix::fs::fchown(
            &file,
            Some(rustix::fs::Uid::from_raw(meta.uid)),
            Some(rustix::fs::Gid::from_raw(meta.gid)),
        )
        .map_err(std::io::Error::from)
        .context("set the owner of a deleted file")?;
        rustix::fs::fchmod(&file, mode)
            .map_err(std::io::Error::from)
            .context("set the mode of a deleted file")?;
        let time = |time: Option<Timeval>, rest: Option<u32>| match time {
            Some(time) => rustix::fs::Timespec {
                tv_sec: time.tv_sec as i64,
                tv_nsec: (time.tv_usec.min(999_999) * 1000) as i64 + i64::from(rest.unwrap_or(0).min(999)),
            },
            None => rustix::fs::Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
        };
        let times = rustix::fs::Timestamps {
            last_access: time(meta.atim, meta.atim_rest),
            last_modification: time(meta.mtim, meta.mtim_rest),
        };
        rustix::fs::futimens(&file, &times)
            .map_err(std::io::Error::from)
            .context("set the times of a deleted file")
    })();
    let removed = std::fs::remove_file(&made).context("delete a file again");
    filled.and(removed)?;
    if fifo {
        return Ok(file);
    }
    // Nothing that is open for writing can be the executable of a task: only the name of the file is kept.
    fd::reopen(file.as_fd(), libc::O_PATH as u32).context("hold a deleted file")
}

/// The GNU build id of an ELF file as little-endian words; empty when it has none.
pub fn build_id(handle: &OwnedFd) -> Vec<u32> {
    let read = || -> Option<Vec<u32>> {
        // Opening a file breaks its leases: only what cannot be read through `handle` itself is opened again.
        let mut file = File::from(handle.try_clone().ok()?);
        let mut head = vec![0u8; 4096];
        let length = match file.read_at(&mut head, 0) {
            Ok(length) => length,
            Err(_) => {
                let flags = (libc::O_RDONLY | libc::O_NONBLOCK) as u32;
                file = File::from(fd::reopen(handle.as_fd(), flags).ok()?);
                file.read_at(&mut head, 0).ok()?
            }
        };
        head.truncate(length);
        elf_build_id(&head, |offset, size| {
            let mut bytes = vec![0u8; size];
            file.read_exact_at(&mut bytes, offset).ok()?;
            Some(bytes)
        })
    };
    read().unwrap_or_default()
}

/// Finds the build id in the note segments of a 64-bit ELF file (elf(5)).
fn elf_build_id(head: &[u8], mut read: impl FnMut(u64, usize) -> Option<Vec<u8>>) -> Option<Vec<u32>> {
    const PT_NOTE: u32 = 4;
    const NT_GNU_BUILD_ID: u32 = 3;
    if head.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let word = |at: usize| Some(u64::from_le_bytes(head.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let half = |at: usize| Some(usize::from(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?)));
    let (table, size, count) = (word(32)? as usize, half(54)?, half(56)?);
    for index in 0..count {
        let at = table.checked_add(index.checked_mul(size)?)?;
        let kind = u32::from_le_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?);
        if kind != PT_NOTE {
            continue;
        }
        let (offset, length) = (word(at + 8)?, word(at + 32)?.min(4096) as usize);
        let notes = read(offset, length)?;
        let mut rest = &notes[..];
        while rest.len() >= 12 {
            let field = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap_or_default());
            let (name, description, kind) = (field(0) as usize, field(4) as usize, field(8));
            let start = 12 + name.next_multiple_of(4);
            let end = start.checked_add(description)?;
            if kind == NT_GNU_BUILD_ID && rest.get(12..16) == Some(b"GNU\0") {
                let id = rest.get(start..end)?;
                return Some(
                    id.chunks(4)
                        .map(|c| {
                            let mut word = [0; 4];
                            word[..c.len()].copy_from_slice(c);
                            u32::from_le_bytes(word)
                        })
                        .collect(),
                );
            }
            rest = rest.get(end.next_multiple_of(4)..)?;
        }
    }
    None
}
