//! Guest memory on its way.
//!
//! Pages are copied once out of guest memory, into a buffer that stays in the CPU's cache; zero detection, digests and the
//! link all read that buffer, so that what was digested is what was sent, although the guest writes on. A page that changed
//! after its copy was taken is dirty and comes again.

mod receive;
mod send;

pub(crate) use receive::{Receiver, match_blocks};
pub(crate) use send::Sender;

/// [`PAGE_BYTES`](crate::PAGE_BYTES) as lengths of buffers want it.
pub(crate) const PAGE_LENGTH: usize = crate::PAGE_BYTES as usize;
