//! A guest that runs while its memory is still in a file.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use stream::{CHUNK_BYTES, Expected, SectionSet};
use vm_memory::{Bytes, VolatileMemory};

use super::file::{files, suspended};
use super::mock::{Arriving, Factory, World};
use crate::lease::{Lease, State};
use crate::machine::{Fault, MissingPages};
use crate::{
    Description, DestinationFactory, DestinationMachine, Error, Fill, MachineResult, PAGE_BYTES, Parameters,
    RamBlock, Reading, Restored, RunState, Statistics, Taking, restore_from_file,
};

/// Memory whose pages are missing until they are placed. Who touches one says so, and waits.
struct Pages {
    blocks: Vec<RamBlock>,
    state: Mutex<PagesState>,
    changed: Condvar,
}

/// A block that lies in larger pages, and how many bytes each has.
type LargerPages = Option<(usize, u64)>;

#[derive(Default)]
struct PagesState {
    faults: Vec<Fault>,
    placed: BTreeSet<(usize, u64)>,
    released: bool,
    lost: Option<String>,
    /// A block that lies in pages of so many bytes.
    larger_pages: Option<(usize, u64)>,
}

impl PagesState {
    fn page_bytes(&self, block: usize) -> u64 {
        self.larger_pages.filter(|(larger, _)| *larger == block).map_or(PAGE_BYTES, |(_, bytes)| bytes)
    }
}

impl Pages {
    fn wait<T>(&self, mut until: impl FnMut(&mut PagesState) -> Option<T>) -> T {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(value) = until(&mut state) {
                self.changed.notify_all();
                return value;
            }
            state = self.changed.wait(state).unwrap();
        }
    }

    fn change(&self, change: impl FnOnce(&mut PagesState)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    /// Looks at a page as a guest does; `None` if it never comes.
    fn touch(&self, block: usize, offset: u64) -> Option<Vec<u8>> {
        let is_there = |state: &PagesState| state.released || state.placed.contains(&(block, offset));
        self.change(|state| {
            if !is_there(state) {
                let offset = offset - offset % state.page_bytes(block);
                state.faults.push(Fault { block, offset, thread: 0 });
            }
        });
        let there = self.wait(|state| match is_there(state) {
            true => Some(true),
            false => state.lost.is_some().then_some(false),
        });
        let mut page = vec![0; PAGE_BYTES as usize];
        let mapping = &self.blocks[block].mapping;
        mapping.as_volatile_slice().read_slice(&mut page, offset as usize).unwrap();
        there.then_some(page)
    }

    fn put(&self, block: usize, range: Range<u64>, bytes: impl Fn(u64) -> Vec<u8>) {
        let mut state = self.state.lock().unwrap();
        let is_part = state.page_bytes(block) > PAGE_BYTES;
        for offset in range.step_by(PAGE_BYTES as usize) {
            let is_new = if is_part {
                !state.placed.contains(&(block, offset))
            } else {
                state.placed.insert((block, offset))
            };
            assert!(is_new || !is_part, "a part at {offset:#x} of a page that was complete");
            if is_new {
                let mapping = &self.blocks[block].mapping;
                mapping.as_volatile_slice().write_slice(&bytes(offset), offset as usize).unwrap();
            }
        }
        drop(state);
        self.changed.notify_all();
    }
}

impl MissingPages for Pages {
    fn has(&self, _block: usize) -> bool {
        true
    }

    fn faults(&self, faults: &mut Vec<Fault>) -> MachineResult<()> {
        let come = |state: &mut PagesState| {
            let ready = state.released || !state.faults.is_empty();
            ready.then(|| std::mem::take(&mut state.faults))
        };
        faults.extend(self.wait(come));
        Ok(())
    }

    fn page_bytes(&self, block: usize) -> u64 {
        self.state.lock().unwrap().page_bytes(block)
    }

