"""Mappings and what is in them."""
import ctypes
import errno
import mmap
import os
import re
import signal

from promises import *

PAGE = 4096
PRIVATE, SHARED, FIXED, ANONYMOUS, GROWSDOWN, LOCKED, NORESERVE, HUGETLB = 2, 1, 0x10, 0x20, 0x100, 0x2000, 0x4000, 0x40000
READ, WRITE, EXEC = 1, 2, 4


def new(pages, protection=READ | WRITE, flags=PRIVATE | ANONYMOUS, fd=-1, offset=0, at=0):
    return call(9, at, pages * PAGE, protection, flags, fd, offset)


def put(at, data):
    ctypes.memmove(at, data, len(data))


def get(at, length):
    return ctypes.string_at(at, length)


def flags(at):
    """VmFlags of the mapping at an address."""
    found = False
    for line in open('/proc/self/smaps'):
        bounds = re.match('([0-9a-f]+)-([0-9a-f]+) ', line)
        if bounds: found = int(bounds[1], 16) <= at < int(bounds[2], 16)
        elif found and line.startswith('VmFlags:'): return line.split()[1:]


def advise(at, pages, advice):
    call(28, at, pages * PAGE, advice)


def faults(function, *arguments):
    """Does a child that calls this die of a fault?"""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        function(*arguments)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)


@promise
def private_memory_keeps_its_contents():
    at, data = new(300), os.urandom(PAGE) * 300
    put(at, data)
    yield
    check(get(at, 300 * PAGE) == data, 'other contents')
    put(at, b'still writable')


@promise
def pages_that_nobody_has_touched_stay_zeros():
    at = new(1000)
    put(at + 500 * PAGE, b'only here')
    yield
    equal(get(at + 500 * PAGE, 9), b'only here')
    check(not any(get(at, 500 * PAGE)), 'something is there')


@promise
def a_page_of_zeros_over_a_files_page_stays_zeros():
    f = file('f', b'x' * PAGE * 4)
    at = new(4, fd=f.fileno(), flags=PRIVATE)
    put(at + PAGE, bytes(PAGE))
    yield
    equal(get(at, 4 * PAGE), b'x' * PAGE + bytes(PAGE) + b'x' * 2 * PAGE)


@promise
def changed_pages_of_a_private_file_mapping_stay():
    f = file('f', b'a' * PAGE * 8)
    at = new(8, fd=f.fileno(), flags=PRIVATE)
    put(at + 3 * PAGE, b'changed')
    f.close()
    yield
    equal((get(at + 3 * PAGE, 8), get(at + 7 * PAGE, 2)), (b'changeda', b'aa'))
    equal(open(place('f')).read(8 * PAGE), 'a' * 8 * PAGE, 'the file')


@promise
def a_shared_file_mapping_reaches_the_file():
    f = file('f', b'a' * PAGE * 2)
    at = new(2, fd=f.fileno(), flags=SHARED)
    put(at, b'before')
    yield
    put(at + PAGE, b'after')
    got = open(place('f'), 'rb').read()
    equal((got[:7], got[PAGE:PAGE + 6]), (b'beforea', b'aftera'))
    os.pwrite(f.fileno(), b'written', 0)
    equal(get(at, 7), b'written')


@promise
def a_mapping_of_a_deleted_file_stays():
    f = file('f', b'deleted' + bytes(PAGE))
    private, shared = new(1, fd=f.fileno(), flags=PRIVATE), new(1, fd=f.fileno(), flags=SHARED)
    f.close()
    os.unlink(place('f'))
    yield
    equal((get(private, 7), get(shared, 7)), (b'deleted', b'deleted'))
    put(shared, b'DELETED')
    equal(get(private, 7), b'DELETED', 'what the private mapping shows of an unchanged page')


@promise(unlike=['*mapping *ghost*'])
def a_mapping_of_a_replaced_file_stays_that_of_the_old_one():
    f = file('f', b'old' + bytes(PAGE))
    at = new(1, READ, fd=f.fileno(), flags=PRIVATE)
    f.close()
    with open(place('g'), 'wb') as g: g.write(b'new' + bytes(PAGE))
    os.rename(place('g'), place('f'))
    yield
    equal(get(at, 3), b'old')


@promise
def a_mapping_beyond_the_end_of_its_file_faults():
    f = file('f', b'x' * PAGE)
    at = new(3, fd=f.fileno(), flags=SHARED)
    yield
    equal(get(at, 1), b'x')
    check(faults(get, at + 2 * PAGE, 1), 'it can be read')
    os.truncate(f.fileno(), 3 * PAGE)
    equal(get(at + 2 * PAGE, 1), b'\0')


