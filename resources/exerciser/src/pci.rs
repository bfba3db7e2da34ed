//! PCI functions on bus 0, through ports 0xcf8 and 0xcfc.
//!
//! Where no firmware gave a base address register an address, or gave one beyond reach, the exerciser does, in
//! the same window that ferry uses (QEMU's q35 has it free too).

use alloc::vec::Vec;

use crate::machine::Machine;
use crate::mmio::Registers;

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;

const ID: u8 = 0x00;
const COMMAND: u8 = 0x04;
const STATUS_CAPABILITIES: u32 = 1 << 20;
const CLASS: u8 = 0x08;
const HEADER: u8 = 0x0c;
const HEADER_MULTI_FUNCTION: u32 = 1 << 23;
const BAR0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const BARS: u8 = 6;

const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_BUS_MASTER: u32 = 1 << 2;
const COMMAND_INTX_OFF: u32 = 1 << 10;
const BAR_IO: u32 = 1;
const BAR_64_BIT: u32 = 1 << 2;
const BAR_FLAGS: u32 = 0xf;

const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_ENABLE: u32 = 1 << 31;
const MSIX_FUNCTION_MASK: u32 = 1 << 30;
const MSIX_ENTRY_BYTES: usize = 16;

/// Mass storage, non-volatile memory, NVM Express I/O controller.
pub const CLASS_NVME: u32 = 0x01_0802;

/// Addresses for base address registers that have none.
#[derive(Debug)]
pub struct Window {
    next: u64,
    end: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { next: 0xc000_0000, end: 0xe000_0000 }
    }
}

impl Window {
    /// A naturally aligned piece.
    fn take(&mut self, size_bytes: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size_bytes)?;
        self.next = start.checked_add(size_bytes).filter(|end| *end <= self.end)?;
        Some(start)
    }

    /// Leaves out what is already in use.
    fn skip(&mut self, start: u64, size_bytes: u64) {
        let end = start.saturating_add(size_bytes);
        if start < self.end && end > self.next {
            self.next = end;
        }
    }
}

/// One function on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl Function {
    fn select(self, machine: &mut dyn Machine, offset: u8) {
        let place = u32::from(self.device) << 11 | u32::from(self.function) << 8;
        machine.write_port32(ADDRESS_PORT, ADDRESS_ENABLE | place | u32::from(offset & !3));
    }

    /// Reads the 4 bytes at `offset` of configuration space.
    pub fn read(self, machine: &mut dyn Machine, offset: u8) -> u32 {
        self.select(machine, offset);
        machine.read_port32(DATA_PORT)
    }

    /// Writes the 4 bytes at `offset` of configuration space.
    pub fn write(self, machine: &mut dyn Machine, offset: u8, value: u32) {
        self.select(machine, offset);
        machine.write_port32(DATA_PORT, value);
    }

    /// Lets the function decode memory accesses and reach memory itself, without pin interrupts. The status
    /// half of the register is written as 0, which clears nothing.
    pub fn enable(self, machine: &mut dyn Machine) {
        let command = self.read(machine, COMMAND) & 0xffff;
        self.write(machine, COMMAND, command | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_OFF);
    }

    /// Size and address of memory BAR `index`, after giving it an address if it has none within reach.
    pub fn place_bar(self, machine: &mut dyn Machine, index: u8, window: &mut Window) -> Option<(u64, u64)> {
        if index >= BARS {
            return None;
        }
        let register = BAR0 + 4 * index;
        let low = self.read(machine, register);
        if low & BAR_IO != 0 {
            return None;
        }
        let wide = low & BAR_64_BIT != 0 && index + 1 < BARS;
        let high = if wide { self.read(machine, register + 4) } else { 0 };

        let command = self.read(machine, COMMAND) & 0xffff;
        self.write(machine, COMMAND, command & !COMMAND_MEMORY);
        self.write(machine, register, u32::MAX);
        let mut mask = u64::from(self.read(machine, register) & !BAR_FLAGS) | 0xffff_ffff << 32;
        if wide {
            self.write(machine, register + 4, u32::MAX);
            mask = mask & 0xffff_ffff | u64::from(self.read(machine, register + 4)) << 32;
        }
        let size_bytes = if mask as u32 == 0 && !wide { 0 } else { (!mask).wrapping_add(1) };
        let given = u64::from(low & !BAR_FLAGS) | u64::from(high) << 32;
        let placed = match size_bytes {
            0 => None,
            _ if given != 0 && given < 1 << 32 => {
                window.skip(given, size_bytes);
                Some(given)
            }
            _ => window.take(size_bytes),
        };
        let address = placed.unwrap_or(given);
        self.write(machine, register, address as u32 | low & BAR_FLAGS);
        if wide {
            self.write(machine, register + 4, (address >> 32) as u32);
        }
        self.write(machine, COMMAND, command);
        placed.map(|address| (address, size_bytes))
    }

    fn capability(self, machine: &mut dyn Machine, wanted: u8) -> Option<u8> {
        if self.read(machine, COMMAND) & STATUS_CAPABILITIES == 0 {
            return None;
        }
        let mut next = self.read(machine, CAPABILITIES) as u8 & !3;
        // 192 bytes hold at most 48 capabilities: a list with more goes round.
        for _ in 0..48 {
            if next < 0x40 {
                return None;
            }
            let header = self.read(machine, next);
            if header as u8 == wanted {
                return Some(next);
            }
            next = (header >> 8) as u8 & !3;
        }
        None
    }
}

