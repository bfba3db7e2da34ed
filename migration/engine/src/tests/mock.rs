//! Machines with a guest, an image and a lease, in a world in which two must never run it at once.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use stream::{DeviceSection, Expected, SectionSet};
use vm_memory::{Bytes, VolatileMemory};
use vmstate::VmState;

use super::disks::{Images, Incoming, Outgoing};
use super::fresh::MockFresh;
use super::missing::{Found, MockMemory};
use super::passed::{self, Memory};
use crate::lease::Id;
use crate::storage::{Disk, IncomingDisks, OutgoingDisks};
use crate::{
    Description, DestinationFactory, DestinationMachine, FreshMemory, HOST, Image, ImageCopy, ImageFile,
    MachineResult, MemoryDescriptors, MissingPages, PAGE_BYTES, PageBitmap, RamBlock, RunState, SaveFor,
    Since, SourceMachine,
};

pub use super::world::World;

/// Blocks of the mock machine: name, pages, and the pages that the memfd has.
const BLOCKS: [(&str, u64, Range<u64>); 2] = [("ram.low", 600, 0..400), ("namespace", 40, 8..40)];

/// The step of a machine at which something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The step of this name fails.
    Fail(&'static str),
    /// The process is killed at the step of this name.
    Kill(&'static str),
}

/// The part that source and destination have in common: a guest with RAM and a device.
#[derive(Debug)]
pub struct Guest {
    pub name: String,
    pub world: World,
    pub blocks: Vec<RamBlock>,
    memory: Vec<Memory>,
    pub device: DeviceState,
    pub trouble: Option<Trouble>,
    /// At this step the lease becomes unreadable, as on storage that is gone for a while.
    pub lease_lost_at: Option<&'static str>,
    /// Some of its memory is to follow.
    pub lacks_pages: bool,
    /// Digest of the file that it came out of.
    restored_from: Option<u64>,
    /// Names of the files of its images; `None`: it takes none of another process.
    pub image_files: Option<Vec<String>>,
    /// Those that came from another process.
    pub adopted: Vec<ImageFile>,
    /// Memory that nobody may touch while it is filled.
    pub fresh: Option<Arc<MockFresh>>,
    /// Memory that follows it.
    pub missing: Option<Arc<MockMemory>>,
    /// What it has on its host, if that is its own.
    pub images: Option<Arc<Images>>,
    /// What runs while memory follows.
    pub threads: Vec<JoinHandle<Vec<Found>>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "mock", version = 1)]
pub struct DeviceState {
    pub ticks: u64,
    #[vmstate(max = 1000)]
    pub level: u32,
}

impl Drop for Guest {
    /// As the end of a process does.
    fn drop(&mut self) {
        self.world.halt(&self.name);
        self.world.release_image(&self.name);
    }
}

impl Guest {
    fn new(name: &str, world: &World) -> Self {
        let (blocks, memory) =
            BLOCKS.iter().map(|(name, pages, _)| Memory::block(name, (pages * PAGE_BYTES) as usize)).unzip();
        let device = DeviceState::default();
        Self {
            name: name.to_owned(),
            world: world.clone(),
            blocks,
            memory,
            device,
            trouble: None,
            lease_lost_at: None,
            lacks_pages: false,
            restored_from: None,
            image_files: Some(vec!["disk.0".to_owned(), "disk.1".to_owned()]),
            adopted: Vec::new(),
            fresh: None,
            missing: None,
            images: None,
            threads: Vec::new(),
        }
    }

    fn memory_can_be_touched(&self) {
        if let Some(fresh) = &self.fresh {
            assert_eq!((fresh.is_released(), fresh.touched()), (true, Vec::new()));
        }
    }

    fn run(&self) {
        self.images.iter().for_each(|images| images.run());
        self.world.run(&self.name);
    }

    fn step(&self, step: &'static str) -> MachineResult<()> {
        self.world.note(&self.name, step);
        if self.lease_lost_at == Some(step) {
            self.world.lose_lease();
        }
        match self.trouble {
            Some(Trouble::Fail(at)) if at == step => Err(format!("{step} fails").into()),
            Some(Trouble::Kill(at)) if at == step => std::panic::resume_unwind(Box::new("killed")),
            _ => Ok(()),
        }
    }

    /// Writes as the guest does: the tracking sees it.
    pub fn write(&self, block: usize, page: u64, value: u64) {
        let address = (page * PAGE_BYTES + value % 500 * 8) as usize;
        self.blocks[block].mapping.as_volatile_slice().write_obj(value, address).unwrap();
    }

