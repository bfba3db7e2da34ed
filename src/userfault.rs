//! Missing pages of guest memory, brought when somebody touches them (userfaultfd(2)).
//!
//! Whoever touches a missing page waits in the kernel, be it a vCPU in the guest, a thread of this process or an io_uring
//! request that the kernel serves, until the page has been placed. Everything else of the memory works as ever.
//!
//! A page of a memfd is missing until something is written to it, through whatever mapping, and is missing again once a hole was
//! punched there. It is placed whole: nobody sees half of one. Placing a page that is there changes nothing.
//!
//! A vCPU that waits cannot be stopped: some KVMs do not listen to signals meanwhile. But one that was told to stop runs no further
//! instruction when it has its page ([`VcpuManager::hold`](crate::vcpu::VcpuManager::hold)), and until then it runs none either.
//!
//! The structures and numbers are those of `linux/userfaultfd.h`.
//!
//! Absent: write protection, minor faults, huge pages, and what to place: that is for who [waits](Userfault::faults) for faults.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use bus::GuestMapping;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::mm::UserfaultfdFlags;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use crate::memory::{PAGE_SIZE_BYTES, RamBlock};

/// Where a process gets a descriptor that may not make the system call.
const DEVICE: &str = "/dev/userfaultfd";

const UFFDIO: u32 = 0xaa;
/// Version of the interface.
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;
/// Messages that are read at a time.
const MESSAGES: usize = 16;

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
    /// They stay mapped while the kernel tells us of them.
    mappings: Vec<Arc<GuestMapping>>,
}

