//! Typed system calls that the crates lack, and what the kernel can do.

pub mod files;
pub mod sys;
