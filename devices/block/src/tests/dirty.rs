//! Copies of images that are in use.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::*;
use crate::{DIRTY_BLOCK_BYTES, Fault, FaultControl, FaultImage, NullImage, Target};

/// Copies the blocks of `words` from `image` into `copy`.
fn copy_blocks(context: &mut IoContext, image: &dyn Backend, words: &[u64], copy: &mut [u8]) {
    for block in (0..copy.len() as u64 / DIRTY_BLOCK_BYTES)
        .filter(|block| words[(block / 64) as usize] >> (block % 64) & 1 == 1)
    {
        let (offset, to) = (block * DIRTY_BLOCK_BYTES, [range(FAR, DIRTY_BLOCK_BYTES)]);
        run(context, image, Operation::Read, offset, DIRTY_BLOCK_BYTES, &to).unwrap();
        let bytes = peek(&context.memory().clone(), &to);
        copy[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
}

/// One of all the ways to change an image, somewhere.
fn change(context: &mut IoContext, image: &dyn Backend, numbers: &mut Numbers) {
    let length = 4096 * (1 + numbers.next(40));
    let offset = 4096 * numbers.next((CAPACITY - length) / 4096 + 1);
    let operation = match numbers.next(6) {
        0 => Operation::WriteZeroes { deallocate: numbers.next(2) == 0, fua: false },
        1 => Operation::Discard,
        2 => Operation::Fill { pattern: numbers.next(u64::from(u32::MAX)) as u32 },
        3 => Operation::Copy {
            source_offset_bytes: 4096 * numbers.next((CAPACITY - length) / 4096),
            fua: false,
        },
        _ => Operation::Write { fua: false },
    };
    let memory = context.memory().clone();
    let from = [range(0x10_0000, length)];
    if matches!(operation, Operation::Write { .. }) {
        poke(&memory, &from, &vec![numbers.next(256) as u8; length as usize]);
        run(context, image, operation, offset, length, &from).unwrap();
    } else {
        run(context, image, operation, offset, length, &[]).unwrap();
    }
}

#[test]
fn a_copy_that_is_made_while_somebody_writes_is_what_the_image_is_in_the_end() {
    on_both_engines(4, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let Some(dirty) = image.dirty_blocks() else {
                assert_eq!(name, "memory", "it moves as memory does");
                continue;
            };
            println!("{name}");
            let mut copy = vec![0; CAPACITY as usize];
            let (stop, uring) = (AtomicBool::new(false), context.has_ring());
            let rounds = std::thread::scope(|scope| {
                let (image, stop) = (&image, &stop);
                scope.spawn(move || {
                    let new = if uring { IoContext::new } else { IoContext::with_threads };
                    let (mut context, mut numbers) = (new(guest(), 4).unwrap(), Numbers(11));
                    while !stop.load(Ordering::Relaxed) {
                        change(&mut context, &**image, &mut numbers);
                    }
                });
                dirty.arm(CAPACITY);
                copy_blocks(context, &**image, &[u64::MAX; 2], &mut copy);
                let mut rounds = 0;
                let watchdog = Instant::now() + Duration::from_secs(60);
                while rounds < 30 && Instant::now() < watchdog {
                    let words = dirty.take().unwrap();
                    copy_blocks(context, &**image, &words, &mut copy);
                    rounds += u32::from(words.iter().any(|word| *word != 0));
                }
                stop.store(true, Ordering::Relaxed);
                rounds
            });
            assert_eq!(rounds, 30, "somebody wrote meanwhile");
            // Nobody writes any more.
            let words = dirty.take().unwrap();
            copy_blocks(context, &*image, &words, &mut copy);
            let mut whole = vec![0; CAPACITY as usize];
            copy_blocks(context, &*image, &[u64::MAX; 2], &mut whole);
            let differing = (0..128).filter(|block| {
                let part = block * DIRTY_BLOCK_BYTES as usize..(block + 1) * DIRTY_BLOCK_BYTES as usize;
                copy[part.clone()] != whole[part]
            });
            assert_eq!(differing.collect::<Vec<_>>(), Vec::<usize>::new(), "{name}");
            assert_eq!(dirty.take(), Some(vec![0; 2]), "what only reads sets nothing");
            dirty.disarm();
        }
    });
}

