//! Two controllers of one subsystem, each with a host of its own: random commands of both against one reference disk, with reservations
//! and namespaces that are attached and detached, and moves of both between any two steps, commands that nobody has fetched among them.

use std::sync::Arc;
use std::time::Instant;

use nvme_spec::opcode::{admin, attachment, nvm};
use nvme_spec::reservation as spec;
use nvme_spec::{Status, SubmissionEntry, feature};
use proptest::prelude::*;

use super::Reference;
use crate::tests::driver::{Guest, PATIENCE, namespace, transfer};
use crate::tests::shared::{admin_of, attachment_entry, command_of, end_of};
use crate::tests::store::Memory;
use crate::{Controller, ControllerConfig, NamespaceConfig, NvmeState, Subsystem};

const BLOCKS: u64 = 16;
/// Of both hosts, by host.
const KEYS: [u64; 2] = [0xa1, 0xb2];

/// What the hosts do next; namespaces are 0 and 1, for identifiers 1 and 2.
#[derive(Clone, Copy, Debug)]
enum Action {
    /// An I/O command; with `moves` both controllers move between its doorbell and its fetch.
    Io {
        host: usize,
        at: usize,
        kind: Kind,
        lba: u64,
        blocks: u64,
        moves: bool,
    },
    /// Reads of both hosts at once.
    Burst {
        count: [u64; 2],
        at: usize,
        moves: bool,
    },
    Register {
        host: usize,
        at: usize,
    },
    Unregister {
        host: usize,
        at: usize,
    },
    Acquire {
        host: usize,
        at: usize,
        kind: u8,
    },
    Release {
        host: usize,
        at: usize,
    },
    Attach {
        host: usize,
        at: usize,
        to: usize,
    },
    Detach {
        host: usize,
        at: usize,
        from: usize,
    },
    Move {
        second_first: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Write { fill: u8 },
    Read,
    Zeroes,
    Uncorrectable,
    Compare { differs: bool },
}

fn action() -> impl Strategy<Value = Action> {
    let who = || (0..2usize, 0..2usize);
    let range = (0..BLOCKS).prop_flat_map(|lba| (Just(lba), 1..=(BLOCKS - lba).min(8)));
    let kind = prop_oneof![
        3 => any::<u8>().prop_map(|fill| Kind::Write { fill }),
        3 => Just(Kind::Read),
        1 => Just(Kind::Zeroes),
        1 => Just(Kind::Uncorrectable),
        1 => any::<bool>().prop_map(|differs| Kind::Compare { differs }),
    ];
    let moves = || prop::bool::weighted(0.2);
    prop_oneof![
        12 => (who(), kind, range, moves()).prop_map(|((host, at), kind, (lba, blocks), moves)| {
            Action::Io { host, at, kind, lba, blocks, moves }
        }),
        2 => (0..6u64, 0..6u64, 0..2usize, moves())
            .prop_map(|(first, second, at, moves)| Action::Burst { count: [first, second], at, moves }),
        2 => who().prop_map(|(host, at)| Action::Register { host, at }),
        1 => who().prop_map(|(host, at)| Action::Unregister { host, at }),
        2 => (who(), 1..7u8).prop_map(|((host, at), kind)| Action::Acquire { host, at, kind }),
        2 => who().prop_map(|(host, at)| Action::Release { host, at }),
        3 => (who(), 0..2usize).prop_map(|((host, at), to)| Action::Attach { host, at, to }),
        1 => (who(), 0..2usize).prop_map(|((host, at), from)| Action::Detach { host, at, from }),
        2 => any::<bool>().prop_map(|second_first| Action::Move { second_first }),
    ]
}

/// What is to be found of one namespace.
struct Model {
    disk: Reference,
    attached: [bool; 2],
    registered: [bool; 2],
    held: Option<(u8, usize)>,
}

impl Model {
    fn new() -> Self {
        Self { disk: Reference::new(), attached: [true; 2], registered: [false; 2], held: None }
    }

