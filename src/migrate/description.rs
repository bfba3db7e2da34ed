//! What a destination must have to take a guest over: compared before any memory moves.

use engine::{Description, HOST, is_same_host};

use super::{processor, ram_blocks};
use crate::kvm::{boot_id, is_same_tsc_frequency};
use crate::machine::{Machine, TSC_KHZ, schema_hashes};
use crate::memory::GuestRam;
use crate::vcpu::Offer;

/// The machine model; it changes when two machines of the same configuration are no longer alike.
const MACHINE_TYPE: &str = "ferry-1";
/// What names of identities that are true on one host end with.
const IMAGE: &str = ".image";

/// The inventory of `machine`.
///
/// # Errors
/// KVM does not tell.
pub fn describe(machine: &Machine) -> anyhow::Result<Description> {
    let mut description = Description::new();
    description.set("machine", MACHINE_TYPE);
    describe_ram(&mut description, machine.resources().ram());
    machine.describe(&mut description)?;
    processor::describe(&mut description, &machine.requirements()?);
    for (section, hash) in schema_hashes() {
        description.set(format!("state.{section}"), format!("{hash:016x}"));
    }
    // Until it boots again.
    description.set(HOST, engine::lease::show_id(&boot_id()?));
    Ok(description)
}

/// Every reason why a guest of `source` cannot run on `own`, this host's machine, whose host has `offer` for its vCPUs: those of
/// the processor first, then those of identities, then all others.
#[must_use]
pub fn differences(source: &Description, own: &Description, offer: &Offer) -> Vec<String> {
    let tsc_khz = |description: &Description| description.get(TSC_KHZ).and_then(|khz| khz.parse().ok());
    let (mut source, mut own) = (source.clone(), own.clone());
    let mut reasons = processor::differences(&mut source, &mut own, offer);
    if let (Some(theirs), Some(ours)) = (tsc_khz(&source), tsc_khz(&own))
        && is_same_tsc_frequency(theirs, ours)
    {
        source.set(TSC_KHZ, ours);
    }
    reasons.extend(other_identities(&source.take_identities(), &own.take_identities()));
    reasons.extend(source.differences(&own));
    reasons
}

/// Namespaces and images that are others than those of the source. What one side does not tell (an older process, or one for whose image
/// there is nothing to be told) is not compared. Which file an image is means something on the host alone: two hosts know a shared image
/// by different numbers.
fn other_identities(source: &Description, own: &Description) -> Vec<String> {
    let same_host = is_same_host(source, own);
    let differing = source.iter().filter_map(|(name, theirs)| {
        let ours = own.get(name).filter(|ours| *ours != theirs && name != HOST)?;
        let (_, plain) = name.split_once('.').filter(|_| same_host || !name.ends_with(IMAGE))?;
        Some(format!("{plain}: the source has {theirs}, the destination {ours}"))
    });
    differing.collect()
}

fn describe_ram(description: &mut Description, ram: &GuestRam) {
    description.add_ram(&ram_blocks(ram));
    for block in ram.blocks() {
        if let Some(start) = block.guest_base {
            description.set(format!("ram.{}.start", block.name), format!("{start:#x}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::{CpuidLeaf, Requirements};

    /// A guest with AVX-512 on a host that has everything but, in a machine that differs in all else too.
    #[test]
    fn every_reason_comes_at_once() {
        let machine = |ebx, msrs: &[u32], other: &[(&str, &str)]| {
            let mut description = Description::new();
            let leaf = CpuidLeaf { function: 7, ebx, ..Default::default() };
            let requirements =
                Requirements { cpuid: vec![vec![leaf]], msrs: msrs.to_vec(), ..Default::default() };
            processor::describe(&mut description, &requirements);
            other.iter().for_each(|(name, value)| description.set(*name, value));
            description
        };
        let source = machine(
            1 << 16 | 1 << 5,
            &[0x48, 0x277],
            &[("cpus", "1"), (TSC_KHZ, "3000000"), ("nvme.a.queues", "8"), ("ram.ram-low.length_bytes", "9")],
        );
        let own = machine(
            1 << 5 | 1 << 8,
            &[0x277],
            &[("cpus", "1"), (TSC_KHZ, "2000000"), ("nvme.a.queues", "4"), ("ram.ram-low.length_bytes", "5")],
        );
        let leaf = CpuidLeaf { function: 7, ebx: 1 << 5 | 1 << 8, ..Default::default() };
        let offer = Offer { cpuid: vec![leaf], msrs: vec![0x277], ..Default::default() };
        assert_eq!(
            differences(&source, &own, &offer),
            [
                "CPU: the source's guest has avx512f, which the destination's host lacks",
                "CPU: the source's guest has the MSRs IA32_SPEC_CTRL (0x48), which KVM at the destination has not",
                "tsc_khz: the source has 3000000, the destination 2000000",
                "nvme.a.queues: the source has 8, the destination 4",
                "ram.ram-low.length_bytes: the source has 9, the destination 5",
            ]
        );
        let more =
            Offer { cpuid: vec![CpuidLeaf { function: 7, ebx: u32::MAX, ..Default::default() }], ..offer };
        let same = machine(1 << 16, &[0x277], &[("cpus", "1")]);
        let other = machine(0, &[], &[("cpus", "1")]);
        assert_eq!(
            differences(&same, &other, &more),
            Vec::<String>::new(),
            "a host that has more is good enough"
        );
    }

    #[test]
    fn other_images_of_one_host_and_other_namespaces_of_any_are_told() {
        let machine = |properties: &[(&str, &str)]| {
            let mut description = Description::new();
            properties.iter().for_each(|(name, value)| description.set(*name, value));
            description
        };
        let (image, uuid) = ("identity.nvme.a.ns.7.image", "identity.nvme.a.ns.7.uuid");
        let source = machine(&[("cpus", "2"), (HOST, "1"), (image, "device 8:1, inode 5"), (uuid, "aa")]);
        let reasons = |own: &[(&str, &str)]| differences(&source, &machine(own), &Offer::default());
        let other = [("cpus", "1"), (image, "device 8:1, inode 6"), (uuid, "bb")];
        assert_eq!(
            reasons(&[&other[..], &[(HOST, "1")]].concat()),
            [
                "nvme.a.ns.7.image: the source has device 8:1, inode 5, the destination device 8:1, inode 6",
                "nvme.a.ns.7.uuid: the source has aa, the destination bb",
                "cpus: the source has 2, the destination 1",
            ]
        );
        let elsewhere = reasons(&[&other[..], &[(HOST, "2")]].concat());
        assert_eq!((elsewhere.len(), elsewhere[0].contains(".uuid: ")), (2, true), "{elsewhere:?}");
        assert_eq!(reasons(&other).len(), 2, "a host that does not say which it is may be another");
        assert!(reasons(&[("cpus", "2")]).is_empty(), "an older destination knows of none");
        let older = machine(&[("cpus", "2")]);
        assert!(differences(&older, &source, &Offer::default()).is_empty(), "nor does an older source");
    }

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
            assert!(differences(&machine(close, 2), &own, &Offer::default()).is_empty(), "{close}");
        }
        for (other, cpus, reasons) in [("2100000", 2, 1), ("2000003", 1, 1), ("fast", 1, 2)] {
            let found = differences(&machine(other, cpus), &own, &Offer::default());
            assert_eq!(found.len(), reasons, "{found:?}");
        }
    }
}
