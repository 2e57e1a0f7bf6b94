"""Processes and threads: who is whose, how they end, what they share."""
import ctypes
import os
import resource
import signal
import time

from promises import *

CLONE = dict(VM=0x100, FS=0x200, FILES=0x400, SIGHAND=0x800, VFORK=0x4000, PARENT=0x8000)


def stat(pid, field):
    """A field of /proc/PID/stat by its number in proc_pid_stat(5)."""
    return int(open(f'/proc/{pid}/stat').read().rsplit(') ', 1)[1].split()[field - 3])


@promise
def ids_stay():
    before = (os.getpid(), os.getpgrp(), os.getsid(0), gettid())
    yield
    equal((os.getpid(), os.getpgrp(), os.getsid(0), gettid()), before)


@promise
def children_stay_with_their_ids_and_can_be_waited_for():
    def child(): yield
    others = [Child(child) for _ in range(5)]
    yield
    for other in others: other.join()
    try: os.waitpid(-1, 0)
    except ChildProcessError: return
    raise AssertionError('there is another child')


@promise
def a_tree_of_many_generations_stays():
    def generation(n):
        def run():
            other = Child(generation(n - 1)) if n else None
            parent = os.getppid()
            yield
            equal(os.getppid(), parent)
            if other: other.join()
        return run
    other = Child(generation(10))
    yield
    other.join()


@promise
def groups_and_sessions_of_children_stay():
    def leader():
        os.setsid()
        def member():
            os.setpgid(0, 0)
            yield
            equal((os.getsid(0), os.getpgrp()), (os.getppid(), os.getpid()))
        other = Child(member)
        yield
        equal((os.getsid(0), os.getpgrp()), (os.getpid(), os.getpid()))
        other.join()
    other = Child(leader)
    yield
    other.join()


@promise
def a_group_whose_leader_is_gone_keeps_its_number():
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        told()
        time.sleep(PATIENCE)
    eventually(lambda: os.getpgid(leader) == leader, 'the group')

    def member():
        os.setpgid(0, leader)
        yield
        equal(os.getpgrp(), leader)
    other = Child(member)
    os.kill(leader, 9)
    os.waitpid(leader, 0)
    yield
    equal(os.getpgid(other.pid), leader)
    other.join()


@promise(refused='the leader of its session')
def a_session_whose_leader_is_gone_keeps_its_number():
    reader, writer = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writer, b'%d' % os.getpid())
            told()
            time.sleep(1)
            os._exit(0)
        os._exit(0)
    prctl(36, 1)
    os.waitpid(leader, 0)
    member = int(os.read(reader, 10))
    yield
    equal(os.getsid(member), leader)


@promise
def a_zombie_can_still_be_waited_for():
    pid = os.fork()
    if pid == 0: os._exit(42)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield
    equal(os.waitpid(pid, 0), (pid, 42 << 8))


@promise
def a_zombie_that_was_killed_says_by_what():
    pids = {}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1):
        pid = os.fork()
        if pid == 0: time.sleep(100)
        os.kill(pid, number)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        pids[pid] = number
    yield
    for pid, number in pids.items(): equal(os.WTERMSIG(os.waitpid(pid, 0)[1]), number)


@promise(broken={'all': 'it comes back as killed without a core'})
def a_zombie_that_dumped_core_says_so():
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2) if resource.getrlimit(resource.RLIMIT_CORE)[1] == -1 else skip('no core files')
    pid = os.fork()
    if pid == 0:
        os.chdir(place())
        os.abort()
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    yield
    again = os.waitid(os.P_PID, pid, os.WEXITED)
    equal((again.si_code, again.si_status), (status.si_code, status.si_status))


@promise
def a_zombie_of_a_child_stays_the_childs():
    def child():
        pid = os.fork()
        if pid == 0: os._exit(7)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        yield
        equal(os.waitpid(pid, 0)[1], 7 << 8)
    other = Child(child)
    yield
    other.join()


