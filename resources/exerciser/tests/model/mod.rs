//! A machine in memory: ports, a PCI function, and an NVMe controller that works whenever the time is asked for.
//!
//! It does only what the exerciser needs, by the shortest way; it is no reference for anything.

use std::cell::RefCell;
use std::collections::VecDeque;

use exerciser::machine::Machine;
use exerciser::mmio::Registers;
use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyController, IdentifyNamespace, cns};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::regs::{self, Aqa, Cap, Cc, Csts};
use nvme_spec::{CompletionEntry, Status, SubmissionEntry, feature};

/// What goes wrong, once, at about the two hundredth I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// A bit of what a read returns.
    FlipBit,
    /// A write is acknowledged and not done.
    LoseWrite,
    /// The same with Write Zeroes.
    LoseZeroes,
    /// A read that transfers nothing.
    NoData,
    /// A read of the block after.
    OtherBlock,
    /// A command fails.
    Status,
    LoseCompletion,
    /// A command completes twice.
    Twice,
    /// A completion has a wrong submission queue head.
    Head,
    LoseInterrupt,
    /// An Asynchronous Event Request is forgotten.
    LoseEvent,
    /// The time stamp counter goes back.
    Time,
    /// No fault: the machine is stopped for a hundred seconds, with commands not yet fetched.
    Pause,
}

const FAULT_AT: u64 = 200;
const TSC_KHZ: u64 = 1_000_000;
const TSC_STEP: u64 = 20_000;
/// A hundred seconds.
const PAUSE: u64 = TSC_KHZ * 100_000;
const BAR_BYTES: usize = 0x4000;
const MSIX_TABLE: usize = 0x2000;
const MSIX_ENTRIES: usize = 4;
const BLOCK_BYTES: usize = 512;
const BLOCKS: usize = 4096;
/// Two namespaces, with holes around them.
const NAMESPACES: [u32; 2] = [2, 9];
const EVENT_LIMIT: usize = 4;

#[derive(Default, Clone, Copy)]
struct Ring {
    submissions: u64,
    completions: u64,
    entries: u32,
    head: u32,
    posted: u64,
    vector: Option<usize>,
}

struct State {
    fault: Fault,
    bar: Box<[u64]>,
    apic: Box<[u64]>,
    config: [u32; 64],
    config_address: u32,
    rings: Vec<Ring>,
    disks: Vec<Vec<u8>>,
    events: Vec<u16>,
    /// Host addresses of the shadow doorbells and event indexes.
    shadow: Option<(u64, u64)>,
    log_page_unread: bool,
    interrupts: [u64; 256],
    tsc: u64,
    /// Looks at the time until the controller works again.
    late: u32,
    io_commands: u64,
    output: Vec<u8>,
    keys: VecDeque<u8>,
    off: bool,
}

/// The machine.
pub struct Model {
    state: RefCell<State>,
}

impl Model {
    pub fn new(fault: Fault) -> Self {
        let mut bar = vec![0u64; BAR_BYTES / 8].into_boxed_slice();
        bar[0] = Cap::default().with_mqes(1023).with_to(1).with_css(1).0;
        let mut config = [0; 64];
        config[0] = 0x0010_1b36;
        config[1] = 1 << 20;
        config[2] = 0x0108_0200;
        config[4] = 4;
        config[13] = 0x40;
        config[16] = 0x11 | (MSIX_ENTRIES as u32 - 1) << 16;
        config[17] = MSIX_TABLE as u32;
        let state = State {
            fault,
            bar,
            apic: vec![0; 512].into_boxed_slice(),
            config,
            config_address: 0,
            rings: vec![Ring::default(); 65],
            disks: vec![vec![0; BLOCKS * BLOCK_BYTES]; NAMESPACES.len()],
            events: Vec::new(),
            shadow: None,
            log_page_unread: false,
            interrupts: [0; 256],
            tsc: 1 << 40,
            late: 0,
            io_commands: 0,
            output: Vec::new(),
            keys: VecDeque::new(),
            off: false,
        };
        Self { state: RefCell::new(state) }
    }

    pub fn output(&self) -> String {
        String::from_utf8(self.state.borrow().output.clone()).expect("the exerciser prints ASCII")
    }

    pub fn is_off(&self) -> bool {
        self.state.borrow().off
    }

    pub fn type_key(&mut self, key: u8) {
        self.state.get_mut().keys.push_back(key);
    }
}

