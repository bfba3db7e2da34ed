//! The Persistent Event log (Base 5.16.1.14): a header, then events, newest first.

/// Event types (Base figure 222).
pub mod kind {
    /// SMART / Health Log Snapshot: the data is a [`SmartLog`](crate::log::SmartLog).
    pub const SMART_SNAPSHOT: u8 = 0x01;
    /// Firmware Commit.
    pub const FIRMWARE_COMMIT: u8 = 0x02;
    /// Timestamp Change.
    pub const TIMESTAMP_CHANGE: u8 = 0x03;
    /// Power-on or Reset.
    pub const POWER_ON_OR_RESET: u8 = 0x04;
    /// Format NVM Start.
    pub const FORMAT_START: u8 = 0x07;
    /// Format NVM Completion.
    pub const FORMAT_COMPLETION: u8 = 0x08;
    /// Sanitize Start.
    pub const SANITIZE_START: u8 = 0x09;
    /// Sanitize Completion.
    pub const SANITIZE_COMPLETION: u8 = 0x0a;
}

/// Get Log Page CDW10, Log Specific Field: read what was established before.
pub const ACTION_READ: u32 = 0;
/// Establish a context and read.
pub const ACTION_ESTABLISH: u32 = 1;
/// Release the context.
pub const ACTION_RELEASE: u32 = 2;

/// Log Revision.
pub const REVISION: u8 = 2;
/// Log Header Length: bytes of the header that follow the field.
pub const HEADER_LENGTH: u16 = (PersistentEventHeader::SIZE_BYTES - 20) as u16;
/// Event Header Length: bytes of an event's header that follow the field.
pub const EVENT_HEADER_LENGTH: u8 = (EventHeader::SIZE_BYTES - 3) as u8;
/// Reporting Context Information bit 18: a context exists.
pub const CONTEXT_EXISTS: u32 = 1 << 18;

wire_struct! {
    /// Header of the log (Base figure 221).
    pub struct PersistentEventHeader [512] {
        /// Log Identifier.
        0: log_page: u8,
        /// Total Number of Events.
        4: events: u32,
        /// Total Log Length in bytes, this header included.
        8: length_bytes: u64,
        /// Log Revision.
        16: revision: u8,
        /// Log Header Length.
        18: header_length: u16,
        /// Timestamp, as the feature has it.
        20: timestamp: u64,
        /// Power On Hours.
        28: power_on_hours: u128,
        /// Power Cycle Count.
        44: power_cycles: u64,
        /// PCI Vendor ID.
        52: vid: u16,
        /// PCI Subsystem Vendor ID.
        54: ssvid: u16,
        /// Serial Number.
        56: sn: [u8; 20],
        /// Model Number.
        76: mn: [u8; 40],
        /// NVM Subsystem NVMe Qualified Name.
        116: subnqn: [u8; 256],
        /// Generation Number.
        372: generation: u16,
        /// Reporting Context Information.
        374: context: u32,
        /// Supported Events Bitmap: bit n for event type n.
        480: supported: [u8; 32],
    }
}

wire_struct! {
    /// Header of an event (Base figure 223).
    pub struct EventHeader [24] {
        /// Event Type, one of [`kind`].
        0: kind: u8,
        /// Event Type Revision.
        1: revision: u8,
        /// Event Header Length.
        2: header_length: u8,
        /// Event Header Additional Info.
        3: additional: u8,
        /// Controller Identifier.
        4: controller: u16,
        /// Event Timestamp.
        6: timestamp: u64,
        /// Port Identifier.
        14: port: u16,
        /// Vendor Specific Information Length.
        20: vendor_length: u16,
        /// Event Length: vendor specific information and event data.
        22: length: u16,
    }
}

wire_struct! {
    /// Data of a Firmware Commit event (Base figure 225).
    pub struct FirmwareCommitEvent [22] {
        /// Old Firmware Revision.
        0: old: [u8; 8],
        /// New Firmware Revision.
        8: new: [u8; 8],
        /// Firmware Commit Action.
        16: action: u8,
        /// Firmware Slot.
        17: slot: u8,
        /// Status Code Type of the command.
        18: status_code_type: u8,
        /// Status Returned for the command.
        19: status_code: u8,
        /// Vendor assigned result.
        20: vendor: u16,
    }
}

wire_struct! {
    /// Data of a Timestamp Change event (Base figure 226).
    pub struct TimestampChangeEvent [16] {
        /// Previous Timestamp.
        0: previous: u64,
        /// Milliseconds Since Reset.
        8: since_reset_ms: u64,
    }
}

wire_struct! {
    /// Data of a Power-on or Reset event for one controller (Base figures 227 and 228).
    pub struct PowerOnOrResetEvent [44] {
        /// Firmware Revision.
        0: revision: [u8; 8],
        /// Controller Identifier.
        8: controller: u16,
        /// Firmware Activation: bits 1:0, 1 activated, 2 failed; 0 none.
        10: activation: u8,
        /// Operation in Progress: bit 0 Format NVM, bit 1 sanitize.
        11: operation: u8,
        /// Controller Power Cycle.
        24: power_cycle: u32,
        /// Power On Milliseconds.
        28: power_on_ms: u64,
        /// Controller Timestamp.
        36: timestamp: u64,
    }
}

wire_struct! {
    /// Data of a Format NVM Start event (Base figure 231).
    pub struct FormatStartEvent [12] {
        /// Namespace Identifier of the command.
        0: nsid: u32,
        /// Format NVM Attributes of Identify Controller.
        4: fna: u8,
        /// CDW10 of the command.
        8: command: u32,
    }
}

wire_struct! {
    /// Data of a Format NVM Completion event (Base figure 232).
    pub struct FormatCompletionEvent [12] {
        /// Namespace Identifier of the command.
        0: nsid: u32,
        /// Smallest Format Progress Indicator.
        4: smallest_fpi: u8,
        /// Format NVM Status: 0 success, 1 error.
        5: outcome: u8,
        /// Completion Information.
        6: information: u16,
        /// Status Field of the completion.
        8: status: u32,
    }
}

wire_struct! {
    /// Data of a Sanitize Start event (Base figure 233).
    pub struct SanitizeStartEvent [12] {
        /// SANICAP of Identify Controller.
        0: sanicap: u32,
        /// CDW10 of the command.
        4: command: u32,
        /// CDW11 of the command.
        8: pattern: u32,
    }
}

wire_struct! {
    /// Data of a Sanitize Completion event (Base figure 234).
    pub struct SanitizeCompletionEvent [8] {
        /// Sanitize Progress.
        0: progress: u16,
        /// Sanitize Status.
        2: status: u16,
        /// Completion Information.
        4: information: u16,
    }
}
