"""What a task has that is a number: limits, scheduling, names, prctl(2)."""
import ctypes
import os
import resource
import signal

from promises import *


def got(option, *arguments):
    """What prctl(2) gives."""
    return prctl(option, *arguments)


def told_by(option):
    value = ctypes.c_int(-1)
    prctl(option, ctypes.byref(value))
    return value.value


BOTH = promise(variants=['thread', 'child'])


@promise
def limits_stay():
    wanted = {resource.RLIMIT_NOFILE: (333, 777), resource.RLIMIT_CORE: (0, 0), resource.RLIMIT_NPROC: (3000, 3001), resource.RLIMIT_FSIZE: (1 << 30, 1 << 31),
              resource.RLIMIT_MEMLOCK: (12288, 65536), resource.RLIMIT_SIGPENDING: (50, 60), resource.RLIMIT_MSGQUEUE: (1000, 2000), resource.RLIMIT_NICE: (5, 6),
              resource.RLIMIT_RTPRIO: (1, 2), resource.RLIMIT_RTTIME: (10 ** 6, 10 ** 7)}
    for which, (soft, hard) in wanted.items():
        most = resource.getrlimit(which)[1]
        if most != resource.RLIM_INFINITY: wanted[which] = (min(soft, most), min(hard, most))
        resource.setrlimit(which, wanted[which])
    yield
    equal({which: resource.getrlimit(which) for which in wanted}, wanted)


@promise
def a_limit_of_file_sizes_still_limits():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1 << 40))
    yield
    f = file('f')
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
    fails(27, os.pwrite, f.fileno(), b'x', 2000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))


@BOTH
def the_name_of_a_task_stays():
    prctl(15, ctypes.c_char_p(b'a (odd) name'))
    yield
    name = ctypes.create_string_buffer(16)
    prctl(16, name)
    equal(name.value, b'a (odd) name')


@promise
def arguments_and_environment_stay():
    before = open('/proc/self/cmdline').read(), open('/proc/self/environ').read()
    yield
    equal((open('/proc/self/cmdline').read(), open('/proc/self/environ').read()), before)


@BOTH
def niceness_stays():
    os.setpriority(os.PRIO_PROCESS, gettid(), 7)
    yield
    equal(os.getpriority(os.PRIO_PROCESS, gettid()), 7)


@BOTH
def the_scheduling_policy_stays():
    try: os.sched_setscheduler(gettid(), os.SCHED_BATCH, os.sched_param(0))
    except PermissionError: skip('scheduling policies cannot be set')
    yield
    equal(os.sched_getscheduler(gettid()), os.SCHED_BATCH)


@promise(variants=['thread'])
def real_time_scheduling_stays():
    try: os.sched_setscheduler(gettid(), os.SCHED_RR | 0x40000000, os.sched_param(3))
    except PermissionError: skip('real-time scheduling is not allowed')
    yield
    equal((os.sched_getscheduler(gettid()), os.sched_getparam(gettid()).sched_priority), (os.SCHED_RR | 0x40000000, 3))


@promise(variants=['thread'])
def idle_scheduling_stays():
    os.sched_setscheduler(gettid(), os.SCHED_IDLE, os.sched_param(0))
    yield
    equal(os.sched_getscheduler(gettid()), os.SCHED_IDLE)


@BOTH
def the_processors_a_task_may_use_stay():
    last = max(os.sched_getaffinity(0))
    os.sched_setaffinity(gettid(), {last})
    yield
    equal(os.sched_getaffinity(gettid()), {last})


@BOTH
def the_io_priority_stays():
    call(251, 1, gettid(), 2 << 13 | 6)  # ioprio_set(2)
    yield
    equal(call(252, 1, gettid()), 2 << 13 | 6)


@BOTH
def the_timer_slack_stays():
    prctl(29, 123456)
    yield
    equal(got(30), 123456)


@promise(variants=['child'])
def dumpable_stays():
    prctl(4, 0)
    yield
    equal(got(3), 0)


@promise(variants=['child'])
def the_personality_stays():
    libc.personality(0x0040000)  # ADDR_NO_RANDOMIZE
    yield
    equal(libc.personality(0xffffffff), 0x0040000)


@promise
def the_core_dump_filter_stays():
    open('/proc/self/coredump_filter', 'w').write('0x55')
    yield
    equal(open('/proc/self/coredump_filter').read(), '00000055\n')


@promise
def the_oom_score_adjustment_stays():
    open('/proc/self/oom_score_adj', 'w').write('321')
    yield
    equal(open('/proc/self/oom_score_adj').read(), '321\n')


