//! Commands a second of the controller alone, on one core: `cargo bench -p nvme --bench speed -- --verbose`.
//!
//! One thread is guest and worker in turn: it rings for a batch of 4 KiB reads on each queue, lets the worker run until all are
//! done, and takes the completions. A worker that does not poll asks the guest to ring before each batch. The backend is the null image, which writes zeroes to the guest's memory. On a host that others
//! use, a real-time priority on one core (`chrt -f 20 taskset -c 1`) keeps them out of the figures.

use std::sync::Arc;
use std::time::Duration;

use block::NullImage;
use criterion::{BenchmarkId, Criterion, Throughput};

use driver::{Doorbells, Guest};

mod driver;

const IMAGE_BYTES: u64 = 1 << 40;

fn main() {
    // Samples shorter than a scheduler's slice: on a busy host the medians still mean something.
    let brief = Duration::from_millis(500);
    let criterion = Criterion::default().sample_size(50).warm_up_time(brief / 2).measurement_time(brief);
    let mut criterion = criterion.configure_from_args();
    let ways = [
        ("MMIO", Doorbells::Mmio, false),
        ("shadow", Doorbells::Shadow, false),
        ("shadow, polled", Doorbells::Shadow, true),
    ];
    for (name, doorbells, polls) in ways {
        let mut group = criterion.benchmark_group(name);
        for queues in [1, 4] {
            for depth in [1, 32, 128] {
                let mut guest = Guest::new(Arc::new(NullImage::new(IMAGE_BYTES)), queues, doorbells);
                group.throughput(Throughput::Elements(u64::from(queues) * u64::from(depth)));
                let name = BenchmarkId::new(format!("{queues} queues"), format!("depth {depth}"));
                group.bench_function(name, |bencher| {
                    bencher.iter(|| {
                        guest.submit(depth);
                        while !guest.take(depth) {
                            if polls {
                                guest.controller.poll(0);
                            } else {
                                guest.controller.process(0);
                            }
                        }
                    });
                });
            }
        }
        group.finish();
    }
    criterion.final_summary();
}
