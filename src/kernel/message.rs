//! Looking at the messages in a socket's queue, with everything that is attached to them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A message, or a piece of a stream.
#[derive(Debug, Default)]
pub struct Message {
    /// Bytes that the message has, which may be more than there was room for.
    pub length: usize,
    /// The sender's name: a path without closing zero, a zero byte and an abstract name, or nothing.
    pub from: Vec<u8>,
    /// Descriptors that are attached: duplicates of our own.
    pub rights: Vec<OwnedFd>,
    /// Process, user and group of the sender, where the receiver asked for them (SO_PASSCRED) and the kernel knows.
    pub sender: Option<(i32, u32, u32)>,
}

const NAME_AT: usize = std::mem::offset_of!(libc::sockaddr_un, sun_path);
const SCM_PIDFD: i32 = 4;
/// The most descriptors that a message carries (SCM_MAX_FD), and room for what else comes with it.
const CONTROL: usize = 253 * 4 + 1024;

/// `recvmsg(2)` with MSG_PEEK: copies what is at the socket's peek offset (SO_PEEK_OFF), which moves on.
///
/// # Errors
/// EAGAIN when there is nothing more.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Message> {
    receive(socket, buffer, libc::MSG_PEEK)
}

/// `recvmsg(2)`: takes what is next.
///
/// # Errors
/// EAGAIN when there is nothing.
#[cfg(test)]
pub fn take_next(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Message> {
    receive(socket, buffer, 0)
}

fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: i32) -> io::Result<Message> {
    let mut message = Message::default();
    let flags = flags | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    let received = receive_with(socket, buffer, flags, |kind, data| take(&mut message, kind, data))?;
    message.length = received.length;
    message.from = name_of(received.name());
    if received.flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::other("more is attached to a message than there is room for"));
    }
    Ok(message)
}

/// What recvmsg(2) returns beside the bytes and what is attached to them.
pub(super) struct Received {
    /// Bytes that were copied, or, with MSG_TRUNC, that there are.
    pub length: usize,
    /// MSG_CTRUNC and its like.
    pub flags: i32,
    name: [u8; size_of::<libc::sockaddr_storage>()],
    name_length: usize,
}

impl Received {
    /// The sender's address, as the kernel writes it.
    pub fn name(&self) -> &[u8] {
        &self.name[..self.name_length.min(self.name.len())]
    }
}

/// `recvmsg(2)`, which does not wait. Each control message goes to `attached`, with its level and type.
///
/// # Errors
/// EAGAIN when there is nothing.
pub(super) fn receive_with(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    flags: i32,
    mut attached: impl FnMut((i32, i32), &[u8]),
) -> io::Result<Received> {
    let mut control = [0u64; CONTROL / 8];
    let mut name = [0; size_of::<libc::sockaddr_storage>()];
    // SAFETY: all bytes may be zero.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    let mut piece = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = size_of_val(&name) as libc::socklen_t;
    header.msg_iov = &raw mut piece;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    let flags = flags | libc::MSG_DONTWAIT;
    // SAFETY: the header names memory of ours with its sizes, all of which lives until the call returns.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    if length < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the header's control buffer is what the kernel just wrote; so it is for the calls in the loop.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return headers that lie within the control buffer, aligned as it is.
        let head = unsafe { next.read() };
        // SAFETY: as above.
        let data = unsafe { libc::CMSG_DATA(next) };
        // SAFETY: no pointers.
        let before = unsafe { libc::CMSG_LEN(0) } as usize;
        let size = (head.cmsg_len as usize).saturating_sub(before);
        // SAFETY: the kernel wrote `size` bytes of data behind this header.
        let data = unsafe { std::slice::from_raw_parts(data, size) };
        attached((head.cmsg_level, head.cmsg_type), data);
        // SAFETY: as CMSG_FIRSTHDR.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    Ok(Received {
        length: length as usize,
        flags: header.msg_flags,
        name,
        name_length: header.msg_namelen as usize,
    })
}

/// Where the last of the writes begins that make up the `scratch.len()` bytes of a stream at its peek offset, which must end
/// with that write.
///
/// The kernel does not tell, and while it peeks it hands out descriptors of writes that it copies nothing of. But it copies
/// whole writes or nothing of them: when the room for the last byte is not writable, it gives the bytes before the last write.
///
/// # Errors
/// EAGAIN when there is nothing.
pub fn start_of_last(socket: BorrowedFd<'_>, scratch: &mut [u8]) -> io::Result<usize> {
    let Some(room) = scratch.len().checked_sub(1) else {
        return Ok(0);
    };
    // SAFETY: a new mapping at an address of the kernel's choice, which nothing refers to.
    let forbidden = unsafe { libc::mmap(std::ptr::null_mut(), 1, libc::PROT_NONE, PRIVATE, -1, 0) };
    if forbidden == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let mut pieces = [
        libc::iovec {
            iov_base: scratch.as_mut_ptr().cast(),
            iov_len: room,
        },
        libc::iovec {
            iov_base: forbidden,
            iov_len: 1,
        },
    ];
    // SAFETY: all bytes may be zero; there is no room for descriptors, so none are made.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = pieces.as_mut_ptr();
    header.msg_iovlen = 2;
    // SAFETY: the first piece is `scratch`, and the kernel checks what it writes to: the second is not writable.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    let error = io::Error::last_os_error();
    // SAFETY: the mapping from above, which only `pieces` referred to.
    unsafe { libc::munmap(forbidden, 1) };
    match length {
        0.. => Ok(length as usize),
        _ if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
        _ => Err(error),
    }
}

const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

fn take(message: &mut Message, kind: (i32, i32), data: &[u8]) {
    let words: Vec<i32> = data
        .chunks_exact(4)
        .map(|word| i32::from_ne_bytes(word.try_into().unwrap_or_default()))
        .collect();
    match (kind, &words[..]) {
        ((libc::SOL_SOCKET, libc::SCM_RIGHTS | SCM_PIDFD), _) => {
            for &fd in words.iter().filter(|&&fd| fd >= 0) {
                // SAFETY: the kernel just made this descriptor for us.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                if kind.1 == libc::SCM_RIGHTS {
                    message.rights.push(fd);
                }
            }
        }
        ((libc::SOL_SOCKET, libc::SCM_CREDENTIALS), &[pid, uid, gid]) if pid > 0 => {
            message.sender = Some((pid, uid as u32, gid as u32));
        }
        _ => {}
    }
}

/// The name in a `sockaddr_un`.
fn name_of(address: &[u8]) -> Vec<u8> {
    let bytes = address.get(NAME_AT..).unwrap_or_default();
    match bytes.first() {
        None => Vec::new(),
        Some(0) => bytes.to_vec(),
        Some(_) => bytes.split(|&byte| byte == 0).next().unwrap_or_default().to_vec(),
    }
}

/// Has the other end of a socket of messages ended, so that a message without bytes may be the end and not a message?
///
/// # Errors
/// When the socket cannot be polled.
pub fn is_end(socket: BorrowedFd<'_>) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut waiting = [PollFd::new(&socket, PollFlags::RDHUP)];
    poll(&mut waiting, Some(&rustix::time::Timespec::default()))?;
    Ok(waiting[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP))
}
