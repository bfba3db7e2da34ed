//! The reference: the same bytes through a Unix socket pair, out of memory that is there into memory that is fresh, both as a
//! guest's is (memfd).

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use vm_memory::{ReadVolatile, WriteVolatile};

use crate::memory::{GuestRam, PAGE_SIZE_BYTES, RamBlock};

/// Bytes of one write.
const WRITE_BYTES: u64 = 1 << 20;

/// Memory with contents, to be copied.
pub struct Contents(GuestRam);

impl Contents {
    /// `bytes` of it, no page like another.
    ///
    /// # Errors
    /// The system has no memory left.
    pub fn new(bytes: u64) -> anyhow::Result<Self> {
        let ram = GuestRam::new(bytes, &[])?;
        let mut page = [0x5a; PAGE_SIZE_BYTES as usize];
        let mut number = 0_u64;
        for block in ram.blocks() {
            for offset in (0..block.length_bytes()).step_by(page.len()) {
                page[..8].copy_from_slice(&number.to_le_bytes());
                block.write(offset, &page)?;
                number += 1;
            }
        }
        Ok(Self(ram))
    }

    /// How many bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.blocks().iter().map(RamBlock::length_bytes).sum()
    }

    /// Copies all of it from one thread to another; returns how long that took.
    ///
    /// # Errors
    /// The system has no sockets, threads or memory left.
    pub fn copy(&self) -> anyhow::Result<Duration> {
        let (writer, reader) = UnixStream::pair().context("cannot make a socket pair")?;
        let fresh = GuestRam::new(self.bytes(), &[])?;
        let started = Instant::now();
        std::thread::scope(|scope| {
            let write = |block: &RamBlock, offset, length| -> anyhow::Result<()> {
                Ok((&writer).write_all_volatile(&block.slice(offset, length)?)?)
            };
            let writing = scope.spawn(move || pieces(&self.0, write));
            let read = pieces(&fresh, |block, offset, length| {
                Ok((&reader).read_exact_volatile(&mut block.slice(offset, length)?)?)
            });
            drop(reader);
            writing.join().map_err(|_| anyhow!("the writing thread panicked"))?.context("cannot write")?;
            read.context("cannot read")
        })?;
        let time = started.elapsed();
        let (mut one, mut other) = (Vec::new(), Vec::new());
        for (sent, came) in self.0.blocks().iter().zip(fresh.blocks()) {
            for offset in (0..sent.length_bytes()).step_by(WRITE_BYTES as usize) {
                let length = (sent.length_bytes() - offset).min(WRITE_BYTES) as usize;
                one.resize(length, 0);
                other.resize(length, 0);
                sent.read(offset, &mut one)?;
                came.read(offset, &mut other)?;
                ensure!(one == other, "a socket pair changed what it carried");
            }
        }
        Ok(time)
    }
}

/// Does something with every piece of memory in turn: block, offset, length.
fn pieces(
    ram: &GuestRam,
    mut each: impl FnMut(&RamBlock, u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for block in ram.blocks() {
        for offset in (0..block.length_bytes()).step_by(WRITE_BYTES as usize) {
            each(block, offset, (block.length_bytes() - offset).min(WRITE_BYTES))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_arrive() {
        let contents = Contents::new(WRITE_BYTES + 8192).unwrap();
        let block = &contents.0.blocks()[0];
        let page = |offset| {
            let mut page = [0; 4096];
            block.read(offset, &mut page).unwrap();
            page
        };
        assert_ne!(page(0), page(4096));
        contents.copy().unwrap();
    }
}
