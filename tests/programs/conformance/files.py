"""Open files that have, or had, a name."""
import errno
import fcntl
import mmap
import os
import stat

from promises import *

O_TMPFILE = os.O_TMPFILE


@promise
def a_file_keeps_its_position():
    f = file('f', bytes(range(200)))
    f.seek(77)
    yield
    equal(f.tell(), 77)
    equal(f.read(2), bytes([77, 78]))


@promise
def descriptors_made_with_dup_share_their_position():
    f = file('f', b'0123456789')
    other = os.dup(f.fileno())
    yield
    os.lseek(other, 4, 0)
    equal(f.read(1), b'4')
    equal(os.read(other, 1), b'5')


@promise
def files_opened_twice_do_not_share_their_position():
    f = file('f', b'0123456789')
    other = os.open(place('f'), os.O_RDONLY)
    os.lseek(other, 4, 0)
    yield
    equal((f.read(1), os.read(other, 1)), (b'0', b'4'))


@promise
def parent_and_child_share_a_position():
    f = file('f', b'0123456789')

    def child():
        yield
        equal(os.read(f.fileno(), 3), b'012')
    other = Child(child)
    yield
    other.join()
    equal(f.read(1), b'3')


@promise
def open_flags_stay():
    flags = [os.O_APPEND, os.O_NONBLOCK, os.O_DSYNC, os.O_SYNC, os.O_NOATIME, os.O_NOFOLLOW, os.O_LARGEFILE]
    file('f', b'x')
    fds = [os.open(place('f'), os.O_RDWR | flag) for flag in flags]
    before = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds]
    yield
    equal([fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds], before, 'the flags')
    os.write(fds[0], b'y')
    equal(open(place('f')).read(), 'xy')


@promise
def access_modes_stay():
    file('f', b'x')
    reading, writing = os.open(place('f'), os.O_RDONLY), os.open(place('f'), os.O_WRONLY)
    yield
    fails(errno.EBADF, os.write, reading, b'y')
    fails(errno.EBADF, os.read, writing, 1)
    os.write(writing, b'z')
    equal(os.read(reading, 1), b'z')


@promise
def close_on_exec_stays_with_its_descriptor():
    fd = os.open(place(), os.O_RDONLY)
    other = fcntl.fcntl(fd, fcntl.F_DUPFD, 50)
    yield
    equal((fd, fcntl.fcntl(fd, fcntl.F_GETFD), other, fcntl.fcntl(other, fcntl.F_GETFD)), (fd, 1, 50, 0))


@promise
def a_descriptor_with_a_great_number_keeps_it():
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    f = file('f', b'x')
    os.dup2(f.fileno(), 4000)
    yield
    equal(os.pread(4000, 1, 0), b'x')


@promise
def hundreds_of_descriptors_come_in_their_places():
    fds = {}
    for n in range(400):
        f = os.open(place(f'{n}'), os.O_RDWR | os.O_CREAT)
        os.write(f, b'%d' % n)
        fds[f] = n
    yield
    for fd, n in fds.items(): equal(os.pread(fd, 9, 0), b'%d' % n)


@promise
def a_deleted_file_keeps_its_contents_and_can_grow():
    f = file('f', b'nobody sees this')
    os.unlink(place('f'))
    yield
    equal(os.pread(f.fileno(), 99, 0), b'nobody sees this')
    os.pwrite(f.fileno(), b'more', 100)
    equal(os.fstat(f.fileno()).st_size, 104)
    equal(os.fstat(f.fileno()).st_nlink, 0, 'the number of links')
    check(not os.path.exists(place('f')), 'it has a name again')


@promise
def a_deleted_file_is_shared_by_those_who_had_it_open():
    f = file('f', b'one')
    other = os.open(place('f'), os.O_RDWR)
    os.unlink(place('f'))
    yield
    os.pwrite(other, b'two', 0)
    equal(os.pread(f.fileno(), 9, 0), b'two')
    equal(os.fstat(f.fileno()).st_ino, os.fstat(other).st_ino, 'the inode')


@promise
def a_deleted_file_keeps_mode_owner_and_times():
    f = file('f', b'x')
    os.chown(place('f'), 1234, 4321)
    os.chmod(place('f'), 0o6751)
    os.utime(place('f'), ns=(10 ** 18, 10 ** 18 + 5))
    os.unlink(place('f'))
    yield
    s = os.fstat(f.fileno())
    equal((s.st_uid, s.st_gid, stat.S_IMODE(s.st_mode), s.st_mtime_ns), (1234, 4321, 0o6751, 10 ** 18 + 5))


