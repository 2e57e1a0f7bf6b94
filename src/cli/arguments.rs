//! Arguments before clap sees them: CRIU's spellings, and its configuration files.
//!
//! * `-v`, `-vvv`, `-v4` become `--verbosity=N`;
//! * `--no-NAME` takes back an earlier `--NAME`, be it from a configuration file;
//! * configuration files become arguments in front of those of the user, so that the user's win. Options of other verbs
//!   are left out, for one file serves them all.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Command;

use whimbrel::error::{Context, Error, Result};

/// The version of CRIU whose command line this is.
pub const CRIU_VERSION: &str = "4.2";

/// Whether the program was started under the name `criu`.
pub fn invoked_as_criu(arguments: &[OsString]) -> bool {
    let name = arguments.first().map(Path::new).and_then(Path::file_name);
    name == Some(OsStr::new("criu"))
}

/// Whether `-V` or `--version` comes before any verb.
pub fn asks_for_version(arguments: &[OsString]) -> bool {
    arguments
        .get(1)
        .is_some_and(|first| first == "-V" || first == "--version")
}

/// Rewrites a command line for `command`.
///
/// # Errors
/// When a configuration file cannot be read or has a line that no verb knows.
pub fn prepare(arguments: Vec<OsString>, as_criu: bool, command: &Command) -> Result<Vec<OsString>> {
    let mut arguments = arguments.into_iter();
    let mut result: Vec<OsString> = arguments.next().into_iter().collect();
    let mut rest: Vec<OsString> = arguments.collect();
    let Some(at) = rest.iter().position(|word| {
        let named = |verb: &Command| OsStr::new(verb.get_name()) == word;
        command.get_subcommands().any(named)
    }) else {
        result.append(&mut rest);
        return Ok(result);
    };
    let verb = command
        .get_subcommands()
        .find(|verb| OsStr::new(verb.get_name()) == rest[at]);
    let verb = verb.ok_or_else(|| Error::new("parse the command line"))?;
    let given = rest.split_off(at + 1);
    let mut options = Vec::new();
    for file in config_files(&given, as_criu) {
        options.extend(read_config(&file, verb, command)?);
    }
    options.extend(given);
    result.append(&mut rest);
    result.append(&mut rewrite(options, verb));
    Ok(result)
}

/// The configuration files to read, in the order in which they are read.
fn config_files(given: &[OsString], as_criu: bool) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let words = || given.iter().take_while(|word| *word != "--");
    if as_criu && !words().any(|word| word == "--no-default-config") {
        files.push(PathBuf::from("/etc/criu/default.conf"));
        files.extend(std::env::var_os("HOME").map(|home| Path::new(&home).join(".criu/default.conf")));
        files.retain(|file| file.exists());
        files.extend(std::env::var_os("CRIU_CONFIG_FILE").map(PathBuf::from));
    }
    let mut words = words();
    while let Some(word) = words.next() {
        if word == "--config" {
            files.extend(words.next().map(PathBuf::from));
        } else if let Some(file) = word.to_str().and_then(|word| word.strip_prefix("--config=")) {
            files.push(PathBuf::from(file));
        }
    }
    files
}

fn read_config(file: &Path, verb: &Command, command: &Command) -> Result<Vec<OsString>> {
    let failed = || Error::new("read a configuration file").object(file.display().to_string());
    let text = std::fs::read_to_string(file).with(|| failed().hint("see --config and --no-default-config"))?;
    let mut options = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let Some((name, value)) = parse_line(line) else {
            continue;
        };
        let positive = name
            .strip_prefix("no-")
            .filter(|_| !knows(verb, &name))
            .unwrap_or(&name);
        if knows(verb, &name) || knows(verb, positive) {
            options.push(match value {
                Some(value) => format!("--{name}={value}"),
                None => format!("--{name}"),
            });
        } else if !command
            .get_subcommands()
            .any(|other| knows(other, &name) || knows(other, positive))
        {
            return Err(failed().because(format!("line {}: there is no option {name}", index + 1)));
        }
    }
    Ok(options.into_iter().map(OsString::from).collect())
}

fn knows(verb: &Command, name: &str) -> bool {
    verb.get_arguments().any(|argument| {
        argument.get_long() == Some(name)
            || argument
                .get_all_aliases()
                .is_some_and(|aliases| aliases.contains(&name))
    })
}

/// Name and value of an option in a configuration file; `None` for a blank line or a comment.
fn parse_line(line: &str) -> Option<(String, Option<String>)> {
    let line = line.trim_start();
    let end = line
        .find(|c: char| c.is_whitespace() || c == '#' || c == '=')
        .unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    if name.is_empty() {
        return None;
    }
    let rest = rest.trim_start().trim_start_matches('=').trim_start();
    let Some(quoted) = rest.strip_prefix('"') else {
        let value = rest.split('#').next().unwrap_or_default().trim_end();
        return Some((name.into(), Some(value.to_owned()).filter(|value| !value.is_empty())));
    };
    let (mut value, mut characters) = (String::new(), quoted.chars().peekable());
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            // All other escape sequences are literal: criu(8).
            '\\' if characters.peek() == Some(&'"') => value.extend(characters.next()),
            other => value.push(other),
        }
    }
    Some((name.into(), Some(value)))
}

