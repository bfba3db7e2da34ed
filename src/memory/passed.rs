//! A block whose memory itself goes to another process of this host, or came from one.
//!
//! What comes takes the place of the block's own memory in three steps: mapped for reading, while the guest still runs in the other
//! process ([`RamBlock::map_passed`]); mapped elsewhere through a descriptor that can write, but still for reading ([`RamBlock::adopt`]);
//! and that mapping made writable and moved here, when the guest is ours ([`RamBlock::make_writable`]). Where KVM shadows page tables
//! each change of a slot's range costs it a look at every page of the slot, and so the guest, which stands still, has to wait
//! for one only. Until then a store to it by this process ends the process, and
//! one by a vCPU or by the kernel for it fails, wherever a mistake would let it happen.
//!
//! All three change what is mapped in the block's range and leave the range: KVM's memory slots, which cost milliseconds to register and so
//! were before, stay, since KVM follows the process's page tables (the kernel tells it of every change: MMU notifiers), and so does every
//! pointer that a device has. That a slot is there before the guest is ours opens nothing: no vCPU runs, and what the process
//! cannot write, KVM cannot either.
//!
//! What a peer passes is looked at first. It must be a memfd of exactly the block's length, in pages of the block's size, and its seals must
//! say that it stays so: nobody can change its size, or the peer could cut it short later and end this process by SIGBUS; writing is
//! not forbidden, and no seal can be added that forbids it, or the guest could not run here after it was given away. Only a memfd can be sealed so: files
//! of tmpfs and hugetlbfs have had their last seal (F_SEAL_SEAL) from the beginning (fcntl(2)), and others have none. The one exception is
//! the file that a persistent memory region of this machine is, which the caller knows.

use std::ffi::c_void;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use super::{Error, GuestRam, RamBlock, huge, transparent};

/// What came from another process.
#[derive(Debug)]
pub(super) struct Passed {
    kind: Kind,
    readable: File,
    writable: OnceLock<File>,
    /// From the adoption until the guest is ours.
    spare: Mutex<Option<Spare>>,
}

/// What the descriptors are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory.
    Memory,
    /// The file that this machine's block becomes when the guest is ours ([`RamBlock::attach`]).
    Attached,
}

/// A mapping for reading that nobody uses yet.
#[derive(Debug)]
struct Spare {
    /// The address, as a number: no pointer is ever made from it but for the kernel.
    start: usize,
    length: usize,
}

impl Spare {
    fn of(file: &File, length: usize) -> io::Result<Self> {
        let (anywhere, flags) = (std::ptr::null_mut(), MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: the kernel chooses a free range.
        let start = unsafe { rustix::mm::mmap(anywhere, length, ProtFlags::READ, flags, file.as_fd(), 0) }?;
        Ok(Self { start: start as usize, length })
    }

    /// Becomes writable, and what is mapped at `place`, for as many bytes. It is given back with the error otherwise.
    fn take_the_place_of(self, place: *mut c_void) -> Result<(), (Self, io::Error)> {
        let start = self.start as *mut c_void;
        let protection = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: the range is ours, and nobody uses it.
        let writable = unsafe { rustix::mm::mprotect(start, self.length, protection) };
        let moved = writable.and_then(|()| {
            // SAFETY: both ranges are as long and whole mappings: ours, which nobody uses, and that of a block, which stays mapped
            // as the kernel replaces it. Nobody has a reference into it; those who access it do so by volatile reads and writes.
            unsafe { rustix::mm::mremap_fixed(start, self.length, self.length, MremapFlags::MAYMOVE, place) }
        });
        match moved {
            Ok(_) => {
                // The range is not ours any more.
                std::mem::forget(self);
                Ok(())
            }
            Err(errno) => Err((self, errno.into())),
        }
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and nobody uses it. An error leaves it mapped.
        let _ = unsafe { rustix::mm::munmap(self.start as *mut c_void, self.length) };
    }
}

impl Passed {
    /// The memory, by the descriptor that can do most.
    pub(super) fn memory(&self) -> Option<&File> {
        (self.kind == Kind::Memory).then(|| self.writable.get().unwrap_or(&self.readable))
    }
}

impl RamBlock {
    /// The block for another process: a descriptor that reads, and one that writes.
    ///
    /// # Errors
    /// No descriptor is left, or `/proc` is not there.
    pub fn descriptors(&self) -> io::Result<(OwnedFd, OwnedFd)> {
        let memory = self.file().unwrap_or_else(|| self.memfd());
        // Another open file, since a descriptor cannot lose the right to write.
        let readable = File::open(format!("/proc/self/fd/{}", memory.as_raw_fd()))?;
        Ok((readable.into(), memory.try_clone()?.into()))
    }

