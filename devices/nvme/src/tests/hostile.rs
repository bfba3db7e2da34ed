//! A guest that does what no driver does: the controller comes to rest, stays bounded, and can be saved and restored.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use block::{Backend, Fault, FaultControl, FaultImage, Identity, IoContext, Request, Target};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{Status, SubmissionEntry, regs};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use crate::{Controller, ControllerConfig, NamespaceConfig, Progress};

fn config() -> ControllerConfig {
    ControllerConfig::new("HOSTILE")
}

/// Runs `worker` alone until it comes to rest.
fn settle(guest: &Guest, worker: usize) {
    (0..100).find(|_| guest.controller.process(worker) == Progress::Idle).expect("it comes to rest");
}

/// An admin command that worker 0 serves while the others sleep; dword 0 and status.
fn admin_alone(guest: &mut Guest, entry: SubmissionEntry) -> (u32, Status) {
    guest.push(0, entry);
    guest.ring(0);
    settle(guest, 0);
    let entries = guest.reap(0);
    assert_eq!(entries.len(), 1);
    (entries[0].dw0, entries[0].status())
}

fn abort(queue: u16, cid: u16) -> SubmissionEntry {
    SubmissionEntry {
        opcode: admin::ABORT,
        cdw10: u32::from(queue) | u32::from(cid) << 16,
        ..SubmissionEntry::default()
    }
}

#[test]
fn a_keep_alive_timer_that_nobody_looks_at_calls_nobody() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    let set =
        SubmissionEntry { opcode: admin::SET_FEATURES, cdw10: 0x0f, cdw11: 1, ..SubmissionEntry::default() };
    guest.admin(set).unwrap();
    assert!(guest.controller.deadline().is_some());
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    assert!(guest.controller.deadline().is_none(), "paused");
    guest.controller.resume();
    assert!(guest.controller.deadline().is_some());
    guest.write32(regs::CC, 0x0046_4001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1 | 2 << 2);
    assert!(guest.controller.deadline().is_none(), "shut down");
}

#[test]
fn a_flush_that_found_no_slot_is_done_when_all_commands_end_at_once() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let mut guest = Guest::with_workers(config(), namespaces, 1, 4);
    guest.enable();
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    control.inject(Target::Read, 0, 4, Fault::Hold);
    for lba in 0..4 {
        guest.push(1, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(1);
    guest.run();
    assert_eq!(guest.controller.statistics().in_flight, 4);
    let write_cache_off =
        SubmissionEntry { opcode: admin::SET_FEATURES, cdw10: 6, ..SubmissionEntry::default() };
    guest.push(0, write_cache_off);
    guest.ring(0);
    guest.run();
    assert!(guest.reap(0).is_empty());
    control.release_held();
    guest.run_until("the flush", |guest| !guest.reap(0).is_empty());
    assert_eq!(guest.reap(1).len(), 4);
}

#[test]
fn of_many_flushes_that_found_no_slot_each_is_answered() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let mut guest = Guest::with_workers(config(), namespaces, 1, 2);
    guest.enable();
    guest.create_pair(1, 8);
    let page = guest.pages(1);
    control.inject(Target::Read, 0, 2, Fault::Hold);
    for lba in 0..2 {
        guest.push(1, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(1);
    guest.run();
    let set_write_cache = |on| SubmissionEntry {
        opcode: admin::SET_FEATURES,
        cdw10: 6,
        cdw11: on,
        ..SubmissionEntry::default()
    };
    let mut waiting: Vec<_> = [0, 1, 0, 1, 0].map(|on| guest.push(0, set_write_cache(on))).into();
    guest.ring(0);
    guest.run();
    let mut answered: Vec<_> = guest.reap(0).iter().map(|entry| entry.cid).collect();
    assert_eq!(answered, [waiting[1], waiting[3]], "nothing is to be flushed");
    control.release_held();
    guest.run_until("the flushes", |guest| {
        answered.extend(guest.reap(0).iter().map(|entry| entry.cid));
        answered.len() == waiting.len()
    });
    answered.sort_unstable();
    waiting.sort_unstable();
    assert_eq!(answered, waiting);
}

#[test]
fn entry_sizes_written_while_enabled_do_not_keep_a_guest_from_moving() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    for cc in [0x0000_0001, 0x0055_0001] {
        guest.write32(regs::CC, cc);
        assert_eq!(guest.read32(regs::CC), 0x0046_0001);
    }
    guest.migrate(2);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
}

#[test]
fn a_shutdown_in_the_same_write_as_the_enable_can_be_saved() {
    let mut guest = Guest::power_on(config(), vec![namespace(1, 64)]);
    guest.write32(regs::CC, 0x0046_4001);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 2 << 2);
    guest.migrate(2);
    assert_eq!(guest.read32(regs::CSTS), 2 << 2);
    guest.write32(regs::CC, 0);
    guest.run();
    guest.enable();
}

