"""Clients of a Redis server that is moved: ADDRESS DIRECTORY COUNT.

COUNT connections send pipelines of INCR, SET and GET, and check every reply; one subscriber must get each of the messages
that a publisher counts up, in order. All work until DIRECTORY/stop is there; then all keys are read once more on a new
connection, and DIRECTORY/result says how many replies and messages were right. Any doubt goes to the standard error, and
ends the program with 1.
"""
import os, socket, sys, threading, time

address, directory, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
DEPTH = 16
stop = threading.Event()
replies = [0] * (count + 2)
last = {}


def die(*words):
    sys.stderr.write(' '.join(map(str, words)) + '\n')
    sys.stderr.flush()
    os._exit(1)


class Connection:
    def __init__(self):
        self.socket = socket.create_connection((address, 6379), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile('rb')

    def send(self, *commands):
        out = b''
        for command in commands:
            words = [str(word).encode() for word in command]
            out += b'*%d\r\n' % len(words) + b''.join(b'$%d\r\n%s\r\n' % (len(word), word) for word in words)
        self.socket.sendall(out)

    def receive(self):
        line = self.file.readline()
        if not line.endswith(b'\r\n'):
            raise EOFError('the connection was closed')
        kind, rest = line[:1], line[1:-2]
        if kind == b'$':
            return self.file.read(int(rest) + 2)[:-2] if int(rest) >= 0 else None
        if kind == b'*':
            return [self.receive() for _ in range(int(rest))]
        return int(rest) if kind == b':' else (kind + rest).decode()


def client(number):
    connection, n = Connection(), 0
    counter, key = 'counter-%d' % number, 'value-%d-%d'
    while not stop.is_set():
        commands, wanted = [], []
        for _ in range(DEPTH):
            n += 1
            name, value = key % (number, n % 500), 'v%d' % n * 10
            commands += [('INCR', counter), ('SET', name, value), ('GET', name)]
            wanted += [n, '+OK', value.encode()]
            last[name] = value.encode()
        # Both processors belong to the move as well.
        time.sleep(0.002)
        connection.send(*commands)
        for command, want in zip(commands, wanted):
            got = connection.receive()
            if got != want:
                die('client', number, command, 'got', got, 'instead of', want)
            replies[number] += 1
    last[counter] = b'%d' % n


def subscriber():
    connection, n = Connection(), 0
    connection.send(('SUBSCRIBE', 'news'))
    connection.receive()
    subscribed.set()
    while True:
        kind, channel, message = connection.receive()
        if message == b'end':
            return
        n += 1
        if (kind, channel, message) != (b'message', b'news', b'%d' % n):
            die('subscriber got', kind, channel, message, 'instead of', n)
        replies[count] = n


def publisher():
    connection, n = Connection(), 0
    while not stop.is_set():
        n += 1
        connection.send(('PUBLISH', 'news', n))
        if connection.receive() != 1:
            die('nobody hears message', n)
        replies[count + 1] = n
        time.sleep(0.002)
    connection.send(('PUBLISH', 'news', 'end'))
    connection.receive()


def guarded(work, *arguments):
    def body():
        try:
            work(*arguments)
        except BaseException as error:
            die(work.__name__, arguments, 'failed:', repr(error))
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


subscribed = threading.Event()
threads = [guarded(subscriber)]
subscribed.wait(30)
threads += [guarded(publisher)] + [guarded(client, number) for number in range(count)]
before = list(replies)
while not os.path.exists(directory + '/stop'):
    time.sleep(0.02)
    # Two pipelines of each client, and two messages, since the file was taken away.
    if os.path.exists(directory + '/working'):
        before = list(replies)
    elif all(now > then + 2 * 3 * DEPTH for now, then in zip(replies[:count], before)) and replies[count] > before[count] + 1:
        open(directory + '/working', 'w').close()
stop.set()
for thread in threads:
    thread.join(60)
    if thread.is_alive():
        die('a client hangs')
if replies[count] != replies[count + 1]:
    die(replies[count + 1], 'messages were published,', replies[count], 'arrived')
fresh = Connection()
for name, value in last.items():
    fresh.send(('GET', name))
    got = fresh.receive()
    if got != value:
        die(name, 'is', got, 'instead of', value)
fresh.send(('DBSIZE',))
size = fresh.receive()
step = max(1, size // 5000)
for number in range(0, size - len(last), step):
    fresh.send(('GET', 'key:%d' % number))
    value = fresh.receive()
    if value is None or value.rstrip(b'\0') != b'value:%d' % number:
        die('key:%d' % number, 'is', value)
with open(directory + '/result.new', 'w') as out:
    out.write('%d %d' % (sum(replies[:count]), replies[count]))
os.rename(directory + '/result.new', directory + '/result')
