//! Memory of a mock guest that waits for missing pages, as userfaultfd makes a real one wait.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vm_memory::{Bytes, VolatileMemory};

use super::mock::World;
use crate::ram::{PAGE_LENGTH, is_zero};
use crate::{Error, Fault, MachineResult, MissingPages, PAGE_BYTES, PageBitmap, RamBlock};

/// Where the mock guest at the destination writes in every page that it has looked at; a source writes before this.
pub const MARK_OFFSET: usize = PAGE_LENGTH - 8;

/// Missing pages, and who waits for them.
#[derive(Debug)]
pub struct MockMemory {
    blocks: Vec<RamBlock>,
    /// How many of the pages on the wire are one of the guest's.
    whole_pages: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    present: Vec<PageBitmap>,
    faults: Vec<Fault>,
    released: bool,
    /// The guest stands still.
    held: bool,
    /// Its threads have not begun yet.
    asleep: bool,
    /// After so many faults no more are told.
    breaks_after: Option<u64>,
    /// Larger pages that can be seen before one cannot be, once.
    completes_before_failure: Option<u64>,
    /// Why some of it will never be there; the guest is over then.
    lost: Option<String>,
    /// Pages that waited for the source or to be cleared.
    touched_missing: u64,
}

impl World {
    /// Whoever touches missing memory after `faults` others is not heard of.
    pub fn silence_faults_after(&self, faults: u64) {
        self.lock().faults_before_silence = Some(faults);
    }

    /// Once as many larger pages could be seen, the next one cannot be, for the first time that it is tried.
    pub fn fail_a_completion_after(&self, completions: u64) {
        self.lock().completions_before_failure = Some(completions);
    }

    /// The destination's memory lies in pages that are so many times larger.
    pub fn enlarge_pages(&self, times: u64) {
        self.lock().larger_pages = Some(times);
    }

    /// The memory of a guest that came without.
    pub fn missing(&self) -> Option<Arc<MockMemory>> {
        self.lock().missing.clone()
    }
}

/// What a guest thread found in a page.
pub type Found = ((usize, u64), Vec<u8>);

