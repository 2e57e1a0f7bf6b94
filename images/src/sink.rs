//! Pages on their way into an image set, in any order.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use crate::chain::{Location, PageStore};
use crate::interval::{Interval, IntervalMap, Value};
use crate::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};
use crate::pagemap::{PagemapFlags, PagemapRun, check_run, pagemap_name, pages_name, start_pagemap, write_run};
use crate::proto::TrackEntry;
use crate::reorder::Plan;
use crate::store::{ImageStore, WriteSeek};

/// A [`PageSink`] that makes pagemaps and pages files. Many objects may be written at once.
///
/// Pages may come in any order and again and again: the newest bytes win, in place. What is where is kept in memory;
/// [`DirPageSink::finish`] writes the pagemaps and, where pages did not come in ascending order, puts the pages file in order
/// (the format wants it in that of the pagemap). Where few pages came late that is done in place; else the file is copied,
/// which for the moment takes its size again on the disk.
///
/// Pages of zeros are dropped by [`PageSink::zero_pages`] only. Bytes given to [`PageSink::write_pages`] are kept even
/// if they are zeros: over a private file mapping a page of zeros differs from a page that is not there.
///
/// Each object holds a file open until the end.
pub struct DirPageSink {
    store: Arc<dyn ImageStore>,
    parent: Option<Arc<PageStore>>,
    next_pages_id: u32,
    objects: BTreeMap<MemoryObject, ObjectPages>,
}

/// What [`DirPageSink::finish`] has put into the image set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SinkSummary {
    /// Number of pagemaps.
    pub objects: u64,
    /// Pages in the pages files.
    pub pages_written: u64,
    /// Pages that are in the parent.
    pub pages_in_parent: u64,
    /// Pages that are left to be fetched on demand.
    pub pages_lazy: u64,
}

struct ObjectPages {
    pages_id: u32,
    file: Box<dyn WriteSeek + Send>,
    /// Where the next new page goes; all pages that `places` knows lie before it.
    end: u64,
    /// The end of the highest page that was appended, and the end of the file when a lower one came after it.
    highest: u64,
    strays_from: Option<u64>,
    /// How far a write may have got, failed ones included.
    touched: u64,
    places: IntervalMap<Place>,
    /// Pages that may be restored on demand, whether stored or not.
    lazy: IntervalMap<()>,
    track: Option<TrackEntry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Offset in the pages file, bytes.
    File(u64),
    Parent,
    Elsewhere,
}

impl Value for Place {
    fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::File(offset) => Self::File(offset + bytes),
            other => other,
        }
    }
}

impl DirPageSink {
    /// A sink into `store` whose pages files are numbered from 1.
    pub fn new(store: Arc<dyn ImageStore>) -> Self {
        Self {
            store,
            parent: None,
            next_pages_id: 1,
            objects: BTreeMap::new(),
        }
    }

    /// Looks at `parent` when [`PageSink::parent_pages`] is called: pages that are zero there are left out, pages that
    /// are not there are an error. Without it the caller must know that the parent has the pages, for CRIU refuses to
    /// restore a page that is said to be in the parent and is not.
    pub fn with_parent(self, parent: Arc<PageStore>) -> Self {
        Self {
            parent: Some(parent),
            ..self
        }
    }

    /// Numbers the pages files from `pages_id`, for a store that has some already.
    pub fn with_first_pages_id(self, pages_id: u32) -> Self {
        Self {
            next_pages_id: pages_id,
            ..self
        }
    }

    /// Makes sure that `object` gets a pagemap, even if it has no pages.
    ///
    /// # Errors
    /// When the pages file cannot be made.
    pub fn begin(&mut self, object: MemoryObject) -> io::Result<()> {
        self.object(object).map(drop)
    }

