//! Physical region pages (Base 4.1.1): from the two entries of a command to runs of guest memory.

use std::sync::Arc;

use bus::{GuestMemory, GuestRange};
use nvme_spec::Status;
use vm_memory::{Bytes, GuestAddress};

use crate::window::Windows;

/// Entries of a list that are read from guest memory at once.
const CHUNK_ENTRIES: usize = 512;

/// Walks PRPs of one memory page size; keeps its buffer between commands.
pub(crate) struct PrpWalker {
    page_bytes: u64,
    windows: Arc<Windows>,
    chunk: Box<[u8; CHUNK_ENTRIES * 8]>,
}

impl PrpWalker {
    /// A walker for pages of `page_bytes`, a power of two of at least 4096.
    pub fn new(page_bytes: u64) -> Self {
        Self { page_bytes, windows: Windows::new(0, 0), chunk: Box::new([0; CHUNK_ENTRIES * 8]) }
    }

    /// Where memory of the controller is among the addresses of commands; without this there is none.
    pub fn set_windows(&mut self, windows: Arc<Windows>) {
        self.windows = windows;
    }

    pub fn set_page_bytes(&mut self, page_bytes: u64) {
        self.page_bytes = page_bytes;
    }

    /// Appends to `ranges` the memory of a transfer of `length_bytes` (not 0) that `prp1` and `prp2` describe; adjacent
    /// pages become one range. Ends after as many entries as the length needs, whatever the lists say. Data pages are
    /// not checked to be guest memory: whoever accesses them does that.
    pub fn walk(
        &mut self,
        memory: &GuestMemory,
        prp1: u64,
        prp2: u64,
        length_bytes: u64,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        // The count of references is shared with other workers: it is left alone where there is no such memory.
        if !self.windows.exist() {
            return self.walk_pages(memory, prp1, prp2, length_bytes, ranges);
        }
        let windows = Arc::clone(&self.windows);
        windows.gather(ranges, |ranges| self.walk_pages(memory, prp1, prp2, length_bytes, ranges))
    }

    /// Appends one run of memory as it is.
    pub fn walk_run(
        &self,
        address: u64,
        length_bytes: u64,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        self.windows.gather(ranges, |ranges| push(ranges, address, length_bytes))
    }

    fn walk_pages(
        &mut self,
        memory: &GuestMemory,
        prp1: u64,
        prp2: u64,
        length_bytes: u64,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        let offset = prp1 % self.page_bytes;
        // "The Offset ... bits 1:0 shall be cleared to 00b."
        if !offset.is_multiple_of(4) {
            return Err(Status::PRP_OFFSET_INVALID.do_not_retry());
        }
        let first = length_bytes.min(self.page_bytes - offset);
        push(ranges, prp1, first)?;
        let rest = length_bytes - first;
        if rest == 0 {
            // PRP2 is reserved.
            return Ok(());
        }
        if rest <= self.page_bytes {
            return self.push_page(prp2, rest, ranges);
        }
        self.walk_list(memory, prp2, rest, ranges)
    }

    /// Reads the pages of a queue that is not physically contiguous (Base 5.4: PRP1 is a list pointer): `count` pages, as the guest
    /// names them.
    pub fn queue_pages(&mut self, memory: &GuestMemory, list: u64, count: u64) -> Result<Vec<u64>, Status> {
        let mut ranges = Vec::new();
        let length_bytes = count.checked_mul(self.page_bytes).ok_or(Status::INVALID_FIELD)?;
        self.walk_list(memory, list, length_bytes, &mut ranges)?;
        let pages = ranges.iter().flat_map(|range| {
            let end = range.address.0 + u64::from(range.length_bytes);
            (range.address.0..end).step_by(self.page_bytes as usize)
        });
        Ok(pages.collect())
    }

