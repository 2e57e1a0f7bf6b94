//! The built binary, driven as users drive it: what is dumped goes on, what is refused says why and touches nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const WHIMBREL: &str = env!("CARGO_BIN_EXE_whimbrel");

/// Needs root: choosing a pid and ptrace of others are not for everybody.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

fn whimbrel(arguments: &[&str]) -> Output {
    Command::new(WHIMBREL)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn good(output: &Output) {
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

/// Exit status 1, and the reason on standard error.
fn refused(output: &Output, reason: &str) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains(reason), "no {reason:?} in {error}");
}

/// A program in a session of its own that counts in a file, and images of it.
struct Victim {
    pid: i32,
    directory: tempfile::TempDir,
}

impl Victim {
    fn start() -> Victim {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count");
        std::fs::create_dir(directory.path().join("images")).unwrap();
        let code = format!(
            "import os, time\n\
             secret = os.urandom(1 << 20); kept = hash(secret); n = 0\n\
             tool = open({tool:?}, 'rb')\n\
             open({pid:?}, 'w').write(str(os.getpid()))\n\
             while True:\n\
            \x20   n += 1\n\
            \x20   f = open({count:?} + '.new', 'w'); f.write(str(n) if hash(secret) == kept else 'wrong'); f.close()\n\
            \x20   os.rename({count:?} + '.new', {count:?})\n\
            \x20   time.sleep(0.01)\n",
            pid = directory.path().join("pid").display().to_string(),
            count = count.display().to_string(),
            tool = directory.path().join("tool").display().to_string(),
        );
        // It has a program open, to be read.
        std::fs::copy("/usr/bin/true", directory.path().join("tool")).unwrap();
        let child = Command::new("setsid")
            .args(["/usr/bin/python3", "-c", &code])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        drop(child);
        let mut victim = Victim { pid: 0, directory };
        let deadline = Instant::now() + Duration::from_secs(20);
        while victim.count() == 0 {
            assert!(Instant::now() < deadline, "the victim does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        victim.pid = std::fs::read_to_string(victim.path("pid")).unwrap().parse().unwrap();
        victim
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn images(&self) -> String {
        self.path("images").display().to_string()
    }

    fn count(&self) -> u64 {
        let text = std::fs::read_to_string(self.path("count")).unwrap_or_default();
        assert_ne!(text, "wrong", "the victim has lost its memory");
        text.parse().unwrap_or(0)
    }

    fn goes_on(&self) {
        let (before, deadline) = (self.count(), Instant::now() + Duration::from_secs(10));
        while self.count() < before + 2 {
            assert!(Instant::now() < deadline, "the victim {} does not go on", self.pid);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Takes note of the death of our child: until then its pid is taken.
    fn reap(&self) {
        let _ = rustix::process::waitpid(
            rustix::process::Pid::from_raw(self.pid),
            rustix::process::WaitOptions::NOHANG,
        );
    }

    fn is_there(&self) -> bool {
        self.reap();
        Path::new(&format!("/proc/{}", self.pid)).exists()
    }

    fn state(&self) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        stat.rsplit(')').next().unwrap().trim_start()[..1].to_owned()
    }

    /// A stop signal takes effect a moment after it was sent.
    fn is_stopped(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.state() != "T" {
            assert!(Instant::now() < deadline, "its state is {}", self.state());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn dump(&self, more: &[&str]) -> Output {
        let (pid, images) = (self.pid.to_string(), self.images());
        let arguments = ["dump", "-t", &pid, "-D", &images];
        whimbrel(&[&arguments, more].concat())
    }

    fn restore(&self, more: &[&str]) -> Output {
        let images = self.images();
        self.reap();
        whimbrel(&[&["restore", "-d", "-D", &images], more].concat())
    }

    /// Names in the images directory.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("images")).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = whimbrel::kernel::sys::kill(self.pid, libc::SIGKILL);
        std::thread::sleep(Duration::from_millis(5));
        self.reap();
    }
}

#[test]
fn what_is_dumped_is_gone_and_what_is_restored_goes_on_with_its_pid() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    good(&victim.dump(&["-o", "dump.log", "-v4"]));
    assert!(!victim.is_there(), "the tree must be killed once it is in images");
    let log = std::fs::read_to_string(victim.path("images/dump.log")).unwrap();
    assert!(
        log.lines()
            .all(|line| line.starts_with("(00.") && line.as_bytes()[10] == b')'),
        "{log}"
    );
    assert!(log.trim_end().ends_with("Dumping finished successfully"), "{log}");

    let output = victim.restore(&["-v4", "-o", "restore.log", "--pidfile", "pid.txt", "--display-stats"]);
    good(&output);
    assert!(text(&output.stdout).contains("Pages restored: "));
    victim.goes_on();
    let written = std::fs::read_to_string(victim.path("images/pid.txt")).unwrap();
    assert_eq!(written, victim.pid.to_string());
    let log = std::fs::read_to_string(victim.path("images/restore.log")).unwrap();
    assert!(log.contains("Restore finished successfully. Tasks resumed."), "{log}");
    for name in ["stats-dump", "stats-restore"] {
        assert!(victim.names().iter().any(|other| other == name), "{name}");
    }
}

#[test]
fn a_dump_may_leave_the_tree_running_or_stopped_and_replaces_an_older_one_as_a_whole() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    std::fs::write(victim.path("images/core-1.img"), "of an older dump").unwrap();
    good(&victim.dump(&["--leave-running"]));
    victim.goes_on();
    assert!(
        !victim.names().contains(&"core-1.img".to_owned()),
        "{:?}",
        victim.names()
    );
    good(&victim.dump(&["-s"]));
    victim.is_stopped();
    whimbrel::kernel::sys::kill(victim.pid, libc::SIGCONT).unwrap();
    victim.goes_on();
    good(&whimbrel(&["image", "verify", &victim.images()]));
}

#[test]
fn a_dump_that_fails_leaves_the_tree_running_and_the_directory_as_it_was() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    std::fs::write(victim.path("images/inventory.img"), "of an older dump").unwrap();
    let script = victim.path("script");
    std::fs::write(&script, "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != pre-dump ]\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = victim.dump(&["--action-script", script.to_str().unwrap(), "-o", "../log"]);
    refused(&output, "action script");
    victim.goes_on();
    assert_eq!(victim.names(), ["inventory.img"]);
    let log = std::fs::read_to_string(victim.path("log")).unwrap();
    assert!(log.contains("Error (src/cli/mod.rs:"), "{log}");
    assert!(log.trim_end().ends_with("Dumping FAILED."), "{log}");
}

#[test]
fn a_dump_and_a_restore_that_are_cancelled_leave_nothing_behind() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    // A script that never ends holds the command at a stage.
    let script = victim.path("script");
    let started = victim.path("started");
    let hold = |stage: &str| {
        let code = format!(
            "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = {stage} ] || exit 0\ntouch {}\nexec sleep 100\n",
            started.display()
        );
        let _ = std::fs::remove_file(&started);
        std::fs::write(&script, code).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    let cancel = |arguments: &[&str]| {
        let mut command = Command::new(WHIMBREL);
        command
            .args(arguments)
            .args(["--action-script", script.to_str().unwrap()]);
        // A group of its own: the script is to be ended with it.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        while !started.exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let pid = child.id() as i32;
        whimbrel::kernel::sys::kill(pid, libc::SIGTERM).unwrap();
        child.wait().unwrap();
        // The script holds the pipe open.
        let _ = whimbrel::kernel::sys::kill(-pid, libc::SIGKILL);
        let output = child.wait_with_output();
        refused(&output.unwrap(), "cancelled by SIGTERM");
    };
    let (pid, images) = (victim.pid.to_string(), victim.images());
    hold("pre-dump");
    cancel(&["dump", "-t", &pid, "-D", &images]);
    victim.goes_on();
    assert!(victim.names().is_empty(), "{:?}", victim.names());
    good(&victim.dump(&[]));
    victim.reap();
    hold("post-restore");
    cancel(&["restore", "-d", "-D", &images]);
    let deadline = Instant::now() + Duration::from_secs(10);
    // The kernel kills it, init takes note of it.
    while victim.is_there() {
        assert!(
            Instant::now() < deadline,
            "the victim is still there: {}",
            victim.state()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    good(&victim.restore(&[]));
    victim.goes_on();
}

#[test]
fn files_must_match_in_mode_and_build_id_unless_the_user_says_otherwise() {
    use std::os::unix::fs::PermissionsExt;
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    let tool = victim.path("tool");
    let mode = |mode| std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(mode)).unwrap();
    good(&victim.dump(&[]));
    victim.reap();
    mode(0o600);
    refused(&victim.restore(&[]), "--skip-file-rwx-check");
    good(&victim.restore(&["--skip-file-rwx-check"]));
    victim.goes_on();

    std::fs::remove_dir_all(victim.path("images")).unwrap();
    std::fs::create_dir(victim.path("images")).unwrap();
    good(&victim.dump(&[]));
    let deadline = Instant::now() + Duration::from_secs(10);
    while victim.is_there() {
        assert!(Instant::now() < deadline, "the victim is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut bytes = std::fs::read(&tool).unwrap();
    // The contents of notes, of which the build id is one, lie behind this name.
    let places: Vec<usize> = (0..bytes.len() - 8).filter(|&i| &bytes[i..i + 4] == b"GNU\0").collect();
    for place in places {
        bytes[place + 5] ^= 0xff;
    }
    std::fs::write(&tool, bytes).unwrap();
    mode(0o600);
    refused(&victim.restore(&[]), "build id");
    good(&victim.restore(&["--file-validation", "filesize"]));
    victim.goes_on();
}

#[test]
fn options_that_are_not_built_are_refused_with_the_reason_before_anything_happens() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    let cases: &[(&[&str], &str)] = &[
        (&["--lazy-pages", "--page-server"], "use one of them"),
        (&["--lazy-pages", "--leave-running"], "cannot be used with"),
        (&["--stream"], "--stream is not built yet"),
        (&["--external", "mnt[]"], "--external is not built yet"),
        (&["--freeze-cgroup", "/x"], "--freeze-cgroup is not built yet"),
        (&["--manage-cgroups"], "--manage-cgroups is not built yet"),
        (&["--network-lock", "iptables"], "use --network-lock nftables"),
        (&["--lazy-pages", "--log-pid"], "--log-pid is refused"),
        (&["--page-server"], "use --address HOST"),
        (&["--auto-dedup"], "use --prev-images-dir"),
        (&["--prev-images-dir", "."], "the directory that is to be written"),
        (&["--no-such-option"], "--no-such-option"),
        (&["--cpu-cap=sse9"], "sse9"),
    ];
    for (options, reason) in cases {
        refused(&victim.dump(options), reason);
        assert!(victim.names().is_empty(), "{options:?} left {:?}", victim.names());
    }
    assert_eq!(
        std::fs::read_to_string(format!("/proc/{}/status", victim.pid))
            .unwrap()
            .matches("TracerPid:\t0")
            .count(),
        1
    );
    victim.goes_on();
}

#[test]
fn a_pid_that_is_not_there_and_a_directory_without_a_dump_are_named() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    refused(&whimbrel(&["dump", "-t", "4194303", "-D", path]), "4194303");
    refused(&whimbrel(&["restore", "-d", "-D", path]), "holds no whole dump");
    refused(
        &whimbrel(&["dump", "-t", "1", "-D", "/no/such/directory"]),
        "use -D DIR",
    );
    let me = std::process::id().to_string();
    refused(&whimbrel(&["dump", "-t", &me, "-D", path]), "inside of that tree");
    assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
}

#[test]
fn an_incremental_dump_stores_only_what_changed_and_restores() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    let (pid, one) = (victim.pid.to_string(), victim.path("one"));
    std::fs::create_dir(&one).unwrap();
    good(&whimbrel(&["pre-dump", "-t", &pid, "-D", one.to_str().unwrap()]));
    victim.goes_on();
    let output = victim.dump(&["--prev-images-dir", "../one", "--track-mem", "--json"]);
    good(&output);
    let event: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let (written, before) = (
        event["pages_written"].as_u64().unwrap(),
        event["pages_in_parent"].as_u64().unwrap(),
    );
    assert!(before > 256 && written < before, "{event}");
    assert_eq!(
        std::fs::read_link(victim.path("images/parent")).unwrap(),
        Path::new("../one")
    );
    good(&victim.restore(&[]));
    victim.goes_on();
    // And once more with room given back in the images before.
    good(&victim.dump(&["-R"]));
    good(&whimbrel(&["dedup", "-D", &victim.images()]));
}

#[test]
fn scripts_run_at_every_stage_with_the_names_of_criu() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    let (script, told) = (victim.path("script"), victim.path("told"));
    let code = format!(
        "#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID >> {0}\ntest -d $CRTOOLS_IMAGE_DIR || exit 1\n",
        told.display()
    );
    std::fs::write(&script, code).unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = script.to_str().unwrap();
    good(&victim.dump(&["--action-script", script]));
    good(&victim.restore(&["--action-script", script]));
    victim.goes_on();
    let pid = victim.pid;
    let expected = format!(
        "pre-dump {pid}\npost-dump {pid}\npre-restore \nsetup-namespaces {pid}\npost-setup-namespaces {pid}\n\
         post-restore {pid}\npre-resume {pid}\npost-resume {pid}\n"
    );
    let told = std::fs::read_to_string(told).unwrap();
    assert_eq!(told.replace(" \n", "\n"), expected.replace(" \n", "\n"));
}

#[test]
fn a_restore_that_waits_ends_as_the_root_task_does() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    good(&victim.dump(&[]));
    assert!(!victim.is_there());
    let images = victim.images();
    let mut waiting = Command::new(WHIMBREL).args(["restore", "-D", &images]).spawn().unwrap();
    victim.goes_on();
    assert!(waiting.try_wait().unwrap().is_none());
    whimbrel::kernel::sys::kill(victim.pid, libc::SIGTERM).unwrap();
    assert_eq!(waiting.wait().unwrap().code(), Some(128 + libc::SIGTERM));

    // With --exec-cmd the command is the parent of the root.
    let output = whimbrel(&[
        "restore",
        "-D",
        &images,
        "--exec-cmd",
        "--",
        "sh",
        "-c",
        "echo $$ && cat /proc/$0/stat",
        &victim.pid.to_string(),
    ]);
    good(&output);
    let told = text(&output.stdout);
    let (shell, stat) = told.split_once('\n').unwrap();
    assert_eq!(
        stat.rsplit(')').next().unwrap().split_whitespace().nth(1),
        Some(shell),
        "{told}"
    );
}

#[test]
fn a_restored_sibling_is_a_child_of_whoever_called() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    good(&victim.dump(&[]));
    good(&victim.restore(&["--restore-sibling", "--leave-stopped"]));
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", victim.pid)).unwrap();
    let parent = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(1)
        .map(str::to_owned);
    assert_eq!(parent, Some(std::process::id().to_string()));
    victim.is_stopped();
    whimbrel::kernel::sys::kill(victim.pid, libc::SIGCONT).unwrap();
    victim.goes_on();
    whimbrel::kernel::sys::kill(victim.pid, libc::SIGKILL).unwrap();
    rustix::process::waitpid(
        rustix::process::Pid::from_raw(victim.pid),
        rustix::process::WaitOptions::empty(),
    )
    .unwrap();
}

