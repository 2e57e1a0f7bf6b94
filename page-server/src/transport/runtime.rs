//! The threads that drive endpoints.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::Notify;

/// How often the keeper of a [`DirectRuntime`] looks after an endpoint that callers drive: acknowledgements wait for it.
const TICK: Duration = Duration::from_millis(3);

/// After so many ticks without a caller the keeper drives the endpoint by itself again.
const IDLE_TICKS: u32 = 30;

/// Polls of the runtime in a tick: what arrives goes from the socket to its connection, and from there to its stream.
const POLLS: u32 = 4;

/// The threads that drive endpoints, for programs that are not async themselves.
#[derive(Debug)]
pub struct Runtime(tokio::runtime::Runtime);

impl Runtime {
    /// A runtime with this many threads.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(threads: usize) -> io::Result<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder
            .worker_threads(threads.max(1))
            .thread_name("whimbrel-net")
            .enable_all()
            .build()
            .map(Self)
    }

    /// A runtime of one thread, which calls `prepare` first: to get a priority, say.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn of_one(prepare: fn()) -> io::Result<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder
            .worker_threads(1)
            .thread_name("whimbrel-net1")
            .on_thread_start(prepare)
            .enable_all()
            .build()
            .map(Self)
    }

    /// Runs a future to its end on this thread.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.0.block_on(future)
    }

    /// The handle of the runtime.
    pub fn handle(&self) -> &tokio::runtime::Handle {
        self.0.handle()
    }
}

/// A runtime that is driven by the very thread that waits for an answer: it sends the question, sleeps in the kernel until
/// something arrives, and takes the answer from the socket, without another thread in between.
///
/// A *keeper* drives it while nobody waits. It steps aside for callers, and comes back now and then as long as they keep
/// coming.
#[derive(Debug)]
pub struct DirectRuntime {
    direct: Arc<Direct>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
pub(super) struct Direct {
    runtime: tokio::runtime::Runtime,
    /// Counts callers.
    asked: AtomicU64,
    /// Whether the keeper drives.
    holding: AtomicBool,
    step_aside: Notify,
    stopping: AtomicBool,
}

impl DirectRuntime {
    /// A runtime with its keeper, whose thread calls `prepare` first. It must have the callers' priority: while it drives,
    /// they wait for it.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new(prepare: fn()) -> io::Result<Self> {
        let direct = Arc::new(Direct {
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            asked: AtomicU64::new(0),
            holding: AtomicBool::new(false),
            step_aside: Notify::new(),
            stopping: AtomicBool::new(false),
        });
        let kept = direct.clone();
        let keeper = std::thread::Builder::new()
            .name("whimbrel-keeper".into())
            .spawn(move || {
                prepare();
                kept.keep();
            })?;
        Ok(Self {
            direct,
            keeper: Some(keeper),
        })
    }

    /// Runs a future to its end on this thread, which drives the runtime meanwhile.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.direct.block_on(future)
    }

    /// The handle of the runtime.
    pub fn handle(&self) -> &tokio::runtime::Handle {
        self.direct.handle()
    }

    pub(super) fn direct(&self) -> Arc<Direct> {
        self.direct.clone()
    }
}

impl Drop for DirectRuntime {
    fn drop(&mut self) {
        self.direct.stopping.store(true, Ordering::Release);
        self.direct.step_aside.notify_one();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}

impl Direct {
    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.holding.load(Ordering::Acquire) {
            self.step_aside.notify_one();
        }
        self.runtime.block_on(future)
    }

    pub(super) fn handle(&self) -> &tokio::runtime::Handle {
        self.runtime.handle()
    }

    fn keep(&self) {
        let (mut seen, mut idle) = (0, IDLE_TICKS);
        while !self.stopping.load(Ordering::Acquire) {
            if idle >= IDLE_TICKS {
                self.holding.store(true, Ordering::Release);
                self.runtime.block_on(self.step_aside.notified());
                self.holding.store(false, Ordering::Release);
                idle = 0;
                continue;
            }
            std::thread::sleep(TICK);
            self.runtime.block_on(async {
                for _ in 0..POLLS {
                    tokio::task::yield_now().await;
                }
            });
            let asked = self.asked.load(Ordering::Relaxed);
            idle = if asked == seen { idle + 1 } else { 0 };
            seen = asked;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_run_whether_somebody_waits_or_not() {
        let runtime = DirectRuntime::new(|| ()).unwrap();
        for _ in 0..3 {
            let (tell, told) = std::sync::mpsc::channel();
            runtime.handle().spawn(async move {
                tokio::time::sleep(Duration::from_millis(1)).await;
                tell.send(()).unwrap();
            });
            // Nobody but the keeper can have done it.
            told.recv_timeout(Duration::from_secs(10)).unwrap();
            // And a caller is not held up by the keeper, whichever of the two drives.
            let answer = runtime.block_on(async {
                tokio::time::sleep(Duration::from_millis(1)).await;
                7
            });
            assert_eq!(answer, 7);
        }
        // Callers at once: one drives for all of them.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| runtime.block_on(async { tokio::time::sleep(Duration::from_millis(2)).await }));
            }
        });
    }
}
