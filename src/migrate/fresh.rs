//! Guest memory that is filled before anybody looks at it, as the migration engine sees it.

use std::sync::Mutex;

use engine::{FreshMemory, MachineResult};

use super::lock;
use crate::machine::Resources;
use crate::memory::RamBlock;
use crate::userfault::{Error, Userfault};

/// The memory of one machine that will lie in small pages. Where a touch brings huge ones, that is faster: those blocks are not among it.
/// Nor are persistent memory regions, which become files before the guest runs.
pub struct Fresh {
    userfault: Userfault,
    /// For each of `userfault`'s blocks its number in the machine.
    numbers: Vec<usize>,
    /// Once only: to some kernels it is the same which descriptor watches memory, and it may be another one by then.
    is_released: Mutex<bool>,
}

impl Fresh {
    /// From here on until it is released, nobody is to touch the memory, which is all holes. `None`: there is none in small pages.
    ///
    /// # Errors
    /// The host cannot do that, or does not let us.
    pub fn begin(resources: &Resources) -> Result<Option<Self>, Error> {
        let (mut numbers, mut blocks) = (Vec::new(), Vec::<RamBlock>::new());
        for (number, block) in resources.ram().blocks().iter().enumerate() {
            if !resources.is_region(block) && !block.would_get_huge_pages()? {
                numbers.push(number);
                blocks.push(block.clone());
            }
        }
        if blocks.is_empty() {
            return Ok(None);
        }
        let userfault = Userfault::register_to_fill(&blocks)?;
        Ok(Some(Self { userfault, numbers, is_released: Mutex::new(false) }))
    }

    fn place_of(&self, block: usize) -> Option<usize> {
        self.numbers.iter().position(|number| *number == block)
    }
}

impl FreshMemory for Fresh {
    fn has(&self, block: usize) -> bool {
        self.place_of(block).is_some()
    }

    fn fill(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()> {
        let place = self.place_of(block).ok_or_else(|| format!("block number {block} is not filled"))?;
        Ok(self.userfault.fill(place, offset, pages)?)
    }

    fn release(&self) -> MachineResult<()> {
        let mut is_released = lock(&self.is_released);
        if !*is_released {
            (0..self.numbers.len()).try_for_each(|block| self.userfault.unregister(block))?;
            *is_released = true;
        }
        Ok(())
    }
}
