//! Random guests whose controller works in the background: formats, sanitize operations and self-tests, begun and migrated at any pass,
//! against a reference disk.

use nvme_spec::opcode::{self, admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, log};
use proptest::prelude::*;

use super::driver::{Guest, namespace, transfer};
use crate::ControllerConfig;

const NAMESPACES: [u32; 2] = [1, 42];
const BLOCKS: u64 = 64;

/// What happens next.
#[derive(Clone, Copy, Debug)]
enum Action {
    /// A block is written.
    Write { which: usize, lba: u64, fill: u8 },
    /// Begins an operation and migrates after as many passes of worker 0.
    Begin { operation: Operation, passes: usize, workers: usize },
}

/// What the controller does in the background.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Format(u32),
    Sanitize,
    SelfTest,
}

impl Operation {
    fn entry(self) -> SubmissionEntry {
        let (opcode, nsid, cdw10) = match self {
            Self::Format(nsid) => (admin::FORMAT_NVM, nsid, 0),
            // Two overwrites, and the blocks given back.
            Self::Sanitize => (admin::SANITIZE, 0, opcode::SANITIZE_OVERWRITE | 2 << 4),
            Self::SelfTest => (admin::DEVICE_SELF_TEST, NSID_BROADCAST, 2),
        };
        SubmissionEntry { opcode, nsid, cdw10, ..SubmissionEntry::default() }
    }

    /// Whether it is over, as its log says.
    fn is_over(self, guest: &mut Guest, page: u64) -> bool {
        let log = match self {
            Self::Format(_) => return true,
            Self::Sanitize => log::id::SANITIZE_STATUS,
            Self::SelfTest => log::id::DEVICE_SELF_TEST,
        };
        let cdw10 = u32::from(log) | 2 << 16;
        let read =
            SubmissionEntry { opcode: admin::GET_LOG_PAGE, prp1: page, cdw10, ..SubmissionEntry::default() };
        guest.admin(read).unwrap();
        let log = guest.read_bytes(page, 12);
        match self {
            Self::SelfTest if log[0] == 0 => {
                assert_eq!(log[4], 0x20, "it found nothing");
                true
            }
            Self::SelfTest => false,
            _ => log[2] & 7 == 1,
        }
    }

    /// Whether it erases a namespace.
    fn erases(self, nsid: u32) -> bool {
        match self {
            Self::Format(scope) => scope == nsid || scope == NSID_BROADCAST,
            // Memory does not give blocks back: it keeps what overwrote them, and the pattern is 0.
            Self::Sanitize => true,
            Self::SelfTest => false,
        }
    }
}

fn action() -> impl Strategy<Value = Action> {
    let scope = prop_oneof![Just(1u32), Just(42), Just(NSID_BROADCAST)];
    let operation =
        prop_oneof![scope.prop_map(Operation::Format), Just(Operation::Sanitize), Just(Operation::SelfTest)];
    prop_oneof![
        (0..2usize, 0..BLOCKS, 1..=255u8).prop_map(|(which, lba, fill)| Action::Write { which, lba, fill }),
        (operation, 0..12usize, 1..4usize).prop_map(|(operation, passes, workers)| Action::Begin {
            operation,
            passes,
            workers
        }),
    ]
}

fn play(actions: &[Action]) {
    let namespaces = NAMESPACES.map(|nsid| namespace(nsid, BLOCKS as usize));
    let mut guest = Guest::ready(ControllerConfig::new("BACKGROUND"), namespaces.into());
    guest.create_pair(1, 8);
    let area = guest.pages(2);
    let mut reference = [[0u8; BLOCKS as usize]; 2];
    for action in actions {
        match *action {
            Action::Write { which, lba, fill } => {
                guest.write_bytes(area, &[fill; 512]);
                guest.io(1, transfer(nvm::WRITE, NAMESPACES[which], lba, 1, area)).unwrap();
                reference[which][lba as usize] = fill;
            }
            Action::Begin { operation, passes, workers } => {
                let cid = guest.push(0, operation.entry());
                guest.ring(0);
                (0..passes).for_each(|_| _ = guest.controller.process(0));
                guest.migrate(workers);
                let mut ended = Vec::new();
                guest.run_until("the answer", |guest| {
                    ended.extend(guest.reap(0).iter().map(|entry| (entry.cid, entry.status())));
                    !ended.is_empty()
                });
                assert_eq!(ended, [(cid, Status::SUCCESS)]);
                guest.run_until("the end of the operation", |guest| operation.is_over(guest, area));
                for (nsid, disk) in NAMESPACES.into_iter().zip(&mut reference) {
                    if operation.erases(nsid) {
                        disk.fill(0);
                    }
                }
            }
        }
        for (nsid, disk) in NAMESPACES.into_iter().zip(&reference) {
            // Sixteen blocks at a time, which two pages hold.
            for (first, fills) in disk.chunks(16).enumerate() {
                guest.io(1, transfer(nvm::READ, nsid, first as u64 * 16, 16, area)).unwrap();
                let read = guest.read_bytes(area, 16 * 512);
                assert!(read.chunks(512).zip(fills).all(|(block, fill)| block == [*fill; 512]), "{action:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// However far an operation has come when the controller moves, it ends once and does all of its work.
    #[test]
    fn operations_end_whenever_the_controller_moves(actions in prop::collection::vec(action(), 1..12)) {
        play(&actions);
    }
}
