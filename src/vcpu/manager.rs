//! All vCPUs of a machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::Killable;

use super::state::{CpuidLeaf, VcpuState};
use super::thread::{Command, Parts, Vcpu};
use super::{BootRegisters, Buses, EventHandler, cpuid, msr};
use crate::kvm::{Error, Host, Vm, run};

/// How long a vCPU may take to leave the guest. It takes microseconds; only a hung kernel or device takes longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The vCPUs of a machine, each on its thread. They begin paused. Dropping it ends the threads.
pub struct VcpuManager {
    threads: Vec<Thread>,
    cpuid: Vec<Vec<CpuidLeaf>>,
    /// Of all vCPUs together.
    exits: Arc<AtomicU64>,
}

struct Thread {
    index: u32,
    /// `None`: told to end.
    commands: Option<Sender<Command>>,
    /// `None`: joined.
    handle: Option<JoinHandle<()>>,
}

impl VcpuManager {
    /// Creates `count` vCPUs in `vm`, with their CPUID, as they are after power-on: the first will run from the reset
    /// vector unless [`Self::boot`] says otherwise, the others wait for its start-up message.
    ///
    /// # Errors
    /// [`Error::VcpuCount`], [`Error::Call`], [`Error::Spawn`]; threads that were started have ended.
    pub fn new(
        host: &Host,
        vm: &Arc<Vm>,
        count: u32,
        buses: &Buses,
        on_event: &EventHandler,
    ) -> Result<Self, Error> {
        if !(1..=vm.max_vcpus()).contains(&count) {
            return Err(Error::VcpuCount { asked: count, limit: vm.max_vcpus() });
        }
        run::install_kick_handler()?;
        let mut manager = Self { threads: Vec::new(), cpuid: Vec::new(), exits: Arc::default() };
        let mut msrs = Vec::new();
        for (index, cpuid) in (0..count).zip(cpuid::of_all(host, count)?) {
            let fd = vm.create_vcpu(index)?;
            fd.set_cpuid2(&cpuid).map_err(Error::call(format!("set the CPUID of vCPU {index}")))?;
            if index == 0 {
                msrs = msr::list(host, &fd)?;
            }
            manager.cpuid.push(cpuid::leaves(&cpuid));
            let parts = Parts {
                index,
                fd,
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
            manager.threads.push(Thread { index, commands: Some(commands), handle: Some(handle) });
        }
        manager.ask_all(|_| Vcpu::power_on)?.into_iter().collect::<Result<(), _>>()?;
        Ok(manager)
    }

    /// How many vCPUs there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.cpuid.len() as u32
    }

    /// How often a vCPU came back from KVM, to serve an access or a command. Exits that KVM serves itself are not among them.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// What CPUID tells the guest on each vCPU.
    #[must_use]
    pub fn cpuid(&self) -> &[Vec<CpuidLeaf>] {
        &self.cpuid
    }

    /// Every difference between the CPUID of a saved guest and the one it would see here, one sentence each.
    #[must_use]
    pub fn cpuid_differences(seen: &[CpuidLeaf], here: &[CpuidLeaf]) -> Vec<String> {
        cpuid::differences(seen, here)
    }

    /// What the guest's time stamp counters count in a millisecond.
    ///
    /// # Errors
    /// [`Error::Call`], [`Error::ThreadGone`].
    pub fn tsc_khz(&self) -> Result<u32, Error> {
        let Some(first) = self.threads.first() else { return Err(Error::ThreadGone(0)) };
        first.answer(&first.ask(|vcpu| vcpu.tsc_khz())?)?
    }

    /// Sets the registers with which the first vCPU enters the kernel.
    ///
    /// # Errors
    /// [`Error::NotPaused`], [`Error::Call`].
    pub fn boot(&self, registers: BootRegisters) -> Result<(), Error> {
        let Some(first) = self.threads.first() else { return Err(Error::ThreadGone(0)) };
        first.answer(&first.ask(move |vcpu| vcpu.boot(&registers))?)?
    }

    /// Lets all vCPUs run. When this returns, each is about to enter the guest. Harmless for those that run.
    ///
    /// # Errors
    /// [`Error::ThreadGone`], [`Error::Unresponsive`].
    pub fn resume(&self) -> Result<(), Error> {
        self.ask_all(|_| Vcpu::resume)?;
        Ok(())
    }

    /// Stops all vCPUs. When this returns none is in the guest, and none is in the middle of an instruction: accesses
    /// that were in progress are complete. Harmless for those that are paused.
    ///
    /// # Errors
    /// [`Error::ThreadGone`], [`Error::Unresponsive`].
    pub fn pause(&self) -> Result<(), Error> {
        self.end_pause(&self.begin_pause()?)
    }

    /// When this returns, every vCPU has been kicked.
    pub(super) fn begin_pause(&self) -> Result<Vec<Receiver<()>>, Error> {
        self.threads.iter().map(|thread| thread.ask(Vcpu::pause)).collect()
    }

    pub(super) fn end_pause(&self, asked: &[Receiver<()>]) -> Result<(), Error> {
        self.threads.iter().zip(asked).try_for_each(|(thread, answer)| thread.answer(answer))
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

    /// Ends all threads and waits for them. Also done by dropping.
    pub fn shutdown(&mut self) {
        for thread in &mut self.threads {
            thread.commands = None;
            thread.kick();
        }
        for thread in &mut self.threads {
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
    fn ask<R: Send + 'static>(
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
        answer.recv_timeout(ANSWER_TIMEOUT).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::Unresponsive { vcpu: self.index, after: ANSWER_TIMEOUT },
            RecvTimeoutError::Disconnected => Error::ThreadGone(self.index),
        })
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
