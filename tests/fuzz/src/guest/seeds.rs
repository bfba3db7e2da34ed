//! Inputs to begin with: what drivers do, in the encoding of the steps, and steps in random order.

use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{feature, log};

use super::entry::{ADMIN_OPCODES, IO_OPCODES};
use super::play::Step::{self, *};
use super::{ADMIN, COMMANDS, QUEUES, REGISTERS};
use crate::mutate::Random;

/// Inputs of steps in random order for each target, and steps of each.
const SEEDS: u64 = 12;
const STEPS: usize = 40;

/// An input for a mixture of steps.
struct Writer<'a> {
    steps: &'a [Step],
    out: Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(steps: &'a [Step], shape: u8) -> Self {
        Writer { steps, out: vec![shape] }
    }

    /// A step that the mixture has; others are left out.
    fn step(&mut self, step: Step, arguments: &[u8]) -> &mut Self {
        if let Some(index) = self.steps.iter().position(|known| *known == step) {
            self.out.push(index as u8);
            self.out.extend(arguments);
        }
        self
    }

    /// A command with data at `page` of the arena, and CDW10 to CDW15 as they are.
    fn command(
        &mut self,
        step: Step,
        opcode: u8,
        flags: u8,
        nsid: u8,
        page: u8,
        dwords: [u32; 6],
    ) -> &mut Self {
        let opcodes = if step == Admin { ADMIN_OPCODES } else { IO_OPCODES };
        let index = opcodes.iter().position(|known| *known == opcode).unwrap_or_default();
        let mut arguments = vec![index as u8, flags | nsid << 3, 0, page, 0, 0, page + 1, 0];
        let kinds =
            dwords.iter().enumerate().map(|(index, dword)| u16::from(*dword != 0) * (3 << (index * 2)));
        // Bit 13: CDW11 too.
        arguments.extend((kinds.sum::<u16>() | 1 << 13).to_le_bytes());
        dwords.iter().filter(|dword| **dword != 0).for_each(|dword| arguments.extend(dword.to_le_bytes()));
        self.step(step, &arguments)
    }

    /// Small numbers into a page.
    fn poke(&mut self, page: u8, offset: u8, value: u8) -> &mut Self {
        // Kind 3 counts dwords; its page is 1024 of them.
        let place = u16::from(page) * 1024 + u16::from(offset) / 4;
        let [low, high] = place.to_le_bytes();
        self.step(Poke, &[3, low, high, 0x80, value, 0])
    }
}

