//! The dirty log with manual protection: fetched without clearing, cleared by us in chunks.
//!
//! `KVM_GET_DIRTY_LOG` under `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` leaves the log and the write protection alone;
//! `KVM_CLEAR_DIRTY_LOG` clears the given bits and protects those pages again. Clearing takes the VM's memory lock, so
//! it is done in chunks between which vCPUs get on. A page that is written after it was fetched and before it was
//! cleared loses nothing: its content is read after this function returned.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{errno, ioctl_iow_nr, ioctl_iowr_nr};

use super::{Error, Vm};
use crate::memory::PAGE_SIZE_BYTES;

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Words of the bitmap that one call clears: 64 Ki pages, 256 MiB of guest memory.
const CLEAR_CHUNK_WORDS: usize = 1024;

/// What one call clears.
#[derive(Debug)]
struct Chunk<'a> {
    first_page: u64,
    /// A multiple of 64, or up to the end of the slot.
    num_pages: u32,
    /// A bit for each of them.
    words: &'a [u64],
}

/// All of a slot of so many `pages` in which something is to be cleared.
fn chunks(bitmap: &[u64], pages: u64) -> impl Iterator<Item = Chunk<'_>> {
    let first_pages = (0..pages).step_by(CLEAR_CHUNK_WORDS * 64);
    let chunks = first_pages.zip(bitmap.chunks(CLEAR_CHUNK_WORDS)).map(move |(first_page, words)| {
        let num_pages = (pages - first_page).min(words.len() as u64 * 64);
        Chunk { first_page, num_pages: u32::try_from(num_pages).expect("a chunk is 65536 pages"), words }
    });
    chunks.filter(|chunk| chunk.words.iter().any(|word| *word != 0))
}

impl Vm {
    /// Writes the pages of `slot` that vCPUs wrote since they were last cleared over all of `words`: bit n of word n/64 is page n. None of a
    /// slot that the guest does not see.
    ///
    /// # Panics
    /// If `words` are fewer than a slot of `length_bytes` has.
    pub(crate) fn dirty_log(&self, slot: u32, length_bytes: u64, words: &mut [u64]) -> Result<(), Error> {
        let needed = (length_bytes / PAGE_SIZE_BYTES).div_ceil(64);
        assert!(words.len() as u64 >= needed, "{} words for {length_bytes} bytes", words.len());
        let fetched = self.with_slot(slot, || {
            let request = kvm_dirty_log {
                slot,
                __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
                ..Default::default()
            };
            // SAFETY: the descriptor is a VM's; the kernel writes a bit for each page of the slot, rounded up to words, all of which
            // `words` has.
            let result = unsafe { ioctl_with_ref(self.fd(), KVM_GET_DIRTY_LOG(), &request) };
            if result < 0 {
                let what = format!("fetch the dirty log of memory slot {slot}");
                return Err(Error::Call { what, source: errno::Error::last() });
            }
            Ok(())
        });
        fetched.unwrap_or_else(|| {
            words.fill(0);
            Ok(())
        })
    }

    /// Clears in the log of `slot` the pages that are set in `bitmap`, a whole log of a slot of `length_bytes`, and
    /// has writes to them reported again. A slot that the guest does not see has no log.
    pub(crate) fn clear_dirty_log(&self, slot: u32, length_bytes: u64, bitmap: &[u64]) -> Result<(), Error> {
        self.with_slot(slot, || self.clear_chunks(slot, length_bytes, bitmap)).unwrap_or(Ok(()))
    }

    fn clear_chunks(&self, slot: u32, length_bytes: u64, bitmap: &[u64]) -> Result<(), Error> {
        for Chunk { first_page, num_pages, words } in chunks(bitmap, length_bytes / PAGE_SIZE_BYTES) {
            let request = kvm_clear_dirty_log {
                slot,
                num_pages,
                first_page,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: words.as_ptr() as *mut _,
                },
            };
            // SAFETY: the descriptor is a VM's; the kernel reads `num_pages` bits rounded up to words, which is at most
            // `words`, and writes nothing.
            let result = unsafe { ioctl_with_ref(self.fd(), KVM_CLEAR_DIRTY_LOG(), &request) };
            if result < 0 {
                let what =
                    format!("clear pages {first_page}+{num_pages} in the dirty log of memory slot {slot}");
                return Err(Error::Call { what, source: errno::Error::last() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_clears_more_than_a_chunk_and_all_of_them_clear_everything() {
        const MOST: u64 = 65_536;
        for pages in [1, 63, 64, 65, MOST - 1, MOST, MOST + 1, 3 * MOST, 3 * MOST + 5] {
            let bitmap = vec![u64::MAX; usize::try_from(pages.div_ceil(64)).unwrap()];
            let mut next = 0;
            for Chunk { first_page, num_pages, words } in chunks(&bitmap, pages) {
                let num_pages = u64::from(num_pages);
                assert_eq!((first_page, first_page % 64), (next, 0), "of {pages} pages");
                assert!((1..=MOST).contains(&num_pages) && words.len() as u64 == num_pages.div_ceil(64));
                next += num_pages;
                assert!(num_pages.is_multiple_of(64) || next == pages, "{num_pages} of {pages} pages");
            }
            assert_eq!(next, pages, "all of {pages} pages");
        }
        let mut bitmap = vec![0; 3 * 1024];
        bitmap[1024] = 1;
        bitmap[2047] = 1 << 63;
        let found: Vec<_> =
            chunks(&bitmap, 3 * MOST).map(|chunk| (chunk.first_page, chunk.num_pages)).collect();
        assert_eq!(found, [(MOST, MOST as u32)], "the others have nothing to clear");
    }
}
