//! Compare, Verify, Copy, and reads with gaps.

use super::*;
use crate::{Fault, FaultControl, FaultImage, NOWHERE, NullImage, Target};

const LENGTH: u64 = 600 * 1024;

/// Fills guest memory over fresh ranges with a pattern and writes it to `offset`.
fn write_pattern(
    context: &mut IoContext,
    image: &dyn Backend,
    numbers: &mut Numbers,
    offset: u64,
    length: u64,
) -> Vec<u8> {
    let pattern = numbers.bytes(length);
    let ranges = [range(FAR, length)];
    poke(context.memory(), &ranges, &pattern);
    run(context, image, Operation::Write { fua: false }, offset, length, &ranges).unwrap();
    pattern
}

fn read_back(context: &mut IoContext, image: &dyn Backend, offset: u64, length: u64) -> Vec<u8> {
    let ranges = [range(FAR, length)];
    run(context, image, Operation::Read, offset, length, &ranges).unwrap();
    peek(context.memory(), &ranges)
}

#[test]
fn compare_finds_every_different_byte_and_changes_nothing() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let mut numbers = Numbers(5);
            let pattern = write_pattern(context, &*image, &mut numbers, 4096, LENGTH);
            for aligned in [true, false] {
                let ranges = match aligned {
                    true => vec![range(8192, 65_536), range(SEAM - 4096, LENGTH - 65_536)],
                    false => numbers.ranges(LENGTH),
                };
                poke(context.memory(), &ranges, &pattern);
                clear_dirty(context.memory());
                let compare =
                    |context: &mut _| run(context, &*image, Operation::Compare, 4096, LENGTH, &ranges);
                assert_eq!(compare(context), Ok(()), "{name}");
                for position in [0, 1, 4095, 4096, 262_143, 262_144, LENGTH - 1] {
                    let mut other = pattern.clone();
                    other[position as usize] ^= 0x10;
                    poke(context.memory(), &ranges, &other);
                    assert_eq!(compare(context), Err(Failure::Miscompare), "{name}: byte {position}");
                    assert!(peek(context.memory(), &ranges) == other);
                }
                assert!(read_back(context, &*image, 4096, LENGTH) == pattern);
            }
        }
    });
}

#[test]
fn what_is_compared_must_be_memory_of_the_guest() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            for ranges in [[range(HOLE - 256, 512)], [GuestRange { address: NOWHERE, length_bytes: 512 }]] {
                for operation in [Operation::Compare, Operation::Write { fua: false }] {
                    let result = run(context, &*image, operation, 0, 512, &ranges);
                    assert_eq!(result, Err(Failure::GuestMemory), "{name}: {operation:?}");
                }
            }
        }
    });
}

#[test]
fn a_copy_has_the_bytes_of_its_source() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let (image, control) = (Arc::clone(&image), Arc::new(FaultControl::default()));
            let image = FaultImage::new(image, Arc::clone(&control));
            let mut numbers = Numbers(9);
            for (fua, short) in [(false, None), (true, Some(512)), (false, Some(5000)), (true, Some(300_000))]
            {
                let pattern = write_pattern(context, &image, &mut numbers, 8192, LENGTH);
                let around = write_pattern(context, &image, &mut numbers, 2 * MIB, LENGTH + 1024);
                if let Some(bytes) = short {
                    control.inject(Target::Any, 0, 1, Fault::Short { bytes });
                }
                let copy = Operation::Copy { source_offset_bytes: 8192, fua };
                run(context, &image, copy, 2 * MIB + 512, LENGTH, &[]).unwrap();
                let after = read_back(context, &image, 2 * MIB, LENGTH + 1024);
                assert!(after[..512] == around[..512], "{name}");
                assert!(after[512..512 + LENGTH as usize] == pattern, "{name}, fua {fua}, short {short:?}");
                assert!(after[512 + LENGTH as usize..] == around[512 + LENGTH as usize..], "{name}");
                assert!(read_back(context, &image, 8192, LENGTH) == pattern, "{name}");
            }
        }
    });
}

