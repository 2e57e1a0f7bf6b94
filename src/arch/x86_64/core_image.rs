//! A thread's registers in the image format: `thread_info_x86`.

use std::arch::x86_64::__cpuid_count;

use whimbrel_images::proto::{
    ThreadInfoX86, UserDescT, UserX86CetEntry, UserX86FpregsEntry, UserX86RegsEntry, UserX86XsaveEntry,
};

use super::{Registers, XState};
use crate::error::{Error, Result};

/// State components by their number in XCR0 (Intel SDM volume 1, 13.1).
const YMM: u32 = 2;
const BNDREGS: u32 = 3;
const BNDCSR: u32 = 4;
const OPMASK: u32 = 5;
const ZMM_UPPER: u32 = 6;
const HI16_ZMM: u32 = 7;
const PKRU: u32 = 9;
/// What the image format has fields for; x87 and SSE are the legacy area.
const KNOWN: u64 =
    0b11 | 1 << YMM | 1 << BNDREGS | 1 << BNDCSR | 1 << OPMASK | 1 << ZMM_UPPER | 1 << HI16_ZMM | 1 << PKRU;
/// Size of legacy area and header.
const XSAVE_HEADER_END: usize = 576;

/// Where a component lies in the uncompacted area of this processor: offset and size in bytes.
fn component(number: u32) -> (usize, usize) {
    let leaf = __cpuid_count(0xd, number);
    (leaf.ebx as usize, leaf.eax as usize)
}

/// The state components that this processor and kernel save (XCR0).
pub fn cpu_state_components() -> u64 {
    let leaf = __cpuid_count(0xd, 0);
    u64::from(leaf.eax) | u64::from(leaf.edx) << 32
}

/// Turns a thread's state into its image.
///
/// # Errors
/// When it uses a state component that the format has no place for (AMX tiles).
pub fn to_image(registers: &Registers, xstate: &XState, clear_tid_address: u64) -> Result<ThreadInfoX86> {
    let r = &registers.0;
    let gpregs = UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.rbp,
        bx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.rax,
        cx: r.rcx,
        dx: r.rdx,
        si: r.rsi,
        di: r.rdi,
        orig_ax: r.orig_rax,
        ip: r.rip,
        cs: r.cs,
        flags: r.eflags,
        sp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: None,
    };
    let no_segment = |entry_number| UserDescT {
        entry_number,
        read_exec_only: true,
        seg_not_present: true,
        ..UserDescT::default()
    };
    Ok(ThreadInfoX86 {
        clear_tid_addr: clear_tid_address,
        gpregs,
        fpregs: fpregs(xstate)?,
        tls: (12..15).map(no_segment).collect(),
    })
}

fn fpregs(xstate: &XState) -> Result<UserX86FpregsEntry> {
    let area = &xstate.0;
    if area.len() < XSAVE_HEADER_END {
        return Err(Error::new("read floating point state").because("the processor has no XSAVE"));
    }
    let u16_at = |at: usize| u32::from(u16::from_le_bytes([area[at], area[at + 1]]));
    let xstate_bv = u64::from_le_bytes(area[512..520].try_into().unwrap_or_default());
    if xstate_bv & !KNOWN != 0 {
        let what = format!(
            "state components {:#x} are in use, which images have no place for",
            xstate_bv & !KNOWN
        );
        return Err(Error::new("save vector state").because(what));
    }
    let used = |number: u32| {
        let (offset, size) = component(number);
        if xstate_bv & 1 << number != 0 {
            area.get(offset..offset + size).unwrap_or(&[])
        } else {
            &[]
        }
    };
    let padded = |number: u32, size: usize| {
        let mut bytes = used(number).to_vec();
        bytes.resize(size, 0);
        bytes
    };
    Ok(UserX86FpregsEntry {
        cwd: u16_at(0),
        swd: u16_at(2),
        twd: u16_at(4),
        fop: u16_at(6),
        rip: words64(&area[8..16])[0],
        rdp: words64(&area[16..24])[0],
        mxcsr: words32(&area[24..28])[0],
        mxcsr_mask: words32(&area[28..32])[0],
        st_space: words32(&area[32..160]),
        xmm_space: words32(&area[160..416]),
        padding: Vec::new(),
        xsave: Some(UserX86XsaveEntry {
            xstate_bv,
            ymmh_space: words32(&padded(YMM, 256)),
            bndreg_state: words64(used(BNDREGS)),
            bndcsr_state: words64(used(BNDCSR)),
            opmask_reg: words64(used(OPMASK)),
            zmm_upper: words64(used(ZMM_UPPER)),
            hi16_zmm: words64(used(HI16_ZMM)),
            pkru: words32(used(PKRU)),
            cet: Some(UserX86CetEntry { cet: 0, ssp: 0 }),
        }),
    })
}

