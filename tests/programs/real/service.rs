//! A service of tokio with threads: PORT. service_client.py has its protocol.

use std::collections::HashMap;
use std::io::Result;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

#[derive(Default)]
struct State {
    sums: Mutex<HashMap<String, u64>>,
    ticks: AtomicU64,
}

async fn serve(stream: TcpStream, state: Arc<State>) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    while let Some(line) = lines.next_line().await? {
        let (name, number) = line.split_once(' ').unwrap_or((&line, "0"));
        let sum = {
            let mut sums = state.sums.lock().unwrap();
            let sum = sums.entry(name.to_owned()).or_default();
            *sum += number.parse::<u64>().unwrap_or_default();
            *sum
        };
        let answer = format!("{name} {sum} {} right\n", state.ticks.load(Relaxed));
        writer.write_all(answer.as_bytes()).await?;
    }
    Ok(())
}

#[tokio::main(worker_threads = 3)]
async fn main() -> Result<()> {
    let port: u16 = std::env::args()
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or_default();
    let listener = TcpListener::bind(("0.0.0.0", port)).await?;
    let state = Arc::new(State::default());
    let ticking = state.clone();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(Duration::from_millis(5));
        loop {
            interval.tick().await;
            ticking.ticks.fetch_add(1, Relaxed);
        }
    });
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve(stream, state.clone()));
    }
}
