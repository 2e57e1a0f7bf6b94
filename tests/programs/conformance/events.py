"""eventfd, epoll, signalfd, timerfd, inotify, fanotify, pidfd."""
import errno
import fcntl
import os
import select
import signal
import struct
import time

from promises import *

EPOLLEXCLUSIVE = 1 << 28


def timerfd(clock, first=0, interval=0, flags=0, nonblock=True):
    fd = call(283, clock, 0o4000 if nonblock else 0)
    timerfd_set(fd, first, interval, flags)
    return fd


def timerfd_set(fd, first, interval=0, flags=0):
    call(286, fd, flags, (ctypes.c_long * 4)(int(interval), round(interval % 1 * 1e9), int(first), round(first % 1 * 1e9)), 0)


def timerfd_get(fd):
    spec = (ctypes.c_long * 4)()
    call(287, fd, spec)
    return spec[2] + spec[3] / 1e9, spec[0] + spec[1] / 1e9


def ticks(fd):
    select.select([fd], [], [], PATIENCE)
    return struct.unpack('Q', os.read(fd, 8))[0]


def signalfd(numbers, fd=-1):
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    return call(289, fd, ctypes.byref(ctypes.c_ulong(sum(1 << n - 1 for n in numbers))), 8, 0o4000)


def inotify(path, mask, fd=None):
    fd = call(294, 0o4000) if fd is None else fd
    return fd, call(254, fd, path.encode(), mask)


def noticed(fd):
    """Events of an inotify instance: watch, mask, cookie, name."""
    try: data = os.read(fd, 65536)
    except BlockingIOError: return []
    found = []
    while data:
        watch, mask, cookie, length = struct.unpack_from('iIII', data)
        found.append((watch, mask, data[16:16 + length].rstrip(b'\0').decode()))
        data = data[16 + length:]
    return found


# --- eventfd ---

@promise
def an_eventfd_keeps_its_count():
    fd = os.eventfd(41)
    os.eventfd_write(fd, 1)
    yield
    equal(os.eventfd_read(fd), 42)


