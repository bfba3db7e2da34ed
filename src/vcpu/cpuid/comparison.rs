//! Whether a host can be the processor that a guest has seen.
//!
//! A guest keeps its CPUID when it moves, so that a host may have more. What it lacks is told all at once, in names. What only
//! describes the processor (model, name, caches, topology) goes with the guest and is no reason.

use super::super::state::CpuidLeaf;
use super::feature::{self, find};

/// Leaves that KVM takes from the processor as they are; what a guest has sized after them must not change: tiles (AMX), and
/// processor trace where the guest has it.
const TAKEN_AS_THEY_ARE: [(u32, u32); 3] = [(0x1d, 0), (0x1d, 1), (0x1e, 0)];
/// Subleaves of 0xd that are components of extended state.
const XSAVE_COMPONENTS: std::ops::Range<u32> = 2..64;

/// Every reason why a guest that has seen `guest` cannot run where `offered` is possible, one sentence each.
#[must_use]
pub fn reasons(guest: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<String> {
    let mut reasons = Vec::new();
    let (theirs, ours) = (vendor(guest), vendor(offered));
    if theirs != ours {
        reasons.push(format!("CPU: the guest's vendor is {theirs}, the destination's {ours}"));
    }
    let lacking = feature::lacking(guest, offered);
    if !lacking.is_empty() {
        let lacking = feature::listed(&lacking);
        reasons.push(format!("CPU: the source's guest has {lacking}, which the destination's host lacks"));
    }
    reasons.extend(address_bits(guest, offered));
    reasons.extend(extended_state(guest, offered));
    reasons.extend(counters(guest, offered));
    for (function, index) in TAKEN_AS_THEY_ARE {
        let registers =
            |leaves| find(leaves, function, index).map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        if let Some(theirs) = registers(guest).filter(|registers| *registers != [0; 4])
            && registers(offered) != Some(theirs)
        {
            reasons.push(format!(
                "CPU: the guest's leaf {function:#x}.{index:#x} is {theirs:x?}, the destination's {:x?}",
                registers(offered).unwrap_or_default()
            ));
        }
    }
    reasons
}

fn vendor(leaves: &[CpuidLeaf]) -> String {
    let Some(leaf) = find(leaves, 0, 0) else { return "unknown".to_owned() };
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
    String::from_utf8_lossy(bytes.as_flattened()).trim_end_matches('\0').to_owned()
}

/// Addresses that the guest may use.
fn address_bits(guest: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<String> {
    let bits =
        |leaves| find(leaves, 0x8000_0008, 0).map_or([0; 2], |leaf| [leaf.eax & 0xff, leaf.eax >> 8 & 0xff]);
    let kinds = ["physical", "linear"].into_iter().zip(bits(guest)).zip(bits(offered));
    kinds
        .filter(|((_, theirs), ours)| theirs > ours)
        .map(|((kind, theirs), ours)| {
            format!("CPU: {kind} addresses have {theirs} bits at the guest, {ours} at the destination")
        })
        .collect()
}

/// Where the processor puts each component of extended state that the guest may enable.
fn extended_state(guest: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<String> {
    let enabled = find(guest, 0xd, 0).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
    let place = |leaves, component| find(leaves, 0xd, component).map(|leaf| (leaf.eax, leaf.ebx));
    XSAVE_COMPONENTS
        .filter(|component| enabled >> component & 1 == 1)
        .filter_map(|component| {
            let (bytes, offset) = place(guest, component)?;
            // That it is not there at all is told by its name.
            let (our_bytes, our_offset) = place(offered, component)?;
            ((bytes, offset) != (our_bytes, our_offset)).then(|| {
                format!(
                    "CPU: XSAVE component {component} has {bytes} bytes at {offset} at the guest, {our_bytes} at {our_offset} at \
                     the destination"
                )
            })
        })
        .collect()
}

/// Performance counters: version, how many, how wide (leaf 0xa).
fn counters(guest: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Option<String> {
    let told =
        |leaves| find(leaves, 0xa, 0).map_or([0; 3], |leaf| [0, 8, 16].map(|shift| leaf.eax >> shift & 0xff));
    let (theirs, ours) = (told(guest), told(offered));
    let [version, count, width] = theirs;
    let fits = theirs.iter().zip(ours).all(|(&theirs, ours)| theirs <= ours);
    (version > 0 && !fits).then(|| {
        let [our_version, our_count, our_width] = ours;
        format!(
            "CPU: the guest has {count} performance counters of version {version} and {width} bits, the destination {our_count} \
             of version {our_version} and {our_width} bits"
        )
    })
}
