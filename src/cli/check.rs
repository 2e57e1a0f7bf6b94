//! `check`: what this kernel can do.

use std::process::ExitCode;

use clap::Args;

use whimbrel::error::{Error, Result};
use whimbrel::kernel::features::{Feature, KernelFeatures, Need};

use super::options::Common;
use super::unbuilt::Unbuilt;
use super::{Context, Logging, Run};

/// Check whether the kernel has what is needed.
///
/// Without options: what every dump and restore needs. Every feature is tried, not looked up by version.
///
/// Examples:
///   whimbrel check
///   whimbrel check --all
///   whimbrel check --feature uffd-wp-async
///   whimbrel check --feature list
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct Check {
    #[command(flatten)]
    common: Common,
    /// Also what some programs need, or what makes things faster.
    #[arg(long)]
    extra: bool,
    /// Also experimental features. There are none here.
    #[arg(long)]
    experimental: bool,
    /// The same as --extra --experimental.
    #[arg(long)]
    all: bool,
    /// Check only this feature, by our name or CRIU's; `list` prints the names.
    #[arg(long, value_name = "NAME")]
    feature: Vec<String>,
    #[command(flatten)]
    unbuilt: Unbuilt,
}

/// CRIU's names of features that are probed here.
const CRIU_NAMES: &[(&str, Feature)] = &[
    ("seccomp_suspend", Feature::SuspendSeccomp),
    ("seccomp_filters", Feature::SeccompFilters),
    ("uffd", Feature::UffdMissing),
    ("uffd-noncoop", Feature::UffdEvents),
    ("timens", Feature::TimeNamespace),
    ("clone3_set_tid", Feature::SetTid),
    ("nftables", Feature::NftOwner),
    ("network_lock_nftables", Feature::NftOwner),
    ("sockopt_buf_lock", Feature::BufLock),
    ("get_rseq_conf", Feature::PtraceRseq),
    ("pagemap_scan", Feature::PagemapScan),
    ("timer_cr_ids", Feature::TimerIds),
    ("membarrier_get_registrations", Feature::Membarrier),
    ("apparmor_stacking", Feature::AppArmor),
];

impl Run for Check {
    fn logging(&self) -> Logging {
        self.common.logging(None)
    }

    fn run(self, context: &Context) -> Result<ExitCode> {
        self.unbuilt.refuse()?;
        if self.feature.iter().any(|name| name == "list") {
            println!("{}", names().join(" "));
            return Ok(ExitCode::SUCCESS);
        }
        let wanted = self
            .feature
            .iter()
            .map(|name| wanted(name))
            .collect::<Result<Vec<_>>>()?;
        let features = KernelFeatures::probe();
        if context.json {
            println!("{}", features.to_json());
        }
        if !wanted.is_empty() {
            return Ok(self.report_named(&wanted, &features, context.json));
        }
        let extra = self.extra || self.all || self.experimental;
        let mut missing_extra = false;
        for report in features.reports() {
            let shown = match report.feature.need() {
                Need::Required => true,
                Need::Helps => extra,
                Need::Fact => self.all,
            };
            if shown && !context.json {
                println!("{report}");
            }
            missing_extra |= shown && report.feature.need() == Need::Helps && report.result.is_err();
        }
        let (verdict, code) = match (features.missing_required().is_empty(), missing_extra) {
            (false, _) => ("Does not look good.", ExitCode::FAILURE),
            (true, true) => ("Looks good but some kernel features are missing", ExitCode::FAILURE),
            (true, false) => ("Looks good.", ExitCode::SUCCESS),
        };
        if !context.json {
            println!("{verdict}");
        }
        if !features.missing_required().is_empty() && !rustix::process::geteuid().is_root() {
            tracing::error!("some features need privileges: run it as root");
        }
        Ok(code)
    }
}

impl Check {
    fn report_named(&self, wanted: &[Wanted], features: &KernelFeatures, quiet: bool) -> ExitCode {
        let mut good = true;
        for one in wanted {
            let found = match one.feature {
                Some(feature) => features.why_not(feature).map(|missing| missing.to_string()),
                // CRIU's soft-dirty check: here either of two trackers will do.
                None => (!features.has(Feature::SoftDirty) && !features.has(Feature::UffdWpAsync))
                    .then(|| "neither soft-dirty bits nor asynchronous write protection".to_owned()),
            };
            good &= found.is_none();
            if !quiet {
                match found {
                    None => println!("{} is supported", one.name),
                    Some(why) => println!("{} is not supported: {why}", one.name),
                }
            }
        }
        if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// A feature that was asked for by name; `None` is CRIU's `mem_dirty_track`.
struct Wanted {
    name: String,
    feature: Option<Feature>,
}

fn names() -> Vec<&'static str> {
    let ours = Feature::ALL.iter().map(|feature| feature.name());
    let theirs = CRIU_NAMES.iter().map(|(name, _)| *name);
    ours.chain(theirs).chain(["mem_dirty_track"]).collect()
}

fn wanted(name: &str) -> Result<Wanted> {
    let ours = Feature::ALL.iter().copied().find(|feature| feature.name() == name);
    let theirs = CRIU_NAMES
        .iter()
        .find(|(other, _)| *other == name)
        .map(|(_, feature)| *feature);
    let feature = ours.or(theirs);
    if feature.is_none() && name != "mem_dirty_track" {
        return Err(Error::new("check a feature")
            .object(name.to_owned())
            .because("there is no probe of that name")
            .hint("use --feature list"));
    }
    Ok(Wanted {
        name: name.to_owned(),
        feature,
    })
}