/// Turns an image back into registers. `host` is a thread's state on this machine, whose size and layout it takes.
///
/// # Errors
/// When the image uses a component that this processor does not have, or is damaged.
pub fn from_image(image: &ThreadInfoX86, host: &XState) -> Result<(Registers, XState)> {
    let g = &image.gpregs;
    let registers = Registers(libc::user_regs_struct {
        r15: g.r15,
        r14: g.r14,
        r13: g.r13,
        r12: g.r12,
        rbp: g.bp,
        rbx: g.bx,
        r11: g.r11,
        r10: g.r10,
        r9: g.r9,
        r8: g.r8,
        rax: g.ax,
        rcx: g.cx,
        rdx: g.dx,
        rsi: g.si,
        rdi: g.di,
        orig_rax: g.orig_ax,
        rip: g.ip,
        cs: g.cs,
        eflags: g.flags,
        rsp: g.sp,
        ss: g.ss,
        fs_base: g.fs_base,
        gs_base: g.gs_base,
        ds: g.ds,
        es: g.es,
        fs: g.fs,
        gs: g.gs,
    });

    let f = &image.fpregs;
    let mut area = vec![0u8; host.0.len()];
    for (at, value) in [(0, f.cwd), (2, f.swd), (4, f.twd), (6, f.fop)] {
        area[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    put(&mut area, 8, &f.rip.to_le_bytes())?;
    put(&mut area, 16, &f.rdp.to_le_bytes())?;
    put(&mut area, 24, &f.mxcsr.to_le_bytes())?;
    area[28..32].copy_from_slice(&host.0[28..32]);
    put(&mut area, 32, &bytes32(&f.st_space, 32))?;
    put(&mut area, 160, &bytes32(&f.xmm_space, 64))?;
    // The software-reserved bytes are the host's.
    area[464..512].copy_from_slice(&host.0[464..512]);

    let xsave = f.xsave.clone().unwrap_or_default();
    let xstate_bv = if f.xsave.is_some() { xsave.xstate_bv } else { 3 };
    let missing = xstate_bv & !host.features();
    if missing != 0 {
        let cause = format!("this processor lacks the state components {missing:#x} that the program uses");
        return Err(Error::new("restore vector state")
            .because(cause)
            .hint("restore on a processor with AVX support like the source's"));
    }
    area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
    let parts: [(u32, Vec<u8>); 7] = [
        (YMM, bytes32(&xsave.ymmh_space, 64)),
        (BNDREGS, bytes64(&xsave.bndreg_state)),
        (BNDCSR, bytes64(&xsave.bndcsr_state)),
        (OPMASK, bytes64(&xsave.opmask_reg)),
        (ZMM_UPPER, bytes64(&xsave.zmm_upper)),
        (HI16_ZMM, bytes64(&xsave.hi16_zmm)),
        (PKRU, bytes32(&xsave.pkru, xsave.pkru.len())),
    ];
    for (number, bytes) in parts {
        if xstate_bv & 1 << number != 0 {
            let (offset, size) = component(number);
            put(&mut area, offset, &bytes[..bytes.len().min(size)])?;
        }
    }
    Ok((registers, XState(area)))
}

fn put(area: &mut [u8], at: usize, bytes: &[u8]) -> Result<()> {
    let room = area.get_mut(at..at + bytes.len());
    let room = room.ok_or_else(|| Error::new("restore vector state").because("the image's state does not fit"))?;
    room.copy_from_slice(bytes);
    Ok(())
}

fn words32(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap_or_default()))
        .collect()
}

fn words64(bytes: &[u8]) -> Vec<u64> {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
        .collect()
}

fn bytes32(words: &[u32], count: usize) -> Vec<u8> {
    words.iter().take(count).flat_map(|word| word.to_le_bytes()).collect()
}

fn bytes64(words: &[u64]) -> Vec<u8> {
    words.iter().take(512).flat_map(|word| word.to_le_bytes()).collect()
}
