//! Set Features and Get Features (Base 5.15, 5.27).

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nvme_spec::event::Event;
use nvme_spec::feature as id;
use nvme_spec::persistent::{TimestampChangeEvent, kind};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry};

use crate::admin::{Admin, Answer, Job, Pool};
use crate::arbitration::{ARBITRATION_BITS, DEFAULT_ARBITRATION};
use crate::command::lists::check_uuid_index;
use crate::config::MAX_NAMESPACES;
use crate::namespace::{self, WriteProtection};
use crate::shared::Shared;
use crate::smart::TEMPERATURE_KELVIN;
use crate::subsystem::Contents;

/// Over temperature threshold after a reset: 70 degrees Celsius, which Identify Controller gives as WCTEMP.
pub(crate) const DEFAULT_OVER_TEMPERATURE_KELVIN: u16 = 343;
/// Granularity of the keep alive timer: one second.
pub(crate) const KEEP_ALIVE_GRANULARITY_MS: u32 = 1000;
/// Bits of Asynchronous Event Configuration that mean something here: SMART warnings, namespace and firmware notices.
pub(crate) const ASYNC_EVENT_BITS: u32 = 0xff
    | nvme_spec::identify::OAES_NAMESPACE_ATTRIBUTE
    | nvme_spec::identify::OAES_FIRMWARE_ACTIVATION
    | nvme_spec::identify::OAES_ACCESS_CHANGE;
/// Power Management bits 4:0, the power state; 0 is the only one.
const POWER_STATE: u32 = 0x1f;
/// Power Management bits 7:5, Workload Hint.
pub(crate) const WORKLOAD_HINT: u32 = 7 << 5;
/// Temperature Threshold TMPSEL 1111b: all sensors.
const ALL_SENSORS: u32 = 0xf << 16;
/// Asynchronous Event Configuration bit 1: tell of temperature.
const ASYNC_EVENT_TEMPERATURE: u32 = 1 << 1;
/// Critical warning bit 1: the temperature is beyond a threshold.
const WARNING_TEMPERATURE: u8 = 1 << 1;
/// Milliseconds of a Timestamp: 48 bits.
pub(crate) const TIMESTAMP_MASK: u64 = (1 << 48) - 1;

/// Values of the features: the current ones, or those that a reset brings back ([`Admin::saved_features`]; of these only what
/// [`is_savable`] matters, the rest is as by default).
#[derive(Clone, Debug)]
pub(crate) struct Features {
    pub arbitration: u32,
    /// Power Management: the workload hint, in its place.
    pub workload_hint: u32,
    pub over_temperature_kelvin: u16,
    pub under_temperature_kelvin: u16,
    /// Volatile Write Cache. The one that is current is in [`crate::shared::Shared`], where workers see it.
    pub write_cache: bool,
    pub interrupt_coalescing: u32,
    /// By vector: coalescing disabled.
    pub coalescing_disabled: Box<[bool]>,
    pub write_atomicity: u32,
    pub async_events: u32,
    pub keep_alive_ms: u32,
    pub timestamp: Timestamp,
    /// Sanitize Config: No-Deallocate Response Mode, which is without effect as long as no-deallocate is not inhibited.
    pub sanitize_config: u32,
    /// Advanced Command Retry Enable.
    pub command_retry: u8,
    pub host_identifier: [u8; 16],
    /// Time Limited Error Recovery by namespace, in units of 100 ms.
    pub error_recovery: Box<[u16]>,
}

/// The Timestamp feature: milliseconds that the host has set (or 0 since reset) and that run on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timestamp {
    pub milliseconds: u64,
    pub at: Instant,
    /// The host has set it.
    pub set: bool,
}

impl Timestamp {
    /// What it is at `now`.
    pub fn milliseconds_at(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.at).as_millis();
        let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.milliseconds.wrapping_add(elapsed) & TIMESTAMP_MASK
    }

    /// As Get Features returns it.
    pub fn value(self) -> u64 {
        // Bits 51:49 Timestamp Origin: 1 set by the host.
        self.milliseconds_at(Instant::now()) | u64::from(self.set) << 49
    }
}

