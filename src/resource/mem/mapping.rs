//! Mappings (VMAs): what they are, and how they are made again.

use std::os::fd::AsFd;

use whimbrel_images::proto::VmaEntry;
use whimbrel_lazy::ioctl::{self, Categories, ScanRequest};

use crate::error::{Context, Error, Result};
use crate::procfs::maps::Mapping;
use crate::remote::{Arg, Program};
use crate::resource::mem::pages::Pages;
use crate::resource::mem::sysv;

/// `vma_entry.status` bits of the image format.
#[allow(missing_docs)]
pub mod status {
    pub const REGULAR: u32 = 1 << 0;
    pub const VSYSCALL: u32 = 1 << 2;
    pub const VDSO: u32 = 1 << 3;
    pub const HEAP: u32 = 1 << 5;
    pub const FILE_PRIVATE: u32 = 1 << 6;
    pub const FILE_SHARED: u32 = 1 << 7;
    pub const ANON_SHARED: u32 = 1 << 8;
    pub const ANON_PRIVATE: u32 = 1 << 9;
    pub const SYSVIPC: u32 = 1 << 10;
    pub const VVAR: u32 = 1 << 12;
    pub const MEMFD: u32 = 1 << 14;
}

/// What a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private memory without a file.
    Anonymous,
    /// A file; private or shared.
    File,
    /// Shared memory without a name, between relatives.
    SharedAnonymous,
    /// A memfd; private or shared.
    Memfd,
    /// A System V segment; its id is the inode.
    SystemV,
    /// Made by the kernel: vdso, vvar, vsyscall.
    Kernel,
}

/// VmFlags letters and the `madvise(2)` advice that sets each. WIPEONFORK and DONTFORK included.
const ADVICE: &[(&[u8; 2], u32)] = &[
    (b"rr", libc::MADV_RANDOM as u32),
    (b"sr", libc::MADV_SEQUENTIAL as u32),
    (b"dc", libc::MADV_DONTFORK as u32),
    (b"mg", libc::MADV_MERGEABLE as u32),
    (b"hg", libc::MADV_HUGEPAGE as u32),
    (b"nh", libc::MADV_NOHUGEPAGE as u32),
    (b"dd", libc::MADV_DONTDUMP as u32),
    (b"wf", libc::MADV_WIPEONFORK as u32),
];

