//! One vCPU on its thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use bus::Bus;
use kvm_ioctls::VcpuFd;

use super::state::{self, CpuidLeaf, DebugRegisters, EventState, Msr, Registers, SystemRegisters, VcpuState};
use super::{BootRegisters, cpuid, msr};
use crate::kvm::run::{Exit, Kickable};
use crate::kvm::{Error, Vm, is_same_tsc_frequency, tsc_offset, xsave};
use crate::startup;

/// Offset of the LINT1 entry in a local APIC's registers.
const LVT_LINT1: usize = 0x360;
/// Delivers an NMI, unmasked.
const LVT_DELIVERY_NMI: u32 = 0x400;

/// Bytes of an XSAVE area that has no component beyond SSE: the fixed part and the header.
const XSAVE_BYTES_MIN: usize = 576;

/// Where a vCPU's accesses go.
#[derive(Clone)]
pub struct Buses {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Guest physical memory that is not RAM.
    pub mmio: Arc<Bus>,
}

/// What a vCPU tells the machine. The vCPU is paused from then on.
#[derive(Debug)]
pub enum VcpuEvent {
    /// The guest wants a reset: a triple fault, usually on purpose.
    Reset,
    /// The guest powered itself off.
    PowerOff,
    /// KVM cannot go on with it.
    Failed(Error),
}

/// Called on the vCPU's thread with its number. Must not wait for that vCPU.
pub type EventHandler = Arc<dyn Fn(u32, VcpuEvent) + Send + Sync>;

/// Work for a vCPU's thread.
pub(super) type Command = Box<dyn FnOnce(&mut Vcpu) + Send>;

pub(super) struct Vcpu {
    pub(super) index: u32,
    kickable: Kickable,
    vm: Arc<Vm>,
    running: bool,
    /// It was told of an end: until it is put into another state there is nothing to be run.
    has_ended: bool,
    /// Until then it runs no guest, though it is not paused.
    resting_until: Option<Instant>,
    /// As it was before it was first booted, restored or run.
    power_on: Option<VcpuState>,
    exits: Arc<AtomicU64>,
    buses: Buses,
    on_event: EventHandler,
    /// As it was read back.
    cpuid: Vec<CpuidLeaf>,
    /// What KVM was asked for last, of which it lets the vCPU have all, and perhaps more.
    granted: Option<Vec<CpuidLeaf>>,
    msrs: Vec<u32>,
    xsave_bytes: usize,
}

/// What a vCPU's thread is made from.
pub(super) struct Parts {
    pub(super) index: u32,
    pub(super) fd: VcpuFd,
    pub(super) vm: Arc<Vm>,
    /// Counts how often KVM came back from the guest.
    pub(super) exits: Arc<AtomicU64>,
    pub(super) buses: Buses,
    pub(super) on_event: EventHandler,
    pub(super) cpuid: Vec<CpuidLeaf>,
    pub(super) msrs: Vec<u32>,
    pub(super) xsave_bytes: usize,
}