@promise
def an_eventfd_stays_a_semaphore():
    fd = os.eventfd(3, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
    yield
    equal([os.eventfd_read(fd) for _ in range(3)], [1, 1, 1])
    fails(errno.EAGAIN, os.eventfd_read, fd)


@promise
def a_full_eventfd_stays_full():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(fd, 2 ** 64 - 2)
    yield
    fails(errno.EAGAIN, os.eventfd_write, fd, 1)
    equal(os.eventfd_read(fd), 2 ** 64 - 2)


@promise
def an_eventfd_is_shared_with_a_child():
    fd = os.eventfd(0)

    def child():
        yield
        os.eventfd_write(fd, 7)
    other = Child(child)
    yield
    equal(os.eventfd_read(fd), 7)
    other.join()


@promise
def a_thread_that_waits_for_an_eventfd_is_woken():
    fd, got = os.eventfd(0), []
    import threading
    thread = threading.Thread(target=lambda: got.append(os.eventfd_read(fd)))
    thread.start()
    eventually(lambda: open(f'/proc/self/task/{thread.native_id}/syscall').read().startswith('0 '), 'the thread waits')
    yield
    os.eventfd_write(fd, 5)
    thread.join()
    equal(got, [5])


# --- epoll ---

@promise
def epoll_goes_on_watching():
    epoll, (reader, writer) = select.epoll(), os.pipe()
    epoll.register(reader, select.EPOLLIN)
    epoll.register(writer, 0)
    yield
    equal(epoll.poll(0), [])
    os.write(writer, b'x')
    equal(epoll.poll(1), [(reader, select.EPOLLIN)])
    os.close(writer)
    equal(epoll.poll(1), [(reader, select.EPOLLIN | select.EPOLLHUP)])


@promise
def epoll_keeps_the_data_of_each_watch():
    epoll, (reader, writer) = call(291, 0), os.pipe()
    call(233, epoll, 1, reader, struct.pack('<IQ', select.EPOLLIN, 0xfeedfacecafebeef))
    yield
    os.write(writer, b'x')
    events = ctypes.create_string_buffer(12)
    equal(call(232, epoll, events, 1, 1000), 1)
    equal(struct.unpack('<IQ', events.raw), (select.EPOLLIN, 0xfeedfacecafebeef))


@promise
def epoll_reports_an_edge_once():
    epoll, (reader, writer) = select.epoll(), os.pipe()
    epoll.register(reader, select.EPOLLIN | select.EPOLLET)
    yield
    epoll.poll(0)
    os.write(writer, b'x')
    equal(epoll.poll(1), [(reader, select.EPOLLIN)])
    equal(epoll.poll(0), [])
    os.write(writer, b'y')
    equal(epoll.poll(1), [(reader, select.EPOLLIN)])


@promise(unlike=['fdinfo 3, line*tfd:*40000018'])
def a_spent_oneshot_watch_stays_spent_until_it_is_set_again():
    epoll, (reader, writer) = select.epoll(), os.pipe()
    epoll.register(reader, select.EPOLLIN | select.EPOLLONESHOT)
    os.write(writer, b'x')
    equal(epoll.poll(0), [(reader, select.EPOLLIN)])
    yield
    equal(epoll.poll(0.05), [], 'what it reports unasked')
    epoll.modify(reader, select.EPOLLIN | select.EPOLLONESHOT)
    equal(epoll.poll(1), [(reader, select.EPOLLIN)])


@promise
def epoll_watches_exclusively():
    epoll, (reader, writer) = select.epoll(), os.pipe()
    epoll.register(reader, select.EPOLLIN | EPOLLEXCLUSIVE)
    yield
    os.write(writer, b'x')
    equal(epoll.poll(1), [(reader, select.EPOLLIN)])
    fails(errno.EINVAL, epoll.modify, reader, select.EPOLLIN)


@promise
def epoll_in_epoll_in_epoll_reports():
    inner, middle, outer = select.epoll(), select.epoll(), select.epoll()
    fd = os.eventfd(0)
    inner.register(fd, select.EPOLLIN)
    middle.register(inner.fileno(), select.EPOLLIN)
    outer.register(middle.fileno(), select.EPOLLIN)
    yield
    equal(outer.poll(0), [])
    os.eventfd_write(fd, 1)
    equal(outer.poll(1), [(middle.fileno(), select.EPOLLIN)])
    equal(inner.poll(0), [(fd, select.EPOLLIN)])


@promise
def epoll_watches_a_file_whose_number_is_another_file_now():
    epoll, (reader, writer) = select.epoll(), os.pipe()
    epoll.register(reader, select.EPOLLIN)
    moved, number = os.dup(reader), reader
    os.dup2(os.open('/dev/null', os.O_RDONLY), number)
    yield
    os.write(writer, b'x')
    equal(epoll.poll(1), [(number, select.EPOLLIN)])
    equal(os.read(moved, 1), b'x')


@promise
def epoll_watches_the_same_file_twice_under_two_numbers():
    epoll, fd = select.epoll(), os.eventfd(0)
    other = os.dup(fd)
    epoll.register(fd, select.EPOLLIN)
    epoll.register(other, select.EPOLLIN)
    yield
    os.eventfd_write(fd, 1)
    equal(sorted(epoll.poll(1)), [(fd, select.EPOLLIN), (other, select.EPOLLIN)])


@promise
def an_epoll_is_shared_with_a_child():
    epoll, fd = select.epoll(), os.eventfd(0)
    epoll.register(fd, select.EPOLLIN)

    def child():
        yield
        equal(epoll.poll(PATIENCE), [(fd, select.EPOLLIN)])
        epoll.unregister(fd)
    other = Child(child)
    yield
    os.eventfd_write(fd, 1)
    other.join()
    equal(epoll.poll(0), [])


@promise
def a_thread_in_epoll_wait_is_woken():
    epoll, fd, got = select.epoll(), os.eventfd(0), []
    epoll.register(fd, select.EPOLLIN)
    import threading
    thread = threading.Thread(target=lambda: got.extend(epoll.poll()))
    thread.start()
    eventually(lambda: open(f'/proc/self/task/{thread.native_id}/syscall').read().startswith('232 '), 'the thread waits')
    yield
    os.eventfd_write(fd, 1)
    thread.join()
    equal(got, [(fd, select.EPOLLIN)])


@promise
def poll_goes_on_with_the_time_left():
    took = []

    def poll():
        start = time.monotonic()
        select.poll().poll(2500)
        took.append(time.monotonic() - start)
        told()  # so that the thread is still there, however long the move takes
    import threading
    thread = threading.Thread(target=poll)
    thread.start()
    yield
    thread.join()
    check(2.45 < took[0] < 30, f'poll took {took[0]} seconds')


@promise
def select_is_woken_by_what_it_waits_for():
    (reader, writer), got = os.pipe(), []
    import threading
    thread = threading.Thread(target=lambda: got.append(select.select([reader], [], [])[0]))
    thread.start()
    eventually(lambda: open(f'/proc/self/task/{thread.native_id}/wchan').read() not in ('', '0'), 'the thread waits')
    yield
    os.write(writer, b'x')
    thread.join()
    equal(got, [[reader]])


# --- signalfd ---

@promise
def a_signalfd_goes_on_receiving_its_signals():
    fd = signalfd([signal.SIGUSR1, signal.SIGRTMIN + 2])
    yield
    os.kill(os.getpid(), signal.SIGRTMIN + 2)
    os.kill(os.getpid(), signal.SIGUSR1)
    equal([struct.unpack('I', os.read(fd, 128)[:4])[0] for _ in range(2)], [signal.SIGUSR1, signal.SIGRTMIN + 2])


@promise
def a_pending_signal_is_read_from_a_signalfd():
    fd = signalfd([signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR1)
    yield
    info = os.read(fd, 128)
    equal(struct.unpack('IiiI', info[:16])[::3], (signal.SIGUSR1, os.getpid()))


@promise
def a_signalfd_whose_mask_was_changed_keeps_the_last():
    fd = signalfd([signal.SIGUSR1])
    signalfd([signal.SIGUSR2], fd)
    yield
    os.kill(os.getpid(), signal.SIGUSR1)
    fails(errno.EAGAIN, os.read, fd, 128)
    os.kill(os.getpid(), signal.SIGUSR2)
    equal(os.read(fd, 128)[0], signal.SIGUSR2)


# --- timerfd ---

def timerfds(name, clock):
    def goes_on_ticking():
        fd = timerfd(clock, 0.02, 0.02)
        yield
        ticks(fd)
        check(ticks(fd) > 0, 'no tick')
        equal(timerfd_get(fd)[1], 0.02, 'the interval')
    goes_on_ticking.__name__ = f'a_timerfd_of_the_{name}_clock_goes_on_ticking'
    promise(goes_on_ticking)

    def keeps_the_time():
        fd = timerfd(clock, 5000)
        yield
        check(4500 < timerfd_get(fd)[0] < 5000, f'{timerfd_get(fd)}')
    keeps_the_time.__name__ = f'a_timerfd_of_the_{name}_clock_keeps_the_time_left'
    promise(keeps_the_time)


for name, clock in (('realtime', 0), ('monotonic', 1), ('boottime', 7)): timerfds(name, clock)


@promise
def a_timerfd_keeps_ticks_that_nobody_has_read():
    fd = timerfd(1, 0.01, 0.01)
    time.sleep(0.1)
    timerfd_set_off = timerfd(1, 0.01)
    time.sleep(0.05)
    yield
    check(ticks(fd) >= 5, 'ticks are lost')
    equal(ticks(timerfd_set_off), 1)
    fails(errno.EAGAIN, os.read, timerfd_set_off, 8)


@promise
def a_disarmed_timerfd_stays_disarmed_and_can_be_armed():
    fd = timerfd(1)
    yield
    equal(timerfd_get(fd), (0, 0))
    timerfd_set(fd, 0.01)
    equal(ticks(fd), 1)


@promise
def an_absolute_timerfd_ticks_at_its_time():
    at = time.clock_gettime(time.CLOCK_REALTIME) + 3
    fd = timerfd(0, at, 0, 1)
    yield
    equal(ticks(fd), 1)
    check(time.time() >= at - 0.01, 'it ticked too early')


@promise(not_in={'migrated': 'clocks of two hosts are two clocks'})
def a_timerfd_that_is_cancelled_when_the_clock_is_set_stays_so():
    fd = timerfd(0, time.time() + 5000, 0, 3)  # TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET
    flags = fdinfo(fd, 'settime flags')
    yield
    equal(fdinfo(fd, 'settime flags'), flags)


@promise
def an_alarm_timerfd_stays_one():
    fd = timerfd(9, 5000)  # CLOCK_BOOTTIME_ALARM
    yield
    equal(fdinfo(fd, 'clockid'), '9')
    check(4500 < timerfd_get(fd)[0] < 5000, f'{timerfd_get(fd)}')


# --- inotify and fanotify ---

@promise
def inotify_goes_on_reporting():
    os.mkdir(place('d'))
    fd, watch = inotify(place('d'), 0x100 | 0x200)
    yield
    open(place('d/made'), 'w').close()
    os.unlink(place('d/made'))
    equal(noticed(fd), [(watch, 0x100, 'made'), (watch, 0x200, 'made')])


@promise
def inotify_keeps_its_watches_under_their_numbers():
    fd, watches = call(294, 0o4000), {}
    for n in range(10):
        os.mkdir(place(f'd{n}'))
        watches[n] = inotify(place(f'd{n}'), 0x100, fd)[1]
    for n in (2, 5): call(255, fd, watches[n])
    noticed(fd)
    yield
    for n in range(10): open(place(f'd{n}/x'), 'w').close()
    equal(noticed(fd), [(watches[n], 0x100, 'x') for n in range(10) if n not in (2, 5)])
    check(inotify(place(), 0x100, fd)[1] not in watches.values(), 'a number is used again')


@promise(not_in={'two hosts': 'hosts of the tests are one kernel, and the watch sees the old copy close the file'})
def inotify_of_a_file_reports_writes_to_it():
    f = file('f')
    fd, watch = inotify(place('f'), 0x2 | 0x8)
    yield
    f.write(b'x')
    equal(noticed(fd), [(watch, 2, '')])
    f.close()
    equal(noticed(fd), [(watch, 8, '')])


@promise
def inotify_watches_once_when_asked_to():
    os.mkdir(place('d'))
    fd, watch = inotify(place('d'), 0x100 | 0x80000000)  # IN_ONESHOT
    yield
    open(place('d/a'), 'w').close()
    open(place('d/b'), 'w').close()
    equal(noticed(fd), [(watch, 0x100, 'a'), (watch, 0x8000, '')])


@promise(refused='have not been read and would be lost')
def events_that_inotify_has_queued_are_read_after_the_move():
    os.mkdir(place('d'))
    fd, watch = inotify(place('d'), 0x100)
    open(place('d/before'), 'w').close()
    yield
    open(place('d/after'), 'w').close()
    equal(noticed(fd), [(watch, 0x100, 'before'), (watch, 0x100, 'after')])


@promise(refused='a deleted file cannot be watched again')
def inotify_of_a_deleted_file_that_is_open_stays():
    f = file('f')
    fd, watch = inotify(place('f'), 0x2)
    os.unlink(place('f'))
    noticed(fd)
    yield
    f.write(b'x')
    equal(noticed(fd), [(watch, 2, '')])


@promise
def an_inotify_without_watches_can_be_given_some():
    fd = call(294, 0o4000)
    yield
    watch = inotify(place(), 0x100, fd)[1]
    open(place('x'), 'w').close()
    equal([e for e in noticed(fd) if e[2] == 'x'], [(watch, 0x100, 'x')])


@promise(refused='fanotify')
def fanotify_is_refused():
    fd = call(300, 2, os.O_RDONLY)  # FAN_NONBLOCK
    call(301, fd, 1, 0x8, -100, place().encode())
    yield
    with open(place('f'), 'w'): pass
    equal(os.readlink(f'/proc/self/fd/{fd}'), 'anon_inode:[fanotify]')


# --- pidfd ---

@promise
def a_pidfd_of_oneself_stays():
    fd = os.pidfd_open(os.getpid())
    hits = []
    signal.signal(signal.SIGUSR1, lambda *_: hits.append(1))
    yield
    signal.pidfd_send_signal(fd, signal.SIGUSR1)
    eventually(lambda: hits, 'the signal')


@promise
def a_pidfd_of_a_child_reports_its_end():
    def child(): yield
    other = Child(child)
    fd = os.pidfd_open(other.pid)
    yield
    equal(select.select([fd], [], [], PATIENCE)[0], [fd])
    equal(os.waitid(os.P_PIDFD, fd, os.WEXITED).si_pid, other.pid)


@promise
def a_pidfd_of_a_dead_child_that_nobody_waited_for_stays():
    pid = os.fork()
    if pid == 0: os._exit(5)
    fd = os.pidfd_open(pid)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield
    equal(os.waitid(os.P_PIDFD, fd, os.WEXITED).si_status, 5)


@promise
def a_pidfd_of_a_process_that_is_gone_stays_readable():
    pid = os.fork()
    if pid == 0: os._exit(5)
    fd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    yield
    equal(select.select([fd], [], [], 0)[0], [fd])
    fails(errno.ESRCH, signal.pidfd_send_signal, fd, 0)


@promise(refused='is no process of the tree')
def a_pidfd_of_a_thread_stays_one_of_a_thread():
    def thread(): yield
    other = Thread(thread)
    try: fd = call(434, other.tid, os.O_EXCL)  # PIDFD_THREAD
    except OSError: skip('the kernel has no pidfds of threads')
    yield
    equal(select.select([fd], [], [], PATIENCE)[0], [fd])
    other.join()
