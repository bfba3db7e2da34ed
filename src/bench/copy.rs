//! The reference: the same bytes through a Unix socket pair, from memory that is there into memory that is fresh.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

/// Bytes of one write.
const WRITE_BYTES: usize = 1 << 20;

/// Memory with contents, to be copied.
pub struct Contents(Vec<u8>);

impl Contents {
    /// `bytes` of it, no page like another.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let mut contents = vec![0x5a; bytes];
        for (number, page) in contents.chunks_exact_mut(4096).enumerate() {
            page[..8].copy_from_slice(&number.to_le_bytes());
        }
        Self(contents)
    }

    /// How many bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.len()
    }

    /// Copies all of it from one thread to another; returns how long that took.
    ///
    /// # Errors
    /// The system has no sockets or threads left.
    pub fn copy(&self) -> anyhow::Result<Duration> {
        let (mut writer, mut reader) = UnixStream::pair().context("cannot make a socket pair")?;
        // Zeroed memory of this size is not touched before it is read into.
        let mut fresh = vec![0; self.0.len()];
        let started = Instant::now();
        std::thread::scope(|scope| {
            let writing =
                scope.spawn(move || self.0.chunks(WRITE_BYTES).try_for_each(|chunk| writer.write_all(chunk)));
            let read = fresh.chunks_mut(WRITE_BYTES).try_for_each(|chunk| reader.read_exact(chunk));
            drop(reader);
            writing.join().map_err(|_| anyhow!("the writing thread panicked"))?.context("cannot write")?;
            read.context("cannot read")
        })?;
        let time = started.elapsed();
        anyhow::ensure!(fresh == self.0, "a socket pair changed what it carried");
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_arrive() {
        let contents = Contents::new(WRITE_BYTES + 8192);
        assert_ne!(contents.0[..4096], contents.0[4096..8192]);
        contents.copy().unwrap();
    }
}
