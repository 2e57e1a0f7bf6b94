//! Netlink: the socket, the writing of messages, and the careful reading of them.
//!
//! Parsers take bytes and never index beyond what a length field allows; a message that is cut short is an error, not a
//! panic.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// Larger than any datagram that the kernel sends in a dump.
const RECEIVE_BUFFER: usize = 256 << 10;

pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;

const NLMSG_NOOP: u16 = 1;
pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_DONE: u16 = 3;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3FFF;

/// A netlink socket. It belongs to the network namespace that the thread was in when it was made.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn new(protocol: libc::c_int) -> io::Result<Self> {
        // SAFETY: socket(2) takes three integers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        // SAFETY: all bytes of a sockaddr_nl may be zero; the kernel then chooses the port.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        let len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: `address` is a valid sockaddr_nl of length `len`.
        if unsafe { libc::bind(fd, std::ptr::from_ref(&address).cast(), len) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    /// Sends messages as one datagram, making room for it if it is large.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > 64 << 10 {
            let size = libc::c_int::try_from(bytes.len() * 2).unwrap_or(libc::c_int::MAX);
            let len = size_of::<libc::c_int>() as libc::socklen_t;
            for option in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
                let value = std::ptr::from_ref(&size).cast();
                // SAFETY: `value` points at an int of length `len`. Without the privilege send(2) tells of the lack.
                unsafe { libc::setsockopt(self.0.as_raw_fd(), libc::SOL_SOCKET, option, value, len) };
            }
        }
        // SAFETY: `bytes` is valid for its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Receives one datagram into `buffer`.
    pub(crate) fn receive<'a>(&self, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        buffer.resize(RECEIVE_BUFFER, 0);
        loop {
            // SAFETY: `buffer` is valid for writes of its length. With MSG_TRUNC the true length is returned.
            let count = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_TRUNC,
                )
            };
            if count >= 0 {
                let count = count as usize;
                return buffer
                    .get(..count)
                    .ok_or_else(|| io::Error::other("netlink message larger than the buffer"));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Sends a dump request and calls `each` with the payload of every message of the answer. Returns whether the tables
    /// changed meanwhile, so that the answer may lack something.
    pub(crate) fn dump(&self, request: &[u8], mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<bool> {
        self.send(request)?;
        let (mut buffer, mut interrupted) = (Vec::new(), false);
        loop {
            for message in Messages(self.receive(&mut buffer)?) {
                let message = message?;
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_DONE => {
                        // The payload, where there is one, is the result of the dump.
                        return match message.payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
                            Some(code) if code < 0 => Err(io::Error::from_raw_os_error(-code)),
                            _ => Ok(interrupted),
                        };
                    }
                    NLMSG_ERROR => return Err(message.error().unwrap_or_else(|| truncated("error message"))),
                    _ => each(message.payload)?,
                }
            }
        }
    }
}

/// One message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

impl Message<'_> {
    /// The error that an [`NLMSG_ERROR`] message tells of; `None` when it is an acknowledgement.
    pub(crate) fn error(&self) -> Option<io::Error> {
        match self.payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
            Some(0) => None,
            Some(code) => Some(io::Error::from_raw_os_error(code.wrapping_neg())),
            None => Some(truncated("error message")),
        }
    }
}

pub(crate) fn truncated(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink {what} is cut short"))
}

/// The messages of a datagram.
pub(crate) struct Messages<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<Message<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        if bytes.is_empty() {
            return None;
        }
        let len = bytes.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len) as usize);
        let Some(message) = bytes.get(..len).filter(|message| message.len() >= HEADER) else {
            self.0 = &[];
            return Some(Err(truncated("message")));
        };
        self.0 = bytes.get(align(len)..).unwrap_or(&[]);
        Some(Ok(Message {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            flags: u16::from_ne_bytes([message[6], message[7]]),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
            payload: &message[HEADER..],
        }))
    }
}

/// The attributes in the rest of a message, as (type, payload).
pub(crate) struct Attributes<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = io::Result<(u16, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.0;
        if bytes.is_empty() {
            return None;
        }
        let len = bytes
            .first_chunk()
            .map_or(0, |len| usize::from(u16::from_ne_bytes(*len)));
        let Some(attribute) = bytes.get(..len).filter(|attribute| attribute.len() >= 4) else {
            self.0 = &[];
            return Some(Err(truncated("attribute")));
        };
        self.0 = bytes.get(align(len)..).unwrap_or(&[]);
        Some(Ok((
            u16::from_ne_bytes([attribute[2], attribute[3]]) & TYPE_MASK,
            &attribute[4..],
        )))
    }
}

/// Writes messages one after the other.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    /// Writes a message: its header, the fixed part of its payload, and what `rest` adds.
    pub(crate) fn message(&mut self, kind: u16, flags: u16, sequence: u32, fixed: &[u8], rest: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 4]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(&flags.to_ne_bytes());
        self.0.extend_from_slice(&sequence.to_ne_bytes());
        self.0.extend_from_slice(&[0; 4]);
        self.0.extend_from_slice(fixed);
        self.pad();
        rest(self);
        let len = (self.0.len() - start) as u32;
        self.0[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.0.extend_from_slice(&((value.len() + 4) as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.pad();
    }

    /// A string with its closing zero.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat());
    }

    /// A number in network byte order, as netfilter wants it.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn nested(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        inner(self);
        let len = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }

    fn pad(&mut self) {
        self.0.resize(align(self.0.len()), 0);
    }
}

fn align(len: usize) -> usize {
    len.saturating_add(3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut writer = Writer::default();
        writer.message(0xA01, NLM_F_REQUEST, 7, &[1, 2, 3, 4], |message| {
            message.string(1, "abc");
            message.nested(2, |inner| inner.be32(3, 0x0102_0304));
        });
        writer.message(5, 0, 8, &[], |_| {});
        let bytes = writer.finish();
        let messages: Vec<_> = Messages(&bytes).map(Result::unwrap).collect();
        assert_eq!(
            (messages.len(), messages[0].kind, messages[0].sequence, messages[1].kind),
            (2, 0xA01, 7, 5)
        );
        let attributes: Vec<_> = Attributes(&messages[0].payload[4..]).map(Result::unwrap).collect();
        assert_eq!(attributes[0], (1, &b"abc\0"[..]));
        let inner: Vec<_> = Attributes(attributes[1].1).map(Result::unwrap).collect();
        assert_eq!(inner, [(3, &[1, 2, 3, 4][..])]);
    }

    #[test]
    fn lengths_that_lie_are_errors() {
        for bytes in [
            &[9, 0, 0, 0][..],
            &[255; 20],
            &[0; 16],
            &[15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert!(Messages(bytes).any(|message| message.is_err()), "{bytes:?}");
        }
        for bytes in [&[3, 0, 1, 0][..], &[9, 0, 1, 0, 0], &[1], &[0, 0, 0, 0]] {
            assert!(Attributes(bytes).any(|attribute| attribute.is_err()), "{bytes:?}");
        }
    }
}
