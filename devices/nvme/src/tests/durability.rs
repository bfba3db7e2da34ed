//! What the guest was promised is there after a loss of power: on a disk that forgets all that was not made stable.

use std::sync::Arc;

use block::{Fault, FaultControl, FaultImage, Target, VolatileImage};
use bus::GuestMapping;
use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{NSID_BROADCAST, SubmissionEntry, feature, regs};
use proptest::prelude::*;

use super::driver::{Guest, transfer};
use crate::{ControllerConfig, NamespaceConfig};

const BLOCKS: u64 = 32;

/// What a guest does.
#[derive(Clone, Copy, Debug)]
enum Action {
    Write {
        lba: u64,
        blocks: u64,
        fua: bool,
    },
    Zeroes {
        lba: u64,
        blocks: u64,
        fua: bool,
        deallocate: bool,
    },
    Deallocate {
        lba: u64,
        blocks: u64,
    },
    Flush {
        all: bool,
    },
    /// The volatile write cache on or off.
    Cache {
        on: bool,
    },
    /// A shutdown and, without a loss of power, the next start.
    ShutDown {
        notification: u32,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let range = || (0..BLOCKS).prop_flat_map(|lba| (Just(lba), 1..=(BLOCKS - lba).min(8)));
    let rarely = || prop::bool::weighted(0.25);
    prop_oneof![
        8 => (range(), rarely()).prop_map(|((lba, blocks), fua)| Action::Write { lba, blocks, fua }),
        2 => (range(), rarely(), any::<bool>())
            .prop_map(|((lba, blocks), fua, deallocate)| Action::Zeroes { lba, blocks, fua, deallocate }),
        1 => range().prop_map(|(lba, blocks)| Action::Deallocate { lba, blocks }),
        2 => any::<bool>().prop_map(|all| Action::Flush { all }),
        1 => any::<bool>().prop_map(|on| Action::Cache { on }),
        1 => prop_oneof![Just(regs::SHN_NORMAL), Just(regs::SHN_ABRUPT)]
            .prop_map(|notification| Action::ShutDown { notification }),
    ]
}

/// What a block may hold after a loss of power: what was promised last, or anything later. Each is a choice of bytes: what is deallocated
/// reads as zeroes or as before.
#[derive(Clone, Debug)]
struct Block {
    promised: Vec<u8>,
    later: Vec<Vec<u8>>,
}

impl Block {
    fn change(&mut self, value: Option<u8>, promised: bool) {
        let before = || self.later.last().unwrap_or(&self.promised).iter().copied();
        let values = value.map_or_else(|| before().chain([0]).collect(), |value| vec![value]);
        self.later.push(values);
        if promised {
            self.promise();
        }
    }

    /// The last change is stable.
    fn promise(&mut self) {
        if let Some(last) = self.later.pop() {
            self.promised = last;
            self.later.clear();
        }
    }

    fn may_hold(&self, value: u8) -> bool {
        self.later.iter().chain([&self.promised]).any(|values| values.contains(&value))
    }
}

struct Machine {
    disk: Arc<VolatileImage>,
    control: Arc<FaultControl>,
    guest: Guest,
    page: u64,
    blocks: Vec<Block>,
    cache: bool,
    fill: u8,
}

fn config() -> ControllerConfig {
    ControllerConfig { queue_pairs: 1, vectors: 2, ..ControllerConfig::new("DURABLE") }
}

impl Machine {
    fn new() -> Self {
        let mapping = Arc::new(GuestMapping::new((BLOCKS * 512) as usize).unwrap());
        let disk = Arc::new(VolatileImage::new(mapping));
        let control = Arc::new(FaultControl::default());
        let (guest, page) = start(&disk, &control);
        let blocks = vec![Block { promised: vec![0], later: Vec::new() }; BLOCKS as usize];
        Self { disk, control, guest, page, blocks, cache: true, fill: 0 }
    }

    /// The command of an action, with its data in memory, and what it makes of which blocks.
    fn command(&mut self, action: Action) -> (SubmissionEntry, std::ops::Range<u64>, Option<u8>) {
        let with_fua = |mut entry: SubmissionEntry, fua: bool| {
            entry.cdw12 |= if fua { opcode::CDW12_FUA } else { 0 };
            entry
        };
        match action {
            Action::Write { lba, blocks, fua } => {
                self.fill = self.fill % 255 + 1;
                self.guest.write_bytes(self.page, &vec![self.fill; (blocks * 512) as usize]);
                let entry = transfer(nvm::WRITE, 1, lba, blocks as u32, self.page);
                (with_fua(entry, fua), lba..lba + blocks, Some(self.fill))
            }
            Action::Zeroes { lba, blocks, fua, deallocate } => {
                let mut entry = transfer(nvm::WRITE_ZEROES, 1, lba, blocks as u32, 0);
                (entry.prp1, entry.prp2) = (0, 0);
                entry.cdw12 |= if deallocate { opcode::CDW12_DEALLOCATE } else { 0 };
                (with_fua(entry, fua), lba..lba + blocks, Some(0))
            }
            Action::Deallocate { lba, blocks } => {
                let range = [&0_u32.to_le_bytes()[..], &(blocks as u32).to_le_bytes(), &lba.to_le_bytes()];
                self.guest.write_bytes(self.page, &range.concat());
                let entry = SubmissionEntry {
                    opcode: nvm::DATASET_MANAGEMENT,
                    nsid: 1,
                    prp1: self.page,
                    cdw11: opcode::DSM_DEALLOCATE,
                    ..SubmissionEntry::default()
                };
                (entry, lba..lba + blocks, None)
            }
            Action::Flush { all } => {
                let nsid = if all { NSID_BROADCAST } else { 1 };
                (SubmissionEntry { opcode: nvm::FLUSH, nsid, ..SubmissionEntry::default() }, 0..0, None)
            }
            Action::Cache { .. } | Action::ShutDown { .. } => unreachable!("no I/O command"),
        }
    }

