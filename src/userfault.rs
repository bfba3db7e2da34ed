//! Missing pages of guest memory, brought when somebody touches them (userfaultfd(2)).
//!
//! Whoever touches a missing page waits in the kernel, be it a vCPU in the guest, a thread of this process or an io_uring
//! request that the kernel serves, until the page has been placed. Everything else of the memory works as ever.
//!
//! A page of a memfd is missing until something is written to it, through whatever mapping, and is missing again once a hole was
//! punched there. It is placed whole: nobody sees half of one. Placing a page that is there changes nothing. No page fault
//! brings a transparent huge page meanwhile ([`SmallPages`]).
//!
//! A huge page comes in parts, which a second mapping takes that nobody else knows. Who touches it through the guest's waits until it is
//! [complete](Userfault::complete), whatever the file holds of it ("minor" faults): what was there when the watch began is kept,
//! unseen. So there is never a second copy of it.
//!
//! A vCPU that waits cannot be stopped: some KVMs do not listen to signals meanwhile. But one that was told to stop runs no further
//! instruction when it has its page ([`VcpuManager::hold`](crate::vcpu::VcpuManager::hold)), and until then it runs none either.
//!
//! The structures and numbers are those of `linux/userfaultfd.h`.
//!
//! Memory that nobody touches yet is also [filled](Userfault::fill) by this: a small page comes with its contents and mapped, in one
//! step, where a touch would clear it first, and a write to the file would have each thread wait for the other and leave the mapping to
//! a fault.
//!
//! Absent: write protection, and what to place: that is for who [waits](Userfault::faults) for faults.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use bus::GuestMapping;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::mm::UserfaultfdFlags;
use vm_memory::VolatileMemory;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use crate::memory::{PAGE_SIZE_BYTES, RamBlock, RamSlice, SmallPages};

/// Where a process gets a descriptor that may not make the system call.
const DEVICE: &str = "/dev/userfaultfd";

const UFFDIO: u32 = 0xaa;
/// Version of the interface.
const UFFD_API: u64 = 0xaa;
/// Faults in user mode only: since Linux 5.11 such a descriptor needs no privilege. (Seccomp may forbid it all the same.)
const UFFD_USER_MODE_ONLY: u32 = 1;
const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;
/// Messages that are read at a time.
const MESSAGES: usize = 16;
/// So often nothing at all may be filled because somebody else was at work on the mapping.
const FILL_TRIES: u32 = 3;
/// A page of zeros.
const ZEROS: [u8; PAGE_SIZE_BYTES as usize] = [0; PAGE_SIZE_BYTES as usize];

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    length_bytes: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length_bytes: u64,
    mode: u64,
    /// What was done, or a negative error.
    copied_bytes: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    /// What was done, or a negative error.
    zeroed_bytes: i64,
}

/// `struct uffdio_continue`.
#[repr(C)]
struct Continue {
    range: Range,
    mode: u64,
    /// What was done, or a negative error.
    mapped_bytes: i64,
}

/// The numbers of the calls.
#[allow(missing_docs, reason = "the macro makes functions without")]
mod calls {
    use super::*;

    ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
    ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
    ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
    ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Range);
    ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
    ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, Copy);
    ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, ZeroPage);
    ioctl_iowr_nr!(UFFDIO_CONTINUE, UFFDIO, 0x07, Continue);
}
use calls::*;

/// Why missing pages cannot be brought.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gives us no descriptor that also sees what the kernel touches for us.
    #[error(
        "this host does not let us bring memory when it is touched: userfaultfd(2) says {system_call}, and {DEVICE} cannot be opened \
         (it wants CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1, or access to {DEVICE})"
    )]
    Unavailable {
        /// What the system call said.
        system_call: io::Error,
        /// What opening the device said.
        source: io::Error,
    },
    /// The kernel's userfaultfd is not one that knows shared memory.
    #[error("this kernel cannot bring pages of shared memory when they are touched (features {features:#x})")]
    Unsuitable {
        /// What it offers.
        features: u64,
    },
    /// Nor one that knows huge pages.
    #[error(
        "this kernel cannot bring huge pages when they are touched (features {features:#x}; Linux 5.18 can)"
    )]
    UnsuitableForHugePages {
        /// What it offers.
        features: u64,
    },
    /// Memory cannot be watched or put into its place by other calls.
    #[error("cannot bring pages of guest memory")]
    Memory(#[from] crate::memory::Error),
    /// A call failed.
    #[error("cannot {what}")]
    Call {
        /// What was tried.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// Pages that no block has.
    #[error("bytes {offset:#x}+{length_bytes:#x} are no whole pages of block number {block}")]
    OutOfBounds {
        /// Which block.
        block: usize,
        /// First byte.
        offset: u64,
        /// Bytes.
        length_bytes: u64,
    },
}

/// Somebody waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Number of the block, in the order of [`Userfault::register`].
    pub block: usize,
    /// First byte of the page in its block.
    pub offset: u64,
    /// The thread; 0 for one of the kernel's.
    pub thread: u32,
}

