//! From bytes of an input to what a guest writes.

use nvme_spec::SubmissionEntry;
use nvme_spec::opcode::{admin, nvm};

use super::machine::{ARENA_BYTES, BUFFER_BASE, HIDDEN, REGION_BASE};

/// What is left of an input. What it lacks is 0.
#[derive(Debug)]
pub(super) struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Never the upper half of an address that the guest does not know.
    pub fn dword(&mut self) -> u32 {
        let value = u32::from(self.half()) | u32::from(self.half()) << 16;
        if HIDDEN.contains(&value) { 0 } else { value }
    }

    /// Small numbers mostly.
    fn number(&mut self, kind: u16) -> u32 {
        match kind & 3 {
            0 => 0,
            1 => self.byte().into(),
            2 => u32::from(self.byte()) | u32::from(self.byte()) << 16,
            _ => self.dword(),
        }
    }

    /// Where a guest points.
    pub fn address(&mut self) -> u64 {
        let (kind, value) = (self.byte(), u64::from(self.half()));
        match kind % 8 {
            0..3 => (value << 12) % ARENA_BYTES,
            3 => (value << 2) % ARENA_BYTES,
            4 if kind & 0x40 == 0 => BUFFER_BASE + value,
            // Pages mostly: the second pointer must be one.
            4 => REGION_BASE + if kind & 0x20 == 0 { value & !0xfff } else { value },
            5 => ARENA_BYTES - value % 512,
            6 => u64::MAX - value,
            _ => u64::from(self.dword()) | u64::from(self.dword()) << 32,
        }
    }

    /// The second half of a data pointer: an address, or the length and type of an SGL descriptor.
    pub fn second_pointer(&mut self) -> u64 {
        let kind = self.0.first().copied().unwrap_or_default();
        if kind < 128 {
            return self.address();
        }
        self.byte();
        u64::from(self.half()) | u64::from(kind >> 3 & 7) << 60
    }

    /// Any command, without an identifier.
    pub fn entry(&mut self, opcodes: &[u8]) -> SubmissionEntry {
        const FLAGS: [u8; 8] = [0, 0, 0, 0x40, 0x40, 0x80, 1, 2];
        const NAMESPACES: [u32; 8] = [1, 1, 3, 2, 4, 0, u32::MAX, 1025];
        let (opcode, kind) = (self.byte(), self.byte());
        let opcode = match opcodes.get(usize::from(opcode) % (opcodes.len() + 1)) {
            Some(known) => *known,
            None => self.byte(),
        };
        let flags = if kind & 0xc0 == 0xc0 { self.byte() } else { FLAGS[usize::from(kind & 7)] };
        let mut entry = SubmissionEntry {
            opcode,
            flags,
            nsid: NAMESPACES[usize::from(kind >> 3 & 7)],
            prp1: self.address(),
            prp2: self.second_pointer(),
            ..SubmissionEntry::default()
        };
        let kinds = self.half();
        entry.cdw10 = self.number(kinds);
        entry.cdw11 = self.number(kinds >> 2);
        entry.cdw12 = self.number(kinds >> 4);
        entry.cdw13 = self.number(kinds >> 6);
        entry.cdw14 = self.number(kinds >> 8);
        entry.cdw15 = self.number(kinds >> 10);
        // Few namespaces have so many blocks.
        if opcodes.len() == IO_OPCODES.len() && kinds & 1 << 13 == 0 {
            entry.cdw11 = 0;
        }
        if kinds & 1 << 12 != 0 {
            entry.mptr = self.address();
        }
        entry
    }
}

/// Admin commands; the last of several that are alike is there more often.
pub(super) const ADMIN_OPCODES: &[u8] = &[
    admin::DELETE_SQ,
    admin::CREATE_SQ,
    admin::GET_LOG_PAGE,
    admin::DELETE_CQ,
    admin::CREATE_CQ,
    admin::IDENTIFY,
    admin::ABORT,
    admin::SET_FEATURES,
    admin::GET_FEATURES,
    admin::ASYNC_EVENT_REQUEST,
    admin::NAMESPACE_MANAGEMENT,
    admin::FIRMWARE_COMMIT,
    admin::FIRMWARE_DOWNLOAD,
    admin::DEVICE_SELF_TEST,
    admin::NAMESPACE_ATTACHMENT,
    admin::KEEP_ALIVE,
    admin::DOORBELL_BUFFER_CONFIG,
    admin::FORMAT_NVM,
    admin::SANITIZE,
    admin::SET_FEATURES,
    admin::GET_LOG_PAGE,
    admin::NAMESPACE_MANAGEMENT,
    admin::NAMESPACE_ATTACHMENT,
];

/// I/O commands.
pub(super) const IO_OPCODES: &[u8] = &[
    nvm::FLUSH,
    nvm::WRITE,
    nvm::READ,
    nvm::WRITE_UNCORRECTABLE,
    nvm::COMPARE,
    nvm::WRITE_ZEROES,
    nvm::DATASET_MANAGEMENT,
    nvm::VERIFY,
    nvm::RESERVATION_REGISTER,
    nvm::RESERVATION_REPORT,
    nvm::RESERVATION_ACQUIRE,
    nvm::RESERVATION_RELEASE,
    nvm::COPY,
    nvm::WRITE,
    nvm::COMPARE,
    nvm::READ,
];