@promise(dump=['--ghost-limit', '8M'], not_in={'migrated': 'migrate has no --ghost-limit'})
def a_large_deleted_file_is_carried_when_the_limit_allows():
    f = file('f')
    data = os.urandom(1 << 20) * 4
    f.write(data)
    os.unlink(place('f'))
    yield
    check(os.pread(f.fileno(), 1 << 23, 0) == data, 'other contents')


@promise(refused='--ghost-limit')
def a_large_deleted_file_is_refused_by_default():
    f = file('f')
    f.write(os.urandom(2 << 20))
    os.unlink(place('f'))
    yield
    equal(os.fstat(f.fileno()).st_size, 2 << 20)


@promise(dump=['--ghost-limit', '2M'], not_in={'migrated': 'migrate has no --ghost-limit'})
def holes_of_a_deleted_file_stay_holes():
    f = file('f')
    os.pwrite(f.fileno(), b'begin', 0)
    os.pwrite(f.fileno(), b'end', 64 << 20)
    os.unlink(place('f'))
    blocks = os.fstat(f.fileno()).st_blocks
    yield
    s = os.fstat(f.fileno())
    equal(s.st_size, (64 << 20) + 3)
    check(s.st_blocks <= blocks + 64, f'{s.st_blocks} blocks are taken, {blocks} before')
    equal((os.pread(f.fileno(), 5, 0), os.pread(f.fileno(), 3, 64 << 20)), (b'begin', b'end'))


@promise(broken={'all': 'O_TMPFILE is not among its flags any more'})
def a_file_made_without_a_name_keeps_its_contents():
    fd = os.open(place(), O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b'nameless')
    yield
    equal(os.pread(fd, 99, 0), b'nameless')
    equal(stat.S_IMODE(os.fstat(fd).st_mode), 0o640)


@promise(refused='--link-remap')
def a_deleted_file_with_another_name_stays_that_file():
    f = file('f', b'kept')
    os.link(place('f'), place('g'))
    os.unlink(place('f'))
    yield
    os.pwrite(f.fileno(), b'new!', 0)
    equal(open(place('g')).read(), 'new!', 'the file by its other name')
    equal(os.fstat(f.fileno()).st_ino, os.stat(place('g')).st_ino, 'the inode')


@promise(unlike=['fd 3: * (deleted)*ghost*'])
def a_replaced_file_stays_the_old_one():
    f = file('f', b'old')
    with open(place('new'), 'w') as new: new.write('new')
    os.rename(place('new'), place('f'))
    yield
    equal(os.pread(f.fileno(), 9, 0), b'old')
    equal(open(place('f')).read(), 'new')


@promise
def a_renamed_file_is_found_by_its_new_name():
    f = file('f', b'here')
    os.rename(place('f'), place('g'))
    yield
    os.pwrite(f.fileno(), b'HERE', 0)
    equal(open(place('g')).read(), 'HERE')


