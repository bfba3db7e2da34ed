//! What happens in a run: all of it follows from the number of the run.
//!
//! [`CELLS`] numbers that follow each other meet every phase with every act once, each time in a mode that has the phase. The rest
//! is drawn.

use std::time::Duration;

use stream::frame::Kind;
use support::{Place, Way};

use super::place::{before, place};

/// How the guest moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Memory goes over the link of everything else.
    Stream,
    /// Over data channels, which may compress.
    Channels,
    /// All links with TLS.
    Secure,
    /// The memory itself goes.
    Local,
    /// Memory follows.
    Postcopy,
    /// Nothing but the two processes and an operator knows whose the guest is.
    Leaseless,
    /// The guest's images go with it.
    Storage,
    /// Memory follows, over links with TLS.
    SecurePostcopy,
    /// Memory follows, and nothing but the two processes and an operator knows whose the guest is.
    LeaselessPostcopy,
}

/// A guest, of those that move in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Its image has a lease that both sides see.
    Leased,
    /// It has no image.
    Leaseless,
    /// It takes its images along.
    WithImages,
}

/// Where in a migration something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The source says what it is.
    Hello,
    /// The destination has built it.
    Agree,
    /// Further connections are made.
    Connections,
    /// Descriptors of memory go.
    Memory,
    /// Blocks of images go, while the guest runs.
    Blocks,
    /// Memory goes, round by round.
    Rounds,
    /// The last blocks go, and the guest stands still.
    LastBlocks,
    /// The pages that will follow are named.
    Missing,
    /// Everything was sent.
    Prepare,
    /// Everything is loaded.
    Prepared,
    /// The guest is given away.
    Commit,
    /// It is taken.
    Running,
    /// The source says that it has heard so.
    Farewell,
    /// Memory follows its guest.
    Following,
    /// It is brought over new links, since the first were lost.
    Recovery,
    /// All of it is there.
    Received,
    /// At any byte.
    Anywhere,
}

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    Cut,
    HalfClose,
    /// What is said vanishes, and then the link is cut.
    Swallow,
    Delay,
    Kill(Side),
    /// The process stands still.
    Stop(Side),
    /// It stands still, and the link is cut meanwhile, behind what is there.
    StopAndCut(Side),
    /// The source's user does not want it any more.
    Cancel,
}

impl Mode {
    pub const ALL: [Self; 9] = [
        Self::Stream,
        Self::Channels,
        Self::Secure,
        Self::Local,
        Self::Postcopy,
        Self::Leaseless,
        Self::Storage,
        Self::SecurePostcopy,
        Self::LeaselessPostcopy,
    ];

    /// Whose migration it is.
    pub fn which(self) -> Which {
        match self {
            Self::Leaseless | Self::LeaselessPostcopy => Which::Leaseless,
            Self::Storage => Which::WithImages,
            _ => Which::Leased,
        }
    }

    /// Whether all links have TLS.
    pub fn is_secure(self) -> bool {
        matches!(self, Self::Secure | Self::SecurePostcopy)
    }

    /// Whether memory follows its guest.
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::Postcopy | Self::SecurePostcopy | Self::LeaselessPostcopy)
    }

    fn has(self, phase: Phase) -> bool {
        match phase {
            Phase::Connections => self.is_postcopy() || matches!(self, Self::Channels | Self::Secure),
            Phase::Memory => self == Self::Local,
            // What is sealed tells neither.
            Phase::Hello | Phase::Agree => !self.is_secure(),
            Phase::Blocks | Phase::LastBlocks => self == Self::Storage,
            Phase::Rounds => !self.is_postcopy() && self != Self::Local,
            // What is sealed tells neither of them.
            Phase::Missing | Phase::Received => self.is_postcopy() && !self.is_secure(),
            Phase::Following | Phase::Recovery => self.is_postcopy(),
            Phase::Prepare
            | Phase::Prepared
            | Phase::Commit
            | Phase::Running
            | Phase::Farewell
            | Phase::Anywhere => true,
        }
    }
}

impl Phase {
    pub const ALL: [Self; 17] = [
        Self::Hello,
        Self::Agree,
        Self::Connections,
        Self::Memory,
        Self::Blocks,
        Self::Rounds,
        Self::LastBlocks,
        Self::Missing,
        Self::Prepare,
        Self::Prepared,
        Self::Commit,
        Self::Running,
        Self::Farewell,
        Self::Following,
        Self::Recovery,
        Self::Received,
        Self::Anywhere,
    ];
}

impl Act {
    pub const ALL: [Self; 11] = [
        Self::Cut,
        Self::HalfClose,
        Self::Swallow,
        Self::Delay,
        Self::Kill(Side::Source),
        Self::Kill(Side::Destination),
        Self::Stop(Side::Source),
        Self::Stop(Side::Destination),
        Self::StopAndCut(Side::Source),
        Self::StopAndCut(Side::Destination),
        Self::Cancel,
    ];

    /// In a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cut => "cut",
            Self::HalfClose => "half",
            Self::Swallow => "lose",
            Self::Delay => "delay",
            Self::Kill(Side::Source) => "kill-s",
            Self::Kill(Side::Destination) => "kill-d",
            Self::Stop(Side::Source) => "stop-s",
            Self::Stop(Side::Destination) => "stop-d",
            Self::StopAndCut(Side::Source) => "stopcut-s",
            Self::StopAndCut(Side::Destination) => "stopcut-d",
            Self::Cancel => "cancel",
        }
    }
}

