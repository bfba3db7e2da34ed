//! How large I/O commands without a data transfer may be; Identify says the same. Transfers are limited by MDTS.

use nvme_spec::identify::{IdentifyNamespace, IdentifyNvmController};

/// Size limits are powers of two of CAP.MPSMIN.
const UNIT_BYTES: u64 = crate::config::MIN_PAGE_BYTES as u64;

/// WZSL: 32 MiB, so that an image in memory, which is filled at once, does not hold its worker up for long.
const WRITE_ZEROES_SHIFT: u8 = 13;
/// VSL, of the same kind.
const VERIFY_SHIFT: u8 = 13;
/// WUSL: 2 MiB, which are as many blocks of 512 bytes as can be marked.
const WRITE_UNCORRECTABLE_SHIFT: u8 = 9;

/// MSSRL: blocks of one source range of Copy.
pub(crate) const COPY_RANGE_BLOCKS: u16 = 4096;
/// MCL: blocks of all source ranges together.
pub(crate) const COPY_BLOCKS: u32 = 32_768;
/// MSRC, 0's based: source ranges.
pub(crate) const COPY_RANGES: u8 = 127;

/// WZSL in bytes.
pub(crate) const WRITE_ZEROES_BYTES: u64 = UNIT_BYTES << WRITE_ZEROES_SHIFT;
/// VSL in bytes.
pub(crate) const VERIFY_BYTES: u64 = UNIT_BYTES << VERIFY_SHIFT;
/// WUSL in bytes.
pub(crate) const WRITE_UNCORRECTABLE_BYTES: u64 = UNIT_BYTES << WRITE_UNCORRECTABLE_SHIFT;

/// CNS 06h. Dataset Management is limited by its own fields only: 256 ranges of 32-bit lengths (DMRL, DMRSL and DMSL are 0).
pub(crate) fn controller() -> IdentifyNvmController {
    IdentifyNvmController {
        vsl: VERIFY_SHIFT,
        wzsl: WRITE_ZEROES_SHIFT,
        wusl: WRITE_UNCORRECTABLE_SHIFT,
        ..IdentifyNvmController::default()
    }
}

/// Puts the limits of Copy into CNS 00h and 09h.
pub(crate) fn put_copy(structure: &mut IdentifyNamespace) {
    structure.mssrl = COPY_RANGE_BLOCKS;
    structure.mcl = COPY_BLOCKS;
    structure.msrc = COPY_RANGES;
}
