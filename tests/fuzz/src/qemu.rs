//! The controller that QEMU 11.1 writes: read, taken apart into a state of ours and what is left, and put together again.

use std::sync::{Arc, OnceLock};

use block::{IoContext, NullImage};
use bus::GuestMemory;
use nvme::qemu::{QemuDevice, QemuResidue, QemuSection};
use nvme::{Controller, ControllerConfig, Host, NamespaceConfig, NvmeState};
use pci::{MsiMessage, MsixSink};
use vm_memory::GuestAddress;

/// The device that wrote the first seed. It takes as many Asynchronous Event Requests as a controller of ours.
const DEVICE: QemuDevice = QemuDevice { max_ioqpairs: 8, msix_qsize: 9, aerl: 7 };
/// Bytes of its image.
const IMAGE_BYTES: u64 = 64 << 20;
/// QEMU's virtual clock, later than the section.
const CLOCK_MS: u64 = 10_000;
/// A section with its header and footer.
const LINUX: &[u8] = include_bytes!("../../golden/qemu-11.1.3/nvme-linux.section");
/// Type, identifier, name and its length, instance, version.
const HEADER_BYTES: usize = 1 + 4 + 1 + "0000:00:04.0/nvme".len() + 4 + 4;
const FOOTER_BYTES: usize = 5;

/// The process around a controller that nobody uses.
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

/// The state of the controller that takes the seed over, before it does.
fn unused() -> &'static NvmeState {
    static UNUSED: OnceLock<NvmeState> = OnceLock::new();
    UNUSED.get_or_init(|| {
        let config = ControllerConfig {
            queue_pairs: DEVICE.max_ioqpairs,
            vectors: DEVICE.msix_qsize,
            queue_entries: 2048,
            contiguous_queues: true,
            ..ControllerConfig::new("QEMU")
        };
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("1 MiB of memory");
        let contexts = vec![IoContext::with_threads(memory.clone(), 1).expect("an I/O context")];
        let image = Arc::new(NullImage::new(IMAGE_BYTES));
        let namespaces = [NamespaceConfig { nsid: 1, block_bytes: 512, metadata: None, backend: image }];
        let controller =
            Controller::new(config, memory, &namespaces, contexts, Arc::new(Nobody), Arc::new(Nobody));
        controller.expect("a controller that can be had").save()
    })
}

/// Reads a section, which must be written as it was read; and so must the one that our state and the residue make.
pub fn nvme(data: &[u8]) {
    let Ok(section) = QemuSection::from_bytes(data, &DEVICE) else { return };
    assert_eq!(section.to_bytes(), data, "a section is written as it was read");
    let Ok((state, residue)) = section.split(unused().clone(), CLOCK_MS) else { return };
    let joined = QemuSection::join(&state, &residue, &DEVICE, CLOCK_MS);
    let joined = joined.unwrap_or_else(|error| panic!("taken over, but not given back: {error}"));
    assert_eq!(joined.to_bytes(), data, "a section is given back as it was taken over");
}

/// The sections of a controller that a Linux guest used, and of one that nobody did.
///
/// # Panics
///
/// If an unused controller is beyond QEMU's limits.
#[must_use]
pub fn nvme_seeds() -> Vec<Vec<u8>> {
    let used = LINUX[HEADER_BYTES..LINUX.len() - FOOTER_BYTES].to_vec();
    let residue = QemuResidue::new(unused()).expect("it is a controller of ours");
    let unused = QemuSection::join(unused(), &residue, &DEVICE, CLOCK_MS).expect("it is within the limits");
    vec![used, unused.to_bytes()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_taken_over_and_given_back() {
        for seed in nvme_seeds() {
            let section = QemuSection::from_bytes(&seed, &DEVICE).unwrap();
            section.split(unused().clone(), CLOCK_MS).unwrap();
            nvme(&seed);
        }
    }
}
