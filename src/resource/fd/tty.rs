//! Terminals.
//!
//! A pseudo terminal whose two ends are in the tree is made again, under its number: names and settings survive. A terminal
//! whose other end is outside (a shell's, with `--shell-job`) is not ours to make: its descriptors become descriptors of the
//! terminal that the restore is started from.
//!
//! `tty-info.img` has one entry per end: `rdev` tells which it is, `pty.index` which pair it belongs to.

use std::os::fd::{AsFd, OwnedFd};

use whimbrel_images::entry::ImageReader;
use whimbrel_images::proto::{
    FdTypes, FileEntry, RegFileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry,
};

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::procfs;
use crate::remote::Program;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};
use crate::resource::{FileKind, Installing};

/// Terminals, and the two ends of pseudo terminals.
pub struct Tty;

/// Device numbers (Documentation/admin-guide/devices.txt).
const VT_OR_SERIAL: u32 = 4;
const AUXILIARY: u32 = 5;
const SLAVES: std::ops::RangeInclusive<u32> = 136..=143;
const CURRENT: u64 = 0x500;
const CONSOLE: u64 = 0x501;
const MASTER: u64 = 0x502;

/// Which terminal a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Master(u32),
    Slave(u32),
    /// `/dev/tty`: whatever is the controlling terminal of the one who opens it.
    Current,
    Other(TtyType),
}

