//! Shared memory without a file system: shared anonymous memory, memfds, System V segments.
//!
//! Contents are stored once per segment, as `pagemap-shmem-ID`, by offset.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use whimbrel_images::page::{MemoryObject, PAGE_SIZE, PageRun, PageSink};

use crate::error::{Context, Error, Result};
use crate::procfs::maps::Mapping;
use crate::resource::mem::sysv;

/// Image ids of segments begin here. Those of System V segments are their own ids, which are smaller: inodes would not do,
/// for the kernel gives theirs to other segments, too.
pub const FIRST_ID: u32 = 1 << 31;

/// Segments of a tree while it is dumped: device and inode to image id.
#[derive(Default)]
pub struct Segments {
    ids: HashMap<(u64, u64), (u32, File)>,
    /// System V segments.
    pub system_v: sysv::Seen,
    system_v_files: Vec<(u32, File)>,
}

impl Segments {
    /// The image id of the segment behind `file` (opened through `map_files` or a descriptor).
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn id_of(&mut self, file: File) -> Result<u32> {
        let stat = rustix::fs::fstat(&file)
            .map_err(std::io::Error::from)
            .context("look at shared memory")?;
        let next = FIRST_ID + self.ids.len() as u32;
        Ok(self.ids.entry((stat.st_dev, stat.st_ino)).or_insert((next, file)).0)
    }

    /// Takes note of a mapping of a System V segment in process `pid`; `open` opens it. Returns its image id, which is its id.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn id_of_system_v(
        &mut self,
        pid: i32,
        mapping: &Mapping,
        open: impl FnOnce() -> std::io::Result<File>,
    ) -> Result<u32> {
        let (id, first) = self.system_v.note(pid, mapping)?;
        if first {
            let file = open().with(|| {
                Error::new("open a System V segment")
                    .task(pid)
                    .object(format!("segment {id}"))
            })?;
            self.system_v_files.push((id as u32, file));
        }
        Ok(id as u32)
    }

    /// Image ids by device and inode.
    pub fn ids(&self) -> HashMap<(u64, u64), u32> {
        self.ids.iter().map(|(&inode, &(id, _))| (inode, id)).collect()
    }

    /// Writes the contents of all segments.
    ///
    /// # Errors
    /// When one cannot be read or stored.
    pub fn dump(&self, sink: &mut dyn PageSink) -> Result<()> {
        self.iter().try_for_each(|(id, file)| dump_segment(id, file, sink))
    }

    /// Every segment: its image id and its file.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &File)> {
        let all = self.ids.values().chain(&self.system_v_files);
        all.map(|(id, file)| (*id, file))
    }
}

/// Writes the pages of one segment that were ever touched.
///
/// # Errors
/// When it cannot be read or stored.
pub fn dump_segment(id: u32, file: &File, sink: &mut dyn PageSink) -> Result<()> {
    let failed = || Error::new("dump shared memory").object(format!("segment {id}"));
    let mut buffer = vec![0u8; 1 << 20];
    for run in populated(file).with(failed)? {
        let mut done = 0;
        while done < run.pages {
            let pages = (run.pages - done).min((buffer.len() / PAGE_SIZE) as u64);
            let part = PageRun {
                start: run.start + done * PAGE_SIZE as u64,
                pages,
            };
            let bytes = &mut buffer[..part.bytes() as usize];
            read_padded(file, bytes, part.start).with(failed)?;
            sink.write_pages(MemoryObject::Shmem(id), part, bytes).with(failed)?;
            done += pages;
        }
    }
    Ok(())
}

/// Runs of pages that hold data, in whole pages (lseek(2), SEEK_DATA).
///
/// # Errors
/// When the file cannot seek.
pub fn populated(file: &File) -> std::io::Result<Vec<PageRun>> {
    let (mut runs, mut at) = (Vec::new(), 0u64);
    loop {
        let start = match rustix::fs::seek(file.as_fd(), SeekFrom::Data(at)) {
            Ok(start) => start / PAGE_SIZE as u64 * PAGE_SIZE as u64,
            Err(rustix::io::Errno::NXIO) => return Ok(runs),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file.as_fd(), SeekFrom::Hole(start))?.next_multiple_of(PAGE_SIZE as u64);
        runs.push(PageRun {
            start,
            pages: (end - start) / PAGE_SIZE as u64,
        });
        at = end;
    }
}

/// Reads what the file has; what lies behind its end reads as zeros.
fn read_padded(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => {
                buffer[done..].fill(0);
                break;
            }
            read => done += read,
        }
    }
    Ok(())
}
