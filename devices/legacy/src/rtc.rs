//! The real-time clock: a Motorola MC146818A with 128 bytes, by which a guest learns the date at boot.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bus::BusDevice;

use crate::error::Error;
use crate::state::RtcState;

/// The host's time.
pub trait WallClock: Send + Sync {
    /// Seconds since 1970-01-01 00:00:00 UTC.
    fn unix_seconds(&self) -> u64;
}

const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_C: usize = 0x0c;
const STATUS_D: usize = 0x0d;
/// Where PCs keep the century; ACPI's FADT says so.
const CENTURY: usize = 0x32;
const TIME: [usize; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

/// 32,768 Hz base, 1,024 Hz rate; "update in progress" is never seen.
const A_RESET: u8 = 0x26;
const A_WRITABLE: u8 = 0x7f;
/// The guest sets the time: the registers stand still.
const B_SET: u8 = 0x80;
/// 24-hour mode; BCD. The guest cannot change either, nor enable an interrupt.
const B_FIXED: u8 = 0x02;
/// The battery is good.
const D_FIXED: u8 = 0x80;
const INDEX_BITS: u8 = 0x7f;
/// 9999-12-31 23:59:59, the last second that the registers can hold.
const LAST_SECOND: i64 = 253_402_300_799;

/// Index port at offset 0, data port at offset 1. The time is the host's plus an offset, so a clock that was restored on
/// another host is right if that host's is.
pub struct Rtc {
    clock: Box<dyn WallClock>,
    state: Mutex<RtcState>,
}

impl Rtc {
    /// Range on the port bus in bytes.
    pub const PORTS: u64 = 2;

    /// A clock that shows the host's time in UTC.
    #[must_use]
    pub fn new(clock: Box<dyn WallClock>) -> Arc<Self> {
        let mut registers = [0; 128];
        registers[STATUS_A] = A_RESET;
        registers[STATUS_B] = B_FIXED;
        registers[STATUS_D] = D_FIXED;
        Arc::new(Self { clock, state: Mutex::new(RtcState { index: 0, registers, offset_seconds: 0 }) })
    }

    /// What a migration carries.
    #[must_use]
    pub fn save(&self) -> RtcState {
        self.lock().clone()
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`Error::BadRegister`].
    pub fn restore(&self, state: &RtcState) -> Result<(), Error> {
        let bad =
            |register, value, reason| Err(Error::BadRegister { device: "RTC", register, value, reason });
        if state.index & !INDEX_BITS != 0 {
            return bad("index", state.index.into(), "there are 128 registers");
        }
        for (register, at, fixed, free) in [
            ("A", STATUS_A, 0, A_WRITABLE),
            ("B", STATUS_B, B_FIXED, B_SET),
            ("C", STATUS_C, 0, 0),
            ("D", STATUS_D, D_FIXED, 0),
        ] {
            let value = state.registers[at];
            if value & !free != fixed {
                return bad(register, value.into(), "read-only bits differ");
            }
        }
        if state.offset_seconds.unsigned_abs() > LAST_SECOND as u64 {
            return bad("offset", state.offset_seconds as u64, "it leads beyond the year 9999");
        }
        *self.lock() = state.clone();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, RtcState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host_seconds(&self) -> i64 {
        i64::try_from(self.clock.unix_seconds()).unwrap_or(LAST_SECOND).min(LAST_SECOND)
    }

    /// Lets the time registers show the time, unless the guest is setting it.
    fn update(&self, state: &mut RtcState) {
        if state.registers[STATUS_B] & B_SET == 0 {
            let seconds = self.host_seconds().saturating_add(state.offset_seconds).clamp(0, LAST_SECOND);
            show(seconds, &mut state.registers);
        }
    }

    /// Lets the clock go on from what the time registers show. What is not a date changes nothing.
    fn adopt(&self, state: &mut RtcState) {
        if let Some(seconds) = read_time(&state.registers) {
            state.offset_seconds = seconds - self.host_seconds();
        }
    }

    fn read_register(&self, state: &mut RtcState) -> u8 {
        self.update(state);
        state.registers[usize::from(state.index & INDEX_BITS)]
    }

    fn write_register(&self, state: &mut RtcState, value: u8) {
        let index = usize::from(state.index & INDEX_BITS);
        match index {
            STATUS_A => state.registers[STATUS_A] = value & A_WRITABLE,
            STATUS_B => {
                let was_set = state.registers[STATUS_B] & B_SET != 0;
                self.update(state);
                state.registers[STATUS_B] = value & B_SET | B_FIXED;
                if was_set && value & B_SET == 0 {
                    self.adopt(state);
                }
            }
            STATUS_C | STATUS_D => {}
            _ if TIME.contains(&index) => {
                self.update(state);
                state.registers[index] = value;
                if state.registers[STATUS_B] & B_SET == 0 {
                    self.adopt(state);
                }
            }
            _ => state.registers[index] = value,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [byte]) = (offset, data) {
            *byte = self.read_register(&mut self.lock());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            // Bit 7 masks the NMI on a PC; there is none.
            (0, [index]) => state.index = index & INDEX_BITS,
            // A write of both ports at once: index, then data.
            (0, [index, value]) => {
                state.index = index & INDEX_BITS;
                self.write_register(&mut state, *value);
            }
            (1, [value]) => self.write_register(&mut state, *value),
            _ => {}
        }
    }
}

fn to_bcd(value: i64) -> u8 {
    // Called with 0 to 99.
    (value / 10 * 16 + value % 10) as u8
}

fn from_bcd(value: u8) -> Option<i64> {
    let (tens, ones) = (value >> 4, value & 0xf);
    (tens < 10 && ones < 10).then_some(i64::from(tens) * 10 + i64::from(ones))
}

fn show(seconds: i64, registers: &mut [u8; 128]) {
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    registers[SECONDS] = to_bcd(second_of_day % 60);
    registers[MINUTES] = to_bcd(second_of_day / 60 % 60);
    registers[HOURS] = to_bcd(second_of_day / 3600);
    // 1970-01-01 was a Thursday; Sunday is 1.
    registers[WEEKDAY] = to_bcd((days + 4) % 7 + 1);
    registers[DAY] = to_bcd(day);
    registers[MONTH] = to_bcd(month);
    registers[YEAR] = to_bcd(year % 100);
    registers[CENTURY] = to_bcd(year / 100);
}

fn read_time(registers: &[u8; 128]) -> Option<i64> {
    let field = |at: usize, range: std::ops::RangeInclusive<i64>| {
        from_bcd(registers[at]).filter(|value| range.contains(value))
    };
    let year = field(CENTURY, 19..=99)? * 100 + field(YEAR, 0..=99)?;
    let (month, day) = (field(MONTH, 1..=12)?, field(DAY, 1..=31)?);
    let days = days_before(year, month) + day - 1;
    let second_of_day = field(HOURS, 0..=23)? * 3600 + field(MINUTES, 0..=59)? * 60 + field(SECONDS, 0..=59)?;
    // A day that the month does not have leads into the next month: not a date. Nor is a time before 1970.
    (days >= 0 && date(days) == (year, month, day)).then_some(days * 86_400 + second_of_day)
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

/// Days from 1970-01-01 to the first of the month.
fn days_before(year: i64, month: i64) -> i64 {
    const BEFORE_MONTH: [i64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let last = year - 1;
    let leap_days = last / 4 - last / 100 + last / 400 - (1969 / 4 - 1969 / 100 + 1969 / 400);
    let in_year = BEFORE_MONTH[(month - 1).clamp(0, 11) as usize];
    (year - 1970) * 365 + leap_days + in_year + i64::from(month > 2 && is_leap(year))
}

/// Year, month and day, `days` (0 or more) after 1970-01-01.
fn date(days: i64) -> (i64, i64, i64) {
    // Never too early, and too late by a year for every 1,461 or so: a few steps back.
    let guess = 1970 + days / 365;
    let year = (1970..=guess).rev().find(|&year| days_before(year, 1) <= days).unwrap_or(1970);
    let month = (1..=12).rev().find(|&month| days_before(year, month) <= days).unwrap_or(1);
    (year, month, days - days_before(year, month) + 1)
}
