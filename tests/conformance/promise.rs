//! One promise: started, moved, compared, asked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::common::facts::{Facts, differences, facts_of_all};
use crate::common::flavour::{Failure, Flavour, Moving};
use crate::common::host::Host;
use crate::common::place::Place;
use crate::common::victim::{PYTHON, start_daemon};

/// As `promises.py --list` tells it; its `promise` says what the marks mean.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promise {
    pub kind: String,
    pub name: String,
    options: Vec<String>,
    dump: Vec<String>,
    restore: Vec<String>,
    migrate: Vec<String>,
    not_in: BTreeMap<String, String>,
    pub refused: Option<String>,
    broken: BTreeMap<String, String>,
    unlike: Vec<String>,
}

/// What came out.
pub enum Verdict {
    /// The program found itself unharmed.
    Held,
    /// It was refused as expected, and went on.
    Refused,
    /// It is not kept, which is known.
    Broken,
    /// This machine cannot ask it.
    Skipped(String),
    /// It is not kept.
    Failed(String),
}

impl Verdict {
    /// For lists.
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Held => "held",
            Verdict::Refused => "refused",
            Verdict::Broken => "broken",
            Verdict::Skipped(_) => "skipped",
            Verdict::Failed(_) => "FAILED",
        }
    }
}

impl std::fmt::Display for Promise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.kind, self.name)
    }
}

/// How long a program may take to set itself up, or to look at itself.
const LIMIT: Duration = Duration::from_secs(40);

fn runner() -> PathBuf {
    crate::common::program("conformance/promises.py")
}

/// All promises, or those that the user picked.
pub fn all() -> Vec<Promise> {
    let output = Command::new(PYTHON)
        .args(["-I", "-S", "-B"])
        .arg(runner())
        .arg("--list")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let promises: Vec<Promise> = serde_json::from_slice(&output.stdout).unwrap();
    let only = std::env::var("WHIMBREL_CONFORMANCE_ONLY").unwrap_or_default();
    promises
        .into_iter()
        .filter(|promise| promise.to_string().contains(&only))
        .collect()
}

/// A program between its setting up and its looking at itself.
struct Asked<'a> {
    promise: &'a Promise,
    place: &'a Place,
    pid: i32,
    directory: PathBuf,
    at_once: bool,
    before: Facts,
}

