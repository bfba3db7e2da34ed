//! The machine that leaves, as the migration engine sees it.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, anyhow};
use engine::lease::Lease;
use engine::storage::OutgoingDisks;
use engine::{
    Description, Image, ImageCopy, ImageFile, MachineResult, MemoryDescriptors, PageBitmap, RamBlock,
    RunState, SaveFor, Since, SourceMachine,
};
use stream::{DeviceSection, Expected};

use super::storage::Outgoing;
use super::{description, images, lock, ram_blocks};
use crate::dirty::DirtyTracker;
use crate::machine::{Action, Machine, RunState as State};
use crate::vmm::Vmm;

/// How long a guest that comes back waits for images that someone else holds.
const IMAGE_PATIENCE: Duration = Duration::from_secs(2);

/// Borrows the machine of a [`Vmm`] for one attempt.
pub struct Source {
    vmm: Arc<Vmm>,
    machine: Arc<Machine>,
    tracker: Option<DirtyTracker>,
    /// Commands in flight when the stop began.
    in_flight_at_stop: Arc<AtomicU32>,
    /// The lease of images that go along.
    lease: Arc<Mutex<Option<Lease>>>,
}

impl Source {
    /// `machine`, which is that of `vmm`. How many commands were in flight when the stop began goes to `in_flight_at_stop`.
    pub fn new(vmm: &Arc<Vmm>, machine: Arc<Machine>, in_flight_at_stop: Arc<AtomicU32>) -> Self {
        Self { vmm: Arc::clone(vmm), machine, tracker: None, in_flight_at_stop, lease: Arc::default() }
    }

    /// The guest is ours again but cannot go on; `cont` tries again.
    fn stay_paused(&self, effect: impl FnOnce(&Machine) -> anyhow::Result<()>) {
        if let Err(error) = self.vmm.act(Action::TakeBack { running: false }, effect) {
            log::error!("the guest is ours, but: {error:#}");
        }
    }
}

impl SourceMachine for Source {
    fn description(&mut self) -> MachineResult<Description> {
        Ok(description::describe(&self.machine)?)
    }

    fn blockers(&mut self) -> Vec<String> {
        self.machine.migration_blockers()
    }

    fn ram_blocks(&self) -> Vec<RamBlock> {
        ram_blocks(self.machine.resources().ram())
    }

    fn memory_descriptors(&mut self) -> MachineResult<Option<Vec<MemoryDescriptors>>> {
        let blocks = self.machine.resources().ram().blocks().iter();
        let descriptors = blocks.map(|block| {
            let (readable, writable) = block.descriptors()?;
            Ok(MemoryDescriptors { readable, writable })
        });
        Ok(Some(descriptors.collect::<std::io::Result<_>>()?))
    }

    fn image_files(&mut self) -> MachineResult<Vec<ImageFile>> {
        Ok(self.machine.resources().image_files()?)
    }

    fn populated(&mut self, block: &RamBlock) -> MachineResult<Vec<Range<u64>>> {
        let ram = self.machine.resources().ram();
        let block =
            ram.block(&block.name).with_context(|| format!("there is no RAM block {}", block.name))?;
        Ok(block.populated_ranges()?)
    }

    fn start_dirty_tracking(&mut self) -> MachineResult<()> {
        // There is one log.
        drop(self.machine.noted().take());
        self.tracker = Some(DirtyTracker::start(self.machine.vm(), self.machine.resources().ram())?);
        Ok(())
    }

    fn collect_dirty(&mut self) -> MachineResult<Vec<PageBitmap>> {
        let stopped = matches!(self.vmm.run_state(), State::FinishMigrate { .. });
        let tracker = self.tracker.as_mut().context("no dirty pages are tracked")?;
        Ok(if stopped { tracker.collect_stopped()? } else { tracker.collect()? })
    }

    fn stop_dirty_tracking(&mut self) {
        self.tracker = None;
    }

    fn keep_dirty_tracking(&mut self, since: Since) {
        if let Some(tracker) = self.tracker.take() {
            self.machine.noted().keep(tracker, since);
        }
    }

    fn take_up_dirty_tracking(&mut self) -> Option<Since> {
        let (tracker, since) = self.machine.noted().take()?;
        self.tracker = Some(tracker);
        Some(since)
    }

