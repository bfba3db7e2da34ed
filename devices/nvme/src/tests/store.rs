//! Non-volatile memory of a subsystem, in memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use block::{Backend, Error, FaultControl, FaultImage, Identity, IoContext, Request};
use vmstate::{Migratability, VmState};

use super::driver::{Guest, Interrupts, PATIENCE, Process, contexts, guest_memory, memory_image};
use crate::{
    Controller, ControllerConfig, NamespaceConfig, NvmeState, Store, StoreError, Subsystem, SubsystemState,
};

/// What is left without power.
#[derive(Debug)]
pub struct Memory {
    pub capacity_bytes: u64,
    /// Faults of all images.
    pub faults: Arc<FaultControl>,
    images: Mutex<BTreeMap<[u8; 16], Arc<Image>>>,
    written: Mutex<Option<Vec<u8>>>,
    /// Makes every write of the state fail.
    pub breaks: AtomicBool,
    pub writes: AtomicU64,
}

/// An image that knows whether it may still be touched.
#[derive(Debug)]
struct Image {
    inner: Arc<dyn Backend>,
    removed: AtomicBool,
}

impl Backend for Image {
    fn identity(&self) -> Identity {
        self.inner.identity()
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        assert!(!self.removed.load(Ordering::SeqCst), "a deleted image is touched");
        self.inner.submit(context, request);
    }

    fn migratability(&self) -> Migratability {
        self.inner.migratability()
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

impl Memory {
    pub fn new(capacity_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            capacity_bytes,
            faults: Arc::default(),
            images: Mutex::default(),
            written: Mutex::default(),
            breaks: AtomicBool::default(),
            writes: AtomicU64::default(),
        })
    }

    /// The state that was written last.
    pub fn state(&self) -> Option<SubsystemState> {
        let written = self.written.lock().unwrap();
        written.as_ref().map(|bytes| vmstate::from_bytes(bytes, SubsystemState::VERSION).unwrap())
    }

    /// Makes `state` what was written last, as if nothing had been since.
    pub fn put(&self, state: Option<SubsystemState>) {
        *self.written.lock().unwrap() = state.as_ref().map(vmstate::to_bytes);
    }

    pub fn images(&self) -> usize {
        self.images.lock().unwrap().len()
    }

    /// Loses all images.
    pub fn lose_images(&self) {
        self.images.lock().unwrap().clear();
    }
}

impl Store for Memory {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn create(&self, uuid: &[u8; 16], size_bytes: u64, _: u32) -> Result<Arc<dyn Backend>, StoreError> {
        let image =
            Arc::new(Image { inner: memory_image(size_bytes as usize), removed: AtomicBool::default() });
        assert!(
            self.images.lock().unwrap().insert(*uuid, Arc::clone(&image)).is_none(),
            "a UUID is used again"
        );
        Ok(Arc::new(FaultImage::new(image, Arc::clone(&self.faults))))
    }

    fn open(&self, uuid: &[u8; 16], size_bytes: u64, _: u32) -> Result<Arc<dyn Backend>, StoreError> {
        let images = self.images.lock().unwrap();
        let image = images.get(uuid).ok_or("there is no such image")?;
        if image.identity().capacity_bytes != size_bytes {
            return Err("it has another size".into());
        }
        Ok(Arc::new(FaultImage::new(Arc::clone(image) as _, Arc::clone(&self.faults))))
    }

    fn remove(&self, uuid: &[u8; 16]) {
        let image = self.images.lock().unwrap().remove(uuid);
        image.expect("an image of this store").removed.store(true, Ordering::SeqCst);
    }

    fn write(&self, state: &SubsystemState) -> Result<(), StoreError> {
        if self.breaks.load(Ordering::SeqCst) {
            return Err("the memory is broken".into());
        }
        self.writes.fetch_add(1, Ordering::SeqCst);
        *self.written.lock().unwrap() = Some(vmstate::to_bytes(state));
        Ok(())
    }
}

/// A guest whose controller is number 0 of `subsystem`.
pub fn guest_in(
    subsystem: &Arc<Subsystem>,
    config: &ControllerConfig,
    namespaces: &[NamespaceConfig],
) -> Guest {
    let mut guest = controller_in(subsystem, 0, config);
    guest.namespaces = namespaces.to_vec();
    guest
}

/// A guest whose controller is number `id` of `subsystem`.
pub fn controller_in(subsystem: &Arc<Subsystem>, id: u16, config: &ControllerConfig) -> Guest {
    let memory = guest_memory();
    let (contexts, events) = contexts(&memory, 2, 64);
    let (process, interrupts) = (Arc::new(Process::default()), Arc::new(Interrupts::default()));
    let controller = Controller::join(
        subsystem,
        id,
        config.clone(),
        memory.clone(),
        contexts,
        Arc::clone(&interrupts) as _,
        Arc::clone(&process) as _,
    );
    let mut guest = Guest::around(config.clone(), Vec::new(), memory, Arc::new(controller.unwrap()));
    (guest.process, guest.interrupts, guest.events) = (process, interrupts, events);
    guest
}

/// A guest that can manage its namespaces, ready.
pub fn managed(config: &ControllerConfig, namespaces: &[NamespaceConfig], store: &Arc<Memory>) -> Guest {
    let subsystem =
        Subsystem::with_store(&config.serial, namespaces, false, Arc::clone(store) as _, store.state())
            .unwrap();
    let mut guest = guest_in(&subsystem, config, namespaces);
    guest.enable();
    guest
}

/// As [`Guest::migrate`], to a subsystem with `store`, which the source's store is shared as or a copy of.
pub fn migrate_managed(guest: &mut Guest, store: &Arc<Memory>) -> Result<(), crate::Error> {
    guest.controller.pause(Instant::now() + PATIENCE).unwrap();
    let state = guest.controller.save();
    let bytes = vmstate::to_bytes(&state);
    let loaded = vmstate::from_bytes::<NvmeState>(&bytes, NvmeState::VERSION).unwrap();
    assert_eq!(loaded, state);
    let (serial, namespaces) = (&guest.config.serial, &guest.namespaces);
    let subsystem =
        Subsystem::with_store(serial, namespaces, false, Arc::clone(store) as _, store.state()).unwrap();
    let (contexts, events) = contexts(&guest.memory, 2, 64);
    let (process, interrupts) = (Arc::new(Process::default()), Arc::new(Interrupts::default()));
    let restored = Controller::join(
        &subsystem,
        0,
        guest.config.clone(),
        guest.memory.clone(),
        contexts,
        Arc::clone(&interrupts) as _,
        Arc::clone(&process) as _,
    )
    .unwrap();
    restored.load(&loaded)?;
    assert!(restored.save() == state, "what was restored saves the same");
    restored.resume();
    (guest.process, guest.interrupts, guest.events) = (process, interrupts, events);
    guest.controller = Arc::new(restored);
    Ok(())
}
