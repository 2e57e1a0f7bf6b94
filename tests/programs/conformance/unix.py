"""Unix sockets."""
import array
import errno
import fcntl
import os
import select
import socket
import struct

from promises import *

SCM_RIGHTS, SCM_CREDENTIALS = socket.SCM_RIGHTS, 2
ONE_HOST = {'two hosts': 'the other process stays on the first host'}


def run(name):
    """A path for a socket, in a directory that each host has for itself."""
    return f'/run/{os.path.basename(place().rstrip("/"))}-{name}' if name else '/run'


def connected(kind=socket.SOCK_STREAM, name=None):
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(run('s') if name is None else name)
    listener.listen(5)
    client = socket.socket(socket.AF_UNIX, kind)
    client.connect(listener.getsockname())
    return listener, client, listener.accept()[0]


def talk(one, two):
    one.send(b'hello')
    equal(two.recv(100), b'hello')
    two.send(b'world')
    equal(one.recv(100), b'world')


def kinds(name):
    """The same promise for each type of socket."""
    def make(function):
        for word, kind in (('stream', socket.SOCK_STREAM), ('dgram', socket.SOCK_DGRAM), ('seqpacket', socket.SOCK_SEQPACKET)):
            def one(kind=kind): yield from function(kind)
            one.__name__ = name.format(word)
            one.__module__ = function.__module__
            promise(one)
    return make


@kinds('a_{}_pair_talks')
def pair(kind):
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    yield
    talk(one, two)
    equal(one.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE), kind)


@kinds('what_is_in_a_{}_pair_is_received')
def queued(kind):
    one, two = socket.socketpair(socket.AF_UNIX, kind)
    for n in range(5): one.send(b'message %d;' % n)
    two.send(b'back')
    yield
    one.send(b'last')
    got = b''
    pieces = []
    while not got.endswith(b'last'):
        pieces.append(two.recv(1000))
        got += pieces[-1]
    equal(got, b''.join(b'message %d;' % n for n in range(5)) + b'last')
    if kind != socket.SOCK_STREAM: equal(len(pieces), 6, 'the number of messages')
    equal(one.recv(100), b'back')


@kinds('a_{}_pair_of_parent_and_child_talks')
def family(kind):
    one, two = socket.socketpair(socket.AF_UNIX, kind)

    def child():
        one.close()
        yield
        two.send(two.recv(100).upper())
    other = Child(child)
    two.close()
    yield
    one.send(b'hello')
    equal(one.recv(100), b'HELLO')
    other.join()


@promise
def a_full_queue_stays_full():
    one, two = socket.socketpair()
    one.setblocking(False)
    sent = 0
    try:
        while True: sent += one.send(b'x' * 1000)
    except BlockingIOError: pass
    yield
    equal(select.select([], [one], [], 0)[1], [], 'there is room')
    got = 0
    while got < sent: got += len(two.recv(65536))
    equal(got, sent)
    equal(select.select([], [one], [], 5)[1], [one])


@promise
def a_listener_goes_on_listening():
    listener, client, server = connected()
    yield
    talk(client, server)
    other = socket.socket(socket.AF_UNIX)
    other.connect(run('s'))
    talk(other, listener.accept()[0])


@promise
def a_listener_with_an_abstract_name_goes_on_listening():
    name = b'\0whimbrel promise %d' % os.getpid()
    listener, client, server = connected(name=name)
    yield
    talk(client, server)
    equal(listener.getsockname(), name)
    other = socket.socket(socket.AF_UNIX)
    other.connect(name)
    talk(other, listener.accept()[0])


@promise
def a_name_that_the_kernel_chose_stays():
    one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    one.bind('')
    name = one.getsockname()
    two = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    yield
    equal(one.getsockname(), name)
    two.sendto(b'hello', name)
    equal(one.recv(100), b'hello')


@promise
def a_socket_with_a_relative_name_stays_reachable():
    os.chdir('/run')
    relative = os.path.basename(run('relative'))
    listener, client, server = connected(name=relative)
    yield
    talk(client, server)
    equal(listener.getsockname(), relative)
    other = socket.socket(socket.AF_UNIX)
    other.connect(run('relative'))
    talk(other, listener.accept()[0])


