//! The memory of another process.

use std::fmt;

use crate::error::{Context, Error, Result};

/// An address in another process: never dereferenced here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RemoteAddr(pub u64);

impl fmt::Debug for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for RemoteAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl std::ops::Add<u64> for RemoteAddr {
    type Output = RemoteAddr;
    fn add(self, offset: u64) -> RemoteAddr {
        RemoteAddr(self.0.wrapping_add(offset))
    }
}

/// Access to the memory of one process by `process_vm_readv(2)` and `process_vm_writev(2)`.
#[derive(Clone, Copy, Debug)]
pub struct RemoteMemory {
    pid: i32,
}

/// Pieces per system call: the kernel's UIO_MAXIOV.
const MAX_PIECES: usize = 1024;

impl RemoteMemory {
    /// The memory of process `pid`.
    pub fn new(pid: i32) -> Self {
        RemoteMemory { pid }
    }

    /// Fills `buffer` from `address`.
    ///
    /// # Errors
    /// When part of the range is not readable, or the process is gone.
    pub fn read(&self, address: RemoteAddr, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len();
        let read = self.read_pieces(&[(address, length)], buffer)?;
        if read == length {
            Ok(())
        } else {
            Err(self.short("read memory", address, read, length))
        }
    }

    /// Reads `length` bytes at `address`.
    ///
    /// # Errors
    /// As [`RemoteMemory::read`].
    pub fn read_vec(&self, address: RemoteAddr, length: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0; length];
        self.read(address, &mut buffer)?;
        Ok(buffer)
    }

    /// Reads pieces one after the other into `buffer`; returns how many bytes were read before the first unreadable page.
    ///
    /// # Errors
    /// When nothing could be read.
    pub fn read_pieces(&self, pieces: &[(RemoteAddr, usize)], buffer: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        for chunk in pieces.chunks(MAX_PIECES) {
            let remote: Vec<libc::iovec> = chunk.iter().map(|&(address, length)| iovec(address, length)).collect();
            let wanted: usize = chunk.iter().map(|&(_, length)| length).sum();
            let part = &mut buffer[done..done + wanted];
            let local = libc::iovec {
                iov_base: part.as_mut_ptr().cast(),
                iov_len: part.len(),
            };
            // SAFETY: `local` is one live, exclusively borrowed slice; remote addresses are checked by the kernel.
            let read = unsafe {
                libc::process_vm_readv(self.pid, &local, 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0)
            };
            if read < 0 {
                if done > 0 {
                    return Ok(done);
                }
                return Err(Error::os("read memory").task(self.pid).object(chunk[0].0.to_string()));
            }
            done += read as usize;
            if (read as usize) < wanted {
                break;
            }
        }
        Ok(done)
    }

    /// Writes `bytes` at `address`.
    ///
    /// # Errors
    /// When part of the range is not writable, or the process is gone.
    pub fn write(&self, address: RemoteAddr, bytes: &[u8]) -> Result<()> {
        let local = libc::iovec {
            iov_base: bytes.as_ptr() as *mut _,
            iov_len: bytes.len(),
        };
        let remote = iovec(address, bytes.len());
        // SAFETY: the kernel only reads from `local`; the remote address is checked by the kernel.
        let written = unsafe { libc::process_vm_writev(self.pid, &local, 1, &remote, 1, 0) };
        if written < 0 {
            return Err(Error::os("write memory").task(self.pid).object(address.to_string()));
        }
        if written as usize != bytes.len() {
            return Err(self.short("write memory", address, written as usize, bytes.len()));
        }
        Ok(())
    }

    /// Writes where the mapping itself is not writable, as a debugger does (private mappings are copied first).
    ///
    /// # Errors
    /// When the range is not mapped, or is a shared mapping without write permission.
    pub fn write_forced(&self, address: RemoteAddr, bytes: &[u8]) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let failed = || Error::new("write memory").task(self.pid).object(address.to_string());
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/{}/mem", self.pid))
            .with(failed)?;
        file.write_all_at(bytes, address.0).with(failed)
    }

    fn short(&self, what: &str, address: RemoteAddr, done: usize, wanted: usize) -> Error {
        let at = address + done as u64;
        Error::new(what).task(self.pid).object(at.to_string()).because(format!(
            "only {done} of {wanted} bytes at {address} could be transferred"
        ))
    }
}

fn iovec(address: RemoteAddr, length: usize) -> libc::iovec {
    libc::iovec {
        iov_base: address.0 as *mut _,
        iov_len: length,
    }
}
