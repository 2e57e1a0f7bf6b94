//! Pipes, with what is in them.

use std::os::fd::{AsFd, OwnedFd};

use rustix::pipe::{PipeFlags, SpliceFlags};
use whimbrel_images::proto::{FdTypes, FileEntry, PipeDataEntry, PipeEntry};

use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::resource::FileKind;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};

/// Anonymous pipes.
pub struct Pipe;

/// Largest amount of data that a pipe can be asked to hold without further checks, in bytes.
const MAX_DATA: u32 = 1 << 30;

impl FileKind for Pipe {
    fn name(&self) -> &'static str {
        "pipe"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Pipe]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        file.file_type() == libc::S_IFIFO && file.link.starts_with(b"pipe:")
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let pipe_id = file.stat.st_ino as u32;
        if dump.shared.first(FdTypes::Pipe, file.stat.st_ino) {
            let Contents { data, packets } = peek(file).map_err(|error| error.object(file.describe()))?;
            let size = sys::fcntl_int(file.handle.as_fd(), libc::F_GETPIPE_SZ, 0)
                .ok()
                .map(|size| size as u32);
            let entry = PipeDataEntry {
                pipe_id,
                bytes: data.len() as u32,
                size,
                packets,
            };
            dump.append("pipes-data.img", &entry, &data)?;
        }
        let pipe = PipeEntry {
            id,
            pipe_id,
            flags: file.flags(),
            fown: file.owner(),
        };
        Ok(FileEntry {
            r#type: FdTypes::Pipe as i32,
            id,
            pipe: Some(pipe),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let pipe = entry
            .pipe
            .as_ref()
            .ok_or_else(|| Error::new("restore a pipe").because("the image has no pipe entry"))?;
        let key = u64::from(pipe.pipe_id);
        // The pipe stays held while files are opened: an end that nobody has must still be closed by nobody.
        if !restore.held.contains_key(&(FdTypes::Pipe, key)) {
            let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
                .map_err(std::io::Error::from)
                .context("make a pipe")?;
            fill(restore, pipe.pipe_id, &writer)?;
            let another = fd::reopen(reader.as_fd(), libc::O_RDONLY as u32).context("open an end of a pipe")?;
            restore.hold(FdTypes::Pipe, key, another);
            restore.hold(FdTypes::Pipe, key | FIRST_READER, reader);
            restore.hold(FdTypes::Pipe, key | FIRST_WRITER, writer);
        }
        // The first of each kind is what pipe(2) gave: files that are opened have O_LARGEFILE, for all to see.
        let first = match pipe.flags & libc::O_ACCMODE as u32 {
            access if access == libc::O_RDONLY as u32 => restore.held.remove(&(FdTypes::Pipe, key | FIRST_READER)),
            access if access == libc::O_WRONLY as u32 => restore.held.remove(&(FdTypes::Pipe, key | FIRST_WRITER)),
            _ => None,
        };
        if let Some(file) = first {
            sys::fcntl_int(file.as_fd(), libc::F_SETFL, pipe.flags as i32).context("set the flags of a pipe")?;
            fd::restore_owner(file.as_fd(), &pipe.fown)?;
            return Ok(file);
        }
        let held = &restore.held[&(FdTypes::Pipe, key)];
        let file = fd::reopen(held.as_fd(), pipe.flags & !(libc::O_DIRECT as u32)).context("open an end of a pipe")?;
        if pipe.flags & libc::O_DIRECT as u32 != 0 {
            // Packet mode cannot be opened, only set.
            sys::fcntl_int(file.as_fd(), libc::F_SETFL, pipe.flags as i32).context("set packet mode")?;
        }
        fd::restore_owner(file.as_fd(), &pipe.fown)?;
        Ok(file)
    }
}

/// Marks of the ends that a pipe was made with, beside the ids of pipes, which have 32 bits.
const FIRST_READER: u64 = 1 << 32;
const FIRST_WRITER: u64 = 1 << 33;

/// What is in a pipe.
#[derive(Default)]
pub(super) struct Contents {
    /// The bytes.
    pub data: Vec<u8>,
    /// Lengths of packets, if they are any.
    pub packets: Vec<u32>,
}

