//! Images that come with their guest: what blocks do to them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use engine::MachineResult;
use engine::lease::{Id, NotTaken};
use engine::storage::replay::{self, data, place, zeroes};
use engine::storage::{BLOCK_BYTES, CHUNK_BYTES, Disk, IncomingDisks};
use stream::frame::{self, HEADER_BYTES, Header, Kind};

/// Where the head of a run has the digest of its contents.
const DIGEST: Range<usize> = 24..32;
/// Of an image that something was in before.
const BEFORE: u8 = 0xb5;

/// The images of the model machine: one shorter than a block, one with a short end, and one of several chunks. The second had
/// something in it.
#[must_use]
pub fn disks() -> Vec<Disk> {
    let disk = |(name, length_bytes): (&str, _)| Disk {
        name: name.to_owned(),
        length_bytes,
        format: "raw".to_owned(),
    };
    [("a-1", 700), ("b-1", BLOCK_BYTES + 512), ("b-2", 3 * CHUNK_BYTES)].map(disk).to_vec()
}

const IS_BLANK: [bool; 3] = [true, false, true];

/// Blocks that are known of an image.
type Blocks = BTreeMap<u64, Vec<u8>>;

/// The images of the model machine, block by block, shared with whoever looks at them in the end. What a peer may not do to them
/// is found here.
#[derive(Clone, Debug, Default)]
pub struct Images(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    blocks: [Blocks; 3],
    is_unstable: bool,
    owner: Option<Id>,
}

impl Images {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no thread panics here")
    }

    /// Whose guest has them.
    #[must_use]
    pub fn owner(&self) -> Option<Id> {
        self.state().owner
    }

    /// The numbers and lengths of the blocks of a part of an image, which is whole blocks of it.
    fn parts(&self, disk: usize, range: &Range<u64>) -> Vec<(u64, usize)> {
        let length_bytes = disks()[disk].length_bytes;
        assert!(range.start < range.end && range.end <= length_bytes, "{range:?} of image {disk}");
        assert!(range.start.is_multiple_of(BLOCK_BYTES), "{range:?} of image {disk}");
        assert!(
            range.end.is_multiple_of(BLOCK_BYTES) || range.end == length_bytes,
            "{range:?} of image {disk}"
        );
        assert_eq!(self.owner(), None, "they are the guest's by now");
        parts(disk, range)
    }
}

/// The numbers and lengths of the blocks of a part of an image.
fn parts(disk: usize, range: &Range<u64>) -> Vec<(u64, usize)> {
    let length_bytes = disks()[disk].length_bytes;
    let part = |block: u64| (block, (length_bytes - block * BLOCK_BYTES).min(BLOCK_BYTES) as usize);
    (range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)).map(part).collect()
}

impl IncomingDisks for Images {
    fn is_blank(&self, disk: usize) -> bool {
        IS_BLANK[disk]
    }

    fn begin(&mut self) -> MachineResult<()> {
        Ok(())
    }

    fn write(&mut self, disk: usize, offset_bytes: u64, contents: &[u8]) -> MachineResult<()> {
        let parts = self.parts(disk, &(offset_bytes..offset_bytes + contents.len() as u64));
        let (mut state, mut rest) = (self.state(), contents);
        state.is_unstable = true;
        for (block, length) in parts {
            let (part, behind) = rest.split_at(length);
            state.blocks[disk].insert(block, part.to_vec());
            rest = behind;
        }
        Ok(())
    }

    fn write_zeroes(&mut self, disk: usize, range: Range<u64>) -> MachineResult<()> {
        let parts = self.parts(disk, &range);
        let mut state = self.state();
        state.is_unstable = true;
        for (block, _) in parts {
            // An empty list stands for zeroes.
            let before = state.blocks[disk].insert(block, Vec::new());
            let was_hole = before.map_or(IS_BLANK[disk], |before| before.is_empty());
            assert!(!was_hole, "block {block} of image {disk} is zeroes already");
        }
        Ok(())
    }

    fn sync(&mut self) -> MachineResult<()> {
        self.state().is_unstable = false;
        Ok(())
    }

    fn own(&mut self, session: &Id, open: &mut dyn FnMut() -> Result<(), String>) -> Result<(), NotTaken> {
        assert!(!self.state().is_unstable, "what came is stable before a guest has it");
        open().expect("the model machine can open its images");
        self.state().owner = Some(*session);
        Ok(())
    }

