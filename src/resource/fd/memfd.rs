//! memfds, open or mapped. Their memory is a shared segment; the inode with its name and seals is in `memfd.img`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use whimbrel_images::proto::{FdTypes, FileEntry, FownEntry, MemfdFileEntry, MemfdInodeEntry};

use crate::error::{Context, Error, Result};
use crate::resource::FileKind;
use crate::resource::fd::regular::Source;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};
use crate::resource::mem::shared::Segments;

/// Files in memory without a path.
pub struct Memfd;

const PREFIX: &[u8] = b"/memfd:";
const HUGETLBFS_MAGIC: u64 = 0x958458f6;
/// Since Linux 6.3: memory that may be executed, whatever `vm.memfd_noexec` says. The seal and the mode follow.
const MFD_EXEC: u32 = 0x10;

impl FileKind for Memfd {
    fn name(&self) -> &'static str {
        "memfd"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Memfd]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.file_type() == libc::S_IFREG && is_memfd(&file.link, &file.stat)
    }

    fn share(&self, file: &OpenFile, segments: &mut Segments) -> Result<()> {
        let failed = || Error::new("open a memfd").task(file.pid).object(file.describe());
        // Its contents are read by offset: a description of our own leaves the task's position alone.
        let contents = fd::reopen(file.handle.as_fd(), libc::O_RDONLY as u32).with(failed)?;
        segments.id_of(File::from(contents)).map(drop)
    }

    fn check(&self, file: &OpenFile, _: &FileDump<'_>) -> Result<()> {
        check_pages(&file.handle)
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let source = Source {
            pid: file.pid,
            link: &file.link,
            stat: &file.stat,
        };
        let mut entry = describe_inode(&source, &file.handle, id, file.flags(), dump)?;
        if let Some(memfd) = &mut entry.memfd {
            (memfd.pos, memfd.fown) = (file.info.pos, file.owner());
        }
        Ok(entry)
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = memfd_of(entry)?;
        let file = open_inode(entry.inode_id, entry.flags, restore)?;
        if entry.pos != 0 && entry.flags & libc::O_PATH as u32 == 0 {
            rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(entry.pos))
                .map_err(std::io::Error::from)
                .context("set the position of a memfd")?;
        }
        fd::restore_owner(file.as_fd(), &entry.fown)?;
        Ok(file)
    }

    /// Size and seals come last: the contents were written in whole pages, which seals would have forbidden.
    fn resume(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let inode_id = memfd_of(entry)?.inode_id;
        let inode = inode(inode_id, restore)?;
        let seals = SealFlags::from_bits_retain(inode.seals);
        let Some(file) = restore.held.get(&(FdTypes::Memfd, u64::from(inode_id))) else {
            return Ok(());
        };
        let now = rustix::fs::fcntl_get_seals(file)
            .map_err(std::io::Error::from)
            .context("ask for the seals of a memfd")?;
        if !seals.is_empty() && now.contains(seals) {
            return Ok(());
        }
        rustix::fs::ftruncate(file, inode.size)
            .map_err(std::io::Error::from)
            .with(|| Error::new("size a memfd").object(format!("memfd {inode_id}")))?;
        rustix::fs::fcntl_add_seals(file, seals)
            .map_err(std::io::Error::from)
            .with(|| Error::new("seal a memfd").object(format!("memfd {inode_id}")))
    }
}

/// Is a file, open or mapped, a memfd? (A deleted file of such a name in a root directory is carried as well as one.)
pub fn is_memfd(link: &[u8], stat: &rustix::fs::Stat) -> bool {
    link.starts_with(PREFIX) && link.ends_with(b" (deleted)") && stat.st_nlink == 0
}

/// Can the memory of a memfd be carried?
///
/// # Errors
/// When it is made of huge pages.
pub fn check_pages(handle: &OwnedFd) -> Result<()> {
    let system = rustix::fs::fstatfs(handle)
        .map_err(std::io::Error::from)
        .context("look at a memfd")?;
    if system.f_type as u64 == HUGETLBFS_MAGIC {
        return Err(Error::new("carry a memfd").because("explicit huge pages are not supported yet"));
    }
    Ok(())
}

