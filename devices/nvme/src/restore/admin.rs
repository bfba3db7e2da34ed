//! What `restore.rs` gives back of the admin commands' own state. What is not there is as in a new controller.

use std::sync::atomic::Ordering;
use std::time::Instant;

use nvme_spec::log::{self, SelfTestResult};
use nvme_spec::{NSID_BROADCAST, Status, opcode};

use super::refuse;
use crate::Error;
use crate::admin::{Admin, Pool};
use crate::command::features::{ASYNC_EVENT_BITS, Features, WORKLOAD_HINT};
use crate::command::format::Format;
use crate::command::sanitize::{COMMAND_BITS, Outcome, Sanitize, Sanitizing, passes};
use crate::command::self_test::{EXTENDED, RESULTS, SHORT, SelfTest, Testing};
use crate::config::{MAX_NAMESPACES, MetadataConfig};
use crate::firmware::{Firmware, GRANULARITY_BYTES, SLOTS, Staging, is_revision};
use crate::maintenance::Sweep;
use crate::metadata::BlockFormat;
use crate::namespace::{self, NamespaceTable, WriteProtection};
use crate::non_volatile::{KeptFormatState, KeptMetadataState, KeptState};
use crate::persistent::{EventLog, is_context};
use crate::smart::MEDIA_WARNINGS;
use crate::state::{
    FirmwareState, FormatSettingsState, FormatState, NvmeState, PersistentEventsState, SanitizeState,
    SavedFeaturesState, SelfTestState, SweepState,
};

/// What is saved where nothing is in progress.
pub(crate) const NO_SWEEP: SweepState = SweepState { scope: 0, nsid: 0, offset_bytes: 0 };

pub(super) fn load(pool: &Pool, admin: &mut Admin, state: &NvmeState, now: Instant) -> Result<(), Error> {
    if let Some(saved) = &state.features.saved {
        admin.saved_features = saved_features(saved, pool.shared.config.vectors)?;
    }
    if let Some(more) = &state.features.more {
        check_hint("features.more.workload_hint", more.workload_hint)?;
        check_config("features.more.sanitize_config", more.sanitize_config)?;
        admin.features.workload_hint = more.workload_hint.into();
        admin.features.sanitize_config = more.sanitize_config.into();
    }
    admin.features.write_cache = state.features.write_cache;
    load_namespaces(pool, admin, state)?;
    if let Some(saved) = &state.format {
        admin.format = Some(format(admin, saved, state.sq.get(0).is_some())?);
    }
    admin.tell_of_format(pool);
    load_common(admin, pool.shared.controller_id, state)?;
    let known = admin.common.sanitize();
    if admin.format.is_some() && known.running.is_some() {
        return refuse("format", 1u8, "a sanitize operation is in progress too");
    }
    if let Some(saved) = &state.events.warnings {
        if saved.bits == 0 || saved.bits & !MEDIA_WARNINGS != 0 {
            return refuse("events.warnings.bits", saved.bits, "no failure of an image raises that");
        }
        pool.shared.warnings.store(saved.bits, Ordering::SeqCst);
        admin.health.critical_warning |= saved.bits;
    }
    if let Some(saved) = &state.persistent_events {
        persistent_events(admin, saved, now)?;
    }
    // What began before is in there, or was never to be.
    admin.persistent.knows_begin = state.sq.get(0).is_some();
    if let Some(saved) = &state.self_test {
        admin.self_test = self_test(admin, saved)?;
    }
    if admin.self_test.running.is_some() && known.refusal().is_some() {
        return refuse("self_test.code", 1u8, "a sanitize operation is in progress too, or failed");
    }
    refuse_again(pool, admin);
    Ok(())
}

