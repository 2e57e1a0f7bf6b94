//! What /proc says of a process, as far as a move must not change it.
//!
//! What is compared, and what is not:
//! - mappings with their flags. Adjacent ones that differ in nothing are taken as one, for the kernel joins and splits them
//!   as it likes; inode numbers of memory that has no name (shared anonymous memory, memfds, deleted files) are not compared,
//!   nor the flags `sd` (soft-dirty), `um`, `uw` (userfaultfd).
//! - status and stat, of each thread, without times, faults, sizes of what is resident, context switches, the processor it
//!   ran on last and the start time; FDSize, the room of the descriptor table, grows as the kernel likes.
//! - descriptors: what they lead to, position, flags, and what the kernel tells of their kind, without inode numbers of
//!   what has no name, and without the time left of timers.
//! - of flock(2) locks, not the process that once asked for them: they belong to the open file.
//! - limits, POSIX timers (in the order of their ids), command line, environment, auxiliary vector, executable, working directory, root, and the
//!   attributes that have a file of their own.

use std::collections::BTreeMap;
use std::path::Path;

use super::host::Host;

/// What is known of a process: names and values.
pub type Facts = BTreeMap<String, String>;

/// Looks at a process, as its host numbers it.
pub fn facts(host: &Host, pid: i32) -> Facts {
    let mut facts = Facts::new();
    let read = |file: &str| host.read_proc(pid, file);
    for name in [
        "cmdline",
        "environ",
        "auxv",
        "comm",
        "limits",
        "oom_score_adj",
        "coredump_filter",
        "timerslack_ns",
        "personality",
        "cgroup",
        "loginuid",
        "sessionid",
        "uid_map",
        "gid_map",
        "setgroups",
    ] {
        let bytes = std::fs::read(host.proc(pid, name)).unwrap_or_default();
        facts.insert(name.into(), bytes.escape_ascii().to_string());
    }
    for name in ["exe", "cwd", "root"] {
        facts.insert(name.into(), link(&host.proc(pid, name)));
    }
    for (start, mapping) in mappings(&read("smaps")) {
        facts.insert(format!("mapping {start:012x}"), mapping);
    }
    for entry in std::fs::read_dir(host.proc(pid, "ns")).into_iter().flatten().flatten() {
        facts.insert(format!("ns {}", entry.file_name().display()), link(&entry.path()));
    }
    for entry in std::fs::read_dir(host.proc(pid, "fd")).into_iter().flatten().flatten() {
        let fd = entry.file_name().into_string().unwrap();
        facts.insert(format!("fd {fd}"), without_inode(&link(&entry.path())));
        // What an epoll instance watches is listed in the order of kernel addresses.
        let info = read(&format!("fdinfo/{fd}"));
        let mut lines: Vec<String> = info.lines().filter_map(stable_fdinfo).collect();
        lines.sort();
        for (number, line) in lines.into_iter().enumerate() {
            facts.insert(format!("fdinfo {fd}, line {number:02}"), line);
        }
    }
    for thread in std::fs::read_dir(host.proc(pid, "task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let tid = thread.file_name().into_string().unwrap();
        facts.insert(format!("thread {tid} comm"), read(&format!("task/{tid}/comm")));
        for line in read(&format!("task/{tid}/status")).lines() {
            if let Some((name, value)) = line.split_once(':')
                && !VOLATILE_STATUS.contains(&name)
            {
                facts.insert(format!("thread {tid} status {name}"), value.trim().to_owned());
            }
        }
        let stat = read(&format!("task/{tid}/stat"));
        let fields: Vec<&str> = stat
            .rsplit_once(") ")
            .map_or(Vec::new(), |(_, rest)| rest.split_whitespace().collect());
        for &(name, number) in STABLE_STAT {
            // The first field after the name is the third.
            facts.insert(
                format!("thread {tid} stat {name}"),
                fields.get(number - 3).unwrap_or(&"").to_string(),
            );
        }
    }
    // ID, signal, notify and ClockID of each timer, the last made first.
    let timers = read("timers");
    let mut timers: Vec<String> = timers
        .lines()
        .collect::<Vec<_>>()
        .chunks(4)
        .map(|lines| lines.join(", "))
        .collect();
    timers.sort();
    facts.insert("timers".into(), timers.join("; "));
    facts
}

/// Lines of status that change by themselves.
const VOLATILE_STATUS: &[&str] = &[
    "State",
    "FDSize",
    "VmPeak",
    "VmHWM",
    "VmRSS",
    "RssAnon",
    "RssFile",
    "RssShmem",
    "VmPTE",
    "VmSwap",
    "SigQ",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];

/// Fields of stat that do not, by their numbers in proc_pid_stat(5).
const STABLE_STAT: &[(&str, usize)] = &[
    ("parent", 4),
    ("group", 5),
    ("session", 6),
    ("terminal", 7),
    ("foreground group", 8),
    ("priority", 18),
    ("nice", 19),
    ("threads", 20),
    ("virtual size", 23),
    ("resident limit", 25),
    ("start of code", 26),
    ("end of code", 27),
    ("start of stack", 28),
    ("exit signal", 38),
    ("real-time priority", 40),
    ("policy", 41),
    ("start of data", 45),
    ("end of data", 46),
    ("start of heap", 47),
    ("start of arguments", 48),
    ("end of arguments", 49),
    ("start of environment", 50),
    ("end of environment", 51),
    ("exit code", 52),
];

fn link(path: &Path) -> String {
    std::fs::read_link(path).unwrap_or_default().display().to_string()
}

/// `socket:[123]` and the like, without the number. Ghosts of CRIU's kind keep their names.
fn without_inode(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, _)) => kind.to_owned(),
        None => target.to_owned(),
    }
}

