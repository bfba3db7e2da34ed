//! From the shape of a configuration to a machine that makes sense.

use std::path::PathBuf;
use std::str::FromStr;

use crate::io_poll::IoPoll;
use crate::kvm::DirtyTracking;
use crate::memory::HugePages;
use crate::vcpu::{BootProtocol, CpuModel};

use super::{ControllerSpec, Error, NamespaceOption, NvmeOption, parse_size};

/// Most vCPUs of a machine: what one ioapic with 8-bit APIC identifiers addresses, less the broadcast.
pub const MAX_CPUS: u8 = 64;
/// Least RAM.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// Most RAM: 1 TiB.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// Most controllers: slots 2 to 31 of the one PCI bus.
pub const MAX_CONTROLLERS: usize = 30;

/// The tables that tell a guest about its processors, interrupts and buses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Tables {
    /// RSDP, XSDT, FADT, MADT, MCFG, DSDT.
    #[default]
    Acpi,
    /// The Intel MultiProcessor table, for guests without ACPI.
    Mp,
}

/// Where the serial console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialOutput {
    /// Standard output; input from standard input.
    #[default]
    Stdio,
    /// Nowhere.
    Null,
    /// Appended to a file, which is created.
    File(PathBuf),
    /// A Unix stream socket that one client at a time may connect to.
    Unix(PathBuf),
}

impl FromStr for SerialOutput {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(Error::Options {
                option: "--serial",
                text: text.to_owned(),
                reason: "it is none of stdio, null, file:PATH and unix:PATH".to_owned(),
            }),
        }
    }
}

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the virtual machine, for people and for the lease record.
    pub name: String,
    /// vCPUs.
    pub cpus: u8,
    /// Which processor they are.
    pub cpu: CpuModel,
    /// RAM, as written.
    pub memory: String,
    /// Which huge pages RAM lies in.
    pub hugepages: HugePages,
    /// How dirty pages are found.
    pub dirty_tracking: DirtyTracking,
    /// ELF or bzImage; none only with an incoming migration.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Firmware tables.
    pub tables: Tables,
    /// How the kernel is entered; `None`: by PVH if its file says how, else by Linux' 64-bit protocol.
    pub boot_protocol: Option<BootProtocol>,
    /// Console.
    pub serial: SerialOutput,
    /// Controllers.
    pub nvme: Vec<NvmeOption>,
    /// Namespaces.
    pub namespaces: Vec<NamespaceOption>,
    /// Threads that serve each controller's queues.
    pub io_threads: u8,
    /// How long they look for work before they sleep, if it was said.
    pub io_poll: Option<IoPoll>,
    /// The lease record, if it was named.
    pub lease: Option<PathBuf>,
    /// Whether the machine arrives by migration, so that it needs no kernel.
    pub incoming: bool,
}

/// A machine that makes sense.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// Name of the virtual machine.
    pub name: String,
    /// vCPUs, from 1.
    pub cpus: u8,
    /// Which processor they are, for a guest that starts.
    pub cpu: CpuModel,
    /// RAM in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Which huge pages RAM lies in.
    pub hugepages: HugePages,
    /// How dirty pages are found.
    pub dirty_tracking: DirtyTracking,
    /// ELF or bzImage.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Firmware tables.
    pub tables: Tables,
    /// How the kernel is entered; `None`: by PVH if its file says how, else by Linux' 64-bit protocol.
    pub boot_protocol: Option<BootProtocol>,
    /// Console.
    pub serial: SerialOutput,
    /// Controllers with their namespaces, in the order of their declaration: that is their order of PCI slots.
    pub controllers: Vec<ControllerSpec>,
    /// Threads that serve each controller's queues.
    pub io_threads: u8,
    /// How long they look for work before they sleep.
    pub io_poll: IoPoll,
    /// The lease record, if it was named; otherwise it lies beside the first writable image.
    pub lease: Option<PathBuf>,
}

impl TryFrom<Config> for MachineSpec {
    type Error = Error;

