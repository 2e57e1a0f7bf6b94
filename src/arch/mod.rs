//! Everything that depends on the processor: registers, xstate, signal frames, the stub's text, the vdso.
//!
//! Each architecture is a module with the same names; nothing outside of it may assume one.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("whimbrel runs on x86_64 so far; add a module to src/arch/ for another architecture");
