//! Where image files are kept: a directory, or memory when an image set travels over the network.
//!
//! A store knows names and bytes; what is in an image is the business of [`crate::entry`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Cursor, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

/// Name of the link in an image directory that leads to the earlier dump of a chain.
pub const PARENT_LINK: &str = "parent";

/// A set of image files.
///
/// Names are plain file names: a name that is empty, longer than 255 bytes, `.` or `..`, or that contains `/` or NUL
/// gives [`ErrorKind::InvalidInput`].
pub trait ImageStore: Send + Sync {
    /// Makes an empty file for writing; one of that name loses its contents. What was written is visible at once.
    ///
    /// # Errors
    /// For an invalid name, or when the file cannot be made.
    fn create(&self, name: &str) -> io::Result<Box<dyn WriteSeek + Send>>;

    /// Opens a file for reading.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none; else for an invalid name or when the file cannot be read.
    fn open(&self, name: &str) -> io::Result<Box<dyn ReadSeek + Send>>;

    /// Whether there is a file of that name.
    ///
    /// # Errors
    /// For an invalid name, or when the store cannot tell.
    fn exists(&self, name: &str) -> io::Result<bool>;

    /// The names of all files, sorted. Directories, links to directories and names that are not UTF-8 are left out.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Removes a file. Handles that are open stay usable.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none; else for an invalid name or when the file cannot be removed.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Gives a file another name; a file that has that name already is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none; else for an invalid name or when the file cannot be renamed.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Cuts a file off.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is none; else for an invalid name or when the file cannot be written.
    fn truncate(&self, name: &str, length: u64) -> io::Result<()>;
}

/// A file that can be read anywhere.
pub trait ReadSeek: Read + Seek {}
impl<T: Read + Seek> ReadSeek for T {}

/// A file that can be written anywhere.
pub trait WriteSeek: Write + Seek {}
impl<T: Write + Seek> WriteSeek for T {}

/// A directory of image files, held by a descriptor: renaming the directory does not matter.
///
/// Files are made with mode 0600, since memory holds secrets, and never through a symbolic link. Reading follows
/// links but accepts regular files only, so that a fifo in the directory cannot make a restore hang.
#[derive(Debug)]
pub struct DirStore {
    directory: OwnedFd,
    path: PathBuf,
}

impl DirStore {
    /// Opens an existing directory.
    ///
    /// # Errors
    /// When it does not exist, is no directory or may not be searched.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let directory = rustix::fs::open(path, DIRECTORY, Mode::empty())?;
        Ok(Self {
            directory,
            path: path.to_owned(),
        })
    }

    /// Opens a directory, making it with mode 0700 if it does not exist. Its own parent must exist.
    ///
    /// # Errors
    /// When it cannot be made or opened.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        match rustix::fs::mkdir(path.as_ref(), Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Self::open(path),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes a descriptor of a directory, as CRIU's RPC passes it; `path` is used in messages only.
    pub fn from_fd(directory: OwnedFd, path: impl Into<PathBuf>) -> Self {
        Self {
            directory,
            path: path.into(),
        }
    }

    /// The path that the directory was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The earlier dump of the chain, `None` when the directory has no `parent`.
    ///
    /// # Errors
    /// When there is a `parent` that cannot be opened, a dangling link for example.
    pub fn parent(&self) -> io::Result<Option<Self>> {
        match rustix::fs::statat(&self.directory, PARENT_LINK, AtFlags::SYMLINK_NOFOLLOW) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            other => other?,
        };
        let directory = rustix::fs::openat(&self.directory, PARENT_LINK, DIRECTORY, Mode::empty())?;
        Ok(Some(Self {
            directory,
            path: self.path.join(PARENT_LINK),
        }))
    }

    /// Makes `parent` a link to `target`, which is relative to this directory or absolute. Replaces an earlier link.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub fn set_parent(&self, target: impl AsRef<Path>) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.directory, PARENT_LINK, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(rustix::fs::symlinkat(target.as_ref(), &self.directory, PARENT_LINK)?)
    }

    /// Opens a file as a `File`, for positioned reads and for `preadv` in another process.
    ///
    /// # Errors
    /// As [`ImageStore::open`]; [`ErrorKind::InvalidData`] when it is not a regular file.
    pub fn open_file(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OFlags::RDONLY)
    }

    /// Opens an existing file for reading and writing.
    ///
    /// # Errors
    /// As [`DirStore::open_file`].
    pub fn open_file_writable(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OFlags::RDWR | OFlags::NOFOLLOW)
    }

    /// Waits until all that was written to the directory's file system is on the disk.
    ///
    /// # Errors
    /// When writing back fails.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::syncfs(&self.directory)?)
    }

    /// Device and inode of the directory: the same for two paths to one directory.
    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::fstat(&self.directory)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    fn open_with(&self, name: &str, flags: OFlags) -> io::Result<File> {
        check_name(name)?;
        // Opening a fifo for reading blocks until a writer comes, unless asked not to: fifo(7).
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidData, "not a regular file"));
        }
        Ok(file)
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl AsFd for DirStore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl ImageStore for DirStore {
    fn create(&self, name: &str) -> io::Result<Box<dyn WriteSeek + Send>> {
        check_name(name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = File::from(rustix::fs::openat(&self.directory, name, flags, mode)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidData, "not a regular file"));
        }
        // The file may be an old one that others can read.
        rustix::fs::fchmod(&file, mode)?;
        file.set_len(0)?;
        Ok(Box::new(file))
    }

    fn truncate(&self, name: &str, length: u64) -> io::Result<()> {
        check_name(name)?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::openat(&self.directory, name, flags, Mode::empty())?);
        file.set_len(length)
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadSeek + Send>> {
        Ok(Box::new(self.open_file(name)?))
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        check_name(name)?;
        match rustix::fs::statat(&self.directory, name, AtFlags::empty()) {
            Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.directory)? {
            if let Ok(name) = entry?.file_name().to_str() {
                // A file may vanish between the two calls; it is then simply not listed.
                if check_name(name).is_ok() && self.exists(name)? {
                    names.push(name.to_owned());
                }
            }
        }
        names.sort();
        Ok(names)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        Ok(rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        Ok(rustix::fs::renameat(&self.directory, from, &self.directory, to)?)
    }
}