impl Moving for Asked<'_> {
    fn name(&self) -> String {
        self.promise.to_string()
    }

    fn place(&self) -> &Place {
        self.place
    }

    fn pid(&self) -> i32 {
        self.pid
    }

    fn directory(&self) -> &Path {
        &self.directory
    }

    fn words(&self, verb: &str) -> Vec<&str> {
        let own = match verb {
            "restore" => self.promise.restore.as_slice(),
            "dump" => &self.promise.dump,
            "migrate" => return self.promise.migrate.iter().map(String::as_str).collect(),
            _ => &[],
        };
        self.promise.options.iter().chain(own).map(String::as_str).collect()
    }

    fn at_once(&self) -> bool {
        self.at_once
    }

    fn look(&self) {
        std::fs::write(self.directory.join("go"), "").unwrap();
    }

    /// /proc must say what it said before.
    fn is_the_same(&self) -> Result<(), Failure> {
        let host = self.place.destination();
        let two = host.name != self.place.source().name;
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let now = facts_of(self.place, host);
            let mut all = differences(&self.before, &now);
            all.retain(|line| {
                // Each host has namespaces of its own, and where a program arrives, the tool there is its parent.
                let of_host = line.split(' ').nth(1) == Some("ns")
                    || is_like(line, "* stat parent: Some(\"1\")")
                    || is_like(line, "* status PPid: Some(\"1\")");
                let known = two && of_host || self.promise.unlike.iter().any(|form| is_like(line, form));
                !known
            });
            if all.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                all.truncate(20);
                return Err(Failure::after(format!(
                    "/proc says something else:\n{}",
                    all.join("\n")
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Does a line have this form, in which * stands for anything?
fn is_like(line: &str, form: &str) -> bool {
    let mut rest = line;
    form.split('*').all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    })
}

fn facts_of(place: &Place, host: &Host) -> Facts {
    facts_of_all(host, |pid| place.is_tool(host, pid))
}

/// Facts that do not change by themselves any more.
fn settled(place: &Place, host: &Host) -> Facts {
    let mut last = facts_of(place, host);
    for _ in 0..30 {
        std::thread::sleep(Duration::from_millis(15));
        let now = facts_of(place, host);
        if now == last {
            break;
        }
        last = now;
    }
    last
}

impl Promise {
    /// Why it cannot be asked in a flavour.
    pub fn not_in(&self, flavour: &Flavour) -> Option<&str> {
        flavour.of(&self.not_in)
    }

    /// Why it is known not to be kept in a flavour.
    pub fn broken(&self, flavour: &Flavour) -> Option<&str> {
        flavour.of(&self.broken)
    }

    /// Asks it once.
    pub fn hold(&self, place: &Place, flavour: &Flavour, number: usize) -> Verdict {
        let verdict = self.ask(place, flavour, number);
        place.clean();
        match (verdict, self.broken(flavour)) {
            (Verdict::Failed(_), Some(_)) => Verdict::Broken,
            (Verdict::Held, Some(why)) => Verdict::Failed(format!("it is kept now; take the mark away ({why})")),
            (verdict, _) => verdict,
        }
    }

    fn ask(&self, place: &Place, flavour: &Flavour, number: usize) -> Verdict {
        let directory = place.directory(&format!("{number}"));
        let errors = directory.join("err");
        let place_of = directory.display().to_string();
        let mut words: Vec<String> = [PYTHON, "-I", "-S", "-B"].map(str::to_owned).to_vec();
        words.extend([
            runner().display().to_string(),
            self.kind.clone(),
            self.name.clone(),
            place_of,
        ]);
        let host = place.source();
        let pid = start_daemon(host, &directory, &words, &errors);
        let said = || std::fs::read_to_string(&errors).unwrap_or_default();
        let read = |name: &str| {
            let deadline = Instant::now() + LIMIT;
            loop {
                if let Ok(text) = std::fs::read_to_string(directory.join(name)) {
                    return Ok(text);
                }
                let here = place.destination().proc(pid, "").exists() || host.proc(pid, "").exists();
                if !here && !directory.join(name).exists() {
                    return Err(format!("the program is gone: {}", said()));
                }
                if Instant::now() > deadline {
                    let mut hosts = vec![host.list()];
                    hosts.push(place.destination().list());
                    return Err(format!("no {name} from the program: {} {hosts:#?}", said()));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        match read("ready") {
            Ok(text) if text == "ready" => {}
            Ok(text) => {
                return match text.strip_prefix("skipped: ") {
                    Some(reason) => Verdict::Skipped(reason.to_owned()),
                    None => Verdict::Failed(format!("cannot be set up: {text}")),
                };
            }
            Err(text) => return Verdict::Failed(format!("cannot be set up: {text}")),
        }
        let moving = Asked {
            promise: self,
            place,
            pid,
            directory: directory.clone(),
            // What is known to be broken may be so in /proc only, which is not looked at then.
            at_once: flavour.is("lazy") && number.is_multiple_of(2) && self.broken(flavour).is_none(),
            before: settled(place, host),
        };
        let moved = (flavour.go)(&moving);
        let refused = match (moved, &self.refused) {
            (Ok(()), None) => false,
            (Ok(()), Some(words)) => {
                return Verdict::Failed(format!("it is not refused any more ({words}): take the mark away"));
            }
            (Err(failure), Some(words)) if failure.before && failure.text.contains(words.as_str()) => true,
            (Err(failure), _) => return Verdict::Failed(format!("{} {}", failure.text, said())),
        };
        moving.look();
        match read("result") {
            Ok(text) if text == "held" && refused => Verdict::Refused,
            Ok(text) if text == "held" => Verdict::Held,
            Ok(text) | Err(text) => Verdict::Failed(format!("{text} {}", said())),
        }
    }
}