/// Describes a mapping; its file, if it has one, is still to be named (`shmid`).
///
/// # Errors
/// When it is of a kind that cannot be carried.
pub fn describe(mapping: &Mapping, brk: (u64, u64)) -> Result<(VmaEntry, Backing)> {
    let mut entry = VmaEntry {
        start: mapping.start,
        end: mapping.end,
        pgoff: mapping.offset,
        shmid: 0,
        prot: mapping.prot as u32,
        flags: if mapping.shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        } as u32,
        status: status::REGULAR,
        fd: -1,
        accounted: Some(mapping.has(b"ac")),
        ..VmaEntry::default()
    };
    let anonymous = libc::MAP_ANONYMOUS as u32;
    let name = &mapping.name[..];
    let deleted_shared = |prefix: &[u8]| name.starts_with(prefix) && name.ends_with(b" (deleted)");
    let backing = match name {
        b"[vsyscall]" => {
            (entry.status, entry.flags) = (status::VSYSCALL | status::ANON_PRIVATE, entry.flags | anonymous);
            return Ok((entry, Backing::Kernel));
        }
        b"[vdso]" => {
            (entry.status, entry.flags) = (
                entry.status | status::VDSO | status::ANON_PRIVATE,
                entry.flags | anonymous,
            );
            return Ok((entry, Backing::Kernel));
        }
        b"[vvar]" | b"[vvar_vclock]" => {
            (entry.status, entry.flags) = (
                entry.status | status::VVAR | status::ANON_PRIVATE,
                entry.flags | anonymous,
            );
            return Ok((entry, Backing::Kernel));
        }
        _ if mapping.shared && deleted_shared(b"/dev/zero") => Backing::SharedAnonymous,
        _ if mapping.shared && name.starts_with(b"[anon_shmem:") => Backing::SharedAnonymous,
        _ if sysv::is_segment(mapping) => Backing::SystemV,
        _ if deleted_shared(b"/memfd:") => Backing::Memfd,
        _ if mapping.inode != 0 && name.starts_with(b"/") && !name.starts_with(b"/[") => Backing::File,
        _ if mapping.inode != 0 => return Err(refuse(mapping, "this kind of kernel object cannot be mapped again")),
        _ => Backing::Anonymous,
    };
    if mapping.has(b"ht") {
        return Err(refuse(mapping, "explicit huge pages are not supported yet"));
    }
    if mapping.has(b"io") || mapping.has(b"pf") {
        return Err(refuse(mapping, "device memory cannot be carried"));
    }
    if mapping.has(b"um") || mapping.has(b"uw") || mapping.has(b"ui") {
        return Err(refuse(mapping, "the program uses userfaultfd itself"));
    }
    if mapping.key != 0 {
        let why = format!(
            "protection keys (pkey_alloc(2)) are not supported yet; it has key {}",
            mapping.key
        );
        return Err(refuse(mapping, &why));
    }
    if mapping.has(b"ss") {
        return Err(refuse(mapping, "shadow stacks are not supported yet"));
    }
    entry.status |= match backing {
        Backing::Anonymous => status::ANON_PRIVATE,
        Backing::SharedAnonymous => status::ANON_SHARED,
        Backing::SystemV => status::ANON_SHARED | status::SYSVIPC,
        _ if mapping.shared => status::FILE_SHARED,
        _ => status::FILE_PRIVATE,
    };
    match backing {
        Backing::Anonymous => {
            let given = mapping
                .name
                .strip_prefix(b"[anon:")
                .and_then(|name| name.strip_suffix(b"]"));
            entry.anon_name = given.map(<[u8]>::to_vec);
            (entry.flags, entry.pgoff) = (entry.flags | anonymous, 0);
            if mapping.start < brk.1 && mapping.end > brk.0 && brk.0 < brk.1 {
                entry.status |= status::HEAP;
            }
        }
        Backing::SharedAnonymous => entry.flags |= anonymous,
        Backing::Memfd => entry.status |= status::MEMFD,
        _ => {}
    }
    if backing != Backing::Anonymous && backing != Backing::SharedAnonymous {
        let writable = mapping.shared && (mapping.has(b"mw") || mapping.prot & libc::PROT_WRITE != 0);
        entry.fdflags = Some(if writable { libc::O_RDWR } else { libc::O_RDONLY } as u32);
    }
    for (letters, flag) in [
        (b"gd", libc::MAP_GROWSDOWN),
        (b"lo", libc::MAP_LOCKED),
        (b"nr", libc::MAP_NORESERVE),
    ] {
        if mapping.has(letters) {
            entry.flags |= flag as u32;
        }
    }
    entry.sealed = mapping.has(b"sl").then_some(true);
    entry.lock_on_fault = mapping.has(b"lf").then_some(true);
    let advice = ADVICE
        .iter()
        .filter(|(letters, _)| mapping.has(letters))
        .fold(0u64, |all, (_, bit)| all | 1 << bit);
    entry.madv = (advice != 0).then_some(advice);
    Ok((entry, backing))
}

fn refuse(mapping: &Mapping, why: &str) -> Error {
    let name = String::from_utf8_lossy(&mapping.name).into_owned();
    Error::new("carry a mapping")
        .object(format!("{:#x}-{:#x} {name}", mapping.start, mapping.end))
        .because(why)
}

/// Is this a mapping that the kernel makes by itself?
pub fn is_kernel_made(vma: &VmaEntry) -> bool {
    vma.status & (status::VSYSCALL | status::VDSO | status::VVAR) != 0
}

/// Checks the mappings of an image: sorted, page aligned, disjoint, in user space.
///
/// # Errors
/// When they are not.
pub fn validate(vmas: &[VmaEntry]) -> Result<()> {
    let mut previous = 0;
    for vma in vmas.iter().filter(|vma| vma.status & status::VSYSCALL == 0) {
        let aligned = vma.start % crate::arch::PAGE_SIZE == 0 && vma.end % crate::arch::PAGE_SIZE == 0;
        if !aligned || vma.start < previous || vma.start >= vma.end || vma.end > crate::arch::TASK_SIZE {
            return Err(Error::new("validate mappings")
                .object(format!("{:#x}-{:#x}", vma.start, vma.end))
                .because("it is not page aligned, not in user space, or overlaps its neighbour"));
        }
        previous = vma.end;
    }
    Ok(())
}

/// Must a mapping be writable while it gets its contents? It was so at the source, which its accounting shows; images of
/// others do not say it, there the presence of pages does.
pub fn needs_write(vma: &VmaEntry, has_pages: bool) -> bool {
    let private = vma.flags & libc::MAP_PRIVATE as u32 != 0;
    private && vma.prot & libc::PROT_WRITE as u32 == 0 && !is_kernel_made(vma) && vma.accounted.unwrap_or(has_pages)
}