impl Features {
    pub fn new(vectors: u16) -> Self {
        Self {
            arbitration: DEFAULT_ARBITRATION,
            workload_hint: 0,
            over_temperature_kelvin: DEFAULT_OVER_TEMPERATURE_KELVIN,
            under_temperature_kelvin: 0,
            write_cache: true,
            interrupt_coalescing: 0,
            coalescing_disabled: vec![false; usize::from(vectors)].into_boxed_slice(),
            write_atomicity: 0,
            async_events: 0,
            keep_alive_ms: 0,
            timestamp: Timestamp { milliseconds: 0, at: Instant::now(), set: false },
            sanitize_config: 0,
            command_retry: 0,
            host_identifier: [0; 16],
            error_recovery: vec![0; MAX_NAMESPACES as usize].into_boxed_slice(),
        }
    }

    /// Takes the value of one savable feature from `other`.
    fn take(&mut self, feature: u8, other: &Self) {
        match feature {
            id::ARBITRATION => self.arbitration = other.arbitration,
            id::POWER_MANAGEMENT => self.workload_hint = other.workload_hint,
            id::TEMPERATURE_THRESHOLD => {
                self.over_temperature_kelvin = other.over_temperature_kelvin;
                self.under_temperature_kelvin = other.under_temperature_kelvin;
            }
            id::VOLATILE_WRITE_CACHE => self.write_cache = other.write_cache,
            id::INTERRUPT_COALESCING => self.interrupt_coalescing = other.interrupt_coalescing,
            id::WRITE_ATOMICITY => self.write_atomicity = other.write_atomicity,
            id::ASYNC_EVENT_CONFIGURATION => self.async_events = other.async_events,
            id::SANITIZE_CONFIG => self.sanitize_config = other.sanitize_config,
            _ => {}
        }
    }

    fn too_hot_or_cold(&self) -> bool {
        TEMPERATURE_KELVIN >= self.over_temperature_kelvin
            || TEMPERATURE_KELVIN <= self.under_temperature_kelvin
    }
}

/// The features that exist, and whether the host can change them.
pub(crate) fn is_changeable(feature: u8) -> Option<bool> {
    match feature {
        id::NUMBER_OF_QUEUES
        | id::ARBITRATION
        | id::POWER_MANAGEMENT
        | id::TEMPERATURE_THRESHOLD
        | id::ERROR_RECOVERY
        | id::VOLATILE_WRITE_CACHE
        | id::INTERRUPT_COALESCING
        | id::INTERRUPT_VECTOR_CONFIGURATION
        | id::WRITE_ATOMICITY
        | id::ASYNC_EVENT_CONFIGURATION
        | id::TIMESTAMP
        | id::KEEP_ALIVE_TIMER
        | id::HOST_BEHAVIOR_SUPPORT
        | id::SANITIZE_CONFIG
        | id::NAMESPACE_WRITE_PROTECTION
        | id::COMMAND_SET_PROFILE
        | id::RESERVATION_NOTIFICATION_MASK
        | id::RESERVATION_PERSISTENCE
        | id::HOST_IDENTIFIER => Some(true),
        _ => None,
    }
}

/// Whether a feature can be saved where there is a place for it.
pub(crate) fn is_savable(feature: u8) -> bool {
    matches!(
        feature,
        id::ARBITRATION
            | id::POWER_MANAGEMENT
            | id::TEMPERATURE_THRESHOLD
            | id::VOLATILE_WRITE_CACHE
            | id::INTERRUPT_COALESCING
            | id::WRITE_ATOMICITY
            | id::ASYNC_EVENT_CONFIGURATION
            | id::SANITIZE_CONFIG
    )
}

/// Whether a feature has a value for each namespace.
pub(crate) fn is_namespace_specific(feature: u8) -> bool {
    matches!(
        feature,
        id::ERROR_RECOVERY
            | id::NAMESPACE_WRITE_PROTECTION
            | id::RESERVATION_NOTIFICATION_MASK
            | id::RESERVATION_PERSISTENCE
    )
}

