//! Why an image or a context could not be had.

use std::io;
use std::path::PathBuf;

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
    /// The image cannot be opened.
    #[error("cannot open image {} for {access}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// `reading` or `writing`.
        access: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Only files and block devices hold images.
    #[error("{} is neither a regular file nor a block device", path.display())]
    NotAnImage {
        /// What was named.
        path: PathBuf,
    },
    /// The file is not of its format, is damaged, or needs something that is not offered.
    #[error("{} is no {format} image that can be used", path.display())]
    Format {
        /// The image.
        path: PathBuf,
        /// Which format it was taken for.
        format: &'static str,
        /// What is wrong with it.
        source: io::Error,
    },
    /// An overlay and its base do not belong together.
    #[error("image {} cannot be used over {}: {reason}", path.display(), base.display())]
    Overlay {
        /// The overlay.
        path: PathBuf,
        /// What it is to lie over.
        base: PathBuf,
        /// Why not.
        reason: String,
    },
    /// An image cannot be made.
    #[error("cannot make the image {}", path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Someone else holds the image. The kernel does not say who.
    #[error("image {} is locked: another process has it (lock for {access} refused)", path.display())]
    Locked {
        /// The image.
        path: PathBuf,
        /// `reading` or `writing`.
        access: &'static str,
    },
    /// The file system cannot set or clear locks.
    #[error("cannot change the lock of image {}", path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path leads to another image than before, or its size changed.
    #[error("image {} is not what it was: {before} before, {now} now", path.display())]
    Changed {
        /// The image.
        path: PathBuf,
        /// Size and identity when it was opened first.
        before: String,
        /// Size and identity now.
        now: String,
    },
    /// What another process passed for a file of an image is not that file, or more than it.
    #[error("image {} cannot be opened by what was passed for it: {reason}", path.display())]
    Passed {
        /// The file, as it is called here.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The image cannot be released while requests use it.
    #[error("image {} has requests in flight and cannot be released", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// An image that has one size for ever.
    #[error("an image of the kind {kind:?} cannot change its size")]
    FixedSize {
        /// Its kind.
        kind: &'static str,
    },
    /// The image cannot take another size.
    #[error("image {} cannot be made {capacity_bytes} bytes large", path.display())]
    Grow {
        /// The image.
        path: PathBuf,
        /// What was wanted.
        capacity_bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// An image is smaller than it was.
    #[error("image {} has {now_bytes} bytes and had {before_bytes}: images only grow", path.display())]
    Shrunk {
        /// The image.
        path: PathBuf,
        /// Its capacity until now.
        before_bytes: u64,
        /// What was found or wanted.
        now_bytes: u64,
    },
    /// Where an image has holes is not known.
    #[error("cannot find the holes of image {}", path.display())]
    Holes {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Acknowledged writes could not be made stable.
    #[error("cannot flush image {}", path.display())]
    Flush {
        /// The image.
        path: PathBuf,
        /// Why.
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
