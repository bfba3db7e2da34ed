//! The devices of a machine: each stands here once, with its sections and what becomes of it when the machine moves.
//!
//! What is saved, loaded, expected and printed, and what keeps a machine from moving, all come from this table. It is bound to
//! the machine itself by the two functions that name every field of both ([`Machine::save`](super::Machine::save) and
//! [`Machine::load`](super::Machine::load)): a device that is owned and not listed, or listed and not saved, does not compile.

use std::marker::PhantomData;

use engine::SaveFor;
use legacy::{AcpiPmState, RtcState, SerialState};
use nvme::NvmeState;
use pci::RootBusState;
use stream::{DeviceSection, Expected, SectionSet};
use virtio::VirtioState;
use vmstate::{Migratability, Schema, VmState};

use super::{ENTROPY_SLOT, FIRST_DISK_SLOT};
use crate::kvm::{ClockState, IrqchipState, PitState};
use crate::vcpu::VcpuState;

/// What the table asks of a row.
trait Row {
    /// The devices of the row by name, and what becomes of each.
    fn devices(&self) -> Vec<(String, Migratability)>;

    /// What the sections of the row hold, if it has any.
    fn schema(&self) -> Option<(&'static str, Schema)>;

    /// Adds the sections of the row.
    fn expect(&self, expected: Expected) -> Expected;
}

/// A device that has a state, and its section.
pub struct One<T> {
    kind: &'static str,
    name: String,
    state: PhantomData<fn() -> T>,
}

impl<T: VmState> One<T> {
    fn new(kind: &'static str, name: impl Into<String>) -> Self {
        Self { kind, name: name.into(), state: PhantomData }
    }

    /// The section of `state`.
    pub fn save(&self, purpose: SaveFor, state: &T) -> DeviceSection {
        section(purpose, &self.name, 0, state)
    }

    /// Takes the state out of what arrived.
    ///
    /// # Errors
    /// It is missing or does not load.
    pub fn load(&self, set: &mut SectionSet) -> Result<T, stream::Error> {
        set.take(&self.name, 0)
    }
}

impl<T: VmState> Row for One<T> {
    fn devices(&self) -> Vec<(String, Migratability)> {
        vec![(self.name.clone(), Migratability::State)]
    }

    fn schema(&self) -> Option<(&'static str, Schema)> {
        Some((self.kind, vmstate::schema::<T>()))
    }

    fn expect(&self, expected: Expected) -> Expected {
        expected.section::<T>(&self.name, 0)
    }
}

/// Devices of one kind that have a state, and a section each.
pub struct Each<T> {
    kind: &'static str,
    /// Name and instance.
    sections: Vec<(String, u32)>,
    state: PhantomData<fn() -> T>,
}

impl<T: VmState> Each<T> {
    fn new(kind: &'static str, sections: impl Iterator<Item = (String, u32)>) -> Self {
        Self { kind, sections: sections.collect(), state: PhantomData }
    }

    /// The sections of `states`, one for each device.
    pub fn save(
        &self,
        purpose: SaveFor,
        states: impl IntoIterator<Item = T>,
    ) -> impl Iterator<Item = DeviceSection> {
        self.sections
            .iter()
            .zip(states)
            .map(move |((name, instance_id), state)| section(purpose, name, *instance_id, &state))
    }

    /// Takes the state of each device out of what arrived.
    ///
    /// # Errors
    /// One is missing or does not load; says which.
    pub fn load(&self, set: &mut SectionSet) -> Result<Vec<T>, stream::Error> {
        self.sections.iter().map(|(name, instance_id)| set.take(name, *instance_id)).collect()
    }
}

impl<T: VmState> Row for Each<T> {
    fn devices(&self) -> Vec<(String, Migratability)> {
        let name = |(name, instance_id): &(String, u32)| match instance_id {
            0 => name.clone(),
            _ => format!("{name} {instance_id}"),
        };
        self.sections.iter().map(|section| (name(section), Migratability::State)).collect()
    }

    fn schema(&self) -> Option<(&'static str, Schema)> {
        Some((self.kind, vmstate::schema::<T>()))
    }

    fn expect(&self, expected: Expected) -> Expected {
        let sections = self.sections.iter();
        sections.fold(expected, |expected, (name, instance_id)| expected.section::<T>(name, *instance_id))
    }
}

fn section<T: VmState>(purpose: SaveFor, name: &str, instance_id: u32, state: &T) -> DeviceSection {
    match purpose {
        SaveFor::Connection => DeviceSection::save_bare(name, instance_id, state),
        SaveFor::File => DeviceSection::save(name, instance_id, state),
    }
}

/// Devices without a section, and what becomes of each.
pub struct Others(Vec<(String, Migratability)>);

impl Row for Others {
    fn devices(&self) -> Vec<(String, Migratability)> {
        self.0.clone()
    }

