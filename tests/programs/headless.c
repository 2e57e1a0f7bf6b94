// Its first thread has ended; the second does rounds, and looks whether the first is still dead, not gone and not back.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static FILE *out;
static int leader, worker, child;
static volatile int ticks, deaths, ending;

static void pause_ms(int ms) { nanosleep(&(struct timespec){0, ms * 1000000L}, 0); }

static void caught(int number) { deaths++; }

static void end(int number) { ending = 1; }

static void *tick(void *unused)
{
    while (!ending) { ticks++; pause_ms(3); }
}

static char state_of(int tid, char *name)
{
    char path[64], text[256] = "", state = '?';
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
    FILE *file = fopen(path, "r");
    if (!file) return '-';
    if (fgets(text, sizeof text, file)) sscanf(text, "%*d (%15[^)]) %c", name, &state);
    fclose(file);
    return state;
}

static void *work(void *unused)
{
    worker = syscall(SYS_gettid);
    prctl(PR_SET_NAME, "worker");
    // A child of this thread, that asks to be told of this thread's end, and is not told.
    signal(SIGUSR1, caught);
    child = fork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGUSR1);
        for (;;) { pause_ms(5); if (deaths) _exit(7); }
    }
    char name[16];
    while (state_of(leader, name) != 'Z') pause_ms(1);
    fprintf(out, "ready\n");
    for (;;) {
        int before = ticks;
        pause_ms(20);
        memset(name, 0, sizeof name);
        char state = state_of(leader, name);
        if (state != 'Z' || strcmp(name, "head")) fprintf(out, "wrong leader %c %s\n", state, name);
        if (getpid() != leader || syscall(SYS_gettid) != worker) fprintf(out, "wrong ids\n");
        if (waitpid(child, 0, WNOHANG)) fprintf(out, "wrong child\n");
        for (int i = 0; ticks == before && !ending; i++) {
            if (i == 1000) fprintf(out, "wrong other thread\n");
            pause_ms(5);
        }
        fprintf(out, "ok\n");
        // Asked to end: the last thread's status is that of the process.
        if (ending) {
            pause_ms(100);
            kill(child, SIGKILL);
            waitpid(child, 0, 0);
            syscall(SYS_exit, 3);
        }
    }
}

int main(int count, char **arguments)
{
    pthread_t thread;
    out = fopen(arguments[1], "a");
    setvbuf(out, 0, _IOLBF, 0);
    leader = getpid();
    prctl(PR_SET_NAME, "head");
    signal(SIGTERM, end);
    pthread_create(&thread, 0, work, 0);
    pthread_create(&thread, 0, tick, 0);
    // As pthread_exit, with a status of its own.
    syscall(SYS_exit, 5);
}
