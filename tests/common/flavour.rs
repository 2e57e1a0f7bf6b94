//! The ways in which a program is moved.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use super::host::Host;
use super::place::Place;
use super::tool::{Running, text};

/// A program that stands in a place, to be moved.
pub trait Moving {
    /// For messages.
    fn name(&self) -> String;

    /// Where it is, and where it shall be.
    fn place(&self) -> &Place;

    /// Its pid, as its host numbers it.
    fn pid(&self) -> i32;

    /// A directory for images and logs.
    fn directory(&self) -> &Path;

    /// Words for a verb.
    fn words(&self, verb: &str) -> Vec<&str>;

    /// Is the program told to look at itself before it runs again, so that it does so while memory follows?
    fn at_once(&self) -> bool {
        false
    }

    /// Tells the program to look at itself.
    fn look(&self) {}

    /// It must be as it was before.
    ///
    /// # Errors
    /// With what is not.
    fn is_the_same(&self) -> Result<(), Failure>;
}

/// A step that failed. Before the tree was taken apart, the program must go on.
#[derive(Debug)]
pub struct Failure {
    /// Is it the dump or the migration that failed?
    pub before: bool,
    /// What was said.
    pub text: String,
}

impl Failure {
    /// After the tree was taken apart.
    pub fn after(text: impl Into<String>) -> Failure {
        Failure {
            before: false,
            text: text.into(),
        }
    }
}

/// A way to move a program.
pub struct Flavour {
    /// For lists and the table.
    pub name: &'static str,
    /// Groups that promises can name as well.
    groups: &'static [&'static str],
    /// Does every run ask all promises in it?
    pub always: bool,
    /// Moves one.
    pub go: fn(&dyn Moving) -> Result<(), Failure>,
}

/// All flavours.
pub const FLAVOURS: &[Flavour] = &[
    Flavour {
        name: "dump + restore",
        groups: &["images"],
        always: true,
        go: dump_and_restore,
    },
    Flavour {
        name: "three times",
        groups: &["images"],
        always: false,
        go: three_times,
    },
    Flavour {
        name: "chain",
        groups: &["images"],
        always: false,
        go: chain,
    },
    Flavour {
        name: "page server",
        groups: &["images"],
        always: false,
        go: page_server,
    },
    Flavour {
        name: "lazily",
        groups: &["images", "lazy"],
        always: false,
        go: lazily,
    },
    Flavour {
        name: "lazily, remote",
        groups: &["lazy", "two hosts"],
        always: false,
        go: lazily_remote,
    },
    Flavour {
        name: "pre-copy",
        groups: &["two hosts", "migrated"],
        always: false,
        go: pre_copy,
    },
    Flavour {
        name: "post-copy",
        groups: &["two hosts", "migrated", "lazy"],
        always: false,
        go: post_copy,
    },
];

impl Flavour {
    /// Is it of this group?
    pub fn is(&self, group: &str) -> bool {
        group == "all" || group == self.name || self.groups.contains(&group)
    }

    /// What a mark says about it.
    pub fn of<'a>(&self, marks: &'a BTreeMap<String, String>) -> Option<&'a str> {
        marks
            .iter()
            .find(|(group, _)| self.is(group))
            .map(|(_, why)| why.as_str())
    }
}

const PORT: &str = "9100";

fn images(moving: &dyn Moving, name: &str) -> String {
    let path = moving.directory().join(name);
    std::fs::create_dir_all(&path).unwrap();
    path.display().to_string()
}

fn good(output: &Output, before: bool, verb: &str) -> Result<(), Failure> {
    if output.status.success() {
        return Ok(());
    }
    let text = format!("{verb}: {}{}", text(&output.stdout), text(&output.stderr));
    Err(Failure { before, text })
}

fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !condition() {
        if Instant::now() > deadline {
            return Err(Failure::after(format!("waited in vain: {what}")));
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    Ok(())
}

fn dump(moving: &dyn Moving, verb: &str, images: &str, more: &[&str]) -> Result<(), Failure> {
    let host = moving.place().source();
    let pid = moving.pid().to_string();
    let words = [&[verb, "-t", &pid, "-D", images], more, &moving.words(verb)].concat();
    good(&host.whimbrel(&words), true, verb)?;
    if verb == "dump" {
        until("the program is gone", || !host.proc(moving.pid(), "").exists())?;
    }
    Ok(())
}

fn restore(moving: &dyn Moving, images: &str, more: &[&str]) -> Result<(), Failure> {
    let host = moving.place().destination();
    let words = [&["restore", "-d", "-D", images], more, &moving.words("restore")].concat();
    let output = host.whimbrel(&words);
    if !output.status.success() && std::env::var_os("WHIMBREL_TEST_KEEP").is_some() {
        println!("images of {}: {images}", moving.name());
    }
    good(&output, false, "restore")
}

fn dump_and_restore(moving: &dyn Moving) -> Result<(), Failure> {
    let images = images(moving, "images");
    dump(moving, "dump", &images, &[])?;
    restore(moving, &images, &[])?;
    moving.is_the_same()
}

fn three_times(moving: &dyn Moving) -> Result<(), Failure> {
    for round in 1..=3 {
        let images = images(moving, &format!("images-{round}"));
        let failed = |failure: Failure| Failure {
            // What is refused the second time was not refused.
            before: failure.before && round == 1,
            text: format!("round {round}: {}", failure.text),
        };
        dump(moving, "dump", &images, &[]).map_err(failed)?;
        restore(moving, &images, &[]).map_err(failed)?;
        moving.is_the_same().map_err(failed)?;
    }
    Ok(())
}

fn chain(moving: &dyn Moving) -> Result<(), Failure> {
    let [one, two, three] = ["one", "two", "three"].map(|name| images(moving, name));
    dump(moving, "pre-dump", &one, &[])?;
    dump(moving, "pre-dump", &two, &["--prev-images-dir", "../one"])?;
    dump(moving, "dump", &three, &["--prev-images-dir", "../two", "--track-mem"])?;
    restore(moving, &three, &[])?;
    moving.is_the_same()
}

/// Starts the tool in a host, with its output in a file.
fn start(host: &Host, log: &Path, words: &[&str]) -> Running {
    let file = std::fs::File::create(log).unwrap();
    let mut command = host.command(&host.tool(words));
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file);
    Running::start(command)
}

/// Waits until a tool has said something.
fn says(running: &mut Running, log: &Path, words: &str) -> Result<(), Failure> {
    let read = || std::fs::read_to_string(log).unwrap_or_default();
    let mut ended = false;
    until(&format!("{words:?} in {}", log.display()), || {
        ended = running.ended();
        ended || read().contains(words)
    })?;
    if ended && !read().contains(words) {
        return Err(Failure {
            before: true,
            text: read(),
        });
    }
    Ok(())
}

fn ends_well(running: &mut Running, log: &Path, what: &str) -> Result<(), Failure> {
    until(what, || running.ended()).map_err(|failure| {
        Failure::after(format!(
            "{} {}",
            failure.text,
            std::fs::read_to_string(log).unwrap_or_default()
        ))
    })?;
    if running.wait().success() {
        return Ok(());
    }
    Err(Failure::after(format!(
        "{what}: {}",
        std::fs::read_to_string(log).unwrap_or_default()
    )))
}