/// Formats and write protection: what the guest made of the namespaces.
fn load_namespaces(pool: &Pool, admin: &mut Admin, state: &NvmeState) -> Result<(), Error> {
    let mut changes = Vec::new();
    for (index, saved) in state.namespaces.present() {
        let value = saved.write_protection.as_ref().map(|saved| saved.value);
        let Some(format) = saved.shape.format() else {
            let shift = saved.shape.block_shift;
            return refuse(format!("namespaces[{index}].block_shift"), shift, "no format has such blocks");
        };
        let here = namespace::find(&admin.namespaces, saved.shape.nsid).ok();
        let is_same = here.is_some_and(|here| here.format() == format);
        if is_same && value.is_none() {
            continue;
        }
        let blocks = here.filter(|_| !is_same).map(|here| format.blocks(here.image_bytes));
        if blocks.is_some_and(|blocks| blocks != Some(saved.shape.blocks)) {
            let reason = "the image does not hold so many in that format";
            return refuse(format!("namespaces[{index}].blocks"), saved.shape.blocks, reason);
        }
        let protection = match value {
            None => WriteProtection::None,
            Some(value) => match WriteProtection::from_value(value.into()) {
                None | Some(WriteProtection::None) => {
                    let field = format!("namespaces[{index}].write_protection.value");
                    return refuse(field, value, "it is not a write protection");
                }
                Some(protection) => protection,
            },
        };
        changes.push((saved.shape.nsid, format, protection));
    }
    if !changes.is_empty() {
        // In the order of their identifiers, as the slots are.
        admin.change_namespaces(pool, NSID_BROADCAST, |namespace| {
            if let Ok(at) = changes.binary_search_by_key(&namespace.nsid, |&(nsid, ..)| nsid) {
                let (_, format, protection) = changes[at];
                namespace.set_format(&format);
                namespace.protect(protection);
            }
        });
    }
    Ok(())
}

/// Has the namespaces of operations that are not finished answer as they did.
fn refuse_again(pool: &Pool, admin: &mut Admin) {
    if let Some(format) = admin.format {
        // Another controller's may have others.
        admin.change_namespaces(pool, NSID_BROADCAST, |namespace| {
            if format.holds(namespace.nsid) {
                namespace.refusal = Some(Status::FORMAT_IN_PROGRESS);
            }
        });
    }
    if admin.common.sanitize().refusal().is_some() {
        admin.refuse_while_sanitizing(pool);
    }
}

fn sweep(table: &NamespaceTable, path: &str, saved: &SweepState) -> Result<Sweep, Error> {
    let &SweepState { scope, nsid, offset_bytes } = saved;
    let first = if scope == NSID_BROADCAST { 1 } else { scope };
    let last = if scope == NSID_BROADCAST { MAX_NAMESPACES } else { scope };
    if !(1..=MAX_NAMESPACES).contains(&first) {
        return refuse(format!("{path}.scope"), scope, "it is not a namespace identifier");
    }
    if !(first..=last + 1).contains(&nsid) {
        return refuse(format!("{path}.nsid"), nsid, "it is not a namespace of the operation");
    }
    let size_bytes = namespace::find(table, nsid).map_or(0, |namespace| namespace.size_bytes());
    if offset_bytes != 0 && u128::from(offset_bytes) >= size_bytes || !offset_bytes.is_multiple_of(512) {
        return refuse(format!("{path}.offset_bytes"), offset_bytes, "it is not a place in the namespace");
    }
    Ok(Sweep { scope, nsid, offset_bytes })
}

/// What all controllers of the subsystem say: the first that is loaded brings it, the others must agree.
fn load_common(admin: &mut Admin, id: u16, state: &NvmeState) -> Result<(), Error> {
    let (slots, staging) = match &state.firmware {
        Some(saved) => firmware(saved)?,
        None => (Firmware::new(), Staging::default()),
    };
    admin.staging = staging;
    let sanitize = match &state.sanitize {
        Some(saved) => sanitize(admin, saved, id)?,
        None => Sanitize::new(),
    };
    let events = match &state.persistent_events {
        Some(saved) => event_log(saved)?,
        None => EventLog::default(),
    };
    let common = &mut *admin.common.lock();
    if !std::mem::replace(&mut common.loaded, true) {
        (common.firmware, common.sanitize, common.events) = (slots, sanitize, events);
        return Ok(());
    }
    let reason = "another controller of the subsystem says otherwise";
    if common.firmware != slots {
        return refuse("firmware", slots.active, reason);
    }
    if common.sanitize != sanitize {
        return refuse("sanitize.command", sanitize.command, reason);
    }
    if common.events != events {
        return refuse("persistent_events.generation", events.generation, reason);
    }
    Ok(())
}

