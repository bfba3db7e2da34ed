//! Frames of a live connection.
//!
//! Both sides send a preamble (`FRRY`, be16 major, be16 minor), then frames: be16 kind, be16 flags, be32 length, body. What the
//! bodies mean, and in which order they come, is the business of the migration engine.
//!
//! ```
//! use stream::frame::{self, Kind};
//!
//! let mut link = Vec::new();
//! frame::write(&mut link, Kind::Query, 0, &[1, 2, 3])?;
//!
//! let mut body = Vec::new();
//! let header = frame::read(&mut link.as_slice(), &mut body)?;
//! assert_eq!((header.kind, body.as_slice()), (Kind::Query, [1, 2, 3].as_slice()));
//! # Ok::<(), stream::Error>(())
//! ```

use std::io::{self, IoSlice, Read, Write};

use crate::Error;
use crate::wire::write_all_vectored;

/// The first bytes of a connection, from both sides.
pub const PREAMBLE: [u8; 4] = *b"FRRY";
/// Versions with different majors do not understand each other.
pub const MAJOR: u16 = 1;
/// A higher minor may have more kinds of frames, and more in a message. 1: what a machine is may be told with identities.
pub const MINOR: u16 = 1;
/// Bytes of a frame's header, and of a preamble.
pub const HEADER_BYTES: usize = 8;
/// The longest body.
pub const BODY_BYTES_MAX: usize = 1 << 20;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a frame is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Kind {
            $($(#[$doc])* $name = $number,)*
        }

        impl Kind {
            /// Every kind there is.
            pub const ALL: &[Kind] = &[$(Kind::$name,)*];
        }
    };
}

kinds! {
    /// The source says what it wants to move.
    Hello = 1,
    /// The destination can take it.
    Agree = 2,
    /// The destination cannot, with all reasons.
    Refuse = 3,
    /// A piece of the stream.
    Stream = 4,
    /// The source has sent everything and asks the destination to build it.
    Prepare = 5,
    /// The destination has built it.
    Prepared = 6,
    /// The destination could not.
    Reject = 7,
    /// The source gives the guest away.
    Commit = 8,
    /// The destination has the guest, running or paused.
    Running = 9,
    /// The destination will never have the guest.
    Never = 10,
    /// The source asks what became of a session.
    Query = 11,
    /// The migration is called off.
    Cancel = 12,
    /// How far it has come.
    Progress = 13,
    /// The destination needs a page now.
    PageRequest = 14,
    /// The first frame of a data channel.
    ChannelHello = 15,
    /// The source passes guest memory itself, to a process of the same host.
    Memory = 16,
    /// The destination has mapped it.
    Mapped = 17,
    /// The source will stop the guest once all that was sent is in its place.
    Settle = 18,
    /// The destination has placed it.
    Settled = 19,
    /// Pages that the destination lacks: the source names them before it hands the guest over, the destination after a lost link.
    Missing = 20,
    /// All of them are named.
    Listed = 21,
    /// Pages, with their contents.
    Pages = 22,
    /// The source goes on with what a lost link has interrupted.
    Recover = 23,
    /// The destination has all pages.
    Received = 24,
    /// Blocks of an image that goes with its guest.
    Blocks = 25,
    /// The source passes the files of images themselves, to a process of the same host.
    ImageFiles = 26,
    /// The destination has found them to be those that it would open.
    Identified = 27,
    /// The destination needs several pages in a row now.
    RunRequest = 28,
}

impl TryFrom<u16> for Kind {
    type Error = Error;

    fn try_from(number: u16) -> Result<Self, Error> {
        Kind::ALL.iter().copied().find(|kind| *kind as u16 == number).ok_or(Error::FrameKind(number))
    }
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Defined by the kind.
    pub flags: u16,
    /// Bytes of the body, at most [`BODY_BYTES_MAX`].
    pub length_bytes: u32,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&(self.kind as u16).to_be_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_be_bytes());
        bytes[4..].copy_from_slice(&self.length_bytes.to_be_bytes());
        bytes
    }

    /// The header that the bytes are.
    ///
    /// # Errors
    ///
    /// If the kind is unknown or the body too long.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, Error> {
        let [k0, k1, f0, f1, length @ ..] = bytes;
        let kind = Kind::try_from(u16::from_be_bytes([k0, k1]))?;
        let length_bytes = u32::from_be_bytes(length);
        check_length(length_bytes as usize)?;
        Ok(Header { kind, flags: u16::from_be_bytes([f0, f1]), length_bytes })
    }
}

