"""Clients of an nginx that is moved: ADDRESS PORT QUIET. One keeps a connection, one downloads a large file slowly, one connects anew,
but not while there is a file QUIET."""
import hashlib, http.client, threading

address, port, quiet = sys.argv[1], int(sys.argv[2]), sys.argv[3]
wanted = {}
downloads = 0


def fetch(connection, path, pause=0):
    connection.request('GET', path)
    answer = connection.getresponse()
    digest = hashlib.sha256()
    while data := answer.read(1 << 16):
        digest.update(data)
        time.sleep(pause)
    check('status', answer.status, 200)
    check(path, digest.hexdigest(), wanted.setdefault(path, digest.hexdigest()))


def download():
    global downloads
    connection = http.client.HTTPConnection(address, port, 60)
    while True:
        try: fetch(connection, '/large', 0.002)
        except BaseException: report('wrong', traceback.format_exc().replace('\n', ' | '))
        downloads += 1


kept = http.client.HTTPConnection(address, port, 60)
kept.connect()
threads = [threading.Thread(target=download, daemon=True) for _ in range(3)]
for thread in threads: thread.start()


def work():
    sock = kept.sock
    for _ in range(10): fetch(kept, '/small')
    check('the connection is kept', kept.sock is sock)
    if not os.path.exists(quiet): fetch(http.client.HTTPConnection(address, port, 60), '/small')


forever(work)
