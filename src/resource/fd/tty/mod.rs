//! Terminals.
//!
//! A pseudo terminal whose master is in the tree, or gone, is made again, under its number: names and settings survive, and what
//! is on its way in it (`data.rs`). A terminal whose master is outside (a shell's, with `--shell-job`) is not ours to make: its
//! descriptors become descriptors of the terminal that the restore is started from.
//!
//! `tty-info.img` has one entry per end: `rdev` tells which it is, `pty.index` which pair it belongs to. Sessions take their
//! terminals before any file is opened: [`Build`](crate::restore::Build).

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use whimbrel_images::proto::{
    FdTypes, FileEntry, RegFileEntry, TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry,
};

use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::procfs;
use crate::remote::Program;
use crate::resource::fd::{self, FileDump, FileRestore, OpenFile};
use crate::resource::{FileKind, OpenedBy};

mod data;
mod info;
#[cfg(test)]
mod tests;

pub use info::{Controlling, controlling};
use info::{
    apply, current_of, index_of, info_of, infos, is_hung_up, is_master, pair_of, termios_bytes, termios_entry, tty_of,
};

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
        let index = match which(file)? {
            Which::Master(index) | Which::Slave(index) => index,
            Which::Current => match current_index(file) {
                Some(index) if master_of(index, dump.files).is_some() => index,
                _ => return check_outside(dump),
            },
            Which::Other(_) => return check_outside(dump),
        };
        if is_hung_up_file(file) {
            return Ok(());
        }
        let Some(master) = master_of(index, dump.files) else {
            return check_outside(dump);
        };
        // Settings, session and group are told by the master for both.
        let session = files::get_int(master.handle.as_fd(), files::TIOCGSID).unwrap_or(0);
        if session > 0 && !dump.shared.pids.contains_key(&session) {
            return refused(&format!(
                "it is the controlling terminal of session {session}, which is outside of the tree"
            ));
        }
        if session <= 0 && which(file)? == Which::Current {
            return refused("it was opened as /dev/tty, and controls no session any more");
        }
        let other = other_end(master, dump);
        match other {
            Other::Never => match who_has(index) {
                Some(pid) => refused(&format!("its other end is open outside of the tree, in process {pid}")),
                None => Ok(()),
            },
            _ => match data::obstacle(master.handle.as_fd(), other == Other::Open)? {
                Some(why) => Err(Error::new("carry a terminal")
                    .because(why)
                    .hint("try again when the program has read it")),
                None => Ok(()),
            },
        }
    }

    fn dump(&self, file: &OpenFile, id: u32, dump: &mut FileDump<'_>) -> Result<FileEntry> {
        let mut info = describe(file, dump)?;
        let info_id = info.id;
        if dump.shared.first(FdTypes::Tty, u64::from(info_id)) {
            dump_data(&mut info, dump)?;
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
            None if current_of(info, &infos).is_some() => restore
                .held
                .remove(&OpenedBy::key(entry))
                .ok_or_else(|| Error::new("open /dev/tty").because("no task of its session did it"))?,
            None => open_outside(tty, restore)?,
            Some(index) => {
                hold_master(index, restore)?;
                let master = &restore.held[&(FdTypes::Tty, u64::from(index))];
                if is_master(info) {
                    master.try_clone().context("duplicate a descriptor")?
                } else {
                    open_slave(master.as_fd(), open_flags(tty.flags))?
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
        let key = (FdTypes::Tty, u64::from(index));
        if is_hung_up(info) {
            // Its slaves are open by now: all of them hang up.
            restore.held.remove(&key);
            return Ok(());
        }
        let Some(master) = restore.held.get(&key) else {
            return Ok(());
        };
        let slave = infos.iter().find(|other| !is_master(other) && index_of(other) == index);
        if info.unopened() {
            return apply(info, master);
        }
        // Opened and closed, where nobody has it any more: the master then reports the hang-up that it reported before.
        let peer = open_slave(master.as_fd(), libc::O_RDWR)?;
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
        apply(info, master)?;
        let of_info = |entry: &&FileEntry| entry.tty.as_ref().is_some_and(|tty| tty.tty_info_id == info.id);
        if restore
            .entries
            .values()
            .find(of_info)
            .is_some_and(|first| first.id != entry.id)
        {
            return Ok(());
        }
        let waiting = data::of(restore, info.id)?;
        if is_master(info) {
            data::show_again(master.as_fd(), &waiting.data)
        } else {
            data::type_again(master.as_fd(), &waiting)
        }
    }

    /// `/dev/tty` is opened by the leader of the session: it means something to those only who are in it.
    fn opened_by(&self, entry: &FileEntry, restore: &FileRestore<'_>) -> Result<Option<OpenedBy>> {
        let tty = tty_of(entry)?;
        let infos = infos(restore)?;
        let Some(terminal) = current_of(info_of(tty, &infos)?, &infos) else {
            return Ok(None);
        };
        let mut program = Program::new();
        let path = restore.options.root.join("dev/tty");
        let path = program.string(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()));
        let args = [libc::AT_FDCWD.into(), path.into(), open_flags(tty.flags).into()];
        let descriptor = program.call("open /dev/tty", libc::SYS_openat, &args);
        Ok(Some(OpenedBy {
            task: terminal.session,
            program,
            descriptor,
        }))
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
            None if current_of(info, &infos).is_some() => {}
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
                if info.stopped() && !is_master(info) {
                    data::stop(file.as_fd())?;
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
fn master_of(index: u32, open: &BTreeMap<u32, OpenFile>) -> Option<&OpenFile> {
    open.values().find(|file| number_of(file) == Some(index))
}

/// The number of the pair that a file is the master of.
fn number_of(file: &OpenFile) -> Option<u32> {
    let master = file.file_type() == libc::S_IFCHR && file.stat.st_rdev == MASTER;
    let number = |file: &OpenFile| files::get_int(file.handle.as_fd(), files::TIOCGPTN).ok();
    number(file).filter(|_| master).map(|number| number as u32)
}

/// Terminals among open files that control sessions of their tree: the sessions, and the numbers of the pairs. `pids` are
/// the tree's processes, as we see them and as they see themselves.
pub fn terminals(open: &BTreeMap<u32, OpenFile>, pids: &HashMap<i32, i32>) -> BTreeMap<u32, u32> {
    let of = |file: &OpenFile| {
        let index = number_of(file)?;
        let session = files::get_int(file.handle.as_fd(), files::TIOCGSID).ok()?;
        Some((*pids.get(&session).filter(|_| session > 0)? as u32, index))
    };
    open.values().filter_map(of).collect()
}

/// The number of the pair behind `/dev/tty`.
fn current_index(file: &OpenFile) -> Option<u32> {
    let device = u64::from(files::get_int(file.handle.as_fd(), files::TIOCGDEV).ok()? as u32);
    SLAVES.contains(&rustix::fs::major(device)).then(|| slave_index(device))
}

/// Was it a slave, until its master went? All but a few things fail on it then.
fn is_hung_up_file(file: &OpenFile) -> bool {
    let answer = files::get(file.handle.as_fd(), files::TCGETS2);
    SLAVES.contains(&rustix::fs::major(file.stat.st_rdev))
        && answer.is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
}

/// What has become of the slave of a master.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Other {
    /// The tree has it open.
    Open,
    /// It was, and is not any more.
    Closed,
    /// Nobody ever opened it, or somebody outside of the tree has it.
    Never,
}

fn other_end(master: &OpenFile, dump: &FileDump<'_>) -> Other {
    let index = number_of(master);
    let open = |file: &OpenFile| index.is_some_and(|index| is_slave(file, index)) && !is_hung_up_file(file);
    let current = |file: &OpenFile| file.stat.st_rdev == CURRENT && current_index(file) == index;
    if dump.files.values().any(|file| open(file) || current(file)) {
        Other::Open
    } else if hung_up(master) {
        Other::Closed
    } else {
        Other::Never
    }
}

/// Somebody who has the slave of a pair open.
fn who_has(index: u32) -> Option<i32> {
    let name = format!("/dev/pts/{index}");
    let pids = std::fs::read_dir("/proc").ok()?.flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|pid| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        let mut links = descriptors
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.any(|link| link.as_os_str() == name.as_str())
    })
}

/// Writes down what waits at one end of a pair, if anything does.
fn dump_data(info: &mut TtyInfoEntry, dump: &mut FileDump<'_>) -> Result<()> {
    let (Some(pty), false) = (&info.pty, is_hung_up(info)) else {
        return Ok(());
    };
    let Some(master) = master_of(pty.index, dump.files) else {
        return Ok(());
    };
    let (other, handle) = (other_end(master, dump), master.handle.as_fd());
    if other == Other::Never {
        info.unopened = Some(true);
        return Ok(());
    }
    let data = if is_master(info) {
        TtyDataEntry {
            data: data::shown(handle, other == Other::Open)?.0,
            ..TtyDataEntry::default()
        }
    } else {
        info.stopped = Some(data::shown(handle, true)?.1).filter(|&stopped| stopped);
        data::typed(handle)?
    };
    if data.data.is_empty() && data.ends.is_empty() {
        return Ok(());
    }
    let data = TtyDataEntry {
        tty_id: info.id,
        ..data
    };
    dump.append("tty-data.img", &data, &[])
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
    let pids = &dump.shared.pids;
    // A group may have outlived its leader. Where all have the ids that we see, so has it.
    let same = pids.iter().all(|(outer, inner)| outer == inner);
    let inner = |pid: i32| pids.get(&pid).copied().unwrap_or(if same { pid } else { 0 }) as u32;
    let (id, kind, index) = match which {
        Which::Master(index) => (2 * index + 2, TtyType::Pty, Some(index)),
        Which::Slave(index) => (2 * index + 1, TtyType::Pty, Some(index)),
        Which::Current => (1 << 30, TtyType::Ctty, current_index(file)),
        Which::Other(kind) => ((1 << 30) + file.stat.st_rdev as u32, kind, None),
    };
    let hung_up = is_hung_up_file(file);
    let (sid, pgrp) = match index.and_then(|index| master_of(index, dump.files)) {
        _ if hung_up => (0, 0),
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
    // `/dev/tty` for each session that has one in the tree; it is told by its session alone.
    let (id, index) = match kind {
        TtyType::Ctty if index.is_some_and(|index| master_of(index, dump.files).is_some()) => ((3 << 29) + sid, None),
        TtyType::Ctty => (id, None),
        _ => (id, index),
    };
    let mut info = TtyInfoEntry {
        id,
        r#type: kind as i32,
        locked: master && flag(files::TIOCGPTLCK),
        exclusive: flag(files::TIOCGEXCL),
        packet_mode: master && flag(files::TIOCGPKT),
        sid,
        pgrp,
        rdev: file.stat.st_rdev as u32,
        pty: index.map(|index| TtyPtyEntry { index }),
        dev: Some(file.stat.st_dev as u32),
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        ..TtyInfoEntry::default()
    };
    if hung_up {
        // It tells nothing more; that images have no settings of it says so.
        return Ok(info);
    }
    let winsize = files::get(handle, files::TIOCGWINSZ).context("ask for a terminal's size")?;
    let part = |at: usize| u32::from(u16::from_ne_bytes([winsize[at], winsize[at + 1]]));
    let locked = files::get(handle, files::TIOCGLCKTRMIOS).context("ask for a terminal's locked settings")?;
    let settings = files::get(handle, files::TCGETS2).context("ask for a terminal's settings")?;
    (info.termios, info.termios_locked) = (Some(termios_entry(&settings)), Some(termios_entry(&locked)));
    info.winsize = Some(WinsizeEntry {
        ws_row: part(0),
        ws_col: part(2),
        ws_xpixel: part(4),
        ws_ypixel: part(6),
    });
    Ok(info)
}

/// Opens the slave of a pair, even one that is locked. Not as a controlling terminal.
///
/// # Errors
/// When it cannot be opened.
pub fn open_slave(master: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd> {
    let failed = || Error::new("open the slave of a terminal");
    let lock = |on: i32| files::set(master, files::TIOCSPTLCK, &on.to_ne_bytes()).with(failed);
    let locked = files::get_int(master, files::TIOCGPTLCK).with(failed)? != 0;
    if locked {
        lock(0)?;
    }
    let slave = files::open_peer(master, flags | libc::O_NOCTTY).with(failed);
    if locked {
        lock(1)?;
    }
    slave
}

fn open_flags(flags: u32) -> i32 {
    (flags as i32 & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_DIRECTORY)) | libc::O_NOCTTY
}

/// The mode of the entry's path.
fn mode_of(entry: &FileEntry, restore: &FileRestore<'_>) -> Option<u32> {
    let path = entry.tty.as_ref()?.regf_id.and_then(|id| restore.entries.get(&id))?;
    path.reg.as_ref()?.mode
}

/// Makes the master of pair `index`, which stays in `restore.held`, if its session has not made it.
fn hold_master(index: u32, restore: &mut FileRestore<'_>) -> Result<()> {
    let key = (FdTypes::Tty, u64::from(index));
    if !restore.held.contains_key(&key) {
        let master = make_master(&restore.options.root, index)?;
        restore.held.insert(key, master);
    }
    Ok(())
}

/// Makes the master of pair `index`, not locked. The kernel hands out the lowest free number.
///
/// # Errors
/// When the number is in use.
pub fn make_master(root: &std::path::Path, index: u32) -> Result<OwnedFd> {
    let failed = || Error::new("make a pseudo terminal").object(format!("pts/{index}"));
    let path = root.join("dev/ptmx");
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let mut lower = Vec::new();
    loop {
        let master = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())
            .map_err(std::io::Error::from)
            .with(failed)?;
        let number = files::get_int(master.as_fd(), files::TIOCGPTN).with(failed)? as u32;
        if number == index {
            files::set(master.as_fd(), files::TIOCSPTLCK, &0i32.to_ne_bytes()).with(failed)?;
            return Ok(master);
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
