//! All vCPUs of a machine.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::thread::gettid;
use vmm_sys_util::signal::Killable;

use super::state::{CpuidLeaf, Msr, VcpuState};
use super::thread::{Command, Parts, Vcpu};
use super::throttle::Throttle;
use super::{BootRegisters, Buses, CpuModel, EventHandler, Offer, Requirements, cpuid, msr};
use crate::control::FerryCpu;
use crate::kvm::{Error, Host, Vm, run};

/// How long a vCPU may take to leave the guest. It takes microseconds; only a hung kernel or device takes longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two looks whether a vCPU waits for memory.
const GLANCE: Duration = Duration::from_millis(1);

/// The vCPUs of a machine, each on its thread. They begin paused. Dropping it ends the threads.
pub struct VcpuManager {
    /// `None`: nobody has slowed them down yet. Dropped before them.
    throttle: Mutex<Option<Throttle>>,
    threads: Vec<Arc<Thread>>,
    offer: Offer,
    /// What programs see that run without KVM's help.
    user: Vec<CpuidLeaf>,
    /// What the guest sees until one comes that has seen something else.
    processor: FerryCpu,
    /// Of all vCPUs together.
    exits: Arc<AtomicU64>,
    /// What their time stamp counters count in a millisecond.
    tsc_khz: u32,
}

/// Which vCPUs a machine has.
#[derive(Clone, Debug, Default)]
pub struct Processors {
    /// How many.
    pub count: u32,
    /// What they are, for a guest that starts.
    pub model: CpuModel,
    /// What CPUID says on each, for a guest that has seen it already.
    pub seen: Option<Vec<Vec<CpuidLeaf>>>,
}

pub(super) struct Thread {
    index: u32,
    /// What the kernel calls it.
    id: u32,
    /// `None`: told to end.
    commands: Option<Sender<Command>>,
    /// `None`: joined.
    handle: Option<JoinHandle<()>>,
}

impl VcpuManager {
    /// Creates vCPUs in `vm`, with their CPUID, as they are after power-on: the first will run from the reset
    /// vector unless [`Self::boot`] says otherwise, the others wait for its start-up message.
    ///
    /// # Errors
    /// [`Error::VcpuCount`], [`Error::CpuModel`], [`Error::Call`], [`Error::Spawn`]; threads that were started have ended.
    pub fn new(
        host: &Host,
        vm: &Arc<Vm>,
        processors: &Processors,
        buses: &Buses,
        on_event: &EventHandler,
    ) -> Result<Self, Error> {
        let count = processors.count;
        if !(1..=vm.max_vcpus()).contains(&count) {
            return Err(Error::VcpuCount { asked: count, limit: vm.max_vcpus() });
        }
        run::install_kick_handler()?;
        let mut vcpus = (0..count).map(|index| vm.create_vcpu(index)).collect::<Result<VecDeque<_>, _>>()?;
        let supported = cpuid::supported(host)?;
        // What KVM puts back it puts back into whatever it is given.
        let put_back = match vcpus.front() {
            Some(first) if host.is_paravirtual() => cpuid::set(first, 0, &supported)?,
            _ => Vec::new(),
        };
        let mut tables = match &processors.seen {
            Some(seen) if seen.len() == count as usize => seen.clone(),
            Some(seen) => {
                return Err(Error::StateCount {
                    saved: u32::try_from(seen.len()).unwrap_or(u32::MAX),
                    here: count,
                });
            }
            None => cpuid::of_all(processors.model, &supported, &put_back, count, host.is_paravirtual())?,
        };
        let user = if host.is_paravirtual() { cpuid::of_this_processor() } else { Vec::new() };
        let mut manager = Self {
            throttle: Mutex::default(),
            threads: Vec::new(),
            offer: Offer::default(),
            user,
            processor: FerryCpu::default(),
            exits: Arc::default(),
            tsc_khz: 0,
        };
        let mut msrs = Vec::new();
        for (index, table) in (0..count).zip(&mut tables) {
            let Some(fd) = vcpus.pop_front() else { return Err(Error::ThreadGone(index)) };
            let cpuid = cpuid::set(&fd, index, table)?;
            if processors.model != CpuModel::Host {
                // No guest of a baseline can read it, and it would differ from host to host.
                msr::write(&fd, index, &[Msr { index: msr::ARCH_CAPABILITIES, value: 0 }])?;
            }
            if index == 0 {
                manager.tsc_khz =
                    fd.get_tsc_khz().map_err(Error::call("read the TSC frequency of vCPU 0"))?;
                msrs = msr::list(host, &fd)?;
                // The host's own processor is not masked.
                let masked = processors.model != CpuModel::Host;
                let unmasked = if masked { cpuid::lacking(&cpuid, table) } else { Vec::new() };
                if !unmasked.is_empty() {
                    log::warn!(
                        "KVM on this host does not hold CPUID masks: the guest sees {} although it was told otherwise, and a \
                         destination must have that",
                        cpuid::listed(&unmasked)
                    );
                }
                manager.processor = FerryCpu {
                    model: processors.seen.is_none().then(|| processors.model.to_string()),
                    features: cpuid::names(&cpuid),
                    unmasked,
                    user_features: cpuid::names(&manager.beyond(&cpuid)),
                };
                let cpuid = cpuid::offered(&supported, &put_back, host.is_paravirtual());
                let mut usable = cpuid.clone();
                cpuid::add(&mut usable, &manager.user);
                manager.offer = Offer {
                    cpuid,
                    user: usable,
                    msrs: msrs.clone(),
                    arch_capabilities: msr::host_capabilities(host)?,
                    xsave_bytes: u32::try_from(vm.xsave_bytes()).unwrap_or(u32::MAX),
                    capabilities: host.state_capabilities(),
                };
            }
            let parts = Parts {
                index,
                fd,
                vm: Arc::clone(vm),
                exits: Arc::clone(&manager.exits),
                buses: buses.clone(),
                on_event: Arc::clone(on_event),
                cpuid,
                msrs: msrs.clone(),
                xsave_bytes: vm.xsave_bytes(),
            };
            let (commands, receiver) = mpsc::channel::<Command>();
            let handle = Builder::new()
                .name(format!("vcpu{index}"))
                .spawn(move || Vcpu::new(parts).serve(&receiver))
                .map_err(|source| Error::Spawn { vcpu: index, source })?;
            let mut thread = Thread { index, id: 0, commands: Some(commands), handle: Some(handle) };
            thread.id = thread.answer(&thread.ask(|_| gettid().as_raw_nonzero().get().unsigned_abs())?)?;
            manager.threads.push(Arc::new(thread));
        }
        manager.ask_all(|_| Vcpu::power_on)?.into_iter().collect::<Result<(), _>>()?;
        Ok(manager)
    }

