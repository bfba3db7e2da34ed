//! MSI-X vectors as irqfds with routes.
//!
//! A device signals by writing an eventfd that KVM turns into the vector's message, without an exit or a system call
//! into KVM. The message is in KVM's route table, which can only be replaced as a whole and slowly (a grace period, 0.3 to 2 ms):
//! [`MsiRouter`] keeps it, and leaves it alone when nothing changed. A guest that arrives does not wait for it: after
//! [`MsiRouter::defer`] all changes are gathered into one call, [`MsiRouter::settle`], which comes when the guest runs. Until then
//! messages go to KVM by themselves, with a system call each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings as kvm;
use kvm_bindings::{
    KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi,
};
use pci::{MsiMessage, MsixSink};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Error, Vm};
use crate::layout::GSI_COUNT;

/// Wired interrupts that reach a PIC as well as the I/O APIC.
const PIC_INPUTS: u32 = 16;
/// Entries that the wired interrupts take.
const WIRED_ROUTES: usize = (GSI_COUNT + PIC_INPUTS) as usize;
/// Interrupt numbers for MSIs begin after the I/O APIC's.
const FIRST_MSI_GSI: u32 = GSI_COUNT;
/// One past the last: with all of them in use the table is full.
const END_MSI_GSI: u32 = FIRST_MSI_GSI + (KVM_MAX_IRQ_ROUTES - WIRED_ROUTES) as u32;

/// KVM's interrupt route table.
///
/// Wired interrupts are routed as KVM does by itself: number n to pin n of the I/O APIC, and below 16 to the PICs.
#[derive(Debug)]
pub struct MsiRouter {
    vm: Arc<Vm>,
    table: Mutex<Table>,
    /// KVM's table is behind `table`, and nobody relies on it. Written with `table` locked.
    deferred: AtomicBool,
}

#[derive(Debug, Default)]
struct Table {
    used: BTreeSet<u32>,
    messages: BTreeMap<u32, MsiMessage>,
    /// Whether `messages` differs from what KVM has.
    stale: bool,
}

impl MsiRouter {
    /// A table of the wired interrupts alone.
    #[must_use]
    pub fn new(vm: Arc<Vm>) -> Arc<Self> {
        Arc::new(Self { vm, table: Mutex::default(), deferred: AtomicBool::new(false) })
    }

    /// Gathers changes until [`MsiRouter::settle`]; signals reach the guest meanwhile all the same.
    pub fn defer(&self) {
        let _table = self.table();
        self.deferred.store(true, Ordering::Release);
    }

    /// Gives all gathered changes to KVM, in one call. Harmless if there are none.
    ///
    /// # Errors
    /// [`Error::Call`]; signals go on as before.
    pub fn settle(&self) -> Result<(), Error> {
        let mut table = self.table();
        self.apply(&mut table)?;
        // Whoever sees this relies on the table, which is there by now.
        self.deferred.store(false, Ordering::Release);
        Ok(())
    }

    fn allocate(&self, count: usize) -> Result<Vec<u32>, Error> {
        let mut table = self.table();
        let gsis: Vec<u32> =
            (FIRST_MSI_GSI..END_MSI_GSI).filter(|gsi| !table.used.contains(gsi)).take(count).collect();
        if gsis.len() < count {
            return Err(Error::OutOfRoutes { asked: count, free: gsis.len(), limit: KVM_MAX_IRQ_ROUTES });
        }
        table.used.extend(&gsis);
        Ok(gsis)
    }

    fn free(&self, gsi: u32) {
        let mut table = self.table();
        table.used.remove(&gsi);
        // KVM forgets it with the next change: nobody signals it any more.
        table.messages.remove(&gsi);
    }

    fn set_message(&self, gsi: u32, message: MsiMessage) -> Result<(), Error> {
        let mut table = self.table();
        table.stale |= table.messages.insert(gsi, message) != Some(message);
        if self.deferred.load(Ordering::Acquire) { Ok(()) } else { self.apply(&mut table) }
    }

