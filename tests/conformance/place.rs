//! Where promises are asked: a host, or two of which the second takes programs over.

use std::path::PathBuf;

use crate::common::host::{Host, Hosts};
use crate::common::tool::{Serve, binary};
use crate::flavour::Flavour;

/// A place in which one worker asks one promise after the other.
pub struct Place {
    // Before the hosts, so that it ends before them.
    _serve: Option<Serve>,
    hosts: Kind,
    tool: PathBuf,
}

enum Kind {
    One(Host, tempfile::TempDir),
    Two(Box<Hosts>),
}

impl Place {
    /// A place for a flavour.
    pub fn new(flavour: &Flavour) -> Place {
        let tool = std::fs::canonicalize(binary()).unwrap();
        if flavour.is("two hosts") {
            let hosts = Hosts::new();
            let serve = flavour.is("migrated").then(|| hosts.b.serve());
            return Place {
                _serve: serve,
                hosts: Kind::Two(Box::new(hosts)),
                tool,
            };
        }
        let directory = tempfile::Builder::new()
            .prefix("whimbrel-test-")
            .disable_cleanup(std::env::var_os("WHIMBREL_TEST_KEEP").is_some())
            .tempdir()
            .unwrap();
        let host = Host::new("lone", directory.path(), 2000);
        Place {
            _serve: None,
            hosts: Kind::One(host, directory),
            tool,
        }
    }

    /// Where programs start.
    pub fn source(&self) -> &Host {
        match &self.hosts {
            Kind::One(host, _) => host,
            Kind::Two(hosts) => &hosts.a,
        }
    }

    /// Where they are after a move.
    pub fn destination(&self) -> &Host {
        match &self.hosts {
            Kind::One(host, _) => host,
            Kind::Two(hosts) => &hosts.b,
        }
    }

    /// A new directory that every user can use.
    pub fn directory(&self, name: &str) -> PathBuf {
        let base = match &self.hosts {
            Kind::One(_, directory) => directory.path(),
            Kind::Two(hosts) => hosts.path(),
        };
        let path = base.join(name);
        std::fs::create_dir(&path).unwrap();
        for directory in [base, &path] {
            let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o777);
            std::fs::set_permissions(directory, everybody).unwrap();
        }
        path
    }

    /// Is this process of a host a run of the tool?
    pub fn is_tool(&self, host: &Host, pid: i32) -> bool {
        std::fs::read_link(host.proc(pid, "exe")).is_ok_and(|path| path == self.tool)
    }

    /// Ends all programs, not the tool that takes them over.
    pub fn clean(&self) {
        for host in [self.source(), self.destination()] {
            loop {
                let left: Vec<i32> = (host.processes().into_iter())
                    .filter(|&pid| pid != 1 && !self.is_tool(host, pid))
                    .collect();
                if left.is_empty() {
                    break;
                }
                for pid in left {
                    // A directory of /proc serves as a pidfd: pidfd_send_signal(2).
                    if let Ok(directory) = std::fs::File::open(host.proc(pid, "")) {
                        let _ = rustix::process::pidfd_send_signal(&directory, rustix::process::Signal::KILL);
                    }
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
}
