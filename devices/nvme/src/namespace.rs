//! A namespace: a numbered run of logical blocks on a backend.

use std::sync::Arc;

use block::{Backend, Failure};
use nvme_spec::{Status, feature};

use crate::Error;
use crate::config::{MAX_NAMESPACES, NamespaceConfig};
use crate::metadata::{BlockFormat, Metadata, Occupied};
use crate::uncorrectable::{Healed, Uncorrectable};

/// A namespace that commands can address.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    pub nsid: u32,
    /// log2 of the block size in bytes.
    pub block_shift: u8,
    /// Size in logical blocks.
    pub blocks: u64,
    /// Metadata of the blocks, if they have some.
    pub metadata: Option<Metadata>,
    /// Bytes of its image. Without metadata all of them are in blocks.
    pub image_bytes: u64,
    /// Writes are refused: the image is read-only, or the namespace is write protected.
    pub read_only: bool,
    pub protection: WriteProtection,
    /// What commands to its blocks are answered with while an operation of the controller has it.
    pub refusal: Option<Status>,
    /// It may be attached to several controllers (Identify Namespace NMIC bit 0).
    pub shared: bool,
    pub uuid: [u8; 16],
    pub backend: Arc<dyn Backend>,
    /// Shared by all copies of the namespace.
    pub uncorrectable: Arc<Uncorrectable>,
    /// Blocks that commands are at, if they have metadata. Shared by all copies too.
    pub occupied: Arc<Occupied>,
}

/// The write protection state of a namespace (Base 8.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteProtection {
    None,
    Protected,
    UntilPowerCycle,
    Permanent,
}

impl WriteProtection {
    /// From the value of the feature.
    pub fn from_value(value: u32) -> Option<Self> {
        Some(match value {
            feature::NO_WRITE_PROTECT => Self::None,
            feature::WRITE_PROTECT => Self::Protected,
            feature::WRITE_PROTECT_UNTIL_POWER_CYCLE => Self::UntilPowerCycle,
            feature::PERMANENT_WRITE_PROTECT => Self::Permanent,
            _ => return None,
        })
    }

    /// The value of the feature.
    pub fn to_value(self) -> u32 {
        match self {
            Self::None => feature::NO_WRITE_PROTECT,
            Self::Protected => feature::WRITE_PROTECT,
            Self::UntilPowerCycle => feature::WRITE_PROTECT_UNTIL_POWER_CYCLE,
            Self::Permanent => feature::PERMANENT_WRITE_PROTECT,
        }
    }
}

/// Namespaces by NSID less one. Holes are normal.
pub(crate) type NamespaceTable = Arc<[Option<Arc<Namespace>>]>;

impl Namespace {
    /// Checks `config` and names the namespace after the controller's `serial`, so that source and destination of a
    /// migration give the same identifiers.
    pub fn new(config: &NamespaceConfig, serial: &str, shared: bool) -> Result<Self, Error> {
        let refuse = |reason: String| Err(Error::Namespace { nsid: config.nsid, reason });
        if !(1..=MAX_NAMESPACES).contains(&config.nsid) {
            return refuse(format!("identifiers are 1 to {MAX_NAMESPACES}"));
        }
        let block_shift = match config.block_bytes {
            512 => 9,
            4096 => 12,
            other => return refuse(format!("blocks of {other} bytes are not supported, only 512 and 4096")),
        };
        let image_bytes = config.backend.identity().capacity_bytes;
        let format = match &config.metadata {
            None => BlockFormat { shift: block_shift, metadata: None },
            Some(metadata) => match metadata.format(block_shift) {
                Some(format) => format,
                None => {
                    return refuse(format!(
                        "there is no format with blocks of {} bytes, {} bytes of metadata and protection information of type {}",
                        config.block_bytes, metadata.bytes, metadata.protection_type
                    ));
                }
            },
        };
        let blocks = match format.blocks(image_bytes) {
            None if format.metadata.is_none() => {
                return refuse(format!(
                    "the image's {image_bytes} bytes are not a whole number of blocks of {} bytes",
                    config.block_bytes
                ));
            }
            None | Some(0) => return refuse(format!("an image of {image_bytes} bytes holds no block")),
            Some(blocks) => blocks,
        };
        let uuid = uuid(serial, config.nsid, 0);
        let backend = Arc::clone(&config.backend);
        Ok(Self::over(config.nsid, &format, blocks, shared, uuid, backend))
    }

    /// A namespace of `blocks` blocks over a backend that has as many bytes as the format needs for them, or more; nothing is done to it.
    pub fn over(
        nsid: u32,
        format: &BlockFormat,
        blocks: u64,
        shared: bool,
        uuid: [u8; 16],
        backend: Arc<dyn Backend>,
    ) -> Self {
        let identity = backend.identity();
        Self {
            nsid,
            block_shift: format.shift,
            blocks,
            metadata: format.metadata,
            image_bytes: identity.capacity_bytes,
            read_only: identity.read_only,
            protection: WriteProtection::None,
            refusal: None,
            shared,
            uuid,
            backend,
            uncorrectable: Arc::default(),
            occupied: Arc::default(),
        }
    }

    /// Size of its image in bytes: what an operation on all of it goes over, metadata included.
    pub fn size_bytes(&self) -> u128 {
        u128::from(self.image_bytes)
    }

    pub fn format(&self) -> BlockFormat {
        BlockFormat { shift: self.block_shift, metadata: self.metadata }
    }

    /// Whether it could have the format: its image holds a block, and without metadata no byte is beyond the last.
    pub fn can_have(&self, format: &BlockFormat) -> bool {
        format.blocks(self.image_bytes).is_some_and(|blocks| blocks > 0)
    }

