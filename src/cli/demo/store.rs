//! The embedded workload: a key-value server that speaks enough of Redis's protocol for the demo's client.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

type Keys = Arc<Mutex<HashMap<Vec<u8>, Vec<u8>>>>;

/// Serves for ever.
///
/// # Errors
/// When the port cannot be listened on.
pub fn serve(port: u16) -> std::io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    let keys = Keys::default();
    for stream in listener.incoming() {
        let (stream, keys) = (stream?, keys.clone());
        std::thread::spawn(move || answer(stream, &keys));
    }
    Ok(())
}

fn answer(stream: TcpStream, keys: &Keys) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::with_capacity(1 << 16, stream.try_clone()?);
    let mut output = std::io::BufWriter::new(stream);
    while let Some(words) = command(&mut input)? {
        let reply = run(&words, keys);
        output.write_all(&reply)?;
        // Replies of a pipeline leave together.
        if input.buffer().is_empty() {
            output.flush()?;
        }
    }
    Ok(())
}

/// Reads one array of bulk strings.
fn command(input: &mut impl BufRead) -> std::io::Result<Option<Vec<Vec<u8>>>> {
    let Some(count) = header(input, b'*')? else {
        return Ok(None);
    };
    let mut words = Vec::new();
    for _ in 0..count.min(16) {
        let Some(length) = header(input, b'$')? else {
            return Ok(None);
        };
        let mut word = vec![0; length.min(1 << 20) + 2];
        input.read_exact(&mut word)?;
        word.truncate(word.len() - 2);
        words.push(word);
    }
    Ok(Some(words))
}

fn header(input: &mut impl BufRead, kind: u8) -> std::io::Result<Option<usize>> {
    let mut line = Vec::new();
    if input.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    let number = line
        .strip_prefix(&[kind])
        .and_then(|rest| std::str::from_utf8(rest).ok()?.trim().parse().ok());
    number
        .map(Some)
        .ok_or_else(|| std::io::Error::other("not the protocol"))
}

fn run(words: &[Vec<u8>], keys: &Keys) -> Vec<u8> {
    let mut keys = keys.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match words {
        [verb, key, value] if verb == b"SET" => {
            keys.insert(key.clone(), value.clone());
            b"+OK\r\n".to_vec()
        }
        [verb, key] if verb == b"GET" => match keys.get(key) {
            Some(value) => [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat(),
            None => b"$-1\r\n".to_vec(),
        },
        [verb, key] if verb == b"INCR" => {
            let old = keys
                .get(key)
                .and_then(|value| std::str::from_utf8(value).ok()?.parse::<u64>().ok());
            let new = old.unwrap_or(0) + 1;
            keys.insert(key.clone(), new.to_string().into_bytes());
            format!(":{new}\r\n").into_bytes()
        }
        _ => b"-ERR unknown command\r\n".to_vec(),
    }
}
