//! Programs with sockets of all kinds ask these themselves, after each dump and restore, whether they are still right.

mod common;

use common::program::{Program, dump_and_restore};
use whimbrel::{dump, restore};

/// Dumps and restores a program twice. It does a round (`check`) before and after each, and says what it finds.
fn twice(code: &str) {
    let program = Program::python(&format!(
        "import fcntl, os, select, socket, struct, time, traceback\n\
         def check(what, got, wanted=True):\n\
         \x20   if got != wanted: report('wrong', what, repr(got)[:200], 'instead of', repr(wanted)[:200])\n\
         {code}\n\
         report('ready')\n\
         while True:\n\
         \x20   try: work()\n\
         \x20   except BaseException: report('wrong', traceback.format_exc().replace('\\n', ' | '))\n\
         \x20   report('ok')\n\
         \x20   time.sleep(0.03)\n"
    ));
    let options = dump::Options {
        tcp_established: true,
        ..dump::Options::default()
    };
    let restore_options = restore::Options {
        tcp_established: true,
        ..restore::Options::default()
    };
    for _ in 0..2 {
        program.goes_on();
        dump_and_restore(program.pid(), &options, &restore_options);
    }
    program.goes_on();
}

#[test]
fn netlink_sockets_keep_port_groups_options_and_are_answered() {
    twice(
        r#"
bound = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
bound.bind((0, 0x11))
bound.setsockopt(270, 11, 1)
wide = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 0)
wide.bind((0, 0))
wide.setsockopt(270, 1, 33)
fresh = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
connected = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
connected.connect((0, 0))
def ask(s):
    s.settimeout(5)
    s.send(struct.pack('IHHIIB15x', 32, 18, 0x301, 1, 0, 0))
    while struct.unpack('H', s.recv(65536)[4:6])[0] != 3: pass
facts = lambda: [(s.getsockname(), s.getsockopt(270, 9, 64), s.getsockopt(270, 11), s.type) for s in (bound, wide)]
before = facts()
def work():
    check('netlink', facts(), before)
    for s in (bound, wide, connected): ask(s)
    again = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    ask(again)
"#,
    );
}

#[test]
fn raw_and_packet_sockets_see_what_they_saw_and_keep_their_options() {
    twice(
        r#"
def checksum(b):
    s = sum(struct.unpack('!%dH' % (len(b) // 2), b))
    while s >> 16: s = (s & 0xffff) + (s >> 16)
    return ~s & 0xffff
def echo(number):
    head = struct.pack('!BBHHH', 8, 0, 0, number, 1)
    return struct.pack('!BBHHH', 8, 0, checksum(head), number, 1)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
raw.setsockopt(255, 1, struct.pack('I', ~1 & 0xffffffff))
six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, 200)
six.setsockopt(41, 7, 2)
headers = socket.socket(socket.AF_INET, socket.SOCK_RAW, 201)
headers.setsockopt(0, 3, 1)
headers.bind(('127.0.0.1', 0))
packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
packet.bind(('lo', 0x800))
packet.setsockopt(263, 8, 1)
packet.setsockopt(263, 1, struct.pack('iHH8s', 1, 1, 0, b''))
facts = lambda: (raw.getsockopt(255, 1, 4), six.getsockopt(41, 7), headers.getsockopt(0, 3), headers.getsockname(),
                 packet.getsockname(), packet.getsockopt(263, 8))
before = facts()
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
n = 0
def work():
    global n
    n += 1
    check('facts', facts(), before)
    raw.settimeout(5)
    raw.sendto(echo(n), ('127.0.0.1', 0))
    while True:
        reply = raw.recv(1000)[20:]
        check('only replies', reply[0], 0)
        if reply[4:6] == struct.pack('!H', n): break
    text = b'find me %d %d.' % (os.getpid(), n)
    sender.sendto(text, ('127.0.0.1', 9))
    packet.settimeout(5)
    while text not in packet.recv(70000): pass
"#,
    );
}

#[test]
fn datagrams_that_wait_are_read_after_the_restore_from_those_who_sent_them() {
    twice(
        r#"
boxes = [socket.socket(f, socket.SOCK_DGRAM) for f in (socket.AF_INET, socket.AF_INET6)]
for box, any in zip(boxes, ('127.0.0.1', '::1')): box.bind((any, 0))
peers = [[socket.socket(box.family, socket.SOCK_DGRAM) for i in range(2)] for box in boxes]
n = 0
def fill():
    for box, pair in zip(boxes, peers):
        for i in range(20): pair[i % 2].sendto(b'%d %d' % (n, i), box.getsockname())
fill()
def work():
    global n
    # The queue is full whenever the program may be dumped.
    for box, pair in zip(boxes, peers):
        box.setblocking(False)
        for i in range(20):
            text, sender = box.recvfrom(100)
            check('text', text, b'%d %d' % (n, i))
            check('sender', sender[1], pair[i % 2].getsockname()[1])
        try: check('one more', box.recv(100), None)
        except BlockingIOError: pass
    n += 1
    fill()
"#,
    );
}

#[test]
fn connections_that_are_over_give_what_was_not_read_and_how_they_ended() {
    let program = Program::python(
        r#"
import socket, struct, time, traceback
def pair():
    l = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(l.getsockname()); a, _ = l.accept(); l.close()
    return c, a
over, peer = pair()
peer.send(b'unread'); time.sleep(.05); peer.close(); over.shutdown(socket.SHUT_WR)
reset, peer = pair()
peer.setsockopt(1, 13, struct.pack('ii', 1, 0)); peer.send(b'data'); time.sleep(.05); peer.close()
hole, sender = pair()
sender.send(b'abc'); sender.send(b'U', socket.MSG_OOB); sender.send(b'def'); time.sleep(.05)
assert hole.recv(1, socket.MSG_OOB) == b'U'
time.sleep(.05)
report('ready')
import signal
moved = []
signal.signal(signal.SIGUSR1, lambda *_: moved.append(1))
while not moved: time.sleep(0.01)
def check(what, got, wanted):
    if got != wanted: report('wrong', what, got, wanted)
try:
    check('over', over.recv(100) + over.recv(100), b'unread')
    check('reset', reset.recv(100), b'data')
    try: check('reset again', reset.recv(100), 'an error')
    except ConnectionResetError: pass
    sender.send(b'ghi')
    hole.settimeout(5)
    got = b''
    while len(got) < 9: got += hole.recv(100)
    check('hole', got, b'abcdefghi')
except BaseException: report('wrong', traceback.format_exc().replace('\n', ' | '))
while True:
    report('ok')
    time.sleep(0.03)
"#,
    );
    program.wait_for("ready", 1);
    let options = dump::Options {
        tcp_established: true,
        ..dump::Options::default()
    };
    let restore_options = restore::Options {
        tcp_established: true,
        ..restore::Options::default()
    };
    dump_and_restore(program.pid(), &options, &restore_options);
    whimbrel::kernel::sys::kill(program.pid(), libc::SIGUSR1).unwrap();
    program.goes_on();
}
