//! A controller from reset to queues, and its admin commands.

use alloc::vec::Vec;

use nvme_spec::event::Event;
use nvme_spec::identify::{
    IdentifyController, IdentifyNamespace, OACS_DOORBELL_BUFFER_CONFIG, ONCS_WRITE_ZEROES, VWC_PRESENT, cns,
};
use nvme_spec::opcode::{CQ_INTERRUPTS_ENABLED, QUEUE_PHYSICALLY_CONTIGUOUS, admin};
use nvme_spec::regs::{self, Cap, Cc, Csts};
use nvme_spec::{CompletionEntry, SubmissionEntry, feature};

use super::doorbell::{Doorbells, Shadow};
use super::queue::QueuePair;
use crate::clock::Deadline;
use crate::error::{Error, Place};
use crate::machine::Machine;
use crate::memory::{Dma, PAGE_BYTES};
use crate::mmio::Registers;
use crate::options::{self, Options};
use crate::pci::{Function, Msix, Window};

const ADMIN_ENTRIES: u32 = 32;
const ADMIN_TIMEOUT_MILLISECONDS: u64 = 10_000;
/// Command identifiers from here on are Asynchronous Event Requests.
const EVENT_CID: u16 = 0x8000;
/// Interrupt vectors of I/O queues. Queues beyond them share.
const FIRST_VECTOR: u8 = 0x30;
const LAST_VECTOR: u8 = 0xef;

/// Interrupt vectors that are still free.
#[derive(Debug)]
pub struct Vectors {
    next: u8,
}

impl Default for Vectors {
    fn default() -> Self {
        Self { next: FIRST_VECTOR }
    }
}

impl Vectors {
    fn take(&mut self) -> u8 {
        let vector = self.next;
        self.next = if vector == LAST_VECTOR { FIRST_VECTOR } else { vector + 1 };
        vector
    }
}

/// An active namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Namespace identifier.
    pub nsid: u32,
    /// Size in blocks.
    pub blocks: u64,
    /// Size of a block in bytes.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// What a controller says of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// CAP.
    pub capabilities: Cap,
    /// VS.
    pub version: u32,
    /// Identify Controller.
    pub controller: IdentifyController,
    /// I/O queue pairs that it grants.
    pub granted_queues: u32,
}

impl Identity {
    /// Largest transfer in bytes; None without a limit.
    pub fn transfer_limit_bytes(&self) -> Option<u64> {
        let page: u64 = 1 << (12 + self.capabilities.mpsmin());
        match self.controller.mdts {
            0 => None,
            shift => page.checked_shl(shift.into()),
        }
    }

    /// Whether Write Zeroes is there.
    pub fn has_write_zeroes(&self) -> bool {
        self.controller.oncs & ONCS_WRITE_ZEROES != 0
    }

    /// Whether a write may be held in a cache until it is flushed.
    pub fn has_write_cache(&self) -> bool {
        self.controller.vwc & VWC_PRESENT != 0
    }
}

/// A controller with its queues.
#[derive(Debug)]
pub struct Controller {
    /// Number, from 0.
    pub index: usize,
    /// Where it is on the bus.
    pub function: Function,
    /// Address of BAR 0.
    pub bar: u64,
    /// What it says of itself.
    pub identity: Identity,
    /// Active namespaces, by ascending identifier.
    pub namespaces: Vec<Namespace>,
    /// I/O queue pairs, identifiers from 1.
    pub queues: Vec<IoQueue>,
    /// Doorbells of all queues.
    pub doorbells: Doorbells,
    registers: Registers,
    admin: QueuePair,
    scratch: Dma,
    msix: Option<Msix>,
    tsc_khz: u64,
}

/// An I/O queue pair and the interrupt that announces its completions.
#[derive(Debug)]
pub struct IoQueue {
    /// The queues.
    pub pair: QueuePair,
    interrupt: Option<Interrupt>,
}

#[derive(Debug)]
struct Interrupt {
    vector: u8,
    seen: u64,
}

impl IoQueue {
    /// Whether completions may be there: always when polling, else after an interrupt that was not yet seen.
    pub fn is_due(&mut self, machine: &dyn Machine) -> bool {
        let Some(interrupt) = &mut self.interrupt else { return true };
        let arrived = machine.interrupts(interrupt.vector);
        core::mem::replace(&mut interrupt.seen, arrived) != arrived
    }

    /// Arrivals of the queue's interrupt.
    pub fn interrupts(&self, machine: &dyn Machine) -> u64 {
        self.interrupt.as_ref().map_or(0, |interrupt| machine.interrupts(interrupt.vector))
    }
}

