//! Which file of a host an image is.

use std::fmt;
use std::fs::File;

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
        let about = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        let (device, inode) = match FileType::from_raw_mode(about.stx_mode.into()) {
            FileType::BlockDevice => ((about.stx_rdev_major, about.stx_rdev_minor), 0),
            _ => ((about.stx_dev_major, about.stx_dev_minor), about.stx_ino),
        };
        Ok(Self { device, inode })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.device;
        write!(f, "device {major}:{minor}, inode {}", self.inode)
    }
}
