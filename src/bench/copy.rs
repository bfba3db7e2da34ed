//! The reference: the same bytes through a socket from one process to another, out of memory that is there into memory that is
//! fresh, both as a guest's is (memfd).
//!
//! ```text
//! this process                `ferry bench receive`, the socket as its standard input
//!                 <- READY    memory is mapped, nothing of it populated
//! 1 MiB a write   ->
//!                 <- DONE     all of it is there: the time that counts ends
//!                 <- checksum of what came
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use vm_memory::{ReadVolatile, WriteVolatile};

use crate::memory::{GuestRam, PAGE_SIZE_BYTES, RamBlock};

/// Bytes of one write.
const WRITE_BYTES: u64 = 1 << 20;
/// The receiver's memory is mapped.
const READY: u8 = b'r';
/// All has arrived.
const DONE: u8 = b'd';

/// What connects the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// A Unix socket pair.
    Unix,
    /// TCP over loopback.
    Tcp,
}

impl Link {
    /// Two ends that lead to each other.
    fn ends(self) -> std::io::Result<(OwnedFd, OwnedFd)> {
        Ok(match self {
            Self::Unix => {
                let (one, other) = UnixStream::pair()?;
                (one.into(), other.into())
            }
            Self::Tcp => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                let one = TcpStream::connect(listener.local_addr()?)?;
                let (other, _) = listener.accept()?;
                one.set_nodelay(true)?;
                other.set_nodelay(true)?;
                (one.into(), other.into())
            }
        })
    }
}

/// Memory with contents, to be copied.
pub struct Contents {
    ram: GuestRam,
    checksum: u32,
}

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
        Ok(Self { checksum: checksum(&ram)?, ram })
    }

    /// How many bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ram.blocks().iter().map(RamBlock::length_bytes).sum()
    }

    /// Copies all of it over `link` to a process of `program`, which is this one; returns how long that took.
    ///
    /// # Errors
    /// The system has no sockets, processes or memory left, or what arrived is something else.
    pub fn copy(&self, program: &Path, link: Link) -> anyhow::Result<Duration> {
        let (ours, theirs) = link.ends().context("cannot connect two sockets")?;
        // Should this process end first, the socket ends the other.
        let mut receiver = Command::new(program)
            .args(["bench", "receive", &self.bytes().to_string()])
            .stdin(Stdio::from(theirs))
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let result = self.send(ours);
        let status = receiver.wait().context("cannot wait for the receiving process")?;
        let time = result.context("cannot copy memory to another process")?;
        ensure!(status.success(), "the process that received a copy of memory failed: {status}");
        Ok(time)
    }

    /// The sending half.
    fn send(&self, link: OwnedFd) -> anyhow::Result<Duration> {
        let link = File::from(link);
        expect(&link, READY)?;
        let started = Instant::now();
        pieces(&self.ram, |block, offset, length| {
            Ok((&link).write_all_volatile(&block.slice(offset, length)?)?)
        })?;
        expect(&link, DONE)?;
        let time = started.elapsed();
        let mut arrived = [0; 4];
        (&link).read_exact(&mut arrived)?;
        ensure!(u32::from_le_bytes(arrived) == self.checksum, "a socket changed what it carried");
        Ok(time)
    }
}

/// The receiving half: takes `bytes` from `link` into fresh memory.
///
/// # Errors
/// The sender went away, or the system has no memory left.
pub fn receive(link: OwnedFd, bytes: u64) -> anyhow::Result<()> {
    let link = File::from(link);
    let fresh = GuestRam::new(bytes, &[])?;
    (&link).write_all(&[READY])?;
    pieces(&fresh, |block, offset, length| {
        Ok((&link).read_exact_volatile(&mut block.slice(offset, length)?)?)
    })?;
    (&link).write_all(&[DONE])?;
    (&link).write_all(&checksum(&fresh)?.to_le_bytes())?;
    Ok(())
}

fn expect(mut link: &File, expected: u8) -> anyhow::Result<()> {
    let mut word = [0];
    link.read_exact(&mut word)?;
    match word {
        [found] if found == expected => Ok(()),
        [found] => bail!("the receiver said {found:#04x} where {expected:#04x} was due"),
    }
}

fn checksum(ram: &GuestRam) -> anyhow::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut piece = Vec::new();
    pieces(ram, |block, offset, length| {
        piece.resize(length as usize, 0);
        block.read(offset, &mut piece)?;
        hasher.update(&piece);
        Ok(())
    })?;
    Ok(hasher.finalize())
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

    /// Sends `contents` to a receiver that may change what came.
    fn copy(contents: &Contents, link: Link) -> anyhow::Result<Duration> {
        let (ours, theirs) = link.ends().unwrap();
        let bytes = contents.bytes();
        std::thread::scope(|scope| {
            let receiver = scope.spawn(move || receive(theirs, bytes));
            let time = contents.send(ours);
            receiver.join().unwrap().unwrap();
            time
        })
    }

    #[test]
    fn contents_arrive_over_either_link() {
        let contents = Contents::new(WRITE_BYTES + 8192).unwrap();
        let block = &contents.ram.blocks()[0];
        let page = |offset| {
            let mut page = [0; 4096];
            block.read(offset, &mut page).unwrap();
            page
        };
        assert_ne!(page(0), page(4096));
        copy(&contents, Link::Unix).unwrap();
        copy(&contents, Link::Tcp).unwrap();
    }

    #[test]
    fn a_copy_that_differs_is_an_error() {
        let mut contents = Contents::new(8192).unwrap();
        contents.checksum ^= 1;
        let error = copy(&contents, Link::Unix).unwrap_err().to_string();
        assert!(error.contains("changed what it carried"), "{error}");
    }

    #[test]
    fn a_receiver_that_ends_early_is_an_error() {
        let contents = Contents::new(8192).unwrap();
        let (ours, theirs) = Link::Unix.ends().unwrap();
        drop(theirs);
        assert!(contents.send(ours).is_err());
    }
}
