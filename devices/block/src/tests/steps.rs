//! The state machine of a request, without a kernel.

use std::os::fd::AsRawFd;

use rustix::fs::FallocateFlags;

use super::*;
use crate::file::OpenFile;
use crate::transfer::{Distortion, Progress, Step, Transfer};

struct Machine {
    memory: GuestMemory,
    transfer: Transfer,
    _image: FileImage,
    _file: NamedTempFile,
}

fn begin(operation: Operation, length_bytes: u64, ranges: &[GuestRange]) -> Machine {
    let file = temporary_file(MIB);
    let options = FileOptions { direct: false, ..FileOptions::default() };
    let image = FileImage::open(file.path(), options).unwrap();
    let memory = guest();
    let mut transfer = Transfer::new(false);
    let request =
        Request { token: 1, operation, offset_bytes: 4096, length_bytes, buffers: Buffers::Guest(ranges) };
    let open: Arc<OpenFile> = image.held_file().unwrap();
    let descriptor = open.file().as_raw_fd();
    transfer.begin(&memory, open, &request, Distortion::default()).unwrap();
    assert_eq!(transfer.descriptor(), descriptor);
    Machine { memory, transfer, _image: image, _file: file }
}

impl Machine {
    fn step(&mut self) -> Step<'_> {
        self.transfer.step(&self.memory).unwrap()
    }

    fn advance(&mut self, result: i32) -> Progress {
        self.transfer.advance(&self.memory, result)
    }
}

/// Offset, total length and stability of a write step.
fn write_of(step: &Step<'_>) -> (u64, usize, bool) {
    match *step {
        Step::Write { segments, offset_bytes, stable } => {
            (offset_bytes, segments.iter().map(|segment| segment.length).sum(), stable)
        }
        ref other => panic!("a write was expected: {other:?}"),
    }
}

#[test]
fn forced_unit_access_reaches_the_system_call() {
    for fua in [false, true] {
        let mut write = begin(Operation::Write { fua }, 8192, &[range(0, 8192)]);
        assert_eq!(write_of(&write.step()), (4096, 8192, fua));
        // The rest of a short write too.
        assert_eq!(write.advance(512), Progress::Again);
        assert_eq!(write_of(&write.step()), (4608, 7680, fua));
        assert_eq!(write.advance(7680), Progress::Done(Ok(())));

        let mut zeroes = begin(Operation::WriteZeroes { deallocate: true, fua }, 8192, &[]);
        assert!(matches!(zeroes.step(), Step::Allocate { offset_bytes: 4096, length_bytes: 8192, .. }));
        if fua {
            assert_eq!(zeroes.advance(0), Progress::Again);
            assert!(matches!(zeroes.step(), Step::Synchronize));
        }
        assert_eq!(zeroes.advance(0), Progress::Done(Ok(())));
    }
}

#[test]
fn flush_is_a_synchronization() {
    let mut flush = begin(Operation::Flush, 0, &[]);
    assert!(matches!(flush.step(), Step::Synchronize));
    assert_eq!(flush.advance(-libc::EINTR), Progress::Again);
    assert!(matches!(flush.step(), Step::Synchronize));
    assert_eq!(flush.advance(-libc::EIO), Progress::Done(Err(Failure::Io(libc::EIO))));
}

