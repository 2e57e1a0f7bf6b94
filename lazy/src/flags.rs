//! Sets of kernel flags, as types that cannot be mixed up.

/// Defines a set of kernel flags as a type of its own.
macro_rules! flags {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            $($(#[$inner])* pub const $flag: Self = Self(1 << $bit);)*
            /// No flag at all.
            pub const NONE: Self = Self(0);
            const NAMES: &'static [(u64, &'static str)] = &[$((1 << $bit, stringify!($flag)),)*];

            /// Whether every flag of `other` is set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The union of both sets.
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let mut rest = self.0;
                let mut separator = "";
                for (bit, name) in Self::NAMES.iter().filter(|(bit, _)| self.0 & bit != 0) {
                    write!(f, "{separator}{name}")?;
                    separator = "|";
                    rest &= !bit;
                }
                if rest != 0 || separator.is_empty() {
                    write!(f, "{separator}{rest:#x}")?;
                }
                Ok(())
            }
        }
    };
}

flags! {
    /// Features of UFFDIO_API (`UFFD_FEATURE_*`).
    Features {
        /// Faults tell when the reason was write protection.
        PAGEFAULT_FLAG_WP = 0;
        /// fork(2) is reported and hands over a userfaultfd for the child. Needs CAP_SYS_PTRACE.
        EVENT_FORK = 1;
        /// mremap(2) that moves a mapping is reported.
        EVENT_REMAP = 2;
        /// madvise(2) with MADV_DONTNEED, MADV_FREE or MADV_REMOVE is reported.
        EVENT_REMOVE = 3;
        /// Missing pages on hugetlbfs.
        MISSING_HUGETLBFS = 4;
        /// Missing pages of shared memory.
        MISSING_SHMEM = 5;
        /// munmap(2) is reported.
        EVENT_UNMAP = 6;
        /// SIGBUS instead of fault messages.
        SIGBUS = 7;
        /// Faults carry the thread id, as seen in the faulting thread's own pid namespace.
        THREAD_ID = 8;
        /// Minor faults on hugetlbfs.
        MINOR_HUGETLBFS = 9;
        /// Minor faults on shared memory.
        MINOR_SHMEM = 10;
        /// Fault addresses are not rounded down to the page.
        EXACT_ADDRESS = 11;
        /// Write protection on hugetlbfs and shared memory.
        WP_HUGETLBFS_SHMEM = 12;
        /// Write protection also covers pages that are not populated.
        WP_UNPOPULATED = 13;
        /// UFFDIO_POISON.
        POISON = 14;
        /// Write-protection faults are resolved by the kernel; PAGEMAP_SCAN tells which pages were written.
        WP_ASYNC = 15;
        /// UFFDIO_MOVE.
        MOVE = 16;
    }
}

flags! {
    /// What a range is registered for (`UFFDIO_REGISTER_MODE_*`).
    RegisterMode {
        /// Faults on pages that are not there.
        MISSING = 0;
        /// Faults on write-protected pages.
        WP = 1;
        /// Faults on pages that are in the page cache but not mapped.
        MINOR = 2;
    }
}

flags! {
    /// Why a page fault was reported (`UFFD_PAGEFAULT_FLAG_*`). Nothing set means a read of a missing page.
    FaultFlags {
        /// The access was a write.
        WRITE = 0;
        /// The page is write-protected.
        WP = 1;
        /// The page is in the page cache but not mapped.
        MINOR = 2;
    }
}

flags! {
    /// What PAGEMAP_SCAN knows of a page (`PAGE_IS_*`).
    Categories {
        /// Asynchronous write protection is enabled for the page.
        WPALLOWED = 0;
        /// Written since it was last write-protected (or never protected).
        WRITTEN = 1;
        /// Backed by a file, or shared.
        FILE = 2;
        /// In memory.
        PRESENT = 3;
        /// Swapped out.
        SWAPPED = 4;
        /// The shared zero page.
        PFNZERO = 5;
        /// Part of a huge page.
        HUGE = 6;
        /// Soft-dirty (only where the kernel was built with it).
        SOFT_DIRTY = 7;
        /// A guard page made with MADV_GUARD_INSTALL.
        GUARD = 8;
    }
}

flags! {
    /// What PAGEMAP_SCAN does besides looking (`PM_SCAN_*`).
    ScanFlags {
        /// Write-protect the pages that match, in the same step.
        WP_MATCHING = 0;
        /// Fail with EPERM when a range without asynchronous write protection is met.
        CHECK_WPASYNC = 1;
    }
}

flags! {
    /// Modes of UFFDIO_COPY.
    CopyMode {
        /// Do not wake the threads that wait for the pages.
        DONTWAKE = 0;
        /// Map the pages write-protected.
        WP = 1;
    }
}

flags! {
    /// Modes of UFFDIO_MOVE.
    MoveMode {
        /// Do not wake the threads that wait for the pages.
        DONTWAKE = 0;
        /// Holes in the source are skipped.
        ALLOW_SRC_HOLES = 1;
    }
}
