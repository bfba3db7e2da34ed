//! Two hosts against a model of what the specification says of reservations: who may do what comes from the figure as it is printed, and
//! what a command leaves from looking at who is still registered, not from the steps of the controller's code.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const BLOCKS: usize = 8;

/// Base 8.19, figure of commands: read and write by the holder, by another registrant, by anybody else; C is a conflict.
const FIGURE: [&str; 6] = ["-- -C -C", "-- CC CC", "-- -- -C", "-- -- CC", "-- -- -C", "-- -- CC"];

#[derive(Clone, Copy, Debug)]
enum Action {
    Register { key: u64 },
    Unregister { key: u64, ignore: bool },
    Replace { current: u64, key: u64, ignore: bool },
    Acquire { key: u64, kind: u8 },
    Preempt { key: u64, victim: u64, kind: u8, abort: bool },
    Release { key: u64, kind: u8 },
    Clear { key: u64 },
    Write { block: usize, fill: u8 },
    Read { block: usize },
    ReadLog,
    Migrate { second_first: bool },
}

fn action() -> impl Strategy<Value = Action> {
    let key = || 0..4u64;
    let kind = || 1..7u8;
    prop_oneof![
        4 => key().prop_map(|key| Action::Register { key }),
        1 => (key(), any::<bool>()).prop_map(|(key, ignore)| Action::Unregister { key, ignore }),
        1 => (key(), key(), any::<bool>())
            .prop_map(|(current, key, ignore)| Action::Replace { current, key, ignore }),
        5 => (key(), kind()).prop_map(|(key, kind)| Action::Acquire { key, kind }),
        4 => (key(), key(), kind(), any::<bool>())
            .prop_map(|(key, victim, kind, abort)| Action::Preempt { key, victim, kind, abort }),
        3 => (key(), kind()).prop_map(|(key, kind)| Action::Release { key, kind }),
        1 => key().prop_map(|key| Action::Clear { key }),
        4 => (0..BLOCKS, any::<u8>()).prop_map(|(block, fill)| Action::Write { block, fill }),
        4 => (0..BLOCKS).prop_map(|block| Action::Read { block }),
        1 => Just(Action::ReadLog),
        2 => any::<bool>().prop_map(|second_first| Action::Migrate { second_first }),
    ]
}

#[derive(Default)]
struct Model {
    keys: [Option<u64>; 2],
    held: Option<(u8, usize)>,
    generation: u32,
    told: [VecDeque<u8>; 2],
    disk: [u8; BLOCKS],
}

impl Model {
    fn holds(&self, host: usize) -> bool {
        self.held.is_some_and(
            |(kind, holder)| {
                if kind >= 5 { self.keys[host].is_some() } else { holder == host }
            },
        )
    }

    fn may(&self, host: usize, write: bool) -> bool {
        let Some((kind, _)) = self.held else { return true };
        let column = if self.holds(host) { 0 } else { 3 * (1 + usize::from(self.keys[host].is_none())) };
        FIGURE[usize::from(kind) - 1].as_bytes()[column + usize::from(write)] == b'-'
    }

    /// A reservation ends when nobody is left who could be its holder.
    fn settle(&mut self) {
        self.held =
            self.held.filter(
                |&(kind, holder)| {
                    if kind >= 5 { self.keys != [None, None] } else { self.keys[holder].is_some() }
                },
            );
    }

    /// What a command of `host` is answered with; the model is as it leaves the namespace.
    fn play(&mut self, host: usize, action: Action) -> Result<(), Status> {
        let conflict = Err(Status::RESERVATION_CONFLICT);
        let other = 1 - host;
        let (before, keys) = (self.held, self.keys);
        let mine = keys[host];
        match action {
            Action::Register { key } if mine.is_none_or(|mine| mine == key) => self.keys[host] = Some(key),
            Action::Register { .. } => return conflict,
            Action::Unregister { key, ignore } => match mine {
                Some(mine) if ignore || mine == key => self.keys[host] = None,
                _ => return conflict,
            },
            Action::Replace { current, key, ignore } => match mine {
                _ if ignore => self.keys[host] = Some(key),
                Some(mine) if mine == current => self.keys[host] = Some(key),
                _ => return conflict,
            },
            Action::Acquire { key, .. }
            | Action::Preempt { key, .. }
            | Action::Release { key, .. }
            | Action::Clear { key }
                if mine != Some(key) =>
            {
                return conflict;
            }
            Action::Acquire { kind, .. } => match before {
                None => self.held = Some((kind, host)),
                Some((held, _)) if held == kind && self.holds(host) => {}
                Some(_) => return conflict,
            },
            Action::Preempt { victim, kind, .. } => {
                let wins = match before {
                    None => false,
                    Some((5 | 6, _)) => victim == 0,
                    Some((_, holder)) => keys[holder] == Some(victim),
                };
                let everybody = matches!(before, Some((5 | 6, _))) && wins;
                if wins {
                    if everybody || keys[other] == Some(victim) {
                        self.keys[other] = None;
                    }
                    self.held = Some((kind, host));
                } else {
                    if victim == 0 {
                        return Err(Status::INVALID_FIELD);
                    }
                    self.keys = keys.map(|key| key.filter(|&key| key != victim));
                    if self.keys == keys {
                        return conflict;
                    }
                }
                if keys[other].is_some() && self.keys[other].is_none() {
                    self.told[other].push_back(1);
                }
                if wins && self.keys[other].is_some() && before.is_some_and(|(held, _)| held != kind) {
                    self.told[other].push_back(2);
                }
            }
            Action::Release { kind, .. } if self.holds(host) => {
                if before.is_none_or(|(held, _)| held != kind) {
                    return Err(Status::INVALID_FIELD);
                }
                self.held = None;
            }
            Action::Release { .. } => {}
            Action::Clear { .. } => {
                self.keys = [None, None];
                self.held = None;
                if keys[other].is_some() {
                    self.told[other].push_back(3);
                }
            }
            _ => {}
        }
        self.settle();
        // Registrants are told of a reservation that is gone, if they had part in it.
        let ended = before.is_some_and(|(kind, _)| kind >= 3) && self.held.is_none();
        if ended && self.keys[other].is_some() {
            self.told[other].push_back(2);
        }
        let counts = !matches!(action, Action::Acquire { .. } | Action::Release { .. });
        self.generation += u32::from(counts);
        Ok(())
    }
}

