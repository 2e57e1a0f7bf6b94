//! Reading pages from an image directory and the chain of its parents.
//!
//! A dump may be an increment to an earlier one, to which the link `parent` in its directory leads. [`PageStore`] reads
//! all pagemaps of the chain once, resolves what is in the parent, and from then on knows for each page in which file
//! it is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{ImageError, ImageErrorKind};
use crate::page::{MemoryObject, PAGE_SIZE, PageRun, PageSource, PageState};
use crate::pagemap::{Pagemap, PagemapFlags, check_run, object_of_name, pagemap_error, pages_name};
use crate::proto::TrackEntry;
use crate::store::{DirStore, ImageStore, PARENT_LINK};

/// Most directories that a chain may have. Each is held open.
pub const MAX_CHAIN: usize = 256;

/// The pages of an image directory and its parents.
///
/// Of a page that the pagemap of its object does not cover, [`PageSource::read_pages`] says that it is
/// [`PageState::Zero`]: it was zero or not populated. (In a private file mapping, not populated means: as in the file.)
/// It says [`PageState::Unknown`] of pages of an object without pagemap, of pages left to be fetched on demand, and of
/// pages that should be in the parent and are not.
pub struct PageStore {
    levels: Vec<DirStore>,
    objects: BTreeMap<MemoryObject, Vec<ResolvedRun>>,
    /// What the newest dump has left in its tasks.
    tracks: BTreeMap<MemoryObject, TrackEntry>,
    /// Pages files that have been used, by level and number.
    files: Mutex<HashMap<(usize, u32), Arc<File>>>,
}

/// A run of pages and where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolvedRun {
    /// The pages.
    pub run: PageRun,
    /// Where they are.
    pub location: Location,
    /// Whether the dump says that they may be restored on demand.
    pub lazy: bool,
}

/// Where a run of pages is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a pages file.
    File {
        /// Which directory: 0 for the one that was opened, 1 for its parent and so on.
        level: usize,
        /// Number of the pages file.
        pages_id: u32,
        /// Offset of the first page in the file, bytes.
        offset: u64,
    },
    /// In none: to be fetched on demand, or missing from the parent.
    Missing,
}

/// A run of pages in a file, ready for `preadv`.
#[derive(Clone, Debug)]
pub struct Extent {
    /// The pages.
    pub run: PageRun,
    /// The pages file. Extents of one file share it.
    pub file: Arc<File>,
    /// Offset of the first page in the file, bytes.
    pub offset: u64,
    /// Whether the dump says that they may be restored on demand.
    pub lazy: bool,
}

impl PageStore {
    /// Opens the image directory at `path` and its parents, and reads all pagemaps.
    ///
    /// # Errors
    /// As [`PageStore::new`], and when the directory cannot be opened.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let directory = DirStore::open(path);
        Self::new(directory.map_err(|error| io_error(&path.display().to_string(), error))?)
    }

    /// Opens the parents of an image directory, and reads all pagemaps.
    ///
    /// # Errors
    /// When a parent cannot be opened, the chain leads back to itself or has more than [`MAX_CHAIN`] directories; when
    /// a pagemap is damaged, or its pages file is missing or too short.
    pub fn new(directory: DirStore) -> Result<Self, ImageError> {
        let levels = open_chain(directory)?;
        let (mut objects, mut tracks) = (BTreeMap::new(), BTreeMap::new());
        for (level, directory) in levels.iter().enumerate().rev() {
            let pagemaps = read_pagemaps(directory).map_err(|error| at_level(level, error))?;
            let left = pagemaps
                .iter()
                .filter_map(|(&object, pagemap)| Some((object, pagemap.track.clone()?)));
            tracks = left.collect();
            objects = pagemaps
                .into_iter()
                .map(|(object, pagemap)| {
                    (
                        object,
                        resolve(level, &pagemap, objects.get(&object).map(Vec::as_slice)),
                    )
                })
                .collect();
        }
        Ok(Self {
            levels,
            objects,
            tracks,
            files: Mutex::default(),
        })
    }

    /// The objects that the directory has a pagemap for.
    pub fn objects(&self) -> impl Iterator<Item = MemoryObject> + '_ {
        self.objects.keys().copied()
    }

    /// What the newest dump left in its tasks for the next one to find, by object.
    pub fn tracks(&self) -> impl Iterator<Item = (MemoryObject, &TrackEntry)> {
        self.tracks.iter().map(|(&object, track)| (object, track))
    }

    /// All runs of `object` in ascending order; `None` when it has no pagemap.
    pub fn runs(&self, object: MemoryObject) -> Option<&[ResolvedRun]> {
        self.objects.get(&object).map(Vec::as_slice)
    }

    /// The runs of `object` that are in files, in ascending order; empty when it has no pagemap.
    ///
    /// # Errors
    /// When a pages file cannot be opened.
    pub fn extents(&self, object: MemoryObject) -> Result<Vec<Extent>, ImageError> {
        let mut extents = Vec::new();
        for resolved in self.runs(object).unwrap_or_default() {
            if let Location::File {
                level,
                pages_id,
                offset,
            } = resolved.location
            {
                let file = self.file(level, pages_id)?;
                extents.push(Extent {
                    run: resolved.run,
                    file,
                    offset,
                    lazy: resolved.lazy,
                });
            }
        }
        Ok(extents)
    }

    /// Number of directories in the chain, at least 1.
    pub fn depth(&self) -> usize {
        self.levels.len()
    }

    /// The parts of `run` that the pagemap covers, in ascending order; `None` when the object has no pagemap.
    pub(crate) fn resolved_in(&self, object: MemoryObject, run: PageRun) -> Option<Vec<ResolvedRun>> {
        Some(clip(self.runs(object)?, run).collect())
    }

    fn file(&self, level: usize, pages_id: u32) -> Result<Arc<File>, ImageError> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(&(level, pages_id)) {
            return Ok(file.clone());
        }
        let name = pages_name(pages_id);
        let file = self.levels[level]
            .open_file(&name)
            .map_err(|error| at_level(level, io_error(&name, error)))?;
        let file = Arc::new(file);
        files.insert((level, pages_id), file.clone());
        Ok(file)
    }
}