    fn walk_list(
        &mut self,
        memory: &GuestMemory,
        mut list: u64,
        mut rest: u64,
        ranges: &mut Vec<GuestRange>,
    ) -> Result<(), Status> {
        // The first list may begin inside a page, at a multiple of an entry's size.
        if !list.is_multiple_of(8) {
            return Err(Status::PRP_OFFSET_INVALID.do_not_retry());
        }
        loop {
            let in_list_page = (self.page_bytes - list % self.page_bytes) / 8;
            let needed = rest.div_ceil(self.page_bytes);
            // "If the last entry of a page is not the last of the list, it points to the next list."
            let (data_entries, chained) =
                if needed > in_list_page { (in_list_page - 1, true) } else { (needed, false) };
            let mut left = data_entries;
            while left > 0 {
                let count = left.min(CHUNK_ENTRIES as u64);
                let place = self.windows.translate(list, count * 8)?;
                let bytes = &mut self.chunk[..count as usize * 8];
                memory
                    .read_slice(bytes, GuestAddress(place))
                    .map_err(|_| Status::DATA_TRANSFER_ERROR.do_not_retry())?;
                for entry in 0..count as usize {
                    let mut raw = [0; 8];
                    raw.copy_from_slice(&self.chunk[entry * 8..entry * 8 + 8]);
                    let length_bytes = rest.min(self.page_bytes);
                    self.push_page(u64::from_le_bytes(raw), length_bytes, ranges)?;
                    rest -= length_bytes;
                }
                left -= count;
                list = list.checked_add(count * 8).ok_or(Status::DATA_TRANSFER_ERROR.do_not_retry())?;
            }
            if !chained {
                return Ok(());
            }
            let mut raw = [0; 8];
            let place = self.windows.translate(list, 8)?;
            memory
                .read_slice(&mut raw, GuestAddress(place))
                .map_err(|_| Status::DATA_TRANSFER_ERROR.do_not_retry())?;
            list = u64::from_le_bytes(raw);
            // An entry inside a list has offset 0, the pointer to the next list included. A following list therefore holds a
            // whole page of entries, at least one of them data, and the walk ends.
            if !list.is_multiple_of(self.page_bytes) {
                return Err(Status::PRP_OFFSET_INVALID.do_not_retry());
            }
        }
    }

    fn push_page(&self, address: u64, length_bytes: u64, ranges: &mut Vec<GuestRange>) -> Result<(), Status> {
        if !address.is_multiple_of(self.page_bytes) {
            return Err(Status::PRP_OFFSET_INVALID.do_not_retry());
        }
        push(ranges, address, length_bytes)
    }
}

/// Appends a run, merging it with the last one where they touch.
pub(crate) fn push(ranges: &mut Vec<GuestRange>, address: u64, length_bytes: u64) -> Result<(), Status> {
    let overflow = Status::DATA_TRANSFER_ERROR.do_not_retry();
    address.checked_add(length_bytes).ok_or(overflow)?;
    let length_bytes = u32::try_from(length_bytes).map_err(|_| overflow)?;
    if let Some(last) = ranges.last_mut()
        && last.address.0.checked_add(u64::from(last.length_bytes)) == Some(address)
        && let Some(sum) = last.length_bytes.checked_add(length_bytes)
    {
        last.length_bytes = sum;
        return Ok(());
    }
    ranges.push(GuestRange { address: GuestAddress(address), length_bytes });
    Ok(())
}

/// Copies `data` to `ranges`; both have the same total.
pub(crate) fn write_ranges(
    memory: &GuestMemory,
    ranges: &[GuestRange],
    mut data: &[u8],
) -> Result<(), Status> {
    for range in ranges {
        let (now, later) = data.split_at(data.len().min(range.length_bytes as usize));
        data = later;
        // A bit bucket takes it.
        if range.address != block::NOWHERE {
            memory.write_slice(now, range.address).map_err(|_| Status::DATA_TRANSFER_ERROR.do_not_retry())?;
        }
    }
    Ok(())
}

/// Copies `ranges` to `data`; both have the same total.
pub(crate) fn read_ranges(
    memory: &GuestMemory,
    ranges: &[GuestRange],
    mut data: &mut [u8],
) -> Result<(), Status> {
    for range in ranges {
        let (now, later) = data.split_at_mut(data.len().min(range.length_bytes as usize));
        memory.read_slice(now, range.address).map_err(|_| Status::DATA_TRANSFER_ERROR.do_not_retry())?;
        data = later;
    }
    Ok(())
}
