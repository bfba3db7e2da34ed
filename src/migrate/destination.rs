//! The machine that arrives, as the migration engine sees it.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Instant;

use engine::lease::Id;
use engine::storage::{Disk, IncomingDisks};
use engine::{
    Description, DestinationFactory, DestinationMachine, FreshMemory, ImageFile, MachineResult, MissingPages,
    PAGE_BYTES, PageBitmap, RamBlock, RunState, Since,
};
use stream::{Expected, SectionSet};

use super::fresh::Fresh;
use super::paging::Paging;
use super::storage::{Incoming, Shared};
use super::{description, lock, processor, ram_blocks};
use crate::dirty::DirtyTracker;
use crate::kvm::GuestTime;
use crate::machine::{Action, Machine, Resources, schema_hashes};
use crate::memory::{HugePages, RamBlock as MemoryBlock, SmallPages};
use crate::startup::{self, Step};
use crate::userfault::Userfault;
use crate::vcpu::Offer;
use crate::vmm::{Vmm, has_room};

/// Builds the configured machine for whoever comes.
pub struct Factory {
    vmm: Arc<Vmm>,
    time: GuestTime,
    /// What it is built on, opened before it.
    resources: Option<Resources>,
    /// The machine that was described, to be the one that is built.
    machine: Option<Machine>,
    /// What the host offers its vCPUs: a file is compared when the machine has been built.
    offer: Offer,
    /// Its memory.
    blocks: Vec<stream::RamBlock>,
    /// The guest of the attempt that begins brings its images.
    has_images: bool,
    /// Those, to be made once it fits: until then the machine has others in their place.
    images: Weak<Mutex<Incoming>>,
}

impl Factory {
    /// For guests that come over a link or out of a file, which decides how their clocks go on.
    #[must_use]
    pub fn new(vmm: &Arc<Vmm>, time: GuestTime) -> Self {
        // The description will need them, and while KVM makes the machine a processor is free. Without the thread it computes them itself.
        let _ = thread::Builder::new().name("schemas".to_owned()).spawn(schema_hashes);
        Self {
            vmm: Arc::clone(vmm),
            time,
            resources: None,
            machine: None,
            offer: Offer::default(),
            blocks: Vec::new(),
            has_images: false,
            images: Weak::new(),
        }
    }

    fn prepare(&mut self) -> anyhow::Result<Machine> {
        if let Some(machine) = self.machine.take() {
            return Ok(machine);
        }
        let resources = match self.resources.take() {
            Some(resources) => resources,
            None => Resources::open(&self.vmm.spec, true)?,
        };
        self.prepare_on(resources)
    }

    fn prepare_on(&mut self, resources: Resources) -> anyhow::Result<Machine> {
        self.look_at(&resources);
        self.vmm.prepare_machine(Arc::new(resources))
    }

    fn look_at(&mut self, resources: &Resources) {
        let blocks = resources.ram().blocks().iter();
        self.blocks = blocks.map(|block| stream::RamBlock::new(&block.name, block.length_bytes())).collect();
    }

    /// Makes the images of the attempt that begins, if there are any, and the machine on them.
    fn make_images(&mut self) -> anyhow::Result<()> {
        let Some(images) = std::mem::take(&mut self.images).upgrade() else { return Ok(()) };
        let mut images = lock(&images);
        // The one that was compared.
        self.machine = None;
        images.make()?;
        let machine = self.prepare()?;
        images.open(machine.resources())?;
        self.machine = Some(machine);
        Ok(())
    }
}

impl DestinationFactory for Factory {
    type Machine = Arrival;

    fn expected(&mut self) -> MachineResult<Expected> {
        if self.blocks.is_empty() {
            let resources = Resources::open(&self.vmm.spec, true)?;
            self.look_at(&resources);
            self.resources = Some(resources);
        }
        Ok(Machine::expected(&self.vmm.spec, self.blocks.clone()))
    }

