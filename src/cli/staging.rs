//! A new image set beside an old one: written aside, and put in place as a whole.
//!
//! Files are made in a directory of their own inside the images directory. When all are there, images of an older dump
//! go away and the new ones take their place; when the dump fails, the older one is as it was.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, renameat, unlinkat};

use whimbrel::error::{Context, Error, Result};
use whimbrel_images::magic;
use whimbrel_images::store::{DirStore, ImageStore, PARENT_LINK};

/// A directory that becomes the new image set, or goes away.
pub struct Staging {
    target: DirStore,
    store: Arc<DirStore>,
    name: String,
    stage: Stage,
}

/// How far it got.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    /// Files are in the directory aside.
    Aside,
    /// These files are in place, and not yet wanted for good.
    Placed(Vec<String>),
    /// All is done.
    Kept,
}

impl Staging {
    /// Makes the directory aside.
    ///
    /// # Errors
    /// When the images directory cannot be written.
    pub fn new(target: DirStore) -> Result<Staging> {
        let failed = || Error::new("write to the images directory").object(target.path().display().to_string());
        let name = format!(".new-{}", std::process::id());
        rustix::fs::mkdirat(target.as_fd(), &name, Mode::RWXU)
            .map_err(std::io::Error::from)
            .with(failed)?;
        let store = DirStore::open(target.path().join(&name)).with(failed)?;
        Ok(Staging {
            target,
            store: Arc::new(store),
            name,
            stage: Stage::Aside,
        })
    }

    /// Where images are written to.
    pub fn store(&self) -> Arc<DirStore> {
        self.store.clone()
    }

    /// What removes the directory from another thread, when this process is about to end.
    pub fn clean_up(&self) -> impl FnOnce() + Send + use<> {
        let path = self.target.path().join(&self.name);
        move || drop(std::fs::remove_dir_all(path))
    }

    /// As [`Staging::clean_up`], for a set that was put in place: removes it.
    pub fn take_back(&self) -> impl FnOnce() + Send + use<> {
        let names = match &self.stage {
            Stage::Placed(names) => names.clone(),
            _ => Vec::new(),
        };
        let directory = self.target.path().to_owned();
        move || {
            for name in names {
                let _ = std::fs::remove_file(directory.join(name));
            }
        }
    }

    /// Links the new set to an earlier one; `parent` is relative to the images directory.
    ///
    /// # Errors
    /// When there is no image set, or it is the images directory itself.
    pub fn set_parent(&self, parent: &Path) -> Result<DirStore> {
        let path = self.target.path().join(parent);
        let failed = || {
            Error::new("open the previous images")
                .object(path.display().to_string())
                .hint("--prev-images-dir is relative to the images directory (-D)")
        };
        let directory = DirStore::open(&path).with(failed)?;
        let identity = |store: &DirStore| rustix::fs::fstat(store.as_fd()).map(|stat| (stat.st_dev, stat.st_ino));
        if identity(&directory).map_err(std::io::Error::from).with(failed)?
            == identity(&self.target).map_err(std::io::Error::from).with(failed)?
        {
            return Err(failed().because("it is the directory that is to be written"));
        }
        // The link is read from the images directory in the end.
        self.store.set_parent(parent).with(failed)?;
        Ok(directory)
    }

    /// Puts the new set in the place of the old one. Unless [`Staging::keep`] follows, it is removed again.
    ///
    /// # Errors
    /// When files cannot be renamed. The inventory, without which nothing is restored, comes last.
    pub fn commit(&mut self) -> Result<()> {
        self.place(&|name| magic::by_name(name).is_some() && !name.starts_with("stats-"))
    }

    /// As [`Staging::commit`], for a set that has memory only: of what is there, only memory is replaced.
    ///
    /// # Errors
    /// As [`Staging::commit`].
    pub fn commit_memory(&mut self) -> Result<()> {
        self.place(&|name| name.starts_with("pagemap-") || name.starts_with("pages-"))
    }