/// Describes an open file description of a memfd, or a mapping of one, and its inode with the first of them. The segments of
/// the dump must know its memory.
///
/// # Errors
/// When it cannot be looked at.
pub fn describe_inode(
    source: &Source<'_>,
    handle: &OwnedFd,
    id: u32,
    flags: u32,
    dump: &mut FileDump<'_>,
) -> Result<FileEntry> {
    let stat = source.stat;
    let shmid = dump
        .shared
        .segments
        .get(&(stat.st_dev, stat.st_ino))
        .copied()
        .ok_or_else(|| Error::new("dump a memfd").because("its memory was not announced"))?;
    if dump.shared.first(FdTypes::Memfd, u64::from(shmid)) {
        check_pages(handle)?;
        // A mapped one is seen through an O_PATH descriptor, which has no seals.
        let readable = fd::reopen(handle.as_fd(), libc::O_RDONLY as u32).context("open a memfd")?;
        let seals = rustix::fs::fcntl_get_seals(&readable)
            .map_err(std::io::Error::from)
            .context("ask for the seals of a memfd")?;
        let name = source.link.strip_prefix(PREFIX).unwrap_or(source.link);
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        let inode = MemfdInodeEntry {
            name: String::from_utf8(name.to_vec()).context("read the name of a memfd")?,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u64,
            shmid,
            seals: seals.bits(),
            inode_id: u64::from(shmid),
            hugetlb_flag: None,
            mode: Some(stat.st_mode),
        };
        dump.append("memfd.img", &inode, &[])?;
    }
    let memfd = MemfdFileEntry {
        id,
        flags,
        pos: 0,
        fown: FownEntry::default(),
        inode_id: shmid,
    };
    Ok(FileEntry {
        r#type: FdTypes::Memfd as i32,
        id,
        memfd: Some(memfd),
        ..FileEntry::default()
    })
}

fn memfd_of(entry: &FileEntry) -> Result<&MemfdFileEntry> {
    let entry = entry.memfd.as_ref();
    entry.ok_or_else(|| Error::new("restore a memfd").because("the image has no memfd entry"))
}

/// All memfds of the image set, by inode id.
///
/// # Errors
/// When the image cannot be read.
pub fn inodes(restore: &FileRestore<'_>) -> Result<BTreeMap<u64, MemfdInodeEntry>> {
    let mut inodes = BTreeMap::new();
    if let Some(mut image) = restore.image("memfd.img")? {
        while let Some(entry) = image.next::<MemfdInodeEntry>().context("read memfds")? {
            inodes.insert(entry.inode_id, entry);
        }
    }
    Ok(inodes)
}

fn inode(inode_id: u32, restore: &FileRestore<'_>) -> Result<MemfdInodeEntry> {
    inodes(restore)?
        .remove(&u64::from(inode_id))
        .ok_or_else(|| Error::new("restore a memfd").because(format!("memfd.img has no inode {inode_id}")))
}

/// Makes a memfd, empty but for its size, and without its seals.
///
/// # Errors
/// When it cannot be made.
pub fn make_inode(entry: &MemfdInodeEntry) -> Result<OwnedFd> {
    let failed = || Error::new("make a memfd").object(entry.name.clone());
    if entry.hugetlb_flag.unwrap_or(0) != 0 {
        return Err(failed().because("explicit huge pages are not supported yet"));
    }
    let make = |flags: u32| {
        let flags = MemfdFlags::from_bits_retain(flags) | MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
        rustix::fs::memfd_create(entry.name.as_str(), flags)
    };
    let file = make(MFD_EXEC)
        .or_else(|error| match error {
            rustix::io::Errno::INVAL => make(0),
            other => Err(other),
        })
        .map_err(std::io::Error::from)
        .with(failed)?;
    let (owner, group) = (
        rustix::fs::Uid::from_raw(entry.uid),
        rustix::fs::Gid::from_raw(entry.gid),
    );
    rustix::fs::ftruncate(&file, entry.size)
        .and_then(|()| rustix::fs::fchown(&file, Some(owner), Some(group)))
        .and_then(|()| match entry.mode {
            Some(mode) => rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(mode & 0o7777)),
            None => Ok(()),
        })
        .map_err(std::io::Error::from)
        .with(failed)?;
    Ok(file)
}

/// The memfd of an inode id, made when it is asked for first; it stays in `restore.held`.
fn held<'r>(inode_id: u32, restore: &'r mut FileRestore<'_>) -> Result<&'r OwnedFd> {
    let key = (FdTypes::Memfd, u64::from(inode_id));
    if !restore.held.contains_key(&key) {
        let file = make_inode(&inode(inode_id, restore)?)?;
        restore.held.insert(key, file);
    }
    Ok(&restore.held[&key])
}

/// A new open file description of a memfd.
///
/// # Errors
/// When it is not in the images, or cannot be made.
pub fn open_inode(inode_id: u32, flags: u32, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
    let file = held(inode_id, restore)?;
    fd::reopen(file.as_fd(), flags).with(|| Error::new("open a memfd").object(format!("memfd {inode_id}")))
}

