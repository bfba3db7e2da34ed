//! `KVM_RUN`: one stretch of guest execution, and how to end it from outside.
//!
//! A vCPU thread is kicked by a signal. Its handler only sets `immediate_exit` in the thread's own run page, so that a
//! signal that comes just before `KVM_RUN` is not lost: the call returns at once, after it completed the access of the
//! exit before.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;

use bus::Bus;
use kvm_bindings as kvm;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::Error;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs, null elsewhere. Constant initialisation without a destructor:
    /// the signal handler may touch it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: non-null only while `Kickable` lives, whose vCPU keeps the run page mapped; this thread alone and the
        // kernel use that byte.
        unsafe { flag.write_volatile(1) };
    }
}

/// The signal that makes a vCPU thread leave the guest.
pub(crate) fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the handler of [`kick_signal`], once for the process.
pub(crate) fn install_kick_handler() -> Result<(), Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| register_signal_handler(kick_signal(), leave_guest));
    installed.map_err(Error::call(format!("handle signal {}", kick_signal())))
}

/// A vCPU on the thread that runs it, which from here on can be kicked.
pub(crate) struct Kickable {
    fd: VcpuFd,
    /// Not to be sent to another thread: the signal handler finds the vCPU by thread.
    _thread: std::marker::PhantomData<*mut u8>,
}

impl Kickable {
    pub(crate) fn new(mut fd: VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        Self { fd, _thread: std::marker::PhantomData }
    }

    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Whether the next [`Self::run`] only completes the access of the exit before and then is interrupted.
    pub(crate) fn set_immediate_exit(&mut self, on: bool) {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: a byte of the mapped run page; volatile, because the signal handler writes it as well.
        unsafe { flag.write_volatile(on.into()) };
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Why the guest was left, when it was not an access that [`Kickable::run`] served.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// An access was served, or nothing happened: run on.
    Served,
    /// By a signal or `immediate_exit`; no access is pending.
    Interrupted,
    /// The vCPU's dirty ring must be emptied before it can go on.
    RingFull,
    /// Triple fault, or the guest asked the hypervisor for it.
    Reset,
    /// The guest asked the hypervisor to power it off.
    PowerOff,
    /// KVM cannot go on, and why.
    Stuck(String),
}

impl Kickable {
    /// Runs the guest until it needs this process, and serves a port or memory access on the buses.
    pub(crate) fn run(&mut self, ports: &Bus, mmio: &Bus) -> Exit {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => self.serve_port(ports),
            Ok(VcpuExit::MmioRead(address, data)) => {
                in_natural_pieces(data.len(), |start, end| {
                    mmio.read(address.wrapping_add(start as u64), &mut data[start..end]);
                });
                Exit::Served
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                in_natural_pieces(data.len(), |start, end| {
                    mmio.write(address.wrapping_add(start as u64), &data[start..end]);
                });
                Exit::Served
            }
            Ok(VcpuExit::Shutdown) => Exit::Reset,
            Ok(VcpuExit::SystemEvent(kvm::KVM_SYSTEM_EVENT_RESET, _)) => Exit::Reset,
            Ok(VcpuExit::SystemEvent(kvm::KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Exit::PowerOff,
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                Exit::Stuck(format!("system event {kind} is not known here"))
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Exit::Served,
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                Exit::Stuck(format!("hardware refused entry with reason {reason:#x} on host CPU {cpu}"))
            }
            Ok(VcpuExit::Unsupported(kvm::KVM_EXIT_DIRTY_RING_FULL)) => Exit::RingFull,
            Ok(VcpuExit::InternalError) => Exit::Stuck(self.internal_error()),
            Ok(other) => Exit::Stuck(format!("unexpected exit {other:?}")),
            Err(error) => match error.errno() {
                libc::EINTR => Exit::Interrupted,
                // A vCPU that waits for its start-up message was woken for something else.
                libc::EAGAIN => Exit::Served,
                _ => Exit::Stuck(format!("KVM_RUN failed: {error}")),
            },
        }
    }

