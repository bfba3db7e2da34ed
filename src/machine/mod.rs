//! The machine: its parts, how they are put together, and what they are doing.
//!
//! [`Machine::prepare`] makes everything that does not depend on the guest: KVM objects, vCPU threads, I/O threads, devices as a
//! reset leaves them. Then the guest is either booted ([`Machine::boot`]) or taken over from a stream
//! ([`Machine::load`]). A reset drops the machine and prepares a new one on the same [`Resources`].
//!
//! Locks are taken in this order, and none is held while a guest is waited for, except by [`Machine::pause`]:
//! run state (`vmm`) > image access (`block`) > PCI root bus > configuration space > MSI-X table > KVM's route table >
//! doorbells of a disk > memory slots; a controller's persistent memory region > where it is shown > memory slots; a controller's worker > its doorbells of a disk; configuration space > interrupt pin > shared
//! input. Under those of a VM's dirty rings and of what slows vCPUs down no other is taken.

mod buffer;
mod chipset;
mod devices;
mod disk;
mod entropy;
mod passed;
mod resources;
mod run;
mod sections;
mod waiters;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bus::InterruptLine;
use engine::Description;

use crate::boot::{self, BootSpec, Kernel};
use crate::config::{BackendSpec, MachineSpec, NamespaceSpec};
use crate::console::Console;
use crate::control::{AccessScope, AccessState, FerryCpu, FerryDisk};
use crate::dirty::Noted;
use crate::io_thread::IoThread;
use crate::kvm::{Host, IrqLine, MsiRouter, Vm, pci_pins};
use crate::layout;
use crate::subsystem::{Keeper, keeper};
use crate::vcpu::{CpuidLeaf, EventHandler, Offer, Processors, Requirements, VcpuEvent, VcpuManager};
use chipset::Chipset;
use devices::Devices;
use disk::Disk;
use entropy::EntropyDevice;
use resources::open_namespace;

pub use resources::{Nvm, Resources, first_writable_file, try_while_locked};
pub use run::{Action, Refused, RunState};
pub use sections::{schema_hashes, schemas};
pub use waiters::Waiters;

/// How long a stop waits for a controller's commands in flight. A disk that takes longer fails the migration, never the
/// guest.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the removal of a namespace waits for commands that are in flight there.
const REMOVE_PATIENCE: Duration = Duration::from_secs(2);
/// Property of the time stamp counter's frequency, in kHz.
pub const TSC_KHZ: &str = "tsc_khz";
/// The PCI slot of the entropy device; slot 0 is the host bridge.
const ENTROPY_SLOT: u8 = 1;
/// The PCI slot of the first disk.
const FIRST_DISK_SLOT: u8 = 2;

/// What a guest does to its machine.
#[derive(Debug)]
pub enum GuestEvent {
    /// It asks to be reset.
    Reset,
    /// It asks to be powered off.
    PowerOff,
    /// A vCPU cannot go on; why.
    Failed(anyhow::Error),
}

/// Takes guest events, on a vCPU thread: notes them and returns.
pub type EventSink = Arc<dyn Fn(GuestEvent) + Send + Sync>;

/// A virtual machine, built.
pub struct Machine {
    /// Dropped first: nothing below is used by a vCPU any more.
    vcpus: VcpuManager,
    keeper: Keeper,
    /// Dropped before the disks that they serve.
    io_threads: Vec<IoThread>,
    disks: Vec<Disk>,
    entropy: EntropyDevice,
    chipset: Chipset,
    router: Arc<MsiRouter>,
    vm: Arc<Vm>,
    resources: Arc<Resources>,
    /// What becomes of each of them when the machine moves.
    devices: Devices,
    /// Notes what the guest writes since a snapshot, for the next one.
    noted: Noted,
    /// It stands still as [`Machine::hold`] has it.
    is_held: AtomicBool,
}

