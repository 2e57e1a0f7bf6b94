"""Locks of files."""
import errno
import fcntl
import os
import signal
import struct

from promises import *

LOCKS = dict(dump=['--file-locks'], migrate=['--file-locks'],
             not_in={'two hosts': 'hosts of the tests are one kernel, and the old copy has the lock until it ends'})
F_OFD_GETLK, F_OFD_SETLK, F_SETLEASE, F_GETLEASE = 36, 37, 1024, 1025


def lock(kind, start=0, length=0):
    return struct.pack('hhqqi4x', kind, 0, start, length, 0)


def asked(fd, command, start=0, length=0, kind=fcntl.F_WRLCK):
    return struct.unpack('hhqqi4x', fcntl.fcntl(fd, command, lock(kind, start, length)))


def elsewhere(function):
    """What another process gets."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try: text = repr(function())
        except OSError as error: text = f'error {error.errno}'
        os.write(writer, text.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    text = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    return text


def try_flock(path, kind):
    fd = os.open(path, os.O_RDWR)
    return fcntl.flock(fd, kind | fcntl.LOCK_NB)


@promise(**LOCKS)
def an_exclusive_flock_excludes():
    f = file('f')
    fcntl.flock(f, fcntl.LOCK_EX)
    yield
    equal(elsewhere(lambda: try_flock(place('f'), fcntl.LOCK_SH)), f'error {errno.EAGAIN}')
    fcntl.flock(f, fcntl.LOCK_UN)
    equal(elsewhere(lambda: try_flock(place('f'), fcntl.LOCK_EX)), 'None')


@promise(**LOCKS)
def a_shared_flock_is_shared():
    f = file('f')
    fcntl.flock(f, fcntl.LOCK_SH)
    yield
    equal(elsewhere(lambda: try_flock(place('f'), fcntl.LOCK_SH)), 'None')
    equal(elsewhere(lambda: try_flock(place('f'), fcntl.LOCK_EX)), f'error {errno.EAGAIN}')


@promise(**LOCKS)
def a_flock_belongs_to_the_open_file_and_not_to_the_process():
    f = file('f')
    fcntl.flock(f, fcntl.LOCK_EX)

    def child():
        yield
        fcntl.flock(f, fcntl.LOCK_UN)
    other = Child(child)
    yield
    other.join()
    equal(elsewhere(lambda: try_flock(place('f'), fcntl.LOCK_EX)), 'None')


@promise(**LOCKS)
def a_posix_lock_excludes_others_and_not_its_owner():
    f = file('f', b'x' * 100)
    fcntl.lockf(f, fcntl.LOCK_EX, 10, 5)
    yield
    equal(elsewhere(lambda: asked(f, fcntl.F_GETLK)), repr((fcntl.F_WRLCK, 0, 5, 10, os.getpid())))
    equal(asked(f, fcntl.F_GETLK)[0], fcntl.F_UNLCK)


@promise(**LOCKS)
def posix_locks_keep_their_ranges_and_kinds():
    f = file('f', b'x' * 100)
    fcntl.lockf(f, fcntl.LOCK_EX, 10, 0)
    fcntl.lockf(f, fcntl.LOCK_SH, 10, 20)
    fcntl.lockf(f, fcntl.LOCK_EX, 0, 50)
    yield
    kinds = elsewhere(lambda: [asked(f, fcntl.F_GETLK, at, 1)[0] for at in (0, 15, 25, 40, 99)])
    equal(kinds, repr([1, 2, 0, 2, 1]))


@promise(**LOCKS)
def the_posix_lock_of_a_child_is_the_childs():
    f = file('f', b'x' * 100)

    def child():
        fcntl.lockf(f, fcntl.LOCK_EX, 10, 0)
        yield
        eventually(lambda: os.path.exists(place('seen')), 'the parent')
    other = Child(child)
    yield
    equal(asked(f, fcntl.F_GETLK)[4], other.pid)
    open(place('seen'), 'w').close()
    other.join()
    equal(asked(f, fcntl.F_GETLK)[0], fcntl.F_UNLCK)


@promise(**LOCKS)
def a_posix_lock_goes_when_any_descriptor_of_the_file_is_closed():
    f = file('f', b'x' * 100)
    fcntl.lockf(f, fcntl.LOCK_EX)
    yield
    os.close(os.open(place('f'), os.O_RDONLY))
    equal(elsewhere(lambda: asked(f, fcntl.F_GETLK)[0]), str(fcntl.F_UNLCK))


@promise(**LOCKS)
def an_ofd_lock_excludes_other_open_files():
    f = file('f', b'x' * 100)
    fcntl.fcntl(f, F_OFD_SETLK, lock(fcntl.F_WRLCK, 3, 7))
    other = os.open(place('f'), os.O_RDWR)
    yield
    equal(asked(other, F_OFD_GETLK), (fcntl.F_WRLCK, 0, 3, 7, -1))
    equal(asked(f, F_OFD_GETLK)[0], fcntl.F_UNLCK)
    f.close()
    equal(asked(other, F_OFD_GETLK)[0], fcntl.F_UNLCK)


@promise(**LOCKS)
def a_read_lease_is_broken_by_a_writer_with_a_signal():
    hits = []
    signal.signal(signal.SIGIO, lambda *_: hits.append(1))
    f = file('f', b'x')
    f.close()
    fd = os.open(place('f'), os.O_RDONLY)
    fcntl.fcntl(fd, F_SETLEASE, fcntl.F_RDLCK)
    yield
    equal(fcntl.fcntl(fd, F_GETLEASE), fcntl.F_RDLCK)
    equal(elsewhere(lambda: os.open(place('f'), os.O_WRONLY | os.O_NONBLOCK)), f'error {errno.EWOULDBLOCK}')
    eventually(lambda: hits, 'SIGIO')
    fcntl.fcntl(fd, F_SETLEASE, fcntl.F_UNLCK)


@promise(**LOCKS)
def a_write_lease_stays():
    fd = os.open(place('f'), os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(fd, F_SETLEASE, fcntl.F_WRLCK)
    yield
    equal(fcntl.fcntl(fd, F_GETLEASE), fcntl.F_WRLCK)
    fcntl.fcntl(fd, F_SETLEASE, fcntl.F_UNLCK)


@promise(refused='--file-locks')
def locks_are_refused_where_they_were_not_asked_for():
    f = file('f')
    fcntl.flock(f, fcntl.LOCK_EX)
    yield
    equal(elsewhere(lambda: try_flock(place('f'), fcntl.LOCK_SH)), f'error {errno.EAGAIN}')


@promise(**LOCKS)
def somebody_who_waits_for_a_lock_gets_it():
    f = file('f')
    fcntl.flock(f, fcntl.LOCK_EX)

    def child():
        import threading
        own = os.open(place('f'), os.O_RDWR)
        thread = threading.Thread(target=fcntl.flock, args=(own, fcntl.LOCK_EX))
        thread.start()
        eventually(lambda: open(f'/proc/self/task/{thread.native_id}/syscall').read().startswith('73 '), 'the thread waits')
        yield
        thread.join(PATIENCE)
        check(not thread.is_alive(), 'it waits still')
    other = Child(child)
    yield
    fcntl.flock(f, fcntl.LOCK_UN)
    other.join()


@promise(**LOCKS, unlike=['fdinfo 3, *OFDLCK*'])
def a_lock_of_a_deleted_file_stays():
    f = file('f', b'x')
    other = os.open(place('f'), os.O_RDWR)
    fcntl.fcntl(f, F_OFD_SETLK, lock(fcntl.F_WRLCK))
    os.unlink(place('f'))
    yield
    equal(asked(other, F_OFD_GETLK)[0], fcntl.F_WRLCK)