#[test]
fn pages_go_to_a_page_server_and_come_back_with_the_other_images() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    let identity = victim.path("identity");
    let identity = identity.to_str().unwrap();
    let server_images = victim.path("server");
    std::fs::create_dir(&server_images).unwrap();
    let port = std::net::UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
        .to_string();
    let place = ["--address", "127.0.0.1", "--port", &port, "--identity-dir", identity];
    let mut server = Command::new(WHIMBREL)
        .args(["page-server", "--json", "-D", server_images.to_str().unwrap()])
        .args(place)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(server.stdout.as_mut().unwrap()), &mut line).unwrap();
    assert!(line.contains("listening"), "{line}");
    good(&victim.dump(&[&["--page-server"][..], &place].concat()));
    assert!(server.wait().unwrap().success());
    assert!(
        !victim.names().iter().any(|name| name.starts_with("pages-")),
        "{:?}",
        victim.names()
    );
    for entry in std::fs::read_dir(&server_images).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), victim.path("images").join(entry.file_name())).unwrap();
    }
    good(&victim.restore(&[]));
    victim.goes_on();
}

#[test]
fn under_the_name_criu_it_reads_configuration_files_and_shows_a_version() {
    if !is_root() {
        return;
    }
    let victim = Victim::start();
    let criu = victim.path("criu");
    std::os::unix::fs::symlink(WHIMBREL, &criu).unwrap();
    let run = |arguments: &[&str]| {
        Command::new(&criu)
            .args(arguments)
            .env("HOME", victim.directory.path())
            .output()
            .unwrap()
    };
    assert!(text(&run(&["--version"]).stdout).starts_with("Version: "));
    std::fs::create_dir(victim.path(".criu")).unwrap();
    std::fs::write(
        victim.path(".criu/default.conf"),
        "leave-running # as always\nlog-file \"the.log\"\nport 7\n",
    )
    .unwrap();
    let (pid, images) = (victim.pid.to_string(), victim.images());
    // CRIU takes abbreviations of long options.
    good(&run(&["dump", "-t", &pid, "--images-d", &images]));
    victim.goes_on();
    assert!(victim.names().contains(&"the.log".to_owned()));
    good(&run(&["dump", "-t", &pid, "-D", &images, "--no-leave-running"]));
    assert!(!victim.is_there());
}

