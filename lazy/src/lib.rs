//! Memory that arrives after the program runs: userfaultfd, the fault loop and prefetch.
//!
//! A restored task runs with part of its memory missing. Its mappings are registered with a userfaultfd, and whoever
//! touches a missing page waits in the kernel until a [`LazyServer`] fills it from a
//! [`PageSource`](whimbrel_images::page::PageSource).
//!
//! * [`ioctl`]: the kernel's calls, typed; the only file with `unsafe`. Also PAGEMAP_SCAN, which dirty tracking needs.
//! * [`regions`]: what is known of each page; pure data, kept true over fork, mremap, madvise and munmap.
//! * [`journal`]: what happened to a task's lazy pages, for a server that takes over from one that died.
//! * `task`: one address space: the rule that keeps its map and the kernel in step.
//! * `fault`: the threads that answer faults. `prefetch`: the threads that fetch the rest.
//! * [`server`]: puts them together.
//!
//! What is promised: a page is filled with its own bytes or not at all. When a source fails, the task waits; a page that
//! the source does not know is zeros only where the range says that absent pages are; dropped pages do not come back.
//!
//! What is not covered: huge pages (hugetlbfs); a private mapping of a shared-memory file; holes that are punched into
//! shared memory while it is still being filled. When the serving process dies the kernel closes its descriptor and
//! missing pages read as zeros: whoever needs to survive that keeps a duplicate of the descriptor elsewhere, and a journal.

mod bitmap;
mod fault;
mod flags;
pub mod ioctl;
pub mod journal;
mod prefetch;
pub mod regions;
pub mod server;
mod stats;
mod task;
mod turn;

pub use regions::{LazyRange, RangeFlags, RegionMap};
pub use server::{FailureHook, ForkHook, LazyConfig, LazyError, LazyServer, Progress, SourceFailure, Unfinished};
pub use stats::{Histogram, StatsSnapshot};
pub use task::{Known, TaskFailure, TaskStatus};
