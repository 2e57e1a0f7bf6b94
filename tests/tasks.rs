//! State of tasks and threads: each kind in a program that asks the kernel, after each dump and restore, whether it is
//! still so.

mod common;

use common::program::{Program, dump_and_restore};
use whimbrel::dump::{self, Afterwards};
use whimbrel::restore;

/// Rounds before, between and after two dumps and restores: what a restore does not set could be right by chance once.
fn survives(program: &Program) {
    for _ in 0..2 {
        program.goes_on();
        dump_and_restore(program.pid(), &dump::Options::default(), &restore::Options::default());
    }
    program.goes_on();
}

#[test]
fn threads_keep_their_processors_timer_slack_numa_policy_and_the_core_dump_filter() {
    survives(&Program::python(
        r#"
import ctypes, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def slack(): return libc.prctl(30)
def policy():
    mode, nodes = ctypes.c_int(), (ctypes.c_ulong * 16)()
    result = libc.syscall(239, ctypes.byref(mode), nodes, ctypes.c_ulong(1025), 0, 0)
    return (result, mode.value, nodes[0])
def filter(): return open('/proc/self/coredump_filter').read()
open('/proc/self/coredump_filter', 'w').write('0x7f')
last = max(os.sched_getaffinity(0))
good = [True] * 3
def work(number):
    if number == 1: os.sched_setaffinity(threading.get_native_id(), {last})
    libc.prctl(29, 1000 * (number + 1))
    if number == 2: libc.syscall(238, 2, ctypes.byref(ctypes.c_ulong(1)), ctypes.c_ulong(1025))
    wanted = (os.sched_getaffinity(threading.get_native_id()), 1000 * (number + 1), policy())
    gate.wait()
    while True:
        got = (os.sched_getaffinity(threading.get_native_id()), slack(), policy())
        if got != wanted: report('wrong', number, got, wanted)
        rounds[number] += 1
        time.sleep(0.01)
gate = threading.Barrier(4)
rounds = [0] * 3
for number in range(3): threading.Thread(target=work, args=(number,), daemon=True).start()
gate.wait()
report('ready')
while True:
    before = list(rounds)
    time.sleep(0.1)
    if filter() != '0000007f\n': report('wrong', filter())
    if all(now > then for now, then in zip(rounds, before)): report('ok')
"#,
    ));
}

#[test]
fn a_process_goes_on_without_its_first_thread_and_ends_with_the_last() {
    let program = Program::c("headless.c");
    survives(&program);
    whimbrel::kernel::sys::kill(program.pid(), libc::SIGTERM).unwrap();
    let pid = rustix::process::Pid::from_raw(program.pid());
    let ended = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
    assert_eq!(ended.unwrap().unwrap().1.exit_status(), Some(3));
}

#[test]
fn seccomp_filters_and_strict_mode_hold_in_each_thread_and_can_still_be_synchronised() {
    let program = Program::c("filtered.c");
    survives(&program);
    whimbrel::kernel::sys::kill(program.pid(), libc::SIGTERM).unwrap();
    program.wait_for("strict to the end", 1);
}

#[test]
fn descriptors_and_directories_that_tasks_share_are_shared_again() {
    survives(&Program::c("sharing.c"));
}

#[test]
fn memory_that_tasks_share_is_refused_by_name_and_the_tree_goes_on() {
    let program = Program::python(
        r#"
import ctypes, time, signal
libc = ctypes.CDLL(None)
area = ctypes.create_string_buffer(1 << 16)
top = (ctypes.addressof(area) + len(area)) & ~15
libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p), ctypes.c_void_p(top), 0x100 | signal.SIGCHLD, None)
report('ready')
while True: report('ok'); time.sleep(0.01)
"#,
    );
    program.goes_on();
    let error = common::program::try_dump(program.pid(), Afterwards::Kill)
        .unwrap_err()
        .chain();
    assert!(
        error.contains("memory") && error.contains("shared with its parent"),
        "{error}"
    );
    program.goes_on();
}

