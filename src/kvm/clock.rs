//! Guest time across a stop.
//!
//! A guest reads time from its TSC and from kvm-clock, which KVM derives from it. Both must advance by what really
//! passed while it was stopped in a live migration, and stand still while it lay in a file.
//!
//! A vCPU's TSC is the host's plus an offset. On the host where it was saved (same boot, so the same TSC) the offset
//! simply stays. Elsewhere the guest's TSC at the stop is known (host TSC then, plus offset), and the time that passed
//! is the difference of the two hosts' wall clocks, which is bounded, because such clocks can be wrong. All vCPUs get
//! the same shift, so that they agree as well as they did before.

use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};
use vmstate::VmState;

use super::{Error, Vm};

/// The most that the guest's clocks jump when only wall clocks tell how long it was stopped: 10 minutes.
const WALL_CLOCK_BOUND_NANOS: u64 = 600 * 1_000_000_000;
/// Processor clocks outside 1 MHz to 100 GHz are not believed.
const TSC_KHZ: std::ops::RangeInclusive<u32> = 1_000..=100_000_000;

/// One moment by every clock of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTime {
    /// Which boot of which host: the kernel's random identity of it.
    pub boot_id: [u8; 16],
    /// Wall clock, in nanoseconds since 1970.
    pub realtime_nanos: u64,
    /// Nanoseconds since some moment of this boot.
    pub monotonic_nanos: u64,
    /// The processor's time stamp counter.
    pub tsc: u64,
}

impl HostTime {
    /// Now, here.
    ///
    /// # Errors
    /// [`Error::DeviceState`] when the kernel does not tell its boot identity.
    #[allow(unsafe_code)]
    pub fn now() -> Result<Self, Error> {
        let boot_id = boot_id()?;
        let nanos = |clock| {
            let time = clock_gettime(clock);
            // Clocks of a running host are after 1970 and fit 584 years.
            (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
        };
        // SAFETY: every x86-64 processor has RDTSC, and Linux lets processes use it.
        let tsc = unsafe { std::arch::x86_64::_rdtsc() };
        let (monotonic_nanos, realtime_nanos) = (nanos(ClockId::Monotonic), nanos(ClockId::Realtime));
        Ok(Self { boot_id, realtime_nanos, monotonic_nanos, tsc })
    }
}

/// Names the host, until it boots again. Asked for once: the next time may be while a guest stands still.
pub(crate) fn boot_id() -> Result<[u8; 16], Error> {
    static KNOWN: OnceLock<[u8; 16]> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let path = "/proc/sys/kernel/random/boot_id";
    let unknown = |why: String| Error::DeviceState { device: "host clock", why: format!("{path}: {why}") };
    let text = std::fs::read_to_string(path).map_err(|e| unknown(e.to_string()))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id = u128::from_str_radix(&digits, 16).map_err(|e| unknown(format!("{text:?}: {e}")))?;
    Ok(*KNOWN.get_or_init(|| id.to_be_bytes()))
}

/// Why the guest was stopped, which says how its clocks go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestTime {
    /// It moves while it runs: its clocks advance by what passed.
    Live,
    /// It lay in a file: its monotonic clocks continue where they stood. (Its wall clock is the host's: RTC and
    /// kvm-clock's wall clock are read from there.)
    File,
}

/// Guest time at the moment of a save.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "clock", version = 1, oldest = 1)]
pub struct ClockState {
    /// kvm-clock, in nanoseconds.
    pub kvm_clock_nanos: u64,
    /// Which boot of which host.
    pub boot_id: [u8; 16],
    /// That host's wall clock, in nanoseconds since 1970.
    pub realtime_nanos: u64,
    /// That host's monotonic clock, in nanoseconds.
    pub monotonic_nanos: u64,
    /// That host's time stamp counter.
    pub host_tsc: u64,
    /// What the guest's time stamp counters count in a millisecond.
    pub tsc_khz: u32,
}

