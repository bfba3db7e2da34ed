//! A namespace that is allocated, and how it is saved.

use std::collections::BTreeSet;
use std::sync::Arc;

use nvme_spec::Status;

use crate::Error;
use crate::inventory::NamespaceShape;
use crate::namespace::{Namespace, WriteProtection};
use crate::store::{AllocatedMarksState, AllocatedProtectionState, AllocatedState, Store};
use crate::uncorrectable::Uncorrectable;

/// A namespace that exists (Base 3.2.1, "allocated"), attached or not.
pub(crate) struct Allocated {
    pub namespace: Namespace,
    /// The guest created it.
    pub created: bool,
    /// Identifiers of the controllers that it is attached to.
    pub attached: BTreeSet<u16>,
}

impl Allocated {
    /// Whether no operation of a controller (format, sanitize) has it; what its commands are answered with meanwhile.
    pub fn is_at_rest(&self) -> Result<(), Status> {
        self.namespace.refusal.map_or(Ok(()), Err)
    }

    /// As it is saved.
    pub fn to_state(&self) -> AllocatedState {
        AllocatedState {
            shape: NamespaceShape::of(&self.namespace),
            created: self.created,
            shared: self.namespace.shared,
            attached_count: self.attached.len() as u32,
            attached: self.attached.iter().copied().collect(),
            protection: match self.namespace.protection {
                WriteProtection::None => None,
                protection => Some(AllocatedProtectionState { value: protection.to_value() as u8 }),
            },
            uncorrectable: self.marks(),
        }
    }

    /// Its marked blocks as they are saved.
    pub fn marks(&self) -> Option<AllocatedMarksState> {
        self.namespace.uncorrectable.save().map(|marks| AllocatedMarksState { marks })
    }

    /// Marks the blocks that were marked when it was saved, and no others.
    pub fn mark_as(&mut self, record: &AllocatedState) -> Result<(), Error> {
        let marks = Uncorrectable::default();
        if let Some(saved) = &record.uncorrectable {
            marks.load(&saved.marks, self.namespace.blocks).map_err(|(first, reason)| Error::Namespace {
                nsid: record.shape.nsid,
                reason: format!("its uncorrectable blocks from {first} on: {reason}"),
            })?;
        }
        self.namespace.uncorrectable = Arc::new(marks);
        Ok(())
    }

    /// Protects it as it was saved.
    pub fn protect_as(&mut self, record: &AllocatedState) -> Result<(), Error> {
        let value = record.protection.as_ref().map_or(0, |protection| protection.value.into());
        let Some(protection) = WriteProtection::from_value(value) else {
            let reason = format!("its write protection is {value}, which is none");
            return Err(Error::Namespace { nsid: record.shape.nsid, reason });
        };
        self.namespace.protect(protection);
        Ok(())
    }
}

/// A created namespace as it was saved, with its image.
pub(crate) fn reopen(store: Option<&dyn Store>, record: &AllocatedState) -> Result<Allocated, Error> {
    let shape = &record.shape;
    let refuse = |reason: String| Err(Error::Namespace { nsid: shape.nsid, reason });
    let Some(format) = shape.format() else {
        return refuse(format!(
            "there is no format with blocks of 2^{} bytes and such metadata",
            shape.block_shift
        ));
    };
    let needed_bytes = format.image_bytes(shape.blocks).filter(|_| shape.blocks > 0);
    let size_bytes = match &shape.metadata {
        None => needed_bytes,
        Some(metadata) => {
            needed_bytes.filter(|&needed| needed <= metadata.image_bytes).map(|_| metadata.image_bytes)
        }
    };
    let Some(size_bytes) = size_bytes else {
        return refuse(format!("{} blocks are no size of a namespace", shape.blocks));
    };
    let Some(store) = store else {
        return refuse("the guest created it, and there is no directory for its image here".to_owned());
    };
    let backend = match store.open(&shape.uuid, size_bytes, 1 << shape.block_shift) {
        Ok(backend) => backend,
        Err(source) => {
            return Err(Error::NamespaceImage { nsid: shape.nsid, source });
        }
    };
    let namespace = Namespace::over(shape.nsid, &format, shape.blocks, record.shared, shape.uuid, backend);
    let attached = record.attached.iter().copied().collect();
    let mut allocated = Allocated { namespace, created: true, attached };
    allocated.protect_as(record)?;
    allocated.mark_as(record)?;
    Ok(allocated)
}
