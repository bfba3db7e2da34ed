use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::thread::{self, ScopedJoinHandle};

use vm_memory::ReadVolatile;

use super::*;
use crate::memory::{GuestRam, HugePages, RAM_LOW, say_that_there_are_none};
use crate::vcpu::tests::TestGuest;

const PAGE: u64 = PAGE_SIZE_BYTES;

fn ram() -> GuestRam {
    GuestRam::new(1 << 20, &[("namespace".into(), 1 << 16)]).unwrap()
}

/// Who waits, by whichever thread.
fn next(userfault: &Userfault) -> Vec<Fault> {
    let mut faults = Vec::new();
    userfault.faults(&mut faults).unwrap();
    let mut known =
        faults.iter().map(|fault| std::path::PathBuf::from(format!("/proc/self/task/{}", fault.thread)));
    assert!(known.all(|thread| thread.exists()), "{faults:?}");
    faults.iter_mut().for_each(|fault| fault.thread = 0);
    faults
}

fn word(block: &RamBlock, offset: u64) -> u32 {
    let mut data = [0; 4];
    block.read(offset, &mut data).unwrap();
    u32::from_le_bytes(data)
}

/// Has a thread look at a word.
fn look<'a>(scope: &'a thread::Scope<'a, '_>, block: &'a RamBlock, offset: u64) -> ScopedJoinHandle<'a, u32> {
    scope.spawn(move || word(block, offset))
}

#[test]
fn who_touches_a_missing_page_waits_for_it() {
    let ram = ram();
    let userfault = Userfault::register(ram.blocks()).unwrap();
    let [low, namespace] = ram.blocks() else { panic!("there are two") };
    thread::scope(|scope| {
        let one = look(scope, low, 5 * PAGE + 8);
        assert_eq!(next(&userfault), [Fault { block: 0, offset: 5 * PAGE, thread: 0 }]);
        let two = look(scope, namespace, 0xfffc);
        assert_eq!(next(&userfault), [Fault { block: 1, offset: 0xf000, thread: 0 }]);
        userfault.place(1, 0xf000, &[2; PAGE as usize]).unwrap();
        assert_eq!(two.join().unwrap(), 0x0202_0202);
        assert!(!one.is_finished(), "its page is another");
        userfault.place(0, 4 * PAGE, &[1; 3 * PAGE as usize]).unwrap();
        assert_eq!(one.join().unwrap(), 0x0101_0101);
    });
    assert_eq!([4, 6].map(|page| word(low, page * PAGE)), [0x0101_0101; 2], "they came with it");
    assert_eq!(low.populated_ranges().unwrap(), std::slice::from_ref(&(4 * PAGE..7 * PAGE)));
    assert_eq!(low.mapping.bitmap().get_and_reset(), [0; 4], "nobody has written");
}

#[test]
fn what_is_there_stays_as_it_is() {
    let ram = ram();
    let low = ram.block(RAM_LOW).unwrap();
    low.write(2 * PAGE, &[9; 4]).unwrap();
    let userfault = Userfault::register(ram.blocks()).unwrap();
    userfault.place(0, PAGE, &[1; 3 * PAGE as usize]).unwrap();
    assert_eq!([1, 2, 3].map(|page| word(low, page * PAGE)), [0x0101_0101, 0x0909_0909, 0x0101_0101]);
    assert_eq!(word(low, 2 * PAGE + 4), 0);
    userfault.place(0, 2 * PAGE, &[1; PAGE as usize]).unwrap();
    userfault.place_zeros(0, 0, 6 * PAGE).unwrap();
    let words = [0, 1, 2, 3, 5].map(|page| word(low, page * PAGE));
    assert_eq!(words, [0, 0x0101_0101, 0x0909_0909, 0x0101_0101, 0]);
}

