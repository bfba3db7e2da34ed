//! What the engine costs: long fields against a copy of the same bytes, and a controller with many queues and namespaces.
//!
//! `cargo bench -p vmstate -- --verbose`. The copies are made in the same run, into memory that is allocated for them, as it is for a load.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion};
use vmstate::{Bitmap, Slots, VmState, from_bytes, to_bytes};

macro_rules! bulk {
    ($($name:ident: $type:ty, $largest:literal;)*) => {$(
        #[derive(VmState)]
        #[vmstate(name = "bulk")]
        struct $name {
            count: u32,
            #[vmstate(len = "count", max = $largest)]
            run: $type,
        }
    )*};
}

bulk! {
    Bytes: Vec<u8>, 1048576;
    Flags: Vec<bool>, 1048576;
    Shorts: Vec<u16>, 524288;
    Words: Vec<u32>, 262144;
    Longs: Vec<u64>, 131072;
    Map: Bitmap, 8388608;
    Entries: Vec<[u8; 64]>, 16384;
}

fn main() {
    // Samples shorter than a scheduler's slice: on a busy host the medians still mean something. They are printed with `--verbose`.
    let brief = Duration::from_millis(200);
    let criterion = Criterion::default().sample_size(200).warm_up_time(brief).measurement_time(brief);
    let mut criterion = criterion.configure_from_args();
    bulk(&mut criterion, "64 KiB", 64 << 10);
    bulk(&mut criterion, "1 MiB", 1 << 20);
    controller(&mut criterion);
    criterion.final_summary();
}

fn bulk(criterion: &mut Criterion, size: &str, bytes: usize) {
    let mut group = criterion.benchmark_group(size);
    let source = vec![1_u8; bytes];
    group.bench_function("copy", |bencher| bencher.iter(|| black_box(&source[..]).to_vec()));

    macro_rules! both_ways {
        ($name:ident, $element:expr) => {
            let count = bytes / size_of_val(&$element);
            let state = $name { count: count as u32, run: vec![$element; count] };
            both_ways(&mut group, stringify!($name), &state);
        };
    }
    both_ways!(Bytes, 7_u8);
    both_ways!(Flags, true);
    both_ways!(Shorts, 7_u16);
    both_ways!(Words, 7_u32);
    both_ways!(Longs, 7_u64);
    both_ways!(Entries, [7_u8; 64]);
    let bits = bytes * 8;
    both_ways(&mut group, "Map", &Map { count: bits as u32, run: Bitmap::new(bits) });
    group.finish();
}

fn both_ways<T: VmState>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, state: &T) {
    group.bench_function(BenchmarkId::new("save", name), |bencher| {
        bencher.iter(|| to_bytes(black_box(state)));
    });
    let bytes = to_bytes(state);
    // What was loaded is freed apart from the measurement.
    let load = |()| from_bytes::<T>(black_box(&bytes), T::VERSION).expect("what was saved");
    group.bench_function(BenchmarkId::new("load", name), |bencher| {
        bencher.iter_batched(|| (), load, BatchSize::LargeInput);
    });
}

fn controller(criterion: &mut Criterion) {
    let state = synthetic_controller();
    assert_eq!((state.sq.present().count(), state.namespaces.present().count()), (65, 256));
    let bytes = to_bytes(&state);
    let mut group = criterion.benchmark_group(format!("controller of {} bytes", bytes.len()));
    group.bench_function("copy", |bencher| bencher.iter(|| black_box(&bytes[..]).to_vec()));
    both_ways(&mut group, "64 queue pairs, 256 namespaces", &state);
    group.finish();
}

#[derive(VmState)]
#[vmstate(name = "controller")]
struct Controller {
    registers: [u32; 16],
    features: Features,
    event_count: u8,
    #[vmstate(len = "event_count", max = 64)]
    events: Vec<u32>,
    log_count: u8,
    #[vmstate(len = "log_count", max = 64)]
    error_log: Vec<[u8; 64]>,
    counters: [[u64; 2]; 12],
    sq_count: u32,
    #[vmstate(len = "sq_count", max = 65536)]
    sq: Slots<SubmissionQueue>,
    cq_count: u32,
    #[vmstate(len = "cq_count", max = 65536)]
    cq: Slots<CompletionQueue>,
    namespace_count: u32,
    #[vmstate(len = "namespace_count", max = 1024)]
    namespaces: Slots<Namespace>,
    configuration_space: [u8; 4096],
    #[vmstate(len = 65)]
    vectors: Vec<Vector>,
    #[vmstate(len = 65)]
    pending: Bitmap,
}

