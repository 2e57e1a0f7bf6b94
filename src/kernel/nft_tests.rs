//! The network lock, each test in a network namespace of its own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::*;

/// Runs `body` in a thread that has a fresh network namespace with loopback up.
pub fn in_fresh_netns(body: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: moves this thread alone to a new network namespace.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "needs CAP_SYS_ADMIN");
        loopback_up();
        body();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn loopback_up() {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // SAFETY: all bytes of an ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    use std::os::fd::AsRawFd;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    assert_eq!(result, 0);
}

fn pair(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    (client, server)
}

fn connection(stream: &TcpStream) -> Connection {
    Connection {
        protocol: Protocol::Tcp,
        local: stream.local_addr().unwrap(),
        remote: stream.peer_addr().unwrap(),
    }
}

fn passes(from: &mut TcpStream, to: &mut TcpStream) -> bool {
    from.write_all(b"x").unwrap();
    to.read(&mut [0; 16]).is_ok_and(|count| count > 0)
}

#[test]
fn locked_connections_stand_still_and_go_on_while_others_pass() {
    in_fresh_netns(|| {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (mut client, mut server) = pair(address);
            let (mut other_client, mut other_server) = pair(address);
            assert!(passes(&mut client, &mut server));
            let mut lock = NetworkLock::new_in_current_netns().unwrap();
            lock.lock(&[connection(&server)]).unwrap();
            assert!(!passes(&mut client, &mut server), "{address}");
            assert!(!passes(&mut server, &mut client), "{address}");
            assert!(passes(&mut other_client, &mut other_server));
            lock.lock(&[connection(&other_client), connection(&server)]).unwrap();
            assert!(!passes(&mut other_client, &mut other_server));
            lock.unlock().unwrap();
            server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // What was sent meanwhile arrives by retransmission.
            assert!(server.read(&mut [0; 16]).unwrap() > 0);
            assert!(client.read(&mut [0; 16]).unwrap() > 0);
            lock.lock(&[connection(&server)]).unwrap();
            assert!(table_exists(lock.table()).unwrap());
            let table = lock.table().to_owned();
            drop(lock);
            assert!(!table_exists(&table).unwrap(), "dropping the lock removes its table");
            assert!(passes(&mut client, &mut server));
        }
    });
}

#[test]
fn mapped_addresses_and_udp_are_locked_too() {
    in_fresh_netns(|| {
        let one = UdpSocket::bind("127.0.0.1:0").unwrap();
        let two = UdpSocket::bind("127.0.0.1:0").unwrap();
        one.connect(two.local_addr().unwrap()).unwrap();
        two.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        one.send(b"x").unwrap();
        assert!(two.recv(&mut [0; 4]).is_ok());
        let mapped = |address: SocketAddr| {
            let IpAddr::V4(ip) = address.ip() else { unreachable!() };
            SocketAddr::new(ip.to_ipv6_mapped().into(), address.port())
        };
        let mut lock = NetworkLock::new_in_current_netns().unwrap();
        lock.lock(&[Connection {
            protocol: Protocol::Udp,
            local: mapped(one.local_addr().unwrap()),
            remote: two.local_addr().unwrap(),
        }])
        .unwrap();
        let _ = one.send(b"x");
        assert!(two.recv(&mut [0; 4]).is_err());
        drop(lock);
        one.send(b"x").unwrap();
        assert!(two.recv(&mut [0; 4]).is_ok());
    });
}

#[test]
fn marked_packets_pass() {
    in_fresh_netns(|| {
        let (mut client, mut server) = pair("127.0.0.1:0");
        let mut lock = NetworkLock::new_in_current_netns().unwrap().exempt_mark(Some(0xC114));
        lock.lock(&[connection(&server)]).unwrap();
        assert!(!passes(&mut client, &mut server));
        use std::os::fd::AsRawFd;
        let mark = 0xC114u32;
        for stream in [&client, &server] {
            let (fd, value) = (stream.as_raw_fd(), std::ptr::from_ref(&mark).cast());
            // SAFETY: SO_MARK reads a four-byte value, which lives through the call.
            let result = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_MARK, value, 4) };
            assert_eq!(result, 0);
        }
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert!(passes(&mut client, &mut server));
    });
}

