# A program whose shape changes all the time: it forks, maps, unmaps, moves, protects, starts and ends threads:
# [pages of an area at most] [whether it forks].
import ctypes, mmap, random, threading

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
most = int(sys.argv[1]) if len(sys.argv) > 1 else 200
forks = len(sys.argv) < 3 or sys.argv[2] == 'yes'
areas = []
lock = threading.Lock()


def fill(address, size, byte): ctypes.memset(address, byte, size)


def holds(address, size, byte):
    # At both ends and somewhere between.
    for offset in (0, size - 1, random.randrange(size)):
        if ctypes.c_ubyte.from_address(address + offset).value != byte: return False
    return True


def map_one():
    size, byte = 4096 * random.randrange(1, most), random.randrange(1, 256)
    address = libc.mmap(None, size, 3, 0x22, -1, 0)
    fill(address, size, byte)
    areas.append([address, size, byte])


def change_one():
    if not areas: return
    index = random.randrange(len(areas))
    address, size, byte = areas[index]
    check('area', holds(address, size, byte))
    what = random.randrange(6)
    if what == 0:
        libc.munmap(address, size)
        areas.pop(index)
    elif what == 1:
        grown = libc.mremap(address, size, size + 4096 * 20, 1)
        fill(grown + size, 4096 * 20, byte)
        areas[index][:2] = [grown, size + 4096 * 20]
    elif what == 2 and size > 8192:
        libc.munmap(address, 4096)
        areas[index][:2] = [address + 4096, size - 4096]
    elif what == 3:
        libc.mprotect(address, size, 1)
        check('protected area', holds(address, size, byte))
        libc.mprotect(address, size, 3)
    elif what == 4:
        libc.madvise(address, size, 4)
        check('dropped area', holds(address, size, 0))
        fill(address, size, byte)
    else:
        byte = random.randrange(1, 256)
        fill(address, size, byte)
        areas[index][2] = byte


def fork_one():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # What it inherited must be right, wherever it wakes up.
        good = all(holds(*area) for area in areas)
        if areas and good: fill(areas[0][0], areas[0][1], 0)
        os.write(writer, b'good' if good else b'bad')
        os._exit(3 if good else 4)
    os.close(writer)
    said = b''
    while part := os.read(reader, 100): said += part
    os.close(reader)
    check('child', (said, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), (b'good', 3))


def thread_one():
    result = []
    thread = threading.Thread(target=lambda: result.append(sum(range(1000))))
    thread.start()
    thread.join(20)
    check('thread', result, [499500])


def work():
    while len(areas) < 40: map_one()
    for _ in range(10): change_one()
    if forks: fork_one()
    thread_one()
    for area in areas: check('area at rest', holds(*area))


forever(work, 0)
