//! The controller memory buffer: queues, lists and data in it, and the addresses by which commands name it.

use std::sync::Arc;
use std::time::Instant;

use bus::GuestMapping;
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{Status, SubmissionEntry, regs};
use pci::{BarKind, PciFunction};
use vm_memory::bitmap::Bitmap;

use super::driver::{Guest, PATIENCE, Pair, guest_memory, namespace, transfer};
use crate::window::{self, BUFFER_START};
use crate::{ControllerConfig, Error, memory_with_buffer};

const BUFFER_BYTES: u64 = 64 << 10;
/// Where the guest has it: beyond its RAM.
const BASE: u64 = 0xd000_0000;
const ENABLED: u64 = regs::CMBMSC_CRE | regs::CMBMSC_CMSE;

fn config() -> ControllerConfig {
    ControllerConfig {
        queue_pairs: 4,
        vectors: 5,
        buffer_bytes: BUFFER_BYTES,
        ..ControllerConfig::new("BUFFER")
    }
}

/// A guest that has switched the buffer on.
fn guest() -> Guest {
    let mut guest = Guest::ready(config(), vec![namespace(1, 64)]);
    open(&mut guest, BASE);
    guest
}

pub fn open(guest: &mut Guest, base: u64) {
    guest.write64(regs::CMBMSC, base | ENABLED);
    guest.buffer = Some(base);
}

/// Queue pair `id` with vector `id` in two pages of the buffer.
pub fn create_pair_in_buffer(guest: &mut Guest, id: u16, entries: u32, base: u64) {
    let (cq_base, sq_base) = (base, base + 4096);
    guest.create_cq(id, entries, cq_base, id).unwrap();
    guest.create_sq(id, entries, sq_base, id).unwrap();
    let pair = Pair { cq_id: id, sq_base, cq_base, entries, tail: 0, head: 0, phase: true, next_cid: 0 };
    guest.queues.insert(id, pair);
}

#[test]
fn the_registers_say_where_the_buffer_is_and_what_it_is_for() {
    let mut guest = Guest::power_on(config(), vec![]);
    assert_eq!(guest.read64(regs::CAP) >> 57 & 1, 1, "CAP.CMBS");
    assert_eq!((guest.read32(regs::CMBLOC), guest.read32(regs::CMBSZ)), (0, 0), "not before CMBMSC.CRE");
    guest.write64(regs::CMBMSC, !regs::CMBMSC_CMSE);
    assert_eq!(guest.read64(regs::CMBMSC), 0xffff_ffff_ffff_f001, "reserved bits are not kept");
    assert_eq!(guest.read32(regs::CMBSTS), 0, "not asked for");
    // In BAR 2 at offset 0; everything may be in it, and mixed. 16 units of 4 KiB.
    assert_eq!((guest.read32(regs::CMBLOC), guest.read32(regs::CMBSZ)), (0xfa, 16 << 12 | 0x1f));
    let bars = guest.controller.bars();
    assert_eq!(bars.len(), 2);
    assert_eq!(
        (bars[1].bar, bars[1].kind, bars[1].length_bytes),
        (2, BarKind::Memory64Prefetchable, BUFFER_BYTES)
    );
    // CBAI.
    guest.write64(regs::CMBMSC, u64::MAX);
    assert_eq!(guest.read32(regs::CMBSTS), 1);
    // By halves, as Linux writes it, and kept over a controller reset, but not over one of the subsystem.
    guest.write32(regs::CMBMSC, BASE as u32 | 3);
    guest.write32(regs::CMBMSC + 4, 7);
    assert_eq!((guest.read64(regs::CMBMSC), guest.read32(regs::CMBSTS)), (7 << 32 | BASE | 3, 0));
    guest.enable();
    guest.write32(regs::CC, 0);
    guest.run();
    assert_eq!(guest.read64(regs::CMBMSC), 7 << 32 | BASE | 3);
    guest.write32(regs::NSSR, regs::NSSR_MAGIC);
    guest.run();
    assert_eq!(guest.read64(regs::CMBMSC), 0);
}

