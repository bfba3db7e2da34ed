//! Why an image or a context could not be had.

use std::io;

use crate::Failure;

/// Errors outside the data path; requests end in a [`Failure`] instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The number of requests in flight is zero or more than io_uring can hold.
    #[error("an I/O context of depth {depth} was asked for; it must be between 1 and {maximum}")]
    Depth {
        /// What was asked for.
        depth: u32,
        /// The largest depth.
        maximum: u32,
    },
    /// A system call of the machinery around images failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// The failure that an error number of the operating system stands for.
pub(crate) fn failure_of(errno: i32) -> Failure {
    match errno {
        libc::ENOSPC | libc::EDQUOT => Failure::NoSpace,
        other => Failure::Io(other),
    }
}
