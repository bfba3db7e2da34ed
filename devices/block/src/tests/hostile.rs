//! Requests that must not be believed.

use super::*;
use crate::{Error, NullImage};

#[test]
fn ranges_outside_the_image_are_refused() {
    on_both_engines(2, |context| {
        let mut images = writable_images(MIB);
        images.push(("null", Arc::new(NullImage::new(MIB)), None));
        for (name, image, _file) in images {
            let writes = [
                Operation::Read,
                Operation::Write { fua: true },
                Operation::WriteZeroes { deallocate: true, fua: false },
                Operation::Discard,
            ];
            for operation in writes {
                let moves = matches!(operation, Operation::Read | Operation::Write { .. });
                let ranges: &[_] = if moves { &[range(0, 1024)] } else { &[] };
                for offset in [MIB - 512, MIB, u64::MAX - 511, u64::MAX - 1023] {
                    let result = run(context, &*image, operation, offset, 1024, ranges);
                    assert_eq!(result, Err(Failure::OutOfRange), "{name}: {operation:?} at {offset:#x}");
                }
                let result = run(context, &*image, operation, 0, u64::MAX, ranges);
                assert_eq!(result, Err(Failure::OutOfRange), "{name}: {operation:?}");
                assert_eq!(run(context, &*image, operation, MIB - 1024, 1024, ranges), Ok(()), "{name}");
                assert_eq!(
                    run(context, &*image, operation, MIB, 0, &[]),
                    Ok(()),
                    "{name}: nothing at the end"
                );
            }
        }
    });
}

#[test]
fn totals_that_do_not_match_are_refused() {
    on_both_engines(2, |context| {
        for (name, image, _file) in writable_images(MIB) {
            for ranges in [&[][..], &[range(0, 512)], &[range(0, 512), range(0, 1024)]] {
                for operation in [Operation::Read, Operation::Write { fua: false }] {
                    let result = run(context, &*image, operation, 0, 1024, ranges);
                    assert_eq!(result, Err(Failure::OutOfRange), "{name}");
                }
            }
            let result = run(context, &*image, Operation::Flush, 0, 0, &[range(0, 512)]);
            assert_eq!(result, Err(Failure::OutOfRange), "{name}");
        }
    });
}

#[test]
fn memory_outside_the_guest_is_refused() {
    on_both_engines(2, |context| {
        let mut images = writable_images(MIB);
        images.push(("null", Arc::new(NullImage::new(MIB)), None));
        for (name, image, _file) in images {
            for outside in [HOLE - 512, HOLE, FAR - 512, FAR + 4 * MIB - 512, u64::MAX - 1023, u64::MAX - 511]
            {
                for operation in [Operation::Read, Operation::Write { fua: false }] {
                    let ranges = [range(0, 1024), range(outside, 1024)];
                    let result = run(context, &*image, operation, 0, 2048, &ranges);
                    assert_eq!(result, Err(Failure::GuestMemory), "{name}: {outside:#x}");
                }
            }
            assert_eq!(context.memory().read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
            run(context, &*image, Operation::Read, 0, 512, &[range(HOLE - 512, 512)]).unwrap();
        }
    });
}

#[test]
fn read_only_images_refuse_every_kind_of_write() {
    on_both_engines(2, |context| {
        let file = temporary_file(MIB);
        let options = FileOptions { read_only: true, ..FileOptions::default() };
        let images: [Box<dyn Backend>; 3] = [
            Box::new(FileImage::open(file.path(), options).unwrap()),
            Box::new(MemoryImage::new(mapping(MIB)).read_only()),
            Box::new(NullImage::new(MIB).read_only()),
        ];
        for image in images {
            assert!(image.identity().read_only);
            let write = run(context, &*image, Operation::Write { fua: false }, 0, 512, &[range(0, 512)]);
            assert_eq!(write, Err(Failure::ReadOnly));
            for operation in [Operation::Discard, Operation::WriteZeroes { deallocate: true, fua: true }] {
                assert_eq!(run(context, &*image, operation, 0, 512, &[]), Err(Failure::ReadOnly));
            }
            run(context, &*image, Operation::Read, 0, 512, &[range(0, 512)]).unwrap();
            run(context, &*image, Operation::Flush, 0, 0, &[]).unwrap();
            image.release().unwrap();
        }
    });
}

#[test]
fn an_image_cut_short_behind_our_back_gives_errors() {
    on_both_engines(2, |context| {
        let file = temporary_file(MIB);
        let image = FileImage::open(file.path(), FileOptions::default()).unwrap();
        file.as_file().set_len(4096).unwrap();
        let read = |context: &mut _, offset, length| {
            run(context, &image, Operation::Read, offset, length, &[range(0, length)])
        };
        assert_eq!(read(context, 0, 4096), Ok(()));
        assert_eq!(read(context, 8192, 4096), Err(Failure::Io(libc::EIO)));
        assert_eq!(read(context, 0, 8192), Err(Failure::Io(libc::EIO)));
    });
}

#[test]
fn one_request_too_many_fails_and_the_others_do_not() {
    on_both_engines(3, |context| {
        let file = temporary_file(MIB);
        let image = FileImage::open(file.path(), FileOptions::default()).unwrap();
        for token in 0..5 {
            queue(context, &image, token, Operation::Read, 0, 512, &[range(token * 512, 512)]);
        }
        let mut results: Vec<_> = collect(context, 5).iter().map(|end| (end.token, end.result)).collect();
        results.sort_by_key(|end| end.0);
        let busy = Err(Failure::Io(libc::EAGAIN));
        assert_eq!(results, [(0, Ok(())), (1, Ok(())), (2, Ok(())), (3, busy), (4, busy)]);
    });
}

#[test]
fn contexts_have_a_sensible_depth() {
    for depth in [0, IoContext::MAXIMUM_DEPTH + 1, u32::MAX] {
        assert!(matches!(IoContext::new(guest(), depth), Err(Error::Depth { .. })));
        assert!(matches!(IoContext::with_threads(guest(), depth), Err(Error::Depth { .. })));
    }
}

#[test]
fn direct_images_refuse_what_the_device_cannot_address() {
    let file = temporary_file(MIB);
    let image = FileImage::open(file.path(), FileOptions::default()).unwrap();
    let flags = rustix::fs::fcntl_getfl(image.held_file().unwrap().file()).unwrap();
    let direct = flags.contains(rustix::fs::OFlags::DIRECT);
    let mut context = IoContext::new(guest(), 1).unwrap();
    let result = run(&mut context, &image, Operation::Read, 1, 512, &[range(0, 512)]);
    let expected = if direct { Err(Failure::OutOfRange) } else { Ok(()) };
    println!("the file system of the temporary folder offers direct I/O: {direct}");
    assert_eq!(result, expected);
}
