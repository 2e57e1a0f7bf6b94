"""Signals: handlers, masks, what is pending, alternate stacks, stops."""
import ctypes
import os
import signal
import struct
import time

from promises import *

RT = signal.SIGRTMIN
# After some moves the signal that stopped a task is shown as pending until the task is continued, which takes it away.
STOP = ['* SigPnd: *', '* ShdPnd: *']


def pending(kind='ShdPnd', tid=None):
    return int(status(kind, tid=tid), 16)


def bit(number):
    return 1 << number - 1


@promise
def handlers_stay():
    hits = []
    for number in (signal.SIGUSR1, signal.SIGWINCH, RT, signal.SIGRTMAX): signal.signal(number, lambda n, _: hits.append(n))
    yield
    for number in (signal.SIGUSR1, signal.SIGWINCH, RT, signal.SIGRTMAX): os.kill(os.getpid(), number)
    eventually(lambda: len(hits) == 4, 'all signals')


@promise
def ignored_signals_stay_ignored():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    yield
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)


@promise
def default_actions_stay():
    def child():
        yield
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(PATIENCE)
    other = Child(child)
    yield
    equal(os.WTERMSIG(os.waitpid(other.pid, 0)[1]), signal.SIGUSR1)


@promise
def flags_and_masks_of_handlers_stay():
    # struct sigaction of the kernel: handler, flags, restorer, mask
    def action(number):
        got = (ctypes.c_ulong * 4)()
        call(13, number, 0, got, 8)
        return list(got)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    wanted = action(signal.SIGUSR1)
    wanted[1] |= 0x4 | 0x8000000 | 0x10000000 | 0x40000000  # SA_SIGINFO, SA_ONSTACK, SA_RESTART, SA_NODEFER
    wanted[3] = bit(signal.SIGTERM) | bit(RT + 3)
    call(13, signal.SIGUSR1, (ctypes.c_ulong * 4)(*wanted), 0, 8)
    wanted = action(signal.SIGUSR1)
    yield
    equal(action(signal.SIGUSR1), wanted)


@promise(variants=['thread', 'child'])
def the_mask_stays():
    signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGINT, RT + 5, signal.SIGCHLD])
    yield
    equal(signal.pthread_sigmask(signal.SIG_BLOCK, []), {signal.SIGINT, RT + 5, signal.SIGCHLD})


@promise
def each_thread_keeps_its_own_mask():
    def thread(number):
        signal.pthread_sigmask(signal.SIG_SETMASK, [number])
        yield
        equal(signal.pthread_sigmask(signal.SIG_BLOCK, []), {number})
    others = [Thread(thread, RT + n) for n in range(4)]
    yield
    for other in others: other.join()


@promise
def a_pending_signal_of_the_process_arrives():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.kill(os.getpid(), signal.SIGUSR1)
    yield
    info = signal.sigtimedwait([signal.SIGUSR1], 0)
    check(info, 'it is lost')
    equal((info.si_code, info.si_pid, info.si_uid), (0, os.getpid(), 0))
    equal(signal.sigtimedwait([signal.SIGUSR1], 0), None, 'a second one')


@promise
def a_pending_signal_of_a_thread_stays_the_threads():
    def thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        call(200, gettid(), signal.SIGUSR1)  # tkill(2)
        yield
        info = signal.sigtimedwait([signal.SIGUSR1], 0)
        check(info, 'it is lost')
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    other = Thread(thread)
    yield
    equal(pending('ShdPnd') & bit(signal.SIGUSR1), 0)
    other.join()


@promise
def queued_real_time_signals_keep_their_order_and_values():
    signal.pthread_sigmask(signal.SIG_BLOCK, [RT, RT + 1])
    for value in range(20):
        info = struct.pack('iiiiiiQ', RT + value % 2, 0, -1, 0, os.getpid(), 0, value).ljust(128, b'\0')
        call(129, os.getpid(), RT + value % 2, info)  # rt_sigqueueinfo(2)
    yield

    def values(number):
        got, info = [], ctypes.create_string_buffer(128)
        mask, zero = ctypes.c_ulong(bit(number)), (ctypes.c_long * 2)()
        while libc.syscall(ctypes.c_long(128), ctypes.byref(mask), info, zero, ctypes.c_long(8)) == number:
            got.append(struct.unpack('Q', info.raw[24:32])[0])
        return got
    equal(values(RT), list(range(0, 20, 2)))
    equal(values(RT + 1), list(range(1, 20, 2)))


