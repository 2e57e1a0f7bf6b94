//! `/proc/PID/mountinfo`.

/// One mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Its id.
    pub id: i32,
    /// Device of its file system (major, minor).
    pub device: (u32, u32),
    /// The directory of the file system that is mounted.
    pub root: Vec<u8>,
    /// Where, below the process's root.
    pub point: Vec<u8>,
}

/// Parses the file; lines of another form are left out.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&byte| byte == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|&byte| byte == b' ');
    let mut word = || words.next();
    let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse().ok();
    let (id, _parent, device, root, point) = (word()?, word()?, word()?, word()?, word()?);
    let colon = device.iter().position(|&byte| byte == b':')?;
    Some(Mount {
        id: number(id)? as i32,
        device: (number(&device[..colon])?, number(&device[colon + 1..])?),
        root: unescape(root),
        point: unescape(point),
    })
}

/// Blanks, tabs, newlines and backslashes are written as octal numbers (proc_pid_mountinfo(5)).
fn unescape(text: &[u8]) -> Vec<u8> {
    let (mut plain, mut at) = (Vec::with_capacity(text.len()), 0);
    while at < text.len() {
        let octal = text.get(at + 1..at + 4).filter(|digits| {
            text[at] == b'\\' && digits[0] <= b'3' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit))
        });
        match octal {
            Some(digits) => {
                plain.push(digits.iter().fold(0, |value, digit| value * 8 + (digit - b'0')));
                at += 4;
            }
            None => {
                plain.push(text[at]);
                at += 1;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_with_blanks_in_their_names_and_damage_is_left_out() {
        let mounts = parse(b"36 35 98:0 /a\\040b /mnt\\134x rw,noatime master:1 - ext3 /dev/root rw\nnonsense\n\n1 \\");
        let expected = Mount {
            id: 36,
            device: (98, 0),
            root: b"/a b".to_vec(),
            point: b"/mnt\\x".to_vec(),
        };
        assert_eq!(mounts, [expected]);
    }
}
