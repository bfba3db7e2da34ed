//! State of the in-kernel interrupt controllers that belong to the VM: two 8259A PICs and the I/O APIC. (A local APIC
//! is part of its vCPU.)

use kvm_bindings as kvm;
use kvm_bindings::{kvm_ioapic_state, kvm_irqchip, kvm_pic_state};
use vmstate::VmState;

use super::{Error, Vm};
use crate::layout::{GSI_COUNT, IOAPIC_START};

/// Inputs of each PIC that a guest may make level-triggered; the rest (timer, keyboard, cascade, RTC, FPU) are wired
/// as edges.
const ELCR_MASK: [u8; 2] = [0xf8, 0xde];
/// Register numbers of the I/O APIC are 8 bits wide.
const IOAPIC_SELECT_MAX: u32 = 0xff;
/// The I/O APIC's identity is 4 bits wide.
const IOAPIC_ID_MAX: u32 = 0xf;

/// Both PICs and the I/O APIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "irqchip", version = 1, oldest = 1)]
pub struct IrqchipState {
    /// Interrupts 0 to 7.
    pub master: PicState,
    /// Interrupts 8 to 15.
    pub slave: PicState,
    /// Interrupts 0 to 23.
    pub ioapic: IoApicState,
}

/// One 8259A. Bit n of a mask is input n.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "pic", version = 1, oldest = 1)]
pub struct PicState {
    /// Levels seen last, for edge detection.
    pub last_irr: u8,
    /// Requests.
    pub irr: u8,
    /// Masked inputs.
    pub imr: u8,
    /// In service.
    pub isr: u8,
    /// Which input has the highest priority, 0 to 7.
    pub priority_add: u8,
    /// First vector.
    pub irq_base: u8,
    /// Whether a read gives ISR instead of IRR.
    pub read_reg_select: u8,
    /// Whether the next read is a poll.
    pub poll: u8,
    /// Special mask mode.
    pub special_mask: u8,
    /// Which initialisation word comes next, 0 to 3.
    pub init_state: u8,
    /// Automatic end of interrupt.
    pub auto_eoi: u8,
    /// Rotation at automatic end of interrupt.
    pub rotate_on_auto_eoi: u8,
    /// Special fully nested mode.
    pub special_fully_nested_mode: u8,
    /// Whether the initialisation has a fourth word.
    pub init4: u8,
    /// Level-triggered inputs.
    pub elcr: u8,
}

/// The I/O APIC. It is always at [`IOAPIC_START`].
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "ioapic", version = 1, oldest = 1)]
pub struct IoApicState {
    /// The selected register.
    pub register_select: u32,
    /// Identity, bits 3:0.
    pub id: u32,
    /// Requests: bit n is pin n.
    pub irr: u32,
    /// Redirection table, as the guest sees it.
    pub redirection: [u64; GSI_COUNT as usize],
}

impl PicState {
    fn from_kvm(pic: &kvm_pic_state) -> Self {
        Self {
            last_irr: pic.last_irr,
            irr: pic.irr,
            imr: pic.imr,
            isr: pic.isr,
            priority_add: pic.priority_add,
            irq_base: pic.irq_base,
            read_reg_select: pic.read_reg_select,
            poll: pic.poll,
            special_mask: pic.special_mask,
            init_state: pic.init_state,
            auto_eoi: pic.auto_eoi,
            rotate_on_auto_eoi: pic.rotate_on_auto_eoi,
            special_fully_nested_mode: pic.special_fully_nested_mode,
            init4: pic.init4,
            elcr: pic.elcr,
        }
    }