/// The input that a driver's steps make, in each of several shapes of a machine.
fn driven(steps: &[Step], drive: impl Fn(&mut Writer<'_>)) -> Vec<Vec<u8>> {
    let one = |shape| {
        let mut writer = Writer::new(steps, shape);
        drive(&mut writer);
        writer.out
    };
    [0x00, 0x49, 0x9c, 0xe6, 0x53].map(one).into()
}

/// Steps in random order with plausible arguments.
fn random(steps: &[Step]) -> impl Iterator<Item = Vec<u8>> {
    (0..SEEDS).map(|seed| {
        let mut random = Random::new(seed + 1);
        let mut out = vec![random.number() as u8];
        for _ in 0..STEPS {
            out.push(random.below(steps.len()) as u8);
            for _ in 0..3 + random.below(16) {
                // Small numbers and addresses in the arena, so that much of it means something.
                out.push(if random.below(3) == 0 { random.number() as u8 } else { random.below(8) as u8 });
            }
        }
        out
    })
}

/// For [`super::registers`]: enables, shutdowns, resets, moves of the buffer.
#[must_use]
pub fn register_seeds() -> Vec<Vec<u8>> {
    let mut out = driven(REGISTERS, |writer| {
        // CC (kinds 0 and 1) with each of the values, and NSSR (3).
        for value in 0..8_u8 {
            writer.step(Register, &[0, 2 | value << 5]).step(Run, &[]).step(ReadRegister, &[0, 2, 0x1c, 0]);
        }
        writer.step(Register, &[3, 2 | 4 << 5]).step(Run, &[]).step(Enable, &[]).step(Move, &[]);
        writer.step(Configuration, &[0, 2, 0, 0, 0]).step(Run, &[]).step(Configuration, &[0, 6, 0, 0, 0]);
        writer
            .step(Buffer, &[0, 1, 0, 8, 0])
            .step(Vector, &[3, 0, 0, 0, 0])
            .step(Register, &[11, 3 | 6 << 5]);
        writer.step(Register, &[15, 3, 0]).step(Doorbell, &[0, 3, 0]).step(Run, &[]);
    });
    out.extend(driven(REGISTERS, |writer| {
        // The region: written, disabled, over the buffer, over the arena, back, and over a reset of the subsystem and of the power state.
        writer
            .step(Region, &[0, 7, 0, 8, 0])
            .step(Register, &[13, 2 | 1 << 5])
            .step(Region, &[0, 7, 0, 8, 0]);
        for place in 0..8_u8 {
            writer.step(Register, &[16 | 3 << 5, 2 | place << 5]).step(Region, &[0, 9, 0, place, 0]);
            writer.command(Io, nvm::WRITE, 0, 0, 8, [0; 6]).step(Run, &[]).step(Move, &[]);
        }
        writer.step(Register, &[3, 2 | 4 << 5]).step(Run, &[]).step(ReadRegister, &[24, 3, 8, 0]);
        writer.step(Enable, &[]).step(Configuration, &[6, 3, 0, 0, 0]).step(Configuration, &[6, 0, 0, 0, 0]);
        writer.step(Region, &[0, 7, 0, 16, 0]).step(Move, &[]);
    }));
    out.extend(random(REGISTERS));
    out
}

/// For [`super::queues`]: queues in the arena with commands, rung and rewritten.
#[must_use]
pub fn queue_seeds() -> Vec<Vec<u8>> {
    let mut out = driven(QUEUES, |writer| {
        writer.step(Shadow, &[0]);
        // Queue 2 with its own completion queue, queue 3 with the driver's, in one run and by lists.
        writer.step(CreateQueue, &[0, 15, 0, 0, 8, 0, 0, 9, 0]);
        writer.step(CreateQueue, &[3, 15, 0, 0, 10, 0]);
        for slot in 0..4_u8 {
            // Reads of namespace 1.
            let entry = [0, 8 + slot / 64, 0, 2, 0, 0, 20, 0, 0, 21, 0, 0, 0, slot, 0];
            writer.step(Entry, &entry);
            writer.step(Plan, &[slot, 0, 8, 0, 0x80, 3, 0]);
        }
        writer.step(Doorbell, &[4, 4, 0]).step(Run, &[]).step(Doorbell, &[5, 2, 0]).step(Poll, &[1]);
        writer.step(Doorbell, &[6, 3, 0]).step(Fault, &[0x40]).step(Run, &[]).step(Move, &[]);
        writer.step(Release, &[]).step(Doorbell, &[4, 15, 0]).step(Run, &[]);
    });
    out.extend(driven(QUEUES, |writer| {
        // Shadow doorbells at the start of the arena, with the tail of queue 2 as third pair, and what is no tail.
        writer.step(CreateQueue, &[0, 15, 0, 0, 8, 0, 0, 9, 0]).step(Shadow, &[1 | 1 << 3]).step(Run, &[]);
        for tail in [3_u8, 15, 255] {
            writer.step(Poke, &[3, 4, 0, 0x80, tail, 0]).step(Doorbell, &[4, 1, 0]).step(Run, &[]);
        }
        writer.step(Poke, &[3, 4, 0, 0x80, 0, 2]).step(Poll, &[0]).step(Run, &[]).step(Move, &[]);
    }));
    out.extend(random(QUEUES));
    out
}

/// For [`super::admin`]: each command as drivers give it.
#[must_use]
pub fn admin_seeds() -> Vec<Vec<u8>> {
    let mut out = driven(ADMIN, |writer| {
        for cns in [0, 1, 2, 3, 5, 6, 8, 0x10, 0x11, 0x12, 0x16, 0x17, 0x1a] {
            writer.command(Admin, admin::IDENTIFY, 0, 0, 4, [cns, 0, 0, 0, 0, 0]).step(Run, &[]);
        }
        for page in [
            log::id::SUPPORTED_PAGES,
            log::id::ERROR_INFORMATION,
            log::id::SMART,
            log::id::CHANGED_NAMESPACES,
        ] {
            writer.command(Admin, admin::GET_LOG_PAGE, 0, 6, 4, [u32::from(page) | 255 << 16, 0, 0, 0, 0, 0]);
        }
        writer.step(Run, &[]);
    });
    out.extend(driven(ADMIN, |writer| {
        // 64 blocks, which are created, attached to controller 0, formatted, written, and deleted.
        writer.poke(4, 0, 64).poke(4, 8, 64).poke(6, 0, 1);
        writer.command(Admin, admin::NAMESPACE_MANAGEMENT, 0, 5, 4, [0; 6]).step(Run, &[]);
        writer.command(Admin, admin::NAMESPACE_ATTACHMENT, 0, 3, 6, [0; 6]).step(Run, &[]);
        writer.command(Io, nvm::WRITE, 0, 3, 8, [0, 0, 7, 0, 0, 0]).step(Run, &[]).step(Move, &[]);
        writer.command(Admin, admin::FORMAT_NVM, 0, 3, 0, [1 << 9 | 1, 0, 0, 0, 0, 0]).step(Run, &[]);
        writer.command(Admin, admin::NAMESPACE_ATTACHMENT, 0, 3, 6, [1, 0, 0, 0, 0, 0]).step(Run, &[]);
        writer.command(Admin, admin::NAMESPACE_MANAGEMENT, 0, 3, 0, [1, 0, 0, 0, 0, 0]).step(Run, &[]);
    }));
    out.extend(driven(ADMIN, |writer| {
        for id in
            [feature::VOLATILE_WRITE_CACHE, feature::ASYNC_EVENT_CONFIGURATION, feature::INTERRUPT_COALESCING]
        {
            writer.command(Admin, admin::SET_FEATURES, 0, 5, 4, [id.into(), 0x3ff, 0, 0, 0, 0]);
            writer.command(Admin, admin::GET_FEATURES, 0, 5, 4, [id.into(), 0, 0, 0, 0, 0]);
        }
        for _ in 0..3 {
            writer.command(Admin, admin::ASYNC_EVENT_REQUEST, 0, 5, 0, [0; 6]);
        }
        writer.step(Fault, &[0x42]).command(Io, nvm::WRITE, 0, 0, 8, [3, 0, 7, 0, 0, 0]);
        writer.command(Admin, admin::ABORT, 0, 5, 0, [1, 0, 0, 0, 0, 0]).step(Release, &[]);
        writer
            .command(Admin, admin::DEVICE_SELF_TEST, 0, 6, 0, [1, 0, 0, 0, 0, 0])
            .step(Move, &[])
            .step(Run, &[]);
        writer
            .command(Admin, admin::SANITIZE, 0, 5, 0, [3 | 1 << 4, 0x1234, 0, 0, 0, 0])
            .step(Move, &[])
            .step(Run, &[]);
        writer.command(Admin, admin::GET_LOG_PAGE, 0, 6, 4, [0x81 | 4 << 16, 0, 0, 0, 0, 0]);
        writer.command(Admin, admin::FIRMWARE_DOWNLOAD, 0, 5, 4, [1023, 0, 0, 0, 0, 0]);
        writer.command(Admin, admin::FIRMWARE_COMMIT, 0, 5, 0, [3 << 3 | 2, 0, 0, 0, 0, 0]).step(Enable, &[]);
        writer
            .step(Namespace, &[1])
            .step(Run, &[])
            .step(Namespace, &[8])
            .step(Run, &[])
            .step(Namespace, &[9]);
    }));
    out.extend(driven(ADMIN, |writer| {
        // Sanitize with the region enabled, then disabled, and enabled again before the end.
        writer.command(Admin, admin::SANITIZE, 0, 5, 0, [2, 0, 0, 0, 0, 0]).step(Run, &[]);
        writer.step(Register, &[13, 2 | 1 << 5]);
        writer.command(Admin, admin::SANITIZE, 0, 5, 0, [2, 0, 0, 0, 0, 0]).step(Move, &[]);
        writer.step(Register, &[13 | 3 << 5, 2 | 4 << 5]).step(Move, &[]).step(Run, &[]);
        writer.command(Admin, admin::IDENTIFY, 0, 0, 4, [1, 0, 0, 0, 0, 0]).step(Run, &[]);
    }));
    out.extend(random(ADMIN));
    out
}

/// For [`super::commands`]: each command as drivers give it, pairs and reservations with them.
#[must_use]
pub fn command_seeds() -> Vec<Vec<u8>> {
    let mut out = driven(COMMANDS, |writer| {
        for opcode in [nvm::WRITE, nvm::READ, nvm::COMPARE, nvm::VERIFY, nvm::WRITE_ZEROES, nvm::FLUSH] {
            writer.command(Io, opcode, 0, 0, 8, [16, 0, 7, 0, 0, 0]).step(Run, &[]);
            writer.command(Io, opcode, 0, 2, 8, [2, 0, 1, 0, 0, 0]).step(Run, &[]);
        }
        // Compare and Write, with a move between the halves.
        writer.command(Io, nvm::COMPARE, 6, 0, 8, [16, 0, 0, 0, 0, 0]).step(Move, &[]);
        writer.command(Io, nvm::WRITE, 7, 0, 8, [16, 0, 0, 0, 0, 0]).step(Run, &[]);
        writer.command(Io, nvm::WRITE_UNCORRECTABLE, 0, 0, 8, [40, 0, 3, 0, 0, 0]);
        writer.command(Io, nvm::READ, 0, 0, 8, [41, 0, 0, 0, 0, 0]).step(Move, &[]).step(Run, &[]);
    });
    out.extend(driven(COMMANDS, |writer| {
        // A source range of Copy and a range to deallocate: 8 blocks from 8 on.
        writer.poke(8, 8, 8).poke(8, 16, 7).poke(9, 4, 8).poke(9, 8, 8);
        writer.command(Io, nvm::COPY, 0, 0, 8, [100, 0, 0, 0, 0, 0]).step(Run, &[]);
        writer.command(Io, nvm::DATASET_MANAGEMENT, 0, 0, 9, [0, 4, 0, 0, 0, 0]).step(Run, &[]);
        // A registration with key 5, a reservation, a report, a release.
        writer.poke(10, 8, 5).poke(11, 0, 5);
        writer.command(Io, nvm::RESERVATION_REGISTER, 0, 0, 10, [0; 6]).step(Run, &[]);
        writer.command(Io, nvm::RESERVATION_ACQUIRE, 0, 0, 11, [1 << 8, 0, 0, 0, 0, 0]).step(Run, &[]);
        writer
            .command(Io, nvm::RESERVATION_REPORT, 0, 0, 12, [63, 0, 0, 0, 0, 0])
            .step(Move, &[])
            .step(Run, &[]);
        writer.command(Io, nvm::RESERVATION_RELEASE, 0, 0, 11, [1 << 8, 0, 0, 0, 0, 0]).step(Run, &[]);
        writer.step(Shadow, &[0]).step(Fault, &[0x81]);
        for lba in 0..6 {
            writer.command(Io, nvm::READ, 0, 0, 16, [lba, 0, 3, 0, 0, 0]);
        }
        writer.step(Run, &[]).step(Plan, &[0, 0, 16, 0, 0, 1, 0]).step(Release, &[]);
    }));
    out.extend(driven(COMMANDS, |writer| {
        // Data of namespace 1, and data and metadata of namespace 3 (kinds with bit 12 say where), in the region, elsewhere, and in both.
        for (data, metadata) in [(0x44, 0x44), (0x44, 0), (0, 0x44), (4, 0x64), (0x64, 4)] {
            for (opcode, nsid) in
                [(nvm::WRITE, 0), (nvm::READ, 0), (nvm::WRITE, 2), (nvm::READ, 2), (nvm::COMPARE, 2)]
            {
                let index = IO_OPCODES.iter().position(|known| *known == opcode).unwrap_or_default() as u8;
                // CDW12 is 7 or 0; the second pointer is a page of the same kind.
                let blocks = if nsid == 0 { 15 } else { 0 };
                let entry = [
                    index,
                    nsid << 3,
                    data,
                    0,
                    0x10,
                    data,
                    0,
                    0x20,
                    1 << 4,
                    1 << 4,
                    blocks,
                    metadata,
                    0,
                    0x40,
                ];
                writer.step(Io, &entry).step(Run, &[]);
            }
            writer.step(Region, &[0, 3, 0, 0, 0x10]).step(Move, &[]);
        }
    }));
    out.extend(random(COMMANDS));
    out
}

/// For [`super::pointers`]: each operation with PRPs and with an SGL of several parts.
#[must_use]
pub fn pointer_seeds() -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for kind in [0_u8, 1, 2, 3] {
        for (shape, blocks) in [(0_u8, 7_u8), (0, 15), (2, 200), (4, 255), (6, 255)] {
            // Into a page, from there by a list that goes on in the next page.
            let mut pages = vec![shape, kind, 0, blocks, 3, 0x80, 0x10, 3, 0xf8, 0x2f];
            for page in 0..40_u8 {
                pages.extend([3, 0xf8_u8.wrapping_add(page * 2), 0x2f + u8::from(page > 3), 0, 16 + page, 0]);
            }
            out.push(pages);
            // A segment of data, buckets and the last segment.
            let mut list = vec![shape, kind | 0x40, 0, blocks, 0, 2, 0, 0x80 | 3 << 3, 0x30, 0];
            for (address, value) in [
                ([3, 0, 8], [3, 0, 0x20].as_slice()),
                ([3, 2, 8], &[0x80, 0, 2]),
                ([3, 4, 8], &[3, 0, 0x30]),
                ([3, 6, 8], &[0x80 | 1 << 3, 0, 2]),
                ([3, 8, 8], &[0, 3, 0]),
                ([3, 10, 8], &[0x80 | 3 << 3, 0x10, 0]),
                ([3, 0, 12], &[3, 0, 0x10]),
                ([3, 2, 12], &[0x80, 0, 0xff]),
            ] {
                list.extend(address);
                list.extend(value);
            }
            out.push(list);
        }
    }
    out
}