    /// A port access may be a string instruction's: `count` elements of `size` bytes, all at the same port.
    fn serve_port(&mut self, ports: &Bus) -> Exit {
        let run = self.fd.get_kvm_run();
        // SAFETY: the kernel reported KVM_EXIT_IO, for which this member is valid; its fields are integers.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (port, size) = (u64::from(io.port), usize::from(io.size));
        let length = size * io.count as usize;
        if !matches!(size, 1 | 2 | 4) {
            return Exit::Stuck(format!("port access of {size} bytes"));
        }
        let page = ptr::from_mut(run).cast::<u8>();
        // SAFETY: the kernel puts the data in the page after the run structure, within the mapping that `fd` keeps, and
        // does not touch it before the next KVM_RUN, for which this function's `&mut self` is needed.
        let data = unsafe { std::slice::from_raw_parts_mut(page.add(io.data_offset as usize), length) };
        serve_elements(ports, port, size, u32::from(io.direction) == kvm::KVM_EXIT_IO_IN, data);
        Exit::Served
    }

    fn internal_error(&mut self) -> String {
        // SAFETY: the kernel reported KVM_EXIT_INTERNAL_ERROR, for which this member is valid; its fields are integers.
        let error = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let name = match error.suberror {
            kvm::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate the instruction",
            kvm::KVM_INTERNAL_ERROR_SIMUL_EX => "an exception during the delivery of another",
            kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit during the delivery of an event",
            kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit of unknown reason",
            _ => "an unknown error",
        };
        let count = (error.ndata as usize).min(error.data.len());
        let data: Vec<_> = error.data[..count].iter().map(|word| format!("{word:#x}")).collect();
        format!("internal error {} ({name}), data {}", error.suberror, data.join(" "))
    }
}

fn serve_elements(ports: &Bus, port: u64, size: usize, input: bool, data: &mut [u8]) {
    for element in data.chunks_exact_mut(size) {
        if input {
            ports.read(port, element);
        } else {
            ports.write(port, element);
        }
    }
}

/// KVM hands over up to 8 bytes of any length (an access that crosses a page is cut there); devices know 1, 2, 4 and 8.
fn in_natural_pieces(length: usize, mut access: impl FnMut(usize, usize)) {
    let mut start = 0;
    while start < length {
        let piece = 1 << (length - start).ilog2();
        access(start, start + piece);
        start += piece;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Remembers writes; reads count up.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<Vec<u8>>>, std::sync::atomic::AtomicU8);

    impl bus::BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            assert_eq!(offset, 1);
            data.fill(self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        }
        fn write(&self, offset: u64, data: &[u8]) {
            assert_eq!(offset, 1);
            self.0.lock().unwrap().push(data.to_vec());
        }
    }

    #[test]
    fn string_elements_are_accesses_of_their_own() {
        let (bus, recorder) = (Bus::new(), Arc::new(Recorder::default()));
        bus.insert(0x10, 8, recorder.clone()).unwrap();
        let mut data = [1, 2, 3, 4];
        serve_elements(&bus, 0x11, 2, false, &mut data);
        assert_eq!(*recorder.0.lock().unwrap(), [[1, 2], [3, 4]]);
        serve_elements(&bus, 0x11, 2, true, &mut data);
        assert_eq!(data, [0, 0, 1, 1]);
    }

    #[test]
    fn odd_lengths_reach_devices_in_widths_that_they_know() {
        for (length, expected) in [
            (1, vec![1]),
            (2, vec![2]),
            (3, vec![2, 1]),
            (4, vec![4]),
            (5, vec![4, 1]),
            (7, vec![4, 2, 1]),
            (8, vec![8]),
        ] {
            let mut pieces = Vec::new();
            in_natural_pieces(length, |start, end| {
                assert_eq!(start, pieces.iter().sum::<usize>());
                pieces.push(end - start);
            });
            assert_eq!(pieces, expected);
        }
    }
}
