//! A run, from the first line to the last.

use alloc::vec::Vec;
use core::fmt::Display;

use crate::apic;
use crate::clock::{Frequency, GapWatch, KvmClock, frequency};
use crate::console::Console;
use crate::error::Error;
use crate::machine::Machine;
use crate::nvme::Controller;
use crate::nvme::io_queue::Vectors;
use crate::options::{Exit, Mode, Options, WORDS};
use crate::pci::{self, Window};
use crate::power;
use crate::report::{self, Counters};
use crate::workload::latency::Histogram;
use crate::workload::{Ram, Worker};

/// Typed on the console, it ends the run.
const KEY_QUIT: u8 = b'q';

/// Does what the command line says, and ends the machine. Returns only where the machine does not end.
pub fn run(machine: &mut dyn Machine, command_line: &str) {
    let mut console = Console::default();
    console.line(machine, format_args!("boot name=ferry-exerciser version={}", report::VERSION));
    let exit = match Options::parse(command_line) {
        Ok(options) if options.mode == Mode::Help => {
            for word in WORDS {
                let (name, values, meaning) = (word.name, word.values, word.meaning);
                console.line(
                    machine,
                    format_args!("help word={name} values=\"{values}\" meaning=\"{meaning}\""),
                );
            }
            options.exit
        }
        Ok(options) => {
            exercise(machine, &mut console, &options);
            options.exit
        }
        Err(bad) => {
            let counters = Counters { errors: 1, ..Counters::default() };
            console.line(machine, format_args!("{} kind=option reason=\"{bad}\"", report::ERROR));
            console.line(machine, format_args!("{} {counters}", report::DONE));
            Exit::Off
        }
    };
    console.flush(machine);
    power::end(machine, exit);
}

fn exercise(machine: &mut dyn Machine, console: &mut Console, options: &Options) {
    let clock = KvmClock::start(machine);
    let Some(Frequency { tsc_khz, source }) = frequency(machine, clock.as_ref(), options.tsc_khz) else {
        let error = Error::Machine { reason: "no source for the counter's frequency: give tsc_khz" };
        return console.line(machine, format_args!("{} {error}", report::ERROR));
    };
    console.line(machine, format_args!("clock tsc_khz={tsc_khz} source={source}"));
    if options.show_cpuid {
        show_cpuid(machine, console);
    }

    let mut counters = Counters::default();
    let outcome = Run::prepare(machine, console, options, tsc_khz, clock)
        .and_then(|mut run| run.work(machine, console, &mut counters));
    if let Err(error) = outcome {
        counters.errors += 1;
        console.line(machine, format_args!("{} {error}", report::ERROR));
    }
    counters.tsc = machine.tsc();
    console.line(machine, format_args!("{} {counters}", report::DONE));
}

/// Leaves that tell features, with their subleaves.
const FEATURE_LEAVES: [(u32, u32); 6] = [(0x1, 0), (0x7, 0), (0x7, 1), (0xd, 0), (0xd, 1), (0x8000_0001, 0)];

fn show_cpuid(machine: &mut dyn Machine, console: &mut Console) {
    for ring in [0, 3] {
        for (leaf, subleaf) in FEATURE_LEAVES {
            let [eax, ebx, ecx, edx] =
                if ring == 0 { machine.cpuid(leaf, subleaf) } else { machine.user_cpuid(leaf, subleaf) };
            console.line(
                machine,
                format_args!(
                    "{} ring={ring} leaf={leaf:#x} subleaf={subleaf:#x} eax={eax:#x} ebx={ebx:#x} ecx={ecx:#x} edx={edx:#x}",
                    report::CPUID
                ),
            );
        }
    }
}

/// Everything that works at the same time.
struct Run<'a> {
    options: &'a Options,
    tsc_khz: u64,
    clock: Option<KvmClock>,
    clock_ns: u64,
    workers: Vec<Worker>,
    ram: Option<Ram>,
    gaps: GapWatch,
    rate_start: (u64, u64),
}

