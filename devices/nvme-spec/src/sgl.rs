//! Scatter gather lists (Base 4.1.2).

use crate::SubmissionEntry;

wire_struct! {
    /// An SGL descriptor (Base figure 104 and those that follow it).
    pub struct SglDescriptor [16] {
        /// Address of the data or of the next segment; reserved in a bit bucket.
        0: address: u64,
        /// Length in bytes.
        8: length_bytes: u32,
        /// Bits 7:4 SGL Descriptor Type, 3:0 SGL Descriptor Sub Type.
        15: identifier: u8,
    }
}

/// Descriptor type 0h: data.
pub const DATA_BLOCK: u8 = 0;
/// Descriptor type 1h: as many bytes of a read are dropped.
pub const BIT_BUCKET: u8 = 1;
/// Descriptor type 2h: the next segment, which is not the last.
pub const SEGMENT: u8 = 2;
/// Descriptor type 3h: the next segment, which is the last.
pub const LAST_SEGMENT: u8 = 3;
/// Descriptor type 4h: data of another host by key; not over PCIe.
pub const KEYED_DATA_BLOCK: u8 = 4;

impl SglDescriptor {
    /// A descriptor of `kind` with sub type 0, an address.
    #[must_use]
    pub const fn new(kind: u8, address: u64, length_bytes: u32) -> Self {
        Self { address, length_bytes, identifier: kind << 4 }
    }

    /// SGL Descriptor Type.
    #[must_use]
    pub const fn kind(&self) -> u8 {
        self.identifier >> 4
    }

    /// SGL Descriptor Sub Type: 0h an address, 1h an offset.
    #[must_use]
    pub const fn sub_type(&self) -> u8 {
        self.identifier & 0xf
    }
}

impl SubmissionEntry {
    /// The Data Pointer as SGL Entry 1 (Base figure 87), where PSDT says that it is one.
    #[must_use]
    pub fn data_sgl(&self) -> SglDescriptor {
        SglDescriptor {
            address: self.prp1,
            length_bytes: self.prp2 as u32,
            identifier: (self.prp2 >> 56) as u8,
        }
    }

    /// Makes the Data Pointer an SGL entry. PSDT is another field.
    pub fn set_data_sgl(&mut self, descriptor: SglDescriptor) {
        self.prp1 = descriptor.address;
        self.prp2 = u64::from(descriptor.length_bytes) | u64::from(descriptor.identifier) << 56;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_pointer_is_read_as_a_descriptor() {
        let bytes: [u8; 64] = core::array::from_fn(|index| index as u8 + 1);
        let mut entry = SubmissionEntry::from_bytes(&bytes);
        let mut raw = [0; 16];
        raw.copy_from_slice(&bytes[24..40]);
        let descriptor = SglDescriptor::from_bytes(&raw);
        assert_eq!(entry.data_sgl(), descriptor);
        assert_eq!((descriptor.kind(), descriptor.sub_type()), (2, 8));
        entry.set_data_sgl(SglDescriptor::new(LAST_SEGMENT, 0x1234, 32));
        assert_eq!(entry.data_sgl(), SglDescriptor::new(LAST_SEGMENT, 0x1234, 32));
        assert_eq!(entry.to_bytes()[39], 0x30);
    }
}
