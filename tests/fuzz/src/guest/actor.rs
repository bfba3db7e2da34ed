//! Who is there besides the guest: another actor that writes memory while the controller reads it, the process around the controller, and
//! what keeps its images.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Backend, Error, FaultControl, FaultImage, Identity, IoContext, MemoryImage, Request};
use bus::{GuestMapping, GuestMemory};
use nvme::{Host, Store, StoreError, SubsystemState};
use pci::{MsiMessage, MsixSink};
use vm_memory::{Bytes, GuestAddress};
use vmstate::{Migratability, VmState};

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A write that waits for its moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Poke {
    /// How often the controller calls out before it.
    pub after: u8,
    pub address: u64,
    pub value: u64,
}

/// The second actor. The controller calls out where it submits requests, wakes workers, and signals or masks interrupts, that is between
/// its reads of memory: of the commands of a burst, of the halves of a pair, of doorbells and their shadows.
#[derive(Debug)]
pub struct Actor {
    memory: GuestMemory,
    plan: Mutex<VecDeque<Poke>>,
}

impl Actor {
    pub(super) fn new(memory: GuestMemory) -> Arc<Self> {
        Arc::new(Self { memory, plan: Mutex::default() })
    }

    pub(super) fn plan(&self, poke: Poke) {
        lock(&self.plan).push_back(poke);
    }

    pub(super) fn forget(&self) {
        lock(&self.plan).clear();
    }

    fn called(&self) {
        let mut plan = lock(&self.plan);
        while let Some(poke) = plan.front_mut() {
            let Some(after) = poke.after.checked_sub(1) else {
                // One that is outside of memory is none.
                let _outside = self.memory.write_slice(&poke.value.to_le_bytes(), GuestAddress(poke.address));
                plan.pop_front();
                continue;
            };
            poke.after = after;
            return;
        }
    }
}

/// The process around the controller.
#[derive(Debug)]
pub(super) struct Process {
    actor: Arc<Actor>,
    woken: AtomicU64,
    /// BAR offsets whose writes only wake a worker.
    events: Mutex<BTreeMap<u64, usize>>,
    /// The guest sees the persistent memory region.
    region_is_shown: AtomicBool,
}

impl Process {
    pub fn new(actor: Arc<Actor>) -> Arc<Self> {
        Arc::new(Self {
            actor,
            woken: AtomicU64::new(0),
            events: Mutex::default(),
            region_is_shown: AtomicBool::new(false),
        })
    }

    /// Whether `worker` was woken since the last call.
    pub fn take_woken(&self, worker: usize) -> bool {
        self.woken.fetch_and(!(1 << worker), Ordering::SeqCst) & 1 << worker != 0
    }

    /// The worker that a write to `bar_offset` only wakes.
    pub fn event(&self, bar_offset: u64) -> Option<usize> {
        lock(&self.events).get(&bar_offset).copied()
    }

    /// As [`Host::wake`], by the process itself.
    pub fn note(&self, worker: usize) {
        self.woken.fetch_or(1 << worker, Ordering::SeqCst);
    }
}

impl Host for Process {
    fn wake(&self, worker: usize) {
        self.note(worker);
        self.actor.called();
    }

    fn set_doorbell_event(&self, bar_offset: u64, worker: usize, enabled: bool) {
        self.actor.called();
        let mut events = lock(&self.events);
        if enabled {
            assert!(events.insert(bar_offset, worker).is_none(), "{bar_offset:#x} has an event already");
        } else {
            assert_eq!(events.remove(&bar_offset), Some(worker), "the event of {bar_offset:#x}");
        }
    }

    fn show_region(&self, ready: bool) {
        let before = self.region_is_shown.swap(ready, Ordering::SeqCst);
        assert_ne!(before, ready, "the region is shown or hidden again");
        self.actor.called();
    }

    fn flush_region(&self) -> std::io::Result<()> {
        self.actor.called();
        Ok(())
    }
}

impl MsixSink for Process {
    fn set_vector(&self, _vector: u16, _message: Option<MsiMessage>) {
        self.actor.called();
    }

    fn signal(&self, _vector: u16) {
        self.actor.called();
    }
}

/// An image in memory; the actor is called at each request, before its data move.
#[derive(Debug)]
struct Image {
    inner: MemoryImage,
    actor: Arc<Actor>,
}

impl Backend for Image {
    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn migratability(&self) -> Migratability {
        self.inner.migratability()
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        self.actor.called();
        self.inner.submit(context, request);
    }

    fn sync(&self) -> Result<(), Error> {
        self.inner.sync()
    }

    fn release(&self) -> Result<(), Error> {
        self.inner.release()
    }

    fn acquire(&self) -> Result<(), Error> {
        self.inner.acquire()
    }
}

/// What is left without power, in memory.
#[derive(Debug)]
pub(super) struct Keeper {
    actor: Arc<Actor>,
    /// Faults of all images.
    pub faults: Arc<FaultControl>,
    images: Mutex<BTreeMap<[u8; 16], Arc<dyn Backend>>>,
    written: Mutex<Option<Vec<u8>>>,
}

/// Bytes that the guest's namespaces may have.
const CAPACITY_BYTES: u64 = 256 << 10;

impl Keeper {
    pub fn new(actor: Arc<Actor>) -> Arc<Self> {
        Arc::new(Self { actor, faults: Arc::default(), images: Mutex::default(), written: Mutex::default() })
    }

    /// An image of `bytes` zeroes.
    pub fn image(&self, bytes: u64) -> Arc<dyn Backend> {
        let mapping = GuestMapping::new(bytes as usize).expect("memory for an image");
        let inner = MemoryImage::new(Arc::new(mapping));
        let image = Image { inner, actor: Arc::clone(&self.actor) };
        Arc::new(FaultImage::new(Arc::new(image), Arc::clone(&self.faults)))
    }

    /// The state that was written last.
    pub fn state(&self) -> Option<SubsystemState> {
        let written = lock(&self.written);
        written.as_ref().map(|bytes| {
            vmstate::from_bytes(bytes, SubsystemState::VERSION).expect("a written state can be read")
        })
    }
}

impl Store for Keeper {
    fn capacity_bytes(&self) -> u64 {
        CAPACITY_BYTES
    }

    fn create(&self, uuid: &[u8; 16], size_bytes: u64, _: u32) -> Result<Arc<dyn Backend>, StoreError> {
        assert!(size_bytes <= CAPACITY_BYTES, "{size_bytes} bytes are beyond the quota");
        let image = self.image(size_bytes);
        assert!(lock(&self.images).insert(*uuid, Arc::clone(&image)).is_none(), "a UUID is used again");
        Ok(image)
    }

    fn open(&self, uuid: &[u8; 16], _: u64, _: u32) -> Result<Arc<dyn Backend>, StoreError> {
        Ok(Arc::clone(lock(&self.images).get(uuid).ok_or("there is no such image")?))
    }

    fn remove(&self, uuid: &[u8; 16]) {
        assert!(lock(&self.images).remove(uuid).is_some(), "the image of a namespace is gone");
    }

    fn write(&self, state: &SubsystemState) -> Result<(), StoreError> {
        *lock(&self.written) = Some(vmstate::to_bytes(state));
        Ok(())
    }
}
