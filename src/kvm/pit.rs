//! State of the in-kernel 8254 interval timer.

use kvm_bindings as kvm;
use kvm_bindings::{kvm_pit_channel_state, kvm_pit_state2};
use vmstate::VmState;

use super::{Error, Vm};

/// A counter counts down from at most 65536.
const COUNT_MAX: u32 = 0x1_0000;
/// Counter modes that three bits can say; the 8254 reads 6 and 7 as 2 and 3.
const MODE_MAX: u8 = 7;
/// The mode of a counter that was never programmed.
const MODE_UNSET: u8 = 0xff;
/// Read and write states of KVM's model: none, low byte, high byte, both in two steps.
const ACCESS_STATE_MAX: u8 = 4;
/// Read/write modes of a channel.
const ACCESS_MODE_MAX: u8 = 3;
const FLAGS: u32 = kvm::KVM_PIT_FLAGS_HPET_LEGACY | kvm::KVM_PIT_FLAGS_SPEAKER_DATA_ON;

/// The interval timer. When a count was loaded is not part of it: it is in the host's clock, and KVM starts the
/// periods anew when the state is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "pit", version = 1, oldest = 1)]
pub struct PitState {
    /// Timer, refresh, speaker.
    pub channels: [PitChannelState; 3],
    /// KVM's flags: HPET legacy replacement, speaker data.
    pub flags: u32,
}

/// One counter.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "pit-channel", version = 1, oldest = 1)]
pub struct PitChannelState {
    /// The count that was loaded, up to 65536.
    pub count: u32,
    /// The latched count.
    pub latched_count: u16,
    /// Which part of the latched count is read next; 0: not latched.
    pub count_latched: u8,
    /// Whether the status is latched.
    pub status_latched: u8,
    /// The latched status.
    pub status: u8,
    /// Which byte is read next.
    pub read_state: u8,
    /// Which byte is written next.
    pub write_state: u8,
    /// The low byte, until the high byte is written.
    pub write_latch: u8,
    /// Access mode.
    pub rw_mode: u8,
    /// Counter mode.
    pub mode: u8,
    /// Whether it counts in decimal.
    pub bcd: u8,
    /// The gate input.
    pub gate: u8,
}

impl PitChannelState {
    fn from_kvm(channel: &kvm_pit_channel_state) -> Self {
        Self {
            count: channel.count,
            latched_count: channel.latched_count,
            count_latched: channel.count_latched,
            status_latched: channel.status_latched,
            status: channel.status,
            read_state: channel.read_state,
            write_state: channel.write_state,
            write_latch: channel.write_latch,
            rw_mode: channel.rw_mode,
            mode: channel.mode,
            bcd: channel.bcd,
            gate: channel.gate,
        }
    }

    fn to_kvm(&self, index: usize) -> Result<kvm_pit_channel_state, Error> {
        let limits = [
            ("count", self.count, COUNT_MAX),
            ("count_latched", self.count_latched.into(), ACCESS_STATE_MAX.into()),
            ("status_latched", self.status_latched.into(), 1),
            ("read_state", self.read_state.into(), ACCESS_STATE_MAX.into()),
            ("write_state", self.write_state.into(), ACCESS_STATE_MAX.into()),
            ("rw_mode", self.rw_mode.into(), ACCESS_MODE_MAX.into()),
            ("mode", if self.mode == MODE_UNSET { 0 } else { self.mode.into() }, MODE_MAX.into()),
            ("bcd", self.bcd.into(), 1),
            ("gate", self.gate.into(), 1),
        ];
        for (name, value, limit) in limits {
            if value > limit {
                let why = format!("{name} of channel {index} is {value}, above {limit}");
                return Err(Error::DeviceState { device: "PIT", why });
            }
        }
        Ok(kvm_pit_channel_state {
            count: self.count,
            latched_count: self.latched_count,
            count_latched: self.count_latched,
            status_latched: self.status_latched,
            status: self.status,
            read_state: self.read_state,
            write_state: self.write_state,
            write_latch: self.write_latch,
            rw_mode: self.rw_mode,
            mode: self.mode,
            bcd: self.bcd,
            gate: self.gate,
            count_load_time: 0,
        })
    }
}

