//! What the engine asks of a machine. `ferry`'s `src/migrate` answers for the real one, the tests for a model.
//!
//! The engine calls a machine from one thread, the migration thread, which owns the handle while it works.

use std::error::Error;
use std::fmt::{self, Debug};
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use dirty_bitmap::DirtyBitmap;
use stream::{DeviceSection, Expected, SectionSet};
use vm_memory::MmapRegion;

use crate::lease::Id;
use crate::storage::{Disk, IncomingDisks, OutgoingDisks};
use crate::{Description, Error as EngineError, PageBitmap};

/// A machine's own failure. Its chain of sources is shown to the user on both sides.
pub type MachineResult<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A named piece of guest memory. Both sides have the same blocks by name and length.
#[derive(Clone, Debug)]
pub struct RamBlock {
    /// Unique, at most 255 bytes; for example `ram.low`.
    pub name: String,
    /// The memory. Its length is a multiple of the page size.
    pub mapping: Arc<MmapRegion<DirtyBitmap>>,
}

impl RamBlock {
    /// Length in bytes.
    #[must_use]
    pub fn length_bytes(&self) -> u64 {
        self.mapping.size() as u64
    }
}

/// A block of guest memory as descriptors, for a process of the same host. Closing them changes nothing.
#[derive(Debug)]
pub struct MemoryDescriptors {
    /// Through this one nobody can write.
    pub readable: OwnedFd,
    /// Through this one whoever has it can.
    pub writable: OwnedFd,
}

/// A file of an image, for a process of the same host.
#[derive(Debug)]
pub struct ImageFile {
    /// Unique, at most 255 bytes. Which part of which image it is, not where it is: the other process's machine has one of this name too.
    pub name: String,
    /// Through this one nobody can read, write or lock; it says which file it is, and lets it be opened anew. Closing it changes nothing.
    pub descriptor: OwnedFd,
}

/// Whether the vCPUs run. It travels: a paused guest arrives paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// The vCPUs run.
    Running,
    /// The user stopped the guest.
    Paused,
}

/// Where saved devices go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveFor {
    /// To a process that knows what the bytes mean: [`DeviceSection::save_bare`].
    Connection,
    /// Into a file that says it: [`DeviceSection::save`].
    File,
}

/// An image that the guest may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Unique, for the name of its copy: `disk0-1.raw`, say.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// The image that it lies over, and so does its copy. Nobody writes that.
    pub base: Option<PathBuf>,
}

/// How images are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageCopy {
    /// By the file system, which shares the blocks until one of the two is written: at once, whatever the size.
    #[default]
    Reflink,
    /// Byte by byte, with holes kept, while the guest stands still.
    Bytes,
}

impl fmt::Display for ImageCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reflink => "reflink",
            Self::Bytes => "copy",
        })
    }
}

/// What a guest has written since a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Since {
    /// Digest of the snapshot's file.
    pub snapshot: u64,
    /// The pages that are known, one bitmap for each of [`SourceMachine::ram_blocks`]; those that were not collected yet come on top.
    pub pages: Vec<PageBitmap>,
}

impl Since {
    /// The same with pages that were collected.
    #[must_use]
    pub(crate) fn and(mut self, collected: &[PageBitmap]) -> Self {
        self.pages.iter_mut().zip(collected).for_each(|(pages, more)| pages.union(more));
        self
    }
}

/// The machine that leaves.
///
/// Until [`finish`](Self::finish) every step can be undone: after any failure the engine calls
/// [`stop_dirty_tracking`](Self::stop_dirty_tracking) and [`stop_throttling`](Self::stop_throttling), then, as far as they were left,
/// [`reacquire_images`](Self::reacquire_images) and [`resume`](Self::resume).
pub trait SourceMachine {
    /// What the destination must match.
    ///
    /// # Errors
    /// The host could not be asked.
    fn description(&mut self) -> MachineResult<Description>;

    /// Why this machine cannot leave now, one sentence each; empty if it can.
    fn blockers(&mut self) -> Vec<String>;

    /// All guest memory, in an order of the machine's choice that does not change.
    fn ram_blocks(&self) -> Vec<RamBlock>;

    /// Guest memory itself, one of each for each of [`ram_blocks`](Self::ram_blocks), in that order. `None`: this machine's memory is
    /// not to be had so, or is not whole yet (parts of it are still to come from somewhere), and its contents are sent.
    ///
    /// # Errors
    /// The host refuses; contents are sent then too.
    fn memory_descriptors(&mut self) -> MachineResult<Option<Vec<MemoryDescriptors>>> {
        Ok(None)
    }

