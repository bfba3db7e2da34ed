//! The machine's state as sections of a stream: in which order they are read and set. Which there are stands in `devices`.

use std::sync::OnceLock;

use anyhow::{Context, ensure};
use engine::SaveFor;
use stream::{DeviceSection, Expected, RamBlock, SectionSet};
use vmstate::Schema;

use super::chipset::Chipset;
use super::devices::Devices;
use super::{Machine, Resources};
use crate::config::MachineSpec;
use crate::kvm::{GuestTime, HostTime, is_same_tsc_frequency};
use crate::vcpu::Requirements;

/// Name and description of every kind of section, for the hello: a hash each. They are computed once, which takes the better part of a
/// millisecond.
#[must_use]
pub fn schema_hashes() -> &'static [(&'static str, u64)] {
    static HASHES: OnceLock<Vec<(&'static str, u64)>> = OnceLock::new();
    HASHES.get_or_init(|| schemas().into_iter().map(|(name, schema)| (name, schema.hash())).collect())
}

/// Name and description of every kind of section.
#[must_use]
pub fn schemas() -> Vec<(&'static str, Schema)> {
    Devices::new(0, 0, Vec::new()).schemas()
}

impl Devices {
    /// Those of the machine of `spec`, on `resources`.
    pub(super) fn of(spec: &MachineSpec, resources: &Resources) -> Self {
        let serials = spec.controllers.iter().map(|controller| &controller.serial);
        let firsts = serials.zip(resources.disks()).filter(|(_, disk)| disk.is_first());
        let images = firsts.flat_map(|(serial, disk)| {
            let images = disk.subsystem.images();
            images
                .into_iter()
                .map(move |(nsid, image)| (format!("nvme.{serial}.ns.{nsid}"), image.migratability()))
        });
        Self::new(spec.cpus.into(), spec.controllers.len(), images.collect())
    }
}

impl Machine {
    /// The sections that the machine of `spec` consists of, and its RAM `blocks`.
    #[must_use]
    pub fn expected(spec: &MachineSpec, blocks: Vec<RamBlock>) -> Expected {
        let devices = Devices::new(spec.cpus.into(), spec.controllers.len(), Vec::new());
        devices.expect(Expected::new(blocks))
    }

    /// Reads the state of everything, while the guest is stopped: devices first, then the vCPUs with their local APICs,
    /// into which the devices' last interrupts have gone.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn save(&self, purpose: SaveFor) -> anyhow::Result<Vec<DeviceSection>> {
        // Every field is named, so that a new one is thought of here: threads and interrupt routes are made anew, RAM and images
        // move in their own ways, and what was noted for a snapshot ends here.
        let Self {
            vcpus: processors,
            keeper: _,
            io_threads: _,
            disks: controllers,
            entropy: rng,
            chipset,
            router: _,
            vm,
            resources: _,
            devices,
            noted: _,
            is_held: _,
        } = self;
        let Chipset { buses: _, root, serial: uart, rtc: cmos, acpi_pm: power, _i8042: _ } = chipset;
        let Devices {
            serial,
            rtc,
            acpi_pm,
            i8042: _,
            pci,
            entropy,
            disks,
            images: _,
            irqchip,
            pit,
            vcpus,
            clock,
        } = devices;

        let mut sections = vec![
            serial.save(purpose, &uart.save()),
            rtc.save(purpose, &cmos.save()),
            acpi_pm.save(purpose, &power.save()),
            pci.save(purpose, &root.save()),
            entropy.save(purpose, &rng.device().save()),
        ];
        sections.extend(disks.save(purpose, controllers.iter().map(|disk| disk.controller().save())));
        sections.push(irqchip.save(purpose, &vm.save_irqchip()?));
        sections.push(pit.save(purpose, &vm.save_pit()?));
        sections.extend(vcpus.save(purpose, processors.save_states()?));
        sections.push(clock.save(purpose, &vm.save_clock(processors.tsc_khz())?));
        Ok(sections)
    }

    /// Checks all sections, then sets the state of devices, chips and vCPUs. Guest memory is complete. Nothing runs yet.
    ///
    /// # Errors
    /// A section is missing, unknown or double, or its state is not one of this machine; says which. The machine is of no
    /// use then.
    pub fn load(&self, mut set: SectionSet, time: GuestTime) -> anyhow::Result<()> {
        let Devices {
            serial,
            rtc,
            acpi_pm,
            i8042: _,
            pci,
            entropy,
            disks,
            images: _,
            irqchip,
            pit,
            vcpus,
            clock,
        } = &self.devices;
        // Everything becomes plain state before anything is changed.
        let serial = serial.load(&mut set)?;
        let rtc = rtc.load(&mut set)?;
        let acpi_pm = acpi_pm.load(&mut set)?;
        let pci = pci.load(&mut set)?;
        let entropy = entropy.load(&mut set)?;
        let disks = disks.load(&mut set)?;
        let irqchip = irqchip.load(&mut set)?;
        let pit = pit.load(&mut set)?;
        let vcpus = vcpus.load(&mut set)?;
        let clock = clock.load(&mut set)?;
        let tsc_khz = self.vcpus.tsc_khz();
        ensure!(
            is_same_tsc_frequency(clock.tsc_khz, tsc_khz),
            "the guest's time stamp counter runs at {} kHz, but at {tsc_khz} kHz here",
            clock.tsc_khz
        );
        // A live guest's was compared before it came, and set; one out of a file brings it only now.
        let seen = self.resources.seen_cpuid().unwrap_or_default();
        let brings_cpuid = !seen.iter().eq(vcpus.iter().map(|vcpu| &vcpu.cpuid));
        if brings_cpuid {
            let cpuid = vcpus.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
            let unmet = Requirements { cpuid, ..Default::default() }.unmet(self.offer());
            ensure!(
                unmet.is_empty(),
                "the guest has seen a processor that this host cannot be: {}",
                unmet.join("; ")
            );
        }

        // Until the guest runs: see `settle_interrupts`.
        self.router.defer();
        for (disk, state) in self.disks.iter().zip(&disks) {
            disk.load(state).with_context(|| format!("cannot load controller {}", disk.serial()))?;
        }
        self.entropy.restore(&entropy)?;
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
        if brings_cpuid {
            self.resources.keep_cpuid(self.vcpus.cpuid()?);
        }
        Ok(())
    }
}
