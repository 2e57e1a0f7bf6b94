//! Driving tasks from outside: stopped tracees, their memory, and programs of system calls that they run for us.
//!
//! All ptrace calls come from one thread of the controller (ptrace(2): "ptrace commands are always sent to a specific
//! tracee … by the tracer", which is a thread). Memory may be read and written from any thread.

pub mod inject;
pub mod memory;
pub mod program;
pub mod seed;
pub mod tracee;

pub use inject::{Channel, Gadgets, StubProcess};
pub use memory::{RemoteAddr, RemoteMemory};
pub use program::{Arg, Buffer, CallId, Expect, Outcome, Program};
pub use seed::{Arena, Newborn, Puppet};
pub use tracee::{Running, StopReason, Stopped, Waited};
