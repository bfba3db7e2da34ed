//! Linux' 64-bit boot protocol: a zero page, long mode, memory mapped onto itself.

use bus::{GuestMemory, GuestRange};
use linux_loader::bootparam::{E820_MAX_ENTRIES_ZEROPAGE, boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::kernel::Loaded;
use super::memory_map::Entry;
use super::{COMMAND_LINE, Error, GDT, PAGE_TABLES, STACK, ZERO_PAGE, write};
use crate::vcpu::{BootProtocol, BootRegisters};

/// "HdrS", read as a number.
const SETUP_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Segments that the protocol asks for: `__BOOT_CS` at 0x10, flat 64-bit code; `__BOOT_DS` at 0x18, flat data. Behind
/// them a task segment, which processors want.
const SEGMENTS: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];

const PAGE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: u64 = 512;
/// Page directories: one for each GiB of the first four.
const DIRECTORIES: u64 = 4;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Writes zero page, page tables and GDT.
pub(super) fn prepare(
    memory: &GuestMemory,
    kernel: &Loaded,
    initrd: Option<GuestRange>,
    map: &[Entry],
    rsdp: Option<u64>,
) -> Result<BootRegisters, Error> {
    let mut zero_page = boot_params {
        hdr: header(kernel, initrd),
        acpi_rsdp_addr: rsdp.unwrap_or(0),
        e820_entries: map.len().min(E820_MAX_ENTRIES_ZEROPAGE) as u8,
        ..Default::default()
    };
    let mut table = zero_page.e820_table;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.length_bytes, r#type: entry.kind };
    }
    zero_page.e820_table = table;
    write(memory, "the zero page", ZERO_PAGE, zero_page.as_slice())?;
    write_page_tables(memory)?;
    let segments: Vec<u8> = SEGMENTS.iter().flat_map(|segment| segment.to_le_bytes()).collect();
    write(memory, "the GDT", GDT, &segments)?;
    Ok(BootRegisters {
        protocol: BootProtocol::Linux64,
        entry: kernel.entry,
        info: ZERO_PAGE.0,
        stack: STACK,
        page_tables: PAGE_TABLES.0,
        gdt_base: GDT.0,
        gdt_limit: segments.len() as u16 - 1,
    })
}

/// The bzImage's own header, or as much of one as an ELF kernel looks at, with what the loader fills in.
fn header(kernel: &Loaded, initrd: Option<GuestRange>) -> setup_header {
    let mut header = kernel.setup.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: SETUP_MAGIC,
        cmdline_size: kernel.command_line_maximum as u32,
        ..Default::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = COMMAND_LINE.0 as u32;
    if let Some(initrd) = initrd {
        header.ramdisk_image = initrd.address.0 as u32;
        header.ramdisk_size = initrd.length_bytes;
    }
    header
}

/// Maps the first 4 GiB onto themselves, in pages of 2 MiB.
fn write_page_tables(memory: &GuestMemory) -> Result<(), Error> {
    let pointers = PAGE_TABLES.0 + PAGE_BYTES;
    let directories = pointers + PAGE_BYTES;
    let put = |address, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        write(memory, "the page tables", GuestAddress(address), &bytes)
    };
    put(PAGE_TABLES.0, &[pointers | PRESENT_WRITABLE])?;
    let entries: Vec<_> =
        (0..DIRECTORIES).map(|n| (directories + n * PAGE_BYTES) | PRESENT_WRITABLE).collect();
    put(pointers, &entries)?;
    let entries: Vec<_> =
        (0..DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE_BYTES) | PRESENT_WRITABLE | LARGE).collect();
    put(directories, &entries)
}
