//! The steps that an input lists.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::{Failure, Fault as ImageFault, Target};
use nvme_spec::opcode::admin;
use nvme_spec::{SubmissionEntry, regs};
use pci::PciFunction;
use vm_memory::{Bytes, GuestAddress};

use super::actor::Poke as Write;
use super::entry::{ADMIN_OPCODES, IO_OPCODES, Input};
use super::machine::{BUFFER_BASE, HIDDEN, Machine, REGION_BASE, Shape};

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A write of BAR 0 of 1, 2, 4 or 8 bytes, at a register mostly.
    Register,
    /// A read of any BAR.
    ReadRegister,
    /// A write of the MSI-X table.
    Vector,
    /// A write or read of the configuration space.
    Configuration,
    /// A write of a doorbell.
    Doorbell,
    /// A write of the controller memory buffer.
    Buffer,
    /// A write of the persistent memory region, and its barrier.
    Region,
    /// An admin command of the driver's queue.
    Admin,
    /// An I/O command of the driver's queue.
    Io,
    /// Queues in the arena.
    CreateQueue,
    /// A submission queue entry anywhere in the arena.
    Entry,
    /// A number anywhere in the arena.
    Poke,
    /// A page full of list entries or descriptors.
    List,
    /// A write that the second actor makes at its moment.
    Plan,
    /// Shadow doorbells of the driver's, or in the arena, where anybody may write them.
    Shadow,
    /// The workers run.
    Run,
    /// A worker is polled.
    Poll,
    /// The controller is saved, and another loads it.
    Move,
    /// The driver begins again.
    Enable,
    /// Requests to images fail or are held.
    Fault,
    /// What is held goes on.
    Release,
    /// The host adds, removes or grows a namespace.
    Namespace,
}

/// Plays `bytes` with the mixture of `steps`; with a `seed` another thread writes the arena meanwhile, as it likes.
///
/// # Panics
///
/// If the controller does what it must not ([`super`]).
pub fn play(steps: &[Step], bytes: &[u8], seed: Option<u64>) {
    let mut input = Input(bytes);
    let mut machine = Machine::new(Shape(input.byte()));
    let (memory, done) = (&machine.memory.clone(), &AtomicBool::new(false));
    std::thread::scope(|scope| {
        // It ends whether the input is played to its end or not.
        let _ends = Ends(done);
        if let Some(seed) = seed {
            scope.spawn(move || Machine::harass(memory, seed, done));
        }
        while !input.is_empty() {
            let step = usize::from(input.byte()) % steps.len().max(1);
            if let Some(step) = steps.get(step) {
                machine.step(*step, &mut input);
            }
        }
        machine.finish();
    });
}

