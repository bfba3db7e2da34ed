//! Formats with metadata: configured, asked for, saved, moved, and given up.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use block::{Fault, FaultControl, FaultImage, Target};
use nvme_spec::identify::{IdentifyNamespace, cns};
use nvme_spec::opcode::{admin, attachment, management, nvm};
use nvme_spec::{Status, SubmissionEntry};

use super::{ACTION, Disk, Fields, GUARD, IMAGE_BYTES, REFERENCE, config, formats, namespace_on, protected};
use crate::maintenance::CHUNK_BYTES;
use crate::namespace::Namespace;
use crate::tests::driver::{Guest, memory_image, namespace, transfer};
use crate::tests::store::{Memory, managed};
use crate::{Error, FormatSettingsState, KeptState, MetadataConfig, NamespaceConfig, NonVolatile, Subsystem};

fn format(cdw10: u32) -> SubmissionEntry {
    SubmissionEntry { opcode: admin::FORMAT_NVM, nsid: 1, cdw10, ..SubmissionEntry::default() }
}

fn about(guest: &mut Guest, nsid: u32) -> IdentifyNamespace {
    IdentifyNamespace::from_bytes(&guest.identify(cns::NAMESPACE, nsid).unwrap())
}

#[test]
fn identify_says_what_a_namespace_has_and_could_have() {
    for (block_bytes, wanted) in formats() {
        let mut disk = Disk::new(block_bytes, wanted);
        let page = about(&mut disk.guest, 1);
        let index = match (block_bytes, wanted.bytes) {
            (512, _) => 2,
            (_, 8) => 3,
            _ => 4,
        };
        assert_eq!(page.flbas, index | u8::from(wanted.extended) << 4);
        assert_eq!(page.dps, wanted.protection_type | u8::from(wanted.protection_first) << 3);
        assert_eq!(page.dlfeat & 0x10, 0, "guards of deallocated blocks are FFFFh");
        let needed = page.nsze * u64::from(block_bytes + u32::from(wanted.bytes));
        assert!(needed <= IMAGE_BYTES as u64 && needed + 3 * 4096 > IMAGE_BYTES as u64, "{}", page.nsze);
        assert_eq!((page.nvmcap, page.mc, page.dpc), (IMAGE_BYTES as u128, 3, 0x1f));
        let listed: Vec<_> = page.lbaf[..=usize::from(page.nlbaf)]
            .iter()
            .map(|format| (format.lba_data_size_log2, format.metadata_bytes))
            .collect();
        assert_eq!(listed, [(9, 0), (12, 0), (9, 8), (12, 8), (12, 64)]);
    }
}

