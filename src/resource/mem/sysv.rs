//! System V shared memory: segments that tasks have attached.
//!
//! A segment belongs to its IPC namespace, not to a task. With the tree goes every segment that it has attached, with its
//! id, key, owner, mode and contents; nobody outside of the tree may have it attached. A restore makes it again with its
//! id, or takes the one that is there, if that is the same and nobody uses it: as a dump leaves it, that the segment
//! survives like every other death of its users. Its contents are those of the dump in either case.
//!
//! Segments are in `ipcns-shm-NAMESPACE.img`; their contents are stored as `pagemap-shmem-ID` with the segment's own id.

use std::collections::BTreeMap;
use std::fs::File;

use whimbrel_images::entry::{ImageReader, ImageWriter};
use whimbrel_images::proto::{IpcDescEntry, IpcShmEntry, VmaEntry};
use whimbrel_images::store::ImageStore;

use crate::error::{Context, Error, Result};
use crate::kernel::shm::{self, Attachment, SHM_DEST, SHM_LOCKED};
use crate::procfs::maps::Mapping;
use crate::remote::{Expect, Outcome, Program};

/// Times that a segment is made until it has its id; others make segments, too.
const ATTEMPTS: u32 = 20;

/// Is this a mapping of a segment? The kernel names them by their keys, and their inodes are their ids.
pub fn is_segment(mapping: &Mapping) -> bool {
    let key = mapping.name.strip_prefix(b"/SYSV");
    let key = key.and_then(|name| name.strip_suffix(b" (deleted)"));
    mapping.shared && mapping.device.0 == 0 && key.is_some_and(|key| key.len() == 8)
}

/// The key that a segment was made with, as the name of its mapping shows it even when it was removed.
fn key_in_name(mapping: &Mapping) -> u32 {
    let digits = mapping
        .name
        .get(5..13)
        .and_then(|digits| std::str::from_utf8(digits).ok());
    digits
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .unwrap_or(0)
}

/// Segments that a tree has attached, by id.
#[derive(Debug, Default)]
pub struct Seen(BTreeMap<i32, SeenSegment>);

#[derive(Debug)]
struct SeenSegment {
    /// A process that has it attached.
    pid: i32,
    mappings: u64,
    key_in_name: u32,
}

impl Seen {
    /// Takes note of a mapping of process `pid`; returns the id of the segment, and whether it is the first of it.
    ///
    /// # Errors
    /// When its inode is no id.
    pub fn note(&mut self, pid: i32, mapping: &Mapping) -> Result<(i32, bool)> {
        let id = i32::try_from(mapping.inode).context("look at a System V segment")?;
        let seen = self.0.entry(id).or_insert(SeenSegment {
            pid,
            mappings: 0,
            key_in_name: key_in_name(mapping),
        });
        seen.mappings += 1;
        Ok((id, seen.mappings == 1))
    }

    /// Describes all segments.
    ///
    /// # Errors
    /// When one cannot be carried: it is in another IPC namespace than ours, or attached by others.
    pub fn describe(&self) -> Result<Vec<IpcShmEntry>> {
        self.0.iter().map(|(&id, seen)| describe(id, seen)).collect()
    }

    /// Writes the image of namespace `namespace`.
    ///
    /// # Errors
    /// As [`Seen::describe`], or when it cannot be written.
    pub fn dump(&self, namespace: u32, store: &dyn ImageStore) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let failed = "write System V segments";
        let mut writer = ImageWriter::create(store, &image_name(namespace)).context(failed)?;
        for entry in self.describe()? {
            writer.write(&entry).context(failed)?;
        }
        writer.finish().context(failed)
    }

    /// The tree lives elsewhere, with its segments: those that it has made itself, as `is_ours` tells of their creators, are
    /// removed here. Others' stay.
    pub fn abandon(&self, is_ours: &dyn Fn(i32) -> bool) {
        for &id in self.0.keys() {
            let Ok(status) = shm::status(id) else { continue };
            if is_ours(status.creator)
                && let Err(error) = shm::remove(id)
            {
                tracing::warn!(%error, "cannot remove System V segment {id}, which lives elsewhere now");
            }
        }
    }
}