impl Controller {
    /// Places, resets and enables the controller, and asks it who it is.
    ///
    /// # Errors
    ///
    /// Whatever it does not do in time or at all.
    pub fn start(
        machine: &mut dyn Machine,
        tsc_khz: u64,
        index: usize,
        function: Function,
        window: &mut Window,
    ) -> Result<Self, Error> {
        let wrong = |reason, value| Error::Controller { controller: index, reason, value };
        let (bar, size_bytes) =
            function.place_bar(machine, 0, window).ok_or(wrong("BAR 0 cannot be placed", 0))?;
        function.enable(machine);
        let registers =
            machine.registers(bar, size_bytes as usize).ok_or(wrong("BAR 0 is out of reach", bar))?;
        if size_bytes < regs::DOORBELLS + 8 {
            return Err(wrong("BAR 0 is too small", size_bytes));
        }
        let capabilities = Cap(registers.read64(regs::CAP as usize));
        if capabilities.mpsmin() != 0 {
            return Err(wrong("4 KiB memory pages are not supported", capabilities.0));
        }
        let admin = QueuePair::new(Place { controller: index, queue: 0 }, ADMIN_ENTRIES);

        let ready = |machine: &dyn Machine, wanted: u32, reason| {
            let deadline = Deadline::new(machine, tsc_khz, 500 * (capabilities.to() + 1));
            loop {
                let status = Csts(registers.read32(regs::CSTS as usize));
                if status.rdy() == wanted {
                    return Ok(());
                }
                if deadline.is_over(machine) || (wanted == 1 && status.cfs() == 1) {
                    return Err(wrong(reason, status.0.into()));
                }
            }
        };
        registers.write32(regs::CC as usize, 0);
        ready(machine, 0, "not disabled in time")?;
        let (submissions, completions) = admin.addresses();
        let sizes = regs::Aqa::default().with_asqs(ADMIN_ENTRIES - 1).with_acqs(ADMIN_ENTRIES - 1);
        registers.write32(regs::AQA as usize, sizes.0);
        registers.write64(regs::ASQ as usize, submissions);
        registers.write64(regs::ACQ as usize, completions);
        registers.write32(regs::CC as usize, Cc::default().with_iosqes(6).with_iocqes(4).with_en(1).0);
        ready(machine, 1, "not enabled in time")?;

        let mut controller = Self {
            index,
            function,
            bar,
            identity: Identity {
                capabilities,
                version: registers.read32(regs::VS as usize),
                controller: IdentifyController::default(),
                granted_queues: 0,
            },
            namespaces: Vec::new(),
            queues: Vec::new(),
            doorbells: Doorbells::new(registers, capabilities.dstrd()),
            registers,
            admin,
            scratch: Dma::new(PAGE_BYTES),
            msix: None,
            tsc_khz,
        };
        controller.identity.controller =
            IdentifyController::from_bytes(controller.identify(machine, cns::CONTROLLER, 0)?);
        controller.find_namespaces(machine)?;
        Ok(controller)
    }

    /// Creates the I/O queues as the options say.
    ///
    /// # Errors
    ///
    /// What the options ask for and the controller does not have, or a command that failed.
    pub fn create_queues(
        &mut self,
        machine: &mut dyn Machine,
        options: &Options,
        window: &mut Window,
        vectors: &mut Vectors,
    ) -> Result<(), Error> {
        let wanted = u32::from(options.queues);
        let request = SubmissionEntry {
            opcode: admin::SET_FEATURES,
            cdw10: feature::NUMBER_OF_QUEUES.into(),
            cdw11: (wanted - 1) << 16 | (wanted - 1),
            ..SubmissionEntry::default()
        };
        let granted = self.command(machine, request)?.dw0;
        self.identity.granted_queues = (granted & 0xffff).min(granted >> 16) + 1;
        if self.identity.granted_queues < wanted {
            return Err(self.wrong("grants fewer queues than asked for", self.identity.granted_queues.into()));
        }
        if !self.doorbells.reach(options.queues) {
            return Err(self.wrong("BAR 0 has no doorbells for that many queues", wanted.into()));
        }
        if u64::from(options.depth) > self.identity.capabilities.mqes() + 1 {
            return Err(self.wrong("queues cannot be that deep", self.identity.capabilities.mqes() + 1));
        }
        if options.notice == options::Notice::Msix {
            self.msix = Msix::enable(machine, self.function, window);
            if self.msix.is_none() {
                return Err(self.wrong("no MSI-X table within reach", 0));
            }
        }
        if options.doorbells == options::Doorbells::Shadow {
            self.use_shadow_doorbells(machine)?;
        }
        for queue in 1..=options.queues {
            self.create_queue(machine, queue, options.depth, vectors)?;
        }
        Ok(())
    }