/// Every function of a class (class, subclass and programming interface) on bus 0.
pub fn find(machine: &mut dyn Machine, class: u32) -> Vec<Function> {
    let mut found = Vec::new();
    for device in 0..32 {
        for function in 0..8 {
            let candidate = Function { device, function };
            if candidate.read(machine, ID) as u16 != 0xffff {
                if candidate.read(machine, CLASS) >> 8 == class {
                    found.push(candidate);
                }
            } else if function == 0 {
                break;
            }
            if function == 0 && candidate.read(machine, HEADER) & HEADER_MULTI_FUNCTION == 0 {
                break;
            }
        }
    }
    found
}

/// The MSI-X table of a function, switched on with every entry masked.
#[derive(Debug)]
pub struct Msix {
    table: Registers,
    /// Entries of the table.
    pub entries: u16,
}

impl Msix {
    /// Finds the capability, places its BAR and switches MSI-X on. None without the capability, or when its
    /// table is out of reach.
    pub fn enable(machine: &mut dyn Machine, function: Function, window: &mut Window) -> Option<Self> {
        let capability = function.capability(machine, CAPABILITY_MSIX)?;
        let control = function.read(machine, capability);
        let entries = (control >> 16 & 0x7ff) as u16 + 1;
        let place = function.read(machine, capability + 4);
        let (bar, size_bytes) = function.place_bar(machine, (place & 7) as u8, window)?;
        let offset = u64::from(place & !7);
        let length_bytes = usize::from(entries) * MSIX_ENTRY_BYTES;
        if offset.checked_add(length_bytes as u64)? > size_bytes {
            return None;
        }
        let table = machine.registers(bar + offset, length_bytes)?;
        for entry in 0..usize::from(entries) {
            table.write32(entry * MSIX_ENTRY_BYTES + 12, 1);
        }
        function.write(machine, capability, control & !MSIX_FUNCTION_MASK | MSIX_ENABLE);
        Some(Self { table, entries })
    }

