//! A channel without a peer: what guest memory becomes on it, and what any bytes do to guest memory. For tests of hostile input.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use transport::Connection;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::Compression;
use super::lane::{Input, Lane, Watch};
use super::receive::{Came, DOING, Inlet};
use super::send::Outlet;
use crate::link::Step;
use crate::{Error, FreshMemory, PageBitmap, RamBlock};

/// What channel `index` of `count` carries of `blocks` in one round for each list of bitmaps, and its end.
///
/// # Errors
/// As those of a channel.
pub fn record(
    blocks: &[RamBlock],
    rounds: &[&[PageBitmap]],
    compression: Compression,
    index: u16,
    count: u16,
) -> Result<Vec<u8>, Error> {
    let written = Written::default();
    let lane = Lane::new(Connection::new(Box::new(written.clone()), "nobody"));
    let mut outlet = Outlet::new(lane, blocks, index.into(), count.into(), compression)?;
    let patience = Duration::from_secs(60);
    let step = Step { doing: "recording a channel", patience, cancel: None, until: None };
    let watch = Watch::default();
    for (round, bitmaps) in (1..).zip(rounds) {
        outlet.round(round, bitmaps, step, &watch, &mut |_, _| Ok(()))?;
    }
    outlet.end(step, &watch)?;
    Ok(std::mem::take(&mut *written.0.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// Places what channel `index` of `count` carried, which is all of `bytes`, into blocks of which `fresh` fills those that it can. Returns
/// the digest of what was said.
///
/// # Errors
/// It is refused.
pub fn place(
    bytes: &[u8],
    blocks: &[RamBlock],
    fresh: Option<&Arc<dyn FreshMemory>>,
    index: u16,
    count: u16,
) -> Result<u64, Error> {
    let mut inlet = Inlet::new(blocks, index.into(), count.into(), fresh);
    let mut input = Bytes(bytes);
    loop {
        if let Came::End { digest } = inlet.receive(&mut input)? {
            inlet.into_differing().check()?;
            return match input.0 {
                [] => Ok(digest),
                rest => Err(Error::Protocol {
                    doing: DOING,
                    reason: format!("{} bytes after the end", rest.len()),
                }),
            };
        }
    }
}

/// A channel that was.
struct Bytes<'a>(&'a [u8]);

impl Input for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8], _begins: bool) -> Result<(), Error> {
        self.0.read_exact(buffer).map_err(|source| Error::Lost { doing: DOING, source })
    }

    fn read_memory<B: BitmapSlice>(&mut self, memory: &[VolatileSlice<'_, B>]) -> Result<(), Error> {
        for slice in memory {
            let Some((bytes, rest)) = self.0.split_at_checked(slice.len()) else {
                return Err(Error::Lost { doing: DOING, source: io::ErrorKind::UnexpectedEof.into() });
            };
            slice.copy_from(bytes);
            self.0 = rest;
        }
        Ok(())
    }
}

/// Keeps what is written.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Read for Written {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl transport::Link for Written {
    fn try_clone(&self) -> io::Result<Box<dyn transport::Link>> {
        Ok(Box::new(self.clone()))
    }
    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
    fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        Ok(())
    }
}
