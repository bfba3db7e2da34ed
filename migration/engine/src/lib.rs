//! Moving a running guest from one process to another, or into a file and back.
//!
//! The engine knows phases, deadlines, rounds of dirty pages and who owns the guest. It knows no KVM and no device: the
//! process answers for its machine through [`SourceMachine`] on one side, [`DestinationFactory`] and [`DestinationMachine`]
//! on the other. [`migrate`] and [`Destination::receive`] run on the caller's migration thread, and other threads watch
//! [`Statistics`] and turn [`Parameters`]. The engine makes few threads of its own: one that keeps the link alive while the
//! source writes back its images, one for each peer that has not said yet what it wants, one for each data channel but the
//! source's first, and one that brings memory out of a file when it is touched.
//!
//! ```text
//! source.rs       hello --------------------------> destination.rs   checks, builds, makes images that come along
//!                       <-------------------------- agree
//!                 opens data channels ------------> lets them in
//!                 rounds (channels) ==============> (channels)       places
//!                 rounds (storage) ---------------> (storage)        places, if images go along
//!                 stop, last pages and blocks ====>
//!                 devices (ram/send, sink) -------> (ram/receive)    loads
//!                 PREPARE ------------------------>
//!                       <-------------------------- PREPARED
//!                 lease := offered, COMMIT -------> lease := taken, starts
//!                       <-------------------------- RUNNING | NEVER, or nothing: ask again, settle by the lease
//! postcopy        (memory that was left behind) --->                 places what is touched at once, and the rest
//!                       <-------------------------- RECEIVED
//! ```
//!
//! - [`lease`]: the record that alone decides who runs the guest.
//! - `ownership`: what either side does about it, as state machines without I/O; `handover` and `destination` do it.
//! - `channels`: guest memory on connections of its own, one or many, compressed or not. To a process that knows none it goes
//!   through the stream (`ram`), as it does into a file.
//! - [`converge()`]: when to stop, and what to do about a guest that is faster than the link, a pure function; `rounds` does it.
//! - [`storage`]: images that go with their guest, where the two ends have none in common.
//! - `local`: to a process of the same host the memory itself goes, instead of its contents in rounds, and the files of the images.
//! - [`protocol`]: the messages; `link` gives each a deadline.
//! - `postcopy`: memory that follows after its guest.
//! - [`suspend_to_file`] and [`restore_from_file`]: the same guest in a file; [`snapshot_to_file`]: it goes on, and is there as well,
//!   whole or as what has changed since another snapshot.
//!
//! Invariants: before the first byte of COMMIT any failure leaves the source running as if nothing had happened; from
//! there on the source runs again only if the lease says that it may (or, without a lease, the destination swore never
//! to, or the operator says so), and the destination runs only if the lease offered it exactly this session and generation. Every step has a
//! deadline, and a source that brings the same again and again has one for all of it (`headway`, [`Patience::repetition`]). What the peer or a file says is believed only after it was checked, and costs no more memory than its stated
//! maximum. Both sides report the same cause. Who may be a peer at all is decided below (crate `transport`): with TLS no
//! message is read or written before both ends have proven who they are, on this link and on every later one.
//!
//! Absent: images and postcopy at once; a choice of images: all that the guest may write go, or none; a migration whose rounds do not
//! shrink for more than a week, which its destination takes for one that never ends; an end to the memory that a source withholds from a
//! guest that has moved ahead of it: nobody waits for a page longer than [`Patience::silence`] before the guest is held, and then it is the
//! operator who recovers or ends it.
#![forbid(unsafe_code)]

mod answers;
mod bandwidth;
mod bitmap;
mod channels;
mod converge;
mod description;
mod destination;
mod error;
pub mod features;
mod file;
mod folder;
mod handover;
mod headway;
pub mod lease;
mod link;
mod local;
mod machine;
mod moment;
mod ownership;
mod parameters;
mod patience;
mod postcopy;
pub mod protocol;
mod ram;
mod reception;
mod rounds;
mod sink;
mod source;
mod speed;
mod statistics;
pub mod storage;

pub use bitmap::PageBitmap;
pub use channels::destination::Incoming;
pub use channels::{CHANNELS_DEFAULT, CHANNELS_MAX, Compression, replay};
pub use converge::{Convergence, Decision, Following, OnTimeout, Situation, ThrottleSteps, Trend, converge};
pub use description::Description;
pub use destination::{Arrived, Destination};
pub use error::Error;
pub use file::{
    FileParent, FileState, Fill, Reading, Restored, SnapshotFailed, SnapshotOptions, Taking, expect_file,
    file_schema, restore_from_file, snapshot_to_file, suspend_to_file,
};
pub use folder::{folder_of, sync_folder_of};
pub use handover::Handover;
pub use link::Dial;
pub use machine::{
    DestinationFactory, DestinationMachine, Fault, FreshMemory, Image, ImageCopy, ImageFile, MachineResult,
    MemoryDescriptors, MissingPages, RamBlock, RunState, SaveFor, Since, SourceMachine,
};
pub use moment::{HOST, is_same_host};
pub use ownership::source::Word;
pub use parameters::{Parameters, PostcopyStart};
pub use patience::Patience;
pub use source::{Context, Outcome, migrate};
pub use statistics::{Downtime, Postcopy, Snapshot, Statistics, Status, Storage};

/// A page of guest memory, the unit of dirty tracking.
pub const PAGE_BYTES: u64 = 4096;

#[cfg(test)]
mod tests;
