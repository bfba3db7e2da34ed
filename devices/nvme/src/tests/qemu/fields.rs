//! Every field of a section with a value that it cannot have, and every other field with values that come back.

use std::collections::BTreeSet;

use super::{CLOCK_MS, FIRMWARE, Fixture, LINUX, Leaf, leaves, load, save};

/// Fields (elements of arrays without their index), an impossible value of each, and the field that the refusal names, if it is
/// not that one: of two fields that contradict each other, the one that is looked at last.
const IMPOSSIBLE: &[(&str, u64, &str)] = &[
    ("pci_device.version_id", 3, ""),
    ("pci_device.irq_state", 1, ""),
    ("bar.cap", 0x0040_0820_0f01_07fe, ""),
    ("bar.intms", 1, "bar.intmc"),
    ("bar.intmc", 1, ""),
    ("bar.cc", 0x0046_0011, ""),
    ("bar.rsvd24", 1, ""),
    ("bar.csts", 0x21, ""),
    ("bar.nssr", 1, ""),
    ("bar.aqa", 0x001f_101f, ""),
    ("bar.asq", 0x1008, ""),
    ("bar.acq", 0x1008, ""),
    ("bar.cmbloc", 1, ""),
    ("bar.cmbsz", 1, ""),
    ("bar.bpinfo", 1, ""),
    ("bar.bprsel", 1, ""),
    ("bar.bpmbl", 1, ""),
    ("bar.cmbmsc", 1, ""),
    ("bar.cmbsts", 1, ""),
    ("bar.rsvd92", 1, ""),
    ("bar.pmrcap", 1, ""),
    ("bar.pmrctl", 1, ""),
    ("bar.pmrsts", 1, ""),
    ("bar.pmrebs", 1, ""),
    ("bar.pmrswtp", 1, ""),
    ("bar.pmrmscl", 1, ""),
    ("bar.pmrmscu", 1, ""),
    ("bar.css", 1, ""),
    ("qs_created", 0, ""),
    ("page_size", 0x2000, ""),
    ("page_bits", 13, ""),
    ("max_prp_ents", 0x1ff, ""),
    // What follows is then no marker of a slot.
    ("outstanding_aers", 2, "aer_reqs[1]"),
    ("irq_status", 1, ""),
    ("timestamp_set_qemu_clock_ms", CLOCK_MS + 1, ""),
    ("starttime_ms", CLOCK_MS + 1, ""),
    ("smart_critical_warning", 1, ""),
    ("conf_msix_qsize", 8, ""),
    ("conf_ioqpairs", 9, ""),
    ("dbbuf_dbs", 0x1004, ""),
    ("dbbuf_eis", !0xfff, ""),
    ("dbbuf_enabled", 2, ""),
    ("aer_reqs[]", 0x32, ""),
    ("aer_reqs[].status", 1, ""),
    ("aer_reqs[].cqe.result", 1, ""),
    ("aer_reqs[].cqe.dw1", 1, ""),
    ("aer_reqs[].cqe.sq_head", 1, ""),
    ("aer_reqs[].cqe.sq_id", 1, ""),
    ("aer_reqs[].cqe.cid", 1, ""),
    ("aer_reqs[].cqe.status", 1, ""),
    ("aer_reqs[].cmd.opcode", 2, ""),
    ("aer_reqs[].cmd.cid", 1, "aer_reqs[].cqe.cid"),
    ("aer_queue", 2, ""),
    ("aer_queued", 1, ""),
    ("namespace.tmp", 2, ""),
    ("namespace.id_ns.nsze", 1, ""),
    ("namespace.id_ns.ncap", 1, ""),
    ("namespace.id_ns.nuse", 1, ""),
    ("namespace.id_ns.nlbaf", 8, ""),
    ("namespace.id_ns.flbas", 1, ""),
    ("namespace.id_ns.dps", 1, ""),
    ("namespace.id_ns.lbaf[0].ms", 8, "namespace.id_ns.lbaf"),
    ("namespace.id_ns.lbaf[0].ds", 12, "namespace.id_ns.lbaf"),
    ("namespace.id_ns.lbaf[0].rp", 1, "namespace.lbaf.rp"),
    ("namespace.lbaf.ms", 8, ""),
    ("namespace.lbaf.ds", 12, ""),
    ("namespace.lbaf.rp", 1, ""),
    ("namespace.nlbaf", 65, ""),
    ("namespace.csi", 2, ""),
    ("namespace.status", 0x84, ""),
    ("namespace.pif", 2, ""),
    ("namespace.zns.zrwas", 1, ""),
    ("namespace.zns.zrwafg", 1, ""),
    ("namespace.zns.numzrwa", 1, ""),
    ("namespace.features.err_rec", 0x1_0000, ""),
    ("namespace.atomic.atomic_max_write_size", 2, ""),
    ("namespace.atomic.atomic_boundary", 1, ""),
    ("namespace.atomic.atomic_nabo", 1, ""),
    ("namespace.atomic.atomic_writes", 1, ""),
    ("sq[]", 0x32, ""),
    ("sq[].sqid", 7, ""),
    ("sq[].cqid", 8, ""),
    ("sq[].head", 1024, ""),
    ("sq[].tail", 1024, ""),
    ("sq[].size", 4096, ""),
    ("sq[].dma_addr", 0x1040, ""),
    ("cq[]", 0x32, ""),
    ("cq[].phase", 2, ""),
    ("cq[].cqid", 7, ""),
    ("cq[].irq_enabled", 2, ""),
    ("cq[].head", 1024, ""),
    ("cq[].tail", 1024, ""),
    ("cq[].vector", 9, ""),
    ("cq[].size", 4096, ""),
    ("cq[].dma_addr", !0xfff, ""),
    ("cq[].req_list", 1, ""),
    ("features.async_config", 1 << 31, ""),
    ("features.hbs.acre", 2, ""),
    ("dn", 2, ""),
    ("atomic.atomic_max_write_size", 2, ""),
    ("atomic.atomic_boundary", 1, ""),
    ("atomic.atomic_nabo", 1, ""),
    ("atomic.atomic_writes", 1, ""),
];

