//! What is on its way in a pseudo terminal.
//!
//! Nobody can look at it without taking it out, so it is taken out and put back at once, with the tree frozen: typed again,
//! shown again, under settings that leave every character as it is.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use whimbrel_images::proto::TtyDataEntry;

use super::open_slave;
use crate::error::{Context, Error, Result};
use crate::kernel::files::{self, TERMIOS2};

/// Offsets of `c_iflag`, `c_oflag`, `c_lflag` and `c_cc` in `struct termios2`.
const IFLAG: usize = 0;
const OFLAG: usize = 4;
const LFLAG: usize = 12;
const CHARACTERS: usize = 17;
/// What the line discipline holds; more stays behind in buffers of the driver (N_TTY_BUF_SIZE).
const HELD: i32 = 4095;
/// Characters that have a meaning while input is typed again.
const END: u8 = 4;
const LITERAL: u8 = 0x16;
/// More is in no terminal.
const MOST: usize = 1 << 20;

type Settings = [u8; TERMIOS2];

fn word(settings: &Settings, at: usize) -> u32 {
    u32::from_ne_bytes([settings[at], settings[at + 1], settings[at + 2], settings[at + 3]])
}

fn put(settings: &mut Settings, at: usize, word: u32) {
    settings[at..at + 4].copy_from_slice(&word.to_ne_bytes());
}

fn has_lines(settings: &Settings) -> bool {
    word(settings, LFLAG) & libc::ICANON != 0
}

fn ready(file: BorrowedFd<'_>, wanted: PollFlags, milliseconds: i64) -> bool {
    let time = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: milliseconds * 1_000_000,
    };
    let mut fds = [PollFd::from_borrowed_fd(file, wanted)];
    poll(&mut fds, Some(&time)).is_ok() && fds[0].revents().intersects(wanted)
}

/// Settings for a moment; the old ones come back when this is dropped.
struct For<'a>(BorrowedFd<'a>, Settings);

impl<'a> For<'a> {
    fn a_moment(slave: BorrowedFd<'a>, old: Settings, new: &Settings) -> Result<For<'a>> {
        let held = For(slave, old);
        files::set(slave, files::TCSETS2, new).context("set a terminal's settings")?;
        Ok(held)
    }
}

impl Drop for For<'_> {
    fn drop(&mut self) {
        if let Err(error) = files::set(self.0, files::TCSETS2, &self.1) {
            tracing::warn!(%error, "the settings of a terminal were not set back");
        }
    }
}

/// Packet mode off, until this is dropped: it puts a byte before what is read.
struct Plainly<'a>(BorrowedFd<'a>, bool);

impl<'a> Plainly<'a> {
    fn read(master: BorrowedFd<'a>) -> Result<Plainly<'a>> {
        let on = files::get_int(master, files::TIOCGPKT).context("ask for packet mode")? != 0;
        if on {
            files::set(master, files::TIOCPKT, &0i32.to_ne_bytes()).context("set packet mode")?;
        }
        Ok(Plainly(master, on))
    }
}

impl Drop for Plainly<'_> {
    fn drop(&mut self) {
        if self.1 {
            let _ = files::set(self.0, files::TIOCPKT, &1i32.to_ne_bytes());
        }
    }
}

/// Does a slave's output stand still? To be asked when nothing of it waits at the master.
fn stands_still(slave: BorrowedFd<'_>) -> bool {
    !ready(slave, PollFlags::OUT, 0)
}

