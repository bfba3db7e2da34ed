//! Metadata of logical blocks, and protection information in them (NVM 5.2, 5.3).
//!
//! # Where they live
//!
//! ```text
//! image: | data of block 0 .. n - 1, as without metadata | to 4 KiB | metadata of block 0 .. n - 1 | to 4 KiB | what is too little for a block
//! ```
//! The number of blocks follows from the image's size and the format. Data stay where they are without metadata: they are aligned for
//! direct I/O and can be given back in pages, and a tool that knows nothing of metadata sees a disk in the image. Data and metadata in
//! turn (520 bytes after 520 bytes) would be one write instead of two, but none that any device takes directly, and a deallocation
//! would free nothing. Metadata are read and written in whole pages of 4 KiB, since an image may take nothing smaller.
//!
//! Protection information is stored as its complement. So what was never written, deallocated, formatted or sanitized, and is zeroes or a
//! hole in the image, reads as all bytes FFh, which no check looks at.
//!
//! # How commands are carried out
//!
//! ```text
//! command -> commands.rs: Job -> occupied.rs: its blocks for itself -> job.rs, serve.rs: piece after piece, one request in flight
//!     Read, Compare, Verify, Copy: data, metadata -> check -> guest memory, or the other place
//!     Write, Copy, Write Zeroes:   guest memory -> check or insert -> data, then (page around them) metadata
//! ```
//! A piece is checked in memory of the controller's own: what the guest changes meanwhile is neither stored nor passed unchecked, and
//! nothing of a piece that fails reaches guest memory or the image. A command of several pieces may have done those before it. A
//! namespace without metadata has nothing to do with any of this.
//!
//! # Power
//!
//! Data and metadata are two writes, data first, and a power cut can come between them; the rest of a page of metadata is written again
//! as it was. A block whose write was not complete may then have new data and old metadata: with protection information its guard
//! tells, without it nothing does. AWUPF and NAWUPF are 0's based and cannot say less than one block, so that what Identify claims of a
//! power cut is, for a namespace with metadata, no more than that such a block is found out. What a flush or forced unit access
//! acknowledged is stable, data and metadata. Without a power cut each block is whole, however commands overlap, and whatever ends them
//! but a failure of the image.

mod buffers;
mod commands;
mod format;
mod guard;
mod job;
mod occupied;
mod protection;
mod serve;

pub(crate) use commands::{is_about_blocks, limited};
pub(crate) use format::{BlockFormat, FORMATS, Metadata};
pub(crate) use job::{Job, Jobs, Kind, NO_JOB};
pub(crate) use occupied::Occupied;
