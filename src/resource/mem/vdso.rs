//! The vdso and the data pages in front of it.
//!
//! A restored task gets this kernel's vdso. Where its code is byte for byte the source's, it is moved to the address
//! that the program knows. Where it differs, the program keeps its old vdso as plain memory, and each of its functions
//! is made to jump to this kernel's function of the same name, which lies elsewhere.

use whimbrel_images::proto::VmaEntry;

use super::mapping::status;
use crate::error::{Error, Result};
use crate::procfs::maps::Mapping;
use crate::remote::{Expect, Program};

/// Where a vdso with its data pages lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// First data page (vvar); equal to `code` when there is none.
    pub data: u64,
    /// First page of code.
    pub code: u64,
    /// End of code.
    pub end: u64,
}

impl Place {
    /// In a living process.
    pub fn of_maps(maps: &[Mapping]) -> Option<Place> {
        let code = maps.iter().find(|m| m.is_named("[vdso]"))?;
        let data = maps
            .iter()
            .filter(|m| m.is_named("[vvar]") || m.is_named("[vvar_vclock]"))
            .map(|m| m.start)
            .min();
        Some(Place {
            data: data.unwrap_or(code.start).min(code.start),
            code: code.start,
            end: code.end,
        })
    }

    /// In an image.
    pub fn of_image(vmas: &[VmaEntry]) -> Option<Place> {
        let code = vmas.iter().find(|vma| vma.status & status::VDSO != 0)?;
        let data = vmas
            .iter()
            .filter(|vma| vma.status & status::VVAR != 0)
            .map(|vma| vma.start)
            .min();
        Some(Place {
            data: data.unwrap_or(code.start).min(code.start),
            code: code.start,
            end: code.end,
        })
    }

    fn same_shape(&self, other: &Place) -> bool {
        self.code.wrapping_sub(self.data) == other.code.wrapping_sub(other.data)
            && self.end - self.code == other.end - other.code
    }
}

/// Adds the calls that move this kernel's vdso from where a seed has it to `to`; returns where it is then.
///
/// The two halves are moved apart from each other, by way of `spare` (room for both), since the ranges may overlap.
pub fn relocate(program: &mut Program, maps: &[Mapping], to: Place, spare: u64) {
    let Some(from) = Place::of_maps(maps) else { return };
    if from == to {
        return;
    }
    let parts: Vec<&Mapping> = maps
        .iter()
        .filter(|m| m.start >= from.data && m.end <= from.end)
        .collect();
    for (source, target) in [(from.data, spare), (spare, to.data)] {
        for part in &parts {
            let length = part.end - part.start;
            let (old, new) = (part.start - from.data + source, part.start - from.data + target);
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            let args = [old.into(), length.into(), length.into(), flags.into(), new.into()];
            program.call_expecting("move the vdso", Expect::Exactly(new as i64), libc::SYS_mremap, &args);
        }
    }
}

/// Can this kernel's vdso simply take the place of the program's?
pub fn replaceable(ours: Place, our_code: &[u8], theirs: Place, their_code: &[u8]) -> bool {
    ours.same_shape(&theirs) && our_code == their_code
}

/// Patches for a program's old vdso at `theirs`: at each function a jump to the same function of ours.
///
/// # Errors
/// When either is no vdso, or ours lacks a function that theirs has.
pub fn redirections(their_code: &[u8], theirs: u64, our_code: &[u8], ours: u64) -> Result<Vec<(u64, Vec<u8>)>> {
    let bad = |whose: &str| Error::new("read the vdso").because(format!("the {whose} is no ELF file with symbols"));
    let their_functions = functions(their_code).ok_or_else(|| bad("program's vdso"))?;
    let our_functions = functions(our_code).ok_or_else(|| bad("kernel's vdso"))?;
    let mut patches = Vec::new();
    for (name, offset) in their_functions {
        let Some((_, target)) = our_functions.iter().find(|(other, _)| *other == name) else {
            return Err(Error::new("redirect the vdso")
                .object(name)
                .because("this kernel's vdso has no such function"));
        };
        // movabs $target,%rax; jmp *%rax: rax is free at the entry of a function.
        let mut code = vec![0x48, 0xb8];
        code.extend((ours + target).to_le_bytes());
        code.extend([0xff, 0xe0]);
        patches.push((theirs + offset, code));
    }
    // Symbols may name one place twice; different places too close to each other would overwrite each other.
    patches.sort();
    patches.dedup();
    Ok(patches)
}