/// Image files in memory. Clones share the files.
#[derive(Clone, Debug, Default)]
pub struct MemStore {
    files: Arc<Mutex<BTreeMap<String, Blob>>>,
}

/// A file's bytes, shared by its name and its open handles as an inode is.
type Blob = Arc<Mutex<Vec<u8>>>;

impl MemStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a whole file into the store; one of that name is replaced.
    ///
    /// # Errors
    /// For an invalid name.
    pub fn insert(&self, name: &str, bytes: Vec<u8>) -> io::Result<()> {
        check_name(name)?;
        lock(&self.files).insert(name.to_owned(), Arc::new(Mutex::new(bytes)));
        Ok(())
    }

    /// Takes a whole file out of the store, `None` when there is none of that name.
    pub fn take(&self, name: &str) -> Option<Vec<u8>> {
        let blob = lock(&self.files).remove(name)?;
        Some(contents(blob))
    }

    /// Takes all files out of the store.
    pub fn take_all(&self) -> BTreeMap<String, Vec<u8>> {
        let files = std::mem::take(&mut *lock(&self.files));
        files.into_iter().map(|(name, blob)| (name, contents(blob))).collect()
    }

    /// Bytes in all files together.
    pub fn size(&self) -> u64 {
        lock(&self.files).values().map(|blob| lock(blob).len() as u64).sum()
    }

    fn blob(&self, name: &str) -> io::Result<Blob> {
        check_name(name)?;
        lock(&self.files)
            .get(name)
            .cloned()
            .ok_or_else(|| ErrorKind::NotFound.into())
    }
}

impl ImageStore for MemStore {
    fn create(&self, name: &str) -> io::Result<Box<dyn WriteSeek + Send>> {
        check_name(name)?;
        let blob = lock(&self.files).entry(name.to_owned()).or_default().clone();
        lock(&blob).clear();
        Ok(Box::new(BlobHandle { blob, position: 0 }))
    }

