//! The PVH boot protocol: a 32-bit entry and a start info (Xen, `public/arch-x86/hvm/start_info.h`).

use bus::{GuestMemory, GuestRange};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestAddress};

use super::kernel::Loaded;
use super::memory_map::Entry;
use super::{COMMAND_LINE, Error, START_INFO, write};
use crate::vcpu::{BootProtocol, BootRegisters};

const MODULES: GuestAddress = GuestAddress(START_INFO.0 + 0x40);
const MEMORY_MAP: GuestAddress = GuestAddress(START_INFO.0 + 0x80);

/// Writes the start info.
pub(super) fn prepare(
    memory: &GuestMemory,
    kernel: &Loaded,
    initrd: Option<GuestRange>,
    map: &[Entry],
    rsdp: Option<u64>,
) -> Result<BootRegisters, Error> {
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        // The first version with a memory map.
        version: 1,
        cmdline_paddr: COMMAND_LINE.0,
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address.0,
            size: initrd.length_bytes.into(),
            ..Default::default()
        };
        write(memory, "the PVH module list", MODULES, module.as_slice())?;
        (info.nr_modules, info.modlist_paddr) = (1, MODULES.0);
    }
    for (position, entry) in (MEMORY_MAP.0..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.length_bytes,
            // The types are those of e820.
            type_: entry.kind,
            reserved: 0,
        };
        write(memory, "the PVH memory map", GuestAddress(position), entry.as_slice())?;
    }
    write(memory, "the PVH start info", START_INFO, info.as_slice())?;
    Ok(BootRegisters {
        protocol: BootProtocol::Pvh,
        entry: kernel.entry,
        info: START_INFO.0,
        stack: 0,
        page_tables: 0,
        gdt_base: 0,
        gdt_limit: 0,
    })
}
