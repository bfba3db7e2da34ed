//! What saving and loading a controller costs: `cargo bench -p nvme -- --verbose`. The medians are in the documentation of `nvme::qemu`
//! and of the module `state`. On a host that others use, a real-time priority (`chrt -f 20`) keeps them out of the figures.
//!
//! A destination makes its I/O contexts, opens its images and builds its controller before the source stops: that is not
//! measured, and each iteration gets a controller of its own that nobody has used. One figure includes building the controller, for those who
//! have only contexts and images. Dropping what was made is never measured.

use std::sync::Arc;

use block::{IoContext, MemoryImage};
use bus::{GuestMapping, GuestMemory};
use criterion::{BatchSize, Criterion};
use nvme::qemu::{QemuDevice, QemuSection};
use nvme::{
    CompletionQueueState, Controller, ControllerConfig, Host, NamespaceConfig, NvmeState, RegistersState,
    SubmissionQueueState,
};
use pci::{MsiMessage, MsixSink};
use vm_memory::GuestAddress;
use vmstate::VmState;

const MEMORY_BYTES: usize = 64 << 20;
/// I/O threads of a controller, and commands that each can have in flight.
const WORKERS: usize = 2;
const DEPTH: u32 = 64;
const QUEUE_PAIRS: u16 = 64;
const QUEUE_ENTRIES: u32 = 256;
/// Namespaces 1, 4, 7 and so on up to 766.
const NAMESPACES: u32 = 256;
/// QEMU's virtual clock, later than the section.
const CLOCK_MS: u64 = 10_000;

struct Nobody;

