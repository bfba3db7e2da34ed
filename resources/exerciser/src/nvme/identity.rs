//! What a controller says of itself.

use nvme_spec::identify::{IdentifyController, ONCS_WRITE_ZEROES};
use nvme_spec::regs::Cap;

/// An active namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Namespace identifier.
    pub nsid: u32,
    /// Size in blocks.
    pub blocks: u64,
    /// Size of a block in bytes.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Type of the protection information of its blocks, 0 without. The controller makes and checks it.
    pub protection: u8,
}

/// What a controller says of itself.
#[derive(Clone, Debug)]
pub struct Identity {
    /// CAP.
    pub capabilities: Cap,
    /// VS.
    pub version: u32,
    /// Identify Controller.
    pub controller: IdentifyController,
    /// I/O queue pairs that it grants.
    pub granted_queues: u32,
}

impl Identity {
    /// Largest transfer in bytes; None without a limit.
    pub fn transfer_limit_bytes(&self) -> Option<u64> {
        let page: u64 = 1 << (12 + self.capabilities.mpsmin());
        match self.controller.mdts {
            0 => None,
            shift => page.checked_shl(shift.into()),
        }
    }

    /// Whether Write Zeroes is there.
    pub fn has_write_zeroes(&self) -> bool {
        self.controller.oncs & ONCS_WRITE_ZEROES != 0
    }
}
