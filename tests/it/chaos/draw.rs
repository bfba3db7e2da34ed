//! What happens in a run: all of it follows from the number of the run.
//!
//! [`CELLS`] numbers that follow each other meet every phase with every act once, each time in a mode that has the phase. The rest
//! is drawn.

use std::time::Duration;

use stream::frame::Kind;
use support::{Place, Way};

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
    /// Memory goes, round by round.
    Rounds,
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
}

impl Mode {
    pub const ALL: [Self; 6] =
        [Self::Stream, Self::Channels, Self::Secure, Self::Local, Self::Postcopy, Self::Leaseless];

    fn has(self, phase: Phase) -> bool {
        match phase {
            Phase::Connections => matches!(self, Self::Channels | Self::Secure | Self::Postcopy),
            Phase::Memory => self == Self::Local,
            // What is sealed tells neither.
            Phase::Hello | Phase::Agree => self != Self::Secure,
            Phase::Rounds => !matches!(self, Self::Local | Self::Postcopy),
            Phase::Missing | Phase::Following | Phase::Recovery | Phase::Received => self == Self::Postcopy,
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
    pub const ALL: [Self; 15] = [
        Self::Hello,
        Self::Agree,
        Self::Connections,
        Self::Memory,
        Self::Rounds,
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
    pub const ALL: [Self; 10] = [
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
        }
    }
}

/// Combinations of a phase and an act.
pub const CELLS: u64 = (Phase::ALL.len() * Act::ALL.len()) as u64;
/// From one run to the next, so that those that follow each other differ; it has no divisor in common with [`CELLS`].
const STRIDE: u64 = 67;

/// A run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub mode: Mode,
    pub phase: Phase,
    pub act: Act,
    pub place: Place,
    /// Where the link is cut first, if that is needed to come to `place`.
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

/// Numbers from a seed: SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// As many small ones as large ones.
    fn of_any_size(&mut self, most_bits: u64) -> u64 {
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
        let modes: Vec<_> = Mode::ALL.into_iter().filter(|mode| mode.has(phase)).collect();
        let mode = numbers.one_of(&modes);
        let (channels, compression) = match mode {
            Mode::Stream => (0, "none"),
            Mode::Channels => (1 + numbers.below(4) as u16, numbers.one_of(&["none", "none", "lz4", "zstd"])),
            Mode::Secure => (1 + numbers.below(2) as u16, "none"),
            Mode::Local | Mode::Postcopy => (1, "none"),
            Mode::Leaseless => (numbers.below(3) as u16, "none"),
        };
        Self {
            mode,
            phase,
            act,
            place: place(&mut numbers, mode, phase, channels),
            before: (phase == Phase::Recovery).then(|| Place::Frame {
                way: Way::ToDestination,
                kind: Kind::Pages,
                after: Some(Kind::Running),
                nth: numbers.below(4) as u32,
                at: 8,
            }),
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

fn place(numbers: &mut Numbers, mode: Mode, phase: Phase, channels: u16) -> Place {
    use Way::{ToDestination, ToSource};

    // Before the frame, in its header and in its body, and after it.
    let at = numbers.one_of(&[0, 3, 8, 17, u64::MAX]);
    let nth_after = |way, kind, nth, after| Place::Frame { way, kind, after, nth, at };
    let first = |way, kind| nth_after(way, kind, 0, None);
    let first_after = |way, kind, after| nth_after(way, kind, 0, Some(after));
    match phase {
        Phase::Hello => first(ToDestination, Kind::Hello),
        Phase::Agree => first(ToSource, Kind::Agree),
        Phase::Connections if mode == Mode::Postcopy => {
            first(numbers.one_of(&[ToDestination, ToSource]), Kind::ChannelHello)
        }
        Phase::Connections => {
            let nth = numbers.below(channels.into()) as u32;
            nth_after(ToDestination, Kind::ChannelHello, nth, None)
        }
        Phase::Memory => numbers.one_of(&[first(ToDestination, Kind::Memory), first(ToSource, Kind::Mapped)]),
        Phase::Rounds if mode == Mode::Secure => Place::Byte {
            connection: 1 + numbers.below(channels.into()) as u32,
            way: ToDestination,
            // Behind the handshake, and before the end of the guest's memory.
            at: (4 << 10) + numbers.below(4 << 20),
        },
        Phase::Rounds if channels > 0 => {
            let within = at.min(1) * numbers.of_any_size(20);
            Place::Batch {
                channel: numbers.below(channels.into()) as u16,
                nth: numbers.one_of(&[Some(0), Some(1), Some(3), None]),
                at: within,
            }
        }
        Phase::Rounds => nth_after(ToDestination, Kind::Stream, numbers.of_any_size(5) as u32, None),
        Phase::Missing => numbers.one_of(&[
            first(ToDestination, Kind::Missing),
            first(ToDestination, Kind::Listed),
            first(ToSource, Kind::Listed),
            nth_after(ToDestination, Kind::Listed, 1, None),
        ]),
        Phase::Prepare => first(ToDestination, Kind::Prepare),
        Phase::Prepared => first(ToSource, Kind::Prepared),
        Phase::Commit => first(ToDestination, Kind::Commit),
        Phase::Running => first(ToSource, Kind::Running),
        Phase::Farewell if mode == Mode::Postcopy => {
            let after = numbers.one_of(&[Kind::Running, Kind::Received]);
            first_after(ToDestination, Kind::Progress, after)
        }
        Phase::Farewell => first_after(ToDestination, Kind::Progress, Kind::Running),
        Phase::Following => {
            let nth = numbers.below(4) as u32;
            let (way, kind) = numbers.one_of(&[(ToDestination, Kind::Pages), (ToSource, Kind::PageRequest)]);
            nth_after(way, kind, nth, Some(Kind::Running))
        }
        Phase::Recovery => {
            let (way, kind) = numbers.one_of(&[
                (ToDestination, Kind::Recover),
                (ToSource, Kind::Missing),
                (ToSource, Kind::Listed),
                (ToDestination, Kind::ChannelHello),
                (ToSource, Kind::ChannelHello),
                (ToDestination, Kind::Pages),
            ]);
            first_after(way, kind, Kind::Recover)
        }
        Phase::Received => first(ToSource, Kind::Received),
        Phase::Anywhere => {
            let way = numbers.one_of(&[ToDestination, ToSource]);
            let connection = match mode {
                Mode::Stream | Mode::Local => 0,
                Mode::Postcopy => numbers.below(2),
                Mode::Channels | Mode::Secure | Mode::Leaseless => numbers.below(u64::from(channels) + 1),
            };
            let at = match way {
                ToDestination => numbers.of_any_size(20),
                // Little is said there, after the handshake of TLS if there is one.
                ToSource if mode == Mode::Secure => numbers.below(2048),
                ToSource if connection > 0 => numbers.below(8),
                ToSource => numbers.below(128),
            };
            Place::Byte { connection: connection as u32, way, at }
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