impl Machine for Model {
    fn read_port8(&mut self, port: u16) -> u8 {
        let state = self.state.get_mut();
        match port {
            0x3fd => u8::from(!state.keys.is_empty()),
            0x3f8 => state.keys.pop_front().unwrap_or(0),
            _ => 0xff,
        }
    }

    fn write_port8(&mut self, _port: u16, _value: u8) {}

    fn write_port16(&mut self, port: u16, _value: u16) {
        self.state.get_mut().off |= port == 0x604;
    }

    fn read_port32(&mut self, _port: u16) -> u32 {
        let state = self.state.get_mut();
        match state.config_address & 0xffff00 {
            0x1800 => state.config[(state.config_address & 0xff) as usize / 4],
            _ => u32::MAX,
        }
    }

    fn write_port32(&mut self, port: u16, value: u32) {
        let state = self.state.get_mut();
        if port == 0xcf8 {
            state.config_address = value;
        } else if state.config_address & 0xffff00 == 0x1800 {
            let register = (state.config_address & 0xff) as usize / 4;
            state.config[register] = match register {
                1 => value & 0xffff | 1 << 20,
                4 => value & !(BAR_BYTES as u32 - 1) | 4,
                _ => value,
            };
        }
    }

    fn write_string(&mut self, _port: u16, bytes: &[u8]) {
        self.state.get_mut().output.extend(bytes);
    }

    fn tsc(&self) -> u64 {
        let mut state = self.state.borrow_mut();
        if state.has_unfetched() && state.strikes(Fault::Pause) {
            state.tsc += PAUSE;
            state.late = 5;
        }
        match state.late.checked_sub(1) {
            Some(left) => state.late = left,
            None => state.work(),
        }
        state.tsc += TSC_STEP;
        if state.fault == Fault::Time && state.io_commands > FAULT_AT {
            state.fault = Fault::None;
            state.tsc -= 1 << 30;
        }
        state.tsc
    }

    fn cpuid(&mut self, leaf: u32, _subleaf: u32) -> [u32; 4] {
        match leaf {
            0 => [0x15, 0, 0, 0],
            0x15 => [1, 1, TSC_KHZ as u32 * 1000, 0],
            _ => [0; 4],
        }
    }

    fn user_cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [leaf, subleaf, 3, 0]
    }

    fn write_msr(&mut self, register: u32, value: u64) {
        panic!("no register {register:#x} for {value:#x}");
    }

    fn interrupts(&self, vector: u8) -> u64 {
        self.state.borrow().interrupts[usize::from(vector)]
    }

    fn interrupt_total(&self) -> u64 {
        self.state.borrow().interrupts.iter().sum()
    }

    fn halt(&mut self, _seen: u64) {}

    fn registers(&mut self, address: u64, length_bytes: usize) -> Option<Registers> {
        let state = self.state.get_mut();
        let bar = u64::from(state.config[4] & !0xf);
        let base = match address.checked_sub(bar) {
            Some(offset) if offset < BAR_BYTES as u64 => state.bar.as_mut_ptr() as usize + offset as usize,
            _ if address == 0xfee0_0000 => state.apic.as_mut_ptr() as usize,
            _ => return None,
        };
        // SAFETY: both blocks live as long as the model, which outlives the run.
        Some(unsafe { Registers::new(base, length_bytes) })
    }
}

/// Memory that the driver allocated.
fn memory<'a>(address: u64, length: usize) -> &'a mut [u8] {
    // SAFETY: the driver passes addresses of its own buffers, and holds no slice of them while a command runs.
    unsafe { std::slice::from_raw_parts_mut(address as *mut u8, length) }
}

/// The pieces of memory that PRP entries name.
fn pieces(entry: &SubmissionEntry, length: usize) -> Vec<(u64, usize)> {
    let offset = entry.prp1 as usize % 4096;
    let pages = (offset + length).div_ceil(4096);
    let page = |index: usize| match (index, pages) {
        (0, _) => entry.prp1,
        (_, 2) => entry.prp2,
        _ => {
            let place = memory(entry.prp2 + 8 * (index as u64 - 1), 8);
            u64::from_le_bytes(place.try_into().expect("eight bytes"))
        }
    };
    let mut left = length;
    let mut piece = |index| {
        let bytes = left.min(if index == 0 { 4096 - offset } else { 4096 });
        left -= bytes;
        (page(index), bytes)
    };
    (0..pages).map(&mut piece).collect()
}

