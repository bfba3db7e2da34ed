//! Dirty rings: each vCPU tells, in memory that it shares with this process, which pages it writes.
//!
//! KVM puts an entry into the ring of the vCPU that writes to a clean page. We take entries out, in order, and give them back;
//! `KVM_RESET_DIRTY_RINGS` then protects their pages again. A vCPU whose ring is nearly full leaves the guest
//! (`KVM_EXIT_DIRTY_RING_FULL`) until that was done ("The Definitive KVM API Documentation", 8.29). What was taken out is kept
//! here until it is asked for, so that the vCPU threads can make room as well.
//!
//! KVM keeps some entries free for what one exit from the guest may need. Where it interprets the guest's kernel (`kvm_pvm`), a vCPU that
//! fills its ring there makes its last entry again and again until something interrupts it, over entries that were not taken out. These
//! are lost, and never pass for clean pages: from then on no dirty pages are told any more ([`Error::DirtyRingOverrun`]), and the guest
//! goes on as soon as nobody tracks. What is given back then is not what was taken out, and no more of it may be given back than there
//! is: KVM would take the ring for full for the next four thousand million entries.
//!
//! A page that is written after its entry was taken out and before it was protected again gets no entry; its content is read
//! after [`Vm::empty_dirty_rings`] returned. The same page may have several entries.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings as kvm;
use kvm_bindings::{KVMIO, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::{errno, ioctl_io_nr};

use super::{Error, Vm};
use crate::memory::PAGE_SIZE_BYTES;

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// Flags of an entry: KVM has filled it, we have taken it out. The kernel's header has no names for the bindings to find.
const ENTRY_DIRTY: u32 = 1 << 0;
const ENTRY_RESET: u32 = 1 << 1;
/// Resets that do nothing before it is clear that KVM has lost its place: one that a signal interrupts does nothing.
const RESETS_MAX: u32 = 100;
/// Entries of an overrun ring that are given back at a time: fewer than there are in a ring that KVM calls full.
const RELIEF_ENTRIES: u32 = 64;

/// The rings of a VM, and the pages that were taken out of them.
#[derive(Debug)]
pub(super) struct DirtyRings {
    entries: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In the order of the vCPUs.
    rings: Vec<Ring>,
    slots: Vec<SlotPages>,
    /// KVM wrote over entries that were not taken out: what rings say is not all, now and later.
    overrun: bool,
}

/// Pages of a memory slot: bit n of word n/64 is page n.
#[derive(Debug)]
struct SlotPages {
    slot: u32,
    pages: u64,
    words: Vec<u64>,
}

/// The ring of one vCPU.
#[derive(Debug)]
struct Ring {
    start: NonNull<kvm_dirty_gfn>,
    /// A power of two.
    entries: u32,
    /// Entries taken out so far.
    taken: u32,
    /// Those of them that KVM has not taken back.
    marked: u32,
    /// Whether KVM was asked again, since anything that was taken out was given back, if the ring is full.
    is_asked_again: bool,
}

// SAFETY: the mapping belongs to this value alone, and whoever uses it holds the lock of the rings.
unsafe impl Send for Ring {}

impl DirtyRings {
    /// Rings of so many entries each, for vCPUs that follow.
    pub(super) fn new(entries: u32) -> Self {
        Self { entries, state: Mutex::default() }
    }

    /// Maps the ring of a new vCPU.
    pub(super) fn add(&self, vcpu: &VcpuFd) -> Result<(), errno::Error> {
        let ring = Ring::map(vcpu, self.entries)?;
        self.lock().rings.push(ring);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes out every entry that there is.
    fn take(&mut self) {
        let Self { rings, slots, overrun } = self;
        for ring in rings {
            while let Some((slot, page)) = ring.take() {
                // Others are of slots that nobody follows.
                if let Some(pages) = slots.iter_mut().find(|pages| pages.slot == slot && page < pages.pages) {
                    pages.words[(page / 64) as usize] |= 1 << (page % 64);
                }
                // KVM stops before: it has gone round.
                if ring.marked >= ring.entries {
                    *overrun = true;
                    break;
                }
            }
        }
    }

    /// Gives back all that was taken out.
    fn reset(&mut self, vm: &Vm) -> Result<(), Error> {
        let mut left: u32 = self.rings.iter().map(|ring| ring.marked).sum();
        let mut tries = 0;
        while left > 0 && tries < RESETS_MAX {
            let count = vm.reset_dirty_rings()?;
            tries = if count == 0 { tries + 1 } else { 0 };
            left = left.saturating_sub(count);
        }
        self.rings.iter_mut().for_each(|ring| (ring.marked, ring.is_asked_again) = (0, false));
        // It wrote over entries between the two.
        self.overrun |= left > 0;
        Ok(())
    }

    fn check(&self) -> Result<(), Error> {
        if self.overrun { Err(Error::DirtyRingOverrun) } else { Ok(()) }
    }
}

impl Ring {
    fn map(vcpu: &VcpuFd, entries: u32) -> Result<Self, errno::Error> {
        let length = entries as usize * size_of::<kvm_dirty_gfn>();
        let offset = u64::from(kvm::KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE_BYTES;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, fd, offset)
        }
        .map_err(|errno| errno::Error::new(errno.raw_os_error()))?;
        let start = NonNull::new(start.cast()).ok_or_else(|| errno::Error::new(libc::EFAULT))?;
        Ok(Self { start, entries, taken: 0, marked: 0, is_asked_again: false })
    }

    /// The flags of the next entry to take out, and the entry.
    fn next(&self) -> (&AtomicU32, *const kvm_dirty_gfn) {
        let index = self.taken & (self.entries - 1);
        // SAFETY: the index is below `entries`, which is what is mapped.
        let entry = unsafe { self.start.add(index as usize) }.as_ptr();
        // SAFETY: aligned and mapped as long as `self`; the kernel uses the flags in the same way, as an atomic.
        (unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) }, entry)
    }

    /// The slot and the page in it of the next entry, which KVM may protect again and fill anew once it is told to.
    fn take(&mut self) -> Option<(u32, u64)> {
        let (flags, entry) = self.next();
        // What follows is read after the flag that says it is there.
        if flags.load(Ordering::Acquire) & (ENTRY_DIRTY | ENTRY_RESET) != ENTRY_DIRTY {
            return None;
        }
        // SAFETY: mapped and aligned; the kernel leaves an entry alone that is dirty and not reset. Volatile, since one that is overrun is
        // written to all the same.
        let kvm_dirty_gfn { slot, offset, .. } = unsafe { entry.read_volatile() };
        self.give_back();
        Some((slot, offset))
    }

    /// Gives back some entries of a ring that is overrun, and full: that KVM said so before others gave back what was in it counts for
    /// nothing, and then it is asked again, by running its vCPU. From then on nobody gives back anything but here.
    ///
    /// Nobody knows at which entry KVM is: one after the other is tried, and what KVM does not take is left as it was, so that it never goes
    /// beyond what it has filled.
    fn relieve(&mut self, reset: impl Fn() -> Result<u32, Error>) -> Result<(), Error> {
        if !std::mem::replace(&mut self.is_asked_again, true) {
            return Ok(());
        }
        let mut relieved = 0;
        for _ in 0..self.entries {
            let flags = self.next().0;
            let before = flags.swap(ENTRY_RESET, Ordering::AcqRel);
            let count = reset()?;
            if count == 0 {
                flags.store(before, Ordering::Release);
            }
            self.taken = self.taken.wrapping_add(count.max(1));
            relieved += count;
            if relieved >= RELIEF_ENTRIES {
                break;
            }
        }
        Ok(())
    }

    fn give_back(&mut self) {
        self.next().0.store(ENTRY_RESET, Ordering::Release);
        self.taken = self.taken.wrapping_add(1);
        self.marked += 1;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let length = self.entries as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: exactly what `map` mapped, which nobody else knows of.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), length) } {
            log::error!("cannot unmap a dirty ring: {error}");
        }
    }
}

