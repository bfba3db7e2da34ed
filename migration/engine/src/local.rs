//! Local handover: the guest's memory itself goes to a process of the same host, and so do the files of its images. Nothing is copied.
//!
//! ```text
//! source                                       destination
//!   hello {LOCAL, IMAGE_FILES}  ------------>  did the token arrive?
//!     + a token                 <------------  agree {LOCAL, IMAGE_FILES}
//!   MEMORY {names, lengths} + descriptors ---> checks each, maps it read-only in the place of its own
//!                               <------------  MAPPED
//!   IMAGE FILES {names, more?} + descriptors > are they the files that its own names lead to?   (again, while there are more)
//!                               <------------  IDENTIFIED
//!   writes back the images' caches, stops, sends the devices and PREPARE, offers: as ever, without rounds
//!   COMMIT + descriptors that can write ---->  under the record lock: are they the same? maps them, still read-only
//!                                              lease := taken, and only then writable
//!                               <------------  RUNNING
//! ```
//!
//! *When.* If the user asks for it, over any link that can carry descriptors, if both sides can. Not by itself: limits of bandwidth and
//! downtime, and whatever else a user says of a copy, would quietly mean nothing, and the memory goes on to be charged to the control
//! group of the process that made it. A Unix socket can carry descriptors, but whoever stands in between (a tunnel to another host, say) does not; so the hello has a descriptor of no use beside it, and
//! a destination that does not find it grants nothing: contents are then sent, as to a process of an older version. Version
//! and build of the two need not be equal: what is in the devices goes as sections, checked as ever.
//!
//! *Who may write.* One memory and two processes: what keeps them apart is the lease, as ever, and no lock on a descriptor, which
//! both would hold. Until COMMIT the destination has descriptors that cannot write, so that whatever goes wrong there, the guest
//! goes on in memory that is as the source left it. With COMMIT come those that can; they are mapped under the record lock, when the
//! offer was checked and the source neither writes nor settles, since what can fail has to fail before the record says `taken`; but
//! the mapping stays read-only until it does. The source writes nothing after `offered`: its vCPUs and devices stand still, and
//! it lets go of its own mappings at RUNNING.
//!
//! *Images* go as descriptors that only say which files they are ([`images`]): each side opens them anew, for itself and with locks of its
//! own, the destination when the record lock is held and the guest is offered. A lock belongs to the open file, which a passed
//! descriptor would share, so that one side's lock would be the other's too.
//!
//! *Bounds.* A message carries at most [`DESCRIPTORS_MAX`] descriptors, and a machine with more blocks is copied. They are taken
//! from the four messages that may have some; from all others the kernel drops them.

pub(crate) mod images;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use transport::DESCRIPTORS_MAX;

use crate::link::{Link, Step};
use crate::protocol::{MemoryBlocks, Message};
use crate::source::{Context, unexpected};
use crate::{DestinationMachine, Error, MemoryDescriptors, RamBlock, SourceMachine, features};
use images::Images;

/// What a source hands over: one descriptor of each kind for each of its blocks.
#[derive(Debug)]
pub(crate) struct Memory {
    token: OwnedFd,
    blocks: MemoryBlocks,
    readable: Vec<OwnedFd>,
    writable: Vec<OwnedFd>,
    images: Images,
}

impl Memory {
    /// What `machine` can hand over through `link`, if that is what the user wants. Whatever is in the way of it, a copy can be made.
    pub fn to_offer(machine: &mut dyn SourceMachine, link: &Link, context: &Context<'_>) -> Option<Self> {
        if !context.parameters.local() {
            return None;
        }
        let ram = machine.ram_blocks();
        if !link.passes_descriptors() || ram.len() > DESCRIPTORS_MAX {
            log::warn!("{} cannot get guest memory itself: its contents are sent instead", link.peer());
            return None;
        }
        let descriptors = match machine.memory_descriptors() {
            Ok(descriptors) => descriptors?,
            Err(error) => {
                let error = Error::machine("pass guest memory on")(error);
                log::warn!("{}: its contents are sent instead", error.chain());
                return None;
            }
        };
        let token = eventfd(0, EventfdFlags::CLOEXEC).ok()?;
        let (readable, writable): (Vec<_>, Vec<_>) = descriptors
            .into_iter()
            .map(|MemoryDescriptors { readable, writable }| (readable, writable))
            .unzip();
        let complete = ram.len() == readable.len();
        let blocks = MemoryBlocks::new(&ram);
        complete.then(|| Self { token, blocks, readable, writable, images: Images::of(machine) })
    }

    /// What the hello offers.
    pub fn features(&self) -> u64 {
        if self.images.is_empty() { features::LOCAL } else { features::LOCAL | features::IMAGE_FILES }
    }

    /// What is left of it for a destination that grants these features.
    pub fn granted(mut self, granted: u64) -> Option<Self> {
        if granted & features::IMAGE_FILES == 0 {
            self.images = Images::default();
        }
        (granted & features::LOCAL != 0).then_some(self)
    }