fn describe(id: i32, seen: &SeenSegment) -> Result<IpcShmEntry> {
    let failed = || {
        Error::new("carry System V shared memory")
            .task(seen.pid)
            .object(format!("segment {id}"))
    };
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/ipc")).ok();
    if namespace(&seen.pid.to_string()) != namespace("self") {
        return Err(failed()
            .because("its IPC namespace is not that of this tool, which is not supported yet")
            .hint("run the tool in that namespace: nsenter --ipc"));
    }
    let status = shm::status(id).with(failed)?;
    if status.attached > seen.mappings {
        let others = status.attached - seen.mappings;
        return Err(failed()
            .because(format!(
                "processes outside of the tree have it attached, {others} times"
            ))
            .hint("carry a tree that includes them, or end them"));
    }
    Ok(IpcShmEntry {
        desc: IpcDescEntry {
            key: status.key,
            uid: status.uid,
            gid: status.gid,
            cuid: status.creator_uid,
            cgid: status.creator_gid,
            mode: status.mode,
            id: id as u32,
        },
        size: status.size,
        in_pagemaps: Some(true),
        hugetlb_flag: None,
        made_with: Some(seen.key_in_name).filter(|&key| key != status.key),
    })
}

fn image_name(namespace: u32) -> String {
    format!("ipcns-shm-{namespace}.img")
}

/// Would this segment find a place here? Tells whether it is there already, and free to be taken.
///
/// # Errors
/// When its id or key belongs to another segment, or somebody uses it.
pub fn find_place(entry: &IpcShmEntry) -> Result<bool> {
    let failed = || failed_to_make(entry);
    let (id, key) = (id_of(entry)?, entry.desc.key);
    match shm::status(id) {
        Ok(there) if (there.key, there.size) != (key, entry.size) => {
            return Err(failed().because("another segment has its id here").hint(format!(
                "remove that with `ipcrm -m {id}`, or restore in a new IPC namespace"
            )));
        }
        Ok(there) if there.attached > 0 => {
            return Err(failed()
                .because("it is in use here")
                .hint("end the processes that have it attached, or restore in a new IPC namespace"));
        }
        Ok(_) => return Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIDRM)) => {}
        Err(error) => return Err(failed().because(error)),
    }
    match if key == 0 { None } else { shm::find(key).with(failed)? } {
        None => Ok(false),
        Some(other) => Err(failed()
            .because(format!("segment {other} has its key {key:#x} here"))
            .hint(format!(
                "remove that with `ipcrm -m {other}`, or restore in a new IPC namespace"
            ))),
    }
}

fn failed_to_make(entry: &IpcShmEntry) -> Error {
    Error::new("make a System V segment").object(format!("segment {}, {} bytes", entry.desc.id, entry.size))
}

fn id_of(entry: &IpcShmEntry) -> Result<i32> {
    let bad = |_| failed_to_make(entry).because("its id is no id");
    i32::try_from(entry.desc.id).map_err(bad)
}

/// The segments of a tree under construction. Those that were made for it are removed again when this is dropped.
#[derive(Debug, Default)]
pub struct Segments(BTreeMap<u64, Segment>);

#[derive(Debug)]
struct Segment {
    id: i32,
    made: bool,
    /// Keeps a removed segment from going before the tasks have it.
    attachment: Attachment,
    contents: File,
}

impl Segments {
    /// Makes or takes the segments of an image set. `run` runs a program in the root of the tree, which is to be the creator.
    ///
    /// # Errors
    /// When the image is damaged, or one finds no place here.
    pub fn make(
        namespace: u32,
        store: &dyn ImageStore,
        run: &mut dyn FnMut(&Program) -> Result<Outcome>,
    ) -> Result<Segments> {
        let failed = "read System V segments";
        let mut segments = Segments::default();
        let mut image = match ImageReader::open(store, &image_name(namespace)) {
            Ok(image) => image,
            Err(error) if error.is_not_found() => return Ok(segments),
            Err(error) => return Err(error).context(failed),
        };
        while let Some(entry) = image.next::<IpcShmEntry>().context(failed)? {
            if entry.in_pagemaps != Some(true) {
                return Err(failed_to_make(&entry).because("contents beside the segment are not supported yet"));
            }
            segments.make_one(&entry, run)?;
        }
        Ok(segments)
    }