@promise(variants=['thread'])
def the_alternate_stack_stays():
    memory = ctypes.create_string_buffer(65536)
    stack = (ctypes.c_ulong * 3)(ctypes.addressof(memory), 0, 65536)
    call(131, stack, 0)
    yield
    got = (ctypes.c_ulong * 3)()
    call(131, 0, got)
    equal((got[0], got[1] & 0xffffffff, got[2]), (ctypes.addressof(memory), 0, 65536))


@c_promise()
def a_handler_runs_on_its_alternate_stack():
    r'''
static char stack[65536];
static volatile int on;
static void handler(int n) { char c; on = &c > stack && &c < stack + sizeof stack ? 1 : -1; }
int run(void) {
    stack_t alternate = { .ss_sp = stack, .ss_size = sizeof stack };
    need(!sigaltstack(&alternate, 0));
    struct sigaction action = { .sa_handler = handler, .sa_flags = SA_ONSTACK };
    need(!sigaction(SIGUSR1, &action, 0));
    moved();
    raise(SIGUSR1);
    if (on != 1) wrong("the handler ran elsewhere: %d", on);
    return 0;
}'''


@c_promise()
def a_program_inside_of_a_handler_returns_from_it():
    r'''
static volatile int state;
static void handler(int n) { state = 1; moved(); state = 2; }
int run(void) {
    struct sigaction action = { .sa_handler = handler };
    sigaddset(&action.sa_mask, SIGUSR2);
    sigaction(SIGUSR1, &action, 0);
    raise(SIGUSR1);
    sigset_t mask;
    sigprocmask(SIG_BLOCK, 0, &mask);
    if (state != 2) wrong("state %d", state);
    if (sigismember(&mask, SIGUSR1) || sigismember(&mask, SIGUSR2)) wrong("the mask of the handler stays");
    return 0;
}'''


@promise
def a_thread_in_sigwait_gets_its_signal():
    got = []
    signal.pthread_sigmask(signal.SIG_BLOCK, [RT])
    import threading
    thread = threading.Thread(target=lambda: got.append(signal.sigwaitinfo([RT])))
    thread.start()
    eventually(lambda: open(f'/proc/self/task/{thread.native_id}/syscall').read().startswith('128 '), 'the thread waits')
    yield
    os.kill(os.getpid(), RT)
    thread.join()
    equal(got[0].si_signo, RT)


@promise
def a_thread_in_pause_is_woken():
    hits = []

    def child():
        signal.signal(signal.SIGUSR1, lambda *_: hits.append(1))
        import threading
        yield
        eventually(lambda: hits, 'the signal')
    other = Child(child)
    yield
    os.kill(other.pid, signal.SIGUSR1)
    other.join()


@promise
def sigsuspend_ends_with_the_mask_from_before():
    program = C(r'''
static volatile int hit;
static void handler(int n) { hit = n; }
static void *poke(void *main) { usleep(100000); moved(); pthread_kill(*(pthread_t *) main, SIGUSR1); return 0; }
int run(void) {
    sigset_t all, none, now;
    struct sigaction action = { .sa_handler = handler };
    sigaction(SIGUSR1, &action, 0);
    sigfillset(&all); sigemptyset(&none);
    pthread_t self = pthread_self(), thread;
    pthread_create(&thread, 0, poke, &self);
    sigprocmask(SIG_SETMASK, &all, 0);
    sigsuspend(&none);
    sigprocmask(SIG_BLOCK, 0, &now);
    if (hit != SIGUSR1) wrong("no signal");
    if (!sigismember(&now, SIGUSR1) || !sigismember(&now, SIGTERM)) wrong("another mask");
    return 0;
}''')
    yield
    program.join()