impl<'a> Run<'a> {
    fn prepare(
        machine: &mut dyn Machine,
        console: &mut Console,
        options: &'a Options,
        tsc_khz: u64,
        clock: Option<KvmClock>,
    ) -> Result<Self, Error> {
        if !apic::start(machine, tsc_khz, options.timer_hz) {
            return Err(Error::Machine { reason: "no local APIC within reach" });
        }
        let mut window = Window::default();
        let mut vectors = Vectors::default();
        let mut workers = Vec::new();
        for (index, function) in pci::find(machine, pci::CLASS_NVME).into_iter().enumerate() {
            let mut controller = Controller::start(machine, tsc_khz, index, function, &mut window)?;
            controller.create_queues(machine, options, &mut window, &mut vectors)?;
            controller.park_events(options.events)?;
            describe(machine, console, &controller, options);
            workers.push(Worker::new(controller, options, tsc_khz, machine.tsc())?);
        }
        if workers.is_empty() && options.mode != Mode::Idle {
            return Err(Error::Machine { reason: "no NVMe controller on PCI bus 0" });
        }
        let (check, dirty) = (options.check_bytes_per_second, options.dirty_bytes_per_second);
        let ram = (options.ram_bytes > 0)
            .then(|| Ram::new(options.ram_bytes, check, dirty, tsc_khz, machine.tsc()));
        if let Some(ram) = &ram {
            console
                .line(machine, format_args!("ram bytes={} dirty={dirty} check={check}", ram.length_bytes()));
        }
        console.flush(machine);
        let now = machine.tsc();
        console.line(machine, format_args!("start tsc={now}"));
        Ok(Self {
            options,
            tsc_khz,
            clock,
            clock_ns: 0,
            workers,
            ram,
            gaps: GapWatch::new(now),
            rate_start: (now, 0),
        })
    }

    fn work(
        &mut self,
        machine: &mut dyn Machine,
        console: &mut Console,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        let start = machine.tsc();
        let interval = self.options.report_milliseconds.saturating_mul(self.tsc_khz);
        let length = self.options.seconds.saturating_mul(1000).saturating_mul(self.tsc_khz);
        let mut reported = start;
        let mut ending = false;
        loop {
            let seen = machine.interrupt_total();
            let now = machine.tsc();
            self.gaps.look(now).map_err(|back| Error::Time { clock: "tsc", back })?;
            let mut any = false;
            for worker in &mut self.workers {
                any |= worker.turn(machine, now, counters)?;
                worker.look_after_region(now)?;
            }
            if let Some(ram) = &mut self.ram {
                ram.step(now)?;
            }
            let sent = console.step(machine);

            if sent && now.saturating_sub(reported) >= interval {
                reported = now;
                self.report(machine, console, counters)?;
                ending |= console.read(machine) == Some(KEY_QUIT);
            }
            let enough = self.options.ios > 0 && counters.verified >= self.options.ios;
            let late = length > 0 && now.saturating_sub(start) >= length;
            if ending || enough || late {
                ending = true;
                self.workers.iter_mut().for_each(Worker::finish);
                if self.workers.iter().all(Worker::is_done) {
                    return self.conclude(machine, console, counters);
                }
            }
            if self.options.halt_when_idle && !any && sent {
                machine.halt(seen);
            }
        }
    }

    fn report(
        &mut self,
        machine: &mut dyn Machine,
        console: &mut Console,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        let stall = self.options.stall_milliseconds.saturating_mul(self.tsc_khz);
        for worker in &mut self.workers {
            worker.look_for_stall(machine, stall)?;
            worker.controller.look_for_events()?;
        }
        self.count(machine, counters)?;
        console.line(machine, format_args!("{} {counters}", report::PROGRESS));
        counters.seq += 1;
        self.rate(machine, console, counters);
        Ok(())
    }