#[test]
fn neither_side_of_a_copy_may_lie_outside() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(MIB) {
            for (source, destination) in
                [(MIB, 0), (MIB - 512, 0), (0, MIB - 512), (u64::MAX, 0), (0, u64::MAX)]
            {
                let copy = Operation::Copy { source_offset_bytes: source, fua: false };
                let result = run(context, &*image, copy, destination, 1024, &[]);
                assert_eq!(result, Err(Failure::OutOfRange), "{name}: {source} to {destination}");
            }
        }
    });
}

#[test]
fn verify_reads_without_a_buffer() {
    on_both_engines(1, |context| {
        for (name, image, file) in writable_images(MIB) {
            run(context, &*image, Operation::Verify, 0, MIB, &[]).unwrap();
            let beyond = run(context, &*image, Operation::Verify, 512, MIB, &[]);
            assert_eq!(beyond, Err(Failure::OutOfRange), "{name}");
            // Someone cuts the file: what is gone cannot be read. A qcow2 file never held what was never written.
            if let Some(file) = file.filter(|_| name != "qcow2") {
                file.as_file().set_len(MIB / 2).unwrap();
                run(context, &*image, Operation::Verify, 0, MIB / 2, &[]).unwrap();
                let cut = run(context, &*image, Operation::Verify, 0, MIB, &[]);
                assert_eq!(cut, Err(Failure::Io(libc::EIO)), "{name}");
            }
        }
    });
}

#[test]
fn a_read_skips_what_goes_nowhere() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let pattern = write_pattern(context, &*image, &mut Numbers(3), 0, LENGTH);
            let nowhere = |length_bytes| GuestRange { address: NOWHERE, length_bytes };
            let ranges = [
                nowhere(1000),
                range(0x1001, 3096),
                nowhere(400_000),
                range(0x9000, LENGTH - 404_196),
                nowhere(100),
            ];
            context.memory().write_slice(&[0xee; 0x1000], GuestAddress(0x800)).unwrap();
            run(context, &*image, Operation::Read, 0, LENGTH, &ranges).unwrap();
            assert!(peek(context.memory(), &ranges[1..2]) == pattern[1000..4096], "{name}");
            let last = LENGTH as usize - 100;
            assert!(peek(context.memory(), &ranges[3..4]) == pattern[404_096..last], "{name}");
            assert_eq!(peek(context.memory(), &[range(0x1000, 1)]), [0xee], "{name}");
        }
    });
}

#[test]
fn an_image_that_keeps_nothing_compares_as_zeroes() {
    on_both_engines(1, |context| {
        let image = NullImage::new(MIB);
        let ranges = [range(SEAM - 5000, 8192)];
        poke(context.memory(), &ranges, &[0; 8192]);
        let compare = |context: &mut _| run(context, &image, Operation::Compare, 0, 8192, &ranges);
        assert_eq!(compare(context), Ok(()));
        context.memory().write_slice(&[1], GuestAddress(SEAM + 100)).unwrap();
        assert_eq!(compare(context), Err(Failure::Miscompare));
        run(context, &image, Operation::Copy { source_offset_bytes: 512, fua: true }, 0, 512, &[]).unwrap();
        run(context, &image, Operation::Verify, 0, MIB, &[]).unwrap();
    });
}

#[test]
fn only_what_changes_an_image_needs_one_that_can_be_written() {
    on_both_engines(1, |context| {
        let file = temporary_file(MIB);
        let options = FileOptions { read_only: true, ..FileOptions::default() };
        let image = FileImage::open(file.path(), options).unwrap();
        run(context, &image, Operation::Verify, 0, MIB, &[]).unwrap();
        poke(context.memory(), &[range(0, 512)], &[0; 512]);
        run(context, &image, Operation::Compare, 0, 512, &[range(0, 512)]).unwrap();
        let copy = Operation::Copy { source_offset_bytes: 512, fua: false };
        assert_eq!(run(context, &image, copy, 0, 512, &[]), Err(Failure::ReadOnly));
    });
}