#[test]
fn a_tail_that_is_moved_back_over_an_aborted_command_can_be_saved() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 16);
    let page = guest.pages(1);
    for lba in 0..3 {
        guest.push(1, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(1);
    assert_eq!(admin_alone(&mut guest, abort(1, 2)), (0, Status::SUCCESS));
    guest.write32(regs::sq_tail_doorbell(1), 1);
    guest.migrate(2);
    guest.run();
    let ended: Vec<_> = guest.reap(1).iter().map(|entry| (entry.cid, entry.status().code())).collect();
    assert_eq!(ended, [(2, Status::ABORT_REQUESTED), (0, Status::SUCCESS)]);
}

#[test]
fn aborts_are_bounded() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 1024);
    let page = guest.pages(1);
    for _ in 0..300 {
        guest.push(1, transfer(nvm::READ, 1, 0, 1, page));
    }
    guest.ring(1);
    let aborted = (0..300).filter(|&cid| admin_alone(&mut guest, abort(1, cid)).0 == 0).count();
    assert_eq!(aborted, 256);
    // The others are served, the aborted ones are skipped, and then more can be aborted.
    guest.run();
    assert_eq!(guest.reap(1).len(), 300);
    let cid = guest.push(1, transfer(nvm::READ, 1, 0, 1, page));
    guest.ring(1);
    assert_eq!(admin_alone(&mut guest, abort(1, cid)).0, 0);
}

#[test]
fn aborted_commands_of_many_queues_pile_up_to_a_bound_only() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 2);
    let shared = guest.queues[&1].clone();
    let page = guest.pages(1);
    for id in 2..5 {
        let sq_base = guest.pages(4);
        guest.create_sq(id, 256, sq_base, 1).unwrap();
        guest.queues.insert(id, super::driver::Pair { sq_base, entries: 256, ..shared.clone() });
    }
    for id in 2..5 {
        for _ in 0..200 {
            guest.push(id, transfer(nvm::READ, 1, 0, 1, page));
        }
        guest.ring(id);
    }
    let mut aborted = 0;
    for (id, cid) in (2..5).flat_map(|id| (0..200).map(move |cid| (id, cid))) {
        let (dw0, status) = admin_alone(&mut guest, abort(id, cid));
        assert_eq!(status, Status::SUCCESS);
        aborted += 1 - dw0;
    }
    // One found its place in the completion queue.
    assert_eq!(aborted, 257);
    guest.migrate(2);
    let mut ended = Vec::new();
    guest.run_until("all completions", |guest| {
        ended.extend(guest.reap(1));
        ended.len() == 600
    });
    let is_abort = |entry: &&nvme_spec::CompletionEntry| entry.status().code() == Status::ABORT_REQUESTED;
    assert_eq!(ended.iter().filter(is_abort).count(), 257);
}