    fn try_from(config: Config) -> Result<Self, Error> {
        let refuse = |reason: String| Err(Error::Machine(reason));
        let memory_bytes =
            parse_size(&config.memory).map_err(|error| Error::Machine(format!("--memory {error}")))?;
        if !(1..=MAX_CPUS).contains(&config.cpus) {
            return refuse(format!("--cpus {} is not between 1 and {MAX_CPUS}", config.cpus));
        }
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes) || memory_bytes % (2 << 20) != 0 {
            return refuse(format!("--memory {} is not a multiple of 2M between 16M and 1T", config.memory));
        }
        if config.io_threads == 0 {
            return refuse("--io-threads 0: a controller needs at least one thread".to_owned());
        }
        if config.kernel.is_none() && !config.incoming {
            return refuse(
                "nothing to run: give --kernel PATH, or --incoming URI to receive a guest".to_owned(),
            );
        }
        if config.initrd.is_some() && config.kernel.is_none() {
            return refuse("--initrd needs --kernel".to_owned());
        }
        let controllers = controllers(config.nvme, config.namespaces)?;
        let io_poll = config.io_poll.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            IoPoll::for_host(cores, usize::from(config.cpus) + usize::from(config.io_threads))
        });
        Ok(Self {
            name: config.name,
            cpus: config.cpus,
            cpu: config.cpu,
            memory_bytes,
            hugepages: config.hugepages,
            dirty_tracking: config.dirty_tracking,
            kernel: config.kernel,
            initrd: config.initrd,
            cmdline: config.cmdline,
            tables: config.tables,
            boot_protocol: config.boot_protocol,
            serial: config.serial,
            controllers,
            io_threads: config.io_threads,
            io_poll,
            lease: config.lease,
        })
    }
}

fn controllers(
    nvme: Vec<NvmeOption>,
    mut namespaces: Vec<NamespaceOption>,
) -> Result<Vec<ControllerSpec>, Error> {
    let mut controllers: Vec<ControllerSpec> = Vec::with_capacity(nvme.len());
    for NvmeOption { mut controller } in nvme {
        if controllers.iter().any(|other| other.serial == controller.serial) {
            return Err(Error::Machine(format!("two controllers have the serial {:?}", controller.serial)));
        }
        let folder = |controller: &ControllerSpec| {
            controller.subsystem.as_ref().map(|subsystem| subsystem.directory.clone())
        };
        if let Some(directory) = folder(&controller)
            && let Some(other) = controllers.iter().find(|other| folder(other).as_ref() == Some(&directory))
        {
            return Err(Error::Machine(format!(
                "{} is the folder of two controllers, {:?} and {:?}: for both in one subsystem, give the second subsystem-of={}",
                directory.display(),
                other.serial,
                controller.serial,
                other.serial
            )));
        }
        check_subsystem(&controllers, &controller)?;
        if controller.subsystem_of.is_some() {
            let of = |namespace| NamespaceOption { controller: controller.serial.clone(), namespace };
            namespaces.extend(std::mem::take(&mut controller.namespaces).into_iter().map(of));
        }
        controllers.push(controller);
    }
    if controllers.len() > MAX_CONTROLLERS {
        return Err(Error::Machine(format!(
            "{} controllers: at most {MAX_CONTROLLERS} fit",
            controllers.len()
        )));
    }
    for NamespaceOption { controller: serial, namespace } in namespaces {
        let Some(named) = controllers.iter().find(|controller| controller.serial == serial) else {
            return Err(Error::Machine(format!(
                "--ns nsid={} names the controller {serial:?}, but no --nvme has that serial",
                namespace.nsid
            )));
        };
        // Namespaces are the subsystem's, whichever of its controllers is named.
        let first = named.first_of_subsystem().to_owned();
        let is_member = |serial: &String| {
            controllers.iter().any(|other| other.serial == *serial && other.first_of_subsystem() == first)
        };
        if let Some(stranger) = namespace.attached.iter().find(|serial| !is_member(serial)) {
            return Err(Error::Machine(format!(
                "--ns nsid={} is to be attached to {stranger:?}, which is no controller of the subsystem of {first:?}",
                namespace.nsid
            )));
        }
        let Some(controller) = controllers.iter_mut().find(|controller| controller.serial == first) else {
            return Err(Error::Machine(format!("there is no controller {first:?}")));
        };
        match controller.namespaces.binary_search_by_key(&namespace.nsid, |other| other.nsid) {
            Ok(_) => {
                let nsid = namespace.nsid;
                return Err(Error::Machine(format!(
                    "the subsystem of {serial:?} has two namespaces with nsid {nsid}"
                )));
            }
            Err(index) => controller.namespaces.insert(index, namespace),
        }
    }
    Ok(controllers)
}

