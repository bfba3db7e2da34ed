//! The buses and the small devices: what every machine has, whatever its disks.

use std::io::Write;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bus::Bus;
use legacy::{AcpiPm, I8042, PowerEvents, Rtc, Serial, WallClock};
use pci::RootBus;

use super::{EventSink, GuestEvent};
use crate::kvm::{IrqLine, Vm};
use crate::layout;
use crate::vcpu::Buses;

/// Buses and small devices, wired up.
pub struct Chipset {
    /// Where vCPUs' accesses go.
    pub buses: Buses,
    /// PCI bus 0.
    pub root: Arc<RootBus>,
    /// The console.
    pub serial: Arc<Serial>,
    /// Wall clock and CMOS.
    pub rtc: Arc<Rtc>,
    /// Power-off.
    pub acpi_pm: Arc<AcpiPm>,
    /// The reset line.
    pub _i8042: Arc<I8042>,
}

impl Chipset {
    /// Makes the devices and puts them on their buses.
    ///
    /// # Errors
    /// Two devices claim the same range: the address map is wrong.
    pub fn new(vm: &Arc<Vm>, console: Box<dyn Write + Send>, events: &EventSink) -> anyhow::Result<Self> {
        let ports = Arc::new(Bus::new());
        let mmio = Arc::new(Bus::new());
        let power: Arc<dyn PowerEvents> = Arc::new(Power(Arc::clone(events)));

        let serial = Serial::new(Arc::new(IrqLine::new(Arc::clone(vm), layout::SERIAL_GSI)), console);
        let rtc = Rtc::new(Box::new(HostClock));
        let acpi_pm = AcpiPm::new(Arc::clone(&power));
        let i8042 = I8042::new(power);
        ports.insert(layout::SERIAL_PORT.into(), Serial::PORTS, Arc::clone(&serial) as _)?;
        ports.insert(layout::RTC_PORT.into(), Rtc::PORTS, Arc::clone(&rtc) as _)?;
        ports.insert(layout::ACPI_PM_PORT.into(), AcpiPm::PORTS, Arc::clone(&acpi_pm) as _)?;
        ports.insert(layout::I8042_PORT.into(), I8042::PORTS, Arc::clone(&i8042) as _)?;

        let window = layout::PCI_WINDOW_START..layout::PCI_WINDOW_START + layout::PCI_WINDOW_LENGTH_BYTES;
        let root = RootBus::new(Arc::clone(&mmio), vec![window]);
        ports.insert(layout::PCI_CONFIG_PORT.into(), 8, root.config_ports())?;
        mmio.insert(layout::ECAM_START, layout::ECAM_LENGTH_BYTES, root.ecam())?;
        Ok(Self { buses: Buses { ports, mmio }, root, serial, rtc, acpi_pm, _i8042: i8042 })
    }
}

/// Passes the guest's wish to end on.
struct Power(EventSink);

impl PowerEvents for Power {
    fn reset(&self) {
        (self.0)(GuestEvent::Reset);
    }

    fn power_off(&self) {
        (self.0)(GuestEvent::PowerOff);
    }
}

/// The host's wall clock.
struct HostClock;

impl WallClock for HostClock {
    fn unix_seconds(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
    }
}