impl Host for Nobody {
    fn wake(&self, _worker: usize) {}
    fn set_doorbell_event(&self, _bar_offset: u64, _worker: usize, _enabled: bool) {}
    fn show_region(&self, _ready: bool) {}
    fn flush_region(&self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MsixSink for Nobody {
    fn set_vector(&self, _vector: u16, _message: Option<MsiMessage>) {}
    fn signal(&self, _vector: u16) {}
}

/// What exists before a controller does.
struct Machine {
    memory: GuestMemory,
    config: ControllerConfig,
    namespaces: Vec<NamespaceConfig>,
}

impl Machine {
    fn new(config: ControllerConfig, nsids: impl Iterator<Item = u32>, image_bytes: usize) -> Self {
        let ranges = [(GuestAddress(0), MEMORY_BYTES)];
        let memory = GuestMemory::from_ranges(&ranges).expect("guest memory");
        let image = Arc::new(GuestMapping::new(image_bytes).expect("an image"));
        let namespace = |nsid| NamespaceConfig {
            nsid,
            block_bytes: 512,
            metadata: None,
            backend: Arc::new(MemoryImage::new(Arc::clone(&image))),
        };
        Self { memory, config, namespaces: nsids.map(namespace).collect() }
    }

    fn contexts(&self) -> Vec<IoContext> {
        let context = |_| IoContext::new(self.memory.clone(), DEPTH).expect("an I/O context");
        (0..WORKERS).map(context).collect()
    }

    fn controller(&self, contexts: Vec<IoContext>) -> Controller {
        let (config, memory) = (self.config.clone(), self.memory.clone());
        Controller::new(config, memory, &self.namespaces, contexts, Arc::new(Nobody), Arc::new(Nobody))
            .expect("a controller")
    }
}

/// The state of a controller with all its queues, made from that of an unused one.
fn busy(unused: NvmeState) -> NvmeState {
    let mut state = unused;
    state.registers = RegistersState {
        cc: 0x0046_0001,
        csts: 1,
        aqa: (QUEUE_ENTRIES - 1) << 16 | (QUEUE_ENTRIES - 1),
        asq: 0x10_0000,
        acq: 0x20_0000,
        interrupt_mask: 0,
    };
    for id in 0..=QUEUE_PAIRS {
        let (head, tail) = (u32::from(id), u32::from(id) + 3);
        let sq = SubmissionQueueState {
            id,
            cq_id: id,
            priority: 0,
            size: QUEUE_ENTRIES,
            head,
            tail,
            contiguous: true,
            page_count: 1,
            pages: vec![0x10_0000 + u64::from(id) * 0x4000],
            aborted_count: 0,
            aborted: Vec::new(),
        };
        let cq = CompletionQueueState {
            id,
            vector: id,
            interrupts: true,
            size: QUEUE_ENTRIES,
            head,
            tail: head,
            phase: id % 2 == 0,
            contiguous: true,
            page_count: 1,
            pages: vec![0x20_0000 + u64::from(id) * 0x1000],
            backlog_count: 0,
            backlog: Vec::new(),
        };
        state.sq.put(usize::from(id), sq);
        state.cq.put(usize::from(id), cq);
    }
    state
}

/// A controller of ours with 64 queue pairs and 256 namespaces, two holes after each.
fn ours(criterion: &mut Criterion) {
    let nsids = (0..NAMESPACES).map(|index| index * 3 + 1);
    let machine = Machine::new(ControllerConfig::new("BENCH"), nsids, 1 << 20);
    let unused = machine.controller(machine.contexts());
    let state = busy(unused.save());
    let bytes = vmstate::to_bytes(&state);
    unused.load(&state).expect("a state that loads");
    assert!(unused.save() == state, "and is saved again");
    let mut group = criterion.benchmark_group(format!("ours, {} bytes", bytes.len()));
    group.bench_function("save: controller to bytes", |bencher| {
        bencher.iter(|| vmstate::to_bytes(&unused.save()));
    });
    group.bench_function("load: bytes to checked controller", |bencher| {
        bencher.iter_batched(
            || machine.controller(machine.contexts()),
            |controller| {
                let state = vmstate::from_bytes::<NvmeState>(&bytes, NvmeState::VERSION).expect("a state");
                controller.load(&state).expect("a state that loads");
                controller
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("of which: bytes to state", |bencher| {
        bencher.iter(|| vmstate::from_bytes::<NvmeState>(&bytes, NvmeState::VERSION).expect("a state"));
    });
    group.finish();
}

/// QEMU's own section of the firmware fixture.
fn qemu(criterion: &mut Criterion) {
    let section = include_bytes!("../../../tests/golden/qemu-11.1.3/nvme-firmware.section");
    // Header and footer are not part of the payload.
    let payload = &section[1 + 4 + 1 + usize::from(section[5]) + 4 + 4..section.len() - 5];
    let config =
        ControllerConfig { queue_entries: 2048, contiguous_queues: true, ..ControllerConfig::new("BENCH") };
    let device = QemuDevice::of(&config);
    let machine = Machine::new(config, 1..=1, 64 << 20);
    let load = |controller: Controller| {
        let section = QemuSection::from_bytes(payload, &device).expect("a section");
        let residue = controller.load_qemu(section, CLOCK_MS).expect("a section that loads");
        (controller, residue)
    };
    let (controller, residue) = load(machine.controller(machine.contexts()));
    let save = || controller.save_qemu(&residue, &device, CLOCK_MS).expect("a section").to_bytes();
    assert!(save() == payload, "it comes back");
    let mut group = criterion.benchmark_group(format!("QEMU's, {} bytes", payload.len()));
    group.bench_function("load: bytes to checked controller", |bencher| {
        bencher.iter_batched(|| machine.controller(machine.contexts()), load, BatchSize::PerIteration);
    });
    group.bench_function("load: the same, and the controller built", |bencher| {
        let build_and_load = |contexts| load(machine.controller(contexts));
        bencher.iter_batched(|| machine.contexts(), build_and_load, BatchSize::PerIteration);
    });
    group.bench_function("of which: bytes to section", |bencher| {
        bencher.iter(|| QemuSection::from_bytes(payload, &device).expect("a section"));
    });
    group.bench_function("save: controller to bytes", |bencher| bencher.iter(save));
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    ours(&mut criterion);
    qemu(&mut criterion);
    criterion.final_summary();
}