#[test]
fn hosts_are_known_by_fingerprints_and_trusted_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let other = text(&whimbrel(&["id", "--identity-dir", &at("other")]).stdout);
    let other = other.trim();
    assert!(other.starts_with("whb1-"), "{other}");
    let mine = at("mine");
    good(&whimbrel(&["trust", other, "db2", "--identity-dir", &mine]));
    let list = || text(&whimbrel(&["trust", "--list", "--identity-dir", &mine]).stdout);
    assert_eq!(list(), format!("{other} db2\n"));
    refused(
        &whimbrel(&["trust", "--remove", "db3", "--identity-dir", &mine]),
        "not in the list",
    );
    good(&whimbrel(&["trust", "--remove", "db2", "--identity-dir", &mine]));
    assert_eq!(list(), "");
    refused(
        &whimbrel(&["trust", "whb1-x", "db2", "--identity-dir", &mine]),
        "not a fingerprint",
    );
}

#[test]
fn check_says_what_the_kernel_has() {
    let output = whimbrel(&["check"]);
    if rustix::process::geteuid().is_root() {
        good(&output);
        assert!(text(&output.stdout).ends_with("Looks good.\n"));
        good(&whimbrel(&["check", "--feature", "mem_dirty_track"]));
    }
    assert!(text(&whimbrel(&["check", "--feature", "list"]).stdout).contains("clone3_set_tid"));
    refused(&whimbrel(&["check", "--feature", "wings"]), "--feature list");
}