/// Whether a guest that counted `saved_khz` goes on where `here_khz` is counted. KVM takes 250 parts in a million for the
/// same: hosts of one model calibrate that differently at each boot. More needs scaling in hardware.
#[must_use]
pub fn is_same_tsc_frequency(saved_khz: u32, here_khz: u32) -> bool {
    saved_khz.abs_diff(here_khz) <= here_khz / 4000
}

/// How to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockPlan {
    /// kvm-clock to set, in nanoseconds.
    pub kvm_clock_nanos: u64,
    /// To be added, modulo 2^64, to every vCPU's saved TSC offset.
    pub tsc_shift: u64,
}

impl ClockState {
    /// What to set `now`, on the host whose clocks these are. Both clocks run on from the moment of the plan, so the
    /// vCPUs need not start at once.
    ///
    /// # Errors
    /// [`Error::DeviceState`] for a TSC frequency that no processor has.
    pub fn plan(&self, now: &HostTime, time: GuestTime) -> Result<ClockPlan, Error> {
        if !TSC_KHZ.contains(&self.tsc_khz) {
            let why = format!("tsc_khz is {}, outside {TSC_KHZ:?}", self.tsc_khz);
            return Err(Error::DeviceState { device: "guest clock", why });
        }
        let same_host = self.boot_id == now.boot_id;
        let passed_nanos = match (time, same_host) {
            (GuestTime::File, _) => 0,
            (GuestTime::Live, true) => now.monotonic_nanos.saturating_sub(self.monotonic_nanos),
            (GuestTime::Live, false) => {
                now.realtime_nanos.saturating_sub(self.realtime_nanos).min(WALL_CLOCK_BOUND_NANOS)
            }
        };
        let tsc_shift = if time == GuestTime::Live && same_host {
            0
        } else {
            let ticks = u128::from(passed_nanos) * u128::from(self.tsc_khz) / 1_000_000;
            // Bounded by 10 minutes of 100 GHz.
            self.host_tsc.wrapping_add(ticks as u64).wrapping_sub(now.tsc)
        };
        Ok(ClockPlan { kvm_clock_nanos: self.kvm_clock_nanos.wrapping_add(passed_nanos), tsc_shift })
    }
}

