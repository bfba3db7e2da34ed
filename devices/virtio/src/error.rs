//! What can go wrong when a device is built, restored, or used against the rules.

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The PCI side refused.
    #[error("virtio PCI function")]
    Pci(#[from] pci::Error),
    /// A device model with queues that the transport cannot carry.
    #[error(
        "virtio device type {device_type} with queues of {sizes:?} entries: there can be 1 to 64, of powers of two"
    )]
    BadDevice {
        /// Virtio device type.
        device_type: u16,
        /// Entries that its queues offer.
        sizes: Vec<u16>,
    },
    /// The driver's queue is not one that can be used.
    #[error(
        "virtio queue {queue} of {size} entries (descriptors {descriptors:#x}, driver {driver:#x}, device {device:#x}): {reason}"
    )]
    BadQueue {
        /// Queue index.
        queue: usize,
        /// Entries.
        size: u16,
        /// Guest address of the descriptor table.
        descriptors: u64,
        /// Guest address of the available ring.
        driver: u64,
        /// Guest address of the used ring.
        device: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The guest broke the rules of a queue, or gave addresses outside its memory.
    #[error("virtio queue {queue} cannot be processed")]
    Broken {
        /// Queue index.
        queue: u16,
        /// Why.
        source: virtio_queue::Error,
    },
    /// A saved state is of another kind of device.
    #[error("saved virtio {what} is {saved:#x}, here it is {here:#x}")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// Its value in the state.
        saved: u64,
        /// Its value here.
        here: u64,
    },
    /// A saved register holds what the guest could not have put there.
    #[error("saved virtio {register} is {value:#x}: {reason}")]
    BadRegister {
        /// The register.
        register: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
}