    /// The files that the images are made of, as they are held. None: the other process opens its images by their names in the file
    /// system.
    ///
    /// # Errors
    /// The host refuses; they are opened by their names then too.
    fn image_files(&mut self) -> MachineResult<Vec<ImageFile>> {
        Ok(Vec::new())
    }

    /// The byte ranges of `block` that hold data: what the memfd has. The rest is never read, so that holes stay holes.
    ///
    /// # Errors
    /// The memfd could not be asked.
    fn populated(&mut self, block: &RamBlock) -> MachineResult<Vec<Range<u64>>>;

    /// From here on every write to guest memory is seen, by vCPUs and by device models. What was dirty before does not
    /// count. Ends a tracking that was [kept](Self::keep_dirty_tracking).
    ///
    /// # Errors
    /// The log could not be enabled; nothing is tracked then.
    fn start_dirty_tracking(&mut self) -> MachineResult<()>;

    /// Takes and clears the pages written since the last call, one bitmap for each of
    /// [`ram_blocks`](Self::ram_blocks), in that order: KVM's united with the process's own.
    ///
    /// # Errors
    /// The log could not be read.
    fn collect_dirty(&mut self) -> MachineResult<Vec<PageBitmap>>;

    /// Ends the tracking. Harmless when nothing is tracked.
    fn stop_dirty_tracking(&mut self);

    /// Goes on with the tracking beyond this attempt, for [`take_up_dirty_tracking`](Self::take_up_dirty_tracking). Another attempt that
    /// [starts](Self::start_dirty_tracking) its own ends it, and so does whatever ends the machine.
    fn keep_dirty_tracking(&mut self, _since: Since) {
        self.stop_dirty_tracking();
    }

    /// Takes the tracking that was kept for this attempt, as if it had begun it. `None`: there is none.
    fn take_up_dirty_tracking(&mut self) -> Option<Since> {
        None
    }

    /// Keeps every vCPU out of the guest for `percent` of the time, 1 to 99, until [`stop_throttling`](Self::stop_throttling) or
    /// [`stop`](Self::stop). May be called again with another share.
    ///
    /// # Errors
    /// The guest is slowed down as it was before.
    fn throttle(&mut self, percent: u8) -> MachineResult<()>;

    /// Lets the vCPUs run as they can, at once. Harmless when they do.
    fn stop_throttling(&mut self);

    /// The last round is near: what would lengthen the stop and can be done while the guest runs (write back the images'
    /// caches, for example). It may take long: what the guest dirties meanwhile is judged anew, and this may be called again.
    /// A failure shows again in the stop.
    fn prepare_stop(&mut self) {}

    /// Stops vCPUs and devices in the order of the design and leaves no work in flight. vCPUs that were slowed down are so no longer
    /// when they run again. Returns what the guest was doing.
    ///
    /// # Errors
    /// Something would not stop; what stopped is running again.
    fn stop(&mut self) -> MachineResult<RunState>;

    /// The state of every vCPU, chip and device, in the order in which it is to be loaded. Only reads; called once,
    /// stopped, *before* the last [`collect_dirty`](Self::collect_dirty).
    ///
    /// # Errors
    /// KVM refused to tell.
    fn save_devices(&mut self, purpose: SaveFor) -> MachineResult<Vec<DeviceSection>>;

    /// The device sections and the RAM that a restore of this machine will look for: what
    /// [`save_devices`](Self::save_devices) gives is read back by these rules before a file becomes the guest's only copy.
    fn expected(&self) -> Expected;

    /// The images that belong to a snapshot: those that the guest may write.
    ///
    /// # Errors
    /// Not everything that it may write is an image of its own.
    fn images(&mut self) -> MachineResult<Vec<Image>> {
        Ok(Vec::new())
    }

    /// Makes the empty file `into` what the image is, of which all acknowledged writes are stable.
    ///
    /// # Errors
    /// It cannot be copied so.
    fn copy_image(&mut self, image: &Image, _into: &File, _how: ImageCopy) -> MachineResult<()> {
        Err(format!("{} cannot be copied", image.path.display()).into())
    }

    /// The images that the guest may write, to go with it.
    ///
    /// # Errors
    /// Not everything that it may write is an image that can go, or there is none.
    fn storage(&mut self) -> MachineResult<Box<dyn OutgoingDisks>> {
        Err("this machine has no images that could go with it".into())
    }

