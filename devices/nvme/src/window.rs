//! The addresses by which commands name memory of the controller: its memory buffer (Base 8.5) and its persistent memory region
//! (Base 8.14).
//!
//! The guest chooses them (CMBMSC.CBA, PMRMSCU and PMRMSCL), and may choose others at any time. Guest memory does not change with them:
//! in the [`GuestMemory`] that a controller is built with, the buffer is at [`BUFFER_START`] and the region at
//! [`REGION_START`], above all that a guest can address, and the addresses of commands are translated to them when they are read. What
//! was translated stays where it is, queues in a saved state too.
//!
//! In the buffer there may be anything. In the region there are data only: PMRCAP says RDS and WDS, and nothing of lists and queues.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bus::{GuestMapping, GuestMemory, GuestRange, GuestRegion};
use nvme_spec::{Status, regs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Where the controller memory buffer is in guest memory; physical addresses have at most 52 bits.
pub(crate) const BUFFER_START: u64 = 1 << 60;
/// Where the persistent memory region is.
pub(crate) const REGION_START: u64 = 1 << 61;
/// Granularity of CMBSZ.SZ, and of both base addresses.
pub(crate) const UNIT_BYTES: u64 = 4096;
/// Largest buffer and region: what CMBSZ.SZ can say in units of 4 KiB, as a power of two.
const MAX_BYTES: u64 = 1 << 31;
/// The base of a window while commands cannot name what it shows.
const CLOSED: u64 = u64::MAX;

/// "... all data and metadata associated with a particular command shall be either entirely located in the Persistent Memory Region or
/// outside the Persistent Memory Region."
const PARTLY_IN_REGION: Status = Status::INVALID_FIELD.do_not_retry();

/// Whether a buffer or region can have that size: a BAR shows a power of two.
pub(crate) fn is_possible_size(length_bytes: u64) -> bool {
    length_bytes.is_power_of_two() && (UNIT_BYTES..=MAX_BYTES).contains(&length_bytes)
}

/// `memory` with `mapping` at `start`; `None`: it has no possible size, or there is one already.
pub(crate) fn memory_with(
    memory: &GuestMemory,
    mapping: Arc<GuestMapping>,
    start: u64,
) -> Option<GuestMemory> {
    if !is_possible_size(mapping.size() as u64) {
        return None;
    }
    let region = GuestRegion::with_arc(mapping, GuestAddress(start))?;
    memory.insert_region(Arc::new(region)).ok()
}

/// Whether `memory` has `length_bytes` at `start`, or nothing if that is 0.
pub(crate) fn is_in(memory: &GuestMemory, start: u64, length_bytes: u64) -> bool {
    memory.find_region(GuestAddress(start)).map_or(0, |region| region.len()) == length_bytes
}

/// Whether a translated address is in RAM.
pub(crate) fn is_in_ram(address: u64) -> bool {
    address < BUFFER_START
}

/// Whether a translated address is in the controller memory buffer.
pub(crate) fn is_in_buffer(address: u64) -> bool {
    (BUFFER_START..REGION_START).contains(&address)
}

/// Whether a translated address is in the persistent memory region.
pub(crate) fn is_in_region(address: u64) -> bool {
    address >= REGION_START
}

/// A guest read of a BAR that shows `length_bytes` at `start` of `memory`; what is beyond reads 0.
pub(crate) fn read(memory: &GuestMemory, start: u64, length_bytes: u64, offset: u64, data: &mut [u8]) {
    data.fill(0);
    if let Some(address) = place(start, length_bytes, offset, data.len()) {
        let _ = memory.read_slice(data, address);
    }
}

/// A guest write of such a BAR; what is beyond is ignored.
pub(crate) fn write(memory: &GuestMemory, start: u64, length_bytes: u64, offset: u64, data: &[u8]) {
    if let Some(address) = place(start, length_bytes, offset, data.len()) {
        let _ = memory.write_slice(data, address);
    }
}

fn place(start: u64, length_bytes: u64, offset: u64, length: usize) -> Option<GuestAddress> {
    let end = offset.checked_add(length as u64)?;
    (end <= length_bytes).then_some(GuestAddress(start + offset))
}

/// Where the guest has the buffer or the region.
#[derive(Debug)]
struct Window {
    length_bytes: u64,
    base: AtomicU64,
}

impl Window {
    fn new(length_bytes: u64) -> Self {
        Self { length_bytes, base: AtomicU64::new(CLOSED) }
    }

    /// The addresses that it would have from `base`, if it can be there: "no part ... is greater than 2^64 - 1", and here below what no
    /// guest can address.
    fn range_at(&self, base: u64) -> Option<Range<u64>> {
        let end = base.checked_add(self.length_bytes).filter(|&end| end <= BUFFER_START)?;
        (self.length_bytes > 0).then_some(base..end)
    }

    fn set(&self, range: Option<&Range<u64>>) {
        self.base.store(range.map_or(CLOSED, |range| range.start), Ordering::Release);
    }

    fn is_open(&self) -> bool {
        self.base.load(Ordering::Acquire) != CLOSED
    }

    /// The addresses that it has now; none while it is closed.
    fn range(&self) -> Range<u64> {
        match self.base.load(Ordering::Acquire) {
            CLOSED => 0..0,
            base => base..base + self.length_bytes,
        }
    }
}

/// Both windows, read by workers while vCPU threads move them.
#[derive(Debug)]
pub(crate) struct Windows {
    buffer: Window,
    region: Window,
    region_is_ready: AtomicBool,
}

/// Both at one moment: what one command names does not change while it is translated.
struct View {
    buffer: Range<u64>,
    region: Range<u64>,
    region_is_ready: bool,
}

impl Windows {
    /// Closed windows of a buffer and a region of these sizes, 0 for none.
    pub fn new(buffer_bytes: u64, region_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            buffer: Window::new(buffer_bytes),
            region: Window::new(region_bytes),
            region_is_ready: AtomicBool::new(false),
        })
    }

    /// Size of the controller memory buffer, 0 if there is none.
    pub fn buffer_bytes(&self) -> u64 {
        self.buffer.length_bytes
    }

    /// Size of the persistent memory region, 0 if there is none.
    pub fn region_bytes(&self) -> u64 {
        self.region.length_bytes
    }

    /// Whether there is memory of the controller.
    pub fn exist(&self) -> bool {
        self.buffer.length_bytes > 0 || self.region.length_bytes > 0
    }

    /// Whether a translated address can be in the buffer.
    pub fn buffer_holds(&self, address: u64) -> bool {
        self.buffer.length_bytes > 0 && is_in_buffer(address)
    }

    /// Whether commands reach the region, if they name it.
    pub fn set_region_ready(&self, ready: bool) {
        self.region_is_ready.store(ready, Ordering::Release);
    }

    /// Whether data and metadata of one command, translated, may be where they are. Those of each are in the region or none is.
    pub fn check_together(&self, data: &[GuestRange], metadata: &[GuestRange]) -> Result<(), Status> {
        let is_in = |ranges: &[GuestRange]| {
            let first = ranges.iter().find(|range| range.address != block::NOWHERE);
            first.map(|range| is_in_region(range.address.0))
        };
        match (is_in(data), is_in(metadata)) {
            (Some(data), Some(metadata)) if self.region.length_bytes > 0 && data != metadata => {
                Err(PARTLY_IN_REGION)
            }
            _ => Ok(()),
        }
    }

    fn view(&self) -> View {
        View {
            buffer: self.buffer.range(),
            region: self.region.range(),
            region_is_ready: self.region_is_ready.load(Ordering::Acquire),
        }
    }

    /// Where a list or a queue of `length_bytes` at the guest's `address` is in guest memory.
    pub fn translate(&self, address: u64, length_bytes: u64) -> Result<u64, Status> {
        if !self.exist() {
            return Ok(address);
        }
        let place = self.view().translate(address, length_bytes)?;
        if is_in_region(place) {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        Ok(place)
    }

    /// Appends to `ranges` the data that `walk` finds, translated.
    pub fn gather(
        &self,
        ranges: &mut Vec<GuestRange>,
        walk: impl FnOnce(&mut Vec<GuestRange>) -> Result<(), Status>,
    ) -> Result<(), Status> {
        if !self.exist() {
            return walk(ranges);
        }
        if ranges.is_empty() {
            walk(ranges)?;
            return self.view().translate_ranges(ranges);
        }
        // What is there is translated already, and nothing may become one range with it.
        let mut more = Vec::new();
        walk(&mut more)?;
        self.view().translate_ranges(&mut more)?;
        ranges.append(&mut more);
        Ok(())
    }
}

