//! Commands that meet, and what the end of power, of a controller or of guest memory leaves of them.

use std::sync::Arc;

use block::{
    Backend, Failure, Fault, FaultControl, FaultImage, FileImage, FileOptions, Target, VolatileImage,
};
use bus::GuestMapping;
use nvme_spec::opcode::{self, nvm};
use nvme_spec::{Status, SubmissionEntry, feature, regs};
use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::{ACTION, Disk, Fields, GUARD, IMAGE_BYTES, REFERENCE, config, namespace_on, protected};
use crate::Subsystem;
use crate::tests::driver::{Guest, memory_image, transfer};

fn held_disk() -> (Disk, Arc<FaultControl>) {
    let control = Arc::new(FaultControl::default());
    let image = Arc::new(FaultImage::new(memory_image(IMAGE_BYTES), Arc::clone(&control)));
    (Disk::on(image, 512, protected(1, false)), control)
}

/// Ends of commands of a queue, by command identifier.
fn ends(guest: &mut Guest, queue: u16, count: usize) -> Vec<(u16, Status)> {
    let mut ended = Vec::new();
    guest.run_until("the commands", |guest| {
        ended.extend(guest.reap(queue).iter().map(|entry| (entry.cid, entry.status().code())));
        ended.len() >= count
    });
    ended
}

#[test]
fn commands_at_the_same_blocks_go_one_after_the_other() {
    let (mut disk, control) = held_disk();
    let fields = Fields::new(ACTION, 3);
    let (first, second) = (disk.patterned(4, 1), disk.patterned(4, 2));
    disk.put(&first, fields);
    control.inject(Target::Write, 0, 1, Fault::Hold);
    let entry = disk.entry(nvm::WRITE, 3, 4, fields);
    let one = disk.guest.push(1, entry);
    disk.guest.ring(1);
    disk.guest.run();
    assert_eq!(control.held(), 1);
    // On another worker: the same blocks, one of them, and a block whose metadata are in the same page, to be written; all wait.
    let page = disk.area + 100 * 4096;
    disk.guest.write_bytes(page, &second.data.concat());
    let again = SubmissionEntry { prp1: page, ..disk.entry(nvm::WRITE, 3, 4, fields) };
    let read = SubmissionEntry { prp1: page + 4096, ..fields_of_read(&disk) };
    let near = SubmissionEntry { prp1: page, ..disk.entry(nvm::WRITE, 60, 1, Fields::new(ACTION, 60)) };
    let seen = control.seen();
    let waiting = [again, read, near].map(|entry| disk.guest.push(2, entry));
    // What only reads the neighbour does not.
    let other =
        SubmissionEntry { prp1: page + 8192, ..disk.entry(nvm::READ, 2000, 1, Fields::new(ACTION, 2000)) };
    let free = disk.guest.push(2, other);
    disk.guest.ring(2);
    assert_eq!(ends(&mut disk.guest, 2, 1), [(free, Status::SUCCESS)]);
    assert_eq!(control.seen(), seen + 2, "two requests of that read, and no other");
    control.release_held();
    assert_eq!(ends(&mut disk.guest, 1, 1), [(one, Status::SUCCESS)]);
    let ended = ends(&mut disk.guest, 2, 3);
    assert!(waiting.iter().all(|cid| ended.contains(&(*cid, Status::SUCCESS))), "{ended:?}");
    // Whole, and in the order of their coming.
    let read = disk.guest.read_bytes(page + 4096, 512);
    assert!(read == second.data[1]);
    let stored = disk.read(3, 4, Fields { prinfo: GUARD | REFERENCE, ..fields }).unwrap();
    assert!(stored.data == second.data);
    disk.read(60, 1, Fields::new(GUARD | REFERENCE, 60)).unwrap();
}

fn fields_of_read(disk: &Disk) -> SubmissionEntry {
    disk.entry(nvm::READ, 4, 1, Fields::new(ACTION | GUARD | REFERENCE, 4))
}