/// CRIU's spellings of verbosity and negation.
fn rewrite(options: Vec<OsString>, verb: &Command) -> Vec<OsString> {
    let mut result: Vec<OsString> = Vec::new();
    let mut verbosity = None;
    let mut words = options.into_iter();
    let has_verbosity = knows(verb, "verbosity");
    while let Some(word) = words.next() {
        let Some(text) = word.to_str() else {
            result.push(word);
            continue;
        };
        if text == "--" {
            result.push(word);
            result.extend(words);
            break;
        }
        if has_verbosity && let Some(level) = verbosity_of(text, verbosity) {
            verbosity = Some(level);
            continue;
        }
        if let Some(name) = text.strip_prefix("--no-")
            && !knows(verb, &text[2..])
            && is_flag(verb, name)
        {
            let positive = format!("--{name}");
            let short = short_of(verb, name).map(|short| format!("-{short}"));
            result.retain(|earlier| *earlier != *positive && Some(earlier.to_string_lossy().into_owned()) != short);
            continue;
        }
        let takes_next = takes_value(verb, text);
        result.push(word);
        if takes_next {
            result.extend(words.next());
        }
    }
    if let Some(level) = verbosity {
        let at = result.iter().position(|word| word == "--").unwrap_or(result.len());
        result.insert(at, format!("--verbosity={level}").into());
    }
    result
}

/// The level after `word`, if that is about verbosity and `before` was the level.
fn verbosity_of(word: &str, before: Option<u8>) -> Option<u8> {
    const DEFAULT: u8 = 2;
    let before = before.unwrap_or(DEFAULT);
    if word == "--verbosity" {
        return Some(before.saturating_add(1));
    }
    if let Some(number) = word.strip_prefix("--verbosity=") {
        return number.parse().ok();
    }
    let rest = word.strip_prefix("-v")?;
    if rest.chars().all(|c| c == 'v') {
        return Some(before.saturating_add(1).saturating_add(rest.len() as u8));
    }
    rest.parse().ok()
}

fn find<'a>(verb: &'a Command, name: &str) -> Option<&'a clap::Arg> {
    verb.get_arguments().find(|argument| argument.get_long() == Some(name))
}

fn is_flag(verb: &Command, name: &str) -> bool {
    find(verb, name).is_some_and(|argument| !argument.get_action().takes_values())
}

fn short_of(verb: &Command, name: &str) -> Option<char> {
    find(verb, name)?.get_short()
}

/// Whether the word after `word` is its value.
fn takes_value(verb: &Command, word: &str) -> bool {
    let argument = match word.strip_prefix("--") {
        Some(name) => find(verb, name),
        None => word.strip_prefix('-').and_then(|letters| {
            let mut letters = letters.chars();
            let only = letters.next().filter(|_| letters.next().is_none())?;
            verb.get_arguments().find(|argument| argument.get_short() == Some(only))
        }),
    };
    argument.is_some_and(|argument| argument.get_action().takes_values() && !argument.is_require_equals_set())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(words: &[&str]) -> Vec<String> {
        let command = super::super::command();
        let words = words.iter().map(OsString::from).collect();
        let prepared = prepare(words, false, &command).unwrap();
        prepared.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn verbosity_is_spelled_as_with_criu() {
        for (given, level) in [("-v", 3), ("-vv", 4), ("-v4", 4), ("-v0", 0), ("--verbosity=1", 1)] {
            let last = prepared(&["whimbrel", "dump", given, "-t", "1"]).pop().unwrap();
            assert_eq!(last, format!("--verbosity={level}"), "{given}");
        }
        // A value that looks like an option stays one.
        assert_eq!(
            prepared(&["whimbrel", "dump", "-o", "-v4"]),
            ["whimbrel", "dump", "-o", "-v4"]
        );
    }

    #[test]
    fn a_negated_option_takes_back_what_came_before() {
        let words = ["whimbrel", "dump", "-R", "--file-locks", "--no-leave-running"];
        assert_eq!(prepared(&words), ["whimbrel", "dump", "--file-locks"]);
        assert_eq!(
            prepared(&["whimbrel", "dump", "--no-default-config"]),
            ["whimbrel", "dump", "--no-default-config"]
        );
    }

    #[test]
    fn configuration_files_come_first_and_skip_what_other_verbs_have() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("conf");
        std::fs::write(
            &file,
            "# all of it\n\ntcp-established\nwork-dir \"/a \\\"b\\\" c\" # why\nleave-running\nport 7\n  no-file-locks\n",
        )
        .unwrap();
        let file = file.to_str().unwrap();
        let words = ["whimbrel", "restore", "--config", file, "-d"];
        assert_eq!(
            prepared(&words)[2..],
            ["--tcp-established", "--work-dir=/a \"b\" c", "--config", file, "-d"]
        );
        std::fs::write(file, "leave-runing\n").unwrap();
        let words = words.iter().map(OsString::from).collect();
        let error = prepare(words, false, &super::super::command()).unwrap_err();
        assert!(
            error.chain().contains("line 1: there is no option leave-runing"),
            "{}",
            error.chain()
        );
    }
}
