//! What a destination must have to take a guest over: compared before any memory moves.

use engine::Description;

use super::ram_blocks;
use crate::machine::{Machine, schema_hashes};
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

fn describe_ram(description: &mut Description, ram: &GuestRam) {
    description.add_ram(&ram_blocks(ram));
}