impl Machine {
    /// Makes everything that does not depend on the guest.
    ///
    /// # Errors
    /// KVM or the process cannot provide a part; says which.
    pub fn prepare(
        spec: &MachineSpec,
        host: &Host,
        resources: Arc<Resources>,
        console: &Console,
        events: &EventSink,
    ) -> anyhow::Result<Self> {
        let vm = Vm::with_tracking(host, spec.dirty_tracking, None)?;
        vm.map_ram(resources.ram())?;
        let router = MsiRouter::new(Arc::clone(&vm));
        let chipset = Chipset::new(&vm, console.output()?, events)?;
        let memory = resources.ram().memory();
        let disks = spec
            .controllers
            .iter()
            .zip(resources.disks())
            .enumerate()
            .map(|(index, (spec_of_disk, nvm))| {
                let memory_of_disk = (resources.buffer(index), resources.region(index));
                Disk::new(spec_of_disk, nvm, memory_of_disk, spec.io_threads, memory, &vm, &router)
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let entropy = EntropyDevice::new(memory, &router)?;
        let io_threads = (0..spec.io_threads)
            .map(|index| IoThread::spawn(&format!("io-{index}")))
            .collect::<Result<Vec<_>, _>>()
            .context("cannot start the I/O threads")?;
        let events = Arc::clone(events);
        let interprets = host.is_paravirtual();
        let on_vcpu_event: EventHandler = Arc::new(move |vcpu, event| {
            events(match event {
                VcpuEvent::Reset => GuestEvent::Reset,
                VcpuEvent::PowerOff => GuestEvent::PowerOff,
                VcpuEvent::Failed(error) => {
                    let error = anyhow::Error::new(error).context(format!("vCPU {vcpu} has stopped"));
                    GuestEvent::Failed(if interprets {
                        error.context(
                            "this host's KVM has no VMX or SVM and knows few instructions of kernels: the guest needs one \
                             made for it, and its command line (see Limits in README.md)",
                        )
                    } else {
                        error
                    })
                }
            });
        });
        chipset.root.insert(ENTROPY_SLOT, Arc::clone(entropy.device()) as _)?;
        let pins = pci_pins(&vm);
        for (slot, disk) in (FIRST_DISK_SLOT..).zip(&disks) {
            let pin = pins.get(usize::from(slot)).context("a slot has a pin")?;
            disk.controller().connect_pin(Arc::clone(pin));
            chipset.root.insert(slot, disk.function())?;
            disk.serve(&io_threads, spec.io_poll)?;
        }
        entropy.serve(io_threads.first().context("a machine has an I/O thread")?)?;
        let processors =
            Processors { count: spec.cpus.into(), model: spec.cpu, seen: resources.seen_cpuid() };
        let vcpus = VcpuManager::new(host, &vm, &processors, &chipset.buses, &on_vcpu_event)?;
        let devices = Devices::of(spec, &resources);
        let kept = disks.iter().filter_map(|disk| {
            disk.directory().map(|directory| (Arc::clone(disk.controller()), Arc::clone(directory)))
        });
        let keeper = Keeper::start(kept.collect(), keeper::INTERVAL)
            .context("cannot start the thread that keeps the state of controllers")?;
        Ok(Self {
            vcpus,
            keeper,
            io_threads,
            is_held: AtomicBool::new(false),
            disks,
            entropy,
            chipset,
            router,
            vm,
            resources,
            devices,
            noted: Noted::default(),
        })
    }

    /// Gives the BARs their addresses and loads the kernel: a guest that can be resumed for the first time.
    ///
    /// # Errors
    /// The kernel or another file cannot be loaded.
    pub fn boot(&self, spec: &MachineSpec) -> anyhow::Result<()> {
        let kernel = spec.kernel.as_deref().context("there is no kernel to boot")?;
        self.chipset.root.assign_bars(layout::PCI_WINDOW_START, layout::PCI_WINDOW_LENGTH_BYTES)?;
        let registers = boot::load(
            self.resources.ram().memory(),
            &BootSpec {
                kernel: Kernel::File(kernel),
                initrd: spec.initrd.as_deref(),
                cmdline: &spec.cmdline,
                tables: spec.tables,
                cpus: spec.cpus,
                protocol: spec.boot_protocol,
            },
        )?;
        Ok(self.vcpus.boot(registers)?)
    }

    /// Gives a guest that was loaded another VM generation ID, and tells it.
    ///
    /// # Errors
    /// Those of [`boot::renew_generation_id`].
    pub fn renew_generation(&self) -> Result<(), boot::Error> {
        boot::renew_generation_id(self.resources.ram().memory())?;
        let event = IrqLine::new(Arc::clone(&self.vm), layout::GENERATION_GSI);
        event.set_level(true);
        event.set_level(false);
        Ok(())
    }

    /// Lets the guest run, which is ours.
    ///
    /// # Errors
    /// A persistent memory region cannot be had, or a vCPU thread does not answer.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.start().map(drop)
    }

    /// As [`Machine::resume`], and says when the last of its vCPUs went.
    ///
    /// # Errors
    /// As [`Machine::resume`].
    pub fn start(&self) -> anyhow::Result<Option<Instant>> {
        self.resources.attach_regions()?;
        for disk in self.disks.iter().rev() {
            disk.controller().reopen();
        }
        self.entropy.device().resume();
        let is_held = self.is_held.swap(false, Ordering::SeqCst);
        let call_devices = || {
            self.disks.iter().for_each(|disk| disk.controller().wake_workers());
            if is_held {
                self.io_threads.iter().for_each(IoThread::go_on);
            }
        };
        Ok(self.vcpus.resume_with(call_devices)?)
    }

    /// Does what a guest that was loaded need not have waited for: from here on its interrupts go the fast way.
    ///
    /// # Errors
    /// KVM does not take the routes; the interrupts arrive all the same.
    pub fn settle_interrupts(&self) -> anyhow::Result<()> {
        Ok(self.router.settle()?)
    }

    /// Has a guest stand still some of whose memory is not here yet, and waits for nobody who waits for that. vCPUs run no further
    /// instruction, and the threads of the devices begin nothing; an instruction or a command that waits for memory goes on to wait,
    /// and is done when that comes, but nothing follows on it.
    ///
    /// # Errors
    /// A vCPU that waits for no memory does not stop in time.
    pub fn hold(&self) -> anyhow::Result<()> {
        self.is_held.store(true, Ordering::SeqCst);
        self.io_threads.iter().for_each(IoThread::hold);
        let waiters = self.resources.waiters();
        Ok(self.vcpus.hold(|thread| waiters.has(thread))?)
    }

    /// Lets a guest run some of whose memory is not here yet: one that was [held](Self::hold), or has not run yet. Waits for nobody who
    /// waits for memory.
    ///
    /// # Errors
    /// As [`Machine::resume`].
    pub fn let_go(&self) -> anyhow::Result<()> {
        if !self.is_held.swap(false, Ordering::SeqCst) {
            return self.resume();
        }
        self.io_threads.iter().for_each(IoThread::go_on);
        Ok(self.vcpus.let_go()?)
    }

    /// Keeps the vCPUs out of the guest for `percent` of the time, until [`Machine::stop_throttling`].
    ///
    /// # Errors
    /// There can be no thread that does it.
    pub fn throttle(&self, percent: u8) -> anyhow::Result<()> {
        Ok(self.vcpus.throttle(percent)?)
    }

    /// Lets the vCPUs run as they can.
    pub fn stop_throttling(&self) {
        self.vcpus.stop_throttling();
    }

    /// How often vCPUs came back from KVM to this process.
    #[must_use]
    pub fn vcpu_exits(&self) -> u64 {
        self.vcpus.exits()
    }

    /// Stops the guest: vCPUs first, then the devices, which finish what is in flight; every interrupt that they raised has
    /// arrived. Returns how many commands were in flight when the stop began.
    ///
    /// # Errors
    /// A vCPU or a disk does not stop in time. What was stopped runs again.
    pub fn pause(&self) -> anyhow::Result<u32> {
        self.halt().inspect_err(|_| {
            if let Err(error) = self.resume() {
                log::error!("after a failed stop, the guest cannot run on: {error:#}");
            }
        })
    }

    /// As [`Machine::pause`], for a guest that is not to run on: what was stopped stays stopped, and another call waits for the
    /// rest. One that was [held](Self::hold), and has all of its memory since, stands still by this as one that was paused.
    ///
    /// # Errors
    /// A vCPU or a disk does not stop in time.
    pub fn halt(&self) -> anyhow::Result<u32> {
        // Before the kick: the disks go on while the vCPUs are on their way out.
        let disks = self.disks.iter().map(|disk| disk.controller().statistics().in_flight);
        let in_flight = disks.fold(0, u32::saturating_add);
        self.vcpus.pause()?;
        let in_flight = in_flight.max(self.pause_devices()?);
        if self.is_held.swap(false, Ordering::SeqCst) {
            // Paused devices need no threads that stand still.
            self.io_threads.iter().for_each(IoThread::go_on);
        }
        Ok(in_flight)
    }

    /// Has the vCPUs leave the guest, which is at its end, and waits for nobody: those that wait for memory that never comes do not
    /// come back.
    ///
    /// # Errors
    /// A vCPU thread is gone.
    pub fn kick_out(&self) -> anyhow::Result<()> {
        Ok(self.vcpus.kick_out()?)
    }

    fn pause_devices(&self) -> anyhow::Result<u32> {
        self.entropy.device().pause();
        let deadline = Instant::now() + PAUSE_PATIENCE;
        let controllers: Vec<&nvme::Controller> =
            self.disks.iter().map(|disk| &**disk.controller()).collect();
        let in_flight = nvme::Controller::pause_all(&controllers, deadline)?.in_flight_at_start;
        self.entropy.flush_interrupts()?;
        for disk in &self.disks {
            disk.flush_interrupts()?;
        }
        Ok(in_flight)
    }

    /// What the vCPUs need of another host that the guest may go to.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn requirements(&self) -> anyhow::Result<Requirements> {
        Ok(self.vcpus.requirements()?)
    }