    fn receive_disks(&mut self, session: &Id, disks: &[Disk]) -> MachineResult<Box<dyn IncomingDisks>> {
        let come = self.vmm.images_come;
        let come =
            come.ok_or("the destination has its own: start it with --with-storage for those of the source")?;
        // One that was built on images of before.
        self.machine = None;
        let images = Incoming::expect(&self.vmm, come, session, disks)?;
        self.machine = Some(self.prepare_on(images.stand_ins()?)?);
        self.has_images = true;
        let (images, way) = Shared::new(images);
        self.images = way;
        Ok(Box::new(images))
    }

    fn description(&mut self) -> MachineResult<Description> {
        let has_images = std::mem::take(&mut self.has_images);
        if self.vmm.images_come.is_some() && !has_images {
            return Err("it was started --with-storage, and the source keeps its images (ferry migrate --with-storage)".into());
        }
        // One that was described to a source which did not fit. Images change while one waits, as what guests create in a folder does: with
        // the old one, a source that was refused for another image would be for ever.
        if !has_images {
            self.machine = None;
        }
        // It is made now and kept: it costs nothing until memory arrives, and the guest finds it ready.
        let machine = self.prepare()?;
        let description = description::describe(&machine)?;
        self.offer = machine.offer().clone();
        self.machine = Some(machine);
        Ok(description)
    }

    fn differences(&mut self, source: &Description, own: &Description) -> Vec<String> {
        description::differences(source, own, &self.offer)
    }

    fn can_miss_pages(&mut self) -> MachineResult<()> {
        Ok(Userfault::check(self.vmm.spec.hugepages == HugePages::Reserved)?)
    }

    fn build(&mut self, source: &Description) -> MachineResult<Arrival> {
        self.make_images()?;
        let machine = self.prepare()?;
        // What comes out of a file is known only with the vCPUs' state, which then has it too.
        if let Some(tables) = processor::tables(source) {
            machine.adopt(&tables)?;
        }
        let small = Vec::new();
        Ok(Arrival { vmm: Arc::clone(&self.vmm), time: self.time, machine: Some(machine), small })
    }
}

/// A machine whose guest is on its way.
pub struct Arrival {
    vmm: Arc<Vmm>,
    time: GuestTime,
    /// Until it starts; then it is the process's.
    machine: Option<Machine>,
    /// From when the first page was named that is to be missing: channels still bring others, of which no huge page is to come into
    /// being around it.
    small: Vec<SmallPages>,
}

impl Arrival {
    fn machine(&self) -> MachineResult<&Machine> {
        self.machine.as_ref().ok_or_else(|| "the machine has been started already".into())
    }

    fn block(&self, number: usize) -> MachineResult<&MemoryBlock> {
        let blocks = self.machine()?.resources().ram().blocks();
        blocks.get(number).ok_or_else(|| format!("there is no block number {number}").into())
    }
}

impl DestinationMachine for Arrival {
    fn ram_blocks(&self) -> Vec<RamBlock> {
        self.machine.as_ref().map(|machine| ram_blocks(machine.resources().ram())).unwrap_or_default()
    }

    fn fresh_memory(&mut self) -> Option<Arc<dyn FreshMemory>> {
        match Fresh::begin(self.machine.as_ref()?.resources()) {
            Ok(fresh) => Some(Arc::new(fresh?)),
            Err(error) => {
                let error = anyhow::Error::from(error);
                log::info!("guest memory is not filled by userfaultfd, and comes in another way: {error:#}");
                None
            }
        }
    }

    fn missing_pages(&mut self) -> Option<Arc<dyn MissingPages>> {
        startup::done(Step::File);
        match Paging::begin(&self.vmm, self.machine.as_ref()?.resources()) {
            Ok(paging) => Some(Arc::new(paging)),
            Err(error) => {
                log::warn!("{error}; so the guest runs when all of its memory has been read");
                None
            }
        }
    }