impl View {
    fn translate(&self, address: u64, length_bytes: u64) -> Result<u64, Status> {
        let last = address.saturating_add(length_bytes.saturating_sub(1));
        if last >= BUFFER_START {
            return Err(Status::DATA_TRANSFER_ERROR.do_not_retry());
        }
        let touches = |window: &Range<u64>| address < window.end && last >= window.start;
        let holds = |window: &Range<u64>| window.contains(&address) && window.contains(&last);
        if touches(&self.region) {
            if !holds(&self.region) {
                return Err(Status::INVALID_FIELD.do_not_retry());
            }
            // Reads would return an undefined value and writes would be lost: the host is told instead.
            if !self.region_is_ready {
                return Err(Status::DATA_TRANSFER_ERROR.do_not_retry());
            }
            return Ok(REGION_START + (address - self.region.start));
        }
        if touches(&self.buffer) {
            if !holds(&self.buffer) {
                return Err(Status::INVALID_USE_OF_CMB.do_not_retry());
            }
            return Ok(BUFFER_START + (address - self.buffer.start));
        }
        Ok(address)
    }

    /// Translates all ranges of one command. One that the guest's pages make of several kinds of memory becomes several.
    fn translate_ranges(&self, ranges: &mut Vec<GuestRange>) -> Result<(), Status> {
        // Seldom any, but a guest can have as many as there are ranges: none is moved more than once.
        if let Some(index) = ranges.iter().position(|range| self.first_cut(range).is_some()) {
            for whole in ranges.split_off(index) {
                self.cut(whole, ranges);
            }
        }
        let (mut in_region, mut elsewhere) = (false, false);
        for range in ranges.iter_mut().filter(|range| range.address != block::NOWHERE) {
            let address = self.translate(range.address.0, range.length_bytes.into())?;
            range.address = GuestAddress(address);
            in_region |= is_in_region(address);
            elsewhere |= !is_in_region(address);
        }
        if in_region && elsewhere {
            return Err(PARTLY_IN_REGION);
        }
        Ok(())
    }