impl FileKind for Tty {
    fn name(&self) -> &'static str {
        "terminal"
    }

    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Tty]
    }

    fn recognises(&self, file: &OpenFile) -> bool {
        let major = rustix::fs::major(file.stat.st_rdev);
        let terminal = SLAVES.contains(&major) || matches!(major, VT_OR_SERIAL | AUXILIARY);
        file.file_type() == libc::S_IFCHR && terminal && file.flags() & libc::O_PATH as u32 == 0
    }

    fn check(&self, file: &OpenFile, dump: &FileDump<'_>) -> Result<()> {
        let refused = |why: &str| Err(Error::new("carry a terminal").because(why.to_owned()));
        let which = which(file)?;
        if which == Which::Current {
            let device = files::get_int(file.handle.as_fd(), files::TIOCGDEV).unwrap_or(0) as u32 as u64;
            let ours = SLAVES.contains(&rustix::fs::major(device)) && master_of(slave_index(device), dump).is_some();
            if ours {
                return refused("a terminal of the tree that was opened as /dev/tty is not supported yet");
            }
        }
        let (Which::Master(index) | Which::Slave(index)) = which else {
            return check_outside(dump);
        };
        let Some(master) = master_of(index, dump) else {
            return check_outside(dump);
        };
        let slaves = || dump.files.iter().filter(|(_, file)| is_slave(file, index));
        // Settings, session and group are told by the master for both.
        let session = files::get_int(master.handle.as_fd(), files::TIOCGSID).unwrap_or(0);
        if session > 0 {
            if !dump.shared.pids.contains_key(&session) {
                return refused(&format!(
                    "it is the controlling terminal of session {session}, which is outside of the tree"
                ));
            }
            let mut held = slaves().map(|(&id, _)| id);
            if !held.any(|id| dump.ids.iter().any(|(&(pid, _), &other)| pid == session && other == id)) {
                return refused(&format!(
                    "it is the controlling terminal of process {session}, which has no descriptor of it"
                ));
            }
        }
        let waiting = files::get_int(file.handle.as_fd(), files::FIONREAD).unwrap_or(0);
        if waiting > 0 {
            let end = if which == Which::Master(index) {
                "written to"
            } else {
                "typed on"
            };
            return Err(Error::new("carry a terminal")
                .because(format!(
                    "{waiting} bytes {end} it have not been read, which is not supported yet"
                ))
                .hint("try again when the program has read them"));
        }
        if matches!(which, Which::Master(_)) && slaves().next().is_none() && !hung_up(file) {
            return refused("its other end is not open, or is open outside of the tree");
        }
        Ok(())
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let info = describe(file, dump)?;
        let info_id = info.id;
        if dump.shared.first(FdTypes::Tty, u64::from(info_id)) {
            dump.append("tty-info.img", &info, &[])?;
        }
        let path_id = dump.shared.new_id();
        // The path is for names only; an outer terminal's may not exist where the tree is.
        let path = RegFileEntry {
            id: path_id,
            flags: file.flags(),
            fown: file.owner(),
            name: String::from_utf8_lossy(&file.link).into_owned(),
            mode: Some(file.stat.st_mode),
            ..RegFileEntry::default()
        };
        let path = FileEntry {
            r#type: FdTypes::Reg as i32,
            id: path_id,
            reg: Some(path),
            ..FileEntry::default()
        };
        dump.shared.extra.insert(path_id, path);
        let tty = TtyFileEntry {
            id,
            tty_info_id: info_id,
            flags: file.flags(),
            fown: file.owner(),
            regf_id: Some(path_id),
        };
        Ok(FileEntry {
            r#type: FdTypes::Tty as i32,
            id,
            tty: Some(tty),
            ..FileEntry::default()
        })
    }

    fn open(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<OwnedFd> {
        let tty = tty_of(entry)?;
        let infos = infos(restore)?;
        let info = info_of(tty, &infos)?;
        let file = match pair_of(info, &infos) {
            None => open_outside(tty, restore)?,
            Some(index) => {
                hold_master(index, restore)?;
                let master = &restore.held[&(FdTypes::Tty, u64::from(index))];
                if is_master(info) {
                    master.try_clone().context("duplicate a descriptor")?
                } else {
                    files::open_peer(master.as_fd(), open_flags(tty.flags)).context("open the slave of a terminal")?
                }
            }
        };
        fd::restore_flags(file.as_fd(), tty.flags, &tty.fown)?;
        Ok(file)
    }

    /// Settings of pairs that are ours.
    fn finish(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let tty = tty_of(entry)?;
        let infos = infos(restore)?;
        let info = info_of(tty, &infos)?;
        let Some(index) = pair_of(info, &infos) else {
            return Ok(());
        };
        let Some(master) = restore.held.get(&(FdTypes::Tty, u64::from(index))) else {
            return Ok(());
        };
        let slave = infos.iter().find(|other| !is_master(other) && index_of(other) == index);
        // Opened and closed, where nobody has it any more: the master then reports the hang-up that it reported before.
        let peer = files::open_peer(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY).context("open the slave")?;
        if let Some(mode) = slave.and_then(|_| mode_of(entry, restore)).filter(|_| !is_master(info)) {
            rustix::fs::fchmod(&peer, rustix::fs::Mode::from_raw_mode(mode & 0o7777))
                .map_err(std::io::Error::from)
                .context("set the mode of a terminal")?;
        }
        if let (Some(uid), Some(gid), false) = (info.uid, info.gid, is_master(info)) {
            let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
            rustix::fs::fchown(&peer, Some(uid), Some(gid))
                .map_err(std::io::Error::from)
                .context("set the owner of a terminal")?;
        }
        apply(info, master)
    }

    fn install_in(&self, entry: &FileEntry, fd: u32, task: &Installing<'_>, program: &mut Program) -> Result<()> {
        let tty = tty_of(entry)?;
        let infos = read_infos(&mut ImageReader::open(task.store, "tty-info.img").context("read terminals")?)?;
        let info = info_of(tty, &infos)?;
        let leader = task.pid == task.session && info.sid == task.pid;
        if !leader || is_master(info) || pair_of(info, &infos).is_none() {
            return Ok(());
        }
        let take = files::TIOCSCTTY.number();
        program.call(
            "take the controlling terminal",
            libc::SYS_ioctl,
            &[fd.into(), take.into(), 0.into()],
        );
        if info.pgrp != 0 && info.pgrp != task.pid {
            // A group that is gone by now was in the foreground of nothing.
            let group = program.data(&info.pgrp.to_ne_bytes());
            let set = files::TIOCSPGRP.number();
            program.try_call(libc::SYS_ioctl, &[fd.into(), set.into(), group.into()]);
        }
        Ok(())
    }

    fn resume(&self, entry: &FileEntry, restore: &mut FileRestore<'_>) -> Result<()> {
        let tty = tty_of(entry)?;
        let infos = infos(restore)?;
        let info = info_of(tty, &infos)?;
        let Some(file) = restore.opened.get(&entry.id) else {
            return Ok(());
        };
        match pair_of(info, &infos) {
            // The settings that the program made are for the terminal that it gets; its size is its own. A background
            // restore would be stopped for trying (termios(3)).
            None => {
                let ours = rustix::process::getpgrp().as_raw_nonzero().get();
                if files::get_int(file.as_fd(), files::TIOCGPGRP).is_ok_and(|group| group == ours)
                    && let Some(termios) = &info.termios
                {
                    files::set(file.as_fd(), files::TCSETS2, &termios_bytes(termios)?)
                        .context("set the terminal's settings")?;
                }
            }
            Some(_) => {
                if info.exclusive {
                    files::plain(file.as_fd(), files::TIOCEXCL, 0).context("set exclusive mode")?;
                }
                if is_master(info) {
                    let on = i32::from(info.locked).to_ne_bytes();
                    files::set(file.as_fd(), files::TIOCSPTLCK, &on).context("lock a terminal")?;
                }
            }
        }
        Ok(())
    }
}

