//! One virtual machine.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use bus::GuestMapping;
use kvm_bindings as kvm;
use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VcpuFd, VmFd};
use vm_memory::bitmap::Bitmap;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::dirty_ring::DirtyRings;
use super::tracking::{DirtyTracking, Tracking};
use super::{Error, Host};
use crate::memory::{GuestRam, RamBlock};
use crate::{layout, startup};

/// A KVM virtual machine with its interrupt controllers and timer, before and while vCPUs run in it.
///
/// Shared by `Arc`: every method takes `&self`.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    slots: Mutex<Slots>,
    xsave_bytes: usize,
    max_vcpus: u32,
    tracking: Tracking,
}

/// Slots in use, with the mappings that they point at.
#[derive(Debug, Default)]
struct Slots {
    list: Vec<Slot>,
    /// Whether they have logs.
    logged: bool,
}

impl Slots {
    fn position(&self, slot: u32) -> Option<usize> {
        self.list.iter().position(|other| other.region.slot == slot)
    }
}

#[derive(Debug)]
struct Slot {
    region: kvm_userspace_memory_region,
    _mapping: Arc<GuestMapping>,
}

/// Makes a call again that a signal interrupted: KVM starts kernel threads for some, and waits for them.
fn uninterrupted<T>(call: impl Fn() -> Result<T, errno::Error>) -> Result<T, errno::Error> {
    loop {
        match call() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

impl Vm {
    /// Creates a VM with PIC, I/O APIC, local APICs (one for each vCPU that follows) and PIT.
    ///
    /// # Errors
    /// [`Error::Call`], naming the step.
    pub fn new(host: &Host) -> Result<Arc<Self>, Error> {
        Self::with_tracking(host, DirtyTracking::default(), None)
    }

    /// As [`Self::new`], with a way to find dirty pages; rings have `ring_entries` each, a power of two, or as many as suit a machine.
    ///
    /// # Errors
    /// As [`Self::new`], and [`Error::MissingCapabilities`]: this host does not have that way.
    pub fn with_tracking(
        host: &Host,
        tracking: DirtyTracking,
        ring_entries: Option<u32>,
    ) -> Result<Arc<Self>, Error> {
        let fd = uninterrupted(|| host.fd().create_vm()).map_err(Error::call("create a virtual machine"))?;
        let tss = usize::try_from(layout::KVM_TSS_START).expect("the address map fits usize on x86-64");
        fd.set_tss_address(tss).map_err(Error::call("set the TSS address"))?;
        fd.create_irq_chip().map_err(Error::call("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: kvm::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(Error::call("create the interval timer"))?;

        let tracking = Tracking::enable(&fd, tracking, ring_entries)?;
        Ok(Arc::new(Self {
            fd,
            slots: Mutex::default(),
            xsave_bytes: host.xsave_bytes(),
            max_vcpus: host.max_vcpus(),
            tracking,
        }))
    }

    /// Registers every block of `ram` that the guest sees as a memory slot. The mappings stay alive as long as the VM.
    ///
    /// # Errors
    /// [`Error::Call`] with the block's place.
    pub fn map_ram(&self, ram: &GuestRam) -> Result<(), Error> {
        for block in ram.blocks() {
            let (Some(guest_phys_addr), Some(slot)) = (block.guest_base, block.kvm_slot) else { continue };
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr,
                memory_size: block.length_bytes(),
                userspace_addr: block.mapping.as_ptr() as u64,
            };
            let begun = Instant::now();
            self.set_region(region)?;
            startup::memory_slot(begun.elapsed());
            self.slots().list.push(Slot { region, _mapping: Arc::clone(&block.mapping) });
        }
        Ok(())
    }

    /// Lets the guest see `block`, which is not RAM and has a slot, at `address`, or no longer. A log that goes with the place is made
    /// good by marking every page in the block's own bitmap.
    ///
    /// # Errors
    /// [`Error::Call`]: something else is there. The guest does not see the block then.
    pub fn place_block(&self, block: &RamBlock, address: Option<u64>) -> Result<(), Error> {
        let Some(slot) = block.kvm_slot.filter(|_| block.guest_base.is_none()) else { return Ok(()) };
        let mut slots = self.slots();
        if let Some(position) = slots.position(slot) {
            let region = slots.list[position].region;
            if Some(region.guest_phys_addr) == address {
                return Ok(());
            }
            self.set_region(kvm_userspace_memory_region { memory_size: 0, flags: 0, ..region })?;
            slots.list.swap_remove(position);
            if slots.logged {
                block.mapping.bitmap().mark_dirty(0, block.mapping.size());
            }
        }
        let Some(guest_phys_addr) = address else { return Ok(()) };
        let region = kvm_userspace_memory_region {
            slot,
            flags: if slots.logged { kvm::KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr,
            memory_size: block.length_bytes(),
            userspace_addr: block.mapping.as_ptr() as u64,
        };
        self.set_region(region)?;
        slots.list.push(Slot { region, _mapping: Arc::clone(&block.mapping) });
        Ok(())
    }

    /// Calls `f` while memory slot `slot` stays as it is; not if there is none.
    pub(crate) fn with_slot<T>(&self, slot: u32, f: impl FnOnce() -> T) -> Option<T> {
        let slots = self.slots();
        slots.position(slot).map(|_| f())
    }

    /// Switches the dirty log of every slot on or off. On: the first log of a slot reports every page.
    ///
    /// # Errors
    /// [`Error::Call`]; slots before the failing one are switched.
    pub(crate) fn log_dirty_pages(&self, on: bool) -> Result<(), Error> {
        let mut slots = self.slots();
        slots.logged = on;
        for slot in &mut slots.list {
            let flags = if on { kvm::KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            let region = kvm_userspace_memory_region { flags, ..slot.region };
            self.set_region(region)?;
            slot.region = region;
        }
        Ok(())
    }

    /// Whether a log that was just switched on reports every page (otherwise: only pages written since).
    pub(crate) fn log_starts_full(&self) -> bool {
        matches!(self.tracking, Tracking::Log { starts_full: true })
    }

    /// Whether dirty pages are found by rings and not by the log.
    pub(crate) fn has_dirty_rings(&self) -> bool {
        self.dirty_rings().is_some()
    }

    pub(super) fn dirty_rings(&self) -> Option<&DirtyRings> {
        match &self.tracking {
            Tracking::Log { .. } => None,
            Tracking::Ring(rings) => Some(rings),
        }
    }

    #[allow(unsafe_code)]
    fn set_region(&self, region: kvm_userspace_memory_region) -> Result<(), Error> {
        let kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, .. } = region;
        // SAFETY: address and size are those of a mapping that `self.slots` (or, during `map_ram` and `place_block`, the caller's block,
        // which is pushed next) keeps mapped until the slot or the VM is gone.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(Error::call(format!(
            "set memory slot {slot} at {guest_phys_addr:#x}+{memory_size:#x} with flags {flags:#x}"
        )))
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes `event` readable when the guest writes, in any width, at the guest physical `address`, without an exit to
    /// this process. The value that was written is lost.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn add_doorbell(&self, event: &EventFd, address: u64) -> Result<(), Error> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::call(format!("register an ioeventfd at {address:#x}")))
    }

    /// Undoes [`Self::add_doorbell`].
    ///
    /// # Errors
    /// [`Error::Call`], for one that was not registered.
    pub fn remove_doorbell(&self, event: &EventFd, address: u64) -> Result<(), Error> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::call(format!("remove the ioeventfd at {address:#x}")))
    }

    /// The bare virtual machine, for the other files of this module.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    pub(crate) fn xsave_bytes(&self) -> usize {
        self.xsave_bytes
    }

    pub(crate) fn max_vcpus(&self) -> u32 {
        self.max_vcpus
    }

    pub(crate) fn create_vcpu(&self, index: u32) -> Result<VcpuFd, Error> {
        let fd = uninterrupted(|| self.fd.create_vcpu(index.into()))
            .map_err(Error::call(format!("create vCPU {index}")))?;
        if let Some(rings) = self.dirty_rings() {
            rings.add(&fd).map_err(Error::call(format!("map the dirty ring of vCPU {index}")))?;
        }
        Ok(fd)
    }
}