fn event_log(saved: &PersistentEventsState) -> Result<EventLog, Error> {
    EventLog::from_bytes(&saved.events, saved.generation)
        .or_else(|reason| refuse("persistent_events.event_bytes", saved.event_bytes, reason))
}

/// The controller's own part.
fn persistent_events(admin: &mut Admin, saved: &PersistentEventsState, now: Instant) -> Result<(), Error> {
    let log = &mut admin.persistent;
    if !saved.context.is_empty() && !is_context(&saved.context) {
        let reason = "it is not a copy of such a log";
        return refuse("persistent_events.context_bytes", saved.context_bytes, reason);
    }
    log.context = (!saved.context.is_empty()).then(|| saved.context.clone());
    log.set_since_reset(saved.since_reset_ms, now);
    Ok(())
}

fn self_test(admin: &Admin, saved: &SelfTestState) -> Result<SelfTest, Error> {
    let mut results = std::collections::VecDeque::with_capacity(RESULTS);
    for bytes in &saved.results {
        let result = SelfTestResult::from_bytes(bytes);
        let (code, outcome) = (result.status >> 4, result.status & 0xf);
        let ends_so = outcome <= log::SELF_TEST_SANITIZED && matches!(code, SHORT | EXTENDED);
        if !ends_so || result.to_bytes() != *bytes {
            return refuse("self_test.results", result.status, "no test ends so");
        }
        results.push_back(result);
    }
    let probe_until_bytes = (saved.probe_until_bytes != 0).then_some(saved.probe_until_bytes);
    let running = match saved.code {
        0 if (saved.sweep, probe_until_bytes) == (NO_SWEEP, None) => None,
        // The controller alone.
        SHORT | EXTENDED if (saved.sweep, probe_until_bytes) == (NO_SWEEP, None) => {
            Some(Testing { code: saved.code, sweep: Sweep::new(0), probe_until_bytes })
        }
        SHORT | EXTENDED => {
            let sweep = sweep(&admin.namespaces, "self_test.sweep", &saved.sweep)?;
            if probe_until_bytes.is_some_and(|until_bytes| until_bytes <= sweep.offset_bytes) {
                let reason = "it is not after what is done";
                return refuse("self_test.probe_until_bytes", saved.probe_until_bytes, reason);
            }
            Some(Testing { code: saved.code, sweep, probe_until_bytes })
        }
        other => return refuse("self_test.code", other, "there is no such test, or none is in progress"),
    };
    Ok(SelfTest { running, results })
}

fn format(admin: &Admin, saved: &FormatState, has_queue: bool) -> Result<Format, Error> {
    let settings = saved.settings.unwrap_or_default();
    let FormatSettingsState { extended, protection_type, protection_first } = settings;
    let format = BlockFormat::new(saved.format.into(), extended, protection_type, protection_first);
    let is_said_once = saved.settings.is_none_or(|settings| settings.is_needed())
        && (protection_type != 0 || !protection_first)
        && format.is_none_or(|format| format.metadata.is_some() || saved.settings.is_none());
    let Some(format) = format.filter(|_| is_said_once) else {
        return refuse("format.format", saved.format, "it is not an LBA format, or not with such metadata");
    };
    if saved.waits && !has_queue || !saved.waits && saved.cid != 0 {
        return refuse("format.cid", saved.cid, "nobody waits for it");
    }
    let cid = saved.waits.then_some(saved.cid);
    let sweep = sweep(&admin.namespaces, "format.sweep", &saved.sweep)?;
    Ok(Format { cid, format, sweep, quiet: false })
}