/// Why what is on its way cannot be taken out and put back. (The tree may be running: a slave that nobody has is not opened.)
pub(super) fn obstacle(master: BorrowedFd<'_>, slave_is_open: bool) -> Result<Option<String>> {
    let (mut typed, shown) = (false, ready(master, PollFlags::IN, 0));
    if slave_is_open {
        let slave = open_slave(master, libc::O_RDWR)?;
        typed = ready(slave.as_fd(), PollFlags::IN, 0);
        if files::get_int(slave.as_fd(), files::FIONREAD).is_ok_and(|waiting| waiting >= HELD) {
            return Ok(Some("more was typed than its buffer holds".to_owned()));
        }
    }
    let locked = files::get(master, files::TIOCGLCKTRMIOS).is_ok_and(|locked| locked.iter().any(|&byte| byte != 0));
    if (typed || shown) && locked {
        return Ok(Some("it has unread data, and its settings are locked".to_owned()));
    }
    if (typed || shown) && !rustix::process::geteuid().is_root() {
        return Ok(Some("it has unread data, which only root can put back".to_owned()));
    }
    Ok(None)
}

/// Copies what was typed and not read.
pub(super) fn typed(master: BorrowedFd<'_>) -> Result<TtyDataEntry> {
    let slave = open_slave(master, libc::O_RDWR | libc::O_NONBLOCK)?;
    let slave = slave.as_fd();
    let settings = files::get(slave, files::TCGETS2).context("ask for a terminal's settings")?;
    let mut data = TtyDataEntry::default();
    let mut buffer = vec![0; 1 << 13];
    // Lines one by one: an end of file that was typed ends one, too.
    while has_lines(&settings) && ready(slave, PollFlags::IN, 0) && data.data.len() + data.ends.len() < MOST {
        let count = rustix::io::read(slave, &mut buffer)
            .map_err(std::io::Error::from)
            .context("read a terminal's input")?;
        data.data.extend_from_slice(&buffer[..count]);
        let ends = |byte: u8| {
            byte == b'\n'
                || [libc::VEOL, libc::VEOL2]
                    .iter()
                    .any(|&at| byte != 0 && settings[CHARACTERS + at] == byte)
        };
        if !buffer[..count].last().copied().is_some_and(ends) {
            data.ends.push(data.data.len() as u32);
        }
    }
    // Then the line that is not complete.
    let mut raw = settings;
    put(&mut raw, LFLAG, word(&settings, LFLAG) & !libc::ICANON);
    (raw[CHARACTERS + libc::VMIN], raw[CHARACTERS + libc::VTIME]) = (1, 0);
    {
        let _held = For::a_moment(slave, settings, &raw)?;
        take(slave, &mut data.data)?;
    }
    type_again(master, &data)?;
    Ok(data)
}

/// Types input into a terminal, as if its settings had let it pass.
pub(super) fn type_again(master: BorrowedFd<'_>, data: &TtyDataEntry) -> Result<()> {
    if data.data.is_empty() && data.ends.is_empty() {
        return Ok(());
    }
    let slave = open_slave(master, libc::O_RDWR)?;
    let slave = slave.as_fd();
    let settings = files::get(slave, files::TCGETS2).context("ask for a terminal's settings")?;
    let lines = has_lines(&settings);
    let mut quiet = settings;
    // Without IXON, output that was stopped would go on.
    put(&mut quiet, IFLAG, word(&settings, IFLAG) & libc::IXON);
    put(&mut quiet, LFLAG, if lines { libc::ICANON | libc::IEXTEN } else { 0 });
    quiet[CHARACTERS..CHARACTERS + 19].fill(0);
    quiet[CHARACTERS + libc::VMIN] = 1;
    if lines {
        for at in [libc::VEOL, libc::VEOL2] {
            quiet[CHARACTERS + at] = settings[CHARACTERS + at];
        }
        quiet[CHARACTERS + libc::VEOF] = END;
        quiet[CHARACTERS + libc::VLNEXT] = LITERAL;
    }
    let _held = For::a_moment(slave, settings, &quiet)?;
    // What is typed through the master comes a moment later, with whatever settings there are then; this comes at once.
    let put = |byte: u8| files::set(slave, files::TIOCSTI, &[byte]).context("type into a terminal");
    let mut ends = data.ends.iter().peekable();
    for (at, &byte) in (0u32..).zip(&data.data) {
        while lines && ends.next_if(|&&end| end <= at).is_some() {
            put(END)?;
        }
        if lines && matches!(byte, END | LITERAL) {
            put(LITERAL)?;
        }
        put(byte)?;
    }
    if lines {
        ends.try_for_each(|_| put(END))?;
    }
    Ok(())
}

