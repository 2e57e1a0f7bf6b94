//! Who may run the tree: the decisions of both sides, without I/O.
//!
//! ```text
//!  source                                        destination
//!  tree held                                     tree held, "waiting" said to whoever asks
//!                               ◀─ Prepared ──
//!  1 note: decided
//!  2 SIGSTOP pending: our death does not let it run
//!                               ── Commit ──▶
//!                                                3 note: these tasks may run
//!                                                4 tasks are let go, one after the other
//!                                                5 note: they do run
//!                               ◀─ Running ──
//!  6 tree ended, note removed
//! ```
//!
//! - Death of the source before 2, or of the destination before 4: the tree goes on at the source. Between 1 and 2 the note is
//!   there and the tree runs; the destination, asked, will say that it never ran there.
//! - Death of the destination between 4 and 5: the kernel kills the tasks that were not let go (`PTRACE_O_EXITKILL`, and it
//!   takes a moment). Whoever answers next waits until each is dead or free: [`settle`]. Part of a tree is no tree.
//! - Anything lost after Commit was sent: the source asks until it gets an answer that is a fate: [`fate`].
//!
//! The model in `model.rs` tries every order of these steps, deaths, and losses.

use super::wire::Answer;

#[cfg(test)]
mod model;

/// What a source may conclude from an answer about its tree, after Commit was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// Nothing: it must ask again.
    Unknown,
    /// It runs there.
    Runs {
        /// With all of its memory.
        complete: bool,
    },
    /// It never ran there, and never will.
    NeverRan,
}

/// Draws the conclusion; `None` stands for no answer.
pub fn fate(answer: Option<&Answer>) -> Fate {
    match answer {
        None => Fate::Unknown,
        Some(answer) if answer.running => Fate::Runs {
            complete: answer.complete,
        },
        Some(answer) if answer.waiting => Fate::Unknown,
        Some(_) => Fate::NeverRan,
    }
}

/// A task that was about to run when its server died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotedTask {
    /// It is dead.
    Gone,
    /// It is still traced, or dies.
    Held,
    /// It runs by itself.
    Free,
}

/// What became of a tree whose server died after it was noted that it may run, and before it was noted that it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Settled {
    /// Cannot be told yet.
    NotYet,
    /// All of it runs.
    Runs,
    /// Part of it, or nothing: the rest must be ended before anything is answered.
    Broken,
}

/// Judges such a tree by its tasks.
pub fn settle(tasks: impl IntoIterator<Item = NotedTask>) -> Settled {
    let (mut free, mut gone) = (0, 0);
    for task in tasks {
        match task {
            NotedTask::Held => return Settled::NotYet,
            NotedTask::Free => free += 1,
            NotedTask::Gone => gone += 1,
        }
    }
    if free > 0 && gone == 0 {
        Settled::Runs
    } else {
        Settled::Broken
    }
}
