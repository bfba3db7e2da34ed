//! What a virtual machine keeps over a reset of its guest: memory, images, and the processor that a guest came with.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use block::{Backend, FileImage, FileOptions, MemoryImage, NullImage, Qcow2Image};
use nvme::{MetadataConfig, NamespaceConfig, Subsystem};

use crate::config::{BackendSpec, ControllerSpec, MachineSpec, NamespaceSpec, SubsystemSpec};
use crate::memory::{GuestRam, RamBlock};
use crate::subsystem::{Directory, Region};
use crate::vcpu::CpuidLeaf;

use super::waiters::Waiters;

/// Between two tries at an image that is locked.
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// Memory and images of one virtual machine.
///
/// Images are opened to be looked at only; they are locked and written to from [`Resources::acquire_images`] to
/// [`Resources::release_images`].
pub struct Resources {
    ram: GuestRam,
    /// For each controller of the specification, in its order.
    disks: Vec<Nvm>,
    /// Names of the blocks of controller memory buffers, by controller.
    buffers: Vec<Option<String>>,
    /// Persistent memory regions, by controller.
    regions: Vec<Option<Arc<Region>>>,
    /// What CPUID says on each vCPU of a guest that came from elsewhere.
    seen_cpuid: Mutex<Option<Vec<Vec<CpuidLeaf>>>>,
    waiters: Arc<Waiters>,
}

/// What a controller keeps over a reset of the guest.
pub struct Nvm {
    /// Its namespaces.
    pub subsystem: Arc<Subsystem>,
    /// What it is in there.
    pub controller_id: u16,
    /// Where its subsystem keeps what outlives the power.
    pub directory: Option<Arc<Directory>>,
}

impl Nvm {
    /// Whether it is the first controller of its subsystem: what the subsystem has is looked at with this one.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.controller_id == 0
    }
}

impl Resources {
    /// Makes the memory and looks at the images; `arrives` says that a guest is to come which has them already.
    ///
    /// # Errors
    /// There is not enough memory, or an image is missing or cannot hold its namespace.
    pub fn open(spec: &MachineSpec, arrives: bool) -> anyhow::Result<Self> {
        Self::open_with(spec, arrives, &|image| image)
    }

    /// As [`Resources::open`], with what `wrap` makes of every image of the host's.
    ///
    /// # Errors
    /// As [`Resources::open`].
    pub(crate) fn open_with(
        spec: &MachineSpec,
        arrives: bool,
        wrap: &dyn Fn(Arc<dyn Backend>) -> Arc<dyn Backend>,
    ) -> anyhow::Result<Self> {
        let blocks: Vec<(String, u64)> = spec
            .controllers
            .iter()
            .flat_map(|controller| {
                controller.namespaces.iter().map(|namespace| (&controller.serial, namespace))
            })
            .filter_map(|(serial, namespace)| match namespace.backend {
                BackendSpec::Memory { size_bytes } => {
                    Some((memory_block_name(serial, namespace.nsid), size_bytes))
                }
                BackendSpec::File(_)
                | BackendSpec::Qcow2(_)
                | BackendSpec::Overlay { .. }
                | BackendSpec::Null { .. } => None,
            })
            .collect();
        refuse_shared_images(spec)?;
        let buffer = |controller: &ControllerSpec| {
            (controller.buffer_bytes > 0)
                .then(|| (buffer_block_name(&controller.serial), controller.buffer_bytes))
        };
        let buffers: Vec<_> = spec.controllers.iter().map(buffer).collect();
        let region = |controller: &ControllerSpec| {
            (controller.region_bytes > 0)
                .then(|| (region_block_name(&controller.serial), controller.region_bytes))
        };
        let regions: Vec<_> = spec.controllers.iter().map(region).collect();
        let buffer_blocks: Vec<_> = buffers.iter().chain(&regions).flatten().cloned().collect();
        let ram = GuestRam::with_pages(spec.memory_bytes, spec.hugepages, &blocks, &buffer_blocks)?;
        let mut disks: Vec<Nvm> = Vec::with_capacity(spec.controllers.len());
        for controller in &spec.controllers {
            let first =
                spec.controllers.iter().position(|other| other.serial == controller.first_of_subsystem());
            let disk = match first.and_then(|first| disks.get(first)) {
                Some(Nvm { subsystem, directory, .. }) => Nvm {
                    subsystem: Arc::clone(subsystem),
                    controller_id: place_in_subsystem(spec, controller)?,
                    directory: directory.clone(),
                },
                None => open_nvm(spec, controller, &ram, arrives, wrap)?,
            };
            disks.push(disk);
        }
        let region = |(named, disk): (Option<(String, u64)>, &Nvm)| {
            let Some(block) = named.and_then(|(name, _)| ram.block(&name).cloned()) else { return Ok(None) };
            Ok(Some(Arc::new(Region::new(block, disk.directory.clone(), disk.controller_id)?)))
        };
        let regions = regions.into_iter().zip(&disks).map(region).collect::<anyhow::Result<_>>()?;
        let buffers = buffers.into_iter().map(|buffer| buffer.map(|(name, _)| name)).collect();
        Ok(Self { ram, disks, buffers, regions, seen_cpuid: Mutex::default(), waiters: Arc::default() })
    }

