//! The persistent memory region (Base 8.14): memory of the controller that the guest sees in a BAR and that data of commands may lie in.
//! What is written there persists across power cycles, Controller Level Resets and the disabling of the region. How commands name it
//! stands in [`crate::window`].
//!
//! The contents are memory like RAM. The process around the controller tracks and moves them, shows them to the guest while the region
//! is ready ([`Host::show_region`]), and makes them durable ([`Host::flush_region`]): when PMRSTS is read, which is the write barrier
//! here (PMRCAP.PMRWBM bit 1), when the region is disabled, and at shutdown.
//!
//! A region is ready as soon as it is enabled, except while a sanitize operation has it: that erases the regions of all controllers of
//! the subsystem, and none becomes ready before it has ended well.

use std::fmt::{self, Debug};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use bus::{GuestMapping, GuestMemory};
use nvme_spec::regs;
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::regs::TIMEOUT_500_MS;
use crate::shared::{Host, lock};
use crate::window::{self, REGION_START, Windows};

/// PMRSTS.ERR, whose values are the vendor's: something that was written could not be made durable.
pub(crate) const ERROR_NOT_DURABLE: u8 = 1;
/// Bytes that are erased at once.
const ERASE_BYTES: u64 = 64 << 10;

/// `memory` with `region` as the persistent memory region of one controller, which is built with the result as its guest memory.
///
/// # Errors
/// [`Error::Region`]: the region is no power of two of at least 4096 bytes, or there is one in `memory` already.
pub fn memory_with_region(memory: &GuestMemory, region: Arc<GuestMapping>) -> Result<GuestMemory, Error> {
    let length_bytes = region.size() as u64;
    window::memory_with(memory, region, REGION_START).ok_or(Error::Region { length_bytes })
}

/// The region of one controller. Its lock is taken after that of the registers, and the host is called with it, so that it is told of
/// changes in their order.
pub(crate) struct Region {
    windows: Arc<Windows>,
    memory: GuestMemory,
    host: Arc<dyn Host>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    /// PMRCTL.EN.
    enabled: bool,
    /// A sanitize operation has it.
    held: bool,
    /// PMRSTS.ERR.
    error: u8,
}

impl State {
    fn is_ready(self) -> bool {
        self.enabled && !self.held
    }
}

impl Region {
    /// The region in `memory`, disabled; of no bytes, if there is none.
    pub fn new(windows: Arc<Windows>, memory: GuestMemory, host: Arc<dyn Host>) -> Arc<Self> {
        Arc::new(Self { windows, memory, host, state: Mutex::default() })
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.windows.region_bytes() > 0
    }

    /// PMRCAP of a region in BAR `bar`: data of both directions, a read of PMRSTS as the barrier, and addresses of its own.
    pub fn capabilities(&self, bar: u8) -> u32 {
        if !self.exists() {
            return 0;
        }
        // PMRTU 0: units of 500 ms.
        regs::PMRCAP_RDS
            | regs::PMRCAP_WDS
            | u32::from(bar) << regs::PMRCAP_BIR_SHIFT
            | regs::PMRCAP_PMRWBM_STATUS_READ
            | (TIMEOUT_500_MS as u32) << regs::PMRCAP_PMRTO_SHIFT
            | regs::PMRCAP_CMSS
    }

    /// PMRCTL.
    pub fn control(&self) -> u32 {
        if self.state().enabled { regs::PMRCTL_EN } else { 0 }
    }

    /// PMRSTS but for CBAI. A region that has lost something is unreliable; the status of one that is not ready "is always cleared".
    pub fn status(&self) -> u32 {
        let state = *self.state();
        let health = if state.error != 0 && state.is_ready() { regs::PMRSTS_HSTS_UNRELIABLE } else { 0 };
        let not_ready = if !self.exists() || state.is_ready() { 0 } else { regs::PMRSTS_NRDY };
        health | not_ready | u32::from(state.error)
    }

    /// PMRSTS.ERR.
    pub fn error(&self) -> u8 {
        self.state().error
    }

    /// Whether the guest can use it.
    pub fn is_ready(&self) -> bool {
        self.state().is_ready()
    }

    /// PMRCTL was written.
    pub fn set_control(&self, value: u32) {
        self.change(|state| state.enabled = value & regs::PMRCTL_EN != 0);
    }

