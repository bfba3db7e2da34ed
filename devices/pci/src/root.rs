//! The root bus: slots, the ways into configuration space, and the BARs on the MMIO bus.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bus::{Bus, BusDevice};

use crate::bar::{BAR_OFFSET, BarWindow};
use crate::config::{ConfigSpace, Identity};
use crate::error::Error;
use crate::state::RootBusState;

/// Slots of the root bus. Slot 0 is the host bridge.
pub const SLOTS: u8 = 32;

const FUNCTION_BYTES: u64 = 4096;
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, device, function and register (PCI 3.0, 3.2.2.3.2); the other bits are reserved.
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;
/// The generic host bridge of QEMU's `virt` machines: no operating system has a driver or quirk for it.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: [0x06, 0x00, 0x00],
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A device model on the root bus. Called on vCPU threads, several at once; `config_write` is called with the root bus
/// locked and must not call back into it.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space; `offset + data.len()` is at most 4096.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; `offset + data.len()` is at most 4096.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// The BARs and where they are.
    fn bars(&self) -> Vec<BarWindow>;
    /// The guest reads 1, 2, 4 or 8 bytes of BAR `bar`, which is one of `bars()`, inside its size.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// The guest writes 1, 2, 4 or 8 bytes of BAR `bar`.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
}

/// Bus 0.
pub struct RootBus {
    mmio: Arc<Bus>,
    windows: Vec<Range<u64>>,
    slots: Mutex<Slots>,
    host_bridge: Arc<HostBridge>,
    config_address: AtomicU32,
}

#[derive(Default)]
struct Slots {
    functions: BTreeMap<u8, Arc<dyn PciFunction>>,
    /// Where BARs are on the MMIO bus, by slot and BAR.
    mapped: BTreeMap<(u8, u8), u64>,
    /// BARs about whose refusal the log has spoken.
    reported: BTreeSet<(u8, u8)>,
}

impl RootBus {
    /// A root bus with its host bridge, whose functions' BARs appear on `mmio`, but only inside `windows`: nothing else
    /// of the machine may lie there.
    #[must_use]
    pub fn new(mmio: Arc<Bus>, windows: Vec<Range<u64>>) -> Arc<Self> {
        let host_bridge = Arc::new(HostBridge(Mutex::new(ConfigSpace::new(&HOST_BRIDGE))));
        let mut slots = Slots::default();
        slots.functions.insert(0, Arc::clone(&host_bridge) as Arc<dyn PciFunction>);
        let config_address = AtomicU32::new(0);
        Arc::new(Self { mmio, windows, slots: Mutex::new(slots), host_bridge, config_address })
    }

    /// Puts `function` into `slot` (1 to 31), before the guest runs.
    ///
    /// # Errors
    /// [`Error::BadSlot`] if there is no such slot or it is taken.
    pub fn insert(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), Error> {
        let mut slots = self.lock_slots();
        if slot >= SLOTS {
            return Err(Error::BadSlot { slot, reason: "slots are 0 to 31" });
        }
        if slots.functions.contains_key(&slot) {
            return Err(Error::BadSlot { slot, reason: "it is taken" });
        }
        slots.functions.insert(slot, function);
        self.map(&mut slots);
        Ok(())
    }

