//! What goes wrong, in the form of an `error` line.

use core::fmt::{self, Display};

use nvme_spec::Status;

/// Where a command was: controller, queue (0 the admin queue).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the controller, from 0.
    pub controller: usize,
    /// Queue identifier.
    pub queue: u16,
}

impl Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "controller={} queue={}", self.controller, self.queue)
    }
}

/// A failure. Displayed as the fields of an `error` line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The machine lacks something that the command line needs.
    Machine {
        /// What.
        reason: &'static str,
    },
    /// A controller did not do what it must.
    Controller {
        /// Number of the controller.
        controller: usize,
        /// What went wrong.
        reason: &'static str,
        /// The value that shows it: a register, a count.
        value: u64,
    },
    /// A command completed with a status that it should not have.
    Status {
        /// Where.
        place: Place,
        /// Its opcode.
        opcode: u8,
        /// Its namespace.
        nsid: u32,
        /// Its first block, or command dword 10 and 11.
        block: u64,
        /// The status.
        status: Status,
    },
    /// A completion entry that no controller may write.
    Completion {
        /// Where.
        place: Place,
        /// What is wrong with it.
        reason: &'static str,
        /// Its command identifier.
        cid: u16,
        /// Its submission queue head.
        sq_head: u16,
    },
    /// Nothing completed for too long.
    Stall {
        /// Where.
        place: Place,
        /// Commands that wait in this queue.
        outstanding: u32,
        /// Whether a completion is there and only its interrupt is missing.
        completion_waits: bool,
        /// Submission queue tail as last rung.
        tail: u32,
        /// Completion queue head.
        head: u32,
        /// Arrivals of the queue's interrupt.
        interrupts: u64,
    },
    /// A block does not hold what was written.
    Block {
        /// Where it was read.
        place: Place,
        /// Namespace.
        nsid: u32,
        /// Block.
        block: u64,
        /// Generation that was written last.
        generation: u32,
        /// First wrong 8-byte word.
        word: usize,
        /// What it should hold.
        expected: u64,
        /// What it holds.
        found: u64,
    },
    /// A page of RAM does not hold what was written.
    Page {
        /// Physical address.
        address: u64,
        /// Generation that was written last.
        generation: u32,
        /// First wrong 8-byte word.
        word: usize,
        /// What it should hold.
        expected: u64,
        /// What it holds.
        found: u64,
    },
    /// Time went back.
    Time {
        /// Which clock.
        clock: &'static str,
        /// By how much, in its unit.
        back: u64,
    },
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine { reason } => write!(f, "kind=machine reason=\"{reason}\""),
            Self::Controller { controller, reason, value } => {
                write!(f, "kind=controller controller={controller} value={value:#x} reason=\"{reason}\"")
            }
            Self::Status { place, opcode, nsid, block, status } => write!(
                f,
                "kind=status {place} opcode={opcode:#x} nsid={nsid} block={block} status={:#x}",
                status.code().0
            ),
            Self::Completion { place, reason, cid, sq_head } => {
                write!(f, "kind=completion {place} cid={cid} sq_head={sq_head} reason=\"{reason}\"")
            }
            Self::Stall { place, outstanding, completion_waits, tail, head, interrupts } => write!(
                f,
                "kind=stall {place} outstanding={outstanding} completion_waits={} tail={tail} head={head} interrupts={interrupts}",
                u8::from(*completion_waits)
            ),
            Self::Block { place, nsid, block, generation, word, expected, found } => write!(
                f,
                "kind=block {place} nsid={nsid} block={block} generation={generation} word={word} expected={expected:#x} found={found:#x}"
            ),
            Self::Page { address, generation, word, expected, found } => write!(
                f,
                "kind=page address={address:#x} generation={generation} word={word} expected={expected:#x} found={found:#x}"
            ),
            Self::Time { clock, back } => write!(f, "kind=time clock={clock} back={back}"),
        }
    }
}
