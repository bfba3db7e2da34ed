//! Boot without KVM: what is in memory afterwards, and files that lie.

mod files;
mod tables;

use std::path::Path;

use vm_memory::{Address, GuestMemoryRegion};

use super::*;

const MIB: u64 = 1 << 20;
const KERNEL: u64 = 0x20_0000;

fn memory(low_bytes: u64) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), low_bytes as usize)]).unwrap()
}

fn spec(kernel: &[u8]) -> BootSpec<'_> {
    BootSpec {
        kernel: Kernel::Embedded { name: "test kernel", image: kernel },
        initrd: None,
        cmdline: "console=ttyS0 quiet",
        tables: Tables::Mp,
        cpus: 2,
        protocol: None,
    }
}

/// An ELF kernel with one segment of `code` and `bss_bytes` behind it at `KERNEL`.
pub(crate) fn elf(code: &[u8], bss_bytes: u64, pvh_entry: Option<u32>) -> Vec<u8> {
    let note: Vec<u8> = pvh_entry.map_or(Vec::new(), |entry| {
        // Another vendor's note comes first.
        let other = [&[4, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0][..], b"GNU\0", &[1, 2, 3, 0]].concat();
        let pvh =
            [&[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0][..], b"Xen\0", &u64::from(entry).to_le_bytes()].concat();
        [other, pvh].concat()
    });
    let headers = 64 + 2 * 56;
    let program_header = |kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend(5_u32.to_le_bytes());
        for field in [offset, address, address, file, memory, 4] {
            header.extend(field.to_le_bytes());
        }
        header
    };
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry point, program headers, section headers.
    for field in [KERNEL + 0x10, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
    assert_eq!(file.len(), 64);
    let (code_length, note_length) = (code.len() as u64, note.len() as u64);
    file.extend(program_header(1, headers, KERNEL, code_length, code_length + bss_bytes));
    file.extend(program_header(4, headers + code_length, 0, note_length, note_length));
    [file, code.to_vec(), note].concat()
}

/// A bzImage with one setup sector and `payload`.
fn bzimage(payload: &[u8], change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut file = vec![0; 1024];
    let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    // LOADED_HIGH, and the address that goes with it.
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    change(&mut file);
    [file, payload.to_vec()].concat()
}

