//! Nothing of the tool may be left behind: neither in a host, nor in a program that it had in its hands.

use super::host::Host;
use super::wait_for;

/// What a process looks like from outside, as far as a visit of the tool must not change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looks {
    /// Mappings, without those that a program changes by itself: heap, stack and anonymous ones.
    pub mappings: Vec<String>,
    /// Executable mappings, all of them.
    pub executable: Vec<String>,
    /// Descriptors and what they lead to.
    pub descriptors: Vec<String>,
    /// Tracer, threads, signals blocked, ignored and caught.
    pub status: Vec<String>,
}

impl Looks {
    /// Looks at a process, as its host numbers it.
    pub fn at(host: &Host, pid: i32) -> Looks {
        let maps = host.read_proc(pid, "maps");
        let name = |line: &str| line.split_whitespace().nth(5).map(str::to_owned);
        let range = |line: &str| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        let named = |line: &&str| name(line).is_some_and(|name| !matches!(name.as_str(), "[heap]" | "[stack]"));
        let executable = |line: &&str| {
            line.split_whitespace()
                .nth(1)
                .is_some_and(|access| access.contains('x'))
        };
        let entries = std::fs::read_dir(host.proc(pid, "fd")).into_iter().flatten().flatten();
        let shown = |entry: std::fs::DirEntry| {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            format!("{} → {}", entry.file_name().to_string_lossy(), target.display())
        };
        let mut descriptors: Vec<String> = entries.map(shown).collect();
        descriptors.sort();
        let status = host.read_proc(pid, "status");
        let kept = ["TracerPid", "SigIgn", "SigCgt", "Seccomp", "CoreDumping"];
        let kept = status
            .lines()
            .filter(|line| kept.iter().any(|name| line.starts_with(name)));
        let mut status: Vec<String> = kept.map(str::to_owned).collect();
        // While it visits a thread, the tool blocks all signals.
        for thread in std::fs::read_dir(host.proc(pid, "task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let text = std::fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            if text.contains("SigBlk:\tffffffff") {
                status.push(format!("thread {} blocks all signals", thread.file_name().display()));
            }
        }
        assert!(
            !maps.is_empty() && !descriptors.is_empty(),
            "process {pid} is gone from {}",
            host.name
        );
        Looks {
            mappings: maps
                .lines()
                .filter(named)
                .map(|line| format!("{} {:?}", range(line), name(line)))
                .collect(),
            executable: maps.lines().filter(executable).map(range).collect(),
            descriptors,
            status,
        }
    }

    /// What is here and not there, and the other way round.
    pub fn unlike(&self, other: &Looks) -> Vec<String> {
        let lines = |looks: &Looks| {
            [
                &looks.mappings[..],
                &looks.executable,
                &looks.descriptors,
                &looks.status,
            ]
            .concat()
        };
        let (ours, theirs) = (lines(self), lines(other));
        let new = ours
            .iter()
            .filter(|line| !theirs.contains(line))
            .map(|line| format!("+ {line}"));
        new.chain(
            theirs
                .iter()
                .filter(|line| !ours.contains(line))
                .map(|line| format!("- {line}")),
        )
        .collect()
    }

    /// Waits until the process looks like this again: a stub restores its thread a moment after the tool's death.
    pub fn must_return(&self, host: &Host, pid: i32, when: &str) {
        let deadline = std::time::Instant::now() + super::PATIENCE / 6;
        loop {
            let now = Looks::at(host, pid);
            if now == *self {
                return;
            }
            if std::time::Instant::now() > deadline {
                panic!(
                    "{when}: process {pid} keeps traces of the tool: {:#?}",
                    now.unlike(self)
                );
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Host {
    /// No packet filter of the tool may be left.
    pub fn has_no_network_lock(&self, when: &str) {
        wait_for(&format!("{when}: the network lock goes"), || {
            let tables = self.shell("nft list tables");
            (!tables.contains("whimbrel")).then_some(())
        });
    }

    /// No process may be left but those that `known` accepts: tools, seeds, helpers. The host's first process is known.
    pub fn has_only(&self, when: &str, known: impl Fn(i32, &str) -> bool) {
        wait_for(
            &format!("{when}: only known processes on {}: {:?}", self.name, self.list()),
            || {
                let stranger = |&pid: &i32| {
                    let line = self.read_proc(pid, "cmdline").replace('\0', " ");
                    pid != 1 && self.proc(pid, "").exists() && !known(pid, &line)
                };
                (!self.processes().iter().any(stranger)).then_some(())
            },
        );
    }

    /// Its processes with their command lines and states.
    pub fn list(&self) -> Vec<String> {
        let line = |pid: i32| {
            let stat = self.read_proc(pid, "stat");
            format!("{stat:.60} {}", self.read_proc(pid, "cmdline").replace('\0', " "))
        };
        self.processes().into_iter().map(line).collect()
    }
}
