//! Each test that needs a network has a namespace of its own.

use std::net::{TcpListener, UdpSocket};
use std::time::Duration;

use super::super::nft::{NetworkLock, tests::in_fresh_netns};
use super::*;

/// An IP packet from a host that does not exist, with the transport checksum left out.
fn packet(source: SocketAddr, destination: SocketAddr, protocol: u8, transport: &[u8]) -> Vec<u8> {
    let mut packet = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let length = (20 + transport.len() as u16).to_be_bytes();
            let mut header = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0];
            header.extend([from.octets(), to.octets()].concat());
            header
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let length = (transport.len() as u16).to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
            header.extend([from.octets(), to.octets()].concat());
            header
        }
        _ => unreachable!(),
    };
    packet.extend_from_slice(&source.port().to_be_bytes());
    packet.extend_from_slice(&destination.port().to_be_bytes());
    packet.extend_from_slice(&transport[4..]);
    packet
}

fn datagram(source: SocketAddr, destination: SocketAddr, text: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend((8 + text.len() as u16).to_be_bytes());
    body.extend([0, 0]);
    body.extend(text);
    packet(source, destination, UDP, &body)
}

fn segment(source: SocketAddr, destination: SocketAddr, flags: u8) -> Vec<u8> {
    let mut body = vec![0; 20];
    body[12] = 5 << 4;
    body[13] = flags;
    body[14..16].copy_from_slice(&1000u16.to_be_bytes());
    packet(source, destination, TCP, &body)
}

const STRANGERS: [(&str, &str); 2] = [("10.9.8.7:1234", "127.0.0.1:0"), ("[2001:db8::7]:1234", "[::1]:0")];

#[test]
fn a_kept_datagram_reaches_its_socket_with_its_senders_address() {
    in_fresh_netns(|| {
        for (from, to) in STRANGERS {
            let from: SocketAddr = from.parse().unwrap();
            let socket = UdpSocket::bind(to).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let to = socket.local_addr().unwrap();
            let connection = Connection {
                protocol: Protocol::Udp,
                local: to,
                remote: from,
            };
            let interest = Interest::new(&[connection], &[]);
            let packets = [datagram(from, to, b"odd"), datagram(from, to, b"even")];
            assert_eq!(deliver(&packets, &interest).unwrap(), 2);
            let mut buffer = [0; 16];
            assert_eq!(socket.recv_from(&mut buffer).unwrap(), (3, from), "{to}");
            assert_eq!(socket.recv_from(&mut buffer).unwrap(), (4, from), "{to}");
        }
    });
}

#[test]
fn a_connection_that_begins_while_its_listener_is_locked_needs_no_retransmission() {
    in_fresh_netns(|| {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(local).unwrap();
            let local = listener.local_addr().unwrap();
            let interest = Interest::new(&[], &[local]);
            let capture = Capture::start(interest.clone()).unwrap();
            let mut lock = NetworkLock::new_in_current_netns().unwrap();
            lock.lock_listeners(&[local]).unwrap();
            let client = std::thread::spawn(move || {
                let client = std::net::TcpStream::connect(local).unwrap();
                crate::kernel::sys::socket_option(client.as_fd(), TCP.into(), libc::TCP_INFO, 104).unwrap()
            });
            let kept = std::iter::repeat_with(|| {
                std::thread::sleep(Duration::from_millis(1));
                capture.take()
            });
            let kept = kept.take(1000).find(|kept| !kept.is_empty()).unwrap();
            lock.unlock().unwrap();
            assert_eq!(deliver(&kept, &interest).unwrap(), 1);
            let info = client.join().unwrap();
            // tcpi_total_retrans
            assert_eq!(info[100..104], [0; 4], "{local}");
            // What belongs to no connection of ours would be answered with a reset.
            let from = SocketAddr::new(local.ip(), 1);
            assert_eq!(deliver(&[segment(from, local, ACK)], &interest).unwrap(), 0);
        }
    });
}

#[test]
fn what_arrives_for_those_of_interest_is_kept_and_nothing_else() {
    in_fresh_netns(|| {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let [ours, other, sender, stranger] = [0; 4].map(|_| UdpSocket::bind(local).unwrap());
            let connection = Connection {
                protocol: Protocol::Udp,
                local: ours.local_addr().unwrap(),
                remote: sender.local_addr().unwrap(),
            };
            let capture = Capture::start(Interest::new(&[connection], &[])).unwrap();
            stranger.send_to(b"no", ours.local_addr().unwrap()).unwrap();
            sender.send_to(b"no", other.local_addr().unwrap()).unwrap();
            sender.send_to(b"this", ours.local_addr().unwrap()).unwrap();
            let kept = capture.take();
            assert_eq!(kept.len(), 1, "{local}");
            assert!(kept[0].ends_with(b"this"));
            assert!(capture.take().is_empty());
        }
    });
}