/// Guests of two controllers that share a namespace.
fn sharing(image: Arc<dyn Backend>) -> [Guest; 2] {
    let namespaces = [namespace_on(image, 512, protected(1, false))];
    let subsystem = Subsystem::new("SHARED", &namespaces, true).unwrap();
    [1, 2].map(|id| {
        let mut guest = Guest::member(&subsystem, id, config());
        guest.enable();
        guest.create_pair(1, 8);
        guest
    })
}

#[test]
fn nobody_waits_for_a_controller_that_is_gone() {
    let control = Arc::new(FaultControl::default());
    let image = Arc::new(FaultImage::new(memory_image(IMAGE_BYTES), Arc::clone(&control)));
    let [mut one, mut other] = sharing(image);
    let page = one.pages(1);
    let write = |lba| Fields::new(ACTION, lba).put(transfer(nvm::WRITE, 1, lba, 1, page));
    control.inject(Target::Write, 0, 1, Fault::Hold);
    // The first is at its blocks, the second waits for them.
    for _ in 0..2 {
        one.push(1, write(3));
    }
    one.ring(1);
    one.run();
    assert_eq!(control.held(), 1);
    let waiting = other.push(1, write(3));
    other.ring(1);
    other.run();
    drop(one);
    assert_eq!(ends(&mut other, 1, 1), [(waiting, Status::SUCCESS)]);
}

#[test]
fn controllers_that_share_a_namespace_wait_for_each_other() {
    let control = Arc::new(FaultControl::default());
    let image = Arc::new(FaultImage::new(memory_image(IMAGE_BYTES), Arc::clone(&control)));
    let [mut one, mut other] = sharing(image);
    let page = one.pages(1);
    let write = |lba| Fields::new(ACTION, lba).put(transfer(nvm::WRITE, 1, lba, 1, page));
    control.inject(Target::Write, 0, 1, Fault::Hold);
    let first = one.push(1, write(3));
    one.ring(1);
    one.run();
    let seen = control.seen();
    let second = other.push(1, write(3));
    other.ring(1);
    other.run();
    assert_eq!((control.held(), control.seen()), (1, seen), "the other has not begun");
    control.release_held();
    assert_eq!(ends(&mut one, 1, 1), [(first, Status::SUCCESS)]);
    assert_eq!(ends(&mut other, 1, 1), [(second, Status::SUCCESS)]);
}

#[test]
fn more_commands_than_buffers_are_all_carried_out() {
    let control = Arc::new(FaultControl::default());
    let image = Arc::new(FaultImage::new(memory_image(IMAGE_BYTES), Arc::clone(&control)));
    let mut guest = Guest::ready(config(), vec![namespace_on(image, 512, protected(1, false))]);
    guest.create_pair(1, 64);
    let page = guest.pages(1);
    control.inject(Target::Read, 0, 1000, Fault::Hold);
    for lba in 0..40 {
        let entry = Fields::new(ACTION, lba).put(transfer(nvm::READ, 1, lba, 1, page));
        guest.push(1, entry);
    }
    guest.ring(1);
    guest.run();
    assert_eq!(control.held(), 16, "as many as have a buffer");
    let mut ended = 0;
    guest.run_until("all", |guest| {
        control.release_held();
        ended += guest.reap(1).len();
        ended == 40
    });
}