    fn to_kvm(&self, elcr_mask: u8) -> Result<kvm_pic_state, Error> {
        let limits = [
            ("priority_add", self.priority_add, 7),
            ("read_reg_select", self.read_reg_select, 1),
            ("poll", self.poll, 1),
            ("special_mask", self.special_mask, 1),
            ("init_state", self.init_state, 3),
            ("auto_eoi", self.auto_eoi, 1),
            ("rotate_on_auto_eoi", self.rotate_on_auto_eoi, 1),
            ("special_fully_nested_mode", self.special_fully_nested_mode, 1),
            ("init4", self.init4, 1),
        ];
        for (name, value, limit) in limits {
            if value > limit {
                return Err(impossible("PIC", format!("{name} is {value}, above {limit}")));
            }
        }
        if self.elcr & !elcr_mask != 0 {
            return Err(impossible("PIC", format!("elcr is {:#x}, outside {elcr_mask:#x}", self.elcr)));
        }
        Ok(kvm_pic_state {
            last_irr: self.last_irr,
            irr: self.irr,
            imr: self.imr,
            isr: self.isr,
            priority_add: self.priority_add,
            irq_base: self.irq_base,
            read_reg_select: self.read_reg_select,
            poll: self.poll,
            special_mask: self.special_mask,
            init_state: self.init_state,
            auto_eoi: self.auto_eoi,
            rotate_on_auto_eoi: self.rotate_on_auto_eoi,
            special_fully_nested_mode: self.special_fully_nested_mode,
            init4: self.init4,
            elcr: self.elcr,
            elcr_mask,
        })
    }
}

impl IoApicState {
    fn to_kvm(&self) -> Result<kvm_ioapic_state, Error> {
        let limits = [
            ("register_select", self.register_select, IOAPIC_SELECT_MAX),
            ("id", self.id, IOAPIC_ID_MAX),
            ("irr", self.irr, (1 << GSI_COUNT) - 1),
        ];
        for (name, value, limit) in limits {
            if value > limit {
                return Err(impossible("I/O APIC", format!("{name} is {value:#x}, above {limit:#x}")));
            }
        }
        Ok(kvm_ioapic_state {
            base_address: IOAPIC_START,
            ioregsel: self.register_select,
            id: self.id,
            irr: self.irr,
            pad: 0,
            redirtbl: self.redirection.map(|bits| kvm::kvm_ioapic_state__bindgen_ty_1 { bits }),
        })
    }

    #[allow(unsafe_code)]
    fn from_kvm(ioapic: &kvm_ioapic_state) -> Self {
        Self {
            register_select: ioapic.ioregsel,
            id: ioapic.id,
            irr: ioapic.irr,
            // SAFETY: both sides of the union are the same 8 bytes, valid in every combination.
            redirection: ioapic.redirtbl.map(|entry| unsafe { entry.bits }),
        }
    }
}

fn impossible(device: &'static str, why: String) -> Error {
    Error::DeviceState { device, why }
}

impl Vm {
    /// Reads the PICs and the I/O APIC. Every vCPU must be paused.
    ///
    /// # Errors
    /// [`Error::Call`].
    #[allow(unsafe_code)]
    pub fn save_irqchip(&self) -> Result<IrqchipState, Error> {
        let read = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            let what = format!("read interrupt controller {chip_id}");
            self.fd().get_irqchip(&mut chip).map_err(Error::call(what)).map(|()| chip)
        };
        let (master, slave) = (read(kvm::KVM_IRQCHIP_PIC_MASTER)?, read(kvm::KVM_IRQCHIP_PIC_SLAVE)?);
        let ioapic = read(kvm::KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: the chip number says which member the kernel wrote; all are plain integers.
        let (master, slave, ioapic) = unsafe { (master.chip.pic, slave.chip.pic, ioapic.chip.ioapic) };
        Ok(IrqchipState {
            master: PicState::from_kvm(&master),
            slave: PicState::from_kvm(&slave),
            ioapic: IoApicState::from_kvm(&ioapic),
        })
    }

