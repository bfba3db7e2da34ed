//! Loading the initrd.

use std::path::Path;

use bus::{GuestMemory, GuestRange};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::kernel::{self, Loaded};
use super::{Error, HIGH_MEMORY};

const PAGE_BYTES: u64 = 4096;

/// Loads the file at `path` as high as the kernel allows, at the start of a page: out of the way of the kernel, which
/// grows from below.
pub(super) fn load(memory: &GuestMemory, path: &Path, kernel: &Loaded) -> Result<GuestRange, Error> {
    let (mut file, length) = kernel::open("initrd", path)?;
    // The region that has the kernel: the one behind the first MiB.
    let ram_end = memory
        .find_region(GuestAddress(HIGH_MEMORY))
        .map_or(HIGH_MEMORY, |region| region.last_addr().raw_value().saturating_add(1));
    let limit = ram_end.min(kernel.initrd_maximum.saturating_add(1));
    let start = limit.checked_sub(length).map(|start| start - start % PAGE_BYTES);
    let (start, length_bytes) = match (start, u32::try_from(length)) {
        (Some(start), Ok(length)) if start >= kernel.end && start >= HIGH_MEMORY => (start, length),
        _ => {
            return Err(Error::InitrdSize {
                path: path.to_owned(),
                length_bytes: length,
                kernel_end: kernel.end,
                limit,
            });
        }
    };
    let address = GuestAddress(start);
    memory
        .read_exact_volatile_from(address, &mut file, length_bytes as usize)
        .map_err(|source| Error::ReadInitrd { path: path.to_owned(), source })?;
    Ok(GuestRange { address, length_bytes })
}
