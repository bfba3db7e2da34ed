//! Block backends: where the bytes of a namespace live.
//!
//! ```text
//! controller --Request--> Backend::submit --> IoContext --io_uring or threads--> file, block device
//!      ^                        |                  |
//!      |                        `- memory, null ---+-- (done at once)
//!      `--------- Completion --- IoContext::completions
//! ```
//! A [`Backend`] is an image, shared by all workers of a controller. An [`IoContext`] belongs to one worker and holds its
//! requests in flight, over all images. So workers share no lock: an image hands out its open file by one atomic load.
//!
//! Invariants:
//! - Every submitted request ends exactly once, in any order; only a [`FaultImage`] may lose one.
//! - Requests are hostile: ranges and totals are checked here again, buffers are resolved against guest memory, and nothing
//!   outside either is touched.
//! - What the kernel wrote to guest memory is in the dirty bitmap before the completion is reported.
//! - The kernel never holds an address that could go away: contexts keep guest memory alive, requests other memory, and dropping a
//!   context waits.
//! - Flush and forced unit access mean stable storage (fdatasync, RWF_DSYNC). Write zeroes really writes or deallocates.
//! - What is compared, verified or copied passes through bounded host memory, turn by turn, like any other transfer.
//! - An image that can be written is locked as long as it is held.
//! - Whoever copies an image that is in use learns of every change of it ([`DirtyBlocks`]).
//!
//! Images: [`FileImage`] (raw file or block device), [`Qcow2Image`] (also as an overlay over a [`Base`]), [`MemoryImage`] (travels like
//! RAM), [`NullImage`] (measurement), [`FaultImage`] and [`VolatileImage`] (tests). Another process of the same host can pass the very
//! files that an image is made of, to be opened instead of their names ([`ImageFile`]).
//!
//! Absent: metadata as a thing of their own, caching of our own, ordering between requests in flight (as with real disks there is none),
//! knowledge of NVMe. The only threads are those of `pool`, where the kernel offers no io_uring, and of images whose library
//! waits for the disk (`blocking`); the only `unsafe` is in `uring`.
#![deny(unsafe_code)]

mod backend;
mod blocking;
mod bounce;
mod context;
mod counters;
mod dirty;
mod error;
mod fault;
mod file;
mod guest;
mod image_file;
mod memory;
mod null;
mod overlay;
mod place;
mod pool;
mod qcow2;
mod transfer;
#[allow(unsafe_code)]
mod uring;
mod volatile;

#[cfg(test)]
mod tests;

pub use backend::{Backend, Buffers, Completion, Failure, Identity, NOWHERE, Operation, Request};
pub use context::IoContext;
pub use counters::KernelCounters;
pub use dirty::{DIRTY_BLOCK_BYTES, DirtyBlocks};
pub use error::Error;
pub use fault::{Fault, FaultControl, FaultImage, Target};
pub use file::{FileImage, FileOptions};
pub use image_file::ImageFile;
pub use memory::MemoryImage;
pub use null::NullImage;
pub use overlay::{Base, BaseFormat, create_overlay};
pub use place::Place;
pub use qcow2::Qcow2Image;
pub use volatile::VolatileImage;
