//! A machine of vCPUs, RAM and one recording device.

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bus::{Bus, BusDevice};

use crate::kvm::{DirtyTracking, Host, Vm};
use crate::memory::{GuestRam, RAM_LOW, RamBlock};
use crate::vcpu::{BootProtocol, BootRegisters, Buses, Processors, VcpuEvent, VcpuManager};

/// Where code is loaded and entered, in 32-bit protected mode without paging.
pub(crate) const CODE: u32 = 0x1000;
/// Two pages of device memory.
pub(crate) const MMIO: u32 = 0xd000_0000;
/// Ports of the recorder.
const PORTS: u64 = 0x10;
/// Far more than anything here takes; only a failure waits this long.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(30);

/// What the guest did at the recorder: its offset, and the bytes written.
pub(crate) type Write = (u64, Vec<u8>);

/// Sends on what is written. Reads give the values it was told, else the offset in every byte.
struct Recorder {
    writes: Sender<Write>,
    reads: Mutex<Option<Receiver<u32>>>,
}

impl BusDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match &*self.reads.lock().unwrap() {
            Some(values) => {
                self.writes.send((offset, vec![])).unwrap();
                let value = values.recv_timeout(WATCHDOG).unwrap().to_le_bytes();
                data.copy_from_slice(&value[..data.len()]);
            }
            None => data.fill(offset as u8),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The test may be over.
        let _ = self.writes.send((offset, data.to_vec()));
    }
}

pub(crate) struct TestGuest {
    pub(crate) vcpus: VcpuManager,
    pub(crate) vm: Arc<Vm>,
    pub(crate) ram: GuestRam,
    events: Receiver<(u32, VcpuEvent)>,
    ports: Receiver<Write>,
    mmio: Receiver<Write>,
    mmio_device: Arc<Recorder>,
}

impl TestGuest {
    /// `code` runs on the first of `count` vCPUs when they are resumed. There is 1 MiB of RAM, and a namespace of 16 pages.
    pub(crate) fn new(count: u32, code: &[u8]) -> Self {
        Self::with_buffers(count, code, &[])
    }

    /// The same with memory that can be placed.
    pub(crate) fn with_buffers(count: u32, code: &[u8], buffers: &[(String, u64)]) -> Self {
        let host = Host::open().expect("these tests need /dev/kvm");
        let ram = GuestRam::with_buffers(1 << 20, &[("namespace-A-1".into(), 1 << 16)], buffers).unwrap();
        Self::with(&host, Vm::new(&host).unwrap(), ram, count, code)
    }

    /// The same in a virtual machine that finds dirty pages by `tracking`, with this much RAM and rings of `ring_entries`.
    pub(crate) fn tracked(
        tracking: DirtyTracking,
        memory_bytes: u64,
        ring_entries: u32,
        code: &[u8],
    ) -> Self {
        let host = Host::open().expect("these tests need /dev/kvm");
        let ram = GuestRam::new(memory_bytes, &[("namespace-A-1".into(), 1 << 16)]).unwrap();
        let vm = Vm::with_tracking(&host, tracking, Some(ring_entries)).unwrap();
        Self::with(&host, vm, ram, 1, code)
    }

    fn with(host: &Host, vm: Arc<Vm>, ram: GuestRam, count: u32, code: &[u8]) -> Self {
        vm.map_ram(&ram).unwrap();
        let recorder = || {
            let (writes, receiver) = mpsc::channel();
            (Arc::new(Recorder { writes, reads: Mutex::new(None) }), receiver)
        };
        let (port_device, ports) = recorder();
        let (mmio_device, mmio) = recorder();
        let buses = Buses { ports: Arc::new(Bus::new()), mmio: Arc::new(Bus::new()) };
        buses.ports.insert(PORTS, 0x10, port_device).unwrap();
        buses.mmio.insert(MMIO.into(), 0x2000, mmio_device.clone()).unwrap();
        let (event_sender, events) = mpsc::channel();
        let on_event: crate::vcpu::EventHandler = Arc::new(move |vcpu, event| {
            let _ = event_sender.send((vcpu, event));
        });
        let vcpus =
            VcpuManager::new(host, &vm, &Processors { count, ..Default::default() }, &buses, &on_event)
                .unwrap();
        let guest = Self { vcpus, vm, ram, events, ports, mmio, mmio_device };
        guest.low().write(CODE.into(), code).unwrap();
        guest.boot();
        guest
    }

    /// The first vCPU is to enter [`CODE`].
    pub(crate) fn boot(&self) {
        let registers = BootRegisters {
            protocol: BootProtocol::Pvh,
            entry: CODE.into(),
            info: 0x1234,
            stack: 0x8000,
            page_tables: 0,
            gdt_base: 0,
            gdt_limit: 0,
        };
        self.vcpus.boot(registers).unwrap();
    }

    pub(crate) fn low(&self) -> &RamBlock {
        self.ram.block(RAM_LOW).unwrap()
    }

    pub(crate) fn word(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.low().read(address, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    /// The guest's next write to a port, relative to 0x10.
    pub(crate) fn next_port(&self) -> Write {
        self.ports.recv_timeout(WATCHDOG).expect("the guest writes to a port")
    }

    /// The guest's next 4-byte write to port 0x10.
    pub(crate) fn next_value(&self) -> u32 {
        let (offset, data) = self.next_port();
        assert_eq!(offset, 0);
        u32::from_le_bytes(data.try_into().unwrap())
    }

    /// What was written to ports and not looked at yet.
    pub(crate) fn port_backlog(&self) -> Vec<Write> {
        self.ports.try_iter().collect()
    }

    pub(crate) fn next_mmio(&self) -> Write {
        self.mmio.recv_timeout(WATCHDOG).expect("the guest reaches for device memory")
    }

    pub(crate) fn mmio_backlog(&self) -> Vec<Write> {
        self.mmio.try_iter().collect()
    }

    /// From now on reads of device memory are announced by an empty write, and wait for a value.
    pub(crate) fn hold_mmio_reads(&self) -> Sender<u32> {
        let (values, receiver) = mpsc::channel();
        *self.mmio_device.reads.lock().unwrap() = Some(receiver);
        values
    }

    pub(crate) fn next_event(&self) -> (u32, VcpuEvent) {
        self.events.recv_timeout(WATCHDOG).expect("a vCPU reports an event")
    }

    /// Events that nobody has looked at yet.
    pub(crate) fn event_backlog(&self) -> Vec<(u32, VcpuEvent)> {
        self.events.try_iter().collect()
    }

    /// Copies all memory from another guest.
    pub(crate) fn copy_memory(&self, from: &Self) {
        for (into, from) in self.ram.blocks().iter().zip(from.ram.blocks()) {
            let mut data = vec![0; from.length_bytes() as usize];
            from.read(0, &mut data).unwrap();
            into.write(0, &data).unwrap();
        }
    }
}
