//! Options of CRIU that are understood and refused: nothing is silently ignored.
//!
//! An option that gets built moves from here into the struct of its verb.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use whimbrel::error::{Error, Result};

/// Name, short name, whether it takes a value, and why it is refused.
type Row = (&'static str, Option<char>, bool, &'static str);

const NOT_BUILT: &str = "is not built yet";
const ONE_LOG: &str = "is refused: one process drives all tasks here and writes one log; lines name the task";
const CGROUPS: &str = "is not built yet: tasks stay in the cgroup of this command";
const MOUNTS: &str = "is not built yet: mount namespaces are not carried";
const NAMESPACES: &str = "is not built yet: namespaces are not carried";
const TCP: &str = "is not for this verb: dump, pre-dump and restore have it";

const ROWS: &[Row] = &[
    ("log-pid", None, false, ONE_LOG),
    (
        "lazy-pages",
        None,
        false,
        "is not for this verb: dump, restore and lazy-pages have it",
    ),
    ("stream", None, false, NOT_BUILT),
    ("libdir", Some('L'), true, "is not built yet: there are no plugins"),
    ("freeze-cgroup", None, true, NOT_BUILT),
    ("weak-sysctls", None, false, NAMESPACES),
    ("mntns-compat-mode", None, false, MOUNTS),
    ("external", None, true, NOT_BUILT),
    ("inherit-fd", None, true, NOT_BUILT),
    ("skip-in-flight", None, false, TCP),
    ("tcp-close", None, false, TCP),
    ("root", Some('r'), true, MOUNTS),
    ("evasive-devices", None, false, NOT_BUILT),
    (
        "link-remap",
        None,
        false,
        "is not built yet: deleted files are carried, see --ghost-limit",
    ),
    ("force-irmap", None, false, NOT_BUILT),
    ("irmap-scan-path", None, true, NOT_BUILT),
    ("manage-cgroups", None, true, CGROUPS),
    ("cgroup-root", None, true, CGROUPS),
    ("cgroup-props", None, true, CGROUPS),
    ("cgroup-props-file", None, true, CGROUPS),
    ("cgroup-dump-controller", None, true, CGROUPS),
    ("cgroup-yard", None, true, CGROUPS),
    ("lsm-profile", None, true, NOT_BUILT),
    ("lsm-mount-context", None, true, MOUNTS),
    ("skip-mnt", None, true, MOUNTS),
    ("enable-fs", None, true, MOUNTS),
    ("veth-pair", None, true, NAMESPACES),
    ("empty-ns", None, true, NAMESPACES),
    ("join-ns", Some('J'), true, NAMESPACES),
    ("unprivileged", None, false, NOT_BUILT),
    ("allow-uprobes", None, false, NOT_BUILT),
    (
        "ps-socket",
        None,
        true,
        "is refused: pages travel over QUIC, which has its own encryption",
    ),
];

/// The refused options that were given, for a verb of CRIU. Must be the last group of the verb: what the verb has already
/// is left alone.
#[derive(Clone, Debug, Default)]
pub struct Unbuilt(Vec<(&'static str, &'static str)>);

impl Unbuilt {
    /// Refuses the options that were given.
    ///
    /// # Errors
    /// With each option and why.
    pub fn refuse(&self) -> Result<()> {
        self.and(&[])
    }

    /// As [`Unbuilt::refuse`], with further options that this verb cannot do: whether given, name, and why.
    ///
    /// # Errors
    /// With each option and why.
    pub fn and(&self, more: &[(bool, &str, &str)]) -> Result<()> {
        let given = more
            .iter()
            .filter(|(given, ..)| *given)
            .map(|(_, name, why)| (*name, *why));
        let reasons: Vec<String> = self
            .0
            .iter()
            .copied()
            .chain(given)
            .map(|(name, why)| format!("--{name} {why}"))
            .collect();
        if reasons.is_empty() {
            return Ok(());
        }
        Err(Error::new("use the options given").because(reasons.join("; ")))
    }
}

impl FromArgMatches for Unbuilt {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |row: &&Row| {
            let id = id_of(row.0);
            let known = matches.ids().any(|other| other.as_str() == id);
            known && matches.value_source(&id) == Some(clap::parser::ValueSource::CommandLine)
        };
        Ok(Unbuilt(ROWS.iter().filter(given).map(|row| (row.0, row.3)).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Unbuilt {
    fn augment_args(mut command: Command) -> Command {
        for &(name, short, value, why) in ROWS {
            let taken = |argument: &Arg| {
                argument.get_long() == Some(name)
                    || argument
                        .get_all_aliases()
                        .is_some_and(|aliases| aliases.contains(&name))
            };
            if command.get_arguments().any(taken) {
                continue;
            }
            let short = short.filter(|&short| !command.get_arguments().any(|other| other.get_short() == Some(short)));
            let argument = Arg::new(id_of(name)).long(name).help(why).hide(true);
            let argument = short.map_or(argument.clone(), |short| argument.short(short));
            command = command.arg(if value {
                // CRIU lets some of them stand without a value.
                argument
                    .action(ArgAction::Append)
                    .num_args(0..=1)
                    .value_parser(clap::value_parser!(std::ffi::OsString))
            } else {
                argument.action(ArgAction::Count)
            });
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn id_of(name: &str) -> String {
    format!("unbuilt-{name}")
}
