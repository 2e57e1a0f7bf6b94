//! Unix sockets that are taken out of this process and put back into it.

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use super::queue::{Outgoing, QUEUES};
use super::*;
use std::os::fd::BorrowedFd;

use rustix::net::{SendFlags, UCred};
use whimbrel_images::proto::SkPacketEntry;

use crate::kernel::message;
use crate::kernel::sys::{set_socket_option_int, socket_option_int};
use crate::resource::sock::testing::{self, Image};

/// A directory for socket files.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("unix-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Directory(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn owned(socket: impl Into<OwnedFd>) -> OwnedFd {
    socket.into()
}

fn carry(sockets: Vec<OwnedFd>) -> Vec<OwnedFd> {
    let files = testing::tree(sockets.iter().map(testing::look).collect());
    let image = testing::dump(&files);
    testing::abandon(files, sockets);
    restore(&image)
}

fn restore(image: &Image) -> Vec<OwnedFd> {
    testing::resume(testing::open(image)).into_values().collect()
}

fn refusal(sockets: &[&OwnedFd]) -> String {
    let files = testing::tree(sockets.iter().map(|&socket| testing::look(socket)).collect());
    testing::try_dump(&files, &testing::everything()).err().unwrap().chain()
}

fn stream(fd: OwnedFd) -> UnixStream {
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

fn two(mut fds: Vec<OwnedFd>) -> (OwnedFd, OwnedFd) {
    let second = fds.pop().unwrap();
    (fds.pop().unwrap(), second)
}

fn read_exactly(stream: &UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    (&mut &*stream).read_exact(&mut bytes).unwrap();
    bytes
}

fn rest_of(stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    (&mut &*stream).read_to_end(&mut bytes).unwrap();
    bytes
}

fn talks(one: &UnixStream, other: &UnixStream) {
    for (from, to) in [(one, other), (other, one)] {
        (&mut &*from).write_all(b"still there?").unwrap();
        assert_eq!(read_exactly(to, 12), b"still there?");
    }
}

#[test]
fn a_pair_goes_on_with_what_is_in_both_queues() {
    let (one, other) = UnixStream::pair().unwrap();
    let large: Vec<u8> = (0..150_000u32).map(|i| (i / 3) as u8).collect();
    (&mut &one).write_all(&large).unwrap();
    (&mut &other).write_all(b"short").unwrap();
    one.set_nonblocking(true).unwrap();
    let (one, other) = two(carry(vec![one.into(), other.into()]));
    assert!(
        rustix::fs::fcntl_getfl(&one)
            .unwrap()
            .contains(rustix::fs::OFlags::NONBLOCK)
    );
    let (one, other) = (stream(one), stream(other));
    assert!(read_exactly(&other, large.len()) == large);
    assert_eq!(read_exactly(&one, 5), b"short");
    talks(&one, &other);
}

#[test]
fn shut_directions_stay_shut() {
    let (one, other) = UnixStream::pair().unwrap();
    (&mut &one).write_all(b"last words").unwrap();
    one.shutdown(std::net::Shutdown::Write).unwrap();
    let (one, other) = two(carry(vec![one.into(), other.into()]));
    let (one, other) = (stream(one), stream(other));
    assert_eq!(rest_of(&other), b"last words");
    (&mut &other).write_all(b"answer").unwrap();
    assert_eq!(read_exactly(&one, 6), b"answer");
    assert_eq!((&mut &one).write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn what_a_closed_peer_left_is_read_to_the_end() {
    let (one, other) = UnixStream::pair().unwrap();
    (&mut &other).write_all(b"legacy").unwrap();
    drop(other);
    let one = stream(carry(vec![one.into()]).remove(0));
    assert_eq!(rest_of(&one), b"legacy");
    assert_eq!((&mut &one).write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn the_source_is_as_it_was_after_a_dump() {
    let (one, other) = UnixStream::pair().unwrap();
    (&mut &one).write_all(b"queued").unwrap();
    for _ in 0..2 {
        let sockets = [owned(one.try_clone().unwrap()), owned(other.try_clone().unwrap())];
        let image = testing::dump(&testing::tree(sockets.iter().map(testing::look).collect()));
        assert!(whimbrel_images::store::ImageStore::exists(&image.store, QUEUES).unwrap());
    }
    let peek = socket_option_int(other.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap();
    assert_eq!(peek, -1);
    assert_eq!(read_exactly(&other, 6), b"queued");
}

#[test]
fn a_listener_at_a_path_comes_back_with_its_file_and_its_connections() {
    let directory = Directory::new("listener");
    let path = directory.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&path, Some(1234), Some(5678)).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (server, _) = listener.accept().unwrap();
    (&mut &client).write_all(b"queued").unwrap();
    // The client comes first, so that it cannot rely on the listener's being there.
    let mut moved = carry(vec![client.into(), server.into(), listener.into()]);
    let listener = UnixListener::from(moved.pop().unwrap());
    let (client, server) = two(moved);
    let (client, server) = (stream(client), stream(server));
    assert_eq!(server.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    assert_eq!(client.peer_addr().unwrap().as_pathname(), Some(path.as_path()));
    assert!(client.local_addr().unwrap().is_unnamed());
    assert_eq!(read_exactly(&server, 6), b"queued");
    talks(&client, &server);
    let file = std::fs::metadata(&path).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((file.mode() & 0o7777, file.uid(), file.gid()), (0o640, 1234, 5678));
    let late = UnixStream::connect(&path).unwrap();
    let accepted = listener.accept().unwrap().0;
    talks(&late, &accepted);
}

#[test]
fn abstract_names_come_back() {
    let name = format!("whimbrel test {}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let client = UnixStream::connect_addr(&address).unwrap();
    let server = listener.accept().unwrap().0;
    let mut moved = carry(vec![listener.into(), client.into(), server.into()]);
    let (client, server) = two(moved.split_off(1));
    let (client, server) = (stream(client), stream(server));
    assert_eq!(client.peer_addr().unwrap().as_abstract_name(), Some(name.as_bytes()));
    talks(&client, &server);
    let late = UnixStream::connect_addr(&address).unwrap();
    talks(&late, &UnixListener::from(moved.remove(0)).accept().unwrap().0);
}

#[test]
fn a_relative_name_is_bound_from_its_directory() {
    let name = format!("relative-{}.socket", std::process::id());
    let listener = UnixListener::bind(&name).unwrap();
    let listener = UnixListener::from(carry(vec![listener.into()]).remove(0));
    assert_eq!(
        listener.local_addr().unwrap().as_pathname(),
        Some(std::path::Path::new(&name))
    );
    let client = UnixStream::connect(&name);
    std::fs::remove_file(&name).unwrap();
    talks(&client.unwrap(), &listener.accept().unwrap().0);
}

#[test]
fn names_whose_files_are_gone_stay_names_and_touch_nothing() {
    let directory = Directory::new("deleted");
    let path = directory.path("deep");
    std::fs::create_dir(&path).unwrap();
    let path = path.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let server = listener.accept().unwrap().0;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "something else").unwrap();
    let before = temporary_directories();
    let mut moved = carry(vec![listener.into(), client.into(), server.into()]);
    assert_eq!(std::fs::read(&path).unwrap(), b"something else");
    let (client, server) = two(moved.split_off(1));
    let listener = UnixListener::from(moved.remove(0));
    assert_eq!(listener.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    talks(&stream(client), &stream(server));
    assert!(temporary_directories() <= before);
}

fn temporary_directories() -> usize {
    let ours = format!("whimbrel-{}-", std::process::id());
    let all = std::fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    all.filter(|entry| entry.file_name().to_string_lossy().starts_with(&ours))
        .count()
}

#[test]
fn a_connection_whose_listener_is_gone_keeps_its_name() {
    let directory = Directory::new("orphan");
    let path = directory.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let server = listener.accept().unwrap().0;
    drop(listener);
    let (client, server) = two(carry(vec![client.into(), server.into()]));
    let (client, server) = (stream(client), stream(server));
    assert_eq!(server.local_addr().unwrap().as_pathname(), Some(path.as_path()));
    talks(&client, &server);
}

#[test]
fn a_socket_file_of_somebody_else_is_left_alone() {
    let directory = Directory::new("foreign");
    let path = directory.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let files = testing::tree(vec![testing::look(&listener)]);
    let image = testing::dump(&files);
    // The original still listens.
    let error = testing::try_open(&image).err().unwrap().chain();
    assert!(error.contains("another program has a socket of that name"), "{error}");
    let client = UnixStream::connect(&path).unwrap();
    talks(&client, &listener.accept().unwrap().0);
    drop((files, listener));
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a document").unwrap();
    let error = testing::try_open(&image).err().unwrap().chain();
    assert!(error.contains("no socket") && error.contains("move it away"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a document");
}

#[test]
fn connections_that_wait_to_be_accepted_still_wait() {
    let directory = Directory::new("waiting");
    let path = directory.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let waiting = UnixStream::connect(&path).unwrap();
    let (waiting, listener) = two(carry(vec![waiting.into(), listener.into()]));
    let (waiting, listener) = (stream(waiting), UnixListener::from(listener));
    listener.set_nonblocking(true).unwrap();
    talks(&waiting, &listener.accept().unwrap().0);
    let again = UnixStream::connect(&path).unwrap();
    (&mut &again).write_all(b"into the void").unwrap();
    let (again, listener) = (owned(again), owned(listener));
    assert!(refusal(&[&again, &listener]).contains("did not accept"));
    assert!(refusal(&[&again]).contains("outside of the tree"));
}

#[test]
fn a_peer_outside_of_the_tree_is_refused_and_named() {
    let (one, other) = UnixStream::pair().unwrap();
    let one = owned(one);
    let error = refusal(&[&one]);
    let us = format!("process {} (", std::process::id());
    assert!(error.contains("outside of the tree") && error.contains(&us), "{error}");
    drop(other);
    restore(&testing::dump(&testing::tree(vec![testing::look(&one)])));
}

#[test]
fn datagrams_keep_their_limits_and_their_senders() {
    let directory = Directory::new("datagrams");
    let (server_path, client_path) = (directory.path("server"), directory.path("client"));
    let server = UnixDatagram::bind(&server_path).unwrap();
    let client = UnixDatagram::bind(&client_path).unwrap();
    let nameless = UnixDatagram::unbound().unwrap();
    client.connect(&server_path).unwrap();
    nameless.connect(&server_path).unwrap();
    client.send(b"one").unwrap();
    client.send(b"").unwrap();
    nameless.send(&[7; 100_000]).unwrap();
    let moved = carry(vec![nameless.into(), client.into(), server.into()]);
    let moved: Vec<UnixDatagram> = moved.into_iter().map(UnixDatagram::from).collect();
    let [nameless, client, server] = &moved[..] else {
        panic!("three sockets");
    };
    server.set_nonblocking(true).unwrap();
    let mut buffer = vec![0; 200_000];
    for expected in [3, 0] {
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((length, from.as_pathname()), (expected, Some(client_path.as_path())));
    }
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert!(length == 100_000 && from.is_unnamed());
    assert_eq!(server.recv(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    client.send(b"again").unwrap();
    nameless.send(b"again").unwrap();
    assert_eq!(
        (server.recv(&mut buffer).unwrap(), server.recv(&mut buffer).unwrap()),
        (5, 5)
    );
    server.send_to(b"back", &client_path).unwrap();
    client.set_nonblocking(true).unwrap();
    assert_eq!(client.recv(&mut buffer).unwrap(), 4);
}

#[test]
fn datagram_pairs_and_dead_peers_are_what_they_were() {
    let (one, other) = UnixDatagram::pair().unwrap();
    one.send(b"queued").unwrap();
    let (one, other) = two(carry(vec![one.into(), other.into()]));
    let (one, other) = (UnixDatagram::from(one), UnixDatagram::from(other));
    let mut buffer = [0; 16];
    assert_eq!(other.recv(&mut buffer).unwrap(), 6);
    other.send(b"answer").unwrap();
    assert_eq!(one.recv(&mut buffer).unwrap(), 6);
    other.send(b"legacy").unwrap();
    drop(other);
    let one = UnixDatagram::from(carry(vec![one.into()]).remove(0));
    assert_eq!(one.recv(&mut buffer).unwrap(), 6);
    assert_eq!(one.send(b"x").unwrap_err().raw_os_error(), Some(libc::ECONNREFUSED));
}

#[test]
fn a_named_datagram_peer_outside_is_found_again_where_that_is_allowed() {
    let directory = Directory::new("logger");
    let path = directory.path("log");
    let logger = UnixDatagram::bind(&path).unwrap();
    let client = UnixDatagram::unbound().unwrap();
    client.connect(&path).unwrap();
    let client = owned(client);
    let error = refusal(&[&client]);
    assert!(
        error.contains("--ext-unix-sk") && error.contains(path.to_str().unwrap()),
        "{error}"
    );
    let files = testing::tree(vec![testing::look(&client)]);
    let options = crate::dump::Options {
        ext_unix_sk: true,
        ..testing::everything()
    };
    let image = testing::try_dump(&files, &options).ok().unwrap();
    testing::abandon(files, vec![client]);
    let client = UnixDatagram::from(restore(&image).remove(0));
    client.send(b"line").unwrap();
    assert_eq!(logger.recv(&mut [0; 16]).unwrap(), 4);
}

fn send_rights(socket: &UnixStream, data: &[u8], rights: &[BorrowedFd<'_>]) {
    Outgoing {
        socket: socket.as_fd(),
        address: None,
        rights,
    }
    .send(data, None)
    .unwrap();
}

#[test]
fn descriptors_in_flight_arrive_with_their_byte() {
    let (one, other) = UnixStream::pair().unwrap();
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    rustix::io::write(&writer, b"through a pipe").unwrap();
    (&mut &one).write_all(&[1; 1000]).unwrap();
    send_rights(&one, &[2; 500], &[reader.as_fd(), one.as_fd()]);
    (&mut &one).write_all(&[3; 10]).unwrap();
    let mut moved = carry(vec![one.into(), other.into(), reader, writer]);
    drop(moved.split_off(2));
    let (_one, other) = two(moved);
    let mut buffer = vec![0; 4096];
    let (mut seen, mut got) = (Vec::new(), Vec::new());
    while seen.len() < 1510 {
        let found = message::take_next(other.as_fd(), &mut buffer[..1]).unwrap();
        if !found.rights.is_empty() {
            assert_eq!(seen.len(), 1000, "the descriptors came with another byte");
            got.extend(found.rights);
        }
        seen.push(buffer[0]);
    }
    assert!(seen == [&[1; 1000][..], &[2; 500], &[3; 10]].concat());
    assert_eq!(got.len(), 2);
    let length = rustix::io::read(&got[0], &mut buffer[..]).unwrap();
    assert_eq!(&buffer[..length], b"through a pipe");
}

#[test]
fn descriptors_that_are_only_in_flight_are_refused() {
    let (one, other) = UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    send_rights(&one, b"x", &[file.as_fd()]);
    drop(file);
    let error = refusal(&[&owned(one), &owned(other)]);
    assert!(
        error.contains("/dev/null") && error.contains("only in the socket's queue"),
        "{error}"
    );
}

#[test]
fn messages_of_sequenced_packets_keep_their_limits() {
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};
    let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    for length in [5, 1, 120_000] {
        rustix::net::send(&one, &vec![length as u8; length], SendFlags::empty()).unwrap();
    }
    let (one, other) = two(carry(vec![one, other]));
    let mut buffer = vec![0; 200_000];
    for length in [5, 1, 120_000] {
        let (got, _) = rustix::net::recv(&other, &mut buffer, RecvFlags::DONTWAIT).unwrap();
        assert_eq!((got, buffer[0]), (length, length as u8));
    }
    drop(one);
    let other = carry(vec![other]).remove(0);
    let (got, _) = rustix::net::recv(&other, &mut buffer, RecvFlags::DONTWAIT).unwrap();
    assert_eq!(got, 0, "the end");
}

#[test]
fn credentials_of_queued_messages_are_kept() {
    let (one, other) = UnixDatagram::pair().unwrap();
    set_socket_option_int(other.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, 1).unwrap();
    let as_user = UCred {
        pid: rustix::process::getpid(),
        uid: rustix::process::Uid::from_raw(4321),
        gid: rustix::process::Gid::from_raw(8765),
    };
    let outgoing = Outgoing {
        socket: one.as_fd(),
        address: None,
        rights: &[],
    };
    outgoing.send(b"signed", Some(as_user)).unwrap();
    let (_one, other) = two(carry(vec![one.into(), other.into()]));
    let found = message::peek(other.as_fd(), &mut [0; 16]).unwrap();
    assert_eq!(found.sender, Some((std::process::id() as i32, 4321, 8765)));
}

#[test]
fn random_streams_with_descriptors_are_carried_byte_for_byte() {
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for _ in 0..30 {
        let (one, other) = UnixStream::pair().unwrap();
        let marker = owned(std::fs::File::open("/dev/zero").unwrap());
        // Where descriptors are, and all bytes.
        let (mut places, mut bytes) = (Vec::new(), Vec::new());
        for _ in 0..random(20) {
            let piece: Vec<u8> = (0..=random(6000)).map(|_| random(256) as u8).collect();
            if random(3) == 0 {
                places.push(bytes.len());
                send_rights(&one, &piece, &[marker.as_fd()]);
            } else {
                (&mut &one).write_all(&piece).unwrap();
            }
            bytes.extend(piece);
        }
        // The program read some of it already.
        let read = random(bytes.len() as u64 + 1) as usize;
        read_exactly(&other, read);
        let expected: Vec<usize> = places.iter().filter(|&&at| at >= read).map(|at| at - read).collect();
        let image_of = |sockets: &[&OwnedFd]| {
            testing::dump(&testing::tree(
                sockets.iter().map(|&socket| testing::look(socket)).collect(),
            ))
        };
        let rights_in = |image: &Image| {
            let mut found = (Vec::new(), Vec::new());
            let Ok(mut reader) = whimbrel_images::entry::ImageReader::open(&image.store, QUEUES) else {
                return found;
            };
            while let Some(packet) = reader.next::<SkPacketEntry>().unwrap() {
                if !packet.scm.is_empty() {
                    found.0.push(found.1.len());
                }
                found.1.extend(reader.extra(u64::from(packet.length)).unwrap());
            }
            found
        };
        let (one, other) = (owned(one), owned(other));
        let image = image_of(&[&one, &other, &marker]);
        let (places, carried) = rights_in(&image);
        assert!(
            (&places, &carried[..]) == (&expected, &bytes[read..]),
            "{places:?} {expected:?}"
        );
        drop((one, other, marker));
        let moved = restore(&image);
        let (places, carried) = rights_in(&image_of(&moved.iter().collect::<Vec<_>>()));
        assert!(
            (&places, &carried[..]) == (&expected, &bytes[read..]),
            "{places:?} {expected:?}"
        );
    }
}

#[test]
fn damaged_images_are_refused() {
    let (one, other) = UnixStream::pair().unwrap();
    let files = testing::tree(vec![testing::look(&one), testing::look(&other)]);
    let image = testing::dump(&files);
    let broken = |change: &dyn Fn(&mut UnixSkEntry)| {
        let mut entries = image.entries.clone();
        change(entries.get_mut(&1).unwrap().usk.as_mut().unwrap());
        let image = Image {
            store: image.store.clone(),
            entries,
        };
        testing::try_open(&image).err().map(|error| error.chain())
    };
    let other_ino = image.entries[&2].usk.as_ref().unwrap().ino;
    assert_eq!(broken(&|_| {}), None);
    assert!(broken(&|entry| entry.peer = 1).is_some(), "no such peer");
    assert!(broken(&|entry| entry.ino = other_ino).is_some(), "one socket twice");
    assert!(broken(&|entry| entry.r#type = 77).is_some());
    assert!(broken(&|entry| entry.name = vec![b'x'; 200]).is_some());
}

#[test]
fn crit_reads_images_of_sockets() {
    if let Err(error) = std::process::Command::new("crit").arg("--help").output() {
        println!("skipped: crit cannot be run: {error}");
        return;
    }
    let directory = Directory::new("crit");
    let listener = UnixListener::bind(directory.path("socket")).unwrap();
    let (one, other) = UnixStream::pair().unwrap();
    send_rights(&one, b"queued", &[one.as_fd()]);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let server = tcp.accept().unwrap().0;
    set_socket_option_int(server.as_fd(), libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 1234).unwrap();
    (&mut &client).write_all(b"unread").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let sockets = [
        owned(listener),
        owned(one),
        owned(other),
        owned(tcp),
        owned(client),
        owned(server),
    ];
    let image = testing::dump(&testing::tree(sockets.iter().map(testing::look).collect()));
    let mut writer = whimbrel_images::entry::ImageWriter::create(&image.store, "files.img").unwrap();
    image.entries.values().for_each(|entry| writer.write(entry).unwrap());
    writer.finish().unwrap();
    let stream = format!("tcp-stream-{:x}.img", image.entries[&6].isk.as_ref().unwrap().ino);
    for (name, bytes) in image.store.take_all() {
        std::fs::write(directory.path(&name), bytes).unwrap();
    }
    let files = [
        r#""state": "LISTEN""#,
        r#""src_addr": ["#,
        r#""127.0.0.1""#,
        r#""type": "STREAM""#,
        r#""flags": "0x2""#,
        r#""state": "ESTABLISHED""#,
    ];
    for (name, wanted) in [
        ("files.img", &files[..]),
        (
            "sk-queues.img",
            &[r#""id_for": 3"#, r#""length": 6"#, r#""extra": "cXVldWVk"#][..],
        ),
        (
            &stream,
            &[r#""inq_len": 6"#, r#""inq": "dW5yZWFk"#, r#""opt_mask": "0x"#][..],
        ),
    ] {
        let output = std::process::Command::new("crit")
            .args(["decode", "--pretty", "-i"])
            .arg(directory.path(name))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        for wanted in wanted {
            assert!(
                text.contains(wanted),
                "{name}: {wanted}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}

#[test]
fn an_urgent_byte_is_refused_until_it_is_read() {
    let (one, two) = UnixStream::pair().unwrap();
    rustix::net::send(&one, b"abc", SendFlags::empty()).unwrap();
    rustix::net::send(&one, b"U", SendFlags::OOB).unwrap();
    let files = testing::tree(vec![testing::look(&one), testing::look(&two)]);
    let refused = testing::try_dump(&files, &testing::everything()).err().unwrap().chain();
    assert!(refused.contains("MSG_OOB"), "{refused}");
    rustix::net::recv(&two, &mut [0; 1][..], rustix::net::RecvFlags::OOB).unwrap();
    assert!(testing::try_dump(&files, &testing::everything()).is_ok());
}
