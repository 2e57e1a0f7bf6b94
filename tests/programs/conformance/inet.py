"""Sockets of the network, with both ends in the tree unless a promise says otherwise."""
import errno
import os
import select
import signal
import socket
import struct
import time

from promises import *

TCP = dict(options=['--tcp-established'])
LEVEL = socket.IPPROTO_TCP


def connected(family=socket.AF_INET, address='127.0.0.1', before=lambda s: None, port=0):
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    before(listener)
    listener.bind((address, port))
    listener.listen(5)
    client = socket.socket(family)
    before(client)
    client.connect(listener.getsockname()[:2])
    server = listener.accept()[0]
    for each in (client, server): each.settimeout(PATIENCE)
    return listener, client, server


def talk(one, two):
    one.sendall(b'hello')
    equal(exactly(two, 5), b'hello')
    two.sendall(b'world')
    equal(exactly(one, 5), b'world')


def exactly(s, length):
    got = b''
    while len(got) < length:
        piece = s.recv(length - len(got))
        check(piece, f'the end came after {got[:100]!r}')
        got += piece
    return got


def state(s):
    return s.getsockopt(LEVEL, socket.TCP_INFO, 104)[0]


ESTABLISHED, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 4, 5, 6, 7, 8, 9, 10, 11


def families(name):
    def make(function):
        for word, family, address in (('ipv4', socket.AF_INET, '127.0.0.1'), ('ipv6', socket.AF_INET6, '::1'), ('mapped', socket.AF_INET6, '::ffff:127.0.0.1')):
            def one(family=family, address=address): yield from function(family, address)
            one.__name__, one.__module__ = name.format(word), function.__module__
            promise(**TCP)(one)
    return make


@families('an_established_connection_over_{}_talks')
def established(family, address):
    listener, client, server = connected(family, address)
    names = client.getsockname(), client.getpeername()
    yield
    equal((client.getsockname(), client.getpeername()), names)
    talk(client, server)


@families('a_listener_over_{}_goes_on_listening')
def listening(family, address):
    listener, client, server = connected(family, address)
    client.close()
    server.close()
    yield
    other = socket.create_connection(listener.getsockname()[:2], PATIENCE)
    talk(other, listener.accept()[0])


@promise(**TCP)
def what_was_received_and_not_read_is_read():
    listener, client, server = connected()
    client.sendall(b'queued' * 1000)
    eventually(lambda: len(server.recv(6000, socket.MSG_PEEK)) == 6000, 'it arrives')
    yield
    client.sendall(b'more')
    equal(exactly(server, 6004), b'queued' * 1000 + b'more')


@promise(**TCP)
def full_queues_in_both_directions_arrive():
    listener, client, server = connected()
    sent = {}
    for s in (client, server):
        s.setblocking(False)
        data = b''
        try:
            while True:
                piece = os.urandom(1000) * 64
                data += piece[:s.send(piece)]
        except BlockingIOError: pass
        sent[s] = data
        s.settimeout(PATIENCE)
    yield
    check(exactly(server, len(sent[client])) == sent[client], 'other bytes')
    check(exactly(client, len(sent[server])) == sent[server], 'other bytes')
    talk(client, server)


@promise(**TCP, broken={'all': 'FIN_WAIT2 and CLOSE_WAIT come back as FIN_WAIT1 and ESTABLISHED, though the FIN had arrived'})
def a_connection_shut_for_writing_still_receives():
    listener, client, server = connected()
    client.sendall(b'last')
    client.shutdown(socket.SHUT_WR)
    eventually(lambda: state(client) == FIN_WAIT2, 'FIN_WAIT2')
    yield
    equal((state(client), state(server)), (FIN_WAIT2, CLOSE_WAIT))
    equal((exactly(server, 4), server.recv(1)), (b'last', b''))
    server.sendall(b'still')
    equal(exactly(client, 5), b'still')
    server.close()
    equal(client.recv(1), b'')


@promise(**TCP)
def a_connection_closed_in_both_directions_stays_closed():
    listener, client, server = connected()
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    eventually(lambda: state(server) == CLOSE, 'it is closed')
    yield
    equal((client.recv(1), server.recv(1)), (b'', b''))
    fails(errno.EPIPE, server.send, b'x')