    fn apply(&self, table: &mut Table) -> Result<(), Error> {
        if !table.stale {
            return Ok(());
        }
        let messages = table.messages.iter().map(|(&gsi, message)| msi_entry(gsi, message));
        let entries: Vec<_> = wired_entries().chain(messages).collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .expect("allocate() leaves room in the table for the wired interrupts");
        let what = format!("set {} interrupt routes", entries.len());
        self.vm.fd().set_gsi_routing(&routing).map_err(Error::call(what))?;
        table.stale = false;
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wired_entries() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let entry = |gsi, irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: kvm::KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    };
    let pics = (0..PIC_INPUTS).map(move |gsi| match gsi {
        0..8 => entry(gsi, kvm::KVM_IRQCHIP_PIC_MASTER, gsi),
        _ => entry(gsi, kvm::KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
    });
    pics.chain((0..GSI_COUNT).map(move |gsi| entry(gsi, kvm::KVM_IRQCHIP_IOAPIC, gsi)))
}

fn msi_entry(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: kvm::KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// The MSI-X vectors of one PCI function. Everything that takes time is done when it is made: an irqfd for each vector
/// is registered before any route exists.
#[derive(Debug)]
pub struct MsixFunction {
    router: Arc<MsiRouter>,
    vectors: Box<[Vector]>,
    /// Eventfds written: a system call each.
    sent: AtomicU64,
}

#[derive(Debug)]
struct Vector {
    gsi: u32,
    event: EventFd,
    message: Mutex<Option<MsiMessage>>,
    /// Signalled through the eventfd since the last [`MsixFunction::flush`].
    signalled: AtomicBool,
}

impl MsixFunction {
    /// Takes an interrupt number and an irqfd for each of `vectors` vectors.
    ///
    /// # Errors
    /// [`Error::OutOfRoutes`], [`Error::Call`].
    pub fn new(router: &Arc<MsiRouter>, vectors: u16) -> Result<Arc<Self>, Error> {
        let gsis = router.allocate(vectors.into())?;
        let mut function =
            Self { router: Arc::clone(router), vectors: Box::default(), sent: AtomicU64::new(0) };
        let mut made = Vec::with_capacity(gsis.len());
        for &gsi in &gsis {
            let registered = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(|e| Error::call("create an eventfd")(e.into()))
                .and_then(|event| {
                    let what = format!("register an irqfd for interrupt {gsi}");
                    router.vm.fd().register_irqfd(&event, gsi).map(|()| event).map_err(Error::call(what))
                });
            match registered {
                Ok(event) => {
                    made.push(Vector {
                        gsi,
                        event,
                        message: Mutex::default(),
                        signalled: AtomicBool::new(false),
                    });
                }
                Err(error) => {
                    gsis[made.len()..].iter().for_each(|&gsi| router.free(gsi));
                    function.vectors = made.into();
                    return Err(error);
                }
            }
        }
        function.vectors = made.into();
        Ok(Arc::new(function))
    }

    /// Sends the message of `vector` synchronously: when this returns it is in the local APIC, if one takes it. Nothing is
    /// sent for a masked vector.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn signal_now(&self, vector: u16) -> Result<(), Error> {
        let message = self.vectors.get(usize::from(vector)).and_then(|vector| *vector.message());
        let Some(MsiMessage { address, data }) = message else { return Ok(()) };
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        match self.router.vm.fd().signal_msi(msi) {
            // KVM's -1, "no local APIC takes it", which reads like EPERM. It is the guest's message, and lost as on hardware.
            Err(error) if error.errno() == libc::EPERM => Ok(()),
            result => result.map(drop).map_err(Error::call(format!("signal MSI {data:#x} to {address:#x}"))),
        }
    }

    /// Interrupts that were sent through irqfds so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Makes sure that whatever was signalled has arrived in a local APIC. Call it when the device is paused, before
    /// the APICs are read: KVM may deliver an irqfd from a work queue, so every vector that was signalled since the
    /// last flush is sent once more, synchronously. A message that comes twice is one that the guest's handler finds
    /// no work for; a lost one would hang its queue.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn flush(&self) -> Result<(), Error> {
        for (index, vector) in (0..).zip(&self.vectors) {
            if vector.signalled.swap(false, Ordering::AcqRel) {
                self.signal_now(index)?;
            }
        }
        Ok(())
    }
}

impl Vector {
    fn message(&self) -> MutexGuard<'_, Option<MsiMessage>> {
        self.message.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsixSink for MsixFunction {
    fn set_vector(&self, vector: u16, message: Option<MsiMessage>) {
        let Some(vector) = self.vectors.get(usize::from(vector)) else { return };
        *vector.message() = message;
        // The route of a masked vector stays: no signal comes, and guests mask and unmask all the time.
        let Some(message) = message else { return };
        if let Err(error) = self.router.set_message(vector.gsi, message) {
            log::error!("{error} ({message:x?}): {:?}", std::error::Error::source(&error));
        }
    }

    fn signal(&self, index: u16) {
        let Some(vector) = self.vectors.get(usize::from(index)) else { return };
        if self.router.deferred.load(Ordering::Acquire) {
            if let Err(error) = self.signal_now(index) {
                log::error!("{error}: {:?}", std::error::Error::source(&error));
            }
            return;
        }
        if !vector.signalled.load(Ordering::Relaxed) {
            vector.signalled.store(true, Ordering::Release);
        }
        self.sent.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = vector.event.write(1) {
            // KVM takes the count at once, so it cannot be full.
            log::error!("cannot signal interrupt {}: {error}", vector.gsi);
        }
    }
}

impl Drop for MsixFunction {
    fn drop(&mut self) {
        for vector in &self.vectors {
            // Fails only when the VM is gone, and the irqfd with it.
            let _ = self.router.vm.fd().unregister_irqfd(&vector.event, vector.gsi);
            self.router.free(vector.gsi);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Host;

    #[test]
    fn a_route_that_kvm_did_not_take_is_set_by_the_next_try() {
        let vm = Vm::new(&Host::open().expect("these tests need /dev/kvm")).unwrap();
        let router = MsiRouter::new(vm);
        let gsi = router.allocate(1).unwrap()[0];
        let message = MsiMessage { address: 0xfee0_0000, data: 0x41 };
        router.set_message(gsi, message).unwrap();
        assert!(!router.table().stale);
        // As a call that fails leaves it.
        router.table().stale = true;
        router.set_message(gsi, message).unwrap();
        assert!(!router.table().stale);
        router.defer();
        router.set_message(gsi, MsiMessage { data: 0x42, ..message }).unwrap();
        assert!(router.table().stale);
        router.settle().unwrap();
        assert!(!router.table().stale);
    }
}
