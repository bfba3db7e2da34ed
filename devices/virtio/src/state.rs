//! What is saved. Plain and untrusted: only [`VirtioPci::restore`](crate::VirtioPci::restore) makes a device of it.

use pci::EndpointState;
use vmstate::VmState;

/// One queue.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "virtio-queue", version = 1)]
pub struct QueueState {
    /// Entries that the driver wants.
    pub size: u16,
    /// MSI-X vector, or 0xffff.
    pub vector: u16,
    /// The driver has enabled the queue.
    pub enabled: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub driver: u64,
    /// Guest address of the used ring.
    pub device: u64,
    /// Next entry of the available ring that the device will look at.
    pub next_available: u16,
    /// Next entry of the used ring that the device will write.
    pub next_used: u16,
}

/// A virtio PCI function. The entropy device has no state of its own.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "virtio-pci", version = 1)]
pub struct VirtioState {
    /// Configuration space and interrupts.
    pub endpoint: EndpointState,
    /// Virtio device type, e.g. 4 for entropy.
    pub device_type: u16,
    /// Which half of the device's features the guest reads.
    pub device_feature_select: u32,
    /// Which half of the driver's features the guest writes.
    pub driver_feature_select: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// MSI-X vector of configuration changes, or 0xffff.
    pub config_vector: u16,
    /// Device status.
    pub status: u8,
    /// ISR status.
    pub isr: u8,
    /// The queue that the queue registers speak of.
    pub queue_select: u16,
    /// Number of queues.
    pub queue_count: u16,
    /// The queues.
    #[vmstate(len = "queue_count", max = 64)]
    pub queues: Vec<QueueState>,
}
