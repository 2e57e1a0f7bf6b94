//! Speculation features of the processor that a thread has switched off for itself, PR_SET_SPECULATION_CTRL(2const).
//!
//! Only what is off is carried: nothing is ever switched on that is off on this machine.

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// Speculation features that a thread has switched off.
pub struct Speculation;

const PR_GET_SPECULATION_CTRL: i32 = 52;
const PR_SET_SPECULATION_CTRL: i32 = 53;
/// Store bypass, indirect branches, flush of the first cache.
const FEATURES: u32 = 3;
/// The state is that of the thread, not of the machine.
const PR_SPEC_PRCTL: u32 = 1 << 0;
/// Off; off for good; off until execve(2).
const OFF: u32 = 1 << 2 | 1 << 3 | 1 << 4;
const PR_SPEC_ENABLE: u32 = 1 << 1;
const PR_SPEC_L1D_FLUSH: u32 = 2;

impl TaskKind for Speculation {
    fn name(&self) -> &'static str {
        "speculation control"
    }

    fn dump<'a>(&self, _thread: &ThreadView<'a, '_>, program: &mut Program) -> Result<Reader<'a>> {
        let ask = |feature: u32| {
            let zero = || 0.into();
            let args = [PR_GET_SPECULATION_CTRL.into(), feature.into(), zero(), zero(), zero()];
            // ENODEV, EINVAL: a feature that this processor or kernel does not know.
            program.try_call(libc::SYS_prctl, &args)
        };
        let calls: Vec<_> = (0..FEATURES).map(ask).collect();
        Ok(Box::new(move |outcome, core| {
            let core = core.thread_core.get_or_insert_default();
            for (feature, call) in (0..).zip(calls) {
                let state = outcome.checked(call).unwrap_or(0) as u32;
                if let Some(chosen) = chosen(feature, state) {
                    // Feature and state in one number.
                    core.speculation.push(feature << 8 | chosen);
                }
            }
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let core = thread.core.thread_core.as_ref().filter(|_| stage == Stage::Thread);
        for choice in core.iter().flat_map(|core| &core.speculation) {
            let (feature, state) = (choice >> 8, choice & 0xff);
            let args = [
                PR_SET_SPECULATION_CTRL.into(),
                feature.into(),
                state.into(),
                0.into(),
                0.into(),
            ];
            let what = format!("restrict the processor's speculation (feature {feature}, state {state})");
            program.call_or_warn(what, libc::SYS_prctl, &args);
        }
        Ok(())
    }
}

/// What a thread has chosen that is stricter than nothing. Of the flush, which is something that is done, "enabled" is.
fn chosen(feature: u32, state: u32) -> Option<u32> {
    let strict = if feature == PR_SPEC_L1D_FLUSH {
        PR_SPEC_ENABLE
    } else {
        OFF
    };
    Some(state & strict).filter(|&chosen| chosen != 0 && state & PR_SPEC_PRCTL != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn what_a_thread_switched_off_is_off_again_where_the_processor_has_a_choice() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        let get = |feature: u32| {
            let zero = || 0.into();
            [PR_GET_SPECULATION_CTRL.into(), feature.into(), zero(), zero(), zero()]
        };
        for feature in 0..2 {
            let off = 1u32 << 2;
            let args = [
                PR_SET_SPECULATION_CTRL.into(),
                feature.into(),
                off.into(),
                0.into(),
                0.into(),
            ];
            one.call(libc::SYS_prctl, &args);
        }
        let core = one.dump(&Speculation);
        other.restore(&Speculation, &core);
        for feature in 0..2 {
            let state = one.call(libc::SYS_prctl, &get(feature));
            assert_eq!(other.call(libc::SYS_prctl, &get(feature)), state);
        }
        assert_eq!(other.dump(&Speculation), core);
    }

    #[test]
    fn only_choices_of_the_thread_itself_are_taken() {
        assert_eq!(chosen(0, PR_SPEC_PRCTL | 1 << 2), Some(1 << 2));
        assert_eq!(chosen(0, PR_SPEC_PRCTL | PR_SPEC_ENABLE), None);
        assert_eq!(chosen(1, 1 << 3), None, "the machine's state");
        assert_eq!(
            chosen(PR_SPEC_L1D_FLUSH, PR_SPEC_PRCTL | PR_SPEC_ENABLE),
            Some(PR_SPEC_ENABLE)
        );
        assert_eq!(chosen(PR_SPEC_L1D_FLUSH, PR_SPEC_PRCTL | 1 << 2), None);
    }
}
