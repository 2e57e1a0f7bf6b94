//! TCP connections that are taken out of this process and put back into it, with the network locked meanwhile.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags};
use whimbrel_images::proto::TcpStreamEntry;

use super::super::testing::{self, Image};
use super::stream::*;
use super::*;
use crate::kernel::nft::{Connection, NetworkLock, Protocol};
use crate::kernel::socket::{SIOCINQ, SIOCOUTQNSD, queue_length};
use crate::kernel::sys::set_socket_option;

const ADDRESSES: [&str; 3] = ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"];

fn pair(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    (client, server)
}

fn lock(streams: &[&TcpStream]) -> NetworkLock {
    let connections: Vec<Connection> = streams
        .iter()
        .map(|stream| Connection {
            protocol: Protocol::Tcp,
            local: stream.local_addr().unwrap(),
            remote: stream.peer_addr().unwrap(),
        })
        .collect();
    let mut lock = NetworkLock::new_in_current_netns().unwrap();
    lock.lock(&connections).unwrap();
    lock
}

/// Takes the streams apart under a lock and lets them go on as others.
fn carry(streams: Vec<TcpStream>) -> (Vec<TcpStream>, Image) {
    let lock = lock(&streams.iter().collect::<Vec<_>>());
    let files = testing::tree(streams.iter().map(testing::look).collect());
    let image = testing::dump(&files);
    testing::abandon(files, streams.into_iter().map(OwnedFd::from).collect());
    let restore = testing::open(&image);
    drop(lock);
    let moved = testing::resume(restore).into_values().map(TcpStream::from).collect();
    (moved, image)
}

fn carry_one(stream: TcpStream) -> TcpStream {
    carry(vec![stream]).0.remove(0)
}

/// Writes until nothing more fits, and a while nothing moves; what was written.
fn stuff(stream: &TcpStream, salt: u8) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let mut all = Vec::new();
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_millis(150) {
        let piece: Vec<u8> = (0..10_000).map(|i| ((all.len() + i) / 7) as u8 ^ salt).collect();
        match (&mut &*stream).write(&piece) {
            Ok(count) => {
                all.extend_from_slice(&piece[..count]);
                last = Instant::now();
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    stream.set_nonblocking(false).unwrap();
    all
}

fn read_exactly(stream: &TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    (&mut &*stream).read_exact(&mut bytes).unwrap();
    bytes
}

fn talks(one: &TcpStream, other: &TcpStream) {
    for (from, to) in [(one, other), (other, one)] {
        (&mut &*from).write_all(b"still there?").unwrap();
        assert_eq!(read_exactly(to, 12), b"still there?");
    }
}

fn state_of(stream: &TcpStream) -> u32 {
    Info::of(stream.as_fd()).unwrap().state
}

fn int(stream: &impl AsFd, level: i32, name: i32) -> i32 {
    socket_option_int(stream.as_fd(), level, name).unwrap()
}

#[test]
fn a_connection_goes_on_with_full_queues_on_both_sides() {
    for address in ADDRESSES {
        let (peer, victim) = pair(address);
        // More than the windows take: part of it was never sent.
        let to_peer = stuff(&victim, 0);
        let to_victim = stuff(&peer, 0x55);
        assert!(queue_length(victim.as_fd(), SIOCOUTQNSD).unwrap() > 0);
        assert!(queue_length(victim.as_fd(), SIOCINQ).unwrap() > 0);
        let start = Instant::now();
        let victim = carry_one(victim);
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(read_exactly(&peer, to_peer.len()) == to_peer, "{address}"));
            assert!(read_exactly(&victim, to_victim.len()) == to_victim, "{address}");
        });
        talks(&victim, &peer);
        assert!(
            start.elapsed() < Duration::from_secs(3),
            "{address}: {:?}",
            start.elapsed()
        );
    }
}

