//! What the tests of all sockets need: dump descriptors of this process into memory, restore them from there.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use whimbrel_images::proto::FileEntry;
use whimbrel_images::store::MemStore;

use crate::error::Result;
use crate::kernel::sys;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile, Shared};
use crate::resource::{FILE_KINDS, FileKind};

/// Images of some files.
pub struct Image {
    pub store: MemStore,
    pub entries: BTreeMap<u32, FileEntry>,
}

pub fn everything() -> crate::dump::Options {
    crate::dump::Options {
        tcp_established: true,
        ..crate::dump::Options::default()
    }
}

pub fn look(fd: &impl AsRawFd) -> OpenFile {
    let pid = std::process::id() as i32;
    let pidfd = sys::pidfd_open(pid).unwrap();
    OpenFile::look(pid, fd.as_raw_fd(), pidfd.as_fd()).unwrap()
}

pub fn kind_of(file: &OpenFile) -> &'static dyn FileKind {
    *FILE_KINDS.iter().find(|kind| kind.recognises(file)).unwrap()
}

/// The files as a tree has them: numbered from 1.
pub fn tree(files: Vec<OpenFile>) -> BTreeMap<u32, OpenFile> {
    (1..).zip(files).collect()
}

pub fn try_dump(files: &BTreeMap<u32, OpenFile>, options: &crate::dump::Options) -> Result<Image> {
    let ids: HashMap<(i32, i32), u32> = files.iter().map(|(&id, file)| ((file.pid, file.fd), id)).collect();
    let store = MemStore::new();
    let mut entries = BTreeMap::new();
    let mut shared = Shared::default();
    let mut dump = FileDump::new(&store, options, &ids, files, &mut shared);
    for file in files.values() {
        kind_of(file).check(file, &dump)?;
    }
    for (&id, file) in files {
        entries.insert(id, kind_of(file).dump(file, id, &mut dump)?);
    }
    dump.close()?;
    Ok(Image { store, entries })
}

pub fn dump(files: &BTreeMap<u32, OpenFile>) -> Image {
    try_dump(files, &everything()).unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// What happens on the source when the tree lives elsewhere: files are abandoned and closed.
pub fn abandon(files: BTreeMap<u32, OpenFile>, originals: Vec<OwnedFd>) {
    for file in files.values() {
        kind_of(file).abandon(file).unwrap();
    }
    drop(originals);
    drop(files);
}

pub fn try_open(image: &Image) -> Result<FileRestore<'_>> {
    let options = Box::leak(Box::new(crate::restore::Options {
        root: "/".into(),
        skip_build_ids: false,
        skip_file_modes: false,
        ..Default::default()
    }));
    let mut restore = FileRestore::new(&image.store, options, &image.entries);
    fd::open_all(&mut restore, &|_| true)?;
    Ok(restore)
}

pub fn open(image: &Image) -> FileRestore<'_> {
    try_open(image).unwrap_or_else(|error| panic!("{}", error.chain()))
}

/// Lets the files go on; they are what the tree has then.
pub fn resume(mut restore: FileRestore<'_>) -> BTreeMap<u32, OwnedFd> {
    for entry in restore.entries.values() {
        let kind = fd::kind_of(entry).unwrap();
        kind.resume(entry, &mut restore)
            .unwrap_or_else(|error| panic!("{}", error.chain()));
    }
    restore.opened
}
