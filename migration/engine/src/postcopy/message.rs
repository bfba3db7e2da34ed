//! Which pages, and the pages themselves, on the wire.

use std::ops::Range;

use twox_hash::XxHash3_64;
use vmstate::VmState;

use super::sets::PageSets;
use crate::lease::Id;
use crate::ram::{PAGE_LENGTH, is_zero};
use crate::{PAGE_BYTES, PageBitmap};

/// Pages that one [`Missing`] can name: 256 MiB of guest memory in 8 KiB.
const WINDOW_PAGES: u64 = 1 << 16;
const WINDOW_WORDS: usize = (WINDOW_PAGES / 64) as usize;
/// Of a [`Missing`].
pub(crate) const MISSING_BYTES_MAX: usize = 2 + 8 + 2 + 8 * WINDOW_WORDS;
/// Pages that one [`Pages`] can carry.
pub(crate) const RUN_PAGES_MAX: u64 = 64;
/// Of a [`Pages`], without the contents.
const PAGES_HEAD_BYTES: usize = 2 + 8 + 2 + 1 + 8;
/// Of a [`Pages`].
pub(crate) const PAGES_BYTES_MAX: usize = PAGES_HEAD_BYTES + RUN_PAGES_MAX as usize * PAGE_LENGTH;

/// Pages that the destination lacks. Blocks are numbered as in the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "missing", version = 1)]
pub struct Missing {
    /// The block.
    pub block: u16,
    /// The page that the first bit is about, a multiple of 64.
    pub first_page: u64,
    count: u16,
    #[vmstate(len = "count", max = WINDOW_WORDS)]
    words: Vec<u64>,
}

impl Missing {
    /// All messages that it takes to name the pages of `bitmaps`, one of which is for each block.
    pub(crate) fn of(bitmaps: &[PageBitmap]) -> impl Iterator<Item = Self> + '_ {
        (0..).zip(bitmaps).flat_map(|(block, bitmap)| {
            (0..).zip(bitmap.words().chunks(WINDOW_WORDS)).filter_map(move |(window, words)| {
                let last = words.iter().rposition(|word| *word != 0)?;
                let words = words.get(..=last)?.to_vec();
                Some(Self { block, first_page: window * WINDOW_PAGES, count: words.len() as u16, words })
            })
        })
    }

    /// The pages as runs.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let pages = 64 * self.words.len() as u64;
        let runs: Vec<_> = PageBitmap::from_words(self.words.clone(), pages).runs().collect();
        let first = self.first_page;
        runs.into_iter().map(move |run| first.saturating_add(run.start)..first.saturating_add(run.end))
    }
}

/// A page that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "page-request", version = 1)]
pub struct PageRequest {
    /// The block, as in the stream.
    pub block: u16,
    /// The page.
    pub page: u64,
}

/// What is in front of the contents of pages. There are none behind it if all of the pages are zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "pages", version = 1)]
pub struct Pages {
    /// The block, as in the stream.
    pub block: u16,
    /// The first of them.
    pub first_page: u64,
    /// How many, at most 64.
    pub count: u16,
    /// Nothing but zeros.
    pub zeros: bool,
    /// Of the contents.
    pub digest: u64,
}

/// Pages in a row that are waited for, by who touched a larger page which they are parts of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "run-request", version = 1)]
pub struct RunRequest {
    /// The block, as in the stream.
    pub block: u16,
    /// The first of them.
    pub first_page: u64,
    /// How many, 1 to 64.
    pub count: u16,
}

impl Pages {
    /// Adds `contents`, the pages of `block` from `first_page` on, to `body`.
    pub(crate) fn encode(body: &mut Vec<u8>, block: usize, first_page: u64, contents: &[u8]) {
        let (pages, _) = contents.as_chunks::<PAGE_LENGTH>();
        let zeros = pages.iter().all(is_zero);
        let carried = if zeros { &[] } else { pages.as_flattened() };
        let head = Self {
            block: block as u16,
            first_page,
            count: pages.len() as u16,
            zeros,
            digest: XxHash3_64::oneshot(carried),
        };
        body.extend_from_slice(&vmstate::to_bytes(&head));
        body.extend_from_slice(carried);
    }

    /// Head and contents of a body that came. The contents are as long as the head says, and undamaged.
    pub(crate) fn decode(body: &[u8]) -> Result<(Self, &[u8]), String> {
        let (head, contents) = body.split_at_checked(PAGES_HEAD_BYTES).ok_or("pages without a head")?;
        let head: Self = vmstate::from_bytes(head, 1).map_err(|error| format!("pages: {error}"))?;
        let expected = if head.zeros { 0 } else { usize::from(head.count) * PAGE_LENGTH };
        if contents.len() != expected || u64::from(head.count) > RUN_PAGES_MAX {
            return Err(format!("{} pages in {} bytes", head.count, contents.len()));
        }
        let digest = XxHash3_64::oneshot(contents);
        if digest != head.digest {
            let Self { block, first_page, .. } = head;
            return Err(format!(
                "the digest of what came for page {first_page} of block number {block} is {digest:#018x}, not {:#018x}",
                head.digest
            ));
        }
        Ok((head, contents))
    }

    pub(crate) fn range(&self) -> Range<u64> {
        self.first_page..self.first_page.saturating_add(self.count.into())
    }
}

/// The source is there again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "recover", version = 1)]
pub struct Recover {
    /// The attempt that handed the guest over.
    pub session: Id,
    /// What came with AGREE.
    pub key: Id,
}

/// Adds the pages that a message names to `sets`, whose blocks are ours; `order` has our number of each of the peer's blocks.
pub(crate) fn add_missing(message: &Missing, order: &[usize], sets: &mut PageSets) -> Result<(), String> {
    let Missing { block, .. } = message;
    let unknown = || format!("missing pages of block number {block}, which there is not");
    let ours = *order.get(usize::from(*block)).ok_or_else(unknown)?;
    let pages = sets.pages_of(ours).ok_or_else(unknown)?;
    for run in message.runs() {
        if run.end > pages {
            // Whatever the peer says.
            let end = run.end.saturating_mul(PAGE_BYTES);
            return Err(format!("missing pages up to byte {end:#x} of block number {block}, beyond its end"));
        }
        sets.add(ours, run);
    }
    Ok(())
}
