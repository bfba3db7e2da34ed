//! Where in a migration a phase is: the frame, the batch or the byte at which something happens.

use stream::frame::Kind;
use support::{Place, Way};

use super::draw::{Mode, Numbers, Phase};

/// Where the link stands still on the way to a place of `phase`: what is there is cut, or looked at.
pub fn before(numbers: &mut Numbers, phase: Phase) -> Option<Place> {
    let way = Way::ToDestination;
    match phase {
        Phase::Recovery => {
            let (after, nth) = (Some(Kind::Running), numbers.below(4) as u32);
            Some(Place::Frame { way, kind: Kind::Pages, after, nth, at: 8 })
        }
        // The guest may stand still from here on.
        Phase::LastBlocks => {
            Some(Place::Frame { way, kind: Kind::Blocks, after: Some(Kind::Settled), nth: 0, at: 0 })
        }
        _ => None,
    }
}

/// A place of `phase`, as a migration of this `mode` over so many `channels` has it.
pub fn place(numbers: &mut Numbers, mode: Mode, phase: Phase, channels: u16) -> Place {
    use Way::{ToDestination, ToSource};

    // Before the frame, in its header and in its body, and after it.
    let at = numbers.one_of(&[0, 3, 8, 17, u64::MAX]);
    let nth_after = |way, kind, nth, after| Place::Frame { way, kind, after, nth, at };
    let first = |way, kind| nth_after(way, kind, 0, None);
    let first_after = |way, kind, after| nth_after(way, kind, 0, Some(after));
    match phase {
        Phase::Hello => first(ToDestination, Kind::Hello),
        Phase::Agree => first(ToSource, Kind::Agree),
        Phase::Connections if mode.is_postcopy() => {
            first(numbers.one_of(&[ToDestination, ToSource]), Kind::ChannelHello)
        }
        Phase::Connections => {
            let nth = numbers.below(channels.into()) as u32;
            nth_after(ToDestination, Kind::ChannelHello, nth, None)
        }
        Phase::Memory => numbers.one_of(&[first(ToDestination, Kind::Memory), first(ToSource, Kind::Mapped)]),
        Phase::Blocks => {
            let within = at.min(1) * numbers.of_any_size(19);
            let nth = numbers.of_any_size(6) as u32;
            Place::Frame { way: ToDestination, kind: Kind::Blocks, after: None, nth, at: within }
        }
        Phase::LastBlocks => nth_after(ToDestination, Kind::Blocks, numbers.of_any_size(3) as u32, None),
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
        Phase::Farewell if mode.is_postcopy() && !mode.is_secure() => {
            let after = numbers.one_of(&[Kind::Running, Kind::Received]);
            first_after(ToDestination, Kind::Progress, after)
        }
        Phase::Farewell => first_after(ToDestination, Kind::Progress, Kind::Running),
        Phase::Following => {
            let nth = numbers.below(4) as u32;
            let (way, kind) = numbers.one_of(&[(ToDestination, Kind::Pages), (ToSource, Kind::PageRequest)]);
            nth_after(way, kind, nth, Some(Kind::Running))
        }
        // It is known by its length, which is that of another.
        Phase::Recovery if mode.is_secure() => {
            let (way, kind) = numbers.one_of(&[
                (ToDestination, Kind::Query),
                (ToDestination, Kind::ChannelHello),
                (ToSource, Kind::ChannelHello),
                (ToDestination, Kind::Pages),
            ]);
            first_after(way, kind, Kind::Query)
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
                Mode::Postcopy | Mode::SecurePostcopy | Mode::LeaselessPostcopy => numbers.below(2),
                Mode::Channels | Mode::Secure | Mode::Leaseless | Mode::Storage => {
                    numbers.below(u64::from(channels) + 1)
                }
            };
            let at = match way {
                ToDestination => numbers.of_any_size(20),
                // Little is said there, after the handshake of TLS if there is one.
                ToSource if mode.is_secure() => numbers.below(2048),
                ToSource if connection > 0 => numbers.below(8),
                ToSource => numbers.below(128),
            };
            Place::Byte { connection: connection as u32, way, at }
        }
    }
}