impl Admin {
    /// Get Features.
    pub fn get_features(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let feature = entry.cdw10 as u8;
        let select = (entry.cdw10 >> 8 & 7) as u8;
        let changeable = is_changeable(feature).ok_or(Status::INVALID_FIELD.do_not_retry())?;
        check_uuid_index(entry)?;
        if is_namespace_specific(feature) {
            namespace::find(&self.namespaces, entry.nsid)?;
            self.check_feature_access(pool, feature, entry.nsid)?;
        }
        let defaults;
        let features = match select {
            id::SELECT_CURRENT => &self.features,
            // What cannot be saved, or never was, has the default value there.
            id::SELECT_SAVED => &self.saved_features,
            id::SELECT_DEFAULT => {
                defaults = Features::new(pool.shared.config.vectors);
                &defaults
            }
            id::SELECT_CAPABILITIES => {
                let changeable = if changeable { id::CAPABILITY_CHANGEABLE } else { 0 };
                let specific =
                    if is_namespace_specific(feature) { id::CAPABILITY_NAMESPACE_SPECIFIC } else { 0 };
                let savable = is_savable(feature) && self.non_volatile.is_some();
                let savable = if savable { id::CAPABILITY_SAVEABLE } else { 0 };
                return Ok(Answer::Now(changeable | specific | savable));
            }
            _ => return Err(Status::INVALID_FIELD.do_not_retry()),
        };
        let dw0 = match feature {
            id::ARBITRATION => features.arbitration,
            id::POWER_MANAGEMENT => features.workload_hint,
            id::TEMPERATURE_THRESHOLD => threshold(features, entry.cdw11)?,
            id::ERROR_RECOVERY => {
                features.error_recovery.get(entry.nsid as usize - 1).copied().map_or(0, u32::from)
            }
            id::VOLATILE_WRITE_CACHE => {
                let current = || pool.shared.write_cache.load(Ordering::Acquire);
                u32::from(if select == id::SELECT_CURRENT { current() } else { features.write_cache })
            }
            id::NAMESPACE_WRITE_PROTECTION if select == id::SELECT_CURRENT => {
                namespace::find(&self.namespaces, entry.nsid)?.protection.to_value()
            }
            id::SANITIZE_CONFIG => features.sanitize_config,
            id::NUMBER_OF_QUEUES => queue_counts(pool),
            id::INTERRUPT_COALESCING => features.interrupt_coalescing,
            id::INTERRUPT_VECTOR_CONFIGURATION => {
                let vector = entry.cdw11 & 0xffff;
                let disabled = features.coalescing_disabled.get(vector as usize);
                let disabled = *disabled.ok_or(Status::INVALID_FIELD.do_not_retry())?;
                vector | u32::from(disabled) << 16
            }
            id::WRITE_ATOMICITY => features.write_atomicity,
            id::ASYNC_EVENT_CONFIGURATION => features.async_events,
            id::TIMESTAMP => {
                let bytes = features.timestamp.value().to_le_bytes();
                self.write_data(pool, entry, &bytes)?;
                0
            }
            id::KEEP_ALIVE_TIMER => features.keep_alive_ms,
            id::HOST_BEHAVIOR_SUPPORT => {
                let mut bytes = [0; 512];
                bytes[0] = features.command_retry;
                self.write_data(pool, entry, &bytes)?;
                0
            }
            id::HOST_IDENTIFIER => {
                let identifier = features.host_identifier;
                let length = if entry.cdw11 & 1 == 1 { 16 } else { 8 };
                self.write_data(pool, entry, &identifier[..length])?;
                0
            }
            id::RESERVATION_NOTIFICATION_MASK if select == id::SELECT_CURRENT => {
                let reservations = &pool.shared.subsystem.reservations;
                reservations.mask(pool.shared.controller_id, entry.nsid).into()
            }
            id::RESERVATION_PERSISTENCE if select == id::SELECT_CURRENT => {
                pool.shared.subsystem.reservations.persists(entry.nsid).into()
            }
            // I/O command set combination 0 is the only one, and no namespace is protected by default.
            _ => 0,
        };
        Ok(Answer::Now(dw0))
    }

    /// Set Features.
    pub fn set_features(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let invalid = Status::INVALID_FIELD.do_not_retry();
        let feature = entry.cdw10 as u8;
        match is_changeable(feature) {
            None => return Err(invalid),
            Some(false) => return Err(Status::FEATURE_NOT_CHANGEABLE.do_not_retry()),
            Some(true) => {}
        }
        check_uuid_index(entry)?;
        let save = entry.cdw10 & id::SAVE != 0;
        if save && !(is_savable(feature) && self.non_volatile.is_some()) {
            return Err(Status::FEATURE_NOT_SAVEABLE.do_not_retry());
        }
        if !is_namespace_specific(feature) && !matches!(entry.nsid, 0 | NSID_BROADCAST) {
            return Err(Status::FEATURE_NOT_NAMESPACE_SPECIFIC.do_not_retry());
        }
        self.check_feature_access(pool, feature, entry.nsid)?;
        let answer = self.set_feature(pool, entry, feature)?;
        if save {
            self.saved_features.take(feature, &self.features);
            self.keep();
        }
        Ok(answer)
    }