@promise(unlike=STOP)
def a_stopped_child_stays_stopped_and_can_be_continued():
    def child(): yield
    other = Child(child)
    os.kill(other.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    time.sleep(0.05)
    check('(stopped)' in status('State', other.pid), status('State', other.pid))
    os.kill(other.pid, signal.SIGCONT)
    other.join()


def stopped_by(number):
    def stays():
        # A group whose members all have parents of their own group or elsewhere is an orphan, and does not stop: setpgid(2).
        def child():
            os.setpgid(0, 0)
            yield
            # A zombie has not been continued, to those who ask: waitid(2).
            eventually(lambda: os.path.exists(place('seen')), 'the parent')
        other = Child(child)
        os.kill(other.pid, number)
        equal(os.WSTOPSIG(os.waitpid(other.pid, os.WUNTRACED)[1]), number)
        yield
        check('(stopped)' in status('State', other.pid), status('State', other.pid))
        os.kill(other.pid, signal.SIGCONT)
        equal(os.waitid(os.P_PID, other.pid, os.WCONTINUED).si_code, os.CLD_CONTINUED)
        open(place('seen'), 'w').close()
        other.join()
    stays.__name__ = f'a_child_stopped_by_{signal.Signals(number).name}_stays_so'
    promise(unlike=STOP)(stays)


for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU): stopped_by(number)


@promise(unlike=STOP)
def a_stop_that_the_parent_has_not_asked_for_yet_is_told():
    def child():
        os.setpgid(0, 0)
        yield
    other = Child(child)
    os.kill(other.pid, signal.SIGTSTP)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    info = os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOHANG)
    check(info, 'waitid knows of no stop')
    equal(info.si_status, signal.SIGTSTP)
    os.kill(other.pid, signal.SIGCONT)
    other.join()


@promise(unlike=STOP)
def a_stopped_child_with_threads_stays_stopped_with_all_of_them():
    def child():
        def thread(): yield
        threads = [Thread(thread) for _ in range(3)]
        yield
        for each in threads: each.join()
    other = Child(child)
    os.kill(other.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    states = {status('State', other.pid, tid)[0] for tid in os.listdir(f'/proc/{other.pid}/task')}
    equal(states, {'T'})
    os.kill(other.pid, signal.SIGCONT)
    other.join()


@promise(unlike=STOP)
def a_stopped_group_is_continued_as_one():
    def child():
        os.setpgid(0, 0)
        def grandchild(): yield
        other = Child(grandchild)
        yield
        other.join()
    other = Child(child)
    os.killpg(other.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    os.killpg(other.pid, signal.SIGCONT)
    other.join()


@promise
def the_parent_death_signal_stays():
    def child():
        hits = []
        signal.signal(signal.SIGUSR2, lambda *_: hits.append(1))

        def grandchild():
            signal.signal(signal.SIGUSR2, lambda *_: hits.append(1))
            prctl(1, signal.SIGUSR2)
            yield
            number = ctypes.c_int()
            prctl(2, ctypes.byref(number))
            equal(number.value, signal.SIGUSR2)
            eventually(lambda: hits, 'the signal of the parent\'s death')
            open(place('told'), 'w').close()
        Child(grandchild)
        yield
    other = Child(child)
    yield
    other.join()
    eventually(lambda: os.path.exists(place('told')), 'the grandchild hears of it')


@promise
def sigchld_comes_when_a_child_ends():
    hits = []
    signal.signal(signal.SIGCHLD, lambda *_: hits.append(1))

    def child(): yield
    other = Child(child)
    yield
    eventually(lambda: hits, 'SIGCHLD')
    other.join()


@promise
def a_synchronous_fault_in_a_thread_reaches_its_handler():
    program = C(r'''
#include <setjmp.h>
static sigjmp_buf back;
static void handler(int n, siginfo_t *info, void *context) { siglongjmp(back, info->si_addr == (void *) 16 ? 1 : 2); }
static void *thread(void *unused) {
    moved();
    int got = sigsetjmp(back, 1);
    if (!got) *(volatile int *) 16 = 1;
    return (void *) (long) got;
}
int run(void) {
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
    sigaction(SIGSEGV, &action, 0);
    pthread_t id; void *result;
    pthread_create(&id, 0, thread, 0);
    pthread_join(id, &result);
    if (result != (void *) 1) wrong("the handler said %ld", (long) result);
    return 0;
}''')
    yield
    program.join()


@promise
def a_handler_of_the_debuggers_trap_stays():
    signal.signal(signal.SIGTRAP, lambda *_: None)
    yield
    check(int(status('SigCgt'), 16) & bit(signal.SIGTRAP), 'it is gone')
