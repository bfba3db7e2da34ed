//! Two hosts, each with images and a record of its own.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::mock::World;
use crate::lease::{Id, Lease, Mark, NotTaken, Owner, Record, State, mark_path};
use crate::storage::{BLOCK_BYTES, Disk, IncomingDisks, OutgoingDisks};
use crate::{MachineResult, PageBitmap};

/// Images of the mock machine: name, and length.
pub const IMAGES: [(&str, u64); 2] = [("disk0-1", 40 * BLOCK_BYTES), ("disk0-7", 3 * BLOCK_BYTES + 1024)];

/// The images of one host, as whoever looks at them from outside sees them.
#[derive(Debug)]
pub struct Images {
    host: String,
    world: World,
    /// None where there are none.
    contents: Mutex<Vec<Vec<u8>>>,
    dirty: Mutex<Option<Vec<PageBitmap>>>,
    lease: Mutex<Option<Lease>>,
    /// Looks at what has changed.
    looks: Mutex<u64>,
    /// Blocks that the guest changes between two looks.
    pub writes: Mutex<u64>,
    /// What is there is given up for a guest that comes.
    pub overwrite: bool,
    /// This step fails, once.
    pub fails_at: Mutex<Option<&'static str>>,
    /// Bytes that were written to them, by whoever.
    pub written_bytes: Mutex<u64>,
    /// They are given up only when the guest of this host runs, which is waited for in vain if nobody lets it.
    pub gives_up_after: Mutex<Option<&'static str>>,
}

/// Far longer than a guest needs to run again.
const IN_VAIN: Duration = Duration::from_secs(20);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Images {
    /// A host without images.
    pub fn none(world: &World, host: &str) -> Arc<Self> {
        Arc::new(Self {
            host: host.to_owned(),
            world: world.clone(),
            contents: Mutex::default(),
            dirty: Mutex::default(),
            lease: Mutex::default(),
            looks: Mutex::default(),
            writes: Mutex::new(5),
            overwrite: false,
            fails_at: Mutex::default(),
            written_bytes: Mutex::default(),
            gives_up_after: Mutex::default(),
        })
    }

    /// A host whose images have something in them, and a guest.
    pub fn of_a_guest(world: &World, host: &str) -> Arc<Self> {
        let images = Self::none(world, host);
        let mut contents: Vec<_> = IMAGES.iter().map(|(_, length)| vec![0; *length as usize]).collect();
        for block in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 39] {
            contents[0][(block * BLOCK_BYTES) as usize..][..5000].fill(1 + block as u8);
        }
        contents[1][(3 * BLOCK_BYTES) as usize..].fill(77);
        *lock(&images.contents) = contents;
        let mut lease = images.open_lease();
        lease.claim().unwrap();
        *lock(&images.lease) = Some(lease);
        images
    }

    /// The process that had them has ended.
    pub fn let_go(&self) {
        *lock(&self.lease) = None;
    }

    pub fn contents(&self) -> Vec<Vec<u8>> {
        lock(&self.contents).clone()
    }

    /// What the record beside them says.
    pub fn record(&self) -> Option<Record> {
        let path = self.world.path(&format!("{}.record", self.host));
        path.exists().then(|| self.open_lease().read().unwrap()).flatten()
    }

    /// Where the marks are of images that would be files.
    fn mark_paths(&self) -> impl Iterator<Item = PathBuf> {
        let host = &self.host;
        IMAGES.iter().map(move |(name, _)| mark_path(&self.world.path(&format!("{host}.{name}"))))
    }

    /// What is said beside each image.
    pub fn marks(&self) -> Vec<Option<Mark>> {
        self.mark_paths().map(|path| Mark::read(&path).unwrap()).collect()
    }

    /// Whether a guest would start from them.
    fn starts(&self) -> bool {
        !lock(&self.contents).is_empty() && self.record().is_none_or(|record| !record.is_without_guest())
    }

    /// Whether one would start from an image alone, in a machine that has nothing to do with this one.
    pub fn start_alone(&self) -> Vec<bool> {
        let somebody = || Owner::this_process("somebody").unwrap();
        let is_here = !lock(&self.contents).is_empty();
        let marks = self.marks().into_iter();
        marks.map(|mark| is_here && mark.is_none_or(|mark| !mark.holds(somebody()))).collect()
    }

    /// What must hold whenever the power is cut.
    pub fn assert_one_starts_at_most(&self, other: &Self) {
        assert!(!(self.starts() && other.starts()), "{:?} {:?}", self.record(), other.record());
        let (here, there) = (self.start_alone(), other.start_alone());
        let both = here.iter().zip(&there).any(|(here, there)| *here && *there);
        assert!(!both, "{here:?} {:?}\n{there:?} {:?}", self.marks(), other.marks());
    }

    /// A guest runs from them now.
    pub fn run(&self) {
        let record = self.record();
        let is_ours =
            record.as_ref().is_some_and(|record| matches!(record.state, State::Owned | State::Taken { .. }));
        if !is_ours {
            self.world.violate(format!("{} runs with images whose record says {record:?}", self.host));
        }
    }

    fn open_lease(&self) -> Lease {
        let path = self.world.path(&format!("{}.record", self.host));
        Lease::open(&path, Owner::this_process(&self.host).unwrap()).unwrap()
    }

    fn step(&self, step: &'static str) -> MachineResult<()> {
        self.world.note(&self.host, step);
        let mut fails_at = lock(&self.fails_at);
        if *fails_at == Some(step) {
            *fails_at = None;
            return Err(format!("{step}: no space left on device").into());
        }
        Ok(())
    }

    /// As the guest does it: the image first, then the bit.
    fn change(&self, disk: usize, block: u64, value: u8) {
        let mut contents = lock(&self.contents);
        let start = (block * BLOCK_BYTES) as usize;
        let end = contents[disk].len().min(start + BLOCK_BYTES as usize);
        contents[disk][start..end].fill(value);
        if let Some(dirty) = &mut *lock(&self.dirty) {
            dirty[disk].set(block);
        }
    }

    /// What the guest does until it stands still.
    pub fn last_change(&self) {
        if !lock(&self.contents).is_empty() {
            self.change(0, 31, 0xfe);
            self.change(1, 3, 0xed);
        }
    }
}

