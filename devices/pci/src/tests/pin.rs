//! The interrupt pin.

use super::*;

#[derive(Default)]
struct Line(Mutex<Vec<bool>>);

impl bus::InterruptLine for Line {
    fn set_level(&self, high: bool) {
        self.0.lock().unwrap().push(high);
    }
}

impl Line {
    fn take(&self) -> Vec<bool> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// An endpoint with a pin and its line.
fn endpoint() -> (Endpoint, Arc<Line>) {
    let mut config = config(2);
    config.add_interrupt_pin();
    let endpoint = Endpoint::new(config, Arc::new(Recorder::default())).unwrap();
    let line = Arc::new(Line::default());
    endpoint.connect_pin(line.clone());
    (endpoint, line)
}

fn status(endpoint: &Endpoint) -> bool {
    let (mut word, mut both) = ([0; 2], [0; 8]);
    endpoint.config_read(0x06, &mut word);
    endpoint.config_read(0x00, &mut both);
    assert_eq!(both[6..], word, "an access that begins before it sees it too");
    word[0] & 1 << 3 != 0
}

#[test]
fn the_line_follows_the_device_and_interrupt_disable_holds_it_back() {
    let (endpoint, line) = endpoint();
    let mut pin = [0];
    endpoint.config_read(0x3d, &mut pin);
    assert_eq!(pin, [1], "INTA#");
    assert!(endpoint.uses_pin() && !status(&endpoint));
    endpoint.set_interrupt(true);
    endpoint.set_interrupt(true);
    assert!(status(&endpoint));
    assert_eq!(line.take(), [true], "driven when it changes");
    endpoint.config_write(0x04, &(1_u16 << 10).to_le_bytes());
    assert!(status(&endpoint), "Interrupt Disable does not change Interrupt Status");
    assert_eq!(line.take(), [false]);
    endpoint.set_interrupt(false);
    endpoint.set_interrupt(true);
    assert!(line.take().is_empty());
    endpoint.config_write(0x04, &[0, 0]);
    assert_eq!(line.take(), [true]);
    endpoint.set_interrupt(false);
    assert!(!status(&endpoint));
    assert_eq!(line.take(), [false]);
}

#[test]
fn msi_x_and_d3hot_take_the_pin_away() {
    let (endpoint, line) = endpoint();
    let power = 0x4c + 4;
    for (offset, on, off) in [(MSIX_CAPABILITY + 2, [0, 0x80], [0, 0]), (power, [3, 0], [0, 0])] {
        endpoint.set_interrupt(true);
        assert_eq!(line.take(), [true]);
        endpoint.config_write(offset, &on);
        assert_eq!(line.take(), [false]);
        assert!(!endpoint.uses_pin() && !status(&endpoint));
        endpoint.config_write(offset, &off);
        assert_eq!(line.take(), [true]);
        endpoint.set_interrupt(false);
        assert_eq!(line.take(), [false]);
    }
}

#[test]
fn a_restored_function_drives_its_line_when_it_is_told() {
    let (source, _) = endpoint();
    source.set_interrupt(true);
    let state = source.save();
    let (target, line) = endpoint();
    target.restore(&state).unwrap();
    assert!(line.take().is_empty(), "what it asks for is derived");
    target.drive_pin();
    assert_eq!(line.take(), [false]);
    target.set_interrupt(true);
    target.drive_pin();
    assert_eq!(line.take(), [true, true]);
}

#[test]
fn a_state_from_before_there_were_pins_has_none() {
    let old = Endpoint::new(config(2), Arc::new(Recorder::default())).unwrap().save();
    let (target, line) = endpoint();
    target.restore(&old).unwrap();
    assert_eq!(target.save(), old);
    assert!(!target.uses_pin());
    target.set_interrupt(true);
    assert!(line.take().is_empty());
    let mut other = old;
    other.config.bytes[0x3d] = 2;
    assert!(matches!(target.restore(&other), Err(Error::ConfigMismatch { offset: 0x3d, saved: 2, .. })));
}
