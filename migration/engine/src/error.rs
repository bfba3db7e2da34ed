//! Why a migration did not happen.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

/// What ended an attempt. Both sides show the same cause: whoever finds it tells the other.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The destination does not fit.
    #[error("the destination cannot take this machine: {}", .reasons.join("; "))]
    Refused {
        /// All of what is wrong.
        reasons: Vec<String>,
    },
    /// The machine cannot leave.
    #[error("this machine cannot migrate: {}", .reasons.join("; "))]
    Blocked {
        /// All of what is in the way.
        reasons: Vec<String>,
    },
    /// The other side ended the attempt.
    #[error("{reason}")]
    Peer {
        /// In its words.
        reason: String,
    },
    /// The destination will never run the guest of this session.
    #[error("the destination did not take the guest: {reason}")]
    Never {
        /// In its words.
        reason: String,
    },
    /// The process was told to end before it was known whose the guest is.
    #[error("told to quit before the lease said whether the guest is ours: {reason}")]
    Unsure {
        /// Why it is not known.
        reason: String,
    },
    /// The user ended it.
    #[error("migration cancelled")]
    Cancelled,
    /// The process that waited for the guest was told to end.
    #[error("the destination's process was told to end")]
    Ended,
    /// The guest dirties its memory faster than the link takes it.
    #[error(
        "no convergence after {rounds} rounds: {remaining_bytes} bytes remain, {expected:?} of downtime expected, {limit:?} allowed"
    )]
    NoConvergence {
        /// Rounds made.
        rounds: u32,
        /// Left after them.
        remaining_bytes: u64,
        /// What a stop would cost.
        expected: Duration,
        /// What it may.
        limit: Duration,
    },
    /// The same, and the user did not want to wait any longer.
    #[error(
        "not moved within {allowed:?}: {remaining_bytes} bytes remain after {rounds} rounds, {expected:?} of downtime expected, {limit:?} allowed"
    )]
    OutOfTime {
        /// The timeout.
        allowed: Duration,
        /// Rounds made, the last perhaps in part.
        rounds: u32,
        /// Left after them.
        remaining_bytes: u64,
        /// What a stop would cost.
        expected: Duration,
        /// What it may.
        limit: Duration,
    },
    /// The source brings what it brought before, and not its guest.
    #[error(
        "the guest did not come within {allowed:?}, in which {bytes} bytes of its memory and images came, {again_bytes} of them again"
    )]
    NoHeadway {
        /// The time that it had: see [`Patience::repetition`](crate::Patience::repetition).
        allowed: Duration,
        /// What came of contents.
        bytes: u64,
        /// What of that was for pages and blocks that had come before.
        again_bytes: u64,
    },
    /// The user wants a way out that the two sides have not agreed on.
    #[error(
        "the guest is to be moved ahead of its memory (postcopy) when rounds or time are used up, and the two sides have not agreed on that"
    )]
    PostcopyNotAgreed,
    /// The process was told to end while the guest, which is elsewhere, still needs memory of it.
    #[error(
        "this process was told to end, and the guest at the destination cannot go on: it lacks {bytes} bytes that were only here"
    )]
    LeftBehind {
        /// What it lacks.
        bytes: u64,
    },
    /// The destination cannot bring the guest, which is there, the rest of its memory.
    #[error("the guest ended at the destination, which could not go on with it: {reason}")]
    GuestLost {
        /// In its words.
        reason: String,
    },
    /// The link broke.
    #[error("connection lost while {doing}")]
    Lost {
        /// The step.
        doing: &'static str,
        /// How.
        source: io::Error,
    },
    /// The peer closed the link.
    #[error("the other side closed the connection while {doing}")]
    Closed {
        /// The step.
        doing: &'static str,
    },
    /// The peer is silent or slow, or does not take what it is sent.
    #[error("the other side took more than {waited:?} while {doing}")]
    TimedOut {
        /// The step.
        doing: &'static str,
        /// How long.
        waited: Duration,
    },
    /// The peer sent what it must not.
    #[error("unexpected data while {doing}: {reason}")]
    Protocol {
        /// The step.
        doing: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The machine failed.
    #[error("cannot {doing}")]
    Machine {
        /// The step.
        doing: &'static str,
        /// Why.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A file failed.
    #[error("cannot {doing} {path}")]
    File {
        /// The step.
        doing: &'static str,
        /// Which file.
        path: String,
        /// Why.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A piece of guest memory cannot be had from its file.
    #[error("cannot restore the memory at {offset:#x} of block {block:?} from {path}")]
    Memory {
        /// The file.
        path: String,
        /// Of the machine.
        block: String,
        /// In the block, in bytes.
        offset: u64,
        /// Why.
        source: Box<stream::Error>,
    },
    /// A snapshot of what has changed needs the one before it.
    #[error("the snapshot {child} needs its parent {parent}, which cannot be used")]
    Parent {
        /// The snapshot.
        child: String,
        /// What it is based on.
        parent: String,
        /// Why not.
        source: Box<Error>,
    },
    /// What the guest has written since a snapshot is not known.
    #[error("what has changed since the snapshot {parent} is not known: {reason}")]
    NotTracked {
        /// The snapshot.
        parent: String,
        /// Why.
        reason: String,
    },
    /// The stream is refused, or could not be written.
    #[error("cannot {doing}")]
    Stream {
        /// The step.
        doing: &'static str,
        /// Why.
        source: Box<stream::Error>,
    },
    /// The lease does not allow it.
    #[error(transparent)]
    Lease(#[from] crate::lease::Error),
    /// No link came about.
    #[error(transparent)]
    Transport(#[from] transport::Error),
}

impl Error {
    pub(crate) fn machine(doing: &'static str) -> impl Fn(Box<dyn StdError + Send + Sync>) -> Self {
        move |source| Self::Machine { doing, source }
    }

    /// A link that failed. One that was not secure comes out again.
    pub(crate) fn lost(doing: &'static str, source: io::Error) -> Self {
        match source.downcast::<transport::Error>() {
            Ok(error) => Self::Transport(error),
            Err(source) => Self::Lost { doing, source },
        }
    }

    /// A failure of the stream; one of the link or of the user below it comes out again.
    pub(crate) fn stream(doing: &'static str) -> impl Fn(stream::Error) -> Self {
        move |error| match error {
            stream::Error::Write { what, source } => match source.downcast::<Self>() {
                Ok(inner) => inner,
                Err(source) => {
                    Self::Stream { doing, source: Box::new(stream::Error::Write { what, source }) }
                }
            },
            source => Self::Stream { doing, source: Box::new(source) },
        }
    }

    /// Whether the other side knows already, since it said so itself.
    pub(crate) fn came_from_peer(&self) -> bool {
        matches!(self, Self::Peer { .. } | Self::Refused { .. } | Self::Never { .. })
    }

    /// Whether nothing tells what the other side did: it may not even know that the attempt is over.
    pub(crate) fn link_is_gone(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Closed { .. } | Self::TimedOut { .. })
    }

    /// The error with all of its sources, in one line. Some of the words may be a peer's, or out of a file, and they go to terminals and
    /// logs: there are no control characters in it.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            let cause = error.to_string();
            if !text.ends_with(&cause) {
                text.push_str(": ");
                text.push_str(&cause);
            }
            source = error.source();
        }
        text.replace(char::is_control, " ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a device says it whose saved state names what it lies on.
    #[test]
    fn what_is_told_of_an_error_is_one_line_and_does_nothing_to_a_terminal() {
        let error = Error::machine("load the devices")("backend: file here, \u{1b}[2J\u{9b}K\n there".into());
        let text = error.chain();
        assert!(text.ends_with("backend: file here,  [2J K  there"), "{text:?}");
    }
}
