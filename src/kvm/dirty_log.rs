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
        let pages = length_bytes / PAGE_SIZE_BYTES;
        for (index, words) in bitmap.chunks(CLEAR_CHUNK_WORDS).enumerate() {
            if words.iter().all(|&word| word == 0) {
                continue;
            }
            let first_page = (index * CLEAR_CHUNK_WORDS * 64) as u64;
            // A multiple of 64 pages, or up to the end of the slot.
            let num_pages = pages.saturating_sub(first_page).min(words.len() as u64 * 64);
            let request = kvm_clear_dirty_log {
                slot,
                num_pages: u32::try_from(num_pages).expect("a chunk is 65536 pages"),
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