fn which(file: &OpenFile) -> Result<Which> {
    let rdev = file.stat.st_rdev;
    Ok(match (rustix::fs::major(rdev), rdev) {
        (_, MASTER) => {
            let index = files::get_int(file.handle.as_fd(), files::TIOCGPTN).context("ask for a terminal's number")?;
            Which::Master(index as u32)
        }
        (_, CURRENT) => Which::Current,
        (_, CONSOLE) => Which::Other(TtyType::Console),
        (major, _) if SLAVES.contains(&major) => Which::Slave(slave_index(rdev)),
        (_, _) if rustix::fs::minor(rdev) < 64 => Which::Other(TtyType::Vt),
        _ => Which::Other(TtyType::Serial),
    })
}

fn slave_index(rdev: u64) -> u32 {
    (rustix::fs::major(rdev) - SLAVES.start()) * 256 + rustix::fs::minor(rdev)
}

fn is_slave(file: &OpenFile, index: u32) -> bool {
    SLAVES.contains(&rustix::fs::major(file.stat.st_rdev)) && slave_index(file.stat.st_rdev) == index
}

/// The master of the pair, where the tree has it.
fn master_of<'a>(index: u32, dump: &FileDump<'a>) -> Option<&'a OpenFile> {
    dump.files.values().find(|file| {
        file.file_type() == libc::S_IFCHR
            && file.stat.st_rdev == MASTER
            && files::get_int(file.handle.as_fd(), files::TIOCGPTN).is_ok_and(|number| number as u32 == index)
    })
}

fn check_outside(dump: &FileDump<'_>) -> Result<()> {
    if dump.options.shell_job {
        return Ok(());
    }
    Err(Error::new("carry a terminal")
        .because("its other end is outside of the tree")
        .hint("use --shell-job (-j) to continue on the terminal of the restore, or redirect the program's input and output"))
}

/// Did the last holder of a master's other end close it?
fn hung_up(file: &OpenFile) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let zero = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::new(&file.handle, PollFlags::IN)];
    poll(&mut fds, Some(&zero)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}

