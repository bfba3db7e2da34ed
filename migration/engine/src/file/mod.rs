//! A guest in a file: suspended into it, restored from it.
//!
//! The file is a stream as crate `stream` writes it, with QEMU's layout, digests and trailer. The section `ferry`, before those of
//! the devices, says what machine it was and which generation of the lease it belongs to. The lease ties the file to the disks: it
//! says `in-file` with the digest of exactly this file, until somebody takes the guest out, once.
//!
//! - `suspend`: the story of a guest that goes into a file; `write` knows the two layouts of its memory, `draft` has it appear under
//!   its name only when it is whole.
//! - `snapshot`: the same of a guest that goes on, with `copies` of its images; of all its memory, or of what it has written since
//!   another snapshot (`chain`).
//! - `restore`: the story of one that comes out. Of the mapped layout everything but the pages (`head`) is read and verified first; the
//!   guest then runs, and `fill` brings each piece of its `memory` when it is touched, and the rest meanwhile.

mod chain;
mod copies;
mod draft;
mod fill;
mod head;
mod memory;
mod restore;
mod snapshot;
mod suspend;
mod write;

use stream::Expected;
use vmstate::VmState;

use crate::Error;
use crate::protocol::{DESCRIPTION_BYTES_MAX, Properties};

pub use chain::FileParent;
pub(crate) use draft::Published;
pub use fill::Fill;
pub use restore::{Reading, Restored, Taking, restore_from_file};
pub use snapshot::{SnapshotFailed, SnapshotOptions, snapshot_to_file};
pub use suspend::suspend_to_file;

const SECTION: &str = "ferry";
/// [`Properties`] of every machine: the list has a mark at its end.
const DESCRIPTION_MAX_BYTES: usize = DESCRIPTION_BYTES_MAX + 1;
/// Bytes that are written or read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// The first section of a file: which machine is in it, and which generation of the lease it belongs to. As foreign as the file.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "ferry", version = 2, oldest = 1)]
pub struct FileState {
    /// Whether the guest was running.
    running: bool,
    has_lease: bool,
    lease: [u8; 16],
    /// Of the lease, when the guest went into the file.
    generation: u64,
    description_length: u32,
    /// [`Properties`], saved.
    #[vmstate(len = "description_length", max = DESCRIPTION_MAX_BYTES)]
    description: Vec<u8>,
    /// Of a snapshot, whose guest went on.
    #[vmstate(subsection)]
    images: Option<FileImages>,
    /// Of a snapshot that holds only what was written since another one.
    #[vmstate(subsection)]
    parent: Option<FileParent>,
}

/// The copies of images that belong to a file.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "ferry/images", version = 1)]
struct FileImages {
    length: u32,
    /// [`Properties`], saved.
    #[vmstate(len = "length", max = DESCRIPTION_MAX_BYTES)]
    copies: Vec<u8>,
}

impl FileState {
    /// The state in the section of this name, if it is the one.
    ///
    /// # Errors
    /// It is, and cannot be read.
    pub fn find(section: &str, bytes: &[u8], version: u32) -> Result<Option<Self>, vmstate::Error> {
        if section != SECTION {
            return Ok(None);
        }
        vmstate::from_bytes(bytes, version).map(Some)
    }

    /// The file that has the pages which this one lacks.
    #[must_use]
    pub fn parent(&self) -> Option<&FileParent> {
        self.parent.as_ref()
    }
}

/// The schema of the section that says which machine is in a file.
#[must_use]
pub fn file_schema() -> vmstate::Schema {
    vmstate::schema::<FileState>()
}

/// Expects that section beside those of the devices.
#[must_use]
pub fn expect_file(expected: Expected) -> Expected {
    expected.section::<FileState>(SECTION, 0)
}

fn properties(first: &FileState) -> Result<Properties, Error> {
    vmstate::from_bytes(&first.description, 1).map_err(|error| Error::Protocol {
        doing: "reading the description of the machine in the file",
        reason: error.to_string(),
    })
}
