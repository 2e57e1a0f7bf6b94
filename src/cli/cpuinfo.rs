//! `cpuinfo`, and the `--cpu-cap` option of dump and restore.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use whimbrel::arch::cpu;
use whimbrel::error::{Context as _, Error, Result};
use whimbrel_images::entry;
use whimbrel_images::proto::CpuinfoEntry;
use whimbrel_images::store::ImageStore;

use super::options::Common;
use super::unbuilt::Unbuilt;
use super::{Context, Logging, Run};

const IMAGE: &str = "cpuinfo.img";

/// Save the features of this CPU, or compare it with saved ones.
///
/// Examples:
///   whimbrel cpuinfo dump -D checkpoint
///   whimbrel cpuinfo check -D checkpoint --cpu-cap=ins
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct CpuInfo {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Write the features of this CPU to cpuinfo.img.
    Dump(Options),
    /// Compare this CPU with cpuinfo.img.
    Check(Options),
}

#[derive(Args)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// What must match: none, fpu, ins, cpu, all (a list; ^ takes one back) [default: fpu,ins].
    #[arg(long, value_name = "CAP", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    cpu_cap: Vec<String>,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

impl Run for CpuInfo {
    fn logging(&self) -> Logging {
        let (Action::Dump(options) | Action::Check(options)) = &self.action;
        options.common.logging(None)
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        let (Action::Dump(options) | Action::Check(options)) = &self.action;
        options.unbuilt.refuse()?;
        let store = options.common.workspace().open_images()?;
        let mut capabilities = Capabilities::parse(&options.cpu_cap)?;
        if options.cpu_cap.is_empty() {
            (capabilities.fpu, capabilities.instructions) = (true, true);
        }
        match &self.action {
            Action::Dump(_) => write(&store)?,
            Action::Check(_) => check(&store, capabilities)?,
        }
        context.event(&serde_json::json!({"event": "cpuinfo", "good": true}));
        Ok(ExitCode::SUCCESS)
    }
}

/// What `--cpu-cap` asks for; nothing where it is not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The same CPU.
    pub exact: bool,
    /// All instructions.
    pub instructions: bool,
    /// All registers.
    pub fpu: bool,
}

impl Capabilities {
    /// Parses comma-separated lists, the later ones after the earlier.
    ///
    /// # Errors
    /// For a word that is none.
    pub fn parse(lists: &[String]) -> Result<Capabilities> {
        let mut all = Capabilities::default();
        for word in lists
            .iter()
            .flat_map(|list| list.split(','))
            .map(str::trim)
            .filter(|word| !word.is_empty())
        {
            let (value, name) = word.strip_prefix('^').map_or((true, word), |name| (false, name));
            match name {
                "cpu" => all.exact = value,
                "ins" => all.instructions = value,
                "fpu" => all.fpu = value,
                "all" => (all.exact, all.instructions, all.fpu) = (value, value, value),
                "none" => all = Capabilities::default(),
                _ => {
                    return Err(Error::new("parse --cpu-cap")
                        .object(word.to_owned())
                        .because("it must be one of none, fpu, ins, cpu, all, with ^ in front to take it back"));
                }
            }
        }
        Ok(all)
    }

    /// Whether anything is asked for.
    pub fn any(self) -> bool {
        self != Capabilities::default()
    }
}

/// Writes this CPU's features.
///
/// # Errors
/// When the image cannot be written.
pub fn write(store: &dyn ImageStore) -> Result<()> {
    let entry = CpuinfoEntry {
        x86_entry: vec![cpu::identify()],
        ..CpuinfoEntry::default()
    };
    entry::write_one(store, IMAGE, &entry).context("write the CPU's features")
}

/// Compares this CPU with that of the image.
///
/// # Errors
/// When there is no image, or this CPU lacks something.
pub fn check(store: &dyn ImageStore, wanted: Capabilities) -> Result<()> {
    let failed = || Error::new("compare CPUs");
    let image: CpuinfoEntry =
        entry::read_one(store, IMAGE).with(|| failed().hint("give --cpu-cap to the dump too, or leave it out here"))?;
    let ours = cpu::identify();
    let theirs = image
        .x86_entry
        .first()
        .ok_or_else(|| failed().because("the image is of another architecture"))?;
    let why = cpu::differences(theirs, &ours, wanted.exact, wanted.instructions, wanted.fpu);
    if why.is_empty() {
        return Ok(());
    }
    Err(failed()
        .because(why.join("; "))
        .hint("use --cpu-cap=none to try all the same"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_taken_and_taken_back() {
        let parse = |text: &str| Capabilities::parse(&[text.to_owned()]);
        assert!(!parse("none").unwrap().any());
        let all = parse("all,^cpu").unwrap();
        assert!(all.fpu && all.instructions && !all.exact);
        assert!(parse("sse").is_err());
    }
}
