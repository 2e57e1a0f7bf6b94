//! Names for memory: which address space a page belongs to, and where it lies in it.
//!
//! Everything that moves pages (image directories, the page server, lazy restore, migration) speaks in these terms.

/// Size of a page in bytes. The image format fixes it to 4 KiB on x86_64.
pub const PAGE_SIZE: usize = 4096;

/// One address space that pages are stored for: `pagemap-N.img` and `pagemap-shmem-N.img` in the image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MemoryObject {
    /// The private memory of a task, by its pid (in its own pid namespace). Addresses are virtual addresses.
    Task(u32),
    /// A shared segment (shared anonymous memory, memfd, SysV), by its shmem id. Addresses are offsets in bytes.
    Shmem(u32),
}

/// A run of consecutive pages of one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRun {
    /// Address of the first page in bytes, page aligned.
    pub start: u64,
    /// Number of pages; never zero in a valid run.
    pub pages: u64,
}

impl PageRun {
    /// Address of the first byte after the run. Saturates instead of wrapping.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.pages.saturating_mul(PAGE_SIZE as u64))
    }

    /// Size of the run in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE as u64)
    }
}

/// Room for bytes that begins with a page: to copy whole pages between places that lie differently in their pages takes
/// some processors three times as long.
#[derive(Clone, Debug)]
pub struct PageBuffer {
    bytes: Vec<u8>,
    skip: usize,
}

impl PageBuffer {
    /// Zeroed room for so many bytes.
    pub fn new(room: usize) -> PageBuffer {
        let bytes = vec![0; room + PAGE_SIZE];
        let skip = bytes.as_ptr().align_offset(PAGE_SIZE).min(PAGE_SIZE);
        PageBuffer { bytes, skip }
    }

    /// The first `length` bytes; no more than there is room for.
    pub fn first(&self, length: usize) -> &[u8] {
        &self.bytes[self.skip..self.skip + length]
    }

    /// As [`PageBuffer::first`], to be written.
    pub fn first_mut(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.skip..self.skip + length]
    }
}

/// What a [`PageSource`] knows about one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// The bytes were written to the buffer.
    Data,
    /// The page is known to be all zeros (or was never populated); the buffer holds zeros.
    Zero,
    /// The source has no knowledge of the page; the buffer is unspecified. It must not be filled with zeros.
    Unknown,
}

/// Somewhere that pages can be read from: an image directory, a frozen process, a page server on another host.
pub trait PageSource: Send + Sync {
    /// Reads `run.pages` pages of `object` into `buffer` (whose length is `run.bytes()`), and tells of each page what it is.
    ///
    /// # Errors
    /// When the source cannot be reached or its data is damaged; nothing in `buffer` may be used then.
    fn read_pages(&self, object: MemoryObject, run: PageRun, buffer: &mut [u8]) -> std::io::Result<Vec<PageState>>;
}

/// Somewhere that pages can be written to: an image directory, a process that is being put together, a remote page server.
pub trait PageSink: Send {
    /// Stores the pages of `run`; `data.len() == run.bytes()`. A later write to the same page replaces the earlier one.
    ///
    /// # Errors
    /// When the pages could not be stored; the sink may then hold part of the run.
    fn write_pages(&mut self, object: MemoryObject, run: PageRun, data: &[u8]) -> std::io::Result<()>;

    /// Stores pages that hold nothing but zeros. In a private mapping of a file that is not the same as a page that is not
    /// populated, which [`PageSink::zero_pages`] is for: there the file's bytes are seen.
    ///
    /// # Errors
    /// As [`PageSink::write_pages`].
    fn zeros(&mut self, object: MemoryObject, run: PageRun) -> std::io::Result<()> {
        const AT_ONCE: u64 = 64;
        let zeros = vec![0; run.pages.min(AT_ONCE) as usize * PAGE_SIZE];
        let mut done = 0;
        while done < run.pages {
            let part = PageRun {
                start: run.start + done * PAGE_SIZE as u64,
                pages: (run.pages - done).min(AT_ONCE),
            };
            self.write_pages(object, part, &zeros[..part.bytes() as usize])?;
            done += part.pages;
        }
        Ok(())
    }

    /// Says that the pages of `run` are not populated now, whatever was written before: they read as zeros, or as the file
    /// that is mapped there privately.
    ///
    /// # Errors
    /// As [`PageSink::write_pages`].
    fn zero_pages(&mut self, object: MemoryObject, run: PageRun) -> std::io::Result<()>;

    /// Says that the pages of `run` did not change since the parent dump (image chains only).
    ///
    /// # Errors
    /// As [`PageSink::write_pages`].
    fn parent_pages(&mut self, object: MemoryObject, run: PageRun) -> std::io::Result<()>;
}