#[test]
fn a_pair_is_one_with_metadata_too() {
    for format in [protected(1, false), protected(1, true)] {
        let mut disk = Disk::new(512, format);
        let fields = Fields::new(0, 60);
        let [mut before, mut after] = [1, 2].map(|seed| disk.patterned(5, seed));
        disk.protect(&mut before, fields);
        disk.protect(&mut after, fields);
        disk.write(60, &before, fields).unwrap();
        let checks = Fields { prinfo: GUARD | REFERENCE, ..fields };
        let mut pair = |compare: &super::Blocks, write: &super::Blocks, checks: Fields| {
            let (area, separate) = (disk.area, disk.separate);
            let mut cids = Vec::new();
            for (flags, opcode, blocks, place) in
                [(1, nvm::COMPARE, compare, 0u64), (2, nvm::WRITE, write, 40 * 4096)]
            {
                (disk.area, disk.separate) = (area + place, separate + place / 40);
                disk.put(blocks, checks);
                let entry = SubmissionEntry { flags, ..disk.entry(opcode, 60, 5, checks) };
                cids.push(disk.guest.push(1, entry));
            }
            (disk.area, disk.separate) = (area, separate);
            disk.guest.ring(1);
            let ended = ends(&mut disk.guest, 1, 2);
            assert_eq!(ended.iter().map(|end| end.0).collect::<Vec<_>>(), cids);
            (ended[0].1, ended[1].1, disk.raw(60, 5))
        };
        let failed = Status::ABORTED_FAILED_FUSED;
        assert_eq!(pair(&after, &after, checks), (Status::COMPARE_FAILURE, failed, before.clone()));
        let mut bad = after.clone();
        bad.metadata[4][0] ^= 1;
        let ended = pair(&before, &bad, checks);
        assert_eq!(ended, (Status::SUCCESS, Status::GUARD_CHECK_ERROR, before.clone()));
        let wrong = Fields { reference: 9, ..checks };
        let invalid = Status::INVALID_PROTECTION_INFORMATION;
        assert_eq!(pair(&before, &after, wrong), (invalid, failed, before.clone()));
        assert_eq!(pair(&before, &after, checks), (Status::SUCCESS, Status::SUCCESS, after));
    }
}

#[test]
fn what_is_stable_has_its_metadata_and_what_is_torn_is_found_out() {
    let mapping = Arc::new(GuestMapping::new(IMAGE_BYTES).unwrap());
    let image = Arc::new(VolatileImage::new(mapping));
    let mut disk = Disk::on(image.clone(), 512, protected(1, false));
    let whole = |disk: &mut Disk, lba| disk.read(lba, 1, Fields::new(GUARD | REFERENCE, lba));
    let blocks = disk.patterned(1, 1);
    // Forced unit access, a flush, and a cache that is off.
    disk.put(&blocks, Fields::new(ACTION, 1));
    let mut entry = disk.entry(nvm::WRITE, 1, 1, Fields::new(ACTION, 1));
    entry.cdw12 |= opcode::CDW12_FUA;
    disk.guest.io(1, entry).unwrap();
    image.lose_power(|_| false);
    assert!(whole(&mut disk, 1).unwrap().data == blocks.data);
    disk.write(2, &blocks, Fields::new(ACTION, 2)).unwrap();
    disk.io(nvm::FLUSH, 0, 1, Fields::default()).unwrap();
    let mut entry = disk.entry(nvm::WRITE_ZEROES, 3, 1, Fields::new(ACTION, 3));
    entry.cdw12 |= opcode::CDW12_FUA;
    disk.guest.io(1, entry).unwrap();
    image.lose_power(|_| false);
    assert!(whole(&mut disk, 2).unwrap().data == blocks.data);
    assert_eq!(disk.raw(3, 1).metadata, [[0, 0, 0, 0, 0, 0, 0, 3]]);
    let off = SubmissionEntry {
        opcode: opcode::admin::SET_FEATURES,
        cdw10: u32::from(feature::VOLATILE_WRITE_CACHE),
        ..SubmissionEntry::default()
    };
    disk.guest.admin(off).unwrap();
    disk.write(4, &blocks, Fields::new(ACTION, 4)).unwrap();
    assert_eq!(image.cached_blocks(), 0);
    disk.guest.admin(SubmissionEntry { cdw11: 1, ..off }).unwrap();
    // Data and metadata are two writes: of one that was not stable, one half can be lost.
    let other = disk.patterned(1, 2);
    disk.write(2, &other, Fields::new(ACTION, 2)).unwrap();
    image.lose_power(|position| position < 4096);
    assert_eq!(whole(&mut disk, 2), Err(Status::GUARD_CHECK_ERROR));
    assert!(disk.raw(2, 1).data == other.data);
}

