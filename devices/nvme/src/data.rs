//! The data of an I/O command (Base 4.1): PRPs or an SGL, as PSDT says. Admin commands have PRPs: "SGLs shall not be used for Admin
//! commands in NVMe over PCIe implementations" (Base figure 87).

use std::sync::Arc;

use bus::{GuestMemory, GuestRange};
use nvme_spec::{Status, SubmissionEntry, entry};

use crate::prp::PrpWalker;
use crate::sgl::SglWalker;
use crate::window::Windows;

/// Which way data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From guest memory to the controller, as with Write.
    FromGuest,
    /// From the controller to guest memory, as with Read.
    ToGuest,
}

/// Finds the guest memory of commands; keeps its buffers between them.
pub(crate) struct DataWalker {
    prp: PrpWalker,
    sgl: SglWalker,
}

impl DataWalker {
    /// A walker for memory pages of `page_bytes`, a power of two of at least 4096.
    pub fn new(page_bytes: u64) -> Self {
        Self { prp: PrpWalker::new(page_bytes), sgl: SglWalker::new() }
    }

    /// Where memory of the controller is among the addresses of commands; without this there is none.
    pub fn set_windows(&mut self, windows: &Arc<Windows>) {
        self.prp.set_windows(Arc::clone(windows));
        self.sgl.set_windows(Arc::clone(windows));
    }

    pub fn set_page_bytes(&mut self, page_bytes: u64) {
        self.prp.set_page_bytes(page_bytes);
    }

    /// Appends to `ranges` the memory of a transfer of `length_bytes` (not 0) that the data pointer of `entry` describes; what a bit
    /// bucket takes is a range at [`block::NOWHERE`]. Whether data lie in guest memory is checked by whoever accesses them.
    pub fn walk(
        &mut self,
        memory: &GuestMemory,
        entry: &SubmissionEntry,
        length_bytes: u64,
        direction: Direction,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        match entry.psdt() {
            entry::PSDT_PRP => self.prp.walk(memory, entry.prp1, entry.prp2, length_bytes, ranges),
            // They differ in MPTR alone.
            entry::PSDT_SGL_BUFFER | entry::PSDT_SGL_DESCRIPTOR => {
                self.sgl.walk(memory, entry.data_sgl(), length_bytes, direction, ranges)
            }
            _ => Err(Status::INVALID_FIELD.do_not_retry()),
        }
    }

    /// The same for metadata in a buffer of their own (Base 4.1.1, MPTR).
    pub fn walk_metadata(
        &mut self,
        memory: &GuestMemory,
        entry: &SubmissionEntry,
        length_bytes: u64,
        direction: Direction,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        match entry.psdt() {
            // It is the address of one run of memory, at a dword.
            entry::PSDT_PRP if !entry.mptr.is_multiple_of(4) => Err(Status::INVALID_FIELD.do_not_retry()),
            entry::PSDT_PRP | entry::PSDT_SGL_BUFFER => self.prp.walk_run(entry.mptr, length_bytes, ranges),
            entry::PSDT_SGL_DESCRIPTOR => {
                self.sgl.walk_metadata(memory, entry.mptr, length_bytes, direction, ranges)
            }
            _ => Err(Status::INVALID_FIELD.do_not_retry()),
        }
    }
}