@promise
def a_socket_whose_name_was_deleted_goes_on():
    listener, client, server = connected()
    os.unlink(run('s'))
    yield
    talk(client, server)
    equal(listener.getsockname(), run('s'))
    check(not os.path.exists(run('s')), 'it has a name again')


@promise(refused='its peer did not accept the connection yet')
def a_connection_that_nobody_has_accepted_is_accepted():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(run('s'))
    listener.listen(5)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for n, client in enumerate(clients):
        client.connect(run('s'))
        client.send(b'%d' % n)
    yield
    for n, client in enumerate(clients):
        server = listener.accept()[0]
        equal(server.recv(10), b'%d' % n)
        talk(client, server)


@promise
def the_backlog_of_a_listener_stays():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(run('s'))
    listener.listen(1)
    yield
    others = []
    for _ in range(2):
        others.append(socket.socket(socket.AF_UNIX))
        others[-1].setblocking(False)
        others[-1].connect(run('s'))
    third = socket.socket(socket.AF_UNIX)
    third.setblocking(False)
    fails(errno.EAGAIN, third.connect, run('s'))


@promise
def a_bound_socket_that_does_not_listen_yet_can():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(run('s'))
    yield
    listener.listen()
    other = socket.socket(socket.AF_UNIX)
    other.connect(run('s'))
    talk(other, listener.accept()[0])


@promise
def a_socket_that_has_nothing_yet_can_connect():
    client = socket.socket(socket.AF_UNIX)
    listener, *_ = connected()
    yield
    client.connect(run('s'))
    listener.accept()


@promise
def datagrams_from_many_senders_keep_their_senders():
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(run('r'))
    senders = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)]
    for n, sender in enumerate(senders):
        sender.bind(run(f'{n}'))
        sender.connect(run('r'))
        sender.send(b'from %d' % n)
    yield
    for n in range(3): equal(receiver.recvfrom(100), (b'from %d' % n, run(f'{n}')))
    senders[1].send(b'more')
    equal(receiver.recvfrom(100), (b'more', run('1')))


@promise
def a_socket_that_was_shut_for_writing_stays_so():
    one, two = socket.socketpair()
    one.send(b'last')
    one.shutdown(socket.SHUT_WR)
    yield
    equal((two.recv(100), two.recv(100)), (b'last', b''))
    fails(errno.EPIPE, one.send, b'x')
    two.send(b'still')
    equal(one.recv(100), b'still')


@promise
def a_socket_whose_peer_is_gone_says_so_after_its_data():
    one, two = socket.socketpair()
    two.send(b'last')
    two.close()
    yield
    equal((one.recv(100), one.recv(100)), (b'last', b''))
    fails(errno.EPIPE, one.send, b'x')


@promise(refused='it is only in the socket')
def descriptors_on_their_way_arrive():
    one, two = socket.socketpair()
    reader, writer = os.pipe()
    one.sendmsg([b'take'], [(socket.SOL_SOCKET, SCM_RIGHTS, array.array('i', [writer]))])
    os.close(writer)
    yield
    data, ancillary, *_ = two.recvmsg(100, 1000)
    got = array.array('i', ancillary[0][2])[0]
    os.write(got, b'through it')
    equal((data, os.read(reader, 100)), (b'take', b'through it'))


@promise(refused='no process that can be seen has it')
def a_socket_on_its_way_through_itself_arrives():
    one, two = socket.socketpair()
    three, four = socket.socketpair()
    one.sendmsg([b'x'], [(socket.SOL_SOCKET, SCM_RIGHTS, array.array('i', [four.fileno()]))])
    four.close()
    three.send(b'inside')
    yield
    ancillary = two.recvmsg(100, 1000)[1]
    arrived = socket.socket(fileno=array.array('i', ancillary[0][2])[0])
    equal(arrived.recv(100), b'inside')


@promise
def credentials_of_messages_arrive():
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    two.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    one.send(b'before')
    yield
    one.send(b'after')
    for _ in range(2):
        ancillary = two.recvmsg(100, 1000)[1]
        equal(struct.unpack('III', ancillary[0][2]), (os.getpid(), 0, 0))


