//! Memory of a mock machine that is filled before anybody touches it, as userfaultfd fills a real one's.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::SeekFrom;

use crate::{FreshMemory, MachineResult, PAGE_BYTES, PageBitmap, RamBlock};

/// Blocks that are memfds.
#[derive(Debug)]
pub struct MockFresh {
    blocks: Vec<RamBlock>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    filled_pages: u64,
    /// Of each block.
    filled: Vec<PageBitmap>,
    /// It fails once so many were filled.
    fails_after: Option<u64>,
    /// What held something before it was filled or released: somebody has touched it.
    touched: Vec<(usize, u64)>,
    released: bool,
    /// It cannot be.
    cannot_be_released: bool,
}

impl MockFresh {
    /// The last of `blocks` is not filled, if there are others.
    pub fn new(blocks: &[RamBlock], fails_after: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            blocks: blocks.to_vec(),
            state: Mutex::new(State {
                fails_after,
                filled: blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect(),
                ..State::default()
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_there(&self, block: usize, page: u64) -> bool {
        let memory = self.blocks[block].mapping.file_offset().unwrap();
        rustix::fs::seek(memory.file().as_fd(), SeekFrom::Data(page * PAGE_BYTES)) == Ok(page * PAGE_BYTES)
    }

    /// The host refuses.
    pub fn cannot_be_released(&self) {
        self.state().cannot_be_released = true;
    }

    pub fn filled_pages(&self) -> u64 {
        self.state().filled_pages
    }

    pub fn touched(&self) -> Vec<(usize, u64)> {
        self.state().touched.clone()
    }

    pub fn is_released(&self) -> bool {
        self.state().released
    }
}

impl FreshMemory for MockFresh {
    fn has(&self, block: usize) -> bool {
        block == 0 || block + 1 < self.blocks.len()
    }

    fn fill(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()> {
        let mut state = self.state();
        if state.released || !self.has(block) {
            return Err(format!("block {block} is not filled").into());
        }
        let memory = self.blocks[block].mapping.file_offset().unwrap();
        for (offset, page) in (offset..).step_by(PAGE_BYTES as usize).zip(pages.chunks(PAGE_BYTES as usize)) {
            if state.fails_after.is_some_and(|pages| state.filled_pages >= pages) {
                return Err("there is no memory".into());
            }
            if self.is_there(block, offset / PAGE_BYTES) {
                state.touched.push((block, offset / PAGE_BYTES));
                return Err("a page is there".into());
            }
            memory.file().write_all_at(page, offset)?;
            state.filled_pages += 1;
            state.filled[block].set(offset / PAGE_BYTES);
        }
        Ok(())
    }

    fn release(&self) -> MachineResult<()> {
        let mut state = self.state();
        if state.cannot_be_released {
            return Err("the host refuses".into());
        }
        if !std::mem::replace(&mut state.released, true) {
            let State { filled, touched, .. } = &mut *state;
            for (block, filled) in filled.iter().enumerate().filter(|(block, _)| self.has(*block)) {
                let others = (0..filled.pages()).filter(|page| !filled.contains(*page));
                touched.extend(others.filter(|page| self.is_there(block, *page)).map(|page| (block, page)));
            }
        }
        Ok(())
    }
}