#[test]
fn holes_are_made_only_where_they_were_asked_for() {
    let modes = [
        (Operation::Discard, FallocateFlags::PUNCH_HOLE),
        (Operation::WriteZeroes { deallocate: true, fua: false }, FallocateFlags::PUNCH_HOLE),
        (Operation::WriteZeroes { deallocate: false, fua: false }, FallocateFlags::ZERO_RANGE),
    ];
    for (operation, expected) in modes {
        let mut machine = begin(operation, 512, &[]);
        let Step::Allocate { mode, .. } = machine.step() else { panic!("{operation:?} allocates") };
        assert_eq!(mode, expected | FallocateFlags::KEEP_SIZE);
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_has_no_holes() {
    for error in [libc::EOPNOTSUPP, libc::EINVAL, libc::ENOSYS] {
        let mut zeroes = begin(Operation::WriteZeroes { deallocate: false, fua: true }, 400 * 1024, &[]);
        zeroes.step();
        assert_eq!(zeroes.advance(-error), Progress::Again);
        assert_eq!(write_of(&zeroes.step()), (4096, 256 * 1024, true));
        assert!(zeroes.transfer.bounce_bytes().iter().all(|&byte| byte == 0));
        assert_eq!(zeroes.advance(256 * 1024), Progress::Again);
        assert_eq!(write_of(&zeroes.step()), (4096 + 256 * 1024, 144 * 1024, true));
        assert_eq!(zeroes.advance(144 * 1024), Progress::Done(Ok(())));

        let mut discard = begin(Operation::Discard, 4096, &[]);
        discard.step();
        assert_eq!(discard.advance(-error), Progress::Done(Ok(())));
    }
}

#[test]
fn interrupted_calls_are_made_again_and_errors_are_named() {
    let results = [
        (-libc::ENOSPC, Failure::NoSpace),
        (-libc::EDQUOT, Failure::NoSpace),
        (-libc::EIO, Failure::Io(libc::EIO)),
        (0, Failure::Io(libc::EIO)),
        // More than was asked for: nothing to be believed.
        (1_000_000, Failure::Io(libc::EIO)),
    ];
    for (result, failure) in results {
        let mut write = begin(Operation::Write { fua: false }, 4096, &[range(0, 4096)]);
        for error in [libc::EINTR, libc::EAGAIN] {
            assert_eq!(write_of(&write.step()), (4096, 4096, false));
            assert_eq!(write.advance(-error), Progress::Again);
        }
        write.step();
        assert_eq!(write.advance(result), Progress::Done(Err(failure)));
    }
}

#[test]
fn a_read_that_failed_halfway_is_noted_as_dirty() {
    let mut read = begin(Operation::Read, 8192, &[range(0x3000, 8192)]);
    read.step();
    assert_eq!(read.advance(4096), Progress::Again);
    assert!(!is_dirty(&read.memory, 0x3000), "not before the end");
    read.step();
    assert_eq!(read.advance(-libc::EIO), Progress::Done(Err(Failure::Io(libc::EIO))));
    assert!(is_dirty(&read.memory, 0x3000) && is_dirty(&read.memory, 0x4000));
    assert!(!is_dirty(&read.memory, 0x5000));
}

#[test]
fn a_copy_writes_what_it_has_read_and_goes_on_behind_it() {
    const TURN: usize = 256 * 1024;
    let read_of = |step: &Step<'_>| match *step {
        Step::Read { segments, offset_bytes } => (offset_bytes, segments[0].length),
        ref other => panic!("a read was expected: {other:?}"),
    };
    let copy = Operation::Copy { source_offset_bytes: 512 * 1024, fua: true };
    let mut machine = begin(copy, 400 * 1024, &[]);
    assert_eq!(read_of(&machine.step()), (512 * 1024, TURN));
    assert_eq!(machine.advance(1024), Progress::Again);
    assert_eq!(write_of(&machine.step()), (4096, 1024, true), "no more than was read");
    // The disk takes half of it: the other half is read again.
    assert_eq!(machine.advance(512), Progress::Again);
    assert_eq!(read_of(&machine.step()), (512 * 1024 + 512, TURN));
    assert_eq!(machine.advance(-libc::EINTR), Progress::Again);
    assert_eq!(read_of(&machine.step()), (512 * 1024 + 512, TURN));
    assert_eq!(machine.advance(TURN as i32), Progress::Again);
    assert_eq!(write_of(&machine.step()), (4096 + 512, TURN, true));
    assert_eq!(machine.advance(TURN as i32), Progress::Again);
    let rest = 400 * 1024 - 512 - TURN;
    assert_eq!(read_of(&machine.step()), ((512 * 1024 + 512 + TURN) as u64, rest));
    assert_eq!(machine.advance(rest as i32), Progress::Again);
    assert_eq!(write_of(&machine.step()), ((4096 + 512 + TURN) as u64, rest, true));
    assert_eq!(machine.advance(rest as i32), Progress::Done(Ok(())));
}

#[test]
fn a_comparison_ends_at_the_first_difference() {
    let mut compare = begin(Operation::Compare, 8192, &[range(0x3000, 8192)]);
    compare.memory.write_slice(&[7; 8192], GuestAddress(0x3000)).unwrap();
    clear_dirty(&compare.memory);
    assert!(matches!(compare.step(), Step::Read { offset_bytes: 4096, .. }));
    compare.transfer.bounce_bytes().fill(7);
    assert_eq!(compare.advance(4096), Progress::Again);
    assert!(matches!(compare.step(), Step::Read { offset_bytes: 8192, .. }));
    compare.transfer.bounce_bytes()[..4095].fill(7);
    compare.transfer.bounce_bytes()[4095] = 8;
    assert_eq!(compare.advance(4096), Progress::Done(Err(Failure::Miscompare)));
    assert!(!is_dirty(&compare.memory, 0x3000), "what is compared is not changed");
}

#[test]
fn memory_that_lies_together_is_one_segment() {
    let pages: Vec<_> = (0..32).map(|page| range(0x10_000 + page * 4096, 4096)).collect();
    let mut read = begin(Operation::Read, 131_072, &pages);
    let Step::Read { segments, .. } = read.step() else { panic!("reads") };
    assert_eq!(segments.len(), 1);
    assert_eq!(segments[0].length, 131_072);
}

#[test]
fn a_direct_transfer_goes_on_from_a_block_boundary() {
    for (address, unaligned) in [(0x1000, false), (0x1001, true)] {
        let file = temporary_file(MIB);
        let open = Arc::new(OpenFile::with_granule(file.reopen().unwrap(), 512));
        let memory = guest();
        let mut transfer = Transfer::new(false);
        let ranges = [range(address, 4096)];
        let request = Request {
            token: 1,
            operation: Operation::Write { fua: false },
            offset_bytes: 0,
            length_bytes: 4096,
            buffers: Buffers::Guest(&ranges),
        };
        transfer.begin(&memory, open, &request, Distortion::default()).unwrap();
        let Step::Write { segments, .. } = transfer.step(&memory).unwrap() else { panic!("writes") };
        let bounced = segments[0].address != memory.get_host_address(GuestAddress(address)).unwrap().addr();
        assert_eq!(bounced, unaligned, "only what is not aligned is copied");
        assert_eq!(transfer.advance(&memory, 700), Progress::Again);
        assert_eq!(write_of(&transfer.step(&memory).unwrap()), (512, 3584, false));
        assert_eq!(transfer.advance(&memory, 511), Progress::Done(Err(Failure::Io(libc::EIO))));
    }
}
