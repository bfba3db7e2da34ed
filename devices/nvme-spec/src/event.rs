//! Asynchronous events (Base 5.2): completion dword 0 is type (bits 2:0), information (15:8), log page (23:16).

/// An event as it is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Asynchronous Event Type.
    pub kind: u8,
    /// Asynchronous Event Information.
    pub information: u8,
    /// The log page whose reading clears the event.
    pub log_page: u8,
}

impl Event {
    /// Error: the host wrote to the doorbell of a queue that does not exist.
    pub const INVALID_DOORBELL_REGISTER: Self = Self { kind: ERROR, information: 0, log_page: 1 };
    /// Error: the host wrote an invalid value to a doorbell.
    pub const INVALID_DOORBELL_VALUE: Self = Self { kind: ERROR, information: 1, log_page: 1 };
    /// SMART: the reliability of the subsystem is degraded.
    pub const RELIABILITY_DEGRADED: Self = Self { kind: SMART, information: 0, log_page: 2 };
    /// SMART: temperature threshold crossed.
    pub const TEMPERATURE_THRESHOLD: Self = Self { kind: SMART, information: 1, log_page: 2 };
    /// SMART: available spare is below its threshold.
    pub const SPARE_BELOW_THRESHOLD: Self = Self { kind: SMART, information: 2, log_page: 2 };
    /// Notice: namespace attribute changed.
    pub const NAMESPACE_CHANGED: Self = Self { kind: NOTICE, information: 0, log_page: 4 };
    /// Notice: firmware activation starting.
    pub const FIRMWARE_ACTIVATION: Self = Self { kind: NOTICE, information: 1, log_page: 3 };
    /// Notice: asymmetric namespace access change.
    pub const ACCESS_CHANGED: Self = Self { kind: NOTICE, information: 3, log_page: 0x0c };
    /// I/O command specific: a page of the reservation notification log is available.
    pub const RESERVATION_LOG_AVAILABLE: Self =
        Self { kind: COMMAND_SPECIFIC, information: 0, log_page: 0x80 };
    /// I/O command specific: a sanitize operation has completed.
    pub const SANITIZE_COMPLETED: Self = Self { kind: COMMAND_SPECIFIC, information: 1, log_page: 0x81 };

    /// Completion dword 0.
    #[must_use]
    pub const fn to_dword(self) -> u32 {
        self.kind as u32 | (self.information as u32) << 8 | (self.log_page as u32) << 16
    }

    /// From completion dword 0.
    #[must_use]
    pub const fn from_dword(dword: u32) -> Self {
        Self { kind: (dword & 7) as u8, information: (dword >> 8) as u8, log_page: (dword >> 16) as u8 }
    }
}

/// Type 0: error status.
pub const ERROR: u8 = 0;
/// Type 1: SMART / health status.
pub const SMART: u8 = 1;
/// Type 2: notice.
pub const NOTICE: u8 = 2;
/// Type 6: I/O command specific status.
pub const COMMAND_SPECIFIC: u8 = 6;
