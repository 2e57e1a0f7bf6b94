"""ADDRESS DIRECTORY COUNT: sends half of COUNT datagrams, and the others while their receiver is frozen (DIRECTORY/frozen is
there), then waits for its answer."""
import os, socket, sys, time

address, directory, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
path = lambda name: os.path.join(directory, name)
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(count):
    if number == count // 2:
        open(path('half'), 'w').close()
        while not os.path.exists(path('frozen')): time.sleep(0.001)
    sender.sendto(b'%d' % number, (address, 7000))
time.sleep(0.05)
open(path('sent'), 'w').close()
sender.settimeout(30)
assert sender.recv(100) == b'all are here'
