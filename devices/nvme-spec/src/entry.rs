//! Queue entries (Base 3.3.3).

use crate::Status;

wire_struct! {
    /// A submission queue entry (Base figure 87, common command format).
    pub struct SubmissionEntry [64] {
        /// Opcode.
        0: opcode: u8,
        /// Bits 1:0 FUSE, bits 7:6 PSDT.
        1: flags: u8,
        /// Command Identifier: unique among the outstanding commands of this submission queue.
        2: cid: u16,
        /// Namespace Identifier.
        4: nsid: u32,
        /// Command specific.
        8: cdw2: u32,
        /// Command specific.
        12: cdw3: u32,
        /// Metadata Pointer.
        16: mptr: u64,
        /// Data Pointer, first half: PRP Entry 1.
        24: prp1: u64,
        /// Data Pointer, second half: PRP Entry 2.
        32: prp2: u64,
        /// Command specific.
        40: cdw10: u32,
        /// Command specific.
        44: cdw11: u32,
        /// Command specific.
        48: cdw12: u32,
        /// Command specific.
        52: cdw13: u32,
        /// Command specific.
        56: cdw14: u32,
        /// Command specific.
        60: cdw15: u32,
    }
}

/// PSDT 00b: PRPs.
pub const PSDT_PRP: u8 = 0;
/// PSDT 01b: an SGL; MPTR is the address of a buffer.
pub const PSDT_SGL_BUFFER: u8 = 1;
/// PSDT 10b: an SGL; MPTR is the address of one SGL descriptor.
pub const PSDT_SGL_DESCRIPTOR: u8 = 2;

/// FUSE 01b: the first command of a fused operation.
pub const FUSE_FIRST: u8 = 1;
/// FUSE 10b: the second command of a fused operation.
pub const FUSE_SECOND: u8 = 2;

impl SubmissionEntry {
    /// FUSE: 0 normal, 1 first, 2 second of a fused operation.
    #[must_use]
    pub const fn fuse(&self) -> u8 {
        self.flags & 3
    }

    /// PSDT: see the `PSDT_*` values.
    #[must_use]
    pub const fn psdt(&self) -> u8 {
        self.flags >> 6
    }

    /// CDW10 and CDW11 as one 64-bit value, for example the Starting LBA.
    #[must_use]
    pub const fn cdw10_64(&self) -> u64 {
        self.cdw10 as u64 | (self.cdw11 as u64) << 32
    }

    /// Sets CDW10 and CDW11 from one 64-bit value.
    pub const fn set_cdw10_64(&mut self, value: u64) {
        self.cdw10 = value as u32;
        self.cdw11 = (value >> 32) as u32;
    }
}

wire_struct! {
    /// A completion queue entry (Base figure 89).
    pub struct CompletionEntry [16] {
        /// Command specific result.
        0: dw0: u32,
        /// Command specific result, upper half.
        4: dw1: u32,
        /// Head of the submission queue when this entry was made.
        8: sq_head: u16,
        /// Identifier of the submission queue.
        10: sq_id: u16,
        /// Identifier of the command.
        12: cid: u16,
        /// Bit 0 the phase tag, bits 15:1 the status.
        14: status_and_phase: u16,
    }
}

impl CompletionEntry {
    /// The phase tag.
    #[must_use]
    pub const fn phase(&self) -> bool {
        self.status_and_phase & 1 != 0
    }

    /// The status field.
    #[must_use]
    pub const fn status(&self) -> Status {
        Status(self.status_and_phase >> 1)
    }

    /// Sets status and phase.
    pub const fn set_status(&mut self, status: Status, phase: bool) {
        self.status_and_phase = status.0 << 1 | phase as u16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_submission_entry_keeps_every_byte() {
        let bytes: [u8; 64] = core::array::from_fn(|index| index as u8 + 1);
        let entry = SubmissionEntry::from_bytes(&bytes);
        assert_eq!(entry.to_bytes(), bytes);
        assert_eq!(entry.cid, 0x0403);
        assert_eq!(entry.prp2, 0x2827_2625_2423_2221);
        assert_eq!(entry.cdw10_64(), 0x302f_2e2d_2c2b_2a29);
    }

    #[test]
    fn a_completion_entry_keeps_every_byte() {
        let bytes: [u8; 16] = core::array::from_fn(|index| index as u8 + 1);
        let mut entry = CompletionEntry::from_bytes(&bytes);
        assert_eq!(entry.to_bytes(), bytes);
        entry.set_status(Status::LBA_OUT_OF_RANGE, true);
        assert_eq!((entry.status(), entry.phase()), (Status::LBA_OUT_OF_RANGE, true));
        assert_eq!(entry.status_and_phase, 0x80 << 1 | 1);
    }
}
