//! Bytes straight from memory that others may write to meanwhile, and straight into it: one system call gathers or scatters
//! many pieces, and no copy of them is made in this process.
//!
//! A `&[u8]` would promise that the bytes stand still, so the kernel is given addresses that no reference is made of.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Pieces of one call. The kernel takes more (`UIO_MAXIOV`); whoever has more calls again.
const PIECES_MAX: usize = 256;

/// Sends `head` and then `memory`, from byte `skip` of both on; returns how many bytes were taken.
pub(crate) fn send<B: BitmapSlice>(
    socket: BorrowedFd<'_>,
    head: &[u8],
    memory: &[VolatileSlice<'_, B>],
    skip: usize,
) -> io::Result<usize> {
    let head_left = head.get(skip..).unwrap_or_default();
    let mut pieces = Vec::with_capacity(PIECES_MAX.min(memory.len() + 1));
    if !head_left.is_empty() {
        pieces.push(piece(head_left.as_ptr(), head_left.len()));
    }
    let rest = pieces_after(memory, skip.saturating_sub(head.len()));
    let guards: Vec<_> = rest
        .take(PIECES_MAX - 1)
        .map(|(slice, from)| (slice.ptr_guard(), from, slice.len() - from))
        .collect();
    // The addition stays within the slice, whose length `from` is below.
    pieces.extend(
        guards.iter().map(|(guard, from, length)| piece(guard.as_ptr().wrapping_add(*from), *length)),
    );
    // SAFETY: all that a message header holds may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    // SAFETY: `message` points to the pieces, and each of them to memory that `head` or a guard keeps readable until the call
    // returns. The kernel only reads it, and whoever writes to it meanwhile changes what is sent and nothing else.
    let count = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(count).map_err(|_negative| io::Error::last_os_error())
}

/// Receives into `memory` from its byte `skip` on, as much as comes until it is full or the time of the socket is up; returns
/// how many bytes came, 0 at the end.
pub(crate) fn receive<B: BitmapSlice>(
    socket: BorrowedFd<'_>,
    memory: &[VolatileSlice<'_, B>],
    skip: usize,
) -> io::Result<usize> {
    let guards: Vec<_> = pieces_after(memory, skip)
        .take(PIECES_MAX)
        .map(|(slice, from)| (slice.ptr_guard_mut(), from, slice.len() - from))
        .collect();
    let mut pieces: Vec<_> = guards
        .iter()
        .map(|(guard, from, length)| piece(guard.as_ptr().wrapping_add(*from).cast_const(), *length))
        .collect();
    // SAFETY: all that a message header holds may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    // SAFETY: `message` points to the pieces, and each of them to memory that a guard keeps writable until the call returns.
    // It is volatile memory: nothing in this process takes its contents for granted.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_WAITALL) };
    let count = usize::try_from(count).map_err(|_negative| io::Error::last_os_error())?;
    let mut left = count;
    for (slice, from) in pieces_after(memory, skip) {
        let length = left.min(slice.len() - from);
        if length == 0 {
            break;
        }
        slice.bitmap().mark_dirty(from, length);
        left -= length;
    }
    Ok(count)
}

/// What is left of `memory` after its first `skip` bytes: slices, and where to begin in each. None of them is used up.
pub(crate) fn pieces_after<'a, 'm, B: BitmapSlice>(
    memory: &'a [VolatileSlice<'m, B>],
    mut skip: usize,
) -> impl Iterator<Item = (&'a VolatileSlice<'m, B>, usize)> {
    memory.iter().filter_map(move |slice| {
        let from = skip.min(slice.len());
        skip -= from;
        (from < slice.len()).then_some((slice, from))
    })
}

fn piece(start: *const u8, length: usize) -> libc::iovec {
    libc::iovec { iov_base: start.cast_mut().cast(), iov_len: length }
}
