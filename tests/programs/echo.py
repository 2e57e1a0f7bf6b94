# A server that answers each line with itself, to all clients at once.
import selectors, socket

selector = selectors.DefaultSelector()
listener = socket.create_server(('0.0.0.0', 7000))
selector.register(listener, selectors.EVENT_READ)


def work():
    for key, _ in selector.select(0.01):
        if key.fileobj is listener:
            selector.register(listener.accept()[0], selectors.EVENT_READ)
        elif data := key.fileobj.recv(4096):
            key.fileobj.sendall(data)
        else:
            selector.unregister(key.fileobj)
            key.fileobj.close()


forever(work, 0)
