//! The contract between a controller and an image.

use std::fmt::{self, Debug};
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bus::{GuestMemory, GuestRange};
use vm_memory::GuestAddress;
use vmstate::Migratability;

use crate::{DirtyBlocks, ImageFile, IoContext, Place};

/// What an image is, as far as another process could check it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `file`, `memory` or `null`.
    pub kind: &'static str,
    /// Capacity in bytes.
    pub capacity_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Image to guest memory.
    Read,
    /// Guest memory to image; with `fua` the data is on stable storage before completion.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Everything acknowledged before this was submitted is on stable storage before completion.
    Flush,
    /// `length_bytes` of zeroes; with `deallocate` a hole is made where possible. With `fua` stable before completion.
    WriteZeroes {
        /// Whether a hole may be made.
        deallocate: bool,
        /// Force unit access.
        fua: bool,
    },
    /// The range is filled with these four bytes again and again, the least significant one first.
    Fill {
        /// The bytes.
        pattern: u32,
    },
    /// The contents of the range no longer matter. Afterwards it reads as zeroes or as before.
    Discard,
    /// Whether the image holds what guest memory holds; [`Failure::Miscompare`] if not. Changes neither.
    Compare,
    /// Reads the range and drops what it reads: whether it can be read at all.
    Verify,
    /// `length_bytes` from another place in the same image, through bounded host memory. Where the two ranges overlap, what the
    /// destination holds afterwards is any of the bytes of both. With `fua` stable before completion.
    Copy {
        /// Where the bytes come from.
        source_offset_bytes: u64,
        /// Force unit access.
        fua: bool,
    },
}

impl Operation {
    /// Whether the image is other afterwards.
    #[must_use]
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::Flush | Self::Compare | Self::Verify)
    }

    /// Whether it goes with guest memory of `length_bytes`.
    fn transfers(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. } | Self::Compare)
    }
}

/// The address of a range that stands for no memory: a read skips as many bytes there. No memory can be at it, since its second byte
/// would be beyond the address space.
pub const NOWHERE: GuestAddress = GuestAddress(u64::MAX);

/// The memory side of a request.
#[derive(Clone, Copy, Debug)]
pub enum Buffers<'a> {
    /// No data (flush, zeroes, discard, verify, copy).
    None,
    /// Guest memory, in order. The backend resolves it against the guest memory of the [`IoContext`] and fails the
    /// request with [`Failure::GuestMemory`] if any byte lies outside. What a read has for a range at [`NOWHERE`] is dropped.
    Guest(&'a [GuestRange]),
    /// The same in memory that is none of the guest's: what its owner looks at before the guest sees it, or after. It is kept alive
    /// until the request has ended.
    Private(&'a Arc<GuestMemory>, &'a [GuestRange]),
}

/// One request. The caller checked that the range lies inside the image and that the buffers' total equals
/// `length_bytes`; the backend checks both again and fails the request rather than trust them.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Comes back in the [`Completion`].
    pub token: u64,
    /// What to do.
    pub operation: Operation,
    /// Where in the image.
    pub offset_bytes: u64,
    /// How much.
    pub length_bytes: u64,
    /// From or to where.
    pub buffers: Buffers<'a>,
}

impl Request<'_> {
    /// The checks that every backend makes before it touches anything: access, range and totals.
    pub(crate) fn check(&self, identity: &Identity) -> Result<(), Failure> {
        if self.operation.writes() && identity.read_only {
            return Err(Failure::ReadOnly);
        }
        let is_inside = |offset: u64| {
            offset.checked_add(self.length_bytes).is_some_and(|end| end <= identity.capacity_bytes)
        };
        let source_is_inside = match self.operation {
            Operation::Copy { source_offset_bytes, .. } => is_inside(source_offset_bytes),
            _ => true,
        };
        let expected_bytes = if self.operation.transfers() { self.length_bytes } else { 0 };
        if !is_inside(self.offset_bytes) || !source_is_inside || self.buffers.length_bytes() != expected_bytes
        {
            return Err(Failure::OutOfRange);
        }
        // Nothing can be written from, or compared with, no memory.
        if self.operation != Operation::Read && self.buffers.have_gaps() {
            return Err(Failure::GuestMemory);
        }
        Ok(())
    }

    /// The bits that any of its positions in the image has set.
    pub(crate) fn offset_bits(&self) -> u64 {
        match self.operation {
            Operation::Copy { source_offset_bytes, .. } => self.offset_bytes | source_offset_bytes,
            _ => self.offset_bytes,
        }
    }
}

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Range outside the image, or totals that do not match.
    OutOfRange,
    /// A buffer is not inside guest memory.
    GuestMemory,
    /// A write to a read-only image.
    ReadOnly,
    /// The file system or device is full.
    NoSpace,
    /// Any other error of the operating system, by its number.
    Io(i32),
    /// The image has been released (its lock was handed over).
    Released,
    /// What was compared is different.
    Miscompare,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange => f.write_str("the range is outside of the image"),
            Self::GuestMemory => f.write_str("a buffer is outside of guest memory"),
            Self::ReadOnly => f.write_str("the image is read-only"),
            Self::NoSpace => f.write_str("no space is left for it"),
            Self::Io(errno) => write!(f, "{}", io::Error::from_raw_os_error(*errno)),
            Self::Released => f.write_str("the image has been released"),
            Self::Miscompare => f.write_str("the image and guest memory hold different bytes"),
        }
    }
}

