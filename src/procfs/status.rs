//! `/proc/PID/status`.

use crate::error::{Error, Result};

/// The fields that a dump needs, by their meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Status {
    pub umask: u32,
    pub tgid: i32,
    /// Ids in each pid namespace, outermost first.
    pub ns_pid: Vec<i32>,
    pub ns_pgid: Vec<i32>,
    pub ns_sid: Vec<i32>,
    /// Real, effective, saved, file system.
    pub uid: [u32; 4],
    pub gid: [u32; 4],
    pub groups: Vec<u32>,
    pub cap_inh: u64,
    pub cap_prm: u64,
    pub cap_eff: u64,
    pub cap_bnd: u64,
    pub cap_amb: u64,
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    pub threads: u32,
    /// Processors that it may run on, bit n for processor n from the lowest of the first byte.
    pub cpus_allowed: Vec<u8>,
    /// The process that traces it; 0 for none.
    pub tracer_pid: i32,
    pub rss_kb: u64,
}

/// Parses the file.
///
/// # Errors
/// When a needed field is missing or damaged.
pub fn parse(text: &[u8]) -> Result<Status> {
    // The name is escaped by the kernel, so every line is a field.
    let text = String::from_utf8_lossy(text);
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
    };
    let need =
        |name: &str| field(name).ok_or_else(|| Error::new("parse status").because(format!("there is no field {name}")));
    let bad = |name: &str| Error::new("parse status").because(format!("the field {name} is damaged"));
    let ints = |name: &str| -> Vec<i64> {
        field(name)
            .unwrap_or("")
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect()
    };
    let four = |name: &str| -> Result<[u32; 4]> {
        let all: Vec<u32> = ints(name).into_iter().map(|id| id as u32).collect();
        all.try_into().map_err(|_| bad(name))
    };
    let mask = |name: &str| u64::from_str_radix(need(name)?, 16).map_err(|_| bad(name));
    let namespaced = |name: &str| ints(name).into_iter().map(|id| id as i32).collect();
    Ok(Status {
        umask: field("Umask")
            .and_then(|umask| u32::from_str_radix(umask, 8).ok())
            .unwrap_or(0o22),
        tgid: need("Tgid")?.parse().map_err(|_| bad("Tgid"))?,
        ns_pid: namespaced("NSpid"),
        ns_pgid: namespaced("NSpgid"),
        ns_sid: namespaced("NSsid"),
        uid: four("Uid")?,
        gid: four("Gid")?,
        groups: ints("Groups").into_iter().map(|id| id as u32).collect(),
        cap_inh: mask("CapInh")?,
        cap_prm: mask("CapPrm")?,
        cap_eff: mask("CapEff")?,
        cap_bnd: mask("CapBnd")?,
        cap_amb: mask("CapAmb")?,
        no_new_privs: field("NoNewPrivs") == Some("1"),
        seccomp: field("Seccomp").and_then(|mode| mode.parse().ok()).unwrap_or(0),
        threads: field("Threads").and_then(|count| count.parse().ok()).unwrap_or(1),
        cpus_allowed: field("Cpus_allowed").map(bitmap).unwrap_or_default(),
        tracer_pid: field("TracerPid").and_then(|pid| pid.parse().ok()).unwrap_or(0),
        rss_kb: field("VmRSS")
            .and_then(|rss| rss.trim_end_matches(" kB").parse().ok())
            .unwrap_or(0),
    })
}

/// A bitmap as the kernel prints it: hexadecimal groups of 32 bits, the highest first. Empty when it is damaged.
fn bitmap(text: &str) -> Vec<u8> {
    let group = |group: &str| u32::from_str_radix(group, 16).ok();
    let groups: Option<Vec<u32>> = text.rsplit(',').map(group).collect();
    groups
        .unwrap_or_default()
        .iter()
        .flat_map(|group| group.to_le_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_of_more_than_one_group_are_read() {
        assert_eq!(bitmap("3"), [3, 0, 0, 0]);
        assert_eq!(bitmap("80000000,00000102"), [2, 1, 0, 0, 0, 0, 0, 0x80]);
        assert!(bitmap("x").is_empty());
    }

    #[test]
    fn our_own_status_is_read() {
        let status = parse(&std::fs::read("/proc/self/status").unwrap()).unwrap();
        assert_eq!(status.tgid, std::process::id() as i32);
        assert_eq!(status.ns_pid.last(), Some(&status.tgid));
    }

    #[test]
    fn damaged_text_is_an_error_not_a_panic() {
        let text = std::fs::read("/proc/self/status").unwrap();
        for end in 0..text.len() {
            let _ = parse(&text[..end]);
        }
        assert!(parse(b"Tgid:\tx\n").is_err());
    }
}