/// The entry that an action is, for the actions that change reservations.
fn entry(guest: &mut Guest, action: Action) -> Option<SubmissionEntry> {
    let ignored = |ignore: bool| if ignore { spec::IGNORE_EXISTING_KEY } else { 0 };
    let typed = |kind: u8| u32::from(kind) << 8;
    let (opcode, cdw10, keys) = match action {
        Action::Register { key } => (nvm::RESERVATION_REGISTER, spec::REGISTER, [0, key]),
        Action::Unregister { key, ignore } => {
            (nvm::RESERVATION_REGISTER, spec::UNREGISTER | ignored(ignore), [key, 0])
        }
        Action::Replace { current, key, ignore } => {
            (nvm::RESERVATION_REGISTER, spec::REPLACE | ignored(ignore), [current, key])
        }
        Action::Acquire { key, kind } => (nvm::RESERVATION_ACQUIRE, spec::ACQUIRE | typed(kind), [key, 0]),
        Action::Preempt { key, victim, kind, abort } => {
            let action = if abort { spec::PREEMPT_AND_ABORT } else { spec::PREEMPT };
            (nvm::RESERVATION_ACQUIRE, action | typed(kind), [key, victim])
        }
        Action::Release { key, kind } => (nvm::RESERVATION_RELEASE, spec::RELEASE | typed(kind), [key, 0]),
        Action::Clear { key } => (nvm::RESERVATION_RELEASE, spec::CLEAR, [key, 0]),
        _ => return None,
    };
    Some(command(guest, opcode, cdw10, keys))
}

/// Submits a command of one host while the other one's controller runs too.
fn submit(guests: &mut [Guest], host: usize, entry: SubmissionEntry) -> Result<(), Status> {
    guests[host].push(1, entry);
    guests[host].ring(1);
    for _ in 0..PATIENCE.as_millis() {
        guests.iter().for_each(Guest::run);
        if let [done] = guests[host].reap(1)[..] {
            return if done.status().is_success() { Ok(()) } else { Err(done.status().code()) };
        }
    }
    panic!("{entry:?} never ended");
}

fn play(actions: &[(usize, Action)], named: bool) {
    let namespaces = [namespace(1, BLOCKS)];
    let mut guests = hosts(&namespaces, 2);
    if named {
        name(&mut guests[0], b"first   ").unwrap();
        name(&mut guests[1], b"second  ").unwrap();
    }
    let areas = [guests[0].pages(1), guests[1].pages(1)];
    let mut model = Model::default();
    for &(host, action) in actions {
        match action {
            Action::Write { block, fill } => {
                guests[host].write_bytes(areas[host], &[fill; 512]);
                let written =
                    submit(&mut guests, host, transfer(nvm::WRITE, 1, block as u64, 1, areas[host]));
                assert_eq!(written.is_ok(), model.may(host, true), "{action:?} by {host}: {written:?}");
                if written.is_ok() {
                    model.disk[block] = fill;
                }
            }
            Action::Read { block } => {
                let read = submit(&mut guests, host, transfer(nvm::READ, 1, block as u64, 1, areas[host]));
                assert_eq!(read.is_ok(), model.may(host, false), "{action:?} by {host}: {read:?}");
                if read.is_ok() {
                    assert_eq!(guests[host].read_bytes(areas[host], 512), [model.disk[block]; 512]);
                }
            }
            Action::ReadLog => {
                let page = notification(&mut guests[host]);
                assert_eq!(page.kind, model.told[host].pop_front().unwrap_or(0));
                assert_eq!(usize::from(page.available), model.told[host].len());
            }
            Action::Migrate { second_first } => {
                migrate(&mut guests, &namespaces, if second_first { &[1, 0] } else { &[0, 1] });
            }
            _ => {
                let entry = entry(&mut guests[host], action).unwrap();
                let outcome = submit(&mut guests, host, entry);
                assert_eq!(outcome, model.play(host, action), "{action:?} by {host}");
            }
        }
        let (header, entries) = report(&mut guests[host]);
        assert_eq!(
            (header.generation, header.kind),
            (model.generation, model.held.map_or(0, |(kind, _)| kind)),
            "{action:?}"
        );
        let mut expected: Vec<_> = (0..2usize)
            .filter_map(|host| Some((host as u16, u8::from(model.holds(host)), model.keys[host]?)))
            .collect();
        expected.sort_unstable();
        assert_eq!(entries, expected, "{action:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn two_hosts_find_what_the_standard_says(
        actions in prop::collection::vec((0..2usize, action()), 1..60),
        named: bool,
    ) {
        play(&actions, named);
    }
}
