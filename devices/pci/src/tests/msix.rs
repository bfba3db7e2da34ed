//! MSI-X: masking, pending bits, what the sink is told, restoring.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x4031 };

fn write32(function: &Function, offset: u32, value: u32) {
    function.bar_write(0, u64::from(offset), &value.to_le_bytes());
}

fn program(function: &Function, vector: u32, masked: bool) {
    let entry = TABLE + 16 * vector;
    write32(function, entry, MESSAGE.address as u32);
    write32(function, entry + 4, 0);
    write32(function, entry + 8, MESSAGE.data);
    write32(function, entry + 12, u32::from(masked));
}

/// The command register; whether that has made the function a bus master.
fn command(function: &Function, bits: u16) -> bool {
    function.endpoint.config_write(0x04, &bits.to_le_bytes())
}

/// Message control of a bus master, which every driver makes the function first.
fn control(function: &Function, enabled: bool, masked: bool) {
    command(function, 0b110);
    let control = u16::from(enabled) << 15 | u16::from(masked) << 14;
    function.config_write(MSIX_CAPABILITY + 2, &control.to_le_bytes());
}

fn pending(function: &Function) -> u64 {
    let mut bits = [0; 8];
    function.bar_read(0, u64::from(PENDING), &mut bits);
    u64::from_le_bytes(bits)
}

#[test]
fn an_unmasked_vector_sends_its_message() {
    let (function, sink) = Function::new(3);
    control(&function, true, false);
    assert_eq!(sink.take(), [], "every vector is masked after reset");
    program(&function, 1, false);
    assert_eq!(sink.take(), [Told::Set(1, Some(MESSAGE))]);
    function.endpoint.msix().trigger(1);
    function.endpoint.msix().trigger(7);
    assert_eq!(sink.take(), [Told::Signal(1)]);
    let mut entry = [0; 16];
    for (part, at) in entry.chunks_mut(8).zip([0, 8]) {
        function.bar_read(0, u64::from(TABLE) + 16 + at, part);
    }
    assert_eq!(entry, *b"\x00\x10\xe0\xfe\x00\x00\x00\x00\x31\x40\x00\x00\x00\x00\x00\x00");
}

#[test]
fn masked_events_are_pending_and_fire_once_on_unmask() {
    let (function, sink) = Function::new(3);
    control(&function, true, false);
    program(&function, 2, true);
    let msix = function.endpoint.msix();
    msix.trigger(2);
    msix.trigger(2);
    assert_eq!(sink.take(), []);
    assert_eq!(pending(&function), 0b100);
    write32(&function, PENDING, 0);
    assert_eq!(pending(&function), 0b100, "pending bits are read-only");
    write32(&function, TABLE + 2 * 16 + 12, 0);
    assert_eq!(sink.take(), [Told::Set(2, Some(MESSAGE)), Told::Signal(2)]);
    assert_eq!(pending(&function), 0);
}

#[test]
fn the_function_mask_holds_back_all_vectors() {
    let (function, sink) = Function::new(2);
    control(&function, true, true);
    program(&function, 0, false);
    program(&function, 1, false);
    function.endpoint.msix().trigger(0);
    assert_eq!(sink.take(), []);
    control(&function, true, false);
    assert_eq!(sink.take(), [Told::Set(0, Some(MESSAGE)), Told::Signal(0), Told::Set(1, Some(MESSAGE))]);
    control(&function, true, true);
    assert_eq!(sink.take(), [Told::Set(0, None), Told::Set(1, None)]);
}

