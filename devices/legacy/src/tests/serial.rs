//! The serial port: output, input with its backlog, state.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bus::{BusDevice, InterruptLine};

use crate::*;

const DATA: u64 = 0;
const ENABLE: u64 = 1;
const IDENTIFY: u64 = 2;
const MODEM: u64 = 4;
const STATUS: u64 = 5;

#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut bytes = self.0.lock().unwrap();
        if data == b"!" {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        bytes.extend(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Line(AtomicU32);

impl InterruptLine for Line {
    fn set_level(&self, high: bool) {
        self.0.fetch_add(u32::from(high), Ordering::Relaxed);
    }
}

impl Line {
    fn take(&self) -> u32 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

fn port() -> (Arc<Serial>, Output, Arc<Line>) {
    let (output, line) = (Output::default(), Arc::new(Line::default()));
    (Serial::new(line.clone(), Box::new(output.clone())), output, line)
}

fn read(serial: &Serial, port: u64) -> u8 {
    let mut data = [0];
    serial.read(port, &mut data);
    data[0]
}

fn drain(serial: &Serial) -> Vec<u8> {
    std::iter::from_fn(|| (read(serial, STATUS) & 1 != 0).then(|| read(serial, DATA))).collect()
}

#[test]
fn output_reaches_the_writer_and_its_errors_do_not_reach_the_guest() {
    let (serial, output, line) = port();
    serial.write(ENABLE, &[2]);
    assert_eq!(line.take(), 1, "the transmitter is empty");
    assert_eq!(read(&serial, IDENTIFY), 0xc2);
    for byte in b"a!b" {
        assert_eq!(read(&serial, STATUS) & 0x60, 0x60);
        serial.write(DATA, &[*byte]);
    }
    assert_eq!(*output.0.lock().unwrap(), b"ab");
}

#[test]
fn input_beyond_the_receive_buffer_waits_and_beyond_the_backlog_is_refused() {
    let (serial, _, line) = port();
    serial.write(ENABLE, &[1]);
    let typed: Vec<u8> = (0..5000_u32).map(|n| n as u8).collect();
    assert_eq!(serial.enqueue(&typed), 4096);
    assert_eq!(line.take(), 1);
    assert_eq!(read(&serial, IDENTIFY), 0xc4);
    assert_eq!(serial.enqueue(&typed[4096..]), 64, "64 bytes are in the receive buffer");
    assert_eq!(drain(&serial), typed[..4160]);
    assert!(line.take() > 0);
    assert_eq!(serial.enqueue(b""), 0);
    assert_eq!(read(&serial, DATA), 0);
}

#[test]
fn loopback_keeps_input_waiting() {
    let (serial, output, _) = port();
    serial.write(MODEM, &[0x10]);
    assert_eq!(serial.enqueue(b"typed"), 5);
    serial.write(DATA, b"L");
    assert_eq!(drain(&serial), b"L");
    assert!(output.0.lock().unwrap().is_empty());
    serial.write(MODEM, &[0x08]);
    assert_eq!(drain(&serial), b"typed");
}

#[test]
fn a_wide_access_is_one_of_each_port_and_never_leaves_the_range() {
    let (serial, output, _) = port();
    serial.write(6, &[1, 0x5a, 0x77]);
    assert_eq!(read(&serial, 7), 0x5a);
    assert!(output.0.lock().unwrap().is_empty(), "0x77 must not wrap around to the data port");
    let mut data = [0xaa; 8];
    serial.read(7, &mut data[..2]);
    assert_eq!(data[..2], [0x5a, 0xff]);
    serial.read(0, &mut data);
    serial.write(0, &[0; 8]);
    serial.read(u64::MAX, &mut data);
    serial.write(u64::MAX, &data);
}

#[test]
fn a_restored_port_goes_on() {
    let (source, _, _) = port();
    source.write(3, &[0x83]);
    source.write(0, &[0x34, 0x12]);
    source.write(3, &[0x03]);
    source.write(ENABLE, &[1]);
    source.write(7, &[0x99]);
    source.enqueue(&[7; 100]);
    let saved = source.save();
    assert_eq!((saved.received_count, saved.backlog_count), (64, 36));
    let bytes = vmstate::to_bytes(&saved);
    let (target, output, line) = port();
    target.restore(&vmstate::from_bytes(&bytes, 1).unwrap()).unwrap();
    assert_eq!(vmstate::to_bytes(&target.save()), bytes);
    assert_eq!(line.take(), 1, "the pending interrupt is raised again");
    assert_eq!(drain(&target), [7; 100]);
    for port in 1..8 {
        assert_eq!(
            read(&target, port),
            {
                drain(&source);
                read(&source, port)
            },
            "port {port}"
        );
    }
    target.write(DATA, b"x");
    assert_eq!(*output.0.lock().unwrap(), b"x", "the writer is kept");
}

#[test]
fn an_impossible_state_is_refused() {
    let (serial, _, line) = port();
    serial.enqueue(b"abc");
    let good = serial.save();
    let refuse = |change: fn(&mut SerialState)| {
        let mut state = good.clone();
        change(&mut state);
        match serial.restore(&state).unwrap_err() {
            Error::BadRegister { device: "serial", register, .. } => register,
            Error::BadInput { buffer, .. } => buffer,
            other => panic!("{other}"),
        }
    };
    assert_eq!(refuse(|state| state.interrupt_enable = 0x10), "interrupt enable");
    for identification in [0, 3, 5, 7, 8, 0xc1] {
        let state = SerialState { interrupt_identification: identification, ..good.clone() };
        assert!(serial.restore(&state).is_err(), "{identification:#x}");
    }
    assert_eq!(refuse(|state| state.received = vec![0; 65]), "receive buffer");
    assert_eq!(
        refuse(|state| {
            state.received = vec![0; 65];
            state.received_count = 65;
        }),
        "receive buffer"
    );
    assert_eq!(refuse(|state| state.backlog_count = 1), "backlog");
    assert_eq!(
        refuse(|state| {
            state.backlog = vec![0; 4097];
            state.backlog_count = 4097;
        }),
        "backlog"
    );
    assert_eq!(serial.save(), good);
    assert_eq!(line.take(), 0);
    assert!(vmstate::from_bytes::<SerialState>(&[0xff; 200], 1).is_err());
}
