//! The entropy device: virtio-rng, fed by the host's random numbers.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bus::GuestMemory;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio::{Entropy, QueueNotify, Rng, VirtioPci, VirtioState};
use vmm_sys_util::eventfd::EventFd;

use crate::io_thread::{IoThread, WakeUp, Worker};
use crate::kvm::{MsiRouter, MsixFunction};

/// Vectors of a virtio function with one queue: configuration changes and the queue.
const VECTORS: u16 = 2;
/// The only queue of virtio-rng (Virtio 1.2, 5.4.2).
const REQUEST_QUEUE: u16 = 0;

/// virtio-rng with its thread's wake-up.
pub struct EntropyDevice {
    device: Arc<VirtioPci>,
    interrupts: Arc<MsixFunction>,
    wake_up: WakeUp,
}

impl EntropyDevice {
    /// The device as a reset leaves it.
    ///
    /// # Errors
    /// The process lacks descriptors, or KVM interrupt routes.
    pub fn new(memory: &GuestMemory, router: &Arc<MsiRouter>) -> anyhow::Result<Self> {
        let interrupts = MsixFunction::new(router, VECTORS)?;
        let wake_up = WakeUp::new()?;
        let notify = Box::new(Notify(wake_up.clone()));
        let device = VirtioPci::new(
            Box::new(Rng::new(HostEntropy)),
            memory.clone(),
            notify,
            Arc::clone(&interrupts) as _,
        )?;
        Ok(Self { device, interrupts, wake_up })
    }

    /// The device, for the PCI bus.
    #[must_use]
    pub fn device(&self) -> &Arc<VirtioPci> {
        &self.device
    }

    /// Gives its queue to `thread`.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn serve(&self, thread: &IoThread) -> io::Result<()> {
        thread.add(Box::new(RequestQueue(Arc::clone(&self.device))), self.wake_up.clone())
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// It is not one of this device.
    pub fn restore(&self, state: &VirtioState) -> Result<(), virtio::Error> {
        self.device.restore(state)
    }

    /// Makes sure that every interrupt that was raised is in a local APIC. The device is paused.
    ///
    /// # Errors
    /// KVM refused a message.
    pub fn flush_interrupts(&self) -> Result<(), crate::kvm::Error> {
        self.interrupts.flush()
    }
}

struct Notify(WakeUp);

impl QueueNotify for Notify {
    fn wake(&self, _: u16) {
        self.0.ring();
    }
}

struct RequestQueue(Arc<VirtioPci>);

impl Worker for RequestQueue {
    fn turn(&mut self, _: bool) -> bool {
        self.0.process(REQUEST_QUEUE)
    }

    fn completion_events(&self) -> io::Result<Vec<EventFd>> {
        Ok(Vec::new())
    }

    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn stood_still(&mut self) {}
}

struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&mut self, data: &mut [u8]) {
        let mut filled = 0;
        while let Some(rest) = data.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match getrandom(rest, GetRandomFlags::empty()) {
                Ok(length) => filled += length,
                // Without flags the call is interrupted or waits for the pool at boot, and fails on no kernel that has KVM.
                Err(error) => log::debug!("the host's random numbers are late: {error}"),
            }
        }
    }
}