@promise
def a_file_mapped_at_an_offset_stays_there():
    f = file('f', b''.join(bytes([n]) * PAGE for n in range(20)))
    at = new(3, READ, fd=f.fileno(), flags=PRIVATE, offset=7 * PAGE)
    yield
    equal(get(at + PAGE, 1), b'\x08')


@promise
def a_running_program_that_was_deleted_goes_on():
    import shutil
    copy = place('copy')
    shutil.copy('/bin/sleep', copy)
    pid = os.posix_spawn(copy, [copy, '1000'], {})
    eventually(lambda: open(f'/proc/{pid}/syscall').read().startswith('230 '), 'it sleeps')
    os.unlink(copy)
    yield
    check(os.readlink(f'/proc/{pid}/exe').endswith('(deleted)'), os.readlink(f'/proc/{pid}/exe'))
    os.kill(pid, signal.SIGTERM)
    equal(os.waitpid(pid, 0)[1], signal.SIGTERM)


@promise
def memory_shared_with_a_child_stays_shared():
    at = new(10, flags=SHARED | ANONYMOUS)
    put(at, b'both')

    def child():
        yield
        equal(get(at, 4), b'both')
        put(at + 9 * PAGE, b'from the child')
    other = Child(child)
    yield
    other.join()
    equal(get(at + 9 * PAGE, 14), b'from the child')


@promise
def shared_memory_mapped_twice_stays_one():
    fd = os.memfd_create('twice')
    os.truncate(fd, 4 * PAGE)
    one, two = new(4, fd=fd, flags=SHARED), new(2, fd=fd, flags=SHARED, offset=2 * PAGE)
    os.close(fd)
    yield
    put(one + 2 * PAGE, b'seen twice')
    equal(get(two, 10), b'seen twice')


@promise
def copy_on_write_memory_of_a_child_is_its_own():
    at = new(50)
    put(at, b'x' * PAGE * 50)

    def child():
        put(at, b'child')
        yield
        equal(get(at, 6), b'childx')
        put(at + PAGE, b'child')
    other = Child(child)
    put(at, b'mother')
    yield
    other.join()
    equal((get(at, 6), get(at + PAGE, 5)), (b'mother', b'xxxxx'))


@promise(not_in={'migrated': 'memory that is copied on write is not shared after a migration (README)', 'lazy': 'memory that follows is not shared'})
def memory_that_relatives_share_copy_on_write_is_still_shared():
    at, size = new(2000), 2000
    put(at, os.urandom(PAGE) * size)

    def proportional(pid):
        return int(re.search('Pss_Anon: +([0-9]+)', open(f'/proc/{pid}/smaps_rollup').read())[1])

    def child():
        yield
        eventually(lambda: os.path.exists(place('seen')), 'the parent')
    others = [Child(child) for _ in range(4)]
    pids = [os.getpid()] + [other.pid for other in others]
    before = sum(map(proportional, pids))
    yield
    after = sum(map(proportional, pids))
    open(place('seen'), 'w').close()
    for other in others: other.join()
    check(after < before * 1.1 + 2000, f'{after} kB are taken, {before} before')


@promise
def protections_stay():
    at = {p: new(1, p) for p in (0, READ, READ | WRITE, READ | EXEC, READ | WRITE | EXEC)}
    yield
    check(faults(get, at[0], 1) and faults(put, at[READ], b'x') and faults(put, at[READ | EXEC], b'x'), 'a protection is gone')
    put(at[READ | WRITE | EXEC], b'x')


@promise
def a_read_only_page_keeps_what_was_written_before():
    at = new(3)
    put(at + PAGE, b'written')
    call(10, at + PAGE, PAGE, 0)
    yield
    check(faults(get, at + PAGE, 1), 'it can be read')
    call(10, at + PAGE, PAGE, READ)
    equal(get(at + PAGE, 7), b'written')


@promise
def a_hundred_gigabytes_that_nobody_uses_stay_reserved():
    at = new(100 << 18, 0, PRIVATE | ANONYMOUS | NORESERVE)
    call(10, at + (50 << 30), PAGE, READ | WRITE)
    put(at + (50 << 30), b'in the middle')
    yield
    equal(get(at + (50 << 30), 13), b'in the middle')
    check(faults(get, at, 1), 'it can be read')
    call(11, at, 100 << 30)


@promise
def a_stack_that_grows_down_still_grows():
    top = new(600, 0)
    call(11, top, 600 * PAGE)
    at = new(2, flags=PRIVATE | ANONYMOUS | GROWSDOWN | FIXED, at=top + 590 * PAGE)
    put(at, b'low')
    yield
    check('gd' in flags(at), 'the mapping does not grow any more')
    put(at - PAGE, b'lower')
    equal((get(at - PAGE, 5), get(at, 3)), (b'lower', b'low'))


