// A family under seccomp: threads with filters in common and of their own, a child that inherited them, one in strict mode,
// one that installs filters in all of its threads at once. Each looks, in each round, whether its filters still hold.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static FILE *out;
static volatile int turns[2], ending;

static void pause_ms(int ms) { nanosleep(&(struct timespec){0, ms * 1000000L}, 0); }

static void end(int number) { ending = 1; }

// Refuses a call with an error number, in this thread or in all.
static long refuse(int call, int error, int flags)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {4, code};
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static int error_of(int call)
{
    errno = 0;
    return syscall(call, -1, -1, -1, -1) < 0 ? errno : 0;
}

static void must(const char *who, int call, int wanted)
{
    int error = error_of(call);
    if (error != wanted) fprintf(out, "wrong %s call %d: %d, not %d\n", who, call, error, wanted);
}

static void *own(void *number)
{
    int me = (long)number;
    refuse(SYS_getuid, 101 + me, 0);
    for (;;) {
        must("thread", SYS_getppid, 77);
        must("thread", SYS_getuid, 101 + me);
        must("thread", SYS_getgid, 0);
        turns[me]++;
        pause_ms(5);
    }
}

static void *idle(void *unused)
{
    for (;;) pause(), must("idle", SYS_getppid, 77);
}

int main(int count, char **arguments)
{
    pthread_t thread;
    int to[2], from[2], told[2];
    char byte;
    out = fopen(arguments[1], "a");
    setvbuf(out, 0, _IOLBF, 0);
    signal(SIGTERM, end);
    pipe(to), pipe(from), pipe(told);
    int strict = fork();
    if (!strict) {
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT);
        for (;;) {
            if (syscall(SYS_read, to[0], &byte, 1) == 1 && byte == 'x') syscall(SYS_getpid);
            syscall(SYS_write, from[1], &byte, 1);
        }
    }
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    refuse(SYS_getppid, 77, SECCOMP_FILTER_FLAG_LOG);
    refuse(SYS_getpgrp, 78, 0);
    int many = fork();
    if (!many) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (int i = 0; i < 3; i++) pthread_create(&thread, 0, idle, 0);
        for (int round = 0;; round++) {
            must("child", SYS_getppid, 77);
            must("child", SYS_getpgrp, 78);
            if (round % 8 == 0 && refuse(SYS_getgid, 200 + round / 8, SECCOMP_FILTER_FLAG_TSYNC))
                fprintf(out, "wrong: filters cannot be synchronised\n");
            must("child", SYS_getgid, 200 + round / 8);
            write(told[1], "t", 1);
            pause_ms(5);
        }
    }
    for (long i = 0; i < 2; i++) pthread_create(&thread, 0, own, (void *)i);
    pause_ms(50);
    fprintf(out, "ready\n");
    while (!ending) {
        int before[2] = {turns[0], turns[1]};
        pause_ms(20);
        must("main", SYS_getppid, 77);
        must("main", SYS_getpgrp, 78);
        must("main", SYS_getuid, 0);
        if (write(to[1], "a", 1) != 1 || read(from[0], &byte, 1) != 1 || byte != 'a') fprintf(out, "wrong strict\n");
        if (read(told[0], &byte, 1) != 1) fprintf(out, "wrong child\n");
        for (int i = 0; turns[0] == before[0] || turns[1] == before[1]; i++) {
            if (i == 1000) fprintf(out, "wrong threads\n");
            pause_ms(5);
        }
        fprintf(out, "ok\n");
    }
    // A call that strict mode forbids is the end of it.
    int status = 0;
    write(to[1], "x", 1);
    waitpid(strict, &status, 0);
    fprintf(out, WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL ? "strict to the end\n" : "wrong end %x\n", status);
    kill(many, SIGKILL);
    exit(0);
}