    /// Makes the block `passed`, for reading, in the place of the memory that it was.
    ///
    /// # Errors
    /// [`Error::Passed`]: it is not what it should be, or there was one already. [`Error::Create`]: the kernel refuses.
    pub fn map_passed(&self, passed: OwnedFd, kind: Kind) -> Result<(), Error> {
        let readable = File::from(passed);
        if kind == Kind::Memory {
            self.check_memory(&readable)?;
        }
        let passed = Passed { kind, readable, writable: OnceLock::new(), spare: Mutex::default() };
        self.passed.set(passed).map_err(|_| self.refuse("memory was passed for it before".to_owned()))?;
        let passed = self.passed.get().expect("it was set just now");
        self.map_fixed("map the memory that was passed", &passed.readable, ProtFlags::READ)
    }

    /// Takes a descriptor of the same memory that can write. The block is still for reading.
    ///
    /// # Errors
    /// [`Error::Passed`]: it is of something else, or cannot write, or nothing was mapped before. [`Error::Create`]: the kernel refuses.
    pub fn adopt(&self, passed: OwnedFd) -> Result<(), Error> {
        let writable = File::from(passed);
        let before =
            self.passed.get().ok_or_else(|| self.refuse("no memory was passed for it".to_owned()))?;
        let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        let failed = |source| self.failed("look at the memory that was passed", source);
        if identity(&writable).map_err(failed)? != identity(&before.readable).map_err(failed)? {
            return Err(self.refuse("what came with the hand-over is not what was mapped".to_owned()));
        }
        if before.kind == Kind::Attached {
            return Ok(());
        }
        let flags = rustix::fs::fcntl_getfl(&writable).map_err(|errno| failed(errno.into()))?;
        if flags & rustix::fs::OFlags::RWMODE != rustix::fs::OFlags::RDWR {
            return Err(self.refuse("what came with the hand-over cannot write".to_owned()));
        }
        let spare = Spare::of(&writable, self.mapping.size())
            .map_err(|source| self.failed("map the memory that is handed over", source))?;
        // It keeps that when it moves.
        transparent::ask_for(self.huge_pages, spare.start as *mut c_void, spare.length);
        *before.spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(spare);
        // An adoption that is made again is of the same memory.
        let _ = before.writable.set(writable);
        Ok(())
    }

    /// Lets this process and the guest write to memory that was [adopted](Self::adopt): the guest is ours. Harmless for any other.
    ///
    /// # Errors
    /// [`Error::Create`]: the kernel refuses.
    pub fn make_writable(&self) -> Result<(), Error> {
        let Some(passed) = self.passed.get() else { return Ok(()) };
        let mut spare = passed.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mapped) = spare.take() else { return Ok(()) };
        let Err((mapped, source)) = mapped.take_the_place_of(self.mapping.as_ptr().cast()) else {
            return Ok(());
        };
        // A move that failed may have taken away what was in the place: Linux before 5.16 does so before it finds that it moves no huge
        // pages. The memory itself is there, and is mapped anew.
        let why = source.to_string();
        let failed = self.failed("move the memory that was handed over to its place", source);
        log::warn!("{failed}: {why}; it is mapped again instead");
        let writable = passed.writable.get().ok_or(failed)?;
        let again = "map the memory that was handed over for writing";
        self.map_fixed(again, writable, ProtFlags::READ | ProtFlags::WRITE).inspect_err(|_| {
            // For another try.
            *spare = Some(mapped);
        })?;
        self.ask_for_its_pages();
        Ok(())
    }

    /// Whether the block is `file`, which came from another process.
    #[must_use]
    pub fn is_passed(&self, file: &fs::Metadata) -> bool {
        let found = self.passed.get().and_then(|passed| passed.readable.metadata().ok());
        found.is_some_and(|found| (found.dev(), found.ino()) == (file.dev(), file.ino()))
    }