    /// Does one thing and waits for its end.
    fn act(&mut self, action: Action) {
        match action {
            Action::Cache { on } => {
                let entry = SubmissionEntry {
                    opcode: admin::SET_FEATURES,
                    cdw10: feature::VOLATILE_WRITE_CACHE.into(),
                    cdw11: on.into(),
                    ..SubmissionEntry::default()
                };
                self.guest.admin(entry).unwrap();
                self.cache = on;
                if !on {
                    self.blocks.iter_mut().for_each(Block::promise);
                }
            }
            Action::ShutDown { notification } => {
                self.guest.write32(regs::CC, 0x0046_0001 | notification << 14);
                self.guest.run();
                assert_eq!(self.guest.read32(regs::CSTS) >> 2 & 3, regs::SHST_COMPLETE, "shut down");
                self.blocks.iter_mut().for_each(Block::promise);
                (self.guest, self.page) = start(&self.disk, &self.control);
                self.cache = true;
            }
            action => {
                let (entry, range, value) = self.command(action);
                self.guest.io(1, entry).unwrap();
                let fua =
                    matches!(action, Action::Write { fua: true, .. } | Action::Zeroes { fua: true, .. });
                for lba in range {
                    let promised = value.is_some() && (fua || !self.cache);
                    self.blocks[lba as usize].change(value, promised);
                }
                if matches!(action, Action::Flush { .. }) {
                    self.blocks.iter_mut().for_each(Block::promise);
                }
            }
        }
    }

    /// Begins one thing and does not wait: the disk holds it, or has done it and nobody was told.
    fn begin(&mut self, action: Action, held: bool) {
        if held {
            self.control.inject(Target::Any, 0, 1, Fault::Hold);
        }
        if !matches!(action, Action::Cache { .. } | Action::ShutDown { .. }) {
            let (entry, range, value) = self.command(action);
            self.guest.push(1, entry);
            self.guest.ring(1);
            self.guest.run();
            for lba in range {
                self.blocks[lba as usize].change(value, false);
            }
        }
    }

    /// Power goes and comes back: reads all blocks and compares.
    fn lose_power(mut self, mut keeps: impl FnMut(u64) -> bool) -> Result<(), TestCaseError> {
        drop(self.guest);
        self.disk.lose_power(&mut keeps);
        self.control.clear();
        (self.guest, self.page) = start(&self.disk, &self.control);
        for (lba, block) in (0..).zip(&self.blocks) {
            self.guest.io(1, transfer(nvm::READ, 1, lba, 1, self.page)).unwrap();
            let found = self.guest.read_bytes(self.page, 512);
            prop_assert!(found.iter().all(|&byte| byte == found[0]), "block {lba} is torn");
            prop_assert!(block.may_hold(found[0]), "block {lba} holds {}: {block:?}", found[0]);
        }
        Ok(())
    }
}

/// A fresh controller on the disk, and a page.
fn start(disk: &Arc<VolatileImage>, control: &Arc<FaultControl>) -> (Guest, u64) {
    let backend = Arc::new(FaultImage::new(Arc::clone(disk) as _, Arc::clone(control)));
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    guest.create_pair(1, 16);
    let page = guest.pages(2);
    (guest, page)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_was_promised_outlives_power(
        actions in prop::collection::vec(action(), 1..40),
        last in action(),
        held in any::<bool>(),
        mut kept in any::<u64>(),
    ) {
        let mut machine = Machine::new();
        for action in actions {
            machine.act(action);
        }
        machine.begin(last, held);
        // None, all or some of what is not stable finds its way.
        machine.lose_power(|_| {
            kept = kept.rotate_left(1);
            kept & 1 == 1
        })?;
    }
}

#[test]
fn a_cache_that_is_on_loses_what_nobody_flushed() {
    let mut machine = Machine::new();
    machine.act(Action::Write { lba: 0, blocks: 8, fua: false });
    assert_eq!(machine.disk.cached_blocks(), 8, "the disk has something to lose");
    machine.act(Action::Write { lba: 0, blocks: 2, fua: true });
    assert_eq!(machine.disk.cached_blocks(), 6);
    machine.act(Action::Cache { on: false });
    assert_eq!(machine.disk.cached_blocks(), 0);
    machine.act(Action::Write { lba: 4, blocks: 8, fua: false });
    assert_eq!(machine.disk.cached_blocks(), 0, "without a cache every write is stable");
}