    fn make_one(&mut self, entry: &IpcShmEntry, run: &mut dyn FnMut(&Program) -> Result<Outcome>) -> Result<()> {
        let failed = || failed_to_make(entry);
        let (id, desc) = (id_of(entry)?, &entry.desc);
        let made = !find_place(entry)?;
        if made {
            create(entry, id, run)?;
        }
        let opened = Attachment::new(id, entry.size).and_then(|attachment| Ok((attachment.file()?, attachment)));
        let (contents, attachment) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                if made {
                    let _ = shm::remove(id);
                }
                return Err(failed().because(error));
            }
        };
        let segment = Segment {
            id,
            made,
            attachment,
            contents,
        };
        self.0.insert(u64::from(desc.id), segment);
        shm::set(id, desc.uid, desc.gid, desc.mode).with(failed)?;
        if desc.mode & SHM_LOCKED != 0 {
            shm::lock(id).with(failed)?;
        }
        if desc.mode & SHM_DEST != 0 {
            shm::remove(id).with(failed)?;
        }
        Ok(())
    }

    /// The contents of all segments as files, by the ids that mappings name.
    pub fn files(&self) -> impl Iterator<Item = (u64, &File)> {
        self.0.iter().map(|(&id, segment)| (id, &segment.contents))
    }

    /// The size of a segment in bytes.
    ///
    /// # Errors
    /// When the images have none with this id.
    pub fn size(&self, id: u64) -> Result<u64> {
        let segment = self.0.get(&id).ok_or_else(|| {
            Error::new("attach a System V segment")
                .object(format!("segment {id}"))
                .because("the images do not describe it")
        })?;
        Ok(segment.attachment.size())
    }

    /// The tree has them all, and its contents are there: they stay.
    ///
    /// # Errors
    /// When one cannot be given its size.
    pub fn keep(&mut self) -> Result<()> {
        for segment in self.0.values() {
            // Its contents were written in whole pages.
            let failed = || Error::new("size a System V segment").object(format!("segment {}", segment.id));
            segment.contents.set_len(segment.attachment.size()).with(failed)?;
        }
        let kept = std::mem::take(&mut self.0).into_values();
        kept.for_each(|mut segment| segment.made = false);
        Ok(())
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        if self.made {
            let _ = shm::remove(self.id);
        }
    }
}

/// Makes a segment with its id.
fn create(entry: &IpcShmEntry, id: i32, run: &mut dyn FnMut(&Program) -> Result<Outcome>) -> Result<()> {
    let failed = || failed_to_make(entry);
    let desc = &entry.desc;
    // A segment that was removed has no key any more, but still its name; that key may be another's by now.
    let removed = desc.mode & SHM_DEST != 0;
    let mut key = entry.made_with.filter(|_| removed).unwrap_or(desc.key);
    if removed && key != 0 && shm::find(key).with(failed)?.is_some() {
        key = 0;
    }
    for _ in 0..ATTEMPTS {
        shm::choose_next_id(id)
            .with(|| failed().hint("choosing the id of a segment needs root, or CAP_CHECKPOINT_RESTORE"))?;
        let flags = desc.mode & 0o777 | (libc::IPC_CREAT | libc::IPC_EXCL) as u32;
        let mut program = Program::new();
        become_user(&mut program, desc.cuid, desc.cgid);
        let call = program.try_call(libc::SYS_shmget, &[key.into(), entry.size.into(), flags.into()]);
        become_user(&mut program, 0, 0);
        let made = run(&program)?.checked(call).with(failed)? as i32;
        if made == id {
            return Ok(());
        }
        // Somebody else made a segment in between, and has the id that was chosen, or a near one.
        shm::remove(made).with(failed)?;
    }
    Err(failed().because("others make segments all the time, or one of theirs has its place"))
}

/// Adds the calls that make the root of a tree somebody else for a moment; its saved ids stay those of the tool.
fn become_user(program: &mut Program, uid: u32, gid: u32) {
    if rustix::process::geteuid().is_root() {
        let keep = u32::MAX;
        // The group while it still may, and first of all the user when it comes back.
        let user = (libc::SYS_setresuid, uid);
        let group = (libc::SYS_setresgid, gid);
        for (call, id) in if uid == 0 { [user, group] } else { [group, user] } {
            program.call(
                "choose the creator of a segment",
                call,
                &[keep.into(), id.into(), keep.into()],
            );
        }
    }
}

