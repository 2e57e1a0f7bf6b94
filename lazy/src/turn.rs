//! Which of a task's threads listens for events.
//!
//! One at a time does. It goes off to answer a fault, and is mostly back before another thread could have been woken: so
//! the others are not woken for it. They look now and then whether somebody has been away for long.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a thread looks whether nobody listens, while there are faults.
const LOOK: Duration = Duration::from_millis(1);
/// After so long without a fault it sleeps until it is woken.
const QUIET: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Turns {
    listening: bool,
    /// When somebody went off last.
    left: Option<Instant>,
    /// Threads that sleep until they are woken.
    asleep: usize,
}

/// The turn to listen, which one thread has.
#[derive(Default)]
pub(crate) struct Turn {
    turns: Mutex<Turns>,
    free: Condvar,
}

/// The turn, while it is had. Dropped, it goes to whoever waits for it, at once.
pub(crate) struct Held<'a>(&'a Turn);

impl Turn {
    /// Waits for the turn.
    pub(crate) fn take(&self) -> Held<'_> {
        let mut turns = self.lock();
        while turns.listening {
            let busy = turns.left.is_some_and(|left| left.elapsed() < QUIET);
            if busy {
                let woken = self.free.wait_timeout(turns, LOOK);
                turns = woken.unwrap_or_else(PoisonError::into_inner).0;
            } else {
                turns.asleep += 1;
                turns = self.free.wait(turns).unwrap_or_else(PoisonError::into_inner);
                turns.asleep -= 1;
            }
        }
        turns.listening = true;
        Held(self)
    }

    /// The turn, if nobody has it.
    pub(crate) fn try_take(&self) -> Option<Held<'_>> {
        let mut turns = self.lock();
        (!std::mem::replace(&mut turns.listening, true)).then(|| Held(self))
    }

    fn lock(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held<'_> {
    /// Goes off for a moment, with nothing left to do for anybody else.
    pub(crate) fn leave_for_a_moment(self) {
        let mut turns = self.0.lock();
        turns.listening = false;
        turns.left = Some(Instant::now());
        if turns.asleep > 0 {
            self.0.free.notify_one();
        }
        drop(turns);
        std::mem::forget(self);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.lock().listening = false;
        self.0.free.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_listens_and_another_does_when_it_stays_away() {
        let turn = Turn::default();
        let held = turn.take();
        assert!(turn.try_take().is_none());
        std::thread::scope(|scope| {
            let other = scope.spawn(|| drop(turn.take()));
            // It does not come back: the other must find out by itself.
            held.leave_for_a_moment();
            other.join().unwrap();
            let held = turn.take();
            let others: Vec<_> = (0..3).map(|_| scope.spawn(|| drop(turn.take()))).collect();
            drop(held);
            others.into_iter().for_each(|other| other.join().unwrap());
        });
        assert!(turn.try_take().is_some());
    }
}