/// Copies what is in the pipe without taking it out: tee(2) duplicates its buffers into a pipe of ours.
pub(super) fn peek(file: &OpenFile) -> Result<Contents> {
    let io = |errno: rustix::io::Errno| std::io::Error::from(errno);
    let reader =
        fd::reopen(file.handle.as_fd(), (libc::O_RDONLY | libc::O_NONBLOCK) as u32).context("open the pipe")?;
    let queued = rustix::io::ioctl_fionread(&reader)
        .map_err(io)
        .context("ask for the amount of data")?;
    if queued == 0 {
        return Ok(Contents::default());
    }
    let (copy, sink) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
        .map_err(io)
        .context("make a pipe")?;
    let capacity = sys::fcntl_int(file.handle.as_fd(), libc::F_GETPIPE_SZ, 0).context("ask for the size")?;
    // One more page, for the mark below; an ordinary user may not have it.
    sys::fcntl_int(sink.as_fd(), libc::F_SETPIPE_SZ, capacity + 4096)
        .or_else(|_| sys::fcntl_int(sink.as_fd(), libc::F_SETPIPE_SZ, capacity))
        .context("size a pipe")?;
    let copied = rustix::pipe::tee(&reader, &sink, queued as usize, SpliceFlags::NONBLOCK)
        .map_err(io)
        .context("copy the data")?;
    // A read ends behind a packet, and nowhere else before the end of what there is (pipe(2), O_DIRECT): that the last
    // bytes are a packet, too, shows in a byte behind them that is not.
    let mark = usize::from(rustix::io::write(&sink, &[0]).is_ok());
    let mut data = vec![0u8; copied + mark];
    let (mut filled, mut packets) = (0, Vec::new());
    while filled < copied {
        let length = rustix::io::read(&copy, &mut data[filled..])
            .map_err(io)
            .context("read the data")?;
        filled += length;
        packets.push((filled.min(copied) - (filled - length)) as u32);
    }
    if packets.len() == 1 && filled == copied + mark {
        packets.clear();
    }
    data.truncate(copied);
    if copied as u64 != queued {
        return Err(Error::new("copy the data of a pipe").because(format!("{copied} of {queued} bytes were copied")));
    }
    Ok(Contents { data, packets })
}

fn fill(restore: &FileRestore<'_>, pipe_id: u32, writer: &OwnedFd) -> Result<()> {
    let Some((size, contents)) = data_of(restore, "pipes-data.img", pipe_id)? else {
        return Ok(());
    };
    if let Some(size) = size {
        sys::fcntl_int(writer.as_fd(), libc::F_SETPIPE_SZ, size as i32).context("set the size of a pipe")?;
    }
    write_all(writer, &contents)
}

/// Size and contents of a pipe in `image`.
pub(super) fn data_of(restore: &FileRestore<'_>, image: &str, pipe_id: u32) -> Result<Option<(Option<u32>, Contents)>> {
    let Some(mut image) = restore.image(image)? else {
        return Ok(None);
    };
    while let Some(entry) = image.next::<PipeDataEntry>().context("read pipe data")? {
        if entry.bytes > MAX_DATA {
            return Err(Error::new("read pipe data").because(format!("{} bytes in one pipe", entry.bytes)));
        }
        let data = image.extra(u64::from(entry.bytes)).context("read pipe data")?;
        if entry.pipe_id == pipe_id {
            let packets = entry.packets;
            return Ok(Some((entry.size, Contents { data, packets })));
        }
    }
    Ok(None)
}

/// Writes all of it into a pipe, which must not wait; its flags are changed.
pub(super) fn write_all(writer: &OwnedFd, contents: &Contents) -> Result<()> {
    let mode = if contents.packets.is_empty() { 0 } else { libc::O_DIRECT };
    sys::fcntl_int(writer.as_fd(), libc::F_SETFL, libc::O_NONBLOCK | mode).context("fill a pipe")?;
    let mut data = &contents.data[..];
    let mut packets = contents.packets.iter().map(|&length| length as usize);
    while !data.is_empty() {
        let length = packets.next().unwrap_or(data.len()).clamp(1, data.len());
        let written = rustix::io::write(writer, &data[..length])
            .map_err(std::io::Error::from)
            .context("fill a pipe")?;
        data = &data[written..];
    }
    Ok(())
}