@promise
def an_open_directory_can_be_read():
    os.mkdir(place('d'))
    for name in 'abc': open(place('d/' + name), 'w').close()
    fd = os.open(place('d'), os.O_RDONLY | os.O_DIRECTORY)
    yield
    equal(sorted(os.listdir(fd)), ['a', 'b', 'c'])
    os.close(os.open('x', os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    check(os.path.exists(place('d/x')), 'a file made in it is not there')


@promise(refused='carry a deleted directory')
def a_deleted_directory_stays_open():
    os.mkdir(place('d'))
    fd = os.open(place('d'), os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir(place('d'))
    yield
    equal(os.listdir(fd), [])
    fails(errno.ENOENT, lambda: os.open('x', os.O_CREAT | os.O_WRONLY, dir_fd=fd))


@promise
def a_path_descriptor_stays_one():
    file('f', b'x')
    fd = os.open(place('f'), os.O_PATH)
    directory = os.open(place(), os.O_PATH | os.O_DIRECTORY)
    yield
    fails(errno.EBADF, os.read, fd, 1)
    equal(open(f'/proc/self/fd/{fd}').read(), 'x')
    equal(os.stat('f', dir_fd=directory).st_size, 1)


@promise
def a_path_descriptor_of_a_symlink_stays_the_link():
    os.symlink('nowhere', place('l'))
    fd = os.open(place('l'), os.O_PATH | os.O_NOFOLLOW)
    yield
    equal(os.readlink('', dir_fd=fd), 'nowhere')


@promise(variants=['thread', 'child'])
def the_working_directory_stays():
    os.mkdir(place('d'))
    os.chdir(place('d'))
    yield
    equal(os.getcwd(), place('d'))
    open('made', 'w').close()
    check(os.path.exists(place('d/made')), 'a file made in it is not there')


@promise(refused='another file, or none, has that name now')
def a_deleted_working_directory_stays():
    os.mkdir(place('d'))
    os.chdir(place('d'))
    os.rmdir(place('d'))
    yield
    fails(errno.ENOENT, os.getcwd)
    equal(os.readlink('/proc/self/cwd'), place('d') + ' (deleted)')
    os.chdir('..')
    equal(os.getcwd(), place().rstrip('/'))


@promise(refused='another file, or none, has that name now')
def the_root_directory_of_a_child_stays():
    os.mkdir(place('d'))
    open(place('d/inside'), 'w').close()
    go = os.open(place(), os.O_RDONLY)

    def child():
        os.chroot(place('d'))
        os.chdir('/')
        yield
        equal(os.listdir('/'), ['inside'], 'the root')
        os.fchdir(go)
        os.chroot('.')
    import promises
    usual = promises.told

    def told():
        import time
        while 'go' not in os.listdir(go): time.sleep(0.01)
    promises.told = told
    other = Child(child)
    promises.told = usual
    yield
    os.waitpid(other.pid, 0)


@promise(variants=['child'])
def the_umask_stays():
    os.umask(0o137)
    yield
    equal(os.umask(0), 0o137)


@promise
def devices_without_state_stay_open():
    fds = [os.open('/dev/' + name, os.O_RDWR) for name in ('null', 'zero', 'full', 'random', 'urandom')]
    yield
    equal((os.read(fds[0], 1), os.read(fds[1], 2)), (b'', b'\0\0'))
    fails(errno.ENOSPC, os.write, fds[2], b'x')
    equal([len(os.read(fd, 16)) for fd in fds[3:]], [16, 16])


@promise
def a_file_of_proc_about_oneself_stays():
    status_file = os.open('/proc/self/status', os.O_RDONLY)
    directory = os.open('/proc/self/fd', os.O_RDONLY | os.O_DIRECTORY)
    yield
    check(b'Pid:\t%d' % os.getpid() in os.read(status_file, 4096), 'it is about somebody else')
    check(str(status_file) in os.listdir(directory), 'it is about somebody else')


@promise
def a_file_of_proc_about_a_child_stays():
    def child(): yield
    other = Child(child)
    fd = os.open(f'/proc/{other.pid}/stat', os.O_RDONLY)
    yield
    check(os.read(fd, 100).startswith(b'%d ' % other.pid), 'it is about somebody else')
    other.join()


@promise(refused='another file, or none, has that name now')
def a_file_of_proc_about_a_dead_task_fails_as_before():
    pid = os.fork()
    if pid == 0:
        import time
        time.sleep(100)
    fd = os.open(f'/proc/{pid}/stat', os.O_RDONLY)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    yield
    fails(errno.ESRCH, os.read, fd, 1)


@promise
def a_file_of_sys_stays_open():
    fd = os.open('/sys/kernel/mm/transparent_hugepage/enabled', os.O_RDONLY)
    yield
    check(b'madvise' in os.pread(fd, 100, 0), 'other contents')


@promise
def a_file_of_proc_sys_stays_open():
    fd = os.open('/proc/sys/kernel/ostype', os.O_RDONLY)
    yield
    equal(os.read(fd, 100), b'Linux\n')


@promise(refused='files of this kind are not supported yet')
def namespace_files_stay_those_of_the_program():
    names = ['net', 'pid', 'mnt', 'uts', 'ipc', 'user', 'cgroup', 'time']
    fds = [os.open('/proc/self/ns/' + name, os.O_RDONLY) for name in names]
    yield
    for name, fd in zip(names, fds):
        equal(os.fstat(fd).st_ino, os.stat('/proc/self/ns/' + name).st_ino, name)
    call(308, fds[3], 0)  # setns(2): into its own, which is always allowed


@promise
def a_file_with_an_owner_signals_it():
    import signal
    hits = []
    signal.signal(signal.SIGRTMIN, lambda *_: hits.append(1))
    reader, writer = os.pipe()
    fcntl.fcntl(reader, 10, signal.SIGRTMIN)  # F_SETSIG
    owner = (2).to_bytes(4, 'little') + os.getpgrp().to_bytes(4, 'little')  # F_OWNER_PGRP
    fcntl.fcntl(reader, 15, owner)  # F_SETOWN_EX
    fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
    yield
    equal((fcntl.fcntl(reader, 11), fcntl.fcntl(reader, 16, bytes(8))), (signal.SIGRTMIN, owner))
    os.write(writer, b'x')
    eventually(lambda: hits, 'the signal')


@promise
def a_file_that_grows_meanwhile_is_taken_as_it_is():
    f = file('f', b'log\n')
    other = Outside(append=lambda path: open(path, 'ab').write(b'from outside\n'))
    yield
    other('append', place('f'))
    equal(f.read(100), b'log\nfrom outside\n')


@promise
def a_copy_on_write_file_range_and_fallocate_work_after_the_move():
    f = file('f', b'x' * 8192)
    yield
    os.posix_fallocate(f.fileno(), 0, 16384)
    equal(os.fstat(f.fileno()).st_size, 16384)
    os.truncate(f.fileno(), 10)
    equal(f.read(100), b'x' * 10)


@promise
def a_directory_stream_goes_on_where_it_was():
    os.mkdir(place('d'))
    for n in range(500): open(place(f'd/{n}'), 'w').close()
    fd = os.open(place('d'), os.O_RDONLY)
    buffer = ctypes.create_string_buffer(2048)
    names = set()

    def some():
        length = call(217, fd, buffer, 2048)  # getdents64(2)
        at = 0
        while at < length:
            size = int.from_bytes(buffer.raw[at + 16:at + 18], 'little')
            names.add(buffer.raw[at + 19:at + size].split(b'\0')[0])
            at += size
        return length
    for _ in range(3): some()
    yield
    while some(): pass
    equal(len(names - {b'.', b'..'}), 500, 'the number of names')


@promise(refused='files of this kind are not supported yet')
def the_kernel_log_is_refused():
    fd = os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)
    yield
    check(os.read(fd, 8192), 'the log is empty')


@promise(refused='tun')
def a_tun_device_is_refused():
    if not os.path.exists('/dev/net/tun'): skip('there is no /dev/net/tun')
    fd = os.open('/dev/net/tun', os.O_RDWR)
    fcntl.ioctl(fd, 0x400454ca, b'promise0'.ljust(16, b'\0') + (0x1001).to_bytes(2, 'little') + bytes(22))
    yield
    equal(fcntl.ioctl(fd, 0x800454d2, bytes(40))[:8], b'promise0')


@promise(refused='bpf-map')
def a_bpf_map_is_refused():
    attributes = (ctypes.c_uint * 32)(2, 4, 8, 4)  # an array of four
    fd = call(321, 0, attributes, 128)
    yield
    equal(os.readlink(f'/proc/self/fd/{fd}'), 'anon_inode:bpf-map')


@promise
def descriptors_shared_by_two_tasks_stay_shared():
    reader, writer = os.pipe()
    other = call(56, 0x400 | 17, 0, 0, 0, 0)
    if other == 0:
        prctl(1, 9)
        told()
        fd = os.open(place('opened-by-child'), os.O_RDWR | os.O_CREAT)
        os.write(fd, b'from the child')
        os.write(writer, b'%d' % fd)
        os._exit(0)
    yield
    fd = int(os.read(reader, 10))
    equal(os.pread(fd, 99, 0), b'from the child')
    os.waitpid(other, 0)


@promise
def a_working_directory_shared_by_two_tasks_stays_shared():
    os.mkdir(place('d'))
    other = call(56, 0x200 | 17, 0, 0, 0, 0)  # CLONE_FS
    if other == 0:
        prctl(1, 9)
        told()
        os.chdir(place('d'))
        os._exit(0)
    yield
    os.waitpid(other, 0)
    equal(os.getcwd(), place('d'))


@promise
def standard_descriptors_of_a_child_stay_open_over_an_exec():
    import subprocess
    child = subprocess.Popen(['/bin/cat'], stdin=subprocess.PIPE, stdout=open(place('out'), 'wb'), stderr=subprocess.STDOUT)
    yield
    child.communicate(b'done')
    equal(open(place('out')).read(), 'done')
