"""Timers of a process: interval timers, POSIX timers."""
import ctypes
import resource
import signal
import struct
import time

from promises import *


class SigEvent(ctypes.Structure):
    _fields_ = [('value', ctypes.c_void_p), ('signal', ctypes.c_int), ('notify', ctypes.c_int), ('tid', ctypes.c_int), ('pad', ctypes.c_char * 44)]


def timer_create(clock, number=signal.SIGRTMIN, notify=0, value=0, tid=0):
    timer = ctypes.c_int()
    call(222, clock, ctypes.byref(SigEvent(value, number, notify, tid)), ctypes.byref(timer))
    return timer.value


def timer_settime(timer, first, interval=0, flags=0):
    spec = (ctypes.c_long * 4)(int(interval), int(interval % 1 * 1e9), int(first), int(first % 1 * 1e9))
    call(223, timer, flags, spec, 0)


def timer_gettime(timer):
    spec = (ctypes.c_long * 4)()
    call(224, timer, spec)
    return spec[2] + spec[3] / 1e9, spec[0] + spec[1] / 1e9


def counted(number):
    hits = []
    signal.signal(number, lambda *_: hits.append(1))
    return hits


def burn(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline: sum(range(1000))


@promise
def an_interval_timer_of_real_time_goes_on_firing():
    hits = counted(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    yield
    hits.clear()
    eventually(lambda: len(hits) > 2, 'SIGALRM comes')
    equal(signal.getitimer(signal.ITIMER_REAL)[1], 0.02, 'the interval')


@promise
def an_interval_timer_keeps_the_time_left():
    signal.setitimer(signal.ITIMER_REAL, 5000, 7)
    yield
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    check(4500 < left < 5000, f'{left} seconds are left')
    equal(interval, 7, 'the interval')


@promise
def an_interval_timer_of_user_time_fires_when_the_time_is_used():
    hits = counted(signal.SIGVTALRM)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.3, 0.01)
    yield
    burn(lambda: len(hits) > 1)
    check(len(hits) > 1, 'SIGVTALRM does not come')


@promise
def an_interval_timer_of_processor_time_keeps_its_setting():
    signal.setitimer(signal.ITIMER_PROF, 900, 30)
    yield
    left, interval = signal.getitimer(signal.ITIMER_PROF)
    check(800 < left <= 900.1, f'{left} seconds are left')
    equal(interval, 30, 'the interval')


@promise
def a_posix_timer_goes_on_firing_with_its_value():
    values = []
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    timer = timer_create(1, value=0x1234)
    timer_settime(timer, 0.02, 0.02)
    yield
    for _ in range(3):
        info = signal.sigtimedwait([signal.SIGRTMIN], PATIENCE)
        check(info, 'the timer does not fire')
        equal(info.si_code, -2, 'si_code')
    equal(timer_gettime(timer)[1], 0.02, 'the interval')


@promise
def posix_timers_keep_their_ids_when_some_were_deleted():
    ids = [timer_create(1) for _ in range(6)]
    for timer in (ids[0], ids[3]): call(226, timer)
    for n, timer in enumerate(ids):
        if n not in (0, 3): timer_settime(timer, 1000 * (n + 1))
    yield
    for n, timer in enumerate(ids):
        if n in (0, 3): fails(22, timer_gettime, timer)
        else: check(1000 * n < timer_gettime(timer)[0] <= 1000 * (n + 1), f'timer {timer}: {timer_gettime(timer)}')


@promise
def a_posix_timer_that_is_not_armed_can_be_armed():
    hits = counted(signal.SIGRTMIN)
    timer = timer_create(0)
    yield
    equal(timer_gettime(timer), (0, 0), 'the time left')
    timer_settime(timer, 0.01)
    eventually(lambda: hits, 'the timer fires')


@promise
def a_posix_timer_to_a_thread_signals_that_thread():
    def thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 1])
        timer_settime(timer_create(1, signal.SIGRTMIN + 1, 4, 7, gettid()), 0.02, 0.02)
        yield
        check(signal.sigtimedwait([signal.SIGRTMIN + 1], PATIENCE), 'the thread gets no signal')
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 1])
    other = Thread(thread)
    yield
    other.join()


@promise
def a_posix_timer_without_a_signal_counts_down():
    timer = timer_create(7, notify=1)  # CLOCK_BOOTTIME, SIGEV_NONE
    timer_settime(timer, 2000)
    yield
    check(1900 < timer_gettime(timer)[0] < 2000, f'{timer_gettime(timer)}')


@promise
def posix_timers_of_processor_time_keep_their_setting():
    process, thread = timer_create(2), timer_create(3)
    timer_settime(process, 500, 3)
    timer_settime(thread, 600)
    yield
    check(490 < timer_gettime(process)[0] <= 500.1, f'{timer_gettime(process)}')
    check(590 < timer_gettime(thread)[0] <= 600.1, f'{timer_gettime(thread)}')
    equal(timer_gettime(process)[1], 3, 'the interval')


@promise
def an_absolute_posix_timer_fires_at_its_time():
    hits = counted(signal.SIGRTMIN)
    at = time.time() + 3
    timer = timer_create(0)
    timer_settime(timer, at, 0, 1)
    yield
    eventually(lambda: hits, 'the timer fires')
    check(time.time() >= at - 0.05, 'it fired too early')


@promise
def a_sleep_goes_on_and_ends_at_its_time():
    def sleeper():
        start = time.monotonic()
        libc.usleep.restype = ctypes.c_int
        libc.nanosleep((ctypes.c_long * 2)(2, 500000000), None)
        took.append(time.monotonic() - start)
        told()  # so that the thread is still there, however long the move takes
    took = []
    import threading
    thread = threading.Thread(target=sleeper)
    thread.start()
    yield
    thread.join()
    check(2.45 < took[0], f'the sleep ended after {took[0]} seconds')


@promise
def a_limit_of_processor_time_still_signals():
    hits = counted(signal.SIGXCPU)
    resource.setrlimit(resource.RLIMIT_CPU, (1, 100))
    yield
    equal(resource.getrlimit(resource.RLIMIT_CPU), (1, 100), 'the limit')
    burn(lambda: hits)
    check(hits, 'SIGXCPU does not come')
