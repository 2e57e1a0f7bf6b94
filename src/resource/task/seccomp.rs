//! Seccomp modes and filters, seccomp(2).
//!
//! While we trace a thread its filters do not apply to it (PTRACE_O_SUSPEND_SECCOMP), so that our calls in it are not its
//! own, and filters can be restored before the calls that they would refuse. Should we be killed in such a moment, they
//! apply again to the few calls with which the stub takes itself out (see [`crate::remote::inject`]).
//!
//! A filter that several threads have is stored once. Of the threads of a process, those filters that all of them have are
//! installed in all at once, so that SECCOMP_FILTER_FLAG_TSYNC works afterwards as it did before: it asks that "the filters
//! of the calling thread" descend from the same ones.

use std::collections::HashMap;

use whimbrel_images::proto::{CoreEntry, SeccompEntry, SeccompFilter, SeccompMode};

use crate::error::{Error, Result};
use crate::remote::{Program, Stopped};
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Seccomp mode and filters of a thread.
pub struct Seccomp;

const SET_MODE_FILTER: u32 = 1;
const FLAG_TSYNC: u32 = 1;
const MODE_STRICT: u32 = 1;
const MODE_FILTER: u32 = 2;
/// Bytes of an instruction, struct sock_filter: code (u16), jt, jf (u8), k (u32).
const INSTRUCTION: usize = 8;
/// BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;
const BPF_RET_K: u16 = 0x06;
const RET_ACTION_FULL: u32 = 0xffff_0000;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;

