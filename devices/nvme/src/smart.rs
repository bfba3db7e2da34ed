//! Counters behind the SMART / Health Information log (Base 5.16.1.3).

use std::time::Instant;

use block::Failure;
use nvme_spec::event::Event;
use nvme_spec::log::SmartLog;

use crate::state::{SmartState, UnsafeShutdownsState};

/// The temperature that the controller reports: 35 degrees Celsius. There is no sensor.
pub(crate) const TEMPERATURE_KELVIN: u16 = 308;

/// Critical Warning (Base figure 207) bit 0: the available spare is below its threshold.
const WARNING_SPARE: u8 = 1 << 0;
/// Bit 2: reliability is degraded.
const WARNING_RELIABILITY: u8 = 1 << 2;
/// Bit 3: the media is read-only.
const WARNING_READ_ONLY: u8 = 1 << 3;
/// Bit 5: the persistent memory region has become read-only or unreliable.
pub(crate) const WARNING_REGION: u8 = 1 << 5;
/// Those that failures of images, and of a region, raise. They stay as long as the controller has power.
pub(crate) const MEDIA_WARNINGS: u8 =
    WARNING_SPARE | WARNING_RELIABILITY | WARNING_READ_ONLY | WARNING_REGION;
/// Linux: a file system that is read-only, or has become so.
const EROFS: i32 = 30;

/// What the failure of a request says of the media: a host without room for more is a disk without spare blocks.
pub(crate) fn warning_of(failure: Failure) -> u8 {
    match failure {
        Failure::NoSpace => WARNING_SPARE,
        Failure::Io(EROFS) => WARNING_READ_ONLY,
        Failure::Io(_) => WARNING_RELIABILITY,
        _ => 0,
    }
}

/// The event that tells of a warning (Base figure 147); several warnings share one.
pub(crate) fn event_of(warning: u8) -> Event {
    match warning {
        WARNING_SPARE => Event::SPARE_BELOW_THRESHOLD,
        _ => Event::RELIABILITY_DEGRADED,
    }
}

/// What a worker counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Units of 512 bytes.
    pub units_read: u64,
    /// Units of 512 bytes.
    pub units_written: u64,
    pub reads: u64,
    pub writes: u64,
    pub media_errors: u64,
}

impl Counters {
    /// Adds what another has counted.
    pub fn add(&mut self, other: &Self) {
        self.units_read = self.units_read.saturating_add(other.units_read);
        self.units_written = self.units_written.saturating_add(other.units_written);
        self.reads = self.reads.saturating_add(other.reads);
        self.writes = self.writes.saturating_add(other.writes);
        self.media_errors = self.media_errors.saturating_add(other.media_errors);
    }

    /// What was counted before.
    pub fn from_state(state: &SmartState) -> Self {
        Self {
            units_read: state.units_read,
            units_written: state.units_written,
            reads: state.reads,
            writes: state.writes,
            media_errors: state.media_errors,
        }
    }

    /// As it is saved.
    pub fn to_state(self, health: &Health, now: Instant) -> SmartState {
        SmartState {
            units_read: self.units_read,
            units_written: self.units_written,
            reads: self.reads,
            writes: self.writes,
            media_errors: self.media_errors,
            power_cycles: health.power_cycles,
            power_on_seconds: health.power_on_seconds_at(now),
            unsafe_shutdowns: (health.unsafe_shutdowns > 0)
                .then_some(UnsafeShutdownsState { count: health.unsafe_shutdowns }),
        }
    }

    /// The log page.
    pub fn log(&self, health: &Health, error_log_entries: u64) -> SmartLog {
        SmartLog {
            critical_warning: health.critical_warning,
            composite_temperature_kelvin: TEMPERATURE_KELVIN,
            available_spare_percent: if health.critical_warning & WARNING_SPARE == 0 { 100 } else { 0 },
            available_spare_threshold_percent: 10,
            // "a value of 1 corresponds to 1,000 units of 512 bytes and is rounded up"
            data_units_read: u128::from(self.units_read.div_ceil(1000)),
            data_units_written: u128::from(self.units_written.div_ceil(1000)),
            host_read_commands: u128::from(self.reads),
            host_write_commands: u128::from(self.writes),
            power_cycles: u128::from(health.power_cycles),
            power_on_hours: u128::from(health.power_on_seconds_at(Instant::now()) / 3600),
            unsafe_shutdowns: u128::from(health.unsafe_shutdowns),
            media_errors: u128::from(self.media_errors),
            error_log_entries: u128::from(error_log_entries),
            ..SmartLog::default()
        }
    }
}

impl SmartState {
    /// Unsafe shutdowns.
    pub(crate) fn unsafe_shutdowns(&self) -> u64 {
        self.unsafe_shutdowns.map_or(0, |state| state.count)
    }

    /// Power went, and the host had not shut the controller down.
    pub(crate) fn count_unsafe_shutdown(&mut self) {
        self.unsafe_shutdowns =
            Some(UnsafeShutdownsState { count: self.unsafe_shutdowns().saturating_add(1) });
    }
}

/// What the controller knows of itself.
#[derive(Clone, Debug)]
pub(crate) struct Health {
    pub critical_warning: u8,
    pub power_cycles: u64,
    /// Losses of power before which the host had not shut the controller down.
    pub unsafe_shutdowns: u64,
    /// Powered on before `since`, in seconds.
    pub seconds_before: u64,
    pub since: Instant,
}

impl Health {
    /// Of a controller that goes on with what it counted before.
    pub fn after(state: &SmartState) -> Self {
        Self {
            critical_warning: 0,
            power_cycles: state.power_cycles,
            unsafe_shutdowns: state.unsafe_shutdowns(),
            seconds_before: state.power_on_seconds,
            since: Instant::now(),
        }
    }

    /// How long the controller has been powered on at `now`.
    pub fn power_on_seconds_at(&self, now: Instant) -> u64 {
        self.seconds_before.saturating_add(now.saturating_duration_since(self.since).as_secs())
    }
}
