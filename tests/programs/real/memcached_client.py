"""Clients of a memcached that is moved: ADDRESS PORT."""
import hashlib, socket

address, port = sys.argv[1], int(sys.argv[2])


class Client:
    def __init__(self, number):
        self.number, self.count, self.stored = number, 0, {}
        self.socket = socket.create_connection((address, port), 60)
        self.file = self.socket.makefile('rb')

    def send(self, text):
        self.socket.sendall(text)

    def line(self):
        return self.file.readline().decode().strip()

    def value(self, key):
        self.send(f'get {key}\r\n'.encode())
        head = self.line().split()
        if head == ['END']: return None
        data = self.file.read(int(head[3]) + 2)[:-2]
        check('end', self.line(), 'END')
        return data

    def work(self):
        self.count += 1
        key = f'key-{self.number}-{self.count % 100}'
        data = hashlib.sha256(f'{key} {self.count}'.encode()).hexdigest().encode() * 50
        self.send(f'set {key} 0 0 {len(data)}\r\n'.encode() + data + b'\r\n')
        check('set', self.line(), 'STORED')
        self.stored[key] = data
        for other in list(self.stored)[self.count % 10::10]: check(other, self.value(other), self.stored[other])
        if self.count == 1:
            self.send(f'set count-{self.number} 0 0 1\r\n0\r\n'.encode())
            check('set', self.line(), 'STORED')
        self.send(f'incr count-{self.number} 1\r\n'.encode())
        check('incr', self.line(), str(self.count))


clients = [Client(number) for number in range(4)]
uptime = 0


def work():
    global uptime
    for client in clients: client.work()
    clients[0].send(b'stats\r\n')
    stats = dict(line.split()[1:3] for line in iter(clients[0].line, 'END'))
    check('connections', int(stats['curr_connections']) >= len(clients))
    # Its clock is a timer of its own.
    check('its clock', uptime <= int(stats['uptime']))
    uptime = int(stats['uptime'])


forever(work)