/// Blocks of memory whose missing pages we bring. Shared by whoever brings some: every method takes `&self`.
///
/// Dropping it ends that, and all who wait go on: pages that are still missing are then zeros.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    /// Readable from [`Self::end`] on.
    ended: OwnedFd,
    blocks: Vec<Watched>,
}

/// A block whose missing pages are brought.
#[derive(Debug)]
struct Watched {
    /// It stays mapped while the kernel tells us of it.
    mapping: Arc<GuestMapping>,
    /// The same memory, for the parts of huge pages.
    parts: Option<GuestMapping>,
    page_bytes: u64,
    /// Until it is not watched any more.
    small: Mutex<Option<SmallPages>>,
}

impl Watched {
    fn of(block: &RamBlock) -> Result<Self, Error> {
        let (mapping, page_bytes) = (Arc::clone(&block.mapping), block.page_bytes()?);
        let parts = (page_bytes > PAGE_SIZE_BYTES).then(|| block.map_parts()).transpose()?;
        Ok(Self { mapping, parts, page_bytes, small: Mutex::new(block.keep_small()?) })
    }
}

/// What a descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// All who touch a missing page wait, also where the kernel does it for us.
    Waiting,
    /// Nobody touches one. Where the kernel knows how, what it touches for us fails instead of waiting.
    Filling,
}

impl Userfault {
    /// Whether this host lets us watch memory, also such in huge pages.
    ///
    /// # Errors
    /// Those of [`Self::register`].
    pub fn check(in_huge_pages: bool) -> Result<(), Error> {
        let (_, features) = agree(Purpose::Waiting)?;
        if in_huge_pages { check_huge(features) } else { Ok(()) }
    }

    /// From here on whoever touches a missing page of `blocks` waits until it is placed.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Unsuitable`], [`Error::Call`], and [`Error::UnsuitableForHugePages`] and [`Error::Memory`] for those
    /// in huge pages: nothing is registered then.
    pub fn register(blocks: &[RamBlock]) -> Result<Self, Error> {
        Self::register_for(Purpose::Waiting, blocks)
    }

    /// The same to [`fill`](Self::fill) pages of blocks that nobody touches meanwhile, which needs no privilege since Linux 5.11.
    ///
    /// # Errors
    /// Those of [`Self::register`].
    pub fn register_to_fill(blocks: &[RamBlock]) -> Result<Self, Error> {
        Self::register_for(Purpose::Filling, blocks)
    }