@c_promise()
def the_stack_of_the_program_still_grows():
    r'''
static int deep(int n) { volatile char room[4096]; room[0] = n; return n ? deep(n - 1) + room[0] * 0 : 0; }
int run(void) { moved(); return deep(1000); }'''


@promise
def the_heap_can_grow():
    libc.sbrk.restype = ctypes.c_void_p
    before = libc.sbrk(0)
    yield
    equal(libc.sbrk(0), before)
    check(libc.sbrk(1 << 20) == before, 'sbrk failed')
    put(before, b'x' * (1 << 20))


@promise
def locked_memory_stays_locked():
    at = new(4)
    call(149, at, 4 * PAGE)  # mlock(2)
    yield
    check('lo' in flags(at), 'it is not locked')
    check(int(status('VmLck').split()[0]) >= 16, status('VmLck'))


@promise
def memory_locked_when_it_is_touched_stays_so():
    at = new(4)
    call(325, at, 4 * PAGE, 1)  # mlock2(2), MLOCK_ONFAULT
    yield
    check('lo' in flags(at), 'it is not locked')


@promise(broken={'all': 'nothing tells that mlockall(MCL_FUTURE) was called'})
def all_future_memory_is_locked():
    call(151, 2)  # mlockall(2), MCL_FUTURE
    yield
    check('lo' in flags(new(1)), 'new memory is not locked')
    call(152)


def advised(name, advice, flag):
    def stays():
        at = new(4)
        try: advise(at, 4, advice)
        except OSError: skip(f'the kernel does not know {name}')
        yield
        check(flag in flags(at), f'{flag} is not among {flags(at)}')
    stays.__name__ = f'advice_{name}_stays'
    promise(stays)


for name, advice, flag in (('not to fork', 10, 'dc'), ('not to dump', 16, 'dd'), ('to wipe on fork', 18, 'wf'), ('for huge pages', 14, 'hg'),
                           ('against huge pages', 15, 'nh'), ('to merge', 12, 'mg'), ('sequential', 2, 'sr'), ('random', 1, 'rr')):
    advised(name.replace(' ', '_'), advice, flag)


@promise
def memory_that_is_wiped_on_fork_is_wiped():
    at = new(1)
    put(at, b'secret')
    advise(at, 1, 18)
    yield
    equal(get(at, 6), b'secret')
    pid = os.fork()
    if pid == 0: os._exit(any(get(at, 6)))
    equal(os.waitpid(pid, 0)[1], 0)


@promise
def memory_that_is_not_forked_is_not_forked():
    at = new(1)
    put(at, b'mine')
    advise(at, 1, 10)
    yield
    equal(get(at, 4), b'mine')
    check(faults(get, at, 1), 'a child has it')


@promise
def names_of_anonymous_memory_stay():
    at = new(1)
    try: prctl(0x53564d41, 0, at, PAGE, ctypes.c_char_p(b'a name'))
    except OSError: skip('the kernel does not name anonymous memory')
    yield
    check('[anon:a name]' in open('/proc/self/maps').read(), 'the name is gone')


def guards(at, page):
    call(28, at + page * PAGE, PAGE, 102)  # MADV_GUARD_INSTALL


@promise
def guard_pages_still_guard():
    at = new(3)
    put(at, b'x' * 3 * PAGE)
    try: guards(at, 1)
    except OSError: skip('the kernel has no guard pages')
    yield
    equal((get(at, 1), get(at + 2 * PAGE, 1)), (b'x', b'x'))
    check(faults(get, at + PAGE, 1), 'it can be read')


@promise
def sealed_mappings_stay_sealed():
    at = new(1)
    put(at, b'sealed')
    try: call(462, at, PAGE, 0)  # mseal(2)
    except OSError: skip('the kernel does not seal mappings')
    yield
    equal(get(at, 6), b'sealed')
    fails(errno.EPERM, lambda: call(11, at, PAGE))


@promise
def a_mapping_that_was_moved_stays_where_it_is():
    at, target = new(2), new(8, 0)
    put(at, b'moved')
    call(25, at, 2 * PAGE, 4 * PAGE, 3, target)  # mremap(2): MAYMOVE, FIXED
    yield
    equal(get(target, 5), b'moved')
    put(target + 3 * PAGE, b'grown')


@promise
def thousands_of_mappings_stay():
    at = [new(1, READ | WRITE if n % 2 else READ) for n in range(3000)]
    for n in range(1, 3000, 2): put(at[n], b'%d' % n)
    yield
    for n in range(1, 3000, 2): equal(get(at[n], 4).rstrip(b'\0'), b'%d' % n)