fn bytes_at<const N: usize>(memory: &GuestMemory, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn u32_at(memory: &GuestMemory, address: u64) -> u32 {
    u32::from_le_bytes(bytes_at(memory, address))
}

fn u64_at(memory: &GuestMemory, address: u64) -> u64 {
    u64::from_le_bytes(bytes_at(memory, address))
}

/// The error and its causes.
fn message(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[test]
fn pvh_kernels_get_a_start_info() {
    let memory = memory(64 * MIB);
    let initrd = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(initrd.path(), [7; 5000]).unwrap();
    let kernel = elf(b"some code", 4096, Some(0x20_0123));
    let mut spec = spec(&kernel);
    spec.initrd = Some(initrd.path());
    let registers = load(&memory, &spec).unwrap();
    let info = registers.info;
    assert_eq!(
        registers,
        BootRegisters {
            protocol: BootProtocol::Pvh,
            entry: 0x20_0123,
            info: START_INFO.0,
            stack: 0,
            page_tables: 0,
            gdt_base: 0,
            gdt_limit: 0
        }
    );
    assert_eq!(&bytes_at::<9>(&memory, KERNEL), b"some code");
    // magic, version, flags, modules
    assert_eq!([0, 4, 8, 12].map(|offset| u32_at(&memory, info + offset)), [0x336e_c578, 1, 0, 1]);
    let (modules, cmdline, rsdp) =
        (u64_at(&memory, info + 16), u64_at(&memory, info + 24), u64_at(&memory, info + 32));
    assert_eq!(&bytes_at::<20>(&memory, cmdline), b"console=ttyS0 quiet\0");
    assert_eq!(rsdp, 0, "there are MP tables instead");
    let (start, length) = (u64_at(&memory, modules), u64_at(&memory, modules + 8));
    assert_eq!((start, length), (64 * MIB - 8192, 5000));
    assert_eq!(bytes_at::<5000>(&memory, start), [7; 5000]);
    let (map, count) = (u64_at(&memory, info + 40), u32_at(&memory, info + 48));
    let found: Vec<_> = (0..u64::from(count))
        .map(|n| map + n * 24)
        .map(|at| (u64_at(&memory, at), u64_at(&memory, at + 8), u32_at(&memory, at + 16)))
        .collect();
    assert_eq!(found[..3], [(0, 0xa_0000, 1), (0xa_0000, 0x6_0000, 2), (MIB, 63 * MIB, 1)]);
    assert_eq!(found[3], (0xe000_0000, 0x1000_0000, 2));
}

#[test]
fn other_elf_kernels_start_by_the_64_bit_protocol() {
    let memory = memory(64 * MIB);
    let initrd = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(initrd.path(), [9; 4096]).unwrap();
    let kernel = elf(b"code", 0, None);
    let mut spec = spec(&kernel);
    spec.initrd = Some(initrd.path());
    spec.tables = Tables::Acpi;
    let registers = load(&memory, &spec).unwrap();
    assert_eq!((registers.protocol, registers.entry), (BootProtocol::Linux64, KERNEL + 0x10));
    let page = registers.info;
    assert_eq!(u64_at(&memory, page + 0x70), 0xe_0000, "acpi_rsdp_addr");
    assert_eq!(&bytes_at::<4>(&memory, page + 0x202), b"HdrS");
    assert_eq!(bytes_at::<2>(&memory, page + 0x1fe), [0x55, 0xaa]);
    assert_eq!(u32_at(&memory, page + 0x218), (64 * MIB - 4096) as u32, "ramdisk_image");
    assert_eq!(u32_at(&memory, page + 0x21c), 4096, "ramdisk_size");
    let cmdline = u32_at(&memory, page + 0x228);
    assert_eq!(&bytes_at::<20>(&memory, cmdline.into()), b"console=ttyS0 quiet\0");
    let count = bytes_at::<1>(&memory, page + 0x1e8)[0];
    let first = page + 0x2d0;
    assert_eq!(
        (u64_at(&memory, first), u64_at(&memory, first + 8), u32_at(&memory, first + 16)),
        (0, 0xa_0000, 1)
    );
    assert_eq!(usize::from(count), memory_map::of(&memory).len());
    assert_eq!(registers.gdt_limit, 47);
    assert_eq!(u64_at(&memory, registers.gdt_base + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(u64_at(&memory, registers.gdt_base + 0x18), 0x00cf_9300_0000_ffff);
}

#[test]
fn the_page_tables_map_four_gib_onto_themselves() {
    let memory = memory(64 * MIB);
    let registers = load(&memory, &spec(&elf(b"code", 0, None))).unwrap();
    let walk = |address: u64| {
        let mut table = registers.page_tables;
        for shift in [39, 30] {
            let entry = u64_at(&memory, table + (address >> shift & 511) * 8);
            assert_eq!(entry & 0xfff, 3, "present, writable");
            table = entry & !0xfff;
        }
        let entry = u64_at(&memory, table + (address >> 21 & 511) * 8);
        assert_eq!(entry & 0xfff, 0x83, "present, writable, 2 MiB");
        (entry & !0xfff) + (address & 0x1f_ffff)
    };
    for address in [0, 0x7000, KERNEL, 0x3fff_ffff, 0x4000_0000, 0xbfff_1234, 0xffff_ffff] {
        assert_eq!(walk(address), address);
    }
    assert_eq!(u64_at(&memory, registers.page_tables + 8), 0, "nothing above");
}

#[test]
fn the_protocol_can_be_chosen() {
    let memory = memory(64 * MIB);
    let both = elf(b"code", 0, Some(0x20_0000));
    let long = Some(BootProtocol::Linux64);
    let registers = load(&memory, &BootSpec { protocol: long, ..spec(&both) }).unwrap();
    assert_eq!((registers.protocol, registers.entry), (BootProtocol::Linux64, KERNEL + 0x10));
    let pvh = Some(BootProtocol::Pvh);
    for without in [elf(b"code", 0, None), bzimage(&[0; 4096], |_| {})] {
        let error = load(&memory, &BootSpec { protocol: pvh, ..spec(&without) }).unwrap_err();
        assert!(matches!(error, Error::Protocol { protocol: BootProtocol::Pvh, .. }), "{error}");
        assert!(error.to_string().contains("test kernel"), "{error}");
    }
}

#[test]
fn a_bzimage_starts_at_its_64_bit_entry_with_its_own_header() {
    let memory = memory(64 * MIB);
    let initrd = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(initrd.path(), [9; 5000]).unwrap();
    let kernel = bzimage(&[0x90; 8192], |file| {
        // Initrds up to 32 MiB - 1, and a field that only the kernel knows.
        file[0x22c..0x230].copy_from_slice(&0x1ff_ffff_u32.to_le_bytes());
        file[0x248..0x24c].copy_from_slice(&0x1234_u32.to_le_bytes());
    });
    let mut spec = spec(&kernel);
    spec.initrd = Some(initrd.path());
    let registers = load(&memory, &spec).unwrap();
    assert_eq!((registers.protocol, registers.entry), (BootProtocol::Linux64, 0x10_0200));
    assert_eq!(bytes_at::<8192>(&memory, 0x10_0000), [0x90; 8192]);
    let page = registers.info;
    assert_eq!(u32_at(&memory, page + 0x248), 0x1234, "payload_offset");
    assert_eq!(u32_at(&memory, page + 0x218), (32 * MIB - 8192) as u32, "ramdisk_image");
    assert_eq!(bytes_at::<1>(&memory, page + 0x210), [0xff], "type_of_loader");
}

#[test]
fn the_memory_map_leaves_out_what_is_not_ram() {
    let regions = [(GuestAddress(0), 3 << 30), (GuestAddress(1 << 32), 1 << 30)];
    let memory = GuestMemory::from_ranges(&regions).unwrap();
    assert_eq!(memory.iter().map(|region| region.start_addr().raw_value()).collect::<Vec<_>>(), [0, 1 << 32]);
    let map: Vec<_> =
        memory_map::of(&memory).iter().map(|entry| (entry.start, entry.length_bytes, entry.kind)).collect();
    assert_eq!(
        map,
        [
            (0, 0xa_0000, 1),
            (0xa_0000, 0x6_0000, 2),
            (0x10_0000, 0xbff0_0000, 1),
            (0xe000_0000, 0x1000_0000, 2),
            (0xfffb_d000, 0x3000, 2),
            (0x1_0000_0000, 0x4000_0000, 1),
        ]
    );
}

#[test]
fn the_exerciser_is_a_pvh_kernel() {
    let path = Path::new(env!("FERRY_EXERCISER"));
    let memory = memory(256 * MIB);
    let registers = load(&memory, &BootSpec { kernel: Kernel::File(path), ..spec(&[]) }).unwrap();
    assert_eq!(registers.protocol, BootProtocol::Pvh);
    assert_ne!(bytes_at::<16>(&memory, registers.entry), [0; 16]);
}
