//! `image`: looks into image sets.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use whimbrel::error::{Context as _, Error, Result};
use whimbrel::tree::TreeImage;
use whimbrel_images::chain::PageStore;
use whimbrel_images::entry::ImageReader;
use whimbrel_images::magic::{self, Extra, Header};
use whimbrel_images::page::MemoryObject;
use whimbrel_images::store::{DirStore, ImageStore};

use super::{Context, Run};

/// Look into image sets.
///
/// Examples:
///   whimbrel image show checkpoint      the tasks, their files and their memory
///   whimbrel image verify checkpoint    is everything there that a restore needs?
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct Image {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Show the tasks of an image set, their files and memory.
    Show {
        /// The images directory.
        directory: PathBuf,
    },
    /// Check that all images can be read and refer to things that are there.
    Verify {
        /// The images directory.
        directory: PathBuf,
    },
}

impl Run for Image {
    fn run(self, context: &Context) -> Result<ExitCode> {
        match self.action {
            Action::Show { directory } => show(&directory, context),
            Action::Verify { directory } => verify(&directory, context),
        }
    }
}

fn open(directory: &Path) -> Result<DirStore> {
    DirStore::open(directory).with(|| Error::new("open a directory").object(directory.display().to_string()))
}

fn show(directory: &Path, context: &Context) -> Result<ExitCode> {
    let store = open(directory)?;
    let image = TreeImage::load(&store)?;
    let pages = PageStore::new(store).context("read pagemaps")?;
    for task in &image.tasks {
        let (pid, parent) = (task.entry.pid, task.entry.ppid);
        let comm = task.cores[0].tc.as_ref().map_or("?", |tc| tc.comm.as_str());
        let runs = pages.runs(MemoryObject::Task(pid)).unwrap_or(&[]);
        let stored: u64 = runs.iter().map(|run| run.run.pages).sum();
        context.event(&serde_json::json!({
            "event": "task", "pid": pid, "ppid": parent, "sid": task.entry.sid, "comm": comm,
            "threads": task.entry.threads, "zombie": task.is_zombie(), "descriptors": task.fds.len(), "pages": stored,
        }));
        if context.json {
            continue;
        }
        let state = if task.is_zombie() { " (zombie)" } else { "" };
        println!(
            "{pid} {comm}{state}: parent {parent}, session {}, {} threads",
            task.entry.sid,
            task.cores.len()
        );
        println!("    memory: {} mappings, {} KiB stored", task.mm.vmas.len(), stored * 4);
        for fd in &task.fds {
            let file = image.files.get(&fd.id);
            println!(
                "    fd {}: {}",
                fd.fd,
                file.map_or("?".into(), whimbrel::resource::fd::describe)
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(directory: &Path, context: &Context) -> Result<ExitCode> {
    let store = open(directory)?;
    let mut problems = Vec::new();
    let names = store.list().context("list the directory")?;
    let images: Vec<&String> = names.iter().filter(|name| magic::by_name(name).is_some()).collect();
    for name in &images {
        if let Err(error) = read_through(&store, name) {
            problems.push(error.chain());
        }
    }
    match TreeImage::load(&store) {
        Ok(tree) => problems.extend(missing_references(&tree)),
        Err(error) => problems.push(error.chain()),
    }
    if let Err(error) = PageStore::new(open(directory)?) {
        problems.push(error.to_string());
    }
    problems.dedup();
    for problem in &problems {
        context.event(&serde_json::json!({"event": "problem", "text": problem}));
        if !context.json {
            println!("{problem}");
        }
    }
    if problems.is_empty() {
        context.event(&serde_json::json!({"event": "verified", "images": images.len()}));
        if !context.json {
            println!("{} images, all is there", images.len());
        }
        return Ok(ExitCode::SUCCESS);
    }
    Err(Error::new("verify images")
        .object(directory.display().to_string())
        .because(format!("{} problems", problems.len())))
}

/// Reads the magics of an image, and all its entries where nothing lies between them.
fn read_through(store: &DirStore, name: &str) -> Result<()> {
    let failed = || Error::new("read an image").object(name.to_owned());
    let Some((kind, _)) = magic::by_name(name) else {
        return Ok(());
    };
    if matches!(kind.header, Header::Raw) {
        return Ok(());
    }
    let mut reader = ImageReader::open(store, name).with(failed)?;
    if matches!(kind.extra, Extra::Nothing) {
        // The empty message takes every entry: what is checked is that each is whole and well-formed.
        while reader.next::<()>().with(failed)?.is_some() {}
    }
    Ok(())
}

/// Files that tasks refer to and that are not described.
fn missing_references(tree: &TreeImage) -> Vec<String> {
    let mut problems = Vec::new();
    for task in tree.tasks.iter().filter(|task| !task.is_zombie()) {
        let pid = task.entry.pid;
        let mut need = |what: String, id: u32| {
            if !tree.files.contains_key(&id) {
                problems.push(format!("task {pid}, {what}: files.img has no file {id}"));
            }
        };
        task.fds.iter().for_each(|fd| need(format!("fd {}", fd.fd), fd.id));
        need("executable".into(), task.mm.exe_file_id);
        need("working directory".into(), task.fs.cwd_id);
        need("root directory".into(), task.fs.root_id);
    }
    problems
}