@promise
def a_zombie_that_leads_a_group_keeps_the_group():
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        time.sleep(100)
    eventually(lambda: os.getpgid(leader) == leader, 'the group')
    def member():
        os.setpgid(0, leader)
        yield
        equal(os.getpgrp(), leader)
    other = Child(member)
    os.kill(leader, 9)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    yield
    other.join()
    equal(os.waitpid(leader, 0)[0], leader)


@promise
def a_subreaper_takes_the_orphans():
    prctl(36, 1)
    yield
    value = ctypes.c_int()
    prctl(37, ctypes.byref(value))
    equal(value.value, 1)
    reader, writer = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.write(writer, b'%d' % os.getpid())
            os._exit(3)
        os._exit(0)
    os.wait()
    orphan = int(os.read(reader, 10))
    equal(os.waitpid(orphan, 0), (orphan, 3 << 8))


@promise
def an_orphan_of_a_subreaper_stays_its_child():
    prctl(36, 1)
    reader, writer = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.write(writer, b'%d' % os.getpid())
            told()
            os._exit(3)
        os._exit(0)
    os.wait()
    orphan = int(os.read(reader, 10))
    yield
    equal(os.waitpid(orphan, 0), (orphan, 3 << 8))


@promise
def threads_stay_with_their_ids():
    def thread():
        me = gettid()
        yield
        equal(gettid(), me)
    others = [Thread(thread) for _ in range(10)]
    yield
    for other in others: other.join()


@promise
def a_hundred_threads_go_on():
    def thread(n):
        mine = [n]
        yield
        equal(mine, [n])
    others = [Thread(thread, n) for n in range(100)]
    yield
    for other in others: other.join()


@promise
def new_threads_and_children_can_be_made():
    yield
    def short(): yield
    others = [Thread(short) for _ in range(3)] + [Child(short) for _ in range(3)]
    for other in others: other.join()


@promise
def a_lock_between_threads_stays_locked():
    import threading
    lock, got = threading.Lock(), []
    lock.acquire()
    thread = threading.Thread(target=lambda: got.append(lock.acquire()))
    thread.start()
    time.sleep(0.05)
    yield
    check(not got, 'it is open')
    lock.release()
    thread.join(PATIENCE)
    equal(got, [True])


@promise
def a_thread_in_a_futex_with_a_timeout_goes_on():
    import threading
    took = []
    def wait():
        start = time.monotonic()
        threading.Event().wait(2.5)
        took.append(time.monotonic() - start)
        told()  # so that the thread is still there, however long the move takes
    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()
    check(2.45 < took[0] < 30, f'it took {took[0]} seconds')


@c_promise(not_in={'lazy': 'the kernel does not wait for missing pages of a task that is dying, and leaves its mutexes locked'})
def a_robust_mutex_is_handed_on_when_its_owner_dies():
    r'''
static pthread_mutex_t *mutex;
int run(void) {
    mutex = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(mutex, &attributes);
    int ready[2];
    pipe(ready);
    pid_t child = fork();
    if (!child) { pthread_mutex_lock(mutex); write(ready[1], "x", 1); pause(); }
    char c;
    read(ready[0], &c, 1);
    moved();
    kill(child, SIGKILL);
    int got = pthread_mutex_lock(mutex);
    if (got != EOWNERDEAD) wrong("lock gave %d", got);
    waitpid(child, 0, 0);
    return 0;
}'''


@c_promise()
def joining_a_thread_wakes_when_it_ends():
    r'''
static void *body(void *unused) { usleep(50000); moved(); return (void *) 7; }
int run(void) {
    pthread_t thread; void *result;
    pthread_create(&thread, 0, body, 0);
    pthread_join(thread, &result);
    if (result != (void *) 7) wrong("result %p", result);
    return 0;
}'''


