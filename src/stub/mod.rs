//! The memory layout that the code inside a task works on: calls and context. The text itself is the architecture's.
//!
//! The stub knows system calls and nothing else: no resource is named on its side of the fence.

/// One system call of a program, as the stub reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Call {
    /// System call number.
    pub nr: u32,
    /// When the program goes on: see [`Expect`](crate::remote::Expect).
    pub expect: u32,
    /// Per argument: 0 the value itself, 1 the u64 at that address, 2 the i32 at that address, sign extended.
    pub kinds: [u8; 8],
    /// The arguments.
    pub args: [u64; 6],
    /// The result that `expect == 2` asks for.
    pub wanted: i64,
    /// Written by the stub: what the kernel returned.
    pub result: i64,
}

const _: () = assert!(size_of::<Call>() == 80);

impl Call {
    /// The bytes that the stub reads.
    pub fn to_bytes(self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&self.nr.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.expect.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.kinds);
        for (index, argument) in self.args.iter().enumerate() {
            bytes[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_le_bytes());
        }
        bytes[64..72].copy_from_slice(&self.wanted.to_le_bytes());
        bytes
    }
}

/// Where in the arena things lie, in bytes from its start.
pub mod layout {
    /// The stub's text.
    pub const TEXT: u64 = 0;
    /// Contexts, one for the thread that the arena was made with and one for the thread that is visited.
    pub const CONTEXT: [u64; 2] = [1024, 1280];
    /// Number of threads that are in the stub.
    pub const ACTIVE: u64 = 1536;
    /// Programs.
    pub const PROGRAM: u64 = 4096;
}

/// What a waiting thread needs to go home by itself. Offsets are known to the stub's text.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct StubContext {
    /// The descriptor it reports on and waits on (-1 until there is one), and one that the controller is about to take
    /// (-1 for none): its own end at first.
    pub descriptors: [i32; 2],
    /// Written by the controller through the descriptor: first call and end of the next program.
    pub command: [u64; 2],
    /// The report: the address where the program stopped.
    pub report: u64,
    /// Stack for the whole way back (unmap, then restore).
    pub heal_stack: u64,
    /// Stack for `rt_sigreturn` without unmapping.
    pub restore_only_stack: u64,
    /// Bytes that the borrowed `syscall; pop…; ret` pops before it returns.
    pub popped: u64,
    /// 1 for a thread that only visits: it goes home alone, and the first one takes the arena and the descriptors away.
    pub guest: u64,
    /// Address of the number of active threads.
    pub active: u64,
    /// How long the first thread waits before it looks whether the guest has left the arena; it looks
    /// [`GUEST_LOOKS`] times at most.
    pub patience: [u64; 2],
}

/// How often the first thread looks for the guest. A guest that was announced may never have come, and one that went may
/// not have been struck off: the controller can die in between.
pub const GUEST_LOOKS: u32 = 50;

const _: () = assert!(size_of::<StubContext>() == 88 && std::mem::offset_of!(StubContext, active) == 64);
const _: () = assert!(std::mem::offset_of!(StubContext, heal_stack) == 32);
const _: () = assert!(std::mem::offset_of!(StubContext, popped) == 48);
const _: () = assert!(std::mem::offset_of!(StubContext, guest) == 56);
const _: () = assert!(std::mem::offset_of!(StubContext, patience) == 72);

impl StubContext {
    /// The bytes that the stub reads.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(size_of::<StubContext>());
        for descriptor in self.descriptors {
            bytes.extend(descriptor.to_le_bytes());
        }
        let words = [
            self.command[0],
            self.command[1],
            self.report,
            self.heal_stack,
            self.restore_only_stack,
            self.popped,
            self.guest,
            self.active,
            self.patience[0],
            self.patience[1],
        ];
        words.into_iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes
    }
}
