# Much of what a program may have, looked at all the time: threads, children, pipes, sockets, timers, signals, shared memory.
import ctypes, fcntl, mmap, queue, select, signal, socket, struct, tempfile, threading

libc = ctypes.CDLL(None, use_errno=True)
where = tempfile.mkdtemp(dir=os.getcwd())
os.umask(0o027)
os.chdir(where)
os.environ['MARK'] = 'a mark'

# One signal is blocked in all threads, and stays pending.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
os.kill(os.getpid(), signal.SIGUSR2)

# Threads that pass work on.
requests, answers = queue.Queue(), queue.Queue()
local = threading.local()


def worker(number):
    local.number = number
    while True:
        item = requests.get()
        answers.put((local.number == number, item * item))


for number in range(4): threading.Thread(target=worker, args=(number,), daemon=True).start()

# Shared memory, files: mapped, deleted, with an offset.
shared = mmap.mmap(-1, 1 << 20)
mapped_file = open('mapped', 'w+b')
mapped_file.truncate(1 << 16)
mapped = mmap.mmap(mapped_file.fileno(), 1 << 16)
copied = mmap.mmap(mapped_file.fileno(), 1 << 16, flags=mmap.MAP_PRIVATE)
copied[7] = 77
deleted = open('deleted', 'w+b')
deleted.write(b'nobody sees this')
deleted.flush()
os.unlink('deleted')
at_offset = open('offset', 'w+b')
at_offset.write(bytes(range(256)))
at_offset.seek(100)
appended = os.open('appended', os.O_WRONLY | os.O_CREAT | os.O_APPEND)

# A family: each child answers through a socket pair, and has a child of its own behind a pipe.
def grandchild(reader, writer):
    while True:
        got = os.read(reader, 100)
        if not got: os._exit(0)
        os.write(writer, got.upper())


def child(link, number):
    down, up = os.pipe(), os.pipe()
    if os.fork() == 0:
        link.close()
        os.close(down[1])
        os.close(up[0])
        grandchild(down[0], up[1])
    os.close(down[0])
    os.close(up[1])
    parent = os.getppid()
    while True:
        got = link.recv(100)
        if not got: os._exit(0)
        os.write(down[1], got)
        struct.pack_into('<Q', shared, number * 8, struct.unpack_from('<Q', shared, number * 8)[0] + 1)
        link.sendall(os.read(up[0], 100) + (b'' if os.getppid() == parent else b' an orphan'))


children = []
for number in range(3):
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    pid = os.fork()
    if pid == 0:
        ours.close()
        child(theirs, number)
    theirs.close()
    children.append((pid, ours))

# Timers and signals.
ticks, user = [0], [0]
signal.signal(signal.SIGALRM, lambda *_: ticks.__setitem__(0, ticks[0] + 1))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
signal.signal(signal.SIGUSR1, lambda *_: user.__setitem__(0, user[0] + 1))
timer = libc.timerfd_create(1, 0o4000)
libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(0, 5000000, 0, 5000000), None)
class SigEvent(ctypes.Structure):
    _fields_ = [('value', ctypes.c_void_p), ('signal', ctypes.c_int), ('notify', ctypes.c_int), ('pad', ctypes.c_char * 48)]
posix_timer = ctypes.c_void_p()
signal.signal(signal.SIGRTMIN, lambda *_: rt.__setitem__(0, rt[0] + 1))
rt = [0]
assert libc.timer_create(1, ctypes.byref(SigEvent(5, signal.SIGRTMIN, 0)), ctypes.byref(posix_timer)) == 0
assert libc.timer_settime(posix_timer, 0, (ctypes.c_long * 4)(0, 7000000, 0, 7000000), None) == 0

# Sockets and a pipe with something in it.
listener = socket.socket(socket.AF_UNIX)
# Each host has a /run of its own.
name = '/run/workload-%d' % os.getpid()
listener.bind(name)
listener.listen(5)
dialled = socket.socket(socket.AF_UNIX)
dialled.connect(name)
accepted = listener.accept()[0]
datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
full_reader, full_writer = os.pipe()
fcntl.fcntl(full_writer, 1031, 1 << 17)
os.write(full_writer, b'x' * 100000)
event = os.eventfd(5)
epoll = select.epoll()
epoll.register(event, select.EPOLLIN)

identity = (os.getpid(), os.getsid(0), os.getpgrp(), os.getcwd(), tuple(pid for pid, _ in children))
n = 0


def wait(name, condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline: time.sleep(0.002)
    check(name, condition())


def work():
    global n
    n += 1
    check('identity', (os.getpid(), os.getsid(0), os.getpgrp(), os.getcwd(), tuple(pid for pid, _ in children)), identity)
    check('umask', (os.umask(0o027), os.environ['MARK']), (0o027, 'a mark'))
    for item in range(8): requests.put(item)
    got = [answers.get(timeout=20) for _ in range(8)]
    check('threads', sorted(got), [(True, item * item) for item in range(8)])
    for number, (pid, link) in enumerate(children):
        text = b'to child %d, round %d' % (number, n)
        link.sendall(text)
        check('child %d' % number, link.recv(100), text.upper())
        check('shared memory', struct.unpack_from('<Q', shared, number * 8)[0], n)
        check('child lives', os.waitpid(pid, os.WNOHANG), (0, 0))
    struct.pack_into('<Q', mapped, 512, n)
    check('mapped file', struct.unpack('<Q', os.pread(mapped_file.fileno(), 8, 512))[0], n)
    check('private copy', (copied[7], mapped[7]), (77, 0))
    check('deleted file', os.pread(deleted.fileno(), 99, 0), b'nobody sees this')
    check('offset', (at_offset.tell(), at_offset.read(1), at_offset.seek(100)), (100, b'd', 100))
    os.write(appended, b'a')
    check('appended', os.stat('appended').st_size, n)
    before = ticks[0], rt[0]
    wait('interval timer', lambda: ticks[0] > before[0])
    wait('posix timer', lambda: rt[0] > before[1])
    check('timerfd', bool(select.select([timer], [], [], 20)[0]) and len(os.read(timer, 8)), 8)
    os.kill(os.getpid(), signal.SIGUSR1)
    wait('signal', lambda: user[0] == n)
    check('pending signal', signal.sigpending(), {signal.SIGUSR2})
    dialled.sendall(b'%d' % n)
    check('unix socket', accepted.recv(100), b'%d' % n)
    datagrams[0].send(b'one')
    datagrams[0].send(b'two')
    check('datagrams', (datagrams[1].recv(9), datagrams[1].recv(9)), (b'one', b'two'))
    check('full pipe', len(os.read(full_reader, 1000)), 1000)
    os.write(full_writer, b'x' * 1000)
    check('epoll', epoll.poll(0), [(event, select.EPOLLIN)])
    os.eventfd_write(event, 1)
    check('event', os.eventfd_read(event), 6)
    os.eventfd_write(event, 5)


forever(work)