#[test]
fn a_format_gives_and_takes_metadata() {
    let mut guest = Guest::ready(config(), vec![namespace(1, IMAGE_BYTES / 512)]);
    guest.create_pair(1, 16);
    guest.create_pair(2, 16);
    let mut disk = Disk { guest, block_bytes: 512, format: protected(1, false), area: 0, separate: 0 };
    (disk.area, disk.separate) = (disk.guest.pages(180), disk.guest.pages(4));
    let plain = transfer(nvm::WRITE, 1, 0, 8, disk.area);
    disk.guest.write_bytes(disk.area, &[0x77; 4096]);
    disk.guest.io(1, plain).unwrap();
    let blocks_before = about(&mut disk.guest, 1).nsze;
    for refused in [1 << 5, 1 | 2 << 5, 2 | 4 << 5, 5, 2 | 7 << 5] {
        assert_eq!(disk.guest.admin(format(refused)), Err(Status::INVALID_FORMAT), "{refused:#x}");
    }
    // LBAF 2, MSET, PI 1, and PIL with a format that has more than eight bytes.
    for (cdw10, flbas, dps, block_bytes, wanted) in [
        (2 | 1 << 5, 2, 1, 512, protected(1, false)),
        (2 | 1 << 4 | 2 << 5, 0x12, 2, 512, protected(2, true)),
        (
            4 | 3 << 5 | 1 << 8,
            4,
            0xb,
            4096,
            MetadataConfig { bytes: 64, extended: false, protection_type: 3, protection_first: true },
        ),
        (3 | 1 << 4, 0x13, 0, 4096, protected(0, true)),
    ] {
        disk.guest.admin(format(cdw10)).unwrap();
        (disk.block_bytes, disk.format) = (block_bytes, wanted);
        let page = about(&mut disk.guest, 1);
        assert_eq!((page.flbas, page.dps), (flbas, dps));
        let raw = disk.raw(3, 2);
        assert!(raw.data.concat().iter().all(|&byte| byte == 0), "erased");
        let unwritten = if wanted.protection_type == 0 { 0 } else { 0xff };
        assert!(
            raw.metadata.iter().all(|metadata| metadata[disk.tuple()].iter().all(|&byte| byte == unwritten))
        );
        let blocks = disk.patterned(9, 3);
        disk.write(page.nsze - 9, &blocks, Fields::new(ACTION, page.nsze - 9)).unwrap();
        // What the guest made of the namespace moves, whatever the destination was told.
        disk.guest.migrate(2);
        let read = disk.read(page.nsze - 9, 9, Fields::new(GUARD, page.nsze - 9)).unwrap();
        assert!(read.data == blocks.data);
        assert_eq!(about(&mut disk.guest, 1), page);
    }
    disk.guest.admin(format(0)).unwrap();
    let page = about(&mut disk.guest, 1);
    assert_eq!((page.nsze, page.flbas, page.dps), (blocks_before, 0, 0));
    disk.guest
        .io(1, SubmissionEntry { opcode: nvm::READ, ..transfer(0, 1, blocks_before - 8, 8, disk.area) })
        .unwrap();
    assert!(disk.guest.read_bytes(disk.area, 4096) == vec![0; 4096], "nothing of the metadata is left");
}

#[test]
fn a_format_in_progress_knows_what_it_makes() {
    let control = Arc::new(FaultControl::default());
    let backend = Arc::new(FaultImage::new(memory_image(3 * CHUNK_BYTES as usize), Arc::clone(&control)));
    let namespaces = vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend }];
    let mut guest = Guest::ready(config(), namespaces);
    control.inject(Target::Write, 1, 1, Fault::Hold);
    let cid = guest.push(0, format(2 | 1 << 4 | 2 << 5 | 1 << 8));
    guest.ring(0);
    guest.run();
    control.release_held();
    let saved = guest.migrate(1).save().format.unwrap();
    let settings = FormatSettingsState { extended: true, protection_type: 2, protection_first: true };
    assert_eq!((saved.format, saved.settings), (2, Some(settings)));
    guest.run_until("the format", |guest| guest.reap(0).iter().any(|entry| entry.cid == cid));
    let page = about(&mut guest, 1);
    assert_eq!((page.flbas, page.dps), (0x12, 0xa));
}