fn check_length(length: usize) -> Result<(), Error> {
    let (value, maximum) = (length as u64, BODY_BYTES_MAX as u64);
    if value > maximum {
        Err(Error::AboveMaximum { what: "length of a frame", value, maximum })
    } else {
        Ok(())
    }
}

/// The preamble of this build.
pub fn encode_preamble() -> [u8; HEADER_BYTES] {
    let [m0, m1] = MAJOR.to_be_bytes();
    let [n0, n1] = MINOR.to_be_bytes();
    let [a, b, c, d] = PREAMBLE;
    [a, b, c, d, m0, m1, n0, n1]
}

/// Major and minor version of the peer. Whether they fit is for the caller to decide, who can say so to the peer.
///
/// # Errors
///
/// If it is no preamble.
pub fn decode_preamble(bytes: [u8; HEADER_BYTES]) -> Result<(u16, u16), Error> {
    let [a, b, c, d, m0, m1, n0, n1] = bytes;
    match [a, b, c, d] {
        PREAMBLE => Ok((u16::from_be_bytes([m0, m1]), u16::from_be_bytes([n0, n1]))),
        other => Err(Error::Preamble(other)),
    }
}

/// Writes a frame, with one call where the writer takes it all. It is not flushed.
///
/// # Errors
///
/// If the body is too long or `out` fails.
pub fn write(out: &mut impl Write, kind: Kind, flags: u16, body: &[u8]) -> Result<(), Error> {
    check_length(body.len())?;
    let header = Header { kind, flags, length_bytes: body.len() as u32 }.encode();
    write_all_vectored(out, &mut [IoSlice::new(&header), IoSlice::new(body)]).map_err(Error::write("a frame"))
}

/// Reads a frame; its body replaces what `body` held.
///
/// # Errors
///
/// If the kind is unknown, the body too long, or `input` fails or ends.
pub fn read(input: &mut impl Read, body: &mut Vec<u8>) -> Result<Header, Error> {
    let failed = |source| Error::Read { offset: 0, source };
    let mut header = [0; HEADER_BYTES];
    input.read_exact(&mut header).map_err(failed)?;
    let header = Header::decode(header)?;
    body.resize(header.length_bytes as usize, 0);
    input.read_exact(body).map_err(failed)?;
    Ok(header)
}

/// Packs what is written to it into frames of kind [`Kind::Stream`].
#[derive(Debug)]
pub struct StreamBodies<W> {
    out: W,
    body: Vec<u8>,
}

impl<W: Write> StreamBodies<W> {
    /// Frames go to `out`.
    pub fn new(out: W) -> Self {
        StreamBodies { out, body: Vec::new() }
    }

    /// The writer behind, without what has not been flushed.
    pub fn into_inner(self) -> W {
        self.out
    }

    fn send(&mut self) -> io::Result<()> {
        if self.body.is_empty() {
            return Ok(());
        }
        write(&mut self.out, Kind::Stream, 0, &self.body).map_err(|error| match error {
            Error::Write { source, .. } => source,
            other => io::Error::other(other),
        })?;
        self.body.clear();
        Ok(())
    }
}

impl<W: Write> Write for StreamBodies<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.body.len() == BODY_BYTES_MAX {
            self.send()?;
        }
        let taken = bytes.len().min(BODY_BYTES_MAX - self.body.len());
        self.body.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut written = 0;
        for slice in slices {
            // An error after the first bytes would lose count of them; it comes again with the next call.
            let taken = match self.write(slice) {
                Err(_) if written > 0 => break,
                result => result?,
            };
            written += taken;
            if taken < slice.len() {
                break;
            }
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()?;
        self.out.flush()
    }
}
