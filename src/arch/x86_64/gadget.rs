//! Instructions that every program already holds and that the first injected call borrows.

/// Finds, in executable bytes, a `syscall` after which control reaches a `ret` having changed nothing but registers.
///
/// Returns its offset and how many words are popped before the `ret`. The vdso has one in the fall-back path of
/// `clock_gettime` and its kin: either `syscall; pop…; ret` or, with zeroed call-used registers, `syscall; xor…; ret`.
pub fn find_syscall_return(text: &[u8]) -> Option<(usize, usize)> {
    text.windows(2)
        .enumerate()
        .filter(|(_, window)| window == &[0x0f, 0x05])
        .find_map(|(offset, _)| pops_before_return(&text[offset + 2..]).map(|pops| (offset, pops)))
}

fn pops_before_return(mut code: &[u8]) -> Option<usize> {
    let mut pops = 0;
    for _ in 0..32 {
        code = match code {
            [0xc3, ..] => return Some(pops),
            [0x90, rest @ ..] => rest,
            // pop %rsp would lose the stack we prepared.
            [0x5c, ..] => return None,
            [0x58..=0x5f, rest @ ..] | [0x41, 0x58..=0x5f, rest @ ..] => {
                pops += 1;
                rest
            }
            // xor %reg,%reg of one register with itself (mod = 3, reg = rm).
            [0x31, modrm, rest @ ..] if same_register(*modrm) => rest,
            [0x45, 0x31, modrm, rest @ ..] if same_register(*modrm) => rest,
            _ => return None,
        };
    }
    None
}

fn same_register(modrm: u8) -> bool {
    modrm >> 6 == 3 && (modrm >> 3) & 7 == modrm & 7
}

/// Finds the signal restorer that every C library has: `mov $15,%rax; syscall`, which is `rt_sigreturn(2)`.
pub fn find_restorer(text: &[u8]) -> Option<usize> {
    const GLIBC: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];
    const MUSL: &[u8] = &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05];
    find(text, GLIBC).or_else(|| find(text, MUSL))
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    let (first, rest) = pattern.split_first()?;
    let mut from = 0;
    while let Some(at) = text[from..].iter().position(|byte| byte == first) {
        let at = from + at;
        if text[at + 1..].starts_with(rest) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_syscall_with_pops_or_cleared_registers_before_its_return_is_found() {
        assert_eq!(
            find_syscall_return(&[0x90, 0x0f, 0x05, 0x5b, 0x41, 0x5c, 0x5d, 0xc3]),
            Some((1, 3))
        );
        assert_eq!(
            find_syscall_return(&[0x0f, 0x05, 0x31, 0xd2, 0x45, 0x31, 0xdb, 0xc3]),
            Some((0, 0))
        );
        assert_eq!(
            find_syscall_return(&[0x0f, 0x05, 0xc9, 0xc3]),
            None,
            "leave moves the stack"
        );
        assert_eq!(
            find_syscall_return(&[0x0f, 0x05, 0x5c, 0xc3]),
            None,
            "pop rsp moves the stack"
        );
        assert_eq!(find_syscall_return(&[0x0f, 0x05]), None);
    }

    #[test]
    fn the_c_library_of_this_program_has_a_restorer() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let path = maps
            .lines()
            .find(|l| l.contains("libc.so"))
            .map(|l| l.split_whitespace().last().unwrap());
        let text = std::fs::read(path.unwrap_or("/proc/self/exe")).unwrap();
        assert!(find_restorer(&text).is_some());
    }
}
