//! Memory of the controller itself, for what can only be made by mapping it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// A part of a file, mapped for the kernel to read from: nothing here looks into it, so that a file that shrinks under it
/// makes a system call fail, and nothing worse.
pub struct Window {
    address: u64,
    length: usize,
}

impl Window {
    /// Maps `length` bytes at `offset`, a multiple of the page size, with their page tables filled.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn of(file: &File, offset: u64, length: usize) -> io::Result<Window> {
        use std::os::fd::AsRawFd;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                offset as i64,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Window {
            address: address as u64,
            length,
        })
    }

    /// Its address here.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping made by `of`, whose address was only handed to system calls.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.length) };
    }
}

/// A new segment of shared anonymous memory as a file: what the kernel shows as `/dev/zero (deleted)`.
///
/// There is no system call that makes one without mapping it; it is mapped here, opened through `map_files`, unmapped.
///
/// # Errors
/// ENOMEM for the size; EPERM to open it without CAP_CHECKPOINT_RESTORE.
pub fn shared_anonymous(size: u64) -> io::Result<OwnedFd> {
    let length = usize::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), length, prot, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let (start, end) = (address as u64, address as u64 + size.next_multiple_of(4096));
    let file = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/map_files/{start:x}-{end:x}"));
    // SAFETY: the mapping made above, to which nothing refers.
    unsafe { libc::munmap(address, length) };
    Ok(file?.into())
}