/// Fields that are looked at bit by bit.
const BITWISE: [&str; 2] = ["pci_device.config", "msix"];

/// Possible values of fields that have impossible ones, and whether what is left over is then another: what the state models is not
/// remembered beside it.
const POSSIBLE: &[(&str, u64, bool)] = &[
    // Slower to become ready, and with subsystem reset: neither limits the guest.
    ("bar.cap", 0x0040_0830_ff01_07ff, true),
    ("bar.csts", 1 | 2 << 2, false),
    ("timestamp_set_qemu_clock_ms", CLOCK_MS, true),
    // The difference wraps: powered on two milliseconds before the clock's 0.
    ("starttime_ms", u64::MAX - 1, true),
    ("dbbuf_dbs", 0x1000, false),
    ("dbbuf_eis", 0x1000, false),
    ("namespace.tmp", 0, false),
    ("namespace.features.err_rec", 0xffff, false),
    ("sq[2].cqid", 1, false),
    ("sq[1].head", 1023, false),
    ("sq[1].tail", 1023, false),
    ("sq[1].size", 2048, false),
    ("sq[1].dma_addr", 0x1000, false),
    ("cq[1].phase", 0, false),
    ("cq[2].irq_enabled", 0, false),
    // Now there is a queue that QEMU's count of such queues does not count.
    ("cq[2].head", 0, true),
    ("cq[2].vector", 1, false),
    ("cq[2].size", 2048, false),
    ("cq[2].dma_addr", 0x1000, false),
    ("features.temp_thresh_hi", 1, false),
    ("features.temp_thresh_low", 1, false),
    ("features.async_config", 0x1ff, false),
    ("features.hbs.acre", 1, false),
    ("aer_mask", 7, false),
    ("dn", 1, false),
];

