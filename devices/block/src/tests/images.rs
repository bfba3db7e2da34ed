//! What every image does.

use super::*;
use crate::NullImage;

#[test]
fn what_was_written_is_read_through_any_memory() {
    on_both_engines(4, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            println!("{name}");
            let memory = context.memory().clone();
            let pattern = Numbers(7).bytes(24_576);
            // Across the seam of two mappings, then far away.
            let from = [range(SEAM - 8192, 16_384), range(FAR, 8192)];
            let to = [range(0x1000, 4096), range(SEAM - 4096, 8192), range(FAR + 0x8000, 12_288)];
            poke(&memory, &from, &pattern);
            let write = Operation::Write { fua: false };
            run(context, &*image, write, 4096, 24_576, &from).unwrap();
            run(context, &*image, Operation::Flush, 0, 0, &[]).unwrap();
            clear_dirty(&memory);
            run(context, &*image, Operation::Read, 4096, 24_576, &to).unwrap();
            assert!(peek(&memory, &to) == pattern);
            for address in [0x1000, SEAM - 4096, SEAM, FAR + 0x8000, FAR + 0xa000] {
                assert!(is_dirty(&memory, address), "{name}: page {address:#x} was written");
            }
            for address in [0, 0x2000, SEAM - 8192, SEAM + 4096, FAR + 0x7000, FAR + 0xb000] {
                assert!(!is_dirty(&memory, address), "{name}: page {address:#x} was not");
            }
        }
    });
}

#[test]
fn zeroes_and_discard_change_their_range_only() {
    on_both_engines(4, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            println!("{name}");
            let memory = context.memory().clone();
            let pattern = Numbers(9).bytes(65_536);
            let all = [range(0x10_0000, 65_536)];
            let mut expected = pattern.clone();
            poke(&memory, &all, &pattern);
            run(context, &*image, Operation::Write { fua: true }, 0, 65_536, &all).unwrap();
            let zeroes = [(4096, 8192, false, false), (20_480, 4096, true, false), (30_720, 512, true, true)];
            for (offset, length, deallocate, fua) in zeroes {
                let operation = Operation::WriteZeroes { deallocate, fua };
                run(context, &*image, operation, offset, length, &[]).unwrap();
                expected[offset as usize..(offset + length) as usize].fill(0);
            }
            run(context, &*image, Operation::Discard, 40_960, 4096, &[]).unwrap();
            run(context, &*image, Operation::Read, 0, 65_536, &all).unwrap();
            let mut found = peek(&memory, &all);
            let discarded = &mut found[40_960..45_056];
            assert!(discarded.iter().all(|&byte| byte == 0) || discarded == &pattern[40_960..45_056]);
            discarded.copy_from_slice(&pattern[40_960..45_056]);
            assert!(found == expected, "{name}");
        }
    });
}

#[test]
fn random_requests_agree_with_a_plain_array() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            println!("{name}");
            let memory = context.memory().clone();
            let mut numbers = Numbers(0x1234_5678);
            let mut disk = vec![0; CAPACITY as usize];
            for round in 0..150 {
                let length = 512 * (1 + numbers.next(if round % 16 == 0 { 2000 } else { 40 }));
                let offset = 512 * numbers.next((CAPACITY - length) / 512 + 1);
                let here = offset as usize..(offset + length) as usize;
                let ranges = numbers.ranges(length);
                match numbers.next(8) {
                    0 => {
                        let operation = Operation::WriteZeroes { deallocate: round % 2 == 0, fua: false };
                        run(context, &*image, operation, offset, length, &[]).unwrap();
                        disk[here].fill(0);
                    }
                    1..=4 => {
                        let bytes = numbers.bytes(length);
                        poke(&memory, &ranges, &bytes);
                        let operation = Operation::Write { fua: round % 32 == 0 };
                        run(context, &*image, operation, offset, length, &ranges).unwrap();
                        disk[here].copy_from_slice(&bytes);
                    }
                    _ => {
                        run(context, &*image, Operation::Read, offset, length, &ranges).unwrap();
                        assert!(peek(&memory, &ranges) == disk[here], "{name}, round {round}");
                    }
                }
            }
            run(context, &*image, Operation::Read, 0, MIB, &[range(0, MIB)]).unwrap();
            assert!(peek(&memory, &[range(0, MIB)]) == disk[..MIB as usize]);
        }
    });
}

