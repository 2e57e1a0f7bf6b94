"""A service of asyncio with threads: PORT. service_client.py has its protocol."""
import asyncio, hashlib, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

sums, ticks, pool = {}, 0, ThreadPoolExecutor(4)
memory = bytearray(os.urandom(4 << 20))
digest = hashlib.sha256(memory).digest()
lock = threading.Lock()
wrong = []


def background():
    global ticks
    local = threading.local()
    local.count = 0
    while True:
        time.sleep(0.005)
        local.count += 1
        with lock: ticks = local.count
        if hashlib.sha256(memory).digest() != digest: wrong.append('memory')


def add(name, number):
    with lock:
        sums[name] = sums.get(name, 0) + number
        return f'{name} {sums[name]} {ticks} {"wrong" if wrong else "right"}\n'


async def serve(reader, writer):
    while line := await reader.readline():
        name, number = line.decode().split()
        writer.write((await asyncio.get_running_loop().run_in_executor(pool, add, name, int(number))).encode())
        await writer.drain()
    writer.close()


async def main():
    server = await asyncio.start_server(serve, '0.0.0.0', int(sys.argv[1]))
    async with server: await server.serve_forever()

threading.Thread(target=background, daemon=True).start()
asyncio.run(main())