    pub fn zero(&self, block: usize, page: u64) {
        let zeroes = [0; PAGE_BYTES as usize];
        let slice = self.blocks[block].mapping.as_volatile_slice();
        slice.write_slice(&zeroes, (page * PAGE_BYTES) as usize).unwrap();
    }

    pub fn contents(&self) -> Vec<Vec<u8>> {
        self.blocks
            .iter()
            .map(|block| {
                let mut bytes = vec![0; block.mapping.size()];
                block.mapping.as_volatile_slice().copy_to(&mut bytes);
                bytes
            })
            .collect()
    }

    fn description(&self) -> Description {
        let mut description = Description::new();
        description.set("cpus", 2);
        description.set(HOST, "here");
        description.add_ram(&self.blocks);
        for index in 0..self.world.more_properties() {
            description.set(format!("nvme.a-disk-of-20-letters.ns.{index}.capacity_bytes"), 1_u64 << 40);
        }
        description
    }
}

type Preparation = Box<dyn FnMut(&Guest) + Send>;
type Look = Box<dyn FnMut(u8) + Send>;

/// The machine that leaves.
pub struct Source {
    pub guest: Guest,
    /// Pages that the guest writes between two looks at the bitmap, one entry for each look.
    pub writes: Vec<u64>,
    pub blockers: Vec<String>,
    pub paused: bool,
    pub finished: bool,
    /// What it is slowed down by.
    pub throttle_percent: u8,
    /// Hears of every look at the bitmap, and what the guest is slowed down by.
    pub on_look: Option<Look>,
    /// What happens while a stop is prepared.
    pub preparation: Option<Preparation>,
    /// Its memory can go itself.
    pub passes_memory: bool,
    /// What was in RAM when the guest was stopped.
    stopped_with: Option<Vec<Vec<u8>>>,
    looks: u64,
    tracking: bool,
    /// Goes on between two snapshots.
    kept: Option<Since>,
    /// Pages that were found in the stop, whose writes are not noted before the next look.
    unprotected: Option<Vec<PageBitmap>>,
}

impl Source {
    /// A running guest with something in its RAM, the image and the lease.
    pub fn new(world: &World, name: &str) -> Self {
        let guest = Guest::new(name, world);
        for (block, (_, _, populated)) in BLOCKS.iter().enumerate() {
            for page in populated.clone().filter(|page| page % 3 != 0) {
                guest.write(block, page, page * 1000 + 7);
            }
        }
        guest.world.take_image(name).unwrap();
        guest.world.run(name);
        let mut source = Self::of(guest);
        source.guest.device = DeviceState { ticks: 0x1234_5678, level: 77 };
        source
    }

    /// A machine that arrived leaves again.
    pub fn arrived(machine: Arriving) -> Self {
        Self::of(machine.0)
    }

    fn of(guest: Guest) -> Self {
        let nothing = guest.blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes()));
        let kept = guest.restored_from.map(|snapshot| Since { snapshot, pages: nothing.collect() });
        Self {
            guest,
            writes: vec![200, 60, 20],
            blockers: Vec::new(),
            paused: false,
            finished: false,
            throttle_percent: 0,
            on_look: None,
            preparation: None,
            passes_memory: false,
            stopped_with: None,
            looks: 0,
            tracking: kept.is_some(),
            kept,
            unprotected: None,
        }
    }

    /// The user stops the guest.
    pub fn pause(&mut self) {
        self.paused = true;
        self.guest.world.halt(&self.guest.name);
    }
}

impl SourceMachine for Source {
    fn description(&mut self) -> MachineResult<Description> {
        self.guest.step("describe")?;
        Ok(self.guest.description())
    }

    fn blockers(&mut self) -> Vec<String> {
        self.blockers.clone()
    }

    fn ram_blocks(&self) -> Vec<RamBlock> {
        self.guest.blocks.clone()
    }

    fn memory_descriptors(&mut self) -> MachineResult<Option<Vec<MemoryDescriptors>>> {
        Ok(self.passes_memory.then(|| self.guest.memory.iter().map(Memory::descriptors).collect()))
    }

    fn image_files(&mut self) -> MachineResult<Vec<ImageFile>> {
        self.guest.step("image files")?;
        let names = self.guest.image_files.as_deref().unwrap_or_default();
        Ok(passed::image_files(&self.guest.world, names))
    }