#[test]
fn datagrams_to_a_locked_socket_are_kept_and_delivered_once() {
    in_fresh_netns(|| {
        for (bound, to) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("0.0.0.0:0", "127.0.0.2"),
            ("[::]:0", "127.0.0.1"),
            ("[::]:0", "::1"),
        ] {
            let socket = UdpSocket::bind(bound).unwrap();
            let local = socket.local_addr().unwrap();
            let to = SocketAddr::new(to.parse().unwrap(), local.port());
            let sender = UdpSocket::bind(SocketAddr::new(to.ip(), 0)).unwrap();
            let interest = Interest::new(&[], &[]).with_datagrams(&[local]);
            let capture = Capture::start(interest.clone()).unwrap();
            let mut lock = NetworkLock::new_in_current_netns().unwrap();
            for text in ["before", "before", "before 2"] {
                sender.send_to(text.as_bytes(), to).unwrap();
            }
            lock.lock_datagrams(&[local]).unwrap();
            for text in ["before", "after"] {
                sender.send_to(text.as_bytes(), to).unwrap();
            }
            let queue = super::super::datagram::peek_all(socket.as_fd()).unwrap().datagrams;
            assert_eq!(queue.len(), 3, "{bound} {to}");
            let kept = not_received(capture.take(), &queue);
            assert!(kept.iter().all(|packet| is_datagram(packet)));
            lock.unlock().unwrap();
            assert_eq!(deliver(&kept, &interest).unwrap(), 2);
            socket.set_nonblocking(true).unwrap();
            let mut buffer = [0; 16];
            let mut read = || {
                let (length, from) = socket.recv_from(&mut buffer).ok()?;
                assert_eq!(from.port(), sender.local_addr().unwrap().port());
                Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
            };
            let found: Vec<String> = std::iter::from_fn(&mut read).collect();
            assert_eq!(
                found,
                ["before", "before", "before 2", "before", "after"],
                "{bound} {to}"
            );
        }
    });
}

#[test]
fn a_datagram_to_an_address_that_is_not_here_reaches_a_socket_on_any_address_and_leaves_the_host_in_no_case() {
    in_fresh_netns(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let local = socket.local_addr().unwrap();
        let (from, to) = (
            "10.9.8.7:1".parse().unwrap(),
            SocketAddr::new([10, 0, 0, 1].into(), local.port()),
        );
        let any = Interest::new(&[], &[]).with_datagrams(&[local]);
        assert_eq!(deliver(&[datagram(from, to, b"x")], &any).unwrap(), 1);
        assert_eq!(socket.recv_from(&mut [0; 4]).unwrap(), (1, from));
        let one = Interest::new(&[], &[to]).with_datagrams(&[to]);
        assert_eq!(
            deliver(&[datagram(from, to, b"x"), segment(from, to, SYN)], &one).unwrap(),
            0
        );
    });
}

#[test]
fn the_kernels_filter_takes_many_ports() {
    in_fresh_netns(|| {
        for count in [FILTERED_PORTS, FILTERED_PORTS + 1] {
            let listeners: Vec<SocketAddr> = (0..count)
                .map(|port| ([127, 0, 0, 1], port as u16 + 1).into())
                .collect();
            Capture::start(Interest::new(&[], &listeners)).unwrap();
        }
    });
}

#[test]
fn a_listener_on_any_address_is_meant_by_packets_to_each() {
    let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
    let from = parse("10.9.8.7:1234");
    for listener in ["0.0.0.0:80", "[::]:80", "10.0.0.1:80", "[::ffff:10.0.0.1]:80"] {
        let interest = Interest::new(&[], &[parse(listener)]);
        assert!(
            interest.header_of(&segment(from, parse("10.0.0.1:80"), SYN)).is_some(),
            "{listener}"
        );
        assert!(
            interest.header_of(&segment(from, parse("10.0.0.1:81"), SYN)).is_none(),
            "{listener}"
        );
        assert!(
            interest
                .header_of(&segment(from, parse("10.0.0.1:80"), SYN | ACK))
                .is_none(),
            "{listener}"
        );
    }
}

#[test]
fn packets_of_any_bytes_are_read_without_a_panic() {
    let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
    let good = [
        segment(parse("10.9.8.7:1234"), parse("10.0.0.1:80"), SYN),
        datagram(parse("[2001:db8::7]:1"), parse("[::1]:2"), b"x"),
    ];
    let mut random = 1u64;
    for good in good {
        for length in 0..=good.len() {
            let _ = Header::parse(&good[..length]);
        }
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..3 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (random >> 33) as usize % bytes.len();
                bytes[at] = (random >> 24) as u8;
            }
            if let Some(header) = Header::parse(&bytes) {
                complete_checksum(&mut bytes[..header.end].to_vec(), &header);
            }
        }
    }
}
