//! Time: the frequency of the time stamp counter, and gaps in it.

use crate::machine::Machine;
use crate::memory::Dma;

const LEAF_TSC: u32 = 0x15;
const LEAF_FREQUENCY: u32 = 0x16;
const LEAF_KVM: u32 = 0x4000_0000;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_KVM_FREQUENCY: u32 = 0x4000_0010;
/// "KVMK", "VMKV", "M\0\0\0" in ebx, ecx, edx.
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
/// KVM_FEATURE_CLOCKSOURCE2.
const KVM_FEATURE_CLOCK: u32 = 1 << 3;
/// MSR_KVM_SYSTEM_TIME_NEW; bit 0 of the address switches the clock on.
const MSR_KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// Where the frequency comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frequency {
    /// Thousands of counts a second.
    pub tsc_khz: u64,
    /// The source, as the `clock` line names it.
    pub source: &'static str,
}

/// KVM's clock: a structure in guest memory that KVM keeps (struct pvclock_vcpu_time_info).
#[derive(Debug)]
pub struct KvmClock {
    page: Dma,
}

impl KvmClock {
    /// Switches the clock on. None where the hypervisor has none.
    pub fn start(machine: &mut dyn Machine) -> Option<Self> {
        let [_, b, c, d] = machine.cpuid(LEAF_KVM, 0);
        if [b, c, d] != KVM_SIGNATURE || machine.cpuid(LEAF_KVM_FEATURES, 0)[0] & KVM_FEATURE_CLOCK == 0 {
            return None;
        }
        let page = Dma::new(1);
        machine.write_msr(MSR_KVM_SYSTEM_TIME, page.address() | 1);
        Some(Self { page })
    }

    /// The version, odd while KVM writes the structure.
    fn version(&self) -> u32 {
        self.page.load32(0)
    }

    /// Thousands of counts a second, from the scale of the structure.
    fn tsc_khz(&self) -> Option<u64> {
        let (scale, shift) = (self.page.load32(6), (self.page.load32(7) & 0xff) as u8 as i8);
        khz_of_scale(scale, shift)
    }

    /// Nanoseconds since the machine started, and the counter they belong to.
    pub fn now(&self, machine: &dyn Machine) -> (u64, u64) {
        loop {
            let version = self.version();
            let tsc = machine.tsc();
            let (since, base) = (self.page.load64(1), self.page.load64(2));
            let (scale, shift) = (self.page.load32(6), (self.page.load32(7) & 0xff) as u8 as i8);
            if version & 1 == 0 && version == self.version() {
                return (base.wrapping_add(scaled(tsc.saturating_sub(since), scale, shift)), tsc);
            }
        }
    }
}

fn scaled(delta: u64, scale: u32, shift: i8) -> u64 {
    let distance = u32::from(shift.unsigned_abs()).min(63);
    let delta = if shift < 0 { delta >> distance } else { delta << distance };
    ((u128::from(delta) * u128::from(scale)) >> 32) as u64
}

/// `nanoseconds = (counts << shift) * scale >> 32`, solved for the counts of a millisecond.
fn khz_of_scale(scale: u32, shift: i8) -> Option<u64> {
    let khz = (1_000_000u128 << 32).checked_div(u128::from(scale))?;
    let distance = u32::from(shift.unsigned_abs()).min(31);
    Some((if shift < 0 { khz << distance } else { khz >> distance }) as u64)
}

