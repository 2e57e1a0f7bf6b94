//! epoll instances and what they watch.
//!
//! The kernel knows a watched file by its open file description *and* the descriptor number under which it was added. Most
//! items still have that number in the task: the task adds them itself. The others (the descriptor was closed or reused
//! while a duplicate keeps the file open) are added by the controller under the old number; their image entry names the
//! watched file in `id`, which is 0 otherwise, as CRIU leaves it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::CreateFlags;
use whimbrel_images::proto::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FileEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::procfs::fdinfo::FdInfo;
use crate::remote::Program;
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};

/// Sets of watched files.
pub struct Epoll;

/// An item, as fdinfo tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Item {
    tfd: u32,
    events: u32,
    data: u64,
    pos: u64,
    inode: u64,
    dev: u32,
    /// How many items before it have the same number: only one of them can be the file that has it now.
    index: u32,
}

/// Where the watched file is found.
enum Watched {
    /// Under its number in the task that the instance was looked at through.
    InPlace,
    /// Elsewhere: its image id.
    File(u32),
}

impl FileKind for Epoll {
    fn name(&self) -> &'static str {
        "epoll"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Eventpoll]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.link == b"anon_inode:[eventpoll]"
    }

    fn check(&self, file: &OpenFile, dump: &FileDump<'_>) -> Result<()> {
        items(&file.info)?
            .iter()
            .try_for_each(|item| find(file, item, dump).map(drop))
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let tfd = items(&file.info)?
            .iter()
            .map(|item| {
                let id = match find(file, item, dump)? {
                    Watched::InPlace => 0,
                    Watched::File(id) => id,
                };
                Ok(EventpollTfdEntry {
                    id,
                    tfd: item.tfd,
                    events: item.events,
                    data: item.data,
                    dev: Some(item.dev),
                    inode: Some(item.inode),
                    pos: Some(item.pos),
                })
            })
            .collect::<Result<_>>()?;
        let epfd = EventpollFileEntry {
            id,
            flags: file.flags(),
            fown: file.owner(),
            tfd,
        };
        Ok(FileEntry {
            r#type: FdTypes::Eventpoll as i32,
            id,
            epfd: Some(epfd),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, _: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let entry = epoll_of(entry)?;
        let file = rustix::event::epoll::create(CreateFlags::CLOEXEC)
            .map_err(std::io::Error::from)
            .context("make an epoll instance")?;
        fd::restore_flags(file.as_fd(), entry.flags, &entry.fown)?;
        Ok(file)
    }

    fn finish(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let failed = |item: &EventpollTfdEntry| {
            Error::new("watch a file again").object(format!("epoll item {} → file {}", item.tfd, item.id))
        };
        let Some(epoll) = restore.opened.get(&entry.id) else {
            return Ok(());
        };
        for item in epoll_of(entry)?.tfd.iter().filter(|item| item.id != 0) {
            let target = restore
                .opened
                .get(&item.id)
                .ok_or_else(|| failed(item).because("the image has no such file"))?;
            files::epoll_add_as(epoll.as_fd(), target.as_fd(), item.tfd as i32, item.events, item.data)
                .with(|| failed(item))?;
        }
        Ok(())
    }

    fn install(&self, entry: &FileEntry, fd: u32, program: &mut Program) -> Result<()> {
        for item in epoll_of(entry)?.tfd.iter().filter(|item| item.id == 0) {
            let event = program.data(&files::epoll_event_bytes(item.events, item.data));
            let args = [fd.into(), libc::EPOLL_CTL_ADD.into(), item.tfd.into(), event.into()];
            program.call(
                format!("watch descriptor {} with epoll {fd}", item.tfd),
                libc::SYS_epoll_ctl,
                &args,
            );
        }
        Ok(())
    }
}

fn epoll_of(entry: &FileEntry) -> Result<&EventpollFileEntry> {
    let entry = entry.epfd.as_ref();
    entry.ok_or_else(|| Error::new("restore an epoll instance").because("the image has no epoll entry"))
}

/// Finds the watched file among the tree's descriptors.
fn find(epoll: &OpenFile, item: &Item, dump: &FileDump<'_>) -> Result<Watched> {
    let is = |pid: i32, fd: i32| {
        match files::watches(epoll.pid, epoll.fd, item.tfd, item.index, pid, fd) {
            Ok(answer) => answer,
            // The number is not in use there, or the kernel has no kcmp(2): then the inode has to do, if it is of one file.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => {
                let id = dump.ids.get(&(pid, fd));
                let stat = id.and_then(|id| dump.files.get(id)).map(|file| file.stat);
                stat.is_some_and(|stat| stat.st_ino == item.inode && stat.st_mode & libc::S_IFMT != 0)
            }
            Err(_) => false,
        }
    };
    if dump.ids.contains_key(&(epoll.pid, item.tfd as i32)) && is(epoll.pid, item.tfd as i32) {
        return Ok(Watched::InPlace);
    }
    let candidates = dump.files.iter().filter(|(_, file)| file.stat.st_ino == item.inode);
    for (&id, file) in candidates {
        if !is(file.pid, file.fd) {
            continue;
        }
        // A signalfd wakes those who wait for signals of the task that added it; the controller is not that task.
        if file.link == b"anon_inode:[signalfd]" {
            return Err(Error::new("carry an epoll item")
                .object(describe(epoll, item))
                .because("it watches a signalfd whose descriptor was closed or replaced since"));
        }
        return Ok(Watched::File(id));
    }
    Err(Error::new("carry an epoll item")
        .object(describe(epoll, item))
        .because("it watches a file that no process of the tree has open any more")
        .hint("the program must remove the item (EPOLL_CTL_DEL), or all holders of the file must be in the tree"))
}

