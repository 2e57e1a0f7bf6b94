//! The code that runs inside a task, and nothing else of ours does: it executes a program and reports.
//!
//! It has no stack and touches no memory but the program and its context. Registers on entry:
//!
//! | register | meaning |
//! |---|---|
//! | rbx | the next call (see `stub::Call` for the layout) |
//! | rbp | the end of the calls |
//! | r14 | 0: report with a trap (tracees that die with the tracer); 1: report on the descriptor and wait for more |
//! | r15 | the context (`stub::StubContext`), used when r14 is 1 |
//!
//! Where it waits, it waits in `read(2)` on a socket whose other end is the controller's. End of file means that the
//! controller is gone: the thread then goes back to what it was, and the first one, last, closes what is ours and unmaps the
//! arena.

use std::arch::global_asm;

global_asm!(
    ".pushsection .rodata",
    ".macro whimbrel_argument register, index",
    "mov \\register, [rbx + 16 + 8 * \\index]",
    "movzx eax, byte ptr [rbx + 8 + \\index]",
    "test eax, eax",
    "jz 3f",
    "cmp eax, 2",
    "je 2f",
    "mov \\register, [\\register]",
    "jmp 3f",
    "2: movsxd \\register, dword ptr [\\register]",
    "3:",
    ".endm",
    ".global whimbrel_stub_start",
    ".hidden whimbrel_stub_start",
    "whimbrel_stub_start:",
    "20:", // next
    "cmp rbx, rbp",
    "jae 30f",
    "whimbrel_argument rdi, 0",
    "whimbrel_argument rsi, 1",
    "whimbrel_argument rdx, 2",
    "whimbrel_argument r10, 3",
    "whimbrel_argument r8, 4",
    "whimbrel_argument r9, 5",
    "mov eax, [rbx]",
    "syscall",
    "mov [rbx + 72], rax",
    "mov ecx, [rbx + 4]",
    "test ecx, ecx",
    "jz 22f",
    "cmp ecx, 1",
    "jne 21f",
    "cmp rax, -4095",
    "jae 30f",
    "jmp 22f",
    "21: cmp rax, [rbx + 64]",
    "jne 30f",
    "22: add rbx, 80",
    "jmp 20b",
    "30:", // report
    "test r14, r14",
    "jnz 31f",
    "int3",
    "31: mov [r15 + 24], rbx",
    "mov edi, [r15]",
    "lea rsi, [r15 + 24]",
    "mov edx, 8",
    "mov eax, 1",
    "syscall",
    "32: mov edi, [r15]",
    "lea rsi, [r15 + 8]",
    "mov edx, 16",
    "xor eax, eax",
    "syscall",
    "cmp rax, 16",
    "jne 33f",
    "mov rbx, [r15 + 8]",
    "mov rbp, [r15 + 16]",
    "jmp 20b",
    "33: cmp rax, -4", // EINTR: nothing of ours; wait again
    "je 32b",
    // The controller is gone.
    "mov rcx, [r15 + 64]",
    "cmp qword ptr [r15 + 56], 0",
    "je 34f",
    "lock dec qword ptr [rcx]", // a guest goes home alone
    "jmp 40f",
    "34: mov r12d, {looks}",
    "35: lea rdi, [r15 + 72]", // let a guest leave the arena first
    "xor esi, esi",
    "mov eax, 35",
    "syscall",
    "mov rcx, [r15 + 64]",
    "cmp qword ptr [rcx], 1",
    "jbe 36f",
    "dec r12d",
    "jnz 35b",
    "36: mov edi, [r15]",
    "mov eax, 3",
    "syscall",
    "mov edi, [r15 + 4]", // close(-1) is harmless
    "mov eax, 3",
    "syscall",
    "mov rsp, [r15 + 32]",
    "mov rax, [r15 + 48]", // number of popped words, in bytes
    "lea rsp, [rsp + rax + 8]",
    "mov eax, 15",
    "syscall", // never returns
    "40: mov rsp, [r15 + 40]",
    "mov eax, 15",
    "syscall",
    ".global whimbrel_stub_end",
    ".hidden whimbrel_stub_end",
    "whimbrel_stub_end:",
    ".popsection",
    looks = const crate::stub::GUEST_LOOKS,
);

unsafe extern "C" {
    static whimbrel_stub_start: u8;
    static whimbrel_stub_end: u8;
}

/// The stub's machine code; position independent, entered at [`entry_offset`].
pub fn stub_text() -> &'static [u8] {
    let (start, end) = (&raw const whimbrel_stub_start, &raw const whimbrel_stub_end);
    // SAFETY: both symbols are defined by the assembly above, in this order and in one section of constants.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// Where in [`stub_text`] a thread enters.
pub const fn entry_offset() -> u64 {
    0
}