    /// Memory of the block's length, in such pages as the block has, of which nothing can change but the contents.
    fn check_memory(&self, passed: &File) -> Result<(), Error> {
        // First the seals: the length cannot change any more.
        let Ok(seals) = rustix::fs::fcntl_get_seals(passed) else {
            return Err(self.refuse("it is no memfd".to_owned()));
        };
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(self.refuse("its size is not sealed".to_owned()));
        }
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(self.refuse("it is sealed against writing".to_owned()));
        }
        if !seals.contains(SealFlags::SEAL) {
            return Err(self.refuse("it can still be sealed against writing".to_owned()));
        }
        let failed = |source| self.failed("look at the memory that was passed", source);
        let page_bytes = |file| huge::page_bytes(file).map_err(failed);
        // What this block knows of its pages must be true of those that came.
        let (theirs, ours) = (page_bytes(passed)?, page_bytes(&self.memfd)?);
        if theirs != ours {
            return Err(self.refuse(format!("its pages have {theirs} bytes, not {ours}")));
        }
        let found_bytes = passed.metadata().map_err(failed)?.len();
        match found_bytes == self.length_bytes() {
            true => Ok(()),
            false => Err(self.refuse(format!("it has {found_bytes} bytes"))),
        }
    }

    /// Maps the beginning of `file` in the place of what is in the block's range.
    pub(super) fn map_fixed(
        &self,
        what: &'static str,
        file: &File,
        protection: ProtFlags,
    ) -> Result<(), Error> {
        let (start, flags) =
            (self.mapping.as_ptr(), MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE);
        // SAFETY: the range is exactly the mapping, which the block keeps, and stays mapped throughout: the kernel replaces it at once.
        // Nobody has a reference into it; those who access it do so by volatile reads and writes, and by writes only when it is
        // writable.
        unsafe { rustix::mm::mmap(start.cast(), self.mapping.size(), protection, flags, file.as_fd(), 0) }
            .map(drop)
            .map_err(|errno| self.failed(what, errno.into()))
    }

    fn failed(&self, what: &'static str, source: io::Error) -> Error {
        Error::Create { what, name: self.name.clone(), length_bytes: self.length_bytes(), source }
    }

    fn refuse(&self, reason: String) -> Error {
        Error::Passed { name: self.name.clone(), length_bytes: self.length_bytes(), reason }
    }
}