/// Those of a source.
pub struct Outgoing {
    images: Arc<Images>,
    mark: Option<Mark>,
    have_moved: bool,
}

impl Outgoing {
    pub fn new(images: &Arc<Images>) -> Self {
        Self { images: Arc::clone(images), mark: None, have_moved: false }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        *lock(&self.images.dirty) = None;
        let Some(mark) = self.mark.take().filter(|_| !std::thread::panicking()) else { return };
        for path in self.images.mark_paths() {
            if self.have_moved { mark.keep(&path) } else { mark.remove(&path) }.unwrap();
        }
        self.images.world.note(&self.images.host, "marks settled");
    }
}

impl OutgoingDisks for Outgoing {
    fn disks(&self) -> Vec<Disk> {
        let disk = |(name, length_bytes): (&str, u64)| Disk {
            name: name.to_owned(),
            length_bytes,
            format: "raw".to_owned(),
        };
        IMAGES.into_iter().map(disk).collect()
    }

    fn start_tracking(&mut self) -> MachineResult<()> {
        self.images.step("track images")?;
        *lock(&self.images.dirty) =
            Some(self.disks().iter().map(|disk| PageBitmap::new(disk.blocks())).collect());
        Ok(())
    }

    fn populated(&mut self, disk: usize) -> MachineResult<Vec<Range<u64>>> {
        self.images.step("find holes")?;
        let contents = lock(&self.images.contents);
        let blocks = contents[disk].chunks(BLOCK_BYTES as usize).enumerate();
        let data = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        // Where they begin and end in a block is the file system's affair.
        Ok(data
            .map(|(block, _)| (block as u64 * BLOCK_BYTES + 512)..(block as u64 * BLOCK_BYTES + 1024))
            .collect())
    }

    fn collect_dirty(&mut self) -> MachineResult<Vec<PageBitmap>> {
        self.images.step("look at images")?;
        if self.images.world.running().contains(&self.images.host) {
            let mut looks = lock(&self.images.looks);
            for index in 0..*lock(&self.images.writes) {
                // Holes too, and some become holes.
                let value = if index % 4 == 3 { 0 } else { *looks as u8 ^ index as u8 };
                self.images.change(0, (index * 7 + *looks * 3) % 40, value);
            }
            *looks += 1;
        }
        let mut dirty = lock(&self.images.dirty);
        let dirty = dirty.as_mut().ok_or("nothing is tracked")?;
        Ok(dirty.iter_mut().map(|dirty| std::mem::replace(dirty, PageBitmap::new(dirty.pages()))).collect())
    }

    fn read(&mut self, disk: usize, offset_bytes: u64, into: &mut [u8]) -> MachineResult<()> {
        self.images.step("read image")?;
        into.copy_from_slice(&lock(&self.images.contents)[disk][offset_bytes as usize..][..into.len()]);
        Ok(())
    }

