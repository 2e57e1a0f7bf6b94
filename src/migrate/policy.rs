//! When to stop copying ahead. Pure: numbers in, decision out.

use std::time::Duration;

use super::Mode;

/// What is known after a round.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// Number of the round, from 1.
    pub round: u32,
    /// Pages that the round sent.
    pub sent_pages: u64,
    /// How long it took.
    pub took: Duration,
    /// Pages that the round before it sent; `None` in the first.
    pub previous_pages: Option<u64>,
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Another round lowers the downtime.
    Again,
    /// The rest fits into the allowed downtime, or does not get less: freeze and send it.
    Freeze,
    /// The rest does not fit: freeze, and let it follow on demand.
    FreezeAndFollow,
    /// The rest does not fit, and the user does not want it to follow.
    GiveUp,
}

/// Bounds of a migration.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How memory travels.
    pub mode: Mode,
    /// Downtime that is allowed for memory.
    pub max_downtime: Duration,
    /// Most rounds.
    pub max_rounds: u32,
    /// In pre-copy mode: give up rather than exceed the downtime.
    pub strict: bool,
}

/// Time that freezing, images and putting together take whatever the memory, as a first guess.
const FIXED: Duration = Duration::from_millis(8);
/// Below this many pages a round is not worth its overhead.
pub const FEW: u64 = 256;

/// Decides after a round. The pages that a round sent are what the next one will find, at best, when rounds take equally
/// long; while they get fewer, the next round is shorter and finds less.
pub fn decide(seen: Observation, limits: &Limits) -> Decision {
    if limits.mode == Mode::PostCopy {
        return Decision::FreezeAndFollow;
    }
    let rate = seen.sent_pages as f64 / seen.took.as_secs_f64().max(1e-6);
    // Pages written meanwhile, by what this round found in the time of the last; the first round finds everything.
    let expected = seen.previous_pages.map_or(seen.sent_pages, |previous| {
        let shrink = (seen.sent_pages as f64 / previous.max(1) as f64).min(1.0);
        (seen.sent_pages as f64 * shrink) as u64
    });
    let predicted = FIXED + Duration::from_secs_f64(expected as f64 / rate.max(1.0));
    let small = seen.sent_pages <= FEW;
    if seen.round > 1 && (small || predicted <= limits.max_downtime && !shrinks(seen)) {
        return Decision::Freeze;
    }
    let stuck = seen
        .previous_pages
        .is_some_and(|previous| seen.round > 2 && seen.sent_pages * 10 > previous * 9);
    if seen.round < limits.max_rounds && !stuck {
        return Decision::Again;
    }
    match limits.mode {
        _ if predicted <= limits.max_downtime => Decision::Freeze,
        Mode::Hybrid => Decision::FreezeAndFollow,
        Mode::PreCopy if limits.strict => Decision::GiveUp,
        _ => Decision::Freeze,
    }
}

/// Did the last round find so much less than the one before it that the next one lowers the downtime, even if that is short
/// enough already?
fn shrinks(seen: Observation) -> bool {
    seen.previous_pages
        .is_some_and(|previous| seen.sent_pages * 4 < previous * 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(mode: Mode) -> Limits {
        Limits {
            mode,
            max_downtime: Duration::from_millis(100),
            max_rounds: 10,
            strict: false,
        }
    }

    fn seen(round: u32, previous: Option<u64>, sent: u64) -> Observation {
        // 50,000 pages a second.
        Observation {
            round,
            sent_pages: sent,
            took: Duration::from_secs_f64(sent as f64 / 50e3),
            previous_pages: previous,
        }
    }

    #[test]
    fn rounds_go_on_while_they_shrink_and_end_when_little_is_left() {
        let limits = limits(Mode::PreCopy);
        assert_eq!(decide(seen(1, None, 60_000), &limits), Decision::Again);
        assert_eq!(decide(seen(2, Some(60_000), 12_000), &limits), Decision::Again);
        assert_eq!(decide(seen(3, Some(12_000), 2_400), &limits), Decision::Again);
        // 480 pages would do, but another round lowers the downtime for little.
        assert_eq!(decide(seen(4, Some(2_400), 480), &limits), Decision::Again);
        assert_eq!(decide(seen(5, Some(480), 96), &limits), Decision::Freeze);
    }

    #[test]
    fn a_tree_that_writes_faster_than_the_link_follows_on_demand_or_is_given_up_as_asked() {
        let at = seen(5, Some(60_000), 60_000);
        assert_eq!(decide(at, &limits(Mode::Hybrid)), Decision::FreezeAndFollow);
        assert_eq!(decide(at, &limits(Mode::PreCopy)), Decision::Freeze);
        assert_eq!(
            decide(
                at,
                &Limits {
                    strict: true,
                    ..limits(Mode::PreCopy)
                }
            ),
            Decision::GiveUp
        );
    }

    #[test]
    fn rounds_are_bounded_whatever_happens() {
        let limits = limits(Mode::PreCopy);
        let mut pages = 1 << 40;
        for round in 1..=limits.max_rounds {
            let decision = decide(seen(round, Some(pages * 2), pages), &limits);
            if decision != Decision::Again {
                return;
            }
            pages = pages * 8 / 10;
        }
        panic!("no end");
    }
}
