//! What is seen of a tree while it runs: its shape, its memory, what it needs of the other host.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use whimbrel_images::store::MemStore;

use super::Options;
use crate::dump::collect::Collected;
use crate::dump::runs::RunSet;
use crate::dump::track::{self, Mechanisms, Tracker};
use crate::error::{Context, Error, Result};
use crate::kernel::sys;
use crate::migrate::wire::{Begin, NeededFile, TaskShape};
use crate::procfs::{self, maps::Mapping};
use crate::remote::inject::GadgetCache;
use crate::resource::mem::{mapping, sysv};
use crate::resource::task::tables::{self, Tables};

/// How often a running tree is looked at before what seems impossible to carry is taken to be so.
const LOOKS: u32 = 5;

/// What is seen of a tree while it runs.
pub struct Looked {
    /// Its tasks that are not zombies.
    pub tasks: Vec<LookedTask>,
    /// What the destination is told of it.
    pub begin: Begin,
    /// Where it listens.
    pub listeners: Vec<SocketAddr>,
}

/// A task of it.
pub struct LookedTask {
    /// Its pid, as we see it.
    pub pid: i32,
    /// Its pid, as it sees itself.
    pub inner: u32,
    /// What watches its memory.
    pub tracker: Option<Box<dyn Tracker>>,
    /// Pages that the destination holds as they were at the last look.
    pub sent: RunSet,
    /// Pages whose last known contents the destination does not have.
    pub owed: RunSet,
}