    fn schema(&self) -> Option<(&'static str, Schema)> {
        None
    }

    fn expect(&self, expected: Expected) -> Expected {
        expected
    }
}

/// The table.
pub struct Devices {
    pub serial: One<SerialState>,
    pub rtc: One<RtcState>,
    pub acpi_pm: One<AcpiPmState>,
    pub i8042: Others,
    pub pci: One<RootBusState>,
    pub entropy: One<VirtioState>,
    pub disks: Each<NvmeState>,
    /// What the disks' namespaces lie on: it moves as guest RAM or with the images, in no section of its own.
    pub images: Others,
    pub irqchip: One<IrqchipState>,
    pub pit: One<PitState>,
    pub vcpus: Each<VcpuState>,
    pub clock: One<ClockState>,
}

impl Devices {
    /// Those of a machine with so many vCPUs and controllers, and these images.
    #[must_use]
    pub fn new(vcpus: u32, disks: usize, images: Vec<(String, Migratability)>) -> Self {
        let function = |slot: usize, kind: &str| format!("0000:00:{slot:02x}.0/{kind}");
        let slots_of_disks = (usize::from(FIRST_DISK_SLOT)..).take(disks);
        Self {
            serial: One::new("serial", "serial"),
            rtc: One::new("rtc", "rtc"),
            acpi_pm: One::new("acpi-pm", "acpi-pm"),
            i8042: Others(vec![("i8042".to_owned(), Migratability::Stateless)]),
            pci: One::new("pci", "pci"),
            entropy: One::new("virtio-rng", function(ENTROPY_SLOT.into(), "virtio-rng")),
            disks: Each::new("nvme", slots_of_disks.map(|slot| (function(slot, "nvme"), 0))),
            images: Others(images),
            irqchip: One::new("irqchip", "irqchip"),
            pit: One::new("pit", "pit"),
            vcpus: Each::new("cpu", (0..vcpus).map(|vcpu| ("cpu".to_owned(), vcpu))),
            clock: One::new("clock", "clock"),
        }
    }

    /// Every row, in the order in which a schema lists them: KVM's own first.
    fn rows(&self) -> [&dyn Row; 12] {
        let Self { serial, rtc, acpi_pm, i8042, pci, entropy, disks, images, irqchip, pit, vcpus, clock } =
            self;
        [clock, vcpus, irqchip, pit, serial, rtc, acpi_pm, i8042, pci, entropy, disks, images]
    }

    /// Every device by name, and what becomes of it when the machine moves.
    pub fn iter(&self) -> impl Iterator<Item = (String, Migratability)> {
        self.rows().into_iter().flat_map(Row::devices)
    }

    /// Why the machine cannot move: all the reasons, each with its device.
    #[must_use]
    pub fn blockers(&self) -> Vec<String> {
        self.iter().filter_map(|(name, answer)| Some(format!("{name}: {}", answer.blocker()?))).collect()
    }

    /// Name and description of every kind of section.
    #[must_use]
    pub fn schemas(&self) -> Vec<(&'static str, Schema)> {
        self.rows().into_iter().filter_map(Row::schema).collect()
    }

    /// Adds the sections of all devices.
    #[must_use]
    pub fn expect(&self, expected: Expected) -> Expected {
        self.rows().into_iter().fold(expected, |expected, row| row.expect(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_says_what_becomes_of_it() {
        let images = vec![("nvme.a.ns.7".to_owned(), Migratability::Stateless)];
        let devices = Devices::new(2, 1, images);
        let answers: Vec<String> =
            devices.iter().map(|(name, answer)| format!("{name}: {answer:?}")).collect();
        assert_eq!(
            answers,
            [
                "clock: State",
                "cpu: State",
                "cpu 1: State",
                "irqchip: State",
                "pit: State",
                "serial: State",
                "rtc: State",
                "acpi-pm: State",
                "i8042: Stateless",
                "pci: State",
                "0000:00:01.0/virtio-rng: State",
                "0000:00:02.0/nvme: State",
                "nvme.a.ns.7: Stateless",
            ]
        );
        assert!(devices.blockers().is_empty());
    }

    #[test]
    fn every_device_that_cannot_move_is_a_reason_with_its_name() {
        let stuck = |nsid: u32, why| (format!("nvme.a.ns.{nsid}"), Migratability::NonMigratable(why));
        let images = vec![stuck(1, "it is nailed down"), stuck(3, "it is glued on")];
        let blockers = Devices::new(1, 1, images).blockers();
        assert_eq!(blockers, ["nvme.a.ns.1: it is nailed down", "nvme.a.ns.3: it is glued on"]);
    }
}
