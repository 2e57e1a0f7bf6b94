//! The memory of a tree under construction: mappings, segments, contents.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};
use whimbrel_images::proto::VmaEntry;

use super::Build;
use super::build::SPARE;
use super::vacant::Vacant;
use crate::error::{Context, Error, Result};
use crate::kernel::mm;
use crate::procfs::maps;
use crate::remote::{Program, RemoteAddr, RemoteMemory};
use crate::resource::mem::{mapping, mapping::status, sysv, vdso};
use crate::tree::TaskImage;

/// Shared memory segments of a tree, by image id.
#[derive(Default)]
pub struct Segments(HashMap<u64, OwnedFd>);

impl Segments {
    /// Makes the segments that the tasks map, each as large as its furthest mapping.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn make(&mut self, tasks: &[TaskImage]) -> Result<()> {
        let mut sizes: BTreeMap<u64, u64> = BTreeMap::new();
        let shared = tasks
            .iter()
            .flat_map(|task| &task.mm.vmas)
            .filter(|vma| vma.status & (status::ANON_SHARED | status::SYSVIPC) == status::ANON_SHARED);
        for vma in shared {
            let end = vma.pgoff.saturating_add(vma.end - vma.start);
            let size = sizes.entry(vma.shmid).or_default();
            *size = end.max(*size);
        }
        for (id, size) in sizes {
            if let std::collections::hash_map::Entry::Vacant(empty) = self.0.entry(id) {
                let failed = || Error::new("make shared memory").object(format!("segment {id}, {size} bytes"));
                empty.insert(mm::shared_anonymous(size).with(failed)?);
            }
        }
        Ok(())
    }

    /// The file of a segment.
    pub fn file(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.0.get(&id).map(AsFd::as_fd)
    }

    /// Adds a segment that exists as a file already (a memfd).
    pub fn adopt(&mut self, id: u64, file: OwnedFd) {
        self.0.insert(id, file);
    }
}

/// A mapping to be made.
pub struct Plan<'a> {
    /// What it is.
    pub vma: &'a VmaEntry,
    /// Map it writable whatever its protection is, for its contents and because it once was.
    pub writable: bool,
}

impl Build {
    /// Puts this kernel's vdso where a task expects it. `vmas` are all mappings of the task.
    ///
    /// Returns the patches that the task's own vdso needs where it differs, to be written when its memory is there.
    ///
    /// # Errors
    /// When the vdso cannot be moved or redirected.
    pub fn place_vdso(&mut self, pid: u32, vmas: &[VmaEntry], their_code: Option<&[u8]>) -> Result<VdsoPlan> {
        let tid = self.task(pid)?.leader.tid();
        let maps = maps::parse(&crate::procfs::read(tid, "maps")?)?;
        let (Some(ours), Some(theirs)) = (vdso::Place::of_maps(&maps), vdso::Place::of_image(vmas)) else {
            return Ok(VdsoPlan {
                keep_image: true,
                ..VdsoPlan::default()
            });
        };
        let code = RemoteMemory::new(tid).read_vec(RemoteAddr(ours.code), (ours.end - ours.code) as usize)?;
        let spare = self.arena.0.0 + crate::remote::seed::ARENA_SIZE;
        let mut program = Program::new();
        let same = their_code.is_none_or(|theirs_bytes| vdso::replaceable(ours, &code, theirs, theirs_bytes));
        if same {
            vdso::relocate(&mut program, &maps, theirs, spare + SPARE / 2);
            self.run(pid, &program)?;
            return Ok(VdsoPlan::default());
        }
        // Ours goes to a place of its own; theirs becomes memory with jumps in it.
        let mut ranges: Vec<(u64, u64)> = vmas.iter().map(|vma| (vma.start, vma.end)).collect();
        ranges.push((self.arena.0.0, spare + SPARE));
        let home = maps::largest_gap(&mut ranges, ours.end - ours.data).ok_or_else(|| {
            Error::new("place the vdso")
                .task(pid as i32)
                .because("the address space is full")
        })?;
        let to = vdso::Place {
            data: home,
            code: home + (ours.code - ours.data),
            end: home + (ours.end - ours.data),
        };
        vdso::relocate(&mut program, &maps, to, spare + SPARE / 2);
        self.run(pid, &program)?;
        let patches = vdso::redirections(their_code.unwrap_or(&[]), theirs.code, &code, to.code)?;
        Ok(VdsoPlan {
            keep_image: true,
            patches,
        })
    }