fn describe(epoll: &OpenFile, item: &Item) -> String {
    format!("{}, item {} (inode {})", epoll.describe(), item.tfd, item.inode)
}

/// Parses the `tfd:` lines of fdinfo.
fn items(info: &FdInfo) -> Result<Vec<Item>> {
    let mut items: Vec<Item> = Vec::new();
    for line in info.lines.iter().filter(|line| line.starts_with("tfd:")) {
        let mut item = parse(line)
            .ok_or_else(|| Error::new("dump an epoll instance").because(format!("cannot understand `{line}`")))?;
        item.index = items.iter().filter(|other| other.tfd == item.tfd).count() as u32;
        items.push(item);
    }
    Ok(items)
}

fn parse(line: &str) -> Option<Item> {
    let field = |name: &str| {
        let (_, rest) = line.split_once(name)?;
        rest.split_whitespace().next()
    };
    let hex = |name: &str| u64::from_str_radix(field(name)?, 16).ok();
    Some(Item {
        tfd: field("tfd:")?.parse().ok()?,
        events: hex("events:")? as u32,
        data: hex("data:")?,
        pos: field("pos:")?.parse().ok()?,
        inode: hex("ino:")?,
        dev: hex("sdev:")? as u32,
        index: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;
    use std::os::fd::AsRawFd;

    fn add(epoll: &OwnedFd, target: &OwnedFd, events: u32, data: u64) {
        files::epoll_add_as(epoll.as_fd(), target.as_fd(), target.as_raw_fd(), events, data).unwrap();
    }

    /// What `epoll_wait` reports now, as data and events.
    fn ready(epoll: &OwnedFd) -> Vec<(u64, u32)> {
        let mut events = [rustix::event::epoll::Event {
            flags: rustix::event::epoll::EventFlags::empty(),
            data: rustix::event::epoll::EventData::new_u64(0),
        }; 8];
        let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = rustix::event::epoll::wait(epoll, &mut events[..], Some(&zero)).unwrap();
        let plain = |event: &rustix::event::epoll::Event| {
            let (data, flags) = (event.data, event.flags);
            (data.u64(), flags.bits())
        };
        let mut found: Vec<_> = events[..count].iter().map(plain).collect();
        found.sort_unstable();
        found
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    /// Does what the task would do: the calls of `install`, for files that have the numbers of `numbers`.
    fn install(dumped: &fixture::Dumped, id: u32, files: &[OwnedFd], numbers: &[i32]) {
        let entry = dumped.entries[&id].epfd.as_ref().unwrap();
        let mut program = Program::new();
        Epoll.install(&dumped.entries[&id], 99, &mut program).unwrap();
        assert_eq!(program.len(), entry.tfd.iter().filter(|item| item.id == 0).count());
        for item in entry.tfd.iter().filter(|item| item.id == 0) {
            let at = numbers.iter().position(|&number| number == item.tfd as i32).unwrap();
            files::epoll_add_as(
                files[id as usize - 1].as_fd(),
                files[at].as_fd(),
                item.tfd as i32,
                item.events,
                item.data,
            )
            .unwrap();
        }
    }

    #[test]
    fn items_with_their_numbers_are_added_by_the_task_with_events_and_data() {
        let _alone = fixture::alone();
        let epoll = rustix::event::epoll::create(CreateFlags::CLOEXEC).unwrap();
        let inner = rustix::event::epoll::create(CreateFlags::CLOEXEC).unwrap();
        let ((reader, writer), (exclusive, other)) = (pipe(), pipe());
        let (level, exclusive_flag) = (libc::EPOLLIN as u32, libc::EPOLLEXCLUSIVE as u32);
        add(&epoll, &reader, level | libc::EPOLLET as u32, u64::MAX - 1);
        add(&epoll, &exclusive, level | exclusive_flag, 2);
        add(&epoll, &writer, libc::EPOLLONESHOT as u32, 3);
        add(&inner, &reader, level, 5);
        add(&epoll, &inner, level, 4);
        let dumped = fixture::dump(&[&reader, &writer, &exclusive, &inner, &epoll, &other]);
        let numbers = [&reader, &writer, &exclusive, &inner, &epoll].map(AsRawFd::as_raw_fd);
        let files = dumped.restore();
        install(&dumped, 4, &files, &numbers);
        install(&dumped, 5, &files, &numbers);
        let sorted = |file: &OwnedFd| {
            let lines = fixture::info(file).1.into_iter();
            let cut = lines.map(|line| line.split("pos:").next().unwrap().trim().to_owned());
            cut.collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(sorted(&files[4]), sorted(&epoll));
        assert_eq!(ready(&files[4]), []);
        rustix::io::write(&files[1], b"x").unwrap();
        assert_eq!(ready(&files[4]), [(4, 1), (u64::MAX - 1, 1)]);
        assert_eq!(
            ready(&files[4]),
            [(4, 1)],
            "edges are told once, levels as long as they last"
        );
    }

    #[test]
    fn an_item_whose_descriptor_was_replaced_watches_the_same_file_under_the_same_number() {
        let _alone = fixture::alone();
        let epoll = rustix::event::epoll::create(CreateFlags::CLOEXEC).unwrap();
        let (reader, writer) = pipe();
        let (decoy, _decoy_writer) = pipe();
        let kept = reader.try_clone().unwrap();
        let number = reader.as_raw_fd();
        add(&epoll, &reader, libc::EPOLLIN as u32, 7);
        let mut reader = reader;
        rustix::io::dup3(&decoy, &mut reader, rustix::io::DupFlags::CLOEXEC).unwrap();
        // Now the number is the decoy's, and there are two items of that number.
        add(&epoll, &reader, libc::EPOLLIN as u32, 8);
        let dumped = fixture::dump(&[&kept, &writer, &reader, &epoll]);
        let items = &dumped.entries[&4].epfd.as_ref().unwrap().tfd;
        let by_data = |data: u64| items.iter().find(|item| item.data == data).unwrap();
        assert_eq!((by_data(7).id, by_data(7).tfd), (1, number as u32));
        assert_eq!(by_data(8).id, 0);
        let files = dumped.restore();
        assert_eq!(ready(&files[3]), []);
        rustix::io::write(&files[1], b"x").unwrap();
        assert_eq!(ready(&files[3]), [(7, 1)]);
    }

    #[test]
    fn an_item_whose_file_nobody_has_is_refused_by_name() {
        let _alone = fixture::alone();
        let epoll = rustix::event::epoll::create(CreateFlags::CLOEXEC).unwrap();
        let (reader, _writer) = pipe();
        let _kept_outside_of_the_dump = reader.try_clone().unwrap();
        add(&epoll, &reader, libc::EPOLLIN as u32, 7);
        let number = reader.as_raw_fd();
        drop(reader);
        let error = fixture::dump_with(&[&epoll], &crate::dump::Options::default())
            .err()
            .unwrap()
            .chain();
        assert!(error.contains(&format!("item {number} ")), "{error}");
        assert!(error.contains("EPOLL_CTL_DEL"), "{error}");
    }

    #[test]
    fn the_task_watches_its_own_descriptors() {
        let _alone = fixture::alone();
        let epoll = rustix::event::epoll::create(CreateFlags::CLOEXEC).unwrap();
        let (reader, writer) = pipe();
        let task = fixture::Task::start(&["sleep", "1000"], &epoll, &reader);
        let item = EventpollTfdEntry {
            tfd: 1,
            events: (libc::EPOLLIN | libc::EPOLLONESHOT) as u32,
            data: 0x1234_5678_9abc_def0,
            ..EventpollTfdEntry::default()
        };
        let entry = FileEntry {
            epfd: Some(EventpollFileEntry {
                tfd: vec![item],
                ..EventpollFileEntry::default()
            }),
            ..FileEntry::default()
        };
        let mut program = Program::new();
        Epoll.install(&entry, 0, &mut program).unwrap();
        task.run(&program);
        rustix::io::write(&writer, b"x").unwrap();
        assert_eq!(ready(&epoll), [(0x1234_5678_9abc_def0, 1)]);
        assert_eq!(ready(&epoll), []);
    }
}
