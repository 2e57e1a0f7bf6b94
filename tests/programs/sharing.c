// A child that shares its descriptors and working directory with its parent, and a grandchild that shares the directory
// alone. What one changes, in each round anew, the others must see, or must not.
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int ask[3][2], answer[3][2];

static int clone_with(long flags)
{
    int pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    if (!pid) prctl(PR_SET_PDEATHSIG, SIGKILL);
    return pid;
}

static int is_open(int fd) { return fcntl(fd, F_GETFD) >= 0; }

static int is_in(const char *name)
{
    char path[4096];
    return getcwd(path, sizeof path) && !strcmp(strrchr(path, '/') + 1, name);
}

// Answers questions: o and c open and close descriptor 77, f asks for it; d goes to directory a, D asks for b; m asks for
// and changes the umask.
static void serve(int me)
{
    char word;
    while (read(ask[me][0], &word, 1) == 1) {
        char told = '-';
        if (word == 'o') told = dup2(0, 77) == 77 ? 'y' : 'n';
        if (word == 'c') told = close(77) ? 'n' : 'y';
        if (word == 'f') told = is_open(77) ? 'y' : 'n';
        if (word == 'd') told = chdir("../a") ? 'n' : 'y';
        if (word == 'D') told = is_in("b") ? 'y' : 'n';
        if (word == 'm') told = umask(025) == 031 ? 'y' : 'n';
        write(answer[me][1], &told, 1);
    }
    _exit(0);
}

static int asks(int whom, char word)
{
    char told = 0;
    write(ask[whom][1], &word, 1);
    read(answer[whom][0], &told, 1);
    return told;
}

int main(int count, char **arguments)
{
    FILE *out = fopen(arguments[1], "a");
    setvbuf(out, 0, _IOLBF, 0);
    *strrchr(arguments[1], '/') = 0;
    chdir(arguments[1]);
    mkdir("a", 0700), mkdir("b", 0700), chdir("a");
    for (int i = 1; i < 3; i++) pipe(ask[i]), pipe(answer[i]);
    if (!clone_with(CLONE_FILES | CLONE_FS)) {
        if (!clone_with(CLONE_FS)) serve(2);
        serve(1);
    }
    fprintf(out, "ready\n");
    for (;;) {
        int right = asks(1, 'o') == 'y' && is_open(77) && asks(2, 'f') == 'n';
        right = right && asks(2, 'o') == 'y' && !close(77) && asks(1, 'f') == 'n';
        right = right && asks(2, 'f') == 'y' && asks(2, 'c') == 'y';
        if (!right) fprintf(out, "wrong descriptors\n");
        right = !chdir("../b") && asks(1, 'D') == 'y' && asks(2, 'D') == 'y';
        right = right && asks(1, 'd') == 'y' && is_in("a") && asks(2, 'D') == 'n';
        if (!right) fprintf(out, "wrong directory\n");
        umask(031);
        if (asks(2, 'm') != 'y' || umask(0) != 025) fprintf(out, "wrong umask\n");
        fprintf(out, "ok\n");
        usleep(5000);
    }
}
