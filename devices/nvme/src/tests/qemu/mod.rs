//! Sections that QEMU 11.1.3 wrote, taken over and given back; and states of ours on their way there.

mod fields;
mod reverse;
mod round_trip;

use std::sync::Arc;

use serde_json::Value as Json;
use vm_memory::GuestAddress;

use super::driver::{Guest, Interrupts, Pair, Process, contexts, memory_image};
use crate::qemu::{QemuDevice, QemuResidue, QemuSection};
use crate::{Controller, ControllerConfig, Error, NamespaceConfig};

/// What QEMU's virtual clock says where the sections are used: later than both were written.
pub const CLOCK_MS: u64 = 10_000;
/// Memory of the machines that wrote the sections.
const MEMORY_BYTES: usize = 64 << 20;
/// Blocks of 512 bytes of their namespaces.
const BLOCKS: usize = 0x2_0000;

/// A section and its description, as they were captured.
pub struct Fixture {
    section: &'static [u8],
    description: &'static str,
    queue_pairs: u16,
}

macro_rules! fixture {
    ($name:literal, $queue_pairs:literal) => {
        Fixture {
            section: include_bytes!(concat!(
                "../../../../../tests/golden/qemu-11.1.3/nvme-",
                $name,
                ".section"
            )),
            description: include_str!(concat!(
                "../../../../../tests/golden/qemu-11.1.3/nvme-",
                $name,
                ".vmdesc.json"
            )),
            queue_pairs: $queue_pairs,
        }
    };
}

/// After the firmware: MSI-X off, the admin queue pair and one pair that raises no interrupts.
pub const FIRMWARE: Fixture = fixture!("firmware", 64);
/// With Linux: MSI-X, shadow doorbells, a parked Asynchronous Event Request.
pub const LINUX: Fixture = fixture!("linux", 8);

impl Fixture {
    /// What lies between the header and the footer.
    pub fn payload(&self) -> &'static [u8] {
        let name_length = usize::from(self.section[5]);
        let header = 1 + 4 + 1 + name_length + 4 + 4;
        let (header, rest) = self.section.split_at(header);
        let (payload, footer) = rest.split_at(rest.len() - 5);
        assert_eq!((header[0], &header[6..6 + name_length]), (0x04, &b"0000:00:01.0/nvme"[..]));
        assert_eq!((footer[0], &footer[1..]), (0x7e, &header[1..5]), "the footer repeats the section's id");
        payload
    }

    pub fn description(&self) -> Json {
        serde_json::from_str(self.description).unwrap()
    }

    /// The controller that takes the section over.
    pub fn config(&self) -> ControllerConfig {
        ControllerConfig {
            queue_pairs: self.queue_pairs,
            vectors: self.queue_pairs + 1,
            queue_entries: 2048,
            contiguous_queues: true,
            ..ControllerConfig::new("QEMU")
        }
    }

    /// QEMU's device; it takes as many Asynchronous Event Requests as this controller.
    pub fn device(&self) -> QemuDevice {
        QemuDevice { aerl: 7, ..QemuDevice::of(&self.config()) }
    }

    pub fn section(&self) -> QemuSection {
        QemuSection::from_bytes(self.payload(), &self.device()).unwrap()
    }
}

/// A machine whose controller nobody has used, with the memory and the image that a section's controller has.
pub fn machine(config: &ControllerConfig) -> Guest {
    let memory = bus::GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    let namespaces = vec![NamespaceConfig {
        nsid: 1,
        block_bytes: 512,
        metadata: None,
        backend: memory_image(BLOCKS * 512),
    }];
    let (contexts, events) = contexts(&memory, 2, 16);
    let (process, interrupts) = (Arc::new(Process::default()), Arc::new(Interrupts::default()));
    let controller = Controller::new(
        config.clone(),
        memory.clone(),
        &namespaces,
        contexts,
        interrupts.clone(),
        process.clone(),
    );
    let mut guest = Guest::around(config.clone(), namespaces, memory, Arc::new(controller.unwrap()));
    (guest.process, guest.interrupts, guest.events) = (process, interrupts, events);
    guest
}

