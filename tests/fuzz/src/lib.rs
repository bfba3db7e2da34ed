//! Hostile bytes for everything that reads what others wrote.
//!
//! A target is a plain function of bytes: it must not panic, and what it can read it must be able to write again as it was. The test
//! of this crate calls every target with its corpus (`corpus/TARGET/`), with fresh seeds and with a fixed number of mutations of
//! them, always the same, others with new mutations and with garbage, and count what they allocate; `tests/fuzz/run TARGET SECONDS` lets cargo-fuzz look for more.
//!
//! - [`streams`], [`mapped`]: what crate `stream` reads.
//! - [`states`]: the sections of our machine, and what two migrating processes say to each other.
//! - [`reception`]: a destination that hears a whole peer.
//! - [`channels`]: guest memory on connections of its own. [`images`]: blocks of images that come with their guest.
//! - [`inspect`]: any files, printed and compared. [`qemu`]: the controller of another VMM.
//! - [`lease`]: the record that says who owns a guest.
//! - [`guest`]: a running NVMe controller, whose guest is the attacker.
//! - [`seeds`] writes valid inputs. Those of states come from their schemas, so a new field needs nothing here.
//!
//! # Absent
//!
//! Devices other than the NVMe controller that take a state over once it is read, or that a guest drives: their crates' own tests attack that.

#![forbid(unsafe_code)]

pub mod channels;
pub mod guest;
pub mod images;
pub mod inspect;
pub mod lease;
pub mod mapped;
pub mod mutate;
pub mod qemu;
pub mod reception;
pub mod seeds;
pub mod states;
pub mod streams;

/// Something that reads bytes of others.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// As `tests/fuzz/run` takes it.
    pub name: &'static str,
    /// Reads the bytes.
    pub run: fn(&[u8]),
    /// Valid inputs, always the same but for names that a lease draws at random.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "file", run: streams::file, seeds: seeds::files },
    Target { name: "live", run: streams::live, seeds: seeds::lives },
    Target { name: "foreign", run: streams::foreign, seeds: seeds::files },
    Target { name: "frames", run: streams::frames, seeds: seeds::frames },
    Target { name: "return_path", run: streams::return_path, seeds: seeds::return_paths },
    Target { name: "mapped", run: mapped::mapped, seeds: seeds::mapped },
    Target { name: "trailer", run: streams::trailer, seeds: seeds::trailers },
    Target { name: "inspect", run: inspect::inspect, seeds: inspect::seeds },
    Target { name: "qemu_nvme", run: qemu::nvme, seeds: qemu::nvme_seeds },
    Target { name: "devices", run: states::devices, seeds: states::device_seeds },
    Target { name: "messages", run: states::messages, seeds: states::message_seeds },
    Target { name: "reception", run: reception::reception, seeds: reception::seeds },
    Target { name: "channel", run: channels::channel, seeds: channels::seeds },
    Target { name: "blocks", run: images::blocks, seeds: images::seeds },
    Target { name: "lease", run: lease::lease, seeds: lease::seeds },
    Target { name: "guest_registers", run: guest::registers, seeds: guest::register_seeds },
    Target { name: "guest_queues", run: guest::queues, seeds: guest::queue_seeds },
    Target { name: "guest_admin", run: guest::admin, seeds: guest::admin_seeds },
    Target { name: "guest_commands", run: guest::commands, seeds: guest::command_seeds },
    Target { name: "guest_pointers", run: guest::pointers::pointers, seeds: guest::pointer_seeds },
];