    /// Base 8.19, the figure of commands.
    fn conflicts(&self, host: usize, writes: bool) -> bool {
        self.held.is_some_and(|(kind, holder)| {
            let admitted = holder == host || kind > 2 && self.registered[host];
            !admitted && (writes || kind % 2 == 0)
        })
    }

    fn holds(&self, host: usize) -> bool {
        self.held.is_some_and(|(kind, holder)| holder == host || kind > 4 && self.registered[host])
    }

    /// Whether an I/O command of the host comes to the namespace at all.
    fn admits(&self, host: usize, writes: bool) -> Result<(), Status> {
        match (self.attached[host], self.conflicts(host, writes)) {
            (false, _) => Err(Status::INVALID_FIELD),
            (true, true) => Err(Status::RESERVATION_CONFLICT),
            (true, false) => Ok(()),
        }
    }
}

struct Pair {
    guests: [Guest; 2],
    namespaces: Vec<NamespaceConfig>,
    store: Arc<Memory>,
}

impl Pair {
    fn new() -> Self {
        let store = Memory::new(0);
        let namespaces: Vec<_> = [1, 2].map(|nsid| namespace(nsid, BLOCKS as usize)).into();
        let subsystem = Subsystem::with_store("PAIR", &namespaces, true, store.clone() as _, None).unwrap();
        let guests = [0, 1].map(|id| {
            let name = format!("PAIR{id}");
            let config = ControllerConfig { queue_pairs: 2, vectors: 3, ..ControllerConfig::new(&name) };
            let mut guest = Guest::member(&subsystem, id, config);
            guest.enable();
            guest.create_pair(1, 8);
            let page = guest.pages(1);
            guest.write_bytes(page, &[id as u8 + 1; 8]);
            let identify = SubmissionEntry {
                opcode: admin::SET_FEATURES,
                prp1: page,
                cdw10: feature::HOST_IDENTIFIER.into(),
                ..SubmissionEntry::default()
            };
            guest.admin(identify).unwrap();
            guest
        });
        Self { guests, namespaces, store }
    }

    /// Both go on in others, which load in an order of their own.
    fn go(&mut self, second_first: bool) {
        let controllers = self.guests.each_ref().map(|guest| &*guest.controller);
        Controller::pause_all(&controllers, Instant::now() + PATIENCE).unwrap();
        let states = self.guests.each_ref().map(|guest| {
            let state = guest.controller.save();
            let bytes = vmstate::to_bytes(&state);
            assert!(vmstate::from_bytes::<NvmeState>(&bytes, 2).unwrap() == state);
            state
        });
        let (store, saved) = (self.store.clone(), self.store.state());
        let there = Subsystem::with_store("PAIR", &self.namespaces, true, store as _, saved).unwrap();
        let successors = [0, 1].map(|id| self.guests[usize::from(id)].successor(&there, id));
        for index in if second_first { [1, 0] } else { [0, 1] } {
            successors[index].controller.load(&states[index]).unwrap();
        }
        for (guest, (successor, state)) in self.guests.iter_mut().zip(successors.into_iter().zip(&states)) {
            assert!(successor.controller.save() == *state, "what was restored saves the same");
            successor.controller.resume();
            guest.move_to(successor);
        }
    }

    fn reserve(
        &mut self,
        host: usize,
        at: usize,
        opcode: u8,
        cdw10: u32,
        keys: [u64; 2],
    ) -> Result<(), Status> {
        let prp1 = self.guests[host].pages(1);
        self.guests[host].write_bytes(prp1, &keys.map(u64::to_le_bytes).concat());
        let entry =
            SubmissionEntry { opcode, nsid: at as u32 + 1, prp1, cdw10, ..SubmissionEntry::default() };
        command_of(&mut self.guests, host, 1, entry).map(drop)
    }