/// A line of fdinfo without what differs from one kernel object to the next.
fn stable_fdinfo(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match *words.first()? {
        "ticks:" | "ino:" | "mnt_id:" | "it_value:" | "eventfd-id:" | "scm_fds:" => None,
        // lock: 1: FLOCK ADVISORY WRITE pid device:inode start end
        "lock:" if words[2] == "FLOCK" => Some([&words[2..5], &words[6..]].concat().join(" ")),
        "lock:" => Some(words[2..].join(" ")),
        // tfd: 5 events: 19 data: 5 pos:0 ino:400 sdev:f
        "tfd:" => Some(
            words
                .iter()
                .take_while(|word| !word.starts_with("pos:"))
                .copied()
                .collect::<Vec<_>>()
                .join(" "),
        ),
        _ => Some(words.join(" ")),
    }
}

/// Mappings of smaps with where they start, and with their flags; see the top of this file.
fn mappings(smaps: &str) -> Vec<(u64, String)> {
    // start, end, what it is, offset where it is a file's
    let mut all: Vec<(u64, u64, String, Option<u64>)> = Vec::new();
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some((start, end)) = words[0].split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            let name = words.get(5..).unwrap_or_default().join(" ");
            let nameless = name.is_empty() || name.starts_with('[') || name.ends_with("(deleted)");
            let id = if nameless { "" } else { words[4] };
            let offset = (words[4] != "0").then(|| u64::from_str_radix(words[2], 16).unwrap_or_default());
            all.push((start, end, format!("{} {id} {name}", words[1]), offset));
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let kept: Vec<&str> = flags
                .split_whitespace()
                .filter(|flag| !["sd", "um", "uw"].contains(flag))
                .collect();
            if let Some(last) = all.last_mut() {
                last.2.push_str(&format!(" {}", kept.join(" ")));
            }
        }
    }
    let mut joined: Vec<(u64, u64, String, Option<u64>)> = Vec::new();
    for (start, end, what, offset) in all {
        if let Some(last) = joined.last_mut()
            && last.1 == start
            && last.2 == what
            && last.3.map(|offset| offset + start - last.0) == offset
        {
            last.1 = end;
        } else {
            joined.push((start, end, what, offset));
        }
    }
    joined
        .into_iter()
        .map(|(start, end, what, offset)| (start, format!("{start:x}-{end:x} {what} {offset:x?}")))
        .collect()
}

/// Every difference, one a line.
pub fn differences(before: &Facts, after: &Facts) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let differs = |name: &&String| before.get(*name) != after.get(*name);
    let shown = |name: &String| format!("{name}: {:?} → {:?}", before.get(name), after.get(name));
    names.into_iter().filter(differs).map(shown).collect()
}

/// What is known of all processes of a host but its first one and those that `left_out` names: which there are, and the facts of
/// each, under its pid.
pub fn facts_of_all(host: &Host, left_out: impl Fn(i32) -> bool) -> Facts {
    let mut all = Facts::new();
    let pids: Vec<i32> = (host.processes().into_iter())
        .filter(|&pid| pid != 1 && !left_out(pid))
        .collect();
    for &pid in &pids {
        // A zombie has no memory and no files, and /proc says little else of it.
        let zombie = host.read_proc(pid, "stat").contains(") Z ");
        if zombie {
            all.insert(
                format!("{pid} zombie"),
                host.read_proc(pid, "stat")
                    .split(' ')
                    .skip(1)
                    .take(5)
                    .collect::<Vec<_>>()
                    .join(" "),
            );
        } else {
            all.extend(
                facts(host, pid)
                    .into_iter()
                    .map(|(name, value)| (format!("{pid} {name}"), value)),
            );
        }
    }
    all.insert("processes".into(), format!("{pids:?}"));
    all
}
