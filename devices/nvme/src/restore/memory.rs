//! The registers of the controller memory buffer and of the persistent memory region, whose contents come with RAM.

use super::refuse;
use crate::Error;
use crate::admin::Pool;
use crate::pmr::ERROR_NOT_DURABLE;
use crate::state::{BufferState, RegionState};
use crate::window::{CMBMSC_BITS, PMRMSC_BITS};

pub(super) fn load_buffer(pool: &Pool, state: Option<&BufferState>) -> Result<(), Error> {
    let Some(BufferState { control }) = state.cloned() else { return Ok(()) };
    if control == 0 || control & !CMBMSC_BITS != 0 || pool.shared.windows.buffer_bytes() == 0 {
        let reason = "it is 0, has reserved bits set, or there is no controller memory buffer here";
        return refuse("buffer.control", control, reason);
    }
    pool.shared.registers().spaces.set_buffer(control);
    Ok(())
}

/// After the buffer, which it may have come before.
pub(super) fn load_region(pool: &Pool, state: Option<&RegionState>) -> Result<(), Error> {
    let Some(&RegionState { enabled, memory_space, is_first, error }) = state else { return Ok(()) };
    let shared = &pool.shared;
    if !shared.region.exists() || !enabled && memory_space == 0 && error == 0 {
        let reason = "it is as at first, or there is no persistent memory region here";
        return refuse("region.enabled", enabled, reason);
    }
    if memory_space & !PMRMSC_BITS != 0 {
        return refuse("region.memory_space", memory_space, "it has reserved bits set");
    }
    if !matches!(error, 0 | ERROR_NOT_DURABLE) {
        return refuse("region.error", error, "there is no such error");
    }
    if !shared.registers().spaces.load_region(memory_space, is_first) {
        return refuse("region.is_first", is_first, "it does not overlap the controller memory buffer");
    }
    shared.region.load(enabled, error);
    Ok(())
}
