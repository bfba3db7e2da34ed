//! Log pages (Base 5.16).

/// Log page identifiers.
pub mod id {
    /// Supported Log Pages.
    pub const SUPPORTED_PAGES: u8 = 0x00;
    /// Error Information.
    pub const ERROR_INFORMATION: u8 = 0x01;
    /// SMART / Health Information.
    pub const SMART: u8 = 0x02;
    /// Firmware Slot Information.
    pub const FIRMWARE_SLOT: u8 = 0x03;
    /// Changed Namespace List.
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    /// Commands Supported and Effects.
    pub const COMMANDS_SUPPORTED: u8 = 0x05;
    /// Device Self-test.
    pub const DEVICE_SELF_TEST: u8 = 0x06;
    /// Asymmetric Namespace Access.
    pub const ANA: u8 = 0x0c;
    /// Persistent Event Log.
    pub const PERSISTENT_EVENT: u8 = 0x0d;
    /// Feature Identifiers Supported and Effects.
    pub const FEATURES_SUPPORTED: u8 = 0x12;
    /// NVMe-MI Commands Supported and Effects.
    pub const MANAGEMENT_SUPPORTED: u8 = 0x13;
    /// Reservation Notification.
    pub const RESERVATION_NOTIFICATION: u8 = 0x80;
    /// Sanitize Status.
    pub const SANITIZE_STATUS: u8 = 0x81;
}

wire_struct! {
    /// One entry of the Error Information log (Base figure 206).
    pub struct ErrorEntry [64] {
        /// Error Count: a unique number that grows by one; 0 marks an unused entry.
        0: error_count: u64,
        /// Submission Queue ID, FFFFh when no queue is at fault.
        8: sq_id: u16,
        /// Command ID, FFFFh when no command is at fault.
        10: cid: u16,
        /// Status Field: bits 15:1 the status, bit 0 the phase.
        12: status: u16,
        /// Parameter Error Location: bits 7:0 byte, 10:8 bit; FFFFh when not applicable.
        14: parameter_location: u16,
        /// First LBA that failed.
        16: lba: u64,
        /// Namespace.
        24: nsid: u32,
        /// Vendor Specific Information Available.
        28: vendor: u8,
        /// Transport Type.
        29: transport: u8,
        /// Command specific.
        32: command_specific: u64,
    }
}

wire_struct! {
    /// SMART / Health Information (Base figure 207).
    pub struct SmartLog [512] {
        /// Critical Warning.
        0: critical_warning: u8,
        /// Composite Temperature in kelvins.
        1: composite_temperature_kelvin: u16,
        /// Available Spare in percent.
        3: available_spare_percent: u8,
        /// Available Spare Threshold in percent.
        4: available_spare_threshold_percent: u8,
        /// Percentage Used.
        5: percentage_used: u8,
        /// Data Units Read: thousands of 512-byte units, rounded up.
        32: data_units_read: u128,
        /// Data Units Written: thousands of 512-byte units, rounded up.
        48: data_units_written: u128,
        /// Host Read Commands.
        64: host_read_commands: u128,
        /// Host Write Commands.
        80: host_write_commands: u128,
        /// Controller Busy Time in minutes.
        96: controller_busy_minutes: u128,
        /// Power Cycles.
        112: power_cycles: u128,
        /// Power On Hours.
        128: power_on_hours: u128,
        /// Unsafe Shutdowns.
        144: unsafe_shutdowns: u128,
        /// Media and Data Integrity Errors.
        160: media_errors: u128,
        /// Number of Error Information Log Entries over the life of the controller.
        176: error_log_entries: u128,
        /// Temperature sensors in kelvins, 0 when not implemented.
        200: temperature_sensors_kelvin: [u16; 8],
    }
}

wire_struct! {
    /// Firmware Slot Information (Base figure 208).
    pub struct FirmwareSlotLog [512] {
        /// Active Firmware Info: bits 2:0 the active slot, 6:4 the slot that is activated at the next reset, 0 if none.
        0: active: u8,
        /// Firmware Revision of slots 1 to 7.
        8: revisions: [[u8; 8]; 7],
    }
}

/// Changed Namespace List: number of identifiers; the first is FFFFFFFFh when more changed (Base 5.16.1.5).
pub const CHANGED_NAMESPACES_MAX: usize = 1024;

