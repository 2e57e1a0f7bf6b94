//! From the freeze to the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use whimbrel_images::page::{PAGE_SIZE, PageSource};
use whimbrel_images::store::{ImageStore, MemStore};

use super::look::Looked;
use super::network::Network;
use super::pages::PageService;
use super::recover::{ASK_AGAIN, ask_state};
use super::rounds::{Rounds, send_last};
use super::{Migration, Outcome, Stage, unexpected};
use crate::dump::collect::Prepared;
use crate::dump::lazy::{FrozenPages, StoppedTree};
use crate::dump::runs::RunSet;
use crate::dump::{self, FrozenTree};
use crate::error::{Context, Error, Result};
use crate::kernel::address::{MovedAddress, Removed};
use crate::migrate::Phase;
use crate::migrate::journal::Decision;
use crate::migrate::protocol::{Fate, fate};
use crate::migrate::report::{Followed, Round, ms};
use crate::migrate::wire::{self, Body, Final, LazyPages, Packets};
use crate::resource::sock::datagrams;
use crate::tree::{Task, TaskState, TreeImage};

/// How long packets still come to the old place once it is announced where the tree lives.
const STRAGGLERS: Duration = Duration::from_millis(100);

/// A tree that is stopped. Fields go in this order when it is dropped: the network is unlocked, then the tree goes on.
pub struct Frozen {
    network: Network,
    tree: FrozenTree,
    looked: Looked,
    follow: Option<PageService>,
}

/// A tree that the destination has put together, and that is still stopped here.
pub struct Put {
    network: Network,
    tree: FrozenTree,
    /// Which pages of which task are to follow.
    lazy: Vec<(u32, RunSet)>,
    follow: Option<PageService>,
    /// Held until the tree is gone: to end the watch of memory takes as long as the memory is large.
    looked: Looked,
}

/// A tree about which the decision is written.
pub struct Committed {
    removed: Option<Removed>,
    stopped: StoppedTree,
    put: Put,
    session: String,
    /// When the decision was begun.
    started: Instant,
}