impl TaskKind for Seccomp {
    fn name(&self) -> &'static str {
        "seccomp"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, _program: &mut Program) -> Result<Reader<'a>> {
        let mode = thread.status.seccomp;
        let last = match mode {
            MODE_FILTER => thread.found.filters.borrow_mut().add(thread.stopped)?,
            0 | MODE_STRICT => None,
            _ => return Err(Error::new("carry seccomp").because(format!("its mode {mode} is not known"))),
        };
        Ok(Box::new(move |_, core| {
            let core = core.thread_core.get_or_insert_default();
            core.seccomp_mode = (mode != 0).then_some(mode as i32);
            core.seccomp_filter = last;
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        if stage != Stage::Final {
            return Ok(());
        }
        if mode(thread.core) == MODE_STRICT {
            let args = [libc::PR_SET_SECCOMP.into(), libc::SECCOMP_MODE_STRICT.into()];
            program.call("enter seccomp's strict mode", libc::SYS_prctl, &args);
            return Ok(());
        }
        let chains = thread.process.iter().map(|core| chain(core, thread.filters));
        let chains = chains.collect::<Result<Vec<_>>>()?;
        let first = chains.first().cloned().unwrap_or_default();
        let alike = |chain: &Vec<u32>| chain.iter().zip(&first).take_while(|(one, other)| one == other).count();
        // Of one thread alone, all filters are its own.
        let common = match chains.len() {
            0 | 1 => 0,
            _ => chains.iter().map(alike).min().unwrap_or(0),
        };
        for (at, index) in chain(thread.core, thread.filters)?.into_iter().enumerate() {
            let flags = match at < common {
                true if !thread.leader => continue,
                true => FLAG_TSYNC,
                false => 0,
            };
            install(&thread.filters.seccomp_filters[index as usize], flags, program);
        }
        Ok(())
    }
}

/// Is a thread under seccomp, so that its calls must be suspended from that while it is put together?
pub fn is_under(core: &CoreEntry) -> bool {
    mode(core) != 0
}

fn mode(core: &CoreEntry) -> u32 {
    let mode = core.thread_core.as_ref().and_then(|thread| thread.seccomp_mode);
    // Where CRIU had it before 3.11.
    let old = || core.tc.as_ref().and_then(|task| task.old_seccomp_mode);
    mode.or_else(old).unwrap_or(SeccompMode::Disabled as i32) as u32
}

/// Indices of a thread's filters, the oldest first.
fn chain(core: &CoreEntry, all: &SeccompEntry) -> Result<Vec<u32>> {
    let damaged = |why: &str| Error::new("read seccomp filters").because(why.to_owned());
    if mode(core) != MODE_FILTER {
        return Ok(Vec::new());
    }
    let last = core.thread_core.as_ref().and_then(|thread| thread.seccomp_filter);
    let old = || core.tc.as_ref().and_then(|task| task.old_seccomp_filter);
    let mut next = last.or_else(old);
    if next.is_none() {
        return Err(damaged("a thread is in filter mode and has no filter"));
    }
    let mut chain = Vec::new();
    while let Some(index) = next {
        let filter = all.seccomp_filters.get(index as usize);
        let filter = filter.ok_or_else(|| damaged("a thread has a filter that is not there"))?;
        let length = filter.filter.len();
        if length == 0 || length % INSTRUCTION != 0 || length > MAX_INSTRUCTIONS * INSTRUCTION {
            return Err(damaged("a filter has an impossible length"));
        }
        if filter.prev.is_some_and(|previous| previous >= index) {
            return Err(damaged("a filter follows a later one"));
        }
        chain.push(index);
        next = filter.prev;
    }
    chain.reverse();
    Ok(chain)
}

fn install(filter: &SeccompFilter, flags: u32, program: &mut Program) {
    let instructions = program.data(&filter.filter);
    // struct sock_fprog: number of instructions (u16), their address.
    let count = (filter.filter.len() / INSTRUCTION) as u64;
    let described = program.data(&[count.to_le_bytes(), [0; 8]].concat());
    program.store_address(described, 8, instructions);
    let flags = flags | filter.flags.unwrap_or(0);
    let args = [SET_MODE_FILTER.into(), flags.into(), described.into()];
    // With TSYNC the id of a thread that cannot follow is a result, too.
    let all_follow = crate::remote::Expect::Exactly(0);
    program.call_expecting("install a seccomp filter", all_follow, libc::SYS_seccomp, &args);
}

/// The filters of a tree, each once.
#[derive(Debug, Default)]
pub struct Filters {
    entry: SeccompEntry,
    known: HashMap<(Option<u32>, Vec<u8>, u32), u32>,
}

impl Filters {
    /// Adds those of a thread; returns the index of its newest.
    fn add(&mut self, thread: &Stopped) -> Result<Option<u32>> {
        let mut filters = Vec::new();
        while let Some(filter) = thread.seccomp_filter(filters.len() as u64)? {
            let flags = thread.seccomp_filter_flags(filters.len() as u64)?;
            filters.push((filter, flags));
        }
        let mut last = None;
        for (filter, flags) in filters {
            check(&filter)?;
            last = Some(self.index_of(last, filter, flags));
        }
        Ok(last)
    }

    fn index_of(&mut self, prev: Option<u32>, filter: Vec<u8>, flags: u32) -> u32 {
        let next = self.entry.seccomp_filters.len() as u32;
        let index = *self.known.entry((prev, filter.clone(), flags)).or_insert(next);
        if index == next {
            let flags = Some(flags).filter(|&flags| flags != 0);
            self.entry.seccomp_filters.push(SeccompFilter { filter, prev, flags });
        }
        index
    }

    /// All of them, as images have them.
    pub fn into_entry(self) -> SeccompEntry {
        self.entry
    }
}

/// A filter whose supervisor answers from outside (seccomp_unotify(2)) is of no use without it.
fn check(filter: &[u8]) -> Result<()> {
    let asks = |instruction: &[u8]| {
        let code = u16::from_le_bytes([instruction[0], instruction[1]]);
        let value = u32::from_le_bytes(instruction[4..8].try_into().unwrap_or_default());
        code == BPF_RET_K && value & RET_ACTION_FULL == RET_USER_NOTIF
    };
    if filter.chunks_exact(INSTRUCTION).any(asks) {
        return Err(Error::new("carry a seccomp filter")
            .because("it asks a supervisor (SECCOMP_RET_USER_NOTIF), whose descriptor cannot be made again")
            .hint("start the program without that supervisor"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    /// Refuses one system call with an error number.
    fn refusing(nr: i64, error: u32) -> Vec<u8> {
        let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
            let mut bytes = code.to_le_bytes().to_vec();
            bytes.extend([jt, jf]);
            bytes.extend(k.to_le_bytes());
            bytes
        };
        [
            // Load the number; if it is that one, refuse; else allow.
            instruction(0x20, 0, 0, 0),
            instruction(0x15, 0, 1, nr as u32),
            instruction(BPF_RET_K, 0, 0, 0x0005_0000 | error),
            instruction(BPF_RET_K, 0, 0, 0x7fff_0000),
        ]
        .concat()
    }

    fn with(filters: &[Vec<u8>]) -> (CoreEntry, SeccompEntry) {
        let mut all = Filters::default();
        let mut last = None;
        for filter in filters {
            last = Some(all.index_of(last, filter.clone(), 0));
        }
        let mut core = CoreEntry::default();
        let thread = core.thread_core.get_or_insert_default();
        (thread.seccomp_mode, thread.seccomp_filter) = (Some(MODE_FILTER as i32), last);
        (core, all.into_entry())
    }

    #[test]
    fn filters_are_installed_in_their_order_found_again_and_suspended_while_we_trace() {
        let filters = [refusing(libc::SYS_getppid, 1), refusing(libc::SYS_getuid, 2)];
        let (core, all) = with(&filters);
        let mut subject = Subject::new();
        subject.filters = all.clone();
        subject.restore(&Seccomp, &core);
        assert_eq!(subject.status().seccomp, MODE_FILTER);
        assert!(subject.call(libc::SYS_getppid, &[]) > 0);
        assert_eq!(subject.dump(&Seccomp), core);
        assert_eq!(subject.filters, all);
        // Let go, it feels them.
        subject.resume_seccomp();
        assert_eq!(subject.call(libc::SYS_getppid, &[]), -1);
        assert_eq!(subject.call(libc::SYS_getuid, &[]), -2);
        assert!(subject.call(libc::SYS_getpid, &[]) > 0);
    }

    #[test]
    fn strict_mode_is_carried() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        one.call(libc::SYS_prctl, &[libc::PR_SET_SECCOMP.into(), 1.into()]);
        let core = one.dump(&Seccomp);
        other.restore(&Seccomp, &core);
        assert_eq!(other.status().seccomp, MODE_STRICT);
        assert_eq!(other.dump(&Seccomp), core);
    }

    #[test]
    fn a_filter_is_stored_once_and_only_after_the_same_ones() {
        let (a, b) = (refusing(1, 1), refusing(2, 2));
        let mut filters = Filters::default();
        let first = filters.index_of(None, a.clone(), 0);
        let second = filters.index_of(Some(first), b.clone(), 0);
        assert_eq!(filters.index_of(None, a.clone(), 0), first);
        assert_eq!(filters.index_of(Some(first), b.clone(), 0), second);
        assert_ne!(filters.index_of(None, b, 0), second);
        assert_ne!(filters.index_of(None, a, 2), first);
        assert_eq!(filters.into_entry().seccomp_filters.len(), 4);
    }

    #[test]
    fn damaged_chains_are_refused() {
        let (core, all) = with(&[refusing(1, 1), refusing(2, 2)]);
        assert_eq!(chain(&core, &all).unwrap(), [0, 1]);
        let mut round = all.clone();
        round.seccomp_filters[0].prev = Some(1);
        assert!(chain(&core, &round).is_err());
        let mut short = all.clone();
        short.seccomp_filters[1].filter.pop();
        assert!(chain(&core, &short).is_err());
        assert!(chain(&core, &SeccompEntry::default()).is_err());
    }

    #[test]
    fn a_filter_with_a_supervisor_is_refused() {
        let mut filter = refusing(1, 1);
        check(&filter).unwrap();
        let at = filter.len() - 4;
        filter[at..].copy_from_slice(&RET_USER_NOTIF.to_le_bytes());
        assert!(check(&filter).unwrap_err().chain().contains("supervisor"));
    }
}
