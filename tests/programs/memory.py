# Memory that is written all the time, and looked at: MIB [MIB per round]. Each page tells when it was last written.
import mmap, random, struct

PAGE = 4096
pages = int(sys.argv[1]) * 256
per_round = int(sys.argv[2]) * 256 if len(sys.argv) > 2 else 16
memory = bytearray(pages * PAGE)
stamps = [0] * pages
clock = 0


def write(page):
    global clock
    clock += 1
    stamps[page] = clock
    struct.pack_into('<QQ', memory, page * PAGE, page, clock)
    struct.pack_into('<QQ', memory, page * PAGE + PAGE - 16, clock, page)


def look(page):
    found = struct.unpack_from('<QQ', memory, page * PAGE) + struct.unpack_from('<QQ', memory, page * PAGE + PAGE - 16)
    wanted = (page, stamps[page], stamps[page], page)
    if found != wanted: check('page %d' % page, found, wanted)


for page in range(pages): write(page)
at = 0
# A file that is mapped privately: zeros over it are not the file, and what is given back is the file again.
with open(LOG + '.file', 'wb') as file: file.write(b'f' * 16 * PAGE)
with open(LOG + '.file', 'r+b') as file:
    private = mmap.mmap(file.fileno(), 16 * PAGE, flags=mmap.MAP_PRIVATE)
private[3 * PAGE:4 * PAGE] = bytes(PAGE)
changing = b'f'


def look_at_file():
    global changing
    check('zeros over a file', private[3 * PAGE:4 * PAGE].count(0), PAGE)
    check('the file beside them', private[4 * PAGE:5 * PAGE].count(b'f'), PAGE)
    check('the page that changes', private[7 * PAGE:8 * PAGE].count(changing), PAGE)
    changing = {b'f': b'\0', b'\0': b'x', b'x': b'f'}[changing]
    if changing == b'f': private.madvise(mmap.MADV_DONTNEED, 7 * PAGE, PAGE)
    else: private[7 * PAGE:8 * PAGE] = changing * PAGE


def work():
    global at
    for _ in range(per_round): write(random.randrange(pages))
    # Part of it in order, so that all of it is seen in 64 rounds, and part anywhere.
    for page in range(at, min(at + pages // 64 + 1, pages)): look(page)
    at = (at + pages // 64 + 1) % pages
    for _ in range(50): look(random.randrange(pages))
    look_at_file()


forever(work)
