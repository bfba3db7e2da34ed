//! What `save.rs` takes of the admin commands' own state: nothing where it is as in a new controller.

use std::sync::atomic::Ordering;
use std::time::Instant;

use vmstate::Bitmap;

use crate::admin::Admin;
use crate::command::features::Features;
use crate::command::sanitize::{Outcome, Sanitize};
use crate::command::self_test::SelfTest;
use crate::common::CommonPlace;
use crate::firmware::{Firmware, Staging};
use crate::maintenance::Sweep;
use crate::metadata::Metadata;
use crate::namespace::{self, Namespace, WriteProtection};
use crate::non_volatile::{KeptFormatState, KeptMetadataState, KeptState};
use crate::restore::admin::NO_SWEEP;
use crate::shared::Shared;
use crate::state::{
    FirmwareState, FormatSettingsState, FormatState, MoreFeaturesState, PersistentEventsState,
    SanitizeAskedState, SanitizeState, SavedFeaturesState, SelfTestState, SweepState, WarningsState,
    WriteProtectionState,
};

pub(crate) fn firmware_state(admin: &Admin) -> Option<FirmwareState> {
    let slots = &admin.common.lock().firmware;
    let as_at_first = *slots == Firmware::new() && admin.staging == Staging::default();
    (!as_at_first).then(|| firmware(slots, &admin.staging))
}

fn firmware(firmware: &Firmware, staging: &Staging) -> FirmwareState {
    let mut granules = Bitmap::new(staging.granules.len());
    for (index, &come) in staging.granules.iter().enumerate() {
        granules.set(index, come);
    }
    let present = firmware.revisions.iter().enumerate();
    FirmwareState {
        active: firmware.active,
        next: firmware.next,
        running: firmware.running,
        present: present.fold(0, |bits, (index, revision)| bits | u8::from(revision.is_some()) << index),
        revisions: firmware.revisions.map(Option::unwrap_or_default),
        granule_count: staging.granules.len() as u32,
        granules,
        staged_bytes: staging.bytes.len() as u32,
        staged: staging.bytes.clone(),
    }
}

pub(crate) fn saved_features_state(admin: &Admin) -> Option<SavedFeaturesState> {
    let saved = saved_features(&admin.saved_features);
    (saved != saved_features(&Features::new(0))).then_some(saved)
}

fn saved_features(features: &Features) -> SavedFeaturesState {
    SavedFeaturesState {
        arbitration: features.arbitration,
        workload_hint: features.workload_hint as u8,
        over_temperature_kelvin: features.over_temperature_kelvin,
        under_temperature_kelvin: features.under_temperature_kelvin,
        write_cache: features.write_cache,
        interrupt_coalescing: features.interrupt_coalescing,
        write_atomicity: features.write_atomicity,
        async_events: features.async_events,
        sanitize_config: features.sanitize_config as u8,
    }
}

pub(crate) fn more_features_state(features: &Features) -> Option<MoreFeaturesState> {
    let more = MoreFeaturesState {
        workload_hint: features.workload_hint as u8,
        sanitize_config: features.sanitize_config as u8,
    };
    (more != MoreFeaturesState { workload_hint: 0, sanitize_config: 0 }).then_some(more)
}

pub(crate) fn warnings_state(shared: &Shared) -> Option<WarningsState> {
    let bits = shared.warnings.load(Ordering::SeqCst);
    (bits != 0).then_some(WarningsState { bits })
}

pub(crate) fn write_protection_state(namespace: &Namespace) -> Option<WriteProtectionState> {
    let value = namespace.protection.to_value() as u8;
    (value != 0).then_some(WriteProtectionState { value })
}

fn sweep(sweep: &Sweep) -> SweepState {
    SweepState { scope: sweep.scope, nsid: sweep.nsid, offset_bytes: sweep.offset_bytes }
}

pub(crate) fn format_state(admin: &Admin) -> Option<FormatState> {
    admin.format.map(|format| FormatState {
        waits: format.cid.is_some(),
        cid: format.cid.unwrap_or(0),
        format: format.format.index().unwrap_or(0) as u8,
        sweep: sweep(&format.sweep),
        settings: format
            .format
            .metadata
            .map(|metadata| settings(&metadata))
            .filter(FormatSettingsState::is_needed),
    })
}

/// That of controller `id`.
pub(crate) fn sanitize_state(admin: &Admin, id: u16) -> Option<SanitizeState> {
    let known = admin.common.sanitize();
    (known != Sanitize::new()).then(|| sanitize(&known, id))
}