    fn throttle(&mut self, percent: u8) -> MachineResult<()> {
        Ok(self.machine.throttle(percent)?)
    }

    fn stop_throttling(&mut self) {
        self.machine.stop_throttling();
    }

    fn prepare_stop(&mut self) {
        // What fails here fails again when the images are given up.
        if let Err(error) = self.machine.resources().sync_images() {
            log::warn!("writing back the images ahead of the stop: {error}");
        }
    }

    fn stop(&mut self) -> MachineResult<RunState> {
        let (_, (was_running, in_flight)) = self.vmm.act(Action::StopForMigration, |machine| {
            // Not before: a client's stop or continue could come between the look and the action.
            let was_running = self.vmm.run_state().is_running();
            // One that is paused may have been so while memory was missing, and commands have waited for that.
            let in_flight = if was_running { machine.pause()? } else { machine.halt()? };
            // All vCPUs have stopped, so nothing comes after this look.
            match self.vmm.guest_waits_for() {
                None => Ok((was_running, in_flight)),
                Some(wish) => {
                    if was_running {
                        machine.resume()?;
                    }
                    Err(anyhow!("{wish} before it could move"))
                }
            }
        })?;
        // Only now: a vCPU that rests is stopped sooner than one that was just woken.
        self.machine.stop_throttling();
        self.in_flight_at_stop.store(in_flight, Ordering::Relaxed);
        Ok(if was_running { RunState::Running } else { RunState::Paused })
    }

    fn save_devices(&mut self, purpose: SaveFor) -> MachineResult<Vec<DeviceSection>> {
        Ok(self.machine.save(purpose)?)
    }

    fn expected(&self) -> Expected {
        let blocks = self.machine.resources().ram().blocks().iter();
        let blocks = blocks.map(|block| stream::RamBlock::new(&block.name, block.length_bytes()));
        Machine::expected(&self.vmm.spec, blocks.collect())
    }

    fn images(&mut self) -> MachineResult<Vec<Image>> {
        Ok(images::of(&self.vmm.spec, &self.machine)?)
    }

    fn copy_image(&mut self, image: &Image, into: &File, how: ImageCopy) -> MachineResult<()> {
        Ok(images::copy(&image.path, into, how)?)
    }

    fn storage(&mut self) -> MachineResult<Box<dyn OutgoingDisks>> {
        Ok(Box::new(Outgoing::new(&self.vmm, &self.machine, &self.lease)?))
    }

    fn quiesce_disks(&mut self) -> MachineResult<()> {
        Ok(self.machine.resources().sync_images()?)
    }

    fn release_image_locks(&mut self) -> MachineResult<()> {
        // What follows is the hand-over: from here on no command makes the guest run.
        self.vmm.act(Action::HandOver, |machine| Ok(machine.resources().release_images()?))?;
        Ok(())
    }

    fn reacquire_images(&mut self) -> MachineResult<()> {
        // Whoever has them may only be looking: a guest that could run on is worth a moment.
        self.machine.resources().acquire_images_within(IMAGE_PATIENCE, |_| true).map_err(|error| {
            self.stay_paused(|_| Ok(()));
            error.into()
        })
    }

    fn resume(&mut self, state: RunState) -> MachineResult<()> {
        let running = state == RunState::Running;
        let resume = |machine: &Machine| if running { machine.resume() } else { Ok(()) };
        self.vmm.act(Action::TakeBack { running }, resume).inspect_err(|_| {
            self.stay_paused(|machine| machine.pause().map(drop));
        })?;
        Ok(())
    }

    fn is_needed_at_once(&self, block: &RamBlock) -> bool {
        // It becomes a file before the guest runs.
        let resources = self.machine.resources();
        resources.ram().block(&block.name).is_some_and(|block| resources.is_region(block))
    }

    fn finish(&mut self) {
        if let Some(lease) = &mut *lock(&self.lease)
            && let Err(error) = lease.leave()
        {
            // Presence ends with the process at the latest.
            log::warn!("{error}");
        }
        if let Err(error) = self.vmm.act(Action::HandedOver, |_| Ok(())) {
            log::error!("the guest has left, but: {error:#}");
        }
    }
}