    /// Brings the counters up to date.
    fn count(&mut self, machine: &mut dyn Machine, counters: &mut Counters) -> Result<(), Error> {
        let gap = self.gaps.take();
        counters.gap_us = gap.counts.saturating_mul(1000) / self.tsc_khz;
        counters.gap_tsc = gap.end;
        counters.interrupts = machine.interrupt_total();
        counters.inflight = self.workers.iter().map(|worker| worker.in_flight() as u64).sum();
        (counters.ram_checked, counters.ram_dirtied) =
            self.ram.as_ref().map_or((0, 0), |ram| (ram.checked, ram.dirtied));
        for (checked, dirtied) in self.workers.iter().map(Worker::region_pages) {
            counters.ram_checked += checked;
            counters.ram_dirtied += dirtied;
        }
        counters.tsc = machine.tsc();
        if let Some(clock) = &self.clock {
            let (now, tsc) = clock.now(machine);
            let back = self.clock_ns.saturating_sub(now);
            (self.clock_ns, counters.clock_ns, counters.tsc) = (now, now, tsc);
            if back > 0 {
                return Err(Error::Time { clock: "kvm-clock", back });
            }
        }
        Ok(())
    }

    /// In mode `iops`, the rate since the last such line.
    fn rate(&mut self, machine: &mut dyn Machine, console: &mut Console, counters: &Counters) {
        if self.options.mode == Mode::Iops {
            let (tsc, reads) = core::mem::replace(&mut self.rate_start, (counters.tsc, counters.reads));
            let (counts, reads) = (counters.tsc.saturating_sub(tsc), counters.reads.saturating_sub(reads));
            let per_second = u128::from(reads) * u128::from(self.tsc_khz) * 1000 / u128::from(counts.max(1));
            let window_us = u128::from(counts) * 1000 / u128::from(self.tsc_khz);
            let mut latencies = Histogram::default();
            self.workers.iter_mut().for_each(|worker| worker.take_latencies(&mut latencies));
            let nanoseconds = |counts: u64| u128::from(counts) * 1_000_000 / u128::from(self.tsc_khz);
            let [median, last] = [50, 99].map(|percent| nanoseconds(latencies.percentile(percent)));
            let timed = latencies.total();
            console.line(
                machine,
                format_args!(
                    "rate iops={per_second} reads={reads} window_us={window_us} timed={timed} latency_50_ns={median} latency_99_ns={last}"
                ),
            );
        }
    }

    /// The checks after the last command.
    fn conclude(
        &mut self,
        machine: &mut dyn Machine,
        console: &mut Console,
        counters: &mut Counters,
    ) -> Result<(), Error> {
        if let Some(ram) = &mut self.ram {
            ram.check_all()?;
        }
        for worker in &mut self.workers {
            worker.leave_region()?;
            worker.controller.redeem_events(machine)?;
            worker.controller.shut_down(machine)?;
        }
        self.count(machine, counters)?;
        self.rate(machine, console, counters);
        Ok(())
    }
}

/// The lines of a controller and its namespaces.
fn describe(machine: &mut dyn Machine, console: &mut Console, controller: &Controller, options: &Options) {
    let Controller { index, function, identity, .. } = controller;
    let kind = identity.capabilities;
    console.line(
        machine,
        format_args!(
            "controller index={index} pci=00:{:02x}.{} bar={:#x} version={:#x} serial=\"{}\" model=\"{}\" mqes={} mdts={} queues={}/{} depth={} doorbells={:?} completion={:?}",
            function.device,
            function.function,
            controller.bar,
            identity.version,
            Text(&identity.controller.sn),
            Text(&identity.controller.mn),
            kind.mqes(),
            identity.controller.mdts,
            options.queues,
            identity.granted_queues,
            options.depth,
            options.doorbells,
            options.notice,
        ),
    );
    for namespace in &controller.namespaces {
        console.line(
            machine,
            format_args!(
                "namespace controller={index} nsid={} blocks={} block_bytes={} read_only={} protection={}",
                namespace.nsid,
                namespace.blocks,
                namespace.block_bytes,
                u8::from(namespace.read_only),
                namespace.protection
            ),
        );
    }
}

/// Padded ASCII of a controller, without what would spoil a line.
struct Text<'a>(&'a [u8]);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let text = self.0.trim_ascii();
        text.iter().try_for_each(|byte| match byte {
            b' '..=b'~' if *byte != b'"' => write!(f, "{}", char::from(*byte)),
            _ => write!(f, "?"),
        })
    }
}