impl Vcpu {
    /// On its thread.
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { index, fd, vm, exits, buses, on_event, cpuid, msrs, xsave_bytes } = parts;
        let kickable = Kickable::new(fd);
        Self {
            index,
            kickable,
            vm,
            running: false,
            has_ended: false,
            resting_until: None,
            power_on: None,
            exits,
            buses,
            on_event,
            granted: None,
            cpuid,
            msrs,
            xsave_bytes,
        }
    }

    /// Until nobody can send commands any more.
    pub(super) fn serve(mut self, commands: &Receiver<Command>) {
        loop {
            if !self.running {
                let Ok(command) = commands.recv() else { return };
                command(&mut self);
                continue;
            }
            if let Some(left) = self.rest_that_is_left() {
                match commands.recv_timeout(left) {
                    Ok(command) => command(&mut self),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                continue;
            }
            match commands.try_recv() {
                Ok(command) => command(&mut self),
                Err(TryRecvError::Disconnected) => return,
                // A command that comes now comes with a kick, which ends the run.
                Err(TryRecvError::Empty) => {
                    if self.run() {
                        // Before the commands are looked at again: a kick after this is for a later command.
                        self.kickable.set_immediate_exit(false);
                    }
                }
            }
        }
    }

    /// Runs the guest for a stretch; `true` if it was interrupted, with no access pending.
    fn run(&mut self) -> bool {
        self.exits.fetch_add(1, Ordering::Relaxed);
        let event = match self.kickable.run(&self.buses.ports, &self.buses.mmio) {
            Exit::Served => return false,
            Exit::Interrupted => return true,
            Exit::RingFull => match self.vm.relieve_dirty_ring(self.index) {
                Ok(()) => return false,
                Err(error) => VcpuEvent::Failed(error),
            },
            Exit::Reset => VcpuEvent::Reset,
            Exit::PowerOff => VcpuEvent::PowerOff,
            Exit::Stuck(why) => {
                let rip = self.fd().get_regs().map_or(0, |registers| registers.rip);
                VcpuEvent::Failed(Error::Stuck { vcpu: self.index, rip, why })
            }
        };
        (self.running, self.has_ended) = (false, true);
        (self.on_event)(self.index, event);
        false
    }

    fn rest_that_is_left(&mut self) -> Option<Duration> {
        let left = self.resting_until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero());
        if left.is_none() {
            self.resting_until = None;
        }
        left
    }

    /// Runs the guest no more until then; `None`: at once. An access that is in progress is completed afterwards.
    pub(super) fn rest(&mut self, until: Option<Instant>) {
        self.resting_until = until;
    }

    /// Runs the guest from now on, and says when that is. One that has ended is over, whoever lets the machine go on that stood still
    /// meanwhile.
    pub(super) fn resume(&mut self) -> Option<Instant> {
        if self.has_ended {
            return None;
        }
        // Tells a guest with kvm-clock that it was stopped, so that its watchdogs do not complain. EINVAL: it has none.
        if let Err(error) = self.fd().kvmclock_ctrl()
            && error.errno() != libc::EINVAL
        {
            log::warn!("vCPU {}: cannot announce the pause to the guest: {error}", self.index);
        }
        self.running = true;
        self.resting_until = None;
        startup::vcpu_runs();
        Some(Instant::now())
    }

    /// Stops and completes the access that was in progress: with `immediate_exit` KVM does no more than that. (A string
    /// instruction may come back with further accesses, which are served.)
    pub(super) fn pause(&mut self) {
        while self.running {
            self.kickable.set_immediate_exit(true);
            if self.run() {
                self.running = false;
            }
        }
        self.kickable.set_immediate_exit(false);
    }

    /// Back to power-on, apart from the time stamp counter.
    pub(super) fn reset(&mut self) -> Result<(), Error> {
        self.paused("reset it")?;
        let power_on = self.power_on.clone().expect("VcpuManager::new has every vCPU remember it");
        let tsc_offset = tsc_offset::read(self.fd())?;
        self.restore(&VcpuState { tsc_offset, ..power_on }, 0)
    }

    /// Wires the local APIC as firmware would leave it: NMIs arrive at LINT1 (the PICs at LINT0 of the first vCPU, as KVM
    /// has it). Setting it also makes KVM route messages to this APIC, which it otherwise does only once some guest code
    /// switches its own APIC on. Then remembers everything, for [`Self::reset`].
    pub(super) fn power_on(&mut self) -> Result<(), Error> {
        let mut lapic = self.fd().get_lapic().map_err(Error::call("read a local APIC"))?;
        let nmi = LVT_DELIVERY_NMI.to_le_bytes().map(|byte| byte as std::ffi::c_char);
        lapic.regs[LVT_LINT1..LVT_LINT1 + 4].copy_from_slice(&nmi);
        self.fd().set_lapic(&lapic).map_err(Error::call("wire a local APIC"))?;
        self.power_on = Some(self.save()?);
        Ok(())
    }

    pub(super) fn boot(&mut self, registers: &BootRegisters) -> Result<(), Error> {
        self.paused("set its boot registers")?;
        registers.apply(self.fd())
    }

    /// Reads everything. Changes nothing.
    pub(super) fn save(&mut self) -> Result<VcpuState, Error> {
        self.paused("save it")?;
        let index = self.index;
        let read = |what| Error::call(format!("read the {what} of vCPU {index}"));
        let fd = self.fd();
        // First: it may have a pending start-up message turned into a state, which the others then show.
        let mp_state = fd.get_mp_state().map_err(read("run state"))?.mp_state;
        let registers = Registers::from_kvm(&fd.get_regs().map_err(read("registers"))?);
        let system = SystemRegisters::from_kvm(&fd.get_sregs().map_err(read("system registers"))?);
        let xsave = xsave::save(fd, self.xsave_bytes)?;
        let extended_controls =
            state::extended_controls(&fd.get_xcrs().map_err(read("extended control registers"))?);
        let msrs = msr::read(fd, &self.msrs)?;
        let lapic = state::lapic_bytes(&fd.get_lapic().map_err(read("local APIC"))?);
        let events = EventState::from_kvm(&fd.get_vcpu_events().map_err(read("events"))?);
        let debug = DebugRegisters::from_kvm(&fd.get_debug_regs().map_err(read("debug registers"))?);
        let tsc_khz = fd.get_tsc_khz().map_err(read("TSC frequency"))?;
        let tsc_offset = tsc_offset::read(fd)?;
        let cpuid = self.cpuid.clone();
        Ok(VcpuState {
            index,
            registers,
            system,
            xsave_bytes: xsave.len() as u32,
            xsave,
            extended_control_count: extended_controls.len() as u32,
            extended_controls,
            msr_count: msrs.len() as u32,
            msrs,
            lapic,
            events,
            debug,
            mp_state,
            tsc_khz,
            tsc_offset,
            cpuid_count: cpuid.len() as u32,
            cpuid,
        })
    }

    /// Checks `saved` and then sets everything, in this order, because each needs what comes before it:
    ///
    /// 1. CPUID (set before, where it was known who comes): decides which registers exist.
    /// 2. XCR0 and the like: decide which extended state is legal; then the extended state.
    /// 3. System registers with the APIC base, general registers.
    /// 4. TSC offset, then MSRs without the TSC deadline.
    /// 5. The local APIC, whose timer mode gives the deadline its meaning; then the TSC deadline.
    /// 6. Debug registers, events, and last the run state.
    pub(super) fn restore(&mut self, saved: &VcpuState, tsc_shift: u64) -> Result<(), Error> {
        self.paused("restore it")?;
        let index = self.index;
        self.check(saved).map_err(|why| Error::VcpuState { vcpu: index, why })?;
        self.take_cpuid(&saved.cpuid)?;
        let set = |what| Error::call(format!("set the {what} of vCPU {index}"));
        let fd = self.fd();
        if !saved.extended_controls.is_empty() {
            let controls = state::kvm_extended_controls(&saved.extended_controls);
            fd.set_xcrs(&controls).map_err(set("extended control registers"))?;
        }
        // A host that has more components has them behind those of the guest, and all of them in their first state.
        let mut extended_state = saved.xsave.clone();
        extended_state.resize(self.xsave_bytes, 0);
        xsave::restore(fd, &extended_state)?;
        fd.set_sregs(&saved.system.to_kvm()).map_err(set("system registers"))?;
        fd.set_regs(&saved.registers.to_kvm()).map_err(set("registers"))?;
        let tsc_offset = saved.tsc_offset.wrapping_add(tsc_shift);
        tsc_offset::write(fd, tsc_offset)?;
        if tsc_offset::read(fd)? != tsc_offset {
            log::warn!(
                "vCPU {index}: this KVM cannot offset time stamp counters (no VMX or SVM): the guest sees the host's, not {} more",
                tsc_offset.cast_signed()
            );
        }
        let (deadline, msrs): (Vec<_>, Vec<_>) =
            saved.msrs.iter().cloned().partition(|msr| msr.index == msr::TSC_DEADLINE);
        msr::write(fd, index, &msrs)?;
        fd.set_lapic(&state::kvm_lapic(&saved.lapic)).map_err(set("local APIC"))?;
        msr::write(fd, index, &deadline)?;
        fd.set_debug_regs(&saved.debug.to_kvm()).map_err(set("debug registers"))?;
        fd.set_vcpu_events(&saved.events.to_kvm()).map_err(set("events"))?;
        fd.set_mp_state(state::kvm_mp(saved.mp_state)).map_err(set("run state"))?;
        self.has_ended = false;
        Ok(())
    }

    /// Everything that would make `saved` wrong here, in one sentence.
    fn check(&self, saved: &VcpuState) -> Result<(), String> {
        if saved.index != self.index {
            return Err(format!("it is of vCPU {}", saved.index));
        }
        saved.check()?;
        if !(XSAVE_BYTES_MIN..=self.xsave_bytes).contains(&saved.xsave.len()) {
            let (theirs, ours) = (saved.xsave.len(), self.xsave_bytes);
            return Err(format!("its extended state has {theirs} bytes, this host's {ours}"));
        }
        if saved.cpuid != self.cpuid && !self.is_granted(&saved.cpuid) {
            cpuid::check(&saved.cpuid, self.index)?;
        }
        let tsc_khz = self.fd().get_tsc_khz().map_err(|e| format!("cannot read the TSC frequency: {e}"))?;
        if !is_same_tsc_frequency(saved.tsc_khz, tsc_khz) {
            return Err(format!("its TSC runs at {} kHz, this host's at {tsc_khz} kHz", saved.tsc_khz));
        }
        Ok(())
    }

    /// Becomes the processor that a guest has seen, before it comes: from now on a reset keeps it too.
    pub(super) fn adopt(&mut self, cpuid: &[CpuidLeaf]) -> Result<(), Error> {
        self.paused("give it another CPUID")?;
        self.take_cpuid(cpuid)?;
        // Which registers there are has changed with it.
        self.power_on = Some(self.save()?);
        Ok(())
    }

    fn is_granted(&self, wanted: &[CpuidLeaf]) -> bool {
        self.granted.as_deref() == Some(wanted)
    }

    /// Has CPUID say `wanted`, unless it does. KVM takes that only before the vCPU has run.
    fn take_cpuid(&mut self, wanted: &[CpuidLeaf]) -> Result<(), Error> {
        // What was granted before the guest was stopped needs no look in the stop.
        if wanted == self.cpuid || self.is_granted(wanted) {
            return Ok(());
        }
        let index = self.index;
        cpuid::check(wanted, index).map_err(|why| Error::VcpuState { vcpu: index, why })?;
        self.granted = None;
        let real = cpuid::set(self.fd(), index, wanted)?;
        let lost = cpuid::lacking(wanted, &real);
        self.cpuid = real;
        if lost.is_empty() {
            self.granted = Some(wanted.to_vec());
            return Ok(());
        }
        let why = format!("KVM on this host does not let it have {}", cpuid::listed(&lost));
        Err(Error::VcpuState { vcpu: index, why })
    }

    /// What CPUID says.
    pub(super) fn cpuid(&self) -> Vec<CpuidLeaf> {
        self.cpuid.clone()
    }

    /// The MSRs that are saved, with their values now.
    pub(super) fn read_msrs(&self) -> Result<Vec<Msr>, Error> {
        msr::read(self.fd(), &self.msrs)
    }

    fn paused(&self, what: &'static str) -> Result<(), Error> {
        if self.running { Err(Error::NotPaused { vcpu: self.index, what }) } else { Ok(()) }
    }

    fn fd(&self) -> &VcpuFd {
        self.kickable.fd()
    }
}