#[test]
fn an_idle_connection_goes_on_at_once_with_its_segment_size() {
    for address in ADDRESSES {
        let (peer, victim) = pair(address);
        talks(&peer, &victim);
        let mss = int(&victim, TCP, libc::TCP_MAXSEG);
        let victim = carry_one(victim);
        let start = Instant::now();
        talks(&victim, &peer);
        assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
        let now = int(&victim, TCP, libc::TCP_MAXSEG);
        assert!(
            now * 10 >= mss * 9,
            "{address}: segments of {now} bytes instead of {mss}"
        );
    }
}

#[test]
fn what_was_sent_and_lost_is_sent_again() {
    let (peer, victim) = pair(ADDRESSES[0]);
    talks(&peer, &victim);
    let lock = lock(&[&victim]);
    // Sent into the locked network: the other end never gets it, and the kernel thinks it is under way.
    (&mut &victim).write_all(b"lost on the way").unwrap();
    let files = testing::tree(vec![testing::look(&victim)]);
    let image = testing::dump(&files);
    testing::abandon(files, vec![victim.into()]);
    let restore = testing::open(&image);
    drop(lock);
    let victim = TcpStream::from(testing::resume(restore).remove(&1).unwrap());
    assert_eq!(read_exactly(&peer, 15), b"lost on the way");
    talks(&victim, &peer);
}

#[test]
fn both_ends_in_one_tree_find_each_other_again() {
    for address in ADDRESSES {
        let (client, server) = pair(address);
        let to_server = stuff(&client, 1);
        let to_client = stuff(&server, 2);
        let (mut moved, _) = carry(vec![client, server]);
        let (server, client) = (moved.pop().unwrap(), moved.pop().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(read_exactly(&server, to_server.len()) == to_server));
            assert!(read_exactly(&client, to_client.len()) == to_client);
        });
        talks(&client, &server);
    }
}

#[test]
fn the_source_goes_on_unharmed_after_a_dump() {
    for reuse in [0, 1] {
        let (peer, victim) = pair(ADDRESSES[0]);
        set_socket_option_int(victim.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse).unwrap();
        let to_peer = stuff(&victim, 3);
        let to_victim = stuff(&peer, 4);
        let lock = lock(&[&victim]);
        for _ in 0..3 {
            testing::dump(&testing::tree(vec![testing::look(&victim)]));
        }
        assert_eq!(int(&victim, TCP, TCP_REPAIR), 0);
        assert_eq!(int(&victim, libc::SOL_SOCKET, libc::SO_REUSEADDR), reuse);
        drop(lock);
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(read_exactly(&peer, to_peer.len()) == to_peer));
            assert!(read_exactly(&victim, to_victim.len()) == to_victim);
        });
        talks(&victim, &peer);
    }
}

