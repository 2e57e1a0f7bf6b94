// A service of Node.js: PORT. service_client.py has its protocol.
const crypto = require('crypto'), net = require('net');
const { Worker, isMainThread, parentPort } = require('worker_threads');

if (!isMainThread) {
  setInterval(() => parentPort.postMessage(1), 5);
} else {
  const sums = new Map(), memory = crypto.randomBytes(4 << 20);
  const digest = () => crypto.createHash('sha256').update(memory).digest('hex');
  const wanted = digest();
  let ticks = 0, right = true;
  new Worker(__filename).on('message', () => ticks++);
  setInterval(() => { right = right && digest() === wanted; }, 50);
  net.createServer(socket => {
    let rest = '';
    socket.on('error', () => {});
    socket.on('data', data => {
      const lines = (rest + data).split('\n');
      rest = lines.pop();
      for (const line of lines) {
        const [name, number] = line.split(' ');
        sums.set(name, (sums.get(name) || 0) + Number(number));
        socket.write(`${name} ${sums.get(name)} ${ticks} ${right ? 'right' : 'wrong'}\n`);
      }
    });
  }).listen(Number(process.argv[2]), '0.0.0.0');
}