    fn use_shadow_doorbells(&mut self, machine: &mut dyn Machine) -> Result<(), Error> {
        if self.identity.controller.oacs & OACS_DOORBELL_BUFFER_CONFIG == 0 {
            return Err(self.wrong("no Doorbell Buffer Config", self.identity.controller.oacs.into()));
        }
        let shadow = Shadow::default();
        let (prp1, prp2) = shadow.addresses();
        let entry = SubmissionEntry {
            opcode: admin::DOORBELL_BUFFER_CONFIG,
            prp1,
            prp2,
            ..SubmissionEntry::default()
        };
        self.command(machine, entry)?;
        self.doorbells.use_shadow(shadow);
        Ok(())
    }

    fn create_queue(
        &mut self,
        machine: &mut dyn Machine,
        queue: u16,
        entries: u32,
        vectors: &mut Vectors,
    ) -> Result<(), Error> {
        let pair = QueuePair::new(Place { controller: self.index, queue }, entries);
        let (submissions, completions) = pair.addresses();
        let mut interrupt = None;
        let mut flags = QUEUE_PHYSICALLY_CONTIGUOUS;
        if let Some(msix) = &self.msix {
            // Entry 0 is the admin queue's, which is polled. With one entry in all, it has to do.
            let entry = if msix.entries == 1 { 0 } else { 1 + (queue - 1) % (msix.entries - 1) };
            let vector = vectors.take();
            msix.route(entry, machine.apic_id(), vector);
            flags |= CQ_INTERRUPTS_ENABLED | u32::from(entry) << 16;
            interrupt = Some(Interrupt { vector, seen: machine.interrupts(vector) });
        }
        let size = (entries - 1) << 16 | u32::from(queue);
        let completion_queue = SubmissionEntry {
            opcode: admin::CREATE_CQ,
            prp1: completions,
            cdw10: size,
            cdw11: flags,
            ..SubmissionEntry::default()
        };
        self.command(machine, completion_queue)?;
        let submission_queue = SubmissionEntry {
            opcode: admin::CREATE_SQ,
            prp1: submissions,
            cdw10: size,
            cdw11: u32::from(queue) << 16 | QUEUE_PHYSICALLY_CONTIGUOUS,
            ..SubmissionEntry::default()
        };
        self.command(machine, submission_queue)?;
        self.queues.push(IoQueue { pair, interrupt });
        Ok(())
    }

    fn find_namespaces(&mut self, machine: &mut dyn Machine) -> Result<(), Error> {
        let mut active = Vec::new();
        loop {
            let after = active.last().copied().unwrap_or(0);
            let list = self.identify(machine, cns::ACTIVE_NAMESPACES, after)?;
            let entries = list.as_chunks::<4>().0;
            let found: Vec<u32> = entries
                .iter()
                .map(|entry| u32::from_le_bytes(*entry))
                .take_while(|nsid| *nsid != 0)
                .collect();
            let full = found.len() == entries.len();
            for nsid in found {
                // Base 5.17.2.3: identifiers greater than the one given, in increasing order.
                if active.last().is_some_and(|last| *last >= nsid) || nsid <= after {
                    return Err(self.wrong("the active namespace list is not in order", nsid.into()));
                }
                active.push(nsid);
            }
            if !full {
                break;
            }
        }
        for nsid in active {
            let data = IdentifyNamespace::from_bytes(self.identify(machine, cns::NAMESPACE, nsid)?);
            // NVM figure 97: bits 6:5 are the upper half of the format's number.
            let format = usize::from(data.flbas & 0xf | data.flbas >> 1 & 0x30);
            let format = data.lbaf[format];
            if data.nsze == 0 || !(9..=16).contains(&format.lba_data_size_log2) || format.metadata_bytes != 0
            {
                return Err(
                    self.wrong("a namespace has no size or a format that is not supported", nsid.into())
                );
            }
            self.namespaces.push(Namespace {
                nsid,
                blocks: data.nsze,
                block_bytes: 1 << format.lba_data_size_log2,
                read_only: data.nsattr & nvme_spec::identify::NSATTR_WRITE_PROTECTED != 0,
            });
        }
        Ok(())
    }

    fn identify(
        &mut self,
        machine: &mut dyn Machine,
        cns: u8,
        nsid: u32,
    ) -> Result<&[u8; PAGE_BYTES], Error> {
        let entry = SubmissionEntry {
            opcode: admin::IDENTIFY,
            nsid,
            prp1: self.scratch.address(),
            cdw10: cns.into(),
            ..SubmissionEntry::default()
        };
        self.command(machine, entry)?;
        Ok(self.scratch.bytes().first_chunk().expect("the scratch buffer is a page"))
    }