/// Adds the calls that attach a segment of `size` bytes as one attachment was, of which `pieces` are left. `room` finds
/// a range of addresses of that length which nothing else needs.
///
/// # Errors
/// When there is no room, or a piece lies outside of the segment.
pub fn attach(
    program: &mut Program,
    id: u64,
    size: u64,
    pieces: &[&VmaEntry],
    room: impl FnOnce(u64) -> Result<u64>,
) -> Result<()> {
    let Some(first) = pieces.first() else { return Ok(()) };
    let length = size.next_multiple_of(crate::arch::PAGE_SIZE);
    let whole = pieces.len() == 1 && first.pgoff == 0 && first.end - first.start == length;
    let at = if whole { first.start } else { room(length)? };
    let write = first.fdflags.unwrap_or(libc::O_RDWR as u32) & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
    let (flags, prot) = if write {
        (0, libc::PROT_READ | libc::PROT_WRITE)
    } else {
        (libc::SHM_RDONLY, libc::PROT_READ)
    };
    let what = format!("attach System V segment {id} at {at:#x}");
    let args = [id.into(), at.into(), flags.into()];
    program.call_expecting(what, Expect::Exactly(at as i64), libc::SYS_shmat, &args);
    for piece in pieces {
        let long = piece.end - piece.start;
        if !whole {
            let here = length
                .checked_sub(piece.pgoff)
                .filter(|&left| left > 0)
                .ok_or_else(|| {
                    Error::new("attach a System V segment")
                        .object(format!("{:#x}-{:#x}", piece.start, piece.end))
                        .because("it lies behind the end of the segment")
                })?;
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let from = at + piece.pgoff;
            let args = [
                from.into(),
                here.min(long).into(),
                long.into(),
                flags.into(),
                piece.start.into(),
            ];
            let expect = Expect::Exactly(piece.start as i64);
            program.call_expecting("place a piece of a System V segment", expect, libc::SYS_mremap, &args);
        }
        if piece.prot != prot as u32 {
            let args = [piece.start.into(), long.into(), piece.prot.into()];
            program.call("protect a System V segment", libc::SYS_mprotect, &args);
        }
    }
    if !whole {
        let args = [at.into(), length.into()];
        program.call("detach what is not left of a System V segment", libc::SYS_munmap, &args);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment of the machine, for as long as the test runs.
    struct Made(i32);

    impl Made {
        fn new(size: u64, key: u32) -> Made {
            Made(shm::make(key, size, 0o600).unwrap())
        }

        fn entry(&self) -> IpcShmEntry {
            let status = shm::status(self.0).unwrap();
            IpcShmEntry {
                desc: IpcDescEntry {
                    key: status.key,
                    id: self.0 as u32,
                    ..IpcDescEntry::default()
                },
                size: status.size,
                ..IpcShmEntry::default()
            }
        }
    }

    impl Drop for Made {
        fn drop(&mut self) {
            let _ = shm::remove(self.0);
        }
    }

    #[test]
    fn a_segment_that_is_there_is_taken_unless_it_is_another_or_in_use() {
        let made = Made::new(5000, 0);
        let entry = made.entry();
        assert!(find_place(&entry).unwrap());
        let other = IpcShmEntry { size: 6000, ..entry };
        let why = find_place(&other).unwrap_err().chain();
        assert!(why.contains("another segment has its id"), "{why}");
        let attachment = Attachment::new(made.0, entry.size).unwrap();
        let why = find_place(&entry).unwrap_err().chain();
        assert!(why.contains("in use"), "{why}");
        drop(attachment);
        assert!(find_place(&entry).unwrap());
        drop(made);
        assert!(!find_place(&entry).unwrap());
    }

    #[test]
    fn a_key_that_another_segment_has_is_told() {
        let made = Made::new(4096, 0x5748_0001);
        let mut entry = made.entry();
        entry.desc.id = i32::MAX as u32;
        let why = find_place(&entry).unwrap_err().chain();
        assert!(why.contains("has its key"), "{why}");
        entry.desc.id = u32::MAX;
        assert!(find_place(&entry).is_err());
    }
}
