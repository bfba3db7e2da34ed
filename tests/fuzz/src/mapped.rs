//! Mapped files. They are a MiB and more, nearly all of it holes, so the input lists what is not: be32 offset, be16 length, bytes,
//! again and again. Everything else is zeros.

use std::io;

use stream::{CHUNK_BYTES, Error, Event, Expected, MappedReader, PAGE_BYTES, RamBlock, ReadAt};

use crate::streams::Device;

/// A file with holes.
#[derive(Debug, Default)]
pub struct Sparse<'a> {
    /// Where each piece is; later ones lie over earlier ones.
    pieces: Vec<(u64, &'a [u8])>,
}

impl<'a> Sparse<'a> {
    /// The file that the input lists. A last piece that is cut short ends with the input.
    #[must_use]
    pub fn new(mut input: &'a [u8]) -> Self {
        let mut file = Sparse::default();
        while let Some(([o0, o1, o2, o3, l0, l1], rest)) = input.split_first_chunk::<6>() {
            let offset = u32::from_be_bytes([*o0, *o1, *o2, *o3]);
            let length = usize::from(u16::from_be_bytes([*l0, *l1])).min(rest.len());
            let (piece, rest) = rest.split_at(length);
            file.pieces.push((offset.into(), piece));
            input = rest;
        }
        file
    }

    /// The list for a file.
    #[must_use]
    pub fn list(file: &[u8]) -> Vec<u8> {
        const PIECE: usize = 512;
        let mut out = Vec::new();
        for (index, piece) in file.chunks(PIECE).enumerate() {
            let is_last = (index + 1) * PIECE >= file.len();
            if is_last || piece.iter().any(|byte| *byte != 0) {
                out.extend(((index * PIECE) as u32).to_be_bytes());
                out.extend((piece.len() as u16).to_be_bytes());
                out.extend(piece);
            }
        }
        out
    }
}

impl ReadAt for Sparse<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.length_bytes()?.saturating_sub(offset);
        let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let buffer = &mut buffer[..count];
        buffer.fill(0);
        for (start, bytes) in &self.pieces {
            let skip = offset.saturating_sub(*start).min(bytes.len() as u64) as usize;
            let at = usize::try_from(start.saturating_sub(offset)).unwrap_or(usize::MAX).min(count);
            buffer[at..].iter_mut().zip(&bytes[skip..]).for_each(|(to, from)| *to = *from);
        }
        Ok(count)
    }

    fn length_bytes(&self) -> io::Result<u64> {
        Ok(self.pieces.iter().map(|(offset, bytes)| offset + bytes.len() as u64).max().unwrap_or_default())
    }
}

/// The memory of the model machine, in the mapped layout.
#[must_use]
pub fn blocks() -> Vec<RamBlock> {
    vec![RamBlock::new("ram", CHUNK_BYTES + 8192), RamBlock::new("rom", PAGE_BYTES as u64)]
}

/// A mapped file of the model machine.
pub fn mapped(bytes: &[u8]) {
    let _refused = read(&Sparse::new(bytes));
}

fn read(file: &Sparse<'_>) -> Result<(), Error> {
    let expected = Expected::new(blocks()).section::<Device>("device", 0).section::<Device>("device", 1);
    let mut reader = MappedReader::open(file, expected)?;
    while !matches!(reader.next_event()?, Event::End) {}
    let ram = reader.into_ram()?;
    for (block, place) in ram.blocks().enumerate() {
        let mut end = 0;
        for extent in ram.extents(block) {
            assert!(extent.start >= end && extent.end > extent.start, "{extent:?}");
            end = extent.end;
        }
        assert!(end <= place.block.length_bytes);
        assert!(place.pages_offset + place.block.length_bytes <= file.length_bytes().unwrap_or_default());
    }
    ram.verify()
}
