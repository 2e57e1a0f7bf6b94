"""What every promise of the conformance suite is made with, and what runs one.

    promises.py --list             all promises, as JSON
    promises.py KIND NAME PLACE    runs one; PLACE is an empty directory

A promise is a generator function in KIND.py, marked with `@promise(...)`, and its name says what is promised. What comes before its
`yield` sets a state up; what comes after looks, from the inside, whether it is still so and still works, and raises what is wrong.
At the `yield` the program says that it is ready and stays as it is until it is told to look: meanwhile it is moved, once or
more often. Promises are never edited for the sake of a flavour; what they can say about themselves is in `promise`.

The files in PLACE: `ready` and `result` are written here (by renaming, so that they are whole), `go` by the harness.
"""
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import traceback

HOME = os.path.dirname(os.path.abspath(__file__))
sys.modules['promises'] = sys.modules[__name__]

PROMISES = {}
PLACE = None
PATIENCE = 20

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Skip(Exception):
    """This machine lacks something; raised before the `yield`."""


def promise(function=None, *, options=(), dump=(), restore=(), migrate=(), not_in={}, refused=None, broken=None, unlike=(), variants=()):
    """Marks a generator function as a promise.

    options    words for every verb of CRIU's: dump, pre-dump, restore
    dump, restore, migrate   words for one verb
    not_in     where it cannot be asked: {flavour or group of flavours ('two hosts', 'lazy', 'all'): why}
    refused    words of the error with which whimbrel refuses this state: the refusal is the promise then, and the program must go on
    broken     what is known not to work: {flavour or group: why}. The suite fails if it begins to work
    unlike     facts of /proc that may differ, with * for anything
    variants   also made in a 'thread' and in a 'child' of the program
    """
    def mark(function):
        kind = function.__module__.removeprefix('kind_')
        name = function.__name__.replace('_', ' ')
        marks = dict(kind=kind, options=list(options), dump=list(dump), restore=list(restore), migrate=list(migrate), not_in=dict(not_in),
                     refused=refused, broken=dict(broken or {}), unlike=list(unlike))
        PROMISES[kind, name] = dict(marks, name=name, function=function)
        for variant, run in (('thread', Thread), ('child', Child)):
            if variant in variants:
                full = name + ', in a ' + variant
                PROMISES[kind, full] = dict(marks, name=full, function=within(run, function))
        return function
    return mark if function is None else mark(function)


def within(run, function):
    def elsewhere():
        other = run(function)
        yield
        other.join()
    return elsewhere


# --- what promises say and ask -----------------------------------------------------------------------------------------

def skip(reason):
    raise Skip(reason)


def check(truth, what):
    if not truth: raise AssertionError(what)


def equal(got, wanted, what='this'):
    if got != wanted: raise AssertionError(f'{what} is {got!r}, not {wanted!r}'[:2000])


def eventually(condition, what, patience=PATIENCE):
    """Waits for something that must come, and returns it."""
    deadline = time.monotonic() + patience
    while True:
        got = condition()
        if got: return got
        check(time.monotonic() < deadline, f'waited in vain: {what}')
        time.sleep(0.002)


def fails(error, function, *arguments):
    """Calling this must fail with such an error (an errno, or a class)."""
    try:
        got = function(*arguments)
    except OSError as e:
        if isinstance(error, type) and isinstance(e, error) or e.errno == error: return
        raise
    raise AssertionError(f'{getattr(function, "__name__", function)}{arguments!r} does not fail but gives {got!r}')


def call(number, *arguments):
    """A system call by its number; raises OSError."""
    return good(libc.syscall(ctypes.c_long(number), *[a if not isinstance(a, int) else ctypes.c_long(a) for a in arguments]))