#[derive(VmState)]
#[vmstate(name = "features")]
struct Features {
    arbitration: u32,
    temperature_kelvin: [u16; 2],
    write_cache: bool,
    #[vmstate(max = 255)]
    coalescing: u32,
    keep_alive_ms: u32,
    timestamp_ms: u64,
    timestamp_set: bool,
    host_identifier: [u8; 16],
}

#[derive(VmState)]
#[vmstate(name = "sq")]
struct SubmissionQueue {
    base: u64,
    #[vmstate(min = 2, max = 65536)]
    size: u32,
    head: u16,
    tail: u16,
    cq: u16,
    #[vmstate(max = 3)]
    priority: u8,
    fetched: u64,
}

#[derive(VmState)]
#[vmstate(name = "cq")]
struct CompletionQueue {
    base: u64,
    #[vmstate(min = 2, max = 65536)]
    size: u32,
    head: u16,
    tail: u16,
    phase: bool,
    interrupts: bool,
    vector: u16,
}

#[derive(VmState)]
#[vmstate(name = "namespace")]
struct Namespace {
    size_blocks: u64,
    capacity_blocks: u64,
    #[vmstate(min = 9, max = 16)]
    block_shift: u8,
    attached: bool,
    write_protected: bool,
    features: u8,
    guid: [u8; 16],
    uuid: [u8; 16],
    counters: [u64; 8],
    reservation_generation: u32,
    registrant_count: u16,
    #[vmstate(len = "registrant_count", max = 128)]
    registrants: Vec<u64>,
}

#[derive(VmState)]
#[vmstate(name = "vector")]
struct Vector {
    address: u64,
    data: u32,
    masked: bool,
}

/// 64 queue pairs beside the admin queue, with every eighth slot empty, and 256 namespaces, with every fourth slot empty.
fn synthetic_controller() -> Controller {
    let queue = |id: u16| (!id.is_multiple_of(8) || id == 0).then_some(u64::from(id) << 12);
    let submission = |id: u16| {
        queue(id).map(|base| SubmissionQueue {
            base,
            size: 1024,
            head: id,
            tail: id,
            cq: id,
            priority: 0,
            fetched: base,
        })
    };
    let completion = |id: u16| {
        queue(id).map(|base| CompletionQueue {
            base,
            size: 1024,
            head: id,
            tail: id,
            phase: true,
            interrupts: true,
            vector: id,
        })
    };
    let namespace = |id: u32| {
        (id % 4 != 3).then(|| Namespace {
            size_blocks: 1 << 20,
            capacity_blocks: 1 << 20,
            block_shift: 12,
            attached: true,
            write_protected: false,
            features: 0x1f,
            guid: [id as u8; 16],
            uuid: [id as u8; 16],
            counters: [u64::from(id); 8],
            reservation_generation: 0,
            registrant_count: 2,
            registrants: vec![1, 2],
        })
    };
    Controller {
        registers: [7; 16],
        features: Features {
            arbitration: 0,
            temperature_kelvin: [343, 0],
            write_cache: true,
            coalescing: 0,
            keep_alive_ms: 0,
            timestamp_ms: 1 << 40,
            timestamp_set: true,
            host_identifier: [3; 16],
        },
        event_count: 4,
        events: vec![1, 2, 3, 4],
        log_count: 16,
        error_log: vec![[5; 64]; 16],
        counters: [[9, 0]; 12],
        sq_count: 74,
        sq: (0..74).map(submission).collect(),
        cq_count: 74,
        cq: (0..74).map(completion).collect(),
        namespace_count: 341,
        namespaces: (0..341).map(namespace).collect(),
        configuration_space: [1; 4096],
        vectors: (0..65).map(|data| Vector { address: 0xfee0_0000, data, masked: false }).collect(),
        pending: Bitmap::new(65),
    }
}
