//! The configuration space of a type 0 function.

use crate::bar::{BAR_COUNT, BAR_OFFSET, Bar, BarKind, BarWindow};
use crate::error::Error;
use crate::msix::MsixLayout;
use crate::state::PciState;

/// Bytes that are backed; the extended space above holds no capability and reads 0.
pub(crate) const CONFIG_BYTES: usize = 256;
/// The command register.
pub(crate) const COMMAND: usize = 0x04;
/// The status register.
pub(crate) const STATUS: usize = 0x06;
/// Interrupt Status, in its low byte.
pub(crate) const STATUS_INTERRUPT: u8 = 1 << 3;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const PIN_A: u8 = 1;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;
/// Memory, bus master, parity response, SERR, INTx disable. I/O decoding stays 0: there are no I/O BARs.
const COMMAND_WRITABLE: u16 =
    COMMAND_MEMORY | COMMAND_BUS_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTERRUPT_DISABLE;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITY_POWER: u8 = 0x01;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_EXPRESS: u8 = 0x10;
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;
const POWER_STATE: u8 = 0b11;
const POWER_D3HOT: u8 = 0b11;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class, sub-class and programming interface, e.g. `[0x01, 0x08, 0x02]` for NVMe.
    pub class: [u8; 3],
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The bytes, which of their bits the guest may write, and what the device put in.
///
/// Built once by the `add_` methods, then only read and written by the guest.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bars: [Option<Bar>; BAR_COUNT],
    next_capability: usize,
    /// Where the offset of the next capability is to be written.
    link: usize,
    msix: Option<(usize, MsixLayout)>,
    power: Option<usize>,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: [None; BAR_COUNT],
            next_capability: FIRST_CAPABILITY,
            link: CAPABILITY_POINTER,
            msix: None,
            power: None,
        };
        config.put(0x00, &identity.vendor.to_le_bytes());
        config.put(0x02, &identity.device.to_le_bytes());
        let [class, subclass, interface] = identity.class;
        config.put(0x08, &[identity.revision, interface, subclass, class]);
        config.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        config.put(0x2e, &identity.subsystem.to_le_bytes());
        config.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Scratch for the guest's software.
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    /// Gives the function the interrupt pin INTA#, which is the one that a function alone in its slot has.
    pub fn add_interrupt_pin(&mut self) {
        self.put(INTERRUPT_PIN, &[PIN_A]);
    }

    /// Adds BAR `bar` (0 to 5).
    ///
    /// # Errors
    /// [`Error::BadBar`]: not a power of two of at least 16 bytes, beyond what the kind can address, or taken.
    pub fn add_bar(&mut self, bar: u8, kind: BarKind, length_bytes: u64) -> Result<(), Error> {
        let bad = |reason| Error::BadBar { bar, length_bytes, reason };
        let index = usize::from(bar);
        let (words, limit) = if kind.is_64_bit() { (2, 1 << 62) } else { (1, 1 << 31) };
        if index + words > BAR_COUNT {
            return Err(bad("there are six BARs, and a 64-bit one takes two"));
        }
        if !length_bytes.is_power_of_two() || !(16..=limit).contains(&length_bytes) {
            return Err(bad("the size must be a power of two, at least 16 bytes, and addressable"));
        }
        let below_is_wide = index > 0 && self.bars[index - 1].is_some_and(|bar| bar.kind.is_64_bit());
        if below_is_wide || self.bars[index..index + words].iter().any(Option::is_some) {
            return Err(bad("it is taken"));
        }
        let description = Bar { kind, length_bytes };
        self.bars[index] = Some(description);
        let offset = BAR_OFFSET + 4 * index;
        self.put(offset, &description.type_bits().to_le_bytes());
        let mask = description.address_mask().to_le_bytes();
        self.writable[offset..offset + 4 * words].copy_from_slice(&mask[..4 * words]);
        Ok(())
    }

    /// Adds a capability whose bytes after the two header bytes are `body`; `writable` marks the bits of `body` that
    /// the guest may write (missing bytes: none). Returns the offset of the capability.
    ///
    /// # Errors
    /// [`Error::NoRoomForCapability`].
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, Error> {
        let offset = self.next_capability;
        let end = offset + 2 + body.len();
        if end > CONFIG_BYTES || writable.len() > body.len() {
            return Err(Error::NoRoomForCapability { id, length_bytes: body.len() + 2, offset });
        }
        // Below 256, as `end` is.
        let [pointer, ..] = offset.to_le_bytes();
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.writable[offset + 2..offset + 2 + writable.len()].copy_from_slice(writable);
        self.bytes[self.link] = pointer;
        self.link = offset + 1;
        self.next_capability = end.next_multiple_of(4);
        let status = self.word(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        Ok(u16::from(pointer))
    }

    /// Leaves room: the next capability is not below `offset`. For functions whose capabilities lie where those of another device do.
    pub fn begin_next_capability_at(&mut self, offset: u8) {
        self.next_capability = self.next_capability.max(usize::from(offset).next_multiple_of(4));
    }

    /// Adds a vendor-specific capability (id 9); `body` begins with the length byte, as that capability demands.
    ///
    /// # Errors
    /// [`Error::NoRoomForCapability`].
    pub fn add_vendor_capability(&mut self, body: &[u8], writable: &[u8]) -> Result<u16, Error> {
        self.add_capability(CAPABILITY_VENDOR, body, writable)
    }

    /// Adds PCI power management (version 1.2): D0 and D3hot, no reset on the way back, no PME.
    ///
    /// # Errors
    /// [`Error::NoRoomForCapability`].
    pub fn add_power_management(&mut self) -> Result<(), Error> {
        // PMC: version 3. PMCSR: bit 3 No_Soft_Reset, bits 1:0 the power state.
        let offset = self.add_capability(CAPABILITY_POWER, &[3, 0, 1 << 3, 0, 0, 0], &[0, 0, POWER_STATE])?;
        self.power = Some(usize::from(offset) + 4);
        Ok(())
    }

    /// Adds the PCI Express capability (version 2) of a root complex integrated endpoint, which is what a function on
    /// the root bus without a root port above it is (PCI Express 3.0, 1.3.2.3). It has no link.
    ///
    /// # Errors
    /// [`Error::NoRoomForCapability`].
    pub fn add_express(&mut self) -> Result<(), Error> {
        let mut body = [0; 0x3a];
        let mut writable = [0; 0x3a];
        // Offsets in the capability, less its two header bytes.
        body[0] = 0x92; // PCI Express capabilities: version 2, type 1001b
        body[2..6].copy_from_slice(&(1u32 << 15).to_le_bytes()); // device capabilities: role-based error reporting
        // Device control: error reporting, relaxed ordering, payload size, no snoop, read request size (the default 512).
        body[6..8].copy_from_slice(&0x2810_u16.to_le_bytes());
        writable[6..8].copy_from_slice(&0x78ff_u16.to_le_bytes());
        self.add_capability(CAPABILITY_EXPRESS, &body, &writable)?;
        Ok(())
    }

    /// Adds MSI-X.
    ///
    /// # Errors
    /// [`Error::BadMsix`] if table and pending bits do not fit into the BAR or overlap,
    /// [`Error::NoRoomForCapability`].
    pub fn add_msix(&mut self, layout: MsixLayout) -> Result<(), Error> {
        let length_bytes =
            self.bars.get(usize::from(layout.bar)).copied().flatten().map_or(0, |bar| bar.length_bytes);
        layout.check(length_bytes)?;
        if self.msix.is_some() {
            return Err(layout.error("there can be only one"));
        }
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(layout.vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(layout.table_offset | u32::from(layout.bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(layout.pending_offset | u32::from(layout.bar)).to_le_bytes());
        let control = (MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes();
        let offset = self.add_capability(CAPABILITY_MSIX, &body, &control)?;
        self.msix = Some((usize::from(offset) + 2, layout));
        Ok(())
    }

    /// A guest read of any length at any offset.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (position, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(position).copied().unwrap_or(0);
        }
    }

    /// A guest write of any length at any offset: changes what is writable, ignores the rest.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let power_before = self.power_state();
        for (position, &byte) in (usize::from(offset)..).zip(data) {
            let Some(&writable) = self.writable.get(position) else { break };
            self.bytes[position] = self.bytes[position] & !writable | byte & writable;
        }
        // "If software attempts to write an unsupported, optional state to this field, the write operation must
        // complete normally; however, the data is discarded and no state change occurs." (PCI PM 1.2, 3.2.4)
        if let Some(offset) = self.power
            && !power_state_is_supported(self.power_state())
        {
            self.bytes[offset] = self.bytes[offset] & !POWER_STATE | power_before;
        }
    }

    /// The BARs and where they are.
    #[must_use]
    pub fn bars(&self) -> Vec<BarWindow> {
        let decoded = self.word(COMMAND) & COMMAND_MEMORY != 0 && !self.is_in_d3hot();
        let window = |(index, bar): (usize, &Option<Bar>)| {
            let bar = (*bar)?;
            let offset = BAR_OFFSET + 4 * index;
            let low = u64::from(self.double_word(offset));
            let high = if bar.kind.is_64_bit() { u64::from(self.double_word(offset + 4)) } else { 0 };
            let address = (high << 32 | low) & bar.address_mask();
            Some(BarWindow {
                bar: index as u8,
                kind: bar.kind,
                address,
                length_bytes: bar.length_bytes,
                decoded,
            })
        };
        self.bars.iter().enumerate().filter_map(window).collect()
    }

    /// Whether the guest lets the function access memory and send messages. In D3hot it may do neither (PCI PM 1.2, 5.4.1).
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_BUS_MASTER != 0 && !self.is_in_d3hot()
    }

    /// Whether there is an interrupt pin.
    pub(crate) fn has_pin(&self) -> bool {
        self.bytes[INTERRUPT_PIN] != 0
    }

    /// Interrupt Disable of the command register.
    pub(crate) fn interrupt_disabled(&self) -> bool {
        self.word(COMMAND) & COMMAND_INTERRUPT_DISABLE != 0
    }

    pub(crate) fn is_in_d3hot(&self) -> bool {
        self.power_state() == POWER_D3HOT
    }

    /// Where the MSI-X table is, if there is one.
    #[must_use]
    pub fn msix_layout(&self) -> Option<MsixLayout> {
        self.msix.map(|(_, layout)| layout)
    }

    /// MSI-X enable and function mask as the guest has set them.
    #[must_use]
    pub fn msix_control(&self) -> (bool, bool) {
        let control = self.msix.map_or(0, |(offset, _)| self.word(offset));
        (control & MSIX_ENABLE != 0, control & MSIX_FUNCTION_MASK != 0)
    }

    /// What a migration carries.
    #[must_use]
    pub fn save(&self) -> PciState {
        PciState { bytes: self.bytes, bar_length_bytes: self.bar_length_bytes() }
    }

    /// Takes over the guest-writable bits of `state`.
    ///
    /// # Errors
    /// [`Error::ConfigMismatch`], [`Error::BarSizeMismatch`], [`Error::BadPowerState`]: the state is of another
    /// device or not one that a guest can bring about. Nothing has changed then.
    pub fn restore(&mut self, state: &PciState) -> Result<(), Error> {
        for (bar, (&saved, here)) in state.bar_length_bytes.iter().zip(self.bar_length_bytes()).enumerate() {
            if saved != here {
                return Err(Error::BarSizeMismatch { bar, saved, here });
            }
        }
        for (offset, (&saved, (&here, &writable))) in
            state.bytes.iter().zip(self.bytes.iter().zip(&self.writable)).enumerate()
        {
            // A function that came without a pin, from a build that had none, goes on without: its driver knows of none.
            let without_pin = offset == INTERRUPT_PIN && saved == 0;
            if (saved ^ here) & !writable != 0 && !without_pin {
                return Err(Error::ConfigMismatch { offset, saved, here, writable });
            }
        }
        if let Some(offset) = self.power {
            let power = state.bytes[offset] & POWER_STATE;
            if !power_state_is_supported(power) {
                return Err(Error::BadPowerState { state: power });
            }
        }
        self.bytes = state.bytes;
        Ok(())
    }

    fn bar_length_bytes(&self) -> [u64; BAR_COUNT] {
        self.bars.map(|bar| bar.map_or(0, |bar| bar.length_bytes))
    }

    fn power_state(&self) -> u8 {
        self.power.map_or(0, |offset| self.bytes[offset] & POWER_STATE)
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    fn double_word(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }
}

/// D0 and D3hot; D1 and D2 are optional and not there.
fn power_state_is_supported(state: u8) -> bool {
    matches!(state, 0 | POWER_D3HOT)
}
