//! Bytes of a Unix socket with the descriptors that go along.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use transport::{Link, Received};

/// Reads until `bytes` has `wanted` bytes; whether it has, or the link has ended before.
pub(crate) fn fill(
    from: &mut UnixStream,
    bytes: &mut Vec<u8>,
    wanted: usize,
    received: &mut Received,
) -> io::Result<bool> {
    let mut filled = bytes.len();
    bytes.resize(wanted.max(filled), 0);
    while filled < wanted {
        match from.read_with(&mut bytes[filled..], received) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // What came of it is passed on.
            Err(_) if filled > 0 => break,
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(filled >= wanted)
}

/// Writes all of `bytes`; `descriptors` go along with the first.
pub(crate) fn write_all(to: &mut UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let count = to.write_with(bytes, &descriptors)?;
    to.write_all(&bytes[count..])
}
