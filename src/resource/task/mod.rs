//! What belongs to a task or a thread itself.

pub mod affinity;
pub mod attributes;
pub mod core_filter;
pub mod credentials;
pub mod dispatch;
pub mod io_priority;
pub mod limits;
pub mod login;
pub mod machine_check;
pub mod membarrier;
pub mod numa;
pub mod schedule;
pub mod seccomp;
pub mod signals;
pub mod speculation;
pub mod tables;
#[cfg(test)]
mod testing;
pub mod time_stamp;
pub mod timer_slack;
pub mod timers;

use crate::remote::Program;

/// Adds calls that write a small file from inside the task. A refusal is no error: such files are hints.
fn write_file(program: &mut Program, path: &str, contents: &[u8]) {
    let (path, data) = (program.string(path.as_bytes()), program.data(contents));
    let args = [libc::AT_FDCWD.into(), path.into(), libc::O_WRONLY.into(), 0.into()];
    let file = program.try_call(libc::SYS_openat, &args);
    program.try_call(libc::SYS_write, &[file.into(), data.into(), contents.len().into()]);
    program.try_call(libc::SYS_close, &[file.into()]);
}