    fn truncate(&self, name: &str, length: u64) -> io::Result<()> {
        check_name(name)?;
        let blob = self.blob(name)?;
        lock(&blob).resize(usize::try_from(length).map_err(|_| ErrorKind::InvalidInput)?, 0);
        Ok(())
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ReadSeek + Send>> {
        Ok(Box::new(BlobHandle {
            blob: self.blob(name)?,
            position: 0,
        }))
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        check_name(name)?;
        Ok(lock(&self.files).contains_key(name))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(lock(&self.files).keys().cloned().collect())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        check_name(name)?;
        lock(&self.files)
            .remove(name)
            .map(drop)
            .ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(from)?;
        check_name(to)?;
        let mut files = lock(&self.files);
        let blob = files.remove(from).ok_or(ErrorKind::NotFound)?;
        files.insert(to.to_owned(), blob);
        Ok(())
    }
}

struct BlobHandle {
    blob: Blob,
    position: u64,
}

impl Read for BlobHandle {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let blob = lock(&self.blob);
        let mut cursor = Cursor::new(blob.as_slice());
        cursor.set_position(self.position);
        let count = cursor.read(buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for BlobHandle {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut blob = lock(&self.blob);
        let mut cursor = Cursor::new(&mut *blob);
        cursor.set_position(self.position);
        let count = cursor.write(bytes)?;
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for BlobHandle {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
            SeekFrom::End(distance) => (lock(&self.blob).len() as u64).checked_add_signed(distance),
        };
        self.position = target.ok_or(ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// A panic elsewhere leaves the bytes as they were written so far, like a crash leaves a file.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn contents(blob: Blob) -> Vec<u8> {
    match Arc::try_unwrap(blob) {
        Ok(mutex) => mutex.into_inner().unwrap_or_else(PoisonError::into_inner),
        Err(shared) => lock(&shared).clone(),
    }
}

fn check_name(name: &str) -> io::Result<()> {
    let valid = !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\0']);
    if valid {
        Ok(())
    } else {
        Err(io::Error::new(
            ErrorKind::InvalidInput,
            format!("invalid image name {name:?}"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn behaves_as_a_store(store: &dyn ImageStore) {
        assert_eq!(store.list().unwrap(), Vec::<String>::new());
        assert_eq!(store.open("a").err().unwrap().kind(), ErrorKind::NotFound);
        assert_eq!(store.remove("a").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(store.rename("a", "b").unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!store.exists("a").unwrap());

        let mut writer = store.create("b.img").unwrap();
        writer.write_all(b"hello").unwrap();
        writer.seek(SeekFrom::Start(1)).unwrap();
        writer.write_all(b"u").unwrap();
        writer.seek(SeekFrom::End(1)).unwrap();
        writer.write_all(b"!").unwrap();
        writer.flush().unwrap();
        let mut reader = store.open("b.img").unwrap();
        assert_eq!(text(&mut *reader), "hullo\0!");
        reader.seek(SeekFrom::End(-1)).unwrap();
        assert_eq!(text(&mut *reader), "!");
        assert!(reader.seek(SeekFrom::Current(-100)).is_err());

        store.create("a.img").unwrap().write_all(b"a").unwrap();
        assert_eq!(store.list().unwrap(), ["a.img", "b.img"]);
        store.rename("a.img", "b.img").unwrap();
        assert_eq!(store.list().unwrap(), ["b.img"]);
        assert_eq!(text(&mut *store.open("b.img").unwrap()), "a");
        reader.seek(SeekFrom::Start(0)).unwrap();
        assert_eq!(text(&mut *reader), "hullo\0!", "an open handle outlives the name");

        store.create("b.img").unwrap();
        assert_eq!(text(&mut *store.open("b.img").unwrap()), "", "create truncates");
        store.remove("b.img").unwrap();
        assert!(!store.exists("b.img").unwrap());

        for name in ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b", &"x".repeat(256)] {
            let kinds = [
                store.create(name).err().unwrap().kind(),
                store.open(name).err().unwrap().kind(),
                store.exists(name).unwrap_err().kind(),
                store.remove(name).unwrap_err().kind(),
                store.rename(name, "ok").unwrap_err().kind(),
                store.rename("ok", name).unwrap_err().kind(),
            ];
            assert_eq!(kinds, [ErrorKind::InvalidInput; 6], "{name:?}");
        }
    }

    fn text(reader: &mut dyn ReadSeek) -> String {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn both_stores_behave_the_same() {
        behaves_as_a_store(&MemStore::new());
        let directory = tempfile::tempdir().unwrap();
        behaves_as_a_store(&DirStore::open(directory.path()).unwrap());
    }

    #[test]
    fn images_are_private_even_over_an_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages-1.img");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let store = DirStore::open(directory.path()).unwrap();
        store.create("pages-1.img").unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.permissions().mode() & 0o7777, metadata.len()), (0o600, 0));
    }

    #[test]
    fn nothing_is_written_through_a_link_and_no_fifo_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        let images = directory.path().join("images");
        let store = DirStore::create(&images).unwrap();
        symlink(&victim, images.join("core-1.img")).unwrap();
        assert!(store.create("core-1.img").is_err());
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");

        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(&store, "mm-1.img", FileType::Fifo, mode, 0).unwrap();
        assert_eq!(store.open("mm-1.img").err().unwrap().kind(), ErrorKind::InvalidData);
        assert!(store.create("mm-1.img").is_err());
        assert!(!store.exists("mm-1.img").unwrap());
    }

    #[test]
    fn the_parent_is_found_through_its_link() {
        let directory = tempfile::tempdir().unwrap();
        let first = DirStore::create(directory.path().join("1")).unwrap();
        let second = DirStore::create(directory.path().join("2")).unwrap();
        assert!(second.parent().unwrap().is_none());
        second.set_parent("../missing").unwrap();
        assert_eq!(second.parent().unwrap_err().kind(), ErrorKind::NotFound);
        second.set_parent("../1").unwrap();
        assert_eq!(
            second.parent().unwrap().unwrap().identity().unwrap(),
            first.identity().unwrap()
        );
        assert_eq!(second.list().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn whole_blobs_go_in_and_out_of_memory() {
        let store = MemStore::new();
        store.insert("a", vec![1, 2]).unwrap();
        assert!(store.insert("a/b", vec![]).is_err());
        let _open = store.open("a").unwrap();
        assert_eq!(store.size(), 2);
        assert_eq!(store.take("a"), Some(vec![1, 2]));
        assert_eq!(store.take("a"), None);
        store.insert("b", vec![3]).unwrap();
        assert_eq!(store.take_all(), BTreeMap::from([("b".to_owned(), vec![3])]));
    }
}