/// Describes one end. Both ends of a pair have ids of their own; 1 and 2 belong to pair 0.
fn describe(file: &OpenFile, dump: &FileDump<'_>) -> Result<TtyInfoEntry> {
    let handle = file.handle.as_fd();
    let which = which(file)?;
    let inner = |pid: i32| dump.shared.pids.get(&pid).copied().unwrap_or(0) as u32;
    let (id, kind, index) = match which {
        Which::Master(index) => (2 * index + 2, TtyType::Pty, Some(index)),
        Which::Slave(index) => (2 * index + 1, TtyType::Pty, Some(index)),
        Which::Current => (1 << 30, TtyType::Ctty, None),
        Which::Other(kind) => ((1 << 30) + file.stat.st_rdev as u32, kind, None),
    };
    let (sid, pgrp) = match index.and_then(|index| master_of(index, dump)) {
        Some(master) => {
            let ask = |request| files::get_int(master.handle.as_fd(), request).unwrap_or(0);
            (inner(ask(files::TIOCGSID)), inner(ask(files::TIOCGPGRP)))
        }
        // Only who has it as controlling terminal may ask; the session of an outer terminal is of no use elsewhere.
        None => {
            let stat = procfs::stat::parse(&procfs::read(file.pid, "stat")?)?;
            let device = files::get_int(handle, files::TIOCGDEV).unwrap_or(-1);
            if stat.tty == device {
                (stat.session as u32, inner(stat.pgrp))
            } else {
                (0, 0)
            }
        }
    };
    let flag = |request| files::get_int(handle, request).is_ok_and(|on| on != 0);
    let master = matches!(which, Which::Master(_));
    let winsize = files::get(handle, files::TIOCGWINSZ).context("ask for a terminal's size")?;
    let part = |at: usize| u32::from(u16::from_ne_bytes([winsize[at], winsize[at + 1]]));
    let locked = files::get(handle, files::TIOCGLCKTRMIOS).context("ask for a terminal's locked settings")?;
    Ok(TtyInfoEntry {
        id,
        r#type: kind as i32,
        locked: master && flag(files::TIOCGPTLCK),
        exclusive: flag(files::TIOCGEXCL),
        packet_mode: master && flag(files::TIOCGPKT),
        sid,
        pgrp,
        rdev: file.stat.st_rdev as u32,
        termios: Some(termios_entry(
            &files::get(handle, files::TCGETS2).context("ask for a terminal's settings")?,
        )),
        termios_locked: Some(termios_entry(&locked)),
        winsize: Some(WinsizeEntry {
            ws_row: part(0),
            ws_col: part(2),
            ws_xpixel: part(4),
            ws_ypixel: part(6),
        }),
        pty: index.map(|index| TtyPtyEntry { index }),
        dev: Some(file.stat.st_dev as u32),
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
    })
}

/// From `struct termios2`, or from `struct termios`, which ends before the speeds.
fn termios_entry(bytes: &[u8]) -> TermiosEntry {
    let word = |at: usize| {
        let word = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        word.map_or(0, u32::from_ne_bytes)
    };
    TermiosEntry {
        c_iflag: word(0),
        c_oflag: word(4),
        c_cflag: word(8),
        c_lflag: word(12),
        c_line: u32::from(bytes[16]),
        c_ispeed: word(files::TERMIOS),
        c_ospeed: word(files::TERMIOS + 4),
        c_cc: bytes[17..files::TERMIOS].iter().map(|&byte| u32::from(byte)).collect(),
    }
}

fn termios_bytes(entry: &TermiosEntry) -> Result<[u8; files::TERMIOS2]> {
    let mut bytes = [0u8; files::TERMIOS2];
    let mut put = |at: usize, word: u32| bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
    put(0, entry.c_iflag);
    put(4, entry.c_oflag);
    put(8, entry.c_cflag);
    put(12, entry.c_lflag);
    put(files::TERMIOS, entry.c_ispeed);
    put(files::TERMIOS + 4, entry.c_ospeed);
    bytes[16] = entry.c_line as u8;
    let characters = &mut bytes[17..files::TERMIOS];
    if entry.c_cc.len() > characters.len() {
        return Err(Error::new("restore a terminal").because("it has more control characters than terminals have"));
    }
    for (byte, &character) in characters.iter_mut().zip(&entry.c_cc) {
        *byte = character as u8;
    }
    Ok(bytes)
}