/// Commands Supported and Effects: the command is supported (Base figure 211).
pub const EFFECT_SUPPORTED: u32 = 1 << 0;
/// The command may change the contents of a namespace (LBCC).
pub const EFFECT_CONTENT_CHANGE: u32 = 1 << 1;
/// The command may change the capability of a namespace (NCC).
pub const EFFECT_NAMESPACE_CAPABILITY: u32 = 1 << 2;
/// The command may change the inventory of namespaces (NIC).
pub const EFFECT_NAMESPACE_INVENTORY: u32 = 1 << 3;
/// The command may change the capability of the controller (CCC).
pub const EFFECT_CONTROLLER_CAPABILITY: u32 = 1 << 4;
/// CSE 001b: no other command to the same namespace should be outstanding.
pub const EFFECT_EXCLUSIVE_IN_NAMESPACE: u32 = 1 << 16;
/// CSE 010b: no other command to any namespace should be outstanding.
pub const EFFECT_EXCLUSIVE: u32 = 2 << 16;
/// Bit 19: a UUID Index selects among definitions that are specific to vendors.
pub const EFFECT_UUID_SELECTION: u32 = 1 << 19;
wire_struct! {
    /// One result of the Device Self-test log (Base figure 212).
    pub struct SelfTestResult [28] {
        /// Device Self-test Status: bits 3:0 one of the `SELF_TEST_*` results, 7:4 the Self-test Code.
        0: status: u8,
        /// Segment Number of the first segment that failed.
        1: segment: u8,
        /// Valid Diagnostic Information: bit 0 NSID, 1 failing LBA, 2 status code type, 3 status code.
        2: valid: u8,
        /// Power On Hours when the test ended.
        4: power_on_hours: u64,
        /// Namespace Identifier.
        12: nsid: u32,
        /// Failing LBA.
        16: failing_lba: u64,
        /// Status Code Type.
        24: status_code_type: u8,
        /// Status Code.
        25: status_code: u8,
        /// Vendor Specific.
        26: vendor: u16,
    }
}

wire_struct! {
    /// Device Self-test (Base figure 211).
    pub struct SelfTestLog [564] {
        /// Current Device Self-test Operation: 0 none, 1 short, 2 extended.
        0: operation: u8,
        /// Current Device Self-test Completion.
        1: completion_percent: u8,
        /// Newest first.
        4: results: [SelfTestResult; 20],
    }
}

/// Device Self-test result: it completed without error.
pub const SELF_TEST_PASSED: u8 = 0;
/// It was aborted by a Device Self-test command.
pub const SELF_TEST_ABORTED: u8 = 1;
/// It was aborted by a Controller Level Reset.
pub const SELF_TEST_RESET: u8 = 2;
/// It was aborted because the namespace was removed.
pub const SELF_TEST_NAMESPACE_REMOVED: u8 = 3;
/// It was aborted by a Format NVM command.
pub const SELF_TEST_FORMATTED: u8 = 4;
/// It completed, and the segment that is named failed first.
pub const SELF_TEST_FAILED_SEGMENT: u8 = 7;
/// It was aborted by a sanitize operation.
pub const SELF_TEST_SANITIZED: u8 = 9;
/// The entry is not used.
pub const SELF_TEST_UNUSED: u8 = 0xf;
/// Valid Diagnostic Information: the namespace.
pub const SELF_TEST_NSID_VALID: u8 = 1;
/// Valid Diagnostic Information: namespace, LBA, status code type and status code.
pub const SELF_TEST_ALL_VALID: u8 = 0xf;

wire_struct! {
    /// Sanitize Status (Base 5.16.1.25).
    pub struct SanitizeStatusLog [512] {
        /// Sanitize Progress in 65,536ths; FFFFh while no operation is in progress.
        0: progress: u16,
        /// Sanitize Status: bits 2:0 one of the `SANITIZE_*` values, 7:3 completed overwrite passes, 8 Global Data Erased.
        2: status: u16,
        /// CDW10 of the command that began the operation.
        4: command: u32,
        /// Estimated times for overwrite, block erase, crypto erase, and the same with no-deallocate.
        8: estimated_seconds: [u32; 6],
    }
}

/// Sanitize Status: there was no operation.
pub const SANITIZE_NEVER: u16 = 0;
/// The most recent operation completed successfully.
pub const SANITIZE_SUCCEEDED: u16 = 1;
/// One is in progress.
pub const SANITIZE_IN_PROGRESS: u16 = 2;
/// The most recent operation failed.
pub const SANITIZE_FAILED: u16 = 3;
/// No time is estimated.
pub const NO_ESTIMATE: u32 = 0xffff_ffff;

/// Supported Log Pages: the page is supported (Base figure 204).
pub const PAGE_SUPPORTED: u32 = 1 << 0;

wire_struct! {
    /// Reservation Notification (Base figure 232).
    pub struct ReservationNotificationLog [64] {
        /// Log Page Count: pages made so far, this one included; 0 when there is none.
        0: log_page_count: u64,
        /// Reservation Notification Log Page Type: 0 empty, 1 registration preempted, 2 reservation released, 3 reservation preempted.
        8: kind: u8,
        /// Number of Available Log Pages beyond this one.
        9: available: u8,
        /// Namespace.
        12: nsid: u32,
    }
}

wire_struct! {
    /// The beginning of the Asymmetric Namespace Access log (Base figure 219).
    pub struct AnaLogHeader [16] {
        /// Change Count.
        0: change_count: u64,
        /// Number of ANA Group Descriptors.
        8: groups: u16,
    }
}

wire_struct! {
    /// An ANA Group Descriptor, before its namespace identifiers (Base figure 220).
    pub struct AnaGroup [32] {
        /// ANA Group Identifier.
        0: group: u32,
        /// Number of namespace identifiers that follow.
        4: namespaces: u32,
        /// Change Count.
        8: change_count: u64,
        /// Bits 3:0 the Asymmetric Namespace Access State.
        16: state: u8,
    }
}

/// Log Specific Field of the Asymmetric Namespace Access log, in CDW10 of Get Log Page: Return Groups Only.
pub const ANA_GROUPS_ONLY: u32 = 1 << 8;
