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

/// A program that makes, grows, moves, protects and drops mappings as fast as it can, and says when the kernel refuses.
#[test]
fn a_program_that_changes_its_mappings_does_not_notice_that_it_is_watched() {
    use std::io::{BufRead, BufReader};
    use whimbrel::dump::track::{Tracker as _, WpAsync};
    use whimbrel::remote::inject::GadgetCache;
    let code = "import ctypes, random, time\n\
                libc = ctypes.CDLL(None, use_errno=True)\n\
                libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p\n\
                libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]\n\
                libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]\n\
                libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]\n\
                libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]\n\
                print('ready', flush=True)\n\
                areas, bad, count, end = [], 0, 0, time.time() + 3\n\
                while time.time() < end:\n\
                \x20   while len(areas) < 40: areas.append([libc.mmap(None, 40960, 3, 0x22, -1, 0), 40960])\n\
                \x20   at = random.randrange(len(areas)); address, size = areas[at]; what = random.randrange(4)\n\
                \x20   if what == 0: libc.munmap(address, size); areas.pop(at)\n\
                \x20   elif what == 1:\n\
                \x20       grown = libc.mremap(address, size, size + 20480, 1); count += 1\n\
                \x20       if grown == 2 ** 64 - 1: bad += 1\n\
                \x20       else: areas[at] = [grown, size + 20480]\n\
                \x20   elif what == 2 and size > 8192: libc.munmap(address, 4096); areas[at] = [address + 4096, size - 4096]\n\
                \x20   elif what == 3: bad += libc.mprotect(address, size, 1) != 0; ctypes.memset; bad += libc.mprotect(address, size, 3) != 0\n\
                print(bad, count > 100, flush=True)\n";
    let mut child = Command::new("/usr/bin/python3")
        .args(["-c", code])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(output.next().unwrap().unwrap(), "ready");
    let pid = child.id() as i32;
    let maps = || procfs::maps::parse(&procfs::read(pid, "maps")?);
    while child.try_wait().unwrap().is_none() {
        // Attached and let go again and again: both must go unnoticed.
        let Ok(mut tracker) = WpAsync::attach(pid, &mut GadgetCache::default()) else {
            break;
        };
        for _ in 0..20 {
            let Ok(maps) = maps() else { break };
            let _ = tracker.look(&maps);
        }
    }
    assert_eq!(output.next().unwrap().unwrap(), "0 True");
    assert!(child.wait().unwrap().success());
}