#[test]
fn more_pieces_than_one_system_call_takes() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            println!("{name}");
            let memory = context.memory().clone();
            // 3000 pieces that cannot be joined.
            let pieces = |start: u64| -> Vec<_> { (0..3000).map(|n| range(start + n * 1024, 512)).collect() };
            let bytes = Numbers(3).bytes(3000 * 512);
            poke(&memory, &pieces(0), &bytes);
            run(context, &*image, Operation::Write { fua: false }, 512, 3000 * 512, &pieces(0)).unwrap();
            run(context, &*image, Operation::Read, 512, 3000 * 512, &pieces(SEAM)).unwrap();
            assert!(peek(&memory, &pieces(SEAM)) == bytes, "{name}");
        }
    });
}

#[test]
fn many_requests_in_flight_end_once_each() {
    on_both_engines(64, |context| {
        for (_, image, _file) in writable_images(CAPACITY) {
            let memory = context.memory().clone();
            for (token, operation) in (0..64).map(|n| (n, Operation::Write { fua: false })) {
                memory.write_slice(&[token as u8 + 1; 4096], GuestAddress(token * 4096)).unwrap();
                queue(context, &*image, token, operation, token * 4096, 4096, &[range(token * 4096, 4096)]);
            }
            assert_eq!(context.in_flight(), 64);
            let mut tokens: Vec<_> = collect(context, 64).iter().map(|end| (end.result, end.token)).collect();
            tokens.sort_by_key(|end| end.1);
            assert_eq!(tokens, (0..64).map(|token| (Ok(()), token)).collect::<Vec<_>>());
            for token in 0..64 {
                queue(
                    context,
                    &*image,
                    token,
                    Operation::Read,
                    token * 4096,
                    4096,
                    &[range(FAR + token * 4096, 4096)],
                );
            }
            collect(context, 64);
            for token in 0..64 {
                assert_eq!(peek(&memory, &[range(FAR + token * 4096, 4096)]), [token as u8 + 1; 4096]);
            }
        }
    });
}

#[test]
fn null_reads_zeroes_and_keeps_nothing() {
    on_both_engines(1, |context| {
        let image = NullImage::new(MIB);
        let memory = context.memory().clone();
        let here = [range(0x1000, 8192)];
        poke(&memory, &here, &[5; 8192]);
        run(context, &image, Operation::Write { fua: true }, 0, 8192, &here).unwrap();
        clear_dirty(&memory);
        run(context, &image, Operation::Read, 0, 8192, &here).unwrap();
        assert_eq!(peek(&memory, &here), [0; 8192]);
        assert!(is_dirty(&memory, 0x2000) && !is_dirty(&memory, 0x3000));
    });
}

#[test]
fn writes_to_a_memory_image_are_in_its_own_bitmap() {
    let mut context = IoContext::new(guest(), 1).unwrap();
    let mapping = mapping(MIB);
    let image = MemoryImage::new(Arc::clone(&mapping));
    run(&mut context, &image, Operation::Write { fua: false }, 8192, 512, &[range(0, 512)]).unwrap();
    run(&mut context, &image, Operation::WriteZeroes { deallocate: true, fua: false }, 20_480, 512, &[])
        .unwrap();
    run(&mut context, &image, Operation::Read, 0, 4096, &[range(0, 4096)]).unwrap();
    let dirty: Vec<_> = (0..8).filter(|page| mapping.bitmap().dirty_at(page * 4096)).collect();
    assert_eq!(dirty, [2, 5]);
}
