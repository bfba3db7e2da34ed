//! However hostile the bytes, loading them takes at most 1 MiB and 16 times their number: counted by the allocator itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use proptest::prelude::*;
use vmstate::{Bitmap, Error, Problem, Slots, VmState, from_bytes, from_bytes_with, measure_with};

/// The system's allocator, which also counts what each thread holds and has held at most.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    HELD.set(HELD.get() + bytes);
    MOST.set(MOST.get().max(HELD.get()));
}

// SAFETY: both calls are passed on as they are; counting touches no memory of the caller's and, since the counters are plain
// numbers that need no initialisation, allocates nothing. Reallocation is the trait's own: it allocates, copies and frees, so that
// both places count.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are the same as ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above; `place` came from `System`.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result, and the bytes that were held at most while it was made.
fn most_held<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    MOST.set(before);
    let result = work();
    (result, (MOST.get() - before) as usize)
}

/// What one side was configured with: as much as a description lets it have.
struct Local;

impl Local {
    fn rows(&self) -> usize {
        65_536
    }
}

/// Takes one byte on the wire, and hundreds in memory.
#[derive(VmState)]
#[vmstate(name = "hollow", version = 2, oldest = 1)]
struct Hollow {
    count: u8,
    #[vmstate(len = "count", max = 255)]
    bytes: Vec<u8>,
    #[vmstate(since = 2)]
    new: [u64; 32],
    #[vmstate(subsection)]
    part: Option<Part>,
}

#[derive(VmState)]
#[vmstate(name = "hollow/part")]
struct Part {
    words: [u64; 32],
}

/// Takes a pointer of its outer struct, one byte on the wire, and more elsewhere.
#[derive(VmState)]
#[vmstate(name = "boxed", version = 2, oldest = 1)]
struct Boxed {
    #[vmstate(versions = [1, 2])]
    hollow: Box<Hollow>,
}

#[derive(VmState)]
#[vmstate(name = "boxes", version = 2, oldest = 1)]
struct Boxes {
    #[vmstate(list, max = usize::MAX, versions = [1, 2])]
    list: Vec<Boxed>,
}

/// Every kind of collection, each as large as can be.
#[derive(VmState)]
#[vmstate(name = "hostile", version = 2, oldest = 1, context = "Local")]
struct Hostile {
    kind: u8,
    slot_count: u32,
    #[vmstate(len = "slot_count", max = u32::MAX as usize, versions = [1, 2])]
    slots: Slots<Hollow>,
    vec_count: u32,
    #[vmstate(len = "vec_count", max = u32::MAX as usize, versions = [1, 2])]
    structs: Vec<Hollow>,
    word_count: u32,
    #[vmstate(len = "word_count", max = u32::MAX as usize)]
    words: Vec<u64>,
    bit_count: u32,
    #[vmstate(len = "bit_count", max = u32::MAX as usize)]
    map: Bitmap,
    width: u16,
    #[vmstate(len_from = "Local::rows", max = 65_536, each_len = "width", each_max = 65_535, versions = [1, 2])]
    rows: Vec<Slots<Hollow>>,
    #[vmstate(len = "width", max = 65_535)]
    tables: [Slots<Tree>; 64],
    #[vmstate(list, max = usize::MAX, versions = [1, 2])]
    list: Vec<Hollow>,
    tree: Tree,
}

#[derive(VmState)]
#[vmstate(name = "tree", depth = 16)]
struct Tree {
    #[vmstate(list, max = usize::MAX, recursive)]
    branches: Vec<Tree>,
    #[vmstate(len = 3, recursive)]
    more: Slots<Tree>,
}

/// Loads and measures, and holds both against the limit.
fn load(bytes: &[u8], version: u32) -> Result<Hostile, Error> {
    let limit = (1 << 20) + 16 * bytes.len();
    let (_, most) = most_held(|| measure_with::<Hostile, _>(bytes, version, &Local));
    assert!(most <= limit, "measuring {} bytes took {most}", bytes.len());
    let (result, most) = most_held(|| from_bytes_with::<Hostile, _>(bytes, version, &Local));
    assert!(most <= limit, "loading {} bytes took {most}", bytes.len());
    result
}

