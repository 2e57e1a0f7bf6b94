//! The contents of a tree's memory: from images into tasks under construction, by several threads.

use std::collections::{HashMap, HashSet};

use whimbrel_images::chain::PageStore;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageBuffer, PageRun, PageSink};

use super::MemorySink;
use super::inherit::Inheritance;
use super::state::Patches;
use crate::dump::runs::RunSet;
use crate::error::{Context, Error, Result};
use crate::resource::mem::{mapping::status, pages};
use crate::tree::TreeImage;

/// Bytes that are read at once: they are still in the processor's cache when they are written.
const BATCH: usize = 256 << 10;

/// What the memory of a tree is filled from.
pub(super) struct Contents<'a> {
    /// The images.
    pub pages: &'a PageStore,
    /// The tree.
    pub image: &'a TreeImage,
    /// What is written over vdsos; a task that has any keeps its own.
    pub patches: &'a [(u32, Patches)],
    /// What is left missing, by task.
    pub lazy: &'a HashMap<u32, RunSet>,
    /// What is there already, maybe.
    pub inheritance: &'a Inheritance,
}

/// A part of the contents.
struct Part {
    object: MemoryObject,
    run: PageRun,
    file: std::sync::Arc<std::fs::File>,
    offset: u64,
    /// The task has pages here that may be the same.
    compare: bool,
}

impl Contents<'_> {
    /// Writes the contents of some memory, in as many threads as there are processors.
    ///
    /// # Errors
    /// When they cannot be read or written.
    pub fn fill(&self, sink: &MemorySink, objects: &HashSet<MemoryObject>) -> Result<()> {
        let mut work = Vec::new();
        for object in self.pages.objects().filter(|object| objects.contains(object)) {
            self.parts(object, &mut work)?;
        }
        let next = std::sync::atomic::AtomicUsize::new(0);
        let threads = std::thread::available_parallelism()
            .map_or(2, usize::from)
            .min(16)
            .min(work.len().max(1));
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads)
                .map(|_| {
                    let (work, next) = (&work, &next);
                    let sink = sink.try_clone();
                    scope.spawn(move || -> Result<()> {
                        let mut sink = sink.context("fill memory")?;
                        let mut buffers = (PageBuffer::new(BATCH), PageBuffer::new(BATCH));
                        loop {
                            let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            let Some(part) = work.get(index) else {
                                return Ok(());
                            };
                            part.write(&mut sink, &mut buffers).with(|| {
                                Error::new("fill memory").object(format!("{:?} {:#x}", part.object, part.run.start))
                            })?;
                        }
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(Error::new("fill memory").because("a worker panicked")))
            })
        })
    }

    /// Adds the parts of an object.
    fn parts(&self, object: MemoryObject, work: &mut Vec<Part>) -> Result<()> {
        const PART: u64 = BATCH as u64;
        let (mut vdso, mut follows, mut common) = (RunSet::default(), None, RunSet::default());
        if let MemoryObject::Task(pid) = object {
            // This kernel's own vdso needs no contents.
            let kept = self
                .patches
                .iter()
                .any(|(other, patches)| *other == pid && !patches.is_empty());
            let task = self.image.tasks.iter().find(|task| task.entry.pid == pid);
            let vma = task.and_then(|task| task.mm.vmas.iter().find(|vma| vma.status & status::VDSO != 0));
            vdso = RunSet::from_ranges(
                vma.filter(|_| !kept)
                    .map(|vma| (vma.start, vma.end))
                    .into_iter()
                    .collect(),
            );
            follows = self.lazy.get(&pid);
            if let Some(inherited) = self.inheritance.of_task(pid) {
                common = inherited.common.clone();
            }
        }
        for extent in self.pages.extents(object).context("read pagemaps")? {
            let whole = RunSet::from_runs(&[extent.run]).subtract(&vdso);
            let now = follows.map_or(whole.clone(), |follows| whole.subtract(follows));
            for (set, compare) in [(now.subtract(&common), false), (now.intersect(&common), true)] {
                for &(mut at, end) in set.ranges() {
                    while at < end {
                        let bytes = (end - at).min(PART);
                        let run = PageRun {
                            start: at,
                            pages: bytes / PAGE_SIZE as u64,
                        };
                        work.push(Part {
                            object,
                            run,
                            file: extent.file.clone(),
                            offset: extent.offset + (at - extent.run.start),
                            compare,
                        });
                        at += bytes;
                    }
                }
            }
        }
        Ok(())
    }
}

impl Part {
    fn write(&self, sink: &mut MemorySink, (new, old): &mut (PageBuffer, PageBuffer)) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let length = self.run.bytes() as usize;
        let (new, old) = (new.first_mut(length), old.first_mut(length));
        self.file.read_exact_at(new, self.offset)?;
        if !self.compare {
            return sink.write_pages(self.object, self.run, new);
        }
        sink.read_pages(self.object, self.run, old)?;
        let mut different = Vec::new();
        for (index, (new, old)) in new.chunks(PAGE_SIZE).zip(old.chunks(PAGE_SIZE)).enumerate() {
            if new != old {
                pages::push_page(&mut different, self.run.start + (index * PAGE_SIZE) as u64);
            }
        }
        for run in different {
            let at = (run.start - self.run.start) as usize;
            sink.write_pages(self.object, run, &new[at..at + run.bytes() as usize])?;
        }
        Ok(())
    }
}