/// Names and offsets of the functions in the dynamic symbol table (elf(5)); all offsets are checked.
fn functions(elf: &[u8]) -> Option<Vec<(String, u64)>> {
    const PT_LOAD: u32 = 1;
    const PT_DYNAMIC: u32 = 2;
    const STT_FUNC: u8 = 2;
    let word = |at: usize| Some(u64::from_le_bytes(elf.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let int = |at: usize| Some(u32::from_le_bytes(elf.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let half = |at: usize| Some(usize::from(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?)));
    if elf.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (table, size, count) = (word(32)? as usize, half(54)?, half(56)?);
    let (mut base, mut dynamic) = (None, None);
    for index in 0..count {
        let at = table.checked_add(index * size)?;
        match int(at)? {
            PT_LOAD if base.is_none() => base = Some(word(at + 16)?),
            PT_DYNAMIC => dynamic = Some((word(at + 8)? as usize, word(at + 32)? as usize)),
            _ => {}
        }
    }
    let (base, (dynamic, length)) = (base?, dynamic?);
    let (mut strings, mut symbols, mut hash) = (None, None, None);
    for at in (dynamic..dynamic.checked_add(length)?).step_by(16) {
        let value = word(at + 8)?.wrapping_sub(base) as usize;
        match word(at)? {
            0 => break,
            4 => hash = Some(value),
            5 => strings = Some(value),
            6 => symbols = Some(value),
            _ => {}
        }
    }
    let (strings, symbols) = (strings?, symbols?);
    // With a DT_HASH table the number of symbols is known; with DT_GNU_HASH alone, the strings follow the symbols.
    let total = match hash {
        Some(hash) => int(hash + 4)? as usize,
        None => strings.checked_sub(symbols)? / 24,
    };
    let mut found = Vec::new();
    for index in 0..total.min(256) {
        let at = symbols.checked_add(24 * index)?;
        let (name, info, section) = (int(at)? as usize, *elf.get(at + 4)?, half(at + 6)?);
        if info & 15 == STT_FUNC && section != 0 {
            let text = elf.get(strings.checked_add(name)?..)?;
            let end = text.iter().position(|&byte| byte == 0)?;
            found.push((
                String::from_utf8_lossy(&text[..end]).into_owned(),
                word(at + 8)?.wrapping_sub(base),
            ));
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::{RemoteAddr, RemoteMemory};

    fn own_vdso() -> (u64, Vec<u8>) {
        let maps = crate::procfs::maps::parse(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        let place = Place::of_maps(&maps).unwrap();
        let memory = RemoteMemory::new(std::process::id() as i32);
        (
            place.code,
            memory
                .read_vec(RemoteAddr(place.code), (place.end - place.code) as usize)
                .unwrap(),
        )
    }

    #[test]
    fn every_function_of_this_kernels_vdso_is_redirected() {
        let (address, code) = own_vdso();
        let names: Vec<String> = functions(&code).unwrap().into_iter().map(|(name, _)| name).collect();
        assert!(names.iter().any(|name| name == "__vdso_clock_gettime"), "{names:?}");
        let patches = redirections(&code, address, &code, 0x1234_0000).unwrap();
        assert!(patches.len() >= 4);
        assert!(patches.iter().all(|(at, bytes)| *at >= address && bytes.len() == 12));
    }

    #[test]
    fn damaged_elf_is_an_error_not_a_panic() {
        let (_, mut code) = own_vdso();
        for at in 0..2048.min(code.len()) {
            let kept = code[at];
            code[at] = 0xff;
            let _ = functions(&code);
            code[at] = kept;
        }
        for end in (0..code.len()).step_by(61) {
            let _ = functions(&code[..end]);
        }
    }
}
