//! Programs that ask themselves, after each dump and restore, whether they are unharmed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use whimbrel::dump::{self, Afterwards};
use whimbrel::restore::{self, state};
use whimbrel::tree::TreeImage;
use whimbrel_images::chain::PageStore;
use whimbrel_images::store::{DirStore, ImageStore};

/// Dumps a process into a directory that is removed.
///
/// # Errors
/// When it cannot be dumped: it goes on then.
pub fn try_dump(pid: i32, afterwards: Afterwards) -> whimbrel::error::Result<()> {
    let directory = tempfile::tempdir().unwrap();
    let store: Arc<dyn ImageStore> = Arc::new(DirStore::open(directory.path()).unwrap());
    dump::to_store(pid, store, &dump::Options::default(), afterwards).map(drop)
}

/// Dumps a process, which ends, and restores it, in this process.
///
/// # Panics
/// When either fails.
pub fn dump_and_restore(pid: i32, dump_options: &dump::Options, restore_options: &restore::Options) {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let mut tree = vec![pid];
    let mut known = 0;
    while let Some(&member) = tree.get(known) {
        tree.extend(whimbrel::tree::children_of(member).unwrap_or_default());
        known += 1;
    }
    let directory = tempfile::tempdir().unwrap();
    let store: Arc<dyn ImageStore> = Arc::new(DirStore::open(directory.path()).unwrap());
    // Some states last a moment and are refused (a terminal with unread data); the tree goes on, and one tries again.
    for attempt in 0.. {
        match dump::to_store(pid, store.clone(), dump_options, Afterwards::Kill) {
            Ok(_) => break,
            Err(error) if attempt < 20 && error.chain().contains("try again") => {}
            Err(error) => panic!("{}", error.chain()),
        }
    }
    // The dead hold their pids until they are waited for: by us, to whom the others of the tree come as orphans.
    for pid in tree {
        let pid = rustix::process::Pid::from_raw(pid);
        rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).ok();
    }
    let image = TreeImage::load(&*store).unwrap_or_else(|error| panic!("{}", error.chain()));
    let pages = PageStore::open(directory.path()).unwrap();
    let ready = state::from_directory(&image, &*store, &pages, restore_options)
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    ready.go().unwrap_or_else(|error| panic!("{}", error.chain()));
}

/// A program that says after each round, in a file, whether it finds itself unharmed.
pub struct Program {
    child: Child,
    log: PathBuf,
    directory: tempfile::TempDir,
}

impl Program {
    /// Runs Python code that calls `report(text)`; the first report is "ready".
    pub fn python(code: &str) -> Program {
        let directory = tempfile::tempdir().unwrap();
        let header = format!(
            "import sys, os\nlog = open({:?}, 'a', 1)\ndef report(*t): log.write(' '.join(map(str, t)) + '\\n')\n",
            directory.path().join("log").display()
        );
        let code = header + code;
        Program::start(directory, &["/usr/bin/python3", "-c", &code])
    }

    /// Compiles and runs a C program of `tests/programs`, with the file in which it reports as its argument.
    pub fn c(name: &str) -> Program {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let (binary, log) = (path("program"), path("log"));
        let compiled = Command::new("gcc")
            .args(["-O1", "-pthread", "-o", &binary])
            .arg(super::program(name))
            .status()
            .unwrap();
        assert!(compiled.success());
        Program::start(directory, &[&binary, &log])
    }

    fn start(directory: tempfile::TempDir, words: &[&str]) -> Program {
        let mut command = Command::new("setsid");
        command
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(directory.path().join("err")).unwrap());
        let program = Program {
            child: command.spawn().unwrap(),
            log: directory.path().join("log"),
            directory,
        };
        program.wait_for("ready", 1);
        program
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// All that it reported.
    pub fn reports(&self) -> Vec<String> {
        std::fs::read_to_string(&self.log)
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    /// Waits until `text` was reported `count` times, and nothing was found wrong.
    pub fn wait_for(&self, text: &str, count: usize) {
        for _ in 0..2000 {
            let reports = self.reports();
            assert!(!reports.iter().any(|line| line.starts_with("wrong")), "{reports:?}");
            if reports.iter().filter(|line| *line == text).count() >= count {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let errors = std::fs::read_to_string(self.directory.path().join("err")).unwrap_or_default();
        panic!("no {text:?} from the program: {:?} {errors}", self.reports().last());
    }

    /// How many rounds it has done.
    pub fn rounds(&self) -> usize {
        self.reports().iter().filter(|line| *line == "ok").count()
    }

    /// The program must report twice more without finding anything wrong.
    pub fn goes_on(&self) {
        let before = self.rounds();
        self.wait_for("ok", before + 2);
    }
}

impl Program {
    /// Its directory: the report is the file `log`.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = whimbrel::kernel::sys::kill(self.pid(), libc::SIGKILL);
        let _ = self.child.wait();
    }
}
