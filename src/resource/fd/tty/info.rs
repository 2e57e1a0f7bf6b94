//! What images say of terminals, and settings as the kernel has them.

use std::os::fd::{AsFd, OwnedFd};

use whimbrel_images::entry::ImageReader;
use whimbrel_images::proto::{FileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyType};
use whimbrel_images::store::ImageStore;

use super::MASTER;
use crate::error::{Context, Error, Result};
use crate::kernel::files;
use crate::resource::fd::FileRestore;

/// From `struct termios2`, or from `struct termios`, which ends before the speeds.
pub(super) fn termios_entry(bytes: &[u8]) -> TermiosEntry {
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

pub(super) fn termios_bytes(entry: &TermiosEntry) -> Result<[u8; files::TERMIOS2]> {
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

pub(super) fn apply(info: &TtyInfoEntry, master: &OwnedFd) -> Result<()> {
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

pub(super) fn tty_of(entry: &FileEntry) -> Result<&TtyFileEntry> {
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

pub(super) fn infos(restore: &FileRestore<'_>) -> Result<Vec<TtyInfoEntry>> {
    match restore.image("tty-info.img")? {
        Some(mut image) => read_infos(&mut image),
        None => Ok(Vec::new()),
    }
}

pub(super) fn info_of<'a>(tty: &TtyFileEntry, infos: &'a [TtyInfoEntry]) -> Result<&'a TtyInfoEntry> {
    infos
        .iter()
        .find(|info| info.id == tty.tty_info_id)
        .ok_or_else(|| Error::new("restore a terminal").because("tty-info.img does not describe it"))
}

pub(super) fn is_master(info: &TtyInfoEntry) -> bool {
    u64::from(info.rdev) == MASTER
}

pub(super) fn index_of(info: &TtyInfoEntry) -> u32 {
    info.pty.as_ref().map_or(u32::MAX, |pty| pty.index)
}

/// Is it a slave whose master is gone? Such a file tells no settings any more.
pub(super) fn is_hung_up(info: &TtyInfoEntry) -> bool {
    info.pty.is_some() && !is_master(info) && info.termios.is_none()
}

/// The number of the pair, if it is one to be made: its master is in the images, or is gone.
pub(super) fn pair_of(info: &TtyInfoEntry, infos: &[TtyInfoEntry]) -> Option<u32> {
    let index = info.pty.as_ref()?.index;
    let mut masters = infos.iter().filter(|other| is_master(other));
    (is_hung_up(info) || masters.any(|master| index_of(master) == index)).then_some(index)
}

/// A terminal of the tree that controls a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controlling {
    /// The session, by its leader.
    pub session: u32,
    /// Number of the pair.
    pub index: u32,
    /// The process group in the foreground; 0 for one that is gone.
    pub group: u32,
}

/// The terminals of an image set that control sessions of the tree.
///
/// # Errors
/// When the image is damaged.
pub fn controlling(store: &dyn ImageStore) -> Result<Vec<Controlling>> {
    let mut image = match ImageReader::open(store, "tty-info.img") {
        Err(error) if error.is_not_found() => return Ok(Vec::new()),
        opened => opened.context("read terminals")?,
    };
    Ok(controlling_of(&read_infos(&mut image)?))
}

fn controlling_of(infos: &[TtyInfoEntry]) -> Vec<Controlling> {
    let mut found: Vec<Controlling> = Vec::new();
    for info in infos.iter().filter(|info| info.sid != 0) {
        let Some(index) = pair_of(info, infos) else { continue };
        if found
            .iter()
            .all(|other| other.index != index && other.session != info.sid)
        {
            found.push(Controlling {
                session: info.sid,
                index,
                group: info.pgrp,
            });
        }
    }
    found
}

/// The terminal of the tree that a file was opened as by the name `/dev/tty`.
pub(super) fn current_of(info: &TtyInfoEntry, infos: &[TtyInfoEntry]) -> Option<Controlling> {
    let mut all = controlling_of(infos).into_iter();
    all.find(|terminal| info.r#type() == TtyType::Ctty && terminal.session == info.sid)
}