    /// Gives every BAR an address in `[window_start, window_start + window_length_bytes)`, as firmware does: largest
    /// first, each aligned to its size. Memory decoding stays off; the guest switches it on.
    ///
    /// # Errors
    /// [`Error::WindowFull`]. Some BARs have been assigned then.
    pub fn assign_bars(&self, window_start: u64, window_length_bytes: u64) -> Result<(), Error> {
        let mut slots = self.lock_slots();
        let mut bars: Vec<(u8, BarWindow)> = Vec::new();
        for (&slot, function) in &slots.functions {
            bars.extend(function.bars().into_iter().map(|bar| (slot, bar)));
        }
        bars.sort_by_key(|(slot, bar)| (std::cmp::Reverse(bar.length_bytes), *slot, bar.bar));
        let window_end = window_start.saturating_add(window_length_bytes);
        let mut next = window_start;
        for (slot, BarWindow { bar, kind, length_bytes, .. }) in bars {
            let limit = if kind.is_64_bit() { window_end } else { window_end.min(1 << 32) };
            let place = next.checked_next_multiple_of(length_bytes);
            let place = place.and_then(|start| Some((start, start.checked_add(length_bytes)?)));
            let Some((start, end)) = place.filter(|&(_, end)| end <= limit) else {
                return Err(Error::WindowFull { slot, bar, length_bytes, window_start, window_length_bytes });
            };
            next = end;
            let Some(function) = slots.functions.get(&slot) else { continue };
            let offset = BAR_OFFSET as u16 + 4 * u16::from(bar);
            let register_bytes = if kind.is_64_bit() { 8 } else { 4 };
            function.config_write(offset, &start.to_le_bytes()[..register_bytes]);
        }
        self.map(&mut slots);
        Ok(())
    }

    /// Brings the MMIO bus into agreement with the BARs. Call it when functions were restored; guest writes do it
    /// themselves.
    pub fn map_bars(&self) {
        self.map(&mut self.lock_slots());
    }

    /// The ports 0xcf8 to 0xcff as one device of 8 bytes.
    #[must_use]
    pub fn config_ports(self: &Arc<Self>) -> Arc<ConfigPorts> {
        Arc::new(ConfigPorts(Arc::downgrade(self)))
    }

    /// The enhanced configuration window; only its first MiB, bus 0, has functions.
    #[must_use]
    pub fn ecam(self: &Arc<Self>) -> Arc<Ecam> {
        Arc::new(Ecam(Arc::downgrade(self)))
    }

    /// What a migration carries of the bus itself; the functions save themselves.
    #[must_use]
    pub fn save(&self) -> RootBusState {
        RootBusState {
            config_address: self.config_address.load(Ordering::Relaxed),
            host_bridge: self.host_bridge.lock().save(),
        }
    }

    /// Takes over a saved state and maps the BARs: restore the functions first.
    ///
    /// # Errors
    /// [`Error::BadConfigAddress`] and those of [`ConfigSpace::restore`]. Nothing has changed then.
    pub fn restore(&self, state: &RootBusState) -> Result<(), Error> {
        if state.config_address & !ADDRESS_WRITABLE != 0 {
            return Err(Error::BadConfigAddress { value: state.config_address });
        }
        self.host_bridge.lock().restore(&state.host_bridge)?;
        self.config_address.store(state.config_address, Ordering::Relaxed);
        self.map_bars();
        Ok(())
    }