    fn attach(&mut self, host: usize, select: u32, at: usize, id: usize) -> Result<(), Status> {
        let entry = attachment_entry(&mut self.guests[host], select, at as u32 + 1, &[id as u16]);
        admin_of(&mut self.guests, host, entry).map(drop)
    }
}

fn play(actions: &[Action]) {
    let mut pair = Pair::new();
    let mut models = [Model::new(), Model::new()];
    let areas = pair.guests.each_mut().map(|guest| guest.pages(1));
    for action in actions {
        match *action {
            Action::Io { host, at, kind, lba, blocks, moves } => {
                let model = &mut models[at];
                let bytes = (blocks * 512) as usize;
                let (opcode, writes, data) = match kind {
                    Kind::Write { fill } => (nvm::WRITE, true, vec![fill; bytes]),
                    Kind::Read => (nvm::READ, false, vec![0; bytes]),
                    Kind::Zeroes => (nvm::WRITE_ZEROES, true, vec![0; bytes]),
                    Kind::Uncorrectable => (nvm::WRITE_UNCORRECTABLE, true, vec![0; bytes]),
                    Kind::Compare { differs } => {
                        let mut data = model.disk.blocks(lba, blocks).to_vec();
                        data[bytes - 1] ^= u8::from(differs);
                        (nvm::COMPARE, false, data)
                    }
                };
                let expected = model.admits(host, writes).and_then(|()| match kind {
                    Kind::Read => model.disk.reads(lba, blocks),
                    Kind::Compare { differs } => model.disk.reads(lba, blocks).and(if differs {
                        Err(Status::COMPARE_FAILURE)
                    } else {
                        Ok(())
                    }),
                    _ => Ok(()),
                });
                pair.guests[host].write_bytes(areas[host], &data);
                let entry = transfer(opcode, at as u32 + 1, lba, blocks as u32, areas[host]);
                let cid = pair.guests[host].push(1, entry);
                pair.guests[host].ring(1);
                if moves {
                    pair.go(lba % 2 == 0);
                }
                let outcome = end_of(&mut pair.guests, host, 1, cid).map(drop);
                assert_eq!(outcome, expected, "{action:?}");
                match kind {
                    _ if expected.is_err() => {}
                    Kind::Write { .. } | Kind::Zeroes => model.disk.write(lba, &data),
                    Kind::Uncorrectable => {
                        model.disk.marked[lba as usize..(lba + blocks) as usize].fill(true);
                    }
                    Kind::Read => {
                        let read = pair.guests[host].read_bytes(areas[host], bytes);
                        assert!(read == model.disk.blocks(lba, blocks), "{action:?}");
                    }
                    Kind::Compare { .. } => {}
                }
            }
            Action::Burst { count, at, moves } => {
                let cids = [0, 1].map(|host| -> Vec<u16> {
                    let read = |lba| transfer(nvm::READ, at as u32 + 1, lba, 1, areas[host]);
                    let cids = (0..count[host]).map(|lba| pair.guests[host].push(1, read(lba))).collect();
                    pair.guests[host].ring(1);
                    cids
                });
                if moves {
                    pair.go(count[0] > count[1]);
                }
                let mut ended = [Vec::new(), Vec::new()];
                let start = Instant::now();
                while ended.each_ref().map(Vec::len) != cids.each_ref().map(Vec::len) {
                    for (guest, ended) in pair.guests.iter_mut().zip(&mut ended) {
                        guest.run();
                        ended.extend(guest.reap(1).iter().map(|entry| entry.cid));
                    }
                    assert!(start.elapsed() < PATIENCE, "{action:?}: {ended:?} of {cids:?}");
                }
                ended.iter_mut().for_each(|ended| ended.sort_unstable());
                assert_eq!(ended, cids, "each ends once");
            }
            Action::Register { host, at } => {
                let outcome =
                    pair.reserve(host, at, nvm::RESERVATION_REGISTER, spec::REGISTER, [0, KEYS[host]]);
                let expected = if models[at].attached[host] { Ok(()) } else { Err(Status::INVALID_FIELD) };
                assert_eq!(outcome, expected, "{action:?}");
                models[at].registered[host] |= expected.is_ok();
            }
            Action::Unregister { host, at } => {
                let model = &mut models[at];
                let outcome =
                    pair.reserve(host, at, nvm::RESERVATION_REGISTER, spec::UNREGISTER, [KEYS[host], 0]);
                let expected = match (model.attached[host], model.registered[host]) {
                    (false, _) => Err(Status::INVALID_FIELD),
                    (true, false) => Err(Status::RESERVATION_CONFLICT),
                    (true, true) => Ok(()),
                };
                assert_eq!(outcome, expected, "{action:?}");
                if expected.is_ok() {
                    model.registered[host] = false;
                    let other = 1 - host;
                    model.held = match model.held {
                        Some((kind, _)) if kind > 4 => model.registered[other].then_some((kind, other)),
                        held => held.filter(|&(_, holder)| holder != host),
                    };
                }
            }
            Action::Acquire { host, at, kind } => {
                let model = &mut models[at];
                let cdw10 = spec::ACQUIRE | u32::from(kind) << 8;
                let outcome = pair.reserve(host, at, nvm::RESERVATION_ACQUIRE, cdw10, [KEYS[host], 0]);
                let free = model.held.is_none_or(|(held, _)| held == kind && model.holds(host));
                let expected = match (model.attached[host], model.registered[host] && free) {
                    (false, _) => Err(Status::INVALID_FIELD),
                    (true, false) => Err(Status::RESERVATION_CONFLICT),
                    (true, true) => Ok(()),
                };
                assert_eq!(outcome, expected, "{action:?}");
                if expected.is_ok() {
                    model.held = model.held.or(Some((kind, host)));
                }
            }
            Action::Release { host, at } => {
                let model = &mut models[at];
                let kind = model.held.map_or(1, |(kind, _)| kind);
                let cdw10 = spec::RELEASE | u32::from(kind) << 8;
                let outcome = pair.reserve(host, at, nvm::RESERVATION_RELEASE, cdw10, [KEYS[host], 0]);
                let expected = match (model.attached[host], model.registered[host]) {
                    (false, _) => Err(Status::INVALID_FIELD),
                    (true, false) => Err(Status::RESERVATION_CONFLICT),
                    (true, true) => Ok(()),
                };
                assert_eq!(outcome, expected, "{action:?}");
                if expected.is_ok() && model.holds(host) {
                    model.held = None;
                }
            }
            Action::Attach { host, at, to } => {
                let model = &mut models[at];
                let expected = match (model.conflicts(host, true), model.attached[to]) {
                    (true, _) => Err(Status::RESERVATION_CONFLICT),
                    (false, true) => Err(Status::NAMESPACE_ALREADY_ATTACHED),
                    (false, false) => Ok(()),
                };
                assert_eq!(pair.attach(host, attachment::ATTACH, at, to), expected, "{action:?}");
                model.attached[to] |= expected.is_ok();
            }
            Action::Detach { host, at, from } => {
                let model = &mut models[at];
                let expected = match (model.conflicts(host, true), model.attached[from]) {
                    (true, _) => Err(Status::RESERVATION_CONFLICT),
                    (false, false) => Err(Status::NAMESPACE_NOT_ATTACHED),
                    (false, true) => Ok(()),
                };
                assert_eq!(pair.attach(host, attachment::DETACH, at, from), expected, "{action:?}");
                model.attached[from] &= expected.is_err();
            }
            Action::Move { second_first } => pair.go(second_first),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn two_controllers_show_one_disk_to_their_hosts(actions in prop::collection::vec(action(), 1..60)) {
        play(&actions);
    }
}
