# Has seccomp filters: one in all threads, one in a thread alone.
import ctypes, struct, threading

libc = ctypes.CDLL(None, use_errno=True)
data = bytearray(os.urandom(1 << 20) * 8)
copy = bytes(data)


def refuse(call, error):
    code = struct.pack('HBBI' * 4, 0x20, 0, 0, 0, 0x15, 0, 1, call, 6, 0, 0, 0x50000 | error, 6, 0, 0, 0x7fff0000)
    code = ctypes.create_string_buffer(code)
    program = struct.pack('HxxxxxxQ', 4, ctypes.addressof(code))
    return libc.prctl(22, ctypes.c_ulong(2), ctypes.create_string_buffer(program), 0, 0)


def error_of(call):
    ctypes.set_errno(0)
    return ctypes.get_errno() if libc.syscall(call) < 0 else 0


def alone():
    check('own filter', refuse(102, 78), 0)  # getuid
    while True:
        check('filters of the thread', (error_of(110), error_of(102)), (77, 78))
        turns.append(1)
        time.sleep(0.01)


def work():
    before = len(turns)
    check('filters', (error_of(110), error_of(102)), (77, 0))
    check('memory', data == copy)
    while len(turns) == before: time.sleep(0.001)


turns = []
libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
check('filter', refuse(110, 77), 0)  # getppid
threading.Thread(target=alone, daemon=True).start()
forever(work)