/// Whether the subsystem that a controller says it is in is there: it is named by its first controller, which has it declared.
fn check_subsystem(before: &[ControllerSpec], controller: &ControllerSpec) -> Result<(), Error> {
    let Some(first) = &controller.subsystem_of else { return Ok(()) };
    let serial = &controller.serial;
    let reason = match before.iter().find(|other| other.serial == *first) {
        Some(ControllerSpec { subsystem_of: None, .. }) => return Ok(()),
        Some(ControllerSpec { subsystem_of: Some(other), .. }) => {
            format!("that controller is itself in the subsystem of {other:?}: name this one")
        }
        None => "no --nvme before it has that serial".to_owned(),
    };
    Err(Error::Machine(format!("--nvme serial={serial},subsystem-of={first}: {reason}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            name: "test".into(),
            cpus: 1,
            cpu: CpuModel::Host,
            memory: "128M".into(),
            hugepages: HugePages::default(),
            dirty_tracking: DirtyTracking::Auto,
            kernel: Some("vmlinux".into()),
            initrd: None,
            cmdline: String::new(),
            tables: Tables::Acpi,
            boot_protocol: None,
            serial: SerialOutput::Null,
            nvme: vec!["serial=a".parse().unwrap(), "path=b.raw,serial=b".parse().unwrap()],
            namespaces: vec![
                "controller=a,nsid=9,backend=null,size=1M".parse().unwrap(),
                "controller=a,nsid=2,backend=memory,size=1M".parse().unwrap(),
            ],
            io_threads: 1,
            io_poll: None,
            lease: None,
            incoming: false,
        }
    }

    #[test]
    fn namespaces_find_their_controllers_in_order() {
        let spec = MachineSpec::try_from(config()).unwrap();
        let nsids: Vec<u32> = spec.controllers[0].namespaces.iter().map(|namespace| namespace.nsid).collect();
        assert_eq!(nsids, [2, 9]);
        assert_eq!(spec.memory_bytes, 128 << 20);
    }

    #[test]
    fn namespaces_are_those_of_the_subsystem_whichever_of_its_controllers_is_named() {
        let mut config = config();
        config.nvme.push("path=c.raw,serial=c,subsystem-of=a".parse().unwrap());
        config.namespaces.push("controller=c,nsid=5,backend=null,size=1M,attached=c+a".parse().unwrap());
        let controllers = MachineSpec::try_from(config).unwrap().controllers;
        let nsids = controllers[0].namespaces.iter().map(|namespace| namespace.nsid);
        assert_eq!(nsids.collect::<Vec<_>>(), [1, 2, 5, 9]);
        assert!(controllers[2].namespaces.is_empty());
        let first = controllers.iter().map(|controller| controller.first_of_subsystem());
        assert_eq!(first.collect::<Vec<_>>(), ["a", "b", "a"]);
    }

    #[test]
    fn what_makes_no_machine_is_refused() {
        type Change = fn(&mut Config);
        let changes: [(&str, Change); 13] = [
            ("--cpus 0", |c| c.cpus = 0),
            ("--memory 1M", |c| c.memory = "1M".into()),
            ("--memory 17M", |c| c.memory = "17M".into()),
            ("nothing to run", |c| c.kernel = None),
            ("--io-threads 0", |c| c.io_threads = 0),
            ("two controllers", |c| c.nvme.push("serial=a".parse().unwrap())),
            ("d is the folder of two controllers, \"c\" and \"d\"", |c| {
                c.nvme.push("serial=c,subsystem=d".parse().unwrap());
                c.nvme.push("serial=d,subsystem=d,capacity=1M".parse().unwrap());
            }),
            ("give the second subsystem-of=c", |c| {
                c.nvme.push("serial=c,subsystem=d".parse().unwrap());
                c.nvme.push("serial=d,subsystem=d".parse().unwrap());
            }),
            ("no --nvme before it has that serial", |c| {
                c.nvme.insert(0, "serial=c,subsystem-of=a".parse().unwrap());
            }),
            ("itself in the subsystem of \"a\"", |c| {
                c.nvme.push("serial=c,subsystem-of=a".parse().unwrap());
                c.nvme.push("serial=d,subsystem-of=c".parse().unwrap());
            }),
            ("is no controller of the subsystem of \"a\"", |c| {
                c.namespaces.push("controller=a,nsid=1,backend=null,size=1M,attached=b".parse().unwrap());
            }),
            ("no --nvme has that serial", |c| {
                c.namespaces.push("controller=z,nsid=1,backend=null,size=1M".parse().unwrap());
            }),
            ("two namespaces with nsid 1", |c| {
                c.namespaces.push("controller=b,nsid=1,backend=null,size=1M".parse().unwrap());
            }),
        ];
        for (expected, change) in changes {
            let mut config = config();
            change(&mut config);
            let error = MachineSpec::try_from(config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn serial_outputs() {
        assert_eq!("file:/tmp/x:y".parse(), Ok(SerialOutput::File("/tmp/x:y".into())));
        assert_eq!("unix:s".parse(), Ok(SerialOutput::Unix("s".into())));
        for text in ["", "file:", "tty", "stdio:x"] {
            assert!(text.parse::<SerialOutput>().is_err(), "{text}");
        }
    }
}