    /// Moves this kernel's vdso out of the way of the task's mappings, beside the arena. [`Build::place_vdso`] takes it from there.
    ///
    /// # Errors
    /// When it cannot be moved.
    pub fn clear_the_way(&mut self, pid: u32, vmas: &[VmaEntry]) -> Result<()> {
        let tid = self.task(pid)?.leader.tid();
        let maps = maps::parse(&crate::procfs::read(tid, "maps")?)?;
        let Some(ours) = vdso::Place::of_maps(&maps) else {
            return Ok(());
        };
        if !vmas.iter().any(|vma| vma.start < ours.end && vma.end > ours.data) {
            return Ok(());
        }
        let at = self.arena.0.0 + crate::remote::seed::ARENA_SIZE;
        let to = vdso::Place {
            data: at,
            code: at + (ours.code - ours.data),
            end: at + (ours.end - ours.data),
        };
        let mut program = Program::new();
        vdso::relocate(&mut program, &maps, to, at + SPARE / 2);
        self.run(pid, &program).map(drop)
    }

    /// Makes mappings of a task. Files come from `files` by image id, segments from this build.
    ///
    /// # Errors
    /// When a file is missing, or the kernel refuses a mapping.
    pub fn map(&mut self, pid: u32, plans: &[Plan<'_>], files: &HashMap<u64, OwnedFd>) -> Result<()> {
        let mut program = Program::new();
        let mut by_file: BTreeMap<(bool, u64), Vec<&Plan<'_>>> = BTreeMap::new();
        let mut system_v: BTreeMap<(u64, u64, bool), Vec<&VmaEntry>> = BTreeMap::new();
        for plan in plans {
            if plan.vma.status & status::SYSVIPC != 0 {
                let begin = plan.vma.start.wrapping_sub(plan.vma.pgoff);
                let read_only = plan.vma.fdflags == Some(libc::O_RDONLY as u32);
                let attachment = (plan.vma.shmid, begin, read_only);
                system_v.entry(attachment).or_default().push(plan.vma);
                continue;
            }
            let segment = plan.vma.status & status::ANON_SHARED != 0;
            let file = plan.vma.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0;
            if segment || file {
                by_file.entry((segment, plan.vma.shmid)).or_default().push(plan);
            } else {
                mapping::map(&mut program, plan.vma, plan.writable, None);
            }
        }
        let groups: Vec<_> = by_file.into_iter().collect();
        for chunk in groups.chunks(Build::HAND) {
            let descriptors = chunk
                .iter()
                .map(|((segment, id), _)| {
                    let found = if *segment {
                        self.segments.file(*id)
                    } else {
                        files.get(id).map(AsFd::as_fd)
                    };
                    found.ok_or_else(|| {
                        Error::new("map a file")
                            .task(pid as i32)
                            .because(format!("there is no file {id}"))
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            let received = self.hand(&mut program, &descriptors)?;
            for ((_, plans), descriptor) in chunk.iter().zip(received) {
                for plan in plans {
                    mapping::map(&mut program, plan.vma, plan.writable, Some(descriptor));
                }
                program.call("close a mapped file", libc::SYS_close, &[descriptor]);
            }
        }
        for ((id, ..), pieces) in &system_v {
            let tid = self.task(pid)?.leader.tid();
            let room = |length: u64| {
                let maps = maps::parse(&crate::procfs::read(tid, "maps")?)?;
                let mut ranges: Vec<(u64, u64)> = maps.iter().map(|map| (map.start, map.end)).collect();
                ranges.extend(plans.iter().map(|plan| (plan.vma.start, plan.vma.end)));
                ranges.push(self.arena_range());
                maps::largest_gap(&mut ranges, length)
                    .ok_or_else(|| Error::new("attach a System V segment").because("the address space is full"))
            };
            sysv::attach(&mut program, *id, self.system_v.size(*id)?, pieces, room)?;
        }
        self.run(pid, &program).map(drop)
    }

    /// Where contents of the tree's memory are written to.
    ///
    /// # Errors
    /// When a task's memory cannot be opened.
    pub fn memory_sink(&mut self) -> Result<MemorySink> {
        let mut sink = MemorySink::default();
        for (&pid, task) in &self.tasks {
            let tid = task.leader.tid();
            let failed = || Error::new("open memory").task(tid);
            let forced = File::options()
                .read(true)
                .write(true)
                .open(format!("/proc/{tid}/mem"))
                .with(failed)?;
            let memory = TaskMemory {
                memory: RemoteMemory::new(tid),
                forced,
                vacant: None,
            };
            sink.tasks.insert(pid, memory);
        }
        for (&id, file) in &self.segments.0 {
            sink.segments.insert(
                id as u32,
                File::from(file.try_clone().context("duplicate a descriptor")?),
            );
        }
        for (id, file) in self.system_v.files() {
            let file = file.try_clone().context("duplicate a descriptor")?;
            sink.segments.insert(id as u32, file);
        }
        Ok(sink)
    }
}

/// How a task's vdso is restored.
#[derive(Default)]
pub struct VdsoPlan {
    /// The image's vdso mapping is made as plain memory with its own contents.
    pub keep_image: bool,
    /// Bytes to write over it.
    pub patches: Vec<(u64, Vec<u8>)>,
}

/// Writes pages straight into the memory of tasks under construction.
#[derive(Default)]
pub struct MemorySink {
    tasks: HashMap<u32, TaskMemory>,
    segments: HashMap<u32, File>,
}

/// The memory of one task.
struct TaskMemory {
    memory: RemoteMemory,
    forced: File,
    vacant: Option<Arc<Vacant>>,
}

impl TaskMemory {
    fn try_clone(&self) -> std::io::Result<TaskMemory> {
        Ok(TaskMemory {
            memory: self.memory,
            forced: self.forced.try_clone()?,
            vacant: self.vacant.clone(),
        })
    }

    fn write(&self, at: u64, data: &[u8]) -> std::io::Result<()> {
        let Some(vacant) = &self.vacant else {
            return self.overwrite(at, data);
        };
        let mut done = 0;
        while done < data.len() {
            let at = at + done as u64;
            let (length, inside) = vacant.part(at, data.len() - done);
            let part = &data[done..done + length];
            let put = if inside { vacant.put(at, part)? } else { 0 };
            // What is left is no vacant memory, or begins with a page that is there.
            let rest = if inside { PAGE_SIZE } else { length }.min(length - put);
            if rest > 0 {
                self.overwrite(at + put as u64, &part[put..put + rest])?;
            }
            done += put + rest;
        }
        Ok(())
    }

    fn overwrite(&self, at: u64, data: &[u8]) -> std::io::Result<()> {
        match self.memory.write(RemoteAddr(at), data) {
            Ok(()) => Ok(()),
            // Not writable for the task itself: written as a debugger would.
            Err(_) => self.forced.write_all_at(data, at),
        }
    }
}

impl MemorySink {
    /// Another handle to the same memory, for another thread.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone(&self) -> std::io::Result<MemorySink> {
        let mut copy = MemorySink::default();
        for (&pid, task) in &self.tasks {
            copy.tasks.insert(pid, task.try_clone()?);
        }
        for (&id, file) in &self.segments {
            copy.segments.insert(id, file.try_clone()?);
        }
        Ok(copy)
    }

    /// Says that so much of a task's memory has no page yet.
    pub(super) fn set_vacant(&mut self, pid: u32, vacant: Vacant) {
        if let Some(task) = self.tasks.get_mut(&pid) {
            task.vacant = Some(Arc::new(vacant));
        }
    }

    /// Reads what is there, and leaves it shared: process_vm_readv(2) pins pages, and the kernel gives whoever is pinned a
    /// copy of his own of a page that he shares copy-on-write (gup_must_unshare in mm/internal.h, Linux 5.19).
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> std::io::Result<()> {
        match object {
            MemoryObject::Task(pid) => self.task(pid)?.forced.read_exact_at(buffer, run.start),
            MemoryObject::Shmem(id) => self.segment(id)?.read_exact_at(buffer, run.start),
        }
    }

    fn task(&self, pid: u32) -> std::io::Result<&TaskMemory> {
        self.tasks
            .get(&pid)
            .ok_or_else(|| std::io::Error::other(format!("there is no task {pid} in the tree")))
    }

    fn segment(&self, id: u32) -> std::io::Result<&File> {
        self.segments
            .get(&id)
            .ok_or_else(|| std::io::Error::other(format!("there is no shared segment {id}")))
    }
}

impl PageSink for MemorySink {
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> std::io::Result<()> {
        match object {
            MemoryObject::Task(pid) => self.task(pid)?.write(run.start, data),
            MemoryObject::Shmem(id) => self.segment(id)?.write_all_at(data, run.start),
        }
    }

    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> std::io::Result<()> {
        let zeros = vec![0u8; (run.bytes() as usize).min(1 << 20)];
        let mut at = 0;
        while at < run.bytes() {
            let part = (run.bytes() - at).min(zeros.len() as u64);
            let part_run = PageRun {
                start: run.start + at,
                pages: part / PAGE_SIZE as u64,
            };
            self.write_pages(object, part_run, &zeros[..part as usize])?;
            at += part;
        }
        Ok(())
    }

    fn parent_pages(&mut self, _object: MemoryObject, _run: PageRun) -> std::io::Result<()> {
        Ok(())
    }
}