#[test]
fn a_reset_forgets_what_waits_and_waits_for_what_runs() {
    let (mut disk, control) = held_disk();
    let fields = Fields::new(ACTION, 3);
    let blocks = disk.patterned(4, 1);
    disk.put(&blocks, fields);
    control.inject(Target::Write, 0, 1, Fault::Hold);
    for queue in [1, 2] {
        for _ in 0..3 {
            let entry = disk.entry(nvm::WRITE, 3, 4, fields);
            disk.guest.push(queue, entry);
        }
        disk.guest.ring(queue);
    }
    disk.guest.run();
    assert_eq!((control.held(), disk.guest.controller.statistics().in_flight), (1, 6));
    disk.guest.write32(regs::CC, 0x0046_0000);
    disk.guest.run();
    assert_eq!(disk.guest.read32(regs::CSTS) & 1, 1, "a request is in flight");
    let (seen, in_flight) = (control.seen(), disk.guest.controller.statistics().in_flight);
    assert_eq!(in_flight, 1, "and nothing else");
    control.release_held();
    disk.guest.run_until("the reset", |guest| guest.read32(regs::CSTS) & 1 == 0);
    assert_eq!(
        control.seen(),
        seen + 2,
        "its metadata: the page around them is read and written, and nothing else done"
    );
    disk.guest.enable();
    disk.guest.create_pair(1, 16);
    disk.write(3, &blocks, fields).unwrap();
    assert!(disk.read(3, 4, Fields { prinfo: GUARD | REFERENCE, ..fields }).unwrap().data == blocks.data);
}

/// A command of two pieces, `opcode`, whose first write is held while the disk is full of other blocks. What ends it does so with that
/// write under way.
fn cut_short(opcode: u8, end: impl FnOnce(&mut Guest, &FaultControl)) {
    let (mut disk, control) = held_disk();
    let (before, after) = (disk.patterned(300, 1), disk.patterned(300, 2));
    let fields = Fields::new(ACTION, 0);
    disk.write(0, &before, fields).unwrap();
    disk.put(&after, fields);
    control.inject(Target::Write, 0, 1, Fault::Hold);
    let entry = disk.entry(opcode, 0, 300, fields);
    disk.guest.push(1, entry);
    disk.guest.ring(1);
    disk.guest.run();
    assert_eq!(control.held(), 1);
    end(&mut disk.guest, &control);
    let zeroes = vec![vec![0; 512]; 300];
    let new = if opcode == nvm::WRITE { &after.data } else { &zeroes };
    let mut all = Vec::new();
    for lba in [0, 100, 200] {
        // Each has data and metadata of the same write, or its guard tells.
        all.extend(disk.read(lba, 100, Fields::new(GUARD | REFERENCE, lba)).unwrap().data);
    }
    let written = all.iter().zip(new).take_while(|(block, new)| block == new).count();
    assert!(written == if opcode == nvm::WRITE { 256 } else { 300 }, "{written} of {opcode:#x}");
    assert!(all[written..] == before.data[written..], "{opcode:#x}");
}

#[test]
fn a_write_that_a_reset_cuts_short_leaves_no_torn_block() {
    for opcode in [nvm::WRITE, nvm::WRITE_ZEROES] {
        cut_short(opcode, |guest, control| {
            guest.write32(regs::CC, 0x0046_0000);
            guest.run();
            control.release_held();
            guest.run_until("the reset", |guest| guest.read32(regs::CSTS) & 1 == 0);
            guest.enable();
            guest.create_pair(1, 16);
        });
    }
}

#[test]
fn a_write_whose_memory_is_out_of_reach_leaves_no_torn_block() {
    for (opcode, status) in [(nvm::WRITE, Status::DATA_TRANSFER_ERROR), (nvm::WRITE_ZEROES, Status::SUCCESS)]
    {
        cut_short(opcode, |guest, control| {
            guest.set_bus_master(false);
            control.release_held();
            guest.run_until("the command's end", |guest| guest.controller.statistics().in_flight == 0);
            guest.set_bus_master(true);
            assert_eq!(ends(guest, 1, 1)[0].1, status);
        });
    }
}