/// Adds the call that maps a VMA. `writable` maps it writable whatever its protection, for its contents; `file` is the
/// descriptor of its file in the task.
pub fn map(program: &mut Program, vma: &VmaEntry, writable: bool, file: Option<Arg>) {
    let extra = if writable {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        0
    };
    let keep = libc::MAP_SHARED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_NORESERVE;
    let mut flags = vma.flags & keep as u32 | libc::MAP_FIXED as u32;
    if file.is_some() {
        flags &= !(libc::MAP_ANONYMOUS as u32);
    }
    let args = [
        vma.start.into(),
        (vma.end - vma.start).into(),
        (vma.prot | extra as u32).into(),
        flags.into(),
        file.unwrap_or(Arg::from(-1)),
        vma.pgoff.into(),
    ];
    let what = format!("map {:#x}-{:#x}", vma.start, vma.end);
    program.call_expecting(
        what,
        crate::remote::Expect::Exactly(vma.start as i64),
        libc::SYS_mmap,
        &args,
    );
}

/// Adds the guard pages of a mapping of process `pid` to its entry.
///
/// # Errors
/// When its page table cannot be scanned.
pub fn find_guards(pid: i32, mapping: &Mapping, vma: &mut VmaEntry) -> Result<()> {
    // The kernels that show this flag can be asked where they are, too.
    if !mapping.has(b"gu") {
        return Ok(());
    }
    let request = ScanRequest {
        mask: Categories::GUARD,
        any_of: Categories::NONE,
        returned: Categories::GUARD,
        ..ScanRequest::default()
    };
    let (mut found, pages) = (Vec::new(), Pages::open(pid)?);
    ioctl::pagemap_scan_all(pages.pagemap().as_fd(), vma.start, vma.end, &request, &mut found)
        .with(|| Error::new("look for guard pages").task(pid))?;
    vma.guards = found.iter().flat_map(|region| [region.start, region.end]).collect();
    Ok(())
}

/// Adds the calls that follow when the contents are there: protection, advice, locks.
pub fn settle(program: &mut Program, vma: &VmaEntry, writable: bool) {
    let (start, length) = (Arg::from(vma.start), Arg::from(vma.end - vma.start));
    let extra = if writable {
        (libc::PROT_READ | libc::PROT_WRITE) as u32
    } else {
        0
    };
    if vma.prot | extra != vma.prot {
        let what = format!("protect {:#x}-{:#x}", vma.start, vma.end);
        program.call(what, libc::SYS_mprotect, &[start, length, vma.prot.into()]);
    }
    for bit in 0..64u32 {
        if vma.madv.unwrap_or(0) & 1 << bit != 0 {
            // Advice that this kernel does not know (KSM, huge pages) is advice.
            program.try_call(libc::SYS_madvise, &[start, length, bit.into()]);
        }
    }
    if let Some(name) = &vma.anon_name {
        const PR_SET_VMA: i32 = 0x5356_4d41;
        let name = program.string(name);
        // Kernels without CONFIG_ANON_VMA_NAME do not show names either.
        program.try_call(
            libc::SYS_prctl,
            &[PR_SET_VMA.into(), 0.into(), start, length, name.into()],
        );
    }
    for guard in vma.guards.chunks_exact(2) {
        const MADV_GUARD_INSTALL: i32 = 102;
        let what = format!("guard {:#x}-{:#x}", guard[0], guard[1]);
        let args = [
            guard[0].into(),
            guard[1].saturating_sub(guard[0]).into(),
            MADV_GUARD_INSTALL.into(),
        ];
        program.call(what, libc::SYS_madvise, &args);
    }
    if vma.flags & libc::MAP_LOCKED as u32 != 0 {
        const MLOCK_ONFAULT: i32 = 1;
        let flags = if vma.lock_on_fault == Some(true) {
            MLOCK_ONFAULT
        } else {
            0
        };
        program.call(
            format!("lock {:#x}-{:#x}", vma.start, vma.end),
            libc::SYS_mlock2,
            &[start, length, flags.into()],
        );
    }
    // Nothing can be changed behind it.
    if vma.sealed == Some(true) {
        let what = format!("seal {:#x}-{:#x}", vma.start, vma.end);
        program.call(what, libc::SYS_mseal, &[start, length, 0.into()]);
    }
}
