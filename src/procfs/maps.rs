//! `/proc/PID/maps` and `/proc/PID/smaps`.

use crate::error::{Error, Result};

/// One mapping (VMA).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_READ | PROT_WRITE | PROT_EXEC`.
    pub prot: i32,
    /// MAP_SHARED (or may be shared), as opposed to MAP_PRIVATE.
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device of the file (major, minor).
    pub device: (u32, u32),
    /// Inode of the file; 0 for memory without one.
    pub inode: u64,
    /// What the last column says: a path, `[heap]`, `[anon:…]`, or nothing.
    pub name: Vec<u8>,
    /// The two-letter flags of smaps' `VmFlags`; empty when only maps was read.
    pub flags: Vec<[u8; 2]>,
    /// Resident pages in bytes (smaps' `Rss`); 0 when only maps was read.
    pub rss: u64,
    /// Swapped pages in bytes (smaps' `Swap`).
    pub swap: u64,
    /// Its protection key, 0 where none was given (smaps' `ProtectionKey`).
    pub key: u32,
}

impl Mapping {
    /// Is this VmFlags letter pair set?
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never: an empty mapping is refused by the parser. Here because clippy wants a pair.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// Does it hold this address?
    pub fn contains(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }

    /// The bracketed names that are not files.
    pub fn is_named(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    /// The same address range, protection and file: what re-validation inside the freeze compares.
    pub fn same_layout(&self, other: &Mapping) -> bool {
        (
            self.start,
            self.end,
            self.prot,
            self.shared,
            self.offset,
            self.device,
            self.inode,
        ) == (
            other.start,
            other.end,
            other.prot,
            other.shared,
            other.offset,
            other.device,
            other.inode,
        ) && self.name == other.name
    }
}

/// Parses maps or smaps.
///
/// # Errors
/// When a line is not of the kernel's form.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        // A header starts with a lower-case hexadecimal digit, an smaps field with a capital.
        if line[0].is_ascii_uppercase() {
            let Some(mapping) = mappings.last_mut() else {
                return Err(malformed(line));
            };
            field(mapping, line);
        } else {
            let mapping = header(line).ok_or_else(|| malformed(line))?;
            if mapping.start >= mapping.end || mappings.last().is_some_and(|last| last.end > mapping.start) {
                return Err(malformed(line));
            }
            mappings.push(mapping);
        }
    }
    Ok(mappings)
}

fn header(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut word = || -> Option<&[u8]> {
        let end = rest.iter().position(|&byte| byte == b' ').unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail.strip_prefix(b" ").unwrap_or(tail);
        (!word.is_empty()).then_some(word)
    };
    let (range, permissions, offset, device, inode) = (word()?, word()?, word()?, word()?, word()?);
    let (start, end) = split(range, b'-')?;
    let (major, minor) = split(device, b':')?;
    let bit = |index: usize, letter: u8, value: i32| {
        if permissions.get(index) == Some(&letter) {
            value
        } else {
            0
        }
    };
    // The kernel pads the name to a column and escapes newlines as \012.
    let name = rest
        .iter()
        .position(|&byte| byte != b' ')
        .map_or(&[][..], |at| &rest[at..]);
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        prot: bit(0, b'r', libc::PROT_READ) | bit(1, b'w', libc::PROT_WRITE) | bit(2, b'x', libc::PROT_EXEC),
        shared: permissions.get(3) == Some(&b's'),
        offset: hex(offset)?,
        device: (hex(major)? as u32, hex(minor)? as u32),
        inode: std::str::from_utf8(inode).ok()?.parse().ok()?,
        name: unescape(name),
        ..Mapping::default()
    })
}

fn field(mapping: &mut Mapping, line: &[u8]) {
    if let Some(flags) = line.strip_prefix(b"VmFlags:") {
        let words = flags
            .split(|&byte| byte == b' ')
            .filter_map(|word| <[u8; 2]>::try_from(word).ok());
        mapping.flags = words.collect();
    } else if let Some(size) = line.strip_prefix(b"Rss:") {
        mapping.rss = kilobytes(size);
    } else if let Some(size) = line.strip_prefix(b"Swap:") {
        mapping.swap = kilobytes(size);
    } else if let Some(key) = line.strip_prefix(b"ProtectionKey:") {
        mapping.key = std::str::from_utf8(key)
            .ok()
            .and_then(|key| key.trim().parse().ok())
            .unwrap_or(0);
    }
}

fn kilobytes(text: &[u8]) -> u64 {
    let digits = std::str::from_utf8(text).unwrap_or("").trim().trim_end_matches(" kB");
    digits.trim().parse::<u64>().unwrap_or(0).saturating_mul(1024)
}

fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, tail)) = rest.split_first() {
        if rest.starts_with(b"\\012") {
            out.push(b'\n');
            rest = &rest[4..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

fn split(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let position = text.iter().position(|&byte| byte == at)?;
    Some((&text[..position], &text[position + 1..]))
}

fn hex(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

fn malformed(line: &[u8]) -> Error {
    Error::new("parse maps").because(format!("unexpected line {:?}", String::from_utf8_lossy(line)))
}

/// The address of the largest gap between `mappings` that holds `size` bytes, placed in its middle, page aligned.
///
/// In the middle, because the kernel places new mappings at the edges and stacks grow into gaps.
pub fn largest_gap(ranges: &mut [(u64, u64)], size: u64) -> Option<u64> {
    const LOWEST: u64 = 1 << 20;
    ranges.sort_unstable();
    let mut previous = LOWEST;
    let mut best: Option<(u64, u64)> = None;
    for &(start, end) in ranges.iter().chain(&[(crate::arch::TASK_SIZE, crate::arch::TASK_SIZE)]) {
        let start = start.min(crate::arch::TASK_SIZE);
        if start > previous && best.is_none_or(|(from, to)| to - from < start - previous) {
            best = Some((previous, start));
        }
        previous = previous.max(end);
    }
    let (from, to) = best?;
    let slack = (to - from).checked_sub(size + 2 * crate::arch::PAGE_SIZE)?;
    Some((from + slack / 2) & !(crate::arch::PAGE_SIZE - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_smaps_is_read_whole() {
        let maps = parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap();
        assert!(maps.iter().any(|m| m.is_named("[vdso]") && m.has(b"ex")));
        assert!(maps.iter().any(|m| m.is_named("[stack]") && m.has(b"gd") && m.rss > 0));
    }

    #[test]
    fn names_with_spaces_and_newlines_survive() {
        let line = b"7f0000000000-7f0000001000 rw-s 00002000 fe:00 42                         /a b\\012c (deleted)\n";
        let mapping = &parse(line).unwrap()[0];
        assert_eq!(mapping.name, b"/a b\nc (deleted)");
        assert_eq!(
            (mapping.offset, mapping.inode, mapping.shared, mapping.device),
            (0x2000, 42, true, (0xfe, 0))
        );
    }

    #[test]
    fn damaged_text_is_refused_without_panic() {
        let line = b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 \n";
        for end in 0..line.len() - 2 {
            let _ = parse(&line[..end]);
        }
        assert!(parse(b"2-1 rw-p 0 0:0 0\n").is_err());
        assert!(parse(b"Rss: 4 kB\n").is_err());
    }

    #[test]
    fn the_largest_gap_is_used_in_its_middle() {
        let mut ranges = vec![(0x4000_0000, crate::arch::TASK_SIZE), (0, 0x1000_0000)];
        let at = largest_gap(&mut ranges, 0x10000).unwrap();
        assert!(at > 0x1000_0000 && at + 0x10000 < 0x4000_0000);
    }
}