/// Loads `payload` into a new machine.
pub fn load(fixture: &Fixture, payload: &[u8]) -> Result<(Guest, QemuResidue), Error> {
    let section = QemuSection::from_bytes(payload, &fixture.device())?;
    let guest = machine(&fixture.config());
    let residue = guest.controller.load_qemu(section, CLOCK_MS)?;
    Ok((guest, residue))
}

/// The bytes of a loaded and paused controller.
pub fn save(fixture: &Fixture, guest: &Guest, residue: &QemuResidue) -> Vec<u8> {
    guest.controller.save_qemu(residue, &fixture.device(), CLOCK_MS).unwrap().to_bytes()
}

/// What the driver in the guest knows and its memory holds, from the section of its controller.
pub fn driver(guest: &mut Guest, fixture: &Fixture) {
    let (state, _) = fixture.section().split(machine(&fixture.config()).controller.save(), CLOCK_MS).unwrap();
    let buffers = &state.doorbell_buffers;
    guest.shadow = buffers.enabled.then_some((buffers.shadow, buffers.event_index));
    for (index, sq) in state.sq.present() {
        let cq = state.cq.get(index).unwrap();
        // Every queue here is in its first lap: entries up to the tail were posted with the phase that it still has.
        for entry in 0..u64::from(cq.tail) {
            guest.write_bytes(cq.pages[0] + entry * 16 + 14, &u16::from(cq.phase).to_le_bytes());
        }
        if let Some((shadow, _)) = guest.shadow {
            guest.write_bytes(shadow + index as u64 * 8, &sq.tail.to_le_bytes());
            guest.write_bytes(shadow + index as u64 * 8 + 4, &cq.head.to_le_bytes());
        }
        let pair = Pair {
            cq_id: cq.id,
            sq_base: sq.pages[0],
            cq_base: cq.pages[0],
            entries: sq.size,
            tail: sq.tail,
            head: cq.head,
            phase: cq.phase,
            next_cid: 0x100,
        };
        guest.queues.insert(sq.id, pair);
    }
}

/// One run of bytes of a section and the path of the field that it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub path: String,
    pub offset: usize,
    pub size: usize,
}

/// The runs that `description` says, in order. Elements of arrays of structs and of sparse arrays get their index; names are
/// those of [`QemuSection`].
pub fn leaves(description: &Json) -> Vec<Leaf> {
    let (mut leaves, mut offset) = (Vec::new(), 0);
    collect(description, "", &mut offset, &mut leaves);
    leaves
}

fn collect(description: &Json, prefix: &str, offset: &mut usize, leaves: &mut Vec<Leaf>) {
    let mut slots = std::collections::BTreeMap::<&str, usize>::new();
    for field in description["fields"].as_array().unwrap() {
        let name = field["name"].as_str().unwrap();
        let kind = field["type"].as_str().unwrap();
        let count = field["array_len"].as_u64().unwrap_or(1) as usize;
        let size = field["size"].as_u64().unwrap() as usize;
        let index = slots.get(name).copied();
        let name = match name {
            "parent_obj[0]" => "pci_device",
            "parent_obj[1]" => "",
            // Where the description counts fields of one name.
            "config[1]" => "config",
            "type" => "kind",
            name => name,
        };
        let path = if name.is_empty() { prefix.to_owned() } else { format!("{prefix}{name}") };
        let dot = if name.is_empty() { "" } else { "." };
        match (kind, index) {
            ("ptr-marker", _) => {
                let index = slots.entry(field["name"].as_str().unwrap()).and_modify(|index| *index += 1);
                let index = *index.or_insert(0);
                leaves.push(Leaf { path: format!("{path}[{index}]"), offset: *offset, size });
                *offset += size;
            }
            ("struct", Some(index)) => {
                collect(&field["struct"], &format!("{path}[{index}]."), offset, leaves);
            }
            ("struct", None) if count > 1 => {
                for index in 0..count {
                    collect(&field["struct"], &format!("{path}[{index}]{dot}"), offset, leaves);
                }
            }
            ("struct", None) => collect(&field["struct"], &format!("{path}{dot}"), offset, leaves),
            _ => {
                leaves.push(Leaf { path, offset: *offset, size: size * count });
                *offset += size * count;
            }
        }
    }
}
