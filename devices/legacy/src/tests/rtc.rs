//! The clock: dates, setting it, its memory, its state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bus::BusDevice;

use crate::*;

#[derive(Clone, Default)]
struct Host(Arc<AtomicU64>);

impl WallClock for Host {
    fn unix_seconds(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

fn rtc(seconds: u64) -> (Arc<Rtc>, Host) {
    let host = Host::default();
    host.0.store(seconds, Ordering::Relaxed);
    (Rtc::new(Box::new(host.clone())), host)
}

fn read(rtc: &Rtc, index: u8) -> u8 {
    rtc.write(0, &[index]);
    let mut data = [0];
    rtc.read(1, &mut data);
    data[0]
}

fn write(rtc: &Rtc, index: u8, value: u8) {
    rtc.write(0, &[index]);
    rtc.write(1, &[value]);
}

/// Century, year, month, day, weekday, hours, minutes, seconds, as the registers show them.
fn shown(rtc: &Rtc) -> [u8; 8] {
    [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| read(rtc, index))
}

#[test]
fn dates_are_those_of_the_calendar() {
    for (seconds, expected) in [
        (0, [0x19, 0x70, 0x01, 0x01, 5, 0, 0, 0]),
        (951_782_400, [0x20, 0x00, 0x02, 0x29, 3, 0, 0, 0]),
        (951_868_799, [0x20, 0x00, 0x02, 0x29, 3, 0x23, 0x59, 0x59]),
        (951_868_800, [0x20, 0x00, 0x03, 0x01, 4, 0, 0, 0]),
        (1_704_067_199, [0x20, 0x23, 0x12, 0x31, 1, 0x23, 0x59, 0x59]),
        (1_709_210_096, [0x20, 0x24, 0x02, 0x29, 5, 0x12, 0x34, 0x56]),
        (4_107_542_400, [0x21, 0x00, 0x03, 0x01, 2, 0, 0, 0]),
        (253_402_300_799, [0x99, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]),
        (u64::MAX, [0x99, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x59]),
    ] {
        assert_eq!(shown(&rtc(seconds).0), expected, "{seconds}");
    }
}

#[test]
fn the_clock_runs_and_status_registers_are_sane() {
    let (rtc, host) = rtc(59);
    assert_eq!(read(&rtc, 0), 0x59);
    host.0.store(60, Ordering::Relaxed);
    assert_eq!((read(&rtc, 0), read(&rtc, 2)), (0, 1));
    for index in [0x0a, 0x0b, 0x0c, 0x0d] {
        write(&rtc, index, 0x7f);
    }
    assert_eq!([0x0a, 0x0b, 0x0c, 0x0d].map(|index| read(&rtc, index)), [0x7f, 0x02, 0, 0x80]);
    write(&rtc, 0x0a, 0xff);
    assert_eq!(read(&rtc, 0x0a), 0x7f, "no update is ever in progress");
}

#[test]
fn a_guest_sets_the_time() {
    let (rtc, host) = rtc(1_000_000);
    write(&rtc, 0x0b, 0x82);
    host.0.store(1_000_010, Ordering::Relaxed);
    assert_eq!(read(&rtc, 0), 0x40, "it stands still at 13:46:40");
    for (index, value) in [(0x32, 0x20), (9, 0x24), (8, 0x02), (7, 0x29), (4, 0x12), (2, 0x34), (0, 0x50)] {
        write(&rtc, index, value);
    }
    write(&rtc, 0x0b, 0x02);
    host.0.store(1_000_016, Ordering::Relaxed);
    assert_eq!(shown(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x12, 0x34, 0x56]);
    write(&rtc, 4, 0x13);
    assert_eq!(shown(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x34, 0x56], "without SET too");
    for (index, nonsense) in [(4, 0x24), (4, 0x1a), (4, 0xff), (7, 0), (7, 0x31), (8, 0x13), (0x32, 0x18)] {
        write(&rtc, index, nonsense);
        assert_eq!(shown(&rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x34, 0x56], "{index:#x} {nonsense:#x}");
    }
}

#[test]
fn memory_is_kept_and_odd_accesses_are_harmless() {
    let (rtc, _) = rtc(0);
    write(&rtc, 0x0f, 0x0a);
    write(&rtc, 0xff, 0x77);
    assert_eq!((read(&rtc, 0x0f), read(&rtc, 0x7f)), (0x0a, 0x77));
    rtc.write(0, &[0x0f, 0x0b]);
    assert_eq!(read(&rtc, 0x0f), 0x0b, "index and data by one write of 16 bits");
    let before = rtc.save();
    for offset in [0, 1, 2, u64::MAX] {
        rtc.read(offset, &mut [0; 4]);
        rtc.write(offset, &[0; 4]);
    }
    assert_eq!(rtc.save(), before);
    let mut index = [0];
    rtc.read(0, &mut index);
    assert_eq!(index, [0xff]);
}

#[test]
fn state_survives_and_is_checked() {
    let (source, _) = rtc(1_000);
    write(&source, 0x0f, 5);
    write(&source, 2, 0x30);
    let saved = source.save();
    let bytes = vmstate::to_bytes(&saved);
    let (target, _) = rtc(1_000);
    target.restore(&vmstate::from_bytes(&bytes, 1).unwrap()).unwrap();
    assert_eq!(vmstate::to_bytes(&target.save()), bytes);
    assert_eq!(shown(&target), shown(&source));
    let refuse = |change: fn(&mut RtcState)| {
        let mut state = saved.clone();
        change(&mut state);
        match target.restore(&state).unwrap_err() {
            Error::BadRegister { device: "RTC", register, .. } => register,
            other => panic!("{other}"),
        }
    };
    let after = target.save();
    assert_eq!(refuse(|state| state.index = 0x80), "index");
    assert_eq!(refuse(|state| state.registers[0x0a] |= 0x80), "A");
    assert_eq!(refuse(|state| state.registers[0x0b] |= 0x40), "B");
    assert_eq!(refuse(|state| state.registers[0x0b] = 0), "B");
    assert_eq!(refuse(|state| state.registers[0x0c] = 1), "C");
    assert_eq!(refuse(|state| state.registers[0x0d] = 0), "D");
    assert_eq!(refuse(|state| state.offset_seconds = i64::MIN), "offset");
    assert_eq!(refuse(|state| state.offset_seconds = 253_402_300_800), "offset");
    assert_eq!(target.save(), after);
}
