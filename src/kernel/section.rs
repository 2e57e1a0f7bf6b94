//! Sections that no SIGKILL to this process can stop half-way.
//!
//! Some state of a victim's kernel objects can only be read by changing them for a moment (a TCP connection, by repair
//! mode), and if this process were killed in that moment, they would stay changed. So the moment belongs to another
//! process: one that shares memory and descriptors with us, and whose death we wait for, as after vfork(2). A signal to
//! us does not reach it.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Bytes of stack of the other process.
const STACK: usize = 256 << 10;
/// clone(2): wait also for children that end without a signal.
const WAIT_CLONE: i32 = libc::__WALL;

struct Shared<F, T> {
    work: Option<F>,
    result: Option<Result<T, Box<dyn Any + Send>>>,
}

extern "C" fn body<F: FnOnce() -> T, T>(shared: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `unstoppable` passes a pointer to its own `Shared` of these types and waits, so nobody else uses it.
    let shared = unsafe { &mut *shared.cast::<Shared<F, T>>() };
    if let Some(work) = shared.work.take() {
        shared.result = Some(catch_unwind(AssertUnwindSafe(work)));
    }
    0
}

/// Runs `work` to its end, even if this process is killed meanwhile. It should be short, take no lock and ask for little
/// memory: other threads may die while they hold locks.
pub fn unstoppable<T>(work: impl FnOnce() -> T) -> T {
    fn run<F: FnOnce() -> T, T>(work: F) -> T {
        let mut shared = Shared::<F, T> {
            work: Some(work),
            result: None,
        };
        let mut stack = Vec::<u128>::with_capacity(STACK / size_of::<u128>());
        let started = with_signals_blocked(|| {
            // No CLONE_SETTLS: it is this thread, as it were, that goes on in there; CLONE_VFORK keeps us out meanwhile.
            let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_VFORK;
            let shared = (&raw mut shared).cast::<libc::c_void>();
            // SAFETY: the stack is ours, aligned, large enough for short work, and lives until the other process has ended:
            // with CLONE_VFORK this call returns only then.
            let child = unsafe {
                let top = stack.as_mut_ptr().add(stack.capacity());
                libc::clone(body::<F, T>, top.cast(), flags, shared)
            };
            if child < 0 {
                return Err(io::Error::last_os_error());
            }
            loop {
                // SAFETY: no status is asked for.
                let waited = unsafe { libc::waitpid(child, std::ptr::null_mut(), WAIT_CLONE) };
                if waited >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                    return Ok(());
                }
            }
        });
        match (started, shared.result, shared.work) {
            (_, Some(Ok(result)), _) => result,
            (_, Some(Err(panic)), _) => resume_unwind(panic),
            // No process could be made (a limit): unprotected is better than not at all.
            (_, None, Some(work)) => work(),
            (_, None, None) => unreachable!("work was taken and gave nothing"),
        }
    }
    run(work)
}

fn with_signals_blocked<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: a signal set is plain data; sigfillset initialises it.
    let (mut all, mut before) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    // SAFETY: both point to signal sets of this function.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    let result = work();
    // SAFETY: `before` was filled in above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_gives_its_result_and_sees_memory_and_descriptors() {
        let mut counter = 0;
        let (reader, writer) = io::pipe().unwrap();
        let id = unstoppable(|| {
            counter += 1;
            drop(writer);
            std::process::id()
        });
        assert_eq!(counter, 1);
        assert_ne!(id, std::process::id());
        // The descriptor is closed for us as well.
        assert_eq!(io::Read::read(&mut &reader, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_panic_in_a_section_is_a_panic_here() {
        let result = catch_unwind(|| unstoppable(|| -> () { std::panic::panic_any(7) }));
        assert_eq!(result.unwrap_err().downcast_ref(), Some(&7));
    }

    #[test]
    fn a_section_goes_on_when_its_process_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let (begun, ended) = (directory.path().join("begun"), directory.path().join("ended"));
        // A test binary that runs just the other test, which waits in a section.
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["kernel::section::tests::section_of_the_killed", "--exact", "--ignored"])
            .env("WHIMBREL_TEST_SECTION", directory.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let wait = |path: &std::path::Path| {
            for _ in 0..2000 {
                if path.exists() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            panic!("no {}", path.display());
        };
        wait(&begun);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!ended.exists());
        std::fs::write(directory.path().join("go"), "").unwrap();
        wait(&ended);
    }

    /// Does nothing by itself: it is the process that the test above kills.
    #[test]
    #[ignore = "run by another test"]
    fn section_of_the_killed() {
        let Some(directory) = std::env::var_os("WHIMBREL_TEST_SECTION").map(std::path::PathBuf::from) else {
            return;
        };
        let [begun, go, ended] = ["begun", "go", "ended"].map(|name| directory.join(name));
        unstoppable(|| {
            std::fs::write(begun, "").unwrap();
            for _ in 0..2000 {
                if go.exists() {
                    std::fs::write(&ended, "").unwrap();
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
    }
}
