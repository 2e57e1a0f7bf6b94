//! Processes that are taken apart and put together again ask themselves whether they are still right.

mod common;

use common::program::{Program, dump_and_restore};
use whimbrel::{dump, restore};

#[test]
fn a_python_program_with_threads_goes_on_after_each_of_three_dumps_and_restores() {
    let program = Program::python(
        "import threading, time\n\
         data = [os.urandom(100000) for i in range(50)]\n\
         h = hash(tuple(data))\n\
         me = (os.getpid(), os.getppid() if False else 0, os.getcwd(), os.getsid(0))\n\
         results = []\n\
         def work():\n\
        \x20   while True:\n\
        \x20       results.append(sum(range(1000)))\n\
        \x20       time.sleep(0.01)\n\
         for i in range(3): threading.Thread(target=work, daemon=True).start()\n\
         report('ready')\n\
         while True:\n\
        \x20   n = len(results); time.sleep(0.05)\n\
        \x20   ok = hash(tuple(data)) == h and (os.getpid(), 0, os.getcwd(), os.getsid(0)) == me and set(results) == {499500}\n\
        \x20   report('ok' if ok and len(results) > n else 'wrong')\n",
    );
    for _ in 0..3 {
        program.goes_on();
        dump_and_restore(program.pid(), &dump::Options::default(), &restore::Options::default());
    }
    program.goes_on();
}

#[test]
fn a_program_keeps_its_special_files_over_two_dumps_and_restores() {
    let program = Program::python(
        r#"
import ctypes, fcntl, mmap, pty, select, signal, struct, termios, threading, time, traceback, tempfile
libc = ctypes.CDLL(None, use_errno=True)
where = tempfile.mkdtemp()
event = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
signals = libc.signalfd(-1, ctypes.byref(ctypes.c_ulong(1 << (signal.SIGUSR1 - 1))), 0o4000)
timer = libc.timerfd_create(1, 0o4000)
libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(0, 20000000, 0, 20000000), None)
os.mkfifo(where + '/fifo')
fifo_reader = os.open(where + '/fifo', os.O_RDONLY | os.O_NONBLOCK)
fifo_writer = os.open(where + '/fifo', os.O_WRONLY)
memory = os.memfd_create('some memory', os.MFD_ALLOW_SEALING)
os.write(memory, b'abc')
small = os.memfd_create('sealed')
shown = os.memfd_create('shown', os.MFD_ALLOW_SEALING)
os.ftruncate(shown, 8192)
window = mmap.mmap(shown, 8192)
window[5000] = 42
at = ctypes.addressof(ctypes.c_char.from_buffer(window))
fcntl.fcntl(shown, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
os.close(shown)
fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
epoll = select.epoll()
epoll.register(event, select.EPOLLIN)
epoll.register(signals, select.EPOLLIN | select.EPOLLET)
epoll.register(fifo_reader, select.EPOLLIN)
moved_reader, moved_writer = os.pipe()
epoll.register(moved_reader, select.EPOLLIN)
moved = moved_reader
moved_reader = os.dup(moved)
os.close(moved)
outer = select.epoll()
outer.register(epoll.fileno(), select.EPOLLIN)
master, slave = pty.openpty()
name = os.ttyname(slave)
attributes = termios.tcgetattr(slave)
attributes[3] &= ~(termios.ECHO | termios.ICANON)
termios.tcsetattr(slave, termios.TCSANOW, attributes)
attributes = termios.tcgetattr(slave)
fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
myself = os.pidfd_open(os.getpid())
watcher = libc.inotify_init1(0o4000)
watch = libc.inotify_add_watch(watcher, where.encode(), 0x100)
locked = open(where + '/locked', 'w+')
fcntl.flock(locked, fcntl.LOCK_EX)
ranged = open(where + '/ranged', 'w+')
probe = open(where + '/ranged')
fcntl.lockf(ranged, fcntl.LOCK_EX, 10, 5)
n = 0
def check(what, got, wanted):
    if got != wanted: report('wrong', what, got, wanted)
def round():
    global n
    n += 1
    check('nothing', sorted(epoll.poll(0)), [])
    os.eventfd_write(event, 2)
    check('event', epoll.poll(0), [(event, 1)])
    check('nested', outer.poll(0), [(epoll.fileno(), 1)])
    check('semaphore', (os.eventfd_read(event), os.eventfd_read(event)), (1, 1))
    os.kill(os.getpid(), signal.SIGUSR1)
    check('signal', epoll.poll(0), [(signals, 1)])
    check('signalled', len(os.read(signals, 1024)), 128)
    os.write(fifo_writer, b'fifo')
    check('fifo', epoll.poll(0), [(fifo_reader, 1)])
    check('fifo data', os.read(fifo_reader, 9), b'fifo')
    os.write(moved_writer, b'm')
    check('moved', epoll.poll(0), [(moved, 1)])
    check('moved data', os.read(moved_reader, 9), b'm')
    select.select([timer], [], [], 5)
    check('timer', struct.unpack('Q', os.read(timer, 8))[0] > 0, True)
    check('memory', (os.pread(memory, 9, 0), os.fstat(memory).st_size, fcntl.fcntl(memory, fcntl.F_GET_SEALS)), (b'abc', 3, 8))
    check('sealed', (os.fstat(small).st_size, fcntl.fcntl(small, fcntl.F_GET_SEALS)), (0, 1))
    check('window', window[5000], 42)
    again = os.open('/proc/self/map_files/%x-%x' % (at, at + 8192), os.O_RDWR)
    check('seals of a mapping', (os.fstat(again).st_size, fcntl.fcntl(again, fcntl.F_GET_SEALS)), (8192, 6))
    os.close(again)
    check('tty', (os.ttyname(slave), termios.tcgetattr(slave), os.tcgetpgrp(slave)), (name, attributes, os.getpgrp()))
    os.write(slave, b'out')
    check('master', os.read(master, 9), b'out')
    os.write(master, b'in')
    check('slave', os.read(slave, 9), b'in')
    signal.pidfd_send_signal(myself, signal.SIGUSR1)
    check('pidfd', os.read(signals, 1024)[:1], b'\x0a')
    open(where + '/file %d' % n, 'w').close()
    check('watch', struct.unpack('iI', os.read(watcher, 1024)[:8]), (watch, 0x100))
    other = open(where + '/locked')
    try: fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB); report('wrong', 'flock')
    except BlockingIOError: pass
    found = fcntl.fcntl(probe, 36, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 0, 0, 0))
    check('posix', struct.unpack('hhqqi4x', found), (fcntl.F_WRLCK, 0, 5, 10, os.getpid()))
report('ready')
while True:
    try: round()
    except BaseException: report('wrong', traceback.format_exc())
    report('ok')
    time.sleep(0.03)
"#,
    );
    let options = dump::Options {
        file_locks: true,
        ..dump::Options::default()
    };
    for _ in 0..2 {
        program.goes_on();
        dump_and_restore(program.pid(), &options, &restore::Options::default());
    }
    program.goes_on();
}
