//! Save, restore, and what restore refuses.

use super::*;

#[test]
fn a_restored_device_goes_on_where_the_saved_one_stopped() {
    let mut source = Guest::ready(64);
    source.ask(BUFFER, 10);
    source.device.process(0);
    source.ask(BUFFER + 0x100, 20);
    source.device.pause();
    let bytes = vmstate::to_bytes(&source.device.save());
    let state = vmstate::from_bytes::<VirtioState>(&bytes, 1).unwrap();
    assert_eq!((state.queues[0].next_available, state.queues[0].next_used), (1, 1));

    let target = Guest::with_memory(source.memory.clone());
    target.device.restore(&state).unwrap();
    assert_eq!(vmstate::to_bytes(&target.device.save()), bytes);
    assert!(!target.device.process(0));
    assert_eq!(target.used(1).0, 1, "paused until resumed");
    target.device.resume();
    assert_eq!(target.take_wakes(), [0]);
    assert!(!target.device.process(0));
    assert_eq!(target.used(1), (2, 0, 20));
    assert_eq!(target.bytes(BUFFER + 0x100, 20), expected(20));
    assert_eq!(target.take_signals(), [0]);
}

#[test]
fn a_device_that_was_never_used_can_be_restored() {
    let source = Guest::new();
    source.device.pause();
    let target = Guest::with_memory(source.memory.clone());
    target.device.restore(&source.device.save()).unwrap();
    target.negotiate();
    target.set_up_queue(8);
    assert_eq!(target.status(), 0xb);
}

#[test]
fn save_changes_nothing() {
    let mut guest = Guest::ready(64);
    guest.ask(BUFFER, 10);
    guest.device.pause();
    let before = guest.bytes(0, MEMORY_BYTES);
    assert_eq!(guest.device.save(), guest.device.save());
    assert_eq!(guest.bytes(0, MEMORY_BYTES), before);
    guest.device.resume();
    guest.device.process(0);
    assert_eq!(guest.used(0), (1, 0, 10));
}

/// A change of a state, and a word of the error that it must cause.
type Case = (&'static str, fn(&mut VirtioState));

#[test]
fn every_field_is_checked() {
    let source = Guest::ready(64);
    source.device.pause();
    let good = source.device.save();
    let target = Guest::with_memory(source.memory.clone());
    let untouched = target.device.save();
    let cases: [Case; 29] = [
        ("device type", |state| state.device_type = 1),
        ("queue count", |state| state.queue_count = 2),
        ("number of queues", |state| state.queues.clear()),
        ("number of queues", |state| state.queues.push(QueueState::default())),
        ("driver features", |state| state.driver_features |= 1),
        ("driver features", |state| state.driver_features |= 1 << 33),
        ("VERSION_1", |state| state.driver_features = 0),
        ("status", |state| state.status |= 16),
        ("status", |state| state.status |= 32),
        ("DRIVER_OK", |state| state.status = 7),
        ("ISR", |state| state.isr = 4),
        ("configuration vector", |state| state.config_vector = 2),
        ("configuration vector", |state| state.config_vector = 0xfffe),
        ("size", |state| state.queues[0].size = 0),
        ("size", |state| state.queues[0].size = 48),
        ("size", |state| state.queues[0].size = 128),
        ("vector", |state| state.queues[0].vector = 2),
        ("descriptor table", |state| state.queues[0].descriptors = 8),
        ("descriptor table", |state| state.queues[0].descriptors = MEMORY_BYTES as u64 - 16),
        ("descriptor table", |state| state.queues[0].descriptors = !15),
        ("available ring", |state| state.queues[0].driver = 1),
        ("available ring", |state| state.queues[0].driver = MEMORY_BYTES as u64 - 2),
        ("used ring", |state| state.queues[0].device = 2),
        ("used ring", |state| state.queues[0].device = 1 << 40),
        ("further apart", |state| state.queues[0].next_available = 65),
        ("further apart", |state| state.queues[0].next_used = 1),
        ("disabled", |state| {
            state.queues[0].enabled = false;
            state.queues[0].next_used = 1;
        }),
        ("configuration space", |state| state.endpoint.config.bytes[0] ^= 1),
        ("MSI-X table", |state| state.endpoint.msix.count = 1),
    ];
    for (word, change) in cases {
        let mut state = good.clone();
        change(&mut state);
        let error = target.device.restore(&state).unwrap_err();
        let text = format!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
        assert!(text.contains(word), "{text:?} should speak of {word:?}");
        assert_eq!(target.device.save(), untouched, "{word}");
    }
    target.device.restore(&good).unwrap();
}

#[test]
fn truncated_and_flipped_states_never_panic() {
    let source = Guest::ready(64);
    source.device.pause();
    let good = vmstate::to_bytes(&source.device.save());
    let target = Guest::with_memory(source.memory.clone());
    for length in 0..good.len() {
        assert!(vmstate::from_bytes::<VirtioState>(&good[..length], 1).is_err(), "{length} bytes");
    }
    for position in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[position] ^= 1 << bit;
            if let Ok(state) = vmstate::from_bytes::<VirtioState>(&bytes, 1)
                && target.device.restore(&state).is_ok()
            {
                assert_eq!(vmstate::to_bytes(&target.device.save()), bytes, "byte {position} bit {bit}");
            }
        }
    }
}