#[test]
fn two_locks_of_one_process_do_not_disturb_each_other() {
    in_fresh_netns(|| {
        let (mut client, mut server) = pair("127.0.0.1:0");
        let mut first = NetworkLock::new_in_current_netns().unwrap();
        let mut second = NetworkLock::new_in_current_netns().unwrap();
        first.lock(&[connection(&server)]).unwrap();
        second.lock(&[connection(&server)]).unwrap();
        assert_ne!(first.table(), second.table());
        drop(first);
        assert!(!passes(&mut client, &mut server));
        second.unlock().unwrap();
    });
}

#[test]
fn thousands_of_connections_are_locked_in_one_step() {
    in_fresh_netns(|| {
        let (mut client, mut server) = pair("127.0.0.1:0");
        let mut connections: Vec<Connection> = (0..20_000u32)
            .map(|number| Connection {
                protocol: Protocol::Tcp,
                local: SocketAddr::from(([10, 0, 0, 1], 80)),
                remote: SocketAddr::from(([10, 1, (number >> 8) as u8, number as u8], 4000)),
            })
            .collect();
        connections.push(connection(&client));
        let start = std::time::Instant::now();
        let mut lock = NetworkLock::new_in_current_netns().unwrap();
        lock.lock(&connections).unwrap();
        println!("locking {} connections took {:?}", connections.len(), start.elapsed());
        assert!(!passes(&mut client, &mut server));
        lock.unlock().unwrap();
    });
}

#[test]
fn connections_of_mixed_families_are_refused() {
    let mut lock = NetworkLock::new_in_current_netns().unwrap();
    let (local, remote) = ("127.0.0.1:1".parse().unwrap(), "[::1]:2".parse().unwrap());
    let mixed = Connection {
        protocol: Protocol::Tcp,
        local,
        remote,
    };
    assert!(matches!(lock.lock(&[mixed]), Err(NftError::MixedFamilies(_))));
}

#[test]
fn the_lock_ends_with_its_process_even_by_sigkill() {
    in_fresh_netns(|| {
        let (mut client, mut server) = pair("127.0.0.1:0");
        let connections = [connection(&server)];
        let (mut ready, mut tell) = std::os::unix::net::UnixStream::pair().unwrap();
        // SAFETY: the child allocates, which the C library allows after a fork of a threaded process, and it takes no lock
        // that another thread may hold; it never returns from here.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            let mut lock = NetworkLock::new_in_current_netns().unwrap();
            let _ = lock.lock(&connections);
            let _ = tell.write_all(b"!");
            loop {
                std::thread::sleep(Duration::from_secs(60));
            }
        }
        drop(tell);
        ready.read_exact(&mut [0]).unwrap();
        let table = format!("whimbrel-{pid}");
        assert!(table_exists(&table).unwrap());
        assert!(!passes(&mut client, &mut server));
        let mut status = 0;
        // SAFETY: ends the child of this test and waits for it.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, &mut status, 0);
        }
        assert!(!table_exists(&table).unwrap());
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(server.read(&mut [0; 16]).unwrap() > 0);
    });
}

#[test]
fn a_locked_listener_gets_no_new_connections_until_it_is_unlocked() {
    in_fresh_netns(|| {
        for (address, locked) in [
            ("127.0.0.1:0", None),
            ("[::1]:0", None),
            ("0.0.0.0:0", Some("0.0.0.0")),
            ("[::]:0", Some("::")),
        ] {
            let listener = TcpListener::bind(address).unwrap();
            let local = listener.local_addr().unwrap();
            let to = match local.ip() {
                ip if ip.is_unspecified() => SocketAddr::new("127.0.0.1".parse().unwrap(), local.port()),
                _ => local,
            };
            let mut lock = NetworkLock::new_in_current_netns().unwrap();
            let ip = locked.map_or(local.ip(), |ip| ip.parse().unwrap());
            lock.lock_listeners(&[SocketAddr::new(ip, local.port())]).unwrap();
            let patience = Duration::from_millis(100);
            assert!(TcpStream::connect_timeout(&to, patience).is_err(), "{address}");
            lock.unlock().unwrap();
            assert!(
                TcpStream::connect_timeout(&to, Duration::from_secs(10)).is_ok(),
                "{address}"
            );
        }
    });
}