/// Copies what was shown and not read, and tells whether output is stopped.
pub(super) fn shown(master: BorrowedFd<'_>, slave_is_open: bool) -> Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let slave = open_slave(master, libc::O_RDWR)?;
    // What was typed is looked at now, and its echo shown.
    ready(slave.as_fd(), PollFlags::IN, 0);
    {
        let _plainly = Plainly::read(master)?;
        take(master, &mut bytes)?;
    }
    let stopped = slave_is_open && stands_still(slave.as_fd());
    if stopped && !bytes.is_empty() {
        // Whatever stopped it: tcflow(3) starts only what it has stopped.
        for action in [libc::TCOOFF, libc::TCOON] {
            files::plain(slave.as_fd(), files::TCXONC, action).context("start a terminal's output")?;
        }
    }
    show_again(master, &bytes)?;
    if stopped && !bytes.is_empty() {
        stop(slave.as_fd())?;
    }
    Ok((bytes, stopped))
}

/// Shows output to a master, as if the settings of the slave had let it pass.
pub(super) fn show_again(master: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let slave = open_slave(master, libc::O_RDWR | libc::O_NONBLOCK)?;
    let settings = files::get(slave.as_fd(), files::TCGETS2).context("ask for a terminal's settings")?;
    let mut raw = settings;
    put(&mut raw, OFLAG, 0);
    let _held = For::a_moment(slave.as_fd(), settings, &raw)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::io::write(&slave, rest) {
            Ok(count) => rest = &rest[count.min(rest.len())..],
            Err(rustix::io::Errno::AGAIN) if ready(slave.as_fd(), PollFlags::OUT, 900) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(Error::new("write to a terminal")
                    .object(format!("{} bytes of output", rest.len()))
                    .because(std::io::Error::from(error)));
            }
        }
    }
    Ok(())
}

/// Stops the output of a slave.
pub(super) fn stop(slave: BorrowedFd<'_>) -> Result<()> {
    let settings = files::get(slave, files::TCGETS2).context("ask for a terminal's settings")?;
    let stop = settings[CHARACTERS + libc::VSTOP];
    // Nothing tells whether it was typed or called for; where it could be typed it most likely was, and then only typing
    // starts it again.
    let stopped = if word(&settings, IFLAG) & libc::IXON != 0 && stop != 0 && rustix::process::geteuid().is_root() {
        files::set(slave, files::TIOCSTI, &[stop])
    } else {
        files::plain(slave, files::TCXONC, libc::TCOOFF).map(drop)
    };
    stopped.context("stop a terminal's output")
}

/// Reads all that can be read.
fn take(file: BorrowedFd<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    let mut buffer = vec![0; 1 << 14];
    while bytes.len() < MOST && ready(file, PollFlags::IN, 0) {
        match rustix::io::read(file, &mut buffer) {
            Ok(0) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::IO) => break,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) => return Err(std::io::Error::from(error)).context("read a terminal"),
        }
    }
    Ok(())
}

/// What images have of a terminal's end.
pub(super) fn of(restore: &crate::resource::fd::FileRestore<'_>, info: u32) -> Result<TtyDataEntry> {
    let mut all = TtyDataEntry::default();
    if let Some(mut image) = restore.image("tty-data.img")? {
        while let Some(data) = image.next::<TtyDataEntry>().context("read terminals")? {
            if data.tty_id == info {
                let before = all.data.len() as u32;
                all.ends.extend(data.ends.iter().map(|end| end.saturating_add(before)));
                all.data.extend_from_slice(&data.data);
            }
        }
    }
    if all.data.len() > MOST || all.ends.len() > MOST {
        return Err(Error::new("restore a terminal").because("it has more data than terminals hold"));
    }
    Ok(all)
}
