//! The machine's state as sections of a stream: which there are, in which order they are read and set.

use anyhow::{Context, ensure};
use engine::SaveFor;
use nvme::NvmeState;
use stream::{DeviceSection, Expected, RamBlock, SectionSet};
use virtio::VirtioState;
use vmstate::{Schema, VmState};

use super::{ENTROPY_SLOT, FIRST_DISK_SLOT, Machine};
use crate::config::MachineSpec;
use crate::kvm::{ClockState, GuestTime, HostTime, IrqchipState, PitState, is_same_tsc_frequency};
use crate::vcpu::VcpuState;

fn section<T: VmState>(
    purpose: SaveFor,
    name: impl Into<String>,
    instance_id: u32,
    state: &T,
) -> DeviceSection {
    match purpose {
        SaveFor::Connection => DeviceSection::save_bare(name, instance_id, state),
        SaveFor::File => DeviceSection::save(name, instance_id, state),
    }
}

/// Name and description of every kind of section, for the hello: a hash each.
#[must_use]
pub fn schema_hashes() -> Vec<(&'static str, u64)> {
    schemas().into_iter().map(|(name, schema)| (name, schema.hash())).collect()
}

/// Name and description of every kind of section.
#[must_use]
pub fn schemas() -> Vec<(&'static str, Schema)> {
    vec![
        ("clock", vmstate::schema::<ClockState>()),
        ("cpu", vmstate::schema::<VcpuState>()),
        ("irqchip", vmstate::schema::<IrqchipState>()),
        ("pit", vmstate::schema::<PitState>()),
        ("serial", vmstate::schema::<legacy::SerialState>()),
        ("rtc", vmstate::schema::<legacy::RtcState>()),
        ("acpi-pm", vmstate::schema::<legacy::AcpiPmState>()),
        ("pci", vmstate::schema::<pci::RootBusState>()),
        ("virtio-rng", vmstate::schema::<VirtioState>()),
        ("nvme", vmstate::schema::<NvmeState>()),
    ]
}

fn entropy_section() -> String {
    format!("0000:00:{ENTROPY_SLOT:02x}.0/virtio-rng")
}

fn disk_section(index: usize) -> String {
    format!("0000:00:{:02x}.0/nvme", usize::from(FIRST_DISK_SLOT) + index)
}

impl Machine {
    /// The sections that the machine of `spec` consists of, and its RAM `blocks`.
    #[must_use]
    pub fn expected(spec: &MachineSpec, blocks: Vec<RamBlock>) -> Expected {
        let mut expected = Expected::new(blocks)
            .section::<legacy::SerialState>("serial", 0)
            .section::<legacy::RtcState>("rtc", 0)
            .section::<legacy::AcpiPmState>("acpi-pm", 0)
            .section::<pci::RootBusState>("pci", 0)
            .section::<VirtioState>(entropy_section(), 0)
            .section::<IrqchipState>("irqchip", 0)
            .section::<PitState>("pit", 0)
            .section::<ClockState>("clock", 0);
        for index in 0..spec.controllers.len() {
            expected = expected.section::<NvmeState>(disk_section(index), 0);
        }
        (0..spec.cpus).fold(expected, |expected, vcpu| expected.section::<VcpuState>("cpu", vcpu.into()))
    }

    /// Reads the state of everything, while the guest is stopped: devices first, then the vCPUs with their local APICs,
    /// into which the devices' last interrupts have gone.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn save(&self, purpose: SaveFor) -> anyhow::Result<Vec<DeviceSection>> {
        let chipset = &self.chipset;
        let mut sections = vec![
            section(purpose, "serial", 0, &chipset.serial.save()),
            section(purpose, "rtc", 0, &chipset.rtc.save()),
            section(purpose, "acpi-pm", 0, &chipset.acpi_pm.save()),
            section(purpose, "pci", 0, &chipset.root.save()),
        ];
        sections.push(section(purpose, entropy_section(), 0, &self.entropy.device().save()));
        for (index, disk) in self.disks.iter().enumerate() {
            sections.push(section(purpose, disk_section(index), 0, &disk.controller().save()));
        }
        sections.push(section(purpose, "irqchip", 0, &self.vm.save_irqchip()?));
        sections.push(section(purpose, "pit", 0, &self.vm.save_pit()?));
        for (instance_id, state) in (0..).zip(self.vcpus.save_states()?) {
            sections.push(section(purpose, "cpu", instance_id, &state));
        }
        sections.push(section(purpose, "clock", 0, &self.vm.save_clock(self.vcpus.tsc_khz()?)?));
        Ok(sections)
    }

    /// Checks all sections, then sets the state of devices, chips and vCPUs. Guest memory is complete. Nothing runs yet.
    ///
    /// # Errors
    /// A section is missing, unknown or double, or its state is not one of this machine; says which. The machine is of no
    /// use then.
    pub fn load(&self, mut set: SectionSet, time: GuestTime) -> anyhow::Result<()> {
        // Everything becomes plain state before anything is changed.
        let serial: legacy::SerialState = set.take("serial", 0)?;
        let rtc: legacy::RtcState = set.take("rtc", 0)?;
        let acpi_pm: legacy::AcpiPmState = set.take("acpi-pm", 0)?;
        let pci: pci::RootBusState = set.take("pci", 0)?;
        let entropy: VirtioState = set.take(&entropy_section(), 0)?;
        let disks = (0..self.disks.len())
            .map(|index| set.take(&disk_section(index), 0))
            .collect::<Result<Vec<NvmeState>, _>>()?;
        let irqchip = set.take("irqchip", 0)?;
        let pit = set.take("pit", 0)?;
        let vcpus = (0..self.vcpus.count())
            .map(|vcpu| set.take("cpu", vcpu))
            .collect::<Result<Vec<VcpuState>, _>>()?;
        let clock: ClockState = set.take("clock", 0)?;
        let tsc_khz = self.vcpus.tsc_khz()?;
        ensure!(
            is_same_tsc_frequency(clock.tsc_khz, tsc_khz),
            "the guest's time stamp counter runs at {} kHz, but at {tsc_khz} kHz here",
            clock.tsc_khz
        );

        let routes = self.router.hold();
        for (disk, state) in self.disks.iter().zip(&disks) {
            disk.load(state).with_context(|| format!("cannot load controller {}", disk.serial()))?;
        }
        self.entropy.restore(&entropy)?;
        routes.commit()?;
        self.vm.restore_irqchip(&irqchip)?;
        self.vm.restore_pit(&pit)?;
        // After the functions, whose BARs it maps; after the interrupt controllers, since a waiting serial interrupt is raised again.
        let chipset = &self.chipset;
        chipset.root.restore(&pci)?;
        chipset.serial.restore(&serial)?;
        chipset.rtc.restore(&rtc)?;
        chipset.acpi_pm.restore(&acpi_pm)?;
        let plan = clock.plan(&HostTime::now()?, time)?;
        self.vm.restore_clock(&plan)?;
        self.vcpus.restore_states(&vcpus, plan.tsc_shift)?;
        Ok(())
    }
}
