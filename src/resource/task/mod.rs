//! What belongs to a task or a thread itself.

pub mod attributes;
pub mod credentials;
pub mod limits;
pub mod schedule;
pub mod signals;
pub mod timers;