impl MockMemory {
    /// `blocks`, of which those pages are there that hold something.
    ///
    /// Of larger pages, which have parts that hold something and others, none is there.
    pub fn new(
        blocks: &[RamBlock],
        larger_pages: Option<u64>,
        breaks_after: Option<u64>,
        asleep: bool,
    ) -> Arc<Self> {
        let present = |block: &RamBlock| {
            let pages = block.length_bytes() / PAGE_BYTES;
            let mut bitmap = PageBitmap::new(pages);
            if larger_pages.is_none() {
                (0..pages).filter(|page| !is_zero(&contents(block, *page))).for_each(|page| bitmap.set(page));
            }
            bitmap
        };
        let present = blocks.iter().map(present).collect();
        let state = State { present, breaks_after, asleep, ..State::default() };
        let whole_pages = larger_pages.unwrap_or(1);
        let (blocks, state, changed) = (blocks.to_vec(), Mutex::new(state), Condvar::new());
        Arc::new(Self { blocks, whole_pages, state, changed })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// See [`World::fail_a_completion_after`].
    pub fn fail_a_completion_after(&self, completions: Option<u64>) {
        self.state().completes_before_failure = completions;
    }

    /// Waits until the page is there, and gives what is in it. Zeros, if it never will be.
    pub fn touch(&self, block: usize, page: u64, thread: u32) -> [u8; PAGE_LENGTH] {
        let mut state = self.state();
        let is_there = |state: &State| state.present[block].contains(page) || state.released;
        if !is_there(&state) {
            state.touched_missing += 1;
            // A signal that wakes it has it told twice.
            let offset = (page - page % self.whole_pages) * PAGE_BYTES;
            let fault = Fault { block, offset, thread };
            state.faults.extend([fault, fault]);
            self.changed.notify_all();
        }
        let waits = |state: &mut State| (state.held || !is_there(state)) && state.lost.is_none();
        drop(self.changed.wait_while(state, waits).unwrap());
        contents(&self.blocks[block], page)
    }

    /// A guest thread looks at every page in an order of its own and writes to each; says what it had found.
    pub fn run_guest(self: &Arc<Self>, thread: u32, stride: u64) -> JoinHandle<Vec<Found>> {
        let memory = Arc::clone(self);
        std::thread::spawn(move || {
            drop(memory.changed.wait_while(memory.state(), |state| state.asleep).unwrap());
            let mut found = Vec::new();
            for (block, ram) in memory.blocks.iter().enumerate() {
                let pages = ram.length_bytes() / PAGE_BYTES;
                for index in 0..pages {
                    let page = index * stride % pages;
                    let bytes = memory.touch(block, page, thread).to_vec();
                    if memory.why_lost().is_some() {
                        return found;
                    }
                    found.push(((block, page), bytes));
                    let address = page as usize * PAGE_LENGTH + MARK_OFFSET;
                    ram.mapping.as_volatile_slice().write_obj(u64::MAX, address).unwrap();
                }
            }
            found
        })
    }

    /// How often somebody touched what was missing.
    pub fn touched_missing(&self) -> u64 {
        self.state().touched_missing
    }

    /// Its threads begin.
    pub fn wake(&self) {
        self.state().asleep = false;
        self.changed.notify_all();
    }

    /// Whether the guest has to stand still.
    pub fn is_held(&self) -> bool {
        self.state().held
    }

    /// Why it will never be whole, if so.
    pub fn why_lost(&self) -> Option<String> {
        self.state().lost.clone()
    }

    fn put(&self, block: usize, page: u64, bytes: &[u8]) -> MachineResult<()> {
        let mut state = self.state();
        if state.released {
            return Err("this memory is not watched any more".into());
        }
        let is_part = self.whole_pages > 1;
        assert!(
            !(is_part && state.present[block].contains(page)),
            "page {page}, which can be seen, came again"
        );
        if !state.present[block].contains(page) {
            let slice = self.blocks[block].mapping.as_volatile_slice();
            slice.write_slice(bytes, page as usize * PAGE_LENGTH).unwrap();
            if !is_part {
                state.present[block].set(page);
            }
            self.changed.notify_all();
        }
        Ok(())
    }
}

fn contents(block: &RamBlock, page: u64) -> [u8; PAGE_LENGTH] {
    let mut bytes = [0; PAGE_LENGTH];
    let slice = block.mapping.get_slice(page as usize * PAGE_LENGTH, PAGE_LENGTH).unwrap();
    slice.copy_to(&mut bytes[..]);
    bytes
}

impl MissingPages for MockMemory {
    fn has(&self, _block: usize) -> bool {
        true
    }

    fn faults(&self, faults: &mut Vec<Fault>) -> MachineResult<()> {
        let quiet = |state: &mut State| state.faults.is_empty() && !state.released;
        let mut state = self.changed.wait_while(self.state(), quiet).unwrap();
        if state.breaks_after.is_some_and(|faults| state.touched_missing > faults) {
            return Err("userfaultfd is gone".into());
        }
        faults.append(&mut state.faults);
        Ok(())
    }

    fn page_bytes(&self, _block: usize) -> u64 {
        self.whole_pages * PAGE_BYTES
    }

    fn complete(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()> {
        let mut state = self.state();
        if state.released {
            return Err("this memory is not watched any more".into());
        }
        assert!(offset.is_multiple_of(self.page_bytes(block)) && length_bytes == self.page_bytes(block));
        match &mut state.completes_before_failure {
            Some(0) => {
                state.completes_before_failure = None;
                return Err("there is no memory for page tables".into());
            }
            Some(left) => *left -= 1,
            None => {}
        }
        state.present[block].set_bytes(offset..offset + length_bytes);
        self.changed.notify_all();
        Ok(())
    }

    fn place(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()> {
        let mut pages = (offset / PAGE_BYTES..).zip(pages.chunks(PAGE_LENGTH));
        pages.try_for_each(|(page, bytes)| self.put(block, page, bytes))
    }

    fn place_zeros(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()> {
        self.place(block, offset, &vec![0; length_bytes as usize])
    }

    fn release(&self) -> MachineResult<()> {
        self.state().released = true;
        self.changed.notify_all();
        Ok(())
    }

    fn thread_name(&self, thread: u32) -> String {
        format!("vcpu{thread}")
    }

    fn hold(&self) -> MachineResult<()> {
        self.state().held = true;
        Ok(())
    }

    fn go_on(&self) -> MachineResult<()> {
        self.state().held = false;
        self.changed.notify_all();
        Ok(())
    }

    fn lost(&self, error: &Error) {
        self.state().lost = Some(error.chain());
        self.changed.notify_all();
    }
}
