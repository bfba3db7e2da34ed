//! Loading a kernel's file.

use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use bus::GuestMemory;
use linux_loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile};

use super::{COMMAND_LINE_MAXIMUM, Error, HIGH_MEMORY, Kernel};
use crate::vcpu::BootProtocol;

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// `HdrS` of the Linux boot protocol, and where it is.
const SETUP_MAGIC: [u8; 4] = *b"HdrS";
const SETUP_MAGIC_OFFSET: u64 = 0x202;
/// "In 64-bit boot protocol, the kernel is started by jumping to the 64-bit kernel entry point, which is the start
/// address of loaded 64-bit kernel plus 0x200" (Linux, x86 boot protocol).
const BZIMAGE_ENTRY64: u64 = 0x200;
/// `xloadflags`: "this kernel has the legacy 64-bit entry point at 0x200".
const XLF_KERNEL_64: u16 = 1;
/// What 64-bit kernels write into `initrd_addr_max`, for those that have no such header.
const INITRD_MAXIMUM: u64 = 0x7fff_ffff;

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// How to enter it.
    pub(super) protocol: BootProtocol,
    /// First instruction.
    pub(super) entry: u64,
    /// First byte behind all that it occupies before it manages memory itself.
    pub(super) end: u64,
    /// Header of a bzImage.
    pub(super) setup: Option<setup_header>,
    /// Last address that its initrd may occupy.
    pub(super) initrd_maximum: u64,
    /// Longest command line in bytes.
    pub(super) command_line_maximum: usize,
}

/// Loads `kernel`, to be entered by `wanted` or the best way that it offers.
pub(super) fn load(
    memory: &GuestMemory,
    kernel: Kernel<'_>,
    wanted: Option<BootProtocol>,
) -> Result<Loaded, Error> {
    match kernel {
        Kernel::File(path) => {
            let (file, _) = open("kernel", path)?;
            load_from(memory, file, &path.display().to_string(), wanted)
        }
        Kernel::Embedded { name, image } => load_from(memory, Cursor::new(image), name, wanted),
    }
}

/// Opens a regular file; returns its length too.
pub(super) fn open(what: &'static str, path: &Path) -> Result<(File, u64), Error> {
    let failed = |source| Error::Open { what, path: path.to_owned(), source };
    // Before it is opened: opening a pipe would wait.
    let about = std::fs::metadata(path).map_err(failed)?;
    if !about.is_file() {
        return Err(Error::NotAFile { what, path: path.to_owned() });
    }
    Ok((File::open(path).map_err(failed)?, about.len()))
}

fn load_from<F: Read + Seek + ReadVolatile>(
    memory: &GuestMemory,
    mut file: F,
    name: &str,
    wanted: Option<BootProtocol>,
) -> Result<Loaded, Error> {
    let read = |source| Error::ReadKernel { name: name.to_owned(), source };
    let loaded = if magic(&mut file, 0).map_err(read)? == ELF_MAGIC {
        elf(memory, &mut file, name, wanted)?
    } else if magic(&mut file, SETUP_MAGIC_OFFSET).map_err(read)? == SETUP_MAGIC {
        bzimage(memory, &mut file, name, wanted)?
    } else {
        return Err(Error::UnknownFormat { name: name.to_owned() });
    };
    let outside = |what, address| Err(Error::KernelOutside { name: name.to_owned(), what, address });
    if !memory.address_in_range(GuestAddress(loaded.entry)) {
        return outside("entry point", loaded.entry);
    }
    match loaded.end.checked_sub(1) {
        Some(last) if memory.address_in_range(GuestAddress(last)) => Ok(loaded),
        _ => outside("end", loaded.end),
    }
}

/// Four bytes at `offset`; zeroes where the file is shorter.
fn magic<F: Read + Seek>(file: &mut F, offset: u64) -> std::io::Result<[u8; 4]> {
    let mut found = Vec::with_capacity(4);
    file.seek(SeekFrom::Start(offset))?;
    file.by_ref().take(4).read_to_end(&mut found)?;
    found.resize(4, 0);
    Ok([found[0], found[1], found[2], found[3]])
}

fn run_loader<L: KernelLoader, F: Read + Seek + ReadVolatile>(
    memory: &GuestMemory,
    file: &mut F,
    name: &str,
) -> Result<KernelLoaderResult, Error> {
    L::load(memory, None, file, Some(GuestAddress(HIGH_MEMORY))).map_err(|source| Error::LoadKernel {
        name: name.to_owned(),
        memory_bytes: memory.iter().map(GuestMemoryRegion::len).sum(),
        source,
    })
}

fn elf<F: Read + Seek + ReadVolatile>(
    memory: &GuestMemory,
    file: &mut F,
    name: &str,
    wanted: Option<BootProtocol>,
) -> Result<Loaded, Error> {
    let result = run_loader::<Elf, F>(memory, file, name)?;
    let (protocol, entry) = match (result.pvh_boot_cap, wanted) {
        (PvhBootCapability::PvhEntryPresent(entry), None | Some(BootProtocol::Pvh)) => {
            (BootProtocol::Pvh, entry)
        }
        (_, Some(BootProtocol::Pvh)) => {
            let reason = "its file has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)";
            return Err(Error::Protocol { name: name.to_owned(), protocol: BootProtocol::Pvh, reason });
        }
        (_, None | Some(BootProtocol::Linux64)) => (BootProtocol::Linux64, result.kernel_load),
    };
    Ok(Loaded {
        protocol,
        entry: entry.0,
        end: result.kernel_end,
        setup: None,
        initrd_maximum: INITRD_MAXIMUM,
        command_line_maximum: COMMAND_LINE_MAXIMUM,
    })
}

fn bzimage<F: Read + Seek + ReadVolatile>(
    memory: &GuestMemory,
    file: &mut F,
    name: &str,
    wanted: Option<BootProtocol>,
) -> Result<Loaded, Error> {
    let refuse = |protocol, reason| Err(Error::Protocol { name: name.to_owned(), protocol, reason });
    if wanted == Some(BootProtocol::Pvh) {
        return refuse(BootProtocol::Pvh, "a bzImage has no PVH entry");
    }
    let result = run_loader::<BzImage, F>(memory, file, name)?;
    let setup = match result.setup_header {
        // Protocol 2.12 brought xloadflags.
        Some(setup) if setup.version >= 0x020c && setup.xloadflags & XLF_KERNEL_64 != 0 => setup,
        _ => return refuse(BootProtocol::Linux64, "it is a 32-bit kernel or older than Linux 3.8"),
    };
    // It moves itself to its preferred address and unpacks itself there.
    let unpacked_end = setup.pref_address.checked_add(u64::from(setup.init_size));
    let end = unpacked_end.map_or(u64::MAX, |end| end.max(result.kernel_end));
    Ok(Loaded {
        protocol: BootProtocol::Linux64,
        entry: result.kernel_load.0 + BZIMAGE_ENTRY64,
        end,
        setup: Some(setup),
        initrd_maximum: u64::from(setup.initrd_addr_max),
        command_line_maximum: setup.cmdline_size as usize,
    })
}
