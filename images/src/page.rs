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

    /// Says that the pages of `run` are zeros (or not populated) now, whatever was written before.
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
