//! What a destination must have to take a guest over: compared before any memory moves.

use engine::Description;

use super::ram_blocks;
use crate::kvm::is_same_tsc_frequency;
use crate::machine::{Machine, TSC_KHZ, schema_hashes};
use crate::memory::GuestRam;

/// The machine model; it changes when two machines of the same configuration are no longer alike.
const MACHINE_TYPE: &str = "ferry-1";

/// The inventory of `machine`.
///
/// # Errors
/// KVM does not tell.
pub fn describe(machine: &Machine) -> anyhow::Result<Description> {
    let mut description = Description::new();
    description.set("machine", MACHINE_TYPE);
    describe_ram(&mut description, machine.resources().ram());
    machine.describe(&mut description)?;
    for (section, hash) in schema_hashes() {
        description.set(format!("state.{section}"), format!("{hash:016x}"));
    }
    Ok(description)
}

/// Every reason why a guest of `source` cannot run on `own`, this host's machine.
#[must_use]
pub fn differences(source: &Description, own: &Description) -> Vec<String> {
    let tsc_khz = |description: &Description| description.get(TSC_KHZ).and_then(|khz| khz.parse().ok());
    let mut source = source.clone();
    if let (Some(theirs), Some(ours)) = (tsc_khz(&source), tsc_khz(own))
        && is_same_tsc_frequency(theirs, ours)
    {
        source.set(TSC_KHZ, ours);
    }
    source.differences(own)
}

fn describe_ram(description: &mut Description, ram: &GuestRam) {
    description.add_ram(&ram_blocks(ram));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_stamp_counters_are_compared_as_exactly_as_they_are_known() {
        let machine = |tsc_khz: &str, cpus: u32| {
            let mut description = Description::new();
            description.set(TSC_KHZ, tsc_khz);
            description.set("cpus", cpus);
            description
        };
        let own = machine("2000000", 2);
        for close in ["2000000", "2000003", "1999990"] {
            assert!(differences(&machine(close, 2), &own).is_empty(), "{close}");
        }
        for (other, cpus, reasons) in [("2100000", 2, 1), ("2000003", 1, 1), ("fast", 1, 2)] {
            let found = differences(&machine(other, cpus), &own);
            assert_eq!(found.len(), reasons, "{found:?}");
        }
    }
}
