//! What this kernel can do, found out by trying it.
//!
//! Version numbers lie (distributions backport, configurations leave out, sandboxes forbid), so every probe does the thing
//! itself and looks at the result. Each runs in a short-lived forked child: whatever it changes, maps, opens or
//! breaks is gone with the child.

mod probes;

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A probe that hangs is killed after this time, and counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// How much a feature matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Without it no process can be dumped or restored.
    Required,
    /// Without it something is slower, or some processes are refused.
    Helps,
    /// Neither good nor bad: a fact about this host.
    Fact,
}

/// Why a probe failed: the step that did, and the error number (0 when the step worked but not as it should).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What was tried.
    pub step: String,
    /// The kernel's answer.
    pub errno: i32,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errno {
            0 => write!(f, "{}", self.step),
            errno => write!(f, "{}: {}", self.step, io::Error::from_raw_os_error(errno)),
        }
    }
}

/// What is known of one feature.
#[derive(Clone, Debug)]
pub struct FeatureReport {
    /// Which one.
    pub feature: Feature,
    /// Whether it is there, and if not, why.
    pub result: Result<(), Missing>,
}

/// What this kernel can do.
#[derive(Clone, Debug)]
pub struct KernelFeatures {
    reports: Vec<FeatureReport>,
}

/// Defines the features: the one table that everything else is derived from.
macro_rules! features {
    ($($(#[doc = $doc:expr])+ $variant:ident: $name:literal, $need:ident, $probe:path, $purpose:literal, $without:literal;)*) => {
        /// Something that a kernel may or may not have.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Feature {
            $($(#[doc = $doc])+ $variant,)*
        }

        impl Feature {
            /// All features, in the order of the report.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Short name, the same in reports and JSON.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// How much it matters.
            pub fn need(self) -> Need {
                match self { $(Self::$variant => Need::$need,)* }
            }

            /// What it is for.
            pub fn purpose(self) -> &'static str {
                match self { $(Self::$variant => $purpose,)* }
            }

            /// What is done without it.
            pub fn without(self) -> &'static str {
                match self { $(Self::$variant => $without,)* }
            }

    /// Tries this feature alone.
            ///
            /// # Errors
            /// Why it is not there.
            pub fn try_now(self) -> Result<(), Missing> {
                run(self.probe())
            }

            fn probe(self) -> probes::Probe {
                match self { $(Self::$variant => $probe,)* }
            }
        }
    };
}

features! {
    /// PTRACE_SEIZE and PTRACE_INTERRUPT of a child.
    PtraceSeize: "ptrace-seize", Required, probes::ptrace_seize,
        "stops tasks without signals they could notice", "nothing can be dumped";
    /// PTRACE_GET_RSEQ_CONFIGURATION.
    PtraceRseq: "ptrace-rseq", Helps, probes::ptrace_rseq,
        "reads where a thread registered restartable sequences", "programs that use rseq (every recent glibc) are refused";
    /// PTRACE_SECCOMP_GET_FILTER.
    SeccompFilters: "seccomp-get-filter", Helps, probes::seccomp_get_filter,
        "reads seccomp filters", "programs with seccomp filters are refused";
    /// PTRACE_O_SUSPEND_SECCOMP.
    SuspendSeccomp: "seccomp-suspend", Helps, probes::seccomp_suspend,
        "lets programs with seccomp filters run our system calls", "programs with seccomp filters are refused";
    /// process_vm_readv and process_vm_writev.
    ProcessVm: "process-vm", Required, probes::process_vm,
        "reads and writes the memory of tasks", "nothing can be dumped";
    /// kcmp.
    Kcmp: "kcmp", Required, probes::kcmp,
        "tells which tasks share descriptors, files and memory", "sharing cannot be kept";
    /// pidfd_open.
    PidfdOpen: "pidfd-open", Helps, probes::pidfd_open,
        "holds on to a task without races of pids", "pids are used, with care";
    /// pidfd_getfd.
    PidfdGetfd: "pidfd-getfd", Helps, probes::pidfd_getfd,
        "fetches descriptors from tasks in one call", "descriptors are passed over a socket by injected calls";
    /// clone3 with set_tid.
    SetTid: "clone3-set-tid", Required, probes::clone3_set_tid,
        "restores tasks with the pids they had", "nothing can be restored with its pid";
    /// PR_SET_MM_MAP.
    SetMmMap: "prctl-set-mm-map", Required, probes::set_mm_map,
        "restores the bounds of code, data, heap and stack", "ps and brk would see the bounds of a stranger";
    /// MAP_FIXED_NOREPLACE.
    FixedNoreplace: "map-fixed-noreplace", Helps, probes::fixed_noreplace,
        "maps memory without covering what is there", "mappings are checked beforehand";
    /// memfd_create with seals.
    Memfd: "memfd", Required, probes::memfd,
        "holds the code that runs inside tasks, and shared memory", "nothing can be dumped or restored";
    /// Soft-dirty bits.
    SoftDirty: "soft-dirty", Helps, probes::soft_dirty,
        "finds pages written since the last round (needs a short freeze)", "write protection is used instead (uffd-wp-async)";
    /// PAGEMAP_SCAN.
    PagemapScan: "pagemap-scan", Helps, probes::pagemap_scan,
        "finds pages by category in one call", "pagemap is read word by word";
    /// Userfaultfd with WP_ASYNC, WP_UNPOPULATED and PAGEMAP_SCAN.
    UffdWpAsync: "uffd-wp-async", Helps, probes::uffd_wp_async,
        "finds pages written since the last round, without a freeze", "soft-dirty bits are used; without them all memory is sent in the freeze, or on demand";
    /// Userfaultfd for missing pages.
    UffdMissing: "uffd-missing", Helps, probes::uffd_missing,
        "fetches memory after the program runs (post-copy, lazy-pages)", "all memory is sent before the program goes on";
    /// Userfaultfd events of fork, mremap, madvise and munmap.
    UffdEvents: "uffd-events", Helps, probes::uffd_events,
        "lets programs fork and remap while memory is fetched", "post-copy is refused";
    /// UFFDIO_MOVE.
    UffdMove: "uffd-move", Helps, probes::uffd_move,
        "puts pages in place without copying them", "pages are copied";
    /// TCP_REPAIR with sequence numbers.
    TcpRepair: "tcp-repair", Helps, probes::tcp_repair,
        "takes TCP connections along", "connected TCP sockets are refused";
    /// TCP_REPAIR_WINDOW.
    TcpRepairWindow: "tcp-repair-window", Helps, probes::tcp_repair_window,
        "restores the windows of TCP connections", "connections start with a small window, and may stall for a moment";
    /// nftables tables with an owner.
    NftOwner: "nft-owner", Helps, probes::nft_owner,
        "holds packets back during a dump, and lets go whatever happens to us", "connected TCP sockets are refused";
    /// SO_PEEK_OFF on unix stream sockets.
    PeekOff: "unix-peek-off", Helps, probes::peek_off,
        "reads what waits in unix sockets without taking it out", "unix stream sockets with waiting data are refused";
    /// SO_BUF_LOCK.
    BufLock: "so-buf-lock", Helps, probes::buf_lock,
        "restores whether socket buffers were sized by the program", "buffers of restored sockets keep their size for ever";
    /// PR_TIMER_CREATE_RESTORE_IDS.
    TimerIds: "timer-restore-ids", Helps, probes::timer_ids,
        "creates POSIX timers with the ids they had", "timers are created and deleted until the id comes round";
    /// MEMBARRIER_CMD_GET_REGISTRATIONS.
    Membarrier: "membarrier-registrations", Helps, probes::membarrier,
        "reads which membarrier commands a program registered for", "all of them are registered for after a restore";
    /// Time namespaces.
    TimeNamespace: "time-namespace", Helps, probes::time_namespace,
        "keeps the monotonic clock going on from where it was", "monotonic clocks may jump on another host";
    /// AppArmor is on.
    AppArmor: "apparmor", Fact, probes::apparmor,
        "profiles of tasks are saved and set again", "no profiles on this host";
    /// SELinux is on.
    SeLinux: "selinux", Fact, probes::selinux,
        "labels of tasks are saved and set again", "no labels on this host";
    /// A cgroup v1 hierarchy is mounted.
    CgroupV1: "cgroup-v1", Fact, probes::cgroup_v1,
        "v1 hierarchies are saved and restored", "no v1 hierarchies on this host";
    /// The cgroup v2 hierarchy is mounted.
    CgroupV2: "cgroup-v2", Fact, probes::cgroup_v2,
        "the v2 hierarchy is saved and restored", "no v2 hierarchy on this host";
}

impl KernelFeatures {
    /// Tries everything; takes some tens of milliseconds.
    pub fn probe() -> Self {
        let report = |&feature: &Feature| FeatureReport {
            feature,
            result: run(feature.probe()),
        };
        Self {
            reports: Feature::ALL.iter().map(report).collect(),
        }
    }

    /// Whether a feature is there.
    pub fn has(&self, feature: Feature) -> bool {
        self.why_not(feature).is_none()
    }

    /// Why a feature is not there.
    pub fn why_not(&self, feature: Feature) -> Option<&Missing> {
        self.reports
            .iter()
            .find(|report| report.feature == feature)?
            .result
            .as_ref()
            .err()
    }

    /// All reports, in the order of [`Feature::ALL`].
    pub fn reports(&self) -> &[FeatureReport] {
        &self.reports
    }

    /// The required features that are not there; nothing works while there is one.
    pub fn missing_required(&self) -> Vec<&FeatureReport> {
        let required = |report: &&FeatureReport| report.feature.need() == Need::Required && report.result.is_err();
        self.reports.iter().filter(required).collect()
    }

    /// One JSON array of objects with `name`, `available`, `required`, `purpose`, `without` and, where it failed, `step`,
    /// `errno` and `reason`.
    pub fn to_json(&self) -> String {
        let objects: Vec<String> = self.reports.iter().map(FeatureReport::to_json).collect();
        format!("[{}]", objects.join(","))
    }
}

impl FeatureReport {
    fn to_json(&self) -> String {
        let feature = self.feature;
        let mut json = format!(
            r#"{{"name":{},"available":{},"required":{},"purpose":{},"without":{}"#,
            json_string(feature.name()),
            self.result.is_ok(),
            feature.need() == Need::Required,
            json_string(feature.purpose()),
            json_string(feature.without()),
        );
        if let Err(missing) = &self.result {
            let (step, reason) = (json_string(&missing.step), json_string(&missing.to_string()));
            json += &format!(r#","step":{step},"errno":{},"reason":{reason}"#, missing.errno);
        }
        json + "}"
    }
}

/// One line a feature: `ok` or `no`, its name, and what that means.
impl fmt::Display for KernelFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for report in &self.reports {
            writeln!(f, "{report}")?;
        }
        Ok(())
    }
}

