//! The victim and the tool: programs run in living processes, and nothing of them stays.

use std::process::{Child, Command, Stdio};

use whimbrel::procfs::{self, maps};
use whimbrel::remote::{Gadgets, Program, StubProcess, tracee};

struct Victim(Child);

impl Victim {
    fn sleeper() -> Victim {
        let child = Command::new("sleep").arg("1000").stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        Victim(child)
    }
    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&procfs::read(self.pid(), name).unwrap()).into_owned()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn getpids(count: usize) -> Program {
    let mut program = Program::new();
    for _ in 0..count {
        program.call("getpid", libc::SYS_getpid, &[]);
    }
    program
}

#[test]
fn a_program_runs_in_a_sleeping_process_and_leaves_no_trace() {
    let victim = Victim::sleeper();
    let pid = victim.pid();
    let descriptors = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = (victim.read("maps"), victim.read("syscall"), descriptors());
    let maps = maps::parse(before.0.as_bytes()).unwrap();
    let gadgets = Gadgets::find(pid, &maps, &mut Default::default()).unwrap();
    assert!(gadgets.restorer.is_some());
    let (thread, _) = tracee::seize(pid, false).unwrap().stop().unwrap().unwrap();
    let (mut stub, mut visitor) = StubProcess::inject(thread, &maps, gadgets).unwrap();
    for _ in 0..3 {
        let mut program = getpids(100);
        let buffer = program.reserve(16);
        let call = program.call("getrandom", libc::SYS_getrandom, &[buffer.into(), 16.into(), 0.into()]);
        let outcome = stub.run(&mut visitor, &program).unwrap();
        assert_eq!(outcome.result(call), 16);
        assert_ne!(outcome.bytes(buffer), [0; 16]);
    }
    let mut failing = Program::new();
    failing.call("open nothing", libc::SYS_close, &[(-1).into()]);
    let error = stub.run(&mut visitor, &failing).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EBADF), "{}", error.chain());
    stub.remove(visitor).unwrap().detach(0).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(victim.read("maps"), before.0);
    // The kernel itself shows a continued sleep as restart_syscall(2), with the same arguments.
    let arguments = |line: &str| line.split_once(char::is_whitespace).map(|(_, rest)| rest.to_owned());
    assert_eq!(arguments(&victim.read("syscall")), arguments(&before.1));
    assert_eq!(descriptors(), before.2);
    assert!(victim.read("status").contains("TracerPid:\t0"));
}
