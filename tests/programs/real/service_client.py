"""Clients of a service that is moved: ADDRESS PORT QUIET. Its protocol: `NAME NUMBER` is answered by `NAME SUM TICKS right`, with the sum of all
numbers that came with the name, a count that work in the background makes go up, and what the service thinks of itself. While there is a file QUIET, no new connections are made."""
import socket

address, port, quiet = sys.argv[1], int(sys.argv[2]), sys.argv[3]


class Client:
    def __init__(self, name):
        self.name, self.sum, self.ticks = name, 0, 0
        self.socket = socket.create_connection((address, port), 60)
        self.socket.settimeout(60)
        self.file = self.socket.makefile('rb')

    def ask(self, depth=5):
        numbers = [(self.sum + i) % 1000 + 1 for i in range(depth)]
        self.socket.sendall(''.join(f'{self.name} {number}\n' for number in numbers).encode())
        for number in numbers:
            self.sum += number
            words = self.file.readline().decode().split()
            check('answer', words[:2] + words[3:], [self.name, str(self.sum), 'right'])
            check('the count does not go down', int(words[2]) >= self.ticks)
            self.ticks = int(words[2])


clients = [Client(f'client-{number}') for number in range(3)]
fresh = Client('fresh')


def work():
    global fresh
    for client in clients: client.ask()
    # The service goes on working in the background, and takes new connections.
    before, deadline = clients[0].ticks, time.monotonic() + 30
    while clients[0].ticks == before and time.monotonic() < deadline: clients[0].ask(1)
    check('the count goes up', clients[0].ticks > before)
    if not os.path.exists(quiet):
        last, fresh = fresh, Client('fresh')
        fresh.sum = last.sum
    fresh.ask()


forever(work)