impl fmt::Display for FeatureReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let feature = self.feature;
        match &self.result {
            Ok(()) => write!(f, "ok  {:<24}  {}", feature.name(), feature.purpose()),
            Err(missing) => write!(f, "no  {:<24}  {} ({missing})", feature.name(), feature.without()),
        }
    }
}

fn json_string(text: &str) -> String {
    let mut json = String::from('"');
    for character in text.chars() {
        match character {
            '"' => json += "\\\"",
            '\\' => json += "\\\\",
            control if control < ' ' => json += &format!("\\u{:04x}", control as u32),
            other => json.push(other),
        }
    }
    json.push('"');
    json
}

/// Runs a probe in a child: eight bytes of verdict come back over a pipe, then the step that failed.
fn run(probe: probes::Probe) -> Result<(), Missing> {
    let failed = |step: &str, error: &io::Error| Missing {
        step: step.to_owned(),
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    };
    let (read, write) = pipe().map_err(|error| failed("make a pipe", &error))?;
    // SAFETY: the child runs the probe and leaves through _exit, so nothing of the parent is torn down in it. Memory can be
    // allocated in it (the C library sees to that), and probes use no lock that another thread may hold.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(failed("fork", &io::Error::last_os_error()));
    }
    if pid == 0 {
        let (errno, step) = match probe() {
            Ok(()) => (0, "ok"),
            Err(why) => (why.errno, why.step),
        };
        let message = [&errno.to_ne_bytes()[..], step.as_bytes()].concat();
        // SAFETY: writes a live buffer to our pipe, then ends this child.
        unsafe {
            libc::write(write.as_raw_fd(), message.as_ptr().cast(), message.len());
            libc::_exit(0);
        }
    }
    drop(write);
    let message = read_all(read, Instant::now() + PATIENCE);
    let mut status = 0;
    // SAFETY: `pid` is our own child and not reaped yet, so the number is still its; `status` is a valid place.
    unsafe {
        libc::kill(pid, libc::SIGKILL);
        libc::waitpid(pid, &mut status, 0);
    }
    let Some((errno, step)) = message.split_first_chunk() else {
        let step = if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) != libc::SIGKILL {
            format!("the probe was ended by signal {}", libc::WTERMSIG(status))
        } else {
            String::from("the probe gave no answer")
        };
        return Err(Missing { step, errno: 0 });
    };
    match (i32::from_ne_bytes(*errno), String::from_utf8_lossy(step)) {
        (0, step) if step == "ok" => Ok(()),
        (errno, step) => Err(Missing {
            step: step.into_owned(),
            errno,
        }),
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Reads one message, or nothing when the time is over. (Not until the end: a grandchild may hold the pipe open.)
fn read_all(read: OwnedFd, deadline: Instant) -> Vec<u8> {
    let mut entry = libc::pollfd {
        fd: read.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() as libc::c_int;
        // SAFETY: one valid entry.
        match unsafe { libc::poll(&mut entry, 1, left) } {
            result if result < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            result if result <= 0 => return Vec::new(),
            _ => break,
        }
    }
    let mut buffer = vec![0; 512];
    let count = std::fs::File::from(read).read(&mut buffer).unwrap_or(0);
    buffer.truncate(count);
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptors() -> usize {
        std::fs::read_dir("/proc/thread-self/fd").unwrap().count()
    }

    #[test]
    fn probing_finds_what_every_kernel_that_can_work_has() {
        let features = KernelFeatures::probe();
        println!("{features}");
        assert!(features.missing_required().is_empty(), "{features}");
        assert_eq!(features.to_string().lines().count(), Feature::ALL.len());
        for report in features.reports().iter().filter(|report| report.result.is_err()) {
            let missing = report.result.as_ref().unwrap_err();
            assert!(!missing.step.starts_with("the probe"), "{report}");
        }
        let json = features.to_json();
        assert!(json.starts_with(r#"[{"name":"ptrace-seize","available":true,"required":true,"#));
        assert_eq!(json.matches("\"name\"").count(), Feature::ALL.len());
    }

    #[test]
    fn a_probe_that_crashes_or_fails_is_told_apart() {
        let crash = run(|| {
            // SAFETY: ends the forked child, as a crash would.
            unsafe { libc::abort() }
        });
        assert_eq!(crash.unwrap_err().step, "the probe was ended by signal 6");
        let failure = run(|| {
            Err(probes::Why {
                errno: libc::ENOSYS,
                step: "try it",
            })
        });
        assert!(failure.unwrap_err().to_string().starts_with("try it: "));
        assert_eq!(run(|| Ok(())), Ok(()));
    }

    #[test]
    fn json_strings_are_escaped() {
        assert_eq!(json_string("a\"b\\c\nd é"), "\"a\\\"b\\\\c\\u000ad é\"");
    }

    #[test]
    fn the_process_is_as_before_after_probing() {
        let namespace = |name: &str| std::fs::read_link(format!("/proc/thread-self/ns/{name}")).unwrap();
        let before = (namespace("net"), namespace("time_for_children"));
        // Other tests open descriptors meanwhile, so a few may come and go.
        let count = descriptors();
        KernelFeatures::probe();
        assert!(descriptors() < count + 12);
        assert_eq!(before, (namespace("net"), namespace("time_for_children")));
    }
}
