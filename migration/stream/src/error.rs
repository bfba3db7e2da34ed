//! What can be wrong with a stream.

use std::io;

/// Why a stream could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The underlying writer failed.
    #[error("cannot write {what} to the stream")]
    Write {
        /// What was being written.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The underlying reader failed.
    #[error("cannot read the stream at byte {offset}")]
    Read {
        /// Bytes read so far.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The stream ends where it must go on.
    #[error("the stream ends at byte {offset}, in {what}")]
    Truncated {
        /// Bytes there are.
        offset: u64,
        /// What is incomplete.
        what: &'static str,
    },
    /// The first bytes are not those of a stream.
    #[error(
        "not a migration stream: it starts with {magic:#010x} version {version}, not {:#010x} version {}",
        crate::wire::MAGIC,
        crate::wire::VERSION
    )]
    NotAStream {
        /// The first word.
        magic: u32,
        /// The second word.
        version: u32,
    },
    /// A byte that starts no section.
    #[error("unknown section type {mark:#04x} at byte {offset}")]
    UnknownMark {
        /// The byte.
        mark: u8,
        /// Where.
        offset: u64,
    },
    /// Something that may not come at this place.
    #[error("{what} at byte {offset} is out of order")]
    OutOfOrder {
        /// What came.
        what: &'static str,
        /// Where.
        offset: u64,
    },
    /// The bytes after a section are not its footer, so the section was not what its description says.
    #[error("section {name:?} is followed by {found:02x?} at byte {offset}, not by its footer")]
    Footer {
        /// The section.
        name: String,
        /// What follows.
        found: [u8; 5],
        /// Where.
        offset: u64,
    },
    /// A name that is empty, too long or not text.
    #[error("the name of {what} is not 1 to {} bytes of text: {name:?}", crate::wire::NAME_BYTES_MAX)]
    Name {
        /// Whose name.
        what: &'static str,
        /// The name, as far as it can be printed.
        name: String,
    },
    /// A length or a number above its maximum.
    #[error("{what}: {value} is above {maximum}")]
    AboveMaximum {
        /// What is too large.
        what: &'static str,
        /// The value.
        value: u64,
        /// The largest allowed.
        maximum: u64,
    },
    /// The configuration asks for a layout that is not read.
    #[error("the stream needs the capability {0:?}, which is not supported")]
    Capability(String),
    /// A state does not fit its description.
    #[error("section {name:?} v{version}")]
    Section {
        /// The section's name.
        name: String,
        /// The version in the stream.
        version: u32,
        /// What is wrong in it.
        source: vmstate::Error,
    },
    /// The configuration or another part without a name does not fit its description.
    #[error("cannot read {what}")]
    Malformed {
        /// The part.
        what: &'static str,
        /// What is wrong in it.
        source: vmstate::Error,
    },
    /// A section that the destination has no device for.
    #[error("unexpected section {name:?} instance {instance_id}")]
    Unexpected {
        /// The section's name.
        name: String,
        /// Its instance.
        instance_id: u32,
    },
    /// A section that came before.
    #[error("section {name:?} instance {instance_id} comes twice")]
    Repeated {
        /// The section's name.
        name: String,
        /// Its instance.
        instance_id: u32,
    },
    /// A section id that an earlier section has.
    #[error("section {name:?} has the id {id} of an earlier section")]
    RepeatedId {
        /// The section's name.
        name: String,
        /// The id.
        id: u32,
    },
    /// Sections that should have come and did not.
    #[error("missing sections: {}", .0.join(", "))]
    Missing(Vec<String>),
    /// Sections that came and were not asked for.
    #[error("sections left over: {}", .0.join(", "))]
    LeftOver(Vec<String>),
    /// The start of a section that comes in parts and is not RAM. Nothing says how long its parts are.
    #[error(
        "section {name:?} at byte {offset} comes in parts of unknown length; only RAM can be read that way"
    )]
    Iterable {
        /// The section's name.
        name: String,
        /// Where.
        offset: u64,
    },
    /// A command that is not known.
    #[error("unknown command {0}")]
    UnknownCommand(u16),
    /// A message of the return path that is not known.
    #[error("unknown message {0} on the return path")]
    UnknownMessage(u16),
    /// The data of a command or a message is not what it must be.
    #[error("{what}: {why}")]
    Data {
        /// The command or message.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// RAM that does not fit the machine or the list of blocks.
    #[error("RAM: {0}")]
    Ram(String),
    /// Digests differ: the bytes are not those that were written.
    #[error("{what} is damaged: its digest is {found:#018x}, the stream says {expected:#018x}")]
    Damaged {
        /// The section, or the part of a RAM block.
        what: String,
        /// Of the bytes read.
        found: u64,
        /// As the writer computed it.
        expected: u64,
    },
    /// The stream ends without digests.
    #[error("the stream has no integrity section")]
    NoIntegrity,
    /// The integrity section speaks of other sections than those that came.
    #[error("the integrity section covers {0}")]
    Coverage(String),
    /// The trailer is not the JSON it should be.
    #[error("the trailer is not a description")]
    Trailer(#[source] serde_json::Error),
    /// The trailer lacks something.
    #[error("the trailer is not a description: {0}")]
    TrailerShape(String),
    /// The bytes of a state are not what its description says.
    #[error("at byte {offset}: {why}")]
    Unfit {
        /// Where.
        offset: u64,
        /// What is there, and what is described.
        why: String,
    },
    /// A live connection starts with something else.
    #[error("the peer does not speak this protocol: it starts with {0:02x?}")]
    Preamble([u8; 4]),
    /// A frame of a kind that is not known.
    #[error("unknown frame kind {0}")]
    FrameKind(u16),
}

impl Error {
    pub(crate) fn write(what: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Write { what, source }
    }
}

/// Why the decoder cannot go on: it needs more bytes, or never will.
#[derive(Debug)]
pub(crate) enum Stop {
    /// At least so many more.
    Needs(u64),
    /// The stream is refused.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

/// Single numbers and names only ever lack bytes; the rest names what it is.
impl From<vmstate::Error> for Stop {
    fn from(error: vmstate::Error) -> Self {
        Stop::in_part(error, |source| Error::Malformed { what: "a header", source })
    }
}

impl Stop {
    /// A part that lacks bytes may be complete later; any other problem is `refusal`.
    pub(crate) fn in_part(error: vmstate::Error, refusal: impl FnOnce(vmstate::Error) -> Error) -> Self {
        match error.problem {
            vmstate::Problem::Truncated { needed, left } => Stop::Needs(needed.saturating_sub(left).max(1)),
            _ => Stop::Failed(refusal(error)),
        }
    }
}
