// A server that forked its workers when it had loaded everything: much memory in common, some that each wrote, gave back,
// protected, grew, and a worker of a worker. Each looks, in each round, whether all of it is as it must be.
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { PAGE = 4096, PAGES = 16384, GROWN = 64, WORKERS = 4 };

static unsigned char *area, *heap;
static unsigned char expected[PAGES], heap_pages = 200;

static void fill(int page, int value)
{
    memset(area + (long)page * PAGE, value, PAGE);
    expected[page] = value;
}

static const char *check(int me)
{
    for (int page = 0; page < PAGES; page++) {
        unsigned char *at = area + (long)page * PAGE;
        if (at[0] != expected[page] || at[page % PAGE] != expected[page] || at[PAGE - 1] != expected[page]) return "area";
    }
    for (int page = 0; page < heap_pages; page++)
        if (heap[(long)page * PAGE + 7] != (page < 200 ? 9 : me)) return "heap";
    return 0;
}

static void change(int me)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int i = 0; i < 16; i++) fill(100 * me + i, 200 + me);
    // Given back: zeros. And what the parent has changed since it is not changed here.
    madvise(area + (1000L + 10 * me) * PAGE, 8 * PAGE, MADV_DONTNEED);
    for (int i = 0; i < 8; i++) expected[1000 + 10 * me + i] = 0;
    mprotect(area + (2000L + 10 * me) * PAGE, 5 * PAGE, me % 2 ? PROT_READ : PROT_NONE);
    if (me % 2 == 0) mprotect(area + (2000L + 10 * me) * PAGE, 5 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
    sbrk(40 * PAGE);
    for (; heap_pages < 240; heap_pages++) memset(heap + (long)heap_pages * PAGE, me, PAGE);
    // Memory of the common area that only this one has no more.
    munmap(area + (PAGES - 100L) * PAGE, me * PAGE);
    mmap(area + (PAGES - 100L) * PAGE, me * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (int i = 0; i < me; i++) expected[PAGES - 100 + i] = 0;
}

static void work(int me, int in, int out)
{
    char word;
    while (read(in, &word, 1) == 1) {
        const char *wrong = check(me);
        char told = wrong ? *wrong : 'y';
        fill(5000 + me, (unsigned char)(expected[5000 + me] + 1));
        write(out, &told, 1);
    }
    _exit(0);
}

int main(int count, char **arguments)
{
    int ask[WORKERS + 2][2], answer[WORKERS + 2][2];
    FILE *out = fopen(arguments[1], "a");
    setvbuf(out, 0, _IOLBF, 0);
    area = mmap(0, (long)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(area, (long)PAGES * PAGE, MADV_NOHUGEPAGE);
    for (int page = 0; page < PAGES; page++) fill(page, page % 251 + 1);
    heap = sbrk(0);
    heap = (unsigned char *)(((long)heap + PAGE - 1) & ~(PAGE - 1L));
    brk(heap + 200L * PAGE);
    for (int page = 0; page < 200; page++) memset(heap + (long)page * PAGE, 9, PAGE);
    for (int me = 1; me <= WORKERS; me++) {
        pipe(ask[me]), pipe(answer[me]);
        if (me == WORKERS) pipe(ask[me + 1]), pipe(answer[me + 1]);
        if (fork()) continue;
        change(me);
        // The last has a worker of its own.
        if (me == WORKERS && !fork()) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (int i = 0; i < 16; i++) fill(3000 + i, 77);
            work(me, ask[me + 1][0], answer[me + 1][1]);
        }
        work(me, ask[me][0], answer[me][1]);
    }
    for (int i = 0; i < 32; i++) fill(4000 + i, 99);
    fprintf(out, "ready\n");
    for (;;) {
        const char *wrong = check(0);
        if (wrong) fprintf(out, "wrong %s of the parent\n", wrong);
        for (int me = 1; me <= WORKERS + 1; me++) {
            char told = 0;
            write(ask[me][1], "?", 1), read(answer[me][0], &told, 1);
            if (told != 'y') fprintf(out, "wrong %c of worker %d\n", told, me);
        }
        fprintf(out, "ok\n");
        usleep(5000);
    }
}