@promise(**TCP)
def a_connection_that_was_reset_says_so():
    listener, client, server = connected()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    server.close()
    eventually(lambda: state(client) == CLOSE, 'the reset')
    yield
    fails(errno.ECONNRESET, client.recv, 1)


@promise(**TCP, dump=['--skip-in-flight'])
def a_connection_that_nobody_has_accepted_can_be_made_again():
    listener, client, server = connected()
    waiting = socket.create_connection(listener.getsockname())
    yield
    talk(client, server)
    other = socket.create_connection(listener.getsockname(), PATIENCE)
    check(listener.accept(), 'nobody comes')


@promise
def a_bound_socket_keeps_its_port():
    s = socket.socket()
    s.bind(('127.0.0.1', 0))
    name = s.getsockname()
    yield
    equal(s.getsockname(), name)
    fails(errno.EADDRINUSE, socket.socket().bind, name)
    s.listen()
    talk(socket.create_connection(name), s.accept()[0])


@promise
def a_socket_that_has_nothing_yet_can_connect():
    s, listener = socket.socket(), socket.socket()
    listener.bind(('127.0.0.1', 0))
    listener.listen()
    yield
    s.connect(listener.getsockname())
    talk(s, listener.accept()[0])


@promise(**TCP, broken={'all': 'TCP_WINDOW_CLAMP is not carried'})
def options_of_a_connection_stay():
    listener, client, server = connected()
    wanted = {socket.TCP_NODELAY: 1, socket.TCP_KEEPIDLE: 77, socket.TCP_KEEPINTVL: 33, socket.TCP_KEEPCNT: 5, socket.TCP_LINGER2: 20, socket.TCP_USER_TIMEOUT: 12345,
              socket.TCP_DEFER_ACCEPT: 0, socket.TCP_SYNCNT: 3, socket.TCP_QUICKACK: 0, socket.TCP_WINDOW_CLAMP: 20000, 25: 1000, 16: 1}
    for name, value in wanted.items(): client.setsockopt(LEVEL, name, value)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    before = {name: client.getsockopt(LEVEL, name) for name in wanted if name != socket.TCP_QUICKACK}
    yield
    equal({name: client.getsockopt(LEVEL, name) for name in before}, before)
    equal(client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)
    talk(client, server)


@promise(**TCP, broken={'all': 'the segment size that was in use is measured anew'})
def negotiated_properties_of_a_connection_stay():
    listener, client, server = connected()
    def properties(s):
        info = s.getsockopt(LEVEL, socket.TCP_INFO, 104)
        return info[5] & 0x7, info[6], struct.unpack_from('I', info, 16)[0]  # SACK, timestamps, scaling; window scales; MSS
    before = properties(client), properties(server)
    yield
    equal((properties(client), properties(server)), before)


@promise(**TCP)
def congestion_control_stays():
    available = open('/proc/sys/net/ipv4/tcp_available_congestion_control').read().split()
    other = 'reno' if 'reno' in available else available[-1]
    listener, client, server = connected()
    client.setsockopt(LEVEL, socket.TCP_CONGESTION, other.encode())
    yield
    equal(client.getsockopt(LEVEL, socket.TCP_CONGESTION, 16).rstrip(b'\0'), other.encode())
    talk(client, server)


@promise(**TCP)
def a_corked_connection_stays_corked():
    listener, client, server = connected()
    client.setsockopt(LEVEL, socket.TCP_CORK, 1)
    yield
    equal(client.getsockopt(LEVEL, socket.TCP_CORK), 1)
    client.send(b'held back')
    client.setsockopt(LEVEL, socket.TCP_CORK, 0)
    equal(exactly(server, 9), b'held back')


@promise(**TCP, broken={'all': 'urgent data is neither carried nor refused'})
def urgent_data_arrives():
    listener, client, server = connected()
    client.send(b'!', socket.MSG_OOB)
    client.sendall(b'after')
    eventually(lambda: select.select([], [], [server], 0)[2], 'it arrives')
    yield
    equal(server.recv(1, socket.MSG_OOB), b'!')
    equal(exactly(server, 5), b'after')


