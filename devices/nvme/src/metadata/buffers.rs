//! The guest memory of a command, taken piece by piece.

use bus::{GuestMemory, GuestRange};
use nvme_spec::Status;
use vm_memory::{Address, Bytes, GuestAddress};

/// Ranges, and how far they have been used.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pub ranges: Vec<GuestRange>,
    index: usize,
    within_bytes: u32,
}

impl Run {
    pub fn clear(&mut self) {
        self.ranges.clear();
        (self.index, self.within_bytes) = (0, 0);
    }

    /// Copies the next bytes in.
    pub fn read(&mut self, memory: &GuestMemory, mut bytes: &mut [u8]) -> Result<(), Status> {
        while !bytes.is_empty() {
            let (address, length) = self.take(bytes.len())?;
            let (now, later) = bytes.split_at_mut(length);
            memory.read_slice(now, address).map_err(|_| Status::DATA_TRANSFER_ERROR.do_not_retry())?;
            bytes = later;
        }
        Ok(())
    }

    /// Copies `bytes` out, which marks the pages as written. A bit bucket takes what is for it.
    pub fn write(&mut self, memory: &GuestMemory, mut bytes: &[u8]) -> Result<(), Status> {
        while !bytes.is_empty() {
            let (address, length) = self.take(bytes.len())?;
            let (now, later) = bytes.split_at(length);
            if address != block::NOWHERE {
                memory.write_slice(now, address).map_err(|_| Status::DATA_TRANSFER_ERROR.do_not_retry())?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// The next run of at most `most` bytes, which is not 0.
    fn take(&mut self, most: usize) -> Result<(GuestAddress, usize), Status> {
        loop {
            // The walk found as many bytes as the command has.
            let range = self.ranges.get(self.index).ok_or(Status::INTERNAL_ERROR)?;
            let left = range.length_bytes - self.within_bytes;
            if left == 0 {
                self.index += 1;
                self.within_bytes = 0;
                continue;
            }
            let length = most.min(left as usize);
            let address = match range.address {
                block::NOWHERE => block::NOWHERE,
                address => address
                    .checked_add(self.within_bytes.into())
                    .ok_or(Status::DATA_TRANSFER_ERROR.do_not_retry())?,
            };
            self.within_bytes += length as u32;
            return Ok((address, length));
        }
    }
}
