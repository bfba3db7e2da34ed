//! Status codes (Base 3.3.3.2.1, NVM 2.1 figures).

/// The status field of a completion: bits 7:0 Status Code, 10:8 Status Code Type, 12:11 Command Retry Delay,
/// 13 More, 14 Do Not Retry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status(pub u16);

const fn generic(code: u8) -> Status {
    Status(code as u16)
}

const fn command_specific(code: u8) -> Status {
    Status(1 << 8 | code as u16)
}

const fn path(code: u8) -> Status {
    Status(3 << 8 | code as u16)
}

const fn media(code: u8) -> Status {
    Status(2 << 8 | code as u16)
}

macro_rules! statuses {
    ($($(#[$meta:meta])* $name:ident = $kind:ident $code:literal,)*) => {
        impl Status {
            $($(#[$meta])* pub const $name: Self = $kind($code);)*
        }
    };
}

statuses! {
    /// Successful Completion.
    SUCCESS = generic 0x00,
    /// Invalid Command Opcode.
    INVALID_OPCODE = generic 0x01,
    /// Invalid Field in Command.
    INVALID_FIELD = generic 0x02,
    /// Command ID Conflict.
    COMMAND_ID_CONFLICT = generic 0x03,
    /// Data Transfer Error.
    DATA_TRANSFER_ERROR = generic 0x04,
    /// Commands Aborted due to Power Loss Notification.
    ABORTED_POWER_LOSS = generic 0x05,
    /// Internal Error.
    INTERNAL_ERROR = generic 0x06,
    /// Command Abort Requested.
    ABORT_REQUESTED = generic 0x07,
    /// Command Aborted due to SQ Deletion.
    ABORTED_SQ_DELETION = generic 0x08,
    /// Command Aborted due to Failed Fused Command.
    ABORTED_FAILED_FUSED = generic 0x09,
    /// Command Aborted due to Missing Fused Command.
    ABORTED_MISSING_FUSED = generic 0x0a,
    /// Invalid Namespace or Format.
    INVALID_NAMESPACE = generic 0x0b,
    /// Command Sequence Error.
    COMMAND_SEQUENCE_ERROR = generic 0x0c,
    /// Invalid SGL Segment Descriptor.
    INVALID_SGL_SEGMENT = generic 0x0d,
    /// Invalid Number of SGL Descriptors.
    INVALID_SGL_COUNT = generic 0x0e,
    /// Data SGL Length Invalid.
    SGL_DATA_LENGTH_INVALID = generic 0x0f,
    /// Metadata SGL Length Invalid.
    SGL_METADATA_LENGTH_INVALID = generic 0x10,
    /// SGL Descriptor Type Invalid.
    SGL_TYPE_INVALID = generic 0x11,
    /// Invalid Use of Controller Memory Buffer.
    INVALID_USE_OF_CMB = generic 0x12,
    /// PRP Offset Invalid.
    PRP_OFFSET_INVALID = generic 0x13,
    /// Atomic Write Unit Exceeded.
    ATOMIC_WRITE_UNIT_EXCEEDED = generic 0x14,
    /// Operation Denied.
    OPERATION_DENIED = generic 0x15,
    /// SGL Offset Invalid.
    SGL_OFFSET_INVALID = generic 0x16,
    /// Host Identifier Inconsistent Format.
    HOST_IDENTIFIER_INCONSISTENT = generic 0x18,
    /// Keep Alive Timer Expired.
    KEEP_ALIVE_EXPIRED = generic 0x19,
    /// Keep Alive Timeout Invalid.
    KEEP_ALIVE_INVALID = generic 0x1a,
    /// Command Aborted due to Preempt and Abort.
    ABORTED_BY_PREEMPT = generic 0x1b,
    /// Sanitize Failed.
    SANITIZE_FAILED = generic 0x1c,
    /// Sanitize In Progress.
    SANITIZE_IN_PROGRESS = generic 0x1d,
    /// Namespace is Write Protected.
    NAMESPACE_WRITE_PROTECTED = generic 0x20,
    /// LBA Out of Range.
    LBA_OUT_OF_RANGE = generic 0x80,
    /// Capacity Exceeded.
    CAPACITY_EXCEEDED = generic 0x81,
    /// Namespace Not Ready.
    NAMESPACE_NOT_READY = generic 0x82,
    /// Reservation Conflict.
    RESERVATION_CONFLICT = generic 0x83,
    /// Format In Progress.
    FORMAT_IN_PROGRESS = generic 0x84,

    /// Completion Queue Invalid (Create I/O Submission Queue).
    COMPLETION_QUEUE_INVALID = command_specific 0x00,
    /// Invalid Queue Identifier.
    INVALID_QUEUE_IDENTIFIER = command_specific 0x01,
    /// Invalid Queue Size.
    INVALID_QUEUE_SIZE = command_specific 0x02,
    /// Abort Command Limit Exceeded.
    ABORT_LIMIT_EXCEEDED = command_specific 0x03,
    /// Asynchronous Event Request Limit Exceeded.
    ASYNC_EVENT_LIMIT_EXCEEDED = command_specific 0x05,
    /// Invalid Firmware Slot.
    INVALID_FIRMWARE_SLOT = command_specific 0x06,
    /// Invalid Firmware Image.
    INVALID_FIRMWARE_IMAGE = command_specific 0x07,
    /// Invalid Interrupt Vector.
    INVALID_INTERRUPT_VECTOR = command_specific 0x08,
    /// Invalid Log Page.
    INVALID_LOG_PAGE = command_specific 0x09,
    /// Invalid Format.
    INVALID_FORMAT = command_specific 0x0a,
    /// Firmware Activation Requires Conventional Reset.
    FIRMWARE_NEEDS_CONVENTIONAL_RESET = command_specific 0x0b,
    /// Invalid Queue Deletion.
    INVALID_QUEUE_DELETION = command_specific 0x0c,
    /// Feature Identifier Not Saveable.
    FEATURE_NOT_SAVEABLE = command_specific 0x0d,
    /// Feature Not Changeable.
    FEATURE_NOT_CHANGEABLE = command_specific 0x0e,
    /// Feature Not Namespace Specific.
    FEATURE_NOT_NAMESPACE_SPECIFIC = command_specific 0x0f,
    /// Firmware Activation Requires Controller Level Reset.
    FIRMWARE_NEEDS_CONTROLLER_RESET = command_specific 0x11,
    /// Firmware Activation Prohibited.
    FIRMWARE_ACTIVATION_PROHIBITED = command_specific 0x13,
    /// Overlapping Range (Firmware Image Download).
    OVERLAPPING_RANGE = command_specific 0x14,
    /// Device Self-test In Progress.
    SELF_TEST_IN_PROGRESS = command_specific 0x1d,
    /// Namespace Insufficient Capacity.
    NAMESPACE_INSUFFICIENT_CAPACITY = command_specific 0x15,
    /// Namespace Identifier Unavailable.
    NAMESPACE_IDENTIFIER_UNAVAILABLE = command_specific 0x16,
    /// Namespace Already Attached.
    NAMESPACE_ALREADY_ATTACHED = command_specific 0x18,
    /// Namespace Is Private.
    NAMESPACE_IS_PRIVATE = command_specific 0x19,
    /// Namespace Not Attached.
    NAMESPACE_NOT_ATTACHED = command_specific 0x1a,
    /// Thin Provisioning Not Supported.
    THIN_PROVISIONING_NOT_SUPPORTED = command_specific 0x1b,
    /// Controller List Invalid.
    CONTROLLER_LIST_INVALID = command_specific 0x1c,
    /// Sanitize Prohibited While Persistent Memory Region is Enabled.
    SANITIZE_PROHIBITED_BY_REGION = command_specific 0x23,
    /// I/O Command Set Not Supported.
    IO_COMMAND_SET_NOT_SUPPORTED = command_specific 0x29,
    /// Conflicting Attributes (NVM).
    CONFLICTING_ATTRIBUTES = command_specific 0x80,
    /// Invalid Protection Information (NVM).
    INVALID_PROTECTION_INFORMATION = command_specific 0x81,
    /// Attempted Write to Read Only Range (NVM).
    WRITE_TO_READ_ONLY_RANGE = command_specific 0x82,
    /// Command Size Limit Exceeded (NVM).
    COMMAND_SIZE_LIMIT_EXCEEDED = command_specific 0x83,

    /// Asymmetric Access Persistent Loss.
    ACCESS_PERSISTENT_LOSS = path 0x01,
    /// Asymmetric Access Inaccessible.
    ACCESS_INACCESSIBLE = path 0x02,
    /// Asymmetric Access Transition.
    ACCESS_TRANSITION = path 0x03,

    /// Write Fault.
    WRITE_FAULT = media 0x80,
    /// Unrecovered Read Error.
    UNRECOVERED_READ_ERROR = media 0x81,
    /// End-to-end Guard Check Error.
    GUARD_CHECK_ERROR = media 0x82,
    /// End-to-end Application Tag Check Error.
    APPLICATION_TAG_CHECK_ERROR = media 0x83,
    /// End-to-end Reference Tag Check Error.
    REFERENCE_TAG_CHECK_ERROR = media 0x84,
    /// Compare Failure.
    COMPARE_FAILURE = media 0x85,
    /// Access Denied.
    ACCESS_DENIED = media 0x86,
    /// Deallocated or Unwritten Logical Block.
    DEALLOCATED_BLOCK = media 0x87,
}

impl Status {
    /// Bit 14: Do Not Retry.
    pub const DO_NOT_RETRY: u16 = 1 << 14;
    /// Bit 13: More information is in the error log.
    pub const MORE: u16 = 1 << 13;

    /// The same status with Do Not Retry set: sending the command again would fail again.
    #[must_use]
    pub const fn do_not_retry(self) -> Self {
        Self(self.0 | Self::DO_NOT_RETRY)
    }

    /// Status code and type only, to compare with the constants.
    #[must_use]
    pub const fn code(self) -> Self {
        Self(self.0 & 0x7ff)
    }

    /// Whether the command succeeded.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.code().0 == 0
    }
}