@promise(**TCP)
def options_of_ip_stay():
    listener, client, server = connected()
    level = socket.IPPROTO_IP
    wanted = {socket.IP_TOS: 0x48, socket.IP_TTL: 33, 10: 2, 15: 1, 8: 1, 12: 1, 13: 1, 24: 0}  # …, MTU_DISCOVER, FREEBIND, PKTINFO, RECVTTL, RECVTOS, BIND_ADDRESS_NO_PORT
    for name, value in wanted.items(): client.setsockopt(level, name, value)
    before = {name: client.getsockopt(level, name) for name in wanted}
    yield
    equal({name: client.getsockopt(level, name) for name in wanted}, before)


@promise
def options_of_ipv6_stay():
    s = socket.socket(socket.AF_INET6)
    level = socket.IPPROTO_IPV6
    wanted = {socket.IPV6_V6ONLY: 1, socket.IPV6_UNICAST_HOPS: 44, 67: 0x20, 49: 1, 51: 1, 66: 1, 23: 2}  # TCLASS, RECVPKTINFO, RECVHOPLIMIT, RECVTCLASS, MTU_DISCOVER
    for name, value in wanted.items(): s.setsockopt(level, name, value)
    before = {name: s.getsockopt(level, name) for name in wanted}
    yield
    equal({name: s.getsockopt(level, name) for name in wanted}, before)


@promise(**TCP)
def options_of_every_socket_stay():
    listener, client, server = connected()
    level = socket.SOL_SOCKET
    wanted = {socket.SO_RCVBUF: 50000, socket.SO_SNDBUF: 60000, socket.SO_PRIORITY: 4, socket.SO_MARK: 17, socket.SO_OOBINLINE: 1, socket.SO_RCVLOWAT: 3, socket.SO_BROADCAST: 1,
              socket.SO_DONTROUTE: 1, socket.SO_REUSEADDR: 1, 15: 1, 29: 1, 46: 50, 47: 1 << 20}
    for name, value in wanted.items():
        try: client.setsockopt(level, name, value)
        except OSError: pass
    client.setsockopt(level, socket.SO_LINGER, struct.pack('ii', 1, 9))
    client.setsockopt(level, socket.SO_RCVTIMEO, struct.pack('ll', 3, 500000))
    before = {name: client.getsockopt(level, name, 16) for name in list(wanted) + [socket.SO_LINGER, socket.SO_RCVTIMEO]}
    yield
    equal({name: client.getsockopt(level, name, 16) for name in before}, before)


@promise
def options_of_a_listener_stay():
    s = socket.socket()
    s.setsockopt(LEVEL, socket.TCP_DEFER_ACCEPT, 3)
    s.setsockopt(LEVEL, socket.TCP_FASTOPEN, 7)
    s.setsockopt(LEVEL, socket.TCP_NODELAY, 1)
    s.bind(('127.0.0.1', 0))
    s.listen(13)
    before = [s.getsockopt(LEVEL, name) for name in (socket.TCP_DEFER_ACCEPT, socket.TCP_FASTOPEN, socket.TCP_NODELAY)]
    backlog = struct.unpack_from('I', s.getsockopt(LEVEL, socket.TCP_INFO, 104), 28)[0]
    yield
    equal([s.getsockopt(LEVEL, name) for name in (socket.TCP_DEFER_ACCEPT, socket.TCP_FASTOPEN, socket.TCP_NODELAY)], before)
    equal(struct.unpack_from('I', s.getsockopt(LEVEL, socket.TCP_INFO, 104), 28)[0], backlog, 'the backlog')


@promise
def listeners_that_share_a_port_go_on_sharing_it():
    first = socket.socket()
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    first.bind(('127.0.0.1', 0))
    others = [first] + [socket.socket() for _ in range(3)]
    for s in others[1:]:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.bind(first.getsockname())
    for s in others: s.listen()
    yield
    reached = set()
    for _ in range(100):
        client = socket.create_connection(first.getsockname())
        for s in select.select(others, [], [], PATIENCE)[0]:
            s.accept()
            reached.add(s)
    check(len(reached) > 1, 'only one of them is reached')


@promise
def a_socket_bound_to_a_device_stays_so():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'lo')
    s.bind(('127.0.0.1', 0))
    s.listen()
    yield
    equal(s.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b'\0'), b'lo')
    talk(socket.create_connection(s.getsockname()), s.accept()[0])


