//! What source and destination of a migration must both have, as data that can be compared before any RAM moves.

use std::sync::Arc;

use vmstate::VmState;

use crate::config::{ControllerConfig, MetadataConfig, padded};
use crate::controller::Controller;
use crate::metadata::BlockFormat;
use crate::namespace::{self, Namespace};
use crate::shared::lock;

/// The shape of a controller.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/shape", version = 1)]
pub struct Shape {
    /// Serial number, padded with spaces.
    pub serial: [u8; 20],
    /// I/O queue pairs.
    pub queue_pairs: u16,
    /// MSI-X vectors.
    pub vectors: u16,
    /// Maximum data transfer size as a power of two of 4096 bytes.
    pub mdts: u8,
    /// Most entries of a queue.
    pub queue_entries: u32,
    /// Queues must be physically contiguous.
    pub contiguous_queues: bool,
}

/// The shape of a namespace.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/namespace-shape", version = 1)]
pub struct NamespaceShape {
    /// Namespace identifier.
    pub nsid: u32,
    /// log2 of the size of a block in bytes: that of the format which the namespace has now.
    pub block_shift: u8,
    /// Size in blocks.
    pub blocks: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// UUID, which is the NGUID too.
    pub uuid: [u8; 16],
    /// Kind of backend (`file`, `memory`, `null`), padded with spaces.
    pub backend: [u8; 8],
    /// Metadata of its blocks, if they have some.
    #[vmstate(subsection)]
    pub metadata: Option<MetadataShape>,
}

/// Metadata of the blocks of a namespace.
#[derive(VmState, Clone, Copy, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/namespace-shape/metadata", version = 1)]
pub struct MetadataShape {
    /// Bytes of each block.
    pub bytes: u16,
    /// They are transferred at the end of each block.
    pub extended: bool,
    /// Type of their protection information, 0 for none.
    pub protection_type: u8,
    /// It is the first eight bytes of them.
    pub protection_first: bool,
    /// Bytes of the image, which do not follow from the number of blocks.
    pub image_bytes: u64,
}

/// A controller and its namespaces.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme/inventory", version = 1)]
pub struct Inventory {
    /// The controller.
    pub shape: Shape,
    /// Namespaces.
    pub namespace_count: u32,
    /// In the order of their identifiers.
    #[vmstate(len = "namespace_count", max = 1024)]
    pub namespaces: Vec<NamespaceShape>,
}

impl Shape {
    pub(crate) fn of(config: &ControllerConfig) -> Self {
        Self {
            serial: config.serial_field(),
            queue_pairs: config.queue_pairs,
            vectors: config.vectors,
            mdts: config.mdts,
            queue_entries: config.queue_entries,
            contiguous_queues: config.contiguous_queues,
        }
    }

    fn name(&self) -> String {
        String::from_utf8_lossy(&self.serial).trim_end().to_owned()
    }

    /// What `other` has that this has not, one sentence each.
    fn differences(&self, other: &Self) -> Vec<String> {
        let pairs = [
            ("queue pairs", u64::from(self.queue_pairs), u64::from(other.queue_pairs)),
            ("MSI-X vectors", u64::from(self.vectors), u64::from(other.vectors)),
            ("MDTS", u64::from(self.mdts), u64::from(other.mdts)),
            ("entries of a queue", u64::from(self.queue_entries), u64::from(other.queue_entries)),
            ("contiguous queues", u64::from(self.contiguous_queues), u64::from(other.contiguous_queues)),
        ];
        let mut found = Vec::new();
        if self.serial != other.serial {
            found.push(format!("NVMe serial number: {:?} here, {:?} there", self.name(), other.name()));
        }
        for (what, here, there) in pairs.into_iter().filter(|(_, here, there)| here != there) {
            found.push(format!("NVMe controller {:?}, {what}: {here} here, {there} there", self.name()));
        }
        found
    }
}

impl NamespaceShape {
    pub(crate) fn of(namespace: &Namespace) -> Self {
        let identity = namespace.backend.identity();
        Self {
            nsid: namespace.nsid,
            block_shift: namespace.block_shift,
            blocks: namespace.blocks,
            read_only: identity.read_only,
            uuid: namespace.uuid,
            backend: padded(identity.kind),
            metadata: namespace.metadata.map(|metadata| MetadataShape {
                bytes: metadata.bytes,
                extended: metadata.extended,
                protection_type: metadata.protection.map_or(0, |protection| protection.kind),
                protection_first: metadata.protection.is_some_and(|protection| protection.first),
                image_bytes: namespace.image_bytes,
            }),
        }
    }

    /// The format that it says, if there is one.
    pub(crate) fn format(&self) -> Option<BlockFormat> {
        let shift = self.block_shift;
        match &self.metadata {
            None => Some(BlockFormat { shift, metadata: None }).filter(|format| format.index().is_some()),
            Some(shape) => MetadataConfig {
                bytes: shape.bytes,
                extended: shape.extended,
                protection_type: shape.protection_type,
                protection_first: shape.protection_first,
            }
            .format(shift)
            // What means nothing is not said.
            .filter(|_| shape.protection_type != 0 || !shape.protection_first),
        }
    }

    fn size_bytes(&self) -> String {
        if let Some(metadata) = &self.metadata {
            return metadata.image_bytes.to_string();
        }
        let bytes = 1u64.checked_shl(self.block_shift.into()).map(u128::from);
        bytes.map_or_else(
            || format!("{} * 2^{}", self.blocks, self.block_shift),
            |bytes| (u128::from(self.blocks) * bytes).to_string(),
        )
    }

    /// In which respects `other`, of the same identifier, is different.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let backend = |shape: &Self| String::from_utf8_lossy(&shape.backend).trim_end().to_owned();
        let same = (self.block_shift, self.metadata) == (other.block_shift, other.metadata);
        let size = match same {
            true => ("size in blocks", self.blocks.to_string(), other.blocks.to_string()),
            // The guest formats: who takes over gives the namespace the blocks that the other one had. The image must be as large.
            false => ("size in bytes", self.size_bytes(), other.size_bytes()),
        };
        let pairs = [
            size,
            ("read only", self.read_only.to_string(), other.read_only.to_string()),
            ("UUID", hex(&self.uuid), hex(&other.uuid)),
            ("backend", backend(self), backend(other)),
        ];
        let different = pairs.into_iter().filter(|(_, here, there)| here != there);
        different
            .map(|(what, here, there)| {
                format!("NVMe namespace {}, {what}: {here} here, {there} there", self.nsid)
            })
            .collect()
    }
}

impl Inventory {
    /// All the reasons why a controller like `other` cannot take over from one like this, or the other way round.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = self.shape.differences(&other.shape);
        for here in &self.namespaces {
            match other.namespaces.iter().find(|there| there.nsid == here.nsid) {
                Some(there) => found.extend(here.differences(there)),
                None => found.push(format!("NVMe namespace {} is missing there", here.nsid)),
            }
        }
        for there in &other.namespaces {
            if !self.namespaces.iter().any(|here| here.nsid == there.nsid) {
                found.push(format!("NVMe namespace {} is missing here", there.nsid));
            }
        }
        found
    }
}

impl Controller {
    /// What another controller needs to have to take over from this one.
    #[must_use]
    pub fn inventory(&self) -> Inventory {
        let table = Arc::clone(&lock(&self.admin).namespaces);
        let namespaces: Vec<_> =
            namespace::active(&table).map(|namespace| NamespaceShape::of(namespace)).collect();
        Inventory {
            shape: Shape::of(&self.pool.shared.config),
            namespace_count: namespaces.len() as u32,
            namespaces,
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
