//! Faults on demand.

use super::*;
use crate::{Fault, FaultControl, FaultImage, Target};

fn faulty(image: Arc<dyn Backend>) -> (FaultImage, Arc<FaultControl>) {
    let control = Arc::new(FaultControl::default());
    (FaultImage::new(image, Arc::clone(&control)), control)
}

#[test]
fn short_transfers_go_on_until_all_is_moved() {
    on_both_engines(1, |context| {
        for (name, image, _file) in writable_images(CAPACITY) {
            let memory = context.memory().clone();
            let (image, control) = faulty(image);
            let mut numbers = Numbers(11);
            for bytes in [1, 511, 512, 4096, 5000, 40_000, 300_000] {
                for aligned in [true, false] {
                    println!("{name}: {bytes} bytes first, aligned: {aligned}");
                    let length = 65_536;
                    let ranges = match aligned {
                        true => vec![range(4096, 20_480), range(SEAM, 45_056)],
                        false => numbers.ranges(length),
                    };
                    let pattern = numbers.bytes(length);
                    poke(&memory, &ranges, &pattern);
                    control.inject(Target::Any, 0, 2, Fault::Short { bytes });
                    run(context, &image, Operation::Write { fua: true }, 8192, length, &ranges).unwrap();
                    poke(&memory, &ranges, &vec![0; length as usize]);
                    run(context, &image, Operation::Read, 8192, length, &ranges).unwrap();
                    assert!(peek(&memory, &ranges) == pattern);
                }
            }
        }
    });
}

#[test]
fn a_fault_meets_the_requests_it_was_meant_for() {
    on_both_engines(1, |context| {
        let (image, control) = faulty(Arc::new(MemoryImage::new(mapping(MIB))));
        control.inject(Target::Write, 1, 2, Fault::Fail(Failure::NoSpace));
        control.inject(Target::Flush, 0, 1, Fault::Fail(Failure::Io(libc::EIO)));
        let write =
            |context: &mut _| run(context, &image, Operation::Write { fua: false }, 0, 512, &[range(0, 512)]);
        assert_eq!(write(context), Ok(()));
        assert_eq!(run(context, &image, Operation::Read, 0, 512, &[range(0, 512)]), Ok(()));
        assert_eq!(write(context), Err(Failure::NoSpace));
        let zeroes = Operation::WriteZeroes { deallocate: false, fua: false };
        assert_eq!(run(context, &image, zeroes, 0, 512, &[]), Err(Failure::NoSpace));
        assert_eq!(write(context), Ok(()));
        assert_eq!(run(context, &image, Operation::Flush, 0, 0, &[]), Err(Failure::Io(libc::EIO)));
        assert_eq!(run(context, &image, Operation::Flush, 0, 0, &[]), Ok(()));
        assert_eq!(control.seen(), 7);
        control.inject(Target::Any, 0, u64::MAX, Fault::Fail(Failure::Io(libc::EIO)));
        assert_eq!(write(context), Err(Failure::Io(libc::EIO)));
        control.clear();
        assert_eq!(write(context), Ok(()));
    });
}

#[test]
fn held_requests_wait_until_they_are_released() {
    on_both_engines(4, |context| {
        for (_, image, _file) in writable_images(MIB) {
            let (image, control) = faulty(image);
            control.inject(Target::Write, 0, 2, Fault::Hold);
            for token in 0..3 {
                let write = Operation::Write { fua: false };
                queue(context, &image, token, write, token * 512, 512, &[range(token * 512, 512)]);
            }
            assert_eq!(collect(context, 1)[0].token, 2);
            assert_eq!((control.held(), context.in_flight()), (2, 2));
            assert!(!wait_for_event(context, 0) || context.in_flight() == 2);
            let releaser = std::thread::spawn({
                let control = Arc::clone(&control);
                move || control.release_held()
            });
            let mut tokens: Vec<_> = collect(context, 2).iter().map(|end| end.token).collect();
            tokens.sort_unstable();
            assert_eq!(tokens, [0, 1]);
            assert_eq!((control.held(), context.in_flight()), (0, 0));
            releaser.join().unwrap();
        }
    });
}

#[test]
fn a_lost_request_is_carried_out_but_never_ends() {
    for make in [IoContext::new, IoContext::with_threads] {
        for (name, image, _file) in writable_images(MIB) {
            let memory = guest();
            let (image, control) = faulty(image);
            let mut context = make(memory.clone(), 2).unwrap();
            control.inject(Target::Write, 0, 1, Fault::Lose);
            memory.write_slice(&[9; 512], GuestAddress(0)).unwrap();
            queue(&mut context, &image, 1, Operation::Write { fua: false }, 0, 512, &[range(0, 512)]);
            queue(&mut context, &image, 2, Operation::Flush, 0, 0, &[]);
            assert_eq!(collect(&mut context, 1)[0].token, 2);
            assert_eq!(context.in_flight(), 1, "{name}");
            // The end of a context waits for the write, so that another one sees it.
            drop(context);
            let mut context = make(memory.clone(), 2).unwrap();
            run(&mut context, &image, Operation::Read, 0, 512, &[range(FAR, 512)]).unwrap();
            assert_eq!(peek(&memory, &[range(FAR, 512)]), [9; 512], "{name}");
        }
    }
}