@promise
def an_address_that_the_host_does_not_have_stays_bound():
    s = socket.socket()
    s.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
    s.bind(('192.0.2.77', 0))
    s.listen()
    name = s.getsockname()
    yield
    equal(s.getsockname(), name)


@promise
def classic_filters_stay_or_are_refused():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(('127.0.0.1', 0))
    s.settimeout(0.3)
    code = ctypes.create_string_buffer(struct.pack('HBBI', 0x06, 0, 0, 0))  # drop all
    s.setsockopt(socket.SOL_SOCKET, 26, struct.pack('HxxxxxxQ', 1, ctypes.addressof(code)))
    yield
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', s.getsockname())
    try: s.recv(10)
    except TimeoutError: return
    raise AssertionError('the filter is gone')


@promise(**TCP, not_in={'two hosts': 'the other end stays on the first host'})
def an_end_outside_of_the_tree_goes_on():
    listener = socket.socket()
    listener.bind(('127.0.0.1', 0))
    listener.listen()
    kept = []
    def dial(name):
        kept.append(socket.create_connection(tuple(name), PATIENCE))
    def ask(text):
        kept[0].sendall(text.encode())
        return kept[0].recv(100).decode()
    other = Outside(dial=dial, ask=ask)
    other('dial', listener.getsockname())
    server = listener.accept()[0]
    yield
    other.start('ask', 'hello')
    equal(exactly(server, 5), b'hello')
    server.sendall(b'world')
    equal(other.answer(), 'world')


@promise(refused='--tcp-established', not_in={'migrated': 'migrate carries connections unasked'})
def a_connection_is_refused_where_it_was_not_asked_for():
    listener, client, server = connected()
    yield
    talk(client, server)


# --- UDP and others ---

def udp(family=socket.AF_INET, address='127.0.0.1', kind=socket.SOCK_DGRAM, protocol=0):
    s = socket.socket(family, kind, protocol)
    s.bind((address, 0))
    s.settimeout(PATIENCE)
    return s


@promise
def udp_sockets_talk():
    one, two = udp(), udp(socket.AF_INET6, '::ffff:127.0.0.1')
    yield
    one.sendto(b'hello', ('127.0.0.1', two.getsockname()[1]))
    equal(two.recv(100), b'hello')


@promise
def connected_udp_sockets_hear_only_their_peer():
    one, two, stranger = udp(), udp(), udp()
    one.connect(two.getsockname())
    two.connect(one.getsockname())
    yield
    stranger.sendto(b'psst', two.getsockname())
    one.send(b'hello')
    equal(two.recv(100), b'hello')
    equal(one.getpeername(), two.getsockname())


@promise
def datagrams_in_the_queue_keep_their_senders_and_bounds():
    one, two = udp(), udp()
    for n in range(5): one.sendto(b'x' * n * 100, two.getsockname())
    yield
    for n in range(5): equal(two.recvfrom(1000), (b'x' * n * 100, one.getsockname()))


@promise
def a_corked_datagram_is_sent_in_one_piece():
    one, two = udp(), udp()
    one.connect(two.getsockname())
    one.setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
    yield
    equal(one.getsockopt(socket.IPPROTO_UDP, 1), 1)
    one.send(b'one ')
    one.send(b'piece')
    one.setsockopt(socket.IPPROTO_UDP, 1, 0)
    equal(two.recv(100), b'one piece')


@promise
def multicast_memberships_stay():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(('', 0))
    s.settimeout(PATIENCE)
    s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('239.1.2.3') + socket.inet_aton('127.0.0.1'))
    yield
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton('127.0.0.1'))
    sender.sendto(b'to all', ('239.1.2.3', s.getsockname()[1]))
    equal(s.recv(100), b'to all')


@promise
def a_udp_lite_socket_keeps_its_coverage():
    s = udp(kind=socket.SOCK_DGRAM, protocol=136)
    s.setsockopt(136, 10, 20)  # UDPLITE_SEND_CSCOV
    yield
    equal(s.getsockopt(136, 10), 20)


@promise
def a_raw_socket_stays_one():
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    yield
    equal(s.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL), socket.IPPROTO_ICMP)


@promise
def a_packet_socket_stays_one():
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    yield
    equal(s.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN), socket.AF_PACKET)


@promise
def a_netlink_socket_stays_one():
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    s.bind((0, 0))
    yield
    equal(s.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN), socket.AF_NETLINK)
