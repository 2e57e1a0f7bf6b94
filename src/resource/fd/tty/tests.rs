//! Tests of terminals, each with pairs of its own.

use super::*;
use crate::resource::fd::{self, fixture};
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
fn an_outer_terminal_needs_the_option() {
    let _alone = fixture::alone();
    let (_master, slave) = pair();
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
}

/// Reads what there is, once something is.
fn read(file: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 20_000];
    let count = rustix::io::read(file, &mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

#[test]
fn lines_and_ends_of_file_that_were_typed_come_one_by_one_in_the_original_and_the_copy() {
    let _alone = fixture::alone();
    let (master, slave) = pair();
    rustix::io::write(&master, b"one\ntwo\x04\x04a \x16\x04 in it\npart").unwrap();
    assert!(fixture::eventually(|| files::get_int(slave.as_fd(), files::FIONREAD)
        .unwrap()
        > 10));
    let dumped = fixture::dump(&[&slave, &master]);
    let look = |master: &OwnedFd, slave: &OwnedFd| {
        rustix::io::write(master, b"ial\n").unwrap();
        let lines: Vec<_> = (0..5).map(|_| read(slave)).collect();
        assert_eq!(lines, [&b"one\n"[..], b"two", b"", b"a \x04 in it\n", b"partial\n"]);
        // The echo, of which nothing came twice.
        assert!(fixture::eventually(|| files::get_int(master.as_fd(), files::FIONREAD)
            .unwrap()
            >= 31));
        assert_eq!(read(master), b"one\r\ntwoa ^\x08^D in it\r\npartial\r\n");
    };
    look(&master, &slave);
    drop((master, slave));
    let copies = dumped.restore();
    look(&copies[1], &copies[0]);
}

#[test]
fn output_that_nobody_has_read_and_that_was_stopped_stays_so() {
    let _alone = fixture::alone();
    let (master, slave) = pair();
    let written: Vec<u8> = (0..9000u32)
        .map(|n| if n % 80 == 79 { b'\n' } else { b'a' + (n % 26) as u8 })
        .collect();
    let mut termios = files::get(slave.as_fd(), files::TCGETS2).unwrap();
    termios[0..4].copy_from_slice(&0u32.to_ne_bytes());
    files::set(slave.as_fd(), files::TCSETS2, &termios).unwrap();
    assert_eq!(rustix::io::write(&slave, &written).unwrap(), written.len());
    files::plain(slave.as_fd(), files::TCXONC, libc::TCOOFF).unwrap();
    let dumped = fixture::dump(&[&slave, &master]);
    let look = |master: &OwnedFd, slave: &OwnedFd| {
        rustix::io::ioctl_fionbio(slave, true).unwrap();
        assert_eq!(rustix::io::write(slave, b"x"), Err(rustix::io::Errno::AGAIN));
        files::plain(slave.as_fd(), files::TCXONC, libc::TCOON).unwrap();
        assert_eq!(rustix::io::write(slave, b"x"), Ok(1));
        let mut all = Vec::new();
        while !all.ends_with(b"x") {
            all.extend(read(master));
        }
        let wanted: Vec<u8> = (written.iter().copied())
            .flat_map(|byte| [b'\r', byte].into_iter().skip(usize::from(byte != b'\n')))
            .chain(*b"x")
            .collect();
        assert!(all == wanted, "{} bytes, not {}", all.len(), wanted.len());
    };
    look(&master, &slave);
    drop((master, slave));
    let copies = dumped.restore();
    look(&copies[1], &copies[0]);
}

#[test]
fn a_slave_whose_master_is_gone_stays_hung_up() {
    let _alone = fixture::alone();
    let (master, slave) = pair();
    drop(master);
    let dumped = fixture::dump(&[&slave]);
    drop(slave);
    let copy = dumped.restore().remove(0);
    assert_eq!(rustix::io::read(&copy, &mut [0; 1]), Ok(0));
    assert_eq!(rustix::io::write(&copy, b"x"), Err(rustix::io::Errno::IO));
}
