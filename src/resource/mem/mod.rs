//! Memory: mappings, bounds of the address space, shared memory, the vdso.

pub mod bounds;
pub mod mapping;
pub mod pages;
pub mod shared;
pub mod sysv;
pub mod vdso;
