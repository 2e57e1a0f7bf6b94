//! What the tests of all kinds of the task family need: processes to ask and to restore into.

use whimbrel_images::proto::{CoreEntry, SeccompEntry};

use crate::procfs::{self, maps, stat, status, status::Status};
use crate::remote::inject::Home;
use crate::remote::seed::ARENA_SIZE;
use crate::remote::{Arena, Arg, Program, Puppet, RemoteAddr};
use crate::resource::{Found, Restoring, Stage, TaskKind, ThreadView};

/// An empty process.
pub struct Subject {
    puppet: Puppet,
    arena: Arena,
    /// Seccomp filters of the tree: those to be restored, or those found by the last dump.
    pub filters: SeccompEntry,
}

impl Subject {
    pub fn new() -> Subject {
        let mut puppet = Puppet::spawn(None, &[]).unwrap();
        let all = maps::parse(&procfs::read(puppet.tid(), "maps").unwrap()).unwrap();
        let mut ranges: Vec<(u64, u64)> = all.iter().map(|map| (map.start, map.end)).collect();
        let arena = Arena(RemoteAddr(maps::largest_gap(&mut ranges, ARENA_SIZE).unwrap()));
        puppet.clear(arena).unwrap();
        Subject {
            puppet,
            arena,
            filters: SeccompEntry::default(),
        }
    }

    pub fn pid(&self) -> i32 {
        self.puppet.tid()
    }

    pub fn status(&self) -> Status {
        status::parse(&procfs::read(self.pid(), "status").unwrap()).unwrap()
    }

    /// Has it make one call; a negative error number is a result.
    pub fn call(&mut self, nr: i64, args: &[Arg]) -> i64 {
        let mut program = Program::new();
        let call = program.try_call(nr, args);
        self.puppet.run(self.arena, &program).unwrap().result(call)
    }

    /// Has its seccomp filters apply, though it is traced.
    pub fn resume_seccomp(&self) {
        self.puppet.stopped().unwrap().resume_seccomp();
    }

    /// What a kind finds in it.
    pub fn dump(&mut self, kind: &dyn TaskKind) -> CoreEntry {
        let stopped = self.puppet.stopped().unwrap();
        let (home, status) = (Home::of(stopped).unwrap(), self.status());
        let found = Found::default();
        let stat = stat::parse(&procfs::read(self.pid(), "stat").unwrap()).unwrap();
        let view = ThreadView {
            pid: self.pid(),
            tid: self.pid(),
            leader: true,
            stopped,
            home: &home,
            stat: &stat,
            status: &status,
            found: &found,
        };
        let (mut program, mut core) = (Program::new(), CoreEntry::default());
        let read = kind.dump(&view, &mut program).unwrap();
        let outcome = self.puppet.run(self.arena, &program).unwrap();
        read(&outcome, &mut core).unwrap();
        self.filters = found.filters.into_inner().into_entry();
        core
    }

    /// Has a kind restore it, in all stages.
    pub fn restore(&mut self, kind: &dyn TaskKind, core: &CoreEntry) {
        for stage in [Stage::Process, Stage::Thread, Stage::Final] {
            let mut program = Program::new();
            let thread = Restoring {
                core,
                leader: true,
                process: std::slice::from_ref(core),
                filters: &self.filters,
            };
            kind.restore(stage, &thread, &mut program).unwrap();
            self.puppet.run(self.arena, &program).unwrap();
        }
    }
}