impl PitState {
    fn from_kvm(pit: &kvm_pit_state2) -> Self {
        Self { channels: pit.channels.each_ref().map(PitChannelState::from_kvm), flags: pit.flags }
    }

    fn to_kvm(&self) -> Result<kvm_pit_state2, Error> {
        if self.flags & !FLAGS != 0 {
            let why = format!("flags is {:#x}, outside {FLAGS:#x}", self.flags);
            return Err(Error::DeviceState { device: "PIT", why });
        }
        let mut pit = kvm_pit_state2 { flags: self.flags, ..Default::default() };
        for (index, (into, channel)) in pit.channels.iter_mut().zip(&self.channels).enumerate() {
            *into = channel.to_kvm(index)?;
        }
        Ok(pit)
    }
}

impl Vm {
    /// Reads the interval timer.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn save_pit(&self) -> Result<PitState, Error> {
        let state = self.fd().get_pit2().map_err(Error::call("read the interval timer"))?;
        Ok(PitState::from_kvm(&state))
    }

    /// Checks `state` and, if all of it is possible, puts it into the interval timer.
    ///
    /// # Errors
    /// [`Error::DeviceState`] names the field (nothing was changed then); [`Error::Call`].
    pub fn restore_pit(&self, state: &PitState) -> Result<(), Error> {
        self.fd().set_pit2(&state.to_kvm()?).map_err(Error::call("set the interval timer"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::attack;
    use crate::kvm::Host;

    type Fault = fn(&mut PitState);

    fn possible() -> PitState {
        let mut state = PitState::default();
        let [timer, _, speaker] = &mut state.channels;
        // Mode 0 counts once: no interrupt follows, so the state stands still.
        *timer = PitChannelState {
            count: 0x1234,
            rw_mode: 3,
            read_state: 3,
            write_state: 3,
            gate: 1,
            ..Default::default()
        };
        *speaker =
            PitChannelState { count: 0x1_0000, mode: 3, rw_mode: 3, latched_count: 7, ..Default::default() };
        state.channels[1].count = 0x12;
        state.flags = kvm::KVM_PIT_FLAGS_SPEAKER_DATA_ON;
        state
    }

    #[test]
    fn state_survives_the_kernel() {
        let vm = Vm::new(&Host::open().expect("these tests need /dev/kvm")).unwrap();
        assert_ne!(vm.save_pit().unwrap(), possible());
        vm.restore_pit(&possible()).unwrap();
        assert_eq!(vm.save_pit().unwrap(), possible());
    }

    #[test]
    fn it_is_what_its_state_says_or_refused() {
        attack(&possible(), |state| state.to_kvm().ok().map(|pit| PitState::from_kvm(&pit)));
    }

    #[test]
    fn impossible_state_is_refused_by_field_and_changes_nothing() {
        let vm = Vm::new(&Host::open().expect("these tests need /dev/kvm")).unwrap();
        let before = vm.save_pit().unwrap();
        let faults: [(&str, Fault); 10] = [
            ("count", |s| s.channels[0].count = 0x1_0001),
            ("count_latched", |s| s.channels[1].count_latched = 5),
            ("status_latched", |s| s.channels[2].status_latched = 2),
            ("read_state", |s| s.channels[0].read_state = 5),
            ("write_state", |s| s.channels[0].write_state = 5),
            ("rw_mode", |s| s.channels[0].rw_mode = 4),
            ("mode", |s| s.channels[0].mode = 8),
            ("bcd", |s| s.channels[0].bcd = 2),
            ("gate", |s| s.channels[0].gate = 2),
            ("flags", |s| s.flags = 4),
        ];
        // A counter that no guest has programmed is possible too.
        vm.restore_pit(&before).unwrap();
        for (field, fault) in faults {
            let mut state = possible();
            fault(&mut state);
            let error = vm.restore_pit(&state).unwrap_err();
            assert!(matches!(error, Error::DeviceState { device: "PIT", .. }), "{field}: {error}");
            assert!(error.to_string().contains(&format!(" {field} ")), "{field}: {error}");
            assert_eq!(vm.save_pit().unwrap(), before, "{field}");
        }
    }
}