    /// What this host offers a guest's vCPUs.
    #[must_use]
    pub fn offer(&self) -> &Offer {
        self.vcpus.offer()
    }

    /// Which processor the guest sees.
    #[must_use]
    pub fn processor(&self) -> FerryCpu {
        let seen = self.resources.seen_cpuid();
        self.vcpus.processor(seen.as_ref().and_then(|tables| tables.first()).map(Vec::as_slice))
    }

    /// Gives the vCPUs, which have not run, the CPUID of a guest that is to come, which keeps it over resets too.
    ///
    /// # Errors
    /// It is of another number of vCPUs, or KVM does not take it.
    pub fn adopt(&self, tables: &[Vec<CpuidLeaf>]) -> anyhow::Result<()> {
        self.vcpus.adopt(tables).context("cannot give the vCPUs the CPUID that the guest has seen")?;
        self.resources.keep_cpuid(self.vcpus.cpuid()?);
        Ok(())
    }

    /// What a destination must have too, apart from memory and processors.
    ///
    /// # Errors
    /// KVM does not tell.
    pub fn describe(&self, description: &mut Description) -> anyhow::Result<()> {
        description.set("cpus", self.vcpus.count());
        description.set(TSC_KHZ, self.vcpus.tsc_khz());
        for (slot, disk) in (FIRST_DISK_SLOT..).zip(&self.disks) {
            disk.describe(slot, description);
        }
        Ok(())
    }

