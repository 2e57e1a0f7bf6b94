# Has much, and does nothing until SIGUSR1 asks it for a round: what /proc says of it must not change.
import ctypes, fcntl, mmap, resource, select, signal, socket, struct, threading

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
where = os.path.dirname(LOG)
os.chdir(where)
os.umask(0o027)
os.nice(5)
with open('/proc/self/oom_score_adj', 'w') as file: file.write('100')
with open('/proc/self/coredump_filter', 'w') as file: file.write('0x13')
libc.prctl(29, 123456)  # PR_SET_TIMERSLACK
libc.prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG
libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
libc.prctl(15, b'a still one')  # PR_SET_NAME
resource.setrlimit(resource.RLIMIT_NOFILE, (600, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

# Signals: caught, ignored, blocked, pending; an alternate stack.
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGRTMIN + 3])
os.kill(os.getpid(), signal.SIGUSR2)
libc.pthread_kill.argtypes = [ctypes.c_ulong, ctypes.c_int]
libc.pthread_kill(threading.get_ident(), signal.SIGRTMIN + 3)


class Stack(ctypes.Structure):
    _fields_ = [('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]


alternate = mmap.mmap(-1, 65536)
libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(ctypes.c_char.from_buffer(alternate)), 0, 65536)), None)

# Timers, far away.
signal.setitimer(signal.ITIMER_REAL, 100000, 50)
signal.setitimer(signal.ITIMER_PROF, 90000)


class SigEvent(ctypes.Structure):
    _fields_ = [('value', ctypes.c_void_p), ('signal', ctypes.c_int), ('notify', ctypes.c_int), ('pad', ctypes.c_char * 48)]


timers = []
for clock, number in ((1, signal.SIGRTMIN), (0, signal.SIGRTMIN + 1)):
    timer = ctypes.c_void_p()
    libc.timer_create(clock, ctypes.byref(SigEvent(0xabcd, number, 0)), ctypes.byref(timer))
    libc.timer_settime(timer, 0, (ctypes.c_long * 4)(7, 0, 100000, 0), None)
    timers.append(timer)

# Threads that wait, each with a name, a mask and processors of its own.
gate = threading.Lock()
gate.acquire()


def wait(number):
    libc.prctl(15, b'waiter %d' % number)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    if number == 1: os.sched_setaffinity(threading.get_native_id(), {0})
    if number == 2: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 9)
    started.release()
    gate.acquire()


started = threading.Semaphore(0)
for number in range(3): threading.Thread(target=wait, args=(number,), daemon=True).start()
for number in range(3): started.acquire()

# Memory of all kinds.
def map_memory(size, prot, flags, fd=-1):
    address = libc.mmap(None, size, prot, flags, fd, 0)
    if prot & 2: ctypes.memset(address, 7, size)
    return address


areas = [map_memory(1 << 16, 3, 0x22) for _ in range(6)]
for advice, area in zip((10, 14, 15, 16, 1, 18), areas): libc.madvise(area, 1 << 16, advice)
locked = map_memory(1 << 14, 3, 0x22)
libc.mlock(locked, 1 << 14, 0)
nothing = map_memory(1 << 16, 0, 0x22)
readable = map_memory(1 << 16, 3, 0x22)
libc.mprotect(readable + 4096, 4096, 1)
libc.mprotect(readable + 16384, 4096, 5)
common = map_memory(1 << 16, 3, 0x21)
reserved = map_memory(1 << 16, 3, 0x4022)

# Files of all kinds.
with open('text', 'wb') as file: file.write(b'x' * 100000)
text = os.open('text', os.O_RDWR)
os.lseek(text, 777, os.SEEK_SET)
map_memory(1 << 16, 1, 1, text)
map_memory(1 << 16, 3, 2, text)
duplicate = fcntl.fcntl(text, fcntl.F_DUPFD, 100)
appended = os.open('appended', os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK)
deleted = os.open('deleted', os.O_RDWR | os.O_CREAT)
os.write(deleted, b'deleted')
os.unlink('deleted')
directory = os.open('.', os.O_RDONLY | os.O_DIRECTORY)
path = os.open('text', os.O_PATH)
null = os.open('/dev/null', os.O_RDWR)
pipe = os.pipe2(os.O_NONBLOCK)
os.write(pipe[1], b'in the pipe')
event = os.eventfd(77, os.EFD_NONBLOCK)
epoll = select.epoll()
epoll.register(event, select.EPOLLIN | select.EPOLLET)
epoll.register(pipe[0], select.EPOLLIN)
signals = libc.signalfd(-1, ctypes.byref(ctypes.c_ulong(1 << 20)), 0o4000)
timer_file = libc.timerfd_create(1, 0o4000)
libc.timerfd_settime(timer_file, 0, (ctypes.c_long * 4)(33, 0, 100000, 0), None)
os.mkdir('watched')
watcher = libc.inotify_init1(0)
libc.inotify_add_watch(watcher, b'watched', 0x100)
memory = os.memfd_create('a memfd', os.MFD_ALLOW_SEALING)
os.write(memory, b'm' * 5000)
map_memory(4096, 3, 1, memory)
lock = open('lock', 'w')
fcntl.flock(lock, fcntl.LOCK_EX)
fcntl.lockf(text, fcntl.LOCK_SH, 10, 20)
pair = socket.socketpair()
pair[0].send(b'in the socket')
listener = socket.create_server(('127.0.0.1', 0))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(('127.0.0.1', 0))
os.setpgid(0, 0) if os.getpgrp() != os.getpid() else None

ready()
while True:
    signal.pause()
    check('areas', all(ctypes.string_at(area, 1 << 16) == b'\7' * (1 << 16) for area in areas + [common, reserved]))
    check('pipe', os.read(pipe[0], 99) + (b'' if os.write(pipe[1], b'in the pipe') else b''), b'in the pipe')
    check('socket', pair[1].recv(99) + (b'' if pair[0].send(b'in the socket') else b''), b'in the socket')
    death, reaper = ctypes.c_int(), ctypes.c_int()
    libc.prctl(2, ctypes.byref(death))
    libc.prctl(37, ctypes.byref(reaper))
    check('death signal and reaper', (death.value, reaper.value), (signal.SIGHUP, 1))
    stack = Stack()
    libc.sigaltstack(None, ctypes.byref(stack))
    check('alternate stack', (stack.sp, stack.flags, stack.size), (ctypes.addressof(ctypes.c_char.from_buffer(alternate)), 0, 65536))
    check('pending', signal.sigpending(), {signal.SIGUSR2, signal.SIGRTMIN + 3})
    left = signal.getitimer(signal.ITIMER_REAL)
    check('timer', 50000 < left[0] <= 100000 and left[1] == 50)
    ok()