#[test]
fn what_nobody_touches_is_filled() {
    let ram = ram();
    let [low, namespace] = ram.blocks() else { panic!("there are two") };
    low.write(9 * PAGE, &[9; 4]).unwrap();
    let userfault = Userfault::register_to_fill(ram.blocks()).unwrap();
    userfault.fill(0, 4 * PAGE, &[1; 3 * PAGE as usize]).unwrap();
    userfault.fill(1, 0xf000, &[2; PAGE as usize]).unwrap();
    assert_eq!([4, 6].map(|page| word(low, page * PAGE)), [0x0101_0101; 2]);
    assert_eq!(word(namespace, 0xfffc), 0x0202_0202);
    assert_eq!(low.populated_ranges().unwrap(), [4 * PAGE..7 * PAGE, 9 * PAGE..10 * PAGE]);
    assert_eq!(low.mapping.bitmap().get_and_reset()[0], 1 << 9, "it counts as nobody's write");

    // What is there stays, and that is said: by the first page and by a later one.
    for (offset, length) in [(4, 1), (2, 3), (8, 2), (9, 3)] {
        let error = userfault.fill(0, offset * PAGE, &vec![3; (length * PAGE) as usize]).unwrap_err();
        let Error::Call { source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), io::ErrorKind::AlreadyExists, "{offset}+{length}");
    }
    assert_eq!([4, 9].map(|page| word(low, page * PAGE)), [0x0101_0101, 0x0909_0909]);

    // What the kernel touches for us fails, and does not wait for what nobody brings.
    let mut zeros = File::open("/dev/zero").unwrap();
    let refused = zeros.read_exact_volatile(&mut low.slice(20 * PAGE, 8).unwrap()).unwrap_err();
    assert!(refused.to_string().contains("Bad address"), "{refused}");

    userfault.unregister(0).unwrap();
    assert!(userfault.fill(0, 30 * PAGE, &[4; PAGE as usize]).is_err());
    assert_eq!(word(low, 30 * PAGE), 0);
    zeros.read_exact_volatile(&mut low.slice(20 * PAGE, 8).unwrap()).unwrap();
    userfault.fill(1, 0, &[5; PAGE as usize]).unwrap();
    drop(userfault);
    assert_eq!([0, PAGE].map(|offset| word(namespace, offset)), [0x0505_0505, 0]);
}

#[test]
fn who_waits_for_a_page_that_another_way_brought_goes_on() {
    for (page, by_zeros) in [(3, false), (5, true)] {
        // Another each time: where the host gives huge pages to all shared memory, to write to the file fills more than that page.
        let ram = ram();
        let low = ram.block(RAM_LOW).unwrap();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        let file = low.mapping.file_offset().unwrap().file();
        thread::scope(|scope| {
            let waits = look(scope, low, page * PAGE);
            assert_eq!(next(&userfault), [Fault { block: 0, offset: page * PAGE, thread: 0 }]);
            file.write_all_at(&[7; 4], page * PAGE).unwrap();
            match by_zeros {
                true => userfault.place_zeros(0, page * PAGE, PAGE).unwrap(),
                false => userfault.place(0, page * PAGE, &[1; PAGE as usize]).unwrap(),
            }
            assert_eq!(waits.join().unwrap(), 0x0707_0707);
        });
    }
}

#[test]
fn what_the_kernel_touches_for_us_waits_as_well() {
    let ram = ram();
    let low = ram.block(RAM_LOW).unwrap();
    let userfault = Userfault::register(ram.blocks()).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    io::Write::write_all(&mut file, &[7; 8192]).unwrap();
    file.rewind().unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_exact_volatile(&mut low.slice(PAGE - 4, 8).unwrap()).unwrap());
        for page in [0, 1] {
            assert_eq!(next(&userfault), [Fault { block: 0, offset: page * PAGE, thread: 0 }]);
            userfault.place_zeros(0, page * PAGE, PAGE).unwrap();
        }
        reader.join().unwrap();
    });
    assert_eq!(
        [PAGE - 8, PAGE - 4, PAGE, PAGE + 4].map(|offset| word(low, offset)),
        [0, 0x0707_0707, 0x0707_0707, 0]
    );
}