    /// Says that the pages of `run` are not in the image set but are to be fetched on demand.
    ///
    /// # Errors
    /// As [`PageSink::write_pages`].
    pub fn lazy_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        check(object, run)?;
        self.object(object)?
            .places
            .insert(run.start, run.end(), Place::Elsewhere);
        Ok(())
    }

    /// Says that those pages of `run` that are in the image set, now or later, may be restored on demand
    /// ([`PagemapFlags::LAZY`]): private anonymous memory.
    ///
    /// # Errors
    /// As [`PageSink::write_pages`].
    pub fn mark_lazy(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        check(object, run)?;
        self.object(object)?.lazy.insert(run.start, run.end(), ());
        Ok(())
    }

    /// Notes what the dump left in the task of `object` for the next dump to find.
    ///
    /// # Errors
    /// As [`DirPageSink::begin`].
    pub fn set_track(&mut self, object: MemoryObject, track: TrackEntry) -> io::Result<()> {
        self.object(object)?.track = Some(track);
        Ok(())
    }

    /// Writes the pagemaps. A sink that is dropped without this leaves pages files that nothing refers to.
    ///
    /// # Errors
    /// When a file cannot be written; the image set is then incomplete.
    pub fn finish(self) -> io::Result<SinkSummary> {
        let mut summary = SinkSummary::default();
        for (object, pages) in self.objects {
            pages.finish(&*self.store, object, &mut summary)?;
        }
        Ok(summary)
    }

    fn object(&mut self, object: MemoryObject) -> io::Result<&mut ObjectPages> {
        use std::collections::btree_map::Entry;
        match self.objects.entry(object) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let pages_id = self.next_pages_id;
                let name = pages_name(pages_id);
                let file = self.store.create(&name).map_err(|error| named(&name, error))?;
                self.next_pages_id = pages_id.checked_add(1).ok_or(ErrorKind::InvalidInput)?;
                Ok(entry.insert(ObjectPages::new(pages_id, file)))
            }
        }
    }
}

impl PageSink for DirPageSink {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> io::Result<()> {
        check(object, run)?;
        if data.len() as u64 != run.bytes() {
            let what = format!(
                "{}: {} bytes given for {} pages",
                pagemap_name(object),
                data.len(),
                run.pages
            );
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        }
        let pages = self.object(object)?;
        pages
            .write(run, data)
            .map_err(|error| named(&pages_name(pages.pages_id), error))
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        check(object, run)?;
        self.object(object)?.places.remove(run.start, run.end());
        Ok(())
    }

    fn parent_pages(&mut self, object: MemoryObject, run: PageRun) -> io::Result<()> {
        check(object, run)?;
        let Some(parent) = self.parent.clone() else {
            self.object(object)?.places.insert(run.start, run.end(), Place::Parent);
            return Ok(());
        };
        let known = parent.resolved_in(object, run);
        let known = known.filter(|known| known.iter().all(|part| part.location != Location::Missing));
        let Some(known) = known else {
            let what = format!(
                "{}: the parent lacks pages of the run at {:#x}",
                pagemap_name(object),
                run.start
            );
            return Err(io::Error::new(ErrorKind::InvalidInput, what));
        };
        let pages = self.object(object)?;
        pages.places.remove(run.start, run.end());
        for part in known {
            pages.places.insert(part.run.start, part.run.end(), Place::Parent);
        }
        Ok(())
    }
}

impl ObjectPages {
    fn new(pages_id: u32, file: Box<dyn WriteSeek + Send>) -> Self {
        Self {
            pages_id,
            file,
            end: 0,
            highest: 0,
            strays_from: None,
            touched: 0,
            places: IntervalMap::default(),
            lazy: IntervalMap::default(),
            track: None,
        }
    }

    /// Overwrites pages that are stored already, appends the others.
    fn write(&mut self, run: PageRun, data: &[u8]) -> io::Result<()> {
        let mut at = run.start;
        let stored: Vec<_> = self.places.overlapping(run.start, run.end()).collect();
        for piece in stored {
            if let Place::File(offset) = piece.value {
                self.append(at, piece.start, run, data)?;
                self.put(
                    offset,
                    &data[(piece.start - run.start) as usize..(piece.end - run.start) as usize],
                )?;
                at = piece.end;
            }
        }
        self.append(at, run.end(), run, data)
    }

    fn append(&mut self, start: u64, end: u64, run: PageRun, data: &[u8]) -> io::Result<()> {
        if start == end {
            return Ok(());
        }
        let offset = self.end;
        if start < self.highest {
            self.strays_from.get_or_insert(offset);
        }
        self.highest = self.highest.max(end);
        self.put(offset, &data[(start - run.start) as usize..(end - run.start) as usize])?;
        self.end += end - start;
        self.places.insert(start, end, Place::File(offset));
        Ok(())
    }

    fn put(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.touched = self.touched.max(offset + data.len() as u64);
        self.file.seek(SeekFrom::Start(offset))?;
        self.file.write_all(data)
    }