impl Vm {
    /// Begins to keep the pages of these slots, (number, pages) each, with rings. Entries that are left from before are dropped.
    pub(crate) fn follow_dirty_rings(&self, slots: impl Iterator<Item = (u32, u64)>) -> Result<(), Error> {
        let Some(rings) = self.dirty_rings() else { return Ok(()) };
        let mut state = rings.lock();
        state.slots.clear();
        state.check()?;
        state.take();
        let words = |pages: u64| vec![0; pages.div_ceil(64) as usize];
        state.slots.extend(slots.map(|(slot, pages)| SlotPages { slot, pages, words: words(pages) }));
        state.reset(self)?;
        state.check()
    }

    /// Takes out what is in the rings of the vCPUs, with rings, and has writes to those pages reported again.
    pub(crate) fn empty_dirty_rings(&self) -> Result<(), Error> {
        let Some(rings) = self.dirty_rings() else { return Ok(()) };
        // Held while they are reset: an entry that someone else takes out meanwhile is reset as well, and its page read after that.
        let mut state = rings.lock();
        state.check()?;
        state.take();
        state.reset(self)?;
        state.check()
    }

    /// Makes room in the ring of a vCPU that cannot go on without.
    pub(crate) fn relieve_dirty_ring(&self, vcpu: u32) -> Result<(), Error> {
        match self.empty_dirty_rings() {
            Err(Error::DirtyRingOverrun) => {}
            result => return result,
        }
        let Some(rings) = self.dirty_rings() else { return Ok(()) };
        let mut state = rings.lock();
        // What is left of others is not to be taken back, and counted, while this ring is relieved.
        if state.rings.iter().any(|ring| ring.marked > 0) {
            state.reset(self)?;
        }
        let ring = state.rings.get_mut(vcpu as usize);
        ring.map_or(Ok(()), |ring| ring.relieve(|| self.reset_dirty_rings()))
    }

