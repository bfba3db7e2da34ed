//! Command opcodes.

/// Admin command opcodes (Base figure 138).
pub mod admin {
    /// Delete I/O Submission Queue.
    pub const DELETE_SQ: u8 = 0x00;
    /// Create I/O Submission Queue.
    pub const CREATE_SQ: u8 = 0x01;
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Delete I/O Completion Queue.
    pub const DELETE_CQ: u8 = 0x04;
    /// Create I/O Completion Queue.
    pub const CREATE_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
    /// Namespace Management.
    pub const NAMESPACE_MANAGEMENT: u8 = 0x0d;
    /// Firmware Commit.
    pub const FIRMWARE_COMMIT: u8 = 0x10;
    /// Firmware Image Download.
    pub const FIRMWARE_DOWNLOAD: u8 = 0x11;
    /// Device Self-test.
    pub const DEVICE_SELF_TEST: u8 = 0x14;
    /// Namespace Attachment.
    pub const NAMESPACE_ATTACHMENT: u8 = 0x15;
    /// Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
    /// Doorbell Buffer Config.
    pub const DOORBELL_BUFFER_CONFIG: u8 = 0x7c;
    /// Format NVM.
    pub const FORMAT_NVM: u8 = 0x80;
    /// Sanitize.
    pub const SANITIZE: u8 = 0x84;
}

/// NVM command set opcodes (NVM figure 16).
pub mod nvm {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Uncorrectable.
    pub const WRITE_UNCORRECTABLE: u8 = 0x04;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Verify.
    pub const VERIFY: u8 = 0x0c;
    /// Reservation Register.
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    /// Reservation Report.
    pub const RESERVATION_REPORT: u8 = 0x0e;
    /// Reservation Acquire.
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    /// Reservation Release.
    pub const RESERVATION_RELEASE: u8 = 0x15;
    /// Copy.
    pub const COPY: u8 = 0x19;
}

/// Firmware Commit CDW10 bits 5:3, Commit Action (Base 5.11): put the image into the slot.
pub const COMMIT_REPLACE: u8 = 0;
/// Put it there, and activate it at the next reset.
pub const COMMIT_REPLACE_AND_ACTIVATE: u8 = 1;
/// Activate what is in the slot at the next reset.
pub const COMMIT_ACTIVATE: u8 = 2;
/// Put the image there if one was downloaded, and activate the slot now.
pub const COMMIT_ACTIVATE_NOW: u8 = 3;
/// Sanitize CDW10 bits 2:0, Sanitize Action (Base 5.24): leave the failure mode.
pub const SANITIZE_EXIT_FAILURE_MODE: u32 = 1;
/// Block erase.
pub const SANITIZE_BLOCK_ERASE: u32 = 2;
/// Overwrite.
pub const SANITIZE_OVERWRITE: u32 = 3;
/// Sanitize CDW10 bit 3: Allow Unrestricted Sanitize Exit.
pub const SANITIZE_UNRESTRICTED_EXIT: u32 = 1 << 3;
/// Sanitize CDW10 bit 8: Overwrite Invert Pattern Between Passes. Bits 7:4 are the number of passes, 0 for 16.
pub const SANITIZE_INVERT_PATTERN: u32 = 1 << 8;
/// Sanitize CDW10 bit 9: No-Deallocate After Sanitize.
pub const SANITIZE_NO_DEALLOCATE: u32 = 1 << 9;
/// Select field of Namespace Management: CDW10 bits 3:0 (Base 5.23).
pub mod management {
    /// Create.
    pub const CREATE: u32 = 0;
    /// Delete.
    pub const DELETE: u32 = 1;
}

/// Select field of Namespace Attachment: CDW10 bits 3:0 (Base 5.22).
pub mod attachment {
    /// Controller Attach.
    pub const ATTACH: u32 = 0;
    /// Controller Detach.
    pub const DETACH: u32 = 1;
}

/// CDW12 bit 31 of Read and Write: Limited Retry (NVM 3.2.4).
pub const CDW12_LIMITED_RETRY: u32 = 1 << 31;
/// CDW12 bit 30 of Read, Write and Write Zeroes: Force Unit Access.
pub const CDW12_FUA: u32 = 1 << 30;
/// CDW12 bits 29:26: Protection Information field.
pub const CDW12_PRINFO_MASK: u32 = 0xf << 26;
/// CDW12 bit 29: Protection Information Action: the controller inserts it or takes it away (NVM 5.2.2).
pub const CDW12_PRACT: u32 = 1 << 29;
/// CDW12 bit 28: Protection Information Check of the guard.
pub const CDW12_PRCHK_GUARD: u32 = 1 << 28;
/// CDW12 bit 26: Protection Information Check of the reference tag.
pub const CDW12_PRCHK_REFERENCE_TAG: u32 = 1 << 26;
/// CDW12 bit 25 of Write Zeroes: Deallocate (NVM 3.2.8).
pub const CDW12_DEALLOCATE: u32 = 1 << 25;
/// CDW12 bits 15:0: Number of Logical Blocks, 0's based.
pub const CDW12_NLB_MASK: u32 = 0xffff;
/// CDW11 bit 2 of Dataset Management: Attribute - Deallocate (NVM 3.2.3).
pub const DSM_DEALLOCATE: u32 = 1 << 2;
/// Size of one Dataset Management range in bytes: attributes (4), length in blocks (4), first block (8).
pub const DSM_RANGE_SIZE_BYTES: usize = 16;
/// CDW11 bit 0 of Create I/O SQ and CQ: Physically Contiguous (Base 5.4, 5.5).
pub const QUEUE_PHYSICALLY_CONTIGUOUS: u32 = 1 << 0;
/// CDW11 bit 1 of Create I/O CQ: Interrupts Enabled (Base 5.4).
pub const CQ_INTERRUPTS_ENABLED: u32 = 1 << 1;
