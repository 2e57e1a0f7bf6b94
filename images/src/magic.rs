//! The table of all image files: how each is named, what magic it starts with and what it holds.

/// First word of every image but the inventory, the service files and the raw ones.
pub const COMMON_MAGIC: u32 = 0x5456_4319;

/// First word of files that serve the tool and are no part of the state of a process: statistics, caches.
pub const SERVICE_MAGIC: u32 = 0x5510_5940;

/// The row of the table that the file `name` belongs to, with the number in the name where there is one.
///
/// A number is decimal (a pid or an id) or, for a few images, hexadecimal. A name whose number does not fit in 64 bits
/// belongs to no row.
pub fn by_name(name: &str) -> Option<(&'static ImageKind, Option<u64>)> {
    IMAGES
        .iter()
        .find_map(|kind| kind.number_in(name).map(|number| (kind, number)))
}

/// The rows whose images carry `magic`. Usually one; some share a magic, none has zero.
pub fn by_magic(magic: u32) -> impl Iterator<Item = &'static ImageKind> {
    IMAGES.iter().filter(move |kind| magic != 0 && kind.magic == magic)
}

/// What an image file is called and what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageKind {
    /// File name; `%u` stands for a decimal number, `%x` for a hexadecimal one.
    pub pattern: &'static str,
    /// Name of the image in capitals, as `crit` shows it.
    pub image: &'static str,
    /// Magic of the image, little-endian in the file; 0 for raw images.
    pub magic: u32,
    /// Which magics the file starts with.
    pub header: Header,
    /// The protobuf message of the entries as it is called in the `.proto` files; empty if there is none.
    /// Pagemaps start with one `pagemap_head`; the name here is that of the first message.
    pub entry: &'static str,
    /// What follows each entry.
    pub extra: Extra,
}

/// The magics at the start of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// [`COMMON_MAGIC`], then the image's own.
    Common,
    /// [`SERVICE_MAGIC`], then the image's own.
    Service,
    /// The image's own only: the inventory.
    OwnOnly,
    /// None: the file is not made of entries.
    Raw,
}

/// Raw bytes between the entries of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// Entry follows entry.
    Nothing,
    /// As many bytes as fields of the entry say.
    Bytes,
    /// As many bytes as fields of the entry say, and zeros up to a multiple of 4 or 8.
    PaddedBytes,
    /// System V messages: framed `ipc_msg`, then its bytes and zeros up to a multiple of 8.
    Messages,
    /// A ghost file: the rest of the file, or chunks: framed `ghost_chunk_entry`, then its bytes.
    RestOrChunks,
}

impl ImageKind {
    /// The name of this image with `number` in it; a pattern without a number ignores it.
    pub fn file_name(&self, number: u64) -> String {
        match self.split() {
            (prefix, Some((Radix::Decimal, suffix))) => format!("{prefix}{number}{suffix}"),
            (prefix, Some((Radix::Hexadecimal, suffix))) => format!("{prefix}{number:x}{suffix}"),
            (name, None) => name.to_owned(),
        }
    }

    /// `Some` if `name` is a name of this image, with the number in it.
    fn number_in(&self, name: &str) -> Option<Option<u64>> {
        let (prefix, rest) = self.split();
        let Some((radix, suffix)) = rest else {
            return (name == prefix).then_some(None);
        };
        let digits = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
        // from_str_radix would take a sign.
        let valid = |c: char| match radix {
            Radix::Decimal => c.is_ascii_digit(),
            Radix::Hexadecimal => c.is_ascii_digit() || ('a'..='f').contains(&c),
        };
        // One name for each number: otherwise two files could claim to be the same image.
        let canonical = digits == "0" || !digits.starts_with('0');
        if !canonical || !digits.chars().all(valid) {
            return None;
        }
        let base = match radix {
            Radix::Decimal => 10,
            Radix::Hexadecimal => 16,
        };
        u64::from_str_radix(digits, base).ok().map(Some)
    }