    /// Sends entry `entry` to interrupt `vector` of the local APIC `apic`.
    pub fn route(&self, entry: u16, apic: u8, vector: u8) {
        let start = usize::from(entry) * MSIX_ENTRY_BYTES;
        self.table.write32(start, 0xfee0_0000 | u32::from(apic) << 12);
        self.table.write32(start + 4, 0);
        self.table.write32(start + 8, vector.into());
        self.table.write32(start + 12, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// Configuration space of one function at 00:05.0, with a 64-bit BAR 0 and a 32-bit BAR 2.
    struct Bus {
        config: [u32; 64],
        sizes: [u64; 6],
        address: u32,
        writes: Vec<(u32, u32)>,
    }

    impl Bus {
        fn new() -> Self {
            let mut config = [0; 64];
            config[0] = 0x1234_8086;
            config[1] = STATUS_CAPABILITIES;
            config[2] = CLASS_NVME << 8;
            config[4] = BAR_64_BIT;
            config[13] = 0x50;
            config[20] = 0x6001;
            config[24] = 0x11 | 7 << 16;
            config[25] = 0x2002;
            Self { config, sizes: [0x4000, 0, 0x8000, 0, 0, 0], address: 0, writes: Vec::new() }
        }
    }

    impl Machine for Bus {
        fn read_port8(&mut self, _port: u16) -> u8 {
            0xff
        }
        fn write_port8(&mut self, _port: u16, _value: u8) {}
        fn write_port16(&mut self, _port: u16, _value: u16) {}
        fn read_port32(&mut self, _port: u16) -> u32 {
            if self.address & 0xffff00 == 0x2800 {
                self.config[(self.address & 0xff) as usize / 4]
            } else {
                u32::MAX
            }
        }
        fn write_port32(&mut self, port: u16, value: u32) {
            if port == ADDRESS_PORT {
                self.address = value;
                return;
            }
            let register = (self.address & 0xff) as usize / 4;
            self.writes.push((self.address & 0xff, value));
            self.config[register] = match register {
                4 => value & !(self.sizes[0] as u32 - 1) | BAR_64_BIT,
                6 => value & !(self.sizes[2] as u32 - 1),
                7..=9 => 0,
                1 => value & 0xffff | STATUS_CAPABILITIES,
                _ => value,
            };
        }
        fn write_string(&mut self, _port: u16, _bytes: &[u8]) {}
        fn tsc(&self) -> u64 {
            0
        }
        fn cpuid(&mut self, _leaf: u32, _subleaf: u32) -> [u32; 4] {
            [0; 4]
        }
        fn user_cpuid(&mut self, _leaf: u32, _subleaf: u32) -> [u32; 4] {
            unreachable!()
        }
        fn write_msr(&mut self, _register: u32, _value: u64) {}
        fn interrupts(&self, _vector: u8) -> u64 {
            0
        }
        fn interrupt_total(&self) -> u64 {
            0
        }
        fn halt(&mut self, _seen: u64) {}
        fn registers(&mut self, _address: u64, _length_bytes: usize) -> Option<Registers> {
            None
        }
    }

    const HERE: Function = Function { device: 5, function: 0 };

    #[test]
    fn functions_are_found_by_class() {
        assert_eq!(find(&mut Bus::new(), CLASS_NVME), [HERE]);
        assert_eq!(find(&mut Bus::new(), 0x02_0000), []);
    }

    #[test]
    fn bars_without_an_address_get_one_each() {
        let mut bus = Bus::new();
        let mut window = Window::default();
        assert_eq!(HERE.place_bar(&mut bus, 0, &mut window), Some((0xc000_0000, 0x4000)));
        assert_eq!(HERE.place_bar(&mut bus, 2, &mut window), Some((0xc000_8000, 0x8000)));
        assert_eq!((bus.config[4], bus.config[5], bus.config[6]), (0xc000_0004, 0, 0xc000_8000));
        assert_eq!(HERE.place_bar(&mut bus, 3, &mut window), None, "there is none");
        assert_eq!(HERE.place_bar(&mut bus, 6, &mut window), None, "there cannot be one");
    }

    #[test]
    fn an_address_within_reach_is_kept_and_left_out_of_the_window() {
        let mut bus = Bus::new();
        let mut window = Window::default();
        bus.config[4] = 0xc000_4000 | BAR_64_BIT;
        assert_eq!(HERE.place_bar(&mut bus, 0, &mut window), Some((0xc000_4000, 0x4000)));
        assert_eq!(HERE.place_bar(&mut bus, 2, &mut window), Some((0xc000_8000, 0x8000)));
        bus.config[5] = 1;
        assert_eq!(HERE.place_bar(&mut bus, 0, &mut window), Some((0xc001_0000, 0x4000)), "above 4 GiB");
    }

    #[test]
    fn memory_decoding_is_off_while_a_bar_changes() {
        let mut bus = Bus::new();
        HERE.enable(&mut bus);
        bus.writes.clear();
        HERE.place_bar(&mut bus, 0, &mut Window::default());
        let commands: Vec<_> =
            bus.writes.iter().filter(|(at, _)| *at == 4).map(|(_, value)| value & 6).collect();
        assert_eq!(commands, [4, 6]);
    }

    #[test]
    fn a_full_window_places_nothing() {
        let mut window = Window { next: 0xdfff_f000, end: 0xe000_0000 };
        assert_eq!(HERE.place_bar(&mut Bus::new(), 0, &mut window), None);
    }

    #[test]
    fn capabilities_are_followed_and_loops_end() {
        let mut bus = Bus::new();
        assert_eq!(HERE.capability(&mut bus, CAPABILITY_MSIX), Some(0x60));
        assert_eq!(HERE.capability(&mut bus, 0x05), None);
        bus.config[24] = 0x5005;
        assert_eq!(HERE.capability(&mut bus, CAPABILITY_MSIX), None);
    }
}
