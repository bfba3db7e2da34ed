//! Pages that are not what the source saw of them.

use super::receive::wrong;
use crate::{Error, PAGE_BYTES, PageBitmap, RamBlock};

/// Pages that the guest wrote to while they were sent, so that they come again, in channels or after the guest.
#[derive(Debug)]
pub(crate) struct Differing {
    /// Blocks by name, in that order.
    blocks: Vec<(String, PageBitmap)>,
    count: u64,
}

impl Differing {
    /// None, of `blocks`, which are in the order of their names.
    pub fn none(blocks: &[RamBlock]) -> Self {
        let none =
            |block: &RamBlock| (block.name.clone(), PageBitmap::new(block.length_bytes() / PAGE_BYTES));
        Self { blocks: blocks.iter().map(none).collect(), count: 0 }
    }

    /// Notes whether a copy of a page `differs`: what was noted before is over.
    pub fn note(&mut self, block: usize, page: u64, differs: bool) {
        let Some((_, pages)) = self.blocks.get_mut(block) else { return };
        match (pages.contains(page), differs) {
            (false, true) => {
                pages.set(page);
                self.count += 1;
            }
            (true, false) => {
                pages.clear(page);
                self.count -= 1;
            }
            (false, false) | (true, true) => {}
        }
    }

    /// Those of `pages`, by block in the same order, are still to come: their old copies were dropped.
    pub fn forget<'a>(&mut self, pages: impl Iterator<Item = &'a PageBitmap>) {
        for ((_, differing), pages) in self.blocks.iter_mut().zip(pages) {
            if self.count > 0 {
                let before = differing.count();
                pages.runs().for_each(|run| differing.clear_range(run));
                self.count -= before - differing.count();
            }
        }
    }

    /// Refuses a guest whose memory is not what the source saw of it.
    ///
    /// # Errors
    /// A page differs, and none is to come for it.
    pub fn check(&self) -> Result<(), Error> {
        // As ever, and the guest stands still: nothing is looked through.
        if self.count == 0 {
            return Ok(());
        }
        let mut places = self.blocks.iter().filter_map(|(name, pages)| {
            let run = pages.runs().next()?;
            Some(format!("page {:#x} of RAM block {name:?} is not what was sent", run.start))
        });
        let first = places.next().unwrap_or_else(|| "a page is not what was sent".to_owned());
        Err(wrong(match self.count {
            1 => first,
            count => format!("{first}, and so are {} more", count - 1),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channels::tests::memory;

    #[test]
    fn pages_that_differ_are_refused_until_they_come_again_or_follow() {
        let mut differing = Differing::none(&memory(false));
        differing.check().unwrap();
        for (page, differs) in [(7, true), (7, true), (9, true), (11, true), (9, false), (9, false)] {
            differing.note(0, page, differs);
        }
        let error = differing.check().unwrap_err().chain();
        assert!(error.contains("page 0x7 of") && error.ends_with("and so are 1 more"), "{error}");
        let follow = |block: usize, pages: &[u64]| -> Vec<PageBitmap> {
            let mut follow: Vec<_> =
                memory(false).iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
            pages.iter().for_each(|page| follow[block].set(*page));
            follow
        };
        differing.forget(follow(1, &[7]).iter());
        differing.forget(follow(0, &[0, 7]).iter());
        let error = differing.check().unwrap_err().chain();
        assert!(error.ends_with("page 0xb of RAM block \"ram.low\" is not what was sent"), "{error}");
        differing.forget(follow(0, &[11, 12]).iter());
        differing.check().unwrap();
    }
}
