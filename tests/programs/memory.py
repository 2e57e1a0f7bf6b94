# Memory that is written all the time, and looked at: MIB [MIB per round]. Each page tells when it was last written.
import random, struct

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


def work():
    global at
    for _ in range(per_round): write(random.randrange(pages))
    # Part of it in order, so that all of it is seen in 64 rounds, and part anywhere.
    for page in range(at, min(at + pages // 64 + 1, pages)): look(page)
    at = (at + pages // 64 + 1) % pages
    for _ in range(50): look(random.randrange(pages))


forever(work)
