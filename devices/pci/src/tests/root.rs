//! The root bus: the two ways into configuration space, BAR mapping, hostile placements, restoring.

use bus::{Bus, BusDevice};

use super::*;

const WINDOW: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;

struct Machine {
    mmio: Arc<Bus>,
    root: Arc<RootBus>,
    ports: Arc<ConfigPorts>,
    functions: Vec<Arc<Function>>,
}

/// Functions in slots 4, 5, ...
fn machine(functions: usize) -> Machine {
    let mmio = Arc::new(Bus::new());
    let root = RootBus::new(mmio.clone(), vec![WINDOW]);
    let functions: Vec<_> = (0..functions).map(|_| Function::new(1).0).collect();
    for (slot, function) in (4..).zip(&functions) {
        root.insert(slot, function.clone()).unwrap();
    }
    mmio.insert(0xe000_0000, 0x1000_0000, root.ecam()).unwrap();
    Machine { ports: root.config_ports(), mmio, root, functions }
}

impl Machine {
    fn select(&self, address: u32) {
        self.ports.write(0, &address.to_le_bytes());
    }

    fn port_read32(&self) -> u32 {
        let mut data = [0; 4];
        self.ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    fn ecam(slot: u64, register: u64) -> u64 {
        0xe000_0000 + slot * 8 * 4096 + register
    }

    fn place(&self, slot: u64, address: u32) {
        self.mmio.write(Self::ecam(slot, 0x10), &u64::from(address).to_le_bytes());
        self.mmio.write(Self::ecam(slot, 0x04), &[2, 0]);
    }

    /// Whether slot 4 + `index`'s registers answer at `address`.
    fn answers(&self, index: usize, address: u64) -> bool {
        *self.functions[index].registers.lock().unwrap() = [index as u8 + 1; 16];
        let mut data = [0; 4];
        self.mmio.read(address, &mut data) && data == [index as u8 + 1; 4]
    }
}

#[test]
fn the_ports_reach_every_byte_of_a_function() {
    let machine = machine(1);
    machine.select(0x8000_0000);
    assert_eq!(machine.port_read32(), 0x0008_1b36, "host bridge");
    machine.select(0x8000_2000);
    assert_eq!(machine.port_read32(), 0x0010_1b36);
    let mut half = [0; 2];
    machine.ports.read(6, &mut half);
    assert_eq!(half, [0x10, 0x00]);
    machine.ports.read(5, &mut half);
    assert_eq!(half, [0x1b, 0x10], "unaligned");
    machine.select(0x8000_203c);
    machine.ports.write(4, &[10]);
    assert_eq!(machine.port_read32(), 10);
    let mut register = [0; 4];
    machine.ports.read(0, &mut register);
    assert_eq!(u32::from_le_bytes(register), 0x8000_203c);
}

#[test]
fn the_address_port_is_a_register_for_four_bytes_only() {
    let machine = machine(1);
    machine.select(0xffff_ffff);
    assert_eq!(machine.root.save().config_address, 0x80ff_fffc, "reserved bits read 0");
    machine.select(0x8000_2000);
    machine.ports.write(0, &[1, 2]);
    machine.ports.write(1, &[6]);
    machine.ports.write(1, &[6; 4]);
    let mut byte = [0];
    machine.ports.read(1, &mut byte);
    assert_eq!(byte, [0xff]);
    assert_eq!(machine.root.save().config_address, 0x8000_2000);
    for nothing in [0x0000_2000, 0x8001_2000, 0x8000_2100, 0x8000_f800] {
        machine.select(nothing);
        assert_eq!(machine.port_read32(), u32::MAX, "{nothing:#x}");
        machine.ports.write(4, &[0; 4]);
    }
}

#[test]
fn the_ecam_reaches_functions_and_nothing_else() {
    let machine = machine(1);
    let mut data = [0; 8];
    machine.mmio.read(Machine::ecam(4, 0), &mut data);
    assert_eq!(u64::from_le_bytes(data), 0x0010_0000_0010_1b36);
    for nothing in
        [Machine::ecam(3, 0), Machine::ecam(4, 0x1000), Machine::ecam(4, 0xffd), 0xe010_0000, 0xefff_fff8]
    {
        machine.mmio.read(nothing, &mut data);
        assert_eq!(data, [0xff; 8], "{nothing:#x}");
        machine.mmio.write(nothing, &[0xff; 8]);
    }
    assert_eq!(machine.functions[0].read32(0x04), 0x0010_0000);
}

#[test]
fn assigned_bars_are_aligned_apart_and_off_until_the_guest_decodes_them() {
    let machine = machine(3);
    machine.root.assign_bars(WINDOW.start + 0x1000, 0x10_0000).unwrap();
    let addresses: Vec<_> = machine.functions.iter().map(|function| function.bars()[0].address).collect();
    assert_eq!(addresses, [0xc000_4000, 0xc000_8000, 0xc000_c000]);
    assert!(!machine.answers(1, 0xc000_8000));
    machine.mmio.write(Machine::ecam(5, 0x04), &[2, 0]);
    assert!(machine.answers(1, 0xc000_8000));
    assert!(!machine.answers(0, 0xc000_4000));
    machine.mmio.write(Machine::ecam(5, 0x04), &[0, 0]);
    assert!(!machine.answers(1, 0xc000_8000));
    let error = machine.root.assign_bars(WINDOW.start, 0x8000).unwrap_err();
    assert!(matches!(error, Error::WindowFull { slot: 6, bar: 0, .. }), "{error}");
    assert!(machine.root.assign_bars(u64::MAX - 0x5000, u64::MAX).is_err());
}

#[test]
fn a_bar_follows_the_guest() {
    let machine = machine(1);
    machine.place(4, 0xc000_0000);
    assert!(machine.answers(0, 0xc000_0000));
    machine.mmio.write(0xc000_0004, &[7]);
    assert_eq!(machine.functions[0].registers.lock().unwrap()[4], 7);
    machine.place(4, 0xd000_0000);
    assert!(machine.answers(0, 0xd000_0000));
    assert!(!machine.answers(0, 0xc000_0000));
    // D3hot (the power management capability is at 0x4c).
    machine.mmio.write(Machine::ecam(4, 0x50), &[3]);
    assert!(!machine.answers(0, 0xd000_0000));
    machine.mmio.write(Machine::ecam(4, 0x50), &[0]);
    assert!(machine.answers(0, 0xd000_0000));
}

#[test]
fn a_bar_over_something_else_stays_unmapped_until_it_can_be_mapped() {
    let machine = machine(2);
    let other = Function::new(1).0;
    struct Flat(Arc<Function>);
    impl BusDevice for Flat {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.bar_read(0, offset, data);
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }
    machine.mmio.insert(0xc100_0000, 0x1000, Arc::new(Flat(other))).unwrap();
    machine.place(4, 0xc000_0000);
    machine.place(5, 0xc000_0000);
    assert!(machine.answers(0, 0xc000_0000), "the first keeps it");
    machine.place(5, 0xc100_0000);
    assert!(!machine.answers(1, 0xc100_0000), "the machine's device keeps it");
    for outside in [0, 0xb000_0000, 0xbfff_c000, 0xe000_0000, 0xdfff_c000 + 0x4000, 0xffff_c000] {
        machine.place(5, outside);
        assert!(!machine.answers(1, u64::from(outside)), "{outside:#x}");
    }
    machine.mmio.write(Machine::ecam(5, 0x10), &[0xff; 8]);
    assert!(!machine.answers(1, 0xffff_ffff_ffff_c000));
    let mut id = [0; 4];
    machine.mmio.read(Machine::ecam(5, 0), &mut id);
    assert_eq!(id, [0x36, 0x1b, 0x10, 0x00], "configuration space still answers");
    machine.place(5, 0xc000_0000);
    machine.place(4, 0xc200_0000);
    assert!(machine.answers(1, 0xc000_0000), "the place became free");
    assert!(machine.answers(0, 0xc200_0000));
}

#[test]
fn slots_are_taken_once() {
    let machine = machine(1);
    for slot in [0, 4, 32, 255] {
        let error = machine.root.insert(slot, Function::new(1).0).unwrap_err();
        assert!(matches!(error, Error::BadSlot { slot: at, .. } if at == slot), "{error}");
    }
}

#[test]
fn a_restored_machine_answers_where_the_saved_one_did() {
    let source = machine(2);
    source.place(4, 0xc000_0000);
    source.place(5, 0xd000_0000);
    source.select(0x8000_2810);
    let root = vmstate::to_bytes(&source.root.save());
    let root = vmstate::from_bytes::<RootBusState>(&root, 1).unwrap();
    let target = machine(2);
    target.root.assign_bars(WINDOW.start, 0x1000_0000).unwrap();
    for (function, from) in target.functions.iter().zip(&source.functions) {
        function.endpoint.restore(&from.endpoint.save()).unwrap();
    }
    target.root.restore(&root).unwrap();
    assert!(target.answers(0, 0xc000_0000));
    assert!(target.answers(1, 0xd000_0000));
    assert_eq!(target.port_read32(), 0xd000_0004);
    assert_eq!(target.root.save(), source.root.save());
}

#[test]
fn an_impossible_root_bus_state_is_refused() {
    let machine = machine(0);
    let good = machine.root.save();
    for value in [1, 2, 1 << 24, 1 << 30] {
        let state = RootBusState { config_address: value, ..good.clone() };
        assert_eq!(machine.root.restore(&state), Err(Error::BadConfigAddress { value }));
    }
    let mut state = good.clone();
    state.config_address = 0x8000_0000;
    state.host_bridge.bytes[0] ^= 1;
    assert!(matches!(machine.root.restore(&state), Err(Error::ConfigMismatch { offset: 0, .. })));
    assert_eq!(machine.root.save(), good);
}