#[test]
fn a_connection_that_was_abandoned_closes_without_a_word() {
    let (peer, victim) = pair(ADDRESSES[0]);
    (&mut &peer)
        .write_all(b"never read, which would cause a reset")
        .unwrap();
    let files = testing::tree(vec![testing::look(&victim)]);
    testing::abandon(files, vec![victim.into()]);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(state_of(&peer), state::ESTABLISHED);
    peer.set_nonblocking(true).unwrap();
    assert_eq!(
        (&mut &peer).read(&mut [0]).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
}

#[test]
fn a_server_moves_with_its_listener_and_its_clients() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(rustix::net::listen(&listener, 77), Ok(()));
    set_socket_option_int(listener.as_fd(), TCP, libc::TCP_DEFER_ACCEPT, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let clients: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut servers: Vec<TcpStream> = clients.iter().map(|_| listener.accept().unwrap().0).collect();
    let reuse = int(&listener, libc::SOL_SOCKET, libc::SO_REUSEADDR);
    let locked = lock(&servers.iter().collect::<Vec<_>>());
    // The listener comes first once, and last once.
    for first in [true, false] {
        let listening = listener.try_clone().unwrap();
        let mut all: Vec<OpenFile> = servers.iter().map(testing::look).collect();
        let at = if first { 0 } else { all.len() };
        all.insert(at, testing::look(&listening));
        let image = testing::dump(&testing::tree(all));
        let entry = image
            .entries
            .values()
            .find_map(|entry| entry.isk.as_ref().filter(|isk| isk.state == state::LISTEN));
        assert_eq!(entry.unwrap().backlog, 77);
    }
    let mut all = vec![testing::look(&listener)];
    all.extend(servers.iter().map(testing::look));
    let files = testing::tree(all);
    let image = testing::dump(&files);
    let mut originals: Vec<OwnedFd> = servers.drain(..).map(OwnedFd::from).collect();
    originals.push(listener.into());
    testing::abandon(files, originals);
    let restore = testing::open(&image);
    drop(locked);
    let mut moved: Vec<OwnedFd> = testing::resume(restore).into_values().collect();
    let listener = TcpListener::from(moved.remove(0));
    assert_eq!(int(&listener, libc::SOL_SOCKET, libc::SO_REUSEADDR), reuse);
    assert_eq!(Info::of(listener.as_fd()).unwrap().sacked, 77);
    for (server, client) in moved.into_iter().map(TcpStream::from).zip(&clients) {
        assert_eq!(server.peer_addr().unwrap(), client.local_addr().unwrap());
        assert_eq!(int(&server, TCP, TCP_REPAIR), 0);
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        talks(&server, client);
    }
    let late = TcpStream::connect(address).unwrap();
    talks(&listener.accept().unwrap().0, &late);
}

#[test]
fn listener_and_connections_can_be_opened_in_any_order() {
    for listener_first in [true, false] {
        let listener = TcpListener::bind("[::]:0").unwrap();
        set_socket_option_int(listener.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, _) = listener.accept().unwrap();
        let locked = lock(&[&server]);
        let mut all = vec![testing::look(&listener), testing::look(&server)];
        if !listener_first {
            all.reverse();
        }
        let files = testing::tree(all);
        let image = testing::dump(&files);
        testing::abandon(files, vec![listener.into(), server.into()]);
        let restore = testing::open(&image);
        drop(locked);
        let mut moved = testing::resume(restore);
        let (listener, server) = if listener_first { (1, 2) } else { (2, 1) };
        let listener = TcpListener::from(moved.remove(&listener).unwrap());
        assert_eq!(int(&listener, libc::SOL_SOCKET, libc::SO_REUSEADDR), 0);
        assert_eq!(int(&listener, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY), 0);
        talks(&TcpStream::from(moved.remove(&server).unwrap()), &client);
    }
}

#[test]
fn options_of_a_connection_are_carried() {
    let (peer, victim) = pair("127.0.0.1:0");
    for (level, name, value) in [
        (TCP, libc::TCP_NODELAY, 1),
        (TCP, libc::TCP_KEEPIDLE, 77),
        (TCP, libc::TCP_KEEPINTVL, 7),
        (TCP, libc::TCP_KEEPCNT, 3),
        (TCP, libc::TCP_USER_TIMEOUT, 12_345),
        (TCP, libc::TCP_NOTSENT_LOWAT, 54_321),
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 5),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        (libc::IPPROTO_IP, libc::IP_TTL, 33),
    ] {
        set_socket_option_int(victim.as_fd(), level, name, value).unwrap();
    }
    let other = b"reno";
    let changed = set_socket_option(victim.as_fd(), TCP, libc::TCP_CONGESTION, other).is_ok();
    victim.set_nonblocking(true).unwrap();
    let (mut moved, before) = carry(vec![victim]);
    let victim = moved.remove(0);
    let after = testing::dump(&testing::tree(vec![testing::look(&victim)]));
    let (before, after) = (
        before.entries[&1].isk.clone().unwrap(),
        after.entries[&1].isk.clone().unwrap(),
    );
    assert_eq!((&before.tcp_opts, &before.ip_opts), (&after.tcp_opts, &after.ip_opts));
    assert_eq!((&before.opts, before.flags), (&after.opts, after.flags));
    assert_eq!(before.tcp_opts.unwrap().keepidle, Some(77));
    if changed {
        let name = socket_option(victim.as_fd(), TCP, libc::TCP_CONGESTION, 16).unwrap();
        assert!(name.starts_with(other));
    }
    drop(peer);
}