#[test]
fn what_is_no_bus_master_sends_no_message_and_remembers_it() {
    let (function, sink) = Function::new(3);
    control(&function, true, false);
    program(&function, 0, false);
    program(&function, 1, false);
    program(&function, 2, true);
    sink.take();
    assert!(!command(&function, 0b110), "it is one already");
    assert!(!command(&function, 0b010));
    assert!(!function.endpoint.is_bus_master());
    assert_eq!(sink.take(), [Told::Set(0, None), Told::Set(1, None)]);
    function.endpoint.msix().trigger(1);
    function.endpoint.msix().trigger(2);
    assert_eq!(sink.take(), []);
    assert_eq!(pending(&function), 0b110);
    // It is saved and restored like that.
    let state = function.endpoint.save();
    let (restored, restored_sink) = Function::new(3);
    restored.endpoint.restore(&state).unwrap();
    assert!(!restored.endpoint.is_bus_master());
    assert_eq!((restored.endpoint.save(), restored_sink.take()), (state, vec![]));
    for (function, sink) in [(function, sink), (restored, restored_sink)] {
        assert!(command(&function, 0b110), "what was held back is due");
        assert!(function.endpoint.is_bus_master());
        let told = [Told::Set(0, Some(MESSAGE)), Told::Set(1, Some(MESSAGE)), Told::Signal(1)];
        assert_eq!(sink.take(), told);
        assert_eq!(pending(&function), 0b100, "the mask holds");
    }
}

#[test]
fn events_while_msix_is_off_are_lost() {
    let (function, sink) = Function::new(1);
    program(&function, 0, false);
    function.endpoint.msix().trigger(0);
    control(&function, true, true);
    function.endpoint.msix().trigger(0);
    assert_eq!(pending(&function), 1);
    control(&function, false, false);
    assert_eq!(pending(&function), 0);
    control(&function, true, false);
    assert_eq!(sink.take(), [Told::Set(0, Some(MESSAGE))]);
}

#[test]
fn rewriting_an_unmasked_vector_tells_the_sink() {
    let (function, sink) = Function::new(1);
    control(&function, true, false);
    program(&function, 0, false);
    sink.take();
    write32(&function, TABLE + 8, 0x41);
    write32(&function, TABLE + 8, 0x41);
    assert_eq!(sink.take(), [Told::Set(0, Some(MsiMessage { data: 0x41, ..MESSAGE }))]);
    function.bar_write(0, u64::from(TABLE), &0xfee0_2003_u64.to_le_bytes());
    assert_eq!(sink.take(), [Told::Set(0, Some(MsiMessage { data: 0x41, address: 0xfee0_2000 }))]);
}

#[test]
fn odd_accesses_are_harmless() {
    let (function, sink) = Function::new(3);
    control(&function, true, false);
    let before = function.endpoint.save();
    for length in [1, 2, 4, 8] {
        for offset in u64::from(TABLE) - 8..u64::from(TABLE) + 3 * 16 + 8 {
            if length < 4 || offset % length != 0 {
                function.bar_write(0, offset, &[0; 8][..length as usize]);
            }
            function.bar_read(0, offset, &mut [0; 8][..length as usize]);
            function.bar_read(0, offset + u64::from(PENDING - TABLE), &mut [0; 8][..length as usize]);
        }
    }
    assert_eq!(function.endpoint.save(), before);
    assert_eq!(sink.take(), []);
    let mut end = [0xaa; 8];
    assert!(function.endpoint.bar_read(0, u64::from(TABLE) + 3 * 16 - 4, &mut end));
    assert_eq!(end, [1, 0, 0, 0, 0, 0, 0, 0], "nothing beyond the table");
    assert!(!function.endpoint.bar_read(1, u64::from(TABLE), &mut end));
    assert!(!function.endpoint.bar_read(0, u64::from(TABLE) + 3 * 16, &mut end));
}

/// A sink that knows whether a message comes while its vector is masked.
#[derive(Default)]
struct Strict {
    open: AtomicBool,
    late: AtomicBool,
    signals: std::sync::atomic::AtomicU32,
}

impl MsixSink for Strict {
    fn set_vector(&self, _vector: u16, message: Option<MsiMessage>) {
        self.open.store(message.is_some(), Ordering::SeqCst);
    }