/// The end of a request. Every submitted request completes exactly once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The token of the request.
    pub token: u64,
    /// Success means all of the bytes.
    pub result: Result<(), Failure>,
}

/// An image, shared by all I/O threads of a controller. No call blocks on the disk except those that say so.
pub trait Backend: Send + Sync + Debug {
    /// Kind, size, access.
    fn identity(&self) -> Identity;

    /// Which file it is, if it is one of this host's.
    fn place(&self) -> Option<Place> {
        None
    }

    /// The files of this host that it is made of: its own first, then what it lies over.
    fn files(&self) -> Vec<&ImageFile> {
        Vec::new()
    }

    /// For each of [`files`](Self::files), in that order, a [descriptor](ImageFile) by which another process of this host opens it as well.
    /// None, if the image is not held.
    ///
    /// # Errors
    /// No descriptor is left, or `/proc` is not there.
    fn nodes(&self) -> Result<Vec<OwnedFd>, crate::Error> {
        Ok(Vec::new())
    }

    /// What becomes of it when its machine moves. Contents that another process can reach, or that are guest RAM, move along.
    fn migratability(&self) -> Migratability;

    /// Queues `request` in `context`. Completions are taken from the context, in any order. The caller keeps the number in
    /// flight below the context's depth. Queued work reaches the kernel at the latest in [`IoContext::submit`].
    fn submit(&self, context: &mut IoContext, request: &Request<'_>);

    /// Blocking: makes all acknowledged writes stable. Requests may be under way. Harmless for an image that is released.
    ///
    /// # Errors
    /// The flush failed.
    fn sync(&self) -> Result<(), crate::Error>;

    /// Blocking: makes all acknowledged writes stable, then gives up write access and the lock, so that another process can
    /// take them. Later requests fail with [`Failure::Released`] until [`Backend::acquire`]. The caller has no request in flight.
    ///
    /// # Errors
    /// The flush failed; the image is still held.
    fn release(&self) -> Result<(), crate::Error>;

    /// Blocking: takes the lock and write access (again), and checks that size and identity are what they were.
    ///
    /// # Errors
    /// Someone else holds the lock, or the image changed; the image is still released.
    fn acquire(&self) -> Result<(), crate::Error>;

    /// The blocks that requests change, for whoever copies the image meanwhile; `None` of images that are guest RAM, or that nobody
    /// could copy.
    fn dirty_blocks(&self) -> Option<&DirtyBlocks> {
        None
    }

    /// Where the image, which is held, is no hole: the first such range at or after `offset_bytes`. The rest reads as zeroes, unless it
    /// is changed meanwhile. What is not known counts as no hole.
    ///
    /// # Errors
    /// The operating system does not tell.
    fn next_data(&self, offset_bytes: u64) -> Result<Option<Range<u64>>, crate::Error> {
        let capacity_bytes = self.identity().capacity_bytes;
        Ok((offset_bytes < capacity_bytes).then_some(offset_bytes..capacity_bytes))
    }

    /// Blocking: makes the image, which is held, `capacity_bytes` large, or with `None` finds out how large it was made by others, and
    /// takes that for its capacity, which it returns. It never shrinks. Requests may be under way.
    ///
    /// # Errors
    /// Images of this kind have one size for ever; it would shrink; the operating system refused.
    fn grow(&self, capacity_bytes: Option<u64>) -> Result<u64, crate::Error> {
        let _ = capacity_bytes;
        Err(crate::Error::FixedSize { kind: self.identity().kind })
    }
}