#[test]
fn a_guest_creates_namespaces_with_metadata_and_finds_them_again() {
    let store = Memory::new(4 << 20);
    let mut guest = managed(&config(), &[], &store);
    guest.create_pair(1, 16);
    let page = guest.pages(2);
    let create = |guest: &mut Guest, blocks: u64, flbas: u8, dps: u8| {
        let mut data = vec![0; 4096];
        data[..8].copy_from_slice(&blocks.to_le_bytes());
        data[8..16].copy_from_slice(&blocks.to_le_bytes());
        (data[26], data[29]) = (flbas, dps);
        guest.write_bytes(page, &data);
        guest.admin(SubmissionEntry {
            opcode: admin::NAMESPACE_MANAGEMENT,
            prp1: page,
            cdw10: management::CREATE,
            ..SubmissionEntry::default()
        })
    };
    assert_eq!(create(&mut guest, 100, 0, 1), Err(Status::INVALID_FORMAT), "no room for it");
    assert_eq!(create(&mut guest, 100, 2, 4), Err(Status::INVALID_FORMAT));
    assert_eq!(create(&mut guest, 100, 2, 0x11), Err(Status::INVALID_FIELD));
    assert_eq!(create(&mut guest, 100, 0x12, 0x9), Ok(1));
    let list = [&1u16.to_le_bytes()[..], &0u16.to_le_bytes()].concat();
    guest.write_bytes(page, &[list, vec![0; 4092]].concat());
    guest
        .admin(SubmissionEntry {
            opcode: admin::NAMESPACE_ATTACHMENT,
            nsid: 1,
            prp1: page,
            cdw10: attachment::ATTACH,
            ..SubmissionEntry::default()
        })
        .unwrap();
    let created = about(&mut guest, 1);
    assert_eq!((created.nsze, created.flbas, created.dps), (100, 0x12, 9));
    let wanted = MetadataConfig { bytes: 8, extended: true, protection_type: 1, protection_first: true };
    let write = |disk: &mut Disk| {
        let blocks = disk.patterned(4, 1);
        disk.write(96, &blocks, Fields::new(ACTION, 96)).unwrap();
        blocks
    };
    let mut disk = Disk { guest, block_bytes: 512, format: wanted, area: 0, separate: 0 };
    (disk.area, disk.separate) = (disk.guest.pages(180), disk.guest.pages(4));
    let blocks = write(&mut disk);
    // After a power cycle, and then in another format that its image has room for.
    drop(disk);
    let mut guest = managed(&config(), &[], &store);
    guest.create_pair(1, 16);
    assert_eq!(about(&mut guest, 1), created);
    let mut disk = Disk { guest, block_bytes: 512, format: wanted, area: 0, separate: 0 };
    (disk.area, disk.separate) = (disk.guest.pages(180), disk.guest.pages(4));
    let read = disk.read(96, 4, Fields::new(GUARD | REFERENCE, 96)).unwrap();
    assert!(read.data == blocks.data);
    disk.guest.admin(format(4 | 1 << 5)).unwrap();
    let formatted = about(&mut disk.guest, 1);
    assert_eq!((formatted.nsze, formatted.flbas, formatted.dps), (13, 4, 1), "14 pages");
    drop(disk);
    let mut guest = managed(&config(), &[], &store);
    assert_eq!(about(&mut guest, 1), formatted);
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let refused = |block_bytes, metadata, image_bytes| {
        let backend = memory_image(image_bytes);
        let config = NamespaceConfig { nsid: 1, block_bytes, metadata: Some(metadata), backend };
        Subsystem::new("REFUSED", &[config], false).err().expect("it cannot be").to_string()
    };
    let sixty_four = MetadataConfig { bytes: 64, ..protected(1, false) };
    assert!(refused(512, sixty_four, 1 << 20).contains("64 bytes of metadata"));
    assert!(refused(512, MetadataConfig { bytes: 0, ..sixty_four }, 1 << 20).contains("no format"));
    assert!(refused(512, protected(4, false), 1 << 20).contains("type 4"));
    assert!(refused(4096, protected(1, false), 4096).contains("holds no block"));
    let backend = memory_image(IMAGE_BYTES);
    let subsystem =
        Subsystem::new("GROWN", &[namespace_on(backend, 512, protected(1, false))], false).unwrap();
    let error = subsystem.resize(1, Some(2 * IMAGE_BYTES as u64)).unwrap_err();
    assert!(
        matches!(error, Error::Namespace { nsid: 1, .. }) && error.to_string().contains("cannot be moved")
    );
}