    /// Checks `state` and, if all of it is possible, puts it into the interrupt controllers.
    ///
    /// # Errors
    /// [`Error::DeviceState`] names the field (nothing was changed then); [`Error::Call`].
    pub fn restore_irqchip(&self, state: &IrqchipState) -> Result<(), Error> {
        let master = kvm::kvm_irqchip__bindgen_ty_1 { pic: state.master.to_kvm(ELCR_MASK[0])? };
        let slave = kvm::kvm_irqchip__bindgen_ty_1 { pic: state.slave.to_kvm(ELCR_MASK[1])? };
        let ioapic = kvm::kvm_irqchip__bindgen_ty_1 { ioapic: state.ioapic.to_kvm()? };
        let chips = [
            (kvm::KVM_IRQCHIP_PIC_MASTER, master),
            (kvm::KVM_IRQCHIP_PIC_SLAVE, slave),
            (kvm::KVM_IRQCHIP_IOAPIC, ioapic),
        ];
        for (chip_id, chip) in chips {
            let what = format!("set interrupt controller {chip_id}");
            self.fd().set_irqchip(&kvm_irqchip { chip_id, pad: 0, chip }).map_err(Error::call(what))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::attack;
    use crate::kvm::Host;

    type Fault = fn(&mut IrqchipState);

    fn possible() -> IrqchipState {
        let mut state = IrqchipState::default();
        state.master.imr = 0xfb;
        state.master.irq_base = 0x30;
        state.slave.elcr = 0x0e;
        state.ioapic.id = 3;
        state.ioapic.register_select = 0x11;
        state.ioapic.redirection[4] = 0x0100_0000_0000_0031;
        state.ioapic.redirection[9] = 0x0001_8032 & !(1 << 12);
        state
    }

    #[test]
    fn state_survives_the_kernel() {
        let vm = Vm::new(&Host::open().expect("these tests need /dev/kvm")).unwrap();
        assert_ne!(vm.save_irqchip().unwrap(), possible());
        vm.restore_irqchip(&possible()).unwrap();
        assert_eq!(vm.save_irqchip().unwrap(), possible());
        assert_eq!(vm.save_irqchip().unwrap(), possible(), "reading changes nothing");
    }

    #[test]
    fn it_is_what_its_state_says_or_refused() {
        attack(&possible(), |state| {
            let pic = |pic: &PicState, mask| pic.to_kvm(mask).ok().map(|pic| PicState::from_kvm(&pic));
            Some(IrqchipState {
                master: pic(&state.master, ELCR_MASK[0])?,
                slave: pic(&state.slave, ELCR_MASK[1])?,
                ioapic: state.ioapic.to_kvm().ok().map(|ioapic| IoApicState::from_kvm(&ioapic))?,
            })
        });
    }

    #[test]
    fn impossible_state_is_refused_by_field_and_changes_nothing() {
        let vm = Vm::new(&Host::open().expect("these tests need /dev/kvm")).unwrap();
        let before = vm.save_irqchip().unwrap();
        let faults: [(&str, Fault); 13] = [
            ("priority_add", |s| s.master.priority_add = 8),
            ("read_reg_select", |s| s.slave.read_reg_select = 2),
            ("poll", |s| s.master.poll = 2),
            ("special_mask", |s| s.master.special_mask = 2),
            ("init_state", |s| s.slave.init_state = 4),
            ("auto_eoi", |s| s.master.auto_eoi = 2),
            ("rotate_on_auto_eoi", |s| s.master.rotate_on_auto_eoi = 2),
            ("special_fully_nested_mode", |s| s.master.special_fully_nested_mode = 2),
            ("init4", |s| s.master.init4 = 0xff),
            ("elcr", |s| s.master.elcr = 1),
            ("register_select", |s| s.ioapic.register_select = 0x100),
            ("id", |s| s.ioapic.id = 16),
            ("irr", |s| s.ioapic.irr = 1 << 24),
        ];
        for (field, fault) in faults {
            let mut state = possible();
            fault(&mut state);
            let error = vm.restore_irqchip(&state).unwrap_err();
            assert!(matches!(error, Error::DeviceState { .. }), "{field}: {error}");
            assert!(error.to_string().contains(&format!("{field} is ")), "{field}: {error}");
            assert_eq!(vm.save_irqchip().unwrap(), before, "{field}");
        }
    }
}