    fn split(&self) -> (&'static str, Option<(Radix, &'static str)>) {
        if let Some((prefix, suffix)) = self.pattern.split_once("%u") {
            (prefix, Some((Radix::Decimal, suffix)))
        } else if let Some((prefix, suffix)) = self.pattern.split_once("%x") {
            (prefix, Some((Radix::Hexadecimal, suffix)))
        } else {
            (self.pattern, None)
        }
    }
}

enum Radix {
    Decimal,
    Hexadecimal,
}

const fn image(pattern: &'static str, image: &'static str, magic: u32, entry: &'static str) -> ImageKind {
    ImageKind {
        pattern,
        image,
        magic,
        header: Header::Common,
        entry,
        extra: Extra::Nothing,
    }
}

const fn raw(pattern: &'static str, image: &'static str) -> ImageKind {
    ImageKind {
        pattern,
        image,
        magic: 0,
        header: Header::Raw,
        entry: "",
        extra: Extra::Nothing,
    }
}

/// All images.
#[rustfmt::skip] // one row, one line
pub const IMAGES: &[ImageKind] = &[
    ImageKind { header: Header::OwnOnly, extra: Extra::Nothing, ..image("inventory.img", "INVENTORY", 0x5831_3116, "inventory_entry") },
    image("fdinfo-%u.img", "FDINFO", 0x5621_3732, "fdinfo_entry"),
    image("pagemap-%u.img", "PAGEMAP", 0x5608_4025, "pagemap_head"),
    image("pagemap-shmem-%u.img", "SHMEM_PAGEMAP", 0x5608_4025, "pagemap_head"),
    image("reg-files.img", "REG_FILES", 0x5036_3636, "reg_file_entry"),
    image("ext-files.img", "EXT_FILES", 0x5925_5641, "ext_file_entry"),
    image("ns-files.img", "NS_FILES", 0x6139_4011, "ns_file_entry"),
    image("eventfd.img", "EVENTFD_FILE", 0x4452_3722, "eventfd_file_entry"),
    image("eventpoll.img", "EVENTPOLL_FILE", 0x4502_3858, "eventpoll_file_entry"),
    image("eventpoll-tfd.img", "EVENTPOLL_TFD", 0x4443_3746, "eventpoll_tfd_entry"),
    image("signalfd.img", "SIGNALFD", 0x5732_3820, "signalfd_entry"),
    image("inotify.img", "INOTIFY_FILE", 0x4842_4431, "inotify_file_entry"),
    image("inotify-wd.img", "INOTIFY_WD", 0x5456_2009, "inotify_wd_entry"),
    image("fanotify.img", "FANOTIFY_FILE", 0x5509_6122, "fanotify_file_entry"),
    image("fanotify-mark.img", "FANOTIFY_MARK", 0x5650_6035, "fanotify_mark_entry"),
    image("core-%u.img", "CORE", 0x5505_3847, "core_entry"),
    image("ids-%u.img", "IDS", 0x5443_2030, "task_kobj_ids_entry"),
    image("mm-%u.img", "MM", 0x5749_2820, "mm_entry"),
    image("vmas-%u.img", "VMAS", 0x5412_3737, "vma_entry"),
    image("pipes.img", "PIPES", 0x5651_3555, "pipe_entry"),
    ImageKind { header: Header::Common, extra: Extra::Bytes, ..image("pipes-data.img", "PIPES_DATA", 0x5645_3709, "pipe_data_entry") },
    image("fifo.img", "FIFO", 0x5836_4939, "fifo_entry"),
    ImageKind { header: Header::Common, extra: Extra::Bytes, ..image("fifo-data.img", "FIFO_DATA", 0x5933_3054, "pipe_data_entry") },
    image("pstree.img", "PSTREE", 0x5027_3030, "pstree_entry"),
    image("sigacts-%u.img", "SIGACT", 0x5534_4201, "sa_entry"),
    image("unixsk.img", "UNIXSK", 0x5437_3943, "unix_sk_entry"),
    image("inetsk.img", "INETSK", 0x5644_3851, "inet_sk_entry"),
    image("packetsk.img", "PACKETSK", 0x6045_4618, "packet_sock_entry"),
    image("netlinksk.img", "NETLINK_SK", 0x5800_5614, "netlink_sk_entry"),
    ImageKind { header: Header::Common, extra: Extra::Bytes, ..image("sk-queues.img", "SK_QUEUES", 0x5626_4026, "sk_packet_entry") },
    image("itimers-%u.img", "ITIMERS", 0x5746_4056, "itimer_entry"),
    image("posix-timers-%u.img", "POSIX_TIMERS", 0x5260_3957, "posix_timer_entry"),
    image("creds-%u.img", "CREDS", 0x5402_3547, "creds_entry"),
    image("utsns-%u.img", "UTSNS", 0x5447_3203, "utsns_entry"),
    image("ipcns-var-%u.img", "IPC_VAR", 0x5311_5007, "ipc_var_entry"),
    ImageKind { header: Header::Common, extra: Extra::PaddedBytes, ..image("ipcns-shm-%u.img", "IPCNS_SHM", 0x4628_3044, "ipc_shm_entry") },
    ImageKind { header: Header::Common, extra: Extra::Messages, ..image("ipcns-msg-%u.img", "IPCNS_MSG", 0x5545_3737, "ipc_msg_entry") },
    ImageKind { header: Header::Common, extra: Extra::PaddedBytes, ..image("ipcns-sem-%u.img", "IPCNS_SEM", 0x5957_3019, "ipc_sem_entry") },
    image("fs-%u.img", "FS", 0x5140_3912, "fs_entry"),
    image("remap-fpath.img", "REMAP_FPATH", 0x5913_3954, "remap_file_path_entry"),
    ImageKind { header: Header::Common, extra: Extra::RestOrChunks, ..image("ghost-file-%x.img", "GHOST_FILE", 0x5258_3605, "ghost_file_entry") },
    image("memfd.img", "MEMFD_INODE", 0x4845_3499, "memfd_inode_entry"),
    ImageKind { header: Header::Common, extra: Extra::Bytes, ..image("tcp-stream-%x.img", "TCP_STREAM", 0x5146_5506, "tcp_stream_entry") },
    image("mountpoints-%u.img", "MNTS", 0x5556_3928, "mnt_entry"),
    image("netdev-%u.img", "NETDEV", 0x5737_3951, "net_device_entry"),
    image("netns-%u.img", "NETNS", 0x5593_3752, "netns_entry"),
    raw("ifaddr-%u.img", "IFADDR"),
    raw("route-%u.img", "ROUTE"),
    raw("route6-%u.img", "ROUTE6"),
    raw("rule-%u.img", "RULE"),
    raw("iptables-%u.img", "IPTABLES"),
    raw("ip6tables-%u.img", "IP6TABLES"),
    raw("nftables-%u.img", "NFTABLES"),
    raw("tmpfs-%u.tar.gz.img", "TMPFS_IMG"),
    raw("tmpfs-dev-%u.tar.gz.img", "TMPFS_DEV"),
    image("autofs-%u.img", "AUTOFS", 0x4935_3943, "autofs_entry"),
    image("binfmt-misc.img", "BINFMT_MISC", 0x6734_3323, ""),
    image("tty.img", "TTY_FILES", 0x5943_3025, "tty_file_entry"),
    image("tty-info.img", "TTY_INFO", 0x5945_3036, "tty_info_entry"),
    image("tty-data.img", "TTY_DATA", 0x5941_3026, "tty_data_entry"),
    image("filelocks.img", "FILE_LOCKS", 0x5432_3616, "file_lock_entry"),
    image("rlimit-%u.img", "RLIMIT", 0x5711_3925, "rlimit_entry"),
    raw("pages-%u.img", "PAGES"),
    image("signal-s-%u.img", "SIGNAL", 0x5925_5647, "siginfo_entry"),
    image("signal-p-%u.img", "PSIGNAL", 0x5925_5647, "siginfo_entry"),
    image("tunfile.img", "TUNFILE", 0x5714_3751, "tunfile_entry"),
    image("cgroup.img", "CGROUP", 0x5938_3330, "cgroup_entry"),
    image("timerfd.img", "TIMERFD", 0x5049_3712, "timerfd_entry"),
    image("cpuinfo.img", "CPUINFO", 0x6140_4013, "cpuinfo_entry"),
    image("seccomp.img", "SECCOMP", 0x6441_3049, "seccomp_entry"),
    image("userns-%u.img", "USERNS", 0x5547_4906, "userns_entry"),
    raw("netns-ct-%u.img", "NETNF_CT"),
    raw("netns-exp-%u.img", "NETNF_EXP"),
    image("files.img", "FILES", 0x5630_3138, "file_entry"),
    image("timens-%u.img", "TIMENS", 0x4311_4433, "timens_entry"),
    image("pidns-%u.img", "PIDNS", 0x6115_7326, "pidns_entry"),
    image("bpfmap-file.img", "BPFMAP_FILE", 0x5750_6142, "bpfmap_file_entry"),
    ImageKind { header: Header::Common, extra: Extra::Bytes, ..image("bpfmap-data.img", "BPFMAP_DATA", 0x6432_4033, "bpfmap_data_entry") },
    image("apparmor.img", "APPARMOR", 0x5942_3047, "apparmor_entry"),
    image("pidfd.img", "PIDFD", 0x5443_5556, "pidfd_entry"),
    ImageKind { header: Header::Service, extra: Extra::Nothing, ..image("stats-dump", "STATS", 0x5709_3306, "stats_entry") },
    ImageKind { header: Header::Service, extra: Extra::Nothing, ..image("stats-restore", "STATS", 0x5709_3306, "stats_entry") },
    ImageKind { header: Header::Service, extra: Extra::Nothing, ..image("irmap-cache", "IRMAP_CACHE", 0x5700_4059, "irmap_cache_entry") },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_finds_itself_by_name_and_magic() {
        for kind in IMAGES {
            let (found, number) = by_name(&kind.file_name(26)).unwrap();
            assert_eq!(found, kind);
            assert_eq!(number, kind.pattern.contains('%').then_some(26));
            assert_eq!(kind.magic != 0, by_magic(kind.magic).any(|other| other == kind));
            assert_eq!(kind.magic == 0, kind.header == Header::Raw);
        }
    }

    #[test]
    fn patterns_do_not_swallow_each_others_names() {
        assert_eq!(by_name("pagemap-shmem-29151.img").unwrap().0.image, "SHMEM_PAGEMAP");
        assert_eq!(by_name("pagemap-29151.img").unwrap().0.image, "PAGEMAP");
        assert_eq!(by_name("netns-ct-9.img").unwrap().0.image, "NETNF_CT");
        assert_eq!(by_name("tcp-stream-1ccef5.img").unwrap().1, Some(0x1c_cef5));
        assert_eq!(by_name("stats-dump").unwrap().0.header, Header::Service);
    }

    #[test]
    fn odd_names_belong_to_no_image() {
        for name in [
            "",
            ".",
            "core-.img",
            "core-+1.img",
            "core--1.img",
            "core-01.img",
            "core-1.img.img",
            "core-ff.img",
            "tcp-stream-FF.img",
            "core-18446744073709551616.img",
            "corexyz",
            "%u",
            "core-%u.img",
            "parent",
        ] {
            assert_eq!(by_name(name), None, "{name}");
        }
    }
}