impl Migration<'_> {
    /// Stops the tree and keeps packets away from it.
    pub fn freeze(&mut self, rounds: Rounds) -> Result<Stage> {
        let prepared = match rounds.prepared {
            Some(prepared) => prepared,
            None => Prepared::look_tracked(self.options.pid)?,
        };
        let mut network = Network::before_freeze(&rounds.looked.listeners)?;
        self.observer.phase(Phase::Freeze);
        let tree = dump::freeze(self.options.pid, prepared, &self.options.dump)?;
        let frozen = &mut self.report.frozen;
        (frozen.freeze_ms, frozen.collect_ms) = (ms(tree.times.freezing), ms(tree.times.collecting));
        self.check_cancelled()?;

        let started = Instant::now();
        self.options.hooks.call("network-lock")?;
        network.lock(&tree.collected.endpoints()?)?;
        self.report.frozen.files_ms = ms(started.elapsed());
        Ok(Stage::Final(Frozen {
            network,
            tree,
            looked: rounds.looked,
            follow: rounds.follow,
        }))
    }

    /// Sends the last pages and everything else, and waits until the destination has put the tree together.
    pub fn send_rest(&mut self, frozen: Frozen) -> Result<Stage> {
        let Frozen {
            mut network,
            tree,
            mut looked,
            follow,
        } = frozen;
        let started = Instant::now();
        let store = MemStore::new();
        tree.collected.check_files(&store, &self.options.dump)?;
        let files = tree.collected.dump_files(&store, &self.options.dump)?;
        let queues: Vec<_> = datagrams::load(&store)?.into_values().flatten().collect();
        network.received(&queues);
        self.report.frozen.files_ms += ms(started.elapsed());

        let started = Instant::now();
        let lazy = send_last(&mut looked, &tree, &self.sender, follow.is_some())?;
        let tasks = tree.collected.tasks.clone();
        let inventory = TreeImage::new_inventory(&tasks.first().map(|task| task.ids).unwrap_or_default());
        TreeImage {
            inventory,
            tasks,
            files,
            seccomp: tree.collected.take_filters(),
        }
        .save(&store)?;
        for name in store.list().context("list images")? {
            let bytes = store.take(&name).unwrap_or_default();
            self.session.send_blob_blocking(&name, bytes).context("send an image")?;
        }
        let stats = self.sender.finish_round().context("send the last pages")?;
        self.report.last = Round {
            pages: stats.pages,
            raw_bytes: stats.pages * PAGE_SIZE as u64,
            wire_bytes: stats.wire_bytes,
            ms: ms(started.elapsed()),
        };
        let lazy_pages = |(pid, set): &(u32, RunSet)| LazyPages {
            pid: *pid,
            bounds: set.ranges().iter().flat_map(|&(start, end)| [start, end]).collect(),
        };
        self.send(Body::Final(Final {
            lazy: lazy.iter().map(lazy_pages).collect(),
        }))?;
        self.report.frozen.send_ms = ms(started.elapsed());

        let started = Instant::now();
        match self.receive("await the tree's being put together")? {
            Body::Prepared(_) => {}
            other => return Err(unexpected(&other)),
        }
        self.report.frozen.prepare_ms = ms(started.elapsed());
        Ok(Stage::Prepared(Put {
            network,
            tree,
            lazy,
            follow,
            looked,
        }))
    }

    /// Makes the decision: writes it down, so that it outlives us.
    pub fn decide(&mut self, put: Put) -> Result<Stage> {
        let started = Instant::now();
        let moved = MovedAddress::parse(&self.options.move_address, &self.options.move_device)?;
        let removed = moved.as_ref().map(Removed::remove).transpose()?;
        self.options.hooks.call("pre-resume")?;
        let session = self.request.session_id.to_string();
        let living = put.tree.tree.living();
        let stopped = |task: &&Task| !matches!(task.state, TaskState::Alive);
        let decision = Decision {
            session: session.clone(),
            destination: self.options.destination.to_string(),
            tasks: living.map(|task| (task.pid, task.stat.starttime)).collect(),
            were_stopped: put.tree.tree.living().filter(stopped).map(|task| task.pid).collect(),
        };
        self.options.journal.write(self.options.pid, &decision)?;
        // From here on the tree must not run here by itself, whatever becomes of us: our death ends ptrace stops, but not
        // this one. It does not take effect while we hold the tasks. The note comes first, for a stopped tree without one
        // would stay so.
        let stopped = match StoppedTree::stop(&put.tree.tree) {
            Ok(stopped) => stopped,
            Err(error) => {
                let _ = self.options.journal.clear(self.options.pid);
                return Err(error);
            }
        };
        Ok(Stage::Commit(Committed {
            removed,
            stopped,
            put,
            session,
            started,
        }))
    }

    /// Tells the decision, and learns what became of it.
    pub fn commit(&mut self, committed: Committed) -> Result<Stage> {
        let Committed {
            removed,
            stopped,
            mut put,
            session,
            started,
        } = committed;
        let before = started.elapsed();
        let mut took = before;
        let told = self
            .send(Body::Commit(true))
            .and_then(|()| self.pass_packets(&mut put.network, false))
            .and_then(|()| self.receive("await that the tree runs"));
        let running = match told {
            Ok(Body::Running(running)) => {
                // Its own time there, and half of what the messages took: not how long we waited for a processor here.
                let there = Duration::from_micros(running.microseconds);
                let path = self.session.path_stats().map_or(Duration::ZERO, |path| path.rtt / 2);
                took = before + there + path;
                Some(running.pid)
            }
            // Nobody knows; never guess.
            _ => self.ask(&session),
        };
        let Some(pid) = running else {
            stopped.undo();
            drop((removed, put));
            self.options.journal.clear(self.options.pid)?;
            return Err(Error::new("migrate")
                .task(self.options.pid)
                .because("the destination gave the tree up before it ran; it goes on here"));
        };
        put.network.moved();
        self.pass_packets(&mut put.network, false).ok();
        self.report.pid_there = pid;
        self.report.frozen.commit_ms = ms(took);
        self.report.frozen.total_ms = ms(started - put.tree.since + took);
        if let Some(removed) = removed {
            removed.keep();
        }
        Ok(if put.lazy.is_empty() {
            Stage::Done(put)
        } else {
            Stage::PostCopy(put)
        })
    }

    /// Hands over what has come in for the tree. With `last`, nothing more is to come.
    fn pass_packets(&self, network: &mut Network, last: bool) -> Result<()> {
        let packets = network.take_packets();
        if packets.is_empty() && !last {
            return Ok(());
        }
        self.send(Body::Packets(Packets { packets, last }))
    }

    /// Asks until the destination says what became of the tree: its pid there, or `None` when it never ran.
    fn ask(&self, session: &str) -> Option<u32> {
        loop {
            let answer = ask_state(self.runtime, self.endpoint, self.options.destination, session);
            match fate(answer.as_ref()) {
                Fate::Runs { .. } => return Some(0),
                Fate::NeverRan => return None,
                Fate::Unknown => {}
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    /// Serves the missing pages until the destination has them all, over as many connections as it takes.
    pub fn follow(&mut self, mut put: Put) -> Result<Stage> {
        let started = Instant::now();
        let source: Arc<dyn PageSource> = Arc::new(FrozenPages::open(&put.tree, &put.lazy)?);
        let session_id = self.request.session_id;
        let mut serving = match put.follow.take() {
            Some(service) => service,
            None => PageService::open(self.endpoint, self.options.destination, session_id)?,
        };
        serving.serve(self.runtime, self.endpoint, source);
        let finished = std::thread::scope(|scope| {
            // The last packets for the old place come in just now.
            scope.spawn(|| {
                let until = Instant::now() + STRAGGLERS;
                while Instant::now() < until && self.pass_packets(&mut put.network, false).is_ok() {
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            self.await_finished()
        });
        drop(serving);
        let finished = finished.unwrap_or_default();
        self.report.followed = Some(Followed {
            faults: finished.faults,
            pages: finished.pages,
            fault_p50_us: finished.fault_p50,
            fault_p99_us: finished.fault_p99,
            ms: ms(started.elapsed()),
        });
        Ok(Stage::Done(put))
    }

    /// `None` when only that it is over is known.
    fn await_finished(&self) -> Option<wire::Finished> {
        loop {
            match self.receive("await the end of post-copy") {
                Ok(Body::Finished(finished)) => return Some(finished),
                Ok(_) => continue,
                Err(error) => {
                    // The session may be lost for good while pages still flow; the fault connection tells.
                    tracing::warn!(error = error.chain(), "the session is lost during post-copy");
                    match self.ask_finished() {
                        true => return None,
                        false => std::thread::sleep(ASK_AGAIN),
                    }
                }
            }
        }
    }

    fn ask_finished(&self) -> bool {
        let session = self.request.session_id.to_string();
        ask_state(self.runtime, self.endpoint, self.options.destination, &session).is_some_and(|answer| answer.complete)
    }

    /// The tree lives there: what is left of it here goes, without a word to anybody.
    pub fn finish(&mut self, mut put: Put) -> Result<Stage> {
        let FrozenTree { tree, collected, .. } = put.tree;
        collected.abandon_files()?;
        tree.kill()?;
        collected.abandon_segments();
        drop(put.looked);
        // Our duplicates were the last: connections vanish here, still behind the lock.
        drop(collected);
        self.pass_packets(&mut put.network, true).ok();
        drop(put.network);
        self.options.journal.clear(self.options.pid)?;
        self.observer.phase(Phase::Done);
        self.session.close_blocking().ok();
        Ok(Stage::End(Outcome::Moved(Box::new(std::mem::take(&mut self.report)))))
    }
}