/// The fields before the one that is attacked, empty.
fn attack(empty_counts: usize, count: u32, filling: &[u8], bytes: usize) -> Vec<u8> {
    let mut attack = vec![0];
    attack.extend([0; 4].repeat(empty_counts));
    attack.extend(count.to_be_bytes());
    attack.extend(filling.iter().cycle().take(bytes));
    attack
}

#[test]
fn allocator_counts_what_is_held() {
    let (list, most) = most_held(|| {
        drop(vec![0_u8; 1 << 20]);
        vec![0_u64; 1 << 16]
    });
    assert_eq!((most, list.len()), (1 << 20, 1 << 16));
}

/// The path of an error that says that memory is at its limit.
fn ends_at_the_limit(bytes: &[u8]) -> String {
    let error = load(bytes, 1).map(|_| ()).expect_err("more than may be taken");
    assert!(matches!(error.problem, Problem::TooMuchMemory { .. }), "{error}");
    error.path
}

#[test]
fn collections_of_hollow_structs_end_at_the_limit() {
    // Whatever is repeated here takes a byte or two of the stream, and more than 16 times that in memory.
    assert!(ends_at_the_limit(&attack(0, 100_000, &[b'1', 0], 200_000)).starts_with("slots["));
    assert_eq!(ends_at_the_limit(&attack(1, 200_000, &[0], 200_000)), "structs");
    let width_and_list = [0; 2].into_iter().chain([1, 0].repeat(100_000)).collect::<Vec<u8>>();
    assert_eq!(ends_at_the_limit(&attack(3, 0, &width_and_list, width_and_list.len())), "list");
    // 65,536 rows take 1 MiB, though they be empty.
    assert_eq!(ends_at_the_limit(&attack(3, 0, &[0], 1000)), "rows");
}

#[test]
fn boxes_end_at_the_limit() {
    let bytes = [1, 0].repeat(100_000);
    let (result, most) = most_held(|| from_bytes::<Boxes>(&bytes, 1));
    let error = result.map(|boxes| boxes.list.len()).unwrap_err();
    assert!(matches!(error.problem, Problem::TooMuchMemory { .. }), "{error}");
    assert!(most <= (1 << 20) + 16 * bytes.len(), "loading {} bytes took {most}", bytes.len());
}

#[test]
fn counts_that_the_bytes_cannot_hold_take_nothing() {
    for field in 0..4 {
        let bytes = attack(field, u32::MAX, b"0", 1000);
        let (result, most) = most_held(|| from_bytes_with::<Hostile, _>(&bytes, 2, &Local));
        let error = result.map(|_| ()).unwrap_err();
        assert!(matches!(error.problem, Problem::Truncated { .. }), "{error}");
        assert!(most < 1000, "{error} after {most} bytes");
    }
}

#[test]
fn long_runs_of_the_same_bytes_stay_within_the_limit() {
    for filling in [&[0][..], &[1], b"0", b"1", &[1, 0], &[b'1', 0], &[0xff], &[5, 13]] {
        for field in 0..6 {
            for count in [1, 1000, 65_535, 300_000, u32::MAX] {
                let bytes = attack(field, count, filling, 300_000);
                let _ = (load(&bytes, 1), load(&bytes, 2));
            }
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_stay_within_the_limit(
        field in 0..6_usize, count in prop_oneof![0..8_u32, any::<u32>()], version in 1..=2_u32,
        filling in prop::collection::vec(prop_oneof![Just(0), Just(1), Just(b'0'), Just(b'1'), any::<u8>()], 1..200),
        bytes in 0..200_000_usize,
    ) {
        let _ = load(&attack(field, count, &filling, bytes), version);
    }
}