    fn takes_memory(&self) -> bool {
        true
    }

    fn map_memory(&mut self, passed: Vec<OwnedFd>) -> MachineResult<()> {
        Ok(self.machine()?.resources().map_passed(passed)?)
    }

    fn adopt_memory(&mut self, passed: Vec<OwnedFd>) -> MachineResult<()> {
        Ok(self.machine()?.resources().adopt_passed(passed)?)
    }

    fn image_files(&self) -> Option<Vec<String>> {
        // What came stays open beside the image itself.
        let machine = self.machine.as_ref().filter(|_| has_room(&self.vmm.spec))?;
        Some(machine.resources().image_file_names())
    }

    fn adopt_image_files(&mut self, passed: Vec<ImageFile>) -> MachineResult<()> {
        Ok(self.machine()?.resources().adopt_image_files(passed)?)
    }

    fn discard(&mut self, block: usize, pages: Range<u64>) -> MachineResult<()> {
        if self.small.is_empty() {
            self.small = self.machine()?.resources().ram().keep_small()?;
        }
        let block = self.block(block)?;
        // Each look at a block is a system call, and there is one for each run of pages while the guest stands still.
        if self.vmm.spec.hugepages == HugePages::Reserved && block.is_huge() {
            // Nobody sees the page before all that is missing of it came, over what is there.
            return Ok(());
        }
        Ok(block.give_back(pages.start * PAGE_BYTES, (pages.end - pages.start) * PAGE_BYTES)?)
    }

    fn keep_missing(&mut self, block: usize, pages: &PageBitmap) -> MachineResult<()> {
        Ok(self.block(block)?.keep_missing(pages.runs())?)
    }

    fn note_writes_since(&mut self, snapshot: u64) -> MachineResult<()> {
        if self.vmm.tracks_from_its_file() {
            let machine = self.machine()?;
            let ram = machine.resources().ram();
            let pages =
                ram.blocks().iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
            machine.noted().keep(DirtyTracker::start(machine.vm(), ram)?, Since { snapshot, pages });
        }
        Ok(())
    }

    fn load_devices(&mut self, sections: SectionSet) -> MachineResult<()> {
        startup::done(Step::Memory);
        self.machine()?.load(sections, self.time)?;
        startup::done(Step::Devices);
        Ok(())
    }

    fn renew_generation(&mut self) -> MachineResult<()> {
        Ok(self.machine()?.renew_generation()?)
    }

    fn take_image_locks(&mut self) -> MachineResult<()> {
        Ok(self.machine()?.resources().acquire_images()?)
    }

    fn open_images(&mut self) -> MachineResult<()> {
        // Who locks an image opens it, and looks whether it has the size and identity that it had.
        Ok(())
    }

    fn release_images(&mut self) {
        if let Ok(machine) = self.machine()
            && let Err(error) = machine.resources().release_images()
        {
            log::error!("cannot give the images back: {error}");
        }
    }

    fn start(&mut self, state: RunState) -> MachineResult<Option<Instant>> {
        startup::done(Step::Ownership);
        let machine = self.machine.take().ok_or("the machine has been started already")?;
        // Whoever brings missing pages keeps them small for as long.
        self.small.clear();
        let running = state == RunState::Running;
        let start = |machine: &Machine| {
            if running {
                return machine.start();
            }
            // Paused or not: what came with the guest is kept from now on.
            machine.resources().attach_regions()?;
            Ok(None)
        };
        let ran = self.vmm.install(machine, Action::Arrive { running }, start).inspect_err(|_| {
            // It is ours all the same and stays paused; `cont` tries again.
            let arrived =
                self.vmm.act(Action::Arrive { running: false }, |machine| machine.pause().map(drop));
            if let Err(error) = arrived {
                log::error!("the guest is ours, but: {error:#}");
            }
        })?;
        Ok(ran)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, RAM_LOW};
    use crate::vmm::tests::process_with;