    /// What the controllers have done.
    #[must_use]
    pub fn disk_counters(&self) -> Vec<FerryDisk> {
        self.disks.iter().map(Disk::counters).collect()
    }

    /// Why this machine cannot move: all the reasons, each with its device.
    #[must_use]
    pub fn migration_blockers(&self) -> Vec<String> {
        self.devices.blockers()
    }

    /// Writes what the controllers keep without power, where they have a place for it. Done from time to time anyway, and worth it
    /// where something begins or ends.
    pub fn keep_state(&self) {
        self.keeper.keep();
    }

    /// Adds a namespace whose image is a file or nothing at all.
    ///
    /// # Errors
    /// The image cannot be had, or the controller does not take it.
    pub fn add_namespace(&self, serial: &str, spec: &NamespaceSpec) -> anyhow::Result<()> {
        let subsystem = self.disk(serial)?.controller().subsystem();
        let controllers = if spec.attached.is_empty() {
            subsystem.controllers()
        } else {
            let member = |other: &&Disk| Arc::ptr_eq(other.controller().subsystem(), subsystem);
            let id = |serial: &String| {
                let other = self.disks.iter().filter(member).find(|other| other.serial() == serial);
                let other =
                    other.with_context(|| format!("{serial:?} is no controller of that subsystem"))?;
                Ok(other.controller_id())
            };
            spec.attached.iter().map(id).collect::<anyhow::Result<Vec<_>>>()?
        };
        if matches!(spec.backend, BackendSpec::Memory { .. }) {
            bail!("a namespace in memory is part of the machine's RAM, and there from its start or never");
        }
        let config = open_namespace(serial, spec, self.resources.ram())?;
        config.backend.acquire()?;
        Ok(subsystem.add_for(&config, &controllers)?)
    }

    /// Takes a namespace away; says whether its image was let go already.
    ///
    /// # Errors
    /// There is none, or it is the guest's.
    pub fn remove_namespace(&self, serial: &str, nsid: u32) -> anyhow::Result<bool> {
        Ok(self.disk(serial)?.controller().subsystem().remove(nsid, REMOVE_PATIENCE)?)
    }

    /// Lets a namespace grow; returns its size in bytes.
    ///
    /// # Errors
    /// There is none, it is the guest's, or its image has no such size.
    pub fn resize_namespace(&self, serial: &str, nsid: u32, size_bytes: Option<u64>) -> anyhow::Result<u64> {
        Ok(self.disk(serial)?.controller().subsystem().resize(nsid, size_bytes)?)
    }

    /// Sets how a controller gives access to a group of namespaces; returns the group.
    ///
    /// # Errors
    /// There is no such controller, or it is alone in its subsystem.
    pub fn set_access(&self, serial: &str, scope: AccessScope, state: AccessState) -> anyhow::Result<u32> {
        let group = match scope {
            AccessScope::Group(group) => group,
            AccessScope::Namespace(nsid) => nvme::group_of(nsid),
        };
        self.disk(serial)?.set_access(group, state)?;
        Ok(group)
    }

    fn disk(&self, serial: &str) -> anyhow::Result<&Disk> {
        let disk = self.disks.iter().find(|disk| disk.serial() == serial);
        disk.with_context(|| format!("there is no controller {serial:?}"))
    }

    /// Memory and images.
    #[must_use]
    pub fn resources(&self) -> &Arc<Resources> {
        &self.resources
    }

    /// What the guest writes since a snapshot, if that is noted.
    #[must_use]
    pub fn noted(&self) -> &Noted {
        &self.noted
    }

    /// The KVM virtual machine.
    #[must_use]
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Input typed on the console.
    pub fn type_in(&self, bytes: &[u8]) {
        self.chipset.serial.enqueue(bytes);
    }
}