#[test]
fn queues_lists_and_data_in_the_buffer_work_and_move() {
    let mut guest = guest();
    create_pair_in_buffer(&mut guest, 1, 8, BASE);
    let (list, data) = (BASE + 0x2000, BASE + 0x4000);
    // Four pages: in the buffer, in RAM, and in the buffer again, by a list in the buffer.
    let ram = guest.pages(1);
    let pages = [data, ram, data + 0x2000, data + 0x1000];
    let bytes: Vec<u8> = pages[1..].iter().flat_map(|page| page.to_le_bytes()).collect();
    guest.write_bytes(list, &bytes);
    for (fill, page) in (1..).zip(pages) {
        guest.write_bytes(page, &[fill; 4096]);
    }
    let whole = |opcode| SubmissionEntry { prp2: list, ..transfer(opcode, 1, 8, 32, data) };
    guest.io(1, whole(nvm::WRITE)).unwrap();
    for workers in [1, 3] {
        pages.iter().for_each(|&page| guest.clear(page, 4096));
        guest.io(1, whole(nvm::READ)).unwrap();
        for (fill, page) in (1..).zip(pages) {
            assert!(guest.read_bytes(page, 4096) == vec![fill; 4096], "page {fill}");
        }
        // With the queue's contents, which are memory, and the commands that were not fetched.
        guest.push(1, transfer(nvm::READ, 1, 8, 1, data));
        guest.ring(1);
        guest.migrate(workers);
        guest.run();
        assert_eq!(guest.reap(1).len(), 1);
        assert_eq!(guest.read64(regs::CMBMSC), BASE | ENABLED);
    }
}

#[test]
fn a_buffer_that_moves_keeps_its_queues() {
    let mut guest = guest();
    create_pair_in_buffer(&mut guest, 1, 8, BASE);
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    // The driver's addresses move along.
    let moved = BASE + 0x10_0000;
    open(&mut guest, moved);
    let pair = guest.queues.get_mut(&1).unwrap();
    (pair.sq_base, pair.cq_base) = (moved + 4096, moved);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, moved + 0x3000)).unwrap();
    guest.migrate(2);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, moved + 0x3000)).unwrap();
    assert_eq!(
        guest.io(1, transfer(nvm::READ, 1, 0, 1, BASE)),
        Err(Status::DATA_TRANSFER_ERROR),
        "the old place"
    );
    // Closed, its queues go on; commands cannot name it.
    guest.write64(regs::CMBMSC, regs::CMBMSC_CRE | moved);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
    assert_eq!(guest.io(1, transfer(nvm::READ, 1, 0, 1, moved)), Err(Status::DATA_TRANSFER_ERROR));
    guest.migrate(1);
    guest.io(1, transfer(nvm::READ, 1, 0, 1, page)).unwrap();
}

#[test]
fn the_admin_queues_may_be_in_the_buffer() {
    let mut guest = Guest::power_on(config(), vec![namespace(1, 64)]);
    guest.unmask_interrupts();
    open(&mut guest, BASE);
    let (sq_base, cq_base) = (BASE + 0x8000, BASE + 0x9000);
    guest.write32(regs::AQA, 31 << 16 | 31);
    guest.write64(regs::ASQ, sq_base);
    guest.write64(regs::ACQ, cq_base);
    guest.write32(regs::CC, 0x0046_0001);
    let pair = Pair { cq_id: 0, sq_base, cq_base, entries: 32, tail: 0, head: 0, phase: true, next_cid: 0 };
    guest.queues.insert(0, pair);
    guest.run();
    assert_eq!(guest.read32(regs::CSTS), 1);
    guest.identify(1, 0).unwrap();
    guest.migrate(1);
    guest.identify(1, 0).unwrap();
    // Although the guest has moved the buffer away from under ASQ and ACQ.
    let moved = BASE + 0x10_0000;
    open(&mut guest, moved);
    let pair = guest.queues.get_mut(&0).unwrap();
    (pair.sq_base, pair.cq_base) = (moved + 0x8000, moved + 0x9000);
    guest.migrate(2);
    guest.identify(1, 0).unwrap();
}

#[test]
fn what_is_neither_ram_nor_the_buffer_is_refused() {
    let mut guest = guest();
    create_pair_in_buffer(&mut guest, 1, 8, BASE);
    let end = BASE + BUFFER_BYTES;
    let create = |opcode, prp1, cdw11| SubmissionEntry {
        opcode,
        prp1,
        cdw10: 2 | 1023 << 16,
        cdw11,
        ..SubmissionEntry::default()
    };
    // Across the end; beyond it; where the buffer is inside the controller.
    for (address, status) in [
        (end - 4096, Status::INVALID_USE_OF_CMB),
        (end, Status::INVALID_FIELD),
        (1 << 60, Status::DATA_TRANSFER_ERROR),
        (u64::MAX - 0xfff, Status::DATA_TRANSFER_ERROR),
    ] {
        assert_eq!(guest.admin(create(admin::CREATE_CQ, address, 3)), Err(status), "{address:#x}");
        assert_eq!(guest.admin(create(admin::CREATE_SQ, address, 1 << 16 | 1)), Err(status), "{address:#x}");
    }
    let data = |address| transfer(nvm::READ, 1, 0, 1, address);
    for address in [end, BASE - 4096, 1 << 60, (1 << 60) + 4096, u64::MAX - 8191] {
        assert_eq!(guest.io(1, data(address)), Err(Status::DATA_TRANSFER_ERROR), "{address:#x}");
    }
    let buffers = |prp1, prp2| SubmissionEntry {
        opcode: admin::DOORBELL_BUFFER_CONFIG,
        prp1,
        prp2,
        ..SubmissionEntry::default()
    };
    let ram = guest.pages(1);
    for (shadow, event_index) in [(BASE, ram), (ram, BASE), (1 << 60, ram), (ram, 1 << 60)] {
        assert_eq!(guest.admin(buffers(shadow, event_index)), Err(Status::INVALID_FIELD));
    }
    // Beyond the BAR.
    let mut data = [0xaa; 8];
    guest.controller.bar_read(2, BUFFER_BYTES - 4, &mut data);
    assert_eq!(data, [0; 8]);
    guest.controller.bar_read(2, u64::MAX, &mut data);
    guest.controller.bar_write(2, u64::MAX, &data);
}

