//! Descriptors that go along with bytes over a Unix socket (`SCM_RIGHTS`, unix(7)).
//!
//! They travel with the first byte that they were sent with. Whoever reads that byte in the plain way gets none: the kernel closes
//! them, so that a peer can leave nothing in a process that does not look for it. Whoever looks says how many may come at most.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most that go with one message: the kernel's own limit (`SCM_MAX_FD`).
pub const DESCRIPTORS_MAX: usize = 253;

/// Descriptors that came, and how many may.
#[derive(Debug)]
pub struct Received {
    room: usize,
    descriptors: Vec<OwnedFd>,
}

impl Received {
    /// Nothing yet, and `room` at most.
    #[must_use]
    pub fn new(room: usize) -> Self {
        Self { room: room.min(DESCRIPTORS_MAX), descriptors: Vec::new() }
    }

    /// What came, in the order in which it was sent.
    #[must_use]
    pub fn into_descriptors(self) -> Vec<OwnedFd> {
        self.descriptors
    }
}

/// Writes, and `descriptors` go along with the first byte.
///
/// # Errors
/// The socket is broken, takes nothing in time, or takes no descriptors.
pub fn write_with(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if descriptors.is_empty() {
        return (&*stream).write(bytes);
    }
    let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(descriptors.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Reads, and takes the descriptors that come along. They close with this process's programs (`O_CLOEXEC`).
///
/// # Errors
/// The socket is broken, nothing comes in time, or more descriptors came than may.
pub fn read_with(stream: &UnixStream, buffer: &mut [u8], received: &mut Received) -> io::Result<usize> {
    // Room for one more than may come shows what is too much, whatever the padding holds.
    let mut space = vec![MaybeUninit::uninit(); cmsg_space!(ScmRights(received.room + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            received.descriptors.extend(descriptors);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) || received.descriptors.len() > received.room {
        received.descriptors.clear();
        let reason = format!("more descriptors came than the {} that may, or than can be had", received.room);
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(message.bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::os::fd::AsFd;

    use super::*;
    use crate::Connection;

    fn files(count: u8) -> Vec<File> {
        let file = |number| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[number]).unwrap();
            file
        };
        (0..count).map(file).collect()
    }

    fn send(connection: &mut Connection, bytes: &[u8], files: &[File]) {
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        assert_eq!(connection.write_with(bytes, &descriptors).unwrap(), bytes.len());
    }

    #[test]
    fn descriptors_come_in_order_with_the_first_byte_and_close_with_programs() {
        let (mut one, mut other) = Connection::pair().unwrap();
        assert!(one.passes_descriptors());
        send(&mut one, b"abc", &files(3));
        one.write_all(b"d").unwrap();
        let mut received = Received::new(3);
        let mut bytes = [0; 1];
        assert_eq!(other.read_with(&mut bytes, &mut received).unwrap(), 1);
        let descriptors = received.into_descriptors();
        for descriptor in &descriptors {
            let flags = rustix::io::fcntl_getfd(descriptor).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
        let numbers = descriptors.into_iter().map(|descriptor| {
            let (mut file, mut number) = (File::from(descriptor), [0]);
            file.rewind().unwrap();
            file.read_exact(&mut number).unwrap();
            number[0]
        });
        assert_eq!(numbers.collect::<Vec<_>>(), [0, 1, 2]);
        let mut rest = [0; 3];
        let mut received = Received::new(1);
        while other.read_with(&mut rest, &mut received).unwrap() == 0 {}
        assert!(received.into_descriptors().is_empty(), "they came once");
    }

    /// The end of a pipe comes when nobody can write to it any more.
    #[test]
    fn more_than_may_come_is_refused_and_closed() {
        for (room, sent) in [(0, 1), (1, 2), (1, 3), (2, 253)] {
            let (mut one, mut other) = Connection::pair().unwrap();
            let (mut end, begin) = std::io::pipe().unwrap();
            one.write_with(b"x", &vec![begin.as_fd(); sent]).unwrap();
            drop(begin);
            let mut received = Received::new(room);
            let error = other.read_with(&mut [0; 1], &mut received).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{room} {sent}: {error}");
            assert_eq!(end.read(&mut [0; 1]).unwrap(), 0, "{room} {sent}");
            assert!(received.into_descriptors().is_empty());
        }
    }

    #[test]
    fn a_plain_read_takes_none_and_a_link_of_another_kind_passes_none() {
        let (mut one, mut other) = Connection::pair().unwrap();
        send(&mut one, b"xy", &files(1));
        other.read_exact(&mut [0; 1]).unwrap();
        let mut received = Received::new(1);
        other.read_with(&mut [0; 1], &mut received).unwrap();
        assert!(received.into_descriptors().is_empty());
        let too_many = files(254);
        let descriptors: Vec<_> = too_many.iter().map(AsFd::as_fd).collect();
        assert!(one.write_with(b"x", &descriptors).is_err());

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut tcp = Connection::from_tcp(stream, "tcp".to_owned()).unwrap();
        assert!(!tcp.passes_descriptors());
        assert_eq!(
            tcp.write_with(b"x", &[one_file().as_fd()]).unwrap_err().kind(),
            io::ErrorKind::Unsupported
        );
    }

    fn one_file() -> File {
        tempfile::tempfile().unwrap()
    }
}