    /// How many vCPUs there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.threads.len() as u32
    }

    /// How often a vCPU came back from KVM, to serve an access or a command. Exits that KVM serves itself are not among them.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// What these vCPUs need of another host that they may go to.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::ThreadGone`], [`Error::Unresponsive`].
    pub fn requirements(&self) -> Result<Requirements, Error> {
        let cpuid = self.ask_all(|_| |vcpu: &mut Vcpu| vcpu.cpuid())?;
        let Some(first) = self.threads.first() else { return Err(Error::ThreadGone(0)) };
        let msrs = first.answer(&first.ask(|vcpu| vcpu.read_msrs())?)??;
        let told = cpuid.first().is_some_and(|table| cpuid::tells_arch_capabilities(table));
        let capabilities = msrs.iter().find(|msr| told && msr.index == msr::ARCH_CAPABILITIES);
        Ok(Requirements {
            user: self.beyond(cpuid.first().map_or(&[], Vec::as_slice)),
            cpuid,
            arch_capabilities: capabilities.map_or(0, |msr| msr.value),
            msrs: msrs.iter().map(|msr| msr.index).collect(),
            xsave_bytes: self.offer.xsave_bytes,
            capabilities: self.offer.capabilities.clone(),
        })
    }

    /// What programs see beyond `table`.
    fn beyond(&self, table: &[CpuidLeaf]) -> Vec<CpuidLeaf> {
        cpuid::only_lacking(&self.user, table)
    }

    /// Which processor the guest sees, or one that came with the CPUID `seen`.
    #[must_use]
    pub fn processor(&self, seen: Option<&[CpuidLeaf]>) -> FerryCpu {
        seen.map_or_else(
            || self.processor.clone(),
            |seen| FerryCpu {
                features: cpuid::names(seen),
                user_features: cpuid::names(&self.beyond(seen)),
                ..FerryCpu::default()
            },
        )
    }

    /// What this host offers a guest.
    #[must_use]
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// What CPUID says on each vCPU.
    ///
    /// # Errors
    /// [`Error::ThreadGone`], [`Error::Unresponsive`].
    pub fn cpuid(&self) -> Result<Vec<Vec<CpuidLeaf>>, Error> {
        self.ask_all(|_| |vcpu: &mut Vcpu| vcpu.cpuid())
    }

    /// Gives the vCPUs, which have not run, the CPUID of a guest that is to come, one table for each.
    ///
    /// # Errors
    /// [`Error::StateCount`], [`Error::VcpuState`], [`Error::Call`].
    pub fn adopt(&self, tables: &[Vec<CpuidLeaf>]) -> Result<(), Error> {
        if tables.len() != self.threads.len() {
            let saved = u32::try_from(tables.len()).unwrap_or(u32::MAX);
            return Err(Error::StateCount { saved, here: self.count() });
        }
        let mut tables = tables.iter().cloned();
        let adopted = self.ask_all(|_| {
            let table = tables.next().unwrap_or_default();
            move |vcpu: &mut Vcpu| vcpu.adopt(&table)
        })?;
        adopted.into_iter().collect()
    }

    /// What the guest's time stamp counters count in a millisecond: KVM is asked once, when the vCPUs are made.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Sets the registers with which the first vCPU enters the kernel.
    ///
    /// # Errors
    /// [`Error::NotPaused`], [`Error::Call`].
    pub fn boot(&self, registers: BootRegisters) -> Result<(), Error> {
        let Some(first) = self.threads.first() else { return Err(Error::ThreadGone(0)) };
        first.answer(&first.ask(move |vcpu| vcpu.boot(&registers))?)?
    }

    /// Lets all vCPUs run. When this returns, each is about to enter the guest. Harmless for those that run. Says when the last of them
    /// went, if any did.
    ///
    /// # Errors
    /// [`Error::ThreadGone`], [`Error::Unresponsive`].
    pub fn resume(&self) -> Result<Option<Instant>, Error> {
        self.resume_with(|| ())
    }

    /// As [`Self::resume`], and has `others` called to work as soon as the vCPUs are: who is called first finds a processor that is free.
    ///
    /// # Errors
    /// As [`Self::resume`]; `others` were called all the same.
    pub fn resume_with(&self, call_others: impl FnOnce()) -> Result<Option<Instant>, Error> {
        let asked: Result<Vec<_>, _> = self.threads.iter().map(|thread| thread.ask(Vcpu::resume)).collect();
        call_others();
        self.threads
            .iter()
            .zip(asked?)
            .try_fold(None, |last, (thread, answer)| Ok(last.max(thread.answer(&answer)?)))
    }

    /// Stops all vCPUs. When this returns none is in the guest, and none is in the middle of an instruction: accesses
    /// that were in progress are complete. Harmless for those that are paused.
    ///
    /// # Errors
    /// [`Error::ThreadGone`], [`Error::Unresponsive`].
    pub fn pause(&self) -> Result<(), Error> {
        self.end_pause(&self.begin_pause()?)
    }

    /// Has every vCPU pause, and waits for none.
    ///
    /// # Errors
    /// [`Error::ThreadGone`].
    pub fn kick_out(&self) -> Result<(), Error> {
        self.begin_pause().map(drop)
    }

    /// When this returns, every vCPU has been kicked.
    pub(super) fn begin_pause(&self) -> Result<Vec<Receiver<()>>, Error> {
        self.threads.iter().map(|thread| thread.ask(Vcpu::pause)).collect()
    }

    pub(super) fn end_pause(&self, asked: &[Receiver<()>]) -> Result<(), Error> {
        self.threads.iter().zip(asked).try_for_each(|(thread, answer)| thread.answer(answer))
    }

    /// As [`Self::pause`], but does not wait for vCPUs whose thread `waits` (for memory that is not here yet). They have been kicked, so
    /// that KVM enters their guest no more when they have their memory, and pause then.
    ///
    /// # Errors
    /// [`Error::ThreadGone`], [`Error::Unresponsive`].
    pub fn hold(&self, waits: impl Fn(u32) -> bool) -> Result<(), Error> {
        let asked = self.begin_pause()?;
        let end = Instant::now() + ANSWER_TIMEOUT;
        for (thread, answer) in self.threads.iter().zip(&asked) {
            while !waits(thread.id) {
                match answer.recv_timeout(GLANCE) {
                    Ok(()) => break,
                    Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
                    Err(error) => return Err(thread.silent(error)),
                }
            }
        }
        Ok(())
    }

    /// As [`Self::resume`], and waits for none: also for vCPUs that have not paused yet after [`Self::hold`], which then do not.
    ///
    /// # Errors
    /// [`Error::ThreadGone`].
    pub fn let_go(&self) -> Result<(), Error> {
        self.threads.iter().try_for_each(|thread| thread.ask(Vcpu::resume).map(drop))
    }

    /// Puts all vCPUs, which must be paused, into the state in which they were created. Time goes on.
    ///
    /// # Errors
    /// [`Error::NotPaused`], [`Error::Call`].
    pub fn reset(&self) -> Result<(), Error> {
        self.ask_all(|_| Vcpu::reset)?.into_iter().collect()
    }

    /// Reads the state of all vCPUs, which must be paused, and after the devices were: their last interrupts are in the
    /// local APICs. Changes nothing.
    ///
    /// # Errors
    /// [`Error::NotPaused`], [`Error::Call`].
    pub fn save_states(&self) -> Result<Vec<VcpuState>, Error> {
        self.ask_all(|_| Vcpu::save)?.into_iter().collect()
    }

    /// Checks and sets the state of all vCPUs, which must be paused: one for each, in order. `tsc_shift` is
    /// [`crate::kvm::ClockPlan`]'s.
    ///
    /// # Errors
    /// [`Error::VcpuCount`], [`Error::VcpuState`], [`Error::NotPaused`], [`Error::Call`]. The machine is not to run then.
    pub fn restore_states(&self, states: &[VcpuState], tsc_shift: u64) -> Result<(), Error> {
        if states.len() != self.threads.len() {
            let asked = u32::try_from(states.len()).unwrap_or(u32::MAX);
            return Err(Error::StateCount { saved: asked, here: self.count() });
        }
        let mut states = states.iter().cloned();
        let restored = self.ask_all(|_| {
            let state = states.next();
            move |vcpu: &mut Vcpu| state.map_or(Ok(()), |state| vcpu.restore(&state, tsc_shift))
        })?;
        restored.into_iter().collect()
    }

    /// Keeps every vCPU out of the guest for `percent` of the time, 1 to 99, until [`Self::stop_throttling`]. May be called again with
    /// another share.
    ///
    /// # Errors
    /// [`Error::Throttle`].
    pub fn throttle(&self, percent: u8) -> Result<(), Error> {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        if !throttle.as_ref().is_some_and(|throttle| throttle.set(percent)) {
            *throttle = Some(Throttle::start(&self.threads, percent)?);
        }
        Ok(())
    }

    /// Lets the vCPUs run as they can, at once. Harmless when they do.
    pub fn stop_throttling(&self) {
        if let Some(throttle) = &*self.throttle.lock().unwrap_or_else(PoisonError::into_inner) {
            throttle.stop();
        }
    }

    /// Lets all vCPUs rest until then; when this returns, they do.
    #[cfg(test)]
    pub(super) fn rest(&self, until: Option<std::time::Instant>) -> Result<(), Error> {
        self.ask_all(|_| move |vcpu: &mut Vcpu| vcpu.rest(until))?;
        Ok(())
    }

    /// Ends all threads and waits for them. Also done by dropping.
    pub fn shutdown(&mut self) {
        // It shares the threads.
        drop(self.throttle.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        let mut threads: Vec<_> = self.threads.iter_mut().filter_map(Arc::get_mut).collect();
        for thread in &mut threads {
            thread.commands = None;
            thread.kick();
        }
        for thread in &mut threads {
            if let Some(handle) = thread.handle.take()
                && handle.join().is_err()
            {
                log::error!("the thread of vCPU {} panicked", thread.index);
            }
        }
    }

    /// Has every thread do something, at the same time, and gathers the answers in order.
    fn ask_all<R, F>(&self, mut work: impl FnMut(u32) -> F) -> Result<Vec<R>, Error>
    where
        R: Send + 'static,
        F: FnOnce(&mut Vcpu) -> R + Send + 'static,
    {
        let asked: Vec<_> =
            self.threads.iter().map(|thread| thread.ask(work(thread.index))).collect::<Result<_, _>>()?;
        self.threads.iter().zip(asked).map(|(thread, answer)| thread.answer(&answer)).collect()
    }
}