#[test]
fn fill_writes_its_pattern_over_all_of_the_range_and_nothing_else() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let before = write_pattern(context, &*image, &mut Numbers(9), 0, LENGTH + 8192);
            run(context, &*image, Operation::Fill { pattern: 0x1122_3344 }, 4096, LENGTH, &[]).unwrap();
            let after = read_back(context, &*image, 0, LENGTH + 8192);
            let end = 4096 + LENGTH as usize;
            assert!(after[..4096] == before[..4096] && after[end..] == before[end..], "{name}");
            assert!(after[4096..end].chunks(4).all(|bytes| bytes == [0x44, 0x33, 0x22, 0x11]), "{name}");
            let beyond = run(context, &*image, Operation::Fill { pattern: 0 }, CAPACITY - 4096, 8192, &[]);
            assert_eq!(beyond, Err(Failure::OutOfRange), "{name}");
        }
    });
}

#[test]
fn a_fill_that_comes_back_short_goes_on_within_its_pattern() {
    on_both_engines(1, |context| {
        for (name, inner, _file) in writable_images(CAPACITY) {
            let control = Arc::new(FaultControl::default());
            let image = FaultImage::new(inner, Arc::clone(&control));
            control.inject(Target::Write, 0, 1, Fault::Short { bytes: 5 });
            run(context, &image, Operation::Fill { pattern: 0x1122_3344 }, 0, LENGTH, &[]).unwrap();
            let after = read_back(context, &image, 0, LENGTH);
            assert!(after.chunks(4).all(|bytes| bytes == [0x44, 0x33, 0x22, 0x11]), "{name}");
        }
    });
}

#[test]
fn private_memory_is_used_in_place_of_the_guests_and_kept_until_the_end() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let control = Arc::new(FaultControl::default());
            let image = FaultImage::new(image, Arc::clone(&control));
            let mut numbers = Numbers(11);
            let pattern = numbers.bytes(LENGTH);
            let guest = numbers.bytes(LENGTH);
            // The same addresses in both memories, at an alignment that a device takes and at another.
            for (address, held) in [(4096, false), (4096, true), (4099, true)] {
                let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MIB as usize)]).unwrap();
                let (memory, ranges) = (Arc::new(memory), [range(address, LENGTH)]);
                poke(&memory, &ranges, &pattern);
                poke(context.memory(), &ranges, &guest);
                let carry_out = |context: &mut IoContext, operation| {
                    if held {
                        control.inject(Target::Any, 0, 1, crate::Fault::Hold);
                    }
                    let memory = Arc::clone(&memory);
                    let buffers = Buffers::Private(&memory, &ranges);
                    let request =
                        Request { token: 1, operation, offset_bytes: 8192, length_bytes: LENGTH, buffers };
                    image.submit(context, &request);
                    context.submit().unwrap();
                    drop(memory);
                    control.release_held();
                    assert_eq!(collect(context, 1)[0].result, Ok(()), "{name}: {operation:?}");
                };
                carry_out(context, Operation::Write { fua: true });
                carry_out(context, Operation::Compare);
                poke(&memory, &ranges, &vec![0; LENGTH as usize]);
                carry_out(context, Operation::Read);
                assert!(peek(&memory, &ranges) == pattern, "{name}");
                assert_eq!(Arc::strong_count(&memory), 1, "{name}: it is let go");
                clear_dirty(context.memory());
                carry_out(context, Operation::Read);
                assert!(peek(context.memory(), &ranges) == guest, "{name}: the guest's memory is as it was");
                assert!(!is_dirty(context.memory(), 4096), "{name}");
            }
        }
    });
}