    fn complete(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()> {
        let pages = (offset..offset + length_bytes).step_by(PAGE_BYTES as usize);
        self.change(|state| state.placed.extend(pages.map(|offset| (block, offset))));
        Ok(())
    }

    fn place(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()> {
        let page = |at: u64| pages[(at - offset) as usize..][..PAGE_BYTES as usize].to_vec();
        self.put(block, offset..offset + pages.len() as u64, page);
        Ok(())
    }

    fn place_zeros(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()> {
        self.put(block, offset..offset + length_bytes, |_| vec![0; PAGE_BYTES as usize]);
        Ok(())
    }

    fn release(&self) -> MachineResult<()> {
        self.change(|state| state.released = true);
        Ok(())
    }

    fn hold(&self) -> MachineResult<()> {
        Err("a file that is lost does not come again".into())
    }

    fn go_on(&self) -> MachineResult<()> {
        Err("nobody was held".into())
    }

    fn lost(&self, error: &Error) {
        self.change(|state| state.lost = Some(error.chain()));
    }
}

/// Builds machines whose memory can be waited for.
struct Lazy {
    factory: Factory,
    /// Pages that devices look at while they are loaded.
    looked_at: Vec<(usize, u64)>,
    pages: Sender<Arc<Pages>>,
    /// See [`PagesState::larger_pages`].
    larger_pages: Option<(usize, u64)>,
}

struct LazyArriving {
    arriving: Arriving,
    looked_at: Vec<(usize, u64)>,
    pages: Arc<Pages>,
}

impl DestinationFactory for Lazy {
    type Machine = LazyArriving;

    fn description(&mut self) -> MachineResult<Description> {
        self.factory.description()
    }

    fn differences(&mut self, source: &Description, own: &Description) -> Vec<String> {
        self.factory.differences(source, own)
    }

    fn expected(&mut self) -> MachineResult<Expected> {
        self.factory.expected()
    }

    fn build(&mut self, source: &Description) -> MachineResult<LazyArriving> {
        let arriving = self.factory.build(source)?;
        let state = Mutex::new(PagesState { larger_pages: self.larger_pages, ..PagesState::default() });
        let pages = Arc::new(Pages { blocks: arriving.ram_blocks(), state, changed: Condvar::new() });
        self.pages.send(Arc::clone(&pages)).unwrap();
        Ok(LazyArriving { arriving, looked_at: self.looked_at.clone(), pages })
    }
}

impl DestinationMachine for LazyArriving {
    fn ram_blocks(&self) -> Vec<RamBlock> {
        self.arriving.ram_blocks()
    }

    fn missing_pages(&mut self) -> Option<Arc<dyn MissingPages>> {
        Some(Arc::clone(&self.pages) as _)
    }

    fn load_devices(&mut self, sections: SectionSet) -> MachineResult<()> {
        for (block, offset) in &self.looked_at {
            self.pages.touch(*block, *offset);
        }
        self.arriving.load_devices(sections)
    }

    fn take_image_locks(&mut self) -> MachineResult<()> {
        self.arriving.take_image_locks()
    }

    fn open_images(&mut self) -> MachineResult<()> {
        self.arriving.open_images()
    }

    fn release_images(&mut self) {
        self.arriving.release_images();
    }

    fn start(&mut self, state: RunState) -> MachineResult<Option<Instant>> {
        self.arriving.start(state)
    }
}

fn restore(
    world: &World,
    path: &Path,
    reading: Reading,
    looked_at: &[(usize, u64)],
) -> (Result<Restored<LazyArriving>, Error>, Receiver<Arc<Pages>>) {
    restore_by(world.lease("restored"), world, path, reading, (looked_at, None))
}

fn restore_by(
    mut lease: Lease,
    world: &World,
    path: &Path,
    reading: Reading,
    (looked_at, larger_pages): (&[(usize, u64)], LargerPages),
) -> (Result<Restored<LazyArriving>, Error>, Receiver<Arc<Pages>>) {
    let (pages, made) = channel();
    let looked_at = looked_at.to_vec();
    let mut factory = Lazy { factory: Factory::new(world, "restored"), looked_at, pages, larger_pages };
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    (
        restore_from_file(
            &mut factory,
            path,
            (reading, &Taking::Once),
            Some(&mut lease),
            &parameters,
            &statistics,
        ),
        made,
    )
}

fn run(fill: &Fill) -> bool {
    fill.run(&Parameters::new(), &Statistics::new())
}

/// Damages the page at `offset` of the first block of the file.
fn damage(path: &Path, offset: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    // The first block's pages begin at the first whole MiB behind their bitmap.
    let mut byte = [0];
    let at = CHUNK_BYTES + offset + 56;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Of a machine that arrives, whose blocks are in another order than the source's.
const RAM: usize = 1;

#[test]
fn the_guest_runs_first_and_its_memory_comes_when_it_is_touched_or_later() {
    let world = World::new();
    let (source, path) = suspended(&world);
    let mut contents = source.guest.contents();
    contents.reverse();
    let looked_at = [(RAM, 2 * PAGE_BYTES)];
    let (restored, _) = restore(&world, &path, Reading::OnDemand, &looked_at);
    let restored = restored.unwrap();
    assert_eq!(world.running(), ["restored"]);
    let (fill, pages) = (restored.fill.unwrap(), restored.machine.pages);
    let all = fill.missing_bytes();
    assert!(all > 0, "the rest of it is in the file");
    for (block, offset) in [(RAM, 0), (RAM, 599 * PAGE_BYTES), (0, 39 * PAGE_BYTES), (0, 20 * PAGE_BYTES)] {
        let expected = &contents[block][offset as usize..][..PAGE_BYTES as usize];
        assert!(pages.touch(block, offset).unwrap() == expected, "{offset:#x} of {block}");
    }
    assert!(run(&fill));
    assert_eq!(fill.missing_bytes(), 0);
    assert!(pages.state.lock().unwrap().released, "nobody waits any more");
    let arrived: Vec<_> = restored.machine.arriving.0.contents();
    assert!(arrived == source.guest.contents());
    assert_eq!(pages.state.lock().unwrap().lost, None);
}

/// Pieces of a file and larger pages lie across each other: who touches such a page waits for all pieces that it has a part of.
#[test]
fn a_larger_page_is_seen_when_the_last_of_its_pieces_has_come() {
    for touched in [0, 299, 300, 599] {
        let world = World::new();
        let (source, path) = suspended(&world);
        let mut contents = source.guest.contents();
        contents.reverse();
        let larger_pages = Some((RAM, 300 * PAGE_BYTES));
        let lease = world.lease("restored");
        let (restored, _) = restore_by(lease, &world, &path, Reading::OnDemand, (&[], larger_pages));
        let restored = restored.unwrap();
        let (fill, pages) = (restored.fill.unwrap(), restored.machine.pages);
        let offset = touched * PAGE_BYTES;
        let expected = &contents[RAM][offset as usize..][..PAGE_BYTES as usize];
        assert!(pages.touch(RAM, offset).unwrap() == expected, "page {touched}");
        assert!(run(&fill));
        assert!(restored.machine.arriving.0.contents() == source.guest.contents());
        assert_eq!(pages.state.lock().unwrap().lost, None);
    }
}

/// Each page from the newest file that has it.
#[test]
fn memory_of_several_files_comes_when_it_is_touched_or_later() {
    let (chain, mut days) = super::chain::three_days();
    let (world, lease) = chain.end("wednesday");
    let lease = Lease::open_existing(&lease, world.lease("restored").owner().clone()).unwrap();
    let path = world.path("wednesday");
    let (restored, _) = restore_by(lease, &world, &path, Reading::OnDemand, (&[], None));
    let restored = restored.unwrap();
    let (fill, pages) = (restored.fill.unwrap(), restored.machine.pages);
    let expected = days[2].clone();
    days[2].reverse();
    // Of the last day, of the one before (of which one is zeros), and of the first.
    for (block, page) in [(RAM, 300), (RAM, 3), (RAM, 7), (0, 9), (RAM, 200), (RAM, 598)] {
        let offset = page * PAGE_BYTES;
        let wanted = &days[2][block][offset as usize..][..PAGE_BYTES as usize];
        assert!(pages.touch(block, offset).unwrap() == wanted, "page {page} of {block}");
    }
    assert!(run(&fill));
    assert!(restored.machine.arriving.0.contents() == expected);
    assert_eq!(pages.state.lock().unwrap().lost, None);
}

/// Nobody waits for ever for a page of a piece that was brought: what is there is left, and what was taken away since is zeros.
#[test]
fn who_waits_for_a_page_that_was_brought_before_is_answered() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    let (restored, _) = restore(&world, &path, Reading::OnDemand, &[]);
    let restored = restored.unwrap();
    let (_fill, pages) = (restored.fill.unwrap(), restored.machine.pages);
    let (kept, lost) = (257 * PAGE_BYTES, 299 * PAGE_BYTES);
    let before = [kept, lost].map(|offset| pages.touch(RAM, offset).unwrap());
    assert!(before.iter().all(|page| page.iter().any(|byte| *byte != 0)), "both are in the file");
    // Of another piece: this one is brought when that is.
    pages.touch(RAM, 599 * PAGE_BYTES).unwrap();
    pages.change(|state| assert!(state.placed.remove(&(RAM, lost))));
    let (answer, answered) = channel();
    let waits = Arc::clone(&pages);
    std::thread::spawn(move || answer.send(waits.touch(RAM, lost)));
    let page = answered.recv_timeout(Duration::from_secs(30)).expect("it waits for ever");
    assert!(page.unwrap().iter().all(|byte| *byte == 0));
    // As a fault that was heard after its page had come.
    pages.change(|state| state.faults.push(Fault { block: RAM, offset: kept, thread: 0 }));
    pages.wait(|state| state.faults.is_empty().then_some(()));
    assert!(pages.touch(RAM, kept).unwrap() == before[0]);
}

#[test]
fn all_is_read_first_where_that_is_wished() {
    let world = World::new();
    let (source, path) = suspended(&world);
    let (restored, _) = restore(&world, &path, Reading::First, &[]);
    let restored = restored.unwrap();
    assert!(restored.fill.is_none());
    assert!(restored.machine.arriving.0.contents() == source.guest.contents());
}

#[test]
fn a_damaged_page_is_the_end_of_a_guest_that_needs_it() {
    for touched in [true, false] {
        let world = World::new();
        let (_source, path) = suspended(&world);
        damage(&path, 257 * PAGE_BYTES);
        let (restored, _) = restore(&world, &path, Reading::OnDemand, &[]);
        let restored = restored.unwrap();
        let (fill, pages) = (restored.fill.unwrap(), restored.machine.pages);
        if touched {
            assert_eq!(pages.touch(RAM, 299 * PAGE_BYTES), None, "it is in the same piece");
        }
        assert!(!run(&fill));
        let lost = pages.wait(|state| state.lost.clone());
        assert!(lost.contains("memory at 0x100000") && lost.contains("\"ram.low\""), "{lost}");
        assert!(lost.contains("guest"), "the file is named: {lost}");
        assert!(!pages.state.lock().unwrap().released, "nobody goes on with memory that never was");
    }
}

#[test]
fn a_damaged_page_is_refused_where_all_is_read_first() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    damage(&path, 257 * PAGE_BYTES);
    let (restored, _) = restore(&world, &path, Reading::First, &[]);
    let error = restored.map(drop).unwrap_err().chain();
    assert!(error.contains("memory at 0x100000"), "{error}");
    assert_eq!(world.running(), [""; 0]);
    assert!(matches!(world.lease("other").read().unwrap().unwrap().state, State::InFile { .. }));
}

#[test]
fn a_damaged_page_that_a_device_looks_at_is_refused_before_the_guest_is_taken() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    damage(&path, 257 * PAGE_BYTES);
    let (restored, made) = restore(&world, &path, Reading::OnDemand, &[(RAM, 257 * PAGE_BYTES)]);
    let error = restored.map(drop).unwrap_err().chain();
    assert!(error.contains("memory at 0x100000"), "{error}");
    assert_eq!((world.running(), world.image_holder()), (vec![], None));
    assert!(matches!(world.lease("other").read().unwrap().unwrap().state, State::InFile { .. }));
    let pages = made.recv().unwrap();
    assert_eq!(pages.state.lock().unwrap().lost, None, "there is no guest to stop");
}

#[test]
fn a_file_that_is_cut_short_while_the_guest_runs_is_its_end() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    let (restored, _) = restore(&world, &path, Reading::OnDemand, &[]);
    let restored = restored.unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(CHUNK_BYTES + 3 * PAGE_BYTES).unwrap();
    assert!(!run(&restored.fill.unwrap()));
    let lost = restored.machine.pages.wait(|state| state.lost.clone());
    assert!(lost.contains("memory at 0x0") && lost.contains("end"), "{lost}");
}

#[test]
fn a_guest_that_is_somewhere_else_waits_for_nothing() {
    let world = World::new();
    let (_source, path) = suspended(&world);
    world.lease("other").claim_anew().unwrap();
    let (restored, made) = restore(&world, &path, Reading::OnDemand, &[]);
    assert!(matches!(restored.map(drop), Err(Error::Lease(_))));
    assert!(made.recv().unwrap().state.lock().unwrap().released);
    assert_eq!(files(&world), ["guest", "lease"]);
}
