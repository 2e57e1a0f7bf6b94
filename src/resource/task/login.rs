//! As whom the user of a process logged in, `/proc/PID/loginuid`: what the audit log says of it.
//!
//! Whoever restores has it from his own login. It is set where the kernel allows that (CAP_AUDIT_CONTROL, and no audit rule
//! against it); the number of the session, which goes with it, cannot be chosen.

use crate::error::Result;
use crate::remote::Program;
use crate::resource::{Reader, Restoring, Stage, TaskKind, ThreadView};

/// As whom the user of a process logged in.
pub struct Login;

impl TaskKind for Login {
    fn name(&self) -> &'static str {
        "login"
    }

    fn dump<'a>(&self, thread: &ThreadView<'a, '_>, _program: &mut Program) -> Result<Reader<'a>> {
        if !thread.leader {
            return Ok(Box::new(|_, _| Ok(())));
        }
        let login = login_of(&thread.pid.to_string());
        Ok(Box::new(move |_, core| {
            core.tc.get_or_insert_default().loginuid = login;
            Ok(())
        }))
    }

    fn restore(&self, stage: Stage, thread: &Restoring<'_>, program: &mut Program) -> Result<()> {
        let task = thread.process_at(stage);
        // Its threads, made later, have it from it.
        if let Some(login) = task.and_then(|task| task.loginuid)
            && login_of("self") != Some(login)
        {
            super::write_file(program, "/proc/self/loginuid", login.to_string().as_bytes());
        }
        Ok(())
    }
}

/// `None` on a kernel without audit.
fn login_of(process: &str) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/{process}/loginuid")).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::task::testing::Subject;

    #[test]
    fn a_login_is_carried_where_the_kernel_has_any() {
        let (mut one, mut other) = (Subject::new(), Subject::new());
        let before = login_of("self");
        let mut core = one.dump(&Login);
        assert_eq!(core.tc.as_ref().unwrap().loginuid, before);
        core.tc.as_mut().unwrap().loginuid = before.map(|_| 1234);
        other.restore(&Login, &core);
        let kept = login_of(&other.pid().to_string());
        // Rules may forbid to change one that is set; one that is not set anybody may set.
        let unset = before == Some(u32::MAX);
        assert!(kept == before.map(|_| 1234) || !unset, "{before:?} {kept:?}");
    }
}