impl Vm {
    /// Reads kvm-clock together with the host's clocks. `tsc_khz` is the vCPUs'.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn save_clock(&self, tsc_khz: u32) -> Result<ClockState, Error> {
        let clock = self.fd().get_clock().map_err(Error::call("read kvm-clock"))?;
        let HostTime { boot_id, realtime_nanos, monotonic_nanos, tsc: host_tsc } = HostTime::now()?;
        let kvm_clock_nanos = clock.clock;
        Ok(ClockState { kvm_clock_nanos, boot_id, realtime_nanos, monotonic_nanos, host_tsc, tsc_khz })
    }

    /// Sets kvm-clock.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn restore_clock(&self, plan: &ClockPlan) -> Result<(), Error> {
        let clock = kvm_bindings::kvm_clock_data { clock: plan.kvm_clock_nanos, ..Default::default() };
        self.fd()
            .set_clock(&clock)
            .map_err(Error::call(format!("set kvm-clock to {} ns", plan.kvm_clock_nanos)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::attack;
    use crate::kvm::Host;

    const SAVED: ClockState = ClockState {
        kvm_clock_nanos: 5_000_000,
        boot_id: [1; 16],
        realtime_nanos: 1_000_000_000,
        monotonic_nanos: 700,
        host_tsc: 10_000,
        tsc_khz: 2_000_000,
    };

    fn now(boot_id: u8) -> HostTime {
        HostTime {
            boot_id: [boot_id; 16],
            realtime_nanos: 1_050_000_000,
            monotonic_nanos: 40_000_700,
            tsc: 3_000,
        }
    }

    #[test]
    fn frequencies_may_differ_by_how_they_were_measured() {
        for (saved, same) in
            [(2_000_000, true), (2_000_500, true), (1_999_500, true), (2_000_501, false), (0, false)]
        {
            assert_eq!(is_same_tsc_frequency(saved, 2_000_000), same, "{saved}");
        }
    }

    #[test]
    fn on_the_same_host_the_offset_stays_and_the_monotonic_clock_says_what_passed() {
        let plan = SAVED.plan(&now(1), GuestTime::Live).unwrap();
        assert_eq!(plan, ClockPlan { kvm_clock_nanos: 45_000_000, tsc_shift: 0 });
    }

    #[test]
    fn on_another_host_both_clocks_advance_by_the_difference_of_the_wall_clocks() {
        let plan = SAVED.plan(&now(2), GuestTime::Live).unwrap();
        assert_eq!(plan.kvm_clock_nanos, 55_000_000);
        // The guest's TSC was 10000 + offset and is to be 50 ms of 2 GHz more, on a host whose TSC is 3000.
        assert_eq!(plan.tsc_shift, 10_000 + 100_000_000 - 3_000);
    }

    #[test]
    fn wall_clocks_that_disagree_are_bounded() {
        let back = HostTime { realtime_nanos: 0, ..now(2) };
        assert_eq!(SAVED.plan(&back, GuestTime::Live).unwrap().kvm_clock_nanos, 5_000_000);
        let far = HostTime { realtime_nanos: u64::MAX, ..now(2) };
        assert_eq!(
            SAVED.plan(&far, GuestTime::Live).unwrap().kvm_clock_nanos,
            5_000_000 + WALL_CLOCK_BOUND_NANOS
        );
    }

    #[test]
    fn in_a_file_time_stands_still_on_every_host() {
        for host in [1, 2] {
            let plan = SAVED.plan(&now(host), GuestTime::File).unwrap();
            assert_eq!(plan, ClockPlan { kvm_clock_nanos: 5_000_000, tsc_shift: 7_000 });
        }
    }

    #[test]
    fn foreign_values_neither_panic_nor_pass() {
        let odd =
            ClockState { kvm_clock_nanos: u64::MAX, host_tsc: u64::MAX, monotonic_nanos: u64::MAX, ..SAVED };
        assert!(odd.plan(&now(1), GuestTime::Live).is_ok());
        assert!(odd.plan(&now(2), GuestTime::Live).is_ok());
        for tsc_khz in [0, 999, u32::MAX] {
            let error = ClockState { tsc_khz, ..SAVED }.plan(&now(1), GuestTime::Live).unwrap_err();
            assert!(error.to_string().contains("tsc_khz is"), "{error}");
        }
    }

    /// It is no device that could be saved again: the plan must be one at least, for every host and reason.
    #[test]
    fn every_state_is_planned_with_or_refused() {
        attack(&SAVED, |state| {
            for (host, time) in [1, 2].into_iter().zip([GuestTime::Live, GuestTime::File]) {
                let plan = state.plan(&now(host), time).ok()?;
                assert!(plan.kvm_clock_nanos.wrapping_sub(state.kvm_clock_nanos) <= WALL_CLOCK_BOUND_NANOS);
            }
            Some(state.clone())
        });
    }

    #[test]
    fn kvm_clock_is_set_and_runs_on() {
        let vm = Vm::new(&Host::open().expect("these tests need /dev/kvm")).unwrap();
        let before = vm.save_clock(2_000_000).unwrap();
        assert_eq!(before.boot_id, HostTime::now().unwrap().boot_id);
        let hour = 3_600_000_000_000;
        let plan = ClockPlan { kvm_clock_nanos: before.kvm_clock_nanos + hour, tsc_shift: 0 };
        vm.restore_clock(&plan).unwrap();
        let after = vm.save_clock(2_000_000).unwrap();
        assert!(after.kvm_clock_nanos >= plan.kvm_clock_nanos);
        assert!(after.kvm_clock_nanos - plan.kvm_clock_nanos < hour, "{after:?}");
    }
}