/// Says that it is done when it goes.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Machine {
    fn step(&mut self, step: Step, input: &mut Input<'_>) {
        match step {
            Step::Register => self.write_register(input),
            Step::ReadRegister => {
                let bar = [0, 2, 0, 4][usize::from(input.byte() >> 3 & 3)];
                let width = input.byte();
                if let Some((offset, width)) = self.place(bar, input.half().into(), width) {
                    self.controller.bar_read(bar, offset, &mut vec![0; width]);
                }
            }
            Step::Vector => {
                let (offset, value) = (u64::from(input.byte()) * 4, input.dword());
                // Behind the doorbells, on a page of its own.
                self.controller.bar_write(0, 0x2000 + offset % 0x60, &value.to_le_bytes());
            }
            Step::Configuration => self.configure(input),
            Step::Doorbell => {
                let (index, value) = (input.byte(), u32::from(input.half()));
                let index = u64::from(if index < 0xf0 { index % 12 } else { index });
                [0, 1]
                    .into_iter()
                    .filter(|queue| index / 2 == *queue)
                    .for_each(|queue| self.disturb(queue as u16));
                self.ring(regs::DOORBELLS + index * 4, value);
            }
            Step::Buffer => {
                let value = input.address();
                if let Some((offset, _)) = self.place(2, input.half().into(), 8) {
                    self.controller.bar_write(2, offset, &value.to_le_bytes());
                }
            }
            Step::Region => {
                let value = input.address();
                if let Some((offset, _)) = self.place(4, input.half().into(), 8) {
                    self.controller.bar_write(4, offset, &value.to_le_bytes());
                    self.read32(regs::PMRSTS);
                }
            }
            Step::Admin => self.admin(input),
            Step::Io => {
                let entry = input.entry(IO_OPCODES);
                self.reap(1);
                self.push(1, entry);
            }
            Step::CreateQueue => self.create_queue(input),
            Step::Entry => {
                let address = input.address();
                let mut entry =
                    input.entry(if input.0.len().is_multiple_of(2) { IO_OPCODES } else { ADMIN_OPCODES });
                entry.cid = input.half();
                let _outside = self.memory.write_slice(&entry.to_bytes(), GuestAddress(address & !63));
            }
            Step::Poke => {
                let (address, value) = (input.address(), input.second_pointer());
                let _outside = self.memory.write_slice(&value.to_le_bytes(), GuestAddress(address & !7));
            }
            Step::List => {
                let (base, mut value, stride) =
                    (input.address() & !0xfff, input.address(), u64::from(input.half()));
                for offset in (0..4096).step_by(8) {
                    let _outside =
                        self.memory.write_slice(&hide(value).to_le_bytes(), GuestAddress(base + offset));
                    value = value.wrapping_add(stride << 4);
                }
            }
            Step::Plan => {
                let (after, address) = (input.byte() % 16, input.address() & !7);
                self.actor.plan(Write { after, address, value: input.second_pointer() });
            }
            Step::Shadow => self.shadow(input.byte()),
            Step::Run => self.run(),
            Step::Poll => self.poll(input.byte().into()),
            Step::Move => {
                self.change_controllers();
                self.run();
            }
            Step::Enable => self.enable(),
            Step::Fault => {
                let kind = input.byte();
                let target = [Target::Any, Target::Read, Target::Write, Target::Flush][usize::from(kind & 3)];
                let fault = [
                    ImageFault::Hold,
                    ImageFault::Fail(Failure::Io(5)),
                    ImageFault::Fail(Failure::NoSpace),
                    ImageFault::Hold,
                ][usize::from(kind >> 2 & 3)];
                self.keeper.faults.inject(target, u64::from(kind >> 4 & 3), u64::from(kind >> 6), fault);
            }
            Step::Release => {
                self.keeper.faults.release_held();
                self.run();
            }
            Step::Namespace => self.change_namespaces(input.byte()),
        }
    }

    /// A place of 1, 2, 4 or 8 bytes in a BAR, as buses let through.
    fn place(&self, bar: u8, offset: u64, width: u8) -> Option<(u64, usize)> {
        let width = 1 << (width & 3);
        let offset = offset.checked_rem(self.bar_bytes(bar))?;
        (offset + width <= self.bar_bytes(bar)).then_some((offset, width as usize))
    }

    fn write_register(&mut self, input: &mut Input<'_>) {
        const OFFSETS: [u64; 20] = [
            regs::CC,
            regs::CC,
            regs::CSTS,
            regs::NSSR,
            regs::AQA,
            regs::ASQ,
            regs::ASQ + 4,
            regs::ACQ,
            regs::ACQ + 4,
            regs::INTMS,
            regs::INTMC,
            regs::CMBMSC,
            regs::CMBMSC + 4,
            regs::PMRCTL,
            regs::CAP,
            regs::DOORBELLS,
            regs::PMRMSCL,
            regs::PMRMSCL,
            regs::PMRMSCU,
            regs::PMRSTS,
        ];
        const VALUES: [u64; 8] =
            [0x0046_0001, 0, 0x0046_4001, 0x0046_8001, 0x4e56_4d65, 0x001f_001f, 0x8000_0003, 0x0046_0201];
        // For the region: where the driver has it, where the buffer is, over the arena, and nowhere.
        const PLACES: [u64; 8] =
            [REGION_BASE | 2, BUFFER_BASE | 2, 2, 0, 1, REGION_BASE, 0xffff_f002, 1 << 12 | 2];
        let (kind, width) = (input.byte(), input.byte());
        let offset = match OFFSETS.get(usize::from(kind & 0x1f)) {
            Some(offset) => *offset + u64::from(width >> 2 & 7) % 8,
            None => input.half().into(),
        };
        let value = match kind >> 5 {
            0..3 => VALUES[usize::from(width >> 5)],
            3 => PLACES[usize::from(width >> 5)],
            4 | 5 => input.address(),
            _ => u64::from(input.dword()) | u64::from(input.dword()) << 32,
        };
        let Some((offset, width)) = self.place(0, offset, width) else { return };
        // Whether the driver's queues are there afterwards is not known.
        self.is_ready = false;
        (0..2).for_each(|queue| self.disturb(queue));
        self.controller.bar_write(0, offset, &value.to_le_bytes()[..width]);
        self.controller.bars();
    }

    fn configure(&mut self, input: &mut Input<'_>) {
        const OFFSETS: [u16; 8] = [0x04, 0x04, 0x10, 0x14, 0x18, 0x42, 0x64, 0x06];
        let (kind, value) = (input.byte(), input.dword());
        let offset = if kind & 0x80 == 0 { OFFSETS[usize::from(kind & 7)] } else { input.half() % 4092 };
        let width = 1 << (kind >> 4 & 3).min(2);
        if kind & 8 != 0 {
            self.controller.config_read(offset, &mut vec![0; width]);
        }
        // A function that leaves D3hot may have been reset.
        self.is_ready = false;
        (0..2).for_each(|queue| self.disturb(queue));
        self.controller.config_write(offset, &value.to_le_bytes()[..width]);
        assert!(self.controller.bars().len() <= 3);
    }

    fn admin(&mut self, input: &mut Input<'_>) {
        let entry = input.entry(ADMIN_OPCODES);
        if !self.is_ready {
            self.enable();
        }
        self.reap(0);
        // The driver's queue is deleted, made anew elsewhere, or its doorbells are in the arena.
        match entry.opcode {
            admin::DELETE_SQ | admin::DELETE_CQ | admin::CREATE_SQ | admin::CREATE_CQ
                if entry.cdw10 as u16 == 1 =>
            {
                self.disturb(1);
            }
            admin::DOORBELL_BUFFER_CONFIG => self.disturb(1),
            _ => {}
        }
        self.push(0, entry);
    }

    /// A completion queue and a submission queue that uses it, or the driver's.
    fn create_queue(&mut self, input: &mut Input<'_>) {
        if !self.is_ready {
            self.enable();
        }
        let (kind, size) = (input.byte(), u32::from(input.half()));
        let id = 2 + u32::from(kind & 1);
        let cq_id = if kind & 2 == 0 { id } else { 1 };
        let mut create = |opcode, id: u32, prp1, cdw11| {
            let cdw10 = id | (size % 2048) << 16;
            self.reap(0);
            self.push(0, SubmissionEntry { opcode, prp1, cdw10, cdw11, ..SubmissionEntry::default() });
        };
        let contiguous = u32::from(kind & 4 == 0);
        if cq_id == id {
            create(
                admin::CREATE_CQ,
                id,
                input.address() & !0xfff,
                id << 16 | u32::from(kind & 8 == 0) << 1 | contiguous,
            );
        }
        create(
            admin::CREATE_SQ,
            id,
            input.address() & !0xfff,
            cq_id << 16 | u32::from(kind >> 4 & 3) << 1 | contiguous,
        );
        self.run();
    }

    fn shadow(&mut self, kind: u8) {
        if kind & 1 == 0 {
            return self.use_shadows();
        }
        // Aligned to memory pages of any size.
        let page = |number: u8| u64::from(number & 3) << 16;
        let entry = SubmissionEntry {
            opcode: admin::DOORBELL_BUFFER_CONFIG,
            prp1: page(kind >> 1),
            prp2: page(kind >> 3),
            ..SubmissionEntry::default()
        };
        if self.is_ready {
            self.disturb(1);
            self.reap(0);
            self.push(0, entry);
        }
    }

    fn change_namespaces(&mut self, kind: u8) {
        let nsid = [1, 2, 3, 5][usize::from(kind & 3)];
        let subsystem = std::sync::Arc::clone(self.controller.subsystem());
        match kind >> 2 & 3 {
            0 | 1 => {
                let backend = self.keeper.image(64 << 10);
                let config = nvme::NamespaceConfig { nsid, block_bytes: 512, metadata: None, backend };
                if subsystem.add(&config).is_ok() {
                    self.namespaces.insert(nsid, config);
                }
            }
            2 => {
                if subsystem.remove(nsid, Duration::ZERO).is_ok() {
                    self.namespaces.remove(&nsid);
                }
            }
            // Images of these kinds do not grow.
            _ => assert!(subsystem.resize(nsid, None).is_err()),
        }
    }
}

/// No number that holds the upper half of an address that the guest does not know.
fn hide(value: u64) -> u64 {
    if HIDDEN.contains(&(value as u32)) || HIDDEN.contains(&((value >> 32) as u32)) { 0 } else { value }
}