fn page_server(moving: &dyn Moving) -> Result<(), Failure> {
    let [here, there] = ["here", "there"].map(|name| images(moving, name));
    let log = moving.directory().join("page-server.log");
    let host = moving.place().source();
    let mut server = start(
        host,
        &log,
        &[
            "page-server",
            "--json",
            "-D",
            &there,
            "--address",
            "127.0.0.1",
            "--port",
            PORT,
        ],
    );
    says(&mut server, &log, "listening")?;
    dump(
        moving,
        "dump",
        &here,
        &["--page-server", "--address", "127.0.0.1", "--port", PORT],
    )?;
    ends_well(&mut server, &log, "the page server ends")?;
    // Where the pages are, the other images come to.
    for entry in std::fs::read_dir(&here).unwrap().flatten() {
        std::fs::copy(entry.path(), Path::new(&there).join(entry.file_name())).unwrap();
    }
    restore(moving, &there, &[])?;
    moving.is_the_same()
}

/// Restores with memory that follows, and has the program look at itself meanwhile, or compares when all is there: before,
/// the kernel shows neither arguments nor environment.
fn restore_lazily(
    moving: &dyn Moving,
    images: &str,
    wait_for_all: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    if moving.at_once() {
        moving.look();
    }
    restore(moving, images, &["--lazy-pages"])?;
    wait_for_all()?;
    if moving.at_once() { Ok(()) } else { moving.is_the_same() }
}

fn lazily(moving: &dyn Moving) -> Result<(), Failure> {
    let images = images(moving, "images");
    dump(moving, "dump", &images, &[])?;
    let log = moving.directory().join("daemon.log");
    let mut daemon = start(moving.place().source(), &log, &["lazy-pages", "-D", &images]);
    until("the daemon's socket", || {
        Path::new(&images).join("lazy-pages.socket").exists()
    })?;
    restore_lazily(moving, &images, || {
        ends_well(&mut daemon, &log, "the daemon ends when all is there")
    })
}

fn lazily_remote(moving: &dyn Moving) -> Result<(), Failure> {
    let images = images(moving, "images");
    let (source, destination) = (moving.place().source(), moving.place().destination());
    let (pid, address) = (moving.pid().to_string(), source.address.as_str());
    let (dump_log, daemon_log) = (
        moving.directory().join("dump.log"),
        moving.directory().join("daemon.log"),
    );
    let words = [
        "dump",
        "-v4",
        "-t",
        &pid,
        "-D",
        &images,
        "--lazy-pages",
        "--address",
        address,
        "--port",
        PORT,
    ];
    let mut dump = start(source, &dump_log, &[&words[..], &moving.words("dump")].concat());
    says(&mut dump, &dump_log, "listens on")?;
    let words = [
        "lazy-pages",
        "-D",
        &images,
        "--page-server",
        "--address",
        address,
        "--port",
        PORT,
    ];
    let mut daemon = start(destination, &daemon_log, &words);
    until("the daemon's socket", || {
        Path::new(&images).join("lazy-pages.socket").exists() || daemon.ended()
    })?;
    restore_lazily(moving, &images, || {
        ends_well(&mut daemon, &daemon_log, "the daemon ends when all is there")?;
        ends_well(&mut dump, &dump_log, "the dump ends when all was fetched")
    })?;
    until("the old copy is gone", || !source.proc(moving.pid(), "").exists())
}

fn migrate(moving: &dyn Moving, mode: &str, at_once: bool) -> Result<(), Failure> {
    let (source, destination) = (moving.place().source(), moving.place().destination());
    let words = [&["--mode", mode], &moving.words("migrate")[..]].concat();
    let mut migration = source.migrate(moving.pid(), destination, &words);
    // From then on the tree is frozen, and next runs over there.
    let told = at_once && migration.wait_for_phase("prepared");
    if told {
        moving.look();
    }
    migration.finish().map_err(|text| Failure { before: true, text })?;
    until("the old copy is gone", || !source.proc(moving.pid(), "").exists())?;
    if told { Ok(()) } else { moving.is_the_same() }
}

fn pre_copy(moving: &dyn Moving) -> Result<(), Failure> {
    migrate(moving, "pre-copy", false)
}

fn post_copy(moving: &dyn Moving) -> Result<(), Failure> {
    migrate(moving, "post-copy", moving.at_once())
}
