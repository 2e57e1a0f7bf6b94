# A small program with a TCP connection to itself, threads, a child, and a timer: what a visit of the tool may disturb.
import signal, socket, threading

listener = socket.create_server(('127.0.0.1', 0))
client = socket.create_connection(listener.getsockname())
server = listener.accept()[0]
for end in (client, server): end.settimeout(20)
data = os.urandom(1 << 20)
digest = hash(data)
seen, ticks = [0], [0]
signal.signal(signal.SIGALRM, lambda *_: ticks.__setitem__(0, ticks[0] + 1))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
lock = threading.Condition()


def count():
    while True:
        with lock:
            seen[0] += 1
            lock.notify_all()
        time.sleep(0.002)


threading.Thread(target=count, daemon=True).start()
ours, theirs = socket.socketpair()
child = os.fork()
if child == 0:
    signal.setitimer(signal.ITIMER_REAL, 0)
    ours.close()
    while True:
        got = theirs.recv(100)
        if not got: os._exit(0)
        theirs.sendall(got[::-1])
theirs.close()
number = 0


def work():
    global number
    number += 1
    text = b'%08d' % number
    client.sendall(text)
    check('connection', server.recv(100), text)
    server.sendall(text * 2)
    check('answer', client.recv(100), text * 2)
    ours.sendall(text)
    check('child', ours.recv(100), text[::-1])
    with lock:
        before = seen[0]
        check('thread', lock.wait_for(lambda: seen[0] > before, 20))
    then = ticks[0]
    deadline = time.monotonic() + 20
    while ticks[0] == then and time.monotonic() < deadline: time.sleep(0.005)
    check('timer', ticks[0] > then)
    check('data', hash(bytes(bytearray(data))), digest)


forever(work)
