//! `/proc/PID/fdinfo/N`: the common fields, and the lines that each kind of file adds.

/// What the kernel tells of an open file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// File position.
    pub pos: u64,
    /// Open flags, and O_CLOEXEC of the descriptor.
    pub flags: u32,
    /// Mount that it was opened on.
    pub mount_id: i32,
    /// Inode (since Linux 5.14), 0 when not told.
    pub inode: u64,
    /// All lines after these, as they are.
    pub lines: Vec<String>,
}

impl FdInfo {
    /// The value of the first line `name: value`.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.lines
            .iter()
            .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim))
    }
}

/// Parses the file. What is damaged or unknown is left at its default: kinds check the fields that they need.
pub fn parse(text: &[u8]) -> FdInfo {
    let mut info = FdInfo {
        mount_id: -1,
        ..FdInfo::default()
    };
    for line in String::from_utf8_lossy(text).lines() {
        let (name, value) = line
            .split_once(':')
            .map_or((line, ""), |(name, value)| (name, value.trim()));
        match name {
            "pos" => info.pos = value.parse().unwrap_or(0),
            "flags" => info.flags = u32::from_str_radix(value, 8).unwrap_or(0),
            "mnt_id" => info.mount_id = value.parse().unwrap_or(-1),
            "ino" => info.inode = value.parse().unwrap_or(0),
            _ => info.lines.push(line.to_owned()),
        }
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_fields_and_lines_of_a_kind_are_told_apart() {
        let info = parse(b"pos:\t7\nflags:\t02000002\nmnt_id:\t15\nino:\t9\neventfd-count:                2a\n");
        assert_eq!((info.pos, info.flags, info.mount_id, info.inode), (7, 0o2000002, 15, 9));
        assert_eq!(info.field("eventfd-count"), Some("2a"));
    }
}
