//! Blocks without a peer: what they are on the link, and what any bytes do to images. For tests of hostile input.

use std::ops::Range;

use super::incoming::Arriving;
use super::wire::Run;
use super::{Disk, IncomingDisks};
use crate::channels::combined;
use crate::{Error, Statistics};

/// The body of a frame with contents of image number `disk`.
#[must_use]
pub fn data(disk: u16, offset_bytes: u64, contents: &[u8]) -> Vec<u8> {
    [Run::data(disk, offset_bytes, contents).encode().as_slice(), contents].concat()
}

/// The body of a frame that says of a part of image number `disk` that it is zeroes.
#[must_use]
pub fn zeroes(disk: u16, range: Range<u64>) -> Vec<u8> {
    Run::zeroes(disk, range).encode().to_vec()
}

/// Places what came in frames with these bodies, and no more comes. Returns the digest of what was said.
///
/// # Errors
/// One is refused, or not all of the images came.
pub fn place<'a>(
    bodies: impl IntoIterator<Item = &'a [u8]>,
    disks: Vec<Disk>,
    images: Box<dyn IncomingDisks>,
) -> Result<u64, Error> {
    let (mut arriving, statistics) = (Arriving::new(disks, images), Statistics::new());
    bodies.into_iter().try_for_each(|body| arriving.place(body, &statistics))?;
    arriving.finish()
}

/// What PREPARE says of a stream with this digest, and of blocks with that.
#[must_use]
pub fn prepared(stream: u64, blocks: u64) -> u64 {
    combined(stream, [blocks])
}
