//! The steps of `protocol.rs` in every order, with deaths of either tool and losses at every moment.

use stateright::{Checker, Model, Property};

use super::{Fate, NotedTask, Settled, fate, settle};
use crate::migrate::wire::Answer;

/// The tree at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Old {
    /// Traced by the tool.
    Held {
        stop_pending: bool,
    },
    Runs,
    /// By SIGSTOP.
    Stopped,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    AwaitsPrepared,
    Decided,
    Noted,
    AwaitsRunning,
    Asking,
    /// It moved, or it stayed.
    Over,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Destination {
    Building,
    AwaitsCommit,
    Noted,
    Released,
    Over,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Note {
    None,
    MayRun,
    Runs,
}

/// A task at the destination; `Dying` is what the kernel has yet to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum New {
    Held,
    Free,
    Dying,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    Prepared,
    Commit,
    Running,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    old: Old,
    source: Source,
    decided: bool,
    destination: Destination,
    note: Note,
    new: [New; 2],
    /// What the living server remembers: waiting, running.
    known: Option<(bool, bool)>,
    session: Option<Vec<Message>>,
    /// An answer on its way.
    answer: Option<(bool, bool)>,
    deaths: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Prepare,
    Decide,
    Note,
    PendStop,
    SendCommit,
    NoteCommit,
    Release(usize),
    NoteRuns,
    EndOld,
    NoticeLoss,
    GiveUpWaiting,
    Ask,
    Conclude,
    KernelKills(usize),
    StartSource,
    StartDestination,
    // Faults.
    LoseSession,
    LoseAnswer,
    Cancel,
    KillSource,
    KillDestination,
}

use Action as A;

struct Protocol;

impl Protocol {
    fn initial() -> World {
        World {
            old: Old::Held { stop_pending: false },
            source: Source::AwaitsPrepared,
            decided: false,
            destination: Destination::Building,
            note: Note::None,
            new: [New::Held; 2],
            known: Some((false, false)),
            session: Some(Vec::new()),
            answer: None,
            deaths: 0,
        }
    }

    /// What happens by itself, if nothing goes wrong any more.
    fn progress(world: &World) -> Vec<Action> {
        let first = world.session.as_ref().and_then(|messages| messages.first().copied());
        let up = world.session.is_some();
        let mut actions = Vec::new();
        let mut may = |condition: bool, action: Action| {
            if condition {
                actions.push(action);
            }
        };
        let (source, destination) = (world.source, world.destination);
        may(destination == Destination::Building && up, A::Prepare);
        may(
            source == Source::AwaitsPrepared && first == Some(Message::Prepared),
            A::Decide,
        );
        may(source == Source::Decided, A::Note);
        may(
            source == Source::Noted && world.old == Old::Held { stop_pending: false },
            A::PendStop,
        );
        may(
            source == Source::Noted && world.old == Old::Held { stop_pending: true },
            A::SendCommit,
        );
        may(
            destination == Destination::AwaitsCommit && first == Some(Message::Commit),
            A::NoteCommit,
        );
        for task in 0..2 {
            let turn = world.new[..task].iter().all(|new| *new == New::Free);
            may(
                destination == Destination::Noted && turn && world.new[task] == New::Held,
                A::Release(task),
            );
            may(world.new[task] == New::Dying, A::KernelKills(task));
        }
        may(
            destination == Destination::Noted && world.new == [New::Free; 2],
            A::NoteRuns,
        );
        may(
            source == Source::AwaitsRunning && first == Some(Message::Running),
            A::EndOld,
        );
        may(
            !up && matches!(source, Source::AwaitsPrepared | Source::AwaitsRunning),
            A::NoticeLoss,
        );
        may(
            !up && matches!(destination, Destination::Building | Destination::AwaitsCommit),
            A::GiveUpWaiting,
        );
        may(
            source == Source::Asking && world.answer.is_none() && destination != Destination::Dead,
            A::Ask,
        );
        may(source == Source::Asking && world.answer.is_some(), A::Conclude);
        may(source == Source::Dead, A::StartSource);
        may(destination == Destination::Dead, A::StartDestination);
        actions
    }