    /// Makes every acknowledged write to the images stable and closes their writers. The locks stay. Called while the
    /// destination loads.
    ///
    /// # Errors
    /// A flush failed.
    fn quiesce_disks(&mut self) -> MachineResult<()>;

    /// Gives up the image locks, in the fixed order.
    ///
    /// # Errors
    /// Some lock could not be released; [`reacquire_images`](Self::reacquire_images) follows.
    fn release_image_locks(&mut self) -> MachineResult<()>;

    /// Takes the image locks and writers again, all or none, and checks that the images are what they were. Harmless for
    /// images that were never released.
    ///
    /// # Errors
    /// Someone else holds a lock (say who) or an image changed. The guest then stays paused.
    fn reacquire_images(&mut self) -> MachineResult<()>;

    /// Undoes [`stop`](Self::stop): devices in reverse order, then the vCPUs if `state` says so.
    ///
    /// # Errors
    /// The guest stays paused.
    fn resume(&mut self, state: RunState) -> MachineResult<()>;

    /// Whether this block must be at the destination before the guest runs there, and cannot follow.
    fn is_needed_at_once(&self, _block: &RamBlock) -> bool {
        false
    }

    /// The guest runs elsewhere, or lies in a file: this machine is `postmigrate` and never runs again. Guest memory is
    /// released, as far as the engine has no [block](RamBlock) of it any more.
    fn finish(&mut self);
}

/// Who can become a destination: knows the configured machine and builds it once a source is accepted.
pub trait DestinationFactory {
    /// What is built.
    type Machine: DestinationMachine;

    /// The machine that would be built.
    ///
    /// # Errors
    /// The host could not be asked.
    fn description(&mut self) -> MachineResult<Description>;

    /// Every reason why this host cannot run the machine of `source`, given what it would build itself. The default
    /// wants both to be equal; override to allow more (a host CPU with more features, say).
    fn differences(&mut self, source: &Description, own: &Description) -> Vec<String> {
        source.differences(own)
    }

    /// The device sections and the RAM that must come. A file is read while the machine is [described](Self::description) and built, so
    /// that this may be asked first.
    ///
    /// # Errors
    /// The host lacks what the machine is built on.
    fn expected(&mut self) -> MachineResult<Expected>;

    /// Looks whether images can be made for the guest of `session`, which brings what is in them, before its machine is
    /// [described](Self::description). Nothing is touched: [`build`](Self::build) makes them, for a guest that fits.
    ///
    /// # Errors
    /// They do not fit this machine, there is something in their place, or no room.
    fn receive_disks(&mut self, _session: &Id, _disks: &[Disk]) -> MachineResult<Box<dyn IncomingDisks>> {
        Err("this machine has its own".into())
    }

    /// Whether guest memory may follow after the guest here: the host lets this process [bring](MissingPages) what is touched.
    ///
    /// # Errors
    /// Why not.
    fn can_miss_pages(&mut self) -> MachineResult<()> {
        Err("this machine cannot run before all of its memory is here".into())
    }

    /// Creates everything that can be created before RAM arrives: memory slots, irqchip, vCPUs, threads, open
    /// descriptors. Guest memory is fresh: all of it holes. Images are looked at (size, identity) but neither locked nor
    /// written.
    ///
    /// # Errors
    /// The host lacks something; everything is released again.
    fn build(&mut self, source: &Description) -> MachineResult<Self::Machine>;
}

/// Somebody waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Number of the block.
    pub block: usize,
    /// First byte of the page in its block.
    pub offset: u64,
    /// Which thread waits; 0 if that is not known.
    pub thread: u32,
}

/// Guest memory that is placed when it is touched, by whichever vCPU, device model or request. Blocks have the numbers that they have in
/// [`DestinationMachine::ram_blocks`]. Several threads place.
pub trait MissingPages: Send + Sync {
    /// Whether who touches a missing page of the block waits for it. Pages of other blocks are never missing.
    fn has(&self, block: usize) -> bool;

    /// Bytes of the pages that the block lies in, which are missing and come to be there as wholes: [`PAGE_BYTES`](crate::PAGE_BYTES),
    /// or a multiple of it. [`Fault`]s are of whole ones.
    fn page_bytes(&self, block: usize) -> u64;