/// As controller `id` has saved it.
fn sanitize(admin: &Admin, saved: &SanitizeState, id: u16) -> Result<Sanitize, Error> {
    let outcome = match saved.outcome {
        0 => Outcome::Never,
        1 => Outcome::Succeeded,
        2 => Outcome::Failed { exited: false },
        3 => Outcome::Failed { exited: true },
        other => return refuse("sanitize.outcome", other, "no operation ends so"),
    };
    let command = saved.command;
    let begins = matches!(command & 7, opcode::SANITIZE_BLOCK_ERASE | opcode::SANITIZE_OVERWRITE);
    let never = command == 0 && outcome == Outcome::Never && !saved.running;
    if command & !COMMAND_BITS != 0 || !begins && !never {
        return refuse("sanitize.command", command, "no command that begins an operation has it");
    }
    if saved.overwrites > passes(command) {
        return refuse("sanitize.overwrites", saved.overwrites, "there were not so many");
    }
    let running = match saved.running {
        true => {
            if saved.pass > passes(command) {
                return refuse("sanitize.pass", saved.pass, "there are not so many");
            }
            if saved.sweep.scope != NSID_BROADCAST {
                return refuse("sanitize.sweep.scope", saved.sweep.scope, "it is not about all namespaces");
            }
            let sweep = sweep(&admin.allocated, "sanitize.sweep", &saved.sweep)?;
            let by = saved.asked.as_ref().map_or(id, |asked| asked.controller);
            Some(Sanitizing { pattern: saved.pattern, pass: saved.pass, sweep, quiet: false, by })
        }
        false if saved.asked.is_some() => {
            return refuse("sanitize.asked", 1u8, "nothing is in progress");
        }
        false if (saved.pattern, saved.pass, saved.sweep) == (0, 0, NO_SWEEP) => None,
        false => return refuse("sanitize.running", 0u8, "something is said of what is in progress"),
    };
    Ok(Sanitize { command, outcome, passes: saved.overwrites, running })
}

/// The format that was kept of a namespace, if there is such a one.
fn kept_format(kept: &KeptFormatState) -> Option<BlockFormat> {
    let Some(metadata) = &kept.metadata else {
        return Some(BlockFormat { shift: kept.block_shift, metadata: None })
            .filter(|format| format.index().is_some());
    };
    let &KeptMetadataState { bytes, extended, protection_type, protection_first } = metadata;
    MetadataConfig { bytes, extended, protection_type, protection_first }.format(kept.block_shift)
}

/// What a controller kept that had a place for it.
pub(crate) fn load_kept(pool: &Pool, admin: &mut Admin, kept: &KeptState) -> Result<(), Error> {
    let features = saved_features(&kept.features, pool.shared.config.vectors)?;
    let (mut firmware, _) = firmware(&kept.firmware)?;
    // A power cycle is a reset: it activates what was committed for one, and nothing that was only downloaded survives it.
    firmware.reset();
    for &nsid in kept.protected.iter().chain(&kept.permanent) {
        // A namespace that is not there any more takes its protection along.
        if nsid == 0 || nsid as usize > admin.namespaces.len() {
            return refuse("protected", nsid, "it is not a namespace identifier");
        }
    }
    if let Some(kept) = kept.formats.iter().find(|kept| kept_format(kept).is_none()) {
        return refuse("formats.block_shift", kept.block_shift, "no format has such blocks");
    }
    admin.saved_features = features.clone();
    admin.features = features;
    admin.apply_features(&pool.shared);
    pool.shared.write_cache.store(admin.features.write_cache, Ordering::Release);
    admin.apply_features(&pool.shared);
    // A subsystem with a store knows that of its namespaces, and which of those that ever had an identifier it was.
    let knows_better = pool.shared.subsystem.is_managed();
    admin.change_namespaces(pool, NSID_BROADCAST, |namespace| {
        let nsid = namespace.nsid;
        if knows_better {
            return;
        }
        let kept_format = kept.formats.iter().find(|kept| kept.nsid == nsid).and_then(kept_format);
        if let Some(format) = kept_format.filter(|format| namespace.can_have(format)) {
            namespace.set_format(&format);
        }
        if kept.permanent.contains(&nsid) {
            namespace.protect(WriteProtection::Permanent);
        } else if kept.protected.contains(&nsid) {
            namespace.protect(WriteProtection::Protected);
        }
    });
    // What was done of a pass when it was kept is not known to be on stable storage.
    let again = SweepState { nsid: 1, offset_bytes: 0, ..kept.sanitize.sweep };
    let begins_again =
        SanitizeState { sweep: if kept.sanitize.running { again } else { NO_SWEEP }, ..kept.sanitize };
    let sanitize = sanitize(admin, &begins_again, pool.shared.controller_id)?;
    let events = event_log(&kept.persistent_events)?;
    {
        // All controllers have kept the same, and a subsystem that has been on since has newer.
        let common = &mut *admin.common.lock();
        if !std::mem::replace(&mut common.powered_on, true) {
            (common.firmware, common.sanitize, common.events) = (firmware, sanitize, events);
        }
    }
    admin.self_test = self_test(admin, &kept.self_test)?;
    admin.self_test.running = None;
    persistent_events(admin, &kept.persistent_events, Instant::now())?;
    admin.persistent.context = None;
    refuse_again(pool, admin);
    Ok(())
}

