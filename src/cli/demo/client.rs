//! The demo's client: fills the server, keeps asking it over one connection, and checks every reply and every key.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes of each value.
const VALUE: usize = 1000;
/// Requests that are under way at once.
const PIPELINE: usize = 8;

/// What the client saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Replies.
    pub replies: u64,
    /// Replies that were not what they had to be.
    pub wrong: u64,
    /// Requests without a reply.
    pub lost: u64,
    /// The longest time without a reply, in milliseconds.
    pub longest_gap_ms: f64,
    /// Was the connection there to the end?
    pub survived: bool,
}

/// A connection to the server.
pub struct Client {
    input: BufReader<TcpStream>,
    output: TcpStream,
}

impl Client {
    /// Connects, waiting for the server to come up.
    ///
    /// # Errors
    /// When it does not within ten seconds.
    pub fn connect(server: SocketAddr) -> std::io::Result<Client> {
        let started = Instant::now();
        let output = loop {
            match TcpStream::connect_timeout(&server, Duration::from_secs(1)) {
                Ok(stream) => break stream,
                Err(error) if started.elapsed() > Duration::from_secs(10) => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        };
        output.set_nodelay(true)?;
        output.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Client {
            input: BufReader::with_capacity(1 << 16, output.try_clone()?),
            output,
        })
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.input.read_line(&mut line)? == 0 {
            return Err(std::io::Error::other("the server closed the connection"));
        }
        Ok(line)
    }

    /// Sets keys until the values together have `bytes` bytes; returns how many there are.
    ///
    /// # Errors
    /// When the server does not take one.
    pub fn fill(&mut self, bytes: u64) -> std::io::Result<u64> {
        let count = bytes / VALUE as u64;
        let mut next = 0;
        while next < count {
            let batch: Vec<u64> = (next..(next + 512).min(count)).collect();
            let mut text = Vec::with_capacity(batch.len() * (VALUE + 64));
            for &number in &batch {
                let key = format!("key:{number}");
                write!(text, "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${VALUE}\r\n", key.len())?;
                text.extend(value(number));
                text.extend(b"\r\n");
            }
            self.output.write_all(&text)?;
            for _ in &batch {
                let reply = self.line()?;
                if reply != "+OK\r\n" {
                    return Err(std::io::Error::other(format!("the server says {reply:?}")));
                }
            }
            next += batch.len() as u64;
        }
        Ok(count)
    }

    /// Counts on the server, several requests under way, until told to stop. Each reply must be one more than the last.
    pub fn count(&mut self, stop: &AtomicBool) -> Seen {
        let mut seen = Seen {
            survived: true,
            ..Seen::default()
        };
        let (mut sent, mut last) = (0u64, Instant::now());
        let request = b"*2\r\n$4\r\nINCR\r\n$7\r\ncounter\r\n";
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            while !stopping && sent - seen.replies < PIPELINE as u64 {
                if self.output.write_all(request).is_err() {
                    seen.survived = false;
                    break;
                }
                sent += 1;
            }
            if !seen.survived || sent == seen.replies {
                break;
            }
            match self.line() {
                Ok(reply) => {
                    seen.replies += 1;
                    if reply != format!(":{}\r\n", seen.replies) {
                        seen.wrong += 1;
                    }
                    let now = Instant::now();
                    seen.longest_gap_ms = seen.longest_gap_ms.max((now - last).as_secs_f64() * 1e3);
                    last = now;
                }
                Err(error) => {
                    tracing::error!(%error, "the connection broke");
                    seen.survived = false;
                    break;
                }
            }
        }
        seen.lost = sent - seen.replies;
        seen
    }

    /// Reads every key; returns how many were not what was set.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn check(&mut self, count: u64) -> std::io::Result<u64> {
        let mut wrong = 0;
        let mut next = 0;
        while next < count {
            let batch: Vec<u64> = (next..(next + 512).min(count)).collect();
            let mut text = Vec::new();
            for number in &batch {
                let key = format!("key:{number}");
                write!(text, "*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len())?;
            }
            self.output.write_all(&text)?;
            for &number in &batch {
                let header = self.line()?;
                if header != format!("${VALUE}\r\n") {
                    wrong += 1;
                    continue;
                }
                let mut got = vec![0; VALUE + 2];
                self.input.read_exact(&mut got)?;
                wrong += u64::from(got[..VALUE] != value(number)[..]);
            }
            next += batch.len() as u64;
        }
        Ok(wrong)
    }
}

/// The value of a key: different for each, and not compressible to nothing.
fn value(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(VALUE + 8);
    while bytes.len() < VALUE {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(VALUE);
    bytes
}