/// The path without indexes of queues and requests.
fn pattern(path: &str) -> String {
    match path.split_once('[').zip(path.split_once(']')) {
        Some(((array @ ("sq" | "cq" | "aer_reqs"), _), (_, field))) => format!("{array}[]{field}"),
        _ => path.to_owned(),
    }
}

/// `payload` with the value in the field; runs of bytes have it in their first.
fn changed(payload: &[u8], leaf: &Leaf, value: u64) -> Vec<u8> {
    let mut bytes = payload.to_vec();
    let field = &mut bytes[leaf.offset..leaf.offset + leaf.size];
    match leaf.size {
        size @ (1 | 2 | 4 | 8) => field.copy_from_slice(&value.to_be_bytes()[8 - size..]),
        _ => field[0] = value as u8,
    }
    assert_ne!(bytes, payload, "{} has that value already", leaf.path);
    bytes
}

/// The whole message of an error.
fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// Refused with a message that names the field, or saved again as it was.
fn outcome(fixture: &Fixture, payload: &[u8]) -> Result<(), String> {
    match load(fixture, payload) {
        Err(error) => Err(message(&error)),
        Ok((guest, residue)) => {
            assert!(save(fixture, &guest, &residue) == payload, "what is accepted comes back");
            Ok(())
        }
    }
}

#[test]
fn an_impossible_value_of_any_field_is_refused_and_named() {
    let mut used = BTreeSet::new();
    for leaf in leaves(&LINUX.description()) {
        let pattern = pattern(&leaf.path);
        let Some((pattern, value, named)) = IMPOSSIBLE.iter().find(|(path, ..)| *path == pattern) else {
            continue;
        };
        used.insert(*pattern);
        let error = outcome(&LINUX, &changed(LINUX.payload(), &leaf, *value)).expect_err(&leaf.path);
        let index = leaf.path.split_once('[').map_or("", |(_, rest)| rest.split(']').next().unwrap());
        let named =
            if named.is_empty() { leaf.path.clone() } else { named.replace("[]", &format!("[{index}]")) };
        // Followed by what it is, or by its own parts.
        let names = [" ", ":", "["].iter().any(|next| error.contains(&format!(": {named}{next}")));
        assert!(names, "{}: {error}", leaf.path);
    }
    let unused: Vec<_> = IMPOSSIBLE.iter().filter(|(pattern, ..)| !used.contains(pattern)).collect();
    assert!(unused.is_empty(), "no such fields: {unused:?}");
}

#[test]
fn every_value_of_all_other_fields_comes_back() {
    let mut count = 0;
    for leaf in leaves(&LINUX.description()) {
        let pattern = pattern(&leaf.path);
        if BITWISE.contains(&&*pattern) || IMPOSSIBLE.iter().any(|(path, ..)| *path == pattern) {
            continue;
        }
        count += 1;
        for flip in [0xff, 0x01, 0x80] {
            let mut payload = LINUX.payload().to_vec();
            for byte in &mut payload[leaf.offset..leaf.offset + leaf.size] {
                *byte ^= flip;
            }
            assert_eq!(outcome(&LINUX, &payload), Ok(()), "{}", leaf.path);
        }
    }
    assert!(count > 200, "{count} fields, those of the formats included");
}