    fn prepare_to_leave(&mut self, session: &Id, peer: &str) -> MachineResult<()> {
        let state = State::Moved { session: *session, peer: peer.to_owned() };
        let mark = self.mark.insert(lock(&self.images.lease).as_ref().unwrap().mark(state)?);
        for path in self.images.mark_paths() {
            self.images.step("mark image")?;
            mark.write(&path)?;
        }
        Ok(())
    }

    fn mark_moved(&mut self, session: &Id, peer: &str) -> MachineResult<()> {
        self.images.step("mark moved")?;
        self.have_moved = true;
        lock(&self.images.lease).as_mut().unwrap().mark_moved(session, peer)?;
        self.images.step("after the mark")
    }

    fn take_back(&mut self, session: &Id) -> MachineResult<()> {
        self.images.step("take back")?;
        lock(&self.images.lease).as_mut().unwrap().take_back(session)?;
        self.have_moved = false;
        Ok(())
    }
}

/// Those of a destination.
pub struct Incoming {
    images: Arc<Images>,
    session: Id,
    generation: u64,
    is_new: bool,
    is_owned: bool,
    unsynced: bool,
    mark: Mark,
}

impl Incoming {
    pub fn begin(images: &Arc<Images>, session: &Id, disks: &[Disk]) -> MachineResult<Self> {
        images.step("make images")?;
        let found = !lock(&images.contents).is_empty();
        if found && !images.overwrite {
            return Err("there are images already".into());
        }
        let mut lease = images.open_lease();
        let (generation, before) = lease.expect(session, images.overwrite)?;
        let mark = lease.mark(State::Incoming { session: *session })?;
        *lock(&images.lease) = Some(lease);
        for path in images.mark_paths() {
            images.step("mark image")?;
            mark.write(&path)?;
        }
        let length = |disk: &Disk| vec![0; disk.length_bytes as usize];
        *lock(&images.contents) = disks.iter().map(length).collect();
        let (images, session) = (Arc::clone(images), *session);
        let is_new = before.is_none();
        Ok(Self { images, session, generation, is_new, is_owned: false, unsynced: false, mark })
    }

    fn write_bytes(&mut self, disk: usize, offset_bytes: u64, bytes: &[u8]) {
        lock(&self.images.contents)[disk][offset_bytes as usize..][..bytes.len()].copy_from_slice(bytes);
        *lock(&self.images.written_bytes) += bytes.len() as u64;
        self.unsynced = true;
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let after = *lock(&self.images.gives_up_after);
        let since = Instant::now();
        while let Some(host) =
            after.filter(|host| !self.images.world.running().iter().any(|name| name == host))
        {
            assert!(since.elapsed() < IN_VAIN, "{host} waits for what is done with images of nobody");
            std::thread::yield_now();
        }
        if !self.is_owned {
            lock(&self.images.contents).clear();
        }
        self.images.mark_paths().for_each(|path| self.mark.remove(&path).unwrap());
        if self.is_owned {
            return;
        }
        let lease = lock(&self.images.lease).take().unwrap();
        if self.is_new {
            lease.forget(&self.session).unwrap();
        }
        self.images.world.note(&self.images.host, "images given up");
    }
}

impl IncomingDisks for Incoming {
    fn is_blank(&self, disk: usize) -> bool {
        // Of one it is not known.
        disk == 0
    }

    fn begin(&mut self) -> MachineResult<()> {
        self.images.step("begin images")
    }

    fn write(&mut self, disk: usize, offset_bytes: u64, contents: &[u8]) -> MachineResult<()> {
        self.images.step("write image")?;
        self.write_bytes(disk, offset_bytes, contents);
        Ok(())
    }

    fn write_zeroes(&mut self, disk: usize, range: Range<u64>) -> MachineResult<()> {
        self.images.step("write zeroes")?;
        self.write_bytes(disk, range.start, &vec![0; (range.end - range.start) as usize]);
        Ok(())
    }

    fn sync(&mut self) -> MachineResult<()> {
        self.images.step("sync images")?;
        self.unsynced = false;
        Ok(())
    }

    fn own(&mut self, session: &Id, open: &mut dyn FnMut() -> Result<(), String>) -> Result<(), NotTaken> {
        assert!(!self.unsynced, "what is owned is stable");
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
            NotTaken::Refused(crate::lease::Error::Condition { reason: error.to_string() })
        };
        self.images.step("own images").map_err(failed)?;
        let mut lease = lock(&self.images.lease);
        lease.as_mut().unwrap().take(session, self.generation, open)?;
        self.is_owned = true;
        Ok(())
    }

    fn disown(&mut self, session: &Id) -> MachineResult<()> {
        self.is_owned = false;
        Ok(lock(&self.images.lease).as_mut().unwrap().expect_again(session)?)
    }
}