    /// What CPUID says on each vCPU, if the guest came from elsewhere with it.
    #[must_use]
    pub fn seen_cpuid(&self) -> Option<Vec<Vec<CpuidLeaf>>> {
        self.seen_cpuid.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps what CPUID says on each vCPU of a guest that came.
    pub fn keep_cpuid(&self, tables: Vec<Vec<CpuidLeaf>>) {
        *self.seen_cpuid.lock().unwrap_or_else(PoisonError::into_inner) = Some(tables);
    }

    /// Who waits for memory that is not here yet.
    #[must_use]
    pub fn waiters(&self) -> &Arc<Waiters> {
        &self.waiters
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What each controller keeps, in the order of the specification.
    #[must_use]
    pub fn disks(&self) -> &[Nvm] {
        &self.disks
    }

    /// The memory buffer of controller `index`, if it has one.
    #[must_use]
    pub fn buffer(&self, index: usize) -> Option<&RamBlock> {
        self.ram.block(self.buffers.get(index)?.as_deref()?)
    }

    /// The persistent memory region of controller `index`, if it has one.
    #[must_use]
    pub fn region(&self, index: usize) -> Option<&Arc<Region>> {
        self.regions.get(index)?.as_ref()
    }

    /// Whether the block is a persistent memory region.
    #[must_use]
    pub fn is_region(&self, block: &RamBlock) -> bool {
        self.regions().any(|region| region.block().name == block.name)
    }

    pub(super) fn regions(&self) -> impl Iterator<Item = &Arc<Region>> {
        self.regions.iter().flatten()
    }

    /// Makes memory that was handed over writable, and the memory of every region its file: done before the guest runs, which is ours.
    /// Harmless if it is done.
    ///
    /// # Errors
    /// One cannot be had; says which.
    pub fn attach_regions(&self) -> Result<(), crate::subsystem::Error> {
        self.ram.make_writable()?;
        self.regions().try_for_each(|region| region.attach())
    }

    /// Makes what is in the regions durable.
    ///
    /// # Errors
    /// Something may be lost.
    pub fn sync_regions(&self) -> Result<(), block::Error> {
        let sync = |region: &Arc<Region>| {
            region
                .flush()
                .map_err(|source| block::Error::Flush { path: region.block().name.clone().into(), source })
        };
        self.regions.iter().flatten().try_for_each(sync)
    }

    /// Takes lock and access of every folder and image, in the fixed order (controllers as declared, its folder, namespaces by
    /// identifier): all or none. Harmless for those that are held.
    ///
    /// # Errors
    /// Someone else holds one, or it is not what it was.
    pub fn acquire_images(&self) -> Result<(), block::Error> {
        let mut taken = Vec::new();
        for holding in self.holdings() {
            if let Err(error) = holding.acquire() {
                for holding in &taken {
                    // Nothing was written, so nothing can be lost.
                    let _ = Holding::release(holding);
                }
                return Err(error);
            }
            taken.push(holding);
        }
        Ok(())
    }

    /// As [`Resources::acquire_images`], and tries again for `patience` while `wait` says so to the refusal.
    ///
    /// # Errors
    /// As [`Resources::acquire_images`].
    pub fn acquire_images_within(
        &self,
        patience: Duration,
        wait: impl FnMut(&block::Error) -> bool,
    ) -> Result<(), block::Error> {
        try_while_locked(patience, wait, || self.acquire_images())
    }

    /// Makes every acknowledged write stable; the images stay held.
    ///
    /// # Errors
    /// A flush failed.
    pub fn sync_images(&self) -> Result<(), block::Error> {
        self.sync_regions()?;
        self.images().try_for_each(|image| image.sync())
    }

    /// Gives up every image, in the fixed order.
    ///
    /// # Errors
    /// A flush failed; that image and those after it are still held.
    pub fn release_images(&self) -> Result<(), block::Error> {
        self.sync_regions()?;
        self.holdings().try_for_each(|holding| holding.release())
    }

    fn images(&self) -> impl Iterator<Item = Arc<dyn Backend>> {
        self.disks
            .iter()
            .filter(|disk| disk.is_first())
            .flat_map(|disk| disk.subsystem.images())
            .map(|(_, image)| image)
    }

    fn holdings(&self) -> impl Iterator<Item = Holding> {
        self.disks.iter().filter(|disk| disk.is_first()).flat_map(|disk| {
            let images = disk.subsystem.images().into_iter().map(|(_, image)| Holding::Image(image));
            disk.directory.iter().cloned().map(Holding::Directory).chain(images)
        })
    }
}

/// What has a lock.
enum Holding {
    Directory(Arc<Directory>),
    Image(Arc<dyn Backend>),
}

impl Holding {
    fn acquire(&self) -> Result<(), block::Error> {
        match self {
            Self::Directory(directory) => directory.acquire(),
            Self::Image(image) => image.acquire(),
        }
    }

    fn release(&self) -> Result<(), block::Error> {
        match self {
            Self::Directory(directory) => directory.release(),
            Self::Image(image) => image.release(),
        }
    }
}

/// The identifier of a controller: its place among those of its subsystem.
fn place_in_subsystem(spec: &MachineSpec, controller: &ControllerSpec) -> anyhow::Result<u16> {
    let first = controller.first_of_subsystem();
    let mut members = spec.controllers.iter().filter(|other| other.first_of_subsystem() == first);
    let place = members.position(|other| other.serial == controller.serial);
    Ok(u16::try_from(place.context("a controller is one of its subsystem")?)?)
}

/// Identifiers of the controllers with these serials.
fn controller_ids(spec: &MachineSpec, serials: &[String]) -> anyhow::Result<Vec<u16>> {
    let id = |serial: &String| {
        let controller = spec.controllers.iter().find(|controller| controller.serial == *serial);
        place_in_subsystem(spec, controller.with_context(|| format!("there is no controller {serial:?}"))?)
    };
    serials.iter().map(id).collect()
}

/// The subsystem of its first controller.
fn open_nvm(
    machine: &MachineSpec,
    spec: &ControllerSpec,
    ram: &GuestRam,
    arrives: bool,
    wrap: &dyn Fn(Arc<dyn Backend>) -> Arc<dyn Backend>,
) -> anyhow::Result<Nvm> {
    let serial = &spec.serial;
    let open = |namespace| {
        let config = open_namespace(serial, namespace, ram)?;
        Ok(NamespaceConfig { backend: wrap(config.backend), ..config })
    };
    let namespaces: Vec<NamespaceConfig> = spec.namespaces.iter().map(open).collect::<anyhow::Result<_>>()?;
    let members = machine.controllers.iter().filter(|other| other.first_of_subsystem() == serial);
    let shared = members.count() > 1;
    let offer = |subsystem: Arc<Subsystem>| -> anyhow::Result<Arc<Subsystem>> {
        for namespace in spec.namespaces.iter().filter(|namespace| !namespace.attached.is_empty()) {
            subsystem.attach_at_first(namespace.nsid, controller_ids(machine, &namespace.attached)?);
        }
        Ok(subsystem)
    };
    let Some(SubsystemSpec { directory, capacity_bytes }) = &spec.subsystem else {
        let subsystem = offer(Subsystem::new(serial, &namespaces, shared)?)?;
        return Ok(Nvm { subsystem, controller_id: 0, directory: None });
    };
    let directory = Directory::open(directory, serial, *capacity_bytes, arrives)
        .with_context(|| format!("cannot use {} as the subsystem of {serial}", directory.display()))?;
    let directory = Arc::new(directory);
    let state = directory.state();
    let subsystem = Subsystem::with_store(serial, &namespaces, shared, Arc::clone(&directory) as _, state)?;
    Ok(Nvm { subsystem: offer(subsystem)?, controller_id: 0, directory: Some(directory) })
}

/// Refuses an image that two namespaces would hold, one of them to write: its lock would keep this very machine out.
fn refuse_shared_images(spec: &MachineSpec) -> anyhow::Result<()> {
    let mut seen: Vec<((u64, u64), &Path, bool)> = Vec::new();
    let namespaces = spec.controllers.iter().flat_map(|controller| &controller.namespaces);
    let files = namespaces.flat_map(|namespace| {
        let base = match &namespace.backend {
            BackendSpec::Overlay { base, .. } => Some((base.path.as_path(), true)),
            _ => None,
        };
        namespace.backend.path().map(|path| (path, namespace.read_only)).into_iter().chain(base)
    });
    for (path, read_only) in files {
        // One that cannot be looked at is told of when it is opened.
        let Ok(found) = std::fs::metadata(path) else { continue };
        let file = (found.dev(), found.ino());
        let shared = seen.iter().find(|(other, _, read_too)| *other == file && !(*read_too && read_only));
        if let Some((_, other, _)) = shared {
            bail!(
                "{} and {} are one image: two namespaces can share it only if both are ro, or overlays over it",
                other.display(),
                path.display()
            );
        }
        seen.push((file, path, read_only));
    }
    Ok(())
}

fn buffer_block_name(serial: &str) -> String {
    format!("nvme/{serial}/cmb")
}

fn region_block_name(serial: &str) -> String {
    format!("nvme/{serial}/pmr")
}

/// Name of the RAM block that holds a memory namespace.
fn memory_block_name(serial: &str, nsid: u32) -> String {
    format!("namespace-{serial}-{nsid}")
}

pub(super) fn open_namespace(
    serial: &str,
    spec: &NamespaceSpec,
    ram: &GuestRam,
) -> anyhow::Result<NamespaceConfig> {
    let NamespaceSpec { nsid, block_bytes, read_only, buffered, metadata, .. } = *spec;
    let backend: Arc<dyn Backend> = match &spec.backend {
        BackendSpec::File(path) => {
            let options = FileOptions { read_only, direct: !buffered, block_size_bytes: block_bytes };
            let image = FileImage::inspect(path, options)
                .with_context(|| format!("cannot use {} as namespace {nsid} of {serial}", path.display()))?;
            Arc::new(image)
        }
        BackendSpec::Qcow2(path) => {
            let image = Qcow2Image::inspect(path, read_only)
                .with_context(|| format!("cannot use {} as namespace {nsid} of {serial}", path.display()))?;
            Arc::new(image)
        }
        BackendSpec::Overlay { path, base } => {
            let image = Qcow2Image::inspect_over(path, base.clone(), read_only)
                .with_context(|| format!("cannot use {} as namespace {nsid} of {serial}", path.display()))?;
            Arc::new(image)
        }
        BackendSpec::Memory { .. } => {
            let name = memory_block_name(serial, nsid);
            let block = ram.block(&name).with_context(|| format!("there is no RAM block {name}"))?;
            let image = MemoryImage::new(Arc::clone(&block.mapping));
            Arc::new(if read_only { image.read_only() } else { image })
        }
        BackendSpec::Null { size_bytes } => {
            let image = NullImage::new(*size_bytes);
            Arc::new(if read_only { image.read_only() } else { image })
        }
    };
    let metadata = metadata.map(|metadata| MetadataConfig {
        bytes: metadata.bytes,
        extended: metadata.extended,
        protection_type: metadata.protection_type,
        protection_first: metadata.protection_first,
    });
    Ok(NamespaceConfig { nsid, block_bytes, metadata, backend })
}

/// The first image that is a file and may be written: the lease lies beside it.
#[must_use]
pub fn first_writable_file(controllers: &[ControllerSpec]) -> Option<&Path> {
    let namespaces = controllers.iter().flat_map(|controller| &controller.namespaces);
    namespaces.filter(|namespace| !namespace.read_only).find_map(|namespace| namespace.backend.path())
}

/// Does `attempt`, and tries again for `patience` what a lock of someone else refuses, while `wait` says so to the refusal.
///
/// # Errors
/// Those of the last attempt.
pub fn try_while_locked<T>(
    patience: Duration,
    mut wait: impl FnMut(&block::Error) -> bool,
    mut attempt: impl FnMut() -> Result<T, block::Error>,
) -> Result<T, block::Error> {
    let deadline = Instant::now() + patience;
    loop {
        let error = match attempt() {
            Err(error @ block::Error::Locked { .. }) => error,
            result => return result,
        };
        if Instant::now() > deadline || !wait(&error) {
            return Err(error);
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn locked() -> block::Error {
        block::Error::Locked { path: "an image".into(), access: "writing" }
    }

    #[test]
    fn only_what_is_locked_is_tried_again_and_only_as_long_as_that_may_help() {
        let (mut attempts, mut asked) = (0, 0);
        let taken = try_while_locked(
            LONG,
            |_| {
                asked += 1;
                true
            },
            || {
                attempts += 1;
                if attempts < 3 { Err(locked()) } else { Ok(attempts) }
            },
        );
        assert_eq!((taken.unwrap(), asked), (3, 2));

        let mut attempts = 0;
        let mut refused = |wait: bool, patience, error: fn() -> block::Error| {
            attempts = 0;
            let attempt = || {
                attempts += 1;
                Err::<(), _>(error())
            };
            try_while_locked(patience, |_| wait, attempt).unwrap_err();
            attempts
        };
        assert_eq!(refused(false, LONG, locked), 1, "nobody is waited for");
        let gone =
            || block::Error::Create { path: "an image".into(), source: std::io::ErrorKind::NotFound.into() };
        assert_eq!(refused(true, LONG, gone), 1, "waiting does not help");
        assert!(refused(true, Duration::ZERO, locked) <= 2, "the time is over");
    }
}
