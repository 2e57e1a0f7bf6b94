//! Ctrl-C and SIGTERM: roll back and end, as long as there is a way back.
//!
//! The rollback is the end of this process: the kernel lets go of what it traces, a tree that was frozen goes on, and one
//! that was being restored is killed (PTRACE_O_EXITKILL). What is left to do are files.

use std::sync::{Arc, Mutex, PoisonError};

use whimbrel::error::{Context, Result};

/// A way back, watched over by a thread.
#[derive(Clone)]
pub struct Cancel(Arc<Mutex<State>>);

enum State {
    /// There is a way back: after this clean-up.
    Armed(Option<Box<dyn FnOnce() + Send>>, &'static str),
    /// There is none, and the end is near: signals wait.
    Finishing,
    /// All is done: a signal ends this process, and nothing else.
    Done,
}

impl Cancel {
    /// From now on a signal runs `clean_up` and ends this process with status 1; the log ends with `last_line`.
    ///
    /// # Errors
    /// When signals cannot be watched.
    pub fn arm(last_line: &'static str, clean_up: impl FnOnce() + Send + 'static) -> Result<Cancel> {
        use tokio::signal::unix::{SignalKind, signal};
        let cancel = Cancel(Arc::new(Mutex::new(State::Armed(Some(Box::new(clean_up)), last_line))));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("watch signals")?;
        let guard = runtime.enter();
        let mut interrupt = signal(SignalKind::interrupt()).context("watch signals")?;
        let mut terminate = signal(SignalKind::terminate()).context("watch signals")?;
        drop(guard);
        let watched = cancel.clone();
        let watch = async move {
            loop {
                let (name, number) = tokio::select! {
                    _ = interrupt.recv() => ("SIGINT", libc::SIGINT),
                    _ = terminate.recv() => ("SIGTERM", libc::SIGTERM),
                };
                watched.signal(name, number);
            }
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || runtime.block_on(watch))
            .context("watch signals")?;
        Ok(cancel)
    }

    /// There is a way back again, with another clean-up.
    pub fn arm_again(&self, last_line: &'static str, clean_up: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::Armed(Some(Box::new(clean_up)), last_line);
    }

    /// There is no way back from here: signals wait until all is done.
    pub fn disarm(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::Finishing;
    }

    /// All is done: signals end this process again.
    pub fn done(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::Done;
    }

    /// Rolls back and ends this process, where there is a way back.
    pub fn fail(&self, why: &str) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The lock is held until the end, so that nobody goes past the point of no return meanwhile.
        if let State::Armed(clean_up, last_line) = &mut *state {
            if let Some(clean_up) = clean_up.take() {
                clean_up();
            }
            tracing::error!("{why}");
            tracing::error!("{last_line}");
            std::process::exit(1);
        }
    }

    fn signal(&self, name: &str, number: i32) {
        self.fail(&format!("cancelled by {name}"));
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*state, State::Done) {
            std::process::exit(128 + number);
        }
    }
}