    fn register_for(purpose: Purpose, blocks: &[RamBlock]) -> Result<Self, Error> {
        let (fd, features) = agree(purpose)?;
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("make an eventfd", errno))?;
        let watched = blocks.iter().map(Watched::of).collect::<Result<Vec<_>, _>>()?;
        if watched.iter().any(|block| block.parts.is_some()) {
            check_huge(features)?;
        }
        let userfault = Self { fd, ended, blocks: watched };
        for (index, (block, watched)) in blocks.iter().zip(&userfault.blocks).enumerate() {
            let range = userfault.range(index, 0, block.length_bytes())?;
            let minor = if watched.parts.is_some() { UFFDIO_REGISTER_MODE_MINOR } else { 0 };
            let mut register = Register { range, mode: UFFDIO_REGISTER_MODE_MISSING | minor, ioctls: 0 };
            // SAFETY: the kernel reads and writes one `uffdio_register`. The range is a mapping that we keep, and what happens to
            // those who touch it is only that they wait.
            let result = unsafe { ioctl_with_mut_ref(&userfault.fd, UFFDIO_REGISTER(), &mut register) };
            check(result, || format!("watch memory block \"{}\" for missing pages", block.name))?;
            if watched.parts.is_some() {
                // What this process has touched so far it would see without waiting.
                block.forget_mapped()?;
            }
        }
        Ok(userfault)
    }

    /// Places whole pages from `offset` of block number `block` on, and lets go on who waits for one of them. Pages that are there
    /// stay as they are.
    ///
    /// If the block lies in huge pages, these are parts of some that are not [complete](Self::complete), and what was there is written
    /// over.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; [`Error::Call`]: there is no memory, or the block is not watched any more.
    pub fn place(&self, block: usize, offset: u64, pages: &[u8]) -> Result<(), Error> {
        let Range { start, length_bytes } = self.range(block, offset, pages.len() as u64)?;
        if let Some(parts) = self.parts(block, offset, length_bytes) {
            parts?.copy_from(pages);
            return Ok(());
        }
        let mut done = 0;
        while done < length_bytes {
            let (copied_bytes, result) = self.copy(start + done, pages, done);
            let left = start + done..start + length_bytes;
            let what = || format!("place {length_bytes:#x} bytes at {offset:#x} of block number {block}");
            done += self.progress(result, copied_bytes, (left, PAGE_SIZE_BYTES), what)?;
        }
        Ok(())
    }

    /// As [`Self::place`], of pages of a block in small ones that are all missing.
    ///
    /// # Errors
    /// Those of [`Self::place`]; [`Error::Call`]: some are there. Which of the others were placed is not known.
    pub fn fill(&self, block: usize, offset: u64, pages: &[u8]) -> Result<(), Error> {
        let Range { start, length_bytes } = self.range(block, offset, pages.len() as u64)?;
        let (mut done, mut in_vain) = (0, 0);
        while done < length_bytes {
            let (copied_bytes, result) = self.copy(start + done, pages, done);
            done += match result {
                Ok(()) => length_bytes - done,
                // The first of those that are left says why it could not be.
                Err(source) if source.raw_os_error() == Some(libc::EAGAIN) && copied_bytes > 0 => {
                    copied_bytes.unsigned_abs()
                }
                Err(source) if source.raw_os_error() == Some(libc::EAGAIN) && in_vain < FILL_TRIES => {
                    in_vain += 1;
                    0
                }
                Err(source) => {
                    let what = format!("fill {length_bytes:#x} bytes at {offset:#x} of block number {block}");
                    return Err(Error::Call { what, source });
                }
            };
        }
        Ok(())
    }

    /// One system call for `pages` from byte `done` on, to this address. What it says that it did, or a negative error; and how it ended.
    fn copy(&self, to: u64, pages: &[u8], done: u64) -> (i64, io::Result<()>) {
        let mut copy = Copy {
            to,
            from: pages.as_ptr() as u64 + done,
            length_bytes: pages.len() as u64 - done,
            mode: 0,
            copied_bytes: 0,
        };
        // SAFETY: the kernel reads and writes one `uffdio_copy`, and reads what is left of `pages`. It fills pages that nobody
        // could read yet, in a mapping that is only accessed by volatile reads and writes.
        let result = unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_COPY(), &mut copy) };
        (copy.copied_bytes, outcome(result))
    }

    /// As [`Self::place`], of zeros.
    ///
    /// # Errors
    /// Those of [`Self::place`].
    pub fn place_zeros(&self, block: usize, offset: u64, length_bytes: u64) -> Result<(), Error> {
        let Range { start, length_bytes } = self.range(block, offset, length_bytes)?;
        if let Some(parts) = self.parts(block, offset, length_bytes) {
            let parts = parts?;
            for offset in (0..parts.len()).step_by(ZEROS.len()) {
                // It ends where the slice does.
                let _beyond_its_end = parts.offset(offset).map(|parts| parts.copy_from(&ZEROS));
            }
            return Ok(());
        }
        let mut done = 0;
        while done < length_bytes {
            let range = Range { start: start + done, length_bytes: length_bytes - done };
            let mut zero = ZeroPage { range, mode: 0, zeroed_bytes: 0 };
            // SAFETY: the kernel reads and writes one `uffdio_zeropage`, and fills pages as in `place`.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_ZEROPAGE(), &mut zero) };
            let left = start + done..start + length_bytes;
            let what = || format!("clear {length_bytes:#x} bytes at {offset:#x} of block number {block}");
            done += self.progress(outcome(result), zero.zeroed_bytes, (left, PAGE_SIZE_BYTES), what)?;
        }
        Ok(())
    }

    /// Huge pages of block number `block` lack nothing: whoever waits for one goes on. They are as they were placed, and zeros where they
    /// never were. Harmless for those that are complete.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], also for a block of other pages or a part of one; [`Error::Call`]: the block is not watched any more.
    pub fn complete(&self, block: usize, offset: u64, length_bytes: u64) -> Result<(), Error> {
        let Range { start, length_bytes } = self.range(block, offset, length_bytes)?;
        let outside = Error::OutOfBounds { block, offset, length_bytes };
        let page_bytes = self.page_bytes(block);
        let parts = self.parts(block, offset, length_bytes).filter(|_| {
            let whole = |number: u64| number.is_multiple_of(page_bytes);
            whole(offset) && whole(length_bytes)
        });
        let parts = parts.ok_or(outside)??;
        let mut done = 0;
        while done < length_bytes {
            // One that nothing was ever placed in is in the file from here on.
            let _is_read = parts.get_ref::<u8>(done as usize).map(|byte| byte.load());
            let range = Range { start: start + done, length_bytes: page_bytes };
            let mut proceed = Continue { range, mode: 0, mapped_bytes: 0 };
            // SAFETY: the kernel reads and writes one `uffdio_continue`, and maps pages of the file of a mapping that we keep.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_CONTINUE(), &mut proceed) };
            let what = || format!("show {length_bytes:#x} bytes at {offset:#x} of block number {block}");
            let left = start + done..start + done + page_bytes;
            done += self.progress(outcome(result), proceed.mapped_bytes, (left, page_bytes), what)?;
        }
        Ok(())
    }

    /// Bytes of the pages that a block lies in.
    #[must_use]
    pub fn page_bytes(&self, block: usize) -> u64 {
        self.blocks.get(block).map_or(PAGE_SIZE_BYTES, |block| block.page_bytes)
    }

    /// Bytes of a block in huge pages, by the mapping that is for their parts.
    fn parts(&self, block: usize, offset: u64, length_bytes: u64) -> Option<Result<RamSlice<'_>, Error>> {
        let parts = self.blocks.get(block)?.parts.as_ref()?;
        let slice = parts.get_slice(offset as usize, length_bytes as usize);
        Some(slice.map_err(|_| Error::OutOfBounds { block, offset, length_bytes }))
    }

    /// Bytes of the addresses `left` that a call dealt with: those it says, or a page that is there already.
    fn progress(
        &self,
        result: io::Result<()>,
        done_bytes: i64,
        (left, page_bytes): (std::ops::Range<u64>, u64),
        what: impl FnOnce() -> String,
    ) -> Result<u64, Error> {
        let left_bytes = left.end - left.start;
        let Err(source) = result else { return Ok(left_bytes) };
        match source.raw_os_error() {
            // Some were done before one that was not: that one is looked at next.
            Some(libc::EAGAIN) => Ok(u64::try_from(done_bytes).unwrap_or(0).min(left_bytes)),
            Some(libc::EEXIST) => {
                let page = Range { start: left.start, length_bytes: left_bytes.min(page_bytes) };
                // Somebody else put it there, and whoever waits has not heard of it.
                self.wake_range(&page, what)?;
                Ok(page.length_bytes)
            }
            _ => Err(Error::Call { what: what(), source }),
        }
    }

    /// Lets go on who waits for one of these pages, to look again: for pages that came to be there in another way.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], [`Error::Call`].
    pub fn wake(&self, block: usize, offset: u64, length_bytes: u64) -> Result<(), Error> {
        let range = self.range(block, offset, length_bytes)?;
        let what = || format!("wake who waits for {offset:#x}+{length_bytes:#x} of block number {block}");
        self.wake_range(&range, what)
    }

    fn wake_range(&self, range: &Range, what: impl FnOnce() -> String) -> Result<(), Error> {
        // SAFETY: the kernel reads one `uffdio_range`.
        let result = unsafe { ioctl_with_ref(&self.fd, UFFDIO_WAKE(), range) };
        check(result, what)
    }

    /// Brings no more pages of a block: those that are missing are zeros from now on, and nobody waits for them.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`], [`Error::Call`].
    pub fn unregister(&self, block: usize) -> Result<(), Error> {
        let length_bytes = self.blocks.get(block).map_or(0, |block| block.mapping.size() as u64);
        let range = self.range(block, 0, length_bytes)?;
        // SAFETY: the kernel reads one `uffdio_range`, of a mapping that we keep.
        let result = unsafe { ioctl_with_ref(&self.fd, UFFDIO_UNREGISTER(), &range) };
        check(result, || format!("stop watching block number {block} for missing pages"))?;
        if let Some(block) = self.blocks.get(block) {
            block.small.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        Ok(())
    }

    /// Waits until somebody touches a missing page, and adds all who did since to `faults`. Each must be answered, by placing the
    /// page or by [waking](Self::wake) who waits. Adds nothing after [`Self::end`], once all who came before were told.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn faults(&self, faults: &mut Vec<Fault>) -> Result<(), Error> {
        let mut messages = [0; MESSAGES * MESSAGE_BYTES];
        loop {
            let count = match rustix::io::read(&self.fd, &mut messages) {
                Ok(count) => count,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                Err(errno) => return Err(failed("read who waits for missing pages", errno)),
            };
            let (messages, _) = messages.get(..count).unwrap_or_default().as_chunks::<MESSAGE_BYTES>();
            if !messages.is_empty() {
                faults.extend(messages.iter().filter_map(|message| self.fault(message)));
                return Ok(());
            }
            let mut descriptors = [&self.fd, &self.ended].map(|fd| PollFd::new(fd, PollFlags::IN));
            match rustix::event::poll(&mut descriptors, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed("wait for who touches missing pages", errno)),
            }
            let [pages, ended] = descriptors.map(|descriptor| !descriptor.revents().is_empty());
            if ended && !pages {
                return Ok(());
            }
        }
    }

    /// Ends the wait of [`Self::faults`], now and from now on.
    pub fn end(&self) {
        // It fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.ended, &1_u64.to_ne_bytes());
    }

    /// Who waits, by a message of the kernel's: `event` at byte 0, `flags` at 8, `address` at 16, `ptid` at 24.
    fn fault(&self, message: &[u8; MESSAGE_BYTES]) -> Option<Fault> {
        let (event, address) = (message[0], message.get(16..24)?.try_into().ok().map(u64::from_ne_bytes)?);
        if event != UFFD_EVENT_PAGEFAULT {
            // None was asked for.
            log::warn!("userfaultfd: event {event:#x} is not known");
            return None;
        }
        let offset_in = |block: &Watched| {
            let offset = address.checked_sub(block.mapping.as_ptr() as u64)?;
            (offset < block.mapping.size() as u64).then_some(offset - offset % block.page_bytes)
        };
        let thread = message.get(24..28)?.try_into().ok().map(u32::from_ne_bytes)?;
        let found = self.blocks.iter().enumerate();
        found.filter_map(|(block, watched)| Some(Fault { block, offset: offset_in(watched)?, thread })).next()
    }

    /// Addresses of whole pages of a block.
    fn range(&self, block: usize, offset: u64, length_bytes: u64) -> Result<Range, Error> {
        let whole = |number: u64| number.is_multiple_of(PAGE_SIZE_BYTES);
        let mapping = self.blocks.get(block).map(|block| &block.mapping).filter(|mapping| {
            let inside = offset.checked_add(length_bytes).is_some_and(|end| end <= mapping.size() as u64);
            inside && whole(offset) && whole(length_bytes)
        });
        let mapping = mapping.ok_or(Error::OutOfBounds { block, offset, length_bytes })?;
        Ok(Range { start: mapping.as_ptr() as u64 + offset, length_bytes })
    }
}

