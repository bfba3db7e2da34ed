//! The exerciser as a guest: what is below the library. `entry.s` is ring 0, this is the bottom of ring 3.

#![no_std]
#![no_main]

extern crate alloc;

mod heap;
mod intrinsics;
mod processor;

use core::arch::global_asm;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

use exerciser::console::SERIAL_PORT;
use exerciser::machine::Machine;
use exerciser::start_info::StartInfo;

use crate::processor::{Processor, REACH};

global_asm!(include_str!("entry.s"), options(att_syntax));

#[global_allocator]
static HEAP: heap::Heap = heap::Heap::new();

unsafe extern "C" {
    /// First byte after the image (link.ld).
    static image_end: u8;
    /// Vector, error code, rip, faulting address, cs (entry.s).
    static fault_record: [AtomicU64; 5];
}

/// Where ring 3 begins: interrupts on, page tables and descriptor tables final.
#[unsafe(no_mangle)]
extern "C" fn guest_start(start_info: u64) -> ! {
    let mut processor = Processor;
    processor.clear_interrupts();
    let image_end_address = (&raw const image_end).addr() as u64;
    let found = StartInfo::read(&processor::read_byte, start_info, image_end_address);
    let info = match found {
        Ok(info) => info,
        Err(reason) => stop(format_args!("error kind=boot reason=\"{reason}\"")),
    };
    HEAP.give(image_end_address, info.ram_end.min(REACH));
    exerciser::run(&mut processor, &info.command_line(&processor::read_byte));
    halt(processor)
}

/// Where ring 0 sends a fault.
#[unsafe(no_mangle)]
extern "C" fn guest_fault() -> ! {
    // SAFETY: entry.s defines the record and writes it only before it comes here.
    let record = unsafe { &fault_record };
    let [vector, code, rip, address, cs] = record.each_ref().map(|field| field.load(Ordering::Relaxed));
    stop(format_args!(
        "error kind=fault vector={vector} code={code:#x} rip={rip:#x} address={address:#x} cs={cs:#x}"
    ))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (file, line) = info.location().map_or(("", 0), |location| (location.file(), location.line()));
    stop(format_args!("error kind=panic file={file} line={line} reason=\"{}\"", info.message()))
}

/// Prints a last line without the heap, switches the machine off, and stays.
fn stop(line: core::fmt::Arguments<'_>) -> ! {
    struct Serial(Processor);
    impl core::fmt::Write for Serial {
        fn write_str(&mut self, text: &str) -> core::fmt::Result {
            self.0.write_string(SERIAL_PORT, text.as_bytes());
            Ok(())
        }
    }
    let mut serial = Serial(Processor);
    // Writing to the port cannot fail.
    let _ = core::fmt::write(&mut serial, format_args!("{line}\r\n"));
    let mut processor = Processor;
    exerciser::power::end(&mut processor, exerciser::options::Exit::Off);
    halt(processor)
}

fn halt(mut processor: Processor) -> ! {
    loop {
        processor.halt(processor.interrupt_total());
    }
}
