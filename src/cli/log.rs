//! The log as CRIU writes it: a tracing layer.
//!
//! | verbosity | what is written |
//! |---|---|
//! | 0 | nothing |
//! | 1 | `Error (src/file.rs:12): …` |
//! | 2 | and `Warn  (src/file.rs:12): …`; the default |
//! | 3 | and information; every line begins with the time since the start, `(00.000123) ` |
//! | 4 | and details |

use std::fmt::Write as _;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

use whimbrel::error::{Context as _, Error, Result};

use super::Logging;

/// Level when nothing is asked for.
const DEFAULT: u8 = 2;

/// Makes the log the subscriber of all events of this process.
///
/// # Errors
/// When the log file cannot be made.
pub fn start(logging: &Logging, started: Instant) -> Result<()> {
    let output: Box<dyn Write + Send> = match &logging.file {
        Some(path) => {
            let failed = || {
                Error::new("open the log")
                    .object(path.display().to_string())
                    .hint("see --log-file, -o")
            };
            Box::new(std::fs::File::create(path).with(failed)?)
        }
        None => Box::new(std::io::stderr()),
    };
    let layer = CriuLog {
        verbosity: logging.verbosity.unwrap_or(DEFAULT),
        started,
        output: Mutex::new(output),
    };
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer)).context("start the log")
}

struct CriuLog {
    verbosity: u8,
    started: Instant,
    output: Mutex<Box<dyn Write + Send>>,
}

impl CriuLog {
    fn line(&self, level: Level, place: Option<(&str, u32)>, message: &str, since: Duration) -> String {
        let mut line = String::new();
        if self.verbosity > 2 {
            let _ = write!(line, "({:02}.{:06}) ", since.as_secs(), since.subsec_micros());
        }
        let (file, number) = place.unwrap_or(("?", 0));
        let _ = match level {
            Level::ERROR => write!(line, "Error ({file}:{number}): "),
            Level::WARN => write!(line, "Warn  ({file}:{number}): "),
            _ => Ok(()),
        };
        line + message + "\n"
    }
}

fn needs(level: Level) -> u8 {
    match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        _ => 4,
    }
}

impl<S: Subscriber> Layer<S> for CriuLog {
    fn enabled(&self, metadata: &tracing::Metadata<'_>, _: Context<'_, S>) -> bool {
        // TRACE belongs to those who debug the tool itself: above all of CRIU's levels.
        *metadata.level() != Level::TRACE && needs(*metadata.level()) <= self.verbosity
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut text = Text::default();
        event.record(&mut text);
        let line = self.line(
            *metadata.level(),
            metadata.file().zip(metadata.line()),
            &(text.message + &text.fields),
            self.started.elapsed(),
        );
        // A full disk must not end a dump: what cannot be logged is not logged.
        let _ = self
            .output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(line.as_bytes());
    }
}

/// The message of an event, and its other fields as ` name=value`.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            self.record_debug(field, &value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_look_as_those_of_criu() {
        let log = |verbosity| CriuLog {
            verbosity,
            started: Instant::now(),
            output: Mutex::new(Box::new(std::io::sink())),
        };
        let since = Duration::from_micros(12_000_123);
        let place = Some(("src/a.rs", 7));
        assert_eq!(
            log(4).line(Level::ERROR, place, "no", since),
            "(12.000123) Error (src/a.rs:7): no\n"
        );
        assert_eq!(log(3).line(Level::INFO, place, "so", since), "(12.000123) so\n");
        assert_eq!(log(2).line(Level::WARN, place, "hm", since), "Warn  (src/a.rs:7): hm\n");
    }
}
