//! Guest memory on its way.
//!
//! This is guest memory in a stream: in a file, or on the link to a process that knows no data channels
//! ([`channels`](crate::channels)). Pages are copied once out of guest memory, into a buffer that stays in the CPU's cache; zero detection, digests and the
//! link all read that buffer, so that what was digested is what was sent, although the guest writes on. A page that changed
//! after its copy was taken is dirty and comes again.

mod outgoing;
mod receive;
mod send;

pub(crate) use outgoing::Outgoing;
pub(crate) use receive::{Receiver, match_blocks};
pub(crate) use send::{Sender, is_zero};

/// [`PAGE_BYTES`](crate::PAGE_BYTES) as lengths of buffers want it.
pub(crate) const PAGE_LENGTH: usize = crate::PAGE_BYTES as usize;