fn sanitize(sanitize: &Sanitize, id: u16) -> SanitizeState {
    SanitizeState {
        command: sanitize.command,
        outcome: match sanitize.outcome {
            Outcome::Never => 0,
            Outcome::Succeeded => 1,
            Outcome::Failed { exited: false } => 2,
            Outcome::Failed { exited: true } => 3,
        },
        overwrites: sanitize.passes,
        running: sanitize.running.is_some(),
        pattern: sanitize.running.map_or(0, |running| running.pattern),
        pass: sanitize.running.map_or(0, |running| running.pass),
        sweep: sanitize.running.map_or(NO_SWEEP, |running| sweep(&running.sweep)),
        asked: sanitize
            .running
            .filter(|running| running.by != id)
            .map(|running| SanitizeAskedState { controller: running.by }),
    }
}

pub(crate) fn self_test_state(admin: &Admin) -> Option<SelfTestState> {
    (admin.self_test != SelfTest::default()).then(|| self_test(&admin.self_test))
}

fn self_test(tests: &SelfTest) -> SelfTestState {
    SelfTestState {
        code: tests.running.map_or(0, |running| running.code),
        sweep: tests.running.map_or(NO_SWEEP, |running| sweep(&running.sweep)),
        probe_until_bytes: tests.running.and_then(|running| running.probe_until_bytes).unwrap_or(0),
        result_count: tests.results.len() as u8,
        results: tests.results.iter().map(|result| result.to_bytes()).collect(),
    }
}

pub(crate) fn persistent_events_state(admin: &Admin) -> Option<PersistentEventsState> {
    let is_empty = admin.common.lock().events.is_empty() && admin.persistent.context.is_none();
    (!is_empty).then(|| persistent_events(admin))
}

fn persistent_events(admin: &Admin) -> PersistentEventsState {
    let (log, now) = (&admin.persistent, admin.paused_at.unwrap_or_else(Instant::now));
    let (events, generation) = {
        let common = admin.common.lock();
        (common.events.to_bytes(), common.events.generation)
    };
    let context = log.context.clone().unwrap_or_default();
    PersistentEventsState {
        generation,
        since_reset_ms: log.since_reset_ms_at(now),
        event_bytes: events.len() as u32,
        events,
        context_bytes: context.len() as u32,
        context,
    }
}

/// What outlives the power: see [`crate::NonVolatile`].
pub(crate) fn kept_state(admin: &Admin) -> KeptState {
    let (firmware, sanitize, persistent_events) = kept_in_common(&admin.common);
    let with = |protections: &[WriteProtection]| -> Vec<u32> {
        let protected = namespace::active(&admin.namespaces);
        protected.filter(|namespace| protections.contains(&namespace.protection)).map(|ns| ns.nsid).collect()
    };
    let protected = with(&[WriteProtection::Protected, WriteProtection::Permanent]);
    let permanent = with(&[WriteProtection::Permanent]);
    let kept_metadata = |metadata: Metadata| {
        let FormatSettingsState { extended, protection_type, protection_first } = settings(&metadata);
        KeptMetadataState { bytes: metadata.bytes, extended, protection_type, protection_first }
    };
    let format = |ns: &std::sync::Arc<Namespace>| KeptFormatState {
        nsid: ns.nsid,
        block_shift: ns.block_shift,
        metadata: ns.metadata.map(kept_metadata),
    };
    let formats: Vec<_> = namespace::active(&admin.namespaces).map(format).collect();
    KeptState {
        features: saved_features(&admin.saved_features),
        firmware,
        protected_count: protected.len() as u32,
        protected,
        permanent_count: permanent.len() as u32,
        permanent,
        format_count: formats.len() as u32,
        formats,
        sanitize,
        persistent_events,
        self_test: self_test(&SelfTest { running: None, results: admin.self_test.results.clone() }),
    }
}

/// The part of it that is that of all controllers of the subsystem.
pub(crate) fn kept_in_common(common: &CommonPlace) -> (FirmwareState, SanitizeState, PersistentEventsState) {
    let common = common.lock();
    // Whichever controller was asked: after a power cycle it is gone, and so is its host's request for the event.
    let asked = common.sanitize.running.map_or(0, |running| running.by);
    let events = common.events.to_bytes();
    let persistent_events = PersistentEventsState {
        generation: common.events.generation,
        since_reset_ms: 0,
        event_bytes: events.len() as u32,
        events,
        context_bytes: 0,
        context: Vec::new(),
    };
    (firmware(&common.firmware, &Staging::default()), sanitize(&common.sanitize, asked), persistent_events)
}

/// What Format NVM was told of metadata.
fn settings(metadata: &Metadata) -> FormatSettingsState {
    FormatSettingsState {
        extended: metadata.extended,
        protection_type: metadata.protection.map_or(0, |protection| protection.kind),
        protection_first: metadata.protection.is_some_and(|protection| protection.first),
    }
}