/// Combinations of a phase and an act.
pub const CELLS: u64 = (Phase::ALL.len() * Act::ALL.len()) as u64;
/// From one run to the next, so that those that follow each other differ; it has no divisor in common with [`CELLS`].
const STRIDE: u64 = 62;

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub mode: Mode,
    pub phase: Phase,
    pub act: Act,
    pub place: Place,
    /// Where the link stands still first, if that is needed to come to `place`.
    pub before: Option<Place>,
    /// How long a process stands still, or the link.
    pub moment: Duration,
    /// Whether the link carries new connections at once after it was cut.
    pub heals: bool,
    pub channels: u16,
    pub compression: &'static str,
    /// What `migrate` is told of postcopy.
    pub postcopy: &'static str,
}

impl Run {
    /// Whether the two sides, if both live, can tell each other why the guest does not move: the link on which they do is whole.
    pub fn can_be_explained(&self) -> bool {
        let is_first = match self.place {
            Place::Byte { connection, .. } => connection == 0,
            // What is sealed is known by its length, which others have too.
            Place::Frame { kind, .. } => {
                self.mode.is_secure() || !matches!(kind, Kind::ChannelHello | Kind::Pages | Kind::PageRequest)
            }
            Place::Message { .. } => true,
            Place::Batch { .. } => false,
        };
        match self.act {
            Act::Cancel | Act::Delay | Act::Stop(_) => true,
            Act::Cut | Act::HalfClose | Act::Swallow | Act::StopAndCut(_) => !is_first,
            Act::Kill(_) => false,
        }
    }
}

/// Numbers from a seed: SplitMix64.
pub struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// As many small ones as large ones.
    pub fn of_any_size(&mut self, most_bits: u64) -> u64 {
        let bits = self.below(most_bits + 1);
        self.below(1 << bits)
    }
}

impl Run {
    /// The run of this number.
    pub fn drawn(seed: u64) -> Self {
        let mut numbers = Numbers(seed);
        let cell = (seed % CELLS * STRIDE % CELLS) as usize;
        let (phase, act) = (Phase::ALL[cell / Act::ALL.len()], Act::ALL[cell % Act::ALL.len()]);
        let modes = Mode::ALL.into_iter().filter(|mode| mode.has(phase));
        // Memory that is passed and memory that follows have phases of their own.
        let twice = |mode: Mode| if mode == Mode::Local || mode.is_postcopy() { 1 } else { 2 };
        let modes: Vec<_> = modes.flat_map(|mode| std::iter::repeat_n(mode, twice(mode))).collect();
        let mode = numbers.one_of(&modes);
        let (channels, compression) = match mode {
            Mode::Stream => (0, "none"),
            Mode::Channels => (1 + numbers.below(4) as u16, numbers.one_of(&["none", "none", "lz4", "zstd"])),
            Mode::Secure => (1 + numbers.below(2) as u16, "none"),
            Mode::Local | Mode::Postcopy | Mode::SecurePostcopy | Mode::LeaselessPostcopy => (1, "none"),
            Mode::Leaseless | Mode::Storage => (numbers.below(3) as u16, "none"),
        };
        Self {
            mode,
            phase,
            act,
            place: place(&mut numbers, mode, phase, channels),
            before: before(&mut numbers, phase),
            moment: Duration::from_millis(1 + numbers.below(120)),
            heals: numbers.below(2) == 0,
            channels,
            compression,
            // A guest that lacks everything asks for pages for sure.
            postcopy: if phase == Phase::Following {
                "now"
            } else {
                numbers.one_of(&["now", "after-first-round"])
            },
        }
    }
}

impl Run {
    /// What happens at the message `nth` that one side of a migration sends, whose memory goes over the link of everything else.
    pub fn at_message(way: Way, nth: u32, act: Act) -> Self {
        // Before the frame, in its header and in its body, and after it.
        let at = [0, 3, 17, u64::MAX][nth as usize % 4];
        Self {
            mode: Mode::Stream,
            phase: Phase::Anywhere,
            act,
            place: Place::Message { way, nth, at },
            before: None,
            moment: Duration::from_millis(20),
            heals: nth.is_multiple_of(2),
            channels: 0,
            compression: "none",
            postcopy: "now",
        }
    }
}

/// Without a guest: what the numbers promise.
#[test]
fn the_first_runs_meet_every_phase_with_every_act_and_every_mode() {
    let runs: Vec<_> = (0..CELLS).map(Run::drawn).collect();
    for phase in Phase::ALL {
        for act in Act::ALL {
            let met = runs.iter().filter(|run| (run.phase, run.act) == (phase, act)).count();
            assert_eq!(met, 1, "{phase:?} {act:?}");
        }
    }
    for mode in Mode::ALL {
        let met = runs.iter().filter(|run| run.mode == mode);
        assert!(met.clone().count() >= 10, "{mode:?}");
        assert!(met.clone().all(|run| mode.has(run.phase)), "{mode:?}");
    }
    assert_eq!(Run::drawn(4711), Run::drawn(4711));
    assert_ne!(Run::drawn(4711), Run::drawn(4711 + CELLS), "the same phase and act, and another place");
}
