//! One pure parser per /proc file: bytes in, struct out. Nothing here opens a file, so everything can be fuzzed.
//!
//! A task can choose much of what /proc says about it (names, paths): nothing is trusted, nothing panics.

pub mod fdinfo;
pub mod maps;
pub mod mountinfo;
pub mod multicast;
pub mod stat;
pub mod status;

use std::io;

/// Reads a whole file below `/proc/PID`, bounded to 256 MiB.
///
/// # Errors
/// ENOENT or ESRCH when the task is gone.
pub fn read(pid: i32, name: &str) -> crate::error::Result<Vec<u8>> {
    use std::io::Read;
    let path = format!("/proc/{pid}/{name}");
    let open = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(4096);
        std::fs::File::open(&path)?.take(256 << 20).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    open().map_err(|source| crate::error::Error::new("read").task(pid).object(path).because(source))
}

/// When the task `pid` was started, in clock ticks since boot: with its id, what tells it from every other. `None` when it
/// has ended, a zombie included.
pub fn living_since(pid: i32) -> Option<u64> {
    let text = read(pid, "stat").ok()?;
    let stat = stat::parse(&text).ok()?;
    (!matches!(stat.state, b'Z' | b'X')).then_some(stat.starttime)
}
