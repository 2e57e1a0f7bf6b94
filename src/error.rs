//! The error of the engine: which operation, which task, which object, why, and what helps.
//!
//! `Display` is one line and never repeats its source; `main` prints the chain once.

use std::fmt;

/// Any error below ours in the chain.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// Result of an engine operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what the user can do.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    what: String,
    task: Option<i32>,
    object: Option<String>,
    hint: Option<String>,
    source: Option<BoxError>,
}

impl Error {
    /// An error of the operation `what` ("seize", "map memory").
    pub fn new(what: impl Into<String>) -> Self {
        Error(Box::new(Inner {
            what: what.into(),
            task: None,
            object: None,
            hint: None,
            source: None,
        }))
    }

    /// The failure of the last system call (`errno`) as cause.
    pub fn os(what: impl Into<String>) -> Self {
        Error::new(what).because(std::io::Error::last_os_error())
    }

    /// Names the task, unless a deeper layer already did.
    pub fn task(mut self, pid: i32) -> Self {
        self.0.task.get_or_insert(pid);
        self
    }

    /// Names the object ("fd 7 → /run/x.sock"), unless a deeper layer already did.
    pub fn object(mut self, object: impl Into<String>) -> Self {
        if self.0.object.is_none() {
            self.0.object = Some(object.into());
        }
        self
    }

    /// Says which option or action helps.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        if self.0.hint.is_none() {
            self.0.hint = Some(hint.into());
        }
        self
    }

    /// Adds the cause.
    pub fn because(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The `errno` at the bottom of the chain, where there is one.
    pub fn errno(&self) -> Option<i32> {
        let mut source: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = source {
            if let Some(io) = error.downcast_ref::<std::io::Error>() {
                return io.raw_os_error();
            }
            source = error.source();
        }
        None
    }

    /// The whole chain on one line, outermost first.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(": ");
            text.push_str(&error.to_string());
            source = error.source();
        }
        if let Some(hint) = self.deepest_hint() {
            text.push_str("; ");
            text.push_str(hint);
        }
        text
    }

    fn deepest_hint(&self) -> Option<&str> {
        let mut hint = self.0.hint.as_deref();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            if let Some(ours) = error.downcast_ref::<Error>() {
                hint = ours.0.hint.as_deref().or(hint);
            }
            source = error.source();
        }
        hint
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        if let Some(task) = self.0.task {
            write!(f, ", task {task}")?;
        }
        if let Some(object) = &self.0.object {
            write!(f, ", {object}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// Adds the operation to any error on its way up.
pub trait Context<T> {
    /// Wraps the error as the cause of a failed `what`.
    fn context(self, what: impl Into<String>) -> Result<T>;
    /// Wraps the error as the cause of what `make` returns.
    fn with(self, make: impl FnOnce() -> Error) -> Result<T>;
}

impl<T, E: Into<BoxError>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::new(what).because(source))
    }

    fn with(self, make: impl FnOnce() -> Error) -> Result<T> {
        self.map_err(|source| make().because(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_operation_task_object_cause_and_remedy_once() {
        let cause = std::io::Error::from_raw_os_error(libc::EEXIST);
        let error = Error::new("create task")
            .task(12)
            .object("pid 12")
            .hint("use --namespace")
            .because(cause);
        let outer: Error = Err::<(), _>(error).context("restore").unwrap_err();
        assert_eq!(
            outer.chain(),
            "restore: create task, task 12, pid 12: File exists (os error 17); use --namespace"
        );
        assert_eq!(outer.errno(), Some(libc::EEXIST));
    }
}
