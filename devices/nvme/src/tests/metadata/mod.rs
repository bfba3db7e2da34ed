//! Namespaces whose blocks have metadata, with and without protection information.

mod checks;
mod hostile;
mod management;
mod random;
mod together;

use block::Backend;
use nvme_spec::opcode::nvm;
use nvme_spec::{Status, SubmissionEntry};
use std::sync::Arc;

use super::driver::{Guest, memory_image, transfer};
use crate::{ControllerConfig, MetadataConfig, NamespaceConfig};

/// Blocks of 512 bytes with 8 of metadata that are in an image of this size, and their metadata in 5 pages.
pub const IMAGE_BYTES: usize = 300 * 4096;

/// PRCHK.
pub const GUARD: u32 = 4;
pub const APPLICATION: u32 = 2;
pub const REFERENCE: u32 = 1;
/// PRACT.
pub const ACTION: u32 = 8;

/// Every format with metadata: block size, metadata, how they are transferred, type, place.
pub fn formats() -> Vec<(u32, MetadataConfig)> {
    let mut all = Vec::new();
    for (block_bytes, bytes) in [(512, 8), (4096, 8), (4096, 64)] {
        for extended in [false, true] {
            for protection_type in 0..4 {
                for protection_first in [false, true] {
                    if protection_type != 0 || !protection_first {
                        let config = MetadataConfig { bytes, extended, protection_type, protection_first };
                        all.push((block_bytes, config));
                    }
                }
            }
        }
    }
    all
}

pub fn protected(protection_type: u8, extended: bool) -> MetadataConfig {
    MetadataConfig { bytes: 8, extended, protection_type, protection_first: false }
}

/// The CRC of T10 DIF, bit by bit.
pub fn crc(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc: u16, &byte| {
        (0..8).fold(
            crc ^ u16::from(byte) << 8,
            |crc, _| {
                if crc & 0x8000 != 0 { crc << 1 ^ 0x8bb7 } else { crc << 1 }
            },
        )
    })
}

/// Blocks as a guest has them: data and metadata of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    pub data: Vec<Vec<u8>>,
    pub metadata: Vec<Vec<u8>>,
}

impl Blocks {
    /// Blocks that differ from each other, and from those with another seed.
    pub fn patterned(count: usize, block_bytes: usize, metadata_bytes: usize, seed: u8) -> Self {
        let line = |length: usize, block: usize, salt: usize| -> Vec<u8> {
            (0..length).map(|at| (at * 7 + block * 31 + salt) as u8 ^ seed).collect()
        };
        Self {
            data: (0..count).map(|block| line(block_bytes, block, 1)).collect(),
            metadata: (0..count).map(|block| line(metadata_bytes, block, 99)).collect(),
        }
    }
}

/// A disk with metadata, and how a guest uses it.
pub struct Disk {
    pub guest: Guest,
    pub block_bytes: usize,
    pub format: MetadataConfig,
    /// Data are here, metadata with a buffer of their own there.
    pub area: u64,
    pub separate: u64,
}

/// A command and its protection information fields.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fields {
    pub prinfo: u32,
    pub reference: u32,
    pub application: u16,
    pub mask: u16,
}

impl Fields {
    pub fn new(prinfo: u32, reference: u64) -> Self {
        Self { prinfo, reference: reference as u32, application: 0, mask: 0xffff }
    }

    pub fn put(self, mut entry: SubmissionEntry) -> SubmissionEntry {
        entry.cdw12 |= self.prinfo << 26;
        entry.cdw14 = self.reference;
        entry.cdw15 = u32::from(self.application) | u32::from(self.mask) << 16;
        entry
    }
}

pub fn config() -> ControllerConfig {
    ControllerConfig { queue_pairs: 2, vectors: 3, ..ControllerConfig::new("METADATA") }
}

pub fn namespace_on(backend: Arc<dyn Backend>, block_bytes: u32, format: MetadataConfig) -> NamespaceConfig {
    NamespaceConfig { nsid: 1, block_bytes, metadata: Some(format), backend }
}

impl Disk {
    pub fn new(block_bytes: u32, format: MetadataConfig) -> Self {
        Self::on(memory_image(IMAGE_BYTES), block_bytes, format)
    }

    pub fn on(backend: Arc<dyn Backend>, block_bytes: u32, format: MetadataConfig) -> Self {
        let mut guest = Guest::ready(config(), vec![namespace_on(backend, block_bytes, format)]);
        guest.create_pair(1, 16);
        guest.create_pair(2, 16);
        let (area, separate) = (guest.pages(180), guest.pages(4));
        Self { guest, block_bytes: block_bytes as usize, format, area, separate }
    }

    pub fn metadata_bytes(&self) -> usize {
        self.format.bytes.into()
    }

    /// Whether metadata go with a command.
    pub fn transfers(&self, fields: Fields) -> bool {
        self.format.protection_type == 0 || fields.prinfo & ACTION == 0 || self.format.bytes > 8
    }

