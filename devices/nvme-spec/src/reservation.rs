//! Reservation commands (Base 7.2 to 7.5).

/// CDW10 bits 2:0 of Reservation Register: register a key.
pub const REGISTER: u32 = 0;
/// Unregister.
pub const UNREGISTER: u32 = 1;
/// Replace the key.
pub const REPLACE: u32 = 2;
/// CDW10 bits 2:0 of Reservation Acquire: acquire.
pub const ACQUIRE: u32 = 0;
/// Preempt.
pub const PREEMPT: u32 = 1;
/// Preempt, and end the commands of who was preempted.
pub const PREEMPT_AND_ABORT: u32 = 2;
/// CDW10 bits 2:0 of Reservation Release: release.
pub const RELEASE: u32 = 0;
/// Clear.
pub const CLEAR: u32 = 1;
/// CDW10 bit 3: Ignore Existing Key.
pub const IGNORE_EXISTING_KEY: u32 = 1 << 3;
/// CDW10 bits 31:30 of Reservation Register, Change Persist Through Power Loss State: no change.
pub const PERSISTENCE_UNCHANGED: u32 = 0b00;
/// Released by the loss of power.
pub const PERSISTENCE_OFF: u32 = 0b10;
/// Not released by it.
pub const PERSISTENCE_ON: u32 = 0b11;
/// CDW11 bit 0 of Reservation Report: Extended Data Structure.
pub const EXTENDED_DATA_STRUCTURE: u32 = 1 << 0;
/// RCSTS bit 0: the controller is of a host that holds the reservation.
pub const HOLDER: u8 = 1 << 0;
/// Bytes before the first registered controller of the extended structure; the first 24 are a [`ReportHeader`].
pub const EXTENDED_HEADER_SIZE_BYTES: usize = 64;

wire_struct! {
    /// The beginning of Reservation Status (Base 7.5).
    pub struct ReportHeader [24] {
        /// Generation.
        0: generation: u32,
        /// Reservation Type: 0 none.
        4: kind: u8,
        /// Number of Registered Controllers.
        5: registered_controllers: u16,
        /// Persist Through Power Loss State.
        9: persists: u8,
    }
}

wire_struct! {
    /// Registered Controller.
    pub struct RegisteredController [24] {
        /// Controller ID.
        0: controller: u16,
        /// Reservation Status.
        2: status: u8,
        /// Host Identifier.
        8: host: [u8; 8],
        /// Reservation Key.
        16: key: u64,
    }
}

wire_struct! {
    /// Registered Controller Extended.
    pub struct RegisteredControllerExtended [64] {
        /// Controller ID.
        0: controller: u16,
        /// Reservation Status.
        2: status: u8,
        /// Reservation Key.
        8: key: u64,
        /// Host Identifier.
        16: host: [u8; 16],
    }
}