def good(result):
    """The result of a call of libc; raises OSError when it failed."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def prctl(*arguments):
    return call(157, *(list(arguments) + [0] * (5 - len(arguments))))


def gettid():
    return threading.get_native_id()


def status(field, pid='self', tid=None):
    """A line of /proc/PID/status."""
    path = f'/proc/{pid}/task/{tid}/status' if tid else f'/proc/{pid}/status'
    for line in open(path):
        if line.startswith(field + ':'): return line.split(':', 1)[1].strip()


def place(name=''):
    """A path in the directory of this run."""
    return os.path.join(PLACE, name)


def file(name, content=b'', mode='w+b'):
    """A file in the directory of this run, open."""
    with open(place(name), 'wb') as f: f.write(content)
    return open(place(name), 'rb+' if mode == 'w+b' else mode, buffering=0)


def fdinfo(fd, field=None):
    text = open(f'/proc/self/fdinfo/{fd}').read()
    if field is None: return text
    return next(line.split(':', 1)[1].strip() for line in text.splitlines() if line.startswith(field + ':'))


def compiled(source, *flags):
    """A C program, for what Python cannot say. Returns its path."""
    path = place(f'program-{abs(hash(source)) % 10 ** 8}')
    if not os.path.exists(path):
        with open(path + '.c', 'w') as f: f.write(source)
        subprocess.run(['cc', '-O1', '-pthread', '-w', '-o', path, path + '.c', *flags], check=True)
    return path


class C:
    """A child that runs a C program. It says in a file that it is ready and reads there what it shall do: see the header."""
    HEADER = r'''
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static char **words;
static void say(const char *text) {
    int fd = open(words[1], O_WRONLY | O_CREAT | O_TRUNC, 0644);
    write(fd, text, strlen(text));
    close(fd);
    rename(words[1], words[2]);
}
#define wrong(...) do { char text[300]; snprintf(text, 300, __VA_ARGS__); say(text); _exit(1); } while (0)
#define need(what) do { if (!(what)) wrong("%s: %s", #what, strerror(errno)); } while (0)
static void moved(void) {
    say("ready");
    while (access(words[3], F_OK)) usleep(10000);
}
'''

    def __init__(self, body, *flags, arguments=()):
        number = len(os.listdir(PLACE))
        self.files = [place(f'c-{number}.new'), place(f'c-{number}'), place('go')]
        program = compiled(C.HEADER + 'int run(void);\nint main(int n, char **w) { words = w; return run(); }\n' + body, *flags)
        self.pid = os.posix_spawn(program, [program, *self.files, *arguments], os.environ)
        eventually(self.said, 'the C program is ready')
        equal(self.said(), 'ready', 'what the C program says')

    def said(self):
        try: return open(self.files[1]).read()
        except FileNotFoundError: return None

    def join(self):
        ended = os.waitpid(self.pid, 0)
        equal((self.said(), ended[1]), ('ready', 0), 'what the C program says, and its status')


def c_promise(*flags, **marks):
    """A promise that is a C program, in the function's doc string: the code of `int run(void)` and what that needs. It calls `moved()`
    where Python would `yield`, and `wrong(...)` or `need(...)`."""
    def make(function):
        def runs():
            program = C(function.__doc__, *flags)
            yield
            program.join()
        runs.__name__, runs.__module__ = function.__name__, function.__module__
        return promise(**marks)(runs)
    return make


# --- other tasks -------------------------------------------------------------------------------------------------------

def told():
    """Waits until the harness says that the program shall look at itself."""
    go = place('go')
    while not os.path.exists(go): time.sleep(0.01)


class Child:
    """A child that runs a generator as a promise is run: made where it is set up, joined where it is looked at."""

    def __init__(self, function, *arguments, clone=None):
        reader, writer = os.pipe()
        self.report = place(f'child-{len(os.listdir(PLACE))}-{os.getpid()}')
        self.pid = os.fork() if clone is None else clone()
        if self.pid == 0:
            text = ''
            try:
                os.close(reader)
                prctl(1, 9)  # PR_SET_PDEATHSIG
                steps = function(*arguments)
                try:
                    next(steps)
                except StopIteration:
                    raise AssertionError('a promise without a yield')
                except Skip as reason:
                    os.write(writer, b's' + str(reason).encode())
                    os._exit(0)
                os.write(writer, b'r')
                os.close(writer)
                told()
                for _ in steps: pass
            except BaseException:
                text = traceback.format_exc()
                try: os.write(writer, b'f' + text.encode())
                except OSError: pass
            try:
                with open(self.report + '.new', 'w') as f: f.write(text)
                os.rename(self.report + '.new', self.report)
            finally:
                os._exit(1 if text else 0)
        os.close(writer)
        first = os.read(reader, 5000)
        os.close(reader)
        if first[:1] == b's': skip(first[1:].decode())
        check(first == b'r', 'a child cannot be set up: ' + first[1:].decode())

    def join(self):
        _, status = os.waitpid(self.pid, 0)
        try: text = open(self.report).read()
        except FileNotFoundError: text = 'no report'
        check(not text and status == 0, f'child {self.pid} ended with status {status}: {text}')


class Thread:
    """The same in a thread."""

    def __init__(self, function, *arguments):
        self.error, self.skip, ready = None, None, threading.Event()
        self.tid = None

        def run():
            self.tid = gettid()
            try:
                steps = function(*arguments)
                next(steps)
                ready.set()
                told()
                for _ in steps: pass
            except Skip as reason:
                self.skip = str(reason)
            except BaseException:
                self.error = traceback.format_exc()
            ready.set()
        self.thread = threading.Thread(target=run)
        self.thread.start()
        ready.wait()
        if self.skip: skip(self.skip)
        check(self.error is None, f'a thread cannot be set up: {self.error}')

    def join(self):
        self.thread.join(PATIENCE)
        check(not self.thread.is_alive(), 'a thread does not end')
        check(self.error is None, self.error)


class Outside:
    """A process that is not of the tree: it answers calls of functions, by their names, through files."""

    def __init__(self, **functions):
        self.functions, self.calls, self.base = functions, 0, place(f'outside-{len(os.listdir(PLACE))}')
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                os.closerange(3, 1000)
                self.serve()
            os._exit(0)
        os.wait()
        self.pid = int(self('pid'))

    def serve(self):
        number = 0
        try:
            while True:
                number += 1
                path = f'{self.base}-call-{number}'
                while not os.path.exists(path): time.sleep(0.005)
                name, arguments = json.load(open(path))
                try:
                    answer = os.getpid() if name == 'pid' else self.functions[name](*arguments)
                    answer = [None, answer]
                except BaseException:
                    answer = [traceback.format_exc(), None]
                with open(path + '.new', 'w') as f: json.dump(answer, f)
                os.rename(path + '.new', path + '-answer')
        finally:
            os._exit(1)

    def start(self, name, *arguments):
        self.calls += 1
        path = f'{self.base}-call-{self.calls}'
        with open(path + '.new', 'w') as f: json.dump([name, arguments], f)
        os.rename(path + '.new', path)

    def answer(self):
        path = f'{self.base}-call-{self.calls}-answer'
        eventually(lambda: os.path.exists(path), 'a process outside of the tree answers')
        error, answer = json.load(open(path))
        check(error is None, error)
        return answer

    def __call__(self, name, *arguments):
        self.start(name, *arguments)
        return self.answer()


# --- running one -------------------------------------------------------------------------------------------------------

def load(path):
    kind = os.path.basename(path)[:-3]
    spec = importlib.util.spec_from_file_location('kind_' + kind, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def kinds():
    return sorted(name for name in os.listdir(HOME) if name.endswith('.py') and name != 'promises.py')


def write(name, text):
    with open(place(name + '.new'), 'w') as f: f.write(text)
    os.rename(place(name + '.new'), place(name))


def run(kind, name, where):
    global PLACE
    PLACE = where
    load(os.path.join(HOME, kind + '.py'))
    os.umask(0o022)
    try:
        steps = PROMISES[kind, name]['function']()
        next(steps)
    except Skip as reason:
        return write('ready', f'skipped: {reason}')
    except BaseException:
        return write('ready', traceback.format_exc())
    write('ready', 'ready')
    told()
    text = 'held'
    try:
        for _ in steps: pass
    except BaseException:
        text = traceback.format_exc()
    write('result', text)
    # As it is: tasks that it has are ended by whoever started it.
    os._exit(0)


if __name__ == '__main__':
    if sys.argv[1:] == ['--list']:
        for name in kinds(): load(os.path.join(HOME, name))
        json.dump([{key: value for key, value in entry.items() if key != 'function'} for entry in PROMISES.values()], sys.stdout)
    else:
        run(*sys.argv[1:])