    /// Runs one admin command.
    ///
    /// # Errors
    ///
    /// When it fails or does not complete in time.
    pub fn command(
        &mut self,
        machine: &mut dyn Machine,
        entry: SubmissionEntry,
    ) -> Result<CompletionEntry, Error> {
        self.admin.push(&entry);
        self.admin.ring(&mut self.doorbells);
        let deadline = Deadline::new(machine, self.tsc_khz, ADMIN_TIMEOUT_MILLISECONDS);
        loop {
            match self.admin.pop()? {
                Some(completion) if completion.cid >= EVENT_CID => {
                    return Err(self.wrong("an event that nothing caused", completion.dw0.into()));
                }
                Some(completion) => {
                    self.admin.ring(&mut self.doorbells);
                    return if completion.status().is_success() {
                        Ok(completion)
                    } else {
                        Err(Error::Status {
                            place: self.admin.place(),
                            opcode: entry.opcode,
                            nsid: entry.nsid,
                            block: entry.cdw10_64(),
                            status: completion.status(),
                        })
                    };
                }
                None if deadline.is_over(machine) => return Err(self.admin.stalled(0)),
                None => {}
            }
        }
    }

    /// Parks `count` Asynchronous Event Requests with the controller.
    ///
    /// # Errors
    ///
    /// When it takes fewer.
    pub fn park_events(&mut self, count: u16) -> Result<(), Error> {
        let most = u16::from(self.identity.controller.aerl) + 1;
        if count > most {
            return Err(self.wrong("takes fewer Asynchronous Event Requests", most.into()));
        }
        for number in 0..count {
            self.admin.push(&SubmissionEntry {
                opcode: admin::ASYNC_EVENT_REQUEST,
                cid: EVENT_CID + number,
                ..SubmissionEntry::default()
            });
        }
        self.admin.ring(&mut self.doorbells);
        Ok(())
    }

    /// Shows that every parked request is still there: rings the doorbell of a queue that does not exist, expects
    /// the event (Base 5.2.1), and reads the log that lets the next one come.
    ///
    /// # Errors
    ///
    /// An event that does not come, or another one.
    pub fn redeem_events(&mut self, machine: &mut dyn Machine) -> Result<(), Error> {
        let absent = self.queues.len() as u16 + 1;
        if self.admin.outstanding() > 0 && !self.doorbells.reach(absent) {
            return Err(self.wrong("BAR 0 has no doorbell of a queue that does not exist", absent.into()));
        }
        while self.admin.outstanding() > 0 {
            self.doorbells.ring_register(absent, 1);
            let deadline = Deadline::new(machine, self.tsc_khz, ADMIN_TIMEOUT_MILLISECONDS);
            let completion = loop {
                if let Some(completion) = self.admin.pop()? {
                    break completion;
                }
                if deadline.is_over(machine) {
                    return Err(self.admin.stalled(0));
                }
            };
            self.admin.ring(&mut self.doorbells);
            if completion.cid < EVENT_CID || completion.dw0 != Event::INVALID_DOORBELL_REGISTER.to_dword() {
                return Err(self.wrong("another event than the one that was caused", completion.dw0.into()));
            }
            let log = SubmissionEntry {
                opcode: admin::GET_LOG_PAGE,
                nsid: nvme_spec::NSID_BROADCAST,
                prp1: self.scratch.address(),
                cdw10: (64 / 4 - 1) << 16 | u32::from(Event::INVALID_DOORBELL_REGISTER.log_page),
                ..SubmissionEntry::default()
            };
            self.command(machine, log)?;
        }
        Ok(())
    }

    fn wrong(&self, reason: &'static str, value: u64) -> Error {
        Error::Controller { controller: self.index, reason, value }
    }

    /// Looks for events while none should come.
    ///
    /// # Errors
    ///
    /// The event.
    pub fn look_for_events(&mut self) -> Result<(), Error> {
        match self.admin.pop()? {
            Some(completion) => Err(self.wrong("an event that nothing caused", completion.dw0.into())),
            None => Ok(()),
        }
    }

    /// Shuts the controller down as before power goes (Base 3.6.1).
    ///
    /// # Errors
    ///
    /// When it does not say in time that it is done.
    pub fn shut_down(&mut self, machine: &mut dyn Machine) -> Result<(), Error> {
        let configuration = Cc(self.registers.read32(regs::CC as usize));
        self.registers.write32(regs::CC as usize, configuration.with_shn(regs::SHN_NORMAL).0);
        let deadline = Deadline::new(machine, self.tsc_khz, ADMIN_TIMEOUT_MILLISECONDS);
        loop {
            let status = Csts(self.registers.read32(regs::CSTS as usize));
            if status.shst() == regs::SHST_COMPLETE {
                return Ok(());
            }
            if deadline.is_over(machine) {
                return Err(self.wrong("not shut down in time", status.0.into()));
            }
        }
    }
}
