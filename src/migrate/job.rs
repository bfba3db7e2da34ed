//! What a migration thread is started for.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use engine::{PostcopyStart, SnapshotOptions};
use transport::Endpoint;

/// What is done with the guest.
#[derive(Debug)]
pub enum Job {
    /// It moves to another process, or into a file.
    Move {
        /// Where to.
        endpoint: Endpoint,
        /// The link, if it is there already.
        descriptor: Option<OwnedFd>,
        /// A process of this host is to get the memory itself.
        local: bool,
        /// When memory may follow after the guest.
        postcopy: PostcopyStart,
        /// Its images go along.
        storage: bool,
    },
    /// It goes on, and is in a file as well.
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What it is to be.
        options: SnapshotOptions,
    },
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Move { endpoint, .. } => endpoint.uri.fmt(f),
            Self::Snapshot { path, .. } => write!(f, "snapshot {}", path.display()),
        }
    }
}
