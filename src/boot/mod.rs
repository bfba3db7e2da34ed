//! Direct boot: what firmware and boot loader would have left in memory, and where the first processor starts.
//!
//! ```text
//! 0x0000_0200   MP floating pointer (--tables mp)           0x000e_0000   RSDP and the other ACPI tables (--tables acpi)
//! 0x0000_0500   GDT                                         0x000f_0000   MP configuration table (--tables mp)
//! 0x0000_6000   PVH start info, module list, memory map     0x0010_0000.. the kernel, where its file says
//! 0x0000_7000   Linux zero page                             0x000f_f000   VM generation ID (--tables acpi)
//! 0x0000_8ff0   initial stack                               top of RAM    the initrd: below 2 GiB and what the kernel
//! 0x0000_9000   identity-mapping page tables, 6 pages                     allows, page-aligned
//! 0x0002_0000   command line
//! ```
//! Kernels: an ELF file with a PVH note (entered in 32-bit protected mode, `hvm_start_info`), an ELF file by Linux' 64-bit
//! protocol, a bzImage by its 64-bit entry.
//!
//! Invariants: kernel and initrd files are hostile: sizes, addresses and offsets are checked against guest memory before
//! anything is believed. Nothing here knows KVM: the result is a plain struct of registers.
//! Absent: firmware interfaces (UEFI, SMBIOS), the 16-bit entry, relocation of ELF kernels, CPU hotplug in the tables.

mod acpi;
mod dsdt;
mod error;
mod generation;
mod initrd;
mod kernel;
mod linux;
mod memory_map;
mod mptable;
mod pvh;
#[cfg(test)]
pub(crate) mod tests;

use std::path::Path;

use bus::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub use self::error::Error;
pub use self::generation::renew as renew_generation_id;
use crate::config::Tables;
use crate::vcpu::{BootProtocol, BootRegisters};

const GDT: GuestAddress = GuestAddress(0x500);
const START_INFO: GuestAddress = GuestAddress(0x6000);
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
const STACK: u64 = 0x8ff0;
const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// End of conventional memory: what follows up to `HIGH_MEMORY` is reserved, as on every PC.
const CONVENTIONAL_END: u64 = 0xa_0000;
/// Where kernels may be loaded.
const HIGH_MEMORY: u64 = 0x10_0000;
/// Longest command line of kernels that do not say theirs, in bytes without the terminator: Linux' COMMAND_LINE_SIZE.
const COMMAND_LINE_MAXIMUM: usize = 2047;

/// Where the kernel is.
#[derive(Clone, Copy, Debug)]
pub enum Kernel<'a> {
    /// A file.
    File(&'a Path),
    /// Part of this program.
    Embedded {
        /// What messages call it.
        name: &'a str,
        /// The file's contents.
        image: &'a [u8],
    },
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSpec<'a> {
    /// The kernel.
    pub kernel: Kernel<'a>,
    /// Contents of the first root file system.
    pub initrd: Option<&'a Path>,
    /// Kernel command line.
    pub cmdline: &'a str,
    /// How the guest learns about processors and interrupts.
    pub tables: Tables,
    /// vCPUs, 1 to 255; their APIC identifiers count from 0.
    pub cpus: u8,
    /// How to enter the kernel; `None`: by PVH if its file says how, else by Linux' 64-bit protocol.
    pub protocol: Option<BootProtocol>,
}

/// Puts everything into `memory` and says with which registers the first processor starts.
///
/// # Errors
/// A file cannot be read, is no kernel, or does not fit into `memory`; the command line is too long.
pub fn load(memory: &GuestMemory, spec: &BootSpec<'_>) -> Result<BootRegisters, Error> {
    if !memory.check_range(GuestAddress(0), HIGH_MEMORY as usize) {
        return Err(Error::NoLowMemory);
    }
    let kernel = kernel::load(memory, spec.kernel, spec.protocol)?;
    let initrd = spec.initrd.map(|path| initrd::load(memory, path, &kernel)).transpose()?;
    write_command_line(memory, spec.cmdline, kernel.command_line_maximum)?;
    let rsdp = match spec.tables {
        Tables::Acpi => {
            generation::ensure(memory)?;
            Some(acpi::write(memory, spec.cpus)?)
        }
        Tables::Mp => {
            mptable::write(memory, spec.cpus)?;
            None
        }
    };
    let map = memory_map::of(memory);
    match kernel.protocol {
        BootProtocol::Pvh => pvh::prepare(memory, &kernel, initrd, &map, rsdp),
        BootProtocol::Linux64 => linux::prepare(memory, &kernel, initrd, &map, rsdp),
    }
}

/// Writes the command line with its terminator.
fn write_command_line(memory: &GuestMemory, text: &str, maximum: usize) -> Result<(), Error> {
    if text.contains('\0') {
        return Err(Error::CommandLineNul);
    }
    let maximum = maximum.min(0x1_0000);
    if text.len() > maximum {
        return Err(Error::CommandLineLength { length: text.len(), maximum });
    }
    write(memory, "the command line", COMMAND_LINE, text.as_bytes())?;
    write(memory, "the command line", GuestAddress(COMMAND_LINE.0 + text.len() as u64), &[0])
}

/// Writes `bytes` at `address`.
fn write(memory: &GuestMemory, what: &'static str, address: GuestAddress, bytes: &[u8]) -> Result<(), Error> {
    memory.write_slice(bytes, address).map_err(|source| Error::Write { what, address: address.0, source })
}