#[test]
fn a_state_with_metadata_that_cannot_be_is_refused() {
    let disk = Disk::new(512, protected(1, false));
    disk.guest.controller.pause(std::time::Instant::now() + crate::tests::driver::PATIENCE).unwrap();
    let state = disk.guest.controller.save();
    disk.guest.loaded_elsewhere(&state).unwrap();
    let spoil = |change: &dyn Fn(&mut crate::MetadataShape)| {
        let mut state = state.clone();
        change(state.namespaces.get_mut(0).unwrap().shape.metadata.as_mut().unwrap());
        disk.guest.loaded_elsewhere(&state).err().map(|error| error.to_string())
    };
    assert!(spoil(&|metadata| metadata.bytes = 16).unwrap().contains("no format"));
    assert!(spoil(&|metadata| metadata.protection_type = 4).unwrap().contains("no format"));
    assert!(spoil(&|metadata| (metadata.protection_type, metadata.protection_first) = (0, true)).is_some());
    assert!(spoil(&|metadata| metadata.image_bytes += 4096).unwrap().contains("size in bytes"));
    assert_eq!(spoil(&|metadata| metadata.protection_type = 2), None, "the guest may have formatted");
    let mut fewer = state.clone();
    let shape = &mut fewer.namespaces.get_mut(0).unwrap().shape;
    (shape.block_shift, shape.blocks) = (12, shape.blocks / 8 + 1);
    assert!(disk.guest.loaded_elsewhere(&fewer).is_err(), "more blocks than the image holds");
    // What both sides must have is compared before anything moves.
    let plain = Guest::ready(config(), vec![namespace(1, IMAGE_BYTES / 512)]);
    let differences = disk.guest.controller.inventory().differences(&plain.controller.inventory());
    assert_eq!(differences, Vec::<String>::new(), "a format is the guest's, the image is as large");
    let smaller = Guest::ready(config(), vec![namespace(1, IMAGE_BYTES / 512 - 8)]);
    let differences = disk.guest.controller.inventory().differences(&smaller.controller.inventory());
    assert_eq!(differences.len(), 1, "{differences:?}");
    assert!(differences[0].contains("size in bytes"));
}

#[test]
fn an_overwrite_leaves_no_metadata_and_a_self_test_names_the_block() {
    let mut disk = Disk::new(512, protected(1, false));
    let blocks = disk.patterned(8, 1);
    for (cdw10, data) in [
        // Overwrite once and keep, twice with the inverse, and block erase.
        (3 | 1 << 4 | 1 << 9, 0x5a),
        (3 | 2 << 4 | 1 << 8 | 1 << 9, 0xa5),
        (2, 0),
    ] {
        disk.write(0, &blocks, Fields::new(ACTION, 0)).unwrap();
        let sanitize = SubmissionEntry {
            opcode: admin::SANITIZE,
            cdw10,
            cdw11: 0x5a5a_5a5a,
            ..SubmissionEntry::default()
        };
        disk.guest.admin(sanitize).unwrap();
        disk.guest.run_until("the sanitize operation", |guest| {
            let log = SubmissionEntry {
                opcode: admin::GET_LOG_PAGE,
                cdw10: 0x81 | 1 << 16,
                ..SubmissionEntry::default()
            };
            guest.admin_data::<8>(log).unwrap()[2] & 7 == 1
        });
        let raw = disk.raw(0, 8);
        assert!(raw.data.concat().iter().all(|&byte| byte == data), "{cdw10:#x}");
        assert!(raw.metadata.concat().iter().all(|&byte| byte == 0xff), "{cdw10:#x}");
        disk.read(0, 8, Fields::new(GUARD | REFERENCE, 0)).unwrap();
    }
    // A self-test reads metadata too, and tells of the block that they are of.
    let namespace = Namespace::new(&disk.guest.namespaces[0], "SERIAL", false).unwrap();
    let start = namespace.metadata_start();
    assert!(start >= namespace.blocks * 512);
    for (offset, block) in [(0, 0), (512 * 9, 9), (start, 0), (start + 8 * 512, 512), (start + 4095, 511)] {
        assert_eq!(namespace.block_at(offset), block, "{offset}");
    }
    assert_eq!(namespace.block_at(IMAGE_BYTES as u64 - 1), namespace.blocks - 1);
}

/// A place that outlives a controller.
#[derive(Debug, Default)]
struct Place(Mutex<Option<KeptState>>);