@promise
def a_memfd_keeps_contents_size_position_and_seals():
    import fcntl
    fd = os.memfd_create('m', os.MFD_ALLOW_SEALING)
    os.write(fd, b'contents')
    os.lseek(fd, 3, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    yield
    equal((os.read(fd, 99), fcntl.fcntl(fd, fcntl.F_GET_SEALS)), (b'tents', fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW))
    fails(errno.EPERM, os.truncate, fd, 3)


@promise
def a_memfd_is_shared_with_a_child():
    fd = os.memfd_create('m')
    os.truncate(fd, PAGE)
    at = new(1, fd=fd, flags=SHARED)

    def child():
        yield
        os.pwrite(fd, b'from the child', 0)
    other = Child(child)
    yield
    other.join()
    equal(get(at, 14), b'from the child')


@promise(refused='huge pages')
def huge_pages_in_a_memfd_are_refused():
    try:
        fd = os.memfd_create('huge', 4)
        os.truncate(fd, 2 << 20)
    except OSError: skip('the kernel has no huge pages')
    yield
    equal(os.fstat(fd).st_size, 2 << 20)


class Segment:
    """A System V segment; it is removed when the promise has been kept, or was before."""
    FIELDS = dict(key=(0, 4), uid=(4, 4), gid=(8, 4), creator=(12, 4), mode=(20, 4), size=(48, 8), attached=(88, 8))

    def __init__(self, size, key=0, mode=0o600):
        self.id = call(29, key, size, 0o1000 | mode)
        self.at = self.attach()

    def attach(self, how=0):
        return call(30, self.id, 0, how)

    def status(self, *names):
        buffer = ctypes.create_string_buffer(112)
        call(31, self.id, 2, buffer)
        return [int.from_bytes(buffer[at:at + size], 'little') for at, size in (self.FIELDS[name] for name in names)]

    def remove(self):
        call(31, self.id, 0, 0)


@promise
def a_system_v_segment_that_was_removed_stays_attached():
    segment = Segment(3 * PAGE)
    segment.remove()
    put(segment.at, b'system five')
    yield
    equal(get(segment.at, 11), b'system five')
    equal(segment.status('mode', 'size', 'attached'), [0o1600, 3 * PAGE, 1])
    call(67, segment.at)  # shmdt(2)
    fails(errno.EINVAL, segment.status)


@promise
def a_system_v_segment_keeps_id_key_owner_mode_and_size():
    key = 0x57480000 | os.getpid()
    segment = Segment(PAGE + 100, key)
    wanted = ctypes.create_string_buffer(112)
    wanted[4:8], wanted[8:12], wanted[20:22] = (7).to_bytes(4, 'little'), (8).to_bytes(4, 'little'), (0o640).to_bytes(2, 'little')
    call(31, segment.id, 1, wanted)  # IPC_SET
    call(31, segment.id, 11, 0)  # SHM_LOCK
    names = ['key', 'uid', 'gid', 'creator', 'mode', 'size', 'attached']
    before = segment.status(*names)
    equal(before, [key, 7, 8, 0, 0o2640, PAGE + 100, 1])
    put(segment.at + PAGE, b'x' * 100)
    yield
    try:
        equal(segment.status(*names), before)
        equal(call(29, key, 0, 0), segment.id, 'the segment with that key')
        equal(get(segment.at + PAGE, 101), b'x' * 100 + bytes(1))
    finally: segment.remove()


@promise
def a_system_v_segment_that_somebody_else_made_stays_his():
    def child():
        os.setresgid(200, 200, 200)
        os.setresuid(100, 100, 100)
        os._exit(call(29, 0x57490000, PAGE, 0o1666) < 0)
    pid = os.fork()
    if pid == 0: child()
    equal(os.waitpid(pid, 0)[1], 0)
    segment = Segment(0, 0x57490000)
    yield
    try: equal(segment.status('uid', 'gid', 'creator'), [100, 200, 100])
    finally: segment.remove()


@promise
def a_system_v_segment_attached_twice_and_by_a_child_is_one():
    segment = Segment(1 << 20)
    segment.remove()
    put(segment.at, b'both')
    again = segment.attach(0o10000)  # SHM_RDONLY

    def child():
        yield
        equal(get(segment.at, 4), b'both')
        put(segment.at + 9 * PAGE, b'from the child')
    other = Child(child)
    yield
    check(faults(put, again, b'x'), 'what was attached for reading can be written')
    fails(errno.EACCES, call, 10, again, PAGE, READ | WRITE)
    other.join()
    equal((get(segment.at + 9 * PAGE, 14), get(again + 9 * PAGE, 14)), (b'from the child', b'from the child'))
    equal(segment.status('attached'), [2])


@promise
def pieces_of_an_attached_system_v_segment_are_detached_together():
    segment = Segment(8 * PAGE)
    segment.remove()
    for page in range(8): put(segment.at + page * PAGE, b'%d' % page)
    call(11, segment.at + 2 * PAGE, PAGE)
    other = new(1, at=segment.at + 2 * PAGE, flags=PRIVATE | ANONYMOUS | FIXED)
    put(other, b'mine')
    call(10, segment.at + 5 * PAGE, PAGE, READ)
    second = segment.attach()
    yield
    equal([get(segment.at + page * PAGE, 1) for page in (0, 1, 3, 4, 5, 6, 7)], [b'%d' % page for page in (0, 1, 3, 4, 5, 6, 7)])
    check(faults(put, segment.at + 5 * PAGE, b'x'), 'what was protected can be written')
    put(segment.at + 7 * PAGE, b'seen')
    equal((get(second + 7 * PAGE, 4), get(other, 4)), (b'seen', b'mine'))
    call(67, segment.at)
    equal((segment.status('attached'), get(other, 4)), ([1], b'mine'))


@promise(refused='processes outside of the tree have it attached')
def a_system_v_segment_that_others_have_attached_is_refused():
    segment = Segment(PAGE)
    segment.remove()
    other = Outside(attach=segment.attach)
    other('attach')
    yield
    equal(segment.status('attached'), [3])


@promise(refused='io_uring')
def an_io_uring_is_refused():
    parameters = ctypes.create_string_buffer(120)
    try: fd = call(425, 4, parameters)
    except OSError: skip('the kernel has no io_uring')
    yield
    equal(os.readlink(f'/proc/self/fd/{fd}'), 'anon_inode:[io_uring]')


@promise(refused='this kind of kernel object cannot be mapped again')
def rings_of_asynchronous_io_are_refused():
    context = ctypes.c_ulong()
    try: call(206, 8, ctypes.byref(context))  # io_setup(2)
    except OSError: skip('the kernel has no asynchronous I/O')
    yield
    call(207, context.value)


@promise(refused='userfaultfd')
def a_user_of_userfaultfd_is_refused():
    fd = call(323, 0o4000)
    api = (ctypes.c_ulong * 3)(0xaa)
    call(16, fd, 0xc018aa3f, api)  # UFFDIO_API
    at = new(1)
    call(16, fd, 0xc020aa00, (ctypes.c_ulong * 4)(at, PAGE, 1))  # UFFDIO_REGISTER
    yield
    check('um' in flags(at), 'it is not watched')


@promise
def the_auxiliary_vector_stays():
    before = open('/proc/self/auxv', 'rb').read()
    yield
    equal(open('/proc/self/auxv', 'rb').read(), before)


@promise
def the_vdso_still_tells_the_time():
    libc.time.restype = ctypes.c_long
    yield
    import time
    check(abs(libc.time(None) - time.clock_gettime(time.CLOCK_REALTIME)) < 2, 'another time')
    check(any(line.endswith('[vdso]\n') for line in open('/proc/self/maps')), 'there is none')


@promise(broken={'all': 'the mapping that its place was cut out of cannot be mapped around it'})
def a_vdso_that_was_moved_stays_where_it_is():
    program = C(r'''
#include <sys/auxv.h>
int run(void) {
    char *vdso = (char *) getauxval(AT_SYSINFO_EHDR), *target = mmap(0, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[300];
    unsigned long from, to, size = 0;
    while (fgets(line, 300, maps)) if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx", &from, &to) == 2) size = to - from;
    fclose(maps);
    need(size && mremap(vdso, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
    moved();
    if (memcmp(target, "\177ELF", 4)) wrong("it is not there");
    return 0;
}''')
    yield
    program.join()


@promise
def a_mapping_of_dev_zero_stays():
    fd = os.open('/dev/zero', os.O_RDWR)
    at = new(1, fd=fd, flags=PRIVATE)
    put(at, b'zero no more')
    yield
    equal(get(at, 12), b'zero no more')


@promise(refused='protection keys')
def protection_keys_are_refused():
    try: key = call(330, 0, 0)  # pkey_alloc(2)
    except OSError: skip('the processor has no protection keys')
    at = new(1)
    call(329, at, PAGE, READ | WRITE, key)
    yield
    check(any(line.split() == ['ProtectionKey:', str(key)] for line in open('/proc/self/smaps')), 'the key is gone')
