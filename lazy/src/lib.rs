//! userfaultfd: the fault loop and prefetch.
