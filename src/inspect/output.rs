//! A bound for what is printed: a small file may describe a large one.

use std::io::{self, Write};

/// The most that is printed of one file.
pub const OUTPUT_BYTES_MAX: u64 = 256 << 20;

/// Passes on what is written, up to a limit.
#[derive(Debug)]
pub struct Limited<W> {
    out: W,
    left: u64,
}

impl<W: Write> Limited<W> {
    /// Up to `limit_bytes`.
    pub fn new(out: W, limit_bytes: u64) -> Self {
        Self { out, left: limit_bytes }
    }
}

impl<W: Write> Write for Limited<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            return Err(io::Error::other(
                "there is more to print than a file should have; choose with --section",
            ));
        };
        self.left = left;
        self.out.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_has_an_end() {
        let mut out = Vec::new();
        let mut limited = Limited::new(&mut out, 8);
        limited.write_all(b"12345").expect("there is room");
        let error = limited.write_all(b"6789").expect_err("there is no room");
        assert!(error.to_string().contains("--section"), "{error}");
        limited.write_all(b"678").expect("there is room");
        assert_eq!(out, b"12345678");
    }
}
