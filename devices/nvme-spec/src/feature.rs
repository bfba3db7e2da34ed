//! Features (Base 5.27).

/// Arbitration.
pub const ARBITRATION: u8 = 0x01;
/// Power Management.
pub const POWER_MANAGEMENT: u8 = 0x02;
/// Temperature Threshold.
pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
/// Error Recovery.
pub const ERROR_RECOVERY: u8 = 0x05;
/// Volatile Write Cache.
pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
/// Number of Queues.
pub const NUMBER_OF_QUEUES: u8 = 0x07;
/// Interrupt Coalescing.
pub const INTERRUPT_COALESCING: u8 = 0x08;
/// Interrupt Vector Configuration.
pub const INTERRUPT_VECTOR_CONFIGURATION: u8 = 0x09;
/// Write Atomicity Normal.
pub const WRITE_ATOMICITY: u8 = 0x0a;
/// Asynchronous Event Configuration.
pub const ASYNC_EVENT_CONFIGURATION: u8 = 0x0b;
/// Timestamp.
pub const TIMESTAMP: u8 = 0x0e;
/// Keep Alive Timer.
pub const KEEP_ALIVE_TIMER: u8 = 0x0f;
/// Host Behavior Support.
pub const HOST_BEHAVIOR_SUPPORT: u8 = 0x16;
/// Sanitize Config.
pub const SANITIZE_CONFIG: u8 = 0x17;
/// I/O Command Set Profile.
pub const COMMAND_SET_PROFILE: u8 = 0x19;
/// Host Identifier.
pub const HOST_IDENTIFIER: u8 = 0x81;
/// Reservation Notification Mask.
pub const RESERVATION_NOTIFICATION_MASK: u8 = 0x82;
/// Reservation Persistence.
pub const RESERVATION_PERSISTENCE: u8 = 0x83;
/// Namespace Write Protection Config.
pub const NAMESPACE_WRITE_PROTECTION: u8 = 0x84;

/// Namespace Write Protection Config: the namespace can be written (Base 5.27.1.30).
pub const NO_WRITE_PROTECT: u32 = 0;
/// It cannot, until that is changed.
pub const WRITE_PROTECT: u32 = 1;
/// It cannot, and that can be changed after a power cycle.
pub const WRITE_PROTECT_UNTIL_POWER_CYCLE: u32 = 2;
/// It cannot any more.
pub const PERMANENT_WRITE_PROTECT: u32 = 3;

/// Get Features CDW10 bits 10:8: the current value (Base 5.15).
pub const SELECT_CURRENT: u8 = 0;
/// The default value.
pub const SELECT_DEFAULT: u8 = 1;
/// The saved value.
pub const SELECT_SAVED: u8 = 2;
/// Capabilities: see the `CAPABILITY_*` bits.
pub const SELECT_CAPABILITIES: u8 = 3;

/// Set Features CDW10 bit 31: save the value.
pub const SAVE: u32 = 1 << 31;

/// Completion dword 0 for [`SELECT_CAPABILITIES`]: the feature can be saved.
pub const CAPABILITY_SAVEABLE: u32 = 1 << 0;
/// The feature belongs to a namespace.
pub const CAPABILITY_NAMESPACE_SPECIFIC: u32 = 1 << 1;
/// The feature can be changed.
pub const CAPABILITY_CHANGEABLE: u32 = 1 << 2;