    /// Where protection information is in the metadata.
    pub fn tuple(&self) -> std::ops::Range<usize> {
        let start = if self.format.protection_first { 0 } else { self.metadata_bytes() - 8 };
        start..start + 8
    }

    /// The protection information of block `index` of a command, as the specification says.
    pub fn expected_tuple(&self, data: &[u8], metadata: &[u8], fields: Fields, index: usize) -> Vec<u8> {
        let covered = if self.format.protection_first { 0 } else { self.metadata_bytes() - 8 };
        let guard = crc(&[data, &metadata[..covered]].concat());
        let counts = if self.format.protection_type == 3 { 0 } else { index as u32 };
        let reference = fields.reference.wrapping_add(counts);
        [&guard.to_be_bytes()[..], &fields.application.to_be_bytes(), &reference.to_be_bytes()].concat()
    }

    /// Gives blocks the protection information that the fields say.
    pub fn protect(&self, blocks: &mut Blocks, fields: Fields) {
        for index in 0..blocks.data.len() {
            let tuple = self.expected_tuple(&blocks.data[index], &blocks.metadata[index], fields, index);
            blocks.metadata[index][self.tuple()].copy_from_slice(&tuple);
        }
    }

    pub fn patterned(&self, count: usize, seed: u8) -> Blocks {
        Blocks::patterned(count, self.block_bytes, self.metadata_bytes(), seed)
    }

    /// Puts blocks where commands find them.
    pub fn put(&self, blocks: &Blocks, fields: Fields) {
        let both = blocks.data.iter().zip(&blocks.metadata);
        if self.format.extended && self.transfers(fields) {
            let bytes: Vec<u8> = both.flat_map(|(data, metadata)| [&data[..], metadata].concat()).collect();
            self.guest.write_bytes(self.area, &bytes);
        } else {
            self.guest.write_bytes(self.area, &blocks.data.concat());
            self.guest.write_bytes(self.separate, &blocks.metadata.concat());
        }
    }

    /// What is where commands put it.
    pub fn take(&self, count: usize, fields: Fields) -> Blocks {
        let (size, bytes) = (self.block_bytes, self.metadata_bytes());
        let cut =
            |all: Vec<u8>, size: usize| -> Vec<Vec<u8>> { all.chunks(size).map(<[u8]>::to_vec).collect() };
        if self.format.extended && self.transfers(fields) {
            let all = cut(self.guest.read_bytes(self.area, count * (size + bytes)), size + bytes);
            Blocks {
                data: all.iter().map(|both| both[..size].to_vec()).collect(),
                metadata: all.iter().map(|both| both[size..].to_vec()).collect(),
            }
        } else {
            Blocks {
                data: cut(self.guest.read_bytes(self.area, count * size), size),
                metadata: cut(self.guest.read_bytes(self.separate, count * bytes), bytes),
            }
        }
    }

    /// A command to blocks, with its PRP list if it needs one.
    pub fn entry(&self, opcode: u8, lba: u64, count: usize, fields: Fields) -> SubmissionEntry {
        let mut entry = fields.put(transfer(opcode, 1, lba, count as u32, self.area));
        entry.mptr = self.separate;
        let extended = self.format.extended && self.transfers(fields);
        let bytes = count * (self.block_bytes + if extended { self.metadata_bytes() } else { 0 });
        if bytes > 8192 {
            let list: Vec<u8> = (1..bytes.div_ceil(4096) as u64)
                .flat_map(|page| (self.area + page * 4096).to_le_bytes())
                .collect();
            let at = self.area + 178 * 4096;
            self.guest.write_bytes(at, &list);
            entry.prp2 = at;
        }
        entry
    }

    pub fn io(&mut self, opcode: u8, lba: u64, count: usize, fields: Fields) -> Result<(), Status> {
        let entry = self.entry(opcode, lba, count, fields);
        self.guest.io(1, entry)
    }

    pub fn write(&mut self, lba: u64, blocks: &Blocks, fields: Fields) -> Result<(), Status> {
        self.put(blocks, fields);
        self.io(nvm::WRITE, lba, blocks.data.len(), fields)
    }

    pub fn read(&mut self, lba: u64, count: usize, fields: Fields) -> Result<Blocks, Status> {
        let bytes = count * (self.block_bytes + self.metadata_bytes());
        self.guest.write_bytes(self.area, &vec![0xee; bytes]);
        self.guest.write_bytes(self.separate, &vec![0xee; count * self.metadata_bytes()]);
        self.io(nvm::READ, lba, count, fields)?;
        Ok(self.take(count, fields))
    }

    /// Everything that the disk has of blocks, unchecked.
    pub fn raw(&mut self, lba: u64, count: usize) -> Blocks {
        self.read(lba, count, Fields::default()).unwrap()
    }
}