    /// The bytes of the page that a byte of the block is in.
    fn whole_page(&self, block: usize, offset: u64) -> Range<u64> {
        let bytes = self.page_bytes(block).max(crate::PAGE_BYTES);
        let start = offset - offset % bytes;
        start..start.saturating_add(bytes)
    }

    /// Waits until somebody touches missing pages, and adds all that is waited for; adds nothing once [`release`](Self::release)
    /// was called.
    ///
    /// # Errors
    /// The host does not tell.
    fn faults(&self, faults: &mut Vec<Fault>) -> MachineResult<()>;

    /// Places whole pages, as this process's own writes are *not*: nobody has changed them. Pages that are there stay as they are;
    /// whoever waits for one goes on.
    ///
    /// Of a block with [larger pages](Self::page_bytes) these are parts, and nobody sees them before the whole is
    /// [complete](Self::complete): afterwards none of its parts is placed any more, and before, each by one thread at a time.
    ///
    /// # Errors
    /// There is no memory.
    fn place(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()>;

    /// As [`place`](Self::place), of zeros.
    ///
    /// # Errors
    /// There is no memory.
    fn place_zeros(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()>;

    /// These whole [larger pages](Self::page_bytes) lack nothing any more: whoever waits for one goes on. Harmless for those that were
    /// complete.
    ///
    /// # Errors
    /// There is no memory.
    fn complete(&self, block: usize, offset: u64, length_bytes: u64) -> MachineResult<()>;

    /// No page is missing any more: those that were not placed are zeros, and nobody waits. Harmless when it was done.
    ///
    /// # Errors
    /// The host goes on to have them waited for.
    fn release(&self) -> MachineResult<()>;

    /// What the user calls a thread of this process.
    fn thread_name(&self, thread: u32) -> String {
        format!("thread {thread}")
    }

    /// Nothing that is missing comes at present: has the guest stand still until [`go_on`](Self::go_on), with those of its threads that
    /// wait for a page: none does anything more when it has that. Returns when it stands still, however many wait. Harmless when it
    /// does.
    ///
    /// # Errors
    /// The guest may run on, until it touches what is missing.
    fn hold(&self) -> MachineResult<()>;

    /// What is missing comes again: undoes [`hold`](Self::hold), and waits for nobody who waits for a page. Harmless when nobody is held.
    ///
    /// # Errors
    /// The guest stands still.
    fn go_on(&self) -> MachineResult<()>;

    /// The guest runs, and some of its memory cannot be had: it must not go on. Whoever waits goes on waiting.
    fn lost(&self, error: &EngineError);
}

/// Guest memory that holds nothing yet, and that nobody touches while it is filled, the engine neither: who touched what holds nothing
/// would wait until it is released, or fail if it is the kernel for somebody. Blocks have the numbers that they have in
/// [`DestinationMachine::ram_blocks`]. Several threads fill. Dropping it [releases](Self::release) it.
pub trait FreshMemory: Send + Sync {
    /// Whether the block can be filled so.
    fn has(&self, block: usize) -> bool;

    /// Fills whole pages that hold nothing.
    ///
    /// # Errors
    /// Some hold something, there is no memory, or it was released. Which of them are filled is not known.
    fn fill(&self, block: usize, offset: u64, pages: &[u8]) -> MachineResult<()>;

    /// From here on memory is as any other. Harmless when it is.
    ///
    /// # Errors
    /// The host goes on to let wait who touches it.
    fn release(&self) -> MachineResult<()>;
}

/// The machine that arrives. Dropping it before [`start`](Self::start) releases everything.
pub trait DestinationMachine {
    /// All guest memory.
    fn ram_blocks(&self) -> Vec<RamBlock>;

    /// Has memory, which is all holes and will be for a while, filled without being touched. `None`: it is faster otherwise, or the host
    /// cannot do that.
    fn fresh_memory(&mut self) -> Option<Arc<dyn FreshMemory>> {
        None
    }

    /// Has those who touch missing pages of memory wait for them from now on. `None`: the host cannot do that, and all memory is there
    /// before it is touched.
    fn missing_pages(&mut self) -> Option<Arc<dyn MissingPages>> {
        None
    }

    /// Whether [`map_memory`](Self::map_memory) can be called.
    fn takes_memory(&self) -> bool {
        false
    }

    /// Puts memory that a source of the same host passes in the place of this machine's own, one descriptor for each of
    /// [`ram_blocks`](Self::ram_blocks), in that order. The guest runs there, and goes on there if this attempt fails: the memory can be
    /// read here, and whoever writes it is stopped. The mappings of the blocks stay where they are.
    ///
    /// # Errors
    /// One is not what it should be (a memfd of the block's length that nobody can cut short, or the file that is in this
    /// machine's place for it), or cannot be mapped.
    fn map_memory(&mut self, passed: Vec<OwnedFd>) -> MachineResult<()> {
        Err(format!("this machine takes no memory, and {} descriptors of some came", passed.len()).into())
    }

    /// Takes descriptors of the same memory that can write, but does not write and lets nobody: [`start`](Self::start) does. The record
    /// lock of the lease is held, and it offers us the guest.
    ///
    /// # Errors
    /// One is not of the memory that was mapped, or cannot write.
    fn adopt_memory(&mut self, passed: Vec<OwnedFd>) -> MachineResult<()> {
        Err(format!("this machine takes no memory, and {} descriptors of some came", passed.len()).into())
    }

    /// Names of the [files](ImageFile) that the images are made of. `None`: they are opened by their names in the file system only.
    fn image_files(&self) -> Option<Vec<String>> {
        None
    }

    /// Takes files that a source of the same host passes: from now on they are opened so, whatever their names in the file system lead
    /// to. The source has the guest, and goes on with it if this attempt fails: nothing is opened, read or locked yet.
    ///
    /// # Errors
    /// One is not the very file that would be opened by its name here, or the descriptor can do more than it should.
    fn adopt_image_files(&mut self, passed: Vec<ImageFile>) -> MachineResult<()> {
        Err(format!("this machine opens images by their names, and {} files of some came", passed.len())
            .into())
    }

    /// Drops what is in these pages of block number `block` of [`ram_blocks`](Self::ram_blocks): they are missing again.
    ///
    /// # Errors
    /// The kernel refused.
    fn discard(&mut self, _block: usize, _pages: Range<u64>) -> MachineResult<()> {
        Err("this machine cannot run before all of its memory is here".into())
    }

    /// Makes sure that `pages` of that block, which were [dropped](Self::discard), are missing now that memory is watched: between the two a
    /// host may have filled them.
    ///
    /// # Errors
    /// The kernel refused.
    fn keep_missing(&mut self, _block: usize, _pages: &PageBitmap) -> MachineResult<()> {
        Ok(())
    }

    /// Memory is what it is in the mapped file of this digest, or will be when it is touched: what is written from now on, by devices
    /// that are loaded too, was written since that snapshot, for a machine that is to know it.
    ///
    /// # Errors
    /// It is to know it, and cannot.
    fn note_writes_since(&mut self, _snapshot: u64) -> MachineResult<()> {
        Ok(())
    }

    /// Checks the contents of every section and builds the devices from them; takes all of the sections out of the set.
    /// All that were [expected](DestinationFactory::expected) are there, each once, and RAM is complete. Nothing runs yet,
    /// and no image is written.
    ///
    /// # Errors
    /// A section is wrong; the message names it.
    fn load_devices(&mut self, sections: SectionSet) -> MachineResult<()>;

    /// Tells the guest, which has not run since, that it comes out of a snapshot, as others may: what it keeps secret or unique it
    /// shares with them. All devices are loaded.
    ///
    /// # Errors
    /// It cannot be told.
    fn renew_generation(&mut self) -> MachineResult<()> {
        Ok(())
    }

    /// Takes the image locks, all or none, in the fixed order. The record lock of the lease is held, and it offers us the guest:
    /// the source has written all that it will.
    ///
    /// # Errors
    /// Someone else holds one; say who.
    fn take_image_locks(&mut self) -> MachineResult<()>;

    /// Opens the images for writing, reads what the source has written there, and checks size and identity again. The guest is
    /// ours next, so nothing that is done afterwards may find a reason against it, and nothing is written yet.
    ///
    /// # Errors
    /// An image changed.
    fn open_images(&mut self) -> MachineResult<()>;

    /// Undoes [`take_image_locks`](Self::take_image_locks) and [`open_images`](Self::open_images): the guest goes back.
    fn release_images(&mut self);

    /// Makes memory that was handed over writable, resumes devices, and vCPUs if `state` says so. From here on the guest runs here. Says
    /// when the vCPUs went, if the machine knows.
    ///
    /// # Errors
    /// The guest is ours and stays paused: it cannot go back, since devices may have started.
    fn start(&mut self, state: RunState) -> MachineResult<Option<Instant>>;
}
