//! Which file of a host an image is.

use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

/// Two images of one host that are in the same place are one, by whatever names they are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Major and minor number: of the file system that a file is on, or of the block device itself.
    device: (u32, u32),
    /// Inode number; 0 for a block device, whose node may be made anew.
    inode: u64,
}

impl Place {
    /// Of an open file or block device.
    pub(crate) fn of(file: &File) -> rustix::io::Result<Self> {
        Self::with_kind(file, "").map(|(_, place)| place)
    }

    /// Of what `path` leads to from `directory`, or of `directory` itself, if there is no path; and what it is.
    pub(crate) fn with_kind(
        directory: impl AsFd,
        path: impl rustix::path::Arg,
    ) -> rustix::io::Result<(FileType, Self)> {
        // None of this ever changes: no server of a file system has to be asked, which may be slow to answer, or the peer's own.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let about = statx(directory, path, flags, StatxFlags::BASIC_STATS)?;
        let kind = FileType::from_raw_mode(about.stx_mode.into());
        let (device, inode) = match kind {
            FileType::BlockDevice => ((about.stx_rdev_major, about.stx_rdev_minor), 0),
            _ => ((about.stx_dev_major, about.stx_dev_minor), about.stx_ino),
        };
        Ok((kind, Self { device, inode }))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.device;
        write!(f, "device {major}:{minor}, inode {}", self.inode)
    }
}