/// A descriptor, and what the kernel offers.
fn agree(purpose: Purpose) -> Result<(OwnedFd, u64), Error> {
    let fd = open(purpose)?;
    let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_THREAD_ID, ioctls: 0 };
    // SAFETY: the kernel reads and writes one `uffdio_api`.
    let result = unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) };
    check(result, || "agree on a version of userfaultfd".to_owned())?;
    match api.features & UFFD_FEATURE_MISSING_SHMEM {
        0 => Err(Error::Unsuitable { features: api.features }),
        _ => Ok((fd, api.features)),
    }
}

fn check_huge(features: u64) -> Result<(), Error> {
    let needed = UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
    if features & needed == needed { Ok(()) } else { Err(Error::UnsuitableForHugePages { features }) }
}

/// By the system call, or by the device for those who may open it.
fn open(purpose: Purpose) -> Result<OwnedFd, Error> {
    let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if purpose == Purpose::Filling {
        flags |= UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
    }
    // SAFETY: the descriptor is used in this file only, for mappings of guest memory.
    let made = unsafe { rustix::mm::userfaultfd(flags) };
    let system_call = match made {
        Ok(fd) => return Ok(fd),
        // An older kernel.
        Err(rustix::io::Errno::INVAL) if purpose == Purpose::Filling => return open(Purpose::Waiting),
        Err(errno) => errno.into(),
    };
    let device = match File::options().read(true).write(true).open(DEVICE) {
        Ok(device) => device,
        Err(source) => return Err(Error::Unavailable { system_call, source }),
    };
    // SAFETY: the kernel takes the flags by value, which are those of the system call.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags.bits().into()) };
    check(fd, || format!("make a userfaultfd by {DEVICE}"))?;
    // SAFETY: the call made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Of a call that was just made.
fn outcome(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check(result: i32, what: impl FnOnce() -> String) -> Result<(), Error> {
    outcome(result).map_err(|source| Error::Call { what: what(), source })
}

fn failed(what: &str, errno: rustix::io::Errno) -> Error {
    Error::Call { what: what.to_owned(), source: errno.into() }
}

#[cfg(test)]
mod tests;