impl PageSource for PageStore {
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> io::Result<Vec<PageState>> {
        if let Err(what) = check_run(run) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the run at {:#x} {what}", run.start),
            ));
        }
        if buffer.len() as u64 != run.bytes() {
            let what = format!("a buffer of {} bytes for {} pages", buffer.len(), run.pages);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let count = buffer.len() / PAGE_SIZE;
        let Some(runs) = self.runs(object) else {
            return Ok(vec![PageState::Unknown; count]);
        };
        let mut states = vec![PageState::Zero; count];
        let mut done = 0;
        for part in clip(runs, run) {
            let start = (part.run.start - run.start) as usize;
            let end = start + part.run.bytes() as usize;
            buffer[done..start].fill(0);
            done = end;
            let state = match part.location {
                Location::Missing => PageState::Unknown,
                Location::File {
                    level,
                    pages_id,
                    offset,
                } => {
                    let read = self
                        .file(level, pages_id)?
                        .read_exact_at(&mut buffer[start..end], offset);
                    read.map_err(|error| {
                        let error = ImageError::new(pages_name(pages_id), offset, ImageErrorKind::Io(error));
                        at_level(level, error)
                    })?;
                    PageState::Data
                }
            };
            states[start / PAGE_SIZE..end / PAGE_SIZE].fill(state);
        }
        buffer[done..].fill(0);
        Ok(states)
    }
}

/// The directory and its parents, newest first.
pub(crate) fn open_chain(directory: DirStore) -> Result<Vec<DirStore>, ImageError> {
    let mut levels = vec![];
    let mut seen = HashSet::new();
    let mut next = Some(directory);
    while let Some(directory) = next {
        let level = levels.len();
        // The name of the link that led here; the directory itself has none.
        let name = if level == 0 {
            directory.path().display().to_string()
        } else {
            PARENT_LINK.to_owned()
        };
        let wrong = |kind| at_level(level.saturating_sub(1), ImageError::new(&name, 0, kind));
        if level == MAX_CHAIN {
            return Err(wrong(ImageErrorKind::ParentChain(format!(
                "more than {MAX_CHAIN} directories in a chain"
            ))));
        }
        let identity = directory.identity().map_err(|error| wrong(ImageErrorKind::Io(error)))?;
        if !seen.insert(identity) {
            return Err(wrong(ImageErrorKind::ParentChain(
                "the chain of parents leads back to itself".into(),
            )));
        }
        next = directory
            .parent()
            .map_err(|error| at_level(level, io_error(PARENT_LINK, error)))?;
        levels.push(directory);
    }
    Ok(levels)
}