#[test]
fn every_operation_that_writes_sets_its_blocks_and_no_other_does() {
    on_both_engines(4, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let Some(dirty) = image.dirty_blocks() else { continue };
            dirty.arm(CAPACITY);
            let memory = [range(0x1000, 4096)];
            for (operation, ranges) in [
                (Operation::Read, &memory[..]),
                (Operation::Write { fua: false }, &memory),
                (Operation::Write { fua: true }, &memory),
                (Operation::Flush, &[]),
                (Operation::WriteZeroes { deallocate: false, fua: false }, &[]),
                (Operation::WriteZeroes { deallocate: true, fua: true }, &[]),
                (Operation::Fill { pattern: 5 }, &[]),
                (Operation::Discard, &[]),
                (Operation::Verify, &[]),
                (Operation::Copy { source_offset_bytes: 0, fua: false }, &[]),
            ] {
                let length = if operation == Operation::Flush { 0 } else { 4096 };
                run(context, &*image, operation, 70 * DIRTY_BLOCK_BYTES, length, ranges).unwrap();
                let expected = if operation.writes() { vec![0, 1 << 6] } else { vec![0, 0] };
                assert_eq!(dirty.take(), Some(expected), "{name}: {operation:?}");
            }
            let beyond = run(context, &*image, Operation::Discard, CAPACITY, 4096, &[]);
            assert_eq!((beyond, dirty.take()), (Err(Failure::OutOfRange), Some(vec![0, 0])));
        }
    });
}

/// The first part is in the image, the rest is not: it is not known where it ended.
#[test]
fn what_a_write_in_several_turns_has_changed_is_set_at_its_end() {
    on_both_engines(4, |context| {
        let file = temporary_file(CAPACITY);
        let inner = Arc::new(FileImage::open(file.path(), FileOptions::default()).unwrap());
        let control = Arc::new(FaultControl::default());
        let image = FaultImage::new(inner, Arc::clone(&control));
        let dirty = image.dirty_blocks().unwrap();
        dirty.arm(CAPACITY);
        control.inject(Target::Write, 0, 1, Fault::Short { bytes: DIRTY_BLOCK_BYTES });
        let from = [range(0x10_0000, 3 * DIRTY_BLOCK_BYTES)];
        run(context, &image, Operation::Write { fua: false }, 0, 3 * DIRTY_BLOCK_BYTES, &from).unwrap();
        assert_eq!(dirty.take(), Some(vec![7, 0]));
        control.inject(Target::Write, 0, 1, Fault::Fail(Failure::NoSpace));
        run(context, &image, Operation::Write { fua: false }, 0, 3 * DIRTY_BLOCK_BYTES, &from).unwrap_err();
        assert_eq!(dirty.take(), Some(vec![0, 0]), "nothing was begun");
    });
}

#[test]
fn holes_are_found_where_there_are_some() {
    let file = temporary_file(CAPACITY);
    std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[7; 4096], 5 * MIB).unwrap();
    let image = FileImage::open(file.path(), FileOptions::default()).unwrap();
    let data = image.next_data(0).unwrap().expect("something was written");
    assert!(data.start <= 5 * MIB && data.end >= 5 * MIB + 4096);
    assert!(data.end - data.start < CAPACITY / 2, "the rest is a hole: {data:?}");
    assert_eq!(image.next_data(data.end).unwrap(), None);
    assert_eq!(image.next_data(CAPACITY).unwrap(), None);
    image.release().unwrap();
    let error = image.next_data(0).unwrap_err().to_string();
    assert!(error.contains("cannot find the holes"), "{error}");
    assert_eq!(
        NullImage::new(MIB).next_data(4096).unwrap(),
        Some(4096..MIB),
        "what does not tell is all data"
    );
}