    /// Sets the current value.
    fn set_feature(&mut self, pool: &Pool, entry: &SubmissionEntry, feature: u8) -> Result<Answer, Status> {
        let invalid = Status::INVALID_FIELD.do_not_retry();
        let value = entry.cdw11;
        match feature {
            id::ARBITRATION => {
                self.features.arbitration = value & ARBITRATION_BITS;
                self.apply_features(&pool.shared);
            }
            id::POWER_MANAGEMENT if value & POWER_STATE != 0 => return Err(invalid),
            id::POWER_MANAGEMENT => self.features.workload_hint = value & WORKLOAD_HINT,
            id::TEMPERATURE_THRESHOLD => self.set_threshold(pool, value)?,
            id::ERROR_RECOVERY => self.set_error_recovery(entry.nsid, value)?,
            id::VOLATILE_WRITE_CACHE => return Ok(self.set_write_cache(pool, entry)),
            id::NUMBER_OF_QUEUES => {
                if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                    return Err(invalid);
                }
                // "This feature shall only be issued during initialization prior to creation of any I/O queues."
                let exists = (1..=pool.shared.config.queue_pairs).any(|id| {
                    pool.shared.doorbells.cq_exists(id) || pool.shared.doorbells.sq_worker(id).is_some()
                });
                if exists {
                    return Err(Status::COMMAND_SEQUENCE_ERROR.do_not_retry());
                }
                return Ok(Answer::Now(queue_counts(pool)));
            }
            id::INTERRUPT_COALESCING => {
                self.features.interrupt_coalescing = value & 0xffff;
                self.apply_features(&pool.shared);
            }
            id::INTERRUPT_VECTOR_CONFIGURATION => {
                let vector = self.features.coalescing_disabled.get_mut((value & 0xffff) as usize);
                *vector.ok_or(invalid)? = value >> 16 & 1 == 1;
                self.apply_features(&pool.shared);
            }
            id::WRITE_ATOMICITY => self.features.write_atomicity = value & 1,
            id::ASYNC_EVENT_CONFIGURATION => self.features.async_events = value & ASYNC_EVENT_BITS,
            id::TIMESTAMP => {
                let milliseconds = u64::from_le_bytes(self.read_data(pool, entry)?) & TIMESTAMP_MASK;
                let (now, previous) = (Instant::now(), self.features.timestamp.value());
                self.features.timestamp = Timestamp { milliseconds, at: now, set: true };
                let since_reset_ms = self.persistent.since_reset_ms_at(now);
                let event = TimestampChangeEvent { previous, since_reset_ms };
                self.log_event(pool, kind::TIMESTAMP_CHANGE, &event.to_bytes());
            }
            id::KEEP_ALIVE_TIMER => {
                // "The value is rounded up to the granularity of the KAS field."
                self.features.keep_alive_ms =
                    value.checked_next_multiple_of(KEEP_ALIVE_GRANULARITY_MS).ok_or(invalid)?;
                self.restart_keep_alive();
            }
            id::HOST_BEHAVIOR_SUPPORT => {
                let bytes: [u8; 512] = self.read_data(pool, entry)?;
                if bytes[0] > 1 {
                    return Err(invalid);
                }
                self.features.command_retry = bytes[0];
            }
            id::SANITIZE_CONFIG => self.features.sanitize_config = value & 1,
            id::NAMESPACE_WRITE_PROTECTION => return self.set_write_protection(pool, entry),
            id::COMMAND_SET_PROFILE if value & 0x1ff != 0 => return Err(invalid),
            id::COMMAND_SET_PROFILE => {}
            id::RESERVATION_NOTIFICATION_MASK => self.set_reservation_mask(pool, entry)?,
            id::RESERVATION_PERSISTENCE => self.set_reservation_persistence(pool, entry)?,
            // The host identifier: 8 bytes, or 16 with EXHID.
            _ => self.set_host_identifier(pool, entry)?,
        }
        Ok(Answer::Now(0))
    }

    /// Switching the cache off first makes stable what is in it; from then on every write is as with FUA. Writes that are in flight
    /// meanwhile are flushed before they complete (`Worker::reap`).
    fn set_write_cache(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Answer {
        let enable = entry.cdw11 & 1 == 1;
        self.features.write_cache = enable;
        let was_enabled = pool.shared.write_cache.swap(enable, Ordering::SeqCst);
        if enable || !was_enabled {
            return Answer::Now(0);
        }
        self.start_job(pool, Job::WriteCacheOff { cid: entry.cid });
        Answer::Later
    }

    /// Namespace Write Protection Config (Base 5.27.1.30): from now on the namespace's writes are refused, and the command completes
    /// when those before it are stable ("commit all volatile write cache data and metadata associated with the namespace to
    /// non-volatile storage ... as part of transitioning"). What protects until a power cycle, or for ever, is not changed before.
    fn set_write_protection(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let before = namespace::find(&self.namespaces, entry.nsid)?.protection;
        let wanted = WriteProtection::from_value(entry.cdw11 & 7)
            .filter(|&wanted| wanted != WriteProtection::Permanent || self.non_volatile.is_some())
            .ok_or(Status::INVALID_FIELD.do_not_retry())?;
        if wanted == before {
            return Ok(Answer::Now(0));
        }
        let allows = |contents: &Contents| {
            // As it is by now: another controller may have protected it.
            let allocated = contents.find(entry.nsid)?;
            let protection = allocated.namespace.protection;
            if matches!(protection, WriteProtection::UntilPowerCycle | WriteProtection::Permanent) {
                return Err(Status::FEATURE_NOT_CHANGEABLE.do_not_retry());
            }
            // A format or sanitize operation that has it is going to write.
            allocated.is_at_rest()
        };
        self.change_namespaces_if(pool, entry.nsid, allows, |namespace| namespace.protect(wanted))?;
        self.keep();
        if wanted == WriteProtection::None {
            return Ok(Answer::Now(0));
        }
        self.start_job(pool, Job::WriteProtect { cid: entry.cid });
        Ok(Answer::Later)
    }

    /// Tells the workers of the features that they go by: Arbitration, Interrupt Coalescing and Interrupt Vector Configuration.
    pub fn apply_features(&self, shared: &Shared) {
        let ams = shared.registers().cc.ams();
        shared.arbitration.set(ams, self.features.arbitration);
        shared.coalescing.set(self.features.interrupt_coalescing, &self.features.coalescing_disabled);
    }

    /// The host lives: the timer starts again (Base 3.9).
    pub fn restart_keep_alive(&mut self) {
        let timeout = Duration::from_millis(u64::from(self.features.keep_alive_ms));
        self.keep_alive = (!timeout.is_zero()).then(|| Instant::now() + timeout);
    }

    fn set_threshold(&mut self, pool: &Pool, value: u32) -> Result<(), Status> {
        let kelvin = value as u16;
        // All sensors are the composite temperature, the only one that there is.
        let value = if value & ALL_SENSORS == ALL_SENSORS { value & !ALL_SENSORS } else { value };
        threshold(&self.features, value)?;
        match value >> 20 & 3 {
            0 => self.features.over_temperature_kelvin = kelvin,
            _ => self.features.under_temperature_kelvin = kelvin,
        }
        let warned = self.health.critical_warning & WARNING_TEMPERATURE != 0;
        self.refresh_critical_warning();
        let warns = self.health.critical_warning & WARNING_TEMPERATURE != 0;
        if warns && !warned && self.features.async_events & ASYNC_EVENT_TEMPERATURE != 0 {
            pool.shared.events().queue(Event::TEMPERATURE_THRESHOLD);
        }
        Ok(())
    }

    /// Compares the temperature with the thresholds.
    pub fn refresh_critical_warning(&mut self) {
        if self.features.too_hot_or_cold() {
            self.health.critical_warning |= WARNING_TEMPERATURE;
        } else {
            self.health.critical_warning &= !WARNING_TEMPERATURE;
        }
    }

    fn set_error_recovery(&mut self, nsid: u32, value: u32) -> Result<(), Status> {
        // DULBE, bit 16: Identify Namespace NSFEAT does not offer it.
        if value & 1 << 16 != 0 {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        if nsid == NSID_BROADCAST {
            self.features.error_recovery.fill(value as u16);
            return Ok(());
        }
        namespace::find(&self.namespaces, nsid)?;
        if let Some(place) = self.features.error_recovery.get_mut(nsid as usize - 1) {
            *place = value as u16;
        }
        Ok(())
    }
}

/// Number of Queues: both counts 0's based.
fn queue_counts(pool: &Pool) -> u32 {
    let count = u32::from(pool.shared.config.queue_pairs) - 1;
    count | count << 16
}

/// The threshold that CDW11 chooses: bits 19:16 the sensor (0 composite), 21:20 over or under.
fn threshold(features: &Features, value: u32) -> Result<u32, Status> {
    match (value >> 16 & 0xf, value >> 20 & 3) {
        (0, 0) => Ok(u32::from(features.over_temperature_kelvin)),
        (0, 1) => Ok(u32::from(features.under_temperature_kelvin)),
        _ => Err(Status::INVALID_FIELD.do_not_retry()),
    }
}