    /// A reset other than that of the controller alone. The contents stay.
    pub fn reset(&self) {
        self.change(|state| (state.enabled, state.error) = (false, 0));
    }

    /// What is saved, again.
    pub fn load(&self, enabled: bool, error: u8) {
        self.change(|state| (state.enabled, state.error) = (enabled, error));
    }

    fn set_held(&self, held: bool) {
        self.change(|state| state.held = held);
    }

    /// As [`Region::set_held`], unless it is enabled.
    fn hold_disabled(&self) -> bool {
        let mut is_disabled = false;
        self.change(|state| {
            is_disabled = !state.enabled;
            state.held |= is_disabled;
        });
        is_disabled
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        if !self.exists() {
            return;
        }
        let mut state = self.state();
        let was_ready = state.is_ready();
        change(&mut state);
        let ready = state.is_ready();
        if ready != was_ready {
            self.windows.set_region_ready(ready);
            self.host.show_region(ready);
        }
    }

    /// Makes what was written durable. What fails is said in PMRSTS.ERR until the function is reset: it may never become durable,
    /// whatever is tried later. `true`: this is the first failure.
    pub fn flush(&self) -> bool {
        let Err(error) = self.host.flush_region() else { return false };
        let before = std::mem::replace(&mut self.state().error, ERROR_NOT_DURABLE);
        if before == 0 {
            log::error!("a persistent memory region cannot be made durable: {error}");
        }
        before == 0
    }

    /// A guest read of the BAR. What "an undefined value" would be while the region is not ready is 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let length_bytes = if self.is_ready() { self.windows.region_bytes() } else { 0 };
        window::read(&self.memory, REGION_START, length_bytes, offset, data);
    }

    /// A guest write of the BAR.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let length_bytes = if self.is_ready() { self.windows.region_bytes() } else { 0 };
        window::write(&self.memory, REGION_START, length_bytes, offset, data);
    }

    /// Overwrites all of it with zeroes, durably.
    fn erase(&self) -> io::Result<()> {
        let zeroes = vec![0; ERASE_BYTES.min(self.windows.region_bytes()) as usize];
        let end = REGION_START + self.windows.region_bytes();
        for address in (REGION_START..end).step_by(zeroes.len().max(1)) {
            // Both are powers of two, so that the last piece is as long as the others.
            self.memory.write_slice(&zeroes, GuestAddress(address)).map_err(io::Error::other)?;
        }
        self.host.flush_region()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("state", &*self.state()).finish_non_exhaustive()
    }
}

/// The regions of a subsystem, for what is done to all of them. Its lock is taken before those of the regions.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    /// By controller identifier.
    regions: Vec<(u16, Weak<Region>)>,
    /// A sanitize operation has them, or failed.
    held: bool,
}

impl List {
    fn regions(&self) -> impl Iterator<Item = Arc<Region>> {
        self.regions.iter().filter_map(|(_, region)| region.upgrade()).filter(|region| region.exists())
    }

    fn settle(&self) {
        self.regions().for_each(|region| region.set_held(self.held));
    }
}

impl Regions {
    /// Adds that of controller `id`, which has begun anew if it was there.
    pub fn join(&self, id: u16, region: &Arc<Region>) {
        let mut list = lock(&self.list);
        list.regions.retain(|(other, region)| *other != id && region.strong_count() > 0);
        list.regions.push((id, Arc::downgrade(region)));
        list.settle();
    }

    /// Controller `id` is no more.
    pub fn leave(&self, id: u16) {
        let mut list = lock(&self.list);
        list.regions.retain(|(other, _)| *other != id);
    }

    /// Keeps all regions from becoming ready, for a sanitize operation. `false`: one of them is enabled.
    pub fn hold(&self) -> bool {
        let mut list = lock(&self.list);
        if !list.regions().all(|region| region.hold_disabled()) {
            // Those that were held for this are not any more.
            list.settle();
            return false;
        }
        list.held = true;
        true
    }

    /// Whether all regions are kept from becoming ready, whatever they are.
    pub fn set_held(&self, held: bool) {
        let mut list = lock(&self.list);
        list.held = held;
        list.settle();
    }

    /// Erases all of them, which are held.
    pub fn erase(&self) -> io::Result<()> {
        let regions: Vec<_> = lock(&self.list).regions().collect();
        regions.iter().try_for_each(|region| region.erase())
    }
}
