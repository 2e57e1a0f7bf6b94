//! What end-to-end tests share: hosts that are namespaces, the tool running in them, and programs that are moved.

// Every test binary compiles this and uses its own part of it.
#![allow(dead_code, unused_imports)]

pub mod facts;
pub mod flavour;
pub mod host;
pub mod leftovers;
pub mod place;
pub mod program;
pub mod redis;
pub mod tool;
pub mod victim;

use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use host::{Host, Hosts};
pub use tool::{Migration, Serve};
pub use victim::Victim;

/// How long anything may take before a test gives up: generous, for no test is about time.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Tells why a test does nothing here. `tests/run` collects these lines and compares them with `tests/expected-skips`.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
}

/// Is there such a program in the path?
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// May hosts be made here? Says why not.
pub fn can_make_hosts() -> bool {
    let missing = ["unshare", "nsenter", "setpriv", "ip", "nft"]
        .into_iter()
        .find(|program| !installed(program));
    if let Some(program) = missing {
        skip(&format!("{program} is not installed"));
    } else if !rustix::process::geteuid().is_root() {
        skip("hosts need root");
    } else {
        return true;
    }
    false
}

/// Is the Python that tests use installed? Says so when it is not.
pub fn has_python() -> bool {
    let found = std::path::Path::new(victim::PYTHON).exists();
    if !found {
        skip(&format!("{} is not installed", victim::PYTHON));
    }
    found
}

/// Runs one test at a time among those that ask for it, across all threads of a test binary.
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Waits until `condition` gives something.
///
/// # Panics
/// When it does not, with the name of what was waited for.
pub fn wait_for<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    wait_or(condition, || what.to_owned())
}

/// As [`wait_for`]; what was waited for, and how things stand, is asked when it was in vain.
///
/// # Panics
/// As [`wait_for`].
pub fn wait_or<T>(mut condition: impl FnMut() -> Option<T>, explain: impl FnOnce() -> String) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {}", explain());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A program of `tests/programs`.
pub fn program(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/programs")
        .join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// The Weyl sequence of the golden ratio: evenly spread over 0..1, in no regular order, the same in each run.
pub fn spread(index: usize) -> f64 {
    (index as f64 * 0.618_033_988_749_894_9).fract()
}

/// A number from the environment.
pub fn setting(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}
