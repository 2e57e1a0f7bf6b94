//! Typed system calls that the crates lack, and what the kernel can do.

pub mod mm;
pub mod sys;
