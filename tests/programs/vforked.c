// In its third round it is in vfork(2) until its child, which waits for the file "go", has ended.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char go[4096];

int main(int count, char **arguments)
{
    FILE *out = fopen(arguments[1], "a");
    setvbuf(out, 0, _IOLBF, 0);
    snprintf(go, sizeof go, "%.4000s", arguments[1]);
    strcpy(strrchr(go, '/'), "/go");
    fprintf(out, "ready\n");
    for (int round = 1;; round++) {
        if (round == 3) {
            fprintf(out, "forks\n");
            if (!vfork()) {
                while (access(go, F_OK)) usleep(10000);
                _exit(0);
            }
            wait(0);
        }
        fprintf(out, "ok\n");
        usleep(5000);
    }
}
