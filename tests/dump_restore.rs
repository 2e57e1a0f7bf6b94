//! Processes that are taken apart and put together again ask themselves whether they are still right.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use whimbrel::dump::{self, Afterwards};
use whimbrel::restore::{self, state};
use whimbrel::tree::TreeImage;
use whimbrel_images::chain::PageStore;
use whimbrel_images::store::{DirStore, ImageStore};

fn dump_and_restore(pid: i32, dump_options: &dump::Options, restore_options: &restore::Options) {
    let directory = tempfile::tempdir().unwrap();
    let store: Arc<dyn ImageStore> = Arc::new(DirStore::open(directory.path()).unwrap());
    dump::to_store(pid, store.clone(), dump_options, Afterwards::Kill)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    // The dead child of this test holds its pid until it is waited for.
    rustix::process::waitpid(
        rustix::process::Pid::from_raw(pid),
        rustix::process::WaitOptions::empty(),
    )
    .ok();
    let image = TreeImage::load(&*store).unwrap_or_else(|error| panic!("{}", error.chain()));
    let pages = PageStore::open(directory.path()).unwrap();
    let ready = state::from_directory(&image, &*store, &pages, restore_options)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    ready.go().unwrap_or_else(|error| panic!("{}", error.chain()));
}

/// A program that says after each round, in a file, whether it finds itself unharmed.
struct Program {
    child: Child,
    log: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Program {
    /// Runs Python code that calls `report(text)`; the first report is "ready".
    fn python(code: &str) -> Program {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let header = format!(
            "import sys, os\nlog = open({:?}, 'a', 1)\ndef report(*t): log.write(' '.join(map(str, t)) + '\\n')\n",
            log.display()
        );
        let mut command = Command::new("setsid");
        command.args(["/usr/bin/python3", "-c", &(header + code)]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.path().join("err")).unwrap());
        let program = Program {
            child: command.spawn().unwrap(),
            log,
            _directory: directory,
        };
        program.wait_for("ready", 1);
        program
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn reports(&self) -> Vec<String> {
        std::fs::read_to_string(&self.log)
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// Waits until `text` was reported `count` times, and nothing was found wrong.
    fn wait_for(&self, text: &str, count: usize) {
        for _ in 0..2000 {
            let reports = self.reports();
            assert!(!reports.iter().any(|line| line.starts_with("wrong")), "{reports:?}");
            if reports.iter().filter(|line| *line == text).count() >= count {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let errors = std::fs::read_to_string(self._directory.path().join("err")).unwrap_or_default();
        panic!("no {text:?} from the program: {:?} {errors}", self.reports().last());
    }

    fn rounds(&self) -> usize {
        self.reports().iter().filter(|line| *line == "ok").count()
    }

    /// The program must report twice more without finding anything wrong.
    fn goes_on(&self) {
        let before = self.rounds();
        self.wait_for("ok", before + 2);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = whimbrel::kernel::sys::kill(self.pid(), libc::SIGKILL);
        let _ = self.child.wait();
    }
}

#[test]
fn a_python_program_with_threads_goes_on_after_each_of_three_dumps_and_restores() {
    let program = Program::python(
        "import threading, time\n\
         data = [os.urandom(100000) for i in range(50)]\n\
         h = hash(tuple(data))\n\
         me = (os.getpid(), os.getppid() if False else 0, os.getcwd(), os.getsid(0))\n\
         results = []\n\
         def work():\n\
        \x20   while True:\n\
        \x20       results.append(sum(range(1000)))\n\
        \x20       time.sleep(0.01)\n\
         for i in range(3): threading.Thread(target=work, daemon=True).start()\n\
         report('ready')\n\
         while True:\n\
        \x20   n = len(results); time.sleep(0.05)\n\
        \x20   ok = hash(tuple(data)) == h and (os.getpid(), 0, os.getcwd(), os.getsid(0)) == me and set(results) == {499500}\n\
        \x20   report('ok' if ok and len(results) > n else 'wrong')\n",
    );
    for _ in 0..3 {
        program.goes_on();
        dump_and_restore(program.pid(), &dump::Options::default(), &restore::Options::default());
    }
    program.goes_on();
}