#[test]
fn a_failing_image_fails_the_command_and_frees_its_blocks() {
    let (mut disk, control) = held_disk();
    let blocks = disk.patterned(300, 1);
    let fields = Fields::new(ACTION, 0);
    // Data and metadata of two pieces: each request once, a write that begins inside a page with a read before.
    for (position, status) in [
        (0, Status::WRITE_FAULT),
        (1, Status::UNRECOVERED_READ_ERROR),
        (2, Status::WRITE_FAULT),
        (3, Status::WRITE_FAULT),
        (4, Status::UNRECOVERED_READ_ERROR),
        (5, Status::WRITE_FAULT),
    ] {
        control.inject(Target::Any, position, 1, Fault::Fail(Failure::Io(5)));
        assert_eq!(disk.write(0, &blocks, fields), Err(status), "request {position}");
    }
    disk.write(0, &blocks, fields).unwrap();
    for position in 0..4 {
        control.inject(Target::Any, position, 1, Fault::Fail(Failure::Io(5)));
        assert_eq!(disk.read(0, 300, fields).map(|_| ()), Err(Status::UNRECOVERED_READ_ERROR));
    }
    disk.read(0, 300, Fields { prinfo: ACTION | GUARD, ..fields }).unwrap();
}

#[test]
fn every_page_that_a_read_changes_is_marked_dirty() {
    for format in [protected(1, false), protected(1, true)] {
        let mut disk = Disk::new(512, format);
        let blocks = disk.patterned(20, 1);
        disk.write(7, &blocks, Fields::new(ACTION, 7)).unwrap();
        disk.guest.write_bytes(disk.area, &vec![0; 20 * 520]);
        let before = disk.guest.read_bytes(0, crate::tests::driver::MEMORY_BYTES);
        let region = disk.guest.memory.iter().next().unwrap();
        region.bitmap().reset();
        disk.io(nvm::READ, 7, 20, Fields::new(GUARD, 7)).unwrap();
        let after = disk.guest.read_bytes(0, crate::tests::driver::MEMORY_BYTES);
        let region = disk.guest.memory.iter().next().unwrap();
        let mut changed = 0;
        for (page, (before, after)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
            if before != after {
                changed += 1;
                assert!(region.bitmap().dirty_at(page * 4096), "page {page} was changed and is not marked");
            }
        }
        assert!(changed >= 3, "data, metadata or the last page of both, and a completion");
    }
}

#[test]
fn an_image_that_takes_only_whole_blocks_will_do() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(IMAGE_BYTES as u64).unwrap();
    for (block_bytes, direct) in [(512, true), (4096, true), (512, false)] {
        let options = FileOptions { direct, block_size_bytes: block_bytes, ..FileOptions::default() };
        let image = Arc::new(FileImage::open(file.path(), options).unwrap());
        let mut disk = Disk::on(image.clone(), block_bytes, protected(2, true));
        let blocks = disk.patterned(33, 4);
        let fields = Fields::new(ACTION, 5);
        disk.write(21, &blocks, fields).unwrap();
        let read = disk.read(21, 33, Fields { prinfo: GUARD | REFERENCE, ..fields }).unwrap();
        assert!(read.data == blocks.data);
        let ranges = [&[0; 4][..], &30u32.to_le_bytes(), &22u64.to_le_bytes()].concat();
        disk.guest.write_bytes(disk.area, &ranges);
        let mut entry = disk.entry(nvm::DATASET_MANAGEMENT, 0, 1, Fields::default());
        (entry.cdw10, entry.cdw11) = (0, opcode::DSM_DEALLOCATE);
        disk.guest.io(1, entry).unwrap();
        let raw = disk.raw(21, 33);
        assert!(raw.metadata[1..31].concat().iter().all(|&byte| byte == 0xff));
        assert!(raw.metadata[0] != [0xff; 8] && raw.metadata[31] != [0xff; 8]);
        drop(disk);
        image.release().unwrap();
    }
}