fn saved_features(saved: &SavedFeaturesState, vectors: u16) -> Result<Features, Error> {
    check_hint("features.saved.workload_hint", saved.workload_hint)?;
    check_config("features.saved.sanitize_config", saved.sanitize_config)?;
    let reserved = [
        ("features.saved.interrupt_coalescing", saved.interrupt_coalescing, 0xffff),
        ("features.saved.write_atomicity", saved.write_atomicity, 1),
        ("features.saved.async_events", saved.async_events, ASYNC_EVENT_BITS),
    ];
    for (field, value, known) in reserved {
        if value & !known != 0 {
            return refuse(field, value, "it has reserved bits set");
        }
    }
    Ok(Features {
        arbitration: saved.arbitration,
        workload_hint: saved.workload_hint.into(),
        over_temperature_kelvin: saved.over_temperature_kelvin,
        under_temperature_kelvin: saved.under_temperature_kelvin,
        write_cache: saved.write_cache,
        interrupt_coalescing: saved.interrupt_coalescing,
        write_atomicity: saved.write_atomicity,
        async_events: saved.async_events,
        sanitize_config: saved.sanitize_config.into(),
        ..Features::new(vectors)
    })
}

fn check_hint(field: &str, value: u8) -> Result<(), Error> {
    match u32::from(value) & !WORKLOAD_HINT {
        0 => Ok(()),
        _ => refuse(field, value, "it is not a workload hint"),
    }
}

fn check_config(field: &str, value: u8) -> Result<(), Error> {
    if value > 1 { refuse(field, value, "it has reserved bits set") } else { Ok(()) }
}

fn firmware(state: &FirmwareState) -> Result<(Firmware, Staging), Error> {
    let slots = 1u16 << SLOTS;
    if u16::from(state.present) >= slots {
        return refuse("firmware.present", state.present, "there are 7 slots");
    }
    let present = |slot: u8| slot != 0 && u16::from(state.present) << 1 >> slot & 1 == 1;
    if state.active > SLOTS as u8 || !present(state.active) {
        return refuse("firmware.active", state.active, "there is no image in that slot");
    }
    if state.next > SLOTS as u8 || state.next != 0 && !present(state.next) {
        return refuse("firmware.next", state.next, "there is no image in that slot");
    }
    if !is_revision(&state.running) {
        return refuse("firmware.running", state.running[0], "it is not a firmware revision");
    }
    let mut revisions = [None; SLOTS];
    for (slot, (place, revision)) in (1..).zip(revisions.iter_mut().zip(&state.revisions)) {
        let expected = if present(slot) { is_revision(revision) } else { *revision == [0; 8] };
        if !expected {
            return refuse("firmware.revisions", slot, "it is not a firmware revision, or of no image");
        }
        *place = present(slot).then_some(*revision);
    }
    let granules: Vec<bool> = (0..state.granules.len()).map(|index| state.granules.get(index)).collect();
    if granules.last() == Some(&false) || state.staged.len() != granules.len() * GRANULARITY_BYTES {
        return refuse("firmware.staged_bytes", state.staged_bytes, "it is not what was downloaded");
    }
    for (granule, bytes) in granules.iter().zip(state.staged.chunks(GRANULARITY_BYTES)) {
        if !granule && bytes.iter().any(|&byte| byte != 0) {
            return refuse("firmware.staged", bytes[0], "it was not downloaded");
        }
    }
    let staging = Staging { bytes: state.staged.clone(), granules };
    let (active, next, running) = (state.active, state.next, state.running);
    Ok((Firmware { revisions, active, next, running }, staging))
}
