//! x86_64.

mod core_image;
pub mod cpu;
mod frame;
mod gadget;
mod registers;
mod stub_text;

pub use core_image::{cpu_state_components, from_image, to_image};
pub use frame::{HealChain, build_heal_chain};
pub use gadget::{find_restorer, find_syscall_return};
pub use registers::{Registers, XState};
pub use stub_text::{entry_offset, stub_text};

/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Lowest address that is never a user mapping: the end of the 47-bit user address space.
pub const TASK_SIZE: u64 = 0x7fff_ffff_f000;