    fn populated(&mut self, block: &RamBlock) -> MachineResult<Vec<Range<u64>>> {
        self.guest.step("populated")?;
        let (_, _, pages) = BLOCKS.iter().find(|(name, _, _)| *name == block.name).unwrap();
        let mut ranges: Vec<_> = std::iter::once(pages.start * PAGE_BYTES..pages.end * PAGE_BYTES).collect();
        // What the guest wrote into holes since.
        let mut page = vec![0; PAGE_BYTES as usize];
        for start in (pages.end * PAGE_BYTES..block.length_bytes()).step_by(PAGE_BYTES as usize) {
            block
                .mapping
                .as_volatile_slice()
                .subslice(start as usize, page.len())
                .unwrap()
                .copy_to(&mut page);
            if page.iter().any(|byte| *byte != 0) {
                ranges.push(start..start + PAGE_BYTES);
            }
        }
        Ok(ranges)
    }

    fn start_dirty_tracking(&mut self) -> MachineResult<()> {
        self.guest.step("start tracking")?;
        assert!(!self.tracking || self.kept.take().is_some());
        self.tracking = true;
        self.unprotected = None;
        self.guest.blocks.iter().for_each(|block| block.mapping.bitmap().reset());
        Ok(())
    }

    fn collect_dirty(&mut self) -> MachineResult<Vec<PageBitmap>> {
        self.guest.step("collect")?;
        if let Some(on_look) = &mut self.on_look {
            on_look(self.throttle_percent);
        }
        assert!(self.tracking);
        let runs = !self.paused && self.guest.world.running().contains(&self.guest.name);
        if runs {
            let count = self.writes.get(self.looks as usize).copied().unwrap_or(10);
            let count = count * u64::from(100 - self.throttle_percent) / 100;
            for index in 0..count {
                // Everywhere, holes included, and some of it zeroes.
                let page = (index * 7 + self.looks * 13) % BLOCKS[0].1;
                if index % 5 == 4 {
                    self.guest.zero(0, page);
                } else {
                    self.guest.write(0, page, self.looks * 100_000 + index);
                }
            }
            self.looks += 1;
        }
        let bitmaps = self.guest.blocks.iter().map(|block| {
            let words = block.mapping.bitmap().get_and_reset();
            PageBitmap::from_words(words, block.length_bytes() / PAGE_BYTES)
        });
        let mut bitmaps: Vec<_> = bitmaps.collect();
        if let Some(unprotected) = self.unprotected.take() {
            for (bitmap, unprotected) in bitmaps.iter_mut().zip(unprotected) {
                unprotected.runs().for_each(|run| bitmap.clear_range(run));
            }
        }
        if !runs && self.stopped_with.is_some() {
            self.unprotected = Some(bitmaps.clone());
        }
        Ok(bitmaps)
    }

    fn stop_dirty_tracking(&mut self) {
        self.tracking = false;
        self.kept = None;
    }

    fn keep_dirty_tracking(&mut self, since: Since) {
        assert!(self.tracking);
        self.kept = Some(since);
    }

    fn take_up_dirty_tracking(&mut self) -> Option<Since> {
        self.kept.take()
    }

    fn throttle(&mut self, percent: u8) -> MachineResult<()> {
        self.guest.step("throttle")?;
        assert!((1..=99).contains(&percent) && self.tracking);
        self.guest.world.note(&self.guest.name, &format!("throttled by {percent}"));
        self.throttle_percent = percent;
        Ok(())
    }

    fn stop_throttling(&mut self) {
        self.throttle_percent = 0;
    }

    fn prepare_stop(&mut self) {
        self.guest.world.note(&self.guest.name, "prepare stop");
        if let Some(preparation) = &mut self.preparation {
            preparation(&self.guest);
        }
    }

    fn stop(&mut self) -> MachineResult<RunState> {
        self.guest.step("stop")?;
        // The last writes before the vCPUs stand still.
        self.guest.write(0, 599, 0xfeed);
        self.guest.write(1, 39, 0xbeef);
        self.guest.images.iter().for_each(|images| images.last_change());
        self.guest.world.halt(&self.guest.name);
        self.stopped_with = Some(self.guest.contents());
        self.throttle_percent = 0;
        Ok(RunState::from(!self.paused))
    }

    fn save_devices(&mut self, purpose: SaveFor) -> MachineResult<Vec<DeviceSection>> {
        self.guest.step("save")?;
        let state = &self.guest.device;
        Ok(vec![match purpose {
            SaveFor::Connection => DeviceSection::save_bare("mock", 0, state),
            SaveFor::File => DeviceSection::save("mock", 0, state),
        }])
    }

    fn expected(&self) -> Expected {
        expected()
    }

    fn images(&mut self) -> MachineResult<Vec<Image>> {
        self.guest.step("images")?;
        Ok(vec![Image { name: "disk-1.raw".to_owned(), path: self.guest.world.path("image"), base: None }])
    }