fn apply(info: &TtyInfoEntry, master: &OwnedFd) -> Result<()> {
    let master = master.as_fd();
    if let Some(termios) = &info.termios {
        files::set(master, files::TCSETS2, &termios_bytes(termios)?).context("set a terminal's settings")?;
    }
    if let Some(locked) = &info.termios_locked {
        let mut bytes = [0; files::TERMIOS];
        bytes.copy_from_slice(&termios_bytes(locked)?[..files::TERMIOS]);
        files::set(master, files::TIOCSLCKTRMIOS, &bytes).context("lock a terminal's settings")?;
    }
    if let Some(size) = &info.winsize {
        let mut bytes = [0u8; 8];
        for (at, part) in [size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel]
            .into_iter()
            .enumerate()
        {
            bytes[2 * at..2 * at + 2].copy_from_slice(&(part as u16).to_ne_bytes());
        }
        files::set(master, files::TIOCSWINSZ, &bytes).context("set a terminal's size")?;
    }
    if is_master(info) && info.packet_mode {
        files::set(master, files::TIOCPKT, &1i32.to_ne_bytes()).context("set packet mode")?;
    }
    Ok(())
}

fn tty_of(entry: &FileEntry) -> Result<&TtyFileEntry> {
    let entry = entry.tty.as_ref();
    entry.ok_or_else(|| Error::new("restore a terminal").because("the image has no terminal entry"))
}

fn read_infos(image: &mut ImageReader) -> Result<Vec<TtyInfoEntry>> {
    let mut infos = Vec::new();
    while let Some(entry) = image.next().context("read terminals")? {
        infos.push(entry);
    }
    Ok(infos)
}

fn infos(restore: &FileRestore<'_>) -> Result<Vec<TtyInfoEntry>> {
    match restore.image("tty-info.img")? {
        Some(mut image) => read_infos(&mut image),
        None => Ok(Vec::new()),
    }
}

fn info_of<'a>(tty: &TtyFileEntry, infos: &'a [TtyInfoEntry]) -> Result<&'a TtyInfoEntry> {
    infos
        .iter()
        .find(|info| info.id == tty.tty_info_id)
        .ok_or_else(|| Error::new("restore a terminal").because("tty-info.img does not describe it"))
}

fn is_master(info: &TtyInfoEntry) -> bool {
    u64::from(info.rdev) == MASTER
}

fn index_of(info: &TtyInfoEntry) -> u32 {
    info.pty.as_ref().map_or(u32::MAX, |pty| pty.index)
}

/// The number of the pair, if it is one whose master is in the images.
fn pair_of(info: &TtyInfoEntry, infos: &[TtyInfoEntry]) -> Option<u32> {
    let index = info.pty.as_ref()?.index;
    let mut masters = infos.iter().filter(|other| is_master(other));
    masters.any(|master| index_of(master) == index).then_some(index)
}

fn open_flags(flags: u32) -> i32 {
    (flags as i32 & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_DIRECTORY)) | libc::O_NOCTTY
}

/// The mode of the entry's path.
fn mode_of(entry: &FileEntry, restore: &FileRestore<'_>) -> Option<u32> {
    let path = entry.tty.as_ref()?.regf_id.and_then(|id| restore.entries.get(&id))?;
    path.reg.as_ref()?.mode
}

/// Makes the master of pair `index`, which stays in `restore.held`. The kernel hands out the lowest free number.
fn hold_master(index: u32, restore: &mut FileRestore<'_>) -> Result<()> {
    let key = (FdTypes::Tty, u64::from(index));
    if restore.held.contains_key(&key) {
        return Ok(());
    }
    let failed = || Error::new("make a pseudo terminal").object(format!("pts/{index}"));
    let path = restore.options.root.join("dev/ptmx");
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let mut lower = Vec::new();
    loop {
        let master = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())
            .map_err(std::io::Error::from)
            .with(failed)?;
        let number = files::get_int(master.as_fd(), files::TIOCGPTN).with(failed)? as u32;
        if number == index {
            files::set(master.as_fd(), files::TIOCSPTLCK, &0i32.to_ne_bytes()).with(failed)?;
            restore.held.insert(key, master);
            return Ok(());
        }
        if number > index {
            return Err(failed()
                .because("that number is in use on this host")
                .hint("restore where /dev/pts is a mount of its own (a container), or end the program that has it"));
        }
        lower.push(master);
    }
}