impl GuestRam {
    /// [`RamBlock::make_writable`] for every block.
    ///
    /// # Errors
    /// As there.
    pub fn make_writable(&self) -> Result<(), Error> {
        self.blocks().iter().try_for_each(RamBlock::make_writable)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Instant;

    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::memory::RAM_LOW;
    use crate::vcpu::VcpuEvent;
    use crate::vcpu::tests::{TestGuest, WATCHDOG};

    fn low(ram: &GuestRam) -> &RamBlock {
        ram.block(RAM_LOW).unwrap()
    }

    fn first_bytes(block: &RamBlock) -> [u8; 4] {
        let mut bytes = [0; 4];
        block.read(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn one_memory_is_two_processes_until_one_lets_go() {
        let (theirs, ours) = (GuestRam::new(1 << 20, &[]).unwrap(), GuestRam::new(1 << 20, &[]).unwrap());
        low(&theirs).write(0, b"they").unwrap();
        low(&ours).write(0, b"mine").unwrap();
        let (readable, writable) = low(&theirs).descriptors().unwrap();
        low(&ours).map_passed(readable, Kind::Memory).unwrap();
        assert_eq!(&first_bytes(low(&ours)), b"they");
        low(&theirs).write(0, b"goes").unwrap();
        assert_eq!(&first_bytes(low(&ours)), b"goes", "it goes on meanwhile");
        ours.make_writable().unwrap();
        low(&ours).adopt(writable).unwrap();
        ours.make_writable().unwrap();
        drop(theirs);
        low(&ours).write(4096, b"ours").unwrap();
        assert_eq!(low(&ours).mapping.bitmap().get_and_reset()[0], 0b11, "its pages are marked as before");
        assert_eq!(low(&ours).populated_ranges().unwrap(), std::slice::from_ref(&(0..8192)));
        low(&ours).clear(0, 4096).unwrap();
        let populated = low(&ours).populated_ranges().unwrap();
        assert_eq!((populated.len(), populated[0].clone(), first_bytes(low(&ours))), (1, 4096..8192, [0; 4]));

        let next = GuestRam::new(1 << 20, &[]).unwrap();
        let (readable, _) = low(&ours).descriptors().unwrap();
        low(&next).map_passed(readable, Kind::Memory).unwrap();
        let mut bytes = [0; 4];
        low(&next).read(4096, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ours", "what came goes on");
    }

    /// A mapping that cannot be moved, and a place that has lost what was in it, as after a move that failed half-way.
    #[test]
    fn memory_that_cannot_be_moved_to_its_place_is_mapped_there_again() {
        let (theirs, ours) = (GuestRam::new(1 << 20, &[]).unwrap(), GuestRam::new(1 << 20, &[]).unwrap());
        low(&theirs).write(4096, b"they").unwrap();
        let (readable, writable) = low(&theirs).descriptors().unwrap();
        let (again, _) = low(&theirs).descriptors().unwrap();
        low(&ours).map_passed(readable, Kind::Memory).unwrap();
        low(&ours).adopt(writable).unwrap();
        let passed = low(&ours).passed.get().unwrap();
        // Of a descriptor that cannot write, which the kernel does not make writable.
        *passed.spare.lock().unwrap() = Some(Spare::of(&File::from(again), 1 << 20).unwrap());
        let nothing = rustix::fs::memfd_create("nothing", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&nothing, 1 << 20).unwrap();
        low(&ours).map_fixed("lose it", &nothing.into(), ProtFlags::READ).unwrap();
        ours.make_writable().unwrap();
        let mut bytes = [0; 4];
        low(&ours).read(4096, &mut bytes).unwrap();
        assert_eq!(&bytes, b"they");
        low(&ours).write(4096, b"ours").unwrap();
        low(&theirs).read(4096, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ours");
        assert!(passed.spare.lock().unwrap().is_none());
    }

    #[test]
    fn what_a_peer_passes_for_memory_must_be_memory_that_keeps_its_size() {
        let memfd = |length_bytes: u64, seals: SealFlags| {
            let memfd = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
            rustix::fs::ftruncate(&memfd, length_bytes).unwrap();
            rustix::fs::fcntl_add_seals(&memfd, seals).unwrap();
            memfd
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let shared = tempfile::tempfile_in("/dev/shm").unwrap();
        shared.set_len(1 << 20).unwrap();
        let size = SealFlags::SHRINK | SealFlags::GROW;
        for (passed, reason) in [
            (memfd(1 << 20, SealFlags::SHRINK | SealFlags::SEAL), "its size is not sealed"),
            (memfd(1 << 20, SealFlags::GROW | SealFlags::SEAL), "its size is not sealed"),
            (memfd(1 << 20, size | SealFlags::WRITE | SealFlags::SEAL), "it is sealed against writing"),
            (
                memfd(1 << 20, size | SealFlags::FUTURE_WRITE | SealFlags::SEAL),
                "it is sealed against writing",
            ),
            (memfd(1 << 20, size), "it can still be sealed against writing"),
            (memfd(1 << 21, size | SealFlags::SEAL), "it has 2097152 bytes"),
            (memfd(0, size | SealFlags::SEAL), "it has 0 bytes"),
            (file.into(), "cannot take over memory block"),
            (shared.into(), "its size is not sealed"),
            (reader, "it is no memfd"),
            (File::open("/dev/null").unwrap().into(), "it is no memfd"),
        ] {
            let ram = GuestRam::new(1 << 20, &[]).unwrap();
            low(&ram).write(0, b"kept").unwrap();
            let error = low(&ram).map_passed(passed, Kind::Memory).unwrap_err().to_string();
            assert!(error.contains(reason), "{reason}: {error}");
            assert_eq!(&first_bytes(low(&ram)), b"kept", "{reason}");
        }
    }

    #[test]
    fn only_the_memory_that_was_mapped_is_adopted() {
        let (theirs, other) = (GuestRam::new(1 << 20, &[]).unwrap(), GuestRam::new(1 << 20, &[]).unwrap());
        let ours = GuestRam::new(1 << 20, &[]).unwrap();
        let reason = |passed| low(&ours).adopt(passed).unwrap_err().to_string();
        assert!(reason(low(&theirs).descriptors().unwrap().1).contains("no memory was passed"));
        let (readable, writable) = low(&theirs).descriptors().unwrap();
        low(&ours).map_passed(readable, Kind::Memory).unwrap();
        assert!(low(&ours).map_passed(writable, Kind::Memory).is_err(), "there is one");
        assert!(reason(low(&other).descriptors().unwrap().1).contains("is not what was mapped"));
        assert!(reason(low(&theirs).descriptors().unwrap().0).contains("cannot write"));
        low(&ours).adopt(low(&theirs).descriptors().unwrap().1).unwrap();
    }

    #[test]
    fn a_descriptor_for_reading_does_not_write() {
        let ram = GuestRam::new(1 << 20, &[]).unwrap();
        let (readable, writable) = low(&ram).descriptors().unwrap();
        let readable = File::from(readable);
        assert!(readable.write_at(b"x", 0).is_err());
        let start = std::ptr::null_mut();
        let (write, shared) = (ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses a free range, if it maps anything.
        let mapped = unsafe { rustix::mm::mmap(start, 4096, write, shared, &readable, 0) };
        assert_eq!(mapped, Err(rustix::io::Errno::ACCESS));
        File::from(writable).write_at(b"yes!", 0).unwrap();
        assert_eq!(&first_bytes(low(&ram)), b"yes!");
    }

    /// Counts at 0x10000 and tells port 0x10 the count.
    const COUNT: [u8; 15] = [
        0xff, 0x05, 0x00, 0x00, 0x01, 0x00, // inc dword [0x10000]
        0xa1, 0x00, 0x00, 0x01, 0x00, // mov eax, [0x10000]
        0xe7, 0x10, // out 0x10, eax
        0xeb, 0xf1, // jmp back
    ];

    /// Memory of another process with the guest's code, and its count at `count`.
    fn other_memory(guest: &TestGuest, count: u32) -> GuestRam {
        let other = GuestRam::new(1 << 20, &[]).unwrap();
        let mut contents = vec![0; 1 << 20];
        guest.low().read(0, &mut contents).unwrap();
        low(&other).write(0, &contents).unwrap();
        low(&other).write(0x10_000, &count.to_le_bytes()).unwrap();
        other
    }

    /// KVM follows what is mapped in a slot that is there: the guest, which had touched these pages before, goes on in other memory.
    #[test]
    fn a_vcpu_sees_the_memory_that_took_the_place_of_its_slots() {
        let guest = TestGuest::new(1, &COUNT);
        guest.vcpus.resume().unwrap();
        assert!(guest.next_value() < 1000);
        guest.vcpus.pause().unwrap();
        guest.port_backlog();
        let theirs = other_memory(&guest, 1_000_000);
        let (readable, writable) = low(&theirs).descriptors().unwrap();
        guest.low().map_passed(readable, Kind::Memory).unwrap();
        guest.low().adopt(writable).unwrap();
        guest.ram.make_writable().unwrap();
        guest.vcpus.resume().unwrap();
        // The first may have been on its way.
        guest.next_value();
        let counted = guest.next_value();
        assert!(counted > 1_000_000, "{counted}");
        guest.vcpus.pause().unwrap();
        let mut bytes = [0; 4];
        low(&theirs).read(0x10_000, &mut bytes).unwrap();
        assert!(u32::from_le_bytes(bytes) >= counted, "it counts there");
    }

    /// The slot is there, and yet nothing that the guest does reaches memory that is not ours.
    #[test]
    fn a_vcpu_cannot_write_before_the_memory_is_ours() {
        let guest = TestGuest::new(1, &COUNT);
        let theirs = other_memory(&guest, 7);
        let (readable, writable) = low(&theirs).descriptors().unwrap();
        guest.low().map_passed(readable, Kind::Memory).unwrap();
        guest.low().adopt(writable).unwrap();
        guest.vcpus.resume().unwrap();
        // Either the vCPU ends, or, where KVM interprets the guest, the store leaves it as one to a device that is not there.
        let deadline = Instant::now() + WATCHDOG;
        loop {
            assert!(Instant::now() < deadline, "the guest does nothing");
            if let Some((_, event)) = guest.event_backlog().first() {
                assert!(matches!(event, VcpuEvent::Failed(_)), "{event:?}");
                break;
            }
            // It has stored, and read again.
            if guest.port_backlog().len() > 1 {
                break;
            }
            std::thread::yield_now();
        }
        let mut bytes = [0; 4];
        low(&theirs).read(0x10_000, &mut bytes).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 7);
    }
}