    fn copy_image(&mut self, _image: &Image, mut into: &File, how: ImageCopy) -> MachineResult<()> {
        // A trial comes while the guest runs.
        let runs = self.guest.world.running().contains(&self.guest.name);
        self.guest.step(if runs { "try to copy" } else { "copy" })?;
        Ok(write!(into, "{how} of the image")?)
    }

    fn storage(&mut self) -> MachineResult<Box<dyn OutgoingDisks>> {
        let images = self.guest.images.as_ref().ok_or("it has no images that could go with it")?;
        Ok(Box::new(Outgoing::new(images)))
    }

    fn quiesce_disks(&mut self) -> MachineResult<()> {
        self.guest.step("quiesce")
    }

    fn release_image_locks(&mut self) -> MachineResult<()> {
        self.guest.step("release image")?;
        self.guest.world.release_image(&self.guest.name);
        Ok(())
    }

    fn reacquire_images(&mut self) -> MachineResult<()> {
        self.guest.step("reacquire image")?;
        self.guest.world.take_image(&self.guest.name)
    }

    fn resume(&mut self, state: RunState) -> MachineResult<()> {
        self.guest.step("resume")?;
        assert!(!self.finished);
        if self.stopped_with.take().is_some_and(|before| before != self.guest.contents()) {
            self.guest.world.violate("the guest goes on with RAM that is not as it was".to_owned());
        }
        assert_eq!(self.throttle_percent, 0, "the guest runs as it did before");
        if state == RunState::Running {
            self.guest.run();
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.guest.world.note(&self.guest.name, "finish");
        self.finished = true;
    }
}

fn expected() -> Expected {
    let blocks = BLOCKS.iter().map(|(name, pages, _)| stream::RamBlock::new(*name, pages * PAGE_BYTES));
    Expected::new(blocks.collect()).section::<DeviceState>("mock", 0)
}

/// Builds destinations.
pub struct Factory {
    pub world: World,
    pub name: String,
    pub trouble: Option<Trouble>,
    pub cpus: u32,
    pub host: &'static str,
    pub less_ram: bool,
    /// Its machines take memory itself.
    pub takes_memory: bool,
    /// Names of the files of its machines' images, where it takes those of another process.
    pub image_files: Option<Vec<String>>,
    /// Why no memory may follow the guest, if so.
    pub needs_all: Option<&'static str>,
    /// How many machines were built.
    pub built: u32,
    /// What comes with a guest.
    pub images: Option<Arc<Images>>,
}

impl Factory {
    pub fn new(world: &World, name: &str) -> Self {
        Self {
            world: world.clone(),
            name: name.to_owned(),
            trouble: None,
            cpus: 2,
            host: "here",
            less_ram: false,
            takes_memory: true,
            image_files: Some(vec!["disk.0".to_owned(), "disk.1".to_owned()]),
            needs_all: None,
            built: 0,
            images: None,
        }
    }
}

impl DestinationFactory for Factory {
    type Machine = Arriving;

    fn description(&mut self) -> MachineResult<Description> {
        let mut description = Guest::new(&self.name, &self.world).description();
        description.set("cpus", self.cpus);
        description.set(HOST, self.host);
        if self.less_ram {
            description.remove("ram.namespace.length_bytes");
        }
        Ok(description)
    }

    fn differences(&mut self, source: &Description, own: &Description) -> Vec<String> {
        let (mut source, mut own) = (source.clone(), own.clone());
        source.remove(HOST);
        own.remove(HOST);
        source.differences(&own)
    }

    fn expected(&mut self) -> MachineResult<Expected> {
        Ok(expected())
    }

    fn receive_disks(&mut self, session: &Id, disks: &[Disk]) -> MachineResult<Box<dyn IncomingDisks>> {
        let images = self.images.as_ref().ok_or("this machine has its own")?;
        Ok(Box::new(Incoming::begin(images, session, disks)?))
    }

    fn can_miss_pages(&mut self) -> MachineResult<()> {
        self.needs_all.map_or(Ok(()), |reason| Err(reason.into()))
    }

    fn build(&mut self, _source: &Description) -> MachineResult<Arriving> {
        let mut guest = Guest::new(&self.name, &self.world);
        guest.trouble = self.trouble;
        guest.images = self.images.clone();
        guest.image_files = self.image_files.clone();
        guest.step("build")?;
        self.built += 1;
        Ok(Arriving(guest, self.takes_memory))
    }
}

/// The machine that arrives.
#[derive(Debug)]
pub struct Arriving(pub Guest, bool);

impl DestinationMachine for Arriving {
    fn ram_blocks(&self) -> Vec<RamBlock> {
        // In another order than at the source.
        self.0.blocks.iter().rev().cloned().collect()
    }