/// All pagemaps of a directory, checked against their pages files.
pub(crate) fn read_pagemaps(directory: &DirStore) -> Result<BTreeMap<MemoryObject, Pagemap>, ImageError> {
    let names = directory
        .list()
        .map_err(|error| io_error(&directory.path().display().to_string(), error))?;
    let mut pagemaps = BTreeMap::new();
    let mut owners = HashMap::new();
    for name in names {
        let Some(object) = object_of_name(&name)? else { continue };
        let pagemap = Pagemap::read(directory, object)?;
        if let Some(other) = owners.insert(pagemap.pages_id, name.clone()) {
            let what = format!("{} is claimed by {other} too", pages_name(pagemap.pages_id));
            return Err(ImageError::new(name, 0, pagemap_error(what)));
        }
        check_pages_file(directory, &pagemap)?;
        pagemaps.insert(object, pagemap);
    }
    Ok(pagemaps)
}

fn check_pages_file(directory: &DirStore, pagemap: &Pagemap) -> Result<(), ImageError> {
    let wanted = pagemap.stored_bytes();
    if wanted == 0 {
        return Ok(());
    }
    let name = pages_name(pagemap.pages_id);
    let available = directory.open_file(&name).and_then(|file| Ok(file.metadata()?.len()));
    let available = available.map_err(|error| io_error(&name, error))?;
    if available < wanted {
        return Err(ImageError::new(
            name,
            0,
            ImageErrorKind::Truncated { wanted, available },
        ));
    }
    Ok(())
}

/// The runs of one object at one level, with those of its parent in the place of references to it.
fn resolve(level: usize, pagemap: &Pagemap, parent: Option<&[ResolvedRun]>) -> Vec<ResolvedRun> {
    let mut runs = Vec::new();
    let mut stored = pagemap.stored();
    for entry in &pagemap.runs {
        let lazy = entry.flags.contains(PagemapFlags::LAZY);
        if entry.flags.contains(PagemapFlags::PRESENT) {
            let offset = stored.next().map_or(0, |(_, offset)| offset);
            let location = Location::File {
                level,
                pages_id: pagemap.pages_id,
                offset,
            };
            push(
                &mut runs,
                ResolvedRun {
                    run: entry.run,
                    location,
                    lazy,
                },
            );
        } else if entry.flags.contains(PagemapFlags::PARENT) {
            let mut at = entry.run.start;
            for part in clip(parent.unwrap_or_default(), entry.run) {
                push_missing(&mut runs, at, part.run.start, lazy);
                at = part.run.end();
                push(&mut runs, ResolvedRun { lazy, ..part });
            }
            push_missing(&mut runs, at, entry.run.end(), lazy);
        } else {
            push(
                &mut runs,
                ResolvedRun {
                    run: entry.run,
                    location: Location::Missing,
                    lazy,
                },
            );
        }
    }
    runs
}

fn push_missing(runs: &mut Vec<ResolvedRun>, start: u64, end: u64, lazy: bool) {
    if start < end {
        let run = PageRun {
            start,
            pages: (end - start) / PAGE_SIZE as u64,
        };
        push(
            runs,
            ResolvedRun {
                run,
                location: Location::Missing,
                lazy,
            },
        );
    }
}

/// Appends a run, to the last one if it continues that in memory and in the file.
fn push(runs: &mut Vec<ResolvedRun>, next: ResolvedRun) {
    if let Some(last) = runs.last_mut() {
        let adjacent = last.run.end() == next.run.start && last.lazy == next.lazy;
        if adjacent && advanced(last.location, last.run.bytes()) == next.location {
            last.run.pages += next.run.pages;
            return;
        }
    }
    runs.push(next);
}

/// The parts of sorted `runs` that lie in `window`.
fn clip(runs: &[ResolvedRun], window: PageRun) -> impl Iterator<Item = ResolvedRun> + '_ {
    let first = runs.partition_point(|run| run.run.end() <= window.start);
    runs[first..]
        .iter()
        .take_while(move |run| run.run.start < window.end())
        .map(move |resolved| {
            let start = resolved.run.start.max(window.start);
            let end = resolved.run.end().min(window.end());
            ResolvedRun {
                run: PageRun {
                    start,
                    pages: (end - start) / PAGE_SIZE as u64,
                },
                location: advanced(resolved.location, start - resolved.run.start),
                ..*resolved
            }
        })
}

fn advanced(location: Location, bytes: u64) -> Location {
    match location {
        Location::File {
            level,
            pages_id,
            offset,
        } => Location::File {
            level,
            pages_id,
            offset: offset + bytes,
        },
        Location::Missing => Location::Missing,
    }
}

fn io_error(name: &str, error: io::Error) -> ImageError {
    ImageError::new(name, 0, ImageErrorKind::Io(error))
}

/// Puts the way from the opened directory before the name of the file.
pub(crate) fn at_level(level: usize, error: ImageError) -> ImageError {
    ImageError {
        image: format!("{}{}", "parent/".repeat(level), error.image),
        ..error
    }
}