    /// A source that was refused since another image was here comes again when the right one is.
    #[test]
    fn what_is_here_is_looked_at_anew_for_each_source() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        let put = |name: &str| {
            let draft = folder.path().join(name);
            std::fs::File::create(&draft).unwrap().set_len(1 << 20).unwrap();
            std::fs::rename(&draft, &image).unwrap();
            std::fs::metadata(&image).unwrap()
        };
        put("first");
        let disk = format!("path={},serial=a,queues=1", image.display());
        let (vmm, _requests) = process_with(&["--nvme", &disk]);
        let mut factory = Factory::new(&vmm, GuestTime::Live);
        let mut told = || {
            let description = factory.description().unwrap();
            description.get("identity.nvme.a.ns.1.image").unwrap().to_owned()
        };
        // The first is kept open, so that the second has another number.
        let first = std::fs::File::open(&image).unwrap();
        let before = told();
        let inode = std::os::unix::fs::MetadataExt::ino(&put("second"));
        let after = told();
        assert_ne!(before, after);
        assert!(after.ends_with(&format!("inode {inode}")), "{after}");
        drop(first);
    }

    /// A machine that waits for its guest, its memory, and the number of its largest block there.
    fn arrival(flags: &[&str]) -> (Arrival, GuestRam, usize) {
        let (vmm, _requests) = process_with(flags);
        let mut factory = Factory::new(&vmm, GuestTime::Live);
        let description = factory.description().unwrap();
        let arrival = factory.build(&description).unwrap();
        let ram = arrival.machine().unwrap().resources().ram().clone();
        let number = ram.blocks().iter().position(|block| block.name == RAM_LOW).unwrap();
        (arrival, ram, number)
    }

    #[test]
    fn memory_is_filled_until_it_is_released() {
        let (mut arrival, ram, number) = arrival(&["--hugepages=off"]);
        let block = &ram.blocks()[number];
        let page = |value: u8| [value; PAGE_BYTES as usize];
        let fresh = arrival.fresh_memory().expect("a userfaultfd, which seccomp may forbid");
        assert!((0..ram.blocks().len()).all(|block| fresh.has(block)) && !fresh.has(ram.blocks().len()));
        fresh.fill(number, 3 * PAGE_BYTES, &page(3)).unwrap();
        fresh.release().unwrap();
        fresh.release().unwrap();
        assert!(fresh.fill(number, 4 * PAGE_BYTES, &page(4)).is_err());
        // Whoever touches it waits for nobody, and may be made to.
        let read = |page: u64| {
            let mut byte = [9];
            block.read(page * PAGE_BYTES, &mut byte).unwrap();
            byte[0]
        };
        assert_eq!([3, 4].map(read), [3, 0]);
        assert!(arrival.missing_pages().is_some());
        drop(fresh);
    }

    /// Channels bring the last of a round while the first pages are named that are to be missing.
    #[test]
    fn what_comes_beside_a_page_that_is_to_be_missing_does_not_fill_it() {
        const HUGE_PAGES: u64 = 512;
        let (mut arrival, ram, number) = arrival(&[]);
        let block = &ram.blocks()[number];
        block.write(0, &[1]).unwrap();
        let was_huge = block.is_populated(PAGE_BYTES).unwrap();
        let missing = |page: u64| !block.is_populated(page * PAGE_BYTES).unwrap();
        for page in [5, HUGE_PAGES + 5] {
            arrival.discard(number, page..page + 1).unwrap();
            block.write((page + 1) * PAGE_BYTES, &[1]).unwrap();
            assert!(missing(page), "{page}");
        }
        drop(arrival);
        block.write(2 * HUGE_PAGES * PAGE_BYTES, &[1]).unwrap();
        assert_eq!(!missing(2 * HUGE_PAGES + 1), was_huge, "afterwards memory is as it was");
    }
}
