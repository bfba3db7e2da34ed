//! What `restore.rs` gives back of the admin commands' own state. What is not there is as in a new controller.

use super::refuse;
use crate::Error;
use crate::admin::{Admin, Pool};
use crate::command::features::{ASYNC_EVENT_BITS, Features, WORKLOAD_HINT};
use crate::firmware::{Firmware, GRANULARITY_BYTES, SLOTS, Staging, is_revision};
use crate::namespace::WriteProtection;
use crate::non_volatile::KeptState;
use crate::state::{FirmwareState, NvmeState, SavedFeaturesState};

pub(super) fn load(pool: &Pool, admin: &mut Admin, state: &NvmeState) -> Result<(), Error> {
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
    if let Some(saved) = &state.firmware {
        admin.firmware = firmware(saved)?;
    }
    for (index, saved) in state.namespaces.present() {
        let Some(saved) = &saved.write_protection else { continue };
        let protection = WriteProtection::from_value(saved.value.into());
        match protection {
            None | Some(WriteProtection::None) => {
                let field = format!("namespaces[{index}].write_protection.value");
                return refuse(field, saved.value, "it is not a write protection");
            }
            Some(protection) => {
                admin.change_namespace(pool, index as u32 + 1, |namespace| namespace.protect(protection));
            }
        }
    }
    Ok(())
}

/// What a controller kept that had a place for it.
pub(crate) fn load_kept(pool: &Pool, admin: &mut Admin, kept: &KeptState) -> Result<(), Error> {
    let features = saved_features(&kept.features, pool.shared.config.vectors)?;
    let mut firmware = firmware(&kept.firmware)?;
    // A power cycle is a reset: it activates what was committed for one, and nothing that was only downloaded survives it.
    firmware.reset();
    for &nsid in kept.protected.iter().chain(&kept.permanent) {
        // A namespace that is not there any more takes its protection along.
        if nsid == 0 || nsid as usize > admin.namespaces.len() {
            return refuse("protected", nsid, "it is not a namespace identifier");
        }
    }
    admin.saved_features = features.clone();
    admin.features = features;
    pool.shared.write_cache.store(admin.features.write_cache, std::sync::atomic::Ordering::Release);
    admin.firmware = firmware;
    for (list, protection) in
        [(&kept.protected, WriteProtection::Protected), (&kept.permanent, WriteProtection::Permanent)]
    {
        for &nsid in list {
            admin.change_namespace(pool, nsid, |namespace| namespace.protect(protection));
        }
    }
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

fn firmware(state: &FirmwareState) -> Result<Firmware, Error> {
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
    Ok(Firmware { revisions, active, next, running, staging })
}