    fn finish(self, store: &dyn ImageStore, object: MemoryObject, summary: &mut SinkSummary) -> io::Result<()> {
        let Self {
            pages_id,
            mut file,
            touched,
            places,
            lazy,
            track,
            strays_from,
            ..
        } = self;
        let name = pages_name(pages_id);
        file.flush().map_err(|error| named(&name, error))?;
        let mut total = 0;
        let mut in_order = true;
        for piece in places.iter() {
            if let Place::File(offset) = piece.value {
                in_order &= offset == total;
                total += piece.end - piece.start;
            }
        }
        // Pages that were dropped, or whose write failed, leave bytes that belong to nothing.
        if !in_order || touched != total {
            let in_file = places.iter().filter_map(|piece| match piece.value {
                Place::File(offset) => Some((offset, piece.end - piece.start)),
                _ => None,
            });
            let done = match Plan::new(in_file, strays_from.unwrap_or(u64::MAX)) {
                Some(plan) => (store.open(&name))
                    .and_then(|mut source| plan.run(&mut *source, &mut *file))
                    .and_then(|()| store.truncate(&name, total)),
                None => sort(store, &name, &places),
            };
            done.map_err(|error| named(&name, error))?;
        }
        drop(file);

        let mut pagemap = start_pagemap(store, object, pages_id, track)?;
        let mut pending: Option<PagemapRun> = None;
        for piece in places.iter() {
            for run in with_flags(piece, &lazy) {
                summary.count(run);
                match &mut pending {
                    // Two pieces may be neighbours in memory and not in the unsorted file.
                    Some(last) if last.flags == run.flags && last.run.end() == run.run.start => {
                        last.run.pages += run.run.pages;
                    }
                    pending => {
                        if let Some(done) = pending.replace(run) {
                            write_run(&mut pagemap, done)?;
                        }
                    }
                }
            }
        }
        if let Some(done) = pending {
            write_run(&mut pagemap, done)?;
        }
        summary.objects += 1;
        Ok(pagemap.finish()?)
    }
}

impl SinkSummary {
    fn count(&mut self, run: PagemapRun) {
        let counter = if run.flags.contains(PagemapFlags::PRESENT) {
            &mut self.pages_written
        } else if run.flags.contains(PagemapFlags::PARENT) {
            &mut self.pages_in_parent
        } else {
            &mut self.pages_lazy
        };
        *counter += run.run.pages;
    }
}

/// Rewrites a pages file in the order of the addresses.
fn sort(store: &dyn ImageStore, name: &str, places: &IntervalMap<Place>) -> io::Result<()> {
    let sorted_name = format!("{name}.sorted");
    let mut source = store.open(name)?;
    let mut sorted = store.create(&sorted_name)?;
    let mut copy = || -> io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        for piece in places.iter() {
            let Place::File(offset) = piece.value else { continue };
            source.seek(SeekFrom::Start(offset))?;
            let mut left = piece.end - piece.start;
            while left > 0 {
                let part = &mut buffer[..left.min(1 << 20) as usize];
                source.read_exact(part)?;
                sorted.write_all(part)?;
                left -= part.len() as u64;
            }
        }
        sorted.flush()
    };
    copy().and_then(|()| store.rename(&sorted_name, name)).inspect_err(|_| {
        // The first error is the one that matters.
        let _ = store.remove(&sorted_name);
    })
}

/// Cuts a piece where eligibility for restore on demand changes.
fn with_flags(piece: Interval<Place>, lazy: &IntervalMap<()>) -> Vec<PagemapRun> {
    let whole = |start: u64, end: u64, flags| PagemapRun {
        run: PageRun {
            start,
            pages: (end - start) / PAGE_SIZE as u64,
        },
        flags,
    };
    match piece.value {
        Place::Parent => vec![whole(piece.start, piece.end, PagemapFlags::PARENT)],
        Place::Elsewhere => vec![whole(piece.start, piece.end, PagemapFlags::LAZY)],
        Place::File(_) => {
            let mut runs = Vec::new();
            let mut at = piece.start;
            for part in lazy.overlapping(piece.start, piece.end) {
                if at < part.start {
                    runs.push(whole(at, part.start, PagemapFlags::PRESENT));
                }
                runs.push(whole(part.start, part.end, PagemapFlags::PRESENT | PagemapFlags::LAZY));
                at = part.end;
            }
            if at < piece.end {
                runs.push(whole(at, piece.end, PagemapFlags::PRESENT));
            }
            runs
        }
    }
}

fn check(object: MemoryObject, run: PageRun) -> io::Result<()> {
    check_run(run).map_err(|what| {
        let what = format!("{}: the run at {:#x} {what}", pagemap_name(object), run.start);
        io::Error::new(ErrorKind::InvalidInput, what)
    })
}

fn named(name: &str, error: io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        crate::ImageError::new(name, 0, crate::ImageErrorKind::Io(error)),
    )
}