@promise
def huge_pages_switched_off_stay_so():
    prctl(41, 1)
    yield
    equal(got(42), 1)


@promise
def merging_of_memory_stays_on():
    try: prctl(67, 1)
    except OSError: skip('the kernel cannot merge memory (KSM)')
    yield
    equal(got(68), 1)


@BOTH
def the_machine_check_policy_stays():
    prctl(33, 1, 1)  # PR_MCE_KILL_SET, PR_MCE_KILL_EARLY
    yield
    equal(got(34), 1)


@BOTH
def speculation_controls_stay():
    if got(52, 0) & 1 == 0: skip('speculation cannot be controlled here')
    prctl(53, 0, 4)  # PR_SPEC_STORE_BYPASS, PR_SPEC_DISABLE
    yield
    check(got(52, 0) & 4, 'it is on again')


@promise
def membarrier_registrations_stay():
    call(324, 16, 0, 0)  # MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED
    yield
    call(324, 8, 0, 0)


@c_promise()
def the_time_stamp_counter_stays_forbidden():
    r'''
#include <setjmp.h>
static sigjmp_buf back;
static void handler(int n) { siglongjmp(back, 1); }
int run(void) {
    need(!prctl(PR_SET_TSC, PR_TSC_SIGSEGV));
    moved();
    signal(SIGSEGV, handler);
    if (!sigsetjmp(back, 1)) {
        __builtin_ia32_rdtsc();
        wrong("it can be read");
    }
    return 0;
}'''


@promise
def cpuid_faulting_stays():
    try: call(158, 0x1012, 0)  # ARCH_CPUID_SETUP
    except OSError: skip('the processor has no CPUID faulting')
    yield
    value = call(158, 0x1011)
    call(158, 0x1012, 1)
    equal(value, 0)


@c_promise(refused='system calls dispatched to itself')
def syscall_user_dispatch_is_refused():
    r'''
#include <sys/prctl.h>
static char selector;
static volatile int caught;
static void handler(int n, siginfo_t *info, void *context) { selector = 0; caught++; }
int run(void) {
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO };
    sigaction(SIGSYS, &action, 0);
    need(!prctl(59, 1, 0, 0, &selector));
    moved();
    selector = 1;
    syscall(500);
    if (caught != 1) wrong("a system call was not dispatched (%d)", caught);
    return 0;
}'''


@promise
def the_session_keyring_is_that_of_the_host():
    try: before = call(250, 0, -3, 0)  # keyctl(2): KEYCTL_GET_KEYRING_ID of the session
    except OSError: skip('there are no keyrings')
    yield
    check(call(250, 0, -3, 0), 'there is none')


@promise
def core_scheduling_groups_stay():
    try: prctl(62, 1, 0, 1, 0)  # PR_SCHED_CORE_CREATE
    except OSError: skip('the kernel has no core scheduling')
    cookie = ctypes.c_ulong()
    yield
    prctl(62, 0, 0, 0, ctypes.addressof(cookie))
    check(cookie.value, 'the cookie is gone')


@promise(unlike=['sessionid: *'])
def the_login_uid_stays():
    try: open('/proc/self/loginuid', 'w').write('1234')
    except OSError: skip('there are no login uids')
    yield
    equal(open('/proc/self/loginuid').read(), '1234')


@promise(variants=['child'])
def the_numa_policy_stays():
    mode, nodes = ctypes.c_int(), (ctypes.c_ulong * 16)(1)
    try: call(238, 2, nodes, 1025)  # set_mempolicy(2): MPOL_BIND
    except OSError: skip('the kernel has no NUMA policies')
    yield
    call(239, ctypes.byref(mode), nodes, 1025, 0, 0)
    equal((mode.value, nodes[0]), (2, 1))


@promise(broken={'all': 'cgroups are not carried: tasks are in that of the tool'})
def the_cgroup_of_a_task_stays():
    root = '/sys/fs/cgroup/pids'
    if not os.path.isdir(root): skip('there is no cgroup of processes')
    name = f'{root}/whimbrel-promise-{os.stat(place()).st_ino}'
    os.mkdir(name)
    def child():
        open(name + '/cgroup.procs', 'w').write(str(os.getpid()))
        yield
        check(os.path.basename(name) in open('/proc/self/cgroup').read(), 'it is in another')
        open(root + '/cgroup.procs', 'w').write(str(os.getpid()))
        os.rmdir(name)
    other = Child(child)
    yield
    other.join()


