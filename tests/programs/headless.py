# Its first thread has ended; another goes on, with memory that it writes.
import ctypes, threading

data = bytearray(os.urandom(1 << 20) * 8)
count = 0


def first():
    stat = open('/proc/self/task/%d/stat' % os.getpid()).read()
    return stat.rsplit(') ', 1)[1].split()[0]


def work():
    global count
    check('its leader', first(), 'Z')
    check('a thread of its own', threading.get_native_id() != os.getpid())
    page = 4096 * (count % 2048)
    if count >= 2048: check('its memory', data[page], count // 2048 % 256)
    data[page] = (count // 2048 + 1) % 256
    count += 1


def run():
    while first() != 'Z': time.sleep(0.001)
    forever(work)


threading.Thread(target=run).start()
ctypes.CDLL(None).syscall(60, 0)  # exit, of this thread alone
