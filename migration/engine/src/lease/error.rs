//! Why a lease, or the mark of an image, does not do what was asked.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{Mark, Record};

/// Why the lease does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system failed.
    #[error("lease {path}: cannot {action}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The file is something else.
    #[error("lease {path}: the file exists and is no lease")]
    NotALease {
        /// The file.
        path: PathBuf,
    },
    /// Neither copy is whole.
    #[error(
        "lease {path}: both copies of the record are damaged; nobody can tell who owns the guest. Remove the file only when no process runs it"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Another process is at the record and does not finish.
    #[error("lease {path}: another process has held its lock for {waited:?}")]
    Busy {
        /// The file.
        path: PathBuf,
        /// How long it was tried.
        waited: Duration,
    },
    /// The owner lives.
    #[error("lease {path}: held: {record}")]
    Held {
        /// The file.
        path: PathBuf,
        /// Who holds it.
        record: Box<Record>,
    },
    /// The guest lies in a file.
    #[error("lease {path}: the guest lies suspended in a file: {record}")]
    Suspended {
        /// The lease.
        path: PathBuf,
        /// What it says.
        record: Box<Record>,
    },
    /// The images beside it are not all here, or went elsewhere.
    #[error("lease {path}: the images beside it have no guest: {record}")]
    WithoutGuest {
        /// The lease.
        path: PathBuf,
        /// What it says.
        record: Box<Record>,
    },
    /// An image went elsewhere, or is not all here, whatever machine it is put into.
    #[error("image {image}: it has no guest: its mark {path} says {mark}")]
    Marked {
        /// Which.
        image: PathBuf,
        /// The mark.
        path: PathBuf,
        /// What it says.
        mark: Box<Mark>,
    },
    /// A mark is none, or a part of one.
    #[error(
        "mark {path}: the file is damaged or no mark; nobody can tell what became of the image beside it. Remove it only when its guest is here"
    )]
    DamagedMark {
        /// The mark.
        path: PathBuf,
    },
    /// The operating system failed at a mark.
    #[error("mark {path}: cannot {action}")]
    Mark {
        /// The mark.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The record does not say what it must for this step.
    #[error("lease {path}: cannot {action}: the record says {record}")]
    Moved {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: String,
        /// What it says.
        record: Box<Record>,
    },
    /// A step that was to be taken under the lock failed.
    #[error("{reason}")]
    Condition {
        /// What failed.
        reason: String,
    },
}
