//! Credentials: ids, groups, capabilities, securebits, no_new_privs.

use whimbrel_images::proto::CredsEntry;

use crate::error::Result;
use crate::remote::{Arg, Program};
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Credentials of a thread.
pub struct Credentials;

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: i32 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: i32 = 4;
/// SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP: changing ids must not touch the capabilities that we still need.
const KEEP_ALL: u32 = 1 << 4 | 1 << 2;

impl TaskKind for Credentials {
    fn name(&self) -> &'static str {
        "credentials"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let securebits = program.call("read securebits", libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.into()]);
        let status = thread.status;
        Ok(Box::new(move |outcome, core| {
            core.thread_core.get_or_insert_default().creds = Some(CredsEntry {
                uid: status.uid[0],
                gid: status.gid[0],
                euid: status.uid[1],
                egid: status.gid[1],
                suid: status.uid[2],
                sgid: status.gid[2],
                fsuid: status.uid[3],
                fsgid: status.gid[3],
                cap_inh: halves(status.cap_inh),
                cap_prm: halves(status.cap_prm),
                cap_eff: halves(status.cap_eff),
                cap_bnd: halves(status.cap_bnd),
                cap_amb: halves(status.cap_amb),
                secbits: outcome.result(securebits) as u32,
                groups: status.groups.clone(),
                no_new_privs: Some(status.no_new_privs as u32),
                ..CredsEntry::default()
            });
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let thread = thread.core;
        let creds = thread.thread_core.as_ref().and_then(|core| core.creds.as_ref());
        let Some(creds) = creds.filter(|_| stage == Stage::Final) else {
            return Ok(());
        };
        let prctl = |option: i32, args: &[Arg]| {
            let mut all = vec![Arg::from(option)];
            all.extend_from_slice(args);
            all
        };
        let keep = prctl(libc::PR_SET_SECUREBITS, &[KEEP_ALL.into()]);
        // Refused to an ordinary user, who has no capabilities to keep either.
        program.try_call(libc::SYS_prctl, &keep);

        let groups: Vec<u8> = creds.groups.iter().flat_map(|group| group.to_le_bytes()).collect();
        let list = program.data(&groups);
        let (count, three) = (creds.groups.len(), |a: u32, b: u32, c: u32| {
            [a.into(), b.into(), c.into()]
        });
        program.call(
            "set supplementary groups",
            libc::SYS_setgroups,
            &[count.into(), list.into()],
        );
        program.call(
            "set group ids",
            libc::SYS_setresgid,
            &three(creds.gid, creds.egid, creds.sgid),
        );
        program.call(
            "set user ids",
            libc::SYS_setresuid,
            &three(creds.uid, creds.euid, creds.suid),
        );
        program.try_call(libc::SYS_setfsgid, &[creds.fsgid.into()]);
        program.try_call(libc::SYS_setfsuid, &[creds.fsuid.into()]);

        let bounding = whole(&creds.cap_bnd);
        for capability in 0..41u64 {
            if bounding & 1 << capability == 0 {
                let args = prctl(libc::PR_CAPBSET_DROP, &[capability.into()]);
                program.call("drop a capability from the bounding set", libc::SYS_prctl, &args);
            }
        }
        program.call(
            "set securebits",
            libc::SYS_prctl,
            &prctl(libc::PR_SET_SECUREBITS, &[creds.secbits.into()]),
        );
        let clear = prctl(PR_CAP_AMBIENT, &[PR_CAP_AMBIENT_CLEAR_ALL.into()]);
        program.try_call(libc::SYS_prctl, &clear);

        // Capabilities before ambient ones, which must be permitted and inheritable.
        let header = program.data(&[CAPABILITY_VERSION_3.to_le_bytes(), 0u32.to_le_bytes()].concat());
        let sets = [&creds.cap_eff, &creds.cap_prm, &creds.cap_inh].map(|set| whole(set));
        let words: Vec<u8> = [0, 32]
            .iter()
            .flat_map(|shift| sets.map(|set| (set >> shift) as u32))
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let data = program.data(&words);
        program.call("set capabilities", libc::SYS_capset, &[header.into(), data.into()]);
        for capability in (0..41u64).filter(|capability| whole(&creds.cap_amb) & 1 << capability != 0) {
            let args = prctl(
                PR_CAP_AMBIENT,
                &[PR_CAP_AMBIENT_RAISE.into(), capability.into(), 0.into(), 0.into()],
            );
            program.call("raise an ambient capability", libc::SYS_prctl, &args);
        }
        if creds.no_new_privs == Some(1) {
            let args = prctl(libc::PR_SET_NO_NEW_PRIVS, &[1.into(), 0.into(), 0.into(), 0.into()]);
            program.call("set no_new_privs", libc::SYS_prctl, &args);
        }
        // The kernel clears it when ids change (commit_creds), so it is set after them.
        if let Some(signal) = thread.thread_core.as_ref().and_then(|core| core.pdeath_sig) {
            let args = prctl(libc::PR_SET_PDEATHSIG, &[signal.into()]);
            program.call("set the parent-death signal", libc::SYS_prctl, &args);
        }
        Ok(())
    }
}

fn halves(set: u64) -> Vec<u32> {
    vec![set as u32, (set >> 32) as u32]
}

fn whole(halves: &[u32]) -> u64 {
    halves
        .iter()
        .take(2)
        .enumerate()
        .map(|(index, &half)| u64::from(half) << (32 * index))
        .sum()
}