    /// As [`Self::empty_dirty_rings`], with every vCPU stopped: nothing is protected again, which would be most of the cost.
    pub(crate) fn take_dirty_rings(&self) -> Result<(), Error> {
        let Some(rings) = self.dirty_rings() else { return Ok(()) };
        let mut state = rings.lock();
        state.check()?;
        state.take();
        state.check()
    }

    /// The pages of `slot` that came out of rings since the last call.
    pub(crate) fn dirty_ring_pages(&self, slot: u32) -> Vec<u64> {
        let Some(rings) = self.dirty_rings() else { return Vec::new() };
        let mut state = rings.lock();
        let Some(pages) = state.slots.iter_mut().find(|pages| pages.slot == slot) else { return Vec::new() };
        let nothing = vec![0; pages.words.len()];
        std::mem::replace(&mut pages.words, nothing)
    }

    /// As if KVM had written over entries.
    #[cfg(test)]
    pub(crate) fn overrun_dirty_rings(&self) {
        self.dirty_rings().expect("it has rings").lock().overrun = true;
    }

    /// Nobody wants to know any more.
    pub(crate) fn forget_dirty_rings(&self) -> Result<(), Error> {
        match self.follow_dirty_rings(std::iter::empty()) {
            // Who wanted to know was told.
            Err(Error::DirtyRingOverrun) => Ok(()),
            result => result,
        }
    }

    /// Lets KVM take back what it finds marked; says how many entries that were.
    fn reset_dirty_rings(&self) -> Result<u32, Error> {
        // SAFETY: the descriptor is a VM's; the call has no argument.
        let result = unsafe { ioctl(self.fd(), KVM_RESET_DIRTY_RINGS()) };
        u32::try_from(result).map_err(|_| Error::Call {
            what: "reset the dirty rings".to_owned(),
            source: errno::Error::last(),
        })
    }
}