    /// What goes with the hello.
    pub fn token(&self) -> &OwnedFd {
        &self.token
    }

    /// Lets the destination map everything, and identify the images, while the guest runs. How much is mapped.
    pub fn pass(&self, link: &mut Link, context: &Context<'_>) -> Result<u64, Error> {
        let patience = context.patience.silence;
        let step = |doing| Step { doing, patience, cancel: Some(context.parameters), until: None };
        link.send_with(&Message::Memory(self.blocks.clone()), &self.readable, step("passing guest memory"))?;
        let doing = "waiting for the destination to map guest memory";
        match link.receive(step(doing))? {
            Message::Mapped => {}
            other => return Err(unexpected(other, doing)),
        }
        self.images.pass(link, step)?;
        Ok(self.blocks.iter().map(|(_, length_bytes)| length_bytes).sum())
    }

    /// What goes with COMMIT.
    pub fn into_writable(self) -> Vec<OwnedFd> {
        self.writable
    }
}

/// Whether what came with a hello says that descriptors arrive.
pub(crate) fn has_token(descriptors: &[OwnedFd]) -> bool {
    !descriptors.is_empty()
}

/// What a destination has mapped: where the source's descriptors belong.
#[derive(Debug)]
pub(crate) struct Mapped {
    /// For each of this machine's blocks, its place among the source's.
    order: Vec<usize>,
    /// How much that is.
    pub bytes: u64,
}

impl Mapped {
    /// Takes the memory that the source passes, and maps it for reading.
    pub fn receive(
        machine: &mut dyn DestinationMachine,
        link: &mut Link,
        step: Step<'_>,
        unexpected: fn(Message, &'static str) -> Error,
    ) -> Result<Self, Error> {
        let doing = step.doing;
        let (message, descriptors) = link.receive_with(DESCRIPTORS_MAX, step)?;
        let Message::Memory(blocks) = message else { return Err(unexpected(message, doing)) };
        let blocks: Vec<_> = blocks.iter().collect();
        let order =
            places(&machine.ram_blocks(), &blocks).map_err(|reason| Error::Protocol { doing, reason })?;
        let mapped = Self { order, bytes: blocks.iter().map(|(_, length_bytes)| length_bytes).sum() };
        let descriptors = mapped.in_order(descriptors).map_err(|reason| Error::Protocol { doing, reason })?;
        machine.map_memory(descriptors).map_err(Error::machine("map the memory that was passed"))?;
        link.send(&Message::Mapped, Step { doing: "saying that guest memory is mapped", ..step })?;
        Ok(mapped)
    }

    /// Under the record lock, which offers us the guest: takes the descriptors that can write, and writes nothing.
    pub fn adopt(
        &self,
        machine: &mut dyn DestinationMachine,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), String> {
        let descriptors = self.in_order(descriptors)?;
        machine
            .adopt_memory(descriptors)
            .map_err(|source| Error::Machine { doing: "take the memory over", source }.chain())
    }

    /// One for each block of this machine.
    fn in_order(&self, descriptors: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, String> {
        let (came, wanted) = (descriptors.len(), self.order.len());
        let mut places: Vec<_> = descriptors.into_iter().map(Some).collect();
        let take = |place: &usize| places.get_mut(*place).and_then(Option::take);
        let ordered: Option<Vec<_>> = self.order.iter().map(take).collect();
        match ordered {
            Some(descriptors) if came == wanted => Ok(descriptors),
            _ => Err(format!("{came} descriptors of memory came for {wanted} blocks")),
        }
    }
}

/// For each block of `ours` its place among `theirs`, which are the same by name and length.
fn places(ours: &[RamBlock], theirs: &[(String, u64)]) -> Result<Vec<usize>, String> {
    if theirs.len() != ours.len() {
        return Err(format!("{} blocks of memory came, this machine has {}", theirs.len(), ours.len()));
    }
    let place = |block: &RamBlock| {
        let (name, length_bytes) = (&block.name, block.length_bytes());
        let place = theirs.iter().position(|(other, _)| other == name);
        let place = place.ok_or_else(|| format!("no memory came for block {name:?}"))?;
        match theirs.get(place) {
            Some((_, came_bytes)) if *came_bytes != length_bytes => {
                Err(format!("memory block {name:?} has {length_bytes} bytes here, {came_bytes} came"))
            }
            _ => Ok(place),
        }
    };
    ours.iter().map(place).collect()
}

/// What [`Link::send_with`] takes.
pub(crate) fn borrowed(descriptors: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}

/// How often the stop is prepared at most.
const PREPARATIONS_MAX: u32 = 3;
/// A preparation that was so short leaves the stop nothing to wait for.
const SHORT: Duration = Duration::from_millis(5);

/// Calls `prepare`, which takes the longer the more there is to be done, until little is left: there are no rounds that would show
/// when the guest is to stop.
pub(crate) fn prepare_until_little_is_left(mut prepare: impl FnMut()) {
    for _ in 0..PREPARATIONS_MAX {
        let begun = Instant::now();
        prepare();
        if begun.elapsed() <= SHORT {
            return;
        }
    }
}
