//! What a controller is built from.

use std::sync::Arc;

use block::Backend;

use crate::Error;
use crate::metadata::{BlockFormat, FORMATS};

/// Largest number of namespaces, and the largest namespace identifier (Identify Controller NN).
pub const MAX_NAMESPACES: u32 = 1024;
/// Most entries that a queue can have (CAP.MQES is a 0's based 16-bit value).
pub const MAX_QUEUE_ENTRIES: u32 = 65_536;
/// Smallest memory page: CAP.MPSMIN 0.
pub(crate) const MIN_PAGE_BYTES: u32 = 4096;

/// The shape of a controller. Source and destination of a migration need the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerConfig {
    /// Serial number: 1 to 20 printable ASCII characters.
    pub serial: String,
    /// I/O queue pairs, 1 to 65,535.
    pub queue_pairs: u16,
    /// MSI-X vectors, 1 to 2,048.
    pub vectors: u16,
    /// Maximum data transfer size as a power of two of 4096 bytes, 1 to 12; 0 means no limit.
    pub mdts: u8,
    /// Most entries a queue can have, 2 to 65,536.
    pub queue_entries: u32,
    /// Whether queues must be physically contiguous (CAP.CQR).
    pub contiguous_queues: bool,
    /// Size of the controller memory buffer, a power of two from 4096 to 2^31; 0: there is none. It is in the guest memory that the
    /// controller is built with ([`memory_with_buffer`](crate::memory_with_buffer)).
    pub buffer_bytes: u64,
    /// Size of the persistent memory region, likewise ([`memory_with_region`](crate::memory_with_region)).
    pub region_bytes: u64,
}

impl ControllerConfig {
    /// A controller with `serial`, 64 queue pairs, a vector for each and for the admin queue, transfers up to 512 KiB.
    #[must_use]
    pub fn new(serial: &str) -> Self {
        Self {
            serial: serial.to_owned(),
            queue_pairs: 64,
            vectors: 65,
            mdts: 7,
            queue_entries: MAX_QUEUE_ENTRIES,
            contiguous_queues: false,
            buffer_bytes: 0,
            region_bytes: 0,
        }
    }

    /// Checks all values.
    ///
    /// # Errors
    /// [`Error::Serial`] or [`Error::Config`] for the first value that is out of range.
    pub fn check(&self) -> Result<(), Error> {
        let printable = self.serial.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        if self.serial.is_empty() || self.serial.len() > 20 || !printable {
            return Err(Error::Serial { serial: self.serial.clone() });
        }
        let refuse =
            |what, value, allowed| Err(Error::Config { serial: self.serial.clone(), what, value, allowed });
        if self.queue_pairs == 0 {
            return refuse("the number of queue pairs", 0, "1 to 65535");
        }
        if !(1..=pci::MAX_VECTORS).contains(&self.vectors) {
            return refuse("the number of MSI-X vectors", u64::from(self.vectors), "1 to 2048");
        }
        if self.mdts > 12 {
            return refuse("MDTS", u64::from(self.mdts), "0 to 12");
        }
        if !(2..=MAX_QUEUE_ENTRIES).contains(&self.queue_entries) {
            return refuse("the number of queue entries", u64::from(self.queue_entries), "2 to 65536");
        }
        for (what, length_bytes) in [
            ("the size of the controller memory buffer", self.buffer_bytes),
            ("the size of the persistent memory region", self.region_bytes),
        ] {
            if length_bytes != 0 && !crate::window::is_possible_size(length_bytes) {
                return refuse(what, length_bytes, "0 or a power of two from 4096 to 2147483648");
            }
        }
        Ok(())
    }

    /// Largest transfer in bytes.
    pub(crate) fn max_transfer_bytes(&self) -> u64 {
        match self.mdts {
            0 => u64::MAX,
            shift => u64::from(MIN_PAGE_BYTES) << shift,
        }
    }

    /// CAP.MQES: 0's based.
    pub(crate) fn mqes(&self) -> u16 {
        (self.queue_entries - 1) as u16
    }

    /// The serial number as Identify Controller has it.
    pub(crate) fn serial_field(&self) -> [u8; 20] {
        padded(&self.serial)
    }
}

/// `text` in a field of `N` bytes, padded with spaces.
pub(crate) fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (place, byte) in field.iter_mut().zip(text.bytes()) {
        *place = byte;
    }
    field
}

/// A namespace to attach when the controller is built.
#[derive(Clone, Debug)]
pub struct NamespaceConfig {
    /// Namespace identifier, 1 to 1,024.
    pub nsid: u32,
    /// Size of a logical block in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Metadata of each block, if they are to have some.
    pub metadata: Option<MetadataConfig>,
    /// Where its bytes live.
    pub backend: Arc<dyn Backend>,
}

/// Metadata of the blocks of a namespace (NVM 5.2, 5.3). They are behind the blocks in its image, which holds fewer blocks for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetadataConfig {
    /// Bytes of each block: 8, or with blocks of 4096 bytes also 64.
    pub bytes: u16,
    /// They are transferred at the end of each block, not in a buffer of their own.
    pub extended: bool,
    /// Type of the protection information in them, 1 to 3; 0: there is none.
    pub protection_type: u8,
    /// Protection information is the first eight bytes of them, not the last.
    pub protection_first: bool,
}

impl MetadataConfig {
    /// The format that has it with blocks of `1 << shift` bytes, if there is one.
    pub(crate) fn format(&self, shift: u8) -> Option<BlockFormat> {
        let wanted = (shift, self.bytes);
        let index = FORMATS.iter().position(|format| (format.shift, format.metadata_bytes) == wanted)?;
        BlockFormat::new(index, self.extended, self.protection_type, self.protection_first)
            .filter(|format| format.metadata.is_some())
    }
}