@c_promise()
def thread_local_storage_stays():
    r'''
static __thread long mine = 5;
static pthread_barrier_t barrier;
static int bad;
static void *body(void *n) { mine = (long) n; pthread_barrier_wait(&barrier); pthread_barrier_wait(&barrier); if (mine != (long) n) bad = 1; return 0; }
int run(void) {
    pthread_t threads[4];
    pthread_barrier_init(&barrier, 0, 5);
    for (long n = 0; n < 4; n++) pthread_create(threads + n, 0, body, (void *) (n + 100));
    mine = 99;
    pthread_barrier_wait(&barrier);
    moved();
    pthread_barrier_wait(&barrier);
    for (int n = 0; n < 4; n++) pthread_join(threads[n], 0);
    if (bad || mine != 99) wrong("a thread has another's");
    return 0;
}'''


@c_promise()
def a_process_goes_on_when_its_first_thread_has_ended():
    r'''
static void *body(void *unused) { usleep(100000); moved(); _exit(0); }
int run(void) {
    pthread_t thread;
    pthread_create(&thread, 0, body, 0);
    syscall(SYS_exit, 0);
}'''


@promise(refused='CLONE_VM')
def memory_shared_with_a_child_is_refused():
    program = C(r'''
#define _GNU_SOURCE
#include <sched.h>
static int shared, ready[2];
static char stack[65536];
static int child(void *unused) { while (!__atomic_load_n(&shared, __ATOMIC_SEQ_CST)) usleep(1000); return 5; }
int run(void) {
    pid_t pid = clone(child, stack + sizeof stack, CLONE_VM | SIGCHLD, 0);
    need(pid > 0);
    moved();
    __atomic_store_n(&shared, 1, __ATOMIC_SEQ_CST);
    int status;
    need(waitpid(pid, &status, 0) == pid);
    if (WEXITSTATUS(status) != 5) wrong("status %x", status);
    return 0;
}''')
    yield
    program.join()


@promise(refused='vfork')
def a_child_of_vfork_that_has_not_gone_on_is_refused():
    program = C(r'''
int run(void) {
    pid_t pid = vfork();
    if (!pid) { moved(); _exit(6); }
    int status;
    need(waitpid(pid, &status, 0) == pid);
    if (WEXITSTATUS(status) != 6) wrong("status %x", status);
    return 0;
}''')
    yield
    program.join()


@promise
def a_child_that_shares_no_signal_handlers_keeps_its_own():
    hits = []
    signal.signal(signal.SIGUSR1, lambda *_: hits.append('parent'))
    def child():
        signal.signal(signal.SIGUSR1, lambda *_: hits.append('child'))
        yield
        os.kill(os.getpid(), signal.SIGUSR1)
        equal(hits, ['child'])
    other = Child(child)
    yield
    os.kill(os.getpid(), signal.SIGUSR1)
    equal(hits, ['parent'])
    other.join()


@promise
def exit_signals_other_than_sigchld_stay():
    hits = []
    signal.signal(signal.SIGUSR1, lambda *_: hits.append(1))
    pid = call(56, signal.SIGUSR1, 0, 0, 0, 0)
    if pid == 0:
        told()
        os._exit(0)
    yield
    eventually(lambda: hits, 'the signal of the child\'s end')
    libc.waitpid(pid, None, 0x40000000)  # __WALL


@promise
def times_of_children_count_on():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    def child():
        yield
        end = time.process_time() + 0.2
        while time.process_time() < end: pass
    other = Child(child)
    yield
    other.join()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(now.ru_utime + now.ru_stime > used.ru_utime + used.ru_stime + 0.1, 'no time was counted')


@promise
def the_monotonic_clock_does_not_go_back():
    before = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
    yield
    check(time.monotonic() > before[0] and time.clock_gettime(time.CLOCK_BOOTTIME) > before[1], 'it does')


@promise
def a_program_can_be_executed_after_the_move():
    yield
    import subprocess
    equal(subprocess.run(['/bin/echo', 'hello'], capture_output=True).stdout, b'hello\n')


@promise(refused='traces it already')
def a_child_traced_by_its_parent_is_refused():
    pid = os.fork()
    if pid == 0:
        while True: time.sleep(0.01)
    call(101, 16, pid, 0, 0)  # PTRACE_ATTACH
    os.waitpid(pid, 0)
    yield
    call(101, 17, pid, 0, 0)  # PTRACE_DETACH
    os.kill(pid, 9)
