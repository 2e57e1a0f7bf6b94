//! The table of kinds and flavours in the docs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;

use crate::common::flavour::FLAVOURS;
use crate::promise::Promise;

const COMMAND: &str = "cargo test --test conformance -- --ignored write_the_table";

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/conformance.md")
}

/// How many promises of a kind and a flavour are kept, and how many there are.
type Cells = BTreeMap<(String, &'static str), (usize, usize)>;

/// What all that are kept, but for those that are known not to be, come to.
fn expected(promises: &[Promise]) -> Cells {
    let mut cells = Cells::new();
    for promise in promises {
        for flavour in FLAVOURS.iter().filter(|flavour| promise.not_in(flavour).is_none()) {
            let cell = cells.entry((promise.kind.clone(), flavour.name)).or_default();
            cell.0 += usize::from(promise.refused.is_none() && promise.broken(flavour).is_none());
            cell.1 += 1;
        }
    }
    cells
}

fn render(promises: &[Promise], cells: &Cells) -> String {
    let mut text = format!(
        "# What is kept when a process is moved\n\n\
         Each promise of `tests/programs/conformance` is a program that sets a state up, is moved in a flavour, and looks whether it is\n\
         still so and still works. A cell tells how many promises are kept, and of how many if not all are: `tests/run conformance`\n\
         fails when one of them is not, and when one that is listed below as not kept is. (It asks all in the first flavour and a\n\
         quarter in the others, which `WHIMBREL_CONFORMANCE_SHARD` chooses; all with `--all`.) Written by `{COMMAND}`.\n\n"
    );
    let kinds: BTreeSet<&str> = promises.iter().map(|promise| promise.kind.as_str()).collect();
    let names: Vec<&str> = FLAVOURS.iter().map(|flavour| flavour.name).collect();
    let _ = writeln!(
        text,
        "| kind | {} |\n|---|{}",
        names.join(" | "),
        "---|".repeat(names.len())
    );
    let mut totals = vec![(0, 0); names.len()];
    for kind in kinds {
        let _ = write!(text, "| {kind} |");
        for (name, total) in names.iter().zip(&mut totals) {
            let (kept, all) = cells.get(&(kind.to_owned(), *name)).copied().unwrap_or_default();
            *total = (total.0 + kept, total.1 + all);
            let _ = write!(text, " {} |", cell(kept, all));
        }
        text.push('\n');
    }
    let totals_text: Vec<String> = totals.iter().map(|&(kept, all)| cell(kept, all)).collect();
    let _ = writeln!(text, "| all | {} |", totals_text.join(" | "));
    let (kept, all) = totals
        .iter()
        .fold((0, 0), |sum, total| (sum.0 + total.0, sum.1 + total.1));
    let _ = writeln!(
        text,
        "\n{} promises, {kept} of {all} promises-times-flavours kept.",
        promises.len()
    );

    text.push_str("\n## Refused\n\nBefore anything is changed, with an error that contains the words given here; the program goes on.\n\n");
    for promise in promises {
        if let Some(words) = &promise.refused {
            let _ = writeln!(text, "- {promise}: \"{words}\"");
        }
    }
    text.push_str("\n## Known not to work\n\nThe suite fails when one of these begins to.\n\n");
    for (promise, flavours, why) in marked(promises, Promise::broken) {
        let _ = writeln!(text, "- {promise} ({flavours}): {why}");
    }
    text.push_str("\n## Not asked\n\n");
    for (promise, flavours, why) in marked(promises, Promise::not_in) {
        let _ = writeln!(text, "- {promise} ({flavours}): {why}");
    }
    text
}

fn cell(kept: usize, all: usize) -> String {
    match (kept, all) {
        (_, 0) => "–".into(),
        (kept, all) if kept == all => kept.to_string(),
        (kept, all) => format!("{kept} of {all}"),
    }
}

/// Promises with a mark, and the flavours for which each reason holds.
fn marked<'a>(
    promises: &'a [Promise],
    mark: impl Fn(&'a Promise, &crate::common::flavour::Flavour) -> Option<&'a str>,
) -> Vec<(&'a Promise, String, &'a str)> {
    let mut all = Vec::new();
    for promise in promises {
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for flavour in FLAVOURS {
            if let Some(why) = mark(promise, flavour) {
                reasons.entry(why).or_default().push(flavour.name);
            }
        }
        for (why, flavours) in reasons {
            let which = if flavours.len() == FLAVOURS.len() {
                "all".into()
            } else {
                flavours.join("; ")
            };
            all.push((promise, which, why));
        }
    }
    all
}

/// Writes the table.
pub fn write(promises: &[Promise]) {
    std::fs::create_dir_all(path().parent().unwrap()).unwrap();
    std::fs::write(path(), render(promises, &expected(promises))).unwrap();
}

/// The table must be what it is when each promise is kept that is not known not to be; that they are, the other tests see.
pub fn is_up_to_date(promises: &[Promise]) {
    let wanted = render(promises, &expected(promises));
    let found = std::fs::read_to_string(path()).unwrap_or_default();
    let line = wanted
        .lines()
        .zip(found.lines())
        .find(|(wanted, found)| wanted != found);
    assert!(
        wanted == found,
        "docs/conformance.md is not up to date (`{COMMAND}`); first difference: {line:?}"
    );
}