impl Drop for VcpuManager {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl std::fmt::Debug for VcpuManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuManager").field("count", &self.count()).finish_non_exhaustive()
    }
}

impl Thread {
    /// Has the thread do something, and makes it look at once.
    pub(super) fn ask<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Vcpu) -> R + Send + 'static,
    ) -> Result<Receiver<R>, Error> {
        let (reply, answer) = mpsc::channel();
        let command: Command = Box::new(move |vcpu| {
            // Nobody waits any more after a timeout.
            let _ = reply.send(work(vcpu));
        });
        let gone = || Error::ThreadGone(self.index);
        self.commands.as_ref().ok_or_else(gone)?.send(command).map_err(|_| gone())?;
        self.kick();
        Ok(answer)
    }

    fn answer<R>(&self, answer: &Receiver<R>) -> Result<R, Error> {
        answer.recv_timeout(ANSWER_TIMEOUT).map_err(|error| self.silent(error))
    }

    fn silent(&self, error: RecvTimeoutError) -> Error {
        match error {
            RecvTimeoutError::Timeout => Error::Unresponsive { vcpu: self.index, after: ANSWER_TIMEOUT },
            RecvTimeoutError::Disconnected => Error::ThreadGone(self.index),
        }
    }

    /// Makes the thread leave the guest and look at its commands.
    fn kick(&self) {
        if let Some(handle) = &self.handle
            && let Err(error) = handle.kill(run::kick_signal())
            // It ended by itself: there is nothing to leave.
            && error.errno() != libc::ESRCH
        {
            log::error!("cannot kick vCPU {}: {error}", self.index);
        }
    }
}