    /// Gives it another format, if it can have it, and as many blocks as its image then holds.
    pub fn set_format(&mut self, format: &BlockFormat) {
        if let Some(blocks) = format.blocks(self.image_bytes)
            && self.format() != *format
        {
            (self.block_shift, self.metadata, self.blocks) = (format.shift, format.metadata, blocks);
        }
    }

    /// Where the metadata of its blocks begin in its image.
    pub fn metadata_start(&self) -> u64 {
        self.format().metadata_start(self.blocks)
    }

    /// The block that has a byte of the image as its data or metadata.
    pub fn block_at(&self, offset_bytes: u64) -> u64 {
        match self.metadata.zip(offset_bytes.checked_sub(self.metadata_start())) {
            Some((metadata, within)) => (within / u64::from(metadata.bytes)).min(self.blocks - 1),
            None => offset_bytes >> self.block_shift,
        }
    }

    /// Changes the write protection.
    pub fn protect(&mut self, protection: WriteProtection) {
        self.protection = protection;
        self.read_only = self.backend.identity().read_only || protection != WriteProtection::None;
    }

    /// For commands that change what is stored.
    pub fn check_writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::NAMESPACE_WRITE_PROTECTED.do_not_retry()) } else { Ok(()) }
    }

    /// Whether one of the blocks of a byte range is marked as uncorrectable.
    pub fn is_uncorrectable(&self, offset_bytes: u64, length_bytes: u64) -> bool {
        let first = offset_bytes >> self.block_shift;
        self.uncorrectable.touches(first, first + (length_bytes >> self.block_shift))
    }

    /// A byte range was written or deallocated: its blocks can be read again. Returns those that could not.
    pub fn heal(&self, offset_bytes: u64, length_bytes: u64) -> Healed {
        let first = offset_bytes >> self.block_shift;
        self.uncorrectable.heal(first, first + (length_bytes >> self.block_shift))
    }

    /// The byte range of `count` blocks from `first`.
    pub fn byte_range(&self, first: u64, count: u64) -> Result<(u64, u64), Status> {
        match first.checked_add(count) {
            Some(end) if end <= self.blocks => Ok((first << self.block_shift, count << self.block_shift)),
            _ => Err(Status::LBA_OUT_OF_RANGE.do_not_retry()),
        }
    }

    /// IEEE EUI-64: the first half of the UUID with the locally administered bit.
    pub fn eui64(&self) -> [u8; 8] {
        let mut eui64 = [0; 8];
        eui64.copy_from_slice(&self.uuid[..8]);
        eui64[0] = eui64[0] & !1 | 2;
        eui64
    }
}

/// The same namespaces for one worker, so that workers share no reference counts.
pub(crate) fn copy_for_worker(table: &NamespaceTable) -> NamespaceTable {
    table.iter().map(|place| place.as_deref().cloned().map(Arc::new)).collect()
}

/// The namespace of a command that needs an active one (Base 3.2.1): an NSID that cannot exist is Invalid Namespace
/// or Format, one that is not attached is Invalid Field in Command.
pub(crate) fn find(table: &NamespaceTable, nsid: u32) -> Result<&Arc<Namespace>, Status> {
    slot(table, nsid)
}

/// What a table has for an identifier.
pub(crate) fn slot<T>(table: &[Option<T>], nsid: u32) -> Result<&T, Status> {
    let slot = (nsid as usize).checked_sub(1).and_then(|index| table.get(index));
    match slot {
        None => Err(Status::INVALID_NAMESPACE.do_not_retry()),
        Some(None) => Err(Status::INVALID_FIELD.do_not_retry()),
        Some(Some(namespace)) => Ok(namespace),
    }
}

/// The namespace of an I/O command: as [`find`], unless an operation of the controller has it.
pub(crate) fn ready(table: &NamespaceTable, nsid: u32) -> Result<&Arc<Namespace>, Status> {
    let namespace = find(table, nsid)?;
    namespace.refusal.map_or(Ok(namespace), Err)
}

/// The attached namespaces in the order of their identifiers.
pub(crate) fn active(table: &NamespaceTable) -> impl Iterator<Item = &Arc<Namespace>> {
    table.iter().flatten()
}

/// The UUID of the `count`-th namespace that a guest has created. NGUID and EUI64 "shall be globally unique" (NVM figure 97): one that is
/// created again with the same NSID is another namespace.
pub(crate) fn uuid_of_created(serial: &str, nsid: u32, count: u64) -> [u8; 16] {
    uuid(serial, nsid, count)
}

/// A version 8 (custom) UUID from serial number, NSID, and which of those that were created it is (0 none): 128-bit FNV-1a.
fn uuid(serial: &str, nsid: u32, created: u64) -> [u8; 16] {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let created = (created > 0).then(|| created.to_be_bytes()).into_iter().flatten();
    let bytes = serial.bytes().chain([0]).chain(nsid.to_be_bytes()).chain(created);
    let hash = bytes.fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    let mut uuid = hash.to_be_bytes();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// How a backend's failure is reported. `write` tells which media error it is.
pub(crate) fn failure_status(failure: Failure, write: bool) -> Status {
    match failure {
        Failure::OutOfRange => Status::LBA_OUT_OF_RANGE.do_not_retry(),
        Failure::GuestMemory => Status::DATA_TRANSFER_ERROR.do_not_retry(),
        Failure::ReadOnly => Status::NAMESPACE_WRITE_PROTECTED.do_not_retry(),
        Failure::NoSpace => Status::CAPACITY_EXCEEDED,
        Failure::Io(_) if write => Status::WRITE_FAULT,
        Failure::Io(_) => Status::UNRECOVERED_READ_ERROR,
        Failure::Released => Status::NAMESPACE_NOT_READY,
        Failure::Miscompare => Status::COMPARE_FAILURE.do_not_retry(),
    }
}
