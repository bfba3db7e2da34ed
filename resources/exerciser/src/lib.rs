#![no_std]
#![deny(unsafe_code)]
#![allow(missing_docs)]
extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod clock;
pub mod console;
pub mod machine;
pub mod memory;
pub mod mmio;
pub mod options;
pub mod power;
pub mod report;
pub mod start_info;

use console::Console;
use machine::Machine;
use options::Options;

pub fn run(machine: &mut dyn Machine, command_line: &str) {
    let mut console = Console::default();
    console.line(machine, format_args!("boot name=ferry-exerciser version={}", report::VERSION));
    let options = match Options::parse(command_line) {
        Ok(options) => options,
        Err(bad) => {
            console.line(machine, format_args!("error kind=option reason=\"{bad}\""));
            Options::default()
        }
    };
    let clock = clock::KvmClock::start(machine);
    let frequency = clock::frequency(machine, clock.as_ref(), options.tsc_khz);
    let now = clock.map(|c| c.now(machine));
    console.line(machine, format_args!("clock {frequency:?} {now:?}"));
    console.flush(machine);
    power::end(machine, options.exit);
}
