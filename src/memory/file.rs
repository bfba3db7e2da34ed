//! A block whose contents are a file from some moment on: the persistent memory of a device.

use std::fs::File;
use std::io;

use rustix::mm::ProtFlags;

use super::{Error, RamBlock};

impl RamBlock {
    /// Makes the block what is in `file`, which is as long and has no holes, in the place of the memory that it was, which is given back:
    /// what was in there is gone, and what is written from now on is in the file. Mapping, memory slot and bitmap stay. Nobody uses the
    /// block meanwhile.
    ///
    /// # Errors
    /// [`Error::Create`]: the kernel refuses, and the block is as it was. [`Error::BadSize`]: the file has another length, or there is one
    /// already.
    pub fn attach(&self, file: File) -> Result<(), Error> {
        let length_bytes = self.length_bytes();
        let failed = |source: io::Error| Error::Create {
            what: "map its file",
            name: self.name.clone(),
            length_bytes,
            source,
        };
        let found_bytes = file.metadata().map_err(failed)?.len();
        if found_bytes != length_bytes || self.file.get().is_some() {
            return Err(Error::BadSize { name: self.name.clone(), length_bytes: found_bytes });
        }
        self.map_fixed("map its file", &file, ProtFlags::READ | ProtFlags::WRITE)?;
        // Nobody else attaches: the callers' lock.
        let _ = self.file.set(file);
        Ok(())
    }

    /// Makes what was written to the file durable; nothing, if there is none.
    ///
    /// # Errors
    /// Something may be lost.
    pub fn sync(&self) -> io::Result<()> {
        self.file.get().map_or(Ok(()), File::sync_data)
    }

    /// The file that the block is.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.file.get()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{GuestRam, RAM_LOW};

    #[test]
    fn a_block_becomes_a_file_where_it_is() {
        let ram = GuestRam::with_buffers(1 << 20, &[], &[("region".into(), 8192)]).unwrap();
        let block = ram.block("region").unwrap();
        block.write(0, &[1; 8192]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[2; 8192], 0).unwrap();
        block.mapping.bitmap().reset();
        block.attach(file.try_clone().unwrap()).unwrap();
        let byte = |offset| {
            let mut data = [0];
            ram.block("region").unwrap().read(offset, &mut data).unwrap();
            data[0]
        };
        assert_eq!((byte(0), byte(8191)), (2, 2));
        block.write(4096, &[3]).unwrap();
        assert_eq!(block.mapping.bitmap().get_and_reset(), [0b10], "its pages are marked as before");
        block.sync().unwrap();
        let mut data = [0; 2];
        file.read_exact_at(&mut data, 4096).unwrap();
        assert_eq!(data, [3, 2]);
        let populated = block.populated_ranges().unwrap();
        assert_eq!((populated.len(), populated[0].clone()), (1, 0..8192));
        block.clear(4096, 4096).unwrap();
        file.read_exact_at(&mut data, 4096).unwrap();
        assert_eq!((data, byte(0)), ([0, 0], 2));
        assert!(block.attach(file).is_err(), "there is one");
    }

    #[test]
    fn a_file_of_another_length_is_refused_and_nothing_changes() {
        let ram = GuestRam::new(1 << 20, &[]).unwrap();
        let block = ram.block(RAM_LOW).unwrap();
        block.write(0, &[1]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len((1 << 20) - 1).unwrap();
        assert!(matches!(block.attach(file), Err(Error::BadSize { .. })));
        let byte: u8 = ram.memory().read_obj(GuestAddress(0)).unwrap();
        assert_eq!((byte, block.file().is_none()), (1, true));
        block.sync().unwrap();
    }
}
