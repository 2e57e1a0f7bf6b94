//! For the tests of this family: carries descriptors of the test's own process through images and back.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use whimbrel_images::proto::FileEntry;
use whimbrel_images::store::MemStore;

use super::{FileDump, FileRestore, OpenFile, Shared, kind_of, open_all};
use crate::error::Result;
use crate::kernel::sys;
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
        .ok_or_else(|| crate::error::Error::new("carry a file").because("no kind takes it"))
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
    //LOCKS     super::locks::check(&dump)?;
    let mut entries = BTreeMap::new();
    for (&id, file) in &open {
        entries.insert(id, kind_for(file)?.dump(file, id, &mut dump)?);
    }
    //LOCKS     super::locks::dump(&mut dump)?;
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
        let files = self.try_restore().unwrap_or_else(|error| panic!("{}", error.chain()));
        files.into_values().collect()
    }
}

/// Carries one file there and back.
pub fn carry(file: &dyn AsFd) -> OwnedFd {
    dump(&[file]).restore().remove(0)
}

/// The flags and the lines of its kind in fdinfo.
pub fn info(file: &dyn AsFd) -> (u32, Vec<String>) {
    let path = format!("fdinfo/{}", file.as_fd().as_raw_fd());
    let info = crate::procfs::fdinfo::parse(&crate::procfs::read(own_pid(), &path).unwrap());
    (info.flags & !(libc::O_CLOEXEC as u32), info.lines)
}