#[test]
fn man_pages_and_completions_are_made() {
    let directory = tempfile::tempdir().unwrap();
    good(&whimbrel(&["man", directory.path().to_str().unwrap()]));
    assert!(directory.path().join("whimbrel-dump.1").exists());
    assert!(text(&whimbrel(&["completions", "bash"]).stdout).contains("whimbrel"));
}

#[test]
fn a_connection_outlives_a_dump_and_its_peer_notices_nothing() {
    use std::io::{Read, Write};
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let images = directory.path().display().to_string();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let code = format!(
        "import socket\ns = socket.create_connection(('127.0.0.1', {port}))\nwhile True:\n d = s.recv(100)\n if not d: break\n s.sendall(d.upper())\n"
    );
    let mut child = Command::new("setsid")
        .args(["/usr/bin/python3", "-c", &code])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut peer, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let ask = |text: &str, peer: &mut std::net::TcpStream| {
        let mut answer = vec![0; text.len()];
        peer.write_all(text.as_bytes()).unwrap();
        peer.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), text.to_uppercase());
    };
    ask("first", &mut peer);
    let pid = child.id().to_string();
    refused(&whimbrel(&["dump", "-t", &pid, "-D", &images]), "use --tcp-established");
    ask("still here", &mut peer);
    good(&whimbrel(&[
        "dump",
        "-t",
        &pid,
        "-D",
        &images,
        "--tcp-established",
        "-R",
    ]));
    ask("and running", &mut peer);
    good(&whimbrel(&["dump", "-t", &pid, "-D", &images, "--tcp-established"]));
    child.wait().unwrap();
    // Sent to nobody: the lock holds it back, so that no kernel answers with a reset.
    peer.write_all(b"meanwhile").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    refused(&whimbrel(&["restore", "-d", "-D", &images]), "use --tcp-established");
    good(&whimbrel(&["restore", "-d", "-D", &images, "--tcp-established"]));
    let mut answer = [0; 9];
    peer.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"MEANWHILE");
    ask("again", &mut peer);
    drop(peer);
}

#[test]
fn crit_reads_our_images() {
    if !is_root() {
        return;
    }
    if Command::new("crit").arg("--help").output().is_err() {
        eprintln!("skipped: crit is not installed");
        return;
    }
    let victim = Victim::start();
    good(&victim.dump(&["-R"]));
    let crit = |what: &str| {
        let output = Command::new("crit")
            .args(["x", &victim.images(), what])
            .output()
            .unwrap();
        good(&output);
        text(&output.stdout)
    };
    let pid = victim.pid.to_string();
    let tasks = crit("ps");
    assert!(
        tasks
            .lines()
            .any(|line| line.split_whitespace().eq([&pid[..], &pid, &pid, "python3"])),
        "{tasks}"
    );
    let files = crit("fds");
    assert!(files.contains(&pid) && files.contains("0: /dev/null"), "{files}");
    assert!(crit("mems").contains("/usr/bin/python3"));
}