    fn apply(world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        let send = |next: &mut World, message| {
            if let Some(messages) = &mut next.session {
                messages.push(message);
            }
        };
        let take = |next: &mut World| {
            if let Some(messages) = &mut next.session {
                messages.remove(0);
            }
        };
        match action {
            A::Prepare => {
                // First remembered, then said: the source may ask as soon as it has heard it.
                next.known = Some((true, false));
                next.destination = Destination::AwaitsCommit;
                send(&mut next, Message::Prepared);
            }
            A::Decide => {
                take(&mut next);
                next.source = Source::Decided;
            }
            A::Note => (next.decided, next.source) = (true, Source::Noted),
            A::PendStop => next.old = Old::Held { stop_pending: true },
            A::SendCommit => {
                next.source = Source::AwaitsRunning;
                send(&mut next, Message::Commit);
            }
            A::NoteCommit => {
                take(&mut next);
                (next.note, next.destination) = (Note::MayRun, Destination::Noted);
            }
            A::Release(task) => next.new[task] = New::Free,
            A::NoteRuns => {
                (next.note, next.known, next.destination) = (Note::Runs, Some((false, true)), Destination::Released);
                send(&mut next, Message::Running);
            }
            A::EndOld => {
                take(&mut next);
                (next.old, next.decided, next.source) = (Old::Gone, false, Source::Over);
            }
            A::NoticeLoss if world.source == Source::AwaitsPrepared => {
                (next.old, next.source) = (Old::Runs, Source::Over);
            }
            A::NoticeLoss => next.source = Source::Asking,
            A::GiveUpWaiting => {
                (next.new, next.known, next.destination) = ([New::Gone; 2], Some((false, false)), Destination::Over);
            }
            A::Ask => next.answer = Some(Self::answer(&mut next)?),
            A::Conclude => {
                let (waiting, running) = next.answer.take()?;
                let answer = Answer {
                    waiting,
                    running,
                    complete: running,
                };
                match fate(Some(&answer)) {
                    Fate::Unknown => {}
                    Fate::Runs { .. } => (next.old, next.decided, next.source) = (Old::Gone, false, Source::Over),
                    Fate::NeverRan => (next.old, next.decided, next.source) = (Old::Runs, false, Source::Over),
                }
            }
            A::KernelKills(task) => next.new[task] = New::Gone,
            A::StartSource => {
                // Recovery acts on a note whose tree is still there.
                next.source = if world.decided { Source::Asking } else { Source::Over };
            }
            A::StartDestination => next.destination = Destination::Over,
            A::LoseSession => next.session = None,
            A::LoseAnswer => next.answer = None,
            A::Cancel => {
                (next.old, next.source, next.session) = (Old::Runs, Source::Over, None);
            }
            A::KillSource => {
                next.old = match world.old {
                    Old::Held { stop_pending: true } => Old::Stopped,
                    Old::Held { stop_pending: false } => Old::Runs,
                    other => other,
                };
                (next.source, next.session, next.answer) = (Source::Dead, None, None);
                next.deaths += 1;
            }
            A::KillDestination => {
                for new in next.new.iter_mut().filter(|new| **new == New::Held) {
                    *new = New::Dying;
                }
                (next.destination, next.session, next.known) = (Destination::Dead, None, None);
                next.deaths += 1;
            }
        }
        Some(next)
    }

    /// What a server says: what it remembers, or what it finds.
    fn answer(world: &mut World) -> Option<(bool, bool)> {
        if let Some(known) = world.known {
            return Some(known);
        }
        match world.note {
            Note::None => Some((false, false)),
            Note::Runs => Some((false, true)),
            Note::MayRun => match settle(world.new.map(|new| match new {
                New::Held | New::Dying => NotedTask::Held,
                New::Free => NotedTask::Free,
                New::Gone => NotedTask::Gone,
            })) {
                Settled::NotYet => Some((true, false)),
                Settled::Runs => {
                    world.note = Note::Runs;
                    Some((false, true))
                }
                Settled::Broken => {
                    (world.new, world.note) = ([New::Gone; 2], Note::None);
                    Some((false, false))
                }
            },
        }
    }

    /// Does one copy run in the end, if nothing goes wrong from here on?
    fn heals(world: &World) -> bool {
        let mut world = world.clone();
        for _ in 0..100 {
            let Some(&action) = Self::progress(&world).first() else {
                break;
            };
            let Some(next) = Self::apply(&world, action) else {
                return false;
            };
            world = next;
        }
        let there = world.new == [New::Free; 2];
        let nothing_there = world.new == [New::Gone; 2];
        matches!(
            (world.old, there, nothing_there),
            (Old::Gone, true, _) | (Old::Runs, _, true)
        )
    }
}

impl Model for Protocol {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![Protocol::initial()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        actions.extend(Protocol::progress(world));
        if world.session.is_some() {
            actions.push(A::LoseSession);
        }
        if world.answer.is_some() {
            actions.push(A::LoseAnswer);
        }
        if matches!(world.source, Source::AwaitsPrepared) {
            actions.push(A::Cancel);
        }
        // Each may die again while it mends what it left the first time.
        if world.deaths < 4 {
            if world.source != Source::Dead {
                actions.push(A::KillSource);
            }
            if world.destination != Destination::Dead {
                actions.push(A::KillDestination);
            }
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        Protocol::apply(world, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two", |_, world: &World| {
                !(world.old == Old::Runs && world.new.contains(&New::Free))
            }),
            Property::always("never none", |_, world: &World| {
                world.old != Old::Gone || world.new == [New::Free; 2]
            }),
            Property::always("one runs in the end", |_, world: &World| Protocol::heals(world)),
            Property::sometimes("it moves", |_, world: &World| world.old == Old::Gone),
            Property::sometimes("it stays after Commit was sent", |_, world: &World| {
                world.old == Old::Runs && world.note == Note::None && world.deaths > 0 && world.new == [New::Gone; 2]
            }),
            Property::sometimes("part of a tree is ended", |_, world: &World| {
                world.new == [New::Free, New::Gone]
            }),
        ]
    }
}

#[test]
fn there_are_never_two_running_copies_and_never_none_whatever_dies_or_is_lost() {
    let checker = Protocol.checker().spawn_bfs().join();
    println!("{} states", checker.unique_state_count());
    checker.assert_properties();
    // A model that reaches little shows little.
    assert!(checker.unique_state_count() > 300);
}