    fn takes_memory(&self) -> bool {
        self.1
    }

    fn map_memory(&mut self, passed: Vec<OwnedFd>) -> MachineResult<()> {
        self.0.step("map memory")?;
        let Guest { blocks, memory, .. } = &mut self.0;
        let all = blocks.iter_mut().zip(memory).rev().zip(passed);
        all.into_iter().try_for_each(|((block, memory), passed)| memory.map(block, passed))
    }

    fn adopt_memory(&mut self, passed: Vec<OwnedFd>) -> MachineResult<()> {
        self.0.step("adopt memory")?;
        let Guest { blocks, memory, .. } = &mut self.0;
        let all = blocks.iter().zip(memory).rev().zip(passed);
        all.into_iter().try_for_each(|((block, memory), passed)| memory.adopt(block, passed))
    }

    fn image_files(&self) -> Option<Vec<String>> {
        self.0.image_files.clone()
    }

    fn adopt_image_files(&mut self, passed: Vec<ImageFile>) -> MachineResult<()> {
        self.0.step("adopt image files")?;
        passed.iter().try_for_each(|file| passed::identify(&self.0.world, file))?;
        self.0.adopted.extend(passed);
        Ok(())
    }

    fn fresh_memory(&mut self) -> Option<Arc<dyn FreshMemory>> {
        let fresh = MockFresh::new(&self.ram_blocks(), self.0.world.lock().fills_before_failure);
        self.0.fresh = Some(Arc::clone(&fresh));
        Some(fresh)
    }

    fn discard(&mut self, block: usize, pages: Range<u64>) -> MachineResult<()> {
        self.0.memory_can_be_touched();
        self.0.lacks_pages = true;
        // As the machine has them, from the last to the first.
        let block = self.0.blocks.len() - 1 - block;
        pages.for_each(|page| self.0.zero(block, page));
        Ok(())
    }

    fn missing_pages(&mut self) -> Option<Arc<dyn MissingPages>> {
        if !self.0.lacks_pages {
            return None;
        }
        self.0.memory_can_be_touched();
        let mut world = self.0.world.lock();
        let memory = MockMemory::new(
            &self.ram_blocks(),
            world.larger_pages,
            world.faults_before_silence,
            world.sleeps,
        );
        memory.fail_a_completion_after(world.completions_before_failure);
        world.missing = Some(Arc::clone(&memory));
        drop(world);
        self.0.missing = Some(Arc::clone(&memory));
        Some(memory)
    }

    fn note_writes_since(&mut self, snapshot: u64) -> MachineResult<()> {
        self.0.restored_from = Some(snapshot);
        self.0.blocks.iter().for_each(|block| block.mapping.bitmap().reset());
        Ok(())
    }

    fn load_devices(&mut self, mut sections: SectionSet) -> MachineResult<()> {
        self.0.step("load")?;
        self.0.memory_can_be_touched();
        if let Some(memory) = &self.0.missing {
            // The guest's last write: the source has named it a moment ago, and answers before it gave anything away.
            memory.touch(1, 599, 99);
        }
        self.0.device = sections.take("mock", 0)?;
        sections.finish()?;
        Ok(())
    }

    fn renew_generation(&mut self) -> MachineResult<()> {
        self.0.step("renew generation")
    }

    fn take_image_locks(&mut self) -> MachineResult<()> {
        self.0.step("take image")?;
        self.0.world.take_image(&self.0.name)
    }

    fn open_images(&mut self) -> MachineResult<()> {
        self.0.step("open image")
    }

    fn release_images(&mut self) {
        self.0.world.release_image(&self.0.name);
    }

    fn start(&mut self, state: RunState) -> MachineResult<Option<Instant>> {
        self.0.step("start")?;
        if let Some(memory) = &self.0.missing {
            self.0.threads = vec![memory.run_guest(0, 7), memory.run_guest(1, 11)];
        }
        let Guest { blocks, memory, .. } = &mut self.0;
        let mut handed_over = false;
        for (block, memory) in blocks.iter_mut().zip(memory) {
            handed_over |= memory.make_writable(block)?;
        }
        if state == RunState::Running {
            self.0.run();
            if handed_over {
                // What the guest does first here must never be seen by one that goes on there.
                self.0.write(0, 17, 0x5eed);
            }
        }
        Ok((state == RunState::Running).then(Instant::now))
    }
}
