//! What a process may hold, promise by promise, in every way in which whimbrel moves processes.
//!
//! The promises are small programs in `tests/programs/conformance`, one file a kind; `promises.py` there says how one is made.
//! Each sets a state up, says that it is ready, and after the move looks from the inside whether that state is still so and
//! still works. Here they are started, moved in each flavour, compared by what /proc says of them, and asked.
//!
//! All of them go through a dump and a restore in each run. Of the other flavours a run takes a part, a different one for each
//! value of `WHIMBREL_CONFORMANCE_SHARD` but never none of a kind; with `WHIMBREL_CONFORMANCE_ALL`
//! set it takes all. `WHIMBREL_CONFORMANCE_ONLY` picks promises by words of `kind: name`.
//!
//! A promise that cannot be kept is not left out: whimbrel must refuse it with the words that it expects, and the program must
//! go on; or it is known to be broken, and the suite fails when it is not any more.

#[path = "../common/mod.rs"]
mod common;
mod promise;
mod table;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::flavour::{FLAVOURS, Flavour};
use common::place::Place;
use promise::{Promise, Verdict};

/// How many parts the flavours other than the first are split into.
const SHARDS: usize = 4;

fn can_run() -> bool {
    if !common::can_make_hosts() || !common::has_python() {
        return false;
    }
    let cc = common::installed("cc");
    if !cc {
        common::skip("cc is not installed");
    }
    cc
}

/// The promises of a flavour that this run takes.
fn chosen<'a>(promises: &'a [Promise], flavour: &Flavour) -> Vec<&'a Promise> {
    let all = std::env::var_os("WHIMBREL_CONFORMANCE_ALL").is_some() || flavour.always;
    let shard = common::setting("WHIMBREL_CONFORMANCE_SHARD", 0);
    let mut of_kind: BTreeMap<&str, Vec<&Promise>> = BTreeMap::new();
    for promise in promises.iter().filter(|promise| promise.not_in(flavour).is_none()) {
        of_kind.entry(&promise.kind).or_default().push(promise);
    }
    let offset = shard
        + FLAVOURS
            .iter()
            .position(|other| other.name == flavour.name)
            .unwrap_or(0);
    let part = |promises: Vec<&'a Promise>| -> Vec<&'a Promise> {
        let parts = if all { 1 } else { SHARDS.min(promises.len()) };
        (promises.into_iter().enumerate())
            .filter(|(index, _)| index % parts == offset % parts)
            .map(|(_, promise)| promise)
            .collect()
    };
    of_kind.into_values().flat_map(part).collect()
}

/// Asks promises in one flavour, several at the same time, each worker in a place of its own.
fn ask(flavour: &Flavour, promises: &[&Promise]) -> Vec<Verdict> {
    let next = AtomicUsize::new(0);
    let verdicts = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(2, usize::from) * 2;
    std::thread::scope(|scope| {
        for _ in 0..workers.min(promises.len()) {
            scope.spawn(|| {
                let mut place = None;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(promise) = promises.get(number) else { return };
                    // What panics is the machinery; it is a failure of this promise, in a place that is not used again.
                    let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        let place = place.get_or_insert_with(|| Place::new(flavour));
                        promise.hold(place, flavour, number)
                    }));
                    let verdict = attempt.unwrap_or_else(|panic| {
                        let text = panic.downcast_ref::<String>().cloned();
                        Verdict::Failed(text.unwrap_or_else(|| "panicked".into()))
                    });
                    if matches!(verdict, Verdict::Failed(_)) {
                        place = None;
                    }
                    match &verdict {
                        Verdict::Failed(why) => println!("FAILED {promise} [{}]: {why}", flavour.name),
                        Verdict::Skipped(why) => common::skip(&format!("conformance: {why}")),
                        other => println!("{} {promise} [{}]", other.word(), flavour.name),
                    }
                    verdicts.lock().unwrap().push(verdict);
                }
            });
        }
    });
    verdicts.into_inner().unwrap()
}

/// A flavour's part of this run.
fn holds(name: &str) {
    if !can_run() {
        return;
    }
    let flavour = FLAVOURS.iter().find(|flavour| flavour.name == name).unwrap();
    let promises = promise::all();
    let chosen = chosen(&promises, flavour);
    let verdicts = ask(flavour, &chosen);
    let failed = verdicts
        .iter()
        .filter(|verdict| matches!(verdict, Verdict::Failed(_)))
        .count();
    println!(
        "{name}: {} promises of {}, {failed} failed",
        verdicts.len(),
        promises.len()
    );
    assert_eq!(failed, 0, "promises are not kept; see the lines with FAILED");
}

#[test]
fn promises_are_kept_over_a_dump_and_a_restore() {
    holds("dump + restore");
}

#[test]
fn promises_are_kept_over_three_dumps_and_restores_in_a_row() {
    holds("three times");
}

#[test]
fn promises_are_kept_over_two_pre_dumps_and_a_chain_of_parents() {
    holds("chain");
}

#[test]
fn promises_are_kept_when_memory_goes_through_the_page_server() {
    holds("page server");
}

#[test]
fn promises_are_kept_when_memory_follows_from_the_images() {
    holds("lazily");
}

#[test]
fn promises_are_kept_when_memory_follows_from_another_host() {
    holds("lazily, remote");
}

#[test]
fn promises_are_kept_over_a_migration_in_precopy_mode() {
    holds("pre-copy");
}

#[test]
fn promises_are_kept_over_a_migration_in_postcopy_mode() {
    holds("post-copy");
}

#[test]
fn the_table_in_the_docs_is_that_of_the_promises() {
    if !can_run() {
        return;
    }
    table::is_up_to_date(&promise::all());
}

/// Writes `docs/conformance.md` anew: see there.
#[test]
#[ignore = "writes a file of the project"]
fn write_the_table() {
    assert!(can_run());
    table::write(&promise::all());
}