    /// Appends `range` to `ranges`, cut where a window begins or ends.
    fn cut(&self, mut range: GuestRange, ranges: &mut Vec<GuestRange>) {
        while let Some(cut) = self.first_cut(&range) {
            // Less than a range's length.
            let length_bytes = (cut - range.address.0) as u32;
            ranges.push(GuestRange { length_bytes, ..range });
            range =
                GuestRange { address: GuestAddress(cut), length_bytes: range.length_bytes - length_bytes };
        }
        ranges.push(range);
    }

    /// The first address inside `range` where a window begins or ends.
    fn first_cut(&self, range: &GuestRange) -> Option<u64> {
        let cuts = [self.buffer.start, self.buffer.end, self.region.start, self.region.end];
        let inside = |cut: &u64| {
            let offset = cut.checked_sub(range.address.0);
            offset.is_some_and(|offset| (1..u64::from(range.length_bytes)).contains(&offset))
        };
        cuts.into_iter().filter(inside).min()
    }
}

/// Bits of CMBMSC that are not reserved: CRE, CMSE and CBA.
pub(crate) const CMBMSC_BITS: u64 = !0xffc;
/// Bits of PMRMSCU and PMRMSCL together that are not reserved: CMSE and CBA.
pub(crate) const PMRMSC_BITS: u64 = !0xffd;

/// Where the guest wants both to be (CMBMSC; PMRMSCU and PMRMSCL), and so where they are.
///
/// A range is valid only if it "does not overlap" the one that is enabled: of two that overlap, the one that was there first stays.
#[derive(Clone, Debug)]
pub(crate) struct Spaces {
    windows: Arc<Windows>,
    buffer: u64,
    region: u64,
    region_is_first: bool,
}

impl Spaces {
    /// Neither is wanted.
    pub fn new(windows: Arc<Windows>) -> Self {
        Self { windows, buffer: 0, region: 0, region_is_first: false }
    }

    /// CMBMSC.
    pub fn buffer(&self) -> u64 {
        self.buffer
    }

    /// PMRMSCU and PMRMSCL.
    pub fn region(&self) -> u64 {
        self.region
    }

    /// Both are wanted, they overlap, and the region is where it is wanted.
    pub fn region_is_first(&self) -> bool {
        self.region_is_first
    }

    /// Changes CMBMSC, which a controller without a buffer does not have.
    pub fn set_buffer(&mut self, value: u64) {
        if self.windows.buffer.length_bytes > 0 {
            self.buffer = value & CMBMSC_BITS;
            self.settle(self.windows.region.is_open());
        }
    }

    /// Changes PMRMSCU and PMRMSCL, which a controller without a region does not have.
    pub fn set_region(&mut self, value: u64) {
        if self.windows.region.length_bytes > 0 {
            self.region = value & PMRMSC_BITS;
            self.settle(!self.windows.buffer.is_open());
        }
    }

    /// What is saved, again. `false`: that the region came first is said of registers of which nobody came first.
    pub fn load_region(&mut self, region: u64, is_first: bool) -> bool {
        self.region = region & PMRMSC_BITS;
        self.settle(is_first);
        self.region_is_first == is_first
    }

    /// CMBSTS: bit 0 CBAI, "the controller base address is invalid".
    pub fn buffer_status(&self) -> u32 {
        u32::from(self.wants_buffer() && !self.windows.buffer.is_open())
    }

    /// PMRSTS.CBAI.
    pub fn region_is_invalid(&self) -> bool {
        self.wants_region() && !self.windows.region.is_open()
    }

    /// CMSE has no effect without CRE.
    fn wants_buffer(&self) -> bool {
        let both = regs::CMBMSC_CRE | regs::CMBMSC_CMSE;
        self.buffer & both == both
    }

    fn wants_region(&self) -> bool {
        self.region & regs::PMRMSC_CMSE != 0
    }

    fn settle(&mut self, region_is_first: bool) {
        let Windows { buffer, region, .. } = &*self.windows;
        let base = |control: u64| control & !(UNIT_BYTES - 1);
        let mut wanted_buffer = buffer.range_at(base(self.buffer)).filter(|_| self.wants_buffer());
        let mut wanted_region = region.range_at(base(self.region)).filter(|_| self.wants_region());
        self.region_is_first = false;
        if let (Some(one), Some(other)) = (&wanted_buffer, &wanted_region)
            && one.start < other.end
            && other.start < one.end
        {
            self.region_is_first = region_is_first;
            if region_is_first {
                wanted_buffer = None;
            } else {
                wanted_region = None;
            }
        }
        buffer.set(wanted_buffer.as_ref());
        region.set(wanted_region.as_ref());
    }
}
