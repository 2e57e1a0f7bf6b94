"""ADDRESS DIRECTORY: a client that speaks, and connects, just while its server is frozen (DIRECTORY/frozen is there)."""
import os, socket, sys, time

address, directory = sys.argv[1:]
server = (address, 7000)
path = lambda name: os.path.join(directory, name)


def note(name, text=''):
    with open(path(name + '.new'), 'w') as file: file.write(text)
    os.rename(path(name + '.new'), path(name))


old = socket.create_connection(server, timeout=20)
old.sendall(b'before\n')
assert old.recv(100) == b'before\n'
note('connected')
while not os.path.exists(path('frozen')): time.sleep(0.001)
new = socket.socket()
new.setblocking(False)
new.connect_ex(server)
old.sendall(b'meanwhile\n')
time.sleep(0.02)
note('sent')
new.settimeout(20)
assert old.recv(100) == b'meanwhile\n'
new.connect_ex(server)
new.sendall(b'new\n')
assert new.recv(100) == b'new\n'
# tcpi_total_retrans
retransmitted = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100] for s in (old, new)]
note('done', f'sent again: {retransmitted}')