#[test]
fn a_guest_waits_for_its_pages() {
    // A word at 0x20000 to port 0x10, for ever. Its own page is 1.
    const TELL: [u8; 9] = [0xa1, 0x00, 0x00, 0x02, 0x00, 0xe7, 0x10, 0xeb, 0xf7];
    let guest = TestGuest::new(1, &TELL);
    let userfault = Userfault::register(guest.ram.blocks()).unwrap();
    guest.vcpus.resume().unwrap();
    loop {
        let faults = next(&userfault);
        let data = Fault { block: 0, offset: 0x20_000, thread: 0 };
        if faults.contains(&data) {
            userfault.place(0, data.offset, &[3; PAGE as usize]).unwrap();
            break;
        }
        for fault in faults {
            userfault.place_zeros(fault.block, fault.offset, PAGE).unwrap();
        }
    }
    assert_eq!(guest.next_value(), 0x0303_0303);
    guest.vcpus.pause().unwrap();
}

#[test]
fn what_is_still_missing_at_the_end_is_zeros() {
    let ram = ram();
    let [low, namespace] = ram.blocks() else { panic!("there are two") };
    let userfault = Userfault::register(ram.blocks()).unwrap();
    thread::scope(|scope| {
        let (one, two) = (look(scope, low, 0), look(scope, namespace, 0));
        let mut faults = Vec::new();
        while faults.len() < 2 {
            userfault.faults(&mut faults).unwrap();
        }
        userfault.unregister(0).unwrap();
        assert_eq!((one.join().unwrap(), word(low, PAGE)), (0, 0));
        assert!(userfault.place(0, 0, &[1; PAGE as usize]).is_err(), "it is not watched any more");
        drop(userfault);
        assert_eq!(two.join().unwrap(), 0);
    });
}

#[test]
fn a_wait_for_faults_has_an_end() {
    let ram = ram();
    let userfault = Userfault::register(ram.blocks()).unwrap();
    thread::scope(|scope| {
        let server = scope.spawn(|| next(&userfault));
        userfault.end();
        assert_eq!(server.join().unwrap(), []);
    });
    assert_eq!(next(&userfault), []);
    thread::scope(|scope| {
        let looked = look(scope, &ram.blocks()[0], 0);
        // Whoever came is told all the same.
        while next(&userfault).is_empty() {}
        userfault.place_zeros(0, 0, PAGE).unwrap();
        looked.join().unwrap();
    });
}

#[test]
fn only_whole_pages_of_a_block_are_placed() {
    let ram = ram();
    let userfault = Userfault::register(ram.blocks()).unwrap();
    for (block, offset, length) in
        [(2, 0, PAGE), (0, 1, PAGE), (0, 0, PAGE - 1), (1, 1 << 16, PAGE), (0, u64::MAX - 4095, PAGE)]
    {
        let outside = |result| matches!(result, Err(Error::OutOfBounds { .. }));
        assert!(outside(userfault.place_zeros(block, offset, length)), "{block} {offset:#x}+{length:#x}");
        assert!(outside(userfault.place(block, offset, &vec![0; length as usize])));
        assert!(outside(userfault.fill(block, offset, &vec![0; length as usize])));
        assert!(outside(userfault.wake(block, offset, length)));
    }
}

const HUGE: u64 = 2 << 20;

/// Memory in four huge pages, on a host that has some.
fn huge_ram() -> Option<GuestRam> {
    match GuestRam::with_pages(4 * HUGE, HugePages::Reserved, &[], &[]) {
        Ok(ram) => Some(ram),
        Err(error) => {
            say_that_there_are_none(&error);
            None
        }
    }
}