#[test]
fn possible_values_of_bounded_fields_come_back() {
    let leaves = leaves(&LINUX.description());
    let (_, before) = load(&LINUX, LINUX.payload()).unwrap();
    for (path, value, left_over) in POSSIBLE {
        let leaf = leaves.iter().find(|leaf| leaf.path == *path).expect(path);
        let payload = changed(LINUX.payload(), leaf, *value);
        assert_eq!(outcome(&LINUX, &payload), Ok(()), "{path}");
        assert_eq!(load(&LINUX, &payload).unwrap().1 != before, *left_over, "{path}");
    }
    // Fields that are bound to each other, changed together.
    let together: [&[(&str, u64)]; 3] = [
        &[("bar.intms", 5), ("bar.intmc", 5)],
        &[("aer_reqs[0].cmd.cid", 7), ("aer_reqs[0].cqe.cid", 7)],
        &[("dbbuf_enabled", 0), ("dbbuf_dbs", 0), ("dbbuf_eis", 0)],
    ];
    for fields in together {
        let payload = fields.iter().fold(LINUX.payload().to_vec(), |payload, (path, value)| {
            let leaf = leaves.iter().find(|leaf| leaf.path == *path).expect(path);
            changed(&payload, leaf, *value)
        });
        assert_eq!(outcome(&LINUX, &payload), Ok(()), "{fields:?}");
    }
}

#[test]
fn what_the_pin_or_weights_serve_is_refused() {
    let flipped = |fixture: &Fixture, path: &str, byte: usize, bit: usize| {
        let leaves = leaves(&fixture.description());
        let leaf = leaves.iter().find(|leaf| leaf.path == path).expect(path);
        let mut payload = fixture.payload().to_vec();
        payload[leaf.offset + byte] ^= 1 << bit;
        payload
    };
    // CC.AMS, though CAP.AMS is 0.
    let error = outcome(&LINUX, &flipped(&LINUX, "bar.cc", 2, 3)).unwrap_err();
    assert!(error.contains("bar.cc is ") && error.contains("round robin"), "{error}");
    // An entry that the guest has still to take: while MSI-X is off, it waits for the pin.
    assert_eq!(outcome(&LINUX, &flipped(&LINUX, "cq[0].head", 3, 0)), Ok(()));
    let error = outcome(&FIRMWARE, &flipped(&FIRMWARE, "cq[0].head", 3, 0)).unwrap_err();
    assert!(error.contains("irq_status is 0") && error.contains("waits for the interrupt pin"), "{error}");
}

#[test]
fn lists_have_their_maxima_and_their_events_come_back() {
    let leaves = leaves(&LINUX.description());
    let at = |path: &str| leaves.iter().find(|leaf| leaf.path == path).expect(path).offset;
    let (count, requests, queue, queued) =
        (at("outstanding_aers"), at("aer_reqs[0]"), at("aer_queue"), at("aer_queued"));
    for parked in [2u8, 8, 9] {
        let mut payload = LINUX.payload().to_vec();
        payload[count] = parked;
        let request = payload[requests..queue].to_vec();
        // The same identifier again and again: nothing forbids it.
        payload.splice(requests..requests, request.repeat(usize::from(parked) - 1));
        match parked {
            9 => assert!(outcome(&LINUX, &payload).unwrap_err().contains("outstanding_aers is 9")),
            _ => assert_eq!(outcome(&LINUX, &payload), Ok(())),
        }
    }
    for (events, refused) in [(1, None), (32, None), (33, Some("aer_queue is 33")), (65, Some("aer_queue"))] {
        let mut payload = LINUX.payload().to_vec();
        payload[queued + 3] = events as u8;
        payload.splice(queue..queue, [1, 2, 0, 4, 0].repeat(events));
        match (outcome(&LINUX, &payload), refused) {
            (outcome, None) => assert_eq!(outcome, Ok(()), "{events}"),
            (outcome, Some(refused)) => assert!(outcome.unwrap_err().contains(refused), "{events}"),
        }
    }
    for (event, named) in [([1, 8, 0, 4, 0], "event_type"), ([1, 2, 0, 4, 1], "resv")] {
        let mut payload = LINUX.payload().to_vec();
        payload[queued + 3] = 1;
        payload.splice(queue..queue, event);
        assert!(outcome(&LINUX, &payload).unwrap_err().contains(named));
    }
}

