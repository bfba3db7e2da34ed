//! The entropy device (virtio 1.2, 5.4): fills the driver's buffers with random bytes.

use bus::GuestMemory;
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;

use crate::error::Error;
use crate::transport::{VirtioDevice, Work};

/// Where random bytes come from, e.g. getrandom(2).
pub trait Entropy: Send {
    /// Fills `buffer` with bytes that are good enough for keys. Must not block.
    fn fill(&mut self, buffer: &mut [u8]);
}

const DEVICE_TYPE: u16 = 4;
const QUEUES: [u16; 1] = [64];
/// Bytes that one request gets at most: "the device MAY use less than the entire buffer length" (5.4.6.1).
const REQUEST_BYTES: u32 = 64 << 10;
/// Bytes that one call produces, about a millisecond's worth.
const BATCH_BYTES: u32 = 256 << 10;
const CHUNK_BYTES: usize = 4096;

/// The entropy device.
pub struct Rng<E> {
    entropy: E,
}

impl<E: Entropy> Rng<E> {
    /// A device that takes its bytes from `entropy`.
    pub fn new(entropy: E) -> Self {
        Self { entropy }
    }

    /// Fills the writable buffers of a request, and returns how many bytes it wrote. Looks at no more descriptors
    /// than a chain may have, which bounds indirect tables too.
    fn fill(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<u32, QueueError> {
        let mut chunk = [0; CHUNK_BYTES];
        let mut written: u32 = 0;
        for descriptor in chain.take(usize::from(QUEUES[0])).filter(|descriptor| descriptor.is_write_only()) {
            let mut address = descriptor.addr();
            let mut left = descriptor.len().min(REQUEST_BYTES - written);
            while left > 0 {
                let part = &mut chunk[..CHUNK_BYTES.min(left as usize)];
                self.entropy.fill(part);
                memory.write_slice(part, address).map_err(QueueError::GuestMemory)?;
                // At most CHUNK_BYTES.
                let length = part.len() as u32;
                address.0 = address.0.checked_add(u64::from(length)).ok_or(QueueError::AddressOverflow)?;
                left -= length;
                written += length;
            }
        }
        Ok(written)
    }

    fn serve(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<Work, QueueError> {
        let mut work = Work::default();
        let mut produced = 0;
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            if head >= queue.size() {
                return Err(QueueError::InvalidDescriptorIndex);
            }
            let written = self.fill(chain, memory)?;
            queue.add_used(memory, head, written)?;
            work.used = true;
            // A request costs something even if it asks for nothing, so this ends however fast the guest adds more.
            produced += written + CHUNK_BYTES as u32;
            if produced >= BATCH_BYTES {
                work.more = true;
                break;
            }
        }
        Ok(work)
    }
}

impl<E: Entropy> VirtioDevice for Rng<E> {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn class(&self) -> [u8; 3] {
        // Unclassified, as its class is not defined.
        [0x00, 0xff, 0x00]
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn process(&mut self, index: u16, queue: &mut Queue, memory: &GuestMemory) -> Result<Work, Error> {
        self.serve(queue, memory).map_err(|source| Error::Broken { queue: index, source })
    }
}