impl Userfault {
    /// From here on whoever touches a missing page of `blocks` waits until it is placed.
    ///
    /// # Errors
    /// [`Error::Unavailable`], [`Error::Unsuitable`], [`Error::Call`]: nothing is registered then.
    pub fn register(blocks: &[RamBlock]) -> Result<Self, Error> {
        let fd = open()?;
        let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_THREAD_ID, ioctls: 0 };
        // SAFETY: the kernel reads and writes one `uffdio_api`.
        let result = unsafe { ioctl_with_mut_ref(&fd, UFFDIO_API(), &mut api) };
        check(result, || "agree on a version of userfaultfd".to_owned())?;
        if api.features & UFFD_FEATURE_MISSING_SHMEM == 0 {
            return Err(Error::Unsuitable { features: api.features });
        }
        let ended = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("make an eventfd", errno))?;
        let mappings = blocks.iter().map(|block| Arc::clone(&block.mapping)).collect();
        let userfault = Self { fd, ended, mappings };
        for (index, block) in blocks.iter().enumerate() {
            let range = userfault.range(index, 0, block.length_bytes())?;
            let mut register = Register { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
            // SAFETY: the kernel reads and writes one `uffdio_register`. The range is a mapping that we keep, and what happens to
            // those who touch it is only that they wait.
            let result = unsafe { ioctl_with_mut_ref(&userfault.fd, UFFDIO_REGISTER(), &mut register) };
            check(result, || format!("watch memory block \"{}\" for missing pages", block.name))?;
        }
        Ok(userfault)
    }

    /// Places whole pages from `offset` of block number `block` on, and lets go on who waits for one of them. Pages that are there
    /// stay as they are.
    ///
    /// # Errors
    /// [`Error::OutOfBounds`]; [`Error::Call`]: there is no memory, or the block is not watched any more.
    pub fn place(&self, block: usize, offset: u64, pages: &[u8]) -> Result<(), Error> {
        let Range { start, length_bytes } = self.range(block, offset, pages.len() as u64)?;
        let mut done = 0;
        while done < length_bytes {
            let mut copy = Copy {
                to: start + done,
                from: pages.as_ptr() as u64 + done,
                length_bytes: length_bytes - done,
                mode: 0,
                copied_bytes: 0,
            };
            // SAFETY: the kernel reads and writes one `uffdio_copy`, and reads what is left of `pages`. It fills pages that nobody
            // could read yet, in a mapping that is only accessed by volatile reads and writes.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_COPY(), &mut copy) };
            let what = || format!("place {length_bytes:#x} bytes at {offset:#x} of block number {block}");
            done += self.progress(result, copy.copied_bytes, start + done..start + length_bytes, what)?;
        }
        Ok(())
    }

    /// As [`Self::place`], of zeros.
    ///
    /// # Errors
    /// Those of [`Self::place`].
    pub fn place_zeros(&self, block: usize, offset: u64, length_bytes: u64) -> Result<(), Error> {
        let Range { start, length_bytes } = self.range(block, offset, length_bytes)?;
        let mut done = 0;
        while done < length_bytes {
            let range = Range { start: start + done, length_bytes: length_bytes - done };
            let mut zero = ZeroPage { range, mode: 0, zeroed_bytes: 0 };
            // SAFETY: the kernel reads and writes one `uffdio_zeropage`, and fills pages as in `place`.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, UFFDIO_ZEROPAGE(), &mut zero) };
            let what = || format!("clear {length_bytes:#x} bytes at {offset:#x} of block number {block}");
            done += self.progress(result, zero.zeroed_bytes, start + done..start + length_bytes, what)?;
        }
        Ok(())
    }

    /// Bytes of the addresses `left` that a call dealt with: those it says, or a page that is there already.
    fn progress(
        &self,
        result: i32,
        done_bytes: i64,
        left: std::ops::Range<u64>,
        what: impl FnOnce() -> String,
    ) -> Result<u64, Error> {
        let left_bytes = left.end - left.start;
        if result == 0 {
            return Ok(left_bytes);
        }
        let source = io::Error::last_os_error();
        match source.raw_os_error() {
            // Some were done before one that was not: that one is looked at next.
            Some(libc::EAGAIN) => Ok(u64::try_from(done_bytes).unwrap_or(0).min(left_bytes)),
            Some(libc::EEXIST) => {
                let page = Range { start: left.start, length_bytes: left_bytes.min(PAGE_SIZE_BYTES) };
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
        let length_bytes = self.mappings.get(block).map_or(0, |mapping| mapping.size() as u64);
        let range = self.range(block, 0, length_bytes)?;
        // SAFETY: the kernel reads one `uffdio_range`, of a mapping that we keep.
        let result = unsafe { ioctl_with_ref(&self.fd, UFFDIO_UNREGISTER(), &range) };
        check(result, || format!("stop watching block number {block} for missing pages"))
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
        let offset_in = |mapping: &Arc<GuestMapping>| {
            let offset = address.checked_sub(mapping.as_ptr() as u64)?;
            (offset < mapping.size() as u64).then_some(offset - offset % PAGE_SIZE_BYTES)
        };
        let thread = message.get(24..28)?.try_into().ok().map(u32::from_ne_bytes)?;
        let found = self.mappings.iter().enumerate();
        found.filter_map(|(block, mapping)| Some(Fault { block, offset: offset_in(mapping)?, thread })).next()
    }

    /// Addresses of whole pages of a block.
    fn range(&self, block: usize, offset: u64, length_bytes: u64) -> Result<Range, Error> {
        let whole = |number: u64| number.is_multiple_of(PAGE_SIZE_BYTES);
        let mapping = self.mappings.get(block).filter(|mapping| {
            let inside = offset.checked_add(length_bytes).is_some_and(|end| end <= mapping.size() as u64);
            inside && whole(offset) && whole(length_bytes)
        });
        let mapping = mapping.ok_or(Error::OutOfBounds { block, offset, length_bytes })?;
        Ok(Range { start: mapping.as_ptr() as u64 + offset, length_bytes })
    }
}

/// By the system call, or by the device for those who may open it.
fn open() -> Result<OwnedFd, Error> {
    // SAFETY: the descriptor is used in this file only, for mappings of guest memory.
    let made = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) };
    let system_call = match made {
        Ok(fd) => return Ok(fd),
        Err(errno) => errno.into(),
    };
    let device = match File::options().read(true).write(true).open(DEVICE) {
        Ok(device) => device,
        Err(source) => return Err(Error::Unavailable { system_call, source }),
    };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the kernel takes the flags by value.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as libc::c_ulong) };
    check(fd, || format!("make a userfaultfd by {DEVICE}"))?;
    // SAFETY: the call made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32, what: impl FnOnce() -> String) -> Result<(), Error> {
    match result {
        0.. => Ok(()),
        _ => Err(Error::Call { source: io::Error::last_os_error(), what: what() }),
    }
}