#[test]
fn a_connection_is_refused_with_its_ends_and_the_option_that_helps() {
    let (_peer, victim) = pair("127.0.0.1:0");
    let files = testing::tree(vec![testing::look(&victim)]);
    let error = testing::try_dump(&files, &crate::dump::Options::default())
        .err()
        .unwrap();
    let (local, remote) = (victim.local_addr().unwrap(), victim.peer_addr().unwrap());
    let expected = format!("carry a connected TCP socket, {local} ↔ {remote}; use --tcp-established");
    assert_eq!(error.chain(), expected);
}

#[test]
fn a_socket_that_is_only_bound_stays_bound() {
    let identity = crate::kernel::socket::Identity {
        family: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        protocol: TCP,
    };
    let (bound, fresh) = (identity.make().unwrap(), identity.make().unwrap());
    rustix::net::bind(&bound, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    set_socket_option_int(bound.as_fd(), TCP, libc::TCP_MAXSEG, 1000).unwrap();
    let ends = Ends::of(bound.as_fd()).unwrap();
    let files = testing::tree(vec![testing::look(&bound), testing::look(&fresh)]);
    let image = testing::dump(&files);
    testing::abandon(files, vec![bound, fresh]);
    let moved = testing::resume(testing::open(&image));
    assert_eq!(Ends::of(moved[&1].as_fd()).unwrap(), ends);
    assert_eq!(int(&moved[&1], TCP, libc::TCP_MAXSEG), 1000);
    assert_eq!(Ends::of(moved[&2].as_fd()).unwrap().local.port(), 0);
    rustix::net::listen(&moved[&1], 1).unwrap();
}

#[test]
fn a_connection_that_is_over_reads_as_over() {
    let (peer, victim) = pair("127.0.0.1:0");
    set_socket_option(
        peer.as_fd(),
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &[1, 0, 0, 0, 0, 0, 0, 0],
    )
    .unwrap();
    drop(peer);
    assert!((&mut &victim).read(&mut [0]).is_err(), "a reset");
    let victim = TcpStream::from(
        testing::resume(testing::open(&testing::dump(&testing::tree(vec![testing::look(
            &victim,
        )]))))
        .remove(&1)
        .unwrap(),
    );
    assert_eq!((&mut &victim).read(&mut [0]).unwrap(), 0);
    assert_eq!(
        (&mut &victim).write(b"x").unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
}

#[test]
fn a_connection_that_the_other_end_closed_gives_the_rest_and_then_the_end() {
    for address in ADDRESSES {
        let (peer, victim) = pair(address);
        (&mut &peer).write_all(b"the rest").unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        wait_for(&victim, state::CLOSE_WAIT);
        let victim = carry_one(victim);
        assert_eq!(read_exactly(&victim, 8), b"the rest");
        assert_eq!((&mut &victim).read(&mut [0]).unwrap(), 0);
        (&mut &victim).write_all(b"answer").unwrap();
        assert_eq!(read_exactly(&peer, 6), b"answer");
        drop(victim);
        assert_eq!((&mut &peer).read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_connection_that_we_closed_still_receives() {
    // Once with all sent, once with the FIN behind data that does not fit, once with the FIN confirmed.
    for full in [true, false] {
        let (peer, victim) = pair("127.0.0.1:0");
        let to_peer = if full { stuff(&victim, 9) } else { b"bye".to_vec() };
        if !full {
            (&mut &victim).write_all(&to_peer).unwrap();
        }
        victim.shutdown(std::net::Shutdown::Write).unwrap();
        wait_for(&victim, if full { state::FIN_WAIT1 } else { state::FIN_WAIT2 });
        let victim = carry_one(victim);
        assert_eq!(
            (&mut &victim).write(b"x").unwrap_err().kind(),
            io::ErrorKind::BrokenPipe
        );
        assert!(read_exactly(&peer, to_peer.len()) == to_peer);
        assert_eq!((&mut &peer).read(&mut [0]).unwrap(), 0);
        (&mut &peer).write_all(b"answer").unwrap();
        assert_eq!(read_exactly(&victim, 6), b"answer");
        drop(peer);
        assert_eq!((&mut &victim).read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_connection_that_both_closed_delivers_what_is_queued() {
    let (peer, victim) = pair("127.0.0.1:0");
    let to_peer = stuff(&victim, 8);
    (&mut &peer).write_all(b"the rest").unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    wait_for(&victim, state::CLOSE_WAIT);
    victim.shutdown(std::net::Shutdown::Write).unwrap();
    wait_for(&victim, state::LAST_ACK);
    let victim = carry_one(victim);
    assert!(read_exactly(&peer, to_peer.len()) == to_peer);
    assert_eq!((&mut &peer).read(&mut [0]).unwrap(), 0);
    assert_eq!(read_exactly(&victim, 8), b"the rest");
    assert_eq!((&mut &victim).read(&mut [0]).unwrap(), 0);
}

fn wait_for(stream: &TcpStream, wanted: u32) {
    let start = Instant::now();
    while state_of(stream) != wanted {
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "state {} instead of {wanted}",
            state_of(stream)
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn random_traffic_survives_moves_at_random_moments() {
    const MOVES: usize = 12;
    for seed in 1..=6u64 {
        let (peer, mut victim) = pair(ADDRESSES[seed as usize % ADDRESSES.len()]);
        let mut random = Random(seed);
        let echo = std::thread::spawn(move || echo(peer, Random(seed * 77)));
        let (mut written, mut read) = (0u64, 0u64);
        for _ in 0..MOVES {
            victim.set_nonblocking(true).unwrap();
            let until = Instant::now() + Duration::from_millis(random.next() % 25);
            while Instant::now() < until {
                let count = (random.next() % 60_000) as usize + 1;
                let piece: Vec<u8> = (written..).take(count).map(byte_at).collect();
                written += (&mut &victim).write(&piece).unwrap_or(0) as u64;
                let mut buffer = vec![0; (random.next() % 60_000) as usize + 1];
                let got = (&mut &victim).read(&mut buffer).unwrap_or(0);
                assert!(
                    (read..).zip(&buffer[..got]).all(|(at, &byte)| byte == byte_at(at)),
                    "seed {seed}"
                );
                read += got as u64;
            }
            // The move itself, with the other end writing and reading all the time.
            victim = carry_one(victim);
        }
        victim.set_nonblocking(false).unwrap();
        victim.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        victim.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        (&mut &victim).read_to_end(&mut rest).unwrap();
        assert!(
            (read..).zip(&rest).all(|(at, &byte)| byte == byte_at(at)),
            "seed {seed}"
        );
        assert_eq!(echo.join().unwrap(), (written, read + rest.len() as u64), "seed {seed}");
    }
}

/// Reads what comes, checks it, and sends its own, in pieces of any size; how much of each.
fn echo(stream: TcpStream, mut random: Random) -> (u64, u64) {
    let (mut read, mut written) = (0u64, 0u64);
    stream.set_nonblocking(true).unwrap();
    loop {
        let mut buffer = vec![0; (random.next() % 90_000) as usize + 1];
        match (&mut &stream).read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => {
                assert!((read..).zip(&buffer[..got]).all(|(at, &byte)| byte == byte_at(at)));
                read += got as u64;
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        if random.next().is_multiple_of(3) {
            let piece: Vec<u8> = (written..)
                .take((random.next() % 40_000) as usize)
                .map(byte_at)
                .collect();
            match (&mut &stream).write(&piece) {
                Ok(count) => written += count as u64,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        std::thread::sleep(Duration::from_micros(random.next() % 300));
    }
    (read, written)
}

fn byte_at(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn damaged_images_are_refused() {
    let (peer, victim) = pair("127.0.0.1:0");
    (&mut &peer).write_all(b"queued").unwrap();
    wait_until(|| queue_length(victim.as_fd(), SIOCINQ).unwrap() == 6);
    let image = testing::dump(&testing::tree(vec![testing::look(&victim)]));
    let name = image_name(image.entries[&1].isk.as_ref().unwrap().ino);
    let load = |change: &dyn Fn(&mut TcpStreamEntry), data: &[u8]| {
        let mut entry: TcpStreamEntry = ImageReader::open(&image.store, &name).unwrap().required().unwrap();
        change(&mut entry);
        let mut bytes = Vec::new();
        let mut writer = ImageWriter::new(&name, &mut bytes).unwrap();
        writer.write(&entry).unwrap();
        writer.extra(data).unwrap();
        writer.finish().unwrap();
        let copy = whimbrel_images::store::MemStore::new();
        copy.insert(&name, bytes).unwrap();
        let mut reader = ImageReader::open(&copy, &name).unwrap();
        Stream::load(&mut reader).map(|stream| stream.inq)
    };
    assert_eq!(load(&|_| {}, b"queued").unwrap(), b"queued");
    assert!(load(&|_| {}, b"que").is_err(), "cut short");
    assert!(load(&|entry| entry.inq_len = u32::MAX, b"queued").is_err());
    assert!(load(&|entry| entry.outq_len = u32::MAX, b"queued").is_err());
    assert!(load(&|entry| entry.unsq_len = Some(1), b"queued").is_err());
}

fn wait_until(done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(2));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_reset_that_the_program_has_not_heard_of_comes_after_what_it_has_not_read() {
    for address in ADDRESSES {
        for text in [&b"unread"[..], b""] {
            let (victim, mut peer) = pair(address);
            let local = victim.local_addr().unwrap();
            peer.write_all(text).unwrap();
            let linger = [1u32.to_ne_bytes(), [0; 4]].concat();
            set_socket_option(peer.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            drop(peer);
            std::thread::sleep(Duration::from_millis(20));
            let files = testing::tree(vec![testing::look(&victim)]);
            let image = testing::dump(&files);
            testing::abandon(files, vec![victim.into()]);
            let mut victim = TcpStream::from(testing::resume(testing::open(&image)).remove(&1).unwrap());
            assert_eq!(Info::of(victim.as_fd()).unwrap().state, state::CLOSE);
            assert_eq!(victim.local_addr().unwrap(), local);
            let mut buffer = [0; 16];
            if !text.is_empty() {
                assert_eq!(victim.read(&mut buffer).unwrap(), text.len());
            }
            let error = victim.read(&mut buffer).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET), "{address}");
            assert_eq!(victim.read(&mut buffer).unwrap(), 0);
        }
    }
}

#[test]
fn what_was_not_read_of_a_connection_that_is_over_is_read_to_the_end() {
    for address in ADDRESSES {
        let (victim, mut peer) = pair(address);
        peer.write_all(&[7; 100_000]).unwrap();
        drop(peer);
        victim.shutdown(std::net::Shutdown::Write).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(Info::of(victim.as_fd()).unwrap().state, state::CLOSE);
        let files = testing::tree(vec![testing::look(&victim)]);
        let image = testing::dump(&files);
        testing::abandon(files, vec![victim.into()]);
        let mut victim = TcpStream::from(testing::resume(testing::open(&image)).remove(&1).unwrap());
        let mut found = Vec::new();
        victim.read_to_end(&mut found).unwrap();
        assert_eq!(found, [7; 100_000], "{address}");
        assert!(victim.write(b"x").is_err());
    }
}

#[test]
fn a_connection_that_is_being_asked_for_is_made_after_the_move() {
    // A full listener answers nobody.
    let listener = std::os::fd::OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    rustix::net::listen(&listener, 0).unwrap();
    let address = SocketAddr::try_from(rustix::net::getsockname(&listener).unwrap()).unwrap();
    let _first = TcpStream::connect(address).unwrap();
    let identity = crate::kernel::socket::Identity {
        family: libc::AF_INET,
        kind: libc::SOCK_STREAM,
        protocol: TCP,
    };
    let victim = identity.make().unwrap();
    ask_again(
        victim.as_fd(),
        &Ends {
            local: address,
            remote: address,
        },
    )
    .unwrap();
    assert_eq!(Info::of(victim.as_fd()).unwrap().state, state::SYN_SENT);
    let local = Ends::of(victim.as_fd()).unwrap().local;
    let files = testing::tree(vec![testing::look(&victim)]);
    let image = testing::dump(&files);
    testing::abandon(files, vec![victim]);
    let listener = TcpListener::from(listener);
    listener.accept().unwrap();
    let victim = testing::resume(testing::open(&image)).remove(&1).unwrap();
    let mut victim = TcpStream::from(victim);
    let (mut peer, from) = listener.accept().unwrap();
    assert_eq!(from, local);
    victim.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    peer.write_all(b"x").unwrap();
    assert_eq!(victim.read(&mut [0; 4]).unwrap(), 1);
    assert!(sys::fcntl_int(victim.as_fd(), libc::F_GETFL, 0).unwrap() & libc::O_NONBLOCK == 0);
}

#[test]
fn urgent_data_is_refused_until_it_is_read_and_the_rest_goes_on_without_it() {
    let (mut client, server) = pair("127.0.0.1:0");
    client.write_all(b"abc").unwrap();
    rustix::net::send(&client, b"U", SendFlags::OOB).unwrap();
    client.write_all(b"def").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let files = testing::tree(vec![testing::look(&server)]);
    let refused = testing::try_dump(&files, &testing::everything()).err().unwrap().chain();
    assert!(refused.contains("MSG_OOB"), "{refused}");
    rustix::net::recv(&server, &mut [0; 1][..], RecvFlags::OOB).unwrap();
    drop(files);
    let (mut streams, _) = carry(vec![server, client]);
    let (mut client, mut server) = (streams.pop().unwrap(), streams.pop().unwrap());
    client.write_all(b"ghi").unwrap();
    let mut found = [0; 9];
    server.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"abcdefghi");
}

#[test]
fn connections_that_wait_to_be_accepted_are_refused_unless_they_may_be_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let files = testing::tree(vec![testing::look(&listener)]);
    let refused = testing::try_dump(&files, &testing::everything()).err().unwrap().chain();
    assert!(refused.contains("--skip-in-flight"), "{refused}");
    let options = crate::dump::Options {
        skip_in_flight: true,
        ..testing::everything()
    };
    assert!(testing::try_dump(&files, &options).is_ok());
}

#[test]
fn a_connection_that_is_to_be_closed_comes_back_over() {
    let (server, mut client) = pair("127.0.0.1:0");
    let files = testing::tree(vec![testing::look(&server)]);
    let options = crate::dump::Options {
        tcp_established: false,
        tcp_close: true,
        ..testing::everything()
    };
    let image = testing::try_dump(&files, &options)
        .map_err(|error| error.chain())
        .unwrap();
    drop((files, server));
    // Nobody keeps the end of it from the other side.
    assert_eq!(client.read(&mut [0; 4]).unwrap(), 0);
    let mut server = TcpStream::from(testing::resume(testing::open(&image)).remove(&1).unwrap());
    assert_eq!(server.read(&mut [0; 4]).unwrap(), 0);
    assert!(server.write(b"x").is_err());
}
