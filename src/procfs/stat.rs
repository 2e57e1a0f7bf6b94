//! `/proc/PID/stat`.

use crate::error::{Error, Result};

/// The fields that a dump needs, by their names in proc_pid_stat(5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stat {
    pub pid: i32,
    pub comm: Vec<u8>,
    pub state: u8,
    pub ppid: i32,
    pub pgrp: i32,
    pub session: i32,
    pub tty: i32,
    pub flags: u32,
    pub nice: i32,
    pub starttime: u64,
    pub exit_signal: i32,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    pub exit_code: i32,
}

/// Parses the one line.
///
/// # Errors
/// When a field is missing or no number.
pub fn parse(text: &[u8]) -> Result<Stat> {
    parse_line(text)
        .ok_or_else(|| Error::new("parse stat").because(format!("unexpected text {:?}", String::from_utf8_lossy(text))))
}

fn parse_line(text: &[u8]) -> Option<Stat> {
    // The name may hold anything, parentheses and newlines included: it ends at the last parenthesis.
    let open = text.iter().position(|&byte| byte == b'(')?;
    let close = text.iter().rposition(|&byte| byte == b')')?;
    let comm = text.get(open + 1..close)?.to_vec();
    let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.trim().parse::<i64>().ok();
    let rest: Vec<&[u8]> = text
        .get(close + 2..)?
        .trim_ascii_end()
        .split(|&byte| byte == b' ')
        .collect();
    // Field numbers as in the manual page; the state is field 3.
    let field = |index: usize| rest.get(index - 3).copied();
    let signed = |index: usize| field(index).and_then(number);
    let unsigned = |index: usize| std::str::from_utf8(field(index)?).ok()?.parse::<u64>().ok();
    Some(Stat {
        pid: number(text.get(..open)?)? as i32,
        comm,
        state: *field(3)?.first()?,
        ppid: signed(4)? as i32,
        pgrp: signed(5)? as i32,
        session: signed(6)? as i32,
        tty: signed(7)? as i32,
        flags: unsigned(9)? as u32,
        nice: signed(19)? as i32,
        starttime: unsigned(22)?,
        exit_signal: signed(38)? as i32,
        start_code: unsigned(26)?,
        end_code: unsigned(27)?,
        start_stack: unsigned(28)?,
        start_data: unsigned(45)?,
        end_data: unsigned(46)?,
        start_brk: unsigned(47)?,
        arg_start: unsigned(48)?,
        arg_end: unsigned(49)?,
        env_start: unsigned(50)?,
        env_end: unsigned(51)?,
        exit_code: signed(52)? as i32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_stat_is_read() {
        let stat = parse(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(stat.pid, std::process::id() as i32);
        assert!(stat.start_stack > stat.start_code && stat.arg_end > stat.arg_start);
    }

    #[test]
    fn a_hostile_name_does_not_shift_the_fields() {
        let line = std::fs::read("/proc/self/stat").unwrap();
        let text = String::from_utf8(line).unwrap();
        let (head, tail) = (text.find('(').unwrap(), text.rfind(')').unwrap());
        let hostile = format!("{}(a) R 1 (\n{}", &text[..head], &text[tail..]);
        let stat = parse(hostile.as_bytes()).unwrap();
        assert_eq!(stat.comm, b"a) R 1 (\n");
        assert_eq!(stat.pid, std::process::id() as i32);
        for end in 0..text.len() {
            let _ = parse(&text.as_bytes()[..end]);
        }
    }
}