    fn disown(&mut self, session: &Id) -> MachineResult<()> {
        assert_eq!(self.state().owner.take(), Some(*session), "it was taken before");
        Ok(())
    }
}

/// What bodies of frames say, read without any doubt: they were believed.
fn believed(bodies: &[Vec<u8>]) -> [Blocks; 3] {
    let mut images: [Blocks; 3] = Default::default();
    for body in bodies {
        let number = |range: Range<usize>| {
            body[range].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let (disk, is_zeroes, start, length) =
            (number(0..2) as usize, body[2] == 1, number(8..16), number(16..24));
        let mut rest = &body[32..];
        for (block, length) in parts(disk, &(start..start + length)) {
            let part =
                if is_zeroes { Vec::new() } else { rest.split_off(..length).expect("all of it").to_vec() };
            images[disk].insert(block, part);
        }
    }
    images
}

/// The bodies of the frames of blocks that `bytes` begin with.
fn bodies_of(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut bodies = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>()
        && let Ok(Header { kind: Kind::Blocks, length_bytes, .. }) = Header::decode(*head)
        && let Some((body, rest)) = rest.split_at_checked(length_bytes as usize)
    {
        bodies.push(body.to_vec());
        bytes = rest;
    }
    bodies
}

/// The first byte says whether digests are put right, so that more than digests is tried; the rest are frames.
pub fn blocks(bytes: &[u8]) {
    let Some((how, frames)) = bytes.split_first() else { return };
    let mut bodies = bodies_of(frames);
    if how & 1 != 0 {
        for body in bodies.iter_mut().filter(|body| body.len() > DIGEST.end) {
            let right = data(0, 0, &body[DIGEST.end..]);
            body[DIGEST].copy_from_slice(&right[DIGEST]);
        }
    }
    let images = Images::default();
    let placed = place(bodies.iter().map(Vec::as_slice), disks(), Box::new(images.clone()));
    if placed.is_err() {
        return;
    }
    let state = images.state();
    assert!(!state.is_unstable, "what came is stable before the destination says so");
    for (disk, believed) in believed(&bodies).iter().enumerate() {
        let all = parts(disk, &(0..disks()[disk].length_bytes));
        for (block, length) in all {
            let said = believed.get(&block).expect("every block came");
            let found = state.blocks[disk].get(&block).cloned();
            let found =
                found.unwrap_or_else(|| if IS_BLANK[disk] { Vec::new() } else { vec![BEFORE; length] });
            assert!(
                said == &found || said.is_empty() && found.iter().all(|byte| *byte == 0),
                "block {block} of {disk}"
            );
        }
    }
}

/// All of the images of the model machine, in bodies of frames, some of it twice.
#[must_use]
pub fn bodies() -> Vec<Vec<u8>> {
    let last = [9; 512];
    vec![
        zeroes(0, 0..700),
        zeroes(1, 0..BLOCK_BYTES),
        zeroes(2, 0..3 * CHUNK_BYTES),
        data(0, 0, &[7; 700]),
        data(1, BLOCK_BYTES, &last),
        zeroes(1, BLOCK_BYTES..BLOCK_BYTES + 512),
        data(1, BLOCK_BYTES, &last),
    ]
}

/// The digest of [`bodies`].
///
/// # Panics
/// They are not placed.
#[must_use]
pub fn digest_of(stream: u64) -> u64 {
    let bodies = bodies();
    let placed = place(bodies.iter().map(Vec::as_slice), disks(), Box::new(Images::default()));
    replay::prepared(stream, placed.expect("all of it is there"))
}

/// Images that come whole, and some that do not.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let frames = |how: u8, bodies: &[Vec<u8>]| {
        let mut out = vec![how];
        for body in bodies {
            frame::write(&mut out, Kind::Blocks, 0, body).expect("our own writer can write it");
        }
        out
    };
    let block = vec![3; BLOCK_BYTES as usize];
    let changed = [
        data(2, CHUNK_BYTES, &block),
        zeroes(2, 0..2 * CHUNK_BYTES),
        zeroes(2, CHUNK_BYTES..2 * CHUNK_BYTES),
    ];
    let all = bodies();
    let more = [all.as_slice(), &changed].concat();
    let one_lacks = [&all[..1], &all[2..]].concat();
    let no_blocks = [all.as_slice(), &[data(0, 5, &[1; 695])]].concat();
    vec![
        frames(0, &all),
        frames(1, &all),
        frames(1, &more),
        frames(1, &all[3..]),
        frames(1, &one_lacks),
        frames(1, &no_blocks),
    ]
}