/// The terminal that the restore is started from: of its standard files, or the controlling one.
fn open_outside(tty: &TtyFileEntry, restore: &FileRestore<'_>) -> Result<OwnedFd> {
    let failed = || Error::new("take over the terminal");
    if !restore.options.shell_job {
        return Err(failed()
            .because("the program was dumped with a terminal from outside (--shell-job)")
            .hint("use --shell-job (-j) for the restore too"));
    }
    let (input, output, errors) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for standard in [input.as_fd(), output.as_fd(), errors.as_fd()] {
        if files::get(standard, files::TCGETS2).is_ok() {
            return fd::reopen(standard, open_flags(tty.flags) as u32).with(failed);
        }
    }
    let flags = rustix::fs::OFlags::from_bits_retain(open_flags(tty.flags) as u32) | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open("/dev/tty", flags, rustix::fs::Mode::empty())
        .map_err(std::io::Error::from)
        .with(|| failed().hint("start the restore from a terminal"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::fd::fixture;
    use std::os::fd::AsRawFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let master = rustix::fs::open("/dev/ptmx", flags, rustix::fs::Mode::empty()).unwrap();
        files::set(master.as_fd(), files::TIOCSPTLCK, &0i32.to_ne_bytes()).unwrap();
        let slave = files::open_peer(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY).unwrap();
        (master, slave)
    }

    fn link(file: &OwnedFd) -> std::path::PathBuf {
        std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
    }

    #[test]
    fn a_pair_keeps_its_name_size_and_settings_and_works_in_both_directions() {
        let _alone = fixture::alone();
        let (master, slave) = pair();
        let second = fd::reopen(
            slave.as_fd(),
            (libc::O_WRONLY | libc::O_NONBLOCK | libc::O_NOCTTY) as u32,
        )
        .unwrap();
        let mut termios = files::get(slave.as_fd(), files::TCGETS2).unwrap();
        // No echo, no lines, no translation of newlines: lflag and oflag.
        termios[12..16].copy_from_slice(&0u32.to_ne_bytes());
        termios[4..8].copy_from_slice(&0u32.to_ne_bytes());
        files::set(slave.as_fd(), files::TCSETS2, &termios).unwrap();
        files::set(master.as_fd(), files::TIOCSWINSZ, &[31, 0, 77, 0, 1, 0, 2, 0]).unwrap();
        files::set(master.as_fd(), files::TIOCPKT, &1i32.to_ne_bytes()).unwrap();
        files::set(master.as_fd(), files::TIOCSPTLCK, &1i32.to_ne_bytes()).unwrap();
        files::plain(slave.as_fd(), files::TIOCEXCL, 0).unwrap();
        rustix::fs::fchmod(&slave, rustix::fs::Mode::from_raw_mode(0o622)).unwrap();
        let dumped = fixture::dump(&[&second, &slave, &master]);
        let (name, flags) = (link(&slave), fixture::info(&second).0);
        drop((master, slave, second));
        let files_again = dumped.restore();
        let (slave, master) = (&files_again[1], &files_again[2]);
        assert_eq!((link(slave), fixture::info(&files_again[0]).0), (name, flags));
        assert_eq!(files::get(slave.as_fd(), files::TCGETS2).unwrap(), termios);
        assert_eq!(
            files::get(slave.as_fd(), files::TIOCGWINSZ).unwrap(),
            [31, 0, 77, 0, 1, 0, 2, 0]
        );
        for (end, request) in [
            (master, files::TIOCGPKT),
            (master, files::TIOCGPTLCK),
            (slave, files::TIOCGEXCL),
        ] {
            assert_ne!(files::get_int(end.as_fd(), request).unwrap(), 0, "{request:?}");
        }
        assert_eq!(rustix::fs::fstat(slave).unwrap().st_mode & 0o7777, 0o622);
        let mut bytes = [0; 16];
        rustix::io::write(slave, b"out\n").unwrap();
        // In packet mode a byte tells that data follow.
        assert_eq!(rustix::io::read(master, &mut bytes), Ok(5));
        assert_eq!(&bytes[..5], b"\0out\n");
        rustix::io::write(master, b"in").unwrap();
        assert_eq!(rustix::io::read(slave, &mut bytes), Ok(2));
    }

    #[test]
    fn a_master_whose_other_end_was_closed_reports_that() {
        let _alone = fixture::alone();
        let (master, slave) = pair();
        drop(slave);
        let dumped = fixture::dump(&[&master]);
        drop(master);
        let copy = dumped.restore().remove(0);
        assert_eq!(rustix::io::read(&copy, &mut [0; 1]), Err(rustix::io::Errno::IO));
    }

    #[test]
    fn an_outer_terminal_needs_the_option_and_unread_input_is_not_lost() {
        let _alone = fixture::alone();
        let (master, slave) = pair();
        let mut options = crate::dump::Options::default();
        let refused = |files: &[&dyn AsFd], options: &crate::dump::Options| {
            fixture::dump_with(files, options)
                .err()
                .map(|error| error.chain())
                .unwrap_or_default()
        };
        assert!(refused(&[&slave], &options).contains("--shell-job"));
        options.shell_job = true;
        let dumped = fixture::dump_with(&[&slave], &options).unwrap();
        let error = dumped.try_restore().unwrap_err().chain();
        assert!(error.contains("--shell-job"), "{error}");
        rustix::io::write(&master, b"typed\n").unwrap();
        let lost = || refused(&[&slave, &master], &options).contains("have not been read");
        assert!(fixture::eventually(lost));
    }

    #[test]
    fn the_session_leader_takes_its_terminal_and_nobody_else_does() {
        let _alone = fixture::alone();
        let (master, slave) = pair();
        let task = fixture::Task::start(&["setsid", "sleep", "1000"], &slave, &master);
        let pid = task.pid() as u32;
        let dumped = fixture::dump(&[&slave, &master]);
        let mut infos: Vec<TtyInfoEntry> = whimbrel_images::entry::read_all(&dumped.store, "tty-info.img").unwrap();
        for info in &mut infos {
            (info.sid, info.pgrp) = (pid, pid);
        }
        let mut writer = whimbrel_images::entry::ImageWriter::create(&dumped.store, "tty-info.img").unwrap();
        infos.iter().for_each(|info| writer.write(info).unwrap());
        writer.finish().unwrap();
        let calls = |id: u32, pid: u32, session: u32| {
            let task = Installing {
                pid,
                session,
                first: false,
                store: &dumped.store,
            };
            let mut program = Program::new();
            Tty.install_in(&dumped.entries[&id], 0, &task, &mut program).unwrap();
            program
        };
        let others = [(1, pid + 1, pid), (1, pid + 1, pid + 1), (2, pid, pid)];
        assert!(
            others
                .iter()
                .all(|&(id, pid, session)| calls(id, pid, session).is_empty())
        );
        task.run(&calls(1, pid, pid));
        let stat = procfs::stat::parse(&procfs::read(task.pid(), "stat").unwrap()).unwrap();
        assert_eq!(stat.tty as u64, rustix::fs::fstat(&slave).unwrap().st_rdev);
        assert_eq!(files::get_int(master.as_fd(), files::TIOCGPGRP).unwrap(), task.pid());
        assert_eq!(files::get_int(master.as_fd(), files::TIOCGSID).unwrap(), task.pid());
    }
}