/// Memory of a process and everything below it, each page in proportion to how many have it, in kB.
fn proportional_memory(pid: i32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let own = rollup.lines().find_map(|line| {
        let value = line.strip_prefix("Pss:")?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    let children = whimbrel::tree::children_of(pid).unwrap_or_default();
    own.unwrap_or_default() + children.into_iter().map(proportional_memory).sum::<u64>()
}

#[test]
fn memory_that_relatives_share_until_one_writes_is_shared_again() {
    let program = Program::c("prefork.c");
    program.goes_on();
    let before = proportional_memory(program.pid());
    assert!(before > 60_000 && before < 120_000, "{before} kB");
    // To be read takes nothing from them.
    common::program::try_dump(program.pid(), Afterwards::Resume).unwrap();
    let after = proportional_memory(program.pid());
    assert!(after * 10 <= before * 11, "{before} kB became {after} kB");
    for _ in 0..2 {
        dump_and_restore(program.pid(), &dump::Options::default(), &restore::Options::default());
        program.goes_on();
        let after = proportional_memory(program.pid());
        assert!(after * 10 <= before * 11, "{before} kB became {after} kB");
    }
}

#[test]
fn threads_keep_their_small_settings_and_processes_theirs() {
    survives(&Program::python(
        r#"
import ctypes, resource, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def prctl(*words):
    result = libc.prctl(*[ctypes.c_ulong(word) for word in words + (0,) * (5 - len(words))])
    return result if result >= 0 else -ctypes.get_errno()
def settings():
    task = threading.get_native_id()
    status = dict(line.split(':\t', 1) for line in open('/proc/self/task/%d/status' % task).read().splitlines())
    speculation = tuple(prctl(52, feature) for feature in range(3))
    credentials = tuple(status[name] for name in ('Uid', 'Gid', 'Groups', 'CapEff', 'CapPrm', 'CapInh', 'CapBnd', 'CapAmb', 'NoNewPrivs'))
    return libc.syscall(252, 1, 0), prctl(34), speculation, prctl(27), credentials
def process():
    return prctl(42), prctl(68), libc.syscall(324, 8, 0, 0), libc.syscall(324, 512, 0, 0)
def become(number):
    if number == 1:
        libc.syscall(251, 1, 0, 2 << 13 | 7)  # ioprio_set: best effort, 7
        prctl(33, 1, 1)  # PR_MCE_KILL_SET, early
        prctl(53, 0, 4)  # PR_SET_SPECULATION_CTRL: no store bypass
        prctl(53, 1, 8)  # no indirect branches, for good
    if number == 2:
        prctl(28, 0x15)  # PR_SET_SECUREBITS: NOROOT, NO_SETUID_FIXUP, KEEP_CAPS
        libc.syscall(116, 2, (ctypes.c_int * 2)(7, 8))  # setgroups, of this thread alone
        libc.syscall(119, 11, 12, 13)  # setresgid
        libc.syscall(117, 21, 22, 23)  # setresuid
    if number == 3:
        prctl(24, 21)  # PR_CAPBSET_DROP: CAP_SYS_ADMIN
        prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
        libc.syscall(251, 1, 0, 3 << 13)  # idle
def work(number):
    become(number)
    wanted = settings()
    seen.add(wanted)
    gate.wait()
    while True:
        got = settings()
        if got != wanted: report('wrong', number, got, wanted)
        rounds[number] += 1
        time.sleep(0.01)
prctl(41, 1)  # PR_SET_THP_DISABLE
prctl(67, 1)  # PR_SET_MEMORY_MERGE
libc.syscall(324, 16, 0, 0)  # membarrier: register, private expedited
libc.syscall(324, 4, 0, 0)  # and global expedited
wanted = process()
seen, rounds, gate = set(), [0] * 4, threading.Barrier(5)
for number in range(4): threading.Thread(target=work, args=(number,), daemon=True).start()
gate.wait()
if len(seen) != 4 or wanted[0] != 1 or wanted[2] != 0: report('wrong', 'the settings were not made', wanted, seen)
report('ready')
while True:
    before = list(rounds)
    if process() != wanted: report('wrong', process(), wanted)
    while any(now == then for now, then in zip(rounds, before)): time.sleep(0.01)
    report('ok')
"#,
    ));
}

#[test]
fn a_task_that_nothing_can_stop_is_named_instead_of_waited_for_while_others_stand_still() {
    let program = Program::c("vforked.c");
    program.wait_for("forks", 1);
    let pid = program.pid();
    common::wait_for("the program sleeps in vfork(2)", || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.contains(") D ").then_some(())
    });
    // Of a thread of its own: what it has attached to is let go when it ends.
    let dump = std::thread::spawn(move || common::program::try_dump(pid, Afterwards::Kill).unwrap_err().chain());
    let error = dump.join().unwrap();
    assert!(error.contains("vfork(2)"), "{error}");
    std::fs::write(program.directory().join("go"), "").unwrap();
    program.goes_on();
    dump_and_restore(pid, &dump::Options::default(), &restore::Options::default());
    program.goes_on();
}
