//! Frames of a Unix socket with the descriptors that go along.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use stream::frame::{self, Header};
use transport::{DESCRIPTORS_MAX, Link, Received};

/// Reads a frame and what came along. `None`: the link has ended.
pub(crate) fn read(from: &UnixStream, body: &mut Vec<u8>) -> Option<(Header, Vec<OwnedFd>)> {
    let mut reader = Reader { from: from.try_clone().ok()?, received: Received::new(DESCRIPTORS_MAX) };
    let header = frame::read(&mut reader, body).ok()?;
    Some((header, reader.received.into_descriptors()))
}

/// Writes a frame; `descriptors` go along with its first byte.
pub(crate) fn write(
    to: &UnixStream,
    header: Header,
    body: &[u8],
    descriptors: &[OwnedFd],
) -> Result<(), stream::Error> {
    let to = to.try_clone().map_err(|source| stream::Error::Write { what: "a frame", source })?;
    frame::write(&mut Writer { to, descriptors }, header.kind, header.flags, body)
}

struct Reader {
    from: UnixStream,
    received: Received,
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.from.read_with(buffer, &mut self.received)
    }
}

struct Writer<'a> {
    to: UnixStream,
    descriptors: &'a [OwnedFd],
}

impl Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let descriptors: Vec<_> = std::mem::take(&mut self.descriptors).iter().map(AsFd::as_fd).collect();
        self.to.write_with(bytes, &descriptors)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