/// Finds the frequency: what the command line says, else the first of KVM's leaf, KVM's clock, and the
/// processor's leaves. None when no source knows it.
pub fn frequency(machine: &mut dyn Machine, clock: Option<&KvmClock>, given_khz: u64) -> Option<Frequency> {
    let found = |tsc_khz: u64, source| (tsc_khz > 0).then_some(Frequency { tsc_khz, source });
    found(given_khz, "command-line")
        .or_else(|| {
            let most = machine.cpuid(LEAF_KVM, 0)[0];
            let known = (LEAF_KVM_FREQUENCY..LEAF_KVM_FREQUENCY + 0x100).contains(&most);
            found(if known { machine.cpuid(LEAF_KVM_FREQUENCY, 0)[0].into() } else { 0 }, "kvm-leaf")
        })
        .or_else(|| found(clock?.tsc_khz()?, "kvm-clock"))
        .or_else(|| {
            let most = machine.cpuid(0, 0)[0];
            let leaf =
                |machine: &mut dyn Machine, leaf| if most >= leaf { machine.cpuid(leaf, 0) } else { [0; 4] };
            let [denominator, numerator, crystal_hz, _] = leaf(machine, LEAF_TSC);
            let crystal = u64::from(crystal_hz) * u64::from(numerator);
            let tsc_khz = crystal.checked_div(u64::from(denominator)).unwrap_or(0) / 1000;
            found(tsc_khz, "cpuid-15")
                .or_else(|| found(u64::from(leaf(machine, LEAF_FREQUENCY)[0] & 0xffff) * 1000, "cpuid-16"))
        })
}

/// A moment in the future.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    start: u64,
    counts: u64,
}

impl Deadline {
    /// So many milliseconds from now.
    pub fn new(machine: &dyn Machine, tsc_khz: u64, milliseconds: u64) -> Self {
        Self { start: machine.tsc(), counts: milliseconds.saturating_mul(tsc_khz) }
    }

    /// Whether it has passed.
    pub fn is_over(&self, machine: &dyn Machine) -> bool {
        machine.tsc().saturating_sub(self.start) >= self.counts
    }
}

/// A stretch of time in which the exerciser did not run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// Length in counts.
    pub counts: u64,
    /// The counter at its end.
    pub end: u64,
}

/// Watches the counter. The main loop calls [`GapWatch::look`] at every turn.
#[derive(Debug)]
pub struct GapWatch {
    last: u64,
    largest: Gap,
}

impl GapWatch {
    /// Starts to watch.
    pub fn new(now: u64) -> Self {
        Self { last: now, largest: Gap::default() }
    }

    /// Notes the time.
    ///
    /// # Errors
    ///
    /// The counts by which the counter went back.
    pub fn look(&mut self, now: u64) -> Result<(), u64> {
        let Some(counts) = now.checked_sub(self.last) else {
            let back = self.last - now;
            self.last = now;
            return Err(back);
        };
        self.last = now;
        if counts > self.largest.counts {
            self.largest = Gap { counts, end: now };
        }
        Ok(())
    }

    /// The largest gap since the last call.
    pub fn take(&mut self) -> Gap {
        core::mem::take(&mut self.largest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gap_counts_until_it_is_taken() {
        let mut watch = GapWatch::new(100);
        for now in [110, 150, 155] {
            watch.look(now).unwrap();
        }
        assert_eq!(watch.take(), Gap { counts: 40, end: 150 });
        watch.look(156).unwrap();
        assert_eq!(watch.take(), Gap { counts: 1, end: 156 });
        assert_eq!(watch.take(), Gap::default());
    }

    #[test]
    fn a_counter_that_goes_back_is_an_error_once() {
        let mut watch = GapWatch::new(100);
        assert_eq!(watch.look(90), Err(10));
        assert_eq!(watch.look(91), Ok(()));
    }

    #[test]
    fn kvm_clock_scales() {
        // 2 GHz: half a nanosecond a count. KVM keeps the scale at or above 2^31 and shifts.
        assert_eq!(scaled(2_000_000, 1 << 31, 0), 1_000_000);
        assert_eq!(scaled(2_000_000, u32::MAX, -1), 999_999);
        assert_eq!(khz_of_scale(1 << 31, 0), Some(2_000_000));
        assert_eq!(khz_of_scale(1 << 31, -1), Some(4_000_000));
        assert_eq!(khz_of_scale(1 << 31, 1), Some(1_000_000));
        assert_eq!(khz_of_scale(0, 0), None);
    }
}