    fn place(&mut self, replaced: &dyn Fn(&str) -> bool) -> Result<()> {
        let failed = || Error::new("put the images in place").object(self.target.path().display().to_string());
        let names = self.store.list().with(failed)?;
        // The old inventory goes first: no mixture of two dumps must ever look like one.
        let mut old: Vec<String> = self.target.list().with(failed)?;
        old.retain(|name| replaced(name));
        old.sort_by_key(|name| name != INVENTORY);
        for name in old {
            self.target.remove(&name).with(failed)?;
        }
        remove_link(&self.target).with(failed)?;
        let parent = has_link(&self.store).with(failed)?;
        let mut placed = names.clone();
        placed.extend(parent.then(|| PARENT_LINK.to_owned()));
        self.stage = Stage::Placed(placed);
        let (from, to) = (self.store.as_fd(), self.target.as_fd());
        if parent {
            renameat(from, PARENT_LINK, to, PARENT_LINK)
                .map_err(std::io::Error::from)
                .with(failed)?;
        }
        for name in names.iter().filter(|name| *name != INVENTORY) {
            renameat(from, name, to, name)
                .map_err(std::io::Error::from)
                .with(failed)?;
        }
        if names.iter().any(|name| name == INVENTORY) {
            renameat(from, INVENTORY, to, INVENTORY)
                .map_err(std::io::Error::from)
                .with(failed)?;
        }
        unlinkat(to, &self.name, AtFlags::REMOVEDIR)
            .map_err(std::io::Error::from)
            .with(failed)
    }

    /// The new set stays.
    pub fn keep(mut self) {
        self.stage = Stage::Kept;
    }
}

const INVENTORY: &str = "inventory.img";

fn has_link(store: &DirStore) -> std::io::Result<bool> {
    match rustix::fs::statat(store.as_fd(), PARENT_LINK, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Symlink),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn remove_link(store: &DirStore) -> std::io::Result<()> {
    if has_link(store)? {
        unlinkat(store.as_fd(), PARENT_LINK, AtFlags::empty())?;
    }
    Ok(())
}

impl Drop for Staging {
    fn drop(&mut self) {
        match &self.stage {
            Stage::Kept => return,
            Stage::Placed(names) => {
                for name in names {
                    let _ = unlinkat(self.target.as_fd(), name, AtFlags::empty());
                }
            }
            Stage::Aside => {}
        }
        // Only what this process has made: everything in a directory of its own.
        for entry in rustix::fs::Dir::read_from(self.store.as_fd())
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = OsStr::from_encoded(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                let _ = unlinkat(self.store.as_fd(), name, AtFlags::empty());
            }
        }
        let _ = unlinkat(self.target.as_fd(), &self.name, AtFlags::REMOVEDIR);
    }
}

/// A name as the kernel gives it.
trait FromEncoded {
    fn from_encoded(bytes: &[u8]) -> &OsStr;
}

impl FromEncoded for OsStr {
    fn from_encoded(bytes: &[u8]) -> &OsStr {
        std::os::unix::ffi::OsStrExt::from_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_set_takes_the_place_of_the_old_one_as_a_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for name in [
            "inventory.img",
            "core-1.img",
            "core-2.img",
            "pages-1.img",
            "notes",
            "dump.log",
        ] {
            std::fs::write(path.join(name), "old").unwrap();
        }
        std::os::unix::fs::symlink("nowhere", path.join("parent")).unwrap();
        let staging = Staging::new(DirStore::open(path).unwrap()).unwrap();
        std::io::Write::write_all(&mut staging.store().create("core-2.img").unwrap(), b"new").unwrap();
        drop(staging);
        assert_eq!(std::fs::read(path.join("core-2.img")).unwrap(), b"old");
        assert_eq!(names(path).len(), 7);

        let mut staging = Staging::new(DirStore::open(path).unwrap()).unwrap();
        for name in ["inventory.img", "core-2.img"] {
            std::io::Write::write_all(&mut staging.store().create(name).unwrap(), b"new").unwrap();
        }
        staging.commit().unwrap();
        staging.keep();
        assert_eq!(names(path), ["core-2.img", "dump.log", "inventory.img", "notes"]);
        assert_eq!(std::fs::read(path.join("core-2.img")).unwrap(), b"new");

        // A set that was put in place and is not wanted after all goes away again.
        let mut staging = Staging::new(DirStore::open(path).unwrap()).unwrap();
        std::io::Write::write_all(&mut staging.store().create("inventory.img").unwrap(), b"new").unwrap();
        staging.commit().unwrap();
        drop(staging);
        assert_eq!(names(path), ["dump.log", "notes"]);
    }

    #[test]
    fn a_set_cannot_be_its_own_parent() {
        let directory = tempfile::tempdir().unwrap();
        let staging = Staging::new(DirStore::open(directory.path()).unwrap()).unwrap();
        assert!(staging.set_parent(Path::new(".")).is_err());
        assert!(staging.set_parent(Path::new("missing")).is_err());
        drop(staging);
        assert!(names(directory.path()).is_empty());
    }
}