    fn signal(&self, _vector: u16) {
        // Lingers, so that a mask which does not wait for senders overtakes this one.
        for _ in 0..20 {
            std::thread::yield_now();
            if !self.open.load(Ordering::SeqCst) {
                self.late.store(true, Ordering::SeqCst);
            }
        }
        self.signals.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn no_message_follows_a_mask() {
    let sink = Arc::new(Strict::default());
    let endpoint = Endpoint::new(config(1), sink.clone()).unwrap();
    endpoint.config_write(0x04, &0b110_u16.to_le_bytes());
    endpoint.config_write(MSIX_CAPABILITY + 2, &0x8000_u16.to_le_bytes());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                endpoint.msix().trigger(0);
            }
        });
        for _ in 0..200 {
            let before = sink.signals.load(Ordering::SeqCst);
            endpoint.bar_write(0, u64::from(TABLE) + 12, &0_u32.to_le_bytes());
            while sink.signals.load(Ordering::SeqCst) == before {
                std::thread::yield_now();
            }
            endpoint.bar_write(0, u64::from(TABLE) + 12, &1_u32.to_le_bytes());
        }
        done.store(true, Ordering::SeqCst);
    });
    assert!(!sink.late.load(Ordering::SeqCst), "a message came after the mask");
    endpoint.msix().trigger(0);
    let sent = sink.signals.load(Ordering::SeqCst);
    assert!(endpoint.save().msix.entries[0].pending);
    endpoint.bar_write(0, u64::from(TABLE) + 12, &0_u32.to_le_bytes());
    assert_eq!(sink.signals.load(Ordering::SeqCst), sent + 1);
}

#[test]
fn restore_announces_what_is_deliverable_and_keeps_what_is_pending() {
    let (source, _) = Function::new(3);
    control(&source, true, false);
    program(&source, 0, false);
    program(&source, 1, true);
    source.endpoint.msix().trigger(1);
    let state = source.endpoint.save();
    let bytes = vmstate::to_bytes(&state);
    let state = vmstate::from_bytes::<EndpointState>(&bytes, 1).unwrap();
    let (target, sink) = Function::new(3);
    target.endpoint.restore(&state).unwrap();
    assert_eq!(sink.take(), [Told::Set(0, Some(MESSAGE))]);
    assert_eq!(pending(&target), 0b10);
    assert_eq!(vmstate::to_bytes(&target.endpoint.save()), bytes);
    write32(&target, TABLE + 16 + 12, 0);
    assert_eq!(sink.take(), [Told::Set(1, Some(MESSAGE)), Told::Signal(1)]);
}

#[test]
fn impossible_tables_are_refused() {
    let (source, _) = Function::new(2);
    control(&source, true, false);
    let good = source.endpoint.save();
    let (target, sink) = Function::new(2);
    let refuse = |change: fn(&mut EndpointState)| {
        let mut state = good.clone();
        change(&mut state);
        target.endpoint.restore(&state).unwrap_err()
    };
    let count = |error| matches!(error, Error::VectorCountMismatch { here: 2, .. });
    assert!(count(refuse(|state| {
        state.msix.entries.pop();
    })));
    assert!(count(refuse(|state| state.msix.entries.push(MsixEntryState::default()))));
    assert!(count(refuse(|state| state.msix.count = 3)));
    let bad = |error, at| matches!(error, Error::BadVector { vector, .. } if vector == at);
    assert!(bad(refuse(|state| state.msix.entries[1].address = 0xfee0_0002), 1));
    assert!(bad(
        refuse(|state| {
            state.msix.entries[0].masked = false;
            state.msix.entries[0].pending = true;
        }),
        0
    ));
    assert!(bad(
        refuse(|state| {
            state.config.bytes[usize::from(MSIX_CAPABILITY) + 3] = 0;
            state.msix.entries[1].pending = true;
        }),
        1
    ));
    assert!(bad(
        refuse(|state| {
            state.msix.entries[1].masked = false;
            state.msix.entries[1].pending = true;
        }),
        1
    ));
    assert_eq!(target.endpoint.save(), Function::new(2).0.endpoint.save(), "refusals change nothing");
    assert_eq!(sink.take(), []);
}
