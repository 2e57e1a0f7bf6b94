//! For the tests of this family: carries descriptors of the test's own process through images and back.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use whimbrel_images::proto::FileEntry;
use whimbrel_images::store::MemStore;

use super::{FileDump, FileRestore, OpenFile, Shared, kind_of, open_all};
use crate::error::{Error, Result};
use crate::kernel::sys;
use crate::procfs;
use crate::remote::{Gadgets, Program, StubProcess, tracee};
use crate::resource::{FILE_KINDS, FileKind};

/// An image set of files, and what it was made from.
pub struct Dumped {
    pub store: MemStore,
    pub entries: BTreeMap<u32, FileEntry>,
    pub ids: HashMap<(i32, i32), u32>,
    pub options: crate::restore::Options,
}

/// Our own id.
pub fn own_pid() -> i32 {
    std::process::id() as i32
}

fn kind_for(file: &OpenFile) -> Result<&'static dyn FileKind> {
    let mut kinds = FILE_KINDS.iter().copied();
    kinds
        .find(|kind| kind.recognises(file))
        .ok_or_else(|| Error::new("carry a file").because("no kind takes it"))
}

/// Dumps descriptors of this process, ids from 1 in their order, and checks that they are what kinds promise.
pub fn dump_with(files: &[&dyn AsFd], options: &crate::dump::Options) -> Result<Dumped> {
    let (store, own) = (MemStore::new(), sys::pidfd_open(own_pid()).unwrap());
    let (mut ids, mut open) = (HashMap::new(), BTreeMap::new());
    let mut segments = crate::resource::mem::shared::Segments::default();
    for (file, id) in files.iter().zip(1..) {
        let fd = file.as_fd().as_raw_fd();
        let file = OpenFile::look(own_pid(), fd, own.as_fd())?;
        kind_for(&file)?.share(&file, &mut segments)?;
        ids.insert((own_pid(), fd), id);
        open.insert(id, file);
    }
    let mut shared = Shared {
        segments: segments.ids(),
        pids: HashMap::from([(own_pid(), own_pid())]),
        next_id: open.len() as u32 + 1,
        ..Shared::default()
    };
    let mut dump = FileDump::new(&store, options, &ids, &open, &mut shared);
    for file in open.values() {
        kind_for(file)?.check(file, &dump)?;
    }
    super::locks::check(&dump)?;
    let mut entries = BTreeMap::new();
    for (&id, file) in &open {
        entries.insert(id, kind_for(file)?.dump(file, id, &mut dump)?);
    }
    super::locks::dump(&mut dump)?;
    dump.close()?;
    entries.append(&mut shared.extra);
    Ok(Dumped {
        store,
        entries,
        ids,
        options: crate::restore::Options::default(),
    })
}

/// [`dump_with`] default options, which must succeed.
pub fn dump(files: &[&dyn AsFd]) -> Dumped {
    dump_with(files, &crate::dump::Options::default()).unwrap_or_else(|error| panic!("{}", error.chain()))
}

impl Dumped {
    /// The context in which the files are restored.
    pub fn context(&self) -> FileRestore<'_> {
        FileRestore::new(&self.store, &self.options, &self.entries)
    }

    /// Opens, finishes and lets go all files.
    pub fn try_restore(&self) -> Result<BTreeMap<u32, OwnedFd>> {
        let mut restore = self.context();
        open_all(&mut restore, &|_| true)?;
        for entry in self.entries.values() {
            kind_of(entry)?.resume(entry, &mut restore)?;
        }
        Ok(restore.opened)
    }

    /// [`Dumped::try_restore`], which must succeed; the files in the order of their ids.
    pub fn restore(&self) -> Vec<OwnedFd> {
        let mut last = self.try_restore();
        // A child that another test is starting may have a duplicate of what this test closed, until it executes.
        for _ in 0..50 {
            if last.is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            last = self.try_restore();
        }
        let files = last.unwrap_or_else(|error| panic!("{}", error.chain()));
        files.into_values().collect()
    }
}

/// Carries one file there and back.
pub fn carry(file: &dyn AsFd) -> OwnedFd {
    dump(&[file]).restore().remove(0)
}

/// For tests that need what they closed to be closed, or that duplicate the descriptor table: one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Waits until something is so.
pub fn eventually(mut so: impl FnMut() -> bool) -> bool {
    (0..100).any(|_| so() || (std::thread::sleep(Duration::from_millis(10)), false).1)
}

/// A process with two given descriptors, 0 and 1, in which programs run.
pub struct Task(Child);

impl Task {
    /// Starts a command.
    pub fn start(command: &[&str], input: &OwnedFd, output: &OwnedFd) -> Task {
        let child = Command::new(command[0])
            .args(&command[1..])
            .stdin(input.try_clone().unwrap())
            .stdout(output.try_clone().unwrap())
            .spawn()
            .unwrap();
        let task = Task(child);
        assert!(eventually(
            || procfs::read(task.pid(), "comm").is_ok_and(|name| name == b"sleep\n")
        ));
        std::thread::sleep(Duration::from_millis(20));
        task
    }

    /// Its id.
    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Runs a program in it, which must succeed.
    pub fn run(&self, program: &Program) {
        let run = || -> Result<()> {
            let maps = procfs::maps::parse(&procfs::read(self.pid(), "maps")?)?;
            let gadgets = Gadgets::find(self.pid(), &maps, &mut Default::default())?;
            let stopped = tracee::seize(self.pid(), false)?.stop()?;
            let (thread, _) = stopped.map_err(|status| Error::new("stop").because(format!("it ended: {status}")))?;
            let (mut stub, mut visitor) = StubProcess::inject(thread, &maps, gadgets)?;
            let outcome = stub.run(&mut visitor, program).map(drop);
            stub.remove(visitor)?.detach(0)?;
            outcome
        };
        run().unwrap_or_else(|error| panic!("{}", error.chain()));
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The flags and the lines of its kind in fdinfo.
pub fn info(file: &dyn AsFd) -> (u32, Vec<String>) {
    let path = format!("fdinfo/{}", file.as_fd().as_raw_fd());
    let info = procfs::fdinfo::parse(&procfs::read(own_pid(), &path).unwrap());
    (info.flags & !(libc::O_CLOEXEC as u32), info.lines)
}
