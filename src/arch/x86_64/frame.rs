//! Signal frames by which a thread restores itself without a tracer.
//!
//! The layout is the kernel's `struct rt_sigframe` (arch/x86/include/asm/sigframe.h): return address, `ucontext`
//! (flags, link, alternate stack, `sigcontext`, signal mask). `rt_sigreturn(2)` reads it at the stack pointer minus 8.

use super::{Registers, XState};

const UCONTEXT: usize = 8;
const SIGCONTEXT: usize = UCONTEXT + 40;
const SIGMASK: usize = SIGCONTEXT + 256;
const FRAME: usize = 8 + 304;

const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// `restore_altstack` ignores a stack it finds invalid; these flags are, so the alternate stack stays as it is.
const SS_INVALID: u64 = 7;

const NR_MUNMAP: u64 = 11;
const RED_ZONE: u64 = 128;

/// A prepared way back, to be written below the red zone of a thread's stack.
///
/// Running `rt_sigreturn` on the first frame unmaps the arena through a borrowed `syscall; ret`; that `ret` leads to a
/// borrowed `rt_sigreturn` on the second frame, which is the thread as it was found. Nothing of it lies in the arena.
#[derive(Debug)]
pub struct HealChain {
    /// Where the bytes belong in the thread's memory.
    pub address: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Stack pointer with which a `syscall; pop…; ret` leads to the first frame (unmap, then restore).
    pub stack: u64,
    /// Stack pointer with which `rt_sigreturn` restores the thread without unmapping (another thread will).
    pub restore_only_stack: u64,
}

/// Builds the chain for a thread that was found with `registers`, `xstate` and `mask`.
///
/// `gadget` is a `syscall` followed by `pops` pops and `ret`, `restorer` is a `rt_sigreturn`; both lie in the thread's own text.
pub fn build_heal_chain(
    registers: Registers,
    xstate: &XState,
    mask: u64,
    gadget: (u64, usize),
    restorer: u64,
    arena: (u64, u64),
) -> HealChain {
    let pops = 8 * gadget.1;
    // From low to high: pops + frame 1, pops + frame 2, xstate (64-byte aligned) and its end mark.
    let first = pops;
    let second = first + FRAME + pops;
    let size = second + FRAME + 64 + xstate.0.len() + 4;
    let address = (registers.0.rsp - RED_ZONE - size as u64) & !63;
    let xstate_offset = (second + FRAME).next_multiple_of(64);

    let mut bytes = vec![0u8; size];
    let mut unmap = registers.at_syscall(
        gadget.0,
        address + (first + FRAME) as u64,
        NR_MUNMAP,
        [arena.0, arena.1, 0, 0, 0, 0],
    );
    // Signals stay blocked until the thread is itself again.
    unmap.0.fs_base = registers.0.fs_base;
    write_frame(&mut bytes[first..], restorer, unmap, u64::MAX, 0);
    write_frame(
        &mut bytes[second..],
        restorer,
        registers.restarted(),
        mask,
        address + xstate_offset as u64,
    );
    write_xstate(&mut bytes[xstate_offset..], xstate);

    HealChain {
        address,
        bytes,
        stack: address,
        restore_only_stack: address + second as u64 + 8,
    }
}

fn write_frame(frame: &mut [u8], restorer: u64, registers: Registers, mask: u64, fpstate: u64) {
    let mut put = |offset: usize, value: u64| frame[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    let r = &registers.0;
    put(0, restorer);
    put(
        UCONTEXT,
        UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS | if fpstate != 0 { UC_FP_XSTATE } else { 0 },
    );
    put(UCONTEXT + 24, SS_INVALID);
    let general = [
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx, r.rsp,
        r.rip, r.eflags,
    ];
    for (index, value) in general.into_iter().enumerate() {
        put(SIGCONTEXT + 8 * index, value);
    }
    // cs, gs, fs, ss as four 16-bit fields.
    put(SIGCONTEXT + 144, r.cs & 0xffff | (r.ss & 0xffff) << 48);
    put(SIGCONTEXT + 184, fpstate);
    put(SIGMASK, mask);
}

fn write_xstate(area: &mut [u8], xstate: &XState) {
    let size = xstate.0.len();
    area[..size].copy_from_slice(&xstate.0);
    // struct _fpx_sw_bytes at offset 464 of the legacy region.
    area[464..468].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    area[468..472].copy_from_slice(&(size as u32 + 4).to_le_bytes());
    area[472..480].copy_from_slice(&xstate.features().to_le_bytes());
    area[480..484].copy_from_slice(&(size as u32).to_le_bytes());
    area[size..size + 4].copy_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
}