    fn config_read(&self, slot: u8, offset: u16, data: &mut [u8]) {
        let function = self.lock_slots().functions.get(&slot).cloned();
        match function {
            Some(function) => function.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, slot: u8, offset: u16, data: &[u8]) {
        let mut slots = self.lock_slots();
        if let Some(function) = slots.functions.get(&slot) {
            function.config_write(offset, data);
            self.map(&mut slots);
        }
    }

    /// Removes the BARs that have moved or no longer decode, then maps those that can be.
    fn map(&self, slots: &mut Slots) {
        let mut wanted: BTreeMap<(u8, u8), BarWindow> = BTreeMap::new();
        for (&slot, function) in &slots.functions {
            let decoded = function.bars().into_iter().filter(|bar| bar.decoded);
            wanted.extend(decoded.map(|bar| ((slot, bar.bar), bar)));
        }
        slots.mapped.retain(|key, address| {
            let stays = wanted.get(key).is_some_and(|bar| bar.address == *address);
            if !stays && let Err(error) = self.mmio.remove(*address) {
                log::error!("PCI slot {} BAR {}: {error}", key.0, key.1);
            }
            stays
        });
        for (key, window) in wanted {
            if slots.mapped.contains_key(&key) {
                continue;
            }
            let Some(function) = slots.functions.get(&key.0) else { continue };
            let device = Arc::new(MappedBar { function: Arc::clone(function), bar: key.1 });
            let refusal = if self.is_in_window(&window) {
                match self.mmio.insert(window.address, window.length_bytes, device) {
                    Ok(()) => {
                        slots.mapped.insert(key, window.address);
                        continue;
                    }
                    Err(error) => error.to_string(),
                }
            } else {
                "it is outside the windows for PCI".to_owned()
            };
            // Once a BAR: a guest could otherwise fill the log.
            if slots.reported.insert(key) {
                log::warn!(
                    "PCI slot {} BAR {} at {:#x} stays unmapped: {refusal}",
                    key.0,
                    key.1,
                    window.address
                );
            }
        }
    }

    fn is_in_window(&self, bar: &BarWindow) -> bool {
        let end = bar.address.checked_add(bar.length_bytes);
        end.is_some_and(|end| {
            self.windows.iter().any(|window| window.start <= bar.address && end <= window.end)
        })
    }

    fn lock_slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A BAR on the MMIO bus.
struct MappedBar {
    function: Arc<dyn PciFunction>,
    bar: u8,
}

impl BusDevice for MappedBar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.bar, offset, data);
    }
}

/// Configuration mechanism 1 (PCI 3.0, 3.2.2.3.2): the address port at offset 0, which is a register only for accesses
/// of 4 bytes, and the data port at offset 4 for 1, 2 and 4 bytes. Lives no longer than its [`RootBus`].
pub struct ConfigPorts(Weak<RootBus>);

impl ConfigPorts {
    const DATA: u64 = 4;

    /// Slot and register of a data access, if the address port selects a function of bus 0.
    fn target(root: &RootBus, offset: u64) -> Option<(u8, u16)> {
        let byte = offset.checked_sub(Self::DATA)?;
        let address = root.config_address.load(Ordering::Relaxed);
        let [register, device_function, bus, _] = address.to_le_bytes();
        let selected = address & ADDRESS_ENABLE != 0 && bus == 0 && device_function & 0b111 == 0;
        selected.then_some((device_function >> 3, u16::from(register & !0b11) + byte as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(root) = self.0.upgrade() else { return };
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&root.config_address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((slot, register)) = Self::target(&root, offset) {
            root.config_read(slot, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(root) = self.0.upgrade() else { return };
        if offset == 0
            && let Ok(&value) = data.try_into()
        {
            root.config_address.store(u32::from_le_bytes(value) & ADDRESS_WRITABLE, Ordering::Relaxed);
        } else if let Some((slot, register)) = Self::target(&root, offset) {
            root.config_write(slot, register, data);
        }
    }
}

/// The enhanced configuration access mechanism (PCI Express 3.0, 7.2.2): 4096 bytes a function, 1 MiB a bus. Lives no
/// longer than its [`RootBus`].
pub struct Ecam(Weak<RootBus>);

impl Ecam {
    /// Slot and register, if the access stays inside a function 0 of bus 0.
    fn target(offset: u64, length: usize) -> Option<(u8, u16)> {
        let (function, register) = (offset / FUNCTION_BYTES, offset % FUNCTION_BYTES);
        let inside = register + length as u64 <= FUNCTION_BYTES;
        let slot = u8::try_from(function / 8).ok().filter(|&slot| slot < SLOTS)?;
        (inside && function.is_multiple_of(8)).then_some((slot, register as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (self.0.upgrade(), Self::target(offset, data.len())) {
            (Some(root), Some((slot, register))) => root.config_read(slot, register, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some(root), Some((slot, register))) = (self.0.upgrade(), Self::target(offset, data.len())) {
            root.config_write(slot, register, data);
        }
    }
}

/// The host bridge: an identity, nothing to configure.
struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset, data);
    }

    fn bars(&self) -> Vec<BarWindow> {
        Vec::new()
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
}
