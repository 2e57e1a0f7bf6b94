//! Programs: lists of system calls that a task runs for the controller, without coming back in between.

use crate::stub::Call;

/// Where in a call its result is.
const RESULT: usize = std::mem::offset_of!(Call, result);

/// Handle of a call in its program: the place of its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(usize);

/// Handle of a piece of the program's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    offset: usize,
    length: usize,
}

/// One argument.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A plain value.
    Value(u64),
    /// The address of a buffer.
    Address(Buffer),
    /// An address inside a buffer.
    AddressAt(Buffer, usize),
    /// The i32 in a buffer at an offset, as it is when the call is made.
    Int(Buffer, usize),
    /// The i32 at an address of the task, as it is when the call is made.
    IntAt(u64),
    /// The u64 in a buffer at an offset, as it is when the call is made.
    Word(Buffer, usize),
    /// The result of an earlier call.
    Result(CallId),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Arg {
        Arg::Value(value)
    }
}

impl From<i64> for Arg {
    fn from(value: i64) -> Arg {
        Arg::Value(value as u64)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Arg {
        Arg::Value(value as i64 as u64)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Arg {
        Arg::Value(u64::from(value))
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Arg {
        Arg::Value(value as u64)
    }
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Arg {
        Arg::Address(buffer)
    }
}

impl From<CallId> for Arg {
    fn from(call: CallId) -> Arg {
        Arg::Result(call)
    }
}

/// When a program goes on after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Whatever the result.
    Anything,
    /// Unless the result is an error number.
    Success,
    /// If the result is exactly this.
    Exactly(i64),
}

struct Step {
    nr: i64,
    expect: Expect,
    args: [Arg; 6],
    what: String,
    /// Its failure does not stop the program, but is told.
    told: bool,
}

/// A list of system calls with their data.
#[derive(Default)]
pub struct Program {
    steps: Vec<Step>,
    data: Vec<u8>,
    /// Words of the data that hold the address of other data: where, and of what.
    pointers: Vec<(usize, usize)>,
}

impl Program {
    /// A program of no calls.
    pub fn new() -> Self {
        Program::default()
    }

    /// Is there nothing to do?
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Adds data; 16-byte aligned.
    pub fn data(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.reserve(bytes.len());
        self.data[buffer.offset..buffer.offset + bytes.len()].copy_from_slice(bytes);
        buffer
    }

    /// Adds a string with its terminating zero.
    pub fn string(&mut self, text: &[u8]) -> Buffer {
        let mut bytes = text.to_vec();
        bytes.push(0);
        self.data(&bytes)
    }

    /// Adds zeroed room for results; 16-byte aligned.
    pub fn reserve(&mut self, length: usize) -> Buffer {
        let offset = self.data.len().next_multiple_of(16);
        self.data.resize(offset + length, 0);
        Buffer { offset, length }
    }

    /// Makes the word at `at` in `buffer` the address of `target`.
    pub fn store_address(&mut self, buffer: Buffer, at: usize, target: Buffer) {
        self.pointers.push((buffer.offset + at, target.offset));
    }

    /// Adds a call that must not fail; `what` names it in errors ("set the alternate stack").
    pub fn call(&mut self, what: impl Into<String>, nr: i64, args: &[Arg]) -> CallId {
        self.call_expecting(what, Expect::Success, nr, args)
    }

    /// Adds a call whose failure does not stop the program.
    pub fn try_call(&mut self, nr: i64, args: &[Arg]) -> CallId {
        self.call_expecting("", Expect::Anything, nr, args)
    }

    /// As [`Program::try_call`]; a failure is told in the log, in the words of `what`: for state that is no promise, as a
    /// hint to the scheduler that this machine cannot follow.
    pub fn call_or_warn(&mut self, what: impl Into<String>, nr: i64, args: &[Arg]) -> CallId {
        let call = self.call_expecting(what, Expect::Anything, nr, args);
        self.steps[call.0].told = true;
        call
    }

    /// Adds a call that must return exactly `wanted`.
    pub fn call_expecting(&mut self, what: impl Into<String>, expect: Expect, nr: i64, args: &[Arg]) -> CallId {
        let mut all = [Arg::Value(0); 6];
        all[..args.len()].copy_from_slice(args);
        self.steps.push(Step {
            nr,
            expect,
            args: all,
            what: what.into(),
            told: false,
        });
        CallId(self.steps.len() - 1)
    }

    /// Names a call for an error message.
    pub fn describe(&self, index: usize) -> &str {
        self.steps.get(index).map_or("", |step| &step.what)
    }

    /// Failures that did not stop the program, but are to be told: what failed, and why.
    pub(super) fn told<'a>(&'a self, outcome: &'a Outcome) -> impl Iterator<Item = (&'a str, std::io::Error)> {
        let told = self.steps.iter().enumerate().filter(|(_, step)| step.told);
        told.take_while(|(index, _)| *index < outcome.stopped_at)
            .filter_map(|(index, step)| Some((step.what.as_str(), outcome.checked(CallId(index)).err()?)))
    }

    /// Size in the task's memory, in bytes.
    pub fn size(&self) -> usize {
        self.data_offset() + self.data.len()
    }

    /// Offset of the end of the calls.
    pub(super) fn end_offset(&self) -> u64 {
        (self.steps.len() * size_of::<Call>()) as u64
    }

    /// Offset of a call's result, a word.
    pub(super) fn result_offset(&self, CallId(call): CallId) -> u64 {
        (call * size_of::<Call>() + RESULT) as u64
    }

    fn data_offset(&self) -> usize {
        (self.steps.len() * size_of::<Call>()).next_multiple_of(64)
    }

    /// The bytes of the program when it lies at `base` in the task.
    pub(super) fn encode(&self, base: u64) -> Vec<u8> {
        let data = base + self.data_offset() as u64;
        let mut bytes = Vec::with_capacity(self.size());
        for step in &self.steps {
            let mut call = Call {
                nr: step.nr as u32,
                ..Call::default()
            };
            (call.expect, call.wanted) = match step.expect {
                Expect::Anything => (0, 0),
                Expect::Success => (1, 0),
                Expect::Exactly(wanted) => (2, wanted),
            };
            for (index, argument) in step.args.iter().enumerate() {
                let (kind, value) = match *argument {
                    Arg::Value(value) => (0, value),
                    Arg::Address(buffer) => (0, data + buffer.offset as u64),
                    Arg::AddressAt(buffer, at) => (0, data + (buffer.offset + at) as u64),
                    Arg::Word(buffer, at) => (1, data + (buffer.offset + at) as u64),
                    Arg::Int(buffer, at) => (2, data + (buffer.offset + at) as u64),
                    Arg::IntAt(address) => (2, address),
                    Arg::Result(call) => (1, base + self.result_offset(call)),
                };
                (call.kinds[index], call.args[index]) = (kind, value);
            }
            bytes.extend(call.to_bytes());
        }
        bytes.resize(self.data_offset(), 0);
        bytes.extend(&self.data);
        for &(at, target) in &self.pointers {
            let at = self.data_offset() + at;
            bytes[at..at + 8].copy_from_slice(&(data + target as u64).to_le_bytes());
        }
        bytes
    }

    /// What is to be read back after a run: everything.
    pub(super) fn decode(&self, bytes: &[u8], stopped_at: usize) -> Outcome {
        let results = (0..self.steps.len())
            .map(|index| {
                let at = index * size_of::<Call>() + RESULT;
                i64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
            })
            .collect();
        Outcome {
            results,
            data: bytes[self.data_offset()..].to_vec(),
            stopped_at,
        }
    }
}

/// What a program did.
#[derive(Debug)]
pub struct Outcome {
    results: Vec<i64>,
    data: Vec<u8>,
    stopped_at: usize,
}

impl Outcome {
    /// Index of the call that had an unexpected result, or the number of calls.
    pub fn stopped_at(&self) -> usize {
        self.stopped_at
    }

    /// Result of a call: what the kernel returned, a negative error number on failure.
    pub fn result(&self, call: CallId) -> i64 {
        self.results[call.0]
    }

    /// Result of a call, the error number as an error.
    ///
    /// # Errors
    /// When the kernel returned an error number.
    pub fn checked(&self, call: CallId) -> std::io::Result<i64> {
        match self.result(call) {
            error @ -4095..0 => Err(std::io::Error::from_raw_os_error(-error as i32)),
            value => Ok(value),
        }
    }

    /// Contents of a buffer after the run.
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        &self.data[buffer.offset..buffer.offset + buffer.length]
    }

    /// The u64 in a buffer.
    pub fn word(&self, buffer: Buffer, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(buffer)[at..at + 8].try_into().unwrap_or_default())
    }

    /// The i32 in a buffer.
    pub fn int(&self, buffer: Buffer, at: usize) -> i32 {
        i32::from_le_bytes(self.bytes(buffer)[at..at + 4].try_into().unwrap_or_default())
    }

    /// Result of the call at `index`.
    pub(super) fn result_at(&self, index: usize) -> i64 {
        self.results.get(index).copied().unwrap_or_default()
    }
}