impl State {
    fn register(&self, offset: u64) -> u32 {
        let quad = self.bar[offset as usize / 8];
        if offset & 4 == 0 { quad as u32 } else { (quad >> 32) as u32 }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        let quad = &mut self.bar[offset as usize / 8];
        *quad = if offset & 4 == 0 {
            *quad & !0xffff_ffff | u64::from(value)
        } else {
            *quad & 0xffff_ffff | u64::from(value) << 32
        };
    }

    /// Whether the fault happens now.
    fn strikes(&mut self, fault: Fault) -> bool {
        let now = self.fault == fault && self.io_commands > FAULT_AT;
        if now {
            self.fault = Fault::None;
        }
        now
    }

    fn work(&mut self) {
        let cc = Cc(self.register(regs::CC));
        let ready = Csts(self.register(regs::CSTS)).rdy();
        if cc.en() != ready {
            let sizes = Aqa(self.register(regs::AQA));
            self.rings[0] = Ring {
                submissions: self.bar[regs::ASQ as usize / 8],
                completions: self.bar[regs::ACQ as usize / 8],
                entries: sizes.asqs() + 1,
                ..Ring::default()
            };
        }
        let shut_down = if cc.shn() == 0 { 0 } else { regs::SHST_COMPLETE };
        self.set_register(regs::CSTS, Csts::default().with_rdy(cc.en()).with_shst(shut_down).0);
        for queue in 0..self.rings.len() {
            let tail = self.tail(queue);
            if self.rings[queue].entries == 0 {
                if tail != 0 && !self.log_page_unread && !self.events.is_empty() {
                    self.set_register(regs::sq_tail_doorbell(queue as u16), 0);
                    let lost = self.fault == Fault::LoseEvent && self.events.len() == 1;
                    let cid = self.events.remove(0);
                    if !lost {
                        self.log_page_unread = true;
                        self.post(0, cid, Event::INVALID_DOORBELL_REGISTER.to_dword(), Status::SUCCESS);
                    }
                }
                continue;
            }
            while self.rings[queue].head != tail {
                let ring = self.rings[queue];
                let bytes = memory(ring.submissions + 64 * u64::from(ring.head), 64);
                let entry = SubmissionEntry::from_bytes((&*bytes).try_into().expect("64 bytes"));
                self.rings[queue].head = (ring.head + 1) % ring.entries;
                if queue == 0 { self.administrate(&entry) } else { self.transfer(queue, &entry) }
            }
        }
    }

    /// Whether a command of an I/O queue waits to be fetched.
    fn has_unfetched(&self) -> bool {
        (1..self.rings.len())
            .any(|queue| self.rings[queue].entries > 0 && self.rings[queue].head != self.tail(queue))
    }

    fn tail(&self, queue: usize) -> u32 {
        match self.shadow {
            Some((values, events)) if queue > 0 && self.rings[queue].entries > 0 => {
                let value = memory(values + 8 * queue as u64, 4);
                // Far behind: registers are never asked for.
                memory(events + 8 * queue as u64, 4).copy_from_slice(&[0xff, 0x7f, 0, 0]);
                u32::from_le_bytes((&*value).try_into().expect("four bytes"))
            }
            _ => self.register(regs::sq_tail_doorbell(queue as u16)),
        }
    }

    fn post(&mut self, queue: usize, cid: u16, dw0: u32, status: Status) {
        let ring = self.rings[queue];
        let mut entry = CompletionEntry { dw0, sq_id: queue as u16, cid, ..CompletionEntry::default() };
        entry.sq_head = ring.head as u16;
        if queue > 0 && self.strikes(Fault::Head) {
            entry.sq_head = ((ring.head + 3) % ring.entries) as u16;
        }
        let entries = u64::from(ring.entries);
        entry.set_status(status, (ring.posted / entries).is_multiple_of(2));
        memory(ring.completions + 16 * (ring.posted % entries), 16).copy_from_slice(&entry.to_bytes());
        self.rings[queue].posted += 1;
        if let Some(vector) = ring.vector
            && !self.strikes(Fault::LoseInterrupt)
        {
            let place = (MSIX_TABLE + vector * 16) as u64;
            if self.register(place + 12) & 1 == 0 {
                self.interrupts[self.register(place + 8) as usize & 0xff] += 1;
            }
        }
    }