#[test]
fn what_is_written_to_the_buffer_is_marked_like_ram() {
    let buffer = Arc::new(GuestMapping::new(BUFFER_BYTES as usize).unwrap());
    let memory = memory_with_buffer(&guest_memory(), Arc::clone(&buffer)).unwrap();
    window::write(&memory, BUFFER_START, BUFFER_BYTES, 0x3004, &[1, 2, 3, 4]);
    let marked: Vec<_> = (0..16).filter(|page| buffer.bitmap().dirty_at(page * 4096)).collect();
    assert_eq!(marked, [3]);
    let mut data = [0; 8];
    window::read(&memory, BUFFER_START, BUFFER_BYTES, 0x3000, &mut data);
    assert_eq!(data, [0, 0, 0, 0, 1, 2, 3, 4]);
}

#[test]
fn buffers_that_cannot_be_are_refused() {
    let memory = guest_memory();
    for bytes in [2048, 12 << 10] {
        let buffer = Arc::new(GuestMapping::new(bytes).unwrap());
        assert!(
            matches!(memory_with_buffer(&memory, buffer), Err(Error::Buffer { length_bytes }) if length_bytes == bytes as u64)
        );
    }
    let buffer = Arc::new(GuestMapping::new(4096).unwrap());
    let with = memory_with_buffer(&memory, buffer.clone()).unwrap();
    assert!(memory_with_buffer(&with, buffer).is_err(), "there is one");
    for buffer_bytes in [1, 2048, 3 << 12, 1 << 32] {
        assert!(ControllerConfig { buffer_bytes, ..config() }.check().is_err());
    }
    // Guest memory and configuration must agree.
    let build = |memory: &bus::GuestMemory, buffer_bytes| {
        let (contexts, _) = super::driver::contexts(memory, 1, 8);
        let config = ControllerConfig { buffer_bytes, ..config() };
        let (sink, host) = (Arc::default(), Arc::default());
        let (sink, host): (Arc<super::driver::Interrupts>, Arc<super::driver::Process>) = (sink, host);
        crate::Controller::new(config, memory.clone(), &[], contexts, sink, host).map(drop)
    };
    build(&with, 4096).unwrap();
    build(&memory, 0).unwrap();
    for (memory, bytes) in [(&with, 0), (&with, 8192), (&memory, 4096)] {
        assert!(matches!(build(memory, bytes), Err(Error::Config { .. })), "{bytes}");
    }
}

#[test]
fn a_state_that_no_guest_can_bring_about_is_refused() {
    let mut guest = guest();
    create_pair_in_buffer(&mut guest, 1, 8, BASE);
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    assert_eq!(state.cq.get(1).unwrap().pages, [1 << 60]);
    type Change = fn(&mut crate::NvmeState);
    let changes: [(&str, Change); 6] = [
        ("buffer.control", |s| s.buffer.as_mut().unwrap().control = 0),
        ("buffer.control", |s| s.buffer.as_mut().unwrap().control |= 4),
        ("cq[1].pages", |s| s.cq.get_mut(1).unwrap().pages[0] += 64),
        ("cq[1].pages", |s| s.cq.get_mut(1).unwrap().pages[0] += BUFFER_BYTES),
        ("sq[1].pages", |s| s.sq.get_mut(1).unwrap().pages[0] = u64::MAX - 4095),
        ("PCI part", |s| s.pci.config.bar_length_bytes[2] /= 2),
    ];
    for (field, change) in changes {
        let mut state = state.clone();
        change(&mut state);
        let (contexts, _) = super::driver::contexts(&guest.memory, 1, 8);
        let restored = crate::Controller::restore(
            &state,
            guest.config.clone(),
            guest.memory.clone(),
            &guest.namespaces,
            contexts,
            Arc::new(super::driver::Interrupts::default()),
            Arc::new(super::driver::Process::default()),
        );
        let error = restored.map(drop).unwrap_err().to_string();
        assert!(error.contains(field), "{field}: {error}");
    }
}