/// Whether configuration space can have the bit flipped.
fn config_can_differ(offset: usize, bit: usize) -> bool {
    match offset {
        // Vendor, device, class, header type: drivers bind by these.
        0..4 | 9..12 | 0x0e => false,
        // A 64-bit BAR of 16 KiB, no other, no ROM.
        0x10 => false,
        0x11 => bit >= 6,
        0x18..0x28 | 0x30..0x34 => false,
        // The list of capabilities.
        0x34 | 0x40 | 0x41 | 0x60 | 0x61 | 0x80 | 0x81 => false,
        // MSI-X: enable and function mask are the guest's; size and places are not.
        0x43 => bit >= 6,
        0x42..0x4c => false,
        // Power state: D1 and D2 do not exist.
        0x64 => bit >= 2,
        // Extended capabilities.
        256.. => false,
        _ => true,
    }
}

/// Whether the MSI-X state can have the bit flipped. `masked`: MSI-X is on, and these vectors are masked.
fn msix_can_differ(offset: usize, bit: usize, vectors: usize, masked: std::ops::Range<usize>) -> bool {
    match offset.checked_sub(vectors * 16) {
        // What is pending is masked, and exists.
        Some(byte) => masked.contains(&(byte * 8 + bit)),
        None => match offset % 16 {
            0 => bit >= 2,
            12 => bit == 0,
            13..16 => false,
            _ => true,
        },
    }
}

#[test]
fn the_pci_device_is_compared_bit_by_bit() {
    for (fixture, masked) in [(FIRMWARE, 0..0), (LINUX, 3..9)] {
        let fields = leaves(&fixture.description());
        let vectors = usize::from(fixture.config().vectors);
        let check = |leaf: &Leaf, offset: usize, bit: usize, can_differ: bool| {
            let mut payload = fixture.payload().to_vec();
            payload[leaf.offset + offset] ^= 1 << bit;
            match outcome(&fixture, &payload) {
                Ok(()) => assert!(can_differ, "{}[{offset:#x}] bit {bit} is accepted", leaf.path),
                Err(error) => {
                    assert!(!can_differ, "{}[{offset:#x}] bit {bit}: {error}", leaf.path);
                    assert!(error.contains(&format!(": {}[", leaf.path)), "byte {offset}: {error}");
                }
            }
        };
        let find = |path: &str| fields.iter().find(|leaf| leaf.path == path).expect(path);
        // All of the header; of the rest, which must be 0, every 64th byte.
        let (config, msix) = (find("pci_device.config"), find("msix"));
        for offset in (0..config.size).filter(|offset| *offset < 256 || offset % 64 == 0) {
            for bit in 0..8 {
                check(config, offset, bit, config_can_differ(offset, bit));
            }
        }
        for offset in 0..msix.size {
            for bit in [offset % 8, (offset / 16 + 1) % 8] {
                check(msix, offset, bit, msix_can_differ(offset, bit, vectors, masked.clone()));
            }
        }
    }
}

#[test]
fn flipped_bits_anywhere_are_refused_or_come_back() {
    // Most of the firmware's differs from the other's in nothing but its place.
    for (fixture, step) in [(FIRMWARE, 5), (LINUX, 1)] {
        let (mut refused, mut accepted) = (0, 0);
        for offset in (0..fixture.payload().len()).step_by(step) {
            let mut payload = fixture.payload().to_vec();
            payload[offset] ^= 1 << (offset % 8);
            match outcome(&fixture, &payload) {
                Ok(()) => accepted += 1,
                Err(_) => refused += 1,
            }
        }
        println!("measured: QEMU's NVMe sections: {refused} flipped bits refused, {accepted} came back");
        assert!(refused > 8000 / step && accepted > 8000 / step, "{refused} refused, {accepted} accepted");
    }
}

#[test]
fn truncated_and_overlong_sections_are_refused() {
    for length in 0..LINUX.payload().len() {
        assert!(load(&LINUX, &LINUX.payload()[..length]).is_err(), "{length}");
    }
    let overlong = [LINUX.payload(), &[0]].concat();
    assert!(load(&LINUX, &overlong).is_err());
}