#[test]
fn admin_commands_that_wait_are_bounded() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(32768), control.clone()));
    let config = ControllerConfig { queue_pairs: 400, ..config() };
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let mut guest = Guest::with_workers(config, namespaces, 2, 512);
    guest.enable();
    let (page, cq_base) = (guest.pages(1), guest.pages(2));
    guest.create_cq(1, 512, cq_base, 1).unwrap();
    control.inject(Target::Any, 0, 300, Fault::Hold);
    for id in 1..=300 {
        let sq_base = guest.pages(1);
        guest.create_sq(id, 2, sq_base, 1).unwrap();
        guest.write_bytes(sq_base, &transfer(nvm::WRITE, 1, 0, 1, page).to_bytes());
        guest.write32(regs::sq_tail_doorbell(id), 1);
    }
    guest.run();
    assert_eq!(control.held(), 300);
    let delete =
        |id: u32| SubmissionEntry { opcode: admin::DELETE_SQ, cdw10: id, ..SubmissionEntry::default() };
    let mut answered = Vec::new();
    let mut deleted = 0;
    for _ in 0..10 {
        for _ in 0..30 {
            deleted += 1;
            guest.push(0, delete(deleted));
        }
        guest.ring(0);
        guest.run();
        answered.extend(guest.reap(0));
        let waiting = crate::shared::lock(&guest.controller.admin).deletes.len();
        assert!(waiting <= 256, "{waiting}");
        if waiting == 256 {
            break;
        }
    }
    assert!(answered.is_empty());
    control.release_held();
    guest.run_until("the deletions", |guest| {
        answered.extend(guest.reap(0));
        answered.len() == deleted as usize
    });
    assert!(answered.iter().all(|entry| entry.status().is_success()));
}

#[test]
fn commands_that_fail_at_once_do_not_pile_up() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 2);
    let shared = guest.queues[&1].clone();
    for id in 2..8 {
        let sq_base = guest.pages(4);
        guest.create_sq(id, 256, sq_base, 1).unwrap();
        guest.queues.insert(id, super::driver::Pair { sq_base, entries: 256, ..shared.clone() });
    }
    for id in 2..8 {
        for _ in 0..255 {
            guest.push(id, SubmissionEntry { opcode: 0x7f, ..SubmissionEntry::default() });
        }
        guest.ring(id);
    }
    settle(&guest, 1);
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let held = guest.controller.save().cq.get(1).unwrap().backlog.len();
    assert!((1..=256).contains(&held), "{held}");
    guest.controller.resume();
    let mut ended = 0;
    guest.run_until("all completions", |guest| {
        ended += guest.reap(1).len();
        ended == 6 * 255
    });
}

#[test]
fn a_doorbell_write_that_crosses_the_making_of_its_queue_leaves_nothing_behind() {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    guest.create_pair(1, 8);
    // Checked against the queue before, stored after the smaller one was made.
    let doorbells = &guest.controller.pool.shared.doorbells;
    doorbells.open_sq(0, 4096, 0, 4000);
    doorbells.open_sq(1, 4096, 1, 4000);
    settle(&guest, 0);
    settle(&guest, 1);
    guest.migrate(2);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
}

/// An image that carries out everything at once, while someone asks the controller to pause.
#[derive(Debug)]
struct PausedWhileBusy(Arc<dyn Backend>, OnceLock<Handle>);

struct Handle(Arc<Controller>);

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("controller")
    }
}

impl Backend for PausedWhileBusy {
    fn identity(&self) -> Identity {
        self.0.identity()
    }

    fn migratability(&self) -> vmstate::Migratability {
        self.0.migratability()
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        self.0.submit(context, request);
        self.1.get().unwrap().0.begin_pause();
    }

    fn sync(&self) -> Result<(), block::Error> {
        self.0.sync()
    }

    fn release(&self) -> Result<(), block::Error> {
        self.0.release()
    }

    fn acquire(&self) -> Result<(), block::Error> {
        self.0.acquire()
    }
}

#[test]
fn a_pause_waits_for_no_command_that_was_not_begun() {
    let image = Arc::new(PausedWhileBusy(memory_image(32768), OnceLock::new()));
    let backend = Arc::clone(&image) as _;
    let mut guest =
        Guest::ready(config(), vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }]);
    image.1.set(Handle(Arc::clone(&guest.controller))).unwrap();
    guest.create_pair(1, 32);
    let page = guest.pages(1);
    for lba in 0..20 {
        guest.push(1, transfer(nvm::READ, 1, lba, 1, page));
    }
    guest.ring(1);
    for _ in 0..20 {
        guest.run();
        assert_eq!(guest.reap(1).len(), 1);
        guest.controller.resume();
    }
}
