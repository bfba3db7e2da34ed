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
//!   but into a buffer first for memory that is not there yet, unless a touch brings huge pages: small ones come with their contents then,
//!   and bringing them is what a move takes longest for.
//! - `fresh`: by which way it comes. The machine fills small pages without anybody touching them
//!   ([`FreshMemory`](crate::FreshMemory)), faults that bring huge pages are faster still, and a file of small pages can be written.
//! - `differing`: pages that were not what the source saw of them.
//! - `source`, `destination`: all of them; who may join.
//!
//! Invariants: each chunk of 256 pages belongs to one channel, so what comes last of a page is what was sent last, without
//! waiting of one channel for another. A page that the guest wrote to while it was sent differs from its digest at the
//! destination, and is dirty: it comes again, or after the guest. One that differs at the end, and is not to follow, refuses the
//! guest, and so does a digest of heads and tables that differs; PREPARE carries those of all channels. So it is the last copy of each page alone that is judged. One that was
//! damaged on its way, and came again because the guest had written to it, is right if that copy is: nothing looked at the damaged one, since
//! no vCPU and no device runs here before the end, and nothing of it is left, since a copy is a whole page. That a link damages pages
//! is then found only if it damages a last one; it says nothing false of the guest's memory. What a peer says costs each channel at most two bits a
//! page and three megabytes, and contents never become larger than the pages that they are for.
//!
//! # What was measured
//!
//! Two channels are the default ([`Parameters::set_channels`](crate::Parameters::set_channels)): on the reference host with nothing beside
//! they carry a sixth more than one, with the same downtime, though source, destination and guest share two cores; four carry less over a
//! Unix socket and more over TCP (`ferry bench migrate --runs 5 --channels 1,2,4 --transport unix,tcp`, a guest of 1 GiB, medians). Among
//! some 20 other processes ready to run two once carried 1.8 times what one did.
//!
//! ```text
//! channels                     1      2      4
//! Unix socket, MiB/s       1,270  1,487  1,297      by the plain copy 1.33, 1.52, 1.43      downtime, ms 1.9, 1.9, 2.6
//! TCP, MiB/s                 795    943  1,300      by the plain copy 0.84, 1.05, 1.42      downtime, ms 2.5, 2.2, 2.5
//! ```
//!
//! Contents are sent without `MSG_ZEROCOPY`. `resources/compare/zerocopy` sends 1 GiB of populated memory to another process, 1 MiB a
//! call, with and without it in turn (the same host and load, medians of 5):
//!
//! ```text
//!                          MiB/s  by the other   sender, s  receiver, s   copied all the same
//! loopback  sendmsg        1,364                      0.15         0.75
//!           MSG_ZEROCOPY   1,092          0.80        0.28         0.86   100 %
//! veth      sendmsg        1,175                      0.22         0.81
//!           MSG_ZEROCOPY   1,114          0.95        0.38         0.86   100 %
//! ```
//!
//! Memory of the sender is never given to a receiver on the same host: the kernel copies each piece when it is delivered, and pinning
//! pages and telling of their end comes on top, so the sender's processor time doubles. Between hosts a network card could take the pages
//! as they are; but copying them takes the sender a seventh of a second for each GiB, beside the receiver, which copies in any case and
//! takes five times as long. That is what bounds a channel, and no flag of the sender's changes it.

mod compress;
pub(crate) mod destination;
mod differing;
mod fresh;
mod lane;
mod receive;
pub mod replay;
mod send;
pub(crate) mod source;
#[cfg(test)]
mod tests;
mod wire;

pub use compress::Compression;

use twox_hash::XxHash3_64;

/// Data channels of one migration.
pub const CHANNELS_MAX: u16 = 64;
/// As many are asked for unless the user says otherwise; see "What was measured" above.
pub const CHANNELS_DEFAULT: u16 = 2;

/// The digest of PREPARE: that of the stream, and those of all channels in their order.
pub(crate) fn combined(stream: u64, channels: impl IntoIterator<Item = u64>) -> u64 {
    channels
        .into_iter()
        .fold(stream, |digest, channel| XxHash3_64::oneshot_with_seed(digest, &channel.to_le_bytes()))
}