fn failed(what: &str, errno: rustix::io::Errno) -> Error {
    Error::Call { what: what.to_owned(), source: errno.into() }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::os::unix::fs::FileExt;
    use std::thread::{self, ScopedJoinHandle};

    use vm_memory::ReadVolatile;

    use super::*;
    use crate::memory::{GuestRam, RAM_LOW};
    use crate::vcpu::tests::TestGuest;

    const PAGE: u64 = PAGE_SIZE_BYTES;

    fn ram() -> GuestRam {
        GuestRam::new(1 << 20, &[("namespace".into(), 1 << 16)]).unwrap()
    }

    /// Who waits, by whichever thread.
    fn next(userfault: &Userfault) -> Vec<Fault> {
        let mut faults = Vec::new();
        userfault.faults(&mut faults).unwrap();
        let mut known =
            faults.iter().map(|fault| std::path::PathBuf::from(format!("/proc/self/task/{}", fault.thread)));
        assert!(known.all(|thread| thread.exists()), "{faults:?}");
        faults.iter_mut().for_each(|fault| fault.thread = 0);
        faults
    }

    fn word(block: &RamBlock, offset: u64) -> u32 {
        let mut data = [0; 4];
        block.read(offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    /// Has a thread look at a word.
    fn look<'a>(
        scope: &'a thread::Scope<'a, '_>,
        block: &'a RamBlock,
        offset: u64,
    ) -> ScopedJoinHandle<'a, u32> {
        scope.spawn(move || word(block, offset))
    }

    #[test]
    fn who_touches_a_missing_page_waits_for_it() {
        let ram = ram();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        let [low, namespace] = ram.blocks() else { panic!("there are two") };
        thread::scope(|scope| {
            let one = look(scope, low, 5 * PAGE + 8);
            assert_eq!(next(&userfault), [Fault { block: 0, offset: 5 * PAGE, thread: 0 }]);
            let two = look(scope, namespace, 0xfffc);
            assert_eq!(next(&userfault), [Fault { block: 1, offset: 0xf000, thread: 0 }]);
            userfault.place(1, 0xf000, &[2; PAGE as usize]).unwrap();
            assert_eq!(two.join().unwrap(), 0x0202_0202);
            assert!(!one.is_finished(), "its page is another");
            userfault.place(0, 4 * PAGE, &[1; 3 * PAGE as usize]).unwrap();
            assert_eq!(one.join().unwrap(), 0x0101_0101);
        });
        assert_eq!([4, 6].map(|page| word(low, page * PAGE)), [0x0101_0101; 2], "they came with it");
        assert_eq!(low.populated_ranges().unwrap(), std::slice::from_ref(&(4 * PAGE..7 * PAGE)));
        assert_eq!(low.mapping.bitmap().get_and_reset(), [0; 4], "nobody has written");
    }

    #[test]
    fn what_is_there_stays_as_it_is() {
        let ram = ram();
        let low = ram.block(RAM_LOW).unwrap();
        low.write(2 * PAGE, &[9; 4]).unwrap();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        userfault.place(0, PAGE, &[1; 3 * PAGE as usize]).unwrap();
        assert_eq!([1, 2, 3].map(|page| word(low, page * PAGE)), [0x0101_0101, 0x0909_0909, 0x0101_0101]);
        assert_eq!(word(low, 2 * PAGE + 4), 0);
        userfault.place(0, 2 * PAGE, &[1; PAGE as usize]).unwrap();
        userfault.place_zeros(0, 0, 6 * PAGE).unwrap();
        let words = [0, 1, 2, 3, 5].map(|page| word(low, page * PAGE));
        assert_eq!(words, [0, 0x0101_0101, 0x0909_0909, 0x0101_0101, 0]);
    }

    #[test]
    fn who_waits_for_a_page_that_another_way_brought_goes_on() {
        let ram = ram();
        let low = ram.block(RAM_LOW).unwrap();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        let file = low.mapping.file_offset().unwrap().file();
        thread::scope(|scope| {
            for (page, by_zeros) in [(3, false), (5, true)] {
                let waits = look(scope, low, page * PAGE);
                assert_eq!(next(&userfault), [Fault { block: 0, offset: page * PAGE, thread: 0 }]);
                file.write_all_at(&[7; 4], page * PAGE).unwrap();
                match by_zeros {
                    true => userfault.place_zeros(0, page * PAGE, PAGE).unwrap(),
                    false => userfault.place(0, page * PAGE, &[1; PAGE as usize]).unwrap(),
                }
                assert_eq!(waits.join().unwrap(), 0x0707_0707);
            }
        });
    }

    #[test]
    fn what_the_kernel_touches_for_us_waits_as_well() {
        let ram = ram();
        let low = ram.block(RAM_LOW).unwrap();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &[7; 8192]).unwrap();
        file.rewind().unwrap();
        thread::scope(|scope| {
            let reader =
                scope.spawn(|| file.read_exact_volatile(&mut low.slice(PAGE - 4, 8).unwrap()).unwrap());
            for page in [0, 1] {
                assert_eq!(next(&userfault), [Fault { block: 0, offset: page * PAGE, thread: 0 }]);
                userfault.place_zeros(0, page * PAGE, PAGE).unwrap();
            }
            reader.join().unwrap();
        });
        assert_eq!(
            [PAGE - 8, PAGE - 4, PAGE, PAGE + 4].map(|offset| word(low, offset)),
            [0, 0x0707_0707, 0x0707_0707, 0]
        );
    }

    #[test]
    fn a_guest_waits_for_its_pages() {
        // A word at 0x20000 to port 0x10, for ever. Its own page is 1.
        const TELL: [u8; 9] = [0xa1, 0x00, 0x00, 0x02, 0x00, 0xe7, 0x10, 0xeb, 0xf7];
        let guest = TestGuest::new(1, &TELL);
        let userfault = Userfault::register(guest.ram.blocks()).unwrap();
        guest.vcpus.resume().unwrap();
        loop {
            let faults = next(&userfault);
            let data = Fault { block: 0, offset: 0x20_000, thread: 0 };
            if faults.contains(&data) {
                userfault.place(0, data.offset, &[3; PAGE as usize]).unwrap();
                break;
            }
            for fault in faults {
                userfault.place_zeros(fault.block, fault.offset, PAGE).unwrap();
            }
        }
        assert_eq!(guest.next_value(), 0x0303_0303);
        guest.vcpus.pause().unwrap();
    }

    #[test]
    fn what_is_still_missing_at_the_end_is_zeros() {
        let ram = ram();
        let [low, namespace] = ram.blocks() else { panic!("there are two") };
        let userfault = Userfault::register(ram.blocks()).unwrap();
        thread::scope(|scope| {
            let (one, two) = (look(scope, low, 0), look(scope, namespace, 0));
            let mut faults = Vec::new();
            while faults.len() < 2 {
                userfault.faults(&mut faults).unwrap();
            }
            userfault.unregister(0).unwrap();
            assert_eq!((one.join().unwrap(), word(low, PAGE)), (0, 0));
            assert!(userfault.place(0, 0, &[1; PAGE as usize]).is_err(), "it is not watched any more");
            drop(userfault);
            assert_eq!(two.join().unwrap(), 0);
        });
    }

    #[test]
    fn a_wait_for_faults_has_an_end() {
        let ram = ram();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        thread::scope(|scope| {
            let server = scope.spawn(|| next(&userfault));
            userfault.end();
            assert_eq!(server.join().unwrap(), []);
        });
        assert_eq!(next(&userfault), []);
        thread::scope(|scope| {
            let looked = look(scope, &ram.blocks()[0], 0);
            // Whoever came is told all the same.
            while next(&userfault).is_empty() {}
            userfault.place_zeros(0, 0, PAGE).unwrap();
            looked.join().unwrap();
        });
    }

    #[test]
    fn only_whole_pages_of_a_block_are_placed() {
        let ram = ram();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        for (block, offset, length) in
            [(2, 0, PAGE), (0, 1, PAGE), (0, 0, PAGE - 1), (1, 1 << 16, PAGE), (0, u64::MAX - 4095, PAGE)]
        {
            let outside = |result| matches!(result, Err(Error::OutOfBounds { .. }));
            assert!(outside(userfault.place_zeros(block, offset, length)), "{block} {offset:#x}+{length:#x}");
            assert!(outside(userfault.place(block, offset, &vec![0; length as usize])));
            assert!(outside(userfault.wake(block, offset, length)));
        }
    }
}
