"""Who a task is, and what it may do."""
import ctypes
import os
import struct

from promises import *


def capget(tid=0):
    header, data = (ctypes.c_uint * 2)(0x20080522, tid), (ctypes.c_uint * 6)()
    call(125, header, data)
    return tuple(data[n] | data[n + 3] << 32 for n in range(3))  # effective, permitted, inheritable


def capset(effective, permitted, inheritable):
    header, data = (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)()
    for n, value in enumerate((effective, permitted, inheritable)): data[n], data[n + 3] = value & 0xffffffff, value >> 32
    call(126, header, data)


def raw(number, *arguments):
    """A system call for this thread only: those of libc are for all threads."""
    return call(number, *arguments)


THREADS = promise(variants=['thread', 'child'])


@promise(variants=['child'])
def user_and_group_ids_stay():
    os.setresgid(10, 20, 30)
    os.setresuid(1, 0, 3)
    yield
    equal((os.getresuid(), os.getresgid()), ((1, 0, 3), (10, 20, 30)))


@promise(variants=['child'])
def an_ordinary_user_stays_one():
    os.setgroups([])
    os.setresgid(2000, 2000, 2000)
    os.setresuid(1000, 1000, 1000)
    yield
    equal((os.getresuid(), os.getresgid(), os.getgroups()), ((1000,) * 3, (2000,) * 3, []))
    fails(1, os.setuid, 0)
    equal(capget(), (0, 0, 0))


@THREADS
def file_system_ids_stay():
    raw(122, 1234)  # setfsuid(2)
    raw(123, 4321)
    yield
    equal((raw(122, -1), raw(123, -1)), (1234, 4321))


@promise(variants=['child'])
def supplementary_groups_stay():
    groups = sorted({5, 77, 1000000, *range(100, 140)})
    os.setgroups(groups)
    yield
    equal(sorted(os.getgroups()), groups)


@promise
def threads_keep_credentials_of_their_own():
    def thread(uid):
        raw(116, 1, (ctypes.c_uint * 1)(uid))  # setgroups(2)
        raw(117, uid, uid, 0)  # setresuid(2)
        yield
        equal(status('Uid', 'self', gettid()).split(), [str(uid), str(uid), '0', str(uid)])
        equal(status('Groups', 'self', gettid()).split(), [str(uid)])
    others = [Thread(thread, uid) for uid in (1001, 1002)]
    yield
    equal(os.getresuid(), (0, 0, 0))
    for other in others: other.join()


@THREADS
def capabilities_stay():
    everything = capget()[1]
    capset(1 << 21 | 1 << 6, everything & ~(1 << 10), 1 << 5)
    yield
    equal(capget(), (1 << 21 | 1 << 6, everything & ~(1 << 10), 1 << 5))


@THREADS
def the_bounding_set_stays():
    for which in (10, 25): prctl(24, which)  # PR_CAPBSET_DROP
    yield
    equal([prctl(23, which) for which in (9, 10, 25)], [1, 0, 0])


@THREADS
def ambient_capabilities_stay():
    everything = capget()[1]
    capset(everything, everything, 1 << 10)
    prctl(47, 2, 10)  # PR_CAP_AMBIENT, RAISE
    yield
    equal([prctl(47, 1, which) for which in (10, 11)], [1, 0])


@THREADS
def securebits_stay():
    prctl(28, 0x2a)  # PR_SET_SECUREBITS: all locked
    yield
    equal(prctl(27), 0x2a)


@THREADS
def keeping_of_capabilities_stays():
    prctl(8, 1)
    yield
    equal(prctl(7), 1)


@THREADS
def no_new_privileges_stays():
    prctl(38, 1)
    yield
    equal(prctl(39), 1)


FILTER = [(0x20, 0, 0, 0), (0x15, 0, 1, 39), (0x06, 0, 0, 0x00050000 | 77), (0x06, 0, 0, 0x7fff0000)]  # getpid(2) fails with 77


class Filter(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('code', ctypes.c_char_p)]


def install(program, flags=0):
    code = b''.join(struct.pack('HBBI', *line) for line in program)
    prctl(38, 1)
    call(317, 1, flags, ctypes.byref(Filter(len(program), code)))


@promise(variants=['thread', 'child'])
def a_seccomp_filter_still_filters():
    install(FILTER)
    yield
    fails(77, call, 39)
    equal(status('Seccomp', 'self', gettid()), '2')


@promise
def seccomp_filters_stack_up():
    install(FILTER)
    install([(0x20, 0, 0, 0), (0x15, 0, 1, 110), (0x06, 0, 0, 0x00050000 | 78), (0x06, 0, 0, 0x7fff0000)])
    yield
    fails(77, call, 39)
    fails(78, call, 110)
    equal(status('Seccomp_filters'), '2')


@promise
def a_seccomp_filter_is_inherited_by_a_child():
    install(FILTER)
    def child():
        yield
        fails(77, call, 39)
    other = Child(child)
    yield
    other.join()


@promise
def seccomp_filters_of_threads_can_be_made_one():
    def thread():
        yield
        eventually(lambda: status('Seccomp', 'self', gettid()) == '2', 'the filter')
        fails(77, call, 39)
    other = Thread(thread)
    yield
    install(FILTER, 1)  # SECCOMP_FILTER_FLAG_TSYNC
    other.join()


@c_promise()
def seccomp_strict_mode_stays():
    r'''
int run(void) {
    int down[2], up[2];
    pipe(down); pipe(up);
    pid_t child = fork();
    if (!child) {
        prctl(PR_SET_SECCOMP, 1);
        char c;
        write(up[1], "r", 1);
        read(down[0], &c, 1);
        write(up[1], "x", 1);
        getuid();
        syscall(SYS_exit, 0);
    }
    char c;
    read(up[0], &c, 1);
    moved();
    write(down[1], "x", 1);
    need(read(up[0], &c, 1) == 1);
    int status;
    waitpid(child, &status, 0);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) wrong("status %x: it is not strict", status);
    return 0;
}'''


@promise(refused='seccomp notify')
def a_seccomp_filter_with_a_supervisor_is_refused():
    def child():
        code = b''.join(struct.pack('HBBI', *line) for line in [(0x20, 0, 0, 0), (0x15, 0, 1, 500), (0x06, 0, 0, 0x7fc00000), (0x06, 0, 0, 0x7fff0000)])
        prctl(38, 1)
        call(317, 1, 8, ctypes.byref(Filter(4, code)))  # SECCOMP_FILTER_FLAG_NEW_LISTENER
        yield
        equal(status('Seccomp'), '2')
    other = Child(child)
    yield
    other.join()