/// Where the contents of memfds go: every memfd of the images with the id of its memory (`pagemap-shmem-ID`).
///
/// # Errors
/// When one cannot be made.
pub fn segments(restore: &mut FileRestore<'_>) -> Result<Vec<(u32, OwnedFd)>> {
    let mut files = Vec::new();
    for (inode_id, entry) in inodes(restore)? {
        let file = held(inode_id as u32, restore)?;
        files.push((entry.shmid, file.try_clone().context("duplicate a descriptor")?));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;
    use crate::resource::mem::shared::FIRST_ID;
    use std::os::unix::fs::FileExt;

    fn make(name: &str) -> File {
        File::from(rustix::fs::memfd_create(name, MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap())
    }

    #[test]
    fn name_size_mode_position_and_seals_survive_and_seals_come_after_the_contents() {
        let file = make("a name");
        file.write_all_at(b"contents", 3).unwrap();
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(5)).unwrap();
        rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o640)).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        let dumped = fixture::dump(&[&file]);
        let mut restore = dumped.context();
        fd::open_all(&mut restore, &|_| true).unwrap();
        for (shmid, segment) in segments(&mut restore).unwrap() {
            assert_eq!(shmid, FIRST_ID);
            File::from(segment).write_all_at(b"contents", 3).unwrap();
        }
        Memfd.resume(&dumped.entries[&1], &mut restore).unwrap();
        Memfd.resume(&dumped.entries[&1], &mut restore).unwrap();
        let copy = &restore.opened[&1];
        let link = |file: &dyn AsFd| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file.as_fd());
            std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap()
        };
        assert_eq!(link(copy), link(&file));
        assert_eq!(fixture::info(copy), fixture::info(&file));
        assert_eq!(rustix::fs::fcntl_get_seals(copy).unwrap(), seals);
        assert_eq!(rustix::fs::tell(copy).unwrap(), 5);
        let stat = rustix::fs::fstat(copy).unwrap();
        assert_eq!((stat.st_size, stat.st_mode & 0o7777), (11, 0o640));
        assert!(rustix::io::write(copy, b"x").is_err());
        let mut bytes = [0; 8];
        rustix::io::pread(copy, &mut bytes, 3).unwrap();
        assert_eq!(&bytes, b"contents");
    }

    #[test]
    fn two_files_of_one_memfd_are_of_one_memfd_again() {
        let file = make("twice");
        let reader = fd::reopen(file.as_fd(), libc::O_RDONLY as u32).unwrap();
        let files = fixture::dump(&[&file, &reader, &make("other")]).restore();
        rustix::io::write(&files[0], b"seen").unwrap();
        let mut bytes = [0; 4];
        rustix::io::read(&files[1], &mut bytes).unwrap();
        assert_eq!(&bytes, b"seen");
        assert!(rustix::io::write(&files[1], b"x").is_err());
        assert_eq!(rustix::fs::fstat(&files[2]).unwrap().st_size, 0);
    }

    #[test]
    fn a_mapped_memfd_is_dumped_once_however_many_files_and_mappings_show_it() {
        let _alone = fixture::alone();
        let file = make("mapped");
        file.write_all_at(b"contents", 0).unwrap();
        file.set_len(8192).unwrap();
        let reader = fd::reopen(file.as_fd(), libc::O_RDONLY as u32).unwrap();
        let task = fixture::Task::start(&["setsid", "sleep", "1000"], &OwnedFd::from(file), &reader);
        let mut program = crate::remote::Program::new();
        for (fd, prot) in [(0, libc::PROT_READ | libc::PROT_WRITE), (1, libc::PROT_READ)] {
            let args = [
                0.into(),
                8192.into(),
                prot.into(),
                libc::MAP_SHARED.into(),
                fd.into(),
                0.into(),
            ];
            program.call("map a memfd", libc::SYS_mmap, &args);
        }
        task.run(&program);

        let options = crate::dump::Options {
            shell_job: true,
            ..Default::default()
        };
        let prepared = crate::dump::Prepared::look(task.pid()).unwrap();
        let frozen = crate::dump::freeze(task.pid(), prepared, &options).unwrap_or_else(|e| panic!("{}", e.chain()));
        let store = whimbrel_images::store::MemStore::new();
        let collected = &frozen.collected;
        collected
            .check_files(&store, &options)
            .unwrap_or_else(|error| panic!("{}", error.chain()));
        let entries = collected.dump_files(&store, &options).unwrap();
        frozen.tree.resume().unwrap();

        let mapped: Vec<_> = collected.tasks[0]
            .mm
            .vmas
            .iter()
            .filter(|vma| vma.status & crate::resource::mem::mapping::status::MEMFD != 0)
            .map(|vma| (vma.fdflags, entries[&(vma.shmid as u32)].memfd.as_ref().unwrap()))
            .collect();
        let files = entries.values().filter_map(|entry| entry.memfd.as_ref());
        let inodes_of_files: Vec<_> = files.map(|memfd| memfd.inode_id).collect();
        assert_eq!(inodes_of_files, [FIRST_ID; 4], "two descriptors and two mappings");
        assert_eq!(mapped.len(), 2);
        assert!(mapped.iter().all(|(flags, memfd)| *flags == Some(memfd.flags)));
        assert_eq!(collected.segments.iter().count(), 1);
        let restore_options = crate::restore::Options::default();
        let mut restore = FileRestore::new(&store, &restore_options, &entries);
        let inode = inodes(&restore).unwrap().remove(&u64::from(FIRST_ID)).unwrap();
        assert_eq!(
            (inode.name.as_str(), inode.size, inode.shmid),
            ("mapped", 8192, FIRST_ID)
        );
        let copy = Memfd.open(&entries[&mapped[0].1.id], &mut restore).unwrap();
        assert_eq!(rustix::fs::fstat(&copy).unwrap().st_size, 8192);
    }
}