@promise(broken={'all': 'SO_PEERCRED tells the tool, which made the socket'})
def credentials_of_the_peer_stay():
    listener, client, server = connected()
    yield
    for each in (client, server):
        equal(struct.unpack('III', each.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)), (os.getpid(), 0, 0))


@promise
def options_of_a_unix_socket_stay():
    one, two = socket.socketpair()
    level = socket.SOL_SOCKET
    wanted = {socket.SO_RCVBUF: 30000, socket.SO_SNDBUF: 40000, socket.SO_PASSCRED: 1, socket.SO_PRIORITY: 3, 34: 1, socket.SO_RCVLOWAT: 7, 42: 0, socket.SO_MARK: 9}
    for name, value in wanted.items(): one.setsockopt(level, name, value)
    one.setsockopt(level, socket.SO_RCVTIMEO, struct.pack('ll', 3, 500000))
    one.setsockopt(level, socket.SO_SNDTIMEO, struct.pack('ll', 4, 0))
    before = {name: one.getsockopt(level, name, 16) for name in list(wanted) + [socket.SO_RCVTIMEO, socket.SO_SNDTIMEO]}
    yield
    equal({name: one.getsockopt(level, name, 16) for name in before}, before)


@promise(refused='it has an urgent byte')
def out_of_band_data_arrives():
    one, two = socket.socketpair()
    try: one.send(b'!', socket.MSG_OOB)
    except OSError: skip('the kernel has no out-of-band data in Unix sockets')
    one.send(b'after')
    yield
    equal(two.recv(1, socket.MSG_OOB), b'!')
    equal(two.recv(100), b'after')


@promise(refused='outside of the tree')
def a_peer_outside_of_the_tree_is_refused():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(run('s'))
    listener.listen()
    kept = []
    def dial():
        kept.append(socket.socket(socket.AF_UNIX))
        kept[0].connect(run('s'))
    def say(): return kept[0].recv(100).decode()
    other = Outside(dial=dial, say=say)
    other('dial')
    server = listener.accept()[0]
    yield
    server.send(b'still here')
    equal(other('say'), 'still here')


@promise(options=['--ext-unix-sk'], not_in=ONE_HOST)
def a_socket_bound_outside_of_the_tree_is_sent_to_again():
    kept = []
    def bind():
        kept.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        kept[0].bind(run('outside'))
    def say(): return kept[0].recv(100).decode()
    other = Outside(bind=bind, say=say)
    other('bind')
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.connect(run('outside'))
    yield
    ours.send(b'hello')
    equal(other('say'), 'hello')


@promise
def a_listener_is_reached_from_outside_of_the_tree():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(run('s'))
    listener.listen()
    yield
    def dial():
        s = socket.socket(socket.AF_UNIX)
        s.connect(run('s'))
        return s.recv(100).decode()
    other = Outside(dial=dial)
    other.start('dial')
    listener.accept()[0].send(b'welcome')
    equal(other.answer(), 'welcome')


@promise
def a_thread_that_waits_in_accept_accepts():
    import threading
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(run('s'))
    listener.listen()
    thread = threading.Thread(target=lambda: listener.accept()[0].send(b'welcome'))
    thread.start()
    eventually(lambda: open(f'/proc/self/task/{thread.native_id}/syscall').read().startswith('288 '), 'the thread waits')
    yield
    client = socket.socket(socket.AF_UNIX)
    client.connect(run('s'))
    equal(client.recv(100), b'welcome')
    thread.join()


@promise
def flags_of_sockets_stay():
    one, two = socket.socketpair()
    one.setblocking(False)
    fcntl.fcntl(two, fcntl.F_SETOWN, os.getpid())
    yield
    equal((fcntl.fcntl(one, fcntl.F_GETFL) & os.O_NONBLOCK, fcntl.fcntl(two, fcntl.F_GETFL) & os.O_NONBLOCK), (os.O_NONBLOCK, 0))
    equal(fcntl.fcntl(two, fcntl.F_GETOWN), os.getpid())
    fails(errno.EAGAIN, one.recv, 1)
