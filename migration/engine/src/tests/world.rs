//! A world with a guest, an image and a lease, in which two machines must never run at once.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::missing::MockMemory;
use crate::MachineResult;
use crate::lease::{Lease, Owner};

/// What all processes share.
#[derive(Clone, Debug)]
pub struct World {
    state: Arc<Mutex<WorldState>>,
    folder: Arc<tempfile::TempDir>,
}

#[derive(Debug, Default)]
pub struct WorldState {
    /// Who runs the guest, by name.
    running: Vec<String>,
    /// Who holds the image lock.
    image: Option<String>,
    /// What went wrong that must never.
    violations: Vec<String>,
    /// What happened, in order.
    log: Vec<String>,
    /// What is in the lease while it cannot be read.
    lease: Vec<u8>,
    /// Properties that every machine has beside those of a small one.
    more_properties: u32,
    /// Nothing is shared: each host has images of its own, and no lock of them is the other's.
    images_of_each: bool,
    /// After so many faults of a guest that lacks memory nobody hears of more.
    pub faults_before_silence: Option<u64>,
    /// See [`World::enlarge_pages`].
    pub larger_pages: Option<u64>,
    /// See [`World::fail_a_completion_after`].
    pub completions_before_failure: Option<u64>,
    /// So many pages of a destination's fresh memory can be filled.
    pub fills_before_failure: Option<u64>,
    /// A guest that lacks memory touches none before it is woken.
    pub sleeps: bool,
    /// Memory that followed a guest.
    pub missing: Option<Arc<MockMemory>>,
}

impl World {
    pub fn new() -> Self {
        Self { state: Arc::default(), folder: Arc::new(tempfile::tempdir().unwrap()) }
    }

    /// The same, of hosts that share nothing.
    pub fn with_images_of_each() -> Self {
        let world = Self::new();
        world.lock().images_of_each = true;
        world
    }

    pub fn lock(&self) -> MutexGuard<'_, WorldState> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn lease_path(&self) -> PathBuf {
        self.folder.path().join("lease")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn lease(&self, vm: &str) -> Lease {
        Lease::open(&self.lease_path(), Owner::this_process(vm).unwrap()).unwrap()
    }

    pub fn running(&self) -> Vec<String> {
        self.lock().running.clone()
    }

    pub fn image_holder(&self) -> Option<String> {
        self.lock().image.clone()
    }

    pub fn log(&self) -> Vec<String> {
        self.lock().log.clone()
    }

    pub fn assert_sound(&self, what: &str) {
        let state = self.lock();
        assert!(state.violations.is_empty(), "{what}: {:?}\n{:#?}", state.violations, state.log);
    }

    /// Nobody can read or write the lease from now on.
    pub fn lose_lease(&self) {
        let bytes = std::fs::read(self.lease_path()).unwrap();
        std::fs::write(self.lease_path(), "this is no lease").unwrap();
        self.lock().lease = bytes;
    }

    /// It says what it said.
    pub fn find_lease(&self) {
        std::fs::write(self.lease_path(), &self.lock().lease).unwrap();
    }

    /// All machines are large ones from now on.
    pub fn enlarge_machines(&self, properties: u32) {
        self.lock().more_properties = properties;
    }

    pub fn more_properties(&self) -> u32 {
        self.lock().more_properties
    }

    pub fn note(&self, name: &str, what: &str) {
        self.lock().log.push(format!("{name}: {what}"));
    }

    pub fn run(&self, name: &str) {
        let mut state = self.lock();
        state.log.push(format!("{name}: runs"));
        if let Some(other) = state.running.iter().find(|other| *other != name) {
            let violation = format!("{name} starts while {other} runs");
            state.violations.push(violation);
        }
        if state.image.as_deref() != Some(name) && !state.images_of_each {
            let violation = format!("{name} starts while the image is held by {:?}", state.image);
            state.violations.push(violation);
        }
        state.running.retain(|other| other != name);
        state.running.push(name.to_owned());
    }

    pub fn violate(&self, violation: String) {
        self.lock().violations.push(violation);
    }

    pub fn halt(&self, name: &str) {
        self.lock().running.retain(|other| other != name);
    }

    pub fn take_image(&self, name: &str) -> MachineResult<()> {
        let mut state = self.lock();
        match &state.image {
            Some(holder) if holder != name && !state.images_of_each => {
                Err(format!("the image is locked by {holder}").into())
            }
            _ => {
                state.image = Some(name.to_owned());
                Ok(())
            }
        }
    }

    pub fn release_image(&self, name: &str) {
        let mut state = self.lock();
        if state.image.as_deref() == Some(name) {
            state.image = None;
        }
    }
}
