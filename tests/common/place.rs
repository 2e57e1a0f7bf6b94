//! Where programs are moved: a host, or two of which each takes programs over from the other.

use std::path::PathBuf;

use super::flavour::Flavour;
use super::host::{Host, Hosts};
use super::tool::{Serve, binary};

/// A place in which one program after the other is moved.
pub struct Place {
    // Before the hosts, so that they end before them.
    _serves: Vec<Serve>,
    hosts: Kind,
    tool: PathBuf,
    /// From which to which of the hosts programs go.
    way: Way,
}

/// From which host to which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Stays on the first.
    Stays,
    /// From the first to the second.
    There,
    /// From the second to the first.
    Back,
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
                _serves: serve.into_iter().collect(),
                hosts: Kind::Two(Box::new(hosts)),
                tool,
                way: Way::There,
            };
        }
        let directory = tempfile::Builder::new()
            .prefix("whimbrel-test-")
            .disable_cleanup(std::env::var_os("WHIMBREL_TEST_KEEP").is_some())
            .tempdir()
            .unwrap();
        let host = Host::new("lone", directory.path(), 2000);
        Place {
            _serves: Vec::new(),
            hosts: Kind::One(host, directory),
            tool,
            way: Way::Stays,
        }
    }

    /// A place for all flavours: two hosts that both take programs over, and a third for clients.
    pub fn for_all() -> Place {
        let hosts = Hosts::new();
        Place {
            _serves: vec![hosts.a.serve(), hosts.b.serve()],
            hosts: Kind::Two(Box::new(hosts)),
            tool: std::fs::canonicalize(binary()).unwrap(),
            way: Way::Stays,
        }
    }

    /// Where programs go from now on.
    pub fn goes(&mut self, way: Way) {
        self.way = way;
    }

    fn host(&self, second: bool) -> &Host {
        match &self.hosts {
            Kind::One(host, _) => host,
            Kind::Two(hosts) if second => &hosts.b,
            Kind::Two(hosts) => &hosts.a,
        }
    }

    /// Where programs start.
    pub fn source(&self) -> &Host {
        self.host(self.way == Way::Back)
    }

    /// Where they are after a move.
    pub fn destination(&self) -> &Host {
        self.host(self.way == Way::There)
    }

    /// Where clients are, where there are two hosts.
    pub fn client(&self) -> &Host {
        match &self.hosts {
            Kind::One(host, _) => host,
            Kind::Two(hosts) => &hosts.client,
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
