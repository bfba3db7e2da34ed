//! A controller from reset to queues, and its shutdown.

use alloc::vec::Vec;

use nvme_spec::identify::{IdentifyController, OACS_DOORBELL_BUFFER_CONFIG, cns};
use nvme_spec::opcode::{CQ_INTERRUPTS_ENABLED, QUEUE_PHYSICALLY_CONTIGUOUS, admin};
use nvme_spec::regs::{self, Cap, Cc, Csts};
use nvme_spec::{SubmissionEntry, feature};

use super::doorbell::{Doorbells, Shadow};
use super::identity::{Identity, Namespace};
use super::io_queue::{Interrupt, IoQueue, Vectors};
use super::queue::QueuePair;
use crate::clock::Deadline;
use crate::error::{Error, Place};
use crate::machine::Machine;
use crate::memory::{DeviceMemory, Dma, PAGE_BYTES};
use crate::mmio::Registers;
use crate::options::{self, Home, Options};
use crate::pci::{Function, Msix, Window};

const ADMIN_ENTRIES: u32 = 32;
pub(super) const ADMIN_TIMEOUT_MILLISECONDS: u64 = 10_000;
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
    /// What is left of the controller memory buffer, if it was asked for.
    pub buffer: Option<DeviceMemory>,
    /// What is left of the persistent memory region, if it was asked for.
    pub region: Option<DeviceMemory>,
    pub(super) registers: Registers,
    pub(super) admin: QueuePair,
    pub(super) scratch: Dma,
    msix: Option<Msix>,
    pub(super) tsc_khz: u64,
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
            buffer: None,
            region: None,
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
        if options.queues_in == Home::Buffer || options.data_in == Home::Buffer {
            self.buffer = Some(self.open_buffer(machine, window)?);
        }
        if options.region != options::Region::Off || options.data_in == Home::Region {
            self.region = Some(self.open_region(machine, window)?);
        }
        for queue in 1..=options.queues {
            self.create_queue(machine, queue, options, vectors)?;
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
        options: &Options,
        vectors: &mut Vectors,
    ) -> Result<(), Error> {
        let entries = options.depth;
        let place = Place { controller: self.index, queue };
        let pair = match &mut self.buffer {
            Some(buffer) if options.queues_in == Home::Buffer => {
                let [submissions, completions] =
                    QueuePair::sizes_bytes(entries).map(|bytes| buffer.take_zeroed(bytes));
                let pair = submissions.zip(completions);
                let (submissions, completions) = pair
                    .ok_or(self.wrong("the memory buffer has no room for that many queues", queue.into()))?;
                QueuePair::within(place, entries, submissions, completions)
            }
            _ => QueuePair::new(place, entries),
        };
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

    /// Something that is wrong with the controller.
    pub fn wrong(&self, reason: &'static str, value: u64) -> Error {
        Error::Controller { controller: self.index, reason, value }
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
