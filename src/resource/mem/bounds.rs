//! The bounds of an address space that /proc shows: code, data, heap, arguments, environment, auxiliary vector, and the
//! executable (`PR_SET_MM_MAP`).

use whimbrel_images::proto::MmEntry;

use crate::error::Result;
use crate::procfs::{self, stat::Stat};
use crate::remote::{Outcome, Program, program::CallId};

const PR_SET_MM: i32 = 35;
const PR_SET_MM_MAP: i32 = 14;
const PR_GET_THP_DISABLE: i32 = 42;
const PR_SET_THP_DISABLE: i32 = 41;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;

/// Calls whose results [`read`] takes.
pub struct Calls {
    brk: CallId,
    dumpable: CallId,
    thp: CallId,
    merge: CallId,
}

/// Adds the calls that ask a task for what /proc does not say.
pub fn ask(program: &mut Program) -> Calls {
    Calls {
        brk: program.call("read the program break", libc::SYS_brk, &[0.into()]),
        dumpable: program.call(
            "read the dumpable flag",
            libc::SYS_prctl,
            &[libc::PR_GET_DUMPABLE.into()],
        ),
        thp: program.try_call(
            libc::SYS_prctl,
            &[PR_GET_THP_DISABLE.into(), 0.into(), 0.into(), 0.into(), 0.into()],
        ),
        merge: program.try_call(
            libc::SYS_prctl,
            &[PR_GET_MEMORY_MERGE.into(), 0.into(), 0.into(), 0.into(), 0.into()],
        ),
    }
}

/// Describes the bounds; mappings and executable are filled in by others.
///
/// # Errors
/// When the auxiliary vector cannot be read.
pub fn read(pid: i32, stat: &Stat, calls: &Calls, outcome: &Outcome) -> Result<MmEntry> {
    let auxv = procfs::read(pid, "auxv")?;
    Ok(MmEntry {
        mm_start_code: stat.start_code,
        mm_end_code: stat.end_code,
        mm_start_data: stat.start_data,
        mm_end_data: stat.end_data,
        mm_start_stack: stat.start_stack,
        mm_start_brk: stat.start_brk,
        mm_brk: outcome.result(calls.brk) as u64,
        mm_arg_start: stat.arg_start,
        mm_arg_end: stat.arg_end,
        mm_env_start: stat.env_start,
        mm_env_end: stat.env_end,
        exe_file_id: 0,
        mm_saved_auxv: auxv
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .collect(),
        vmas: Vec::new(),
        dumpable: Some(outcome.result(calls.dumpable) as i32),
        aios: Vec::new(),
        thp_disabled: Some(outcome.result(calls.thp) > 0),
        // The lowest bit says that it is set, those above are the flags (Linux 6.18).
        thp_flags: Some(outcome.result(calls.thp))
            .filter(|&state| state > 1)
            .map(|state| state as u32 & !1),
        memory_merge: Some(outcome.result(calls.merge) > 0),
    })
}

/// Adds the call that sets the bounds. The mappings must be there, those of the old executable must be gone; `executable`
/// is a descriptor of the new one in the task.
pub fn restore(program: &mut Program, mm: &MmEntry, executable: i32) {
    // struct prctl_mm_map: eleven addresses, pointer to the vector, its size (u32), the executable's descriptor (u32).
    let auxv: Vec<u8> = mm
        .mm_saved_auxv
        .iter()
        .take(64)
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let vector = program.data(&auxv);
    let words = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
    ];
    let mut map: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    map.resize(104, 0);
    map[96..100].copy_from_slice(&(auxv.len() as u32).to_le_bytes());
    map[100..104].copy_from_slice(&executable.to_le_bytes());
    let map = program.data(&map);
    program.store_address(map, 88, vector);
    let args = [PR_SET_MM.into(), PR_SET_MM_MAP.into(), map.into(), 104.into(), 0.into()];
    program.call("set the bounds of the address space", libc::SYS_prctl, &args);
    if mm.thp_disabled == Some(true) {
        let flags = mm.thp_flags.unwrap_or(0);
        let args = [PR_SET_THP_DISABLE.into(), 1.into(), flags.into(), 0.into(), 0.into()];
        program.call_or_warn("disable transparent huge pages", libc::SYS_prctl, &args);
    }
    if mm.memory_merge == Some(true) {
        let args = [PR_SET_MEMORY_MERGE.into(), 1.into(), 0.into(), 0.into(), 0.into()];
        program.call_or_warn("let equal pages be merged (KSM)", libc::SYS_prctl, &args);
    }
}

/// Adds the call that sets the dumpable flag; it must come after all changes of credentials.
pub fn restore_dumpable(program: &mut Program, mm: &MmEntry) {
    if let Some(dumpable @ 0..=1) = mm.dumpable {
        let args = [
            libc::PR_SET_DUMPABLE.into(),
            dumpable.into(),
            0.into(),
            0.into(),
            0.into(),
        ];
        program.call("set the dumpable flag", libc::SYS_prctl, &args);
    }
}
