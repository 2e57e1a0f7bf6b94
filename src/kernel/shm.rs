//! System V shared memory: shmget(2), shmctl(2), shmat(2).

use std::fs::File;
use std::io;

/// `shm_perm.mode`: it goes when nobody has it attached any more.
pub const SHM_DEST: u32 = 0o1000;
/// `shm_perm.mode`: it is not swapped.
pub const SHM_LOCKED: u32 = 0o2000;
/// The flag of shmget(2) for huge pages.
pub const SHM_HUGETLB: u32 = 0o4000;

/// What the kernel tells of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its key; 0 when it has none, or was removed.
    pub key: u32,
    /// Owner.
    pub uid: u32,
    /// Group of the owner.
    pub gid: u32,
    /// Who made it.
    pub creator_uid: u32,
    /// Group of who made it.
    pub creator_gid: u32,
    /// Permissions, and [`SHM_DEST`] and [`SHM_LOCKED`].
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// How many mappings show it.
    pub attached: u64,
    /// The process that made it.
    pub creator: i32,
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn control(id: i32, command: i32, buffer: &mut libc::shmid_ds) -> io::Result<()> {
    // SAFETY: `buffer` is what IPC_STAT fills and IPC_SET reads; the other commands do not look at it.
    check(unsafe { libc::shmctl(id, command, buffer) }).map(drop)
}

fn empty() -> libc::shmid_ds {
    // SAFETY: plain numbers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

/// Looks at a segment.
///
/// # Errors
/// EINVAL or EIDRM when there is none with this id in our IPC namespace, EACCES when it cannot be read.
pub fn status(id: i32) -> io::Result<Status> {
    let mut found = empty();
    control(id, libc::IPC_STAT, &mut found)?;
    Ok(Status {
        key: found.shm_perm.__key as u32,
        uid: found.shm_perm.uid,
        gid: found.shm_perm.gid,
        creator_uid: found.shm_perm.cuid,
        creator_gid: found.shm_perm.cgid,
        mode: u32::from(found.shm_perm.mode),
        size: found.shm_segsz as u64,
        attached: found.shm_nattch,
        creator: found.shm_cpid,
    })
}

/// Makes a segment; with a key of 0 it has none.
///
/// # Errors
/// EEXIST when there is one with this key, ENOMEM, ENOSPC.
#[cfg(test)]
pub fn make(key: u32, size: u64, mode: u32) -> io::Result<i32> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode as i32;
    // SAFETY: no pointers.
    check(unsafe { libc::shmget(key as libc::key_t, size as usize, flags) })
}

/// The id of the segment that has a key.
///
/// # Errors
/// EACCES when it cannot be looked at.
pub fn find(key: u32) -> io::Result<Option<i32>> {
    // SAFETY: no pointers.
    match check(unsafe { libc::shmget(key as libc::key_t, 0, 0) }) {
        Ok(id) => Ok(Some(id)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets owner and permissions.
///
/// # Errors
/// EPERM for somebody else's segment.
pub fn set(id: i32, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    let mut wanted = empty();
    (wanted.shm_perm.uid, wanted.shm_perm.gid) = (uid, gid);
    wanted.shm_perm.mode = (mode & 0o777) as _;
    control(id, libc::IPC_SET, &mut wanted)
}

/// Keeps a segment from being swapped.
///
/// # Errors
/// EPERM, or ENOMEM for the limit of locked memory.
pub fn lock(id: i32) -> io::Result<()> {
    control(id, libc::SHM_LOCK, &mut empty())
}

/// Removes a segment: now, or when nobody has it attached any more.
///
/// # Errors
/// EPERM for somebody else's segment.
pub fn remove(id: i32) -> io::Result<()> {
    control(id, libc::IPC_RMID, &mut empty())
}

/// Chooses the id of the next segment that anybody makes in our IPC namespace.
///
/// # Errors
/// ENOENT without CONFIG_CHECKPOINT_RESTORE, EACCES without CAP_CHECKPOINT_RESTORE.
pub fn choose_next_id(id: i32) -> io::Result<()> {
    std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string())
}

/// A segment attached to this process, until dropped.
#[derive(Debug)]
pub struct Attachment {
    address: usize,
    size: u64,
}

impl Attachment {
    /// Attaches a segment of `size` bytes.
    ///
    /// # Errors
    /// EINVAL when there is none, EACCES when it may not be written, ENOMEM.
    pub fn new(id: i32, size: u64) -> io::Result<Attachment> {
        // SAFETY: the kernel chooses the address, so nothing of ours is touched.
        let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if address as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Attachment {
            address: address as usize,
            size,
        })
    }

    /// Its memory as a file, which reads and writes by offset.
    ///
    /// # Errors
    /// EPERM without CAP_CHECKPOINT_RESTORE.
    pub fn file(&self) -> io::Result<File> {
        let start = self.address as u64;
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        // Its end depends on the size of its pages.
        let line = maps.lines().find(|line| line.starts_with(&format!("{start:08x}-")));
        let range = line.and_then(|line| line.split(' ').next());
        let range = range.ok_or_else(|| io::Error::other("the segment is not mapped where it was attached"))?;
        let name = |range: &str| {
            let (start, end) = range.split_once('-')?;
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            Some(format!("{:x}-{:x}", number(start)?, number(end)?))
        };
        let name = name(range).ok_or_else(|| io::Error::other("a line of maps is damaged"))?;
        File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/map_files/{name}"))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // SAFETY: attached by us at this address, and nothing refers to it.
        unsafe { libc::shmdt(self.address as *const libc::c_void) };
    }
}