#[test]
fn a_huge_page_comes_in_parts_and_is_seen_whole() {
    let Some(ram) = huge_ram() else { return };
    let low = ram.block(RAM_LOW).unwrap();
    // Some of it came before its guest: two pages of the first huge page, one of the second.
    low.write(3 * PAGE, &[3; 4]).unwrap();
    low.write(4 * PAGE, &[4; 4]).unwrap();
    low.write(HUGE, &[5; 4]).unwrap();
    low.mapping.bitmap().reset();
    let userfault = Userfault::register(ram.blocks()).unwrap();
    assert_eq!(userfault.page_bytes(0), HUGE);
    let waits_at = |page: u64| Fault { block: 0, offset: page * HUGE, thread: 0 };
    thread::scope(|scope| {
        let one = look(scope, low, 5 * PAGE + 8);
        assert_eq!(next(&userfault), [waits_at(0)]);
        let two = look(scope, low, HUGE);
        assert_eq!(next(&userfault), [waits_at(1)]);
        userfault.place(0, 4 * PAGE, &[6; 2 * PAGE as usize]).unwrap();
        userfault.place_zeros(0, 3 * PAGE, PAGE).unwrap();
        userfault.complete(0, HUGE, HUGE).unwrap();
        assert_eq!(two.join().unwrap(), 0x0505_0505, "it was whole");
        assert!(!one.is_finished() && !low.is_mapped(5 * PAGE).unwrap(), "parts of its page are there");
        userfault.complete(0, 0, HUGE).unwrap();
        assert_eq!(one.join().unwrap(), 0x0606_0606);
        assert_eq!([3, 4, 6].map(|page| word(low, page * PAGE)), [0, 0x0606_0606, 0]);
        assert!(low.is_mapped(5 * PAGE).unwrap());
        // What nobody ever had is zeros. To be told twice harms nothing, nor does what was written since.
        let three = look(scope, low, 3 * HUGE - 4);
        assert_eq!(next(&userfault), [waits_at(2)]);
        userfault.complete(0, HUGE, 2 * HUGE).unwrap();
        assert_eq!(three.join().unwrap(), 0);
        low.write(3 * HUGE - 4, &[7; 4]).unwrap();
        userfault.complete(0, 0, 3 * HUGE).unwrap();
        assert_eq!([HUGE, 3 * HUGE - 4].map(|offset| word(low, offset)), [0x0505_0505, 0x0707_0707]);
    });
    for (offset, length_bytes) in [(PAGE, HUGE), (0, PAGE), (4 * HUGE, HUGE)] {
        let outside = userfault.complete(0, offset, length_bytes);
        assert!(matches!(outside, Err(Error::OutOfBounds { .. })), "{offset:#x}+{length_bytes:#x}");
    }
    userfault.unregister(0).unwrap();
    assert_eq!(word(low, 3 * HUGE), 0);
    // One write of this process's, above; what was placed is none.
    let written: u32 = low.mapping.bitmap().get_and_reset().iter().map(|word| word.count_ones()).sum();
    assert_eq!(written, 1);
}

#[test]
fn a_guest_and_the_kernel_wait_for_huge_pages() {
    let Some(ram) = huge_ram() else { return };
    let low = ram.block(RAM_LOW).unwrap();
    let userfault = Userfault::register(ram.blocks()).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    io::Write::write_all(&mut file, &[7; 8]).unwrap();
    file.rewind().unwrap();
    thread::scope(|scope| {
        let reader = scope.spawn(|| file.read_exact_volatile(&mut low.slice(HUGE - 4, 8).unwrap()).unwrap());
        for page in [0, 1] {
            assert_eq!(next(&userfault), [Fault { block: 0, offset: page * HUGE, thread: 0 }]);
            userfault.place(0, page * HUGE + HUGE / 2, &[9; PAGE as usize]).unwrap();
            userfault.complete(0, page * HUGE, HUGE).unwrap();
        }
        reader.join().unwrap();
    });
    let words = [HUGE / 2, HUGE - 8, HUGE - 4, HUGE, HUGE + 4].map(|offset| word(low, offset));
    assert_eq!(words, [0x0909_0909, 0, 0x0707_0707, 0x0707_0707, 0]);
}