impl NonVolatile for Place {
    fn keep(&self, kept: &KeptState) -> std::io::Result<()> {
        *self.0.lock().unwrap() = Some(kept.clone());
        Ok(())
    }
}

#[test]
fn without_power_no_block_that_was_written_is_uncorrectable_again() {
    let store = Memory::new(4 << 20);
    let backend = memory_image(IMAGE_BYTES);
    let format = protected(1, false);
    let power_on = || {
        let mut guest = managed(&config(), &[namespace_on(backend.clone(), 512, format)], &store);
        guest.create_pair(1, 16);
        let mut disk = Disk { guest, block_bytes: 512, format, area: 0, separate: 0 };
        (disk.area, disk.separate) = (disk.guest.pages(180), disk.guest.pages(4));
        disk
    };
    let mut disk = power_on();
    let blocks = disk.patterned(2, 1);
    disk.io(nvm::WRITE_UNCORRECTABLE, 5, 4, Fields::default()).unwrap();
    disk.write(5, &blocks, Fields::new(ACTION, 5)).unwrap();
    disk.io(nvm::WRITE_ZEROES, 7, 1, Fields::new(ACTION, 7)).unwrap();
    // The power fails without a word.
    let state = store.state();
    drop(disk);
    store.put(state);
    let mut disk = power_on();
    assert!(disk.read(5, 2, Fields::new(GUARD | REFERENCE, 5)).unwrap().data == blocks.data);
    disk.read(7, 1, Fields::new(GUARD | REFERENCE, 7)).unwrap();
    assert_eq!(disk.read(8, 1, Fields::default()), Err(Status::UNRECOVERED_READ_ERROR));
    // What cannot be kept is not acknowledged, however often it is tried; other blocks do not care.
    store.breaks.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        assert_eq!(disk.write(8, &blocks, Fields::new(ACTION, 8)), Err(Status::INTERNAL_ERROR));
        assert_eq!(disk.read(8, 1, Fields::default()), Err(Status::UNRECOVERED_READ_ERROR));
    }
    disk.write(9, &blocks, Fields::new(ACTION, 9)).unwrap();
    store.breaks.store(false, Ordering::SeqCst);
    disk.write(8, &blocks, Fields::new(ACTION, 8)).unwrap();
    let (state, writes) = (store.state(), store.writes.load(Ordering::SeqCst));
    disk.write(8, &blocks, Fields::new(ACTION, 8)).unwrap();
    assert_eq!(store.writes.load(Ordering::SeqCst), writes, "it has them");
    drop(disk);
    store.put(state);
    assert!(power_on().read(8, 2, Fields::new(GUARD | REFERENCE, 8)).unwrap().data == blocks.data);
}

#[test]
fn metadata_outlive_the_power() {
    let (place, backend) = (Arc::new(Place::default()), memory_image(IMAGE_BYTES));
    let power_on = || {
        let namespaces =
            vec![NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: backend.clone() }];
        let mut guest = Guest::power_on(config(), namespaces);
        let kept = place.0.lock().unwrap().clone();
        guest.controller.attach_non_volatile(place.clone(), kept.as_ref()).unwrap();
        guest.enable();
        guest
    };
    let mut guest = power_on();
    guest.admin(format(4 | 1 << 4 | 3 << 5 | 1 << 8)).unwrap();
    let formatted = about(&mut guest, 1);
    assert_eq!((formatted.flbas, formatted.dps), (0x14, 0xb));
    drop(guest);
    assert_eq!(about(&mut power_on(), 1), formatted);
    let mut kept = place.0.lock().unwrap().clone().unwrap();
    assert_eq!(vmstate::from_bytes::<KeptState>(&vmstate::to_bytes(&kept), 1), Ok(kept.clone()));
    kept.formats[0].metadata.as_mut().unwrap().bytes = 16;
    let guest = Guest::power_on(config(), vec![namespace(1, 64)]);
    let error = guest.controller.attach_non_volatile(place.clone(), Some(&kept)).unwrap_err().to_string();
    assert!(error.contains("formats.block_shift"), "{error}");
}
