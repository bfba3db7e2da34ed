//! Guest memory that is placed when it is touched, as the migration engine sees it.

use std::ops::Range;
use std::sync::{Arc, Weak};

use engine::{Fault, MachineResult, MissingPages};

use crate::machine::{Resources, Waiters};
use crate::memory::RamBlock;
use crate::userfault::{Error, Userfault};
use crate::vmm::{Request, Vmm};

/// The memory of one machine, but for what is read first: persistent memory regions, which become files before the guest runs.
pub struct Paging {
    userfault: Userfault,
    /// For each of `userfault`'s blocks its number in the machine.
    numbers: Vec<usize>,
    /// The machine's, those that are not watched among them.
    blocks: Vec<RamBlock>,
    waiters: Arc<Waiters>,
    vmm: Weak<Vmm>,
}

impl Paging {
    /// From here on whoever touches missing memory waits for it.
    ///
    /// # Errors
    /// The host cannot do that, or does not let us.
    pub fn begin(vmm: &Arc<Vmm>, resources: &Resources) -> Result<Self, Error> {
        let (numbers, blocks): (Vec<_>, Vec<RamBlock>) = resources
            .ram()
            .blocks()
            .iter()
            .cloned()
            .enumerate()
            .filter(|(_, block)| !resources.is_region(block))
            .unzip();
        let (userfault, waiters) = (Userfault::register(&blocks)?, Arc::clone(resources.waiters()));
        let blocks = resources.ram().blocks().to_vec();
        Ok(Self { userfault, numbers, blocks, waiters, vmm: Arc::downgrade(vmm) })
    }

    fn vmm(&self) -> MachineResult<Arc<Vmm>> {
        self.vmm.upgrade().ok_or_else(|| "the process is ending".into())
    }

    /// Notes who waits, unless the page came since the fault: it would never be placed again. Whoever places it from now on finds the note.
    fn note(&self, &Fault { block, offset, thread }: &Fault) {
        self.waiters.add(thread, block, offset);
        let is_huge = self.page_bytes(block) > engine::PAGE_BYTES;
        let is_there = |block: &RamBlock| {
            let looked = if is_huge { block.is_mapped(offset) } else { block.is_populated(offset) };
            looked.unwrap_or_default()
        };
        if self.blocks.get(block).is_some_and(is_there) {
            self.waiters.serve(block, &(offset..offset.saturating_add(1)));
        }
    }

    /// Whoever waited for these pages goes on; for parts of a page nobody waits.
    fn placed(&self, block: usize, bytes: Range<u64>) {
        if self.page_bytes(block) == engine::PAGE_BYTES {
            self.waiters.serve(block, &bytes);
        }
    }

    /// What `userfault` calls the machine's block.
    fn place_of(&self, block: usize) -> MachineResult<usize> {
        let place = self.numbers.iter().position(|number| *number == block);
        place.ok_or_else(|| format!("nobody waits for pages of block number {block}").into())
    }
}

impl MissingPages for Paging {
    fn has(&self, block: usize) -> bool {
        self.numbers.contains(&block)
    }

    fn page_bytes(&self, block: usize) -> u64 {
        self.place_of(block).map_or(engine::PAGE_BYTES, |place| self.userfault.page_bytes(place))
    }

    fn complete(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()> {
        self.userfault.complete(self.place_of(block)?, offset, length_bytes)?;
        self.waiters.serve(block, &(offset..offset.saturating_add(length_bytes)));
        Ok(())
    }

    fn faults(&self, faults: &mut Vec<Fault>) -> MachineResult<()> {
        let mut found = Vec::new();
        self.userfault.faults(&mut found)?;
        let in_machine = |crate::userfault::Fault { block, offset, thread }| {
            Some(Fault { block: *self.numbers.get(block)?, offset, thread })
        };
        let came = faults.len();
        faults.extend(found.into_iter().filter_map(in_machine));
        faults.iter().skip(came).for_each(|fault| self.note(fault));
        Ok(())
    }

    fn place(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()> {
        self.userfault.place(self.place_of(block)?, offset, pages)?;
        self.placed(block, offset..offset.saturating_add(pages.len() as u64));
        Ok(())
    }

    fn place_zeros(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()> {
        self.userfault.place_zeros(self.place_of(block)?, offset, length_bytes)?;
        self.placed(block, offset..offset.saturating_add(length_bytes));
        Ok(())
    }

    fn release(&self) -> MachineResult<()> {
        self.userfault.end();
        (0..self.numbers.len()).try_for_each(|block| self.userfault.unregister(block))?;
        self.waiters.serve_all();
        Ok(())
    }

    fn hold(&self) -> MachineResult<()> {
        Ok(self.vmm()?.lose_memory()?)
    }

    fn go_on(&self) -> MachineResult<()> {
        Ok(self.vmm()?.find_memory()?)
    }

    fn thread_name(&self, thread: u32) -> String {
        // It may have ended, and the kernel's have none.
        let name = std::fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
        name.map_or_else(|_| "kernel".to_owned(), |name| name.trim_end().to_owned())
    }

    fn lost(&self, error: &engine::Error) {
        // Without the process there is no guest.
        if let Some(vmm) = self.vmm.upgrade() {
            vmm.request(Request::MemoryLost(anyhow::anyhow!("{}", error.chain())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, PAGE_SIZE_BYTES as PAGE};

    #[test]
    fn who_was_served_before_it_was_noted_waits_for_nothing() {
        let ram = GuestRam::new(1 << 20, &[]).unwrap();
        let waiters = Arc::new(Waiters::default());
        let paging = Paging {
            userfault: Userfault::register(ram.blocks()).unwrap(),
            numbers: vec![0],
            blocks: ram.blocks().to_vec(),
            waiters: Arc::clone(&waiters),
            vmm: Weak::new(),
        };
        std::thread::scope(|scope| {
            let touch = |page: u64| {
                let block = &ram.blocks()[0];
                scope.spawn(move || block.read(page * PAGE, &mut [0; 4]).unwrap())
            };
            let touched = touch(3);
            let mut found = Vec::new();
            paging.userfault.faults(&mut found).unwrap();
            let crate::userfault::Fault { block, offset, thread } = found[0];
            paging.place(0, 3 * PAGE, &[1; PAGE as usize]).unwrap();
            paging.note(&Fault { block, offset, thread });
            touched.join().unwrap();
            assert!(!waiters.has(thread));

            let touched = touch(4);
            let mut found = Vec::new();
            paging.faults(&mut found).unwrap();
            assert!(waiters.has(found[0].thread));
            paging.place_zeros(0, 4 * PAGE, PAGE).unwrap();
            assert!(!waiters.has(found[0].thread));
            touched.join().unwrap();
        });
    }
}