    fn administrate(&mut self, entry: &SubmissionEntry) {
        let page = |bytes: &[u8]| memory(entry.prp1, bytes.len()).copy_from_slice(bytes);
        let mut dw0 = 0;
        match entry.opcode {
            admin::IDENTIFY if entry.cdw10 == u32::from(cns::CONTROLLER) => {
                let identity = IdentifyController {
                    sn: *b"model \"1\"           ",
                    mdts: 5,
                    oacs: 1 << 8,
                    oncs: 1 << 3,
                    aerl: EVENT_LIMIT as u8 - 1,
                    ..IdentifyController::default()
                };
                page(&identity.to_bytes());
            }
            admin::IDENTIFY if entry.cdw10 == u32::from(cns::ACTIVE_NAMESPACES) => {
                let mut list = [0; 4096];
                let active = NAMESPACES.iter().filter(|nsid| **nsid > entry.nsid);
                for (place, nsid) in list.as_chunks_mut::<4>().0.iter_mut().zip(active) {
                    *place = nsid.to_le_bytes();
                }
                page(&list);
            }
            admin::IDENTIFY => {
                let mut namespace = IdentifyNamespace { nsze: BLOCKS as u64, ..IdentifyNamespace::default() };
                namespace.lbaf[0].lba_data_size_log2 = 9;
                page(&namespace.to_bytes());
            }
            admin::SET_FEATURES => {
                assert_eq!(entry.cdw10, u32::from(feature::NUMBER_OF_QUEUES));
                dw0 = entry.cdw11.min(63 << 16 | 63);
            }
            admin::CREATE_CQ => {
                self.rings[(entry.cdw10 & 0xffff) as usize] = Ring {
                    completions: entry.prp1,
                    vector: (entry.cdw11 & 2 != 0).then_some((entry.cdw11 >> 16) as usize),
                    ..Ring::default()
                };
            }
            admin::CREATE_SQ => {
                let ring = &mut self.rings[(entry.cdw10 & 0xffff) as usize];
                ring.submissions = entry.prp1;
                ring.entries = (entry.cdw10 >> 16) + 1;
            }
            admin::DOORBELL_BUFFER_CONFIG => self.shadow = Some((entry.prp1, entry.prp2)),
            admin::GET_LOG_PAGE => self.log_page_unread = false,
            admin::ASYNC_EVENT_REQUEST => return self.events.push(entry.cid),
            other => panic!("opcode {other:#x}"),
        }
        self.post(0, entry.cid, dw0, Status::SUCCESS);
    }

    fn transfer(&mut self, queue: usize, entry: &SubmissionEntry) {
        self.io_commands += 1;
        let mut status = Status::SUCCESS;
        if entry.opcode != nvm::FLUSH {
            let disk = NAMESPACES.iter().position(|nsid| *nsid == entry.nsid).expect("an active namespace");
            let length = ((entry.cdw12 & 0xffff) as usize + 1) * BLOCK_BYTES;
            let mut start = entry.cdw10_64() as usize * BLOCK_BYTES;
            match entry.opcode {
                nvm::READ if self.strikes(Fault::NoData) => {}
                nvm::READ => {
                    if start >= BLOCK_BYTES && self.strikes(Fault::OtherBlock) {
                        start -= BLOCK_BYTES;
                    }
                    for (address, bytes) in pieces(entry, length) {
                        memory(address, bytes).copy_from_slice(&self.disks[disk][start..start + bytes]);
                        start += bytes;
                    }
                    if self.strikes(Fault::FlipBit) {
                        memory(entry.prp1, 8)[7] ^= 4;
                    }
                }
                nvm::WRITE if self.strikes(Fault::LoseWrite) => {}
                nvm::WRITE => {
                    for (address, bytes) in pieces(entry, length) {
                        self.disks[disk][start..start + bytes].copy_from_slice(memory(address, bytes));
                        start += bytes;
                    }
                }
                nvm::WRITE_ZEROES if self.strikes(Fault::LoseZeroes) => {}
                nvm::WRITE_ZEROES => self.disks[disk][start..start + length].fill(0),
                other => panic!("opcode {other:#x}"),
            }
        }
        if self.strikes(Fault::Status) {
            status = Status::WRITE_FAULT;
        }
        if !self.strikes(Fault::LoseCompletion) {
            self.post(queue, entry.cid, 0, status);
        }
        if self.strikes(Fault::Twice) {
            self.post(queue, entry.cid, 0, status);
        }
    }
}
