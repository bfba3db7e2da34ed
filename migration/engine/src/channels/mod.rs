//! Guest memory on connections of its own.
//!
//! Where both sides have [`features::CHANNELS`](crate::features::CHANNELS), guest memory does not go through the stream: the
//! source dials once more for each channel, says in a channel hello which one it is and the key that came with AGREE, and sends
//! its share of each round there. Everything else, the end of the story included, stays on the link.
//!
//! ```text
//! batch   "RB", kind 1, 0, be32 round, be16 runs, be16 digests, be32 bytes of contents
//!           runs     be16 block (in the order of names), kind, 0, be32 first page, be32 pages, be32 bytes of contents
//!           digests  be64 for each page that has contents: what the source saw of it
//!           contents of each run, one after the other: pages as they are, an LZ4 block, a Zstandard frame, or nothing (zero)
//! end     "RB", kind 2, zeroes; be64 digest of all heads, tables and digests
//! ```
//!
//! - `wire`: these bytes, and what of them is refused. `lane`: deadlines, and one end for all channels.
//! - `send`, `receive`: one channel. Contents go from where they are by one system call; they are received where they belong,
//!   or written into the file behind memory that is not there yet, which is faster than the page faults are.
//! - `source`, `destination`: all of them; who may join.
//!
//! Invariants: each chunk of 256 pages belongs to one channel, so what comes last of a page is what was sent last, without
//! waiting of one channel for another. A page that the guest wrote to while it was sent differs from its digest at the
//! destination, and is dirty: it comes again. A page that differs at the end refuses the guest, and so does a digest of heads
//! and tables that differs; PREPARE carries those of all channels. What a peer says costs each channel at most two bits a
//! page and three megabytes, and contents never become larger than the pages that they are for.

mod compress;
pub(crate) mod destination;
mod lane;
mod receive;
pub mod replay;
mod send;
pub(crate) mod source;
#[cfg(test)]
mod tests;
mod wire;

pub use compress::Compression;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Data channels of one migration.
pub const CHANNELS_MAX: u16 = 64;

/// The digest of PREPARE: that of the stream, and those of all channels in their order.
pub(crate) fn combined(stream: u64, channels: impl IntoIterator<Item = u64>) -> u64 {
    channels.into_iter().fold(stream, |digest, channel| xxh3_64_with_seed(&channel.to_le_bytes(), digest))
}
