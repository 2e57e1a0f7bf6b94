//! Memory of the controller itself, for what can only be made by mapping it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

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