impl Looked {
    /// Looks at a tree that runs on: what is being made or taken down just then can seem impossible to carry. Only what
    /// stays so is an error.
    pub fn look(options: &Options) -> Result<Looked> {
        let mut looks = 0;
        let mut looked = loop {
            looks += 1;
            match Looked::once(options) {
                Ok(looked) => break looked,
                Err(error) if looks == LOOKS => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if !options.dry_run {
            looked.watch();
        }
        Ok(looked)
    }

    fn watch(&mut self) {
        let mut cache = GadgetCache::default();
        let mechanisms = Mechanisms::probe();
        for task in &mut self.tasks {
            match mechanisms.start(task.pid, &mut cache) {
                Ok(tracker) => task.tracker = Some(tracker),
                // Without a tracker all of it is sent in the freeze: slower, not wrong.
                Err(error) => tracing::warn!("no rounds for task {}: {}", task.pid, error.chain()),
            }
        }
    }

    fn once(options: &Options) -> Result<Looked> {
        let mut looked = Looked {
            tasks: Vec::new(),
            begin: Begin::default(),
            listeners: Vec::new(),
        };
        let begin = &mut looked.begin;
        begin.tree = identity(options.pid);
        begin.dry_run = options.dry_run;
        begin.tcp_established = options.dump.tcp_established;
        (begin.move_address, begin.move_device) = (options.move_address.clone(), String::new());
        begin.cpu_state = crate::arch::cpu_state_components();
        let mut queue = std::collections::VecDeque::from([(options.pid, 0u32)]);
        let mut files: HashMap<String, NeededFile> = HashMap::new();
        let mut collected = Collected::default();
        let (mut tables, mut numbers) = (Tables::default(), HashMap::new());
        while let Some((mut pid, parent)) = queue.pop_front() {
            let speaker = crate::tree::speaker(pid);
            let (stat, status) = match read_ids(pid).and_then(|(stat, status)| {
                let stat = if speaker == pid { stat } else { read_ids(speaker)?.0 };
                Ok((stat, status))
            }) {
                Ok(ids) => ids,
                Err(error) if pid == options.pid => return Err(error.hint("there is no such process: check the pid")),
                Err(_) => continue,
            };
            let inner = |ids: &[i32], outer: i32| ids.last().copied().unwrap_or(outer) as u32;
            let entry = whimbrel_images::proto::PstreeEntry {
                pid: inner(&status.ns_pid, pid),
                ppid: parent,
                pgid: inner(&status.ns_pgid, stat.pgrp),
                sid: inner(&status.ns_sid, stat.session),
                threads: Vec::new(),
                exit_signal: crate::tree::exit_signal(&stat),
            };
            let zombie = matches!(stat.state, b'Z' | b'X');
            let mut shape = TaskShape {
                zombie,
                ..TaskShape::default()
            };
            let number = entry.pid;
            collected.know(pid, number);
            shape.entry = Some(entry);
            if pid == options.pid {
                begin.name = format!("{} (pid {pid})", String::from_utf8_lossy(&stat.comm));
            }
            if !zombie {
                let leader = std::mem::replace(&mut pid, speaker);
                let own = tables.numbers(pid, number)?;
                shape.flags = tables::clone_flags(pid, number, &own, numbers.get(&parent))?;
                numbers.insert(number, own);
                let maps = procfs::maps::parse(&procfs::read(pid, "smaps")?)?;
                describe_memory(pid, &maps, &stat, &mut shape, begin, &mut files)?;
                for map in maps.iter().filter(|map| sysv::is_segment(map)) {
                    collected.segments.system_v.note(pid, map)?;
                }
                let pidfd = sys::pidfd_open(pid).with(|| Error::new("open a pidfd").task(pid))?;
                let highest = collected.look_at_running(pid, pidfd.as_fd())?;
                begin.highest_descriptor = begin.highest_descriptor.max(highest);
                looked.tasks.push(LookedTask {
                    pid,
                    inner: number,
                    tracker: None,
                    sent: RunSet::default(),
                    owed: RunSet::default(),
                });
                queue.extend(
                    crate::tree::children_of(leader)?
                        .into_iter()
                        .map(|child| (child, number)),
                );
            }
            begin.tasks.push(shape);
        }
        begin.files = files.into_values().collect();
        begin.system_v = collected.segments.system_v.describe()?;
        let terminals = collected.terminals();
        for shape in &mut begin.tasks {
            shape.terminal = (shape.entry.as_ref()).and_then(|entry| terminals.get(&entry.pid).copied());
        }
        // All at once: the other end of a socket may be in another task.
        looked.listeners = check_files(&collected, options, begin)?;
        Ok(looked)
    }
}

/// What stat and status say.
pub fn read_ids(pid: i32) -> Result<(procfs::stat::Stat, procfs::status::Status)> {
    Ok((
        procfs::stat::parse(&procfs::read(pid, "stat")?)?,
        procfs::status::parse(&procfs::read(pid, "status")?)?,
    ))
}

/// Mappings of a task, what they need of the other host, and whether all of them can be carried.
fn describe_memory(
    pid: i32,
    maps: &[Mapping],
    stat: &procfs::stat::Stat,
    shape: &mut TaskShape,
    begin: &mut Begin,
    files: &mut HashMap<String, NeededFile>,
) -> Result<()> {
    for map in maps {
        let (vma, backing) =
            mapping::describe(map, (stat.start_brk, stat.start_brk)).map_err(|error| error.task(pid))?;
        if track::is_staged(map) {
            shape.staged.push(shape.vmas.len() as u32);
        }
        begin.memory += map.rss + map.swap;
        shape.vmas.push(vma);
        let deleted = map.name.ends_with(b" (deleted)");
        if backing == mapping::Backing::File && !deleted {
            let path = String::from_utf8_lossy(&map.name).into_owned();
            if let std::collections::hash_map::Entry::Vacant(empty) = files.entry(path.clone()) {
                let handle = std::fs::File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", map.start, map.end));
                if let Ok(file) = handle {
                    let size = file.metadata().map_or(0, |meta| meta.len());
                    let build_id = crate::resource::fd::regular::build_id(&file.into());
                    empty.insert(NeededFile { path, size, build_id });
                }
            }
        }
    }
    Ok(())
}

/// Tells a process from every other, of whichever host, whenever.
fn identity(pid: i32) -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    match procfs::living_since(pid) {
        Some(start) => format!("{} {} {pid} {start}", boot.trim(), namespace.display()),
        None => String::new(),
    }
}

/// Whether all descriptors of a running tree can be carried, and what they need of the other host. Tells where it listens.
fn check_files(collected: &Collected, options: &Options, begin: &mut Begin) -> Result<Vec<SocketAddr>> {
    collected.check_files(&MemStore::new(), &options.dump)?;
    let endpoints = collected.endpoints()?;
    for connection in endpoints.tcp() {
        let text = connection.local.ip().to_canonical().to_string();
        if !begin.addresses.contains(&text) {
            begin.addresses.push(text);
        }
    }
    Ok(endpoints.listeners)
}
