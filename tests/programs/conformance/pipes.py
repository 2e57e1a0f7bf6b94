"""Pipes and FIFOs."""
import errno
import fcntl
import os
import signal
import struct

from promises import *

F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032


@promise
def what_was_written_to_a_pipe_is_read():
    reader, writer = os.pipe()
    os.write(writer, b'before')
    yield
    os.write(writer, b' and after')
    equal(os.read(reader, 100), b'before and after')
    os.close(writer)
    equal(os.read(reader, 1), b'', 'the end')


@promise
def a_full_pipe_stays_full_and_drains_in_order():
    reader, writer = os.pipe2(os.O_NONBLOCK)
    data = os.urandom(65536)
    equal(os.write(writer, data), 65536)
    yield
    fails(errno.EAGAIN, os.write, writer, b'x')
    equal(os.read(reader, 4096), data[:4096])
    equal(os.write(writer, data[:4096]), 4096)
    equal(os.read(reader, 70000), data[4096:] + data[:4096])


@promise
def a_pipe_keeps_its_size_with_what_is_in_it():
    reader, writer = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writer, F_SETPIPE_SZ, 1 << 20)
    data = os.urandom(900000)
    os.write(writer, data)
    yield
    equal(fcntl.fcntl(writer, F_GETPIPE_SZ), 1 << 20, 'the size')
    equal(os.read(reader, 1000000), data)


@promise
def a_small_pipe_stays_small():
    reader, writer = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
    yield
    equal(fcntl.fcntl(reader, F_GETPIPE_SZ), 4096)
    equal(os.write(writer, b'x' * 5000), 4096)


@promise
def packets_of_a_pipe_stay_apart():
    reader, writer = os.pipe2(os.O_DIRECT)
    for text in (b'one', b'two', b'three'): os.write(writer, text)
    yield
    os.write(writer, b'four')
    equal([os.read(reader, 100) for _ in range(4)], [b'one', b'two', b'three', b'four'])
    check(fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_DIRECT, 'O_DIRECT is gone')


@promise
def a_pipe_whose_writer_has_gone_ends_after_its_data():
    reader, writer = os.pipe()
    os.write(writer, b'last words')
    os.close(writer)
    yield
    equal(os.read(reader, 100), b'last words')
    equal(os.read(reader, 100), b'')


@promise
def a_pipe_without_readers_signals_its_writer():
    reader, writer = os.pipe()
    os.close(reader)
    yield
    fails(errno.EPIPE, os.write, writer, b'x')


@promise
def a_reader_that_waits_gets_what_comes():
    reader, writer = os.pipe()
    other = Child(waits_for, reader, writer)
    yield
    os.write(writer, b'at last')
    other.join()


def waits_for(reader, writer):
    import threading
    got = []
    thread = threading.Thread(target=lambda: got.append(os.read(reader, 100)))
    thread.start()
    eventually(lambda: open(f'/proc/self/task/{thread.native_id}/syscall').read().startswith('0 '), 'the thread reads')
    yield
    thread.join()
    equal(got, [b'at last'])


@promise
def a_writer_that_waits_for_room_goes_on():
    # A write that has begun may end early wherever a task is stopped: write(2). This one has not.
    reader, writer = os.pipe()
    full = os.urandom(65536)
    os.write(writer, full)
    import threading
    thread = threading.Thread(target=lambda: os.write(writer, b'more'))
    thread.start()
    eventually(lambda: open(f'/proc/self/task/{thread.native_id}/syscall').read().startswith('1 '), 'the thread writes')
    yield
    equal(os.read(reader, 65536), full)
    equal(os.read(reader, 65536), b'more')
    thread.join()


@promise
def a_pipe_between_parent_and_child_works_both_ways():
    down, up = os.pipe(), os.pipe()

    def child():
        os.close(down[1])
        os.close(up[0])
        yield
        os.write(up[1], os.read(down[0], 100).upper())
    other = Child(child)
    os.close(down[0])
    os.close(up[1])
    yield
    os.write(down[1], b'hello')
    equal(os.read(up[0], 100), b'HELLO')
    other.join()
    equal(os.read(up[0], 100), b'', 'the end when the child has gone')


@promise
def flags_of_both_ends_are_their_own():
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    yield
    equal((os.get_blocking(reader), os.get_blocking(writer)), (True, False))
    equal([fcntl.fcntl(fd, fcntl.F_GETFD) for fd in (reader, writer)], [1, 1])


@promise
def a_pipe_reopened_through_proc_for_reading_and_writing_stays_so():
    reader, writer = os.pipe()
    both = os.open(f'/proc/self/fd/{reader}', os.O_RDWR)
    os.close(reader)
    os.close(writer)
    os.write(both, b'round')
    yield
    equal(fcntl.fcntl(both, fcntl.F_GETFL) & os.O_ACCMODE, os.O_RDWR)
    equal(os.read(both, 100), b'round')
    os.write(both, b'again')
    equal(os.read(both, 100), b'again')


@promise
def a_pipe_that_signals_its_owner_goes_on_doing_so():
    hits = []
    signal.signal(signal.SIGIO, lambda *_: hits.append(1))
    reader, writer = os.pipe()
    fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    yield
    equal(fcntl.fcntl(reader, fcntl.F_GETOWN), os.getpid(), 'the owner')
    check(fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_ASYNC, 'O_ASYNC is gone')
    os.write(writer, b'x')
    eventually(lambda: hits, 'SIGIO comes')


@promise
def a_fifo_keeps_what_is_in_it():
    os.mkfifo(place('fifo'))
    reader = os.open(place('fifo'), os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(place('fifo'), os.O_WRONLY)
    os.write(writer, b'before')
    yield
    third = os.open(place('fifo'), os.O_WRONLY)
    os.write(third, b' and after')
    equal(os.read(reader, 100), b'before and after')


@promise
def a_deleted_fifo_still_connects_its_ends():
    os.mkfifo(place('fifo'))
    reader = os.open(place('fifo'), os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(place('fifo'), os.O_WRONLY)
    os.write(writer, b'before')
    os.unlink(place('fifo'))
    yield
    os.write(writer, b' and after')
    equal(os.read(reader, 100), b'before and after')
    check(not os.path.exists(place('fifo')), 'it has a name again')


@promise
def a_fifo_open_at_its_reading_end_waits_for_writers():
    os.mkfifo(place('fifo'))
    reader = os.open(place('fifo'), os.O_RDONLY | os.O_NONBLOCK)
    yield
    equal(os.read(reader, 1), b'', 'nobody writes')
    writer = os.open(place('fifo'), os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b'x')
    equal(os.read(reader, 1), b'x')


@promise
def a_fifo_whose_readers_have_gone_keeps_its_writer():
    os.mkfifo(place('fifo'))
    reader = os.open(place('fifo'), os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(place('fifo'), os.O_WRONLY | os.O_NONBLOCK)
    os.close(reader)
    yield
    fails(errno.EPIPE, os.write, writer, b'x')
    reader = os.open(place('fifo'), os.O_RDONLY | os.O_NONBLOCK)
    os.write(writer, b'y')
    equal(os.read(reader, 1), b'y')


@promise
def a_fifo_open_for_reading_and_writing_keeps_its_data():
    os.mkfifo(place('fifo'))
    both = os.open(place('fifo'), os.O_RDWR)
    os.write(both, b'kept')
    yield
    equal(os.read(both, 100), b'kept')