@c_promise()
def rseq_goes_on_telling_the_processor():
    r'''
#include <sched.h>
#include <stddef.h>
struct rseq_area { uint32_t start, cpu; uint64_t cs; uint32_t flags, node, mm; } __attribute__((aligned(32)));
int run(void) {
    extern const ptrdiff_t __rseq_offset;
    extern const unsigned __rseq_size;
    if (!__rseq_size) { moved(); return 0; }
    moved();
    struct rseq_area *area = (void *) ((char *) __builtin_thread_pointer() + __rseq_offset);
    for (int n = 0; n < 100; n++) {
        usleep(100);
        if (area->cpu >= 4096) wrong("cpu %d: it is not registered", (int) area->cpu);
    }
    return 0;
}'''


@c_promise()
def vector_registers_stay_to_the_last_bit():
    r'''
int run(void) {
    static unsigned char before[16][32], after[16][32];
    for (int n = 0; n < 512; n++) ((unsigned char *) before)[n] = n * 37 + 11;
    if (!__builtin_cpu_supports("avx")) { moved(); return 0; }
    // All in one piece, so that the compiler uses none of them meanwhile: a sleep in a loop until the file is there.
    say("ready");
    struct timespec nap = { 0, 10000000 };
    long found;
    do {
        __asm__ volatile(
            "vmovdqu 0(%1), %%ymm0\n vmovdqu 32(%1), %%ymm1\n vmovdqu 64(%1), %%ymm2\n vmovdqu 96(%1), %%ymm3\n"
            "vmovdqu 128(%1), %%ymm4\n vmovdqu 160(%1), %%ymm5\n vmovdqu 192(%1), %%ymm6\n vmovdqu 224(%1), %%ymm7\n"
            "vmovdqu 256(%1), %%ymm8\n vmovdqu 288(%1), %%ymm9\n vmovdqu 320(%1), %%ymm10\n vmovdqu 352(%1), %%ymm11\n"
            "vmovdqu 384(%1), %%ymm12\n vmovdqu 416(%1), %%ymm13\n vmovdqu 448(%1), %%ymm14\n vmovdqu 480(%1), %%ymm15\n"
            "mov $35, %%eax\n mov %3, %%rdi\n xor %%esi, %%esi\n syscall\n"
            "vmovdqu %%ymm0, 0(%2)\n vmovdqu %%ymm1, 32(%2)\n vmovdqu %%ymm2, 64(%2)\n vmovdqu %%ymm3, 96(%2)\n"
            "vmovdqu %%ymm4, 128(%2)\n vmovdqu %%ymm5, 160(%2)\n vmovdqu %%ymm6, 192(%2)\n vmovdqu %%ymm7, 224(%2)\n"
            "vmovdqu %%ymm8, 256(%2)\n vmovdqu %%ymm9, 288(%2)\n vmovdqu %%ymm10, 320(%2)\n vmovdqu %%ymm11, 352(%2)\n"
            "vmovdqu %%ymm12, 384(%2)\n vmovdqu %%ymm13, 416(%2)\n vmovdqu %%ymm14, 448(%2)\n vmovdqu %%ymm15, 480(%2)\n"
            "mov $21, %%eax\n mov %4, %%rdi\n xor %%esi, %%esi\n syscall\n"
            : "=&a"(found) : "r"(before), "r"(after), "r"(&nap), "r"(words[3])
            : "rcx", "r11", "rdi", "rsi", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
              "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
        if (memcmp(before, after, sizeof before)) wrong("other registers");
    } while (found);
    return 0;
}'''


@c_promise()
def the_control_words_of_floating_point_stay():
    r'''
int run(void) {
    unsigned mxcsr = 0x1f80 | 0x6000, got;
    unsigned short control = 0x037f & ~0x300 | 0xc00, now;
    __asm__ volatile("ldmxcsr %0\n fldcw %1" : : "m"(mxcsr), "m"(control));
    moved();
    __asm__ volatile("stmxcsr %0\n fnstcw %1" : "=m"(got), "=m"(now));
    if ((got & ~0x3f) != mxcsr || now != control) wrong("mxcsr %x, control %x", got, now);
    return 0;
}'''


@c_promise()
def segment_bases_stay():
    r'''
#include <asm/prctl.h>
int run(void) {
    static long mine = 77;
    unsigned long base = 0;
    long read;
    need(!syscall(SYS_arch_prctl, ARCH_SET_GS, &mine));
    moved();
    need(!syscall(SYS_arch_prctl, ARCH_GET_GS, &base));
    __asm__ volatile("mov %%gs:0, %0" : "=r"(read));
    if (base != (unsigned long) &mine || read != 77) wrong("gs %lx", base);
    return 0;
}'''
